"""Checkpoints: safetensors and JSON, written whole or not at all, and never believed unread.

A checkpoint is one folder:

    model.safetensors    parameters under GPT-2's names, float32 or float64
    config.json          Hugging Face's config of a GPT-2
    tokenizer.json       the character vocabulary
    state.safetensors    what training needs to go on: optimizer arrays, and JSON in the header's metadata

It is written under another name, every file and the folder synced to disk, and then renamed as one.
"""

import dataclasses
import hashlib
import json
import re
import shutil
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy

from ..backend import to_host
from ..model import Config, Params, parameter_shapes
from ..tensor import Tensor
from ..tokenizer import END_OF_TEXT, Tokenizer
from . import safetensors
from .files import read_text, sync_folder, write_synced, write_whole
from .safetensors import CheckpointError

HUGGING_FACE = {
    "model_type": "gpt2",
    "architectures": ["GPT2LMHeadModel"],
    "activation_function": "gelu_new",
    "layer_norm_epsilon": 1e-5,
    "tie_word_embeddings": True,
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "add_cross_attention": False,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
    "resid_pdrop": 0.0,
    "bos_token_id": END_OF_TEXT,
    "eos_token_id": END_OF_TEXT,
}

FIXED = ["model_type", "activation_function", "layer_norm_epsilon", "tie_word_embeddings", "scale_attn_weights"]
FIXED += ["scale_attn_by_inverse_layer_idx", "add_cross_attention"]  # what ours cannot vary


class Checkpoint(NamedTuple):
    """What `load` returns."""

    params: Params
    config: Config
    tokenizer: Tokenizer
    verified: bool  # whether weights, config and tokenizer carried checksums, which then were right


