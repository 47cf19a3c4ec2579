"""Displacement: a preferred response that becomes less likely by being preferred.

The DPO loss asks for a margin, not for a likely chosen response. To first order a step makes it less likely where
K_wl > K_ww (`step`). Here that is predicted of a pair, counted over many, and proved on three words.
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
from .tokens import PairView, double, gradients, pair

ROUNDING = 1e-11  # nats: a smaller change of a log-probability cannot be told from rounding


@dataclass(frozen=True)
class Change:
    """The change of one log-probability by a step, in nats; to first order, and as it was."""

    own: float  # by what the loss asks of this response itself
    cross: float  # by what it asks of the other one
    predicted: float  # their sum
    measured: float


@dataclass(frozen=True)
class Step:
    """What one step on one pair does to the log-probabilities of its responses.

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
    """Predict to first order what a training step on a pair does to both log-probabilities, then take one and look.

        theta <- theta - rate (c_w grad_w + c_l grad_l),   c_w = -beta sigma(-z) = -c_l,   grad_a = grad log pi(y_a|x)
        change of log pi(y_a|x) = -rate (c_w K_wa + c_l K_la) + O(rate^2)
                                = rate beta sigma(-z) (K_ww - K_wl) for the chosen, (K_wl - K_ll) for the rejected

    So the chosen response becomes less likely where K_wl > K_ww. The policy itself stays as it is. What is predicted
    is plain gradient descent: another `optimizer` (AdamW, say) rescales each parameter, and breaks it.

    References
    ----------
    Ren and Sutherland 2024 (arXiv 2407.10490) for the decomposition; Razin et al. 2024 (arXiv 2410.08847).
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
    """One step on each pair by itself, predicted and taken; the policy stays as it is."""
    views = (pair(policy, reference, config, *ids, beta, reference_config=reference_config) for ids in pairs)
    return [step(policy, config, view, learning_rate) for view in views]


def meter_as_text(steps: Sequence[Step]) -> str:
    """How many pairs push their chosen response down, and how often the prediction had the right sign."""
    falls = sum(told.K_wl > told.K_ww for told in steps)
    seen = [told for told in steps if abs(told.chosen.predicted) > ROUNDING]
    fell = sum(told.chosen.measured < 0 for told in seen)
    agree = sum((told.chosen.predicted < 0) == (told.chosen.measured < 0) for told in seen)
    return (
        f"{len(steps)} pairs: by the kernel (K_wl > K_ww) {falls} lower their own log pi(chosen). In {len(seen)} a "
        f"step on the pair alone moves it by more than rounding ({ROUNDING:g} nats): it fell in {fell}, and the sign "
        f"was the predicted one in {agree}"
    )


# ---- three words ---------------------------------------------------------------------------------------------

WORDS = ("no", "never", "yes")
VECTORS = numpy.array([[1.0, 1.0], [0.0, 0.0], [5.0, 0.0]])  # u, one a word
CHOSEN, REJECTED = 0, 1


def word_logps(h: Tensor) -> Tensor:
    """A model of two numbers: log pi = log_softmax(u . h).  (2,) -> (3,)"""
    return ops.log_softmax(ops.sum(VECTORS * h, axis=-1))


def slope(nll_weight: float, beta: float) -> float:
    """How fast log pi("no") begins to rise under gradient flow, from the reference h = 0.

    With E[u] the mean word vector under the model and sigma(0) = 1/2,

        dh/dt = (beta/2) (u_no - u_never) + nll_weight (u_no - E[u])
        d log pi(no)/dt = <u_no - E[u], dh/dt>
    """
    mean = VECTORS.mean(axis=0)  # all words are equally likely there
    toward = VECTORS[CHOSEN] - mean
    force = beta / 2 * (VECTORS[CHOSEN] - VECTORS[REJECTED]) + nll_weight * toward
    return float(toward @ force)


class Words(NamedTuple):
    """The three words after training on the one pair "no" over "never"."""

    nll_weight: float
    slope: float  # of log pi("no") at the beginning, nats per unit of time
    path: Array  # (steps + 1, 3): the log-probabilities
    loss: float  # the DPO loss at the end
    beta: float
    learning_rate: float


def three_words(nll_weight: float = 0.0, beta: float = 0.5, steps: int = 2000, learning_rate: float = 0.1) -> Words:
    """Train on "no" over "never": without the likelihood term "yes" takes all.

    Why it must: h starts at 0 and every gradient of the pair points along d = u_no - u_never = u_no, so h = s d with s
    rising for ever. There d log pi(no)/ds = <u_no, d> - E[<u, d>], which is 2 - 7/3 < 0 at s = 0; and E[<u, d>] grows
    with s, since its derivative is the variance of <u, d>. So log pi(no) falls at every step, without bound, while
    the margin, 2 s, grows and the loss goes to 0.

    References
    ----------
    In the manner of Razin et al. 2024 (arXiv 2410.08847), whose models go from "no" over "never" to "yes"; for the
    likelihood term, Pang et al. 2024 (arXiv 2404.19733).
    """
    h = Tensor(numpy.zeros(2), requires_grad=True)
    reference = word_logps(h.detach()).data
    optimizer = optim.SGD({"h": h}, learning_rate)
    path, loss = [], 0.0
    for at in range(steps + 1):
        logps = word_logps(h)
        out = losses.dpo_loss(logps[CHOSEN], logps[REJECTED], reference[CHOSEN], reference[REJECTED], beta)
        path.append(logps.data)
        loss = out.loss.item()
        if at < steps:
            optimizer.zero_grad()
            (out.loss - nll_weight * logps[CHOSEN]).backward()
            optimizer.step()
    return Words(nll_weight, slope(nll_weight, beta), numpy.array(path), loss, beta, learning_rate)


def words_as_text(runs: Sequence[Words]) -> str:
    """One weight of the likelihood term a line."""
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
