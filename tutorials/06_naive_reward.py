# %% [markdown]
# # 06. The naive reward
#
# **Question.** Take log pi(y|x) itself as the reward, without a reference. What goes wrong, and what does not?
#
# **Afterwards you can say**
# - in which direction, and how hard, the naive loss pushes the two responses of a pair;
# - how length changes a pair's weight, and what it never changes;
# - what a reference changes, what it cannot change, and where the filler that both responses share really cancels.
#
# **Predict first.** The chosen response is long, logp_w = -.735; the rejected one is short, logp_l = -.210. It is often
# said that this loss teaches "shorter is better". Does a step down its gradient push the long chosen response up or
# down? And does it push harder or more gently than for a pair whose two log-probabilities are equal?
#
# **The formula.** The naive reward of a response is its log-probability. Then margin = logp_w - logp_l,
# L = -log sigma(margin), and so
#
#     dL/dlogp_w = -sigma(-margin),   dL/dlogp_l = +sigma(-margin).
#
# DPO measures each log-probability from a reference. The policy is the model that we train; the reference is a frozen
# copy of it from before training.
#
#     margin = (logp_w - ref_logp_w) - (logp_l - ref_logp_l),   z = beta * margin,   L = -log sigma(z).
#
# DPO's reward of a response is beta (logp - ref_logp); 08 shows where that comes from. The size of the slope dL/dz is
# called the pair's weight: sigma(-z) in DPO, and sigma(-margin) for the naive loss, where z = margin.

# %%
import math

import numpy as np

from minidpo import Tensor, losses, ops


def sigma(z):
    return 1 / (1 + np.exp(-z))


def naive(logp_w, logp_l):
    """Loss, dL/dlogp_w and dL/dlogp_l of one pair."""
    margin = logp_w - logp_l
    return np.logaddexp(0, -margin), -sigma(-margin), sigma(-margin)  # -log sigma(margin) = log(1 + e^-margin)


long_chosen, short_rejected = -0.735, -0.210
loss, slope_w, slope_l = naive(long_chosen, short_rejected)
print("the long response is chosen    margin    loss   dL/dlogp_w   dL/dlogp_l")
for name, pair in (("yes", (long_chosen, short_rejected)), ("no, it is rejected", (short_rejected, long_chosen))):
    print(f"{name:<29}{pair[0] - pair[1]:>+8.3f}" + "{:>8.3f}{:>13.3f}{:>13.3f}".format(*naive(*pair)))
print(f"{'equal log-probabilities':<29}{0:>+8.3f}" + "{:>8.3f}{:>13.3f}{:>13.3f}".format(*naive(-0.5, -0.5)))

# %% [markdown]
# ## The library's version
# `losses.reference_free_loss` at beta = 1: by its sweep, in closed form, and against a finite difference.

# %%
leaf_w, leaf_l = Tensor(long_chosen, requires_grad=True), Tensor(short_rejected, requires_grad=True)
out = losses.reference_free_loss(leaf_w, leaf_l, beta=1.0)
out.loss.backward()
closed_w, closed_l = losses.reference_free_gradient(long_chosen, short_rejected, beta=1.0)
finite_w = (naive(long_chosen + 1e-6, short_rejected)[0] - naive(long_chosen - 1e-6, short_rejected)[0]) / 2e-6
np.testing.assert_allclose([out.loss.item(), leaf_w.grad, leaf_l.grad], [loss, slope_w, slope_l], rtol=0, atol=1e-12)
np.testing.assert_allclose([closed_w, closed_l, finite_w], [slope_w, slope_l, slope_w], rtol=0, atol=1e-9)

# %% [markdown]
# ## The answer to the prediction
# Up, and harder. The slope on logp_w is -.628, so descent pushes the long chosen response up; at margin 0 the slope is
# only -.5. The label decides the direction, at every margin. (This is the push on the two log-probabilities. In a model
# they share parameters, and what a step then does to them is another question, with or without a reference.) The naive
# *reward* does rank the short response first. But the loss sees labelled pairs only, and never scores one of the
# model's own samples.
#
# The figures come from an example that you may meet in explanations of DPO: 7 tokens against 2, each with
# probability .9. Unrounded they are 7 log .9 = -.7375 and 2 log .9 = -.2107. The probabilities are .480 and .811.
# Together they exceed 1, so no model gives both to two complete responses to one prompt.

