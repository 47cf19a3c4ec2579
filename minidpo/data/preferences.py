"""Preference data: read, validate, split, batch.

A file is JSON Lines as TRL reads them: `{"prompt": ..., "chosen": ..., "rejected": ...}`, or with a "completion"
in place of the two for supervised fine-tuning. Prompt and response are joined as they stand; a prompt that should
end in a newline says so itself. What cannot be used is a `Fault`, with its line: nothing is lost in silence.
"""

import contextlib
import itertools
import json
import os
import stat
from collections.abc import Callable, Hashable, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TypeVar

import numpy

from ..scoring import collate as collate
from ..tokenizer import END_OF_TEXT, Tokenizer, UnknownCharacterError

PAIRS = ("prompt", "chosen", "rejected")
COMPLETIONS = ("prompt", "completion")
MOST_BYTES = 2**20  # of one line
TRUNCATIONS = ("none", "prompt", "response")

T = TypeVar("T")


class Row(NamedTuple):
    """One line of a file."""

    line: int  # counted from 1
    prompt: str
    responses: tuple[str, ...]  # chosen and rejected, or one completion
    text: str  # the line as it was read


class Fault(NamedTuple):
    """A line that cannot be used, and why."""

    line: int
    reason: str
    text: str


class ShapeError(ValueError):
    """A file has another shape than what is wanted; the message names it and says what to do."""


class Encoded(NamedTuple):
    """Rows as ids."""

    rows: list[Row]
    ids: list[tuple[list[int], ...]]  # prompt and responses of each row
    faults: list[Fault]
    truncated: list[int]  # lines of rows that lost tokens to the context


def read(path: Path, fields: Sequence[str] = PAIRS) -> tuple[list[Row], list[Fault]]:
    """The rows of a JSON Lines file that can be used, and the lines that cannot.

    A line is a `Fault` if it is no JSON object in UTF-8 of at most `MOST_BYTES`, if a field is missing or no
    string, a response is empty, or chosen equals rejected. Empty lines are passed over.

    Raises
    ------
    ShapeError
        If the file has another shape, by the name that TRL gives it, with the line and a hint.
    OSError
        If the file cannot be read.
    """
    found: list[Row | Fault] = []
    with opened(path) as file:
        for line in itertools.count(1):
            content = file.readline(MOST_BYTES + 2)
            if not content:
                break
            if len(content.rstrip(b"\r\n")) > MOST_BYTES:
                found.append(Fault(line, f"is longer than {MOST_BYTES} bytes", ascii(content[:100])))
                while content and not content.endswith(b"\n"):
                    content = file.readline(MOST_BYTES)
            elif content.strip():
                found.append(parsed(path, line, content, fields))
    rows = [row for row in found if isinstance(row, Row)]
    faults = [fault for fault in found if isinstance(fault, Fault)]
    bare = next((fault for fault in faults if fault.reason == "prompt is missing"), None)
    if bare and not rows and "chosen" in fields:
        raise ShapeError(
            f"{path}, line {bare.line}: no row has a prompt, this is the implicit-prompt shape; "
            'move what chosen and rejected begin with into a "prompt" of its own'
        )
    return rows, faults


def opened(path: Path) -> BinaryIO:
    """A file that can be read more than once and has an end.

    Raises
    ------
    ValueError
        If it is a pipe or a device.
    """
    file = path.open("rb")
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise ValueError(f"{path}: is no regular file; write what it gives to one first")
    return file


def fields_of(path: Path) -> tuple[str, ...]:
    """The fields of a file, by its first object that has any: a prompt and its completion, or those of a pair."""
    with opened(path) as file:
        for content in iter(lambda: file.readline(MOST_BYTES + 2), b""):
            with contextlib.suppress(ValueError, RecursionError):
                document = json.loads(content.decode("utf-8-sig"))
                if isinstance(document, dict) and document.keys() & {"chosen", "rejected", "completion"}:
                    return PAIRS if document.keys() & {"chosen", "rejected"} else COMPLETIONS
    return PAIRS


