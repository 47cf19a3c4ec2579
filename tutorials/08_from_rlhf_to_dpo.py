# %% [markdown]
# # 08. From RLHF to DPO, first half: the optimum
#
# **Question.** A policy should earn a learned reward and stay near a reference. Which policy is best, and how would one
# find it?
#
# RLHF is reinforcement learning from human feedback. It has two stages: fit a reward r to people's choices between
# replies, then train a policy to earn that reward without moving far from a reference. The penalty for moving is a KL
# divergence. Without it the policy can drift to replies on which the fitted reward is wrong. DPO puts one loss in the
# place of both stages. This half ends at the closed form of the best policy. The second half,
# `08_the_loss_on_pairs.py`, makes a loss of it.
#
# **Afterwards you can say**
# - how a reward is learned from choices, and what choices cannot tell about it
# - how to find pi*, the policy that maximises E[r] - beta KL(pi || pi_ref), and how to prove that it is the only one
# - how far any other policy falls short of it
# - what becomes of pi* without the penalty, and without the reference
#
# **Predict first.** The rewards of two replies differ by 1.7. By how many nats is log pi(y_w|x) - log pi(y_l|x) larger
# under the optimal policy than under the reference, at beta = 0.1 and at beta = 0.5? What do you have to know about the
# other replies to say so?
#
# **The formula.** r(x, y) is the reward of reply y to prompt x; below, the prompt is fixed. The log-ratio of a reply is
# log(pi/pi_ref), so the margin of a pair is the log-ratio of w minus that of l.
#
#     P(w preferred to l) = sigma(r_w - r_l)                                  Bradley-Terry
#     KL(pi || pi_ref)    = sum_y pi log(pi/pi_ref)                           in nats
#     J(pi)  = E_pi[r] - beta KL(pi || pi_ref)                                what RLHF maximises, for each prompt
#     pi*    = the policy with the largest J                                  found below

# %%
import pathlib

import numpy as np

from minidpo import exact, losses, plots
from minidpo.theory import ppo
from minidpo.theory.equalities import constrained_objective, small_world

# %% [markdown]
# ## From NumPy alone: learn a reward
# Two prompts with four replies each: everything can be summed. The reference is random. The true rewards are chosen by
# us, so that we know what should be learned; the learner sees only choices. People compare each pair of replies 2,000
# times. wins[x, i, j] is how often reply i was preferred to reply j.

# %%
rng = np.random.default_rng(0)


def log_softmax(s):
    return s - np.log(np.exp(s).sum(axis=-1, keepdims=True))


def sigma(z):
    return 1 / (1 + np.exp(-z))


def differences(r):  # r_i - r_j for all ordered pairs
    return r[..., :, None] - r[..., None, :]


beta = 0.5
reward = np.array([[1.7, 0.0, -0.5, 0.8], [-1.0, 0.4, 1.2, 0.1]])
ref_logp = log_softmax(rng.normal(size=(2, 4)))
upper = np.triu(np.ones((4, 4), dtype=int), 1)
wins = rng.binomial(2000 * upper, sigma(differences(reward)))
wins = wins + np.swapaxes(2000 * upper - wins, 1, 2)  # what i did not win, j won

# %% [markdown]
# Take the rewards under which these choices are likeliest. The choices are independent, so their log-likelihood is a
# sum, and minus its mean is the loss of the reward model:
#
#     L(r) = -(1/n) sum_ij wins_ij log sigma(r_i - r_j)             n choices
#     d(-log sigma(z))/dz = -sigma(-z)                              tutorial 01, with z = r_i - r_j
#     dL/dr_i = -(1/n) sum_j (wins_ij sigma(r_j - r_i) - wins_ji sigma(r_i - r_j))
#
# r_i appears where reply i won, with derivative 1, and where it lost, with derivative -1. To read the result, put
# sigma(r_j - r_i) = 1 - sigma(r_i - r_j) into it:
#
#     dL/dr_i = -(1/n) sum_j (wins_ij - (wins_ij + wins_ji) sigma(r_i - r_j))
#
# The bracket compares the number of wins with the number that the rewards expect. At the best rewards each reply has as
# many wins in all as the rewards expect. And the sum of dL/dr_i over i is 0, since each choice has a winner and a
# loser: adding a constant to all rewards of a prompt changes nothing, so choices cannot tell it. The second half says
# when finite best rewards exist ("Four assumptions").


