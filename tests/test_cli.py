"""The command line, as a stranger meets it."""

import re
import subprocess
import sys

import numpy as np
import pytest

from minidpo import cli, ops
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
    assert "per op (default 100)" in shown and "(default 0)" in shown


def test_python_m_minidpo_runs():
    """Otherwise the README's own command does not start."""
    finished = subprocess.run([sys.executable, "-m", "minidpo", "check", "--help"], capture_output=True, text=True)
    assert finished.returncode == 0 and "exits with 1" in " ".join(finished.stdout.split())
