"""The table and pictures of a graph show the graph that `backward` sweeps."""

import gc
import re
import tracemalloc

import numpy as np
import pytest

from minidpo import Tensor, explain, losses, model, ops, scoring, training
from minidpo.model import Config
from models import CONFIG, small


def worked_example():
    """The first pair of the README, its four log-probabilities as leaves."""
    leaves = [Tensor(x, requires_grad=True) for x in (-10.0, -15.0, -12.0, -14.0)]
    names = dict(zip(("logp_w", "logp_l", "ref_logp_w", "ref_logp_l"), leaves, strict=True))
    return losses.dpo_loss(*leaves, beta=0.1).loss, names


def test_the_tape_is_listed_in_order_of_creation():
    """Nodes are listed in the order of their creation, with the values and gradients of the README's example."""
    loss, names = worked_example()
    graph = explain.graph(loss, names)
    assert [node.title for node in graph.nodes] == [
        *names, "sub", "sub", "sub", "mul", "logsigmoid", "mean", "neg",
    ]  # fmt: skip
    assert [node.parents for node in graph.nodes[4:]] == [[0, 2], [1, 3], [4, 5], [6], [7], [8], [9]]
    assert all(parent < node.number for node in graph.nodes for parent in node.parents)
    assert [node.gradient[0] for node in graph.nodes[:4]] == pytest.approx(
        [-0.04256, 0.04256, 0.04256, -0.04256], abs=1e-5
    )
    assert graph.nodes[-1].gradient == [1.0] and graph.nodes[7].value == pytest.approx([0.3])
    assert graph.nodes[8].gradient == [-1.0] and graph.nodes[8].gradient_norm == 1


def test_gradients_are_those_of_backward():
    """The gradients are those of `backward`, and looking at a graph leaves `grad` alone."""
    rng = np.random.default_rng(0)
    data = rng.normal(size=(3, 4)), rng.normal(size=(4, 2))

    def forward():
        x, w = (Tensor(array, requires_grad=True) for array in data)
        hidden = ops.tanh(x @ w)
        return x, w, hidden, ops.mean(hidden * hidden + 1.0)

    x, w, _, loss = forward()
    loss.backward()
    other_x, other_w, hidden, loss = forward()
    graph = explain.graph(loss, {"x": other_x, "w": other_w})
    norms = {node.title: node.gradient_norm for node in graph.nodes}
    assert other_x.grad is None and other_w.grad is None
    for name, leaf in (("x", x), ("w", w)):
        assert norms[name] == pytest.approx(np.linalg.norm(leaf.grad), rel=1e-12)
    assert norms["tanh"] == pytest.approx(np.linalg.norm(2 * hidden.data / hidden.data.size), rel=1e-12)
    shapes = {node.title: node.shape for node in graph.nodes}
    assert shapes["matmul"] == (3, 2) and shapes["x"] == (3, 4)
    values = {node.title: (node.value, node.gradient) for node in graph.nodes}
    assert values["matmul"] == (None, None)  # six entries are more than SMALL


def test_bytes_kept_are_bytes_of_memory():
    """The bytes kept agree with those that Python says NumPy has allocated. (Only the loss holds the tape.)"""
    config = Config(vocab_size=200, n_positions=256, n_embd=64, n_layer=2, n_head=4)
    params = model.init(config, np.random.default_rng(0), dtype="float32")
    pairs = [([1] * 90, [2] * 90, [3] * 60)] * 4
    scoring.shared_logprobs(params, config, pairs)
    gc.collect()
    tracemalloc.start()
    logp_w, logp_l = scoring.shared_logprobs(params, config, pairs)
    loss = losses.dpo_loss(logp_w, logp_l, np.zeros(4, "float32"), np.zeros(4, "float32")).loss
    allocated = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    kept = explain.graph(loss, params).kept
    assert kept > 5_000_000 and abs(kept - allocated) < 0.02 * allocated


def test_an_array_is_counted_once_and_leaves_are_not():
    """An array that two nodes share counts once; leaves, which stay, do not count."""
    x = Tensor(np.ones((100, 10)), requires_grad=True)
    y = ops.exp(x)  # keeps its own result: 8,000 bytes, once
    z = ops.reshape(y, (10, 100))  # a view
    graph = explain.graph(ops.sum(z * z))
    kept = {node.op: node.kept for node in graph.nodes}
    assert kept == {"leaf": 0, "exp": 8000, "reshape": 0, "mul": 8000, "sum": 8}
    assert graph.kept == 16008 and str(graph).splitlines()[-1].split() == ["5", "nodes", "16,008"]


def test_a_whole_step_can_be_drawn():
    """Both pictures of a DPO loss have every edge of the tape, and large nodes show their shapes."""
    policy, pairs = small(), [([0, 1], [2, 0], [2, 3, 0])]
    refs = training.reference_logprobs(small(1), CONFIG, pairs)
    graph = explain.graph(losses.dpo_loss(*scoring.shared_logprobs(policy, CONFIG, pairs), *refs).loss, policy)
    edges = {(parent, node.number) for node in graph.nodes for parent in node.parents}
    assert {tuple(map(int, edge)) for edge in re.findall(r"^  n(\d+) -> n(\d+)$", graph.dot(), re.MULTILINE)} == edges
    assert {
        tuple(map(int, edge)) for edge in re.findall(r"^  n(\d+) --> n(\d+)$", graph.mermaid(), re.MULTILINE)
    } == edges
    for text in (graph.dot(), graph.mermaid()):
        assert all(name in text for name in policy) and "(5, 8)" in text and "|grad|" in text
    assert str(graph).count("\n") == len(graph.nodes) + 1


def test_small_graphs_show_values_and_gradients():
    """A node of few entries shows its value and its gradient, as in micrograd's pictures."""
    graph = explain.graph(*worked_example())
    assert 'n0 [label="logp_w\\ndata -10\\ngrad -0.04256", style=rounded]' in graph.dot()
    assert 'n0(["logp_w<br/>data -10<br/>grad -0.04256"])' in graph.mermaid()
    assert 'n10["neg<br/>data 0.5544<br/>grad 1"]' in graph.mermaid()


def test_names_stay_text():
    """Quotes, brackets and markup in a name stay inside its label."""
    x = Tensor(np.ones(9), requires_grad=True)
    graph = explain.graph(ops.sum(x), {'a"] -> \\ <script>': x})
    assert r'n0 [label="a\"] -> \\ <script>\n(9,)' in graph.dot()
    assert "&quot;] -&gt; \\ &lt;script&gt;" in graph.mermaid() and "<script>" not in graph.mermaid()


def test_only_an_unswept_graph_is_swept():
    """A graph that was swept already, or that does not exist, is refused."""
    loss, names = worked_example()
    explain.graph(loss, names)
    with pytest.raises(RuntimeError, match="freed by an earlier"):
        explain.graph(loss, names)
    with pytest.raises(ValueError, match="there is no graph"):
        explain.graph(Tensor(1.0))


def test_a_node_without_a_gradient_says_so():
    """A node that receives no gradient says so; it does not show 0."""
    x = Tensor(np.ones(3), requires_grad=True)
    nothing = Tensor(np.ones(3), requires_grad=True, parents=(x,), vjp=lambda g: (None,), op="nothing")
    graph = explain.graph(ops.sum(nothing))
    assert graph.nodes[0].gradient_norm is None and "no gradient" in graph.dot()
    assert re.search(r"0 leaf +\(3,\) +0 +none", str(graph))