def save(
    folder: str | Path,
    params: Params,
    config: Config,
    tokenizer: Tokenizer,
    arrays: Mapping[str, numpy.ndarray] | None = None,
    state: Mapping[str, Any] | None = None,
) -> None:
    """Write a checkpoint, whole or not at all.

    Parameters
    ----------
    folder : path
        Must not exist yet.
    params, config, tokenizer
        The model.
    arrays, state : dict, optional
        What training needs to go on: arrays by name, and anything that JSON holds.

    Raises
    ------
    CheckpointError
        If the folder exists, the parts do not belong together, or the state is not JSON.
    """
    folder = Path(folder)
    if folder.exists():
        raise CheckpointError(f"{folder} exists already: a checkpoint is never overwritten")
    if tokenizer.vocab_size != config.vocab_size:
        raise CheckpointError(f"a vocabulary of {tokenizer.vocab_size} does not fit a model of {config.vocab_size}")
    weights = {name: to_host(p.data) for name, p in params.items()}
    check_weights(weights, config, folder)
    try:
        training = json.dumps(dict(state or {}), allow_nan=False)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{folder}: the state is not JSON ({error})") from error
    files = {
        "config.json": json.dumps({**HUGGING_FACE, **dataclasses.asdict(config)}, indent=2).encode(),
        "tokenizer.json": tokenizer.to_json().encode(),
    }
    sums = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
    files["model.safetensors"] = safetensors.to_bytes(weights, {"format": "pt", **sums})
    kept = {name: to_host(x) for name, x in (arrays or {}).items()}
    files["state.safetensors"] = safetensors.to_bytes(kept, {"state": training})
    created = [parent for parent in folder.parents if not parent.exists()]
    folder.parent.mkdir(parents=True, exist_ok=True)
    for parent in created:
        sync_folder(parent.parent)
    temporary = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}")
    temporary.mkdir()
    try:
        for name, content in files.items():
            write_synced(temporary / name, content)
        sync_folder(temporary)
        temporary.rename(folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    sync_folder(folder.parent)


def point_to_latest(folder: str | Path) -> None:
    """Make a checkpoint the latest of those beside it; the last thing that is written.

    Raises
    ------
    CheckpointError
        If there is no such folder.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is no checkpoint: nothing to point to")
    write_whole(folder.with_name("latest"), folder.name.encode())


def latest(folder: str | Path) -> Path:
    """The checkpoint that a folder means: itself, or the one that its `latest` names.

    Raises
    ------
    CheckpointError
        If `latest` does not name a checkpoint beside it.
    """
    folder = Path(folder)
    pointer = folder / "latest"
    if not pointer.exists():
        return folder
    name = read_text(pointer, most=255)
    if name in ("", ".", "..") or name != Path(name).name or not (folder / name).is_dir():
        raise CheckpointError(f"{pointer}: names {name!a}, which is no checkpoint beside it")
    return folder / name


def read_config(path: Path, document: str) -> Config:
    """The sizes in a Hugging Face config.json of a GPT-2, read from `path`.

    Raises
    ------
    CheckpointError
        If a size is missing or wrong, or the model is one that ours cannot be.
    """
    try:
        content = json.loads(document)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: is not JSON") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: is not a JSON object")
    for name in FIXED:
        if content.get(name, HUGGING_FACE[name]) != HUGGING_FACE[name]:
            raise CheckpointError(f"{path}: {name} is {content[name]!a}, here it can only be {HUGGING_FACE[name]!a}")
    try:
        sizes: dict[str, Any] = {field.name: content.get(field.name) for field in dataclasses.fields(Config)}
        config = Config(**sizes)
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from error
    if content.get("n_inner") not in (None, 4 * config.n_embd):
        raise CheckpointError(f"{path}: n_inner is {content['n_inner']!a}, here it can only be 4 n_embd")
    return config


def load(folder: str | Path, requires_grad: bool = False) -> Checkpoint:
    """Read a checkpoint, or the latest of a folder of checkpoints; nothing is believed before it is checked.

    Weights that Hugging Face saved are taken too: a prefix `transformer.` goes, and so do a tied head and the
    buffers of old files.

    Raises
    ------
    CheckpointError
        If a file is missing, truncated, corrupted or foreign, or the files do not belong together.
    """
    folder = latest(folder)
    documents = {name: read_text(folder / name) for name in ("config.json", "tokenizer.json")}
    config = read_config(folder / "config.json", documents["config.json"])
    path = folder / "model.safetensors"
    stored, metadata, verified = safetensors.read(path)
    for name, document in documents.items():
        verified = verified and name in metadata
        if name in metadata and metadata[name] != hashlib.sha256(document.encode()).hexdigest():
            raise CheckpointError(f"{folder / name}: does not match the SHA-256 in {path.name}: changed or corrupted")
    arrays = {name.removeprefix("transformer."): array for name, array in stored.items()}
    if len(arrays) < len(stored):
        raise CheckpointError(f"{path}: a parameter is there twice, with and without the prefix transformer.")
    head = arrays.pop("lm_head.weight", None)
    if head is not None and not numpy.array_equal(head, arrays.get("wte.weight", head)):
        raise CheckpointError(f"{path}: lm_head.weight is not wte.weight; here the head is tied")
    arrays = {name: x for name, x in arrays.items() if not re.fullmatch(r"h\.\d+\.attn\.(masked_)?bias", name)}
    check_weights(arrays, config, path)
    try:
        tokenizer = Tokenizer.from_json(documents["tokenizer.json"])
    except ValueError as error:
        raise CheckpointError(f"{folder / 'tokenizer.json'}: {error}") from error
    if tokenizer.vocab_size != config.vocab_size:
        raise CheckpointError(
            f"{folder / 'tokenizer.json'}: {tokenizer.vocab_size} ids, but config.json says {config.vocab_size}"
        )
    params = {name: Tensor(arrays[name], requires_grad=requires_grad) for name in parameter_shapes(config)}
    return Checkpoint(params, config, tokenizer, verified)


def check_weights(arrays: Mapping[str, numpy.ndarray], config: Config, path: Path) -> None:
    """Refuse arrays that are not the parameters of a model of these sizes, all in float32 or all in float64."""
    if config.n_layer > len(arrays):
        raise CheckpointError(f"{path}: {len(arrays)} arrays are too few for n_layer = {config.n_layer}")
    shapes = parameter_shapes(config)
    if shapes.keys() != arrays.keys():
        missing, extra = sorted(shapes.keys() - arrays.keys()), sorted(arrays.keys() - shapes.keys())
        what = f"{missing[0]!a} is missing" if missing else f"{extra[0]!a} is not a parameter of this model"
        raise CheckpointError(f"{path}: {what}")
    dtype = arrays["wte.weight"].dtype
    for name, shape in shapes.items():
        x = arrays[name]
        if x.shape != shape or x.dtype != dtype or dtype not in ("float32", "float64"):
            raise CheckpointError(
                f"{path}: {name} is {x.dtype} {x.shape}; the config wants {shape}, and all float32 or all float64"
            )


def load_state(folder: str | Path) -> tuple[dict[str, numpy.ndarray], dict[str, Any]]:
    """The arrays and the state that `save` was given, for training to go on.

    Raises
    ------
    CheckpointError
        If the file is missing, truncated or corrupted.
    """
    path = latest(folder) / "state.safetensors"
    arrays, metadata, _ = safetensors.read(path)
    try:
        state = json.loads(metadata.get("state", ""))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: holds no training state") from error
    if not isinstance(state, dict):
        raise CheckpointError(f"{path}: the training state is not a JSON object")
    return arrays, state
