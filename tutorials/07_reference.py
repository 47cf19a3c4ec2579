# %% [markdown]
# # 07. The reference model
#
# **Question.** What does the reference model change in the gradient of a preference pair, and what does it leave alone?
#
# **Afterwards you can say**
# - what the loss compares: how far each log-probability has moved away from the reference's, not its value
# - that the reference sets a pair's weight sigma(-beta * margin), and never the direction of the pair's gradient
# - why at the start the loss is log 2, the accuracy is 0 and the gradient is not 0
#
# **Predict first.** A policy gives a pair logp_w = -4 and logp_l = -5, and beta is 0.1. The reference "start" gives the
# same two values. The reference "disagrees" gives -20 and -3. Take the gradient of the pair's loss with respect to the
# policy's parameters. Under which reference is it longer, and how many times longer? Do the two gradients point in
# different directions?
#
# **The formula.**
#
#     margin = (logp_w - ref_logp_w) - (logp_l - ref_logp_l),   z = beta * margin,   L = -log sigma(z)
#     dL/dtheta = -beta sigma(-z) (dlogp_w/dtheta - dlogp_l/dtheta)
#
# theta is all parameters of the policy. The second line is the chain rule: dL/dz = -sigma(-z), and dz/dtheta = beta
# (dlogp_w/dtheta - dlogp_l/dtheta), since ref_logp_w and ref_logp_l do not depend on theta. So the reference enters the
# gradient only through z, and z occurs only in sigma(-z).

# %%
import math
import pathlib

import numpy as np

from minidpo import Config, Tensor, losses, model, ops, optim, plots, preferences, scoring, training

beta = 0.1
rng = np.random.default_rng(0)

# %% [markdown]
# ## From NumPy alone
# A policy of two layers chooses among five replies: logits = W_out tanh(W_in features), where three numbers, the
# features, describe the prompt. It has 32 parameters, and we write the gradient by hand. Both log-probabilities come
# from one row of logits, so the normaliser cancels: logp_w - logp_l = logits_w - logits_l. Hence dL/dlogits = -beta
# sigma(-z) (onehot(w) - onehot(l)), where onehot(w) is 1 at w and 0 elsewhere.
#
# A reference enters as two numbers. Under "disagrees", ref_logp_w is 16 below logp_w, and ref_logp_l is 2 above logp_l.
# Under a third, "agrees", only ref_logp_l differs: it is 18 below.

# %%
features, W_in, W_out = rng.normal(size=3), rng.normal(size=(4, 3)), 3 * rng.normal(size=(5, 4))
w, l = 0, 4


def reply_logprobs(W_in, W_out):
    logits = W_out @ np.tanh(W_in @ features)  # (3,) -> (4,) -> (5,)
    return logits - np.log(np.exp(logits).sum())


def loss_and_gradient(W_in, W_out, ref_logp_w, ref_logp_l):
    logp, hidden = reply_logprobs(W_in, W_out), np.tanh(W_in @ features)
    z = beta * ((logp[w] - ref_logp_w) - (logp[l] - ref_logp_l))
    dlogits = -beta / (1 + math.exp(z)) * (np.eye(5)[w] - np.eye(5)[l])  # since sigma(-z) = 1/(1 + exp(z))
    dW_in, dW_out = np.outer((W_out.T @ dlogits) * (1 - hidden**2), features), np.outer(dlogits, hidden)
    return math.log1p(math.exp(-z)), np.concatenate([dW_in.ravel(), dW_out.ravel()])  # -log sigma(z) = log(1 + exp(-z))


logp, lengths, units, table = reply_logprobs(W_in, W_out), [], [], []
print("One pair under three references (NumPy)")
print("reference               margin  weight    loss  length of gradient   cosine to start's")
names = ["start", "disagrees", "agrees"]
for name, up_w, up_l in zip(names, (0, -16, 0), (0, 2, -18)):
    ref = (logp[w] + up_w, logp[l] + up_l)
    assert np.exp(ref).sum() < 1
    loss, gradient = loss_and_gradient(W_in, W_out, *ref)
    u_in, u_out, eps = rng.normal(size=W_in.shape), rng.normal(size=W_out.shape), 1e-5  # a random direction
    ends = [loss_and_gradient(W_in + shift * u_in, W_out + shift * u_out, *ref)[0] for shift in (eps, -eps)]
    along = gradient @ np.concatenate([u_in.ravel(), u_out.ravel()])
    np.testing.assert_allclose(along, (ends[0] - ends[1]) / (2 * eps), rtol=1e-6, atol=1e-9)
    lengths.append(np.linalg.norm(gradient))
    units.append(gradient / lengths[-1])
    np.testing.assert_allclose(units[-1], units[0], rtol=0, atol=1e-14)
    margin = up_l - up_w
    weight = 1 / (1 + math.exp(beta * margin))
    table.append(f"{margin:7.1f} {weight:7.4f} {loss:7.4f} {lengths[-1] / lengths[0]:9.4f}")
    print(f"{name + f', {up_w:+d} and {up_l:+d}':<22} {table[-1]} {units[-1] @ units[0]:20.4f}")

