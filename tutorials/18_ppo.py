# %% [markdown]
# # 18. PPO beside DPO
#
# **Question.** What does PPO compute, from one sampled reply to one step, and what does it need that DPO does not?
#
# **Afterwards you can say**
# - where the policy gradient comes from, and why a baseline changes its noise and not its mean
# - what critic, advantage, ratio and clip are for
# - what decides where a method ends, and how near that is to pi*
#
# **Predict first.** Judges compare every two of 40 replies once: 780 labels, drawn from Bradley-Terry (01). DPO is
# trained on them to its optimum. A reward is fitted to them, and PPO climbs it while it writes 8,192 replies. Another
# PPO is told true rewards, and another DPO the true rewards of all pairs. The four end at two policies. Which end
# together? Which comes nearer to pi* on its way than at its end?
#
# **The formula.** state_t is the text before the token y_t, and old the policy that wrote the reply. PPO raises this
# sum, the *surrogate*, averaged over its samples:
#
#     sum_t min(ratio_t advantage_t, clip(ratio_t, 1 - epsilon, 1 + epsilon) advantage_t)
#     ratio_t     = pi(y_t|state_t)/old(y_t|state_t)
#     advantage_t = delta_t + lam delta_(t+1) + lam^2 delta_(t+2) + ...
#     delta_t     = reward_t + value(state_(t+1)) - value(state_t)
#     reward_t    = -beta log(old(y_t|state_t)/pi_ref(y_t|state_t)), plus r(y) at the last token

# %%
import itertools
import math
import pathlib

import numpy as np

from minidpo import Tensor, exact, losses, plots
from minidpo.theory import equalities, ppo

# %% [markdown]
# ## From NumPy alone: the policy gradient
# The world is that of 00: 40 replies of at most three tokens out of end, k, n and o. "ok" earns 1, "no" -1, all else 0.
# But here the policy has a row of four logits for each of the 13 states, so it can be any distribution over replies.

# %%
beta, eps = 0.5, 1e-6
odds = {"": "1124", "k": "4112", "n": "2114", "o": "2411"}  # of end, k, n, o after it
replies = ["".join(y) for length in range(4) for y in itertools.product("kno", repeat=length)]  # states first
written = np.array([[t <= len(text) for t in range(3)] for text in replies])  # (40, 3)
state = np.array([[replies.index(text[:t]) for t in range(3)] for text in replies])
token = np.array([[["", "k", "n", "o"].index(text[t : t + 1]) for t in range(3)] for text in replies])
reference = np.log([[*map(int, odds[text[-1:]])] for text in replies[:13]])  # (13, 4)
reward = np.array([{"ok": 1.0, "no": -1.0}.get(text, 0.0) for text in replies])
ok, no = replies.index("ok"), replies.index("no")


def log_softmax(s):
    return s - np.log(np.exp(s).sum(axis=-1, keepdims=True))


def logprobs(theta):  # of each token of each reply, (40, 3)
    return np.where(written, log_softmax(theta)[state, token], 0)


def total(theta):  # log pi(y)
    return logprobs(theta).sum(axis=1)


def to_logits(theta, push):  # (40, 3) -> (13, 4)
    out = np.zeros_like(theta)
    np.add.at(out, (state, token), push * written)
    return out - np.exp(log_softmax(theta)) * out.sum(axis=1, keepdims=True)  # onehot - pi (03)


ref_logp, ref_total = logprobs(reference), total(reference)
star, _ = exact.optimum(ref_total, reward, beta)


def J(theta):
    return exact.objective(total(theta), ref_total, reward, beta)


