"""One sweep by several processes: the loss of a batch is a mean, so the shares' parts add up. Sampling is shared, too.

Threads would not help: the interpreter's lock serialises the many small operations. At work each process has
one BLAS thread. A worker reads the weights from shared memory and leaves its gradient there. Everything else that
decides the result is in the question, so workers cannot disagree with their caller. A custom loss cannot be sent: the
caller sweeps it alone.
"""

import contextlib
import ctypes
import dataclasses
import functools
import importlib
import json
import math
import mmap
import operator
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, NoReturn, TextIO

import numpy

from .. import losses
from ..backend import Array, array_module, on_host, to_host
from ..generation import Generation, checked_prompts, generate
from ..losses import LOSSES, Choice
from ..model import Config, Params
from ..scoring import Batch, Example
from ..training import Loss, Swept, counts, dpo_sweep, join, nll_sweep

MOST = 8  # processes in all; more have not been tried
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # glibc's constants for mallopt


class Blas(NamedTuple):
    """Read and set the number of threads of NumPy's matrix products."""

    get: Callable[[], int]
    set: Callable[[int], None]


@functools.cache
def blas() -> Blas | None:
    """The two functions of NumPy's own OpenBLAS; None if it has another library."""
    library = ctypes.CDLL(importlib.import_module("numpy._core._multiarray_umath").__file__)
    for name in ("scipy_openblas_{}_num_threads64_", "openblas_{}_num_threads64_", "openblas_{}_num_threads"):
        with contextlib.suppress(AttributeError):
            return Blas(getattr(library, name.format("get")), getattr(library, name.format("set")))
    return None


@contextlib.contextmanager
def blas_threads(count: int) -> Iterator[None]:
    """`count` BLAS threads within the block, where the number can be set."""
    library = blas()
    before = library.get() if library else 0
    if library:
        library.set(count)
    try:
        yield
    finally:
        if library:
            library.set(before)


