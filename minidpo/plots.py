"""One style for every picture; matplotlib, the `plot` extra, draws them.

A picture is a column of panels, readable on a phone. Up to four curves carry their names at their ends; more get a
legend and differ in their dashes too. Every colour is visible on white and on a dark page: contrast 3 to 1 or more.
"""

import contextlib
import importlib
import importlib.util
import io
import itertools
import math
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy

from .tokenizer import printable

INK = "#767676"  # of everything that is not a curve
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#C26BA0", "#7A5FC0", "#8C6D31")
DASHES = ("-", (0, (6, 1.5)), (0, (3, 1, 1, 1)), (0, (1, 1)))
STYLE: dict[str, Any] = {"font.size": 10, "axes.titlelocation": "left", "legend.fontsize": "small"}
STYLE |= {"axes.grid": True, "grid.alpha": 0.25, "axes.xmargin": 0.02, "figure.constrained_layout.h_pad": 0.1}
STYLE |= {name: False for name in ("axes.spines.top", "axes.spines.right", "legend.frameon")}
STYLE |= {f"{part}color": INK for part in ("text.", "axes.label", "axes.edge", "xtick.", "ytick.", "grid.")}


class Curve(NamedTuple):
    """One curve of a panel."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    marker: str | None = None
    faint: bool = False  # thin and grey, below the others
    joined: bool = True  # False: points without a line
    error: Sequence[float | tuple[float, float]] = ()  # length of the bar at each point: each way, or below and above


class Panel(NamedTuple):
    """One diagram of a picture."""

    title: str
    xlabel: str
    ylabel: str
    curves: Sequence[Curve]
    scale: str = "linear"  # of the x axis
    level: float | None = None  # height of a dashed horizontal line
    level_label: str = ""
    places: Sequence[str] = ()  # names of x = 0, 1, 2, ...


def installed() -> bool:
    """Whether matplotlib, the `plot` extra, can be imported."""
    return importlib.util.find_spec("matplotlib") is not None


@contextlib.contextmanager
def figure(
    file: Any, size: tuple[float, float], style: dict[str, Any] | None = None, transparent: bool = False
) -> Iterator[Any]:
    """A figure of matplotlib's, `size` in inches, saved as a PNG to a path or stream when the block ends."""
    matplotlib, figures = (importlib.import_module(name) for name in ("matplotlib", "matplotlib.figure"))
    with matplotlib.rc_context(STYLE | (style or {})):
        new = figures.Figure(figsize=size, layout="constrained")
        yield new
        small = {"metadata": {"Software": None}, "pil_kwargs": {"optimize": True}}
        new.savefig(file, format="png", dpi=120, transparent=transparent, **small)


def png(panels: Sequence[Panel], transparent: bool = False) -> bytes:
    """Draw panels below each other and return the picture as a PNG. Needs matplotlib."""
    heights = [3.2 + (0 if named_at_ends(panel) else 0.1 * len(panel.curves)) for panel in panels]  # inches
    content = io.BytesIO()
    with figure(content, (6.4, sum(heights)), transparent=transparent) as new:
        for axes, panel in zip(new.subplots(len(panels), squeeze=False, height_ratios=heights).flat, panels):
            draw(axes, panel)
    return content.getvalue()


def named_at_ends(panel: Panel) -> bool:
    """Whether the curves are named at their ends, without a legend."""
    return len(panel.curves) <= 4 and all(curve.joined for curve in panel.curves)


def draw(axes: Any, panel: Panel) -> None:
    """Draw one panel."""
    colors, dashes = itertools.cycle(PALETTE), itertools.cycle(DASHES[:1] if named_at_ends(panel) else DASHES)
    ends = []
    for curve in panel.curves:
        color = INK if curve.faint else next(colors)
        width, alpha, layer = (0.6, 0.45, 2) if curve.faint else (1.8, 1.0, 3)
        dash, size = (next(dashes), 4) if curve.joined else ("none", 6)
        axes.plot(
            curve.x, curve.y, label=curve.label, color=color, alpha=alpha, zorder=layer,
            linestyle=dash, linewidth=width, marker=curve.marker, markersize=size,
        )  # fmt: skip
        if curve.error:
            axes.errorbar(curve.x, curve.y, numpy.transpose(curve.error), fmt="none", ecolor=color, capsize=4)
        ends += [(y, curve.label, color) for y in [y for y in curve.y if math.isfinite(y)][-1:]]
    if not named_at_ends(panel):
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=2)
        ends = []
    if panel.level is not None:
        axes.axhline(panel.level, color=INK, linestyle="--", linewidth=1)
        ends.append((panel.level, panel.level_label, INK))
    axes.set_title(printable(panel.title), parse_math=False)
    axes.set(xlabel=panel.xlabel, ylabel=panel.ylabel, xscale=panel.scale)
    if panel.places:
        axes.set_xticks(range(len(panel.places)), panel.places)
        axes.margins(x=0.1)
    low, high = axes.get_ylim()
    ends = [((y - low) / (high - low), textwrap.fill(label, 20), color) for y, label, color in sorted(ends)]
    heights = apart([y for y, _, _ in ends], [1 + label.count("\n") for _, label, _ in ends])
    for y, (_, label, color) in zip(heights, ends):
        axes.text(1.02, y, label, color=color, va="center", transform=axes.transAxes, parse_math=False)


def apart(heights: Sequence[float], lines: Sequence[int]) -> list[float]:
    """Move the sorted heights of labels, in shares of the axes' height, until no label covers its neighbour."""
    heights = list(heights)
    gaps = [0.08 * (a + b) / 2 for a, b in itertools.pairwise(lines)]  # a line of text is 0.08 high
    for i, gap in enumerate(gaps):
        heights[i + 1] = max(heights[i + 1], heights[i] + gap)
    heights[-1:] = [min(y, 1.0) for y in heights[-1:]]
    for i, gap in reversed(list(enumerate(gaps))):
        heights[i] = min(heights[i], heights[i + 1] - gap)
    return heights


def picture(path: Path, panels: Sequence[Panel], transparent: bool = False) -> bool:
    """Draw panels into a file; without matplotlib, write nothing and return False."""
    if not installed():
        return False
    path.write_bytes(png(panels, transparent))
    return True
