# %% [markdown]
# # 01. Scores, probability, loss
#
# **Question.** People say which of two responses they prefer. What loss turns such judgements into scores?
#
# It is often easier to judge which of two answers is better than to create a good one, so judgements are collected.
# But a judgement says only *which*, not *by how much*; the amounts have to be inferred from many of them.
#
# **Afterwards you can say**
# - what the Bradley-Terry model assumes, and why only differences of scores count in it;
# - what -log P is, and its slope in the margin;
# - two reasons for -log P instead of 1 - P; "it explodes" is not one of them.
#
# **Predict first.** To the judgement that was made, a model gives the probability P = .01: it is confidently wrong.
# Compare the slopes of -log P and of 1 - P in the margin. Which is larger there, and how many times: 2, 10, 100?
#
# **The formula.** x is a prompt, w the chosen response, l the rejected one.
#
#     margin = score_w - score_l                          z = beta * margin, and beta = 1 in this script
#     P(w preferred to l) = e^(beta score_w) / (e^(beta score_w) + e^(beta score_l)) = sigma(z)
#     sigma(z) = 1/(1 + e^-z), the logistic function
#     loss = -log P = -log sigma(z)

# %%
import math
import pathlib

import numpy as np

from minidpo import Tensor, ops, plots


def sigma(z):
    return 1 / (1 + np.exp(-z))


def preferred(score_w, score_l):
    return np.exp(score_w) / (np.exp(score_w) + np.exp(score_l))


# %% [markdown]
# ## From NumPy alone
# Bradley-Terry: each response has one score, and the odds of being preferred are e^score_w : e^score_l. Divide by
# e^score_w above and below the line, and P = 1/(1 + e^-(score_w - score_l)): a constant added to both changes nothing.
#
# Independent judgements have the product of their P. Minus its logarithm is a sum, the negative log-likelihood: where
# it is smallest, the judgements are most probable. The sum does not underflow; .5^2000 is 0 in float64.

# %%
np.testing.assert_allclose([preferred(2.0, 0.3), preferred(12.0, 10.3)], sigma(1.7), rtol=1e-12)
np.testing.assert_allclose(sigma(-1.7), 1 - sigma(1.7), rtol=1e-12)  # one of the two is preferred
assert 0.5**2000 == 0 and np.isfinite(-np.log(np.full(2000, 0.5)).sum())
print(f"sigma(1.7) = {sigma(1.7):.4f}   sigma(-1.7) = {sigma(-1.7):.4f}   sigma(0) = {sigma(0.0):.4f}")

# %% [markdown]
# ## The slope in the margin
#     dP/dz = sigma(z) (1 - sigma(z)) = P (1 - P)
#     d(-log P)/dz = -(1/P) P (1 - P) = -(1 - P) = -sigma(-z)
#     d(1 - P)/dz  = -P (1 - P)


# %%
def slope_of_log(z):  # of -log sigma(z)
    return -sigma(-z)


def slope_of_linear(z):  # of 1 - sigma(z)
    return -sigma(z) * sigma(-z)


P, h = np.array([0.0001, 0.01, 0.5, 0.99, 0.9999]), 1e-6
z = np.log(P / (1 - P))  # the inverse of sigma
np.testing.assert_allclose(slope_of_log(z), (-np.log(sigma(z + h)) + np.log(sigma(z - h))) / (2 * h), atol=1e-8)
np.testing.assert_allclose(slope_of_linear(z), (-sigma(z + h) + sigma(z - h)) / (2 * h), atol=1e-8)
print("\nTwo losses and their slopes in the margin\n      P        z   -log P    slope    1 - P    slope")
for row in zip(P, z, -np.log(P), slope_of_log(z), 1 - P, slope_of_linear(z)):
    print("{:7.4f} {:8.3f} {:8.4f} {:8.4f} {:8.4f} {:8.4f}".format(*row))

# %% [markdown]
# ## The answer to the prediction
# At P = .01 the slope of -log P is -.99, that of 1 - P is -.0099: 100 times, in general 1/P times. 1 - P hardly moves
# the pair on which the model is most wrong. That is the first reason.
#
# "-log P explodes" is none. It and its slope *in P*, -1/P, do grow without bound as P goes to 0. But what parameters
# move is the margin, and the slope in the margin is never steeper than -1 (in DPO: -beta).

# %%
np.testing.assert_allclose([slope_of_log(z)[1], slope_of_linear(z)[1]], [-0.99, -0.0099], rtol=1e-12)
np.testing.assert_allclose(slope_of_log(z) / slope_of_linear(z), 1 / P, rtol=1e-9)
assert (np.abs(slope_of_log(np.linspace(-500, 500, 1001))) <= 1).all()

grid = np.linspace(-8, 8, 201)
drawn = {"loss": (-np.log(sigma(grid)), 1 - sigma(grid)), "slope": (slope_of_log(grid), slope_of_linear(grid))}
panels = [
    plots.Panel(f"{name} of one pair", "z", name, [plots.Curve("-log P", grid, a), plots.Curve("1 - P", grid, b)])
    for name, (a, b) in drawn.items()
]
path = pathlib.Path("01_scores.png")
print(f"picture: {path.name}" if plots.picture(path, panels) else "no picture: it needs matplotlib (the `plot` extra)")

# %% [markdown]
# The second reason: people disagree. If w is preferred with probability p, the expected losses are
#
#     -p log sigma(z) - (1 - p) log sigma(-z):     slope -p sigma(-z) + (1 - p) sigma(z) = sigma(z) - p
#     p (1 - sigma(z)) + (1 - p) sigma(z):         slope (1 - 2p) sigma(z) sigma(-z)
#
# The first slope is 0 where sigma(z) = p: the loss asks for the true probability. The second is negative for every z
# if p > 1/2: that loss asks for an infinite margin, whether p is .6 or .9, and the amounts are lost.

