"""Hugging Face's files of a model: ours as transformers opens them, and theirs read as our model.

Written beside the weights, read by `AutoTokenizer`, `pipeline` and TRL's trainers:

    config.json             a GPT-2's
    tokenizer.json          of the library tokenizers: one token a character, end-of-text in front of every text
    tokenizer_config.json   without it, AutoTokenizer takes GPT-2's own class and drops every space
    generation_config.json  what ends a text

Read: a GPT-2 of any size with a tied head, its weights in one file or several, in half precision too. A tokenizer that
is not of characters is left out: lists of ids can be used without it. Nothing is unpickled.
"""

import json
import os
import re
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import numpy

from ..model import Config
from ..tokenizer import END, END_OF_TEXT, REPLACEMENT, Tokenizer
from . import safetensors
from .files import CheckpointError, json_object, read_text

# The fields that this model cannot vary, with their defaults in transformers.
FIXED = {
    "model_type": "gpt2",
    "activation_function": "gelu_new",
    "layer_norm_epsilon": 1e-5,
    "tie_word_embeddings": True,
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "add_cross_attention": False,
}
GELU = ("gelu_new", "gelu_pytorch_tanh", "gelu_fast")  # names of one function
DROPOUT = {"embd_pdrop": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0}
WEIGHTS, INDEX, MOST_FILES = "model.safetensors", "model.safetensors.index.json", 1000
FOREIGN = {  # what may lie in a folder instead of weights that can be read
    "model-*-of-*.safetensors": f"one of several files, whose {INDEX} is missing too",
    "adapter_model*": "an adapter: merge it with model.merge_and_unload() of PEFT",
    "pytorch_model*.bin*": "a pickle, which can run code and is never opened",
}
CONVERT = "Save it again from Python with transformers: model.save_pretrained(FOLDER)"

ANY_CHARACTER = r"[\s\S]"
SPLIT = {"type": "Split", "pattern": {"Regex": ANY_CHARACTER}, "behavior": "Isolated", "invert": False}
SPLITS = ({"Regex": ANY_CHARACTER}, {"Regex": r"(?m)."}, {"String": ""})  # patterns that match each character alone
NO_TOKEN = "<|unknown|>"  # in no vocabulary of ours, so an unknown character is refused there too


def documents(config: Config, tokenizer: Tokenizer | None) -> dict[str, str]:
    """Hugging Face's files of a model; without a tokenizer, only those of the weights."""
    ends = {"bos_token_id": config.eos_token_id, "eos_token_id": config.eos_token_id}
    files: dict[str, Any] = {
        "config.json": {**FIXED, "architectures": ["GPT2LMHeadModel"], **DROPOUT, **ends, **asdict(config)},
        "generation_config.json": {**ends, "pad_token_id": config.eos_token_id},
    }
    if tokenizer:
        files["tokenizer_config.json"] = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            **dict.fromkeys(("bos_token", "eos_token", "pad_token"), END),
            "clean_up_tokenization_spaces": False,
            "padding_side": "left",  # so that a batch of prompts can be continued
            "model_max_length": config.n_positions,
        }
    texts = {name: json.dumps(content, indent=2) for name, content in files.items()}
    return {**texts, "tokenizer.json": tokenizer_document(tokenizer)} if tokenizer else texts


def tokenizer_document(tokenizer: Tokenizer) -> str:
    """The vocabulary as a tokenizer.json, which puts end-of-text in front of every text, as our commands do.

    A text that spells <|endoftext|> is that token there, and characters like others here.
    """
    first, text = {"SpecialToken": {"id": END, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}
    content = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": END_OF_TEXT, "content": END, "single_word": False, "lstrip": False, "rstrip": False,
             "normalized": False, "special": True}
        ],
        "normalizer": None,
        "pre_tokenizer": SPLIT,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [first, text],
            "pair": [first, text, {"Sequence": {"id": "B", "type_id": 0}}],
            "special_tokens": {END: {"id": END, "ids": [END_OF_TEXT], "tokens": [END]}},
        },
        "decoder": {"type": "Fuse"},
        "model": {
            "type": "WordLevel",
            "vocab": {END: END_OF_TEXT, **{c: i for i, c in enumerate(tokenizer.characters, END_OF_TEXT + 1)}},
            "unk_token": REPLACEMENT if tokenizer.replacement else NO_TOKEN,
        },
    }  # fmt: skip
    return json.dumps(content)


