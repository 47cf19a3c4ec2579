"""One step of training: on preferences (DPO), or on the likelihood of responses (pre-training, fine-tuning).

A step zeroes the gradients, accumulates new ones, clips them and updates the parameters. A preference is a (prompt,
chosen, rejected) triple of ids, an example a (prompt, response) pair. A plain text is scored as a response to
end-of-text, so that the model learns to begin. Metrics that TRL also reports have its names.
"""

import inspect
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy

from . import losses, ops, optim
from .backend import Array, array_module, on_host, to_host
from .losses import PreferenceLoss
from .model import Config, Params
from .scoring import Batch, Example, Pair, packed_logprobs, shared_logprobs
from .streams import stream
from .tensor import Tensor
from .tokenizer import END_OF_TEXT, Tokenizer

CACHED = 2**18  # numbers in an MLP's hidden layer, 4 n_embd per token: arrays of this size fit a processor's cache
ROUNDING = 8  # units in the last place of a log-probability; up to 2.5 were seen between batches
Metrics = dict[str, float]
Watch = Callable[[Any], Iterable[Any]]  # passes items on one by one, and may tell how many there have been
Loss = Callable[..., PreferenceLoss]  # of the four log-probabilities, beta, and constants that it takes `by_name`


# ---- preferences ------------------------------------------------------------------------------------------


class Swept(NamedTuple):
    """A share of the objective, with the rewards, log-probabilities and votes of its pairs."""

    objective: float
    reward_w: list[float]
    reward_l: list[float]
    logp_w: list[float]
    logp_l: list[float]
    votes: list[list[float]]  # empty if each pair is one label


def dpo_sweep(
    policy: Params,
    config: Config,
    batch: Batch,
    beta: float = 0.1,
    loss: Loss = losses.dpo_loss,
    nll_weight: float = 0.0,
    micro_batch_size: int | None = None,
    whole: Sequence[float] | None = None,
) -> Swept:
    """Add the gradient of a batch's objective to `grad` of the policy, a micro-batch of M pairs at a time.

    The batch holds the reference's log-probabilities. `whole` is `counts` of the full batch, if this is only a share
    of it. Raises FloatingPointError if the objective is not finite, ValueError if the loss cannot use votes.
    """
    labels, tokens = whole or counts(batch)
    parts = []
    for part in micro_batches([len(x) + len(w) + len(l) for x, w, l in batch.pairs], micro_batch_size, policy):
        arrays: list[Any] = [None if x is None else x[part] for x in batch]
        pairs, ref_logp_w, ref_logp_l, votes = share = Batch(*arrays)
        logp_w, logp_l = shared_logprobs(policy, config, pairs)  # -> (M,), (M,)
        out = loss(logp_w, logp_l, ref_logp_w, ref_logp_l, beta, **by_name(loss, pairs, votes))
        objective = out.loss * (counts(share)[0] / labels)  # the mean over the batch, this part's share
        if nll_weight:
            objective = objective - (nll_weight / tokens) * over_labels(ops.sum, logp_w, logp_l, votes)
        value = finite(objective)
        objective.backward()
        arrays = [x.data for x in (out.reward_w, out.reward_l, logp_w, logp_l)] + [[] if votes is None else votes]
        parts.append(Swept(value, *[numpy.asarray(to_host(x)).tolist() for x in arrays]))
    return join(parts)


def over_labels(add: Callable[[Any], Any], w: Any, l: Any, votes: Array | None) -> Any:
    """Add up, over labels, w of the pairs whose chosen response was preferred and l of those the other way round.

    A response without a vote is left out, not multiplied by 0: its log-probability may be -inf.
    """
    if votes is None:
        return add(w)
    sides = [(y, n, numpy.flatnonzero(n)) for y, n in zip((w, l), votes.T)]
    return sum(add(y[some] * constant_like(y, n[some])) for y, n, some in sides if some.size)


def constant_like(y: Any, x: Array) -> Array:
    """An array of the host where and as y, a Tensor, is; as it is beside another array."""
    return array_module(y.data).asarray(x, dtype=y.dtype) if isinstance(y, Tensor) else x


def label_mean(w: Array, l: Array, votes: Array | None) -> float:
    """The mean of `over_labels`."""
    return float(over_labels(numpy.sum, w, l, votes) / (len(w) if votes is None else votes.sum()))


