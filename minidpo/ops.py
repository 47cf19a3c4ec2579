"""Every op and its derivative: forward, derivation, vjp, one after another.

Letters: L is the final number, g = dL/d(result) arrives, gx = dL/dx leaves. i, j, k number entries, and [i = j] is
1 where that holds, else 0. Below each forward is the local Jacobian and, where it is more than a factor, its
contraction with g: gx_j = sum_i g_i dy_i/dx_j. "keeps" names the arrays that stay in memory for the backward pass.
`xp` is NumPy, or CuPy for arrays on a GPU (backend.py). Pass arrays and required arguments by position, options by
keyword.
"""

import itertools
import math
import numbers

from .backend import array_module, column_sum, in_pieces, index_array, on_host, own_key, row_mean, row_sum
from .tensor import OPS as OPS
from .tensor import Tensor, op

# ---- arithmetic -------------------------------------------------------------------------------------------


@op
def add(x, y):
    """Sum, broadcast: z = x + y.  (...), (...) -> (...)"""
    like_x, like_y = like(x), like(y)
    z = x + y

    # dz_i/dx_i = dz_i/dy_i = 1: both receive g
    def vjp(g):  # keeps nothing
        return unbroadcast(g, like_x), unbroadcast(g, like_y)

    return z, vjp


@op
def sub(x, y):
    """Difference, broadcast: z = x - y.  (...), (...) -> (...)"""
    like_x, like_y = like(x), like(y)
    z = x - y

    # dz_i/dx_i = 1, dz_i/dy_i = -1
    def vjp(g):  # keeps nothing
        return unbroadcast(g, like_x), unbroadcast(-g, like_y)

    return z, vjp


@op
def mul(x, y):
    """Product entry by entry, broadcast: z = x y.  (...), (...) -> (...)"""
    like_x, like_y = like(x), like(y)
    z = x * y

    # dz_i/dx_i = y_i, dz_i/dy_i = x_i
    def vjp(g):  # keeps x, y
        return unbroadcast(g * y, like_x), unbroadcast(g * x, like_y)

    return z, vjp


@op
def div(x, y):
    """Quotient entry by entry, broadcast: z = x / y.  (...), (...) -> (...)"""
    like_x, like_y = like(x), like(y)
    z = x / y

    # dz_i/dx_i = 1/y_i, dz_i/dy_i = -x_i/y_i^2 = -z_i/y_i
    def vjp(g):  # keeps y, z
        gx = g / y
        return unbroadcast(gx, like_x), unbroadcast(-gx * z, like_y)

    return z, vjp


@op
def neg(x):
    """Negative: y = -x.  (...) -> (...)"""
    y = -x

    # dy_i/dx_i = -1
    def vjp(g):  # keeps nothing
        return (-g,)

    return y, vjp


@op
def maximum(x, y):
    """The larger of two entries, broadcast: z = max(x, y).  (...), (...) -> (...)"""
    xp, like_x, like_y = array_module(x, y), like(x), like(y)
    first = x.real >= y.real
    z = xp.where(first, x, y)

    # dz_i/dx_i = [x_i >= y_i], dz_i/dy_i = [x_i < y_i]: where they are equal, x receives all of g
    def vjp(g):  # keeps first
        return unbroadcast(xp.where(first, g, 0), like_x), unbroadcast(xp.where(first, 0, g), like_y)

    return z, vjp


# ---- broadcasting, undone in one place --------------------------------------------------------------------


def like(x):
    """Shape and dtype of x: its gradient needs no more, and a vjp that kept x would keep its memory.

    None for numbers, integers and booleans, which have no gradient.
    """
    return (x.shape, x.dtype) if hasattr(x, "dtype") and x.dtype.kind not in "biu" else None


