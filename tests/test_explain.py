"""The view of a pair agrees with the chain rule, with finite differences and with a step."""

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import models
from minidpo import Tensor, explain, losses, model, scoring
from minidpo.model import Config
from minidpo.theory.exact import chain_rule_logprob
from minidpo.tokenizer import Tokenizer
from models import CONFIG, small

close = np.testing.assert_allclose
seeds = st.integers(0, 20)


def view_of(ids, seed=0, beta=0.3, **options):
    return explain.pair(small(seed), small(seed + 1), CONFIG, *ids, beta, **options)


@given(ids=models.pairs(), seed=seeds)
def test_each_token_has_the_probability_of_the_chain_rule(ids, seed):
    """Each token's log-probability is a difference of two chain-rule sums."""
    view = view_of(ids, seed)
    for response, tokens in zip(ids[1:], (view.chosen, view.rejected), strict=True):
        for t, token in enumerate(tokens):
            assert token.id == response[t]
            for params, logp in ((small(seed), token.logp), (small(seed + 1), token.ref_logp)):
                whole, before = (chain_rule_logprob(params, CONFIG, ids[0], response[:n]) for n in (t + 1, t))
                close(logp, whole - before, atol=1e-11)
            close(token.probability, math.exp(token.logp), rtol=1e-12)
            close(token.log_ratio, token.logp - token.ref_logp, atol=1e-12)
            close(token.reward, 0.3 * sum(other.log_ratio for other in tokens[: t + 1]), atol=1e-12)


@given(ids=models.pairs(), seed=seeds)
def test_the_footer_is_the_sum_of_the_tokens(ids, seed):
    """The log-probabilities are sums over tokens; gaps, rewards, weight and loss follow from them."""
    view = view_of(ids, seed)
    for name in ("logp", "ref_logp"):
        for side, tokens in (("w", view.chosen), ("l", view.rejected)):
            close(getattr(view, f"{name}_{side}"), sum(getattr(token, name) for token in tokens), atol=1e-12)
    close(view.policy_gap, view.logp_w - view.logp_l, atol=1e-12)
    close(view.margin, view.policy_gap - view.reference_gap, atol=1e-12)
    close([view.reward_w, view.reward_l], [view.chosen[-1].reward, view.rejected[-1].reward], atol=1e-12)
    z = 0.3 * view.margin
    close([view.weight, view.loss], [1 / (1 + math.exp(z)), math.log(1 + math.exp(-z))], rtol=1e-10)
    assert {token.coefficient for token in view.chosen} == {-0.3 * view.weight}
    assert {token.coefficient for token in view.rejected} == {0.3 * view.weight}


def loss_of_rows(logits, ids, ref_gap, beta):
    """The loss from the logits of contexts, in plain NumPy; a context is looked up by its tokens."""
    contexts = {}
    for y in ids[1:]:
        for t in range(len(y)):
            contexts.setdefault(tuple(y[:t]), len(contexts))
    logp = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    w, l = (sum(logp[contexts[tuple(y[:t])], token] for t, token in enumerate(y)) for y in ids[1:])
    return np.log(1 + np.exp(-beta * (w - l - ref_gap))), len(contexts)


@given(ids=models.pairs(), seed=seeds)
def test_pushes_are_the_derivative_in_the_logits(ids, seed):
    """The pushes are minus the complex-step derivative of the loss in the logits of each context."""
    view = view_of(ids, seed)
    logits = explain.context_logits(explain.double(small(seed)), CONFIG, view.ids).data
    _, contexts = loss_of_rows(logits, ids, view.reference_gap, view.beta)
    assert len(logits) == contexts
    gradient = np.zeros(logits.shape)
    for entry in np.ndindex(logits.shape):
        moved = logits.astype(complex)
        moved[entry] += 1e-20j
        gradient[entry] = loss_of_rows(moved, ids, view.reference_gap, view.beta)[0].imag / 1e-20
    for side, tokens in enumerate((view.chosen, view.rejected)):
        for token, row in zip(tokens, explain.context_rows(view.ids)[side], strict=True):
            push = -gradient[row]
            close(token.push, push[token.id], atol=1e-14)
            close(token.gradient_norm, np.sqrt((push**2).sum()), atol=1e-14)
            if token.row != "shared":
                ups, downs = np.sort(push[push > 1e-14])[::-1][:3], np.sort(push[push < -1e-14])[:3]
                close([x for _, x in token.up][: len(ups)], ups, atol=1e-14)
                close([x for _, x in token.down][: len(downs)], downs, atol=1e-14)
                for name, x in token.up + token.down:
                    close(push[int(name.replace("<|endoftext|>", "#0")[1:])], x, atol=1e-14)


