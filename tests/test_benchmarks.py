"""Benchmarks do the work that they describe, check results before they time them, and count operations exactly."""

import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks import family as eight
from benchmarks import ppo as beside
from benchmarks import sampling, speed, trl, workload
from benchmarks.contenders import ours
from benchmarks.workload import SIZES, Size, draw
from minidpo import Tensor, checkpoint, cli, explain, generation, losses, ops, scoring, world

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
    outputs, generate = [], generation.generate
    monkeypatch.setattr(generation, "generate", lambda *args: outputs.append(generate(*args)) or outputs[-1])
    many = contender(draw(SMALL, 0))
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
