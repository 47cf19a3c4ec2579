"""The usual story of DPO, measured on the desk: what the reference does, what beta does, what a likelihood term does.

    python -m benchmarks.story

trains 14 models from one SFT model per seed, with equal steps, batch size and learning rate, and judges each at its
last step and at its best step by validation, on test prompts and test pairs, by which nothing was chosen. It prints
tables and the sentences of the story with a verdict each, and writes benchmarks/results/story.json. Two runs are under
way at a time, in processes of their own with one thread each; NAME.log beside a run is what it printed. After an
interruption, run it again with the same folder: it resumes what was begun and repeats nothing that is finished. It
takes about 3,000 CPU seconds.
"""

import itertools
import json
import multiprocessing
import os
import statistics
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import numpy as np

from benchmarks.defaults import WELL_FORMED, arguments
from benchmarks.family import estimate, interval
from benchmarks.speed import processor
from minidpo import checkpoint, preferences, training, world
from minidpo.audit import replies
from minidpo.cli import desk
from minidpo.cli import train as cli_train
from minidpo.cli.parser import COMMANDS, parse
from minidpo.run import report
from minidpo.run.files import write_whole
from minidpo.run.folder import json_lines, run_description, step_name
from minidpo.run.reference import cached_reference_logprobs
from minidpo.tokenizer import TURN

RESULTS = Path(__file__).parent / "results" / "story.json"
BUDGET = {"steps": 200, "batch_size": 32, "learning_rate": 3e-4, "warmup_steps": 10, "evaluate_every": 20}
PROMPTS = 500  # test prompts that each model answers
BETAS = (0.05, 0.1, 0.2, 0.5, 1.0)
CURVE = {  # of a run's evaluations on held-out pairs and prompts: rewards and KL are against its own reference
    "step": "step", "margin": "eval_rewards/margins", "rise": "eval_nll/chosen_rise",
    "reward": "eval_judge/reward", "kl": "eval_judge/kl", "well_formed": "eval_judge/well_formed",
}  # fmt: skip
OTHER_REFERENCES = ("no reference", "base reference")
TITLES = {
    "sft chosen": "SFT on chosen", "sft both": "SFT on both", "no reference": "DPO, no reference",
    "base reference": "DPO, base as reference", "SFT": "SFT",
}  # fmt: skip
OF_REPLIES = {  # titles and digits
    "step": ("step", 0), "reward": ("true reward", 2), "below": ("below SFT", 0),
    **{name: (name, 2) for name in world.SLICES}, "kl": ("KL to SFT", 2), "well_formed": ("well formed", 2),
    "length": ("length", 1), "repeated": ("repeated 4-grams", 3),
}  # fmt: skip
OF_PAIRS = {
    "length_logp": ("length and log pi", 2), "length_reward": ("length and reward", 2),
    "length_own": ("length and own reward", 2), "rise": ("rise of the chosen's loss", 3), "accuracy": ("accuracy", 2),
}  # fmt: skip
MODELS = ("last", "best")  # the last step, and the step of the run's own lowest held-out loss
WINDOW = 10  # steps over which the margins of training batches are averaged


def recipes():
    """The command and options of each run, by name."""
    rows = {
        "sft chosen": ("sft", "--responses=chosen"),
        "sft both": ("sft", "--responses=both"),
        "no reference": ("dpo", "--loss=reference-free", "--beta=0.1"),
        "base reference": ("dpo", "--beta=0.1", "--reference={}/pretrain"),
    }
    for nll, beta in itertools.product((0, 2), BETAS):
        rows[f"beta {beta:g}" + " nll" * bool(nll)] = "dpo", f"--beta={beta:g}", f"--nll-weight={nll}"
    return rows


RUNS = recipes()


def train(words, out, scores=None):
    """Train in a folder, or finish what an interrupted run began there; NAME.log beside it takes the output.

    Runs with one reference share its scores of the pairs, in the file `scores`, which is checked before each use.
    """
    name, values = parse(["resume", str(out)] if out.exists() else [*words, f"--out={out}"])

    def scored(_, *what):
        return cached_reference_logprobs(scores, *what)

    shared = mock.patch.object(cli_train, "cached_reference_logprobs", scored)
    with open(out.with_name(f"{out.name}.log"), "a") as log, redirect_stdout(log), redirect_stderr(log), shared:
        COMMANDS[name].function(**values)


