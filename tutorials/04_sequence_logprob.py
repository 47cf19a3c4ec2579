# %% [markdown]
# # 04. The log-probability of a response
#
# **Question.** Which number is log pi(y|x), and how do you know that a piece of code computes it?
#
# **Afterwards you can say**
# - which row of the logits predicts which token, and what happens to prompt, end-of-text and pads (which fill shorter
#   texts up);
# - what the probabilities of all complete responses add up to, derived and computed;
# - which way each mistake moves that sum, by how much, and which mistakes only the chain rule finds;
# - what happens when a log-probability of -inf is multiplied by 0, in the loss and in its gradient.
#
# **Predict first.** For each token that a model reads it gives one row of logits, which predicts the token after it: a
# shift by one. Somebody's program takes each log-probability of the response from the row before that one: a shift by
# two. Add up the probabilities that the program gives to all complete responses. Is the sum less than 1, exactly 1, or
# more than 1?
#
# **The formula.** x is a prompt and y a response, both lists of token ids. pi is the model: pi(token | tokens before)
# is the probability that it gives to the next token.
#
#     log pi(y|x) = sum_t log pi(y_t | x, y_1 ... y_(t-1))
#
# This is the chain rule of probability (not the one for derivatives), with one term per response token. Unless the
# response was cut off, its last token is end-of-text, id 0. Logarithms are natural: the unit is nats. DPO is defined
# with this sum, not with a mean.

# %%
import itertools
import math
import pathlib

import numpy as np

from minidpo import Tensor, exact, model, ops, plots, scoring
from minidpo.theory import mutants

rng = np.random.default_rng(0)
V, C, CAP, END_OF_TEXT = 4, 6, 3, 0  # ids, numbers in a state, most tokens of a response
table, recurrent, head = rng.normal(size=(V, C)), 0.5 * rng.normal(size=(C, C)), rng.normal(size=(C, V))


def toy_logits(tokens):
    """A language model: `recurrent` carries the state on, `head` makes it logits; row i has read tokens 0 to i only."""
    state, rows = np.zeros(C), []
    for token in tokens:
        state = np.tanh(state @ recurrent + table[token])
        rows.append(state @ head)
    return np.array(rows)  # (T, V)


def log_softmax(logits):
    below = logits - logits.max(axis=-1, keepdims=True)
    return below - np.log(np.exp(below).sum(axis=-1, keepdims=True))


def token_logprobs(logits_of, x, y, shift=1):
    """Log-probability of each token of y, read from the row `shift` places before the token's own.  -> (Ty,)"""
    logp = log_softmax(logits_of([*x, *y]))  # (Tx + Ty,) -> (Tx + Ty, V)
    return logp[len(x) - shift + np.arange(len(y)), y]  # (Tx + Ty, V) -> (Ty,)


x, y = [2, 3, 1], [1, 3, END_OF_TEXT]
logp = log_softmax(toy_logits(x + y))
print("row  reads  predicts  log-probability  a token of")
lines = []
for row, (read, following) in enumerate(itertools.pairwise(x + y)):
    lines.append(f"{row:>3}{read:>7}{following:>10}{logp[row, following]:>17.3f}  {'x' if row < len(x) - 1 else 'y'}")
    print(lines[-1])
total = token_logprobs(toy_logits, x, y).sum()
print(f"log pi(y|x) = {total:.3f}, the sum over the tokens of y")
assert [line.split()[3] for line in lines] == ["-3.455", "-1.868", "-1.500", "-1.562", "-1.945"]
assert [line.split()[4] for line in lines] == ["x", "x", "y", "y", "y"] and f"{total:.3f}" == "-5.006"