@given(ids=models.pairs(), seed=seeds)
def test_shared_tokens_cancel_exactly(ids, seed):
    """The pushes on shared tokens are exactly 0; where the responses part exactly two logits move."""
    view = view_of(ids, seed)
    equal = [a == b for a, b in zip(ids[1], ids[2])]
    assert view.shared == (equal.index(False) if False in equal else len(equal))
    for tokens in (view.chosen, view.rejected):
        for t, token in enumerate(tokens):
            assert (token.row == "shared") == (t < view.shared)
            if token.row == "shared":
                assert token.push == token.gradient_norm == 0 and token.up == token.down == []
            if token.row == "branch":
                assert t == view.shared and [len(token.up), len(token.down)] == [1, 1]
                close(token.up[0][1], 0.3 * view.weight, rtol=1e-12)
    assert ("identical" in view.says) == (ids[1] == ids[2])


@given(ids=models.pairs(), seed=seeds)
def test_its_sentences_are_true(ids, seed):
    """The sentences state both moves, the change of the gap, sigma(z) and the weight."""
    view = view_of(ids, seed)
    if ids[1] == ids[2]:
        assert "identical" in view.says
        return
    assert f"log pi(chosen) has moved by {view.logp_w - view.ref_logp_w:+.3f} nats" in view.says
    assert f"log pi(rejected) by {view.logp_l - view.ref_logp_l:+.3f}:" in view.says
    word = "larger" if view.policy_gap > view.reference_gap else "smaller"
    assert f"{abs(view.policy_gap - view.reference_gap):.3f} nats {word} than under the reference" in view.says
    assert f"sigma(z) = {1 - view.weight:.3f}" in view.says and f"sigma(-z) = {view.weight:.3g}." in view.says


def test_at_the_reference_nothing_has_moved():
    """A policy equal to its reference has margin 0 and loss log 2."""
    same = explain.pair(small(0), small(0), CONFIG, [0, 1], [2, 0], [3, 0], 0.3)
    assert "is as under the reference" in same.says and same.margin == 0 and same.loss == math.log(2)


def test_beta_is_a_tenth_unless_given():
    """The default beta is that of `dpo_training_step`."""
    ids = ([0, 1], [2, 0], [3, 0])
    assert explain.pair(small(0), small(1), CONFIG, *ids) == view_of(ids, beta=0.1)


def test_it_is_json_and_names_its_tokens():
    """A view converts to JSON with fields and properties; without a tokenizer tokens are named by their ids."""
    view = view_of(([0, 1], [2, 0], [3, 0]), tokenizer=Tokenizer("\n ab"))
    content = json.loads(json.dumps(view.as_dict(), allow_nan=False))
    assert content["prompt"] == ["<|endoftext|>", "\n"] and content["weight"] == view.weight
    assert [token["token"] for token in content["chosen"]] == [" ", "<|endoftext|>"]
    assert content["chosen"][0]["up"] == [[" ", view.chosen[0].push]]
    assert content.keys() >= {*explain.tokens.DERIVED, "beta", "logp_w", "ids"}
    assert all(content[name] == getattr(view, name) for name in explain.tokens.DERIVED)
    assert view_of(([0, 1], [2, 0], [3, 0])).prompt == ["<|endoftext|>", "#1"]


def test_weights_in_float32_and_a_reference_of_another_shape():
    """float32 weights are explained in float64, and the reference may have another shape."""
    config = Config(CONFIG.vocab_size, 12, 4, 1, 1)
    policy = {name: Tensor(p.data.astype("float32")) for name, p in small().items()}
    reference = model.init(config, np.random.default_rng(0))
    ids = ([0, 1], [2, 3, 0], [2, 0])
    view = explain.pair(policy, reference, CONFIG, *ids, reference_config=config)
    exact = {name: p.data.astype("float64") for name, p in reference.items()}
    logp = chain_rule_logprob({name: Tensor(p) for name, p in exact.items()}, config, ids[0], ids[1])
    close(view.ref_logp_w, logp, atol=1e-12)
    assert explain.largest_differences(explain.four_ways(policy, CONFIG, view))[0] < 1e-12


