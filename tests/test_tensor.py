"""The engine: what a sweep adds up, what it frees, and what it refuses."""

import copy
import gc
import pickle
import weakref

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from drawing import arrays
from minidpo import Tensor, ops
from minidpo.tensor import OPS, op, sweep, tape


def leaf(value):
    return Tensor(value, requires_grad=True)


@given(x=arrays())
def test_square_by_reuse(x):
    """d(x x)/dx = 2x: an operand that is used twice receives both of its gradients."""
    t = leaf(x)
    g = np.arange(6.0).reshape(2, 3)
    (t * t).backward(g)
    np.testing.assert_allclose(t.grad, 2 * x * g)


@given(x=arrays(low=0.1))
def test_diamond(x):
    """A node passes its gradient on after all of its consumers have added theirs."""
    t = leaf(x)
    shared = ops.exp(t)
    (shared * 3.0 + ops.log(shared) * shared).backward(np.ones_like(x))
    np.testing.assert_allclose(t.grad, 3 * np.exp(x) + np.exp(x) + x * np.exp(x))


@given(order=st.permutations(range(4)))
def test_fan_out_adds_in_any_order(order):
    """The sum does not depend on which consumer was made first."""
    t = leaf([1.0, 2.0])
    h = t * 1.0
    parts = [ops.exp(h), h * h, h / 2.0, -h]
    total = parts[order[0]]
    for i in order[1:]:
        total = total + parts[i]
    total.backward([1.0, 10.0])
    np.testing.assert_allclose(t.grad, [1 * (np.e + 2 - 0.5), 10 * (np.e**2 + 4 - 0.5)])


def test_tied_leaves():
    """An embedding that is also the output head learns from both of its uses."""
    w = leaf(np.array([[1.0, 2.0], [3.0, 5.0]]))
    logits = ops.embedding(w, [1]) @ ops.transpose(w)  # w_1 . w_v
    logits.backward([[1.0, 10.0]])
    np.testing.assert_allclose(w.grad, [[3, 5], [1 + 2 * 30, 2 + 2 * 50]])


def test_gradients_accumulate_over_sweeps():
    """Sweeps add up: micro-batches give the gradient of the batch."""
    t = leaf(2.0)
    for _ in range(3):
        (t * t).backward()
    assert t.grad == 12.0
    t.grad = None
    (t * t).backward()
    assert t.grad == 4.0


def test_a_later_sweep_adds_in_place():
    """A sweep adds into the array that is in `grad`: a worker finds its gradients where it was to leave them."""
    t = leaf(np.ones(3))
    mine = t.grad = np.ones(3)
    for _ in range(2):
        ops.sum(t * 5.0).backward()
    assert t.grad is mine and mine.tolist() == [11, 11, 11]


def test_only_leaves_get_grad():
    """Only leaves keep a gradient; an activation's dies with the sweep."""
    t = leaf(2.0)
    h = t * t
    (h * h).backward()
    assert h.grad is None and t.grad == 32.0


def test_a_leaf_can_be_swept_itself():
    """dx/dx = 1: a leaf is the smallest graph."""
    t = leaf(3.0)
    t.backward()
    assert t.grad == 1.0


def test_constants_build_no_graph():
    """Constants build no graph: a frozen reference model keeps no activations and is not trained."""
    frozen, t = Tensor(2.0), leaf(3.0)
    constant = ops.exp(frozen) * 4.0
    assert constant.vjp is None and constant.parents == () and not constant.requires_grad
    (t * constant).backward()
    assert frozen.grad is None and constant.grad is None
    assert t.detach().requires_grad is False and t.detach().data is t.data


def test_a_long_chain_and_many_doublings():
    """A sweep visits each node once and needs no recursion: 10,000 links and 2^30 paths are fine."""
    t = leaf(1.0)
    y = t
    for _ in range(10_000):
        y = y + 1.0
    y.backward()
    assert t.grad == 1.0
    y = t
    for _ in range(30):
        y = y + y
    y.backward()
    assert t.grad == 1.0 + 2.0**30


