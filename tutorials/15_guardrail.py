# %% [markdown]
# # 15. A guardrail, and whom it stops
#
# **Question.** The probability that a model declines a request is used as an alarm for private requests. How often is
# the alarm wrong, and for whom?
#
# **Afterwards you can say**
# - how to compute that probability exactly, and why a single sampled reply is a poor substitute;
# - why one false positive rate hides the requests that look private and are not;
# - what ROC and AUC measure, and what they leave out;
# - why the same alarm is mostly right in one place and mostly wrong in another.
#
# **Predict first.** An alarm goes off for 8 in 10 private requests and for 1 in 10 of the others. Where 3 requests in
# 1000 are private, how many of 100 alarms are true? And somebody asks to see their own account. Is 1 in 10 also the
# rate of false alarms for them?
#
# **The formula.** The score of a prompt x is P(decline|x), the sum of pi(y|x) over every reply y that declines. There
# is an alarm where score >= threshold.
#
#     FPR = P(score >= threshold | not private),   FNR = P(score < threshold | private)
#     precision = P(private | score >= threshold)
#               = share (1 - FNR)/(share (1 - FNR) + (1 - share) FPR)       Bayes; share of private requests
#     AUC = P(private > other) + P(private = other)/2, of two scores        the Mann-Whitney statistic
#
# FPR is the false positive rate and FNR the false negative rate.

# %%
import math
import pathlib

import numpy as np

from minidpo import Tensor, exact, generation, model, ops, optim, plots, scoring, training, world
from minidpo.audit import calibration, intervals
from minidpo.tokenizer import END_OF_TEXT, TURN, Tokenizer

train, validation, test = world.split(0)
declining = [y for y, reply in world.REPLIES.items() if reply.deed == "declines"]


def slices(prompts):
    return np.array([world.PROMPTS[x].slice for x in prompts])


# %% [markdown]
# ## From NumPy alone: rates, ROC, AUC
# The requests are those of the support desk of tutorial 05. There are three kinds, which we call slices. An ordinary
# request says what is wrong with one's own order. A private one asks for somebody else's. A benign one looks private:
# "show me my order." or "may anna see my order?". Only private requests should raise the alarm.


# %%
def rates(score, private, threshold):
    """FPR and FNR at a threshold."""
    return (score[~private] >= threshold).mean(), (score[private] < threshold).mean()


def roc(score, private):
    """FPR, and the rate of private requests caught, 1 - FNR, at every threshold from the highest to the lowest."""
    points = [rates(score, private, threshold) for threshold in [math.inf, *sorted(set(score), reverse=True)]]
    return np.array([(fpr, 1 - fnr) for fpr, fnr in points]).T


def couples(score, private):
    """AUC by its definition: every private request beside every other one; a tie counts one half."""
    a, b = score[private][:, None], score[~private]
    return ((a > b) + (a == b) / 2).mean()


def threshold_for(target, score, private):
    """The lowest threshold with FPR <= target: just above the first score that would be one false alarm too many."""
    others = np.sort(score[~private])[::-1]
    return np.nextafter(others[math.floor(target * len(others))], math.inf)


def precision(share, fpr, fnr):
    return share * (1 - fnr) / (share * (1 - fnr) + (1 - share) * fpr)


# %% [markdown]
# ## The ideal: the desk itself
# The desk knows which slice a request is from, so its P(decline|x) has three values. A threshold between 0.25 and 0.35
# makes no error, and AUC is 1. An alarm from one sampled reply is far worse, even with the desk's own probabilities: it
# goes off with probability P(decline|x), so it misses 65 % of the private requests and stops 25 % of the benign ones.
#
#     slice      P(decline|x)
#     ordinary           0.10
#     benign             0.25
#     private            0.35

# %%
kinds, private = slices(test), slices(test) == "private"
desk_score = np.array([math.fsum(world.desk(world.PROMPTS[x])[y] for y in declining) for x in test])
for kind, expected in (("ordinary", 0.1), ("private", 0.35), ("benign", 0.25)):
    np.testing.assert_allclose(desk_score[kinds == kind], expected, rtol=1e-12)
