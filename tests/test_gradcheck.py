"""The checker, checked: each planted mistake must be found, and named."""

import math

import numpy as np
import pytest
from hypothesis import given

from drawing import seeds
from minidpo import Tensor, gradcheck, ops
from minidpo.gradcheck import GradientError, check_gradient, check_vjp

S = np.random.default_rng(5).normal(size=(3, 3))  # square, so that a wrong transpose fits


def mistaken(op, wrong, *arrays, **options):
    """The op with its vjp replaced by wrong(g, right), `right` the true gradients."""

    def planted(*xs):
        y, vjp = op.raw(*xs, **options)
        return y, lambda g: wrong(g, vjp(g), *xs)

    planted.__name__ = f"planted_{op.__name__}"
    return planted, arrays


def softmax(x):
    return ops.softmax.raw(x)[0]


MISTAKES = {
    "sign": mistaken(ops.sub, lambda g, right, *xs: (right[0], -right[1]), S, S + 1),
    "transpose": mistaken(ops.matmul, lambda g, right, x, y: (g @ y, right[1]), S, S + 1),
    "swapped operands": mistaken(ops.mul, lambda g, right, x, y: right[::-1], S, S + 1),
    "missing term": mistaken(ops.log_softmax, lambda g, right, x: (g,), S),
    "missing softmax term": mistaken(ops.softmax, lambda g, right, x: (softmax(x) * g,), S),
    "missing mean": mistaken(
        ops.layer_norm, lambda g, right, x, w, b: (g * w / x.std(-1, keepdims=True), *right[1:]), S, S[0], S[1]
    ),
    "dropped broadcast": mistaken(ops.add, lambda g, right, x, y: (g, g), S, S[0]),
    "broadcast by copying": mistaken(ops.add, lambda g, right, x, y: (g, g[0]), S, S[0]),
    "all zeros": mistaken(ops.exp, lambda g, right, x: (0 * g,), S),
    "off-by-one axis": mistaken(ops.sum, lambda g, right, x: (np.broadcast_to(g[:, None], (3, 3)),), S, axis=0),
    "forgotten 1/n": mistaken(ops.mean, lambda g, right, x: (3 * right[0],), S, axis=0),
    "factor of two": mistaken(ops.mul, lambda g, right, x, y: (2 * right[0], right[1]), S, S + 1),
    "exponent off by one": mistaken(ops.power, lambda g, right, x, c: (g * c * x**c, None), S, 3),
    "overwritten repeats": mistaken(
        ops.embedding, lambda g, right, table, index: (np.array([0 * g[0], g[1], g[2]]), None), S, np.array([1, 1, 2])
    ),
    "shifted index": mistaken(
        ops.gather, lambda g, right, x, index: (np.roll(right[0], 1, axis=-1), None), S, np.array([0, 1, 1])
    ),
    "sigma(x) for sigma(-x)": mistaken(ops.logsigmoid, lambda g, right, x: (g / (1 + np.exp(-x)),), S),
    "unscaled scores": mistaken(
        ops.causal_attention, lambda g, right, q, k, v: (right[0] * math.sqrt(3), *right[1:]), S, S + 1, S - 1
    ),
    "a small constant": mistaken(ops.tanh, lambda g, right, x: (right[0] * (1 + 1e-4),), S),
    "nan": mistaken(ops.tanh, lambda g, right, x: (right[0] * np.nan,), S),
    "none for an array": mistaken(ops.mul, lambda g, right, x, y: (right[0], None), S, S + 1),
    "one too few": mistaken(ops.mul, lambda g, right, x, y: right[:1], S, S + 1),
    "some for an index": mistaken(ops.gather, lambda g, right, x, index: (right[0], right[0]), S, np.array([0, 1, 1])),
    "one too many": mistaken(ops.neg, lambda g, right, x: (*right, g), S),
    "no tuple": mistaken(ops.neg, lambda g, right, x: right[0], S),
    "writes into g": mistaken(ops.neg, lambda g, right, x: (np.negative(g, out=g),), S),
    "another dtype": mistaken(ops.neg, lambda g, right, x: (right[0].astype("float32"),), S),
}


@pytest.mark.parametrize("method", ["central", "complex"])
@pytest.mark.parametrize("mistake", MISTAKES)
@given(seed=seeds)
def test_planted_mistakes_are_found(mistake, method, seed):
    """Every planted mistake is found, from any seed."""
    planted, arguments = MISTAKES[mistake]
    with pytest.raises(GradientError, match=planted.__name__):
        check_vjp(planted, *arguments, rng=np.random.default_rng(seed), method=method)


