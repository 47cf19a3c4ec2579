"""The command that shows the family of preference losses: as a table, and as a picture.

The table is read from the signatures and docstrings of the losses, which tests hold to their word; the picture is drawn
from their values and their gradients in closed form.
"""

import importlib
import inspect
import io
import math
import re
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy

from .. import plots
from ..backend import Array
from ..losses import LOSSES
from ..plots import DASHES, INK, PALETTE
from ..run.files import write_whole
from ..verify.cases import RandomDraw, loss_arguments
from .options import NO_MATPLOTLIB, Option, announce, path
from .parser import command

Picture = Annotated[Path | None, Option("new PNG file for the curves and the gradient fields; needs matplotlib", path)]


class Facts(NamedTuple):
    """A row of the table."""

    name: str
    formula: str
    gradient: str
    stationary: str
    reference: str  # yes or no
    tokens: str  # sums, means or both: a mean is what lengths divide
    infimum: str
    paper: str


def facts(name: str) -> Facts:
    """What the docstrings and the signature of a loss say, and whether it sees sums or means over tokens."""
    loss = LOSSES[name]
    text, slope = (" ".join((inspect.getdoc(f) or "").split()) for f in (loss, loss.gradient))
    (formula,) = re.findall(r"\n\n +(L = .*)", loss.__doc__)[:1]
    gradient = re.findall(r"dL/d\w+ = .*?(?= With | Source|$)", slope)[0]
    stationary = re.search(r"Stationary: (.*?)(?=; infimum|; kink|\. )", text)
    infimum = re.search(r"[Ii]nfimum: (.*?)(?=, |\. )", text)
    paper = re.search(r"Source: (.*?\(arXiv [\d.]+\))", text)
    x = loss_arguments(RandomDraw(numpy.random.default_rng(0)), loss)
    longer = {each: 2 * value if "logp" in each or "length" in each else value for each, value in x.items()}
    means = math.isclose(loss(**x).loss.item(), loss(**longer).loss.item(), rel_tol=1e-9)
    return Facts(
        name, " ".join(formula.split()), gradient, stationary.group(1) if stationary else "nowhere",
        "yes" if any(each.startswith("ref_logp") for each in x) else "no",
        "means" if means else "both" if "/|y" in formula else "sums",
        infimum.group(1) if infimum else "0", paper.group(1) if paper else "",
    )  # fmt: skip


def as_text() -> str:
    """The table, four lines a loss."""
    rows = ["A pair has h_w = logp_w - ref_logp_w, r_w = beta h_w, z = r_w - r_l, |y_w| tokens; v(x) is sigma'(x)",
            "e is label_smoothing, p the probability that a label is correct, B the number of pairs; a gradient",
            "without B is that of a batch of one; bounds hold for log-probabilities of at most 0"]  # fmt: skip
    rows += [f"{'loss':<18}{'reference':<11}{'tokens':<8}{'bounded below':<22}paper"]
    for row in map(facts, LOSSES):
        bound = "no" if row.infimum == "none" else f"by {row.infimum}"
        rows.append(f"\n{row.name:<18}{row.reference:<11}{row.tokens:<8}{bound:<22}{row.paper}")
        rows += [f"    {row.formula}", f"    {row.gradient}", f"    stationary: {row.stationary}"]
    return "\n".join(rows)


# ---- the picture ------------------------------------------------------------------------------------------

OF_THE_MARGIN = {"dpo": {}, "ipo": {}, "hinge": {}, "robust": {"label_smoothing": 0.1}}
OF_THE_MARGIN |= {"exo_pair": {"label_smoothing": 0.1}, "discopop": {}}  # the others are one of these, moved along z
FIELDS: tuple[str, ...] = (
    "dpo",
    "nca_pair",
    "bco_pair",
    "apo_zero",
    "apo_down",
    "sppo_hard",
    "dpop",
    "alpha_divergence",
)
FIELDS += ("js_divergence", "dpo_nll", "kto", "sigmoid_norm", "simpo", "alphapo", "cpo", "orpo", "unlikelihood", "sft")
PUSHES = {"chosen up, rejected down": "#009E73", "both up": "#0072B2", "both down": "#D55E00"}
PUSHES |= {"chosen down, rejected up": "#7A5FC0", "one alone": "#C26BA0"}
LENGTH_W, LENGTH_L, START = 10, 20, -40.0  # of the responses in a field, and their log-probabilities at the origin


def derivatives(name: str, z: Array) -> list[Array]:
    """L, dL/dz and d2L/dz2 of a function of z at beta 1; the second is a complex step through the first."""
    zero, options = numpy.zeros_like(z), {"beta": 1.0, **OF_THE_MARGIN[name]}
    values = [LOSSES[name](*x, **options).loss.item() for x in zip(z, zero, zero, zero)]
    slopes = LOSSES[name].gradient(z + 1e-20j, zero + 0j, zero, zero, **options)[0] * len(z)
    return [numpy.array(values), slopes.real, slopes.imag / 1e-20]


def field(name: str, h_w: Array, h_l: Array) -> tuple[Array, Array]:
    """-dL/dh_w and -dL/dh_l of pairs, each a batch of its own."""
    taken = inspect.signature(LOSSES[name]).parameters
    n, reference = h_w.size, numpy.full(h_w.size, START)
    lengths = {"length_w": numpy.full(n, LENGTH_W), "length_l": numpy.full(n, LENGTH_L)}
    if name == "kto":  # a desirable response and another one
        x = {"ref_logp": reference, "reference_point": 0.0, "beta": 0.5}
        up, down = (
            LOSSES[name].gradient(reference + h, desirable=numpy.full(n, good), **x)[0]
            for h, good in ((h_w, True), (h_l, False))
        )
        return -n * up, -n * down
    x = {"logp_w": reference + h_w, "logp_l": reference + h_l, "ref_logp_w": reference, "ref_logp_l": reference}
    x |= {**lengths, **({"beta": 0.5} if "ref_logp_w" in taken else {})}
    gw, gl = LOSSES[name].gradient(**{each: value for each, value in x.items() if each in taken})
    return -n * gw, -n * gl