assert rates(desk_score, private, 0.3) == (0, 0) and couples(desk_score, private) == 1

# %% [markdown]
# ## A model of the desk
# We fine-tune a new model on the desk's replies, without pre-training. Then we sum over all declining replies.
# They share beginnings, so we lay out each prefix once, as one row. A row sees the prompt and its own prefixes. We
# compute 128 prefixes at a time. In sorted order, whatever they attend to is either among the 128 or a prefix of the
# first of them. The prompt is read once for all replies.

# %%
tokenizer = Tokenizer.from_text("".join([*world.PROMPTS, *world.REPLIES, TURN]))
config = model.Config(tokenizer.vocab_size, n_positions=96, n_embd=48, n_layer=2, n_head=4)


def prompt_ids(x):
    return [END_OF_TEXT, *tokenizer.encode(x + TURN)]


def reply_ids(y):
    return (*tokenizer.encode(y), END_OF_TEXT)


def prefix_tree(replies, run=128):
    """The prefixes of all replies; the keys of each run of rows; which row predicts which token of which reply."""
    prefixes = sorted({y[:t] for y in replies for t in range(len(y))})  # the first is empty: the prompt's last row
    number, runs = {prefix: i for i, prefix in enumerate(prefixes)}, []
    for start in range(0, len(prefixes), run):
        rows = np.arange(start, min(start + run, len(prefixes)))
        path = [number[prefixes[start][:t]] for t in range(len(prefixes[start]))]
        keys = np.array([*path, *rows])
        hidden = [[prefixes[row][: len(prefixes[key])] != prefixes[key] for key in keys] for row in rows]
        runs.append((rows, keys, np.array(hidden)))
    picks = [(number[y[:t]], token, i) for i, y in enumerate(replies) for t, token in enumerate(y)]
    return prefixes, runs, np.array(picks).T


def tree_logprobs(params, x, tree):
    """log pi(y|x) of every reply of the tree, from one forward.  -> (number of replies,)"""
    prefixes, runs, (rows, tokens, replies) = tree
    start = len(x) - 1  # rows before the prompt's last one, with which the tree begins
    ids = np.array([*x, *(prefix[-1] for prefix in prefixes[1:])])
    positions = np.array([*range(start), *(start + len(prefix) for prefix in prefixes)])

    def attend(i, qkv):
        q, k, v = qkv.data.transpose(1, 2, 0, 3)  # (rows, 3, H, D) -> (3, H, rows, D)
        out = np.empty_like(q)
        out[:, :start] = ops.causal_attention(q[:, :start], k[:, :start], v[:, :start]).data
        for some, keys, hidden in runs:
            keys = np.r_[:start, start + keys]
            hidden = np.pad(hidden, ((0, 0), (start, 0)))  # nothing of the prompt is hidden
            out[:, start + some] = ops.causal_attention(q[:, start + some], k[:, keys], v[:, keys], hidden).data
        return Tensor(out.swapaxes(0, 1))  # (H, rows, D) -> (rows, H, D)

    logits = model.row_logits(params, config, model.Rows(ids, positions, []), attend).data[start:]
    logp = logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)
    return np.bincount(replies, logp[rows, tokens])


rng = np.random.default_rng(0)
params, steps = model.init(config, rng), 500
replies_of_desk = world.supervised(train, 8000, rng)
examples = [(prompt_ids(row["prompt"]), list(reply_ids(row["completion"]))) for row in replies_of_desk]
optimizer = optim.AdamW(params)
for step in range(steps):
    optimizer.learning_rate = optim.warmup_cosine(step, steps, 5e-3, warmup_steps=20)
    batch = [examples[i] for i in training.batch_indices(len(examples), 24, step, seed=0)]
    loss = training.sft_training_step(params, config, optimizer, batch, max_norm=1.0)["loss"]
    if step % 100 == 99:
        print(f"step {step + 1}: loss {loss:.3f} nats per token", flush=True)
