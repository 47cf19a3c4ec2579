"""The same source on a device, without one: every array that a forward, a vjp, a sweep, an optimizer or a
check touches stays on the double of `device_double`, whose rules are CuPy's.
"""

import json
import sys
from unittest import mock

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from device_double import cupy, ndarray
from drawing import cases, each_array, is_varied, seeds
from minidpo import (
    Tensor,
    checkpoint,
    cli,
    exact,
    generation,
    gradcheck,
    losses,
    model,
    ops,
    optim,
    preferences,
    scoring,
    training,
)
from minidpo.backend import to_host
from minidpo.cli import train
from minidpo.ops import OPS
from minidpo.run.folder import json_lines
from minidpo.run.reference import cached_reference_logprobs
from minidpo.theory import equalities
from minidpo.tokenizer import Tokenizer
from models import CONFIG, pairs, small


@pytest.fixture(autouse=True, scope="module")
def double_is_cupy():
    """For the whole module, since hypothesis and fixtures of a single test do not mix."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "cupy", cupy)
        yield


@pytest.mark.parametrize("refused", [
    lambda x: np.asarray(x),
    lambda x: np.exp(x),
    lambda x: x + np.ones(2),
    lambda x: np.ones(2) * x,
    lambda x: x[np.array([0])],
    lambda x: x[[0]],
    lambda x: cupy.exp(np.ones(2)),
    lambda x: cupy.where(np.array([True, False]), x, 0),
    lambda x: bool(x[0] > 0),
    lambda x: float(x.sum()),
    lambda x: list(x),
    lambda x: cupy.concatenate([x, np.ones(1)], axis=0),
    lambda x: cupy.einsum,
])  # fmt: skip
def test_the_double_refuses_what_cupy_refuses(refused):
    """Otherwise it would let host arrays through, and prove nothing."""
    with pytest.raises((TypeError, AttributeError)):
        refused(cupy.asarray(np.ones(2)))


@pytest.mark.parametrize("name", OPS)
@given(data=st.data(), seed=seeds)
def test_every_op_stays_on_the_device(name, data, seed):
    """Otherwise an op works on every laptop and fails on the first GPU."""
    arguments, options = data.draw(cases(name))
    y, vjp = OPS[name].raw(*arguments, **options)
    on_device, device_vjp = OPS[name].raw(*each_array(cupy.asarray, arguments), **options)
    assert type(on_device) is (ndarray if any(is_varied(x) for x in arguments) else type(y))
    if not isinstance(on_device, ndarray):
        return
    np.testing.assert_allclose(on_device.get(), y, rtol=1e-12, atol=1e-14)  # sums follow the memory layout
    g = np.random.default_rng(seed).normal(size=y.shape)
    for gx, expected in zip(device_vjp(cupy.asarray(g)), vjp(g)):
        assert (gx is None) == (expected is None)
        if gx is not None:
            assert type(gx) is ndarray
            np.testing.assert_allclose(gx.get(), expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", ["gather", "embedding"])
def test_host_indices_are_checked_and_uploaded(name):
    """Otherwise CuPy wraps a token id that is too large around, and no one is told."""
    x = cupy.asarray(np.arange(6.0).reshape(2, 3))
    assert type(OPS[name].raw(x, np.array([0, 1]))[0]) is ndarray
    with pytest.raises(IndexError, match="index 3"):
        OPS[name](x, np.array([0, 3]))


@given(batch=st.lists(pairs(), min_size=1, max_size=4), seed=seeds)
def test_on_a_device_all_texts_form_one_block(batch, seed):
    """Pairs and examples have the host's log-probabilities and gradients, from one block of attention in each layer."""
    examples = [(x, y) for x, y, _ in batch]
    g_w, g_l, g = (np.random.default_rng([seed, i]).normal(size=len(batch)) for i in range(3))
    results = []
    with mock.patch.object(ops, "block_attention", wraps=ops.block_attention) as attention:
        for device, xp in (("cpu", np), ("cuda", cupy)):
            attention.reset_mock()
            params = model.placed(small(seed % 10), device)
            logp_w, logp_l = scoring.shared_logprobs(params, CONFIG, batch)
            logp = [ops.sum(scoring.packed_logprobs(params, CONFIG, [example])) for example in examples]
            packed = ops.sum(scoring.packed_logprobs(params, CONFIG, examples))
            sums = [ops.sum(x * xp.asarray(y)) for x, y in ((logp_w, g_w), (logp_l, g_l))]
            (sums[0] + sums[1] + packed * float(g[0])).backward()
            arrays = [
                logp_w.data,
                logp_l.data,
                packed.data,
                *[x.data for x in logp],
                *[p.grad for p in params.values()],
            ]
            results.append([to_host(x) for x in arrays])
    for value, expected in zip(*results, strict=True):
        np.testing.assert_allclose(value, expected, rtol=1e-9, atol=1e-10)
    assert [len(call.args[1]) for call in attention.call_args_list] == [1] * CONFIG.n_layer * (2 + len(batch))


