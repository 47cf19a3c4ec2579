"""What leaves the DPO loss and its gradient as they are, and what looks alike and does not.

Each is measured on a random model and a few pairs, as the largest change of the loss or of any parameter's gradient,
over the largest of these numbers before the change.
"""

import functools
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy

from .. import losses, model, ops, optim, training
from ..backend import Array
from ..explain.tokens import shared_rows
from ..model import Config, Params, forward
from ..run.reference import cached_reference_logprobs
from ..scoring import Pair, collate, padded_logprobs, sequence_logprob, shared_logprobs
from ..tensor import Tensor
from ..tokenizer import END_OF_TEXT, Tokenizer

CONFIG = Config(vocab_size=6, n_positions=16, n_embd=8, n_layer=2, n_head=2)
BETA = 0.3
PAIRS: list[Pair] = [  # with prefixes in common, and lengths that differ
    ([0, 1, 2], [3, 4, 1, 0], [3, 2, 0]),
    ([0, 5], [2, 2, 5, 1, 0], [2, 2, 4, 0]),
    ([0, 4, 4, 1], [1, 3, 0], [1, 3, 3, 5, 2, 0]),
]
Logps = tuple[Tensor, Tensor]  # of the chosen and of the rejected responses, (B,), (B,)
Score = Callable[[Params, Sequence[Pair]], Logps]


class Invariance(NamedTuple):
    """A change that must leave loss and gradient alone, and a similar one that must not."""

    name: str
    holds: str
    held: float  # relative change; rounding
    breaks: str
    broke: float


class World(NamedTuple):
    """A policy and its reference, in float64."""

    policy: Params
    reference: Params


def random_world(seed: int) -> World:
    """Two models far from uniform, so that every break shows."""
    rng = numpy.random.default_rng(seed)
    policy, reference = (model.init(CONFIG, rng, dtype="float64") for _ in range(2))
    for p in (*policy.values(), *reference.values()):
        p.data = p.data + 0.4 * rng.normal(size=p.shape)
    return World(policy, model.frozen(reference))


def dpo(logp_w: Tensor, logp_l: Tensor, ref_logp_w: Tensor, ref_logp_l: Tensor) -> Tensor:
    return losses.dpo_loss(logp_w, logp_l, ref_logp_w, ref_logp_l, BETA).loss


def outcome(
    world: World,
    score: Score,
    reference_score: Score | None = None,
    pairs: Sequence[Pair] = PAIRS,
    objective: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor] = dpo,
) -> Array:
    """The loss and the gradient of every parameter in one array."""
    params = {name: Tensor(p.data, requires_grad=True) for name, p in world.policy.items()}
    ref_logp_w, ref_logp_l = (reference_score or score)(world.reference, pairs)
    logp_w, logp_l = score(params, pairs)
    loss = objective(logp_w, logp_l, ref_logp_w, ref_logp_l)
    loss.backward()
    return flat(loss, params)


def flat(loss: Tensor, params: Params) -> Array:
    return numpy.concatenate([loss.data.reshape(1), *[p.grad.reshape(-1) for p in params.values()]])


def change(after: Array, before: Array) -> float:
    """The largest change, relative to the largest number."""
    return float(abs(after - before).max() / abs(before).max())


def shared(params: Params, pairs: Sequence[Pair]) -> Logps:
    """As in training."""
    return shared_logprobs(params, CONFIG, pairs)


def one_by_one(
    params: Params,
    pairs: Sequence[Pair],
    parts: Callable[[list[int], list[int], Pair], tuple[list[int], list[int]]] = lambda x, y, pair: (x, y),
    mean: bool = False,
) -> Logps:
    """Every response by itself; `parts` tells the given tokens from the scored ones, `mean` divides by their number."""

    def logp(x: Sequence[int], y: Sequence[int], pair: Pair) -> Tensor:
        given, scored = parts(list(x), list(y), pair)
        return sequence_logprob(params, CONFIG, [given], [scored]) * (1 / len(scored) if mean else 1.0)

    return (
        ops.concatenate(*[logp(x, w, (x, w, l)) for x, w, l in pairs]),
        ops.concatenate(*[logp(x, l, (x, w, l)) for x, w, l in pairs]),
    )


