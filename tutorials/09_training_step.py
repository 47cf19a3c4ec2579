# %% [markdown]
# # 09. The DPO training step
#
# **Question.** What does one training step on a preference pair compute, number by number?
#
# **Afterwards you can say**
# - how to get margin, rewards, loss and both gradients from four log-probabilities, on paper
# - what `dpo_training_step` does (score, loss, sweep, step), and that its metrics are from before the step
# - how the push on a response spreads over its tokens, and why tokens that both responses begin with get no push
#
# **Predict first.** DPO training begins with a policy and, as its reference, a frozen copy of that policy. Which loss
# and which rewards does the first step report, and does the first step move the policy?
#
# **The formula.** logp_w = sum_t log pi(y_w,t | x, y_w,<t): a sum over the tokens of the response, not a mean.
#
#     margin   = (logp_w - ref_logp_w) - (logp_l - ref_logp_l)         before beta
#     reward_w = beta (logp_w - ref_logp_w),   reward_l likewise,   z = beta * margin = reward_w - reward_l
#     L        = -log sigma(z),   dL/dlogp_w = -beta sigma(-z),   dL/dlogp_l = +beta sigma(-z)

# %%
import math
import pathlib

import numpy as np

from minidpo import Config, Tensor, explain, losses, model, optim, plots, preferences, scoring, training
from minidpo.tokenizer import END_OF_TEXT, Tokenizer

# %% [markdown]
# ## From NumPy alone
# The worked example: the policy gives the chosen response -10 and the rejected one -15; the reference gives -12
# and -14.
#
#     reward_w = 0.1 (-10 + 12) = 0.2,   reward_l = 0.1 (-15 + 14) = -0.1,   margin = 2 - (-1) = 3,   z = 0.3
#     L = log(1 + exp(-0.3)) = 0.5544,   sigma(-0.3) = 0.42556,   gradients -0.042556 and +0.042556
#
# Now a step. Treat the policy's two log-probabilities as free numbers, and go down the gradient with a learning rate
# of 10, so that the change can be seen:
#
#     logp_w = -10 + 0.42556 = -9.57444,   logp_l = -15 - 0.42556 = -15.42556,   margin = 3.8511,   L = 0.5190

# %%
logp_w, logp_l, ref_logp_w, ref_logp_l, beta = -10.0, -15.0, -12.0, -14.0, 0.1


def loss_by_hand(logp_w, logp_l, ref_logp_w, ref_logp_l, beta):
    z = beta * ((logp_w - ref_logp_w) - (logp_l - ref_logp_l))
    return np.logaddexp(0, -z)  # log(1 + exp(-z)), which is -log sigma(z), without overflow


def gradient_by_hand(logp_w, logp_l, ref_logp_w, ref_logp_l, beta):
    z = beta * ((logp_w - ref_logp_w) - (logp_l - ref_logp_l))
    weight = np.exp(-np.logaddexp(0, z))  # sigma(-z)
    return -beta * weight, beta * weight


example = (logp_w, logp_l, ref_logp_w, ref_logp_l)
reward_w, reward_l = beta * (logp_w - ref_logp_w), beta * (logp_l - ref_logp_l)
hand_w, hand_l = gradient_by_hand(*example, beta)
np.testing.assert_allclose([reward_w, reward_l], [0.2, -0.1], rtol=1e-12)
np.testing.assert_allclose(loss_by_hand(*example, beta), 0.5544, rtol=0, atol=5e-5)
np.testing.assert_allclose([hand_w, hand_l], [-0.042556, 0.042556], rtol=0, atol=5e-7)
stepped = (logp_w - 10 * hand_w, logp_l - 10 * hand_l, ref_logp_w, ref_logp_l)
assert [f"{number:.5f}" for number in stepped[:2]] == ["-9.57444", "-15.42556"]
assert f"{stepped[0] - stepped[1] - 2:.4f}" == "3.8511"
assert f"{loss_by_hand(*stepped, beta):.4f}" == "0.5190"

# %% [markdown]
# ## The library's version
# `losses.dpo_loss` builds a graph, and autograd sweeps it. `losses.dpo_gradient` is the closed form.

