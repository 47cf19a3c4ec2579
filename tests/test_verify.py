"""Other people's losses, scorers and steps: the right ones pass, the wrong ones are named."""

import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest

import strangers
from minidpo import Config, Tensor, cli, losses, scoring, verify
from minidpo.cli import parser
from minidpo.theory import mutants
from minidpo.verify import cells, frameworks, logprob_check, loss_check, texts

SLOW = [pytest.mark.slow]  # XLA compiles every shape


def subject(kind, name, function, framework, options, truth, note):
    marks = SLOW if framework == "jax" else []
    return pytest.param(kind, function, framework, options, truth, note, marks=marks, id=name)


@pytest.mark.parametrize(
    ("kind", "function", "framework", "options", "truth", "note"), [subject(*row) for row in strangers.SUBJECTS]
)
def test_a_stranger_s_code_is_named(kind, function, framework, options, truth, note):
    """What is right raises no alarm; what is wrong is named first by its cause, and serves its reader as data."""
    if framework != "numpy":
        pytest.importorskip(framework)
    report = getattr(verify, kind)(function, framework=framework, **options)
    codes = [finding.code for finding in report.findings]
    assert report.right if truth == "right" else codes and codes[0] in truth, f"{report}\n{truth}: {note}"
    remarks = {remark.code for remark in report.remarks}
    if truth == "right" and framework != "jax":  # XLA may turn a product with a mask into a choice
        for remark in ("prompt_counted_cancels", "rewards_without_beta", "nan_where_a_pad_is_minus_infinity"):
            assert (remark in remarks) == (remark in note), report
    assert json.loads(json.dumps(report.as_dict(), allow_nan=False))["right"] is report.right
    if not report.right:
        with pytest.raises(AssertionError) as caught:
            report.assert_right()
        assert codes[0] in str(caught.value)


def test_sixty_wrong_subjects_and_twenty_five_right_ones_are_tried():
    """The strangers are many, of three frameworks and of every kind."""
    wrong = [row for row in strangers.SUBJECTS if row[5] != "right"]
    assert len(wrong) >= 60 and len(strangers.SUBJECTS) - len(wrong) >= 25
    assert {row[3] for row in wrong} == {"numpy", "torch", "jax"} and {row[0] for row in wrong} == {
        "loss", "logprobs", "step",
    }  # fmt: skip


# ---- losses ---------------------------------------------------------------------------------------------------------


def ours(w, l, rw, rl, beta):
    return losses.dpo_loss(w, l, rw, rl, beta).loss.data


@pytest.mark.parametrize("beta", [0.01, 0.1, 1.0, 5.0])
def test_our_loss_is_right(beta):
    """The DPO loss of this package passes, at any beta."""
    report = verify.loss(ours, beta=beta)
    assert report.right and "numpy" in str(report), report


@pytest.mark.parametrize("name", [name for name in losses.LOSSES if name not in ("dpo", "reference_free")])
def test_our_other_losses_are_named(name):
    """Another loss of the registry is recognised as that loss, or as what it is a case of."""
    try:
        choice = losses.Choice(name)
        choice(*loss_check.random_pairs(np.random.default_rng(0), 5), beta=0.1)
    except (TypeError, ValueError):
        pytest.skip("it needs more than four numbers")
    report = verify.loss(lambda *x: choice(*x[:4], beta=x[4]).loss.data)
    assert not report.right
    assert report.findings[0].code not in ("not_callable", "not_repeatable", "inputs_changed"), report


def eq7(w, l, rw, rl, beta):
    return np.logaddexp(0, -beta * ((w - rw) - (l - rl))).mean()


