"""One gradient by several processes: the loss of a batch is a sum over its examples, so whole examples are shared out.

Processes and not threads: Python's own lock lets one thread at a time begin an array operation, and small ones are
over before it has changed hands. A worker is forked once and stays; it is asked in JSON, reads the weights from
memory that all share, and leaves its gradient there. Each has one BLAS thread.
"""

import contextlib
import ctypes
import functools
import importlib
import json
import math
import mmap
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, NoReturn, TextIO

import numpy

from ..backend import Array, on_host
from ..model import Params

MOST = 8  # processes, the one that asks among them; more have not been tried
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # glibc's numbers for what mallopt sets
Gradient = Callable[[Params, Any], Any]  # of a share of a batch's examples; that and what is returned are JSON


class Blas(NamedTuple):
    """How many threads NumPy's matrix products have, to read and to set."""

    get: Callable[[], int]
    set: Callable[[int], None]


@functools.cache
def blas() -> Blas | None:
    """The two functions of the OpenBLAS that NumPy brings; None if it has another library."""
    library = ctypes.CDLL(importlib.import_module("numpy._core._multiarray_umath").__file__)
    for name in ("scipy_openblas_{}_num_threads64_", "openblas_{}_num_threads64_", "openblas_{}_num_threads"):
        with contextlib.suppress(AttributeError):
            return Blas(getattr(library, name.format("get")), getattr(library, name.format("set")))
    return None


@contextlib.contextmanager
def blas_threads(count: int) -> Iterator[None]:
    """So many BLAS threads within, where they can be set."""
    found = blas()
    before = found.get() if found else 0
    if found:
        found.set(count)
    try:
        yield
    finally:
        if found:
            found.set(before)


