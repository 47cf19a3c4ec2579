"""One property over the registry, and what else a good vector-Jacobian product never does."""

import inspect
import re
import types

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from drawing import cases, is_varied, seeds
from minidpo import Tensor, ops
from minidpo.cli.cases import CASES
from minidpo.gradcheck import STEP, check_vjp
from minidpo.ops import OPS
from minidpo.tensor import sweep, tape

every_op = pytest.mark.parametrize("name", OPS)


def test_every_op_has_a_case():
    """Otherwise an op could land whose derivative nobody has checked."""
    assert set(CASES) == set(OPS)


@pytest.mark.parametrize("method", STEP)
@every_op
@given(data=st.data(), seed=seeds)
def test_vjp_is_the_derivative(name, method, data, seed):
    """Otherwise some training step follows a direction that is not the gradient."""
    arguments, options = data.draw(cases(name))
    check_vjp(OPS[name].raw, *arguments, rng=np.random.default_rng(seed), method=method, **options)


def drawn_vjp(data, name, dtype="float64"):
    """One forward: its arguments, its value, its vjp, and a source of cotangents."""
    arguments, options = data.draw(cases(name))
    arguments = [x.astype(dtype) if is_varied(x) else x for x in arguments]
    for x in arguments:
        if is_varied(x):
            x.flags.writeable = False
    rng = np.random.default_rng(data.draw(seeds))
    y, vjp = OPS[name].raw(*arguments, **options)
    return arguments, y, vjp, lambda: np.asarray(rng.normal(size=y.shape), dtype=y.dtype)


@every_op
@given(data=st.data())
def test_zero_cotangent_gives_zero(name, data):
    """Otherwise a loss that ignores a value would still move what made it."""
    _, y, vjp, _ = drawn_vjp(data, name)
    for gx in vjp(np.zeros(y.shape)):
        assert gx is None or not gx.any()


@every_op
@given(data=st.data())
def test_vjp_is_linear(name, data):
    """Otherwise the gradient of a sum of losses is not the sum of their gradients."""
    _, _, vjp, cotangent = drawn_vjp(data, name)
    g, h = cotangent(), cotangent()
    for gx, hx, both in zip(vjp(g), vjp(h), vjp(2 * g - 3 * h)):
        assert (gx is None) == (both is None)
        if gx is not None:
            np.testing.assert_allclose(both, 2 * gx - 3 * hx, rtol=1e-9, atol=1e-9 * (1 + abs(both).max(initial=0)))


@every_op
@given(data=st.data())
def test_vjp_twice_is_bitwise_equal(name, data):
    """Otherwise a vjp spends what it keeps, and a run cannot be repeated."""
    _, _, vjp, cotangent = drawn_vjp(data, name)
    g = cotangent()
    first = [gx if gx is None else gx.copy() for gx in vjp(g)]
    for once, again in zip(first, vjp(g)):
        assert (once is None and again is None) or once.tobytes() == again.tobytes()


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@every_op
@given(data=st.data())
def test_gradients_have_the_shape_and_dtype_of_the_input(name, dtype, data):
    """Otherwise one stray float64 doubles the memory and halves the speed of all that follows."""
    arguments, y, vjp, cotangent = drawn_vjp(data, name, dtype)
    if any(is_varied(x) for x in arguments):
        assert y.dtype == dtype
    gxs = vjp(cotangent())
    assert len(gxs) == len(arguments)
    for x, gx in zip(arguments, gxs):
        assert (gx.shape, gx.dtype) == (x.shape, x.dtype) if is_varied(x) else gx is None


@every_op
@given(data=st.data())
def test_inputs_and_cotangent_are_left_alone(name, data):
    """Otherwise a forward corrupts the weights, or a vjp the gradient of its neighbour."""
    arguments, _, vjp, cotangent = drawn_vjp(data, name)  # whose arrays cannot be written to
    before = [x.copy() if is_varied(x) else x for x in arguments]
    g = cotangent()
    g.flags.writeable = False
    vjp(g)
    for x, old in zip(arguments, before):
        assert not is_varied(x) or x.tobytes() == old.tobytes()


