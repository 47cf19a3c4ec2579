"""Doctor names every fault that is produced here, and finds nothing in runs that are well."""

import json
import math
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minidpo import cli, losses, model, ops, optim, training, verify
from minidpo.data import world
from minidpo.data.preferences import collate
from minidpo.model import Config
from minidpo.streams import stream
from minidpo.theory.no_never_yes import CHOSEN, REJECTED, three_words
from minidpo.tokenizer import TURN, Tokenizer
from minidpo.verify.doctor import LOG2, MOST_BYTES, SYMPTOMS, WORDS, doctor, softplus, table

TOY = Config(vocab_size=8, n_positions=12, n_embd=16, n_layer=1, n_head=2)
KEYS = ("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies")


def toy_pairs(count, seed=0, noisy=True):
    """Pairs of short responses; token 1 is worth a point, token 2 costs one, labels follow Bradley-Terry or the sign."""
    rng, pairs = np.random.default_rng(seed), []
    while len(pairs) < count:
        x, *ys = ([*map(int, rng.integers(1, 8, n))] for n in (2, *rng.integers(2, 6, 2)))
        gap = 1.5 * (ys[0].count(1) - ys[0].count(2) - ys[1].count(1) + ys[1].count(2))
        if ys[0] != ys[1] and (noisy or gap):
            first = rng.random() < 1 / (1 + math.exp(-gap)) if noisy else gap > 0
            w, l = ys if first else ys[::-1]
            pairs.append(([0, *x], [*w, 0], [*l, 0]))
    return pairs


def dpo(*logps_and_beta):
    return losses.dpo_loss(*logps_and_beta)


def scaled(factor):
    """A loss that is DPO's times a factor, as a wrong accumulation makes it."""

    def loss(*arguments):
        out = dpo(*arguments)
        return out._replace(loss=factor * out.loss)

    return loss


def detached(w, l, *rest):
    """A loss that is not of the policy: what no_grad or frozen parameters leave."""
    out = dpo(w.detach(), l.detach(), *rest)
    return out._replace(loss=out.loss + 0.0 * ops.sum(w))


def beta_zero(w, l, ref_w, ref_l, beta):
    out = dpo(w, l, ref_w, ref_l, beta)
    return losses.PreferenceLoss(-ops.mean(ops.logsigmoid(0.0 * out.margin)), 0.0 * out.reward_w, 0.0 * out.reward_l, out.margin)


def swapped(w, l, ref_w, ref_l, beta):
    return dpo(w, l, ref_w, ref_l, beta)._replace(loss=dpo(l, w, ref_l, ref_w, beta).loss)


def maximised(*arguments):
    """The gradient of -L under the value of L: an optimizer that climbs."""
    out = dpo(*arguments)
    return out._replace(loss=2 * out.loss.detach() - out.loss)


def hinge(*arguments):
    out, beta = dpo(*arguments), arguments[-1]
    z = beta * out.margin
    return out._replace(loss=ops.mean((1.0 - z) * (z.data < 1).astype(z.data.dtype)))


def robust(*arguments, e=0.2):
    out, beta = dpo(*arguments), arguments[-1]
    z = beta * out.margin
    return out._replace(loss=-ops.mean((1 - e) * ops.logsigmoid(z) - e * ops.logsigmoid(-z)) / (1 - 2 * e))


def still_policy(w, l, beta):
    return losses.reference_free_loss(w, l, beta)


def train(
    pairs, held_out=(), config=TOY, seed=0, steps=30, rate=3e-3, batch=8, beta=0.1, every=10, loss=dpo, nll_weight=0.0,
    policy=None, reference=None, moving=False, eval_moving=False, optimizer_of=None, warmup=0, later=None, stored=None,
):  # fmt: skip
    """The log of a run of our own training step, under the names of metrics.jsonl."""
    policy = policy or model.init(config, np.random.default_rng(seed))
    reference = model.frozen(reference or policy)
    optimizer = optim.AdamW(optimizer_of or policy, rate)
    rows = []
    for step in range(steps + 1):
        if held_out and step % every == 0:
            anchor = policy if moving or eval_moving else reference
            scores = training.reference_logprobs(anchor, config, held_out)
            metrics = training.preference_evaluation(policy, config, collate(held_out, *scores), beta, dpo, nll_weight)
            rows.append({"step": step, **{f"eval_{name}": value for name, value in metrics.items()}})
        if step < steps:
            optimizer.learning_rate = rate * min(1.0, (step + 1) / warmup) if warmup else rate
            part = [pairs[i] for i in training.batch_indices(len(pairs), batch, step, seed)]
            try:
                metrics = training.dpo_training_step(
                    policy, policy if moving else reference, config, optimizer, collate(part), beta,
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
    return [{name: part[-1][name] if name == "step" else np.mean([row[name] for row in part]).item() for name in part[0]}
            for part in parts]  # fmt: skip


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
