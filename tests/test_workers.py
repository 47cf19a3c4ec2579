"""Several processes, one gradient."""

import ctypes
import json
import os
import platform
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

from minidpo import Tensor, losses, optim, training
from minidpo.data.preferences import collate
from minidpo.run import workers
from minidpo.run.workers import Workers
from models import CONFIG, small
from test_loop import forks

close = np.testing.assert_allclose
PAIRS = [([0, 1], [2, 3, 0], [2, 0]), ([0], [1, 0], [3, 3, 3, 0]), ([0, 4, 4], [1, 0], [0]), ([0, 2], [4, 0], [1, 0])]
EXAMPLES = [([0], [1, 2, 0]), ([0, 1], [0]), ([0, 3], [4, 4, 0])]


@forks
@pytest.mark.parametrize("count", [2, 3, 6])
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_the_gradient_is_that_of_one_process(count, dtype):
    """Otherwise more cores learn something else: after three steps, metrics and weights, for both kinds of training."""
    results = []
    for processes in (1, count):
        params = {name: Tensor(p.data.astype(dtype), requires_grad=True) for name, p in small(1).items()}
        refs = training.reference_logprobs(
            {n: Tensor(p.data.astype(dtype)) for n, p in small(2).items()}, CONFIG, PAIRS
        )
        batch, optimizer = collate(PAIRS, *refs), optim.SGD(params, 0.01)
        gradient = training.pair_gradient(CONFIG, 0.3, losses.ipo_loss, 0.5, 1)
        metrics = []
        with Workers(params, gradient, processes) as crew:
            assert len(crew) == processes
            for _ in range(3):
                metrics += training.dpo_training_step(
                    params, {}, CONFIG, optimizer, batch, 0.3, losses.ipo_loss, 0.5, 5.0, 1, crew
                ).values()
        with Workers(params, training.nll_gradient(CONFIG), processes) as crew:
            for _ in range(3):
                metrics += training.sft_training_step(params, CONFIG, optimizer, EXAMPLES, workers=crew).values()
        assert all(p.dtype == p.grad.dtype == dtype for p in params.values())
        results.append(np.concatenate([metrics, *[p.data.reshape(-1) for p in params.values()]]))
    close(
        results[1], results[0], rtol=1e-10 if dtype == "float64" else 2e-4, atol=1e-12 if dtype == "float64" else 1e-5
    )


def sums(params, share):
    """A gradient that can be read: each entry of the share is added."""
    if share == ["fail"]:
        raise KeyError("share")
    if share == ["large"]:
        raise MemoryError("a billion")
    if share == ["nan"]:
        raise FloatingPointError("the loss is nan")
    if share == ["none"]:
        return os.getpid()
    total = params["x"].data * 0 + sum(share)
    params["x"].grad = total if params["x"].grad is None else params["x"].grad + total
    return [os.getpid(), float(params["x"].data.sum())]


@forks
def test_workers_see_the_weights_of_now_and_are_other_processes():
    """Otherwise they go on with the weights that they were forked with, or it is all done here."""
    x = Tensor(np.zeros(3), requires_grad=True)
    with Workers({"x": x}, sums, 3) as crew:
        said = crew([[1], [10], [100]])
        assert (x.grad == 111).all() and len({pid for pid, _ in said}) == 3 and said[0][0] == os.getpid()
        x.data, x.grad = np.ones(3), None  # another array, as an optimizer leaves it
        assert [total for _, total in crew([[1], [10], [100]])] == [3, 3, 3]
        assert (x.grad == 111).all()
        x.grad = None
        crew([[1], [10]])  # fewer shares than processes
        assert (x.grad == 11).all()
        x.grad = None
        crew([["none"], ["none"]])
        assert (x.grad == 0).all()


@forks
def test_a_fault_is_told_and_the_next_question_is_answered():
    """Otherwise an answer to the last question is taken for one to this."""
    x = Tensor(np.zeros(1), requires_grad=True)
    with Workers({"x": x}, sums, 2) as crew:
        for asked, fault, sentence in (
            ([[1], ["nan"]], FloatingPointError, "the loss is nan"),
            ([["nan"], [1]], FloatingPointError, "the loss is nan"),
            ([[1], ["large"]], MemoryError, "a billion"),
            ([[1], ["fail"]], OSError, "a worker could not do its share: KeyError: 'share'"),
        ):
            with pytest.raises(fault, match=sentence):
                crew(asked)
            x.grad = None
            assert len(crew([[1], [10]])) == 2 and x.grad[0] == 11
        os.kill(crew.others[0].pid, signal.SIGKILL)
        os.waitid(os.P_PID, crew.others[0].pid, os.WEXITED | os.WNOWAIT)
        with pytest.raises(OSError, match="is gone"):
            crew([[1], [10]])


