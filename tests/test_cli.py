"""The command line, as a stranger meets it."""

import contextlib
import io
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest

from minidpo import checkpoint, cli, generation, ops, training
from minidpo.cli import train
from minidpo.ops import OPS


def test_check_prints_one_row_per_op(capsys):
    """Otherwise an op is left out of the table that says all of them were checked."""
    assert cli.main(["check", "--cases", "5"]) == 0
    printed = capsys.readouterr()
    rows = re.findall(r"^(\w+) +(\d\.\de[-+]\d\d) +(\d\.\de[-+]\d\d) +5$", printed.out, re.MULTILINE)
    assert [name for name, _, _ in rows] == list(OPS)
    assert all(float(central) <= 1e-6 and float(complex_) <= 1e-12 for _, central, complex_ in rows)
    assert f"{len(OPS)} ops" in printed.out and printed.err == ""


def test_check_fails_where_a_vjp_is_wrong(capsys, monkeypatch):
    """Otherwise a broken derivative ships with exit status 0."""

    def tanh(x):
        y, vjp = ops.tanh.raw(x)
        return y, lambda g: (-vjp(g)[0],)

    monkeypatch.setitem(OPS, "tanh", tanh)
    monkeypatch.setitem(OPS, "exp", lambda x: (ops.exp.raw(x)[0], lambda g: g @ np.ones(99)))
    assert cli.main(["check", "--cases", "3"]) == 1
    printed = capsys.readouterr()
    assert re.search(r"^tanh +FAILED +FAILED +3$", printed.out, re.MULTILINE)
    assert re.search(r"^exp +FAILED +FAILED +3$", printed.out, re.MULTILINE)
    assert "vjp raised" in printed.err and printed.out.count("FAILED") == 4 and "all within" not in printed.out
    assert "tanh: argument 0 at index" in printed.err and "vjp gives" in printed.err


def test_check_repeats_with_its_seed(capsys):
    """Otherwise a failure that was seen once cannot be seen again."""
    printed = []
    for seed in ("1", "1", "2"):
        cli.main(["check", "--cases", "2", "--seed", seed])
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1] != printed[2]


