"""Properties that hold for every op of the registry, and the arguments that ops refuse."""

import inspect
import re
import types

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from drawing import cases, is_varied, seeds
from minidpo import Tensor, ops
from minidpo.gradcheck import STEP, check_vjp
from minidpo.ops import OPS
from minidpo.tensor import sweep, tape
from minidpo.verify.cases import CASES

every_op = pytest.mark.parametrize("name", OPS)


def test_every_op_has_a_case():
    """Every op has a case, so every derivative is checked."""
    assert set(CASES) == set(OPS)


@pytest.mark.parametrize("method", STEP)
@every_op
@given(data=st.data(), seed=seeds)
def test_vjp_is_the_derivative(name, method, data, seed):
    """Each vjp is the derivative of its forward, by central differences and by the complex step."""
    arguments, options = data.draw(cases(name))
    check_vjp(OPS[name].raw, *arguments, rng=np.random.default_rng(seed), method=method, **options)


def forwards_of(data, name, *dtypes):
    """A forward in each dtype: its arguments, its value, its vjp, and a function that draws cotangents."""
    arguments, options = data.draw(cases(name))
    rng = np.random.default_rng(data.draw(seeds))
    for dtype in dtypes:
        xs = [x.astype(dtype) if is_varied(x) else x for x in arguments]
        for x in xs:
            if is_varied(x):
                x.flags.writeable = False
        y, vjp = OPS[name].raw(*xs, **options)
        yield xs, y, vjp, lambda y=y: np.asarray(rng.normal(size=y.shape), dtype=y.dtype)


@every_op
@given(data=st.data())
def test_vjp_is_linear(name, data):
    """A vjp is linear in its cotangent, and zeros give zeros."""
    ((_, _, vjp, cotangent),) = forwards_of(data, name, "float64")
    g, h = cotangent(), cotangent()
    for gx, hx, both, none in zip(vjp(g), vjp(h), vjp(2 * g - 3 * h), vjp(0 * g), strict=True):
        assert (gx is None) == (both is None) == (none is None)
        if gx is not None:
            np.testing.assert_allclose(both, 2 * gx - 3 * hx, rtol=1e-9, atol=1e-9 * (1 + abs(both).max(initial=0)))
            assert not none.any()


@every_op
@given(data=st.data())
def test_gradients_have_the_shape_and_dtype_of_the_input(name, data):
    """Gradients have the shape and dtype of their input: one stray float64 would double the memory after it."""
    dtypes = ("float32", "float64")
    for dtype, (arguments, y, vjp, cotangent) in zip(dtypes, forwards_of(data, name, *dtypes), strict=True):
        if any(is_varied(x) for x in arguments):
            assert y.dtype == dtype
        gxs = vjp(cotangent())
        assert len(gxs) == len(arguments)
        for x, gx in zip(arguments, gxs):
            assert (gx.shape, gx.dtype) == (x.shape, x.dtype) if is_varied(x) else gx is None


@every_op
@given(data=st.data())
def test_what_is_given_is_left_alone(name, data):
    """Neither forward nor vjp writes into its arguments, so that a vjp gives the same bits when it is called again."""
    ((arguments, _, vjp, cotangent),) = forwards_of(data, name, "float64")  # read-only arrays
    before = [x.copy() if is_varied(x) else x for x in arguments]
    g = cotangent()
    g.flags.writeable = False
    first = [gx if gx is None else gx.copy() for gx in vjp(g)]
    for once, again in zip(first, vjp(g), strict=True):
        assert (once is None and again is None) or once.tobytes() == again.tobytes()
    for x, old in zip(arguments, before):
        assert not is_varied(x) or x.tobytes() == old.tobytes()


@every_op
@given(data=st.data())
def test_leaf_gradients_share_no_memory(name, data):
    """The gradient of a leaf shares no memory with another gradient, or with a value."""
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


def closure_arrays(function):
    """Names and values of the arrays that a closure keeps, and those of a vjp inside it."""
    arrays = {}
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or ()):
        parts = cell.cell_contents if isinstance(cell.cell_contents, tuple | list) else ()
        assert not any(isinstance(part, np.ndarray) for part in parts), "arrays are kept by name"
        if isinstance(cell.cell_contents, np.ndarray):
            arrays[name] = cell.cell_contents
        elif isinstance(cell.cell_contents, types.FunctionType) and cell.cell_contents.__name__ == "vjp":
            arrays |= closure_arrays(cell.cell_contents)
        elif name == "parts":  # the blocks of block_attention, each with the vjp of its attention
            arrays |= closure_arrays(cell.cell_contents[0][-1])
    return arrays


