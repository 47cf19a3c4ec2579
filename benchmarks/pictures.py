"""Draw the pictures of the committed results: the README's of the demo, and those of benchmarks/README.md.

python -m benchmarks.pictures

Needs the `plot` extra.
"""

import contextlib
import importlib
import json
import statistics
import sys
import tempfile
from pathlib import Path

from benchmarks import story
from minidpo import cli, plots

HERE = Path(__file__).parent
MODELS = ("base", "SFT", "DPO", "DPO, collapsed")
COLORS = (plots.INK, "#0072B2", "#009E73", "#D55E00")


def demo_rewards(path):
    """True reward of each model, one dot a seed and a bar at their mean."""
    runs = json.loads((HERE / "results" / "demo.json").read_text())
    with plots.figure(path, (6.4, 2.5), {"axes.grid.axis": "x"}, transparent=True) as figure:
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


STORY = {  # colour and name of a group of runs; for each run where its label lies, in points from its dot
    (plots.PALETTE[0], "beta, DPO alone"): {
        "beta 0.05": (8, 4), "beta 0.1": (8, 5), "beta 0.2": (8, 2), "beta 0.5": (6, 6), "beta 1": (-2, -15),
    },
    (plots.PALETTE[2], "beta, DPO and NLL"): {
        "beta 0.05 nll": (-32, 0), "beta 0.1 nll": (-14, 9), "beta 0.2 nll": (2, 9), "beta 0.5 nll": (4, -15),
        "beta 1 nll": (-18, -8),
    },
    (plots.PALETTE[1], "no reference"): {"no reference": (-82, 2)},
    (plots.PALETTE[3], "base as reference"): {"base reference": (-112, -12)},
    (plots.PALETTE[4], "SFT on chosen"): {"sft chosen": (-36, 9)},
    (plots.PALETTE[5], "SFT on both"): {"sft both": (-10, 9)},
}  # fmt: skip


def usual_story(path, results=None):
    """Where runs end, true reward against KL to SFT, and how KL grows under each beta; a faint dot is a seed."""
    results = results or json.loads(story.RESULTS.read_text())
    with plots.figure(path, (6.4, 7.2), transparent=True) as figure:
        ends, paths = figure.subplots(2, 1, height_ratios=(4, 3))
        for (color, name), places in STORY.items():
            kls, rewards = ([story.values(results, run, "last", key) for run in places] for key in ("kl", "reward"))
            x, y = ([statistics.fmean(each) for each in rows] for rows in (kls, rewards))
            ends.plot(kls, rewards, "o", color=color, markersize=3, alpha=0.45)
            ends.plot(x, y, "o-", color=color, markersize=7, linewidth=1.2)
            for run, place, offset in zip(places, zip(x, y), places.values()):
                text = run.split()[1] if run.startswith("beta") else name
                ends.annotate(text, place, offset, textcoords="offset points", color=color)
        for height, (color, name) in zip((0.3, 0.22), STORY):
            ends.text(0.02, height, f"numbers: {name}", color=color, transform=ends.transAxes)
        sft = statistics.fmean(story.values(results, "SFT", "", "reward"))
        ends.axhline(sft, color=plots.INK, linestyle="--", linewidth=1)
        ends.text(0.98, sft + 0.08, "SFT", ha="right", transform=ends.get_yaxis_transform())
        ends.set(xscale="log", xlabel="KL to SFT, nats a reply", ylabel="true reward, from -4 to 3")
        ends.set_title("where runs end, three seeds")
        for beta in story.BETAS:
            curves = [row["curve"][1:] for row in results["runs"] if row["run"] == f"beta {beta:g}"]
            steps = [point["step"] for point in curves[0]]
            kl = [statistics.fmean(points) for points in zip(*([each["kl"] for each in curve] for curve in curves))]
            paths.plot(steps, kl, color=plots.PALETTE[0], linewidth=1.8)
            paths.text(steps[-1] + 3, kl[-1], f"{beta:g}", color=plots.PALETTE[0], va="center")
        paths.set(xlabel="step", yscale="log", ylabel="KL to SFT, nats a reply", xlim=(0, steps[-1] * 1.08))
        paths.set_title("the way there, DPO alone, by beta (held-out prompts)")


def ppo_beside_dpo(path):
    """True reward by texts and by KL, PPO and DPO; and a learned reward at a small beta: means over the seeds."""
    document = json.loads((HERE / "results" / "ppo.json").read_text())

    def curve(label, name, x, y, **kinds):
        """A mean over the seeds; over texts, bars are one standard deviation each way."""
        runs = [run["rows"] for run in document["runs"] if run["name"] == name]
        columns = [[[row[column] for row in rows] for rows in zip(*runs)] for column in (x, y)]
        across, up = ([statistics.fmean(values) for values in column] for column in columns)
        error = [statistics.stdev(values) for values in columns[1]] if x == "texts" else []
        return plots.Curve(label, across, up, error=error, **kinds)

    names = {"PPO, true reward": "PPO, true reward", "PPO, learned reward": "PPO, learned reward"}
    names |= {"DPO": "DPO", "DPO and 2 NLL": "DPO and NLL"}
    optima = [row for row in document["optima"] if row["kl"] > 0.01]
    best = plots.Curve("pi*, exact", *([row[key] for row in optima] for key in ("kl", "reward")), faint=True)
    small, unit = "PPO, learned reward, beta 0.02", "from -4 to 3"
    panels = [
        plots.Panel("true reward by texts, sampled or read", "texts", unit,
                    [curve(label, name, "texts", "reward") for name, label in names.items()]),
        plots.Panel("true reward by KL to SFT", "KL, nats a reply", unit,
                    [curve(label, name, "kl", "reward", marker=".") for name, label in names.items()] + [best]),
        plots.Panel("PPO at beta 0.02: what its reward model says, and what is true", "texts", "reward",
                    [curve(f"{kind} reward", small, "texts", column) for kind, column in
                     (("learned", "learned"), ("true", "reward"))]),
    ]  # fmt: skip
    plots.picture(path, panels, transparent=True)


def family(path):
    """What `minidpo losses --plot` draws, in 64 colours that keep its own apart: a page loads on a phone."""
    image = importlib.import_module("PIL.Image")  # which matplotlib needs, too
    with tempfile.TemporaryDirectory() as place:
        with contextlib.redirect_stdout(None):
            cli.losses(plot=Path(place) / "losses.png")
        image.open(Path(place) / "losses.png").convert("RGB").quantize(64, method=2, dither=0).save(path, optimize=True)


if __name__ == "__main__":
    if not plots.installed():
        sys.exit('pictures need matplotlib: python -m pip install -e ".[plot]"')
    demo_rewards(HERE / "results" / "demo.png")
    collapse(HERE / "results" / "collapse.png")
    usual_story(HERE / "results" / "story.png")
    ppo_beside_dpo(HERE / "results" / "ppo.png")
    family(HERE / "results" / "losses.png")
    print(f"drawn in {HERE / 'results'}: demo, collapse, story, ppo, losses")
