# %% [markdown]
# # 14. Memory and speed
#
# **Question.** What does a step of DPO hold in memory, what does it compute, and which of it can be left out?
#
# **Afterwards you can say**
# - what a parameter costs, trained or frozen, and what PPO and DPO need for 7 billion of them;
# - what a small model holds, role by role, and how much the activations add;
# - why a cached reference and a shared prefix leave loss and gradient unchanged, and what they save.
#
# **Predict first.** A model of 7 billion parameters is trained with AdamW in mixed precision. How many gigabytes does
# DPO need, activations not counted? How many if the reference's log-probabilities are computed beforehand?
#
# **The formula.** In mixed precision the model computes in 16 bits, and AdamW updates a copy in float32, the master
# copy. AdamW also keeps two running means for each parameter, m of its gradient and v of the gradient's square. So a
# trained parameter costs 16 bytes: weight 2, gradient 2, master copy 4, m 4 and v 4. A frozen one costs 2. For a pair
# (x, y_w, y_l), the model computes one row per input token; the last token of a text is never an input.
#
#     packed:         (|x| + |y_w| - 1) + (|x| + |y_l| - 1) rows
#     prefix shared:   |x| + |y_w| + |y_l| - 2 rows, which is |x| fewer

# %%
import gc
import pathlib
import time
import tracemalloc

import numpy as np

from minidpo import Config, Tensor, explain, losses, model, ops, optim, plots, preferences, scoring, training


def gigabytes(trained, frozen):  # of billions of parameters
    return 16 * trained + 2 * frozen


def parameters(V, T, C, layers):  # of GPT-2's shape: weights and biases
    norm, attention, mlp = 2 * C, (C + 1) * 3 * C + (C + 1) * C, (C + 1) * 4 * C + (4 * C + 1) * C
    return V * C + T * C + layers * (norm + attention + norm + mlp) + norm


def rows_of(pairs):  # padded, packed, shared
    lengths = np.array([[len(x), len(w), len(l)] for x, w, l in pairs])  # (B, 3)
    x, w, l = lengths.T
    longest = (x + np.maximum(w, l) - 1).max()
    return int(2 * len(pairs) * longest), int((2 * x + w + l - 2).sum()), int((x + w + l - 2).sum())


# %% [markdown]
# ## From NumPy alone: the models
#
# PPO is the reinforcement learning that DPO replaces. It holds four models, equally large here. The policy and the
# critic, which predicts the reward of a reply, are trained; the reference and the reward model are frozen. If the
# critic is only a head on the policy, it adds few parameters, and we count none. DPO holds two models, a policy and a
# reference; its reward is beta times their log-ratio. The reference enters the loss through two numbers per pair, which
# never change. Keep them, and the reference need not be in memory.

# %%
SIZE = 7
plans = {  # models trained, models frozen
    "PPO, a separate critic": (2, 2),
    "PPO, the critic a head on the policy": (1, 2),
    "DPO": (1, 1),
    "DPO, reference cached": (1, 0),
}
print(f"Memory for models of {SIZE} billion parameters, GB (activations not counted)")
print(f"{'':<40}{'trained':>9}{'frozen':>9}{'weights alone':>16}{'in training':>14}")
for name, (trained, frozen) in plans.items():
    weights, in_training = 2 * SIZE * (trained + frozen), gigabytes(SIZE * trained, SIZE * frozen)
    print(f"{name:<40}{trained:>9}{frozen:>9}{weights:>16}{in_training:>14}")

# %% [markdown]
# ## The answer to the prediction
#
# 126 GB, and 112 with a cached reference. You may read that DPO needs 28 GB, half of PPO's 56 (E12 in the
# list `errata.py`). Those figures count the weights alone:
#
#                                             weights alone   in training
#     PPO, a separate critic                          56 GB        252 GB
#     PPO, the critic a head on the policy            42 GB        140 GB
#     DPO                                             28 GB        126 GB
#     DPO, reference cached                           14 GB        112 GB
#
# In training a frozen model is cheap: dropping the reference saves 14 of DPO's 126 GB, but dropping a separate critic
# saves 112 of PPO's 252. In the picture, filled bars are trained and hatched bars frozen.

# %%


