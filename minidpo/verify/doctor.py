"""What a training log says: what is wrong, the evidence, the usual causes, and how to tell them apart.

A symptom is a function of the log that returns its evidence and its causes, likeliest first, or None. Each follows
from what must hold for DPO: policy = reference has rewards of 0 and a loss of log 2, and by Jensen's inequality

    mean log(1 + exp(-margin)) >= log(1 + exp(-mean margin))

The words are in doctor.toml, and so are the faults that the tests produce, with what is found.
"""

import json
import math
import re
import tomllib
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import accumulate, pairwise
from numbers import Real
from os import PathLike
from pathlib import Path
from statistics import fmean, median, stdev
from typing import Any, NamedTuple

from ..data.preferences import open_regular

LOG2, MOST_BYTES = math.log(2), 2**26
ZERO = 5e-6  # a reward this small may be the rounding of log pi in float32
REWARDS = ("rewards/chosen", "rewards/rejected", "rewards/margins")
KNOWN = ("loss", *REWARDS, "rewards/accuracies", "rewards/ties", "logps/chosen", "logps/rejected", "grad_norm")
OTHER_NAMES = {"preference_loss": "loss", "chosen_reward": "rewards/chosen", "reject_reward": "rewards/rejected"}
OTHER_NAMES |= {"acc": "rewards/accuracies", "lr": "learning_rate", "global_step": "step"}  # OpenRLHF, W&B
PART = re.compile(r"^(train|eval)[/_]|_(train|eval)(?=/)|/(train|eval)$")  # eval_loss, rewards_train/chosen, loss/eval
ITEM = re.compile(r"""(['"])([\w/ .-]{1,200})\1\s*:\s*(['"]?)([-+.\w]{1,40})\3\s*[,}]""", re.ASCII)
WORDS: dict[str, Any] = tomllib.loads(Path(__file__).with_suffix(".toml").read_text("utf-8"))


# ---- reading a log ------------------------------------------------------------------------------------------------


class Row(NamedTuple):
    """One row of metrics, under TRL's names."""

    order: int
    step: int | None
    evaluation: bool
    values: dict[str, float]

    @property
    def place(self) -> str:
        return f"row {self.order + 1}" if self.step is None else f"step {self.step}"

    def get(self, name: str) -> float | None:
        """The value of a metric, if it is there and finite."""
        value = self.values.get(name)
        return value if value is not None and math.isfinite(value) else None

    @property
    def rewards(self) -> list[float]:
        return [x for name in REWARDS if (x := self.get(name)) is not None]

    @property
    def tied(self) -> bool:
        """Whether there are rewards, and all are 0 but for rounding."""
        return bool(self.rewards) and max(map(abs, self.rewards)) < ZERO

    @property
    def margin(self) -> float | None:
        """The mean reward margin, chosen - rejected."""
        w, l, margin = map(self.get, REWARDS)
        return margin if margin is not None or w is None or l is None else w - l

    def __str__(self) -> str:
        shown = ", ".join(f"{name} {self.values[name]:.4g}" for name in (*KNOWN, "nll_loss") if name in self.values)
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
    if isinstance(document, list):
        return [row for row in document if isinstance(row, dict)]
    rows: list[Mapping[str, Any]] = []
    for line in re.split(r"[\r\n]+", text):  # a progress bar ends its lines with \r
        whole = parsed(line) if line.startswith("{") else None
        found = [] if isinstance(whole, dict) else re.findall(r"\{[^{}]*\}", line)
        rows += [whole] if isinstance(whole, dict) else []
        rows += [{name: value for _, name, _, value in ITEM.findall(each)} for each in found]
    return rows


def number(value: Any) -> float | None:
    """A number, or a text that is one, as newer versions of TRL print them."""
    try:
        return float(value) if isinstance(value, str | Real) and not isinstance(value, bool) else None
    except (ValueError, OverflowError):
        return None


