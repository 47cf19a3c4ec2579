# %% [markdown]
# # 01. Scores, probability, loss
#
# **Question.** People say which of two responses they prefer. What loss turns such judgements into scores?
#
# A judgement says only *which* response is better. *By how much* has to be inferred from many judgements.
#
# **Afterwards you can say**
# - what the Bradley-Terry model assumes, and why only differences of scores matter in it;
# - what -log P is, and its slope with respect to the margin;
# - two reasons for -log P instead of 1 - P, and one that is not;
# - why a chess player's rating after a game is a step of gradient descent on the same loss.
#
# **Predict first.** A model said that w would be preferred to l with probability P = .01. People preferred w: the model
# was sure, and wrong. Compare the slopes of -log P and of 1 - P with respect to the margin. Which is steeper there, and
# by what factor: 2, 10, 100?
#
# **The formula.** Two responses to one prompt: w is the chosen one, l the rejected one.
#
#     margin = score_w - score_l                          z = beta * margin
#     P(w preferred to l) = e^(beta score_w) / (e^(beta score_w) + e^(beta score_l)) = sigma(z)
#     sigma(z) = 1/(1 + e^-z), the logistic function
#     loss = -log P = -log sigma(z)
#
# beta > 0 sets the unit of the scores: the larger it is, the more a given margin counts. It is the beta of tutorial 00,
# the price of a nat: see 08, and 11 for its choice. In this script beta = 1, so z is the margin itself.

# %%
import math
import pathlib

import numpy as np

from minidpo import Tensor, ops, plots


def sigma(z):
    return 1 / (1 + np.exp(-z))


def bradley_terry(score_w, score_l):
    return np.exp(score_w) / (np.exp(score_w) + np.exp(score_l))


# %% [markdown]
# ## From NumPy alone
# Bradley-Terry gives each response one score; the odds that w is preferred to l are e^score_w : e^score_l. Divide
# numerator and denominator by e^score_w to get P = 1/(1 + e^-(score_w - score_l)). So adding a constant to both scores
# changes nothing.
#
# The probability of several independent judgements is the product of their P. Minus its logarithm is a sum, called the
# negative log-likelihood. Where this sum is smallest, the judgements are most probable.

# %%
np.testing.assert_allclose([bradley_terry(2.0, 0.3), bradley_terry(12.0, 10.3)], sigma(1.7), rtol=1e-12)
np.testing.assert_allclose(sigma(-1.7), 1 - sigma(1.7), rtol=1e-12)  # one of the two is preferred
print(f"sigma(1.7) = {sigma(1.7):.4f}   sigma(-1.7) = {sigma(-1.7):.4f}   sigma(0) = {sigma(0.0):.4f}")

# %% [markdown]
# ## The slope with respect to the margin
#     dP/dz = e^-z/(1 + e^-z)^2 = sigma(z) sigma(-z) = P (1 - P)
#     d(-log P)/dz = -(1/P) P (1 - P) = -(1 - P) = -sigma(-z)
#     d(1 - P)/dz  = -P (1 - P)


# %%
def slope_of_log(z):  # of -log sigma(z)
    return -sigma(-z)


def slope_of_linear(z):  # of 1 - sigma(z)
    return -sigma(z) * sigma(-z)


P, eps = np.array([0.0001, 0.01, 0.5, 0.99, 0.9999]), 1e-6
z = np.log(P / (1 - P))  # the inverse of sigma
np.testing.assert_allclose(slope_of_log(z), (-np.log(sigma(z + eps)) + np.log(sigma(z - eps))) / (2 * eps), atol=1e-8)
np.testing.assert_allclose(slope_of_linear(z), (-sigma(z + eps) + sigma(z - eps)) / (2 * eps), atol=1e-8)
print("\nTwo losses and their slopes with respect to the margin\n      P        z   -log P    slope    1 - P    slope")
for row in zip(P, z, -np.log(P), slope_of_log(z), 1 - P, slope_of_linear(z)):
    print("{:7.4f} {:8.3f} {:8.4f} {:8.4f} {:8.4f} {:8.4f}".format(*row))