# %% [markdown]
# ## Shift by one, prompt, end-of-text
# Here x is 2 3 1 and y is 1 3 0. A token is *scored* if its log-probability is a term of log pi(y|x). From here on,
# "the sum" is the one over all complete responses.
#
#     row    reads    predicts    log-probability    of
#     0      2        3           -3.455             x: not scored
#     1      3        1           -1.868             x: not scored
#     2      1        1           -1.500             y
#     3      1        3           -1.562             y
#     4      3        0           -1.945             y
#                                 -5.006             log pi(y|x), the sum of the three
#
# Row i has read tokens 0 to i, so it predicts token i + 1. The first token of y has index len(x). The row that predicts
# it is row len(x) - 1, the prompt's last. Earlier rows predict the prompt. The prompt is given, so they do not count.
# The last token of y need not be read. If it is end-of-text it is scored like any other token: stopping is a choice.
#
# ## Why the sum over all complete responses is 1
# A response is complete when it ends in end-of-text or has CAP tokens. Suppose that a response begins with `start`. Let
# S(start) be the sum, over all complete responses that begin so, of the probability of their remaining tokens. If
# `start` is complete, nothing remains and S(start) = 1. For the others, work from the longest start to the empty one;
# `next` runs over all V ids:
#
#     S(start) = sum_next pi(next | x, start) S(start + next) = sum_next pi(next | x, start) * 1 = 1
#
# The proof uses one property only: after each start, the factors are a distribution over the next id. It need not be
# the model's distribution.
#
# ## From NumPy alone: two oracles and six mistakes
# An *oracle* knows the correct answer. Ours are that sum, which is 1, and `chain_rule`, which runs the model anew for
# each prefix and reads the last row, so it cannot read a wrong one.


# %%
def chain_rule(logits_of, x, y):
    """log pi(y|x), without a shift or a slice of logits."""
    return sum(log_softmax(logits_of([*x, *y[:t]]))[-1, token] for t, token in enumerate(y))


characters = range(1, V)
responses = [[*start, END_OF_TEXT] for t in range(CAP) for start in itertools.product(characters, repeat=t)]
responses += [list(start) for start in itertools.product(characters, repeat=CAP)]
ways = {
    "correct": lambda f, x, y: token_logprobs(f, x, y).sum(),
    "no shift": lambda f, x, y: token_logprobs(f, x, y, shift=0).sum(),
    "first token not scored": lambda f, x, y: token_logprobs(f, x, y)[1:].sum(),
    "end-of-text not scored": lambda f, x, y: token_logprobs(f, x, y)[np.array(y) != END_OF_TEXT].sum(),
    "a pad scored": lambda f, x, y: token_logprobs(f, x, [*y, END_OF_TEXT]).sum(),
    "mean for sum": lambda f, x, y: token_logprobs(f, x, y).mean(),
    "shift by two": lambda f, x, y: token_logprobs(f, x, y, shift=2).sum(),
}
sums, off = {}, {}
print(f"\n{len(responses)} complete responses    sum of exp   off the chain rule (nats)")
for name, way in ways.items():
    sums[name] = math.fsum(math.exp(way(toy_logits, x, y)) for y in responses)
    off[name] = max(abs(way(toy_logits, x, y) - chain_rule(toy_logits, x, y)) for y in responses)
    print(f"{name:<24}{sums[name]:>12.6f}{off[name]:>15.6f}")
assert len(responses) == sum(3**t for t in range(CAP + 1)) == 40
assert abs(sums["correct"] - 1) < 1e-12 and off["correct"] < 1e-12

# %% [markdown]
# ## The answer to the prediction
# Exactly 1. The row two places before a token has read less than it may, but it has read earlier tokens only. So after
# each start it still gives one distribution over the next id, and the proof asks for no more. (This needs a prompt of
# two tokens or more. With one, the first token's row is number -1, which in NumPy is the last: no error, but a wrong
# sum.)
#
# So the sum finds five of the six mistakes. Comparing with the chain rule finds the sixth.

# %%
assert abs(sums["shift by two"] - 1) < 1e-12 < 0.01 < off["shift by two"]
assert all(abs(sums[name] - 1) > 0.01 for name in ways if name not in ("correct", "shift by two"))
assert abs(math.fsum(math.exp(ways["shift by two"](toy_logits, x[:1], y)) for y in responses) - 1) > 0.01

