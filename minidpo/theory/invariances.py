"""Nine changes that leave the DPO loss and its gradient as they are, each beside a similar change that does not.

Each change is measured on two random models and three pairs: the largest change of the loss or of any parameter's
gradient, divided by the largest of these numbers before the change.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import numpy

from .. import losses, model, ops, optim, training
from ..backend import Array
from ..model import Config, Params, forward
from ..scoring import Batch, Pair, collate, padded_logprobs, sequence_logprob, shared_logprobs
from ..tensor import Tensor
from ..tokenizer import END_OF_TEXT

CONFIG = Config(vocab_size=6, n_positions=16, n_embd=8, n_layer=2, n_head=2)
BETA = 0.3
PAIRS: list[Pair] = [  # both responses begin alike, then differ; their lengths differ too
    ([0, 1, 2], [3, 4, 1, 0], [3, 2, 0]),
    ([0, 5], [2, 2, 5, 1, 0], [2, 2, 4, 0]),
    ([0, 4, 4, 1], [1, 3, 0], [1, 3, 3, 5, 2, 0]),
]
Score = Callable[[Params, Config, Sequence[Pair]], tuple[Tensor, Tensor]]  # log pi(y_w|x), log pi(y_l|x): (B,), (B,)
Comparison = tuple[Array, Array]  # loss and gradient after a change, and before it


class Models(NamedTuple):
    """A policy and its reference, in float64."""

    policy: Params
    reference: Params


class Invariance(NamedTuple):
    """A change that leaves loss and gradient as they are, and a similar one that does not."""

    name: str
    holds: str  # for this
    held: float  # the relative change: rounding
    breaks: str  # for this
    broke: float


def random_models(seed: int) -> Models:
    """Two models far from uniform, so that every break is large."""
    rng = numpy.random.default_rng(seed)
    policy, reference = (model.init(CONFIG, rng, dtype="float64") for _ in range(2))
    for p in (*policy.values(), *reference.values()):
        p.data = p.data + 0.4 * rng.normal(size=p.shape)
    return Models(policy, model.frozen(reference))


def dpo(w: Tensor, l: Tensor, ref_w: Tensor, ref_l: Tensor) -> Tensor:
    return losses.dpo_loss(w, l, ref_w, ref_l, BETA).loss


def one_by_one(
    params: Params,
    config: Config,
    pairs: Sequence[Pair],
    split: Callable[..., tuple[list[int], list[int]]] = lambda x, y, w, l: (x, y),
    mean: bool = False,
    pads: Sequence[int] = (),
    left: bool = False,
    masked: bool = True,
) -> tuple[Tensor, Tensor]:
    """Scores by one forward each; `split` says which tokens are given and which are scored, `mean` averages them."""

    def logp(x: list[int], y: list[int], w: list[int], l: list[int]) -> Tensor:
        given, scored = split(x, y, w, l)
        parts = [([*given, *scored][:-1], True), (pads, False)][:: -1 if left else 1]
        tokens = [[token for part, _ in parts for token in part]]
        real = [[known for part, known in parts for _ in part]]
        logps = ops.log_softmax(forward(params, config, tokens, real if masked else None))[0]  # (T, V)
        first = len(pads) * left + len(given) - 1  # the row that predicts the first scored token
        total = ops.sum(ops.gather(logps[first : first + len(scored)], scored))
        return ops.reshape(total * (1 / len(scored) if mean else 1.0), (1,))

    w, l = (ops.concatenate(*[logp(*map(list, (p[0], p[side], p[1], p[2]))) for p in pairs]) for side in (1, 2))
    return w, l


def by_sequence(params: Params, config: Config, pairs: Sequence[Pair]) -> tuple[Tensor, Tensor]:
    """Scores by `sequence_logprob`."""
    w, l = (ops.concatenate(*[sequence_logprob(params, config, [p[0]], [p[i]]) for p in pairs]) for i in (1, 2))
    return w, l


def without_prefix(x: list[int], y: list[int], w: list[int], l: list[int]) -> tuple[list[int], list[int]]:
    """The tokens that both responses begin with are given, not scored."""
    common = next(t for t, (a, b) in enumerate(zip(w, l)) if a != b)
    return x + y[:common], y[common:]


def outcome(
    models: Models, score: Score = shared_logprobs, pairs: Sequence[Pair] = PAIRS, loss: Callable[..., Tensor] = dpo
) -> Array:
    """The loss and the gradient of every parameter, in one array."""
    params = {name: Tensor(p.data, requires_grad=True) for name, p in models.policy.items()}
    value = loss(*score(params, CONFIG, pairs), *score(models.reference, CONFIG, pairs))
    value.backward()
    return flat(value.item(), params)


def stepped(models: Models, batch: Batch, micro_batch_size: int | None = None, follow: bool = False) -> Array:
    """Loss and gradient of a second training step; with `follow` the reference moves with the policy."""
    params = {name: Tensor(p.data, requires_grad=True) for name, p in models.policy.items()}
    reference, optimizer = params if follow else models.reference, optim.SGD(params, 0.1)
    for _ in range(2):
        metrics = training.dpo_training_step(
            params, reference, CONFIG, optimizer, batch, BETA, micro_batch_size=micro_batch_size
        )
    return flat(metrics["loss"], params)


def flat(loss: float, params: Params) -> Array:
    return numpy.concatenate([[loss], *[p.grad.reshape(-1) for p in params.values()]])


def comparisons(models: Models) -> Iterator[tuple[str, str, list[Comparison], str, Comparison]]:
    """A name; what it holds for, with changes that must be rounding; what it breaks for, with one that must not."""
    of = partial(outcome, models)
    plain, alone, means = of(), of(one_by_one), of(partial(one_by_one, mean=True))

    # What both responses have in common cancels in a difference of sums; means divide it by two lengths.
    for name, split in (
        ("the prompt is scored too", lambda x, y, w, l: (x[:1], x[1:] + y)),  # nothing predicts its first token
        ("the shared prefix is not scored", without_prefix),
    ):
        sums, averages = (of(partial(one_by_one, split=split, mean=mean)) for mean in (False, True))
        yield name, "sums over tokens", [(sums, alone)], "means over tokens", (averages, means)

    # The loss sees only differences.
    c = numpy.array([3.1, -1.7, 2.3])
    both = of(loss=lambda w, l, *ref: dpo(w + c, l + c, *ref))
    one = of(loss=lambda w, l, *ref: dpo(w + c, l, *ref))
    yield "a constant is added to log-probs", "both of a pair", [(both, plain)], "the chosen one's alone", (one, plain)

    # No token attends to a masked pad, and what a pad predicts is not selected.
    kinds = [([pad] * amount, left) for pad in (END_OF_TEXT, 3) for left in (False, True) for amount in (1, 5)]
    held = [(of(partial(one_by_one, pads=pads, left=left)), alone) for pads, left in kinds]
    seen = of(partial(one_by_one, pads=[END_OF_TEXT] * 5, left=True, masked=False))
    yield "pads are added: id, side, amount", "masked pads", held, "pads on the left, not masked", (seen, alone)

    # The loss is a mean over pairs.
    held = [(of(pairs=PAIRS[::-1]), plain)]
    mixed = of(pairs=[(x, w, PAIRS[i - 1][2]) for i, (x, w, _) in enumerate(PAIRS)])
    yield "the batch is reordered", "whole pairs", held, "rejected responses alone", (mixed, plain)

    # A micro-batch counts for the number of its pairs.
    batch = collate(PAIRS, *training.reference_logprobs(models.reference, CONFIG, PAIRS))
    undivided, *divided = (stepped(models, batch, size) for size in (None, 1, 2))
    held = [(after, undivided) for after in divided]
    even = (of(pairs=PAIRS[:2]) + of(pairs=PAIRS[2:])) / 2
    yield (
        "the batch is split, two pairs and one",
        "parts weighed by pairs",
        held,
        "parts of equal weight",
        (even, plain),
    )

    # Three layouts of a pair give one number.
    held = [(of(score), alone) for score in (by_sequence, padded_logprobs, shared_logprobs)]
    row = of(partial(one_by_one, split=lambda x, y, w, l: (x, y) if y == w else (x + w, y)))
    yield "the layout of a pair", "one by one, padded, shared", held, "rejected after chosen in a row", (row, alone)

    # The reference is a constant: one scoring serves every step.
    again, follows = (stepped(models, collate(PAIRS), follow=follow) for follow in (False, True))
    held = [(undivided, again)]
    yield "the reference is scored once", "a constant", held, "one that follows the policy", (follows, again)

    # log sigma(z) - log sigma(-z) = z: a flipped label costs beta times the margin.
    flipped = of(loss=lambda w, l, ref_w, ref_l: dpo(l, w, ref_l, ref_w))
    z = of(loss=lambda w, l, ref_w, ref_l: ops.mean(BETA * ((w - ref_w) - (l - ref_l))))
    held = [(flipped - z, plain)]
    yield "chosen and rejected are swapped", "the loss minus mean z", held, "the loss alone", (flipped, plain)


def change(after: Array, before: Array) -> float:
    """The largest change, relative to the largest number."""
    return float(abs(after - before).max() / abs(before).max())


def table(seed: int) -> list[Invariance]:
    """Every invariance, measured on two random models."""
    return [
        Invariance(name, holds, max(change(*pair) for pair in held), breaks, change(*broken))
        for name, holds, held, breaks, broken in comparisons(random_models(seed))
    ]


def as_text(rows: Sequence[Invariance]) -> str:
    """One invariance per line, with the size of both changes."""
    lines = [f"{'what changes':<40}{'holds for':<28}{'by':>9}   {'breaks for':<30}{'by':>9}"]
    lines += [f"{row.name:<40}{row.holds:<28}{row.held:>9.1e}   {row.breaks:<30}{row.broke:>9.1e}" for row in rows]
    return "\n".join(lines)
