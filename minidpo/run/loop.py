"""The one loop: steps, measurements and checkpoints, until the steps are taken or nothing gets better.

All random numbers are functions of the seed and the step: a run that was killed and resumed ends in the same bytes.
"""

import contextlib
import json
import math
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from .. import optim
from ..model import Config, Params
from ..tokenizer import Tokenizer
from ..training import Metrics, batch_indices
from . import checkpoint
from .files import remove_leftovers
from .folder import RESULT, State, alone, cut, prune, restore, save, step_name


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
            ("rewards/margins", "reward margin", "+.3f"),
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
    fresh = newest == run  # it names no checkpoint yet
    state = State() if fresh else restore(newest, params, optimizer)
    for name in ("metrics.jsonl", "samples.jsonl"):
        cut(run / name, -1 if fresh else state.step)
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
