"""What a training log says: what is wrong, the evidence, the usual causes, and how to tell them apart.

A symptom is a function of the log: its docstring is the sentence; then the test, the evidence and the causes, likeliest
first. Each rests on something that must hold for DPO: policy = reference has rewards 0 and loss log 2, and

    mean log(1 + exp(-margin)) >= log(1 + exp(-mean margin))        (Jensen)

`FAULTS` names what the tests break, and what `doctor` says of it.
"""

import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from numbers import Real
from os import PathLike
from pathlib import Path
from statistics import fmean, median, stdev
from typing import Any, NamedTuple

from ..data.preferences import open_regular

LOG2 = math.log(2)
MOST_BYTES = 2**26
KNOWN = ("loss", "rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies", "rewards/ties")
KNOWN += ("logps/chosen", "logps/rejected", "grad_norm")
OTHER_NAMES = {"preference_loss": "loss", "chosen_reward": "rewards/chosen", "reject_reward": "rewards/rejected"}
OTHER_NAMES |= {"acc": "rewards/accuracies", "lr": "learning_rate", "global_step": "step"}  # OpenRLHF and others
PART = re.compile(r"^(train|eval)[/_]|_(train|eval)(?=/)|/(train|eval)$")  # eval_loss, rewards_train/chosen, loss/eval
DICT = re.compile(r"\{[^{}]*\}")
ITEM = re.compile(r"""(['"])([\w/ .-]{1,200})\1\s*:\s*(['"]?)([-+.\w]{1,40})\3\s*[,}]""", re.ASCII)


# ---- reading --------------------------------------------------------------------------------------------------------


class Row(NamedTuple):
    """One line of a log."""

    place: str  # "step 12", or "row 3" where there are no steps
    step: float | None
    evaluation: bool
    values: dict[str, float]

    def get(self, name: str) -> float | None:
        """The value of a metric, if it is there and finite."""
        value = self.values.get(name, math.nan)
        return value if math.isfinite(value) else None

    @property
    def margin(self) -> float | None:
        """The mean reward margin, chosen - rejected."""
        chosen, rejected = self.get("rewards/chosen"), self.get("rewards/rejected")
        difference = None if chosen is None or rejected is None else chosen - rejected
        return difference if self.get("rewards/margins") is None else self.get("rewards/margins")

    @property
    def rewards(self) -> list[float]:
        return [value for name in KNOWN[1:4] if (value := self.get(name)) is not None]

    def __str__(self) -> str:
        shown = [f"{name} {self.values[name]:.4g}" for name in (*KNOWN, "nll_loss") if name in self.values]
        return f"{self.place}{' (evaluation)' * self.evaluation}: {', '.join(shown)}"


def number(value: Any) -> float | None:
    """A number, or a text that is one, as newer versions of TRL print them."""
    try:
        return float(value) if isinstance(value, str | Real) and not isinstance(value, bool) else None
    except (ValueError, OverflowError):
        return None


def read(path: str | PathLike[str]) -> list[Mapping[str, Any]]:
    """The dicts in a file: trainer_state.json, a JSON array, JSON Lines, or anything that prints flat dicts.

    Nothing is evaluated. Raises ValueError for what is not a regular file of text or has over `MOST_BYTES`, OSError for
    what cannot be opened.
    """
    with open_regular(Path(path)) as file:
        content = file.read(MOST_BYTES + 1)
    if len(content) > MOST_BYTES:
        raise ValueError(f"{path}: is longer than {MOST_BYTES} bytes; cut out the lines with metrics, with grep")
    text = content.decode("utf-8-sig", errors="replace")
    document = parsed(text)
    if isinstance(document, dict) and isinstance(document.get("log_history"), list):
        document = document["log_history"]
    if document is not None:
        return [row for row in (document if isinstance(document, list) else [document]) if isinstance(row, dict)]
    rows: list[Mapping[str, Any]] = []
    for line in re.split(r"[\r\n]+", text):  # a progress bar ends its lines with \r
        whole = parsed(line) if line.startswith("{") else None
        dicts = [] if isinstance(whole, dict) else DICT.findall(line)
        rows += [whole] if isinstance(whole, dict) else []
        rows += [{name: value for _, name, _, value in ITEM.findall(one)} for one in dicts]
    return rows