def counts(batch: Batch) -> tuple[float, float]:
    """The labels of a batch, and the tokens of the responses that they prefer."""
    length_w, length_l = (numpy.array([len(pair[i]) for pair in batch.pairs]) for i in (1, 2))
    labels = len(batch.pairs) if batch.votes is None else float(batch.votes.sum())
    return labels, over_labels(numpy.sum, length_w, length_l, batch.votes).item()


def by_name(loss: Loss, pairs: Sequence[Pair], votes: Array | None) -> dict[str, Any]:
    """What a loss takes by name: tokens of the responses, end-of-text among them; of votes, probability and weight."""
    lengths = {"length_w": [len(w) for _, w, _ in pairs], "length_l": [len(l) for _, _, l in pairs]}
    taken = inspect.signature(losses.LOSSES[loss.name] if isinstance(loss, losses.Choice) else loss).parameters
    given: dict[str, Any] = {name: length for name, length in lengths.items() if name in taken}
    if votes is not None:
        if not {"probability", "weight"} <= taken.keys():
            name = getattr(loss, "name", getattr(loss, "__name__", "given"))
            raise ValueError(f"the loss {name} takes no probability and weight: choose dpo")
        n = votes.sum(axis=1)
        given |= {"probability": votes[:, 0] / n, "weight": n}
    return given


def join(parts: Sequence[Swept]) -> Swept:
    """Put the shares of a batch together."""
    values, *columns = zip(*parts)
    return Swept(sum(values), *[[x for part in column for x in part] for column in columns])


def dpo_training_step(
    policy: Params,
    reference: Params,
    config: Config,
    optimizer: optim.Optimizer,
    batch: Batch,
    beta: float = 0.1,
    loss: Loss = losses.dpo_loss,
    nll_weight: float = 0.0,
    max_norm: float = math.inf,
    micro_batch_size: int | None = None,
    sweep: Callable[..., Swept] = dpo_sweep,
) -> Metrics:
    """One step of direct preference optimisation: raise the margin of chosen over rejected, against a reference.

        L = loss(log pi(y_w|x), log pi(y_l|x), log pi_ref(y_w|x), log pi_ref(y_l|x), beta[, constants])
            - nll_weight mean_t log pi(y_w,t | x, y_w,<t)

    `sweep` may share the pairs out to several processes. Raises FloatingPointError if loss or gradient is not finite;
    no parameter has changed in that case. The metrics hold both terms: loss = `loss/dpo` + nll_weight `loss/nll`.
    Source: Rafailov et al. 2023 (arXiv 2305.18290), section 4; the second term after Pang et al. 2024 (arXiv
    2404.19733), here a mean over the batch's tokens.
    """
    batch = with_reference(batch, reference, config, policy)
    optimizer.zero_grad()
    swept = sweep(policy, config, batch, beta, loss, nll_weight, micro_batch_size)
    grad_norm = optim.clip_global_norm(policy, max_norm)
    optimizer.step()
    value, reward_w, reward_l, logp_w, logp_l, labels = (numpy.array(column) for column in swept)
    votes = labels if labels.size else None
    rounding = ROUNDING * float(numpy.finfo(policy["wte.weight"].dtype).eps) * (abs(logp_w) + abs(logp_l))
    metrics = preference_metrics(value, reward_w, reward_l, logp_w, logp_l, beta * rounding, votes)
    if nll_weight:
        nll = -over_labels(math.fsum, logp_w, logp_l, votes) / counts(batch)[1]
        metrics |= {"loss/dpo": swept.objective - nll_weight * nll, "loss/nll": nll}
    tokens = sum(len(w) + len(l) for _, w, l in batch.pairs)
    return {**metrics, "grad_norm": grad_norm, "learning_rate": optimizer.learning_rate, "tokens": tokens}


def reference_logprobs(reference: Params, config: Config, pairs: Iterable[Pair]) -> tuple[Array, Array]:
    """log pi_ref(y_w|x) and log pi_ref(y_l|x), each pair scored alone.  -> (B,), (B,)

    The last bits of a matrix product depend on how many rows share it: a pair scored alone always gets the same bits.
    """
    if not reference:
        raise ValueError(
            "the batch lacks the reference's log-probabilities, and no reference model was given to compute them"
        )
    scores = [shared_logprobs(reference, config, [pair]) for pair in pairs]
    xp = array_module(reference["wte.weight"].data)
    return xp.concatenate([w.data for w, _ in scores]), xp.concatenate([l.data for _, l in scores])


