"""The one loop: steps, measurements and checkpoints in a folder, which a run can leave at any instant and go on.

A run's folder:

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

All random numbers are functions of the seed and the step, and no checkpoint holds a time: a run that was killed
and resumed ends in the same bytes.
"""

import contextlib
import dataclasses
import fcntl
import json
import math
import os
import platform
import re
import shutil
import signal
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy

from . import checkpoint, optim
from .backend import array_module, to_host
from .checkpoint import CheckpointError
from .model import Config, Params
from .tokenizer import Tokenizer
from .training import Metrics, batch_indices

RESULT = "model"


class Interrupted(Exception):
    """The run was asked to stop, and has saved; the message says how to go on."""


class Settings(NamedTuple):
    """How long, how fast, how often."""

    seed: int
    steps: int
    batch_size: int
    learning_rate: float  # peak of optim.warmup_cosine
    warmup_steps: int
    evaluate_every: int
    patience: int | None  # measurements without a better one before the run stops


class Task(NamedTuple):
    """What a run trains: `step` takes a step on some of the examples, `evaluate` measures on those held out."""

    examples: int
    step: Callable[[list[int]], Metrics]
    evaluate: Callable[[], Metrics]  # the run keeps the checkpoint with the lowest "loss"
    sample: Callable[[], list[dict[str, str]]]
    rows: Callable[[list[int]], str]  # names examples as a reader finds them in the data


