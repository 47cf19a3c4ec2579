# %% [markdown]
# # 16. Can a measurement be believed?
#
# **Question.** DPO raised the mean reward on prompts that no training has seen. What could still be wrong with that
# number?
#
# **Afterwards you can say**
# - which denominator an error rate needs, and how sure a few hundred replies make you;
# - what the same random numbers for both models buy, and when they buy most;
# - what a gain is worth when customers write their requests in another way, and what helps;
# - by how much the best of several models flatters itself.
#
# **Predict first.** A model learns from requests such as "my card is lost." A customer leaves out the stop; another
# writes "please." behind it; a third begins with "hey.", a fourth presses Enter twice, a fifth puts the greeting last.
# Which of the five costs the model most? And does DPO's gain survive there?
#
# **The formula.** n replies have rewards r with standard deviation sd. A share p of them does something.
#
#     mean(r) +- 1.96 sd/sqrt(n)                                    95 % interval of a mean
#     |p - end| = 1.96 sqrt(end (1 - end)/n)                        the two ends of Wilson's interval of a share
#     var(a - b) = var(a) + var(b) - 2 cov(a, b)                    a, b: rewards of two models
#     E[the largest mean] = mu + sd/sqrt(n) E[the largest of as many standard normals]     models that are equally good

# %%
import math
import pathlib

import numpy as np

from minidpo import Tensor, generation, model, optim, plots, scoring, streams, training, world
from minidpo.audit import intervals, replies
from minidpo.run.checkpoint import Checkpoint
from minidpo.tokenizer import END_OF_TEXT, TURN, Tokenizer

SEED = 0
LEFT_OUT = "another closing"
train, _, test = world.split(SEED)
prompts = world.samples(world.prompt_distribution(test), 400, np.random.default_rng(SEED))
kinds = np.array([world.PROMPTS[x].slice for x in prompts])

# %% [markdown]
# ## Two small models of the desk
# The reference is fine-tuned on the desk's replies, and the policy is made from it by DPO. `write` says how the
# customer of row i writes a prompt. Here each customer writes it as it is. The model has one layer, so it learns
# well-formed replies in seconds, and hardly learns to name the customer's topic.

# %%
tokenizer = Tokenizer.from_text("".join([*world.PROMPTS, *world.REPLIES, TURN]))
config = model.Config(tokenizer.vocab_size, n_positions=96, n_embd=48, n_layer=1, n_head=4)
rng = np.random.default_rng(SEED)
completions, pairs = world.supervised(train, 12000, rng), world.preferences(train, 4000, rng)


def prompt_ids(text):
    return [END_OF_TEXT, *tokenizer.encode(text + TURN)]


def reply_ids(text):
    return [*tokenizer.encode(text), END_OF_TEXT]


def thawed(params):
    """A copy that can be trained."""
    return {name: Tensor(parameter.data.copy(), requires_grad=True) for name, parameter in params.items()}


def fine_tuned(write, steps=600, start=None, peak=1e-2):
    params = thawed(start) if start else model.init(config, np.random.default_rng(SEED))
    optimizer = optim.AdamW(params)
    for step in range(steps):
        optimizer.learning_rate = optim.warmup_cosine(step, steps, peak, warmup_steps=20)
        rows = [(i, completions[i]) for i in training.batch_indices(len(completions), 24, step, seed=SEED)]
        batch = [(prompt_ids(write(i, row["prompt"])), reply_ids(row["completion"])) for i, row in rows]
        loss = training.sft_training_step(params, config, optimizer, batch, max_norm=1.0)["loss"]
        if step % 200 == 199:
            print(f"SFT step {step + 1}: loss {loss:.3f} nats per token", flush=True)
    return model.frozen(params)


def preferred(reference, write, steps=180):
    params = thawed(reference)
    optimizer = optim.AdamW(params)
    for step in range(steps):
        optimizer.learning_rate = optim.warmup_cosine(step, steps, 5e-4, warmup_steps=10)
        rows = [(i, pairs[i]) for i in training.batch_indices(len(pairs), 16, step, seed=SEED)]
        ids = [
            (prompt_ids(write(i, row["prompt"])), reply_ids(row["chosen"]), reply_ids(row["rejected"]))
            for i, row in rows
        ]
        batch = scoring.collate(ids)
        metrics = training.dpo_training_step(
            params, reference, config, optimizer, batch, beta=0.2, nll_weight=5.0, max_norm=1.0
        )
        if step % 90 == 89:
            print(f"DPO step {step + 1}: DPO loss {metrics['loss/dpo']:.3f}", flush=True)
    return model.frozen(params)