def draw(path):
    with plots.figure(path, (6.4, 4.4), {"axes.grid": False, "font.size": 14, "text.color": "black"}) as figure:
        axes = figure.subplots()
        for row, (trained, frozen) in enumerate(plans.values()):
            sizes = {"policy": 16 * SIZE, **dict.fromkeys(["reference", "reward model"][:frozen], 2 * SIZE)}
            sizes |= dict.fromkeys(["critic"][: trained - 1], 16 * SIZE)
            left = 0
            for name, size in sizes.items():
                look = {"color": plots.PALETTE[0]} if size == 16 * SIZE else {"color": "white", "hatch": "////"}
                axes.barh(row, size, 0.62, left, edgecolor="black", **look)
                if size == 16 * SIZE:
                    axes.text(left + size / 2, row, name, color="white", ha="center", va="center")
                left += size
            axes.text(left + 4, row, f"{left} GB", va="center")
        axes.text(17 * SIZE, -0.4, "reference", ha="right", va="bottom")
        axes.text(19 * SIZE, -0.4, "reward model", va="bottom")
        axes.set(title=f"Memory in training, {SIZE} billion parameters", xlim=(0, 305), ylim=(3.5, -0.8))
        axes.set_yticks(range(4), ["PPO", "PPO, critic\na head", "DPO", "DPO, cached\nreference"])
        axes.set_xticks([])
        axes.spines[:].set_visible(False)
        axes.tick_params(length=0, labelcolor="black")


path = pathlib.Path("14_memory_and_speed.png")
if plots.installed():
    draw(path)
print(f"picture: {path.name}" if plots.installed() else "the picture needs matplotlib (the `plot` extra)")

# %% [markdown]
# ## The library's version: a ledger of arrays
#
# We take one step with a small model in float32, on four pairs. Here too a trained parameter costs 16 bytes: 4 each for
# weight, gradient, m and v, and no master copy. A parameter of the frozen reference costs 4.

# %%
config = Config(vocab_size=200, n_positions=256, n_embd=64, n_layer=2, n_head=4)
rng = np.random.default_rng(0)
policy = model.init(config, rng, dtype="float32")
reference = model.frozen(model.init(config, rng, dtype="float32"))  # another model, so that no margin is 0
lengths = [(90, 60, 40), (120, 30, 50), (80, 70, 20), (100, 40, 40)]  # |x|, |y_w|, |y_l|
pairs = [tuple(rng.integers(1, config.vocab_size, length).tolist() for length in three) for three in lengths]
B = len(pairs)
twin = {name: Tensor(each.data.copy(), requires_grad=True) for name, each in policy.items()}  # for the next section
optimizer = optim.AdamW(policy, learning_rate=1e-3)
training.dpo_training_step(policy, reference, config, optimizer, preferences.collate(pairs))
size_of_policy = sum(parameter.data.size for parameter in policy.values())
ledger = {
    "policy: weights": sum(parameter.data.nbytes for parameter in policy.values()),
    "policy: gradients": sum(parameter.grad.nbytes for parameter in policy.values()),
    "optimizer: m": sum(state["m"].nbytes for state in optimizer.state.values()),
    "optimizer: v": sum(state["v"].nbytes for state in optimizer.state.values()),
    "reference: weights": sum(parameter.data.nbytes for parameter in reference.values()),
}

# %% [markdown]
# ## Cached or not, the step is the same
#
# The reference's log-probabilities are constants. So two steps from the same weights, one with the reference and one
# with only its log-probabilities, must end in the same weights, bit for bit.

# %%
ref_logp_w, ref_logp_l = training.reference_logprobs(reference, config, pairs)  # (B,), (B,)
batch = preferences.collate(pairs, ref_logp_w, ref_logp_l)
training.dpo_training_step(twin, {}, config, optim.AdamW(twin, learning_rate=1e-3), batch)  # no reference at all
assert all(np.array_equal(twin[name].data, parameter.data) for name, parameter in policy.items())

# %% [markdown]
# ## Three routes to the same log-probabilities
#
# The padded route fills 2B texts up to the same length. The packed route lays the texts one after another, without
# pads. The shared route has each prompt once, with both responses after it. Causal attention makes this possible: the
# rows of a prompt do not depend on what follows, so both responses can use them. Tokens with which both responses begin
# are computed twice. The step takes the shared route.

# %%


def packed(params, config, pairs):
    examples = [(x, w) for x, w, _ in pairs] + [(x, l) for x, _, l in pairs]
    order = sorted(range(len(examples)), key=lambda i: sum(map(len, examples[i])))  # packing sorts texts by length
    response = [i for i in order for _ in examples[i][1]]
    # the log-probability of each token of a response -> one sum for each response, (2B,)
    sums = ops.segment_sum(scoring.packed_logprobs(params, config, examples), response, len(examples))
    return sums[: len(pairs)], sums[len(pairs) :]


