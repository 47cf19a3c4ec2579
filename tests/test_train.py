"""The commands that train, evaluate and score, with their files: each option does what its help says."""

import inspect
import json
import math
import re
import shlex
import shutil
import textwrap

import numpy as np
import pytest

import minidpo
from minidpo import checkpoint, cli, losses, model, preferences, scoring, training
from minidpo.cli import parser, train
from minidpo.model import Config
from minidpo.run import report
from minidpo.run.workers import Workers
from minidpo.theory.exact import chain_rule_logprob
from minidpo.tokenizer import Tokenizer

TOKENIZER = Tokenizer("\nabcd")
CONFIG = Config(TOKENIZER.vocab_size, 16, 8, 1, 2)
ROWS = [{"prompt": x + y + "\n", "chosen": y + "d", "rejected": "cc"} for x in "abc" for y in "abcd"]
PROMPTS = [x + y for x in "abcd" for y in "abcd"]
SHORT = ["--steps=4", "--evaluate-every=2", "--batch-size=3"]
SMALL = ["--n-embd=8", "--n-layer=1", "--n-head=2"]


def write(path, rows):
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("recipes")
    write(root / "pairs.jsonl", ROWS)
    rng = np.random.default_rng(0)
    for name in ("init", "other"):
        params = model.init(CONFIG, rng, dtype="float64")
        for p in params.values():
            p.data = p.data + 0.3 * rng.normal(size=p.shape)
        checkpoint.save(root / name, params, CONFIG, TOKENIZER)
    return root


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_pretrain_reads_its_lines(tmp_path, capsys):
    """Pretrain reads one text a line: U+2028 does not end a line, a byte-order mark is not text."""
    data = tmp_path / "lines.txt"
    data.write_bytes("\ufeffab\r\n\nb\u2028a\r\nba\n".encode())
    run = tmp_path / "m"
    words = ["--learning-rate=0.5", "--warmup-steps=0", *SHORT, *SMALL, "--replacement", "--micro-batch-size=2"]
    assert cli.main(["pretrain", f"--data={data}", f"--out={run}", *words]) == 0
    assert "2 texts to train on, 1 held out" in capsys.readouterr().out
    saved = checkpoint.load(run)
    assert saved.tokenizer.characters == "\nab\u2028\ufffd" and saved.config == Config(6, 4, 8, 1, 2)
    metrics = lines(run / "metrics.jsonl")
    rates = [line["learning_rate"] for line in metrics if "learning_rate" in line]
    assert rates == pytest.approx([0.25 * (1 + math.cos(math.pi * s / 4)) for s in range(4)])
    assert [line["step"] for line in metrics if "eval_loss" in line] == [0, 2, 4]


def test_pretrain_on_blocks_and_held_out_texts(tmp_path):
    """With --blocks a text has several lines, and a file of held-out texts replaces the share."""
    (tmp_path / "blocks.txt").write_text("ab\nc\n\n\nb\n\nab\n\n")
    (tmp_path / "more.txt").write_text("cccccccc\n")
    words = [f"--data={tmp_path / 'blocks.txt'}", f"--held-out-data={tmp_path / 'more.txt'}", "--blocks"]
    batches = []
    right = training.sft_training_step
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "sft_training_step", lambda *a, **k: batches.append(a[3]) or right(*a, **k))
        assert cli.main(["pretrain", *words, f"--out={tmp_path / 'm'}", *SHORT, *SMALL]) == 0
    tokenizer = checkpoint.load(tmp_path / "m").tokenizer
    assert {tokenizer.decode(y) for batch in batches for _, y in batch} == {"ab\nc", "b", "ab"}
    assert checkpoint.load(tmp_path / "m").config.n_positions == 9


def test_pretrain_starts_from_a_model(folder, tmp_path, capsys):
    """Pretrain starts from --init. A text that does not fit, or has an unknown character, is named before the run."""
    data = tmp_path / "lines.txt"
    data.write_text("ab\nba\nabcd\n")
    words = ["pretrain", f"--data={data}", f"--init={folder / 'init'}", "--steps=0"]
    assert cli.main([*words, f"--out={tmp_path / 'run'}"]) == 0
    loaded, init = checkpoint.load(tmp_path / "run"), checkpoint.load(folder / "init")
    assert loaded.config == CONFIG and all((loaded.params[n].data == p.data).all() for n, p in init.params.items())
    for text, sentence in (
        ("ab\n" + "a" * 16, "16 characters, but 15 fit"),
        ("ab\nxy", "not in the vocabulary"),
        ("\n", "no text"),
    ):
        data.write_text(text)
        capsys.readouterr()
        assert cli.main([*words, f"--out={tmp_path / 'new'}"]) == 2
        assert sentence in capsys.readouterr().err and not (tmp_path / "new").exists()


def test_sft_learns_completions_or_one_or_both_responses(folder, tmp_path):
    """SFT learns completions, both responses, or the chosen one; the prompt is given, not learnt."""
    write(tmp_path / "completions.jsonl", [{"prompt": row["prompt"], "completion": "abc"} for row in ROWS])
    right = training.sft_training_step
    for data, more, expected in (
        (folder / "pairs.jsonl", [], {"ad", "bd", "cd", "dd", "cc"}),
        (folder / "pairs.jsonl", ["--responses=chosen"], {"ad", "bd", "cd", "dd"}),
        (tmp_path / "completions.jsonl", [], {"abc"}),
    ):
        batches = []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(
                training, "sft_training_step", lambda *a, batches=batches, **k: batches.append(a[3]) or right(*a, **k)
            )
            run = tmp_path / f"run{len(more)}{data.stem}"
            words = [f"--data={data}", f"--out={run}", "--steps=9", "--batch-size=4", *SMALL, *more]
            assert cli.main(["sft", *words]) == 0
        tokenizer = checkpoint.load(run).tokenizer
        assert {tokenizer.decode(y) for batch in batches for _, y in batch} == expected
        assert all(
            x[0] == 0 and tokenizer.decode(x).endswith("\n") and y[-1] == 0 for batch in batches for x, y in batch
        )
        assert checkpoint.load(run).config == Config(tokenizer.vocab_size, 512, 8, 1, 2)


