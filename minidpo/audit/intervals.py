"""Estimates with their 95 % intervals: a mean, a share, and the differences between two models on the same prompts."""

import math
import statistics
from collections.abc import Sequence
from typing import Any, NamedTuple

NORMAL = 1.959963984540054  # 95 % of a standard normal are within


class Estimate(NamedTuple):
    """A number and the 95 % interval around it."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:z.2f} [{self.low:z.2f}, {self.high:z.2f}]"


def wilson(hits: float, n: int) -> tuple[float, float]:
    """The 95 % interval of a share: all q with |hits/n - q| <= 1.96 sqrt(q (1 - q)/n). Source: Wilson 1927."""
    if n == 0:
        return 0.0, 1.0
    p, s = hits / n, NORMAL**2 / n
    middle, half = (p + s / 2) / (1 + s), math.sqrt(s * p * (1 - p) + s * s / 4) / (1 + s)
    return max(0.0, middle - half), min(1.0, middle + half)


def share(hits: Sequence[float]) -> Estimate:
    """The share of hits, each 0 or 1 or between, with Wilson's interval; nan without any."""
    return Estimate(sum(hits) / len(hits) if hits else math.nan, *wilson(sum(hits), len(hits)))


def mean(values: Sequence[float]) -> Estimate:
    """The mean, and 1.96 standard errors s/sqrt(n) each way; infinitely many below two values."""
    if len(values) < 2:
        return Estimate(values[0] if values else math.nan, -math.inf, math.inf)
    middle, half = statistics.fmean(values), NORMAL * statistics.stdev(values) / math.sqrt(len(values))
    return Estimate(middle, middle - half, middle + half)


def paired(values: Sequence[float], others: Sequence[float]) -> dict[str, Any]:
    """How often one is better, equal or worse than its partner, and the mean of the differences."""
    differences = [a - b for a, b in zip(values, others, strict=True)]
    counts = {"better": sum(d > 0 for d in differences), "equal": sum(d == 0 for d in differences)}
    return {"gain": mean(differences), **counts, "worse": sum(d < 0 for d in differences)}
