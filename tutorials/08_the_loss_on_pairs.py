# %% [markdown]
# # 08. From RLHF to DPO, second half: the loss on pairs
#
# **Question.** The best policy is known in closed form, but nobody can compute its Z. How does it become a loss on
# pairs, and what is each term of that loss for?
#
# The first half, `08_from_rlhf_to_dpo.py`, ended with pi* = pi_ref exp(r/beta)/Z and, solved for the reward,
# r = beta log(pi*/pi_ref) + beta log Z(x). Z(x) is a sum over all possible replies to x. There are too many to add up.
#
# **Afterwards you can say**
# - how to get from the closed form to the DPO loss, with the licence for each line, and where Z goes
# - why fitting a reward and then a policy, and fitting the policy at once, end at the same place
# - where training ends without beta, the reference, log sigma, the rejected reply or the sum over tokens
# - under which four assumptions the minimiser of the DPO loss is pi*, and what happens when one of them fails
#
# **Predict first.** Take one thing away from the loss: beta (set it to 1), the reference, the log sigma (the loss is
# then -z), the rejected reply, or the sums over tokens (take means). The labels follow Bradley-Terry, and the policy
# can be anything. Which of the five losses has no minimum? Does any of the other four still end at pi*?
#
# **The formula.** As in the first half, the prompt is fixed, and the log-ratio of a reply is log(pi/pi_ref).
#
#     margin = log(pi(w)/pi_ref(w)) - log(pi(l)/pi_ref(l)),   z = beta * margin
#     L(pi)  = -mean log sigma(z)                                   over the labelled pairs

# %%
import pathlib

import numpy as np

from minidpo import Tensor, exact, losses, ops, optim, plots
from minidpo.theory.equalities import (
    World,
    all_pairs,
    descent,
    newton,
    pair_loss,
    reparametrisation,
    small_world,
    table_policy,
)

# %% [markdown]
# ## From NumPy alone: the worksheet, second half
# The two prompts and four replies of the first half. Cover what is below each text, write the line, then look.

# %%
rng = np.random.default_rng(0)


def log_softmax(s):
    return s - np.log(np.exp(s).sum(axis=-1, keepdims=True))


def sigma(z):
    return 1 / (1 + np.exp(-z))


def differences(r):  # r_i - r_j for all ordered pairs
    return r[..., :, None] - r[..., None, :]


def optimum(ref_logp, reward, beta):  # log pi*, log Z
    tilted = ref_logp + reward / beta
    log_z = np.log(np.exp(tilted).sum(axis=-1))
    return tilted - log_z[..., None], log_z


def line(number, formula, licence, left, right):
    np.testing.assert_allclose(left, right, rtol=1e-9, atol=1e-9)
    print(f"  {number:<4}{formula:<58}{licence}")


beta = 0.5
reward = np.array([[1.7, 0.0, -0.5, 0.8], [-1.0, 0.4, 1.2, 0.1]])
ref_logp = log_softmax(rng.normal(size=(2, 4)))
star, log_z = optimum(ref_logp, reward, beta)
log_ratio = star - ref_logp
print("the worksheet, second half (both sides of each line agree to within 1e-9)")
line(8, "r = beta log(pi*/pi_ref) + beta log Z(x)", "given", reward, beta * log_ratio + beta * log_z[:, None])

# %% [markdown]
# **Line 9**, because both replies of a pair answer the same prompt: subtract line 8 for l from line 8 for w.

# %%
between = beta * differences(log_ratio)
line(9, "r_w - r_l = beta * margin of pi*", "same prompt: Z(x) cancels", differences(reward), between)
assert abs(log_z[0] - log_z[1]) > 0.1  # it cancels, though it differs from prompt to prompt

# %% [markdown]
# **Line 10**, by Bradley-Terry: how likely is the label "w is preferred to l"? Write it with the policy alone.

# %%
labels = sigma(differences(reward)) * (1 - np.eye(4))  # labels[x, i, j]: i is preferred to j
by_policy = sigma(beta * differences(log_ratio)) * (1 - np.eye(4))
line(10, "P(w preferred to l) = sigma(beta * margin of pi*)", "Bradley-Terry: assumed", labels, by_policy)