# %% [markdown]
# PPO climbs J(pi) = E_pi[r] - beta KL(pi || pi_ref) (08). Let net(y) = r(y) - beta log(pi(y)/pi_ref(y)). Then
# J = sum_y pi net. With d for a derivative:
#
#     dJ = sum_y (d pi) net + sum_y pi (d net)         product rule
#     d net = -beta d log pi                           r and pi_ref are constants
#     d pi = pi d log pi                               chain rule: the log-derivative trick
#     dJ = E_pi[net d log pi] - beta E_pi[d log pi]    put together
#     E_pi[d log pi] = sum_y d pi = d 1 = 0            probabilities sum to 1
#     dJ = E_pi[(net - baseline) d log pi]             baseline: any number that is the same for every y
#
# The trick turns a derivative of probabilities into a mean, which samples estimate.


# %%
def mean_and_noise(theta, push):  # of the gradient of one sampled reply
    each = np.array([to_logits(theta, push * row[:, None]) for row in np.eye(40)])
    p = np.exp(total(theta))
    mean = np.tensordot(p, each, 1)
    return mean, math.sqrt(p @ ((each - mean) ** 2).sum(axis=(1, 2)))


def token_rewards(logp, r):  # reward_t
    rewards = -beta * (logp - ref_logp)
    rewards[np.arange(40), written.sum(axis=1) - 1] += r
    return rewards


policy = reference.copy()
policy[0, 3] += math.log(3)  # as in 00: it begins with o 3 times in 4
rewards = token_rewards(logprobs(policy), reward)
gradient, noise = mean_and_noise(policy, rewards.sum(axis=1, keepdims=True))
for bump in eps * np.eye(52).reshape(52, 13, 4):
    slope = (J(policy + bump) - J(policy - bump)) / (2 * eps)
    np.testing.assert_allclose((gradient * bump).sum() / eps, slope, atol=1e-9)

# %% [markdown]
# ## Tokens, a critic and the advantage
# Which token earned the reward? Give each its share of the price of KL: reward_t. The shares of a reply sum to net.
# Given state_t, the sum over y_t of d pi(y_t|state_t) is 0. So any number that is fixed before y_t is drawn may be
# subtracted, as a baseline of its own: the rewards paid before, and a number for each state. A good one is the *value*:
# what the policy earns from there on, on average. A model that predicts it is the *critic*. The value of the empty text
# is J.
#
# Suppose that the policy has written "ok". *delta* is what a token changed: its reward, plus the value after it (0 at
# the end), minus the value before it.
#
#     token   reward_t   value before    delta    advantage at lam = 0    0.95       1
#     o         -0.203          0.106   -0.059                  -0.059   0.630   0.691
#     k          0.000          0.250    0.250                   0.250   0.725   0.750
#     end        1.000          0.500    0.500                   0.500   0.500   0.500
#
# **Predict.** "ok" is the best reply. Should this sample push o up?
#
# An advantage can look one token ahead and trust the critic for the rest: delta_t. Or two: delta_t + delta_(t+1), where
# the value in between cancels. Or to the end: what this reply earned, minus value(state_t). *Generalised advantage
# estimation* is their weighted mean:
#
#     (1-lam) delta_0 + (1-lam) lam (delta_0+delta_1) + lam^2 (delta_0+delta_1+delta_2)
#     = delta_0 + lam delta_1 + lam^2 delta_2
#
# At lam = 0, o is pushed down: the policy begins with o too often, says the critic. At lam = 1, o is pushed up, because
# this reply ended well. The mean over all replies that begin with o is -0.059 both times. lam = 1 is noisy, and right
# on average. lam = 0 is less noisy, and as wrong as its critic.


# %%
def state_sums(numbers):  # (40, 3) -> (13,)
    return np.bincount(state[written], (numbers * written)[written], 13)


def exact_values(theta, r):
    weight = np.exp(total(theta))[:, None]
    to_come = np.cumsum(token_rewards(logprobs(theta), r)[:, ::-1], axis=1)[:, ::-1]
    return state_sums(weight * to_come) / state_sums(weight)


