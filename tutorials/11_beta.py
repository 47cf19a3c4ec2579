# %% [markdown]
# # 11. What beta does
#
# **Question.** Does a larger beta keep the policy closer to the reference, or move it faster?
#
# **Afterwards you can say**
# - why larger beta moves faster early and stays closer late, and when two runs cross;
# - how to solve the gradient flow of one pair, and how beta only rescales its time and its distance;
# - why certain labels have no optimum, and what the optimum is for labels by chance.
#
# **Predict first.** Two runs start at the reference, with the same learning rate and labels that are certain, one at
# beta 0.5 and one at beta 0.1. Whose log-ratio gap h is larger at time 10? And at time 10,000?
#
# **The formula.** h is the margin, (logp_w - ref_logp_w) - (logp_l - ref_logp_l), of one pair, and t is the learning
# rate times the number of steps. Gradient descent with small steps on the two log-probabilities, taken as two free
# numbers, follows dh/dt = 2 beta sigma(-beta h). With v = beta h, and h = 0 at t = 0:
#
#     v + e^v = 1 + 2 beta^2 t

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
# dL/dlogp_w = -beta sigma(-z) and dL/dlogp_l is the opposite, so a step down the gradient opens h by twice that. Then
# dv/dt = 2 beta^2/(1 + e^v), so (1 + e^v) dv = 2 beta^2 dt, and both sides integrate. Solved for t the answer is
# explicit; for h we bisect. Small steps of gradient descent must land in the same place.


# %%
def time_at(beta, h):
    v = beta * h
    return (v + np.exp(v) - 1) / (2 * beta**2)


def gap_at(beta, t):
    low, high = 0.0, math.log1p(2 * beta**2 * t) / beta  # v >= 0, so e^v <= 1 + 2 beta^2 t
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if time_at(beta, middle) < t else (low, middle)
    return low


def gap_after_steps(beta, steps, rate, p=1.0):  # p: the chance that the label says w
    h = 0.0
    for _ in range(steps):
        sigma = 1 / (1 + math.exp(-beta * h))
        h += 2 * rate * beta * (p * (1 - sigma) - (1 - p) * sigma)
    return h


times = (10, 100, 1000, 10_000)
gaps = {beta: [gap_at(beta, t) for t in times] for beta in betas}
print("log-ratio gap h in nats, certain labels")
print(f"{'beta':>6}" + "".join(f"{f't = {t}':>12}" for t in times))
for beta, row in gaps.items():
    print(f"{beta:6g}" + "".join(f"{h:12.2f}" for h in row))
    np.testing.assert_allclose(gap_after_steps(beta, 1000, 0.1), row[1], rtol=0.01)

# %% [markdown]
# ## The answer to the prediction
#
# At t = 10 the run at beta 0.5 is ahead, at t = 10,000 the run at 0.1. Early, sigma(-beta h) is about 1/2 and dh/dt is
# about beta: larger beta is faster. Late, e^v outgrows v, and h is about log(2 beta^2 t)/beta: larger beta is closer.
# Neither run ends: with certain labels h grows without bound. Two runs cross where they reach the same h at the
# same t.


# %%
def crossing_gap(a, b, low=1e-3, high=1000.0):  # a > b: a needs less time for a small h, more for a large one
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if time_at(a, middle) < time_at(b, middle) else (low, middle)
    return low


crossings = {}
for a, b in ((0.5, 0.1), (0.1, 0.01)):
    h = crossing_gap(a, b)
    crossings[a, b] = time_at(a, h)
    print(f"beta {a:g} and {b:g} cross at t = {crossings[a, b]:.0f}, h = {h:.1f}")

# %% [markdown]
# ## The library's version
#
# `dynamics` solves for h by Newton's method, and takes real gradient steps beside it.

# %%
for beta in betas:
    np.testing.assert_allclose([dynamics.hard_label_gap(beta, t) for t in times], gaps[beta], rtol=1e-9)
for (a, b), t in crossings.items():
    np.testing.assert_allclose(dynamics.crossing(functools.partial(dynamics.lead, a, b), 1.0, 1e5), t, rtol=1e-6)
path = dynamics.gap_path(betas, 1000, 0.1, 1.0)
np.testing.assert_allclose(path[-1], [gap_after_steps(beta, 1000, 0.1) for beta in betas], rtol=1e-9)

# %% [markdown]
# ## Labels by chance: an optimum, at (reward gap)/beta
#
# If w is preferred with probability p = sigma(r), the Bradley-Terry law for a reward gap r, the expected gradient gives
# dh/dt = 2 beta (sigma(r) - sigma(beta h)): it stops at beta h = r. So at the optimum h = r/beta, and small beta ends
# far away. The same holds for every pair of the exact optimum pi* = pi_ref exp(reward/beta)/Z. In the library's small
# world (121 responses, 3 prompts), the minimiser of DPO is pi*; its KL to the reference falls as beta grows.

