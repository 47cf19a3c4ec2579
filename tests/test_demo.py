"""The demo, on a small scale: three models, the same customers, the same random numbers."""

import itertools
import json
import math
import re

import numpy as np
import pytest

from minidpo import checkpoint, cli, plots, world
from minidpo.audit.intervals import Estimate
from minidpo.audit.replies import judged
from minidpo.cli import desk, parser
from minidpo.run import report
from minidpo.streams import stream
from minidpo.theory.exact import chain_rule_logprob
from minidpo.tokenizer import TURN

pytestmark = pytest.mark.slow

SIZES = desk.Sizes(
    texts=60,
    completions=40,
    pairs=40,
    held_out=10,
    steps={"pretrain": 4, "sft": 3, "dpo": 2},
    model=["--n-embd=8", "--n-layer=1", "--n-head=2", "--n-positions=110"],
    replies=30,
)


def json_lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def demo_run(tmp_path_factory):
    """A demo and its output, with the demo's own curves."""
    folder, curves = tmp_path_factory.mktemp("demo") / "desk", report.curves
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "installed", plots.installed)
        patch.setattr(report, "curves", lambda path, runs: path.parent == folder and curves(path, runs))
        printed = []
        patch.setattr(
            "builtins.print", lambda *args, end="\n", **options: printed.append(" ".join(map(str, args)) + end)
        )
        assert cli.demo(out=folder, sizes=SIZES) == folder
    return folder, "".join(printed)


def test_it_makes_three_models_from_commands_that_it_prints(demo_run):
    """The demo makes three models from the commands that it prints, each from the one before."""
    folder, printed = demo_run
    commands = re.findall(r"^\$ minidpo (\w+) (.*)$", printed, re.MULTILINE)
    assert [name for name, _ in commands] == ["pretrain", "sft", "dpo"]
    assert f"--init={folder / 'pretrain'}" in commands[1][1] and f"--init={folder / 'sft'}" in commands[2][1]
    assert all("--held-out-data=" in words and "--seed=0" in words for _, words in commands)
    for stage in desk.STAGES:
        assert checkpoint.load(folder / stage).verified
    assert {path.name for path in (folder / "data").iterdir()} == {
        f"{kind}{part}" for kind in ("texts", "completions", "pairs")
        for part in (f"{part}.{'txt' if kind == 'texts' else 'jsonl'}" for part in ("", "_held_out", "_test"))
    }  # fmt: skip


def test_held_out_prompts_are_never_trained_on(demo_run):
    """No held-out prompt is trained on, and no test prompt is held out to choose by."""
    folder, _ = demo_run
    train, held_out, test = world.split(0)
    for name in ("completions", "pairs"):
        for part, prompts in (("", train), ("_held_out", held_out), ("_test", test)):
            rows = json_lines(folder / "data" / f"{name}{part}.jsonl")
            assert rows and {row["prompt"] for row in rows} <= {x + TURN for x in prompts}
    texts = (folder / "data" / "texts.txt").read_text().rstrip("\n").split("\n\n")
    assert len(texts) == 60 and all(math.isfinite(world.corpus_logprob(text, train)) for text in texts)


def test_the_table_is_that_of_the_replies(demo_run):
    """The table is that of the replies: judged again from the checkpoints, it has the same numbers."""
    folder, printed = demo_run
    models = json.loads((folder / "results.json").read_text())["models"]
    assert list(models) == ["base", "SFT", "DPO"]
    prompts = world.samples(world.prompt_distribution(world.split(0)[2]), 30, stream(0, "demo", "prompts"))
    kept = json_lines(folder / "replies.jsonl")
    assert [row["prompt"] for row in kept] == prompts
    sft = checkpoint.load(folder / "sft")
    for stage, (name, figures) in zip(desk.STAGES, models.items()):
        again = judged(checkpoint.load(folder / stage), sft, prompts, 0)
        assert [row["replies"][name]["reply"] for row in kept] == again.replies
        rewards = np.array([world.judgement(x, reply).reward for x, reply in zip(prompts, again.replies)])
        error = np.std(rewards, ddof=1) / math.sqrt(30)
        value, low, high = figures["all"]["reward"]
        assert (value, high - low) == pytest.approx((np.mean(rewards), 2 * 1.959964 * error), rel=1e-6)
        benign = [world.PROMPTS[x].slice == "benign" for x in prompts]
        assert figures["benign"]["n"] == sum(benign)
        assert figures["benign"]["reward"][0] == pytest.approx(np.mean(rewards[benign]))
        assert f"{value:.2f}" in re.findall(r"^true reward .*$", printed, re.MULTILINE)[-1]
    assert models["SFT"]["all"]["kl"][0] == pytest.approx(0, abs=1e-4)
    row_printed = [name for name in world.SLICES if f"({name})" in printed]
    assert row_printed == list(world.SLICES) and "  DPO  " in printed


