"""Where a model comes from: every link of the chain has a hash, and a changed byte is named."""

import json
import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest

from minidpo import checkpoint, cli, generation, optim
from minidpo.audit import provenance, versions
from minidpo.audit.calibration import wilson
from minidpo.cli import train
from minidpo.data import preferences
from minidpo.run import folder as run_folder
from minidpo.run import safetensors
from minidpo.tokenizer import Tokenizer

LETTERS = "\nabcd"
ROWS = [{"prompt": x + y + "\n", "chosen": y + "d", "rejected": "cc"} for x in "abc" for y in "abcd"]
NAMES = [{"source": "anna"}, {"source": "model-x", "rubric": 2}, {}]
HELD_OUT = [{"prompt": f"d{y}\n", "chosen": y, "rejected": "ab"} for y in "abcd"]
SHORT = ["--steps=4", "--evaluate-every=2", "--batch-size=3"]
STAGES = {
    "base": ["pretrain", "--data={}/texts.txt", "--n-embd=8", "--n-layer=1", "--n-head=2", "--n-positions=16"],
    "sft": ["sft", "--data={}/rows.jsonl", "--init={}/base", "--test-share=0.2", "--responses=chosen"],
    "dpo": ["dpo", "--data={}/rows.jsonl", "--held-out-data={}/held.jsonl", "--init={}/sft", "--reference={}/anchor"],
}


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Data, a base, an SFT and a DPO run, whose reference is a model from elsewhere."""
    root = tmp_path_factory.mktemp("made") / "chain"
    root.mkdir()
    write(root / "rows.jsonl", [{**row, **NAMES[i % 3]} for i, row in enumerate(ROWS)])
    write(root / "held.jsonl", HELD_OUT)
    (root / "texts.txt").write_text("".join(row["prompt"] for row in [*ROWS, *HELD_OUT]))
    for name, words in STAGES.items():
        command = [word.format(root) for word in words]
        assert cli.main([*command, *SHORT, f"--out={root / name}"]) == 0
        if name == "base":
            params, config, tokenizer, _ = checkpoint.load(root / "base")
            for p in params.values():
                p.data = p.data + np.float32(0.1)
            checkpoint.save(root / "anchor", params, config, tokenizer)
    return root


@pytest.fixture
def root(made, tmp_path):
    """A copy of the chain in the place that its files name: the original is away for a test."""
    away = made.with_name("away")
    made.rename(away)
    shutil.copytree(away, made)
    yield made
    shutil.rmtree(made, ignore_errors=True)
    away.rename(made)


def verdict(run, capsys):
    """The exit status of --verify, and its last line."""
    capsys.readouterr()
    status = cli.main(["card", str(run), "--verify"])
    return status, capsys.readouterr().out.splitlines()[-1]


def rewritten(path, add=1.0):
    """Other weights in the same file, with every checksum in it correct, as somebody might write them."""
    arrays, metadata, _ = safetensors.read(path)
    arrays["ln_f.bias"] = arrays["ln_f.bias"] + np.float32(add)
    path.write_bytes(safetensors.to_bytes(arrays, metadata))


RUN_FILES = [
    "run.json", "result.json", "tokenizer.json", "metrics.jsonl", "samples.jsonl", "latest", "model/config.json",
    "model/model.safetensors", "model/state.safetensors", "model/tokenizer.json",
]  # fmt: skip
LINKS = [
    *(f"{run}/{name}" for run in STAGES for name in RUN_FILES),
    "sft/set_aside.jsonl", "sft/test.json", "dpo/reference.safetensors",
    "texts.txt", "rows.jsonl", "held.jsonl", "anchor/model.safetensors",
]  # fmt: skip


@pytest.mark.parametrize("change", ["a byte", "absent"])
def test_a_changed_byte_in_each_link_is_named(change, root, capsys):
    """An unchanged chain holds. Each file that is changed in one byte, or that is gone, is the link that is named."""
    status, last = verdict(root / "dpo", capsys)
    assert status == 0 and re.fullmatch(r"every link holds: \d+ hashes", last)
    assert int(last.split()[3]) >= len(LINKS) - 3  # each run.json, result.json are read, not listed twice
    for name in LINKS:
        path = root / name
        content = path.read_bytes()
        if change == "absent":
            path.unlink()
        elif content:
            half = len(content) // 2
            path.write_bytes(content[:half] + bytes([content[half] ^ 1]) + content[half + 1 :])
        else:
            path.write_bytes(b"\n")
        status, last = verdict(root / "dpo", capsys)
        assert (status, last.split(":")[0]) == (1, "no longer holds"), name
        missing = f"{path.parent} is not a run's folder: it has no {path.name}"
        assert (
            str(path) in last
            or missing in last
            or (name.startswith("anchor") and f"--reference {root / 'anchor'}" in last)
        ), last
        path.write_bytes(content)
    assert verdict(root / "dpo", capsys)[0] == 0


def test_weights_rewritten_with_their_checksums_are_named(root, capsys):
    """Checksums inside a file cannot vouch for it: the hash in the run's folder, and that of the next run, do."""
    for name, link in (
        ("base/model", f"{root / 'base' / 'model' / 'model.safetensors'}: its SHA-256 was"),
        ("anchor", f"{root / 'dpo'}: --reference {root / 'anchor'}: its SHA-256 was"),
        ("step", "the result, which is step-"),
    ):
        best = run_folder.step_name(provenance.report.best(run_folder.json_lines(root / "sft/metrics.jsonl"))["step"])
        path = root / (f"sft/{best}" if name == "step" else name) / "model.safetensors"
        content = path.read_bytes()
        rewritten(path)
        assert checkpoint.load(path.parent).verified
        status, last = verdict(root / "dpo", capsys)
        assert status == 1 and link in last, last
        path.write_bytes(content)


