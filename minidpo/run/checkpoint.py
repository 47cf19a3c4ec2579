"""Checkpoints: safetensors and JSON, written whole or not at all, and checked before use.

A checkpoint is one folder:

    model.safetensors    parameters under GPT-2's names, float32 or float64
    config.json          Hugging Face's config of a GPT-2
    tokenizer.json       the character vocabulary
    state.safetensors    what a resumed run needs: optimizer arrays, JSON in the header's metadata, the model's SHA-256
"""

import dataclasses
import hashlib
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy

from ..backend import to_host
from ..model import Config, Params, parameter_shapes
from ..tensor import Tensor
from ..tokenizer import END_OF_TEXT, Tokenizer
from . import safetensors
from .files import CheckpointError, json_object, read_bytes, read_text, write_folder, write_whole

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

# The fields that this model cannot vary.
FIXED = ["model_type", "activation_function", "layer_norm_epsilon", "tie_word_embeddings", "scale_attn_weights"]
FIXED += ["scale_attn_by_inverse_layer_idx", "add_cross_attention", "bos_token_id", "eos_token_id"]

FOREIGN = {  # what may lie in a folder instead of model.safetensors
    "model*.safetensors.index.json": "the index of weights in several files",
    "model-*-of-*.safetensors": "one of several files of weights",
    "pytorch_model*.bin*": "a pickle, which can run code and is never opened",
}
CONVERT = 'Save it again from Python with transformers: model.float().save_pretrained(FOLDER, max_shard_size="100GB")'


class Checkpoint(NamedTuple):
    """A model, its tokenizer, and whether their files carried checksums."""

    params: Params
    config: Config
    tokenizer: Tokenizer
    verified: bool  # weights, config and tokenizer all carried checksums (wrong ones raise)


def save(
    folder: str | Path,
    params: Params,
    config: Config,
    tokenizer: Tokenizer,
    arrays: Mapping[str, numpy.ndarray] | None = None,
    state: Mapping[str, Any] | None = None,
) -> None:
    """Write a checkpoint into a new folder; `arrays` by name and a JSON `state` are what a resumed run needs."""
    folder = Path(folder)
    if folder.exists():
        raise CheckpointError(f"{folder} exists already: checkpoints are never overwritten")
    if tokenizer.vocab_size != config.vocab_size:
        raise CheckpointError(f"a vocabulary of {tokenizer.vocab_size} does not fit a model of {config.vocab_size}")
    weights = {name: to_host(p.data) for name, p in params.items()}
    check_weights(weights, config, folder)
    try:
        training = json.dumps(dict(state or {}), allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{folder}: the state is not JSON ({error})") from error
    json_object(training, f"{folder}: the state")
    files = {
        "config.json": json.dumps({**HUGGING_FACE, **dataclasses.asdict(config)}, indent=2).encode(),
        "tokenizer.json": tokenizer.to_json().encode(),
    }
    sums = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
    files["model.safetensors"] = safetensors.to_bytes(weights, {"format": "pt", **sums})
    optimizer_arrays = {name: to_host(x) for name, x in (arrays or {}).items()}
    owner = {"state": training, "model_sha256": hashlib.sha256(files["model.safetensors"]).hexdigest()}
    files["state.safetensors"] = safetensors.to_bytes(optimizer_arrays, owner)
    write_folder(folder, files)


def point_to_latest(folder: str | Path) -> None:
    """Make a checkpoint the latest of those beside it. This is the last write of a save."""
    folder = Path(folder)
    if not folder.is_dir():
        raise CheckpointError(f"{folder} does not exist: nothing to point to")
    write_whole(folder.with_name("latest"), folder.name.encode())


def latest(folder: str | Path) -> Path:
    """The folder itself, or the checkpoint in it that its file `latest` names."""
    folder = Path(folder)
    pointer = folder / "latest"
    if not pointer.exists():
        return folder
    name = read_text(pointer, most=255)
    if name in ("", ".", "..") or name != Path(name).name or not (folder / name).is_dir():
        raise CheckpointError(f"{pointer}: names {name!a}, which is not a checkpoint beside it{newest(folder)}")
    return folder / name


def newest(folder: Path) -> str:
    """How to resume from the newest checkpoint after step 0 in a folder; "" if there is none."""
    names = [path.name for path in folder.glob("step-*") if re.fullmatch(r"step-\d{6,}", path.name)]
    name = max(names, key=lambda name: int(name[5:]), default="step-000000")
    return (
        f"; the newest is {name}: to resume from it, write its name into {folder / 'latest'}" if int(name[5:]) else ""
    )


def read_config(path: Path, document: str) -> Config:
    """The sizes in Hugging Face's config.json of a GPT-2; `path` is for messages. Other models are refused."""
    content = json_object(document, f"{path}:")
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
    """Read a checkpoint, or the latest in a folder of checkpoints.

    Raises CheckpointError if a file is missing, truncated, corrupted or foreign, or if the files disagree.
    Weights that Hugging Face saved load too, without the prefix `transformer.`, the tied head and old files' buffers.
    """
    folder = latest(folder)
    path = folder / "model.safetensors"
    for pattern, what in FOREIGN.items() if not os.path.lexists(path) else ():
        if any(folder.glob(pattern)):
            raise CheckpointError(f"{path}: is missing, and {pattern} is {what}. {CONVERT}")
    documents = {name: read_text(folder / name) for name in ("config.json", "tokenizer.json")}
    config = read_config(folder / "config.json", documents["config.json"])
    stored, metadata, verified = safetensors.read(path)
    for name, document in documents.items():
        verified = verified and name in metadata
        if name in metadata and metadata[name] != hashlib.sha256(document.encode()).hexdigest():
            raise CheckpointError(f"{folder / name}: does not match the SHA-256 in {path.name}: changed or corrupted")
    arrays = {name.removeprefix("transformer."): array for name, array in stored.items()}
    if len(arrays) < len(stored):
        raise CheckpointError(f"{path}: a parameter occurs twice, with and without the prefix transformer.")
    head = arrays.pop("lm_head.weight", None)
    if head is not None and not numpy.array_equal(head, arrays.get("wte.weight", head)):
        raise CheckpointError(f"{path}: lm_head.weight is not wte.weight; here the head is tied")
    arrays = {name: x for name, x in arrays.items() if not re.fullmatch(r"h\.\d+\.attn\.(masked_)?bias", name)}
    check_weights(arrays, config, path)
    try:
        tokenizer = Tokenizer.from_json(documents["tokenizer.json"])
        json_object(documents["tokenizer.json"], f"{folder / 'tokenizer.json'}:")
    except CheckpointError:
        raise
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
            half = f". It is in half precision. {CONVERT}" if x.dtype == "float16" else ""
            raise CheckpointError(
                f"{path}: {name} is {x.dtype} {x.shape}; the config wants {shape}, and all float32 or all float64{half}"
            )


def load_state(folder: str | Path) -> tuple[dict[str, numpy.ndarray], dict[str, Any]]:
    """The `arrays` and the `state` that `save` wrote for this model. Version 0.1 wrote no hash of the model."""
    path = latest(folder) / "state.safetensors"
    arrays, metadata, verified = safetensors.read(path)
    if not verified:
        raise CheckpointError(f"{path}: has lost its checksums, with which every training state is written")
    model = hashlib.sha256(read_bytes(path.with_name("model.safetensors"))).hexdigest()
    if metadata.get("model_sha256", model) != model:
        raise CheckpointError(f"{path}: is the training state of another model than the model.safetensors beside it")
    return arrays, json_object(metadata.get("state", ""), f"{path}: its training state")
