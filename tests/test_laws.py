"""A law for every op that does not repeat the formula of the op.

Beside the laws: ops at the edges (logits of +-1e4, rows that hold -inf, huge entries; real and complex; warnings are
errors), and each fused op against its composition from smaller ones.
"""

import decimal
import inspect
import math
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from drawing import arrays, seeds
from minidpo import Tensor, backend, model, ops
from minidpo.gradcheck import check_vjp
from minidpo.ops import OPS

close = np.testing.assert_allclose


def law(function):
    """Hypothesis fills the arguments; the op's name is the function's, after `law_of_`."""
    parameters = inspect.signature(function).parameters
    return given(**{name: p.annotation for name, p in parameters.items()})(function)


@law
def law_of_add(x: arrays(), y: arrays(), z: arrays((3,))):
    """The order does not matter, and subtraction undoes the sum."""
    close(ops.add(x, y).data, ops.add(y, x).data)
    close(ops.add(ops.add(x, z), -z).data, x, atol=1e-14)


@law
def law_of_sub(x: arrays(), y: arrays()):
    """Difference undoes sum."""
    close(ops.sub(x + y, y).data, x, atol=1e-14)


@law
def law_of_mul(x: arrays(), y: arrays(), z: arrays((3,))):
    """Products distribute over sums."""
    close(ops.mul(x + z, y).data, ops.mul(x, y).data + ops.mul(z, y).data, atol=1e-13)


@law
def law_of_div(x: arrays(), y: arrays(low=0.5)):
    """Quotient undoes product."""
    close(ops.div(x * y, y).data, x, rtol=1e-14)


@law
def law_of_neg(x: arrays()):
    """A number and its negative make 0."""
    assert not (ops.neg(x).data + x).any()


@law
def law_of_maximum(x: arrays(), y: arrays((3,))):
    """The larger of two is their mean plus half their distance, and of two equals the first receives the gradient."""
    close(ops.maximum(x, y).data, (x + y) / 2 + abs(x - y) / 2, atol=1e-14)
    leaves = Tensor(x, requires_grad=True), Tensor(x, requires_grad=True)
    ops.sum(ops.maximum(*leaves)).backward()
    assert (leaves[0].grad == 1).all() and (leaves[1].grad == 0).all()


@law
def law_of_power(x: arrays(low=0.5), c: st.integers(0, 5)):
    """An integer power counts factors."""
    close(ops.power(x, c).data, math.prod([x] * c, start=np.ones_like(x)), rtol=1e-13)
    close(ops.power(x, -c).data * ops.power(x, c).data, 1, rtol=1e-13)
    close(ops.power(ops.power(x, 0.5).data, 2).data, x, rtol=1e-14)


@law
def law_of_exp(x: arrays(), y: arrays()):
    """Sums become products."""
    close(ops.exp(x + y).data, ops.exp(x).data * ops.exp(y).data, rtol=1e-14)
    close(ops.exp(np.ones(1)).data, math.e)


@law
def law_of_log(x: arrays()):
    """The logarithm undoes the exponential."""
    close(ops.log(np.exp(x)).data, x, atol=1e-14)


@law
def law_of_tanh(x: arrays()):
    """tanh 2x = 2 tanh x / (1 + tanh^2 x)"""
    t = ops.tanh(x).data
    close(ops.tanh(2 * x).data, 2 * t / (1 + t * t), atol=1e-14)
    close(ops.tanh(np.array([0.5])).data, [math.tanh(0.5)])


@law
def law_of_logsigmoid(x: arrays(low=-50, high=50)):
    """logsigmoid(x) - logsigmoid(-x) = x, and the two probabilities sum to 1."""
    a, b = ops.logsigmoid(x).data, ops.logsigmoid(-x).data
    close(a - b, x, atol=1e-13)
    close(np.exp(a) + np.exp(b), 1, rtol=1e-14)