class Log:
    """The rows of one run, in order, and what kind of run it is."""

    def __init__(self, documents: Iterable[Mapping[str, Any]]):
        rows: list[Row] = []
        for document in documents:
            parts: dict[bool, dict[str, float]] = {False: {}, True: {}}
            for key, value in document.items():
                found, x = PART.search(str(key)), number(value)
                name = PART.sub("", str(key), count=1)
                if x is not None:
                    parts[bool(found and "eval" in found.groups())][OTHER_NAMES.get(name, name)] = x
            step = parts[False].get("step", parts[True].get("step", math.inf))
            for evaluation, values in parts.items():
                if not values.keys().isdisjoint(KNOWN) and not ("runtime" in values and not evaluation):
                    rows.append(Row(len(rows), int(step) if abs(step) < 1e15 else None, evaluation, values))
        steps = [row for row in rows if not row.evaluation and row.step is not None]
        self.restarts = [b for a, b in pairwise(steps) if (b.step or 0) < (a.step or 0)]
        self.rows = rows[self.restarts[-1].order if self.restarts else 0 :]
        self.train = [row for row in self.rows if not row.evaluation]
        self.evaluations = [row for row in self.rows if row.evaluation]
        self.kind = self._kind({name for row in self.rows for name in row.values})

    def _kind(self, names: set[str]) -> str:
        """DPO is any loss with a reference; without one, rewards are beta times log pi."""
        if not names.isdisjoint({"log_odds_ratio", "log_odds_chosen"}):
            return "ORPO"
        if "kl" in names and not names.isdisjoint(REWARDS):
            return "KTO"
        if not names.isdisjoint({"reward", "completion_length", "completions/mean_length"}):
            return "online RL"
        if not any(name.startswith(("rewards/", "logps/")) for name in names):
            return "loss alone"
        pairs = [(row.get(f"rewards/{y}"), row.get(f"logps/{y}")) for row in self.rows for y in ("chosen", "rejected")]
        ratios = [r / logp for r, logp in pairs if r is not None and logp]
        free = len(ratios) > 1 and min(ratios) > 0 and max(ratios) < 1.002 * min(ratios)
        return "no reference" if free else "DPO"

    def values(self, name: str, rows: Sequence[Row] | None = None) -> list[float]:
        """The finite values of a metric, in the training rows if no others are given."""
        return [x for row in (self.train if rows is None else rows) if (x := row.get(name)) is not None]

    def starts(self) -> list[tuple[Row, int]]:
        """Rows at the beginning of the run, each with the number of steps that it is at most a mean over.

        Where steps are missing, that is taken as 1000. A log that begins later has no such rows.
        """
        starts = [(row, 1) for row in self.evaluations[:1] if row.step == 0]
        if self.train:
            row, then = self.train[0], self.train[1] if len(self.train) > 1 else None
            epoch, later = row.get("epoch"), then.get("epoch") if then else None
            if row.step is not None and row.step <= max(1, then.step - row.step if then and then.step else row.step):
                starts.append((row, max(1, row.step)))
            elif row.step is None and epoch is not None and later is not None and epoch <= 1.5 * (later - epoch):
                starts.append((row, 1000))
        return starts

    def nll_weights(self) -> list[float]:
        """What a row's loss has beyond DPO's least, over its NLL: the weight of an NLL term, or more; [] if none is."""
        weights, tied = [], []
        for row in self.rows:
            nll, loss, margin = row.get("nll_loss") or row.get("nll/chosen"), row.get("loss"), row.margin
            if nll and loss is not None and margin is not None:
                weights.append((loss - softplus(-margin)) / nll)
                tied += [weights[-1]] if row.tied else []
                weights = weights if "nll_loss" in row.values or tied else []  # ours logs nll/chosen without a term too
        return weights if weights and min(tied or weights) > 0.01 else []


def softplus(x: float) -> float:
    """log(1 + e^x)."""
    return max(x, 0.0) + math.log1p(math.exp(-abs(x)))


def span(values: Sequence[float]) -> str:
    """The least and the greatest of some values."""
    return " to ".join(dict.fromkeys(f"{x:.4g}" for x in (min(values), max(values))))


# ---- the symptoms -------------------------------------------------------------------------------------------------

Signs = tuple[list[str], list[str]] | None  # evidence and causes
SYMPTOMS: dict[str, tuple[Callable[[Log], Signs], set[str], set[str]]] = {}


def symptom(kinds: str, unless: str = "") -> Callable[[Callable[[Log], Signs]], Callable[[Log], Signs]]:
    """Register a symptom for these kinds of log; it is passed over if one that explains it (`unless`) was found."""

    def register(function: Callable[[Log], Signs]) -> Callable[[Log], Signs]:
        SYMPTOMS[function.__name__] = function, set(kinds.split(", ")), set(unless.split())
        return function

    return register


