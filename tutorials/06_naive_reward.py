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
# **Predict first.** The chosen response is long, logp_w = -.735; the rejected one is short, logp_l = -.210. A common
# claim (E3 in `errata.py`) is that this loss teaches "shorter is better". Does a step down its gradient push the long
# chosen response up or down? Does it push harder or more gently than for a pair with equal log-probabilities?
#
# **The formula.** The policy is the model that we train. The reference is a frozen copy of it from before training. DPO
# measures each log-probability from the reference:
#
#     margin = (logp_w - ref_logp_w) - (logp_l - ref_logp_l),   z = beta * margin,   L = -log sigma(z)
#
# DPO has no reward model. It calls beta (logp - ref_logp) the reward, because its loss treats that number like a score
# of 01; 08 shows why. The naive reward is beta logp: both ref_logp are 0. Unless said otherwise, beta is 1 here:
#
#     margin = logp_w - logp_l,   L = -log sigma(margin),   dL/dlogp_w = -sigma(-margin),   dL/dlogp_l = +sigma(-margin)
#
# The size of the slope dL/dz is called the pair's *weight*. It is sigma(-z) in DPO, and sigma(-margin) for the naive
# loss.

# %%
import math
import pathlib

import numpy as np

from minidpo import Tensor, losses, ops, plots, world


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
# they share parameters, and what a step then does to them is another question, with or without a reference.)
#
# The figures are those of the claim (E20): 7 tokens against 2, each with probability .9, and log .9 rounded to -.105.
# As probabilities they are .480 and .811. Together they exceed 1, so no model gives both to two complete responses to
# one prompt.

# %%
assert round(out.margin.item(), 3) == -0.525 and round(loss, 3) == 0.990 and round(slope_w, 3) == -0.628
assert slope_w < naive(-0.5, -0.5)[1] == -0.5
np.testing.assert_allclose([7 * round(math.log(0.9), 3), 2 * round(math.log(0.9), 3)], [long_chosen, short_rejected])
assert round(math.exp(long_chosen), 3) == 0.480 and round(math.exp(short_rejected), 3) == 0.811

# %% [markdown]
# ## What lengths do: they set the weights
# Say that every token costs 1.5 nats. Then 20 extra tokens make the margin -30 or +30 before anything is learned. If
# the chosen response is the long one, the pair has a weight of nearly 1. If it is the short one, the weight is 9.4e-14,
# and the pair teaches nothing. (At beta = 0.1 the weights are sigma(3) = .953 and sigma(-3) = .047, still 20 to 1.) DPO
# starts both pairs at sigma(0) = 1/2.
#
# What does that do to a model? Take one that chooses each token without looking at the others. It is end-of-text with
# probability 1/20, else one of 4 characters, all equally likely. So a reply has 20 tokens on average. People compare
# replies of 30 tokens with replies of 10 tokens, and 9 times in 10 they choose the *short* one. We train the
# probability of end-of-text, the only parameter, for 500 steps at learning rate 0.1.
#
# **Predict.** With the naive loss, and with DPO: do replies become shorter or longer?
#
# DPO makes them shorter, 6.7 tokens on average. The naive loss makes them *longer*, 118 tokens, and does not stop
# there. Before training a short reply is 28.8 nats likelier than a long one, only because it is shorter. So a pair has
# weight 3e-13 if the short reply was chosen, and 1 if the long one was. The one label in ten that is for the long reply
# decides. There is no end, because the 20 extra characters alone cost 20 log 4 = 27.7 nats, however rare end-of-text
# is. DPO counts from the reference. It ends where the margin of a pair that chose the short reply is log 9, so that
# sigma(z) is .9, as in the labels.
#
# The picture shows the weights for every difference in length, and how the replies of the model grow and shrink.

# %%
PER_TOKEN, LONG, SHORT = -1.5, 30, 10
assert f"{sigma(20 * PER_TOKEN):.1e}" == "9.4e-14" and [round(sigma(z), 3) for z in (3, -3)] == [0.953, 0.047]


def logprob_of_length(parameter, tokens):
    """log pi of a reply; a token is a character with probability sigma(parameter), and else end-of-text."""
    return (tokens - 1) * (ops.logsigmoid(parameter) - math.log(4)) + ops.logsigmoid(-parameter)