# %%
def reward_loss(r):
    return -(wins * np.log(sigma(differences(r)))).sum() / wins.sum()


def reward_gradient(r):
    expected = (wins + np.swapaxes(wins, 1, 2)) * sigma(differences(r))
    return -(wins - expected).sum(axis=2) / wins.sum()


at, eps = rng.normal(size=reward.shape), 1e-6
for place in np.ndindex(reward.shape):  # the derivation, against a central difference
    bump = eps * (np.arange(8).reshape(2, 4) == 4 * place[0] + place[1])
    slope = (reward_loss(at + bump) - reward_loss(at - bump)) / (2 * eps)
    np.testing.assert_allclose(reward_gradient(at)[place], slope, rtol=0, atol=1e-9)
np.testing.assert_allclose(reward_gradient(at).sum(axis=1), 0, atol=1e-15)
learned = np.zeros_like(reward)
for _ in range(500):  # enough small steps for a gradient of 0
    learned = learned - 4 * reward_gradient(learned)
np.testing.assert_allclose(reward_gradient(learned), 0, atol=1e-12)
centred = reward - reward.mean(axis=1, keepdims=True)
print("a reward learned from 2,000 choices for each pair; both with mean 0 for each prompt")
print(f"{'prompt, reply':<16}" + "".join(f"{f'{x}, {y}':>8}" for x in range(2) for y in range(4)))
for name, r in (("true reward", centred), ("learned", learned)):
    print(f"{name:<16}" + "".join(f"{each:8.3f}" for each in r.ravel()))
assert abs(learned - centred).max() < 0.1

# %% [markdown]
# ## Find pi*: a Lagrange multiplier
# Now the second stage, for a given r. How would one find the best policy without knowing the answer? A policy is a
# list of numbers pi(y) whose sum is 1. Let pi_ref(y) > 0 for every reply: where it is 0, pi must be, or the KL is
# infinite. To maximise J under the condition on the sum, add it with a multiplier, lambda, and set the derivative with
# respect to each pi(y) to 0:
#
#     J(pi) + lambda (1 - sum_y pi(y)),   J(pi) = sum_y pi (r - beta log pi + beta log pi_ref)
#     r - beta log pi - beta + beta log pi_ref - lambda = 0      product rule: pi d(log pi)/dpi = 1 gives the -beta
#     log pi = log pi_ref + r/beta - (1 + lambda/beta)           solved for log pi
#     pi = pi_ref exp(r/beta) exp(-(1 + lambda/beta))            the last factor is the same for every y
#
# The sum over y must be 1. So the last factor is 1/Z(x), where Z(x) = sum_y pi_ref exp(r/beta) differs from prompt to
# prompt. The result is
#
#     pi*(y) = pi_ref(y) exp(r(y)/beta)/Z(x)
#
# Now you can see where its parts come from: pi_ref and 1/beta from the KL, exp from the derivative of pi log pi, and
# Z(x) from the condition. No pi(y) can be negative, as an exponential is positive.
#
# Check: at pi*, and only there, r - beta log(pi/pi_ref) - beta must be the same number, lambda, for every reply.


# %%
def kl(logp, logq):
    return (np.exp(logp) * (logp - logq)).sum(axis=-1)


def objective(logp, ref_logp, reward, beta):  # J
    return (np.exp(logp) * reward).sum(axis=-1) - beta * kl(logp, ref_logp)


def optimum(ref_logp, reward, beta):  # log pi*, log Z
    tilted = ref_logp + reward / beta
    log_z = np.log(np.exp(tilted).sum(axis=-1))
    return tilted - log_z[..., None], log_z


star, log_z = optimum(ref_logp, reward, beta)
multiplier = reward - beta * (star - ref_logp) - beta
np.testing.assert_allclose(multiplier, np.tile(beta * log_z[:, None] - beta, 4), rtol=1e-12, atol=1e-12)
of_reference = reward - beta * (ref_logp - ref_logp) - beta
assert np.ptp(of_reference, axis=1).min() > 1  # not at the reference

# %% [markdown]
# ## Prove it: the worksheet
# A derivative of 0 could also be a minimum or a saddle point. The proof needs no calculus. Take a sheet of paper. Each
# text below asks for the next line and gives its licence: the reason why it is allowed. Write the line yourself. The
# cell below it prints the line and checks it on 1,000 random policies.
#
# Line 1 is given: J(pi) = E_pi[r] - beta KL(pi || pi_ref). **Line 2**, by the definitions of E and KL: one sum over y.

