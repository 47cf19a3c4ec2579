"""Draw the pictures that are committed: the README's of the demo, and those of the tutorials.

python -m benchmarks.pictures

Needs the `plot` extra.
"""

import contextlib
import importlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from minidpo import cli, plots
from minidpo.run.files import write_whole

HERE = Path(__file__).parent
TUTORIALS = HERE.parent / "tutorials"
MODELS = ("base", "SFT", "DPO", "DPO, collapsed")
COLORS = (plots.INK, "#0072B2", "#009E73", "#D55E00")


def demo_rewards(path):
    """True reward of each model, one dot a seed and a bar at their mean."""
    runs = json.loads((HERE / "results" / "demo.json").read_text())
    matplotlib, figures = (importlib.import_module(name) for name in ("matplotlib", "matplotlib.figure"))
    with matplotlib.rc_context({**plots.STYLE, "axes.grid.axis": "x"}):
        figure = figures.Figure(figsize=(6.4, 2.5), layout="constrained")
        axes = figure.subplots()
        for row, color in enumerate(COLORS):
            models = [run["models"][MODELS[row]]["all"] for run in runs]
            rewards = [model["reward"][0] for model in models]
            mean, formed = statistics.fmean(rewards), 1 - statistics.fmean(model["garbled"][0] for model in models)
            axes.plot(rewards, [row] * len(rewards), "o", color=color, markersize=7, alpha=0.7)
            axes.plot([mean, mean], [row - 0.28, row + 0.28], color=color, linewidth=3)
            axes.text(
                1.02, row, f"{formed:.0%} well formed", color=color, va="center", transform=axes.get_yaxis_transform()
            )
        axes.set(xlim=(-4.1, 3.1), ylim=(3.6, -0.6), yticks=range(4), yticklabels=MODELS)
        axes.set(xlabel="true reward of a reply, mean of 500 (from -4 to 3); a dot is a seed")
        axes.set_xticks(range(-4, 4))
        for label, color in zip(axes.get_yticklabels(), COLORS):
            label.set_color(color)
        figure.savefig(path, dpi=120, transparent=True, metadata={"Software": None})


def collapse(path):
    """What a log shows of a run that collapses, and what the true reward shows, three seeds."""
    runs = json.loads((HERE / "results" / "demo.json").read_text())
    panels = []
    for title, name, ylabel, start in (  # before the first step all pairs tie, and no accuracy says anything
        ("what the log says: held-out reward accuracy rises", "eval_rewards/accuracies", "share of pairs", 1),
        ("what happens: the true reward of replies falls", "eval_judge/reward", "from -4 to 3", 0),
    ):
        curves = []
        for run in runs:
            lines = run["collapse"][start:]
            x, y = ([line[key] for line in lines] for key in ("step", name))
            curves.append(plots.Curve(f"seed {run['seed']}", x, y))
        panels.append(plots.Panel(title, "step", ylabel, curves))
    plots.picture(path, panels, transparent=True)


def family(path):
    """What `minidpo losses --plot` draws, in 64 colours that keep its own apart: a page loads on a phone."""
    image = importlib.import_module("PIL.Image")  # which matplotlib needs, too
    with tempfile.TemporaryDirectory() as place:
        with contextlib.redirect_stdout(None):
            cli.losses(plot=Path(place) / "losses.png")
        image.open(Path(place) / "losses.png").convert("RGB").quantize(64, method=2, dither=0).save(path, optimize=True)


def tutorial_pictures(folder):
    """Run the scripts that draw, away from the repository, and keep their pictures."""
    folder.mkdir(exist_ok=True)
    for script in sorted(TUTORIALS.glob("[0-9][0-9]_*.py")):
        if ".png" not in script.read_text():
            continue
        print(script.name, flush=True)
        with tempfile.TemporaryDirectory() as place:
            shutil.copy(script, place)
            environment = {**os.environ, "PYTHONPATH": str(HERE.parent)}
            subprocess.run([sys.executable, script.name], cwd=place, check=True, capture_output=True, env=environment)
            for picture in Path(place).glob("*.png"):
                write_whole(folder / picture.name, picture.read_bytes())


if __name__ == "__main__":
    if not plots.installed():
        sys.exit('pictures need matplotlib: python -m pip install -e ".[plot]"')
    demo_rewards(HERE / "results" / "demo.png")
    collapse(HERE / "results" / "collapse.png")
    family(HERE / "results" / "losses.png")
    tutorial_pictures(TUTORIALS / "pictures")
    print(f"drawn: {HERE / 'results' / 'demo.png'}, collapse.png, losses.png, {TUTORIALS / 'pictures'}")
