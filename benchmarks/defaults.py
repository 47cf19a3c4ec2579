"""Which learning rate and how many steps `dpo` should have by default, in the demo's world.

    python -m benchmarks.defaults

trains on the plain DPO loss over a grid, prints a table and writes benchmarks/results/defaults.json. After an
interruption, run it again with the same folder and it continues.
"""

import argparse
import itertools
import json
import statistics
import time
from pathlib import Path

from benchmarks.demo import command
from minidpo import checkpoint
from minidpo.audit import replies
from minidpo.cli import desk
from minidpo.run import report
from minidpo.run.files import write_whole
from minidpo.run.folder import json_lines, step_name

RESULTS = Path(__file__).parent / "results" / "defaults.json"
RATES = (1e-5, 2e-5, 5e-5, 1e-4, 3e-4)
STEPS = (100, 300)
FIXED = ("--beta=0.1", "--nll-weight=0", "--warmup-steps=10", "--batch-size=32")
MODELS = ("best", "last")  # the checkpoint of the lowest held-out loss, and the one after the last step
HELD_OUT = {"loss": "eval_loss", "accuracy": "eval_rewards/accuracies", "chosen_rise": "eval_nll/chosen_rise"}
COLUMNS = {"reward": 2, "well_formed": 2, "kl": 2, "chosen_rise": 3, "accuracy": 2, "loss": 3, "step": 0}  # and digits
WELL_FORMED = 0.9  # the smallest share of well-formed replies that is healthy


def train(arguments, out):
    """Train in a folder, or finish what an interrupted run began there."""
    command("resume", out) if out.exists() else command(*arguments, f"--out={out}")


def verdict(folder, sft, seed):
    """The means over a model's replies to the prompts that settings are chosen by."""
    prompts = desk.test_prompts(seed, desk.FULL.replies, part=1)
    own = replies.judged(checkpoint.load(folder), checkpoint.load(sft), prompts, seed)
    means = {name: estimate.value for name, estimate in replies.flat(replies.figures(own, own, prompts)).items()}
    return {**means, "well_formed": 1 - means["garbled"]}


def one_seed(folder, seed):
    """Make the data, train the base and the SFT model, and judge the SFT model."""
    folder.mkdir(parents=True, exist_ok=True)
    desk.make_data(folder / "data", seed, desk.FULL)
    for stage in ("pretrain", "sft"):
        train(desk.stage_arguments(folder, stage, seed, desk.FULL), folder / stage)
    return verdict(folder / "sft", folder / "sft", seed)


def one_run(folder, seed, rate, steps):
    """Run DPO once, and judge both the best and the last checkpoint."""
    started, out = time.perf_counter(), folder / f"dpo-{rate:g}-{steps}"
    arguments = desk.stage_arguments(folder, "dpo", seed, desk.FULL._replace(steps={"dpo": steps}))
    train([*arguments, *FIXED, f"--learning-rate={rate}"], out)
    row = {"seconds": time.perf_counter() - started}
    lines = [line for line in json_lines(out / "metrics.jsonl") if "eval_loss" in line]
    for model, line in zip(MODELS, (report.best(lines), lines[-1])):
        same = model == "last" and row["best"]["step"] == line["step"]
        means = row["best"] if same else verdict(out / step_name(line["step"]), folder / "sft", seed)
        row[model] = {**means, "step": line["step"], **{short: line[name] for short, name in HELD_OUT.items()}}
    return {**row, "chosen_rises": {line["step"]: line["eval_nll/chosen_rise"] for line in lines}}


def print_row(title, rows, end=""):
    """A line of the table: mean and standard deviation over the seeds."""
    for name, digits in COLUMNS.items():
        values = [row[name] for row in rows if name in row]
        spread = statistics.stdev(values) if len(values) > 1 else 0.0
        title += f"{f'{statistics.fmean(values):z.{digits}f} ± {spread:.{digits}f}' if values else '':>15}"
    print(title + end)


def summarise(sft, runs):
    """Print the table, the settings that are always healthy, and how far the chosen responses fall."""
    rises, rewards = {"healthy": [], "not healthy": []}, {}
    print(f"{'rate':>6}{'steps':>6}{'model':>6}" + "".join(f"{name:>15}" for name in COLUMNS) + "  healthy")
    print_row(f"{'SFT':>18}", sft.values())
    for key, model in itertools.product(itertools.product(RATES, STEPS), MODELS):
        matching = [row for row in runs if (row["learning_rate"], row["steps"]) == key]
        rows = [{**row[model], "sft": sft[str(row["seed"])]["reward"]} for row in matching]
        good = [row["well_formed"] >= WELL_FORMED and row["reward"] >= row["sft"] for row in rows]
        print_row("{:>6g}{:>6}".format(*key) + f"{model:>6}", rows, f"{sum(good):>5} of {len(rows)}")
        for row, well in zip(rows, good):
            rises["healthy" if well else "not healthy"].append(row["chosen_rise"])
        if all(good):
            rewards.setdefault(key, []).append(statistics.fmean(row["reward"] for row in rows))
    always = [key for key, means in rewards.items() if len(means) == len(MODELS)]
    print("always healthy, highest true reward first:", *sorted(always, key=rewards.get, reverse=True))
    for name, values in rises.items():
        print(f"chosen rise where {name}:", *(f"{value:.3f}" for value in sorted(values)))


def arguments(description, folder, out):
    """A parser of the options that each benchmark has which can be resumed."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--folder", type=Path, default=Path(folder), help="folder for the models and the results so far"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=out, help="the JSON file to write in the end")
    return parser


if __name__ == "__main__":
    options = arguments(__doc__, "defaults", RESULTS).parse_args()
    path = options.folder / "results.json"
    results = json.loads(path.read_text()) if path.exists() else {"fixed": FIXED, "sft": {}, "runs": []}
    for seed, rate, steps in itertools.product(options.seeds, RATES, STEPS):
        folder, key = options.folder / f"seed{seed}", {"seed": seed, "learning_rate": rate, "steps": steps}
        if str(seed) not in results["sft"]:
            results["sft"][str(seed)] = one_seed(folder, seed)
        if not any(key.items() <= row.items() for row in results["runs"]):
            print("\n", key, flush=True)
            results["runs"].append({**key, **one_run(folder, seed, rate, steps)})
            write_whole(path, (json.dumps(results, indent=2) + "\n").encode())
    write_whole(options.out, path.read_bytes())
    summarise(results["sft"], results["runs"])
