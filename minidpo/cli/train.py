"""The commands that train: files in, a run's folder out."""

import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from inspect import signature
from json import dumps
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy

from .. import model, optim, training
from ..audit import provenance, versions
from ..audit.replies import judged
from ..backend import to_host
from ..data import preferences, world
from ..data.preferences import PAIRS, Encoded
from ..generation import generate
from ..losses import LOSSES, Choice
from ..model import Config, Params
from ..plots import installed
from ..run import checkpoint, report
from ..run.checkpoint import Checkpoint, CheckpointError
from ..run.files import write_whole
from ..run.folder import create, environment_changes, json_lines, prompts_document, run_description
from ..run.hub import tokenizer_document
from ..run.loop import Settings, Task, run_loop
from ..run.reference import cached_reference_logprobs, fingerprint
from ..run.tasks import counted
from ..run.workers import Workers, worker_count
from ..scoring import collate
from ..streams import stream
from ..tensor import Tensor
from ..tokenizer import END_OF_TEXT, TURN, Tokenizer, UnknownCharacterError
from ..training import Example, Loss
from . import options as o
from .options import NO_MATPLOTLIB, Default
from .parser import COMMANDS, arguments, command, flagged, parse

JUDGED = 200  # prompts, at most
LEAST_STEPS, MOST_STEPS = 10, 250  # between evaluations; within these, one follows each pass over the data
MAX_NORM = 1.0  # of the gradient of a step
DECODER: dict[str, Any] = {"temperature": 1.0, "top_k": None, "top_p": None}  # of the samples during a run
TEMPLATE = "end-of-text, prompt as written, response, end-of-text; no roles"
SCORED = "response tokens, end-of-text among them; not the prompt's"


class Training(NamedTuple):
    """The options that every training command has."""

    seed: o.Seed = 0
    held_out_share: o.HeldOutShare = 0.1
    held_out_data: o.HeldOutData = None
    steps: o.Steps = 0
    batch_size: o.BatchSize = 32
    micro_batch_size: o.MicroBatchSize = None
    learning_rate: o.LearningRate = 4e-3
    warmup_steps: o.WarmupSteps = 50
    evaluate_every: Annotated[
        o.EvaluateEvery | None, Default("10 in dpo; else once in a pass over the data, 10 to 250")
    ] = None
    patience: o.Patience = None
    device: o.Device = "cpu"
    resuming: bool = False

    def hashes(self, data: Path) -> dict[str, str]:
        """SHA-256 of each file, by the name under which a run keeps it."""
        files = {"data_sha256": data, "held_out_data_sha256": self.held_out_data}
        return {name: provenance.file_sum(path) for name, path in files.items() if path}


class Beginning(NamedTuple):
    """The options of the model that a run starts from."""

    init: Annotated[o.Init | None, Default("a new model")] = None
    n_embd: Annotated[o.Channels, Default("64")] = None
    n_layer: Annotated[o.Layers, Default("2, or 3 in pretrain")] = None
    n_head: Annotated[o.Heads, Default("4")] = None
    n_positions: Annotated[o.Context, Default("512, or the longest text's in pretrain")] = None
    replacement: o.Replacement = False


class Rows(NamedTuple):
    """Rows to train on, held out and to test on, and what a run's folder keeps about them."""

    train: Encoded
    held_out: Encoded
    test: Encoded
    set_aside: str  # JSON Lines
    description: dict[str, Any]  # hashes of the files, and how many rows were used

    def prompts(self, most: int = 5) -> list[list[int]]:
        """The first few different prompts that are held out."""
        return [list(x) for x in dict.fromkeys(tuple(x) for x, *_ in self.held_out.ids)][:most]

    def files(self, tokenizer: Tokenizer, *models: Path | None) -> dict[str, str]:
        """The files of the run's folder that are known before the first step."""
        parts = {"trained on": self.train, "chose its checkpoint by": self.held_out}
        used = {use: [row.prompt for row in part.rows] for use, part in parts.items()}
        document = {"tokenizer.json": tokenizer_document(tokenizer), "set_aside.jsonl": self.set_aside}
        return {**document, "prompts.json": prompts_document(used, filter(None, models))}


