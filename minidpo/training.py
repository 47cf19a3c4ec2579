"""One step of training: examples in, a model that finds them likely, or likelier than others, out.

An example is a (prompt, response) pair of ids, and its loss the response's negative log-likelihood: a text by
itself is a response to end-of-text, which is how a model learns to begin. A preference is a (prompt, chosen,
rejected) triple. Metrics carry the names that TRL gives them.
"""

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy

from . import losses, ops, optim
from .backend import Array, array_module, on_host, to_host
from .losses import PreferenceLoss
from .model import Config, Params
from .run import checkpoint, files, safetensors
from .run.workers import Gradient, Workers, shares
from .scoring import Batch, Pair, packed_logprobs, shared_logprobs
from .streams import stream
from .tensor import Tensor
from .tokenizer import END_OF_TEXT, Tokenizer

CACHED = 2**18  # numbers, 4 n_embd for a token, in the widest arrays of a forward pass: these fit a processor's cache
Example = tuple[list[int], list[int]]  # ids of prompt and response
Metrics = dict[str, float]
Loss = Callable[[Any, Any, Any, Any, float], PreferenceLoss]


def line_examples(lines: Sequence[str], tokenizer: Tokenizer) -> list[Example]:
    """Each line as a text by itself: end-of-text, then its characters and end-of-text."""
    return [([END_OF_TEXT], [*tokenizer.encode(line), END_OF_TEXT]) for line in lines]


