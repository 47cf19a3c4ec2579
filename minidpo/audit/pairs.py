"""Metrics of pairs by group, with 95 % intervals."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy

from ..data.preferences import Encoded
from ..run.tasks import counted
from ..tokenizer import printable
from .intervals import Estimate, wilson

LENGTHS: dict[str, Callable[[Any, Any, Any], int]] = {  # groups by tokens, where no field has the name
    "prompt_length": lambda x, w, l: len(x),
    "response_length": lambda x, w, l: len(w),
    "length_difference": lambda x, w, l: len(w) - len(l),
}
MOST = 50  # groups
DRAWS = 400  # of the bootstrap
SHARES = ("rewards/accuracies", "rewards/ties")
COLUMNS = {"loss": "loss", "rewards/accuracies": "accuracy", "rewards/margins": "reward margin"}
COLUMNS |= {"nll/chosen_rise": "rise of chosen's nats"}
Statistic = Callable[[Any], Mapping[str, float]]  # of the places of some pairs


def groups(encoded: Encoded, field: str) -> dict[str, list[int]]:
    """The places of the pairs by a field of their rows, or by a length of `LENGTHS` in quarters."""
    documents = [json.loads(row.text) for row in encoded.rows]
    if field in LENGTHS and not any(field in document for document in documents):
        ids: list[Any] = encoded.ids
        lengths = numpy.array([LENGTHS[field](*pair) for pair in ids])
        quarters = numpy.searchsorted(numpy.quantile(lengths, [0.25, 0.5, 0.75]), lengths, "left")
        parts = [numpy.flatnonzero(quarters == k) for k in range(4)]
        return {f"{lengths[p].min()} to {lengths[p].max()} tokens": p.tolist() for p in parts if len(p)}
    found: dict[str, list[int]] = {}
    for place, (row, document) in enumerate(zip(encoded.rows, documents)):
        value = document.get(field, "(none)")
        if not isinstance(value, str | int | float | bool):
            raise ValueError(f"line {row.line}: {field} is not a text or a number, so it cannot name a group")
        found.setdefault(printable(str(value)), []).append(place)
    if list(found) == ["(none)"]:
        raise ValueError(f"no row has the field {field}; lengths are {', '.join(LENGTHS)}")
    if len(found) > MOST:
        raise ValueError(f"{field} has {len(found)} values, and {MOST} groups are the most")
    return dict(sorted(found.items()))


def estimates(
    statistic: Statistic, places: Sequence[int], rng: numpy.random.Generator, shares: Sequence[str] = SHARES
) -> dict[str, Estimate]:
    """Every metric of some pairs with its interval: Wilson's for shares of pairs, else the bootstrap's.

    The bootstrap draws the pairs anew, with replacement, and takes 2.5 % off each end; below some ten pairs its
    intervals are too narrow, and one pair alone has an infinite one. Source: Efron 1979.
    """
    n = len(places)
    drawing = counted(range(DRAWS), f"intervals of {n} pairs: draws")
    draws = [statistic(numpy.asarray(places)[rng.integers(n, size=n)]) for _ in drawing]
    found = {}
    for name, value in statistic(numpy.asarray(places)).items():
        low, high = numpy.quantile([draw[name] for draw in draws], [0.025, 0.975]).tolist()
        low, high = (low, high) if n > 1 else (-math.inf, math.inf)
        found[name] = Estimate(value, *(wilson(value * n, n) if name in shares else (low, high)))
    return found


def as_text(field: str, rows: Mapping[str, Mapping[str, Any]]) -> str:
    """A table of groups, each with its number of pairs and its metrics."""
    width = max(len(field), *map(len, rows)) + 2
    lines = ["", f"{field:<{width}}{'pairs':>8}" + "".join(f"{title:>24}" for title in COLUMNS.values())]
    for name, row in rows.items():
        lines.append(f"{name:<{width}}{row['pairs']:>8}" + "".join(f"{row[key]!s:>24}" for key in COLUMNS))
    return "\n".join([*lines, ""])