def test_sft_reads_the_characters_of_the_rows_that_it_uses(tmp_path):
    """A new model's vocabulary lacks the characters of rows that are set aside: it never learns them."""
    rows = [*ROWS, {"prompt": "x" * 20, "chosen": "a", "rejected": "b"}, {"prompt": "y", "chosen": "", "rejected": "b"}]
    rows += [{"prompt": "z", "chosen": c, "rejected": r} for c, r in ("ab", "ba")]
    data = write(tmp_path / "pairs.jsonl", rows)
    for truncation, characters in (("none", "\nabcd"), ("prompt", "\nabcdx")):
        out = tmp_path / truncation
        cli.sft(data=data, out=out, steps=0, n_positions=16, n_embd=8, n_head=2, n_layer=1, truncation=truncation)
        assert checkpoint.load(out).tokenizer.characters == characters


def test_sft_starts_from_a_model(folder, tmp_path):
    """SFT starts from --init, and measures the nats per token of held-out responses."""
    run = tmp_path / "run"
    words = [f"--data={folder / 'pairs.jsonl'}", f"--init={folder / 'init'}", f"--out={run}", "--steps=0"]
    assert cli.main(["sft", *words]) == 0
    loaded, init = checkpoint.load(run), checkpoint.load(folder / "init")
    assert all((loaded.params[name].data == p.data).all() for name, p in init.params.items())
    (measured,) = lines(run / "metrics.jsonl")
    held_out = [row for row in ROWS if [row["prompt"]] == sorted({s["prompt"] for s in lines(run / "samples.jsonl")})]
    nats = [
        -chain_rule_logprob(init.params, CONFIG, [0, *TOKENIZER.encode(row["prompt"])], [*TOKENIZER.encode(row[k]), 0])
        for row in held_out
        for k in ("chosen", "rejected")
    ]
    assert len(held_out) == 1 and measured["eval_loss"] == pytest.approx(sum(nats) / 6)


@pytest.mark.parametrize(
    ("options", "loss", "nll_weight"),
    [
        ([], lambda w, l, rw, rl: losses.dpo_loss(w, l, rw, rl, 0.1), 0),
        (["--label-smoothing=0.2", "--nll-weight=2"], lambda w, l, rw, rl: losses.dpo_loss(w, l, rw, rl, 0.1, 0.2), 2),
        (["--loss=ipo", "--beta=0.7"], lambda w, l, rw, rl: losses.ipo_loss(w, l, rw, rl, 0.7), 0),
        (["--loss=reference-free"], lambda w, l, rw, rl: losses.reference_free_loss(w, l, 0.1), 0),
    ],
)
def test_dpo_minimises_the_loss_of_its_options(options, loss, nll_weight, folder, tmp_path):
    """Dpo minimises the DPO loss at beta 0.1 and nothing else, or exactly what its options name."""
    write(tmp_path / "held.jsonl", [{"prompt": "dd", "chosen": "a", "rejected": "bb"}])
    words = [f"--data={folder / 'pairs.jsonl'}", f"--init={folder / 'init'}", f"--reference={folder / 'other'}"]
    words += [f"--held-out-data={tmp_path / 'held.jsonl'}", f"--out={tmp_path / 'run'}", "--steps=0", *options]
    assert cli.main(["dpo", *words]) == 0
    (measured,) = lines(tmp_path / "run" / "metrics.jsonl")
    policy, reference = (checkpoint.load(folder / name).params for name in ("init", "other"))
    four = [
        np.array([chain_rule_logprob(params, CONFIG, [0, 5, 5], y)])
        for params in (policy, reference)
        for y in ([2, 0], [3, 3, 0])
    ]
    out = loss(*four)
    assert measured["eval_loss"] == pytest.approx(out.loss.item() - nll_weight * four[0].item() / 2)
    assert measured["eval_rewards/chosen"] == pytest.approx(out.reward_w.item())


def test_dpo_raises_the_margin_and_leaves_the_reference(folder, tmp_path):
    """Dpo raises the margin and leaves its reference alone, where it starts with ties and a loss of log 2."""
    run = tmp_path / "run"
    before = {path: path.read_bytes() for path in (folder / "init").iterdir()}
    words = [f"--data={folder / 'pairs.jsonl'}", f"--init={folder / 'init'}", f"--out={run}", "--nll-weight=0"]
    assert (
        cli.main(["dpo", *words, "--steps=30", "--batch-size=4", "--learning-rate=0.01", "--micro-batch-size=3"]) == 0
    )
    measured = [line for line in lines(run / "metrics.jsonl") if "eval_loss" in line]
    assert measured[0]["eval_loss"] == pytest.approx(math.log(2)) and measured[0]["eval_rewards/ties"] == 1
    assert measured[-1]["eval_rewards/margins"] > 0.5 and measured[-1]["eval_loss"] < 0.5
    assert {path: path.read_bytes() for path in (folder / "init").iterdir()} == before


def test_a_reference_may_have_another_shape(folder, tmp_path):
    """A reference of another shape is scored with its own sizes."""
    config = Config(TOKENIZER.vocab_size, 12, 4, 2, 1)
    checkpoint.save(tmp_path / "small", model.init(config, np.random.default_rng(3)), config, TOKENIZER)
    words = [f"--data={folder / 'pairs.jsonl'}", f"--init={folder / 'init'}", f"--reference={tmp_path / 'small'}"]
    assert cli.main(["dpo", *words, f"--out={tmp_path / 'run'}", *SHORT, "--nll-weight=0"]) == 0
    assert (
        cli.main(["dpo", *words, f"--out={tmp_path / 'again'}", "--steps=1", "--batch-size=11", "--nll-weight=0"]) == 0
    )
    (first, *_) = (line for line in lines(tmp_path / "again" / "metrics.jsonl") if "loss" in line)
    policy = checkpoint.load(folder / "init").params
    held_out = {line["prompt"] for line in lines(tmp_path / "again" / "samples.jsonl")}
    logps = [
        chain_rule_logprob(policy, CONFIG, [0, *TOKENIZER.encode(row["prompt"])], [*TOKENIZER.encode(row["chosen"]), 0])
        for row in ROWS
        if row["prompt"] not in held_out
    ]
    assert first["logps/chosen"] == pytest.approx(np.mean(logps)) and len(logps) == 11