# %% [markdown]
# ## The answer to the prediction
# At P = .01 the slope of -log P is -.99 and that of 1 - P is -.0099. The first is 100 times as steep; in general it is
# 1/P times as steep. The loss 1 - P hardly moves the pair on which the model is most wrong. That is the first reason.
#
# One often reads that -log P is better because it grows without bound as P goes to 0. That is not the reason. Its slope
# with respect to *P*, -1/P, does so, too. But parameters act on the loss only through the margin, and there the slope
# is never steeper than 1 (in DPO: beta).
#
# On the right of the picture both losses agree; on the left only -log P keeps its slope.

# %%
np.testing.assert_allclose([slope_of_log(z)[1], slope_of_linear(z)[1]], [-0.99, -0.0099], rtol=1e-12)
np.testing.assert_allclose(slope_of_log(z) / slope_of_linear(z), 1 / P, rtol=1e-9)
assert (np.abs(slope_of_log(np.linspace(-500, 500, 1001))) <= 1).all()

grid = np.linspace(-8, 8, 201)
curves = {"loss": (-np.log(sigma(grid)), 1 - sigma(grid)), "slope": (slope_of_log(grid), slope_of_linear(grid))}


def draw(path):
    with plots.figure(path, (6.4, 6.4), {"font.size": 12}) as figure:
        for axes, (name, two) in zip(figure.subplots(2), curves.items()):
            for label, values, dash, color in zip(("-log P", "1 - P"), two, ("-", "--"), plots.PALETTE):
                axes.plot(grid, values, dash, color=color, linewidth=2.5)
                axes.annotate(label, (-5, values[37]), (3, 5), textcoords="offset points", color=color)
            axes.set(title=f"{name} of one pair", xlabel="z", ymargin=0.15)


path = pathlib.Path("01_scores.png")
if plots.installed():
    draw(path)
print(f"picture: {path.name}" if plots.installed() else "the picture needs matplotlib (the `plot` extra)")

# %% [markdown]
# The second reason is that people disagree. If they prefer the first of two responses with probability p, and z belongs
# to its margin over the second, the expected losses and their slopes are
#
#     -p log sigma(z) - (1 - p) log sigma(-z):     slope -p sigma(-z) + (1 - p) sigma(z) = sigma(z) - p
#     p (1 - sigma(z)) + (1 - p) sigma(z):         slope (1 - 2p) sigma(z) sigma(-z)
#
# The first slope is 0 where sigma(z) = p, so -log P asks for the true probability. For p > 1/2 the second slope is
# negative at every z, so 1 - P asks for an infinite margin. It does so whether p is .6 or .9: the amounts are lost.

# %%
p, z = sigma(1.7), np.linspace(-30, 30, 6001)
best_of_log = z[(-p * np.log(sigma(z)) - (1 - p) * np.log(sigma(-z))).argmin()]
best_of_linear = z[(p * (1 - sigma(z)) + (1 - p) * sigma(z)).argmin()]
print(f"\np = {p:.4f}: the best z in [-30, 30] is {best_of_log:.2f} for -log P, {best_of_linear:.2f} for 1 - P")
np.testing.assert_allclose([best_of_log, best_of_linear], [1.7, 30], rtol=1e-9)

# %% [markdown]
# ## Scores from judgements
# Three responses have hidden scores. We sample 6000 judgements from Bradley-Terry and run gradient descent on the mean
# of -log P. A judgement pushes score_w up and score_l down by the same amount, in proportion to sigma(-z). So the sum
# of the scores keeps its starting value, here 0; judgements cannot say what it is.

# %%
rng = np.random.default_rng(0)
true_score = np.array([1.5, -0.2, -1.3])
first = rng.integers(3, size=6000)
second = (first + rng.integers(1, 3, size=6000)) % 3  # one of the other two
first_wins = rng.random(6000) < sigma(true_score[first] - true_score[second])
w, l = np.where(first_wins, first, second), np.where(first_wins, second, first)


