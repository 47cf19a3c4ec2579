"""Every gradient of one preference pair, made visible: token by token, and four ways.

Everything is computed in float64, whatever the weights are kept in. A row of logits belongs to a context, the
prompt and the tokens so far; so as long as the responses agree they share their rows, and the row at which they
part predicts a token of each.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy

from .. import losses, ops
from ..backend import Array, to_host
from ..model import Config, Params, forward
from ..scoring import Pair, collate, shared_logprobs
from ..tensor import Tensor
from ..tokenizer import END_OF_TEXT, Tokenizer
from .graphs import graph as graph

END = "<|endoftext|>"  # what end-of-text is called
Moved = tuple[str, float]  # a token, and how hard its logit is pushed


@dataclass(frozen=True)
class TokenView:
    """One token of a response, as the loss sees it; s is the row of logits that predicts it."""

    token: str
    id: int
    row: str  # "shared" by both responses' equal tokens, "branch" where they part, "own"
    probability: float
    logp: float  # nats
    ref_logp: float
    log_ratio: float  # logp - ref_logp
    reward: float  # beta (sum of the log-ratios so far): the implicit reward of the response up to here
    coefficient: float  # dL/dlogp: -beta sigma(-z) in the chosen response, +beta sigma(-z) in the rejected
    push: float  # -dL/ds at the token itself
    gradient_norm: float  # |dL/ds|
    up: list[Moved]  # the logits of s that a step down the gradient raises most, with -dL/ds
    down: list[Moved]  # and lowers most


@dataclass(frozen=True)
class PairView:
    """One pair under the DPO loss."""

    prompt: list[str]
    chosen: list[TokenView]
    rejected: list[TokenView]
    shared: int  # tokens at the beginning that both responses have
    beta: float
    logp_w: float
    logp_l: float
    ref_logp_w: float
    ref_logp_l: float
    policy_gap: float  # logp_w - logp_l
    reference_gap: float
    margin: float  # their difference
    reward_w: float
    reward_l: float
    weight: float  # sigma(-z), z = beta margin
    loss: float
    says: str
    ids: Pair

    def as_dict(self) -> dict[str, Any]:
        """The same as dicts, lists, strings and numbers, which `json.dumps` takes."""
        return asdict(self)


def quoted(token: str) -> str:
    """A token as a terminal can be trusted with it: a character stands in quotes, so that a space is seen."""
    return token if len(token) > 1 else repr(token)


def double(params: Params, requires_grad: bool = True) -> Params:
    """A copy on the host, in float64."""
    return {name: Tensor(to_host(p.data).astype("float64"), requires_grad) for name, p in params.items()}


def shared_rows(w: Sequence[int], l: Sequence[int]) -> tuple[int, int]:
    """How many tokens two responses begin with alike, and how many rows of logits they share."""
    alike = next((t for t, (a, b) in enumerate(zip(w, l)) if a != b), min(len(w), len(l)))
    return alike, min(alike + 1, len(w), len(l))


def context_logits(params: Params, config: Config, pair: Pair) -> Tensor:
    """The logits of a pair's contexts, each once: the chosen response's, then the rejected one's own.  (N, V)"""
    x, w, l = pair
    _, rows = shared_rows(w, l)
    of_w, of_l = (forward(params, config, [[*x, *y][:-1]])[0, len(x) - 1 :] for y in (w, l))  # (Tw, V), (Tl, V)
    return ops.concatenate(of_w, of_l[rows:])  # (Tw + Tl - rows, V)


def context_rows(pair: Pair) -> tuple[list[int], list[int]]:
    """Which of those rows predicts each token of the chosen and of the rejected response."""
    _, w, l = pair
    _, rows = shared_rows(w, l)
    return list(range(len(w))), [*range(rows), *range(len(w), len(w) + len(l) - rows)]


def context_logprobs(logits: Tensor, pair: Pair) -> tuple[Tensor, Tensor]:
    """Log-probability of each token of the chosen and of the rejected response.  (N, V) -> (Tw,), (Tl,)"""
    logp = ops.log_softmax(logits)
    w, l = (ops.gather(logp[numpy.array(rows)], list(y)) for rows, y in zip(context_rows(pair), pair[1:]))
    return w, l