def test_another_run_in_the_place_of_a_link_is_named(root, capsys):
    """A run whose own hashes all hold is not the one that the next run began with."""
    shutil.rmtree(root / "base")
    words = [word.format(root) for word in STAGES["base"]]
    assert cli.main([*words, *SHORT, "--seed=1", f"--out={root / 'base'}"]) == 0
    assert verdict(root / "base", capsys)[0] == 0
    status, last = verdict(root / "dpo", capsys)
    assert status == 1 and last.startswith(f"no longer holds: {root / 'sft'}: --init {root / 'base'}: its SHA-256 was")


def test_a_checksum_that_was_removed_is_missed(root, capsys):
    """run.json without its sum, and result.json without an entry or its sum, are not taken for an older version's."""
    for name, change in (
        ("run.json", lambda x: {**x, "sha256": None, "arguments": [*x["arguments"], "--strict"]}),
        ("result.json", lambda x: {**x, "sha256": None}),
        ("result.json", lambda x: {**x, "files": {}}),
    ):
        path = root / "sft" / name
        content = path.read_text()
        document = {key: value for key, value in change(json.loads(content)).items() if value is not None}
        path.write_text(json.dumps(document))
        status, last = verdict(root / "dpo", capsys)
        assert status == 1 and str(path) in last
        path.write_text(content)


def test_a_chain_that_has_moved_holds(root, tmp_path, capsys):
    """Paths that are gone are looked for beside the run; the card is the same, and a change is found there too."""
    before = provenance.card(root / "dpo")
    shutil.move(root, tmp_path / "elsewhere")
    moved = tmp_path / "elsewhere" / "dpo"
    assert verdict(moved, capsys)[0] == 0 and provenance.card(moved) == before
    (moved.parent / "texts.txt").write_text("ab\n")
    status, last = verdict(moved, capsys)
    assert status == 1 and f"--data {moved.parent / 'texts.txt'}: its SHA-256 was" in last


