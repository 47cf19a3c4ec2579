# %% [markdown]
# # 08. From RLHF to DPO
#
# **Question.** How does a reinforcement learning problem with a learned reward become a loss on pairs?
#
# RLHF is reinforcement learning from human feedback. It has two stages: fit a reward r to people's choices between
# replies, then train a policy to earn that reward without moving far from a reference. The penalty for moving is a KL
# divergence. Without it the policy can drift to replies on which the fitted reward is wrong. DPO puts one loss in the
# place of both stages. In this script the reward is chosen, not learned, so that we know the answer and can check it.
#
# **Afterwards you can say**
# - how to derive pi*, the policy that maximises E[r] - beta KL(pi || pi_ref), and how much any other policy loses
# - why Z(x), a sum over all possible replies, is not needed
# - under which four assumptions the minimiser of the DPO loss is pi*, and what happens when one of them fails
#
# **Predict first.** The rewards of two replies differ by 1.7. By how many nats is log pi(y_w|x) - log pi(y_l|x) larger
# under the optimal policy than under the reference, at beta = 0.1 and at beta = 0.5? What do you have to know about the
# other replies to say so?
#
# **The formula.** r(x, y) is the reward of reply y to prompt x; below, the prompt is fixed. The log-ratio of a reply is
# h = log(pi/pi_ref), so the margin is h_w - h_l, and z = beta (h_w - h_l). The divergence is
# KL(pi || pi_ref) = sum_y pi log(pi/pi_ref).
#
#     P(w preferred to l) = sigma(r_w - r_l)                            Bradley-Terry
#     J(pi)  = E_pi[r] - beta KL(pi || pi_ref)                          what RLHF maximises, for each prompt
#     pi*(y) = pi_ref(y) exp(r(y)/beta)/Z,   Z = sum_y pi_ref(y) exp(r(y)/beta)
#     r(y)   = beta log(pi*(y)/pi_ref(y)) + beta log Z                  the line above, solved for r
#     L(pi)  = -mean log sigma(z)                                       Bradley-Terry with beta h in place of r

# %%
import pathlib

import numpy as np

from minidpo import Tensor, exact, ops, plots
from minidpo.streams import stream
from minidpo.theory.assumptions import what_breaks_it
from minidpo.theory.equalities import all_pairs, newton, pair_loss, reparametrisation, sampled_wins, small_world

# %% [markdown]
# ## From NumPy alone
# Two prompts with four replies each: everything can be summed. The reference is random, the rewards are chosen.

# %%
rng = np.random.default_rng(0)


def log_softmax(s):
    return s - np.log(np.exp(s).sum(axis=-1, keepdims=True))


def kl(logp, logq):
    return (np.exp(logp) * (logp - logq)).sum(axis=-1)


def objective(logp, ref_logp, reward, beta):  # J
    return (np.exp(logp) * reward).sum(axis=-1) - beta * kl(logp, ref_logp)


def optimum(ref_logp, reward, beta):  # log pi*, log Z
    tilted = ref_logp + reward / beta
    log_z = np.log(np.exp(tilted).sum(axis=-1))
    return tilted - log_z[..., None], log_z


def differences(r):  # r_i - r_j for all ordered pairs
    return r[..., :, None] - r[..., None, :]


def sigma(z):
    return 1 / (1 + np.exp(-z))


def equal(claim, left, right):
    np.testing.assert_allclose(left, right, rtol=1e-9, atol=1e-9)
    print(f"  equal to 1e-9   {claim}")


beta = 0.5
reward = np.array([[1.7, 0.0, -0.5, 0.8], [-1.0, 0.4, 1.2, 0.1]])
ref_logp = log_softmax(rng.normal(size=(2, 4)))
star, log_z = optimum(ref_logp, reward, beta)