@pytest.mark.parametrize(
    ("function", "options"),
    [
        (lambda rw, rl, w, l, beta: eq7(w, l, rw, rl, beta),
         {"arguments": "ref_logp_w, ref_logp_l, logp_w, logp_l, beta"}),
        (lambda *, pi_w, pi_l, ref_w, ref_l, tau: eq7(pi_w, pi_l, ref_w, ref_l, tau),
         {"arguments": {"pi_w": "logp_w", "pi_l": "logp_l", "ref_w": "ref_logp_w", "ref_l": "ref_logp_l",
                        "tau": "beta"}}),
        (lambda chosen, rejected, beta: np.logaddexp(0, beta * (rejected - chosen)),
         {"arguments": lambda w, l, rw, rl, beta: (w - rw, l - rl, beta)}),
        (lambda pi, ref, beta: eq7(pi["w"], pi["l"], ref["w"], ref["l"], beta),
         {"arguments": lambda w, l, rw, rl, beta: ({"w": w, "l": l}, {"w": rw, "l": rl}, beta)}),
        (lambda w, l, rw, rl, beta: [float(eq7(*x, beta)) for x in zip(w, l, rw, rl)],
         {"arguments": lambda w, l, rw, rl, beta: (w.tolist(), l.tolist(), rw.tolist(), rl.tolist(), beta)}),
        (lambda w, l, rw, rl: eq7(w, l, rw, rl, 0.3), {"beta": 0.3}),
        (lambda w, l, rw, rl, label_smoothing=0.0, beta=0.1: eq7(w, l, rw, rl, beta) + label_smoothing, {}),
        (lambda w, l, rw, rl, beta: {"loss": eq7(w, l, rw, rl, beta), "rewards": beta * (w - rw)}, {}),
    ],
)  # fmt: skip
def test_a_loss_of_another_signature_can_be_adapted(function, options):
    """Another order, other names, margins, records, lists, beta in the object: each is right, adapted or as it is."""
    verify.loss(function, **options).assert_right()


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda w, l, rw, rl, beta: eq7(w, l, rw, rl, 0.37), "computes with 0.37"),
        (lambda *x: 0.8 * eq7(*x) + 0.2 * eq7(x[1], x[0], x[3], x[2], x[4]), "smoothed, with 0.2"),
        (lambda w, l, rw, rl, beta: eq7(w - 3 / beta, l, rw, rl, beta), "3 is subtracted from z"),
        (lambda w, l, rw, rl, beta: eq7(w, l, rw, rl, 2 * beta), "multiplied by 0.2, not by beta = 0.1"),
        (lambda w, l, rw, rl, beta: eq7(w, l, rw, rl, beta**2), "beta_twice: the margin is multiplied by beta twice"),
        (lambda w, l, rw, rl, beta: eq7(w, l, rw, rl, 1 / beta), "beta_divides: the margin is divided by beta"),
        (lambda w, l, rw, rl, beta: eq7(w, l, rw, rl, 1.0), "beta_missing: the margin is not multiplied by beta"),
        (lambda w, l, rw, rl, beta: eq7(l, w, rl, rw, beta**2), "pair_swapped: chosen and rejected are swapped, too"),
        (lambda w, l, rw, rl, beta: eq7(w, l, 0 * rw, 0 * rl, beta), "do not enter"),
        (lambda w, l, rw, rl, beta: eq7(w, l, rw, 2 * rl, beta), "2 ref_logp_l"),
        (lambda w, l, rw, rl, beta: np.minimum(eq7(w, l, rw, rl, beta), 9.0), "never exceeds 9"),
        (lambda w, l, rw, rl, beta: 1 / 0, "could not be called"),
    ],
)  # fmt: skip
def test_the_numbers_of_a_wrong_loss_are_read_from_it(change, sentence):
    """Which beta, smoothing, target margin or cap a loss has is in its sentence."""
    report = verify.loss(change)
    assert not report.right and sentence in str(report), report
    assert ("COULD NOT RUN" in str(report)) == ("called" in sentence)
    assert ("ZeroDivisionError" in report.traceback) == ("called" in sentence)


def of_ratios(loss):
    """A loss of the two log-ratios and beta, as a function of four log-probabilities."""
    return lambda w, l, rw, rl, beta: loss(w - rw, l - rl, beta)


def sigma(x):
    return np.exp(-np.logaddexp(0, -x))