def small_model(xp):
    rng = np.random.default_rng(0)
    params = {"w": Tensor(xp.asarray(rng.normal(size=(3, 3))), requires_grad=True),
              "b": Tensor(xp.asarray(rng.normal(size=3)), requires_grad=True)}  # fmt: skip

    def loss(params):
        h = ops.gelu(ops.linear(ops.embedding(params["w"], [0, 1, 1, 2]), params["w"], params["b"]))
        h = ops.causal_attention(h, h, h) + h
        logp = ops.gather(ops.log_softmax(h @ ops.transpose(params["w"])), [1, 1, 2, 0])
        return losses.dpo_loss(logp[:2], logp[2:], xp.asarray(np.ones(2)), xp.asarray(np.zeros(2))).loss

    return params, loss


@pytest.mark.parametrize("optimizer_class", [optim.SGD, optim.RMSprop, optim.AdamW])
def test_training_steps_stay_on_the_device(optimizer_class):
    """Otherwise the engine, the optimizers or the clipping slip in a host array between two ops."""
    trained = []
    for xp in (np, cupy):
        params, loss = small_model(xp)
        optimizer = optimizer_class(params, learning_rate=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            loss(params).backward()
            optim.clip_global_norm(params, 0.01)
            optimizer.step()
        trained.append(params)
    for name, p in trained[1].items():
        assert type(p.data) is ndarray and type(p.grad) is ndarray
        np.testing.assert_array_equal(p.data.get(), trained[0][name].data)


def test_backward_takes_a_cotangent_from_either_side():
    """Otherwise one would have to know where a tensor lives to differentiate it."""
    for g in (np.array([1.0, 10.0]), cupy.asarray(np.array([1.0, 10.0]))):
        t = Tensor(cupy.asarray(np.ones(2)), requires_grad=True)
        (t * t).backward(g)
        assert t.grad.get().tolist() == [2, 20]


def test_checks_run_on_the_device():
    """Otherwise a derivative could be verified everywhere but where it is used."""
    x = cupy.asarray(np.random.default_rng(0).normal(size=(2, 3)))
    for method in gradcheck.STEP:
        gradcheck.check_vjp(ops.log_softmax, x, rng=np.random.default_rng(0), method=method)
        params, loss = small_model(cupy)
        assert gradcheck.check_gradient(loss, params, np.random.default_rng(0), method=method) < 1e-9

    def wrong(x):
        return ops.exp.raw(x)[0], lambda g: (g,)

    with pytest.raises(gradcheck.GradientError, match=r"wrong: argument 0 at index \(\d, \d\)"):
        gradcheck.check_vjp(wrong, x, rng=np.random.default_rng(0))


def on_device(params):
    return {name: Tensor(cupy.asarray(p.data), requires_grad=p.requires_grad) for name, p in params.items()}


PAIRS = [([1, 2], [3, 4, 0], [3, 0]), ([4], [0], [1, 1, 2])]
EXAMPLES = [(prompt, chosen) for prompt, chosen, _ in PAIRS]
SCORES = {
    "sequence": lambda params: scoring.sequence_logprob(params, CONFIG, [[1, 2]], [[3, 0]]),
    "padded": lambda params: ops.sub(*scoring.padded_logprobs(params, CONFIG, PAIRS)),
    "padded left": lambda params: ops.sub(*scoring.padded_logprobs(params, CONFIG, PAIRS, left=True)),
    "shared": lambda params: ops.sub(*scoring.shared_logprobs(params, CONFIG, PAIRS)),
    "packed": lambda params: scoring.packed_logprobs(params, CONFIG, EXAMPLES),
}


@pytest.mark.parametrize("route", SCORES)
def test_scores_and_their_gradients_stay_on_the_device(route):
    """Otherwise a layout, made on the host, meets the model's rows on the device."""
    results = []
    for params in (small(), on_device(small())):
        logp = SCORES[route](params)
        logp.backward(np.arange(1.0, 1.0 + logp.shape[0]))
        results.append([logp.data, *[p.grad for p in params.values()]])
    for value, expected in zip(results[1], results[0]):
        assert type(value) is ndarray
        np.testing.assert_allclose(value.get(), expected, rtol=1e-10, atol=1e-12)


def test_a_training_step_a_sample_and_a_checkpoint_of_a_model_on_the_device(tmp_path):
    """Otherwise training, sampling or saving works on the CPU alone."""
    params = on_device(small())
    for seed in range(2):
        samples = [
            generation.generate(p, CONFIG, [[1, 2], [3]], np.random.default_rng(seed), 5, top_p=0.9)
            for p in (small(), params)
        ]
        assert samples[0].responses == samples[1].responses
    checkpoint.save(tmp_path / "device", params, CONFIG, Tokenizer("abcd"))
    loaded = checkpoint.load(tmp_path / "device").params
    assert all((loaded[name].data == p.data.get()).all() for name, p in params.items())
    for name in params:
        assert type(params[name].data) is ndarray, name


def test_unknown_ids_of_a_prompt_are_refused_before_they_reach_the_device():
    """An id outside the vocabulary is an error, though a device would wrap it around without a word."""
    for token in (-1, CONFIG.vocab_size):
        with pytest.raises(IndexError, match=f"index {token} at position"):
            generation.generate(on_device(small()), CONFIG, [[1, token]], np.random.default_rng(0), 2)


def test_steps_of_each_kind_of_training_on_the_device(tmp_path):
    """Otherwise pre-training, fine-tuning or DPO works on the CPU alone, or a cache of the reference does."""
    seen = []
    for params in (small(), on_device(small())):
        reference, optimizer = model.frozen(params), optim.AdamW(params, 1e-2)
        metrics = [training.sft_training_step(params, CONFIG, optimizer, EXAMPLES, 1.0, 2)]
        path = tmp_path / f"{len(seen)}.safetensors"
        for _ in range(2):  # computed, then read
            logps = cached_reference_logprobs(path, reference, CONFIG, Tokenizer("abcd"), PAIRS)
            assert all(type(logp) is type(params["wte.weight"].data) for logp in logps)
        for batch in (preferences.collate(PAIRS), preferences.collate(PAIRS, *logps)):
            for loss in (losses.dpo_loss, losses.ipo_loss):
                step = training.dpo_training_step(params, reference, CONFIG, optimizer, batch, 0.1, loss, 0.5, 1.0, 1)
                metrics.append(step)
        metrics.append(training.preference_evaluation(params, CONFIG, batch))
        assert all(type(p.data) is type(p.grad) for p in params.values())
        seen.append([value for line in metrics for value in line.values()])
    np.testing.assert_allclose(seen[0], seen[1], rtol=1e-7, atol=1e-9)


PREFERENCES = [
    {"prompt": "ab", "chosen": "cd", "rejected": "d"},
    {"prompt": "b", "chosen": "dc", "rejected": "cca"},
    {"prompt": "ca", "chosen": "a", "rejected": "bd"},
]


def said(capsys, *arguments):
    """What a command prints where it succeeds."""
    assert cli.main([str(part) for part in arguments]) == 0
    return capsys.readouterr().out


@pytest.mark.slow
def test_commands_do_the_same_on_both_devices(tmp_path, capsys, monkeypatch):
    """Otherwise --device cuda trains on other batches, draws other samples, or stops where a host array slips in."""
    texts, pairs = tmp_path / "texts.txt", tmp_path / "pairs.jsonl"
    texts.write_text("abcd\nbad cab\ndad\ncab\n" * 2)
    pairs.write_text("".join(json.dumps(row) + "\n" for row in PREFERENCES * 2))
    monkeypatch.setattr(train, "worker_count", lambda params: 1)
    forward, seen_on = model.row_logits, set()

    def watched(params, *args, **options):
        logits = forward(params, *args, **options)
        seen_on.add(type(logits.data))
        return logits

    for module in (model, scoring, generation):
        monkeypatch.setattr(module, "row_logits", watched)
    short = ("--steps", 3, "--evaluate-every", 2, "--warmup-steps", 1, "--seed", 1)
    found = {}
    for name in ("cpu", "cuda"):
        run, on = tmp_path / name, ("--device", name)
        sizes = ("--n-embd", 8, "--n-layer", 2, "--n-head", 2)
        said(capsys, "pretrain", "--data", texts, "--out", run / "base", *sizes, "--n-positions", 12, *short, *on)
        said(capsys, "sft", "--data", pairs, "--init", run / "base", "--out", run / "sft", *short, *on)
        said(capsys, "dpo", "--data", pairs, "--init", run / "sft", "--out", run / "dpo", *short, *on)
        both = ("--checkpoint", run / "dpo", "--reference", run / "sft", "--data", pairs)
        text = said(capsys, "sample", "--checkpoint", run / "dpo", "--prompt", "ab", "--samples", 3, *on)
        metrics = json.loads(said(capsys, "evaluate", *both, "--seen", "--json", *on))
        lines = said(capsys, "score", *both, *on)
        losses_seen = [[row["loss"] for row in json_lines(run / stage / "metrics.jsonl") if "loss" in row]
                       for stage in ("base", "sft", "dpo")]  # fmt: skip
        weights = {key: p.data for key, p in checkpoint.load(run / "dpo").params.items()}
        assert seen_on == {ndarray if name == "cuda" else np.ndarray}
        seen_on.clear()
        found[name] = (text, metrics, lines.count("logps/chosen"), losses_seen, weights)
    host_text, host_metrics, host_lines, host_losses, host_weights = found["cpu"]
    text, metrics, lines, losses_seen, weights = found["cuda"]
    assert text == host_text and lines == host_lines == 6
    assert metrics == pytest.approx(host_metrics, rel=1e-3, abs=1e-4)
    for ours, theirs in zip(losses_seen, host_losses):
        assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-5) and len(ours) == 3
    for key, expected in host_weights.items():
        if not key.endswith("c_attn.bias"):  # a third of it has no gradient but rounding, which AdamW makes a step
            np.testing.assert_allclose(weights[key], expected, rtol=1e-3, atol=1e-4)