# %%
assert round(out.margin.item(), 3) == -0.525 and round(loss, 3) == 0.990 and round(slope_w, 3) == -0.628
assert slope_w < naive(-0.5, -0.5)[1] == -0.5
assert round(7 * math.log(0.9), 4) == -0.7375 and round(2 * math.log(0.9), 4) == -0.2107
assert round(math.exp(long_chosen), 3) == 0.480 and round(math.exp(short_rejected), 3) == 0.811

# %% [markdown]
# ## What lengths do: they set the weights
# Say that every token costs 1.5 nats. Then 20 extra tokens make the margin -30 or +30 before anything is learned. If
# the chosen response is the long one, the pair has a weight of nearly 1. If it is the short one, the weight is nearly 0
# and the pair teaches nothing. (That is at beta = 1, as in the formula. At beta = 0.1 the weights would be
# sigma(3) = .953 and sigma(-3) = .047, still 20 to 1.) DPO starts both pairs at sigma(0) = 1/2. Below we take gradient
# steps on the two log-probabilities themselves and look at what is learned: the growth of logp_w - logp_l.

# %%
PER_TOKEN, LONG, SHORT, RATE, STEPS = -1.5, 30, 10, 0.1, 100
starts = {"long chosen": (LONG * PER_TOKEN, SHORT * PER_TOKEN), "short chosen": (SHORT * PER_TOKEN, LONG * PER_TOKEN)}


def growth(logp_w, logp_l, ref_logp_w, ref_logp_l, beta):
    """The growth of logp_w - logp_l. The naive reward is the case ref_logp = 0, beta = 1."""
    start = logp_w - logp_l
    for _ in range(STEPS):
        weight = sigma(-beta * (logp_w - ref_logp_w - logp_l + ref_logp_l))
        logp_w, logp_l = logp_w + RATE * beta * weight, logp_l - RATE * beta * weight
    return logp_w - logp_l - start


growths = {name: (growth(*pair, 0, 0, 1), growth(*pair, *pair, 1)) for name, pair in starts.items()}
print(f"\nafter {STEPS} steps     first weight    learned, nats")
print("pair              naive    DPO     naive     DPO   (beta 1)")
for name, (logp_w, logp_l) in starts.items():
    print(f"{name:<15}{-naive(logp_w, logp_l)[1]:>8.1e}{0.5:>7}{growths[name][0]:>10.3f}{growths[name][1]:>8.3f}")
assert [round(sigma(z), 3) for z in (3, -3)] == [0.953, 0.047]
assert growths["long chosen"][0] > 19.9 and growths["short chosen"][0] < 1e-11
np.testing.assert_allclose(growths["long chosen"][1], growths["short chosen"][1], rtol=1e-9)

# %% [markdown]
# ## What the reference changes: the weight, never the direction
# ref_logp_w and ref_logp_l are constants. Whatever they are, the gradient is beta sigma(-z) times (-1, +1).
#
# Here is another claim that you may meet: the reference stops common words from being rewarded. Let training raise
# "Paris" from .20 to .45 and "the" from .95 to .96. At beta = .1 the rewards for that are a tenth of .811 and of .0105,
# a ratio of 77 to 1. But without a reference the log-probabilities also rise by .811 and .0105: 77 to 1 again. And if
# "the" occurs 50 000 times and "Paris" 10 times, "the" gains more in total, with a reference too.
#
# What removes shared filler is the subtraction *within a pair*. Where both responses have the same tokens so far and
# the same token next, the push on the logits, onehot - softmax, comes once with + and once with -, and cancels. Where
# they part, and in every row after that, a push is left.

# %%
gain = {"Paris": math.log(0.45 / 0.20), "the": math.log(0.96 / 0.95)}
assert round(gain["Paris"], 3) == 0.811 and round(gain["the"], 4) == 0.0105
assert round(gain["Paris"] / gain["the"]) == 77
totals = 0.1 * 50_000 * gain["the"], 0.1 * 10 * gain["Paris"]
print(f"\nrewards in total: the {totals[0]:.1f}, Paris {totals[1]:.3f}")
assert totals[0] > 50 * totals[1]

rng = np.random.default_rng(0)
words = {"the": 0, "is": 1, "Paris": 2, "Rome": 3, "yes": 4}
chosen, rejected = (["the", "is", city, "yes"] for city in ("Paris", "Rome"))
prefixes = sorted(
    {tuple(y[:t]) for y in (chosen, rejected) for t in range(4)}, key=lambda prefix: (len(prefix), prefix)
)
logits = Tensor(rng.normal(size=(len(prefixes), len(words))), requires_grad=True)  # one row per prefix


