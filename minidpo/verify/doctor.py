"""What a training log says: what is wrong, the evidence, the usual causes, and how to tell them apart.

A symptom is a function of the log that returns its evidence and its causes, likeliest first, or None. Most follow from
what must hold for DPO, the rest are thresholds: policy = reference has rewards of 0 and a loss of log 2, and by
Jensen's inequality

    mean log(1 + exp(-margin)) >= log(1 + exp(-mean margin))

The words are in doctor.toml, and so are the faults that the tests produce.
"""

import math
import re
import tomllib
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import accumulate, pairwise
from os import PathLike
from pathlib import Path
from statistics import fmean, median, stdev
from typing import Any, NamedTuple

from .logs import GRADIENTS, KINDS, KNOWN, LOG2, REWARDS, Log, Row, read, softplus

WORDS: dict[str, Any] = tomllib.loads(Path(__file__).with_suffix(".toml").read_text("utf-8"))
Signs = tuple[list[str], str] | None  # evidence, and the names of the causes
SYMPTOMS: dict[str, tuple[Callable[[Log], Signs], set[str], set[str]]] = {}
DPO, BARE, ANY = {"DPO"}, {"DPO", "loss alone"}, {"DPO", "loss alone", "no reference", *KINDS}


def symptom(kinds: set[str], unless: str = "") -> Callable[[Callable[[Log], Signs]], Callable[[Log], Signs]]:
    """Register a symptom for these kinds of log; it is passed over if one that explains it (`unless`) was found."""

    def register(function: Callable[[Log], Signs]) -> Callable[[Log], Signs]:
        SYMPTOMS[function.__name__] = function, kinds, set(unless.split())
        return function

    return register


def span(values: Sequence[float]) -> str:
    """The least and the greatest of some values."""
    return " to ".join(dict.fromkeys(f"{x:z.4g}" for x in (min(values), max(values))))


@symptom(ANY)
def nan(log: Log) -> Signs:
    # NaN stays in a parameter for ever: if later rows are finite, so are the parameters
    bad = {row.order: (row.values.keys() - row.finite.keys()).intersection(KNOWN) for row in log.rows}
    rows = [row for row in log.rows if bad[row.order]]
    broken = [row for row in rows if bad[row.order] != {"grad_norm"}]
    if not broken and not (len(rows) > 1 and rows[-1:] == log.train[-1:]):
        return None  # a gradient that overflows now and then is loss scaling at work
    first = (broken or rows)[0]
    before = [row for row in log.rows if row.evaluation == first.evaluation and row.order < first.order]
    later = [row for row in log.rows if row.order > first.order]
    healed = [row for row in later if any(row.get(name) == row.get(name) for name in bad[first.order])]
    one_sided = any((REWARDS[0] in x) != (REWARDS[1] in x) for x in bad.values())
    evidence = [f"{len(before)} finite rows, then {first}"]
    evidence += [f"{row}: finite again, so the parameters are, and a batch is at fault" for row in healed[:1]]
    if one_sided or (healed and log.kind == "KTO"):
        return evidence, "empty float16"
    return evidence, "float16 empty" if healed else "float16 empty rate" if len(before) < 2 else "rate float16 empty"


def still(row: Row) -> bool:
    """Whether a row is that of policy = reference: rewards of 0 or, if it has none, log 2 (also in bfloat16)."""
    at_log2 = min(abs(row.get("loss") - LOG2), abs(row.get("loss") - 0.6914)) < 1e-4
    return row.tied and row.get("loss") != 0 if row.rewards else at_log2


@symptom(BARE)
def packing(log: Log) -> Signs:
    # equal parts agree on the loss and on a gradient that is not 0, as one batch does, and unequal parts do not
    rows = [row for row in log.train if row.parts and any(row.get(name) ** 2 > 0 for name in GRADIENTS)]
    rows = [row for row in rows if sum(row.parts) == sum(rows[0].parts)]
    even, uneven = ([row for row in rows if (len(set(row.parts)) > 1) == differ] for differ in (False, True))
    others = [row for row in even if len(row.parts) != len(even[0].parts)]
    bad = [row for row in uneven if even and not alike(even[0], row)]
    if not (others and bad and all(alike(even[0], row) for row in even)):
        return None
    evidence = [f"{'+'.join(map(str, row.parts[:20]))} pairs, {row}" for row in (even[0], others[0], *bad[:2])]
    return [*evidence, "that all are the same pairs, the log does not say"], "alone other_pairs"