# %% [markdown]
# ## Why pi* is the optimum
# Put both terms of J under one logarithm:
#
#     J(pi) = sum_y pi (r - beta log(pi/pi_ref)) = -beta sum_y pi log(pi / (pi_ref exp(r/beta)))
#
# This looks like a KL divergence, but pi_ref exp(r/beta) does not sum to 1. Divide it by its sum, Z, and call the
# result pi*:
#
#     J(pi) = -beta sum_y pi log(pi / (Z pi*)) = beta log Z - beta KL(pi || pi*)
#
# A KL divergence is 0 where its arguments are equal, and positive elsewhere. The reason is that log u <= u - 1, with
# equality only at u = 1: -KL(pi || pi*) = sum_y pi log(pi*/pi) <= sum_y pi (pi*/pi - 1) = 0. So pi* is the only
# maximum, and J(pi*) = beta log Z. The formula also says how much any other policy loses: beta KL(pi || pi*).

# %%
print("Two prompts, four replies, beta 0.5 (NumPy)")
policies = log_softmax(3 * rng.normal(size=(1000, 2, 4)))
equal("sum of pi* over the replies = 1", np.exp(star).sum(axis=-1), 1)
equal("J(pi*) = beta log Z", objective(star, ref_logp, reward, beta), beta * log_z)
shortfall = beta * log_z - objective(policies, ref_logp, reward, beta)
equal("J(pi*) - J(pi) = beta KL(pi || pi*), 1000 policies", shortfall, beta * kl(policies, star))
assert kl(policies, star).min() > 0
implicit = beta * (star - ref_logp)
equal("r = beta log(pi*/pi_ref) + beta log Z", reward, implicit + beta * log_z[:, None])
equal("r_i - r_j = beta h_i - beta h_j: Z cancels", differences(reward), differences(implicit))
assert abs(log_z[0] - log_z[1]) > 0.1  # it cancels, though it differs from prompt to prompt

# %% [markdown]
# ## The loss
# Z belongs to the prompt, and both replies of a pair answer the same prompt. So the probability of a label can be
# written with the policy alone. DPO takes the policy under which the labels are likeliest. Here every pair is labelled
# with its exact probability: labels[x, i, j] = sigma(r_i - r_j). The policy is a table, theta, with one logit for each
# reply; the weight of a label in the mean is share_ij.
#
#     L = -sum_ij share_ij log sigma(z_ij),   z_ij = beta (h_i - h_j),   h = log_softmax(theta) - log pi_ref
#     dL/dtheta_i = dL/dh_i = -beta sum_j (share_ij sigma(-z_ij) - share_ji sigma(-z_ji))
#
# The two derivatives are equal because the normaliser of log_softmax cancels in every h_i - h_j. At pi* each z_ij is
# r_i - r_j, so share_ij sigma(-z_ij) is proportional to sigma(r_i - r_j) sigma(r_j - r_i). That is the same for (i, j)
# and (j, i): the gradient is 0.

# %%
off_diagonal = 1 - np.eye(4)
labels = sigma(differences(reward)) * off_diagonal
certain = (differences(reward) > 0) * 1.0  # the better reply is preferred every time


def loss_gradient(theta, labels):
    share = labels / (len(labels) * labels.sum(axis=(1, 2), keepdims=True))
    pull = share * sigma(-beta * differences(theta - ref_logp))  # (2, 4, 4)
    return -beta * (pull.sum(axis=2) - pull.sum(axis=1))


def policies_of_descent(labels, counts):
    theta, path = ref_logp, []
    for step in range(1, counts[-1] + 1):
        theta = theta - 12 / beta**2 * loss_gradient(theta, labels)  # the curvature is at most beta^2/12
        if step in counts:
            path.append(log_softmax(theta))
    return path


equal("dL/dtheta = 0 at pi*", loss_gradient(star, labels), 0)
counts = (1, 3, 10, 30, 100, 300, 1000, 3000, 10000)
by_exact, by_certain = policies_of_descent(labels, counts), policies_of_descent(certain, counts)
equal("gradient descent on the pairs ends at pi*", by_exact[-1], star)

