"""Each optimizer against its published rule, one number and one step at a time, in plain Python."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minidpo import Tensor, optim

gradients = st.lists(st.floats(-3, 3), min_size=1, max_size=6)


def path(optimizer_class, start, gs, **options):
    """Values of one parameter after each of the gradients."""
    params = {"p": Tensor(np.array([start, 0.0]), requires_grad=True)}
    optimizer = optimizer_class(params, **options)
    values = []
    for g in gs:
        params["p"].grad = np.array([g, 0.0])
        optimizer.step()
        values.append(params["p"].data[0])
    assert optimizer.steps == len(gs)
    return values


@given(start=st.floats(-3, 3), gs=gradients, momentum=st.sampled_from([0.0, 0.9]))
def test_sgd_follows_its_rule(start, gs, momentum):
    """SGD takes the steps of its rule."""
    p, u, expected = start, 0.0, []
    for g in gs:
        u = momentum * u + g
        p = p - 0.1 * u
        expected.append(p)
    np.testing.assert_allclose(path(optim.SGD, start, gs, learning_rate=0.1, momentum=momentum), expected, atol=1e-12)


@given(start=st.floats(-3, 3), gs=gradients)
def test_rmsprop_follows_its_rule(start, gs):
    """RMSprop takes the steps of its rule."""
    p, v, expected = start, 0.0, []
    for g in gs:
        v = 0.9 * v + 0.1 * g**2
        p = p - 0.01 * g / (math.sqrt(v) + 1e-3)
        expected.append(p)
    actual = path(optim.RMSprop, start, gs, learning_rate=0.01, alpha=0.9, eps=1e-3)
    np.testing.assert_allclose(actual, expected, atol=1e-12)


@given(start=st.floats(-3, 3), gs=gradients, decay=st.sampled_from([0.0, 0.1]))
def test_adamw_follows_its_rule(start, gs, decay):
    """AdamW takes the steps of its rule, bias correction and decay included."""
    p, m, v, expected = start, 0.0, 0.0, []
    for t, g in enumerate(gs, start=1):
        m = 0.8 * m + 0.2 * g
        v = 0.9 * v + 0.1 * g**2
        adam = (m / (1 - 0.8**t)) / (math.sqrt(v / (1 - 0.9**t)) + 1e-3)
        p = p - 0.01 * adam - 0.01 * decay * p
        expected.append(p)
    actual = path(optim.AdamW, start, gs, learning_rate=0.01, betas=(0.8, 0.9), eps=1e-3, weight_decay=decay)
    np.testing.assert_allclose(actual, expected, atol=1e-12)


@given(g=st.floats(0.1, 3), steps=st.integers(1, 5))
def test_a_constant_gradient_has_closed_forms(g, steps):
    """Under a constant gradient the optimizers reach closed forms, which are not the rules again."""
    gs = [g] * steps
    sgd = path(optim.SGD, 1.0, gs, learning_rate=0.1, momentum=0.5)[-1]
    np.testing.assert_allclose(sgd, 1 - 0.1 * g * sum(2 - 2 * 0.5**t for t in range(1, steps + 1)), atol=1e-12)
    rmsprop = path(optim.RMSprop, 1.0, gs, learning_rate=0.1, alpha=0.9, eps=1e-12)[-1]
    np.testing.assert_allclose(rmsprop, 1 - 0.1 * sum((1 - 0.9**t) ** -0.5 for t in range(1, steps + 1)))
    adamw = path(optim.AdamW, 1.0, gs, learning_rate=0.1, weight_decay=0.0)[-1]
    np.testing.assert_allclose(adamw, 1 - 0.1 * steps, rtol=1e-6)


def test_defaults_are_those_of_the_field():
    """The defaults are PyTorch's."""
    params = {"p": Tensor(1.0, requires_grad=True)}
    adamw, rmsprop, sgd = optim.AdamW(params), optim.RMSprop(params, 1e-6), optim.SGD(params, 0.1)
    assert (adamw.learning_rate, adamw.betas, adamw.eps, adamw.weight_decay) == (1e-3, (0.9, 0.999), 1e-8, 0.01)
    assert (rmsprop.alpha, rmsprop.eps, sgd.momentum) == (0.99, 1e-8, 0.0)
    assert optim.warmup_cosine(10, 10, peak=1.0) == 0.0


OPTIMIZERS = [optim.SGD, optim.RMSprop, optim.AdamW]


@pytest.mark.parametrize("optimizer_class", OPTIMIZERS)
def test_an_optimizer_never_writes_into_an_array(optimizer_class):
    """A step leaves the old array as it was: a reference model may share it."""
    shared = np.ones(3, dtype="float32")
    shared.flags.writeable = False
    policy, reference = {"w": Tensor(shared, requires_grad=True)}, {"w": Tensor(shared)}
    optimizer = optimizer_class(policy, learning_rate=np.float64(0.1))
    gradient = np.full(3, 2.0, dtype="float32")
    gradient.flags.writeable = False
    for _ in range(2):
        policy["w"].grad = gradient
        optimizer.step()
    assert (reference["w"].data == 1).all() and (policy["w"].data < 1).all()
    assert policy["w"].dtype == "float32"
    assert all(array.dtype == "float32" for array in optimizer.state.get("w", {}).values() if hasattr(array, "dtype"))