# %%
closed_w, closed_l = losses.dpo_gradient(*example, beta=beta)
leaf_w, leaf_l = Tensor(logp_w, requires_grad=True), Tensor(logp_l, requires_grad=True)
out = losses.dpo_loss(leaf_w, leaf_l, ref_logp_w, ref_logp_l, beta=beta)
out.loss.backward()
eps = 1e-5
up, down = ((logp_w + shift, *example[1:]) for shift in (eps, -eps))
finite_w = (loss_by_hand(*up, beta) - loss_by_hand(*down, beta)) / (2 * eps)
up, down = ((logp_w, logp_l + shift, ref_logp_w, ref_logp_l) for shift in (eps, -eps))
finite_l = (loss_by_hand(*up, beta) - loss_by_hand(*down, beta)) / (2 * eps)
print("The worked example")
print(f"reward_w {out.reward_w.item():.4f}   reward_l {out.reward_l.item():.4f}   margin {out.margin.item():.4f}")
print(f"loss {out.loss.item():.4f}   (log 2 = {math.log(2):.4f})")
print("             by hand   closed form    autograd   finite difference")
print(f"dL/dlogp_w  {hand_w:8.5f}   {closed_w:11.5f}    {leaf_w.grad:8.5f}   {finite_w:17.5f}")
print(f"dL/dlogp_l  {hand_l:8.5f}   {closed_l:11.5f}    {leaf_l.grad:8.5f}   {finite_l:17.5f}")
np.testing.assert_allclose([closed_w, closed_l], [hand_w, hand_l], rtol=1e-12)
np.testing.assert_allclose([leaf_w.grad, leaf_l.grad], [hand_w, hand_l], rtol=1e-12)
np.testing.assert_allclose([finite_w, finite_l], [hand_w, hand_l], rtol=1e-7)
np.testing.assert_allclose(out.loss.item(), loss_by_hand(*example, beta), rtol=1e-12)

# %% [markdown]
# The picture shows the whole step. Read it from the top: two rewards meet in one loss, and the loss sends a slope back
# to each side.


# %%
def draw(path):
    left, middle, right = 0.3, 0.58, 0.86
    boxes = [  # place, text
        (left, 4, f"policy {logp_w:g}\nreference {ref_logp_w:g}"),
        (right, 4, f"policy {logp_l:g}\nreference {ref_logp_l:g}"),
        (left, 3, f"reward {reward_w:.1f}"),
        (right, 3, f"reward {reward_l:.1f}"),
        (middle, 3, f"z = {reward_w - reward_l:.1f}\nL = {loss_by_hand(*example, beta):.3f}"),
        (left, 2, f"slope {hand_w:+.3f}"),
        (right, 2, f"slope {hand_l:+.3f}"),
        (left, 1, f"policy {stepped[0]:.2f}\nhigher"),
        (right, 1, f"policy {stepped[1]:.2f}\nlower"),
    ]
    with plots.figure(path, (6.4, 5.4), {"font.size": 14, "text.color": "black"}) as figure:
        axes = figure.subplots()
        for across, up, text in boxes:
            color = {left: plots.PALETTE[0], right: plots.PALETTE[1], middle: "black"}[across]
            frame = {"boxstyle": "round,pad=0.4", "facecolor": "white", "edgecolor": color, "linewidth": 1.5}
            axes.text(across, up, text, color=color, bbox=frame, ha="center", va="center", zorder=3)
        arrow = {"arrowstyle": "-|>", "color": plots.INK, "linewidth": 2, "mutation_scale": 18}
        for across, name, edge in ((left, "chosen", middle - 0.1), (right, "rejected", middle + 0.1)):
            axes.text(across, 4.6, name, ha="center", va="center", weight="bold")
            axes.annotate("", (edge, 3), (across, 3), arrowprops=arrow, zorder=2)
            for start, tail, head in ((across, 4, 3.13), (middle, 3, 2.13), (across, 2, 1.24)):
                axes.annotate("", (across, head), (start, tail), arrowprops=arrow, zorder=2)
        for up, name in enumerate(("step", "sweep", "loss", "score"), 1):
            axes.text(0, up, name, va="center", weight="bold")
        axes.set(xlim=(0, 1), ylim=(0.6, 4.7))
        axes.set_axis_off()


