# %% [markdown]
# # 00. The words, on a model that fits on a page
#
# **Question.** What is a language model, in numbers that fit on a page, and what does it mean to train one on people's
# judgements?
#
# You need Python with NumPy, and school mathematics: powers of e, natural logarithms (`math.log`), derivatives,
# probabilities. New words are in *italics* where they are explained.
#
# **Afterwards you can say**
# - what these words mean: token, logit, pi(y|x), nat, loss, policy, reward, total variation, KL;
# - how to compute each of them by hand, for a model of sixteen numbers;
# - what RLHF, PPO and DPO are: who writes, who judges, and why moving away has a price.
#
# **Predict first.** A program answers a question one character at a time. It begins with "o" half of the time. After
# "o" it writes "k" half of the time. After "k" it stops half of the time. How often is its answer exactly "ok"? Another
# program is surer: at each step it takes its favourite with probability 0.9. How likely is it that it writes 100
# characters and then stops, taking its favourite all 101 times?
#
# **The formula.** Every word and letter of these five lines is explained below, in this order.
#
#     probability of a token = e^logit / (sum of e^logit over all tokens that may come next)
#     pi(y|x)     = product over t of pi(y_t | x, y_1 ... y_(t-1))
#     log pi(y|x) = sum over t of log pi(y_t | x, y_1 ... y_(t-1))              in nats
#     TV          = half the sum over y of |pi(y|x) - pi_ref(y|x)|              total variation
#     KL          = sum over y of pi(y|x) (log pi(y|x) - log pi_ref(y|x))       in nats

# %%
import itertools
import math
import pathlib

import numpy as np

from minidpo import exact, ops, plots
from minidpo.tokenizer import Tokenizer

# %% [markdown]
# ## Tokens
# A *language model* reads a text and says how likely each possible next piece is. The pieces are called *tokens*. In
# large models a token is a word or a part of one. In ours it is a character, and there are four: k, n, o and "?". The
# only question is "?". Answers are made of the other three.
#
# One more token has no character: *end-of-text*. It says that the answer is finished. Without it nobody could tell the
# answer "o" from the beginning of "ok". Inside the program a token is a number, its *id*: end-of-text is 0, k is 1, n
# is 2, o is 3 and "?" is 4.
#
# The model is given the *prompt*, x; here "?". It writes the *response*, y. y_t is the token at position t of y. So the
# response "ok" has three tokens: y_1 is o, y_2 is k, y_3 is end.
#
# ## Logits, and the probability of the next token
# Our model looks at the last token only. For each it has a row of four numbers, the *logits*: one for each token that
# may come next. (It never writes "?", so there is no column for it.) The larger the logit, the likelier the token. This
# is the whole model (`reference` in the code; the word is explained below):
#
#     last token       next token:   end      k      n      o
#     ?                             0.00   0.00   0.69   1.39
#     k                             1.39   0.00   0.00   0.69
#     n                             0.69   0.00   0.00   1.39
#     o                             0.69   1.39   0.00   0.00
#
# A logit may be any number, even a negative one. To get probabilities, raise e to the power of each logit: now all are
# positive. Then divide by their sum. This is called *softmax*, and the result is a *distribution*: probabilities that
# add up to 1. We chose logits that make this easy. 0.69 is log 2 and 1.39 is log 4, so e^logit is 1, 2 or 4. After "?":
#
#     next token       end      k      n      o
#     e^logit            1      1      2      4        sum 8
#     probability      1/8    1/8    1/4    1/2        sum 1

# %%
NEXT = ("end", "k", "n", "o")  # what may come next, in the order of the ids
reference = {  # last token -> logits
    "?": np.log([1, 1, 2, 4]),
    "k": np.log([4, 1, 1, 2]),
    "n": np.log([2, 1, 1, 4]),
    "o": np.log([2, 4, 1, 1]),
}


def softmax(logits):
    return np.exp(logits) / np.exp(logits).sum()