@functools.cache
def keep_memory() -> None:
    """Let the C library keep what freed arrays leave for the next ones: the system would clear each page anew.

    This is for arrays of up to 32 MiB, and for as long as the process lives, where the library is glibc. (mallopt(3))
    """
    with contextlib.suppress(AttributeError, TypeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(M_TRIM_THRESHOLD, -1)  # never
        mallopt(M_MMAP_THRESHOLD, 2**25)  # bytes, the most that every glibc takes


def worker_count(params: Params) -> int:
    """As many as NumPy has BLAS threads, up to `MOST`; one where these cannot be set, on a device, or without fork."""
    found = blas()
    forks = hasattr(os, "fork") and all(on_host(p.data) for p in params.values())
    return min(MOST, found.get()) if found and forks else 1


def shared_arrays(params: Params) -> dict[str, Array]:
    """An array for each parameter in memory that stays common after a fork."""
    offsets = [0]
    for p in params.values():
        offsets.append(offsets[-1] + math.ceil(p.data.nbytes / 64) * 64)
    memory = mmap.mmap(-1, max(1, offsets[-1]))
    return {
        name: numpy.frombuffer(memory, p.dtype, p.data.size, offset).reshape(p.shape)
        for offset, (name, p) in zip(offsets, params.items())
    }


class Worker(NamedTuple):
    """A process, from the outside."""

    pid: int
    ask: TextIO
    answer: TextIO
    gradient: dict[str, Array]


class Workers:
    """A process and its workers; from the first on, with workers or without, `keep_memory` holds.

    Parameters
    ----------
    params : dict of str to Tensor
        What the gradients belong to; their arrays may be replaced, not their shapes.
    gradient : function
        `gradient(params, share)` adds to `grad` of the parameters and returns what JSON holds.
    count : int
        Processes in all, the one that asks among them.
    """

    def __init__(self, params: Params, gradient: Gradient, count: int):
        keep_memory()
        self.params, self.gradient = params, gradient
        self.weights = shared_arrays(params) if count > 1 else {}
        self.others = [self.forked() for _ in range(count - 1)]

    def __len__(self) -> int:
        return 1 + len(self.others)

    def __enter__(self) -> "Workers":
        return self

    def __exit__(self, *fault: object) -> None:
        for worker in self.others:
            with contextlib.suppress(BrokenPipeError):  # it is gone
                worker.ask.close()  # which ends it
            worker.answer.close()
            os.waitpid(worker.pid, 0)

    def forked(self) -> Worker:
        """A new worker."""
        gradient = shared_arrays(self.params)
        (questions, ask), (answer, answers) = os.pipe(), os.pipe()  # the ends to read and to write
        pid = os.fork()
        if pid == 0:
            self.serve(questions, answers, gradient)
        os.close(questions)
        os.close(answers)
        return Worker(pid, open(ask, "w"), open(answer), gradient)

    def serve(self, questions: int, answers: int, gradient: dict[str, Array]) -> NoReturn:
        """A worker's life: until the process that asks is gone, however it went."""
        try:
            for number in (signal.SIGINT, signal.SIGTERM):  # left to the process that asks
                signal.signal(number, signal.SIG_IGN)
            low, high = sorted((questions, answers))
            for first, last in ((3, low), (low + 1, high), (high + 1, os.sysconf("SC_OPEN_MAX"))):
                os.closerange(first, last)  # a lock, other workers' pipes: none may outlive its owner here
            for name, x in self.weights.items():
                self.params[name].data = x  # and what was inherited is freed
            with open(questions) as lines, open(answers, "w") as out, blas_threads(1):
                for question in lines:
                    out.write(json.dumps(self.answered(json.loads(question), gradient)) + "\n")
                    out.flush()
        finally:
            os._exit(0)

    def answered(self, share: Any, gradient: dict[str, Array]) -> dict[str, Any]:
        """What a worker says of a share, having left its gradient."""
        try:
            for name, p in self.params.items():
                gradient[name][...] = 0
                p.grad = gradient[name]  # a sweep adds to it in place
            said = self.gradient(self.params, share)
            for name, p in self.params.items():
                if p.grad is not gradient[name]:
                    gradient[name][...] = p.grad
            return {"said": said}
        except FloatingPointError as error:
            return {"not finite": str(error)}
        except MemoryError as error:
            return {"no memory": str(error)}
        except Exception as error:
            return {"failed": f"{type(error).__name__}: {error}"}

    def __call__(self, shares: Sequence[Any]) -> list[Any]:
        """What `gradient` returns for each share; `grad` of the parameters is the sum over all.

        Raises
        ------
        FloatingPointError
            If a share's loss is not finite.
        OSError
            If a worker failed or is gone.
        MemoryError
            If it had too little memory.
        """
        others = self.others[: len(shares) - 1]
        for name, p in self.params.items() if others else ():
            self.weights[name][...] = p.data
        for worker, share in zip(others, shares[1:]):
            with contextlib.suppress(BrokenPipeError):  # then there is no answer
                worker.ask.write(json.dumps(share) + "\n")
                worker.ask.flush()
        try:
            with blas_threads(1) if self.others else contextlib.nullcontext():
                said = [self.gradient(self.params, shares[0])]
        finally:
            answers = [json.loads(worker.answer.readline() or '{"failed": "it is gone"}') for worker in others]
        for worker, answer in zip(others, answers):
            if "not finite" in answer:
                raise FloatingPointError(answer["not finite"])
            if "failed" in answer:
                raise OSError(f"a worker could not do its share: {answer['failed']}")
            if "no memory" in answer:
                raise MemoryError(answer["no memory"])
            said.append(answer["said"])
            for name, p in self.params.items():
                if p.grad is None:
                    p.grad = worker.gradient[name].copy()
                else:
                    p.grad += worker.gradient[name]  # an array of its own, as `backward` leaves it
        return said


def shares(sizes: Sequence[int], count: int) -> list[list[int]]:
    """Indices of examples, shared out so that the shares' sizes are about equal; none is empty."""
    parts: list[list[int]] = [[] for _ in range(min(count, len(sizes)))]
    totals = [0] * len(parts)
    for i in sorted(range(len(sizes)), key=lambda i: -sizes[i]):  # the largest first, each to the least so far
        least = totals.index(min(totals))
        parts[least].append(i)
        totals[least] += sizes[i]
    return [sorted(part) for part in parts]
