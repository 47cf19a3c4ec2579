"""Whether sigma(z), the probability that a model gives to a label, is how often such labels are right.

z = beta (h_a - h_b) is the implicit reward of side a of a pair less that of side b, h = log(pi/pi_ref); y is 1 where a
was preferred. Which side is a must not depend on the label: with the chosen side first every y is 1, and any honest
model looks under-confident.
"""

import hashlib
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy

from .. import ops
from ..backend import Array
from ..losses import sigma
from ..plots import Curve, Panel
from .intervals import wilson


def chosen_first(pairs: Sequence[tuple[Sequence[int], ...]]) -> Array:
    """y of each pair of ids (prompt, chosen, rejected), where side a is the response with the smaller hash.  -> (n,)"""

    def digest(x: Sequence[int], y: Sequence[int]) -> bytes:
        return hashlib.sha256(repr((list(x), list(y))).encode()).digest()

    return numpy.array([digest(x, w) < digest(x, l) for x, w, l in pairs], dtype=float)


class Bin(NamedTuple):
    """Pairs whose sigma(z) lies in one tenth of [0, 1]."""

    low: float
    n: int
    predicted: float  # mean sigma(z)
    share: float  # mean y
    interval: tuple[float, float]  # of the share


def bins(p: Array, y: Array, count: int = 10) -> list[Bin]:
    """The pairs by their p = sigma(z), those bins that have any."""
    which = numpy.minimum((p * count).astype(int), count - 1)
    found = []
    for k in range(count):
        if n := int((which == k).sum()):
            hits = float(y[which == k].sum())
            found.append(Bin(k / count, n, float(p[which == k].mean()), hits / n, wilson(hits, n)))
    return found


def expected_error(each: Sequence[Bin]) -> float:
    """ECE = sum over bins of (n/N) |mean p - mean y|. Source: Guo et al. 2017 (arXiv 1706.04599), equation 3."""
    return sum(b.n * abs(b.predicted - b.share) for b in each) / sum(b.n for b in each)


def brier(p: Array, y: Array) -> float:
    """mean((p - y)^2). Source: Brier 1950."""
    return float(((p - y) ** 2).mean())


def auc(z: Array, y: Array) -> float:
    """The share of (y = 1, y = 0) couples whose z is larger where y = 1; ties count one half. nan without both."""
    ones, zeros = numpy.sort(z[y == 1]), numpy.sort(z[y == 0])
    below = numpy.searchsorted(zeros, ones, "left") + numpy.searchsorted(zeros, ones, "right")  # twice, ties once
    return float(below.sum() / (2 * len(ones) * len(zeros))) if len(ones) and len(zeros) else math.nan


def rates(p: Array, y: Array, threshold: float = 0.5) -> tuple[float, float]:
    """FPR, the share of y = 0 with p >= threshold, and FNR, the share of y = 1 with p < threshold; nan without any."""
    false, missed = p[y == 0] >= threshold, p[y == 1] < threshold
    return float(false.mean()) if len(false) else math.nan, float(missed.mean()) if len(missed) else math.nan


def roc(z: Array, y: Array) -> tuple[list[float], list[float]]:
    """FPR and 1 - FNR at every threshold, from above the largest z to the smallest. The area below it is the AUC."""
    thresholds = numpy.concatenate([[math.inf], numpy.unique(z)[::-1]])
    shares = [1 - numpy.searchsorted(numpy.sort(part), thresholds) / len(part) for part in (z[y == 0], z[y == 1])]
    return shares[0].tolist(), shares[1].tolist()


def slope(z: Array, y: Array) -> tuple[float, float]:
    """The s that makes sigma(s z) likeliest, and its standard error; a temperature of 1/s repairs the model.

        sum z (y - sigma(s z)) = 0,   error = 1/sqrt(sum z^2 sigma (1 - sigma))

    y may be a probability. inf if every label is as z says, -inf if none is, nan if every z is 0.
    """
    if not (z * (y - (z > 0))).any() or not (z * (y - (z < 0))).any():
        return (math.nan if not z.any() else math.inf if (z * (y - 0.5)).sum() > 0 else -math.inf), math.nan

    def uphill(s: float) -> float:
        return float((z * (y - sigma(s * z))).sum())  # falls in s, and has one root

    low, high = -1.0, 1.0
    while uphill(low) < 0:
        low *= 2
    while uphill(high) > 0:
        high *= 2
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if uphill(middle) > 0 else (low, middle)
    information = z**2 * sigma(low * z) * sigma(-low * z)
    return low, float(1 / math.sqrt(information.sum()))