# %%
policies = log_softmax(3 * rng.normal(size=(1000, 2, 4)))  # log pi
pi, pi_ref, pi_star, Z = np.exp(policies), np.exp(ref_logp), np.exp(star), np.exp(log_z)
J = objective(policies, ref_logp, reward, beta)


def line(number, formula, licence, left, right):
    np.testing.assert_allclose(left, right, rtol=1e-9, atol=1e-9)
    print(f"  {number:<3}{formula:<62}{licence}")


print("\nthe worksheet, first half (both sides of each line agree to within 1e-9)")
line(1, "J(pi) = E_pi[r] - beta KL(pi || pi_ref)", "given", J, exact.objective(policies, ref_logp, reward, beta))
line(2, "= sum_y pi (r - beta log(pi/pi_ref))", "definition", J, (pi * (reward - beta * np.log(pi / pi_ref))).sum(-1))

# %% [markdown]
# **Line 3**, by algebra: r is beta log exp(r/beta). Put everything under one logarithm, with -beta before the sum.

# %%
one_log = np.log(pi / (pi_ref * np.exp(reward / beta)))
line(3, "= -beta sum_y pi log(pi / (pi_ref exp(r/beta)))", "algebra", J, -beta * (pi * one_log).sum(-1))

# %% [markdown]
# This looks like a KL divergence, but pi_ref exp(r/beta) does not sum to 1. **Line 4**, by the definition of Z(x) and
# pi*: write it as something that does, times a number.

# %%
one_log = np.log(pi / (Z[:, None] * pi_star))
line(4, "= -beta sum_y pi log(pi / (Z(x) pi*))", "definition", J, -beta * (pi * one_log).sum(-1))

# %% [markdown]
# **Line 5**, by algebra: take Z(x) out of the sum. (What is sum_y pi?) This step is called completing the KL.

# %%
line(5, "= beta log Z(x) - beta KL(pi || pi*)", "algebra; pi sums to 1", J, beta * log_z - beta * kl(policies, star))

# %% [markdown]
# **Line 6**, by Gibbs' inequality: what is the largest J, and for which pi? The inequality says that KL(p || q) >= 0,
# and is 0 only for p = q. Its proof is one line, from log(ratio) <= ratio - 1, where equality holds only at ratio = 1:
#
#     -KL(pi || pi*) = sum_y pi log(pi*/pi) <= sum_y pi (pi*/pi - 1) = sum_y pi* - sum_y pi <= 0
#
# The sums are over the y with pi(y) > 0; the others add nothing to the KL, since p log p goes to 0 with p. If these are
# all replies, the last sign is an equality. If not, pi* gives the others something, and sum_y pi* < 1.

# %%
largest = objective(star, ref_logp, reward, beta)
line(6, "<= beta log Z(x), with equality only at pi = pi*", "Gibbs' inequality", largest, beta * log_z)
ratio = pi_star / pi
assert (np.log(ratio) <= ratio - 1).all() and kl(policies, star).min() > 0  # Gibbs' inequality, and its reason
np.testing.assert_allclose((pi * (ratio - 1)).sum(axis=-1), 0, atol=1e-9)
assert (J < beta * log_z).all()

# %% [markdown]
# Line 5 also says how far any other policy falls short: by beta KL(pi || pi*). **Line 7**, by taking logs of the
# definition of pi*, and **line 8**, by algebra: solve line 7 for r. Which reward belongs to a given optimal policy?

# %%
line(7, "log pi* = log pi_ref + r/beta - log Z(x)", "definition", star, ref_logp + reward / beta - log_z[:, None])
line(8, "r = beta log(pi*/pi_ref) + beta log Z(x)", "algebra", reward, beta * (star - ref_logp) + beta * log_z[:, None])

# %% [markdown]
# ## The answer to the prediction
# Line 8 for w minus line 8 for l: r_w - r_l = beta * margin, as Z(x) is gone. So at the optimum the margin is
# (r_w - r_l)/beta: 17 nats at beta 0.1 and 3.4 at 0.5. A smaller beta ends further from the reference. You need to know
# nothing about the other replies.

# %%
for each, nats in ((0.1, 17.0), (0.5, 3.4)):
    log_ratio = optimum(ref_logp, reward, each)[0] - ref_logp
    np.testing.assert_allclose(log_ratio[0, 0] - log_ratio[0, 1], nats, rtol=1e-9)
    print(f"beta {each}: the margin of two replies whose rewards differ by 1.7 is {nats:g} nats")

