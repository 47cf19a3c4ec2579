# %% [markdown]
# # 16. Can a measurement be believed?
#
# **Question.** After DPO the mean reward is higher, on prompts that no training has seen. Was it DPO that raised it,
# and what else could be wrong with that number?
#
# **Afterwards you can say**
# - which denominator an error rate needs, and how sure a few hundred replies make you;
# - what the same random numbers for both models buy, and when they buy most;
# - why a gain over the reference does not say its cause, and which control does;
# - what a gain is worth when customers write their requests in another way, and what helps;
# - by how much the best of several models flatters itself.
#
# **Predict first.** DPO with a likelihood term trains on pairs, and its replies earn about half a point more than the
# reference's. Now throw the rejected replies away. Fine-tune the reference on the chosen ones, for as many steps. How
# much of the half point do you get?
#
# And: the models learn from requests such as "my card is lost." A customer leaves out the stop; another writes
# "please." behind it; a third begins with "hey.", a fourth presses Enter once more, a fifth puts the greeting last.
# Which of the five costs most?
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
# ## Three small models of the desk
# The **reference** is fine-tuned on the desk's replies. The **policy** is made from it on pairs, and its loss has two
# terms: that of DPO, and a likelihood term that keeps the chosen replies from becoming unlikely (tutorial 13).
#
#     L = -log sigma(z) - nll_weight * (mean of log pi(token | all before it), over the tokens of chosen replies)
#
# The **control** is made from the reference too, in as many steps, from the same rows in the same order, at the same
# learning rates. But it is fine-tuned on the chosen replies alone: it has the second term, not the first.
#
# `write` says how the customer of row i writes a prompt; here, as it is. The model has one layer: it learns well-formed
# replies in seconds, and hardly learns to name the customer's topic.

# %%
tokenizer = Tokenizer.from_text("".join([*world.PROMPTS, *world.REPLIES, TURN]))
config = model.Config(tokenizer.vocab_size, n_positions=96, n_embd=48, n_layer=1, n_head=4)
rng = np.random.default_rng(SEED)
completions, pairs = world.supervised(train, 12000, rng), world.preferences(train, 4000, rng)


def as_trained(i, line):
    return line


def prompt_ids(text):
    return [END_OF_TEXT, *tokenizer.encode(text + TURN)]


def reply_ids(text):
    return [*tokenizer.encode(text), END_OF_TEXT]