def context_gradient(logits: Array, pair: Pair, gradient_w: float, gradient_l: float) -> Array:
    """dL/dlogits in closed form, from dL/dlogp_w and dL/dlogp_l.  (N, V)

        dL/ds = sum of c (onehot(y) - softmax(s)) over the tokens y that the row s predicts,
        c = dL/dlogp_w = -beta sigma(-z) for a token of the chosen response, dL/dlogp_l for one of the rejected

    Two equal tokens cancel, for dL/dlogp_l = -dL/dlogp_w; where the responses part only the softmax does.
    """
    onehot = numpy.eye(logits.shape[1])
    probability = ops.softmax.raw(logits)[0]
    gradient = numpy.zeros(logits.shape)
    for c, rows, y in zip((gradient_w, gradient_l), context_rows(pair), pair[1:]):
        for row, token in zip(rows, y):
            gradient[row] += c * (onehot[token] - probability[row])
    return gradient


def pair(
    policy: Params,
    reference: Params,
    config: Config,
    prompt: Sequence[int],
    chosen: Sequence[int],
    rejected: Sequence[int],
    beta: float = 0.1,
    tokenizer: Tokenizer | None = None,
    reference_config: Config | None = None,
) -> PairView:
    """One pair, token by token: what each token contributes to the loss, and what the loss asks of each.

    Parameters
    ----------
    policy, reference : dict of str to Tensor
    config : Config
    prompt, chosen, rejected : integers
        Ids, as `preferences.encode` makes them.
    beta : float
        Reward per nat of log-ratio.
    tokenizer : Tokenizer, optional
        Names the tokens; without it they are named by their ids, as #7.
    reference_config : Config, optional
        If the reference has another shape.

    Raises
    ------
    ValueError
        If a part is empty, or a text is too long for the model.
    FloatingPointError
        If a log-probability is not finite.

    References
    ----------
    Rafailov et al. 2023 (arXiv 2305.18290), section 4, "What does the DPO update do?".
    """
    x, w, l = ids = (list(map(int, prompt)), list(map(int, chosen)), list(map(int, rejected)))
    collate([ids])  # refuses empty parts
    logits = context_logits(double(policy, False), config, ids)
    ref_logits = context_logits(double(reference, False), reference_config or config, ids)
    token_logps = [logp.data for logp in context_logprobs(logits, ids)]
    ref_token_logps = [logp.data for logp in context_logprobs(ref_logits, ids)]
    logp_w, logp_l, ref_logp_w, ref_logp_l = (float(logp.sum()) for logp in (*token_logps, *ref_token_logps))
    for name, logps in (("policy", (logp_w, logp_l)), ("reference", (ref_logp_w, ref_logp_l))):
        if not all(map(math.isfinite, logps)):
            raise FloatingPointError(f"a log-probability under the {name} is not finite")
    out = losses.dpo_loss(logp_w, logp_l, ref_logp_w, ref_logp_l, beta)
    gradient_w, gradient_l = map(float, losses.dpo_gradient(logp_w, logp_l, ref_logp_w, ref_logp_l, beta))
    gradient = context_gradient(logits.data, ids, gradient_w, gradient_l)
    alike, rows_shared = shared_rows(w, l)

    def named(token: int) -> str:
        text = f"#{token}" if tokenizer is None else tokenizer.decode([token])
        return END if token == END_OF_TEXT else text

    def views(side: int) -> list[TokenView]:
        told = []
        ratios = token_logps[side] - ref_token_logps[side]
        for t, (token, row) in enumerate(zip(ids[1 + side], context_rows(ids)[side])):
            push = -gradient[row]
            order = [int(i) for i in push.argsort(kind="stable")]
            told.append(
                TokenView(
                    token=named(token),
                    id=token,
                    row="shared" if t < alike else "branch" if t < rows_shared else "own",
                    probability=math.exp(token_logps[side][t]),
                    logp=float(token_logps[side][t]),
                    ref_logp=float(ref_token_logps[side][t]),
                    log_ratio=float(ratios[t]),
                    reward=beta * float(ratios[: t + 1].sum()),
                    coefficient=(gradient_w, gradient_l)[side],
                    push=float(push[token]) + 0.0,  # no -0
                    gradient_norm=float((push**2).sum() ** 0.5),
                    up=[(named(i), float(push[i])) for i in order[::-1][:3] if push[i] > 0],
                    down=[(named(i), float(push[i])) for i in order[:3] if push[i] < 0],
                )
            )
        return told

    margin, weight = out.margin.item(), -gradient_w / beta
    return PairView(
        prompt=[named(token) for token in x],
        chosen=views(0),
        rejected=views(1),
        shared=alike,
        beta=beta,
        logp_w=logp_w,
        logp_l=logp_l,
        ref_logp_w=ref_logp_w,
        ref_logp_l=ref_logp_l,
        policy_gap=logp_w - logp_l,
        reference_gap=ref_logp_w - ref_logp_l,
        margin=margin,
        reward_w=out.reward_w.item(),
        reward_l=out.reward_l.item(),
        weight=weight,
        loss=out.loss.item(),
        says=in_words(logp_w - ref_logp_w, logp_l - ref_logp_l, beta, weight, w == l),
        ids=ids,
    )