@every_op
@given(data=st.data())
def test_leaf_gradients_share_no_memory(name, data):
    """Otherwise writing to one parameter's gradient changes another's, or its value."""
    arguments, options = data.draw(cases(name))
    operands = [Tensor(x, requires_grad=True) if is_varied(x) else x for x in arguments]
    leaves = [t for t in operands if isinstance(t, Tensor)]
    if not leaves:
        return
    y = OPS[name](*operands, **options)
    g = np.random.default_rng(data.draw(seeds)).normal(size=y.shape)
    y.backward(g)
    others = [g, y.data, *[leaf.data for leaf in leaves]]
    for i, leaf in enumerate(leaves):
        for other in others + [other.grad for other in leaves[:i]]:
            assert not np.shares_memory(leaf.grad, other)


def kept_arrays(function):
    """Names and values of the arrays that a closure keeps, those of a vjp inside it included."""
    kept = {}
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or ()):
        parts = cell.cell_contents if isinstance(cell.cell_contents, tuple | list) else ()
        assert not any(isinstance(part, np.ndarray) for part in parts), "arrays are kept by name"
        if isinstance(cell.cell_contents, np.ndarray):
            kept[name] = cell.cell_contents
        elif isinstance(cell.cell_contents, types.FunctionType) and cell.cell_contents.__name__ == "vjp":
            kept |= kept_arrays(cell.cell_contents)
        elif name == "vjps":  # and attention in blocks what each of its attentions keeps
            kept |= kept_arrays(cell.cell_contents[0])
    return kept


@every_op
def test_vjp_keeps_what_its_comment_says(name):
    """Otherwise activations stay in memory that no derivative needs, or the comment lies."""
    said = re.search(r"def vjp\(g\):  # keeps (.*)", inspect.getsource(OPS[name].raw)).group(1)
    arguments = {
        "power": (np.ones((2, 3)), 2),
        "gather": (np.ones((2, 3)), np.zeros(2, int)),
        "embedding": (np.ones((2, 3)), np.zeros(2, int)),
        "reshape": (np.ones((2, 3)), (6,)),
        "getitem": (np.ones((2, 3)), np.zeros(2, int)),
        "segment_sum": (np.ones(2), np.zeros(2, int), 2),
        "block_attention": (np.ones((2, 3, 1, 1)), ((slice(0, 2), slice(0, 2), 1, np.zeros((2, 2))),)),
        "linear": (np.ones((2, 3)), np.ones((3, 3)), np.ones(3)),
        "layer_norm": (np.ones((2, 3)), np.ones(3), np.ones(3)),
    }
    n = sum(
        p.default is p.empty for p in inspect.signature(OPS[name].raw).parameters.values() if p.kind != p.VAR_KEYWORD
    )
    _, vjp = OPS[name].raw(*arguments.get(name, [np.ones((3, 3))] * n))
    assert set(kept_arrays(vjp)) == (set() if said == "nothing" else set(said.split(", ")))


@pytest.mark.parametrize(
    "name", ["sum", "mean", "softmax", "log_softmax", "logsumexp", "layer_norm", "causal_attention"]
)
def test_an_empty_reduced_axis_is_refused(name):
    """Otherwise the mean of nothing is nan, and travels."""
    empty = {"layer_norm": [(2, 0), (0,), (0,)], "causal_attention": [(0, 2)] * 3}.get(name, [(2, 0)])
    with pytest.raises(ValueError, match=r"empty along axis|cannot be"):
        OPS[name](*[np.ones(shape) for shape in empty])


@pytest.mark.parametrize("axis", [2, -3, (0, 2), (-3,)])
@pytest.mark.parametrize("reduction", [ops.sum, ops.mean])
def test_an_axis_that_is_not_there_is_refused(reduction, axis):
    """Otherwise the error speaks of tuples, and not of the axis."""
    with pytest.raises(ValueError, match=r"shape \(2, 3\) has no axis"):
        reduction(np.ones((2, 3)), axis=axis)


def test_a_transpose_of_missing_axes_is_refused():
    """Otherwise axis 5 of three is taken for axis 2."""
    with pytest.raises(ValueError, match="axis 5"):
        ops.transpose(np.ones((2, 3, 4)), (0, 1, 5))


