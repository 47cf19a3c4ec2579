"""The report shows what is in the files and escapes all of it; its pictures are readable."""

import importlib.util
import json
import math

import numpy as np
import pytest

from minidpo import checkpoint, plots
from minidpo.run import report
from minidpo.tokenizer import printable

METRICS = [
    {"step": 0, "eval_loss": 0.7, "eval_rewards/accuracies": 0.0, "eval_rewards/ties": 1.0},
    {"step": 1, "loss": 0.6, "rewards/accuracies": 0.5},
    {"step": 2, "eval_loss": 0.5, "eval_rewards/accuracies": 0.75, "eval_rewards/ties": -0.0},
    {"step": 4, "eval_loss": 0.55, "eval_rewards/accuracies": 0.7, "eval_rewards/ties": 0.0},
]
SAMPLES = [{"step": step, "prompt": "a\u202eb\n", "response": f"\u001b[31m<b>{step}"} for step in (0, 2, 4)]


@pytest.fixture
def run(tmp_path):
    def write(name, rows):
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))

    write("metrics.jsonl", METRICS)
    write("samples.jsonl", SAMPLES)
    description = {"arguments": ["dpo", "--data=my file"], "environment": {"numpy": "2.0\x1b"}, "rows": "9 rows\x1b"}
    (tmp_path / "run.json").write_text(json.dumps(description))
    return tmp_path


def test_the_report_shows_what_happened(run):
    """The best step, the table, the replies and the command are those of this run."""
    report.write(run)
    text = (run / "report.md").read_text()
    assert f"    minidpo dpo '--data=my file' --out={run.name}\n" in text and "the checkpoint of step 2" in text
    assert f"In any folder, this command repeats the run in a new folder {run.name}:" in text
    assert "| step | held-out loss | accuracy | ties |" in text
    assert "| 0 | 0.7000 | all tie | 1.0000 |" in text
    assert "| 2 | 0.5000 | 0.7500 | 0.0000 |" in text and "| 1 |" not in text
    assert "Rows: 9 rows\\x1b. Those set aside" in text and "- numpy: 2.0\\x1b" in text
    assert [step in text for step in ("replies at step 0", "replies at step 2", "replies at step 4")] == [1, 1, 0]


@pytest.mark.parametrize(
    ("losses", "sentence"),
    [
        ([0.7, 0.8, 0.9], "THE RESULT IS THE MODEL THAT THE RUN BEGAN WITH"),
        ([0.7, 0.7], "THE RESULT IS THE MODEL THAT THE RUN BEGAN WITH"),
        ([0.7, 0.6, 0.9], "THE LOWEST HELD-OUT LOSS WAS AT THE FIRST EVALUATION"),
        ([0.7], None),
        ([0.7, 0.6], None),
        ([0.7, 0.6, 0.5], None),
    ],
)
def test_training_that_has_not_helped_is_said_in_capitals(run, losses, sentence):
    """A result that is the first or the untrained model says so, with what helps."""
    metrics = [{"step": step, "eval_loss": loss} for step, loss in enumerate(losses)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in metrics))
    report.write(run)
    text = (run / "report.md").read_text()
    assert [f"**Warning:** {said}." in text for said in report.warnings(metrics)] == [True] * bool(sentence)
    assert text.count("**Warning:**") == bool(sentence)
    if sentence:
        assert f"**Warning:** {sentence}" in text and "a smaller --learning-rate" in text


def test_the_text_of_models_is_escaped(run):
    """A reply neither clears the terminal that shows the report, nor turns the line around."""
    report.write(run)
    text = (run / "report.md").read_text()
    assert "\x1b" not in text and "\u202e" not in text
    assert "    a\\u202eb\\n -> \\x1b[31m<b>2" in text.splitlines()
    assert printable("caf\u00e9 \U0001f600 |") == "caf\u00e9 \U0001f600 |"
    assert report.table([{"a": "x|y\n"}], {"a": "t"}).endswith("| x\\|y\\n |")


def test_a_run_without_evaluations_is_one_sentence(run):
    """A folder that somebody has edited ends in a sentence, not in a traceback."""
    for content, sentence in (
        ("", "metrics.jsonl holds no evaluation"),
        ("{}\n", "metrics.jsonl, line 1: has no step"),
        ('{"step": 1}\nnonsense\n', "metrics.jsonl, line 2: is not JSON"),
        ("[" * 9999 + "\n", "line 1: is not JSON"),
        ("[1]\n", "line 1: is not a JSON object"),
        ('{"step": "x"}\n', "line 1: has no step"),
    ):
        (run / "metrics.jsonl").write_text(content)
        with pytest.raises(checkpoint.CheckpointError, match=sentence):
            report.write(run)


def test_without_matplotlib_it_says_so(run, monkeypatch):
    """A missing extra costs the curves and is one line, also after an hour of training."""
    monkeypatch.setattr(report, "installed", plots.installed)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    report.write(run)
    assert report.NO_CURVES in (run / "report.md").read_text() and not (run / "curves.png").exists()


