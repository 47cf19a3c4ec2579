"""The README does what it shows: otherwise a reader's first contact is with something false."""

import contextlib
import io
import re
import shlex
from pathlib import Path

from hypothesis import settings

import minidpo
from minidpo.cli import main

README = (Path(__file__).parents[1] / "README.md").read_text()
SOURCE = Path(minidpo.__file__).parent


def test_each_example_prints_what_stands_below_it():
    """Otherwise the numbers on the first screen are decoration."""
    examples = re.findall(r"```python\n(.*?)```\n+```\n(.*?)```", README, re.DOTALL)
    assert len(examples) == README.count("```python") == 2
    for code, output in examples:
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(code, "README.md", "exec"), {})
        assert printed.getvalue() == output


def test_the_three_columns_are_equal():
    """Otherwise the first thing that the project shows is a disagreement."""
    for row in re.findall(r"^dL/d\w+ +(.*)$", README, re.MULTILINE):
        assert len(set(row.split())) == 1 and len(row.split()) == 3


def test_line_counts_are_true():
    """Otherwise the evening is longer than promised."""
    rows = re.findall(r"\[`minidpo/(\w+\.py)`\]\(minidpo/(\w+\.py)\) \| (\d+) \|", README)
    for name, link, lines in rows:
        assert name == link and int(lines) == len((SOURCE / name).read_text().splitlines()), name
    listed = {name for name, _, _ in rows}
    assert listed == {path.name for path in SOURCE.glob("*.py")} - {"__init__.py", "__main__.py"}


def test_the_commands_exist(tmp_path, monkeypatch):
    """Otherwise the first command that a newcomer types fails. (The others are run as they stand by CI.)"""
    commands = [shlex.split(line) for line in README.splitlines() if line.startswith("python -m minidpo ")]
    assert len(commands) == 4
    (tmp_path / "names.txt").write_text("emma\nmia\nava\n")
    monkeypatch.chdir(tmp_path)
    shorter = {"check": ["--cases", "1"], "pretrain": ["--steps", "1"]}
    for _, _, _, *arguments in commands:
        with contextlib.redirect_stdout(io.StringIO()):
            assert main([*arguments, *shorter.get(arguments[0], [])]) == 0


def test_thorough_draws_a_hundred_times_as_many():
    """Otherwise `thorough` is another name for the same."""
    assert "a hundred times\nas many" in README
    thorough, dev = settings.get_profile("thorough"), settings.get_profile("dev")
    assert thorough.max_examples == 100 * dev.max_examples and dev.derandomize and not thorough.derandomize


def test_the_files_it_names_exist():
    """Otherwise a link leads nowhere."""
    here = Path(__file__).parent
    for name in re.findall(r"tests/(\w+\.py)", README):
        assert (here / name).exists(), name