class Unreadable(ValueError):
    """A tokenizer of another kind than ours; the message continues a sentence about it."""


def read_tokenizer(document: str, name: str) -> tuple[Tokenizer, list[int]]:
    """The characters of a tokenizer.json, and their ids in it, end-of-text's first; errors begin with `name`.

    Raises Unreadable if it is not of characters, CheckpointError if it is damaged.
    """
    content = json_object(document, f"{name}:")
    if content.get("type") == "characters":
        return old_tokenizer(content, name)
    model, added = content.get("model"), content.get("added_tokens", [])
    if not isinstance(model, dict) or not isinstance(added, list) or not all(isinstance(each, dict) for each in added):
        raise CheckpointError(f"{name}: is not a tokenizer of the library tokenizers")
    if model.get("type") != "WordLevel":
        raise Unreadable(f"its model is {model.get('type')!a}, not of characters (WordLevel)")
    split = content.get("pre_tokenizer")
    if not isinstance(split, dict) or split not in [{**SPLIT, "pattern": pattern} for pattern in SPLITS]:
        raise Unreadable("its pre_tokenizer does not take each character alone")
    if content.get("normalizer"):
        raise Unreadable("its normalizer changes texts")
    ids = model.get("vocab")
    if not isinstance(ids, dict):
        raise CheckpointError(f"{name}: its vocabulary is not an object")
    ids = ids | {token.get("content"): token.get("id") for token in added}
    if not all(isinstance(token, str) and type(i) is int for token, i in ids.items()):
        raise CheckpointError(f"{name}: its vocabulary does not give an id to each token")
    order = sorted(ids, key=lambda token: (len(token) == 1, ids[token]))  # end-of-text first
    if sorted(ids.values()) != list(range(len(ids))):
        raise CheckpointError(f"{name}: its ids are not 0 to {len(ids) - 1}, each once")
    if [len(token) == 1 for token in order[:2]] != [False, True][: len(order)]:
        raise Unreadable(f"not all of its tokens but one are single characters ({order[:2]!a})")
    template = content.get("post_processor") or {}
    single = template.get("single") if isinstance(template, dict) else None
    if not (isinstance(single, list) and [shape(piece) for piece in single] == [order[0], "A"]):
        raise Unreadable(f"its post_processor does not put {order[0]!a} in front of a text, and nothing else")
    unknown = model.get("unk_token")
    if unknown in order and unknown != REPLACEMENT:
        raise Unreadable(f"it reads unknown characters as {unknown!a}, not as U+FFFD")
    return Tokenizer("".join(order[1:]), unknown == REPLACEMENT and unknown in order), [ids[token] for token in order]


def shape(piece: Any) -> Any:
    """The name of a template's piece."""
    inner = next(iter(piece.values()), None) if isinstance(piece, dict) else None
    return inner.get("id") if isinstance(inner, dict) else None


def old_tokenizer(content: Mapping[str, Any], name: str) -> tuple[Tokenizer, list[int]]:
    """The vocabulary as version 0.1 wrote it."""
    characters = content.get("characters")
    if not isinstance(characters, str):
        raise CheckpointError(f'{name}: a tokenizer\'s "characters" must be a string')
    replacement = content.get("replacement", REPLACEMENT in characters)  # what it meant at first
    if not isinstance(replacement, bool):
        raise CheckpointError(f'{name}: a tokenizer\'s "replacement" must be true or false')
    try:
        tokenizer = Tokenizer(characters, replacement)
    except ValueError as error:
        raise CheckpointError(f"{name}: {error}") from error
    return tokenizer, list(range(tokenizer.vocab_size))