@law
def law_of_log1mexp(x: arrays(low=-50, high=-1e-3)):
    """e^x and e^log1mexp(x) sum to 1, and log1mexp undoes itself; far out, what is left is -e^x or log(-x)."""
    y = ops.log1mexp(x).data
    close(np.exp(x) + np.exp(y), 1, rtol=1e-14)
    middle = x[(x > -5) & (x < -0.01)]
    close(ops.log1mexp(ops.log1mexp(middle).data).data, middle, rtol=1e-11)
    close(ops.log1mexp(np.array([-40.0, -1e-30, -1e4])).data, [-math.exp(-40), math.log(1e-30), 0], rtol=1e-14)


@law
def law_of_gelu(x: arrays()):
    """gelu(x) - gelu(-x) = x, and gelu is x times nearly the normal distribution function."""
    close(ops.gelu(x).data - ops.gelu(-x).data, x, atol=1e-14)
    close(ops.gelu(x).data, [[v * 0.5 * (1 + math.erf(v / math.sqrt(2))) for v in row] for row in x], atol=5e-4)


@law
def law_of_sum(x: arrays((2, 3, 4)), axis: st.integers(-3, 2)):
    """Axis by axis or all at once, the total is the same; on one axis it is what Python adds up."""
    total = math.fsum(x.ravel())
    close(
        [ops.sum(x).item(), ops.sum(ops.sum(x, axis=axis)).item(), ops.sum(x, axis=(0, -1, 1)).item()],
        total,
        atol=1e-13,
    )
    assert ops.sum(x, axis=axis).shape == tuple(n for i, n in enumerate(x.shape) if i != axis % 3)
    assert ops.sum(x, axis=axis, keepdims=True).shape == tuple(1 if i == axis % 3 else n for i, n in enumerate(x.shape))


@law
def law_of_mean(x: arrays((3, 4)), shift: st.floats(-3, 3)):
    """The mean is where the deviations sum to 0, and it moves with its entries."""
    assert [ops.mean(x, axis=0).shape, ops.mean(x, axis=0, keepdims=True).shape, ops.mean(x).shape] == [
        (4,),
        (1, 4),
        (),
    ]
    close((x - ops.mean(x, axis=0).data).sum(axis=0), 0, atol=1e-13)
    close(ops.mean(x + shift).data, ops.mean(x).data + shift, atol=1e-13)


@law
def law_of_reshape(x: arrays((2, 3))):
    """Reading order is kept."""
    assert ops.reshape(x, (3, 2)).data.ravel().tolist() == [v for row in x for v in row]


@law
def law_of_transpose(
    x: arrays((2, 3, 4)), axes: st.permutations(range(3)), i: st.tuples(*map(st.integers, [0] * 3, [1, 2, 3]))
):
    """y[i_a, i_b, i_c] = x[i_0, i_1, i_2] for axes (a, b, c)."""
    assert ops.transpose(x, axes).data[tuple(i[axis] for axis in axes)] == x[i]
    assert (ops.transpose(x).data == x.T).all()


@law
def law_of_getitem(x: arrays((4, 3)), cut: st.integers(0, 4)):
    """The two parts of a cut make the whole, and a permutation can be undone."""
    assert (np.vstack([ops.getitem(x, slice(cut)).data, ops.getitem(x, slice(cut, None)).data]) == x).all()
    assert (ops.getitem(ops.getitem(x, np.array([2, 0, 3, 1])), np.array([1, 3, 0, 2])).data == x).all()


@law
def law_of_concatenate(x: arrays((2, 3)), y: arrays((2, 1))):
    """Slices of the result are the parts."""
    z = ops.concatenate(x, y, axis=1).data
    assert z.shape == (2, 4) and (z[:, :3] == x).all() and (z[:, 3:] == y).all()
    assert (ops.concatenate(x, 2 * x).data == np.vstack([x, 2 * x])).all()


@law
def law_of_gather(x: arrays((2, 3)), i: st.integers(0, 2), j: st.integers(0, 2)):
    """It is what Python's indexing picks, row by row."""
    assert ops.gather(x, [i, j]).data.tolist() == [x[0][i], x[1][j]]


@law
def law_of_embedding(x: arrays((3, 2)), i: st.integers(0, 2), j: st.integers(0, 2)):
    """It is what Python's indexing picks."""
    assert ops.embedding(x, [[i, j]]).data.tolist() == [[x[i].tolist(), x[j].tolist()]]