def advantages(rewards, value, lam):  # (40, 3), (13,) -> (40, 3)
    before = np.where(written, value[state], 0)
    after = np.pad(before[:, 1:], ((0, 0), (0, 1)))
    advantage = rewards + after - before  # delta
    for t in (1, 0):
        advantage[:, t] += lam * advantage[:, t + 1]
    return advantage


value = exact_values(policy, reward)
by_lam = {lam: advantages(rewards, value, lam) for lam in (0, 0.95, 1)}
columns = [rewards[ok], value[state[ok]], *(each[ok] for each in by_lam.values())]
by_hand = [[-0.203, 0, 1], [0.106, 0.25, 0.5], [-0.059, 0.25, 0.5], [0.630, 0.725, 0.5], [0.691, 0.75, 0.5]]
np.testing.assert_allclose(columns, by_hand, atol=6e-4)
np.testing.assert_allclose(value[0], J(policy), rtol=1e-12)
np.testing.assert_allclose([0.05, 0.05 * 0.95, 0.95**2] @ np.cumsum(by_lam[0][ok]), by_lam[0.95][ok, 0], rtol=1e-12)
with_o = np.exp(total(policy)) * (token[:, 0] == 3)
np.testing.assert_allclose(with_o @ by_lam[1][:, 0] / with_o.sum(), by_lam[0][ok, 0], rtol=1e-9)

rewards, value = token_rewards(logprobs(policy), reward + 10), exact_values(policy, reward + 10)
net = rewards.sum(axis=1, keepdims=True)
pushes = {"no baseline": net, "net - J": net - value[0]}
pushes |= {f"exact critic, lam {lam}": advantages(rewards, value, lam) for lam in by_lam}
print(f"standard deviation of one sampled gradient: {noise:.2f}; with 10 added to every reward:")
for name, push in pushes.items():
    mean, deviation = mean_and_noise(policy, push)
    np.testing.assert_allclose(mean, gradient, atol=1e-12)
    print(f"  {name:<28}{deviation:6.2f}")
    assert deviation > 12 if name == "no baseline" else deviation < noise < 0.425
for lam in by_lam:
    blind, _ = mean_and_noise(policy, advantages(rewards, 0 * value, lam))
    assert np.allclose(blind, gradient) == (lam == 1)

# %% [markdown]
# Adding 10 to every reward teaches nothing, yet without a baseline it raises the noise from 0.42 to above 12. In each
# row the mean is the gradient of J. With a critic of zeros it is so only at lam = 1.
#
# ## Beside it: what DPO computes from one pair
# Take the same policy and the pair "ok" over "no". Against the reference, o is 3/2 times as likely and n half. So the
# margin is log 3, and DPO pushes log pi("ok") up by beta sigma(-z) = 0.183 and log pi("no") down by as much. Each token
# of "ok" gets this push, even o: a pair does not say which token was good.
#
# ## Ratio and clip
# Writing is slow, so PPO takes several steps on the same samples. At the first, the ratio is 1, and as d ratio = ratio
# d log pi, the mean gradient is that of J, if the critic is exact or lam = 1. Later the ratio corrects the choice of
# the token: in a given state, the average of ratio times f over tokens of old equals the average of f over tokens of
# pi. The states, the advantages and the price of KL in them are still those of old. Without the clip, nothing says when
# to stop. With it, the smaller of two terms counts, and the clipped one is constant. So the derivative with respect to
# log pi(y_t|state_t) is ratio times advantage, or 0. With epsilon = 0.2:
#
#     advantage   ratio   derivative
#        +1        1.1       1.1       go on
#        +1        1.3       0         gained enough: stop
#        +1        0.7       0.7       moved the wrong way: bring it back
#        -1        0.9      -0.9       go on
#        -1        0.7       0         lost enough: stop
#        -1        1.3      -1.3       moved the wrong way: bring it back