def alike(a: Row, b: Row) -> bool:
    """Whether two rows have the same loss and gradient up to rounding."""
    return all(math.isclose(a.get(x), b.get(x), rel_tol=1e-3) for x in ("loss", *GRADIENTS) if x in a.finite)


@symptom(BARE, unless="packing")
def stuck(log: Log) -> Signs:
    # policy = reference at every step: do they move together? logps tell only if the same examples come twice
    rows = [row for row in log.train if row.rewards or row.get("loss") > 0]
    norms, rates = log.values("grad_norm"), log.values("learning_rate")
    rising = len(rates) > 1 and all(a < b for a, b in pairwise(rates))
    if len(rows) < (10 if rising else 3 if rows and (rows[-1].step or 0) < 10 else 2) or not all(map(still, rows)):
        return None
    names = ("loss", *REWARDS, "rewards/ties", "grad_norm", "learning_rate")
    shown = {name: span(log.values(name)) for name in names if log.values(name)}
    evidence = [f"{len(rows)} rows, {rows[0].place} to {rows[-1].place}"]
    evidence += [", ".join(f"{name} {values}" for name, values in shown.items())]
    scores = [log.values(f"logps/{y}", log.evaluations) for y in ("chosen", "rejected")]
    same = [x for x in (*scores, log.values("logps/chosen")) if len(x) > (1 if x in scores else 2)]
    if any(len(set(x)) > 1 for x in scores):
        return [
            *evidence,
            f"log pi of the evaluation examples moves: {', '.join(map(span, filter(None, scores)))}",
        ], "same"
    repeated = any(len(set(x)) == 1 for x in same)
    evidence.append("log pi of the same examples does not move, so the policy does not" if repeated else
                    "no examples come twice, so the log does not tell whether the policy moves")  # fmt: skip
    causes = "others frozen beta0" if repeated else "same others" if norms else "same beta0 frozen others"
    causes = "beta0 frozen" if norms and not any(norms) else causes
    return evidence, "rate0" if rates and not any(rates) else "warmup " * rising + causes + " rate0" * (not rates)


@symptom(DPO, unless="stuck")
def accuracy_zero(log: Log) -> Signs:
    # before the first step all are ties; and with rewards other than 0 the pairs may truly be ranked wrongly
    for part in (log.evaluations, log.train):
        rows = [row for row in part if row.get("rewards/accuracies") >= 0]
        late = [row for row in rows if (row.get("epoch") != 0 if row.step is None else row.step > 1)]
        ranked = any(row.get("rewards/accuracies") or (row.rewards and not row.tied) for row in rows)
        if len(late) >= (1 if part is log.evaluations else 3) and not ranked:
            return [f"{len(rows)} rows, such as {late[0]}"], "ties swapped"
    return None


@symptom(DPO, unless="nan stuck")
def zero_from_start(log: Log) -> Signs:
    # the first row is a mean over k steps, none below 0 and the first at log 2: it is at least (log 2)/k
    for row, k in log.starts():
        if row.get("loss") < min(0.02, 0.9 * LOG2 / k):
            evidence = [f"{row}", f"a mean over at most {k} steps that begins at log 2 is at least {LOG2 / k:.4g}"]
            return evidence, "base float16" if row.get("rewards/accuracies") > 0 or row.margin > 0 else "float16 base"
    return None


@symptom(DPO, unless="nan stuck zero_from_start")
def first_loss(log: Log) -> Signs:
    # before an update rewards are 0 and the loss is log 2; rounding in 16 bits moves them by up to about 0.1 and 0.05
    for row, k in log.starts():
        loss, most = row.get("loss"), max(map(abs, row.rewards), default=1.0)
        off = abs(loss - LOG2) > 0.05 and most > 0.02 and not log.nll_weights()
        first = k == 1 and (off or (row.rewards and most > 0.1))
        if first or (k <= 50 and off and (loss < 0.9 * LOG2 / k or (loss > 1 and most > 0.5))):
            evidence = [f"{row}", "policy = reference, where a run begins, has rewards of 0 and log 2 = 0.6931"]
            return evidence, "base precision dropout" if first else "base rate precision dropout"
    return None


