# %% [markdown]
# # 12. The frontier of reward against KL
#
# **Question.** How much expected reward can a policy have at a given distance from the reference, and who gets there?
#
# **Afterwards you can say**
# - why no policy lies above the curve of pi* = pi_ref exp(r/beta)/Z, and what its slope is;
# - where DPO, the policy gradient, fine-tuning on preferred responses and unlikelihood lead;
# - what "DPO is equivalent to RLHF" means, and what breaks it.
#
# **Predict first.** Draw endless pairs of responses from the reference and label them by the Bradley-Terry law. Take a
# policy that can represent anything, and fine-tune it on the preferred responses until its likelihood is at the
# optimum. Rewards may be as extreme as you like. Can KL(pi || pi_ref) reach 1 nat?
#
# **The formula.** J(pi) = E_pi[r] - beta KL(pi || pi_ref). For every pi and every beta > 0
#
#     beta log Z - J(pi) = beta KL(pi || pi*) >= 0,   so   E_pi[r] <= beta (KL(pi || pi_ref) + log Z(beta)).
#
# The bound is a straight line of slope beta in the (KL, reward) plane. Only pi*(beta) touches it. The frontier touches
# this line there without crossing it, so it has the same slope, beta.

# %%
import pathlib

import numpy as np

from minidpo import exact, plots
from minidpo.streams import stream
from minidpo.theory import assumptions, equalities, frontier

ref_logp = np.log([0.40, 0.25, 0.15, 0.10, 0.06, 0.04])  # six responses to a single prompt
reward = np.array([-0.5, 0.3, -1.0, 1.2, 0.0, 2.0])

# %% [markdown]
# ## From NumPy alone: the curve, and 20,000 policies
#
# Each beta gives a line that no policy is above. At each KL take the lowest of these lines. A pi* touches it, so that
# is the most reward a policy can have: the frontier. Half of our policies have random logits. Many of these are nearly
# uniform. The other half are pi* of a random beta, with noise added to the logits.


# %%
def log_softmax(s):
    return s - np.logaddexp.reduce(s, axis=-1, keepdims=True)


def kl_and_reward(logp):
    p = np.exp(logp)
    return (p * (logp - ref_logp)).sum(axis=-1), (p * reward).sum(axis=-1)


def lowest_line(kl):
    betas = np.geomspace(1e-3, 1e3, 4000)
    log_z = np.logaddexp.reduce(ref_logp + reward / betas[:, None], axis=-1)
    return np.array([(betas * (nats + log_z)).min() for nats in np.atleast_1d(kl)])


rng = np.random.default_rng(0)
size = 10.0 ** rng.uniform(-3, 1, size=(20_000, 1))
start = np.zeros((20_000, 6))
start[10_000:] = ref_logp + reward / 10.0 ** rng.uniform(-1, 1, size=(10_000, 1))
sample_kl, sample_reward = kl_and_reward(log_softmax(start + size * rng.normal(size=start.shape)))
shortfall = lowest_line(sample_kl) - sample_reward
curve_betas = np.geomspace(0.1, 30, 60)
curve_kl, curve_reward = kl_and_reward(log_softmax(ref_logp + reward / curve_betas[:, None]))
np.testing.assert_allclose(lowest_line(curve_kl), curve_reward, rtol=0, atol=1e-5)  # pi* touches the lowest line
assert shortfall.min() > -1e-12
near = np.array([kl_and_reward(log_softmax(ref_logp + reward / beta)) for beta in (0.5001, 0.4999)])
d_kl, d_reward = near[1] - near[0]
np.testing.assert_allclose(d_reward / d_kl, 0.5, rtol=1e-6)  # the slope is beta
print(f"20,000 policies: above the frontier {(shortfall < -1e-12).sum()}, within 0.01 of it {(shortfall < 0.01).sum()}")

