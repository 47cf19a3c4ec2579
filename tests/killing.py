"""A program that kills runs: at every write to the disk, or at random instants; and lets them go on.

    python killing.py writes|instants|signals FOLDER    prints a line per kill, exits with 1 at the first difference

Each run is a fork, so that a kill is one: no `finally`, no clean-up, nothing flushed.
"""

import hashlib
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

from minidpo.cli import main
from minidpo.run import report

report.curves = lambda path, runs: False  # takes most of the time, and is no part of what goes on


def fork(arguments, before=lambda: None):
    """The command line in a process of its own; its id."""
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        quiet = os.open(os.devnull, os.O_WRONLY)
        os.dup2(quiet, 1)
        os.dup2(quiet, 2)
        before()
        os._exit(main(arguments))
    return child


def finished(child):
    """Exit status, or minus the signal."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def fingerprint(run):
    """Names and contents of all that should not depend on when a run was killed."""
    files = sorted(
        path for path in [*run.glob("model/*"), *run.glob("step-*/*"), run / "latest", run / "samples.jsonl"]
    )
    return {str(path.relative_to(run)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def kill_at_write(number):
    """Make the process die just before its so-manieth write, rename or removal."""
    counter = iter(range(1, number))

    def dying(function):
        def wrapper(*args, **kwargs):
            if next(counter, None) is None:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return wrapper

    os.fsync = dying(os.fsync)
    for name in ("rename", "replace", "mkdir"):
        setattr(Path, name, dying(getattr(Path, name)))
    shutil.rmtree = dying(shutil.rmtree)


def go_on(run, arguments):
    """Until it is done, however often it takes; the run is begun anew where no folder was made yet."""
    status = finished(fork(["resume", str(run)] if run.exists() else arguments))
    assert status == 0, status
    return fingerprint(run)


def writes(run, arguments, expected):
    for number in range(1, 1000):
        status = finished(fork(arguments, lambda number=number: kill_at_write(number)))
        same = go_on(run, arguments) == expected
        print("write", number, status, same)
        if not same or status != -signal.SIGKILL:
            return same and number > 40
        shutil.rmtree(run)
    return False


def instants(run, arguments, expected, sent=signal.SIGKILL):
    started = time.monotonic()
    assert finished(fork(arguments)) == 0
    length = time.monotonic() - started
    shutil.rmtree(run)
    stopped = 0
    for seed in range(12):
        chance = random.Random(seed)
        child = fork(arguments)
        time.sleep(chance.uniform(0.05, 0.9) * length)
        os.kill(child, sent)
        status = finished(child)
        stopped += status in (-sent, 130)
        if chance.random() < 0.3 and run.exists():  # and once more
            child = fork(["resume", str(run)])
            time.sleep(chance.uniform(0, 0.5) * length)
            os.kill(child, sent)
            finished(child)
        same = go_on(run, arguments) == expected
        print("instant", seed, status, same)
        if not same:
            return False
        shutil.rmtree(run)
    return stopped > 3


def signals(run, arguments, expected):
    return instants(run, arguments, expected, signal.SIGTERM)


if __name__ == "__main__":
    what, folder = sys.argv[1], Path(sys.argv[2])
    run = folder / "run"
    arguments = ["dpo", f"--data={folder / 'pairs.jsonl'}", f"--init={folder / 'init'}", f"--out={run}"]
    arguments += ["--steps=9", "--evaluate-every=4", "--batch-size=3", "--patience=2", "--learning-rate=0.01"]
    assert finished(fork(arguments)) == 0
    expected = fingerprint(run)
    assert len(expected) >= 10, expected
    shutil.rmtree(run)
    sys.exit(0 if globals()[what](run, arguments, expected) else 1)