def loss_and_gradient(score, w, l):
    z = score[w] - score[l]  # (responses,) -> (judgements,)
    gradient = np.zeros_like(score)
    np.add.at(gradient, w, -sigma(-z) / len(z))
    np.add.at(gradient, l, sigma(-z) / len(z))
    return -np.log(sigma(z)).mean(), gradient


score = np.zeros(3)
for _ in range(300):
    score -= 4.0 * loss_and_gradient(score, w, l)[1]
print("\nScores from 6000 judgements\ntrue    " + "{:6.2f} {:6.2f} {:6.2f}".format(*true_score))
print("fitted  " + "{:6.2f} {:6.2f} {:6.2f}".format(*score))

# %% [markdown]
# ## The same model, outside DPO: Elo
# Chess uses Bradley-Terry with another unit. A rating of 400 points more makes the odds ten times as large, so
# score = rating log(10)/400. After each game the winner takes points from the loser, more if the win was a surprise:
#
#     expected = 1/(1 + 10^((rating_l - rating_w)/400)) = sigma(score_w - score_l)
#     rating_w <- rating_w + k_factor (1 - expected)      rating_l <- rating_l - k_factor (1 - expected)
#
# Now 1 - expected = sigma(-z), which is minus the slope of -log sigma(z). So this update, written down by Arpad Elo for
# chess, is one step of *stochastic* gradient descent on -log sigma(z): in place of all judgements it uses a few that
# chance has picked, a *batch*, here of one. The learning rate is k_factor log(10)/400: 0.18 for the usual 32. Chatbot
# Arena began by ranking chatbots in this way; now it fits Bradley-Terry to all votes at once (Chiang et al. 2024).

# %%
POINTS = 400 / math.log(10)  # of rating, to one unit of score: 174


def elo(rating, w, l, k_factor):
    """The ratings after one game."""
    expected = 1 / (1 + 10 ** ((rating[l] - rating[w]) / 400))
    rating = rating.copy()
    rating[w] += k_factor * (1 - expected)
    rating[l] -= k_factor * (1 - expected)
    return rating


games = list(zip(w, l))  # each judgement is one


def history(k_factor):
    """The scores after each game."""
    rating, scores = np.zeros(3), []
    for winner, loser in games:
        rating = elo(rating, winner, loser, k_factor)
        scores.append(rating / POINTS)
    return np.array(scores)


some_score = np.array([0.4, 0.1, -0.5])
for winner, loser in games[:100]:
    step = 32 * math.log(10) / 400 * loss_and_gradient(some_score, np.array([winner]), np.array([loser]))[1]
    np.testing.assert_allclose(elo(POINTS * some_score, winner, loser, 32) / POINTS, some_score - step, rtol=1e-12)
at_the_end = {k_factor: history(k_factor)[-1] for k_factor in (32, 2)}
for k_factor, each in at_the_end.items():
    print(f"Elo, k_factor {k_factor:>2}: " + "{:6.2f} {:6.2f} {:6.2f}".format(*each))

# %% [markdown]
# With a fixed learning rate Elo's ratings never settle: each game moves them, however many came before. A small
# k_factor is calmer, and slower to notice that a player has improved.
#
# ## The library's version
# `ops.logsigmoid` computes log sigma in a form that survives large |z| (tutorial 03), and `backward` computes the
# gradient (02). In DPO two models read each response: the policy, which is trained, and a fixed reference model. How
# much likelier the policy finds a response is its score (04, 07). Side by side:
#
#     score     logp - ref_logp          of one response, in nats
#     reward    beta * score
#     margin    score_w - score_l        of a pair, in nats
#     z         beta * margin            reward_w - reward_l; the loss is -log sigma(z)

# %%
scores = Tensor(true_score, requires_grad=True)
loss = ops.mean(-ops.logsigmoid(scores[w] - scores[l]))
loss.backward()
np.testing.assert_allclose(loss.item(), loss_and_gradient(true_score, w, l)[0], rtol=1e-12)
np.testing.assert_allclose(scores.grad, loss_and_gradient(true_score, w, l)[1], rtol=1e-9, atol=1e-12)