def in_words(ratio_w: float, ratio_l: float, beta: float, weight: float, identical: bool) -> str:
    """What the loss says of a pair."""
    if identical:
        return "The responses are identical: every push cancels, and no gradient is left but rounding."
    margin = ratio_w - ratio_l
    gap = f"{abs(margin):.3f} nats {'larger' if margin > 0 else 'smaller'} than" if margin else "as"
    return (
        f"Against the reference log pi(chosen) has moved by {ratio_w:+.3f} nats and log pi(rejected) by "
        f"{ratio_l:+.3f}: the first minus the second is {gap} under the reference. At beta {beta:g} the implicit "
        f"rewards give the label a probability of sigma(z) = {1 - weight:.3f}, and the pair pulls with the weight that "
        f"is missing to 1, {weight:.3g}."
    )


# ---- four ways -----------------------------------------------------------------------------------------------


class Ways(NamedTuple):
    """One partial derivative of the loss, by four routes; None where a route does not reach it."""

    name: str
    by_logps: float  # from the closed form in the log-probabilities of the responses
    by_logits: float | None  # from the closed form in the logits
    autograd: float
    finite: float  # central difference


def four_ways(policy: Params, config: Config, view: PairView) -> list[Ways]:
    """The DPO gradient of a pair by formula, by formula per logit, by autograd and by finite difference.

    Rows: the four log-probabilities; the six tokens whose own logits are pushed hardest; of each parameter the entry
    with the largest gradient. What lies below a formula it reaches by the chain rule: the first through the gradients
    of log pi(y_w|x) and log pi(y_l|x), the second through that of the logits. The reference is a constant.
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
    """The gradient of an output in each of its arrays, by one sweep."""
    leaves = {name: Tensor(x, requires_grad=True) for name, x in points.items()}
    output(leaves).backward(cotangent)
    return {name: leaf.grad for name, leaf in leaves.items()}


def difference(
    points: dict[str, Array], name: str, entry: Any, output: Callable[[Params], Tensor], beta: float
) -> float:
    """(f(x + h) - f(x - h))/2h in one entry of one array; the loss bends within 1/beta, so h is smaller than that."""
    h = 1e-5 * max(1.0, abs(points[name][entry])) / max(1.0, beta)
    values = []
    for step in (h, -h):
        moved = points[name].copy()
        moved[entry] += step
        values.append(output({key: Tensor(x) for key, x in {**points, name: moved}.items()}).item())
    return float((values[0] - values[1]) / (2 * h))


def sums(parts: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """The sum of each, (1,)."""
    w, l = (ops.reshape(ops.sum(part), (1,)) for part in parts)
    return w, l


def hardest_pushed(view: PairView, most: int = 6) -> list[tuple[str, tuple[int, int]]]:
    """The tokens whose own logits are pushed hardest: a name, and the entry of the context logits."""
    tokens = [
        (f"{side} token {t}, {quoted(token.token)}", (row, token.id), token)
        for side, part, rows in zip(("chosen", "rejected"), (view.chosen, view.rejected), context_rows(view.ids))
        for t, (token, row) in enumerate(zip(part, rows))
        if token.row != "shared"
    ]
    return [(name, entry) for name, entry, _ in sorted(tokens, key=lambda told: -abs(told[2].push))[:most]]


def largest_differences(rows: Sequence[Ways]) -> tuple[float, float]:
    """Between any two of the first three ways, and between any of them and the finite difference."""
    exact = [[way for way in row[1:4] if way is not None] for row in rows]
    return (
        max(max(ways) - min(ways) for ways in exact),
        max(abs(way - row.finite) for row, ways in zip(rows, exact) for way in ways),
    )
