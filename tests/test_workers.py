"""Several processes give the gradient of one."""

import ctypes
import functools
import json
import os
import platform
import re
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minidpo import Tensor, losses, model, optim, training
from minidpo.data.preferences import collate
from minidpo.generation import generate
from minidpo.run import workers
from minidpo.run.workers import Workers
from models import CONFIG, small
from test_loop import forks

close = np.testing.assert_allclose
PAIRS = [([0, 1], [2, 3, 0], [2, 0]), ([0], [1, 0], [3, 3, 3, 0]), ([0, 4, 4], [1, 0], [0]), ([0, 2], [4, 0], [1, 0])]
EXAMPLES = [([0], [1, 2, 0]), ([0, 1], [0]), ([0, 3], [4, 4, 0])]


def floats(params, dtype):
    return {name: Tensor(p.data.astype(dtype), requires_grad=True) for name, p in params.items()}


@forks
@pytest.mark.parametrize("count", [2, 3, 6])
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_the_gradient_is_that_of_one_process(count, dtype):
    """After three steps with several processes, metrics and weights are those of one, for both kinds of training."""
    results = []
    for processes in (1, count):
        params = floats(small(1), dtype)
        batch = collate(PAIRS, *training.reference_logprobs(floats(small(2), dtype), CONFIG, PAIRS))
        optimizer, metrics = optim.SGD(params, 0.01), []
        with Workers(processes) as workers:
            for _ in range(3):
                metrics += training.dpo_training_step(
                    params, {}, CONFIG, optimizer, batch, 0.3, losses.ipo_loss, 0.5, 5.0, 1, workers.dpo_sweep
                ).values()
                metrics += training.sft_training_step(
                    params, CONFIG, optimizer, EXAMPLES, sweep=workers.nll_sweep
                ).values()
            assert len(workers.others) == processes - 1
        assert all(p.dtype == p.grad.dtype == dtype for p in params.values())
        results.append(np.concatenate([metrics, *[p.data.reshape(-1) for p in params.values()]]))
    close(
        results[1], results[0], rtol=1e-10 if dtype == "float64" else 2e-4, atol=1e-12 if dtype == "float64" else 1e-5
    )


@forks
def test_workers_cannot_disagree_with_their_caller(monkeypatch):
    """Workers give the result of one process, whatever changes between two calls, registered or not.

    Parameters, config, beta, loss and its options, the likelihood term, micro-batches, the reference's dtype.
    """

    def own_loss(logp_w, logp_l, ref_logp_w, ref_logp_l, beta):
        out = losses.dpo_loss(logp_w, logp_l, ref_logp_w, ref_logp_l, beta)
        return out._replace(loss=out.loss * scale)

    def triple_ipo(logp_w, logp_l, ref_logp_w, ref_logp_l, beta):
        out = losses.ipo_loss(logp_w, logp_l, ref_logp_w, ref_logp_l, beta)
        return out._replace(loss=out.loss * 3)

    scale, wider = 1.0, model.Config(**{**vars(CONFIG), "n_head": 1})
    longer = {**small(4), "wpe.weight": Tensor(np.tile(small(4)["wpe.weight"].data, (2, 1)), requires_grad=True)}
    refs = training.reference_logprobs(small(2), CONFIG, PAIRS)
    cases = [
        (small(1), CONFIG, refs, {}),
        (small(1), CONFIG, refs, {"beta": 5.0}),
        (small(1), CONFIG, refs, {"loss": losses.ipo_loss}),
        (small(1), CONFIG, refs, {"loss": losses.Choice("dpo", {"label_smoothing": 0.3})}),
        (small(1), CONFIG, refs, {"loss": losses.Choice("reference_free"), "beta": 0.7}),
        (small(1), CONFIG, refs, {"loss": own_loss}),
        (small(1), CONFIG, refs, {"loss": losses.Choice("simpo", {"gamma": 0.3}), "beta": 0.7}),
        (small(1), CONFIG, refs, {"loss": losses.Choice("dpo_nll"), "micro_batch_size": 1}),
        (small(1), CONFIG, refs, {"nll_weight": 2.0}),
        (small(1), CONFIG, refs, {"micro_batch_size": 1, "nll_weight": 0.5}),
        (small(1), wider, refs, {}),
        (small(3), CONFIG, refs, {}),
        (floats(small(3), "float32"), CONFIG, refs, {}),
        (floats(small(3), "float32"), CONFIG, [logp.astype("float32") for logp in refs], {}),
        ({**longer, "ln_f.bias": longer["ln_f.bias"].detach()}, CONFIG, refs, {}),
        (longer, CONFIG, refs, {}),
    ]  # fmt: skip
    with Workers(3) as workers:

        def compare(params, config, refs, options):
            results = []
            for sweep in (training.dpo_sweep, workers.dpo_sweep):
                optimizer = optim.SGD(params, 0.0)
                metrics = training.dpo_training_step(
                    params, {}, config, optimizer, collate(PAIRS, *refs), **options, sweep=sweep
                )
                gradients = [p.grad.reshape(-1) for p in params.values() if p.grad is not None]
                results.append(np.concatenate([list(metrics.values()), *gradients]))
            tolerance = 1e-10 if params["wte.weight"].dtype == "float64" else 1e-4
            close(results[1], results[0], rtol=tolerance, atol=tolerance / 10)
            return results[0][0]

        values = [compare(*case) for case in cases]
        assert len({round(value, 12) for value in values[:5]}) == 5
        scale = 2.0
        assert compare(small(1), CONFIG, refs, {"loss": own_loss}) == pytest.approx(2 * values[5])
        compare(small(1), CONFIG, refs, {"loss": losses.Choice("ipo")})
        monkeypatch.setitem(losses.LOSSES, "ipo", triple_ipo)
        assert compare(small(1), CONFIG, refs, {"loss": losses.Choice("ipo")}) == pytest.approx(3 * values[2])