# %% [markdown]
# ## The answer to the prediction
# At the optimum z = beta * margin = r_w - r_l, so the margin is (r_w - r_l)/beta: 17 nats at beta 0.1 and 3.4 at 0.5. A
# smaller beta ends further from the reference. You need to know nothing about the other replies: Z is gone.

# %%
for b, gap in ((0.1, 17.0), (0.5, 3.4)):
    h = optimum(ref_logp, reward, b)[0] - ref_logp
    equal(f"beta {b}: the margin of a reward gap of 1.7 is {gap:g} nats", h[0, 0] - h[0, 1], gap)

# %% [markdown]
# ## The library's version
# `exact` has the same functions. `equalities.small_world` is larger: three prompts, all 121 responses of at most four
# tokens over three characters, and a reference that is a transformer.

# %%
world = small_world(0)
theirs, theirs_z = exact.optimum(world.ref_logp, world.reward, beta)
print(f"\nA larger world: {world.reward.shape[0]} prompts, {world.reward.shape[1]} responses, beta 0.5")
equal("log pi*, by hand and exact.optimum", optimum(world.ref_logp, world.reward, beta)[0], theirs)
equal("J(pi*), by hand and exact.objective", objective(theirs, world.ref_logp, world.reward, beta), beta * theirs_z)
theta = Tensor(policies[0], requires_grad=True)
pair_loss(ops.log_softmax(theta), ref_logp, labels, beta).backward()
equal("dL/dtheta, by hand and autograd", loss_gradient(policies[0], labels), theta.grad)
fitted, steps = newton(world, all_pairs(world), beta)
equal(f"the minimiser of the DPO loss ({steps} Newton steps) is pi*", exact.total_variation(fitted, theirs), 0)
for claim in reparametrisation(world, 0):
    assert claim.holds, claim

# %% [markdown]
# ## Four assumptions
# 1. The labels are drawn from Bradley-Terry probabilities.
# 2. There are enough pairs.
# 3. The reference has full support: where pi_ref is 0, pi* is 0, whatever the reward.
# 4. The policy class contains pi*.
#
# Drop the first: let the better reply be preferred every time. Take a policy that ranks the replies of each prompt by h
# as the reward does, and multiply all its h_i - h_j by a number above 1. For every label z grows, and the loss falls.
# The loss comes as near to 0 as you like, and no policy attains 0, whatever beta is.
#
# When does a finite minimiser exist, if the policy is a free table? Draw an arrow from each reply to those it was
# preferred to. Comparisons link replies into groups. A finite minimiser exists if and only if, within each group, you
# can follow arrows from any reply to any other. Its h is unique up to a constant per group. Below, replies 0 and 1 form
# one group and 2 and 3 another: the loss is convex, its gradient is 0 at finite rewards, and still 0 when one group
# rises by 5.
#
# The 300 sampled pairs fail this test too. Some reply lost every comparison, so no arrow leaves it. Their row in the
# last table is therefore a snapshot and names its steps, as is the row of certain labels.
#
# The distances there are to pi* of the unbroken world. Where support is missing, the minimiser is still pi*, but of the
# reference that lacks it. Two transformers miss pi*, one for its size, the other because training was too brief.

# %%
gaps = {
    name: [float((logp - ref_logp)[0, 0] - (logp - ref_logp)[0, 1]) for logp in path]
    for name, path in (("exact probabilities", by_exact), ("certain labels", by_certain))
}
print("\nMargin of the pair with reward gap 1.7, after N steps of descent")
print(f"{'N':<20}" + "".join(f"{count:>9}" for count in counts[::2]))
for name, gap in gaps.items():
    print(f"{name:<20}" + "".join(f"{g:9.2f}" for g in gap[::2]))
cycle = np.roll(np.eye(3), 1, axis=1)  # 0 preferred to 1, 1 to 2, 2 to 0
assert exact.has_maximum(labels[0]) and exact.has_maximum(cycle) and not exact.has_maximum(certain[0])

