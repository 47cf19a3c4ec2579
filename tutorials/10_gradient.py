# %% [markdown]
# # 10. The gradient, and what a step does
#
# **Question.** What does the DPO loss ask of a pair, of each logit and of each parameter, and does the policy obey?
#
# **Afterwards you can say**
# - what the gradient of the loss is with respect to log-probabilities, logits and parameters, and how to derive each;
# - what a pair's weight and a logit's push are;
# - why the chosen response can become less likely while the margin grows, and when it does;
# - why both mean rewards of a training log may fall.
#
# **Predict first.** Take one small gradient step on one pair. Can log pi(y_w|x) fall? Can the margin fall?
#
# **The formula.** For B pairs, margin = (logp_w - ref_logp_w) - (logp_l - ref_logp_l) and z = beta * margin:
#
#     L = -(1/B) sum log sigma(z)
#     dL/dlogp_w  = -(beta/B) sigma(-z),   dL/dlogp_l = -dL/dlogp_w
#     dL/dlogits_t = -(c beta/B) sigma(-z) (onehot(y_t) - softmax(logits_t)),   c = +1 chosen, -1 rejected
#
# The row logits_t predicts token y_t. Where one row predicts a token of both responses, the two terms add. The
# pair's weight is sigma(-z).

# %%
import itertools
import pathlib

import numpy as np

from minidpo import Config, Tensor, explain, gradcheck, losses, model, plots, scoring
from minidpo.explain import displacement
from minidpo.theory import no_never_yes

# %% [markdown]
# ## From NumPy alone: the four log-probabilities
#
# The derivation is three factors: d(-log sigma(z))/dz = -sigma(-z), dz/dlogp_w = beta, and the mean divides by B. For
# logp_l the middle factor is -beta.


# %%
def dpo_loss_value(logp_w, logp_l, ref_logp_w, ref_logp_l, beta):
    z = beta * ((logp_w - ref_logp_w) - (logp_l - ref_logp_l))  # (B,)
    return np.logaddexp(0.0, -z).mean()  # -log sigma(z) = log(1 + e^-z)


def numerical_gradient(f, at, eps=1e-6):
    gradient = np.zeros_like(at)
    for i in np.ndindex(at.shape):
        bump = np.zeros_like(at)
        bump[i] = eps
        gradient[i] = (f(at + bump) - f(at - bump)) / (2 * eps)
    return gradient


def sigma(z):
    return 1 / (1 + np.exp(-z))


beta = 0.1
logp_w, logp_l = np.array([-12.0, -10.0, -20.0]), np.array([-14.0, -15.0, -8.0])  # three pairs
ref_logp_w, ref_logp_l = np.array([-12.0, -12.0, -12.0]), np.array([-14.0, -14.0, -14.0])
margin = (logp_w - ref_logp_w) - (logp_l - ref_logp_l)
weight = sigma(-beta * margin)  # the probability that the rewards give to the wrong order
closed_w = -beta / len(margin) * weight
numerical_w = numerical_gradient(lambda lp: dpo_loss_value(lp, logp_l, ref_logp_w, ref_logp_l, beta), logp_w)
numerical_l = numerical_gradient(lambda lp: dpo_loss_value(logp_w, lp, ref_logp_w, ref_logp_l, beta), logp_l)
np.testing.assert_allclose(numerical_w, closed_w, rtol=0, atol=1e-9)
np.testing.assert_allclose(numerical_l, -closed_w, rtol=0, atol=1e-9)

# %% [markdown]
# ## The library's version: the four log-probabilities
#
# In the first pair policy = reference, as at the start of training: its weight is sigma(0) = 1/2, not 0. The second
# pair is ordered more firmly by the policy than by the reference, and weighs less. The third has a negative margin and
# weighs more.
#
#     margin    weight    dL/dlogp_w
#        0.0    0.5000     -0.016667
#        3.0    0.4256     -0.014185
#      -14.0    0.8022     -0.026739