def test_the_tape_is_in_order_of_creation():
    """The tape lists the graph in the order of the program that made it."""
    t = leaf(1.0)
    a = ops.exp(t)
    b = ops.log(a)
    c = a + b
    assert tape(c) == [t, a, b, c]
    assert [node for node, _ in sweep(tape(c), np.ones(()))] == [c, b, a, t]


def test_activations_die_as_the_sweep_passes():
    """Activations die as the sweep passes them, by reference count alone.

    Each node's vjp looks at the younger nodes: all but the one just passed are gone.
    """
    gc.disable()
    try:
        nodes, alive = [], []

        def watched(x):
            y = ops.exp(x * 0.5)
            number, vjp = len(nodes), y.vjp
            y.vjp = lambda g: (alive.append([node() is not None for node in nodes[number + 2 :]]), vjp(g))[1]
            nodes.append(weakref.ref(y))
            return y

        t = y = leaf(np.ones(3))
        for _ in range(6):
            y = watched(y)
        loss = ops.sum(y)
        del y
        loss.backward()
        assert len(alive) == 6 and not any(any(later) for later in alive)
        assert all(node() is None for node in nodes) and t.grad is not None
    finally:
        gc.enable()


def test_a_dropped_graph_dies_without_the_garbage_collector():
    """A graph has no reference cycle: the activations of one step are gone before the next."""
    gc.disable()
    try:
        t = leaf(np.ones((2, 3)))
        y = ops.log_softmax(ops.layer_norm(t, np.ones(3), np.ones(3)))
        refs = [weakref.ref(y), weakref.ref(y.data), weakref.ref(y.parents[0])]
        del y
        assert all(ref() is None for ref in refs)
    finally:
        gc.enable()


def test_a_sum_of_gradients_is_made_once_and_then_added_to():
    """A sum of five gradients needs one new array, and the five are not written into."""

    class Counting(np.ndarray):
        sums, additions = 0, 0

        def __add__(self, other):
            Counting.sums += 1
            return np.add(self, other).view(Counting)

        def __iadd__(self, other):
            Counting.additions += 1
            return np.add(self, other, out=self)

    t = leaf(np.ones(2))
    h = ops.exp(t)
    parts = [ops.exp(h) for _ in range(5)]
    borrowed = [np.full(2, float(i)).view(Counting) for i in range(5)]
    for part, gradient in zip(parts, borrowed):
        part.vjp = lambda g, gradient=gradient: (gradient,)
    ops.concatenate(*parts).backward(np.ones(10))
    np.testing.assert_allclose(t.grad, np.e * (0 + 1 + 2 + 3 + 4))
    assert (Counting.sums, Counting.additions) == (1, 3)
    assert [gradient[0] for gradient in borrowed] == [0, 1, 2, 3, 4]  # borrowed, and not written into


def test_copies_are_new_leaves():
    """A copied or unpickled parameter is a new leaf with the same entries, and a graph is not copied."""
    for copied in (copy.copy, copy.deepcopy, lambda t: pickle.loads(pickle.dumps(t))):
        t = copied(leaf([1.0, 2.0]))
        assert t.creation == leaf(1.0).creation - 1
        ops.sum(t * t).backward()
        assert t.grad.tolist() == [2, 4]
    with pytest.raises(TypeError, match=r"copy x\.detach\(\)"):
        copy.deepcopy(leaf(1.0) * 2.0)


def test_rows_can_be_walked():
    """A loop over a tensor gives its rows; over a single number it is an error."""
    assert [row.data.tolist() for row in Tensor([[1.0], [2.0]])] == [[1.0], [2.0]]
    with pytest.raises(TypeError, match="unsized"):
        list(Tensor(1.0))


