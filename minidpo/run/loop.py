"""The one loop: steps, evaluations and checkpoints, until the steps are taken or nothing improves.

All random numbers are functions of the seed and the step. A run may therefore stop at any instant, by Ctrl-C or by
kill -9: resumed, it repeats at most the steps since its last checkpoint and ends in the same bytes.
"""

import json
import math
import os
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from .. import optim
from ..model import Config, Params
from ..tokenizer import Tokenizer
from ..training import Metrics, batch_indices
from . import checkpoint
from .files import CheckpointError, naming, remove_leftovers
from .folder import RESULT, SAMPLE, State, alone, cut, json_lines, prune, restore, save, step_name
from .tasks import printed, tell


class Settings(NamedTuple):
    """How long, how fast, how often."""

    seed: int
    steps: int
    batch_size: int
    learning_rate: float  # peak of optim.warmup_cosine
    warmup_steps: int
    evaluate_every: int  # steps
    patience: int | None  # evaluations without a lower loss before the run stops


class Task(NamedTuple):
    """The training itself: how to take a step on some of the examples, and how to evaluate."""

    examples: int
    step: Callable[[list[int]], Metrics]
    evaluate: Callable[[int], Metrics]  # after a step; the run keeps the checkpoint with the lowest "loss"
    sample: Callable[[], list[dict[str, str]]]
    rows: Callable[[list[int]], str]  # names examples as a reader finds them in the data
    report: Callable[[], object] = lambda: None  # writes it; called while no other process can enter the run


class Progress:
    """One line that says how far a run is: rewritten on a terminal, elsewhere printed at each evaluation.

    There, silence in between is broken on stderr.
    """

    def __init__(self, name: str, steps: int):
        self.name, self.steps, self.live = name, steps, sys.stdout.isatty()
        self.start, self.last_print, self.tokens, self.count = time.monotonic(), 0.0, 0.0, 0
        printed()

    def after_step(self, step: int, metrics: Metrics) -> None:
        self.tokens += metrics.get("tokens", 0)
        self.count += 1
        now = time.monotonic()
        if not self.live:
            tell(self.text(step, metrics))
        elif now - self.last_print > 0.2:
            self.last_print = now
            print(f"\r\x1b[K{self.text(step, metrics)}", end="", flush=True)
            printed()

    def after_evaluation(self, step: int, metrics: Metrics) -> None:
        print("\r\x1b[K" * self.live + self.text(step, metrics), flush=True)
        printed()

    def tokens_per_second(self) -> float:
        return self.tokens / max(time.monotonic() - self.start, 1e-9)

    def text(self, step: int, metrics: Metrics) -> str:
        parts = [f"{self.name} {step:>5}/{self.steps}"]
        for name, label, form in (
            ("eval_loss", "held-out loss", ".4f"),
            ("loss", "loss", ".4f"),
            ("rewards/accuracies", "accuracy", ".2f"),
            ("rewards/margins", "reward margin", "+z.3f"),
        ):
            value = metrics.get(name, metrics.get(f"eval_{name}"))
            if value is not None and not (name == "loss" and "eval_loss" in metrics):
                tied = label == "accuracy" and 1 in (metrics.get("rewards/ties"), metrics.get("eval_rewards/ties"))
                parts.append("all pairs tie" if tied else f"{label} {value:{form}}")
        if self.count:
            left = (self.steps - step) * (time.monotonic() - self.start) / self.count
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
    """Train until the steps are taken or `patience` is used up; return the folder of the best model.

    Raises FloatingPointError if a loss, a gradient or a parameter is not finite; the message names the step, the
    batch's rows and the last good checkpoint.
    """
    log, samples = run / "metrics.jsonl", run / "samples.jsonl"
    with alone(run):
        remove_leftovers(run)
        if checkpoint.latest(run) == run / RESULT:
            print(f"{run} is finished: there is nothing left to train")
            task.report()
            return run / RESULT
        if checkpoint.latest(run) == run and (advice := checkpoint.newest(run)):
            raise CheckpointError(f"{run / 'latest'}: is missing{advice}")
        if (run / RESULT).exists():  # from a process that was killed before it could point to it
            shutil.rmtree(run / RESULT)
        last = checkpoint.latest(run)
        json_lines(log)  # a damaged line is refused before anything moves
        json_lines(samples, SAMPLE)
        state = State() if last == run else restore(last, params, config, tokenizer, optimizer)
        print(f"{run} resumes at step {state.step} of {settings.steps}\n" * (last != run or log.exists()), end="")
        cut(log, -1 if last == run else state.step)
        cut(samples, -1 if last == run else state.step, SAMPLE)
        progress = Progress(run.name, settings.steps)
        indices: list[int] = []
        try:
            while True:
                end = state.step >= settings.steps
                if (end or state.step % settings.evaluate_every == 0) and state.measured_at != state.step:
                    metrics = {f"eval_{name}": value for name, value in task.evaluate(state.step).items()}
                    if not math.isfinite(metrics["eval_loss"]):
                        raise FloatingPointError(f"the held-out loss is {metrics['eval_loss']}")
                    state.record(metrics["eval_loss"])
                    append(log, state.step, [metrics], synced=True)
                    append(samples, state.step, task.sample(), synced=True)
                    save(run, params, config, tokenizer, optimizer, state)
                    progress.after_evaluation(state.step, metrics)
                if end or (settings.patience is not None and state.worse >= settings.patience):
                    break
                optimizer.learning_rate = optim.warmup_cosine(
                    state.step, settings.steps, settings.learning_rate, settings.warmup_steps
                )
                indices = batch_indices(task.examples, settings.batch_size, state.step, settings.seed)
                metrics = task.step(indices)
                state.step += 1
                append(log, state.step, [{**metrics, "tokens_per_second": progress.tokens_per_second()}])
                progress.after_step(state.step, metrics)
        except FloatingPointError as error:
            good = checkpoint.latest(run)
            last_good = "there is no checkpoint yet" if good == run else f"the last good checkpoint is {good}"
            batch = f", after a batch of {task.rows(indices)}" if indices else ""
            advice = "lower the learning rate" if indices else "look at the model that the run started from"
            raise FloatingPointError(f"{error} at step {state.step}{batch}; {last_good}; {advice}") from error
        prune(run, state)
        best = checkpoint.load(run / step_name(state.best_step))
        checkpoint.save(run / RESULT, best.params, best.config, best.tokenizer)
        checkpoint.point_to_latest(run / RESULT)
        task.report()
        return run / RESULT


def append(path: Path, step: int, rows: Sequence[Mapping[str, Any]], synced: bool = False) -> None:
    """Add rows with their step to a JSON Lines file; if `synced`, wait until they are on the disk."""
    with naming(path), path.open("a") as file:
        file.writelines(json.dumps({"step": step, **row}, allow_nan=False) + "\n" for row in rows)
        if synced:
            file.flush()
            os.fsync(file.fileno())
