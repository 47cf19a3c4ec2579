"""The scripts of the course run and have one shape, and the table in their README is true."""

import ast
import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import minidpo

FOLDER = Path(__file__).parents[1] / "tutorials"
README, WAYS = (FOLDER / "README.md").read_text(), (FOLDER / "WAYS.md").read_text()
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
        timeout=900,  # of a busy machine
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


@scripts
def test_a_page_is_what_its_script_printed(path):
    """Every script has a rendered page, made from this very text, with its picture if it draws one."""
    page = (FOLDER / "pages" / f"{path.stem}.md").read_text()
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert page.startswith(f"<!-- {path.name}, sha256 {digest} -->\n"), f"python -m benchmarks.pages {path}"
    assert (f"(../pictures/{path.stem}.png)" in page) == (".png" in path.read_text())
    for target in re.findall(r"\]\(([\w./-]+\.(?:md|py|png))(?:#[\w-]+)?\)", page):
        assert (FOLDER / "pages" / target).exists(), target


def test_the_table_in_the_readme_is_true():
    """The README's table has every script, with its question and reading time, and functions that exist."""
    script = r"\[`(\w+)\.py`\]\(\1\.py\) \[page\]\(pages/\1\.md\)"
    rows = re.findall(rf"^\| {script} \| (.+?) \| (\d+) \| (.+?) \| (.+?) \|$", README, re.MULTILINE)
    assert [name for name, *_ in rows] == [path.stem for path in SCRIPTS]
    for name, question, minutes, _, where in rows:
        text = (FOLDER / f"{name}.py").read_text()
        assert int(minutes) == round(len(text.split()) / 100), f"{name}: a hundred words a minute"
        if name != "errata":
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


def names_of(path):
    """The names that a script gives a value to."""
    nodes = list(ast.walk(ast.parse(path.read_text())))
    names = {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    names |= {node.arg for node in nodes if isinstance(node, ast.arg)}
    return names | {node.name for node in nodes if isinstance(node, ast.FunctionDef)}


def letters_of(path):
    """The single letters that a script gives a value to, and those that stand alone in its text."""
    names, text = names_of(path), path.read_text()
    prose = re.sub(r'`[^`]*`|"[^"]*"', "", "\n".join(re.findall(r"^# .*", text, re.MULTILINE)))
    alone = re.findall(r"(?<![\w.'-])([A-Za-z])(?![\w'.-])", prose)
    return {name for name in names if len(name) == 1} - {"_"}, set(alone) - {"a", "A"}


def test_a_letter_has_one_meaning():
    """The README's table says what each letter of a script's code means there, and knows those of its formulas."""
    section = README[README.index("## Words and letters") : README.index("## Gallery")]
    rows = re.findall(r"^\| (`\w`(?:, `\w`)*) \| .+ \| ([\w ]+) \|$", section, re.MULTILINE)
    rows = [(letter, where) for letters, where in rows for letter in re.findall(r"`(\w)`", letters)]
    everywhere = {letter for letter, where in rows if where == "all"}
    used = {}
    for path in SCRIPTS:
        code, prose = letters_of(path)
        assert prose <= {"a", *re.findall(r"`(\w)`", section)}, path.name
        used.setdefault(path.stem[:2] if path in NUMBERED else path.stem, set()).update(code - everywhere)
    for script, letters in used.items():
        table = sorted(letter for letter, where in rows if script in where.split())
        assert table == sorted(letters), f"{script}: the table of letters in tutorials/README.md"


def test_a_margin_is_not_called_a_gap():
    """A gap is one model's, or one of true rewards."""
    gaps = {name for path in SCRIPTS for name in names_of(path) if "gap" in name}
    assert gaps == {"policy_gap", "reference_gap", "reward_gaps"}


def test_the_ways_in_are_as_long_as_they_say():
    """An evening or a day takes the minutes of its scripts, and a week has each script once."""
    minutes = dict(re.findall(r"^\| \[`(\w+\.py)`\].*? \| (\d+) \| ", README, re.MULTILINE))
    rows = re.findall(r"^\| ([\w ,]+) \| (\[.*\)) \| (\d+) \|$", WAYS, re.MULTILINE)
    days = {row: re.findall(r"\((\w+\.py)\)", links) for row, links, _ in rows}
    for row, _, total in rows:
        assert sum(int(minutes[name]) for name in days[row]) == int(total), row
    evening, *week = days.values()
    assert len(evening) > 4 and [name for day in week for name in day] == [path.name for path in NUMBERED]


def test_the_ways_in_name_what_exists():
    """Functions exist, every erratum has its place, and no answer is longer than three sentences."""
    modules = "gradcheck|losses|model|ops|preferences|training|verify"
    places = re.findall(rf"\b({modules})\.(\w+)", WAYS)
    assert {module for module, _ in places} == set(modules.split("|"))
    for module, name in places:
        assert name == "py" or hasattr(getattr(minidpo, module), name), f"{module}.{name}"
    chapters = WAYS[WAYS.index("## From an introductory text") : WAYS.index("## From PyTorch")]
    assert {f"E{n}" for n in range(1, 30)} == set(re.findall(r"\bE\d+\b", chapters))
    answers = re.findall(r"^\d+\. \*\*.*?\?\*\* (.*?) \(\[\d\d\]", WAYS.replace("\n   ", " "), re.MULTILINE)
    assert len(answers) == 10 and all(len(re.findall(r"[.?!](?: |$)", answer)) <= 3 for answer in answers), answers


def test_pytorch_and_we_compute_the_same():
    """Each row of the table gives equal numbers on both sides."""
    torch = pytest.importorskip("torch")
    rows = re.findall(r"^\| `(F\..*|logits\..*)` \| `(.*)` \|$", WAYS, re.MULTILINE)
    assert len(rows) == 8
    rng = np.random.default_rng(0)
    shapes = {"logits": (5, 7), "table": (7, 4), "states": (5, 4), "weight": (4, 3), "bias": (3,)}
    arrays = {name: rng.normal(size=shape) for name, shape in {**shapes, **dict.fromkeys("qkv", (2, 5, 4))}.items()}
    arrays["ids"] = rng.integers(7, size=5)
    tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
    for theirs, ours in rows:
        expected = eval(theirs, {"F": torch.nn.functional, **tensors}).numpy()
        np.testing.assert_allclose(eval(ours, {"ops": minidpo.ops, **arrays}).data, expected, rtol=1e-12, atol=1e-14)