@every_op
def test_vjp_keeps_what_its_comment_says(name):
    """A vjp keeps exactly the arrays that its comment names."""
    comment = re.search(r"def vjp\(g\):  # keeps (.*)", inspect.getsource(OPS[name].raw)).group(1)
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
        "log1mexp": (-np.ones((2, 3)),),
    }
    n = sum(
        p.default is p.empty for p in inspect.signature(OPS[name].raw).parameters.values() if p.kind != p.VAR_KEYWORD
    )
    _, vjp = OPS[name].raw(*arguments.get(name, [np.ones((3, 3))] * n))
    assert set(closure_arrays(vjp)) == (set() if comment == "nothing" else set(comment.split(", ")))


@pytest.mark.parametrize(
    "name", ["sum", "mean", "softmax", "log_softmax", "logsumexp", "layer_norm", "causal_attention"]
)
def test_an_empty_reduced_axis_is_refused(name):
    """A reduction over no entries is refused: the mean of nothing would be nan."""
    empty = {"layer_norm": [(2, 0), (0,), (0,)], "causal_attention": [(0, 2)] * 3}.get(name, [(2, 0)])
    with pytest.raises(ValueError, match=r"empty along axis|needs 0 < T"):
        OPS[name](*[np.ones(shape) for shape in empty])


@pytest.mark.parametrize("axis", [2, -3, (0, 2), (-3,)])
@pytest.mark.parametrize("reduction", [ops.sum, ops.mean])
def test_an_axis_that_does_not_exist_is_refused(reduction, axis):
    """An axis that does not exist is refused by name."""
    with pytest.raises(ValueError, match=r"shape \(2, 3\) has no axis"):
        reduction(np.ones((2, 3)), axis=axis)


def test_a_transpose_of_missing_axes_is_refused():
    """A transpose refuses axes that do not exist: 5 is not 2 modulo 3."""
    with pytest.raises(ValueError, match="axis 5"):
        ops.transpose(np.ones((2, 3, 4)), (0, 1, 5))


@pytest.mark.parametrize("name", ["softmax", "log_softmax", "logsumexp"])
@pytest.mark.parametrize("row", [[-np.inf, -np.inf], [0.0, np.inf]])
def test_a_row_without_a_finite_maximum_is_refused(name, row):
    """A row of logits needs a finite largest entry."""
    with pytest.raises(ValueError, match="finite"):
        OPS[name](np.array([[0.0, 1.0], row]))


@pytest.mark.parametrize("bad", [-1, 3])
@pytest.mark.parametrize("name", ["gather", "embedding"])
def test_an_index_outside_is_refused(name, bad):
    """An index outside the rows is refused: NumPy would wrap it around to another row."""
    with pytest.raises(IndexError, match=rf"index {bad} at position \(1,\) is outside 0 <= index < 3"):
        OPS[name](np.ones((3, 3)), np.array([0, bad, 1]))


@pytest.mark.parametrize("name", ["softmax", "log_softmax", "logsumexp"])
@pytest.mark.parametrize("dtype", ["int8", "uint8", "bool"])
def test_integer_logits_are_refused(name, dtype):
    """Logits are floats: in int8, 127 - (-128) wraps around and the smaller logit wins."""
    with pytest.raises(TypeError, match=f"logits must be floats, not {dtype}"):
        OPS[name](np.array([1, 0], dtype=dtype))


def test_one_segment_for_each_entry():
    """Each entry belongs to one segment: broadcasting would add one entry to several sums."""
    for x, segment in ((np.ones(1), [0, 1]), (np.ones((1, 2)), [[0, 1]])):
        with pytest.raises(ValueError, match="one segment for each entry"):
            ops.segment_sum(x, segment, 2)


def test_lists_are_arrays():
    """Ops read lists as arrays: the sum of two lists is not their concatenation."""
    assert ops.add([1.0, 2.0], [3.0, 4.0]).data.tolist() == [4, 6]
    assert ops.mul([1.0, 2.0], 3).data.tolist() == [3, 6]
    assert (Tensor([1.0, 2.0]) @ [1.0, 1.0]).item() == 3
    assert ops.gather(np.ones((0, 3)), []).shape == ops.embedding(np.ones((3, 2)), []).shape[:1] == (0,)