PRETRAIN = Training(steps=2000, batch_size=128)
SFT = Training(steps=800)
DPO = Training(steps=100, learning_rate=5e-5, warmup_steps=10, evaluate_every=10)  # chosen by benchmarks/defaults.py
NEW_MODEL = {"n_positions": 512, "n_embd": 64, "n_layer": 2, "n_head": 4}
BEGINNING = Beginning()
SPLIT = {"split": "SHA-256 of seed and prompt"}  # in run.json, where a version that splits otherwise can tell


def load(folder: Path, requires_grad: bool = False, device: str = "cpu") -> Checkpoint[Tokenizer]:
    """Load a checkpoint onto a device; say if its weights carry no checksum. It must be able to read texts."""
    params, config, tokenizer, verified = load_ids(folder, requires_grad, device)
    if tokenizer is None:
        raise CheckpointError(f"{folder}: has no tokenizer of characters, so it takes lists of ids, but no texts")
    return Checkpoint(params, config, tokenizer, verified)


def load_ids(folder: Path, requires_grad: bool = False, device: str = "cpu") -> Checkpoint[Tokenizer | None]:
    """The same for a model that may take lists of ids alone."""
    with warnings.catch_warnings(record=True) as remarks:
        warnings.simplefilter("always")
        loaded = checkpoint.load(folder, requires_grad)
    print("".join(f"{remark.message}\n" for remark in remarks), end="", file=sys.stderr)
    if not loaded.verified:
        print(f"{folder}: the weights carry no checksum and are used unchecked", file=sys.stderr)
    return loaded._replace(params=model.placed(loaded.params, device))


def same_vocabulary(folder: Path, loaded: Checkpoint, other_folder: Path, other: Checkpoint, ids: bool = False) -> None:
    """Refuse a policy and a reference that read texts differently; ids need only be as many."""
    if ids:
        differ = loaded.config.vocab_size != other.config.vocab_size
    else:
        differ = loaded.tokenizer.characters != other.tokenizer.characters
    if differ:
        raise CheckpointError(
            f"{folder} and {other_folder} have vocabularies of {loaded.config.vocab_size} and "
            f"{other.config.vocab_size} ids that differ: a policy and its reference must share one"
        )


def adamw(params: Params, run: Training, weight_decay: float) -> optim.AdamW:
    """The optimizer of the commands."""
    return optim.AdamW(params, run.learning_rate, betas=(0.9, 0.99), weight_decay=weight_decay)


def begin(
    out: Path, words: list[str], run: Training, optimizer: optim.AdamW, hashes: dict[str, Any],
    files: dict[str, str], template: str = TEMPLATE, scored: str = SCORED,
) -> None:  # fmt: skip
    """Make the run's folder, or check that the existing one was made from the same files and models."""
    if run.resuming:
        inputs = {name: value for name, value in hashes.items() if name not in ("rows", "counts")}  # these follow
        for change in environment_changes(out, inputs):
            print(f"{out}: {change}; the last bits of the result may differ", file=sys.stderr)
    else:
        constants = {name: getattr(optimizer, name) for name in ("betas", "eps", "weight_decay")}
        recipe = {"template": template, "scored": scored, "clip": {"max_norm": MAX_NORM}}
        recipe |= {"optimizer": {"name": type(optimizer).__name__, **constants}}
        recipe |= {"samples": {**DECODER, "seed": run.seed, "stream": "samples"}}
        create(out, {"arguments": words, **hashes, **provenance.run_sums(words), "recipe": recipe}, files)
    print(f"{out} will hold the run and its report, with {'curves' if installed() else f'no curves: {NO_MATPLOTLIB}'}")


