# %% [markdown]
# # 03. log_softmax, gather and logsigmoid by hand
#
# **Question.** Three functions lead from a model's logits to the DPO loss. Why does the obvious way to write each fail?
#
# A language model reads a text one token at a time; here a token is one character. After each token it gives V numbers,
# the logits: one for each of the V tokens that may come next. The larger the logit, the likelier the token.
#
# **Afterwards you can say**
# - for which inputs each formula fails, and what it then returns: nan, -inf or a silent 0;
# - why subtracting the row's maximum repairs log_softmax, and why -expm1 repairs the slope of logsigmoid;
# - how to derive the vjp of each, line by line.
#
# **Predict first.** In float32, at z = 17, what is 1 - sigma(z) when it is computed as `1 - 1 / (1 + exp(-z))`? And
# what is the exact value, to one digit?
#
# **The formula.** A row x holds V logits x_j. As in tutorial 02, x goes into a function and y comes out; g = dL/dy goes
# into its vjp and gx = dL/dx comes out. (From 04 on, x is a prompt and y a response.)
#
#     log_softmax   y_j = log(e^x_j / sum_k e^x_k)   (..., V) -> (..., V)               log-probability of each token
#     gather        y_i = x[i, index_i]              (..., V), integers (...) -> (...)  in each row, the one that came
#     logsigmoid    y = log(1/(1 + e^-z))            (...) -> (...)                     minus this is the loss of a pair

# %%
import decimal
import math
import pathlib

import numpy as np

from minidpo import Tensor, gradcheck, ops, plots

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
# e^1000 is too large for float64 (e^709 still fits, e^710 does not). It becomes inf. Then 1/inf is 0 with log -inf,
# where -1000 is correct, and inf/inf is nan. e^-800 is too small (e^-745 still fits, e^-746 does not). It becomes 0,
# with log -inf, where -800 is correct.
#
# The cure: adding one constant to a whole row multiplies numerator and denominator by the same factor, so it changes
# nothing. Choose minus the row's maximum as the constant. Then every exponential is at most 1, and one of them is 1. So
# their sum lies between 1 and V: it cannot overflow, and its log is finite. What remains is
# log(e^a/total) = a - log(total), which needs no exponential of a.
#
# ## log_softmax: the vjp, line by line
# Write total = sum_k e^x_k. [i = j] is 1 if i = j, else 0. To the right is the reason for each line.
#
#     1   y_i = log(e^x_i/total) = x_i - log total           log(a/b) = log a - log b
#     2   dx_i/dx_j = [i = j]                                each logit is a variable of its own
#     3   d total/dx_j = e^x_j                               only the term k = j of the sum contains x_j
#     4   d(log total)/dx_j = (1/total) e^x_j = e^y_j        chain rule, then line 1: e^y_j = e^x_j/total
#     5   dy_i/dx_j = [i = j] - e^y_j                        line 2 minus line 4: the local Jacobian
#     6   gx_j = sum_i g_i dy_i/dx_j                         what a vjp is (tutorial 02)
#     7        = sum_i g_i [i = j] - e^y_j sum_i g_i         line 5; e^y_j is the same for every i
#     8        = g_j - e^y_j sum_i g_i                       only i = j is left of the first sum
#
# e^y_j is the softmax p_j. The cell checks the lines on one row. `jacobian` differentiates by the complex step of
# tutorial 02.


# %%
def jacobian(f, x):  # df_i/dx_j, exact to rounding
    return np.stack([f(x + 1e-20j * column).imag / 1e-20 for column in np.eye(len(x))], axis=-1)


x, g = rng.normal(size=5), rng.normal(size=5)
total, y, same = np.exp(x).sum(), log_softmax_naive(x), np.eye(5)
lines = {
    "1": (y, x - np.log(total)),
    "2": (jacobian(lambda x: x, x), same),
    "3": (jacobian(lambda x: np.exp(x).sum(keepdims=True), x)[0], np.exp(x)),
    "4": (jacobian(lambda x: np.log(np.exp(x).sum(keepdims=True)), x)[0], np.exp(y)),
    "5": (jacobian(log_softmax_naive, x), same - np.exp(y)),  # row i, column j
    "6": (g @ jacobian(log_softmax_naive, x), g @ (same - np.exp(y))),
    "7": (g @ (same - np.exp(y)), g @ same - np.exp(y) * g.sum()),
    "8": (g @ same - np.exp(y) * g.sum(), g - np.exp(y) * g.sum()),
}
for number, (left, right) in lines.items():
    np.testing.assert_allclose(left, right, rtol=1e-12, atol=1e-14, err_msg=f"line {number}")