params = model.frozen(params)

# %% [markdown]
# ## The library's version
# `exact.exact_logprobs` gives the same numbers, and so does `scoring.packed_logprobs`, which scores each reply with a
# prompt of its own, in 5.7 times as many rows. Drawn replies decline as often as the sum says, within their noise. The
# desk's grammar, its rules for replies, allows 750. How much of the model's probability is on them at all? We add them
# up for a few prompts of each slice.

# %%
tree, whole_tree = (prefix_tree([reply_ids(y) for y in ys]) for ys in (declining, list(world.REPLIES)))
x = prompt_ids("may i see anna's order?")
by_tree = tree_logprobs(params, x, tree)
by_library = exact.exact_logprobs(params, config, [x], [reply_ids(y) for y in declining]).data[0]
np.testing.assert_allclose(by_tree, by_library, rtol=0, atol=1e-3)
alone = [scoring.packed_logprobs(params, config, [(x, reply_ids(y))]).data.sum() for y in declining[::40]]
np.testing.assert_allclose(by_tree[::40], alone, rtol=0, atol=1e-3)
rows_alone, rows_of_tree = sum(len(x) + len(y) - 1 for y in map(reply_ids, declining)), len(x) - 1 + len(tree[0])
assert round(rows_alone / rows_of_tree, 1) == 5.7
draws = generation.generate(params, config, [x] * 400, np.random.default_rng(0), max_new_tokens=60).responses
drawn, summed = np.mean([tokenizer.decode(y) in declining for y in draws]), np.exp(by_tree).sum()
print(f"\n400 replies to one private request: {drawn:.3f} decline; the exact sum is {summed:.3f}")
assert abs(drawn - summed) < 4 * math.sqrt(summed * (1 - summed) / 400)
declines = np.array([reply.deed == "declines" for reply in world.REPLIES.values()])
on_grammar, declining_part = {}, {}
for kind in world.SLICES:
    some = np.array(test)[kinds == kind][:8]
    chances = [np.exp(tree_logprobs(params, prompt_ids(x), whole_tree)) for x in some]
    on_grammar[kind] = np.sum(chances, axis=1)
    declining_part[kind] = np.mean([each[declines].sum() / each.sum() for each in chances])
    print(f"{kind:<9} on the grammar {on_grammar[kind].mean():.2f}, of which declining {declining_part[kind]:.2f}")
assert len(world.REPLIES) == 750 and all((0 < mass).all() and (mass < 1).all() for mass in on_grammar.values())
assert declining_part["private"] < 0.3 and abs(declining_part["private"] - declining_part["benign"]) < 0.05

# %% [markdown]
# ## A threshold, and who pays for it
# The rest of the probability is on texts that the desk never writes. And on the grammar a private request is declined
# about as often as a benign one, and less often than the desk's 0.35: the model has hardly learned to tell them apart.
# So a threshold does not carry over: at the desk's 0.3 this alarm is nearly silent. We choose ours on the validation
# prompts, as low as an FPR of 10 % allows. Then we count the errors on the test prompts, which had no part in the
# choice. The interval is Wilson's: every rate whose distance from the measured one is at most
# 1.96 sqrt(rate (1 - rate)/n), for n prompts.

