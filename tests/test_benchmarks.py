"""Benchmarks do the work that they describe, check results before they time them, and count operations exactly."""

import itertools
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from benchmarks import family as eight
from benchmarks import mutants, sampling, speed, story, trl, workload
from benchmarks import ppo as beside
from benchmarks.contenders import ours
from benchmarks.workload import SIZES, Size, draw
from minidpo import Tensor, checkpoint, cli, explain, losses, ops, scoring, world
from minidpo.audit import replies
from minidpo.cli import desk
from minidpo.tokenizer import TURN

SMALL = Size(vocab=11, n_embd=8, n_layer=2, n_head=2, T=16, pairs=6)


@pytest.mark.parametrize("size", SIZES)
def test_the_work_is_as_described(size):
    """Prompts take about half a row, 14 to 20 % of a batch is padding, and the seed alone decides the pairs."""
    work = draw(SIZES[size], 1)
    inputs, targets, counts = workload.padded(work.pairs)
    T = SIZES[size].T
    assert inputs.shape == (2 * SIZES[size].pairs, T) and len(work.pairs) == SIZES[size].pairs
    lengths = [len(x) + len(y) - 1 for x, w, l in work.pairs for y in (w, l)]
    assert 0.14 <= 1 - np.mean(lengths) / T <= 0.20 and max(lengths) == T
    assert all(0.4 * T - 1 <= len(x) <= 0.6 * T + 1 for x, _, _ in work.pairs)
    assert counts.sum() == sum(len(w) + len(l) for _, w, l in work.pairs)
    x, w, _ = work.pairs[0]
    assert targets[0, counts[0] > 0].tolist() == w and inputs[0, : len(x)].tolist() == x
    assert draw(SIZES[size], 1).pairs == work.pairs != draw(SIZES[size], 2).pairs


class InProcess:
    """A worker in this process."""

    def __init__(self, contender):
        self.contender = contender

    def ask(self, command, path):
        loss, gradient = self.contender.gradient()
        np.savez(path, loss=loss, **gradient)


@pytest.mark.parametrize("contender_class", [ours.Padded, ours.Best])
def test_a_contender_is_timed_only_if_its_loss_and_gradient_are_correct(contender_class):
    """Our contenders pass the check; another loss or gradient is refused, however fast it is."""
    work = draw(SMALL, 0)
    contender = contender_class(work)
    with contender:
        expected = speed.truth(work)
        assert speed.check("correct", InProcess(contender), expected) < 1e-4
        before = {name: p.data.copy() for name, p in contender.policy.items()}
        contender.step()
        assert any((p.data != before[name]).any() for name, p in contender.policy.items())
        with pytest.raises(speed.Wrong, match="it is not timed"):
            speed.check("another loss", InProcess(contender), (expected[0] * 1.01, expected[1]))
        expected[1]["ln_f.bias"] *= 1.01
        with pytest.raises(speed.Wrong, match="it is not timed"):
            speed.check("another gradient", InProcess(contender), expected)


def test_operations_are_counted_on_the_graph(monkeypatch):
    """The closed form counts the matrix products of the real graph: attention by its blocks, the rest by its nodes."""
    work, attention, scores = draw(SMALL, 0), ops.block_attention, []

    def counting(qkv, blocks):
        scores.extend(hidden.size for *_, hidden in blocks)
        return attention(qkv, blocks)

    monkeypatch.setattr(ops, "block_attention", counting)
    params = {name: Tensor(x, requires_grad=True) for name, x in work.policy.items()}
    graph = explain.graph(ops.sum(ops.concatenate(*scoring.shared_logprobs(params, work.config, work.pairs))), params)
    forward = 0
    for node in graph.nodes:
        if node.op in ("linear", "matmul"):
            rows, inner = graph.nodes[node.parents[0]].shape
            forward += 2 * rows * inner * node.shape[1]
    forward += 2 * 2 * sum(scores) * work.config.n_embd
    assert speed.flops(work.config, work.pairs) == 3 * forward
    products = ours.products(work.config, work.pairs)
    assert sum(2 * times * n * k * m for times, (n, k, m) in products) == forward


