# %% [markdown]
# # 19. Somebody else's DPO
#
# **Question.** Somebody wrote a DPO loss, and it looks correct. Which experiments would show that it is not, and which
# show nothing?
#
# **Afterwards you can say**
# - where to look first in somebody's DPO code, and what to try on it;
# - why a loss that starts at log 2, falls, and stays finite may still be wrong;
# - what `minidpo verify` and `minidpo doctor` can see, and what neither of them can.
#
# **Predict first.** Below are five pieces of code, and some have a bug. Three tests are easy, because they need nothing
# to compare with. Where policy = reference, the loss is log 2. In training, the loss falls. For a pair that is ranked
# very wrongly, the loss is finite. How many of the bugs do these three tests find together?
#
# **The formula.** A DPO program has two halves. This is what each should compute:
#
#     scorer   log pi(y|x) = sum over the tokens of y of log pi(token | all that comes before it)
#     loss     z = beta ((logp_w - ref_logp_w) - (logp_l - ref_logp_l))
#              L = -log sigma(z) = log(1 + e^-z),   the mean over the pairs

# %%
import itertools
import math
import pathlib

import numpy as np

from minidpo import exact, plots, verify


def log_softmax(logits):
    below = logits - logits.max(axis=-1, keepdims=True)
    return below - np.log(np.exp(below).sum(axis=-1, keepdims=True))


# %% [markdown]
# ## Five pieces
# Pieces 1 and 3 are scorers. `labels`, here not people's judgements, has
# the tokens of the response, each at its position. At prompt and pads it has -100: nothing may be scored there.
# `logits[:, t]` has read the tokens up to position t, and predicts the next one (tutorial 04). Pieces 2, 4 and 5 are
# losses. `log_softmax` is correct.
#
# Read each piece before you go on. Write down what is wrong with it, or "correct". At least one piece is correct.


# %%
def get_batch_logps(logits, labels):  # piece 1
    loss_mask = labels != -100
    labels = np.where(loss_mask, labels, 0)  # any token will do where the mask is 0
    logits, labels, loss_mask = logits[:, :-1], labels[:, 1:], loss_mask[:, :-1]
    per_token_logps = np.take_along_axis(log_softmax(logits), labels[..., None], axis=-1)[..., 0]
    return (per_token_logps * loss_mask).sum(-1)


def preference_loss(  # piece 2
    policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps, beta
):
    ref_logratios = reference_rejected_logps - reference_chosen_logps
    pi_logratios = policy_rejected_logps - policy_chosen_logps
    return np.logaddexp(0.0, beta * (pi_logratios - ref_logratios)).mean()  # log(1 + exp(...))


def sequence_logprob(logits, labels):  # piece 3
    shift_logits, shift_labels = logits[:, :-1, :], labels[:, 1:]
    response_mask = shift_labels != -100
    gather_index = np.where(response_mask, shift_labels, 0)[:, :, None]
    token_logprobs = np.take_along_axis(log_softmax(shift_logits), gather_index, axis=2).squeeze(2)
    return (token_logprobs * response_mask).sum(axis=1) / response_mask.sum(axis=1)


def dpo_loss(policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps, beta=0.1):  # piece 4
    chosen_rewards = beta * (policy_chosen_logps - ref_chosen_logps)
    rejected_rewards = beta * (policy_rejected_logps - ref_rejected_logps)
    losses = np.logaddexp(0.0, -beta * (chosen_rewards - rejected_rewards))
    return losses.mean(), chosen_rewards, rejected_rewards


def compute_dpo_loss(pi_logps_w, pi_logps_l, ref_logps_w, ref_logps_l, beta, eps=1e-12):  # piece 5
    logits = (pi_logps_w - pi_logps_l) - (ref_logps_w - ref_logps_l)
    prob_chosen = 1 / (1 + np.exp(-beta * logits))
    return -np.log(prob_chosen + eps).mean()  # eps: never the log of 0


# %% [markdown]
# ## From NumPy alone: seven experiments
# Each piece becomes a program beside a correct other half. The models are tables, as in tutorial 00: a row of logits
# for each last token. There are five tokens. 0 is end-of-text, and the pads are 0, too.


# %%
def correct_scorer(logits, labels):  # in loops, token by token
    return np.array([
        sum(log_softmax(rows[place - 1])[own[place]] for place in np.flatnonzero(own != -100))
        for rows, own in zip(logits, labels)
    ])  # fmt: skip


