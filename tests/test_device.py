"""The same source on a device, without one: every array that a forward, a vjp, a sweep, an optimizer or a
check touches stays on the double of `device_double`, whose rules are CuPy's.
"""

import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from device_double import cupy, ndarray
from drawing import cases, is_varied, seeds
from minidpo import Tensor, checkpoint, generation, gradcheck, losses, model, ops, optim, preferences, scoring, training
from minidpo.ops import OPS
from minidpo.tokenizer import Tokenizer
from models import CONFIG, small


@pytest.fixture(autouse=True, scope="module")
def double_is_cupy():
    """For the whole module, since hypothesis and fixtures of a single test do not mix."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "cupy", cupy)
        yield


def uploaded(x):
    """Arrays, also those inside an index, moved to the device; all else as it is."""
    if isinstance(x, np.ndarray):
        return cupy.asarray(x)
    return tuple(uploaded(part) for part in x) if isinstance(x, tuple) else x


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
    on_device, device_vjp = OPS[name].raw(*uploaded(arguments), **options)
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


def test_steps_of_each_kind_of_training_on_the_device(tmp_path):
    """Otherwise pre-training, fine-tuning or DPO works on the CPU alone, or a cache of the reference does."""
    seen = []
    for params in (small(), on_device(small())):
        reference, optimizer = model.frozen(params), optim.AdamW(params, 1e-2)
        metrics = [training.sft_training_step(params, CONFIG, optimizer, EXAMPLES, 1.0, 2)]
        path = tmp_path / f"{len(seen)}.safetensors"
        for _ in range(2):  # computed, then read
            logps = training.cached_reference_logprobs(path, reference, CONFIG, Tokenizer("abcd"), PAIRS)
            assert all(type(logp) is type(params["wte.weight"].data) for logp in logps)
        for batch in (preferences.collate(PAIRS), preferences.collate(PAIRS, *logps)):
            for loss in (losses.dpo_loss, losses.ipo_loss):
                step = training.dpo_training_step(params, reference, CONFIG, optimizer, batch, 0.1, loss, 0.5, 1.0, 1)
                metrics.append(step)
        metrics.append(training.preference_evaluation(params, CONFIG, batch))
        assert all(type(p.data) is type(p.grad) for p in params.values())
        seen.append([value for line in metrics for value in line.values()])
    np.testing.assert_allclose(seen[0], seen[1], rtol=1e-7, atol=1e-9)


def test_closed_form_gradient_stays_on_the_device():
    """Otherwise the DPO gradient by formula needs a copy to the host."""
    four = [cupy.asarray(np.array([v, v / 2])) for v in (-10.0, -15.0, -12.0, -14.0)]
    gradient_w, gradient_l = losses.dpo_gradient(*four)
    assert type(gradient_w) is ndarray
    expected = losses.dpo_gradient(*[x.get() for x in four])
    np.testing.assert_array_equal([gradient_w.get(), gradient_l.get()], expected)