def batch_indices(count: int, batch_size: int, step: int, seed: int) -> list[int]:
    """Which of `count` examples the batch of a step holds: all are seen once, in a new order, before any again.

    A function of its arguments alone, so that a run that goes on needs to know its step and nothing else.
    """
    places = range(step * batch_size, (step + 1) * batch_size)
    orders = {epoch: stream(seed, "batches", epoch).permutation(count) for epoch in {p // count for p in places}}
    return [int(orders[p // count][p % count]) for p in places]


def nll(params: Params, config: Config, examples: Sequence[Example]) -> Tensor:
    """Mean negative log-likelihood of the response tokens, in nats: -mean_t log pi(y_t | x, y_1 ... y_(t-1))."""
    return -ops.mean(packed_logprobs(params, config, examples))


def held_out_nll(params: Params, config: Config, examples: Sequence[Example], batch_size: int = 64) -> float:
    """`nll` of many examples, batch by batch, every token counted once."""
    constants = {name: p.detach() for name, p in params.items()}
    total, tokens = 0.0, 0
    for start in range(0, len(examples), batch_size):
        logp = packed_logprobs(constants, config, examples[start : start + batch_size])
        total, tokens = total - float(logp.data.sum().item()), tokens + logp.shape[0]
    return total / tokens


def swept(loss: Tensor) -> float:
    """The value of a loss, after its sweep; a loss that is not finite is not swept.

    Raises
    ------
    FloatingPointError
        If it is not finite.
    """
    value = loss.item()
    if not math.isfinite(value):
        raise FloatingPointError(f"the loss is {value}")
    loss.backward()
    return value


def micro_batches(rows: Sequence[int], size: int | None, params: Params) -> list[slice]:
    """Parts of examples that have so many `rows` of tokens each: `size` examples; if that is None, as many as keep
    about to `CACHED`, and on a device all at once.
    """
    starts = list(range(0, len(rows), size or len(rows)))
    if size is None and all(on_host(p.data) for p in params.values()):
        ends, parts = numpy.cumsum(rows), round(sum(rows) * 4 * params["wte.weight"].shape[1] / CACHED)
        part = (ends - numpy.asarray(rows) / 2) * parts // ends[-1]  # in which an example's middle row lies
        starts = [0, *(1 + numpy.flatnonzero(numpy.diff(part))).tolist()]
    return [slice(start, end) for start, end in zip(starts, [*starts[1:], len(rows)])]


def nll_gradient(config: Config, micro_batch_size: int | None = None) -> Gradient:
    """The gradient of a share of a batch's `nll`: "examples", and how many "tokens" the batch has.  -> its loss"""

    def gradient(params: Params, share: Any) -> float:
        examples, loss = share["examples"], 0.0
        for part in micro_batches([len(x) + len(y) for x, y in examples], micro_batch_size, params):
            loss += swept(-ops.sum(packed_logprobs(params, config, examples[part])) * (1 / share["tokens"]))
        return loss

    return gradient


def sft_training_step(
    params: Params,
    config: Config,
    optimizer: optim.Optimizer,
    examples: Sequence[Example],
    max_norm: float = math.inf,
    micro_batch_size: int | None = None,
    workers: Workers | None = None,
) -> Metrics:
    """One step down `nll`; the gradient is the whole batch's, however small the micro-batches or many the workers.

    Raises
    ------
    FloatingPointError
        If loss or gradient is not finite; nothing has moved then.
    """
    optimizer.zero_grad()
    tokens = sum(len(y) for _, y in examples)
    workers = workers or Workers(params, nll_gradient(config, micro_batch_size), 1)
    parts = shares([len(x) + len(y) for x, y in examples], len(workers))
    loss = sum(workers([{"examples": [examples[i] for i in part], "tokens": tokens} for part in parts]))
    grad_norm = optim.clip_global_norm(params, max_norm)
    optimizer.step()
    return {"loss": loss, "grad_norm": grad_norm, "learning_rate": optimizer.learning_rate, "tokens": tokens}


def reference_logprobs(reference: Params, config: Config, pairs: Sequence[Pair]) -> tuple[Array, Array]:
    """log pi_ref(y_w|x) and log pi_ref(y_l|x), each pair scored by itself.  -> (B,), (B,)

    The last bits of a matrix product depend on how many rows share it; so they do not depend on a pair's company.
    """
    each = [shared_logprobs(reference, config, [pair]) for pair in pairs]
    xp = array_module(reference["wte.weight"].data)
    return xp.concatenate([w.data for w, _ in each]), xp.concatenate([l.data for _, l in each])


SHOWN = ("reward_w", "reward_l", "logp_w", "logp_l")  # what metrics are made of


def pair_shares(pairs: Sequence[Pair], ref_logp_w: Array, ref_logp_l: Array, count: int) -> list[dict[str, Any]]:
    """A batch for `pair_gradient`, shared out by length."""
    size = {"B": len(pairs), "tokens": sum(len(w) for _, w, _ in pairs)}
    if count == 1:
        return [{"pairs": pairs, "ref_logp_w": ref_logp_w, "ref_logp_l": ref_logp_l, **size}]
    return [
        {
            "pairs": [pairs[i] for i in part],
            "ref_logp_w": ref_logp_w[part].tolist(),
            "ref_logp_l": ref_logp_l[part].tolist(),
            **size,
        }
        for part in shares([len(x) + len(w) + len(l) for x, w, l in pairs], count)
    ]


def pair_gradient(
    config: Config,
    beta: float = 0.1,
    loss: Loss = losses.dpo_loss,
    nll_weight: float = 0.0,
    micro_batch_size: int | None = None,
) -> Gradient:
    """The gradient of a share of a batch: "pairs" with their "ref_logp_w" and "ref_logp_l", and how many pairs "B" and
    chosen "tokens" the batch has. Returns its part of the objective and `SHOWN` of each pair.
    """

    def gradient(policy: Params, share: Any) -> dict[str, Any]:
        pairs, B, said = share["pairs"], share["B"], []
        for part in micro_batches([len(x) + len(w) + len(l) for x, w, l in pairs], micro_batch_size, policy):
            logp_w, logp_l = shared_logprobs(policy, config, pairs[part])  # -> (B,), (B,)
            xp, dtype = array_module(logp_w.data), logp_w.dtype
            ref_logp_w, ref_logp_l = (
                xp.asarray(share[name][part], dtype=dtype) for name in ("ref_logp_w", "ref_logp_l")
            )
            out = loss(logp_w, logp_l, ref_logp_w, ref_logp_l, beta)
            objective = out.loss * (len(pairs[part]) / B)  # the mean over the batch, this part's share
            if nll_weight:
                objective = objective - (nll_weight / share["tokens"]) * ops.sum(logp_w)
            shown = (out.reward_w, out.reward_l, logp_w, logp_l)
            said.append((swept(objective), [to_host(x.data).tolist() for x in shown]))
        columns = ([x for _, shown in said for x in shown[i]] for i in range(len(SHOWN)))
        return {"objective": sum(value for value, _ in said), **dict(zip(SHOWN, columns))}

    return gradient


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
    workers: Workers | None = None,
) -> Metrics:
    """One step of direct preference optimisation: chosen responses up, rejected ones down, against a reference.

        L = loss(log pi(y_w|x), log pi(y_l|x), log pi_ref(y_w|x), log pi_ref(y_l|x), beta)
            - nll_weight mean_t log pi(y_w,t | x, y_w,<t)

    `workers`, made with the same `pair_gradient`, share out the pairs.

    Raises
    ------
    FloatingPointError
        If loss or gradient is not finite; nothing has moved then.

    References
    ----------
    Rafailov et al. 2023 (arXiv 2305.18290), section 4; for the second term, Pang et al. 2024 (arXiv 2404.19733).
    """
    pairs, ref_logps = batch.pairs, (batch.ref_logp_w, batch.ref_logp_l)
    if batch.ref_logp_w is None or batch.ref_logp_l is None:
        ref_logps = reference_logprobs(reference, config, pairs)  # constants: no graph
    optimizer.zero_grad()
    workers = workers or Workers(policy, pair_gradient(config, beta, loss, nll_weight, micro_batch_size), 1)
    said = workers(pair_shares(pairs, *ref_logps, len(workers)))
    grad_norm = optim.clip_global_norm(policy, max_norm)
    optimizer.step()
    columns = {name: numpy.concatenate([part[name] for part in said]) for name in SHOWN}
    metrics = preference_metrics(sum(part["objective"] for part in said), **columns)
    tokens = sum(len(w) + len(l) for _, w, l in pairs)
    return {**metrics, "grad_norm": grad_norm, "learning_rate": optimizer.learning_rate, "tokens": tokens}


def preference_metrics(loss: float, reward_w: Array, reward_l: Array, logp_w: Array, logp_l: Array) -> Metrics:
    """Means over all pairs, (B,) each, under TRL's names; a tie is no success, and is counted beside the accuracy."""
    return {
        "loss": loss,
        "rewards/chosen": reward_w.mean().item(),
        "rewards/rejected": reward_l.mean().item(),
        "rewards/margins": (reward_w - reward_l).mean().item(),
        "rewards/accuracies": (reward_w > reward_l).mean().item(),
        "rewards/ties": (reward_w == reward_l).mean().item(),
        "logps/chosen": logp_w.mean().item(),
        "logps/rejected": logp_l.mean().item(),
    }


def preference_evaluation(
    policy: Params,
    config: Config,
    batch: Batch,
    beta: float = 0.1,
    loss: Loss = losses.dpo_loss,
    nll_weight: float = 0.0,
) -> Metrics:
    """The metrics of pairs whose log-probabilities under the reference are known, without a step.

    Each pair is scored by itself, as the reference is, so that under `dpo_loss` a policy equal to it has ties and
    nothing else. Beside the metrics of a step: the chosen responses' mean loss in nats a token, and its rise.

    Raises
    ------
    FloatingPointError
        If a metric is not finite.
    """
    constants = {name: p.detach() for name, p in policy.items()}
    logp_w, logp_l = (Tensor(logp) for logp in reference_logprobs(constants, config, batch.pairs))
    xp = array_module(logp_w.data)
    out = loss(logp_w, logp_l, xp.asarray(batch.ref_logp_w), xp.asarray(batch.ref_logp_l), beta)
    shown = (to_host(x.data).astype("float64") for x in (out.reward_w, out.reward_l, logp_w, logp_l))
    metrics = preference_metrics(out.loss.item(), *shown)
    tokens = sum(len(w) for _, w, _ in batch.pairs)
    chosen_nll = -float(to_host(logp_w.data).sum(dtype="float64")) / tokens
    ref_nll = -float(to_host(batch.ref_logp_w).sum(dtype="float64")) / tokens
    metrics["loss"] += nll_weight * chosen_nll
    metrics |= {"nll/chosen": chosen_nll, "nll/chosen_rise": chosen_nll - ref_nll}
    if not all(map(math.isfinite, metrics.values())):
        culprits = [name for name, value in metrics.items() if not math.isfinite(value)]
        raise FloatingPointError(f"not finite: {', '.join(culprits)}")
    return metrics


def fingerprint(params: Params) -> str:
    """A SHA-256 of names, types, shapes and contents of parameters."""
    sums = hashlib.sha256()
    for name, p in sorted(params.items()):
        sums.update(f" {name} {p.dtype} {p.shape} ".encode())
        sums.update(to_host(p.data).tobytes())
    return sums.hexdigest()


def reference_key(reference: Params, config: Config, tokenizer: Tokenizer, pairs: Sequence[Pair]) -> str:
    """A SHA-256 of all that the reference's log-probabilities depend on."""
    parts = (fingerprint(reference), str(config), tokenizer.to_json(), json.dumps(list(pairs)))
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def cached_reference_logprobs(
    path: Path, reference: Params, config: Config, tokenizer: Tokenizer, pairs: Sequence[Pair]
) -> tuple[Array, Array]:
    """`reference_logprobs`, computed once and kept in a file; bit for bit what they would be without it.

    Raises
    ------
    CheckpointError
        If the file is corrupted, or was written for another reference, tokenizer or other pairs.
    """
    key = reference_key(reference, config, tokenizer, pairs)
    xp = array_module(reference["wte.weight"].data)
    if path.exists():
        arrays, metadata, _ = safetensors.read(path)
        if metadata.get("key") != key or arrays.keys() != {"ref_logp_w", "ref_logp_l"}:
            raise checkpoint.CheckpointError(
                f"{path}: is stale, it was made with another reference, tokenizer or other pairs; delete it"
            )
        return xp.asarray(arrays["ref_logp_w"]), xp.asarray(arrays["ref_logp_l"])
    ref_logp_w, ref_logp_l = reference_logprobs(reference, config, pairs)
    kept = {"ref_logp_w": to_host(ref_logp_w), "ref_logp_l": to_host(ref_logp_l)}
    files.write_whole(path, safetensors.to_bytes(kept, {"key": key}))
    return ref_logp_w, ref_logp_l