def mean_lengths(ref_logp, steps, short_chosen=0.9, beta=1.0):
    """The mean length of replies before and after each step.  ref_logp: of a reply of LONG and of SHORT tokens"""
    parameter, lengths = Tensor(math.log(19), requires_grad=True), []  # sigma(log 19) = 19/20
    for _ in range(steps + 1):
        lengths.append(1 / sigma(-parameter.data))
        long, short = (logprob_of_length(parameter, tokens) for tokens in (LONG, SHORT))
        agree = losses.dpo_loss(short, long, *ref_logp[::-1], beta).loss
        (short_chosen * agree + (1 - short_chosen) * losses.dpo_loss(long, short, *ref_logp, beta).loss).backward()
        parameter.data, parameter.grad = parameter.data - 0.1 * parameter.grad, None
    return np.array(lengths)


reference = [logprob_of_length(math.log(19), tokens).item() for tokens in (LONG, SHORT)]
likelier = reference[1] - reference[0]
assert round(likelier, 1) == 28.8 and f"{sigma(-likelier):.0e}" == "3e-13" and round(20 * math.log(4), 1) == 27.7
naive_lengths, dpo_lengths = (mean_lengths(ref_logp, 600) for ref_logp in ((0.0, 0.0), reference))
print(f"\nmean length 20.0 at first, after 500 steps: naive {naive_lengths[500]:.1f}, DPO {dpo_lengths[500]:.1f}")
assert f"{naive_lengths[500]:.0f}" == "118" and naive_lengths[600] > naive_lengths[500] + 5
np.testing.assert_allclose(dpo_lengths[500], 1 / (1 - 19 / 20 * 9 ** (-1 / 20)), rtol=1e-3)  # margin log 9
assert f"{dpo_lengths[500]:.1f}" == "6.7"

extra = np.linspace(-20, 20, 161)
weights = [plots.Curve(f"naive, beta {beta:g}", extra, sigma(-beta * PER_TOKEN * extra)) for beta in (1, 0.1)]
weights.insert(1, plots.Curve("DPO, any beta", extra, np.full(extra.shape, sigma(0))))
steps, trained = np.arange(501), {"naive, beta 1": naive_lengths, "DPO, beta 1": dpo_lengths}
curves = [plots.Curve(name, steps, lengths[:501]) for name, lengths in trained.items()]
panels = [
    plots.Panel("Weight before the first step", "tokens by which the chosen response is longer", "weight", weights),
    plots.Panel("People prefer short replies", "steps of training", "mean length of replies, tokens", curves),
]
path = pathlib.Path("06_naive_reward.png")
print(f"picture: {path.name}" if plots.picture(path, panels) else "the picture needs matplotlib (the `plot` extra)")

# %% [markdown]
# ## The same reward in RLHF
# RLHF samples from the policy and maximises the mean reward, here E_pi[log pi(y|x)]. That is minus the entropy. It is
# largest, 0, where the policy always writes the same reply. Each step raises the logit of the likeliest reply most,
# whatever people prefer. (The naive *loss* never scores the model's own samples.) Here with three replies:

# %%
policy = np.array([0.3, 0.5, 0.2])
for _ in range(1000):
    slope = policy * (np.log(policy) - policy @ np.log(policy))  # with respect to the logits
    assert slope.argmax() == 1
    policy = policy * np.exp(0.1 * slope)
    policy = policy / policy.sum()
print("three replies, reward log pi, from 0.3 0.5 0.2 to {:.3f} {:.3f} {:.3f}".format(*policy))
assert policy[1] > 0.99

# %% [markdown]
# ## What the reference changes: the weight, never the direction
# ref_logp_w and ref_logp_l are constants. Whatever they are, the gradient with respect to (logp_w, logp_l) is beta
# sigma(-z) times (-1, +1).
#
# Another claim (E2) is that the reference stops common words from being rewarded. Let training raise "Paris" from .20
# to .45 and "the" from .95 to .96. Their log-probabilities rise by .811 and .0105, 77 to 1. ref_logp is a constant, so
# the rewards rise by beta times that, with a reference or without. And if "the" occurs 50 000 times and "Paris" 10
# times, "the" gains more in total, with a reference too.
#
# What removes shared words is the subtraction *within a pair*, and only before the first difference. Where both
# responses have the same tokens so far and the same token next, both need the same row of logits. A step down the
# gradient pushes that row along onehot - softmax (tutorial 03) for the chosen response, and by as much the other way
# for the rejected one: the two cancel. In the row where they part, and in the rows after that, a push is left, even for
# the same word ("yes"). Here for "the is Paris yes" against "the is Rome yes", with random logits:
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
# And rewards of +.0015 and -.0010 look like success. They are what a policy has that has hardly moved: the loss is
# .6919, where it starts at log 2 = .6931, with both rewards exactly 0.

