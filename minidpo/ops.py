"""Every derivative in the project: forward, derivation, vjp, one op after another.

Letters: L is the final number, g = dL/d(result) arrives, gx = dL/dx leaves; i, j, k run over entries, and
[i = j] is 1 where that holds, else 0. Under each forward stands the local Jacobian, and, where it is more
than a factor, its contraction with g: gx_j = sum_i g_i dy_i/dx_j. "keeps" names the arrays that stay in
memory for the backward pass. `xp` is NumPy, or CuPy for arrays on a GPU (backend.py).
Operands (arrays, and what has no default) are passed by position, options by keyword.
"""

import functools
import itertools
import math
import numbers

from .backend import array_module, index_array, on_host
from .tensor import OPS as OPS
from .tensor import Tensor, op

# ---- memory -----------------------------------------------------------------------------------------------

PIECE = 2**15  # entries: a few arrays of so many fit a processor's cache


def in_pieces(function, x):
    """Both arrays that a function of single entries makes of x, a piece at a time: what lies between stays cached."""
    if x.size <= PIECE or not on_host(x):
        return function(x)
    flat, (y, z) = x.reshape(-1), (array_module(x).empty(x.size, dtype=x.dtype) for _ in range(2))
    for start in range(0, x.size, PIECE):
        piece = slice(start, start + PIECE)
        y[piece], z[piece] = function(flat[piece])
    return y.reshape(x.shape), z.reshape(x.shape)


def plus(x, y):
    """x + y, in the memory of x, the caller's own, if it has the sum's dtype and axes; none of these is stretched."""
    if getattr(y, "dtype", None) != x.dtype or y.ndim > x.ndim:
        return x + y
    x += y
    return x


# ---- broadcasting, undone in one place ----------------------------------------------------------------


def like(x):
    """Shape and dtype of x, all that its gradient needs: a vjp that kept x itself would keep its memory.

    None where there is no gradient: for a number, integers, booleans.
    """
    return (x.shape, x.dtype) if hasattr(x, "dtype") and x.dtype.kind not in "biu" else None


def unbroadcast(g, like_x):
    """Backward of broadcasting: an entry that was copied receives the sum of g over its copies."""
    if like_x is None:
        return None
    shape, dtype = like_x
    added = g.ndim - len(shape)  # axes that x had not, all in front
    if added and shape:  # a product with ones adds up the rows; for a bias this is faster than sum
        copies, own = math.prod(g.shape[:added]), g.shape[added:]
        row = array_module(g).ones(copies, dtype=g.dtype)
        g = (row @ g.reshape(copies, math.prod(own))).reshape(own)
    elif added:
        g = g.sum()
    stretched = tuple(axis for axis, size in enumerate(shape) if size != g.shape[axis])  # 1 -> n
    if stretched:
        g = g.sum(axis=stretched, keepdims=True)
    return g.astype(dtype, copy=False)


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


def gelu_and_slope(x):
    """The value y = x p of `gelu` and its derivative, p + 2 y (1 - p) du/dx."""
    a, scale = 0.044715, math.sqrt(2 / math.pi)
    square = x * x
    p = (a * scale) * square
    p += scale
    p *= x  # u
    p = array_module(x).tanh(p)
    p *= 0.5
    p += 0.5  # (1 + tanh u)/2
    y = x * p
    slope = (6 * a * scale) * square
    slope += 2 * scale  # 2 du/dx
    slope *= y
    slope *= 1 - p
    slope += p
    return y, slope


@op
def gelu(x):
    """GELU in GPT-2's form: y = x p,  p = (1 + tanh u)/2,  u = sqrt(2/pi) (x + 0.044715 x^3).  (...) -> (...)"""
    y, slope = in_pieces(gelu_and_slope, x)

    # dy_i/dx_i = p_i + x_i dp_i/dx_i
    # dp/du = (1 - tanh^2 u)/2 = 2 p (1 - p):  dp_i/dx_i = 2 p_i (1 - p_i) du_i/dx_i, and x_i p_i = y_i
    # du_i/dx_i = sqrt(2/pi) (1 + 3 * 0.044715 x_i^2)
    def vjp(g):  # keeps slope
        return (g * slope,)

    return y, vjp


# ---- sums over axes ---------------------------------------------------------------------------------------


def reduced_size(x, axis):
    """How many entries a reduction of x over `axis` (None: all) puts into one; none at all is refused."""
    axes = range(x.ndim) if axis is None else axis if isinstance(axis, tuple) else (axis,)
    if not all(-x.ndim <= i < x.ndim for i in axes):
        raise ValueError(f"nothing to reduce: shape {x.shape} has no axis {axis}")
    n = math.prod(x.shape[i] for i in axes)
    if n == 0:
        raise ValueError(f"nothing to reduce: shape {x.shape} is empty along axis {axis}")
    return n