# %%
leaf_w, leaf_l = Tensor(logp_w, requires_grad=True), Tensor(logp_l, requires_grad=True)
losses.dpo_loss(leaf_w, leaf_l, ref_logp_w, ref_logp_l, beta).loss.backward()
library_w, library_l = losses.dpo_gradient(logp_w, logp_l, ref_logp_w, ref_logp_l, beta)
for gradient in (leaf_w.grad, library_w, -leaf_l.grad, -library_l):
    np.testing.assert_allclose(gradient, closed_w, rtol=1e-12, atol=0)
print("dL/dlogp_w of three pairs, beta 0.1")
print(f"{'margin':>8}{'weight':>9}{'closed form':>14}{'autograd':>14}{'numerical':>14}")
for row in zip(margin, weight, closed_w, leaf_w.grad, numerical_w):
    print("{:8.1f}{:9.4f}{:14.8f}{:14.8f}{:14.8f}".format(*row))
assert [f"{a:.4f} {b:.6f}" for a, b in zip(weight, leaf_w.grad)] == [
    "0.5000 -0.016667",
    "0.4256 -0.014185",
    "0.8022 -0.026739",
]

# %% [markdown]
# ## From NumPy alone: the logits
#
# log pi(y_t) = logits_t[y_t] - logsumexp(logits_t), so its gradient with respect to that row is
# onehot(y_t) - softmax(logits_t). Below, chosen and rejected begin with the same token 1, then part. A row of logits
# belongs to a context, so rows 0 and 1 predict a token of each response; each later row belongs to one response only.

# %%
w, l = [1, 2, 0], [1, 3, 3, 0]
rows_w, rows_l = [0, 1, 2], [0, 1, 3, 4]  # which row predicts each token
ref_w, ref_l, V = -4.0, -6.5, 4
logits = np.random.default_rng(0).normal(size=(5, V))


def log_softmax(s):
    return s - np.log(np.exp(s).sum(axis=-1, keepdims=True))


def response_logps(s):
    logp = log_softmax(s)
    return logp[rows_w, w].sum(), logp[rows_l, l].sum()


def logits_gradient(s):
    (lp_w, lp_l), softmax = response_logps(s), np.exp(log_softmax(s))
    weight = sigma(-beta * ((lp_w - ref_w) - (lp_l - ref_l)))
    gradient = np.zeros_like(s)
    for c, rows, y in ((+1, rows_w, w), (-1, rows_l, l)):
        for row, token in zip(rows, y):
            gradient[row] -= c * beta * weight * (np.eye(V)[token] - softmax[row])  # B = 1
    return gradient


closed = logits_gradient(logits)  # (5, V)
numerical = numerical_gradient(lambda s: dpo_loss_value(*response_logps(s), ref_w, ref_l, beta), logits)
np.testing.assert_allclose(numerical, closed, rtol=0, atol=1e-9)
np.testing.assert_allclose(closed.sum(axis=1), 0, atol=1e-15)  # a push up is paid by the row's other tokens
assert np.abs(closed[0]).max() < 1e-15  # the same token in both: no push
assert np.abs(closed[1, [0, 1]]).max() < 1e-15  # where they part the softmax cancels: two tokens are pushed

# %% [markdown]
# ## The library's version: logits, then parameters
#
# The push on a logit is -dL/dlogits: the direction of a step down the gradient. The library's `explain` computes it for
# a transformer. For the parameters there is no new formula, only the chain rule, which can start from the
# log-probabilities or from the logits. `four_ways` puts these two beside autograd and the central difference. Of each
# parameter array it shows the entry with the largest gradient.

# %%
leaf = Tensor(logits, requires_grad=True)
of_w, of_l = explain.sums(explain.context_logprobs(leaf, ([0], w, l)))
losses.dpo_loss(of_w, of_l, np.array([ref_w]), np.array([ref_l]), beta).loss.backward()
np.testing.assert_allclose(leaf.grad, closed, rtol=0, atol=1e-15)