def test_a_result_is_sealed_once(root, capsys):
    """Every file that a run ends with has its hash, and resuming a finished run writes none of them anew."""
    files = json.loads((root / "sft" / "result.json").read_text())["files"]
    there = {p.relative_to(root / "sft").as_posix() for p in (root / "sft").rglob("*") if p.is_file()}
    drawn = {"report.md", "curves.png", "result.json"}
    assert set(files) == {name for name in there if not name.startswith("step-")} - drawn
    metrics = root / "sft" / "metrics.jsonl"
    metrics.write_text(metrics.read_text().replace('"step": 1,', '"step": 1, "more": 1,'))
    assert cli.main(["resume", str(root / "sft")]) == 0
    status, last = verdict(root / "sft", capsys)
    assert status == 1 and str(metrics) in last


def test_the_card_says_what_each_run_was_made_with(root, capsys):
    """Markdown: a table of the links with their hashes, and for each run what its files say."""
    assert cli.main(["card", str(root / "dpo")]) == 0
    card = capsys.readouterr().out
    assert card == provenance.card(root / "dpo") == provenance.card(root / "dpo" / "model")
    rows = [line.strip("| ").split(" | ") for line in card.splitlines() if line.startswith("| ") and ". `" in line]
    assert [row[:2] for row in rows] == [["1. `base`", "pretrain"], ["2. `sft`", "sft"], ["3. `anchor`", "unknown"],
                                         ["4. `dpo`", "dpo"]]  # fmt: skip
    weights = [provenance.fingerprint(checkpoint.load(root / name).params) for name in ("base", "sft", "anchor", "dpo")]
    assert [row[-1] for row in rows] == [each[:12] for each in weights]
    assert rows[3][3] == f"`sft` {weights[1][:12]}, `anchor` {weights[2][:12]}"
    *_, sft, anchor, dpo = card.split("\n## ")
    assert anchor == f"3. `anchor`\n\n- weights: {weights[2]}\n"
    best = provenance.report.best(run_folder.json_lines(root / "dpo" / "metrics.jsonl"))
    run_json = provenance.file_sum(root / "sft" / "run.json")
    for text in (
        "`minidpo dpo --data=rows.jsonl --init=sft --reference=anchor", "--held-out-data=held.jsonl",
        f"- data: `rows.jsonl`, SHA-256 {provenance.file_sum(root / 'rows.jsonl')}", "- beta: 0.1", "- loss: dpo",
        f"- init: `sft`, weights {weights[1]}, run.json {run_json}", f"- weights: {weights[3]}",
        "no roles", "not the prompt's",
        f"- best: step {best['step']}, held-out loss {best['eval_loss']:.6g}", "minidpo 0.2.0, minidpo_sha256",
        "train on 12, hold out 4, test on 0, set aside 0, source (anna 4, model-x 4, not recorded 8), "
        "rubric (2 4, not recorded 12)",
    ):  # fmt: skip
        assert text in dpo, text
    test = json.loads((root / "sft" / "test.json").read_text())
    assert f"- on the test rows: loss {test['loss']:.6g}" in sft and str(root) not in card
    for sentence in provenance.report.warnings(run_folder.json_lines(root / "dpo" / "metrics.jsonl")):
        assert f"- **warning**: {sentence}" in dpo
    report = (root / "dpo" / "report.md").read_text()
    assert "source: anna 4, model-x 4, not recorded 8; rubric: 2 4, not recorded 12." in report