def prepare(folder, seed, count):
    """Make the data, train base and SFT model, and measure the SFT model."""
    before = time.process_time()
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "data.log", "a") as log, redirect_stderr(log):
        desk.make_data(folder / "data", seed, desk.FULL)
    for stage in ("pretrain", "sft"):
        words = desk.stage_arguments(folder, stage, seed, desk.FULL)
        train([word for word in words if not word.startswith("--out=")], folder / stage)
    environment = run_description(folder / "sft")["environment"] | {"processor": processor()}
    figures = measure(folder, seed, count, folder / "sft", "sft chosen")
    return {"cpu_seconds": time.process_time() - before, "environment": environment, **figures}


def one_run(folder, seed, name, budget, count):
    """Train once, and measure both the last model and the best one."""
    before, out = time.process_time(), folder / name.replace(" ", "-")
    stage, *options = RUNS[name]
    options += [f"--judge-every={budget['evaluate_every']}"] * (stage == "dpo")
    data = [f"--data={folder / 'data' / 'pairs.jsonl'}", f"--held-out-data={folder / 'data' / 'pairs_held_out.jsonl'}"]
    settings = [f"--{key.replace('_', '-')}={value}" for key, value in budget.items()]
    options = [option.format(folder) for option in options]
    reference = "pretrain" if name == "base reference" else "sft"
    words = [stage, *data, f"--init={folder / 'sft'}", f"--seed={seed}", *settings, *options]
    train(words, out, folder / f"scores-of-{reference}.safetensors")
    lines = json_lines(out / "metrics.jsonl")
    evaluations = [line for line in lines if "eval_loss" in line]
    steps = dict(zip(MODELS, (evaluations[-1]["step"], report.best(lines)["step"])))
    figures = {step: measure(folder, seed, count, out / step_name(step), name) for step in sorted({*steps.values()})}
    row = {model: {"step": step, **figures[step]} for model, step in steps.items()}
    if stage == "dpo":
        beta = next(float(word.removeprefix("--beta=")) for word in options if word.startswith("--beta="))
        row["curve"] = [{short: line[key] for short, key in CURVE.items() if key in line} for line in evaluations]
        for point in row["curve"]:
            point["margin"] /= beta
        margins = [line["rewards/margins"] / beta for line in lines if "rewards/margins" in line]
        row["batches"] = [statistics.fmean(margins[i : i + WINDOW]) for i in range(0, len(margins), WINDOW)]
    return {"cpu_seconds": time.process_time() - before, **row}


def measure(folder, seed, count, model, name):
    """All figures of a model: of its replies to test prompts, and of the test pairs."""
    policy, sft, base = (checkpoint.load(place) for place in (model, folder / "sft", folder / "pretrain"))
    prompts = desk.test_prompts(seed, count)
    own = replies.judged(policy, sft, prompts, seed)
    table = replies.figures(own, own, prompts)
    row = {part if part != "all" else "reward": figures["reward"].value for part, figures in table.items()}
    row |= {key: table["all"][key].value for key in ("kl", "length")}
    row |= {"well_formed": 1 - table["all"]["garbled"].value}
    row |= {"repeated": statistics.fmean(repeated(reply) for reply in own.replies)}
    rows, _ = preferences.read(folder / "data" / "pairs_test.jsonl")
    encoded = preferences.encode(rows, sft.tokenizer, sft.config.n_positions)
    logps = [np.array(training.reference_logprobs(policy.params, policy.config, encoded.ids))]
    for stage, (params, config, tokenizer, _) in (("sft", sft), ("pretrain", base)):
        scores = folder / f"test-scores-of-{stage}.safetensors"
        logps.append(np.array(cached_reference_logprobs(scores, params, config, tokenizer, encoded.ids)))
    return row | of_pairs(encoded, *logps, name)