# %% [markdown]
# **Line 11**, by maximum likelihood: any policy pi gives the labels a probability, by line 10 with pi for pi*. Take the
# policy under which the labels are likeliest. Which loss does it minimise?
#
# The policy is a table, theta, with one logit for each reply. share_ij is the weight of the label "i before j" in the
# mean: here its exact probability, divided by the number of pairs.


# %%
def shares(wins):
    return wins / (len(wins) * wins.sum(axis=(1, 2), keepdims=True))


def loss(theta, wins):
    return -(shares(wins) * np.log(sigma(beta * differences(log_softmax(theta) - ref_logp)))).sum()


likelihood = np.exp((shares(labels) * np.log(labels + np.eye(4))).sum())  # geometric mean, by r
line(11, "L(pi) = -mean log sigma(beta * margin)", "maximum likelihood", loss(star, labels), -np.log(likelihood))
others = [loss(theta, labels) for theta in np.random.default_rng(1).normal(size=(1000, 2, 4))]
assert min(others) > loss(star, labels)  # pi* makes the labels likeliest

# %% [markdown]
# **Line 12**, by calculus: the gradient of line 11 with respect to theta_i. Write z_ij for beta times the margin of
# reply i over reply j. The log-ratios are log_softmax(theta) - log pi_ref. (What becomes of the normaliser of
# log_softmax?)
#
# **Line 13**, by lines 9 and 12: what is the gradient at pi*?


# %%
def loss_gradient(theta, wins, ref_logp=ref_logp):
    pull = shares(wins) * sigma(-beta * differences(theta - ref_logp))  # (2, 4, 4)
    return -beta * (pull.sum(axis=2) - pull.sum(axis=1))


at, eps = rng.normal(size=(2, 4)), 1e-6
bumps = eps * np.eye(8).reshape(8, 2, 4)
slopes = np.reshape([(loss(at + bump, labels) - loss(at - bump, labels)) / (2 * eps) for bump in bumps], (2, 4))
gradient = loss_gradient(at, labels)
line(12, "dL/dtheta_i = -beta sum_j (share_ij sigma(-z_ij)", "calculus; the normaliser cancels", gradient, slopes)
print(f"      {'               - share_ji sigma(-z_ji))':<58}in each z_ij")
line(13, "dL/dtheta = 0 at pi*", "lines 9 and 12", loss_gradient(star, labels), 0)

# %% [markdown]
# Line 13 holds because at pi* each z_ij is r_i - r_j. So share_ij sigma(-z_ij) is proportional to
# sigma(r_i - r_j) sigma(r_j - r_i), which is the same for (i, j) and (j, i). The loss is convex in theta: each z_ij is
# linear in theta, and -log sigma has the second derivative sigma(z) sigma(-z) > 0. So a gradient of 0 means a minimum.
# Comparisons link all replies, so only one policy has it ("Four assumptions"). Small enough steps arrive there.


# %%
free = np.eye(4)  # each logit is a parameter of its own


def policies_of_descent(wins, counts, ref_logp=ref_logp, tie=free):
    theta, path = ref_logp, []
    for step in range(1, counts[-1] + 1):
        theta = theta - 12 / beta**2 * loss_gradient(theta, wins, ref_logp) @ tie  # L'' is at most beta^2/12
        if step in counts:
            path.append(log_softmax(theta))
    return path


counts = (1, 3, 10, 30, 100, 300, 1000, 3000, 10000)
by_exact = policies_of_descent(labels, counts)
np.testing.assert_allclose(by_exact[-1], star, rtol=0, atol=1e-9)

# %% [markdown]
# ## One loss in the place of two stages
# L(pi) is the loss of a reward model (first half) with beta * log-ratio for r. So the same choices lead to the same
# place: fit a reward to them and take its pi*, or fit the policy with L at once. The labels need not follow
# Bradley-Terry: this holds for whatever labels were drawn, as long as a best reward exists.

