# %% [markdown]
# # 03. log_softmax, gather and logsigmoid by hand
#
# **Question.** Three functions lead from a model's logits to the DPO loss. Why does the obvious way to write each fail?
#
# **Afterwards you can say**
# - for which inputs each formula fails, and with what: nan, -inf or a silent 0;
# - why subtracting the row's maximum repairs log_softmax, and -expm1 the slope of logsigmoid;
# - the vjp of each, derived.
#
# **Predict first.** In float32, at z = 17, what does 1 - sigma(z) give, computed as `1 - 1 / (1 + exp(-z))`, and what
# is the right value, to one digit?
#
# **The formula.** V logits x_j a row; g = dL/dy comes in, gx = dL/dx goes out.
#
#     log_softmax   y_j = log(e^x_j / sum_k e^x_k)      (..., V) -> (..., V)   log-probabilities of the next token
#     gather        y_i = x[i, index_i]                 (..., V), integers (...) -> (...)   of the token that came
#     logsigmoid    y = log(1/(1 + e^-z))               (...) -> (...)         the loss is minus this

# %%
import math

import numpy as np

from minidpo import Tensor, gradcheck, ops

rng = np.random.default_rng(0)

# %% [markdown]
# ## log_softmax: the formula, and where it breaks


# %%
def log_softmax_naive(x):
    return np.log(np.exp(x) / np.exp(x).sum(axis=-1, keepdims=True))


cases = {"[0, 1]": [0.0, 1.0], "[0, 1000]": [0.0, 1000.0], "[0, -800]": [0.0, -800.0]}
with np.errstate(all="ignore"):
    naive = {name: log_softmax_naive(np.array(x)) for name, x in cases.items()}
    assert np.isinf(np.exp([709.0, 710.0])).tolist() == [False, True]
    assert (np.exp([-745.0, -746.0]) == 0).tolist() == [False, True]

# %% [markdown]
# e^1000 is too large for float64 (e^709 is not, e^710 is): inf/inf is nan. e^-800 is too small (e^-745 is not, e^-746
# is): log 0 is -inf, where -800 is right. The cure: a constant c added to all logits of a row multiplies numerator and
# denominator by e^c and changes nothing, so choose c = -max. Then every exponential is at most 1 and one of them is 1:
# the sum lies between 1 and V; it does not overflow, and its log is finite. And log(e^a/s) = a - log s.
#
# The derivative, with [i = j] = 1 if i = j, else 0, and p_j = e^y_j:
#
#     dy_i/dx_j = [i = j] - p_j,     gx_j = sum_i g_i dy_i/dx_j = g_j - p_j sum_i g_i
#
# gx sums to 0 over j, for every g: a row's logits can be moved by a constant for nothing.


# %%
def log_softmax(x):
    shifted = x - x.max(axis=-1, keepdims=True)
    y = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))

    def vjp(g):  # keeps y
        return (g - np.exp(y) * g.sum(axis=-1, keepdims=True),)

    return y, vjp


print("log_softmax of       naive                stable")
for name, x in cases.items():
    y = log_softmax(np.array(x))[0]
    print(f"  {name:<12}" + "{:9.4g} {:9.4g}  {:9.4g} {:9.4g}".format(*naive[name], *y))
np.testing.assert_allclose(naive["[0, 1]"], log_softmax(np.array([0.0, 1.0]))[0], rtol=1e-12)
assert np.isnan(naive["[0, 1000]"][1]) and naive["[0, -800]"][1] == -math.inf
np.testing.assert_array_equal(log_softmax(np.array([0.0, -800.0]))[0], [0, -800])

# %% [markdown]
# ## The library's version
# The check, for this vjp and those that follow: with random g and u, <g, J u> = <vjp(g), u>, J u a central difference
# (tutorial 02). Then the library's op must return the same values and the same gradient.


# %%
def check(raw_op, library_op, x, *rest):
    g, u, h = rng.normal(size=raw_op(x, *rest)[0].shape), rng.normal(size=x.shape), 1e-6
    y, vjp = raw_op(x, *rest)
    ju = (raw_op(x + h * u, *rest)[0] - raw_op(x - h * u, *rest)[0]) / (2 * h)
    np.testing.assert_allclose((vjp(g)[0] * u).sum(), (g * ju).sum(), rtol=1e-6, atol=1e-8)
    their_y, their_vjp = library_op.raw(x, *rest)
    np.testing.assert_allclose(y, their_y, rtol=1e-12, atol=1e-14)
    np.testing.assert_allclose(vjp(g)[0], their_vjp(g)[0], rtol=1e-12, atol=1e-14)
    gradcheck.check_vjp(library_op, x, *rest, rng=rng, method="complex")
    return vjp(g)[0]


