"""A run's folder: what is in it, written so that the run can stop at any instant and resume.

    run.json               the command, hashes of its inputs, the libraries
    tokenizer.json         the vocabulary
    set_aside.jsonl        rows of the data that could not be used, and why (not for `pretrain`)
    prompts.json           hashes of the prompts that this run and those before it trained on or chose a checkpoint by
    reference.safetensors  the reference's log-probabilities of each pair (only for `dpo`)
    metrics.jsonl          a line per step and per evaluation, under TRL's names
    samples.jsonl          the model's replies at each evaluation, drawn with the same random numbers
    step-000100/           checkpoints: the last one and the best
    model/                 the result: the model of the best checkpoint
    latest                 the name of the checkpoint to resume from, or of the result
    result.json            at the end, the hash of each of these files, and one of the result's weights
    report.md              the report, for a person
    curves.png             its picture (only where matplotlib is installed)

A checkpoint holds all that the next step depends on. The time is not in it.
"""

import contextlib
import dataclasses
import fcntl
import glob
import hashlib
import importlib
import json
import math
import os
import platform
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy

from .. import optim
from ..backend import array_module, to_host
from ..model import Config, Params
from ..tokenizer import Tokenizer
from . import checkpoint
from .files import (
    CheckpointError,
    json_object,
    make_parents,
    open_regular,
    read_bytes,
    read_text,
    write_folder,
    write_whole,
)
from .workers import blas

RESULT = "model"
AT_FIRST = {"run.json", "tokenizer.json", "set_aside.jsonl", "prompts.json"}  # the files before the first step
SAMPLE = ("prompt", "response")  # the texts of a line of samples.jsonl


def environment() -> dict[str, Any]:
    """The code, the libraries and the machine: the last bits of a result depend on them."""
    package = importlib.import_module(__name__.partition(".")[0])
    library = numpy.show_config(mode="dicts").get("Build Dependencies", {}).get("blas", {})
    threads = blas()
    return {
        "minidpo": package.__version__,
        "minidpo_sha256": tree_sum(Path(str(package.__file__)).parent),
        "python": platform.python_version(),
        "numpy": numpy.__version__,
        "blas": f"{library.get('name')} {library.get('version')}",
        "blas_threads": threads.get() if threads else None,  # None: cannot be read
        "machine": f"{platform.system()} {platform.machine()}",
    }


def tree_sum(root: Path, kinds: Sequence[str] = (".py", ".html", ".toml")) -> str:
    """SHA-256 of the names and contents of a package's sources, in the order of their names."""
    sums = hashlib.sha256()
    for name, path in sorted((p.relative_to(root).as_posix(), p) for p in root.rglob("*") if p.suffix in kinds):
        content = path.read_bytes()
        sums.update(f"{name} {len(content)}\n".encode() + content)
    return sums.hexdigest()