def correct_loss(logp_w, logp_l, ref_logp_w, ref_logp_l, beta):
    return np.logaddexp(0, -beta * ((logp_w - ref_logp_w) - (logp_l - ref_logp_l))).mean()


programs = [
    (get_batch_logps, correct_loss), (correct_scorer, preference_loss), (sequence_logprob, correct_loss),
    (correct_scorer, dpo_loss), (correct_scorer, compute_dpo_loss),
]  # fmt: skip
beta = 0.1
policy, reference = np.random.default_rng(0).normal(size=(2, 5, 5))  # logits: last token, next token
prompt, chosen, rejected = [3, 1], [2, 4, 0], [4, 1, 3, 1, 0]


def scores(scorer, models, responses=(chosen, rejected), width=9):
    """The score of each response under each model: logp_w, logp_l, ref_logp_w, ref_logp_l for a pair."""
    pads = [width - len(prompt + response) for response in responses]
    ids = np.array([prompt + response + [0] * n for response, n in zip(responses, pads)])
    labels = np.array([[-100] * len(prompt) + response + [-100] * n for response, n in zip(responses, pads)])
    return [score for table in models for score in scorer(table[ids], labels)]


def loss_of(loss, numbers):
    """The loss of one pair, from four log-probabilities."""
    out = loss(*(np.array([number]) for number in numbers), beta)
    return float(np.mean(out[0] if isinstance(out, tuple) else out))


def training(scorer, loss, frozen=True, steps=20, rate=1.0, eps=1e-5):
    """Gradient descent from policy = reference, by finite differences; a row of metrics for each step."""
    table, fixed, rows = reference.copy(), reference, []
    for step in range(1, steps + 1):
        fixed = fixed if frozen else table.copy()
        slopes = np.zeros_like(table)
        for place in np.ndindex(table.shape):
            for shift in (eps, -eps):
                nudged = table.copy()
                nudged[place] += shift
                slopes[place] += loss_of(loss, scores(scorer, (nudged, fixed))) / (2 * shift)
        four = logp_w, logp_l, ref_logp_w, ref_logp_l = scores(scorer, (table, fixed))
        rewards = {"rewards/chosen": beta * (logp_w - ref_logp_w), "rewards/rejected": beta * (logp_l - ref_logp_l)}
        sizes = {"logps/chosen": float(logp_w), "grad_norm": np.linalg.norm(slopes)}
        rows.append({"step": step, "loss": loss_of(loss, four), **rewards, **sizes})
        table -= rate * slopes
    return rows


# %% [markdown]
# Three of the experiments are from the course. In tutorial 03, log(1 + e^-z) is -z where z is far below 0. In tutorial
# 04, the probabilities of all complete responses add up to 1. Tutorial 09 has four numbers whose loss is 0.5544.

# %%
very_wrong = (-10010, -10, -10, -10)  # z = -1000
every = exact.complete_responses(vocab_size=5, cap=3)
np.seterr(over="ignore")  # piece 5, on the very wrong pair


def falls(scorer, loss):
    return all(later["loss"] < earlier["loss"] for earlier, later in itertools.pairwise(training(scorer, loss)))


experiments = {  # whether a program passes
    "policy = reference: log 2": lambda scorer, loss: math.isclose(
        loss_of(loss, scores(scorer, (policy, policy))), math.log(2), rel_tol=1e-9),
    "training: the loss falls": falls,
    "a very wrong pair: finite": lambda scorer, loss: math.isfinite(loss_of(loss, very_wrong)),
    "a very wrong pair: 1000": lambda scorer, loss: math.isclose(loss_of(loss, very_wrong), 1000, rel_tol=1e-9),
    "the numbers of 09: 0.5544": lambda scorer, loss: abs(loss_of(loss, (-10, -15, -12, -14)) - 0.5544) < 5e-5,
    "more pads: same scores": lambda scorer, loss: np.allclose(  # at width 7 the rejected text has none
        *(scores(scorer, (policy, reference), width=width) for width in (7, 10)), rtol=1e-9),
    "all responses: sum is 1": lambda scorer, loss: math.isclose(
        np.exp(scores(scorer, (policy,), every)).sum(), 1, rel_tol=1e-9),
}  # fmt: skip


def found_by(scorer, loss):
    return "".join("-" if passes(scorer, loss) else "F" for passes in experiments.values())


