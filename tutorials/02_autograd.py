# %% [markdown]
# # 02. Reverse-mode autograd
#
# **Question.** How does a program find the derivative of one number with respect to everything that it was made of, and
# how do you know that the derivative is correct?
#
# **Afterwards you can say**
# - what a cotangent g and a vjp are, and how to read `(y, vjp)`;
# - why the gradients of a value that is used twice are added, and why the newest value comes first on the way back;
# - how a derivative is checked, and three ways in which a check lies.
#
# **Predict first.** Someone replaces the vjp of softmax by one that returns zeros. A test computes the gradient of
# `softmax(x).sum()` and compares it with finite differences: how fast the sum changes when one entry of x is moved a
# little. Does the test notice?
#
# **The formula.** L is one number, y = f(x) is an array on the way to it, and g = dL/dy is called the cotangent of y.
#
#     gx_j = dL/dx_j = sum_i g_i dy_i/dx_j            vjp(g) returns gx: a "vector-Jacobian product"

# %%
import pathlib

import numpy as np

from minidpo import Tensor, gradcheck, ops, plots

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
def add(a, b):  # dy_i/da_i = dy_i/db_i = 1
    return a + b, lambda g: (g, g)


@op
def mul(a, b):  # dy_i/da_i = b_i, dy_i/db_i = a_i
    return a * b, lambda g: (g * b, g * a)


@op
def matmul(a, b):  # y_ij = sum_k a_ik b_kj, so ga_ik = sum_j g_ij b_kj and gb_kj = sum_i a_ik g_ij
    return a @ b, lambda g: (g @ b.T, a.T @ g)


@op
def tanh(x):  # dy_i/dx_i = 1 - y_i^2
    y = np.tanh(x)
    return y, lambda g: (g * (1 - y * y),)


@op
def mean(x):  # y = (sum_i x_i)/size, so dy/dx_i = 1/size
    return x.mean(), lambda g: (np.full(x.shape, g / x.size),)


def gradients(output):
    """dL/dnode for each node that the number L, `output`, depends on."""
    total = {output: np.ones(())}  # dL/dL = 1
    for node in reversed(tape):  # newest first: everything made from a node has already passed its gradient back
        if node in total and node.vjp:
            for parent, gradient in zip(node.parents, node.vjp(total[node])):
                total[parent] = total[parent] + gradient if parent in total else gradient
    return total


# %% [markdown]
# ## From NumPy alone
# That is the whole engine. Calling ops computes values and records nodes, forwards. `gradients` then visits the nodes
# once, backwards from L: this is called the *sweep*. A node may reach L along several paths. By the chain rule the
# contributions of the paths add up; that is the `+` in `gradients`.
#
# Our example is L = mean(hidden * hidden + hidden) with hidden = tanh(x weights), where hidden is used three times.
# First take one number for each array, x = 0.5 and weight = 2. The mean of one number is that number, so we leave it
# out. Read the columns "arrives" and "slope" from the bottom up: that is the sweep.
#
#     node                        value    arrives                    from                 slope dL/dnode
#     x                           0.500    2.119                      product              2.119
#     weight                      2.000    0.530                      product              0.530
#     product = x * weight        1.000    1.060                      hidden               1.060
#     hidden = tanh(product)      0.762    0.762 + 0.762 + 1.000      square, square, L    2.523
#     square = hidden * hidden    0.580    1.000                      L                    1.000
#     L = square + hidden         1.342                                                    1.000
#
# Each arriving number is the slope of the node that it comes from, times one local derivative. hidden gets one from
# each of its three uses. tanh multiplies their sum by 1 - 0.762^2 = 0.420. The product then multiplies by 0.5 for
# weight, and by 2 for x. The picture draws the same numbers.

