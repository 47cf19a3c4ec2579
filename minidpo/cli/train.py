"""The commands that train and measure: files in, a run's folder or a table out."""

import argparse
import hashlib
import json
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from .. import losses, model, optim, training
from ..backend import to_host
from ..data import preferences
from ..data.preferences import PAIRS, Encoded
from ..generation import generate
from ..model import Config, Params
from ..run import checkpoint, report
from ..run.checkpoint import Checkpoint, CheckpointError
from ..run.folder import create, environment_changes
from ..run.loop import Settings, Task, run_loop
from ..run.reference import cached_reference_logprobs, fingerprint
from ..run.workers import Workers, keep_memory, worker_count
from ..scoring import collate
from ..streams import stream
from ..tokenizer import END_OF_TEXT, TURN, Tokenizer, printable
from ..training import Loss

LOSSES = ("dpo", "ipo", "reference-free")
NEW_MODEL = {"n_positions": 512, "n_embd": 64, "n_layer": 2, "n_head": 4}
MODEL = (*NEW_MODEL, "replacement")  # options of a new model


class Data(NamedTuple):
    """Rows to train on and rows held out, and what a run's folder keeps about them."""

    train: Encoded
    held_out: Encoded
    set_aside: str  # JSON Lines
    description: dict[str, str]  # hashes of the files, and how many rows were used


def file_hash(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def data_files(options: argparse.Namespace) -> list[tuple[str, Path]]:
    """The files that a run is made from, by the name under which their hashes are kept."""
    files = [("data_sha256", options.data), ("held_out_data_sha256", options.held_out_data)]
    return [(name, path) for name, path in files if path is not None]


def load(folder: Path, requires_grad: bool = False, device: str = "cpu") -> Checkpoint:
    """A checkpoint, its parameters on a device; says so where nothing vouches for its weights."""
    loaded = checkpoint.load(folder, requires_grad)
    loaded = loaded._replace(params=model.placed(loaded.params, device))
    if not loaded.verified:
        print(f"{folder}: no checksum in the weights, taken as they are", file=sys.stderr)
    return loaded


def begin(options: argparse.Namespace, description: dict[str, Any], files: dict[str, str]) -> None:
    """Make the run's folder, or make sure that the one to go on with was begun with the same."""
    if options.resume:
        for change in environment_changes(options.out, description):
            print(f"{options.out}: {change}; the last bits of the result may differ", file=sys.stderr)
    else:
        create(options.out, {"arguments": arguments(options), **description}, files)


def arguments(options: argparse.Namespace) -> list[str]:
    """The command line that gives these options, with absolute paths."""
    given = [options.command]
    for name, value in vars(options).items():
        if name not in ("command", "run", "resume", "out") and value is not None and value is not False:
            text = str(value.resolve()) if isinstance(value, Path) else str(value)
            given.append(f"--{name.replace('_', '-')}" + ("" if value is True else f"={text}"))
    return given


def settings(options: argparse.Namespace) -> Settings:
    """The part of the options that the loop reads."""
    return Settings(
        options.seed,
        options.steps,
        options.batch_size,
        options.learning_rate,
        options.warmup_steps,
        options.evaluate_every,
        options.patience,
    )


def samples(
    params: Params, config: Config, tokenizer: Tokenizer, prompts: Sequence[list[int]], seed: int
) -> list[dict[str, str]]:
    """What the model answers to the prompts, with the same random numbers each time."""
    drawn = generate(params, config, prompts, stream(seed, "samples"), max_new_tokens=config.n_positions)
    return [{"prompt": tokenizer.decode(x), "response": tokenizer.decode(y)} for x, y in zip(prompts, drawn.responses)]


class Beginning(NamedTuple):
    """The model that a run begins from."""

    params: Params
    config: Config
    tokenizer: Tokenizer
    hashes: dict[str, str]


def beginning(options: argparse.Namespace, text: str, sizes: dict[str, int]) -> Beginning:
    """The model of --init, or a new one with the characters of a text, of `sizes` where the options give none."""
    if options.init:
        given = [name for name in MODEL if getattr(options, name) not in (None, False)]
        if given:
            raise ValueError(f"--{given[0].replace('_', '-')} is for a new model, and --init names one that is there")
        loaded = load(options.init, requires_grad=True, device=options.device)
        return Beginning(*loaded[:3], {"init_sha256": fingerprint(loaded.params)})
    tokenizer = Tokenizer.from_text(text + TURN, replacement=options.replacement)
    config = Config(tokenizer.vocab_size, *(getattr(options, name) or size for name, size in sizes.items()))
    params = model.placed(model.init(config, stream(options.seed, "init")), options.device)
    return Beginning(params, config, tokenizer, {})


def read_texts(path: Path, blocks: bool) -> list[str]:
    """The lines of a file that are not empty, or its blocks of lines."""
    with preferences.open_regular(path) as file:
        try:
            content = file.read().decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}: byte {error.start} is not UTF-8") from error
    texts = [text.strip("\n") for text in content.split("\n\n" if blocks else "\n") if text.strip("\n")]
    if not texts:
        raise ValueError(f"{path}: there is no text in it")
    return texts