def test_a_second_sweep_is_refused():
    """A second sweep over a freed graph is an error and changes no gradient."""
    t = leaf(2.0)
    h = t * t
    a, b = h * 3.0, ops.exp(t) * h
    a.backward()
    grad = t.grad.copy()
    for output in (a, b, h):
        with pytest.raises(RuntimeError, match="freed by an earlier backward"):
            output.backward()
    assert t.grad == grad  # b reaches t by a way that was not freed, and yet nothing was added


@pytest.mark.parametrize("earlier", [None, 5.0])
def test_a_vjp_that_fails_leaves_no_gradient(earlier):
    """After a sweep that failed, every `grad` is None: no step can use half a gradient."""
    t = leaf(2.0)

    def fails(g):
        raise KeyboardInterrupt

    h = t * t
    h.vjp = fails
    young = leaf(3.0)  # made after h, so that its turn comes first
    for x in (t, young):
        x.grad = None if earlier is None else np.array(earlier)
    with pytest.raises(KeyboardInterrupt):
        (young * h).backward()
    assert t.grad is None and young.grad is None


@pytest.mark.parametrize(
    ("make", "cotangent", "error", "sentence"),
    [
        (lambda: leaf(np.ones((2, 3))) * 2.0, None, ValueError, r"from shape \(2, 3\) needs a cotangent"),
        (lambda: leaf(np.ones(2)) * 2.0, np.ones(3), ValueError, r"has shape \(3,\), the tensor \(2,\)"),
        (lambda: leaf(np.ones(2)) * 2.0, 1.0, ValueError, r"has shape \(\), the tensor \(2,\)"),
        (lambda: Tensor(1.0) * 2.0, None, ValueError, "nothing that this tensor depends on"),
        (lambda: leaf(1.0), 1j, ValueError, "must be real"),
        (lambda: leaf(1.0), Tensor(1.0), TypeError, "do not work on a Tensor"),
    ],
)
def test_backward_says_what_is_wrong(make, cotangent, error, sentence):
    """A wrong cotangent is an error with a sentence; NumPy would broadcast it into a wrong gradient."""
    with pytest.raises(error, match=sentence):
        make().backward(cotangent)


@pytest.mark.parametrize(
    ("vjp", "error", "sentence"),
    [
        (lambda g: g, TypeError, r"exp: a vjp returns a tuple, one gradient per argument: \(gx,\)"),
        (lambda g: (g[0],), ValueError, r"exp: a gradient of shape \(\) for \(2,\)"),
        (lambda g: (), ValueError, "exp: 0 gradients for 1 arguments"),
    ],
)
def test_a_vjp_of_the_wrong_form_is_refused(vjp, error, sentence):
    """A forgotten comma is an error; the first operand would get the first entry of its gradient."""
    t = leaf([1.0, 2.0])
    y = ops.exp(t)
    y.vjp = vjp
    with pytest.raises(error, match=sentence):
        y.backward([1.0, 1.0])
    assert t.grad is None


def test_op_lifts_a_function_of_the_reader_s_own():
    """The README's recipe for a new op works."""

    def sine(x):
        return np.sin(x), lambda g: (g * np.cos(x),)

    t = leaf([0.5, 1.0])
    try:
        op(sine)(t).backward([1.0, 10.0])
        np.testing.assert_allclose(t.grad, np.cos([0.5, 1.0]) * [1, 10])
        assert OPS["sine"].raw is sine
    finally:
        del OPS["sine"]


def test_two_ops_of_one_name_are_refused():
    """A reader's own exp cannot take the place of ours."""

    def exp(x):
        return ops.exp.raw(x)

    with pytest.raises(ValueError, match=r"minidpo\.ops already has an op named exp"):
        op(exp)
    assert OPS["exp"] is ops.exp


@pytest.mark.parametrize(
    "function",
    [
        *(np.asarray, np.sum, np.mean, np.transpose, np.abs, lambda t: np.dot(t, t), lambda t: np.array([t, t])),
        *(lambda t: np.exp(t, where=[True, False]), lambda t: np.add.reduce(t), lambda t: np.minimum(t, 0)),
    ],
)
def test_numpy_functions_refuse_a_tensor(function):
    """NumPy functions that are no op of ours refuse a Tensor: they would lose its graph without a word."""
    with pytest.raises(TypeError, match=r"use those of minidpo\.ops, or its \.data"):
        function(leaf([1.0, 2.0]))


