"""Tasks give the same results in any number of processes, and no command is silent for long."""

import json
import os
import signal
import sys
import time
from functools import partial

import pytest

from minidpo import cli
from minidpo.cli import desk
from minidpo.run import loop, reference, tasks, workers
from minidpo.streams import stream
from minidpo.theory import assumptions, dynamics, equalities, optima
from minidpo.training import reference_logprobs
from models import CONFIG, small
from twin import prepared


@pytest.fixture
def processes(monkeypatch):
    """Set how many processes there are."""

    def decide(count):
        for module in (tasks, reference):
            monkeypatch.setattr(module, "worker_count", lambda params: count)

    return decide


@pytest.fixture
def impatient(monkeypatch):
    """Every moment without a line counts as silence."""
    monkeypatch.setattr(tasks, "SILENCE", 0.0)


def product(seed):
    """A matrix product whose last bits depend on how its sums are split."""
    x = stream(seed).normal(size=(300, 300)).astype("float32")
    return x @ x


def test_results_do_not_depend_on_the_number_of_processes(processes):
    """One process or several: the same bits, in the order of the tasks, whichever ends first."""
    outcomes = []
    for count in (1, 2, 3):
        processes(count)
        outcomes.append(list(tasks.results([partial(product, seed) for seed in range(5)], "products")))
    for outcome in outcomes[1:]:
        assert all((a == b).all() for a, b in zip(outcomes[0], outcome, strict=True))
    waits = [partial(lambda seconds: time.sleep(seconds) or seconds, 0.2 / 2**i) for i in range(3)]
    assert list(tasks.results(waits, "waits")) == [0.2, 0.1, 0.05]


def test_each_task_has_a_process_with_one_blas_thread(processes):
    """Tasks run beside each other in processes of one BLAS thread, which do not outlive the results."""
    processes(2)
    library = workers.blas()
    outcome = list(tasks.results([lambda: (os.getpid(), library.get() if library else 1)] * 3, "pids"))
    assert len({pid for pid, _ in outcome} | {os.getpid()}) == 4 and {threads for _, threads in outcome} == {1}
    started = time.monotonic()
    first, *_ = tasks.results([partial(time.sleep, 0.3)] * 2, "beside each other")
    assert first is None and time.monotonic() - started < 0.55
    pids = tasks.results([os.getpid, partial(time.sleep, 60)], "left early")
    next(pids)
    started = time.monotonic()
    pids.close()
    assert time.monotonic() - started < 30
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)


def test_what_a_task_raises_is_raised(processes):
    """A fault of a task, in its own words; a process that is gone is an OSError."""
    processes(2)

    def fault():
        raise FloatingPointError("the loss is nan")

    with pytest.raises(FloatingPointError, match="the loss is nan"):
        list(tasks.results([fault, partial(time.sleep, 60)], "faults"))
    with pytest.raises(OSError, match="killed: a process exited before it had an answer"):
        list(tasks.results([lambda: os.kill(os.getpid(), signal.SIGKILL)], "killed"))


def test_silence_is_broken(processes, impatient, capsys, monkeypatch):
    """A line on stderr says how many tasks, or items, are done; on a terminal the next replaces it."""
    processes(1)
    assert list(tasks.results([partial(time.sleep, 0.1)] * 2, "naps")) == [None, None]
    printed = capsys.readouterr()
    assert "naps: 1 of 2 parts done, 0 s\n" in printed.err and not printed.out
    assert list(tasks.counted("abc", "letters")) == ["a", "b", "c"]
    assert capsys.readouterr().err.splitlines() == ["letters: 0 of 3", "letters: 1 of 3", "letters: 2 of 3"]
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    list(tasks.counted("a", "letters"))
    assert capsys.readouterr().err == "\r\x1b[Kletters: 0 of 1\r\x1b[K"


def test_loops_over_small_products_have_one_blas_thread():
    """While items are counted NumPy has one BLAS thread, and afterwards as many as before."""
    library = workers.blas()
    if library is None:
        pytest.skip("this BLAS cannot be asked")
    before = library.get()
    assert [library.get() for _ in tasks.counted("ab", "letters")] == [1, 1] and library.get() == before


def test_a_line_of_a_run_ends_the_silence(capsys, monkeypatch):
    """Steps of a run in a log break the silence on stderr; its evaluations begin a new one."""
    monkeypatch.setattr(tasks, "SILENCE", 30.0)
    progress = loop.Progress("run", 100)
    monkeypatch.setattr(tasks, "last", time.monotonic() - 31)
    progress.after_step(7, {"loss": 1.5, "tokens": 30})
    progress.after_step(8, {"loss": 1.5, "tokens": 30})
    printed = capsys.readouterr()
    assert printed.err.count("\n") == 1 and "7/100   loss 1.5000" in printed.err and not printed.out
    monkeypatch.setattr(tasks, "last", time.monotonic() - 31)
    progress.after_evaluation(10, {"eval_loss": 2.0})
    tasks.tell("more")
    assert not capsys.readouterr().err