# %% [markdown]
# ## Which way each mistake moves the sum, and how far
# Let score(y) be what a program returns for log pi(y|x). Multiply and divide by pi(y|x):
#
#     sum_y exp(score(y)) = sum_y pi(y|x) exp(score(y) - log pi(y|x)) = E_pi[exp(score(y) - log pi(y|x))]
#
# So the sum is the average of exp(score - log pi) over the model's own responses. This factor is above 1 for a response
# that the mistake makes look too likely. Each factor pi(token | ...) is below 1. Leave one out: the sum is above 1.
# Multiply by one too many: it is below 1. How far, mistake by mistake:
#
# - First token not scored. For each of the V first ids, the rest sums to S(first) = 1. The sum is V for every model.
# - End-of-text not scored. A response then counts as the probability that its characters are reached. Over all strings
#   of t characters, that adds up to P(a response has at least t characters). At t = 0 that is 1. At t = 1, 2, ... a
#   response is counted as often as it has characters, so these add up to the mean number of characters. So the sum is 1
#   + (mean number of characters).
# - A pad scored. Each response gets the factor pi(end-of-text | x, y): would the model say end-of-text after y? The sum
#   is the average of that probability, which is below 1.
# - Mean for sum. exp(mean) is the T-th root of pi(y|x), for T tokens. From two tokens on, the root of a number below 1
#   is larger than the number, so the sum is above 1. A uniform model gives each token 1/V, so the sum over n = 40
#   responses is n/V: it grows with their number.
# - No shift. Each token is scored by a row that has read it: would the model say it again? Fix a start. The V possible
#   next tokens are now read from V different rows, one per token, so nothing makes them add up to 1. The sum is near n
#   for a model that always repeats the last token, near 0 for one that never does, and exactly 1 for a uniform one.
# - Shift by two. The factors still form a distribution: exactly 1.
#
#     mistake                   sum                                         here
#     first token not scored    V                                          4.000
#     end-of-text not scored    1 + mean number of characters              3.805
#     a pad scored              mean probability of end-of-text after y    0.034
#     mean for sum              above 1; n/V for a uniform model           6.742
#     no shift                  0 to n: does the model repeat itself?      0.529
#     shift by two              1                                          1.000
#
# The picture shows in its upper half which log-probabilities count (dark cells) and the shift by one (arrows). The
# lower half shows from which row each mistake reads which token (orange: not what the correct way adds up), and its
# sum.

# %%
probabilities = np.array([math.exp(chain_rule(toy_logits, x, y)) for y in responses])
characters_of = np.array([sum(token != END_OF_TEXT for token in y) for y in responses])
end_after_y = [math.exp(chain_rule(toy_logits, [*x, *y], [END_OF_TEXT])) for y in responses]
np.testing.assert_allclose(sums["first token not scored"], V, rtol=1e-12)
np.testing.assert_allclose(sums["end-of-text not scored"], 1 + probabilities @ characters_of, rtol=1e-12)
np.testing.assert_allclose(sums["a pad scored"], probabilities @ end_after_y, rtol=1e-12)
roots = probabilities ** (1 / np.array([len(y) for y in responses]))
np.testing.assert_allclose(sums["mean for sum"], roots.sum(), rtol=1e-12)
for name, way in ways.items():  # the identity
    changes = [math.exp(way(toy_logits, x, y) - chain_rule(toy_logits, x, y)) for y in responses]
    np.testing.assert_allclose(sums[name], probabilities @ changes, rtol=1e-9)


def repeating(wish):
    """The toy model with `wish` added to the logit of the token that each row has just read."""
    return lambda tokens: toy_logits(tokens) + wish * np.eye(V)[tokens]


def no_shift_sum(logits_of):
    return math.fsum(math.exp(ways["no shift"](logits_of, x, y)) for y in responses)


print("\nwithout a shift, by the model's wish to repeat the token that it has read")
for wish in (-20, -2, 0, 2, 20):
    print(f"  {wish:>+4} on that logit: sum {no_shift_sum(repeating(wish)):9.6f}")
assert no_shift_sum(repeating(-20)) < 1e-6 and abs(no_shift_sum(repeating(20)) - len(responses)) < 1e-3
names = ("first token not scored", "end-of-text not scored", "a pad scored", "mean for sum", "no shift", "shift by two")
assert [f"{sums[name]:.3f}" for name in names] == ["4.000", "3.805", "0.034", "6.742", "0.529", "1.000"]

shifts = {"no shift": 0, "shift by two": 2}
scored = {name: [*enumerate(y, start=len(x) - shifts.get(name, 1))] for name in ways}  # (row, token that is read there)
scored["first token not scored"], scored["end-of-text not scored"] = scored["correct"][1:], scored["correct"][:-1]
scored["a pad scored"] = [*scored["correct"], (len(x + y) - 1, END_OF_TEXT)]
logp = log_softmax(toy_logits([*x, *y, END_OF_TEXT]))  # with one pad
for name, cells in scored.items():
    score = sum(logp[cell] for cell in cells) / (len(y) if name == "mean for sum" else 1)
    np.testing.assert_allclose(ways[name](toy_logits, x, y), score, rtol=1e-12)