# %% [markdown]
# ## From NumPy alone: four methods, one logit per response
#
# The push on a logit is the direction in which a method moves it: minus the gradient of a loss, or the gradient of J.
# Each response has its log_ratio = log pi - log pi_ref.
#
# - DPO sees every pair of responses, labelled as often as Bradley-Terry says. Its push on logit i is proportional to
#   the sum over j of P(i beats j) - sigma(beta (log_ratio_i - log_ratio_j)).
# - The policy gradient climbs J itself. dJ/dpi = A - beta with A = r - beta log_ratio, and the softmax makes of it the
#   push pi (A - E_pi[A]). Tutorial 18 estimates it from samples.
# - Fine-tuning on the preferred responses ends at their distribution, `preferred`.
# - Unlikelihood also pushes the rejected responses down: its loss is -log pi(y_w) + 0.5 log pi(y_l). The loss has no
#   minimum as soon as some response wins less than half as often as it loses.

# %%
beta, down = 0.5, 0.5  # down: the weight of log pi(y_l)
beats = 1 / (1 + np.exp(reward[None, :] - reward[:, None]))  # beats[i, j]: P(i is preferred to j)
pi_ref = np.exp(ref_logp)
preferred, rejected = 2 * pi_ref * (beats @ pi_ref), 2 * pi_ref * (beats.T @ pi_ref)  # distributions over responses


def dpo_push(log_ratio):
    z = beta * (log_ratio[:, None] - log_ratio[None, :])
    return 4 / (beta * len(z)) * (beats - 1 / (1 + np.exp(-z))).sum(axis=1)  # no overshoot


def reward_push(log_ratio):
    pi, net = np.exp(ref_logp + log_ratio), reward - beta * log_ratio
    return pi * (net - pi @ net)


def unlikelihood_push(log_ratio):
    return (preferred - down * rejected) - np.exp(ref_logp + log_ratio) * (1 - down)


def policy_after(push, steps):
    logp = ref_logp
    for _ in range(steps):
        logp = log_softmax(logp + push(logp - ref_logp))
    return logp


star = log_softmax(ref_logp + reward / beta)
policies = {
    "reference": ref_logp,
    "pi*, beta 0.5": star,
    "DPO, 500 steps": policy_after(dpo_push, 500),
    "policy gradient, 5,000 steps": policy_after(reward_push, 5000),
    "preferred fine-tuning": np.log(preferred),
    "unlikelihood, 30 steps": policy_after(unlikelihood_push, 30),
    "unlikelihood, 3,000 steps": policy_after(unlikelihood_push, 3000),
}
distances = []  # below the frontier
print(f"\n{'six responses':<34}{'KL, nats':>10}{'reward':>10}{'below frontier':>16}")
for name, logp in policies.items():
    kl, value = kl_and_reward(logp)
    distances.append(lowest_line(kl)[0] - value)
    print(f"{name:<34}{kl:10.3f}{value:10.3f}{distances[-1]:z16.3f}")  # z: no minus sign before 0.000

# %% [markdown]
# ## The answer to the prediction
#
# No. The preferred response is y with probability 2 pi_ref(y) P(y beats a draw from pi_ref), which is at most 2
# pi_ref(y). So log(preferred/pi_ref) is at most log 2 for every y, and the KL is at most log 2 = 0.69. No reward,
# however extreme, can send this method further. Unlikelihood does not stop: here its loss falls without end.
#
# ## The library's version
#
# First the same six responses as a `World`, then a world of 121 responses and three prompts. "Equivalent" means: at
# the optimum, with Bradley-Terry labels, enough pairs, full support and a policy class that can represent pi*, DPO and
# the policy gradient of J end at the same policy. `assumptions` drops these conditions one at a time. A row that names
# its steps is a snapshot: more of them would move it. TV is total variation (08). pi* and the reference are those of
# the unbroken world in every row. Certain labels lead to more reward than pi* has, but pay for it in KL: J is -2.43,
# where pi* has -0.16. IPO, cDPO and robust DPO are other losses (17). In the rows "DPO under" another distance replaces
# the KL.