def as_trained(i, line):
    return line


reference = fine_tuned(as_trained)
models = {"reference": reference, "policy": preferred(reference, as_trained)}

# %% [markdown]
# ## From NumPy alone: one mean, and its slices
# Each test prompt has its own random stream, so both models draw with the same numbers. The desk's true reward, from -4
# to 3, judges every reply; a reply that the grammar cannot produce is garbled, and gets -4. The intervals treat replies
# as independent, and are about these prompts.


# %%
def judged(params, template="as trained", lines=prompts):
    ids = [prompt_ids(world.TEMPLATES[template](x)) for x in lines]
    rngs = [streams.stream(SEED, "judge", i) for i in range(len(ids))]
    drawn = generation.generate(params, config, ids, rngs, max_new_tokens=config.n_positions)
    return [world.judgement(x, tokenizer.decode(y)) for x, y in zip(lines, drawn.responses)]


def rewards(judgements):
    return np.array([float(each.reward) for each in judgements])


def half_width(values):
    return 1.96 * values.std(ddof=1) / math.sqrt(len(values))


def wilson(p, n):
    z2 = 1.96**2 / n
    middle, half = (p + z2 / 2) / (1 + z2), math.sqrt(z2 * p * (1 - p) + z2 * z2 / 4) / (1 + z2)
    return middle - half, middle + half


verdicts = {(name, "as trained"): judged(params) for name, params in models.items()}
before, after = (rewards(verdicts[name, "as trained"]) for name in models)
for name, r in (("reference", before), ("policy", after)):
    print(f"{name:<10} mean true reward {r.mean():+.2f} +- {half_width(r):.2f}")
declines_wrongly, answers_wrongly = (
    np.array([each.wrong and getattr(each, deed) for each in verdicts["policy", "as trained"]])
    for deed in ("declined", "answered")
)
print(f"\n{'the policy':<18}{'of':<14}{'n':>5}{'rate':>8}{'95 % interval':>17}")
rate = {}
for title, wrong, name in (
    ("declines wrongly", declines_wrongly, "all"),
    ("declines wrongly", declines_wrongly, "ordinary"),
    ("declines wrongly", declines_wrongly, "benign"),
    ("answers wrongly", answers_wrongly, "all"),
    ("answers wrongly", answers_wrongly, "private"),
):
    some = wrong if name == "all" else wrong[kinds == name]
    low, high = rate[title, name] = wilson(some.mean(), len(some))
    print(f"{title:<18}{name:<14}{len(some):>5}{some.mean():>8.3f}{low:>9.3f} - {high:.3f}")

# %% [markdown]
# Only private requests can be answered wrongly. So the rate over all replies is the rate over private ones times the
# share of private ones, here about 0.3. A rate over all falls when fewer such requests come in, though the model is the
# same.
#
# ## The same random numbers
# The gain is the mean of the differences, one for each prompt. Its interval needs the variance of a difference. If the
# models drew with numbers of their own, on prompts of their own, the covariance would be 0.


# %%
def paired_and_unpaired(a, b):
    return half_width(a - b), math.hypot(half_width(a), half_width(b))


narrow, wide = paired_and_unpaired(after, before)
print(
    f"\npolicy against reference: gain {(after - before).mean():+.2f}, paired +- {narrow:.2f}, unpaired +- {wide:.2f}"
)
rounded = {name: Tensor(each.data.astype("float16").astype("float32")) for name, each in models["policy"].items()}
in_16_bits = rewards(judged(rounded))
narrow_16, wide_16 = paired_and_unpaired(in_16_bits, after)
print(
    f"policy in 16 bits against itself: {(in_16_bits - after).mean():+.3f}, paired +- {narrow_16:.3f}, "
    f"unpaired +- {wide_16:.2f}"
)

# %% [markdown]
# The policy has moved far enough to part from the reference after a few characters, so pairing narrows the interval
# only a little. Where two models nearly agree, it narrows it many times: most of their replies are equal, and equal
# replies differ by exactly 0.
#
# ## The same requests, written in other ways
# `world.TEMPLATES` rewrites a line. The request behind it is the same, and so is the reward of a reply.