# %%
def surrogate_push(logp, old_logp, advantage, epsilon=0.2):
    ratio = np.exp(logp - old_logp)
    enough = np.where(advantage > 0, ratio > 1 + epsilon, ratio < 1 - epsilon)
    return np.where(enough, 0, ratio * advantage)


cases, signs = np.log([1.1, 1.3, 0.7, 0.9, 0.7, 1.3]), np.array([1, 1, 1, -1, -1, -1])
derivatives = surrogate_push(cases, 0, signs)
np.testing.assert_allclose(derivatives, [1.1, 0, 0.7, -0.9, 0, -1.3], rtol=1e-12)

PASSES = (1, 4, 16, 64, 256, 1024)
fixed = advantages(token_rewards(ref_logp, reward), exact_values(reference, reward), 0.95)


def reuse(seed, epsilon):  # J after passes over the same 16 replies
    share = np.random.default_rng(seed).multinomial(16, np.exp(ref_total))[:, None] / 16
    theta, path = reference, []
    for number in range(1, PASSES[-1] + 1):
        theta = theta + to_logits(theta, share * surrogate_push(logprobs(theta), ref_logp, fixed, epsilon))
        path += [J(theta)] if number in PASSES else []
    return path


clipped, free = (np.mean([reuse(seed, epsilon) for seed in range(20)], axis=0) for epsilon in (0.2, math.inf))

# %% [markdown]
# Without the clip, J reaches 0.216 after 16 passes (mean of 20 runs), and then falls below the 0.094 of the reference.
# With it, J reaches 0.174, and is still 0.164 after 1,024. The clip does not make the best of the samples. It makes too
# many passes harmless.
#
# ## Four runs
# PPO writes 16 replies, takes 4 passes, and repeats, 512 times. Its critic is a table: each visited value moves half of
# the way to the mean of value + advantage. DPO takes 1,000 steps on all pairs. Told the rewards, it counts a pair as
# both labels, weighted sigma(r_w - r_l) and sigma(r_l - r_w). It ends at its optimum. With few labels often none exists
# (08): then the distance only says how long DPO ran. We compare every two replies.


# %%
def run_ppo(seed, r):  # log pi(y) each 16 replies
    rng, theta, value, path = np.random.default_rng(seed), reference, np.zeros(13), []
    for _ in range(512):
        old_logp, p = logprobs(theta), np.exp(total(theta))
        share = rng.multinomial(16, p / p.sum())[:, None] / 16
        advantage = advantages(token_rewards(old_logp, r), value, 0.95)
        for _ in range(4):
            theta = theta + to_logits(theta, share * surrogate_push(logprobs(theta), old_logp, advantage))
        value = value + 0.5 * state_sums(share * advantage) / np.maximum(state_sums(share), 1e-9)
        path.append(total(theta))
    return np.array(path)


chance = exact.preference_probabilities(reward)


def judged(seed, times):  # how often each reply beat each other one, (40, 40)
    every = times * np.triu(np.ones((40, 40), dtype=int), 1)
    wins = np.random.default_rng(seed).binomial(every, chance)
    return wins + (every - wins).T


def pull(scores, wins):  # of log sigma(score_w - score_l) on each score
    weight = wins / (1 + np.exp(scores[:, None] - scores))
    return weight.sum(axis=1) - weight.sum(axis=0)


def run_dpo(wins):
    theta = reference
    for _ in range(1000):
        push = pull(beta * (total(theta) - ref_total), wins / wins.sum())
        theta = theta + 8 * to_logits(theta, push[:, None])
    return total(theta)


def distances(logps):
    return exact.total_variation(np.array(logps), star).mean(axis=0)


def fitted(runs, times):  # raises if no optimum exists
    return np.array([exact.fitted_rewards(judged(seed, times))[0] for seed in range(runs)])


