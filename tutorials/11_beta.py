# %% [markdown]
# # 11. What beta does
#
# **Question.** Does a larger beta keep the policy closer to the reference, or move it faster?
#
# **Afterwards you can say**
# - why, under gradient descent, larger beta moves faster early and stays closer late, and when two runs cross;
# - how to solve the gradient flow of one pair, and how beta only rescales its time and its distance;
# - why certain labels have no optimum, and where the optimum of Bradley-Terry labels is.
#
# **Predict first.** Two runs start at the reference, one at beta 0.5 and one at beta 0.1. They have the same learning
# rate, and their labels are certain: w always wins. Which run has the larger margin m at time 10? And at time 10,000?
#
# **The formula.** The margin of a pair is m = (logp_w - ref_logp_w) - (logp_l - ref_logp_l), and time t is the learning
# rate times the number of steps. Treat the two log-probabilities of the policy as free numbers. Under gradient descent
# with small steps, dm/dt = 2 beta sigma(-beta m). With z = beta m, and m = 0 at t = 0:
#
#     z + e^z = 1 + 2 beta^2 t

# %%
import functools
import math
import pathlib

import numpy as np

from minidpo import Tensor, exact, losses, optim, plots
from minidpo.theory import dynamics, equalities

betas = (0.01, 0.1, 0.5)

# %% [markdown]
# ## From NumPy alone
#
# dL/dlogp_w is -beta sigma(-z) and dL/dlogp_l is +beta sigma(-z). A step down the gradient raises the one and lowers
# the other, so m grows at twice that rate. For z this reads dz/dt = 2 beta^2/(1 + e^z), or (1 + e^z) dz = 2 beta^2 dt.
# Integrate both sides, and you have the formula. It gives t directly if m is known; for m at a known t we bisect.
# Small steps of gradient descent must arrive at the same place.


# %%
def time_at(beta, m):
    z = beta * m
    return (z + np.exp(z) - 1) / (2 * beta**2)


def margin_at(beta, t):
    low, high = 0.0, math.log1p(2 * beta**2 * t) / beta  # z >= 0, so e^z <= 1 + 2 beta^2 t
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if time_at(beta, middle) < t else (low, middle)
    return low


def margin_after_steps(beta, steps, rate, p=1.0):  # p: the probability that the label says w
    m = 0.0
    for _ in range(steps):
        sigma = 1 / (1 + math.exp(-beta * m))
        m += 2 * rate * beta * (p * (1 - sigma) - (1 - p) * sigma)
    return m


times = (10, 100, 1000, 10_000)
margins = {beta: [margin_at(beta, t) for t in times] for beta in betas}
print("margin m in nats, certain labels")
print(f"{'beta':>6}" + "".join(f"{f't = {t}':>12}" for t in times))
for beta, row in margins.items():
    print(f"{beta:6g}" + "".join(f"{m:12.2f}" for m in row))
    np.testing.assert_allclose(margin_after_steps(beta, 1000, 0.1), row[1], rtol=0.01)

# %% [markdown]
# ## The answer to the prediction
#
# At t = 10 the run at beta 0.5 is ahead; at t = 10,000 the run at beta 0.1 is. Early, sigma(-beta m) is about 1/2, so
# dm/dt is about beta: larger beta is faster. Late, e^z is much larger than z, so m is about log(2 beta^2 t)/beta:
# larger beta is closer. Neither run ends, because with certain labels m grows without bound. Two runs cross where they
# reach the same m at the same t.


# %%
def crossing_margin(a, b, low=1e-3, high=1000.0):  # a > b: a needs less time for a small m, more for a large one
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if time_at(a, middle) < time_at(b, middle) else (low, middle)
    return low


crossings, points = {}, []
for a, b in ((0.5, 0.1), (0.5, 0.01), (0.1, 0.01)):
    m = crossing_margin(a, b)
    crossings[a, b] = time_at(a, m)
    points.append((crossings[a, b], m))
    print(f"beta {a:g} and {b:g} cross at t = {crossings[a, b]:.0f}, m = {m:.1f}")

