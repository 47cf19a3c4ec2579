"""The optimum of DPO is pi* under four assumptions; here each is dropped in turn.

Bradley-Terry labels, enough pairs, a reference with full support, and a policy class that can represent pi*.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import numpy

from .. import losses, ops
from ..backend import Array
from ..streams import stream
from ..tensor import Tensor
from . import exact
from .equalities import (
    Claim,
    World,
    all_pairs,
    at_most,
    fitted_table,
    fitted_transformer,
    pair_loss,
    sampled_wins,
    square_loss,
)


class Outcome(NamedTuple):
    """Distances and reward of a policy, averaged over the prompts."""

    name: str
    tv: float  # to pi*
    reward: float  # true, in expectation
    kl: float  # to the reference


def outcome(name: str, world: World, logp: Array, beta: float) -> Outcome:
    """Distance to pi*, true reward and KL of the policy log pi, (P, N)."""
    star, _ = exact.optimum(world.ref_logp, world.reward, beta)
    reward = (numpy.exp(logp) * world.reward).sum(axis=-1)
    measures = (exact.total_variation(logp, star), reward, exact.kl(logp, world.ref_logp))
    return Outcome(name, *(float(measure.mean()) for measure in measures))


def what_breaks_it(world: World, seed: int, steps: int = 1500) -> list[Outcome]:
    """pi* at beta 0.5, and the policies that DPO, conservative DPO and IPO reach when one assumption fails."""
    beta = 0.5
    probabilities = all_pairs(world)
    pairs = sampled_wins(world, stream(seed, "pairs"), 300)
    certain = (world.reward[:, :, None] > world.reward[:, None, :]).astype("float64")
    flip = 0.3
    flipped = (1 - flip) * probabilities + flip * probabilities.transpose(0, 2, 1)

    def table(loss: Callable[..., Tensor], wins: Array, ref_logp: Array = world.ref_logp) -> Array:
        loss = partial(loss, ref_logp=ref_logp, wins=wins, beta=beta)
        return fitted_table(world._replace(ref_logp=ref_logp), loss, steps, 0.3)

    star, _ = exact.optimum(world.ref_logp, world.reward, beta)
    narrow = world.ref_logp.copy()  # gives almost no probability to the ten best responses
    numpy.put_along_axis(narrow, world.reward.argsort(axis=-1)[:, -10:], -300.0, axis=-1)
    narrow = ops.log_softmax.raw(narrow)[0]
    small = fitted_transformer(world, probabilities, beta, seed, 4, 1, 300)
    smoothed = (1 - flip) * flipped + flip * flipped.transpose(0, 2, 1)
    return [
        outcome("pi*", world, star, beta),
        outcome("the reference", world, world.ref_logp, beta),
        outcome("DPO, nothing broken", world, table(pair_loss, probabilities), beta),
        outcome("DPO, 300 sampled pairs a prompt", world, table(pair_loss, pairs), beta),
        outcome("IPO, 300 sampled pairs a prompt", world, table(square_loss, pairs), beta),
        outcome("DPO, labels without noise", world, table(pair_loss, certain), beta),
        outcome("IPO, labels without noise", world, table(square_loss, certain), beta),
        outcome(f"DPO, {flip:.0%} of labels flipped", world, table(pair_loss, flipped), beta),
        outcome(f"cDPO at e = {flip:g}, {flip:.0%} of labels flipped", world, table(pair_loss, smoothed), beta),
        outcome(f"IPO, {flip:.0%} of labels flipped", world, table(square_loss, flipped), beta),
        outcome(
            "DPO, a reference without support for the ten best", world, table(pair_loss, probabilities, narrow), beta
        ),
        outcome("DPO, a transformer too small (1 layer of width 4)", world, small, beta),
    ]


def finite_margins(world: World, seed: int) -> Iterator[Claim]:
    """With certain labels a DPO margin grows for as long as training lasts; an IPO margin stops at 1/(2 tau)."""
    beta, margins = 0.1, []
    for loss, rate in ((losses.dpo_loss, 10.0), (losses.ipo_loss, 0.1)):
        logps, path = Tensor(numpy.array([-5.0, -7.0]), requires_grad=True), []
        for _ in range(10_000):
            logps.grad = None
            out = loss(logps[:1], logps[1:], numpy.array([-5.0]), numpy.array([-7.0]), beta)
            out.loss.backward()
            logps.data = logps.data - rate * logps.grad
            path.append(out.margin.item())
        margins.append([path[steps - 1] for steps in (100, 1000, 10_000)])
    growth = margins[0][2] / margins[0][1]
    text = ", ".join(f"{margin:.0f}" for margin in margins[0])
    yield Claim(f"DPO, one certain pair: margin {text} at steps 100, 1000, 10000; last growth", growth, growth > 1.2)
    yield at_most(
        f"IPO, the same pair: distance of the margin to 1/(2 tau) = {1 / (2 * beta):g}",
        abs(margins[1][2] - 1 / (2 * beta)),
        1e-9,
    )