def unbroadcast(g, like_x):
    """Backward of broadcasting: an entry that was copied receives the sum of g over its copies."""
    if like_x is None:
        return None
    shape, dtype = like_x
    added = g.ndim - len(shape)  # axes that x lacks, all in front
    if added:
        rows, own = math.prod(g.shape[:added]), g.shape[added:]
        g = column_sum(g.reshape(rows, math.prod(own))).reshape(own)
    stretched = tuple(axis for axis, size in enumerate(shape) if size != g.shape[axis])  # 1 -> n
    if stretched:
        g = g.sum(axis=stretched, keepdims=True)
    return g.astype(dtype, copy=False)


# ---- functions of one entry -------------------------------------------------------------------------------


@op
def power(x, exponent):
    """Power: y = x^c, the exponent c a constant number.  (...) -> (...)"""
    if not isinstance(exponent, numbers.Real):
        raise TypeError(f"power: the exponent must be a constant number, not {type(exponent).__name__}")
    c = float(exponent)  # a Python number leaves float32 as it is
    y = x**c

    # dy_i/dx_i = c x_i^(c-1); for c = 0 that is 0, where 0 * 0^-1 would be nan
    def vjp(g):  # keeps x
        return (g * (c * x ** (c - 1)) if c else 0 * g, None)

    return y, vjp


@op
def exp(x):
    """Exponential: y = e^x.  (...) -> (...)"""
    y = array_module(x).exp(x)

    # dy_i/dx_i = e^x_i = y_i
    def vjp(g):  # keeps y
        return (g * y,)

    return y, vjp


@op
def log(x):
    """Natural logarithm: y = log x.  (...) -> (...)"""
    y = array_module(x).log(x)

    # dy_i/dx_i = 1/x_i
    def vjp(g):  # keeps x
        return (g / x,)

    return y, vjp


@op
def tanh(x):
    """Hyperbolic tangent: y = tanh x.  (...) -> (...)"""
    y = array_module(x).tanh(x)

    # dy_i/dx_i = 1 - tanh^2 x_i = 1 - y_i^2
    def vjp(g):  # keeps y
        return (g * (1 - y * y),)

    return y, vjp


@op
def logsigmoid(x):
    """Log of the logistic function: y = log sigma(x) = min(x, 0) - log(1 + e^-|x|).  (...) -> (...)"""
    xp = array_module(x)
    negative = x.real < 0  # no abs: the complex step (gradcheck.py) would lose the derivative
    y = xp.where(negative, x, 0) - xp.log1p(xp.exp(xp.where(negative, x, -x)))

    # dy_i/dx_i = sigma'(x_i)/sigma(x_i) = 1 - sigma(x_i) = 1 - e^y_i
    # written -expm1(y_i), expm1 being e^y - 1 exact near y = 0, where 1 - e^y rounds to 0
    def vjp(g):  # keeps y
        return (g * -xp.expm1(y),)

    return y, vjp


@op
def log1mexp(x):
    """Log of the complementary probability: y = log(1 - e^x) for x < 0.  (...) -> (...)"""
    xp = array_module(x)
    small = x.real < -math.log(2)  # e^x < 1/2; log1p is exact where e^x is near 0, expm1 where it is near 1
    far, near = xp.where(small, x, -1), xp.where(small, -1, x)
    y = xp.where(small, xp.log1p(-xp.exp(far)), xp.log(-xp.expm1(near)))

    # dy_i/dx_i = -e^x_i/(1 - e^x_i) = -e^(x_i - y_i)
    def vjp(g):  # keeps x, y
        return (g * -xp.exp(x - y),)

    return y, vjp