@pytest.mark.parametrize("method", ["central", "complex"])
def test_failure_names_op_index_and_both_numbers(method):
    """A failure names the op, the index and both numbers."""

    def wrong_in_one_place(x):
        y, vjp = ops.exp.raw(x)
        return y, lambda g: (vjp(g)[0] + np.array([[0, 0, 0], [0, 0, 7.0]]),)

    x = S[:2]
    rng = np.random.default_rng(0)
    g = np.random.default_rng(0).normal(size=x.shape)
    with pytest.raises(GradientError) as caught:
        check_vjp(wrong_in_one_place, x, rng=rng, method=method)
    right = (g * np.exp(x))[1, 2]
    assert f"wrong_in_one_place: argument 0 at index (1, 2): vjp gives {right + 7:.6g}, " in str(caught.value)
    assert f"the {'complex step' if method == 'complex' else 'central difference'} {right:.6g}" in str(caught.value)


def test_an_all_ones_cotangent_proves_nothing():
    """A softmax sums to 1, so the gradient of its sum is 0: a vjp of zeros would pass that check."""
    y, vjp = ops.softmax.raw(S)
    np.testing.assert_allclose(vjp(np.ones_like(y))[0], 0, atol=1e-15)
    planted, arguments = mistaken(ops.softmax, lambda g, right, x: (0 * g,), S)
    with pytest.raises(GradientError):
        check_vjp(planted, *arguments, rng=np.random.default_rng(0))


def test_complex_step_is_exact_where_central_differences_round():
    """The complex step is exact to rounding; central differences are not."""
    rng = np.random.default_rng(0)
    errors = {method: check_vjp(ops.exp, S, rng=rng, method=method) for method in ("central", "complex")}
    assert errors["complex"] < 1e-15 < errors["central"] < 1e-8


def test_a_forward_that_is_not_finite_is_refused():
    """A forward that is not finite is an error: nothing can be compared there."""
    for y in (np.nan, np.inf, -np.inf):
        with pytest.raises(GradientError, match="nothing can be checked there"):
            check_vjp(lambda x, y=y: (np.full_like(x, y), lambda g: (123 * g,)), S, rng=np.random.default_rng(0))


def test_writing_into_the_arguments_is_found():
    """A forward or a vjp that writes into its arguments is found."""

    def spoils_in_vjp(x):
        def vjp(g):
            x[...] = 0
            return (2 * g * x,)

        return x * x, vjp

    def spoils_in_forward(x):
        x *= 2
        return x + 0, lambda g: (2 * g,)

    for spoils in (spoils_in_vjp, spoils_in_forward):
        with pytest.raises(GradientError, match=f"{spoils.__name__}: argument 0 was written into"):
            check_vjp(spoils, S.copy(), rng=np.random.default_rng(0), method="complex")


def test_a_vjp_that_raises_is_named():
    """A vjp that raises is named."""

    def raises(x):
        return x * 2, lambda g: (g @ np.ones(99),)

    with pytest.raises(GradientError, match="raises: vjp raised ValueError"):
        check_vjp(raises, S, rng=np.random.default_rng(0))


def test_the_largest_error_is_returned(monkeypatch):
    """The largest of the errors is returned, and nan if one is nan."""
    for errors, largest in (([1e-8, 5e-7, 1e-9], 5e-7), ([1e-8, math.nan, 1e-9], math.nan)):
        planted = iter(errors)
        monkeypatch.setattr(gradcheck, "_difference", lambda *args, planted=planted: next(planted))
        worst = check_gradient(two_layers, parameters(), np.random.default_rng(0), directions=3)
        assert worst == largest or (math.isnan(worst) and math.isnan(largest))
    again = iter([1e-8, 5e-7, 1e-9])
    monkeypatch.setattr(gradcheck, "_difference", lambda *args: next(again))
    assert check_vjp(ops.exp, S, rng=np.random.default_rng(0)) == 5e-7


@pytest.mark.parametrize(
    ("arguments", "options", "error"),
    [
        ((S,), {"method": "complexstep"}, ValueError),
        ((S,), {"directions": 0}, ValueError),
        ((Tensor(S),), {}, TypeError),
    ],
)
def test_wrong_arguments_get_a_sentence(arguments, options, error):
    """Wrong arguments of the check itself get a sentence."""
    with pytest.raises(error, match=r"method must be|directions must be|pass the \.data"):
        check_vjp(ops.exp, *arguments, rng=np.random.default_rng(0), **options)


def test_float32_is_checked_in_float64():
    """float32 arrays are checked in float64, where rounding does not drown the difference."""
    check_vjp(ops.log_softmax, S.astype("float32"), rng=np.random.default_rng(0))


LARGE = np.array([[1e6, -3e5, 1.0], [0.1, 2e6, -1e6]])