def with_prompt(x: list[int], y: list[int], pair: Pair) -> tuple[list[int], list[int]]:
    """The prompt is scored too, but for its first token, which nothing predicts."""
    return x[:1], x[1:] + y


def without_prefix(x: list[int], y: list[int], pair: Pair) -> tuple[list[int], list[int]]:
    """What the responses begin with alike is given, not scored."""
    _, w, l = pair
    alike, _ = shared_rows(w, l)
    return x + y[:alike], y[alike:]


def sums_and_means(world: World) -> list[Invariance]:
    """What both responses share cancels in a difference of sums; a mean divides it by two different lengths."""
    told = []
    for name, parts in (("the prompt is scored too", with_prompt), ("the shared prefix is not scored", without_prefix)):
        changes = []
        for mean in (False, True):
            before = outcome(world, functools.partial(one_by_one, mean=mean))
            after = outcome(world, functools.partial(one_by_one, parts=parts, mean=mean))
            changes.append(change(after, before))
        told.append(Invariance(name, "log-probs are sums", changes[0], "they are means", changes[1]))
    return told


def constants(world: World) -> list[Invariance]:
    """Only differences count."""

    def moved(c_w: Array, c_l: Array) -> Array:
        def score(params: Params, pairs: Sequence[Pair]) -> Logps:
            logp_w, logp_l = shared(params, pairs)
            return logp_w + c_w, logp_l + c_l

        return outcome(world, score, shared)

    before, c = outcome(world, shared), numpy.array([3.1, -1.7, 2.3])
    return [
        Invariance(
            "a constant is added to a pair's log-probs",
            "to both",
            change(moved(c, c), before),
            "to the chosen one's",
            change(moved(c, 0 * c), before),
        )
    ]


def padding(world: World) -> list[Invariance]:
    """A pad is in no block: nothing sees it, and what it predicts is not selected."""

    def padded(pad: int, left: bool, amount: int, masked: bool) -> Score:
        def logps(params: Params, x: Sequence[int], y: Sequence[int]) -> Tensor:
            text, pads = [*x, *y][:-1], [pad] * amount
            tokens = [pads + text if left else text + pads]
            real = [[False] * amount + [True] * len(text) if left else [True] * len(text) + [False] * amount]
            logp = ops.log_softmax(forward(params, CONFIG, tokens, real if masked else None))[0]
            first = (amount if left else 0) + len(x) - 1
            return ops.reshape(ops.sum(ops.gather(logp[first : first + len(y)], list(y))), (1,))

        def score(params: Params, pairs: Sequence[Pair]) -> Logps:
            return (
                ops.concatenate(*[logps(params, x, w) for x, w, _ in pairs]),
                ops.concatenate(*[logps(params, x, l) for x, _, l in pairs]),
            )

        return score

    before = outcome(world, padded(END_OF_TEXT, False, 0, True))
    ways = [(pad, left, amount) for pad in (END_OF_TEXT, 3) for left in (False, True) for amount in (1, 5)]
    return [
        Invariance(
            "pads: id, side and amount",
            "they are masked",
            max(change(outcome(world, padded(*way, True)), before) for way in ways),
            "pads on the left are not",
            change(outcome(world, padded(END_OF_TEXT, True, 5, False)), before),
        )
    ]


def order(world: World) -> list[Invariance]:
    """A mean over pairs."""
    before = outcome(world, shared)
    mixed = [(x, w, PAIRS[i - 1][2]) for i, (x, w, _) in enumerate(PAIRS)]
    return [
        Invariance(
            "the batch is put in another order",
            "whole pairs move",
            change(outcome(world, shared, pairs=PAIRS[::-1]), before),
            "only rejected responses do",
            change(outcome(world, shared, pairs=mixed), before),
        )
    ]