def of_pairs(encoded, logps, sft_logps, base_logps, name):
    """Figures of the test pairs. The log-probabilities, (2, B), are those of chosen and rejected, summed over tokens.

    The implicit reward of a response is log pi - log pi_ref, pi_ref being the SFT model; under `own` it is the run's
    own reference, and without one the reward is log pi. Correlations and slopes (nats a token) are over the pairs, of
    differences chosen less rejected.
    """
    lengths = np.array([[len(y) for y in responses] for _, *responses in encoded.ids]).T  # (2, B)
    rewards = [
        [world.judgement(row.prompt.removesuffix(TURN), y).reward for y in row.responses] for row in encoded.rows
    ]
    true = np.array(rewards).T
    own_ref = {"no reference": 0.0, "base reference": base_logps}.get(name, sft_logps)
    differences = {"logp": logps, "reward": logps - sft_logps, "own": logps - own_ref, "true": true}
    differences = {key: pair[0] - pair[1] for key, pair in differences.items()}
    length = lengths[0] - lengths[1]
    own, centred = differences["own"], length - length.mean()
    return {
        **{f"length_{key}": correlation(length, each) for key, each in differences.items()},
        **{f"slope_{key}": float(centred @ each / (centred @ centred)) for key, each in differences.items()},
        "rise": float((sft_logps - logps)[0].sum() / lengths[0].sum()),
        "accuracy": float((own > 0).mean() + (own == 0).mean() / 2),
    }


def correlation(x, y):
    """Pearson's correlation; 0 where one of the two is constant, which no length can predict."""
    x, y = (np.asarray(each, dtype=float) - np.mean(each, dtype=float) for each in (x, y))
    norm = np.sqrt((x @ x) * (y @ y))
    return float(x @ y / norm) if norm else 0.0


def repeated(reply, n=4):
    """The share of a reply's n-grams that stood before in the same reply; 0 if it is shorter than n.

    A token is a character; end-of-text is left out. With m tokens there are m - n + 1 n-grams, overlapping ones among
    them, and those that are repeated are all but the first of each kind.
    """
    grams = Counter(reply[i : i + n] for i in range(len(reply) - n + 1))
    return 1 - len(grams) / grams.total() if grams else 0.0


def run(folder, seeds, pool, names=tuple(RUNS), budget=BUDGET, count=PROMPTS):
    """All runs that are not in the folder's results.json yet, as many at once as the pool has workers; returns all."""
    path, started = folder / "results.json", time.perf_counter()
    fixed = {"budget": budget, "prompts": count}
    results = json.loads(path.read_text()) if path.exists() else {**fixed, "seconds": 0.0, "sft": {}, "runs": []}
    if {key: results[key] for key in fixed} != fixed:
        raise ValueError(f"{path} has runs of another budget than {fixed}: choose another folder")
    before = results["seconds"]
    ended = {(row["seed"], row["run"]) for row in results["runs"]}
    left = [(seed, name) for seed in seeds for name in names if (seed, name) not in ended]
    total, done, tasks = len(left) + sum(str(seed) not in results["sft"] for seed in seeds), 0, {}

    def start(seed):
        for _, name in [each for each in left if each[0] == seed]:
            tasks[pool.submit(one_run, folder / f"seed{seed}", seed, name, budget, count)] = seed, name

    try:
        for seed in seeds:
            if str(seed) in results["sft"]:
                start(seed)
            else:
                tasks[pool.submit(prepare, folder / f"seed{seed}", seed, count)] = seed, ""
        while tasks:
            for task in wait(tasks, return_when=FIRST_COMPLETED).done:
                seed, name = tasks.pop(task)
                if name:
                    results["runs"].append({"seed": seed, "run": name, **task.result()})
                else:
                    results["sft"][str(seed)] = task.result()
                    start(seed)
                results["runs"].sort(key=lambda row: (row["seed"], names.index(row["run"])))
                done, seconds = done + 1, time.perf_counter() - started
                results["seconds"] = before + seconds
                write_whole(path, (json.dumps(results, indent=1) + "\n").encode())
                minutes = seconds / done * (total - done) / 60
                what = f"seed {seed}, {name or 'base and SFT'}"
                print(f"{done} of {total}: {what}, {seconds:.0f} s, about {minutes:.0f} min left", flush=True)
    finally:
        pool.shutdown(cancel_futures=True)
    return results


# ---- what the runs say --------------------------------------------------------------------------------------


def values(results, name, model, column):
    """A figure of a run in each seed; "SFT" is the model that every run starts from."""
    if name == "SFT":
        return [each[column] for each in results["sft"].values()]
    rows = {row["seed"]: row[model] for row in results["runs"] if row["run"] == name}
    return [rows[int(seed)][column] for seed in results["sft"]]


