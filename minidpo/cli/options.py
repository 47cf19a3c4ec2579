"""Every option of the command line, said once: its type, its help and the values that it accepts.

A command annotates its parameters with these names, and parser.py makes the command line from them.
"""

import math
import os
import sys
import tempfile
from argparse import ArgumentTypeError
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy

from .. import losses
from ..data.preferences import REPEATS, TRUNCATIONS
from ..training import Loss
from ..verify.frameworks import FRAMEWORKS
from ..verify.loss_check import NAMES
from ..verify.texts import LAYOUTS

LOSSES = tuple(name.replace("_", "-") for name in losses.LOSSES)
NO_MATPLOTLIB = "matplotlib is not installed (pip install 'minidpo[plot]')"


class OptionError(ArgumentTypeError, ValueError):
    """A value that an option does not accept. The command line and Python callers read the same sentence."""


class Option(NamedTuple):
    """What the help says of a parameter, and the check that turns a text or a Python value into its value."""

    help: str
    check: Callable[[Any], Any]
    metavar: str = ""
    several: bool = False  # it takes one value or more

    def __repr__(self) -> str:
        return repr(self.help)  # so that `help(cli.dpo)` can be read

    def value(self, given: Any) -> Any:
        """Check a value from Python."""
        if not self.several:
            return self.check(given)
        many = isinstance(given, Sequence) and not isinstance(given, str)
        return [self.check(each) for each in (given if many else [given])]


class Default(NamedTuple):
    """What a parameter means in one command when its value is None."""

    text: str


def at_least(low: int, most: int = 2**31 - 1) -> Callable[[Any], int]:
    """Accept integers from `low` to `most`."""

    def integer(value: Any) -> int:
        text = str(value) if isinstance(value, int | numpy.integer) and not isinstance(value, bool) else value
        if isinstance(text, str) and text.isascii() and text.isdecimal() and len(text) < 25:
            if low <= int(text) <= most:
                return int(text)
        raise OptionError(f"{value!r} is not an integer of at least {low} and at most {most}")

    return integer


def between(low: float, high: float, closed: str = "") -> Callable[[Any], float]:
    """Accept numbers between two others; `closed` names the ends that belong to them, "[" and "]"."""

    def number(value: Any) -> float:
        try:
            x = math.nan if isinstance(value, bool) else float(value)
        except (TypeError, ValueError):
            x = math.nan
        if low < x < high or ("[" in closed and x == low) or ("]" in closed and x == high):
            return x
        left, right = "[" if "[" in closed else "(", "]" if "]" in closed else ")"
        raise OptionError(f"{value!r} is not a number in {left}{low:g}, {high:g}{right}")

    return number


def one_of(*names: str, function: bool = False) -> Callable[[Any], Any]:
    """Accept a name out of a few; from Python also a function, if that makes sense."""

    def name(value: Any) -> Any:
        value = value.replace("_", "-") if isinstance(value, str) else value
        if not (value in names or (function and callable(value))):
            raise OptionError(f"{value!r} is not one of {', '.join(names)}")
        return value

    return name


class Constants(dict[str, float]):
    """Numbers by their names; their text is the word of the command line that gives them."""

    def __str__(self) -> str:
        return ",".join(f"{name}={x!r}" for name, x in self.items())


def constants(value: Any) -> Constants:
    """Accept NAME=X, several with commas between them; from Python also a dict."""
    words = value.items() if isinstance(value, dict) else [word.partition("=")[::2] for word in str(value).split(",")]
    found = Constants()
    for name, x in words:
        if name in found or x == "":
            raise OptionError(f"{value!r} is not NAME=X, or several with commas between and each name once")
        found[name] = anything(x)
    return found


