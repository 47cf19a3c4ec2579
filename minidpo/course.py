"""The tutorials of a checkout: what each asks, and how to run one."""

import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

FOLDER = Path(__file__).parents[1] / "tutorials"


class Lesson(NamedTuple):
    """A tutorial."""

    number: int
    title: str
    question: str
    path: Path


def lessons(folder: Path = FOLDER) -> list[Lesson]:
    """All tutorials, in order.

    Raises
    ------
    FileNotFoundError
        If there are none: an installed package comes without them.
    """
    found = []
    for path in sorted(folder.glob("[0-9][0-9]_*.py")):
        text = path.read_text(encoding="utf-8")
        title = re.search(r"^# # (\d+)\. (.+)$", text, re.MULTILINE)
        question = re.search(r"^# \*\*Question\.\*\* (.+?)$\n# *$", text, re.MULTILINE | re.DOTALL)
        if title and question:
            asked = " ".join(question[1].replace("\n# ", " ").split())
            found.append(Lesson(int(title[1]), title[2], asked, path))
    if not found:
        raise FileNotFoundError(f"there are no tutorials in {folder}: they come with the source, not with the package")
    return found


def run(number: int) -> int:
    """Run a tutorial by its number, in a process of its own; its exit status.

    Raises
    ------
    ValueError
        If there is no such number.
    """
    numbered = {lesson.number: lesson for lesson in lessons()}
    if number not in numbered:
        raise ValueError(f"there is no tutorial {number}, they go from {min(numbered)} to {max(numbered)}")
    return subprocess.run([sys.executable, str(numbered[number].path)]).returncode
