"""The transformer: what it must not see, what must not matter, and its gradient as a whole."""

import dataclasses
import math
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from minidpo import gradcheck, model, ops
from minidpo.model import Config
from models import CONFIG, small

tokens = hnp.arrays(int, st.tuples(st.integers(1, 3), st.integers(1, CONFIG.n_positions)), elements=st.integers(0, 4))
close = np.testing.assert_allclose


def logits(tokens, real=None):
    return model.forward(small(), CONFIG, tokens, real).data


def gpt_2(params, n_layer, n_head, text):
    """GPT-2 read off its description, one text and one head at a time, in plain NumPy."""
    w = {name: p.data for name, p in params.items()}

    def norm(name, x):
        centred = x - x.mean(-1, keepdims=True)
        return centred / np.sqrt(x.var(-1, keepdims=True) + 1e-5) * w[f"{name}.weight"] + w[f"{name}.bias"]

    def affine(name, x):
        return x @ w[f"{name}.weight"] + w[f"{name}.bias"]

    x = np.stack([w["wte.weight"][token] + w["wpe.weight"][place] for place, token in enumerate(text)])
    for i in range(n_layer):
        q, k, v = np.split(affine(f"h.{i}.attn.c_attn", norm(f"h.{i}.ln_1", x)), 3, axis=-1)
        size = q.shape[1] // n_head
        heads = np.zeros_like(q)
        for columns in (slice(h * size, (h + 1) * size) for h in range(n_head)):
            for t in range(len(text)):
                scores = np.exp([q[t, columns] @ k[s, columns] / math.sqrt(size) for s in range(t + 1)])
                heads[t, columns] = scores / scores.sum() @ v[: t + 1, columns]
        x = x + affine(f"h.{i}.attn.c_proj", heads)
        hidden = affine(f"h.{i}.mlp.c_fc", norm(f"h.{i}.ln_2", x))
        hidden = hidden / 2 * (1 + np.tanh(math.sqrt(2 / math.pi) * (hidden + 0.044715 * hidden**3)))
        x = x + affine(f"h.{i}.mlp.c_proj", hidden)
    return norm("ln_f", x) @ w["wte.weight"].T


@given(tokens=tokens, seed=st.integers(0, 9))
def test_the_logits_are_gpt_2_s(tokens, seed):
    """The logits are GPT-2's, as read off its description."""
    expected = [gpt_2(small(seed), CONFIG.n_layer, CONFIG.n_head, text) for text in tokens]
    close(model.forward(small(seed), CONFIG, tokens).data, expected, rtol=1e-10, atol=1e-10)


def test_a_row_of_pads_alone_is_no_text():
    """A row of pads alone is fine and changes no other row."""
    real = np.array([[True, True], [False, False]])
    close(logits(np.array([[1, 2], [3, 4]]), real)[0], logits(np.array([[1, 2]]))[0], atol=1e-12)


@pytest.mark.parametrize("shape", [(0, 3), (2, 0)])
def test_an_empty_batch_has_no_logits(shape):
    """An empty batch gives an empty array of logits."""
    assert logits(np.zeros(shape, int)).shape == (*shape, 5)


def test_the_smallest_model():
    """Every size may be 1."""
    config = Config(1, 1, 1, 1, 1)
    assert model.forward(small(0, config), config, [[0]]).shape == (1, 1, 1)


def test_a_config_cannot_change():
    """A config cannot change, so the sizes and the weights stay together."""
    with pytest.raises(dataclasses.FrozenInstanceError):
        CONFIG.n_layer = 3


@given(tokens=tokens, data=st.data())
def test_the_future_changes_nothing(tokens, data):
    """Causality: a token changes the logits at its own position, and none before."""
    T = tokens.shape[1]
    t = data.draw(st.integers(0, T - 1))
    changed = tokens.copy()
    changed[:, t] = (changed[:, t] + data.draw(st.integers(1, 4))) % 5
    before, after = logits(tokens), logits(changed)
    assert (before[:, :t] == after[:, :t]).all()
    assert (before[:, t] != after[:, t]).any()


@given(tokens=tokens, data=st.data())
def test_rows_of_a_batch_do_not_see_each_other(tokens, data):
    """A text's logits do not depend on the rest of its batch, nor on the order."""
    order = data.draw(st.permutations(range(len(tokens))))
    close(logits(tokens[list(order)]), logits(tokens)[list(order)], atol=1e-12)
    close(logits(tokens)[:1], logits(tokens[:1]), atol=1e-12)