# %%
one_x, one_weight = Node(0.5), Node(2.0)
product = mul(one_x, one_weight)
one_hidden = tanh(product)
square = mul(one_hidden, one_hidden)
output = add(square, one_hidden)
graph = {"x": one_x, "weight": one_weight, "product": product, "hidden": one_hidden, "square": square, "L": output}
slopes = gradients(output)
arrives = {name: [] for name in graph}  # (from which node, which slope)
for child, node in graph.items():
    for parent, slope in zip(node.parents, node.vjp(slopes[node]) if node.vjp else ()):
        arrives[next(name for name in graph if graph[name] is parent)].append((child, float(slope)))
assert [f"{node.data:.3f}" for node in graph.values()] == ["0.500", "2.000", "1.000", "0.762", "0.580", "1.342"]
assert [f"{slopes[node]:.3f}" for node in graph.values()] == ["2.119", "0.530", "1.060", "2.523", "1.000", "1.000"]
hidden_gets = [("square", "0.762"), ("square", "0.762"), ("L", "1.000")]
assert [(child, f"{slope:.3f}") for child, slope in arrives["hidden"]] == hidden_gets
for name in list(graph)[:-1]:
    np.testing.assert_allclose(sum(slope for _, slope in arrives[name]), slopes[graph[name]], rtol=1e-12)


def draw(path):
    blue, orange = plots.PALETTE[:2]
    boxes = {"x": (0.9, 4, "x"), "weight": (2.4, 4, "weight"), "product": (1.65, 3, "product = x * weight")}
    boxes |= {"hidden": (1.65, 2, "hidden = tanh(product)"), "square": (0.9, 1, "square = hidden * hidden")}
    boxes["L"] = (1.65, 0, "L = square + hidden")
    arrows = {"x": [(1.4, 1.0)], "weight": [(1.9, 2.3)], "product": [(1.65, 1.65)], "square": [(1.3, 1.1)]}
    arrows["hidden"] = [(0.6, 1.1), (1.3, 1.6), (2.1, 2.1)]  # where each starts and ends, from left to right
    arrow = {"arrowstyle": "-|>", "color": orange, "linewidth": 2}
    box, centred = {"facecolor": "white", "edgecolor": blue, "boxstyle": "round"}, {"ha": "center", "va": "center"}
    with plots.figure(path, (6.4, 7.4), {"axes.grid": False, "font.size": 14}) as figure:
        axes = figure.subplots()
        axes.set(xlim=(0, 3.8), ylim=(-0.25, 4.25))
        axes.axis("off")
        for name, (right, high, text) in boxes.items():
            for (child, slope), (start, end) in zip(arrives[name], arrows.get(name, [])):
                low = boxes[child][1]
                axes.annotate("", (end, high - 0.15), (start, low + 0.15), arrowprops=arrow)
                middle = (start + end) / 2, (low + high) / 2
                axes.text(*middle, f"{slope:.3f}", color=orange, backgroundcolor="white", **centred)
            axes.text(right, high, f"{text}\n{graph[name].data:.3f}", color="black", bbox=box, **centred)
        axes.text(2.75, 2.75, "boxes: values,\ncomputed\nfrom the top", color=blue)
        text = "arrows: slopes,\npassed back\nfrom L upwards;\nwhere several\narrive, add them"
        axes.text(2.55, 0.6, text, color=orange)


path = pathlib.Path("02_autograd.png")
if plots.installed():
    draw(path)
print(f"picture: {path.name}" if plots.installed() else "the picture needs matplotlib (the `plot` extra)")

# %% [markdown]
# Why start at the end? *Forward mode* starts at the front: with each value it computes the derivative with respect to
# one entry of `weights`. So it needs a pass for each entry; finite differences need two evaluations of L for each. One
# sweep from L gives all entries, and costs no more than a few forward passes: cheaper for one loss and many parameters.
# Here are the arrays.

# %%
rng = np.random.default_rng(0)
x, weights = rng.normal(size=(4, 3)), rng.normal(size=(3, 2))
weights_node = Node(weights)
hidden_node = tanh(matmul(Node(x), weights_node))  # (4, 3), (3, 2) -> (4, 2)
by_hand = gradients(mean(add(mul(hidden_node, hidden_node), hidden_node)))[weights_node]