@pytest.mark.parametrize(
    ("function", "ours"),
    [
        (np.exp, ops.exp),
        (np.tanh, ops.tanh),
        (np.negative, ops.neg),
        (lambda x: np.subtract(3.0, x), lambda x: 3.0 - x),
    ],
)
def test_a_numpy_function_that_is_an_op_builds_a_graph(function, ours):
    """np.exp(x) is ops.exp(x), with its derivative."""
    x, y = leaf([1.0, 2.0]), leaf([1.0, 2.0])
    for result in (function(x), ours(y)):
        result.backward([3.0, -1.0])
    np.testing.assert_array_equal(x.grad, y.grad)


@pytest.mark.parametrize(
    ("function", "sentence"),
    [
        (lambda x: x > 0, "a comparison has no derivative"),
        (lambda x: 1 <= x, "a comparison has no derivative"),
        (lambda x: np.array([1.0, 2.0]) < x, r"use those of minidpo\.ops"),
        (abs, "minidpo.ops has no such function"),
        (lambda x: x % 2, "minidpo.ops has no such function"),
        (lambda x: 2**x, r"write ops\.exp"),
        (lambda x: x.__setitem__(0, 1.0), "a Tensor never changes"),
    ],
)
def test_what_is_not_an_op_is_refused_with_what_to_write(function, sentence):
    """A first guess of a NumPy user that has no op is answered with ours."""
    with pytest.raises(TypeError, match=sentence):
        function(leaf([1.0, 2.0]))


def test_a_single_entry_is_a_python_number():
    """int(x) and float(x) are the entry of a tensor with one."""
    assert (int(leaf([2.5])), float(leaf(2.5))) == (2, 2.5)


def test_what_an_op_returns_cannot_be_written_into():
    """A value between an op and the backward pass is read-only, so that it keeps its gradient; an operand is not."""
    array = np.array([1.0, 2.0])
    x = leaf(array)
    for y in (ops.exp(x), ops.reshape(x, (2, 1)), x[:1]):
        with pytest.raises(ValueError, match="read-only"):
            y.data[...] = 0.0
    array[0] = 5.0


class Foreign:
    """An array of another library: NumPy can read it, or refuses with words of that library."""

    def __init__(self, array, error=None):
        self.array, self.dtype, self.shape, self.error = array, f"other.{array.dtype}", array.shape, error

    def __array__(self, *args, **kwargs):
        if self.error:
            raise self.error
        return self.array


def test_an_array_of_another_library_is_read_on_the_host():
    """An op takes what NumPy can read; what it cannot, because of a graph or a device, is refused in one sentence."""
    numbers = np.array([1.0, 2.0])
    np.testing.assert_array_equal(ops.exp(Foreign(numbers)).data, np.exp(numbers))
    np.testing.assert_array_equal((leaf(numbers) * Foreign(numbers)).data, numbers**2)
    with pytest.raises(TypeError, match=r"NumPy cannot read this test_tensor\.Foreign of other\.float64: convert it"):
        ops.exp(Foreign(numbers, RuntimeError("Can't call numpy() on Tensor that requires grad")))
    with pytest.raises(TypeError, match="float16 is too narrow"):
        ops.exp(Foreign(numbers.astype("float16")))


@pytest.mark.parametrize(
    ("name", "ours"),
    [
        ("sum", r"use ops\.sum\(x\)"),
        ("mean", r"use ops\.mean\(x\)"),
        ("T", r"use ops\.transpose\(x\)"),
        ("numpy", r"x\.data is its array"),
        ("size", r"x\.data is its array"),
    ],
)
def test_attributes_of_other_libraries_are_answered_with_ours(name, ours):
    """A first guess from NumPy or PyTorch gets a sentence that names ours, and still counts as not there."""
    t = leaf([1.0, 2.0])
    with pytest.raises(AttributeError, match=rf"a Tensor has no \.{name}: {ours}"):
        getattr(t, name)
    assert not hasattr(t, name) and getattr(t, name, None) is None


