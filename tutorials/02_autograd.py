# %% [markdown]
# # 02. Reverse-mode autograd
#
# **Question.** How does a program find the derivative of one number in everything that it was made of, and how do you
# know that the derivative is right?
#
# **Afterwards you can say**
# - what g and a vjp are, and how to read `(y, vjp)`;
# - why the gradients of a value that is used twice are added, and in which order the sweep goes;
# - how a derivative is checked, and three ways in which a check lies.
#
# **Predict first.** Someone replaces the vjp of softmax by one that returns zeros. A test computes the gradient of
# `softmax(x).sum()` and compares it with finite differences. Does it notice?
#
# **The formula.** L is one number, y = f(x) an array on the way to it, g = dL/dy the cotangent of y.
#
#     gx_j = dL/dx_j = sum_i g_i dy_i/dx_j            vjp(g) returns gx: a "vector-Jacobian product"

# %%
import numpy as np

from minidpo import Tensor, gradcheck, ops

tape = []  # every node in the order of creation: parents come before what is made of them


class Node:
    def __init__(self, data, parents=(), vjp=None):
        self.data, self.parents, self.vjp = np.asarray(data, dtype=float), parents, vjp
        tape.append(self)


def op(function):
    def lifted(*nodes):
        y, vjp = function(*[node.data for node in nodes])
        return Node(y, nodes, vjp)

    return lifted


@op
def add(x, y):  # dz_i/dx_i = dz_i/dy_i = 1
    return x + y, lambda g: (g, g)


@op
def mul(x, y):  # dz_i/dx_i = y_i, dz_i/dy_i = x_i
    return x * y, lambda g: (g * y, g * x)


@op
def matmul(x, y):  # z_ij = sum_k x_ik y_kj, so gx_ik = sum_j g_ij y_kj and gy_kj = sum_i x_ik g_ij
    return x @ y, lambda g: (g @ y.T, x.T @ g)


@op
def tanh(x):  # dy_i/dx_i = 1 - y_i^2
    y = np.tanh(x)
    return y, lambda g: (g * (1 - y * y),)


@op
def mean(x):  # y = (1/n) sum_i x_i, so dy/dx_i = 1/n
    return x.mean(), lambda g: (np.full(x.shape, g / x.size),)


def gradients(output):
    """dL/dnode for each node that the number `output` depends on."""
    found = {output: np.ones(())}  # dL/dL = 1
    for node in reversed(tape):  # newest first: all that a node went into has had its turn
        if node in found and node.vjp:
            for parent, gradient in zip(node.parents, node.vjp(found[node])):
                found[parent] = found[parent] + gradient if parent in found else gradient
    return found


# %% [markdown]
# ## From NumPy alone
# That is all of it. A node may reach L in several ways, and by the chain rule their contributions add up: the `+` in
# `gradients`. An example is L = mean(h h + h) with h = tanh(x w), where h is used three times.

# %%
rng = np.random.default_rng(0)
x, w = rng.normal(size=(4, 3)), rng.normal(size=(3, 2))
w_node = Node(w)
h_node = tanh(matmul(Node(x), w_node))  # (4, 3), (3, 2) -> (4, 2)
by_hand = gradients(mean(add(mul(h_node, h_node), h_node)))[w_node]


def loss(w):
    h = np.tanh(x @ w)
    return (h * h + h).mean()


units = 1e-6 * np.eye(w.size).reshape(-1, *w.shape)  # (6, 3, 2): one entry of w at a time
finite = np.array([loss(w + unit) - loss(w - unit) for unit in units]).reshape(w.shape) / 2e-6

# %% [markdown]
# ## The library's version
# The same, but a Tensor carries a creation number instead of a place on a global tape, so that what is no longer used
# is freed; only leaves keep a gradient, in `grad`, which adds up over sweeps; a graph can be swept once.