@pytest.mark.parametrize(
    ("function", "codes", "sentence"),
    [
        (of_ratios(lambda h, g, b: np.logaddexp(0, -b * (np.sort(h) - np.sort(g)))), ["other_loss"], "'aot_unpaired'"),
        (of_ratios(lambda h, g, b: 1 - sigma(b * h) + sigma(b * g)), ["other_loss"], "'apo_zero', at beta = 0.1, plus"),
        (of_ratios(lambda h, g, b: np.logaddexp(0, -b * (h - g) + 0.7 * np.maximum(0, -h))), ["other_loss"],
         "'dpop', with a penalty of 7"),
        (of_ratios(lambda h, g, b: np.concatenate([sigma(-b * (h - max(g.mean(), 0))),
                                                   sigma(-b * (max(h.mean(), 0) - g))])), ["other_loss"], "kto_pair"),
        (of_ratios(lambda h, g, b: np.logaddexp(0, -b * (h - g - (h - g).mean()))), ["pairs_coupled"], "each other"),
        (lambda w, l, rw, rl, b: np.logaddexp(0, -(w - l) / b), ["reference_ignored", "beta_divides"], "divided by"),
        (lambda w, l, rw, rl, beta: len(w) * eq7(w, l, rw, rl, beta**2), ["beta_twice", "sum_over_batch"], "sum"),
        (lambda w, l, rw, rl, beta, smoothing: 0, ["not_callable"], "it needs 'smoothing', too"),
        (lambda w, l, beta: 0, ["not_callable"], "it does not take 4 arguments"),
        (lambda w, l, rw, rl, beta: eq7(float(w), l, rw, rl, beta), ["not_callable"], "call it pair by pair"),
    ],
)  # fmt: skip
def test_a_loss_that_others_publish_is_named(function, codes, sentence):
    """Relatives of DPO, losses that couple their pairs, and calls that cannot be made: the sentence says which."""
    report = verify.loss(function)
    assert [finding.code for finding in report.findings] == codes and sentence in str(report), report


def missing():
    raise ModuleNotFoundError("No module named 'jax'")


def test_a_loss_is_tried_with_the_frameworks_that_are_there(monkeypatch):
    """Without a framework NumPy comes first, then what the caller has imported; a wrong name is refused."""
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    monkeypatch.delitem(sys.modules, "jax", raising=False)
    report = verify.loss(lambda *x: x[0].backward())
    assert [finding.code for finding in report.findings] == ["not_callable"]
    with pytest.raises(ValueError, match="framework must be one of numpy, torch, jax, not 'tensorflow'"):
        verify.loss(ours, framework="tensorflow")
    monkeypatch.setitem(frameworks.FRAMEWORKS, "jax", missing)
    with pytest.raises(ValueError, match="jax is not installed"):
        verify.loss(ours, framework="jax")
    with pytest.raises(ValueError, match="beta must be positive"):
        verify.loss(ours, beta=0.0)


# ---- log-probabilities ----------------------------------------------------------------------------------------------


def logp_of(logits, ids):
    logits = np.asarray(logits, dtype="float64")
    return np.take_along_axis(logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True), ids[..., None], -1)[..., 0]


def of_model(model, prompt, response, first=0, last=None, shift=1):
    ids = np.concatenate([prompt, response], axis=1)
    logp = logp_of(model(ids)[:, : ids.shape[1] - shift], ids[:, shift:])
    return logp[:, prompt.shape[1] - shift :][:, first:last].sum(axis=1)


def unpacked(logits, loss):
    return logits


def of_strings(model, tokenizer, prompt, response, end=True, seen=None):
    x, y = (tokenizer(text)["input_ids"] for text in (prompt, response))
    y = [*y, tokenizer.eos_token_id] if end else y
    ids = np.array([[*x, *y]])
    logits = model(input_ids=ids[:, :seen]).logits[0, len(x) - 1 :]
    return logp_of(logits[: len(y)], ids[0, len(x) :]).sum()