print(f"log_softmax: lines {', '.join(lines)} of the derivation hold")

# %% [markdown]
# For every g, gx sums to 0 over j, because adding one constant to a whole row changes nothing. The stable form keeps y
# and needs nothing else. This is what the two forms return:
#
#     log_softmax of      naive                stable
#     [0, 1]            -1.313   -0.3133     -1.313   -0.3133
#     [0, 1000]           -inf       nan      -1000         0
#     [0, -800]              0      -inf          0      -800


# %%
def log_softmax(x):
    shifted = x - x.max(axis=-1, keepdims=True)
    y = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))

    def vjp(g):  # keeps y
        return (g - np.exp(y) * g.sum(axis=-1, keepdims=True),)

    return y, vjp


print("\nlog_softmax of       naive                stable")
cells = []
for name, x in cases.items():
    cells.append([f"{number:.4g}" for number in (*naive[name], *log_softmax(np.array(x))[0])])
    print(f"  {name:<12}" + "{:>9} {:>9}  {:>9} {:>9}".format(*cells[-1]))
assert cells[0] == ["-1.313", "-0.3133"] * 2
assert cells[1:] == [["-inf", "nan", "-1000", "0"], ["0", "-inf", "0", "-800"]]
np.testing.assert_allclose(naive["[0, 1]"], log_softmax(np.array([0.0, 1.0]))[0], rtol=1e-12)
assert np.isnan(naive["[0, 1000]"][1]) and naive["[0, -800]"][1] == -math.inf
np.testing.assert_array_equal(log_softmax(np.array([0.0, -800.0]))[0], [0, -800])

# %% [markdown]
# ## The library's version
# `check` serves this vjp and those that follow. With random g and u it tests `<g, J u> = <vjp(g), u>`, where J u is a
# central difference (tutorial 02). Then the library's op must return the same values and the same gradient.


# %%
def check(raw_op, library_op, x, *rest):
    g, u, eps = rng.normal(size=raw_op(x, *rest)[0].shape), rng.normal(size=x.shape), 1e-6
    y, vjp = raw_op(x, *rest)
    ju = (raw_op(x + eps * u, *rest)[0] - raw_op(x - eps * u, *rest)[0]) / (2 * eps)
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
# `x[:, index]` takes the columns that `index` names from *every* row: with B rows, (B, V) -> (B, B), without an error.
# Multiplying by a one-hot row and summing picks the correct entry, until a token cannot occur: its log-probability is
# -inf, and 0 * -inf is nan. `x[arange(B), index]` pairs each row with its column.
#
# The vjp, line by line. Two letters for rows, i and k, and j for columns:
#
#     1   y_i = x[i, index_i] = sum_j [j = index_i] x_ij     one term of the sum is not 0
#     2   dy_i/dx_kj = [k = i] [j = index_i]                 y_i contains one entry of row i, with factor 1
#     3   gx_kj = sum_i g_i dy_i/dx_kj = g_k [j = index_k]   only i = k is left of the sum
#
# In words: put g_k back into the place that was read, and 0 everywhere else.


# %%
def gather(x, index):  # (B, V), integers (B) -> (B)
    rows, shape = np.arange(len(x)), x.shape
    y = x[rows, index]

    def vjp(g):  # keeps rows, index
        gx = np.zeros(shape)
        gx[rows, index] = g  # no place is named twice, so nothing has to be added
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
index = np.array([0, 4, 2, 2])
onehot = np.eye(5)[index]  # (4, 5): [j = index_i]
x, g = rng.normal(size=(4, 5)), rng.normal(size=4)
np.testing.assert_array_equal((onehot * x).sum(axis=-1), gather(x, index)[0])  # line 1
of_flat = jacobian(lambda flat: flat.reshape(4, 5)[np.arange(4), index], x.ravel()).reshape(4, 4, 5)  # i, k, j
np.testing.assert_allclose(of_flat, np.eye(4)[:, :, None] * onehot[:, None, :], rtol=1e-12)  # line 2
np.testing.assert_allclose(np.einsum("i,ikj->kj", g, of_flat), gather(x, index)[1](g)[0], rtol=1e-12)  # line 3
check(gather, ops.gather, x, index)

# %% [markdown]
# In pre-training a model learns to predict the next token of a text. log_softmax followed by gather, with a minus sign,
# is its loss for one token; tutorial 05 takes the mean. The gradient with respect to the logits is p - onehot(index).
# Here p is the softmax of the logits, and onehot(index) is 1 at the token that came and 0 elsewhere.