DPO, BARE, ANY = "DPO", "DPO, loss alone", "DPO, loss alone, no reference, KTO, ORPO, online RL"


@symptom(ANY)
def nan(log: Log) -> Signs:
    # NaN stays in a parameter for ever: if later rows are finite, so are the parameters
    def bad(row: Row, names: Sequence[str] = KNOWN) -> list[str]:
        return [name for name in names if name in row.values and row.get(name) is None]

    rows = [row for row in log.rows if bad(row)]
    broken = [row for row in rows if bad(row, KNOWN[:-1])]
    if not broken and not (len(rows) > 1 and rows[-1] is log.train[-1]):
        return None  # no more than a gradient that overflows once: loss scaling at work
    first = (broken or rows)[0]
    alike = [row for row in log.rows if row.evaluation == first.evaluation]
    before = sum(row.order < first.order for row in alike)
    healed = [row for row in alike if row.order > first.order and any(row.get(name) is not None for name in bad(first))]
    one_sided = any(len({(name in bad(row)) for name in REWARDS[:2] if name in row.values}) == 2 for row in broken)
    evidence = [f"{before} finite rows, then {first}"]
    evidence += [f"{healed[0]}: finite again, so the parameters are, and a batch is at fault"] if healed else []
    if one_sided or (healed and log.kind == "KTO"):
        return evidence, ["empty", "float16"]
    if healed or before < 2:
        return evidence, ["float16", "empty", *([] if healed else ["rate"])]
    return [*evidence, f"the row before: {alike[before - 1]}"], ["rate", "float16", "empty"]


def still(row: Row) -> bool:
    """Whether a row is that of policy = reference: rewards of 0 or, if it has none, log 2 (also in bfloat16)."""
    loss = row.get("loss")
    at_log2 = loss is not None and any(abs(loss - x) < 1e-4 for x in (LOG2, 0.6914))
    return row.tied and loss != 0 if row.rewards else at_log2


@symptom(BARE)
def stuck(log: Log) -> Signs:
    # policy = reference at every step; logps tell whether they move together only if the same examples come twice
    rows = [row for row in log.train if row.rewards or row.get("loss") is not None]
    norms, rates, ties = (log.values(name, rows) for name in ("grad_norm", "learning_rate", "rewards/ties"))
    rising = len(rates) > 1 and all(a < b for a, b in pairwise(rates))
    enough = len(rows) > (9 if rising else 2) or (len(rows) > 1 and (rows[-1].step or 0) > 9 and not rising)
    if not enough or not all(map(still, rows)):
        return None
    evidence = [f"{len(rows)} rows, {rows[0].place} to {rows[-1].place}"]
    evidence += [
        f"{name} {span(x)}" for name in ("loss", *REWARDS, "grad_norm", "learning_rate") if (x := log.values(name))
    ]
    evidence += ["every pair is a tie"] if ties and min(ties) == 1 else []
    repeats = [log.values(f"logps/{y}", log.evaluations) for y in ("chosen", "rejected")]
    moves, scores = any(len(set(x)) > 1 for x in repeats), log.values("logps/chosen")
    no_gradient = bool(norms) and not any(norms)
    if moves:
        return [*evidence, f"log pi of the evaluation examples moves: {', '.join(map(span, repeats))}"], ["same"]
    if any(len(x) > 1 for x in repeats) or (len(scores) > 2 and len(set(scores)) == 1):
        evidence.append("log pi of the same examples does not move, so the policy does not")
        causes = ["beta0", "frozen"] if no_gradient else ["others", "frozen", "beta0"]
    else:
        evidence.append("no examples come twice, so the log does not tell whether the policy moves")
        causes = (
            ["beta0", "frozen"]
            if no_gradient
            else ["same", "others"]
            if norms
            else ["same", "beta0", "frozen", "others"]
        )
    if rates:
        return evidence, ["warmup"] * rising + causes if any(rates) else ["rate0"]
    return evidence, [*causes, "rate0"]