def loss(weights):
    hidden = np.tanh(x @ weights)
    return (hidden * hidden + hidden).mean()


shifts = 1e-6 * np.eye(weights.size).reshape(-1, *weights.shape)  # (6, 3, 2): each moves one entry
finite = np.array([loss(weights + shift) - loss(weights - shift) for shift in shifts]).reshape(weights.shape) / 2e-6

# %% [markdown]
# ## The library's version
# It works the same way, with three differences. A Tensor is numbered when it is made, so there is no global tape, and
# arrays that are no longer used are freed. Only leaves (tensors that no op made) store a gradient: sweeps of several
# graphs add up in `grad`. Each graph can be swept once. `backward` starts the sweep.

# %%
weights_leaf = Tensor(weights, requires_grad=True)
hidden = ops.tanh(x @ weights_leaf)
ops.mean(hidden * hidden + hidden).backward()
np.testing.assert_allclose(weights_leaf.grad, by_hand, rtol=1e-10, atol=1e-14)
np.testing.assert_allclose(weights_leaf.grad, finite, rtol=1e-6, atol=1e-9)
print("dL/dweights, first row\n     by hand    library    finite difference")
for row in zip(by_hand[0], weights_leaf.grad[0], finite[0]):
    print("{:12.8f}{:12.8f}{:16.8f}".format(*row))

# %% [markdown]
# ## How `(y, vjp)` reads
# `ops.OPS` holds every op by name; its `raw` is the function on arrays. Read each op in `minidpo/ops.py` from the top:
# what y is, the local derivative as a comment, the vjp. The variables that a vjp mentions stay in memory until the
# sweep has passed; Python lists them in `vjp.__code__.co_freevars`. mul keeps both factors, there called x and y. tanh
# keeps its result, also called y. add keeps no array: like_x and like_y hold only the shapes and dtypes of its
# operands. Those are needed because NumPy repeats the smaller operand of `a + b` until the shapes match
# (*broadcasting*). Each repetition is one more use, so the vjp adds up their gradients.

# %%
y, vjp = ops.OPS["tanh"].raw(x)
np.testing.assert_allclose(vjp(np.ones_like(y))[0], 1 - np.tanh(x) ** 2, rtol=1e-12)
print("\nWhat a vjp keeps")
free = {}
for name, operands in {"mul": (x, x), "tanh": (x,), "add": (x, x)}.items():
    free[name] = ops.OPS[name].raw(*operands)[1].__code__.co_freevars
    print(f"  {name:<5} {', '.join(free[name])}")
assert {"x", "y"} <= set(free["mul"]) and free["tanh"] == ("y",) and not {"x", "y"} & set(free["add"])
row = np.zeros(3)  # repeated for each of the 4 rows of x
np.testing.assert_array_equal(ops.OPS["add"].raw(x, row)[1](np.ones_like(x))[1], [4, 4, 4])

