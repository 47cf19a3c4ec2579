"""CuPy on a GPU gives what NumPy gives on the host: every op, a DPO step, twenty steps, a greedy text.

    python -m pytest -m gpu

Without CuPy and a device the tests are skipped, with the reason. Errors are relative to an array's largest entry.
"""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from drawing import cases, each_array, is_varied, seeds
from minidpo import generation, losses, model, optim, preferences, training
from minidpo.backend import DeviceError, device_module, to_host
from minidpo.model import Config
from minidpo.ops import OPS

try:
    cupy, missing = device_module("cuda"), ""
except DeviceError as error:
    cupy, missing = None, str(error)

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(cupy is None, reason=missing)]

TOLERANCE = {"float32": 1e-5, "float64": 1e-12}
CONFIG = Config(vocab_size=13, n_positions=16, n_embd=16, n_layer=2, n_head=4)


def close(y, expected, tolerance, scale=0.0):
    """Hold a CuPy array equal to a NumPy array, within `tolerance` of the largest entry.

    What is 0 but for rounding, beside numbers of size `scale`, is held to these. A kernel may take a float32 below the
    smallest normal one for 0.
    """
    assert isinstance(y, cupy.ndarray) and y.dtype == expected.dtype
    largest = np.abs(expected).max(initial=0.0)
    if largest < 10 * np.finfo(y.dtype).eps * scale:
        largest = scale
    np.testing.assert_allclose(y.get(), expected, rtol=0, atol=tolerance * largest + np.finfo(y.dtype).tiny)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("name", OPS)
@given(data=st.data(), seed=seeds)
def test_an_op_gives_the_same(name, dtype, data, seed):
    """Forward and vjp of every op are the same on a GPU, so that the proofs of a laptop hold there too."""
    arguments, options = data.draw(cases(name))
    arguments = each_array(lambda x: x.astype(dtype) if x.dtype.kind == "f" else x, arguments)
    if not any(is_varied(x) for x in arguments):
        return
    y, vjp = OPS[name].raw(*arguments, **options)
    device_y, device_vjp = OPS[name].raw(*each_array(cupy.asarray, arguments), **options)
    close(device_y, y, TOLERANCE[dtype])
    g = np.random.default_rng(seed).normal(size=y.shape).astype(y.dtype)
    gradients = vjp(g)
    scale = max(np.abs(gx).max(initial=0.0) for gx in (*gradients, g) if gx is not None)
    for gx, expected in zip(device_vjp(cupy.asarray(g)), gradients, strict=True):
        assert (gx is None) == (expected is None)
        if gx is not None:
            close(gx, expected, 10 * TOLERANCE[dtype], scale)


def models(dtype="float64"):
    """The same policy and reference twice: on the host, then on the device."""
    policy = model.init(CONFIG, np.random.default_rng(0), dtype)
    other = model.init(CONFIG, np.random.default_rng(1), dtype)
    return [(model.placed(policy, device), model.frozen(model.placed(other, device))) for device in ("cpu", "cuda")]


def batch(count=6):
    """Pairs of random lengths."""
    rng = np.random.default_rng(2)
    ids = [[rng.integers(1, 13, rng.integers(1, 7)).tolist() for _ in range(3)] for _ in range(count)]
    return preferences.collate([(x, [*w, 0], [*l, 0]) for x, w, l in ids])


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_a_dpo_step_gives_the_same_loss_and_gradients(dtype):
    """A DPO step has the same metrics and the same gradient of every parameter on a GPU."""
    results = []
    for policy, reference in models(dtype):
        optimizer = optim.SGD(policy, 0.0)
        metrics = training.dpo_training_step(policy, reference, CONFIG, optimizer, batch(), 0.3)
        results.append((metrics, {name: p.grad for name, p in policy.items()}))
    assert results[1][0] == pytest.approx(results[0][0], rel=10 * TOLERANCE[dtype], abs=TOLERANCE[dtype])
    C = CONFIG.n_embd
    for name, g in results[0][1].items():  # the keys' bias has a gradient of 0 but for rounding
        for part in (slice(C), slice(2 * C, None)) if name.endswith("c_attn.bias") else (slice(None),):
            close(results[1][1][name][part], g[part], 100 * TOLERANCE[dtype])


def test_twenty_steps_end_in_the_same_model():
    """Twenty steps on a GPU have the losses, and end in the logits, of a run on the host, to 1e-8."""
    ends = []
    C = CONFIG.n_embd
    for policy, reference in models():
        optimizer = optim.AdamW(policy, 1e-3)
        values = []
        for _ in range(20):
            values.append(training.dpo_training_step(policy, reference, CONFIG, optimizer, batch(), 0.3)["loss"])
            for i in range(CONFIG.n_layer):  # the keys' bias has no gradient but rounding, which AdamW makes a step
                policy[f"h.{i}.attn.c_attn.bias"].data[C : 2 * C] = 0
        tokens = np.arange(12).reshape(2, 6) % 13
        ends.append((values, to_host(model.forward(policy, CONFIG, tokens).data)))
    np.testing.assert_allclose(ends[1][0], ends[0][0], rtol=1e-8)
    np.testing.assert_allclose(ends[1][1], ends[0][1], rtol=0, atol=1e-8 * np.abs(ends[0][1]).max())


def test_a_greedy_text_is_the_same():
    """Greedy sampling with its key-value cache gives the same text on a GPU."""
    texts = [
        generation.generate(policy, CONFIG, [[1, 2], [3, 4, 5]], np.random.default_rng(0), 10, temperature=0)
        for policy, _ in models()
    ]
    assert texts[0].responses == texts[1].responses


def test_the_closed_form_gradient_is_the_same():
    """The closed-form gradient stays on the GPU and has the same value there."""
    four = np.random.default_rng(3).normal(size=(4, 5))
    for gradient, expected in zip(losses.dpo_gradient(*map(cupy.asarray, four)), losses.dpo_gradient(*four)):
        close(gradient, expected, 1e-12)