@forks
@pytest.mark.parametrize("options", [{}, {"temperature": 0.5, "top_k": 3}, {"top_p": 0.8}])
def test_several_processes_draw_the_texts_of_one(options):
    """Each prompt has the response, the log-probabilities and the next random number that one process gives it."""
    prompts = [[0], [0, 1, 2], [3, 4], [0], [2], [1, 1, 1, 1]]
    drawn = []
    with Workers(3) as workers:
        params = small(1)
        for sample in (
            functools.partial(generate, params, CONFIG),
            functools.partial(workers.generate, params, CONFIG),
        ):
            rngs = [np.random.default_rng([7, i]) for i in range(len(prompts))]
            texts = [sample(prompts, rngs, most, **options) for most in (5, 8)]
            drawn.append([*texts, [rng.random() for rng in rngs]])
        assert len(workers.others) == 2 and all(p.grad is None for p in params.values())
        for one, several in zip(*[each[:2] for each in drawn]):
            assert several.responses == one.responses
            for logps, expected in zip(several.logprobs, one.logprobs, strict=True):
                close(logps, expected, rtol=1e-10)
        assert drawn[0][2] == drawn[1][2] and len({tuple(y) for y in drawn[0][1].responses}) > 3
        numbers = {"temperature": np.float32(0.5), "top_k": np.int64(2), "top_p": np.float64(0.9)}
        assert workers.generate(params, CONFIG, prompts, rngs, np.int64(2), **numbers).responses


@forks
def test_what_cannot_be_sampled_is_named_before_it_is_shared_out():
    """A prompt is named by its place among all, nan by the prompt's ids; streams must be separate and repeatable."""
    params, rngs = small(1), [np.random.default_rng(i) for i in range(6)]
    with Workers(3) as workers:
        for wrong, error, sentence in (
            ([[0], [0], [0], [1] * 9], ValueError, "prompt 3 has 9 tokens"),
            ([[0], [9], [0], [0]], IndexError, "index 9"),  # in a share that is not the caller's
        ):
            with pytest.raises(error, match=sentence):
                workers.generate(params, CONFIG, wrong, rngs[:4], 3)
        with pytest.raises(ValueError, match="6 random generators for 2 prompts"):
            workers.generate(params, CONFIG, [[0], [1]], rngs, 3)
        philox = np.random.Generator(np.random.Philox(0))
        for streams in ([rngs[0], rngs[0]], [rngs[0], philox], rngs[0]):
            with pytest.raises(ValueError, match="each prompt needs a stream of its own"):
                workers.generate(params, CONFIG, [[0], [1]], streams, 3)
        params["wpe.weight"].data[1:] = np.nan  # so that only prompts of several tokens are at fault
        with pytest.raises(
            FloatingPointError, match=re.escape("nan after the prompt that begins with the ids [1, 2, 3];")
        ):
            workers.generate(params, CONFIG, [[1, 2, 3], [0], [3]], rngs[:3], 1)