@pytest.mark.parametrize("name", ["softmax", "log_softmax", "logsumexp"])
@pytest.mark.parametrize("row", [[-np.inf, -np.inf], [0.0, np.inf]])
def test_a_row_without_a_finite_maximum_is_refused(name, row):
    """Otherwise a row that means nothing becomes nan, and nobody learns which."""
    with pytest.raises(ValueError, match="finite"):
        OPS[name](np.array([[0.0, 1.0], row]))


@pytest.mark.parametrize("bad", [-1, 3])
@pytest.mark.parametrize("name", ["gather", "embedding"])
def test_an_index_outside_is_refused(name, bad):
    """Otherwise a wrong token id wraps around, and some other row learns in its place."""
    with pytest.raises(IndexError, match=rf"index {bad} at position \(1,\) is outside 0 <= index < 3"):
        OPS[name](np.ones((3, 3)), np.array([0, bad, 1]))


@pytest.mark.parametrize("name", ["softmax", "log_softmax", "logsumexp"])
@pytest.mark.parametrize("dtype", ["int8", "uint8", "bool"])
def test_integer_logits_are_refused(name, dtype):
    """Otherwise 127 - (-128) wraps around in int8, and the smaller logit wins."""
    with pytest.raises(TypeError, match=f"logits must be floats, not {dtype}"):
        OPS[name](np.array([1, 0], dtype=dtype))


def test_one_segment_for_each_entry():
    """Otherwise broadcasting adds one entry to several sums."""
    for x, segment in ((np.ones(1), [0, 1]), (np.ones((1, 2)), [[0, 1]])):
        with pytest.raises(ValueError, match="one segment for each entry"):
            ops.segment_sum(x, segment, 2)


def test_lists_are_arrays():
    """Otherwise a sum of two lists is their concatenation."""
    assert ops.add([1.0, 2.0], [3.0, 4.0]).data.tolist() == [4, 6]
    assert ops.mul([1.0, 2.0], 3).data.tolist() == [3, 6]
    assert (Tensor([1.0, 2.0]) @ [1.0, 1.0]).item() == 3
    assert ops.gather(np.ones((0, 3)), []).shape == ops.embedding(np.ones((3, 2)), []).shape[:1] == (0,)


def test_a_constant_of_another_dtype_keeps_gradients_in_that_of_the_leaf():
    """Otherwise one float64 bias doubles the width of every gradient below it."""
    g = np.ones((2, 2))
    for function in (
        lambda h: ops.linear(h, np.eye(2), np.ones(2)),
        lambda h: ops.layer_norm(h, np.ones(2), np.ones(2)),
        lambda h: h * np.ones(2) @ np.eye(2),
    ):
        h = ops.exp(Tensor(np.ones((2, 2), dtype="float32"), requires_grad=True))
        dtypes = {node.op: gradient.dtype.name for node, gradient in sweep(tape(function(h)), g)}
        assert (dtypes["exp"], dtypes["leaf"]) == ("float32", "float32")


def test_gather_wants_one_index_a_row():
    """Otherwise broadcasting picks entries that nobody asked for."""
    with pytest.raises(ValueError, match=r"\(2,\), not \(1,\)"):
        ops.gather(np.ones((2, 3)), [0])


@pytest.mark.parametrize("exponent", [np.array(2.0), Tensor(2.0), "2", 1j])
def test_power_wants_a_constant_number(exponent):
    """Otherwise the derivative in the exponent would be dropped in silence."""
    with pytest.raises(TypeError, match="constant number"):
        ops.power(np.ones(2), exponent)


def test_a_tensor_by_keyword_is_refused():
    """Otherwise it would be a constant in disguise, and its gradient silently missing."""
    with pytest.raises(TypeError, match="layer_norm: pass the tensor w by position"):
        ops.layer_norm(np.ones((2, 3)), w=Tensor(np.ones(3)), b=np.ones(3))


def test_queries_cannot_outnumber_keys():
    """Otherwise the first queries would have no place to look at, and their softmax no meaning."""
    with pytest.raises(ValueError, match="3 queries at the last of 2 places"):
        ops.causal_attention(np.ones((3, 4)), np.ones((2, 4)), np.ones((2, 4)))