def draw(path):
    counted, not_counted, wrong = (plots.PALETTE[0], "white"), ("white", plots.INK), (plots.PALETTE[1], "black")
    arrow, centred = {"arrowstyle": "-|>", "linewidth": 2}, {"ha": "center", "va": "center"}
    names = {name: name.replace(" not", "\nnot").replace("mean ", "mean\n") for name in scored}
    with plots.figure(path, (6.4, 8), {"axes.grid": False, "font.size": 12}) as figure:
        axes = figure.subplots()
        axes.set(xlim=(-2.3, 7.9), ylim=(14.4, -1.3))
        axes.axis("off")

        def cell(column, height, text, fill, ink):
            axes.barh(height, 0.94, 0.9, column - 0.47, color=fill, edgecolor=plots.INK)
            axes.text(column, height, text, color=ink, **centred)

        for height, text in ((0, "tokens"), (1.6, "row"), *((2.5 + i, f"logp of {i}") for i in range(V))):
            axes.text(-2.3, height, text, va="center")
        for column, text in ((1, "prompt x"), (4, "response y"), (6, "pad")):
            axes.text(column, -0.9, text, **centred)
        for column, text in ((3, "tokens scored, under the row\nthey are read from"), (7.3, "sum over\n40 responses")):
            axes.text(column, 6.8, text, **centred)
        for row, (token, following) in enumerate(itertools.pairwise([*x, *y, END_OF_TEXT, None])):
            cell(row, 0, token, "white", "black")
            axes.text(row, 1.6, row, **centred)
            for i in range(V):
                cell(row, 2.5 + i, f"{logp[row, i]:.1f}", *(counted if (row, i) in scored["correct"] else not_counted))
            if following is not None:
                color = counted[0] if (row, following) in scored["correct"] else plots.INK
                axes.annotate("", (row + 0.2, 1.4), (row + 0.8, 0.5), arrowprops=arrow | {"color": color})
        for height, name in enumerate(scored):
            axes.text(-2.3, 7.8 + height, names[name], va="center")
            axes.text(7.3, 7.8 + height, f"{sums[name]:.3f}", color="black", **centred)
            for row in range(len(logp)):
                token = dict(scored[name]).get(row, "")
                correct = (row, token) in scored["correct"] and name != "mean for sum"
                cell(row, 7.8 + height, token, *(not_counted if token == "" else counted if correct else wrong))
            if name == "mean for sum":
                axes.text(5, 7.8 + height, "÷ 3", **centred)


path = pathlib.Path("04_sequence_logprob.png")
if plots.installed():
    draw(path)
print(f"picture: {path.name}" if plots.installed() else "the picture needs matplotlib (the `plot` extra)")

# %% [markdown]
# ## The library's version
# `scoring.sequence_logprob` takes the same slice of the logits of a transformer (tutorial 05). `exact` has both
# oracles, and `mutants` has eleven wrong scorers: our six mistakes and five more. Their table is of another model,
# hence other numbers, with the library's names (masked: not scored). `last_prompt_token_scored` adds a factor, so its
# sum is below 1; `wrong_slice_end` is exercise 2. The last four are distributions, but not the model's: a shift by two,
# a prompt without its first token, logits divided by 2, positions (05) counted from 1.

# %%
config = model.Config(vocab_size=V, n_positions=8, n_embd=8, n_layer=1, n_head=2)
params = model.init(config, rng, dtype="float64")
for parameter in params.values():
    parameter.data = parameter.data + 0.5 * rng.normal(size=parameter.shape)  # so that every mistake shows
assert exact.complete_responses(V, CAP) == responses
for y in responses:
    mine = ways["correct"](lambda tokens: model.forward(params, config, [tokens]).data[0], x, y)
    np.testing.assert_allclose(mine, scoring.sequence_logprob(params, config, [x], [y]).item(), rtol=0, atol=1e-12)
    np.testing.assert_allclose(mine, exact.chain_rule_logprob(params, config, x, y), rtol=0, atol=1e-12)
