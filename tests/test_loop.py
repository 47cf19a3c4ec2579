"""A run can be left at any instant: it goes on as if nothing had happened, or says why it cannot."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from minidpo import checkpoint, cli, model, optim, training
from minidpo.model import Config
from minidpo.run import folder as run_folder
from minidpo.run import loop, workers
from minidpo.tokenizer import Tokenizer

forks = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")

HERE = Path(__file__).parent
TOKENIZER = Tokenizer("\nabcd")
CONFIG = Config(TOKENIZER.vocab_size, 16, 8, 1, 2)
ROWS = [
    {"prompt": x + y, "chosen": y + "d", "rejected": w}
    for x in "abc"
    for y in "abcd"
    for w in ("cc", "a")
]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Pairs and a model to begin from."""
    made = tmp_path_factory.mktemp("loop")
    (made / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    checkpoint.save(made / "init", model.init(CONFIG, np.random.default_rng(0)), CONFIG, TOKENIZER)
    return made


def dpo(folder, out, *more):
    return ["dpo", f"--data={folder / 'pairs.jsonl'}", f"--init={folder / 'init'}", f"--out={out}", *more]


SHORT = ("--steps=9", "--evaluate-every=4", "--batch-size=3", "--learning-rate=0.01")


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("what", ["writes", "instants", "signals"])
@forks
def test_a_killed_run_ends_in_the_same_bytes(what, folder, tmp_path):
    """Before every write, at random instants, by SIGTERM: otherwise a night's work is lost, or quietly another."""
    for name in ("pairs.jsonl", "init"):
        os.symlink(folder / name, tmp_path / name)
    one_thread = {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    finished = subprocess.run(
        [sys.executable, str(HERE / "killing.py"), what, str(tmp_path)],
        env={**os.environ, **one_thread},
        capture_output=True,
        text=True,
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert finished.stdout.count("True") >= (12 if what != "writes" else 40)


def test_what_a_run_leaves_behind(folder, tmp_path, capsys):
    """Otherwise what happened cannot be read, nor repeated."""
    run = tmp_path / "run"
    assert cli.main(dpo(folder, run, *SHORT)) == 0
    printed = capsys.readouterr().out
    steps = re.findall(
        r"^run +(\d+)/9 +held-out loss \d\.\d{4} +accuracy \d\.\d\d +reward margin [+-]\d", printed, re.MULTILINE
    )
    assert steps == ["0", "4", "8", "9"] and "tokens/s" in printed and re.search(r"\d:\d\d left", printed)
    assert {
        "run.json",
        "tokenizer.json",
        "set_aside.jsonl",
        "metrics.jsonl",
        "samples.jsonl",
        "report.md",
        "model",
    } <= {path.name for path in run.iterdir()}
    metrics = lines(run / "metrics.jsonl")
    assert [line["step"] for line in metrics] == [0, 1, 2, 3, 4, 4, 5, 6, 7, 8, 8, 9, 9]
    for line in metrics:
        names = {"rewards/margins", "rewards/accuracies", "logps/chosen", "loss"}
        assert names <= line.keys() or {f"eval_{name}" for name in names} <= line.keys()
    assert sum("eval_loss" in line for line in metrics) == 4
    samples = lines(run / "samples.jsonl")
    assert {line["step"] for line in samples} == {0, 4, 8, 9} and samples[0].keys() == {"step", "prompt", "response"}
    described = json.loads((run / "run.json").read_text())
    assert described["environment"]["blas_threads"] >= 1 and len(described["data_sha256"]) == 64
    best = min((line for line in metrics if "eval_loss" in line), key=lambda line: line["eval_loss"])
    kept = {path.name for path in run.glob("step-*")}
    assert kept == {f"step-{best['step']:06d}", "step-000009"}
    result, saved = checkpoint.load(run), checkpoint.load(run / f"step-{best['step']:06d}")
    assert all((result.params[name].data == p.data).all() for name, p in saved.params.items())
    assert (run / "latest").read_text() == "model"


def test_the_same_seed_gives_the_same_bytes(folder, tmp_path):
    """Otherwise nothing that is reported can be repeated. Looking more often changes nothing."""
    states = []
    for name, more in (("a", ()), ("b", ()), ("often", ("--evaluate-every=1",)), ("c", ("--seed=1",))):
        assert cli.main(dpo(folder, tmp_path / name, *SHORT, *more)) == 0
        states.append((tmp_path / name / "step-000009" / "model.safetensors").read_bytes())
    assert states[0] == states[1] == states[2] != states[3]


def test_no_checkpoint_knows_the_time(folder, tmp_path, monkeypatch):
    """Otherwise two equal runs differ."""
    kept = []
    for factor in (1, 1000):
        clock = iter(range(10**9))
        monkeypatch.setattr(loop.time, "monotonic", lambda clock=clock, factor=factor: next(clock) * factor)
        run = tmp_path / f"run{factor}"
        assert cli.main(dpo(folder, run, *SHORT)) == 0
        kept.append([path.read_bytes() for path in sorted(run.glob("step-*/*"))])
    assert kept[0] == kept[1]


def interrupting(number, step):
    """A training step after which a signal comes."""
    taken = []
    right = training.dpo_training_step

    def training_step(*args, **kwargs):
        metrics = right(*args, **kwargs)
        taken.append(metrics)
        if len(taken) == step:
            os.kill(os.getpid(), number)
        return metrics

    return training_step


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_saves_and_says_how_to_go_on(number, folder, tmp_path, capsys, monkeypatch):
    """Otherwise Ctrl-C throws away what was learnt since the last checkpoint."""
    run, whole = tmp_path / "run", tmp_path / "whole"
    before = signal.signal(number, signal.default_int_handler)  # where tests run in the background, it is ignored
    try:
        with monkeypatch.context() as patch:
            patch.setattr(training, "dpo_training_step", interrupting(number, 6))
            assert cli.main(dpo(folder, run, *SHORT)) == 130
        assert signal.getsignal(number) is signal.default_int_handler
    finally:
        signal.signal(number, before)
    error = capsys.readouterr().err
    assert f"{number.name}: saved at step 6; go on with: python -m minidpo resume {run}" in error
    assert (run / "latest").read_text() == "step-000006"
    assert cli.main(["resume", str(run)]) == 0 and cli.main(dpo(folder, whole, *SHORT)) == 0
    for name in ("model/model.safetensors", "step-000009/state.safetensors", "samples.jsonl"):
        assert (run / name).read_bytes() == (whole / name).read_bytes()
    without_times = [
        [{k: v for k, v in line.items() if k != "tokens_per_second"} for line in lines(folder_ / "metrics.jsonl")]
        for folder_ in (run, whole)
    ]
    assert without_times[0] == without_times[1]


def test_lines_after_the_checkpoint_are_cut_off(tmp_path):
    """Otherwise a step stands in the metrics twice; half a line makes the file unreadable."""
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 2, "eval_loss": 1}\n{"step": 3}\n{"st')
    run_folder.cut(path, 2)
    assert [line["step"] for line in lines(path)] == [1, 2, 2]
    run_folder.cut(tmp_path / "none.jsonl", 2)
    assert not (tmp_path / "none.jsonl").exists()


def test_going_on_with_a_finished_run_changes_nothing(folder, tmp_path):
    """Otherwise one careless command trains further than was asked."""
    run = tmp_path / "run"
    assert cli.main(dpo(folder, run, *SHORT)) == 0
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    assert cli.main(["resume", str(run)]) == 0
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_a_run_goes_on_with_what_it_was_begun_with(folder, tmp_path, capsys):
    """Otherwise half of a model is trained on one file and half on another."""
    copied = shutil.copytree(folder, tmp_path / "copy")
    run = tmp_path / "run"
    assert cli.main(dpo(copied, run, *SHORT)) == 0
    assert cli.main(dpo(copied, run, *SHORT)) == 2
    assert f"{run} exists already: choose another folder, or go on with it: python -m minidpo resume {run}" in (
        capsys.readouterr().err
    )
    with (copied / "pairs.jsonl").open("a") as file:
        file.write("\n")
    assert cli.main(["resume", str(run)]) == 2
    assert "cannot go on, what --data names has changed" in capsys.readouterr().err
    shutil.copy(folder / "pairs.jsonl", copied / "pairs.jsonl")
    shutil.rmtree(copied / "init")
    checkpoint.save(copied / "init", model.init(CONFIG, np.random.default_rng(9)), CONFIG, TOKENIZER)
    assert cli.main(["resume", str(run)]) == 2
    assert "cannot go on, what --init names has changed" in capsys.readouterr().err


def test_another_number_of_threads_is_said(folder, tmp_path, capsys, monkeypatch):
    """Otherwise the last bits differ, and nobody knows why."""
    run = tmp_path / "run"
    monkeypatch.setattr(run_folder, "blas", lambda: workers.Blas(lambda: 3, print))
    assert cli.main(dpo(folder, run, *SHORT)) == 0
    monkeypatch.setattr(run_folder, "blas", lambda: workers.Blas(lambda: 1, print))
    capsys.readouterr()
    assert cli.main(["resume", str(run)]) == 0
    assert "blas_threads was 3 and is 1; the last bits of the result may differ" in capsys.readouterr().err


@pytest.mark.parametrize(
    "content",
    [None, "{", "[]", '{"arguments": "dpo"}', '{"arguments": ["r\\u001bm"], "environment": {}}', '{"arguments": []}'],
)
def test_what_is_no_run_cannot_go_on(content, tmp_path, capsys):
    """Otherwise a stranger's folder decides which command is run, or a traceback says that it is none."""
    if content is not None:
        (tmp_path / "run.json").write_text(content)
    assert cli.main(["resume", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "\x1b" not in error


def test_a_signal_that_is_ignored_stays_ignored(monkeypatch):
    """Otherwise what runs under nohup is stopped by the Ctrl-C of somebody else's terminal."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with loop.Interrupt().listening() as interrupt:
            os.kill(os.getpid(), signal.SIGINT)
            assert interrupt.name == "" and signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def setup(tmp_path, losses, patience=None, steps=10):
    """A run whose held-out losses are given: what the loop does with them, without a model to speak of."""
    params = model.init(CONFIG, np.random.default_rng(0))
    optimizer = optim.AdamW(params, 1e-3)
    measured = iter(losses)

    def step(indices):
        return training.sft_training_step(params, CONFIG, optimizer, [([0], [i % 3 + 1, 0]) for i in indices])

    task = loop.Task(6, step, lambda: {"loss": next(measured)}, lambda: [], lambda indices: f"lines {sorted(indices)}")
    settings = loop.Settings(0, steps, 2, 1e-3, 0, 1, patience)
    run_folder.create(tmp_path / "run", {"arguments": ["sft"]}, {})
    return tmp_path / "run", (params, CONFIG, TOKENIZER, optimizer, task, settings)


def test_early_stopping_keeps_the_best(tmp_path):
    """Otherwise the run ends later than it should, or with a worse model than it had."""
    run, arguments = setup(tmp_path, [5.0, 3.0, 4.0, 2.0, 2.5, 2.0, 2.6, 9.0], patience=3)
    loop.run_loop(run, *arguments)
    evaluated = [line["step"] for line in lines(run / "metrics.jsonl") if "eval_loss" in line]
    assert evaluated == [0, 1, 2, 3, 4, 5, 6]  # the best at 3, then 2.5, an equal 2.0, 2.6
    assert {path.name for path in run.glob("step-*")} == {"step-000003", "step-000006"}
    best, result = (run / name / "model.safetensors" for name in ("step-000003", "model"))
    assert best.read_bytes() == result.read_bytes()


def test_a_run_that_breaks_names_its_step_its_rows_and_the_last_good_checkpoint(tmp_path):
    """Otherwise nan weights are saved, and nobody finds the row that did it."""
    run, arguments = setup(tmp_path, [5.0, 4.0, 3.0, float("nan")])
    with pytest.raises(FloatingPointError) as caught:
        loop.run_loop(run, *arguments)
    batch = sorted(training.batch_indices(6, 2, 2, 0))
    assert str(caught.value) == (
        f"the held-out loss is nan at step 3, after a batch of lines {batch}; the last good checkpoint is "
        f"{run / 'step-000002'}; lower the learning rate"
    )
    assert checkpoint.latest(run).name == "step-000002"
    assert all(np.isfinite(p.data).all() for p in checkpoint.load(run).params.values())


def test_a_model_that_is_not_finite_is_never_saved(tmp_path):
    """Otherwise the last good checkpoint is not good."""
    run, arguments = setup(tmp_path, [1.0] * 11)
    arguments[0]["h.0.mlp.c_fc.bias"].data[3] = np.inf
    with pytest.raises(
        FloatingPointError, match="not finite at step 0, as it begins; there is no checkpoint yet; look"
    ):
        loop.run_loop(run, *arguments)
    assert not list(run.glob("step-*")) and not list(run.glob(".*"))


def test_one_process_at_a_time(tmp_path):
    """Otherwise each deletes what the other has just written."""
    run, arguments = setup(tmp_path, [1.0] * 11)
    half_written = run / (".step-000001." + "0" * 32)
    half_written.mkdir()
    (run / "model").mkdir()
    (run / "metrics.jsonl").write_text('{"step": 5}\n{"st')
    with run_folder.alone(run), pytest.raises(checkpoint.CheckpointError, match="another process is at this run"):
        loop.run_loop(run, *arguments)
    assert half_written.exists() and (run / "model").exists()
    assert (run / "metrics.jsonl").read_text() == '{"step": 5}\n{"st'
    loop.run_loop(run, *arguments)


def test_what_belongs_to_others_stays(tmp_path):
    """Otherwise going on with a run deletes the notes that somebody keeps in its folder."""
    run, arguments = setup(tmp_path, [1.0] * 11)
    for name in (".git", "step-by-step", ".hidden"):
        (run / name).mkdir()
    (run / "step-notes.txt").write_text("")
    half_written = run / (".step-000001." + "0" * 32)
    half_written.mkdir()
    (run / (".link." + "0" * 32)).symlink_to(tmp_path)
    loop.run_loop(run, *arguments)
    names = {path.name for path in run.iterdir()}
    assert {".git", "step-by-step", ".hidden", "step-notes.txt"} <= names and half_written.name not in names
    assert (".link." + "0" * 32) not in names and tmp_path.exists()


def test_divergence_has_an_exit_status_of_its_own(folder, tmp_path, capsys):
    """Otherwise a script cannot tell a wrong file from a learning rate that is too high."""
    with np.errstate(all="ignore"):
        assert cli.main(dpo(folder, tmp_path / "run", *SHORT[:-1], "--learning-rate=1e30", "--warmup-steps=0")) == 3
    error = capsys.readouterr().err
    assert re.search(
        r"at step \d+, after a batch of lines \d.*the last good checkpoint is .*step-00000\d; lower", error
    )
    assert error.count("\n") == 1


def test_a_terminal_sees_a_live_line_and_a_log_does_not(capsys, monkeypatch):
    """Otherwise a log is full of carriage returns, or a terminal is silent for a minute."""
    for live in (False, True):
        monkeypatch.setattr(sys.stdout, "isatty", lambda live=live: live)
        progress = loop.Progress("run", 100)
        progress.took(7, {"loss": 1.5, "tokens": 30})
        progress.took(8, {"loss": 1.25, "tokens": 30})
        printed = capsys.readouterr().out
        assert ("\r" in printed and "loss 1.5000" in printed) if live else printed == ""
        progress.measured(10, {"eval_loss": 2.0, "eval_rewards/accuracies": 0.5, "eval_rewards/margins": -0.1})
        printed = capsys.readouterr().out
        assert "10/100   held-out loss 2.0000   accuracy 0.50   reward margin -0.100" in printed and printed.endswith(
            "left\n"
        )


def test_the_optimizer_comes_back(tmp_path):
    """m, v and t: otherwise the first steps after a resume are those of a fresh Adam."""
    params = model.init(CONFIG, np.random.default_rng(0))
    optimizer = optim.AdamW(params, 1e-2)
    training.sft_training_step(params, CONFIG, optimizer, [([0], [1, 0])])
    state = run_folder.State(step=7, measured_at=6, best=1.5, best_step=6, worse=0)
    run_folder.save(tmp_path, params, CONFIG, TOKENIZER, optimizer, state)
    others = model.init(CONFIG, np.random.default_rng(1))
    again = optim.AdamW(others, 1e-2)
    assert run_folder.restore(tmp_path / "step-000007", others, again) == state
    assert again.state.keys() == optimizer.state.keys() and again.state["wte.weight"]["t"] == 1
    for name, kept in optimizer.state.items():
        assert again.state[name].keys() == kept.keys() == {"t", "m", "v"}
        assert all(np.array_equal(again.state[name][key], kept[key]) for key in kept)
        assert (others[name].data == params[name].data).all()


def test_a_checkpoint_of_no_run_is_no_place_to_go_on(tmp_path):
    """Otherwise a model that somebody put there is trained on with a fresh optimizer, or ends in a traceback."""
    params = model.init(CONFIG, np.random.default_rng(0))
    for number, (arrays, state) in enumerate([
        ({}, {}),
        ({}, {**vars(run_folder.State()), "best": 1.0, "optimizer": [1]}),
        ({"x/m": np.zeros(1)}, {**vars(run_folder.State()), "best": 1.0, "optimizer": {}}),
        ({}, {"step": 1, "optimizer": {}, "more": 2}),
        ({}, {**vars(run_folder.State()), "best": 1.0, "step": "x", "optimizer": {}}),
    ]):  # fmt: skip
        checkpoint.save(tmp_path / str(number), params, CONFIG, TOKENIZER, arrays, state)
        with pytest.raises(checkpoint.CheckpointError, match="its training state is not that of this run"):
            run_folder.restore(tmp_path / str(number), params, optim.AdamW(params))
