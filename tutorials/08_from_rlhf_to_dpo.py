# %% [markdown]
# # 08. From RLHF to DPO
#
# **Question.** How does a reinforcement learning problem with a learned reward become a loss on pairs?
#
# **Afterwards you can say**
# - how to derive the optimal policy pi* of E[r] - beta KL(pi || pi_ref), and by how much any other policy misses it
# - why Z(x), a sum over all possible replies, is not needed
# - under which four assumptions the minimiser of the DPO loss is pi*, and what happens without each
#
# **Predict first.** The rewards of two replies differ by 1.7. By how many nats is log pi(y_w|x) - log pi(y_l|x) larger
# under the optimal policy than under the reference, at beta = 0.1 and at beta = 0.5? What must one know of the other
# replies to say so?
#
# **The formula.** r(x, y) is a reward, h = log(pi/pi_ref) of a reply, z = beta (h_w - h_l), so h_w - h_l is the margin.
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
# Two prompts with four replies each: everything can be summed. The reference is drawn, the rewards are chosen.

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


def differences(r):  # r_i - r_j of all ordered pairs
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
# Put r = beta log(pi*/pi_ref) + beta log Z into J:
#
#     J(pi) = sum_y pi (r - beta log(pi/pi_ref)) = sum_y pi (beta log Z + beta log(pi*/pi_ref) - beta log(pi/pi_ref))
#           = beta log Z - beta sum_y pi log(pi/pi*) = beta log Z - beta KL(pi || pi*)
#
# A KL divergence is 0 where its arguments are equal and positive elsewhere: pi* is the only maximum, and
# J(pi*) = beta log Z. It is an equality, so it tells how much any policy loses.

# %%
print("Two prompts, four replies, beta 0.5 (NumPy)")
policies = log_softmax(3 * rng.normal(size=(1000, 2, 4)))
equal("sum of pi* over the replies = 1", np.exp(star).sum(axis=-1), 1)
equal("J(pi*) = beta log Z", objective(star, ref_logp, reward, beta), beta * log_z)
lost = beta * log_z - objective(policies, ref_logp, reward, beta)
equal("J(pi*) - J(pi) = beta KL(pi || pi*), 1000 policies", lost, beta * kl(policies, star))
implicit = beta * (star - ref_logp)
equal("r = beta log(pi*/pi_ref) + beta log Z", reward, implicit + beta * log_z[:, None])
equal("r_i - r_j = beta h_i - beta h_j: Z cancels", differences(reward), differences(implicit))
assert abs(log_z[0] - log_z[1]) > 0.1  # and not because it were the same everywhere

# %% [markdown]
# ## The loss
# Z belongs to the prompt and both replies of a pair have the same prompt, so the probability of a label can be written
# with the policy alone. DPO takes the policy under which the labels are likeliest. Here every pair is labelled with its
# exact probability: labels[x, i, j] = sigma(r_i - r_j). The policy is a table, theta, one logit for each reply.
#
#     L = -sum_ij share_ij log sigma(z_ij),   z_ij = beta (h_i - h_j),   h = log_softmax(theta) - log pi_ref
#     dL/dtheta_i = dL/dh_i = -beta sum_j (share_ij sigma(-z_ij) - share_ji sigma(-z_ji))
#
# The normaliser of log_softmax cancels in every h_i - h_j. At pi* each z_ij is r_i - r_j, and
# sigma(r_i - r_j) sigma(r_j - r_i) is the same for (i, j) and (j, i): the gradient is 0.

# %%
off_diagonal = 1 - np.eye(4)
labels = sigma(differences(reward)) * off_diagonal
certain = (differences(reward) > 0) * 1.0  # the better reply is preferred every time


def loss_gradient(theta, labels):
    share = labels / (len(labels) * labels.sum(axis=(1, 2), keepdims=True))
    pull = share * sigma(-beta * differences(theta - ref_logp))  # (2, 4, 4)
    return -beta * (pull.sum(axis=2) - pull.sum(axis=1))


def policies_of_descent(labels, counts):
    theta, found = ref_logp, []
    for step in range(1, counts[-1] + 1):
        theta = theta - 12 / beta**2 * loss_gradient(theta, labels)  # the curvature is at most beta^2/12
        if step in counts:
            found.append(log_softmax(theta))
    return found


equal("dL/dtheta = 0 at pi*", loss_gradient(star, labels), 0)
counts = (1, 3, 10, 30, 100, 300, 1000, 3000, 10000)
noisy, sure = policies_of_descent(labels, counts), policies_of_descent(certain, counts)
equal("gradient descent on the pairs ends at pi*", noisy[-1], star)

# %% [markdown]
# ## The answer to the prediction
# z = beta * margin = r_w - r_l at the optimum, so the margin is (r_w - r_l)/beta: 17 nats at beta 0.1 and 3.4 at 0.5.
# A smaller beta ends further from the reference. Of the other replies one need know nothing: Z is gone.

# %%
for b, gap in ((0.1, 17.0), (0.5, 3.4)):
    h = optimum(ref_logp, reward, b)[0] - ref_logp
    equal(f"beta {b}: the margin of a reward gap of 1.7 is {gap:g} nats", h[0, 0] - h[0, 1], gap)