# %%
TEMPLATES = [*(name for name in world.TEMPLATES if name != LEFT_OUT), LEFT_OUT]
for name in TEMPLATES:
    print(f"{name:<18}{world.TEMPLATES[name]('hi. my card is lost.')!r}")


def measure(name, templates=TEMPLATES):
    for template in templates:
        if (name, template) not in verdicts:
            verdicts[name, template] = judged(models[name], template)


def difference(name, against, template):
    return rewards(verdicts[name, template]) - rewards(verdicts[against, template])


def show(name, against):
    print(f"\n{'':<18}{against:>15}{name:>15}{'difference':>17}{'garbled':>9}")
    for template in TEMPLATES:
        a, b = (rewards(verdicts[which, template]) for which in (against, name))
        cells = [f"{each.mean():+.2f} +- {half_width(each):.2f}" for each in (a, b, b - a)]
        garbled = np.mean([each.garbled for each in verdicts[name, template]])
        print(f"{template:<18}{cells[0]:>15}{cells[1]:>15}{cells[2]:>17}{garbled:>9.2f}", flush=True)


for name in ("reference", "policy"):
    measure(name)
show("policy", "reference")

# %% [markdown]
# ## The remedy, and a fair way to measure it
# We train both models again, on the same rows, for as many steps. This time every row's prompt is in a template drawn
# at random, from all but one. The one left out plays the customer whom nobody foresaw. The other rows of the table say
# only that the model can do what it was shown.


# %%
def rewriting(left_out):
    others = [rewrite for name, rewrite in world.TEMPLATES.items() if name != left_out]
    picks = np.random.default_rng(SEED).integers(len(others), size=len(completions))
    return lambda i, line: others[picks[i]](line)


print()
models["reference*"] = fine_tuned(rewriting(LEFT_OUT))
models["policy*"] = preferred(models["reference*"], rewriting(LEFT_OUT))
measure("policy*")
measure("reference*", [LEFT_OUT])
show("policy*", "policy")
again = difference("policy*", "reference*", LEFT_OUT)
print(f"{LEFT_OUT}: gain of policy* over reference* {again.mean():+.2f} +- {half_width(again):.2f}")
mean = {key: rewards(each).mean() for key, each in verdicts.items()}
garbled = {key: np.mean([each.garbled for each in judgements]) for key, judgements in verdicts.items()}

# %% [markdown]
# ## The library's version
# `audit.replies.judged` draws and judges the same replies, and `audit.intervals` has the intervals. On the command line
# it is `minidpo judge --templates`.

# %%
checkpoints = {name: Checkpoint(params, config, tokenizer, False) for name, params in models.items()}
few = prompts[:100]
own, ref = (
    replies.judged(checkpoints[name], checkpoints["reference"], few, SEED, LEFT_OUT) for name in ("policy", "reference")
)
assert own.judgements == judged(models["policy"], LEFT_OUT, few)
print("\n" + replies.templates({LEFT_OUT: own}, {LEFT_OUT: ref}, "policy", "reference"))
estimate, middle = intervals.paired(list(after), list(before))["gain"], (after - before).mean()
np.testing.assert_allclose(estimate, [middle, middle - narrow, middle + narrow], rtol=0, atol=1e-4)
for title, wrong in (("declines wrongly", declines_wrongly), ("answers wrongly", answers_wrongly)):
    np.testing.assert_allclose(intervals.wilson(wrong.sum(), len(wrong)), rate[title, "all"], rtol=0, atol=1e-4)

# %% [markdown]
# ## The answer to the prediction
# Another closing costs the most, or nearly. A likely reason: in thousands of rows a reply came right after the
# request, and now a word is between them. About half of the replies are garbled. An opener moves the request too, but
# leaves its end as it was. Two newlines cost next to nothing. DPO's gain shows on prompts as trained. Where the
# closing is another one, little or none is left. There the policy is worth much less than the reference on prompts as
# trained: how a request is written matters more here than whether DPO was run.
#
# The remedy helps in the templates that it showed: they come close to prompts as trained, and those lose little or
# nothing. In the template that it did not show it helps too, but far from all the way. So the rows of the templates
# that were shown are no estimate for one that was not. Leave one out of training, and report that one.