@pytest.mark.parametrize("stage", list(STAGES))
def test_the_recipe_is_that_of_the_steps(stage, root, tmp_path, monkeypatch):
    """Optimizer, clipping and decoder in run.json are those that the steps and the samples were made with."""
    steps, draws = [], []
    clip, generate = optim.clip_global_norm, generation.generate
    monkeypatch.setattr(optim, "clip_global_norm", lambda params, norm: steps.append(norm) or clip(params, norm))
    monkeypatch.setattr(
        train, "generate", lambda *args, **words: draws.append((args, words)) or generate(*args, **words)
    )
    optimizers, step = [], optim.Optimizer.step
    monkeypatch.setattr(optim.Optimizer, "step", lambda self: optimizers.append(self) or step(self))
    words = [word.format(root) for word in STAGES[stage]]
    assert cli.main([*words, *SHORT, "--seed=3", f"--out={tmp_path / 'run'}"]) == 0
    recipe = run_folder.run_description(tmp_path / "run")["recipe"]
    assert set(recipe) == set(provenance.RECIPE) and {recipe["clip"]["max_norm"]} == set(steps) == {1.0}
    for each in optimizers:
        assert recipe["optimizer"] == {"name": "AdamW", "betas": list(each.betas), "eps": each.eps,
                                       "weight_decay": each.weight_decay}  # fmt: skip
    assert recipe["optimizer"]["weight_decay"] == (0 if stage == "dpo" else 0.01) and recipe["samples"]["seed"] == 3
    assert all(words == {k: recipe["samples"][k] for k in ("temperature", "top_k", "top_p")} for _, words in draws)
    (x, y), *_ = [(args[2], args[3]) for args, _ in draws]
    again = np.random.default_rng([3, *b"samples"])
    assert len(draws) == 3 and y.bit_generator.seed_seq.entropy == again.bit_generator.seed_seq.entropy and x


def aged(run):
    """A run as version 0.1 left it."""
    description = json.loads((run / "run.json").read_text())
    for name in ("recipe", "counts", "sha256", "split", "init_run_sha256"):
        description.pop(name, None)
    for name in ("minidpo", "minidpo_sha256", "python"):
        del description["environment"][name]
    (run / "run.json").write_text(json.dumps(description))
    (run / "result.json").unlink()


def test_an_older_run_has_a_card_that_says_what_is_not_recorded(root, capsys):
    """What version 0.1 did not write is not a broken link; what it did write is still verified."""
    for name in STAGES:
        aged(root / name)
    status, last = verdict(root / "dpo", capsys)
    assert status == 0 and last.startswith("every link holds: ")
    card = provenance.card(root / "dpo")
    for name in (*provenance.RECIPE, "rows"):
        assert card.count(f"- {name}: not recorded") == 3, name
    rewritten(root / "base" / "model" / "model.safetensors")
    assert "the result, which is step-" in verdict(root / "dpo", capsys)[1]


def test_an_older_run_resumes_and_says_what_has_changed(root, capsys, monkeypatch):
    """A changed version or source of minidpo is one sentence; a run that recorded none resumes as well."""
    aged(root / "base")
    capsys.readouterr()
    assert cli.main(["resume", str(root / "base")]) == 0
    assert "minidpo was not recorded and is '0.2.0'" in capsys.readouterr().err
    monkeypatch.setattr(run_folder, "tree_sum", lambda root: "0" * 64)
    assert cli.main(["resume", str(root / "dpo")]) == 0
    error = capsys.readouterr().err
    assert re.search(rf"minidpo_sha256 was '[0-9a-f]{{64}}' and is '{'0' * 64}'; the last bits", error)


def test_the_hash_of_the_sources_has_names_and_contents(tmp_path):
    """A change of a source's name, content or place changes it; another kind of file does not."""
    (tmp_path / "room").mkdir()
    sums = []
    for name, content in (
        ("a.py", "x"),
        ("a.py", "y"),
        ("b.py", "y"),
        ("room/b.py", "y"),
        ("c.html", ""),
        ("d.toml", ""),
    ):
        (tmp_path / name).write_text(content)
        sums.append(run_folder.tree_sum(tmp_path))
    for old, new in (("a.py", "z.py"), ("z.py", "room/z.py")):
        (tmp_path / old).rename(tmp_path / new)
        sums.append(run_folder.tree_sum(tmp_path))
    assert len(set(sums)) == 8
    (tmp_path / "e.pyc").write_text("x")
    assert run_folder.tree_sum(tmp_path) == sums[-1]