found = [found_by(*program) for program in programs]
print(f"{'':<28}" + "".join(f"piece {number}  " for number in range(1, 6)))
for name, row in zip(experiments, zip(*found)):
    print(f"{name:<28}" + "".join(f"{'FOUND' if mark == 'F' else '-':<9}" for mark in row).rstrip())

# %% [markdown]
# ## The answer to the prediction
# None. Four pieces have a bug, and piece 2 has none. The easy tests are the first three rows:
#
#                                 piece 1  piece 2  piece 3  piece 4  piece 5
#     policy = reference: log 2   -        -        -        -        -
#     training: the loss falls    -        -        -        -        -
#     a very wrong pair: finite   -        -        -        -        -
#     a very wrong pair: 1000     -        -        -        FOUND    FOUND
#     the numbers of 09: 0.5544   -        -        -        FOUND    -
#     more pads: same scores      FOUND    -        -        -        -
#     all responses: sum is 1     FOUND    -        FOUND    -        -
#
# No single experiment finds all four bugs. Two together do: the sum, for the scorers, and the value of a very wrong
# pair, for the losses.
#
# - **Piece 1** cuts the mask at the wrong end. It should be cut like the labels, `loss_mask[:, 1:]`. As it is, the
#   first token of each response is lost, and the pad after its end is scored.
# - **Piece 2** is correct. It takes rejected minus chosen, and has no minus sign before the log. The two cancel.
# - **Piece 3** takes the mean, and DPO is defined with the sum (tutorial 04).
# - **Piece 4** multiplies by beta twice: the rewards contain it already. At beta 0.1 it computes DPO with beta 0.01.
# - **Piece 5** adds 1e-12, so its loss never exceeds log(10^12) = 27.6. There the slope is 0: the pairs that are ranked
#   worst do not train the policy. The `logaddexp` of piece 2 needs no eps.
#
# ## Why the easy tests find nothing
# Where policy = reference, both log-ratios are 0. A wrong scorer is wrong twice in the same way, and this cancels. Then
# z is 0, whatever beta it is multiplied by. Log 2 does find a loss that forgets the reference.
#
# The loss falls because gradient descent makes it fall, whatever the loss is, if the steps are small.
#
# The test for a finite loss asks too little: with eps, the loss is finite and wrong. Compare with the value that you
# know. And choose inputs on which a mistake shows: if each text already has a pad, piece 1 passes the test with pads.

# %%
assert found == ["-----FF", "-------", "------F", "---FF--", "---F---"]
numbers = [np.array([number]) for number in (-10, -15, -12, -14)]
np.testing.assert_allclose(dpo_loss(*numbers, 0.1)[0], correct_loss(*numbers, 0.01), rtol=1e-12)
assert round(loss_of(compute_dpo_loss, very_wrong), 1) == 27.6
assert loss_of(compute_dpo_loss, (-10009, -10, -10, -10)) == loss_of(compute_dpo_loss, very_wrong)  # slope 0
np.testing.assert_allclose(*(scores(get_batch_logps, (policy, reference), width=width) for width in (8, 10)))
no_reference = correct_scorer, lambda w, l, rw, rl, beta: np.logaddexp(0, -beta * (w - l))
assert not experiments["policy = reference: log 2"](*no_reference)

# %% [markdown]
# ## The library's version
# `minidpo verify` compares with correct values and gradients. It gives a loss batches of 1, 5 and 7 pairs at two betas,
# and single pairs from z = -2000 to 2000. If it is wrong, known mistakes are tried until one gives the same wrong
# numbers. A scorer gets texts in which no token occurs twice. So the gradient of a score with respect to the logits
# shows which token was read from which row. The report draws this: # is what it counted, = is what counts.

# %%
reports = [
    verify.logprobs(get_batch_logps, layout="labels"),
    verify.loss(preference_loss),
    verify.logprobs(sequence_logprob, layout="labels"),
    verify.loss(dpo_loss),
    verify.loss(compute_dpo_loss),
]
for number, report in enumerate(reports, 1):
    print(f"\npiece {number}, " + str(report).split("\n  text 2" if number == 1 else "\n  tried")[0])

# %% [markdown]
# In its own words:
#
#     1  WRONG   first_token_missing: the first token of a response is not counted
#                pad_counted: one pad after the response is counted
#     2  right
#     3  WRONG   mean_for_sum: it is the mean over the response's tokens, and DPO sums them
#     4  WRONG   beta_twice: the margin is multiplied by beta twice
#     5  WRONG   capped: it never exceeds 27.63, so the gradient of the worst pairs is lost

