"""Options whose result is not a number do what their help says; `wiring.CASES` names the test of each."""

import json
import shutil

import numpy as np
import pytest

from device_double import ndarray
from minidpo import checkpoint, cli, generation, model, scoring, tokenizer, training, world
from minidpo.audit import gates, proxy, replies
from minidpo.cli import measure
from minidpo.run.folder import digest, json_lines, prompts_document
from minidpo.streams import stream
from minidpo.tokenizer import printable
from twin import CONFIG, differences, expected
from wiring import BASE, CASES, MANY, outcome, recorded, result_of

pytestmark = pytest.mark.usefixtures("one_process")
OTHERS = [(case, name) for name, cases in CASES.items() for case in cases.values() if isinstance(case, str)]


def having(case):
    """The commands with an option of this case."""
    return pytest.mark.parametrize("name", sorted({name for each, name in OTHERS if each == case}))


def test_every_case_has_its_test():
    """A case that names a test has it."""
    assert all(f"test_an_option_{case}" in globals() for case, _ in OTHERS)


@having("names_the_folder")
def test_an_option_names_the_folder(name, root, tmp_path):
    """Everything that a run writes is in the folder of --out."""
    result = result_of(root, tmp_path, name, {**BASE[name], "out": "there"})
    assert [path.name for path in tmp_path.iterdir()] == ["there"] and result.parent == tmp_path / "there"


def watched(monkeypatch):
    """The prompts of each evaluation and each step, as they come; a text alone is its own."""
    batches = []
    places = {"sft_training_step": 3, "dpo_training_step": 4, "held_out_nll": 2, "preference_evaluation": 2}
    for function, place in places.items():

        def record(*args, place=place):
            examples = getattr(args[place], "pairs", args[place])
            batches.append({tuple(y if len(x) == 1 else x) for x, y, *_ in examples})

        recorded(monkeypatch, training, function, record)
    return batches


@having("holds_out_a_share")
def test_an_option_holds_out_a_share(name, root, tmp_path, monkeypatch):
    """No prompt or text is both trained on and held out, and a larger share holds out more of them."""
    batches, counts = watched(monkeypatch), []
    for share in (0.2, 0.6):
        result_of(root, tmp_path, name, {**BASE[name], **MANY, "held_out_share": share, "out": f"run{share}"})
        held_out, trained, _ = batches[-3:]
        assert trained and held_out and not trained & held_out
        counts.append((len(held_out), len(trained)))
    (few, more), (many, fewer) = counts
    assert many > 1.5 * few and more > 1.3 * fewer


@having("tests_on_a_share")
def test_an_option_tests_on_a_share(name, root, tmp_path, monkeypatch):
    """The result is measured once, at the end, on prompts that are neither trained on nor held out."""
    batches = watched(monkeypatch)
    result_of(root, tmp_path, name, {**BASE[name], **MANY, "held_out_share": 0.3, "test_share": 0.3})
    held_out, trained, again, test = batches
    assert held_out == again and test and not test & (held_out | trained)


@having("leaves_the_gradient")
def test_an_option_leaves_the_gradient(name, root, tmp_path, monkeypatch):
    """Micro-batches give the result of the batch, from forward passes of that many examples."""
    sizes = set()
    for function in ("shared_logprobs", "packed_logprobs"):
        recorded(monkeypatch, training, function, lambda params, _, examples: sizes.add(
            len(examples) if params["wte.weight"].requires_grad else 0))  # fmt: skip
    result = outcome(root, tmp_path, name, {**BASE[name], "micro_batch_size": 3})
    assert differences(result, expected(root, name, BASE[name]), 1e-6) == []
    assert sizes - {0} == {3, 1}


@having("moves_the_arrays")
def test_an_option_moves_the_arrays(name, root, tmp_path, monkeypatch, cupy):
    """With --device cuda every forward pass has the device's arrays, and the result is the same."""
    right, kinds, rel = expected(root, name, BASE[name]), set(), 0.08 if name == "sample" else 1e-6
    for module in (model, scoring, generation):
        recorded(monkeypatch, module, "row_logits", lambda params, *_: kinds.add(type(params["wte.weight"].data)))
    assert differences(outcome(root, tmp_path, name, {**BASE[name], "device": "cuda"}), right, rel) == []
    assert kinds == {ndarray}