HOSTILE = "`</td>| **x** <script>\n# y [z](http://a.b)\u202e\x1b[31m"


def test_hostile_text_is_escaped(root, tmp_path, capsys):
    """A source, a file's name and a run.json from anywhere stay text: no markup, no line, no terminal code."""
    name = "x`|<b>.jsonl"
    write(root / name, [{**row, "source": HOSTILE, "rubric": ["\ud800", HOSTILE]} for row in ROWS])
    words = ["dpo", f"--data={root / name}", f"--init={root / 'sft'}", *SHORT, f"--out={root / 'b`<i>'}"]
    assert cli.main(words) == 0
    card = provenance.card(root / "b`<i>")
    assert card.isascii() and "\x1b" not in card
    plain = re.sub(r"`[^`\n]*`", "", card)
    assert not set("`<>[]#*|") & set(re.sub(r"^(\|.*\||#+ .*)$|\*\*warning\*\*", "", plain, flags=re.MULTILINE))
    assert all(line.count("|") == 6 for line in plain.splitlines() if "|" in line)
    assert "source (" in card and r"\x60</td>\x7c **x**" in card
    for change in ({"counts": [1]}, {"recipe": "x"}, {"data_sha256": {"a": None}}, {"counts": {HOSTILE: HOSTILE}}):
        document = {**json.loads((root / "dpo/run.json").read_text()), **change}
        document["sha256"] = run_folder.description_sum(document)
        (root / "dpo" / "run.json").write_text(json.dumps(document))
        assert "<script" not in re.sub(r"`[^`\n]*`", "", provenance.card(root / "dpo"))
    mdit = pytest.importorskip("markdown_it")
    html = mdit.MarkdownIt("gfm-like", {"linkify": False}).render(card)
    tags = set(re.findall(r"<(/?\w+)", html)) - {f"{end}{tag}" for end in ("", "/") for tag in
           ("h1", "h2", "table", "thead", "tbody", "tr", "th", "td", "ul", "li", "p", "code", "strong")}  # fmt: skip
    assert not tags


def test_what_is_not_a_chain_is_one_sentence(root, tmp_path, capsys):
    """A folder without a run, a run that follows from itself, and an unfinished run are said."""
    assert cli.main(["card", str(tmp_path)]) == 2 and "is not a run's folder" in capsys.readouterr().err
    run_folder.create(tmp_path / "demo", {"arguments": ["demo", "--seed=0"]}, {})
    assert cli.main(["card", str(tmp_path / "demo")]) == 2 and "trains no model itself" in capsys.readouterr().err
    run_folder.create(tmp_path / "loop", {"arguments": ["sft", f"--init={tmp_path / 'loop'}"]}, {})
    assert cli.main(["card", str(tmp_path / "loop")]) == 2 and "follows from itself" in capsys.readouterr().err
    run_folder.create(tmp_path / "new", {"arguments": ["sft", "--data=x"], "recipe": {}}, {})
    assert cli.main(["card", str(tmp_path / "new")]) == 0 and "- weights: not finished" in capsys.readouterr().out
    assert verdict(tmp_path / "new", capsys)[0] == 1


def test_sources_are_counted_up_to_a_hundred():
    """The commonest hundred have their names, in at most a hundred characters; the others are counted together."""
    rows = [
        preferences.Row(i, "", (), json.dumps({"source": f"{'x' * 200 if i < 9 else i % 150}"})) for i in range(600)
    ]
    rows += [preferences.Row(0, "", (), json.dumps({"source": None, "rubric": [1]}))]
    found = versions.counts({"train on": rows}, "{}\n{}\n")
    assert found["source"]["x" * 100] == 9 and len(found["source"]) == 102 and found["source"]["not recorded"] == 1
    assert sum(found["source"].values()) == 601 and found["rubric"] == {"[1]": 1, "not recorded": 600}
    assert found["train on"] == 601 and found["set aside"] == 2 and found["source"]["others"] == 600 - 9 - 99 * 4