# %%
assert [[finding.code for finding in report.findings] for report in reports] == [
    ["first_token_missing", "pad_counted"], [], ["mean_for_sum"], ["beta_twice"], ["capped"],
]  # fmt: skip
assert "never exceeds 27.63, so the gradient of the worst pairs is lost" in str(reports[4])

# %% [markdown]
# ## On a PyTorch function
# In PyTorch and JAX, `verify` takes the gradient from the framework's own autograd. So it also finds a gradient that
# was cut off. This loss, in `mycode.py`, has the correct value:
#
#     from torch.nn.functional import logsigmoid
#
#     def dpo_loss(policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps, beta):
#         chosen = policy_chosen_logps - ref_chosen_logps
#         rejected = (policy_rejected_logps - ref_rejected_logps).detach()
#         return -logsigmoid(beta * (chosen - rejected)).mean()
#
# In a test, write `verify.loss(dpo_loss).assert_right()`. In a shell, in the folder of `mycode.py`:
#
#     minidpo verify loss mycode:dpo_loss
#
#     dpo_loss: WRONG
#       wrong_gradient: dL/dlogp_l is not that of Eq. 7: it is 0 times the gradient (expected ...)
#
# For other signatures, layouts and whole training steps see `minidpo/verify/README.md`.
#
# ## What the tool cannot see
# It checks the function that you give it, on models and texts of its own. It does not see
# - the code that makes your labels, unless you give it some of them;
# - whether policy and reference are one object in your program;
# - whether dropout is off where you score: `eval()` or `train()`;
# - your data. If chosen and rejected are swapped in the file, correct code learns the opposite. Read twenty pairs.
#
# Labels go wrong where pads have the id of end-of-text. Somebody takes out the pads by their id, and end-of-text goes
# with them. Then no scorer, however correct, trains the policy on when to stop. `verify.labels` finds it.

# %%
ids = np.array([[3, 1, 2, 4, 0, 0], [3, 1, 4, 1, 2, 0]])
labels = np.where(ids == 0, -100, ids)  # no pads
labels[:, :2] = -100  # no prompt
report = verify.labels(ids, labels, prompt_lengths=[2, 2], lengths=[5, 6])
print(f"\n{report.findings[0]}")
assert [finding.code for finding in report.findings] == ["last_token_missing"]

# %% [markdown]
# For the reference, look at the log. `minidpo doctor` reads the metrics of a run, and asks whether DPO can have written
# them. In this run, scorer and loss are correct, and the reference is the policy itself, not a frozen copy.

# %%
moving = training(correct_scorer, correct_loss, frozen=False)
(finding,) = verify.doctor(moving).findings
print(f"\n{finding.code}: {finding.sentence}\n  {finding.evidence[1]}\n  likeliest cause: {finding.causes[0]}")
print(f"  logps/chosen {moving[0]['logps/chosen']:.2f} at step 1, {moving[-1]['logps/chosen']:.2f} at step 20")
assert all(row["rewards/chosen"] == row["rewards/rejected"] == 0 for row in moving)
assert finding.code == "stuck" and finding.causes[0].startswith("the reference moves along: it is the policy itself")
assert not any(verify.doctor(training(*program)).findings for program in programs)

# %% [markdown]
# How can one tell? Rewards of exactly 0 say that policy and reference are equal: both move, or neither does. log pi of
# the same pair, step after step, decides. Here `logps/chosen` moves, so the reference does. If it stood still, the
# learning rate would be 0, or the parameters frozen.
#
# To doctor, the logs of all five pieces are ordinary: each loss starts at log 2 and falls. So verify the code, and read
# the log: each shows what the other cannot.
#
# The picture is the table of experiments. The easy tests are above the first line.


# %%
def draw(path):
    marks = [*zip(*found), ["-" if report.right else "F" for report in reports]]
    with plots.figure(path, (6.4, 5.2), {"axes.grid": False, "font.size": 13, "text.color": "black"}) as figure:
        axes = figure.subplots()
        for (row, column), mark in np.ndenumerate(marks):
            if mark == "F":
                axes.plot(column, row, "s", markersize=27, color=plots.PALETTE[1])
                axes.plot(column, row, "x", markersize=12, color="white", markeredgewidth=3)
            else:
                axes.plot(column, row, "o", markersize=5, color=plots.INK)
        axes.hlines([2.5, 6.5], -0.5, 4.5, color=plots.INK, linewidth=1)
        axes.set(xlim=(-0.5, 4.5), ylim=(7.6, -0.6), title="Which test finds which bug?")
        axes.set_xticks(range(5), ["1\nmask", "2\nno bug", "3\nmean", "4\nbeta", "5\neps"])
        axes.set_yticks(range(8), [*experiments, "minidpo verify"])
        axes.tick_params(length=0, labelcolor="black", labeltop=True, labelbottom=False)
        axes.spines[:].set_visible(False)