@pytest.mark.parametrize(("contender", "texts"), [(ours.Sampling, 1), (ours.ManyTexts, 32)])
def test_sampling_counts_its_tokens(contender, texts, monkeypatch):
    """Texts follow different prompts, fill the context together, and their time is divided by the tokens of one."""
    outputs, generate = [], ours.workers.Workers.generate
    monkeypatch.setattr(ours.workers.Workers, "generate", lambda *args: outputs.append(generate(*args)) or outputs[-1])
    monkeypatch.setattr(ours.workers, "worker_count", lambda params: 2)
    many = contender(draw(SMALL, 0))
    assert len(many.workers) == min(texts, 2)  # "Two processes sample the 32 texts"
    with many.workers:
        assert many.step() == SMALL.T + 1 - SMALL.T // 4
    assert [len(x) for x in outputs[0].responses] == [SMALL.T + 1 - SMALL.T // 4] * texts
    assert len(set(map(tuple, many.prompts))) == texts and {len(x) for x in many.prompts} == {SMALL.T // 4}


def test_the_table_of_sampling_has_medians_and_ratios():
    """Times are medians in ms, shares the medians of the rounds' ratios."""
    turns = {"minidpo": [1e-3, 2e-3, 9e-3], "PyTorch eager": [2e-3, 1e-3, 6e-3], "transformers": [4e-3, 4e-3, 9e-3]}
    each = {name: {"seconds": seconds, "median": np.median(seconds)} for name, seconds in turns.items()}
    lines = sampling.as_table({suite: dict.fromkeys(SIZES, each) for suite in sampling.SUITES.values()}).splitlines()
    assert lines[2:5] == [
        "| one text: ms a token | 2.00 | 2.00 | 2.00 |",
        "| one text: share of the lean loop | 1.50 | 1.50 | 1.50 |",
        "| one text: share of `model.generate` | 0.50 | 0.50 | 0.50 |",
    ]


def test_the_family_is_trained_once_each_and_reported_by_validation(tmp_path, monkeypatch):
    """Each seed, loss and beta runs once, also after an interruption; validation prompts choose what is reported."""
    assert all(name in losses.LOSSES and len(betas) == 3 for name, betas in eight.BETAS.items())
    calls = []

    def one_run(folder, seed, name, beta, budget, replies):
        calls.append((seed, name, beta))
        if len(calls) == 4:
            raise KeyboardInterrupt
        row = dict.fromkeys(eight.COLUMNS, 1.0)
        return {"validation": {**row, "reward": -abs(beta - 0.3)}, "test": {**row, "reward": beta + seed}}

    monkeypatch.setattr(eight, "one_run", one_run)
    monkeypatch.setattr(eight, "one_seed", lambda folder, seed: {"reward": 0.0})
    with pytest.raises(KeyboardInterrupt):
        eight.run(tmp_path, [0, 1], ["dpo", "ipo"])
    runs = eight.run(tmp_path, [0, 1], ["dpo", "ipo"])["runs"]
    assert len(runs) == 12 and len(calls) == 13 and len(set(calls)) == 12
    (_, default, at_default), (_, best, at_best) = eight.rows_of(runs, "dpo")
    assert (default, best) == (0.1, 0.3) and [row["reward"] for row in at_best] == [0.3, 1.3] and len(at_default) == 2
    assert "0.80 ± 6.3" in eight.as_table(runs)  # 12.71 s/sqrt(2), with s = 1/sqrt(2)
    with pytest.raises(ValueError, match="choose another folder"):
        eight.run(tmp_path, [0], ["dpo"], {**eight.BUDGET, "steps": 7})


def test_ppo_and_dpo_start_alike_and_run_once(tmp_path, monkeypatch):
    """Every run starts at the SFT model and runs once, also after an interruption; roles cost what arithmetic says."""
    monkeypatch.chdir(tmp_path)
    cli.data("example")
    rows = Path("pairs.jsonl").read_text().splitlines(keepends=True)

    def one_seed(folder, seed):
        (folder / "data").mkdir(parents=True)
        for name in ("pairs.jsonl", "pairs_test.jsonl"):
            (folder / "data" / name).write_text("".join(rows[:80]))
        sizes = {"n_embd": 16, "n_head": 2, "n_layer": 1, "n_positions": 128}
        cli.sft(data=folder / "data" / "pairs.jsonl", out=folder / "sft", steps=5, warmup_steps=0, **sizes)

    monkeypatch.setattr(beside, "one_seed", one_seed)
    monkeypatch.setattr(beside, "TEXTS", 8)
    tiny = beside.Sizes(steps=2, every=1, prompts=6, reward_steps=3)
    document = beside.run(tmp_path / "ppo", [0], tiny, ["PPO, learned reward, critic a head", "DPO"])
    for run in document["runs"]:
        first, *_, last = run["rows"]
        assert [row["texts"] for row in run["rows"]] == [0, 8, 16] and abs(first["kl"]) < 1e-3
        assert 0 == first["seconds"] < last["seconds"] and last["kl"] != first["kl"]
    assert document["runs"][0]["rows"][0] == document["runs"][1]["rows"][0]
    monkeypatch.setattr(beside, "trained", None)  # nothing is left to train
    assert beside.run(tmp_path / "ppo", [0], tiny, ["DPO"])["runs"] == document["runs"]
    table = beside.as_memory(document).splitlines()
    assert table[2].startswith("| PPO, critic own trunk | 16.0 | 16.0 | 4.0 | 4.0 | 40.1 |")  # .1: two heads
    assert table[4].startswith("| DPO | 16.0 |  |  | 4.0 | 20.0 |") and len(table) == 6
    with pytest.raises(ValueError, match="choose another folder"):
        beside.run(tmp_path / "ppo", [0], tiny._replace(steps=3))


def test_the_optima_of_the_desk_lie_between_its_own_replies_and_the_best():
    """A large beta leaves the desk as it is, a small one takes the best reply of each request; KL falls with beta."""
    rows = beside.optima(0, [1e-3, 0.2, 0.5, 1e4])
    prompts = world.split(0)[2]
    assert rows[-1]["kl"] < 1e-6 and rows[-1]["reward"] == pytest.approx(world.desk_reward(prompts), abs=1e-3)
    assert rows[0]["reward"] == pytest.approx(3, abs=1e-9)
    assert [row["kl"] for row in rows] == sorted((row["kl"] for row in rows), reverse=True)
    mean = 0.0
    for x, p in world.prompt_distribution(prompts).items():
        replies = world.desk(world.PROMPTS[x])
        reward = np.array([world.judgement(x, y).reward for y in replies])
        weights = np.array(list(replies.values())) * np.exp(reward / 0.5)
        mean += p * (weights @ reward) / weights.sum()
    assert rows[2]["reward"] == pytest.approx(mean, abs=1e-9)


def test_kto_of_pairs_is_the_kto_loss():
    """Chosen responses are the desirable ones, and a pair counts as two responses."""
    w, l, rw, rl = np.random.default_rng(0).normal(-5, 1, (4, 3))
    out = eight.kto_of_pairs(Tensor(w), Tensor(l), rw, rl, 0.5)
    sigma = lambda x: 1 / (1 + np.exp(-x))  # noqa: E731
    expected = np.concatenate([1 - sigma(0.5 * (w - rw)), sigma(0.5 * (l - rl))]).mean()
    np.testing.assert_allclose(out.loss.item(), expected)
    np.testing.assert_allclose(out.margin.data, (w - rw) - (l - rl))


def test_the_run_that_trl_is_compared_with_is_that_of_the_command(tmp_path, monkeypatch):
    """The steps beside TRL's are those of `minidpo dpo`: rows, order, schedule, optimizer and clipping."""
    monkeypatch.chdir(tmp_path)
    cli.data("example")
    cli.sft(data="pairs.jsonl", out="sft", steps=80, n_embd=16, n_head=2, warmup_steps=0, learning_rate=0.02)
    cli.dpo(data="pairs.jsonl", init="sft", out="dpo", steps=12, evaluate_every=12)
    lines = [json.loads(line) for line in (tmp_path / "dpo" / "metrics.jsonl").read_text().splitlines()]
    lines = [line for line in lines if "loss" in line]
    rows, pairs = trl.training_rows("sft", "pairs.jsonl")
    assert len(rows) == len(pairs) and pairs[0][0][1] == checkpoint.load("sft").tokenizer.encode(rows[0]["prompt"])[0]
    log = trl.our_log(checkpoint.load("sft"), pairs, 12, losses.dpo_loss)
    assert max(line["grad_norm"] for line in lines) > 1  # so that clipping matters
    for line, step in zip(lines, log, strict=True):
        assert step["loss"] == pytest.approx(line["loss"], abs=1e-6)
        assert step["grad_norm"] == pytest.approx(line["grad_norm"], rel=1e-4)


# ---- mutants ----------------------------------------------------------------------------------------------


def test_each_mutant_changes_one_place_of_the_code():
    """A mutant parses, differs, and is one of those that the operators of its line allow; text and types stay."""
    source = 'def f(x: int = 3) -> int:\n    "1 + 1"\n    return g(x, axis=-1) if not x <= 2.0 else h(x).sum() - 1\n'
    texts = [source[: m.start] + m.text + source[m.end :] for m in mutants.mutants("f", source)]
    lines = {text.splitlines()[2].removeprefix("    return ") for text in texts if "= 3)" in text}
    assert lines == {
        "(h(x).sum() - 1 if not x <= 2.0 else g(x, axis=-1))", "g(x) if not x <= 2.0 else h(x).sum() - 1",
        "g(x, axis=1) if not x <= 2.0 else h(x).sum() - 1", "g(x, axis=-2) if not x <= 2.0 else h(x).sum() - 1",
        "g(x, axis=-1) if x <= 2.0 else h(x).sum() - 1", "g(x, axis=-1) if not x < 2.0 else h(x).sum() - 1",
        "g(x, axis=-1) if not x <= 3.0 else h(x).sum() - 1", "g(x, axis=-1) if not x <= 2.0 else h(x).sum() + 1",
        "g(x, axis=-1) if not x <= 2.0 else h(x).mean() - 1", "g(x, axis=-1) if not x <= 2.0 else h(x).sum() - 2",
    }  # fmt: skip
    assert len(texts) == len(lines) + 1 and all('"1 + 1"' in text and ") -> int:" in text for text in texts)


def test_a_sample_of_mutants_depends_on_its_seed_alone(monkeypatch):
    """A seed draws as many mutants as asked for, and always the same; each planted fault has one place in the code."""
    monkeypatch.setattr(mutants, "FILES", ("optim",))
    (one, total), (again, _), (other, _) = (mutants.drawn(100, seed) for seed in ("a", "a", "b"))
    assert one == again != other and total > len(one) == 100
    assert len(mutants.planted()) == len(mutants.PLANTED) > 30


def test_the_table_of_mutants_leaves_out_the_equivalent_ones():
    """What is noticed is a share of those that are not judged equivalent, with Wilson's interval."""
    rows = [{"file": "ops", "test": "t", "name": "a"}] * 3
    rows += [{"file": "ops", "test": "", "judgement": "equivalent: it is", "name": "b"}]
    rows += [{"file": "optim", "test": "", "name": "c"}]
    lines = mutants.as_table({"mutants": rows}).splitlines()
    assert lines[2] == "| ops | 4 | 3 | 1 | 100.0% | 43.9% to 100.0% |"
    assert lines[-1].startswith("| all | 5 | 3 | 1 | 75.0% | 30.1% to 95.4% |")
    assert mutants.survivors({"mutants": rows, "planted": []}) == "- b: equivalent: it is\n- c: not judged"


# ---- the usual story --------------------------------------------------------------------------------------


def planted(figures, seeds=(0, 1, 2)):
    """Results whose figures are all 1, but for those given as {(run, model, column): figures by seed}."""
    columns = [*story.OF_REPLIES, *story.OF_PAIRS, "length_true"]
    curve = [{"step": step, "margin": 1.0, "rise": 1.0, "kl": 1.0} for step in (0, 20)]
    results = {"budget": story.BUDGET, "sft": {str(seed): dict.fromkeys(columns, 1.0) for seed in seeds}, "runs": []}
    for seed, name in itertools.product(seeds, story.RUNS):
        models = {model: {**dict.fromkeys(columns, 1.0), "step": 200} for model in story.MODELS}
        results["runs"].append({"seed": seed, "run": name, **models, "curve": curve, "batches": [1.0]})
    for (name, model, column), values in figures.items():
        for seed, value in zip(seeds, values, strict=True):
            row = next(row for row in results["runs"] if (row["seed"], row["run"]) == (seed, name))
            row[model][column] = value
    return results


def test_the_story_repeats_no_run_that_its_results_hold(tmp_path, monkeypatch):
    """After a fault only what is missing runs; other settings than the folder's are refused."""
    calls = []

    def one_run(folder, seed, name, budget, count):
        calls.append((seed, name))
        if len(calls) == 9:
            raise RuntimeError("the power failed")
        return {"last": {"reward": float(seed)}}

    def prepare(folder, seed, count):
        calls.append((seed, "SFT"))
        return {"reward": 0.0}

    monkeypatch.setattr(story, "one_run", one_run)
    monkeypatch.setattr(story, "prepare", prepare)
    names = ("sft both", "no reference", "beta 1")
    with pytest.raises(RuntimeError, match="power"):
        story.run(tmp_path, [0, 1, 2], ThreadPoolExecutor(1), names)
    results = json.loads((tmp_path / "results.json").read_text())
    held = {(row["seed"], row["run"]) for row in results["runs"]} | {(int(seed), "SFT") for seed in results["sft"]}
    assert 1 <= len(held) < 12
    calls[:] = [None] * 10  # so that none fails now
    results = story.run(tmp_path, [0, 1, 2], ThreadPoolExecutor(2), names)
    every = {(seed, name) for seed in range(3) for name in (*names, "SFT")}
    assert sorted(calls[10:]) == sorted(every - held)
    assert {(row["seed"], row["run"]) for row in results["runs"]} == {key for key in every if key[1] != "SFT"}
    assert results == json.loads((tmp_path / "results.json").read_text())
    with pytest.raises(ValueError, match="choose another folder"):
        story.run(tmp_path, [0], ThreadPoolExecutor(1), names, count=7)


@pytest.mark.parametrize(
    ("reply", "share"),
    [("", 0), ("abc", 0), ("abcd", 0), ("aaaaaa", 2 / 3), ("abcdabcd", 1 / 5), ("abcdeabcdabcd", 2 / 10)],
)
def test_repeated_4_grams_are_those_that_stood_before(reply, share):
    """By hand: aaaa thrice; abcd twice among five, and three times among ten."""
    assert story.repeated(reply) == pytest.approx(share)


def test_figures_of_pairs_are_those_of_numpy():
    """Correlations, slopes, rise and accuracy, from numbers drawn at random, for each kind of reference."""
    rng = np.random.default_rng(0)
    rows = world.preferences(world.split(0)[2], 40, rng)
    pairs = [SimpleNamespace(prompt=row["prompt"] + TURN, responses=(row["chosen"], row["rejected"])) for row in rows]
    ids = [([0], *([0] * len(row[key]) + [0] for key in ("chosen", "rejected"))) for row in rows]
    lengths = np.array([[len(y) + 1 for y in row.responses] for row in pairs]).T
    logps, sft, base = rng.normal(-30, 5, (3, 2, 40))
    logps[:, 7] = base[:, 7]  # the base as reference sees a tie
    true = np.array(
        [[world.judgement(row["prompt"], row[key]).reward for row in rows] for key in ("chosen", "rejected")]
    )
    for name, ref in {"beta 0.1": sft, "base reference": base, "no reference": 0 * base}.items():
        row = story.of_pairs(SimpleNamespace(rows=pairs, ids=ids), logps, sft, base, name)
        for key, x in {"logp": logps, "reward": logps - sft, "own": logps - ref, "true": true}.items():
            both = lengths[0] - lengths[1], x[0] - x[1]
            np.testing.assert_allclose(row[f"length_{key}"], np.corrcoef(*both)[0, 1], atol=1e-12)
            np.testing.assert_allclose(row[f"slope_{key}"], np.polyfit(*both, 1)[0], atol=1e-12)
        margin = np.subtract(*(logps - ref))
        np.testing.assert_allclose(row["accuracy"], np.where(margin == 0, 0.5, margin > 0).mean())
        np.testing.assert_allclose(row["rise"], (sft[0] - logps[0]).sum() / lengths[0].sum())
    assert (np.subtract(*(logps - base)) == 0).sum() == 1
    assert story.correlation([1, 2, 3], [5, 5, 5]) == 0  # a policy equal to its reference


def test_verdicts_follow_from_the_interval():
    """Well above its threshold a sentence holds, well below it does not, and around it nothing is established."""
    results = planted({
        ("beta 0.1", "last", "well_formed"): [0.97, 0.98, 0.99],  # above 0.9
        ("beta 0.1", "best", "well_formed"): [0.5, 0.9, 1.3],  # around it
        ("beta 0.1 nll", "last", "well_formed"): [0.4, 0.3, 0.35],  # below it
        ("beta 0.1", "last", "reward"): [0.1, 0.2, 0.3],  # SFT has 1
        ("base reference", "last", "reward"): [0.0, 0.0, 0.0],
        ("no reference", "last", "length"): [0.0, 1.0, 5.0],  # SFT has 1
        ("beta 0.1 nll", "last", "length_logp"): [-0.5, -0.5, -0.5],  # the true reward has 1
        ("beta 0.1 nll", "last", "length_reward"): [0.7, 0.73, 0.67],  # 80 % is gone
        **{(f"beta {beta:g}", "last", "kl"): [-np.log2(beta), -2 * np.log2(beta), -1.5 * np.log2(beta)]
           for beta in story.BETAS},
    })  # fmt: skip
    for row in results["runs"]:
        if row["run"] in ("beta 0.5", "beta 1"):
            row["batches"] = [0.9 - 0.01 * row["seed"]]
            row["curve"] = [
                {},
                {"margin": (0.5, 1, 2)[row["seed"]], "kl": 2.0 + 0.1 * row["seed"]},
            ]  # the others have 1
    found = {claim.sentence: claim for claim in story.claims(results)}
    expected = {
        "the reference prevents collapse": "yes",
        "the held-out loss chooses a step before the collapse": "not established",
        "an NLL term prevents collapse": "no",
        "DPO is stable: it does not end below its start": "no",
        "the base model is a poor reference": "not established",  # 0.2 ± 0.25
        "without a reference replies become shorter": "not established",
        "with an NLL term it cancels most of it": "yes",
        "a larger beta ends closer to SFT": "yes",
        "a larger beta is faster in the first steps, as under SGD": "no",
        "a larger beta has a larger margin at step 20": "not established",
        "a larger beta is farther from SFT at step 20": "yes",
    }
    assert {sentence: found[sentence].verdict for sentence in expected} == expected
    np.testing.assert_allclose(found["a larger beta ends closer to SFT"].values, [1, 2, 1.5])
    np.testing.assert_allclose(found["with an NLL term it cancels most of it"].values, [0.8, 0.82, 0.78])
    table = story.verdicts(results)
    assert "| 0.98 ± 0.02 | yes |" in table and "| 0.35 ± 0.12 | no |" in table  # 4.30 s/sqrt(3)
    first, second = story.tables(results)
    assert (
        "| DPO, beta 0.1 | last, best | 200 | 0.20 ± 0.25 | 3 of 3 |" in first
        and "| SFT |  |  | 1.00 ± 0.00 |  |" in first
    )
    assert len(first.splitlines()) == len(second.splitlines()) == 2 + 1 + 14
    results["runs"][7]["best"]["step"] = 20  # in one seed
    name = story.TITLES.get(results["runs"][7]["run"], f"DPO, {results['runs'][7]['run']}")
    table = next(story.tables(results))
    assert f"| {name} | last | 200 |" in table and f"| {name} | best | 20, 200 |" in table


TINY = desk.Sizes(
    texts=60, completions=40, pairs=40, held_out=10, steps={"pretrain": 4, "sft": 3},
    model=["--n-embd=8", "--n-layer=1", "--n-head=2", "--n-positions=110"], replies=30,
)  # fmt: skip


def test_a_small_story_is_trained_judged_and_resumed(tmp_path, monkeypatch):
    """Runs start from one SFT model, each against its own reference; what is trained already is only judged again."""
    monkeypatch.setattr(desk, "FULL", TINY)
    names = ("sft chosen", "no reference", "base reference", "beta 0.5 nll")
    budget = {**story.BUDGET, "steps": 3, "evaluate_every": 2, "batch_size": 4}
    monkeypatch.setattr(story, "WINDOW", 2)
    results = story.run(tmp_path, [0], ThreadPoolExecutor(1), names, budget, count=6)
    folder, rows = tmp_path / "seed0", {row["run"]: row for row in results["runs"]}
    assert set(rows) == set(names) and abs(results["sft"]["0"]["kl"]) < 1e-5
    words = {name: (folder / name.replace(" ", "-") / "run.json").read_text() for name in names}
    assert all(f"--init={folder / 'sft'}" in text and "--steps=3" in text for text in words.values())
    assert (
        f"--reference={folder / 'pretrain'}" in words["base reference"] and "--responses=chosen" in words["sft chosen"]
    )
    assert "--loss=reference-free" in words["no reference"] and "--nll-weight=2" in words["beta 0.5 nll"]
    row = rows["beta 0.5 nll"]
    assert row["last"]["step"] == 3 and [point["step"] for point in row["curve"]] == [0, 2, 3]
    assert row["curve"][0]["margin"] == 0 and len(row["batches"]) == 2 and "curve" not in rows["sft chosen"]
    assert row["last"]["length_own"] == row["last"]["length_reward"]
    other = rows["base reference"]
    assert other["last"]["length_own"] != other["last"]["length_reward"] and other["curve"][0]["margin"] != 0
    free = rows["no reference"]["last"]
    assert free["length_own"] == free["length_logp"] != free["length_reward"]
    log = folder / "beta-0.5-nll" / "metrics.jsonl"
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    margins = [line["rewards/margins"] / 0.5 for line in lines if "rewards/margins" in line]
    assert row["batches"] == pytest.approx([np.mean(margins[:2]), margins[2]])
    margins = [line["eval_rewards/margins"] / 0.5 for line in lines if "eval_loss" in line]
    assert [point["margin"] for point in row["curve"]] == pytest.approx(margins)
    model = checkpoint.load(folder / "beta-0.5-nll" / "step-000003")
    own = replies.judged(model, checkpoint.load(folder / "sft"), desk.test_prompts(0, 6), 0)
    assert row["last"]["well_formed"] == np.mean([each.well_formed for each in own.judgements])
    assert row["last"]["kl"] == pytest.approx(np.mean(own.ratios)) and row["last"]["length"] == np.mean(own.lengths)
    before = log.read_bytes()
    (tmp_path / "results.json").unlink()
    again = story.run(tmp_path, [0], ThreadPoolExecutor(1), names, budget, count=6)
    plain = [{key: value for key, value in row.items() if key != "cpu_seconds"} for row in again["runs"]]
    assert plain == [{key: value for key, value in row.items() if key != "cpu_seconds"} for row in results["runs"]]
    assert log.read_bytes() == before and "nothing left to train" in (folder / "beta-0.5-nll.log").read_text()
