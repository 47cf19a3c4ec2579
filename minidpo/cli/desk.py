"""The support desk: the demo that makes a base model, a helpful one and a preferred one.

The true reward of the desk's world is known, so the gain of each stage is measured, not read off its training loss.
"""

import json
import math
import shlex
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from .. import plots, training
from ..audit.replies import Figures, Judged, as_text, failures, figures, judged, records
from ..data import preferences, world
from ..data.convert import convert
from ..plots import Curve, Panel
from ..run import report
from ..run.checkpoint import Checkpoint
from ..run.files import remove_leftovers, write_whole
from ..run.folder import create, json_lines
from ..run.tasks import results
from ..scoring import collate
from ..streams import stream
from ..tokenizer import TURN, printable
from . import options as o
from .parser import COMMANDS, command, parse
from .train import load

STAGES = {"pretrain": "base", "sft": "SFT", "dpo": "DPO"}
NAMES = "ada alan alonzo andrey anna carl claude david donald emmy ernst grace henri ida joan john karen leon mary ruth"


class Sizes(NamedTuple):
    """How much data the demo makes, and how long it trains."""

    texts: int
    completions: int
    pairs: int
    held_out: int  # of each of the three kinds, to choose a checkpoint by, and as many to report on
    steps: Mapping[str, int]
    model: Sequence[str]  # options of `pretrain`
    replies: int  # of each model, to judge


FULL = Sizes(
    texts=20_000, completions=8_000, pairs=6_000, held_out=500, replies=500,
    steps={"pretrain": 1000, "sft": 500, "dpo": 300},
    model=["--n-embd=64", "--n-layer=2", "--n-head=4", "--n-positions=128"],
)  # fmt: skip


def make_data(folder: Path, seed: int, sizes: Sizes) -> None:
    """Write the world's texts and rows into a folder; the same seed gives the same files."""
    train, held_out, test = world.split(seed)

    def texts(count: int, part: str) -> str:
        return "\n\n".join(world.corpus(train, count, stream(seed, "world", "texts", part))) + "\n"

    def rows(make: Callable[..., list[dict[str, str]]], prompts: list[str], count: int, part: str) -> str:
        examples = make(prompts, count, stream(seed, "world", make.__name__, part))
        return "".join(json.dumps({**row, "prompt": row["prompt"] + TURN}) + "\n" for row in examples)

    files = {
        "texts.txt": partial(texts, sizes.texts, "train"),
        "texts_held_out.txt": partial(texts, sizes.held_out, "held out"),
        "texts_test.txt": partial(texts, sizes.held_out, "test"),
        "completions.jsonl": partial(rows, world.supervised, train, sizes.completions, "train"),
        "completions_held_out.jsonl": partial(rows, world.supervised, held_out, sizes.held_out, "held out"),
        "completions_test.jsonl": partial(rows, world.supervised, test, sizes.held_out, "test"),
        "pairs.jsonl": partial(rows, world.preferences, train, sizes.pairs, "train"),
        "pairs_held_out.jsonl": partial(rows, world.preferences, held_out, sizes.held_out, "held out"),
        "pairs_test.jsonl": partial(rows, world.preferences, test, sizes.held_out, "test"),
    }
    folder.mkdir(exist_ok=True)
    remove_leftovers(folder)
    for name, content in zip(files, results(list(files.values()), "the desk's texts")):
        write_whole(folder / name, content.encode())


def stage_arguments(folder: Path, stage: str, seed: int, sizes: Sizes) -> list[str]:
    """The command line of a stage, as a user would type it."""
    kind = {"pretrain": "texts{}.txt", "sft": "completions{}.jsonl", "dpo": "pairs{}.jsonl"}[stage]
    own = {
        "pretrain": ["--blocks", *sizes.model, "--batch-size=32"],
        "sft": [f"--init={folder / 'pretrain'}", "--learning-rate=2e-3"],
        "dpo": [f"--init={folder / 'sft'}", "--beta=0.2", "--nll-weight=2", "--learning-rate=3e-4"],
    }[stage]
    data, held_out = (folder / "data" / kind.format(part) for part in ("", "_held_out"))
    steps = sizes.steps[stage]
    words = [stage, f"--data={data}", f"--held-out-data={held_out}", *own, f"--out={folder / stage}", f"--seed={seed}"]
    return [*words, f"--steps={steps}", f"--evaluate-every={max(1, steps // 5)}"]