@pytest.mark.parametrize("optimizer_class", OPTIMIZERS)
def test_what_has_no_gradient_stays(optimizer_class):
    """Constants and parameters without a gradient stay, even under weight decay."""
    params = {
        "moves": Tensor(1.0, requires_grad=True),
        "idle": Tensor(1.0, requires_grad=True),
        "frozen": Tensor(1.0),
    }
    optimizer = optimizer_class(params, learning_rate=0.1)
    (params["moves"] * params["frozen"]).backward()
    optimizer.step()
    assert [params[name].item() == 1.0 for name in ("moves", "idle", "frozen")] == [False, True, True]
    assert type(params["moves"].data) is np.ndarray
    optimizer.zero_grad()
    assert params["moves"].grad is None


@pytest.mark.parametrize("optimizer_class", OPTIMIZERS)
def test_every_optimizer_finds_a_minimum(optimizer_class):
    """Every optimizer finds the minimum of a parabola."""
    params = {"w": Tensor([3.0, -2.0], requires_grad=True)}
    optimizer = optimizer_class(params, learning_rate=0.05)
    for _ in range(300):
        optimizer.zero_grad()
        distance = params["w"] - np.array([1.0, 1.0])
        (distance @ distance).backward()
        optimizer.step()
    np.testing.assert_allclose(params["w"].data, [1, 1], atol=0.1)


@given(a=st.lists(st.floats(-9, 9), min_size=2, max_size=2), b=st.floats(-9, 9), max_norm=st.floats(0.1, 20))
def test_clipping_scales_all_gradients_as_one(a, b, max_norm):
    """Clipping scales all gradients by one factor, so the direction of the step stays."""
    params = {name: Tensor(np.zeros(2), requires_grad=True) for name in ("a", "b", "none")}
    params["a"].grad, params["b"].grad = np.array(a), np.array([b, 0.0])
    norm = math.hypot(*a, b)
    assert optim.clip_global_norm(params, max_norm) == pytest.approx(norm)
    scale = min(1.0, max_norm / norm) if norm else 1.0
    np.testing.assert_allclose(params["a"].grad, scale * np.array(a), atol=1e-12)
    np.testing.assert_allclose(params["b"].grad, [scale * b, 0.0], atol=1e-12)
    assert params["none"].grad is None


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_gradient_that_is_not_finite_is_named(bad):
    """A gradient that is not finite stops the step, and the parameters at fault are named."""
    params = {name: Tensor(np.zeros(2), requires_grad=True) for name in ("good", "bad")}
    params["good"].grad, params["bad"].grad = np.ones(2), np.array([0.0, bad])
    params["worse"] = Tensor(np.zeros(2), requires_grad=True)
    params["worse"].grad = np.array([bad, bad])
    with pytest.raises(FloatingPointError, match=r"not finite in bad, worse$"):
        optim.clip_global_norm(params, 1.0)


def test_clipping_counts_a_tensor_once_and_writes_into_nothing():
    """Clipping counts tied weights once and leaves the old gradient as it was."""
    w = Tensor(np.zeros(2), requires_grad=True)
    w.grad = gradient = np.array([3.0, 4.0])
    assert optim.clip_global_norm({"wte": w, "head": w}, 1.0) == 5
    np.testing.assert_allclose(w.grad, [0.6, 0.8])
    assert gradient.tolist() == [3, 4]


def test_without_a_gradient_the_norm_is_0():
    """Before the first sweep, and in an empty set of parameters, there is nothing to clip."""
    w = Tensor(np.zeros(2), requires_grad=True)
    assert optim.clip_global_norm({"w": w}, 1.0) == optim.clip_global_norm({}, 1.0) == 0
    assert w.grad is None


def test_clipping_survives_large_and_small_float32():
    """The norm of a float32 gradient neither overflows at 1e20 nor vanishes at 1e-25."""
    w = Tensor(np.zeros(1, dtype="float32"), requires_grad=True)
    for size in (1e20, 1e-25):
        w.grad = np.array([size], dtype="float32")
        assert optim.clip_global_norm({"w": w}, np.float64(1e30)) == pytest.approx(size)
    assert w.grad.dtype == "float32"


@pytest.mark.parametrize("max_norm", [-1.0, math.nan])
def test_a_norm_is_not_negative(max_norm):
    """A negative max_norm is refused: it would reverse every gradient."""
    with pytest.raises(ValueError, match="max_norm must be at least 0"):
        optim.clip_global_norm({}, max_norm)


