"""The DPO stage of the demo as `minidpo dpo` and as TRL's DPOTrainer: time, sampling, and what habits change.

    python -m benchmarks.trl --init demo/sft --data demo/data/pairs.jsonl
    python -m benchmarks.trl --init demo/sft --data demo/data/pairs.jsonl --habits

The first writes benchmarks/results/trl.json: wall time of the same steps on the same weights, pairs and order, with
imports and without, and seconds a token of greedy sampling, medians of interleaved rounds, each in a new process with
two threads. The second writes benchmarks/results/trl_habits.json: the loss of twenty steps in TRL where one setting is
left as habit has it. Needs trl and datasets, the extra `peers`.
"""

import argparse
import json
import os
import pathlib
import shutil
import statistics
import subprocess
import sys
import tempfile
import time

import numpy

from benchmarks.speed import THREADS, busy
from minidpo import checkpoint, cli, generation, losses, optim, preferences, scoring, training
from minidpo.cli.train import DPO

RESULTS = pathlib.Path(__file__).parent / "results"
BETA, BATCH, RATE, WARMUP, NEW_TOKENS = 0.1, DPO.batch_size, DPO.learning_rate, DPO.warmup_steps, 32
HABITS = {  # settings of TRL's that differ, and changes of the folder or the rows
    "none": {},
    "no beginning of text": {"files": ("tokenizer.json", {"post_processor": None})},
    "prompt without its newline": {"bare": True},
    "dropout 0.1 left on": {
        "files": ("config.json", {"embd_pdrop": 0.1, "attn_pdrop": 0.1, "resid_pdrop": 0.1}), "disable_dropout": False,
    },
    "Hugging Face's cosine, which starts at rate 0": {"own_schedule": True, "lr_scheduler_type": "cosine",
                                                      "warmup_steps": WARMUP},
    "gradients not clipped": {"max_grad_norm": 1e9},
    "label_smoothing 0.2 with loss_type sigmoid": {"label_smoothing": 0.2},
    "loss_type ipo": {"loss_type": ["ipo"]},
}  # fmt: skip


def training_rows(init, data):
    """The rows that `minidpo dpo` trains on, and their ids."""
    start = checkpoint.load(init)
    usable = preferences.usable_rows(
        pathlib.Path(data), preferences.PAIRS, start.tokenizer, start.config.n_positions, "none", False
    )
    (train, _, _), _ = preferences.parts(usable, None, DPO.seed, DPO.held_out_share, 0.0)
    return [dict(zip(preferences.PAIRS, (row.prompt, *row.responses))) for row in train.rows], train.ids


def order(count, steps):
    """The batches of our run."""
    return [training.batch_indices(count, BATCH, step, DPO.seed) for step in range(steps)]


def trainer(folder, out, rows, steps, own_schedule=False, **changes):
    """TRL's trainer with our optimizer, schedule and order of rows."""
    import torch
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    settings = {
        "beta": BETA, "learning_rate": RATE, "adam_beta2": 0.99, "weight_decay": 0.0, "max_grad_norm": 1.0,
        "per_device_train_batch_size": BATCH, "max_steps": steps, "logging_steps": 1, "max_length": None,
        "train_sampling_strategy": "sequential", "bf16": False, "use_cpu": True, "activation_checkpointing": False,
        "report_to": "none", "save_strategy": "no", "disable_tqdm": True,
    }  # fmt: skip
    args = DPOConfig(output_dir=str(out), **{**settings, **changes})
    made = DPOTrainer(str(folder), args=args, train_dataset=Dataset.from_list(rows))
    if not own_schedule:
        made.create_optimizer()
        made.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(
            made.optimizer, lambda step: optim.warmup_cosine(step, steps, 1.0, WARMUP)
        )
    return made


def log_of(made):
    return [{name: float(row[name]) for name in ("loss", "grad_norm")} for row in made.state.log_history
            if "loss" in row]  # fmt: skip


