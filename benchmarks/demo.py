"""The demo over several seeds: what each stage gains, its CPU seconds, and how DPO collapses without an anchor.

    python benchmarks/demo.py --seeds 0 1 2

writes benchmarks/results/demo.json; the README shows its figures.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

from minidpo import checkpoint, cli, world
from minidpo.audit import proxy, replies
from minidpo.cli import desk
from minidpo.run import files, report
from minidpo.run import folder as run_folder
from minidpo.run.tasks import results

COLLAPSING = ("--beta=0.1", "--nll-weight=0", "--learning-rate=3e-4", "--judge-every=20")
CURVE = ("step", "eval_loss", "eval_rewards/accuracies", "eval_judge/reward", "eval_judge/kl", "eval_judge/well_formed")
RESULTS = Path(__file__).parent / "results" / "demo.json"


def command(*arguments):
    """Run a command of minidpo, printing to the terminal."""
    subprocess.run([sys.executable, "-m", "minidpo", *map(str, arguments)], check=True)


def cpu_seconds():
    """CPU seconds of all commands so far, with the processes that they started."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def one_seed(folder, seed):
    """Run the demo with a seed, then DPO again at beta 0.1 without the likelihood term; the figures of all models."""
    before = cpu_seconds()
    command("demo", "--out", folder, "--seed", seed)
    seconds = cpu_seconds() - before
    data = folder / "data"
    options = [f"--data={data / 'pairs.jsonl'}", f"--held-out-data={data / 'pairs_held_out.jsonl'}", f"--seed={seed}"]
    options += [f"--steps={desk.FULL.steps['dpo']}", "--evaluate-every=20", f"--init={folder / 'sft'}"]
    command("dpo", *options, f"--out={folder / 'collapse'}", *COLLAPSING)
    sft, dpo, collapse = (checkpoint.load(folder / stage) for stage in ("sft", "dpo", "collapse"))
    prompts = desk.test_prompts(seed, desk.FULL.replies)
    some, lines = list(dict.fromkeys(prompts))[:100], run_folder.json_lines
    document = json.loads((folder / "results.json").read_text())
    kept = [json.loads(line) for line in (folder / "replies.jsonl").read_text().splitlines()]
    answers = list(dict.fromkeys((row["prompt"], row["replies"]["DPO"]["reply"]) for row in kept))[:100]
    judging = [partial(replies.judged, model, sft, prompts, seed, template)
               for template in world.TEMPLATES for model in (sft, dpo)]  # fmt: skip
    judging += [partial(replies.judged, collapse, sft, prompts, seed)]
    pressing = [partial(proxy.best_of_reference, dpo, sft, 0.2, some, seed)]
    pressing += [partial(proxy.edits_of_policy, dpo, sft, 0.2, answers)]
    *verdicts, curves, edits = results([*judging, *pressing], "judging")
    asked = dict(zip(world.TEMPLATES, zip(verdicts[::2], verdicts[1::2])))
    document["models"]["DPO, collapsed"] = replies.figures(verdicts[-1], asked["as trained"][0], prompts)
    templates = {}
    for template, (own, policy) in asked.items():
        base, tuned = (replies.figures(each, own, prompts)["all"] for each in (own, policy))
        templates[template] = {"SFT": base["reward"], **{name: tuned[name] for name in ("reward", "gain", "garbled")}}
    measured = {
        stage: cli.evaluate(
            checkpoint=folder / stage, reference=folder / "sft", data=data / "pairs_test.jsonl", calibration=True
        )
        for stage in ("dpo", "collapse")
    }
    logs = {stage: lines(folder / stage / "metrics.jsonl") for stage in measured}
    return {
        "seed": seed,
        "cpu_seconds": seconds,
        **document,
        "templates": templates,
        "best_of": [row._asdict() for row in curves["all"]],
        "edits": {kind: row._asdict() for kind, row in edits.items()},
        "measured": measured,
        "held_out": {stage: report.best(each) for stage, each in logs.items()},
        "collapse": [{name: line[name] for name in CURVE} for line in logs["collapse"] if "eval_loss" in line],
        "environment": json.loads((folder / "dpo" / "run.json").read_text())["environment"],
    }


ROWS = [
    ("all", name) for name in ("reward", "gain", "better", "worse", "garbled", "on_topic", "polite", "length", "kl")
]
ROWS += [(part, name) for part in world.SLICES for name in ("reward", "declined", "answered", "garbled")]


def value(figure):
    """A figure without its interval."""
    return figure[0] if isinstance(figure, list | tuple) else figure


def cell(values):
    """Mean and standard deviation over the seeds."""
    return f"{statistics.fmean(values):z.2f} ± {statistics.stdev(values):.2f}"


def as_table(runs):
    """The figures of the models, by slice."""
    models = list(runs[0]["models"])
    lines = [f"| | {' | '.join(models)} |", "|---|" + "---:|" * len(models)]
    for part, name in ROWS:
        title = replies.TITLES[name].format("SFT") + (f", {part}" if part != "all" else "")
        columns = [[value(run["models"][model][part][name]) for run in runs] for model in models]
        lines.append(f"| {title} | {' | '.join(map(cell, columns))} |")
        if (part, name) == ("all", "reward"):
            ends = (f"{min(column):.2f}, {max(column):.2f}" for column in columns)
            lines.append(f"| lowest and highest seed | {' | '.join(ends)} |")
    return "\n".join(lines)


def as_best_of(runs):
    """The best of N replies of the reference, chosen by the implicit reward."""
    lines = ["| N | KL at most | implicit reward | true reward | garbled | true reward, chosen by itself |"]
    lines += ["|---:|---:|---:|---:|---:|---:|"]
    for rows in zip(*(run["best_of"] for run in runs)):
        cells = (cell([row[name][0] for row in rows]) for name in ("implicit", "true", "garbled", "ceiling"))
        lines.append(f"| {rows[0]['size']} | {rows[0]['kl']:.2f} | {' | '.join(cells)} |")
    return "\n".join(lines)


def as_edits(runs):
    """Edits of well-formed replies, of all seeds together."""
    lines = ["| edit | edits | raise the implicit reward | lower the true one | do both |", "|---|" + "---:|" * 4]
    for kind in runs[0]["edits"]:
        counts = (sum(run["edits"][kind][name] for run in runs) for name in ("n", "raising", "lowering", "both"))
        lines.append(f"| {kind} | {' | '.join(map(str, counts))} |")
    return "\n".join(lines)


def as_templates(runs):
    """What DPO is worth in each template."""
    lines = ["| the customer's line | SFT | DPO | DPO's gain | DPO, garbled |", "|---|" + "---:|" * 4]
    for template in world.TEMPLATES:
        columns = [[value(run["templates"][template][name]) for run in runs]
                   for name in ("SFT", "reward", "gain", "garbled")]  # fmt: skip
        lines.append(f"| {template} | {' | '.join(map(cell, columns))} |")
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="random seeds (default: 0 1 2)")
    seeds = parser.parse_args().seeds
    with tempfile.TemporaryDirectory() as folder:
        runs = [one_seed(Path(folder) / f"demo{seed}", seed) for seed in seeds]
    RESULTS.parent.mkdir(exist_ok=True)
    files.write_whole(RESULTS, (json.dumps(runs, indent=2) + "\n").encode())
    tables = (table(runs) for table in (as_table, as_templates, as_best_of, as_edits))
    print(*tables, f"written to {RESULTS}", sep="\n\n")
