"""Every gradient of one preference pair in four ways: by formula, by formula per logit, by autograd, by difference."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy

from .. import losses, ops
from ..backend import Array
from ..model import Config, Params
from ..scoring import shared_logprobs
from ..tensor import Tensor
from .tokens import PairView, context_gradient, context_logits, context_logprobs, context_rows, double, quoted


class Ways(NamedTuple):
    """One partial derivative of the loss, computed in four ways; None where a way does not apply."""

    name: str
    by_logps: float  # the closed form in the log-probabilities of the responses
    by_logits: float | None  # the closed form in the logits
    autograd: float
    finite: float  # central difference


def four_ways(policy: Params, config: Config, view: PairView) -> list[Ways]:
    """The DPO gradient of a pair by formula, by formula per logit, by autograd and by finite difference.

    There is a row for each of the four log-probabilities, for the six tokens whose own logits are pushed hardest, and
    for the largest entry of each parameter's gradient. A formula reaches the parameters by the chain rule: the first
    through the gradients of log pi(y_w|x) and log pi(y_l|x), the second through that of the logits.
    """
    logps = {name: numpy.array([getattr(view, name)]) for name in ("logp_w", "logp_l", "ref_logp_w", "ref_logp_l")}
    logp_w, logp_l, ref_logp_w, ref_logp_l = logps.values()
    closed_w, closed_l = losses.dpo_gradient(logp_w, logp_l, ref_logp_w, ref_logp_l, view.beta)
    rows: list[Ways] = []

    def compare(
        points: dict[str, Array],
        logps_of: Callable[[Params], tuple[Tensor, Tensor]],
        by_logits: dict[str, Array],
        entries: Sequence[tuple[str, str, tuple[int, ...]]],
    ) -> None:
        def loss(leaves: Params) -> Tensor:
            return losses.dpo_loss(*logps_of(leaves), ref_logp_w, ref_logp_l, view.beta).loss

        def linear(leaves: Params) -> Tensor:
            logp_w, logp_l = logps_of(leaves)
            return ops.sum(closed_w * logp_w + closed_l * logp_l)

        by_logps, autograd = gradients(points, linear), gradients(points, loss)
        for title, name, entry in entries:
            first, second, third = (float(g[name][entry]) for g in (by_logps, by_logits, autograd))
            rows.append(Ways(title, first, second, third, difference(points, name, entry, loss, view.beta)))

    def of_logps(leaves: Params) -> Tensor:
        w, l, ref_w, ref_l = leaves.values()
        return losses.dpo_loss(w, l, ref_w, ref_l, view.beta).loss

    autograd = gradients(logps, of_logps)
    for name, closed in zip(logps, (closed_w, closed_l, -closed_w, -closed_l)):
        rows.append(
            Ways(name, closed.item(), None, autograd[name].item(), difference(logps, name, (0,), of_logps, view.beta))
        )

    constants = double(policy, False)
    logits = context_logits(constants, config, view.ids).data
    gradient = context_gradient(logits, view.ids, closed_w.item(), closed_l.item())
    compare(
        {"logits": logits},
        lambda leaves: sums(context_logprobs(leaves["logits"], view.ids)),
        {"logits": gradient},
        [(title, "logits", entry) for title, entry in hardest_pushed(view)],
    )
    arrays = {name: p.data for name, p in constants.items()}
    through_logits = gradients(arrays, lambda leaves: context_logits(leaves, config, view.ids), gradient)
    largest = {name: numpy.unravel_index(abs(g).argmax(), g.shape) for name, g in through_logits.items()}
    entries = [(f"{name}[{', '.join(map(str, at))}]", name, at) for name, at in largest.items()]
    compare(arrays, lambda leaves: shared_logprobs(leaves, config, [view.ids]), through_logits, entries)
    return rows


def gradients(
    points: dict[str, Array], output: Callable[[Params], Tensor], cotangent: Array | None = None
) -> dict[str, Array]:
    """The gradient of an output with respect to each array, by one sweep."""
    leaves = {name: Tensor(x, requires_grad=True) for name, x in points.items()}
    output(leaves).backward(cotangent)
    return {name: leaf.grad for name, leaf in leaves.items()}


def difference(
    points: dict[str, Array], name: str, entry: Any, output: Callable[[Params], Tensor], beta: float
) -> float:
    """(f(x + h) - f(x - h))/2h in one entry of one array; h is far below 1/beta, where the loss bends."""
    h = 1e-5 * max(1.0, abs(points[name][entry])) / max(1.0, beta)
    values = []
    for step in (h, -h):
        moved = points[name].copy()
        moved[entry] += step
        values.append(output({key: Tensor(x) for key, x in {**points, name: moved}.items()}).item())
    return float((values[0] - values[1]) / (2 * h))


def sums(parts: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """The sums of two tensors.  -> (1,), (1,)"""
    w, l = (ops.reshape(ops.sum(part), (1,)) for part in parts)
    return w, l


def hardest_pushed(view: PairView, most: int = 6) -> list[tuple[str, tuple[int, int]]]:
    """The tokens whose own logits are pushed hardest, as names and entries of the context logits."""
    tokens = [
        (f"{side} token {t}, {quoted(token.token)}", (row, token.id), token)
        for side, part, rows in zip(("chosen", "rejected"), (view.chosen, view.rejected), context_rows(view.ids))
        for t, (token, row) in enumerate(zip(part, rows))
        if token.row != "shared"
    ]
    return [(name, entry) for name, entry, _ in sorted(tokens, key=lambda item: -abs(item[2].push))[:most]]


def largest_differences(rows: Sequence[Ways]) -> tuple[float, float]:
    """The largest difference between two of the first three ways, and between one of them and the last."""
    exact = [[way for way in row[1:4] if way is not None] for row in rows]
    return (
        max(max(ways) - min(ways) for ways in exact),
        max(abs(way - row.finite) for row, ways in zip(rows, exact) for way in ways),
    )
