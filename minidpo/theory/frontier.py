"""True reward against KL for every method: figure 2 (left) of the DPO paper in miniature, and exact.

No policy lies above the curve of pi*(beta), however it was made. Policies are tables here, and both axes are sums over
all responses. Unlike the paper's PPO, with its sampled gradients and its learned critic, the exact natural policy
gradient reaches the curve; one with sampled gradients is beside it. Anything learned from a finite set of pairs stays
below, with DPO and with a reward model alike; so do the optima of IPO, of smoothed labels and of other divergences.
"""

import statistics
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import numpy

from .. import ops
from ..backend import Array
from ..plots import Curve, Panel
from ..streams import stream
from ..tensor import Tensor
from . import equalities, exact, optima
from .equalities import ADAM, World, cosine, descent, fitted_table, natural_policy, pair_slope

BETAS = (0.05, 0.1, 1.0, 5.0)
ALPHAS = (0.05, 0.1, 0.5, 1.0)
PAIRS = 2000  # samples per prompt
STEPS = 300


class Point(NamedTuple):
    """The end of one run, averaged over the prompts."""

    kind: str
    strength: float  # beta, alpha or N
    seed: int
    kl: float  # KL(pi || pi_ref), nats
    reward: float  # E[r], true
    shortfall: float  # the most reward that any policy has at this KL, less this reward; negative above the curve


def best_of(world: World, count: int) -> Array:
    """log pi of the best of N samples of the reference.  -> (P, N)

    P(y) = F(r(y))^N - F(r(y)-)^N, where F is the reference's distribution function of rewards.
    """
    order = world.reward.argsort(axis=-1)
    p = numpy.take_along_axis(numpy.exp(world.ref_logp), order, axis=-1)
    below = numpy.minimum(numpy.concatenate([numpy.zeros((len(p), 1)), numpy.cumsum(p, axis=-1)], axis=-1), 1.0)
    ordered = numpy.diff(below**count, axis=-1)
    logp = numpy.empty_like(p)
    numpy.put_along_axis(logp, order, numpy.log(numpy.maximum(ordered, 1e-300)), axis=-1)
    return ops.log_softmax.raw(logp)[0]


def learned_reward(wins: Array, prior: float = 1e-3) -> Array:
    """Bradley-Terry rewards from sampled pairs; a normal prior keeps them finite.  -> (P, N)"""
    P, N, _ = wins.shape
    zeros = numpy.zeros((P, N))
    reward = {"reward": Tensor(zeros, requires_grad=True)}

    def loss(r: Tensor) -> Tensor:
        return pair_slope(r, zeros, wins, 1.0) + prior * ops.mean(r * r)

    return descent((reward, lambda: reward["reward"] * 1.0), loss, ADAM, cosine(STEPS, 1.0))[-1]


def sampled_policy(world: World, beta: float, rng: numpy.random.Generator, batch: int = 64) -> Array:
    """log pi after 1,000 REINFORCE steps, each on `batch` samples with their mean as the baseline.  -> (P, N)"""
    logits = world.ref_logp.copy()
    for _ in range(1000):
        logp = ops.log_softmax.raw(logits)[0]
        for x, row in enumerate(logp):
            p = numpy.exp(row)
            samples = rng.choice(len(p), size=batch, p=p / p.sum())
            advantage = (world.reward[x] - beta * (row - world.ref_logp[x]))[samples]
            weights = numpy.bincount(samples, advantage - advantage.mean(), len(p)) / batch
            logits[x] += 0.5 / max(beta, 1.0) * (weights - p * weights.sum())
    return ops.log_softmax.raw(logits)[0]


def unlikelihood(world: World, alpha: float, steps: int) -> Array:
    """Minimise -log pi(y_w) + alpha log pi(y_l) over pairs from the reference; alpha = 0 is preferred fine-tuning.

    No minimum exists if some response wins less than alpha times as often as it loses.  -> (P, N)
    """
    p = numpy.exp(world.ref_logp)
    wins = p[:, :, None] * p[:, None, :] * exact.preference_probabilities(world.reward)
    weights = (2 * wins.sum(axis=2) - alpha * 2 * wins.sum(axis=1)) / len(p)
    return fitted_table(world, lambda logp: -ops.sum(weights * logp), steps, 0.1)