# %%
score_validation, score = (
    np.array([np.exp(tree_logprobs(params, prompt_ids(x), tree)).sum() for x in xs]) for xs in (validation, test)
)
threshold = threshold_for(0.1, score_validation, slices(validation) == "private")
fpr, fnr = rates(score, private, threshold)
print(f"\nthreshold {threshold:.3f}, chosen on {len(validation)} validation prompts for an FPR of 10 %")
print(f"{'test prompts':<14}{'n':>5}{'mean score':>12}{'error':>7}{'rate':>8}{'95 % interval':>17}")
interval = {}
for name, members in (*((kind, kinds == kind) for kind in world.SLICES), ("not private", ~private)):
    error, wrong = ("FNR", score[members] < threshold) if name == "private" else ("FPR", score[members] >= threshold)
    low, high = interval[name] = intervals.wilson(wrong.sum(), len(wrong))
    mean = score[members].mean()
    print(f"{name:<14}{len(wrong):>5}{mean:>12.3f}{error:>7}{wrong.mean():>8.3f}{low:>9.3f} - {high:.3f}")
    for end in (low, high):
        assert abs(abs(wrong.mean() - end) - intervals.NORMAL * math.sqrt(end * (1 - end) / len(wrong))) < 1e-9
assert calibration.rates(score, private, threshold) == (fpr, fnr) and rates(score, private, 0.3)[1] > 0.9

# %% [markdown]
# ## ROC and AUC
# The ROC curve is the rate of private requests caught against FPR, over all thresholds. The area under it is AUC: the
# probability that a private request scores higher than another one. It is a mean over the other requests, so easy ones
# raise it: AUC against all others is the mean of AUC against each slice, weighted by their numbers. And it does not say
# how the threshold in use does.

# %%
auc = {"all others": couples(score, private)}
for kind in ("ordinary", "benign"):
    auc[kind] = couples(score[private | (kinds == kind)], private[private | (kinds == kind)])
print("\nAUC, private against " + ", ".join(f"{name} {value:.3f}" for name, value in auc.items()))
weights = [(kinds == kind).sum() / (~private).sum() for kind in ("ordinary", "benign")]
np.testing.assert_allclose(weights @ np.array([auc["ordinary"], auc["benign"]]), auc["all others"], rtol=1e-12)
for scores in (score, score.round(2), 0 * score):  # without ties, with many, and nothing else
    false, caught = roc(scores, private)  # the rate of false alarms, and 1 - FNR
    assert (np.diff(false) >= 0).all() and (np.diff(caught) >= 0).all()  # they rise as the threshold falls
    area = (np.diff(false) * (caught[1:] + caught[:-1]) / 2).sum()  # trapezoids: one step meets all ties of a threshold
    np.testing.assert_allclose([area, calibration.auc(scores, private)], couples(scores, private), rtol=1e-12)

# %% [markdown]
# ## Where few requests are private
# Bayes' rule turns FPR and FNR into precision, the chance that an alarm is true. When the share of private requests
# changes, FPR and FNR stay, and precision does not. The odds of a true alarm are the odds of a private request times
# (1 - FNR)/FPR.

# %%
shares, precisions = (0.3, 0.03, 0.003), {}
print("\nprivate requests  precision  false alarms for each true one")
for share in shares:
    precisions[share] = precision(share, fpr, fnr)
    print(f"{share:>16.1%}{precisions[share]:>11.3f}{1 / precisions[share] - 1:>31.1f}")
    odds = share / (1 - share) * (1 - fnr) / fpr
    np.testing.assert_allclose(precisions[share], odds / (1 + odds), rtol=1e-12)
weight = np.where(private, 0.003 / private.sum(), 0.997 / (~private).sum())  # the same prompts in another mixture
alarm = score >= threshold
np.testing.assert_allclose(weight[private & alarm].sum() / weight[alarm].sum(), precisions[0.003], rtol=1e-12)

# %% [markdown]
# ## The answer to the prediction
# 0.003 * 0.8 = 0.0024 of all requests raise a true alarm, and 0.997 * 0.1 = 0.0997 a false one. So 2 of 100 alarms are
# true. It depends on how many requests are private:
#
#     private requests   true alarms of 100   false alarms for each true one
#                 30 %                   77                              0.3
#                  3 %                   20                              4.0
#                0.3 %                    2                             41.5
#
# And 1 in 10 is a mean over everybody else. A customer who asks to see their own account looks much like one who asks
# for somebody else's. Here the benign requests are a quarter of the others and have nearly all of the false alarms.

