"""The command line: `python -m minidpo COMMAND`."""

import argparse
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy

from . import checkpoint, model, mutants, training
from .cases import CASES, RandomDraw
from .generation import generate
from .gradcheck import TOLERANCE, GradientError, check_vjp
from .model import Config
from .ops import OPS
from .tokenizer import END_OF_TEXT, Tokenizer


def check(options: argparse.Namespace) -> int:
    """Print one row per op with its worst error by each method; return 1 if an op failed."""
    print(f"{'op':<18}{'central':>10}{'complex':>10}{'cases':>8}", flush=True)
    failures = []
    for name in OPS:
        row = ""
        for method in TOLERANCE:
            rng = numpy.random.default_rng(options.seed)
            draw = RandomDraw(rng)
            try:
                worst = 0.0
                for _ in range(options.cases):
                    arguments, keywords = CASES[name](draw)
                    worst = max(worst, check_vjp(OPS[name], *arguments, rng=rng, method=method, **keywords))
                row += f"{worst:>10.1e}"
            except GradientError as error:
                failures.append(str(error))
                row += f"{'FAILED':>10}"
        print(f"{name:<18}{row}{options.cases:>8}", flush=True)
    bounds = ", ".join(f"{method} {bound:.0e}" for method, bound in TOLERANCE.items())
    print(f"\n{len(OPS)} ops, all within: {bounds}" if not failures else "")
    for failure in failures:
        print(failure, file=sys.stderr)
    return 1 if failures else 0


def oracles(options: argparse.Namespace) -> int:
    """Print what the normalisation oracle and the chain rule say of the right score and of eleven wrong ones."""
    rng = numpy.random.default_rng(options.seed)
    config = Config(vocab_size=4, n_positions=8, n_embd=8, n_layer=2, n_head=2)
    params = model.init(config, rng, dtype="float64")
    for p in params.values():
        p.data = p.data + 0.5 * rng.normal(size=p.shape)  # far from uniform, so that every mistake shows
    print(mutants.as_text(mutants.verdicts(params, config, [2, 1, 3], cap=3)))
    return 0


def pretrain(options: argparse.Namespace) -> int:
    """Train a model on the lines of a file and save it."""
    if options.out.exists():
        raise checkpoint.CheckpointError(f"{options.out} exists already: choose another folder, nothing is overwritten")
    try:
        text = options.data.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{options.data}: byte {error.start} is not UTF-8") from error
    options.out.parent.mkdir(parents=True, exist_ok=True)
    tempfile.TemporaryFile(dir=options.out.parent).close()  # rather now than after the training
    lines = [line for line in text.split("\n") if line]
    split_rng, init_rng, batch_rng = numpy.random.default_rng(options.seed).spawn(3)
    tokenizer = Tokenizer.from_text("".join(lines), replacement=options.replacement)
    train, held_out = training.split(lines, 0.1, split_rng)
    config = Config(tokenizer.vocab_size, max(map(len, lines)) + 1, options.n_embd, options.n_layer, options.n_head)
    params = model.init(config, init_rng)
    size = sum(p.data.size for p in params.values())
    print(f"{len(train)} lines to train on, {len(held_out)} held out, {tokenizer.vocab_size} ids, {size} parameters")

    def report(metrics: dict[str, Any]) -> None:
        print(
            f"step {metrics['step']:>6}/{options.steps}   held-out loss {metrics['eval_loss']:.4f} nats a token   "
            f"{metrics['tokens_per_second']:,.0f} tokens/s",
            flush=True,
        )

    training.pretrain(
        params,
        config,
        training.line_examples(train, tokenizer),
        training.line_examples(held_out, tokenizer),
        batch_rng,
        steps=options.steps,
        batch_size=options.batch_size,
        learning_rate=options.learning_rate,
        report=report,
    )
    checkpoint.save(options.out, params, config, tokenizer)
    print(f"saved in {options.out}")
    return 0