@op
def gelu(x):
    """GELU in GPT-2's form: y = x p,  p = sigma(u) = (1 + tanh(u/2))/2,  u = a x + b x^3.  (...) -> (...)"""
    xp, a, b = array_module(x), math.sqrt(8 / math.pi), 0.044715 * math.sqrt(8 / math.pi)

    def value_and_slope(x):
        z = xp.clip(x, -9, 9)  # below -9 y is 0 and above 9 p is 1, to within 1e-27; e^-u and x^3 cannot overflow
        x = xp.maximum(x, z)
        z2 = z * z
        p = 1 / (1 + xp.exp(z * (-a - b * z2)))
        y = x * p
        return y, p + y * (1 - p) * (a + 3 * b * z2)

    y, slope = in_pieces(value_and_slope, x)

    # dy_i/dx_i = p_i + x_i dp_i/dx_i = slope_i
    # dp/du = sigma(u) (1 - sigma(u)) = p (1 - p)  and  du/dx = a + 3 b x^2
    # x p = y:  slope_i = p_i + y_i (1 - p_i) (a + 3 b x_i^2)
    def vjp(g):  # keeps slope
        return (g * slope,)

    return y, vjp


# ---- sums over axes ---------------------------------------------------------------------------------------


def reduced_size(x, axis):
    """The number of entries that a reduction of x over `axis` (None: all) puts into one; 0 is refused."""
    axes = range(x.ndim) if axis is None else axis if isinstance(axis, tuple) else (axis,)
    try:
        n = math.prod([x.shape[i] for i in axes])
    except IndexError:
        raise ValueError(f"nothing to reduce: shape {x.shape} has no axis {axis}") from None
    if n == 0:
        raise ValueError(f"nothing to reduce: shape {x.shape} is empty along axis {axis}")
    return n


@op
def sum(x, axis=None, keepdims=False):
    """Sum over `axis`, an integer, a tuple or None for all: y = sum_i x_i."""
    reduced_size(x, axis)
    xp, shape, total = array_module(x), x.shape, x.sum(axis=axis, keepdims=True)
    column, y = total.shape, total if keepdims else total.squeeze(axis)

    # dy/dx_i = 1: each x_i receives the g of its sum
    def vjp(g):  # keeps nothing
        return (xp.broadcast_to(xp.reshape(g, column), shape),)

    return y, vjp


@op
def mean(x, axis=None, keepdims=False):
    """Mean over `axis`, an integer, a tuple or None for all: y = (1/n) sum_i x_i."""
    n = reduced_size(x, axis)
    xp, shape, average = array_module(x), x.shape, (x / n).sum(axis=axis, keepdims=True)
    column, y = average.shape, average if keepdims else average.squeeze(axis)

    # dy/dx_i = 1/n
    def vjp(g):  # keeps nothing
        return (xp.broadcast_to(xp.reshape(g, column) / n, shape),)

    return y, vjp


# ---- moving entries: each y_i is some x_j, so x_j receives g_i from every place that it went to -----------


@op
def reshape(x, shape):
    """The same entries in another shape."""
    shape_x, y = x.shape, x.reshape(shape)

    # y_i = x_i in reading order
    def vjp(g):  # keeps nothing
        return (g.reshape(shape_x), None)

    return y, vjp


@op
def transpose(x, axes=None):
    """The axes in another order, reversed by default: axis k of y is axis axes[k] of x."""
    y = x.transpose(axes)
    axes = tuple(range(x.ndim))[::-1] if axes is None else tuple(axis % x.ndim for axis in axes)
    inverse = tuple(axes.index(k) for k in range(x.ndim))

    # axis k of y is axis axes[k] of x, so axis k of g goes back to place axes[k]
    def vjp(g):  # keeps nothing
        return (g.transpose(inverse),)

    return y, vjp


def ascending(key):
    """Whether a key is a host array of indices, each larger than the one before."""
    if not (hasattr(key, "dtype") and key.dtype.kind in "iu" and key.ndim == 1 and on_host(key)):
        return False
    return key.size == 0 or bool(key[0] >= 0 and (key[1:] > key[:-1]).all())