@having("prints_the_result")
def test_an_option_prints_the_result(name, root, tmp_path, capsys):
    """With --json the output is the result, which is that of the twin."""
    result = result_of(root, tmp_path, name, {**BASE[name], "json": True})
    assert json.loads(capsys.readouterr().out) == json.loads(json.dumps(result))
    assert differences({"numbers": result}, expected(root, name, BASE[name]), 1e-6) == []


@having("is_measured")
def test_an_option_is_measured(name, root, tmp_path):
    """With --calibration the Brier score is that of the pairs' own scores, whichever side is first."""
    scores = result_of(root, tmp_path, "score", {**BASE[name], "beta": 0.7})
    z = np.array([row["rewards/chosen"] - row["rewards/rejected"] for row in scores])
    found = result_of(root, tmp_path, name, {**BASE[name], "beta": 0.7, "calibration": True})
    assert found["calibration"]["brier"] == pytest.approx(np.mean((1 + np.exp(z)) ** -2.0), rel=1e-6)
    assert found["loss"] == pytest.approx(np.mean(np.logaddexp(0, -z)), rel=1e-6)


@having("lets_seen_prompts_in")
def test_an_option_lets_seen_prompts_in(name, root, tmp_path):
    """A prompt that the run trained on or chose by is refused by its place, and measured with --seen."""
    prompts = [json.loads(line)["prompt"] for line in (root / "pairs.jsonl").read_text().splitlines()]
    prompts = prompts if name == "evaluate" else [x + "\n" for x in world.split(0)[2]]
    (root / "desk/prompts.json").write_text(prompts_document({"trained on": prompts[:1]}))
    (root / "seen").mkdir(exist_ok=True)
    (root / "seen/prompts.json").write_text(prompts_document({"chose its checkpoint by": prompts}, [root / "desk"]))
    shutil.copytree(root / ("init" if name == "evaluate" else "desk"), root / "seen/model", dirs_exist_ok=True)
    (root / "seen/model/prompts.json").unlink(missing_ok=True)
    (root / "desk/prompts.json").unlink()
    checkpoint = "seen/model" if name == "evaluate" else ["seen/model"]
    options = {**BASE[name], "checkpoint": checkpoint}
    place = "pairs.jsonl, line 1" if name == "evaluate" else "seed 0, "
    with pytest.raises(ValueError, match=f"{place}.*seen/model chose its checkpoint by this prompt"):
        result_of(root, tmp_path, name, options)
    result = outcome(root, tmp_path, name, {**options, "seen": True})
    for row in result["numbers"] if name == "judge" else []:
        row["model"] = "desk"
    assert differences(result, expected(root, name, BASE[name]), 1e-6) == []


def test_prompts_of_the_models_that_a_run_begins_with_count_as_seen(root, tmp_path):
    """A run of dpo records its own prompts, and those that the runs of --init and of --reference have used."""
    for folder, prompt in (("began", "of init"), ("compared", "of reference")):
        shutil.copytree(root / ("init" if folder == "began" else "other"), root / folder, dirs_exist_ok=True)
        (root / folder / "prompts.json").write_text(prompts_document({"trained on": [prompt]}))
    result_of(root, tmp_path, "dpo", {**BASE["dpo"], "init": "began", "reference": "compared"})
    seen = json.loads((tmp_path / "run/prompts.json").read_text())
    assert {seen[digest(prompt)] for prompt in ("of init", "of reference")} == {"trained on"}
    own = {json.loads(line)["prompt"] for line in (root / "held.jsonl").read_text().splitlines()}
    assert {seen.get(digest(prompt)) for prompt in own} == {"chose its checkpoint by"}