def trained(what, start, one_step, rows, size=16, steps=300, peak=3e-4):
    """A trained copy of the parameters; `one_step` gets them, the optimizer, and the numbers of a batch's rows."""
    params = {name: Tensor(parameter.data.copy(), requires_grad=True) for name, parameter in start.items()}
    optimizer = optim.AdamW(params)
    for step in range(steps):
        optimizer.learning_rate = optim.warmup_cosine(step, steps, peak, warmup_steps=steps // 30)
        loss = one_step(params, optimizer, training.batch_indices(len(rows), size, step, seed=SEED))
        if step % 300 == 299:
            print(f"{what}, step {step + 1}: loss {loss:.3f}", flush=True)
    return model.frozen(params)


def fine_tuned(what, start, rows, reply, write=as_trained, **settings):
    def one_step(params, optimizer, batch):
        ids = [(prompt_ids(write(i, rows[i]["prompt"])), reply_ids(rows[i][reply])) for i in batch]
        return training.sft_training_step(params, config, optimizer, ids, max_norm=1.0)["loss"]

    return trained(what, start, one_step, rows, **settings)


def preferred(what, start):
    def one_step(params, optimizer, batch):
        rows = [pairs[i] for i in batch]
        ids = [(prompt_ids(row["prompt"]), reply_ids(row["chosen"]), reply_ids(row["rejected"])) for row in rows]
        ref_logp_w, ref_logp_l = (each.data for each in scoring.shared_logprobs(start, config, ids))
        scored = scoring.Batch(ids, ref_logp_w, ref_logp_l)
        settings = {"beta": 0.2, "nll_weight": 2.0, "max_norm": 1.0}
        return training.dpo_training_step(params, start, config, optimizer, scored, **settings)["loss"]

    return trained(what, start, one_step, pairs)


new = model.init(config, np.random.default_rng(SEED))
reference = fine_tuned("reference", new, completions, "completion", size=24, steps=600, peak=1e-2)
models = {
    "reference": reference,
    "control": fine_tuned("control", reference, pairs, "chosen"),
    "policy": preferred("policy", reference),
}

# %% [markdown]
# ## From NumPy alone: one mean, and its slices
# Each test prompt has its own random stream, so all models draw with the same numbers. The desk's true reward, from -4
# to 3, judges every reply. One that the desk's grammar, its rules for replies, cannot produce is garbled, and gets -4.
# The intervals treat replies as independent, and say nothing about other prompts.


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
before, plain, after = (rewards(verdicts[name, "as trained"]) for name in models)
for name, r in zip(models, (before, plain, after)):
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


def compare(title, a, b):
    narrow, wide = paired_and_unpaired(a, b)
    print(f"{title:<33} {(a - b).mean():+.3f}, paired +- {narrow:.3f}, unpaired +- {wide:.2f}")
    return narrow, wide


print()
narrow, wide = compare("policy - reference", after, before)
rounded = {name: Tensor(each.data.astype("float16").astype("float32")) for name, each in models["policy"].items()}
in_16_bits = rewards(judged(rounded))
narrow_16, wide_16 = compare("policy in 16 bits - policy", in_16_bits, after)

# %% [markdown]
# The policy has moved far enough to part from the reference after a few characters, so pairing narrows the interval
# only a little. Where two models nearly agree, it narrows it many times: most of their replies are equal, and equal
# replies differ by exactly 0.
#
# ## Was it DPO?
# The policy is better than the reference, beyond the interval. That does not say why: it has the DPO term, and it was
# also trained for longer, on replies that somebody preferred. The control has all of that but the DPO term.

# %%
print()
compare("control - reference", plain, before)
own_part, own_part_unpaired = compare("policy - control", after, plain)

# %% [markdown]
# The control has a large part of the gain, and never saw a rejected reply. DPO's own part is the difference between
# policy and control. It is about as large as the half width of its interval: 400 prompts can hardly tell it from 0. And
# the interval is about these two models. Another seed would train two others.
#
# So compare with a control, which differs in one thing only, and train several seeds.
# [The usual story, measured](../benchmarks/README.md#the-usual-story-measured) does both with a larger model of the
# desk. There DPO with a likelihood term gains more than fine-tuning on the chosen replies, and DPO without it less.
#
# ## The same requests, written in other ways
# `world.TEMPLATES` rewrites a line. The request behind it is the same, and so is the reward of a reply.

# %%
TEMPLATES = [*(name for name in world.TEMPLATES if name != LEFT_OUT), LEFT_OUT]
print()
for name in TEMPLATES:
    print(f"{name:<18}{world.TEMPLATES[name]('hi. my card is lost.') + TURN!r}")


def measure(name):
    for template in TEMPLATES:
        verdicts[name, template] = judged(models[name], template)


def difference(name, against, template):
    return rewards(verdicts[name, template]) - rewards(verdicts[against, template])


def show(name, against):
    print(f"\n{'':<18}{against:>15}{name:>20}{'difference':>17}{'garbled':>9}")
    for template in TEMPLATES:
        a, b = (rewards(verdicts[which, template]) for which in (against, name))
        cells = [f"{each.mean():+.2f} +- {half_width(each):.2f}" for each in (a, b, b - a)]
        garbled = np.mean([each.garbled for each in verdicts[name, template]])
        print(f"{template:<18}{cells[0]:>15}{cells[1]:>20}{cells[2]:>17}{garbled:>9.2f}", flush=True)


for name in models:
    measure(name)
show("policy", "reference")

# %% [markdown]
# ## The remedy, and a fair way to measure it
# We train the control again, on the same rows. This time every row's prompt is in a template drawn at random, from all
# but one. The one left out plays the customer whom nobody foresaw. The other rows of the table say only that the model
# can do what it was shown.

# %%
others = [rewrite for name, rewrite in world.TEMPLATES.items() if name != LEFT_OUT]
picks = np.random.default_rng(SEED).integers(len(others), size=len(pairs))


def in_a_template(i, line):
    return others[picks[i]](line)


print()
REWRITTEN = "control, rewritten"
models[REWRITTEN] = fine_tuned(REWRITTEN, reference, pairs, "chosen", in_a_template)
measure(REWRITTEN)
show(REWRITTEN, "control")
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
# A large part of the half point comes from the chosen replies alone, without any pair.
#
# Another closing costs the most, or nearly. A likely reason: in thousands of rows a reply came right after the request,
# and now a word is between them. Nearly half of the replies are garbled. An opener moves the request too, but leaves
# its end as it was. One more newline costs next to nothing. The policy's gain over the reference carries over to the
# other templates, though none was shown. But where the closing is another one, the policy is worth much less than the
# reference on prompts as trained: how a request is written matters more here than which of the three models answers.
#
# The remedy helps where a template cost much and is now shown, with the opener and the greeting: they come close to
# prompts as trained. In the template that it did not show it helps too, but far from all the way. So the rows of the
# templates that were shown are no estimate for one that was not. Leave one out, and report that one.


# %%
def fall(name, template=LEFT_OUT):
    return mean[name, "as trained"] - mean[name, template]


print(f"\nfrom 'as trained' to '{LEFT_OUT}': " + ", ".join(f"{name} {-fall(name):+.2f}" for name in models))

# %% [markdown]
# ## The best of several
# Eight seeds are trained, the best on some replies is chosen, and its mean on these replies is reported. Suppose that
# all are equally good: each one's rewards are drawn from those that the policy had. We draw them for each model, 1000
# times. What the best one's mean has above the true mean is luck; on fresh replies it is gone. That is why
# `world.split` has a part to choose by and another to report on. With 100 replies each, the best of 8 has about a
# quarter of a point of luck. Four times as many replies, as many as above, halve it.

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
print(f"\n{'best of':<10}{'replies each':>14}{'on these':>10}{'formula':>10}{'on fresh ones':>16}")
for rivals, n in ((1, 100), (2, 100), (8, 100), (32, 100), (8, 400)):
    on_these, on_fresh = luck(rivals, n)
    formula = after.std() / math.sqrt(n) * normal_maximum(rivals)
    optimism[rivals, n] = on_these
    print(f"{rivals:<10}{n:>14}{on_these:>+10.3f}{formula:>+10.3f}{on_fresh:>+16.3f}")
    assert abs(on_these - formula) < 0.03 and abs(on_fresh) < 0.03

# %%
places = [name.replace(" ", "\n", 1) for name in TEMPLATES]
places[TEMPLATES.index("without its stop")] = "without\nits stop"
places[TEMPLATES.index("an unseen opener")] = "unseen\nopener"
labels = "reference", "control: chosen replies alone", "policy: DPO + likelihood", "control, five templates shown"
curves = []
for shift, (name, label) in enumerate(zip(models, labels)):
    each = [rewards(verdicts[name, template]) for template in TEMPLATES]
    means, errors = [r.mean() for r in each], [half_width(r) for r in each]
    across = [place + 0.16 * (shift - 1.5) for place in range(len(TEMPLATES))]  # bars beside each other
    curves.append(plots.Curve(label, across, means, "osD^"[shift], joined=False, error=errors))
title = f"True reward by template; '{LEFT_OUT}' was shown to no model"
picture = pathlib.Path("16_measurement.png")
if plots.picture(picture, [plots.Panel(title, "", "mean reward, 95 % interval", curves, places=places)]):
    print(f"\npicture: {picture.name}")
else:
    print("\nthe picture needs matplotlib (the `plot` extra)")

# %% [markdown]
# ## What was shown
# A mean over everybody hides the requests that can go wrong. The same random numbers narrow the interval of a gain, and
# the more so the closer the two models are. A gain over the reference says nothing about its cause: a control does. A
# gain on prompts as trained says little about prompts in a template that nobody foresaw: one left out does. The best of
# several was measured by what chose it. Each time ask: compared with what, on which requests, and chosen how?
#
# ## Exercises
# 1. Find the bug: to give two models the same random numbers, somebody makes `rng = np.random.default_rng(0)` once and
#    passes it to `generate` for the one and then for the other. Which measurement, whose result is known, shows it?
# 2. Predict, then measure: the control with rewritten prompts was shown openers and missing stops and greetings at the
#    end, but never two of them in one line. How does it do with all three at once, beside the plain control?
# 3. Derive: DPO's own part should be told from 0 if it is 0.1. From the widths above, how many prompts does it take if
#    the replies are paired, and how many if not? What is pairing worth in prompts?
# 4. Predict, then measure: fine-tune the reference on the *rejected* replies. Does the mean reward rise or fall?

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
assert gain["as trained"].mean() - half_width(gain["as trained"]) > 0 and 0.3 < gain["as trained"].mean() < 0.75
assert 0.3 < (plain - before).mean() / gain["as trained"].mean() < 1.25  # a large part
assert -0.1 < (after - plain).mean() < 2.5 * own_part
assert min(gain[template].mean() for template in TEMPLATES[:-1]) > 0.05
assert mean["policy", LEFT_OUT] < mean["reference", "as trained"] - 0.5
assert 0.3 < garbled["policy", LEFT_OUT] < 0.6 and garbled["policy", "as trained"] < 0.2
assert fall("policy") > max(fall("policy", template) for template in TEMPLATES[:-1]) - 0.3
assert fall("policy", "two newlines") < 0.4
repair = {template: difference(REWRITTEN, "control", template) for template in TEMPLATES}
for template in ("an unseen opener", "greeting last", LEFT_OUT):  # it helps, and also where it was not shown ...
    assert repair[template].mean() - half_width(repair[template]) > 0
assert max(fall(REWRITTEN, template) for template in TEMPLATES[:-1]) < 0.4 < fall(REWRITTEN)  # ... not all the way
assert 0.2 < optimism[8, 100] < 0.3 and abs(optimism[8, 400] - optimism[8, 100] / 2) < 0.02
assert np.mean([each.on_topic for each in verdicts["policy", "as trained"]]) < 0.3  # the desk: more than half
print("\n16: a rate needs its slice; pairing narrows an interval; a control has a large part of the policy's gain; a")
print("    template never shown costs more than that; the best of several is lucky")

# %% [markdown]
# ## Solutions
# 1. The second model gets the numbers that come after the first one's. Nothing crashes, and the interval is merely as
#    wide as without pairing. Measure a model against itself: its gain must be 0 for every prompt.
# 2. Far better than the plain control, and worse than with one of them: two in one line were never shown.
# 3. The half width falls as 1/sqrt(n), so n = 400 (half width/0.1)^2: more than 1000 prompts, and unpaired more still.
#    The ratio is that of the variances, wide^2/narrow^2. For the policy in 16 bits it is above 50.
# 4. It does not rise; here it falls a little. So the control's gain is not that of more training. It comes from the
#    judgements, which mostly choose the higher reward.

# %%
ids, common = [prompt_ids(x) for x in few], np.random.default_rng(0)
first, second = (generation.generate(models["policy"], config, ids, common, 60).responses for _ in range(2))
assert first != second
assert judged(models["policy"], lines=few) == judged(models["policy"], lines=few)

world.TEMPLATES["all three"] = lambda line: f"hey. {world.reordered(line[:-1])}"
three = {name: rewards(judged(models[name], "all three")) for name in ("control", REWRITTEN)}
example = world.TEMPLATES["all three"]("my card is lost.")
print(f"\n{example!r}: " + ", ".join(f"{name} {each.mean():+.2f}" for name, each in three.items()))
assert three["control"].mean() + 0.5 < three[REWRITTEN].mean() < mean[REWRITTEN, "greeting last"]
needed = [400 * (half / 0.1) ** 2 for half in (own_part, own_part_unpaired)]
print(f"to tell 0.1 from 0: {needed[0]:.0f} prompts if paired, {needed[1]:.0f} if not")
np.testing.assert_allclose(needed[0], (1.96 * (after - plain).std(ddof=1) / 0.1) ** 2, rtol=1e-9)
assert 1000 < needed[0] < needed[1] and wide_16**2 > 50 * narrow_16**2
rejected = rewards(judged(fine_tuned("on rejected replies", reference, pairs, "rejected")))
compare("on rejected replies - reference", rejected, before)
compare("on rejected - on chosen replies", rejected, plain)
assert (rejected - before).mean() < 0.15 and (plain - rejected).mean() > half_width(plain - rejected)