@pytest.mark.slow
def test_sft_and_dpo_hold_out_the_same_prompts(folder, tmp_path):
    """With one file and one seed, sft and dpo hold out the same prompts."""
    held_out = []
    for seed in range(3):
        for command, more in (("sft", SMALL), ("dpo", [f"--init={folder / 'init'}"])):
            run = tmp_path / f"{command}{seed}"
            words = [command, f"--data={folder / 'pairs.jsonl'}", f"--out={run}", f"--seed={seed}", "--steps=0", *more]
            assert cli.main([*words, "--held-out-share=0.4"]) == 0
            held_out.append({line["prompt"] for line in lines(run / "samples.jsonl")})
    assert all(held_out[i] == held_out[i + 1] and len(held_out[i]) >= 3 for i in (0, 2, 4))
    assert held_out[0] != held_out[2] != held_out[4]


def test_a_prompt_s_part_depends_on_no_other_prompt(tmp_path):
    """A row more or less, usable in one command and not in another, moves no other prompt to another part."""
    data = tmp_path / "pairs.jsonl"
    run = train.Training(held_out_share=0.4)
    everything = split(write(data, ROWS), run, 0.4)
    parts = {row.prompt: i for i, part in enumerate(everything[:3]) for row in part.rows}
    assert set(parts.values()) == {0, 1, 2}
    for row in ROWS:
        others = split(write(data, [other for other in ROWS if other != row]), run, 0.4)
        assert all(parts[row.prompt] == i for i, part in enumerate(others[:3]) for row in part.rows)


def evaluated(folder, data, capsys, *more, command="evaluate"):
    words = [f"--checkpoint={folder / 'init'}", f"--reference={folder / 'other'}", f"--data={data}", *more]
    assert cli.main([command, *words]) == 0
    return capsys.readouterr()