def read_config(path: Path, document: str) -> Config:
    """The sizes in a GPT-2's config.json; `path` is for messages. Other models are refused by field and value."""
    content = json_object(document, f"{path}:")
    for name, fixed in FIXED.items():
        value = content.get(name, fixed)
        if value != fixed and not (name == "activation_function" and value in GELU):
            raise CheckpointError(f"{path}: {name} is {value!a}, here it can only be {fixed!a}")
    try:
        sizes: dict[str, Any] = {each.name: content.get(each.name) for each in fields(Config)}
        config = Config(**sizes)
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from error
    if content.get("n_inner") not in (None, 4 * config.n_embd):
        raise CheckpointError(f"{path}: n_inner is {content['n_inner']!a}, here it can only be 4 n_embd")
    if content.get("bos_token_id") != config.eos_token_id:
        raise CheckpointError(
            f"{path}: bos_token_id is {content.get('bos_token_id')!a}, here it can only be eos_token_id, "
            f"{config.eos_token_id}: the token that ends a text also begins one"
        )
    return config


def read_weights(folder: Path) -> tuple[dict[str, numpy.ndarray], dict[str, str], bool]:
    """Arrays under our names, metadata, and whether they carried checksums; from one file or from several."""
    path = folder / WEIGHTS
    if os.path.lexists(path):
        stored, metadata, verified = safetensors.read(path)
    elif os.path.lexists(folder / INDEX):
        path, metadata, verified = folder / INDEX, {}, False
        stored = dict(shards(path))
    else:
        for pattern, what in FOREIGN.items():
            if any(folder.glob(pattern)):
                raise CheckpointError(f"{path}: is missing, and {pattern} is {what}. {CONVERT}")
        stored, metadata, verified = safetensors.read(path)  # says that it is missing
    arrays = {name.removeprefix("transformer."): array for name, array in stored.items()}
    if len(arrays) < len(stored):
        raise CheckpointError(f"{path}: a parameter occurs twice, with and without the prefix transformer.")
    head = arrays.pop("lm_head.weight", None)
    if head is not None and not numpy.array_equal(head, arrays.get("wte.weight", head)):
        raise CheckpointError(f"{path}: lm_head.weight is not wte.weight; here the head is tied")
    arrays = {name: x for name, x in arrays.items() if not re.fullmatch(r"h\.\d+\.attn\.(masked_)?bias", name)}
    halves = {"float16" if x.dtype == "float16" else "bfloat16" for x in arrays.values() if is_half(x)}
    if halves:
        warnings.warn(f"{path}: {' and '.join(sorted(halves))} weights are used as float32", stacklevel=3)
    return {name: single(x) if is_half(x) else x for name, x in arrays.items()}, metadata, verified


def shards(index: Path) -> Iterator[tuple[str, numpy.ndarray]]:
    """The arrays of several files, each from the file that the index names for it."""
    places = json_object(read_text(index), f"{index}:").get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(place, str) for place in places.values()):
        raise CheckpointError(f"{index}: weight_map is not an object of file names")
    names = sorted(set(places.values()))
    if len(names) > MOST_FILES:
        raise CheckpointError(f"{index}: names {len(names)} files, {MOST_FILES} at most are read")
    for name in names:
        if name != Path(name).name or not name.endswith(".safetensors"):
            raise CheckpointError(f"{index}: names {name!a}, which is not a file of weights beside it")
        arrays, _, _ = safetensors.read(index.parent / name)
        if arrays.keys() != {parameter for parameter, place in places.items() if place == name}:
            raise CheckpointError(f"{index.parent / name}: does not hold the parameters that {index.name} says")
        yield from arrays.items()


def is_half(x: numpy.ndarray) -> bool:
    """Whether an array is of 16-bit floating-point numbers."""
    return x.dtype in ("float16", safetensors.BFLOAT16)


def single(x: numpy.ndarray) -> numpy.ndarray:
    """The same numbers in float32: those in float16 are widened, those in bfloat16 are its upper two bytes."""
    if x.dtype == "float16":
        return x.astype("float32")
    return (x["bfloat16"].astype("uint32") << 16).view("float32")
