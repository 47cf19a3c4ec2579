"""What a person reads after a run: report.md, and curves where matplotlib is installed."""

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..plots import Curve, Panel, installed, png
from ..tokenizer import printable
from .checkpoint import CheckpointError
from .files import write_whole
from .folder import described, json_lines

COLUMNS = {  # of the table of measurements
    "step": "step",
    "eval_loss": "held-out loss",
    "eval_rewards/accuracies": "accuracy",
    "eval_rewards/ties": "ties",
    "eval_rewards/margins": "reward margin",
    "eval_logps/chosen": "log pi(chosen)",
    "eval_nll/chosen_rise": "rise of the chosen's nats a token",
}
NO_CURVES = "There are no curves: they need matplotlib, which is in the `plot` extra. With it, resume the run."


def best(metrics: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """The measurement with the lowest held-out loss.

    Raises
    ------
    CheckpointError
        If there is none.
    """
    measured = [line for line in metrics if isinstance(line.get("eval_loss"), float)]
    if not measured:
        raise CheckpointError("there is no measurement in metrics.jsonl, so that there is nothing to report")
    return min(measured, key=lambda line: line["eval_loss"])


def table(rows: Sequence[Mapping[str, Any]], columns: Mapping[str, str]) -> str:
    """A Markdown table; numbers are right-aligned, floats have four digits after the point."""

    def cell(value: Any) -> str:
        return f"{value:.4f}" if isinstance(value, float) else printable(str(value)).replace("|", "\\|")

    lines = ["| " + " | ".join(columns.values()) + " |", "|" + "---:|" * len(columns)]
    lines += ["| " + " | ".join(cell(row.get(name, "")) for name in columns) + " |" for row in rows]
    return "\n".join(lines)


def write(run: Path) -> Mapping[str, Any]:
    """Write `report.md` of a run, and `curves.png` if matplotlib is installed; returns the best measurement."""
    description = described(run)
    name = run.resolve().name
    metrics = json_lines(run / "metrics.jsonl")
    measured = [line for line in metrics if "eval_loss" in line]
    lowest = best(metrics)
    columns = {name: title for name, title in COLUMNS.items() if name in measured[0]}
    every = -(-len(measured) // 20)
    kept = [line for i, line in enumerate(measured) if i % every == 0 or line in (lowest, measured[-1])]
    command = shlex.join(["python", "-m", "minidpo", *description["arguments"], f"--out={name}"])
    parts = [
        f"# {printable(name)}",
        f"    {printable(command)}",
        f"The result, `model`, is the checkpoint of step {lowest['step']}, which had the lowest held-out loss.",
        table(kept, columns),
    ]
    if "rows" in description:
        parts += [f"Rows: {printable(str(description['rows']))}. Those set aside are in `set_aside.jsonl`."]
    samples = json_lines(run / "samples.jsonl")
    for step in sorted({0, lowest["step"]}):
        lines = [line for line in samples if line["step"] == step]
        parts += [f"## What the model answered at step {step}"]
        parts += ["\n".join(f"    {printable(line['prompt'])} -> {printable(line['response'])}" for line in lines)]
    parts += [
        "## Made with",
        "\n".join(f"- {printable(f'{key}: {value}')}" for key, value in description["environment"].items()),
    ]
    if curves(run / "curves.png", {name: metrics}):
        parts += ["![curves](curves.png)"]
    else:
        parts += [NO_CURVES]
    write_whole(run / "report.md", ("\n\n".join(parts) + "\n").encode())
    return lowest


def curves(path: Path, runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> bool:
    """Draw loss, accuracy and rewards of runs over their steps into a PNG; false if matplotlib is missing."""
    diagrams = {
        "loss": {"loss": "batch", "eval_loss": "held out"},
        "reward accuracy": {"rewards/accuracies": "batch", "eval_rewards/accuracies": "held out"},
        "implicit reward": {"eval_rewards/chosen": "chosen, held out", "eval_rewards/rejected": "rejected, held out"},
    }
    panels = []
    for name, metrics in runs.items():
        for title, labels in diagrams.items():
            lines = []
            for key, label in labels.items():
                points = [(line["step"], line[key]) for line in metrics if key in line]
                if points:
                    faint = label == "batch"
                    x, y = zip(*points)
                    lines.append(Curve(label, x, y, None if faint else "o", faint))
            panels += [Panel(f"{name}: {title}", "step", "", lines)] if lines else []
    if not installed():
        return False
    write_whole(path, png(panels))
    return True