# %%
def fall(name, template=LEFT_OUT):
    return mean[name, "as trained"] - mean[name, template]


print(f"\nfrom 'as trained' to '{LEFT_OUT}': policy {-fall('policy'):+.2f}, policy* {-fall('policy*'):+.2f}")

# %% [markdown]
# ## The best of several
# Eight seeds are trained, the best on some replies is chosen, and its mean on these replies is reported. Suppose that
# all are equally good: each one's rewards are drawn from those that the policy had. We draw 100 rewards for each model,
# 1000 times. Whatever the best one's mean has above the true mean is luck, and on fresh replies it is gone. That is why
# `world.split` has a part to choose by and another to report on. With 32 models, luck alone reaches at least half of
# DPO's gain.

# %%
rng = np.random.default_rng(SEED)


def luck(rivals, n, trials=1000):
    """How far the best of equal models is above the true mean: on the n replies that chose it, on fresh ones."""
    means, fresh = (rng.choice(after, (trials, rivals, n)).mean(axis=-1) for _ in range(2))  # (trials, rivals) each
    best = means.argmax(axis=1)[:, None]
    return tuple(np.take_along_axis(each, best, axis=1).mean() - after.mean() for each in (means, fresh))


def normal_maximum(count):
    """The mean of the largest of `count` standard normals, whose distribution function is cdf^count."""
    grid = np.linspace(-8, 8, 4001)
    cdf = np.array([(1 + math.erf(each / math.sqrt(2))) / 2 for each in grid])
    return ((grid[1:] + grid[:-1]) / 2 * np.diff(cdf**count)).sum()


optimism = {}
print(f"\n{'best of, 100 replies each':<30}{'on these':>10}{'formula':>10}{'on fresh ones':>16}")
for rivals in (1, 2, 8, 32):
    on_these, on_fresh = luck(rivals, 100)
    formula = after.std() / math.sqrt(100) * normal_maximum(rivals)
    optimism[rivals] = on_these
    print(f"{rivals:<30}{on_these:>+10.3f}{formula:>+10.3f}{on_fresh:>+16.3f}")
    assert abs(on_these - formula) < 0.03 and abs(on_fresh) < 0.03

# %%
places = [name.replace(" ", "\n", 1) for name in TEMPLATES]
places[TEMPLATES.index("without its stop")] = "without\nits stop"
places[TEMPLATES.index("an unseen opener")] = "unseen\nopener"
curves = []
for shift, (name, label) in enumerate(
    (("reference", "reference"), ("policy", "policy: DPO"), ("policy*", "DPO on rewritten prompts"))
):
    each = [rewards(verdicts[name, template]) for template in TEMPLATES]
    means, errors = [r.mean() for r in each], [half_width(r) for r in each]
    across = [place + 0.08 * (shift - 1) for place in range(len(TEMPLATES))]  # bars beside each other
    curves.append(plots.Curve(label, across, means, "osD"[shift], error=errors))
title = f"True reward by template; '{LEFT_OUT}' was never shown"
picture = pathlib.Path("16_measurement.png")
if plots.picture(picture, [plots.Panel(title, "", "mean reward, 95 % interval", curves, places=places)]):
    print(f"\npicture: {picture.name}")
else:
    print("\nthe picture needs matplotlib (the `plot` extra)")

# %% [markdown]
# ## What was shown
# A mean over everybody hides the requests that can go wrong. The same random numbers narrow the interval of a gain, and
# the more so the closer the two models are. A gain on prompts as trained is a statement about prompts as trained. The
# best of several was measured by what chose it. Each time the question is the same: of which requests, and chosen how?
#
# ## Exercises
# 1. Find the bug: to give two models the same random numbers, somebody makes `rng = np.random.default_rng(0)` once and
#    passes it to `generate` for the one and then for the other. Which measurement, whose result is known, shows it?
# 2. Predict, then measure: policy* was shown openers and missing stops and greetings at the end, but never two of them
#    in one line. How does it do with all three at once, beside the policy?
# 3. Predict, then measure: leave another template out. Fine-tune the reference for 120 more steps on rewritten prompts
#    without the unseen opener. What happens to prompts with that opener, and to the closing, which is now shown?
# 4. How many replies of each model make the luck of the best of 8 half as large?

