"""The reference's log-probabilities of each pair, scored once and kept in a file."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy

from ..backend import Array, array_module, to_host
from ..model import Config, Params
from ..scoring import Pair
from ..tokenizer import REPLACEMENT, Tokenizer
from ..training import reference_logprobs
from . import safetensors
from .files import write_whole
from .safetensors import CheckpointError
from .tasks import counted, results
from .workers import worker_count

PART = 250  # pairs that a process scores: it takes about a second


def fingerprint(params: Params) -> str:
    """A SHA-256 of names, types, shapes and contents of parameters, whatever their order."""
    sums = hashlib.sha256()
    for name, p in sorted(params.items()):
        sums.update(f" {name} {p.dtype} {p.shape} ".encode())
        sums.update(to_host(p.data).tobytes())
    return sums.hexdigest()


def reference_key(reference: Params, config: Config, tokenizer: Tokenizer, pairs: Sequence[Pair]) -> str:
    """A SHA-256 of all that the reference's log-probabilities depend on, but for the last bits' machine."""
    # as version 0.1 wrote it, whose keys still hold
    vocabulary: dict[str, Any] = {"type": "characters", "characters": tokenizer.characters}
    if REPLACEMENT in tokenizer.characters:
        vocabulary |= {"replacement": tokenizer.replacement}
    parts = (fingerprint(reference), str(config), json.dumps(vocabulary), json.dumps(list(pairs)))
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def pair_logprobs(params: Params, config: Config, pairs: Sequence[Pair], what: str) -> tuple[Array, Array]:
    """`reference_logprobs` with progress; many pairs are scored by several processes, to the same bits."""
    if worker_count(params) == 1 or len(pairs) <= PART:
        return reference_logprobs(params, config, counted(pairs, what))
    parts = [pairs[start : start + PART] for start in range(0, len(pairs), PART)]
    scores = results([partial(reference_logprobs, params, config, part) for part in parts], what)
    logp_w, logp_l = (numpy.concatenate(logps) for logps in zip(*scores))
    return logp_w, logp_l


def cached_reference_logprobs(
    path: Path, reference: Params, config: Config, tokenizer: Tokenizer, pairs: Sequence[Pair]
) -> tuple[Array, Array]:
    """`reference_logprobs`, computed once and kept in a file; on one machine the bits are the same without it.

    Raises CheckpointError if the file is corrupted, fails `check_scores`, or was written for another reference, config,
    tokenizer or pairs.
    """
    key = reference_key(reference, config, tokenizer, pairs)
    xp = array_module(reference["wte.weight"].data)
    if path.exists():
        arrays, metadata, verified = safetensors.read(path)
        if not verified:
            raise CheckpointError(f"{path}: has lost its checksums; delete it")
        if metadata.get("key") != key or arrays.keys() != {"ref_logp_w", "ref_logp_l"}:
            raise CheckpointError(
                f"{path}: is stale: it was made with another reference, config, tokenizer or other pairs; delete it"
            )
        check_scores(path, arrays, reference, config, pairs)
        return xp.asarray(arrays["ref_logp_w"]), xp.asarray(arrays["ref_logp_l"])
    ref_logp_w, ref_logp_l = pair_logprobs(reference, config, pairs, "pairs scored by the reference")
    arrays = {"ref_logp_w": to_host(ref_logp_w), "ref_logp_l": to_host(ref_logp_l)}
    write_whole(path, safetensors.to_bytes(arrays, {"key": key}))
    return ref_logp_w, ref_logp_l


def check_scores(
    path: Path, arrays: Mapping[str, numpy.ndarray], reference: Params, config: Config, pairs: Sequence[Pair]
) -> None:
    """Refuse scores of another shape or type, or that are not the reference's: a few pairs are scored again."""
    kinds = {((len(pairs),), str(reference["wte.weight"].dtype))}
    if {(logp.shape, str(logp.dtype)) for logp in arrays.values()} != kinds:
        raise CheckpointError(f"{path}: its scores have another shape or type than one number for each pair; delete it")
    w, l = arrays["ref_logp_w"], arrays["ref_logp_l"]
    few = {0, len(pairs) - 1, int(abs(w - l).argmax())} if pairs else set()  # where an exchange would show most
    for i in few:
        scores = [to_host(logp)[0] for logp in reference_logprobs(reference, config, [pairs[i]])]
        if not numpy.allclose([w[i], l[i]], scores, rtol=1e-3, atol=1e-3):  # another machine changes the last bits
            raise CheckpointError(f"{path}: its scores of pair {i} are not those of the reference; delete it")