# %% [markdown]
# ## The library's version
#
# `dynamics` calls the margin the log-ratio gap. It solves for it by Newton's method, and takes real gradient steps
# beside it.

# %%
for beta in betas:
    np.testing.assert_allclose([dynamics.hard_label_gap(beta, t) for t in times], margins[beta], rtol=1e-9)
for (a, b), t in crossings.items():
    np.testing.assert_allclose(dynamics.crossing(functools.partial(dynamics.lead, a, b), 1.0, 1e5), t, rtol=1e-6)
path = dynamics.gap_path(betas, 1000, 0.1, 1.0)
np.testing.assert_allclose(path[-1], [margin_after_steps(beta, 1000, 0.1) for beta in betas], rtol=1e-9)

# %% [markdown]
# ## Bradley-Terry labels: an optimum, at (reward gap)/beta
#
# Now let w be preferred with probability p = sigma(r), as the Bradley-Terry law has it for a reward gap r. The expected
# gradient gives dm/dt = 2 beta (sigma(r) - sigma(beta m)), which is 0 at beta m = r. So at the optimum m = r/beta, and
# a small beta ends far away. The same holds for every pair under the exact optimum pi* = pi_ref exp(reward/beta)/Z.
# The library has a small world of 121 responses and 3 prompts. There the minimiser of DPO is pi*, and its KL to the
# reference falls as beta grows.

# %%
r = 1.7
p = 1 / (1 + math.exp(-r))
print(f"\nBradley-Terry labels, reward gap {r}: where the margin ends, and the KL of pi* in a small world")
print(f"{'beta':>6}{'r/beta':>10}{'descent ends at':>18}{'KL(pi*||pi_ref)':>18}")
world = equalities.small_world(0)
wins, reward_gaps = equalities.all_pairs(world), world.reward[:, :, None] - world.reward[:, None, :]
kls = []
for beta in betas:
    end = margin_after_steps(beta, 2000, 0.5 / beta**2, p)  # a rate in proportion to 1/beta^2
    np.testing.assert_allclose(end, r / beta, rtol=1e-6)
    star, _ = exact.optimum(world.ref_logp, world.reward, beta)
    minimiser, _ = equalities.newton(world, wins, beta)
    np.testing.assert_allclose(minimiser, star, rtol=0, atol=1e-8 / beta)
    log_ratio = star - world.ref_logp  # (prompts, responses)
    pair_margins = log_ratio[:, :, None] - log_ratio[:, None, :]
    np.testing.assert_allclose(beta * pair_margins, reward_gaps, rtol=0, atol=1e-9)
    kls.append(exact.kl(star, world.ref_logp).mean())
    print(f"{beta:6g}{r / beta:10.1f}{end:18.1f}{kls[-1]:18.3f}")

# %% [markdown]
# ## One curve for all beta
#
# dz/dt = 2 beta^2 (sigma(r) - sigma(z)) contains beta only in beta^2 t. So m(t) = f(beta^2 t)/beta. f is one curve for
# each reward gap r, and one for certain labels. Multiplying beta by 10 makes everything happen 100 times sooner, at a
# tenth of the distance. The picture marks the three crossings.

# %%
panels = []
for until in (200, 10_000):
    t = np.linspace(until / 200, until, 200)
    curves = [plots.Curve(f"beta {beta:g}", t, [margin_at(beta, each) for each in t]) for beta in betas[::-1]]
    marks = [each for at, m in points if until / 20 < at < until for each in ((at, 0), (at, m), (math.nan, 0))]
    curves.append(plots.Curve("crossing", *zip(*marks), "o"))
    panels.append(plots.Panel(f"certain labels, to t = {until}", "learning rate * steps", "margin m, nats", curves))
picture = pathlib.Path("11_beta.png")
if plots.picture(picture, panels):
    print(f"\npicture: {picture.name}")
