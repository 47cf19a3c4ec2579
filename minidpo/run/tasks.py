"""Independent tasks, each in its own process, and progress on stderr after two seconds of silence."""

import multiprocessing
import signal
import sys
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from typing import Any, TypeVar

from .workers import blas_threads, worker_count

T = TypeVar("T")
SILENCE = 2.0  # seconds without a line, after which there is one
last = time.monotonic()  # when a line was last printed


def printed() -> None:
    """Count the silence from now: a line was printed."""
    global last
    last = time.monotonic()


def tell(text: str) -> None:
    """Print a line on stderr after `SILENCE`; on a terminal the next one replaces it, and an empty one removes it."""
    live = sys.stderr.isatty()
    if time.monotonic() - last >= SILENCE if text else live:
        print(f"\r\x1b[K{text}" if live else text, end="" if live else "\n", file=sys.stderr, flush=True)
        printed()


def counted(items: Collection[T], what: str) -> Iterator[T]:
    """Pass items on, and tell how many are done; until the last, NumPy has one BLAS thread.

    The products of a single pair are small, and on a busy machine threads that wait for each other cost the most.
    """
    printed()
    with blas_threads(1):
        for done, item in enumerate(items):
            tell(f"{what}: {done} of {len(items)}")
            yield item
    tell("")


def results(tasks: Sequence[Callable[[], Any]], what: str) -> Iterator[Any]:
    """The results of tasks, in their order, each computed by a forked process with one BLAS thread.

    N run at once: NumPy's number of BLAS threads, at most `workers.MOST`. No result depends on that number or on the
    other tasks. Raises what a task raised, OSError if its process is gone.
    """
    fork, count = multiprocessing.get_context("fork"), worker_count({})
    running: dict[Any, tuple[int, BaseProcess]] = {}  # by the pipe that the answer will come from
    answers: dict[int, tuple[Any, Exception | None]] = {}
    waiting, started = list(enumerate(tasks))[::-1], time.monotonic()
    printed()
    try:
        for number in range(len(tasks)):
            while number not in answers:
                while waiting and len(running) < count:
                    place, task = waiting.pop()
                    begin, end = fork.Pipe(duplex=False)
                    running[begin] = place, fork.Process(target=answer, args=(task, end), daemon=True)
                    running[begin][1].start()
                    end.close()  # the process alone holds it, so its exit ends the pipe
                ready: list[Any] = wait(list(running), 0.5)
                for pipe in ready:
                    try:
                        answers[running[pipe][0]] = pipe.recv()
                    except EOFError as error:
                        raise OSError(f"{what}: a process exited before it had an answer") from error
                    running.pop(pipe)[1].join()
                    pipe.close()
                elapsed = time.monotonic() - started
                tell(f"{what}: {number + len(answers)} of {len(tasks)} parts done, {elapsed:.0f} s")
            tell("")
            result, fault = answers.pop(number)
            if fault:
                raise fault
            yield result
    finally:
        for pipe, (_, process) in running.items():
            process.kill()
            process.join()
            pipe.close()


def answer(task: Callable[[], Any], end: Any) -> None:
    """Send a task's result, or what it raised."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # left to the process that waits
    try:
        with blas_threads(1):
            end.send((task(), None))
    except Exception as error:
        end.send((None, error))