def pretrain(options: argparse.Namespace) -> int:
    """Train a model on the lines of a file."""
    texts = read_texts(options.data, options.blocks)
    if options.held_out_data:
        train, held_out = texts, read_texts(options.held_out_data, options.blocks)
    else:
        train, held_out = preferences.split(texts, options.held_out_share, stream(options.seed, "split"))
    longest = max(map(len, train + held_out)) + 1
    begun = beginning(options, "".join(texts), {**NEW_MODEL, "n_positions": longest, "n_layer": 3})
    params, config, tokenizer = begun.params, begun.config, begun.tokenizer
    examples, measured = (training.line_examples(part, tokenizer) for part in (train, held_out))
    longest = max(len(y) for _, y in examples + measured)
    if longest > config.n_positions:
        raise ValueError(f"a text has {longest - 1} characters, {config.n_positions - 1} fit into the context")
    size = sum(p.data.size for p in params.values())
    met = len(set(train) & set(held_out))
    print(f"{len(train)} texts to train on, {len(held_out)} held out, {tokenizer.vocab_size} ids, {size} parameters")
    if met:
        print(f"{met} of the held-out texts are also trained on")
    hashes = {name: file_hash(path) for name, path in data_files(options)}
    begin(options, {**begun.hashes, **hashes}, {"tokenizer.json": tokenizer.to_json()})
    prompts = [[END_OF_TEXT]] * 5
    return likelihood_run(
        options, params, config, tokenizer, examples, measured, prompts,
        lambda indices: f"texts {', '.join(ascii(train[i][:40]) for i in indices[:8])}",
    )  # fmt: skip


def likelihood_run(
    options: argparse.Namespace,
    params: Params,
    config: Config,
    tokenizer: Tokenizer,
    examples: Sequence[training.Example],
    measured: Sequence[training.Example],
    prompts: Sequence[list[int]],
    rows: Callable[[list[int]], str],
) -> int:
    """Train on the likelihood of examples: what pre-training and fine-tuning share."""
    optimizer = optim.AdamW(params, options.learning_rate, betas=(0.9, 0.99), weight_decay=0.01)
    workers = Workers(worker_count(params))
    task = Task(
        len(examples),
        lambda indices: training.sft_training_step(
            params, config, optimizer, [examples[i] for i in indices], 1.0, options.micro_batch_size, workers.nll_sweep
        ),
        lambda: {"loss": training.held_out_nll(params, config, measured)},
        lambda: samples(params, config, tokenizer, prompts, options.seed),
        rows,
    )
    keep_memory()
    with workers:
        return finish(options, run_loop(options.out, params, config, tokenizer, optimizer, task, settings(options)))


def finish(options: argparse.Namespace, result: Path) -> int:
    """Write the report and say where everything is."""
    best = report.write(options.out)
    print(f"the lowest held-out loss was {best['eval_loss']:.4f}, at step {best['step']}")
    print(f"its model is {result}; read {options.out / 'report.md'}")
    return 0


def data(options: argparse.Namespace, fields: Sequence[str], tokenizer: Tokenizer, n_positions: int) -> Data:
    """Read, validate, encode and split the rows of a command: by their prompts, as the model sees them."""
    told: list[str] = []

    def encoded(path: Path) -> tuple[Encoded, str]:
        rows, faults = preferences.read(path, fields)
        ids = preferences.encode(rows, tokenizer, n_positions, options.truncation)
        kept = preferences.set_aside(path, sorted(faults + ids.faults), options.strict)
        found = f"{path.name}: {len(ids.rows)} rows, {len(ids.faults) + len(faults)} set aside"
        told.append(found + (f", {len(ids.truncated)} truncated" if ids.truncated else ""))
        print(told[-1])
        if not ids.rows:
            first = sorted(faults + ids.faults)[:1]
            why = f" (line {first[0].line}: {first[0].reason})" if first else ""
            raise ValueError(f"{path}: no row can be used{why}")
        return ids, kept

    train, kept = encoded(options.data)
    hashes = {name: file_hash(path) for name, path in data_files(options)}
    if options.held_out_data:
        held_out, more = encoded(options.held_out_data)
        prompts = {tuple(x) for x, *_ in train.ids}
        leak = next((row.line for row, (x, *_) in zip(held_out.rows, held_out.ids) if tuple(x) in prompts), None)
        if leak is not None:
            raise ValueError(f"{options.held_out_data}, line {leak}: this prompt is in {options.data} too")
        return Data(train, held_out, kept + more, {**hashes, "rows": "; ".join(told)})
    both = preferences.split(
        list(zip(train.rows, train.ids)),
        options.held_out_share,
        stream(options.seed, "split"),
        lambda pair: tuple(pair[1][0]),
    )
    parts = [Encoded([row for row, _ in part], [ids for _, ids in part], [], []) for part in both]
    print(f"{len(parts[0].rows)} rows to train on, {len(parts[1].rows)} held out")
    return Data(parts[0], parts[1], kept, {**hashes, "rows": told[0]})