# %% [markdown]
# ## How a derivative is checked
# Let J be the Jacobian of f, the table of all dy_i/dx_j, and u a direction: an array with the shape of x. J u is how
# fast f changes along u. Computing it needs the forward function alone. Write `<a, b>` for the sum of the products of
# matching entries. With a random cotangent g, a correct vjp satisfies `<g, J u> = <vjp(g), u>`, because both are
# sum_ij g_i (dy_i/dx_j) u_j. Each side is one number, whatever the shapes.
#
#     J u = (f(x + eps u) - f(x - eps u)) / (2 eps) + O(eps^2)    central difference
#     J u = Im f(x + i eps u) / eps + O(eps^2)                    complex step; i^2 = -1
#
# The complex step needs an f that is analytic: made of sums, products, quotients, exp and the like, so that it also
# has a slope for complex numbers. max and |x| are not.
#
# The central difference subtracts two nearly equal numbers. Their rounding errors are divided by 2 eps, so they grow as
# eps shrinks. The complex step has no such subtraction. In the Taylor series f(x + i eps u) = f(x) + i eps J u + ...
# the next imaginary term is O(eps^3), so eps may be as small as 1e-20. The slope of x^3 at x = 1 is 3. The relative
# error of each estimate of it:
#
#     eps      central, float32    central, float64    complex step
#     1e-02    3e-05               3e-05               3e-05
#     1e-04    2e-04               3e-09               3e-09
#     1e-06    2e-02               about 1e-11         3e-13
#     1e-08    1e+00               2e-09               below 1e-15
#     1e-20    1e+00               1e+00               below 1e-15
#
# For the central difference the best eps lies in the middle: a larger one is too coarse, and a smaller one leaves too
# few digits in the difference. The errors, eps^2 and rounding/eps, balance where eps is about the cube root of the
# rounding: 5e-6 in float64 and 4e-3 in float32, for x near 1. An error of 1 means that the estimate is 0.


# %%
def cube(x):
    return x * x * x


errors = {}
for eps in (1e-2, 1e-4, 1e-6, 1e-8, 1e-20):
    estimates = [cube(1 + 1j * eps).imag / eps]
    for one, step in ((np.float64(1), np.float64(eps)), (np.float32(1), np.float32(eps))):
        estimates.insert(0, float((cube(one + step) - cube(one - step)) / (2 * step)))
    errors[eps] = [abs(estimate / 3 - 1) for estimate in estimates]  # central float32, float64, complex step
print("\nRelative error of the slope of x^3 at 1\n   eps   central, float32   central, float64   complex step")
for eps, row in errors.items():
    print("{:6.0e} {:18.0e} {:18.0e} {:14.0e}".format(eps, *row))
columns = list(zip(*errors.values()))
assert [f"{error:.0e}" for error in columns[0]] == ["3e-05", "2e-04", "2e-02", "1e+00", "1e+00"]
assert [f"{error:.0e}" for error in columns[1] if not 1e-12 < error < 1e-10] == ["3e-05", "3e-09", "2e-09", "1e+00"]
assert [f"{(np.finfo(dtype).eps / 2) ** (1 / 3):.0e}" for dtype in ("f8", "f4")] == ["5e-06", "4e-03"]
assert [f"{error:.0e}" for error in columns[2][:3]] == ["3e-05", "3e-09", "3e-13"] and max(columns[2][3:]) < 1e-15

# %% [markdown]
# ## First lie: a cotangent of ones. The answer to the prediction
# It does not notice. A softmax sums to 1 for every x, so the gradient of its sum *is* 0, and zeros are the correct
# answer to that question. Testing `softmax(x).sum()` means testing with the cotangent g = (1, ..., 1) only. A random g
# tests every entry.


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
np.testing.assert_allclose(ops.softmax.raw(x)[1](ones)[0], 0, atol=1e-14)  # the correct one returns zeros too
print(f"\nsoftmax, random g: zeros pass {passes(softmax_with_zeros, x)}, ours passes {passes(ops.softmax, x)}")
assert not passes(softmax_with_zeros, x) and passes(ops.softmax, x) and passes(ops.softmax, x, "complex")

# %% [markdown]
# ## Second lie: a kink
# max(x, 0) has slope 0 on the left of 0 and slope 1 on the right; at 0 itself a program chooses one of them. A central
# difference across the kink gives (eps - 0)/(2 eps) = 1/2, so the check rejects a vjp that is correct everywhere else.
# |x| at 0 is worse: the central difference is 0, so a vjp of zeros passes, although it is wrong everywhere else. Check
# beside the kink.


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
# Near 1, float32 numbers are about 1e-7 apart. With eps = 1e-6 the estimate in the table is wrong by 2 percent. A test
# must then allow that much, and a wrong vjp may slip through. With eps = 1e-8, 1 + eps and 1 - eps both round to 1. The
# estimate is 0, and a vjp of zeros passes once more. Check in float64; `check_vjp` converts its arrays to float64.