learned = fitted(5, 1)  # (5, 40)
own, _ = exact.optimum(ref_total, learned, beta)  # pi* of each
by_labels, by_rewards = [run_dpo(judged(seed, 1)) for seed in range(5)], run_dpo(chance)
sampled = distances([run_ppo(seed, reward) for seed in range(5)])  # (512,)
paths = np.array([run_ppo(seed, r) for seed, r in enumerate(learned)])  # (5, 512, 40)
by_learned = distances(paths)

# %% [markdown]
# ## The answer to the prediction
# Those that were told the same end together. Means of five runs:
#
#     TV to pi*, told        DPO, optimum    PPO, 8,192 texts
#     780 labels                    0.175               0.175
#     true rewards                  0.000               0.000
#
# DPO's optimum on the labels is pi* of the fitted reward (08), and PPO comes within 0.01 of it. A reward, true or
# fitted, gives the same number whenever it is asked. So at its pi* every advantage is 0 if the critic is exact
# (exercise 1), and PPO's noise dies out. The noise of the labels stays in the fitted reward: a label is the toss of a
# coin. Four labels for each pair halve the distance, and 16 halve it again.
#
# The picture shows PPO's way, and the passes with and without the clip. With the fitted reward PPO is at 0.141 after
# 128 texts, nearer to pi* than at its end. From there to the end J of the fitted reward rises and the true J falls, in
# each run (13, section 4). Only the true reward says when to stop. The smaller beta is, the further PPO follows what is
# wrong in a fitted reward (00, 13, and [PPO beside DPO](../benchmarks/README.md#ppo-beside-dpo)).
#
# So DPO needs pairs, judged once. PPO needs a judge at any time, as it asks about what the policy writes now. And it
# holds four models: policy and critic, which it trains, reference and reward model. DPO holds policy and reference, in
# half the memory, if the critic is a model of its own (14).

# %%
cells = [f"{each:.3f}" for each in (distances(by_labels), by_learned[-1], distances([by_rewards]), sampled[-1])]
assert cells == ["0.175", "0.175", "0.000", "0.000"] and f"{by_learned[7]:.3f}" == "0.141"
np.testing.assert_allclose([*by_labels, by_rewards], [*own, star], atol=1e-4)
assert exact.total_variation(paths[:, -1], own).max() < 0.01
for r, sign in ((learned, 1), (reward, -1)):
    early, late = (exact.objective(logps, ref_total, r, beta) for logps in (paths[:, 7], paths[:, -1]))
    assert np.all(sign * (late - early) > 0)
by_count = [distances(exact.optimum(ref_total, fitted(20, times), beta)[0]) for times in (1, 4, 16)]
np.testing.assert_allclose(by_count, by_count[0] / [1, 2, 4], rtol=0.2)

texts = 16 * np.arange(1, 513)
panels = [
    plots.Panel("What PPO is told decides where it ends", "texts that PPO has written", "total variation to pi*", [
        plots.Curve("PPO, reward fitted to 780 labels", texts, by_learned),
        plots.Curve("PPO, true reward", texts, sampled),
    ], "log", distances(by_labels), "DPO, optimum on the same labels"),
    plots.Panel("The same 16 replies, again and again", "passes", "J", [
        plots.Curve("clip at 0.2", PASSES, clipped, "o"), plots.Curve("no clip", PASSES, free, "s"),
    ], "log", J(reference), "reference"),
]  # fmt: skip
picture = pathlib.Path("18_ppo.png")
drawn = plots.picture(picture, panels)
print(f"\npicture: {picture.name}" if drawn else "\nthe picture needs matplotlib (the `plot` extra)")

# %% [markdown]
# ## The library's version
# `ppo` does this for transformers. Its arrays have an entry for each written token.