else:
    print("\nthe picture needs matplotlib (the `plot` extra)")

# %% [markdown]
# ## What was shown
#
# Early, m = beta t to first order: larger beta moves faster. At the optimum, where one exists, m = r/beta: larger
# beta stays closer. So "larger beta is more conservative" is true of optima and late in training, and false of the
# first steps of gradient descent. The usual optimizer is AdamW, which divides each gradient by its own size (exercise
# 2). Under it, margins of transformers on the support desk grow equally fast at first, whatever beta, and a larger beta
# still ends closer. `python -m benchmarks.story` measures it: benchmarks/README.md, "The usual story, measured".
#
# ## Exercises
#
# 1. Beta 0.5 and 0.1 cross at the time printed above. From m(t) = f(beta^2 t)/beta alone: when do 0.05 and 0.01 cross?
# 2. Predict, then measure. All this is plain gradient descent. After a single step from the reference, by what factor
#    is the margin at beta 0.5 larger than at beta 0.1? And with Adam?
# 3. Find the bug: somebody sets dm/dt = beta sigma(-beta m), the slope of the loss with respect to the margin. What was
#    forgotten? Which of the crossings printed above move, in t and in m?

# %%
assert [f"{m:.2f}" for m in (margins[0.01][0], margins[0.1][0], margins[0.5][0])] == ["0.10", "0.98", "3.01"]
assert [f"{m:.1f}" for m in (margins[0.01][1], margins[0.1][1], margins[0.5][1])] == ["1.0", "7.9", "7.7"]
assert [f"{m:.1f}" for m in (margins[0.01][2], margins[0.1][2], margins[0.5][2])] == ["9.8", "29.0", "12.4"]
assert [f"{m:.0f}" for m in (margins[0.01][3], margins[0.1][3], margins[0.5][3])] == ["79", "53", "17"]
assert [round(t) for t in crossings.values()] == [95, 1345, 5243]
assert kls == sorted(kls, reverse=True)
print("11: larger beta moved farther at t = 10 and less far at t = 10,000; at the optimum the margin is r/beta")

# %% [markdown]
# ## Solutions
#
# 1. Divide both betas by 10: 10 f(beta^2 t/100)/beta is 10 times the margin that beta has at time t/100. So the
#    crossing comes at 100 t, a hundred times later.
# 2. Plain gradient descent: 5, the ratio of the betas, because the first gradient is beta/2. Adam: 1, because its first
#    step divides each gradient by that gradient's own size.
# 3. The margin is a difference of two log-probabilities, and both move: one up, one down. With half the speed every
#    time doubles, so the crossings are at twice the t and at the same m.

# %%
np.testing.assert_allclose(time_at(0.05, crossing_margin(0.05, 0.01)), 100 * crossings[0.5, 0.1], rtol=1e-9)

first = {}
for name, make in (("SGD", optim.SGD), ("Adam", functools.partial(optim.AdamW, weight_decay=0.0))):
    for beta in (0.5, 0.1):
        logps = {side: Tensor(np.array([-5.0]), requires_grad=True) for side in "wl"}
        optimizer = make(logps, 0.01)
        out = losses.dpo_loss(logps["w"], logps["l"], np.array([-5.0]), np.array([-5.0]), beta)
        out.loss.backward()
        optimizer.step()
        first[name, beta] = (logps["w"].data - logps["l"].data).item()
np.testing.assert_allclose(first["SGD", 0.5] / first["SGD", 0.1], 5, rtol=1e-9)
np.testing.assert_allclose(first["Adam", 0.5] / first["Adam", 0.1], 1, rtol=1e-5)

m = 0.0
for _ in range(20_000):  # to twice the time of the first crossing
    m += 2 * crossings[0.5, 0.1] / 20_000 * 0.5 / (1 + math.exp(0.5 * m))
np.testing.assert_allclose(m, crossing_margin(0.5, 0.1), rtol=1e-3)
