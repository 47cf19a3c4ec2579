"""The scripts of the course run and have one shape, and the table in their README is true."""

import ast
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import minidpo

FOLDER = Path(__file__).parents[1] / "tutorials"
README = (FOLDER / "README.md").read_text()
SOURCE = Path(minidpo.__file__).parent
SCRIPTS = sorted(FOLDER.glob("*.py"))
NUMBERED = [path for path in SCRIPTS if path.stem[:2].isdecimal()]
scripts = pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
numbered = pytest.mark.parametrize("path", NUMBERED, ids=lambda path: path.stem)


@pytest.mark.slow
@scripts
def test_a_script_runs_and_its_assertions_hold(path, tmp_path):
    """Every script runs, and its assertions hold; it writes its picture, or says that matplotlib is missing."""
    folder, results = tmp_path / "tutorials", Path("benchmarks") / "results"
    folder.mkdir()
    shutil.copy(path, folder)
    shutil.copytree(FOLDER.parent / results, tmp_path / results)  # which errata reads
    run = subprocess.run(
        [sys.executable, "-W", "error", folder / path.name],
        capture_output=True,
        text=True,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(SOURCE.parent)},
        timeout=300,
    )
    assert run.returncode == 0, run.stderr
    pictures = [picture.name for picture in folder.glob("*.png")]
    if ".png" in path.read_text():
        has_plot = importlib.util.find_spec("matplotlib") is not None
        assert pictures == ([f"{path.stem}.png"] if has_plot else []), run.stdout
        assert ("matplotlib" in run.stdout) == (not has_plot), run.stdout
    assert len(run.stdout.splitlines()) <= (80 if path in NUMBERED else 400)


@numbered
def test_a_script_has_the_shape_of_the_others(path):
    """Every lesson has its question, aims, prediction, formula, exercises and solutions, in this order."""
    text = path.read_text()
    parts = ["**Question.**", "**Afterwards you can say**", "**Predict first.**", "**The formula.**", "# ## ",
             "The answer to the prediction", "## What was shown", "## Exercises", "## Solutions"]  # fmt: skip
    places = [text.index(part) for part in parts]
    assert places[:5] == sorted(places[:5]) and places[-3:] == sorted(places[-3:])
    assert text.startswith(f"# %% [markdown]\n# # {path.stem[:2]}. ")
    after = text[text.index("## Exercises") :]
    assert re.search(r"^# 1\. ", after, re.MULTILINE) and re.search(r"^# 2\. ", after, re.MULTILINE)
    assertions = [node for node in ast.walk(ast.parse(after[after.index("\n# %%") :])) if isinstance(node, ast.Assert)]
    assert assertions or "assert_" in after


def test_the_table_in_the_readme_is_true():
    """The README's table has every script, with its question and reading time, and functions that exist."""
    rows = re.findall(r"^\| \[`(\w+\.py)`\]\((\w+\.py)\) \| (.+?) \| (\d+) \| (.+?) \| (.+?) \|$", README, re.M)
    assert [name for name, *_ in rows] == [link for _, link, *_ in rows] == [path.name for path in SCRIPTS]
    for name, _, question, minutes, _, where in rows:
        text = (FOLDER / name).read_text()
        assert int(minutes) == round(len(text.split()) / 100), f"{name}: a hundred words a minute"
        if name != "errata.py":
            match = re.search(r"^# \*\*Question\.\*\* (.+?)$\n# *$", text, re.MULTILINE | re.DOTALL)
            expected = " ".join(match[1].replace("\n# ", " ").split())
            assert question.replace("\\|", "|") == expected  # a bar would end the cell
        places = re.findall(r"`(\w+)\.(\w+)`", where)
        assert places, name
        for module, function in places:
            defined = {
                node.name
                for path in [*SOURCE.rglob(f"{module}.py"), *SOURCE.glob(f"{module}/*.py")]
                for node in ast.walk(ast.parse(path.read_text()))
                if isinstance(node, ast.FunctionDef | ast.ClassDef)
            }
            assert function in defined, f"{name}: {module} has no {function}"