np.testing.assert_allclose(reference["?"], [0, 0, 0.69, 1.39], atol=0.005)
np.testing.assert_allclose(softmax(reference["?"]), [1 / 8, 1 / 8, 1 / 4, 1 / 2], rtol=1e-12)

# %% [markdown]
# **Predict.** Add 5 to all four logits of a row. What happens to the probabilities?
#
# Nothing. Each e^logit is multiplied by e^5, and so is their sum. Only differences between logits mean something: the
# logit of o is log 2 above that of n, so o is twice as likely as n.

# %%
np.testing.assert_allclose(softmax(reference["?"] + 5), softmax(reference["?"]), rtol=1e-12)

# %% [markdown]
# ## pi(y|x), the probability of a response
# pi is the field's letter for the probabilities that a model gives. Read pi(y|x) as "pi of y given x": how likely the
# model is to respond to x with exactly y. It chooses one token after another, so multiply:
#
#     pi(ok|?) = pi(o|?) pi(k|?o) pi(end|?ok) = 1/2 * 1/2 * 1/2 = 1/8
#     pi(no|?) = pi(n|?) pi(o|?n) pi(end|?no) = 1/4 * 1/2 * 1/4 = 1/32
#
# Each factor is the probability of a token, given all that comes before it. Our model uses only the last character of
# that. The transformer of tutorial 05 uses all of it.
#
# To write, the model *samples*: it draws the first token with the probabilities of row "?", the next one with those of
# the row that it has reached, and so on to the end. We cut a response after three tokens, so that all can be listed.
# "ok" has an end; "kkk" is cut and has none. There are 1 + 3 + 9 texts of up to two characters and 27 of three, 40 in
# all, and their probabilities add up to 1.


# %%
def tokens(text):
    return [*text, "end"][:3]


def logprob(model, text):
    """log pi(y|?), a sum over the tokens of y."""
    total, last = 0.0, "?"
    for token in tokens(text):
        total += math.log(softmax(model[last])[NEXT.index(token)])
        last = token
    return total


def sample(model, rng):
    last, text = "?", ""
    while last != "end" and len(text) < 3:
        last = str(rng.choice(NEXT, p=softmax(model[last])))
        text += last if last != "end" else ""
    return text


texts = ["".join(y) for length in range(4) for y in itertools.product("kno", repeat=length)]
ref_logp = np.array([logprob(reference, text) for text in texts])
assert len(texts) == 40 and abs(np.exp(ref_logp).sum() - 1) < 1e-12
rng = np.random.default_rng(0)
written = [sample(reference, rng) for _ in range(4000)]
print("samples of the model:", *(repr(text) for text in written[:10]))
for text, by_hand in (("ok", 1 / 8), ("no", 1 / 32)):
    share = written.count(text) / len(written)
    print(f"pi({text}|?) = {by_hand:.4f}, its share of 4000 samples {share:.4f}")
    assert abs(logprob(reference, text) - math.log(by_hand)) < 1e-12 and abs(share - by_hand) < 0.02

# %% [markdown]
# ## Nats
# The logarithm of a product is a sum, which is easier to handle. A probability is at most 1, so its logarithm is at
# most 0. The unit is the *nat*. 0 nats is certainty; each nat less means a probability that is e = 2.718 times smaller.
# A factor of 2 is log 2 = 0.693 nats, a factor of 10 is log 10 = 2.303.
#
#     log pi(ok|?) = 3 log 1/2              = -2.079 nats
#     log pi(no|?) = 2 log 1/4 + log 1/2    = -3.466 nats        1.386 nats less: a factor of 4
#
# ## The answer to the prediction
# The answer is "ok" one time in eight. The surer program chooses its favourite 101 times in a row (stopping is a
# choice, too) with probability 0.9^101: once in 42,000 times. In nats this is 101 log 0.9 = -10.6. So a response may be
# likely at every step, and very unlikely as a whole. At 10,000 tokens the product is too small for the computer, which
# stores 0. The sum is -1054 nats. That is why we add up logarithms.