def our_log(start, pairs, steps, loss):
    """Loss and gradient norm of our steps."""
    policy = {name: type(p)(p.data, requires_grad=True) for name, p in start.params.items()}
    optimizer, log = optim.AdamW(policy, RATE, betas=(0.9, 0.99), weight_decay=0.0), []
    for step, indices in enumerate(order(len(pairs), steps)):
        optimizer.learning_rate = optim.warmup_cosine(step, steps, RATE, WARMUP)
        batch = scoring.collate([pairs[i] for i in indices])
        reference, config = start.params, start.config
        log.append(training.dpo_training_step(policy, reference, config, optimizer, batch, BETA, loss, max_norm=1.0))
    return [{name: row[name] for name in ("loss", "grad_norm")} for row in log]


def habits(init, data, steps=20):
    """Twenty steps here and in TRL with each habit: loss and gradient norm of every step."""
    rows, pairs = training_rows(init, data)
    start, results = checkpoint.load(init), {}
    for name, changes in HABITS.items():
        options = {"label_smoothing": 0.2} if "label" in name else {}
        loss = losses.Choice("ipo" if "ipo" in name else "dpo", options)
        bare, (file, edit) = changes.get("bare"), changes.get("files", ("config.json", {}))
        with tempfile.TemporaryDirectory() as temporary:
            folder = pathlib.Path(temporary) / "model"
            shutil.copytree(checkpoint.latest(init), folder)
            (folder / file).write_text(json.dumps({**json.loads((folder / file).read_text()), **edit}))
            laid = [rows[i] for indices in order(len(rows), steps) for i in indices]
            laid = [{**row, "prompt": row["prompt"].removesuffix("\n")} if bare else row for row in laid]
            rest = {key: value for key, value in changes.items() if key not in ("bare", "files")}
            made = trainer(folder, temporary, laid, steps, **rest)
            made.train()
        results[name] = {"TRL": log_of(made), "minidpo": our_log(start, pairs, steps, loss)}
        last = [results[name][side][-1]["loss"] for side in ("TRL", "minidpo")]
        first = [results[name][side][0]["grad_norm"] for side in ("TRL", "minidpo")]
        print(
            f"{name}: loss {last[0]:.4f}, here {last[1]:.4f}; first gradient norm {first[0]:.4g}, here {first[1]:.4g}"
        )
    return results


def child(library, init, data, steps, spawned):
    """One turn of one library in this process: seconds of the stage and of a token, and the last loss."""
    result = {}
    with tempfile.TemporaryDirectory() as temporary:
        out = pathlib.Path(temporary) / "out"
        if library == "minidpo":
            started = time.perf_counter()
            cli.dpo(data=data, init=init, out=out, steps=steps, evaluate_every=steps)
            result |= {"stage": time.perf_counter() - started, "stage with imports": time.time() - spawned}
            lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
            result["loss"] = [line["loss"] for line in lines if "loss" in line][-1]
        else:
            import torch

            torch.set_num_threads(2)
            import datasets  # noqa: F401
            import trl  # noqa: F401

            rows, _ = training_rows(init, data)
            laid = [rows[i] for indices in order(len(rows), steps) for i in indices]
            started = time.perf_counter()
            made = trainer(checkpoint.latest(init), temporary, laid, steps, precompute_ref_log_probs=True)
            made.train()
            made.save_model(str(out))
            result |= {"stage": time.perf_counter() - started, "stage with imports": time.time() - spawned}
            result["loss"] = log_of(made)[-1]["loss"]
    for B in (1, 32):
        result[f"token, B = {B}"], result[f"text, B = {B}"] = sampling(library, init, data, B)
    print(json.dumps(result))