@command("learn")
def demo(*, out: o.NewRun = Path("demo"), seed: o.Seed = 0, sizes: Sizes | None = None, resuming: bool = False) -> Path:
    """Make a base, an SFT and a DPO model, and compare them.

    Make a small world, a support desk whose true reward is known; pre-train a model on it, fine-tune it, and run DPO.
    Then give all three models the same prompts, by which nothing was trained or chosen, with the same random numbers,
    and print how good their replies truly are. It takes about 240 CPU seconds.
    """
    if not resuming:
        create(out, {"arguments": ["demo", f"--seed={seed}"]}, {})
    sizes = sizes or FULL
    make_data(out / "data", seed, sizes)
    print(f"a support desk, its customers and their preferences: {out / 'data'}", flush=True)
    for stage in STAGES:
        words = ["resume", str(out / stage)] if (out / stage).exists() else stage_arguments(out, stage, seed, sizes)
        print(f"\n$ minidpo {shlex.join(words)}", flush=True)
        name, values = parse(words)
        COMMANDS[name].function(**values)
    conclude(out, seed, sizes)
    return out


@command("learn")
def data(what: o.Example, file: o.OtherData = None, *, out: o.NewData = None) -> None:
    """Write small files to try the other commands with, or convert data.

    `data convert FILE --out FILE` reads TRL's conversational and implicit-prompt rows. Each message of a prompt becomes
    a line "role: content", a response its content; what chosen and rejected have in common becomes their prompt.
    """
    if bool(file and out) is not (what == "convert") or bool(file) is not bool(out):
        raise ValueError("it is `data example`, or `data convert FILE --out FILE`")
    if file and out:
        o.check_output(out)
        rows, faults = convert(file)
        for fault in faults:
            print(f"{file}, line {fault.line}: set aside, {fault.reason}", file=sys.stderr)
        if not rows:
            raise ValueError(f"{file}: no row can be converted")
        write_whole(out, "".join(json.dumps(row) + "\n" for row in rows).encode())
        print(f"{out}: {len(rows)} rows, {len(faults)} set aside")
        return
    files = {Path("names.txt"): NAMES.replace(" ", "\n") + "\n"}
    for name, prompts, count in zip(("pairs.jsonl", "more.jsonl"), world.split(0)[::2], (200, 50)):
        rows = world.preferences(prompts, count, stream(0, what, name))
        files[Path(name)] = "".join(json.dumps({**row, "prompt": row["prompt"] + TURN}) + "\n" for row in rows)
    o.announce(*files)
    for path, content in files.items():
        write_whole(path, content.encode())


def test_prompts(seed: int, count: int, part: int = 2) -> list[str]:
    """Prompts of a part of `world.split`, by default that by which no model was trained and no checkpoint chosen."""
    return world.samples(world.prompt_distribution(world.split(seed)[part]), count, stream(seed, "demo", "prompts"))


def facts(folder: Path, seed: int, base: Checkpoint, sft: Checkpoint, dpo: Checkpoint) -> list[str]:
    """Compare the models' metrics on the test files with their exact counterparts, one sentence each."""

    def rows(name: str, fields: Sequence[str]) -> preferences.Encoded:
        every, _ = preferences.read(folder / "data" / name, fields)
        return preferences.encode(every, sft.tokenizer, sft.config.n_positions)

    train, _, test = world.split(seed)
    texts = list(preferences.read_texts(folder / "data" / "texts_test.txt", blocks=True).values())
    texts_nll = -math.fsum(world.corpus_logprob(text, train) for text in texts) / sum(len(text) + 1 for text in texts)
    base_nll = training.held_out_nll(base.params, base.config, training.line_examples(texts, base.tokenizer))
    replies = rows("completions_test.jsonl", preferences.COMPLETIONS)
    sft_nll = training.held_out_nll(sft.params, sft.config, [(x, y) for x, y in replies.ids])
    known = [(row.prompt.removesuffix(TURN), row.responses) for row in replies.rows]
    replies_nats = -math.fsum(math.log(world.desk(world.PROMPTS[x])[y]) for x, (y,) in known)
    replies_nll = replies_nats / sum(len(y) + 1 for _, (y,) in known)
    pairs = rows("pairs_test.jsonl", preferences.PAIRS)
    ids: list[Any] = pairs.ids
    batch = collate(ids, *training.reference_logprobs(sft.params, sft.config, ids))
    metrics = training.preference_evaluation(dpo.params, dpo.config, batch)
    chances = [world.preference_probability(row.prompt.removesuffix(TURN), *row.responses) for row in pairs.rows]
    true = statistics.fmean((p > 0.5) + (p == 0.5) / 2 for p in chances)  # 1/2 is a tie
    implicit = metrics["rewards/accuracies"] + metrics["rewards/ties"] / 2
    return [
        f"base model: {base_nll:.4f} nats per token on test texts; the grammar itself {texts_nll:.4f} on these, its "
        f"exact entropy {world.corpus_entropy(train):.4f}",
        f"SFT model: {sft_nll:.4f} nats per token on replies to test prompts; the desk itself {replies_nll:.4f} on "
        f"these, its exact entropy {world.reply_entropy(test):.4f}",
        f"DPO model: implicit reward ranks {implicit:.3f} of the test pairs as labelled, where a tie counts one half; "
        f"the true reward ranks {true:.3f}. Labels are drawn by chance: the most that any ranking can expect is "
        f"{statistics.fmean(max(p, 1 - p) for p in chances):.3f}",
        f"the desk, whose replies the SFT model learns, has a mean true reward of {world.desk_reward(test):.2f}",
    ]


