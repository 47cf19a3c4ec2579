"""The commands that check what others made: their code and their training logs."""

import importlib
import sys
import traceback
from json import dumps
from pathlib import Path
from typing import Any

from .. import verify as oracles
from ..verify import Report
from ..verify import doctor as diagnosis
from ..verify.doctor import table as faults
from . import options as o
from .parser import command


@command("verify")
def doctor(file: o.Log | None = None, *, table: o.Table = False, json: o.Json = False) -> int:
    """Say what is wrong in a training log, with evidence and likely causes.

    Read metrics.jsonl, also of a run folder, TRL's trainer_state.json, JSON Lines or any text with printed dicts of
    metrics. Print what is wrong, the steps and numbers that show it, the usual causes, likeliest first, and how to
    tell them apart in a minute. The exit status is 0 if nothing is unusual, 1 if something is, 2 if the file cannot be
    read.
    """
    if table == (file is not None):
        raise ValueError("give a log, or --table for the faults that it knows, and not both")
    if file is None:
        print(faults())
        return 0
    found = diagnosis(Path(file) / "metrics.jsonl" if Path(file).is_dir() else Path(file))
    print(dumps(found.as_dict(), allow_nan=False) if json else found)
    return 1 if found.findings else 0


@command("verify")
def verify(
    kind: o.Kind, subject: o.Subject, *, framework: o.FrameworkName = None, beta: o.TriedBeta = 0.1,
    layout: o.Layout = "labels", arguments: o.ArgumentOrder = None, json: o.Json = False,
) -> int:  # fmt: skip
    """Check somebody's DPO code, and name what is wrong with it.

    Import MODULE:FUNCTION, with the current folder first on the path, and run it: its code runs, so check only what you
    trust. A loss is checked against equation 7 and its gradient; log-probabilities cell by cell, in the layout in which
    the function takes them; a step with models of ours. The exit status is 0 if it is right, 1 if it is wrong, 2 if it
    cannot be run.
    """
    if layout != "labels" and kind != "logprobs":
        raise ValueError(f"--layout is for logprobs, not for {kind}")
    if arguments and kind != "loss":
        raise ValueError(f"--arguments is for a loss, not for {kind}")
    if kind == "logprobs" and beta != 0.1:
        raise ValueError("--beta is for a loss or a step: log-probabilities have none")
    try:
        function = imported(subject)
    except Exception as error:
        trace = traceback.format_exc(limit=-4)
        report = Report(subject, traceback=trace)
        report.fault("not_callable", f"it cannot be imported ({type(error).__name__}: {error})")
    else:
        options: dict[str, Any] = {"framework": framework}
        options |= {"layout": layout} if kind == "logprobs" else {"beta": beta}
        options |= {"arguments": arguments} if arguments else {}
        report = getattr(oracles, kind)(function, **options)
    print(dumps(report.as_dict(), allow_nan=False) if json else report)
    return 0 if report.right else 2 if report.findings[0].code == "not_callable" else 1


def imported(subject: str) -> Any:
    """The object that MODULE:NAME names, or MODULE:NAME.ATTRIBUTE."""
    module, _, name = subject.partition(":")
    if not (module and name):
        raise ValueError(f"{subject!r} is not MODULE:FUNCTION, such as my_package.losses:dpo_loss")
    sys.path.insert(0, "")
    try:
        found = importlib.import_module(module)
    finally:
        sys.path.remove("")
    for part in name.split("."):
        found = getattr(found, part)
    return found