# %%
six = equalities.World([[0]], [[1]] * 6, reward[None, :], ref_logp[None, :])
np.testing.assert_allclose(exact.optimum(ref_logp, reward, beta)[0], star, rtol=0, atol=1e-12)
np.testing.assert_allclose(equalities.newton(six, equalities.all_pairs(six), beta)[0][0], star, rtol=0, atol=1e-10)
np.testing.assert_allclose(frontier.unlikelihood(six, 0.0, 300)[0], np.log(preferred), rtol=0, atol=1e-2)
np.testing.assert_allclose(frontier.most_reward(six, 0.7), lowest_line(0.7)[0], rtol=0, atol=1e-5)

world = equalities.small_world(0)
outcomes, objectives = {outcome.name: outcome for outcome in assumptions.what_breaks_it(world, 0, 500)}, {}
print(f"\n{'121 responses, beta 0.5':<54}{'TV to pi*':>10}{'KL':>8}{'reward':>9}{'J':>8}{'below':>8}")
for name, outcome in outcomes.items():
    distances.append(frontier.most_reward(world, outcome.kl) - outcome.reward)
    objectives[name] = outcome.reward - beta * outcome.kl  # J
    cells = f"{outcome.tv:10.3f}{outcome.kl:8.2f}{outcome.reward:9.3f}{objectives[name]:8.2f}{distances[-1]:z8.3f}"
    print(f"{name:<54}{cells}")

# %%
picture = pathlib.Path("12_frontier.png")
LABELS = {
    "pi*, beta 0.5": ("pi*, DPO and policy gradient", (1.75, 1.25)),
    "reference": ("reference", (0.5, -0.85)),
    "preferred fine-tuning": ("preferred fine-tuning", (0.75, -0.5)),
    "unlikelihood, 30 steps": ("unlikelihood, 30 steps", (1.0, -0.15)),
    "unlikelihood, 3,000 steps": ("unlikelihood, 3,000 steps", (1.25, 0.2)),
}


def draw(path):
    with plots.figure(path, (6.4, 4.4)) as figure:
        axes = figure.subplots()
        axes.plot(sample_kl[::10], sample_reward[::10], ".", color=plots.INK, alpha=0.3, markersize=3)
        axes.plot(curve_kl, curve_reward, color=plots.PALETTE[0], linewidth=2)
        axes.text(0.75, 1.6, "the frontier: pi* of every beta", color=plots.PALETTE[0], ha="center")
        axes.text(2.55, -0.85, "dots: 2,000 policies, half of them\nrandom, half noisy pi*", ha="center")
        for name, (label, place) in LABELS.items():
            here, arrow = kl_and_reward(policies[name]), {"arrowstyle": "-", "color": plots.PALETTE[1]}
            paint = {"backgroundcolor": "white", "color": plots.PALETTE[1], "zorder": 3}
            axes.annotate(label, here, place, arrowprops=arrow, va="center", **paint)
            axes.plot(*here, "o", color=plots.PALETTE[1], zorder=4)
        axes.set(xlabel="KL(pi || pi_ref), nats", ylabel="expected reward")


if plots.installed():
    draw(picture)
print(f"\npicture: {picture.name}" if plots.installed() else "\nthe picture needs matplotlib (the `plot` extra)")

# %% [markdown]
# ## What was shown
#
# The frontier is the curve of pi*(beta), its slope is beta, and no policy is above it. With exact preferences DPO and
# the policy gradient of J reach it at the same point. Five breaches of the assumptions of 08 move DPO away from pi*:
# certain labels and flipped labels (1), few pairs (2), missing support (3), and a transformer that is too small (4). A
# transformer that is large enough misses pi* too if training is too brief. With these 300 pairs and with certain labels
# DPO has no finite minimiser: some response loses all its comparisons, and its logit falls for as long as one trains.
#
# ## Exercises
#
# 1. Take 1,000 equally likely responses with distinct rewards, and let the better response always win. Show that
#    preferred fine-tuning then has the best of two draws as its optimum. What is its KL? (Sum, or integrate.)
# 2. Find the bug: a plot has policies above the frontier. Its x axis is (pi_ref * (ref_logp - logp)).sum().
# 3. Predict, then measure: the best of 4 draws from the reference, by the true reward. Is this policy on the frontier,
#    near it, or far below? And with 64 draws?