def a(what: str, *kinds: type, make: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Accept values of some types, and make one type of them."""

    def thing(value: Any) -> Any:
        if not isinstance(value, kinds):
            raise OptionError(f"{value!r} is not {what}")
        return make(value)

    return thing


path, text = a("a path", str, os.PathLike, make=Path), a("a text", str, make=str)
flag = a("True or False", bool, numpy.bool, make=bool)
positive, weight, anything = between(0, math.inf), between(0, math.inf, "["), between(-math.inf, math.inf)

# Files and folders.
Texts = Annotated[Path, Option("text file in UTF-8", path)]
Examples = Annotated[Path, Option("JSON Lines of prompt/completion or prompt/chosen/rejected", path)]
Pairs = Annotated[Path, Option("JSON Lines of prompt/chosen/rejected", path)]
HeldOutData = Annotated[Path | None, Option("file to measure on, instead of a share of the data", path)]
Init = Annotated[Path, Option("checkpoint or run folder to start from", path)]
Checkpoint = Annotated[Path, Option("checkpoint or run folder of the model", path)]
Checkpoints = Annotated[Sequence[Path], Option("checkpoints or run folders to compare", path, several=True)]
Reference = Annotated[Path, Option("checkpoint or run folder of the reference", path)]
NewRun = Annotated[Path, Option("folder for the results; must not exist yet", path)]
Example = Annotated[
    str,
    Option(
        "example: pairs.jsonl and more.jsonl, and names.txt for pretrain, are written here; "
        "convert: FILE becomes JSON Lines of texts",
        one_of("example", "convert"),
        "example|convert",
    ),
]
OtherData = Annotated[
    Path | None, Option("data to convert: JSON Lines or a JSON array in another of TRL's shapes", path, "FILE")
]
NewData = Annotated[Path | None, Option("new file for the converted rows", path)]
TheirFolder = Annotated[Path, Option("folder that save_pretrained or TRL wrote", path, "FOLDER")]
OldRun = Annotated[Path, Option("run folder (its --out)", path, "RUN")]
Folder = Annotated[Path, Option("folder for frontier.json and, with matplotlib, frontier.png", path)]
Plot = Annotated[Path | None, Option("new PNG file for the curves of beta; needs matplotlib", path)]
Html = Annotated[Path | None, Option("new HTML file for a page of the pair's tokens", path)]
Graph = Annotated[Path | None, Option("new file for the loss as a graph, .dot (Graphviz) or .mmd (Mermaid)", path)]
Log = Annotated[Path, Option("training log or run folder; leave it out with --table", path, "FILE")]

# Training.
Seed = Annotated[int, Option("random seed", at_least(0, 2**63))]
Device = Annotated[str, Option("device of the arrays: cpu, or cuda through CuPy", one_of("cpu", "cuda"), "NAME")]
HeldOutShare = Annotated[float, Option("share of the data to hold out and choose the best step on", between(0, 1))]
TestShare = Annotated[float, Option("share of the data to measure the result on, once", between(0, 1, "["))]
Steps = Annotated[int, Option("optimizer steps in all", at_least(0))]
BatchSize = Annotated[int, Option("examples per step", at_least(1))]
MicroBatchSize = Annotated[
    int | None, Option("examples per sweep; the gradient is the same up to rounding", at_least(1)), Default("automatic")
]
LearningRate = Annotated[float, Option("peak learning rate of AdamW; it falls to 0 along a cosine", positive)]
WarmupSteps = Annotated[int, Option("steps of linear warm-up", at_least(0))]
EvaluateEvery = Annotated[int, Option("evaluate and save every N steps", at_least(1))]
JudgeEvery = Annotated[
    int | None,
    Option(
        "every N steps, a multiple of --evaluate-every, log the true reward of replies to at most 200 held-out "
        "prompts of the demo's world",
        at_least(1),
    ),
    Default("never"),
]
Patience = Annotated[int | None, Option("end after N evaluations with no lower loss", at_least(1)), Default("never")]
Strict = Annotated[bool, Option("refuse a file with unusable rows, instead of setting them aside", flag)]
CUTS = "none (set the row aside), prompt (its beginning) or response (its end)"
Truncation = Annotated[
    str, Option(f"part to cut from rows that exceed the context: {CUTS}", one_of(*TRUNCATIONS), "NAME")
]
Repeats = Annotated[
    str,
    Option(
        "pairs that repeat or contradict others: set-aside, or count, which adds up votes", one_of(*REPEATS), "NAME"
    ),
]
Responses = Annotated[str, Option("responses of a pair to learn: both or chosen", one_of("both", "chosen"), "NAME")]
Blocks = Annotated[bool, Option("let empty lines separate the texts, which may have several lines", flag)]
Channels = Annotated[int | None, Option("channels of a new model", at_least(1))]
Layers = Annotated[int | None, Option("layers of a new model", at_least(1))]
Heads = Annotated[int | None, Option("attention heads of a new model; they divide its channels", at_least(1))]
Context = Annotated[int | None, Option("context of a new model in tokens", at_least(1))]
Replacement = Annotated[bool, Option("read unknown characters as U+FFFD, instead of refusing them", flag)]
Beta = Annotated[float, Option("strength of the KL constraint: reward per nat of log-ratio", positive)]
LossName = Annotated[
    str | Loss,
    Option(
        "loss to minimise, a name of `minidpo losses`; ipo sums over tokens, TRL's averages",
        one_of(*LOSSES, function=True),
        "NAME",
    ),
]
LabelSmoothing = Annotated[
    float, Option("probability that a label is wrong, 0 to 0.5, which TRL's sigmoid ignores", between(0, 0.5, "[]"))
]
LossOptions = Annotated[
    Constants, Option("constants of the loss, as gamma=1.5; several with commas", constants, "NAME=X")
]
NllWeight = Annotated[float, Option("weight of the chosen responses' nats per token, added to the loss", weight)]

# Looking into models, and proving.
StepRate = Annotated[float, Option("learning rate of the trial step", positive)]
Table = Annotated[bool, Option("print the faults that the tests produce, and what is found", flag)]
Slices = Annotated[
    str | None,
    Option("field of the rows to group by, or prompt_length, response_length, length_difference", text, "FIELD"),
]
Chain = Annotated[bool, Option("compute every hash again and name the first link that no longer holds", flag)]
OtherRun = Annotated[Path | None, Option("earlier run whose rows this run's are compared with", path, "RUN")]
Calibration = Annotated[bool, Option("also print whether sigma(z) is how often labels are right", flag)]
Diagrams = Annotated[Path | None, Option("new PNG file for reliability diagram and ROC curve; needs matplotlib", path)]
Json = Annotated[bool, Option("print one JSON object instead of tables", flag)]
Prompt = Annotated[str, Option("text of the prompt", text)]
Chosen = Annotated[str, Option("text of the preferred response", text)]
Rejected = Annotated[str, Option("text of the other response", text)]
PromptFile = Annotated[Path | None, Option("file with the text of the prompt, - for the standard input", path)]
Prompts = Annotated[Path | None, Option("JSON Lines with a prompt each; other columns are ignored", path)]
Escapes = Annotated[bool, Option("read \\n, \\t and \\\\ in these texts as newline, tab and backslash", flag)]
Newline = Annotated[bool, Option("end the prompt with a newline, after which a response begins", flag)]
Ids = Annotated[bool, Option("the data holds lists of ids in place of texts", flag)]
Samples = Annotated[int, Option("number of texts to sample", at_least(1))]
MaxNewTokens = Annotated[int | None, Option("maximum new tokens per text", at_least(1)), Default("all that fit")]
Temperature = Annotated[float, Option("divisor of the logits; 0 takes the likeliest token", anything)]
TopK = Annotated[int | None, Option("sample among the N likeliest tokens", at_least(1)), Default("all")]
TopP = Annotated[
    float | None, Option("sample among the fewest tokens that have probability X", anything), Default("all")
]
Replies = Annotated[
    int, Option("number of replies, to prompts drawn from those that are for the test; prompts repeat", at_least(2))
]
Failures = Annotated[int, Option("replies to print: the N worst, and N that fell below the reference's", at_least(0))]
Templates = Annotated[bool, Option("also ask in ways of writing that no model was trained on", flag)]
AtMost = Annotated[Constants | None, Option("highest value of a figure; several with commas", constants, "NAME=X")]
AtLeast = Annotated[Constants | None, Option("lowest value of a figure; several with commas", constants, "NAME=X")]
Proxy = Annotated[bool, Option("also press the implicit reward: best of N replies, and edits", flag)]
Seen = Annotated[bool, Option("measure on prompts of the training too", flag)]
NewVerdicts = Annotated[Path | None, Option("new folder for every reply with its judgement, and the figures", path)]
Cases = Annotated[int, Option("random cases per op and per loss", at_least(1))]
Worlds = Annotated[int, Option("number of small worlds, each with its own seed", at_least(1))]


# Checking what others made.
Kind = Annotated[str, Option("loss, logprobs or step", one_of("loss", "logprobs", "step"), "KIND")]
Subject = Annotated[str, Option("MODULE:FUNCTION, imported and run", text, "SUBJECT")]
TriedBeta = Annotated[float, Option("beta to check a loss or a step with, or the one that it holds itself", positive)]
FrameworkName = Annotated[
    str | None, Option("numpy, torch or jax", one_of(*FRAMEWORKS), "NAME"), Default("the first that it takes")
]
Layout = Annotated[str, Option(f"arguments of logprobs: {', '.join(LAYOUTS)}", text, "NAME")]
ArgumentOrder = Annotated[
    str | None,
    Option("our names in the order in which a loss takes them, with commas", text),
    Default(", ".join(NAMES)),
]


def check_output(output: Path) -> None:
    """Refuse a file that cannot be written, or that exists: nothing is overwritten."""
    folder = output.absolute().parent
    if os.path.lexists(output):
        raise ValueError(f"{output}: exists already; delete it or choose another name")
    try:
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise ValueError(f"{output}: cannot be written, its folder is missing or read-only") from error


def announce(*outputs: Path | None) -> None:
    """Check the files that a command will write, and name them, before it computes."""
    paths = [output for output in outputs if output is not None]
    for output in paths:
        check_output(output)
    if len({output.absolute() for output in paths}) < len(paths):
        raise ValueError(f"{paths[0]}: two outputs cannot be one file")
    for output in paths:
        print(f"{output} will be written at the end", file=sys.stderr, flush=True)