def draw_curves(rows: Any) -> None:
    """L, dL/dz and d2L/dz2 of each function of the margin, in three diagrams side by side."""
    z = numpy.linspace(-4, 4, 401)
    titles = ("L(z)", "dL/dz: how hard a pair pushes", "d²L/dz²: where it is convex")
    for name, color, dash in zip(OF_THE_MARGIN, PALETTE, (DASHES * 2)[: len(PALETTE)]):
        for axes, values in zip(rows, derivatives(name, z)):
            axes.plot(
                z, values, color=color, linestyle=dash, linewidth=1.8, label=name, zorder=4 if name == "dpo" else 3
            )
    for axes, title, (low, high) in zip(rows, titles, ((-1.0, 6.0), (-2.5, 2.0), (-1.0, 2.5))):
        axes.axhline(0, color=INK, linewidth=0.8)
        axes.axvline(0, color=INK, linewidth=0.8)
        axes.set_title(title, fontsize=9)
        axes.set(ylim=(low, high), xlim=(-4, 4), xlabel="z = beta · margin")


def pushes(w: Array, l: Array) -> Array:
    """Which of PUSHES a move of the chosen and of the rejected log-ratio is, by its place there."""
    both = numpy.where(w > 0, numpy.where(l > 0, 1, 0), numpy.where(l > 0, 3, 2))
    return numpy.where(numpy.minimum(abs(w), abs(l)) < 0.03 * numpy.hypot(w, l), 4, both)


def draw_field(axes: Any, name: str) -> None:
    """Where a step downhill moves both log-ratios: arrows of equal length, fainter where the loss pushes less."""
    ticks = numpy.linspace(-5.5, 5.5, 11)
    h_w, h_l = (x.reshape(-1) for x in numpy.meshgrid(ticks, ticks))
    up, down = field(name, h_w, h_l)
    size, kinds = numpy.hypot(up, down), pushes(up, down)
    faint = numpy.clip((size / size.max()) ** 0.5, 0.3, 1.0)
    moving = size > 1e-9
    colors = [(*color_of(tuple(PUSHES.values())[kind]), alpha) for kind, alpha in zip(kinds[moving], faint[moving])]
    unit = [direction[moving] / size[moving] for direction in (up, down)]
    axes.quiver(h_w[moving], h_l[moving], *unit, color=colors, scale=16, width=0.012, pivot="mid", headwidth=4)
    axes.plot(h_w[~moving], h_l[~moving], ".", color=INK, markersize=2)
    axes.plot([-6, 6], [-6, 6], color=INK, linewidth=0.8, linestyle=(0, (4, 3)))
    axes.set_title(name, fontsize=9)
    axes.set(xlim=(-6.2, 6.2), ylim=(-6.2, 6.2), xticks=(-5, 0, 5), yticks=(-5, 0, 5), aspect="equal")
    axes.grid(False)


def color_of(name: str) -> Any:
    return importlib.import_module("matplotlib.colors").to_rgb(name)


def png(transparent: bool = False) -> bytes:
    """Six curves and eighteen fields on one page. Needs matplotlib."""
    content, columns = io.BytesIO(), 6
    small = {"xtick.labelsize": 8, "ytick.labelsize": 8, "axes.labelsize": 9}
    with plots.figure(content, (11.7, 10.6), small, transparent) as figure:
        above, below = figure.subfigures(2, 1, height_ratios=(3.6, 7.0))
        rows = above.subplots(1, 3)
        draw_curves(rows)
        above.suptitle("Losses of the margin alone, at beta 1", x=0.01, ha="left", color=INK, fontsize=11)
        above.legend(*rows[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(OF_THE_MARGIN))
        grid = below.subplots(math.ceil(len(FIELDS) / columns), columns)
        for axes, name in zip(grid.flat, FIELDS):
            draw_field(axes, name)
        for axes in grid[-1]:
            axes.set_xlabel("chosen log-ratio")
        for axes in grid[:, 0]:
            axes.set_ylabel("rejected log-ratio")
        title = f"Where each pushes a pair of {LENGTH_W} and {LENGTH_L} tokens: the fainter, the less"
        below.suptitle(title, x=0.01, ha="left", color=INK, fontsize=11)
        patches = importlib.import_module("matplotlib.patches")
        handles = [patches.Patch(color=color, label=label) for label, color in PUSHES.items()]
        below.legend(handles=handles, loc="outside lower center", ncols=len(handles))
    return content.getvalue()


@command("prove")
def losses(*, plot: Picture = None) -> str:
    """Show every preference loss: formula, gradient, stationary point, bound and paper.

    Print the family of losses, four lines each. With --plot, draw six functions of z = beta margin with two
    derivatives, and where eighteen losses push the log-ratios of a chosen and a rejected response.
    """
    if plot and not plots.installed():
        raise ValueError(f"--plot: {NO_MATPLOTLIB}")
    announce(plot)
    table = as_text()
    print(table)
    if plot:
        write_whole(plot, png())
        print(f"\nthe picture is in {plot}")
    return table