# %%
upper = np.triu(np.ones((4, 4), dtype=int), 1)
wins = rng.binomial(50 * upper, sigma(differences(reward)))  # 50 choices for each pair
wins = wins + np.swapaxes(50 * upper - wins, 1, 2)
learned = np.array([exact.fitted_rewards(each)[0] for each in wins])
two_stages = optimum(ref_logp, learned, beta)[0]
at_once = policies_of_descent(wins, (3000,))[-1]
np.testing.assert_allclose(at_once, two_stages, rtol=0, atol=1e-9)
print("\nfifty choices for each pair: reward first and policy second, or DPO at once")
tv = exact.total_variation(at_once, star).max()
print(f"  they agree to within 1e-9; total variation to pi* of the true reward {tv:.3f}")

# %% [markdown]
# ## Take a term away
# Labels have their exact probabilities again. For each loss, ask where its gradient is 0.
#
# - **No beta** (beta = 1): line 9 reads r_w - r_l = margin. The minimum is pi_ref exp(r)/Z, the optimum for beta 1.
#   Preferences alone say how far apart the rewards are. Only beta says how many nats a reward is worth.
# - **No reference**: z = beta (log pi(w) - log pi(l)). This is a uniform reference. The minimum is exp(r/beta) over its
#   sum.
# - **No log sigma**: L = -mean z is linear in the margins. Its push on theta_i is beta sum_j (share_ij - share_ji),
#   which does not depend on theta. So every step adds the same to each margin, for ever: there is no minimum, and the
#   reply that wins most often gets everything. With log sigma, the push on a pair shrinks as z grows, and the pushes of
#   its two labels cancel when z says what the labels say.
# - **No rejected**: L = -mean log sigma(beta log_ratio(w)). Let chosen_i be the share of labels that reply i won. The
#   multiplier of the first half gives chosen_i beta sigma(-beta log_ratio_i) = lambda pi_i. For small beta, sigma is
#   about 1/2, and pi is about chosen: it copies what was preferred, as fine-tuning does, and it copies the mediocre
#   replies that beat bad ones.
# - **Means for sums**: reply i has n_i tokens, and z = beta (log_ratio_i/n_i - log_ratio_j/n_j). Each z can still be
#   r_i - r_j: take log_ratio_i = n_i (r_i/beta + constant), with the constant for which pi sums to 1. At the same
#   reward a reply of n tokens has n times the log-ratio of a one-token reply.

# %%
four = World([[0], [1]], [[1]] * 4, reward, ref_logp)
lengths = np.array([2.0, 1.0, 4.0, 3.0])  # tokens of each reply
share, chosen = shares(labels), shares(labels).sum(axis=2)  # (2, 4, 4), (2, 4)


def margins(log_ratio):  # (2, 4) -> (2, 4, 4)
    return ops.reshape(log_ratio, (2, 4, 1)) - ops.reshape(log_ratio, (2, 1, 4))


without = {  # each a function of log pi
    "nothing": lambda logp: -ops.sum(share * ops.logsigmoid(beta * margins(logp - ref_logp))),
    "beta": lambda logp: -ops.sum(share * ops.logsigmoid(margins(logp - ref_logp))),
    "reference": lambda logp: -ops.sum(share * ops.logsigmoid(beta * margins(logp))),
    "log sigma": lambda logp: -ops.sum(share * (beta * margins(logp - ref_logp))),
    "rejected": lambda logp: -ops.sum(chosen * ops.logsigmoid(beta * (logp - ref_logp))),
    "sums": lambda logp: -ops.sum(share * ops.logsigmoid(beta * margins((logp - ref_logp) / lengths))),
}
rates = dict.fromkeys(without, 12 / beta**2) | {"beta": 12.0, "rejected": 12.0}  # L'' is larger
ends = {}
for name, each in without.items():
    path = descent(table_policy(four), each, optim.SGD, [rates[name]] * 1000)
    ends[name] = path[100], path[1000]

