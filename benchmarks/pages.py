"""Render the course: each script as a page with its output and its picture, to be read without running anything.

python -m benchmarks.pages [SCRIPT ...]

Runs the scripts as notebooks, away from the repository, and writes tutorials/pages/ and tutorials/pictures/. Needs the
`dev` and `plot` extras. A page carries the hash of its script, by which a test finds those that are out of date.
"""

import hashlib
import os
import sys
import tempfile
from pathlib import Path

import jupytext
from nbconvert import MarkdownExporter
from nbconvert.preprocessors import CoalesceStreamsPreprocessor, ExecutePreprocessor
from nbformat.v4 import new_markdown_cell

from minidpo.run.files import write_whole

TUTORIALS = Path(__file__).parents[1] / "tutorials"
SCRIPTS = sorted(TUTORIALS.glob("*.py"))


def printed(cell):
    """What a cell printed."""
    return "".join(output.get("text", "") for output in cell.get("outputs", ()))


def page(script):
    """The page of a script, and its picture, if it draws one."""
    notebook = jupytext.read(script)
    for cell in notebook.cells:
        cell.source = cell.source.strip("\n").replace("](../", "](../../")  # a page lies one folder deeper
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "tutorials"
        folder.mkdir()
        (Path(place) / "benchmarks").symlink_to(TUTORIALS.parent / "benchmarks")  # whose results errata.py reads
        kernel = ExecutePreprocessor(timeout=600, extra_arguments=["--IPKernelApp.log_level=ERROR"])
        kernel.preprocess(notebook, {"metadata": {"path": str(folder)}})
        CoalesceStreamsPreprocessor().preprocess(notebook, {})  # what a cell prints stays in one piece
        drawn = folder / f"{script.stem}.png"
        picture = drawn.read_bytes() if drawn.exists() else None
    for cell in notebook.cells:  # a script would not show a value
        cell["outputs"] = [output for output in cell.get("outputs", ()) if output.output_type == "stream"]
    if picture:  # below the cell that names it
        at = next(i for i, cell in enumerate(notebook.cells) if drawn.name in printed(cell))
        notebook.cells.insert(at + 1, new_markdown_cell(f"![the picture of this script](../pictures/{drawn.name})"))
    text, _ = MarkdownExporter().from_notebook_node(notebook)
    at = SCRIPTS.index(script)
    links = [f"[`{script.name}`](../{script.name})", "[the course](../README.md)"]
    links += [f"before: [{each.stem}]({each.stem}.md)" for each in SCRIPTS[max(0, at - 1) : at]]
    links += [f"next: [{each.stem}]({each.stem}.md)" for each in SCRIPTS[at + 1 : at + 2]]
    digest = hashlib.sha256(script.read_bytes()).hexdigest()
    return f"<!-- {script.name}, sha256 {digest} -->\n\n{' · '.join(links)}\n\n{text.strip()}\n", picture


if __name__ == "__main__":
    os.environ["PYTHONPATH"] = str(TUTORIALS.parent)  # for the scripts
    for script in [path.resolve() for path in map(Path, sys.argv[1:])] or SCRIPTS:
        print(script.name, flush=True)
        text, picture = page(script)
        (TUTORIALS / "pages").mkdir(exist_ok=True)
        write_whole(TUTORIALS / "pages" / f"{script.stem}.md", text.encode())
        if picture:
            write_whole(TUTORIALS / "pictures" / f"{script.stem}.png", picture)