config = Config(vocab_size=5, n_positions=8, n_embd=4, n_layer=1, n_head=2)
rng = np.random.default_rng(0)
policy = model.init(config, rng, dtype="float64")
reference = model.frozen(policy)
for parameter in policy.values():
    parameter.data = parameter.data + 0.5 * rng.normal(size=parameter.shape)  # a policy that has moved away
x, w, l = [0, 1], [1, 2, 0], [1, 3, 3, 0]
view = explain.pair(policy, reference, config, x, w, l, beta)
ways = explain.four_ways(policy, config, view)
print("\none pair, one transformer: two formulas, autograd, numerical (a dash: not reached from the logits;")
print("chosen token 1, #2: the logit of token 2, which is the chosen response's token number 1, from 0)")
print(f"{'d loss / d':<28}{'by logps':>12}{'by logits':>12}{'autograd':>12}{'numerical':>12}")
for row in [*ways[:2], *ways[4:7], *ways[-4:-1]]:
    cells = [f"{'-':>12}" if way is None else f"{way:12.7f}" for way in row[1:]]
    print(f"{row.name:<28}" + "".join(cells))
exact_error, numerical_error = explain.largest_differences(ways)
refs = np.array([view.ref_logp_w]), np.array([view.ref_logp_l])


def loss_of_params(params):
    return losses.dpo_loss(*scoring.shared_logprobs(params, config, [(x, w, l)]), *refs, beta).loss


worst = gradcheck.check_gradient(loss_of_params, policy, np.random.default_rng(1))
print(f"all {len(ways)} rows: the exact ways differ by less than 1e-12: {exact_error < 1e-12};", end=" ")
print(f"20 random directions agree to 1e-6: {worst < 1e-6}")

# %% [markdown]
# ## From NumPy alone: what a step does to the two log-probabilities
#
# Let grad_a be the gradient of log pi(y_a|x) with respect to all parameters theta, and K_ab = <grad_a, grad_b>. A step
# of size rate against the gradient of the loss moves theta along grad_w - grad_l. To first order, a log-probability
# changes by the inner product of its own gradient with that move:
#
#     theta <- theta + rate beta sigma(-z) (grad_w - grad_l)
#     change of log pi(y_w|x) = rate beta sigma(-z) (K_ww - K_wl)             + O(rate^2)
#     change of log pi(y_l|x) = rate beta sigma(-z) (K_wl - K_ll)             + O(rate^2)
#     change of the margin    = rate beta sigma(-z) (K_ww - 2 K_wl + K_ll)    + O(rate^2)
#
# A small model shows it: three words with fixed vectors, log pi = log_softmax(vectors @ theta), and one pair, "no"
# preferred to "never". Then grad_a = vector_a - (mean vector under pi).

# %%
words, vectors = ("no", "never", "yes"), np.array([[1.0, 1.0], [0.0, 0.0], [5.0, 0.0]])
theta, rate, half = np.zeros(2), 1e-3, 0.5  # policy = reference: z = 0, sigma(-z) = 1/2
before = log_softmax(vectors @ theta)
grad = vectors - np.exp(before) @ vectors  # (3, 2), one row per word
K = grad @ grad.T  # (3, 3)
predicted = rate * beta * half * (K[:, 0] - K[:, 1])  # the change of each word's log pi
change = log_softmax(vectors @ (theta + rate * beta * half * (grad[0] - grad[1]))) - before
np.testing.assert_allclose(change, predicted, rtol=1e-3, atol=0)
print(f"\none step on 'no' over 'never': K_ww {K[0, 0]:.3f} < K_wl {K[0, 1]:.3f}")
print(f"{'word':<8}{'predicted change':>20}{'measured':>14}")
for row in zip(words, predicted, change):
    print("{:<8}{:+20.3e}{:+14.3e}".format(*row))