def sample(options: argparse.Namespace) -> int:
    """Print what a model answers to a prompt."""
    loaded = checkpoint.load(options.checkpoint)
    if not loaded.verified:
        print(f"{options.checkpoint}: no checksum in the weights, taken as they are", file=sys.stderr)
    prompt = [END_OF_TEXT, *loaded.tokenizer.encode(options.prompt)]
    rng = numpy.random.default_rng(options.seed)
    generation = generate(
        loaded.params,
        loaded.config,
        [prompt] * options.samples,
        rng,
        options.max_new_tokens or loaded.config.n_positions,
        options.temperature,
        options.top_k,
        options.top_p,
    )
    for response in generation.responses:
        print(options.prompt + loaded.tokenizer.decode(response))
    return 0


def at_least(low: int) -> Callable[[str], int]:
    """An argument's type: an integer that is not below `low`."""

    def integer(text: str) -> int:
        if not text.isdecimal() or int(text) < low:
            raise argparse.ArgumentTypeError(f"{text!r} is not an integer of at least {low}")
        return int(text)

    return integer


def parser() -> argparse.ArgumentParser:
    """All commands and their options."""
    root = argparse.ArgumentParser(prog="minidpo", description="Preference optimisation from scratch.")
    commands = root.add_subparsers(dest="command", required=True)

    def command(run: Callable[[argparse.Namespace], int], summary: str, text: str) -> argparse.ArgumentParser:
        added = commands.add_parser(
            run.__name__, help=summary, description=text, formatter_class=argparse.ArgumentDefaultsHelpFormatter
        )
        added.set_defaults(run=run)
        added.add_argument("--seed", type=at_least(0), default=0, help="of all random numbers")
        return added

    added = command(
        check,
        "compare every derivative with finite differences and the complex step",
        "Check the vector-Jacobian product of every op on random arguments, against central differences and the "
        "complex step. Prints the worst error; exits with 1 if any is too large.",
    )
    added.add_argument("--cases", type=at_least(1), default=100, help="random cases per op")

    command(
        oracles,
        "show how two oracles find eleven wrong ways to score a response",
        "Score every response of a small world, rightly and in eleven wrong ways. A distribution sums to 1; one that "
        "does and is still wrong differs from the chain rule, one forward per prefix.",
    )

    added = command(
        pretrain,
        "train a model on the lines of a text file",
        "Train a character transformer on a file in which each line is a text by itself. A tenth of the distinct "
        "lines is held out and never trained on. The loss is in nats a token, end-of-text counted as one.",
    )
    added.add_argument("--data", type=Path, required=True, help="a text file in UTF-8")
    added.add_argument("--out", type=Path, required=True, help="folder for the checkpoint; must not exist")
    added.add_argument("--steps", type=at_least(0), default=2000, help="optimizer steps")
    added.add_argument("--batch-size", type=at_least(1), default=128, help="lines a step")
    added.add_argument("--learning-rate", type=float, default=4e-3, help="peak, after 50 steps of warm-up")
    added.add_argument("--n-embd", type=at_least(1), default=64, help="channels")
    added.add_argument("--n-layer", type=at_least(1), default=3, help="layers")
    added.add_argument("--n-head", type=at_least(1), default=4, help="heads; must divide the channels")
    added.add_argument("--replacement", action="store_true", help="let U+FFFD stand for characters not seen here")

    added = command(
        sample,
        "let a model go on from a prompt",
        "Print texts that begin with the prompt, each on a line, drawn from a checkpoint's model.",
    )
    added.add_argument("--checkpoint", type=Path, required=True, help="a checkpoint's folder")
    added.add_argument("--prompt", default="", help="how the text begins")
    added.add_argument("--samples", type=at_least(1), default=5, help="how many texts")
    added.add_argument("--max-new-tokens", type=at_least(1), help="length cap; the context's if not given")
    added.add_argument("--temperature", type=float, default=1.0, help="divides the logits; 0 takes the likeliest")
    added.add_argument("--top-k", type=at_least(1), help="keep the k likeliest tokens")
    added.add_argument("--top-p", type=float, help="keep the fewest tokens with this much probability")
    return root


def main(argv: list[str] | None = None) -> int:
    """Run one command and return its exit status; what is wrong with its input is one sentence."""
    options = parser().parse_args(argv)
    try:
        return options.run(options)
    except (OSError, ValueError, FloatingPointError) as error:
        fault = str(error)
    except MemoryError as error:
        fault = f"not enough memory ({error}): a smaller model, a smaller batch or shorter lines may fit"
    print(f"minidpo {options.command}: {fault}", file=sys.stderr)
    return 2