def create(run: Path, description: Mapping[str, Any], files: Mapping[str, str]) -> None:
    """Make a run's folder, with everything that is known before the first step.

    One process at a time makes a run in the folder above. Hidden folders of this run that are there then are from
    processes that were killed, and are removed.
    """
    make_parents(run)
    descriptor = os.open(run.parent, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        write_new(run, description, files)
    finally:
        os.close(descriptor)


def write_new(run: Path, description: Mapping[str, Any], files: Mapping[str, str]) -> None:
    """What `create` does while it is alone."""
    if os.path.lexists(run):
        resume = f", or resume this one: minidpo resume {run}" if (run / "run.json").exists() else ""
        raise CheckpointError(f"{run} exists already: choose another folder{resume}")
    for leftover in run.parent.glob(f".{glob.escape(run.name)}.*"):
        ours = re.fullmatch(r"[0-9a-f]{32}", leftover.name[len(run.name) + 2 :]) and not leftover.is_symlink()
        if ours and leftover.is_dir() and {path.name for path in leftover.iterdir()} <= AT_FIRST:
            shutil.rmtree(leftover)
    content = {**description, "environment": environment()}
    document = json.dumps({**content, "sha256": description_sum(content)}, indent=2)
    write_folder(run, {name: text.encode() for name, text in {"run.json": document + "\n", **files}.items()})


def description_sum(content: Mapping[str, Any]) -> str:
    """SHA-256 of a run's description without its own sum."""
    document = json.dumps({name: value for name, value in content.items() if name != "sha256"}, sort_keys=True)
    return hashlib.sha256(document.encode()).hexdigest()


def run_description(run: Path) -> dict[str, Any]:
    """The description that `create` wrote, with at least "arguments" (strings) and "environment" (an object).

    Its checksum must match where there is one; version 0.1 wrote none.
    """
    path = run / "run.json"
    if not path.exists():
        raise CheckpointError(f"{run} is not a run's folder: it has no run.json")
    description = json_object(read_text(path), f"{path}:")
    arguments = description.get("arguments")
    strings = isinstance(arguments, list) and all(isinstance(argument, str) for argument in arguments)
    if not (arguments and strings and isinstance(description.get("environment"), dict)):
        raise CheckpointError(f"{path}: does not describe a run")
    if description.get("sha256", description_sum(description)) != description_sum(description):
        raise CheckpointError(f"{path}: does not match its SHA-256: it has been changed since the run began")
    return description


def folder_with(name: str, checkpoint: Path) -> Path | None:
    """The folder of a file of the run that a checkpoint is from: RUN/model belongs to RUN."""
    return next((folder for folder in (checkpoint, checkpoint.parent) if (folder / name).exists()), None)


def digest(prompt: str) -> str:
    """What stands for a prompt in prompts.json."""
    return hashlib.sha256(prompt.encode()).hexdigest()[:16]


def prompts_document(used: Mapping[str, Iterable[str]], models: Iterable[Path] = ()) -> str:
    """`prompts.json` of a run: for each use the prompts that have it, with those of the runs that models are from."""
    uses: dict[str, str] = {}
    for folder in models:
        uses |= seen_prompts(folder)
    uses |= {digest(prompt): use for use, prompts in used.items() for prompt in prompts}
    return json.dumps(uses, indent=0) + "\n"


def seen_prompts(folder: Path) -> dict[str, str]:
    """The use of each prompt in the run that a checkpoint is from and in those before it, by `digest`."""
    run = folder_with("prompts.json", folder)
    return json_object(read_text(run / "prompts.json"), f"{run / 'prompts.json'}:") if run else {}


def environment_changes(run: Path, description: Mapping[str, Any]) -> list[str]:
    """Sentences about what has changed in the environment since the run began.

    Raises CheckpointError if its data or its model has changed: if the description differs.
    """
    old = run_description(run)
    for name, value in description.items():
        if old.get(name) != value:
            option = f"--{name.removesuffix('_sha256').replace('_', '-')}"
            raise CheckpointError(f"{run}: cannot resume, the input of {option} has changed since the run began")
    now, then = environment(), old["environment"]
    before = {name: ascii(then[name]) if name in then else "not recorded" for name in now}
    return [f"{name} was {before[name]} and is {now[name]!a}" for name in now if then.get(name) != now[name]]


@dataclasses.dataclass
class State:
    """How far a run is, besides its parameters and its optimizer. The names of the fields are those on the disk."""

    step: int = 0  # steps taken
    measured_at: int = -1  # the step of the last evaluation
    best: float = math.inf  # the lowest held-out loss
    best_step: int = 0
    worse: int = 0  # evaluations since then

    def record(self, loss: float) -> None:
        """Count an evaluation, and remember it if its held-out loss is the lowest so far."""
        self.measured_at = self.step
        self.worse = 0 if loss < self.best else self.worse + 1
        if not self.worse:
            self.best, self.best_step = float(loss), self.step

    @classmethod
    def read(cls, content: Mapping[str, Any], step: int) -> "State":
        """The state of the checkpoint after a step; every field is there, of its type and in its range."""
        state = cls(**{name: content[name] for name in vars(cls())})
        counts = (state.step, state.measured_at, state.best_step, state.worse)
        if [*map(type, counts), type(state.best)] != [int, int, int, int, float] or state.worse < 0:
            raise ValueError(f"a number in {content!a}")
        if not 0 <= state.best_step <= state.measured_at <= state.step == step:
            raise ValueError(f"a step in {content!a}")
        return state


def optimizer_state(optimizer: optim.Optimizer) -> tuple[dict[str, numpy.ndarray], dict[str, int]]:
    """The arrays and the numbers that an optimizer remembers, named "parameter/name"."""
    arrays: dict[str, numpy.ndarray] = {}
    numbers: dict[str, int] = {}
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            if isinstance(value, int):
                numbers[f"{parameter}/{name}"] = value
            else:
                arrays[f"{parameter}/{name}"] = to_host(value)
    return arrays, numbers


def save(
    run: Path, params: Params, config: Config, tokenizer: Tokenizer, optimizer: optim.Optimizer, state: State
) -> None:
    """Write a checkpoint, point `latest` to it, and remove those that are neither the last nor the best.

    Raises FloatingPointError if a parameter is not finite; then nothing is written.
    """
    folder = run / step_name(state.step)
    if not all(array_module(p.data).isfinite(p.data).all().item() for p in params.values()):
        raise FloatingPointError("a parameter is not finite")
    if folder.exists():  # from a process that was killed before it could point to it
        shutil.rmtree(folder)
    arrays, numbers = optimizer_state(optimizer)
    owner = description_sum(run_description(run))
    content = {**vars(state), "optimizer": numbers, "run": owner}
    checkpoint.save(folder, params, config, tokenizer, arrays, content)
    checkpoint.point_to_latest(folder)
    prune(run, state)


def prune(run: Path, state: State) -> None:
    """Remove the checkpoints that are neither the last nor the best."""
    keep = (step_name(state.step), step_name(state.best_step))
    for folder in run.glob("step-*"):
        if re.fullmatch(r"step-\d{6,}", folder.name) and folder.name not in keep:
            shutil.rmtree(folder)


def way_on(run: Path | None) -> str:
    """The rest of a sentence about a fault: how to resume the run, if there is one."""
    if not (run and (run / "run.json").is_file()):
        return ""
    try:
        last = checkpoint.latest(run)
    except CheckpointError as error:
        return f"; {error}"
    return (f"; the last checkpoint is {last}" if last != run else "") + f"; resume with: minidpo resume {run}"


def step_name(step: int) -> str:
    """The name of the checkpoint after a step."""
    return f"step-{step:06d}"


def restore(folder: Path, params: Params, config: Config, tokenizer: Tokenizer, optimizer: optim.Optimizer) -> State:
    """Set parameters and optimizer to those of a checkpoint that `save` wrote, and return its state.

    Everything is checked against the run before anything moves: the run's options, the model, and what the optimizer
    remembers, which must have the names, shapes and types that its own update gives.
    """
    saved = checkpoint.load(folder)
    arrays, content = checkpoint.load_state(folder)
    if saved.config != config or not saved.tokenizer or saved.tokenizer.characters != tokenizer.characters:
        raise CheckpointError(f"{folder}: is not a model of this run, which has {config} and its own characters")
    try:
        owner = description_sum(run_description(folder.parent))
        if content.get("run", owner) != owner:  # version 0.1 wrote none
            raise ValueError("run.json has been changed since it was written")
        state = State.read(content, int(folder.name.removeprefix("step-")))
        memory: dict[str, dict[str, Any]] = {name: {} for name in params}
        for key, value in [*arrays.items(), *content["optimizer"].items()]:
            parameter, name = key.rsplit("/", 1)
            memory[parameter][name] = value
        for name, p in params.items():
            fresh: dict[str, Any] = {}
            if p.requires_grad and state.step:
                optimizer.update(p.data, array_module(p.data).zeros_like(p.data), fresh)
            if kinds(memory[name], state.step) != kinds(fresh, 1) or saved.params[name].dtype != p.dtype:
                raise ValueError(f"{name} or what the optimizer remembers of it")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{folder}: its training state does not belong to this run ({error})") from error
    optimizer.state.clear()
    for name, p in params.items():
        asarray = array_module(p.data).asarray
        p.data = asarray(saved.params[name].data)
        remembered = {key: x if isinstance(x, int) else asarray(x) for key, x in memory[name].items()}
        optimizer.state |= {name: remembered} if remembered else {}
    return state


def kinds(remembered: Mapping[str, Any], steps: int) -> dict[str, Any]:
    """Names, shapes and types of arrays, and for a number whether it is a count of these steps."""
    return {
        name: (x.shape, str(x.dtype)) if hasattr(x, "shape") else (type(x), x == steps)
        for name, x in remembered.items()
    }


def json_lines(path: Path, texts: Sequence[str] = ()) -> list[dict[str, Any]]:
    """The finished lines of a run's file: objects of a step, of texts with these names, and of numbers.

    There are none if there is no file.
    """
    content, _, _ = read_bytes(path).rpartition(b"\n") if os.path.lexists(path) else (b"", b"", b"")
    lines = []
    for number, line in enumerate(content.splitlines(), start=1):
        row = json_object(line, f"{path}, line {number}:")
        if type(row.get("step")) is not int:
            raise CheckpointError(f"{path}, line {number}: has no step")
        for name in (*texts, *row):
            if type(row.get(name)) not in ((str,) if name in texts else (int, float)):
                raise CheckpointError(f"{path}, line {number}: {name!a} is missing or of another type; delete the line")
        lines.append(row)
    return lines


def cut(path: Path, step: int, texts: Sequence[str] = ()) -> None:
    """Remove the lines of a JSON Lines file that came after a step, and an unfinished line."""
    if os.path.lexists(path):
        lines = [line for line in json_lines(path, texts) if line["step"] <= step]
        write_whole(path, "".join(json.dumps(line) + "\n" for line in lines).encode())


@contextlib.contextmanager
def alone(run: Path) -> Iterator[None]:
    """Keep other processes out of a run."""
    with open_regular(run / "run.json") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise CheckpointError(f"{run}: another process works on this run") from error
        yield
