"""Preference data: read, validate, encode, split.

A file is JSON Lines, in TRL's format: `{"prompt": ..., "chosen": ..., "rejected": ...}` for preferences,
`{"prompt": ..., "completion": ...}` for supervised fine-tuning. Prompt and response are joined without a separator,
so a prompt that should end in a newline contains one. Every line that cannot be used becomes a `Fault` with its reason.

A pair may have been judged more than once: `"votes": [7, 3]` beside it says that seven preferred chosen and three
rejected, `"p": 0.7` that chosen is preferred with this probability. `dpo` and `evaluate` use both; other commands read
the label alone.
"""

import collections
import contextlib
import hashlib
import itertools
import json
import math
import os
import re
import stat
from collections.abc import Callable, Hashable, Iterator, Sequence
from io import BufferedReader
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy

from ..scoring import collate as collate
from ..tokenizer import END_OF_TEXT, TURN, Tokenizer, UnknownCharacterError

PAIRS = ("prompt", "chosen", "rejected")
COMPLETIONS = ("prompt", "completion")
PROMPTS = ("instruction", "question", "query", "input", "context", "user")  # what other data sets call a prompt
MAX_LINE_BYTES = 2**20  # without the newline
TRUNCATIONS = ("none", "prompt", "response")
REPEATS = ("set-aside", "count")
FEWEST, MOST_VOTES = 1e-6, 1e9  # of a response, if any: sums are exact enough in float32
USES = ("train on", "hold out", "test on")  # of the parts

MOST_BYTES = 2**28  # of a JSON array
TO_LINES = ".to_json('NEW', orient='records', lines=True)"  # NEW and FILE become names
KINDS = {  # of files that begin with these bytes, and what makes text of them
    b"\x1f\x8b": ("compressed with gzip", "gunzip FILE"),
    b"BZh91AY&SY": ("compressed with bzip2", "bunzip2 FILE"),
    b"\xfd7zXZ": ("compressed with xz", "unxz FILE"),
    b"\x28\xb5\x2f\xfd": ("compressed with zstd", "unzstd FILE"),
    b"PK\x03\x04": ("a ZIP archive", "unzip FILE"),
    b"PAR1": ("Parquet", "pandas.read_parquet('FILE')" + TO_LINES),
    b"ARROW1\0": ("Arrow", "pandas.read_feather('FILE')" + TO_LINES),
}
ANY_OBJECT = re.compile(rb"^[ \t]*\{.*\}[ \t\r]*$", re.MULTILINE)  # a line that is one
CONVERT = "minidpo data convert makes texts of it"
ONE_OBJECT = "a file of pairs has one JSON object on each line (JSON Lines)"

T = TypeVar("T")


class Line(NamedTuple):
    """A line of a file that is a JSON object."""

    line: int  # counted from 1
    document: dict[str, Any]
    text: str  # the whole line


class Row(NamedTuple):
    """A line of a file that can be used."""

    line: int  # counted from 1
    prompt: str
    responses: tuple[str, ...]  # chosen and rejected, or one completion
    text: str  # the whole line
    votes: tuple[float, float] = (1, 0)  # of a pair: for chosen, for rejected


class Fault(NamedTuple):
    """A line that cannot be used, and why."""

    line: int
    reason: str
    text: str


class Encoded(NamedTuple):
    """Rows as ids."""

    rows: list[Row]
    ids: list[tuple[list[int], ...]]  # prompt and responses of each row
    faults: list[Fault]
    truncated: list[int]  # line numbers of those of these rows that were cut to fit the context
    lost: float = 0  # votes of pairs that are faults because they repeat or contradict another


def read(path: str | Path, fields: Sequence[str] = PAIRS) -> tuple[list[Row], list[Fault]]:
    """Read a JSON Lines file: the rows that can be used, and the lines that cannot.

    A line is a fault if it is not a JSON object in UTF-8 of at most `MAX_LINE_BYTES`, if a field is missing or not a
    string, if a response is empty, if chosen equals rejected, or if votes make no sense. A fault in another of TRL's
    shapes names that shape and says how to convert it. Empty lines are skipped, and so are columns that are not in
    `fields`, but for the votes of pairs.
    """
    entries = [each if isinstance(each, Fault) else row_or_fault(each, fields) for each in read_objects(path)]
    return [each for each in entries if isinstance(each, Row)], [each for each in entries if isinstance(each, Fault)]