@law
def law_of_matmul(x: arrays((2, 3)), y: arrays((3, 4)), z: arrays((4, 2))):
    """An entry is a sum of products, (x y) z = x (y z), and a batch is its matrices."""
    xy = ops.matmul(x, y).data
    close(xy[1, 2], math.fsum(x[1, k] * y[k, 2] for k in range(3)), atol=1e-13)
    close(ops.matmul(xy, z).data, ops.matmul(x, ops.matmul(y, z)).data, atol=1e-12)
    close(ops.matmul(np.stack([x, -x]), y).data, [xy, -xy], atol=1e-14)


@law
def law_of_linear(x: arrays((2, 4, 3)), w: arrays((3, 2)), b: arrays((2,))):
    """At 0 it gives b, and the rest is linear."""
    close(ops.linear(0 * x, w, b).data, np.broadcast_to(b, (2, 4, 2)))
    close(ops.linear(2 * x, w, b).data - b, 2 * (ops.linear(x, w, b).data - b), atol=1e-13)


@law
def law_of_logsumexp(x: arrays((2, 3)), shift: st.floats(-500, 500)):
    """A shift of all entries shifts the result, and n equal entries add log n."""
    close(ops.logsumexp(x + shift).data, ops.logsumexp(x).data + shift, atol=1e-12)
    close(ops.logsumexp(np.full((1, 7), shift)).data, shift + math.log(7))


@law
def law_of_softmax(x: arrays((2, 3)), shift: st.floats(-500, 500)):
    """Probabilities sum to 1, their ratios are exponentials of differences, and a shift of all changes nothing."""
    p = ops.softmax(x).data
    close(p.sum(axis=-1), 1)
    close(p[:, 0] / p[:, 1], np.exp(x[:, 0] - x[:, 1]))
    close(ops.softmax(x + shift).data, p, rtol=1e-12)


@law
def law_of_log_softmax(x: arrays((2, 3))):
    """exp(log_softmax) sums to 1, and differences of logits are differences of log-probabilities."""
    y = ops.log_softmax(x).data
    close([math.fsum(np.exp(row)) for row in y], 1, rtol=1e-14)
    close(np.diff(y), np.diff(x), atol=1e-14)


@law
def law_of_layer_norm(
    x: arrays((2, 4)), w: arrays((4,)), b: arrays((4,)), scale: st.floats(1, 9), shift: st.floats(-9, 9)
):
    """Rows have mean 0 and variance var/(var + eps); a shift of the input, or without eps a scale, changes nothing."""
    n = ops.layer_norm(x, np.ones(4), np.zeros(4)).data
    close(n.mean(axis=-1), 0, atol=1e-12)
    var = np.array([sum((v - sum(row) / 4) ** 2 for v in row) / 4 for row in x])
    close((n * n).mean(axis=-1), var / (var + 1e-5), atol=1e-9)
    close(ops.layer_norm(x + shift, w, b).data, w * n + b, atol=1e-8)
    wide = x + np.array([0, 1, 2, 9])
    close(ops.layer_norm(scale * wide, w, b, eps=0).data, ops.layer_norm(wide, w, b, eps=0).data, atol=1e-9)


@law
def law_of_causal_attention(q: arrays((4, 3)), k: arrays((4, 3)), v: arrays((4, 2)), cut: st.integers(1, 3)):
    """Row t is the softmax-weighted mean of the first t + 1 values; the last queries alone give the last rows."""
    y = ops.causal_attention(q, k, v).data
    for t in range(4):
        weights = [math.exp(sum(a * b for a, b in zip(q[t], k[s])) / math.sqrt(3)) for s in range(t + 1)]
        close(y[t], sum(weight * v[s] for s, weight in enumerate(weights)) / sum(weights), atol=1e-12)
    close(ops.causal_attention(q[:cut], k[:cut], v[:cut]).data, y[:cut], atol=1e-13)
    close(ops.causal_attention(q[cut:], k, v).data, y[cut:], atol=1e-13)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_attention_of_large_scores_is_a_choice(dtype):
    """Attention with scores of a million picks one value, and its gradients are finite."""
    q = k = np.array([[1000, 0], [0, 1000]], dtype)
    v = np.array([[1, 2], [3, 4]], dtype)
    y, vjp = ops.causal_attention.raw(q, k, v)
    assert (y == v).all() and y.dtype == dtype
    gq, gk, gv = vjp(np.ones_like(v))
    assert not gq.any() and not gk.any() and (gv == 1).all()
    far, near = np.array([[1000], [-1000]], dtype), np.array([[1000], [1000]], dtype)  # scores of 10^6 and -10^6
    assert ops.causal_attention.raw(far, near, v)[0].tolist() == [[1, 2], [2, 3]]