def sft(options: argparse.Namespace) -> int:
    """Fine-tune a model on responses, or train a new one on them."""
    fields = preferences.fields_of(options.data)
    rows_read = [] if options.init else preferences.read(options.data, fields)[0]
    text = "".join(row.prompt + "".join(row.responses) for row in rows_read)
    begun = beginning(options, text, NEW_MODEL)
    params, config, tokenizer = begun.params, begun.config, begun.tokenizer
    rows = data(options, fields, tokenizer, config.n_positions)
    begin(
        options,
        {**begun.hashes, **rows.description},
        {"tokenizer.json": tokenizer.to_json(), "set_aside.jsonl": rows.set_aside},
    )
    count = 1 if options.responses == "chosen" else 2
    examples = [(i, (x, y)) for i, (x, *ys) in enumerate(rows.train.ids) for y in ys[:count]]
    measured = [(x, y) for x, *ys in rows.held_out.ids for y in ys[:count]]
    return likelihood_run(
        options, params, config, tokenizer, [example for _, example in examples], measured,
        sampled_prompts(rows.held_out), lambda indices: named_rows(rows.train, [examples[i][0] for i in indices]),
    )  # fmt: skip


def sampled_prompts(rows: Encoded, most: int = 5) -> list[list[int]]:
    """The first few different prompts."""
    return [list(x) for x in dict.fromkeys(tuple(x) for x, *_ in rows.ids)][:most]


def named_rows(rows: Encoded, indices: Sequence[int]) -> str:
    """The lines of rows in their file."""
    return f"lines {', '.join(str(rows.rows[i].line) for i in sorted(set(indices)))}"


def chosen_loss(name: str, label_smoothing: float) -> Loss:
    """The loss of a name, as a function of four log-probabilities and beta."""
    if name == "ipo" and label_smoothing:
        raise ValueError("--label-smoothing has no meaning for ipo")
    return losses.Choice(name.replace("-", "_"), {"label_smoothing": label_smoothing} if label_smoothing else {})


def dpo(options: argparse.Namespace) -> int:
    """Prefer the chosen responses, against a frozen reference."""
    loaded = load(options.init, requires_grad=True, device=options.device)
    policy, config, tokenizer = loaded.params, loaded.config, loaded.tokenizer
    if options.reference:
        other = load(options.reference, device=options.device)
        same_vocabulary(options.init, loaded, options.reference, other)
        reference, reference_config = other.params, other.config
    else:
        reference, reference_config = model.frozen(policy), config
    n_positions = min(config.n_positions, reference_config.n_positions)
    loss = chosen_loss(options.loss, options.label_smoothing)
    rows = data(options, PAIRS, tokenizer, n_positions)
    begin(
        options,
        {
            "init_sha256": fingerprint(policy),
            "reference_sha256": fingerprint(reference),
            **rows.description,
        },
        {"tokenizer.json": tokenizer.to_json(), "set_aside.jsonl": rows.set_aside},
    )
    pairs: list[Any] = [*rows.train.ids, *rows.held_out.ids]
    print(f"the reference scores {len(pairs)} pairs", flush=True)
    kept = options.out / "reference.safetensors"
    scores = cached_reference_logprobs(kept, reference, reference_config, tokenizer, pairs)
    ref_logp_w, ref_logp_l = (to_host(logp) for logp in scores)  # a step takes those of its pairs
    count = len(rows.train.ids)
    held_out = collate(pairs[count:], ref_logp_w[count:], ref_logp_l[count:])
    optimizer = optim.AdamW(policy, options.learning_rate, betas=(0.9, 0.99), weight_decay=0.0)
    workers = Workers(worker_count(policy))
    task = Task(
        count,
        lambda indices: training.dpo_training_step(
            policy,
            reference,
            config,
            optimizer,
            collate([pairs[i] for i in indices], ref_logp_w[indices], ref_logp_l[indices]),
            options.beta,
            loss,
            options.nll_weight,
            1.0,
            options.micro_batch_size,
            workers.dpo_sweep,
        ),
        lambda: training.preference_evaluation(policy, config, held_out, options.beta, loss, options.nll_weight),
        lambda: samples(policy, config, tokenizer, sampled_prompts(rows.held_out), options.seed),
        lambda indices: named_rows(rows.train, indices),
    )
    keep_memory()
    with workers:
        return finish(options, run_loop(options.out, policy, config, tokenizer, optimizer, task, settings(options)))