def test_a_pair_that_cannot_be_explained_is_refused():
    """An empty response and a log-probability that is not finite raise an error."""
    with pytest.raises(ValueError, match="rejected has no token"):
        view_of(([0], [1], []))
    broken = small()
    broken["ln_f.bias"].data = broken["ln_f.bias"].data * np.nan
    with pytest.raises(FloatingPointError, match="under the policy is not finite"):
        explain.pair(broken, small(), CONFIG, [0], [1], [2])
    with pytest.raises(FloatingPointError, match="under the reference is not finite"):
        explain.pair(small(), broken, CONFIG, [0], [1], [2])


@given(ids=models.pairs(), seed=seeds)
def test_the_four_ways_agree(ids, seed):
    """Formula, formula per logit and autograd agree to 1e-12, and the finite difference to 1e-6."""
    view = view_of(ids, seed)
    rows = explain.four_ways(small(seed), CONFIG, view)
    exact, finite = explain.largest_differences(rows)
    assert exact < 1e-12 and finite < 1e-6
    names = [row.name for row in rows]
    assert names[:4] == ["logp_w", "logp_l", "ref_logp_w", "ref_logp_l"]
    assert [name.partition("[")[0] for name in names[-len(small()) :]] == list(small())
    if ids[1] != ids[2]:
        assert max(abs(row.autograd) for row in rows[4:]) > 1e-6
    pushes = {
        (side, t): token
        for side, part in (("chosen", view.chosen), ("rejected", view.rejected))
        for t, token in enumerate(part)
    }
    tokens = [row for row in rows if " token " in row.name]
    hardest = sorted((abs(token.push) for token in pushes.values() if token.row != "shared"), reverse=True)[:6]
    close([abs(row.autograd) for row in tokens], hardest, atol=1e-14)
    for row in tokens:
        side, _, t, _ = row.name.replace(",", "").split(maxsplit=3)
        close(row.autograd, -pushes[side, int(t)].push, atol=1e-14)
    params = {name: Tensor(p.data, requires_grad=True) for name, p in small(seed).items()}
    logp_w, logp_l = scoring.shared_logprobs(params, CONFIG, [ids])
    losses.dpo_loss(logp_w, logp_l, [view.ref_logp_w], [view.ref_logp_l], view.beta).loss.backward()
    for row, p in zip(rows[-len(params) :], params.values(), strict=True):
        # the entry with the largest gradient; equal responses leave only rounding
        close(abs(row.autograd), abs(p.grad).max(), rtol=1e-9, atol=1e-13)


def test_the_difference_is_as_fine_as_beta_asks():
    """The step of the difference shrinks with 1/beta, so that the fourth way agrees at a large beta too."""
    policy = small(0)
    view = explain.pair(policy, policy, CONFIG, [0, 1], [2, 0], [3, 0], 1e4)
    rows = explain.four_ways(policy, CONFIG, view)
    _, finite = explain.largest_differences(rows)
    assert finite < 1e-4 * max(abs(row.autograd) for row in rows)


@pytest.mark.parametrize("broken", ["dpo_gradient", "context_gradient", "vjp"])
def test_four_ways_see_what_is_wrong(broken, monkeypatch):
    """A wrong gradient, a wrong formula per logit or a wrong vjp makes the ways disagree."""
    view = view_of(([0, 1], [2, 3, 0], [2, 1, 0]))
    if broken == "dpo_gradient":
        correct = losses.dpo_gradient
        monkeypatch.setattr(losses, "dpo_gradient", lambda *args: tuple(1.01 * g for g in correct(*args)))
    elif broken == "context_gradient":
        monkeypatch.setattr(explain.ways, "context_gradient", lambda logits, *rest: 0.01 * np.ones(logits.shape))
    else:
        loss = losses.dpo_loss

        def wrong(*args, **options):
            out = loss(*args, **options)
            return out._replace(loss=out.loss * 1.01)

        monkeypatch.setattr(losses, "dpo_loss", wrong)
    exact, finite = explain.largest_differences(explain.four_ways(small(), CONFIG, view))
    assert exact > 1e-4 and finite > 1e-4


def test_a_device_is_brought_to_the_host(cupy):
    """A model on a device has the same view."""
    policy = {name: Tensor(cupy.asarray(p.data)) for name, p in small(0).items()}
    ids = ([0, 1], [2, 3, 0], [2, 0])
    assert explain.pair(policy, policy, CONFIG, *ids) == explain.pair(small(0), small(0), CONFIG, *ids)