@law
def law_of_block_attention(qkv: arrays((7, 3, 2, 3)), cut: st.integers(1, 3)):
    """Rows chosen | prompt | rejected give each text what it gets alone; so do texts side by side."""
    chosen = slice(0, 2)  # the prompt is 2 to 3, the rejected 4 to 6
    blocks = ((chosen, slice(0, 4), 1), (slice(3, 7), slice(2, 7), 1), (slice(2, 3), slice(2, 3), 1))
    places = np.array([2, 3, 0, 1, 2, 3, 4])
    y = ops.block_attention(qkv, model.Rows(places, places, blocks).masked_blocks()).data
    for text in ([2, 3, 0, 1], [2, 3, 4, 5, 6]):
        alone = ops.causal_attention(*(qkv[text, i].swapaxes(0, 1) for i in range(3))).data
        close(y[text], alone.swapaxes(0, 1), atol=1e-13)
    places = np.array([0, 1, 2, 0, 1, 2, 0])
    together = ((slice(0, 6), slice(0, 6), 2),)
    pair = ops.block_attention(qkv, model.Rows(places, places, together).masked_blocks()).data
    apart = tuple((slice(i, i + 3), slice(i, i + 3), 1) for i in (0, 3))
    close(pair, ops.block_attention(qkv, model.Rows(places, places, apart).masked_blocks()).data, atol=1e-13)
    assert not pair[6].any()


@law
def law_of_segment_sum(x: arrays((5,)), segment: st.lists(st.integers(0, 2), min_size=5, max_size=5)):
    """Each entry counts once, in its segment; -inf in one leaves the others alone."""
    y = ops.segment_sum(x, segment, 3).data
    close(y, [math.fsum(v for v, s in zip(x, segment) if s == i) for i in range(3)], atol=1e-13)
    spoilt = ops.segment_sum(np.array([*x, -np.inf]), [*segment, 3], 4).data
    assert (spoilt[:3] == y).all() and spoilt[3] == -np.inf


@pytest.mark.parametrize("dtype", ["float32", "float64", "complex128"])
def test_pieces_change_nothing(dtype, monkeypatch):
    """GELU in pieces is GELU."""
    rng = np.random.default_rng(0)
    x, g = (rng.normal(size=(7, 3, 5)).astype(dtype) for _ in range(2))
    whole, vjp = ops.gelu.raw(x[:, ::-1])
    expected = [whole, *vjp(g)]
    for piece in (1, 11, 30, 104):
        monkeypatch.setattr(backend, "PIECE", piece)
        y, vjp = ops.gelu.raw(x[:, ::-1])
        for ours, whole in zip([y, *vjp(g)], expected, strict=True):
            assert ours.dtype == whole.dtype and ours.shape == whole.shape
            close(ours, whole, rtol=1e-6 if dtype == "float32" else 1e-14)


@given(index=st.lists(st.integers(-4, 3), max_size=5))
def test_an_index_that_names_an_entry_twice_sums(index):
    """An entry that an index names twice receives both gradients. (-1 and 3 are one entry of four.)"""
    key = np.array(index, int)
    _, vjp = ops.getitem.raw(np.zeros((4, 2)), key)
    g = np.random.default_rng(0).normal(size=(len(index), 2))
    expected = np.zeros((4, 2))
    for i, row in zip(index, g, strict=True):
        expected[i] += row
    close(vjp(g)[0], expected, atol=1e-15)
    assert ops.ascending(key) == (index == sorted(set(index)) and min(index, default=0) >= 0)
    assert not ops.ascending(key.astype(float)) and not ops.ascending(key[None]) and not ops.ascending(index)


