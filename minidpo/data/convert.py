"""Rows in TRL's other shapes, as rows of texts."""

from pathlib import Path
from typing import Any

from .preferences import COMPLETIONS, PAIRS, Fault, read_objects, row_or_fault


def convert(path: Path) -> tuple[list[dict[str, str]], list[Fault]]:
    """The rows of JSON Lines or of a JSON array in the standard shape, and those that cannot be converted."""
    rows: list[dict[str, str]] = []
    faults: list[Fault] = []
    for each in read_objects(path, arrays=True):
        try:
            if isinstance(each, Fault):
                raise ValueError(each.reason)
            row = standard(each.document)
            checked = row_or_fault(each._replace(document=row), COMPLETIONS if "completion" in row else PAIRS)
            if isinstance(checked, Fault):
                raise ValueError(checked.reason)
            rows.append(row)
        except ValueError as error:
            faults.append(Fault(each.line, str(error), each.text))
    return rows, faults


def standard(document: dict[str, Any]) -> dict[str, str]:
    """A row in the standard shape; raises ValueError with the reason why it cannot be.

    Each message of a prompt becomes a line "role: content", a response its content. Without a prompt, what chosen and
    rejected have in common at the beginning is one, messages or characters; a space before the difference stays in the
    responses, as in TRL's `extract_prompt`.
    """
    row = {name: document[name] for name in (*PAIRS, "completion") if name in document}
    if "label" in document and "chosen" not in row:
        raise ValueError("this is the unpaired-preference shape, which cannot become pairs row by row")
    if isinstance(document.get("messages"), list) and not row:
        row = {"prompt": document["messages"][:-1], "completion": document["messages"][-1:]}
    if row.keys() == {"chosen", "rejected"}:
        w, l = row["chosen"], row["rejected"]
        if not type(w) is type(l) in (str, list):
            raise ValueError("chosen and rejected are neither two texts nor two lists of messages")
        n = next((i for i, (a, b) in enumerate(zip(w, l)) if a != b), min(len(w), len(l)))
        n -= w[n - 1 : n] == " "
        row = {"prompt": w[:n], "chosen": w[n:], "rejected": l[n:]}
    return {name: as_text(name, value) for name, value in row.items()}


def as_text(name: str, value: Any) -> str:
    """A text as it is, the messages of a prompt as lines, the message of a response as its content."""
    if isinstance(value, str):
        return value
    try:
        messages = [(each["role"], each["content"]) for each in value]
    except (TypeError, KeyError) as error:
        raise ValueError(f"{name} is neither a text nor messages with role and content") from error
    if not all(isinstance(part, str) for message in messages for part in message):
        raise ValueError(f"{name} has a message whose role or content is not a text")
    if name != "prompt" and len(messages) != 1:
        raise ValueError(f"{name} has {len(messages)} messages; a response is one")
    return "".join(f"{role}: {content}\n" for role, content in messages) if name == "prompt" else messages[0][1]
