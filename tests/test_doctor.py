"""Doctor names every fault that is produced here, and finds nothing in runs that are well."""

import collections
import json
import math
import re
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minidpo import Tensor, cli, losses, model, ops, optim, scoring, training, verify
from minidpo.cli import parser
from minidpo.data import world
from minidpo.data.preferences import collate
from minidpo.model import Config
from minidpo.streams import stream
from minidpo.theory.no_never_yes import CHOSEN, REJECTED, three_words
from minidpo.tokenizer import TURN, Tokenizer
from minidpo.verify import logs
from minidpo.verify.doctor import SYMPTOMS, WORDS, doctor, table
from minidpo.verify.logs import KNOWN, LOG2, Log, read, softplus

TOY = Config(vocab_size=8, n_positions=12, n_embd=16, n_layer=1, n_head=2)
KEYS = ("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies")


def toy_pairs(count, seed=0, noisy=True):
    """Pairs of short responses: token 1 is worth a point, token 2 costs one; labels are Bradley-Terry's or certain."""
    rng, pairs = np.random.default_rng(seed), []
    while len(pairs) < count:
        x, *ys = ([*map(int, rng.integers(1, 8, n))] for n in (2, *rng.integers(2, 6, 2)))
        gap = 1.5 * (ys[0].count(1) - ys[0].count(2) - ys[1].count(1) + ys[1].count(2))
        if ys[0] != ys[1] and (noisy or gap):
            first = rng.random() < 1 / (1 + math.exp(-gap)) if noisy else gap > 0
            w, l = ys if first else ys[::-1]
            pairs.append(([0, *x], [*w, 0], [*l, 0]))
    return pairs


def scaled(factor):
    """A loss that is DPO's times a factor, as a wrong accumulation makes it."""

    def loss(*arguments):
        out = losses.dpo_loss(*arguments)
        return out._replace(loss=factor * out.loss)

    return loss


def detached(w, l, *rest):
    """A loss that is not of the policy: what no_grad or frozen parameters leave."""
    out = losses.dpo_loss(w.detach(), l.detach(), *rest)
    return out._replace(loss=out.loss + 0.0 * ops.sum(w))


def beta_zero(w, l, ref_w, ref_l, beta):
    out = losses.dpo_loss(w, l, ref_w, ref_l, beta)
    return losses.PreferenceLoss(
        -ops.mean(ops.logsigmoid(0.0 * out.margin)), 0.0 * out.reward_w, 0.0 * out.reward_l, out.margin
    )


def swapped(w, l, ref_w, ref_l, beta):
    return losses.dpo_loss(w, l, ref_w, ref_l, beta)._replace(loss=losses.dpo_loss(l, w, ref_l, ref_w, beta).loss)


def maximised(*arguments):
    """The gradient of -L under the value of L: an optimizer that climbs."""
    out = losses.dpo_loss(*arguments)
    return out._replace(loss=2 * out.loss.detach() - out.loss)


def hinge(*arguments):
    out, beta = losses.dpo_loss(*arguments), arguments[-1]
    z = beta * out.margin
    return out._replace(loss=ops.mean((1.0 - z) * (z.data < 1).astype(z.data.dtype)))


def robust(*arguments, e=0.2):
    out, beta = losses.dpo_loss(*arguments), arguments[-1]
    z = beta * out.margin
    return out._replace(loss=-ops.mean((1 - e) * ops.logsigmoid(z) - e * ops.logsigmoid(-z)) / (1 - 2 * e))