# %%
of_100 = [100 * precision(share, 0.1, 0.2) for share in shares]
assert [f"{true:.0f} {100 / true - 1:.1f}" for true in of_100] == ["77 0.3", "20 4.0", "2 41.5"]

# %% [markdown]
# ## A threshold chosen on test
# Cut the scored prompts into two parts at random, 500 times. Choose the threshold on one part, and measure on that part
# and on the other. On its own part an FPR of 10 % is kept each time, because that is how the threshold was chosen. On
# the other part it is kept about half the time. The threshold with the smallest FPR + FNR flatters itself in the same
# way: the sum is larger where it was not chosen.

# %%
pool, pool_private = np.r_[score_validation, score], np.r_[slices(validation) == "private", private]


def least_errors(score, private):
    """The threshold with the smallest FPR + FNR."""
    return min(set(score), key=lambda threshold: sum(rates(score, private, threshold)))


broken, totals = [], []
for _ in range(500):
    places = rng.permutation(len(pool))
    one, other = ((pool[part], pool_private[part]) for part in (places[: len(validation)], places[len(validation) :]))
    bound = threshold_for(0.1, *other)
    broken.append([rates(*other, bound)[0] > 0.1, rates(*other, threshold_for(0.1, *one))[0] > 0.1])
    totals.append([sum(rates(*other, least_errors(*part))) for part in (other, one)])
    assert totals[-1][0] <= totals[-1][1]  # no threshold does better than the best on the very prompts
broken_share, total = np.mean(broken, axis=0), np.mean(totals, axis=0)
print(f"\n{'of 500 splits, the threshold chosen on':<40}{'test':>8}{'validation':>12}")
print(f"{'FPR on test above the promised 10 %':<40}{broken_share[0]:>8.0%}{broken_share[1]:>12.0%}")
print(f"{'smallest FPR + FNR, measured on test':<40}{total[0]:>8.3f}{total[1]:>12.3f}")

# %%
SLICES = ("ordinary", "benign", "private")
above = [(score[kinds == kind] >= threshold).mean() for kind in SLICES]
picture = pathlib.Path("15_guardrail.png")


def draw(path):
    with plots.figure(path, (6.4, 7.4), {"font.size": 12}) as figure:
        alarms, curves = figure.subplots(2)
        alarms.axvline(threshold, color=plots.INK, linestyle="--", linewidth=1)
        alarms.text(threshold, 1.06, "threshold in use", ha="center")
        grid = np.linspace(0, score.max() * 1.05, 200)
        sides = ("left", "top"), ("right", "top"), ("left", "bottom")
        for kind, rate, color, dash, (ha, va) in zip(SLICES, above, plots.PALETTE, plots.DASHES, sides):
            alarms.plot(grid, [(score[kinds == kind] >= each).mean() for each in grid], color=color, linestyle=dash)
            alarms.text(threshold, rate - 0.02 * (va == "top"), f" {kind} {rate:.2f} ", color=color, ha=ha, va=va)
        alarms.set(xlabel="threshold", ylabel="rate of alarms", ylim=(-0.14, 1.05))
        places = ((0.05, 0.8), (0.5, 0.3))
        for kind, rate, place, color, dash in zip(SLICES, above, places, plots.PALETTE, plots.DASHES):
            members = private | (kinds == kind)
            curves.plot(*roc(score[members], private[members]), color=color, linestyle=dash)
            curves.plot(rate, 1 - fnr, "o", color=color)
            curves.text(*place, f"private or {kind}: AUC {auc[kind]:.2f}", color=color, va="top")
        curves.plot([0, 1], [0, 1], color=plots.INK, linewidth=1)
        curves.text(0.78, 0.74, "a coin", va="top")
        curves.set(xlabel="FPR; dots: threshold in use", ylabel="private caught, 1 - FNR")


if plots.installed():
    draw(picture)
print(f"\npicture: {picture.name}" if plots.installed() else "\nthe picture needs matplotlib (the `plot` extra)")

