"""What is measured is what is said to be: the work, the check before it, and the count of operations."""

import numpy as np
import pytest

from benchmarks import speed, workload
from benchmarks.contenders import ours
from benchmarks.workload import SIZES, Size, draw
from minidpo import Tensor, explain, ops, scoring

SMALL = Size(vocab=11, n_embd=8, n_layer=2, n_head=2, T=16, pairs=6)


@pytest.mark.parametrize("size", SIZES)
def test_the_work_is_as_described(size):
    """Prompts of half a row, 14 to 20 % padding: otherwise a ratio is of other work."""
    work = draw(SIZES[size], 1)
    inputs, targets, counts = workload.padded(work.pairs)
    T = SIZES[size].T
    assert inputs.shape == (2 * SIZES[size].pairs, T) and len(work.pairs) == SIZES[size].pairs
    used = [len(x) + len(y) - 1 for x, w, l in work.pairs for y in (w, l)]
    assert 0.14 <= 1 - np.mean(used) / T <= 0.20 and max(used) == T
    assert all(0.4 * T - 1 <= len(x) <= 0.6 * T + 1 for x, _, _ in work.pairs)
    assert counts.sum() == sum(len(w) + len(l) for _, w, l in work.pairs)
    x, w, _ = work.pairs[0]
    assert targets[0, counts[0] > 0].tolist() == w and inputs[0, : len(x)].tolist() == x
    assert draw(SIZES[size], 1).pairs == work.pairs != draw(SIZES[size], 2).pairs


class Asked:
    """A worker in this process."""

    def __init__(self, made):
        self.made = made

    def ask(self, command, path):
        loss, gradient = self.made.gradient()
        np.savez(path, loss=loss, **gradient)


@pytest.mark.parametrize("made", [ours.Padded, ours.Best])
def test_what_is_right_passes_and_what_is_wrong_is_not_timed(made):
    """Otherwise a fast step wins that computes something else."""
    work = draw(SMALL, 0)
    contender = made(work)
    with contender:
        expected = speed.truth(work)
        assert speed.check("right", Asked(contender), expected) < 1e-4
        before = {name: p.data.copy() for name, p in contender.policy.items()}
        contender.step()
        assert any((p.data != before[name]).any() for name, p in contender.policy.items())
        with pytest.raises(speed.Wrong, match="it is not timed"):
            speed.check("moved far", Asked(contender), (expected[0] * 1.01, expected[1]))
        expected[1]["ln_f.bias"] *= 1.01
        with pytest.raises(speed.Wrong, match="it is not timed"):
            speed.check("another gradient", Asked(contender), expected)


def test_operations_are_counted_on_the_graph(monkeypatch):
    """Otherwise the curve beside the times is of another algorithm. (Attention by its blocks, the rest by the tape.)"""
    work, attention, scores = draw(SMALL, 0), ops.block_attention, []

    def counted(qkv, blocks):
        scores.extend(hidden.size for *_, hidden in blocks)
        return attention(qkv, blocks)

    monkeypatch.setattr(ops, "block_attention", counted)
    params = {name: Tensor(x, requires_grad=True) for name, x in work.policy.items()}
    graph = explain.graph(ops.sum(ops.concatenate(*scoring.shared_logprobs(params, work.config, work.pairs))), params)
    forward = 0
    for node in graph.nodes:
        if node.op in ("linear", "matmul"):
            rows, inner = graph.nodes[node.parents[0]].shape
            forward += 2 * rows * inner * node.shape[1]
    forward += 2 * 2 * sum(scores) * work.config.n_embd
    assert speed.flops(work.config, work.pairs) == 3 * forward
    floor = ours.products(work.config, work.pairs)
    assert sum(2 * times * n * k * m for times, (n, k, m) in floor) == forward


def test_sampling_draws_what_it_counts():
    """Otherwise a time per token is divided by other tokens."""
    work = draw(SMALL, 0)
    assert ours.Sampling(work).step() == SMALL.T - len(work.pairs[0][0][: SMALL.T // 4])