# %%
out = losses.dpo_loss(*(np.array([logp]) for logp in (LONG * -1.4, SHORT * -1.4, LONG * -1.5, SHORT * -1.5)), beta=0.1)
np.testing.assert_allclose(out.reward_w.data / out.reward_l.data, LONG / SHORT, rtol=1e-9)
rewards = out.reward_w.data[0], out.reward_l.data[0]
print(f"\nrise = 0.1, beta = 0.1: reward {rewards[0]:.2f} for {LONG} tokens, {rewards[1]:.2f} for {SHORT}")
z = 0.0015 + 0.0010
assert round(np.logaddexp(0, -z), 4) == 0.6919 and round(math.log(2), 4) == 0.6931
start = losses.dpo_loss(-10.0, -15.0, -10.0, -15.0, beta=0.1)
assert start.reward_w.item() == start.reward_l.item() == 0 and abs(start.loss.item() - math.log(2)) < 1e-12

# %% [markdown]
# ## What was shown
# What goes wrong with log pi as the reward: the weights. A difference in length sets them, and at beta = 1 it drives
# them to 0 or 1, so that labels for short replies can make replies longer. Where the reward is maximised over samples,
# the policy ends with a single reply.
#
# What does not: the direction. The naive loss pushes up the response that the label names, long or short. A reference
# changes the weight of a pair, never the direction of its push. Words before the first difference cancel, with or
# without a reference. Words after it do not, even if they are the same.
#
# (On the support desk of tutorial 05, at beta = 0.1, we saw no harm that comes from these weights alone: replies do not
# become shorter, and they fall apart with a reference, too; that is, many are not well formed.
# `python -m benchmarks.story` measures it. In 1000 pairs there the desk's log-probabilities differ by 1.1 nats on
# average, and all naive weights lie between .38 and .62.)
#
# ## Exercises
# 1. Derive: for which beta does the first naive step make the replies of the model above *shorter*?
# 2. Find the bug: someone makes the naive reward "fair" and takes the *mean* over a response's tokens instead of the
#    sum. Responses of 4 and of 8 tokens share their first 3. With what factor does a shared token's log-probability
#    enter the margin?
# 3. Predict, then measure: let the labels be coin tosses, so that each reply is chosen 5 times in 10. What does each of
#    the two losses teach the model now?

# %%
for ref in rng.normal(scale=5.0, size=(20, 2)):
    g_w, g_l = losses.dpo_gradient(long_chosen, short_rejected, *ref, beta=0.1)
    assert g_w < 0 and g_l == -g_w
    np.testing.assert_allclose(g_w, -0.1 * sigma(-0.1 * (long_chosen - ref[0] - short_rejected + ref[1])), rtol=1e-12)
rows = world.preferences(list(world.PROMPTS), 1000, np.random.default_rng(0))
desks = [world.desk(world.PROMPTS[row["prompt"]]) for row in rows]
differences = np.array([math.log(desk[row["chosen"]] / desk[row["rejected"]]) for desk, row in zip(desks, rows)])
assert round(abs(differences).mean(), 1) == 1.1 and 0.38 < sigma(-0.1 * abs(differences).max()) < 0.5
print("06: the long chosen response is pushed up, harder than at margin 0; a reference changes only the weight")

# %% [markdown]
# ## Solutions
# 1. The labels for short replies push with .9 sigma(-28.8 beta), those for long ones with .1 sigma(28.8 beta). Since
#    sigma(z)/sigma(-z) = e^z, the first is larger where 28.8 beta is below log 9: for beta below .076.
# 2. With 1/4 - 1/8 = 1/8, where the sum gives 1 - 1 = 0. The shared prefix no longer cancels, so training also moves
#    text on which the two responses agree. That is another objective, with another bias.
# 3. DPO nothing: both pairs weigh 1/2, their pushes cancel, and replies keep 20 tokens. The naive loss still makes
#    replies longer: the pairs that chose the long reply weigh more. A length that no label asks for is all it learns.

# %%
assert round(math.log(9) / likelier, 3) == 0.076
assert mean_lengths((0.0, 0.0), 1, beta=0.075)[1] < 20 < mean_lengths((0.0, 0.0), 1, beta=0.078)[1]
tokens = Tensor(np.full(3, -1.5), requires_grad=True)  # log-probabilities of the shared tokens
((ops.sum(tokens) - 1.5 * 1) / 4 - (ops.sum(tokens) - 1.5 * 5) / 8).backward()
np.testing.assert_allclose(tokens.grad, 1 / 8, rtol=1e-12)
tossed = [mean_lengths(ref_logp, 500, short_chosen=0.5)[-1] for ref_logp in ((0.0, 0.0), reference)]
print("labels by coin: naive {:.1f}, DPO {:.1f}".format(*tossed))
assert tossed[0] > 100 and abs(tossed[1] - 20) < 1e-9
