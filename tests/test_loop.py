"""A run may stop at any instant: it resumes as if nothing had happened, or says why it cannot."""

import errno
import hashlib
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
from minidpo.run import loop, report, safetensors, workers
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
    path = tmp_path_factory.mktemp("loop")
    (path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    checkpoint.save(path / "init", model.init(CONFIG, np.random.default_rng(0)), CONFIG, TOKENIZER)
    return path


def dpo(folder, out, *more):
    return ["dpo", f"--data={folder / 'pairs.jsonl'}", f"--init={folder / 'init'}", f"--out={out}", *more]


SHORT = ("--steps=9", "--evaluate-every=4", "--batch-size=3", "--learning-rate=0.01")


@pytest.fixture(scope="module")
def whole(folder):
    """A run that was never stopped."""
    assert cli.main(dpo(folder, folder / "whole", *SHORT)) == 0
    return folder / "whole"


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize("what", ["writes", "instants"])
@forks
def test_a_killed_run_ends_in_the_same_bytes(what, folder, tmp_path):
    """kill -9 costs steps, never results: at random instants, and from what is on the disk before each write."""
    for name in ("pairs.jsonl", "init"):
        os.symlink(folder / name, tmp_path / name)
    one_thread = {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    result = subprocess.run(
        [sys.executable, str(HERE / "killing.py"), what, str(tmp_path)],
        env={**os.environ, **one_thread},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.count("True") >= (12 if what == "instants" else 40)


def test_what_a_run_leaves_behind(folder, tmp_path, capsys):
    """The folder holds what its module's docstring lists: what happened can be read, and repeated."""
    run = tmp_path / "run"
    assert cli.main(dpo(folder, run, *SHORT)) == 0
    printed = capsys.readouterr().out
    steps = re.findall(
        r"^run +(\d+)/9 +held-out loss \d\.\d{4} +(?:accuracy \d\.\d\d|all pairs tie) +reward margin [+-]\d",
        printed,
        re.MULTILINE,
    )
    assert steps == ["0", "4", "8", "9"] and "tokens/s" in printed and re.search(r"\d:\d\d left", printed)
    listed = set(re.findall(r"^    (\S+?)/?  +\S", run_folder.__doc__, re.MULTILINE)) - {"step-000100", "curves.png"}
    assert listed == {path.name for path in run.iterdir() if not re.match(r"step-|curves", path.name)}
    metrics = lines(run / "metrics.jsonl")
    assert [line["step"] for line in metrics] == [0, 1, 2, 3, 4, 4, 5, 6, 7, 8, 8, 9, 9]
    for line in metrics:
        names = {"rewards/margins", "rewards/accuracies", "logps/chosen", "loss"}
        assert names <= line.keys() or {f"eval_{name}" for name in names} <= line.keys()
    assert sum("eval_loss" in line for line in metrics) == 4
    samples = lines(run / "samples.jsonl")
    assert {line["step"] for line in samples} == {0, 4, 8, 9} and samples[0].keys() == {"step", "prompt", "response"}
    description = run_folder.run_description(run)
    assert description["environment"]["blas_threads"] >= 1 and len(description["data_sha256"]) == 64
    best = min((line for line in metrics if "eval_loss" in line), key=lambda line: line["eval_loss"])
    assert {path.name for path in run.glob("step-*")} == {f"step-{best['step']:06d}", "step-000009"}
    result, saved = checkpoint.load(run), checkpoint.load(run / f"step-{best['step']:06d}")
    assert all((result.params[name].data == p.data).all() for name, p in saved.params.items())
    assert (run / "latest").read_text() == "model"


@pytest.mark.slow
def test_the_same_seed_gives_the_same_bytes(folder, tmp_path):
    """Equal seeds give equal weights, however often the run is evaluated; another seed gives others."""
    states = []
    for name, more in (("a", ()), ("b", ()), ("often", ("--evaluate-every=1",)), ("c", ("--seed=1",))):
        assert cli.main(dpo(folder, tmp_path / name, *SHORT, *more)) == 0
        states.append((tmp_path / name / "step-000009" / "model.safetensors").read_bytes())
    assert states[0] == states[1] == states[2] != states[3]


def test_no_checkpoint_knows_the_time(folder, tmp_path, monkeypatch):
    """Two runs on clocks of different speed write the same checkpoints."""
    contents = []
    for factor in (1, 1000):
        clock = iter(range(10**9))
        monkeypatch.setattr(loop.time, "monotonic", lambda clock=clock, factor=factor: next(clock) * factor)
        run = tmp_path / f"run{factor}"
        assert cli.main(dpo(folder, run, *SHORT)) == 0
        contents.append([path.read_bytes() for path in sorted(run.glob("step-*/*"))])
    assert contents[0] == contents[1]


def interrupting(function, call):
    """The function, but Ctrl-C comes right after its call of that number, counted from 1."""
    calls = iter(range(1, 1000))

    def interrupted(*args, **kwargs):
        result = function(*args, **kwargs)
        if next(calls) == call:
            raise KeyboardInterrupt
        return result

    return interrupted


@pytest.mark.parametrize(
    ("place", "name", "call", "last"),
    [
        (training, "dpo_training_step", 1, "step-000000"),
        (training, "dpo_training_step", 6, "step-000004"),
        (os, "fsync", 32, "step-000004"),  # between two files of the checkpoint of step 8
    ],
)
def test_ctrl_c_costs_steps_and_nothing_else(place, name, call, last, folder, whole, tmp_path, monkeypatch, capsys):
    """The steps since the last checkpoint, which is named, are repeated; the resumed run ends in the same bytes."""
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(place, name, interrupting(getattr(place, name), call))
        assert cli.main(dpo(folder, run, *SHORT)) == 130
    assert (run / "latest").read_text() == last and not list(run.glob(".*"))
    assert "resumes" not in capsys.readouterr().out
    assert cli.main(["resume", str(run)]) == 0
    assert f"{run} resumes at step {int(last.strip()[-6:])} of 9\n" in capsys.readouterr().out
    for path in ("model/model.safetensors", "step-000009/state.safetensors", "samples.jsonl"):
        assert (run / path).read_bytes() == (whole / path).read_bytes()
    without_times = [
        [{k: v for k, v in line.items() if k != "tokens_per_second"} for line in lines(each / "metrics.jsonl")]
        for each in (run, whole)
    ]
    assert without_times[0] == without_times[1]


def test_ctrl_c_in_a_notebook(tmp_path):
    """A second call of `run_loop`, with the same objects, resumes from the checkpoint and not from their contents."""
    contents = []
    for name in ("run", "whole"):
        run, (*model_parts, task, settings) = setup(tmp_path / name, range(20, 0, -1), steps=6, evaluate_every=4)
        if name == "run":
            with pytest.raises(KeyboardInterrupt):
                loop.run_loop(run, *model_parts, task._replace(step=interrupting(task.step, 3)), settings)
        loop.run_loop(run, *model_parts, task, settings)
        contents.append((run / "step-000006" / "model.safetensors").read_bytes())
    assert contents[0] == contents[1]


def test_lines_after_the_checkpoint_are_cut_off(tmp_path):
    """A resumed run repeats steps, and a step is in the metrics once; half a line goes too."""
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 2, "eval_loss": 1}\n{"step": 3}\n{"st')
    run_folder.cut(path, 2)
    assert [line["step"] for line in lines(path)] == [1, 2, 2]
    run_folder.cut(tmp_path / "none.jsonl", 2)
    assert not (tmp_path / "none.jsonl").exists()


def test_resuming_a_finished_run_changes_nothing(whole, capsys):
    """No file differs after `minidpo resume` of a run that has its result, and that nothing is left is said."""
    before = {path: path.read_bytes() for path in whole.rglob("*") if path.is_file()}
    assert cli.main(["resume", str(whole)]) == 0
    assert f"{whole} is finished: there is nothing left to train\n" in capsys.readouterr().out
    assert {path: path.read_bytes() for path in whole.rglob("*") if path.is_file()} == before


def test_a_run_resumes_with_the_inputs_that_it_began_with(folder, tmp_path, capsys):
    """Other data or another model is refused: no model is trained half on one file and half on another."""
    copied = shutil.copytree(folder, tmp_path / "copy")
    run = tmp_path / "run"
    assert cli.main(dpo(copied, run, *SHORT)) == 0
    assert cli.main(dpo(copied, run, *SHORT)) == 2
    assert f"{run} exists already: choose another folder, or resume this one: minidpo resume {run}" in (
        capsys.readouterr().err
    )
    with (copied / "pairs.jsonl").open("a") as file:
        file.write("\n")
    assert cli.main(["resume", str(run)]) == 2
    assert "cannot resume, the input of --data has changed" in capsys.readouterr().err
    shutil.copy(folder / "pairs.jsonl", copied / "pairs.jsonl")
    shutil.rmtree(copied / "init")
    checkpoint.save(copied / "init", model.init(CONFIG, np.random.default_rng(9)), CONFIG, TOKENIZER)
    assert cli.main(["resume", str(run)]) == 2
    assert "cannot resume, the input of --init has changed" in capsys.readouterr().err


def test_another_number_of_threads_is_said(folder, tmp_path, capsys, monkeypatch):
    """A changed environment is one line: the last bits of the result may differ."""
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
def test_a_folder_that_is_not_a_run_cannot_resume(content, tmp_path, capsys):
    """A stranger's folder gets one sentence: it neither decides which command runs, nor ends in a traceback."""
    if content is not None:
        (tmp_path / "run.json").write_text(content)
    assert cli.main(["resume", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "\x1b" not in error


def setup(tmp_path, losses, patience=None, steps=10, evaluate_every=1):
    """A run of a tiny model whose held-out losses are scripted, and the other arguments of `run_loop`."""
    params = model.init(CONFIG, np.random.default_rng(0))
    optimizer = optim.AdamW(params, 1e-3)
    script = iter(losses)

    def step(indices):
        return training.sft_training_step(params, CONFIG, optimizer, [([0], [i % 3 + 1, 0]) for i in indices])

    task = loop.Task(
        6, step, lambda step: {"loss": next(script)}, lambda: [], lambda indices: f"lines {sorted(indices)}"
    )
    settings = loop.Settings(0, steps, 2, 1e-3, 0, evaluate_every, patience)
    run_folder.create(tmp_path / "run", {"arguments": ["sft"]}, {})
    return tmp_path / "run", (params, CONFIG, TOKENIZER, optimizer, task, settings)


def test_early_stopping_keeps_the_best(tmp_path):
    """The run stops after `patience` evaluations without a lower loss, and the result is the lowest."""
    run, arguments = setup(tmp_path, [5.0, 3.0, 4.0, 2.0, 2.5, 2.0, 2.6, 9.0], patience=3)
    loop.run_loop(run, *arguments)
    evaluations = [line["step"] for line in lines(run / "metrics.jsonl") if "eval_loss" in line]
    assert evaluations == [0, 1, 2, 3, 4, 5, 6]  # the best at 3, then 2.5, an equal 2.0, 2.6
    assert {path.name for path in run.glob("step-*")} == {"step-000003", "step-000006"}
    best, result = (run / name / "model.safetensors" for name in ("step-000003", "model"))
    assert best.read_bytes() == result.read_bytes()


def test_a_run_that_breaks_names_its_step_its_rows_and_the_last_good_checkpoint(tmp_path):
    """The message leads to the batch, and the last checkpoint is finite."""
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
    """The last good checkpoint is good: a parameter that is not finite ends the run before the save."""
    run, arguments = setup(tmp_path, [1.0] * 11)
    arguments[0]["h.0.mlp.c_fc.bias"].data[3] = np.inf
    with pytest.raises(FloatingPointError, match="not finite at step 0; there is no checkpoint yet; look"):
        loop.run_loop(run, *arguments)
    assert not list(run.glob("step-*")) and not list(run.glob(".*"))


def test_one_process_at_a_time(tmp_path):
    """A second process is refused before it touches a file."""
    run, arguments = setup(tmp_path, [1.0] * 11)
    half_written = run / (".step-000001." + "0" * 32)
    half_written.mkdir()
    (run / "model").mkdir()
    (run / "metrics.jsonl").write_text('{"step": 5}\n{"st')
    with run_folder.alone(run), pytest.raises(checkpoint.CheckpointError, match="another process works on this run"):
        loop.run_loop(run, *arguments)
    assert half_written.exists() and (run / "model").exists()
    assert (run / "metrics.jsonl").read_text() == '{"step": 5}\n{"st'
    loop.run_loop(run, *arguments)


def test_the_report_is_written_before_others_enter(folder, whole, tmp_path, monkeypatch):
    """The lock is held until the report is there, at the end of a run and when a finished one is resumed."""
    run, write, locked = tmp_path / "run", report.write, []

    def watched(path):
        with pytest.raises(checkpoint.CheckpointError, match="another process works on this run"):
            with run_folder.alone(path):
                pass
        locked.append(path)
        return write(path)

    monkeypatch.setattr(report, "write", watched)
    assert cli.main(dpo(folder, run, *SHORT)) == 0
    assert cli.main(["resume", str(run)]) == 0
    assert locked == [run, run]


@forks
def test_one_of_two_processes_begins_a_run(tmp_path):
    """However many begin one run, one makes its folder, and the others read that it exists already."""
    for number in range(10):
        run, ready = tmp_path / str(number), tmp_path / f"go{number}"
        children = []
        for _ in range(6):
            children.append(os.fork())
            if children[-1] == 0:
                status = 9
                try:
                    while not ready.exists():
                        pass
                    run_folder.create(run, {"arguments": ["sft"]}, {})
                    status = 0
                except checkpoint.CheckpointError as error:
                    status = 1 if "exists already" in str(error) else 9
                finally:
                    os._exit(status)
        ready.write_text("")
        statuses = sorted(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children)
        assert statuses == [0, 1, 1, 1, 1, 1] and not list(tmp_path.glob(".*"))


def test_a_new_run_removes_what_a_killed_one_left_beside_it(tmp_path):
    """Hidden folders that are certainly of this run go; those of other names, contents and kinds stay."""
    ours, empty = tmp_path / f".run.{'0' * 32}", tmp_path / f".run.{'1' * 32}"
    others = [tmp_path / name for name in (f".run.{'2' * 32}", f".run2.{'3' * 32}", ".run.notes", f".run.b.{'4' * 32}")]
    for path in (ours, empty, *others):
        path.mkdir()
    (ours / "run.json").write_text("{")
    (others[0] / "diary.txt").write_text("")
    (tmp_path / f".run.{'5' * 32}").symlink_to(others[1])
    (tmp_path / f".run.{'6' * 32}").write_text("")
    run_folder.create(tmp_path / "run", {"arguments": ["sft"]}, {})
    assert not ours.exists() and not empty.exists() and len(list(tmp_path.glob(".*"))) == len(others) + 2


@pytest.mark.parametrize("word", ["--help", "-h", "--version", "--nonsense=1", "--"])
def test_a_run_s_arguments_are_options_of_its_command(word, tmp_path, capsys):
    """A run.json that asks for help, or for an unknown option, is refused; it prints no help and does not exit 0."""
    (tmp_path / "run.json").write_text(json.dumps({"arguments": ["sft", "--data=x", word], "environment": {}}))
    assert cli.main(["resume", str(tmp_path)]) == 2
    printed = capsys.readouterr()
    assert printed.err == f"minidpo resume: {tmp_path / 'run.json'}: {word!a} is not an option of sft\n"
    assert not printed.out


def test_a_warm_up_longer_than_the_run_is_said(folder, tmp_path, capsys):
    """The learning rate that was asked for is never reached: a line names the highest, which is in the metrics."""
    for steps, warmup, said in ((4, 8, True), (4, 4, False), (0, 8, False)):
        run = tmp_path / f"{steps}{warmup}"
        words = (f"--steps={steps}", f"--warmup-steps={warmup}", "--batch-size=3", "--learning-rate=0.01")
        assert cli.main(dpo(folder, run, *words)) == 0
        error = capsys.readouterr().err
        assert ("is more than --steps=4: the learning rate ends at 0.005 and never reaches 0.01" in error) is said
        assert ("warm" in error) is said
        rates = [line["learning_rate"] for line in lines(run / "metrics.jsonl") if "learning_rate" in line]
        assert max(rates, default=0) == pytest.approx(0.005 if said else 0.01 if steps else 0)


def test_pretraining_is_evaluated_often_enough_for_its_data(tmp_path, capsys):
    """On a few lines the default evaluates every 10 steps, so that the result is a trained model."""
    texts = [x + y + z for x in "abcde" for y in "abcde" for z in "abcde"]
    (tmp_path / "texts").write_text("".join(text + "\n" for text in texts))
    words = ["pretrain", f"--data={tmp_path / 'texts'}", "--steps=40", "--n-embd=8", "--n-layer=1", "--n-head=2"]
    for batch_size, evaluations in ((128, [0, 10, 20, 30, 40]), (8, [0, 14, 28, 40])):
        run = tmp_path / str(batch_size)
        assert cli.main([*words, f"--batch-size={batch_size}", f"--out={run}", "--learning-rate=1e-2"]) == 0
        metrics = lines(run / "metrics.jsonl")
        assert [line["step"] for line in metrics if "eval_loss" in line] == evaluations
        assert "THE RESULT IS" not in capsys.readouterr().err
    assert cli.main([*words, f"--out={tmp_path / 'worse'}", "--learning-rate=30", "--warmup-steps=0"]) == 0
    assert "warning: THE RESULT IS THE MODEL THAT THE RUN BEGAN WITH" in capsys.readouterr().err
    assert "**Warning:** THE RESULT IS THE MODEL" in (tmp_path / "worse" / "report.md").read_text()


def test_files_of_others_stay(tmp_path):
    """Only temporary names and old checkpoints are removed, not the notes that somebody keeps in the folder."""
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


def test_divergence_has_its_own_exit_status(folder, tmp_path, capsys):
    """3 for a learning rate that is too high, where a wrong file gives 2."""
    with np.errstate(all="ignore"):
        assert cli.main(dpo(folder, tmp_path / "run", *SHORT[:-1], "--learning-rate=1e30", "--warmup-steps=0")) == 3
    error = capsys.readouterr().err
    assert re.search(
        r"at step \d+, after a batch of lines \d.*the last good checkpoint is .*step-00000\d; lower", error
    )
    assert sum(line.startswith("minidpo ") for line in error.splitlines()) == 1


def test_a_terminal_sees_a_live_line_and_a_log_does_not(capsys, monkeypatch):
    """A terminal shows every step on one line; a log gets a line per evaluation, without carriage returns."""
    for live in (False, True):
        monkeypatch.setattr(sys.stdout, "isatty", lambda live=live: live)
        progress = loop.Progress("run", 100)
        progress.after_step(7, {"loss": 1.5, "tokens": 30})
        progress.after_step(8, {"loss": 1.25, "tokens": 30})
        printed = capsys.readouterr().out
        assert ("\r" in printed and "loss 1.5000" in printed) if live else printed == ""
        progress.after_evaluation(10, {"eval_loss": 2.0, "eval_rewards/accuracies": 0.5, "eval_rewards/margins": -0.1})
        printed = capsys.readouterr().out
        assert "10/100   held-out loss 2.0000   accuracy 0.50   reward margin -0.100" in printed and printed.endswith(
            "left\n"
        )


@pytest.mark.parametrize("part", ["", "eval_"])
def test_ties_are_not_shown_as_pairs_that_are_lost(part):
    """Where policy = reference all pairs tie: the line says so, and has neither an accuracy of 0 nor a minus zero."""
    metrics = {f"{part}loss": 0.7, f"{part}rewards/accuracies": 0.0, f"{part}rewards/margins": -1e-9}
    progress = loop.Progress("run", 9)
    text = progress.text(0, {**metrics, f"{part}rewards/ties": 1.0})
    assert text.endswith("   all pairs tie   reward margin +0.000") and "accuracy" not in text
    assert "accuracy 0.00" in progress.text(0, {**metrics, f"{part}rewards/ties": 0.5})


def test_the_optimizer_comes_back(tmp_path):
    """m, v and t are restored, and replace whatever the optimizer held."""
    params = model.init(CONFIG, np.random.default_rng(0))
    optimizer = optim.AdamW(params, 1e-2)
    for _ in range(2):
        training.sft_training_step(params, CONFIG, optimizer, [([0], [1, 0])])
    state = run_folder.State(step=2, measured_at=1, best=1.5, best_step=1, worse=0)
    run = tmp_path / "run"
    run_folder.create(run, {"arguments": ["sft"]}, {})
    run_folder.save(run, params, CONFIG, TOKENIZER, optimizer, state)
    others = model.init(CONFIG, np.random.default_rng(1))
    again = optim.AdamW(others, 1e-2)
    again.state["wte.weight"] = {"u": np.ones(1)}
    assert run_folder.restore(run / "step-000002", others, CONFIG, TOKENIZER, again) == state
    assert again.state.keys() == optimizer.state.keys() and again.state["wte.weight"]["t"] == 2
    for name, moments in optimizer.state.items():
        assert again.state[name].keys() == moments.keys() == {"t", "m", "v"}
        assert all(np.array_equal(again.state[name][key], moments[key]) for key in moments)
        assert (others[name].data == params[name].data).all()


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """A run that stopped after step 5, with its last checkpoint at step 4."""
    run, (*model_parts, task, settings) = stoppable(tmp_path_factory.mktemp("stopped"))
    with pytest.raises(KeyboardInterrupt):
        loop.run_loop(run, *model_parts, task._replace(step=interrupting(task.step, 5)), settings)
    return run


def stoppable(tmp_path):
    return setup(tmp_path, range(20, 0, -1), steps=6, evaluate_every=4)


def rewritten(path, change):
    """Write a safetensors file anew, with correct checksums, after a change of its arrays and metadata."""
    arrays, metadata, _ = safetensors.read(path)
    change(arrays, metadata)
    path.write_bytes(safetensors.to_bytes(arrays, metadata))


def in_state(**changes):
    def change(arrays, metadata):
        metadata["state"] = json.dumps({**json.loads(metadata["state"]), **changes}).replace('"1e400"', "1e400")

    return lambda run: rewritten(run / "step-000004" / "state.safetensors", change)


def in_arrays(name, new):
    def change(arrays, metadata):
        old = arrays.pop(name)
        if new:
            arrays[name] = new(old)

    return lambda run: rewritten(run / "step-000004" / "state.safetensors", change)


def in_run_json(run):
    text = (run / "run.json").read_text()
    (run / "run.json").write_text(text.replace('"sft"', '"sft", "--seed=1"'))


def stripped_run_json(run):
    content = json.loads((run / "run.json").read_text())
    del content["sha256"]
    (run / "run.json").write_text(json.dumps({**content, "arguments": ["sft", "--seed=1"]}))


def stripped(name):
    def strip(run):
        path = run / "step-000004" / name
        path.write_bytes(path.read_bytes().replace(b'sha256"', b'sha999"'))

    return strip


def lost_counts(run):
    def change(arrays, metadata):
        state = json.loads(metadata["state"])
        del state["optimizer"]["wte.weight/t"]
        metadata["state"] = json.dumps(state)

    rewritten(run / "step-000004" / "state.safetensors", change)


def other_model(run):
    rewritten(
        run / "step-000004" / "model.safetensors",
        lambda arrays, _: arrays.update({"wpe.weight": arrays["wpe.weight"] + 1}),
    )


def other_heads(run):
    """Four heads instead of two, with every checksum of version 0.1 correct."""
    path = run / "step-000004" / "config.json"
    path.write_text(path.read_text().replace('"n_head": 2', '"n_head": 4'))
    sums = {"config.json": hashlib.sha256(path.read_bytes()).hexdigest()}
    rewritten(path.with_name("model.safetensors"), lambda _, metadata: metadata.update(sums))
    rewritten(path.with_name("state.safetensors"), lambda _, metadata: metadata.pop("model_sha256"))


def appended(name, line):
    return lambda run: (run / name).write_text(line + "\n" + (run / name).read_text())


def fifo(name):
    def replace(run):
        (run / name).unlink()
        os.mkfifo(run / name)

    return replace


WTE = "wte.weight"


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        *((in_state(step=step), "a number in|a step in|is not JSON|that is infinite") for step in
          ("4", {}, None, 10**400, 5, -1, 4.0, True, "1e400", float("inf"))),
        *((in_state(best=best), "a number in|that is infinite") for best in ("1", None, [], float("nan"), "1e400")),
        (in_state(best_step=7), "a step in"),
        (in_state(worse=-1), "a number in"),
        (in_state(optimizer={}), "what the optimizer remembers"),
        (lost_counts, "wte.weight or what the optimizer remembers"),
        (in_state(run="0" * 64), "run.json has been changed"),
        (in_arrays("wte.weight/m", None), "wte.weight or what the optimizer remembers"),
        (in_arrays("wte.weight/v", np.ravel), "wte.weight or what the optimizer remembers"),
        (in_arrays("wte.weight/v", lambda x: x.astype("f8")), "wte.weight or what the optimizer remembers"),
        (in_run_json, "run.json: does not match its SHA-256"),
        (stripped_run_json, "run.json has been changed"),
        (stripped("state.safetensors"), "has lost its checksums"),
        (other_model, "is the training state of another model"),
        (other_heads, "is not a model of this run"),
        (appended("samples.jsonl", '{"step": 0, "pronpt": "a", "response": "b"}'), "line 1: 'prompt' is missing"),
        (appended("samples.jsonl", '{"step": 0, "prompt": 1, "response": "b"}'), "line 1: 'prompt' is missing or of"),
        (appended("metrics.jsonl", '{"step": 0, "eval_loss": ' + "[" * 980 + "]" * 980 + "}"), "line 1: is "),
        (appended("metrics.jsonl", '{"step": 0, "eval_loss": "x"}'), "'eval_loss' is missing or of another"),
        *((fifo(name), "is not a regular file") for name in (
            "latest", "run.json", "metrics.jsonl", "samples.jsonl", "step-000004/state.safetensors",
            "step-000004/model.safetensors", "step-000004/config.json", "step-000004/tokenizer.json")),
    ],
)  # fmt: skip
def test_a_damaged_run_is_refused_before_it_moves(damage, sentence, stopped, tmp_path):
    """Each file is checked in full against the run: a fault is a sentence, and neither waits nor trains."""
    run, arguments = stoppable(tmp_path)
    shutil.rmtree(run)
    shutil.copytree(stopped, run)
    damage(run)
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    with pytest.raises(checkpoint.CheckpointError, match=sentence) as caught:
        run_folder.run_description(run)
        loop.run_loop(run, *arguments)
    assert len(str(caught.value)) < 2500 and not arguments[3].state
    assert {path for path in run.rglob("*")} == before.keys() and not (run / "model").exists()


@pytest.mark.parametrize("content", [None, "", "step-000002", "model"])
def test_a_run_that_lost_its_pointer_is_not_begun_again(content, stopped, tmp_path):
    """Without a usable `latest` nothing is cut or removed; the message names the newest checkpoint, which works."""
    run, arguments = stoppable(tmp_path)
    shutil.rmtree(run)
    shutil.copytree(stopped, run)
    (run / "latest").unlink()
    if content is not None:
        (run / "latest").write_text(content)
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    with pytest.raises(
        checkpoint.CheckpointError, match="the newest is step-000004: to resume from it, write its name"
    ):
        loop.run_loop(run, *arguments)
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before
    (run / "latest").write_text("step-000004")
    loop.run_loop(run, *arguments)
    assert (run / "latest").read_text() == "model"


@pytest.mark.parametrize("name", ["metrics.jsonl", "samples.jsonl", "step-000004", "latest"])
def test_a_full_disk_names_the_file_and_how_to_resume(name, folder, whole, tmp_path, capsys, monkeypatch):
    """A write that fails for want of space names its file, the last checkpoint and the command; that one works."""
    run, sync = tmp_path / "run", os.fsync
    full = lambda descriptor: re.search(rf"/\.?{name}", os.readlink(f"/proc/self/fd/{descriptor}"))  # noqa: E731

    def failing(descriptor):
        if (run / "step-000000").exists() and (run / "latest").exists() and full(descriptor):
            raise OSError(errno.ENOSPC, "No space left on device")
        sync(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", failing)
        assert cli.main(dpo(folder, run, *SHORT)) == 2
    error = capsys.readouterr().err
    assert (
        f"{run / name}: No space left on device; the last checkpoint is {run / 'step-000000'}; resume with: " in error
    )
    assert cli.main(["resume", str(run)]) == 0
    assert (run / "model/model.safetensors").read_bytes() == (whole / "model/model.safetensors").read_bytes()


@forks
def test_a_killed_worker_leaves_a_way_on(folder, tmp_path, capsys, monkeypatch):
    """The message of a run that has lost a worker ends with the command that resumes it."""

    def kill(self, params, questions):
        os.kill(self.others[0].pid, signal.SIGKILL)
        os.waitid(os.P_PID, self.others[0].pid, os.WEXITED | os.WNOWAIT)

    ask, calls = workers.Workers.ask, iter(range(99))

    def asked(self, params, questions):
        if next(calls) == 5:
            kill(self, params, questions)
        return ask(self, params, questions)

    monkeypatch.setattr(cli.train, "worker_count", lambda params: 2)
    monkeypatch.setattr(workers.Workers, "ask", asked)
    assert cli.main(dpo(folder, tmp_path / "run", *SHORT)) == 2
    assert "it has exited; the last checkpoint is" in (error := capsys.readouterr().err)
    assert error.endswith(f"step-000004; resume with: minidpo resume {tmp_path / 'run'}\n")


def test_a_missing_file_is_not_a_reason_to_resume(folder, whole, capsys):
    """Only a fault of the run itself is followed by how to resume; a wrong path is not."""
    assert cli.main(["dpo", "--data=missing", f"--init={folder / 'init'}", f"--out={whole}"]) == 2
    assert "resume" not in capsys.readouterr().err


def test_a_run_of_version_0_1_resumes_without_the_new_checksums(stopped, tmp_path):
    """What version 0.1 wrote, without hashes of run.json and of the model, resumes to the same bytes."""
    contents = []
    for version in ("0.1", "now"):
        run, arguments = stoppable(tmp_path / version)
        shutil.rmtree(run)
        shutil.copytree(stopped, run)
        if version == "0.1":
            content = json.loads((run / "run.json").read_text())
            del content["sha256"]
            (run / "run.json").write_text(json.dumps(content))

            def change(arrays, metadata):
                state = json.loads(metadata["state"])
                del state["run"], metadata["model_sha256"]
                metadata["state"] = json.dumps(state)

            rewritten(run / "step-000004" / "state.safetensors", change)
        loop.run_loop(run, *arguments)
        contents.append((run / "step-000006" / "model.safetensors").read_bytes())
    assert contents[0] == contents[1]


def test_a_checkpoint_from_elsewhere_is_not_resumed(tmp_path):
    """A model with the state of another program, or none, is refused in one sentence."""
    params = model.init(CONFIG, np.random.default_rng(0))
    run_folder.create(tmp_path / "run", {"arguments": ["sft"]}, {})
    for number, (arrays, state) in enumerate([
        ({}, {}),
        ({}, {**vars(run_folder.State()), "best": 1.0, "optimizer": [1]}),
        ({"x/m": np.zeros(1)}, {**vars(run_folder.State()), "best": 1.0, "optimizer": {}}),
        ({}, {"step": 1, "optimizer": {}, "more": 2}),
        ({}, {**vars(run_folder.State()), "best": 1.0, "step": "x", "optimizer": {}}),
    ]):  # fmt: skip
        checkpoint.save(tmp_path / "run" / str(number), params, CONFIG, TOKENIZER, arrays, state)
        with pytest.raises(checkpoint.CheckpointError, match="its training state does not belong to this run"):
            run_folder.restore(tmp_path / "run" / str(number), params, CONFIG, TOKENIZER, optim.AdamW(params))