# %%
assert round(0.9**-101, -3) == 42_000 and 0.9**10_000 == 0 and round(10_000 * math.log(0.9)) == -1054
assert [f"{math.log(factor):.3f}" for factor in (2, 10)] == ["0.693", "2.303"]

# %% [markdown]
# ## Parameters, loss, gradient
# The numbers that training may change are the *parameters*: here the sixteen logits. A *loss* is a number that training
# makes smaller. To make "ok" likelier, for example, take the loss -log pi(ok|?), now 2.079. Its derivative with respect
# to one parameter, while the others stay as they are, is a slope. All slopes together are the *gradient*. One step of
# *gradient descent* subtracts from each parameter its slope, times a small number, the *learning rate*. In row "?" the
# slopes are 1/8, 1/8, 1/4 and -1/2: the probabilities, minus 1 at o, with which "ok" begins (tutorial 03 shows why). So
# a step raises the logit of o and lowers the other three.


# %%
def nudged(model, last, token, amount):
    return {**model, last: model[last] + amount * (np.array(NEXT) == token)}


slopes = [(logprob(reference, "ok") - logprob(nudged(reference, "?", each, 1e-6), "ok")) / 1e-6 for each in NEXT]
np.testing.assert_allclose(slopes, [1 / 8, 1 / 8, 1 / 4, -1 / 2], atol=1e-5)

# %% [markdown]
# ## Policy, reference and reward
# *Reinforcement learning* is learning from rewards for what one did, rather than from examples of what to do. There,
# whatever decides what to do next is called a *policy*, hence the letter pi: in each situation it gives each action a
# probability. For a language model the situation is the text so far, the action the next token. In this course, the
# policy is the model that is being trained.
#
# The *reference*, pi_ref, is a copy of the policy from before training, and it never changes. Ours is the table above.
# Our policy differs from it in one logit: that of o after "?" is larger by log 3. So e^logit is 12 there instead of 4,
# and the sum of the row is 16:
#
#     first token          end       k       n       o
#     pi_ref               1/8     1/8     1/4     1/2
#     pi                  1/16    1/16     1/8     3/4
#
# A *reward* r(x, y) says how good y is as a response to x. Let "ok" be worth 1, "no" -1 and everything else 0. E_pi[r]
# is the mean reward of a policy: each response counts as often as the policy writes it.
#
#     reference     1/8 - 1/32 = 0.094
#     policy       3/16 - 1/64 = 0.172        pi(ok|?) = 3/4 * 1/2 * 1/2,   pi(no|?) = 1/8 * 1/2 * 1/4

# %%
policy = nudged(reference, "?", "o", math.log(3))
logp = np.array([logprob(policy, text) for text in texts])
true_reward = np.array([{"ok": 1, "no": -1}.get(text, 0) for text in texts])
np.testing.assert_allclose(softmax(policy["?"]), [1 / 16, 1 / 16, 1 / 8, 3 / 4], rtol=1e-12)
np.testing.assert_allclose([np.exp(each) @ true_reward for each in (ref_logp, logp)], [3 / 32, 11 / 64], rtol=1e-12)