def calibration(z: Array, y: Array) -> dict[str, Any]:
    """All figures of pairs with log-odds z, (n,), and labels y, (n,), 0 or 1; nan where one kind is missing."""
    p = sigma(z)
    each, (s, error), (fpr, fnr) = bins(p, y), slope(z, y), rates(p, y)
    figures = {"pairs": len(y), "ece": expected_error(each), "brier": brier(p, y), "slope": s, "slope_error": error}
    figures |= {"temperature": 1 / s if s else math.inf, "auc": auc(z, y), "fpr": fpr, "fnr": fnr}
    return {**figures, "bins": [b._asdict() for b in each]}


def against_truth(z: Array, gap: Array) -> dict[str, float]:
    """sigma(z) beside the true probabilities p = sigma(gap), for true log-odds `gap`, the difference of true rewards.

        absolute_error = mean |sigma(z) - p|,   kl = mean KL(p || sigma(z)), nats,   gap_slope = sum z gap / sum gap^2,
        brier_floor = mean p (1 - p),   brier_excess = mean (sigma(z) - p)^2,   whose sum is the expected Brier score

    gap_slope is what a point of true reward adds to z; true_temperature is 1/s of the `slope` s with p for the labels.
    """
    p, q, log_sigma = sigma(gap), sigma(z), lambda x: ops.logsigmoid(x).data
    kl = p * (log_sigma(gap) - log_sigma(z)) + (1 - p) * (log_sigma(-gap) - log_sigma(-z))
    return {
        "absolute_error": float(abs(q - p).mean()),
        "kl": float(kl.mean()),
        "gap_slope": float(z @ gap / (gap @ gap)) if gap.any() else math.nan,
        "true_temperature": 1 / s if (s := slope(z, p)[0]) else math.inf,
        "brier_floor": float((p * (1 - p)).mean()),
        "brier_excess": brier(q, p),
    }


def panels(z: Array, y: Array) -> list[Panel]:
    """The reliability diagram, also after its temperature, and the ROC curve where there are labels of both kinds."""
    figures, diagonal = calibration(z, y), ([0.0, 1.0], [0.0, 1.0])
    curves, temperature = [Curve("as sigma(z) says", *diagonal, faint=True)], figures["temperature"]
    for divisor in (1.0, temperature) if 0 < temperature < math.inf else (1.0,):
        rows = bins(sigma(z / divisor), y)
        error = [(each.share - each.interval[0], each.interval[1] - each.share) for each in rows]
        x, share = [each.predicted for each in rows], [each.share for each in rows]
        curves.append(Curve("as trained" if divisor == 1 else f"temperature {divisor:.2f}", x, share, "o", error=error))
    honest = Panel(f"calibration: ECE {figures['ece']:.3f}", "mean sigma(z)", "share right, with 95 %", curves)
    if math.isnan(figures["auc"]):
        return [honest]
    found = [Curve("chance", *diagonal, faint=True), Curve("any threshold", *roc(z, y))]
    found.append(Curve("sigma(z) = 0.5", [figures["fpr"]], [1 - figures["fnr"]], "o"))
    return [honest, Panel(f"ROC: AUC {figures['auc']:.3f}", "FPR", "1 - FNR", found)]


def as_text(groups: Mapping[str, dict[str, Any]]) -> str:
    """The `calibration` of each group as a table, one group a row."""
    names = ("pairs", "ece", "brier", "slope", "temperature", "auc", "fpr", "fnr")
    lines = ["", f"{'':<12}" + "".join(f"{name:>13}" for name in names)]
    for group, figures in groups.items():
        cells = (f"{figures[name]:>13}" if name == "pairs" else f"{figures[name]:>z13.3f}" for name in names)
        lines.append(f"{group:<12}" + "".join(cells))
    return "\n".join([*lines, ""])


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The bins of `calibration` as a table."""
    lines = ["", f"{'sigma(z)':<12}{'pairs':>8}{'mean':>8}{'share right':>13}{'95 %':>17}"]
    for row in rows:
        low, high = row["interval"]
        place = f"{row['low']:.1f} to {row['low'] + 0.1:.1f}"
        lines.append(f"{place:<12}{row['n']:>8}{row['predicted']:>8.3f}{row['share']:>13.3f}{low:>9.3f} - {high:.3f}")
    return "\n".join([*lines, ""])