routes = {"padded": scoring.padded_logprobs, "packed": packed, "prefix shared": scoring.shared_logprobs}
values, gradients = {}, {}
for name, route in routes.items():  # in float64, where rounding is small
    double = {key: Tensor(each.data.astype("float64"), requires_grad=True) for key, each in policy.items()}
    logp_w, logp_l = route(double, config, pairs)
    values[name] = np.concatenate([logp_w.data, logp_l.data])  # (2B,)
    losses.dpo_loss(logp_w, logp_l, ref_logp_w.astype("float64"), ref_logp_l.astype("float64")).loss.backward()
    gradients[name] = np.concatenate([each.grad.ravel() for each in double.values()])  # one vector


# %% [markdown]
# ## Activations
#
# The backward sweep needs what the forward computed: the values, and the arrays that each op's `vjp` keeps. They live
# until the sweep has passed. `explain.graph` adds up their bytes and counts each array once; Python's `tracemalloc`
# measures the same from outside. Here we hold the graph of a whole batch. The step need not: `training.dpo_sweep` cuts
# a large batch into micro-batches, and builds and sweeps the graph of one before it begins the next. The ledger in
# megabytes:
#
#     role                            MB   bytes per parameter
#     policy: weights               0.52                   4.0
#     policy: gradients             0.52                   4.0
#     optimizer: m                  0.52                   4.0
#     optimizer: v                  0.52                   4.0
#     reference: weights            0.52                   4.0
#     activations, prefix shared   11.60                  89.7
#
# Activations grow with the rows (exercise 2). The other lines do not.


# %%
def loss_by(route, some=slice(None)):
    return losses.dpo_loss(*route(policy, config, pairs[some]), ref_logp_w[some], ref_logp_l[some]).loss


def activations(route):  # the graph, and the bytes allocated for it
    loss_by(route)
    gc.collect()
    tracemalloc.start()
    loss = loss_by(route)
    size = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    return explain.graph(loss, policy), size


def seconds(step, repeats=5):  # the fastest of several calls
    durations = []
    for _ in range(repeats):
        start = time.perf_counter()
        step()
        durations.append(time.perf_counter() - start)
    return min(durations)


graphs = {name: activations(route) for name, route in routes.items()}
rows = {
    name: next(node.shape[0] for node in graph.nodes if node.op == "embedding") for name, (graph, _) in graphs.items()
}
shared, _ = graphs["prefix shared"]
print(f"\nThe ledger of one step: {size_of_policy:,} parameters in float32, {B} pairs")
print(f"{'role':<40}{'bytes':>12}{'per parameter':>15}")
for name, size in {**ledger, "activations, prefix shared": shared.kept}.items():
    print(f"{name:<40}{size:>12,}{size / size_of_policy:>15.1f}")
kept = {node.op: sum(other.kept for other in shared.nodes if other.op == node.op) for node in shared.nodes}
print("\nThe largest of the activations, by op")
for op in sorted(sorted(kept), key=kept.get, reverse=True)[:4]:
    print(f"{op:<40}{kept[op]:>12,}")

# %% [markdown]
# ## What is computed
#
# For each matrix product of the forward, the sweep computes two of the same size. So a step makes 3 passes over its
# rows, or 4 if the reference is scored too, and the linear layers cost rows x passes. That is not the whole cost. The
# packed and shared routes compute less than their rows suggest: after the last attention they continue only with the
# rows that predict a token of a response.
#
#     route                               rows   graph, MB   rows x passes
#     padded, reference scored            1352        27.0            5408
#     packed, reference scored            1122        18.4            4488
#     prefix shared, reference scored      732        11.6            2928
#     prefix shared, reference cached      732        11.6            2196
#
# The last line leaves out the pass that fills the cache. With it, a pair costs 1 + 3 = 4 passes in one epoch, as many
# as without a cache; in two epochs 1 + 6 = 7 instead of 8.

# %%
print("\nActivations and time by route (work and time as shares of the first line's; time varies)")
print(f"{'':<34}{'rows':>7}{'graph, bytes':>14}{'tracemalloc':>14}{'rows x passes':>15}{'work':>8}{'time':>7}")
base, first = 4 * rows["padded"], None
for name, passes in [*((name, 4) for name in routes), ("prefix shared", 3)]:
    route = routes[name]

    def step(route=route, passes=passes):
        if passes == 4:
            route(reference, config, pairs)
        loss_by(route).backward()

    duration = seconds(step)
    first = first or duration
    (graph, size), work = graphs[name], passes * rows[name]
    title = f"{name}, reference {'scored' if passes == 4 else 'cached'}"
    shares = f"{work / base:>8.2f}{duration / first:>7.2f}"
    print(f"{title:<34}{rows[name]:>7}{graph.kept:>14,}{size:>14,}{work:>15,}{shares}")
