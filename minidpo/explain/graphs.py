"""The graph of a tensor, as a table or a picture: each op's result, the bytes that it keeps, and its gradient."""

import html
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..backend import array_module, to_host
from ..tensor import Tensor, sweep, tape

SMALL = 4  # a node of at most this many entries shows them all


@dataclass(frozen=True)
class Node:
    """One tensor of a graph."""

    number: int  # in order of creation, from 0
    op: str  # "leaf" if no op made it
    name: str  # if one was given
    parents: list[int]  # numbers of the operands that have a gradient
    shape: tuple[int, ...]
    kept: int  # bytes that live until the sweep has passed: its value, and the arrays that its vjp is the first to hold
    value: list[float] | None  # the entries, if there are at most SMALL
    gradient_norm: float | None  # None if no gradient arrives
    gradient: list[float] | None

    @property
    def title(self) -> str:
        """The first line of its label."""
        return self.name or self.op


@dataclass(frozen=True)
class Graph:
    """Every tensor that a result depends on and that requires a gradient, in order of creation."""

    nodes: list[Node]

    @property
    def kept(self) -> int:
        """Bytes that live until the sweep has passed. Leaves are not counted, because they stay."""
        return sum(node.kept for node in self.nodes)

    def __str__(self) -> str:
        """A table, one node per line."""
        lines = [f"{'node':>5} {'op':<16} {'operands':<28} {'shape':<16} {'kept, bytes':>12} {'|gradient|':>11}"]
        for node in self.nodes:
            operands = ", ".join(map(str, node.parents))
            norm = "none" if node.gradient_norm is None else f"{node.gradient_norm:.3e}"
            lines.append(
                f"{node.number:>5} {node.title:<16} {operands:<28} {node.shape!s:<16} {node.kept:>12,} {norm:>11}"
            )
        return "\n".join([*lines, f"{'':>5} {len(self.nodes)} nodes{'':<48}{self.kept:>21,}"])

    def dot(self) -> str:
        """The graph in the language of Graphviz, for `dot -Tsvg`."""
        lines = ["digraph {", "  rankdir=LR", '  node [shape=box, fontname="monospace"]']
        for node in self.nodes:
            text = "\\n".join(line.replace("\\", "\\\\").replace('"', '\\"') for line in label(node))
            lines.append(f'  n{node.number} [label="{text}"{", style=rounded" if node.op == "leaf" else ""}]')
            lines += [f"  n{parent} -> n{node.number}" for parent in node.parents]
        return "\n".join([*lines, "}\n"])

    def mermaid(self) -> str:
        """The graph as a Mermaid flowchart, which GitHub draws in Markdown."""
        lines = ["flowchart LR"]
        for node in self.nodes:
            text = "<br/>".join(html.escape(line).replace("&#x27;", "'") for line in label(node))
            left, right = ("([", "])") if node.op == "leaf" else ("[", "]")
            lines.append(f'  n{node.number}{left}"{text}"{right}')
            lines += [f"  n{parent} --> n{node.number}" for parent in node.parents]
        return "\n".join([*lines, ""])


def label(node: Node) -> list[str]:
    """The lines of a node's label: values and gradients if it is small, otherwise its shape and gradient norm."""
    if node.value is not None and node.gradient is not None:
        return [node.title, f"data {numbers(node.value)}", f"grad {numbers(node.gradient)}"]
    norm = "no gradient" if node.gradient_norm is None else f"|grad| {node.gradient_norm:.3e}"
    return [node.title, str(node.shape), norm]


def numbers(entries: Sequence[float]) -> str:
    return ", ".join(f"{entry:.4g}" for entry in entries)


def arrays_in(value: Any) -> Iterator[Any]:
    """The arrays that a value holds: itself, its items, or the closure of a function."""
    if isinstance(getattr(value, "nbytes", None), int):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from arrays_in(item)
    else:
        for cell in getattr(value, "__closure__", None) or ():
            yield from arrays_in(cell.cell_contents)


def entries(array: Any) -> list[float] | None:
    """The entries of a small array."""
    return to_host(array).reshape(-1).tolist() if array.size <= SMALL else None


def buffer(array: Any) -> Any:
    """The array that owns the memory."""
    while isinstance(getattr(array.base, "nbytes", None), int):
        array = array.base
    return array


def graph(tensor: Tensor, names: Mapping[str, Tensor] | None = None) -> Graph:
    """The graph of a tensor, with names for some of its nodes: a model's parameters, for example.

    Sweeps the graph once from a gradient of ones, which frees it; `grad` of the leaves stays as it is. Raises
    RuntimeError if an earlier sweep has freed it.
    """
    if not tensor.requires_grad:
        raise ValueError("there is no graph: nothing that this tensor depends on requires a gradient")
    nodes = tape(tensor)
    titles = {leaf: name for name, leaf in (names or {}).items()}
    number = {node: i for i, node in enumerate(nodes)}
    parents = [[number[parent] for parent in node.parents if parent is not None] for node in nodes]
    counted = {id(buffer(node.data)) for node in nodes if node.vjp is None}
    kept = []
    for node in nodes:
        buffers = map(buffer, (node.data, *arrays_in(node.vjp)) if node.vjp else ())
        new = {id(array): array.nbytes for array in buffers if id(array) not in counted}
        counted |= new.keys()
        kept.append(sum(new.values()))
    ones = array_module(tensor.data).ones(tensor.shape, dtype=tensor.dtype)
    gradients = {
        node: (math.sqrt((g.astype("float64") ** 2).sum().item()), entries(g)) for node, g in sweep(nodes, ones)
    }
    return Graph(
        [
            Node(i, node.op, titles.get(node, ""), parents[i], node.shape, kept[i], entries(node.data), *gradient)
            for node, i in number.items()  # the sweep has emptied `nodes`
            for gradient in [gradients.get(node, (None, None))]
        ]
    )
