"""How fast a DPO step is, and how much memory it takes, beside other libraries on the same work.

Each contender is a process of its own, and they take turns: two thread pools in one process would spin against each
other. A turn during which something else used the processors is taken again. No contender is timed before its loss
and its gradient have been compared with those in float64.
"""

import contextlib
import importlib
import json
import os
import pathlib
import platform
import statistics
import subprocess
import sys
import tempfile
import time

import numpy

from benchmarks.workload import BETA, draw
from minidpo import Tensor, losses, ops, scoring

MODULES = ("ours", "pytorch", "dense")
THREADS = {name: "2" for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")}
TOLERANCE = 2e-3  # of float32 against float64, relative to each parameter's largest gradient
PAUSE = 0.25  # seconds in which the pool of the last contender falls asleep
SLOW, FEW = 2.0, 3  # a contender none of whose first few steps took less than so many seconds has no more rounds
FOREIGN = 0.1  # share of the processors that others may have used in a turn


class Wrong(Exception):
    """A contender computes something else."""


def contenders(suite, names=None):
    """(module, class, library) by name, and the names of those whose library is missing."""
    found, missing = {}, []
    for module in MODULES:
        try:
            listed = importlib.import_module(f"benchmarks.contenders.{module}").CONTENDERS
        except ImportError as error:
            missing.append(f"{module}: {error}")
            continue
        for name, made in listed[suite].items():
            library = getattr(made, "library", None)
            if library and importlib.util.find_spec(library) is None:
                missing.append(f"{name}: {library} is not installed")
            elif names is None or name in names:
                found[name] = (module, made)
    return found, missing


class Worker:
    """A contender in its process."""

    def __init__(self, module, made, size, seed):
        self.process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.worker", module, made, size_text(size), str(seed)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **THREADS},
            cwd=pathlib.Path(__file__).parents[1],
        )
        self.answer()

    def ask(self, *command):
        print(*command, file=self.process.stdin, flush=True)
        return self.answer()

    def answer(self):
        for line in self.process.stdout:
            if line.startswith("{"):
                return json.loads(line)
        raise Wrong(f"a contender ended with status {self.process.wait()}")

    def close(self):
        self.process.stdin.close()
        self.process.wait()


def size_text(size):
    return ",".join(map(str, size))


def busy():
    """Seconds that all processors together have worked so far."""
    fields = pathlib.Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]
    idle = int(fields[3]) + int(fields[4])
    return (sum(map(int, fields[:8])) - idle) / os.sysconf("SC_CLK_TCK")


def turn(worker, seconds, most=4):
    """Seconds a step; taken again where others used the processors, at most so often."""
    for _ in range(most):
        time.sleep(PAUSE)
        before = busy()
        told = worker.ask("turn", seconds, 1)
        foreign = busy() - before - told["cpu"]
        if foreign < FOREIGN * 2 * told["seconds"] + 0.02:  # the clock of /proc/stat ticks in hundredths
            return told["seconds"] / told["steps"] / (told["tokens"] or 1), True
    return told["seconds"] / told["steps"] / (told["tokens"] or 1), False


def truth(work):
    """Loss and gradients in float64, each response by itself."""
    params = {name: Tensor(x.astype("float64"), requires_grad=True) for name, x in work.policy.items()}
    reference = {name: Tensor(x.astype("float64")) for name, x in work.reference.items()}

    def logps(params, side):
        return ops.concatenate(
            *[scoring.sequence_logprob(params, work.config, [pair[0]], [pair[side]]) for pair in work.pairs]
        )

    refs = [logps(reference, side) for side in (1, 2)]
    loss = losses.dpo_loss(logps(params, 1), logps(params, 2), *refs, BETA).loss
    loss.backward()
    return loss.item(), {name: p.grad for name, p in params.items()}


def check(name, worker, expected):
    """Refuse a contender whose loss or gradient is another; the largest relative error."""
    loss, gradients = expected
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "gradient.npz"
        worker.ask("check", path)
        with numpy.load(path) as found:
            worst = abs(float(found["loss"]) / loss - 1)
            for parameter, g in gradients.items():
                worst = max(worst, float(abs(found[parameter] - g).max() / abs(g).max()))
    if not worst <= TOLERANCE:
        raise Wrong(f"{name}: loss or gradient is {worst:.1e} off, more than {TOLERANCE:.0e}: it is not timed")
    return worst


def measure(size, seed, rounds, seconds=0.3, names=None, suite="step", say=print):
    """Take turns; seconds a step in each round, peak memory and the error of every contender."""
    found, missing = contenders(suite, names)
    work = draw(size, seed)
    if suite != "sampling":
        expected = truth(work)
    results = {}
    with contextlib.ExitStack() as stack:
        workers = {}
        for name, (module, made) in found.items():
            workers[name] = worker = Worker(module, made.__name__, size, seed)
            stack.callback(worker.close)
            error = check(name, worker, expected) if getattr(made, "gradient", None) else None
            worker.ask("turn", seconds, 2)  # to be warm
            results[name] = {"seconds": [], "quiet": [], "error": error}
        for at in range(rounds):
            say(f"  round {at + 1} of {rounds}", flush=True) if at % 5 == 0 else None
            order = list(workers) if at % 2 == 0 else list(workers)[::-1]
            for name in [name for name in order if at < FEW or min(results[name]["seconds"][:FEW]) < SLOW]:
                took, quiet = turn(workers[name], seconds)
                results[name]["seconds"].append(took)
                results[name]["quiet"].append(quiet)
        for name, worker in workers.items():
            results[name]["peak_mib"] = worker.ask("peak")["peak_mib"]
    for result in results.values():
        result["median"] = statistics.median(result["seconds"])
    return results, missing


def ratio(results, name, other, key="seconds"):
    """Median over rounds of one contender's time over another's; or the ratio of their memory."""
    if key == "peak_mib":
        return results[name][key] / results[other][key]
    return statistics.median(a / b for a, b in zip(results[name][key], results[other][key]))


def flops(config, pairs):
    """Floating-point operations of a step of our recipe, in its matrix products: each forward one has two backward.

    A row costs 12 C^2 multiplications a layer, in attention 2 C for every key that it is multiplied with, and V C in
    the head; a multiplication and its addition are two operations.
    """
    C, total = config.n_embd, 0
    for x, w, l in pairs:
        X, W, L = len(x), len(w) - 1, len(l) - 1
        seen = (X - 1) ** 2 + W * (X + W) + (L + 1) * (X + L)
        total += config.n_layer * (12 * C * C * (X + W + L) + 2 * C * seen) + config.vocab_size * C * (W + L + 1)
        total -= 8 * C * C * (X - 1)  # past the last attention the prompt's last row goes on alone
        total -= C * C * (X - 1) + 2 * C * (X - 1) ** 2  # the others' attention is neither projected nor computed
    return 3 * 2 * total


def environment():
    """Machine, versions, threads."""
    versions = {"python": platform.python_version()}
    for module in MODULES:
        with contextlib.suppress(ImportError):
            versions |= importlib.import_module(f"benchmarks.contenders.{module}").versions()
    cpu = [line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")]
    return {"cpu": cpu[0] if cpu else platform.processor(), "cores": os.cpu_count(), "threads": 2, **versions}