@having("is_a_gate")
def test_an_option_is_a_gate(name, root, tmp_path):
    """A figure on the wrong side of its limit is named with it; on the right side nothing changes."""
    numbers = outcome(root, tmp_path, name, BASE[name])["numbers"]
    metric, figure = ("reward", numbers[0]["reward"]) if name == "judge" else ("loss", numbers["loss"])
    for option, side in (("at_most", 1), ("at_least", -1)):
        right = outcome(root, tmp_path, name, {**BASE[name], option: f"{metric}={figure + side * 0.5}"})
        assert differences(right, expected(root, name, BASE[name]), 1e-6) == []
        words = f": {metric} is .*, and must be {option.replace('_', ' ')} {figure - side * 0.5:g}"
        with pytest.raises(gates.GateError, match=words):
            result_of(root, tmp_path, name, {**BASE[name], option: f"{metric}={figure - side * 0.5}"})


@having("groups_the_pairs")
def test_an_option_groups_the_pairs(name, root, tmp_path, capsys):
    """With --slices each group has the metrics that its rows have in a file of their own, and a gate can name them."""
    lines = [json.loads(line) for line in (root / "pairs.jsonl").read_text().splitlines()]
    parts = {"even": lines[::2], "odd": lines[1::2]}
    both = [{**row, "kind": ("even", "odd")[i % 2]} for i, row in enumerate(lines)]
    for part, rows in {**parts, "both": both}.items():
        (root / f"{part}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = {**BASE[name], "data": "both", "slices": "kind"}
    found = result_of(root, tmp_path, name, options)["slices"]
    assert list(found) == ["even", "odd"] and "kind" in capsys.readouterr().out
    for part in parts:
        own = result_of(root, tmp_path, name, {**BASE[name], "data": part})
        assert found[part]["pairs"] == own["pairs"]
        for metric in set(own) - {"pairs", "set_aside", "truncated"}:
            assert found[part][metric].value == pytest.approx(own[metric], rel=1e-9), metric
    with pytest.raises(gates.GateError, match=r": odd/loss is .*, and must be at most -1"):
        result_of(root, tmp_path, name, {**options, "at_most": "odd/loss=-1"})


@having("shows_failures")
def test_an_option_shows_failures(name, root, tmp_path, capsys):
    """With --failures the worst replies are printed, that many; without it none."""
    for count in (None, 2):
        result = result_of(root, tmp_path, name, {**BASE[name], "failures": count})
        text = capsys.readouterr().out
        assert ("the worst 2" in text) == (count == 2) and ("garbled" in text)
    assert printable(result[0]["replies"][0])[:40] in text


@having("asks_otherwise")
def test_an_option_asks_otherwise(name, root, tmp_path, capsys):
    """With --templates there is a row for each template; as trained it has the judged reward, and --out keeps all."""
    result = result_of(root, tmp_path, name, {**BASE[name], "templates": True, "out": "kept"})
    kept = [json.loads(line) for line in (tmp_path / "kept/templates.jsonl").read_text().splitlines()]
    assert [row["template"] for row in kept[:: len(result[0]["replies"])]] == list(world.TEMPLATES)[1:]
    assert {label for row in kept for label in row["replies"]} == {"desk", "desk_other"}
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith(tuple(world.TEMPLATES))]
    assert [row[:20].strip() for row in rows] == list(world.TEMPLATES)
    assert f"{result[0]['reward']:.2f}" in rows[0]