# %%
value, rewards = exact_values(policy, reward), token_rewards(logprobs(policy), reward)
flat = [array[written] for array in (logprobs(policy), ref_logp, value[state])]
text = np.nonzero(written)[0]
seen = ppo.Rollout([], reward, *flat, text, np.append(np.diff(text) > 0, True))
np.testing.assert_allclose(ppo.token_rewards(seen, beta), rewards[written], atol=1e-12)
of_library = ppo.advantages(rewards[written], seen.value, seen.last, 1.0, 0.95)
np.testing.assert_allclose(of_library, advantages(rewards, value, 0.95)[written], atol=1e-12)
np.testing.assert_allclose(-ppo.surrogate_gradient(cases, 0, signs, 0.2, 1), derivatives)
leaf = Tensor(cases, requires_grad=True)
ppo.surrogate_loss(leaf, 0, signs, 0.2, 1).backward()  # the sweep of 02
np.testing.assert_allclose(-leaf.grad, derivatives)
by_reply = equalities.policy_gradient(total(policy), ref_total, reward, beta)
np.testing.assert_allclose(to_logits(policy, by_reply[:, None]), gradient, atol=1e-12)
four = [logps[[y]] for logps in (total(policy), ref_total) for y in (ok, no)]
np.testing.assert_allclose(np.ravel(losses.dpo_gradient(*four, beta=beta)), [-0.183, 0.183], atol=5e-4)

# %% [markdown]
# ## What was shown
# A baseline changes the policy gradient's noise and not its mean. Here the clip made too many passes harmless. PPO and
# DPO aim at the same pi*. Where a policy can be any distribution, they end together if they are told the same.
#
# ## Exercises
# 1. Derive: at pi*, with exact values, every delta is 0. (J(pi*) is beta log Z. What then is the value of a state?)
# 2. Find the bug: somebody raises clip(ratio_t, 0.8, 1.2) advantage_t, without the min. Which rows of the table change,
#    and what can no longer happen?
# 3. Predict, then measure: 10 is added to every reward, so pi* stays where it is. How near to it is PPO after
#    1,024 texts, and after 8,192? And DPO?

# %%
quoted = [free[2], J(reference), clipped[2], clipped[5]]
assert [f"{each:.3f}" for each in quoted] == ["0.216", "0.094", "0.174", "0.164"] and free[4] < 0
print("18: told the same labels, PPO and DPO end together, away from pi*; told the true rewards, both end at pi*")

# %% [markdown]
# ## Solutions
# 1. Let Z(state) be the mean of exp(r/beta) over pi_ref's replies from there. The value is beta log Z(state), and
#    pi*(y_t|state_t) = pi_ref(y_t|state_t) Z(state_(t+1))/Z(state_t). So -beta log(pi*/pi_ref) is value(state_t) -
#    value(state_(t+1)), and delta_t is 0. (At the last token r(y) takes the place of the value after it.)
# 2. Rows 3 and 6 become 0. A token that was moved too far the wrong way is never brought back.
# 3. After 1,024 texts it is at 0.054, not 0.008. Its critic begins at 0, and until it has learned the 10, all that was
#    sampled is pushed up. After 8,192 it is at 0.001. DPO sees only differences of rewards and ends where it did.

# %%
mass = np.zeros((13, 4))
np.add.at(mass, (state, token), np.exp(star)[:, None] * written)
best = np.log(mass)  # pi*
np.testing.assert_allclose(total(best), star, atol=1e-12)
delta = advantages(token_rewards(logprobs(best), reward), exact_values(best, reward), 0)
np.testing.assert_allclose(delta, 0, atol=1e-12)
without_min = np.diff(np.clip(np.exp([cases - eps, cases + eps]), 0.8, 1.2) * signs, axis=0)[0] / (2 * eps)
np.testing.assert_allclose(without_min, [1.1, 0, 0, -0.9, 0, 0], atol=1e-8)
risen = distances([run_ppo(seed, reward + 10) for seed in range(5)])
assert [f"{each:.3f}" for each in (risen[63], sampled[63], risen[-1])] == ["0.054", "0.008", "0.001"]
np.testing.assert_allclose(*map(exact.preference_probabilities, (reward, reward + 10)))
