"""What a person reads: it shows what is in the files, and trusts none of it."""

import importlib.util
import json

import pytest

from minidpo import checkpoint
from minidpo.run import report
from minidpo.tokenizer import printable

METRICS = [
    {"step": 0, "eval_loss": 0.7, "eval_rewards/accuracies": 0.0, "eval_rewards/ties": 1.0},
    {"step": 1, "loss": 0.6, "rewards/accuracies": 0.5},
    {"step": 2, "eval_loss": 0.5, "eval_rewards/accuracies": 0.75, "eval_rewards/ties": 0.0},
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
    """Otherwise the best step, the table or the samples are those of another run."""
    report.write(run)
    text = (run / "report.md").read_text()
    assert f"python -m minidpo dpo '--data=my file' --out={run.name}" in text and "the checkpoint of step 2" in text
    assert "| step | held-out loss | accuracy | ties |" in text
    assert "| 2 | 0.5000 | 0.7500 | 0.0000 |" in text and "| 1 |" not in text
    assert "Rows: 9 rows\\x1b. Those set aside" in text and "- numpy: 2.0\\x1b" in text
    assert "answered at step 0" in text and "answered at step 2" in text and "answered at step 4" not in text


def test_what_models_say_is_escaped(run):
    """Otherwise a response clears the terminal that shows the report, or turns the line around."""
    report.write(run)
    text = (run / "report.md").read_text()
    assert "\x1b" not in text and "\u202e" not in text
    assert "    a\\u202eb\\n -> \\x1b[31m<b>2" in text.splitlines()
    assert printable("caf\u00e9 \U0001f600 |") == "caf\u00e9 \U0001f600 |"
    assert report.table([{"a": "x|y\n"}], {"a": "t"}).endswith("| x\\|y\\n |")


def test_a_run_without_measurements_is_one_sentence(run):
    """Otherwise a folder that somebody has touched ends in a traceback."""
    for content, sentence in (
        ("", "there is no measurement"),
        ("{}\n", "metrics.jsonl, line 1: is no object with a step"),
        ('{"step": 1}\nnonsense\n', "metrics.jsonl, line 2: is no object"),
        ("[" * 9999 + "\n", "line 1: is no object"),
        ('{"step": "x"}\n', "line 1: is no object"),
    ):
        (run / "metrics.jsonl").write_text(content)
        with pytest.raises(checkpoint.CheckpointError, match=sentence):
            report.write(run)


def test_without_matplotlib_it_says_so(run, monkeypatch):
    """Otherwise a missing extra is a crash after an hour of training, or nobody learns that there are curves."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    report.write(run)
    assert report.NO_CURVES in (run / "report.md").read_text() and not (run / "curves.png").exists()


def test_curves(run):
    """A picture with every panel that there is data for. Needs the `plot` extra."""
    pytest.importorskip("matplotlib")
    run = run.rename(run.with_name("x$\\foo$\x1b"))  # no formula, and nothing that a font has to show
    report.write(run)
    assert (run / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert "![curves](curves.png)" in (run / "report.md").read_text() and not list(run.glob(".*"))
