"""The one command: a support desk's base model becomes a helpful one, and then a preferred one.

The true reward of the world is known, so that what each stage gains is measured, and not read off the loss that it
was trained on.
"""

import json
import math
import shlex
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ..data import preferences, world
from ..generation import generate
from ..run import checkpoint, report
from ..run.checkpoint import Checkpoint
from ..run.files import remove_leftovers, write_whole
from ..run.folder import create, json_lines
from ..scoring import packed_logprobs
from ..streams import stream
from ..tokenizer import END_OF_TEXT, TURN, printable
from .train import load, read_texts, same_vocabulary

STAGES = {"pretrain": "base", "sft": "SFT", "dpo": "DPO"}
COLUMNS = {
    "model": "model",
    "reward": "true reward",
    "reward_error": "+-",
    "well_formed": "well formed",
    "on_topic": "on topic",
    "polite": "polite",
    "wrongly_declined": "wrongly declined",
    "wrongly_answered": "wrongly answered",
    "kl": "KL to SFT",
}

Run = Callable[[Sequence[str]], int]  # runs a command line


class Sizes(NamedTuple):
    """How much the demo makes, and how long it trains."""

    texts: int
    completions: int
    pairs: int
    held_out: int  # of each of the three
    steps: Mapping[str, int]
    model: Sequence[str]  # options of `pretrain`
    replies: int  # of each model, that are judged


FULL = Sizes(
    texts=20_000,
    completions=8_000,
    pairs=6_000,
    held_out=500,
    steps={"pretrain": 1000, "sft": 500, "dpo": 300},
    model=["--n-embd=64", "--n-layer=2", "--n-head=4", "--n-positions=128"],
    replies=500,
)


def make_data(folder: Path, seed: int, sizes: Sizes) -> None:
    """Write the world's texts and rows into a folder, the same for the same seed."""
    train, held_out = world.split(seed)

    def texts(count: int, part: str) -> str:
        return "\n\n".join(world.corpus(train, count, stream(seed, "world", "texts", part))) + "\n"

    def rows(make: Callable[..., list[dict[str, str]]], prompts: list[str], count: int, part: str) -> str:
        made = make(prompts, count, stream(seed, "world", make.__name__, part))
        return "".join(json.dumps({**row, "prompt": row["prompt"] + TURN}) + "\n" for row in made)

    files = {
        "texts.txt": texts(sizes.texts, "train"),
        "texts_held_out.txt": texts(sizes.held_out, "held out"),
        "completions.jsonl": rows(world.supervised, train, sizes.completions, "train"),
        "completions_held_out.jsonl": rows(world.supervised, held_out, sizes.held_out, "held out"),
        "pairs.jsonl": rows(world.preferences, train, sizes.pairs, "train"),
        "pairs_held_out.jsonl": rows(world.preferences, held_out, sizes.held_out, "held out"),
    }
    folder.mkdir(exist_ok=True)
    remove_leftovers(folder)
    for name, content in files.items():
        write_whole(folder / name, content.encode())


def stage_arguments(folder: Path, stage: str, seed: int, sizes: Sizes) -> list[str]:
    """The command line of a stage, as one would type it."""
    kind = {"pretrain": "texts{}.txt", "sft": "completions{}.jsonl", "dpo": "pairs{}.jsonl"}[stage]
    own = {
        "pretrain": ["--blocks", *sizes.model, "--batch-size=32"],
        "sft": [f"--init={folder / 'pretrain'}", "--learning-rate=2e-3"],
        "dpo": [f"--init={folder / 'sft'}"],
    }[stage]
    steps = sizes.steps[stage]
    return [
        stage,
        f"--data={folder / 'data' / kind.format('')}",
        f"--held-out-data={folder / 'data' / kind.format('_held_out')}",
        *own,
        f"--out={folder / stage}",
        f"--seed={seed}",
        f"--steps={steps}",
        f"--evaluate-every={max(1, steps // 5)}",
    ]