# %% [markdown]
# ## What was shown
# The probability of declining is a score that ranks requests well on the whole, and badly where it matters. Ordinary
# requests hide the benign ones in FPR and in AUC. With the threshold from validation, the errors on test have intervals
# that are wide for a slice of a few dozen prompts. And an alarm with constant error rates is right or wrong mostly by
# how rare its cause is.
#
# ## Exercises
# 1. Derive: a request is stopped where two alarms like that of the prediction both go off. They err independently. How
#    many of 100 stopped requests are private, where 3 in 1000 are? And if all false alarms are for benign requests, a
#    quarter of the others?
# 2. Find the bug: to promise an FPR of 10 %, somebody takes the threshold `np.quantile(score_validation, 0.9)`. What
#    does this threshold promise instead?
# 3. Predict, then measure: from now on the ordinary requests go to another desk, and only private and benign ones are
#    left. The model and the threshold stay. Which of FPR, FNR, AUC and precision change on the test prompts?

# %%
assert interval["ordinary"][1] < interval["benign"][0]  # the two FPRs differ, beyond their intervals
assert interval["benign"][1] - interval["benign"][0] > 0.25  # wide
assert weights[1] < 0.26 and (kinds[~private & alarm] == "benign").mean() > 0.8
assert auc["ordinary"] > auc["all others"] > auc["benign"] > 0.5
assert precisions[0.3] > 0.5 > 0.25 > precisions[0.03] > 0.05 > precisions[0.003]  # mostly right, mostly wrong
assert broken_share[0] == 0 and 0.3 < broken_share[1] < 0.7 and total[0] < total[1] - 0.02
print("15: one FPR hides the benign requests; most alarms are false where few requests are private; a threshold")
print("    chosen on test looks better than it is")

# %% [markdown]
# ## Solutions
# 1. Each alarm multiplies the odds by (1 - FNR)/FPR = 8. 3/997 times 64 is 0.19: 16 of 100, not 2. In the second case
#    each alarm goes off for 0.4 of the benign requests, both for 0.16: FPR is 0.04, not 0.01, and 5 of 100 are private.
# 2. It promises alarms for 10 % of all requests, private ones among them. Most of these alarms are for private
#    requests, so FPR is lower than promised and FNR higher.
# 3. FNR stays, since the private requests are the same. FPR rises to that of the benign ones, and AUC falls to theirs.
#    But the alarms for the requests that are left are the same ones. So precision stays, or rises a little if an
#    ordinary request had raised a false one. FPR and AUC look much worse, and no alarm has changed: both are constant
#    only while the mixture of the others is.

# %%
both = precision(0.003, 0.1**2, 1 - 0.8**2), precision(0.003, 0.25 * 0.4**2, 1 - 0.8**2)
assert [f"{100 * each:.0f}" for each in both] == ["16", "5"]
private_validation = slices(validation) == "private"
quantile = np.quantile(score_validation, 0.9)
alarm = score_validation >= quantile
assert quantile > threshold and rates(score_validation, private_validation, quantile)[0] < 0.05
assert alarm[private_validation].sum() > alarm[~private_validation].sum()

np.testing.assert_allclose(np.array(above[:2]) @ weights, fpr, rtol=1e-12)
left, alarm = kinds != "ordinary", score >= threshold
fpr_left, fnr_left = rates(score[left], private[left], threshold)
true_before, true_left = private[alarm].mean(), private[alarm & left].mean()
print(f"Solution 3: FPR {fpr:.2f} -> {fpr_left:.2f}, FNR {fnr:.2f} -> {fnr_left:.2f}", end="; ")
print(f"precision {true_before:.2f} -> {true_left:.2f}")
assert fnr_left == fnr and fpr_left == above[1] > 2 * fpr
np.testing.assert_allclose(couples(score[left], private[left]), auc["benign"], rtol=1e-12)
assert true_before <= true_left < true_before + 0.1
