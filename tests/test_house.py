"""The house rules that a reader relies on, read off the source itself."""

import ast
from pathlib import Path

import pytest

import minidpo

SOURCE = Path(minidpo.__file__).parent
FLOORS = """
    backend tensor ops gradcheck cli.cases optim streams tokenizer plots model scoring losses generation theory.exact
    theory.mutants data.world data.preferences run.safetensors run.files run.checkpoint run.workers training run.folder
    run.loop run.report explain.graphs explain.tokens explain.ways explain explain.displacement explain.tables
    explain.page theory.invariances theory.equalities theory.assumptions theory.dynamics theory.frontier cli.train
    cli.look cli.prove cli.demo __init__ cli.parser cli __main__ run theory data
""".split()
PATHS = sorted(SOURCE.rglob("*.py"))


def dotted(path):
    """A file's name below minidpo, with dots."""
    return ".".join(path.relative_to(SOURCE).with_suffix("").parts).removesuffix(".__init__")


files = pytest.mark.parametrize("path", PATHS, ids=dotted)


def imports(path):
    """Modules that a file imports; its own neighbours as `.room.name`."""
    package = list(path.relative_to(SOURCE).parent.parts)
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.module
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) + 1 - node.level] + (node.module.split(".") if node.module else [])
            for alias in node.names:
                whole = ".".join([*base, alias.name])
                yield "." + (whole if whole in map(dotted, PATHS) else ".".join(base))


@files
def test_a_file_imports_only_from_floors_below(path):
    """Otherwise the reading order is a circle."""
    floor = FLOORS.index(dotted(path))
    below = {f".{name}" for name in FLOORS[:floor]}
    assert {name for name in imports(path) if name.startswith(".")} <= below


@files
def test_only_numpy_and_the_standard_library_are_needed(path):
    """Otherwise `pip install minidpo` gives something that does not run."""
    import sys

    outside = {name.split(".")[0] for name in imports(path) if not name.startswith(".")}
    assert outside <= set(sys.stdlib_module_names) | {"numpy"}


@pytest.mark.parametrize("name", ["ops", "model", "scoring", "losses", "tensor", "optim"])
def test_the_array_decides(name):
    """Otherwise a formula is written for NumPy alone."""
    tree = ast.parse((SOURCE / f"{name}.py").read_text())
    assert "numpy" not in imports(SOURCE / f"{name}.py")
    assert not {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)} & {"np", "numpy", "cupy"}


def test_every_op_has_one_silhouette():
    """Docstring, forward, derivation, vjp, return: otherwise a reader must learn to read each op anew."""
    source = (SOURCE / "ops.py").read_text()
    lines = source.splitlines()
    decorated = [
        node
        for node in ast.parse(source).body
        if isinstance(node, ast.FunctionDef)
        and any(isinstance(d, ast.Name) and d.id == "op" for d in node.decorator_list)
    ]
    assert len(decorated) > 20
    for node in decorated:
        assert ast.get_docstring(node), node.name
        *_, vjp, returned = node.body
        assert isinstance(vjp, ast.FunctionDef) and vjp.name == "vjp", node.name
        assert ast.unparse(returned) in ("return (y, vjp)", "return (z, vjp)"), node.name
        derivation = 0
        while lines[vjp.lineno - 2 - derivation].startswith("    # "):
            derivation += 1
        assert 1 <= derivation <= 5, node.name
        assert lines[vjp.lineno - 2 - derivation] == "", node.name
        assert lines[vjp.lineno - 1].startswith("    def vjp(g):  # keeps "), node.name
