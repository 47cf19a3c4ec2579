"""How fast a DPO step is, and how much memory it takes, beside other libraries on the same work.

Contenders take turns, each in its own process, since two thread pools in one process would spin against each other.
A turn is repeated if something else used the processors meanwhile. A contender is timed only after its loss and its
gradient have agreed with those in float64.
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

MODULES = ("ours", "modules", "pytorch", "dense", "huggingface")
THREADS = 2
OWN_KERNELS = {name: value for name, value in os.environ.items() if name != "OPENBLAS_CORETYPE"}  # the machine's
AVX2, HASWELL = " (AVX2)", {"OPENBLAS_CORETYPE": "Haswell"}  # the end of a suite's name, and what it means
TOLERANCE = 2e-3  # of float32 against float64, relative to the loss and to each parameter's largest gradient
PAUSE = 0.25  # seconds, in which the last contender's threads fall asleep
SLOW, FEW = 2.0, 3  # a contender has only FEW rounds if its steps took at least SLOW seconds in each
FOREIGN = 0.1  # the share of two processors that other programs may use in a turn


def threads(count):
    """What tells every library to use that many threads."""
    return {name: str(count) for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")}


class Wrong(Exception):
    """A contender ends early, or computes another loss or gradient."""


def contenders(suite, names=None):
    """The module and class of each contender by name, and a sentence for each one whose library is missing."""
    installed, missing = {}, []
    for module in MODULES:
        try:
            suites = importlib.import_module(f"benchmarks.contenders.{module}").CONTENDERS
        except ImportError as error:
            missing.append(f"{module}: {error}")
            continue
        for name, contender in suites.get(suite, {}).items():
            library = getattr(contender, "library", None)
            if library and importlib.util.find_spec(library) is None:
                missing.append(f"{name}: {library} is not installed")
            elif names is None or name in names:
                installed[name] = (module, contender)
    return installed, missing


class Worker:
    """A contender in its own process."""

    def __init__(self, module, class_name, size, seed, environment):
        self.process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.worker", module, class_name, size_text(size), str(seed)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**OWN_KERNELS, **environment},
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
    """Processor seconds that the machine has worked so far, summed over its processors."""
    fields = pathlib.Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]
    idle = int(fields[3]) + int(fields[4])
    return (sum(map(int, fields[:8])) - idle) / os.sysconf("SC_CLK_TCK")


def turn(worker, seconds, most=4):
    """Seconds a step (or a token) in one turn, and whether it was quiet; at most `most` tries until one is."""
    for _ in range(most):
        time.sleep(PAUSE)
        before = busy()
        reply = worker.ask("turn", seconds, 1)
        foreign = busy() - before - reply["cpu"]
        if foreign < FOREIGN * 2 * reply["seconds"] + 0.02:  # the clock of /proc/stat ticks in hundredths
            return reply["seconds"] / reply["steps"] / (reply["tokens"] or 1), True
    return reply["seconds"] / reply["steps"] / (reply["tokens"] or 1), False


def truth(work):
    """The loss and its gradients in float64, each response scored alone."""
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
    """The largest relative error of a contender's loss and gradient; raises `Wrong` if it is above `TOLERANCE`."""
    loss, gradients = expected
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "gradient.npz"
        worker.ask("check", path)
        with numpy.load(path) as arrays:
            worst = abs(float(arrays["loss"]) / loss - 1)
            for parameter, g in gradients.items():
                worst = max(worst, float(abs(arrays[parameter] - g).max() / abs(g).max()))
    if not worst <= TOLERANCE:
        raise Wrong(f"{name}: loss or gradient is off by {worst:.1e}, more than {TOLERANCE:.0e}: it is not timed")
    return worst