def logprob(y):
    rows = logits[np.array([prefixes.index(tuple(y[:t])) for t in range(len(y))])]
    return ops.sum(ops.gather(ops.log_softmax(rows), np.array([words[word] for word in y])))


losses.reference_free_loss(logprob(chosen), logprob(rejected), beta=1.0).loss.backward()
print("\nafter the prefix    largest |dL/dlogit|")
for prefix, row in zip(prefixes, logits.grad):
    print(f"{' '.join(prefix) or '(nothing)':<16}{abs(row).max():>13.4f}")
shared = [len(prefix) < 3 and prefix != ("the", "is") for prefix in prefixes]
assert abs(logits.grad[shared]).max() < 1e-15 and abs(logits.grad[~np.array(shared)]).max(axis=1).min() > 0.01

# %% [markdown]
# ## What DPO does not solve
# DPO's log-ratios are sums too. If every token of a response is `rise` nats likelier than under the reference, its
# reward is beta * rise * |y|, where |y| counts its tokens: three times the length earns three times the reward.
#
# And small rewards prove nothing. Suppose that you see rewards of +.0015 and -.0010. Then P(chosen preferred) is
# sigma(.0025) = .5006 and the loss is .6919, where no preference at all gives .5 and log 2 = .6931. DPO starts with
# policy = reference, and there both rewards are exactly 0.

# %%
out = losses.dpo_loss(*(np.array([logp]) for logp in (LONG * -1.4, SHORT * -1.4, LONG * -1.5, SHORT * -1.5)), beta=0.1)
np.testing.assert_allclose(out.reward_w.data / out.reward_l.data, LONG / SHORT, rtol=1e-9)
rewards = out.reward_w.data[0], out.reward_l.data[0]
print(f"\nrise = 0.1, beta = 0.1: reward {rewards[0]:.2f} for {LONG} tokens, {rewards[1]:.2f} for {SHORT}")
z = 0.0015 + 0.0010
assert round(sigma(z), 4) == 0.5006 and round(np.logaddexp(0, -z), 4) == 0.6919 and round(math.log(2), 4) == 0.6931
start = losses.dpo_loss(-10.0, -15.0, -10.0, -15.0, beta=0.1)
assert start.reward_w.item() == start.reward_l.item() == 0 and abs(start.loss.item() - math.log(2)) < 1e-12

# %% [markdown]
# ## What was shown
# The naive loss pushes up the response that the label names, long or short. Its weights are what is wrong: a difference
# in length sets them, and at beta = 1 saturates them. (At beta = 0.1 the support desk shows no harm that is theirs
# alone: replies do not become shorter, and they fall apart with a reference, too. `python -m benchmarks.story` measures
# it.)
# A reference changes the weight of a pair, never the direction of its push. Shared filler cancels within a pair, with
# or without a reference.
#
# ## Exercises
# 1. Derive: at what margin is the naive weight 1/100? How many tokens of -1.5 nats is that?
# 2. Find the bug: someone makes the naive reward "fair" and takes the *mean* over a response's tokens instead of the
#    sum. Responses of 4 and of 8 tokens share their first 3. With what factor does a shared token's log-probability
#    enter the margin?

# %%
for ref in rng.normal(scale=5.0, size=(20, 2)):
    g_w, g_l = losses.dpo_gradient(long_chosen, short_rejected, *ref, beta=0.1)
    assert g_w < 0 and g_l == -g_w
    np.testing.assert_allclose(g_w, -0.1 * sigma(-0.1 * (long_chosen - ref[0] - short_rejected + ref[1])), rtol=1e-12)
print("06: the long chosen response is pushed up, harder than at margin 0; a reference changes only the weight")

# %% [markdown]
# ## Solutions
# 1. sigma(-margin) = 1/100 where the margin is log 99 = 4.6 nats: about three tokens.
# 2. With 1/4 - 1/8 = 1/8, where the sum gives 1 - 1 = 0. The shared prefix no longer cancels, so training also moves
#    text on which the two responses agree. That is another objective, with another bias.

# %%
np.testing.assert_allclose(sigma(-math.log(99)), 1 / 100, rtol=1e-12)
assert round(math.log(99), 1) == 4.6 and round(math.log(99) / 1.5) == 3
tokens = Tensor(np.full(3, -1.5), requires_grad=True)  # log-probabilities of the shared tokens
((ops.sum(tokens) - 1.5 * 1) / 4 - (ops.sum(tokens) - 1.5 * 5) / 8).backward()
np.testing.assert_allclose(tokens.grad, 1 / 8, rtol=1e-12)