# %% [markdown]
# ## Take a term away
# - No penalty: J = E_pi[r] is linear in pi. Its maximum gives everything to the reply with the highest r, however
#   unlikely it was. As beta goes to 0, pi* tends to that.
# - No reference: the penalty is beta E_pi[log pi], and the same lines give pi = exp(r/beta)/sum_y exp(r/beta). A reply
#   that the reference hardly ever gives now counts like any other with its reward.
# - No reward: J = -beta KL(pi || pi_ref), and pi* = pi_ref.
#
# Why this matters: the reward is learned, and may be wrong where there were no choices. Below, reply 3 is rubbish. The
# reference gives it once in a hundred times, so nobody compared it, and the reward model rates it highest.

# %%
skewed = np.log([0.45, 0.30, 0.24, 0.01])
true, rated = np.array([1.7, 0.0, -0.5, -1.0]), np.array([1.7, 0.0, -0.5, 3.0])
cases = {
    "reference": skewed,
    "beta 2": optimum(skewed, rated, 2.0)[0],
    "beta 0.5": optimum(skewed, rated, 0.5)[0],
    "beta 0.05: hardly any": optimum(skewed, rated, 0.05)[0],
    "no reference, beta 2": log_softmax(rated / 2.0),
    "no reward": optimum(skewed, 0 * rated, 0.5)[0],
}
print("\npi* of a reward that overrates reply 3")
print(f"{'':<22}" + "".join(f"{f'reply {y}':>9}" for y in range(4)) + f"{'rated E[r]':>12}{'true E[r]':>11}{'KL':>8}")
for name, logp in cases.items():
    p = np.exp(logp)
    print(f"{name:<22}" + "".join(f"{each:9.3f}" for each in p), end="")
    print(f"{p @ rated:12.3f}{p @ true:11.3f}{kl(logp, skewed):8.3f}")
assert np.exp(cases["beta 0.05: hardly any"])[3] > 0.999
np.testing.assert_allclose(cases["no reward"], skewed, rtol=1e-12)
uniform = np.full(4, -np.log(4))  # no reference is a uniform reference
np.testing.assert_allclose(cases["no reference, beta 2"], optimum(uniform, rated, 2.0)[0], rtol=1e-12)
assert np.exp(cases["beta 2"]) @ true > np.exp(skewed) @ true > np.exp(cases["no reference, beta 2"]) @ true

# %% [markdown]
# ## The library's version
# `ppo.reward_loss` is the loss of a reward model and `exact.fitted_rewards` its minimum by Newton's method. `exact` has
# J and pi*. `constrained_objective` repeats the proof on a larger world: three prompts, 121 replies of at most four
# tokens, and a reference that is a transformer. The last line prints a total variation, half the sum of |pi - pi*|: 0
# if two policies are equal, 1 if they share nothing.

# %%
x, i, j = np.nonzero(wins)
votes = wins[x, i, j] / wins.sum()
each = np.array([ppo.reward_loss(at[[prompt], [w]], at[[prompt], [l]]).item() for prompt, w, l in zip(x, i, j)])
np.testing.assert_allclose(votes @ each, reward_loss(at), rtol=1e-12)
by_pair, _ = ppo.reward_gradient(at[x, i], at[x, j])  # divided by the number of pairs, each counted once
by_reply = np.zeros_like(at)
np.add.at(by_reply, (x, i), votes * by_pair * len(x))
np.add.at(by_reply, (x, j), -votes * by_pair * len(x))
np.testing.assert_allclose(by_reply, reward_gradient(at), rtol=1e-9)
np.testing.assert_allclose([exact.fitted_rewards(each)[0] for each in wins], learned, rtol=0, atol=1e-9)
as_dpo = losses.dpo_loss(at[:, 0], at[:, 1], 0 * at[:, 0], 0 * at[:, 1], beta=1.0).loss
np.testing.assert_allclose(as_dpo.item(), ppo.reward_loss(at[:, 0], at[:, 1]).item(), rtol=1e-12)
world = small_world(0)
theirs, theirs_z = exact.optimum(world.ref_logp, world.reward, beta)
np.testing.assert_allclose(optimum(world.ref_logp, world.reward, beta)[0], theirs, rtol=1e-9)
np.testing.assert_allclose(objective(theirs, world.ref_logp, world.reward, beta), beta * theirs_z, rtol=1e-9)
for claim in constrained_objective(world, 0):
    assert claim.holds, claim