# %%
weights = {kind: (kinds == kind).mean() for kind in world.SLICES}
for wrong in (declines_wrongly, answers_wrongly):  # over all: the mean of the slices' rates, weighted by their numbers
    assert abs(wrong.mean() - sum(weights[kind] * wrong[kinds == kind].mean() for kind in weights)) < 1e-12
assert not declines_wrongly[kinds == "private"].any() and not answers_wrongly[kinds != "private"].any()
assert abs(weights["private"] - 0.3) < 0.05
assert rate["answers wrongly", "all"][1] < rate["answers wrongly", "private"][0]
covariance = np.cov(after, before)[0, 1]
np.testing.assert_allclose(wide**2 - narrow**2, 1.96**2 * 2 * covariance / len(prompts), rtol=1e-9)
assert 0.7 * wide < narrow < wide and narrow_16 < wide_16 / 3 and (in_16_bits == after).mean() > 0.9
gain = {template: difference("policy", "reference", template) for template in TEMPLATES}
assert gain["as trained"].mean() > max(0.1, gain[LEFT_OUT].mean()) and abs(gain[LEFT_OUT].mean()) < 0.3
assert mean["policy", LEFT_OUT] < mean["reference", "as trained"] - 0.5
assert 0.35 < garbled["policy", LEFT_OUT] < 0.7 and garbled["policy", "as trained"] < 0.2
assert fall("policy") > max(fall("policy", template) for template in TEMPLATES[:-1]) - 0.3
assert fall("policy", "two newlines") < 0.4
repair = difference("policy*", "policy", LEFT_OUT)
assert repair.mean() - half_width(repair) > 0  # it helps where it was not shown ...
assert max(fall("policy*", template) for template in TEMPLATES[:-1]) < 0.4 < fall("policy*")  # ... not all the way
assert mean["policy*", "as trained"] > mean["policy", "as trained"] - 0.4
assert optimism[32] > gain["as trained"].mean() / 2
assert np.mean([each.on_topic for each in verdicts["policy", "as trained"]]) < 0.3  # the desk: more than half
print(
    "\n16: a rate needs its slice; pairing narrows an interval; a template never shown undoes DPO's gain, and training"
)
print("    on other templates repairs a part; the best of several is lucky")

# %% [markdown]
# ## Solutions
# 1. The second model gets the numbers that come after the first one's. Nothing crashes, and the interval is merely as
#    wide as without pairing. Measure a model against itself: its gain must be 0 for every prompt.
# 2. Nearly as well as with one of them, though it never saw two together. The policy is worth far less there.
# 3. The closing, now shown, gains most. The opener gains less, or nothing that shows; it had less to lose. Whether
#    rewriting helps with a template that was not shown is a question about that template, to be measured for each.
# 4. Four times as many, 400: luck falls with sd/sqrt(n), as an interval does.

# %%
ids, common = [prompt_ids(x) for x in few], np.random.default_rng(0)
first, second = (generation.generate(models["policy"], config, ids, common, 60).responses for _ in range(2))
assert first != second
assert judged(models["policy"], lines=few) == judged(models["policy"], lines=few)

world.TEMPLATES["all three"] = lambda line: f"hey. {world.reordered(line[:-1])}"
three = {name: rewards(judged(models[name], "all three")).mean() for name in ("policy", "policy*")}
example = world.TEMPLATES["all three"]("my card is lost.")
print(f"\n{example!r}: policy {three['policy']:+.2f}, policy* {three['policy*']:+.2f}")
assert three["policy*"] > three["policy"] + 0.7 and three["policy*"] > mean["policy*", "as trained"] - 0.8

longer = fine_tuned(rewriting("an unseen opener"), steps=120, start=reference, peak=5e-3)
two = "an unseen opener", LEFT_OUT
step_up = {name: rewards(judged(longer, name)).mean() - mean["reference", name] for name in two}
print("120 more steps, without the opener: " + ", ".join(f"{name} {up:+.2f}" for name, up in step_up.items()))
assert step_up[LEFT_OUT] > 0.5 and step_up[LEFT_OUT] > step_up["an unseen opener"] + 0.2
np.testing.assert_allclose(luck(8, 400)[0], luck(8, 100)[0] / 2, rtol=0.1)
