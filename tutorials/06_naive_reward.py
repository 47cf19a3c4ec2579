# %% [markdown]
# # 06. The naive reward
#
# **Question.** Take log pi(y|x) itself as the reward, without a reference. What goes wrong, and what does not?
#
# **Afterwards you can say**
# - in which direction, and how hard, the naive loss pushes the two responses of a pair;
# - how length changes a pair's weight, and what it never changes;
# - what a reference changes, what it cannot change, and where the words that both responses share really cancel.
#
# **Predict first.** The chosen response is long, logp_w = -.735; the rejected one is short, logp_l = -.210. It is often
# said that this loss teaches "shorter is better". Does a step down its gradient push the long chosen response up or
# down? And does it push harder or more gently than for a pair whose two log-probabilities are equal?
#
# **The formula.** The policy is the model that we train. The reference is a frozen copy of it from before training. DPO
# measures each log-probability from the reference:
#
#     margin = (logp_w - ref_logp_w) - (logp_l - ref_logp_l),   z = beta * margin,   L = -log sigma(z)
#
# DPO's reward of a response is beta (logp - ref_logp); 08 shows where that comes from. The naive reward is logp alone.
# It is the case in which both ref_logp are 0 and beta is 1:
#
#     margin = logp_w - logp_l,   L = -log sigma(margin),   dL/dlogp_w = -sigma(-margin),   dL/dlogp_l = +sigma(-margin)
#
# The size of the slope dL/dz is called the pair's *weight*. It is sigma(-z) in DPO, and sigma(-margin) for the naive
# loss.

# %%
import math
import pathlib

import numpy as np

from minidpo import Tensor, losses, ops, plots


def sigma(z):
    return 1 / (1 + np.exp(-z))


def naive(logp_w, logp_l):
    """Loss, dL/dlogp_w and dL/dlogp_l of one pair."""
    margin = logp_w - logp_l
    return np.logaddexp(0, -margin), -sigma(-margin), sigma(-margin)  # -log sigma(margin) = log(1 + e^-margin)


long_chosen, short_rejected = -0.735, -0.210
loss, slope_w, slope_l = naive(long_chosen, short_rejected)
pairs = {"long chosen": (long_chosen, short_rejected), "short chosen": (short_rejected, long_chosen)}
pairs["equal"] = (-0.5, -0.5)
print("pair             margin    loss   dL/dlogp_w   dL/dlogp_l")
cells = []
for name, pair in pairs.items():
    cells.append([f"{pair[0] - pair[1]:+.3f}", *(f"{number:.3f}" for number in naive(*pair))])
    print(f"{name:<15}{cells[-1][0]:>8}{cells[-1][1]:>8}{cells[-1][2]:>13}{cells[-1][3]:>13}")
assert cells[0] == ["-0.525", "0.990", "-0.628", "0.628"] and cells[1] == ["+0.525", "0.465", "-0.372", "0.372"]
assert cells[2] == ["+0.000", "0.693", "-0.500", "0.500"]

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
# Up, and harder.
#
#     pair            margin    loss     dL/dlogp_w    dL/dlogp_l
#     long chosen     -0.525    0.990    -0.628        0.628
#     short chosen    +0.525    0.465    -0.372        0.372
#     equal           +0.000    0.693    -0.500        0.500
#
# The slope with respect to logp_w is -.628, so descent pushes the long chosen response up. At margin 0 the slope is
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
# and the pair teaches nothing. (That is at beta = 1, as in the formula. With beta = 0.1 the weights would be
# sigma(3) = .953 and sigma(-3) = .047, still 20 to 1.) DPO starts both pairs at sigma(0) = 1/2.
#
# Now take 100 gradient steps on the two log-probabilities themselves, at beta = 1. What is learned is the growth of
# logp_w - logp_l:
#
#     pair            weight at first        learned, nats
#                     naive      DPO         naive     DPO
#     long chosen     1.0e+00    0.5         20.000    2.908
#     short chosen    9.4e-14    0.5          0.000    2.908
#
# The picture shows both for every difference in length. Naive and DPO agree where the lengths are equal. No weight is
# negative: no length turns the direction round.

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
cells = []
for name, pair in starts.items():
    cells.append([f"{-naive(*pair)[1]:.1e}", f"{sigma(0)}", *(f"{nats:.3f}" for nats in growths[name])])
    print("{:<15}{:>8}{:>7}{:>10}{:>8}".format(name, *cells[-1]))