# %%
x = Tensor(logits, requires_grad=True)
(-ops.sum(ops.gather(ops.log_softmax(x), tokens))).backward()
np.testing.assert_allclose(x.grad, np.exp(log_softmax(logits)[0]) - np.eye(3)[tokens], rtol=1e-12, atol=1e-14)

# %% [markdown]
# ## logsigmoid: three ways to break
# - At z = -800, e^800 is inf, 1/inf is 0 and log 0 is -inf, where -800 is correct. The gradient by the chain rule
#   through exp, division and log is worse: it is nan, on the very pair on which the model is most wrong.
# - At z = 40, 1 + e^-40 rounds to 1, so the value is 0 instead of -e^-40.
# - The slope 1 - sigma(z) breaks for the same reason: it is 0 wherever sigma(z) rounds to 1.
#
# The cure for the value: take the exponential of -|z|, which is at most 1. Then let `log1p` add it to 1; `log1p(a)`
# returns log(1 + a) without rounding 1 + a.
#
#     z >= 0:  log sigma(z) =   - log(1 + e^-z)
#     z <  0:  log sigma(z) = z - log(1 + e^z)       (multiply numerator and denominator of 1/(1 + e^-z) by e^z)
#
# The cure for the slope comes out of its derivation:
#
#     1   y = log sigma(z),   sigma(z) = 1/(1 + e^-z)        definition, so e^y = sigma(z)
#     2   dy/dz = sigma'(z)/sigma(z)                         chain rule: d(log a) = da/a
#     3   sigma'(z) = e^-z/(1 + e^-z)^2                      d(1/a) = -da/a^2, with a = 1 + e^-z and da/dz = -e^-z
#     4   e^-z/(1 + e^-z) = 1 - sigma(z)                     the fraction and 1/(1 + e^-z) add up to 1
#     5   dy/dz = 1 - sigma(z)                               lines 3 and 4 in line 2: one factor sigma(z) cancels
#     6         = 1 - e^y = -expm1(y)                        line 1; `expm1(y)` returns e^y - 1 without rounding e^y
#     7   gz = -g expm1(y)                                   each z has its own y, so the sum over i has one term
#
# Both forms of the value and of the slope, in float64:
#
#     z          naive         stable      1 - sigma(z)    -expm1(y)
#     -800        -inf           -800           1               1
#     -1.7      -1.868         -1.868      0.8455          0.8455
#     17     -4.14e-08      -4.14e-08    4.14e-08        4.14e-08
#     40             0     -4.248e-18           0       4.248e-18


# %%
def logsigmoid_naive(z):
    return np.log(1 / (1 + np.exp(-z)))


def logsigmoid(z):
    y = np.minimum(z, 0) - np.log1p(np.exp(-np.abs(z)))

    def vjp(g):  # keeps y
        return (g * -np.expm1(y),)

    return y, vjp


z, g = rng.normal(size=4), rng.normal(size=4)
sigma, (y, vjp) = 1 / (1 + np.exp(-z)), logsigmoid(z)
of_sigma, of_y = (jacobian(f, z) for f in (lambda z: 1 / (1 + np.exp(-z)), logsigmoid_naive))  # (4, 4)
np.testing.assert_allclose(y, np.log(sigma), rtol=1e-12)  # line 1
np.testing.assert_allclose(of_y.diagonal(), of_sigma.diagonal() / sigma, rtol=1e-12)  # line 2
np.testing.assert_allclose(of_sigma.diagonal(), np.exp(-z) * sigma**2, rtol=1e-12)  # line 3
np.testing.assert_allclose(np.exp(-z) * sigma, 1 - sigma, rtol=1e-12)  # line 4
np.testing.assert_allclose(of_y, np.diag(1 - sigma), rtol=1e-12, atol=0)  # line 5
np.testing.assert_allclose(1 - sigma, -np.expm1(y), rtol=1e-12)  # line 6
np.testing.assert_allclose(g @ of_y, vjp(g)[0], rtol=1e-12)  # line 7

z = np.array([-800.0, -1.7, 17.0, 40.0])
y, vjp = logsigmoid(z)
with np.errstate(all="ignore"):
    columns = z, logsigmoid_naive(z), y, 1 - 1 / (1 + np.exp(-z)), vjp(np.ones_like(z))[0]
    composed = Tensor(z, requires_grad=True)
    ops.log(1 / (1 + ops.exp(-composed))).backward(np.ones_like(z))
print("\nlogsigmoid and its slope in float64\n     z        naive       stable   1 - sigma    -expm1(y)")
cells = [[f"{number:.4g}" for number in row] for row in zip(*columns)]
for row in cells:
    print("{:>6} {:>12} {:>12} {:>11} {:>12}".format(*row))