@functools.cache
def keep_memory() -> None:
    """Reuse freed memory, up to 32 MiB per array (glibc only): pages from the system must be cleared first.

    The setting lasts as long as the process. Source: mallopt(3).
    """
    with contextlib.suppress(AttributeError, TypeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(M_TRIM_THRESHOLD, -1)  # never
        mallopt(M_MMAP_THRESHOLD, 2**25)  # bytes


def worker_count(params: Params) -> int:
    """NumPy's number of BLAS threads, at most `MOST`; 1 where it cannot be set, on a device, or without fork."""
    library = blas()
    forks = hasattr(os, "fork") and all(on_host(p.data) for p in params.values())
    return min(MOST, library.get()) if library and forks else 1


def shared_arrays(params: Params) -> dict[str, Array]:
    """An array for each parameter, in memory that stays common after a fork."""
    offsets = [0]
    for p in params.values():
        offsets.append(offsets[-1] + math.ceil(p.data.nbytes / 64) * 64)
    memory = mmap.mmap(-1, max(1, offsets[-1]))
    return {
        name: numpy.frombuffer(memory, p.dtype, p.data.size, offset).reshape(p.shape)
        for offset, (name, p) in zip(offsets, params.items())
    }


def shares(sizes: Sequence[int], count: int) -> list[list[int]]:
    """Indices of examples in at most `count` shares of about equal total size; none is empty."""
    parts: list[list[int]] = [[] for _ in range(min(count, len(sizes)))]
    totals = [0] * len(parts)
    for i in sorted(range(len(sizes)), key=lambda i: -sizes[i]):  # the largest first, each to the smallest share
        least = totals.index(min(totals))
        parts[least].append(i)
        totals[least] += sizes[i]
    return [sorted(part) for part in parts]


def portable(loss: Loss) -> tuple[str, dict[str, Any] | None] | None:
    """The name and options of a loss to send, or None if it is not one of this package's."""
    options = dict(loss.options) if isinstance(loss, Choice) else None
    member = LOSSES[loss.name] if isinstance(loss, Choice) else loss
    names = [name for name, known in LOSSES.items() if known is member]
    # a loss of this package depends on its arguments alone
    ours = getattr(member, "__module__", "").startswith(__name__.partition(".")[0] + ".")
    try:
        json.dumps(options)
    except TypeError:
        return None
    return (names[0], options) if names and ours else None


class Worker(NamedTuple):
    """A forked process, seen from its parent."""

    pid: int
    ask: TextIO
    answer: TextIO
    gradient: dict[str, Array]


class Workers:
    """`dpo_sweep`, `nll_sweep` and `generate`, shared out to `count` processes, the caller among them.

    Workers are forked at the first question, and anew for parameters of another layout, for a sweep after `generate` or
    the reverse, and when `LOSSES` has changed.
    """

    def __init__(self, count: int):
        self.count = count
        self.others: list[Worker] = []
        self.forked_with: Any = None  # what workers inherit at the fork: the parameters' layout and `LOSSES`
        self.weights: dict[str, Array] = {}

    def __len__(self) -> int:
        return self.count

    def __enter__(self) -> "Workers":
        return self

    def __exit__(self, *fault: object) -> None:
        for worker in self.others:
            with contextlib.suppress(BrokenPipeError):  # the worker is gone already
                worker.ask.close()  # the end of its questions ends it
            worker.answer.close()
            os.waitpid(worker.pid, 0)
        self.others, self.forked_with = [], None

    def dpo_sweep(
        self,
        policy: Params,
        config: Config,
        batch: Batch,
        beta: float = 0.1,
        loss: Loss = losses.dpo_loss,
        nll_weight: float = 0.0,
        micro_batch_size: int | None = None,
    ) -> Swept:
        """`training.dpo_sweep` by all processes; the pairs of the result are in the order of the shares."""
        named = portable(loss)
        if self.count == 1 or named is None:
            return dpo_sweep(policy, config, batch, beta, loss, nll_weight, micro_batch_size)
        pairs, *refs, votes = batch
        common = {
            "config": dataclasses.asdict(config),
            "beta": float(beta),
            "loss": named,
            "nll_weight": float(nll_weight),
            "micro_batch_size": micro_batch_size,
            "whole": counts(batch),
        }
        arrays = [*map(to_host, refs), votes]
        questions = [
            {
                **common,
                "pairs": [pairs[i] for i in part],
                "arrays": [None if x is None else x[part].tolist() for x in arrays],
            }
            for part in shares([len(x) + len(w) + len(l) for x, w, l in pairs], self.count)
        ]
        return join(self.ask(policy, questions))

    def nll_sweep(
        self, params: Params, config: Config, examples: Sequence[Example], micro_batch_size: int | None = None
    ) -> float:
        """`training.nll_sweep` by all processes."""
        if self.count == 1:
            return nll_sweep(params, config, examples, micro_batch_size)
        tokens = sum(len(y) for _, y in examples)
        common = {"config": dataclasses.asdict(config), "micro_batch_size": micro_batch_size, "tokens": tokens}
        parts = shares([len(x) + len(y) for x, y in examples], self.count)
        return sum(self.ask(params, [{**common, "examples": [examples[i] for i in part]} for part in parts]))

    def generate(
        self, params: Params, config: Config, prompt: Sequence[Any], rngs: Sequence[numpy.random.Generator],
        max_new_tokens: int, temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None,
    ) -> Generation:  # fmt: skip
        """`generation.generate` by all processes; each prompt's own stream, of `numpy.random.default_rng`, moves on."""
        streams = [] if isinstance(rngs, numpy.random.Generator) else [rng.bit_generator for rng in rngs]
        if not streams or len({*rngs}) < len(rngs) or {*map(type, streams)} != {numpy.random.PCG64}:
            raise ValueError("each prompt needs a stream of its own, from numpy.random.default_rng")
        options: dict[str, Any] = {"max_new_tokens": operator.index(max_new_tokens), "temperature": float(temperature)}
        options |= {"top_k": top_k and operator.index(top_k), "top_p": top_p and float(top_p)}
        if self.count == 1:
            return generate(params, config, prompt, rngs, **options)
        prompts, params = checked_prompts(config, prompt, rngs), {name: p.detach() for name, p in params.items()}
        common = {"config": dataclasses.asdict(config), "options": options}
        parts = shares([len(x) for x in prompts], self.count)
        questions = [
            {**common, "prompts": [prompts[i] for i in part], "streams": [streams[i].state for i in part]}
            for part in parts
        ]
        out = Generation([[] for _ in prompts], [[] for _ in prompts])
        for part, reply in zip(parts, self.ask(params, questions)):
            for i, response, logps in zip(part, *reply):
                out.responses[i], out.logprobs[i] = response, logps
                rngs[i].random(len(response))  # as many numbers as the share has taken from its copy
        return out

    def share(self, params: Params, question: dict[str, Any]) -> Any:
        """Answer one question, which JSON can write; `grad` of the parameters gets the gradient of a sweep's share."""
        config = Config(**question["config"])
        if "streams" in question:
            rngs = [numpy.random.default_rng(0) for _ in question["streams"]]
            for rng, state in zip(rngs, question["streams"]):
                rng.bit_generator.state = state
            return generate(params, config, question["prompts"], rngs, **question["options"])
        if "examples" in question:
            return nll_sweep(params, config, question["examples"], question["micro_batch_size"], question["tokens"])
        wte = params["wte.weight"].data
        name, options = question["loss"]
        *refs, votes = question["arrays"]
        refs = [array_module(wte).asarray(logp, dtype=wte.dtype) for logp in refs]
        return dpo_sweep(
            params,
            config,
            Batch(question["pairs"], *refs)._replace(votes=votes and numpy.array(votes)),
            question["beta"],
            LOSSES[name] if options is None else Choice(name, options),
            **{key: question[key] for key in ("nll_weight", "micro_batch_size", "whole")},
        )

    def ask(self, params: Params, questions: Sequence[dict[str, Any]]) -> list[Any]:
        """The replies to the questions, the first answered here; `grad` of the parameters gets all their gradients.

        Raises FloatingPointError if a loss is not finite or a log-probability nan, MemoryError if a worker has too
        little memory, OSError if it failed or has exited.
        """
        self.fork_for(params)
        others = self.others[: len(questions) - 1]
        for name, p in params.items() if others else ():
            self.weights[name][...] = p.data
        lines = [json.dumps(question) for question in questions[1:]]  # all, before any is sent
        for worker, line in zip(others, lines):
            with contextlib.suppress(BrokenPipeError):  # the missing answer says so
                worker.ask.write(line + "\n")
                worker.ask.flush()
        try:
            with blas_threads(1):
                replies = [self.share(params, questions[0])]
        finally:
            lines = [worker.answer.readline() for worker in others]
            answers = [json.loads(line if line.endswith("\n") else '{"failed": "it has exited"}') for line in lines]
        for worker, answer in zip(others, answers):
            if "not finite" in answer:
                raise FloatingPointError(answer["not finite"])
            if "failed" in answer:
                raise OSError(f"a worker could not do its share: {answer['failed']}")
            if "no memory" in answer:
                raise MemoryError(answer["no memory"])
            replies.append(answer["reply"])
            for name, p in params.items():
                if not p.requires_grad:
                    continue
                if p.grad is None:
                    p.grad = worker.gradient[name].copy()
                else:
                    p.grad += worker.gradient[name]  # `grad` shares no memory, so adding in place is safe
        return replies

    def fork_for(self, params: Params) -> None:
        """Fork workers, unless there are some for parameters of this layout and for the current losses."""
        layout = {name: (p.shape, str(p.dtype), p.requires_grad) for name, p in params.items()}
        if self.forked_with != (layout, LOSSES):
            self.__exit__()
            self.weights = shared_arrays(params)
            self.others = [self.forked(params) for _ in range(self.count - 1)]
            self.forked_with = (layout, dict(LOSSES))

    def forked(self, params: Params) -> Worker:
        """Fork a worker and return its pipes."""
        gradient = shared_arrays(params)
        (questions, ask), (answer, answers) = os.pipe(), os.pipe()  # the ends to read and to write
        pid = os.fork()
        if pid == 0:
            self.serve(params, questions, answers, gradient)
        os.close(questions)
        os.close(answers)
        return Worker(pid, open(ask, "w"), open(answer), gradient)

    def serve(self, params: Params, questions: int, answers: int, gradient: dict[str, Array]) -> NoReturn:
        """Answer questions until the caller closes the pipe or is gone."""
        try:
            for number in (signal.SIGINT, signal.SIGTERM):  # left to the process that asks
                signal.signal(number, signal.SIG_IGN)
            low, high = sorted((questions, answers))
            for first, last in ((3, low), (low + 1, high), (high + 1, os.sysconf("SC_OPEN_MAX"))):
                os.closerange(first, last)  # close inherited locks and pipes, which must not outlive their owner
            for name, x in self.weights.items():
                params[name].data = x  # and the inherited array is freed
            with open(questions) as lines, open(answers, "w") as out, blas_threads(1):
                for question in lines:
                    out.write(json.dumps(self.answered(params, json.loads(question), gradient)) + "\n")
                    out.flush()
        finally:
            os._exit(0)

    def answered(self, params: Params, question: dict[str, Any], gradient: dict[str, Array]) -> dict[str, Any]:
        """Answer a question, a sweep with its gradient in shared memory; the reply, or what went wrong."""
        try:
            for name, p in params.items():
                if p.requires_grad:
                    gradient[name][...] = 0
                    p.grad = gradient[name]  # a sweep adds to it in place
            reply = self.share(params, question)
            for name, p in params.items():
                if p.grad is not None and p.grad is not gradient[name]:
                    gradient[name][...] = p.grad
            return {"reply": reply}
        except FloatingPointError as error:
            return {"not finite": str(error)}
        except MemoryError as error:
            return {"no memory": str(error)}
        except Exception as error:
            return {"failed": f"{type(error).__name__}: {error}"}
