"""Gates: conditions on figures that a model must meet."""

from collections.abc import Mapping

from .intervals import Estimate


class GateError(Exception):
    """A condition does not hold; the command line exits with status 1."""


def hold(
    what: str, figures: Mapping[str, Estimate], at_most: Mapping[str, float], at_least: Mapping[str, float]
) -> list[str]:
    """One sentence for each condition that does not hold, with the figure and its 95 % interval.

    The figure itself is compared, not an end of its interval. Raises ValueError for a name that is not a figure's.
    """
    for name in (*at_most, *at_least):
        if name not in figures:
            raise ValueError(f"{name} is not a figure here; there are {', '.join(figures)}")
    broken = [(name, "at most", limit) for name, limit in at_most.items() if not figures[name].value <= limit] + [
        (name, "at least", limit) for name, limit in at_least.items() if not figures[name].value >= limit
    ]
    return [f"{what}: {name} is {exact(figures[name])}, and must be {side} {limit:g}" for name, side, limit in broken]


def exact(estimate: Estimate) -> str:
    """An estimate in four digits with its interval."""
    value, low, high = (f"{x:.4g}" for x in estimate)
    return f"{value} (95 % interval {low} to {high})" if low != high else value