print("\nprompt 0          margin of 0 over 1, after     pi(y) after 1,000 steps         larger TV to pi*")
print(f"{'without':<15}{'100 steps':>14}{'1,000 steps':>14}     y = 0       1       2       3    of two prompts")
for name, (early, late) in ends.items():
    of = [(logp - ref_logp)[0, 0] - (logp - ref_logp)[0, 1] for logp in (early, late)]
    cells = "".join(f"{p:8.3f}" for p in np.exp(late[0]))
    print(f"{name:<15}{of[0]:14.2f}{of[1]:14.2f}  {cells}{exact.total_variation(late, star).max():17.3f}")

np.testing.assert_allclose(ends["nothing"][1], star, rtol=0, atol=1e-3)
np.testing.assert_allclose(ends["beta"][1], optimum(ref_logp, reward, 1.0)[0], rtol=0, atol=1e-3)
np.testing.assert_allclose(ends["reference"][1], log_softmax(reward / beta), rtol=0, atol=1e-3)
leaf = Tensor(at, requires_grad=True)
without["log sigma"](ops.log_softmax(leaf)).backward()
np.testing.assert_allclose(-leaf.grad, beta * (share.sum(axis=2) - share.sum(axis=1)), rtol=0, atol=1e-12)  # no theta
late = ends["rejected"][1]
lambdas = chosen * beta * sigma(-beta * (late - ref_logp)) / np.exp(late)
np.testing.assert_allclose(lambdas, np.repeat(lambdas.mean(axis=1, keepdims=True), 4, axis=1), rtol=1e-3)
assert np.exp(ends["log sigma"][1]).max(axis=1).min() > 1 - 1e-9
late = ends["sums"][1]
np.testing.assert_allclose(differences((late - ref_logp) / lengths), differences(reward / beta), rtol=0, atol=1e-2)

# %% [markdown]
# ## The answer to the prediction
# Without log sigma there is no minimum: ten times the steps give ten times the margin. The other four end, and none of
# them at pi*. Without beta the policy moves half as far as it should, as beta is 0.5. Without the reference it forgets
# where it came from. Without the rejected reply it ends near the frequencies with which replies were chosen. With
# means, a reply moves in proportion to its length, up or down.

# %%
moved = {name: [(logp - ref_logp)[0, 0] - (logp - ref_logp)[0, 1] for logp in path] for name, path in ends.items()}
np.testing.assert_allclose(moved["log sigma"][1], 10 * moved["log sigma"][0], rtol=1e-9)
assert [name for name, (early, late) in moved.items() if abs(late - early) > 0.5] == ["log sigma"]
np.testing.assert_allclose([moved["nothing"][1], moved["beta"][1]], [3.4, 1.7], rtol=1e-3)
assert all(exact.total_variation(ends[name][1], star).max() > 0.05 for name in ends if name != "nothing")

# %% [markdown]
# ## The library's version
# `losses.dpo_loss` is line 11, and `losses.reference_free_loss` is the one without the reference. `equalities` has the
# loss over all pairs of a world. `small_world` is larger: three prompts, all 121 responses of at most four tokens over
# three characters, and a reference that is a transformer.

# %%
x, i, j = np.nonzero(wins)
of_pairs = losses.dpo_loss(at[x, i], at[x, j], ref_logp[x, i], ref_logp[x, j], beta, weight=wins[x, i, j].astype(float))
np.testing.assert_allclose(of_pairs.loss.item(), loss(at, wins), rtol=1e-12)
leaf = Tensor(at, requires_grad=True)
pair_loss(ops.log_softmax(leaf), ref_logp, labels, beta).backward()
np.testing.assert_allclose(loss_gradient(at, labels), leaf.grad, rtol=1e-9)
world = small_world(0)
fitted, steps = newton(world, all_pairs(world), beta)
tv = exact.total_variation(fitted, exact.optimum(world.ref_logp, world.reward, beta)[0]).max()
print(f"\n121 responses: {steps} Newton steps on the DPO loss end within total variation 1e-12 of pi*: {tv < 1e-12}")
assert tv < 1e-12
for claim in reparametrisation(world, 0):
    assert claim.holds, claim

