"""A training step computes its formula, repeats bit for bit, and never moves the reference."""

import ast
import inspect
import math
import textwrap

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minidpo import checkpoint, gradcheck, losses, model, ops, optim, training
from minidpo.data.preferences import collate
from minidpo.model import Config
from minidpo.run import safetensors
from minidpo.run.reference import cached_reference_logprobs, fingerprint, reference_key
from minidpo.run.workers import Workers
from minidpo.scoring import sequence_logprob
from minidpo.tensor import Tensor
from minidpo.theory.exact import chain_rule_logprob
from minidpo.tokenizer import Tokenizer
from models import CONFIG, pairs, small

close = np.testing.assert_allclose
EXAMPLES = [([0], [1, 2, 0]), ([0, 3], [4, 0]), ([0], [2, 2, 0]), ([0], [0]), ([0, 1], [3, 3, 3, 0])]
PAIRS = [
    ([0, 1], [2, 0], [3, 3, 0]),
    ([0], [1, 2, 3, 0], [1, 2, 0]),
    ([0, 4, 2], [0], [4, 4, 4, 0]),
    ([0, 2], [1, 1, 0], [3, 0]),
    ([0, 3], [2, 1, 0], [2, 1, 4, 0]),
]
LOGPS = [([-1.0, -3.0], [-3.0, -3.0]), ([-5.0], [-2.0])]
several_pairs = st.lists(pairs(), min_size=1, max_size=5)


@given(batch=st.lists(pairs(), min_size=1, max_size=4))
def test_nll_is_the_mean_over_response_tokens(batch):
    """The loss is a mean over response tokens, in nats per token, so that an n-gram can be compared with it."""
    params, examples = small(), [(prompt, chosen) for prompt, chosen, _ in batch]
    total = -math.fsum(chain_rule_logprob(params, CONFIG, prompt, response) for prompt, response in examples)
    tokens = sum(len(response) for _, response in examples)
    close(training.nll(params, CONFIG, examples).item(), total / tokens, rtol=1e-12)
    close(training.held_out_nll(params, CONFIG, examples, batch_size=2), total / tokens, rtol=1e-12)


def test_the_gradient_of_nll():
    """The gradient of `nll` agrees with central differences and with complex steps."""
    for method, bound in (("central", 1e-8), ("complex", 1e-13)):
        error = gradcheck.check_gradient(
            lambda params: training.nll(params, CONFIG, EXAMPLES), small(), np.random.default_rng(0), 5, method
        )
        assert error < bound


def test_a_line_begins_and_ends_with_end_of_text():
    """A line follows an end-of-text and ends in one; otherwise the model would not learn to begin and to stop."""
    assert training.line_examples(["ab", ""], Tokenizer("ab")) == [([0], [1, 2, 0]), ([0], [0])]


@given(count=st.integers(1, 9), batch_size=st.integers(1, 12), seed=st.integers(0, 9))
def test_every_example_comes_up_before_any_repeats(count, batch_size, seed):
    """Each epoch holds every example exactly once, whatever the batch size."""
    indices = [i for step in range(9) for i in training.batch_indices(count, batch_size, step, seed)]
    assert len(indices) == 9 * batch_size
    for start in range(0, len(indices) - count + 1, count):
        assert sorted(indices[start : start + count]) == list(range(count))


def test_epochs_and_seeds_differ_in_order():
    """Every epoch and every seed has its own order, and a seed repeats its orders."""
    epochs = [training.batch_indices(50, 50, epoch, seed=1) for epoch in range(3)] + [
        training.batch_indices(50, 50, 0, 2)
    ]
    assert len(set(map(tuple, epochs))) == 4
    assert epochs[0] == training.batch_indices(50, 50, 0, seed=1)