tv = exact.total_variation(exact.optimum(ref_logp, learned, beta)[0], star)
print(f"\npi* of the learned reward is within total variation {tv.max():.3f} of pi* of the true one")
assert tv.max() < 0.05

# %%
betas = np.geomspace(0.05, 20, 80)
over = np.exp([optimum(skewed, rated, each)[0] for each in betas])  # (80, 4)
names = ["reply 0, the best", "reply 1", "reply 2", "reply 3, overrated"]
curves = [plots.Curve(names[y], betas, over[:, y]) for y in range(4)]
path = pathlib.Path("08_from_rlhf_to_dpo.png")
panel = plots.Panel("pi* from the highest reward to the reference", "beta", "probability", curves, "log")
if plots.picture(path, [panel]):
    print(f"pi* over beta is drawn in {path.name}.")
else:
    print("A picture needs matplotlib (the `plot` extra).")

# %% [markdown]
# ## What was shown
# Choices give rewards up to a constant for each prompt. A multiplier finds pi*, Gibbs' inequality proves that it is the
# only maximum. Any other policy falls short of J(pi*) by beta KL(pi || pi*). The constant that choices cannot tell goes
# into Z(x), and pi* does not depend on it.
#
# ## Exercises
# 1. Compute by hand: pi_ref = (1/2, 1/4, 1/4), r = (0, log 2, log 4), beta = 1. What are Z(x), pi* and J(pi*)?
# 2. Predict, then measure: all rewards of one prompt rise by 7. What happens to the label probabilities, Z(x), pi* and
#    beta * log-ratio?
# 3. Find the bug: somebody writes J = E_pi[r] - beta KL(pi_ref || pi), and says that its maximum is pi* as above. Which
#    condition does the multiplier give, and does pi* fulfil it?

# %%
assert np.all(np.diff(over[:, 3]) < 0) and abs(over[-1] - np.exp(skewed)).max() < 0.05
print("08, first half: a multiplier finds pi*, Gibbs' inequality proves it, and choices leave a constant open.")

# %% [markdown]
# ## Solutions
# 1. pi_ref exp(r) = (1/2, 1/2, 1), so Z(x) = 2, pi* = (1/4, 1/4, 1/2) and J(pi*) = log 2.
# 2. The label probabilities, pi* and beta * log-ratio stay the same; Z(x) is multiplied by exp(7/beta). So preferences
#    cannot tell r(x, y) from r(x, y) + f(x).
# 3. KL(pi_ref || pi) = sum_y pi_ref log(pi_ref/pi) has the derivative -pi_ref/pi, so the condition is
#    r + beta pi_ref/pi = lambda: pi = beta pi_ref/(lambda - r). There is no exponential. At pi* the left side differs
#    from reply to reply. Below, lambda is found by bisection; that policy has a higher J of this kind than pi*.

# %%
by_hand, by_hand_z = optimum(np.log([0.5, 0.25, 0.25]), np.log([1.0, 2.0, 4.0]), 1.0)
np.testing.assert_allclose(np.exp(by_hand), [0.25, 0.25, 0.5], rtol=1e-12)
np.testing.assert_allclose(by_hand_z, np.log(2), rtol=1e-12)
risen, risen_z = optimum(ref_logp, reward + np.array([[7.0], [0.0]]), beta)
np.testing.assert_allclose(risen, star, rtol=1e-12, atol=1e-12)
np.testing.assert_allclose(risen_z - log_z, [7 / beta, 0], rtol=1e-12, atol=1e-12)
assert np.ptp(reward[0] + beta * np.exp(ref_logp - star)[0]) > 0.1
low, high = reward[0].max() + 1e-9, reward[0].max() + 100
for _ in range(200):  # a larger multiplier: a smaller sum
    middle = (low + high) / 2
    low, high = (middle, high) if (beta * pi_ref[0] / (middle - reward[0])).sum() > 1 else (low, middle)
other = np.log(beta * pi_ref[0] / (high - reward[0]))
values = [np.exp(logp) @ reward[0] - beta * kl(ref_logp[0], logp) for logp in (other, star[0])]
np.testing.assert_allclose(np.exp(other).sum(), 1, rtol=1e-9)
assert values[0] > values[1]