# %% [markdown]
# ## Four assumptions
# 1. The labels are drawn from Bradley-Terry probabilities.
# 2. There are enough pairs.
# 3. The reference has full support: where pi_ref is 0, pi* is 0, whatever the reward.
# 4. The policy class contains pi*.
#
# Drop the first: let the better reply be preferred every time. Take a policy that ranks the replies of each prompt by
# log-ratio as the reward does, and multiply all its margins by a number above 1. For every label z grows, and the loss
# falls. It comes as near to 0 as you like, and no policy attains 0, whatever beta is.
#
# When does a finite minimiser exist, if the policy is a free table? Draw an arrow from each reply to those it was
# preferred to. Comparisons link replies into groups. A finite minimiser exists if and only if, within each group, you
# can follow arrows from any reply to any other. If not, some replies of a group beat others of it and never lose to
# them: raising these lowers the loss for ever. If you can, every change within a group, carried far enough, raises the
# loss of some label without bound. With one group the minimiser is unique, because pi sums to 1. With several, each
# group's log-ratios may rise by a constant. Below, 0 and 1 form one group and 2 and 3 another: the gradient is 0, and
# still 0 when one group rises by 5.
#
# A few sampled choices often fail this test too: no arrow leaves a reply that lost every comparison. Where no minimiser
# exists, the table's row is a snapshot and names its steps. All distances are to pi* of the unbroken world.
#
# If pi_ref all but lacks a reply, the minimiser is pi* of that poorer reference. The policy of the last row cannot tell
# replies 0 and 1 apart: one parameter moves both logits. Tutorial 12 breaks the same assumptions on 121 replies.

# %%
certain = (differences(reward) > 0) * 1.0
by_certain = policies_of_descent(certain, counts)
of_pair = {
    name: [float((logp - ref_logp)[0, 0] - (logp - ref_logp)[0, 1]) for logp in path]
    for name, path in (("exact probabilities", by_exact), ("certain labels", by_certain))
}
print("\nMargin of the pair with reward gap 1.7, after N steps of descent")
print(f"{'N':<20}" + "".join(f"{count:>9}" for count in counts[::2]))
for name, each in of_pair.items():
    print(f"{name:<20}" + "".join(f"{margin:9.2f}" for margin in each[::2]))
cycle = np.roll(np.eye(3), 1, axis=1)  # 0 preferred to 1, 1 to 2, 2 to 0
assert exact.has_maximum(labels[0]) and exact.has_maximum(cycle) and not exact.has_maximum(certain[0])

islands = np.zeros((1, 4, 4))  # 0 and 1 compared both ways, 2 and 3 both ways, nothing across
islands[0, [0, 1, 2, 3], [1, 0, 3, 2]] = 1, 3, 2, 1
assert exact.has_maximum(islands[0])
for rise in (0, 5):
    rewards = np.array([0, np.log(3), np.log(2) + rise, rise])
    np.testing.assert_allclose(loss_gradient(ref_logp + rewards / beta, islands), 0, atol=1e-12)

few = rng.binomial(upper, sigma(differences(reward)))  # one choice for each pair
few = few + np.swapaxes(upper - few, 1, 2)
best = reward == reward.max(axis=1, keepdims=True)
narrow = log_softmax(ref_logp - 30 * best)  # the best reply has next to no probability
tie = free.copy()
tie[:2, :2] = 0.5  # one parameter for replies 0 and 1
broken = {
    "nothing": by_exact[-1],
    "1, labels are certain, 300 steps": by_certain[counts.index(300)],
    "1, three in ten are flipped": policies_of_descent(0.7 * labels + 0.3 * np.swapaxes(labels, 1, 2), (3000,))[0],
    "2, one choice for each pair, 300 steps": policies_of_descent(few, (300,))[0],
    "3, next to no pi_ref of the best": policies_of_descent(labels, (3000,), narrow)[0],
    "4, a policy that ties replies 0 and 1": policies_of_descent(labels, (3000,), tie=tie)[0],
}
distance = {name: exact.total_variation(logp, star).mean() for name, logp in broken.items()}
print("\nbroken assumption: mean total variation to pi*, half the sum of |pi - pi*|")
for name, tv in distance.items():
    print(f"  {name:<40}{tv:8.3f}")
