"""A run's folder: what stands in it, written so that the run can be left at any instant and go on.

    run.json            what was asked, hashes of what it was made from, the libraries
    tokenizer.json      the vocabulary
    set_aside.jsonl     rows of the data that could not be used, and why
    reference.safetensors  what the reference says of each pair, under DPO
    metrics.jsonl       a line per step and per measurement, under TRL's names
    samples.jsonl       what the model answered at each measurement, with the same random draws
    step-000100/        checkpoints: the last one and the best
    model/              the result: the best checkpoint's model
    latest              the name of the checkpoint that counts, or of the result
    report.md, *.png    what a person reads

A checkpoint holds all that the next step depends on, and no time.
"""

import contextlib
import dataclasses
import fcntl
import json
import math
import platform
import re
import shutil
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy

from .. import optim
from ..backend import array_module, to_host
from ..model import Config, Params
from ..tokenizer import Tokenizer
from . import checkpoint
from .checkpoint import CheckpointError
from .files import read_text, sync_folder, write_synced, write_whole
from .workers import blas

RESULT = "model"


def environment() -> dict[str, Any]:
    """What the last bits of a result depend on besides the seed."""
    library = numpy.show_config(mode="dicts").get("Build Dependencies", {}).get("blas", {})
    threads = blas()
    return {
        "numpy": numpy.__version__,
        "blas": f"{library.get('name')} {library.get('version')}",
        "blas_threads": threads.get() if threads else None,  # None: cannot be read
        "machine": f"{platform.system()} {platform.machine()}",
    }


def create(run: Path, description: Mapping[str, Any], files: Mapping[str, str]) -> None:
    """Make a run's folder with what is known before the first step, whole or not at all.

    Raises
    ------
    CheckpointError
        If the folder exists.
    """
    if run.exists():
        begun = (run / "run.json").exists()
        go_on = f", or go on with it: python -m minidpo resume {run}" if begun else ""
        raise CheckpointError(f"{run} exists already: choose another folder{go_on}")
    run.parent.mkdir(parents=True, exist_ok=True)
    temporary = run.with_name(f".{run.name}.{uuid.uuid4().hex}")
    temporary.mkdir()
    try:
        document = json.dumps({**description, "environment": environment()}, indent=2)
        for name, text in {"run.json": document + "\n", **files}.items():
            write_synced(temporary / name, text.encode())
        sync_folder(temporary)
        temporary.rename(run)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    sync_folder(run.parent)


