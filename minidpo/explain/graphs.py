"""A graph as it is: what each op made, what it keeps, and the gradient that passes through it."""

import html
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..backend import array_module, to_host
from ..tensor import Tensor, sweep, tape

SMALL = 4  # entries that are shown one by one


@dataclass(frozen=True)
class Node:
    """One tensor of a graph."""

    number: int  # in order of creation, from 0
    op: str  # "leaf" if no op made it
    name: str  # if one was given
    parents: list[int]  # numbers of the operands that have a gradient
    shape: tuple[int, ...]
    kept: int  # bytes that live until the sweep has passed: its value, and what its vjp holds and no older node does
    gradient_norm: float | None  # None where no gradient arrives
    value: list[float] | None  # the entries of a small one
    gradient: list[float] | None

    @property
    def title(self) -> str:
        """What is written on it."""
        return self.name or self.op


@dataclass(frozen=True)
class Graph:
    """All that a tensor depends on and that requires a gradient, in order of creation."""

    nodes: list[Node]

    @property
    def kept(self) -> int:
        """Bytes that live until the sweep has passed; the leaves' own are not counted, they stay."""
        return sum(node.kept for node in self.nodes)

    def __str__(self) -> str:
        """A table, one node a line."""
        lines = [f"{'node':>5} {'op':<16} {'operands':<28} {'shape':<16} {'kept, bytes':>12} {'|gradient|':>11}"]
        for node in self.nodes:
            operands = ", ".join(map(str, node.parents))
            norm = "none" if node.gradient_norm is None else f"{node.gradient_norm:.3e}"
            shape = shown_shape(node.shape)
            lines.append(f"{node.number:>5} {node.title:<16} {operands:<28} {shape:<16} {node.kept:>12,} {norm:>11}")
        return "\n".join([*lines, f"{'':>5} {len(self.nodes)} nodes{'':<48}{self.kept:>21,}"])

    def dot(self) -> str:
        """The graph in Graphviz' language: `dot -Tsvg`."""
        lines = ["digraph {", "  rankdir=LR", '  node [shape=box, fontname="monospace"]']
        for node in self.nodes:
            text = "\\n".join(line.replace("\\", "\\\\").replace('"', '\\"') for line in label(node))
            lines.append(f'  n{node.number} [label="{text}"{", style=rounded" if node.op == "leaf" else ""}]')
            lines += [f"  n{parent} -> n{node.number}" for parent in node.parents]
        return "\n".join([*lines, "}\n"])

    def mermaid(self) -> str:
        """The graph as a Mermaid flowchart, which Markdown pages draw."""
        lines = ["flowchart LR"]
        for node in self.nodes:
            text = "<br/>".join(html.escape(line).replace("&#x27;", "'") for line in label(node))
            left, right = ("([", "])") if node.op == "leaf" else ("[", "]")
            lines.append(f'  n{node.number}{left}"{text}"{right}')
            lines += [f"  n{parent} --> n{node.number}" for parent in node.parents]
        return "\n".join([*lines, ""])


def label(node: Node) -> list[str]:
    """The lines in a node of a picture: values and gradients of a small one, else shape and norm."""
    if node.value is not None and node.gradient is not None:
        return [node.title, f"data {numbers(node.value)}", f"grad {numbers(node.gradient)}"]
    norm = "no gradient" if node.gradient_norm is None else f"|grad| {node.gradient_norm:.3e}"
    return [node.title, shown_shape(node.shape), norm]


def numbers(entries: Sequence[float]) -> str:
    return ", ".join(f"{entry:.4g}" for entry in entries)


def shown_shape(shape: Sequence[int]) -> str:
    return "(" + ", ".join(map(str, shape)) + ("," if len(shape) == 1 else "") + ")"


def arrays_in(kept: Any) -> Iterator[Any]:
    """The arrays in what a `vjp` closes over."""
    if isinstance(getattr(kept, "nbytes", None), int):
        yield kept
    elif isinstance(kept, list | tuple):
        for part in kept:
            yield from arrays_in(part)
    else:
        for cell in getattr(kept, "__closure__", None) or ():
            yield from arrays_in(cell.cell_contents)


def buffer(array: Any) -> Any:
    """The array that owns the memory."""
    while isinstance(getattr(array.base, "nbytes", None), int):
        array = array.base
    return array


def graph(tensor: Tensor, names: Mapping[str, Tensor] | None = None) -> Graph:
    """Sweep a graph once, which frees it, and list it in order of creation; `grad` of its leaves stays as it is.

    Parameters
    ----------
    tensor : Tensor
        Where the sweep begins, with a gradient of ones.
    names : dict of str to Tensor, optional
        Names for some of it: a model's parameters, say.

    Returns
    -------
    Graph
        Print it for a table; `dot()` and `mermaid()` are pictures.

    Raises
    ------
    ValueError
        If nothing that the tensor depends on requires a gradient.
    RuntimeError
        If an earlier sweep has freed part of the graph.
    """
    if not tensor.requires_grad:
        raise ValueError("nothing that this tensor depends on requires a gradient: there is no graph")
    nodes = tape(tensor)
    titles = {leaf: name for name, leaf in (names or {}).items()}
    number = {node: i for i, node in enumerate(nodes)}
    counted = {id(buffer(node.data)) for node in nodes if node.vjp is None}
    listed: list[dict[str, Any]] = []
    for node in nodes:
        parents = [parent for parent in node.parents if parent is not None]
        held = [buffer(array) for array in (node.data, *arrays_in(node.vjp))] if node.vjp else []
        new = {id(array): array.nbytes for array in held if id(array) not in counted}
        counted |= new.keys()
        listed.append(
            {
                "number": number[node],
                "op": node.op,
                "name": titles.get(node, ""),
                "parents": [number[parent] for parent in parents],
                "shape": node.shape,
                "kept": sum(new.values()),
                "value": to_host(node.data).reshape(-1).tolist() if node.data.size <= SMALL else None,
                "gradient_norm": None,
                "gradient": None,
            }
        )
    ones = array_module(tensor.data).ones(tensor.shape, dtype=tensor.dtype)
    for node, g in sweep(nodes, ones):
        told = listed[number[node]]
        told["gradient_norm"] = math.sqrt((g.astype("float64") ** 2).sum().item())
        told["gradient"] = to_host(g).reshape(-1).tolist() if g.size <= SMALL else None
    return Graph([Node(**told) for told in listed])