assert not any(exact.has_maximum(each) for each in few)
np.testing.assert_allclose(broken["3, next to no pi_ref of the best"], optimum(narrow, reward, beta)[0], atol=1e-9)

path = pathlib.Path("08_the_loss_on_pairs.png")
curves = [plots.Curve(name, counts, each, "o") for name, each in of_pair.items()]
panel = plots.Panel("Certain labels have no minimiser", "step", "margin, nats", curves, "log")
if plots.picture(path, [panel]):
    print(f"\nThe margins are drawn in {path.name}.")
else:
    print("\nA picture needs matplotlib (the `plot` extra).")

# %% [markdown]
# ## What was shown
# Each line from the closed form to the loss has its licence: the same prompt (9), an assumption (10), a principle (11)
# or calculus (12, 13). DPO's minimiser is RLHF's optimum under the four assumptions. Where one fails, the minimiser may
# be another policy, or may not exist. Each term of the loss is needed: without it, training ends elsewhere or nowhere.
#
# ## Exercises
# 1. Compute by hand: two replies, pi_ref = (1/2, 1/2), beta = 1, and reply 0 wins 3 of 4 comparisons. Which policy
#    minimises the loss, and which reward gap has been learned?
# 2. Find the bug: to get more pairs, somebody takes w from one prompt and l from another, with a label that says which
#    of the two answers its own prompt better. Which licence is missing, and by how much is z wrong at pi*?
# 3. Predict, then measure: keep only the comparisons of 0 with 1, 1 with 2 and 2 with 3, with their exact
#    probabilities. Does the loss still end at pi*? And with pairs (0, 1) ten times as frequent?

# %%
assert abs(by_exact[-1] - star).max() < 1e-9
assert of_pair["certain labels"][-1] > of_pair["certain labels"][-2] > 3.4 + 5
assert distance["nothing"] < 1e-9 and min(tv for name, tv in distance.items() if name != "nothing") > 0.05
print("08, second half: with Bradley-Terry labels the minimiser is pi*, with certain labels none exists,")
print("    and whichever term is taken away, training ends elsewhere or nowhere.")

# %% [markdown]
# ## Solutions
# 1. The gradient is 0 where sigma(z) = 3/4, so z = margin = log 3. The log-ratios of the two replies differ by log 3,
#    and pi_ref is equal: pi = (3/4, 1/4). The reward gap is z, log 3.
# 2. "Same prompt". The two Z(x) differ, so r_w - r_l = z + beta (log Z(x_w) - log Z(x_l)). The loss does not know the
#    second term, and takes it for a difference of the replies.
# 3. Yes, both times. At pi* each z is r_i - r_j, so each pair's own two terms cancel, however often it is compared. The
#    three comparisons link all four replies, so no other policy does it.

# %%
by_hand = np.log([[0.75, 0.25]])
half = np.log([[0.5, 0.5]])
three_of_four = np.array([[[0.0, 3.0], [1.0, 0.0]]])
leaf = Tensor(by_hand, requires_grad=True)
pair_loss(ops.log_softmax(leaf), half, three_of_four, 1.0).backward()
np.testing.assert_allclose(leaf.grad, 0, atol=1e-15)
np.testing.assert_allclose(np.ptp(exact.fitted_rewards(three_of_four[0])[0]), np.log(3), rtol=1e-9)

z = beta * (log_ratio[0][:, None] - log_ratio[1][None, :])  # w answers prompt 0, l answers prompt 1
np.testing.assert_allclose(reward[0][:, None] - reward[1][None, :] - z, beta * (log_z[0] - log_z[1]), rtol=1e-9)

neighbours = labels * (abs(np.subtract.outer(np.arange(4), np.arange(4))) == 1)
often = neighbours.copy()
often[:, [0, 1], [1, 0]] *= 10
for some in (neighbours, often):
    assert exact.has_maximum(some[0])
    np.testing.assert_allclose(newton(four, some, beta)[0], star, rtol=0, atol=1e-9)
