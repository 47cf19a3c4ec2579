# %% [markdown]
# # 05. A character transformer, and the model that answers
#
# **Question.** How does a text become logits, and how does a model that continues texts become one that answers?
#
# This script follows `05_attention.py` and uses its words: state, channel, query, key, value, head, residual.
#
# **Afterwards you can say**
# - the shape of every array between tokens and logits, what each step does, and what GPT-2 calls its numbers;
# - what pre-training and supervised fine-tuning (SFT) minimise, and that they differ in the data, not in the formula;
# - what a model that merely continues texts lacks of one that answers, in nats.
#
# **Predict first.** Texts of a support desk begin with a customer's line. In half of them a reply follows. In the other
# half the customer writes another line. A model is trained on these texts until it is perfect, and then given a
# customer's line. How often does it reply? Then it is trained further, on replies only, until it is perfect at those.
# By how many nats does log pi(reply|line) rise?
#
# **The formula.** A text of T tokens passes through these lines. The names of the learned numbers are GPT-2's; each is
# explained below. @ is the matrix product.
#
#     states = wte[token] + wpe[position]                                           (T, C)
#     in each layer:
#         q, k, v = layer_norm(states) @ attn.c_attn, cut into H heads              (H, T, D), three times
#         states  = states + attention(q, k, v) @ attn.c_proj                       (T, C)
#         states  = states + gelu(layer_norm(states) @ mlp.c_fc) @ mlp.c_proj       (T, C)
#     logits = layer_norm(states) @ wte^T                                           (T, V)
#
#     loss = -mean of log pi(token | all tokens before it), over the tokens that are scored

# %%
import math
import pathlib

import numpy as np

from minidpo import Tensor, generation, model, optim, plots, training, world
from minidpo.tokenizer import END_OF_TEXT, TURN, Tokenizer

# %% [markdown]
# ## From tokens to logits
# - **wte** has a vector of C learned numbers for each of the V tokens, **wpe** one for each position. Their sum is the
#   first state. Without wpe the first layer could not tell in which order the earlier tokens came.
# - A layer, also called a *block*, has two parts. **Attention** is the first. attn.c_attn is the three matrices for
#   queries, keys and values, side by side; attn.c_proj is the W_out of `05_attention.py`.
# - The **MLP** (multi-layer perceptron) is the second, and treats each position alone. mlp.c_fc turns C numbers into
#   4C, each goes through gelu, and mlp.c_proj turns them into C again. Attention fetches; the MLP works on what came.
# - **Layer norm** comes before each part (ln_1, ln_2) and at the end (ln_f). It subtracts the mean of a state's numbers
#   and divides by their standard deviation: (1, 0, 0, 1) has mean 1/2 and deviation 1/2, so it becomes (1, -1, -1, 1).
#   States may grow from layer to layer; what a part reads keeps its size. Then each channel gets a learned factor and a
#   learned shift.
# - **gelu** is a smooth curve: nearly 0 for very negative numbers, nearly its input for large ones. Without a curve in
#   between, two matrices could do no more than one.
# - Each product with a matrix also adds a learned vector, the **bias**.
# - The **logit** of a token is the dot product of the last state, after ln_f, with that token's vector in wte. So the
#   output needs no parameters of its own.
#
# B texts go through together. These are the arrays, their shapes, and the steps between them:
#
#     tokens           (B, T)
#        |  wte + wpe
#     states           (B, T, C) -------+
#        |  ln_1, attn.c_attn, cut      |
#     q, k, v          (B, H, T, D)     |
#        |  q k^T/sqrt(D), mask         |
#     scores           (B, H, T, T)     |  the residual: the state passes unchanged,
#        |  softmax                     |  and what the part has found is added to it
#     weights          (B, H, T, T)     |
#        |  weights v, side by side     |
#     received         (B, T, C)        |
#        |  attn.c_proj                 |
#        + <----------------------------+
#     states           (B, T, C) -------+
#        |  ln_2, mlp.c_fc, gelu        |
#     hidden           (B, T, 4C)       |
#        |  mlp.c_proj                  |
#        + <----------------------------+
#     states           (B, T, C)           the next layer begins here
#        |  ln_f, wte^T
#     logits           (B, T, V)