def parsed(text: str) -> Any:
    """A JSON document, or None."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


class Log:
    """The rows of one run, in order."""

    def __init__(self, documents: Iterable[Mapping[str, Any]]):
        self.rows: list[Row] = []
        self.remarks: list[str] = []
        names: set[str] = set()
        for document in documents:
            parts: dict[bool, dict[str, float]] = {False: {}, True: {}}
            for key, value in document.items():
                found = PART.search(str(key))
                name = PART.sub("", str(key), count=1)
                if (x := number(value)) is not None:
                    parts["eval" in (found.groups() if found else ())][OTHER_NAMES.get(name, name)] = x
            step = parts[False].get("step", parts[True].get("step", math.nan))
            for evaluation, values in parts.items():
                if set(values) & set(KNOWN) and not ("runtime" in values and not evaluation):
                    at = int(step) if abs(step) < 1e15 else None
                    place = f"row {len(self.rows) + 1}" if at is None else f"step {at}"
                    values = {"epoch": parts[False].get("epoch", math.nan), **values}
                    self.rows.append(Row(place, at, evaluation, values))
                    names |= values.keys()
        backwards = [
            i for i, (a, b) in enumerate(zip(self.train, self.train[1:]), 1)
            if a.step is not None and b.step is not None and b.step < a.step
        ]  # fmt: skip
        if backwards:
            begin = self.train[backwards[-1]]
            self.remarks.append(f"steps go back {len(backwards)} times: only the last run, from {begin.place}, is read")
            self.rows = self.rows[next(i for i, row in enumerate(self.rows) if row is begin) :]
        self.kind = kind(names)

    @property
    def train(self) -> list[Row]:
        return [row for row in self.rows if not row.evaluation]

    @property
    def evaluations(self) -> list[Row]:
        return [row for row in self.rows if row.evaluation]

    def values(self, name: str, rows: Sequence[Row] | None = None) -> list[float]:
        """The finite values of a metric, in the training rows if none are given."""
        return [x for row in (self.train if rows is None else rows) if (x := row.get(name)) is not None]

    def starts(self) -> list[tuple[Row, int]]:
        """Rows at the beginning of the run, each with the number of steps k that it may be a mean over.

        Without steps k is at most 1000; a log that begins later has no such rows.
        """
        found = [(row, 1) for row in self.evaluations[:1] if row.step == 0]
        for row, second in zip(self.train[:1], [*self.train[1:2], None]):
            epoch, later = row.get("epoch"), second and second.get("epoch")
            if row.step is not None:
                spacing = second.step - row.step if second and second.step is not None else row.step
                found += [(row, max(1, int(row.step)))] if row.step <= max(1, spacing) else []
            elif epoch is not None and later is not None and epoch <= 1.5 * (later - epoch):
                found.append((row, 1000))
        return found

    def nll_weight(self) -> float:
        """The weight w with which w * nll makes up for what the loss has beyond DPO's least; 0 if none does."""
        weights = []
        for row in self.rows:
            nll, loss = row.get("nll_loss") or row.get("nll/chosen"), row.get("loss")
            if nll and loss is not None and row.margin is not None:
                weights.append((loss - softplus(-row.margin)) / nll)
                if not any(row.rewards) and weights[-1] >= 0:
                    return weights[-1]  # all margins are 0: it is exact
        steady = len(weights) > 2 and max(weights) - min(weights) < 0.05 * max(weights)
        return fmean(weights) if steady and min(weights) > 0.01 else 0.0


def kind(names: set[str]) -> str:
    """What the names of the metrics show: "DPO" is any preference loss with a reference."""
    if {"log_odds_ratio", "log_odds_chosen"} & names:
        return "ORPO"
    if "kl" in names and {"rewards/chosen", "rewards/rejected"} & names:
        return "KTO"
    if {"reward", "completion_length", "completions/mean_length"} & names:
        return "online RL"
    return "DPO" if any(name.startswith(("rewards/", "logps/")) for name in names) else "loss alone"


def softplus(x: float) -> float:
    """log(1 + e^x)."""
    return max(x, 0.0) + math.log1p(math.exp(-abs(x)))