def with_reference(batch: Batch, reference: Params, config: Config, policy: Params) -> Batch:
    """The batch with the reference's log-probabilities in the policy's dtype; missing ones are computed."""
    logps = batch.ref_logp_w, batch.ref_logp_l
    if any(logp is None for logp in logps):
        logps = reference_logprobs(reference, config, batch.pairs)
    wte = policy["wte.weight"].data
    ref_logp_w, ref_logp_l = (array_module(wte).asarray(logp, dtype=wte.dtype) for logp in logps)
    return batch._replace(ref_logp_w=ref_logp_w, ref_logp_l=ref_logp_l)


def preference_metrics(
    loss: Any, reward_w: Array, reward_l: Array, logp_w: Array, logp_l: Array, tie: Any = 0.0,
    votes: Array | None = None,
) -> Metrics:  # fmt: skip
    """The loss, and means over labels; ties are not wins and have their own metric.

    Of votes [7, 3], seven labels are right if the chosen reward is the higher one, three if it is the lower.
    Rewards tie that differ by at most `tie`: 0 where each pair was scored alone. In a step, policy and reference are
    scored in other batches, and it is what rounding can make of equal models, beta 8 eps (|log pi_w| + |log pi_l|).
    """
    ties = abs(reward_w - reward_l) <= tie
    return {
        "loss": float(loss),
        "rewards/chosen": label_mean(reward_w, reward_l, votes),
        "rewards/rejected": label_mean(reward_l, reward_w, votes),
        "rewards/margins": label_mean(reward_w - reward_l, reward_l - reward_w, votes),
        "rewards/accuracies": label_mean((reward_w > reward_l) & ~ties, (reward_l > reward_w) & ~ties, votes),
        "rewards/ties": label_mean(ties, ties, votes),
        "logps/chosen": label_mean(logp_w, logp_l, votes),
        "logps/rejected": label_mean(logp_l, logp_w, votes),
    }


def preference_evaluation(
    policy: Params,
    config: Config,
    batch: Batch,
    beta: float = 0.1,
    loss: Loss = losses.dpo_loss,
    nll_weight: float = 0.0,
    watch: Watch = iter,
) -> Metrics:
    """The metrics of a batch that holds the reference's log-probabilities, without a step.

    Each pair is scored alone. If the reference's were too, a policy equal to it has only ties under `dpo_loss`.
    Also gives the chosen responses' mean loss in nats per token, and its rise against the reference. `watch` sees the
    pairs go by. Raises FloatingPointError if a metric is not finite.
    """
    constants = {name: p.detach() for name, p in policy.items()}
    logps = reference_logprobs(constants, config, watch(batch.pairs))
    return preference_summary(*logps, with_reference(batch, {}, config, policy), beta, loss, nll_weight)


def preference_summary(
    logp_w: Any, logp_l: Any, batch: Batch, beta: float = 0.1, loss: Loss = losses.dpo_loss, nll_weight: float = 0.0
) -> Metrics:
    """The metrics of `preference_evaluation`, from the policy's log-probabilities of the batch's pairs, (B,)."""
    pairs, *refs, votes = batch
    logp_w, logp_l = Tensor(logp_w), Tensor(logp_l)
    out = loss(logp_w, logp_l, *refs, beta, **by_name(loss, pairs, votes))
    arrays = (out.reward_w.data, out.reward_l.data, logp_w.data, logp_l.data, *refs)
    reward_w, reward_l, w, l, ref_w, ref_l = (to_host(x).astype("float64") for x in arrays)
    metrics = preference_metrics(out.loss.item(), reward_w, reward_l, w, l, votes=votes)
    sums = over_labels(numpy.sum, w, l, votes), over_labels(numpy.sum, ref_w, ref_l, votes)
    chosen_nll, ref_nll = (-float(total) / counts(batch)[1] for total in sums)
    if nll_weight:
        metrics |= {"loss/dpo": metrics["loss"], "loss/nll": chosen_nll}
    metrics["loss"] += nll_weight * chosen_nll
    metrics |= {"nll/chosen": chosen_nll, "nll/chosen_rise": chosen_nll - ref_nll}
    culprits = [name for name, value in metrics.items() if not math.isfinite(value)]
    if culprits:
        raise FloatingPointError(f"not finite: {', '.join(culprits)}")
    return metrics


# ---- likelihood: pre-training and supervised fine-tuning --------------------------------------------------