@op
def getitem(x, key):
    """Indexing: y = x[key], with any key that NumPy takes."""
    xp, shape = array_module(x), x.shape
    key = own_key(key, xp)
    y = x[key]
    parts = key if isinstance(key, tuple) else (key,)
    once = all(part is None or part is Ellipsis or isinstance(part, int | slice) for part in parts) or ascending(key)

    # y_i = x_key(i), so gx_j is the sum of g_i over all i with key(i) = j. An index array may name one x_j
    # several times, and gx[key] = g would keep only the last g_i; slices and ascending indices name each x_j once
    def vjp(g):  # keeps key
        gx = xp.zeros(shape, dtype=g.dtype)
        if once:
            gx[key] = g
        else:
            xp.add.at(gx, key, g)
        return (gx, None)

    return y, vjp


@op
def concatenate(*arrays, axis=0):
    """Arrays one after another along `axis`; the other axes must be equal."""
    xp, likes, shapes = array_module(*arrays), [like(x) for x in arrays], [x.shape for x in arrays]
    if not all(len(shape) == len(shapes[0]) and -len(shape) <= axis < len(shape) for shape in shapes):
        raise ValueError(f"concatenate: all shapes need the same number of axes, and an axis {axis}, not {shapes}")
    ends = list(itertools.accumulate(x.shape[axis] for x in arrays))
    y = xp.concatenate(arrays, axis=axis)

    # y holds each operand once, so g holds each gradient once: cut it at the joints
    def vjp(g):  # keeps nothing
        parts = xp.split(g, ends[:-1], axis=axis)
        return tuple(unbroadcast(part, like_x) for part, like_x in zip(parts, likes))

    return y, vjp


@op
def gather(x, index):
    """One entry of each row: y_i = x[i, index_i].  (..., V), integers (...) -> (...)"""
    xp, V = array_module(x), x.shape[-1]
    index = index_array(index, V, xp)
    if index.shape != x.shape[:-1]:
        raise ValueError(f"gather: x {x.shape} needs one index for each row, {x.shape[:-1]}, not {index.shape}")
    y = xp.take_along_axis(x, index[..., None], axis=-1)[..., 0]  # (..., V) -> (...)

    # dy_i/dx_ij = [j = index_i], so gx_ij = g_i [j = index_i]
    def vjp(g):  # keeps index
        return (xp.where(index[..., None] == xp.arange(V), g[..., None], 0), None)  # (...) -> (..., V)

    return y, vjp


@op
def segment_sum(x, segment, count):
    """Sums of the entries of each segment: y_s = sum_i x_i [segment_i = s].  (M), integers (M) -> (count)"""
    xp = array_module(x)
    segment = index_array(segment, count, xp)
    if segment.shape != x.shape or x.ndim != 1:
        raise ValueError(
            f"segment_sum: x needs the shape (M), and one segment for each entry, not {x.shape} and {segment.shape}"
        )
    y = xp.zeros(count, dtype=x.dtype)
    xp.add.at(y, segment, x)

    # dy_s/dx_i = [segment_i = s], so gx_i is g at its segment
    def vjp(g):  # keeps segment
        return (g[segment], None, None)

    return y, vjp


@op
def embedding(table, index):
    """Rows of a table: y_i = table[index_i].  (V, C), integers (...) -> (..., C)"""
    xp, (V, C) = array_module(table), table.shape
    index = index_array(index, V, xp)
    y = table[index]  # (...) -> (..., C)

    # y_ic = sum_v O_iv table_vc with the one-hot matrix O_iv = [v = index_i], so g_table = O^T g:
    # a row that is taken several times receives the sum
    def vjp(g):  # keeps index
        one_hot = (index.reshape(-1, 1) == xp.arange(V)).astype(g.dtype)  # (N, V)
        return (one_hot.T @ g.reshape(index.size, C), None)  # (V, N) @ (N, C) -> (V, C)

    return y, vjp


# ---- matrix products --------------------------------------------------------------------------------------