# %% [markdown]
# ## How far apart: total variation and KL
# *Total variation*, TV, is how much probability has to be moved to turn one distribution into the other. It is half the
# sum of the absolute differences; half, because what moves is counted twice: where it leaves and where it arrives. It
# lies between 0 and 1.
#
# *KL*, the Kullback-Leibler divergence, asks how much likelier the policy finds its own responses than the reference
# does. For one response, log pi - log pi_ref says so, in nats; this is its *log-ratio*. KL(pi || pi_ref) is the mean
# log-ratio over the responses that the policy writes. It is never negative (tutorial 08 proves that). Both TV and KL
# are 0 only where the two distributions are equal. For the first token:
#
#     first token          end       k       n       o
#     |pi - pi_ref|       1/16    1/16     1/8     1/4        sum 1/2, so TV = 1/4
#     log-ratio         -0.693  -0.693  -0.693   0.405        log 1/2 three times, then log 3/2
#     pi * log-ratio    -0.043  -0.043  -0.087   0.304        sum KL = 0.131 nats
#
# For whole responses the sums have 40 terms, and give the same two numbers. These two models differ in the first token
# only, so the log-ratio of a response is that of its first token. Responses with the same first token all gain or all
# lose, so their differences add up to the token's.
#
# **Predict.** Exchange the two models. Is KL(pi_ref || pi) the same number?
#
# No. The mean is now over the reference's responses, and the log-ratios change sign. Half of these responses begin with
# o and count -0.405, the others 0.693: the mean is 0.144 nats. KL(pi || pi_ref) is infinite if pi writes something that
# pi_ref never writes, KL(pi_ref || pi) if it is the other way round.


# %%
def kl(logp, logq):
    return (np.exp(logp) * (logp - logq)).sum()


def total_variation(logp, logq):
    return abs(np.exp(logp) - np.exp(logq)).sum() / 2


first, ref_first = np.log(softmax(policy["?"])), np.log(softmax(reference["?"]))
for a, b in ((first, ref_first), (logp, ref_logp)):
    np.testing.assert_allclose([total_variation(a, b), kl(a, b), kl(b, a)], [0.25, 0.131, 0.144], atol=5e-4)

# %% [markdown]
# In the picture width is probability. A piece is cut, in the row below, into the tokens that may follow it, so its
# width is a product. Below an end there is nothing. Follow "ok" down. The policy has moved a quarter of the width to o.


# %%
def pieces(model, start="", left=0.0, width=1.0):
    """Each beginning of a response, with its left edge and its width."""
    for token, probability in zip(NEXT, softmax(model[start[-1:] or "?"])):
        yield [*start, token], left, width * probability
        if token != "end" and len(start) < 2:
            yield from pieces(model, start + token, left, width * probability)
        left += width * probability


def draw(path):
    with plots.figure(path, (6.4, 5.6), {"axes.grid": False}) as figure:
        for axes, (name, model) in zip(figure.subplots(2), (("reference", reference), ("policy", policy))):
            for y, left, width in pieces(model):
                fill, ink = (plots.PALETTE[0], "white") if y == ["o", "k", "end"][: len(y)] else ("white", "black")
                axes.barh(-len(y), width, 0.9, left, color=fill, edgecolor=plots.INK, linewidth=0.6)
                if width > 0.03:
                    turn = 90 if y[-1] == "end" and width < 0.06 else 0
                    axes.text(left + width / 2, -len(y), y[-1], color=ink, ha="center", va="center", rotation=turn)
            axes.set(xlim=(0, 1.002), title=f'{name}: what follows "?"')
            axes.set_yticks([-1, -2, -3], ["token 1", "token 2", "token 3"])
            axes.set_xticks([0, 1 / 8, 1 / 4, 1 / 2, 1], ["0", "1/8", "1/4", "1/2", "1"])
        axes.set_xlabel("width: probability")


path = pathlib.Path("00_words.png")
if plots.installed():
    draw(path)
print(f"\npicture: {path.name}" if plots.installed() else "\nthe picture needs matplotlib (the `plot` extra)")