# %%
r = 1.7
p = 1 / (1 + math.exp(-r))
print(f"\nlabels by chance, reward gap {r}: where the gap ends, and the KL of pi* in a small world")
print(f"{'beta':>6}{'r/beta':>10}{'descent ends at':>18}{'KL(pi*||pi_ref)':>18}")
world = equalities.small_world(0)
wins, reward_gaps = equalities.all_pairs(world), world.reward[:, :, None] - world.reward[:, None, :]
kls = []
for beta in betas:
    end = gap_after_steps(beta, 2000, 0.5 / beta**2, p)  # a rate in proportion to 1/beta^2
    np.testing.assert_allclose(end, r / beta, rtol=1e-6)
    star, _ = exact.optimum(world.ref_logp, world.reward, beta)
    minimiser, _ = equalities.newton(world, wins, beta)
    np.testing.assert_allclose(minimiser, star, rtol=0, atol=1e-8 / beta)
    h = star - world.ref_logp  # (P, N)
    np.testing.assert_allclose(beta * (h[:, :, None] - h[:, None, :]), reward_gaps, rtol=0, atol=1e-9)
    kls.append(exact.kl(star, world.ref_logp).mean())
    print(f"{beta:6g}{r / beta:10.1f}{end:18.1f}{kls[-1]:18.3f}")

# %% [markdown]
# ## One curve for all beta
#
# dv/dt = 2 beta^2 (sigma(r) - sigma(v)) contains beta only in beta^2 t. So h(t) = V(beta^2 t)/beta with one curve V for
# every beta: beta squeezes the time axis by beta^2 and the distance by beta. Certain labels have such a V of their own.
# The picture shows the two crossings.

# %%
panels = []
for until in (200, 10_000):
    t = np.linspace(until / 200, until, 200)
    lines = [plots.Curve(f"beta {beta:g}", t, [gap_at(beta, x) for x in t]) for beta in betas[::-1]]
    panels.append(
        plots.Panel(f"certain labels, to t = {until}", "learning rate * steps", "log-ratio gap h, nats", lines)
    )
picture = pathlib.Path("11_beta.png")
drawn = plots.picture(picture, panels)
print(f"\npicture: {picture.name}" if drawn else "\nthe picture needs matplotlib (the `plot` extra)")

# %% [markdown]
# ## What was shown
#
# Early, h = beta t to first order: larger beta moves faster. At the optimum, where one exists, h = r/beta: larger
# beta stays closer. So "larger beta is more conservative" is true of optima, and late in training, and false of the
# first steps.
#
# ## Exercises
#
# 1. Beta 0.5 and 0.1 cross at the time printed above. From h(t) = V(beta^2 t)/beta alone: when do 0.05 and 0.01 cross?
# 2. All this is plain gradient descent. After a single step from the reference, by what factor is the gap at beta 0.5
#    larger than at beta 0.1? And with Adam?

# %%
assert [f"{h:.2f}" for h in (gaps[0.01][0], gaps[0.1][0], gaps[0.5][0])] == ["0.10", "0.98", "3.01"]
assert [f"{h:.1f}" for h in (gaps[0.01][1], gaps[0.1][1], gaps[0.5][1])] == ["1.0", "7.9", "7.7"]
assert [f"{h:.1f}" for h in (gaps[0.01][2], gaps[0.1][2], gaps[0.5][2])] == ["9.8", "29.0", "12.4"]
assert [f"{h:.0f}" for h in (gaps[0.01][3], gaps[0.1][3], gaps[0.5][3])] == ["79", "53", "17"]
assert abs(crossings[0.5, 0.1] - 95) < 1 and abs(crossings[0.1, 0.01] - 5240) < 5
assert kls == sorted(kls, reverse=True)
print("11: larger beta moved farther at t = 10 and less far at t = 10,000; at the optimum the gap is r/beta")

# %% [markdown]
# ## Solutions
#
# 1. Multiply both betas by a: h_(a beta)(t) = V(a^2 beta^2 t)/(a beta) = h_beta(a^2 t)/a, so that the crossing moves
#    from t to t/a^2. Here a = 1/10: a hundred times later.
# 2. 5, the ratio of the betas, since the first gradient is beta/2. Adam divides each gradient by its own size: 1.

# %%
np.testing.assert_allclose(time_at(0.05, crossing_gap(0.05, 0.01)), 100 * crossings[0.5, 0.1], rtol=1e-9)

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