@op
def matmul(x, y):
    """Matrix product: z_ij = sum_k x_ik y_kj.  (..., n, k), (..., k, m) -> (..., n, m); vectors as in NumPy."""
    like_x, like_y = like(x), like(y)
    z = x @ y
    row, column = x.ndim == 1, y.ndim == 1
    X, Y = x[None, :] if row else x, y[:, None] if column else y  # a vector is a matrix of one row or column

    # dz_ij/dx_ik = y_kj, so gx_ik = sum_j g_ij y_kj:  gx = g y^T
    # dz_ij/dy_kj = x_ik, so gy_kj = sum_i x_ik g_ij:  gy = x^T g
    def vjp(g):  # keeps X, Y
        g = g[..., None] if column else g
        g = g[..., None, :] if row else g
        gx, gy = g @ Y.swapaxes(-1, -2), X.swapaxes(-1, -2) @ g
        return unbroadcast(gx, like_x), unbroadcast(gy[..., 0] if column else gy, like_y)

    return z, vjp


@op
def linear(x, w, b):
    """Affine map of each row: y = x w + b.  (..., n), (n, m), (m) -> (..., m)"""
    (n, m), shape, like_b = w.shape, x.shape, like(b)
    N = math.prod(shape[:-1])
    rows = x.reshape(N, n)  # (..., n) -> (N, n)
    y = (rows @ w + b).reshape(*shape[:-1], m)

    # y_ij = sum_k x_ik w_kj + b_j:  gx = g w^T, gw = x^T g as for matmul, and gb_j = sum_i g_ij
    def vjp(g):  # keeps rows, w
        g = g.reshape(N, m)  # (..., m) -> (N, m)
        return (g @ w.T).reshape(shape), rows.T @ g, unbroadcast(g, like_b)

    return y, vjp


# ---- rows as distributions, over the last axis ------------------------------------------------------------


def row_max(x):
    """The largest entry of each row: with it subtracted, exp cannot overflow.  (..., V) -> (..., 1)"""
    reduced_size(x, -1)
    if x.dtype.kind in "biu":
        raise TypeError(f"logits must be floats, not {x.dtype}")
    top = x.max(axis=-1, keepdims=True)
    if on_host(x) and array_module(x).isinf(top).any():  # a device would have to stop and report
        raise ValueError("a row needs a finite largest entry: all are -inf, or one is +inf")
    return top


@op
def logsumexp(x):
    """Log of a sum of exponentials: y_i = log sum_j e^x_ij.  (..., V) -> (...)"""
    xp, top = array_module(x), row_max(x)
    e = xp.exp(x - top)
    total = e.sum(axis=-1, keepdims=True)  # (..., V) -> (..., 1)
    y = (xp.log(total) + top)[..., 0]  # (..., 1) -> (...)

    # dy_i/dx_ij = e^x_ij / sum_k e^x_ik, so gx_ij = g_i e_ij / total_i
    def vjp(g):  # keeps e, total
        return (g[..., None] * (e / total),)  # (...) -> (..., V)

    return y, vjp


@op
def softmax(x):
    """Probabilities from logits: y_j = e^x_j / sum_k e^x_k.  (..., V) -> (..., V)"""
    e = array_module(x).exp(x - row_max(x))
    y = e / e.sum(axis=-1, keepdims=True)

    # dy_i/dx_j = y_i ([i = j] - y_j), so gx_j = y_j (g_j - sum_i g_i y_i)
    def vjp(g):  # keeps y
        return (y * (g - (g * y).sum(axis=-1, keepdims=True)),)

    return y, vjp


@op
def log_softmax(x):
    """Log-probabilities from logits: y_j = x_j - log sum_k e^x_k.  (..., V) -> (..., V)"""
    xp = array_module(x)
    shifted = x - row_max(x)
    y = shifted - xp.log(xp.exp(shifted).sum(axis=-1, keepdims=True))

    # dy_i/dx_j = [i = j] - p_j with p_j = e^y_j, so gx_j = g_j - p_j sum_i g_i
    def vjp(g):  # keeps y
        return (g - xp.exp(y) * g.sum(axis=-1, keepdims=True),)

    return y, vjp


# ---- the fused ops of a transformer -----------------------------------------------------------------------