@given(tokens=tokens, data=st.data())
def test_pads_change_nothing(tokens, data):
    """Pads on either side change no logit of the text."""
    B, T = tokens.shape
    wide = np.full((B, T + 3), data.draw(st.integers(0, 4)))
    real = np.zeros((B, T + 3), bool)
    shift = data.draw(st.lists(st.integers(0, 3), min_size=B, max_size=B))
    for b in range(B):
        wide[b, shift[b] : shift[b] + T], real[b, shift[b] : shift[b] + T] = tokens[b], True
    padded = logits(wide, real)
    for b in range(B):
        close(padded[b, shift[b] : shift[b] + T], logits(tokens)[b], atol=1e-12)


@pytest.mark.parametrize("method", ["central", "complex"])
@pytest.mark.parametrize("only", [None, *model.parameter_shapes(CONFIG)])
def test_the_gradient_of_a_whole_loss(only, method):
    """The gradient of a whole loss is correct in every parameter, and in all at once."""
    rng = np.random.default_rng(1)
    batch, targets = rng.integers(0, 5, (2, 2, 6))
    params = small()
    for name, p in params.items():
        p.requires_grad = only in (None, name)

    def loss(params):
        return -ops.mean(ops.gather(ops.log_softmax(model.forward(params, CONFIG, batch)), targets))

    bound = {"central": 1e-8, "complex": 1e-14}[method]
    assert gradcheck.check_gradient(loss, params, rng, directions=3, method=method) < bound


def test_every_parameter_matters():
    """Every parameter changes the logits, except for the bias of the keys, which no softmax sees."""
    batch = np.array([[1, 2, 3, 4, 0, 1, 2, 3]])
    before = logits(batch)
    for name in model.parameter_shapes(CONFIG):
        params = small()
        params[name].data = params[name].data * 1.1
        moved = model.forward(params, CONFIG, batch).data - before
        if name.endswith("c_attn.bias"):  # a shift of all keys changes no softmax, but those of queries and values do
            params = small()
            key_bias = np.zeros(24)
            key_bias[8:16] = 1
            params[name].data = params[name].data + key_bias
            close(model.forward(params, CONFIG, batch).data, before, atol=1e-12)
        assert abs(moved).max() > 1e-4, name


def test_the_table_is_the_code():
    """The table of keys and shapes in model.py's docstring is what the code makes."""
    table = re.findall(r"^    (\S+\.weight)(, \.bias)?|^    (\S+\.bias)", model.__doc__, re.MULTILINE)
    names = [name for weight, bias, alone in table for name in ([weight] if weight else [alone])
             + ([weight.replace("weight", "bias")] if bias else [])]  # fmt: skip
    one_layer = [name.replace("h.0.", "h.i.") for name in model.parameter_shapes(CONFIG) if "h.1." not in name]
    assert names == one_layer
    sizes = {"V": 5, "C": 8, "n_positions": 8}
    for name, shape in re.findall(
        r"^    (\S+\.(?:weight|bias))(?:, \.bias)? +\(([^)]*)\)", model.__doc__, re.MULTILINE
    ):
        parts = re.findall(r"(\d*)(\w+)", shape)
        expected = tuple(int(factor or 1) * sizes[letter] for factor, letter in parts)
        assert model.parameter_shapes(CONFIG)[name.replace("h.i.", "h.0.")] == expected


def test_init_is_gpt_2_s():
    """Parameters start as GPT-2's do, with smaller weights where a layer adds to the residual."""
    config = Config(vocab_size=50, n_positions=64, n_embd=64, n_layer=8, n_head=4)
    params = model.init(config, np.random.default_rng(0))
    for name, p in params.items():
        assert p.dtype == "float32" and p.requires_grad
        if "bias" in name:
            assert not p.data.any()
        elif "ln_" in name:
            assert (p.data == 1).all()
        else:
            assert abs(p.data.mean()) < 0.002
            assert p.data.std() == pytest.approx(0.02 / 4 if "c_proj" in name else 0.02, rel=0.03), name


def test_float32_stays_float32():
    """float32 parameters give float32 logits, losses and gradients."""
    params = model.init(CONFIG, np.random.default_rng(0))
    loss = ops.mean(ops.log_softmax(model.forward(params, CONFIG, [[1, 2, 3]])))
    loss.backward()
    assert loss.dtype == "float32" and all(p.grad.dtype == "float32" for p in params.values())


def test_frozen_is_a_copy_without_a_graph():
    """A frozen copy builds no graph and does not move with the original."""
    params = small()
    reference = model.frozen(params)
    before = model.forward(reference, CONFIG, [[1, 2]])
    for p in params.values():
        p.data += 1.0  # as nothing here would, but a user may
    assert (model.forward(reference, CONFIG, [[1, 2]]).data == before.data).all()
    assert not before.requires_grad and before.vjp is None