def read_objects(path: str | Path, arrays: bool = False) -> Iterator[Line | Fault]:
    """The lines of a file that are JSON objects, and the faults of the others; or the items of an array, if wanted."""
    with open_regular(path) as file:
        if arrays and is_array(file):
            yield from read_array(path, file)
            return
        refuse_other_formats(path, file)
        for line in itertools.count(1):
            content = file.readline(MAX_LINE_BYTES + 2)
            if not content:
                break
            if len(content.rstrip(b"\r\n")) > MAX_LINE_BYTES:
                yield Fault(line, f"is longer than {MAX_LINE_BYTES} bytes", ascii(content[:100]))
                while content and not content.endswith(b"\n"):
                    content = file.readline(MAX_LINE_BYTES)
            elif content.strip():
                yield line_or_fault(line, content)


def read_array(path: str | Path, file: BufferedReader) -> Iterator[Line | Fault]:
    """The items of a JSON array, each as if it were a line."""
    content = file.read(MOST_BYTES + 1)
    if len(content) > MOST_BYTES:
        raise ValueError(f"{path} is longer than {MOST_BYTES} bytes: jq -c '.[]' makes lines of it")
    try:
        items = json.loads(content.decode("utf-8-sig"), object_pairs_hook=unique_keys)
    except (ValueError, KeyError, RecursionError) as error:
        raise ValueError(f"{path} is a JSON array that cannot be read ({error})") from error
    for line, item in enumerate(items, 1):
        yield line_or_fault(line, json.dumps(item).encode())


def is_array(file: BufferedReader) -> bool:
    """Whether a file begins as a JSON array of objects does."""
    head = file.read(MAX_LINE_BYTES).removeprefix(b"\xef\xbb\xbf").strip()
    file.seek(0)
    return bool(re.match(rb"\[\s*(\{|\Z)", head))


def open_regular(path: str | Path) -> BufferedReader:
    """Open a file of text in UTF-8 for reading.

    Raises ValueError for a pipe or device, which cannot be read twice or never ends, and for a known binary format.
    """
    file = open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK))  # a pipe may never answer
    fault, status = "", os.fstat(file.fileno())
    if not stat.S_ISREG(status.st_mode):
        fault = "is not a regular file: save its content in one and pass that"
    else:
        head = file.peek(256)
        kind = next((kind for first_bytes, kind in KINDS.items() if head.startswith(first_bytes)), None)
        marked = head[:2] in (b"\xff\xfe", b"\xfe\xff") and status.st_size % 2 == 0
        if kind is None and (marked or head.count(0) * 8 > len(head)):
            kind = "text in UTF-16" if marked else "binary, or text in UTF-16 or UTF-32", "save it as UTF-8"
        fault = f"is {kind[0]}, not text in UTF-8: {remedy(kind[1], path)}" if kind else ""
    if fault:
        file.close()
        raise ValueError(f"{path} {fault}")
    return file


def refuse_other_formats(path: str | Path, file: BufferedReader) -> None:
    """Raise ValueError if a file's beginning shows that it is not JSON Lines, with what to do; then rewind it."""
    head = file.read(MAX_LINE_BYTES).removeprefix(b"\xef\xbb\xbf").strip()
    file.seek(0)
    kind = ""
    if is_array(file):
        kind = "is a JSON array: minidpo data convert FILE --out NEW"
    elif b"\r" in head and b"\n" not in head:
        kind = "ends its lines with carriage returns alone: tr '\\r' '\\n' <FILE >NEW"
    elif head and len(head.partition(b"\n")[0]) < MAX_LINE_BYTES // 2 and not re.search(ANY_OBJECT, head):
        kind = "is CSV, another table or plain text: pandas.read_csv('FILE')" + TO_LINES
        if head.startswith(b"{"):
            kind = "has JSON objects that are broken off or go over several lines: jq -c . FILE >NEW"
    if kind:
        raise ValueError(f"{path} {remedy(kind, path)}; {ONE_OBJECT}")