# %% [markdown]
# ## The answer to the prediction
# The margin is 0 under "start" and (-4 + 20) - (-5 + 3) = 18 under "disagrees", so the weights are sigma(0) = 0.5 and
# sigma(-1.8) = 0.1419. The gradient under "start" is 3.52 times as long, and both point the same way. "agrees" favours
# the chosen reply by 18 nats more than the policy does, so there the pair weighs most:
#
#     reference               margin   weight     loss   length of the gradient
#     start, +0 and +0           0.0   0.5000   0.6931   1.0000
#     disagrees, -16 and +2     18.0   0.1419   0.1530   0.2837
#     agrees, +0 and -18       -18.0   0.8581   1.9530   1.7163
#
# In the picture, an arrow is the step down the gradient, in two of the 32 parameters; the dashes extend it. Only the
# lengths differ.

# %%
np.testing.assert_allclose([1 / (1 + math.exp(1.8)), lengths[0] / lengths[1]], [0.14185, 3.5248], rtol=1e-4)
assert [row.split() for row in table] == [
    ["0.0", "0.5000", "0.6931", "1.0000"],
    ["18.0", "0.1419", "0.1530", "0.2837"],
    ["-18.0", "0.8581", "1.9530", "1.7163"],
]


def draw(path):
    with plots.figure(path, (6.4, 3.6), {"font.size": 15, "text.color": "black"}) as figure:
        axes = figure.subplots()
        for i, name in enumerate(names):
            step, start, color = -units[i][[31, 12]], np.array([0, -0.5 * i]), plots.PALETTE[i]  # two of W_out
            step = step / np.linalg.norm(step)
            axes.plot(*zip(start, start + 2 * step), "--", color=plots.INK, linewidth=1)
            style = {"arrowstyle": "-|>", "linewidth": 3, "mutation_scale": 16, "shrinkA": 0, "shrinkB": 0}
            axes.annotate("", start + lengths[i] / lengths[0] * step, start, arrowprops={"color": color, **style})
            margin, weight = map(float, table[i].split()[:2])
            text = f"{name}\nmargin {margin:g}, weight {weight:.2f}"
            axes.text(*(start + 2.05 * step), text, color=color, va="center")
        axes.set(title="Three references, one direction", aspect="equal", xlim=(0, 3.7), ylim=(-1.1, 1))
        axes.set_axis_off()


path = pathlib.Path("07_reference.png")
if plots.installed():
    draw(path)
print(f"\npicture: {path.name}" if plots.installed() else "\nthe picture needs matplotlib (the `plot` extra)")

# %% [markdown]
# ## The library's version
# `model.frozen` copies the parameters as constants. They build no graph, and no optimizer moves them.

# %%
config = Config(vocab_size=7, n_positions=12, n_embd=16, n_layer=2, n_head=2)


def random_transformer():
    params = model.init(config, rng, dtype="float64")
    for parameter in params.values():
        parameter.data = parameter.data + 0.3 * rng.normal(size=parameter.shape)
    return params


policy = random_transformer()
reference = model.frozen(policy)
pairs = [([0, 1, 2], [3, 4, 0], [3, 5, 5, 0]), ([0, 2], [6, 0], [1, 4, 0])]  # prompt, chosen, rejected; 0 ends a text


def pair_logprobs(params, pair):
    x, y_w, y_l = pair
    return [scoring.sequence_logprob(params, config, [x], [y]) for y in (y_w, y_l)]  # logp_w, logp_l: (1,) each


def gradients(output):
    for parameter in policy.values():
        parameter.grad = None
    output.backward()
    return {name: parameter.grad for name, parameter in policy.items()}


