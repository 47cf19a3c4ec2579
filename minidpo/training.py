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

from . import checkpoint, losses, ops, optim, safetensors
from .backend import Array, array_module, to_host
from .losses import PreferenceLoss
from .model import Config, Params
from .preferences import Batch
from .scoring import Pair, packed_logprobs, shared_logprobs
from .streams import stream
from .tensor import Tensor
from .tokenizer import END_OF_TEXT, Tokenizer

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


def sft_training_step(
    params: Params,
    config: Config,
    optimizer: optim.Optimizer,
    examples: Sequence[Example],
    max_norm: float = math.inf,
    micro_batch_size: int | None = None,
) -> Metrics:
    """One step down `nll`; the gradient is the whole batch's, however small the micro-batches.

    Raises
    ------
    FloatingPointError
        If loss or gradient is not finite; nothing has moved then.
    """
    optimizer.zero_grad()
    tokens, loss = sum(len(y) for _, y in examples), 0.0
    for start in range(0, len(examples), micro_batch_size or len(examples)):
        part = examples[start : start + (micro_batch_size or len(examples))]
        loss += swept(-ops.sum(packed_logprobs(params, config, part)) * (1 / tokens))
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
) -> Metrics:
    """One step of direct preference optimisation: chosen responses up, rejected ones down, against a reference.

        L = loss(log pi(y_w|x), log pi(y_l|x), log pi_ref(y_w|x), log pi_ref(y_l|x), beta)
            - nll_weight mean_t log pi(y_w,t | x, y_w,<t)

    Raises
    ------
    FloatingPointError
        If loss or gradient is not finite; nothing has moved then.

    References
    ----------
    Rafailov et al. 2023 (arXiv 2305.18290), section 4; for the second term, Pang et al. 2024 (arXiv 2404.19733).
    """
    B, tokens = len(batch.pairs), sum(len(w) for _, w, _ in batch.pairs)
    optimizer.zero_grad()
    outs = []
    for start in range(0, B, micro_batch_size or B):
        part = slice(start, start + (micro_batch_size or B))
        pairs = batch.pairs[part]
        if batch.ref_logp_w is None or batch.ref_logp_l is None:
            ref_logp_w, ref_logp_l = reference_logprobs(reference, config, pairs)  # constants: no graph
        else:
            ref_logp_w, ref_logp_l = batch.ref_logp_w[part], batch.ref_logp_l[part]
        logp_w, logp_l = shared_logprobs(policy, config, pairs)  # -> (B,), (B,)
        out = loss(logp_w, logp_l, ref_logp_w, ref_logp_l, beta)
        objective = out.loss * (len(pairs) / B)  # the mean over the batch, this part's share
        if nll_weight:
            objective = objective - (nll_weight / tokens) * ops.sum(logp_w)
        outs.append((swept(objective), out, logp_w, logp_l))
    grad_norm = optim.clip_global_norm(policy, max_norm)
    optimizer.step()
    metrics = preference_metrics([out for _, out, _, _ in outs], [w for _, _, w, _ in outs], [l for *_, l in outs])
    step = {
        "grad_norm": grad_norm,
        "learning_rate": optimizer.learning_rate,
        "tokens": tokens + sum(len(l) for *_, l in batch.pairs),
    }
    return {**metrics, "loss": sum(value for value, *_ in outs), **step}


def preference_metrics(outs: Sequence[PreferenceLoss], logps_w: Sequence[Tensor], logps_l: Sequence[Tensor]) -> Metrics:
    """Means over all pairs, under TRL's names; a tie is no success, and is counted beside the accuracy."""

    def column(parts: Sequence[Tensor]) -> numpy.ndarray:
        return numpy.concatenate([to_host(part.data).reshape(-1) for part in parts]).astype("float64")

    reward_w, reward_l = column([out.reward_w for out in outs]), column([out.reward_l for out in outs])
    sizes = [out.reward_w.data.size for out in outs]
    return {
        "loss": sum(out.loss.item() * size for out, size in zip(outs, sizes)) / sum(sizes),
        "rewards/chosen": reward_w.mean().item(),
        "rewards/rejected": reward_l.mean().item(),
        "rewards/margins": (reward_w - reward_l).mean().item(),
        "rewards/accuracies": (reward_w > reward_l).mean().item(),
        "rewards/ties": (reward_w == reward_l).mean().item(),
        "logps/chosen": column(logps_w).mean().item(),
        "logps/rejected": column(logps_l).mean().item(),
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
    out = loss(logp_w, logp_l, batch.ref_logp_w, batch.ref_logp_l, beta)
    metrics = preference_metrics([out], [logp_w], [logp_l])
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
    checkpoint.write_whole(path, safetensors.to_bytes(kept, {"key": key}))
    return ref_logp_w, ref_logp_l