def test_the_kl_is_the_mean_log_ratio_of_the_replies(demo_run):
    """The KL is the mean log-ratio of the replies, by one forward per prefix."""
    folder, _ = demo_run
    dpo, base = checkpoint.load(folder / "dpo"), checkpoint.load(folder / "pretrain")
    prompts = ["my order is late.", "may anna see my bill?"]
    result = judged(dpo, base, prompts, 5, "two newlines")
    ids = [[0, *dpo.tokenizer.encode(x + 2 * TURN)] for x in prompts]
    for x, reply, length, ratio in zip(ids, result.replies, result.lengths, result.ratios):
        y = dpo.tokenizer.encode(reply)
        y += [0] * (len(x) + len(y) < dpo.config.n_positions + 1)
        assert length == len(y)
        again = [chain_rule_logprob(model.params, model.config, x, y) for model in (dpo, base)]
        assert ratio == pytest.approx(again[0] - again[1], abs=1e-4)


def test_the_facts_are_exact(demo_run):
    """The facts are exact: entropies, rewards and ties, counted again from the files."""
    folder, printed = demo_run
    train, _, test = world.split(0)
    assert f"its exact entropy {world.corpus_entropy(train):.4f}" in printed
    assert f"its exact entropy {world.reply_entropy(test):.4f}" in printed
    assert f"mean true reward of {world.desk_reward(test):.2f}" in printed
    texts = (folder / "data" / "texts_test.txt").read_text().rstrip("\n").split("\n\n")
    nats = -sum(world.corpus_logprob(text, train) for text in texts) / sum(len(text) + 1 for text in texts)
    assert f"the grammar itself {nats:.4f} on these" in printed
    replies = [
        (row["prompt"][:-1], row["completion"]) for row in json_lines(folder / "data" / "completions_test.jsonl")
    ]
    nats = -sum(math.log(world.desk(world.PROMPTS[x])[y]) for x, y in replies) / sum(len(y) + 1 for _, y in replies)
    assert f"the desk itself {nats:.4f} on these" in printed
    pairs = json_lines(folder / "data" / "pairs_test.jsonl")
    gaps = [
        world.judgement(p["prompt"][:-1], p["chosen"]).reward - world.judgement(p["prompt"][:-1], p["rejected"]).reward
        for p in pairs
    ]
    gaps = np.array(gaps, dtype=float)
    assert f"the true reward ranks {np.mean(np.heaviside(gaps, 0.5)):.3f}. Labels" in printed
    assert f"any ranking can expect is {np.mean(1 / (1 + np.exp(-abs(gaps)))):.3f}" in printed


def test_no_ranking_can_expect_more_than_the_true_reward():
    """The ceiling is the mean over draws of the labels, and the largest over all rankings of a few responses."""
    rewards, rng = np.array([0.0, 1.0, 1.0, 3.0]), np.random.default_rng(0)
    pairs = [(i, j) for i in range(4) for j in range(i)]
    gaps = np.array([rewards[i] - rewards[j] for i, j in pairs])
    chance = 1 / (1 + np.exp(-gaps))  # that i is preferred to j
    expected = [
        np.mean([chance[n] if order[i] > order[j] else 1 - chance[n] for n, (i, j) in enumerate(pairs)])
        for order in itertools.permutations(range(4))
    ]
    most = np.mean(np.maximum(chance, 1 - chance))
    assert max(expected) == pytest.approx(most)
    labels = rng.random((20_000, len(pairs))) < chance
    agree = np.where(gaps == 0, 0.5, labels == (gaps > 0))
    assert abs(agree.mean() - most) < 5 * agree.mean(axis=1).std() / math.sqrt(len(labels))