class Interrupt:
    """Whether Ctrl-C or SIGTERM came; a second one ends the process."""

    def __init__(self) -> None:
        self.name = ""

    @contextlib.contextmanager
    def listening(self) -> Iterator["Interrupt"]:
        if threading.current_thread() is not threading.main_thread():
            yield self  # only the main thread can listen
            return
        before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        before = {number: handler for number, handler in before.items() if handler is not signal.SIG_IGN}

        def heard(number: int, frame: Any) -> None:
            self.name = signal.Signals(number).name
            for each, handler in before.items():
                signal.signal(each, handler)

        for number in before:
            signal.signal(number, heard)
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def blas_threads() -> int | None:
    """How many threads a matrix product may use: what the environment says, else the cores at hand."""
    for name in ("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "OMP_NUM_THREADS"):
        if os.environ.get(name, "").isdecimal():
            return int(os.environ[name])
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def environment() -> dict[str, Any]:
    """What the last bits of a result depend on besides the seed."""
    blas = numpy.show_config(mode="dicts").get("Build Dependencies", {}).get("blas", {})
    return {
        "numpy": numpy.__version__,
        "blas": f"{blas.get('name')} {blas.get('version')}",
        "blas_threads": blas_threads(),
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
            checkpoint.write_synced(temporary / name, text.encode())
        checkpoint.sync_folder(temporary)
        temporary.rename(run)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    checkpoint.sync_folder(run.parent)


def described(run: Path) -> dict[str, Any]:
    """What `create` wrote down.

    Raises
    ------
    CheckpointError
        If the folder is no run's.
    """
    try:
        description = json.loads(checkpoint.read_text(run / "run.json"))
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


def remove_leftovers(folder: Path) -> None:
    """Remove what processes that were killed had half written there, by the names that `checkpoint` gives it."""
    for leftover in folder.glob(".*"):
        if re.fullmatch(r"\..+\.[0-9a-f]{32}", leftover.name):
            if leftover.is_dir() and not leftover.is_symlink():
                shutil.rmtree(leftover)
            else:
                leftover.unlink()


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
        checkpoint.write_whole(path, "".join(json.dumps(line) + "\n" for line in kept).encode())


class Progress:
    """One line that says how far a run is: rewritten on a terminal, printed at each measurement elsewhere."""

    def __init__(self, name: str, steps: int):
        self.name, self.steps, self.live = name, steps, sys.stdout.isatty()
        self.started, self.shown, self.tokens, self.taken = time.monotonic(), 0.0, 0.0, 0

    def took(self, step: int, metrics: Metrics) -> None:
        self.tokens += metrics.get("tokens", 0)
        self.taken += 1
        now = time.monotonic()
        if self.live and now - self.shown > 0.2:
            self.shown = now
            print(f"\r\x1b[K{self.text(step, metrics)}", end="", flush=True)

    def measured(self, step: int, metrics: Metrics) -> None:
        print(f"{chr(13) + chr(27) + '[K' if self.live else ''}{self.text(step, metrics)}", flush=True)

    def tokens_per_second(self) -> float:
        return self.tokens / max(time.monotonic() - self.started, 1e-9)

    def text(self, step: int, metrics: Metrics) -> str:
        parts = [f"{self.name} {step:>5}/{self.steps}"]
        for name, label, form in (
            ("eval_loss", "held-out loss", ".4f"),
            ("loss", "loss", ".4f"),
            ("rewards/accuracies", "accuracy", ".2f"),
            ("rewards/margins", "margin", "+.3f"),
        ):
            value = metrics.get(name, metrics.get(f"eval_{name}"))
            if value is not None and not (name == "loss" and "eval_loss" in metrics):
                parts.append(f"{label} {value:{form}}")
        if self.taken:
            left = (self.steps - step) * (time.monotonic() - self.started) / self.taken
            parts += [f"{self.tokens_per_second():,.0f} tokens/s", f"{int(left // 60)}:{int(left % 60):02d} left"]
        return "   ".join(parts)


def run_loop(
    run: Path,
    params: Params,
    config: Config,
    tokenizer: Tokenizer,
    optimizer: optim.Optimizer,
    task: Task,
    settings: Settings,
) -> Path:
    """Train until the steps are taken, or until `patience` measurements brought nothing better; then keep the best.

    Returns
    -------
    Path
        The folder of the result.

    Raises
    ------
    CheckpointError
        If another process is at this run; nothing is touched then.
    FloatingPointError
        If a loss, a gradient or a parameter is not finite: names the step, the batch's rows, the last checkpoint.
    Interrupted
        If Ctrl-C or SIGTERM came; the run has saved.
    """
    with alone(run):
        return train(run, params, config, tokenizer, optimizer, task, settings)


def train(
    run: Path,
    params: Params,
    config: Config,
    tokenizer: Tokenizer,
    optimizer: optim.Optimizer,
    task: Task,
    settings: Settings,
) -> Path:
    """`run_loop`, for the one process that is at the run."""
    remove_leftovers(run)
    newest = checkpoint.latest(run)
    if newest == run / RESULT:
        return newest
    if (run / RESULT).exists():  # written by a process that was killed before it could point to it
        shutil.rmtree(run / RESULT)
    state = State() if newest == run else restore(newest, params, optimizer)
    for name in ("metrics.jsonl", "samples.jsonl"):
        cut(run / name, -1 if newest == run else state.step)
    progress = Progress(run.name, settings.steps)
    indices: list[int] = []
    try:
        with Interrupt().listening() as interrupt, (run / "metrics.jsonl").open("a") as metrics_file:

            def write(metrics: Metrics) -> None:
                metrics_file.write(json.dumps({"step": state.step, **metrics}, allow_nan=False) + "\n")
                metrics_file.flush()

            while True:
                last = state.step >= settings.steps
                if (last or state.step % settings.evaluate_every == 0) and state.measured_at != state.step:
                    metrics = {f"eval_{name}": value for name, value in task.evaluate().items()}
                    if not math.isfinite(metrics["eval_loss"]):
                        raise FloatingPointError(f"the held-out loss is {metrics['eval_loss']}")
                    state.measured(metrics["eval_loss"])
                    write(metrics)
                    with (run / "samples.jsonl").open("a") as file:
                        file.writelines(json.dumps({"step": state.step, **sample}) + "\n" for sample in task.sample())
                    os.fsync(metrics_file.fileno())
                    save(run, params, config, tokenizer, optimizer, state)
                    progress.measured(state.step, metrics)
                if last or (settings.patience is not None and state.worse >= settings.patience):
                    break
                if interrupt.name:
                    if checkpoint.latest(run).name != step_name(state.step):
                        save(run, params, config, tokenizer, optimizer, state)
                    raise Interrupted(
                        f"{interrupt.name}: saved at step {state.step}; go on with: python -m minidpo resume {run}"
                    )
                optimizer.learning_rate = optim.warmup_cosine(
                    state.step, settings.steps, settings.learning_rate, settings.warmup_steps
                )
                indices = batch_indices(task.examples, settings.batch_size, state.step, settings.seed)
                metrics = task.step(indices)
                state.step += 1
                write({**metrics, "tokens_per_second": progress.tokens_per_second()})
                progress.took(state.step, metrics)
    except FloatingPointError as error:
        newest = checkpoint.latest(run)
        kept = f"the last good checkpoint is {newest}" if newest != run else "there is no checkpoint yet"
        if not indices:
            raise FloatingPointError(f"{error} at step {state.step}, as it begins; {kept}; look at that") from error
        raise FloatingPointError(
            f"{error} at step {state.step}, after a batch of {task.rows(indices)}; {kept}; lower the learning rate"
        ) from error
    prune(run, state)
    best = checkpoint.load(run / step_name(state.best_step))
    checkpoint.save(run / RESULT, best.params, best.config, best.tokenizer)
    checkpoint.point_to_latest(run / RESULT)
    return run / RESULT