def test_oracles_prints_both_columns(capsys):
    """Otherwise the mistakes are listed, and what finds them is not."""
    assert cli.main(["oracles"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 13 and lines[1].split()[:2] == ["correct", "1.0000000000"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A model that a few steps of the real command made."""
    folder = tmp_path_factory.mktemp("cli")
    (folder / "names.txt").write_text("\n".join(["emma", "mia", "ava", "amelia", "emily", "ella", "", "mia"] * 3))
    sizes = ["--n-embd", "8", "--n-layer", "1", "--n-head", "2", "--batch-size", "4", "--steps", "3"]
    arguments = ["pretrain", "--data", str(folder / "names.txt"), "--out", str(folder / "model"), *sizes]
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        assert cli.main(arguments) == 0
    return folder, arguments, printed.getvalue()


def test_pretrain_says_what_it_does(trained):
    """Otherwise a minute passes in silence."""
    folder, _, printed = trained
    assert re.search(r"^\d+ texts to train on, 6 held out, 9 ids, \d+ parameters$", printed, re.MULTILINE)
    assert re.search(r"^model +3/3 +held-out loss \d\.\d{4} +[\d,]+ tokens/s +0:00 left$", printed, re.MULTILINE)
    assert checkpoint.load(folder / "model").verified


def test_sample_goes_on_from_the_prompt(trained, capsys):
    """Otherwise the one thing that a language model does cannot be seen."""
    command = ["sample", "--checkpoint", str(trained[0] / "model"), "--prompt", "em"]
    assert cli.main(command) == 0
    texts = capsys.readouterr().out.splitlines()
    assert len(texts) == 5 and all(text.startswith("em") for text in texts)
    assert cli.main(command) == 0 and capsys.readouterr().out.splitlines() == texts
    assert cli.main([*command, "--samples", "2", "--temperature", "0"]) == 0
    greedy = capsys.readouterr().out.splitlines()
    assert len(greedy) == 2 and greedy[0] == greedy[1]
    for options, same in (
        (["--top-k", "1", "--samples", "2"], True),
        (["--top-p", "1e-9", "--samples", "2"], True),
        (["--seed", "9", "--samples", "2"], False),
    ):
        assert cli.main([*command, *options]) == 0
        assert (capsys.readouterr().out.splitlines() == greedy) is same
    assert cli.main([*command, "--max-new-tokens", "1"]) == 0
    assert all(len(text) <= 4 for text in capsys.readouterr().out.splitlines())


def test_unverified_weights_are_said_to_be(trained, capsys, tmp_path):
    """Otherwise weights from a stranger pass for checked ones."""
    copied = shutil.copytree(trained[0] / "model" / "model", tmp_path / "copy")
    weights = copied / "model.safetensors"
    weights.write_bytes(weights.read_bytes().replace(b'sha256"', b'sha999"'))
    assert cli.main(["sample", "--checkpoint", str(copied)]) == 0
    assert "no checksum" in capsys.readouterr().err


def test_sample_begins_a_text_as_training_did(trained, capsys, monkeypatch):
    """Otherwise the model is asked to go on from something that it never saw."""
    asked = []
    monkeypatch.setattr(train, "generate", lambda *args: asked.append(args) or generation.Generation([], []))
    assert cli.main(["sample", "--checkpoint", str(trained[0] / "model"), "--prompt", "a", "--samples", "2"]) == 0
    assert asked[0][2] == [[0, 2], [0, 2]]
    command = ["sample", "--checkpoint", str(trained[0] / "model"), "--prompt", "a", "--samples", "1", "--newline"]
    assert cli.main(command) == 0 and asked[1][2] == [[0, 2, 1]]


def test_too_little_memory_is_one_sentence(trained, capsys, monkeypatch, tmp_path):
    """Otherwise a model that is too large ends in a traceback."""

    def no_memory(*args, **options):
        raise MemoryError("Unable to allocate 191. GiB")

    monkeypatch.setattr(training, "sft_training_step", no_memory)
    assert cli.main([*trained[1][:4], str(tmp_path / "m")]) == 2
    assert "not enough memory (Unable to allocate 191. GiB)" in capsys.readouterr().err


def test_what_is_wrong_is_one_sentence(trained, capsys, tmp_path):
    """Otherwise a stranger reads a traceback."""
    folder, arguments, _ = trained
    (tmp_path / "one.txt").write_text("same\nsame\n")
    (tmp_path / "latin.txt").write_bytes(b"\xff\xfe\n")
    for command, sentence in (
        (arguments, "model exists already"),
        (["sample", "--checkpoint", str(tmp_path / "none")], "config.json: cannot be read"),
        (["sample", "--checkpoint", str(folder / "model"), "--prompt", "a\u00e9"], "character '\\xe9' at position 1"),
        (["sample", "--checkpoint", str(folder / "model"), "--top-p", "2"], "top_p = 2.0 is out of range"),
        (["pretrain", "--data", str(tmp_path / "none.txt"), "--out", str(tmp_path / "new")], "No such file"),
        (
            ["pretrain", "--data", str(tmp_path / "one.txt"), "--out", str(tmp_path / "new")],
            "two different prompts or lines",
        ),
        (["pretrain", "--data", str(tmp_path / "latin.txt"), "--out", str(tmp_path / "new")], "byte 0 is not UTF-8"),
        (
            ["pretrain", "--data", str(folder / "names.txt"), "--out", str(tmp_path / "new"), "--n-head", "3"],
            "multiple",
        ),
    ):
        assert cli.main(command) == 2
        printed = capsys.readouterr()
        assert sentence in printed.err and printed.err.count("\n") == 1, printed.err
        assert printed.err.startswith(f"minidpo {command[0]}: ") and not (tmp_path / "new").exists()


@pytest.mark.parametrize("arguments", [["check", "--cases", "0"], ["check", "--seed", "-1"], ["chekc"], []])
def test_wrong_arguments_get_a_sentence(arguments, capsys):
    """Otherwise a typing error ends in a traceback."""
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    assert caught.value.code == 2 and "minidpo" in capsys.readouterr().err


def test_help_names_the_defaults(capsys):
    """Otherwise a stranger does not know what the bare command does."""
    with pytest.raises(SystemExit):
        cli.main(["check", "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert "per op (default: 100)" in shown and "(default: 0)" in shown
    with pytest.raises(SystemExit):
        cli.main(["dpo", "--help"])
    assert "None" not in capsys.readouterr().out


def test_python_m_minidpo_runs():
    """Otherwise the README's own command does not start."""
    finished = subprocess.run([sys.executable, "-m", "minidpo", "check", "--help"], capture_output=True, text=True)
    assert finished.returncode == 0 and "exits with 1" in " ".join(finished.stdout.split())