@pytest.mark.parametrize(
    ("tokens", "real", "error", "sentence"),
    [
        (np.zeros((1, 9), int), None, ValueError, "9 tokens is longer than the model's n_positions = 8"),
        (np.zeros((1, 12), int), np.array([[True] * 9 + [False] * 3]), ValueError, "9 tokens is longer"),
        (np.array([[1, 5]]), None, IndexError, "index 5 at position (0, 1) is outside 0 <= index < 5"),
        (np.array([[1, -1]]), None, IndexError, "index -1"),
        (np.array([1, 2]), None, ValueError, "tokens must be (B, T), not (2,)"),
        (np.array([[1, 2]]), np.array([[True]]), ValueError, "and `real` the same, not (1, 1)"),
        (np.array([[1, 2]]), np.array([[1, 2]]), ValueError, "not an additive mask, not other numbers"),
        (np.array([[1, 2]]), np.zeros((1, 2)), ValueError, "not an additive mask, not other numbers"),
        (np.array([[1, 2, 3]]), np.array([[True, False, True]]), ValueError, "row 0 has a pad between"),
        (np.array([[1, 2, 3, 4]]), np.array([[False, True, False, True]]), ValueError, "row 0 has a pad between"),
    ],
)
def test_wrong_tokens_are_refused(tokens, real, error, sentence):
    """Texts that are too long, of another vocabulary or of another shape are refused with a sentence."""
    with pytest.raises(error, match=re.escape(sentence)):
        logits(tokens, real)


@pytest.mark.parametrize(
    ("sizes", "sentence"),
    [
        ((5, 8, 8, 2, 3), "n_embd = 8 must be a multiple of n_head = 3"),
        ((5, 8, 8, 0, 2), "n_layer must be a positive integer, not 0"),
        ((5, 8.0, 8, 2, 2), "n_positions must be a positive integer, not 8.0"),
        ((5, True, 8, 2, 2), "n_positions must be a positive integer, not True"),
    ],
)
def test_wrong_sizes_are_refused(sizes, sentence):
    """Sizes that fit no model are refused where they are stated."""
    with pytest.raises(ValueError, match=sentence):
        Config(*sizes)


@pytest.mark.parametrize("kind", [int, "uint8", list])
def test_ones_and_zeros_are_a_mask(kind):
    """A mask of ones and zeros is one of true and false."""
    tokens, real = np.array([[0, 1, 2]]), np.array([[False, True, True]])
    ones = real.astype(int).tolist() if kind is list else real.astype(kind)
    close(logits(tokens, ones), logits(tokens, real), atol=0)


def test_a_size_may_be_an_integer_of_numpy():
    """Sizes are kept as Python's integers, which JSON can write."""
    config = model.Config(np.int64(7), *map(np.int32, (8, 4, 1, 2)))
    assert config == model.Config(7, 8, 4, 1, 2) and {type(size) for size in vars(config).values()} == {int}


@pytest.mark.parametrize("real", [None, np.ones((2, 4), bool)], ids=["one block", "two blocks"])
@pytest.mark.parametrize("wanted", [[0, 3, 6], [6, 0, 3], [5], [0]])
def test_wanted_rows_have_the_logits_that_they_had(wanted, real):
    """Leaving out unwanted rows after the last attention changes no value and no gradient."""
    tokens = np.array([[1, 2, 3, 0], [4, 4, 1, 2]])
    g = np.random.default_rng(0).normal(size=(len(wanted), 5))
    results = []
    for all_rows in (True, False):
        params = small()
        rows = model.batch_rows(tokens, CONFIG, real)
        logits = model.row_logits(params, CONFIG, rows if all_rows else rows._replace(wanted=wanted))
        logits = logits[np.array(wanted)] if all_rows else logits
        logits.backward(g)
        results.append([logits.data, *[p.grad for p in params.values()]])
    for expected, actual in zip(*results, strict=True):
        close(actual, expected, atol=1e-13)


@pytest.mark.parametrize(("wanted", "last"), [(None, [0, 4]), ([7], [4]), ([3, 0], [0]), ([4], [4]), ([3, 4], [0, 4])])
def test_the_last_layer_attends_only_where_a_query_is_wanted(wanted, last, monkeypatch):
    """The last layer computes only blocks that hold a wanted row; the layers below compute all of them."""
    attention, starts = ops.block_attention, []

    def watched(qkv, blocks):
        starts.append([block[0].start for block in blocks])
        return attention(qkv, blocks)

    monkeypatch.setattr(ops, "block_attention", watched)
    rows = model.batch_rows(np.array([[1, 2, 3, 0], [4, 4, 1, 2]]), CONFIG, np.ones((2, 4), bool))
    model.row_logits(small(), CONFIG, rows._replace(wanted=wanted))
    assert starts == [[0, 4], last]
