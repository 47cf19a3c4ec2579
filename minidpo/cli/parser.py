"""The command line: `python -m minidpo COMMAND`."""

import argparse
import math
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy

from ..backend import device_fault
from ..data import preferences
from ..run import checkpoint
from ..run.checkpoint import CheckpointError
from ..run.folder import run_description
from ..tokenizer import printable
from . import demo, look, prove, train


def resume(options: argparse.Namespace) -> int:
    """Go on with a run that was stopped or killed, with the options that it was begun with."""
    given = run_description(options.folder)["arguments"]
    if given[0] not in (*demo.STAGES, "demo"):
        raise CheckpointError(f"{options.folder / 'run.json'}: {given[0]!a} is no command that can go on")
    again = parser().parse_args([*given, f"--out={options.folder}"])
    again.resume = True
    return again.run(again)


def support_desk(options: argparse.Namespace) -> int:
    """The demo, with this command line for its stages."""
    return demo.demo(options.out, options.seed, options.resume, main)


def judge(options: argparse.Namespace) -> int:
    """Print the true reward of models of the demo's world."""
    demo.judge(options.checkpoint, options.reference, options.seed, options.replies)
    return 0


def at_least(low: int, most: int = 2**31 - 1) -> Callable[[str], int]:
    """An argument's type: an integer that is not below `low`, nor above `most`."""

    def integer(text: str) -> int:
        if not (text.isascii() and text.isdecimal() and len(text) < 25 and low <= int(text) <= most):
            raise argparse.ArgumentTypeError(f"{text!r} is not an integer of at least {low} and at most {most}")
        return int(text)

    return integer