class Sums(Workers):
    """Workers whose gradient is the sum of the numbers in the question, so that a test can read it."""

    def share(self, params, question):
        if question == ["fail"]:
            raise KeyError("share")
        if question == ["large"]:
            raise MemoryError("a billion")
        if question == ["nan"]:
            raise FloatingPointError("the loss is nan")
        if question == ["none"]:
            return os.getpid()
        total = params["x"].data * 0 + sum(question)
        params["x"].grad = total if params["x"].grad is None else params["x"].grad + total
        return [os.getpid(), float(params["x"].data.sum())]


@forks
def test_workers_use_the_current_weights_and_are_other_processes():
    """Each share is answered by another process, with the current weights, and the gradients add up."""
    x = Tensor(np.zeros(3), requires_grad=True)
    with Sums(3) as workers:
        replies = workers.ask({"x": x}, [[1], [10], [100]])
        assert (x.grad == 111).all() and len({pid for pid, _ in replies}) == 3 and replies[0][0] == os.getpid()
        x.data, x.grad = np.ones(3), None  # another array, as an optimizer leaves it
        assert [total for _, total in workers.ask({"x": x}, [[1], [10], [100]])] == [3, 3, 3]
        assert (x.grad == 111).all()
        x.grad = None
        workers.ask({"x": x}, [[1], [10]])  # fewer shares than processes
        assert (x.grad == 11).all()
        x.grad = None
        workers.ask({"x": x}, [["none"], ["none"]])
        assert (x.grad == 0).all()
        pids = [worker.pid for worker in workers.others]
        wider = Tensor(np.ones(5), requires_grad=True)
        assert [total for _, total in workers.ask({"x": wider}, [[1], [10], [100]])] == [5, 5, 5]
        assert (wider.grad == 111).all() and not set(pids) & {worker.pid for worker in workers.others}
        assert not any(alive(pid) for pid in pids)
        constant = Tensor(np.ones(5))
        workers.ask({"x": wider, "c": constant}, [["none"], ["none"]])
        assert constant.grad is None


@forks
def test_a_fault_is_passed_on_and_the_next_question_is_answered():
    """A worker's fault is raised in the caller, and the next reply belongs to the next question."""
    x = Tensor(np.zeros(1), requires_grad=True)
    with Sums(2) as workers:
        for questions, fault, sentence in (
            ([[1], ["nan"]], FloatingPointError, "the loss is nan"),
            ([["nan"], [1]], FloatingPointError, "the loss is nan"),
            ([[1], ["large"]], MemoryError, "a billion"),
            ([[1], ["fail"]], OSError, "a worker could not do its share: KeyError: 'share'"),
        ):
            with pytest.raises(fault, match=sentence):
                workers.ask({"x": x}, questions)
            x.grad = None
            assert len(workers.ask({"x": x}, [[1], [10]])) == 2 and x.grad[0] == 11
        x.grad = None
        with pytest.raises(TypeError, match="not JSON serializable"):
            workers.ask({"x": x}, [[1], [np.int64(10)]])
        assert workers.ask({"x": x}, [[1], [20]])[1][1] == 0 and x.grad[0] == 21
        x.grad = None
        os.kill(workers.others[0].pid, signal.SIGKILL)
        os.waitid(os.P_PID, workers.others[0].pid, os.WEXITED | os.WNOWAIT)
        with pytest.raises(OSError, match="has exited"):
            workers.ask({"x": x}, [[1], [10]])