# %% [markdown]
# ## The library's version
# `exact` has the same functions. `laboratory` has a larger world: all 121 responses of at most four tokens over three
# characters, three prompts, and a reference that is a transformer.

# %%
world = small_world(0)
theirs, theirs_z = exact.optimum(world.ref_logp, world.reward, beta)
print(f"\nThe laboratory: {world.reward.shape[0]} prompts, {world.reward.shape[1]} responses, beta 0.5")
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
# 1. The labels are drawn from Bradley-Terry probabilities. 2. There are enough pairs. 3. The reference has full
# support: where pi_ref is 0 pi* is 0, whatever the reward. 4. The policy class contains pi*.
#
# Take the first. Let the better reply be preferred every time, and let the policy rank the replies of a prompt by h
# as the reward does. Multiplying all h_i - h_j by a number above 1 then makes the z of every pair larger and the loss
# smaller. It comes as near to 0 as one likes and no policy attains 0, whatever beta is. For a free policy class a
# finite minimiser exists only if, among the compared replies, each can be reached from each other along "was
# preferred to". (The table's distances are to pi* of the world before anything was broken. Where support is missing,
# the minimiser is still pi* of the reference that lacks it.) The 300 pairs below, labelled by chance, fail that too:
# a reply that lost every comparison reaches no other.

# %%
gaps = {
    name: [float((p - ref_logp)[0, 0] - (p - ref_logp)[0, 1]) for p in path]
    for name, path in (("exact probabilities", noisy), ("certain labels", sure))
}
print("\nMargin of the pair with reward gap 1.7, after so many steps of descent")
print(f"{'steps':<20}" + "".join(f"{count:>9}" for count in counts[::2]))
for name, gap in gaps.items():
    print(f"{name:<20}" + "".join(f"{g:9.2f}" for g in gap[::2]))
cycle = np.roll(np.eye(3), 1, axis=1)  # 0 preferred to 1, 1 to 2, 2 to 0
assert exact.has_maximum(labels[0]) and exact.has_maximum(cycle) and not exact.has_maximum(certain[0])

for wins in sampled_wins(world, stream(0, "pairs"), 300):  # the same 300 as below
    assert not exact.has_maximum(wins) and ((wins.sum(axis=1) == 0) & (wins.sum(axis=0) > 0)).any()

print("\nThe laboratory after 300 steps, distance to pi* as total variation, from 0 to 1")
distance = {row.name: row.tv for row in what_breaks_it(world, 0, steps=300)}
broken = {
    "DPO, nothing broken": "nothing",
    "DPO, labels without noise": "1, labels are certain",
    "DPO, 30% of labels flipped": "1, three in ten are flipped",
    "DPO, 300 sampled pairs a prompt": "2, 300 pairs a prompt",
    "DPO, a reference without support for the ten best": "3, ten best: next to no pi_ref",
    "DPO, a transformer too small (1 layer of width 4)": "4, a tiny transformer",
}
for name, what in broken.items():
    print(f"  {what:<32}{distance[name]:8.3f}")
path = pathlib.Path("08_from_rlhf_to_dpo.png")
lines = [plots.Curve(name, counts, gap, "o") for name, gap in gaps.items()]
drawn = plots.picture(path, [plots.Panel("Certain labels have no minimiser", "step", "margin, nats", lines, "log")])
print(f"\nThe margins are drawn in {path.name}." if drawn else "\nA picture needs matplotlib (the `plot` extra).")

# %% [markdown]
# ## What was shown
# Each step from RLHF to DPO is an equality, checked on every reply of a small world. DPO's minimiser is RLHF's optimum
# under the four assumptions; where one fails it need not be, and there may be none.
#
# ## Exercises
# 1. Predict: all rewards of one prompt rise by 7. What happens to the label probabilities, Z, pi* and beta h?
# 2. Compute by hand: pi_ref = (1/2, 1/4, 1/4), r = (0, log 2, log 4), beta = 1. What are Z, pi* and J(pi*)?

# %%
assert abs(noisy[-1] - star).max() < 1e-9 and gaps["certain labels"][-1] > gaps["certain labels"][-2] > 3.4 + 5
assert distance["DPO, nothing broken"] < 1e-3 and min(distance[name] for name in list(broken)[1:]) > 0.01
print("08: with Bradley-Terry labels the minimiser of the DPO loss is pi*, and with certain labels there is none.")

# %% [markdown]
# ## Solutions
# 1. Probabilities, pi* and beta h stay; Z is multiplied by exp(7/beta). So preferences cannot tell r from r + f(x).
# 2. pi_ref exp(r) = (1/2, 1/2, 1), so Z = 2, pi* = (1/4, 1/4, 1/2) and J(pi*) = log 2.

# %%
shifted, shifted_z = optimum(ref_logp, reward + np.array([[7.0], [0.0]]), beta)
np.testing.assert_allclose(shifted, star, rtol=1e-12, atol=1e-12)
np.testing.assert_allclose(shifted_z - log_z, [7 / beta, 0], rtol=1e-12, atol=1e-12)
by_hand, by_hand_z = optimum(np.log([0.5, 0.25, 0.25]), np.log([1.0, 2.0, 4.0]), 1.0)
np.testing.assert_allclose(np.exp(by_hand), [0.25, 0.25, 0.5], rtol=1e-12)
np.testing.assert_allclose(by_hand_z, np.log(2), rtol=1e-12)