# %% [markdown]
# ## What was shown
# Bradley-Terry turns a difference of scores into a probability P, and -log P turns that into a loss. The slope of the
# loss with respect to the margin is -sigma(-z). Its mean over all judgements to come is 0 where sigma(z) is the true
# probability. Elo follows this slope, game by game.
#
# ## Exercises
# 1. Take one pair at P = .01 and run gradient descent on z with learning rate 1. About how many steps does each of the
#    two losses need to reach P > 1/2? Hint: let a step take one unit of time t, so that dz/dt is about minus the slope,
#    for -log P 1/(1 + e^z); separate the variables.
# 2. Three judgements form a cycle: the first response over the second, the second over the third, the third over the
#    first. Which scores make the sum of -log P smallest, and how small is it? What changes without the third judgement?
# 3. Find the bug: somebody writes Elo in two lines. The first is `rating[w] += 32 * (1 - expected(rating[w],
#    rating[l]))`, the second `rating[l] -= 32 * (1 - expected(rating[w], rating[l]))`. What happens to the sum of all
#    ratings?
# 4. Predict, then measure: the ratings of a k_factor of 32 stray about the best scores. With 2, sixteen times less, how
#    many times smaller is their spread over the games?

# %%
np.testing.assert_allclose(sigma(1.7), 0.8455, atol=5e-5)
np.testing.assert_allclose(score, true_score, atol=0.15)
np.testing.assert_allclose(score.sum(), 0, atol=1e-9)
print("\n01: at P = .01 the slopes are -.99 and -.0099; -log P recovers p at z = 1.7, and three scores within .15")

# %% [markdown]
# ## Solutions
# 1. For -log P, (1 + e^z) dz = dt, so t is the change of z + e^z from z0 = log(.01/.99) to 0: 5.6. For 1 - P,
#    dz/dt = sigma(z) sigma(-z) = 1/(2 + e^z + e^-z), so t is the change of 2z + e^z - e^-z over the same interval:
#    108.2. Counting real steps gives 6 and 110.
# 2. Equal scores, with the sum 3 log 2: there the gradient is 0, and nowhere does the sum curve downwards. Without the
#    third judgement there is no minimum: with the scores r, 0, -r the sum falls towards 0 as r grows, and never gets
#    there.
# 3. The second line sees the winner's new rating. There the win looks less surprising, so the loser loses less than the
#    winner gained. Every game makes points from nothing: 1,313 in the 6000 games. So compute `expected` once, before
#    either rating changes.
# 4. About four times, the square root of sixteen. A game's noise is proportional to the learning rate, but with a small
#    one more games are averaged. So the variance is proportional to the learning rate. For three players and many games
#    the spread comes close to sqrt(learning rate/3) (stated without proof): 0.25 and 0.06 in units of score. In our
#    6000 (after 1500) we measure 0.22 and 0.07, a factor of 3.35: so few measure it roughly, and with 2 the scores are
#    still settling.

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
chain = [2 * loss_and_gradient(np.array([r, 0.0, -r]), w[:2], l[:2])[0] for r in (1, 10, 30)]
assert chain[0] > chain[1] > chain[2] > 0 and chain[2] < 1e-12
print(f"solutions: {steps[0]} and {steps[1]} steps; {3 * minimum:.4f} for the cycle")

rating, sums = np.zeros(3), []
for winner, loser in games:
    for sign, player in ((1, winner), (-1, loser)):
        rating[player] += sign * 32 * sigma((rating[loser] - rating[winner]) / POINTS)
    sums.append(rating.sum())
assert np.all(np.diff(sums) > 0) and 1312 < sums[-1] < 1314

spread = {k_factor: history(k_factor)[1500:].std(axis=0).mean() for k_factor in (32, 2)}
assert [f"{each:.2f}" for each in (*spread.values(), spread[32] / spread[2])] == ["0.22", "0.07", "3.35"]
assert history(2)[1500][0] < 1.35 < 1.5 < at_the_end[2][0]
predicted = {k_factor: math.sqrt(k_factor / POINTS / 3) for k_factor in (32, 2)}
print("spread of Elo's scores: {:.2f} and {:.2f}".format(*spread.values()))
assert [f"{each:.2f}" for each in predicted.values()] == ["0.25", "0.06"]
