"""The demo over several seeds: what each stage gains, its CPU seconds, and how DPO collapses without an anchor.

    python benchmarks/demo.py --seeds 0 1 2

writes benchmarks/results/demo.json; the README shows its figures.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

from minidpo import checkpoint
from minidpo.cli import desk
from minidpo.run import files, report
from minidpo.run import folder as run_folder

RESULTS = Path(__file__).parent / "results" / "demo.json"


def command(*arguments):
    """Run a command of minidpo, printing to the terminal."""
    subprocess.run([sys.executable, "-m", "minidpo", *map(str, arguments)], check=True)


def cpu_seconds():
    """CPU seconds of all commands so far, with the processes that they started."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def one_seed(folder, seed):
    """Run the demo with a seed, then DPO again at beta 0.1 without the likelihood term; the results of both."""
    before = cpu_seconds()
    command("demo", "--out", folder, "--seed", seed)
    seconds = cpu_seconds() - before
    data = folder / "data"
    options = [f"--data={data / 'pairs.jsonl'}", f"--held-out-data={data / 'pairs_held_out.jsonl'}", f"--seed={seed}"]
    options += [f"--steps={desk.FULL.steps['dpo']}", "--evaluate-every=60", f"--init={folder / 'sft'}"]
    command("dpo", *options, f"--out={folder / 'collapse'}", "--beta=0.1", "--nll-weight=0", "--learning-rate=3e-4")
    models = {stage: checkpoint.load(folder / stage) for stage in (*desk.STAGES, "collapse")}
    prompts = desk.held_out_prompts(seed, desk.FULL.replies)
    collapse = desk.verdict(models["collapse"], models["sft"], prompts, seed)
    del collapse["replies"]
    best = {
        stage: {**report.best(run_folder.json_lines(folder / stage / "metrics.jsonl"))} for stage in ("dpo", "collapse")
    }
    return {
        "seed": seed,
        "cpu_seconds": seconds,
        **json.loads((folder / "results.json").read_text()),
        "collapse": collapse,
        "measured": best,
        "environment": json.loads((folder / "dpo" / "run.json").read_text())["environment"],
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="random seeds (default: 0 1 2)")
    seeds = parser.parse_args().seeds
    with tempfile.TemporaryDirectory() as folder:
        runs = [one_seed(Path(folder) / f"demo{seed}", seed) for seed in seeds]
    RESULTS.parent.mkdir(exist_ok=True)
    files.write_whole(RESULTS, (json.dumps(runs, indent=2) + "\n").encode())
    print(f"written to {RESULTS}")