def remedy(text: str, path: str | Path) -> str:
    """What to do with a file, by its name and that of a new one beside it."""
    new = Path(path).with_suffix("").with_suffix(".lines.jsonl")
    return text.replace("NEW", str(new)).replace("FILE", str(path))


def fields_of(path: str | Path) -> tuple[str, ...]:
    """`PAIRS` or `COMPLETIONS`, whichever more of the file's rows have."""
    votes = 0  # of rows for PAIRS, less those for COMPLETIONS
    with open_regular(path) as file:
        for content in iter(lambda: file.readline(MAX_LINE_BYTES + 2), b""):
            with contextlib.suppress(ValueError, RecursionError):
                document = json.loads(content.decode("utf-8-sig"))
                keys = document.keys() if isinstance(document, dict) else set()
                votes += 1 if {"chosen", "rejected"} <= keys else -1 if "completion" in keys else 0
    return PAIRS if votes >= 0 else COMPLETIONS


def line_or_fault(line: int, content: bytes) -> Line | Fault:
    """Parse one line."""
    text = content.decode("utf-8", errors="backslashreplace").removeprefix("\ufeff").rstrip("\r\n")

    def fault(reason: str) -> Fault:
        return Fault(line, reason, text)

    try:
        document = json.loads(content.decode("utf-8-sig").rstrip(), object_pairs_hook=unique_keys)
    except UnicodeDecodeError as error:
        return fault(f"is not UTF-8 (byte {error.start}): save the file as UTF-8")
    except json.JSONDecodeError as error:
        return fault(f"is not JSON ({error.msg}, column {error.colno})")
    except KeyError as error:
        return fault(f"key {error.args[0]!a} occurs twice")
    except (ValueError, RecursionError):
        return fault("is JSON that Python cannot read: a number has too many digits, or the nesting is too deep")
    return Line(line, document, text) if isinstance(document, dict) else fault("is not a JSON object")


def row_or_fault(each: Line, fields: Sequence[str]) -> Row | Fault:
    """The texts of a line."""
    line, document, text = each

    def fault(reason: str) -> Fault:
        return Fault(line, reason, text)

    if any(not isinstance(document.get(name), str) for name in fields):
        shape, hint = other_shape(document, fields)
        if shape:
            return fault(f"this is the {shape} shape; {hint}")
    missing = [name for name in fields if name not in document]
    if missing:
        return fault(f"{', '.join(missing)} {'is' if len(missing) == 1 else 'are'} missing")
    for name in fields:
        if not isinstance(document[name], str):
            return fault(f"{name} is not a string")
        if any("\ud800" <= c <= "\udfff" for c in document[name]):
            return fault(f"{name} contains half a surrogate pair, which is not a character")
    prompt, *responses = (document[name] for name in fields)
    if "" in responses:
        return fault(f"{fields[1 + responses.index('')]} is empty")
    if len(set(responses)) < len(responses):
        return fault("chosen equals rejected")
    try:
        return Row(line, prompt, tuple(responses), text, votes_of(document) if len(responses) == 2 else (1, 0))
    except ValueError as error:
        return fault(str(error))