def train(
    pairs, held_out=(), config=TOY, seed=0, steps=30, rate=3e-3, batch=8, beta=0.1, every=10, loss=losses.dpo_loss,
    nll_weight=0.0, policy=None, reference=None, moving=False, eval_moving=False, optimizer_of=None, warmup=0,
    later=None,
):  # fmt: skip
    """The log of a run of our own training step, under the names of metrics.jsonl."""
    policy = policy or model.init(config, np.random.default_rng(seed))
    reference = model.frozen(reference or policy)
    optimizer = optim.AdamW(optimizer_of or policy, rate)
    scores, anchors = (
        np.array(training.reference_logprobs(reference, config, each)) if each else None for each in (pairs, held_out)
    )
    rows = []
    for step in range(steps + 1):
        if held_out and step % every == 0:
            if moving or eval_moving:
                anchors = training.reference_logprobs(policy, config, held_out)
            metrics = training.preference_evaluation(
                policy, config, collate(held_out, *anchors), beta, losses.dpo_loss, nll_weight
            )
            rows.append({"step": step, **{f"eval_{name}": value for name, value in metrics.items()}})
        if step < steps:
            optimizer.learning_rate = rate * min(1.0, (step + 1) / warmup) if warmup else rate
            indices = training.batch_indices(len(pairs), batch, step, seed)
            known = [] if moving else scores[:, indices]
            part = collate([pairs[i] for i in indices], *known)
            try:
                metrics = training.dpo_training_step(
                    policy, policy if moving else reference, config, optimizer, part, beta,
                    (later if later and step >= steps // 2 else loss), nll_weight,
                )  # fmt: skip
            except FloatingPointError:  # where we stop, other trainers log this and go on
                metrics = dict.fromkeys((*KEYS, "loss", "grad_norm"), math.nan)
            rows.append({"step": step + 1, **metrics})
    return rows


def windows(rows, k):
    """The log that a trainer leaves which logs the mean of every k steps."""
    rows = [row for row in rows if "loss" in row]
    parts = [rows[i : i + k] for i in range(0, len(rows) - k + 1, k)]
    means = [{name: float(np.mean([row[name] for row in part])) for name in part[0]} for part in parts]
    return [{**mean, "step": part[-1]["step"]} for mean, part in zip(means, parts)]


def shaken(params, size, seed=9):
    """A model whose parameters are off by noise of this size."""
    rng = np.random.default_rng(seed)
    noisy = model.frozen(params)
    for p in noisy.values():
        p.data = p.data + (size * rng.normal(size=p.shape)).astype(p.data.dtype)
    return noisy


def fine_tuned(pairs, steps=150):
    """A model, and the same after fine-tuning on the chosen responses."""
    params = model.init(TOY, np.random.default_rng(0))
    base, optimizer = model.frozen(params), optim.AdamW(params, 1e-2)
    for _ in range(steps):
        training.sft_training_step(params, TOY, optimizer, [(x, w) for x, w, _ in pairs])
    return base, params


def row(step, margin=0.0, loss=None, **more):
    """A row as its margin implies."""
    values = {"loss": softplus(-margin) if loss is None else loss, "rewards/chosen": margin / 2,
              "rewards/rejected": -margin / 2, "rewards/margins": margin}  # fmt: skip
    return {"step": step, **values, **more}


PAIRS, HELD_OUT, FEW = toy_pairs(64), toy_pairs(24, 1), toy_pairs(8, 2, noisy=False)


def packed(seed=0, alone=True, rate=0.0, cuts=((4,), (1, 3), (2, 2))):
    """Steps on the same four pairs, which are cut otherwise each time; micro-batches averaged `alone`, or by pairs."""
    policy, pairs, rows = init(seed), toy_pairs(4, seed + 70), []
    reference, optimizer = model.frozen(policy), optim.AdamW(policy, rate)
    for step, cut in enumerate(cuts, 1):

        def sweep(policy, config, batch, *rest, cut=cut):
            ends, parts = np.cumsum(cut), []
            for part in (slice(end - n, end) for n, end in zip(cut, ends)):
                whole = (len(cut) * (part.stop - part.start) if alone else ends[-1], 1)
                each = scoring.Batch(batch.pairs[part], batch.ref_logp_w[part], batch.ref_logp_l[part])
                parts.append(training.dpo_sweep(policy, config, each, *rest, whole))
            return training.join(parts)

        metrics = training.dpo_training_step(policy, reference, TOY, optimizer, collate(pairs), 0.1, sweep=sweep)
        rows.append({"step": step, "pairs_per_micro_batch": list(cut), **metrics})
    return rows


def words_log():
    """The three words: the chosen one becomes less likely at every step."""
    run, rows = three_words(steps=400), []
    for step in range(0, 401, 40):
        w, l = (run.beta * (run.path[step][i] - run.path[0][i]) for i in (CHOSEN, REJECTED))
        more = {"logps/chosen": run.path[step][CHOSEN], "logps/rejected": run.path[step][REJECTED]}
        values = {"loss": softplus(l - w), "rewards/chosen": w, "rewards/rejected": l, "rewards/margins": w - l, **more}
        rows.append({"step": step, **{f"eval_{name}": float(value) for name, value in values.items()}})
    return rows


def init(seed=0):
    return model.init(TOY, np.random.default_rng(seed))


def base_reference():
    base, policy = fine_tuned(FEW)
    return train(FEW, policy=policy, reference=base, beta=0.5, steps=5)


FAULTS = {
    "each micro-batch averaged alone": lambda: packed(),
    "learning rate 0": lambda: train(PAIRS, HELD_OUT, rate=0.0),
    "a warm-up far longer than the run": lambda: train(PAIRS, rate=1e-6, warmup=10**9),
    "the policy is detached": lambda: train(PAIRS, HELD_OUT, loss=detached),
    "beta 0": lambda: train(PAIRS, loss=beta_zero),
    "the optimizer holds a copy": lambda: train(PAIRS, HELD_OUT, optimizer_of=init()),
    "the reference is the policy": lambda: train(PAIRS, HELD_OUT, moving=True),
    "the reference is the policy, no evaluations": lambda: train(PAIRS, moving=True),
    "evaluation with the policy as its reference": lambda: train(PAIRS, HELD_OUT, eval_moving=True),
    "the reference is another model": lambda: train(PAIRS, HELD_OUT, reference=shaken(init(), 0.3), beta=0.5),
    "the same, logged every 10 steps": lambda: windows(
        train(PAIRS, reference=shaken(init(), 0.5), beta=1.0, rate=1e-3), 10
    ),
    "the reference is the base model": base_reference,
    "learning rate 1": lambda: train(PAIRS, rate=1.0, batch=1, beta=0.5, steps=60),
    "chosen and rejected swapped in the loss": lambda: train(PAIRS, loss=swapped),
    "the loss is maximised": lambda: train(PAIRS, loss=maximised, rate=1e-2),
    "three words, displaced": words_log,
    "8 pairs, many epochs": lambda: train(PAIRS[:8], HELD_OUT, rate=1e-2, steps=60, beta=0.5),
    "deterministic labels, beta 2": lambda: train(FEW, rate=1e-2, steps=150, beta=2.0),
    "the loss is divided by 4": lambda: train(PAIRS, loss=scaled(0.25)),
    "micro-batches are summed": lambda: train(PAIRS, loss=scaled(4.0)),
    "summed after a resume": lambda: train(PAIRS, later=scaled(4.0)),
    "a hinge loss": lambda: train(PAIRS, loss=hinge, rate=1e-3),
    "IPO": lambda: train(PAIRS, loss=losses.ipo_loss, rate=1e-4),
    "robust loss": lambda: train(FEW, loss=robust, rate=1e-2, steps=80, beta=0.5),
    "an NLL term, no NLL in the log": lambda: train(PAIRS, nll_weight=0.3),
    "a gradient of 0": lambda: train(FEW, loss=detached, reference=shaken(init(), 0.01), beta=0.5),
    "float16 from step 2": lambda: [row(1, grad_norm=math.nan)] + [row(i, math.nan, math.nan) for i in (2, 3, 4)],
    "float16, NaN logged as 0": lambda: [row(i, math.nan, 0.0, grad_norm=math.nan) for i in range(10, 60, 10)],
    "float16, loss 0": lambda: [row(i, 0.0, 0.0) for i in range(1, 9)],
    "NaN late": lambda: [row(i, i / 9) for i in range(1, 9)] + [row(i, math.nan, math.nan) for i in range(9, 12)],
    "an empty response": lambda: [row(1), row(2, 0.1) | {"rewards/rejected": math.nan, "loss": math.nan}, row(3, 0.2)],
    "KTO, a batch of one class": lambda: [
        {"step": 1, "loss": 0.5, "kl": 0.0, "rewards/chosen": 0.0, "rewards/rejected": 0.0},
        {"step": 2, "loss": math.nan, "kl": 0.1, "rewards/chosen": 0.1, "rewards/rejected": math.nan},
    ],
    "adapter off in the reference": lambda: [row(i, 12.0, 0.0) | {"rewards/accuracies": 1.0} for i in (5, 10, 15)],
    "smoothing 0.1, far beyond its optimum": lambda: [
        row(i, 12.0, 1.2, **{"rewards/accuracies": 1.0}) for i in range(100, 200, 10)
    ],
    "margins of another mean": lambda: [row(i, 0.1 * i) | {"rewards/margins": 0.5 * i} for i in range(20, 30)],
}


def codes(rows):
    return [finding.code for finding in doctor(rows).findings]


# ---- faults and healthy runs ----------------------------------------------------------------------------------------


def test_the_table_lists_what_is_produced_here():
    """Every fault of the table is produced, every one that is produced is in the table, and every symptom has one."""
    assert list(WORDS["faults"]) == list(FAULTS)
    assert {found for _, found, _ in WORDS["faults"].values()} == set(SYMPTOMS)
    for name, (made_by, found, cause) in WORDS["faults"].items():
        trains = {"train", "windows", "fine_tuned", "three_words", "packed"} & set(FAULTS[name].__code__.co_names)
        assert made_by == ("training" if trains or FAULTS[name] in (words_log, base_reference) else "rows"), name
        assert re.search(f"^{name} +{made_by} +{found} +{re.escape(WORDS['causes'][cause][:7])}", table(), re.MULTILINE)


SLOW = {True: [pytest.mark.slow], False: []}


@pytest.mark.parametrize("name", [pytest.param(x, marks=SLOW[WORDS["faults"][x][0] == "training"]) for x in FAULTS])
def test_a_fault_is_named(name):
    """What is found first is the fault's symptom, and its likeliest cause is what was done."""
    _, found, cause = WORDS["faults"][name]
    finding = doctor(FAULTS[name]()).findings[0]
    assert (finding.code, finding.causes[0]) == (found, WORDS["causes"][cause])
    assert finding.evidence and finding.tell == WORDS[found]["tell"]


def learner(pairs, config, seed, steps, rate=1e-2):
    """A model that has learnt to write both kinds of response."""
    params = model.init(config, np.random.default_rng(seed))
    optimizer = optim.AdamW(params, rate)
    for step in range(steps):
        part = [pairs[i] for i in training.batch_indices(len(pairs), 16, step, seed)]
        training.sft_training_step(params, config, optimizer, [(x, (w, l)[step % 2]) for x, w, l in part])
    return params


def views(rows):
    """A log as others would write or cut it: each must read as well as the whole."""
    yield rows
    yield [row for row in rows if "loss" in row]
    yield [row for row in rows if "eval_loss" in row]
    yield from (windows(rows, k) for k in (5, 10))
    yield [{name: row[name] for name in row if name in ("step", "loss")} for row in rows]
    yield [{name: row[name] for name in row if name != "step"} for row in rows]
    yield from (rows[:1], rows[1:2], rows[:3], rows[len(rows) // 2 :])


RUNS = [{}, {"rate": 3e-3}, {"beta": 0.5}, {"warmup": 15}, {"batch": 1, "steps": 60}, {"rate": 1e-4}, {"steps": 80}]


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_nothing_is_found_in_healthy_runs(seed):
    """No alarm for runs of several seeds, rates, betas, batches and lengths, however their log is cut."""
    pairs, held_out = toy_pairs(160, seed + 10), toy_pairs(32, seed + 50)
    base = learner(pairs, TOY, seed, 60)

    def policy():
        return {name: Tensor(p.data.copy(), requires_grad=True) for name, p in base.items()}

    for settings in RUNS:
        rows = train(pairs, held_out, seed=seed, policy=policy(), **{"rate": 1e-3, **settings})
        for view in views(rows):
            assert codes(view) == [], settings
    rows = train(pairs, held_out, seed=seed, policy=policy(), rate=1e-3, nll_weight=0.5)
    assert codes(rows) == [] and any("NLL term" in remark for remark in doctor(rows).remarks)


@pytest.mark.parametrize("seed", range(5))
def test_the_packing_is_told_by_the_same_pairs_alone(seed):
    """Micro-batches that are weighted by their pairs give no alarm, nor do steps between which the policy moves."""
    assert "packing" in codes(packed(seed))
    cuts = ((4,), (1, 3), (2, 2), (1, 1, 2), (1, 1, 1, 1)) * 3
    assert codes(packed(seed, alone=False, rate=1e-3, cuts=cuts)) == []
    assert "packing" not in codes(packed(seed, alone=False, cuts=cuts))
    assert "packing" not in codes(packed(seed, rate=1e-3, cuts=cuts))  # the rows do not tell


@pytest.mark.slow
def test_nothing_is_found_on_the_desk():
    """No alarm for a run on the support desk whose held-out loss falls."""
    rows = world.preferences(world.split(0)[0], 400, stream(0, "doctor"))
    tokenizer = Tokenizer.from_text("".join("".join(row.values()) for row in rows) + TURN)
    code = tokenizer.encode
    pairs = [([0, *code(x + TURN)], [*code(w), 0], [*code(l), 0]) for x, w, l in (row.values() for row in rows)]
    longest = max(len(x) + max(len(w), len(l)) for x, w, l in pairs)
    config = Config(tokenizer.vocab_size, longest, n_embd=16, n_layer=1, n_head=2)
    policy = learner(pairs, config, 0, 60)
    log = train(pairs[:340], pairs[340:], config, policy=policy, rate=3e-4, beta=0.2, steps=40)
    assert all(codes(view) == [] for view in views(log))


# ---- each rule at its edge ------------------------------------------------------------------------------------------


def rows_of(*margins, start=1, **more):
    return [row(start + i, margin, **more) for i, margin in enumerate(margins)]


def losses_of(*values):
    return [{"step": i, "loss": x} for i, x in enumerate(values, 1)]


def evaluations(*values, logps=(), rewards=()):
    rows = [{"step": 10 * i, "eval_loss": x} for i, x in enumerate(values)]
    for each, logp, reward in zip(rows, logps, rewards):
        each |= {"eval_logps/chosen": logp, "eval_rewards/chosen": reward, "eval_rewards/rejected": reward - 1.0}
    return rows


def falling(logps, rewards):
    """Evaluations with these scores and rewards of the chosen responses, and a margin of 1."""
    return evaluations(0.6, 0.5, logps=logps, rewards=rewards)


def overfitting(*values):
    """Evaluations between training rows whose loss falls."""
    return [each for i, one in enumerate(evaluations(*values)) for each in (one, row(10 * i + 1, 0.2 * i))]


def cut_as(*parts, gradients):
    """Rows at log 2, cut into micro-batches, with these norms of the gradient."""
    return [row(1, grad_norm=g, micro_batches=cut) for cut, g in zip(parts, gradients)]


def changed(rows, at, **values):
    return [{**each, **values} if i == at else each for i, each in enumerate(rows)]


HEALTHY = rows_of(0.0, 0.1, 0.3, 0.2, 0.5, 0.4, 0.6, 0.7, 0.8, 0.9)
NAN, WON = math.nan, {"rewards/accuracies": 1.0}
WAVES = (1.0, 6.0, 0.9, 7.0, 0.8)
EDGES = {  # rows that are just over the edge, and rows that are just within
    "nan": [
        (changed(HEALTHY, 4, loss=NAN), changed(HEALTHY, 4, grad_norm=NAN)),
        ([*HEALTHY, *rows_of(1.0, 1.0, start=11, grad_norm=NAN)], [*HEALTHY, *rows_of(1.0, start=11, grad_norm=NAN)]),
        (changed(HEALTHY, 4, **{"rewards/chosen": math.inf}), changed(HEALTHY, 4, **{"logits/chosen": NAN})),
    ],
    "packing": [
        (cut_as([4], [2, 2], [1, 3], gradients=(1, 1, 2)), cut_as([4], [2, 2], [1, 3], gradients=(1, 1, 1.0005))),
        (cut_as([4], [2, 2], [1, 3], gradients=(1, 1, 2)), cut_as([4], [2, 2], [1, 3], gradients=(1, 1.01, 2))),
        (cut_as([4], [2, 2], [1, 3], gradients=(1, 1, 2)), cut_as([4], [4], [1, 3], gradients=(1, 1, 2))),
        (cut_as([4], [2, 2], [1, 3], gradients=(1, 1, 2)), cut_as([4], [2, 2], [1, 4], gradients=(1, 1, 2))),
        (cut_as([4], [2, 2], [1, 3], gradients=(1, 1, 2)), cut_as([4], [2, 2], [1, 3], gradients=(0, 0, 2))),
    ],
    "stuck": [
        (rows_of(0.0, 0.0, 0.0), rows_of(0.0, 0.0)),
        (rows_of(0.0, 0.0, 2e-6), rows_of(0.0, 0.0, 2e-5)),
        (losses_of(0.6931, 0.6931, 0.6932), losses_of(0.6931, 0.6931, 0.6929)),
        (losses_of(*[0.69140625] * 3), losses_of(*[0.6953] * 3)),
        ([row(i, learning_rate=i) for i in range(10)], [row(i, learning_rate=i) for i in range(9)]),
        ([row(5), row(10)], [row(4), row(8)]),
    ],
    "accuracy_zero": [
        ([{"step": 9, "eval_rewards/accuracies": 0.0}], [{"step": 1, "eval_rewards/accuracies": 0.0}]),
        ([{"step": 9, "eval_rewards/accuracies": 0.0}], [{"step": 9, "eval_rewards/accuracies": 0.1}]),
        ([{"epoch": 0.1, "eval_rewards/accuracies": 0.0}], [{"epoch": 0.0, "eval_rewards/accuracies": 0.0}]),
        ([{"epoch": 0.1, "rewards/accuracies": 0.0}] * 3, [{"epoch": 0.1, "rewards/accuracies": 0.0}] * 2),
        (
            [{"step": 9, "eval_rewards/accuracies": 0.0, "eval_rewards/margins": 0.0}],
            [{"step": 9, "eval_rewards/accuracies": 0.0, "eval_rewards/margins": -0.1}],
        ),
    ],
    "zero_from_start": [
        ([row(20, 4.0, 0.019), row(40, 5.0)], [row(20, 4.0, 0.021), row(40, 5.0)]),
        ([row(50, 4.5, 0.0124), row(100, 5.0)], [row(50, 4.5, 0.0126), row(100, 5.0)]),
        ([row(10, 9.0), row(20, 9.0)], [row(20, 9.0), row(25, 9.0)]),
        (
            [{"epoch": e, "loss": 0.0, **WON} for e in (0.1, 0.2)],
            [{"epoch": e, "loss": 0.0, **WON} for e in (0.7, 0.8)],
        ),
    ],
    "first_loss": [
        (rows_of(0.0, **{"rewards/chosen": 0.11}), rows_of(0.0, **{"rewards/chosen": 0.09})),
        (rows_of(-0.05, loss=0.75), rows_of(-0.05, loss=0.74)),
        (rows_of(-0.05, loss=0.75), rows_of(-0.05, loss=0.75, nll_loss=0.05)),
        (rows_of(1.0, start=1), rows_of(1.0, start=60)),
        ([row(10, -0.51, 1.2), row(20, -0.5)], [row(10, -0.49, 1.2), row(20, -0.5)]),
        ([row(10, 2.8, 0.06), row(20, 3.0)], [row(10, 2.8, 0.063), row(20, 3.0)]),
    ],
    "unstable": [
        (rows_of(0.0, 6.0, -6.0, 6.0, -6.0), rows_of(0.0, 6.0, -6.0, -6.0, 6.0)),
        (rows_of(0.0, 1.1, -6.0, 1.1, -6.0), rows_of(0.0, 0.9, -6.0, 0.9, -6.0)),
        (rows_of(0.0, *[3.0, -3.0] * 2, loss=25.0), [row(i, (3.0, -3.0)[i % 2], (25.0, 3.1)[i % 2]) for i in range(6)]),
        (rows_of(0.0, 4.0, -5.1, 4.0, -5.1), rows_of(0.0, 4.0, -4.9, 4.0, -4.9)),
        (losses_of(*WAVES), losses_of(*WAVES[:3])),
        (rows_of(0.0, 3.0, -3.0, 3.0, -3.0, loss=25.0), rows_of(0.0, 0.9, -0.9, 0.9, -0.9, loss=25.0)),
    ],
    "above_log2": [
        (rows_of(*[-0.2, -0.3] * 5, start=60), rows_of(*[-0.2, -0.3] * 4, -0.2, start=60)),
        (rows_of(*[-0.2, -0.3] * 5, start=60), rows_of(*[0.2, -0.1] * 5, start=60, loss=0.9)),
        (losses_of(*[1.0, 1.6] * 5), losses_of(*[1.0, 1.4] * 5)),
        (losses_of(*[1.0, 1.6] * 5), losses_of(*[0.4, 1.1] * 5)),
        (losses_of(*[1.0, 1.6] * 5), losses_of(*[2.0, 2.6] * 3, *[1.0, 1.6] * 3)),
    ],
    "loss_below": [
        (rows_of(0.2, 0.3, loss=0.35), rows_of(0.2, 0.3, loss=0.45)),
        ([row(i, 0.5, 0.46) for i in range(60, 70)], [row(i, 0.5, 0.473) for i in range(60, 70)]),
        ([row(i, 0.5, 0.46) for i in range(60, 70)], [row(i, 0.5, (0.3, 0.65)[i % 2]) for i in range(60, 70)]),
        ([row(i, 0.5, 0.4 if i < 70 else 0.9) for i in range(60, 99)], [row(i, 0.5, 0.9) for i in range(60, 99)]),
    ],
    "loss_above": [
        (rows_of(0.0, 0.1, loss=0.71), rows_of(0.0, 0.1, loss=0.70)),
        (rows_of(0.0, loss=1.7), rows_of(0.0, loss=1.7, nll_loss=2.0)),
        ([row(i, 1.0, 0.71, **WON) for i in (60, 70, 80)], [row(i, 1.0, 0.70, **WON) for i in (60, 70, 80)]),
        ([row(i, 1.0, 0.8, **WON) for i in (60, 70, 80)], [row(i, 1.0, 0.8) for i in (60, 70, 80)]),
        ([*rows_of(1.0, 1.0, 1.0, loss=0.8, **WON), row(9)], [*rows_of(1.0, 1.0, loss=0.8, **WON), row(9)]),
    ],
    "margins": [
        (rows_of(0.1, 0.2, **{"rewards/margins": 0.4}), rows_of(0.1, 0.2, **{"rewards/margins": 0.18})),
    ],
    "no_gradient": [
        (rows_of(0.1, 0.2, 0.1, grad_norm=0.0), rows_of(0.1, 0.2, 0.1, grad_norm=1e-9)),
        (rows_of(0.1, 0.2, 0.1, 0.2, grad_norm=0.0), rows_of(0.1, 0.1, 0.3, 0.3, grad_norm=0.0)),  # it learns
        (rows_of(0.1, 0.2, grad_norm=0.0), rows_of(0.1, grad_norm=0.0)),
    ],
    "loss_jump": [
        (losses_of(*[0.5, 0.6] * 3, *[2.0, 2.4] * 3), losses_of(*[0.5, 0.6] * 3, *[0.7, 0.8] * 3)),
        (losses_of(*[0.5, 0.6] * 3, *[2.0, 2.4] * 3), losses_of(*[0.5, 0.6] * 3, *[2.0, 2.4] * 3, 0.6)),
        (losses_of(*[0.5, 0.6] * 3, *[2.0, 2.4] * 3), losses_of(*[2.0, 2.4] * 3, *[0.5, 0.6] * 3)),
        (
            [row(60 + i, 0.5, x) for i, x in enumerate([0.5, 0.6, 0.5, 2.0, 2.4, 2.2])],
            [row(60 + i, m, x) for i, (m, x) in enumerate(zip([0.5] * 3 + [-2.0] * 3, [0.5, 0.6, 0.5, 2.0, 2.4, 2.2]))],
        ),
        (losses_of(*[0.5] * 3, *[1.0] * 3), losses_of(*[0.5] * 3, *[0.75] * 3)),
        (losses_of(0.5, 0.5, 0.8, *[1.13] * 3), losses_of(0.5, 0.5, 0.8, *[1.04] * 3)),
    ],
    "chosen_falls": [
        (falling((-9, -18.1), (0, -1.1)), falling((-9, -17.9), (0, -1.1))),
        (falling((-9, -18.1), (0, -1.1)), falling((-9, -18.1), (0, -0.9))),  # less than the margin of 1
        (falling((-2, -5.1), (0, -1.1)), falling((-2, -4.9), (0, -1.1))),
        (falling((-20, -30), (-1, -2)), falling((-20, -30), (-0.2, -1.2))),  # beta 0.1: the reference has -10, -18
    ],
    "overfit": [
        (overfitting(0.69, 0.6, 0.65, 0.66), overfitting(0.69, 0.6, 0.62, 0.64)),
        (overfitting(0.69, 0.6, 0.65, 0.66), overfitting(0.69, 0.6, 0.6, 0.66)),
        (overfitting(0.69, 0.68, 0.70, 0.72), overfitting(0.69, 0.68, 0.70, 0.70)),
        (overfitting(0.69, 0.6, 0.65, 0.66), evaluations(0.69, 0.6, 0.65, 0.66)),
        (overfitting(0.69, 0.6, 0.65, 0.66), [{**x, "loss": x["step"]} for x in overfitting(0.69, 0.6, 0.65, 0.66)]),
    ],
    "saturated": [
        (rows_of(0.0, 5.0, 11.0, 11.0, 11.0, **WON), rows_of(0.0, 5.0, 11.0, 9.0, 11.0, **WON)),
        ([row(i, 11.0, 0.009) for i in (60, 61, 62)], [row(i, 11.0, 0.011) for i in (60, 61, 62)]),
        (rows_of(0.0, 5.0, 11.0, 11.0, 11.0), rows_of(0.0, 5.0, 11.0, 11.0, 11.0, **{"rewards/accuracies": 0.9})),
        ([{"loss": 1e-5, **WON}] * 3, [{"loss": 1e-3, **WON}] * 3),
    ],
}  # fmt: skip


def test_every_symptom_has_an_edge():
    """A new symptom needs rows on either side of its edge, a sentence, and a way to tell its causes apart."""
    assert list(EDGES) == list(SYMPTOMS)
    assert set(SYMPTOMS) == set(WORDS) - {"causes", "remarks", "faults"}
    assert all(set(WORDS[code]) == {"sentence", "tell"} for code in SYMPTOMS)


@pytest.mark.parametrize(("code", "over", "within"), [(code, *pair) for code in EDGES for pair in EDGES[code]])
def test_a_rule_has_an_edge(code, over, within):
    """A symptom is found just over its edge and not just within it."""
    assert code in codes(over)
    assert code not in codes(within)


CAUSES = [  # rows, and the causes that are named first
    (changed(HEALTHY, 4, loss=NAN), "float16", "empty"),
    ([row(i, learning_rate=0.0) for i in (1, 2, 3)], "rate0"),
    ([row(i, learning_rate=i) for i in range(10)], "warmup", "same"),
    ([row(i, grad_norm=0.0) for i in (1, 2, 3)], "beta0", "frozen"),
    ([row(i, grad_norm=1.0) for i in (1, 2, 3)], "same", "others"),
    (rows_of(*[-0.2, -0.3] * 5, start=60), "rate", "batch"),
    (rows_of(*[-0.05 * i for i in range(1, 12)], start=60), "sign", "rate"),
    (rows_of(0.05, 0.1, 0.2, loss=0.3, start=60), "divided", "loss"),
    (rows_of(1.0, 1.2, 1.1, loss=0.1, start=60), "loss", "divided"),
    (rows_of(*[-0.2] * 10, loss=0.6, start=60), "sign", "divided"),
    (rows_of(0.0, loss=4 * LOG2), "summed", "loss"),
    (rows_of(0.0, loss=1.0), "loss", "term"),
    (rows_of(0.0, loss=1.7), "term", "loss"),
    ([row(i, 1.0, 0.8, **WON) for i in (60, 70, 80)], "smoothing", "term"),
    (rows_of(20.0, 20.0, 20.0, grad_norm=0.0, start=60), "underflow", "frozen"),
]


@pytest.mark.parametrize(("rows", "first"), [(rows, first) for rows, *first in CAUSES])
def test_the_numbers_order_the_causes(rows, first):
    """Evidence in the log changes which cause is the likeliest."""
    assert doctor(rows).findings[0].causes[: len(first)] == [WORDS["causes"][cause] for cause in first]


def test_an_nll_term_is_found_in_our_own_log():
    """We log `nll/chosen` with and without such a term: it is told where all margins are 0."""
    for weight in (0.0, 0.5):
        rows = [row(i, m, softplus(-m) + weight * 2.0, **{"nll/chosen": 2.0}) for i, m in enumerate((0.0, 0.1, 0.3))]
        assert codes(rows) == [] and any("NLL term" in remark for remark in doctor(rows).remarks) == (weight > 0)


def test_huge_numbers_are_infinite():
    """Numbers that no training has cannot overflow the arithmetic of a rule."""
    assert codes([row(i, -1e200, 1e200) for i in range(9)]) == ["nan"]


def test_old_trainers_report_the_margins_of_one_device():
    """Where loss and margins are of other pairs, single rows may break Jensen's inequality, but not their mean."""
    rng = np.random.default_rng(0)
    for _ in range(20):
        z = rng.normal(0.3, 1.0, (200, 8))  # eight devices of one pair each
        means, won = np.logaddexp(0, -z).mean(axis=1), (z[:, 0] > 0).astype(float)
        local = [row(60 + i, z[i, 0], means[i].item(), **{"rewards/accuracies": won[i]}) for i in range(200)]
        assert codes(local) == []


# ---- the reader -----------------------------------------------------------------------------------------------------

ROWS = [
    {"step": 10, "loss": 0.6931, "rewards/chosen": 0.0, "rewards/margins": 0.0, "learning_rate": 1e-6, "epoch": 0.1},
    {"step": 20, "loss": 0.0, "rewards/chosen": math.nan, "rewards/margins": math.nan, "grad_norm": math.inf},
    {"step": 20, "eval_loss": 0.5, "eval_rewards/margins": -0.25, "eval_runtime": 3.0},
]
LAST = {"step": 20, "train_runtime": 9.5, "train_loss": 0.4, "total_flos": 0.0}


def printed(rows, text=str):
    return "".join(f"{{{', '.join(f'{k!r}: {text(v)}' for k, v in one.items())}}}\n" for one in rows)


FORMATS = {
    "metrics.jsonl": "".join(json.dumps(one) + "\n" for one in [*ROWS, LAST]),
    "rows.json": json.dumps([*ROWS, LAST], indent=2),
    "trainer_state.json": json.dumps({"epoch": 1.0, "log_history": [*ROWS, LAST], "max_steps": 20}, indent=2),
    "TRL prints numbers": "loading\n" + printed([*ROWS, LAST]) + "done {}\n",
    "newer TRL prints text": printed([*ROWS, LAST], lambda x: f"'{x:.4g}'"),
    "a progress bar": "".join(f"  5%|# | 1/20 [00:01<00:19]\r{line}\r" for line in printed([*ROWS, LAST]).split("\n")),
    "two on a line": printed([*ROWS, LAST]).replace("}\n{", "} {"),
    "with a byte order mark": "\ufeff" + json.dumps({"log_history": ROWS}, indent=2),
}


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_gives_the_same_rows(name, tmp_path):
    """A log reads the same in each format; evaluations are apart, and the last row, of the whole run, is no step."""
    path = tmp_path / "log"
    path.write_text(FORMATS[name])
    rows = Log(read(path)).rows
    assert [(one.place, one.evaluation) for one in rows] == [("step 10", False), ("step 20", False), ("step 20", True)]
    assert rows[0].values == ROWS[0] and rows[2].margin == -0.25
    assert math.isnan(rows[1].values["rewards/chosen"]) and math.isinf(rows[1].values["grad_norm"])
    assert str(doctor(path)) == str(doctor(ROWS)) and codes(ROWS) == ["nan"]


def test_other_names_are_known():
    """OpenRLHF, the original DPO code and W&B name the same metrics otherwise."""
    rows = [
        {"preference_loss": 0.5, "chosen_reward": 0.2, "reject_reward": -0.1, "acc": 0.7, "global_step": 3},
        {
            "loss/train": 0.5,
            "rewards_train/chosen": 0.2,
            "rewards_train/rejected": -0.1,
            "rewards_train/accuracies": 0.7,
        },
        {
            "train/loss": 0.5,
            "train/rewards/chosen": 0.2,
            "train/rewards/rejected": -0.1,
            "train/rewards/accuracies": 0.7,
        },
        {"loss/eval": 0.5, "rewards_eval/chosen": 0.2, "rewards_eval/rejected": -0.1, "eval/rewards/accuracies": 0.7},
    ]
    for i, one in enumerate(Log(rows).rows):
        assert one.get("loss") == 0.5 and one.margin == pytest.approx(0.3) and one.get("rewards/accuracies") == 0.7
        assert one.evaluation == (i == 3) and one.place == ("row 4", "step 3")[i == 0] if i in (0, 3) else True


REWARDED = {"loss": 0.7, "rewards/chosen": -2.0, "logps/chosen": -20.0, "rewards/rejected": -3.0}


@pytest.mark.parametrize(
    ("kind", "row"),
    [
        ("KTO", {"loss": 0.5, "kl": 0.0, "rewards/chosen": 0.0}),
        ("ORPO", {"loss": 3.0, "log_odds_ratio": -0.6, "rewards/chosen": -0.1}),
        ("online RL", {"loss": 0.0, "reward": 0.3, "kl": 0.1}),
        ("no reference", {**REWARDED, "logps/rejected": -30.0}), ("DPO", {**REWARDED, "logps/rejected": -31.0}),
        ("loss alone", {"loss": 3.2, "grad_norm": 1.0}),
    ],
)  # fmt: skip
def test_kinds_of_logs_are_named(kind, row):
    """A log that is not of DPO is named as such, and not measured by what holds for DPO."""
    diagnosis = doctor([{"step": 1, **row}])
    assert diagnosis.kind == kind
    assert [finding.code for finding in diagnosis.findings] == (["first_loss"] if kind == "DPO" else [])


def test_a_restart_begins_a_new_log():
    """Where steps go back, only the last run is read."""
    diagnosis = doctor([*losses_of(*WAVES), *HEALTHY])
    assert diagnosis.rows == 10 and not diagnosis.findings and "only the last run" in diagnosis.remarks[0]


def test_whether_the_policy_moves_is_told_only_by_the_same_examples():
    """The scores of evaluations, or of a batch that stays the same, tell it; other scores do not."""

    def evidence(*logps, part=""):
        rows = [row(i, **{} if part else {"logps/chosen": x}) for i, x in enumerate(logps)]
        rows += [{"step": i, "eval_logps/chosen": x} for i, x in enumerate(logps) if part]
        return doctor(rows).findings[0]

    assert "does not tell" in evidence(-9.0, -9.1, -9.2).evidence[-1]
    assert "does not move" in evidence(-9.0, -9.0, -9.0).evidence[-1]
    assert "does not move" in evidence(-9.0, -9.0, -9.0, part="eval").evidence[-1]
    assert evidence(-9.0, -9.1, -9.2, part="eval").causes == [WORDS["causes"]["same"]]


def test_an_nll_term_is_told_by_its_constant_share():
    """What a loss has beyond DPO's least is a constant times the NLL: that is remarked, and not an alarm."""
    rows = [
        row(600 + i, 8.0 + i, 0.25 * nll + softplus(-8.0 - i), nll_loss=nll, **WON)
        for i, nll in enumerate((0.9, 0.8, 0.7))
    ]
    diagnosis = doctor(rows)
    assert not diagnosis.findings and any("0.25 times the logged NLL" in remark for remark in diagnosis.remarks)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"", "has no row with a metric"), (b"{}\n[1, 2]\n", "has no row with a metric"),
        (b"PK\x03\x04" + bytes(90), "not text"),
        (b'{"prompt": "a", "chosen": "b", "rejected": "c"}', "has no row with a metric"),
        (b"[" * 100_000, "has no row with a metric"), (b"{" * 1_000_000, "has no row with a metric"),
    ],
)  # fmt: skip
def test_what_is_not_a_log_is_refused(content, sentence, tmp_path):
    """A file without metrics is an error with a sentence."""
    (tmp_path / "log").write_bytes(content)
    with pytest.raises(ValueError, match=sentence):
        doctor(tmp_path / "log")