assert not pair_logprobs(reference, pairs[0])[0].requires_grad  # a constant
difference = pair_logprobs(policy, pairs[0])
direction = gradients(difference[0] - difference[1])  # no reference in it
print("\nOne pair under three references (a transformer of 2 layers)")
print("reference                margin    loss  weight  gradient = -beta weight (dlogp_w - dlogp_l), arrays")
others = reference, random_transformer(), random_transformer()
for name, other in zip(("its frozen copy", "another transformer", "a third"), others):
    out = losses.dpo_loss(*pair_logprobs(policy, pairs[0]), *pair_logprobs(other, pairs[0]), beta=beta)
    whole, margin = gradients(out.loss), out.margin.item()
    weight = 1 / (1 + math.exp(beta * margin))
    for key in policy:
        expected = -beta * weight * direction[key]
        np.testing.assert_allclose(whole[key], expected, rtol=0, atol=1e-12 * abs(expected).max())
    print(f"{name:<20} {margin:10.3f} {out.loss.item():7.4f} {weight:7.4f}", end="")
    print(f"  to 12 digits in {len(whole)} of {len(policy)}")

# %% [markdown]
# The gradient of a *batch* is a mean over pairs. It can turn: each pair keeps its direction, but the weights change by
# different factors. If another reference makes the margins of our two pairs -20 and 20 instead of 0 and 0, they weigh
# 0.88 and 0.12 instead of 1/2, and the gradient turns by 26 degrees. (The angle depends on the pairs.)


# %%
def turn(some, other):
    """In degrees."""
    return math.degrees(math.acos(some @ other / (np.linalg.norm(some) * np.linalg.norm(other))))


directions = []  # as vectors
for pair in pairs:
    logp_w, logp_l = pair_logprobs(policy, pair)
    directions.append(np.concatenate([array.ravel() for array in gradients(ops.sub(logp_w, logp_l)).values()]))
weights = [1 / (1 + np.exp(beta * np.array(margins))) for margins in ((0, 0), (-20, 20))]
even, uneven = (a * directions[0] + b * directions[1] for a, b in weights)  # up to the factor -beta/2
assert [f"{weight:.2f}" for weight in weights[1]] == ["0.88", "0.12"]
assert f"{turn(even, uneven):.0f}" == "26"

# %% [markdown]
# ## At the start
# DPO starts with policy = reference. Every margin is 0, so the loss is -log sigma(0) = log 2 and the weight is 1/2. The
# gradient is -(beta/2) (dlogp_w/dtheta - dlogp_l/dtheta). Both rewards are 0: a tie. The accuracy is the share of pairs
# with reward_w > reward_l. A tie does not count, so the accuracy is 0; `rewards/ties`, the share of ties, is 1.
# `rewards/margins` is the mean of reward_w - reward_l, which is z: beta times what we call the margin.

# %%
batch = preferences.collate(pairs, *training.reference_logprobs(reference, config, pairs))
optimizer = optim.SGD(policy, learning_rate=0.1)
start = training.preference_evaluation(policy, config, batch, beta)
before = {name: parameter.data.copy() for name, parameter in reference.items()}
first_step = training.dpo_training_step(policy, reference, config, optimizer, batch, beta)
later = training.preference_evaluation(policy, config, batch, beta)
print("\nTwo pairs, before and after one step of training")
for name in ("loss", "rewards/accuracies", "rewards/ties", "rewards/margins"):
    print(f"{name:<20} {start[name]:8.4f} {later[name]:8.4f}")
assert start["rewards/ties"] == 1 and start["rewards/accuracies"] == 0
assert later["rewards/ties"] == 0 and later["rewards/accuracies"] == 1 and later["loss"] < start["loss"]
assert first_step["grad_norm"] > 0.01
assert all(np.array_equal(reference[name].data, before[name]) for name in before)

# %% [markdown]
# ## What the loss cannot see
# Add the same shift to both of the policy's log-probabilities. The margin stays the same, and so does the loss: 0.5544
# in the example below. So the reference does not keep both from falling together. (Tutorial 00's price for moving away
# is on the KL of all responses, not on a pair.) Without a reference the loss, there 0.4741, has the same blind spot.