path = pathlib.Path("09_training_step.png")
if plots.installed():
    draw(path)
print(f"picture: {path.name}" if plots.installed() else "the picture needs matplotlib (the `plot` extra)")

# %% [markdown]
# ## A transformer to train
# Characters, one layer, float64. We fine-tune it briefly on both responses of three pairs, so that their probabilities
# are worth comparing. Then it becomes the policy, and a frozen copy of it becomes the reference.

# %%
texts = [
    ("my bill?", "i'm sorry! it is paid.", "i'm busy."),
    ("my login?", "sorry! it is sent.", "so what?"),
    ("my parcel?", "thank you! it is sent.", "look online."),
]
tokenizer = Tokenizer.from_text("".join("".join(row) for row in texts))
pairs = [
    ([END_OF_TEXT, *tokenizer.encode(x)], [*tokenizer.encode(w), END_OF_TEXT], [*tokenizer.encode(l), END_OF_TEXT])
    for x, w, l in texts
]
config = Config(vocab_size=tokenizer.vocab_size, n_positions=40, n_embd=32, n_layer=1, n_head=2)
policy = model.init(config, np.random.default_rng(0), dtype="float64")
optimizer = optim.AdamW(policy, learning_rate=1e-2)
examples = [(x, y) for x, w, l in pairs for y in (w, l)]
for step in range(60):
    metrics = training.sft_training_step(policy, config, optimizer, examples)
    if step in (0, 59):
        print(f"{'' if step else chr(10)}fine-tuning, step {step + 1:2}: {metrics['loss']:.2f} nats per token")
reference = model.frozen(policy)

# %% [markdown]
# ## One step
# `training.dpo_training_step` scores the pairs under both models, computes the loss, sweeps, and lets the optimizer
# step. Its metrics have TRL's names; `rewards/margins` is the mean of z. With plain gradient descent the formula
# predicts the step, for every parameter:
#
#     theta <- theta - learning_rate * mean over the pairs of -beta sigma(-z) (dlogp_w/dtheta - dlogp_l/dtheta)

# %%


def pair_logprobs(params, pair):
    x, w, l = pair
    return [scoring.sequence_logprob(params, config, [x], [y]) for y in (w, l)]  # logp_w, logp_l: (1,) each


def step_by_hand(learning_rate):
    """Each parameter after one step of gradient descent, by the formula."""
    arrays = {name: parameter.data.copy() for name, parameter in policy.items()}
    for pair in pairs:
        logp_w, logp_l = pair_logprobs(policy, pair)
        ref_logp_w, ref_logp_l = pair_logprobs(reference, pair)
        slope, _ = gradient_by_hand(logp_w.item(), logp_l.item(), ref_logp_w.item(), ref_logp_l.item(), beta)
        for parameter in policy.values():
            parameter.grad = None
        (logp_w - logp_l).backward()
        for name, parameter in policy.items():
            arrays[name] -= learning_rate * slope * parameter.grad / len(pairs)
    return arrays


optimizer, batch, reports = optim.SGD(policy, learning_rate=0.05), preferences.collate(pairs), []
for _ in range(4):
    expected = step_by_hand(optimizer.learning_rate)
    reports.append(training.dpo_training_step(policy, reference, config, optimizer, batch, beta=beta))
    for name, parameter in policy.items():
        np.testing.assert_allclose(parameter.data, expected[name], rtol=0, atol=1e-10)

print("\nFour steps of DPO on three pairs, as reported")
print("step      loss  rewards/chosen  rewards/rejected  logps/chosen  logps/rejected  grad_norm")
for step, metrics in enumerate(reports, 1):
    chosen, rejected = (round(metrics[name], 4) + 0.0 for name in ("rewards/chosen", "rewards/rejected"))  # no -0
    print(f"{step:4} {metrics['loss']:9.4f} {chosen:15.4f} {rejected:17.4f}", end="")
    print(f" {metrics['logps/chosen']:13.3f} {metrics['logps/rejected']:15.3f} {metrics['grad_norm']:10.3f}")