def same_vocabulary(folder: Path, loaded: Checkpoint, other_folder: Path, other: Checkpoint) -> None:
    """Refuse a policy and a reference that read texts differently."""
    if loaded.tokenizer.characters != other.tokenizer.characters:
        raise CheckpointError(
            f"{folder} and {other_folder} have vocabularies of {loaded.tokenizer.vocab_size} and "
            f"{other.tokenizer.vocab_size} ids that differ: a policy and its reference must share one"
        )


def scored_rows(options: argparse.Namespace, device: str = "cpu") -> tuple[Checkpoint, Checkpoint, Encoded, int]:
    """Policy, reference, the rows of a file that both can score, and how many rows were set aside."""
    policy = load(options.checkpoint, device=device)
    reference = load(options.reference, device=device) if options.reference else policy
    same_vocabulary(options.checkpoint, policy, options.reference or options.checkpoint, reference)
    n_positions = min(policy.config.n_positions, reference.config.n_positions)
    rows, faults = preferences.read(options.data)
    ids = preferences.encode(rows, policy.tokenizer, n_positions, options.truncation)
    faults = sorted(faults + ids.faults)
    preferences.set_aside(options.data, faults, options.strict)
    for fault in faults:
        print(f"{options.data}, line {fault.line}: set aside, {fault.reason}", file=sys.stderr)
    if not ids.rows:
        raise ValueError(f"{options.data}: no row can be used")
    return policy, reference, ids, len(faults)


def evaluate(options: argparse.Namespace) -> int:
    """Compare a policy with its reference on pairs."""
    policy, reference, rows, faults = scored_rows(options, options.device)
    pairs: list[Any] = rows.ids
    ref_logp_w, ref_logp_l = training.reference_logprobs(reference.params, reference.config, pairs)
    batch = collate(pairs, ref_logp_w, ref_logp_l)
    metrics: dict[str, Any] = {"pairs": len(pairs), "set_aside": faults, "truncated": len(rows.truncated)}
    metrics |= training.preference_evaluation(policy.params, policy.config, batch, options.beta)
    metrics |= {"ref_logps/chosen": ref_logp_w.mean().item(), "ref_logps/rejected": ref_logp_l.mean().item()}
    if options.json:
        print(json.dumps(metrics, allow_nan=False))
    else:
        for name, value in metrics.items():
            print(f"{name:<20} {value:>12}" if isinstance(value, int) else f"{name:<20} {value:>12.4f}")
    return 0


def score(options: argparse.Namespace) -> int:
    """Print the log-probabilities of each pair."""
    policy, reference, rows, _ = scored_rows(options, options.device)
    pairs: list[Any] = rows.ids
    for row, pair in zip(rows.rows, pairs):
        logp_w, logp_l = training.reference_logprobs(policy.params, policy.config, [pair])
        scores: dict[str, float] = {"line": row.line, "truncated": row.line in rows.truncated}
        scores |= {"logps/chosen": logp_w.item(), "logps/rejected": logp_l.item()}
        if options.reference:
            ref_logp_w, ref_logp_l = training.reference_logprobs(reference.params, reference.config, [pair])
            out = losses.dpo_loss(logp_w, logp_l, ref_logp_w, ref_logp_l, options.beta)
            scores |= {"ref_logps/chosen": ref_logp_w.item(), "ref_logps/rejected": ref_logp_l.item()}
            scores |= {"rewards/chosen": out.reward_w.item(), "rewards/rejected": out.reward_l.item()}
            scores |= {"loss": out.loss.item()}
        if not all(map(math.isfinite, scores.values())):
            raise FloatingPointError(f"{options.data}, line {row.line}: a score is not finite")
        print(json.dumps(scores), flush=True)
    return 0


def sample(options: argparse.Namespace) -> int:
    """Print what a model answers to a prompt."""
    loaded = load(options.checkpoint, device=options.device)
    text = options.prompt + (TURN if options.newline else "")
    drawn = generate(
        loaded.params,
        loaded.config,
        [[END_OF_TEXT, *loaded.tokenizer.encode(text)]] * options.samples,
        stream(options.seed, "samples"),
        options.max_new_tokens or loaded.config.n_positions,
        options.temperature,
        options.top_k,
        options.top_p,
    )
    for response in drawn.responses:
        print(printable(("" if options.newline else options.prompt) + loaded.tokenizer.decode(response)))
    return 0