def starting_model(
    options: Beginning, text: str, sizes: dict[str, int], run: Training
) -> tuple[Checkpoint, dict[str, Any]]:
    """The model of --init and its hash, or a new model that reads the characters of a text."""
    if options.init:
        for name, value in options._asdict().items():
            if name != "init" and value not in (None, False):
                raise ValueError(f"{flagged(name)} is for a new model, but --init names an existing one")
        start = load(options.init, requires_grad=True, device=run.device)
        return start, {"init_sha256": fingerprint(start.params)}
    tokenizer = Tokenizer.from_text(text + TURN, replacement=options.replacement)
    config = Config(tokenizer.vocab_size, **{name: getattr(options, name) or size for name, size in sizes.items()})
    params = model.placed(model.init(config, stream(run.seed, "init")), run.device)
    return Checkpoint(params, config, tokenizer, True), {}


def read_rows(
    data: Path, run: Training, test_share: float, truncation: str, strict: bool, fields: Sequence[str],
    start: Checkpoint, n_positions: int, repeats: str = "",
) -> Rows:  # fmt: skip
    """Read, validate, encode and split rows: by their prompts, as written."""
    usable = []
    for path in filter(None, (data, run.held_out_data)):
        usable.append(preferences.usable_rows(path, fields, start.tokenizer, n_positions, truncation, strict, repeats))
        print(usable[-1].summary)
        print("".join(f"{remark}\n" for remark in usable[-1].remarks), end="", file=sys.stderr)
    held_out_share, held_out = (0, usable[1]) if run.held_out_data else (run.held_out_share, None)
    parts, faults = preferences.parts(usable[0], held_out, run.seed, held_out_share, test_share)
    document = "".join(each.set_aside for each in usable) + preferences.set_aside(data, faults, strict)
    print(", ".join(f"{len(part.rows)} rows to {use}" for part, use in zip(parts, preferences.USES) if part.rows))
    texts = [text for each in usable for text in (each.summary, *each.remarks)]
    counts = versions.counts(dict(zip(preferences.USES, (part.rows for part in parts))), document)
    texts += [f"{field}: {provenance.words(counts[field])}" for field in versions.FIELDS if field in counts]
    description: dict[str, Any] = {**run.hashes(data), "rows": "; ".join(texts), "counts": counts}
    train, held, test = parts
    return Rows(train, held, test, document, description if held_out else {**description, **SPLIT})