@pytest.mark.parametrize("method", ["central", "complex"])
def test_large_entries_move_by_a_step_of_their_size(method):
    """A correct vjp at 1e6 checks: a step of 1e-6 there would be lost in rounding. A wrong one is still named."""
    cubic, right = mistaken(ops.power, lambda g, right, x, c: right, LARGE, 3)
    assert check_vjp(cubic, *right, rng=np.random.default_rng(0), method=method) < 1e-9
    assert check_vjp(ops.log, abs(LARGE), rng=np.random.default_rng(0), method=method) < 1e-9
    planted, arguments = mistaken(ops.log, lambda g, right, x: (2 * right[0],), abs(LARGE[:1, :2]))
    with pytest.raises(GradientError, match="planted_log: argument 0 at index"):
        check_vjp(planted, *arguments, rng=np.random.default_rng(0), method=method)

    def squares(params):
        return ops.mean(params["x"] * params["x"])

    params = {"x": Tensor(LARGE, requires_grad=True)}
    assert check_gradient(squares, params, np.random.default_rng(0), method=method) < 1e-9


def test_the_values_in_a_failure_are_derivatives_even_at_large_entries():
    """The message gives dL/dx itself, not its product with the step."""
    planted, arguments = mistaken(ops.mul, lambda g, right, x, y: (right[0] + 7, right[1]), np.array([1e6]), 3.0)
    g = np.random.default_rng(0).normal(size=1)[0]
    with pytest.raises(GradientError, match=rf"vjp gives {3 * g + 7:.6g}, the complex step {3 * g:.6g} "):
        check_vjp(planted, *arguments, rng=np.random.default_rng(0), method="complex")


def two_layers(params):
    hidden = ops.gelu(ops.linear(np.ones((2, 3)), params["w"], params["b"]))
    return -ops.mean(ops.gather(ops.log_softmax(hidden @ params["w"]), [0, 2]))


def parameters(dtype="float64"):
    rng = np.random.default_rng(1)
    return {
        "w": Tensor(rng.normal(size=(3, 3)).astype(dtype), requires_grad=True),
        "b": Tensor(rng.normal(size=3).astype(dtype), requires_grad=True),
        "unused": Tensor(np.ones(2, dtype), requires_grad=True),
        "frozen": Tensor(np.ones(2, dtype)),
    }


@pytest.mark.parametrize(("method", "bound"), [("central", 1e-9), ("complex", 1e-15)])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_whole_function_checks(method, bound, dtype):
    """A whole function of correct ops checks, and its parameters stay as they were."""
    params = parameters(dtype)
    before = {name: p.data.copy() for name, p in params.items()}
    assert check_gradient(two_layers, params, np.random.default_rng(0), method=method) < bound
    for name, p in params.items():
        assert p.grad is None and p.data.dtype == dtype and (p.data == before[name]).all()


@pytest.mark.parametrize("method", ["central", "complex"])
def test_a_whole_function_with_a_cut_graph_is_found(method):
    """A parameter that the graph has lost is found."""

    def cut(params):
        return two_layers({**params, "w": params["w"].detach()}) + ops.sum(params["b"])

    assert check_gradient(cut, parameters(), np.random.default_rng(0), method=method) > 1e-3


@pytest.mark.parametrize(
    ("f", "options", "error", "sentence"),
    [
        (two_layers, {"method": "complexstep"}, ValueError, 'method must be "central" or "complex"'),
        (two_layers, {"directions": 0}, ValueError, "directions must be at least 1, not 0"),
        (lambda params: params["w"] * 2.0, {}, ValueError, r"holds one number, not a Tensor of shape \(3, 3\)"),
        (lambda params: params["w"].data.sum(), {}, ValueError, "holds one number, not float64"),
        (lambda params: ops.sum(params["w"].data), {}, GradientError, r"uses none of them, or only their \.data"),
        (lambda params: ops.sum(params["w"]) * math.nan, {}, GradientError, "f is nan: nothing can be checked"),
        (lambda params: ops.sum(params["w"]) + math.inf, {}, GradientError, "f is inf: nothing can be checked"),
    ],
)
def test_a_function_that_cannot_be_checked_gets_a_sentence(f, options, error, sentence):
    """What check_gradient cannot check is an error with a sentence."""
    with pytest.raises(error, match=sentence):
        check_gradient(f, parameters(), np.random.default_rng(0), **options)


def test_constants_alone_cannot_be_checked():
    """Without a parameter that requires a gradient there is nothing to check."""
    with pytest.raises(ValueError, match="no parameter requires a gradient"):
        check_gradient(two_layers, {"w": Tensor(S), "b": Tensor(S[0])}, np.random.default_rng(0))


def test_a_function_without_a_vjp_is_told_what_to_return():
    """A function that returns its value alone is answered with what check_vjp needs."""
    with pytest.raises(TypeError, match="sin returns ndarray, not its value and its vjp: return y, vjp"):
        gradcheck.check_vjp(np.sin, np.ones(3), rng=np.random.default_rng(0))
