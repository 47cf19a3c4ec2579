"""Training logs: rows of metrics under TRL's names, from any of the formats in which they are kept or printed.

A number that is missing is NaN, with which no comparison holds.
"""

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from numbers import Real
from os import PathLike
from pathlib import Path
from typing import Any

from ..data.preferences import open_regular

LOG2, MOST_BYTES = math.log(2), 2**25
ZERO = 5e-6  # a reward as small as this may be the rounding of log pi in float32
REWARDS = ("rewards/chosen", "rewards/rejected", "rewards/margins")
GRADIENTS = ("grad_norm", "parameter_gradient")
KNOWN = ("loss", *REWARDS, "rewards/accuracies", "rewards/ties", "logps/chosen", "logps/rejected", *GRADIENTS)
OTHER_NAMES = {"preference_loss": "loss", "chosen_reward": "rewards/chosen", "reject_reward": "rewards/rejected"}
OTHER_NAMES |= {"acc": "rewards/accuracies", "lr": "learning_rate", "global_step": "step"}  # OpenRLHF, W&B
PART = re.compile(r"^(train|eval)[/_]|_(train|eval)(?=/)|/(train|eval)$")  # eval_loss, rewards_train/chosen, loss/eval
ITEM = re.compile(r"""(['"])([\w/ .-]{1,200})\1\s*:\s*(['"]?)([-+.\w]{1,40})\3\s*[,}]""", re.ASCII)
KINDS = {"ORPO": {"log_odds_ratio", "log_odds_chosen"}, "KTO": {"kl"}, "online RL": {"reward", "completion_length"}}


class Row:
    """One row of metrics, under TRL's names."""

    __slots__ = ("evaluation", "finite", "margin", "order", "parts", "rewards", "step", "values")

    def __init__(self, order: int, step: int | None, evaluation: bool, values: dict[str, float], parts: Sequence[int]):
        self.order, self.step, self.evaluation, self.values = order, step, evaluation, values
        self.parts = parts  # pairs in each micro-batch, if the log says so
        every = all(map(math.isfinite, values.values()))
        self.finite = values if every else {name: x for name, x in values.items() if math.isfinite(x)}
        w, l, margin = (self.finite.get(name, math.nan) for name in REWARDS)
        self.rewards = tuple(x for x in (w, l, margin) if x == x)
        self.margin = w - l if math.isnan(margin) else margin

    def get(self, name: str) -> float:
        return self.finite.get(name, math.nan)

    @property
    def tied(self) -> bool:
        return bool(self.rewards) and max(map(abs, self.rewards)) < ZERO

    @property
    def place(self) -> str:
        return f"row {self.order + 1}" if self.step is None else f"step {self.step}"

    def __str__(self) -> str:
        shown = ", ".join(f"{name} {self.values[name]:z.4g}" for name in (*KNOWN, "nll_loss") if name in self.values)
        return f"{self.place}{' (evaluation)' * self.evaluation}: {shown}"


