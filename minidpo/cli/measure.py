"""The commands that measure: a policy on pairs, and the true reward of models of the desk."""

import math
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from json import dumps
from pathlib import Path
from typing import Annotated, Any

from .. import plots, training
from ..audit import calibration as calibrated
from ..audit import gates, proxy
from ..audit.intervals import Estimate
from ..audit.pairs import LENGTHS, SHARES, estimates, groups
from ..audit.pairs import as_text as as_groups
from ..audit.replies import as_text, figures, flat, judged, records
from ..audit.replies import failures as as_failures
from ..audit.replies import templates as as_templates
from ..backend import Array, to_host
from ..data import preferences, world
from ..data.preferences import Encoded
from ..run.checkpoint import Checkpoint
from ..run.files import write_folder, write_whole
from ..run.folder import digest, seen_prompts
from ..run.reference import pair_logprobs
from ..run.tasks import results
from ..scoring import Batch, collate
from ..streams import stream
from ..tokenizer import TURN, printable
from . import options as o
from .desk import test_prompts
from .look import OwnBeta, given_or_of_run, labels_of, run_settings, scored_rows
from .options import NO_MATPLOTLIB, Default, announce
from .parser import command
from .train import load, same_vocabulary

PRESSED = 100  # prompts, and replies, under pressure
RunReference = Annotated[o.Reference | None, Default("that of the dpo run")]


@command("look")
def evaluate(
    *, checkpoint: o.Checkpoint, data: o.Pairs, reference: RunReference = None, beta: OwnBeta = None,
    repeats: o.Repeats = "set-aside", slices: o.Slices = None, calibration: o.Calibration = False,
    plot: o.Diagrams = None, at_most: o.AtMost = None, at_least: o.AtLeast = None, seen: o.Seen = False,
    strict: o.Strict = False, truncation: o.Truncation = "none", device: o.Device = "cpu", json: o.Json = False,
) -> dict[str, Any]:  # fmt: skip
    """Measure a policy against its reference on pairs.

    Print the DPO loss alone, implicit rewards, accuracy (ties are counted beside it, not in it), log-probabilities,
    and the rise of the chosen responses' loss against the reference in nats per token. With --calibration, also how
    often labels are right beside the probability sigma(z) that the policy gives them, z being the reward margin; on
    pairs of the demo's world, also how far sigma(z) is from the true probability. Votes count as in `dpo`; with them,
    also the number of labels, the share of split pairs, and the loss that no model can go below. With --slices, the
    same for groups of pairs, with 95 % intervals. A condition is NAME=X with a metric's name, or GROUP/NAME=X; the exit
    status is 1 if one does not hold.
    """
    if plot and not (calibration and plots.installed()):
        raise ValueError("--plot needs --calibration" if plots.installed() else NO_MATPLOTLIB)
    announce(plot)
    reference, beta = given_or_of_run(checkpoint, reference, beta)
    policy, ref, rows, faults = scored_rows(checkpoint, reference, data, truncation, strict, device, repeats=repeats)
    pairs: list[Any] = rows.ids
    for folder in () if seen else dict.fromkeys((checkpoint, reference)):
        refuse_seen(folder, [(f"{data}, line {row.line}", row.prompt) for row in rows.rows])
    votes = preferences.label_metrics(rows.rows)
    if slices and slices not in LENGTHS and repeats == "count":
        raise ValueError("--repeats count merges rows, whose fields may differ: group by a length instead")
    if votes and calibration:
        raise ValueError(f"{data}: --calibration takes single labels: remove the votes, and --repeats count")
    ref_logps = pair_logprobs(ref.params, ref.config, pairs, "reference: pairs")
    logps = pair_logprobs(policy.params, policy.config, pairs, "policy: pairs")
    every = collate(pairs, *ref_logps, [row.votes for row in rows.rows])

    def summary(places: Any) -> dict[str, Any]:
        """The metrics of some of the pairs."""
        some = Batch([pairs[i] for i in places], *(x if x is None else x[places] for x in every[1:]))
        found = training.preference_summary(logps[0][places], logps[1][places], some, beta)
        ref_w, ref_l = to_host(some.ref_logp_w), to_host(some.ref_logp_l)
        found |= {"ref_logps/chosen": training.label_mean(ref_w, ref_l, some.votes)}
        return found | {"ref_logps/rejected": training.label_mean(ref_l, ref_w, some.votes)}

    metrics: dict[str, Any] = {"pairs": len(pairs), "set_aside": faults, "truncated": len(rows.truncated), **votes}
    metrics |= summary(range(len(pairs)))
    parts = groups(rows, slices) if slices else {}
    more: dict[str, Any] = {}
    if calibration:
        margin = to_host((logps[0] - ref_logps[0]) - (logps[1] - ref_logps[1])).astype(float)
        y = calibrated.chosen_first(pairs)
        z = (2 * y - 1) * beta * margin
        more["calibration"] = calibration_figures(rows, z, y, parts)
        if plot:
            write_whole(plot, plots.png(calibrated.panels(z, y)))
    parts |= {"": list(range(len(pairs)))} if at_most or at_least else {}
    tables: dict[str, dict[str, Any]] = {
        part: {"pairs": len(places), **estimates(summary, places, stream(0, "bootstrap"), () if votes else SHARES)}
        for part, places in parts.items()
    }
    limited = tables.pop("", {})
    more |= {"slices": tables} if slices else {}
    if json:
        print(dumps(metrics | finite(more), allow_nan=False))
    else:
        figures = more.get("calibration", {})
        numbers = {name: value for name, value in figures.items() if not isinstance(value, list | dict)}
        for name, value in {**metrics, **numbers, **figures.get("truth", {})}.items():
            print(f"{name:<20} {value:>12}" if isinstance(value, int) else f"{name:<20} {value:>z12.4f}")
        print(calibrated.table(figures["bins"]) if calibration else "", end="")
        print(calibrated.as_text(figures["slices"]) if calibration and slices else "", end="")
        print(as_groups(slices, tables) if slices else "", end="")
    named = {f"{part}/{name}": value for part, row in tables.items() for name, value in row.items() if name != "pairs"}
    named |= {name: value for name, value in limited.items() if name != "pairs"}
    numbers = more.get("calibration", {}).items()
    named |= {name: Estimate(x, x, x) for name, x in numbers if isinstance(x, float)}  # without an interval
    if broken := gates.hold(str(checkpoint), named, at_most or {}, at_least or {}):
        raise gates.GateError("; ".join(broken))
    return metrics | more