def policies(world: World, seed: int) -> Iterator[tuple[str, float, Array]]:
    """Every run as its kind, its strength and log pi."""
    exact_wins = equalities.all_pairs(world)
    wins = equalities.sampled_wins(world, stream(seed, "frontier", "pairs"), PAIRS)
    reward = learned_reward(wins)

    for beta in BETAS:
        rng = stream(seed, "frontier", "samples", str(beta))
        loss = partial(pair_slope, ref_logp=world.ref_logp, wins=wins, beta=beta)
        yield f"DPO, 2,000 pairs, {STEPS} steps", beta, fitted_table(world, loss, STEPS, 0.1)
        yield "policy gradient, true reward", beta, natural_policy(world, world.reward, beta, 100)
        yield "DPO, exact preferences", beta, equalities.newton(world, exact_wins, beta)[0]
        yield "policy gradient, reward from 2,000 pairs", beta, natural_policy(world, reward, beta, 100)
        yield "policy gradient, sampled, 1,000 steps", beta, sampled_policy(world, beta, rng)
        yield "IPO, exact preferences", beta, optima.ipo_optimum(world, exact_wins, beta)
        smooth = (1 - optima.FLIPPED) * exact_wins + optima.FLIPPED * exact_wins.transpose(0, 2, 1)
        yield f"cDPO at e = {optima.FLIPPED}, exact preferences", beta, equalities.newton(world, smooth, beta)[0]
        for name in ("forward KL", "Jensen-Shannon"):
            yield f"DPO under {name}, exact preferences", beta, optima.optimum_under(world, name, beta)
    yield "preferred fine-tuning", 0.0, unlikelihood(world, 0.0, STEPS)
    for alpha in ALPHAS:
        for steps in (STEPS // 3, STEPS):  # two points on a path that does not end
            yield f"unlikelihood, {steps} steps", alpha, unlikelihood(world, alpha, steps)
    for count in (2, 4, 16, 64):
        yield "best of N", count, best_of(world, count)


def kl_and_reward(world: World, logp: Array) -> tuple[float, float]:
    """KL to the reference and true reward of a policy, as means over the prompts."""
    return float(exact.kl(logp, world.ref_logp).mean()), float((numpy.exp(logp) * world.reward).sum(axis=-1).mean())


def most_reward(world: World, kl: float) -> float:
    """The largest mean reward of any policy with at most this mean KL: that of pi*(beta) with this KL.

    From the reference, where beta is infinite and the KL 0, to the reference restricted to the best responses (beta 0).
    """
    best = world.reward.max(axis=-1, keepdims=True)
    top = ops.log_softmax.raw(numpy.where(world.reward == best, world.ref_logp, -numpy.inf))[0]
    if not 0 < kl < kl_and_reward(world, top)[0]:
        return kl_and_reward(world, top if kl > 0 else world.ref_logp)[1]
    low, high = numpy.ptp(world.reward) * numpy.array([1e-9, 1e9])
    for _ in range(70):  # of 42 in its logarithm, to rounding
        beta = (low * high) ** 0.5
        star, _ = exact.optimum(world.ref_logp, world.reward, beta)
        low, high = (beta, high) if kl_and_reward(world, star)[0] > kl else (low, beta)
    return kl_and_reward(world, exact.optimum(world.ref_logp, world.reward, low)[0])[1]


def run(seeds: Sequence[int], make: Callable[[int], World] = equalities.small_world) -> Iterator[Point]:
    """The point of every run in the world of every seed."""
    for seed in seeds:
        world = make(seed)
        for kind, strength, logp in policies(world, seed):
            kl, reward = kl_and_reward(world, logp)
            yield Point(kind, float(strength), seed, kl, reward, most_reward(world, kl) - reward)


def as_text(points: Sequence[Point]) -> str:
    """A row for each kind and strength: KL, reward and shortfall, mean ± standard deviation over the seeds."""
    rows = [f"{'':<46}{'strength':>9}{'KL, nats':>18}{'true reward':>18}{'below frontier':>18}"]
    for kind, strength in dict.fromkeys((point.kind, point.strength) for point in points):
        same = [point for point in points if (point.kind, point.strength) == (kind, strength)]
        row = f"{kind:<46}{strength:>9g}"
        for name in ("kl", "reward", "shortfall"):
            values = [getattr(point, name) for point in same]
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            row += f"{statistics.fmean(values):>z10.3f} ± {spread:5.3f}"
        rows.append(row)
    return "\n".join(rows)


def panels(points: Sequence[Point], make: Callable[[int], World] = equalities.small_world) -> list[Panel]:
    """A diagram of the frontier and the points of the first seed."""
    world = make(points[0].seed)
    betas = numpy.geomspace(1e-5, 50, 160)
    frontier = [kl_and_reward(world, exact.optimum(world.ref_logp, world.reward, beta)[0]) for beta in betas]
    curves = [Curve("the frontier, pi*(beta)", [kl for kl, _ in frontier], [reward for _, reward in frontier])]
    for number, kind in enumerate(dict.fromkeys(point.kind for point in points)):
        runs = [point for point in points if point.kind == kind and point.seed == points[0].seed]
        x, y = [point.kl for point in runs], [point.reward for point in runs]
        curves.append(Curve(kind, x, y, "osD^vP*X<>hpd"[number % 13], joined=False))
    return [Panel("reward and KL", "KL(pi || pi_ref), nats", "true reward", curves)]