# %% [markdown]
# ## RLHF, in a page
# Nobody can write down a formula for a good answer, but people can say which of two answers is better. *RLHF*,
# reinforcement learning from human feedback, trains a model on such judgements. Before it starts, the model has learned
# to answer by imitating texts that people wrote (tutorial 05). That model is the reference, and the first policy.
#
# 1. **The policy writes.** It samples two responses to each prompt.
# 2. **People judge.** They say which is better. That one is *chosen*, w, and the other *rejected*, l (winner, loser).
# 3. **A reward model learns to judge.** People are slow, so a second model is trained to give w a larger number than l
#    (tutorial 01 has the loss). Then its number r(x, y) takes the place of people.
# 4. **The policy is trained to earn reward.** It samples again, and the reward model judges. Responses that earn more
#    than the policy usually does are made likelier, the others less likely. This is repeated many times.
#
# In step 4 the policy does not maximise its mean reward alone, but E_pi[r] - beta KL(pi || pi_ref). Moving away from
# the reference has a price, set by a positive number, *beta*: at beta = 0.1, one nat of KL costs 0.1 of reward.
#
# *PPO*, proximal policy optimisation, is the usual method for step 4. It works with four models: policy, reference,
# reward model and a *critic*, which predicts how much reward to expect. What a response earns beyond that prediction is
# its *advantage*. It says how hard to push and which way. Samples are expensive, so PPO takes several steps on the same
# ones. "Proximal" means near: a token whose probability has since changed by about 20 % is pushed no further in that
# direction. (`minidpo.theory.ppo` has all of it.)
#
# *DPO*, direct preference optimisation, aims at the same policy without reward model, critic or sampling. It is a loss
# on w and l themselves, made of four numbers: log pi and log pi_ref of each. Tutorial 08 derives it.
#
# ## Why the price?
# A reward model has seen some judgements and guesses the rest. Suppose that people judged
#
#     ok better than no,     ok better than n,     k better than no,     ok better than o
#
# and that the reward model found a rule that agrees with all four: *one point for each k*. The true reward is the one
# above. Now let RLHF be perfect: for each beta take the very best policy, which is pi_ref(y|x) e^(r/beta), divided by
# its sum over y. (Tutorial 08 proves that. Here, none of 2000 others is better.)
#
# **Predict.** As beta falls, the best policy earns more of the learned reward. What happens to its true reward?

# %%
learned_reward = np.array([text.count("k") for text in texts])
for w, l in (("ok", "no"), ("ok", "n"), ("k", "no"), ("ok", "o")):
    assert all(r[texts.index(w)] > r[texts.index(l)] for r in (learned_reward, true_reward))

print("\n   beta   learned reward   KL, nats   true reward   likeliest response")
rows = {}
for beta in (1000, 3, 1, 0.5, 0.3, 0.1):
    best, _ = exact.optimum(ref_logp, learned_reward, beta)  # its log-probabilities
    others = ops.log_softmax(best + rng.uniform(0.1, 3, (2000, 1)) * rng.normal(size=(2000, 40))).data
    assert exact.objective(np.vstack([best, others]), ref_logp, learned_reward, beta).argmax() == 0
    rows[beta] = np.exp(best) @ learned_reward, kl(best, ref_logp), np.exp(best) @ true_reward
    print(f"{beta:>7g}" + "{:>17.2f}{:>11.2f}{:>14.3f}".format(*rows[beta]) + f"   {texts[best.argmax()]}")

# %% [markdown]
# It rises at first. Then it falls, and ends below that of the reference. Four of the six rows:
#
#        beta   learned reward   KL, nats   true reward   likeliest response
#        1000             0.58       0.00         0.094   ok
#           1             1.04       0.24         0.139   ok
#         0.5             1.58       1.05         0.109   okk
#         0.1             3.00       6.22         0.000   kkk
#
# At beta = 1000 the policy is practically the reference, where "ok", "o" and "" tie at 1/8; the k tips the balance. A
# policy near the reference mostly writes responses like those that people judged, and there the rule is as good as
# their judgement. "kkk" is far away: the reference gives it 1/512, and log 512 = 6.24 nats is nearly the last KL. A
# policy that is after reward alone finds just the responses on which the rule is wrong; this is called *reward
# hacking*. That is what the price is for.
#
# ## The library's version
# `Tokenizer` turns characters into ids, `ops.log_softmax` is the logarithm of softmax, and `exact` lists all complete
# responses and sums over them.