@op
def layer_norm(x, w, b, eps=1e-5):
    """Rows of mean 0 and variance near 1, scaled and shifted: y = w n + b,  n = (x - mean)/sqrt(var + eps).

    (..., C), (C), (C) -> (..., C)
    """
    reduced_size(x, -1)
    like_w, like_b = like(w), like(b)
    c = x - row_mean(x)
    r = (row_mean(c * c) + float(eps)) ** -0.5  # (..., C) -> (..., 1)
    if on_host(r) and not r.all():
        raise FloatingPointError(f"layer_norm: the variance of a row overflows {x.dtype}")
    n = c * r
    y = n * w + b

    # y = n w + b:  gw = g n, gb = g, both summed over the rows, and gn = g w
    # n = c r with r = (var + eps)^(-1/2):  dL/dvar = -(1/2) r^3 sum_j gn_j c_j
    # var = mean(c c), so c reaches n twice:  gc_i = r gn_i + (2 c_i/C) dL/dvar = r (gn_i - n_i mean(gn n))
    # c = x - mean(x):  gx = gc - mean(gc), and mean(gc) = r mean(gn) because mean(n) = 0
    def vjp(g):  # keeps n, r, w
        gn, gw = g * w, g * n
        gx = gn - row_mean(gn)
        gx -= n * row_mean(gn * n)
        gx *= r
        return gx, unbroadcast(gw, like_w), unbroadcast(g, like_b)

    return y, vjp


@op
def causal_attention(q, k, v, later=None):
    """Each query's weighted mean of the values up to its own place: y = p v,  p = softmax(s),  s = q k^T/sqrt(D).

    (..., T, D), (..., S, D), (..., S, E) -> (..., T, E). A score is -inf where `later`, (..., T, S), is true; by
    default the queries are the last T of the S places, and the keys after a query are later.
    """
    xp, (T, D), S = array_module(q), q.shape[-2:], k.shape[-2]
    if not 0 < T <= S or D == 0:
        raise ValueError(f"causal_attention: needs 0 < T <= S and D > 0, not {T} queries, {S} keys and size {D}")
    later = xp.arange(S) > xp.arange(S - T, S)[:, None] if later is None else later
    scale = D**-0.5
    s = xp.where(later, -math.inf, q * scale @ k.swapaxes(-1, -2))  # (..., T, D) @ (..., D, S) -> (..., T, S)
    top = s.max(axis=-1, keepdims=True)
    if on_host(top) and top.size and top.min() == -math.inf:
        raise ValueError("causal_attention: a query sees no key: all its scores are -inf")
    e = xp.exp(s - top)
    p = e / e.sum(axis=-1, keepdims=True)
    y = p @ v  # (..., T, S) @ (..., S, E) -> (..., T, E)

    # y = p v:  gv = p^T g and gp = g v^T, as for matmul
    # p = softmax(s):  gs_ij = p_ij (gp_ij - sum_l gp_il p_il), which is 0 where p_ij = 0, at later keys
    # s = scale q k^T:  gq = scale gs k and gk = scale gs^T q
    def vjp(g):  # keeps q, k, v, p
        gv = p.swapaxes(-1, -2) @ g
        gp = g @ v.swapaxes(-1, -2)
        gs = p * (gp - (gp * p).sum(axis=-1, keepdims=True))
        gq, gk = scale * gs @ k, scale * gs.swapaxes(-1, -2) @ q
        return unbroadcast(gq, like(q)), unbroadcast(gk, like(k)), unbroadcast(gv, like(v))

    return y, vjp


