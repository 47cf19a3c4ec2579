"""Somebody's log-probability of a response: what it counts, cell by cell, and its value on all short responses."""

import functools
import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy

from ..backend import Array
from ..theory import exact
from .cells import Cells, cells, diagnose, picture
from .frameworks import Framework, differences, leading
from .loss_check import close
from .report import Report, run
from .texts import EOS, LAYOUTS, Enumerable, Model, NeverSeen, Texts, V, arguments_of, located, random_texts, settle


def traced(
    call: Callable[[], Any], models: Sequence[Model], by_differences: bool = False
) -> tuple[Any, list[list[Array | None]]]:
    """What a call returns, and its derivatives in the logits of each call of the models: [output][call]."""
    framework = models[0].framework
    by_differences = by_differences or framework.name == "numpy"
    for model in models:
        model.calls.clear()
    result = call()
    kept = [list(model.calls) for model in models]

    def again(*logits: Any) -> Any:
        rest = list(logits)
        for model, calls in zip(models, kept):
            own, rest = rest[: len(calls)], rest[len(calls) :]
            model.calls.clear()
            model.moved, model.leaves = (own, None) if by_differences else (None, own)
        try:
            y = leading(call())
        finally:
            for model in models:
                model.moved = model.leaves = None
        return framework.host(y).reshape(-1) if by_differences else flat(y)

    bases = [values for calls in kept for _, values, _ in calls]
    rows = differences(again, bases) if by_differences else framework.jacobian(again, bases)
    for model, calls in zip(models, kept):
        model.calls[:] = calls
    return result, rows


def flat(y: Any) -> Any:
    """A value of any shape as a row of numbers."""
    return y.reshape(-1) if hasattr(y, "reshape") else y


def expected_scores(texts: Texts, model: Model, whole: bool = False) -> Array:
    """The log-probability of each response, or `whole` text, under the logits that the subject was given."""
    scores = []
    for x, y in zip(texts.prompts, texts.responses):
        x, y = (x[:1], x[1:] + y) if whole else (x, y)
        call, b, start = located(x + y, model)
        ids, logits, _ = model.calls[call]
        logits = logits[b, start:]
        if len(logits) < len(x) + len(y) - 1:  # it never asked for the row of the last token
            logits = model.values(numpy.array([[*ids[b, :start], *x, *y]]))[0, start:]
        logits = logits[len(x) - 1 : len(x) + len(y) - 1]
        logp = logits - numpy.logaddexp.reduce(logits, axis=-1, keepdims=True)
        scores.append(logp[numpy.arange(len(y)), y].sum())
    return numpy.array(scores)


def logprobs(fn: Any, layout: Any = "labels", framework: str | None = None) -> Report:
    """Check a function that gives log pi(y|x), the sum over the tokens of a response, end-of-text included.

    `layout` says how `fn` is called:

        "labels"          fn(logits, labels): labels[b, t] is the token at t, -100 where nothing counts; fn shifts
        "labels_shifted"  the same after its caller has shifted
        "mask"            fn(logits, ids, mask): mask[b, t] is about the token at t; fn shifts
        "prompt_lengths"  fn(logits, ids, prompt_lengths, lengths)
        "model"           fn(model, prompt_ids, response_ids): (1, Tp), (1, Tr); model(ids) returns what fn takes:
                          logits, an object that has `.logits`, or (logits, loss)
        "strings"         fn(model, tokenizer, prompt, response), as Hugging Face's; fn appends tokenizer.eos_token_id
        a function        from `Texts` to the arguments of fn, a tuple; `texts.logits(ids)` gives logits

    logits are (B, T, V), everything else (B, T) or (B,) integers. `fn` returns (B,), or a tuple that begins with it.
    """
    report = Report(getattr(fn, "__name__", type(fn).__name__))
    if not callable(layout) and layout not in LAYOUTS:
        raise ValueError(f"layout must be one of {', '.join(LAYOUTS)} or a function, not {layout!r}")

    def check(each: Framework) -> None:
        try:
            _check(fn, layout, each, report)
        except NeverSeen as error:
            report.fault("wrong_value", str(error))

    run(report, framework, check, "in this layout: see its traceback")
    return report