@pytest.mark.parametrize("name", OPS)
def test_law(name):
    """Every op obeys its law: a gradient check alone would accept the derivative of a wrong forward."""
    getattr(sys.modules[__name__], f"law_of_{name}")()


# ---- the edges --------------------------------------------------------------------------------------------

INF = math.inf
ROWS = [
    [1e4, 0.0, -1e4],
    [-1e4, -1e4, -1e4 + 1],
    [1e4, 1e4 - 2, -INF],
    [-INF, 0.3, -0.2],
    [-INF, -INF, -1e4],
    [0.1, 3.0, 0.5],
]


def exactly(row):
    """Log-probabilities and their log-sum-exp in 60 digits."""
    with decimal.localcontext(prec=60, Emin=-(10**7), Emax=10**7):
        finite = [decimal.Decimal(v) for v in row if v != -INF]
        top = max(finite)
        total = top + sum((v - top).exp() for v in finite).ln()
        return [float(decimal.Decimal(v) - total) if v != -INF else -INF for v in row], float(total)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("row", ROWS)
def test_rows_at_the_edge_are_exact(row, dtype):
    """Rows with logits of +-1e4 or -inf are exact."""
    logps, total = exactly(row)
    x = np.array([row], dtype=dtype)
    rtol = 1e-6 if dtype == "float32" else 1e-14
    atol = rtol * max(1.0, abs(total))
    close(ops.log_softmax(x).data, [logps], rtol=rtol, atol=atol)
    close(ops.softmax(x).data, [[math.exp(v) for v in logps]], rtol=100 * rtol, atol=rtol)
    close(ops.logsumexp(x).data, [total], rtol=rtol)


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("name", ["log_softmax", "softmax", "logsumexp"])
def test_gradients_of_rows_at_the_edge_are_exact(name, row):
    """Their gradients are exact too."""
    x = np.array([row])
    y, vjp = OPS[name].raw(x)
    g = np.random.default_rng(0).normal(size=y.shape)
    p = np.array([[math.exp(v) for v in exactly(row)[0]]])
    expected = {"log_softmax": g - p * g.sum(), "softmax": p * (g - (g * p).sum()), "logsumexp": g * p}[name]
    close(vjp(g)[0], expected, rtol=1e-12, atol=1e-14)
    check_vjp(OPS[name], x, rng=np.random.default_rng(0), method="complex")
    if not {1e4, -1e4} & set(row):  # there rounding, 1e4 * 1e-16 / 1e-6, drowns a central difference
        check_vjp(OPS[name], x, rng=np.random.default_rng(0), method="central")