def test_an_sft_step_is_its_parts():
    """A step of fine-tuning is AdamW on the clipped gradient of `nll`."""
    params, others = small(), small()
    optimizer, other = optim.AdamW(params, 0.01), optim.AdamW(others, 0.01)
    for _ in range(3):
        metrics = training.sft_training_step(params, CONFIG, optimizer, EXAMPLES, max_norm=0.1)
        other.zero_grad()
        loss = training.nll(others, CONFIG, EXAMPLES)
        loss.backward()
        close(metrics["grad_norm"], optim.clip_global_norm(others, 0.1), rtol=1e-10)
        assert metrics["grad_norm"] > 0.1
        other.step()
        close(metrics["loss"], loss.item(), rtol=1e-12)
        assert metrics["learning_rate"] == 0.01 and metrics["tokens"] == 13
    for name in params:
        close(params[name].data, others[name].data, rtol=1e-9, atol=1e-9)


def gradients(params):
    return {name: p.grad for name, p in params.items()}


class Still(optim.Optimizer):
    """An optimizer that moves nothing, so that a test can compare the gradient of a step."""

    def __init__(self, params):
        super().__init__(params, 1.0)

    def update(self, p, g, state):
        return p


@given(size=st.integers(1, 5), nll_weight=st.sampled_from([0.0, 0.7]), loss=st.sampled_from(["dpo", "ipo"]))
def test_micro_batches_give_the_gradient_of_the_batch(size, nll_weight, loss):
    """Micro-batches give the metrics and the gradient of the batch, to 1e-12."""
    params, reference = small(1), model.frozen(small(2))
    arguments = {"beta": 0.3, "loss": getattr(losses, f"{loss}_loss"), "nll_weight": nll_weight}
    results = []
    for micro_batch_size in (None, size):
        metrics = training.dpo_training_step(
            params, reference, CONFIG, Still(params), collate(PAIRS), micro_batch_size=micro_batch_size, **arguments
        )
        dpo = gradients(params)
        supervised = training.sft_training_step(params, CONFIG, Still(params), EXAMPLES, math.inf, micro_batch_size)
        results.append((metrics, dpo, supervised, gradients(params)))
    for whole, parts in zip(*results):
        assert whole.keys() == parts.keys()
        for name in whole:
            close(parts[name], whole[name], rtol=1e-12, atol=1e-12)


