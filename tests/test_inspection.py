"""The commands that look into a model."""

import json

import numpy as np
import pytest

from minidpo import checkpoint, cli, explain, model, preferences
from minidpo.explain import displacement
from minidpo.model import Config
from minidpo.theory.exact import chain_rule_logprob
from minidpo.tokenizer import Tokenizer
from test_train import CONFIG, ROWS, SHORT, folder, write  # noqa: F401


@pytest.fixture(scope="module")
def run(folder):  # noqa: F811
    """A run of dpo with its own beta."""
    command = ["dpo", f"--data={folder / 'pairs.jsonl'}", f"--init={folder / 'init'}", "--beta=0.7"]
    assert cli.main([*command, f"--out={folder / 'dpo'}", "--learning-rate=0.01", *SHORT]) == 0
    return folder / "dpo"


PAIR = ["--prompt=ab", "--newline", "--chosen=bd", "--rejected=bcc"]


def explained(capsys, *arguments):
    capsys.readouterr()
    assert cli.main(["explain", *arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_explain_shows_everything(run, capsys, tmp_path):
    """Explain prints every part, and writes its page and its graph."""
    files = [f"--html={tmp_path / 'pair.html'}", f"--graph={tmp_path / 'loss.dot'}"]
    assert not list(tmp_path.iterdir())
    assert cli.main(["explain", f"--checkpoint={run}", *PAIR, *files]) == 0
    printed, announcement = capsys.readouterr()
    assert announcement.splitlines() == [
        f"{tmp_path / name} will be written at the end" for name in ("pair.html", "loss.dot")
    ]
    for part in (
        "reference ",
        "chosen    bd",
        "log pi(chosen)",
        "The gradient, four ways",
        "What a step will do",
        "K_wl",
    ):
        assert part in printed
    exact, finite = (float(printed.split("largest difference: ")[1].split()[i]) for i in (0, 5))
    assert exact < 1e-12 and finite < 1e-6
    assert (tmp_path / "pair.html").read_text().startswith("<!doctype html>")
    assert (tmp_path / "loss.dot").read_text().startswith("digraph {")
    assert cli.main(["explain", f"--checkpoint={run}", *PAIR, f"--graph={tmp_path / 'loss.mmd'}"]) == 0
    assert (tmp_path / "loss.mmd").read_text().startswith("flowchart LR")


def test_the_json_is_that_of_the_library(run, capsys):
    """Explain's JSON has the numbers of the library, with the run's own reference and beta."""
    facts = explained(capsys, f"--checkpoint={run}", *PAIR)
    policy, reference = checkpoint.load(run), checkpoint.load(run.parent / "init")
    x, w, l = [0, *policy.tokenizer.encode("ab\n")], *([*policy.tokenizer.encode(y), 0] for y in ("bd", "bcc"))
    view = explain.pair(policy.params, reference.params, policy.config, x, w, l, 0.7, policy.tokenizer)
    assert {name: facts[name] for name in view.as_dict()} == json.loads(json.dumps(view.as_dict()))
    assert facts["reference"] == str(run.parent / "init") and view.margin != 0
    assert facts["step"]["chosen"] == vars(displacement.step(policy.params, policy.config, view).chosen)
    assert facts["step_adamw"]["chosen"]["measured"] != facts["step"]["chosen"]["measured"]
    assert [row["name"] for row in facts["four_ways"]][:2] == ["logp_w", "logp_l"]


def test_reference_and_beta_can_be_given(run, capsys):
    """Reference and beta can be given; without a run they are the policy itself and 0.1."""
    other = run.parent / "other"
    facts = explained(capsys, f"--checkpoint={run}", f"--reference={other}", "--beta=0.3", *PAIR)
    assert facts["reference"] == str(other) and facts["beta"] == 0.3
    facts = explained(capsys, f"--checkpoint={other}", *PAIR)
    assert facts["reference"] == str(other) and facts["beta"] == 0.1 and facts["margin"] == 0
    assert cli.main(["explain", f"--checkpoint={other}", *PAIR]) == 0
    assert f"reference {other}, the policy itself; beta 0.1" in capsys.readouterr().out
    facts = explained(capsys, f"--checkpoint={other}", "--learning-rate=0.001", *PAIR)
    assert facts["step"]["learning_rate"] == facts["step_adamw"]["learning_rate"] == 0.001


def test_a_checkpoint_inside_a_run_is_of_that_run(run, capsys):
    """RUN/model has the reference and beta of RUN."""
    facts = explained(capsys, f"--checkpoint={run / 'model'}", *PAIR)
    assert facts["reference"] == str(run.parent / "init") and facts["beta"] == 0.7
    facts = explained(capsys, f"--checkpoint={run.parent / 'init'}", *PAIR)
    assert facts["margin"] == 0


def test_a_run_inside_a_demo_is_its_own(run, capsys):
    """A run inside a demo has its own reference and beta, not those of the folder around it."""
    (run.parent / "run.json").write_text("{}")
    try:
        facts = explained(capsys, f"--checkpoint={run}", *PAIR)
        assert facts["reference"] == str(run.parent / "init") and facts["beta"] == 0.7
    finally:
        (run.parent / "run.json").unlink()


def test_a_reference_of_its_own_and_of_another_shape(run, capsys):
    """A run with --reference is explained against it, whatever its shape; other vocabularies are refused."""
    here = run.parent
    config, tokenizer = Config(CONFIG.vocab_size, 9, 4, 1, 1), Tokenizer("\nabcd")
    params = model.init(config, np.random.default_rng(3), dtype="float64")
    checkpoint.save(here / "narrow", params, config, tokenizer)
    command = ["dpo", f"--data={here / 'pairs.jsonl'}", f"--init={here / 'init'}", *SHORT]
    command += [f"--reference={here / 'narrow'}", "--loss=ipo", "--nll-weight=2", f"--out={here / 'ipo'}"]
    assert cli.main(command) == 0
    facts = explained(capsys, f"--checkpoint={here / 'ipo'}", *PAIR)
    assert facts["reference"] == str(here / "narrow") and (
        facts["note"] == "the run was made with --loss ipo --nll-weight 2.0; this shows the DPO loss alone"
    )
    x, w = [0, *tokenizer.encode("ab\n")], [*tokenizer.encode("bd"), 0]
    assert facts["ref_logp_w"] == pytest.approx(chain_rule_logprob(params, config, x, w))
    assert cli.main(["explain", f"--checkpoint={here / 'ipo'}", *PAIR[:2], "--chosen=bbbbbbbb", "--rejected=c"]) == 2
    assert "10 fit" in capsys.readouterr().err
    checkpoint.save(here / "foreign", params, config, Tokenizer("\nwxyz"))
    assert cli.main(["explain", f"--checkpoint={run}", f"--reference={here / 'foreign'}", *PAIR]) == 2
    assert "must share one" in capsys.readouterr().err
    (here / "narrow").rename(here / "moved")
    assert cli.main(["explain", f"--checkpoint={here / 'ipo'}", *PAIR]) == 2
    assert "is not there; give --reference" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["evaluate", "score"])
def test_evaluate_knows_what_the_run_was_made_with(command, run, capsys, tmp_path):
    """Reference and beta are those of the run unless given, and stderr says so; a missing one is named."""
    words = [command, f"--data={run.parent / 'pairs.jsonl'}", f"--checkpoint={run}"]
    words += ["--seen"] * (command == "evaluate")
    init, other = f"--reference={run.parent / 'init'}", [f"--reference={run}", "--beta=0.3"]

    def printed(*more):
        assert cli.main([*words, *more]) == 0
        return capsys.readouterr()

    own = printed(*([] if command == "evaluate" else [init]))
    asked = printed(init, "--beta=0.7")
    assert own.out == asked.out != printed(*other).out
    taken = f"--reference {run.parent / 'init'} --beta 0.7" if command == "evaluate" else "--beta 0.7"
    assert f"{run}: its run had {taken}\n" in own.err and "its run had" not in asked.err
    words[2] = f"--checkpoint={run.parent / 'init'}"
    assert "its run had" not in printed(init).err and printed(init).out == printed(init, "--beta=0.1").out
    if command == "evaluate":
        assert cli.main(words) == 2
        error = capsys.readouterr().err
        assert "is not from a run of dpo" in error and "give --reference" in error and error.count("\n") == 1
        (run.parent / "init").rename(run.parent / "elsewhere")
        assert cli.main([*words[:2], f"--checkpoint={run}"]) == 2
        error = capsys.readouterr().err
        (run.parent / "elsewhere").rename(run.parent / "init")
        assert "is not there; give --reference" in error and error.count("\n") == 1


def test_identical_responses_can_be_looked_at(run, capsys):
    """A pair of identical responses can be explained: its step predicts no change."""
    facts = explained(capsys, f"--checkpoint={run}", "--prompt=a", "--chosen=bd", "--rejected=bd")
    assert facts["shared"] == 3 and "identical" in facts["says"] and facts["step"]["chosen"]["predicted"] == 0


def test_a_pair_that_cannot_be_explained_is_one_sentence(run, capsys, tmp_path):
    """A pair or a file that cannot be used is one sentence, and nothing is written."""
    for arguments, sentence in (
        (["--prompt=a", "--chosen=bz", "--rejected=c"], "character 'z' at position 1 of the chosen response"),
        (["--prompt=a", "--chosen=b", f"--rejected={'c' * 30}"], "the prompt with the rejected response has"),
        ([*PAIR, f"--graph={tmp_path / 'loss.svg'}"], "is written as .dot (Graphviz) or .mmd (Mermaid)"),
        ([*PAIR, f"--reference={tmp_path / 'none'}"], "cannot be read"),
        ([*PAIR, f"--html={tmp_path}"], "exists already"),
        ([*PAIR, f"--html={tmp_path / 'no' / 'x.html'}"], "its folder is missing or read-only"),
        ([*PAIR, f"--html={tmp_path / 'x.dot'}", f"--graph={tmp_path / 'x.dot'}"], "two outputs cannot be one file"),
    ):
        assert cli.main(["explain", f"--checkpoint={run}", *arguments]) == 2
        error = capsys.readouterr().err
        assert sentence in error and error.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_displacement_on_three_words_and_on_a_file(run, capsys, tmp_path):
    """Displacement shows three words, or counts the pairs of a file."""
    assert cli.main(["displacement"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].startswith('One pair, "no" over "never"') and len(printed) == 7
    assert cli.main(["displacement", f"--checkpoint={run}", f"--data={run.parent / 'pairs.jsonl'}"]) == 0
    first, meter = capsys.readouterr().out.splitlines()
    assert first == f"reference {run.parent / 'init'}; beta 0.7"
    count = len(preferences.read(run.parent / "pairs.jsonl")[0])
    assert count == len(ROWS) and meter.startswith(f"{count} pairs") and meter.endswith(f"the predicted one in {count}")
    assert cli.main(["displacement", f"--data={write(tmp_path / 'x', ROWS)}"]) == 2
    assert "belong together" in capsys.readouterr().err
    for option in ("--beta=5", "--strict", "--truncation=prompt", "--learning-rate=1"):
        assert cli.main(["displacement", option]) == 2 and "belong together" in capsys.readouterr().err


def test_invariances_prints_both_directions(capsys):
    """Invariances prints what holds and what only looks like it, for the model of its seed."""
    assert cli.main(["invariances"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 10 and lines[0].split()[:2] == ["what", "changes"]
    assert cli.main(["invariances", "--seed=1"]) == 0
    assert capsys.readouterr().out.splitlines() != lines
