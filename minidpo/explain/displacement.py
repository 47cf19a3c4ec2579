"""Displacement: training on a preference can make the preferred response less likely.

The DPO loss rewards a margin, not a likely chosen response. To first order a step makes the chosen response less likely
if K_wl > K_ww (`step`). This file predicts it for a pair, counts it over many, and proves it for three words.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy

from .. import losses, ops, optim, training
from ..backend import Array
from ..model import Config, Params
from ..scoring import Pair, collate, sequence_logprob
from ..tensor import Tensor
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
    pairs: Sequence[Pair],
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


# ---- three words ---------------------------------------------------------------------------------------------

WORDS = ("no", "never", "yes")
VECTORS = numpy.array([[1.0, 1.0], [0.0, 0.0], [5.0, 0.0]])  # u, one row for each word
CHOSEN, REJECTED = 0, 1


def word_logps(h: Tensor) -> Tensor:
    """A model with two parameters: log pi = log_softmax(u . h).  (2,) -> (3,)"""
    return ops.log_softmax(ops.sum(VECTORS * h, axis=-1))


def slope(nll_weight: float, beta: float) -> float:
    """The first slope of log pi("no") under gradient flow from the reference, h = 0.

    With E[u] the mean word vector under the model and sigma(0) = 1/2,

        dh/dt = (beta/2) (u_no - u_never) + nll_weight (u_no - E[u])
        d log pi(no)/dt = <u_no - E[u], dh/dt>
    """
    mean = VECTORS.mean(axis=0)  # at h = 0 all words are equally likely
    toward = VECTORS[CHOSEN] - mean
    force = beta / 2 * (VECTORS[CHOSEN] - VECTORS[REJECTED]) + nll_weight * toward
    return float(toward @ force)


class Words(NamedTuple):
    """The three words after training on one pair, "no" over "never"."""

    nll_weight: float
    slope: float  # of log pi("no") at the start, nats per unit of time
    path: Array  # (steps + 1, 3): the log-probabilities
    loss: float  # the DPO loss at the end
    beta: float
    learning_rate: float


def three_words(nll_weight: float = 0.0, beta: float = 0.5, steps: int = 2000, learning_rate: float = 0.1) -> Words:
    """Train on "no" over "never": without the likelihood term, "yes" ends up with all the probability.

    The proof: h starts at 0 and every gradient of the pair points along d = u_no - u_never = u_no. So h = s d, and s
    rises for ever. Then d log pi(no)/ds = <u_no, d> - E[<u, d>], which is 2 - 7/3 < 0 at s = 0. E[<u, d>] grows with s,
    since its derivative is the variance of <u, d>. So log pi(no) falls at every step, without bound, while the margin
    2 s grows and the loss goes to 0.
    Sources: after Razin et al. 2024 (arXiv 2410.08847), whose models go from "no" over "never" to "yes"; for the
    likelihood term, Pang et al. 2024 (arXiv 2404.19733).
    """
    h = Tensor(numpy.zeros(2), requires_grad=True)
    reference = word_logps(h.detach()).data
    optimizer = optim.SGD({"h": h}, learning_rate)
    path, loss = [], 0.0
    for number in range(steps + 1):
        logps = word_logps(h)
        out = losses.dpo_loss(logps[CHOSEN], logps[REJECTED], reference[CHOSEN], reference[REJECTED], beta)
        path.append(logps.data)
        loss = out.loss.item()
        if number < steps:
            optimizer.zero_grad()
            (out.loss - nll_weight * logps[CHOSEN]).backward()
            optimizer.step()
    return Words(nll_weight, slope(nll_weight, beta), numpy.array(path), loss, beta, learning_rate)


def words_as_text(runs: Sequence[Words]) -> str:
    """A table with one line for each weight of the likelihood term."""
    first = runs[0]
    lines = [
        f'One pair, "{WORDS[CHOSEN]}" over "{WORDS[REJECTED]}", in a model of three words: beta {first.beta:g}, '
        f"{len(first.path) - 1} steps of rate {first.learning_rate:g}. At the reference each has log pi "
        f"{first.path[0][0]:.3f}.",
        f"{'weight of NLL':>13}{'first slope':>13}"
        + "".join(f"{f'log pi({word})':>15}" for word in WORDS)
        + f"{'DPO loss':>10}",
    ]
    for run in runs:
        ends = "".join(f"{logp:>15.3f}" for logp in run.path[-1])
        lines.append(f"{run.nll_weight:>13g}{run.slope:>+13.4f}{ends}{run.loss:>10.4f}")
    return "\n".join(lines)