SIZES = ((3, 4), (5, 2), (2, 6), (4, 1))  # tokens of each prompt and response
SINGLE = ((1, 1), (4, 5), (1, 2), (3, 5))  # of the same shape as a batch, since XLA compiles every shape


def _check(fn: Any, layout: Any, framework: Framework, report: Report) -> None:
    """Everything that is tried on a scorer."""
    rng, pad = numpy.random.default_rng(0), V - 1
    first = Model(framework, 7)
    settle(lambda: arguments_of(layout, random_texts(rng, SIZES, 0), first)(fn), [first])
    fresh = functools.partial(Model, framework, returns=first.returns)
    batches = [
        ("texts of unequal length", SIZES, 0, False),
        ("pads of another id", SIZES, V - 1, False),
        ("pads that have the id of end-of-text", SIZES, EOS, False),
        ("prompts and responses of one token, and a text that fills the batch", SINGLE, V - 1, False),
    ]
    if layout in ("labels", "labels_shifted", "mask"):
        batches.append(("pads before the texts", SIZES, V - 1, True))
    for what, sizes, own, left in batches:
        own = own if pad else 0
        report.tried.append(what)
        _read(fn, layout, random_texts(rng, sizes, own, int(sizes is not SINGLE), left), fresh(7), report)
        codes = {finding.code for finding in report.findings}
        if own == V - 1 and sizes is SIZES and callable(layout) and codes and codes <= {"pad_counted", "pads_counted"}:
            report.findings.clear()
            report.picture, pad = "", 0
            report.remark("pad_is_0", "it is right where the pad's id is 0, which is written into it, and nowhere else")
        if report.findings:
            return
    prompt = next((each.sentence for each in report.remarks if each.code == "prompt_counted_cancels"), "")
    if prompt.startswith("tokens"):  # of some of the prompt, it is not known which
        return
    if not callable(layout):
        _enumerate(fn, layout, Enumerable(framework, first.returns), report, bool(prompt))
    if not report.findings:
        _extremes(fn, layout, fresh, report, rng, pad, bool(prompt))


def _enumerate(fn: Any, layout: str, model: Enumerable, report: Report, whole: bool) -> None:
    """The chain rule and the normalisation oracle of `theory.exact`, over all short responses to two prompts."""
    cap, n, B, pad = 3, len(model.tokens), len(SIZES), model.tokens[1]  # the pad is one of the responses' tokens
    responses = [y for y in exact.complete_responses(n, cap) if layout != "strings" or y[-1] == 0]  # fn ends them
    report.tried.append(f"all {len(responses)} responses of at most {cap} tokens over {n}, by the chain rule")
    for x in ([1, 2, 2], [2]):
        found: list[float] = []
        for first in range(0, len(responses), B):
            some = [[model.tokens[i] for i in y] for y in (responses + responses)[first : first + B]]
            spare = max(map(sum, SIZES)) + 1 - len(x) - max(map(len, some))  # the shape of all other batches
            texts = Texts([[model.tokens[i] for i in x]] * B, some, pad, spare)
            model.calls.clear()
            y = model.framework.host(leading(arguments_of(layout, texts, model)(fn)))
            found += numpy.asarray(y).reshape(-1).tolist()
        wanted = [(x[:1], x[1:] + y) if whole else (x, y) for y in responses]
        right = [exact.chain_rule_logprob(model.params, model.config, *each) for each in wanted]
        pairs = list(zip(responses, right, found))  # the last batch may begin again
        if not all(close(*each[1:], 1e-5) for each in pairs):
            y, r, f = max(pairs, key=lambda each: abs(each[1] - each[2]))
            told = [model.tokens[i] for i in y]
            report.fault("wrong_value", f"the score of the response {told} is not that of the chain rule", r, f)
            total = math.fsum(math.exp(f) for _, _, f in pairs)
            if layout != "strings" and not whole and not close(total, 1.0, 1e-5):
                report.fault(
                    "not_normalised", "all responses to one prompt have a probability that is not 1", 1.0, total
                )
            return