def sampling(library, init, data, B):
    """Seconds a token of greedy texts after B prompts of one length, and the tokens."""
    start = checkpoint.load(init)
    _, pairs = training_rows(init, data)
    length = max({len(x) for x, *_ in pairs}, key=lambda n: sum(len(x) == n for x, *_ in pairs))
    prompts = [x for x, *_ in pairs if len(x) == length][:1] * B
    if library == "minidpo":

        def texts():
            return generation.generate(
                start.params, start.config, prompts, numpy.random.default_rng(0), NEW_TOKENS, temperature=0
            ).responses

    else:
        import torch
        from transformers import AutoModelForCausalLM

        model, ids = AutoModelForCausalLM.from_pretrained(checkpoint.latest(init)), torch.tensor(prompts)

        def texts():
            return model.generate(ids, do_sample=False, max_new_tokens=NEW_TOKENS, pad_token_id=0)[:, length:].tolist()

    first = texts()
    started, count = time.perf_counter(), 0
    while time.perf_counter() - started < 1 or count < 3:
        texts()
        count += 1
    return (time.perf_counter() - started) / count / len(first[0]), first[0]


def measure(init, data, steps, rounds):
    """Interleaved rounds of both libraries, and the share of the machine that others used meanwhile."""
    turns = {"minidpo": [], "TRL": []}
    for at in range(rounds):
        for library in list(turns) if at % 2 == 0 else list(turns)[::-1]:
            before, started = busy(), time.perf_counter()
            words = [sys.executable, "-m", "benchmarks.trl", "--child", library, "--init", init, "--data", data]
            words += ["--spawned", str(time.time())]
            done = subprocess.run(
                [*words, "--steps", str(steps)],
                env={**os.environ, **THREADS},
                capture_output=True,
                text=True,
                check=True,
            )
            wall = time.perf_counter() - started
            reply = json.loads(done.stdout.splitlines()[-1])
            turns[library].append({**reply, "busy": (busy() - before) / wall})
            print(
                f"round {at + 1}, {library}: {reply['stage']:.1f} s, {reply['stage with imports']:.1f} s with imports"
            )
    ours, theirs = (turns[library][0] for library in ("minidpo", "TRL"))
    if abs(ours["loss"] - theirs["loss"]) > 1e-4 or any(
        ours[f"text, B = {B}"] != theirs[f"text, B = {B}"] for B in (1, 32)
    ):
        raise ValueError(f"the two do not compute the same: {ours}, {theirs}")
    names = [name for name in ours if isinstance(ours[name], float) and name not in ("loss", "busy")]
    medians = {name: {library: statistics.median(turn[name] for turn in turns[library]) for library in turns}
               for name in names}  # fmt: skip
    ratios = {name: statistics.median(a[name] / b[name] for a, b in zip(turns["minidpo"], turns["TRL"]))
              for name in names}  # fmt: skip
    return {"steps": steps, "rounds": rounds, "medians": medians, "ratios": ratios, "turns": turns}


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--init", required=True, help="checkpoint or run folder of the SFT model")
    parser.add_argument("--data", required=True, help="JSON Lines of pairs")
    parser.add_argument("--steps", type=int, default=100, help="DPO steps in a turn")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each library")
    parser.add_argument("--habits", action="store_true", help="measure what habits change, not time")
    parser.add_argument("--out", type=pathlib.Path, help="JSON file for the figures")
    parser.add_argument("--child", choices=("minidpo", "TRL"), help=argparse.SUPPRESS)
    parser.add_argument("--spawned", type=float, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.child:
        child(chosen.child, chosen.init, chosen.data, chosen.steps, chosen.spawned)
        return
    if chosen.habits:
        results, out = habits(chosen.init, chosen.data), chosen.out or RESULTS / "trl_habits.json"
    else:
        results = measure(chosen.init, chosen.data, chosen.steps, chosen.rounds)
        out = chosen.out or RESULTS / "trl.json"
        print(json.dumps({name: results[name] for name in ("medians", "ratios")}, indent=2))
    out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