def train(
    out: Path, start: Checkpoint, optimizer: optim.Optimizer, step: Callable[[list[int]], training.Metrics],
    evaluation: Callable[[Params, int | None], training.Metrics], prompts: Sequence[list[int]], names: Sequence[str],
    run: Training, test: bool,
) -> Path:  # fmt: skip
    """Train on examples from these lines, report, and warn if chosen responses have become much less likely.

    The evaluation takes parameters and the step after which to measure them on the held-out rows, or None, once at the
    end, for the test rows.
    """
    params, config, tokenizer, _ = start

    def replies() -> list[dict[str, str]]:
        rng = stream(run.seed, "samples")
        responses = generate(params, config, prompts, rng, config.n_positions, **DECODER).responses
        return [{"prompt": tokenizer.decode(x), "response": tokenizer.decode(y)} for x, y in zip(prompts, responses)]

    def rows(batch: list[int]) -> str:
        return f"lines {', '.join(dict.fromkeys(names[i] for i in sorted(batch)[:32]))}"

    def finish() -> None:
        if test and not (out / "result.json").exists():  # which has its hash
            metrics = evaluation(model.placed(checkpoint.load(out).params, run.device), None)
            write_whole(out / "test.json", (dumps(metrics, allow_nan=False) + "\n").encode())
            loss = f"{metrics['loss']:.4f}: {out / 'test.json'}"
            print(f"its loss on the test rows, which chose nothing, is {loss}")
        provenance.seal(out)
        report.write(out)

    every = run.evaluate_every or min(MOST_STEPS, max(LEAST_STEPS, len(names) // run.batch_size))
    settings = Settings(**{name: getattr(run._replace(evaluate_every=every), name) for name in Settings._fields})
    if run.warmup_steps > run.steps > 0:
        highest = run.learning_rate * run.steps / run.warmup_steps
        print(f"warning: --warmup-steps={run.warmup_steps} is more than --steps={run.steps}: the learning rate ends at "
              f"{highest:.2g} and never reaches {run.learning_rate:g}", file=sys.stderr)  # fmt: skip
    task = Task(len(names), step, lambda step: evaluation(params, step), replies, rows, finish)
    result = run_loop(out, params, config, tokenizer, optimizer, task, settings)
    metrics = json_lines(out / "metrics.jsonl")
    best = report.best(metrics)
    print(f"the lowest held-out loss was {best['eval_loss']:.4f}, at step {best['step']}")
    print(f"its model is {result}; read {out / 'report.md'}")
    for sentence in report.warnings(metrics):
        print(f"warning: {sentence}", file=sys.stderr)
    return result


def likelihood_run(
    out: Path, start: Checkpoint, optimizer: optim.Optimizer, examples: Sequence[Example],
    held_out: Sequence[Example], prompts: Sequence[list[int]], names: Sequence[str], run: Training,
    test: Sequence[Example] = (),
) -> Path:  # fmt: skip
    """Train on the likelihood of examples, which is what `pretrain` and `sft` share."""
    params, config = start.params, start.config

    def step(indices: list[int]) -> training.Metrics:
        batch = [examples[i] for i in indices]
        return training.sft_training_step(
            params, config, optimizer, batch, MAX_NORM, run.micro_batch_size, workers.nll_sweep
        )

    def evaluation(params: Params, step: int | None) -> training.Metrics:
        watch = partial(counted, what="held-out batches")
        return {"loss": training.held_out_nll(params, config, test if step is None else held_out, watch=watch)}

    with Workers(worker_count(params)) as workers:
        return train(out, start, optimizer, step, evaluation, prompts, names, run, bool(test))


def text_examples(path: Path, texts: Sequence[tuple[int, str]], start: Checkpoint) -> list[Example]:
    """Texts as examples for a model; raises ValueError with the line of one that it cannot read."""
    most = start.config.n_positions - 1
    try:
        examples = training.line_examples([text for _, text in texts], start.tokenizer)
    except UnknownCharacterError:
        for line, text in texts:
            start.tokenizer.encode(text, f"the text of {path}, line {line},")  # raises it again, with its place
        raise
    for line, text in texts:
        if len(text) > most:
            raise ValueError(f"{path}, line {line}: the text has {len(text)} characters, but {most} fit the context")
    return examples


@command("train")
def pretrain(
    *, data: o.Texts, out: o.NewRun, blocks: o.Blocks = False, beginning: Beginning = BEGINNING,
    run: Training = PRETRAIN,
) -> Path:  # fmt: skip
    """Train a model on the lines of a text file.

    Train a character transformer on a file in which each line is one text. A share of the different texts is held out
    and never trained on. The loss is in nats per token, with end-of-text counted as one token.
    """
    words = arguments("pretrain", locals())
    texts = preferences.read_texts(data, blocks)
    if run.held_out_data:
        other = preferences.read_texts(run.held_out_data, blocks)
        halves = list(texts.items()), list(other.items())
    else:
        rng = stream(run.seed, "split")
        halves = preferences.split(list(texts.items()), run.held_out_share, rng, lambda item: item[1])
    train_texts, held_out_texts = ([text for _, text in half] for half in halves)
    sizes = {**NEW_MODEL, "n_positions": max(map(len, train_texts + held_out_texts)) + 1, "n_layer": 3}
    start, hashes = starting_model(beginning, "".join(texts.values()), sizes, run)
    examples = text_examples(data, halves[0], start)
    held_out = text_examples(run.held_out_data or data, halves[1], start)
    size, ids = sum(p.data.size for p in start.params.values()), start.tokenizer.vocab_size
    print(f"{len(examples)} texts to train on, {len(held_out)} held out, {ids} ids, {size} parameters")
    if replaced := start.tokenizer.replaced(train_texts + held_out_texts):
        print(f"{data}: {replaced}", file=sys.stderr)
    if repeated := len(set(train_texts) & set(held_out_texts)):
        print(f"{repeated} of the held-out texts are also trained on")
    optimizer = adamw(start.params, run, weight_decay=0.01)
    hashes |= {**run.hashes(data), "counts": dict(zip(preferences.USES, map(len, halves)))}
    documents = {"tokenizer.json": tokenizer_document(start.tokenizer)}
    every = "every token of the text, and end-of-text"
    begin(out, words, run, optimizer, hashes, documents, "end-of-text, text as written, end-of-text", every)
    names = [str(line) for line, _ in halves[0]]
    return likelihood_run(out, start, optimizer, examples, held_out, [[END_OF_TEXT]] * 5, names, run)


@command("train")
def sft(
    *, data: o.Examples, out: o.NewRun, responses: o.Responses = "both", strict: o.Strict = False,
    truncation: o.Truncation = "none", test_share: o.TestShare = 0.0, beginning: Beginning = BEGINNING,
    run: Training = SFT,
) -> Path:  # fmt: skip
    """Fine-tune a model on responses, or train a new one.

    Supervised fine-tuning on JSON Lines of prompt and completion, or on both responses of prompt, chosen and rejected.
    The model reads the prompt and learns the response. Without --init a new model is trained.
    """
    words = arguments("sft", locals())
    fields = preferences.fields_of(data)
    n_positions = beginning.n_positions or NEW_MODEL["n_positions"]
    text = "" if beginning.init else preferences.usable_text(data, fields, n_positions, truncation)
    start, hashes = starting_model(beginning, text, NEW_MODEL, run)
    rows = read_rows(data, run, test_share, truncation, strict, fields, start, start.config.n_positions)
    optimizer = adamw(start.params, run, weight_decay=0.01)
    begin(out, words, run, optimizer, {**hashes, **rows.description}, rows.files(start.tokenizer, beginning.init))
    count = 1 if responses == "chosen" else 2
    names = [str(row.line) for row in rows.train.rows for _ in row.responses[:count]]
    parts = ([(x, y) for x, *ys in part.ids for y in ys[:count]] for part in (rows.train, rows.held_out, rows.test))
    examples, held_out, test = parts
    return likelihood_run(out, start, optimizer, examples, held_out, rows.prompts(), names, run, test)


def preference_loss(
    loss: str | Loss, label_smoothing: float | None, beta: float | None, loss_options: Mapping[str, float] | None = None
) -> tuple[Loss, float | None]:
    """The loss of a name with its options, or a function from Python as it is; and beta, by default the loss's own."""
    options = {} if label_smoothing is None else {"label_smoothing": label_smoothing}
    if options.keys() & (loss_options or {}).keys():
        raise ValueError("label_smoothing is given twice, also in loss_options")
    options |= loss_options or {}
    if not isinstance(loss, str):
        if options:
            raise ValueError(f"{next(iter(options))} is for losses with a name")
        if getattr(loss, "__name__", "") in LOSSES:
            raise ValueError(
                f"{loss.__name__} is the name of another loss, with which `resume` would continue: rename it"
            )
        return loss, 0.1 if beta is None else beta
    chosen = Choice(loss.replace("-", "_"), options)
    own = signature(LOSSES[chosen.name]).parameters.get("beta")
    if own is None and beta is not None:
        raise ValueError(f"the loss {loss} has no beta")
    beta = beta if beta is not None or own is None else own.default
    chosen(-1.0, -2.0, -2.0, -1.0, beta or 1.0, 1, 1)  # refuses options that make no sense before anything is written
    return chosen, beta


def try_votes(data: Path, loss: Loss, beta: float) -> None:
    """Refuse a loss that cannot use votes, before anything is written."""
    zero = Tensor(numpy.zeros(1))
    try:
        loss(zero, zero, zero.data, zero.data, beta, **training.by_name(loss, [([0], [0], [0])], numpy.ones((1, 2))))
    except ValueError as error:
        raise ValueError(f"{data}: the votes on its pairs cannot be used: {error}") from error


@command("train")
def dpo(
    *, data: o.Pairs, init: o.Init, out: o.NewRun,
    reference: Annotated[o.Reference | None, Default("the model of --init")] = None,
    beta: Annotated[o.Beta | None, Default("the loss's own, 0.1 for most")] = None, loss: o.LossName = "dpo",
    label_smoothing: Annotated[o.LabelSmoothing | None, Default("the loss's own")] = None,
    loss_options: Annotated[o.LossOptions | None, Default("the loss's own")] = None,
    nll_weight: o.NllWeight = 0.0, strict: o.Strict = False, truncation: o.Truncation = "none",
    repeats: o.Repeats = "set-aside", test_share: o.TestShare = 0.0, judge_every: o.JudgeEvery = None,
    run: Training = DPO,
) -> Path:  # fmt: skip
    """Train a model to prefer the chosen responses of pairs.

    Direct preference optimisation on JSON Lines of prompt, chosen and rejected. The frozen reference is the model of
    --init, unless --reference names another. Rewards in the metrics are those that the loss compares:
    beta log(pi/pi_ref) with most losses, beta log pi without a reference, per token if the loss takes means over
    tokens. `minidpo losses` prints the losses. Votes beside a pair count: {"prompt": "Hi", "chosen": "Hello!",
    "rejected": "Huh?", "votes": [7, 3]} is seven such pairs and three whose responses are exchanged, "p": 0.7 is seven
    tenths and three tenths of a pair.
    """
    objective, beta = preference_loss(loss, label_smoothing, beta, loss_options)
    words = arguments("dpo", locals())
    strength = beta or 1.0  # a loss without beta ignores it
    policy, config, tokenizer, _ = start = load(init, requires_grad=True, device=run.device)
    ref_params, ref_config = model.frozen(policy), config
    if reference:
        ref_params, ref_config, _, _ = other = load(reference, device=run.device)
        same_vocabulary(init, start, reference, other)
    n_positions = min(config.n_positions, ref_config.n_positions)
    rows = read_rows(data, run, test_share, truncation, strict, PAIRS, start, n_positions, repeats)
    votes, held_out_votes, test_votes = (
        numpy.array([row.votes for row in part.rows], dtype=float) for part in rows[:3]
    )
    if any((each != (1, 0)).any() for each in (votes, held_out_votes, test_votes) if each.size):
        try_votes(data, objective, strength)
    customers = [row.prompt.removesuffix(TURN) for row in rows.held_out.rows] if judge_every else []
    if judge_every and judge_every % (run.evaluate_every or 1):
        raise ValueError(f"--judge-every={judge_every} is not a multiple of --evaluate-every={run.evaluate_every}")
    if judge_every and ref_config.n_positions < config.n_positions:
        raise ValueError(f"--judge-every: {reference} has a shorter context than {init}, so it cannot score each reply")
    if strangers := [x for x in customers if x not in world.PROMPTS]:
        raise ValueError(f"--judge-every: {strangers[0]!a} is not a prompt of the demo's world, whose reward is known")
    customers = list(dict.fromkeys(customers))[:JUDGED]
    hashes = {"init_sha256": fingerprint(policy), "reference_sha256": fingerprint(ref_params)}
    optimizer = adamw(policy, run, weight_decay=0.0)
    begin(out, words, run, optimizer, {**hashes, **rows.description}, rows.files(tokenizer, init, reference))
    pairs: list[Any] = [*rows.train.ids, *rows.held_out.ids]
    print(f"the reference scores {len(pairs)} pairs", flush=True)
    cache = out / "reference.safetensors"
    scores = cached_reference_logprobs(cache, ref_params, ref_config, tokenizer, pairs)
    ref_logp_w, ref_logp_l = (to_host(logp) for logp in scores)  # a step takes those of its pairs
    count = len(rows.train.ids)
    held_out = collate(pairs[count:], ref_logp_w[count:], ref_logp_l[count:], held_out_votes)

    def step(indices: list[int]) -> training.Metrics:
        batch = collate([pairs[i] for i in indices], ref_logp_w[indices], ref_logp_l[indices], votes[indices])
        settings = strength, objective, nll_weight, MAX_NORM, run.micro_batch_size, workers.dpo_sweep
        return training.dpo_training_step(policy, ref_params, config, optimizer, batch, *settings)

    def evaluation(params: Params, step: int | None) -> training.Metrics:
        batch = held_out
        if step is None:
            test: list[Any] = rows.test.ids
            ref = training.reference_logprobs(ref_params, ref_config, counted(test, "test pairs"))
            batch = collate(test, to_host(ref[0]), to_host(ref[1]), test_votes)
        watch = partial(counted, what="held-out pairs")
        metrics = training.preference_evaluation(params, config, batch, strength, objective, nll_weight, watch)
        if step is not None and judge_every and step % judge_every == 0:
            anchor = Checkpoint(ref_params, ref_config, tokenizer, True)
            metrics |= judged(start._replace(params=params), anchor, customers, run.seed).summary()
        return metrics

    with Workers(worker_count(policy)) as workers:
        names, test = [str(row.line) for row in rows.train.rows], bool(rows.test.rows)
        return train(out, start, optimizer, step, evaluation, rows.prompts(), names, run, test)


@command("train")
def import_(folder: o.TheirFolder, *, out: o.NewRun) -> Path:
    """Import a model of Hugging Face's.

    Read a GPT-2 that transformers or TRL saved, and write it as a checkpoint, with checksums. Weights may be in several
    files; half precision becomes float32. Without a tokenizer of characters, the model takes lists of ids alone. What
    our model does not compute is refused.
    """
    params, config, tokenizer, _ = load_ids(folder)
    checkpoint.save(out, params, config, tokenizer)
    takes = "texts" if tokenizer else "lists of ids, no texts (minidpo score --ids)"
    print(f"{out}: {sum(p.data.size for p in params.values())} parameters, {config.vocab_size} ids; it takes {takes}")
    return out


@command("train")
def resume(folder: o.OldRun) -> Any:
    """Continue a run that was stopped or killed.

    Continue from the last checkpoint of a run, with the options that the run was started with. Its weights end bit
    for bit as those of a run that was never stopped, on the same machine with the same number of BLAS threads.
    """
    description = run_description(folder)
    name, *words = command_line = description["arguments"]
    if name not in COMMANDS or "resuming" not in signature(COMMANDS[name].function).parameters:
        raise CheckpointError(f"{folder / 'run.json'}: {name!a} is not a command that can be resumed")
    for word in words:
        if word.partition("=")[0] not in map(flagged, COMMANDS[name].options):
            raise CheckpointError(f"{folder / 'run.json'}: {word!a} is not an option of {name}")
    _, values = parse([*command_line, f"--out={folder}"])
    if name in ("sft", "dpo") and not values["held_out_data"] and "split" not in description:
        raise CheckpointError(f"{folder}: version 0.1 began this run and held out other prompts; start a new run")
    return COMMANDS[name].function(**values, resuming=True)