# %%
print("\nBoth log-probabilities shifted, from -10 and -15, against -12 and -14")
for shift in (-8.0, 0.0, 8.0):
    with_reference = losses.dpo_loss(-10.0 + shift, -15.0 + shift, -12.0, -14.0, beta).loss.item()
    without = losses.reference_free_loss(-10.0 + shift, -15.0 + shift, beta).loss.item()
    print(f"shift {shift:4.0f}   loss {with_reference:.4f}   without a reference {without:.4f}")
    np.testing.assert_allclose([with_reference, without], [0.5544, 0.4741], rtol=0, atol=5e-5)

# %% [markdown]
# ## What was shown
# The reference enters the gradient of one pair as one number, sigma(-z). The further the policy has moved towards the
# label, compared with the reference, the less the pair weighs. The further against the label, the more. The weight
# stays below 1, so the gradient is shorter than the vector beta (dlogp_w/dtheta - dlogp_l/dtheta). Its direction is the
# policy's alone. Only the gradient of a batch can turn.
#
# ## Exercises
# 1. Find the bug: somebody writes `reference = policy` instead of `model.frozen(policy)` and computes all four
#    log-probabilities with a graph. What are the loss and the gradient, at every step? And what if the reference's
#    log-probabilities are recomputed from the current policy at every step, but as constants?
# 2. Predict, then measure: how far can the batch's gradient turn from where it is at equal weights, whatever the
#    reference? Can it turn round?
# 3. By hand: a transformer whose parameters are all 0 gives each of the 7 tokens the probability 1/7. Somebody takes it
#    as the reference and says: "It knows nothing, so this is DPO without a reference." By how many nats does each
#    pair's margin differ from logp_w - logp_l? Which kind of pair weighs more for it?

# %%
np.testing.assert_allclose([start["loss"], start["rewards/margins"]], [math.log(2), 0], rtol=1e-12, atol=1e-12)
print("\n07: the reference changes a pair's weight, sigma(-z), never the direction of its gradient.")

# %% [markdown]
# ## Solutions
# 1. The margin is 0 whatever the parameters are: the loss stays log 2 and its gradient is 0. With constants the
#    reported loss is log 2 as well, but at every step the gradient is that of a first step: the weight stays 1/2, and
#    nothing slows the policy down.
# 2. Weights are positive, so the batch's gradient stays between those of its pairs. It can turn by nearly 30 degrees
#    towards the first or 68 towards the second, if the other weighs nearly nothing, but never round.
# 3. log pi_ref(y|x) is -log 7 for each token of y, end-of-text included. So the margin is logp_w - logp_l plus log 7
#    for each token that the chosen response has more than the rejected one. In both pairs that is -1 token: -1.95 nats.
#    A pair whose chosen response has fewer tokens weighs more. A reference that knows no words still finds long
#    responses unlikely.

# %%
out = losses.dpo_loss(*pair_logprobs(policy, pairs[0]), *pair_logprobs(policy, pairs[0]), beta=beta)
of_loss = gradients(out.loss)
np.testing.assert_allclose(out.loss.item(), math.log(2), rtol=1e-12)
assert max(abs(array).max() for array in of_loss.values()) < 1e-12
logps = pair_logprobs(policy, pairs[0])
of_loss = gradients(losses.dpo_loss(*logps, *[logp.detach() for logp in logps], beta=beta).loss)
at_start = gradients(ops.sub(*pair_logprobs(policy, pairs[0])))
assert all(np.allclose(of_loss[name], -beta / 2 * at_start[name], rtol=1e-12, atol=1e-14) for name in policy)

angles = [turn(even, direction) for direction in directions]
assert [f"{angle:.0f}" for angle in angles] == ["30", "68"]
np.testing.assert_allclose(sum(angles), turn(*directions), rtol=1e-9)  # so it lies between

all_zero = {name: Tensor(np.zeros(parameter.shape)) for name, parameter in policy.items()}
for pair in pairs:
    (logp_w, logp_l), (ref_logp_w, ref_logp_l) = pair_logprobs(policy, pair), pair_logprobs(all_zero, pair)
    margin = losses.dpo_loss(logp_w, logp_l, ref_logp_w, ref_logp_l, beta=beta).margin.item()
    extra = margin - (logp_w - logp_l).item()
    np.testing.assert_allclose(extra, (len(pair[1]) - len(pair[2])) * math.log(7), rtol=1e-9)
    assert f"{extra:.2f}" == "-1.95"