@having("judges_a_run")
def test_an_option_judges_a_run(name, root, tmp_path):
    """Every N steps the log has reward, KL and share of sentences of the replies to held-out prompts, and no other
    number changes; prompts of another world, and steps without an evaluation, are refused.
    """
    rows = world.preferences(world.split(0)[0][:20], 30, np.random.default_rng(0))
    lines = [json.dumps({**row, "prompt": row["prompt"] + "\n"}) for row in rows]
    (root / "customers.jsonl").write_text("\n".join(lines) + "\n")
    options = {**BASE[name], "data": "customers", "held_out_data": None, "init": "desk", "reference": "desk_other",
               "evaluate_every": 1, "steps": 3, "held_out_share": 0.3, "truncation": "response"}  # fmt: skip
    plain, tried = (outcome(root, tmp_path, name, {**options, **more, "out": out})
                    for more, out in (({}, "plain"), ({"judge_every": 2}, "judged")))  # fmt: skip
    names = ("eval_judge/reward", "eval_judge/kl", "eval_judge/well_formed")
    logged = {line["step"]: [line.pop(each) for each in names] for line in tried["lines"] if names[0] in line}
    assert list(logged) == [0, 2]
    for line in [*plain["lines"], *tried["lines"]]:
        line.pop("tokens_per_second", None)
    assert differences(tried, plain, 1e-12) == []
    held_out = {line["prompt"] for line in json_lines(tmp_path / "judged/samples.jsonl", ("prompt", "response"))}
    ref, saved = checkpoint.load(root / "desk_other"), json.loads((tmp_path / "judged/prompts.json").read_text())
    asked = [x for x in dict.fromkeys(row["prompt"] for row in rows)
             if saved[digest(x + "\n")] == "chose its checkpoint by"]  # fmt: skip
    assert held_out <= {x + "\n" for x in asked}
    own = replies.judged(checkpoint.load(root / "desk"), ref, asked, 0)
    assert logged[0] == pytest.approx([np.mean([each.reward for each in own.judgements]), np.mean(own.ratios),
                                       np.mean([each.well_formed for each in own.judgements])])  # fmt: skip
    with pytest.raises(ValueError, match="--judge-every=3 is not a multiple of --evaluate-every=2"):
        result_of(root, tmp_path, name, {**options, "evaluate_every": 2, "judge_every": 3, "out": "other"})
    with pytest.raises(ValueError, match=r"--judge-every: '.*' is not a prompt of the demo's world"):
        result_of(root, tmp_path, name, {**BASE[name], "judge_every": 1, "out": "other"})


@having("keeps_the_replies")
def test_an_option_keeps_the_replies(name, root, tmp_path):
    """With --out every reply of every model is kept with its reward, and the figures with their intervals."""
    result = result_of(root, tmp_path, name, {**BASE[name], "out": "kept"})
    rows = [json.loads(line) for line in (tmp_path / "kept/replies.jsonl").read_text().splitlines()]
    assert [row["replies"]["desk"]["reply"] for row in rows] == result[0]["replies"]
    assert all(row["replies"][model]["reward"] == world.judgement(row["prompt"], row["replies"][model]["reply"]).reward
               for row in rows for model in ("desk", "desk_other"))  # fmt: skip
    figures = json.loads((tmp_path / "kept/figures.json").read_text())["desk"]["all"]
    assert figures["reward"][0] == result[0]["reward"] and figures["n"] == len(rows)


@having("counts_labels")
def test_an_option_counts_labels(name, root, tmp_path):
    """With --repeats=count a step on three different pairs is the step on the seven rows that hold them."""
    step = {"steps": 1, "batch_size": 3} if name == "dpo" else {}
    options = {**BASE[name], **step, "data": "repeated"}
    right = expected(root, name, {**options, "batch_size": 7} if step else options)
    if "numbers" in right:
        right["numbers"] |= {"pairs": 3, "set_aside": 0, "truncated": 0, "labels": 7, "pairs/split": 2 / 3}
    assert differences(outcome(root, tmp_path, name, {**options, "repeats": "count"}), right, 1e-6) == []
    assert differences(outcome(root, tmp_path / "aside", name, options), right, 1e-6) != []


