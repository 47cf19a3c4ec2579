"""What a person reads after a run: report.md, and curves where matplotlib is installed."""

import math
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..plots import Curve, Panel, installed, png
from ..tokenizer import printable
from .files import CheckpointError, write_whole
from .folder import SAMPLE, json_lines, run_description

COLUMNS = {  # of the table of evaluations
    "step": "step",
    "eval_loss": "held-out loss",
    "eval_rewards/accuracies": "accuracy",
    "eval_rewards/ties": "ties",
    "eval_rewards/margins": "reward margin",
    "eval_logps/chosen": "log pi(chosen)",
    "eval_nll/chosen_rise": "rise of the chosen's nats per token",
    "eval_judge/reward": "true reward",
    "eval_judge/kl": "KL",
    "eval_judge/well_formed": "well formed",
}
CHOSEN_LOSS_WARNING = 0.025  # nats per token
NO_CURVES = "There are no curves: they need matplotlib, which is in the `plot` extra."


def best(metrics: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """The evaluation with the lowest held-out loss."""
    evaluations = [line for line in metrics if isinstance(line.get("eval_loss"), float)]
    if not evaluations:
        raise CheckpointError("metrics.jsonl holds no evaluation: there is nothing to report")
    return min(evaluations, key=lambda line: line["eval_loss"])


def warnings(metrics: Sequence[Mapping[str, Any]]) -> list[str]:
    """What a reader of a result must know: the training has not helped, or chosen responses are less likely."""
    lowest, evaluations = best(metrics), [line for line in metrics if "eval_loss" in line]
    helps = "More data, a smaller --learning-rate, a smaller model or a smaller --evaluate-every helps"
    sentences = []
    if lowest is evaluations[0] and len(evaluations) > 1:
        began = "THE RESULT IS THE MODEL THAT THE RUN BEGAN WITH: NO LATER EVALUATION HAD A LOWER HELD-OUT LOSS"
        sentences.append(f"{began}. {helps}")
    elif len(evaluations) > 2 and lowest is evaluations[1]:
        first = "THE LOWEST HELD-OUT LOSS WAS AT THE FIRST EVALUATION, AND THE BEST MODEL MAY LIE BEFORE IT"
        sentences.append(f"{first}. {helps}")
    rise, step = max((line.get("eval_nll/chosen_rise", 0.0), line["step"]) for line in (lowest, evaluations[-1]))
    if rise > CHOSEN_LOSS_WARNING:
        sentences.append(
            f"the chosen responses lost {rise:.2f} nats per token against the reference, more than "
            f"{CHOSEN_LOSS_WARNING:g}, at step {step}; a smaller --learning-rate, fewer --steps, a larger --beta or "
            "--nll-weight helps"
        )
    return sentences


def table(rows: Sequence[Mapping[str, Any]], columns: Mapping[str, str]) -> str:
    """A Markdown table; numbers are right-aligned, floats have four digits after the point."""

    def cell(value: Any) -> str:
        return f"{value:z.4f}" if isinstance(value, float) else printable(str(value)).replace("|", "\\|")

    lines = ["| " + " | ".join(columns.values()) + " |", "|" + "---:|" * len(columns)]
    lines += ["| " + " | ".join(cell(row.get(name, "")) for name in columns) + " |" for row in rows]
    return "\n".join(lines)


def write(run: Path) -> Mapping[str, Any]:
    """Write `report.md` of a run, and `curves.png` if matplotlib is installed; return the best evaluation."""
    description = run_description(run)
    name = run.resolve().name
    metrics = json_lines(run / "metrics.jsonl")
    samples = json_lines(run / "samples.jsonl", texts=SAMPLE)
    lowest = best(metrics)
    evaluations = [line for line in metrics if "eval_loss" in line]
    columns = {key: title for key, title in COLUMNS.items() if key in evaluations[0]}
    every = -(-len(evaluations) // 20)  # the table has about 20 rows
    rows = [line for i, line in enumerate(evaluations) if i % every == 0 or line in (lowest, evaluations[-1])]
    rows = [{**x, "eval_rewards/accuracies": "all tie"} if x.get("eval_rewards/ties") == 1 else x for x in rows]
    command = shlex.join(["minidpo", *description["arguments"], f"--out={name}"])
    parts = [
        f"# {printable(name)}",
        f"In any folder, this command repeats the run in a new folder {printable(name)}:\n\n    {printable(command)}",
        f"The result, `model`, is the checkpoint of step {lowest['step']}, which had the lowest held-out loss.",
        *(f"**Warning:** {sentence}." for sentence in warnings(metrics)),
        table(rows, columns),
    ]
    if "rows" in description:
        parts += [f"Rows: {printable(str(description['rows']))}. Those set aside are in `set_aside.jsonl`."]
    for step in sorted({0, lowest["step"]}):
        lines = [line for line in samples if line["step"] == step]
        parts += [f"## The model's replies at step {step}"]
        parts += ["\n".join(f"    {printable(line['prompt'])} -> {printable(line['response'])}" for line in lines)]
    environment = [f"- {printable(f'{key}: {value}')}" for key, value in description["environment"].items()]
    parts += ["## Made with", "\n".join(environment)]
    if curves(run / "curves.png", {name: metrics}):
        parts += ["![curves](curves.png)"]
    else:
        parts += [f"{NO_CURVES} Once it is installed, `minidpo resume` draws them."]
    write_whole(run / "report.md", ("\n\n".join(parts) + "\n").encode())
    return lowest


def curves(path: Path, runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> bool:
    """Draw the metrics of runs into a PNG; without matplotlib, write nothing and return False."""
    if not installed():
        return False
    write_whole(path, png([panel for name, metrics in runs.items() for panel in panels(name, metrics)]))
    return True


def panels(name: str, metrics: Sequence[Mapping[str, Any]]) -> list[Panel]:
    """Losses, accuracy and rewards of a run over its steps, as far as its metrics hold them.

    Batches are noisy: they are thin and pale, below their running mean. At policy = reference the DPO loss is log 2. A
    run whose DPO loss begins there has a line at log 2; other losses have none. In the accuracy a tie is one half.
    """
    first = next(line for line in metrics if "eval_loss" in line)
    pairs, both = "eval_rewards/accuracies" in first, "eval_loss/dpo" in first
    dpo = math.isclose(first.get("eval_loss/dpo", first["eval_loss"]), math.log(2), rel_tol=1e-6)
    unit, level = ("nats per pair", math.log(2)) if dpo else ("" if pairs else "nats per token", None)
    diagrams = [
        ("loss", unit.removesuffix(" per pair" * both), ["loss"], None if both else level, "log 2"),
        ("DPO term of the loss", unit, ["loss/dpo"], level, "log 2"),
        ("likelihood term of the loss", "nats per token", ["loss/nll"], None, ""),
        ("reward accuracy", "share of pairs", ["rewards/accuracies"], 0.5, "one half"),
        ("implicit reward", "nats", ["rewards/chosen", "rewards/rejected"], 0.0, "the reference"),
        ("true reward of replies", "from -4 to 3", ["judge/reward"], None, ""),
        ("KL to the reference", "nats", ["judge/kl"], None, ""),
        ("well-formed replies", "share", ["judge/well_formed"], None, ""),
    ]
    result = []
    for title, ylabel, keys, level, level_label in diagrams:
        curves = []
        for prefix, what in (("", "batch"), ("eval_", "held out")):
            for key in keys if prefix or len(keys) == 1 else []:  # two noisy curves would cover each other
                label = f"{key.removeprefix('rewards/')}, {what}" if len(keys) > 1 else what
                lines = [line for line in metrics if prefix + key in line]
                x, y = [line["step"] for line in lines], [line[prefix + key] for line in lines]
                if key == "rewards/accuracies":
                    y = [share + line.get(f"{prefix}rewards/ties", 0.0) / 2 for share, line in zip(y, lines)]
                curves += [Curve(label, x, y, "o" if prefix else None, faint=not prefix)] if lines else []
                count = -(-len(y) // 20)
                if not prefix and count > 1:
                    curves.append(Curve(f"mean of {count} batches", x[count - 1 :], running_mean(y, count)))
        if curves:
            result.append(Panel(f"{name}: {title}", "step", ylabel, curves, level=level, level_label=level_label))
    return result


def running_mean(y: Sequence[float], count: int) -> list[float]:
    """The mean of each number and the `count` - 1 before it; the first few, which lack some, are left out."""
    return [math.fsum(y[end - count : end]) / count for end in range(count, len(y) + 1)]