def between(low: float, high: float, closed: str = "") -> Callable[[str], float]:
    """An argument's type: a number between two others; `closed` says which of them it may be, "[" and "]"."""

    def number(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if low < value < high or ("[" in closed and value == low) or ("]" in closed and value == high):
            return value
        left, right = "[" if "[" in closed else "(", "]" if "]" in closed else ")"
        raise argparse.ArgumentTypeError(f"{text!r} is not a number in {left}{low:g}, {high:g}{right}")

    return number


WITHOUT_CHANCE = (train.evaluate, train.score, look.explain_pair, look.displaced, resume)


class Help(argparse.ArgumentDefaultsHelpFormatter):
    """Says the default of an option where it has one."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        nothing = action.default is None or action.default is False
        return action.help if nothing else super()._get_help_string(action)


def parser() -> argparse.ArgumentParser:
    """All commands and their options."""
    root = argparse.ArgumentParser(prog="minidpo", description="Preference optimisation from scratch.")
    commands = root.add_subparsers(dest="command", required=True)

    def command(
        run: Callable[[argparse.Namespace], int], summary: str, text: str, name: str = ""
    ) -> argparse.ArgumentParser:
        added = commands.add_parser(name or run.__name__, help=summary, description=text, formatter_class=Help)
        added.set_defaults(run=run, resume=False)
        if run not in WITHOUT_CHANCE:
            added.add_argument("--seed", type=at_least(0, 2**63), default=0, help="of all random numbers")
        return added

    def device_option(added: argparse.ArgumentParser) -> None:
        added.add_argument(
            "--device", choices=("cpu", "cuda"), default="cpu", help="where the arrays are; cuda is CuPy"
        )

    def training_command(
        run: Callable[[argparse.Namespace], int],
        summary: str,
        text: str,
        data: str,
        steps: int,
        batch_size: int,
        learning_rate: float,
        evaluate_every: int,
    ) -> argparse.ArgumentParser:
        added = command(run, summary, text)
        added.add_argument("--data", type=Path, required=True, help=data)
        added.add_argument("--out", type=Path, required=True, help="folder of the run; must not exist")
        added.add_argument("--held-out-share", type=between(0, 1), default=0.1, help="of the data, to measure on")
        added.add_argument("--held-out-data", type=Path, help="a file to measure on, instead of a share")
        added.add_argument("--steps", type=at_least(0), default=steps, help="optimizer steps")
        added.add_argument("--batch-size", type=at_least(1), default=batch_size, help="examples a step")
        added.add_argument(
            "--micro-batch-size", type=at_least(1), help="examples at a time: same gradient, other memory"
        )
        added.add_argument(
            "--learning-rate", type=between(0, math.inf), default=learning_rate, help="peak of the cosine schedule"
        )
        added.add_argument("--warmup-steps", type=at_least(0), default=50 if steps > 500 else 10, help="up to the peak")
        added.add_argument("--evaluate-every", type=at_least(1), default=evaluate_every, help="steps to a checkpoint")
        added.add_argument("--patience", type=at_least(1), help="measurements without a better one before the end")
        device_option(added)
        return added

    def model_options(added: argparse.ArgumentParser, n_layer: int, n_positions: str) -> None:
        added.add_argument("--init", type=Path, help="checkpoint or run to begin from; a new model if not given")
        sizes = {**train.NEW_MODEL, "n_layer": n_layer, "n_positions": n_positions}
        for name, what in (
            ("n_embd", "channels"),
            ("n_layer", "layers"),
            ("n_head", "heads, which divide the channels"),
        ):
            option = f"--{name.replace('_', '-')}"
            added.add_argument(option, type=at_least(1), help=f"{what} of a new model; {sizes[name]} if not given")
        added.add_argument("--n-positions", type=at_least(1), help=f"its context in tokens; {n_positions} if not given")
        added.add_argument("--replacement", action="store_true", help="let U+FFFD stand for characters not seen here")

    def row_options(added: argparse.ArgumentParser) -> None:
        added.add_argument("--strict", action="store_true", help="refuse a file with rows that cannot be used")
        added.add_argument(
            "--truncation",
            choices=preferences.TRUNCATIONS,
            default="none",
            help="what goes first where a row is longer than the context: nothing (the row is set aside), the "
            "beginning of its prompt, or the end of its responses",
        )

    added = command(
        prove.check,
        "compare every derivative with finite differences and the complex step",
        "Check the vector-Jacobian product of every op on random arguments, against central differences and the "
        "complex step. Prints the worst error; exits with 1 if any is too large.",
    )
    added.add_argument("--cases", type=at_least(1), default=100, help="random cases per op")

    command(
        prove.oracles,
        "show how two oracles find eleven wrong ways to score a response",
        "Score every response of a small world, rightly and in eleven wrong ways. A distribution sums to 1; one that "
        "does and is still wrong differs from the chain rule, one forward per prefix.",
    )

    added = command(
        prove.exactly,
        "show the theory of DPO as equalities on a small world",
        "Enumerate all responses of a small world and print, for each claim that the theory makes, the number that "
        "bears it out: Bradley-Terry, the KL-constrained objective, its optimum, the implicit reward, the optimum of "
        "DPO, RLHF, what beta does, and what breaks it. About two minutes; exits with 1 if a claim fails.",
        name="exact",
    )
    added.add_argument("--plot", type=Path, help="a PNG to draw what beta does into; needs the plot extra")

    added = command(
        prove.frontier_runs,
        "how much true reward each method buys with how much KL",
        "Run DPO, IPO, policy gradients, preferred fine-tuning, unlikelihood and best-of-N in small worlds, with exact "
        "true reward and exact KL to the reference, and print how far each ends below the best that its KL could buy. "
        "About twenty seconds for three worlds.",
        name="frontier",
    )
    added.add_argument("--out", type=Path, default=Path("frontier"), help="folder for frontier.json and frontier.png")
    added.add_argument("--worlds", type=at_least(1), default=5, help="how many, each with a seed of its own")

    added = command(
        support_desk,
        "make a base model, a helpful one and a preferred one, and compare them",
        "Make a small world, a support desk, whose true reward is known; pre-train a model on it, fine-tune it, "
        "prefer. Then ask all three models the same held-out prompts with the same random numbers, and print what is "
        "true of their replies. One to two minutes on two cores.",
        name="demo",
    )
    added.add_argument("--out", type=Path, default=Path("demo"), help="folder for everything; must not exist")

    added = command(
        judge,
        "measure the true reward of models of the demo's world",
        "Ask models the demo's held-out prompts and print what is true of their replies, a column per model. The seed "
        "must be that of the demo that they were trained in: it decides what was held out.",
    )
    added.add_argument("--checkpoint", type=Path, nargs="+", required=True, help="checkpoints or runs")
    added.add_argument("--reference", type=Path, required=True, help="checkpoint or run that the KL is measured to")
    added.add_argument("--replies", type=at_least(2), default=500, help="prompts, each answered once")

    added = training_command(
        train.pretrain,
        "train a model on the lines of a text file",
        "Train a character transformer on a file in which each line is a text by itself. A share of the distinct texts "
        "is held out and never trained on. The loss is in nats a token, end-of-text counted as one.",
        data="a text file in UTF-8",
        steps=2000,
        batch_size=128,
        learning_rate=4e-3,
        evaluate_every=250,
    )
    added.add_argument("--blocks", action="store_true", help="texts have several lines, with an empty one between")
    model_options(added, n_layer=3, n_positions="the longest text's")

    added = training_command(
        train.sft,
        "fine-tune a model on responses, or train a new one",
        "Supervised fine-tuning on JSON Lines of prompt and completion, or on both responses of prompt, chosen and "
        "rejected. The prompt is given, the response is learnt. Without --init a new model is trained.",
        data="JSON Lines of prompt/completion or prompt/chosen/rejected",
        steps=800,
        batch_size=32,
        learning_rate=4e-3,
        evaluate_every=100,
    )
    row_options(added)
    added.add_argument("--responses", choices=("both", "chosen"), default="both", help="of pairs, which are learnt")
    model_options(added, n_layer=2, n_positions="512")

    added = training_command(
        train.dpo,
        "prefer the chosen responses of pairs",
        "Direct preference optimisation on JSON Lines of prompt, chosen and rejected. The model to begin from is also "
        "the frozen reference, unless another is given. Rewards in the metrics are implicit, beta log(pi/pi_ref); with "
        "--loss reference-free they are beta log pi.",
        data="JSON Lines of prompt/chosen/rejected",
        steps=100,
        batch_size=32,
        learning_rate=3e-4,
        evaluate_every=10,
    )
    row_options(added)
    added.add_argument("--init", type=Path, required=True, help="checkpoint or run to begin from")
    added.add_argument("--reference", type=Path, help="checkpoint or run of the reference; --init if not given")
    added.add_argument("--beta", type=between(0, math.inf), default=0.2, help="reward per nat of log-ratio")
    added.add_argument("--loss", choices=train.LOSSES, default="dpo", help="what is minimised")
    added.add_argument(
        "--label-smoothing", type=between(0, 0.5, "[]"), default=0.0, help="probability that a label is flipped"
    )
    added.add_argument(
        "--nll-weight",
        type=between(0, math.inf, "["),
        default=2.0,
        help="times the chosen responses' nats a token is added",
    )

    for run, summary, text in (
        (
            train.evaluate,
            "measure a policy against its reference on pairs",
            "Print the DPO loss alone, implicit rewards, accuracy (a tie is no success, and is counted beside it), "
            "log-probabilities and the rise of the chosen responses' loss against the reference, in nats a token.",
        ),
        (
            train.score,
            "print the log-probabilities of each pair",
            "Print a JSON object a line for every pair of a file: its line, log pi of both responses and, with "
            "--reference, the same under the reference, the implicit rewards and the DPO loss.",
        ),
    ):
        added = command(run, summary, text)
        added.add_argument("--checkpoint", type=Path, required=True, help="checkpoint or run of the policy")
        required = run is train.evaluate
        added.add_argument("--reference", type=Path, required=required, help="checkpoint or run of the reference")
        added.add_argument("--data", type=Path, required=True, help="JSON Lines of prompt/chosen/rejected")
        added.add_argument("--beta", type=between(0, math.inf), default=0.2, help="reward per nat of log-ratio")
        row_options(added)
        device_option(added)
        if required:
            added.add_argument("--json", action="store_true", help="print one JSON object")

    def pair_options(added: argparse.ArgumentParser, required: bool) -> None:
        added.add_argument("--checkpoint", type=Path, required=required, help="checkpoint or run of the policy")
        added.add_argument(
            "--reference", type=Path, help="checkpoint or run of the reference; a dpo run's own, or the policy itself"
        )
        added.add_argument(
            "--beta", type=between(0, math.inf), help=f"reward per nat; a dpo run's own, or {look.BETA:g}"
        )
        added.add_argument(
            "--learning-rate",
            type=between(0, math.inf),
            help="of the steps that are predicted and taken; 1e-6 if not given",
        )

    added = command(
        look.explain_pair,
        "show every gradient of one preference pair",
        "Show what the DPO loss makes of one pair: each token's log-probability, the implicit reward up to it, the "
        "coefficient and the logits that are pushed; the gradient by formula, per logit, by autograd and by finite "
        "difference; and what a step will do to both log-probabilities, beside what it does.",
        name="explain",
    )
    pair_options(added, required=True)
    added.add_argument("--prompt", required=True, help="as it stands in the data")
    added.add_argument("--newline", action="store_true", help="end the prompt with a newline")
    added.add_argument("--chosen", required=True, help="the preferred response")
    added.add_argument("--rejected", required=True, help="the other one")
    added.add_argument("--json", action="store_true", help="print one JSON object")
    added.add_argument("--html", type=Path, help="a page to write the tokens to")
    added.add_argument(
        "--graph", type=Path, help="a file to write the loss's graph to: .dot (Graphviz), .mmd (Mermaid)"
    )

    added = command(
        look.displaced,
        "show how being preferred can make a response less likely",
        "Train a model of three words on one pair, with and without a likelihood term. With --checkpoint and --data: "
        "take a small step on each pair by itself, and count those that lower their own chosen log-probability, as "
        "predicted to first order and as measured.",
        name="displacement",
    )
    pair_options(added, required=False)
    added.add_argument("--data", type=Path, help="JSON Lines of prompt/chosen/rejected")
    row_options(added)

    command(
        look.unmoved,
        "what leaves the DPO loss alone, and what looks alike and does not",
        "Measure on a random model how much the loss and its gradient change where they must not, and where they must.",
        name="invariances",
    )

    added = command(
        train.sample,
        "let a model go on from a prompt",
        "Print texts that begin with the prompt, each on a line, drawn from a checkpoint's model.",
    )
    added.add_argument("--checkpoint", type=Path, required=True, help="a checkpoint or a run")
    added.add_argument("--prompt", default="", help="how the text begins")
    added.add_argument("--newline", action="store_true", help="end the prompt with a newline, and print the response")
    added.add_argument("--samples", type=at_least(1), default=5, help="how many texts")
    added.add_argument("--max-new-tokens", type=at_least(1), help="length cap; the context's if not given")
    added.add_argument("--temperature", type=float, default=1.0, help="divides the logits; 0 takes the likeliest")
    added.add_argument("--top-k", type=at_least(1), help="keep the k likeliest tokens")
    added.add_argument("--top-p", type=float, help="keep the fewest tokens with this much probability")
    device_option(added)

    added = command(
        resume,
        "go on with a run that was stopped or killed",
        "Go on where the last checkpoint of a run stands, with the options that it was begun with; its weights end "
        "as those of a run that was never stopped, bit for bit, on the same machine with as many BLAS threads.",
    )
    added.add_argument("folder", type=Path, help="the --out of the run")
    return root


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status; what is wrong with its input is one sentence."""
    options = parser().parse_args(argv)
    status = 2
    try:
        with numpy.errstate(all="ignore"):  # what is not finite is an error with a sentence of its own
            return options.run(options)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        fault, status = "what it prints to was closed" + how_to_go_on(options), 141
    except KeyboardInterrupt:
        fault, status = "interrupted" + how_to_go_on(options), 130
    except FloatingPointError as error:
        fault, status = str(error), 3
    except OSError as error:
        fault = f"{error.filename}: {error.strerror}" if error.filename else str(error)
    except ValueError as error:
        fault = str(error)
    except MemoryError as error:
        fault = f"not enough memory ({error}): a smaller model, a smaller batch or shorter lines may fit"
        fault += how_to_go_on(options)
    except RuntimeError as error:
        if not device_fault(error):
            raise
        fault = f"{error}{how_to_go_on(options)}"
    print(printable(f"minidpo {options.command}: {fault}"), file=sys.stderr)
    return status


def how_to_go_on(options: argparse.Namespace) -> str:
    """What to do when a command was cut off, if it has a run."""
    run = getattr(options, "out", getattr(options, "folder", None))
    if not (run and (run / "run.json").exists()):
        return ""
    last = checkpoint.latest(run)
    kept = f"; the last checkpoint is {last}" if last != run else ""
    return f"{kept}; go on with: python -m minidpo resume {run}"