def parsed(path: Path, line: int, content: bytes, fields: Sequence[str]) -> Row | Fault:
    """One line as a row, or what is wrong with it."""
    text = content.decode("utf-8", errors="backslashreplace").removeprefix("\ufeff").rstrip("\r\n")

    def fault(reason: str) -> Fault:
        return Fault(line, reason, text)

    try:
        document = json.loads(content.decode("utf-8-sig").rstrip(), object_pairs_hook=distinct)
    except UnicodeDecodeError as error:
        return fault(f"is not UTF-8 (byte {error.start})")
    except json.JSONDecodeError as error:
        return fault(f"is not JSON ({error.msg}, column {error.colno})")
    except KeyError as error:
        return fault(f"{error.args[0]!a} is there twice")
    except (ValueError, RecursionError):  # a number without end, or too deep
        return fault("is not JSON that can be read")
    if not isinstance(document, dict):
        return fault("is not a JSON object")
    shape, hint = foreign(document, fields)
    if shape:
        raise ShapeError(f"{path}, line {line}: this is the {shape} shape; {hint}")
    missing = [name for name in fields if name not in document]
    if missing:
        return fault(f"{', '.join(missing)} {'is' if len(missing) == 1 else 'are'} missing")
    for name in fields:
        if not isinstance(document[name], str):
            return fault(f"{name} is not a string")
        if any("\ud800" <= c <= "\udfff" for c in document[name]):
            return fault(f"{name} holds half a surrogate pair, which is no character")
    prompt, *responses = (document[name] for name in fields)
    if "" in responses:
        return fault(f"{fields[1 + responses.index('')]} is empty")
    if len(set(responses)) < len(responses):
        return fault("chosen equals rejected")
    return Row(line, prompt, tuple(responses), text)


def distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; a key that is there twice raises KeyError."""
    document: dict[str, Any] = {}
    for key, value in pairs:
        if key in document:
            raise KeyError(key)
        document[key] = value
    return document


def foreign(document: dict[str, Any], fields: Sequence[str]) -> tuple[str, str]:
    """The name of another shape that a row has, as TRL calls it, and what to do; two empty strings if it has none."""
    if any(isinstance(document.get(name), list) for name in ("messages", *PAIRS, *COMPLETIONS)):
        return "conversational", "apply the chat template first, so that every field is a string"
    if "completion" in document and "label" in document:
        return "unpaired-preference", 'two responses to one prompt are wanted, as "chosen" and "rejected"'
    if "completion" in document and "chosen" in fields and not {"chosen", "rejected"} & document.keys():
        return "prompt-completion", "it has nothing to prefer; `sft` takes it as its --data"
    if "text" in document and not set(fields) & document.keys():
        return "language-modeling", "write each text on a line of a plain file and use it for pretrain"
    return "", ""


def encode(rows: Sequence[Row], tokenizer: Tokenizer, n_positions: int, truncation: str = "none") -> Encoded:
    """Prompts and responses as ids: end-of-text begins a prompt and ends a response that is not cut.

    A row is a fault if a character is not in the vocabulary or if it is too long; a pair also if, as ids, chosen
    equals rejected, it stands there already, or another prefers the other way round: of two in conflict neither
    is used. Completions may repeat.

    Parameters
    ----------
    rows : sequence of Row
    tokenizer : Tokenizer
    n_positions : int
        The model's; prompt and response may have one token more, since the last is never an input.
    truncation : str
        What happens to a row that is longer. "none": it is a fault. "prompt": the beginning of the prompt goes,
        then what of the responses is still too much. "response": the other way round. Every response keeps a token.

    Raises
    ------
    ValueError
        If there is no such truncation.
    """
    if truncation not in TRUNCATIONS:
        raise ValueError(f"truncation must be one of {', '.join(TRUNCATIONS)}, not {truncation!a}")
    encoded = Encoded([], [], [], [])
    for row in rows:
        try:
            x = [END_OF_TEXT, *tokenizer.encode(row.prompt)]
            ys = [[*tokenizer.encode(response), END_OF_TEXT] for response in row.responses]
        except UnknownCharacterError as error:
            encoded.faults.append(Fault(row.line, str(error), row.text))
            continue
        excess = len(x) + max(map(len, ys)) - (n_positions + 1)
        if excess > 0 and truncation == "none":
            length = n_positions + 1 + excess
            reason = f"has {length} tokens, {n_positions + 1} fit: choose a truncation, or a longer context"
            encoded.faults.append(Fault(row.line, reason, row.text))
            continue
        if excess > 0:
            x, ys = truncated(x, ys, n_positions + 1, truncation)
            encoded.truncated.append(row.line)
        if len(ys) == 2 and ys[0] == ys[1]:
            encoded.faults.append(Fault(row.line, "chosen equals rejected, as ids", row.text))
            continue
        encoded.rows.append(row)
        encoded.ids.append((x, *ys))
    return consistent(encoded) if all(len(row.responses) == 2 for row in rows) else encoded


def consistent(encoded: Encoded) -> Encoded:
    """The rows without those that repeat another and without those that contradict another, as ids."""
    keys = [tuple(map(tuple, ids)) for ids in encoded.ids]
    first: dict[tuple[tuple[int, ...], ...], int] = {}
    for key, row in zip(keys, encoded.rows):
        first.setdefault(key, row.line)
    kept = Encoded([], [], list(encoded.faults), encoded.truncated)
    for key, row, ids in zip(keys, encoded.rows, encoded.ids):
        x, w, l = key
        opposite = first.get((x, l, w))
        if first[key] < row.line:
            kept.faults.append(Fault(row.line, f"repeats line {first[key]}", row.text))
        elif opposite is not None:
            reason = f"conflicts with line {opposite}, which prefers the other response"
            kept.faults.append(Fault(row.line, reason, row.text))
        else:
            kept.rows.append(row)
            kept.ids.append(ids)
    return kept


def truncated(x: list[int], ys: list[list[int]], most: int, truncation: str) -> tuple[list[int], list[list[int]]]:
    """A prompt and its responses, cut so that each text has at most `most` tokens, two or more."""
    if truncation == "response":
        room = max(1, most - len(x))  # for a response
        x_room = most - min(room, max(map(len, ys)))
    else:
        x_room = max(1, most - max(map(len, ys)))
    x = [x[0], *x[1:][max(0, len(x) - x_room) :]]
    return x, [y[: most - len(x)] for y in ys]


def split(
    items: Sequence[T], share: float, rng: numpy.random.Generator, key: Callable[[T], Hashable] = lambda item: item
) -> tuple[list[T], list[T]]:
    """Items to train on and items held out: those of a `share` of the distinct keys, at least one and not all.

    Raises
    ------
    ValueError
        If there are not two different keys.
    """
    distinct = list(dict.fromkeys(map(key, items)))
    if len(distinct) < 2:
        raise ValueError("at least two different prompts or lines are needed, one to train on and one to hold out")
    count = min(max(1, round(share * len(distinct))), len(distinct) - 1)
    chosen = {distinct[i] for i in rng.permutation(len(distinct))[:count]}
    return [item for item in items if key(item) not in chosen], [item for item in items if key(item) in chosen]


def set_aside(path: Path, faults: Sequence[Fault], strict: bool) -> str:
    """Faults as JSON Lines, to be written to a file; refuses them if `strict`.

    Raises
    ------
    ValueError
        If there are any and `strict` is true; names the first and their number.
    """
    if faults and strict:
        raise ValueError(
            f"{path}, line {faults[0].line}: {faults[0].reason} ({len(faults)} such rows; without --strict they are "
            "set aside)"
        )
    return "".join(json.dumps({"file": path.name, **fault._asdict()}) + "\n" for fault in faults)