verdicts = mutants.verdicts(params, config, x, CAP)
print("\n" + mutants.as_text(verdicts))

# %% [markdown]
# ## Padding
# Texts of unequal length fit into one array when the shorter ones are filled up with pads. A pad has no id of its own:
# it is 0, like end-of-text. The text's length tells it from the end-of-text that is scored. The log-probability of a
# pad must be left out of log pi(y|x), by selection. Multiplying by a *mask*, 1 at real tokens and 0 at pads, is not the
# same: 0 times -inf is nan.
#
# ## What -inf does on the way back
# A token is forbidden by setting its logit to -inf. Where that is done to id 0, a pad has probability 0 and
# log-probability -inf. Follow one number forwards: p, log p, mask * log p, log pi(y|x), the loss. Now go back. Let g be
# the slope of the loss with respect to log pi(y|x). Then, by the chain rule:
#
#     d loss/d log p = g * mask,     d loss/dp = (g * mask) * (1/p)
#
# This can fail in two ways:
# - Multiply by the mask. Then log pi(y|x) is already nan, because 0 * -inf is nan. For a chosen response, the slope g
#   of DPO's loss is -beta sigma(-z), and z contains log pi(y|x). So g is nan, and with it the gradient of every token
#   of the pair, real ones too. All pairs of a batch share the parameters, so one pad spoils the whole step.
# - Select the real tokens, but from the plain log of a softmax. Then log pi(y|x) is correct, and what arrives at the
#   pad's log p is 0. But 1/p is inf, and 0 * inf is nan. The loss looks healthy, and the gradient is nan.
#
# So select, and use log_softmax as one piece. Its vjp is gx = g - softmax * sum(g) (tutorial 03), which divides by
# nothing. A row with g = 0 gets exactly 0.

# %%
logits = np.array([[0.5, 1.0, 0.0], [-math.inf, 1.0, 2.0]])  # row 0 predicts a token, row 1 a pad, which is impossible
at, mask = np.array([1, END_OF_TEXT]), np.array([1.0, 0.0])
routes = {
    "log_softmax, times mask": lambda s: ops.sum(ops.gather(ops.log_softmax(s), at) * mask),
    "log of softmax, selected": lambda s: ops.sum(ops.gather(ops.log(ops.softmax(s)), at)[:1]),
    "log_softmax, selected": lambda s: ops.sum(ops.gather(ops.log_softmax(s), at)[:1]),
}
print("\na pad of log-probability -inf      loss   gradient of the real row       of the pad's row")
backwards = {}
for name, route in routes.items():
    leaf = Tensor(logits, requires_grad=True)
    with np.errstate(divide="ignore", invalid="ignore"):
        loss = -ops.logsigmoid(0.1 * (route(leaf) + 2.0))  # beta 0.1; the reference and y_l are constants
        loss.backward()
    backwards[name] = loss.item(), leaf.grad
    print(f"{name:<30}{loss.item():>9.4f}   " + "   ".join("{:7.4f} {:7.4f} {:7.4f}".format(*row) for row in leaf.grad))
loss, gradient = backwards["log_softmax, times mask"]
assert math.isnan(loss) and np.isnan(gradient[0]).all()  # the real token's row, too
loss, gradient = backwards["log of softmax, selected"]
assert math.isfinite(loss) and np.isnan(gradient[1]).any()
loss, gradient = backwards["log_softmax, selected"]
assert math.isfinite(loss) and np.isfinite(gradient).all() and not gradient[1].any()

# %% [markdown]
# ## Three routes, one result
# The library scores many pairs one by one, or padded into one array, or shared: then a pair's prompt is computed once,
# both responses follow it, and no pads are needed. All three give the same numbers and gradients.
#
# Does it matter to a pair whether the prompt is masked? With sums, no: scoring the prompt adds the same term to both
# responses, and it cancels in their difference. With means it is divided by two lengths, and cancels only if they are
# equal.

# %%
pairs = [(x, [1, 3, 0], [2, 0]), ([3], [0], [1, 1, 2, 0]), ([1, 2], [3, 3, 0], [3, 1, 1, 0])]  # x, w, l
g_w, g_l = rng.normal(size=(2, len(pairs)))