def test_evaluate_and_score_agree_with_the_chain_rule(folder, tmp_path, capsys):
    """Evaluate and score print the numbers of the chain rule, one forward per prefix."""
    rows = [*ROWS[:3], {"prompt": "a", "chosen": "b", "rejected": "b"}, "nonsense"]
    data = write(tmp_path / "pairs.jsonl", rows)
    printed = evaluated(folder, data, capsys, "--json", "--beta=0.5")
    metrics = json.loads(printed.out)
    assert (metrics["pairs"], metrics["set_aside"], metrics["truncated"]) == (3, 2, 0)
    assert f"{data}, line 4: set aside, chosen equals rejected" in printed.err and "line 5" in printed.err
    policy, reference = (checkpoint.load(folder / name).params for name in ("init", "other"))
    table = np.array([
        [
            chain_rule_logprob(params, CONFIG, [0, *TOKENIZER.encode(row["prompt"])], [*TOKENIZER.encode(row[k]), 0])
            for params in (policy, reference)
            for k in ("chosen", "rejected")
        ]
        for row in ROWS[:3]
    ])  # fmt: skip
    w, l, ref_w, ref_l = table.T
    assert metrics["loss"] == pytest.approx(np.logaddexp(0, -0.5 * (w - ref_w - l + ref_l)).mean())
    assert metrics["rewards/accuracies"] == pytest.approx((w - ref_w > l - ref_l).mean())
    assert metrics["ref_logps/chosen"] == pytest.approx(ref_w.mean())
    assert metrics["logps/rejected"] == pytest.approx(l.mean())
    assert metrics["nll/chosen"] == pytest.approx(-w.sum() / 9)
    table_printed = evaluated(folder, data, capsys, "--beta=0.5").out
    assert f"loss                 {metrics['loss']:>12.4f}" in table_printed.splitlines()
    scores = [
        json.loads(line) for line in evaluated(folder, data, capsys, "--beta=0.5", command="score").out.splitlines()
    ]
    assert [score["line"] for score in scores] == [1, 2, 3]
    assert [score["logps/chosen"] for score in scores] == pytest.approx(list(w))
    assert [score["rewards/rejected"] for score in scores] == pytest.approx(list(0.5 * (l - ref_l)))
    assert np.mean([score["loss"] for score in scores]) == pytest.approx(metrics["loss"])
    assert cli.main(["score", f"--checkpoint={folder / 'init'}", f"--data={data}"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[0]).keys() == {
        "line", "truncated", "logps/chosen", "logps/rejected",
    }  # fmt: skip


def test_evaluate_prints_no_minus_zero(folder, capsys, monkeypatch):
    """What rounds to 0 is printed as 0."""
    monkeypatch.setattr(training, "preference_summary", lambda *_, **__: {"nll/chosen_rise": -1e-9})
    printed = evaluated(folder, folder / "pairs.jsonl", capsys, "--beta=0.5").out
    assert re.search(r"^nll/chosen_rise +0\.0000$", printed, re.MULTILINE)


@pytest.mark.parametrize("command", [["evaluate", "--json"], ["evaluate"], ["score"]])
def test_a_metric_that_is_not_finite_is_an_error(command, folder, tmp_path, capsys):
    """A metric that is not finite is an error with exit status 3; NaN, which JSON lacks, is never printed."""
    loaded = checkpoint.load(folder / "init")
    loaded.params["wpe.weight"].data[0, 0] = np.nan
    checkpoint.save(tmp_path / "nan", loaded.params, CONFIG, TOKENIZER)
    words = [f"--reference={folder / 'other'}", f"--data={folder / 'pairs.jsonl'}"]
    assert cli.main([*command, f"--checkpoint={tmp_path / 'nan'}", *words]) == 3
    assert cli.main([*command, f"--checkpoint={folder / 'init'}", *words, "--beta=1e308"]) == 3
    printed = capsys.readouterr()
    faults = [line for line in printed.err.splitlines() if "records no prompts" not in line]
    assert all("finite" in line for line in faults) and len(faults) == 2 and "nan" not in printed.out.lower()


def test_held_out_texts_that_are_trained_on_are_counted(folder, tmp_path, capsys):
    """Held-out texts that are also trained on are counted aloud."""
    (tmp_path / "texts.txt").write_text("ab\nba\nb\n")
    (tmp_path / "held.txt").write_text("ab\nba\nbb\n")
    words = ["pretrain", f"--data={tmp_path / 'texts.txt'}", f"--out={tmp_path / 'run'}", "--steps=0", *SMALL]
    assert cli.main([*words, f"--held-out-data={tmp_path / 'held.txt'}"]) == 0
    assert "2 of the held-out texts are also trained on" in capsys.readouterr().out


def test_a_policy_equal_to_its_reference_has_ties(folder, capsys):
    """A policy equal to its reference has ties and nothing else: rounding decides no pair."""
    words = [f"--checkpoint={folder / 'init'}", f"--reference={folder / 'init'}", f"--data={folder / 'pairs.jsonl'}"]
    assert cli.main(["evaluate", *words, "--json"]) == 0
    metrics = json.loads(capsys.readouterr().out)
    assert (metrics["rewards/ties"], metrics["rewards/accuracies"], metrics["nll/chosen_rise"]) == (1, 0, 0)
    assert metrics["loss"] == pytest.approx(math.log(2))


def test_unusable_rows_are_set_aside_or_refused(folder, tmp_path, capsys):
    """Rows that cannot be used are set aside by line, or refused with --strict before anything is begun."""
    data = write(tmp_path / "pairs.jsonl", [*ROWS, "{", {"prompt": "a", "chosen": "x", "rejected": "b"}, ROWS[0]])
    words = ["dpo", f"--data={data}", f"--init={folder / 'init'}", f"--out={tmp_path / 'run'}", *SHORT]
    assert cli.main([*words, "--strict"]) == 2
    error = capsys.readouterr().err
    assert "pairs.jsonl, line 13: is not JSON" in error and "3 such rows" in error and error.count("\n") == 1
    assert not (tmp_path / "run").exists()
    assert cli.main(words) == 0
    assert "pairs.jsonl: 12 rows, 3 set aside" in capsys.readouterr().out
    set_aside = lines(tmp_path / "run" / "set_aside.jsonl")
    assert [line["line"] for line in set_aside] == [13, 14, 15] and set_aside[0]["text"] == "{"
    assert "not in the vocabulary" in set_aside[1]["reason"] and "repeats line 1" in set_aside[2]["reason"]
    assert "pairs.jsonl: 12 rows, 3 set aside" in (tmp_path / "run" / "report.md").read_text()


def test_what_is_odd_about_rows_is_said_and_reported(tmp_path, capsys):
    """Replaced characters, prompts without a newline and repeated prompts are in the output and in the report."""
    start, run = tmp_path / "init", tmp_path / "run"
    config, tokenizer = Config(7, 16, 8, 1, 2), Tokenizer.from_text("\nabcd", replacement=True)
    checkpoint.save(start, model.init(config, np.random.default_rng(0)), config, tokenizer)
    data = write(tmp_path / "pairs.jsonl", [*ROWS, {"prompt": "xyz", "chosen": "xyza", "rejected": "b"}])
    words = [f"--data={data}", "--device=cpu"]
    assert cli.main(["dpo", f"--init={start}", f"--out={run}", "--steps=0", *words]) == 0
    error, report = capsys.readouterr().err, (run / "report.md").read_text()
    remarks = ("warning: 6 of 92 characters (6.5%) are unknown and read as U+FFFD", "without a final newline",
               "repeats the prompt")  # fmt: skip
    assert all(remark in error and remark in report for remark in remarks) and error.count("\n") == 3
    assert cli.main(["resume", str(run)]) == 0
    assert cli.main(["evaluate", f"--checkpoint={start}", f"--reference={start}", *words]) == 0
    error = capsys.readouterr().err
    assert all(remark in error for remark in remarks)
    assert cli.main(["sample", f"--checkpoint={start}", "--prompt=abx", "--samples=1"]) == 0
    assert "the prompt: warning: 1 of 3 characters (33.3%)" in capsys.readouterr().err
    (tmp_path / "texts.txt").write_text("ab\nbx\n")
    texts = [f"--data={tmp_path / 'texts.txt'}", f"--init={start}", "--steps=0", f"--out={tmp_path / 'texts'}"]
    assert cli.main(["pretrain", *texts]) == 0 and "1 of 4 characters" in capsys.readouterr().err


def test_long_rows_follow_the_policy(folder, tmp_path, capsys):
    """A row that is longer than the context is set aside or cut, as --truncation says, and counted."""
    data = write(tmp_path / "pairs.jsonl", [*ROWS, {"prompt": "a" * 30, "chosen": "b", "rejected": "c"}])
    words = ["dpo", f"--data={data}", f"--init={folder / 'init'}", *SHORT]
    assert cli.main([*words, f"--out={tmp_path / 'a'}"]) == 0
    assert "12 rows, 1 set aside" in capsys.readouterr().out
    assert cli.main([*words, f"--out={tmp_path / 'b'}", "--truncation=prompt"]) == 0
    assert "13 rows, 0 set aside, 1 truncated" in capsys.readouterr().out
    measure = [f"--checkpoint={folder / 'init'}", f"--data={data}", "--truncation=response"]
    assert cli.main(["score", *measure]) == 0
    assert [json.loads(line)["truncated"] for line in capsys.readouterr().out.splitlines()] == [False] * 12 + [True]


def split(data, run, test_share=0.0, truncation="prompt"):
    """The rows of a run whose model has eight positions."""
    start = checkpoint.Checkpoint({}, CONFIG, TOKENIZER, True)
    return train.read_rows(data, run, test_share, truncation, False, train.PAIRS, start, 8)


def disjoint(rows):
    """No prompt is in two parts, as written or as ids, and no part is empty."""
    for name in (lambda row, ids: row.prompt, lambda row, ids: tuple(ids[0])):
        a, b, c = ({name(*each) for each in zip(part.rows, part.ids)} for part in rows[:3])
        assert a and b and c and not (a & b or a & c or b & c)


def test_a_prompt_is_in_one_part_as_written_and_as_cut(tmp_path):
    """Rows with one prompt are in one part, though it is cut to different lengths, and however it was written."""
    rows = [{"prompt": "bbbb" + x, "chosen": y, "rejected": "dd"} for x in PROMPTS for y in ("a", "b", "cccc")]
    data, run = write(tmp_path / "pairs.jsonl", rows), train.Training(held_out_share=0.3, seed=1)
    result = split(data, run, 0.3)
    assert not result.set_aside
    disjoint(result)
    rows += [{"prompt": "dbbbb" + x, "chosen": y, "rejected": "dd"} for x in PROMPTS for y in ("d", "c", "aaaa")]
    result = split(write(data, rows), run, 0.3)
    disjoint(result)
    leaks = [line for line in map(json.loads, result.set_aside.splitlines()) if "another part" in line["reason"]]
    assert leaks and all("has the ids of line" in line["reason"] for line in leaks)


def test_two_files_have_no_prompt_in_common(tmp_path):
    """A prompt of the held-out file may not be in the other file, as written or as cut."""
    held_out = tmp_path / "held.jsonl"
    data, run = write(tmp_path / "train.jsonl", [{"prompt": "a" + "b" * 9, "chosen": "b", "rejected": "dd"}]), []
    for prompt, chosen in (("a" + "b" * 9, "cccc"), ("d" + "b" * 9, "a")):
        write(held_out, [{"prompt": prompt, "chosen": chosen, "rejected": "aa"}])
        run = train.Training(held_out_data=held_out)
        with pytest.raises(ValueError, match="line 1: this prompt is in"):
            split(data, run)
    write(held_out, [{"prompt": "c", "chosen": "d", "rejected": "aa"}])
    assert [row.prompt for row in split(data, run).held_out.rows] == ["c"]


def test_an_empty_part_is_refused_with_what_to_do(folder, tmp_path, capsys):
    """A part without a prompt is refused before anything is begun."""
    words = ["dpo", f"--data={folder / 'pairs.jsonl'}", f"--init={folder / 'init'}", f"--out={tmp_path / 'run'}"]
    for more, part in (("--held-out-share=0.001", "hold out"), ("--held-out-share=0.999", "train on"),
                       ("--test-share=0.001", "test on")):  # fmt: skip
        assert cli.main([*words, more]) == 2
        error = capsys.readouterr().err
        assert f"none of its 12 different prompts is one to {part}: add prompts, change --held-out-share" in error
        assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("command", ["sft", "dpo"])
def test_the_test_rows_are_read_once_at_the_end(command, folder, tmp_path, monkeypatch, capsys):
    """Test rows are neither trained on nor held out; the result's loss on them is measured at the end."""
    seen = []
    nll, evaluation = training.held_out_nll, training.preference_evaluation
    monkeypatch.setattr(training, "held_out_nll", lambda p, c, rows, **w: seen.append(rows) or nll(p, c, rows))
    monkeypatch.setattr(
        training, "preference_evaluation", lambda p, c, rows, *a: seen.append(rows.pairs) or evaluation(p, c, rows, *a)
    )
    run = tmp_path / "run"
    settings = {"steps": 2, "evaluate_every": 1, "test_share": 0.3, "held_out_share": 0.3, "out": run, "seed": 1}
    getattr(cli, command)(data=folder / "pairs.jsonl", init=folder / "init", **settings)
    texts = [{TOKENIZER.decode(row[0]) for row in rows} for rows in seen]
    expected = [
        {row["prompt"] for row in ROWS if preferences.part(row["prompt"], 1, 0.3, 0.3) == part} for part in range(3)
    ]
    assert texts == [expected[1]] * 3 + [expected[2]] and all(expected)
    result = checkpoint.load(run)
    if command == "sft":
        loss = nll(result.params, CONFIG, seen[-1])
        assert json.loads((run / "test.json").read_text())["loss"] == pytest.approx(loss)
    else:
        start = checkpoint.load(folder / "init").params
        batch = scoring.collate(seen[-1], *training.reference_logprobs(start, CONFIG, seen[-1]))
        expected = evaluation(result.params, CONFIG, batch, 0.1)
        assert json.loads((run / "test.json").read_text()) == pytest.approx(expected)
    assert "its loss on the test rows, which chose nothing, is" in capsys.readouterr().out


def test_a_wrong_input_is_one_sentence(folder, tmp_path, capsys):
    """A wrong file or option is one sentence, and nothing is begun."""
    leak = write(tmp_path / "leak.jsonl", [{"prompt": ROWS[2]["prompt"], "chosen": "a", "rejected": "b"}])
    shape = write(
        tmp_path / "shape.jsonl", [{"prompt": [{"role": "user", "content": "a"}], "chosen": [], "rejected": []}]
    )
    empty = write(tmp_path / "empty.jsonl", [])
    unusable = write(tmp_path / "unusable.jsonl", [{"prompt": "", "chosen": "", "rejected": "a"}])
    checkpoint.save(
        tmp_path / "foreign",
        model.init(Config(3, 16, 8, 1, 2), np.random.default_rng(0)),
        Config(3, 16, 8, 1, 2),
        Tokenizer("xy"),
    )
    pairs, out = folder / "pairs.jsonl", tmp_path / "run"
    begin = ["dpo", f"--init={folder / 'init'}", f"--out={out}", *SHORT]
    measure = ["evaluate", f"--checkpoint={folder / 'init'}", f"--data={pairs}"]
    for command, sentence in (
        ([*begin, f"--data={tmp_path / 'none'}"], "No such file"),
        ([*begin, f"--data={shape}"], "line 1: this is the conversational shape"),
        ([*begin, f"--data={empty}"], "no row can be used"),
        ([*begin, f"--data={unusable}"], "no row can be used (line 1: chosen is empty)"),
        ([*begin, f"--data={pairs}", f"--held-out-data={leak}"], "leak.jsonl, line 1: this prompt is in"),
        (
            [*begin, f"--data={pairs}", "--loss=ipo", "--label-smoothing=0.1"],
            "no option label_smoothing",
        ),
        ([*begin, f"--data={pairs}", f"--reference={tmp_path / 'foreign'}"], "must share one"),
        ([*measure, f"--reference={tmp_path / 'foreign'}"], "vocabularies of 6 and 3 ids that differ"),
        (["sft", f"--data={folder}", f"--out={out}"], "Is a directory"),
        (["sft", "--data=/dev/zero", f"--out={out}"], "regular file"),
        (
            ["sft", f"--data={pairs}", f"--init={folder / 'init'}", f"--out={out}", "--n-embd=4"],
            "--n-embd is for a new",
        ),
        (["sft", f"--data={pairs}", f"--init={folder / 'init'}", f"--out={out}", "--replacement"], "--replacement is"),
        (["pretrain", "--data=/dev/zero", f"--out={out}"], "regular file"),
        (["judge", "--checkpoint", str(folder / "init"), "--reference", str(folder / "init")], "not a model of it"),
    ):
        assert cli.main(command) == 2, command
        printed = capsys.readouterr()
        assert sentence in printed.err and printed.err.count("\n") == 1, printed.err
        assert printed.err.startswith(f"minidpo {command[0]}: ") and not out.exists(), command


@pytest.mark.parametrize(
    ("option", "sentence"),
    [
        ("--learning-rate=0", r"'0' is not a number in \(0, inf\)"),
        ("--learning-rate=nan", r"'nan' is not a number in \(0, inf\)"),
        ("--beta=-1", r"'-1' is not a number in \(0, inf\)"),
        ("--label-smoothing=0.9", r"'0\.9' is not a number in \[0, 0\.5\]"),
        ("--nll-weight=x", r"'x' is not a number in \[0, inf\)"),
        ("--held-out-share=1", r"'1' is not a number in \(0, 1\)"),
        ("--steps=1.5", r"'1\.5' is not an integer of at least 0"),
    ],
)
def test_options_are_bounded(option, sentence, capsys):
    """An option refuses values outside its range, by name, on the command line and from Python."""
    with pytest.raises(SystemExit) as caught:
        cli.main(["dpo", "--data=d", "--init=i", "--out=o", option])
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert re.search(sentence, error) and f"argument {option.split('=')[0]}" in error
    name, value = option.removeprefix("--").split("=")
    name = name.replace("-", "_")
    with pytest.raises(ValueError, match=f"dpo: {name}: {sentence}"):
        cli.dpo(data="d", init="i", out="o", **{name: value})
    _, fine = parser.parse(["dpo", "--data=d", "--init=i", "--out=o", "--label-smoothing=0.5", "--nll-weight=0"])
    assert (fine["label_smoothing"], fine["nll_weight"]) == (0.5, 0)


def test_a_batch_that_breaks_is_named_by_its_lines(folder, tmp_path, capsys):
    """Rows are named by the lines of their file, counted from 1, with those that were set aside."""
    data = write(tmp_path / "pairs.jsonl", ["{", *ROWS])
    command = ["dpo", f"--data={data}", f"--init={folder / 'init'}", f"--out={tmp_path / 'run'}", "--batch-size=11"]
    with np.errstate(all="ignore"):
        assert cli.main([*command, "--steps=9", "--learning-rate=1e200", "--warmup-steps=0"]) == 3
    held_out = {line["prompt"] for line in lines(tmp_path / "run" / "samples.jsonl")}
    numbers = [str(number) for number, row in enumerate(ROWS, start=2) if row["prompt"] not in held_out]
    assert f"after a batch of lines {', '.join(numbers)};" in capsys.readouterr().err and len(numbers) == 11


def test_a_run_resumes_with_its_own_arguments(folder, tmp_path, monkeypatch):
    """run.json holds the command line that gives the same call: every option, with absolute paths."""
    monkeypatch.chdir(folder)
    values = {"held_out_share": 0.25, "beta": np.float32(0.5), "strict": True, "truncation": "prompt", "patience": 3}
    values |= {"reference": "other", "loss": "reference_free", "nll_weight": 0, "steps": np.int64(0), "device": "cpu"}
    result = cli.dpo(data="pairs.jsonl", init="init", out=tmp_path / "run", **values)
    assert result == tmp_path / "run" / "model" and checkpoint.load(result).verified
    words = json.loads((tmp_path / "run" / "run.json").read_text())["arguments"]
    name, again = parser.parse([*words, "--out=o"])
    expected = {**values, "data": folder / "pairs.jsonl", "init": folder / "init", "reference": folder / "other"}
    expected |= {"loss": "reference-free", "seed": 0, "learning_rate": 5e-5, "held_out_data": None}
    assert name == "dpo" and {option: again[option] for option in expected} == expected
    assert all(word.startswith("--") for word in words[1:]) and "--strict" in words
    calls = []

    def record(*, resuming=False, **call):
        """Keep a call."""
        calls.append((resuming, call))

    monkeypatch.setitem(parser.COMMANDS, "dpo", parser.COMMANDS["dpo"]._replace(function=record))
    cli.resume(tmp_path / "run")
    assert calls == [(True, {**again, "out": tmp_path / "run"})]


VERSION_0_1 = """
dpo --data={0}/pairs.jsonl --held-out-share=0.1 --held-out-data={1} --steps=4 --batch-size=3 --learning-rate=0.0003
--warmup-steps=10 --evaluate-every=2 --device=cpu --truncation=none --seed=0 --init={0}/init --beta=0.2
--loss=reference-free --label-smoothing=0.0 --nll-weight=2.0
"""


def test_a_run_of_version_0_1_resumes(folder, tmp_path, monkeypatch):
    """The arguments that version 0.1 wrote mean the same, whatever the defaults are today."""
    run = tmp_path / "run"
    held_out = write(tmp_path / "held.jsonl", [{"prompt": "d", "chosen": "a", "rejected": "bb"}])
    words = VERSION_0_1.format(folder, held_out).split()
    batches = []
    right = training.preference_evaluation
    monkeypatch.setattr(training, "preference_evaluation", lambda *args: batches.append(args[3:6]) or right(*args))
    assert cli.main([*words, f"--out={run}"]) == 0
    finished = (run / "model" / "model.safetensors").read_bytes()
    description = json.loads((run / "run.json").read_text())
    description.pop("sha256")  # version 0.1 wrote none
    shutil.rmtree(run / "model")
    for file in ("latest", "metrics.jsonl", "samples.jsonl", "report.md"):
        (run / file).unlink()
    for step in run.glob("step-*"):
        shutil.rmtree(step)
    (run / "run.json").write_text(json.dumps({**description, "arguments": words}))
    assert cli.main(["resume", str(run)]) == 0
    assert (run / "model" / "model.safetensors").read_bytes() == finished
    assert {(beta, nll_weight) for beta, _, nll_weight in batches} == {(0.2, 2.0)}


@pytest.mark.parametrize("command", ["sft", "dpo"])
def test_a_split_of_version_0_1_is_refused(command, folder, tmp_path, capsys):
    """A run that held out a share in version 0.1 does not resume: its split cannot be had again."""
    run = tmp_path / "run"
    words = [command, f"--data={folder / 'pairs.jsonl'}", f"--init={folder / 'init'}", f"--out={run}", "--steps=0"]
    assert cli.main(words) == 0 and cli.main(["resume", str(run)]) == 0
    description = json.loads((run / "run.json").read_text())
    del description["split"], description["sha256"]
    (run / "run.json").write_text(json.dumps(description))
    capsys.readouterr()
    assert cli.main(["resume", str(run)]) == 2
    error = capsys.readouterr().err
    assert "version 0.1 began this run and held out other prompts; start a new run" in error and error.count("\n") == 1


@pytest.mark.slow
def test_a_collapse_is_one_line_at_the_end(folder, tmp_path, capsys, monkeypatch):
    """A run of dpo that makes the chosen responses less likely says so at its end, with what helps."""
    rows = [{"prompt": row["prompt"], "chosen": "dd", "rejected": "dddd"} for row in ROWS]
    data = write(tmp_path / "pairs.jsonl", rows)
    for nll_weight, warns in ((0, True), (5, False)):
        run = tmp_path / f"run{nll_weight}"
        settings = {"steps": 20, "batch_size": 8, "learning_rate": 0.03, "warmup_steps": 0, "nll_weight": nll_weight}
        cli.dpo(data=data, init=folder / "init", out=run, **settings)
        rise = lines(run / "metrics.jsonl")[-1]["eval_nll/chosen_rise"]
        error = capsys.readouterr().err
        assert (rise > report.CHOSEN_LOSS_WARNING) is warns and error.count("\n") == warns
        if warns:
            assert f"lost {rise:.2f} nats per token" in error and "--nll-weight helps" in error
    evaluations = iter([{"loss": 0.7, "nll/chosen_rise": 0.0}, {"loss": 0.6, "nll/chosen_rise": 0.1},
                        {"loss": 0.9, "nll/chosen_rise": 0.8}])  # fmt: skip
    monkeypatch.setattr(training, "preference_evaluation", lambda *args: next(evaluations))
    cli.dpo(data=data, init=folder / "init", out=tmp_path / "last", steps=2, evaluate_every=1)
    error = capsys.readouterr().err  # of the last evaluation, which is not the result's
    assert "lost 0.80 nats per token against the reference, more than 0.025, at step 2;" in error


def test_steps_get_their_settings(folder, tmp_path, monkeypatch):
    """A step gets the command's micro-batch size and the sweep of all workers, with gradients clipped at 1."""
    calls = {}

    def recorded(name):
        step = getattr(training, name)

        def record(*args):
            calls[name] = args
            return step(*args)

        return record

    for name in ("sft_training_step", "dpo_training_step"):
        monkeypatch.setattr(training, name, recorded(name))
    settings = {"init": folder / "init", "steps": 1, "batch_size": 3, "micro_batch_size": 2}
    cli.sft(data=folder / "pairs.jsonl", out=tmp_path / "sft", **settings)
    cli.dpo(data=folder / "pairs.jsonl", out=tmp_path / "dpo", beta=0.3, nll_weight=0.4, loss="ipo", **settings)
    *_, max_norm, micro_batch_size, sweep = calls["sft_training_step"]
    assert (max_norm, micro_batch_size, sweep.__name__) == (1, 2, "nll_sweep") and type(sweep.__self__) is Workers
    *_, beta, loss, nll_weight, max_norm, micro_batch_size, sweep = calls["dpo_training_step"]
    assert (beta, loss, nll_weight) == (0.3, losses.Choice("ipo"), 0.4)
    assert (max_norm, micro_batch_size, sweep.__name__) == (1, 2, "dpo_sweep") and type(sweep.__self__) is Workers


def test_python_gives_a_loss_of_its_own(folder, tmp_path):
    """From Python the loss may be a function; its run says what cannot resume from the command line."""

    def double(logp_w, logp_l, ref_logp_w, ref_logp_l, beta):
        return losses.dpo_loss(logp_w, logp_l, ref_logp_w, ref_logp_l, 2 * beta)

    rewards = []
    for name, loss, beta in (("own", double, 0.1), ("named", "dpo", 0.2)):
        run = tmp_path / name
        cli.dpo(data=folder / "pairs.jsonl", init=folder / "init", out=run, loss=loss, beta=beta, steps=2)
        rewards.append(lines(run / "metrics.jsonl")[-1]["eval_rewards/margins"])
    assert rewards[0] == pytest.approx(rewards[1]) and rewards[0] != 0
    assert "--loss=double" in json.loads((tmp_path / "own" / "run.json").read_text())["arguments"]
    with pytest.raises(SystemExit):
        cli.resume(tmp_path / "own")
    words = {"data": folder / "pairs.jsonl", "init": folder / "init", "out": tmp_path / "own", "steps": 2}
    assert cli.dpo(**words, loss=double, resuming=True) == tmp_path / "own" / "model"
    with pytest.raises(ValueError, match="label_smoothing is for losses with a name"):
        cli.dpo(**words, loss=double, label_smoothing=0.1)
    double.__name__ = "ipo"
    with pytest.raises(ValueError, match="ipo is the name of another loss"):
        cli.dpo(**words, loss=double)


def test_the_loss_of_the_docstring_trains(folder, tmp_path, monkeypatch):
    """The five lines in the docstring of `losses` are a run with a loss of one's own."""
    shutil.copytree(folder / "init", tmp_path / "sft")
    shutil.copy(folder / "pairs.jsonl", tmp_path / "pairs.jsonl")
    monkeypatch.chdir(tmp_path)
    code = textwrap.dedent(losses.__doc__.split("if it wants them:\n")[1])
    assert len([line for line in code.splitlines() if line]) <= 5
    exec(code.replace("loss=squared", "steps=20, loss=squared"), {**vars(minidpo), "cli": cli})
    first, *_, last = [line for line in lines(tmp_path / "run" / "metrics.jsonl") if "eval_loss" in line]
    assert first["eval_loss"] == pytest.approx(1.0) and last["eval_loss"] < 1.0


TRAINABLE = {name for name, loss in losses.LOSSES.items() if "logp_w" in inspect.signature(loss).parameters}
TRAINABLE -= {"odpo", "aot", "aot_unpaired"}


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(TRAINABLE))
def test_every_loss_of_pairs_trains(name, folder, tmp_path):
    """Ten steps from the command line lower the loss, with its own beta and options."""
    words = [f"--data={folder / 'pairs.jsonl'}", f"--init={folder / 'init'}", f"--out={tmp_path / 'run'}", "--steps=10"]
    words += [f"--loss={name.replace('_', '-')}", "--batch-size=11", "--warmup-steps=2", "--learning-rate=0.003"]
    assert cli.main(["dpo", *words]) == 0
    first, *_, last = [line["loss"] for line in lines(tmp_path / "run" / "metrics.jsonl") if "loss" in line]
    assert last < first - 1e-4
    checkpoint.load(tmp_path / "run")