def test_a_constant_of_another_dtype_keeps_gradients_in_that_of_the_leaf():
    """A float64 constant leaves the gradients of float32 tensors in float32."""
    g = np.ones((2, 2))
    for function in (
        lambda h: ops.linear(h, np.eye(2), np.ones(2)),
        lambda h: ops.layer_norm(h, np.ones(2), np.ones(2)),
        lambda h: h * np.ones(2) @ np.eye(2),
    ):
        h = ops.exp(Tensor(np.ones((2, 2), dtype="float32"), requires_grad=True))
        dtypes = {node.op: gradient.dtype.name for node, gradient in sweep(tape(function(h)), g)}
        assert (dtypes["exp"], dtypes["leaf"]) == ("float32", "float32")


@pytest.mark.parametrize("constant", [3, True, np.array([2, 3]), np.array([True, True])], ids=str)
@pytest.mark.parametrize("name", ["add", "sub", "mul", "div"])
def test_whole_numbers_and_truth_values_have_no_gradient(name, constant):
    """A vjp gives the real argument its gradient, and None to numbers, integers and booleans beside it."""
    x, g = np.array([0.5, 1.5]), np.array([0.3, -0.7])
    right, left = (OPS[name].raw(*pair)[1](g) for pair in ((x, constant), (constant, x)))
    assert right[1] is None and left[0] is None
    assert right[0].shape == left[1].shape == (2,) and all(np.abs(each).min() > 0 for each in (right[0], left[1]))


def test_gather_takes_one_index_a_row():
    """Gather takes one index for each row, without broadcasting."""
    with pytest.raises(ValueError, match=r"\(2,\), not \(1,\)"):
        ops.gather(np.ones((2, 3)), [0])


@pytest.mark.parametrize("exponent", [np.array(2.0), Tensor(2.0), "2", 1j])
def test_power_takes_a_constant_number(exponent):
    """The exponent is a constant number: an array would have a derivative, which power does not give."""
    with pytest.raises(TypeError, match="constant number"):
        ops.power(np.ones(2), exponent)


def test_a_tensor_by_keyword_is_refused():
    """A tensor by keyword is refused: it would get no gradient."""
    with pytest.raises(TypeError, match="layer_norm: pass the tensor w by position"):
        ops.layer_norm(np.ones((2, 3)), w=Tensor(np.ones(3)), b=np.ones(3))


def test_queries_cannot_outnumber_keys():
    """There are at most as many queries as keys: the first queries would see none."""
    with pytest.raises(ValueError, match="not 3 queries, 2 keys"):
        ops.causal_attention(np.ones((3, 4)), np.ones((2, 4)), np.ones((2, 4)))


def test_a_query_that_sees_no_key_is_refused():
    """Each query sees a key: the softmax of no scores is nan."""
    q, later = np.ones((2, 3, 4)), np.zeros((3, 3), bool)
    later[1] = True
    with pytest.raises(ValueError, match="causal_attention: a query sees no key"):
        ops.causal_attention(q, q, q, later)
    hidden = np.where(later.T, -np.inf, 0.0)
    with np.errstate(invalid="ignore"), pytest.raises(ValueError, match="block_attention: a query sees no key"):
        ops.block_attention(np.ones((3, 3, 1, 2)), ((slice(0, 3), slice(0, 3), 1, hidden),))
    spoilt = np.full((3, 3, 1, 2), np.nan)  # a nan that comes from elsewhere is passed on
    assert np.isnan(ops.block_attention(spoilt, ((slice(0, 3), slice(0, 3), 1, 0 * np.ones((3, 3))),)).data).all()


def test_concatenate_needs_equal_numbers_of_axes():
    """Arrays with different numbers of axes are refused, with their shapes; so is an axis that does not exist."""
    for arrays, axis in (((np.ones(2), np.ones((2, 3))), 1), ((np.ones((2, 3)), np.ones(2)), 0), ((np.ones(2),), 1)):
        with pytest.raises(ValueError, match=rf"number of axes, and an axis {axis}, not \[\(2,"):
            ops.concatenate(*arrays, axis=axis)