def demo(folder: Path, seed: int, going_on: bool, run: Run, sizes: Sizes | None = None) -> int:
    """Make the world, train the three models, judge them on prompts that none has seen.

    Raises
    ------
    CheckpointError
        If the folder exists and this is not to go on with it.
    """
    if not going_on:
        create(folder, {"arguments": ["demo", f"--seed={seed}"]}, {})
    sizes = sizes or FULL
    make_data(folder / "data", seed, sizes)
    print(f"a support desk, its customers and what they prefer: {folder / 'data'}", flush=True)
    for stage in STAGES:
        given = stage_arguments(folder, stage, seed, sizes)
        if (folder / stage).exists():
            given = ["resume", str(folder / stage)]
        print(f"\n$ python -m minidpo {shlex.join(given)}", flush=True)
        status = run(given)
        if status:
            print(f"then the demo goes on with: python -m minidpo resume {folder}", file=sys.stderr)
            return status
    conclude(folder, seed, sizes)
    return 0


def judged(model: Checkpoint, reference: Checkpoint, prompts: Sequence[str], seed: int) -> dict[str, Any]:
    """Replies of a model to the prompts, and the means of what is true of them.

    The KL to the reference is estimated from them: the mean of log pi(y|x) - log pi_ref(y|x) over y drawn from pi.
    """
    ids = [[END_OF_TEXT, *model.tokenizer.encode(x + TURN)] for x in prompts]
    drawn = generate(model.params, model.config, ids, stream(seed, "demo", "replies"), model.config.n_positions)
    replies = [model.tokenizer.decode(y) for y in drawn.responses]
    verdicts = [world.judgement(x, reply) for x, reply in zip(prompts, replies)]
    ratios = [
        math.fsum(logps) - packed_logprobs(reference.params, reference.config, [(x, y)]).data.sum().item()
        for x, y, logps in zip(ids, drawn.responses, drawn.logprobs)
    ]
    return {
        "replies": replies,
        **{name: statistics.fmean(getattr(v, name) for v in verdicts) for name in world.Judgement._fields},
        "reward_error": statistics.stdev(v.reward for v in verdicts) / math.sqrt(len(verdicts)),
        "kl": statistics.fmean(ratios),
    }


def as_text(rows: Sequence[Mapping[str, Any]]) -> str:
    """What is true of the replies, a column per model."""
    width = max(8, *(len(str(row["model"])) + 2 for row in rows))
    lines = []
    for name, title in COLUMNS.items():
        cells = (
            f"{row[name]:>{width}}" if name == "model" else f"{round(row[name], 2) + 0.0:>{width}.2f}" for row in rows
        )
        lines.append(f"{title:<17}" + "".join(cells))
    return "\n".join(lines)


def held_out_prompts(seed: int, count: int) -> list[str]:
    """What customers ask who are met for the first time."""
    return world.samples(world.prompt_distribution(world.split(seed)[1]), count, stream(seed, "demo", "prompts"))


def judge(folders: Sequence[Path], reference: Path, seed: int, replies: int) -> None:
    """Print what is true of the replies of models to held-out prompts of the world of a seed.

    Raises
    ------
    ValueError
        If a model has other characters than the world, or another vocabulary than the reference.
    """
    prompts = held_out_prompts(seed, replies)
    anchor = load(reference)
    rows = []
    for folder in folders:
        model = load(folder)
        if not set("".join(prompts) + TURN) <= set(model.tokenizer.characters):
            raise ValueError(f"{folder}: lacks characters of the demo's world, and is no model of it")
        same_vocabulary(folder, model, reference, anchor)
        rows.append({"model": printable(folder.resolve().name), **judged(model, anchor, prompts, seed)})
    print(as_text(rows).replace("KL to SFT", f"KL to {printable(reference.resolve().name)}"))