def _read(fn: Any, layout: Any, texts: Texts, model: Model, report: Report) -> None:
    """Call the subject on a batch of texts, and say which cells it counted."""
    framework = model.framework
    call = arguments_of(layout, texts, model)
    outputs = []
    for _ in range(2):
        model.calls.clear()
        outputs.append(numpy.asarray(framework.host(leading(call(fn))), dtype="float64"))
    right = expected_scores(texts, model)
    if outputs[0].shape != outputs[1].shape or not close(outputs[0], outputs[1], 1e-9):
        fresh = arguments_of(layout, texts, model)
        model.calls.clear()
        third = numpy.asarray(framework.host(leading(fresh(fn))), dtype="float64")
        if third.shape == outputs[0].shape and close(third, outputs[0], 1e-9):
            report.fault("inputs_changed", "it writes into its arguments: called again, it counts other tokens")
        else:
            report.fault("not_repeatable", "called again with the same numbers it gives another result")
        return
    call = arguments_of(layout, texts, model)
    result, rows = traced(lambda: call(fn), [model])
    score = numpy.asarray(framework.host(leading(result)), dtype="float64")
    B = len(right)
    if not any(g is not None and g.any() for row in rows for g in row) and framework.name != "numpy":
        report.fault("no_gradient", "no gradient reaches the logits: was it run without a graph?")
        _, rows = traced(lambda: call(fn), [model], by_differences=True)
    _shape(report, texts, score, right)
    if score.shape not in ((B,), (B, 1)):
        return
    counted = [_cells_of(b, texts, model, rows[b], report) for b in range(B)]
    if any(each is None for each in counted):
        _not_cells(report, texts, model, score, right)
        return
    diagnose(report, texts, [each for each in counted if each is not None], average_option(fn))
    report.picture = report.picture or picture(texts, [each for each in counted if each is not None])
    if not report.findings and not report.remarks and not close(score, right):
        worst = int(numpy.argmax(abs(score - right)))
        report.fault("wrong_value", "its value is not what its gradient says", float(right[worst]), float(score[worst]))


def average_option(fn: Any) -> str:
    """The name of a parameter that turns the sum into a mean, if there is one."""
    try:
        names = inspect.signature(fn).parameters
    except (TypeError, ValueError):
        return ""
    return next((name for name in names if "average" in name or "mean" in name or "normali" in name), "")


def _shape(report: Report, texts: Texts, score: Array, right: Array) -> None:
    """Say what is wrong with a score that is not one number for each text."""
    B, T = texts.ids.shape
    if score.shape in ((B,), (B, 1)):
        return
    if score.size == 1:
        value = float(score.reshape(-1)[0])
        if close(value, right.sum()):
            report.fault(
                "sum_over_batch", "it is one number, the sum over the texts: DPO needs one for each", None, None
            )
        elif close(value, right.mean()):
            report.fault("sum_over_batch", "it is one number, the mean over the texts: DPO needs one for each")
        elif close(value, right.sum() / texts.mask.sum()):
            report.fault("mean_for_sum", "it is one number, the mean over all tokens of the batch")
        else:
            report.fault("sum_over_batch", "it is one number for the whole batch", right.tolist(), value)
        return
    if score.ndim == 2 and score.shape[0] == B and score.shape[1] in (T, T - 1):
        report.fault("never_summed", f"it returns {score.shape}, a number for each token, never summed")
        return
    if score.ndim == 1 and score.shape[0] in (T, T - 1):
        report.fault("wrong_axis", f"it returns {score.shape}: it is summed over the texts, not over their tokens")
        return
    report.fault("wrong_value", f"it returns {score.shape}, not ({B},)")