# ---- two versions of the data ---------------------------------------------------------------------------------------


def pairs_run(folder, rows, name="dpo"):
    """A run of dpo on these rows, as its folder has it before the first step."""
    data = write(folder.with_suffix(".jsonl"), rows)
    usable = preferences.usable_rows(data, preferences.PAIRS, Tokenizer(LETTERS), 16, "none", False)
    description = {"arguments": [name, f"--data={data}"], "data_sha256": provenance.file_sum(data)}
    run_folder.create(folder, description, {"set_aside.jsonl": usable.set_aside})
    return folder


def edited(rows, rng):
    """The rows with some dropped, some with their sides swapped, some new, some twice, some in conflict, shuffled."""
    result = []
    for row in rows:
        u = rng.random()
        swapped = {**row, "chosen": row["rejected"], "rejected": row["chosen"]}
        result += (
            [] if u < 0.2 else [swapped] if u < 0.4 else [row, row] if u < 0.5 else [row, swapped] if u < 0.6 else [row]
        )
    texts = ["".join(rng.choice(list("abcd"), 3)) for _ in range(12)]
    result += [{"prompt": x + "\n", "chosen": "a", "rejected": "b"} for x in texts]
    return [result[i] for i in rng.permutation(len(result))]


@pytest.mark.parametrize("seed", range(8))
def test_changes_are_those_that_a_loop_over_all_rows_finds(seed, tmp_path):
    """Added, removed and relabelled rows, and the flip rate with Wilson's interval, by source too."""
    rng = np.random.default_rng(seed)
    rows = [{**row, **NAMES[rng.integers(3)]} for row in [*ROWS, *HELD_OUT]]
    versions_of = [rows, edited(rows, rng)]
    used = []
    for each in versions_of:
        triples = [(r["prompt"], r["chosen"], r["rejected"]) for r in each]
        firsts = [i for i, t in enumerate(triples) if t not in triples[:i]]
        used.append({i + 1: triples[i] for i in firsts if (triples[i][0], *triples[i][:0:-1]) not in triples})
    old, new = used
    same = [(i, j) for i, a in new.items() for j, b in old.items() if a == b]
    flipped = [(i, j) for i, a in new.items() for j, b in old.items() if a == (b[0], b[2], b[1])]
    found = versions.changes(pairs_run(tmp_path / "b", versions_of[1]), pairs_run(tmp_path / "a", rows))
    assert [(a.line, b.line) for a, b in found.relabelled] == sorted(flipped)
    assert sorted((a.line, b.line) for a, b in found.both) == sorted(same + flipped)
    assert {row.line for row in found.added} == set(new) - {i for i, _ in same + flipped}
    assert {row.line for row in found.removed} == set(old) - {j for _, j in same + flipped}
    text, n = versions.as_text(found), len(same + flipped)
    low, high = wilson(len(flipped), n)
    assert text.startswith(f"{len(found.added)} rows added, {len(found.removed)} removed\n{len(flipped)} of {n} pairs")
    assert f", {len(flipped) / n:.3f} ({low:.3f} to {high:.3f})\n" in text
    anna = [sum(versions_of[1][i - 1].get("source") == "anna" for i, _ in each) for each in (flipped, same + flipped)]
    assert f"  source anna: {anna[0]} of {anna[1]} pairs" in text or not anna[1]