def test_a_file_over_the_limit_is_refused(tmp_path, monkeypatch):
    """No more is read than the limit."""
    monkeypatch.setattr(logs, "MOST_BYTES", 100)
    (tmp_path / "log").write_text(printed(ROWS[:1])[:100].ljust(100))
    read(tmp_path / "log")
    (tmp_path / "log").write_text(" " * 101)
    with pytest.raises(ValueError, match="longer than 100 bytes"):
        doctor(tmp_path / "log")


def test_a_row_costs_few_calls(tmp_path):
    """A log of 100,000 rows takes seconds: a row costs fewer than 70 calls of Python functions."""
    more = dict.fromkeys(("epoch", "grad_norm", "learning_rate", "logps/rejected", "rewards/ties"), 0.125)
    rows = [row(i, i / 1e3 + math.sin(i) / 9, **more, **{"logps/chosen": -31.25}) for i in range(1000)]
    (tmp_path / "log").write_text(printed(rows))
    calls = collections.Counter()
    sys.setprofile(lambda frame, event, argument: calls.update([event]))
    try:
        diagnosis = doctor(tmp_path / "log")
    finally:
        sys.setprofile(None)
    assert diagnosis.rows == 1000 and not diagnosis.findings and 10_000 < calls["call"] < 70_000


