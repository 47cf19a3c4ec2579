"""Eight preference losses on the desk, with one budget: what true reward each buys, and at what KL.

    python -m benchmarks.family

trains from one SFT model per seed, at the default beta of each loss and at two others declared here, and judges the
last checkpoint. The best beta is chosen on validation prompts and reported on test prompts, which chose nothing. It
prints a table and writes benchmarks/results/family.json. After an interruption, run it again with the same folder and
it continues. It takes about an hour of CPU time.

It does not show which loss is best: the world is small, learning rate and steps are the same for all, and only beta
was searched. The reference point of KTO is held at 0, since pairs have no mismatched responses.
"""

import itertools
import json
import math
import statistics
import time
from pathlib import Path

import numpy as np

from benchmarks.defaults import arguments, one_seed
from minidpo import checkpoint, cli, family, ops
from minidpo.audit import replies as judge
from minidpo.cli import desk
from minidpo.losses import PreferenceLoss
from minidpo.run.files import write_whole
from minidpo.run.folder import json_lines, step_name

RESULTS = Path(__file__).parent / "results" / "family.json"
BUDGET = {"learning_rate": 5e-5, "steps": 100, "batch_size": 32, "warmup_steps": 10}  # the defaults of `minidpo dpo`
BETAS = {  # the default of each loss first
    "dpo": (0.1, 0.03, 0.3),
    "ipo": (0.1, 0.3, 1.0),
    "hinge": (0.1, 0.03, 0.3),
    "robust": (0.1, 0.03, 0.3),
    "kto": (0.1, 0.03, 0.3),
    "simpo": (2.0, 1.0, 5.0),
    "orpo": (0.1, 0.3, 1.0),
    "dpo_nll": (0.1, 0.03, 0.3),
}
COLUMNS = {"reward": 2, "kl": 2, "well_formed": 2, "length": 1, "chosen_rise": 3}  # and digits
STUDENT = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78}  # 95 % of the t distribution, by the number of seeds


def kto_of_pairs(logp_w, logp_l, ref_logp_w, ref_logp_l, beta):
    """KTO whose desirable responses are the chosen ones, with a reference point of 0."""
    B = len(logp_w)
    logp, ref_logp = ops.concatenate(logp_w, logp_l), np.concatenate([ref_logp_w, ref_logp_l])
    out = family.kto_loss(logp, ref_logp, np.arange(2 * B) < B, 0.0, beta)
    return PreferenceLoss(out.loss, out.reward[:B], out.reward[B:], (out.reward[:B] - out.reward[B:]) / beta)


def verdict(model, sft, prompts, seed):
    """The means over a model's replies to prompts."""
    own = judge.judged(checkpoint.load(model), checkpoint.load(sft), prompts, seed)
    means = {name: estimate.value for name, estimate in judge.flat(judge.figures(own, own, prompts)).items()}
    means |= {"well_formed": 1 - means["garbled"], "length": statistics.fmean(map(len, own.replies))}
    return {name: value for name, value in means.items() if name in COLUMNS or name == "length"}


def one_run(folder, seed, name, beta, budget, replies):
    """Train with one loss and judge its last checkpoint on validation and on test prompts."""
    started, out = time.perf_counter(), folder / f"{name}-{beta:g}"
    loss = kto_of_pairs if name == "kto" else name
    files = {"data": folder / "data" / "pairs.jsonl", "held_out_data": folder / "data" / "pairs_held_out.jsonl"}
    settings = {**files, "init": folder / "sft", "loss": loss, "beta": beta, "seed": seed, **budget}
    cli.dpo(**settings, out=out, evaluate_every=budget["steps"], resuming=out.exists())
    last = [line for line in json_lines(out / "metrics.jsonl") if "eval_loss" in line][-1]
    model, sft = out / step_name(last["step"]), folder / "sft"
    row = {
        part: verdict(model, sft, desk.test_prompts(seed, replies, number), seed)
        for part, number in (("validation", 1), ("test", 2))
    }
    rise = {"chosen_rise": last["eval_nll/chosen_rise"]}
    return {"seconds": time.perf_counter() - started, **{part: {**means, **rise} for part, means in row.items()}}


def rows_of(runs, name):
    """The test figures of a loss: at its default, and at the beta with the most reward on validation prompts."""
    own = [run for run in runs if run["loss"] == name]

    def mean(beta):
        return statistics.fmean(run["validation"]["reward"] for run in own if run["beta"] == beta)

    best = max(dict.fromkeys(run["beta"] for run in own), key=mean)
    for kind, beta in (("default", BETAS[name][0]), ("best", best)):
        yield kind, beta, [run["test"] for run in own if run["beta"] == beta]


def estimate(values):
    """The mean and half the length of its 95 % interval."""
    half = STUDENT.get(len(values), math.nan) * (statistics.stdev(values) if len(values) > 1 else math.nan)
    return statistics.fmean(values), half / len(values) ** 0.5


def interval(values, digits):
    """The same, as a table shows them."""
    mean, half = estimate(values)
    return f"{mean:z.{digits}f} ± {half:.{digits}f}"


def as_table(runs):
    """The table in Markdown: means over the seeds and 95 % intervals; the reward also as the gain in each seed."""
    names = {"reward": "true reward", "kl": "KL to SFT", "chosen_rise": "rise of the chosen's loss"}
    titles = [names.get(name, name.replace("_", " ")) for name in COLUMNS]
    lines = [f"| loss | beta | {' | '.join(titles)} | reward, less the first row's |"]
    lines.append(f"|---|---|{'---:|' * (len(titles) + 1)}")
    first = []
    for name in dict.fromkeys(run["loss"] for run in runs):
        for kind, beta, rows in rows_of(runs, name):
            first = first or [row["reward"] for row in rows]
            cells = [interval([row[column] for row in rows], digits) for column, digits in COLUMNS.items()]
            gains = [row["reward"] - reward for row, reward in zip(rows, first, strict=True)]
            lines.append(f"| {name} | {beta:g}, {kind} | {' | '.join(cells)} | {interval(gains, 2)} |")
    return "\n".join(lines)


def run(folder, seeds, names=tuple(BETAS), budget=BUDGET, replies=200):
    """All runs that are not in the folder's results.json yet; returns all."""
    path = folder / "results.json"
    results = json.loads(path.read_text()) if path.exists() else {"budget": budget, "sft": {}, "runs": []}
    if results["budget"] != budget:
        raise ValueError(f"{path} has runs with the budget {results['budget']}, not {budget}: choose another folder")
    for seed, name in itertools.product(seeds, names):
        if str(seed) not in results["sft"]:
            results["sft"][str(seed)] = one_seed(folder / f"seed{seed}", seed)
        for beta in BETAS[name]:
            key = {"seed": seed, "loss": name, "beta": beta}
            if not any(key.items() <= row.items() for row in results["runs"]):
                print("\n", key, flush=True)
                results["runs"].append({**key, **one_run(folder / f"seed{seed}", seed, name, beta, budget, replies)})
                write_whole(path, (json.dumps(results, indent=2) + "\n").encode())
    return results


if __name__ == "__main__":
    parser = arguments(__doc__, "family", RESULTS)
    parser.add_argument("--steps", type=int, default=BUDGET["steps"])
    options = parser.parse_args()
    results = run(options.folder, options.seeds, budget={**BUDGET, "steps": options.steps})
    write_whole(options.out, (json.dumps(results, indent=2) + "\n").encode())
    print(as_table(results["runs"]))