def test_an_empty_list_picks_nothing():
    """x[[]] is empty, as in NumPy, and its gradient is 0."""
    x = Tensor(np.ones((3, 2)), requires_grad=True)
    for key, shape in (([], (0, 2)), (([], 0), (0,)), ((slice(None), []), (3, 0)), ([[]], (1, 0, 2))):
        y = x[key]
        assert y.shape == x.data[key].shape == shape
        y.backward(np.ones(shape))
    assert not x.grad.any()
    with pytest.raises(IndexError):
        x[[0.5]]


REFILLED = {
    "gather": lambda x, buffer: ops.gather(x, buffer),
    "embedding": lambda x, buffer: ops.embedding(x, buffer),
    "segment_sum": lambda x, buffer: ops.segment_sum(x[:, 0], buffer, 3),
    "getitem": lambda x, buffer: x[buffer],
    "getitem of a pair": lambda x, buffer: x[buffer, buffer],
    "getitem of a list": lambda x, buffer: x[buffer.tolist(), buffer],
}


@pytest.mark.parametrize("name", REFILLED)
def test_a_buffer_of_indices_may_be_refilled(name):
    """The gradient belongs to the forward: an index array may be refilled before the backward pass."""
    gradients = []
    for refill in (False, True):
        x, buffer = Tensor(np.arange(9.0).reshape(3, 3), requires_grad=True), np.array([2, 0, 0])
        y = REFILLED[name](x, buffer)
        if refill:
            buffer[:] = 1
        y.backward(np.random.default_rng(0).normal(size=y.shape))
        gradients.append(x.grad)
    assert gradients[0].any() and (gradients[0] == gradients[1]).all()


def test_a_mask_may_be_refilled():
    """The same holds for a mask of booleans, and for blocks of attention in a list."""
    x, mask = Tensor(np.ones(3), requires_grad=True), np.array([True, False, True])
    y = x[mask]
    mask[:] = [False, True, True]
    y.backward(np.array([1.0, 2.0]))
    assert x.grad.tolist() == [1, 0, 2]
    blocks = [(slice(0, 2), slice(0, 2), 1, np.zeros((2, 2)))]
    _, vjp = ops.block_attention.raw(np.ones((2, 3, 1, 1)), blocks)
    blocks.clear()
    assert vjp(np.ones((2, 1, 1)))[0].any()


NARROW = {
    "Tensor": lambda x: Tensor(x),
    "mean": lambda x: ops.mean(x),
    "log_softmax": lambda x: ops.log_softmax(x),
    "layer_norm": lambda x: ops.layer_norm(x, np.ones(2), np.ones(2)),
    "a constant": lambda x: Tensor(np.ones(2), requires_grad=True) * x,
    "a scalar": lambda x: ops.add(np.ones(2), x[0]),
    "a cotangent": lambda x: (Tensor(np.ones(2), requires_grad=True) * 2.0).backward(x),
}


@pytest.mark.parametrize("name", NARROW)
def test_float16_is_refused(name):
    """Arrays narrower than float32 are refused, with the remedy: in float16 the layer norm of (300, -300) is 0."""
    x = np.array([300, -300], dtype="float16")
    with pytest.raises(TypeError, match=r'float16 is too narrow.*\.astype\("float32"\)'):
        NARROW[name](x)
    NARROW[name](x.astype("float32"))


def test_keys_that_broadcast_over_the_batch_get_the_sum():
    """One set of keys and values may serve a whole batch; its gradient is the sum over the batch."""
    rng = np.random.default_rng(0)
    q, k, v = (rng.normal(size=shape) for shape in ((5, 2, 3, 4), (2, 3, 4), (1, 2, 3, 4)))
    check_vjp(ops.causal_attention, q, k, v, rng=rng)
    y, vjp = ops.causal_attention.raw(q, k, v)
    whole, vjp_whole = ops.causal_attention.raw(q, np.stack([k] * 5), np.concatenate([v] * 5))
    g = rng.normal(size=y.shape)
    (gq, gk, gv), (gq_whole, gk_whole, gv_whole) = vjp(g), vjp_whole(g)
    for ours, expected in ((y, whole), (gq, gq_whole), (gk, gk_whole.sum(0)), (gv, gv_whole.sum(0, keepdims=True))):
        np.testing.assert_allclose(ours, expected, rtol=1e-12, atol=1e-13)
    with pytest.raises(ValueError, match=r"broadcast"):
        ops.causal_attention(q, np.ones((3, 2, 3, 4)), v)
