"""The command that says where a model comes from."""

from ..audit import provenance, versions
from ..tokenizer import printable
from . import options as o
from .parser import command


@command("look")
def card(run: o.OldRun, *, verify: o.Chain = False, against: o.OtherRun = None) -> int:
    """Say which data and models a run follows from.

    Print the chain from the first data to this run's model as Markdown, for a model card: commands, rows, what each run
    trained with and measured, and hashes. With --verify, compute every hash again and name the first link that does not
    hold; the exit status is then 1. With --against, print how the rows of two runs differ, and how often a pair that
    both label is labelled otherwise, with a 95 % interval. What has moved is looked for beside the run.
    """
    if against:
        print(versions.as_text(versions.changes(run, against)))
    elif not verify:
        print(provenance.card(run), end="")
    try:
        for line in provenance.verified(run) if verify else ():
            print(printable(line), flush=True)
    except provenance.BrokenLinkError as error:
        print(printable(f"no longer holds: {error}"))
        return 1
    return 0