@forks
def test_no_worker_outlives_the_process_that_asks():
    """Workers end with their parent, however it ends, and keep none of its other files open."""
    code = """if True:
        import os, sys, time
        import numpy as np
        from minidpo import Tensor
        from minidpo.run.workers import Workers

        class Sleepers(Workers):
            def share(self, params, question):
                time.sleep(question)

        read, write = os.pipe()  # a lock, say: workers must not keep it open
        workers = Sleepers(3)
        x = {"x": Tensor(np.zeros(1), requires_grad=True)}
        workers.fork_for(x)
        print(*[worker.pid for worker in workers.others], flush=True)
        if sys.argv[1] == "busy":
            workers.ask(x, [0, 0.5, 0.5])
        time.sleep(60)
    """
    for state in ("idle", "busy"):
        parent = subprocess.Popen([sys.executable, "-c", code, state], stdout=subprocess.PIPE, text=True)
        pids = list(map(int, parent.stdout.readline().split()))
        time.sleep(0.1)
        for pid in pids:
            files = os.listdir(f"/proc/{pid}/fd") if os.path.exists("/proc") else []
            assert len(files) <= 6  # three standard ones, two pipes, and the one that lists them
        parent.kill()
        parent.wait()
        parent.stdout.close()
        for _ in range(100):
            gone = [pid for pid in pids if not alive(pid)]
            if gone == pids:
                break
            time.sleep(0.1)
        assert gone == pids


def alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    state = Path(f"/proc/{pid}/stat")  # Z: it has ended, and nobody has waited for it
    return state.read_text().split()[2] != "Z" if state.exists() else True


@given(sizes=st.lists(st.integers(1, 100), min_size=1, max_size=20), count=st.integers(1, 5))
def test_shares_hold_every_example_once(sizes, count):
    """Every example is in exactly one share, and the shares are about equal."""
    parts = workers.shares(sizes, count)
    assert sorted(i for part in parts for i in part) == list(range(len(sizes)))
    assert len(parts) == min(count, len(sizes)) and all(parts)
    totals = [sum(sizes[i] for i in part) for part in parts]
    fullest = max(parts, key=lambda part: sum(sizes[i] for i in part))
    assert max(totals) - min(totals) <= min(sizes[i] for i in fullest)


def test_blas_threads_are_set_within_the_block():
    """Within the block, matrix products have its number of threads; after it, and after an error, the old number."""
    library = workers.blas()
    if library is None:
        pytest.skip("NumPy's matrix products are not OpenBLAS'")
    before = library.get()
    with workers.blas_threads(1):
        assert library.get() == 1
    assert library.get() == before >= 1
    with pytest.raises(KeyError), workers.blas_threads(1):
        raise KeyError
    assert library.get() == before


def test_freed_memory_is_used_again():
    """Arrays reuse the memory pages of a freed graph; clearing new pages costs up to a tenth of a step."""
    if platform.libc_ver()[0] != "glibc":
        pytest.skip("the C library is not glibc")
    code = """
        import resource
        import numpy
        from minidpo.run.workers import keep_memory

        def new_pages():
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            graph = [numpy.ones(2**18) for _ in range(10)]  # 20 MiB, 5120 pages
            return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

        keep_memory()
        print(new_pages(), new_pages(), new_pages())
    """
    run = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True)
    first, *later = map(int, run.stdout.split())
    assert max(later) < first / 10


@pytest.mark.parametrize("library", [lambda name: object(), lambda name: name + "so"])
def test_keep_memory_does_nothing_with_another_c_library(library, monkeypatch):
    """`keep_memory` does nothing on macOS, whose library has no mallopt, and on Windows, which refuses None."""
    monkeypatch.setattr(ctypes, "CDLL", library)
    workers.keep_memory.__wrapped__()


def test_one_worker_where_there_can_be_no_more(monkeypatch, cupy):
    """A machine without OpenBLAS or fork, or a model on a device, trains in one process."""
    host = {"x": Tensor(np.zeros(1))}
    library = workers.blas()
    monkeypatch.setattr(workers, "blas", lambda: workers.Blas(lambda: 7, print))
    assert workers.worker_count(host) == (7 if hasattr(os, "fork") else 1)
    assert workers.worker_count({"x": Tensor(cupy.zeros(1))}) == 1
    monkeypatch.setattr(workers, "MOST", 3)
    assert workers.worker_count(host) == (3 if hasattr(os, "fork") else 1)
    monkeypatch.delattr(os, "fork", raising=False)
    assert workers.worker_count(host) == 1
    monkeypatch.setattr(workers, "blas", lambda: None)
    assert workers.worker_count(host) == 1
    with workers.blas_threads(1):  # the number cannot be set
        assert json.dumps(1) == "1" and (library is None or library.get() >= 1)