assert cells[0] == ["-800", "-inf", "-800", "1", "1"] and cells[1] == ["-1.7", *["-1.868"] * 2, *["0.8455"] * 2]
assert cells[2] == ["17", *["-4.14e-08"] * 2, *["4.14e-08"] * 2]
assert cells[3] == ["40", "0", "-4.248e-18", "0", "4.248e-18"]
assert columns[1][0] == -math.inf and y[0] == -800 and np.isnan(composed.grad[0])
assert columns[1][3] == 0 and columns[3][3] == 0
np.testing.assert_allclose([y[3], columns[4][3]], [-math.exp(-40), math.exp(-40)], rtol=1e-12)
check(logsigmoid, ops.logsigmoid, rng.normal(size=(4, 5)))
np.testing.assert_allclose(y, log_softmax(np.stack([z, 0 * z], axis=-1))[0][:, 0], rtol=1e-12, atol=1e-16)

# %% [markdown]
# The last line uses e^z/(e^z + e^0) = sigma(z): logsigmoid is the first entry of log_softmax on the two logits z and 0.
# The two programs differ where z is large. At z = 40, log_softmax adds e^-40 to 1, gets 1, and returns log 1 = 0, where
# log1p keeps the e^-40; hence `atol`.
#
# ## The answer to the prediction
# In float32 it is 0; the exact value is about 4e-8. In float32, 1 + e^-z rounds to 1 once e^-z <= 2^-24, that is from
# z = 24 log 2 = 16.64 on. In float64 this happens from z = 53 log 2 = 36.74 on.
#
# The picture counts the correct digits of log sigma(z); the naive form is dashed. On the left, it is correct until e^-z
# becomes inf: below -88.7 in float32 and below -709.8 in float64 it returns -inf. On the right it loses its digits
# gradually, one for every 2.3 by which z rises (log 10 = 2.3), until it returns 0. The stable form is correct to the
# last digit or nearly so, on both sides.

# %%
seventeen = np.float32(17)
slope = logsigmoid(seventeen)[1](np.float32(1))[0]
naive_slope = 1 - 1 / (1 + np.exp(-seventeen))
print(f"\nfloat32, z = 17: 1 - sigma gives {naive_slope:.1f}, -expm1(y) gives {slope:.1e}")
assert naive_slope == 0 and slope.dtype == naive_slope.dtype == np.float32
np.testing.assert_allclose(slope, 1 / (1 + math.exp(17)), rtol=1e-5)
for dtype, bits in ((np.float32, 24), (np.float64, 53)):
    edge = bits * math.log(2)
    assert round(edge, 2) in (16.64, 36.74)
    below, above = (dtype(1) + np.exp(-dtype(edge + shift)) for shift in (-0.01, 0.01))
    assert below > 1 == above


def digits(values, z):
    """Correct decimal digits of each value of log sigma(z), up to as many as its dtype has; -inf has none."""
    most = np.finfo(values.dtype).eps / 2  # the relative error of a correctly rounded number is at most this
    with decimal.localcontext(prec=60):
        exact = [-(1 + (-decimal.Decimal(float(each))).exp()).ln() for each in z]
        errors = [float(abs(decimal.Decimal(float(value)) / truth - 1)) for value, truth in zip(values, exact)]
    return -np.log10(np.clip(errors, most, 1))


kept = {}  # the fewest correct digits near each z
sides = np.linspace(-800, -4, 200), np.linspace(0, 44, 89)
for side, centres in enumerate(sides):
    for dtype in (np.float32, np.float64):
        z = (centres[:, None] + (centres[1] - centres[0]) * np.linspace(-0.5, 0.5, 6)).ravel().astype(dtype)
        for name, form in (("naive", logsigmoid_naive), ("stable", lambda z: logsigmoid(z)[0])):
            with np.errstate(over="ignore", divide="ignore"):
                kept[name, dtype.__name__, side] = digits(form(z), z).reshape(-1, 6).min(axis=1)
for dtype, lowest, most, zero in (("float32", -88.7, 7, 16.64), ("float64", -709.8, 15.7, 36.74)):
    np.testing.assert_allclose(np.log(float(np.finfo(dtype).max)), -lowest, atol=0.05)  # where e^-z becomes inf
    left, right = (kept["naive", dtype, side] for side in (0, 1))
    assert min(kept["stable", dtype, side].min() for side in (0, 1)) > most - 1
    assert (left[sides[0] < lowest - 4] == 0).all() and left[sides[0] > lowest + 4].min() > most - 1.5
    assert (right[sides[1] > zero + 0.5] == 0).all() and right[sides[1] < zero - 3].min() > 0.5
    halfway = np.argmin(abs(sides[1] - zero / 2))
    np.testing.assert_allclose(right[halfway], (zero - sides[1][halfway]) / math.log(10), atol=1)