@pytest.mark.parametrize(
    ("function", "layout", "code"),
    [
        (of_model, "model", None),
        (lambda *x: of_model(*x, first=1), "model", "first_token_missing"),
        (lambda *x: of_model(*x, last=-1), "model", "last_token_missing"),
        (lambda *x: of_model(*x, shift=0), "model", "no_shift"),
        (lambda *x: of_model(*x) / x[2].shape[1], "model", "mean_for_sum"),
        (lambda *x: -of_model(*x), "model", "negative_logprob"),
        (lambda m, x, y: of_model(m, x[:, :1], np.concatenate([x[:, 1:], y], axis=1)), "model", None),
        (of_strings, "strings", None),
        (lambda *x: of_strings(*x, end=False), "strings", "last_token_missing"),
        (lambda *x: of_strings(*x, end=False, seen=-1), "strings", "last_token_missing"),
        (lambda m, x, y: of_model(lambda ids: m(ids).logits, x, y), "model", None),
        (lambda m, x, y: of_model(lambda ids: m(ids)[0], x, y), "model", None),
        (lambda m, x, y: of_model(lambda ids: unpacked(*m(ids)), x, y), "model", None),
    ],
)
def test_a_scorer_that_calls_a_model_is_read_from_the_logits_that_it_got(function, layout, code):
    """A function of a model, or of a model and strings, is named like one of logits."""
    report = verify.logprobs(function, layout=layout)
    assert [finding.code for finding in report.findings] == ([] if code is None else [code]), report


MUTANTS = {
    "no_shift": "no_shift", "first_token_masked": "first_token_missing", "end_of_text_masked": "last_token_missing",
    "pads_scored": "pad_counted", "wrong_slice_end": "last_token_missing", "mean_for_sum": "mean_for_sum",
    "shift_by_two": "shifted_twice", "dropped_prompt_token": "wrong_value", "wrong_temperature": "wrong_value",
    "last_prompt_token_scored": "prompt_counted_cancels", "wrong_positions": None,
}  # fmt: skip


@pytest.mark.parametrize("mutant", [*mutants.NOT_A_DISTRIBUTION, *mutants.WRONG_DISTRIBUTION], ids=lambda m: m.__name__)
def test_our_own_mutants_are_named(mutant, monkeypatch):
    """Each shipped wrong way to score is named, but for wrong positions, which no logits show."""

    def score(model, prompt, response):
        def logits(params, config, rows):
            return Tensor(model(rows.tokens[None])[0])

        monkeypatch.setattr(mutants, "row_logits", logits)
        monkeypatch.setattr(scoring, "forward", lambda params, config, tokens: Tensor(model(np.asarray(tokens))))
        config = Config(texts.V, 64, 4, 1, 1)
        return mutant({}, config, prompt[0].tolist(), response[0].tolist())

    code = MUTANTS[mutant.__name__]
    monkeypatch.setattr(mutants, "END_OF_TEXT", texts.EOS)
    monkeypatch.setattr(logprob_check, "_extremes", lambda *arguments, **options: None)
    if mutant.__name__ == "last_prompt_token_scored":  # a prompt of one token has no token before its last
        monkeypatch.setattr(logprob_check, "SINGLE", logprob_check.SIZES)
    report = verify.logprobs(score, layout="model")
    named = [each.code for each in (*report.findings, *report.remarks)]
    assert named[:1] == ([] if code is None else [code]), report


def halves(texts):
    """A layout of another's: padding on the left, and a mask of the response."""
    width = int(texts.lengths.max())
    rows = [[texts.pad] * (width - len(x) - len(y)) + x + y for x, y in zip(texts.prompts, texts.responses)]
    mask = np.array([[0] * (width - len(y)) + [1] * len(y) for y in texts.responses])
    ids = np.array(rows)
    return texts.logits(ids), ids, mask


def masked(logits, ids, mask):
    return (logp_of(logits[:, :-1], ids[:, 1:]) * mask[:, 1:]).sum(axis=1)


def test_a_layout_may_be_a_function():
    """Left padding, made by the caller's own function, is read like right padding."""
    verify.logprobs(masked, layout=halves).assert_right()
    late = verify.logprobs(lambda logits, ids, mask: masked(logits, ids, np.roll(mask, 1, axis=1)), layout=halves)
    assert [finding.code for finding in late.findings] == ["first_token_missing"]
    with pytest.raises(ValueError, match="layout must be one of labels"):
        verify.logprobs(masked, layout="packed")