def halves(values: Sequence[float]) -> tuple[Sequence[float], Sequence[float]]:
    return values[: len(values) // 2], values[len(values) // 2 :]


def span(values: Sequence[float]) -> str:
    return f"{min(values):.4g}" if min(values) == max(values) else f"{min(values):.4g} to {max(values):.4g}"


# ---- findings -------------------------------------------------------------------------------------------------------


class Finding(NamedTuple):
    """One thing that is wrong."""

    code: str
    sentence: str
    evidence: list[str]
    causes: list[str]  # likeliest first
    tell: str  # how to tell them apart

    def __str__(self) -> str:
        causes = [f"    {i}. {cause}" for i, cause in enumerate(self.causes, 1)]
        shown = [f"    {line}" for line in self.evidence]
        return "\n".join([f"{self.code}: {self.sentence}", *shown, "  usual causes:", *causes, f"  {self.tell}"])


Signs = tuple[list[str], list[str], str] | None  # evidence, causes, how to tell them apart
SYMPTOMS: dict[str, tuple[Callable[[Log], Signs], tuple[str, ...], tuple[str, ...]]] = {}
DPO, BARE, ANY = ("DPO",), ("DPO", "loss alone"), ("DPO", "loss alone", "KTO", "ORPO", "online RL")


def symptom(kinds: tuple[str, ...], unless: str = "") -> Callable[[Callable[[Log], Signs]], Callable[[Log], Signs]]:
    """Register a symptom for these kinds of log, passed over where one that explains it (`unless`) was found."""

    def register(function: Callable[[Log], Signs]) -> Callable[[Log], Signs]:
        SYMPTOMS[function.__name__] = function, kinds, tuple(unless.split())
        return function

    return register


@symptom(ANY)
def nan(log: Log) -> Signs:
    """A metric is not a number."""
    rows = [row for row in log.rows if any(not math.isfinite(row.values.get(name, 0.0)) for name in KNOWN)]
    broken = [row for row in rows if any(not math.isfinite(row.values.get(name, 0.0)) for name in KNOWN[:8])]
    if not broken and not (len(rows) > 1 and rows[-1] is log.rows[-1]):
        return None  # a gradient alone that overflows, and recovers: loss scaling at work
    first = (broken or rows)[0]
    before = [row for row in log.rows[: log.rows.index(first)] if row.evaluation == first.evaluation]
    after = [row for row in log.rows[log.rows.index(first) + 1 :] if row.evaluation == first.evaluation]
    sides = [{math.isnan(row.values.get(f"{name}/{side}", 0.0)) for name in ("rewards", "logps")} for row in broken
             for side in ("chosen", "rejected")]  # fmt: skip
    one_side = any(w != l for w, l in zip(sides[::2], sides[1::2]))
    recovers = any(row.get(name) is not None for row in after for name in KNOWN if not math.isfinite(first.values.get(name, 0.0)))
    evidence = [f"{len(before)} rows are finite, then {first}", *(f"{row}" for row in after[:1])]
    empty = "a mean over an empty set: a batch without an example of one class (KTO), or an empty response"
    half = "float16: an overflow without loss scaling, or -inf times a mask of 0"
    rate = "the learning rate is too high: the parameters overflowed"
    if recovers:
        evidence.append("later rows are finite again, so the parameters are: one batch made it")
    if first.get("loss") == 0:
        evidence.append("a loss of exactly 0 beside it is a placeholder: some trainers log 0 for NaN")
    causes = [half, empty, rate] if len(before) < 2 else [rate, half, empty]
    if recovers or one_side:
        causes = [empty, half] if one_side or log.kind == "KTO" else [half, empty]
    when = "Repeat that batch in float32: finite means float16. Count the examples of each class and response tokens in "
    return evidence, causes, when + "it: 0 means an empty mean. A tenth of the learning rate: finite means the rate."


@symptom(BARE)
def stuck(log: Log) -> Signs:
    """The policy and the reference never differ: rewards stay exactly 0, or the loss at log 2."""
    rows = [row for row in log.train if row.rewards or row.get("loss") is not None]
    covered = rows[-1].step or 0 if rows else 0
    if len(rows) < 2 or (len(rows) < 3 and covered < 10) or not all(map(still, rows)):
        return None
    norms, rates, ties = (log.values(name, rows) for name in ("grad_norm", "learning_rate", "rewards/ties"))
    evidence = [f"{len(rows)} rows, {rows[0].place} to {rows[-1].place}: loss {span(log.values('loss', rows) or [LOG2])}"]
    evidence += [f"rewards exactly 0{', all pairs tied' * (ties == [1.0] * len(rows))}"] * any(row.rewards for row in rows)
    evidence += [f"{name} {span(x)}" for name, x in (("grad_norm", norms), ("learning_rate", rates)) if x]
    same = "the reference moves along: it is the policy itself or shares its weights (load it anew), or precomputed "
    same += "reference scores are ignored, so that the policy is its own reference"
    beta = "beta is 0: no margin and no gradient"
    frozen = "the policy is frozen, or scored under no_grad: no gradient reaches it"
    others = "the optimizer holds other parameters, or steps too small for the precision of the weights (bfloat16)"
    rate, warmup = "the learning rate is 0", "the warm-up: the learning rate is still rising, and too small to move a weight"
    moves = {tuple(log.values(name, log.evaluations)) for name in ("logps/chosen", "logps/rejected")} - {()}
    scores = log.values("logps/chosen", rows)
    if any(len(set(each)) > 1 for each in moves):
        evidence.append(f"log pi of the same evaluation examples changes ({span(next(iter(moves)))}): the policy moves")
        causes = [same]
    elif any(len(each) > 1 for each in moves) or (len(scores) > 2 and len(set(scores)) == 1):
        evidence.append("log pi of the same examples does not change: the policy does not move")
        causes = [beta, frozen] if norms and not any(norms) else [others, frozen, beta]
    else:
        evidence.append("no examples occur twice, so the log cannot tell whether the policy moves")
        causes = [beta, frozen] if norms and not any(norms) else [same, others] if norms else [same, beta, frozen, others]
    if same not in causes[:1] or len(causes) > 1:
        rising = len(rates) > 2 and all(a < b for a, b in zip(rates, rates[1:]))
        causes = [rate] if rates and not any(rates) else [warmup] * rising + causes + [rate] * (not rates)
    tell = "Compare one weight before and after a step. It moved: the reference does too; load it separately and print "
    tell += "both scores. It did not: print beta, the learning rate, and for that weight requires_grad and its gradient."
    return evidence, causes, tell


def still(row: Row) -> bool:
    """Whether a row is one of policy = reference: rewards 0, or without rewards a loss of log 2 (in bfloat16 too)."""
    loss = row.get("loss")
    return not any(row.rewards) if row.rewards else loss is not None and min(abs(loss - LOG2), abs(loss - 0.6914)) < 1e-4


@symptom(DPO, unless="stuck")
def accuracy_zero(log: Log) -> Signs:
    """The accuracy is exactly 0 throughout, and no margin shows that the pairs are ranked wrongly."""
    for rows in (log.evaluations, log.train):
        known = [row for row in rows if row.get("rewards/accuracies") is not None]
        late = [row for row in known if row.step is None or row.step > 1]
        if late and not any(row.values["rewards/accuracies"] or any(row.rewards) for row in known):
            evidence = [f"{len(known)} rows, {known[0].place} to {known[-1].place}, e.g. {late[0]}"]
            causes = [
                "all rewards are equal, and a strict comparison counts a tie as wrong: these rows have the policy as its "
                "own reference (precomputed scores that evaluation ignores, a reference that was left out)",
                "chosen and rejected are swapped in these data",
            ]
            return evidence, causes, "Print both rewards of one pair: equal means the former, chosen < rejected the latter."
    return None


@symptom(DPO, unless="nan stuck")
def zero_from_start(log: Log) -> Signs:
    """The loss is 0 before the policy can have learned anything."""
    # the first row is a mean over k steps, none below 0, and step 1 is at log 2: it is at least (log 2)/k
    for row, k in log.starts():
        loss, margin, accuracy = row.get("loss"), row.margin, row.get("rewards/accuracies")
        if loss is not None and loss < min(0.02, 0.9 * LOG2 / k):
            evidence = [f"{row}", f"a mean over at most {k} steps that begins at log 2 is at least {LOG2 / k:.4g}"]
            base = "the reference is another model: the base instead of the fine-tuned one (an adapter switched off)"
            half = "float16: a log-probability overflows, or the trainer logs 0 for a NaN loss"
            causes = [base, half] if accuracy or (margin or 0) > 0 else [half, base]
            return evidence, causes, "Score one pair with both models before training: they must agree, and be finite."
    return None


@symptom(DPO, unless="nan stuck zero_from_start")
def first_loss(log: Log) -> Signs:
    """Policy and reference differ before the first step."""
    # before an update both rewards are 0 and the loss is log 2; in 16 bits up to about 0.1 and 0.05 of rounding
    for row, k in log.starts():
        loss, most = row.get("loss"), max(map(abs, row.rewards), default=math.inf)
        off = loss is not None and abs(loss - LOG2) > 0.05 and not log.nll_weight()
        first = k == 1 and (0.1 < most < math.inf or (off and most > 0.02))
        window = 1 < k <= 50 and loss is not None and (loss < 0.9 * LOG2 / k or (off and loss > 1 and most > 0.5))
        if first or window:
            evidence = [f"{row}", "rewards of 0 and a loss of log 2 = 0.6931 are what policy = reference gives"]
            causes = [
                "the reference is another model or checkpoint than the policy began with, or another adapter",
                "another precision or quantisation of the reference",
                "dropout: policy or reference is not in evaluation mode, or their texts differ (template, truncation)",
            ]
            causes += ["the learning rate: the policy ran away within this first row"] * window
            tell = "Score one pair twice with each model before training: two scores of one model differ with dropout; "
            return evidence, causes, tell + "otherwise load both from one folder in float32, and log every step."
    return None


@symptom(BARE, unless="stuck nan")
def unstable(log: Log) -> Signs:
    """The loss jumps to many times log 2 and back: the margins swing from side to side."""
    rows = [row for row in log.train if row.get("loss") is not None]
    high = [row for row in rows if row.values["loss"] > 5]
    sides = [row.margin > 0 if row.margin is not None else row.values["loss"] < 2 for row in rows
             if row in high or abs(row.margin or 2) > 1]  # fmt: skip
    swings = sum(a != b for a, b in zip(sides, sides[1:]))
    if len(high) < 2 or swings < 3:
        return None
    margins = [row.margin for row in rows if row.margin is not None]
    evidence = [f"{row}" for row in high[:2]] + [f"margins {span(margins)}, {swings} swings"] * bool(margins)
    causes = ["the learning rate is too high", "a batch of one pair, or very few", "a beta too large for the rate"]
    return evidence, causes, "A tenth of the learning rate: calm means the rate; else four times the batch."


@symptom(BARE, unless="stuck nan unstable first_loss")
def above_log2(log: Log) -> Signs:
    """The loss stays above log 2: on its own training pairs the policy does worse than the reference."""
    first, second = halves(log.values("loss"))
    margin = fmean(halves(log.values("rewards/margins"))[1] or [0.0])
    if len(first) < 5 or margin > 0 or log.nll_weight():
        return None
    low = fmean(second) - 3 * stdev(second) / math.sqrt(len(second))
    calm = log.kind != "DPO" and (max(second) < 1.5 * min(second) or fmean(second) < 0.95 * fmean(first))
    if low <= LOG2 or calm:
        return None
    evidence = [f"mean loss {fmean(first):.4g}, then {fmean(second):.4g}, {span(second)}; log 2 = 0.6931"]
    evidence += [f"mean margin of the second half {margin:.4g}"] if log.values("rewards/margins") else []
    evidence += ["the log has no rewards: this holds if the loss is DPO's alone"] * (log.kind != "DPO")
    causes = ["the learning rate is too high, or the batch too small", "the reference is not the model it began with"]
    causes += ["a sign: chosen and rejected are swapped, or the loss is maximised", "a term or a sum in the loss"]
    return evidence, causes, "Log loss and rewards of one fixed batch: with a small rate they start at log 2 and fall."


@symptom(DPO, unless="nan zero_from_start")
def loss_below(log: Log) -> Signs:
    """The loss is lower than its margins allow: it is not DPO's."""
    # Jensen; 1% and 0.001 for margins, 0.0001 for a loss that were rounded
    rows = [row for row in log.train or log.evaluations if row.margin is not None and row.get("loss") is not None]
    least = [softplus(-(row.margin or 0) - 0.01 * abs(row.margin or 0) - 0.001) - 1e-4 for row in rows]
    bad = [(row, low) for row, low in zip(rows, least) if row.values["loss"] < min(low, 0.97 * low)]
    if not bad or len(bad) < max(min(2, len(rows)), 0.2 * len(rows)):
        return None
    (row, _), factor = bad[0], max(low / max(row.values["loss"], 1e-9) for row, low in bad)
    evidence = [f"{row}; log(1 + e^-margin) = {softplus(-(row.margin or 0)):.4g} is the least of DPO"]
    evidence += [f"{len(bad)} of {len(rows)} rows; by a factor of up to {factor:.3g}"]
    divided = "it is divided once more, by the accumulation steps, or is another mean than the margins"
    causes = [divided, "another loss: hinge, robust, a weighted one (WPO)", "a sign: chosen and rejected are swapped in it"]
    if all(row.values["loss"] < LOG2 and (row.margin or 0) < 0 for row, _ in bad):
        causes = [causes[2], divided, causes[1]]
    elif any(row.values["loss"] <= 0 for row, _ in bad) or any(abs(row.margin or 0) > 1 for row, _ in bad[:1]):
        causes = [causes[1], divided, causes[2]]
    return evidence, causes, "Print margins and loss of one batch: mean of log(1 + exp(-margin)), divided by the loss."


@symptom(DPO, unless="nan")
def loss_above(log: Log) -> Signs:
    """The loss is higher than its margins allow: it is not DPO's alone."""
    # all margins 0: it is log 2. Accuracy 1: all margins are above 0, and it is below log 2
    early = [row for row, k in log.starts() if k == 1 and row.rewards and max(map(abs, row.rewards)) < 1e-3]
    tied = [row for row in log.rows if row in early or (row.rewards and not any(row.rewards))]
    rows = tied + [row for row in log.rows if row.get("rewards/accuracies") == 1 and row not in tied]
    bad = [row for row in rows if (row.get("loss") or 0) > LOG2 + 0.01]
    if not bad or log.nll_weight():
        return None
    ratio = bad[0].values["loss"] / LOG2
    evidence = [f"{bad[0]}; at most log 2 = 0.6931", f"{len(bad)} of {len(rows)} such rows; {ratio:.4g} times log 2"]
    summed, nll = "micro-batches are summed, not averaged", "a term beside DPO's: NLL of the chosen (RPO), a router's"
    other = "another loss: hinge and APO begin at 1, NCA and BCO at 2 log 2, IPO at 1/(4 beta^2)"
    causes = [nll, other, summed] if bad[0] in tied else ["label smoothing", nll, summed]
    if bad[0] in tied and ratio > 1.9 and abs(ratio - round(ratio)) < 0.01:
        causes = [summed, other, nll]
    elif bad[0] in tied and min(abs(bad[0].values["loss"] - x) for x in (1, 25, 100, 6.25)) < 0.02:
        causes = [other, nll, summed]
    return evidence, causes, "Set the accumulation to 1: it falls by that factor if summed. Then print each term alone."


@symptom(ANY)
def margins(log: Log) -> Signs:
    """The margin is not chosen - rejected."""
    names = KNOWN[1:4]
    rows = [[row.values[name] for name in names] for row in log.train if all(row.get(name) is not None for name in names)]
    bad = [x for x in rows if abs(x[0] - x[1] - x[2]) > 0.02 + 0.02 * max(map(abs, x))]
    if len(bad) < 2 or 2 * len(bad) < len(rows):
        return None
    evidence = [f"{len(bad)} of {len(rows)} rows, e.g. chosen {bad[0][0]:.4g} - rejected {bad[0][1]:.4g}, not {bad[0][2]:.4g}"]
    causes = ["the means are over different examples, devices or windows", "one of them lacks beta, or has another sign"]
    return evidence, causes, "Divide it by chosen - rejected: a constant is a factor; else the means differ."


@symptom(ANY, unless="stuck nan")
def no_gradient(log: Log) -> Signs:
    """The norm of the gradient is exactly 0."""
    rows = [row for row in log.train if row.get("grad_norm") is not None]
    zero = [row for row in rows if row.values["grad_norm"] == 0]
    if len(zero) < 2 or 2 * len(zero) < len(rows):
        return None
    evidence = [f"{len(zero)} of {len(rows)} rows, e.g. {zero[0]}"]
    causes = ["no parameter is in the graph: frozen, no_grad, a detached or recomputed score", "clipping to a norm of 0"]
    over = "the loss is saturated: sigma(-margin) is 0 in this precision"
    done = (zero[0].get("loss") or 0) < 1e-6 or (zero[0].margin or 0) > 15
    return evidence, [over, *causes] if done else [*causes, over], "Print logp.requires_grad and the largest margin."


@symptom(ANY, unless="stuck nan unstable")
def loss_jump(log: Log) -> Signs:
    """The loss jumps by a whole factor and stays there, and the margins do not follow."""
    rows = [row for row in log.train if (row.get("loss") or 0) > 0]
    losses = [row.values["loss"] for row in rows]
    for i in range(3, len(rows) - 2):
        factor = median(losses[i : i + 5]) / median(losses[max(0, i - 5) : i])
        n, apart = round(factor), min(losses[i:]) > 1.4 * max(losses[:i])
        (a, b) = ([row.margin for row in part if row.margin is not None] for part in (rows[max(0, i - 5) : i], rows[i : i + 5]))
        calm = not (a and b) or abs(median(b) - median(a)) < 0.25 * abs(median(a)) + 0.2
        if n >= 2 and abs(factor / n - 1) < 0.15 and apart and calm:
            evidence = [f"{rows[i - 1]}", f"{rows[i]}", f"a factor of {factor:.3g}, to the end of the log"]
            causes = [f"from here the loss is a sum over {n} micro-batches, not their mean: a resumed run or an upgrade "
                      "changed the accumulation"]  # fmt: skip
            causes += ["the run diverged"] * (not a)
            return evidence, causes, "The norm of the gradient jumps too if the gradient is summed; else only the log is."
    return None


@symptom(DPO, unless="nan stuck")
def chosen_falls(log: Log) -> Signs:
    """The chosen responses have become far less likely: their nats have more than doubled."""
    # on the same examples the change of a reward is beta times that of log pi: so beta is known, and the reference
    found = None
    rows = [row for row in log.evaluations if row.get("logps/chosen") is not None]
    if len(rows) > 1:
        first, last = rows[0], rows[-1]
        start, beta = first.values["logps/chosen"], slope(first, last)
        if beta and first.get("rewards/chosen") is not None:
            start -= first.values["rewards/chosen"] / beta
        found = start, last.values["logps/chosen"], f"{last}", "the same evaluation examples"
    elif len(logps := log.values("logps/chosen")) > 8:
        third = len(logps) // 3
        found = fmean(logps[:third]), fmean(logps[-third:]), f"{log.train[-1]}", "means of the first and last third"
    if not found or found[1] > min(2 * found[0], found[0] - 3):
        return None
    evidence = [found[2], f"log pi(chosen) from {found[0]:.4g} to {found[1]:.4g} nats, {found[3]}"]
    causes = [
        "the objective raises the margin only: both responses may fall, and some fall is ordinary (the mean log-ratio over "
        "the reference's own responses is -KL)",
        "displacement: chosen and rejected are so alike that lowering one lowers the other",
        "too many steps, too high a rate, or too small a beta",
    ]
    tell = "Sample: if the replies are worse than the reference's, add an NLL term on the chosen, or stop earlier. "
    return evidence, causes, tell + "`minidpo displacement` shows which pairs lower their own chosen response."


def slope(first: Row, last: Row) -> float | None:
    """Beta: the change of the chosen reward over that of log pi(chosen), on the same examples."""
    r, logp = ([row.get(name) for row in (first, last)] for name in ("rewards/chosen", "logps/chosen"))
    if None in r or None in logp or abs(logp[1] - logp[0]) < 0.1:  # type: ignore[operator]
        return None
    beta: float = (r[1] - r[0]) / (logp[1] - logp[0])  # type: ignore[operator]
    return beta if 0 < beta < 10 else None


@symptom(ANY, unless="nan")
def overfit(log: Log) -> Signs:
    """The loss falls in training and rises in evaluation."""
    rows = [row for row in log.evaluations if row.get("loss") is not None]
    losses = log.values("loss", rows)
    if len(rows) < 3:
        return None
    best = losses.index(min(losses))
    rise, gain = losses[-1] - losses[best], losses[0] - losses[best]
    cut = log.rows.index(rows[best])
    before, after = (log.values("loss", [r for r in part if not r.evaluation]) for part in (log.rows[:cut], log.rows[cut:]))
    falls = fmean(after) < fmean(before) if before and after else len(after) > 5 and fmean(after[-3:]) < fmean(after[:3])
    if rise < max(0.03, 0.5 * gain) or losses[-2] <= losses[best] or not falls:
        return None
    evidence = [f"{rows[best]}", f"{rows[-1]}", f"training: {span(before + after)}, {fmean(after):.4g} on average since"]
    causes = ["too many epochs over too few pairs", "too high a rate, or too small a beta"]
    causes = ["the evaluation pairs are of another kind (template, labels, source)"] * (best == 0) + causes
    return evidence, causes, "Keep the checkpoint of the lowest evaluation loss; hold out part of the training file instead."


@symptom(DPO, unless="nan zero_from_start first_loss")
def saturated(log: Log) -> Signs:
    """The loss is 0 and every pair is won by a wide margin: there is nothing left to learn."""
    rows = [row for row in log.train or log.rows if row.get("loss") is not None]
    end = rows[-max(3, len(rows) // 4) :]
    margin = [row.margin for row in end if row.margin is not None]
    won = all(row.get("rewards/accuracies", ) in (None, 1) for row in end)
    if not end or not won or max(log.values("loss", end)) > 0.01 or (margin and min(margin) < 10):
        return None
    if not margin and (max(log.values("loss", end)) > 1e-4 or not log.values("rewards/accuracies", end)):
        return None
    evidence = [f"{end[-1]}", f"the last {len(end)} rows: loss {span(log.values('loss', end))}"]
    causes = [
        "deterministic labels: no finite margin is the best, so the policy leaves the reference without end",
        "too many epochs, too high a rate, too small a beta",
        "a shortcut that separates the pairs, such as length, a template or the end of text",
    ]
    if len(end) == len(rows):
        causes.insert(0, "if it is so from the first step: the reference is another model than the policy began with")
    tell = "Sample: gibberish means too far. Compare the evaluation's margins, and a rule as simple as 'the longer wins'."
    return evidence, causes, tell


# ---- the diagnosis --------------------------------------------------------------------------------------------------


@dataclass
class Diagnosis:
    """What is wrong, and what is worth knowing though it is not."""

    findings: list[Finding]
    remarks: list[str]
    kind: str
    rows: int

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "findings": [finding._asdict() for finding in self.findings]}

    def __str__(self) -> str:
        parts = [f"{self.rows} rows, {self.kind}", *map(str, self.findings), *(f"remark: {line}" for line in self.remarks)]
        return "\n\n".join(parts + ["nothing unusual"] * (not self.findings))


def doctor(log: str | PathLike[str] | Iterable[Mapping[str, Any]]) -> Diagnosis:
    """What the metrics of a training run show: a file of any known kind (see `read`), or its rows as dicts.

    It says no more than the numbers do. Raises ValueError if there is no row with a metric, or as `read` does.
    """
    source = log if isinstance(log, str | PathLike) else "the rows"
    read_log = Log(read(log) if isinstance(log, str | PathLike) else log)
    if not read_log.rows:
        raise ValueError(f"{source}: has no row with a metric ({', '.join(KNOWN)})")
    findings: list[Finding] = []
    for code, (function, kinds, unless) in SYMPTOMS.items():
        if read_log.kind in kinds and not {finding.code for finding in findings} & set(unless):
            if signs := function(read_log):
                findings.append(Finding(code, (function.__doc__ or "").strip(), *signs))
    return Diagnosis(findings, remarks(read_log, findings), read_log.kind, len(read_log.rows))


def remarks(log: Log, findings: list[Finding]) -> list[str]:
    """What is worth knowing and not wrong."""
    lines, last = list(log.remarks), (log.evaluations or log.train)[-1]
    if log.kind in ("KTO", "ORPO", "online RL"):
        lines.append(f"this is a log of {log.kind}: what holds for DPO's loss does not hold for it, and is not looked for")
    if log.kind == "loss alone":
        lines.append("there are no rewards: whether this is the loss of DPO, the log does not say")
    if log.nll_weight() > 0.01:
        lines.append(f"the loss is DPO's and {log.nll_weight():.3g} times the NLL of the chosen, as the rows show")
    quiet = [row for row in log.train if still(row)]
    if len(quiet) == len(log.train) and quiet and not any(finding.code == "stuck" for finding in findings):
        lines.append("log 2 and rewards of 0 are where every run begins; if later rows have them too, the policy does not "
                     "move (learning rate, beta 0, frozen) or the reference moves along (the same object, precomputed "
                     "scores that are ignored)")  # fmt: skip
    if any(row.get("rewards/accuracies") == 0 and k == 1 and not any(row.rewards) for row, k in log.starts()):
        lines.append("an accuracy of 0 at the start is of ties: equal rewards do not count as won")
    if log.kind == "DPO" and (last.get("rewards/chosen") or 0) < 0 and (last.get("rewards/rejected") or 0) < 0:
        lines.append(f"both rewards are negative ({last}): ordinary to a degree, since the objective raises the margin only "
                     "and the mean log-ratio over the reference's own responses is -KL")  # fmt: skip
    if not findings:
        lines.append("metrics do not show what the model writes: read samples")
    return lines
