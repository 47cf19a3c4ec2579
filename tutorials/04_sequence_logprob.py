# %% [markdown]
# # 04. The log-probability of a response
#
# **Question.** Which number is log pi(y|x), and how do you know that a piece of code computes it?
#
# **Afterwards you can say**
# - which row of the logits predicts which token, and what becomes of prompt, pads and end-of-text;
# - what the probabilities of all complete responses add up to, derived and computed;
# - which mistakes that sum finds, and which only the chain rule finds.
#
# **Predict first.** A scorer reads each token's log-probability one row too early: from the row that should predict
# the token before it. Add up the probabilities that it gives to all complete responses. Is the sum less than 1,
# exactly 1, or more than 1?
#
# **The formula.** log pi(y|x) = sum_t log pi(y_t | x, y_1 ... y_(t-1)), in nats (natural logarithms), by the chain
# rule of probability, which is not that of 02: a sum over the response's tokens, the last of which is end-of-text (id
# 0) unless the response was cut. A sum, not a mean: DPO is defined with the sum.

# %%
import itertools
import math

import numpy as np

from minidpo import exact, model, ops, scoring
from minidpo.theory import mutants

rng = np.random.default_rng(0)
V, C, CAP, END_OF_TEXT = 4, 6, 3, 0  # ids, channels, most tokens of a response
table, recurrent, head = rng.normal(size=(V, C)), 0.5 * rng.normal(size=(C, C)), rng.normal(size=(C, V))


def toy_logits(tokens):
    """A language model: row i has read tokens 0 to i and nothing later.  (T,) -> (T, V)"""
    state, rows = np.zeros(C), []
    for token in tokens:
        state = np.tanh(state @ recurrent + table[token])
        rows.append(state @ head)
    return np.array(rows)


def log_softmax(logits):
    below = logits - logits.max(axis=-1, keepdims=True)
    return below - np.log(np.exp(below).sum(axis=-1, keepdims=True))


def token_logprobs(logits_of, x, y, shift=1):
    """Log-probability of each token of y, read from the row `shift` places before the token's own.  -> (Ty,)"""
    logp = log_softmax(logits_of([*x, *y]))  # (Tx + Ty,) -> (Tx + Ty, V)
    return logp[len(x) - shift + np.arange(len(y)), y]  # (Tx + Ty, V) -> (Ty,)


x, y = [2, 3, 1], [1, 3, END_OF_TEXT]
logp = log_softmax(toy_logits(x + y))
print("row  reads  predicts  log-probability")
for row, (read, following) in enumerate(itertools.pairwise(x + y)):
    print(f"{row:>3}{read:>7}{following:>10}{logp[row, following]:>17.3f}  {'of x' if row < len(x) - 1 else 'of y'}")
total = token_logprobs(toy_logits, x, y).sum()
print(f"log pi(y|x) = {total:.3f}, the sum of those of y")

# %% [markdown]
# ## Shift by one, prompt, end-of-text
# Row i has read token i, so it predicts token i + 1. The first token of y has index len(x); the row that predicts it
# is row len(x) - 1, the prompt's last. Rows before that predict the prompt, which is given: they are not scored. The
# last token of y is predicted; the model need not read it. If it is end-of-text it is scored like any other: stopping
# is a choice.
#
# ## Why the sum over all complete responses is 1
# A response is complete when it ends in end-of-text or has CAP tokens. Let S(p) be the probability, given a prefix p,
# of all complete responses that begin with p. S(p) = 1 for a complete p; for any other, from the longest to the empty
# one, S(p) = sum_c pi(c | x, p) S(p c) = sum_c pi(c | x, p) = 1, c over all V ids. This uses one thing only: the
# factors are, after each prefix, a distribution over the next id. It need not be the right one.
#
# ## From NumPy alone: two oracles and six mistakes


# %%
def chain_rule(logits_of, x, y):
    """One run of the model for each prefix, of which the last row is read: no shift, no slice of logits, no mask."""
    return sum(log_softmax(logits_of([*x, *y[:t]]))[-1, token] for t, token in enumerate(y))