@forks
def test_no_worker_outlives_the_process_that_asks():
    """Otherwise a killed run leaves processes behind, which hold its lock."""
    code = """if True:
        import os, sys, time
        import numpy as np
        from minidpo import Tensor
        from minidpo.run.workers import Workers
        read, write = os.pipe()  # a lock, say: workers must not keep it open
        crew = Workers({"x": Tensor(np.zeros(1), requires_grad=True)}, lambda params, share: time.sleep(share), 3)
        print(*[worker.pid for worker in crew.others], flush=True)
        if sys.argv[1] == "busy":
            crew([0, 0.5, 0.5])
        time.sleep(60)
    """
    for state in ("idle", "busy"):
        started = subprocess.Popen([sys.executable, "-c", code, state], stdout=subprocess.PIPE, text=True)
        pids = list(map(int, started.stdout.readline().split()))
        time.sleep(0.1)
        for pid in pids:
            held = os.listdir(f"/proc/{pid}/fd") if os.path.exists("/proc") else []
            assert len(held) <= 6  # three standard ones, two pipes, and one that lists
        started.kill()
        started.wait()
        started.stdout.close()
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
    state = Path(f"/proc/{pid}/stat")  # a process that has ended and was not waited for is Z
    return state.read_text().split()[2] != "Z" if state.exists() else True


@given(sizes=st.lists(st.integers(1, 100), min_size=1, max_size=20), count=st.integers(1, 5))
def test_shares_hold_every_example_once(sizes, count):
    """Otherwise a pair is forgotten or counts twice, or one worker waits for the other."""
    parts = workers.shares(sizes, count)
    assert sorted(i for part in parts for i in part) == list(range(len(sizes)))
    assert len(parts) == min(count, len(sizes)) and all(parts)
    totals = [sum(sizes[i] for i in part) for part in parts]
    fullest = max(parts, key=lambda part: sum(sizes[i] for i in part))
    assert max(totals) - min(totals) <= min(sizes[i] for i in fullest)


def test_blas_has_the_threads_that_it_is_given():
    """Otherwise each worker's products use all cores, and they wait for each other."""
    found = workers.blas()
    if found is None:
        pytest.skip("NumPy's matrix products are not OpenBLAS'")
    before = found.get()
    with workers.blas_threads(1):
        assert found.get() == 1
    assert found.get() == before >= 1
    with pytest.raises(KeyError), workers.blas_threads(1):
        raise KeyError
    assert found.get() == before


def test_memory_that_an_array_leaves_is_kept_for_the_next():
    """Otherwise the system clears the pages of a graph anew for every micro-batch, up to a tenth of a step."""
    if platform.libc_ver()[0] != "glibc":
        pytest.skip("the C library is not glibc")
    code = """
        import resource
        import numpy
        from minidpo import Tensor
        from minidpo.run.workers import Workers

        def pages_taken():
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            graph = [numpy.ones(2**18) for _ in range(10)]  # 20 MiB, 5120 pages
            return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

        Workers({"x": Tensor(numpy.zeros(1))}, None, 1)
        print(pages_taken(), pages_taken(), pages_taken())
    """
    run = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True)
    first, *later = map(int, run.stdout.split())
    assert max(later) < first / 10


@pytest.mark.parametrize("library", [lambda name: object(), lambda name: name + "so"])
def test_another_c_library_keeps_memory_as_it_does(library, monkeypatch):
    """Otherwise there is no training on macOS, whose library has no mallopt, or on Windows, which refuses None."""
    monkeypatch.setattr(ctypes, "CDLL", library)
    workers.keep_memory.__wrapped__()


def test_one_worker_where_there_can_be_no_more(monkeypatch, cupy):
    """Otherwise a machine without OpenBLAS or fork, or a model on a device, has no training at all."""
    host = {"x": Tensor(np.zeros(1))}
    found = workers.blas()
    monkeypatch.setattr(workers, "blas", lambda: workers.Blas(lambda: 7, print))
    assert workers.worker_count(host) == (7 if hasattr(os, "fork") else 1)
    assert workers.worker_count({"x": Tensor(cupy.zeros(1))}) == 1
    monkeypatch.setattr(workers, "MOST", 3)
    assert workers.worker_count(host) == (3 if hasattr(os, "fork") else 1)
    monkeypatch.delattr(os, "fork", raising=False)
    assert workers.worker_count(host) == 1
    monkeypatch.setattr(workers, "blas", lambda: None)
    assert workers.worker_count(host) == 1
    with workers.blas_threads(1):  # which cannot be set
        assert json.dumps(1) == "1" and (found is None or found.get() >= 1)
