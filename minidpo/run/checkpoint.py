"""Checkpoints: safetensors and JSON, written whole or not at all, and checked before use.

A checkpoint is one folder:

    model.safetensors    parameters under GPT-2's names, float32 or float64
    config.json and the other files of Hugging Face that hub.py describes
    state.safetensors    what a resumed run needs: optimizer arrays, JSON in the header's metadata, the model's SHA-256
"""

import dataclasses
import hashlib
import json
import os
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

import numpy

from ..backend import to_host
from ..model import Config, Params, parameter_shapes
from ..tensor import Tensor
from ..tokenizer import END_OF_TEXT, Tokenizer
from . import hub, safetensors
from .files import CheckpointError, json_object, read_bytes, read_text, write_folder, write_whole
from .hub import WEIGHTS

SUMMED = ("config.json", "tokenizer.json")  # what the weights' metadata carries checksums of

T = TypeVar("T", bound=Tokenizer | None)


class Checkpoint(NamedTuple, Generic[T]):
    """A model, its tokenizer, and whether their files carried checksums."""

    params: Params
    config: Config
    tokenizer: T  # None if theirs is not of characters: then there are lists of ids, and no texts
    verified: bool  # weights, config and tokenizer all carried checksums (wrong ones raise)


def save(
    folder: str | Path,
    params: Params,
    config: Config,
    tokenizer: Tokenizer | None,
    arrays: Mapping[str, numpy.ndarray] | None = None,
    state: Mapping[str, Any] | None = None,
) -> None:
    """Write a checkpoint into a new folder; `arrays` by name and a JSON `state` are what a resumed run needs."""
    folder = Path(folder)
    if folder.exists():
        raise CheckpointError(f"{folder} exists already: checkpoints are never overwritten")
    if tokenizer and tokenizer.vocab_size != config.vocab_size:
        raise CheckpointError(f"a vocabulary of {tokenizer.vocab_size} does not fit a model of {config.vocab_size}")
    weights = {name: to_host(p.data) for name, p in params.items()}
    check_weights(weights, config, folder)
    try:
        training = json.dumps(dict(state or {}), allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{folder}: the state is not JSON ({error})") from error
    json_object(training, f"{folder}: the state")
    files = {name: text.encode() for name, text in hub.documents(config, tokenizer).items()}
    sums = {name: hashlib.sha256(files[name]).hexdigest() for name in SUMMED if name in files}
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


def load(folder: str | Path, requires_grad: bool = False) -> Checkpoint[Tokenizer | None]:
    """Read a checkpoint, or the latest in a folder of checkpoints; also what `save_pretrained` and TRL wrote.

    Raises CheckpointError if a file is missing, truncated, corrupted or foreign, or if the files disagree. Warns of
    weights in half precision, which become float32, and of a tokenizer that is not of characters, which is left out.
    An end-of-text of theirs with another id than 0 gets it: characters keep their order and follow as 1, 2, ...
    """
    folder = latest(folder)
    documents = {"config.json": read_text(folder / "config.json")}
    config = hub.read_config(folder / "config.json", documents["config.json"])
    arrays, metadata, verified = hub.read_weights(folder)
    if "tokenizer.json" in metadata or os.path.lexists(folder / "tokenizer.json"):
        documents["tokenizer.json"] = read_text(folder / "tokenizer.json")
    for name, document in documents.items():
        verified = verified and name in metadata
        if name in metadata and metadata[name] != hashlib.sha256(document.encode()).hexdigest():
            raise CheckpointError(f"{folder / name}: does not match the SHA-256 in {WEIGHTS}: changed or corrupted")
    check_weights(arrays, config, folder / WEIGHTS)
    tokenizer, path = None, folder / "tokenizer.json"
    try:
        if path.name in documents:
            tokenizer, ids = hub.read_tokenizer(documents[path.name], str(path))
    except hub.Unreadable as error:
        warnings.warn(f"{path}: {error}: loaded without a tokenizer", stacklevel=2)
    if tokenizer:
        if tokenizer.vocab_size != config.vocab_size:
            raise CheckpointError(f"{path}: {tokenizer.vocab_size} ids, but config.json says {config.vocab_size}")
        if ids[0] != config.eos_token_id:
            raise CheckpointError(f"{path}: end-of-text is {ids[0]}, but config.json has {config.eos_token_id}")
        arrays["wte.weight"] = arrays["wte.weight"][ids]
        config = dataclasses.replace(config, eos_token_id=END_OF_TEXT)
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
    """The `arrays` and the `state` that `save` wrote for this model. Version 0.1 wrote no hash of the model."""
    path = latest(folder) / "state.safetensors"
    arrays, metadata, verified = safetensors.read(path)
    if not verified:
        raise CheckpointError(f"{path}: has lost its checksums, with which every training state is written")
    model = hashlib.sha256(read_bytes(path.with_name("model.safetensors"))).hexdigest()
    if metadata.get("model_sha256", model) != model:
        raise CheckpointError(f"{path}: is the training state of another model than the model.safetensors beside it")
    return arrays, json_object(metadata.get("state", ""), f"{path}: its training state")