def test_the_command_of_a_report_repeats_the_run(folder, tmp_path, monkeypatch):
    """Typed in another folder it makes the same metrics; it holds beta where that is the loss's own."""
    monkeypatch.chdir(folder)
    for loss, beta in (("dpo", ["--beta=0.1"]), ("sft", [])):
        run = tmp_path / "one" / loss
        assert cli.main(["dpo", "--data=pairs.jsonl", "--init=init", f"--out={run}", f"--loss={loss}", *SHORT]) == 0
        command = next(x for x in (run / "report.md").read_text().splitlines() if x.startswith("    minidpo dpo "))
        words = shlex.split(command)[1:]
        assert [word for word in words if word.startswith("--beta")] == beta
        (tmp_path / "two").mkdir(exist_ok=True)
        with monkeypatch.context() as patch:
            patch.chdir(tmp_path / "two")
            assert cli.main(words) == 0
        losses = [[row.get("loss", row.get("eval_loss")) for row in lines(tmp_path / each / loss / "metrics.jsonl")]
                  for each in ("one", "two")]  # fmt: skip
        assert losses[0] == losses[1] and len(losses[0]) == 7


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--loss=aot"], "the loss aot couples the pairs of a batch, which micro-batches and workers part"),
        (["--loss=aot-unpaired"], "couples the pairs of a batch"),
        (["--loss=odpo"], "the loss odpo needs the offset of each pair, which the data does not have"),
        (["--loss=kto"], "the loss kto is not one of pairs: it takes logp, ref_logp, desirable"),
        (["--loss=bco"], "not one of pairs"),
        (["--loss=plackett-luce"], "not one of pairs: it takes logp, ref_logp, beta"),
        (["--loss=sft", "--beta=0.2"], "the loss sft has no beta"),
        (["--loss=ipo", "--label-smoothing=0.1"], "the loss ipo has no option label_smoothing"),
        (["--loss=robust", "--label-smoothing=0.5"], "label_smoothing must lie in [0, 0.5), not 0.5"),
        (["--loss=alphapo", "--loss-options=gama=1"], "the loss alphapo has no option gama: it has gamma, alpha"),
        (["--loss=ipo", "--loss-options=tau=1"], "the loss ipo has no option tau: it has none"),
        (["--loss-options=weight=2"], "the loss dpo has no option weight: it has label_smoothing"),
        (["--loss=discopop", "--loss-options=tau=0"], "tau must be positive, not 0"),
        (["--label-smoothing=0.1", "--loss-options=label_smoothing=0.2"], "label_smoothing is given twice"),
    ],
)
def test_a_loss_that_pairs_cannot_train_is_refused(words, sentence, folder, tmp_path, capsys):
    """A loss that needs more than single pairs is refused by name and reason, before anything is written."""
    words = [f"--data={folder / 'pairs.jsonl'}", f"--init={folder / 'init'}", f"--out={tmp_path / 'run'}", *words]
    assert cli.main(["dpo", *words]) == 2
    assert sentence in capsys.readouterr().err and not (tmp_path / "run").exists()