def _cells_of(b: int, texts: Texts, model: Model, row: list[Array | None], report: Report) -> Cells | None:
    """The cells of one text's score, by its places; None if it is no sum of log-probabilities."""
    call, own, start = located(texts.prompts[b] + texts.responses[b], model)
    gathered: Cells = {}
    for number, gradient in enumerate(row):
        if gradient is None:
            continue
        for other in range(len(gradient)):
            if not gradient[other].any():
                continue
            found, fault = cells(gradient[other], model.calls[number][1][other])
            if fault:
                report.picture = report.picture or fault
                return None
            if (number, other) != (call, own) and not _twin(model, number, other, call, own):
                report.fault("wrong_axis", f"the score of text {b} counts tokens of another text")
                continue
            for (t, v), weight in found.items():
                gathered[t - start, v] = gathered.get((t - start, v), 0.0) + weight
    return gathered


def _twin(model: Model, number: int, other: int, call: int, own: int) -> bool:
    """Whether two rows of calls begin with the same tokens, as where prompt and text are computed apart."""
    a, b = model.calls[number][0][other].tolist(), model.calls[call][0][own].tolist()
    return a[: len(b)] == b[: len(a)]


def _not_cells(report: Report, texts: Texts, model: Model, score: Array, right: Array) -> None:
    """Name a score that is no sum of log-probabilities."""
    fault, report.picture = report.picture, ""
    x, mask = model.calls[0][1], texts.mask
    numbers = {"expected": right.tolist(), "found": score.reshape(-1).tolist()}
    if x.shape[:2] == texts.ids.shape:
        for axis, name, rows in (
            *((1, "the places of a text", x[:, :end]) for end in (None, -1)), (0, "the texts of the batch", x),
        ):  # fmt: skip
            logp = rows - numpy.logaddexp.reduce(rows, axis=axis, keepdims=True)
            taken = numpy.take_along_axis(logp[:, : x.shape[1] - 1], texts.ids[:, 1:, None], axis=-1)[..., 0]
            if close(score.reshape(-1), (taken * mask[:, 1:]).sum(axis=1), 1e-5):
                report.fault("wrong_axis", f"the softmax runs over {name}, not over the vocabulary", **numbers)
                return
        p = numpy.exp(x - numpy.logaddexp.reduce(x, axis=-1, keepdims=True))
        taken = numpy.take_along_axis(p[:, :-1], texts.ids[:, 1:, None], axis=-1)[..., 0]
        if close(score.reshape(-1), (taken * mask[:, 1:]).sum(axis=1), 1e-5):
            report.fault("wrong_value", "probabilities are added up, not their logarithms", **numbers)
            return
    if close(score.reshape(-1), right, 1e-6):
        report.fault("wrong_gradient", "its value is right and its gradient is not that of a sum of log-probabilities")
    else:
        report.fault("wrong_value", fault or "it is not a sum of log-probabilities", **numbers)


def _extremes(
    fn: Any, layout: Any, fresh: Callable[..., Model], report: Report, rng: numpy.random.Generator, pad: int,
    whole: bool,
) -> None:  # fmt: skip
    """Very large logits, a long text, a pad with probability 0, and half precision; `whole` if prompts count, too."""

    def score(texts: Texts, model: Model) -> tuple[Array, Array]:
        y = numpy.asarray(model.framework.host(leading(arguments_of(layout, texts, model)(fn))), dtype="float64")
        return y.reshape(-1), expected_scores(texts, model, whole)

    report.tried.append("logits of 1e4; a response of 400 tokens; pads of probability 0")
    texts, large = random_texts(rng, SIZES, pad), fresh(8, scale=1e4)
    found, right = score(texts, large)
    _far(report, found, right, "with logits of 1e4")
    length = 400
    long = Texts([[3, 4]], [[*rng.integers(EOS + 1, V - 1, length - 1).tolist(), EOS]], pad)
    found, right = score(long, fresh(9))
    _far(report, found, right, f"for a response of {length} tokens")
    found, right = score(texts, NeverPads(fresh(10), texts))
    if numpy.isnan(found).any() and numpy.isfinite(right).all():
        report.remark(
            "nan_where_a_pad_is_minus_infinity", "where a pad has log-probability -inf it is nan: 0 * -inf; select"
        )
    for narrow in ("float16", "bfloat16") if large.framework.name != "numpy" else ():
        try:
            found, right = score(texts, fresh(11, dtype=narrow))
        except Exception:  # a type that the subject does not take
            continue
        if not (abs(found - right) < 0.1).all():
            off = float(numpy.nanmax(abs(found - right))) if not numpy.isnan(found).all() else math.nan
            report.remark("not_stable_in_half_precision", f"with logits in {narrow} it is off by {off:.3g} nats")