def test_a_tensor_has_a_float_and_a_length_but_no_truth_value():
    """float(x) is the single entry and len(x) counts rows; a truth value would depend on which of them is meant."""
    assert float(leaf([[2.5]])) == 2.5 and type(float(Tensor(np.float32(1)))) is float
    assert len(Tensor([[1.0], [2.0]])) == 2 and len(Tensor(np.ones((0, 3)))) == 0
    with pytest.raises(ValueError, match="size 1"):
        float(leaf([1.0, 2.0]))
    with pytest.raises(TypeError, match="unsized"):
        len(leaf(1.0))
    for t in (leaf(0.0), leaf([1.0, 2.0]), Tensor(np.ones(0))):
        with pytest.raises(TypeError, match=r"neither true nor false: compare x\.item\(\)"):
            bool(t)


def test_an_empty_leaf_still_builds_a_graph():
    """A tensor without entries has a gradient without entries."""
    t = leaf(np.ones((0, 3)))
    (t * 2.0).backward(np.ones((0, 3)))
    assert t.grad.shape == (0, 3)


@pytest.mark.parametrize("data", [1, np.arange(3), np.array([True]), 1j])
def test_only_floats_can_require_a_gradient(data):
    """Only floats can require a gradient: integers would round it, complex numbers lose a part."""
    with pytest.raises(TypeError, match=r"only floating-point tensors can require a gradient, not \w+"):
        Tensor(data, requires_grad=True)


@pytest.mark.parametrize("data", ["text", None, [object()], Tensor(1.0)])
def test_only_numbers_make_a_tensor(data):
    """Only numbers make a Tensor, not strings or Python objects."""
    with pytest.raises(TypeError, match=r"expected an array of numbers, got|do not work on a Tensor"):
        Tensor(data)


def test_data_is_an_array_even_of_one_number():
    """`data` and `grad` are arrays even of one number: a NumPy scalar would promote float32."""
    for t in (Tensor(1.0), Tensor(np.float32(1)), ops.exp(np.float32(1)), ops.sum(np.ones(3))):
        assert type(t.data) is np.ndarray and t.shape == ()
    t = leaf(1.0)
    (t * t).backward()
    (t * t).backward()
    assert type(t.grad) is np.ndarray and t.item() == 1.0


def test_leaf_gradients_keep_the_dtype_of_the_leaf():
    """A float32 parameter gets a float32 gradient, even from float64 constants."""
    t = leaf(np.ones((2, 2), dtype="float32"))
    (t @ np.eye(2)).backward(np.ones((2, 2)))
    (ops.linear(t, np.eye(2), np.zeros(2)) * 2.0).backward(np.ones((2, 2)))
    assert t.grad.dtype == "float32"


@given(x=arrays((3,)), y=arrays((3,), low=0.5))
def test_operators_are_the_ops(x, y):
    """Operators compute what NumPy's do, with the tensor on either side."""
    a, b = Tensor(x), Tensor(y)
    for left, right in ((a, b), (a, y), (x, b)):
        assert ((left + right).data == x + y).all()
        assert ((left - right).data == x - y).all()
        assert ((left * right).data == x * y).all()
        assert ((left / right).data == x / y).all()
        assert (left @ right).data == x @ y
    assert ((2.0 - a).data == 2.0 - x).all() and ((2.0 / b).data == 2.0 / y).all()
    assert ((-a).data == -x).all() and ((a**2).data == x**2).all() and (a[1:].data == x[1:]).all()


def test_repr_shows_the_values():
    """Printing a tensor shows its values."""
    assert repr(leaf([1.0, 2.0])) == "Tensor(array([1., 2.]), requires_grad=True)"
    assert repr(Tensor(3)) == "Tensor(array(3))"
