"""One style for every picture; matplotlib, the `plot` extra, draws them."""

import importlib
import importlib.util
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from .tokenizer import printable


class Curve(NamedTuple):
    """One curve of a diagram."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    marker: str | None = None
    faint: bool = False
    joined: bool = True


class Panel(NamedTuple):
    """One diagram of a picture."""

    title: str
    xlabel: str
    ylabel: str
    curves: Sequence[Curve]
    scale: str = "linear"  # of the x axis


def installed() -> bool:
    """Whether matplotlib, the `plot` extra, can be imported."""
    return importlib.util.find_spec("matplotlib") is not None


def png(panels: Sequence[Panel]) -> bytes:
    """Draw diagrams, three in a row, and return the picture as a PNG. Needs matplotlib."""
    figure_module: Any = importlib.import_module("matplotlib.figure")
    across = min(3, len(panels))
    down = -(-len(panels) // across)
    width = {1: 9.0, 2: 6.0}.get(across, 4.5)
    figure = figure_module.Figure(figsize=(width * across, (5.5 if width > 4.5 else 3.5) * down), layout="constrained")
    grid = figure.subplots(down, across, squeeze=False).flatten()
    for axes in grid[len(panels) :]:
        axes.remove()
    for axes, panel in zip(grid, panels):
        for curve in panel.curves:
            axes.plot(
                curve.x,
                curve.y,
                label=curve.label,
                marker=curve.marker,
                markersize=3 if curve.joined else 6,
                linestyle="-" if curve.joined else "none",
                linewidth=0.5 if curve.faint else 1.5,
                alpha=0.6 if curve.faint else 1.0,
            )
        axes.set_title(printable(panel.title), parse_math=False)
        axes.set(xlabel=panel.xlabel, ylabel=panel.ylabel, xscale=panel.scale)
        axes.grid(alpha=0.3)
        axes.legend(frameon=False, fontsize="small")
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=120, metadata={"Software": None})
    return content.getvalue()


def picture(path: Path, panels: Sequence[Panel]) -> bool:
    """Draw diagrams into a file; false, and no file, where matplotlib is missing."""
    if not installed():
        return False
    path.write_bytes(png(panels))
    return True