def of_labels(logits, labels):
    counts = labels[:, 1:] != -100
    return np.where(counts, logp_of(logits[:, :-1], np.where(counts, labels[:, 1:], 0)), 0.0).sum(axis=1)


def test_padding_on_the_left_is_tried():
    """A scorer that is right with pads behind the texts, and not with pads before them, is wrong."""
    verify.logprobs(of_labels).assert_right()
    report = verify.logprobs(lambda logits, labels: of_labels(logits, labels) * (1 + (labels[:, -1] != -100).all()))
    assert report.tried[-1] == "pads before the texts" and not report.right, report


def repeats_once(logits, labels):
    """Of tokens that a response has twice, one alone is counted."""
    first = [[t for t in range(len(row)) if row[t] != -100 and row[t] not in row[:t]] for row in labels]
    kept = [[label if t in places else -100 for t, label in enumerate(row)] for row, places in zip(labels, first)]
    return of_labels(logits, np.array(kept))


def test_all_short_responses_have_probability_1():
    """The chain rule and the normalisation oracle see what a text without repeated tokens cannot show."""
    report = verify.logprobs(repeats_once)
    assert [finding.code for finding in report.findings] == ["wrong_value", "not_normalised"], report
    assert "all 15 responses" in report.tried[-1] and report.findings[1].found > 1.005
    for layout, function in (("model", of_model), ("strings", of_strings), ("mask", masked)):
        assert "by the chain rule" in verify.logprobs(function, layout=layout).tried[-2]


def test_a_pad_that_is_written_into_a_scorer_is_a_remark():
    """A scorer that skips token 0 as its pad is right where 0 is the pad, which it is told."""

    def whole(logits, ids):
        return (logp_of(logits[:, :-1], ids[:, 1:]) * (ids[:, 1:] != 0)).sum(axis=1)

    report = verify.logprobs(whole, layout=lambda texts: (texts.logits(texts.ids), texts.ids))
    assert report.right and "pad_is_0" in {remark.code for remark in report.remarks}, report


def test_labels_of_minus_100_may_be_looked_up():
    """Where -100 is an index of the vocabulary, what is masked afterwards does no harm."""
    verify.logprobs(
        lambda logits, labels: (logp_of(logits[:, :-1], labels[:, 1:]) * (labels[:, 1:] != -100)).sum(axis=1)
    ).assert_right()


def test_the_picture_shows_what_was_counted():
    """The report draws, place by place, what was counted and what counts."""
    report = verify.logprobs(lambda logits, ids, mask: masked(logits, ids, np.roll(mask, 1, axis=1)), layout="mask")
    lines = report.picture.splitlines()
    assert lines[1:4] == ["  text 0  ppprrrr..", "              #### ", "             ====  "]
    assert [finding.code for finding in report.findings] == ["first_token_missing", "pad_counted"]


def test_cells_are_read_exactly():
    """From the gradient of a weighted sum of log-probabilities each (row, token) and its weight come back."""
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(6, texts.V))
    p = np.exp(logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True))
    wanted = {(0, 3): 1.0, (2, 5): -0.25, (2, 7): 2.0, (5, 0): 1 / 3}
    gradient = np.zeros_like(logits)
    for (t, v), weight in wanted.items():
        gradient[t] += weight * (np.eye(texts.V)[v] - p[t])
    found, fault = cells.cells(gradient, logits)
    assert found == pytest.approx(wanted) and fault == ""
    assert cells.cells(np.eye(texts.V)[:6], logits)[1] == "logits are added up without log_softmax"
    assert cells.cells(rng.normal(size=logits.shape), logits)[1] == "it is not a sum of log-probabilities"


