"""Displacement on three words: a preferred word that becomes less likely at every step, with the proof.

The model has two parameters, h, and a fixed vector u for each word.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy

from .. import losses, ops, optim
from ..backend import Array
from ..tensor import Tensor

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


def as_text(runs: Sequence[Words]) -> str:
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