assert cells == [["1.0e+00", "0.5", "20.000", "2.908"], ["9.4e-14", "0.5", "0.000", "2.908"]]
assert [round(sigma(z), 3) for z in (3, -3)] == [0.953, 0.047]
assert growths["long chosen"][0] > 19.9 and growths["short chosen"][0] < 1e-11
np.testing.assert_allclose(growths["long chosen"][1], growths["short chosen"][1], rtol=1e-9)

extra = np.linspace(-20, 20, 161)  # tokens by which the chosen response is longer
weights = [plots.Curve(f"naive, beta {beta:g}", extra, sigma(-beta * PER_TOKEN * extra)) for beta in (1, 0.1)]
weights.insert(1, plots.Curve("DPO, any beta", extra, np.full(extra.shape, sigma(0))))
naive_learns = plots.Curve("naive, beta 1", extra, growth(PER_TOKEN * extra, 0.0, 0, 0, 1))
dpo_learns = plots.Curve("DPO, beta 1", extra, growth(PER_TOKEN * extra, 0.0, PER_TOKEN * extra, 0.0, 1))
np.testing.assert_allclose([naive_learns.y[80], dpo_learns.y[80]], growths["long chosen"][1], rtol=1e-9)  # extra = 0
assert all((curve.y > 0).all() for curve in (*weights, naive_learns, dpo_learns))
longer = "tokens by which the chosen response is longer"
panels = [
    plots.Panel("Weight before the first step", longer, "weight", weights),
    plots.Panel(f"What {STEPS} steps teach", longer, "growth of logp_w - logp_l, nats", [naive_learns, dpo_learns]),
]
path = pathlib.Path("06_naive_reward.png")
print(f"picture: {path.name}" if plots.picture(path, panels) else "the picture needs matplotlib (the `plot` extra)")

# %% [markdown]
# ## What the reference changes: the weight, never the direction
# ref_logp_w and ref_logp_l are constants. Whatever they are, the gradient with respect to (logp_w, logp_l) is
# beta sigma(-z) times (-1, +1).
#
# Here is another claim that you may meet: the reference stops common words from being rewarded. Let training raise
# "Paris" from .20 to .45 and "the" from .95 to .96. At beta = .1 the rewards for that are a tenth of .811 and of .0105,
# a ratio of 77 to 1. But without a reference the log-probabilities also rise by .811 and .0105: 77 to 1 again. And if
# "the" occurs 50 000 times and "Paris" 10 times, "the" gains more in total, with a reference too.
#
# What removes shared words is the subtraction *within a pair*. Where both responses have the same tokens so far and the
# same token next, both need the same row of logits. A step down the gradient pushes that row along onehot - softmax
# (tutorial 03) for the chosen response, and by as much the other way for the rejected one: the two cancel. In the row
# where they part, and in the rows after that, a push is left. Here for "the is Paris yes" against "the is Rome yes",
# with random logits:
#
#     after the prefix    largest |dL/dlogit|
#     (nothing)           0.0000
#     the                 0.0000
#     the is              0.8266
#     the is Paris        0.4445
#     the is Rome         0.6049

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
largest = [f"{abs(row).max():.4f}" for row in logits.grad]
for prefix, number in zip(prefixes, largest):
    print(f"{' '.join(prefix) or '(nothing)':<16}{number:>13}")