def test_the_report_has_what_was_printed(demo_run):
    """The report has the lines that were printed."""
    folder, printed = demo_run
    written = (folder / "report.md").read_text()
    for line in printed[printed.index("three models answer") :].splitlines()[2:12]:
        assert line in written
    assert "## What went wrong" in written
    for picture in ("![true reward](demo.png)", "![curves](curves.png)"):
        assert (picture in written) == (folder / picture[picture.index("(") + 1 : -1]).exists() == plots.installed()


def test_the_picture_is_the_result(demo_run):
    """The picture has each model's true reward in each slice with its interval, and the mean of the desk."""
    models = json.loads((demo_run[0] / "results.json").read_text())["models"]
    table = {
        model: {name: {**row, "reward": Estimate(*row["reward"])} for name, row in figures.items()}
        for model, figures in models.items()
    }
    panel = desk.rewards(table, 0, 30)
    assert panel.places == ["base", "SFT", "DPO"] and [c.label for c in panel.curves] == list(table["SFT"])
    for curve in panel.curves:
        assert np.allclose(curve.x, [0, 1, 2], atol=0.1)
        ends = [row[curve.label]["reward"] for row in models.values()]
        assert np.allclose([np.subtract(curve.y, curve.error), np.add(curve.y, curve.error)], np.transpose(ends)[1:])
    assert panel.level == world.desk_reward(world.split(0)[2]) and "30 replies" in panel.ylabel
    figure = pytest.importorskip("matplotlib.figure")
    axes = figure.Figure().subplots()
    plots.draw(axes, panel)
    assert [label.get_text() for label in axes.get_xticklabels()] == panel.places
    bars = [c for c in axes.collections if hasattr(c, "get_segments")]
    ends = [[y for _, y in segment] for segment in bars[0].get_segments()]
    assert np.allclose(ends, [[y - e, y + e] for y, e in zip(panel.curves[0].y, panel.curves[0].error)])


def test_it_resumes_where_it_was_stopped(demo_run, tmp_path, capsys, monkeypatch):
    """An interrupted demo says how to resume, and then ends in the same models and the same report."""
    folder = tmp_path / "desk"
    monkeypatch.setattr(desk, "FULL", SIZES)

    def interrupt(**values):
        """Interrupt."""
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setitem(parser.COMMANDS, "dpo", parser.COMMANDS["dpo"]._replace(function=interrupt))
        assert cli.main(["demo", f"--out={folder}"]) == 130
    error = capsys.readouterr().err
    *warnings, sentence = error.splitlines()  # the warnings: its few steps are fewer than the warm-up's
    assert sentence == f"minidpo demo: interrupted; resume with: minidpo resume {folder}"
    assert all(line.startswith("warning: --warmup-steps=50 is more than --steps=") for line in warnings)
    assert (folder / "sft").exists() and not (folder / "dpo").exists()
    with pytest.raises(checkpoint.CheckpointError, match="exists already"):
        cli.demo(out=folder)
    assert cli.main(["resume", str(folder)]) == 0
    printed = capsys.readouterr().out
    assert printed.count("$ minidpo resume") == 2
    for stage in desk.STAGES:
        first, again = (base / stage / "model" / "model.safetensors" for base in (demo_run[0], folder))
        assert first.read_bytes() == again.read_bytes()
    assert (folder / "results.json").read_bytes() == (demo_run[0] / "results.json").read_bytes()


def test_it_gives_its_own_settings(demo_run):
    """The demo's DPO has its own beta, likelihood term and learning rate, whatever the defaults of dpo are."""
    words = json.loads((demo_run[0] / "dpo" / "run.json").read_text())["arguments"]
    assert {"--beta=0.2", "--nll-weight=2.0", "--learning-rate=0.0003", "--steps=2"} <= set(words)
    assert "--beta=0.2 --nll-weight=2 --learning-rate=3e-4" in demo_run[1]