@symptom(DPO, unless="stuck")
def accuracy_zero(log: Log) -> Signs:
    # beyond the first step; and with a reward other than 0 the pairs may truly be ranked wrongly
    for part in (log.evaluations, log.train):
        rows = [row for row in part if row.get("rewards/accuracies") is not None]
        late = [row for row in rows if row.step is None or row.step > 1]
        if late and not any(row.values["rewards/accuracies"] or (row.rewards and not row.tied) for row in rows):
            return [f"{len(rows)} rows, such as {late[0]}"], ["ties", "swapped"]
    return None


@symptom(DPO, unless="nan stuck")
def zero_from_start(log: Log) -> Signs:
    # the first row is a mean over k steps, none below 0 and the first at log 2: it is at least (log 2)/k
    for row, k in log.starts():
        loss = row.get("loss")
        if loss is not None and loss < min(0.02, 0.9 * LOG2 / k):
            won = row.get("rewards/accuracies") or (row.margin or 0) > 0
            evidence = [f"{row}", f"a mean over at most {k} steps that begins at log 2 is at least {LOG2 / k:.4g}"]
            return evidence, ["base", "float16"] if won else ["float16", "base"]
    return None


@symptom(DPO, unless="nan stuck zero_from_start")
def first_loss(log: Log) -> Signs:
    # before an update rewards are 0 and the loss is log 2; rounding in 16 bits moves them by up to about 0.1 and 0.05
    for row, k in log.starts():
        loss, most = row.get("loss"), max(map(abs, row.rewards), default=1.0)
        off = loss is not None and abs(loss - LOG2) > 0.05 and most > 0.02 and not log.nll_weights()
        if k == 1 and (off or (row.rewards and most > 0.1)):
            return [f"{row}", "policy = reference has log 2 = 0.6931 and rewards of 0"], [
                "base",
                "precision",
                "dropout",
            ]
        if k <= 50 and off and loss is not None and (loss < 0.9 * LOG2 / k or (loss > 1 and most > 0.5)):
            evidence = [f"{row}", f"a mean over {k} steps that begins at log 2 = 0.6931"]
            return evidence, ["base", "rate", "precision", "dropout"]
    return None


@symptom(BARE, unless="stuck nan")
def unstable(log: Log) -> Signs:
    # a mean loss above 5 needs margins near -5, on the side of the rejected: then, and back
    rows = [row for row in log.train if row.get("loss") is not None]
    high = [row for row in rows if row.values["loss"] > 5 and (row.margin is None or row.margin < -1)]
    known = [(row.values["loss"], row.margin) for row in rows]
    sides = [loss < 2 if m is None else m > 0 for loss, m in known if (loss < 2 or loss > 5 if m is None else abs(m) > 1)]
    swings = sum(a != b for a, b in pairwise(sides))
    if len(high) < 2 or swings < 3:
        return None
    return [*map(str, high[:2]), f"{len(high)} such rows among {len(rows)}, {swings} swings"], ["rate", "batch"]