islands = np.zeros((1, 4, 4))  # 0 and 1 compared both ways, 2 and 3 both ways, nothing across
islands[0, [0, 1, 2, 3], [1, 0, 3, 2]] = 1, 3, 2, 1
assert exact.has_maximum(islands[0])
for shift in (0, 5):
    rewards = np.array([0, np.log(3), np.log(2) + shift, shift])
    np.testing.assert_allclose(loss_gradient(ref_logp + rewards / beta, islands), 0, atol=1e-12)

for wins in sampled_wins(world, stream(0, "pairs"), 300):  # the same 300 as below
    assert not exact.has_maximum(wins) and ((wins.sum(axis=1) == 0) & (wins.sum(axis=0) > 0)).any()

print("\nThe larger world: total variation to pi*, half the sum of |pi - pi*|")
distance = {row.name: row.tv for row in what_breaks_it(world, 0, steps=300)}
cases = {
    "DPO, nothing broken": "nothing",
    "DPO, labels without noise, 300 steps": "1, labels are certain, 300 steps",
    "DPO, 30% of labels flipped": "1, three in ten are flipped",
    "DPO, 300 sampled pairs a prompt, 300 steps": "2, 300 pairs a prompt, 300 steps",
    "DPO, a reference without support for the ten best": "3, ten best: next to no pi_ref",
    "DPO, transformer of width 4, 1200 steps: too small": "4, a tiny transformer, 1200 steps",
    "DPO, transformer of width 32, 100 steps: too brief": "-, a large one, 100 steps",
}
for name, what in cases.items():
    print(f"  {what:<36}{distance[name]:8.3f}")
path = pathlib.Path("08_from_rlhf_to_dpo.png")
curves = [plots.Curve(name, counts, gap, "o") for name, gap in gaps.items()]
panel = plots.Panel("Certain labels have no minimiser", "step", "margin, nats", curves, "log")
if plots.picture(path, [panel]):
    print(f"\nThe margins are drawn in {path.name}.")
else:
    print("\nA picture needs matplotlib (the `plot` extra).")

# %% [markdown]
# ## What was shown
# Each step from RLHF to DPO is an equality, checked on every reply of a small world. DPO's minimiser is RLHF's optimum
# under the four assumptions. Where one of them fails, the minimiser may be another policy, or may not exist.
#
# ## Exercises
# 1. Predict: all rewards of one prompt rise by 7. What happens to the label probabilities, Z, pi* and beta h?
# 2. Compute by hand: pi_ref = (1/2, 1/4, 1/4), r = (0, log 2, log 4), beta = 1. What are Z, pi* and J(pi*)?

# %%
assert abs(by_exact[-1] - star).max() < 1e-9 and gaps["certain labels"][-1] > gaps["certain labels"][-2] > 3.4 + 5
assert distance["DPO, nothing broken"] < 1e-3 and min(distance[name] for name in list(cases)[1:]) > 0.01
print("08: with Bradley-Terry labels the minimiser of the DPO loss is pi*; with certain labels none exists.")

# %% [markdown]
# ## Solutions
# 1. The label probabilities, pi* and beta h stay the same; Z is multiplied by exp(7/beta). So preferences cannot tell
#    r(x, y) from r(x, y) + f(x).
# 2. pi_ref exp(r) = (1/2, 1/2, 1), so Z = 2, pi* = (1/4, 1/4, 1/2) and J(pi*) = log 2.

# %%
risen, risen_z = optimum(ref_logp, reward + np.array([[7.0], [0.0]]), beta)
np.testing.assert_allclose(risen, star, rtol=1e-12, atol=1e-12)
np.testing.assert_allclose(risen_z - log_z, [7 / beta, 0], rtol=1e-12, atol=1e-12)
by_hand, by_hand_z = optimum(np.log([0.5, 0.25, 0.25]), np.log([1.0, 2.0, 4.0]), 1.0)
np.testing.assert_allclose(np.exp(by_hand), [0.25, 0.25, 0.5], rtol=1e-12)
np.testing.assert_allclose(by_hand_z, np.log(2), rtol=1e-12)
