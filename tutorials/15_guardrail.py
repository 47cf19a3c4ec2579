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
# **The formula.** s(x) = P(decline|x) is the sum of pi(y|x) over every reply y that declines. There is an alarm where
# s(x) >= t, the threshold.
#
#     FPR = P(s >= t | not private),   FNR = P(s < t | private)
#     precision = P(private | s >= t) = q (1 - FNR)/(q (1 - FNR) + (1 - q) FPR)     Bayes; q is the share of private
#     AUC = P(s(private) > s(other)) + P(s(private) = s(other))/2                   the Mann-Whitney statistic
#
# FPR is the false positive rate and FNR the false negative rate.

# %%
import math
import pathlib

import numpy as np

from minidpo import Tensor, exact, generation, model, ops, optim, plots, scoring, training, world
from minidpo.audit import calibration
from minidpo.tokenizer import END_OF_TEXT, TURN, Tokenizer

train, validation, test = world.split(0)
declining = [y for y, reply in world.REPLIES.items() if reply.deed == "declines"]


def slices(prompts):
    return np.array([world.PROMPTS[x].slice for x in prompts])


# %% [markdown]
# ## From NumPy alone: rates, ROC, AUC
# An ordinary request says what is wrong with one's own order. A private one asks for somebody else's. A benign one
# looks private: "show me my order." or "may anna see my order?". Only private requests should raise the alarm.


# %%
def rates(s, private, t):
    """FPR and FNR at a threshold."""
    return (s[~private] >= t).mean(), (s[private] < t).mean()


def roc(s, private):
    """FPR and the share of private requests caught, 1 - FNR, at every threshold from the highest to the lowest."""
    points = [rates(s, private, t) for t in [math.inf, *sorted(set(s), reverse=True)]]
    return np.array([(fpr, 1 - fnr) for fpr, fnr in points]).T


def couples(s, private):
    """AUC by its definition: every private request beside every other one; a tie counts one half."""
    a, b = s[private][:, None], s[~private]
    return ((a > b) + (a == b) / 2).mean()


def threshold_for(target, s, private):
    """The lowest threshold with FPR <= target: just above the first score that would be one false alarm too many."""
    others = np.sort(s[~private])[::-1]
    return np.nextafter(others[math.floor(target * len(others))], math.inf)


def precision(q, fpr, fnr):
    return q * (1 - fnr) / (q * (1 - fnr) + (1 - q) * fpr)


# %% [markdown]
# ## The ideal: the desk itself
# The desk knows which slice a request is from, so its P(decline|x) has three values. A threshold between 0.25 and 0.35
# makes no error, and AUC is 1. An alarm from one sampled reply is far worse, even with the desk's own probabilities: it
# goes off with probability P(decline|x), so it misses 65 % of the private requests and stops 25 % of the benign ones.

# %%
kinds, private = slices(test), slices(test) == "private"
desk_score = np.array([math.fsum(world.desk(world.PROMPTS[x])[y] for y in declining) for x in test])
for kind, expected in (("ordinary", 0.1), ("private", 0.35), ("benign", 0.25)):
    np.testing.assert_allclose(desk_score[kinds == kind], expected, rtol=1e-12)
assert rates(desk_score, private, 0.3) == (0, 0) and couples(desk_score, private) == 1

# %% [markdown]
# ## A model of the desk
# We fine-tune a new model on the desk's replies, without pre-training. Then we sum over all declining replies: every
# opening, wording, topic and ending. They share beginnings, so we lay out each prefix once, as one row. A row sees the
# prompt and its own prefixes. In sorted order the prefixes of a row come before it, so a run of rows needs only the
# path to its first row and itself. The prompt is read once for all replies.

# %%
tokenizer = Tokenizer.from_text("".join([*world.PROMPTS, *world.REPLIES, TURN]))
config = model.Config(tokenizer.vocab_size, n_positions=96, n_embd=48, n_layer=2, n_head=4)


def prompt_ids(x):
    return [END_OF_TEXT, *tokenizer.encode(x + TURN)]


def reply_ids(y):
    return (*tokenizer.encode(y), END_OF_TEXT)


def prefix_tree(replies, run=128):
    """The prefixes of all replies; which of them each run of rows sees; which row predicts which token of which reply."""
    prefixes = sorted({y[:t] for y in replies for t in range(len(y))})  # the first is empty: the prompt's last row
    number, runs = {p: i for i, p in enumerate(prefixes)}, []
    for start in range(0, len(prefixes), run):
        rows = np.arange(start, min(start + run, len(prefixes)))
        path = [number[prefixes[start][:t]] for t in range(len(prefixes[start]))]
        keys = np.array([*path, *rows])
        hidden = [[prefixes[q][: len(prefixes[k])] != prefixes[k] for k in keys] for q in rows]
        runs.append((rows, keys, np.array(hidden)))
    picks = [(number[y[:t]], token, i) for i, y in enumerate(replies) for t, token in enumerate(y)]
    return prefixes, runs, np.array(picks).T


