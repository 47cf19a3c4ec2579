# %% [markdown]
# # 05. Attention, on paper
#
# **Question.** How can a model use every token of a text, and not only the last one?
#
# The model of tutorial 00 looks at the last token only. After "?ok" it has forgotten the "?" and the "o". A
# *transformer* looks back: at each position of a text it works out which earlier tokens matter there, and how much. The
# part that does so is called *attention*. This script is about attention alone. The rest of the transformer is in
# `05_transformer.py`.
#
# **Afterwards you can say**
# - what queries, keys, values and heads are, and how to work out attention on paper;
# - what the causal mask hides, and why;
# - why scores are divided by sqrt(D), and why what attention finds is added and not put in place of something.
#
# **Predict first.** Two lists hold 64 random numbers each, all independent, with mean 0 and variance 1. Multiply the
# first number of one list by the first of the other, the second by the second, and so on. Add up the 64 products. How
# large is the sum, typically: 1, 8 or 64?
#
# **The formula.** A text has T tokens. Each position has a *state*, a list of C numbers, which are called *channels*.
# So the states are a matrix with one row for each position, (T, C). All five lines are explained below.
#
#     q, k, v  = the states, times three matrices of learned numbers      (T, C) (C, D) -> (T, D), three times
#     scores   = q k^T/sqrt(D), but -inf where the key comes later        (T, D) (D, T) -> (T, T)
#     weights  = softmax(scores), row by row                              (T, T)
#     received = weights v                                                (T, T) (T, D) -> (T, D)
#     states   = states + received W_out                                  (T, D) (D, C) -> (T, C)

# %%
import math
import pathlib

import numpy as np

from minidpo import ops, plots

# %% [markdown]
# ## Three tokens, one head
# The text is "?ok". In a trained model nobody chooses what the channels mean, and their numbers are not 0 and 1. Here
# we choose, so that you can follow. There are C = 4 channels, and a state says what is at its position:
#
#     state of     question mark   vowel   consonant   first in the text
#     ?                  1           0         0         1
#     o                  0           1         0         0
#     k                  0           0         1         0
#
# Each position makes three vectors from its state. The *query* says what it is looking for. The *key* says what it has
# to offer. The *value* is what it hands over to those who look at it. Each is the state times a matrix, and has D
# numbers. Here D is 4, and keys and values are simply the state. For the queries we choose a matrix that does this: a
# question mark looks for a consonant, a vowel looks for a question mark and for the first token, and a consonant looks
# for a vowel. All queries carry a factor of log 4, to make the numbers come out well.
#
#     query of     question mark   vowel   consonant   first in the text
#     ?                  0           0       log 4       0
#     o                log 4         0         0       log 4
#     k                  0         log 4       0         0
#
# **Scores.** The score of a query and a key is their dot product, divided by sqrt(D) = 2. So each channel in which the
# key has what the query wants counts log 4 / 2 = log 2 = 0.69. All scores together are a matrix, with a row for each
# query and a column for each key:
#
#     scores       key of ?   key of o   key of k
#     query of ?      0         (0)       (0.69)
#     query of o     1.39        0         (0)
#     query of k      0         0.69        0
#
# **Mask.** The scores in brackets belong to keys that come later than the query. Each position has to predict the next
# token, so it must not see it. We replace these scores by -inf. This is called the *causal mask*.
#
# **Weights.** A softmax turns each row into weights that add up to 1. e^0.69 is 2, e^1.39 is 4, and e^-inf is 0.
#
# **Predict.** k looks for a vowel, and o is the only one. Does o get all of k's weight?
#
#     weights         ?      o      k
#     ?               1      0      0
#     o              4/5    1/5     0          4 : 1
#     k              1/4    1/2    1/4         1 : 2 : 1
#
# No: it gets half of it. A match doubles the weight, and that is all. If the query were ten times as long, the weight
# of o would be 2^10 = 1024 times that of the others.
#
# **Received.** Last, a position receives the mean of the values, weighted in this way:
#
#     ?   (1, 0, 0, 1)
#     o   4/5 (1, 0, 0, 1) + 1/5 (0, 1, 0, 0)                      = (0.8, 0.2, 0, 0.8)
#     k   1/4 (1, 0, 0, 1) + 1/2 (0, 1, 0, 0) + 1/4 (0, 0, 1, 0)   = (0.25, 0.5, 0.25, 0.25)