# %%
for name in ("DPO, 500 steps", "policy gradient, 5,000 steps"):
    np.testing.assert_allclose(policies[name], star, rtol=0, atol=1e-6)
assert min(distances) > -1e-9  # neither table has a policy above the frontier
assert np.all(preferred < 2 * pi_ref) and np.isclose(preferred.sum(), 1)
wanted = preferred - down * rejected
unlikelihood_losses = [-(wanted * policies[f"unlikelihood, {n} steps"]).sum() for n in ("30", "3,000")]
unlikelihood_losses.append(-(wanted * policy_after(unlikelihood_push, 6000)).sum())
assert (wanted < 0).any() and sorted(unlikelihood_losses)[::-1] == unlikelihood_losses
assert outcomes["DPO, nothing broken"].tv < 0.01
assert [f"{objectives[name]:.2f}" for name in ("pi*", "DPO, labels without noise, 500 steps")] == ["-0.16", "-2.43"]
breaches = [name for name, outcome in outcomes.items() if name.startswith("DPO,") and outcome.tv > 0.03]
few = equalities.sampled_wins(world, stream(0, "pairs"), 300)  # (prompts, winners, losers): counts
certain = (world.reward[:, :, None] > world.reward[:, None, :]).astype(float)
for wins in (few, certain):
    assert ((wins.sum(axis=1) > 0) & (wins.sum(axis=2) == 0)).any(axis=1).all()  # some response only ever loses
assert len(breaches) == 5 + 1 and not exact.has_maximum((reward[:, None] > reward[None, :]).astype(float))
print("12: no policy of 20,000 lay above the curve of pi*; DPO and the policy gradient met on it, and five breaches of")
print("    the assumptions moved DPO away from pi*")

# %% [markdown]
# ## Solutions
#
# 1. y is the best of two draws if both are y, or one is y and the other worse: pi_ref(y)^2 + 2 pi_ref(y) P(worse).
#    preferred(y) is the same: 2 pi_ref(y) (P(worse) + pi_ref(y)/2), as a tie counts half. Its density at a rank between
#    0 and 1 is 2 rank, so the KL tends to the integral of 2 rank log(2 rank) = log 2 - 1/2 = 0.193.
# 2. The arguments are exchanged: that is KL(pi_ref || pi). The bound holds for KL(pi || pi_ref).
# 3. Below it: by 0.11 at 4 draws, and by less than 0.001 at 64. The log-ratios of pi* are linear in r; those of the
#    best of several depend on the order of the rewards alone. With many draws both give the best response.

# %%
ranks = equalities.World([[0]], [[1]] * 1000, np.arange(1000.0)[None, :], np.full((1, 1000), -np.log(1000)))
best_of_two = frontier.best_of(ranks, 2)
np.testing.assert_allclose(np.exp(best_of_two[0]), 2 / 1000 * (np.arange(1000) + 0.5) / 1000, rtol=1e-9)
np.testing.assert_allclose(frontier.kl_and_reward(ranks, best_of_two)[0], np.log(2) - 0.5, rtol=0, atol=1e-4)

sample_logp = log_softmax(start[10_000:])  # on the frontier, if the axis is right
exchanged = (pi_ref * (ref_logp - sample_logp)).sum(axis=-1)
assert (lowest_line(exchanged) < kl_and_reward(sample_logp)[1] - 1e-3).any()

for draws, below in ((4, 0.110), (64, 0.001)):
    kl, value = frontier.kl_and_reward(six, frontier.best_of(six, draws))
    np.testing.assert_allclose(lowest_line(kl)[0] - value, below, rtol=0, atol=5e-4)
    assert value < lowest_line(kl)[0]