def cell(results, name, model, column, digits):
    """A figure of a run as the tables show it; empty where it says nothing."""
    other = column == "length_own" and name not in OTHER_REFERENCES
    if other or (name == "SFT" and column in ("step", "below", "length_reward")):
        return ""
    if column == "step":
        return ", ".join(map(str, dict.fromkeys(values(results, name, model, column))))
    if column == "below":
        pairs = zip(values(results, name, model, "reward"), values(results, "SFT", "", "reward"))
        below = [own < sft for own, sft in pairs]
        return f"{sum(below)} of {len(below)}"
    return interval(values(results, name, model, column), digits)


def tables(results):
    """Two tables in Markdown, of the replies and of the pairs: means over the seeds and 95 % intervals.

    A run whose best step is its last in every seed has one row for both.
    """
    rows = [("SFT", "")]
    for name in RUNS:
        last, best = (values(results, name, model, "step") for model in MODELS)
        rows += [(name, model) for model in MODELS[: 1 if last == best else 2]]
    one = {name for name, _ in rows} - {name for name, model in rows if model == "best"} - {"SFT"}
    for columns in (OF_REPLIES, OF_PAIRS):
        lines = [f"| run | model | {' | '.join(title for title, _ in columns.values())} |"]
        lines.append(f"|---|---|{'---:|' * len(columns)}")
        for name, model in rows:
            title = TITLES.get(name, f"DPO, {name.replace(' nll', ' and NLL')}")
            cells = (cell(results, name, model, column, digits) for column, (_, digits) in columns.items())
            lines.append(f"| {title} | {'last, best' if name in one else model} | {' | '.join(cells)} |")
        yield "\n".join(lines)


class Claim(NamedTuple):
    """A sentence of the story, and the number that decides it: it holds where the number is above a threshold."""

    sentence: str
    number: str  # what it is
    values: Sequence[float]  # by seed
    digits: int = 2
    threshold: float = 0.0

    @property
    def verdict(self):
        """Whether the 95 % interval over the seeds is above the threshold, below it, or around it."""
        mean, half = estimate(self.values)
        if mean - half > self.threshold:
            return "yes"
        return "no" if mean + half < self.threshold else "not established"


