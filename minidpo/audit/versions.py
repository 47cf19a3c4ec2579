"""Two versions of the data: the rows that were added, removed and relabelled, and who or what rows are from."""

import collections
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ..data import preferences
from ..data.preferences import PAIRS, Row
from ..run.files import CheckpointError, json_object, read_text
from ..run.folder import run_description
from ..tokenizer import printable
from .calibration import wilson
from .provenance import FILES, NOT_RECORDED, Link, file_sum, run_of

FIELDS = ("source", "rubric")  # of a row, kept and counted
MOST_NAMES, MOST_CHARACTERS, MOST_LISTED = 100, 100, 20


def origin(row: Row, field: str) -> str | None:
    """Who or what a row is from, in at most `MOST_CHARACTERS`; None if it does not say."""
    value = json.loads(row.text).get(field)
    return None if value is None else (value if isinstance(value, str) else json.dumps(value))[:MOST_CHARACTERS]


def counts(parts: Mapping[str, Sequence[Row]], set_aside: str) -> dict[str, Any]:
    """How many rows have which use, and which source and rubric: the commonest names, then "others"."""
    result: dict[str, Any] = {**{use: len(rows) for use, rows in parts.items()}, "set aside": set_aside.count("\n")}
    for field in FIELDS:
        names = collections.Counter(origin(row, field) for rows in parts.values() for row in rows)
        unnamed = names.pop(None, 0)
        if names:
            named = collections.Counter(dict(names.most_common(MOST_NAMES)))
            others = collections.Counter({"others": names.total() - named.total(), NOT_RECORDED: unnamed})
            result[field] = dict(named + others)
    return result


class Changes(NamedTuple):
    """How a run's rows differ from another run's."""

    added: list[Row]
    removed: list[Row]
    relabelled: list[tuple[Row, Row]]  # this run's and the other's, of one prompt and two responses
    both: list[tuple[Row, Row]]  # pairs that both label, the relabelled among them


def rows_of(run: Path) -> list[Row]:
    """The rows that a run used, read again from its data, which must not have changed."""
    link = Link(run, run_description(run))
    rows, unused = [], set()
    if link.description["arguments"][0] not in ("sft", "dpo"):
        raise CheckpointError(f"{run}: is not a run of sft or dpo, whose data has rows")
    for line in read_text(run / "set_aside.jsonl", 2**32).splitlines():
        fault = json_object(line, f"{run / 'set_aside.jsonl'}:")
        unused.add((fault.get("line"), fault.get("text")))
    for _, path, recorded in link.inputs(FILES):
        if file_sum(path) != recorded:
            raise CheckpointError(f"{path}: has changed since {run} began: its rows are not those of that run")
        fields = PAIRS if link.description["arguments"][0] == "dpo" else preferences.fields_of(path)
        rows += preferences.read(path, fields)[0]
    return [row for row in rows if (row.line, row.text) not in unused]


def majority(rows: Sequence[Row]) -> Row | None:
    """The pair as most votes of one question order it, with the line of a row that says so; None if two are equal."""
    votes: dict[str, list[float]] = {response: [] for response in rows[0].responses}
    for row in rows:
        for response, n in zip(row.responses, row.votes):
            votes[response].append(n)
    (m, other), (n, label) = sorted((math.fsum(each), response) for response, each in votes.items())
    first = next((row for row in rows if row.responses[0] == label), rows[0])
    return None if math.isclose(n, m) else first._replace(responses=(label, other))


def changes(run: Path, other: Path) -> Changes:
    """Rows added, removed and relabelled from another run's data to this run's."""
    new: dict[tuple[str, ...], list[Row]] = collections.defaultdict(list)
    old: dict[tuple[str, ...], list[Row]] = collections.defaultdict(list)
    for questions, folder in ((new, run), (old, other)):
        for row in rows_of(run_of(folder)):
            questions[row.prompt, *sorted(row.responses)].append(row)
    added = [row for key, rows in new.items() for row in rows[len(old.get(key, ())) :]]
    removed = [row for key, rows in old.items() for row in rows[len(new.get(key, ())) :]]
    labels = [(majority(new[key]), majority(old[key])) for key in new if key in old and len(key) == 3]
    both = [(a, b) for a, b in labels if a and b]
    return Changes(added, removed, [(a, b) for a, b in both if a.responses != b.responses], both)


def flip_rate(flipped: int, n: int) -> str:
    """A share of pairs with its interval, in words."""
    low, high = wilson(flipped, n)
    share = f", {flipped / n:.3f} ({low:.3f} to {high:.3f})" if n else ""
    return f"{flipped} of {n} pairs that both label are relabelled{share}"


def as_text(found: Changes) -> str:
    """The counts in full, the flip rate with its 95 % interval, also by source and rubric, and the first rows."""

    def text(row: Row) -> str:
        return " | ".join(ascii(x if len(x) <= 40 else x[:37] + "...") for x in (row.prompt, *row.responses))

    lines = [f"{len(found.added)} rows added, {len(found.removed)} removed"]
    lines.append(flip_rate(len(found.relabelled), len(found.both)))
    for field in FIELDS:
        flipped, both = (
            collections.Counter(origin(a, field) for a, _ in each) for each in (found.relabelled, found.both)
        )
        names = [name for name, _ in both.most_common(MOST_NAMES) if name is not None]
        lines += [f"  {field} {printable(name)}: {flip_rate(flipped[name], both[name])}" for name in names]
    listed = [("added", found.added), ("removed", found.removed), ("relabelled", [a for a, _ in found.relabelled])]
    places = {id(a): f" (line {b.line} there)" for a, b in found.relabelled}
    for title, rows in listed:
        more = f", the first {MOST_LISTED} of {len(rows)}" if len(rows) > MOST_LISTED else ""
        lines += ["", f"{title}{more}"] * bool(rows)
        lines += [f"  line {row.line}{places.get(id(row), '')}: {text(row)}" for row in rows[:MOST_LISTED]]
    return "\n".join(lines)