def described(run: Path) -> dict[str, Any]:
    """What `create` wrote down.

    Raises
    ------
    CheckpointError
        If the folder is no run's.
    """
    try:
        description = json.loads(read_text(run / "run.json"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{run}: is no run's folder ({error})") from error
    given = description.get("arguments") if isinstance(description, dict) else None
    strings = isinstance(given, list) and all(isinstance(argument, str) for argument in given)
    if not (given and strings and isinstance(description.get("environment"), dict)):
        raise CheckpointError(f"{run / 'run.json'}: describes no run")
    return description


def same_as_begun(run: Path, description: Mapping[str, Any]) -> list[str]:
    """Refuse to go on with other data or another model than the run began with; what else has changed, to be said.

    Raises
    ------
    CheckpointError
        If a hash differs.
    """
    begun = described(run)
    for name, value in description.items():
        if begun.get(name) != value:
            what = f"--{name.removesuffix('_sha256').replace('_', '-')}"
            raise CheckpointError(f"{run}: cannot go on, what {what} names has changed since the run began")
    now, then = environment(), begun["environment"]
    return [f"{name} was {then.get(name)!a} and is {now[name]!a}" for name in now if then.get(name) != now[name]]


@dataclasses.dataclass
class State:
    """How far a run is, besides its parameters and its optimizer."""

    step: int = 0  # steps taken
    measured_at: int = -1  # the step of the last measurement
    best: float = math.inf  # the lowest held-out loss
    best_step: int = 0
    worse: int = 0  # measurements since then

    def measured(self, loss: float) -> None:
        """Take in a held-out loss."""
        self.measured_at = self.step
        self.worse = 0 if loss < self.best else self.worse + 1
        if not self.worse:
            self.best, self.best_step = loss, self.step


def optimizer_state(optimizer: optim.Optimizer) -> tuple[dict[str, numpy.ndarray], dict[str, int]]:
    """What an optimizer remembers, as arrays and as numbers, named "parameter/name"."""
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
    """Write a checkpoint, make it the one that counts, and drop those that are neither it nor the best.

    Raises
    ------
    FloatingPointError
        If a parameter is not finite; nothing is written then.
    """
    folder = run / step_name(state.step)
    if folder.exists():  # written by a process that was killed before it could point to it
        shutil.rmtree(folder)
    if not all(array_module(p.data).isfinite(p.data).all().item() for p in params.values()):
        raise FloatingPointError("a parameter is not finite")
    arrays, numbers = optimizer_state(optimizer)
    checkpoint.save(folder, params, config, tokenizer, arrays, {**vars(state), "optimizer": numbers})
    checkpoint.point_to_latest(folder)
    prune(run, state)


def prune(run: Path, state: State) -> None:
    """Remove the checkpoints that are neither the last nor the best."""
    for folder in run.glob("step-*"):
        kept = folder.name in (step_name(state.step), step_name(state.best_step))
        if re.fullmatch(r"step-\d{6,}", folder.name) and not kept:
            shutil.rmtree(folder)


def step_name(step: int) -> str:
    """The name of the checkpoint of a step."""
    return f"step-{step:06d}"


def restore(folder: Path, params: Params, optimizer: optim.Optimizer) -> State:
    """Set parameters and optimizer to those of a checkpoint that `save` wrote.

    Raises
    ------
    CheckpointError
        If the checkpoint is not of such a run.
    """
    loaded = checkpoint.load(folder)
    arrays, content = checkpoint.load_state(folder)
    try:
        state = State(**{name: type(getattr(State, name))(content.pop(name)) for name in vars(State())})
        for key, value in [*arrays.items(), *content.pop("optimizer").items()]:
            parameter, name = key.rsplit("/", 1)
            xp = array_module(params[parameter].data)
            optimizer.state.setdefault(parameter, {})[name] = value if isinstance(value, int) else xp.asarray(value)
        for name, p in params.items():
            p.data = array_module(p.data).asarray(loaded.params[name].data)
        return state
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{folder}: its training state is not that of this run ({error!r})") from error


def json_lines(path: Path, content: bytes | None = None) -> list[dict[str, Any]]:
    """The lines of a run's file, each an object with the step that it belongs to; none if there is no file.

    Raises
    ------
    CheckpointError
        If a line is something else, with its number.
    """
    if content is None:
        content = path.read_bytes() if path.exists() else b""
    found = []
    for number, line in enumerate(content.splitlines(), start=1):
        try:
            found.append(json.loads(line))
            found[-1]["step"] + 0
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise CheckpointError(f"{path}, line {number}: is no object with a step") from error
    return found


@contextlib.contextmanager
def alone(run: Path) -> Iterator[None]:
    """Keep a second process out of a run for as long as this one is at it.

    Raises
    ------
    CheckpointError
        If another is at it already.
    """
    with (run / "run.json").open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise CheckpointError(f"{run}: another process is at this run") from error
        yield


def cut(path: Path, step: int) -> None:
    """Drop the lines of a JSON Lines file that came after a step, and a line that was not finished."""
    if path.exists():
        whole, _, _ = path.read_bytes().rpartition(b"\n")
        kept = [line for line in json_lines(path, whole) if line["step"] <= step]
        write_whole(path, "".join(json.dumps(line) + "\n" for line in kept).encode())
