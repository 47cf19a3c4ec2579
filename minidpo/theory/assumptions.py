"""What breaks "equivalent, not an approximation": the optimum of DPO is pi* under assumptions, dropped here one by one.

Bradley-Terry labels, enough pairs, a reference with full support, and a policy class that can represent pi*.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy

from .. import losses, ops, optim
from ..backend import Array
from ..streams import stream
from ..tensor import Tensor
from . import exact
from .equalities import (
    Claim,
    World,
    all_pairs,
    at_most,
    descend,
    last,
    pair_loss,
    sampled_wins,
    square_loss,
    table_policy,
    transformer_policy,
)


class Outcome(NamedTuple):
    """Where a policy ends, averaged over the prompts."""

    name: str
    tv: float  # to pi*
    reward: float  # true, expected
    kl: float  # to the reference


def outcome(name: str, world: World, logp: Array, beta: float) -> Outcome:
    """Distance to pi*, true reward and KL of a policy."""
    star, _ = exact.optimum(world.ref_logp, world.reward, beta)
    reward = (numpy.exp(logp) * world.reward).sum(axis=-1)
    measures = (exact.total_variation(logp, star), reward, exact.kl(logp, world.ref_logp))
    return Outcome(name, *(float(measure.mean()) for measure in measures))


def what_breaks_it(world: World, seed: int, steps: int = 1500) -> list[Outcome]:
    """pi* at beta 0.5, and what DPO, conservative DPO and IPO reach where one assumption fails."""
    beta = 0.5
    probabilities = all_pairs(world)
    pairs = sampled_wins(world, stream(seed, "pairs"), 300)
    sure = (world.reward[:, :, None] > world.reward[:, None, :]).astype("float64")
    flip = 0.3
    flipped = (1 - flip) * probabilities + flip * probabilities.transpose(0, 2, 1)

    def fitted(loss: Callable[..., Tensor], wins: Array, ref_logp: Array = world.ref_logp) -> Array:
        params, log_policy = table_policy(world._replace(ref_logp=ref_logp))
        rates = [optim.warmup_cosine(s, steps, 0.3) for s in range(steps)]
        optimizer = optim.AdamW(params, weight_decay=0.0)
        return last(descend(params, log_policy, lambda p: loss(p, ref_logp, wins, beta), optimizer, rates))

    star, _ = exact.optimum(world.ref_logp, world.reward, beta)
    lame = world.ref_logp.copy()  # gives next to nothing to the ten best responses
    numpy.put_along_axis(lame, world.reward.argsort(axis=-1)[:, -10:], -300.0, axis=-1)
    lame = ops.log_softmax.raw(lame)[0]
    params, log_policy = transformer_policy(world, seed, 4, 1)
    optimizer = optim.AdamW(params, betas=(0.9, 0.99), weight_decay=0.0)
    small = last(
        descend(
            params, log_policy, lambda p: pair_loss(p, world.ref_logp, probabilities, beta), optimizer, [1e-2] * 300
        )
    )
    smoothed = (1 - flip) * flipped + flip * flipped.transpose(0, 2, 1)
    return [
        outcome("pi*", world, star, beta),
        outcome("the reference", world, world.ref_logp, beta),
        outcome("DPO, nothing broken", world, fitted(pair_loss, probabilities), beta),
        outcome("DPO, 300 sampled pairs a prompt", world, fitted(pair_loss, pairs), beta),
        outcome("IPO, 300 sampled pairs a prompt", world, fitted(square_loss, pairs), beta),
        outcome("DPO, labels without noise", world, fitted(pair_loss, sure), beta),
        outcome("IPO, labels without noise", world, fitted(square_loss, sure), beta),
        outcome(f"DPO, {flip:.0%} of labels flipped", world, fitted(pair_loss, flipped), beta),
        outcome(f"cDPO at e = {flip:g}, {flip:.0%} of labels flipped", world, fitted(pair_loss, smoothed), beta),
        outcome(f"IPO, {flip:.0%} of labels flipped", world, fitted(square_loss, flipped), beta),
        outcome(
            "DPO, a reference without support for the ten best", world, fitted(pair_loss, probabilities, lame), beta
        ),
        outcome("DPO, a transformer too small (1 layer of width 4)", world, small, beta),
    ]


def finite_margins(world: World, seed: int) -> Iterator[Claim]:
    """Labels that are certain: a DPO margin grows as long as one trains, an IPO margin stops at 1/(2 tau)."""
    beta, pair = 0.1, [Tensor(numpy.array([-5.0, -7.0]), requires_grad=True) for _ in range(2)]
    margins: list[list[float]] = []
    for leaf, loss, rate in zip(pair, (losses.dpo_loss, losses.ipo_loss), (10.0, 0.1)):
        seen = []
        for step in range(10_000):
            leaf.grad = None
            out = loss(leaf[:1], leaf[1:], numpy.array([-5.0]), numpy.array([-7.0]), beta)
            out.loss.backward()
            leaf.data = leaf.data - rate * leaf.grad
            if step + 1 in (100, 1000, 10_000):
                seen.append(out.margin.item())
        margins.append(seen)
    grown = margins[0][2] / margins[0][1]
    text = ", ".join(f"{margin:.0f}" for margin in margins[0])
    yield Claim(f"DPO, one certain pair: margin {text} after 100, 1000, 10000 steps; grown by", grown, grown > 1.2)
    yield at_most(
        f"IPO, the same pair: the margin is 1/(2 tau) = {1 / (2 * beta):g}", abs(margins[1][2] - 1 / (2 * beta)), 1e-9
    )