characters = range(1, V)
responses = [[*p, END_OF_TEXT] for t in range(CAP) for p in itertools.product(characters, repeat=t)]
responses += [list(p) for p in itertools.product(characters, repeat=CAP)]
ways = {
    "right": lambda f, x, y: token_logprobs(f, x, y).sum(),
    "no shift": lambda f, x, y: token_logprobs(f, x, y, shift=0).sum(),
    "first token not scored": lambda f, x, y: token_logprobs(f, x, y)[1:].sum(),
    "end-of-text not scored": lambda f, x, y: token_logprobs(f, x, y)[np.array(y) != END_OF_TEXT].sum(),
    "a pad scored": lambda f, x, y: token_logprobs(f, x, [*y, END_OF_TEXT]).sum(),
    "mean for sum": lambda f, x, y: token_logprobs(f, x, y).mean(),
    "shift by two": lambda f, x, y: token_logprobs(f, x, y, shift=2).sum(),
}
sums, gaps = {}, {}
print(f"\n{len(responses)} complete responses    sum of exp   off the chain rule (nats)")
for name, way in ways.items():
    sums[name] = math.fsum(math.exp(way(toy_logits, x, y)) for y in responses)
    gaps[name] = max(abs(way(toy_logits, x, y) - chain_rule(toy_logits, x, y)) for y in responses)
    print(f"{name:<24}{sums[name]:>12.6f}{gaps[name]:>15.6f}")
assert len(responses) == sum(3**t for t in range(CAP + 1)) == 40
assert abs(sums["right"] - 1) < 1e-12 and gaps["right"] < 1e-12

# %% [markdown]
# ## The answer to the prediction
# Exactly 1. The row two places before a token has read less than it may, but what it has read are earlier tokens:
# after each prefix it still gives one distribution over the next id, and the proof above asks for no more. Without a
# shift, the row has read the very token that it scores: that is no distribution over what comes next. So the sum
# finds some mistakes, and for the others there is the chain rule, which slices no logits. (A prompt of one token has
# no row two places before: the sum is 1 for two or more.)

# %%
assert abs(sums["shift by two"] - 1) < 1e-12 < 0.01 < gaps["shift by two"]
assert all(abs(sums[name] - 1) > 0.01 for name in ways if name not in ("right", "shift by two"))

# %% [markdown]
# ## The library's version
# `scoring.sequence_logprob` is the same slice on the transformer, `exact` has both oracles, `mutants` eleven mistakes.
# The last four are distributions, but not the model's.

# %%
config = model.Config(vocab_size=V, n_positions=8, n_embd=8, n_layer=1, n_head=2)
params = model.init(config, rng, dtype="float64")
for p in params.values():
    p.data = p.data + 0.5 * rng.normal(size=p.shape)  # so that every mistake shows
assert exact.complete_responses(V, CAP) == responses
for y in responses:
    mine = ways["right"](lambda tokens: model.forward(params, config, [tokens]).data[0], x, y)
    np.testing.assert_allclose(mine, scoring.sequence_logprob(params, config, [x], [y]).item(), rtol=0, atol=1e-12)
    np.testing.assert_allclose(mine, exact.chain_rule_logprob(params, config, x, y), rtol=0, atol=1e-12)
verdicts = mutants.verdicts(params, config, x, CAP)
print("\n" + mutants.as_text(verdicts))

# %% [markdown]
# ## Padding
# Texts of unequal length fill one array with pads. A pad has no id of its own (here it is 0, end-of-text): length tells
# it from the end-of-text that is scored. What a pad predicts is left out by selection. Multiplying by a mask of 0 and 1
# is not the same: 0 times -inf is nan. The shared route needs no pads: a pair's prompt is computed once, and both
# responses follow it. Three routes, one number, and one gradient, for a random cotangent. Last, what the prompt's mask
# is worth to a pair: nothing, with sums. Scoring the prompt adds the same to both responses; their difference stays.

