# %% [markdown]
# # 13. What goes wrong
#
# **Question.** The DPO loss falls as it should. What can get worse meanwhile?
#
# **Afterwards you can say**
# - why a chosen reply can become less likely while its margin grows, and what holds it up;
# - why sums of log-ratios can reward length, and which margin noisy labels lead to;
# - how the implicit reward can rise while the true reward falls;
# - why learning to refuse one prompt means refusing other prompts too, and by how much.
#
# **Predict first.** Before each word a reference continues with probability 0.8, so its replies have 4 words on
# average. If two replies differ by 5 words, judges prefer the longer one in 6 of 10 cases. DPO at beta = 0.1 trains a
# policy that can change this probability and nothing else, for as long as the expected loss falls. How long do its
# replies become?
#
# **The formula.** With z = beta * margin and labels that are wrong with probability flip, the expected loss of a pair
# is L(z) = -(1 - flip) log sigma(z) - flip log sigma(-z), and dL/dz = -(sigma(-z) - flip).

# %%
import math
import pathlib

import numpy as np

from minidpo import Tensor, exact, losses, ops, plots
from minidpo.theory import no_never_yes


def sigma(z):
    return 1 / (1 + np.exp(-z))


def slope(z, flip=0.0):
    return -(sigma(-z) - flip)  # dL/dz


def log_softmax(s):
    s = s - s.max()
    return s - np.log(np.exp(s).sum())


def show(title, columns, rows):
    print(f"\n{title}\n{columns[0]:<48}" + "".join(f"{name:>17}" for name in columns[1:]))
    for name, *numbers in rows:
        print(f"{name:<48}" + "".join(f"{number:>17.3f}" for number in numbers))


# %% [markdown]
# ## From NumPy alone: 1. A chosen reply becomes less likely
#
# Setup: three replies of one word each, as in tutorial 10. log pi = log_softmax(vectors @ theta), and theta = 0 at the
# reference. There is one pair, "no" over "never". Write no, never and yes for the vectors. The loss sees only
# margin = <no - never, theta>, so it moves theta along no - never = (1, 1). On that way log pi(no) changes at the rate
# <no - mean vector, no - never>, which is 2 - 7/3 < 0 at the start: in the words of 10, K_ww < K_wl. The reason is
# "yes". It lies further in that direction than "no", and takes probability from both. What helps: a likelihood term,
# -nll_weight * log pi(no).
#
# This is one pair. Why the *mean* reward of chosen replies may fall over a whole data set is derived in tutorial 10,
# "Why both mean rewards may fall".

# %%
vectors = np.array([[1.0, 1.0], [0.0, 0.0], [5.0, 0.0]])  # no (w), never (l), yes


def three_words(nll_weight, beta=0.5, steps=2000, rate=0.1):
    theta, path = np.zeros(2), []
    for _ in range(steps + 1):
        logp = log_softmax(vectors @ theta)
        path.append(logp)
        z = beta * (logp[0] - logp[1])  # under the reference all words are equally likely
        toward = vectors[0] - np.exp(logp) @ vectors  # d log pi(no)/dtheta
        theta = theta - rate * (beta * slope(z) * (vectors[0] - vectors[1]) - nll_weight * toward)
    return np.array(path)  # (steps + 1, 3)


plain, with_nll = three_words(0.0), three_words(1.0)
rows = [("at the reference", *plain[0]), ("after DPO", *plain[-1]), ("after DPO with nll_weight 1", *with_nll[-1])]
show("1. One pair, no over never", ("log pi of", "no", "never", "yes"), rows)

# %% [markdown]
# ## 2. Replies grow longer
#
# A log-ratio is a sum over tokens. If every token of a reply gains the same number of nats, its
# reward is beta * gain * |y|: length pays.
# Setup: the policy continues with probability p = sigma(theta) before each word. A reply of n words then has
# log pi = n log p + log(1 - p), and the mean number of words is p/(1 - p) = exp(theta). If the chosen reply has `more`
# words than the other, the terms log(1 - p) cancel: margin = more * (log p - log p_ref). What helps: a free bonus for
# each word, so that in this section z = beta * margin + bonus * more (Park et al., arXiv 2403.19159). With
# bonus * more = log(0.6/0.4), margin 0 already explains the judges, and their bias leaves nothing to learn.

# %%
p_ref, shorter, beta, more = 0.8, 0.4, 0.1, 5  # `shorter`: how often the shorter reply wins; it serves as flip
bonus = math.log((1 - shorter) / shorter) / more


