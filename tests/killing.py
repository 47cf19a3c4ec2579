"""A program that stops runs, before every write to the disk or at random instants, and resumes them.

    python killing.py writes|instants FOLDER [STRIDE]

prints a line per stop and exits with 1 at the first difference. With a stride of N only every Nth stop is tried.
At random instants the kill is real: no `finally`, no clean-up, nothing flushed. What a kill before a write would leave
on the disk is a copy of the folder then, so one run gives them all.
"""

import hashlib
import itertools
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

from minidpo.cli import main
from minidpo.run import report

report.curves = lambda path, runs: False  # takes most of the time, and is not resumed
os.fsync = lambda descriptor: None  # takes most of the rest, and a kill loses nothing that was written


def fork(arguments, before=lambda: None):
    """Run the command line in its own process, and return the id."""
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        quiet = os.open(os.devnull, os.O_WRONLY)
        os.dup2(quiet, 1)
        os.dup2(quiet, 2)
        before()
        os._exit(main(arguments))
    return child


def status_of(child):
    """Wait for a process: its exit status, or minus the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def fingerprint(run):
    """Names and contents of all files that must not depend on when a run was killed."""
    files = sorted(
        path for path in [*run.glob("model/*"), *run.glob("step-*/*"), run / "latest", run / "samples.jsonl"]
    )
    return {str(path.relative_to(run)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def copy_before_writes(folder, copies):
    """Let the process copy the folder before each write, rename and removal, if it has changed since the last copy."""
    numbers, last = itertools.count(1), None

    def copying(function):
        def wrapper(*args, **kwargs):
            nonlocal last
            now = {path: path.is_file() and path.read_bytes() for path in folder.rglob("*")}
            if now != last:
                shutil.copytree(folder, copies / f"{next(numbers):03}", symlinks=True)
            last = now
            return function(*args, **kwargs)

        return wrapper

    os.fsync = copying(os.fsync)
    for name in ("rename", "replace", "mkdir"):
        setattr(Path, name, copying(getattr(Path, name)))
    shutil.rmtree = copying(shutil.rmtree)


def resumed(run, arguments):
    """The fingerprint of a run after its completion; it starts anew where there was no folder yet."""
    status = status_of(fork(["resume", str(run)] if run.exists() else arguments))
    assert status == 0, status
    return fingerprint(run)


def writes(run, arguments, expected, stride):
    copies = run.parents[1] / "copies"
    assert status_of(fork(arguments, lambda: copy_before_writes(run.parent, copies))) == 0
    states = sorted(copies.iterdir())
    assert len(states) > 40, states
    for copy in states[::stride]:
        shutil.rmtree(run.parent)
        copy.rename(run.parent)
        same = resumed(run, arguments) == expected
        print("before write", copy.name, same)
        if not same:
            return False
    return True


def instants(run, arguments, expected, stride):
    start = time.monotonic()
    assert status_of(fork(arguments)) == 0
    length = time.monotonic() - start
    shutil.rmtree(run)
    kills, seeds = 0, range(0, 12, stride)
    for seed in seeds:
        chance = random.Random(seed)
        child = fork(arguments)
        time.sleep(chance.uniform(0.05, 0.9) * length)
        os.kill(child, signal.SIGKILL)
        status = status_of(child)
        kills += status == -signal.SIGKILL
        if chance.random() < 0.3 and run.exists():  # and once more
            child = fork(["resume", str(run)])
            time.sleep(chance.uniform(0, 0.5) * length)
            os.kill(child, signal.SIGKILL)
            status_of(child)
        same = resumed(run, arguments) == expected
        print("instant", seed, status, same)
        if not same:
            return False
        shutil.rmtree(run)
    return kills > len(seeds) / 4


if __name__ == "__main__":
    what, folder = sys.argv[1], Path(sys.argv[2])
    stride = int(sys.argv[3]) if len(sys.argv) > 3 else 1
    run = folder / "stopped" / "run"
    arguments = ["dpo", f"--data={folder / 'pairs.jsonl'}", f"--init={folder / 'init'}", f"--out={run}"]
    arguments += ["--steps=9", "--evaluate-every=4", "--batch-size=3", "--patience=2", "--learning-rate=0.01"]
    run.parent.mkdir()
    assert status_of(fork(arguments)) == 0
    expected = fingerprint(run)
    assert len(expected) >= 10, expected
    shutil.rmtree(run)
    sys.exit(0 if globals()[what](run, arguments, expected, stride) else 1)