def test_labels_are_checked_without_a_scorer():
    """Labels of a collator are compared with the places that count."""
    ids = np.array([[5, 6, 7, 8, 0, 9], [5, 4, 3, 0, 9, 9]])
    right = np.where([[0, 0, 1, 1, 1, 0], [0, 0, 1, 1, 0, 0]], ids, -100)
    lengths = {"prompt_lengths": [2, 2], "lengths": [5, 4]}
    assert verify.labels(ids, right, **lengths).right
    for labels, code in (
        (np.where(ids == 0, -100, right), "last_token_missing"),
        (np.where([[0, 0, 0, 1, 1, 0], [0, 0, 0, 1, 0, 0]], ids, -100), "first_token_missing"),
        (np.where([[0, 0, 1, 1, 1, 1], [0, 0, 1, 1, 1, 0]], ids, -100), "pad_counted"),
        (np.concatenate([right[:, 1:], np.full((2, 1), -100)], axis=1), "shifted_twice"),
        (np.where([[1, 1, 0, 0, 0, 1], [1, 1, 0, 0, 1, 1]], ids, -100), "mask_inverted"),
        (np.where(right == 8, 7, right), "wrong_value"),
    ):
        report = verify.labels(ids, labels, **lengths)
        assert report.findings and report.findings[0].code == code, (code, report)
    whole = verify.labels(ids, np.where([[0, 1, 1, 1, 1, 0], [0, 1, 1, 1, 0, 0]], ids, -100), **lengths)
    assert whole.right and whole.remarks[0].code == "prompt_counted_cancels"


# ---- steps, in NumPy ------------------------------------------------------------------------------------------------


def numpy_step(policy, reference, batch, beta, sign=1.0):
    w, l, rw, rl = (
        masked(model(batch[f"{side}_ids"]), batch[f"{side}_ids"], batch[f"{side}_mask"])
        for model in (policy, reference)
        for side in ("chosen", "rejected")
    )
    return eq7(w, l, rw, rl, sign * beta)


def test_a_step_in_numpy_is_checked_by_its_value_and_differences():
    """A step without autograd is right by its value; its gradient is taken numerically."""
    verify.step(numpy_step).assert_right()
    swapped = verify.step(lambda *x: numpy_step(*x, sign=-1.0))
    assert [finding.code for finding in swapped.findings] == ["pair_swapped"]


def test_a_step_divided_by_micro_batches_is_told_so():
    """A loss that is Eq. 7 times a constant, in value and gradient, is told the constant."""
    report = verify.step(lambda *x: numpy_step(*x) / 8)
    assert [finding.code for finding in report.findings] == ["wrong_value"] and "Eq. 7 times 0.125" in str(report)


def test_a_step_of_means_over_padded_texts_is_named():
    """A mean over all places of the batch, pads included, is a mean for a sum and counts pads."""

    def step(policy, reference, batch, beta):
        w, l, rw, rl = (
            logp_of(model(ids)[:, :-1], ids[:, 1:]).mean(axis=1)
            for model in (policy, reference)
            for ids in (batch["chosen_ids"], batch["rejected_ids"])
        )
        return eq7(w, l, rw, rl, beta)

    codes = [finding.code for finding in verify.step(step).findings]
    assert codes == ["pads_counted", "mean_for_sum"], codes


# ---- the command ----------------------------------------------------------------------------------------------------

MODULE = """
import numpy as np

def right(w, l, rw, rl, beta):
    return np.logaddexp(0, -beta * ((w - rw) - (l - rl))).mean()

def swapped(w, l, rw, rl, beta):
    return right(l, w, rl, rw, beta)

def reference_first(rw, rl, w, l, beta):
    return right(w, l, rw, rl, beta)

class Scorer:
    @staticmethod
    def score(logits, ids, mask):
        logp = logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)
        return (np.take_along_axis(logp[:, :-1], ids[:, 1:, None], -1)[..., 0] * mask[:, 1:]).sum(axis=1)

def broken(*arguments):
    raise KeyError("nothing")
"""