@op
def sum(x, axis=None, keepdims=False):
    """Sum over `axis`, an integer, a tuple or None for all: y = sum_i x_i."""
    reduced_size(x, axis)
    xp, shape, total = array_module(x), x.shape, x.sum(axis=axis, keepdims=True)
    kept, y = total.shape, total if keepdims else total.squeeze(axis)

    # dy/dx_i = 1: each x_i receives the g of the sum that it went into
    def vjp(g):  # keeps nothing
        return (xp.broadcast_to(xp.reshape(g, kept), shape),)

    return y, vjp


@op
def mean(x, axis=None, keepdims=False):
    """Mean over `axis`, an integer, a tuple or None for all: y = (1/n) sum_i x_i."""
    n = reduced_size(x, axis)
    xp, shape, average = array_module(x), x.shape, x.sum(axis=axis, keepdims=True) / n
    kept, y = average.shape, average if keepdims else average.squeeze(axis)

    # dy/dx_i = 1/n
    def vjp(g):  # keeps nothing
        return (xp.broadcast_to(xp.reshape(g, kept) / n, shape),)

    return y, vjp


# ---- moving entries: each y_i is some x_j, so x_j receives the g_i of every place it went to --------------


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
    """Whether a key is an array of indices, on the host, of which each is larger than the one before."""
    if not (hasattr(key, "dtype") and key.dtype.kind in "iu" and key.ndim == 1 and on_host(key)):
        return False
    return key.size == 0 or bool(key[0] >= 0 and (key[1:] > key[:-1]).all())


@op
def getitem(x, key):
    """Indexing: y = x[key], the key all that NumPy takes."""
    xp, shape, y = array_module(x), x.shape, x[key]
    parts = key if isinstance(key, tuple) else (key,)
    once = all(part is None or part is Ellipsis or isinstance(part, int | slice) for part in parts) or ascending(key)

    # y_i = x_key(i), so gx_j is the sum of g_i over all i with key(i) = j: an index array may name one x_j
    # several times, and then gx[key] = g would keep only the last; slices and ascending indices name each once
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
    """Arrays one after another along `axis`, the other axes equal."""
    xp, likes = array_module(*arrays), [like(x) for x in arrays]
    ends = list(itertools.accumulate(x.shape[axis] for x in arrays))
    y = xp.concatenate(arrays, axis=axis)

    # the result holds each operand once, so g holds each gradient once: cut it where they were joined
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
        raise ValueError(f"gather: one index for each row of {x.shape} is wanted, {x.shape[:-1]}, not {index.shape}")
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
        raise ValueError(f"segment_sum: one segment for each entry is wanted, (M), not {x.shape} and {segment.shape}")
    y = xp.zeros(count, dtype=x.dtype)
    xp.add.at(y, segment, x)

    # dy_s/dx_i = [segment_i = s], so gx_i is the g of its segment
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
    # a row that was taken several times receives the sum
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
    y = plus(rows @ w, b).reshape(*shape[:-1], m)

    # y_ij = sum_k x_ik w_kj + b_j:  gx = g w^T, gw = x^T g as for matmul, and gb_j = sum_i g_ij
    def vjp(g):  # keeps rows, w
        g = g.reshape(N, m)  # (..., m) -> (N, m)
        return (g @ w.T).reshape(shape), rows.T @ g, unbroadcast(g, like_b)

    return y, vjp


# ---- rows as distributions, over the last axis ------------------------------------------------------------


def row_max(x):
    """The largest entry of each row: subtracted before exp, it lets nothing overflow.  (..., V) -> (..., 1)"""
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


# ---- the fused ops of a transformer -------------------------------------------------------------------


@functools.cache
def ones(xp, n, dtype):
    """A column of n ones, made once."""
    return xp.ones((n, 1), dtype=dtype)


def row_sum(x):
    """The sum of each row, as a product with ones, faster for rows as short as a model's.  (..., C) -> (..., 1)"""
    return x @ ones(array_module(x), x.shape[-1], x.dtype)