def draw(path):
    blue, orange = plots.PALETTE[:2]
    with plots.figure(path, (6.4, 5.2), {"font.size": 12}) as figure:
        axes = figure.subplots(1, 2, sharey=True)
        for (name, dtype, side), each in kept.items():
            color, alpha = blue if dtype == "float64" else orange, 0.35 if name == "stable" else 1
            style, width = ("-", 7) if name == "stable" else ((0, (3, 1.5)), 2)
            axes[side].plot(sides[side], each, color=color, alpha=alpha, linestyle=style, linewidth=width)
        for side, z, height, text, color in (
            (0, -690, 11, "naive: -inf\nbelow -709.8", blue), (0, -620, 3, "naive: -inf\nbelow -88.7", orange),
            (0, -690, 16.5, "stable, float64", blue), (0, -690, 7.8, "stable, float32", orange),
            (1, 20, 0.4, "naive: 0\nfrom 36.7", blue), (1, 0.3, 0.4, "naive: 0\nfrom 16.6", orange),
            (1, 20, 10, "each naive form\nloses a digit for\nevery 2.3 of z", "black"),
        ):  # fmt: skip
            axes[side].text(z, height, text, color=color)
        axes[0].set(title="z below 0", xlabel="z", ylabel="correct digits of log sigma(z)", ylim=(-0.3, 17.5))
        axes[1].set(title="z above 0", xlabel="z", yticks=range(0, 17, 4))


path = pathlib.Path("03_log_softmax.png")
if plots.installed():
    draw(path)
print(f"picture: {path.name}" if plots.installed() else "the picture needs matplotlib (the `plot` extra)")

# %% [markdown]
# ## What was shown
# The obvious forms are correct on paper and fail in floating point: exponentials leave the range, 1 + a loses a small
# a, 0 * -inf is nan. So subtract the maximum; use log1p and expm1; select, do not multiply by 0 and 1. The vjps keep
# only y, or only the index.
#
# ## Exercises
# 1. A chosen and a rejected response follow the same prompt and differ in their first token. Here w and l are these
#    tokens; both are read from one row of logits x. Derive the gradient of -(y_w - y_l) with respect to x, where
#    y = log_softmax(x). What has become of p?
# 2. Find the bug: `x.max()` is subtracted instead of `x.max(axis=-1, keepdims=True)`. For which rows does that fail?
# 3. Predict, then measure: in float32, add 100,000,000 to both logits of the row (0, 1). On paper that changes nothing.
#    What does the stable form return, and where did the difference go?

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
# 1. g = onehot(l) - onehot(w) sums to 0, so gx = g - p * 0 = onehot(l) - onehot(w): p has cancelled, and no other logit
#    of the row is pushed. (DPO multiplies this by beta sigma(-z), where z = beta * margin of the two whole responses.)
# 2. It fails for a row that lies more than about 708 below the largest entry of the array. There its exponentials lose
#    digits. From about 745 on all of them are 0, and minus log 0 is inf. Within one row such a distance does no harm.
# 3. It returns -log 2 twice: the two logits have become equal. Near 10^8, neighbouring float32 numbers are 8 apart, so
#    the 1 was rounded away when the constant was added. No later step can bring it back. A stable form protects from
#    what it does itself, not from what its input has lost.

# %%
x = Tensor(rng.normal(size=5), requires_grad=True)
y = ops.log_softmax(x)
(-(y[3] - y[1])).backward()
np.testing.assert_allclose(x.grad, np.eye(5)[1] - np.eye(5)[3], atol=1e-15)
far = np.array([[0.0, 1.0], [-1000.0, -1001.0]])
with np.errstate(divide="ignore"):
    wrong = far - far.max() - np.log(np.exp(far - far.max()).sum(axis=-1, keepdims=True))
assert not np.isfinite(wrong[1]).any() and np.isfinite(log_softmax(far)[0]).all()

row = np.array([0, 1], dtype="float32")
raised = row + np.float32(1e8)
assert raised.dtype == np.float32 and np.spacing(raised[0]) == 8
np.testing.assert_allclose(log_softmax(raised)[0], -math.log(2), rtol=1e-6)
np.testing.assert_allclose(log_softmax(row)[0], [-1.313, -0.313], atol=5e-4)