@pytest.mark.parametrize(
    ("words", "status", "sentence"),
    [
        (["loss", "theirs:right"], 0, "right: right"),
        (["loss", "theirs:right", "--beta=0.7", "--framework=numpy"], 0, "at beta 0.7 and 1.75"),
        (["loss", "theirs:swapped"], 1, "pair_swapped: chosen and rejected are swapped"),
        (["loss", "theirs:reference_first"], 1, "pair_swapped"),
        (["loss", "theirs:reference_first", "--arguments=ref_logp_w,ref_logp_l,logp_w,logp_l,beta"], 0, "right"),
        (["loss", "theirs:broken"], 2, "KeyError: 'nothing'"),
        (["loss", "theirs:missing"], 2, "cannot be imported (AttributeError"),
        (["loss", "nowhere_at_all:f"], 2, "cannot be imported (ModuleNotFoundError"),
        (["loss", "theirs"], 2, "is not MODULE:FUNCTION"),
        (["logprobs", "theirs:Scorer.score", "--layout=mask"], 0, "score: right"),
        (["logprobs", "theirs:Scorer.score", "--layout=labels"], 2, "could not be called in this layout"),
        (["step", "theirs:broken"], 2, "could not be called as fn(policy, reference, batch, beta)"),
    ],
)
def test_the_command_says_it_and_exits_with_it(words, status, sentence, tmp_path, monkeypatch, capsys):
    """The command imports a function from the current folder; 0 is right, 1 wrong, 2 could not be run."""
    (tmp_path / "theirs.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "theirs", raising=False)
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    monkeypatch.delitem(sys.modules, "jax", raising=False)
    help_text = " ".join(parser.parser("verify").format_help().split())
    assert "beta to check a loss or a step with, or the one that it holds itself" in help_text
    assert cli.main(["verify", *words]) == status
    assert sentence in capsys.readouterr().out
    assert cli.main(["verify", *words, "--json"]) == status
    assert json.loads(capsys.readouterr().out)["right"] is (status == 0)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["loss", "theirs:right", "--layout=mask"], "--layout is for logprobs"),
        (["step", "theirs:right", "--arguments=beta"], "--arguments is for a loss"),
        (["logprobs", "theirs:right", "--beta=0.3"], "log-probabilities have none"),
        (["logprobs", "theirs:right", "--layout=rows"], "layout must be one of labels"),
    ],
)
def test_an_option_of_another_kind_is_refused(words, sentence, tmp_path, monkeypatch, capsys):
    """No option is ignored."""
    (tmp_path / "theirs.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    assert cli.main(["verify", *words]) == 2
    assert sentence in capsys.readouterr().err


# ---- the page -------------------------------------------------------------------------------------------------------

PAGE = (Path(verify.__file__).parent / "README.md").read_text()


class Holder:
    """A loss that holds its beta."""

    def __init__(self, beta):
        self.beta = beta

    def __call__(self, w, l, rw, rl):
        return eq7(w, l, rw, rl, self.beta)


ADAPTED = {
    "np": np,
    "verify": verify,
    "my_loss": eq7,
    "masked": masked,
    "of_model": of_model,
    "of_strings": of_strings,
    "Holder": Holder,
    "reference_first": lambda rw, rl, w, l, beta: eq7(w, l, rw, rl, beta),
    "named": lambda *, pi_w, pi_l, ref_w, ref_l, tau: eq7(pi_w, pi_l, ref_w, ref_l, tau),
    "of_margins": lambda policy, reference, beta: np.logaddexp(0, -beta * (policy - reference)),
    "of_records": lambda pi, ref, beta: eq7(pi["chosen"], pi["rejected"], ref["chosen"], ref["rejected"], beta),
    "of_lists": lambda w, l, rw, rl, beta: sum(float(eq7(*x, beta)) for x in zip(w, l, rw, rl)) / len(w),
    "in_halves": lambda *batch: [masked(*(each[half] for each in batch)) for half in (slice(0, 2), slice(2, None))],
}  # fmt: skip


@pytest.mark.parametrize("code", re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL))
def test_the_adapters_of_the_page_run(code):
    """Every block of the page runs as it stands."""
    exec(code, dict(ADAPTED))


def test_the_page_lists_every_code():
    """The codes of the page are those in the source."""
    source = "".join(path.read_text() for path in Path(verify.__file__).parent.glob("*.py"))
    used = set(re.findall(r'(?:fault|remark)\(\s*"(\w+)"', source)) | {each.code for each in loss_check.SUSPECTS}
    assert used and used <= set(re.findall(r"`(\w+)`", PAGE))