def calibration_figures(rows: Encoded, z: Array, y: Array, parts: Mapping[str, Any]) -> dict[str, Any]:
    """The calibration of all pairs and of each part; on pairs of the demo's world, also against the truth."""
    found = calibrated.calibration(z, y)
    texts = [(row.prompt.removesuffix(TURN), *row.responses) for row in rows.rows]
    if all(x in world.PROMPTS for x, *_ in texts):
        gap = [world.judgement(x, w).reward - world.judgement(x, l).reward for x, w, l in texts]
        found["truth"] = calibrated.against_truth(z, (2 * y - 1) * gap)
    if parts:
        found["slices"] = {part: calibrated.calibration(z[places], y[places]) for part, places in parts.items()}
    return found


def finite(figures: Any) -> Any:
    """Figures as JSON has them, where nan and inf are null."""
    if isinstance(figures, Mapping):
        return {name: finite(x) for name, x in figures.items()}
    if isinstance(figures, list | tuple):
        return [finite(x) for x in figures]
    return None if isinstance(figures, float) and not math.isfinite(figures) else figures


def refuse_seen(checkpoint: Path, prompts: Sequence[tuple[str, str]]) -> None:
    """Refuse prompts, each after its place, that the run of a checkpoint trained on or chose its checkpoint by."""
    uses = seen_prompts(checkpoint)
    if not uses:
        print(f"{checkpoint}: records no prompts, so none are known to have been trained on", file=sys.stderr)
    found = [(place, uses[key]) for place, prompt in prompts if (key := digest(prompt)) in uses]
    if found:
        place, use = found[0]
        raise ValueError(
            f"{place}: the run of {checkpoint} {use} this prompt ({len(found)} of {len(prompts)} rows), and figures "
            "of these flatter it: measure on others, or with --seen"
        )


def under_pressure(
    model: Checkpoint, reference: Checkpoint, beta: float, replies: Sequence[tuple[str, str]], seed: int, what: str
) -> tuple[str, dict[str, Any], list[plots.Panel]]:
    """The best of N of the reference by a model's implicit reward, and edits of its replies: in words and numbers."""
    prompts = list(dict.fromkeys(x for x, _ in replies))[:PRESSED]
    best = partial(proxy.best_of_reference, model, reference, beta, prompts, seed)
    edits = partial(proxy.edits_of_policy, model, reference, beta, list(dict.fromkeys(replies))[:PRESSED])
    curves, kinds = results([best, edits], what)
    rows = {part: [row._asdict() for row in curve] for part, curve in curves.items()}
    document = {"best_of": rows, "edits": {kind: row._asdict() for kind, row in kinds.items()}}
    text = f"{proxy.goodhart_text(curves['all'])}\n\n{proxy.edits_text(kinds)}"
    return text, document, proxy.panels(curves["all"])