def micro_batches(world: World) -> list[Invariance]:
    """A part of a batch weighs as many pairs as it has."""
    batch = collate(PAIRS, *training.reference_logprobs(world.reference, CONFIG, PAIRS))

    def stepped(size: int | None) -> Array:
        params = {name: Tensor(p.data, requires_grad=True) for name, p in world.policy.items()}
        metrics = training.dpo_training_step(
            params, world.reference, CONFIG, optim.SGD(params, 0.0), batch, BETA, micro_batch_size=size
        )
        return flat(Tensor(metrics["loss"]), params)

    before = stepped(None)
    mean_of_means = (outcome(world, shared, pairs=PAIRS[:2]) + outcome(world, shared, pairs=PAIRS[2:])) / 2
    return [
        Invariance(
            "the batch is split, two pairs and one",
            "a part weighs its pairs",
            max(change(stepped(size), before) for size in (1, 2)),
            "both parts weigh the same",
            change(mean_of_means, before),
        )
    ]


def routes(world: World) -> list[Invariance]:
    """Three ways to lay out a pair, one number."""

    def after_chosen(x: list[int], y: list[int], pair: Pair) -> tuple[list[int], list[int]]:
        return (x, y) if y == list(pair[1]) else (x + list(pair[1]), y)

    before = outcome(world, one_by_one)
    others: list[Score] = [shared, lambda params, pairs: padded_logprobs(params, CONFIG, pairs)]
    return [
        Invariance(
            "responses are scored by another route",
            "one by one, padded, shared",
            max(change(outcome(world, score), before) for score in others),
            "rejected after chosen in a row",
            change(outcome(world, functools.partial(one_by_one, parts=after_chosen)), before),
        )
    ]


def cached_reference(world: World) -> list[Invariance]:
    """The reference is a constant, so that it may be scored once, for ever."""

    def alone(params: Params, pairs: Sequence[Pair]) -> Logps:
        w, l = training.reference_logprobs(params, CONFIG, pairs)
        return Tensor(w), Tensor(l)

    def cached(params: Params, pairs: Sequence[Pair]) -> Logps:
        with tempfile.TemporaryDirectory() as folder:
            path, tokenizer = Path(folder) / "reference.safetensors", Tokenizer("abcde")
            for _ in range(2):  # written, then read
                w, l = cached_reference_logprobs(path, params, CONFIG, tokenizer, pairs)
        return Tensor(w), Tensor(l)

    before = outcome(world, shared, alone)
    moving = world._replace(reference=model.frozen(world.policy))
    return [
        Invariance(
            "the reference is not scored again",
            "its log-probs come from a file",
            change(outcome(world, shared, cached), before),
            "it is the policy of now",
            change(outcome(moving, shared, alone), before),
        )
    ]


def swapped_labels(world: World) -> list[Invariance]:
    """log sigma(z) - log sigma(-z) = z: a flipped label costs beta times the margin."""

    def swapped(w: Tensor, l: Tensor, ref_w: Tensor, ref_l: Tensor) -> Tensor:
        return dpo(l, w, ref_l, ref_w)

    def mean_z(w: Tensor, l: Tensor, ref_w: Tensor, ref_l: Tensor) -> Tensor:
        return ops.mean(BETA * ((w - ref_w) - (l - ref_l)))

    before, after, z = (outcome(world, shared, objective=objective) for objective in (dpo, swapped, mean_z))
    return [
        Invariance(
            "chosen and rejected are swapped",
            "the loss grows by mean z",
            change(after, before + z),
            "it stays",
            change(after, before),
        )
    ]


ALL = (sums_and_means, constants, padding, order, micro_batches, routes, cached_reference, swapped_labels)


def measured(seed: int) -> list[Invariance]:
    """All of them, on a random model."""
    world = random_world(seed)
    return [invariance for part in ALL for invariance in part(world)]


def as_text(rows: Sequence[Invariance]) -> str:
    """One invariance a line, with the size of what holds and of what breaks."""
    lines = [f"{'what changes':<42}{'holds where':<32}{'by':>9}   {'breaks where':<32}{'by':>9}"]
    lines += [f"{row.name:<42}{row.holds:<32}{row.held:>9.1e}   {row.breaks:<32}{row.broke:>9.1e}" for row in rows]
    return "\n".join(lines)