def words(steps, bonus=0.0, rate=10.0):
    theta = math.log(p_ref / (1 - p_ref))
    for _ in range(steps):
        p = sigma(theta)
        z = beta * more * math.log(p / p_ref) + bonus * more
        theta -= rate * slope(z, shorter) * beta * more * (1 - p)  # dz/dtheta = beta more (1 - p)
    return math.exp(theta)


rows = [(f"{n}", words(n), words(n, bonus)) for n in (0, 100, 1000)]
show("2. Mean words of a reply", ("steps", "DPO", "with bonus"), rows)

# %% [markdown]
# ## The answer to the prediction
#
# They grow without end. The labels ask for sigma(z) = 0.6. But log p is below 0, so z is below
# beta * more * log(1/0.8) = 0.112, and sigma(z) is below 0.528. So dL/dz is always negative, and the loss keeps falling
# as p rises towards 1.
#
# ## 3. Noisy labels
#
# dL/dz = 0 where sigma(z) = 1 - flip, which is at margin = log((1 - flip)/flip)/beta. If a pair always gets the same
# label, the margin grows for ever. With `label_smoothing` = flip it settles at that margin. Plain DPO settles there too
# if an otherwise certain label is flipped with that probability, because the expected loss is the same. So smoothing
# keeps a margin finite, which helps where each pair was labelled only once. It does not undo flips: on flipped labels
# it shrinks the margin once more. Exercise 1 undoes them.

# %%
p, flip = 0.9, 0.2  # the better reply is preferred with probability p, then the label is flipped with probability flip


def with_flips(p, flip):
    return (1 - flip) * p + flip * (1 - p)


def best_margin(p):  # of the expected loss -p log sigma(z) - (1 - p) log sigma(-z)
    return math.log(p / (1 - p)) / beta


targets = {  # the probability that the label says w; label_smoothing
    "always the same label, smoothing 0.2": (1.0, flip),
    "preferred with 0.9": (p, 0.0),
    "preferred with 0.9, a fifth flipped": (with_flips(p, flip), 0.0),
    "preferred with 0.9, a fifth flipped, smoothing": (with_flips(p, flip), flip),
}
margins = [best_margin(with_flips(probability, smoothing)) for probability, smoothing in targets.values()]
show("3. The best margin at beta 0.1", ("labels", "margin, nats"), zip(targets, margins))

# %% [markdown]
# ## 4. The implicit reward rises, the true reward falls
#
# Setup: one prompt and six replies. A proxy labels all pairs, without noise. It is right except for one reply, which is
# rare, the worst, and the proxy's favourite. At first every reward rises, because the proxy is mostly right. Then the
# policy learns to give the sixth reply, and the true reward falls. Labels without noise have no finite minimiser, so
# nothing stops it. The policy's mean implicit reward, E_pi[beta log(pi/pi_ref)] = beta KL(pi || pi_ref), rises the
# whole time. What helps: stop by a measure other than the proxy; or use Bradley-Terry labels and a large beta, whose
# optimum stays near the reference (second table).

# %%
proxy, true = np.arange(6.0), np.array([0.0, 1.0, 2.0, 3.0, 4.0, -5.0])
ref_logp = np.log([0.30, 0.25, 0.20, 0.15, 0.09, 0.01])
w, l = np.nonzero(proxy[:, None] > proxy)  # 15 pairs


def table_gradient(logits, beta=0.5):
    ratio = log_softmax(logits) - ref_logp
    push = beta * slope(beta * (ratio[w] - ratio[l])) / len(w)
    return np.bincount(w, push, 6) - np.bincount(l, push, 6)  # d margin/dlogits = onehot(w) - onehot(l)


logits, path = ref_logp.copy(), []
for _ in range(3001):
    path.append(log_softmax(logits))
    logits = logits - 2.0 * table_gradient(logits)
path = np.array(path)  # (3001, 6)
ratio = path - ref_logp
loss = np.log1p(np.exp(-0.5 * (ratio[:, w] - ratio[:, l]))).mean(axis=1)  # (3001, 15) -> (3001,)
kl = (np.exp(path) * ratio).sum(axis=1)  # KL(pi || pi_ref)
reward = np.exp(path) @ true
best = int(reward.argmax())
rows = [(f"step {n}", 0.5 * kl[n], np.exp(path[n]) @ proxy, reward[n]) for n in (0, best, 300, 3000)]
show("4. DPO on a proxy, beta 0.5", ("", "implicit reward", "proxy", "true reward"), rows)
stars = {each: exact.optimum(ref_logp, proxy, each)[0] for each in (10.0, 2.0, 1.0, 0.5)}
rows = [
    (f"beta {each:g}", exact.kl(star, ref_logp), np.exp(star) @ proxy, np.exp(star) @ true)
    for each, star in stars.items()
]
show("4. pi* of the proxy, where its Bradley-Terry labels lead", ("", "KL, nats", "proxy", "true reward"), rows)

