"""One contender in its own process: it reads commands from standard input and answers in JSON."""

import contextlib
import importlib
import json
import os
import pathlib
import sys
import threading
import time

import numpy

from benchmarks.workload import SIZES, Size, draw

PROC, TICKS = pathlib.Path("/proc"), os.sysconf("SC_CLK_TCK")


def processes():
    """The ids of the contender's process and of its children."""
    parents = {}
    for path in PROC.glob("[0-9]*/stat"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # of a process that has just ended
            parents[path.parent.name] = path.read_text().rpartition(")")[2].split()[1]
    return [os.getpid(), *[int(pid) for pid, parent in parents.items() if int(parent) == os.getpid()]]


def proportional():
    """The contender's memory in MiB: proportional set size, in which processes that share a page have a part each."""
    lines = (line for pid in processes() for line in (PROC / str(pid) / "smaps_rollup").read_text().splitlines())
    return sum(int(line.split()[1]) for line in lines if line.startswith("Pss:")) / 1024


def peak(step, seconds=2.0):
    """The largest `proportional` seen while the contender takes steps, looked at all the time."""
    seen, done = [proportional()], threading.Event()

    def watch():
        while not done.is_set():
            seen.append(proportional())

    watcher = threading.Thread(target=watch)
    watcher.start()
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(seen) < 20:
        step()
    done.set()
    watcher.join()
    return max(seen)


def launches(contender):
    """How many kernels, and how many copies and fills, a step starts on the GPU, as its profiler sees them."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        contender.step()
        contender.finish()
    names = [event.name for event in seen.events() if event.device_type == DeviceType.CUDA]
    copies = sum(name.startswith(("Memcpy", "Memset")) for name in names)
    return {"kernels": len(names) - copies, "copies": copies}


def cpu():
    """The processor seconds that the contender has used, summed over its processes."""
    fields = [(PROC / str(pid) / "stat").read_text().rpartition(")")[2].split() for pid in processes()]
    return sum(int(user) + int(system) for *_, user, system in (field[:13] for field in fields)) / TICKS


def answer(**content):
    print(json.dumps(content), flush=True)


def main(module, name, size, seed):
    contender_module = importlib.import_module(f"benchmarks.contenders.{module}")
    work = draw(SIZES[size] if size in SIZES else Size(*map(int, size.split(","))), int(seed))
    contender = getattr(contender_module, name)(work)
    contender.work = work = work._replace(policy={}, reference={})  # a contender has its own copies: free these
    answer(ready=True)
    for line in sys.stdin:
        command, *rest = line.split()
        if command == "check":
            loss, gradient = contender.gradient()
            numpy.savez(rest[0], loss=loss, **gradient)
            answer(loss=loss)
        elif command == "turn":
            started, used, count = time.perf_counter(), cpu(), 0
            while count < int(rest[1]) or time.perf_counter() - started < float(rest[0]):
                result = contender.step()
                count += 1
            getattr(contender, "finish", int)()  # a GPU finishes its steps
            seconds = time.perf_counter() - started
            tokens = result if isinstance(result, int) else None
            answer(seconds=seconds, steps=count, cpu=cpu() - used, tokens=tokens)
        elif command == "peak":
            memory = getattr(contender, "memory", None)  # of a GPU
            answer(peak_mib=memory() if memory else peak(contender.step))
        elif command == "launches":
            answer(**launches(contender))


if __name__ == "__main__":
    main(*sys.argv[1:])