@having("draws_diagrams")
def test_an_option_draws_diagrams(name, root, tmp_path):
    """The picture needs --calibration, and is not drawn over another file."""
    pytest.importorskip("matplotlib")
    options = {**BASE[name], "plot": tmp_path / "roc.png"}
    with pytest.raises(ValueError, match="--plot needs --calibration"):
        result_of(root, tmp_path, name, options)
    result_of(root, tmp_path, name, {**options, "calibration": True})
    assert (tmp_path / "roc.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="exists already"):
        result_of(root, tmp_path, name, {**options, "calibration": True})


@having("is_under_pressure")
def test_an_option_is_under_pressure(name, root, tmp_path, capsys, monkeypatch):
    """With --proxy the reference's replies are chosen by the model's implicit reward, which its run's beta scales."""
    asked = []
    monkeypatch.setattr(proxy, "SIZES", (1, 2))
    for function in ("best_of_reference", "edits_of_policy"):
        recorded(
            monkeypatch, proxy, function, lambda policy, reference, beta, *_: asked.append((policy, reference, beta))
        )
    monkeypatch.setattr(measure, "results", lambda tasks, what: (task() for task in tasks))
    result_of(root, tmp_path, name, {**BASE[name], "proxy": True, "out": "pressed"})
    text = capsys.readouterr().out
    assert "desk's implicit reward as a judge of desk_other's replies" in text and "replies with both" in text
    weights = [[model.params["wte.weight"].data for model in each[:2]] for each in asked]
    for own, ref in weights:
        assert (own == checkpoint.load(root / "desk").params["wte.weight"].data).all()
        assert (ref == checkpoint.load(root / "desk_other").params["wte.weight"].data).all()
    assert [beta for *_, beta in asked] == [0.1, 0.1]


@having("writes_a_file")
def test_an_option_writes_a_file(name, root, tmp_path):
    """The page shows the pair of the command, and the graph ends in its loss."""
    facts = result_of(root, tmp_path, name, {**BASE[name], "html": "pair.html", "graph": "loss.dot", "beta": 0.7})
    assert {path.name for path in tmp_path.iterdir()} == {"pair.html", "loss.dot"}
    assert facts["says"].split(":")[0] in (tmp_path / "pair.html").read_text()
    assert f"neg\\ndata {facts['loss']:.4g}" in (tmp_path / "loss.dot").read_text()


@having("draws_other_texts")
def test_an_option_draws_other_texts(name, root, tmp_path):
    """One seed gives the same texts again, another gives others."""
    options = {**BASE[name], "samples": 20, "max_new_tokens": 8}
    texts = [result_of(root, tmp_path, name, {**options, "seed": seed}) for seed in (0, 0, 1)]
    assert texts[0] == texts[1] != texts[2]


@having("bounds_the_texts")
def test_an_option_bounds_the_texts(name, root, tmp_path):
    """A response has at most N tokens, by default those that fit the context, and the likeliest do not depend on N."""
    for most in (None, 3, 6):
        texts = result_of(root, tmp_path, name, {**BASE[name], "max_new_tokens": most})
        longest = max(len(text) - len(BASE[name]["prompt"]) for text in texts)
        assert longest == most if most else 6 < longest <= CONFIG.n_positions + 1 - 3


@having("reads_a_file")
def test_an_option_reads_a_file(name, root, tmp_path):
    """A prompt from a file gives what the same prompt gives on the command line."""
    (tmp_path / "prompt").write_text(BASE[name]["prompt"])
    result = result_of(root, tmp_path, name, {**BASE[name], "prompt": None, "prompt_file": tmp_path / "prompt"})
    assert result == result_of(root, tmp_path, name, BASE[name])


@having("compares_answers")
def test_an_option_compares_answers(name, root, tmp_path, capsys):
    """Each different prompt of a file is answered once by each model, with the same random numbers."""
    lines = [{"prompt": "ab", "chosen": "c", "rejected": "d"}, {"prompt": "ba"}, {"prompt": "ab", "completion": "c"}]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    options = {"checkpoint": ["init", "other"], "prompts": tmp_path / "prompts.jsonl", "newline": True, "samples": 20}
    both, printed = result_of(root, tmp_path, name, options), capsys.readouterr().out.splitlines()
    order = [(x, model) for x in ("ab", "ba") for _ in range(20) for model in ("init", "other")]
    assert [(row["prompt"], row["model"]) for row in both] == order
    below = [f"  {row['model']:<5}  {tokenizer.printable(row['response'])}" for row in both]
    assert printed == ["ab", *below[:40], "ba", *below[40:]]
    twice = result_of(root, tmp_path, name, {**options, "checkpoint": ["init"], "samples": 2})
    firsts = [both[i] for i in (0, 2, 40, 42)]
    assert twice == firsts and len({row["response"] for row in both if row["model"] == "init"}) > 20
    for x in ("ab", "ba"):
        params, _, characters, _ = checkpoint.load(root / "other")
        rngs = [stream(0, "samples", x, i) for i in range(20)]
        ids = [[0, *characters.encode(x + "\n")]] * 20
        texts = generation.generate(params, CONFIG, ids, rngs, CONFIG.n_positions).responses
        wanted = [row["response"] for row in both if (row["prompt"], row["model"]) == (x, "other")]
        assert list(map(characters.decode, texts)) == wanted


@having("reads_escapes")
def test_an_option_reads_escapes(name, root, tmp_path):
    r"""With --escapes \n is a newline, in the prompt and in the responses."""
    texts = {key: "a\nb" for key in ("prompt", "chosen") if key in BASE[name]}
    escaped = {key: r"a\nb" for key in texts} | {"escapes": True}
    result = result_of(root, tmp_path, name, {**BASE[name], **escaped})
    assert result == result_of(root, tmp_path, name, {**BASE[name], **texts})


@having("reads_ids")
def test_an_option_reads_ids(name, root, tmp_path):
    """With --ids the data holds the ids of texts, and their scores are those of the texts."""
    scores = result_of(root, tmp_path, name, BASE[name])
    lines, tokenizer = (root / "pairs.jsonl").read_text().splitlines(), checkpoint.load(root / "init").tokenizer
    rows = [json.loads(lines[each["line"] - 1]) for each in scores]
    ids = [{key: tokenizer.encode(text) for key, text in row.items()} for row in rows]
    ids = [{"prompt": [0, *x["prompt"]], **{key: [*x[key], 0] for key in ("chosen", "rejected")}} for x in ids]
    (root / "ids.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ids))
    again = result_of(root, tmp_path, name, {**BASE[name], "data": "ids", "ids": True})
    assert [{**each, "line": 0} for each in again] == [{**each, "line": 0} for each in scores] and len(scores) > 2


@having("names_a_run")
def test_an_option_names_a_run(name, root, tmp_path, capsys):
    """The card is of the run that is named, and of what it began with."""
    result_of(root, tmp_path, "sft", {**BASE["sft"], "out": "one"})
    result_of(root, tmp_path, "dpo", {**BASE["dpo"], "init": str(tmp_path / "one"), "out": "two"})
    capsys.readouterr()
    for run, links in (("one", 2), ("two", 4)):  # init, one, other, two
        assert cli.main([name, str(tmp_path / run)]) == 0
        printed = capsys.readouterr().out
        assert printed.startswith(f"# Where `{run}` comes from") and printed.count("\n## ") == links


@having("verifies")
def test_an_option_verifies(name, root, tmp_path, capsys):
    """With --verify the exit status is 0 if every hash holds, and 1 if one does not."""
    result_of(root, tmp_path, "sft", BASE["sft"])
    assert cli.main([name, str(tmp_path / "run"), "--verify"]) == 0
    (tmp_path / "run" / "samples.jsonl").write_text("")
    assert cli.main([name, str(tmp_path / "run"), "--verify"]) == 1
    assert "no longer holds" in capsys.readouterr().out


@having("compares")
def test_an_option_compares(name, root, tmp_path, capsys):
    """With --against the rows of this run are compared with those of the other."""
    for run, data in (("old", "pairs"), ("new", "more")):
        result_of(root, tmp_path, "dpo", {**BASE["dpo"], "data": data, "out": run})
    capsys.readouterr()
    assert cli.main([name, str(tmp_path / "new"), "--against", str(tmp_path / "old")]) == 0
    assert capsys.readouterr().out.startswith("7 rows added, 7 removed\n0 of 2 pairs")