# %% [markdown]
# ## 5. Refusals spread
#
# Setup: two replies, refuse and help. The log-odds of refusing prompt x are <theta, phi(x)>. A pair at x, refuse over
# help, has margin = <theta - theta_ref, phi(x)> and moves theta along phi(x). So the log-odds at another prompt x' move
# in proportion to <phi(x), phi(x')>, the number of features that the two prompts share. Our three prompts share 3, 2
# and 1 with the first one. What helps: pairs at harmless prompts, help over refuse.

# %%
features = {  # any prompt, kill, person, process, bread
    "how do I kill a person": [1, 1, 1, 0, 0],
    "how do I kill a process": [1, 1, 0, 1, 0],
    "how do I bake bread": [1, 0, 0, 0, 1],
}
phi = np.array(list(features.values()), dtype=float)  # (3, 5)
start = np.array([-3.0, 0.0, 0.0, 0.0, 0.0])  # the reference seldom refuses


def train(labels, beta=0.5, steps=20, rate=2.0):  # +1 refuse over help, -1 help over refuse, 0 no pair
    theta = start.copy()
    for _ in range(steps):
        z = beta * labels * (phi @ (theta - start))
        theta = theta - rate * (beta * slope(z) * labels) @ phi
    return theta


on_first, on_both = train(np.array([1, 0, 0])), train(np.array([1, -1, 0]))
rows = [(name, *(sigma(row @ theta) for theta in (start, on_first, on_both))) for name, row in zip(features, phi)]
show("5. Probability of a refusal", ("prompt", "reference", "trained on 1st", "on 1st and 2nd"), rows)

# %% [markdown]
# ## The library's version
#
# `no_never_yes.three_words` is failure 1. For the others `losses.dpo_loss` gives the gradients that we used above. The
# probability of a wrong label is its `label_smoothing`. A bonus for each word is a reference whose
# log-probabilities are lower by bonus * |y|/beta.

# %%
for nll_weight, by_hand in ((0.0, plain), (1.0, with_nll)):
    np.testing.assert_allclose(no_never_yes.three_words(nll_weight).path, by_hand, rtol=0, atol=1e-9)


def words_logp(n, theta):
    return n * ops.logsigmoid(theta) + ops.logsigmoid(-theta)


lengths, gain = np.array([10.0, 40.0, 160.0]), 0.05  # nats that every token of y_w gains
out = losses.dpo_loss((gain - 2.0) * lengths, -2.0 * lengths, -2.0 * lengths, -2.0 * lengths, beta)
np.testing.assert_allclose(out.reward_w.data, beta * gain * lengths, rtol=1e-12)

theta, theta_ref = Tensor(np.array([2.0]), requires_grad=True), Tensor(np.log(np.array([p_ref / (1 - p_ref)])))
ref_w, ref_l = (words_logp(n, theta_ref).data - bonus * n / beta for n in (7, 2))
losses.dpo_loss(words_logp(7, theta), words_logp(2, theta), ref_w, ref_l, beta, shorter).loss.backward()
z = beta * more * math.log(sigma(2.0) / p_ref) + bonus * more
np.testing.assert_allclose(theta.grad, [slope(z, shorter) * beta * more * (1 - sigma(2.0))], rtol=1e-12)

for (probability, smoothing), margin in zip(targets.values(), margins):
    as_chosen, _ = losses.dpo_gradient(margin, 0.0, 0.0, 0.0, beta, smoothing)
    _, as_rejected = losses.dpo_gradient(0.0, margin, 0.0, 0.0, beta, smoothing)  # the same reply under a flipped label
    assert abs(probability * as_chosen + (1 - probability) * as_rejected) < 1e-12

leaf = Tensor(path[best], requires_grad=True)
logp = ops.log_softmax(leaf)
losses.dpo_loss(logp[w], logp[l], ref_logp[w], ref_logp[l], 0.5).loss.backward()
np.testing.assert_allclose(leaf.grad, table_gradient(path[best]), rtol=0, atol=1e-12)

leaf = Tensor(start, requires_grad=True)
refuse, comply = (ops.logsigmoid(sign * ops.sum(phi * leaf, axis=-1))[:1] for sign in (1, -1))
losses.dpo_loss(refuse, comply, refuse.data, comply.data, 0.5).loss.backward()
np.testing.assert_allclose(start - 2.0 * leaf.grad, train(np.array([1, 0, 0]), steps=1), rtol=1e-12)