# %% [markdown]
# ## The answer to the prediction
#
# Yes, log pi(y_w|x) can fall: for small enough steps it falls where K_wl > K_ww, and rises where K_wl < K_ww. Here it
# falls, "never" falls further, and the probability goes to "yes", a word that the pair does not mention. To first order
# the margin cannot fall, because K_ww - 2 K_wl + K_ll = |grad_w - grad_l|^2.
#
#     word     change of log pi
#     no             -1.667e-05
#     never          -1.167e-04
#     yes            +1.333e-04
#
# The picture shows why. grad_no - grad_never is vector_no - vector_never, since the mean cancels. So theta moves along
# the arrow from "never" to "no", and to first order
#
#     change of log pi(a) = rate beta sigma(-z) <vector_a - mean vector, vector_no - vector_never>
#
# A word in front of the dashed line, which runs through the mean vector at a right angle to the arrow, becomes
# likelier. A word behind it becomes less likely. "yes" pulls the mean so far forward that "no" is behind the line.

# %%
np.testing.assert_allclose(no_never_yes.slope(0.0, beta), beta * half * (K[0, 0] - K[0, 1]), rtol=1e-12)
assert change[1] < change[0] < 0 < change[2]
assert [f"{each:+.3e}" for each in change] == ["-1.667e-05", "-1.167e-04", "+1.333e-04"]
mean = np.exp(before) @ vectors  # (2,)
np.testing.assert_allclose(predicted, rate * beta * half * (vectors - mean) @ (vectors[0] - vectors[1]), rtol=1e-12)


def draw(path):
    with plots.figure(path, (6.4, 3.2), {"axes.grid": False, "font.size": 15, "text.color": "black"}) as figure:
        axes = figure.subplots()
        step, height = vectors[0] - vectors[1], np.array([-1.2, 2.1])
        line = mean[0] - (height - mean[1]) * step[1] / step[0]  # through the mean, at a right angle to the step
        axes.plot(line, height, "--", color=plots.INK)
        axes.fill_betweenx(height, -2, line, color="0.92")
        axes.quiver(*vectors[1], *step, angles="xy", scale_units="xy", scale=1, width=0.012, color="black", zorder=3)
        axes.plot(*mean, "x", color="black", markersize=10, markeredgewidth=2)
        axes.text(mean[0] + 0.2, mean[1], "mean", va="center")
        for vector, mark, color in zip(vectors, "osD", plots.PALETTE):
            axes.plot(*vector, mark, color=color, markersize=13, zorder=4)
        axes.text(0.7, 1.1, '"no", chosen', color=plots.PALETTE[0], ha="right", va="center")
        axes.text(0, -0.3, '"never", rejected', color=plots.PALETTE[1], ha="center", va="top")
        axes.text(5, -0.3, '"yes"', color=plots.PALETTE[2], ha="center", va="top")
        axes.text(-1.8, 1.85, "less likely", weight="bold", va="center")
        axes.text(5, 1.85, "likelier", weight="bold", ha="center", va="center")
        axes.set(title='A step on "no" over "never" helps "yes"', aspect="equal", xlim=(-2, 6), ylim=height)
        axes.set_axis_off()


picture = pathlib.Path("10_gradient.png")
if plots.installed():
    draw(picture)
print(f"\npicture: {picture.name}" if plots.installed() else "\nthe picture needs matplotlib (the `plot` extra)")

# %% [markdown]
# A transformer obeys the same rule. `displacement.step` predicts the change, takes the step on a copy, and measures.
# Below are two responses, labelled one way and then the other. With the first label both rise, with the second both
# fall.

# %%
steps = []
print("\na transformer, one step on one pair: the change of logp_w, predicted and measured, and of logp_l, measured")
print(f"{'chosen':<14}{'rejected':<14}{'K_ww':>8}{'K_wl':>8}{'predicted':>12}{'logp_w':>12}{'logp_l':>12}")
for w, l in (([1, 3, 3, 0], [2, 3, 0]), ([2, 3, 0], [1, 3, 3, 0])):
    step = displacement.step(policy, config, explain.pair(policy, reference, config, x, w, l, beta))
    steps.append(step)
    print(f"{w!s:<14}{l!s:<14}{step.K_ww:8.2f}{step.K_wl:8.2f}", end="")
    print(f"{step.chosen.predicted:+12.2e}{step.chosen.measured:+12.2e}{step.rejected.measured:+12.2e}")

