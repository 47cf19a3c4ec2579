"""The demo, on a small scale: three models, the same customers, the same random numbers."""

import itertools
import json
import math
import re

import numpy as np
import pytest

from minidpo import checkpoint, cli, plots, world
from minidpo.cli import desk, parser
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
    """A demo and its output."""
    folder = tmp_path_factory.mktemp("demo") / "desk"
    with pytest.MonkeyPatch.context() as patch:
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
        for part in ((".txt", "_held_out.txt") if kind == "texts" else (".jsonl", "_held_out.jsonl"))
    }  # fmt: skip


def test_held_out_prompts_are_never_trained_on(demo_run):
    """No held-out prompt is trained on."""
    folder, _ = demo_run
    train, held_out = world.split(0)
    for name in ("completions", "pairs"):
        for part, prompts in (("", train), ("_held_out", held_out)):
            rows = json_lines(folder / "data" / f"{name}{part}.jsonl")
            assert rows and {row["prompt"] for row in rows} <= {x + TURN for x in prompts}
    texts = (folder / "data" / "texts.txt").read_text().rstrip("\n").split("\n\n")
    assert len(texts) == 60 and all(math.isfinite(world.corpus_logprob(text, train)) for text in texts)


def test_the_table_is_that_of_the_replies(demo_run):
    """The table is that of the replies: judged again from the checkpoints, it has the same numbers."""
    folder, printed = demo_run
    rows = json.loads((folder / "results.json").read_text())["models"]
    assert [row["model"] for row in rows] == ["base", "SFT", "DPO"]
    prompts = world.samples(world.prompt_distribution(world.split(0)[1]), 30, stream(0, "demo", "prompts"))
    sft = checkpoint.load(folder / "sft")
    for stage, row in zip(desk.STAGES, rows):
        model = checkpoint.load(folder / stage)
        again = desk.verdict(model, sft, prompts, 0)
        rewards = [world.judgement(x, reply).reward for x, reply in zip(prompts, again["replies"])]
        assert row["reward"] == pytest.approx(np.mean(rewards)) == again["reward"]
        assert row["reward_error"] == pytest.approx(np.std(rewards, ddof=1) / math.sqrt(30))
        assert f"{again['reward']:.2f}" in re.search(r"^true reward .*$", printed, re.MULTILINE)[0]
    assert rows[1]["kl"] == pytest.approx(0, abs=1e-4)
    row_printed = [name for name in world.SLICES if f"({name})" in printed]
    assert row_printed == list(world.SLICES) and "  DPO  " in printed


def test_the_kl_is_the_mean_log_ratio_of_the_replies(demo_run):
    """The KL is the mean log-ratio of the replies, by one forward per prefix."""
    folder, _ = demo_run
    dpo, base = checkpoint.load(folder / "dpo"), checkpoint.load(folder / "pretrain")
    prompts = ["my order is late.", "may anna see my bill?"]
    result = desk.verdict(dpo, base, prompts, 5)
    ids = [[0, *dpo.tokenizer.encode(x + TURN)] for x in prompts]
    ratios = []
    for x, reply in zip(ids, result["replies"]):
        y = dpo.tokenizer.encode(reply)
        y += [0] * (len(x) + len(y) < dpo.config.n_positions + 1)
        ratios.append(
            chain_rule_logprob(dpo.params, dpo.config, x, y) - chain_rule_logprob(base.params, base.config, x, y)
        )
    assert result["kl"] == pytest.approx(np.mean(ratios), abs=1e-4)


def test_the_facts_are_exact(demo_run):
    """The facts are exact: entropies, rewards and ties, counted again from the files."""
    folder, printed = demo_run
    train, held_out = world.split(0)
    assert f"its exact entropy {world.corpus_entropy(train):.4f}" in printed
    assert f"its exact entropy {world.reply_entropy(held_out):.4f}" in printed
    assert f"mean true reward of {world.desk_reward(held_out):.2f}" in printed
    texts = (folder / "data" / "texts_held_out.txt").read_text().rstrip("\n").split("\n\n")
    nats = -sum(world.corpus_logprob(text, train) for text in texts) / sum(len(text) + 1 for text in texts)
    assert f"the grammar itself {nats:.4f} on these" in printed
    replies = [
        (row["prompt"][:-1], row["completion"]) for row in json_lines(folder / "data" / "completions_held_out.jsonl")
    ]
    nats = -sum(math.log(world.desk(world.PROMPTS[x])[y]) for x, y in replies) / sum(len(y) + 1 for _, y in replies)
    assert f"the desk itself {nats:.4f} on these" in printed
    pairs = json_lines(folder / "data" / "pairs_held_out.jsonl")
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
    assert ("![true reward](demo.png)" in written) == (folder / "demo.png").exists() == plots.installed()
    assert "| SFT |" in written and ("![curves](curves.png)" in written) == (folder / "curves.png").exists()


def test_the_picture_is_the_result(demo_run):
    """The picture has the true reward of each model, two standard errors each way, and the mean of the desk."""
    rows = json.loads((demo_run[0] / "results.json").read_text())["models"]
    panel = desk.rewards(rows, 0, 30)
    (curve,) = panel.curves
    assert panel.places == ["base", "SFT", "DPO"] and list(curve.x) == [0, 1, 2]
    assert curve.y == [row["reward"] for row in rows] and curve.error == [2 * row["reward_error"] for row in rows]
    assert panel.level == world.desk_reward(world.split(0)[1]) and "30 replies" in panel.ylabel
    figure = pytest.importorskip("matplotlib.figure")
    axes = figure.Figure().subplots()
    plots.draw(axes, panel)
    assert [label.get_text() for label in axes.get_xticklabels()] == panel.places
    (bars,) = [c for c in axes.collections if hasattr(c, "get_segments")]
    ends = [[y for _, y in segment] for segment in bars.get_segments()]
    assert np.allclose(ends, [[y - e, y + e] for y, e in zip(curve.y, curve.error)])


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
    assert table[0].split() == ["model", "pretrain", "sft", "dpo"] and table[-1].startswith("KL to sft")
    for line, again in zip(desk.COLUMNS.values(), table):
        row_printed = next(row for row in printed.splitlines() if row.startswith(line))
        assert line in ("model", "KL to SFT") or row_printed.split() == again.split()


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
        "evaluate --checkpoint dpo --data more.jsonl --strict",
    ):
        assert cli.main(words.split()) == 0
    assert cli.main(["sample", "--checkpoint=dpo", "--newline", "--prompt=my order is late.", "--samples=1"]) == 0
    before = {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    assert {path.name for path in before} == {"names.txt", "pairs.jsonl", "more.jsonl"}
    (tmp_path / "names.txt").unlink()
    assert cli.main(["data", "example"]) == 2 and "exists already" in capsys.readouterr().err
    assert not (tmp_path / "names.txt").exists()
    assert all(path.read_bytes() == content for path, content in before.items() if path.exists())