gx = check(log_softmax, ops.log_softmax, rng.normal(size=(4, 5)))
np.testing.assert_allclose(gx.sum(axis=-1), 0, atol=1e-12)

# %% [markdown]
# ## gather: two naive attempts
# `x[:, index]` takes the columns that `index` names from *every* row: (B, V) -> (B, B), without an error. A product
# with a one-hot row picks the right entry, but a token that cannot occur has log-probability -inf, and 0 * -inf is nan.
# `x[arange(B), index]` pairs rows with columns. Its derivative moves g to where y came from:
#
#     dy_i/dx_ij = [j = index_i],     gx_ij = g_i [j = index_i]


# %%
def gather(x, index):  # (B, V), integers (B) -> (B)
    rows, shape = np.arange(len(x)), x.shape
    y = x[rows, index]

    def vjp(g):  # keeps rows, index
        gx = np.zeros(shape)
        gx[rows, index] = g  # each place is named once
        return (gx, None)  # an integer has no derivative

    return y, vjp


logits = np.array([[3.0, 0.5, 0.2], [0.1, 4.0, 1.0]])
tokens = np.array([0, 1])
logp = gather(log_softmax(logits)[0], tokens)[0]
print(f"\ntwo tokens: log-probabilities {logp.round(3)}, their sum {logp.sum():.3f}")
assert logits[:, tokens].shape == (2, 2)
impossible = log_softmax(np.array([[0.0, 0.0, -math.inf]]))[0]
with np.errstate(invalid="ignore"):
    assert np.isnan((np.eye(3)[[0]] * impossible).sum())
np.testing.assert_allclose(gather(impossible, np.array([0]))[0], -math.log(2), rtol=1e-12)
check(gather, ops.gather, rng.normal(size=(4, 5)), np.array([0, 4, 2, 2]))

# %% [markdown]
# Together they are the loss of pre-training: the gradient of -log p_index in the logits is p - onehot(index).

# %%
x = Tensor(logits, requires_grad=True)
(-ops.sum(ops.gather(ops.log_softmax(x), tokens))).backward()
np.testing.assert_allclose(x.grad, np.exp(log_softmax(logits)[0]) - np.eye(3)[tokens], rtol=1e-12, atol=1e-14)

# %% [markdown]
# ## logsigmoid: three ways to break
# - z = -800: e^800 is inf, 1/inf is 0, log 0 is -inf; -800 is right. The chain rule through exp, division and log is
#   worse: it gives nan, in the pair on which the model is most wrong.
# - z = 40: 1 + e^-40 rounds to 1, so the value is 0 instead of -e^-40.
# - the slope 1 - sigma(z), for the same reason: where sigma(z) rounds to 1, it is 0.
#
# The cure for the value: let the exponential be of -|z|, so that it is at most 1, and add it to 1 inside `log1p`, which
# returns log(1 + a) without rounding 1 + a:
#
#     z >= 0:  log sigma(z) =   - log(1 + e^-z)
#     z <  0:  log sigma(z) = z - log(1 + e^z)       (multiply numerator and denominator of 1/(1 + e^-z) by e^z)
#
# For the slope: dy/dz = sigma'(z)/sigma(z) = 1 - sigma(z) = 1 - e^y = -expm1(y); `expm1` returns e^y - 1 without
# rounding e^y.


# %%
def logsigmoid_naive(z):
    return np.log(1 / (1 + np.exp(-z)))


def logsigmoid(z):
    y = np.minimum(z, 0) - np.log1p(np.exp(-np.abs(z)))

    def vjp(g):  # keeps y
        return (g * -np.expm1(y),)

    return y, vjp


z = np.array([-800.0, -1.7, 17.0, 40.0])
y, vjp = logsigmoid(z)
with np.errstate(all="ignore"):
    columns = z, logsigmoid_naive(z), y, 1 - 1 / (1 + np.exp(-z)), vjp(np.ones_like(z))[0]
    composed = Tensor(z, requires_grad=True)
    ops.log(1 / (1 + ops.exp(-composed))).backward(np.ones_like(z))