names = st.sampled_from(
    [*KNOWN, "step", "epoch", "learning_rate", "nll_loss", "nll/chosen", "kl", "log_odds_ratio", "runtime", "x"]
)
keys = st.tuples(st.sampled_from(["", "eval_", "train_", "eval/"]), names).map("".join)
numbers = (
    st.floats() | st.sampled_from([0.0, 1.0, LOG2, 1e-7, "nan", "0.6931", "-inf"]) | st.integers(-(10**400), 10**400)
)
values = numbers | st.none() | st.booleans() | st.text(max_size=5) | st.lists(st.integers(), max_size=2)


@given(rows=st.lists(st.dictionaries(keys, values, max_size=12), max_size=14), repeats=st.integers(1, 4))
def test_any_rows_have_a_diagnosis(rows, repeats):
    """Rows of any numbers are diagnosed, or refused because no row has a metric; nothing else is raised."""
    for each in (rows * repeats, json.loads(json.dumps(rows))):
        try:
            diagnosis = doctor(each)
        except ValueError as error:
            assert "has no row with a metric" in str(error)
        else:
            assert (
                json.loads(json.dumps(diagnosis.as_dict(), allow_nan=False))
                and str(diagnosis).replace("\n", "").isprintable()
            )


@given(st.text())
def test_any_text_is_read(tmp_path_factory, text):
    """Text of any kind is read as rows, perhaps none."""
    path = tmp_path_factory.mktemp("log") / "log"
    path.write_text("{'loss': 0.5}\n" + text, errors="replace")
    assert all(isinstance(one, dict) for one in read(path))