# %%
p, z = sigma(1.7), np.linspace(-30, 30, 6001)
best_of_log = z[(-p * np.log(sigma(z)) - (1 - p) * np.log(sigma(-z))).argmin()]
best_of_linear = z[(p * (1 - sigma(z)) + (1 - p) * sigma(z)).argmin()]
print(f"\np = {p:.4f}: the best z in [-30, 30] is {best_of_log:.2f} for -log P, {best_of_linear:.2f} for 1 - P")
np.testing.assert_allclose([best_of_log, best_of_linear], [1.7, 30], rtol=1e-9)

# %% [markdown]
# ## Scores from judgements
# Three responses with hidden scores; 6000 judgements drawn from Bradley-Terry; gradient descent on the mean of -log P.
# A judgement pushes score_w up by sigma(-z) and score_l down by as much, so the sum of the scores stays as it was at
# the start, here 0: no judgement can say what it is.

# %%
rng = np.random.default_rng(0)
true_score = np.array([1.5, -0.2, -1.3])
first = rng.integers(3, size=6000)
second = (first + rng.integers(1, 3, size=6000)) % 3  # one of the other two
first_preferred = rng.random(6000) < sigma(true_score[first] - true_score[second])
w, l = np.where(first_preferred, first, second), np.where(first_preferred, second, first)


def loss_and_gradient(score, w, l):
    z = score[w] - score[l]  # (responses,) -> (judgements,)
    gradient = np.zeros_like(score)
    np.add.at(gradient, w, -sigma(-z) / len(z))
    np.add.at(gradient, l, sigma(-z) / len(z))
    return -np.log(sigma(z)).mean(), gradient


score = np.zeros(3)
for _ in range(300):
    score -= 4.0 * loss_and_gradient(score, w, l)[1]
print("\nScores from 6000 judgements\ntrue  " + "{:6.2f} {:6.2f} {:6.2f}".format(*true_score))
print("found " + "{:6.2f} {:6.2f} {:6.2f}".format(*score))

# %% [markdown]
# ## The library's version
# `ops.logsigmoid` is log sigma in a form that survives large |z| (tutorial 03); `backward` finds the gradient (02). In
# DPO the score of a response is logp - ref_logp, by how much the policy, the model that is trained, finds it likelier
# than a reference model does (04, 07). The margin is the difference of two scores, before beta; beta * score is called
# the reward, and the loss is this one.

# %%
scores = Tensor(true_score, requires_grad=True)
loss = ops.mean(-ops.logsigmoid(scores[w] - scores[l]))
loss.backward()
np.testing.assert_allclose(loss.item(), loss_and_gradient(true_score, w, l)[0], rtol=1e-12)
np.testing.assert_allclose(scores.grad, loss_and_gradient(true_score, w, l)[1], rtol=1e-9, atol=1e-12)

# %% [markdown]
# ## What was shown
# Bradley-Terry makes a probability of a difference of scores, and -log P a loss of that. Its slope in the margin is
# -sigma(-z): close to -1 where the model is confidently wrong, and on average 0 where sigma(z) is the true probability.
#
# ## Exercises
# 1. One pair at P = .01; gradient descent on z with learning rate 1. About how many steps does each of the two losses
#    take to P > 1/2? Hint: for -log P, dz/dt = 1/(1 + e^z); separate the variables.
# 2. Three judgements: a over b, b over c, c over a. Which scores make the sum of -log P smallest, and how small is it?
#    And without the third judgement?

# %%
np.testing.assert_allclose(sigma(1.7), 0.8455, atol=5e-5)
np.testing.assert_allclose(score, true_score, atol=0.15)
np.testing.assert_allclose(score.sum(), 0, atol=1e-9)
print("\n01: at P = .01 the slopes are -.99 and -.0099; -log P finds p at z = 1.7, and three scores within .15")

# %% [markdown]
# ## Solutions
# 1. (1 + e^z) dz = dt, so t = z + e^z taken from z0 = log(.01/.99) to 0: 5.6. For 1 - P, dz/dt = sigma(z) sigma(-z) =
#    1/(2 + e^z + e^-z), so t = 2z + e^z - e^-z taken between the same bounds: 108.2. Counted: 6 and 110.
# 2. Equal scores, 3 log 2: there the gradient is 0, and the sum is convex. Without the third judgement there is no
#    minimum: with the scores s, 0, -s the sum falls towards 0 as s grows, and never gets there.

# %%
z0 = math.log(0.01 / 0.99)
t = [1 - (z0 + math.exp(z0)), -(2 * z0 + math.exp(z0) - math.exp(-z0))]
steps = [0, 0]
for i, slope in enumerate((slope_of_log, slope_of_linear)):
    z = z0
    while sigma(z) <= 0.5:
        z, steps[i] = z - slope(z), steps[i] + 1
np.testing.assert_allclose(t, [5.6, 108.2], atol=0.05)
np.testing.assert_allclose(steps, t, atol=3)

w, l = np.array([0, 1, 2]), np.array([1, 2, 0])
minimum, gradient = loss_and_gradient(np.zeros(3), w, l)
np.testing.assert_allclose([3 * minimum, *gradient], [3 * math.log(2), 0, 0, 0], atol=1e-12)
assert all(loss_and_gradient(rng.normal(size=3), w, l)[0] > minimum for _ in range(100))
chain = [2 * loss_and_gradient(np.array([s, 0.0, -s]), w[:2], l[:2])[0] for s in (1, 10, 30)]
assert chain[0] > chain[1] > chain[2] > 0 and chain[2] < 1e-12
print(f"solutions: {steps[0]} and {steps[1]} steps; {3 * minimum:.4f} for the cycle")
