"""Whether sigma(z), the probability that a model gives to a label, is how often such labels are right.

z = beta (h_a - h_b) is the implicit reward of side a of a pair less that of side b, h = log(pi/pi_ref); y is 1 where a
was preferred. Which side is a must not depend on the label: with the chosen side first every y is 1, and any honest
model looks under-confident.
"""

import hashlib
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy

from ..backend import Array
from ..losses import sigma
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


def expected_error(p: Array, y: Array) -> float:
    """ECE = sum over bins of (n/N) |mean p - mean y|. Source: Guo et al. 2017 (arXiv 1706.04599), equation 3."""
    return sum(each.n * abs(each.predicted - each.share) for each in bins(p, y)) / len(p)


def brier(p: Array, y: Array) -> float:
    """mean((p - y)^2). Source: Brier 1950."""
    return float(((p - y) ** 2).mean())


def auc(z: Array, y: Array) -> float:
    """The share of (y = 1, y = 0) couples whose z is larger where y = 1; ties count one half. nan without both."""
    ones, zeros = numpy.sort(z[y == 1]), numpy.sort(z[y == 0])
    below = numpy.searchsorted(zeros, ones, "left") + numpy.searchsorted(zeros, ones, "right")  # twice, ties once
    return float(below.sum() / (2 * len(ones) * len(zeros))) if len(ones) and len(zeros) else math.nan


def rates(p: Array, y: Array, threshold: float = 0.5) -> tuple[float, float]:
    """FPR, the share of y = 0 with p >= threshold, and FNR, the share of y = 1 with p < threshold."""
    return float((p[y == 0] >= threshold).mean()), float((p[y == 1] < threshold).mean())


def slope(z: Array, y: Array) -> tuple[float, float]:
    """The s that makes sigma(s z) likeliest, and its standard error; a temperature of 1/s repairs the model.

        sum z (y - sigma(s z)) = 0,   error = 1/sqrt(sum z^2 sigma (1 - sigma))

    inf if every label is as z says, -inf if none is, nan if every z is 0.
    """
    signed = z * (2 * y - 1)  # positive where the label is as z says
    if (signed >= 0).all() or (signed <= 0).all():
        return (math.inf if signed.max() > 0 else -math.inf if signed.min() < 0 else math.nan), math.nan

    def uphill(s: float) -> float:
        return float((signed * sigma(-s * signed)).sum())  # falls in s, and has one root

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
    """All figures of this file for pairs with log-odds z, (n,), and labels y, (n,), 0 or 1."""
    p = sigma(z)
    s, error = slope(z, y)
    fpr, fnr = rates(p, y) if 0 < y.sum() < len(y) else (math.nan, math.nan)
    figures = {"ece": expected_error(p, y), "brier": brier(p, y), "slope": s, "slope_error": error}
    figures |= {"temperature": 1 / s if s else math.inf, "auc": auc(z, y), "fpr": fpr, "fnr": fnr}
    return {**figures, "bins": [each._asdict() for each in bins(p, y)]}


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The bins of `calibration` as a table."""
    lines = ["", f"{'sigma(z)':<12}{'pairs':>8}{'mean':>8}{'share right':>13}{'95 %':>17}"]
    for row in rows:
        low, high = row["interval"]
        place = f"{row['low']:.1f} to {row['low'] + 0.1:.1f}"
        lines.append(f"{place:<12}{row['n']:>8}{row['predicted']:>8.3f}{row['share']:>13.3f}{low:>9.3f} - {high:.3f}")
    return "\n".join([*lines, ""])