# %%
w_leaf = Tensor(w, requires_grad=True)
h = ops.tanh(x @ w_leaf)
ops.mean(h * h + h).backward()
np.testing.assert_allclose(w_leaf.grad, by_hand, rtol=1e-10, atol=1e-14)
np.testing.assert_allclose(w_leaf.grad, finite, rtol=1e-6, atol=1e-9)
print("dL/dw, first row\n     by hand    library    finite difference")
for row in zip(by_hand[0], w_leaf.grad[0], finite[0]):
    print("{:12.8f}{:12.8f}{:16.8f}".format(*row))

# %% [markdown]
# ## How `(y, vjp)` reads
# `ops.OPS` holds every op by name; its `raw` is the function of arrays. In `minidpo/ops.py` read each from the top:
# what y is, the local derivative as a comment, the vjp. The arrays that a vjp mentions stay in memory until the sweep
# has passed; `co_freevars` names them. mul keeps both factors, tanh its result, add no array (like_x: shape, dtype).

# %%
y, vjp = ops.OPS["tanh"].raw(x)
np.testing.assert_allclose(vjp(np.ones_like(y))[0], 1 - np.tanh(x) ** 2, rtol=1e-12)
print("\nWhat a vjp keeps")
kept = {}
for name, operands in {"mul": (x, x), "tanh": (x,), "add": (x, x)}.items():
    kept[name] = ops.OPS[name].raw(*operands)[1].__code__.co_freevars
    print(f"  {name:<5} {', '.join(kept[name])}")
assert {"x", "y"} <= set(kept["mul"]) and kept["tanh"] == ("y",) and not {"x", "y"} & set(kept["add"])

# %% [markdown]
# ## How a derivative is checked
# Let u be a direction in x, J the Jacobian. J u is how f changes along u, and needs the forward alone. With a random
# cotangent g, a right vjp satisfies <g, J u> = <vjp(g), u>: one number on either side, whatever the shapes.
#
#     J u = (f(x + h u) - f(x - h u)) / 2h + O(h^2)        central difference
#     J u = Im f(x + i h u) / h + O(h^2)                   complex step, where f is analytic
#
# The first subtracts two nearly equal numbers: their rounding errors, divided by 2h, grow as h shrinks. The second does
# not: f(x + i h u) = f(x) + i h J u + O(h^2), the next imaginary term is O(h^3), and h may be as small as 1e-20.


# %%
def cube(x):
    return x * x * x


table = {}
for h in (1e-2, 1e-4, 1e-6, 1e-8, 1e-20):
    estimates = [cube(1 + 1j * h).imag / h]
    for one, step in ((np.float64(1), np.float64(h)), (np.float32(1), np.float32(h))):
        estimates.insert(0, float((cube(one + step) - cube(one - step)) / (2 * step)))
    table[h] = [abs(estimate / 3 - 1) for estimate in estimates]  # central float32, float64, complex step
print("\nRelative error of the slope of x^3 at 1\n     h   central, float32   central, float64   complex step")
for h, errors in table.items():
    print("{:6.0e} {:18.0e} {:18.0e} {:14.0e}".format(h, *errors))
assert table[1e-6][1] < 1e-8 and table[1e-20][1] == 1 and table[1e-20][2] < 1e-15

# %% [markdown]
# ## First lie: a cotangent of ones. The answer to the prediction
# It does not notice. A softmax sums to 1 for every x, so the gradient of its sum *is* 0, and zeros are the right answer
# to that question. `softmax(x).sum()` is the cotangent g = (1, ..., 1); a random g asks about every entry.


# %%
def softmax_with_zeros(x):
    return ops.softmax.raw(x)[0], lambda g: (0 * g,)


def passes(raw_op, x, method="central"):
    try:
        return gradcheck.check_vjp(raw_op, x, rng=np.random.default_rng(1), method=method) < 1e-6
    except gradcheck.GradientError:
        return False


u, ones = rng.normal(size=x.shape), np.ones_like(x)
ju = (softmax_with_zeros(x + 1e-6 * u)[0] - softmax_with_zeros(x - 1e-6 * u)[0]) / 2e-6
assert abs((ones * ju).sum()) < 1e-8  # <1, J u> = <0, u>: the wrong vjp passes
np.testing.assert_allclose(ops.softmax.raw(x)[1](ones)[0], 0, atol=1e-14)  # the right one returns zeros too
print(f"\nsoftmax, random g: zeros pass {passes(softmax_with_zeros, x)}, ours passes {passes(ops.softmax, x)}")
assert not passes(softmax_with_zeros, x) and passes(ops.softmax, x) and passes(ops.softmax, x, "complex")

