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
    rise = max(line.get("eval_nll/chosen_rise", 0.0) for line in (lowest, evaluations[-1]))
    if rise > CHOSEN_LOSS_WARNING:
        sentences.append(
            f"the chosen responses lost {rise:.2f} nats per token against the reference, more than "
            f"{CHOSEN_LOSS_WARNING:g}; a smaller --learning-rate, fewer --steps, a larger --beta or --nll-weight helps"
        )
    return sentences


def table(rows: Sequence[Mapping[str, Any]], columns: Mapping[str, str]) -> str:
    """A Markdown table; numbers are right-aligned, floats have four digits after the point."""

    def cell(value: Any) -> str:
        return f"{value:.4f}" if isinstance(value, float) else printable(str(value)).replace("|", "\\|")

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
    command = shlex.join(["minidpo", *description["arguments"], f"--out={name}"])
    parts = [
        f"# {printable(name)}",
        f"    {printable(command)}",
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
    """Loss, accuracy and rewards of a run over its steps, as far as its metrics hold them.

    At policy = reference the DPO loss is log 2. A run that begins there has a line at log 2; other losses have none.
    """
    first = next(line for line in metrics if "eval_loss" in line)
    dpo = math.isclose(first["eval_loss"], math.log(2), rel_tol=1e-6)
    unit = "nats a pair" if dpo else "" if "eval_rewards/accuracies" in first else "nats per token"
    reward = {"eval_rewards/chosen": "chosen, held out", "eval_rewards/rejected": "rejected, held out"}
    accuracy = {"rewards/accuracies": "batch", "eval_rewards/accuracies": "held out"}
    diagrams = [
        ("loss", unit, {"loss": "batch", "eval_loss": "held out"}, math.log(2) if dpo else None, "log 2"),
        ("reward accuracy", "share of pairs", accuracy, 0.5, "one half"),
        ("implicit reward", "nats", reward, 0.0, "the reference"),
    ]
    result = []
    for title, ylabel, labels, level, level_label in diagrams:
        series = []
        for key, label in labels.items():
            lines = [line for line in metrics if key in line]
            x, y = [line["step"] for line in lines], [line[key] for line in lines]
            series += [Curve(label, x, y, None if label == "batch" else "o", faint=label == "batch")] if lines else []
        if series:
            result.append(Panel(f"{name}: {title}", "step", ylabel, series, level=level, level_label=level_label))
    return result