def rewards(models: Mapping[str, Figures], seed: int, count: int) -> Panel:
    """A diagram of the models' true rewards by slice, with 95 % intervals, beside the desk's."""
    curves = []
    for shift, name in enumerate(next(iter(models.values()))):
        each = [row[name]["reward"] for row in models.values()]
        places = [place + 0.06 * (shift - 1.5) for place in range(len(each))]  # bars beside each other
        curves.append(Curve(name, places, [x.value for x in each], "o", error=[x.high - x.value for x in each]))
    ylabel = f"mean over {count} replies, from -4 to 3"
    desk = world.desk_reward(world.split(seed)[2])
    return Panel(
        "true reward", "", ylabel, curves, level=desk, level_label="the replies that SFT learns", places=list(models)
    )


def conclude(folder: Path, seed: int, sizes: Sizes) -> None:
    """Judge the models, print their replies side by side, and write the report."""
    models = {stage: load(folder / stage) for stage in STAGES}
    prompts = test_prompts(seed, sizes.replies)
    metrics = {stage: json_lines(folder / stage / "metrics.jsonl") for stage in STAGES}
    tasks = [partial(judged, model, models["sft"], prompts, seed) for model in models.values()]
    *verdicts, sentences = results([*tasks, partial(facts, folder, seed, *models.values())], "judging the models")
    replies: dict[str, Judged] = dict(zip(STAGES.values(), verdicts))
    table = {name: figures(each, replies["SFT"], prompts) for name, each in replies.items()}
    dialogue: list[str] = []
    for name in world.SLICES:
        for i in [i for i, x in enumerate(prompts) if world.PROMPTS[x].slice == name][:2]:
            dialogue.append(f"{prompts[i]}  ({name})")
            for model, each in replies.items():
                dialogue.append(f"  {model:<5}{each.judgements[i].reward:+d}  {printable(each.replies[i])}")
    text, faults = as_text(table, "SFT"), failures(replies["DPO"], replies["SFT"], prompts, 5, "DPO", "SFT")
    print(f"\nthe three models answer {len(prompts)} prompts that are new to them; the true reward comes first\n")
    print("\n".join([*dialogue, "", text, "", *sentences]))
    parts = [
        "# A support desk",
        f"{len(prompts)} replies to {len(set(prompts))} test prompts, by which no model was trained and no checkpoint "
        "chosen. Each model draws with the same random numbers; the true reward judges; intervals are at 95 %.",
        indented(text),
        "\n".join(f"- {sentence}" for sentence in sentences),
        indented("\n".join(dialogue)),
        "## What went wrong",
        indented(faults),
    ]
    if plots.picture(folder / "demo.png", [rewards(table, seed, len(prompts))], transparent=True):
        parts.insert(2, "![true reward](demo.png)")
    parts.append("![curves](curves.png)" if report.curves(folder / "curves.png", metrics) else report.NO_CURVES)
    write_whole(folder / "report.md", ("\n\n".join(parts) + "\n").encode())
    document = {"models": table, "dialogue": dialogue, "failures": faults.splitlines(), "facts": sentences}
    write_whole(folder / "results.json", (json.dumps(document, indent=2) + "\n").encode())
    write_whole(folder / "replies.jsonl", "".join(json.dumps(row) + "\n" for row in records(replies, prompts)).encode())
    print(f"\neverything is in {folder}; start with {folder / 'report.md'}")


def indented(text: str) -> str:
    """A text as Markdown shows it unchanged."""
    return "\n".join(f"    {line}".rstrip() for line in text.splitlines())