assert largest == ["0.0000", "0.0000", "0.8266", "0.4445", "0.6049"]
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
# in length sets them, and at beta = 1 it drives them to 0 or 1. (On the support desk of tutorial 05, at beta = 0.1, we
# saw no harm that comes from these weights alone: replies do not become shorter, and they fall apart with a reference,
# too. `python -m benchmarks.story` measures it.)
#
# A reference changes the weight of a pair, never the direction of its push. Shared words cancel within a pair, with or
# without a reference.
#
# ## Exercises
# 1. Derive: at what margin is the naive weight 1/100? How many tokens of -1.5 nats is that?
# 2. Find the bug: someone makes the naive reward "fair" and takes the *mean* over a response's tokens instead of the
#    sum. Responses of 4 and of 8 tokens share their first 3. With what factor does a shared token's log-probability
#    enter the margin?
# 3. Predict, then measure: a model chooses each token without looking at the others. It is end-of-text with probability
#    1/20, else one of 4 characters, all equally likely. So a reply has 20 tokens on average. People compare replies of
#    30 tokens with replies of 10 tokens, and 9 times in 10 they choose the *short* one. Train the probability of
#    end-of-text, the only parameter, with the naive loss and with DPO, both at beta = 1, for 500 steps at learning rate
#    0.1. Do replies become shorter or longer?

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
# 3. DPO makes them shorter, 6.7 tokens on average. The naive loss makes them *longer*, 118 tokens, and does not stop
#    there. Before training a short reply is 28.8 nats likelier than a long one, only because it is shorter. So a pair
#    has weight 3e-13 if the short reply was chosen, and 1 if the long one was. The one label in ten that is for the
#    long reply decides. There is no end, because the 20 extra characters alone cost 20 log 4 = 27.7 nats, however rare
#    end-of-text is. DPO counts from the reference. It ends where the margin of a pair that chose the short reply is
#    log 9, so that sigma(z) is .9, as in the labels.

# %%
np.testing.assert_allclose(sigma(-math.log(99)), 1 / 100, rtol=1e-12)
assert round(math.log(99), 1) == 4.6 and round(math.log(99) / 1.5) == 3
tokens = Tensor(np.full(3, -1.5), requires_grad=True)  # log-probabilities of the shared tokens
((ops.sum(tokens) - 1.5 * 1) / 4 - (ops.sum(tokens) - 1.5 * 5) / 8).backward()
np.testing.assert_allclose(tokens.grad, 1 / 8, rtol=1e-12)


def logprob_of_length(parameter, tokens):
    """log pi of a reply; a token is a character with probability sigma(parameter), and else end-of-text."""
    return (tokens - 1) * (ops.logsigmoid(parameter) - math.log(4)) + ops.logsigmoid(-parameter)


def mean_length(loss_of, steps):
    parameter = Tensor(math.log(19), requires_grad=True)  # sigma(log 19) = 19/20
    for _ in range(steps):
        long, short = (logprob_of_length(parameter, tokens) for tokens in (LONG, SHORT))
        (0.9 * loss_of(short, long, SHORT, LONG) + 0.1 * loss_of(long, short, LONG, SHORT)).backward()
        parameter.data, parameter.grad = parameter.data - 0.1 * parameter.grad, None
    return 1 / sigma(-parameter.data)


reference = {tokens: logprob_of_length(math.log(19), tokens).item() for tokens in (LONG, SHORT)}
likelier = reference[SHORT] - reference[LONG]
assert round(likelier, 1) == 28.8 and f"{sigma(-likelier):.0e}" == "3e-13" and round(20 * math.log(4), 1) == 27.7


def naive_loss(logp_w, logp_l, *_):
    return losses.reference_free_loss(logp_w, logp_l, beta=1.0).loss


def dpo_loss(logp_w, logp_l, tokens_w, tokens_l):
    return losses.dpo_loss(logp_w, logp_l, reference[tokens_w], reference[tokens_l], beta=1.0).loss


lengths = mean_length(naive_loss, 500), mean_length(dpo_loss, 500)
print("mean length 20.0 at first, after 500 steps: naive {:.1f}, DPO {:.1f}".format(*lengths))
assert f"{lengths[0]:.0f}" == "118" and mean_length(naive_loss, 600) > lengths[0] + 5
np.testing.assert_allclose(lengths[1], 1 / (1 - 19 / 20 * 9 ** (-1 / 20)), rtol=1e-3)  # margin log 9
assert f"{lengths[1]:.1f}" == "6.7"