def claims(results):
    """The sentences of the usual story, each with its number."""

    def of(name, column, model="last"):
        return np.array(values(results, name, model, column))

    def slope(column, nll="", model="last"):
        """By how much a figure rises per doubling of beta, in each seed."""
        figures = [of(f"beta {beta:g}{nll}", column, model) for beta in BETAS]
        return np.polyfit(np.log2(BETAS), figures, 1)[0]

    def power(figure):
        """The power of beta that a figure of a whole run grows with, in each seed."""
        runs = {(row["run"], row["seed"]): figure(row) for row in results["runs"] if row["run"].startswith("beta")}
        figures = [[runs[f"beta {beta:g}", int(seed)] for seed in results["sft"]] for beta in BETAS]
        return np.polyfit(np.log2(BETAS), np.log2(figures), 1)[0]

    def bias(name, column):
        """How far a correlation with length is from that of the true reward."""
        return abs(of(name, column) - of(name, "length_true"))

    dpo, nll = "beta 0.1", "beta 0.1 nll"
    first = results["budget"]["evaluate_every"]
    rows = [
        ("SFT on the chosen responses raises the true reward", "true reward, less SFT's",
         of("sft chosen", "reward") - of("SFT", "reward")),
        ("SFT on both responses raises it less", "true reward, on chosen less on both",
         of("sft chosen", "reward") - of("sft both", "reward")),
        ("DPO gains more than SFT on the chosen", "true reward, less SFT on chosen's; best steps",
         of(dpo, "reward", "best") - of("sft chosen", "reward", "best")),
        ("DPO with an NLL term gains more than SFT on the chosen", "true reward, less SFT on chosen's; best steps",
         of(nll, "reward", "best") - of("sft chosen", "reward", "best")),
        ("before DPO, log pi prefers the shorter response", "SFT's correlation with length, sign changed",
         -of("SFT", "length_logp")),
        ("without a reference replies become shorter", "tokens, SFT's less its own",
         of("SFT", "length") - of("no reference", "length"), 1),
        ("without a reference they are shorter than with it", "tokens, DPO's less its own",
         of(dpo, "length") - of("no reference", "length"), 1),
        ("without a reference log pi comes to prefer shorter responses more", "correlation, SFT's less its own",
         of("SFT", "length_logp") - of("no reference", "length_logp")),
        ("without a reference it prefers them more than with it", "correlation, DPO's less its own",
         of(dpo, "length_logp") - of("no reference", "length_logp")),
        ("the subtraction of log pi_ref cancels length bias", "distance to the true reward's, log pi less reward",
         bias(dpo, "length_logp") - bias(dpo, "length_reward")),
        ("with an NLL term it cancels length bias", "distance to the true reward's, log pi less reward",
         bias(nll, "length_logp") - bias(nll, "length_reward")),
        ("with an NLL term it cancels most of it", "share of that distance; half is 0.5",
         1 - bias(nll, "length_reward") / bias(nll, "length_logp"), 2, 0.5),
        ("the base model is a poor reference", "true reward, with SFT as reference less with base",
         of(dpo, "reward") - of("base reference", "reward")),
        ("the base model is a poor reference, best steps", "true reward, with SFT as reference less with base",
         of(dpo, "reward", "best") - of("base reference", "reward", "best")),
        ("the reference helps against collapse", "well formed, with it less without",
         of(dpo, "well_formed") - of("no reference", "well_formed")),
        ("the reference prevents collapse", f"well formed; healthy is {WELL_FORMED}",
         of(dpo, "well_formed"), 2, WELL_FORMED),
        ("the held-out loss chooses a step before the collapse", f"well formed, best step; healthy is {WELL_FORMED}",
         of(dpo, "well_formed", "best"), 2, WELL_FORMED),
        ("DPO is stable: it does not end below its start", "true reward, less SFT's",
         of(dpo, "reward") - of("SFT", "reward")),
        ("an NLL term prevents collapse", f"well formed; healthy is {WELL_FORMED}",
         of(nll, "well_formed"), 2, WELL_FORMED),
        ("an NLL term keeps the chosen responses likely", "rise of their loss, without it less with it",
         of(dpo, "rise") - of(nll, "rise"), 3),
        ("an NLL term keeps the model near SFT", "KL to SFT, without it less with it",
         of(dpo, "kl") - of(nll, "kl")),
        ("an NLL term raises the true reward", "true reward, with it less without; best steps",
         of(nll, "reward", "best") - of(dpo, "reward", "best")),
        ("a larger beta ends closer to SFT", "fall of KL per doubling", -slope("kl")),
        ("a larger beta ends closer to SFT, best steps", "fall of KL per doubling", -slope("kl", "", "best")),
        ("a larger beta ends closer to SFT, with an NLL term", "fall of KL per doubling", -slope("kl", " nll")),
        ("a larger beta is faster in the first steps, as under SGD",
         f"power of beta in the margin of {WINDOW} batches; SGD's is 1, half is 0.5",
         power(lambda row: row["batches"][0]), 2, 0.5),
        (f"a larger beta has a larger margin at step {first}", "power of beta in the held-out margin",
         power(lambda row: row["curve"][1]["margin"])),
        (f"a larger beta is farther from SFT at step {first}", "power of beta in the held-out KL",
         power(lambda row: row["curve"][1]["kl"])),
    ]  # fmt: skip
    return [Claim(*row) for row in rows]


def verdicts(results):
    """The claims as a table in Markdown."""
    lines = ["| the story says | measured | mean ± 95 % | does it hold? |", "|---|---|---:|---|"]
    for claim in claims(results):
        cells = (claim.sentence, claim.number, interval(claim.values, claim.digits), claim.verdict)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def rounded(document, digits=4):
    """A document of JSON whose floats have so many digits after the point."""
    if isinstance(document, dict):
        return {key: rounded(value, digits) for key, value in document.items()}
    if isinstance(document, list):
        return [rounded(value, digits) for value in document]
    return round(document, digits) if isinstance(document, float) else document


if __name__ == "__main__":
    parser = arguments(__doc__, "story", RESULTS)
    parser.add_argument("--steps", type=int, default=BUDGET["steps"])
    parser.add_argument("--prompts", type=int, default=PROMPTS, help="test prompts that each model answers")
    options = parser.parse_args()
    os.environ["OPENBLAS_NUM_THREADS"] = "1"  # of the processes below, which inherit it
    pool = ProcessPoolExecutor(2, multiprocessing.get_context("spawn"))
    budget = {**BUDGET, "steps": options.steps}
    results = rounded(run(options.folder, options.seeds, pool, budget=budget, count=options.prompts))
    write_whole(options.out, (json.dumps(results) + "\n").encode())
    print(*tables(results), verdicts(results), f"written to {options.out}", sep="\n\n")
