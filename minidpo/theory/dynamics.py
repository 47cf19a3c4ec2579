"""The effect of beta on one pair under plain gradient steps: a larger beta moves faster early and stays closer late.

h is the log-ratio gap (log pi(y_w) - log pi_ref(y_w)) - (log pi(y_l) - log pi_ref(y_l)), which starts at 0. t is the
time of the gradient flow on the two log-probabilities.
"""

import functools
import math
from collections.abc import Callable, Iterator, Sequence

import numpy

from ..backend import Array
from ..plots import Curve, Panel
from .equalities import Claim, World, at_most


def hard_label_gap(beta: float, t: float) -> float:
    """The gap h after time t on a pair whose label is certain, from dh/dt = 2 beta sigma(-beta h).

    v + e^v = 1 + 2 beta^2 t,   v = beta h
    """
    v = math.log1p(2 * beta**2 * t)
    for _ in range(50):
        v -= (v + math.exp(v) - 1 - 2 * beta**2 * t) / (1 + math.exp(v))
    return v / beta


def lead(beta: float, other: float, t: float) -> float:
    """The gap at one beta less the gap at another, after time t."""
    return hard_label_gap(beta, t) - hard_label_gap(other, t)


def time_to_gap(beta: float, h: float, reward: float) -> float:
    """The time until the gap is h, for Bradley-Terry labels: t = int_0^h dx/(2 beta (sigma(r) - sigma(beta x)))."""
    x = numpy.linspace(0.0, h, 200_001)
    pull = 2 * beta * (1 / (1 + math.exp(-reward)) - 1 / (1 + numpy.exp(-beta * x)))
    return float(((1 / pull[1:] + 1 / pull[:-1]) / 2 * numpy.diff(x)).sum())


def crossing(difference: Callable[[float], float], low: float, high: float) -> float:
    """The place between `low` and `high` at which a function changes its sign, by bisection."""
    rising = difference(high) > 0
    for _ in range(70):  # to rounding
        middle = (low + high) / 2
        low, high = (low, middle) if (difference(middle) > 0) == rising else (middle, high)
    return low


def gap_path(betas: Sequence[float], steps: int, rate: float, p: float) -> Array:
    """Gaps under plain gradient steps; w is preferred with probability p.  (betas,) -> (steps + 1, betas)"""
    path = numpy.zeros((steps + 1, len(betas)))
    for i, beta in enumerate(betas):
        h = 0.0
        for step in range(steps):
            # dL/dlogp_w = -beta (p sigma(-beta h) - (1 - p) sigma(beta h)), dL/dlogp_l = -dL/dlogp_w
            s = 1 / (1 + math.exp(beta * h))
            h += 2 * rate * beta * (p * s - (1 - p) * (1 - s))
            path[step + 1, i] = h
    return path


def beta_early_and_late(world: World, seed: int) -> Iterator[Claim]:
    """A larger beta moves faster early and stays closer late: the curves cross, at a time that can be predicted."""
    betas, rate = (0.5, 0.1, 0.01), 0.1
    early, late = ([hard_label_gap(beta, t) for beta in betas] for t in (10, 10_000))
    text = "; ".join(f"t = {t}: {', '.join(f'{h:.1f}' for h in gaps)}" for t, gaps in ((10, early), (10_000, late)))
    text = f"certain labels, gaps at beta 0.5, 0.1, 0.01 are in reverse order late: {text}"
    yield Claim(text, late[2], early == sorted(early, reverse=True) and late == sorted(late))
    path = gap_path(betas, 70_000, rate, 1.0)
    for a, b, high in ((0, 1, 1e3), (1, 2, 1e5)):
        predicted = crossing(functools.partial(lead, betas[a], betas[b]), 1.0, high)
        actual = (1 + int(numpy.argmin(path[1:, a] > path[1:, b]))) * rate
        text = (
            f"certain labels, betas {betas[a]:g} and {betas[b]:g} cross at t = {actual:.0f}, predicted {predicted:.0f}"
        )
        yield at_most(f"{text}: relative error", abs(actual / predicted - 1), 0.01)
    reward = 1.7
    p = 1 / (1 + math.exp(-reward))
    path = gap_path(betas, 60_000, rate, p)
    first, second = (functools.partial(time_to_gap, beta, reward=reward) for beta in betas[:2])
    predicted = second(crossing(lambda h: first(h) - second(h), 1e-3, reward / betas[0] * (1 - 1e-6)))
    actual = (1 + int(numpy.argmin(path[1:, 0] > path[1:, 1]))) * rate
    text = f"Bradley-Terry labels, betas 0.5 and 0.1 cross at t = {actual:.1f}, predicted {predicted:.1f}"
    yield at_most(f"{text}: relative error", abs(actual / predicted - 1), 0.01)
    for i, beta in enumerate(betas[:2]):
        text = f"Bradley-Terry labels, beta {beta:g}: final gap {reward}/beta = {reward / beta:.1f}: relative error"
        yield at_most(text, abs(path[-1, i] * beta / reward - 1), 0.01)


def gap_panels() -> list[Panel]:
    """Diagrams of the gaps at three betas over time, for certain and for Bradley-Terry labels."""
    betas, rate, reward = (0.5, 0.1, 0.01), 0.1, 1.7
    steps = numpy.unique(numpy.geomspace(1, 70_000, 300).astype(int))  # evenly spaced on a logarithmic axis
    panels = []
    labels = {"certain labels": 1.0, f"Bradley-Terry labels, reward gap {reward}": 1 / (1 + math.exp(-reward))}
    for title, p in labels.items():
        gaps = gap_path(betas, 70_000, rate, p)[steps]
        curves = [Curve(f"beta {beta:g}", (rate * steps).tolist(), gaps[:, i].tolist()) for i, beta in enumerate(betas)]
        panels.append(Panel(title, "time of gradient flow", "log-ratio gap, nats", curves, "log"))
    return panels