def one_by_one(params, config, pairs):
    logp = [[scoring.sequence_logprob(params, config, [x], [y]) for y in (w, l)] for x, w, l in pairs]
    return ops.concatenate(*(logp_w for logp_w, _ in logp)), ops.concatenate(*(logp_l for _, logp_l in logp))


results = {}
for route in (one_by_one, scoring.padded_logprobs, scoring.shared_logprobs):
    for parameter in params.values():
        parameter.grad = None
    logp_w, logp_l = route(params, config, pairs)
    ops.sum(g_w * logp_w + g_l * logp_l).backward()
    results[route.__name__] = [logp_w.data, logp_l.data, *(parameter.grad for parameter in params.values())]
for result in results.values():
    for value, expected in zip(result, results["one_by_one"]):
        np.testing.assert_allclose(value, expected, rtol=1e-10, atol=1e-10)
prompt_scored = one_by_one(params, config, [(x[:1], x[1:] + w, x[1:] + l) for x, w, l in pairs])
np.testing.assert_allclose((prompt_scored[0] - prompt_scored[1]).data, (logp_w - logp_l).data, rtol=0, atol=1e-12)

# %% [markdown]
# ## What was shown
# Row len(x) - 1 predicts the response's first token. End-of-text is scored; prompt and pads are not. The sum over
# complete responses finds scorers whose probabilities are not a distribution, the chain rule also those with a wrong
# distribution.
#
# ## Exercises
# 1. Derive: somebody scores the prompt as well, all of it but its first token. What is the sum over complete responses?
#    Why does a pair not notice?
# 2. Find the bug: which token is lost? Is the sum above 1 or below 1, or does it depend on the model?
#
#        logp = log_softmax(logits_of([*x, *y][:-1]))[len(x) - 1 : -1]
#        score = logp[np.arange(len(y) - 1), y[:-1]].sum()
#
# 3. Predict, then measure: a new model often gives every token the same probability. Which of the six mistakes does the
#    sum find on such a model? And the chain rule?

# %%
wrong = {mutant.__name__ for mutant in mutants.WRONG_DISTRIBUTION}
for verdict in verdicts:
    assert (abs(verdict.total_probability - 1) < 1e-12) == (verdict.name in {"correct", *wrong})
    assert (verdict.chain_rule_gap < 1e-12) == (verdict.name == "correct")
print("04: probabilities of all complete responses sum to 1; seven mistakes break that, four only the chain rule sees")

# %% [markdown]
# ## Solutions
# 1. Every response gets the same factor pi(x_2 ... x_n | x_1), so the sum is that factor, below 1. It is the same in
#    logp_w and logp_l, so it cancels in their difference.
# 2. `[:-1]` drops the row that predicts nothing in y, and `: -1` drops one more; `y[:-1]` hides it. So the last token
#    is never scored. A factor below 1 is missing from every probability, so the sum is above 1 for every model.
# 3. It finds four. A uniform model hides both shifts: all its rows are equal, so it does not matter which one is read.
#    The chain rule does not see them either. Test a scorer on a model whose rows differ.

# %%
with_prompt = math.fsum(math.exp(token_logprobs(toy_logits, x[:1], x[1:] + y).sum()) for y in responses)
np.testing.assert_allclose(with_prompt, math.exp(token_logprobs(toy_logits, x[:1], x[1:]).sum()), rtol=1e-12)
assert with_prompt < 1


def too_short(y):
    logp = log_softmax(toy_logits([*x, *y][:-1]))[len(x) - 1 : -1]
    return logp[np.arange(len(y) - 1), y[:-1]].sum()


assert all(abs(too_short(y) - token_logprobs(toy_logits, x, y)[:-1].sum()) < 1e-12 for y in responses)
assert math.fsum(math.exp(too_short(y)) for y in responses) > 1


def uniform(tokens):
    return np.zeros((len(tokens), V))


found = {name: abs(math.fsum(math.exp(way(uniform, x, y)) for y in responses) - 1) > 1e-9 for name, way in ways.items()}
unseen = {name for name in ways if abs(sums[name] - 1) > 0.01 and not found[name]}
assert unseen == {"no shift"}
for name in ("no shift", "shift by two"):
    assert max(abs(ways[name](uniform, x, y) - chain_rule(uniform, x, y)) for y in responses) < 1e-12