# ---- the command ----------------------------------------------------------------------------------------------------


def test_the_command_says_what_is_wrong(tmp_path, capsys):
    """It exits with 1 if something is unusual, 0 if nothing is, 2 if there is no log to read."""
    sick, well = tmp_path / "sick.jsonl", tmp_path / "well\x1b[31m.jsonl"
    sick.write_text(printed(rows_of(0.0, 0.0, 0.0)))
    well.write_text(printed(HEALTHY))
    assert cli.main(["doctor", str(sick)]) == 1
    assert "stuck: Policy and reference never differ" in capsys.readouterr().out
    assert cli.main(["doctor", str(well), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == doctor(HEALTHY).as_dict() == verify.doctor(well).as_dict()
    assert cli.main(["doctor", str(well)]) == 0 and capsys.readouterr().out.endswith("Nothing unusual.\n")
    well.write_text("nothing")
    assert cli.main(["doctor", str(well)]) == 2
    error = capsys.readouterr().err
    assert "has no row with a metric" in error and "\x1b" not in error
    assert cli.main(["doctor", str(tmp_path / "missing")]) == 2
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text(printed(HEALTHY))
    assert cli.main(["doctor", str(tmp_path / "run")]) == 0
    assert "leave it out with --table" in " ".join(parser.parser("doctor").format_help().split())
    assert "-0," not in str(doctor(rows_of(-0.0, -0.0, -0.0)))
    assert cli.main(["doctor"]) == cli.main(["doctor", str(sick), "--table"]) == 2
    assert "--table" in capsys.readouterr().err
    assert cli.main(["doctor", "--table"]) == 0 and capsys.readouterr().out == table() + "\n"


def test_no_text_of_the_log_reaches_the_terminal(tmp_path, capsys):
    """Names and texts of a log are not shown, so neither are the escape sequences in them."""
    rows = [{**one, "\x1b[31m": 1.0, "x": "\x1b]0;title\x07", "loss": one["loss"]} for one in rows_of(0.0, 0.0, 0.0)]
    (tmp_path / "log").write_text(printed(rows, repr) + "".join(json.dumps(one) + "\n" for one in rows))
    assert cli.main(["doctor", str(tmp_path / "log")]) == 1
    assert capsys.readouterr().out.replace("\n", "").isprintable()
