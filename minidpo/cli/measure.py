"""The commands that measure: a policy on pairs, and the true reward of models of the desk."""

import functools
import math
from collections.abc import Sequence
from functools import partial
from json import dumps
from pathlib import Path
from typing import Annotated, Any

from .. import training
from ..audit import calibration as calibrated
from ..audit import gates
from ..audit.replies import as_text, figures, flat, judged, records
from ..audit.replies import failures as as_failures
from ..audit.replies import templates as as_templates
from ..data import world
from ..run.files import write_folder
from ..run.folder import digest, seen_prompts
from ..run.tasks import counted, results
from ..scoring import collate
from ..tokenizer import TURN, printable
from . import options as o
from .desk import test_prompts
from .look import OwnBeta, given_or_of_run, scored_rows
from .options import Default
from .parser import command
from .train import load, same_vocabulary

RunReference = Annotated[o.Reference | None, Default("that of the dpo run")]


@command("look")
def evaluate(
    *, checkpoint: o.Checkpoint, data: o.Pairs, reference: RunReference = None, beta: OwnBeta = None,
    calibration: o.Calibration = False, seen: o.Seen = False,
    strict: o.Strict = False, truncation: o.Truncation = "none", device: o.Device = "cpu", json: o.Json = False,
) -> dict[str, Any]:  # fmt: skip
    """Measure a policy against its reference on pairs.

    Print the DPO loss alone, implicit rewards, accuracy (ties are counted beside it, not in it), log-probabilities,
    and the rise of the chosen responses' loss against the reference in nats per token. With --calibration, also how
    often labels are right beside the probability sigma(z) that the policy gives them, z being the reward margin.
    """
    reference, beta = given_or_of_run(checkpoint, reference, beta)
    policy, ref, rows, faults = scored_rows(checkpoint, reference, data, truncation, strict, device)
    pairs: list[Any] = rows.ids
    if not seen:
        refuse_seen(checkpoint, [(f"{data}, line {row.line}", row.prompt) for row in rows.rows])
    ref_logp_w, ref_logp_l = training.reference_logprobs(ref.params, ref.config, counted(pairs, "reference: pairs"))
    batch = collate(pairs, ref_logp_w, ref_logp_l)
    metrics: dict[str, Any] = {"pairs": len(pairs), "set_aside": faults, "truncated": len(rows.truncated)}
    watch = functools.partial(counted, what="policy: pairs")
    metrics |= training.preference_evaluation(policy.params, policy.config, batch, beta, watch=watch)
    metrics |= {"ref_logps/chosen": ref_logp_w.mean().item(), "ref_logps/rejected": ref_logp_l.mean().item()}
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


def refuse_seen(checkpoint: Path, prompts: Sequence[tuple[str, str]]) -> None:
    """Refuse prompts, each after its place, that the run of a checkpoint trained on or chose its checkpoint by."""
    uses = seen_prompts(checkpoint)
    found = [(place, uses[digest(prompt)]) for place, prompt in prompts if digest(prompt) in uses]
    if found:
        place, use = found[0]
        raise ValueError(
            f"{place}: the run of {checkpoint} {use} this prompt ({len(found)} of {len(prompts)} rows), and figures "
            "of these flatter it: measure on others, or with --seen"
        )


@command("learn")
def judge(
    *, checkpoint: o.Checkpoints, reference: o.Reference, replies: o.Replies = 500, seed: o.Seed = 0,
    failures: o.Failures = 0, templates: o.Templates = False, at_most: o.AtMost = None, at_least: o.AtLeast = None,
    seen: o.Seen = False, out: o.NewVerdicts = None,
) -> list[dict[str, Any]]:  # fmt: skip
    """Measure the true reward of models of the demo's world.

    Give models the demo's test prompts and print how good their replies truly are, for ordinary, private and benign
    prompts, with 95 % intervals and the paired difference to the reference, which draws with the same random numbers.
    The seed must be that of the demo that they were trained in: it decides which prompts are for the test. A condition
    is NAME=X with a figure's name, such as benign/declined=0.10 or reward/gain=0; every checkpoint but the reference
    must meet it, else the exit status is 1.
    """
    prompts = test_prompts(seed, replies)
    o.announce(out)
    anchor, name = load(reference), printable(reference.resolve().name)
    models = [load(folder) for folder in checkpoint]
    for folder, model in zip(checkpoint, models):
        if not set("".join(prompts) + TURN) <= set(model.tokenizer.characters):
            raise ValueError(f"{folder}: lacks characters of the demo's world, so it is not a model of it")
        same_vocabulary(folder, model, reference, anchor)
        if not seen:
            refuse_seen(folder, [(f"seed {seed}, {printable(x)}", x + TURN) for x in prompts])
    written = list(world.TEMPLATES) if templates else ["as trained"]
    tasks = [partial(judged, model, anchor, prompts, seed, each) for model in [anchor, *models] for each in written]
    verdicts = list(results(tasks, "judge"))
    groups = [dict(zip(written, verdicts[i : i + len(written)])) for i in range(0, len(verdicts), len(written))]
    base, *own = (group["as trained"] for group in groups)
    labels = [printable(folder.resolve().name) for folder in checkpoint]
    if len({name, *labels}) < len({reference, *checkpoint}):  # as a/model and b/model have
        name, *labels = (printable(str(folder)) for folder in (reference, *checkpoint))
    tables = {label: figures(each, base, prompts) for label, each in zip(labels, own, strict=True)}
    parts = [as_text(tables, name)]
    for label, group, model in zip(labels, groups[1:], own):
        parts += [as_templates(group, groups[0], label, name)] * templates
        parts += [as_failures(model, base, prompts, failures, label, name)] * bool(failures)
    print("\n\n".join(parts))
    if out:
        drawn = {name: base, **dict(zip(labels, own))}
        lines = "".join(dumps(row) + "\n" for row in records(drawn, prompts))
        write_folder(out, {"replies.jsonl": lines.encode(), "figures.json": (dumps(tables, indent=2) + "\n").encode()})
    broken = []
    for folder, label, table in zip(checkpoint, labels, tables.values()):
        if folder.resolve() != reference.resolve():
            broken += gates.hold(label, flat(table), at_most or {}, at_least or {})
    if broken:
        raise gates.GateError("; ".join(broken))
    return [
        {"model": label, "replies": each.replies, **{key: x.value for key, x in flat(table).items()}}
        for label, each, table in zip(labels, own, tables.values())
    ]