def facts(folder: Path, seed: int, measured: Mapping[str, Mapping[str, float]], sft: Checkpoint) -> list[str]:
    """How close the models come to what is known exactly, a sentence each."""

    def rows(name: str, fields: Sequence[str]) -> list[tuple[str, tuple[str, ...]]]:
        found, _ = preferences.read(folder / "data" / name, fields)
        used = preferences.encode(found, sft.tokenizer, sft.config.n_positions).rows
        return [(row.prompt.removesuffix(TURN), row.responses) for row in used]

    train, held_out = world.split(seed)
    texts = read_texts(folder / "data" / "texts_held_out.txt", blocks=True)
    texts_nll = -math.fsum(world.corpus_logprob(text, train) for text in texts) / sum(len(text) + 1 for text in texts)
    replies = [(x, y) for x, (y,) in rows("completions_held_out.jsonl", preferences.COMPLETIONS)]
    replies_nats = -math.fsum(math.log(world.desk(world.PROMPTS[x])[y]) for x, y in replies)
    replies_nll = replies_nats / sum(len(y) + 1 for _, y in replies)
    pairs = rows("pairs_held_out.jsonl", preferences.PAIRS)
    gaps = [world.judgement(x, w).reward - world.judgement(x, l).reward for x, (w, l) in pairs]
    return [
        f"base model: {measured['pretrain']['eval_loss']:.4f} nats a token on held-out texts; the grammar itself "
        f"{texts_nll:.4f} on these, its exact entropy {world.corpus_entropy(train):.4f}",
        f"SFT model: {measured['sft']['eval_loss']:.4f} nats a token on replies to held-out prompts; the desk itself "
        f"{replies_nll:.4f} on these, its exact entropy {world.reply_entropy(held_out):.4f}",
        f"DPO model: implicit reward ranks {measured['dpo']['eval_rewards/accuracies']:.3f} of the held-out pairs as "
        f"labelled; the true reward {sum(gap > 0 for gap in gaps) / len(gaps):.3f}, and has "
        f"{sum(gap == 0 for gap in gaps) / len(gaps):.3f} ties",
        f"the desk whose replies the SFT model learns has a mean true reward of {world.desk_reward(held_out):.2f}",
    ]


def conclude(folder: Path, seed: int, sizes: Sizes) -> None:
    """Judge the models, print what they say side by side, and write the report."""
    models = {stage: checkpoint.load(folder / stage) for stage in STAGES}
    prompts = held_out_prompts(seed, sizes.replies)
    rows = {stage: judged(models[stage], models["sft"], prompts, seed) for stage in STAGES}
    metrics = {stage: json_lines(folder / stage / "metrics.jsonl") for stage in STAGES}
    by_slice = {name: [i for i, x in enumerate(prompts) if world.PROMPTS[x].slice == name] for name in world.SLICES}
    dialogue: list[str] = []
    for name, indices in by_slice.items():
        for i in indices[:2]:
            dialogue.append(f"{prompts[i]}  ({name})")
            for stage, model in STAGES.items():
                reply = rows[stage]["replies"][i]
                dialogue.append(f"  {model:<5}{world.judgement(prompts[i], reply).reward:+d}  {printable(reply)}")
    table = [{**row, "model": STAGES[stage]} for stage, row in rows.items()]
    sentences = facts(folder, seed, {stage: report.best(lines) for stage, lines in metrics.items()}, models["sft"])
    print(f"\nthe three models answer {len(prompts)} lines that none of them has met; true rewards first\n")
    print("\n".join(dialogue), end="\n\n")
    print(as_text(table))
    print("\n" + "\n".join(sentences))
    parts = [
        "# A support desk",
        f"Replies to {len(prompts)} held-out prompts, drawn with the same random numbers, judged by the true reward.",
        report.table(table, COLUMNS),
        "\n".join(f"- {sentence}" for sentence in sentences),
        "\n".join(f"    {line}" for line in dialogue),
    ]
    parts.append("![curves](curves.png)" if report.curves(folder / "curves.png", metrics) else report.NO_CURVES)
    write_whole(folder / "report.md", ("\n\n".join(parts) + "\n").encode())
    models_found = [{name: value for name, value in row.items() if name != "replies"} for row in table]
    results = {"models": models_found, "dialogue": dialogue, "facts": sentences}
    write_whole(folder / "results.json", (json.dumps(results, indent=2) + "\n").encode())
    print(f"\neverything is in {folder}; begin with {folder / 'report.md'}")
