"""The commands that measure: a policy on pairs, and the true reward of models of the desk."""

import functools
import math
from functools import partial
from json import dumps
from typing import Annotated, Any

from .. import training
from ..audit import calibration as calibrated
from ..backend import to_host
from ..data import preferences
from ..run.tasks import counted, results
from ..scoring import collate
from ..tokenizer import TURN, printable
from . import options as o
from .desk import as_text, held_out_prompts, verdict
from .look import OwnBeta, given_or_of_run, scored_rows
from .options import Default
from .parser import command
from .train import load, same_vocabulary

RunReference = Annotated[o.Reference | None, Default("that of the dpo run")]


@command("look")
def evaluate(
    *, checkpoint: o.Checkpoint, data: o.Pairs, reference: RunReference = None, beta: OwnBeta = None,
    calibration: o.Calibration = False, repeats: o.Repeats = "set-aside",
    strict: o.Strict = False, truncation: o.Truncation = "none", device: o.Device = "cpu", json: o.Json = False,
) -> dict[str, Any]:  # fmt: skip
    """Measure a policy against its reference on pairs.

    Print the DPO loss alone, implicit rewards, accuracy (ties are counted beside it, not in it), log-probabilities,
    and the rise of the chosen responses' loss against the reference in nats per token. With --calibration, also how
    often labels are right beside the probability sigma(z) that the policy gives them, z being the reward margin. Votes
    count as in `dpo`; with them, also the number of labels, the share of split pairs, and the loss that no model can go
    below.
    """
    reference, beta = given_or_of_run(checkpoint, reference, beta)
    policy, ref, rows, faults = scored_rows(checkpoint, reference, data, truncation, strict, device, repeats=repeats)
    pairs: list[Any] = rows.ids
    votes = preferences.label_metrics(rows.rows)
    if votes and calibration:
        raise ValueError(f"{data}: --calibration takes single labels: remove the votes, and --repeats count")
    ref_logp_w, ref_logp_l = training.reference_logprobs(ref.params, ref.config, counted(pairs, "reference: pairs"))
    batch = collate(pairs, ref_logp_w, ref_logp_l, [row.votes for row in rows.rows])
    metrics: dict[str, Any] = {"pairs": len(pairs), "set_aside": faults, "truncated": len(rows.truncated), **votes}
    watch = functools.partial(counted, what="policy: pairs")
    metrics |= training.preference_evaluation(policy.params, policy.config, batch, beta, watch=watch)
    both = to_host(ref_logp_w), to_host(ref_logp_l)
    metrics |= {"ref_logps/chosen": training.label_mean(*both, batch.votes)}
    metrics |= {"ref_logps/rejected": training.label_mean(*both[::-1], batch.votes)}
    figures: dict[str, Any] = {}
    if calibration:
        logp_w, logp_l = training.reference_logprobs(policy.params, policy.config, watch(pairs))
        y = calibrated.chosen_first(pairs)
        z = beta * ((logp_w - ref_logp_w) - (logp_l - ref_logp_l))
        figures = calibrated.calibration((2 * y - 1) * z.tolist(), y)
    if json:
        finite = {k: v if isinstance(v, list) or math.isfinite(v) else None for k, v in figures.items()}
        print(dumps(metrics | ({"calibration": finite} if calibration else {}), allow_nan=False))
    else:
        for name, value in {**metrics, **{k: v for k, v in figures.items() if k != "bins"}}.items():
            print(f"{name:<20} {value:>12}" if isinstance(value, int) else f"{name:<20} {value:>z12.4f}")
        print(calibrated.table(figures["bins"]) if calibration else "", end="")
    return metrics | ({"calibration": figures} if calibration else {})


@command("learn")
def judge(
    *, checkpoint: o.Checkpoints, reference: o.Reference, replies: o.Replies = 500, seed: o.Seed = 0
) -> list[dict[str, Any]]:
    """Measure the true reward of models of the demo's world.

    Give models the demo's held-out prompts and print how good their replies truly are, one column per model. The
    seed must be that of the demo that they were trained in: it decides which prompts were held out.
    """
    prompts = held_out_prompts(seed, replies)
    anchor = load(reference)
    models = [load(folder) for folder in checkpoint]
    for folder, model in zip(checkpoint, models):
        if not set("".join(prompts) + TURN) <= set(model.tokenizer.characters):
            raise ValueError(f"{folder}: lacks characters of the demo's world, so it is not a model of it")
        same_vocabulary(folder, model, reference, anchor)
    verdicts = results([partial(verdict, model, anchor, prompts, seed) for model in models], "judge")
    rows = [{"model": printable(folder.resolve().name), **row} for folder, row in zip(checkpoint, verdicts)]
    print(as_text(rows).replace("KL to SFT", f"KL to {printable(reference.resolve().name)}"))
    return rows