def tree_logprobs(params, x, tree):
    """log pi(y|x) of every reply of the tree, from one forward.  -> (number of replies,)"""
    prefixes, runs, (rows, tokens, replies) = tree
    n = len(x) - 1  # rows before the prompt's last one, with which the tree begins
    ids = np.array([*x, *(p[-1] for p in prefixes[1:])])
    positions = np.array([*range(n), *(n + len(p) for p in prefixes)])

    def attend(i, qkv):
        q, k, v = qkv.data.transpose(1, 2, 0, 3)  # (N, 3, H, D) -> (3, H, N, D)
        out = np.empty_like(q)
        out[:, :n] = ops.causal_attention(q[:, :n], k[:, :n], v[:, :n]).data
        for some, keys, hidden in runs:
            keys, hidden = np.r_[:n, n + keys], np.pad(hidden, ((0, 0), (n, 0)))  # nothing of the prompt is hidden
            out[:, n + some] = ops.causal_attention(q[:, n + some], k[:, keys], v[:, keys], hidden).data
        return Tensor(out.swapaxes(0, 1))  # (H, N, D) -> (N, H, D)

    logits = model.row_logits(params, config, model.Rows(ids, positions, []), attend).data[n:]
    logp = logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)
    return np.bincount(replies, logp[rows, tokens])


rng = np.random.default_rng(0)
params, steps = model.init(config, rng), 500
examples = [
    (prompt_ids(row["prompt"]), list(reply_ids(row["completion"]))) for row in world.supervised(train, 8000, rng)
]
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
# `exact.exact_logprobs` and `scoring.packed_logprobs` give the same sum, at four times the cost or more. Drawn replies
# decline as often as the sum says, within their noise. How much of the model's probability is on replies of the desk
# at all? We add up all 750 for a few prompts of each slice.

# %%
tree, whole_tree = (prefix_tree([reply_ids(y) for y in ys]) for ys in (declining, list(world.REPLIES)))
x = prompt_ids("may i see anna's order?")
by_tree = tree_logprobs(params, x, tree)
by_library = exact.exact_logprobs(params, config, [x], [reply_ids(y) for y in declining]).data[0]
np.testing.assert_allclose(by_tree, by_library, rtol=0, atol=1e-3)
alone = [scoring.packed_logprobs(params, config, [(x, reply_ids(y))]).data.sum() for y in declining[::40]]
np.testing.assert_allclose(by_tree[::40], alone, rtol=0, atol=1e-3)
draws = generation.generate(params, config, [x] * 400, np.random.default_rng(0), max_new_tokens=60).responses
drawn, summed = np.mean([tokenizer.decode(y) in declining for y in draws]), np.exp(by_tree).sum()
print(f"\n400 replies to one private request: {drawn:.3f} decline; the exact sum is {summed:.3f}")
assert abs(drawn - summed) < 4 * math.sqrt(summed * (1 - summed) / 400)
declines = np.array([reply.deed == "declines" for reply in world.REPLIES.values()])
on_grammar = {}
for kind in world.SLICES:
    p = [np.exp(tree_logprobs(params, prompt_ids(x), whole_tree)) for x in np.array(test)[kinds == kind][:8]]
    on_grammar[kind] = np.sum(p, axis=1)
    share = np.mean([each[declines].sum() / each.sum() for each in p])
    print(f"{kind:<9} on the grammar {on_grammar[kind].mean():.2f}, of which declining {share:.2f}")
assert all((0 < mass).all() and (mass < 1).all() for mass in on_grammar.values())

# %% [markdown]
# ## A threshold, and who pays for it
# The rest of the probability is on misspelt replies, so the model's scores are lower than the desk's. A threshold does
# not carry over from one model to another: at the desk's 0.3 this alarm is nearly silent. So we choose t on the
# validation prompts, as low as an FPR of 10 % allows, and read the errors off the test prompts, which have chosen
# nothing. The interval is Wilson's: the q whose distance from the measured share is at most 1.96 sqrt(q (1 - q)/n).

# %%
s_validation, s = (
    np.array([np.exp(tree_logprobs(params, prompt_ids(x), tree)).sum() for x in xs]) for xs in (validation, test)
)
t = threshold_for(0.1, s_validation, slices(validation) == "private")
fpr, fnr = rates(s, private, t)
print(f"\nthreshold {t:.3f}, chosen on {len(validation)} validation prompts for an FPR of 10 %")
print(f"{'test prompts':<22}{'n':>5}{'mean score':>12}{'error':>8}{'alarms':>9}{'95 % of alarms':>18}")
alarms, intervals = {}, {}
for name, members in (*((kind, kinds == kind) for kind in world.SLICES), ("not private", ~private)):
    hits, n = int((s[members] >= t).sum()), int(members.sum())
    alarms[name], intervals[name] = hits / n, calibration.wilson(hits, n)
    error = "FNR" if name == "private" else "FPR"
    low, high = intervals[name]
    print(f"{name:<22}{n:>5}{s[members].mean():>12.3f}{error:>8}{alarms[name]:>9.3f}{low:>10.3f} - {high:.3f}")
    for q in (low, high):
        assert abs(abs(hits / n - q) - calibration.NORMAL * math.sqrt(q * (1 - q) / n)) < 1e-9