def nll(params: Params, config: Config, examples: Sequence[Example]) -> Tensor:
    """Mean negative log-likelihood of the response tokens, in nats: -mean_t log pi(y_t | x, y_1 ... y_(t-1))."""
    return -ops.mean(packed_logprobs(params, config, examples))


def nll_sweep(
    params: Params,
    config: Config,
    examples: Sequence[Example],
    micro_batch_size: int | None = None,
    tokens: int | None = None,
) -> float:
    """Add the gradient of `nll` to `grad` of the parameters, a micro-batch at a time; returns the loss.

    `tokens` is the number of response tokens in the full batch, if these examples are only a share of it.
    """
    tokens, total = tokens or sum(len(y) for _, y in examples), 0.0
    for part in micro_batches([len(x) + len(y) for x, y in examples], micro_batch_size, params):
        logp = packed_logprobs(params, config, examples[part])  # -> (M,)
        loss = -ops.sum(logp) * (1 / tokens)  # the mean over the batch, this part's share
        total += finite(loss)
        loss.backward()
    return total


def sft_training_step(
    params: Params,
    config: Config,
    optimizer: optim.Optimizer,
    examples: Sequence[Example],
    max_norm: float = math.inf,
    micro_batch_size: int | None = None,
    sweep: Callable[..., float] = nll_sweep,
) -> Metrics:
    """One step on `nll`; neither micro-batches nor `sweep` change the gradient, up to rounding.

    Raises FloatingPointError if loss or gradient is not finite; no parameter has changed in that case.
    """
    optimizer.zero_grad()
    loss = sweep(params, config, examples, micro_batch_size)
    grad_norm = optim.clip_global_norm(params, max_norm)
    optimizer.step()
    tokens = sum(len(y) for _, y in examples)
    return {"loss": loss, "grad_norm": grad_norm, "learning_rate": optimizer.learning_rate, "tokens": tokens}


def held_out_nll(
    params: Params, config: Config, examples: Sequence[Example], batch_size: int = 64, watch: Watch = iter
) -> float:
    """`nll` of many examples, batch by batch, every token counted once; `watch` sees the batches go by."""
    constants = {name: p.detach() for name, p in params.items()}
    total, tokens = 0.0, 0
    for start in watch(range(0, len(examples), batch_size)):
        logp = packed_logprobs(constants, config, examples[start : start + batch_size])
        total, tokens = total - float(logp.data.sum().item()), tokens + logp.shape[0]
    return total / tokens


# ---- batches ----------------------------------------------------------------------------------------------


def line_examples(lines: Sequence[str], tokenizer: Tokenizer) -> list[Example]:
    """Each line as a text alone: end-of-text, then its characters and end-of-text."""
    return [([END_OF_TEXT], [*tokenizer.encode(line), END_OF_TEXT]) for line in lines]


def batch_indices(count: int, batch_size: int, step: int, seed: int) -> list[int]:
    """Which of `count` examples are in the batch of a step; every epoch visits each once, in a new order.

    It depends on its arguments alone, so a resumed run with the same settings needs only its step.
    """
    places = range(step * batch_size, (step + 1) * batch_size)
    orders = {epoch: stream(seed, "batches", epoch).permutation(count) for epoch in {p // count for p in places}}
    return [int(orders[p // count][p % count]) for p in places]


def micro_batches(rows: Sequence[int], size: int | None, params: Params) -> list[slice]:
    """Cut a batch into slices of `size` examples.

    Without a size, slices keep a hidden layer near `CACHED` numbers, given each example's rows of tokens; a GPU
    gets one slice.
    """
    starts = list(range(0, len(rows), size or len(rows)))
    if size is None and all(on_host(p.data) for p in params.values()):
        ends, parts = numpy.cumsum(rows), round(sum(rows) * 4 * params["wte.weight"].shape[1] / CACHED)
        part = (ends - numpy.asarray(rows) / 2) * parts // ends[-1]  # the slice in which an example's middle row lies
        starts = [0, *(1 + numpy.flatnonzero(numpy.diff(part))).tolist()]
    return [slice(start, end) for start, end in zip(starts, [*starts[1:], len(rows)])]


def finite(loss: Tensor) -> float:
    """The value of a loss; raise FloatingPointError if it is not finite."""
    value = loss.item()
    if not math.isfinite(value):
        raise FloatingPointError(f"the loss is {value}")
    return value