def measure(size, seed, rounds, seconds=0.3, names=None, suite="step", cores=THREADS, say=print):
    """Let contenders take turns; the times, peak memory and error of each, and which libraries are missing.

    OpenBLAS uses the machine's own kernels, or those of AVX2 if the suite's name ends in `AVX2`.
    """
    environment = {**threads(cores), **(HASWELL if suite.endswith(AVX2) else {})}
    environment |= {"CUPY_TF32": "0"} if suite == "gpu" else {}  # as in PyTorch, whose default it is
    installed, missing = contenders(suite.removesuffix(AVX2), names)
    work = draw(size, seed)
    if not suite.startswith("sampling"):
        expected = truth(work)
    results = {}
    with contextlib.ExitStack() as stack:
        workers = {}
        for name, (module, contender) in installed.items():
            workers[name] = worker = Worker(module, contender.__name__, size, seed, environment)
            stack.callback(worker.close)
            error = check(name, worker, expected) if getattr(contender, "gradient", None) else None
            worker.ask("turn", seconds, 2)  # warm up
            results[name] = {"seconds": [], "quiet": [], "error": error}
        for at in range(rounds):
            say(f"  round {at + 1} of {rounds}", flush=True) if at % 5 == 0 else None
            order = list(workers) if at % 2 == 0 else list(workers)[::-1]
            for name in [name for name in order if at < FEW or min(results[name]["seconds"][:FEW]) < SLOW]:
                step_seconds, quiet = turn(workers[name], seconds)
                results[name]["seconds"].append(step_seconds)
                results[name]["quiet"].append(quiet)
        for name, worker in workers.items():
            results[name]["peak_mib"] = worker.ask("peak")["peak_mib"]
            results[name] |= worker.ask("launches") if suite == "gpu" else {}
    for result in results.values():
        result["median"] = statistics.median(result["seconds"])
    return results, missing


def ratio(results, name, other, key="seconds"):
    """The median over rounds of one contender's time divided by another's, or the ratio of their memory."""
    if key == "peak_mib":
        return results[name][key] / results[other][key]
    return statistics.median(a / b for a, b in zip(results[name][key], results[other][key]))


def flops(config, pairs):
    """Floating-point operations in the matrix products of a step of our recipe.

    A row of tokens costs 12 C^2 multiplications in each layer, 2 C more for each key that it attends to, and V C in the
    head. A multiplication and its addition are two operations, and each forward product has two backward.
    """
    C, total = config.n_embd, 0
    for x, w, l in pairs:
        X, W, L = len(x), len(w) - 1, len(l) - 1
        keys = (X - 1) ** 2 + W * (X + W) + (L + 1) * (X + L)
        total += config.n_layer * (12 * C * C * (X + W + L) + 2 * C * keys) + config.vocab_size * C * (W + L + 1)
        total -= 8 * C * C * (X - 1)  # past the last attention only the prompt's last row continues
        total -= C * C * (X - 1) + 2 * C * (X - 1) ** 2  # and the other rows have no attention there
    return 3 * 2 * total


def blas(kernels):
    """NumPy's BLAS as contenders load it, with the kernel that it chooses, as OpenBLAS says it."""
    text = (
        "import ctypes, numpy; "
        "library = ctypes.CDLL(__import__('numpy._core._multiarray_umath', fromlist=['x']).__file__); "
        "config = library.scipy_openblas_get_config64_; config.restype = ctypes.c_char_p; print(config().decode())"
    )
    environment = {**OWN_KERNELS, **threads(THREADS), **kernels}
    done = subprocess.run([sys.executable, "-c", text], env=environment, capture_output=True, text=True)
    return done.stdout.strip() or "not OpenBLAS"


def processor():
    """The processor's name, as Linux tells it, or Python."""
    info = pathlib.Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    named = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor()


def environment():
    """The machine, NumPy's BLAS and its kernel, versions of the libraries, and the number of threads."""
    versions = {"python": platform.python_version()}
    for module in MODULES:
        with contextlib.suppress(ImportError):
            versions |= importlib.import_module(f"benchmarks.contenders.{module}").versions()
    return {
        "cpu": processor(),
        "cores": os.cpu_count(),
        "threads": THREADS,
        "blas": blas({}),
        "blas (AVX2)": blas(HASWELL),
        "OPENBLAS_CORETYPE": os.environ.get("OPENBLAS_CORETYPE", ""),  # which contenders do not see
        **versions,
    }