passes_of_epochs = [(4 * n, 1 + 3 * n) for n in (1, 2)]  # 1: the cache is filled
print("passes in 1 and 2 epochs, (scored, cached with its own pass):", *passes_of_epochs)

# %% [markdown]
# ## What was shown
#
# In mixed precision a trained parameter costs 16 bytes and a frozen one 2. Activations come on top, and in a model as
# small as this one they are the largest item. A shared prefix saves memory and time. A cached reference saves memory,
# and time from the second epoch on. Neither changes log-probabilities or gradients.
#
# ## Exercises
#
# 1. By hand: an adapter of 0.02 billion parameters is trained on a frozen model of 7 billion. What does DPO need, and
#    why does that include no second copy for the reference?
# 2. Predict, then measure: with `micro_batch_size=1` the step sweeps each pair before it scores the next one. From the
#    rows alone, what fraction of the batch's activations is in memory at the worst moment?
# 3. Find the bug: to report the mean loss of an evaluation, somebody writes `evaluated.append(loss_by(route))` for each
#    batch, and memory runs out after a while. Which bytes pile up? In training the same line, after `backward()`, does
#    no harm. Why?

# %%
assert [gigabytes(SIZE * trained, SIZE * frozen) for trained, frozen in plans.values()] == [252, 140, 126, 112]
assert [2 * SIZE * (trained + frozen) for trained, frozen in plans.values()] == [56, 42, 28, 14]
assert size_of_policy == parameters(config.vocab_size, config.n_positions, config.n_embd, config.n_layer)
assert list(ledger.values()) == [4 * size_of_policy] * 5
for size, text in ((4 * size_of_policy, "0.52 4.0"), (shared.kept, "11.60 89.7")):
    assert f"{size / 1e6:.2f} {size / size_of_policy:.1f}" == text
assert [f"{rows[name]} {graphs[name][0].kept / 1e6:.1f} {4 * rows[name]}" for name in routes] == [
    "1352 27.0 5408",
    "1122 18.4 4488",
    "732 11.6 2928",
]
assert 3 * rows["prefix shared"] == 2196
assert passes_of_epochs == [(4, 4), (8, 7)]
assert tuple(rows.values()) == rows_of(pairs)
assert rows["packed"] - rows["prefix shared"] == sum(len(x) for x, _, _ in pairs)
for name in routes:
    np.testing.assert_allclose(values[name], values["padded"], rtol=0, atol=1e-10)
    np.testing.assert_allclose(gradients[name], gradients["padded"], rtol=0, atol=1e-10)
    graph, size = graphs[name]
    assert abs(graph.kept - size) < 0.03 * size
assert graphs["padded"][0].kept > graphs["packed"][0].kept > shared.kept > 4 * size_of_policy
print("\n14: 252, 140, 126 and 112 GB; 16 bytes per trained parameter; three routes, one loss and one gradient.")

# %% [markdown]
# ## Solutions
#
# 1. 16 * 0.02 + 2 * 7 = 14.32 GB. The frozen model without the adapter is the reference.
# 2. The worst moment is the pair with the most rows. Nearly all activations are stored row by row, so the fraction is
#    about that pair's share of the rows.
# 3. The graphs. A loss refers to the graph that made it, so the list holds one graph for each batch. The cure is to
#    append `loss_by(route).item()`, a plain number. A sweep frees the graph as it passes (tutorial 02). So a loss that
#    was swept holds next to nothing.

# %%
assert abs(gigabytes(0.02, 7) - 14.32) < 1e-12
largest = max(range(B), key=lambda i: rows_of([pairs[i]])[2])
one = explain.graph(loss_by(scoring.shared_logprobs, slice(largest, largest + 1)), policy).kept
share = rows_of([pairs[largest]])[2] / rows_of(pairs)[2]
print(f"Solution 2: {one:,} bytes, a fraction of {one / shared.kept:.2f}; the rows predict {share:.2f}.")
assert abs(one / shared.kept - share) < 0.05


def held(evaluate):
    """The bytes that three results occupy."""
    gc.collect()
    tracemalloc.start()
    evaluated = [evaluate() for _ in range(3)]
    gc.collect()
    size = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert len(evaluated) == 3
    return size


def swept():
    loss = loss_by(scoring.shared_logprobs)
    loss.backward()
    return loss


of_losses = held(lambda: loss_by(scoring.shared_logprobs))
of_numbers, of_swept = held(lambda: loss_by(scoring.shared_logprobs).item()), held(swept)
print(f"Solution 3: three losses hold {of_losses:,} bytes.")
assert abs(of_losses / 3 / shared.kept - 1) < 0.05
assert max(of_numbers, of_swept) < 0.01 * of_losses