@op
def layer_norm(x, w, b, eps=1e-5):
    """Rows of mean 0 and variance 1, scaled and moved: y = w n + b,  n = (x - mean)/sqrt(var + eps).

    (..., C), (C), (C) -> (..., C)
    """
    reduced_size(x, -1)
    like_w, like_b, C = like(w), like(b), x.shape[-1]
    c = x - row_sum(x) / C
    r = (row_sum(c * c) / C + float(eps)) ** -0.5
    n = c * r
    y = plus(n * w, b)

    # y = n w + b:  gw = g n, gb = g, both summed over the rows, and gn = g w
    # n = c r with r = (var + eps)^(-1/2):  dL/dvar = -(1/2) r^3 sum_j gn_j c_j
    # var = mean(c c), so c reaches n twice:  gc_i = r gn_i + (2 c_i/C) dL/dvar = r (gn_i - n_i mean(gn n))
    # c = x - mean(x):  gx = gc - mean(gc), where mean(n) = 0 leaves mean(gc) = r mean(gn)
    def vjp(g):  # keeps n, r, w
        gn, gw = g * w, g * n
        gx = gn - row_sum(gn) / C
        gx -= n * (row_sum(gn * n) / C)
        gx *= r
        return gx, unbroadcast(gw, like_w), unbroadcast(g, like_b)

    return y, vjp


def attention(q, k, v, hidden):
    """y = p^T v, where each column of p is the softmax of a column of s = k q^T + hidden; `hidden` is -inf where a
    query must not see a key, else 0.  (..., T, D), (..., S, D), (..., S, D), (..., S, T) -> (..., T, D)

    Scores stand keys by queries, since a column's largest is found faster than a row's; p = e/total is never formed.
    """
    xp = array_module(q)
    e = k @ q.swapaxes(-1, -2)  # (..., S, D) -> (..., S, T)
    e += hidden
    e -= e.max(axis=-2, keepdims=True)
    e = xp.exp(e)
    total = row_sum(e.swapaxes(-1, -2))  # over the keys: (..., S, T) -> (..., T, 1)
    y = e.swapaxes(-1, -2) @ v / total

    # y_j = sum_i p_ij v_i with p_ij = e_ij/total_j, i and l keys, j a query; so with h = g/total:  gv = p g = e h
    # gp_ij = v_i g_j, and sum_l p_lj gp_lj = y_j g_j; as for softmax, gs_ij = p_ij (gp_ij - sum_l p_lj gp_lj):
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
def causal_attention(q, k, v, later=None):
    """Each query's weighted mean of the values up to its own place: y = softmax(q k^T/sqrt(D)) v.

    (..., T, D), (..., S, D), (..., S, D) -> (..., T, D); scores are -inf where `later`, (..., T, S), is true:
    by default the T queries are the last of the S places, and what comes after a query is later.
    """
    xp, T, S, D = array_module(q), q.shape[-2], k.shape[-2], q.shape[-1]
    if not 0 < T <= S or D == 0:
        raise ValueError(f"causal_attention: {T} queries at the last of {S} places, of size {D}, cannot be")
    later = xp.arange(S) > xp.arange(S - T, S)[:, None] if later is None else later  # (T, S)
    hidden = xp.where(later.swapaxes(-1, -2), -math.inf, 0.0)  # (T, S) -> (S, T)
    scale = D**-0.5
    y, attention_vjp = attention(q * scale, k, v, hidden)

    # y = attention(scaled, k, v) with scaled = q scale:  gq = g_scaled scale
    def vjp(g):  # keeps q, k, v, e, total, y
        gq, gk, gv = attention_vjp(g)
        return gq * scale, gk, gv

    return y, vjp


@op
def block_attention(qkv, blocks):
    """Causal attention among rows that belong together.  (N, 3, H, D), blocks -> (N, H, D)

    Row n holds the query, key and value of one token. A block (queries, keys, count, hidden) is two slices of rows,
    each of `count` texts of one length, and an array, (S, T), that is -inf where a key is not seen by a query,
    else 0. No two blocks share a query; what is in no block gets 0.
    """
    xp, (N, _, H, D) = array_module(qkv), qkv.shape
    scaled, y, vjps = qkv[:, 0] * D**-0.5, xp.zeros((N, H, D), dtype=qkv.dtype), []

    def heads(rows, count):
        return rows.reshape(count, -1, H, D).swapaxes(1, 2)  # (count T, H, D) -> (count, H, T, D), a view

    for queries, keys, count, hidden in blocks:
        q, k, v = heads(scaled[queries], count), heads(qkv[keys, 1], count), heads(qkv[keys, 2], count)
        part, vjp_part = attention(q, k, v, hidden)
        heads(y[queries], count)[...] = part
        vjps.append(vjp_part)

    # gq = g_scaled D^(-1/2); a row may be a key of several blocks, whose gradients add up
    def vjp(g):  # keeps q, k, v, e, total, y
        gqkv = xp.zeros((N, 3, H, D), dtype=g.dtype)
        for (queries, keys, count, _), vjp_part in zip(blocks, vjps):
            for i, (rows, part) in enumerate(zip((queries, keys, keys), vjp_part(heads(g[queries], count)))):
                into = heads(gqkv[rows, i], count)
                into += part
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