def test_judge_measures_any_model(demo_run, capsys):
    """Judge gives the demo's models the demo's numbers."""
    folder, printed = demo_run
    words = ["--reference", str(folder / "sft"), "--replies", "30"]
    assert cli.main(["judge", "--checkpoint", *(str(folder / stage) for stage in desk.STAGES), *words]) == 0
    table = capsys.readouterr().out.splitlines()
    assert table[0].split()[3:] == ["pretrain", "sft", "dpo"] and table[-1].startswith("KL to sft")
    rows_printed = [line.split() for line in printed.replace("SFT", "sft").splitlines()]
    assert all(line.split() in rows_printed for line in table if line and "replies   " not in line)


def test_judge_refuses_what_a_run_has_seen(demo_run, capsys):
    """With another seed than the demo's, test prompts were trained on: judge names one and says how to insist."""
    folder, _ = demo_run
    words = [
        "judge",
        "--checkpoint",
        str(folder / "dpo"),
        "--reference",
        str(folder / "sft"),
        "--replies=30",
        "--seed=1",
    ]
    assert cli.main(words) == 2
    assert re.search(r"seed 1, .*: the run of .* this prompt .* or with --seen$", capsys.readouterr().err.strip())
    assert cli.main([*words, "--seen"]) == 0


def test_a_broken_gate_is_exit_status_1(demo_run, capsys):
    """A model that does not meet a condition ends with status 1 and one sentence; the reference need not meet it."""
    folder, _ = demo_run
    words = ["judge", "--checkpoint", str(folder / "sft"), str(folder / "dpo"), "--reference", str(folder / "sft")]
    words += ["--replies=30"]
    assert cli.main([*words, "--at-most=reward=-9"]) == 1
    (sentence,) = capsys.readouterr().err.splitlines()
    assert re.fullmatch(r"minidpo judge: dpo: reward is -\S+( \(95 % interval .*\))?, and must be at most -9", sentence)
    assert cli.main([*words, "--at-most=reward=9", "--at-least=benign/n=1"]) == 0
    assert cli.main([*words, "--at-most=rewards=9"]) == 2 and "rewards is not a figure here" in capsys.readouterr().err


def test_judge_wants_one_vocabulary(demo_run, tmp_path, capsys):
    """Judge refuses a reference with another vocabulary."""
    folder, _ = demo_run
    loaded = checkpoint.load(folder / "sft")
    turned = type(loaded.tokenizer)(loaded.tokenizer.characters[::-1])
    checkpoint.save(tmp_path / "turned", loaded.params, loaded.config, turned)
    words = ["judge", "--checkpoint", str(folder / "dpo"), "--reference", str(tmp_path / "turned"), "--replies", "3"]
    assert cli.main(words) == 2 and "must share one" in capsys.readouterr().err


def test_the_example_files_are_those_of_the_readme(tmp_path, monkeypatch, capsys):
    """`minidpo data example` writes files that every command of the README can use, and replaces none."""
    monkeypatch.chdir(tmp_path)
    assert cli.main(["data", "example"]) == 0
    help_text = " ".join(parser.parser("data").format_help().split())
    assert "pairs.jsonl and more.jsonl, and names.txt for pretrain, are written here" in help_text
    assert all(row["prompt"].endswith(TURN) for row in json_lines(tmp_path / "pairs.jsonl"))
    for words in (
        "pretrain --data names.txt --out names --steps 1",
        "sft --data pairs.jsonl --out sft --steps 1 --strict --n-embd 8 --n-head 2",
        "dpo --data pairs.jsonl --held-out-data more.jsonl --init sft --out dpo --steps 1 --strict",
        "evaluate --checkpoint dpo --data more.jsonl --strict --seen",  # this run chose its checkpoint by them
    ):
        assert cli.main(words.split()) == 0
    assert cli.main(["sample", "--checkpoint=dpo", "--newline", "--prompt=my order is late.", "--samples=1"]) == 0
    before = {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    assert {path.name for path in before} == {"names.txt", "pairs.jsonl", "more.jsonl"}
    (tmp_path / "names.txt").unlink()
    assert cli.main(["data", "example"]) == 2 and "exists already" in capsys.readouterr().err
    assert not (tmp_path / "names.txt").exists()
    assert all(path.read_bytes() == content for path, content in before.items() if path.exists())
