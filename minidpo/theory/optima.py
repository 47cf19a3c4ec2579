"""What the relatives of DPO converge to on a small world, where every optimum has a closed form.

Arrays are (P, N): prompts, responses. A policy is optimal where the gradient of the mean loss over all pairs vanishes.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy

from .. import ops
from ..backend import Array
from ..losses import LOSSES
from ..streams import stream
from . import equalities, exact
from .equalities import Claim, World, at_most

BETA, FLIPPED = 0.5, 0.2


def slope(world: World, name: str, logp: Array, labels: Array, **options: float) -> float:
    """The largest derivative of the mean loss over all ordered pairs in one log-probability, the labels as weights."""
    P, N = logp.shape
    w, l = numpy.nonzero(1 - numpy.eye(N))
    largest = 0.0
    for x in range(P):
        four = logp[x, w], logp[x, l], world.ref_logp[x, w], world.ref_logp[x, l]
        slopes, total = LOSSES[name].gradient(*four, beta=BETA, **options), numpy.zeros(N)
        for ids, gradient in zip((w, l), slopes):
            numpy.add.at(total, ids, labels[x, w, l] * gradient)
        largest = max(largest, abs(total).max())
    return float(largest)


def tilted(world: World, ratio: Array) -> Array:
    """log pi of the policy pi_ref e^ratio / Z.  -> (P, N)"""
    return ops.log_softmax.raw(world.ref_logp + ratio)[0]


def ipo_optimum(world: World, labels: Array, beta: float = BETA) -> Array:
    """log pi of pi_ref exp(p/beta) / Z, where p is how often a response wins.  -> (P, N)"""
    return tilted(world, labels.mean(axis=-1) / beta)


def ipo(world: World, seed: int) -> Iterator[Claim]:
    """IPO regresses on wins: its optimum is pi_ref exp(p/beta) / Z, where p is how often a response wins."""
    p = exact.preference_probabilities(world.reward)
    best = ipo_optimum(world, p)
    yield at_most("the gradient of IPO vanishes there", slope(world, "ipo", best, p), 1e-14)
    certain = (world.reward[:, :, None] > world.reward[:, None, :]) + 0.5 * numpy.eye(world.reward.shape[-1])
    best = ipo_optimum(world, certain)
    yield at_most("even if labels are certain, where DPO has no optimum", slope(world, "ipo", best, certain), 1e-14)


def noisy_labels(world: World, seed: int) -> Iterator[Claim]:
    """A share of 0.2 of the labels is flipped: robust DPO still finds pi*, smoothed DPO stops short of it."""
    p, best = exact.preference_probabilities(world.reward), tilted(world, world.reward / BETA)
    flipped = (1 - FLIPPED) * p + FLIPPED * (1 - p)
    yield at_most(
        "flipped labels, robust DPO: pi*", slope(world, "robust", best, flipped, label_smoothing=FLIPPED), 1e-14
    )
    number = slope(world, "dpo", best, flipped)
    yield Claim("flipped labels, DPO: not pi*, where its gradient is not 0", number, number > 1e-6)
    smooth, _ = equalities.newton(world, flipped, BETA)
    number = slope(world, "dpo", smooth, p, label_smoothing=FLIPPED)
    yield at_most("true labels, smoothed DPO: the Bradley-Terry fit to flipped ones", number, 1e-12)
    number = float(exact.kl(smooth, world.ref_logp).mean() / exact.kl(best, world.ref_logp).mean())
    yield Claim("which is nearer to the reference: its KL as a share of that of pi*", number, number < 1)


def inverse_alpha(alpha: float) -> Callable[[Array], Array]:
    """log u from s = f'(u) = (1 - u^-alpha)/alpha; infinite where there is no such u."""
    return lambda s: -numpy.log(numpy.maximum(1 - alpha * s, 1e-300)) / alpha


def f_alpha(alpha: float) -> Callable[[Array], Array]:
    """f whose derivative is (1 - u^-alpha)/alpha."""
    return lambda u: (u - (u ** (1 - alpha) / (1 - alpha))) / alpha if alpha < 1 else u - numpy.log(u)


DIVERGENCES: dict[str, tuple[str, dict[str, Any], Callable[[Array], Array], Callable[[Array], Array], float]] = {
    "alpha-divergence, alpha = 0.5": ("alpha_divergence", {"alpha": 0.5}, inverse_alpha(0.5), f_alpha(0.5), 2.0),
    "forward KL": ("alpha_divergence", {"alpha": 1.0}, inverse_alpha(1.0), f_alpha(1.0), 1.0),
    "Jensen-Shannon": (
        "js_divergence", {}, lambda s: s - numpy.log(numpy.maximum(2 - numpy.exp(s), 1e-300)),
        lambda u: u * numpy.log(u) - (u + 1) * numpy.log((u + 1) / 2), math.log(2),
    ),
}  # fmt: skip


def optimum_under(world: World, divergence: str, beta: float = BETA) -> Array:
    """log pi with f'(pi/pi_ref) = (r - lambda)/beta, where lambda, found by bisection, makes pi sum to 1.  -> (P, N)"""
    _, _, inverse, _, most = DIVERGENCES[divergence]
    low = world.reward.max(axis=-1, keepdims=True) - beta * most  # f'(u) < most for every u
    high = low + 100 * max(beta, 1.0)
    for _ in range(200):
        middle = (low + high) / 2
        total = numpy.exp(world.ref_logp + inverse((world.reward - middle) / beta)).sum(axis=-1, keepdims=True)
        low, high = numpy.where(total > 1, middle, low), numpy.where(total > 1, high, middle)
    return world.ref_logp + inverse((world.reward - high) / beta)


def f_divergences(world: World, seed: int) -> Iterator[Claim]:
    """Another divergence has another optimum: f'(pi/pi_ref) = (r - lambda)/beta, with lambda such that pi sums to 1."""
    p, ref = exact.preference_probabilities(world.reward), numpy.exp(world.ref_logp)
    for text, (name, options, _, f, _) in DIVERGENCES.items():
        best = optimum_under(world, text)
        yield at_most(f"{text}: the gradient of its loss vanishes there", slope(world, name, best, p, **options), 1e-12)

        def objective(logp: Array, f: Callable[[Array], Array] = f) -> Array:
            u = numpy.exp(logp - world.ref_logp)
            return (numpy.exp(logp) * world.reward - BETA * ref * f(u)).sum(axis=-1)

        rng = stream(seed, "optima", name)
        near = [ops.log_softmax.raw(best + 0.1 * rng.normal(size=best.shape))[0] for _ in range(20)]
        number = float(min((objective(best) - objective(logp)).min() for logp in near))
        yield Claim(f"{text}: and policies near it have less E[r] - beta D", number, number > 0)


OPTIMA = (ipo, noisy_labels, f_divergences)