# %% [markdown]
# ## Second lie: a kink
# max(x, 0) has slope 0 left of 0 and 1 right of it; at 0 programs choose one of them. A central difference across the
# kink gives (h - 0)/2h = 1/2, and the check refuses a vjp that is right everywhere else. |x| at 0 is worse: the central
# difference is 0, and a vjp of zeros, wrong everywhere else, passes. Check beside the kink.


# %%
def relu(x):
    return np.maximum(x, 0), lambda g: (g * (x > 0),)


def absolute_with_zeros(x):
    return np.abs(x), lambda g: (0 * g,)


kink, beside = np.array([0.0]), np.array([0.3])
print(f"relu passes at 0 {passes(relu, kink)}, at .3 {passes(relu, beside)};", end=" ")
print(f"|x| with zeros at 0 {passes(absolute_with_zeros, kink)}, at .3 {passes(absolute_with_zeros, beside)}")
assert (relu(kink + 1e-6)[0] - relu(kink - 1e-6)[0]) / 2e-6 == 0.5
assert not passes(relu, kink) and passes(relu, beside) and passes(relu, -beside)
assert passes(absolute_with_zeros, kink) and not passes(absolute_with_zeros, beside)

# %% [markdown]
# ## Third lie: float32
# Next to 1, float32 numbers are about 1e-7 apart. With h = 1e-6 the estimate above is wrong by 2 percent, so the
# tolerance must be wide, and a wrong vjp may fit in. With h = 1e-8, x + h and x - h are both x, the estimate is 0, and
# zeros pass once more. Check in float64; `check_vjp` converts by itself.

# %%
assert np.float32(1) + np.float32(1e-8) == np.float32(1) == np.float32(1) - np.float32(1e-8)
assert 0.01 < table[1e-6][0] < 0.025 and table[1e-8][0] == 1  # a relative error of 1: the estimate was 0

# %% [markdown]
# ## What was shown
# Reverse mode is a sweep from L to the leaves, newest first: each vjp once, contributions added. A vjp is checked
# against its forward: random cotangents, beside kinks, in float64. Whether the forward is right, no such check says.
#
# ## Exercises
# 1. Find the bug: in `gradients` someone writes `found[parent] = gradient`. What is d(a a)/da at a = 3 then, and why?
# 2. Derive the vjp of y_i = x_i/s with s = sum_j x_j. What does it return for g = (1, ..., 1), and why?

# %%
np.testing.assert_allclose(by_hand, finite, rtol=1e-6, atol=1e-9)
zeros_pass = [abs((ones * ju).sum()) < 1e-8, passes(absolute_with_zeros, kink), table[1e-8][0] == 1]
assert all(zeros_pass) and not passes(softmax_with_zeros, x)
print("\n02: our sweep, the library's and finite differences agree; zeros pass three bad checks and fail a good one")

# %% [markdown]
# ## Solutions
# 1. 3 instead of 6: mul contributes 3 for each of its operands, and the second 3 replaces the first.
# 2. dy_i/dx_j = [i = j]/s - x_i/s^2, so gx_j = (g_j - sum_i g_i y_i)/s. For ones (1 - 1)/s = 0: the y_i sum to 1.

# %%
a = Node(3.0)
square = mul(a, a)
assert gradients(square)[a] == 6
assert dict(zip(square.parents, square.vjp(np.ones(()))))[a] == 3  # in a dict the last one wins


def share(x):
    s = x.sum()
    y = x / s
    return y, lambda g: ((g - (g * y).sum()) / s,)


assert gradcheck.check_vjp(share, rng.uniform(1, 2, size=5), rng=rng, method="complex") < 1e-12
np.testing.assert_allclose(share(np.arange(1.0, 5))[1](np.ones(4))[0], 0, atol=1e-15)