def test_curves(run, monkeypatch):
    """There is a picture with every panel that has data. Needs the `plot` extra."""
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(report, "installed", plots.installed)
    run = run.rename(run.with_name("x$\\foo$\x1b"))  # neither a formula, nor a character that a font has to have
    report.write(run)
    assert (run / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert "![curves](curves.png)" in (run / "report.md").read_text() and not list(run.glob(".*"))


def test_panels_have_the_level_that_a_run_began_at():
    """log 2 under the DPO loss at policy = reference and nowhere else; one half for accuracy; units on the axes."""
    loss, accuracy = report.panels("x", [{**METRICS[0], "eval_loss": math.log(2)}, *METRICS[1:]])
    assert (loss.ylabel, loss.level) == ("nats per pair", math.log(2))
    assert (accuracy.ylabel, accuracy.level) == ("share of pairs", 0.5)
    assert [(curve.label, curve.faint) for curve in loss.curves] == [("batch", True), ("held out", False)]
    assert accuracy.curves[1].y == [0.5, 0.75, 0.7]  # the policy begins with nothing but ties
    loss, _ = report.panels("x", METRICS)
    assert (loss.ylabel, loss.level) == ("", None)
    both = [{**METRICS[0], "eval_loss/dpo": math.log(2), "eval_loss/nll": 3.0}, *METRICS[1:]]
    loss, dpo, nll, _ = report.panels("x", both)
    assert [(panel.ylabel, panel.level) for panel in (loss, dpo, nll)] == [
        ("nats", None), ("nats per pair", math.log(2)), ("nats per token", None)
    ]  # fmt: skip
    (loss,) = report.panels("x", [{"step": 0, "eval_loss": 3.0}, {"step": 1, "loss": 2.5}])
    assert (loss.ylabel, loss.level) == ("nats per token", None)


def test_noisy_batches_are_below_their_running_mean():
    """Batches are pale, their running mean is a curve of its own, and held-out values have markers."""
    rng = np.random.default_rng(0)
    noisy = rng.normal(size=100)
    lines = [{"step": i + 1, "loss": y} for i, y in enumerate(noisy)]
    (panel,) = report.panels("x", [{"step": 0, "eval_loss": 3.0}, *lines, {"step": 100, "eval_loss": 2.0}])
    batch, mean, held_out = panel.curves
    assert (batch.faint, batch.marker, mean.faint, mean.marker, held_out.marker) == (True, None, False, None, "o")
    assert mean.label == "mean of 5 batches" and list(mean.x) == list(range(5, 101))
    assert mean.y == pytest.approx(np.convolve(noisy, np.ones(5) / 5, "valid"))
    assert report.running_mean([1.0, 2.0, 6.0], 1) == [1.0, 2.0, 6.0]


def luminance(color):
    """Relative luminance of #RRGGBB, from 0 (black) to 1 (white). Source: WCAG 2.1."""
    parts = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    r, g, b = (x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in parts)
    return 0.2126 * r + 0.7152 * g + 0.0722 * b


@pytest.mark.parametrize("page", ["#ffffff", "#0d1117"])
def test_each_color_is_visible_on_white_and_on_a_dark_page(page):
    """The contrast is at least 3 to 1, and 4 to 1 for what is written in grey. Source: WCAG 2.1, 1.4.11."""
    for color, least in [*((color, 3) for color in plots.PALETTE), (plots.INK, 4)]:
        low, high = sorted([luminance(color), luminance(page)])
        assert (high + 0.05) / (low + 0.05) >= least, color


def test_labels_do_not_cover_each_other():
    """Labels at one height move apart, a label of two lines by more, and none above the axes."""
    assert plots.apart([0.2, 0.9], [1, 1]) == [0.2, 0.9]
    assert plots.apart([0.5, 0.5, 0.51], [1, 1, 2]) == pytest.approx([0.5, 0.58, 0.7])
    assert plots.apart([0.99, 1.0], [1, 1]) == pytest.approx([0.92, 1.0])
    assert plots.apart([], []) == []


def test_a_picture_names_its_curves():
    """At their ends up to four, in a legend beyond; a faint curve is below the others, a level dashed."""
    figure = pytest.importorskip("matplotlib.figure")
    for count in (4, 5):
        axes = figure.Figure().subplots()
        curves = [
            plots.Curve(f"curve {i}", [1, 2], [i, math.inf if i == 1 else i + 1], faint=i == 3) for i in range(count)
        ]
        plots.draw(axes, plots.Panel("x", "step", "nats", curves, level=0.5, level_label="half"))
        names = [f"curve {i}" for i in range(count)]
        legend = [text.get_text() for text in axes.get_legend().get_texts()] if axes.get_legend() else []
        assert legend == (names if count > 4 else [])
        assert {text.get_text() for text in axes.texts} == ({"half"} if count > 4 else {*names, "half"})
        lines = axes.get_lines()
        assert min(lines[:count], key=lambda line: line.get_zorder()) is lines[3] and lines[-1].get_linestyle() == "--"
        assert len({line.get_linestyle() for line in lines[:count]}) == (1 if count == 4 else 2)


def test_a_picture_can_be_transparent():
    """Pages in two colour schemes can show one picture."""
    pytest.importorskip("matplotlib")
    panel = plots.Panel("x", "step", "", [plots.Curve("a", [0, 1], [0, 1])])
    assert plots.png([panel]) != plots.png([panel], transparent=True)