# %%
def softmax(scores):
    powers = np.exp(scores - scores.max(axis=-1, keepdims=True))  # minus the row's largest, as in tutorial 03
    return powers / powers.sum(axis=-1, keepdims=True)


def attention(q, k, v):
    """Scores, weights, and what each position receives.  q, k, v: (..., T, D)"""
    T, D = q.shape[-2:]
    scores = q @ k.swapaxes(-1, -2) / math.sqrt(D)  # (..., T, D) @ (..., D, T) -> (..., T, T)
    scores = np.where(np.tri(T, dtype=bool), scores, -math.inf)  # tri: true on and below the diagonal
    weights = softmax(scores)
    return scores, weights, weights @ v  # (..., T, T) @ (..., T, D) -> (..., T, D)


states = np.array([[1.0, 0, 0, 1], [0, 1, 0, 0], [0, 0, 1, 0]])  # (T, C): ?, o, k
to_queries = math.log(4) * np.array([[0, 0, 1, 0], [1, 0, 0, 1], [0, 1, 0, 0], [0, 0, 0, 0]])  # (C, D)
q, k, v = states @ to_queries, states, states
scores, weights, received = attention(q, k, v)
np.testing.assert_allclose(q / math.log(4), [[0, 0, 1, 0], [1, 0, 0, 1], [0, 1, 0, 0]], atol=1e-12)
np.testing.assert_allclose(weights, [[1, 0, 0], [4 / 5, 1 / 5, 0], [1 / 4, 1 / 2, 1 / 4]], atol=1e-12)
np.testing.assert_allclose(received, [[1, 0, 0, 1], [0.8, 0.2, 0, 0.8], [0.25, 0.5, 0.25, 0.25]], atol=1e-12)
ten_times = attention(10 * q, k, v)[1][2]
np.testing.assert_allclose(ten_times[1] / ten_times[0], 1024, rtol=1e-9)

# %% [markdown]
# ## What a layer adds
# A position does not replace its state by what it received. It adds that to it:
#
#     ?   (1, 0, 0, 1) + (1, 0, 0, 1)              = (2, 0, 0, 2)
#     o   (0, 1, 0, 0) + (0.8, 0.2, 0, 0.8)        = (0.8, 1.2, 0, 0.8)
#     k   (0, 0, 1, 0) + (0.25, 0.5, 0.25, 0.25)   = (0.25, 0.5, 1.25, 0.25)
#
# The state of k still says "consonant", and now it also says that a vowel and a question mark came before. So a state
# is a running sum, and each layer adds to it what it has found out. This is called the *residual* connection. The next
# layer starts from these states, and can look for something that no single token has: a consonant after a vowel, say.
# (W_out is one more matrix of learned numbers. It decides to which channels something is added. In our example it would
# be 1 on the diagonal and 0 elsewhere.)
#
# ## One head, then two
# One attention gives each position one set of weights. *Heads* are several attentions side by side. Cut the four
# channels of q, k and v into H = 2 halves of D = 2. Question mark and vowel make head 0, consonant and first make head
# 1. Each head has scores, weights and received values of its own, and what they receive is put side by side again: C =
# H D numbers, as before. Now sqrt(D) is 1.41, a match counts log 4 / 1.41 = 0.98, and e^0.98 = 2.67:
#
#     head 0       ?      o      k              head 1       ?      o      k
#     ?          1.00   0.00   0.00             ?          1.00   0.00   0.00
#     o          0.73   0.27   0.00             o          0.73   0.27   0.00
#     k          0.21   0.57   0.21             k          0.33   0.33   0.33
#
# In head 0, k looks for a vowel. In head 1 it looks for nothing: all its scores are 0, and it receives the plain mean.
# With several heads a position can look at several places at once, for different reasons, and what it finds arrives in
# different channels. With one head all of it would be mixed into one mean.