# %% [markdown]
# ## The answer to the prediction
# The loss is -log sigma(0) = log 2 and the rewards are 0, up to rounding. The metrics describe the policy from which
# the step started, and it equals the reference. There a pair's gradient is -(beta/2) (dlogp_w/dtheta - dlogp_l/dtheta),
# which is not 0. So the first step moves the policy, and the second step's report shows it:
#
#     step      loss  rewards/chosen  rewards/rejected  logps/chosen  logps/rejected
#        1    0.6931          0.0000            0.0000        -0.687          -0.886
#        2    0.6344          0.0372           -0.0839        -0.315          -1.725
#        3    0.5864          0.0493           -0.1770        -0.193          -2.655
#        4    0.5466          0.0515           -0.2669        -0.172          -3.554

# %%
np.testing.assert_allclose(reports[0]["loss"], math.log(2), rtol=1e-9)
np.testing.assert_allclose([reports[0]["rewards/chosen"], reports[0]["rewards/rejected"]], 0, atol=1e-9)
assert reports[0]["grad_norm"] > 0.01 and reports[1]["loss"] < reports[0]["loss"]
form = "{loss:.4f} {rewards/chosen:.4f} {rewards/rejected:.4f} {logps/chosen:.3f} {logps/rejected:.3f}"
assert [form.format_map(metrics) for metrics in reports[1:]] == [
    "0.6344 0.0372 -0.0839 -0.315 -1.725",
    "0.5864 0.0493 -0.1770 -0.193 -2.655",
    "0.5466 0.0515 -0.2669 -0.172 -3.554",
]

# %% [markdown]
# ## One pair, token by token
# `explain.pair` splits the numbers of a pair among its tokens. A response's reward is beta times the sum of its tokens'
# log-ratios. Let s be the row of logits that predicts a token. Then the token's part of the gradient is
#
#     dL/ds = -c beta sigma(-z) (onehot(token) - softmax(s)),   c = +1 in the chosen response, -1 in the rejected one.
#
# While both responses have the same tokens, they share s, and the two gradients cancel. In the row where they part they
# still share s. There only softmax(s) cancels: the chosen token is pushed up by beta sigma(-z), and the rejected token
# is pushed down equally hard. After that each response has rows of its own. The push in the table is -dL/ds at the
# token's own logit. Here are three rows of it:
#
#     row        chosen      push      rejected      push
#     shared        ' '   0.00000           ' '   0.00000
#     branch        's'   0.04067           'b'  -0.04067
#     own           'o'   0.00034           'u'  -0.00380
#
# Nearly all of the push is at the branch. The policy is almost sure of the later tokens, and there
# onehot(token) - softmax(s) is small.

# %%
view = explain.pair(policy, reference, config, *pairs[0], beta=beta, tokenizer=tokenizer)
print(f"\n{texts[0][0]}  chosen: {texts[0][1]}  rejected: {texts[0][2]}")
print(f"margin {view.margin:.3f}   loss {view.loss:.4f}   weight {view.weight:.4f}   shared tokens {view.shared}")
print("            chosen                               rejected")
print("row     token  log-ratio  push on it      token  log-ratio  push on it")
for a, b in zip(view.chosen[:8], view.rejected):
    left = f"{explain.quoted(a.token):>5} {a.log_ratio:10.4f} {a.push:11.5f}"
    print(f"{a.row:<8}{left} {explain.quoted(b.token):>10} {b.log_ratio:10.4f} {b.push:11.5f}")