@pytest.mark.parametrize(
    ("optimizer_class", "options", "sentence"),
    [
        (optim.SGD, {"learning_rate": math.nan}, "learning_rate must be at least 0 and finite, not nan"),
        (optim.AdamW, {"learning_rate": -0.1}, "learning_rate must be at least 0 and finite, not -0.1"),
        (optim.RMSprop, {"learning_rate": math.inf}, "learning_rate must be at least 0 and finite, not inf"),
        (optim.SGD, {"momentum": 1.0}, "momentum must be at least 0 and below 1, not 1.0"),
        (optim.RMSprop, {"alpha": 1.5}, "alpha must be at least 0 and below 1, not 1.5"),
        (optim.RMSprop, {"eps": -1e-8}, "eps must be at least 0"),
        (optim.AdamW, {"betas": (1.0, 0.9)}, "beta1 must be at least 0 and below 1, not 1.0"),
        (optim.AdamW, {"betas": (0.9, math.nan)}, "beta2 must be at least 0 and below 1, not nan"),
        (optim.AdamW, {"eps": math.nan}, "eps must be at least 0"),
        (optim.AdamW, {"weight_decay": -0.01}, "weight_decay must be at least 0"),
    ],
)
def test_numbers_out_of_range_are_refused(optimizer_class, options, sentence):
    """Numbers that climb, diverge or turn weights into nan are refused, each by its name."""
    with pytest.raises(ValueError, match=sentence):
        optimizer_class({"p": Tensor(1.0, requires_grad=True)}, **{"learning_rate": 0.1, **options})


def test_a_schedule_cannot_set_a_rate_out_of_range():
    """A learning rate set between steps is checked like the first one, and becomes a Python number."""
    optimizer = optim.SGD({"p": Tensor(1.0, requires_grad=True)}, 0.1)
    optimizer.learning_rate = np.float64(0.0)
    for rate in (math.nan, -1e-9):
        with pytest.raises(ValueError, match="learning_rate must be at least 0 and finite"):
            optimizer.learning_rate = rate
    assert optimizer.learning_rate == 0.0 and type(optimizer.learning_rate) is float


def test_one_tensor_under_two_names_is_refused():
    """One tensor under two names is refused: tied weights would move twice a step."""
    w = Tensor(1.0, requires_grad=True)
    with pytest.raises(ValueError, match="moved twice"):
        optim.AdamW({"wte": w, "head": w})


def test_a_late_parameter_has_its_own_count():
    """Adam's bias correction counts a parameter's own steps."""
    params = {name: Tensor([1.0], requires_grad=True) for name in ("early", "late")}
    optimizer = optim.AdamW(params, learning_rate=0.1, weight_decay=0.0)
    for step in range(10):
        params["early"].grad = np.ones(1)
        params["late"].grad = np.ones(1) if step == 9 else None
        optimizer.step()
    np.testing.assert_allclose([params["early"].item(), params["late"].item()], [0.0, 0.9], atol=1e-6)


def test_one_infinite_gradient_does_not_stay():
    """Without momentum, SGD forgets an infinite gradient."""
    params = {"w": Tensor([1.0], requires_grad=True)}
    optimizer = optim.SGD(params, learning_rate=0.1)
    params["w"].grad = np.array([np.inf])
    optimizer.step()
    params["w"].data, params["w"].grad = np.ones(1), np.ones(1)
    optimizer.step()
    assert params["w"].data.tolist() == [0.9] and optimizer.state["w"] == {}


def test_the_schedule_gives_python_numbers():
    """The schedule gives Python numbers, so float32 weights stay float32."""
    assert {type(optim.warmup_cosine(step, 9, peak=np.float64(1.0), warmup_steps=3)) for step in range(9)} == {float}


def test_schedule():
    """The schedule climbs to its peak, never at rate 0, and then falls along half a cosine."""
    rates = [optim.warmup_cosine(step, 12, peak=0.4, warmup_steps=4, final=0.1) for step in range(13)]
    np.testing.assert_allclose(rates[:5], [0.1, 0.2, 0.3, 0.4, 0.4])
    np.testing.assert_allclose(rates[8], 0.25)  # half of the cosine: half way between peak and final
    np.testing.assert_allclose([rates[6] + rates[10], rates[12]], [0.5, 0.1])  # symmetric about it; the end
    assert rates[4:] == sorted(rates[4:], reverse=True)
    assert optim.warmup_cosine(99, 12, peak=0.4, warmup_steps=4, final=0.1) == pytest.approx(0.1)
    assert optim.warmup_cosine(0, 10, peak=0.4) == 0.4
    assert optim.warmup_cosine(3, 4, peak=0.4, warmup_steps=4) == 0.4


def test_a_norm_that_overflows_is_told_from_a_gradient_that_is_not_finite():
    """The message says which of both it is, and names three parameters and the number of the others."""
    params = {f"w{i}": Tensor(np.ones(2), requires_grad=True) for i in range(5)}
    for value, fault in ((1e200, "has a norm beyond the largest float64"), (np.inf, "is not finite")):
        for p in params.values():
            p.grad = np.full(2, value)
        with np.errstate(over="ignore"), pytest.raises(FloatingPointError, match=f"{fault} in w0, w1, w2 and 2 more"):
            optim.clip_global_norm(params, 1.0)
