"""Displacement: training on a preference can make the preferred response less likely.

The DPO loss rewards a margin, not a likely chosen response. To first order a step makes the chosen response less likely
if K_wl > K_ww (`step`). This file predicts it for a pair and counts it over many;
theory/no_never_yes.py proves it for three words.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy

from .. import optim, training
from ..model import Config, Params
from ..scoring import Pair, collate, sequence_logprob
from .tokens import PairView, double, pair
from .ways import gradients

ROUNDING = 1e-11  # nats: a smaller change of a log-probability may be rounding


@dataclass(frozen=True)
class Change:
    """The change of one log-probability by a step, in nats: to first order, and measured."""

    own: float  # from the gradient of this response's log-probability
    cross: float  # from that of the other response
    predicted: float  # their sum
    measured: float


@dataclass(frozen=True)
class Step:
    """The effect of one step on one pair on the log-probabilities of its responses.

    K_ab = <grad log pi(y_a|x), grad log pi(y_b|x)>, over all parameters.
    """

    learning_rate: float
    K_ww: float
    K_wl: float
    K_ll: float
    chosen: Change
    rejected: Change


def step(
    policy: Params,
    config: Config,
    view: PairView,
    learning_rate: float = 1e-6,
    optimizer: Callable[[Params, float], optim.Optimizer] = optim.SGD,
) -> Step:
    """Predict to first order what a training step on a pair does to both log-probabilities, then take it and measure.

        theta <- theta - rate (c_w grad_w + c_l grad_l),   c_w = -beta sigma(-z) = -c_l,   grad_a = grad log pi(y_a|x)
        change of log pi(y_a|x) = -rate (c_w K_wa + c_l K_la) + O(rate^2)
                                = rate beta sigma(-z) (K_ww - K_wl) for the chosen, (K_wl - K_ll) for the rejected

    So the chosen response becomes less likely if K_wl > K_ww. The policy itself does not change. The prediction is for
    plain gradient descent; an `optimizer` such as AdamW rescales each parameter and breaks it.
    Sources: Ren and Sutherland 2024 (arXiv 2407.10490) for the decomposition; Razin et al. 2024 (arXiv 2410.08847).
    """
    x, w, l = view.ids
    c_w, c_l = -view.beta * view.weight, view.beta * view.weight
    arrays = {name: p.data for name, p in double(policy).items()}
    grad_w = gradients(arrays, lambda leaves: sequence_logprob(leaves, config, [x], [w]))
    grad_l = gradients(arrays, lambda leaves: sequence_logprob(leaves, config, [x], [l]))
    K_ww, K_wl, K_ll = (
        math.fsum(float((a[name] * b[name]).sum()) for name in a)
        for a, b in ((grad_w, grad_w), (grad_w, grad_l), (grad_l, grad_l))
    )
    stepped = double(policy)
    batch = collate([view.ids], numpy.array([view.ref_logp_w]), numpy.array([view.ref_logp_l]))
    training.dpo_training_step(stepped, {}, config, optimizer(stepped, learning_rate), batch, view.beta)
    logp_w, logp_l = training.reference_logprobs(double(stepped, False), config, [view.ids])
    chosen, rejected = (
        Change(-learning_rate * own, -learning_rate * cross, -learning_rate * (own + cross), after.item() - before)
        for own, cross, after, before in (
            (c_w * K_ww, c_l * K_wl, logp_w, view.logp_w),
            (c_l * K_ll, c_w * K_wl, logp_l, view.logp_l),
        )
    )
    return Step(learning_rate, K_ww, K_wl, K_ll, chosen, rejected)


def meter(
    policy: Params,
    reference: Params,
    config: Config,
    pairs: Iterable[Pair],
    beta: float = 0.1,
    learning_rate: float = 1e-6,
    reference_config: Config | None = None,
) -> list[Step]:
    """One step on each pair alone, predicted and taken; the policy does not change."""
    views = (pair(policy, reference, config, *ids, beta, reference_config=reference_config) for ids in pairs)
    return [step(policy, config, view, learning_rate) for view in views]


def meter_as_text(steps: Sequence[Step]) -> str:
    """How many pairs push their chosen response down, and how often the prediction had the correct sign."""
    count = sum(step.K_wl > step.K_ww for step in steps)
    moves = [step.chosen for step in steps if abs(step.chosen.predicted) > ROUNDING]
    falls = sum(move.measured < 0 for move in moves)
    agree = sum((move.predicted < 0) == (move.measured < 0) for move in moves)
    return (
        f"{len(steps)} pairs: the kernel predicts that {count} lower their own log pi(chosen), because K_wl > K_ww. A "
        f"step on the pair alone moves it by more than rounding ({ROUNDING:g} nats) in {len(moves)}: it fell in "
        f"{falls}, and its sign was the predicted one in {agree}"
    )