def votes_of(document: dict[str, Any]) -> tuple[float, float]:
    """A pair's votes for chosen and for rejected; raises ValueError if they make no sense."""
    votes, p = document.get("votes"), document.get("p")
    if votes is not None and p is not None:
        raise ValueError("has both votes and p: remove one of them")
    if p is not None:
        if type(p) not in (int, float) or not 0 <= p <= 1:
            raise ValueError("p is the probability that chosen is preferred, from 0 to 1: correct or remove it")
        return p, 1 - p
    both: list[Any] = (
        [1, 0] if votes is None else votes if isinstance(votes, list) and len(votes) == 2 else [None, None]
    )
    if any(type(v) not in (int, float) or not (v == 0 or FEWEST <= v <= MOST_VOTES) for v in both) or not any(both):
        bounds = f"each 0 or from {FEWEST:g} to {MOST_VOTES:g}, and not both 0: correct or remove them"
        raise ValueError(f"votes are two numbers, for chosen and for rejected, as [7, 3], {bounds}")
    return both[0], both[1]


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; raises KeyError for a key that occurs twice."""
    document: dict[str, Any] = {}
    for key, value in pairs:
        if key in document:
            raise KeyError(key)
        document[key] = value
    return document


def other_shape(document: dict[str, Any], fields: Sequence[str]) -> tuple[str, str]:
    """TRL's name for a row's shape, and how to convert it; two empty strings if the shape is that of `fields`."""
    if any(isinstance(document.get(name), list) for name in ("messages", *PAIRS, *COMPLETIONS)):
        return "conversational", CONVERT
    if "completion" in document and "label" in document:
        return "unpaired-preference", 'put two responses to the same prompt into one row, as "chosen" and "rejected"'
    if "completion" in document and "chosen" in fields and not {"chosen", "rejected"} & document.keys():
        return "prompt-completion", "it has one response per prompt; `sft` takes it as its --data"
    other = next((name for name in PROMPTS if isinstance(document.get(name), str)), None)
    if other and "prompt" not in document and set(fields[1:]) <= document.keys():
        return "instruction", f'rename "{other}" to "prompt"'
    if "prompt" not in document and {"chosen", "rejected"} <= document.keys() and "chosen" in fields:
        return "implicit-prompt", CONVERT
    if "text" in document and not set(fields) & document.keys():
        return "language-modeling", "write each text on a line of a plain text file and pass that to `pretrain`"
    return "", ""


def encode(
    rows: Sequence[Row], tokenizer: Tokenizer, n_positions: int, truncation: str = "none", repeats: str = "set-aside"
) -> Encoded:
    """Encode rows as ids: end-of-text begins each prompt, and ends each response that is not cut.

    Prompt and response may have n_positions + 1 tokens together, since the last token is never an input. For a longer
    row, `truncation` decides: "none" makes it a fault; "prompt" cuts the beginning of the prompt first, then the ends
    of the responses; "response" cuts in the opposite order. Every response keeps at least one token.

    A row is also a fault if a character is not in the vocabulary. A pair is one too if its ids repeat an earlier pair,
    if chosen equals rejected, or if another pair prefers the opposite: then neither of the two is used. With `repeats`
    "count" such pairs add their votes to the first of them instead. Completions may repeat.
    """
    if truncation not in TRUNCATIONS:
        raise ValueError(f"truncation must be one of {', '.join(TRUNCATIONS)}, not {truncation!a}")
    encoded, limit = Encoded([], [], [], []), n_positions + 1
    for row in rows:
        names = ("the chosen response", "the rejected response") if len(row.responses) == 2 else ("the response",)
        try:
            x = [END_OF_TEXT, *tokenizer.encode(row.prompt, "the prompt")]
            ys = [[*tokenizer.encode(y, name), END_OF_TEXT] for y, name in zip(row.responses, names)]
        except UnknownCharacterError as error:
            encoded.faults.append(Fault(row.line, str(error), row.text))
            continue
        longest, name = max(zip(map(len, ys), names))
        if len(x) + longest > limit and truncation == "none":
            with_response = f" with {name}" if len(ys) == 2 else ""
            reason = (
                f"has {len(x) + longest} tokens{with_response}, but only {limit} fit the context: shorten it, choose a "
                "truncation, or train a model with a longer context"
            )
            encoded.faults.append(Fault(row.line, reason, row.text))
            continue
        too_long = len(x) + longest > limit
        if too_long:
            x, ys = cut(x, ys, limit, truncation)
        if len(ys) == 2 and ys[0] == ys[1]:
            reason = "chosen and rejected have the same ids, after truncation or replacement"
            encoded.faults.append(Fault(row.line, reason, row.text))
            continue
        encoded.rows.append(row)
        encoded.ids.append((x, *ys))
        encoded.truncated.extend([row.line] * too_long)
    if not all(len(row.responses) == 2 for row in rows):
        return encoded
    result = counted(encoded) if repeats == "count" else consistent(encoded)
    usable = {row.line for row in result.rows}
    return result._replace(truncated=[line for line in encoded.truncated if line in usable])


def cut(x: list[int], ys: list[list[int]], limit: int, truncation: str) -> tuple[list[int], list[list[int]]]:
    """Cut a prompt and its responses so that the prompt with either response has at most `limit` (>= 2) tokens."""
    if truncation == "response":
        y_limit = max(1, limit - len(x))
        x_limit = limit - min(y_limit, max(map(len, ys)))
    else:
        x_limit = max(1, limit - max(map(len, ys)))
    x = [x[0], *x[1:][max(0, len(x) - x_limit) :]]  # end-of-text stays
    return x, [y[: limit - len(x)] for y in ys]


def consistent(encoded: Encoded) -> Encoded:
    """Set aside pairs that repeat an earlier pair or contradict another, compared as ids."""
    keys = [tuple(map(tuple, ids)) for ids in encoded.ids]
    first_lines: dict[tuple[tuple[int, ...], ...], int] = {}
    for key, row in zip(keys, encoded.rows):
        first_lines.setdefault(key, row.line)
    result = Encoded([], [], list(encoded.faults), [])
    for key, row, ids in zip(keys, encoded.rows, encoded.ids):
        x, w, l = key
        first, opposite = first_lines[key], first_lines.get((x, l, w))
        if first < row.line:
            result.faults.append(Fault(row.line, f"repeats line {first}", row.text))
        elif opposite is not None:
            reason = f"conflicts with line {opposite}, which prefers the other response"
            result.faults.append(Fault(row.line, reason, row.text))
        else:
            result.rows.append(row)
            result.ids.append(ids)
    return result._replace(lost=label_count(encoded.rows) - label_count(result.rows))


def counted(encoded: Encoded) -> Encoded:
    """Add the votes of pairs that repeat an earlier pair or contradict it, compared as ids, to those of that pair."""
    result = Encoded([], [], list(encoded.faults), [])
    places: dict[tuple[tuple[int, ...], ...], tuple[int, bool]] = {}  # of a pair in the result; whether it contradicts
    for row, ids in zip(encoded.rows, encoded.ids):
        x, w, l = map(tuple, ids)
        i, contradicts = places.setdefault((x, w, l), (len(result.rows), False))
        places.setdefault((x, l, w), (i, True))
        if i == len(result.rows):
            result.rows.append(row._replace(votes=(0, 0)))
            result.ids.append(ids)
        (a, b), (more, fewer) = result.rows[i].votes, reversed(row.votes) if contradicts else row.votes
        result.rows[i] = result.rows[i]._replace(votes=(a + more, b + fewer))
    return result


def label_count(rows: Sequence[Row]) -> float:
    """The sum of all votes."""
    return math.fsum(sum(row.votes) for row in rows)


def label_metrics(rows: Sequence[Row]) -> dict[str, float]:
    """The number n of labels, the share of split pairs, and what no DPO loss can go below; nothing without votes.

    sum_i n_i H(p_i) / sum_i n_i,   H(p) = -p log p - (1 - p) log(1 - p), in nats
    """
    if all(row.votes == (1, 0) for row in rows):
        return {}
    labels = label_count(rows)
    nats = math.fsum(-v * math.log(v / sum(row.votes)) for row in rows for v in row.votes if v)
    split = sum(all(row.votes) for row in rows) / len(rows)
    return {"labels": labels, "pairs/split": split, "loss/infimum": nats / labels}


def split(
    items: Sequence[T], fraction: float, rng: numpy.random.Generator, key: Callable[[T], Hashable] = lambda item: item
) -> tuple[list[T], list[T]]:
    """Split items into training and held-out ones: a `fraction` of the distinct keys is held out, at least one.

    Items with the same key stay together. At least one key is left to train on.
    """
    keys = list(dict.fromkeys(map(key, items)))
    if len(keys) < 2:
        raise ValueError(
            "at least two different prompts or texts are needed, one to train on and one to hold out, "
            f"not {len(keys)}: add more, or pass --held-out-data"
        )
    count = min(max(1, round(fraction * len(keys))), len(keys) - 1)
    held_out = {keys[i] for i in rng.permutation(len(keys))[:count]}
    return [item for item in items if key(item) not in held_out], [item for item in items if key(item) in held_out]


def set_aside(path: Path, faults: Sequence[Fault], strict: bool) -> str:
    """The faults of a file as JSON Lines; with `strict`, raises ValueError for the first of them instead."""
    if faults and strict:
        number = "1 such row" if len(faults) == 1 else f"{len(faults)} such rows"
        raise ValueError(
            f"{path}, line {faults[0].line}: {faults[0].reason} ({number}; without --strict they are set aside)"
        )
    return "".join(json.dumps({"file": str(path), **fault._asdict()}) + "\n" for fault in faults)


def read_texts(path: Path, blocks: bool) -> dict[int, str]:
    """The lines of a file that are not empty, or its blocks of lines, by the number of their first line."""
    with open_regular(path) as file:
        try:
            content = file.read().decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}: byte {error.start} is not UTF-8: save the file as UTF-8") from error
    texts, line, separator = {}, 1, "\n\n" if blocks else "\n"
    for text in content.split(separator):
        if text.strip("\n"):
            texts[line + len(text) - len(text.lstrip("\n"))] = text.strip("\n")
        line += (text + separator).count("\n")
    if not texts:
        raise ValueError(f"{path}: there is no text in it")
    return texts


class Usable(NamedTuple):
    """The rows of a file that can be used, the others with their reasons, and what is said of them."""

    path: Path
    ids: Encoded
    faults: list[Fault]
    set_aside: str  # the faults as JSON Lines
    summary: str
    remarks: list[str]


def usable_rows(
    data: Path, fields: Sequence[str], tokenizer: Tokenizer, n_positions: int, truncation: str, strict: bool,
    repeats: str = "",
) -> Usable:  # fmt: skip
    """Read and encode a file; raises ValueError if no row can be used. With `repeats`, also say what was voted."""
    rows, faults = read(data, fields)
    ids = encode(rows, tokenizer, n_positions, truncation, repeats)
    found, sentences = usable(data, ids, faults, strict), remarks(data, ids.rows, tokenizer)
    if repeats == "set-aside" and ids.lost:
        fact = "labels are lost with pairs that repeat or contradict others: --repeats count keeps them"
        sentences.append(f"{data}: {ids.lost:g} of {ids.lost + label_count(ids.rows):g} {fact}")
    summary = found.summary
    if repeats and (labels := label_metrics(ids.rows)):
        summary += f", {labels['labels']:g} labels; {labels['pairs/split']:.1%} of the pairs are split"
        summary += f", so that no DPO loss on them is below {labels['loss/infimum']:.4f}"
    return found._replace(summary=summary, remarks=sentences)


def usable_ids(data: Path, vocab_size: int, n_positions: int, strict: bool) -> Usable:
    """The same for pairs whose texts are lists of ids, used as they are; a row that is too long is a fault."""
    ids, faults = Encoded([], [], [], []), []
    for each in read_objects(data):
        pair: list[Any] = [] if isinstance(each, Fault) else [each.document.get(name) for name in PAIRS]
        if isinstance(each, Fault):
            faults.append(each)
        elif not all(
            isinstance(x, list) and x and all(type(i) is int and 0 <= i < vocab_size for i in x) for x in pair
        ):
            faults.append(Fault(each.line, f"needs lists of ids from 0 to {vocab_size - 1}, none empty", each.text))
        elif (count := len(pair[0]) + max(map(len, pair[1:]))) > n_positions + 1:
            faults.append(Fault(each.line, f"has {count} ids, but only {n_positions + 1} fit the context", each.text))
        elif pair[1] == pair[2]:
            faults.append(Fault(each.line, "chosen equals rejected", each.text))
        else:
            ids.rows.append(Row(each.line, "", (), each.text))
            ids.ids.append(tuple(pair))
    return usable(data, consistent(ids), faults, strict)


def usable(data: Path, ids: Encoded, faults: list[Fault], strict: bool) -> Usable:
    """What can be used of a file, with its summary; raises ValueError if no row can."""
    faults = sorted(faults + ids.faults)
    document = set_aside(data, faults, strict)
    if not ids.rows:
        count = collections.Counter(fault.reason for fault in faults)
        first = max(faults, key=lambda fault: count[fault.reason], default=None)  # the first of the commonest
        raise ValueError(f"{data}: no row can be used" + (f" (line {first.line}: {first.reason})" if first else ""))
    summary = f"{data.name}: {len(ids.rows)} rows, {len(faults)} set aside"
    summary += f", {len(ids.truncated)} truncated" * bool(ids.truncated)
    return Usable(data, ids, faults, document, summary, [])


def remarks(path: Path, rows: Sequence[Row], tokenizer: Tokenizer) -> list[str]:
    """Sentences about rows that can be used but may not be what their owner wanted."""
    result = []
    if replaced := tokenizer.replaced(text for row in rows for text in (row.prompt, *row.responses)):
        result.append(f"{path}: {replaced}")
    bare = [row.line for row in rows if not row.prompt.endswith(TURN)]
    echoes = [row.line for row in rows if row.responses[0].lstrip().startswith(row.prompt.strip() or "\0")]
    for lines, fact in (
        (bare, "have a prompt without a final newline, so that the response continues its last line"),
        (
            echoes,
            "have a chosen response or completion that repeats the prompt, so that the model learns to say it again",
        ),
    ):
        if lines:
            result.append(f"{path}: {len(lines)} of {len(rows)} rows {fact} (first: line {lines[0]})")
    return result


def usable_text(data: Path, fields: Sequence[str], n_positions: int, truncation: str) -> str:
    """The text of a file's rows that a new model can use: its characters are the model's vocabulary."""
    rows, _ = read(data, fields)
    every = Tokenizer.from_text("".join(row.prompt + "".join(row.responses) for row in rows))
    return "".join(row.prompt + "".join(row.responses) for row in encode(rows, every, n_positions, truncation).rows)


def part(prompt: str, seed: int, held_out_share: float, test_share: float) -> int:
    """The part of a prompt: 0 to train on, 1 held out, 2 to test on. Other prompts have no influence on it."""
    u = int.from_bytes(hashlib.sha256(f"{seed}:{prompt}".encode()).digest()[:8], "big") / 2**64  # in [0, 1]
    return 1 if u < held_out_share else 2 if u >= 1 - test_share else 0


def parts(
    train: Usable, held_out: Usable | None, seed: int, held_out_share: float, test_share: float
) -> tuple[list[Encoded], list[Fault]]:
    """Rows to train on, held out and to test on, in three disjoint sets of prompts; rows that would join two sets.

    Prompts are compared as written. Those that are equal only as ids, cut or with replaced characters, are set aside in
    the later part. A file of held-out rows replaces the share, and may have no prompt in common with the other file.
    """
    rows = [(part(row.prompt, seed, held_out_share, test_share), row, ids) for row, ids in zip(*train.ids[:2])]
    if held_out:
        prompts = {row.prompt for row in train.ids.rows} | {tuple(x) for x, *_ in train.ids.ids}
        for row, (x, *_) in zip(*held_out.ids[:2]):
            if {row.prompt, tuple(x)} & prompts:
                raise ValueError(f"{held_out.path}, line {row.line}: this prompt is in {train.path} too")
    result, faults = [Encoded([], [], [], []) for _ in range(3)], []
    owners: dict[tuple[int, ...], tuple[int, int]] = {}  # part and line of the first row with the ids of a prompt
    for number, row, ids in sorted(rows, key=lambda entry: entry[0]):
        owner, line = owners.setdefault(tuple(ids[0]), (number, row.line))
        if owner == number:
            result[number].rows.append(row)
            result[number].ids.append(ids)
        else:
            faults.append(Fault(row.line, f"has the ids of line {line}'s prompt, which is in another part", row.text))
    if held_out:
        result[1] = held_out.ids
    for each, name, share in zip(result, USES, (1, 1, test_share)):
        if share and not each.rows:
            raise ValueError(
                f"{train.path}: none of its {len({row.prompt for _, row, _ in rows})} different prompts is one to "
                f"{name}: add prompts, change --held-out-share, --test-share or --seed, or pass --held-out-data"
            )
    return result, faults
