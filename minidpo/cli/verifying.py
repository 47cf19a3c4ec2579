"""The commands that check what others made: a training log, for now."""

from json import dumps
from pathlib import Path
from typing import Annotated

from ..verify import doctor as diagnosis
from ..verify.doctor import table as faults
from . import options as o
from .options import Default
from .parser import command


@command("verify")
def doctor(
    file: Annotated[o.Log | None, Default("none, with --table")] = None, *, table: o.Table = False, json: o.Json = False
) -> int:
    """Say what is wrong in a training log, with evidence and likely causes.

    Read metrics.jsonl, TRL's trainer_state.json, JSON Lines or any text with printed dicts of metrics. Print what is
    wrong, the steps and numbers that show it, the usual causes in order of likelihood, and how to tell them apart in a
    minute. The exit status is 0 if nothing is unusual, 1 if something is, 2 if the file cannot be read.
    """
    if table == (file is not None):
        raise ValueError("give a log, or --table for the faults that it knows, and not both")
    if file is None:
        print(faults())
        return 0
    found = diagnosis(Path(file))
    print(dumps(found.as_dict(), allow_nan=False) if json else found)
    return 1 if found.findings else 0