# %% [markdown]
# ## Why both mean rewards may fall
#
# Training logs often show rewards/chosen and rewards/rejected both below 0 and falling, while rewards/margins, the mean
# of z, grows. There are two reasons. The first explains why logp_w of one pair may fall, the second why the mean falls
# later, even where no single step on one pair lowers it.
#
# **Shared parameters.** Where K_wl > K_ww, the first step already lowers logp_w, as above.
#
# **One sum of probabilities.** A policy cannot make every response more likely. Say that both responses of each pair
# were drawn from the reference. Then a response picked from either side of a pair is a draw from the reference, too:
#
#     (mean reward_w + mean reward_l)/2 = E_ref[beta log(pi/pi_ref)]               definition of the reward
#                                       = -beta sum_y pi_ref log(pi_ref/pi)        algebra
#                                       = -beta KL(pi_ref || pi) <= 0              definition; Gibbs' inequality (08)
#     mean reward_w - mean reward_l     = mean z                                   definition of z
#     mean reward_w = mean z/2 - beta KL(pi_ref || pi)                             from the two lines
#     mean reward_l = -mean z/2 - beta KL(pi_ref || pi)
#
# So once the policy has moved, the average of the two is negative. A small move that is twice as large doubles mean z
# and makes the KL four times as large. So mean reward_w first rises, if the pairs are draws from the reference. It
# falls where beta KL grows faster than mean z/2.
#
# To see the second reason alone, take a free logit for each response. There K_ww - K_wl = 1 - pi(w) + pi(l), which is
# positive, so no step on a single pair lowers logp_w to first order. And yet, with certain labels, the fall must come:
# pi ends on the best response, log pi of each other one falls without end, and most chosen responses are not the best.
# Both means end below 0:
#
#       step   mean reward_w   mean reward_l   their average = -beta KL
#         10          0.0093         -0.0828                    -0.0368
#        100         -0.3408         -0.9925                    -0.6667
#       1000         -1.4880         -3.5873                    -2.5377
#      10000         -4.6341         -9.1091                    -6.8716

# %%
ref_logp = np.log([0.05, 0.20, 0.30, 0.25, 0.15, 0.05])  # six responses, from the worst to the best
pi_ref = np.exp(ref_logp)
better = np.tril(np.ones((6, 6)), -1)  # i is preferred to j if i > j: every time
pairs = 2 * np.outer(pi_ref, pi_ref) * better + np.diag(pi_ref**2)  # how often (w, l) is (i, j); equal draws, too
np.testing.assert_allclose(pairs.sum(), 1, rtol=1e-12)
np.testing.assert_allclose(pairs.sum(axis=1) + pairs.sum(axis=0), 2 * pi_ref, rtol=1e-12)  # either side: the reference

logits, path = ref_logp.copy(), []
shown = (0, 10, 100, 1000, 10_000)
print("\nsix responses, pairs drawn from the reference, certain labels, beta 0.1")
print(f"{'step':>6}{'mean reward_w':>15}{'mean reward_l':>15}{'their average':>15}{'-beta KL':>11}")
for step in range(shown[-1] + 1):
    log_ratio = log_softmax(logits) - ref_logp
    if step in shown:
        mean_w, mean_l = pairs.sum(axis=1) @ (beta * log_ratio), pairs.sum(axis=0) @ (beta * log_ratio)
        divergence = (pi_ref * -log_ratio).sum()  # KL(pi_ref || pi)
        path.append((mean_w, mean_l))
        print(f"{step:>6}{mean_w:15.4f}{mean_l:15.4f}{(mean_w + mean_l) / 2:15.4f}{-beta * divergence:z11.4f}")
        np.testing.assert_allclose((mean_w + mean_l) / 2, -beta * divergence, rtol=1e-9, atol=1e-12)
    pull = pairs * sigma(-beta * (log_ratio[:, None] - log_ratio[None, :]))
    logits = logits + 10 * beta * (pull.sum(axis=1) - pull.sum(axis=0))