def test_what_a_device_says_is_one_sentence_and_names_what_was_saved(tmp_path, capsys, monkeypatch):
    """Otherwise a lost device or a full one ends in a traceback, and no one is told where to go on."""
    texts = tmp_path / "texts.txt"
    texts.write_text("abcd\ncab\ndad\n")

    class OutOfMemoryError(MemoryError):
        __module__ = "cupy.cuda.memory"

    class CUBLASError(RuntimeError):
        __module__ = "cupy_backends.cuda.libs.cublas"

    step = training.sft_training_step
    for number, fault in enumerate((OutOfMemoryError("Out of memory allocating 512 bytes"), CUBLASError("it is lost"))):

        def third_fails(*args, fault=fault, **options):
            metrics = step(*args, **options)
            if args[2].steps == 3:
                raise fault
            return metrics

        monkeypatch.setattr(training, "sft_training_step", third_fails)
        run = tmp_path / f"run{number}"
        arguments = ["pretrain", "--data", texts, "--out", run, "--n-embd", 8, "--n-head", 2, "--n-layer", 1,
                     "--steps", 4, "--evaluate-every", 2, "--device", "cuda"]  # fmt: skip
        assert cli.main([str(part) for part in arguments]) == 2
        told = capsys.readouterr().err.strip().splitlines()[-1]
        assert str(fault) in told and told.startswith("minidpo pretrain: ")
        assert f"the last checkpoint is {run / 'step-000002'}" in told and f"resume {run}" in told

    def bug(*args, **options):
        raise RuntimeError("not the device's")

    monkeypatch.setattr(training, "sft_training_step", bug)
    with pytest.raises(RuntimeError, match="not the device's"):
        cli.main([str(part) for part in [*arguments[:4], tmp_path / "bug", *arguments[5:]]])