# %%
with np.errstate(invalid="ignore"):
    assert math.isnan((np.array([-1.0, -math.inf]) * np.array([1.0, 0.0])).sum())
assert np.where([True, False], [-1.0, -math.inf], 0.0).sum() == -1.0

pairs = [(x, [1, 3, 0], [2, 0]), ([3], [0], [1, 1, 2, 0]), ([1, 2], [3, 3, 0], [3, 1, 1, 0])]  # x, w, l
g_w, g_l = rng.normal(size=(2, len(pairs)))


def one_by_one(params, config, pairs):
    logp = [[scoring.sequence_logprob(params, config, [x], [y]) for y in (w, l)] for x, w, l in pairs]
    return ops.concatenate(*(w for w, _ in logp)), ops.concatenate(*(l for _, l in logp))


found = {}
for route in (one_by_one, scoring.padded_logprobs, scoring.shared_logprobs):
    for p in params.values():
        p.grad = None
    logp_w, logp_l = route(params, config, pairs)
    ops.sum(g_w * logp_w + g_l * logp_l).backward()
    found[route.__name__] = [logp_w.data, logp_l.data, *(p.grad for p in params.values())]
for result in found.values():
    for value, expected in zip(result, found["one_by_one"]):
        np.testing.assert_allclose(value, expected, rtol=1e-10, atol=1e-10)
prompt_scored = one_by_one(params, config, [(x[:1], x[1:] + w, x[1:] + l) for x, w, l in pairs])
np.testing.assert_allclose((prompt_scored[0] - prompt_scored[1]).data, (logp_w - logp_l).data, rtol=0, atol=1e-12)

# %% [markdown]
# ## What was shown
# Row len(x) - 1 predicts the response's first token; end-of-text is scored, prompt and pads are not. The sum over
# complete responses finds what is no distribution, the chain rule also what is a wrong one.
#
# ## Exercises
# 1. Derive: if the first token is not scored, the sum is exactly V. If end-of-text is not scored, it is 1 plus the mean
#    number of characters (tokens but end-of-text) of a response. Check both against the table.
# 2. Find the bug: `logp = log_softmax(logits_of([*x, *y][:-1]))[len(x) - 1 : -1]`, and of these rows those of `y[:-1]`
#    are summed. Which token is lost? Is the sum over complete responses above 1, or below, or does it depend?

# %%
wrong = {mutant.__name__ for mutant in mutants.WRONG_DISTRIBUTION}
for verdict in verdicts:
    assert (abs(verdict.total_probability - 1) < 1e-12) == (verdict.name in {"correct", *wrong})
    assert (verdict.chain_rule_gap < 1e-12) == (verdict.name == "correct")
print("04: probabilities of all complete responses sum to 1; seven mistakes break that, four only the chain rule sees")

# %% [markdown]
# ## Solutions
# 1. Without the first factor, a response has the probability of its rest given the first token. For each of the V first
#    tokens these add up to 1 (S = 1; for end-of-text the rest is empty): V in all. Without the factor of end-of-text,
#    p followed by it counts as P(prefix p is reached). Summed over the prefixes of t characters that is
#    P(at least t characters), and over t = 0 ... CAP it is 1 + (mean number of characters).
# 2. The rows are cut twice: the last token is never scored. A factor below 1 is missing from every probability, so each
#    rises, and the sum is above 1 for every model.

# %%
probabilities = [math.exp(chain_rule(toy_logits, x, y)) for y in responses]
mean_characters = sum(p * sum(token != END_OF_TEXT for token in y) for p, y in zip(probabilities, responses))
np.testing.assert_allclose(sums["first token not scored"], V, rtol=0, atol=1e-12)
np.testing.assert_allclose(sums["end-of-text not scored"], 1 + mean_characters, rtol=0, atol=1e-12)
assert math.fsum(math.exp(token_logprobs(toy_logits, x, y)[:-1].sum()) for y in responses) > 1