def test_micro_batches_cover_the_batch_in_slices_of_about_one_size():
    """Micro-batches hold every example once: `size` of them if given, otherwise about `CACHED` numbers' worth each."""
    params, most = small(0), training.CACHED // (4 * CONFIG.n_embd)

    def parts(rows, size=None):
        return [list(range(len(rows)))[part] for part in training.micro_batches(rows, size, params)]

    assert parts([most]) == [[0]] and parts([most, 1]) == [[0, 1]] and parts([3 * most, 1, 3 * most]) == [[0], [1], [2]]
    assert parts([most // 2] * 4) == [[0, 1], [2, 3]] and parts([1, 2, 3]) == [[0, 1, 2]]
    assert parts([most // 2] * 6 + [1]) == [[0, 1], [2, 3], [4, 5, 6]] and parts([most // 10] * 13) == [list(range(13))]
    assert parts([most] * 5, 2) == [[0, 1], [2, 3], [4]] and parts([1, 1, 1], 1) == [[0], [1], [2]]


@given(batch=several_pairs, beta=st.floats(0.05, 2))
def test_a_sweep_without_an_nll_weight_has_the_loss_alone(batch, beta):
    """A sweep adds no likelihood term that nobody asked for: its objective is the mean of -log sigma(z)."""
    policy, reference = small(1), model.frozen(small(2))
    refs = training.reference_logprobs(reference, CONFIG, batch)
    swept = training.dpo_sweep(policy, CONFIG, collate(batch, *refs), beta)
    z = np.array(swept.reward_w) - np.array(swept.reward_l)
    assert swept.objective == pytest.approx(np.logaddexp(0, -z).mean(), rel=1e-12)


@given(batch=several_pairs, beta=st.floats(0.05, 2), nll_weight=st.sampled_from([0.0, 0.5]))
def test_a_dpo_step_descends_the_paper_s_loss(batch, beta, nll_weight):
    """A step has the loss and the gradient of equation 7, here written with log-probabilities of one text at a time."""
    params, reference = small(1), model.frozen(small(2))
    metrics = training.dpo_training_step(
        params, reference, CONFIG, Still(params), collate(batch), beta, nll_weight=nll_weight
    )
    by_step, others = gradients(params), small(1)
    total, nll, tokens = 0.0, 0.0, sum(len(w) for _, w, _ in batch)
    for x, w, l in batch:
        logp_w, logp_l = (sequence_logprob(others, CONFIG, [x], [y]) for y in (w, l))
        ref_w, ref_l = (chain_rule_logprob(reference, CONFIG, x, y) for y in (w, l))
        z = beta * ((logp_w - ref_w) - (logp_l - ref_l))
        total = total + ops.sum(-ops.logsigmoid(z)) / len(batch) - ops.sum(logp_w) * (nll_weight / tokens)
        nll -= logp_w.item() / tokens
    total.backward()
    held_out = training.preference_evaluation(
        others,
        CONFIG,
        collate(batch, *training.reference_logprobs(reference, CONFIG, batch)),
        beta,
        nll_weight=nll_weight,
    )
    for each in (metrics, held_out):
        assert ("loss/dpo" in each, "loss/nll" in each) == (nll_weight > 0,) * 2
        close(each.get("loss/dpo", each["loss"]), total.item() - nll_weight * nll, rtol=1e-10, atol=1e-12)
        close(each.get("loss/nll", nll), nll, rtol=1e-10)
        close(each["loss"], each.get("loss/dpo", each["loss"]) + nll_weight * each.get("loss/nll", 0), rtol=1e-12)
    close(metrics["loss"], total.item(), rtol=1e-10, atol=1e-12)
    for name, p in others.items():
        close(by_step[name], p.grad, rtol=1e-7, atol=1e-9)


def calls(function):
    """The names of the functions that a function calls, in order."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    functions = [node.func for node in ast.walk(tree) if isinstance(node, ast.Call)]
    return [node.attr if isinstance(node, ast.Attribute) else node.id for node in functions]


def test_the_step_reads_like_the_paper():
    """Log-probabilities, loss and backward are three lines of one function; around it: zero, sweep, clip, move."""
    sweep, step = calls(training.dpo_sweep), calls(training.dpo_training_step)
    assert [name for name in sweep if name in ("shared_logprobs", "loss", "backward")] == [
        "shared_logprobs",
        "loss",
        "backward",
    ]
    around = [name for name in step if name in ("with_reference", "zero_grad", "sweep", "clip_global_norm", "step")]
    assert around == ["with_reference", "zero_grad", "sweep", "clip_global_norm", "step"]
    for function in (training.dpo_sweep, training.dpo_training_step):
        (tree,) = ast.parse(inspect.getsource(function)).body
        assert tree.end_lineno - tree.body[1].lineno + 1 <= 16  # without signature and docstring
    assert "-ops.mean(ops.logsigmoid(beta * margin))" in inspect.getsource(losses.dpo_loss)


def test_metrics_have_trl_s_names_and_ties_are_counted():
    """Metrics have TRL's names and equal their definitions; ties are counted apart from successes."""
    params, reference = small(), model.frozen(small())
    batch = collate([PAIRS[0], ([0], [1, 0], [2, 0])])
    metrics = training.dpo_training_step(params, reference, CONFIG, optim.SGD(params, 0.0), batch, beta=0.5)
    assert set(metrics) == {
        "loss", "rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies", "rewards/ties",
        "logps/chosen", "logps/rejected", "grad_norm", "learning_rate", "tokens",
    }  # fmt: skip
    assert metrics["tokens"] == 9 and metrics["learning_rate"] == 0 and metrics["grad_norm"] > 0
    assert all(type(value) in (float, int) for value in metrics.values())
    batch = collate(batch.pairs, *training.reference_logprobs(reference, CONFIG, batch.pairs))
    evaluation = training.preference_evaluation(params, CONFIG, batch, 0.5)
    assert (evaluation["rewards/ties"], evaluation["rewards/accuracies"], evaluation["rewards/margins"]) == (1, 0, 0)
    assert evaluation["loss"] == pytest.approx(math.log(2)) and evaluation["nll/chosen_rise"] == 0
    optimizer = optim.SGD(params, 0.05)
    for _ in range(3):
        training.dpo_training_step(params, reference, CONFIG, optimizer, batch, 0.5)
    evaluation = training.preference_evaluation(params, CONFIG, batch, 0.5, nll_weight=2.0)
    assert evaluation["rewards/ties"] == 0
    logp_w = [chain_rule_logprob(params, CONFIG, x, w) for x, w, _ in batch.pairs]
    ref_w = [chain_rule_logprob(reference, CONFIG, x, w) for x, w, _ in batch.pairs]
    logp_l = [chain_rule_logprob(params, CONFIG, x, l) for x, _, l in batch.pairs]
    ref_l = [chain_rule_logprob(reference, CONFIG, x, l) for x, _, l in batch.pairs]
    close(evaluation["logps/chosen"], np.mean(logp_w))
    close(evaluation["logps/rejected"], np.mean(logp_l))
    close(evaluation["rewards/chosen"], 0.5 * (np.mean(logp_w) - np.mean(ref_w)), atol=1e-12)
    close(evaluation["rewards/rejected"], 0.5 * (np.mean(logp_l) - np.mean(ref_l)), atol=1e-12)
    close(evaluation["rewards/margins"], evaluation["rewards/chosen"] - evaluation["rewards/rejected"], atol=1e-12)
    close(evaluation["nll/chosen"], -sum(logp_w) / 4)
    close(evaluation["nll/chosen_rise"], -(sum(logp_w) - sum(ref_w)) / 4, atol=1e-12)
    z = 0.5 * (np.array(logp_w) - ref_w - logp_l + ref_l)
    close(evaluation["loss"], np.logaddexp(0, -z).mean() - 2 * sum(logp_w) / 4)


def test_a_tie_is_not_a_success():
    """One pair won, one tied and one lost are an accuracy of 1/3; otherwise policy = reference might score 1."""
    logp_w, logp_l = (np.concatenate(side) for side in zip(*LOGPS))
    metrics = training.preference_metrics(0.7, 0.1 * logp_w, 0.1 * logp_l, logp_w, logp_l)
    assert (metrics["rewards/accuracies"], metrics["rewards/ties"]) == (1 / 3, 1 / 3)
    close(metrics["logps/chosen"], -3.0)
    close(metrics["rewards/rejected"], 0.1 * -8 / 3)
    assert metrics["loss"] == 0.7
    apart = training.preference_metrics(0.7, np.array([1.0, 1.0, 3.0]), np.array([0.0, 2.0, 1.0]), logp_w, logp_l, 1.0)
    assert (apart["rewards/accuracies"], apart["rewards/ties"]) == (1 / 3, 2 / 3)


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("micro_batch_size", [None, 5])
def test_equal_models_tie_at_the_first_step(count, micro_batch_size):
    """Step 1 says ties 1 in float32, though other batches leave other last bits; a step away from it none ties."""
    rng, config = np.random.default_rng(1), Config(40, 160, 64, 2, 4)
    params = {name: Tensor(p.data, True) for name, p in model.init(config, rng).items()}
    for p in params.values():
        p.data = p.data + 0.2 * rng.normal(size=p.shape).astype("f4")
    reference = model.frozen(params)
    lengths = zip(*rng.integers(1, 70, (3, 24)))
    pairs = [tuple(rng.integers(1, 40, n).tolist() for n in each) for each in lengths]
    batch = collate(pairs, *training.reference_logprobs(reference, config, pairs))  # each pair alone
    optimizer = optim.SGD(params, 1e-4)
    with Workers(count) as workers:
        options = {"micro_batch_size": micro_batch_size, "sweep": workers.dpo_sweep}
        first, second = (
            training.dpo_training_step(params, reference, config, optimizer, batch, **options) for _ in range(2)
        )
    assert (first["rewards/ties"], first["rewards/accuracies"]) == (1, 0)
    assert first["rewards/margins"] != 0  # the last bits do differ
    assert second["rewards/ties"] == 0 and second["rewards/accuracies"] > 0.5


def test_training_lowers_the_loss_and_ranks_its_pairs():
    """Twenty steps lower the loss and give every chosen response of the batch the larger reward."""
    params, reference = small(), model.frozen(small())
    batch = collate(PAIRS, *training.reference_logprobs(reference, CONFIG, PAIRS))
    optimizer = optim.AdamW(params, 3e-3)
    first = training.preference_evaluation(params, CONFIG, batch)["loss"]
    for _ in range(20):
        training.dpo_training_step(params, reference, CONFIG, optimizer, batch)
    evaluation = training.preference_evaluation(params, CONFIG, batch)
    assert evaluation["loss"] < first and evaluation["rewards/accuracies"] == 1


def test_a_fingerprint_sees_every_bit():
    """Models have one fingerprint only if names, shapes, types and all bits agree, in whatever order names stand."""
    one, other = small(), small()
    assert fingerprint(one) == fingerprint(other) == fingerprint(dict(reversed(other.items())))
    other["h.1.mlp.c_fc.bias"].data[3] = np.nextafter(other["h.1.mlp.c_fc.bias"].data[3], 9)
    assert fingerprint(one) != fingerprint(other)
    x = np.zeros((2, 3))
    arrays = (x, x.T, x.astype("float32"), np.zeros((3, 2), "float32"))
    assert len({fingerprint({"a": model.Tensor(y)}) for y in arrays} | {fingerprint({"b": model.Tensor(x)})}) == 5


def run(policy, reference, batches, **options):
    optimizer = optim.AdamW(policy, 1e-2)
    return [training.dpo_training_step(policy, reference, CONFIG, optimizer, batch, **options) for batch in batches]


def test_the_reference_never_moves():
    """Training changes no bit of the reference and leaves it no gradient; otherwise the anchor drifts with the ship."""
    policy = small()
    reference = model.frozen(policy)
    before = fingerprint(reference)
    assert before == fingerprint(policy)
    run(policy, reference, [collate(PAIRS)] * 3)
    assert fingerprint(reference) == before != fingerprint(policy)
    assert all(p.grad is None and not p.requires_grad for p in reference.values())


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_cached_or_not_the_trajectory_is_the_same_bits(dtype, tmp_path):
    """A cached reference, in memory or from its file, gives the same metrics and weights bit for bit."""
    results = []
    for cached in (False, True):
        policy = {name: model.Tensor(p.data.astype(dtype), requires_grad=True) for name, p in small().items()}
        reference = model.frozen(policy)
        w = l = None
        if cached:
            path = tmp_path / "reference.safetensors"
            arguments = (path, reference, CONFIG, Tokenizer("abcd"), PAIRS)
            computed = cached_reference_logprobs(*arguments)
            w, l = cached_reference_logprobs(*arguments)  # from the file
            assert (w.tobytes(), l.tobytes()) == (computed[0].tobytes(), computed[1].tobytes()) and w.dtype == dtype
        batches = [[0, 3], [2, 1, 4], [4], [3, 0, 1, 2]]
        metrics = run(
            policy,
            reference,
            [collate([PAIRS[i] for i in batch], *((w[batch], l[batch]) if cached else ())) for batch in batches],
        )
        results.append((metrics, fingerprint(policy)))
    assert results[0] == results[1]


def test_a_pair_s_reference_does_not_depend_on_other_pairs():
    """A pair is scored to the same bits alone and among others, so a cache holds in any order of training."""
    reference = {name: model.Tensor(p.data.astype("float32")) for name, p in small().items()}
    w, l = training.reference_logprobs(reference, CONFIG, PAIRS)
    for i, pair in enumerate(PAIRS):
        alone_w, alone_l = training.reference_logprobs(reference, CONFIG, [pair])
        assert (w[i].tobytes(), l[i].tobytes()) == (alone_w[0].tobytes(), alone_l[0].tobytes())


def test_a_stale_cache_is_refused(tmp_path):
    """A cache for another model, config, tokenizer or other pairs is refused, with what to do."""
    path, reference, tokenizer = tmp_path / "reference.safetensors", small(), Tokenizer("abcd")
    cached_reference_logprobs(path, reference, CONFIG, tokenizer, PAIRS)
    moved = small()
    moved["ln_f.bias"].data = moved["ln_f.bias"].data + 1e-12
    wider = Config(**{**vars(CONFIG), "n_head": 1})
    for arguments in (
        (moved, CONFIG, tokenizer, PAIRS),
        (reference, wider, tokenizer, PAIRS),
        (reference, CONFIG, Tokenizer("abdc"), PAIRS),
        (reference, CONFIG, tokenizer, PAIRS[::-1]),
        (reference, CONFIG, tokenizer, PAIRS[:-1]),
    ):
        with pytest.raises(checkpoint.CheckpointError, match=r"reference\.safetensors: is stale.*delete it"):
            cached_reference_logprobs(path, *arguments)
    path.write_bytes(safetensors.to_bytes({}, {"key": reference_key(reference, CONFIG, tokenizer, PAIRS)}))
    with pytest.raises(checkpoint.CheckpointError, match="stale"):
        cached_reference_logprobs(path, reference, CONFIG, tokenizer, PAIRS)


def test_a_step_that_is_not_finite_moves_nothing():
    """A step whose loss is nan raises and changes no parameter; otherwise one broken batch would spoil the model."""
    for name in ("loss", "gradient"):
        params = small()
        before = fingerprint(params)
        params["wte.weight"].data[1, 0] = np.nan if name == "loss" else 1.0
        before = fingerprint(params)
        reference = {n: model.Tensor(p.data * (1 if name == "loss" else np.inf)) for n, p in params.items()}
        optimizer = optim.AdamW(params, 0.1)
        with np.errstate(all="ignore"), pytest.raises(FloatingPointError, match="loss is nan"):
            training.dpo_training_step(params, reference, CONFIG, optimizer, collate(PAIRS))
        if name == "loss":
            with np.errstate(all="ignore"), pytest.raises(FloatingPointError, match="loss is nan"):
                training.sft_training_step(params, CONFIG, optimizer, EXAMPLES)
        assert fingerprint(params) == before


def test_given_reference_log_probabilities_are_used():
    """A step uses the reference's log-probabilities that its batch holds; beta is 0.1 by default."""
    params, reference = small(1), model.frozen(small(2))
    w, l = training.reference_logprobs(reference, CONFIG, PAIRS)
    plain, shifted = [
        training.dpo_training_step(params, reference, CONFIG, Still(params), collate(PAIRS, w + shift, l), **options)
        for shift, options in ((0.0, {}), (1.0, {"beta": 0.1}))
    ]
    close(plain["rewards/chosen"] - shifted["rewards/chosen"], 0.1)
    close(plain["rewards/rejected"], shifted["rewards/rejected"])
    batch = collate(PAIRS, w, l)
    assert training.preference_evaluation(params, CONFIG, batch) == training.preference_evaluation(
        params, CONFIG, batch, 0.1
    )


def test_a_batch_without_a_reference_is_refused():
    """Without the reference's log-probabilities and without a reference, a step says what is missing."""
    params = small()
    with pytest.raises(ValueError, match="no reference model was given"):
        training.dpo_training_step(params, {}, CONFIG, optim.SGD(params, 0.1), collate(PAIRS))


@pytest.mark.parametrize("side", ["ref_logp_w", "ref_logp_l"])
def test_half_a_reference_is_scored_again(side):
    """A batch that lacks one of the reference's two log-probabilities gets both anew."""
    params, reference = small(1), model.frozen(small(2))
    batch = collate(PAIRS, *training.reference_logprobs(reference, CONFIG, PAIRS))
    whole, half = (
        training.dpo_training_step(params, reference, CONFIG, Still(params), one)
        for one in (batch, batch._replace(**{side: None}))
    )
    assert whole == half


def test_metrics_that_are_not_finite_are_named():
    """An evaluation with nan raises; the error names the metrics that are not finite, and no others."""
    params = small()
    batch = collate(PAIRS, *training.reference_logprobs(model.frozen(params), CONFIG, PAIRS))
    params["ln_f.bias"].data[0] = np.nan
    with (
        np.errstate(all="ignore"),
        pytest.raises(FloatingPointError, match="not finite: loss, rewards/chosen, ") as error,
    ):
        training.preference_evaluation(params, CONFIG, batch)
    assert "accuracies" not in str(error.value)