# %%
def heads(array, H):
    """Cut the channels into H heads.  (T, C) -> (H, T, D)"""
    T, C = array.shape
    return array.reshape(T, H, C // H).swapaxes(0, 1)  # (T, H, D) -> (H, T, D)


def side_by_side(array):
    """The way back.  (H, T, D) -> (T, C)"""
    H, T, D = array.shape
    return array.swapaxes(0, 1).reshape(T, H * D)


np.testing.assert_array_equal(side_by_side(heads(states, 2)), states)
_, two_weights, two_received = attention(*(heads(each, 2) for each in (q, k, v)))  # (2, T, T), (2, T, D)
np.testing.assert_allclose(two_weights[0], [[1, 0, 0], [0.727, 0.273, 0], [0.214, 0.571, 0.214]], atol=5e-4)
np.testing.assert_allclose(two_weights[1], [[1, 0, 0], [0.727, 0.273, 0], [1 / 3, 1 / 3, 1 / 3]], atol=5e-4)

# %% [markdown]
# The picture shows the matrices. Above the diagonal is what the mask hides.


# %%
def draw(path, panels):
    """Matrices of scores or weights; the darker, the larger."""
    from matplotlib.colors import LinearSegmentedColormap

    blue = LinearSegmentedColormap.from_list("blue", ["white", plots.PALETTE[0]])
    with plots.figure(path, (6.4, 6.8), {"axes.grid": False, "font.size": 12}) as figure:
        for axes, (title, matrix) in zip(figure.subplots(2, 2).flat, panels.items()):
            axes.imshow(np.maximum(matrix, 0), cmap=blue)
            for (row, column), number in np.ndenumerate(matrix):
                hidden, dark = column > row, number > 0.9 * matrix.max()
                ink = plots.INK if hidden else "white" if dark else "black"
                text = f"{number:.0f}" if hidden else f"{number:.2f}"
                axes.text(column, row, text, ha="center", va="center", color=ink, fontsize=14)
            axes.set(title=title, xlabel="key", ylabel="query")
            axes.set_xticks(range(3), "?ok")
            axes.set_yticks(range(3), "?ok")


path = pathlib.Path("05_attention.png")
if plots.installed():
    one = {"scores, one head": scores, "its weights": weights}
    draw(path, one | {f"weights, head {i} of two": each for i, each in enumerate(two_weights)})
print(f"picture: {path.name}" if plots.installed() else "the picture needs matplotlib (the `plot` extra)")

# %% [markdown]
# ## Why sqrt(D)
# A score is a sum of D products. Let a and b be independent random numbers with mean 0 and variance 1. (The variance is
# the mean squared distance from the mean; its root is the standard deviation.) Then a b has mean 0, and with E for the
# mean its variance is E[a^2 b^2] = E[a^2] E[b^2] = 1. Variances of independent numbers add up, so the sum of D such
# products has variance D and standard deviation sqrt(D). Divided by sqrt(D), it has standard deviation 1 for every D.
# (Real queries and keys need not be like that. At first their variance comes from layer norm, in `05_transformer.py`,
# and the size of the starting weights. Whatever it is, the factor D is gone.)
#
# Without the division, the scores of a large head would differ by 10 or 20, and e^10 is 22,026. One key would get
# nearly all the weight before the model has learned which one should. And it would be slow to learn: the slope of a
# weight with respect to its own score is weight (1 - weight), which is close to 0 where the weight is close to 0 or 1.

# %%
rng = np.random.default_rng(0)
largest, deviation = {}, {}
print("\n2000 queries, 8 keys each, all random; the mean of the largest of the 8 weights")
print("   D   deviation of q k^T   not divided   divided by sqrt(D)")
for D in (1, 4, 16, 64, 256):
    products = (rng.normal(size=(2000, 1, D)) * rng.normal(size=(2000, 8, D))).sum(axis=-1)  # (queries, keys)
    deviation[D] = products.std()
    largest[D] = [softmax(each).max(axis=-1).mean() for each in (products, products / math.sqrt(D))]
    print(f"{D:>4}{deviation[D]:>21.2f}{largest[D][0]:>14.2f}{largest[D][1]:>21.2f}")
    np.testing.assert_allclose(deviation[D], math.sqrt(D), rtol=0.05)

# %% [markdown]
# ## The answer to the prediction
# About 8, the square root of 64. Some products are positive and some negative, and most of them cancel. Attention
# divides by exactly this number. In the table the largest of eight weights goes from 0.31 to 0.94 as D grows. With the
# division it stays below 0.4.
#
# ## The library's version
# `ops.causal_attention` is the same function, with its derivative.

# %%
np.testing.assert_allclose(ops.causal_attention(q, k, v).data, received, atol=1e-12)
two_heads = [heads(each, 2) for each in (q, k, v)]
np.testing.assert_allclose(ops.causal_attention(*two_heads).data, two_received, atol=1e-12)

# %% [markdown]
# ## What was shown
# A position compares its query with all keys up to its own. The scores, divided by sqrt(D), become weights, and it
# receives the weighted mean of the values, which is added to its state. H heads do this side by side.
#
# ## Exercises
# 1. By hand, with one head: k gives itself a quarter of its weight. Now let its query avoid consonants, with -log 4 in
#    that channel. Who gets what k loses, o, "?", or both?
# 2. Find the bug: someone cuts heads with `array.reshape(H, T, D)`, without `swapaxes`, and joins them again with
#    `side_by_side`. All shapes fit. What should a change in the state of o never change? Check it.
# 3. Predict, then measure: the text is "o?k", so o is now the first token. Does k receive the same as from "?ok"? And
#    if no state said "first"?

# %%
assert (
    largest[256][0] > 0.9 and max(divided for _, divided in largest.values()) < 0.4 and round(largest[1][0], 1) == 0.3
)
print("\n05: attention by hand is the library's; q k^T varies by sqrt(D); later keys have no weight")

# %% [markdown]
# ## Solutions
# 1. Both, in proportion: its scores are 0, 0.69, -0.69, so its weights are as 1 : 2 : 1/2. That is 2/7, 4/7, 1/7, and o
#    still has twice the weight of "?". Only differences of scores count.
# 2. What "?" receives, because o comes later. `reshape` alone fills head 0 with the first six numbers of the matrix:
#    all of "?" and half of o. The first row of head 1 is then the other half of o, and "?" receives it.
# 3. The weights are the same. But now o brings "first", with weight 1/2: k receives 0.5 in that channel, not 0.25.
#    Without the channel it would receive the same from both texts: a weighted mean does not depend on the order of what
#    it is taken over. So one layer knows the order only if the states say it. (A second could tell: behind the mask, o
#    has received something from "?" in one text only.) In `05_transformer.py`, a vector for the position is added to
#    that of the token.

# %%
avoids = q.copy()
avoids[2] = [0, math.log(4), -math.log(4), 0]
np.testing.assert_allclose(attention(avoids, k, v)[1][2], [2 / 7, 4 / 7, 1 / 7], rtol=1e-12)

changed = states.copy()
changed[1] = [0, 3, 2, 1]  # another o
for cut, leaks in ((heads, False), (lambda array, H: array.reshape(H, 3, 4 // H), True)):
    before, after = (
        side_by_side(attention(*(cut(each, 2) for each in (some @ to_queries, some, some)))[2])[0]
        for some in (states, changed)
    )
    assert (abs(after - before).max() > 0.1) == leaks

for first in (1, 0):
    texts = states.copy(), states[[1, 0, 2]]  # ?ok, o?k
    for text in texts:
        text[:, 3] = [first, 0, 0]
    before, after = (attention(text @ to_queries, text, text)[2][2] for text in texts)
    np.testing.assert_allclose(after - before, [0, 0, 0, first / 4], atol=1e-12)