@symptom(BARE, unless="stuck nan")
def unstable(log: Log) -> Signs:
    # a mean loss above 5 needs margins far on the side of the rejected: there, and back
    high = [row for row in log.losses if row.get("loss") > 5 and not row.margin >= -1]
    sides = [row.margin > 0 if row.rewards else row.get("loss") < 2 for row in log.losses
             if (abs(row.margin) > 1 if row.rewards else not 2 <= row.get("loss") <= 5)]  # fmt: skip
    swings = sum(a != b for a, b in pairwise(sides))
    if len(high) < 2 or swings < 3:
        return None
    return [*map(str, high[:2]), f"{len(high)} such rows among {len(log.losses)}, {swings} swings"], "rate batch"


@symptom(BARE, unless="stuck nan unstable first_loss")
def above_log2(log: Log) -> Signs:
    # a policy that never moves has log 2
    losses, margins = log.values("loss"), [row.margin for row in log.train if row.margin == row.margin]
    (a, b), (m, n) = ((x[: len(x) // 2], x[len(x) // 2 :]) for x in (losses, margins))
    if len(a) < 5 or (n and fmean(n) > 0) or fmean(b) - 3 * stdev(b) / math.sqrt(len(b)) < LOG2 or log.nll_weights():
        return None
    if not n and (max(b) < 1.5 * min(b) or fmean(b) < 0.95 * fmean(a)):
        return None  # calm or falling: a loss of another kind may be
    evidence = [f"mean loss {fmean(a):.4g}, then {fmean(b):.4g} ({span(b)}); log 2 = 0.6931"]
    evidence += [f"margins {span(margins)}" if n else "there are no rewards: if this is the loss of DPO"]
    falls = m and max(n) < 0 and fmean(n) < min(m)
    return evidence, "sign rate batch base term summed" if falls else "rate batch base sign term summed"


@symptom(DPO, unless="nan zero_from_start")
def loss_below(log: Log) -> Signs:
    # Jensen, for the rounded margin. Loss and margin may be of other devices, so it is their mean that must hold
    rows = [row for row in log.losses or log.evaluations if row.get("loss") + row.margin < math.inf]
    least = [softplus(-row.margin - 0.01 * abs(row.margin) - 1e-3) - 1e-4 for row in rows]
    known = [(row, row.get("loss"), low) for row, low in zip(rows, least)]
    for part in (known[:10], known):
        bad = [(row, low / loss if loss > 0 else math.inf) for row, loss, low in part if loss < low]
        over = [loss - low for _, loss, low in part] if bad else []
        wide = 4 * stdev(over) / math.sqrt(len(over)) if len(over) > 4 else 0.0
        if bad and fmean(over) + wide < 0 and (len(part) > 4 or all(factor > 1.4 for _, factor in bad)):
            evidence = [f"{bad[0][0]}; DPO's is at least log(1 + e^-margin) = {softplus(-bad[0][0].margin):.4g}"]
            evidence += [f"{len(bad)} of {len(part)} rows are too low, this one {bad[0][1]:.3g} times"]
            if len(bad) > 4 and all(row.margin < 0 and factor < 10 for row, factor in bad[len(bad) // 2 :]):
                return evidence, "sign divided loss"
            begins = any(loss < low for row, loss, low in known if abs(row.margin) < 0.1)  # a division shows there too
            return evidence, "divided loss sign" if begins else "loss divided sign"
    return None


@symptom(DPO, unless="nan")
def loss_above(log: Log) -> Signs:
    # where all margins are 0 the loss is log 2; where all are won, it is less
    early = [row for row, k in log.starts() if k == 1 and row.rewards and max(map(abs, row.rewards)) < 1e-3]
    tied = early + [row for row in log.rows if row.tied and row not in early]
    won = [row for row in log.rows if row.get("rewards/accuracies") == 1]
    for rows, least in ((tied, 1), (won, 3)):
        bad = [row for row in rows if row.get("loss") > LOG2 + 0.01]
        if len(bad) >= min(least, len(log.rows)) and len(bad) > 0.8 * len(rows) and not log.nll_weights():
            loss = bad[0].get("loss")
            evidence = [f"{bad[0]}; DPO's is at most log 2 = 0.6931", f"{len(bad)} of {len(rows)} such rows"]
            evidence += [f"{loss / LOG2:.4g} times log 2"]
            if rows is won:
                return evidence, "smoothing term summed"
            whole = abs(loss / LOG2 - round(loss / LOG2)) < 0.01
            other = min(abs(loss / x - 1) for x in (1, 25, 100)) < 0.01
            return evidence, "summed loss term" if whole else "loss term" if other else "term loss"
    return None


@symptom(ANY)
def margins(log: Log) -> Signs:
    # margins = chosen - rejected, in the mean too
    rows = [row for row in log.train if len(row.rewards) == 3]
    gaps = [abs(w - l - margin) / (1 + max(map(abs, (w, l, margin)))) for w, l, margin in (row.rewards for row in rows)]
    bad = [row for row, gap in zip(rows, gaps) if gap > 0.02]
    return ([f"{len(bad)} of {len(rows)} rows, such as {bad[0]}"], "means factor") if 2 * len(bad) > len(rows) else None


@symptom(ANY, unless="stuck nan")
def no_gradient(log: Log) -> Signs:
    # the gradient of log sigma(z) is sigma(-z), which is 0 only by underflow; and a loss that falls has a gradient
    zero, n = [row for row in log.train if row.get("grad_norm") == 0], len(log.values("grad_norm"))
    losses = log.values("loss", zero)
    falls = len(losses) > 1 and fmean(losses[-(len(losses) // 2) :]) < fmean(losses[: len(losses) // 2]) - 0.05
    if len(zero) < 2 or 2 * len(zero) < n or falls:
        return None
    saturated = zero[0].margin > 15 or zero[0].get("loss") == 0
    evidence = [f"{len(zero)} of {n} rows, such as {zero[0]}"]
    return evidence, "underflow frozen clipped" if saturated else "frozen clipped underflow"


@symptom(ANY, unless="stuck nan unstable")
def loss_jump(log: Log) -> Signs:
    # a sum over n micro-batches is n times their mean, and the margins know nothing of it
    rows, losses = log.losses, log.values("loss")
    most, least = list(accumulate(losses, max)), list(accumulate(losses[::-1], min))[::-1]
    for i in range(3, len(rows) - 2):
        before, after = rows[max(0, i - 5) : i], rows[i : i + 5]
        if least[i] > 1.4 * most[i - 1] > 0:  # all later ones are higher than all earlier ones
            factor = median(log.values("loss", after)) / median(log.values("loss", before))
            a, b = ([row.margin for row in part if row.rewards] for part in (before, after))
            calm = not (a and b) or abs(median(b) - median(a)) < 0.2 + 0.25 * abs(median(a))
            if calm and abs(factor / round(factor) - 1) < 0.15:
                evidence = [str(rows[i - 1]), str(rows[i]), f"from there on it is {factor:.3g} times as high"]
                return evidence, "summed" if a else "summed diverged"
    return None


@symptom(DPO, unless="nan stuck unstable")
def chosen_falls(log: Log) -> Signs:
    # on the same examples a reward changes by beta times the change of log pi, which gives beta and the reference
    rows = [row for row in log.evaluations or log.train if row.get("logps/chosen") + row.get("rewards/chosen") <= 0]
    logps, third = log.values("logps/chosen", rows), len(rows) // 3
    if len(rows) < (2 if log.evaluations else 9):
        return None
    if log.evaluations:
        start, end = logps[0], logps[-1]
        beta = (rows[-1].get("rewards/chosen") - rows[0].get("rewards/chosen")) / (end - start or math.inf)
        start -= rows[0].get("rewards/chosen") / beta if 0 < beta < 10 else 0.0
    else:
        start, end = fmean(logps[:third]), fmean(logps[-third:])
    if end > min(2 * start, start - 3) or not rows[-1].get("rewards/chosen") < -rows[-1].margin:
        return None
    of = "of the same examples" if log.evaluations else "in the first and last third of the rows"
    evidence = [f"{rows[-1]}", f"log pi(chosen) from {start:.4g} to {end:.4g} nats {of}"]
    return [*evidence, "the chosen reward fell by more than the margin grew"], "displaced long ordinary"


@symptom(ANY, unless="nan unstable")
def overfit(log: Log) -> Signs:
    # an evaluation has the same examples each time: it rises by half of what it had gained, and by more than 0.03
    rows = [row for row in log.evaluations if row.get("loss") == row.get("loss")]
    losses = log.values("loss", rows)
    best = losses.index(min(losses)) if losses else 0
    if len(rows) < 3 or losses[-1] - losses[best] < max(0.03, 0.5 * (losses[0] - losses[best])):
        return None
    cut = rows[best].order if best else median([row.order for row in log.losses] or [0])
    a = log.values("loss", [row for row in log.losses if row.order < cut])
    b = log.values("loss", [row for row in log.losses if row.order >= cut])
    if losses[-2] <= losses[best] or not (a and b and fmean(b) < fmean(a)):
        return None
    evidence = [f"{rows[best]}", f"{rows[-1]}", f"training: mean loss {fmean(a):.4g}, then {fmean(b):.4g}"]
    return evidence, "long kind" if best else "kind long"


@symptom(DPO, unless="nan zero_from_start first_loss")
def saturated(log: Log) -> Signs:
    # log(1 + e^-10) is 0.00005
    rows = log.losses or log.evaluations
    end = rows[-max(3, len(rows) // 4) :]
    losses, wins = log.values("loss", end), log.values("rewards/accuracies", end)
    margins = [row.margin for row in end if row.rewards]
    wide = min(margins) >= 10 if margins else wins and max(losses, default=1.0) < 1e-4
    if not losses or max(losses) > 0.01 or min(wins, default=1.0) < 1 or not wide:
        return None
    return [f"{end[-1]}", f"{len(end)} such rows at the end"], "base " * (end == rows) + "deterministic long shortcut"


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
        lines = [*(f"  {line}" for line in self.evidence), "  Usual causes:", *causes, f"  {self.tell}"]
        return "\n".join([f"{self.code}: {self.sentence}", *lines])


class Diagnosis(NamedTuple):
    """What is wrong, and what is worth knowing though it is not."""

    kind: str
    rows: int
    findings: list[Finding]
    remarks: list[str]

    def as_dict(self) -> dict[str, Any]:
        return {**self._asdict(), "findings": [finding._asdict() for finding in self.findings]}

    def __str__(self) -> str:
        remarks = [f"Remark: {remark}" for remark in self.remarks]
        verdict = [] if self.findings else ["Nothing unusual."]
        return "\n\n".join([f"{self.rows} rows, {self.kind}", *map(str, self.findings), *remarks, *verdict])


def remarks(log: Log, codes: Iterable[str]) -> list[str]:
    """What is worth knowing and not wrong."""
    last, weights = (log.evaluations or log.train)[-1], log.nll_weights()
    w, l = last.get("rewards/chosen"), last.get("rewards/rejected")
    holds = {
        "restarts": log.restarts,
        "other": log.kind in KINDS,
        "no_reference": log.kind == "no reference",
        "loss_alone": log.kind == "loss alone",
        "nll_term": weights,
        "first": log.train and all(map(still, log.train)) and "stuck" not in codes,
        "ties": any(row.get("rewards/accuracies") == 0 and row.tied for row, k in log.starts() if k == 1),
        "both_fall": log.kind == "DPO" and w < 0 and l < 0 and {"unstable", "above_log2"}.isdisjoint(codes),
        "samples": not codes,
    }
    facts = {"kind": log.kind, "weights": span(weights or [0.0]), "w": w, "l": l, "place": last.place}
    return [WORDS["remarks"][name].format(**facts) for name, true in holds.items() if true]


def doctor(log: str | PathLike[str] | Iterable[Mapping[str, Any]]) -> Diagnosis:
    """What the metrics of a training run show: a file (see `read`), or its rows as dicts.

    Findings are what the numbers show; causes are the usual ones, likeliest first. Raises ValueError if no row has a
    metric, or as `read` does.
    """
    name, run = (log, Log(read(log))) if isinstance(log, str | PathLike) else ("the log", Log(log))
    if not run.rows:
        raise ValueError(f"{name} has no row with a metric, such as {', '.join(KNOWN[:4])}")
    findings: dict[str, Finding] = {}
    for code, (function, kinds, unless) in SYMPTOMS.items():
        signs = function(run) if run.kind in kinds and unless.isdisjoint(findings) else None
        if signs:
            evidence, causes = signs[0], [WORDS["causes"][cause] for cause in signs[1].split()]
            findings[code] = Finding(code, WORDS[code]["sentence"], evidence, causes, WORDS[code]["tell"])
    return Diagnosis(run.kind, len(run.rows), list(findings.values()), remarks(run, findings))


def table() -> str:
    """The faults that the tests produce, by training or as rows: what is found, and the cause that is named first."""
    rows = [("fault", "made by", "found", "likeliest cause")]
    for name, (made_by, found, cause) in WORDS["faults"].items():
        rows.append((name, made_by, found, re.split("[:,(]", WORDS["causes"][cause])[0].strip()))
    return "\n".join(f"{name:<46}{made_by:<10}{found:<17}{cause}" for name, made_by, found, cause in rows)