@command("learn")
def judge(
    *, checkpoint: o.Checkpoints, reference: o.Reference, replies: o.Replies = 500, seed: o.Seed = 0,
    failures: o.Failures = 0, templates: o.Templates = False, at_most: o.AtMost = None, at_least: o.AtLeast = None,
    proxy: o.Proxy = False, seen: o.Seen = False, out: o.NewVerdicts = None,
) -> list[dict[str, Any]]:  # fmt: skip
    """Measure the true reward of models of the demo's world.

    Give models the demo's test prompts and print how good their replies truly are, for ordinary, private and benign
    prompts, with 95 % intervals and the paired difference to the reference, which draws with the same random numbers.
    The seed must be that of the demo that they were trained in: it decides which prompts are for the test. A condition
    is NAME=X with a figure's name, such as benign/declined=0.10 or reward/gain=0; every checkpoint but the reference
    must meet it, else the exit status is 1. With --proxy, the implicit reward of each model is put under pressure: it
    chooses the best of up to 64 replies of the reference, and edits of replies try to raise it.
    """
    prompts = test_prompts(seed, replies)
    if (at_most or at_least) and {each.resolve() for each in checkpoint} == {reference.resolve()}:
        raise ValueError("a condition is for a checkpoint that is not the reference, and there is none")
    announce(out)
    folders = {each.resolve(): each for each in (reference, *checkpoint)}  # each once, the reference first
    names = labels_of(folders)
    name, models = names[0], dict(zip(names, map(load, folders.values())))
    anchor = models[name]
    for folder, model in zip(folders.values(), models.values()):
        if not set("".join(prompts) + TURN) <= set(model.tokenizer.characters):
            raise ValueError(f"{folder}: lacks characters of the demo's world, so it is not a model of it")
        same_vocabulary(folder, model, reference, anchor)
        if not seen:
            refuse_seen(folder, [(f"seed {seed}, {printable(x)}", x + TURN) for x in prompts])
    written = list(world.TEMPLATES) if templates else ["as trained"]
    tasks = [partial(judged, model, anchor, prompts, seed, each) for model in models.values() for each in written]
    verdicts = results(tasks, "judge")
    groups = {label: {each: next(verdicts) for each in written} for label in models}
    drawn = {label: group["as trained"] for label, group in groups.items()}
    base, labels = drawn[name], [names[list(folders).index(each.resolve())] for each in checkpoint]
    tables = {label: figures(drawn[label], base, prompts) for label in labels}
    parts, pictures = [as_text(tables, name)], dict[str, list[plots.Panel]]()
    documents: dict[str, Any] = {"figures.json": tables}
    for label in labels:
        parts += [as_templates(groups[label], groups[name], label, name)] * templates
        parts += [as_failures(drawn[label], base, prompts, failures, label, name)] * bool(failures)
        if proxy:
            _, beta, note = run_settings(checkpoint[labels.index(label)], reference, None)
            title = f"{label}'s implicit reward as a judge of {name}'s replies, beta {beta:g}"
            own, file = list(zip(prompts, drawn[label].replies)), label.replace("/", "_")
            text, document, panels = under_pressure(models[label], anchor, beta, own, seed, f"{label} under pressure")
            parts += ["\n".join(filter(None, (title, note))), text]
            documents[f"proxy-{file}.json"], pictures[f"goodhart-{file}.png"] = document, panels
    print("\n\n".join(parts))
    broken = [
        sentence
        for label in labels
        if label != name
        for sentence in gates.hold(label, flat(tables[label]), at_most or {}, at_least or {})
    ]
    if out:
        lines = {"replies.jsonl": records(drawn, prompts)}
        if templates:
            other = {each: {label: group[each] for label, group in groups.items()} for each in written[1:]}
            lines["templates.jsonl"] = [
                {"template": each, **row} for each, x in other.items() for row in records(x, prompts)
            ]
        files = {key: "".join(dumps(row) + "\n" for row in x).encode() for key, x in lines.items()}
        files |= {key: (dumps(finite(x), indent=2) + "\n").encode() for key, x in documents.items()}
        files |= {key: plots.png(x) for key, x in pictures.items() if plots.installed()}
        write_folder(out, files)
    if broken:
        raise gates.GateError("; ".join(broken))
    return [
        {"model": label, "replies": drawn[label].replies, **{key: x.value for key, x in flat(tables[label]).items()}}
        for label in labels
    ]