class NeverPads(Model):
    """A model that gives the pad probability 0."""

    def __init__(self, model: Model, texts: Texts):
        super().__init__(model.framework, model.seed, returns=model.returns)
        self.pad = texts.pad

    def values(self, ids: Array) -> Array:
        made = super().values(ids)
        made[..., (0, self.pad)] = -math.inf  # a label of -100 may be read as token 0, which no text has
        return made


def _far(report: Report, found: Array, right: Array, where: str) -> None:
    """Name a score that is lost far out."""
    if found.shape != right.shape or close(found, right, 1e-5):
        return
    i = int(numpy.argmax(numpy.where(numpy.isfinite(found), abs(found - right), math.inf)))
    numbers = {"expected": float(right[i]), "found": float(found[i])}
    if not numpy.isfinite(found).all():
        report.fault("unstable", f"{where} it is {found[i]}", **numbers)
    elif found[i] > right[i]:
        report.fault("capped", f"{where} no token's log-probability is as low as it should be", **numbers)
    else:
        report.fault("unstable", f"{where} it is wrong", **numbers)


def labels(ids: Any, labels: Any, prompt_lengths: Any, lengths: Any) -> Report:
    """Check somebody's labels, (B, T): the token at each place of a response, -100 where nothing counts.

    `ids` is (B, T); text b has `prompt_lengths[b]` tokens of prompt and `lengths[b]` tokens in all.
    """
    report = Report("labels", ["the places that will count, if the scorer shifts"])
    ids, labels = numpy.asarray(ids), numpy.asarray(labels)
    starts, ends = numpy.asarray(prompt_lengths), numpy.asarray(lengths)
    if not ids.shape == labels.shape == (len(starts), ids.shape[-1]) or starts.shape != ends.shape:
        raise ValueError(
            f"ids and labels must be (B, T) and the lengths (B,), not {ids.shape}, {labels.shape}, {starts.shape}"
        )
    prompts = [row[:n].tolist() for row, n in zip(ids, starts)]
    texts = Texts(prompts, [row[n:end].tolist() for row, n, end in zip(ids, starts, ends)], pad=-1)
    real = labels != -100
    for b, t in numpy.argwhere(real):
        if labels[b, t] != ids[b, t]:
            ahead = t + 1 < ids.shape[1] and (labels[b, :-1] == ids[b, 1:])[real[b, :-1]].all()
            if ahead:
                report.fault(
                    "shifted_twice", "labels[b, t] is the token at t + 1: a scorer that shifts will shift again"
                )
            else:
                report.fault("wrong_value", f"labels[{b}, {t}] is another token", int(ids[b, t]), int(labels[b, t]))
            return report
    counted = [{(int(t) - 1, int(ids[b, t]) if (ids[b] == ids[b, t]).sum() == 1 else -1 - int(t)): 1.0
                for t in numpy.flatnonzero(real[b])} for b in range(len(ids))]  # fmt: skip
    texts.ids = numpy.array([[v if (row == v).sum() == 1 else -1 - t for t, v in enumerate(row)] for row in ids])
    diagnose(report, texts, counted)
    report.picture = picture(texts, counted)
    return report