# %%
def layer_norm(states):
    return (states - states.mean(axis=-1, keepdims=True)) / np.sqrt(states.var(axis=-1, keepdims=True) + 1e-5)


def gelu(hidden):
    return hidden * (1 + np.tanh(math.sqrt(2 / math.pi) * (hidden + 0.044715 * hidden**3))) / 2


def softmax(scores):
    powers = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return powers / powers.sum(axis=-1, keepdims=True)


def forward(arrays, config, tokens, causal=True):
    """Every array from tokens to logits, by name and layer.  arrays: GPT-2's name -> array"""
    (B, T), C, H = tokens.shape, config.n_embd, config.n_head

    def norm(name, states):
        return layer_norm(states) * arrays[f"{name}.weight"] + arrays[f"{name}.bias"]

    def times(name, array):
        return array @ arrays[f"{name}.weight"] + arrays[f"{name}.bias"]

    states = arrays["wte.weight"][tokens] + arrays["wpe.weight"][:T]  # (B, T) -> (B, T, C)
    steps = {"first states": states}
    for i in range(config.n_layer):
        qkv = times(f"h.{i}.attn.c_attn", norm(f"h.{i}.ln_1", states))  # (B, T, C) -> (B, T, 3C)
        q, k, v = qkv.reshape(B, T, 3, H, C // H).transpose(2, 0, 3, 1, 4)  # (B, T, 3C) -> (3, B, H, T, D)
        scores = q @ k.swapaxes(-1, -2) / math.sqrt(C // H)  # (B, H, T, D) -> (B, H, T, T)
        scores = np.where(np.tri(T, dtype=bool), scores, -math.inf) if causal else scores
        weights = steps[f"weights {i}"] = softmax(scores)
        received = (weights @ v).swapaxes(1, 2).reshape(B, T, C)  # (B, H, T, D) -> (B, T, C)
        added = steps[f"attention {i} adds"] = times(f"h.{i}.attn.c_proj", received)
        states = states + added
        hidden = gelu(times(f"h.{i}.mlp.c_fc", norm(f"h.{i}.ln_2", states)))  # (B, T, C) -> (B, T, 4C)
        added = steps[f"MLP {i} adds"] = times(f"h.{i}.mlp.c_proj", hidden)  # (B, T, 4C) -> (B, T, C)
        states = states + added
    logits = norm("ln_f", states) @ arrays["wte.weight"].T  # (B, T, C) -> (B, T, V)
    return {**steps, "last states": states, "logits": logits}


np.testing.assert_allclose(layer_norm(np.array([1.0, 0, 0, 1])), [1, -1, -1, 1], atol=1e-4)

# %% [markdown]
# ## The library's version, and GPT-2's names
# `model.forward` computes the same from a dict of parameters. Its keys are GPT-2's, so a checkpoint of this library,
# the file of its parameters, is a GPT-2 checkpoint. `h.0` is the first layer and `h.1` the second.

# %%
rng = np.random.default_rng(0)
tokenizer = Tokenizer.from_text("".join([*world.PROMPTS, *world.REPLIES, TURN]))
small = model.Config(tokenizer.vocab_size, n_positions=32, n_embd=8, n_layer=1, n_head=2)
V, C = small.vocab_size, small.n_embd
shapes = {
    "wte.weight": (V, C),  # a vector for each token
    "wpe.weight": (small.n_positions, C),  # a vector for each position
    "h.0.ln_1.weight": (C,),  # the norm before attention: a factor for each channel ...
    "h.0.ln_1.bias": (C,),  # ... and a shift
    "h.0.attn.c_attn.weight": (C, 3 * C),  # states to queries, keys and values
    "h.0.attn.c_attn.bias": (3 * C,),
    "h.0.attn.c_proj.weight": (C, C),  # what was received, to channels
    "h.0.attn.c_proj.bias": (C,),
    "h.0.ln_2.weight": (C,),  # the norm before the MLP
    "h.0.ln_2.bias": (C,),
    "h.0.mlp.c_fc.weight": (C, 4 * C),  # states to hidden numbers
    "h.0.mlp.c_fc.bias": (4 * C,),
    "h.0.mlp.c_proj.weight": (4 * C, C),  # hidden numbers to channels
    "h.0.mlp.c_proj.bias": (C,),
    "ln_f.weight": (C,),  # the last norm
    "ln_f.bias": (C,),
}
assert shapes == model.parameter_shapes(small)

params = model.init(small, rng, dtype="float64")
for parameter in params.values():
    parameter.data = parameter.data + 0.3 * rng.normal(size=parameter.shape)  # norms and biases that do something
arrays = {name: parameter.data for name, parameter in params.items()}
lines = ("is my order late?", "is my login gone?")
batch = np.array([[END_OF_TEXT, *tokenizer.encode(line + TURN)] for line in lines])  # (B, T)
steps = forward(arrays, small, batch)
np.testing.assert_allclose(steps["logits"], model.forward(params, small, batch).data, rtol=0, atol=1e-10)
print(f"B = 2, T = {batch.shape[1]}, V = {V}, C = 8, H = 2, D = 4")
print(",  ".join(f"{name} {array.shape}" for name, array in steps.items()))

# %% [markdown]
# **Predict.** Set the numbers of attn.c_proj and mlp.c_proj to 0. What is left of the model?
#
# The layers then add nothing. The logits depend on the token and its position only: the model is a table again, like
# that of tutorial 00. All that a transformer knows beyond a table is in what its layers add. The last states are the
# first states plus everything that was added.

# %%
everything = sum(array for name, array in steps.items() if name == "first states" or name.endswith("adds"))
np.testing.assert_allclose(steps["last states"], everything, rtol=0, atol=1e-12)
silent = {name: 0 * array if "c_proj" in name else array for name, array in arrays.items()}
another_start = np.hstack([batch[:, 1:2], batch[:, 1:]])
for some, changes in ((arrays, True), (silent, False)):
    before, after = (forward(some, small, each)["logits"][:, -1] for each in (batch, another_start))
    assert (abs(after - before).max() > 1e-3) == changes

# %% [markdown]
# ## Pre-training and fine-tuning: one loss, used twice
# The loss is called the negative log-likelihood (NLL): the mean of -log pi(token | all tokens before it), over the
# tokens that are *scored*. *Pre-training* scores every token of a text. *Supervised fine-tuning* scores a good reply;
# the line before it is the prompt, which is given. Below, ^ marks the scored tokens, / is a newline, and # is
# end-of-text, which also stands at the beginning, so that the first character can be predicted from something.
#
#     tokens         #is it late?/no.#
#     pre-training    ^^^^^^^^^^^^^^^^
#     fine-tuning                 ^^^^


# %%
def prompt_ids(line):
    return [END_OF_TEXT, *tokenizer.encode(line + TURN)]


def reply_ids(reply):
    return [*tokenizer.encode(reply), END_OF_TEXT]


text = [*prompt_ids("is it late?"), *reply_ids("no.")]
logp = np.log(softmax(forward(arrays, small, np.array([text]))["logits"][0]))
logp = logp[np.arange(len(text) - 1), text[1:]]  # of each token but the first: (T, V) -> (T - 1,)
for prompt, scored in (([END_OF_TEXT], logp), (prompt_ids("is it late?"), logp[-4:])):
    nll = training.held_out_nll(params, small, [(prompt, text[len(prompt) :])])
    np.testing.assert_allclose(nll, -scored.mean(), rtol=1e-9)

# %% [markdown]
# Pre-training on the desk's texts gives a *base model*. Fine-tuning continues from there, on customers' lines with
# replies. Both use AdamW: gradient descent in which each parameter moves by a running mean of its gradients, divided by
# their running size, and shrinks a little. The learning rate rises to its peak over 20 steps, then falls to 0. We
# measure the NLL on *held-out* lines, which no training text contains.

# %%
train, held_out, _ = world.split(0)
texts, held_out_texts = (world.corpus(train, count, np.random.default_rng(i)) for i, count in enumerate((6000, 200)))
rows, held_out_rows = (world.supervised(xs, n, np.random.default_rng(n)) for xs, n in ((train, 4000), (held_out, 200)))


def reply_examples(rows):
    return [(prompt_ids(row["prompt"]), reply_ids(row["completion"])) for row in rows]


def train_and_measure(name, params, examples, held_out_examples, steps, peak):
    """Held-out NLL before, twice during and after `steps` steps of AdamW, which change `params`."""
    optimizer, nlls = optim.AdamW(params), []
    for step in range(steps + 1):
        if step % (steps // 3) == 0:
            nlls.append(training.held_out_nll(params, config, held_out_examples))
            print(f"{name}, step {step:>4}: held-out NLL {nlls[-1]:.3f} nats per token", flush=True)
        if step < steps:
            optimizer.learning_rate = optim.warmup_cosine(step, steps, peak, warmup_steps=20)
            some = [examples[i] for i in training.batch_indices(len(examples), 24, step, seed=0)]
            training.sft_training_step(params, config, optimizer, some, max_norm=1.0)
    return nlls


print()
config = model.Config(tokenizer.vocab_size, n_positions=128, n_embd=48, n_layer=2, n_head=4)
base = model.init(config, np.random.default_rng(1))
examples, held_out_examples = (training.line_examples(some, tokenizer) for some in (texts, held_out_texts))
base_nll = train_and_measure("pre-training", base, examples, held_out_examples, steps=600, peak=5e-3)
sft = {name: Tensor(parameter.data.copy(), requires_grad=True) for name, parameter in base.items()}
examples, held_out_examples = reply_examples(rows), reply_examples(held_out_rows)
sft_nll = train_and_measure("fine-tuning", sft, examples, held_out_examples, steps=300, peak=3e-3)
assert abs(base_nll[0] - math.log(tokenizer.vocab_size)) < 0.05  # untrained: all ids are nearly equally likely
assert base_nll[0] > 3 * base_nll[-1] and sft_nll[0] > sft_nll[-1]

# %% [markdown]
# ## The same lines to both models
# Both models sample with the same random seed. A reply is well formed if the desk could have written it.


# %%
def continuations(params, lines):
    prompts = [prompt_ids(line) for line in lines]
    samples = generation.generate(params, config, prompts, np.random.default_rng(0), max_new_tokens=100)
    return [tokenizer.decode(ids) for ids in samples.responses]


lines = world.samples(world.prompt_distribution(held_out), 200, np.random.default_rng(4))
answers = {"base": continuations(base, lines), "SFT": continuations(sft, lines)}
for i in range(3):
    print(f"\n{lines[i]}")
    for name, ys in answers.items():
        print(f"  {name:<6}{ys[i]!r}")
reply_share = {name: np.mean([y in world.REPLIES for y in ys]) for name, ys in answers.items()}
again_share = {name: np.mean([y.split(TURN)[0] in world.PROMPTS for y in ys]) for name, ys in answers.items()}
print("\nof 200 held-out lines    base     SFT")
for title, share in (("well-formed reply", reply_share), ("customer's line again", again_share)):
    print(f"{title:<22}{share['base']:>7.2f} {share['SFT']:>7.2f}")
gain = (sft_nll[0] - sft_nll[-1]) * np.mean([len(y) for _, y in held_out_examples])
print(f"fine-tuning gained {gain:.1f} nats a held-out reply; a perfect base model gains {math.log(2):.3f}")

# %% [markdown]
# ## The answer to the prediction
# The perfect base model replies half of the time. So it gives each reply y half the probability that the desk gives it:
# log pi(y|line) = log(1/2) + log desk(y|line). The perfect SFT model gains log 2 = 0.693 nats, however long the reply
# is. The base model already knew what the desk says; fine-tuning only adds whose turn it is.
#
# Our base model is small and was trained briefly. Only about 0.14 of its continuations are well-formed replies;
# about 0.33 begin with another customer's line. The rest are garbled. It gains more than log 2, because fine-tuning
# also teaches it the replies themselves.

# %%
line_probability = world.prompt_distribution(train)
for line in train[::200]:
    for y, probability in list(world.desk(world.PROMPTS[line]).items())[::200]:
        log_base = world.corpus_logprob(line + TURN + y, train) - math.log(line_probability[line])  # log pi(y|line)
        np.testing.assert_allclose(math.log(probability) - log_base, math.log(2), rtol=0, atol=1e-12)

# %% [markdown]
# ## What a trained head looks at
# Every line is about a topic, such as "card", and many replies name it: "i can't share the card."
#
# **Predict.** The SFT model has written "i can't share the " and is about to write the topic. There are two layers with
# four heads each. Where do they look?


# %%
def about_to_name(line, beginning="i can't share the "):
    """Tokens up to the place where the topic comes, and the positions of the topic's letters in the line."""
    topic = world.PROMPTS[line].topic
    start = 1 + line.index(topic)  # 1: end-of-text comes first
    return np.array([[*prompt_ids(line), *tokenizer.encode(beginning)]]), slice(start, start + len(topic))


sft_arrays, shares, darkest = {name: parameter.data for name, parameter in sft.items()}, [], []
for line in held_out[::2]:
    tokens, letters = about_to_name(line)
    steps = forward(sft_arrays, config, tokens)
    shares.append([steps[f"weights {i}"][0, :, -1, letters].sum(axis=-1) for i in range(config.n_layer)])
    darkest.append(steps["weights 1"][0, 0, -1].argmax() - letters.start)
shares = np.mean(shares, axis=0)  # (layers, H)
print(f"\nthe last position's weight on the topic's letters, by layer and head, mean of {len(held_out[::2])} lines")
for i, row in enumerate(shares):
    print(f"  h.{i}: " + "  ".join(f"{share:.2f}" for share in row))
layer, head = np.unravel_index(shares.argmax(), shares.shape)
sizes = {name: array.std() for name, array in steps.items() if "states" in name or "adds" in name}
print("standard deviations: " + ", ".join(f"{name} {size:.2f}" for name, size in sizes.items()))
assert sizes["last states"] > 2 * sizes["first states"]
assert np.mean(np.array(darkest) > 0) > 0.5  # 0: the first letter

# %% [markdown]
# Two heads of the second layer have learned to look at the topic: head 0 with about 0.86 of its weight, head 3 with
# about 0.49. Naming the same topic makes the loss smaller. Each row of the picture is a held-out line, and the darkness
# of a letter its weight in head 0. In most lines the darkest is not the topic's first letter, and some weight falls
# elsewhere. So this shows where the head looks, not what comes of it; exercise 3 tests that. (The line "standard
# deviations": the last states are several times as large as the first.)


# %%
def draw(path, lines):
    from matplotlib.colors import LinearSegmentedColormap

    blue = LinearSegmentedColormap.from_list("blue", ["white", plots.PALETTE[0]])
    picture = np.zeros((len(lines), max(map(len, lines))))
    for row, line in enumerate(lines):
        weights = forward(sft_arrays, config, about_to_name(line)[0])[f"weights {layer}"]
        picture[row, : len(line)] = weights[0, head, -1, 1 : 1 + len(line)]
    with plots.figure(path, (6.4, 3.6), {"axes.grid": False}) as figure:
        axes = figure.subplots()
        axes.imshow(picture, cmap=blue, vmin=0, vmax=1, aspect="auto")
        for row, line in enumerate(lines):
            for column, letter in enumerate(line):
                ink = "white" if picture[row, column] > 0.9 else "black"
                axes.text(column, row, letter, ha="center", va="center", color=ink, fontsize=13)
        axes.set_axis_off()
        axes.set_title("where one head looks, just before the reply names the topic", fontsize=13)


path = pathlib.Path("05_transformer.png")
if plots.installed():
    draw(path, [next(line for line in held_out if world.PROMPTS[line].topic == topic) for topic in world.TOPICS])
print(f"picture: {path.name}" if plots.installed() else "the picture needs matplotlib (the `plot` extra)")

# %% [markdown]
# ## What was shown
# The lines of the formula, written in NumPy, give the library's logits. Each layer adds to the states what attention
# has fetched and what the MLP has made of it. Pre-training and fine-tuning minimise one loss, over all tokens of a text
# or over those of a reply. The base model continues a text, often as the customer. The SFT model replies.
#
# ## Exercises
# 1. Count the parameters in terms of V, C, n_positions and n_layer.
# 2. Find the bug: someone calls `forward` with `causal=False`. The shapes fit and the weights sum to 1. Which single
#    token of a text would you change, and which logits would you look at? Why could training reach a low loss, and the
#    model still not write?
# 3. Predict, then measure: switch off head 0 of the second layer, by setting its D rows of attn.c_proj to 0. What
#    happens to the probability of the topic's first letter? And with another head of that layer?

# %%
assert reply_share["SFT"] > reply_share["base"] + 0.2 and again_share["SFT"] < 0.05
np.testing.assert_allclose([reply_share["base"], again_share["base"]], [0.14, 0.33], atol=0.1)
np.testing.assert_allclose(shares[1, [0, 3]], [0.86, 0.49], atol=0.12)
assert gain > math.log(2) and (layer, head) == (1, 0) and shares[1, 3] == np.sort(shares, axis=None)[-2]
print("\n05: the forward by hand is the library's; held-out losses fall; SFT replies, the base often asks again")

# %% [markdown]
# ## Solutions
# 1. V C + n_positions C + n_layer (12 C^2 + 13 C) + 2 C. A layer has (3 + 1 + 4 + 4) C^2 numbers in its matrices,
#    (3 + 1 + 4 + 1) C in their biases and 4 C in two norms; the last norm has 2 C.
# 2. Change the last token. Without the mask, the logits at the first position move. A position then sees the very token
#    that it should predict, so the loss can fall by copying. When the model writes, that token does not exist yet.
# 3. It falls from about 0.67 to 0.21, towards what a guess among the eight topics would get, 1/8. Without head 3 it is
#    about 0.53, and without 1 or 2 about 0.68 or 0.61.

# %%
V, C = config.vocab_size, config.n_embd
count = V * C + config.n_positions * C + config.n_layer * (12 * C**2 + 13 * C) + 2 * C
assert sum(parameter.data.size for parameter in base.values()) == count

changed = np.hstack([batch[:, :-1], batch[:, :1]])
for causal in (True, False):
    before, after = (forward(arrays, small, each, causal)["logits"][:, 0] for each in (batch, changed))
    assert (abs(after - before).max() < 1e-12) == causal


def first_letter(arrays):
    """The mean probability of the first letter of the topic."""
    logits = [forward(arrays, config, about_to_name(line)[0])["logits"][0, -1] for line in held_out[::2]]
    letters = [tokenizer.encode(world.PROMPTS[line].topic)[0] for line in held_out[::2]]
    return softmax(np.array(logits))[np.arange(len(letters)), letters].mean()


def without(i):
    """The SFT model without head i of the layer."""
    name, D = f"h.{layer}.attn.c_proj.weight", config.n_embd // config.n_head
    keep = np.arange(config.n_embd) // D != i
    return {**sft_arrays, name: sft_arrays[name] * keep[:, None]}


print(f"probability of the topic's first letter: {first_letter(sft_arrays):.2f}; without head", end=" ")
off = [first_letter(without(i)) for i in range(config.n_head)]
print(", ".join(f"{i}: {probability:.2f}" for i, probability in enumerate(off)))
np.testing.assert_allclose([first_letter(sft_arrays), *off], [0.67, 0.21, 0.68, 0.61, 0.53], atol=0.1)
assert off[head] == min(off)