def attention(q, k, v, hidden):
    """`causal_attention` rewritten for speed, which training uses; q arrives scaled.

    (..., T, D), (..., S, D), (..., S, D), (S, T) -> (..., T, D). It differs in four things: scores are keys by queries,
    since the largest of a column is found faster than that of a row; the mask `hidden`, -inf at a key that the query
    must not see, else 0, is added in place; p = e/total is never stored: y and g are divided by total instead; and the
    sum over keys in the softmax's gradient is y_j g_j.
    """
    e = k @ q.swapaxes(-1, -2)  # (..., S, D) @ (..., D, T) -> (..., S, T)
    e += hidden
    e -= e.max(axis=-2, keepdims=True)
    e = array_module(q).exp(e)
    total = row_sum(e.swapaxes(-1, -2))  # (..., S, T) -> (..., T, 1)
    y = e.swapaxes(-1, -2) @ v / total

    # y_j = sum_i e_ij v_i/total_j, i and l keys, j a query. With h = g/total:  gv = e h
    # gs_ij = p_ij (gp_ij - sum_l p_lj gp_lj) with gp_ij = v_i g_j, and the sum over l is y_j g_j:
    #                  gs_ij = e_ij (v_i h_j - y_j h_j)
    # s_ij = k_i q_j:  gq = gs^T k,  gk = gs q
    def vjp(g):  # keeps q, k, v, e, total, y
        h = g / total
        gs = v @ h.swapaxes(-1, -2)
        gs -= row_sum(h * y).swapaxes(-1, -2)
        gs *= e
        return gs.swapaxes(-1, -2) @ k, gs @ q, e @ h

    return y, vjp


@op
def block_attention(qkv, blocks):
    """Causal attention among rows that belong together.  (N, 3, H, D), blocks -> (N, H, D)

    Row n holds the query, key and value of one token. A block (queries, keys, count, hidden) is two slices of rows,
    each of `count` texts of one length, and an array, (S, T), that is -inf where a query must not see a key, else 0.
    No two blocks share a query; a query in no block gets 0.
    """
    xp, (N, _, H, D) = array_module(qkv), qkv.shape
    scaled, y, parts = qkv[:, 0] * D**-0.5, xp.zeros((N, H, D), dtype=qkv.dtype), []

    def heads(rows, count):
        return rows.reshape(count, -1, H, D).swapaxes(1, 2)  # (count T, H, D) -> (count, H, T, D), a view

    for queries, keys, count, hidden in blocks:
        q, k, v = heads(scaled[queries], count), heads(qkv[keys, 1], count), heads(qkv[keys, 2], count)
        block, vjp_block = attention(q, k, v, hidden)
        heads(y[queries], count)[...] = block
        parts.append((queries, keys, count, vjp_block))
    if on_host(y) and xp.isnan(y).any() and any((hidden == -math.inf).all(axis=0).any() for *_, hidden in blocks):
        raise ValueError("block_attention: a query sees no key: its column of `hidden` is -inf")

    # the vjp of a block gives g_scaled, gk, gv of its rows; a row may be a key of several blocks, and then gets the sum
    # scaled = q D^(-1/2), so gq = g_scaled D^(-1/2)
    def vjp(g):  # keeps q, k, v, e, total, y
        gqkv = xp.zeros((N, 3, H, D), dtype=g.dtype)
        for queries, keys, count, vjp_block in parts:
            for i, (rows, gradient) in enumerate(zip((queries, keys, keys), vjp_block(heads(g[queries], count)))):
                into = heads(gqkv[rows, i], count)
                into += gradient
        gqkv[:, 0] *= D**-0.5
        return gqkv, None

    return y, vjp


# ---- operators of Tensor ----------------------------------------------------------------------------------

Tensor.__add__ = add
Tensor.__radd__ = lambda y, x: add(x, y)
Tensor.__sub__ = sub
Tensor.__rsub__ = lambda y, x: sub(x, y)
Tensor.__mul__ = mul
Tensor.__rmul__ = lambda y, x: mul(x, y)
Tensor.__truediv__ = div
Tensor.__rtruediv__ = lambda y, x: div(x, y)
Tensor.__neg__ = neg
Tensor.__pow__ = power
Tensor.__matmul__ = matmul
Tensor.__rmatmul__ = lambda y, x: matmul(x, y)
Tensor.__getitem__ = getitem