# %% [markdown]
# ## What was shown
#
# The loss asks for a margin on the pairs and for nothing else. Likelihood, length, true reward and other prompts move
# along wherever parameters, sums or labels tie them to it. Each remedy adds something that the pairs do not say.
#
# ## Exercises
#
# 1. Let f(z) = -log sigma(z), and let flip < 1/2. Find a and b such that a f(z) + b f(-z), averaged over labels that
#    are flipped with probability flip, is f(z). What is dangerous about it?
# 2. In the last table bread shares a feature with both trained prompts. Why has training on both not moved its refusal?
#    (Compare the two z.)
# 3. Find the bug: to use a bonus, somebody adds bonus * |y|/beta to the reference's log-probabilities instead of
#    subtracting it. What happens to z, and to the length of replies?
# 4. Predict, then measure: in failure 1, nll_weight is 0.01 instead of 1. After 2,000 steps, is "no" more or less
#    likely than at the reference? And on the way there?

# %%
assert np.all(np.diff(plain[:, 0]) < 0) and np.all(np.diff(plain[:, 0] - plain[:, 1]) > 0)
assert (
    with_nll[-1, 0] > with_nll[0, 0]
    and abs((vectors[0] - vectors.mean(axis=0)) @ (vectors[0] - vectors[1]) - (2 - 7 / 3)) < 1e-12
)
assert words(1000) > words(100) > 5 and abs(words(1000, bonus) - 4) < 1e-9
most = beta * more * math.log(1 / p_ref)
np.testing.assert_allclose([most, sigma(most)], [0.112, 0.528], atol=5e-4)
np.testing.assert_allclose(margins, [13.863, 21.972, 10.460, 5.928], atol=1e-3)
assert np.all(np.diff(loss) < 0) and np.all(np.diff(kl) > 0)
assert 0 < best < 300 and reward[best] > reward[0] + 0.5 and reward[-1] < reward[0]
np.testing.assert_allclose(phi @ (on_first - start) / (phi[2] @ (on_first - start)), [3, 2, 1], rtol=1e-12)
assert sigma(phi[1] @ on_first) > sigma(phi[1] @ start) > sigma(phi[1] @ on_both)
few = np.unique(np.geomspace(1, 3000, 200).astype(int))  # enough steps for a smooth curve
curves = [
    plots.Curve("implicit: beta KL", few, 0.5 * kl[few]),
    plots.Curve("proxy", few, np.exp(path[few]) @ proxy),
    plots.Curve("true", few, reward[few]),
]
picture = pathlib.Path("13_failures.png")
if plots.picture(picture, [plots.Panel("DPO on a proxy", "step", "mean reward", curves, "log")]):
    print(f"\nThe picture of failure 4: {picture.name}")
else:
    print("\nThe picture needs matplotlib (the `plot` extra).")
print("13: likelihood falls, length grows, margins shrink, true reward falls and refusals spread, as derived above.")

# %% [markdown]
# ## Solutions
#
# 1. (1 - flip) a + flip b = 1 and flip a + (1 - flip) b = 0, so a = (1 - flip)/(1 - 2 flip) and b = -flip/(1 - 2 flip)
#    (Chowdhury et al., arXiv 2403.00409). Because b < 0, the loss of a pair that always gets the same label has no
#    lower bound.
# 2. It shares one feature with each. The two pairs stay equally well fitted, so their pushes on that feature cancel.
# 3. z = beta * margin - bonus * more. At the reference z is below 0 and the slope is steeper, so replies grow faster
#    than without any bonus.
# 4. It falls at first, as without the term, because the pair's push is 25 times as large. But sigma(-z) fades as the
#    margin grows, and the likelihood term does not. log pi(no) turns at -3.9, and ends at -0.2, above the reference.

# %%
a, b, z = (1 - flip) / (1 - 2 * flip), -flip / (1 - 2 * flip), np.linspace(-5, 5, 11)


def f(z):
    return -ops.logsigmoid.raw(z)[0]


unflipped, flipped = a * f(z) + b * f(-z), a * f(-z) + b * f(z)
np.testing.assert_allclose((1 - flip) * unflipped + flip * flipped, f(z), rtol=1e-12)
assert a * f(1000.0) + b * f(-1000.0) < -300
np.testing.assert_allclose(phi[2] @ on_both, phi[2] @ start, rtol=1e-12)

assert words(100, -bonus) > words(100)
little = three_words(0.01)[:, 0]  # log pi(no)
assert little.min() < -3.8 and 0 < little.argmin() < 300
np.testing.assert_allclose(little[-1], -0.207, atol=5e-4)