@pytest.mark.slow
def test_exact_and_judge_do_not_depend_on_the_number_of_processes(processes, tmp_path, capsys, monkeypatch):
    """`exact` prints the same claims and `judge` returns the same numbers with one process and with two."""
    root = prepared(tmp_path)
    small = equalities.small_world(0, characters=2, cap=3)
    runs = [partial(equalities.optimum_of_transformers, runs=[(beta, 16, 2, 30, 1.0)]) for beta in (0.5, 1.0)]
    monkeypatch.setattr(equalities, "EQUALITIES", [equalities.bradley_terry, *runs])
    monkeypatch.setattr(equalities, "small_world", lambda seed: small)
    monkeypatch.setattr(optima, "OPTIMA", optima.OPTIMA[:1])
    brief = assumptions.cases(small, 0, 5)[:-2]  # without its transformers, which take long
    monkeypatch.setattr(assumptions, "cases", lambda world, seed: brief)
    monkeypatch.setattr(assumptions, "finite_margins", equalities.reparametrisation)
    monkeypatch.setattr(dynamics, "beta_early_and_late", equalities.rlhf)
    outcomes = []
    for count in (1, 2):
        processes(count)
        cli.exact()
        rows = cli.judge(checkpoint=[root / "desk", root / "desk_other"], reference=root / "desk", replies=4)
        outcomes.append((capsys.readouterr().out, json.dumps(rows)))
    assert outcomes[0] == outcomes[1]
    lines = outcomes[0][0].splitlines()
    heading = "The same holds for transformers, as closely as their size allows."
    assert lines.count(heading) == 1 and "beta 1" in lines[lines.index(heading) + 2]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "line"),
    [
        (["check", "--cases=3"], "matmul, complex: cases: 2 of 3"),
        (["evaluate", "--checkpoint=init", "--reference=other", "--data=pairs.jsonl"], "policy: pairs: 3 of 7"),
        (["evaluate", "--checkpoint=init", "--reference=other", "--data=pairs.jsonl"], "reference: pairs: 3 of 7"),
        (["displacement", "--checkpoint=init", "--data=pairs.jsonl"], "pairs: 3 of 7"),
        (["judge", "--checkpoint=desk", "--reference=desk", "--replies=3"], "judge: 1 of 1 parts done"),
        (["sft", "--data=many.jsonl", "--out=run", "--steps=1", "--n-embd=8"], "held-out batches: 0 of "),
        (["dpo", "--data=many.jsonl", "--init=init", "--out=run", "--steps=1"], "pairs scored by the reference: 3 of "),
        (["dpo", "--data=many.jsonl", "--init=init", "--out=run", "--steps=1"], "held-out pairs: 0 of "),
    ],
)
def test_a_long_command_says_how_far_it_is(command, line, impatient, processes, tmp_path, monkeypatch, capsys):
    """Each loop that takes long with much data tells on stderr how far it is."""
    prepared(tmp_path)
    monkeypatch.chdir(tmp_path)
    processes(1)
    assert cli.main(command) == 0
    assert line in capsys.readouterr().err


@pytest.mark.parametrize(("count", "pairs", "others"), [(1, 5, 0), (2, 5, 3), (2, 2, 0)])
def test_many_pairs_are_scored_by_other_processes(count, pairs, others, processes, monkeypatch):
    """Each part of the pairs has a process of its own if there are several; the scores are the same bits in order."""
    rng = stream(0)
    examples = [tuple(rng.integers(1, 4, n).tolist() for n in rng.integers(1, 4, 3)) for _ in range(pairs)]
    processes(count)
    monkeypatch.setattr(reference, "PART", 2)
    expected = reference_logprobs(small(), CONFIG, examples)
    scores = reference.pair_logprobs(small(), CONFIG, examples, "pairs")
    assert [logp.tobytes() for logp in scores] == [logp.tobytes() for logp in expected]
    monkeypatch.setattr(
        reference, "reference_logprobs", lambda params, config, part: ([os.getpid()] * len([*part]),) * 2
    )
    pids, _ = reference.pair_logprobs(small(), CONFIG, examples, "pairs")
    assert len(pids) == pairs and len({*pids} - {os.getpid()}) == others


def test_the_desk_s_files_do_not_depend_on_the_number_of_processes(processes, tmp_path):
    """The demo's data has the same bytes with one process and with two."""
    sizes = desk.FULL._replace(texts=20, completions=20, pairs=20, held_out=5)
    files = []
    for count in (1, 2):
        processes(count)
        desk.make_data(tmp_path / str(count), 0, sizes)
        files.append({path.name: path.read_bytes() for path in (tmp_path / str(count)).iterdir()})
    assert files[0] == files[1] and len(files[0]) == 9