for side, reward, logp in ((view.chosen, view.reward_w, view.logp_w), (view.rejected, view.reward_l, view.logp_l)):
    np.testing.assert_allclose(beta * sum(token.log_ratio for token in side), reward, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(sum(token.logp for token in side), logp, rtol=1e-9)
    for token in side:
        if token.row == "own":
            np.testing.assert_allclose(token.push, -token.coefficient * (1 - token.probability), rtol=1e-9)
assert view.shared == 4 and all(token.gradient_norm < 1e-15 for token in view.chosen[:4])
three = [
    (a.token, f"{a.push + 0:.5f}", b.token, f"{b.push + 0:.5f}") for a, b in zip(view.chosen[3:6], view.rejected[3:6])
]
assert three == [(" ", "0.00000", " ", "0.00000"), ("s", "0.04067", "b", "-0.04067"), ("o", "0.00034", "u", "-0.00380")]
assert min(token.probability for token in (*view.chosen[5:], *view.rejected[5:])) > 0.9
exact_difference, finite_difference = explain.largest_differences(explain.four_ways(policy, config, view))
assert exact_difference < 1e-12 and finite_difference < 1e-7
print("the pair's gradient by formula, logits and autograd agrees to within 1e-12; by finite difference, to 1e-7")

# %% [markdown]
# ## What was shown
# Four log-probabilities give the loss and its gradient; the chain rule gives the gradient of every parameter. One step
# of `dpo_training_step` moved every parameter to where the formula says.
#
# ## Exercises
# 1. Compute on paper: the worked example at beta = 0.5. What are the rewards, the loss and the gradients?
# 2. Find the bug: a scorer returns the mean log-probability of a response's tokens. What do the four shared tokens of
#    the pair above then contribute to the margin?
# 3. Predict, then measure: start again from the reference, with a learning rate of 0.5, ten times the one above. Which
#    loss does the first step report? Does the loss fall faster after that, and is the policy better for it?

# %%
assert reports[-1]["loss"] < reports[0]["loss"] and reports[-1]["rewards/margins"] > 0
print("\n09: by hand, closed form, autograd and training step agree on -beta sigma(-z) (dlogp_w - dlogp_l).")

# %% [markdown]
# ## Solutions
# 1. The rewards are 1 and -0.5, z = 1.5, and the loss is log(1 + exp(-1.5)) = 0.2014. The gradients are
#    -0.5 sigma(-1.5) = -0.09121 and +0.09121.
# 2. Something other than 0. Their log-ratios are divided by two different lengths, 23 and 10, and no longer cancel. In
#    sums they do.
# 3. The first step reports log 2, whatever its learning rate. Then the loss falls faster: 0.33, 0.10 and 0.04 instead
#    of 0.63, 0.59 and 0.55, and every pair is in the correct order. But the policy now hardly ever writes a chosen
#    response. On average their log-probability goes from -0.69, a probability of 1/2, to -4.12 and then -10.87. The
#    rejected ones fall further, and the loss sees only that. The damage shows in `logps/chosen`.

# %%
np.testing.assert_allclose(loss_by_hand(*example, 0.5), 0.2014, rtol=0, atol=5e-5)
np.testing.assert_allclose(gradient_by_hand(*example, 0.5), [-0.09121, 0.09121], rtol=0, atol=5e-6)
shared_w, shared_l = (sum(token.log_ratio for token in side[:4]) for side in (view.chosen, view.rejected))
assert (len(view.chosen), len(view.rejected)) == (23, 10)
np.testing.assert_allclose(shared_w - shared_l, 0, atol=1e-12)
assert abs(shared_w / 23 - shared_l / 10) > 1e-6

fresh = {name: Tensor(parameter.data.copy(), requires_grad=True) for name, parameter in reference.items()}
optimizer = optim.SGD(fresh, learning_rate=0.5)
large = [training.dpo_training_step(fresh, reference, config, optimizer, batch, beta=beta) for _ in range(4)]
np.testing.assert_allclose(large[0]["loss"], math.log(2), rtol=1e-9)
assert [f"{metrics['loss']:.2f}" for metrics in large[1:]] == ["0.33", "0.10", "0.04"]
assert [f"{metrics['loss']:.2f}" for metrics in reports[1:]] == ["0.63", "0.59", "0.55"]
assert all(metrics["rewards/accuracies"] == 1 for metrics in large[1:])
np.testing.assert_allclose(
    [metrics["logps/chosen"] for metrics in large[:3]], [-0.69, -4.12, -10.87], rtol=0, atol=0.01
)
assert all(metrics["logps/rejected"] < metrics["logps/chosen"] - 5 for metrics in large[1:])