# %%
assert np.float32(1) + np.float32(1e-8) == np.float32(1) == np.float32(1) - np.float32(1e-8)
assert 0.01 < errors[1e-6][0] < 0.025 and errors[1e-8][0] == 1  # a relative error of 1: the estimate was 0

# %% [markdown]
# ## What was shown
# Reverse mode is one sweep from L to the leaves, newest node first. Each vjp is called once, and contributions are
# added. A vjp is checked against its forward function, with random cotangents, beside kinks, in float64. No such check
# says whether the forward function itself is correct.
#
# ## Exercises
# 1. Find the bug: in `gradients` someone writes `total[parent] = gradient`. What is d(a a)/da at a = 3 then, and why?
# 2. Derive the vjp of y_i = x_i/total with total = sum_j x_j. What does it return for g = (1, ..., 1), and why?
# 3. Predict, then measure: start with a node and double it 60 times, `node = add(node, node)`. How many paths lead from
#    the last node back to the first? How many vjps does `gradients` call, and how many would a program call that
#    follows each path to its end? (Measure the second for 16 doublings, not for 60.)

# %%
np.testing.assert_allclose(by_hand, finite, rtol=1e-6, atol=1e-9)
zeros_pass = [abs((ones * ju).sum()) < 1e-8, passes(absolute_with_zeros, kink), errors[1e-8][0] == 1]
assert all(zeros_pass) and not passes(softmax_with_zeros, x)
print("\n02: our sweep, the library's and finite differences agree; zeros pass three bad checks and fail a good one")

# %% [markdown]
# ## Solutions
# 1. It is 3 instead of 6. mul contributes 3 for each of its two operands, and the second 3 replaces the first.
# 2. With [i = j] = 1 if i = j, else 0: dy_i/dx_j = [i = j]/total - x_i/total^2, so
#    gx_j = (g_j - sum_i g_i y_i)/total. For g of ones this is (1 - 1)/total = 0, because the y_i sum to 1 for every x.
# 3. Each doubling offers two ways back, so there are 2^60 paths. `gradients` calls 60 vjps: when it reaches a node, all
#    that was made from the node has already passed its slope back, so the sum is complete and goes on once. That is
#    what "newest first" buys. The other program calls a vjp for every beginning of a path: 2^n - 1 calls for n
#    doublings, 65,535 for 16. For 60, at a billion calls a second, it would need 36 years. Both find the slope 2^n.

# %%
a = Node(3.0)
square = mul(a, a)
assert gradients(square)[a] == 6
assert dict(zip(square.parents, square.vjp(np.ones(()))))[a] == 3  # in a dict the last one wins


def normalised(x):
    total = x.sum()
    y = x / total
    return y, lambda g: ((g - (g * y).sum()) / total,)


assert gradcheck.check_vjp(normalised, rng.uniform(1, 2, size=5), rng=rng, method="complex") < 1e-12
np.testing.assert_allclose(normalised(np.arange(1.0, 5))[1](np.ones(4))[0], 0, atol=1e-15)

calls = []


@op
def counted_add(a, b):
    def vjp(g):
        calls.append(g)
        return g, g

    return a + b, vjp


def doubled(node, times):
    for _ in range(times):
        node = counted_add(node, node)
    return node


def along_each_path(node, slope, leaf):
    """dL/dleaf as a sum over paths: each is followed to its end before the next."""
    if node is leaf:
        return slope
    return sum(along_each_path(parent, part, leaf) for parent, part in zip(node.parents, node.vjp(slope)))


assert gradients(doubled(a, 60))[a] == 2**60 and len(calls) == 60
calls.clear()
assert along_each_path(doubled(a, 16), 1, a) == 2**16 and len(calls) == 2**16 - 1 == 65_535
assert int((2**60 - 1) / 1e9 / (365.25 * 24 * 3600)) == 36