def test_votes_of_one_pair_are_one_label(tmp_path, monkeypatch):
    """Where rows repeat, what most of them prefer is the label; an equal vote is none, and added rows are counted."""
    row, swapped = ("a\n", ("b", "c")), ("a\n", ("c", "b"))
    for new, old, expected in (
        ([row], [swapped], (0, 0, 1, 1)),
        ([row, row, swapped], [row], (2, 0, 0, 1)),
        ([row, swapped, swapped], [row, row, swapped], (0, 0, 1, 1)),
        ([row, swapped], [row], (1, 0, 0, 0)),
        ([], [row, row], (0, 2, 0, 0)),
    ):
        sides = [[preferences.Row(i, *each, "{}") for i, each in enumerate(rows)] for rows in (new, old)]
        monkeypatch.setattr(versions, "rows_of", lambda run, sides=sides: sides.pop(0))
        assert tuple(map(len, versions.changes(tmp_path, tmp_path))) == expected


def test_a_long_list_is_cut_and_data_that_has_changed_is_refused(tmp_path, capsys):
    """At most twenty rows of a kind are listed; rows are only read from data whose hash is that of the run."""
    rows = [{"prompt": a + b + c + "\n", "chosen": "d", "rejected": "b"} for a in "abcd" for b in "abcd" for c in "ab"]
    new, old = pairs_run(tmp_path / "new", rows), pairs_run(tmp_path / "old", rows[:1])
    assert cli.main(["card", str(new), "--against", str(old)]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("31 rows added, 0 removed\n0 of 1 pairs") and "\nadded, the first 20 of 31\n" in printed
    assert printed.count("\n  line ") == 20 and "  line 2: 'aab\\n' | 'd' | 'b'\n" in printed
    with (tmp_path / "old.jsonl").open("a") as file:
        file.write("\n")
    assert cli.main(["card", str(new), "--against", str(old)]) == 2
    assert "old.jsonl: has changed since" in capsys.readouterr().err
    (tmp_path / "old.jsonl").unlink()
    assert cli.main(["card", str(new), "--against", str(old)]) == 2
    assert "old.jsonl: cannot be read" in capsys.readouterr().err
    run_folder.create(tmp_path / "base", {"arguments": ["pretrain"]}, {})
    assert cli.main(["card", str(new), "--against", str(tmp_path / "base")]) == 2
    assert "is not a run of sft or dpo" in capsys.readouterr().err


PAGE = Path(provenance.__file__).with_name("README.md")


def test_the_example_is_what_the_commands_print(tmp_path, monkeypatch, capsys):
    """The page's commands give its lines, up to hashes and the last digits, which the machine decides."""
    text = PAGE.read_text()
    commands = [line for line in text.split("```sh\n")[1].split("```")[0].splitlines()]
    monkeypatch.chdir(tmp_path)
    printed = ""
    for line in commands:
        capsys.readouterr()
        assert cli.main(shlex.split(line)[1:]) == 0
        printed += capsys.readouterr().out

    def masked(text):
        return re.sub(r"\b[0-9a-f]{12,64}\b", "#", re.sub(r"\d\.\d+", "#", text))

    for block in re.findall(r"```(?:markdown|text)\n(.*?)```", text, re.DOTALL):
        for line in filter(None, block.splitlines()):
            assert all(part in masked(printed) for part in masked(line).split("...")), line


def test_the_majority_counts_votes():
    """Votes decide which response is preferred, whichever side of a row it is on; where they are equal, none is."""

    def row(line, w, l, *votes):
        return preferences.Row(line, "x", (w, l), "", votes)

    assert versions.majority([row(1, "a", "b", 3.0, 7.0)]).responses == ("b", "a")
    both = [row(1, "a", "b", 3.0, 2.0), row(2, "b", "a", 2.0, 0.0)]
    assert versions.majority(both)[:3] == (2, "x", ("b", "a"))
    assert versions.majority([row(1, "a", "b", 1.0, 0.0), row(2, "b", "a", 1.0, 0.0)]) is None
    tenths = [row(1, "a", "b", 0.1, 0.9)] * 3 + [row(2, "b", "a", 0.1, 0.9)] * 3
    assert versions.majority(tenths) is None
    assert versions.majority([row(4, "a", "b", 0.7, 0.3)])[:3] == (4, "x", ("a", "b"))