print("\nlogsigmoid and its slope in float64\n     z        naive       stable   1 - sigma    -expm1(y)")
for row in zip(*columns):
    print("{:6.1f} {:12.4g} {:12.4g} {:11.4g} {:12.4g}".format(*row))
assert columns[1][0] == -math.inf and y[0] == -800 and np.isnan(composed.grad[0])
assert columns[1][3] == 0 and columns[3][3] == 0
np.testing.assert_allclose([y[3], columns[4][3]], [-math.exp(-40), math.exp(-40)], rtol=1e-12)
check(logsigmoid, ops.logsigmoid, rng.normal(size=(4, 5)))
np.testing.assert_allclose(y, log_softmax(np.stack([z, 0 * z], axis=-1))[0][:, 0], rtol=1e-12, atol=1e-16)

# %% [markdown]
# The last line: e^z/(e^z + e^0) = sigma(z), so logsigmoid is the first entry of log_softmax on the logits z and 0.
# Only the tail differs: log_softmax takes log, not log1p, and returns 0 at z = 40; hence `atol`.
#
# ## The answer to the prediction
# 1 - sigma(17) is 0 in float32; the right value is 4e-8. In float32 1 + e^-z rounds to 1 once e^-z <= 2^-24, that is
# from z = 24 log 2 = 16.64 on; in float64 from z = 53 log 2 = 36.74 on.

# %%
seventeen = np.float32(17)
slope = logsigmoid(seventeen)[1](np.float32(1))[0]
lost = 1 - 1 / (1 + np.exp(-seventeen))
print(f"\nfloat32, z = 17: 1 - sigma gives {lost:.1f}, -expm1(y) gives {slope:.1e}")
assert lost == 0 and slope.dtype == lost.dtype == np.float32
np.testing.assert_allclose(slope, 1 / (1 + math.exp(17)), rtol=1e-5)
for dtype, bits in ((np.float32, 24), (np.float64, 53)):
    edge = bits * math.log(2)
    assert round(edge, 2) in (16.64, 36.74)
    below, above = (dtype(1) + np.exp(-dtype(edge + shift)) for shift in (-0.01, 0.01))
    assert below > 1 == above

# %% [markdown]
# ## What was shown
# The obvious forms are right on paper and fail in floating point: exponentials leave the range, 1 + a loses a small
# a, 0 * -inf is nan. Subtract the maximum; use log1p and expm1; select, do not multiply. The vjps need only y, or the
# index.
#
# ## Exercises
# 1. A chosen and a rejected response differ in the token after the same prompt, so both read the same row of logits x.
#    Derive the gradient of -(y_w - y_l) in x, with y = log_softmax(x). What has become of p?
# 2. Find the bug: `x.max()` is subtracted instead of `x.max(axis=-1, keepdims=True)`. For which rows does that fail?

# %%
for raw_op, library_op in ((log_softmax, ops.log_softmax), (logsigmoid, ops.logsigmoid)):
    extreme = np.array([[0.0, 1000.0], [-800.0, 40.0]])
    assert np.isfinite(raw_op(extreme)[0]).all()
    np.testing.assert_allclose(raw_op(extreme)[0], library_op(extreme).data, rtol=1e-12, atol=0)
np.testing.assert_allclose(logp, [-0.134, -0.068], atol=5e-4)
np.testing.assert_allclose(logp.sum(), -0.201, atol=5e-4)
print("03: the stable forms are finite where the formulas fail, and agree with finite differences and with the library")

# %% [markdown]
# ## Solutions
# 1. g = onehot(l) - onehot(w) sums to 0, so gx = g - p * 0 = onehot(l) - onehot(w): p has cancelled. No other
#    logit of the row is pushed. (DPO multiplies this by beta sigma(-z), z being that of the two whole responses.)
# 2. For a row that lies more than about 708 below the largest entry of the array: its exponentials lose digits, and
#    from about 745 on all become 0, and minus log 0 is inf. Two logits of one row may differ by as much without harm.

# %%
x = Tensor(rng.normal(size=5), requires_grad=True)
y = ops.log_softmax(x)
(-(y[3] - y[1])).backward()
np.testing.assert_allclose(x.grad, np.eye(5)[1] - np.eye(5)[3], atol=1e-15)
far = np.array([[0.0, 1.0], [-1000.0, -1001.0]])
with np.errstate(divide="ignore"):
    wrong = far - far.max() - np.log(np.exp(far - far.max()).sum(axis=-1, keepdims=True))
assert not np.isfinite(wrong[1]).any() and np.isfinite(log_softmax(far)[0]).all()