@pytest.mark.parametrize("page", [equalities.constrained_objective, equalities.reparametrisation])
def test_a_page_of_the_exact_laboratory_on_the_device(page):
    """Otherwise the derivation is proved on the host alone."""
    world = equalities.small_world(0)
    there = world._replace(reward=cupy.asarray(world.reward), ref_logp=cupy.asarray(world.ref_logp))
    claims = list(page(there, 0))
    assert claims and all(claim.holds for claim in claims)
    for claim, expected in zip(claims, page(world, 0), strict=True):
        assert claim.text == expected.text and type(claim.number) is float
        assert claim.number == pytest.approx(expected.number, abs=1e-11)


def test_enumeration_runs_on_the_device():
    """Otherwise what is exact about a model must leave the device first."""
    responses = exact.complete_responses(CONFIG.vocab_size, 2)
    scores = [
        exact.exact_logprobs(params, CONFIG, [[1, 2], [3]], responses) for params in (small(), on_device(small()))
    ]
    assert type(scores[1].data) is ndarray
    np.testing.assert_allclose(scores[1].data.get(), scores[0].data, rtol=1e-10, atol=1e-12)
    at = [small()["wte.weight"], on_device(small())["wte.weight"]]
    logp, ref = (ops.log_softmax.raw(x.data)[0] for x in at)
    assert type(exact.kl(ref, ref)) is ndarray and type(exact.optimum(ref, ref, 0.5)[0]) is ndarray
    np.testing.assert_allclose(exact.optimum(ref, ref, 0.5)[0].get(), exact.optimum(logp, logp, 0.5)[0], rtol=1e-12)


def test_closed_form_gradient_stays_on_the_device():
    """Otherwise the DPO gradient by formula needs a copy to the host."""
    four = [cupy.asarray(np.array([v, v / 2])) for v in (-10.0, -15.0, -12.0, -14.0)]
    gradient_w, gradient_l = losses.dpo_gradient(*four)
    assert type(gradient_w) is ndarray
    expected = losses.dpo_gradient(*[x.get() for x in four])
    np.testing.assert_array_equal([gradient_w.get(), gradient_l.get()], expected)