assert pairs.sum(axis=1)[-1] < 0.1  # the share of chosen responses that are the best one
assert path[1][0] > 0 > path[-1][0] and path[-1][0] < path[-2][0]  # the chosen ones: up, then down
assert all(after[1] < before[1] for before, after in itertools.pairwise(path))
assert [f"{mean_w:.4f} {mean_l:.4f} {(mean_w + mean_l) / 2:.4f}" for mean_w, mean_l in path[1:]] == [
    "0.0093 -0.0828 -0.0368",
    "-0.3408 -0.9925 -0.6667",
    "-1.4880 -3.5873 -2.5377",
    "-4.6341 -9.1091 -6.8716",
]
free = np.eye(6) - pi_ref  # the gradients of log pi with respect to the logits: onehot - pi
K_free = free @ free.T
np.testing.assert_allclose(np.diag(K_free)[:, None] - K_free, 1 - pi_ref[:, None] + pi_ref - np.eye(6), atol=1e-12)

# %% [markdown]
# ## What was shown
#
# Formula, autograd and finite differences give one gradient: for log-probabilities, logits and parameters. The loss
# pushes logp_w up and logp_l down. But the two share parameters, so the sign of K_ww - K_wl decides where logp_w goes.
#
# ## Exercises
#
# 1. Derive dL/dbeta. Which pairs make it larger? Is it positive for the three pairs above?
# 2. Find the bug: someone writes sigma(z) for the weight, tests the gradient at policy = reference, and it passes. Why,
#    and which of the three pairs show the bug?
# 3. Predict, then measure: exchange the labels of the three words, so that "never" is preferred to "no". Compute the
#    new K_ww and K_wl from the table of vectors. What happens to each word in one step?

# %%
rise, fall = steps
for step in steps:  # the sign is that of K_ww - K_wl, and the margin grows
    np.testing.assert_allclose(step.chosen.measured, step.chosen.predicted, rtol=1e-3, atol=1e-11)
    assert (step.chosen.measured > 0) == (step.K_ww > step.K_wl)
    assert step.chosen.measured > step.rejected.measured
assert rise.rejected.measured > 0 > fall.chosen.measured
assert exact_error < 1e-12 and numerical_error < 1e-6 and worst < 1e-6
print("10: formula, autograd and finite differences agree for log-probs, logits and parameters; where K_wl > K_ww")
print("    a step made the chosen response less likely, and the margin grew all the same.")

# %% [markdown]
# ## Solutions
#
# 1. dz/dbeta = margin, so dL/dbeta = -(1/B) sum sigma(-z) margin. A pair contributes a positive term if its margin is
#    negative: scaling up a wrong answer costs. Here the third pair outweighs the second.
# 2. At z = 0 both are 1/2. Any margin other than 0 shows it: the second pair and the third.
# 3. The mean vector is (2, 1/3), so grad_w = (-2, -1/3) and grad_l = (-1, 2/3). K_ww = 37/9, K_wl = 16/9 and
#    K_ll = 13/9. "never" rises, since K_ww > K_wl; "no" rises too, but less, since K_wl > K_ll. "yes" pays for both.

# %%
of_beta = numerical_gradient(lambda at: dpo_loss_value(logp_w, logp_l, ref_logp_w, ref_logp_l, at), np.array(beta))
np.testing.assert_allclose(of_beta, -(weight * margin).mean(), rtol=1e-6)
assert of_beta > 0

wrong_w = -beta / len(margin) * sigma(beta * margin)
assert list(np.isclose(wrong_w, numerical_w, rtol=0, atol=1e-6)) == [True, False, False]

np.testing.assert_allclose([K[1, 1], K[0, 1], K[0, 0]], [37 / 9, 16 / 9, 13 / 9], rtol=1e-12)
exchanged = log_softmax(vectors @ (theta + rate * beta * half * (grad[1] - grad[0]))) - before
assert exchanged[1] > exchanged[0] > 0 > exchanged[2]