def test_float32_probabilities_sum_to_one_far_from_zero():
    """Float32 probabilities of logits near 1e4 are exact: the largest logit is subtracted first."""
    x = np.array([[1e4, 1e4 - 1, 1e4 - 2.5]], dtype="float32")
    p = [math.exp(v) for v in exactly(x[0].tolist())[0]]
    close(ops.logsumexp.raw(x)[1](np.ones(1, dtype="float32"))[0], [p], rtol=1e-6)
    close(ops.softmax.raw(x)[0], [p], rtol=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_logsigmoid_at_the_edge_is_exact(dtype):
    """Logsigmoid is exact from -inf to inf: DPO learns most from pairs far on the wrong side."""
    x = np.array([-1e4, -100.0, -1.0, 0.0, 1.0, 30.0, 100.0, 1e4, -INF, INF], dtype=dtype)
    y, vjp = ops.logsigmoid.raw(x)
    with decimal.localcontext(prec=60, Emin=-(10**7), Emax=10**7):
        exact = [float(-(1 + (-decimal.Decimal(float(v))).exp()).ln()) for v in x[:-2]] + [-INF, 0.0]
    tiny = float(np.finfo(dtype).tiny)
    close(y, exact, rtol=1e-6 if dtype == "float32" else 1e-14, atol=tiny)
    assert (vjp(np.ones_like(x))[0][[0, -2, -1]] == [1, 1, 0]).all()
    check_vjp(ops.logsigmoid, x.astype("float64"), rng=np.random.default_rng(0), method="complex")


def test_logsigmoid_gradient_keeps_its_tail():
    """-expm1(y) is sigma(-x), also where 1 - sigma(x) rounds to 0."""
    (gx,) = ops.logsigmoid.raw(np.array([40.0]))[1](np.ones(1))
    close(gx, [math.exp(-40.0)], rtol=1e-12)
    assert 1 - 1 / (1 + math.exp(-40.0)) == 0


@pytest.mark.parametrize("name", ["gelu", "tanh", "logsigmoid"])
def test_saturated_entries_have_finite_gradients(name):
    """Saturated entries have finite gradients."""
    y, vjp = OPS[name].raw(np.array([-1e4, 1e4]))
    assert np.isfinite(y).all() and np.isfinite(vjp(np.ones(2))[0]).all()


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_gelu_of_huge_entries(dtype):
    """GELU is x with slope 1 far above 0, and 0 with slope 0 far below, up to the largest float."""
    top = float(np.finfo(dtype).max)
    x = np.array([9, 2e13, 1e19, 1e30, top], dtype=dtype)
    y, vjp = ops.gelu.raw(np.concatenate([x, -x]))
    assert y.dtype == dtype and y[:5].tolist() == x.tolist()
    close(y[5:], 0, atol=1e-25)
    close(vjp(np.ones(10, dtype))[0], [1] * 5 + [0] * 5, atol=1e-25)
    inside = np.linspace(-12, 12, 49)  # the bounds of +-9 are out of sight
    u = math.sqrt(2 / math.pi) * (inside + 0.044715 * inside**3)
    close(ops.gelu(inside).data, inside * (1 + np.tanh(u)) / 2, rtol=1e-14, atol=1e-15)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_huge_entries_have_finite_results(dtype):
    """A mean, a quotient or a score that is a float is found, also where a sum, a square or a product is not."""
    top = np.finfo(dtype).max
    x = np.full(4, top)
    close(ops.mean(x).data, top, rtol=1e-6)
    close(ops.mean.raw(x)[1](top)[0], top / 4, rtol=1e-6)
    half = np.sqrt(top)
    z, vjp = ops.div.raw(top, np.full(1, half))
    close([z, -vjp(np.ones(1, dtype))[1]], [[half], [1]], rtol=1e-6)
    q = np.full((1, 4), np.sqrt(top) / 2)  # q k = top before it is divided by sqrt(D) = 2
    y, vjp = ops.causal_attention.raw(q, 1.5 * q, np.ones((1, 2), dtype))
    assert y.tolist() == [[1, 1]] and all(np.isfinite(gx).all() for gx in vjp(np.ones((1, 2), dtype)))


def test_a_variance_that_overflows_is_refused():
    """Layer norm refuses a row whose variance is inf: it would return 0 for 1 and -1."""
    for dtype, x in (("float32", 1e20), ("float64", 1e160)):
        row = np.array([[x, -x], [1, 2]], dtype)
        with np.errstate(over="ignore"), pytest.raises(FloatingPointError, match=f"a row overflows {dtype}"):
            ops.layer_norm(row, np.ones(2, dtype), np.ones(2, dtype))
        close(ops.layer_norm(row * 1e-10, np.ones(2, dtype), np.zeros(2, dtype)).data[0], [1, -1], rtol=1e-6)


def test_power_at_zero():
    """The slope of x^0 is 0 and of x^1 is 1, also at x = 0, where 0 times inf would be nan."""
    x = np.zeros(1)
    assert [ops.power.raw(x, c)[1](np.ones(1))[0][0] for c in (0, 1, 2)] == [0, 1, 0]


# ---- fused ops are their compositions ---------------------------------------------------------------------


def composed_layer_norm(x, w, b):
    c = x - ops.mean(x, axis=-1, keepdims=True)
    return c * (ops.mean(c * c, axis=-1, keepdims=True) + 1e-5) ** -0.5 * w + b


def composed_attention(q, k, v):
    scores = q @ ops.transpose(k, (0, 2, 1)) * 3**-0.5 + np.triu(np.full((4, 4), -np.inf), 1)
    return ops.exp(ops.log_softmax(scores)) @ v


COMPOSITIONS = {
    "sub": (lambda x, y: x + -y, [(2, 3), (3,)]),
    "div": (lambda x, y: x * (y * y) ** -1 * y, [(2, 3), (3,)]),
    "power": (lambda x: x * x * x, [(2, 3)]),
    "mean": (lambda x: ops.sum(x) / 6, [(2, 3)]),
    "linear": (lambda x, w, b: x @ w + b, [(2, 4, 3), (3, 2), (2,)]),
    "gelu": (lambda x: x * 0.5 * (1 + ops.tanh((2 / math.pi) ** 0.5 * (x + 0.044715 * x**3))), [(2, 3)]),
    "logsigmoid": (lambda x: -ops.log(1 + ops.exp(-x)), [(2, 3)]),
    "logsumexp": (lambda x: ops.log(ops.sum(ops.exp(x), axis=-1)), [(2, 3)]),
    "softmax": (lambda x: ops.exp(x) / ops.sum(ops.exp(x), axis=-1, keepdims=True), [(2, 3)]),
    "log_softmax": (lambda x: x - ops.log(ops.sum(ops.exp(x), axis=-1, keepdims=True)), [(2, 3)]),
    "gather": (lambda x: ops.sum(x * np.eye(3)[[2, 0]], axis=-1), [(2, 3)]),
    "embedding": (lambda x: np.eye(2)[[1, 1, 0]] @ x, [(2, 3)]),
    "layer_norm": (composed_layer_norm, [(2, 3), (3,), (3,)]),
    "causal_attention": (composed_attention, [(2, 4, 3)] * 3),
}
ARGUMENTS = {"power": (3,), "gather": ([2, 0],), "embedding": ([1, 1, 0],)}


@pytest.mark.parametrize("name", COMPOSITIONS)
@given(seed=seeds)
def test_fused_op_is_its_composition(name, seed):
    """A fused op has the value and the gradients of its composition."""
    rng = np.random.default_rng(seed)
    compose, shapes = COMPOSITIONS[name]
    values = [rng.normal(size=shape) for shape in shapes]
    results = []
    for function in (lambda *leaves: OPS[name](*leaves, *ARGUMENTS.get(name, ())), compose):
        leaves = [Tensor(value, requires_grad=True) for value in values]
        y = function(*leaves)
        y.backward(np.random.default_rng(seed).normal(size=y.shape))
        results.append([y.data, *[leaf.grad for leaf in leaves]])
    for fused, composed in zip(*results):
        close(fused, composed, rtol=1e-9, atol=1e-9 * (1 + abs(composed).max()))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("amplitude", [1, 100])
@given(seed=seeds, batch=st.sampled_from([(), (3,), (2, 3)]), S=st.integers(1, 9), data=st.data())
def test_fast_attention_is_the_textbook_attention(amplitude, dtype, seed, batch, S, data):
    """`attention` and `causal_attention` are two codes for one function: equal values, equal gradients.

    Queries and keys are eighths, so that all scores, up to +-1e4, are exact in either order of summation.
    """
    rng, T, D = np.random.default_rng(seed), data.draw(st.integers(1, S)), 4 ** data.draw(st.integers(0, 2))
    q, k = (rng.integers(-8, 9, (*batch, n, D)).astype(dtype) / 8 * amplitude / D**0.25 for n in (T, S))
    v, g = (rng.normal(size=(*batch, n, D)).astype(dtype) for n in (S, T))
    later = np.arange(S) > np.arange(S - T, S)[:, None]
    y, vjp = ops.causal_attention.raw(q, k, v)
    fast, fast_vjp = ops.attention(q * D**-0.5, k, v, np.where(later.T, -INF, 0).astype("float32"))
    gq, gk, gv = fast_vjp(g)
    rtol = 1e-5 if dtype == "float32" else 1e-12
    for ours, expected in zip((fast, gq * D**-0.5, gk, gv), (y, *vjp(g)), strict=True):
        assert ours.dtype == expected.dtype == dtype and ours.shape == expected.shape
        close(ours, expected, rtol=rtol, atol=rtol * amplitude * (1 + abs(expected).max()))