def parsed(text: str) -> Any:
    """A JSON document, or None."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def read(path: str | PathLike[str]) -> list[Mapping[str, Any]]:
    """The dicts in a file: trainer_state.json, an array, JSON Lines, or text in which flat dicts are printed.

    Nothing is evaluated. Raises ValueError for what is not a regular file of text or exceeds `MOST_BYTES`.
    """
    with open_regular(Path(path)) as file:
        content = file.read(MOST_BYTES + 1)
    if len(content) > MOST_BYTES:
        raise ValueError(f"{path} is longer than {MOST_BYTES} bytes: cut out the lines that hold metrics")
    text = content.decode("utf-8-sig", errors="replace")
    document = parsed(text)
    if isinstance(document, dict):
        document = document.get("log_history", [document])
    rows: list[Any] = document if isinstance(document, list) else []
    for line in [] if rows else text.split("\n"):
        whole = parsed(line)
        found = [] if isinstance(whole, dict) else re.findall(r"\{[^{}]*\}", line)
        rows += [whole, *({name: value for _, name, _, value in ITEM.findall(each)} for each in found)]
    return [row for row in rows if isinstance(row, dict)]


def number(value: Any) -> float | None:
    """A number, or a text that is one, as newer versions of TRL print them."""
    try:
        x = float(value) if isinstance(value, str | Real) and not isinstance(value, bool) else None
        return x if x is None or not 1e30 < abs(x) else math.inf
    except (ValueError, OverflowError):
        return None


class Log:
    """The rows of one run, in order, and what kind of run it is."""

    def __init__(self, documents: Iterable[Mapping[str, Any]]):
        rows: list[Row] = []
        columns: dict[Any, tuple[bool, str]] = {}  # of each key: whether it is of an evaluation, and TRL's name
        for document in documents:
            training: dict[str, float] = {}
            held_out: dict[str, float] = {}
            parts: Sequence[int] = ()
            for key, value in document.items():
                if key not in columns:
                    found, name = PART.search(str(key)), PART.sub("", str(key), count=1)
                    columns[key] = bool(found and "eval" in found.groups()), OTHER_NAMES.get(name, name)
                evaluation, name = columns[key]
                x = value if type(value) is float and abs(value) < 1e30 else number(value)
                if x is not None:
                    (held_out if evaluation else training)[name] = x
                elif isinstance(value, list) and "micro_batch" in name and all(type(n) is int and n > 0 for n in value):
                    parts = value
            step = training.get("step", held_out.get("step", math.inf))
            if held_out:
                held_out["epoch"] = training.get("epoch", math.nan)  # as it is not named eval_epoch
            for evaluation, values in ((False, training), (True, held_out)):
                if not values.keys().isdisjoint(KNOWN) and (evaluation or "runtime" not in values):
                    rows.append(Row(len(rows), int(step) if abs(step) < 1e15 else None, evaluation, values, parts))
        steps = [row for row in rows if not row.evaluation and row.step is not None]
        self.restarts = [b for a, b in pairwise(steps) if (b.step or 0) < (a.step or 0)]
        self.rows = rows[self.restarts[-1].order if self.restarts else 0 :]
        self.train = [row for row in self.rows if not row.evaluation]
        self.losses = [row for row in self.train if row.get("loss") == row.get("loss")]
        self.evaluations = [row for row in self.rows if row.evaluation]
        self.kind = self._kind(set().union(*(row.values for row in self.rows)))

    def _kind(self, names: set[str]) -> str:
        """DPO is any loss with a reference; without one, rewards are beta times log pi."""
        for kind, signs in KINDS.items():
            if names & signs and names & set(KNOWN[1:4] if kind == "KTO" else names):
                return kind
        if not any(name.startswith(("rewards/", "logps/")) for name in names):
            return "loss alone"
        pairs = [(row.get(f"rewards/{y}"), row.get(f"logps/{y}")) for row in self.rows for y in ("chosen", "rejected")]
        ratios = [r / logp for r, logp in pairs if r == r and abs(logp) > 0]
        return "no reference" if len(ratios) > 1 and 0 < max(ratios) < 1.002 * min(ratios) else "DPO"

    def values(self, name: str, rows: Sequence[Row] | None = None) -> list[float]:
        """The finite values of a metric, in the training rows if no others are given."""
        return [x for row in (self.train if rows is None else rows) if (x := row.get(name)) == x]

    def starts(self) -> list[tuple[Row, int]]:
        """Rows at the beginning of the run, each with the number of steps that it is at most a mean over.

        Without steps that is taken as 1000. A log that begins later has no such rows.
        """
        starts = [(row, 1) for row in self.evaluations[:1] if row.step == 0]
        for row, then in zip(self.train, self.train[1:2] or self.train[:1]):
            if row.step is not None and row.step <= max(1, (then.step or 0) - row.step or row.step):
                starts.append((row, max(1, row.step)))
            elif row.step is None and row.get("epoch") <= 1.5 * (then.get("epoch") - row.get("epoch")):
                starts.append((row, 1000))
        return starts

    def nll_weights(self) -> list[float]:
        """What the loss of each row has beyond DPO's least, over its NLL; [] if there is no NLL term.

        Without such a term TRL logs no `nll_loss`, but we log `nll/chosen`: then all margins of a row must be 0.
        """
        rows = [row for row in self.rows if row.get("nll_loss") > 0 or (row.get("nll/chosen") > 0 and row.tied)]
        nlls = [max(row.values.get("nll_loss", 0), row.values.get("nll/chosen", 0)) for row in rows]
        weights = [(row.get("loss") - softplus(-row.margin)) / nll for row, nll in zip(rows, nlls)]
        return weights if weights and min(weights) > 0.01 else []


def softplus(x: float) -> float:
    """log(1 + e^x)."""
    return max(x, 0.0) + math.log1p(math.exp(-abs(x)))