path = pathlib.Path("19_verify.png")
if plots.installed():
    draw(path)
print(f"\npicture: {path.name}" if plots.installed() else "\nthe picture needs matplotlib (the `plot` extra)")

# %% [markdown]
# ## What was shown
# A test finds a bug only if the bug changes what the test looks at. In somebody's code, look first at how logits,
# labels and mask are shifted, at what is summed, and at each beta. Then compare with numbers computed in another way:
# for texts of unequal length, far from z = 0, and in a batch of several pairs.
#
# ## Exercises
# 1. By hand: at which z is the slope of piece 5 half of what it should be? How large is the margin there at beta 0.1?
# 2. Find the bug: read `batch_logps` below. Which of the seven experiments find it?
# 3. Write a wrong loss that passes all seven experiments, and let `verify` name it. (What do the seven have in common?)
# 4. Predict, then measure: two runs stay at log 2. In one the reference moves along, in the other the learning rate is
#    0. Which columns of `training` are equal in both logs, and which tell the two apart?


# %%
def batch_logps(logits, labels):
    logits, labels = logits[:, :-1], labels[:, 1:]
    loss_mask = labels != -100
    labels[labels == -100] = 0  # any token will do where the mask is 0
    per_token_logps = np.take_along_axis(log_softmax(logits), labels[..., None], axis=-1)[..., 0]
    return (per_token_logps * loss_mask).sum(-1)


print("\n19: three easy tests find none of four bugs; two others find all, and so does verify")

# %% [markdown]
# ## Solutions
# 1. Let p = sigma(z). The slopes with respect to z are -p (1 - p)/(p + 1e-12) and -(1 - p). The first is half the
#    second at p = 1e-12, where z = log(1e-12) = -27.6. The margin is -276 nats. A chosen response of 276 tokens gets
#    there if each token loses one nat.
# 2. `labels[:, 1:]` is a view, so the function overwrites the -100s of its caller. The first call, for the policy, is
#    correct. The second, for the reference, scores prompt and pads as token 0. So log 2 finds it, which found nothing
#    above, and so do the pads. The sum does not, because it makes one call only.
# 3. All seven use one pair at a time. So mix up the pairs of a batch: `[:, None]` below sets each chosen response
#    against every rejected one. `verify` calls it `wrong_axis`.
# 4. Loss, rewards and the first gradient are equal. At a rate of 0, `logps/chosen` and `grad_norm` never change; where
#    the reference moves along, they do. If each step had another pair, they would change in both runs.

# %%
half = math.log(1e-12) / beta  # the margin
slopes = [loss_of(loss, (half + 1e-3, 0, 0, 0)) - loss_of(loss, (half - 1e-3, 0, 0, 0))
          for loss in (compute_dpo_loss, correct_loss)]  # fmt: skip
assert round(half) == -276 and abs(slopes[0] / slopes[1] - 0.5) < 1e-5
assert found_by(batch_logps, correct_loss) == "F----F-"
assert [finding.code for finding in verify.logprobs(batch_logps).findings] == ["inputs_changed"]


def every_pair(logp_w, logp_l, ref_logp_w, ref_logp_l, beta):
    return np.logaddexp(0, -beta * ((logp_w - ref_logp_w)[:, None] - (logp_l - ref_logp_l))).mean()


assert found_by(correct_scorer, every_pair) == "-------"
assert [finding.code for finding in verify.loss(every_pair).findings] == ["wrong_axis"]

still = training(correct_scorer, correct_loss, rate=0.0)
equal = {name for name in still[0] if all(a[name] == b[name] for a, b in zip(still, moving))}
assert equal == {"step", "loss", "rewards/chosen", "rewards/rejected"} and still[0] == moving[0]
for name in ("logps/chosen", "grad_norm"):
    assert len({row[name] for row in still}) == 1 < len({row[name] for row in moving}) and still[0][name] != 0
assert "does not move" in verify.doctor(still).findings[0].evidence[2]