@symptom(BARE, unless="stuck nan unstable first_loss")
def above_log2(log: Log) -> Signs:
    # a policy that never moves has log 2
    losses, margins = log.values("loss"), [row.margin for row in log.train if row.margin is not None]
    first, second = losses[: len(losses) // 2], losses[len(losses) // 2 :]
    if len(first) < 5 or fmean(margins[len(margins) // 2 :] or [0.0]) > 0 or log.nll_weights():
        return None
    calm = max(second) < 1.5 * min(second) or fmean(second) < 0.95 * fmean(first)  # as a loss of another kind may be
    if fmean(second) - 3 * stdev(second) / math.sqrt(len(second)) < LOG2 or (calm and not margins):
        return None
    evidence = [f"mean loss {fmean(first):.4g}, then {fmean(second):.4g} ({span(second)}); log 2 = 0.6931"]
    evidence += [f"margins {span(margins)}"] if margins else ["without rewards: if this is the loss of DPO"]
    half = len(margins) // 2
    falls = len(margins) > 9 and max(margins[half:]) < 0 and fmean(margins[half:]) < fmean(margins[:half])
    return evidence, ["sign"] * falls + ["rate", "batch", "base"] + ["sign"] * (not falls) + ["term", "summed"]


@symptom(DPO, unless="nan zero_from_start")
def loss_below(log: Log) -> Signs:
    # Jensen, for the rounded margin. Loss and margin may be of other devices, so it is their mean that must hold
    rows = [
        (row, row.values["loss"], row.margin) for row in log.train or log.evaluations if row.get("loss") is not None
    ]
    known = [(row, loss, softplus(-m - 0.01 * abs(m) - 1e-3) - 1e-4) for row, loss, m in rows if m is not None]
    for part in (known[:10], known):
        over = [loss - least for _, loss, least in part]
        wide = 4 * stdev(over) / math.sqrt(len(part)) if len(part) > 4 else 0.0
        bad = [(row, least / loss if loss > 0 else math.inf) for row, loss, least in part if loss < least]
        if bad and fmean(over) + wide < 0 and (len(part) > 4 or all(each[1] > 1.4 for each in bad)):
            row, factor = bad[0]
            evidence = [f"{row}; DPO's is at least log(1 + e^-margin) = {softplus(-(row.margin or 0)):.4g}"]
            evidence += [f"{len(bad)} of {len(part)} rows are too low, this one {factor:.3g} times"]
            if all((each.margin or 0) < 0 and factor < 10 for each, factor in bad[len(bad) // 2 :]) and len(bad) > 4:
                return evidence, ["sign", "divided", "loss"]
            begins = [loss < least for each, loss, least in known if abs(each.margin or 0) < 0.1]  # as a division does
            return evidence, ["divided", "loss", "sign"] if any(begins) else ["loss", "divided", "sign"]
    return None


@symptom(DPO, unless="nan")
def loss_above(log: Log) -> Signs:
    # where all margins are 0 the loss is log 2; where all are won, it is less
    early = [row.order for row, k in log.starts() if k == 1 and row.rewards and max(map(abs, row.rewards)) < 1e-3]
    tied = [row for row in log.rows if row.tied or row.order in early]
    won = [row for row in log.rows if row.get("rewards/accuracies") == 1]
    for rows, least in ((tied, 1), (won, 3)):
        bad = [row for row in rows if (row.get("loss") or 0) > LOG2 + 0.01]
        if len(bad) >= min(least, len(log.rows)) and len(bad) > 0.8 * len(rows) and not log.nll_weights():
            ratio = bad[0].values["loss"] / LOG2
            evidence = [f"{bad[0]}; DPO's is at most log 2 = 0.6931", f"{len(bad)} of {len(rows)} such rows"]
            evidence += [f"{ratio:.4g} times log 2"]
            if rows is won:
                return evidence, ["smoothing", "term", "summed"]
            whole, others = (
                abs(ratio - round(ratio)) < 0.01,
                any(abs(ratio * LOG2 / x - 1) < 0.01 for x in (1, 25, 100)),
            )
            return evidence, (["summed", "loss", "term"] if whole else ["loss", "term"] if others else ["term", "loss"])
    return None


@symptom(ANY)
def margins(log: Log) -> Signs:
    # margins = chosen - rejected, in the mean too
    rows = [[row.values[name] for name in REWARDS] for row in log.train if len(row.rewards) == 3]
    bad = [x for x in rows if abs(x[0] - x[1] - x[2]) > 0.02 + 0.02 * max(map(abs, x))]
    if len(bad) < 2 or 2 * len(bad) < len(rows):
        return None
    w, l, margin = bad[0]
    return [f"{len(bad)} of {len(rows)} rows, such as {w:.4g} - {l:.4g}, not {margin:.4g}"], ["means", "factor"]


@symptom(ANY, unless="stuck nan")
def no_gradient(log: Log) -> Signs:
    # the gradient of log sigma(z) is sigma(-z), which is 0 only by underflow
    rows = [row for row in log.train if row.get("grad_norm") is not None]
    zero = [row for row in rows if row.values["grad_norm"] == 0]
    if len(zero) < 2 or 2 * len(zero) < len(rows):
        return None
    saturated = (zero[0].margin or 0) > 15 or zero[0].get("loss") == 0
    causes = ["underflow", "frozen", "clipped"] if saturated else ["frozen", "clipped", "underflow"]
    return [f"{len(zero)} of {len(rows)} rows, such as {zero[0]}"], causes


@symptom(ANY, unless="stuck nan unstable")
def loss_jump(log: Log) -> Signs:
    # a sum over n micro-batches is n times their mean, and the margins know nothing of it
    rows = [row for row in log.train if (row.get("loss") or 0) > 0]
    losses = [row.values["loss"] for row in rows]
    most, least = list(accumulate(losses, max)), list(accumulate(losses[::-1], min))[::-1]
    for i in range(3, len(rows) - 2):
        if least[i] > 1.4 * most[i - 1]:  # all later ones are higher than all earlier ones
            before, after = rows[max(0, i - 5) : i], rows[i : i + 5]
            factor = median(log.values("loss", after)) / median(log.values("loss", before))
            a, b = ([row.margin for row in part if row.margin is not None] for part in (before, after))
            calm = not (a and b) or abs(median(b) - median(a)) < 0.2 + 0.25 * abs(median(a))
            if calm and abs(factor / round(factor) - 1) < 0.15:
                evidence = [f"{rows[i - 1]}", f"{rows[i]}", f"from there on it is {factor:.3g} times as high"]
                return evidence, ["summed"] if a else ["summed", "diverged"]
    return None


@symptom(DPO, unless="nan stuck unstable")
def chosen_falls(log: Log) -> Signs:
    # on the same examples a reward changes by beta times the change of log pi, which gives beta and the reference
    rows = [row for row in log.evaluations if row.get("logps/chosen") is not None] or log.train
    logps, rewards = log.values("logps/chosen", rows), log.values("rewards/chosen", rows)
    if len(logps) < (2 if rows is not log.train else 9):
        return None
    if rows is log.train:
        start, end, of = (
            fmean(logps[: len(logps) // 3]),
            fmean(logps[-len(logps) // 3 :]),
            "first and last third of the rows",
        )
    else:
        start, end, of = logps[0], logps[-1], "the same evaluation examples"
        beta = (
            (rewards[-1] - rewards[0]) / (end - start) if len(rewards) == len(logps) and abs(end - start) > 0.1 else 0.0
        )
        start -= rewards[0] / beta if 0 < beta < 10 else 0.0
    if end > min(2 * start, start - 3):
        return None
    return [f"{rows[-1]}", f"log pi(chosen) from {start:.4g} to {end:.4g} nats: {of}"], [
        "ordinary",
        "displaced",
        "long",
    ]


@symptom(ANY, unless="nan")
def overfit(log: Log) -> Signs:
    # the evaluation has the same examples each time: it rises by half of what it had gained, and by more than 0.03
    rows = [row for row in log.evaluations if row.get("loss") is not None]
    losses = log.values("loss", rows)
    if len(rows) < 3:
        return None
    best = losses.index(min(losses))
    before, after = ([row.values["loss"] for row in log.train if row.get("loss") is not None and later(row)] for later in
                     (lambda row: row.order < rows[best].order, lambda row: row.order > rows[best].order))  # fmt: skip
    before, after = (before, after) if before else (after[: len(after) // 2], after[len(after) // 2 :])
    falls = bool(before and after) and fmean(after) < fmean(before)
    rise = losses[-1] - losses[best]
    if not falls or rise < max(0.03, 0.5 * (losses[0] - losses[best])) or losses[-2] <= losses[best]:
        return None
    evidence = [f"{rows[best]}", f"{rows[-1]}", f"training: mean loss {fmean(before):.4g}, then {fmean(after):.4g}"]
    return evidence, ["kind", "long"] if best == 0 else ["long", "kind"]


@symptom(DPO, unless="nan zero_from_start first_loss")
def saturated(log: Log) -> Signs:
    # log(1 + e^-10) is 0.00005
    rows = [row for row in log.train or log.evaluations if row.get("loss") is not None]
    end = rows[-max(3, len(rows) // 4) :]
    losses, wins = log.values("loss", end), log.values("rewards/accuracies", end)
    least = [row.margin for row in end if row.margin is not None] or [10.0 if wins and max(losses) < 1e-4 else 0.0]
    if not losses or max(losses) > 0.01 or min(wins, default=1.0) < 1 or min(least) < 10:
        return None
    causes = ["deterministic", "long", "shortcut"]
    return [f"{end[-1]}", f"{len(end)} such rows at the end"], ["base", *causes] if len(end) == len(rows) else causes


def remarks(log: Log, codes: set[str]) -> list[str]:
    """What is worth knowing and not wrong."""
    last = (log.evaluations or log.train)[-1]
    w, l = last.get("rewards/chosen") or 0, last.get("rewards/rejected") or 0
    ratios = log.nll_weights()
    said = {
        f"steps go back {len(log.restarts)} times; only the last run is read": log.restarts,
        f"a log of {log.kind}: what must hold for DPO need not hold here, and is not looked for": "DPO" not in log.kind and "alone" not in log.kind,
        "rewards are a constant times log pi: CPO, SimPO, or DPO whose reference scores are missing": log.kind == "no reference",
        "no rewards in this log: whether the loss is DPO's, it does not say": log.kind == "loss alone",
        f"the loss has an NLL term: beyond log(1 + e^-margin) it is {span(ratios or [0])} times the NLL": ratios,
        "log 2 and rewards of 0 are where every run begins; if later rows have them too, then the reference moves along "
        "(the same object, ignored precomputed scores), beta is 0, or the policy is frozen": log.train and all(map(still, log.train)) and "stuck" not in codes,
        "an accuracy of 0 at the start: equal rewards do not count as won": any(row.get("rewards/accuracies") == 0 and k == 1 for row, k in log.starts()),
        f"both rewards are negative, {w:.4g} and {l:.4g} at {last.place}: {WORDS['causes']['ordinary']}": log.kind == "DPO" and max(w, l) < 0,
        "metrics do not show what the model writes: read samples": not codes,
    }  # fmt: skip
    return [sentence for sentence, holds in said.items() if holds]


# ---- the diagnosis ------------------------------------------------------------------------------------------------


class Finding(NamedTuple):
    """One thing that is wrong."""

    code: str
    sentence: str
    evidence: list[str]
    causes: list[str]  # likeliest first
    tell: str  # how to tell them apart

    def __str__(self) -> str:
        causes = [f"  {i}. {cause}" for i, cause in enumerate(self.causes, 1)]
        return "\n".join(
            [
                f"{self.code}: {self.sentence}",
                *(f"  {x}" for x in self.evidence),
                "  Usual causes:",
                *causes,
                f"  {self.tell}",
            ]
        )


class Diagnosis(NamedTuple):
    """What is wrong, and what is worth knowing though it is not."""

    kind: str
    rows: int
    findings: list[Finding]
    remarks: list[str]

    def as_dict(self) -> dict[str, Any]:
        return {**self._asdict(), "findings": [finding._asdict() for finding in self.findings]}

    def __str__(self) -> str:
        parts = [
            f"{self.rows} rows, {self.kind}",
            *map(str, self.findings),
            *(f"Remark: {line}." for line in self.remarks),
        ]
        return "\n\n".join(parts + ["Nothing unusual."] * (not self.findings))


def doctor(log: str | PathLike[str] | Iterable[Mapping[str, Any]]) -> Diagnosis:
    """What the metrics of a training run show: a file (see `read`), or its rows as dicts.

    It says no more than the numbers do. Raises ValueError if no row has a metric, or as `read` does.
    """
    of_file = isinstance(log, str | PathLike)
    run = Log(read(log) if of_file else log)  # type: ignore[arg-type]
    if not run.rows:
        raise ValueError(f"{log if of_file else 'the log'} has no row with a metric, such as {', '.join(KNOWN[:4])}")
    findings: dict[str, Finding] = {}
    for code, (function, kinds, unless) in SYMPTOMS.items():
        signs = function(run) if run.kind in kinds and unless.isdisjoint(findings) else None
        if signs:
            words, (evidence, causes) = WORDS[code], signs
            causes = [WORDS["causes"][cause] for cause in causes]
            findings[code] = Finding(code, words["sentence"], evidence, causes, words["tell"])
    return Diagnosis(run.kind, len(run.rows), list(findings.values()), remarks(run, set(findings)))


def table() -> str:
    """The faults that the tests produce: how, the symptom that is found, and the place of the cause in its list."""
    rows = [("fault", "made by", "found", "cause"), *((name, *entry) for name, entry in WORDS["faults"].items())]
    widths = [max(len(str(row[i])) for row in rows) for i in range(3)]
    return "\n".join("  ".join([*(str(x).ljust(n) for x, n in zip(row, widths)), str(row[3])]) for row in rows)