@pytest.mark.parametrize("words", ["gamma", "gamma=", "gamma=1,gamma=2", "gamma=1,", "gamma=much", "gamma=inf"])
def test_constants_are_named_numbers(words, folder, tmp_path, capsys):
    """What is not NAME=X with a finite number, each name once, is refused by the parser."""
    files = [f"--data={folder / 'pairs.jsonl'}", f"--init={folder / 'init'}", f"--out={tmp_path / 'run'}"]
    with pytest.raises(SystemExit):
        cli.main(["dpo", *files, "--loss=simpo", f"--loss-options={words}"])
    error = capsys.readouterr().err.splitlines()[-1]
    assert "argument --loss-options: '" in error and "is not " in error and not (tmp_path / "run").exists()


def test_constants_of_a_loss_are_set_recorded_and_resumed(folder, tmp_path, monkeypatch):
    """--loss-options sets any constant of the loss by its name; run.json holds it, and a resumed run minimises it."""
    four, sizes = np.array([[-3.0], [-4.0], [-3.5], [-3.0]]), {"length_w": [2], "length_l": [5]}
    wanted = losses.LOSSES["alphapo"](*four[:2], **sizes, beta=2.0, gamma=0.3, alpha=0.125).loss.item()
    minimised = []
    right = training.preference_evaluation

    def evaluation(*args):
        minimised.append(args[4](*four, args[3], **sizes).loss.item())
        return right(*args)

    monkeypatch.setattr(training, "preference_evaluation", evaluation)
    words = ["dpo", f"--data={folder / 'pairs.jsonl'}", f"--init={folder / 'init'}", f"--out={tmp_path / 'run'}"]
    assert cli.main([*words, "--steps=2", "--loss=alphapo", "--loss-options=gamma=0.3,alpha=1.25e-1"]) == 0
    arguments = json.loads((tmp_path / "run" / "run.json").read_text())["arguments"]
    assert "--loss-options=gamma=0.3,alpha=0.125" in arguments
    before = len(minimised)
    for result in ("latest", "model", "metrics.jsonl", "samples.jsonl"):  # as if it had been killed at the start
        path = tmp_path / "run" / result
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    for step in (tmp_path / "run").glob("step-*"):
        shutil.rmtree(step)
    assert cli.main(["resume", str(tmp_path / "run")]) == 0
    assert len(minimised) == 2 * before == 4 and minimised == pytest.approx([wanted] * 4)
    run = tmp_path / "python"
    settings = {"steps": 0, "loss": "simpo", "loss_options": {"gamma": 2}}
    cli.dpo(data=folder / "pairs.jsonl", init=folder / "init", out=run, **settings)
    assert "--loss-options=gamma=2.0" in json.loads((run / "run.json").read_text())["arguments"]


def test_every_loss_trains_or_is_refused():
    """No loss is without a test of either."""
    refused = {"aot", "aot_unpaired", "odpo", "kto", "bco", "plackett_luce"}
    assert set(losses.LOSSES) == TRAINABLE | refused and not TRAINABLE & refused
