"""`minidpo losses`: the table says what the losses do, and the picture is drawn from them."""

import math
import struct

import numpy as np
import pytest

from minidpo import cli, plots
from minidpo.cli import table_of_losses
from minidpo.losses import LOSSES

close = np.testing.assert_allclose


def test_the_table_has_every_loss(capsys):
    """Each loss is a row with its paper, its formula, its gradient and its stationary points."""
    assert cli.main(["losses"]) == 0
    printed = capsys.readouterr().out
    blocks = [block.split("\n") for block in printed.strip().split("\n\n")[1:]]
    assert [block[0].split()[0] for block in blocks] == list(LOSSES)
    for row, formula, gradient, stationary in blocks:
        assert "(arXiv " in row and formula.startswith("    L = ") and gradient.startswith("    dL/d")
        assert stationary.startswith("    stationary: ")
    assert max(map(len, printed.splitlines())) <= 150


@pytest.mark.parametrize(
    ("name", "stationary", "reference", "tokens", "infimum"),
    [
        ("dpo", "with p at z = log(p/(1 - p)), else nowhere", "yes", "sums", "0"),
        ("ipo", "margin = 1/(2 beta)", "yes", "sums", "0"),
        ("simpo", "nowhere", "no", "means", "0"),
        ("sigmoid_norm", "nowhere", "yes", "means", "0"),
        ("orpo", "nowhere", "no", "means", "0"),
        ("cpo", "nowhere", "no", "sums", "0"),
        ("dpo_nll", "nowhere", "yes", "both", "0"),
        ("r_dpo", "nowhere", "yes", "sums", "0"),  # its lengths divide nothing
        ("robust", "nowhere", "yes", "sums", "none"),
        ("unlikelihood", "nowhere", "no", "sums", "none"),
        ("nca_pair", "r_w = log 2, r_l -> -inf", "yes", "sums", "log(27/4)/2"),
        ("apo_zero", "nowhere, but slopes vanish far out, even where it is wrong", "yes", "sums", "-1"),
        ("hinge", "z > 1", "yes", "sums", "0"),
    ],
)
def test_facts_are_those_of_the_loss(name, stationary, reference, tokens, infimum):
    """A row is read from docstring and signature; whether tokens are summed or averaged, from its values."""
    row = table_of_losses.facts(name)
    assert (row.stationary, row.reference, row.tokens, row.infimum) == (stationary, reference, tokens, infimum)


@pytest.mark.parametrize("name", table_of_losses.OF_THE_MARGIN)
def test_curves_are_derivatives_of_each_other(name):
    """The second curve is the slope of the first, and the third that of the second."""
    z = np.array([-3.0, -1.1, -0.13, 0.2, 0.7, 2.4])
    step = 1e-5
    value, slope, curvature = table_of_losses.derivatives(name, z)
    before, after = (table_of_losses.derivatives(name, z + s * step) for s in (-1, 1))
    close(slope, (after[0] - before[0]) / (2 * step), rtol=1e-6, atol=1e-8)
    close(curvature, (after[1] - before[1]) / (2 * step), rtol=1e-6, atol=1e-8)
    assert name != "dpo" or math.isclose(value[1], math.log1p(math.exp(1.1)))


@pytest.mark.parametrize("name", table_of_losses.FIELDS)
def test_arrows_point_downhill(name):
    """A small step along its arrow lowers a pair's loss."""
    if name == "kto":
        down = table_of_losses.field(name, np.array([1.0]), np.array([1.0]))
        assert down[0] > 0 > down[1]  # the desirable response up, the other one down
        return
    start = table_of_losses.START
    for h_w, h_l in ((-3.0, 2.0), (2.0, -3.0), (1.5, 4.0)):
        up, down = (x.item() for x in table_of_losses.field(name, np.array([h_w]), np.array([h_l])))
        values = []
        for step in (0.0, 1e-4):
            four = (start + h_w + step * up, start + h_l + step * down, start, start)
            x = dict(zip(("logp_w", "logp_l", "ref_logp_w", "ref_logp_l"), four))
            x |= {"length_w": table_of_losses.LENGTH_W, "length_l": table_of_losses.LENGTH_L, "beta": 0.5}
            taken = LOSSES[name].__signature__.parameters if name != "dpo" else x.keys() - {"length_w", "length_l"}
            if "ref_logp_w" not in taken:
                del x["beta"]
            values.append(LOSSES[name](**{each: value for each, value in x.items() if each in taken}).loss.item())
        assert values[1] - values[0] == pytest.approx(-1e-4 * (up**2 + down**2), rel=1e-2, abs=1e-14)


@pytest.mark.parametrize(
    ("w", "l", "words"),
    [
        (1.0, -1.0, "chosen up, rejected down"),
        (1.0, 2.0, "both up"),
        (-2.0, -1.0, "both down"),
        (-1.0, 1.0, "chosen down, rejected up"),
        (1.0, 0.0, "one alone"),
        (-0.01, -1.0, "one alone"),
    ],
)
def test_a_colour_says_where_a_pair_is_pushed(w, l, words):
    """The colour of an arrow is that of its two signs, or that of a push on one response."""
    assert list(table_of_losses.PUSHES)[table_of_losses.pushes(np.array(w), np.array(l))] == words


def test_every_loss_is_in_the_picture_or_a_shift_of_one():
    """What is not drawn is DPO moved along z, a batch of one, or the same loss for single responses."""
    drawn = set(table_of_losses.OF_THE_MARGIN) | set(table_of_losses.FIELDS)
    assert set(LOSSES) - drawn == {"reference_free", "odpo", "r_dpo", "aot", "aot_unpaired", "bco", "plackett_luce"}


def test_the_picture_is_written(tmp_path, capsys, monkeypatch):
    """--plot writes a PNG to a new file and names it; an existing file, or no matplotlib, is refused."""
    pytest.importorskip("matplotlib")
    path = tmp_path / "losses.png"
    assert cli.main(["losses", f"--plot={path}"]) == 0
    header = path.read_bytes()[:24]
    assert header[:8] == b"\x89PNG\r\n\x1a\n" and min(struct.unpack(">II", header[16:])) > 1000
    assert f"the picture is in {path}" in capsys.readouterr().out
    assert cli.main(["losses", f"--plot={path}"]) == 2 and "exists already" in capsys.readouterr().err
    monkeypatch.setattr(plots, "installed", lambda: False)
    assert cli.main(["losses", f"--plot={tmp_path / 'other.png'}"]) == 2
    assert "matplotlib is not installed" in capsys.readouterr().err