# %%
tokenizer = Tokenizer("kno?")
assert tokenizer.vocab_size == 5 and tokenizer.encode("ok?") == [3, 1, 4]
np.testing.assert_allclose(ops.log_softmax(reference["?"]).data, ref_first, rtol=1e-12)
np.testing.assert_allclose(exact.kl(logp, ref_logp), kl(logp, ref_logp), rtol=1e-12)
np.testing.assert_allclose(exact.total_variation(logp, ref_logp), total_variation(logp, ref_logp), rtol=1e-12)
ids = [[NEXT.index(token) for token in tokens(text)] for text in texts]
assert sorted(ids) == sorted(exact.complete_responses(vocab_size=4, cap=3))

# %% [markdown]
# ## What was shown
# A language model gives each possible next token a logit; softmax turns logits into probabilities. log pi(y|x) is a sum
# over the tokens of y, in nats. TV and KL say how far a policy is from its reference. RLHF fits a reward model to
# people's choices, and trains the policy to earn its reward minus beta times KL.
#
# ## Exercises
# 1. By hand: a policy never begins with n. Its other first tokens keep the proportions that they have in the reference.
#    What are TV, KL(pi || pi_ref) and KL(pi_ref || pi) of the first token?
# 2. Find the bug: somebody estimates KL(pi || pi_ref) as the mean of `logprob(policy, y) - logprob(reference, y)` over
#    thousands of samples y, and gets -0.14. What did they sample from?
# 3. Predict, then measure: double all sixteen logits of the reference. Do "ok", "no" and "o", each with its end, become
#    likelier?

# %%
assert rows[1][2] > rows[1000][2] > 0.09 and rows[0.1][2] < 0.001 and round(rows[1][2], 3) == 0.139
pi_ref = dict(zip(texts, np.exp(ref_logp).round(9)))
assert pi_ref["ok"] == pi_ref["o"] == pi_ref[""] == max(pi_ref.values()) == 1 / 8 and pi_ref["kkk"] == 1 / 512
assert (round(math.log(512), 2), round(rows[0.1][1], 2)) == (6.24, 6.22)
print("\n00: TV 0.25 and KL 0.131 nats by hand; far from the reference, a learned reward is a guess")

# %% [markdown]
# ## Solutions
# 1. The others share 1 as 1 : 1 : 4, so they are 1/6, 1/6 and 2/3, each 4/3 times as likely as before. TV is the 1/4
#    that n has lost. KL(pi || pi_ref) = log 4/3 = 0.288 nats. KL(pi_ref || pi) is infinite: the reference writes n,
#    and the policy never does.
# 2. From the reference. Then the mean estimates -KL(pi_ref || pi) = -0.144. Samples of the policy give 0.131.
# 3. Each e^logit is squared: 1, 1, 4, 16, sum 22. At each step the favourite becomes likelier. "ok" takes it three
#    times: (16/22)^3 = 0.38. "no" takes it once: 4/22 * 16/22 * 4/22 = 0.024, a little less than before. "o" takes it
#    once and then the second choice: 16/22 * 4/22 = 0.132, a little more.

# %%
with np.errstate(divide="ignore"):
    without_n = np.log([1 / 6, 1 / 6, 0, 2 / 3])
np.testing.assert_allclose(exact.total_variation(without_n, ref_first), 1 / 4, rtol=1e-12)
np.testing.assert_allclose(exact.kl(without_n, ref_first), math.log(4 / 3), rtol=1e-12)
assert exact.kl(ref_first, without_n) == math.inf
for samples, expected in ((written, -0.144), ([sample(policy, rng) for _ in range(4000)], 0.131)):
    estimate = np.mean([logprob(policy, text) - logprob(reference, text) for text in samples])
    assert abs(estimate - expected) < 0.03
doubled = {last: 2 * logits for last, logits in reference.items()}
for text, after in (("ok", 0.385), ("no", 0.024), ("o", 0.132)):
    assert abs(math.exp(logprob(doubled, text)) - after) < 5e-4
