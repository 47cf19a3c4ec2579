"""Three routes, one number; and what must be refused."""

import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minidpo import ops, scoring
from minidpo.theory.exact import chain_rule_logprob
from models import CONFIG, pairs, small

close = np.testing.assert_allclose


def one_by_one(params, config, pairs):
    """The first route, text by text."""
    return tuple(
        ops.concatenate(*(scoring.sequence_logprob(params, config, [pair[0]], [pair[side]]) for pair in pairs))
        for side in (1, 2)
    )


def left_padded(params, config, pairs):
    return scoring.padded_logprobs(params, config, pairs, left=True)


ROUTES = [one_by_one, scoring.padded_logprobs, left_padded, scoring.shared_logprobs]


@given(batch=st.lists(pairs(), min_size=1, max_size=3), seed=st.integers(0, 9))
def test_the_routes_agree_in_value_and_gradient(batch, seed):
    """The routes agree in value and in every parameter's gradient."""
    rng = np.random.default_rng(seed)
    g_w, g_l = rng.normal(size=(2, len(batch)))
    results = []
    for route in ROUTES:
        params = small(seed)
        logp_w, logp_l = route(params, CONFIG, batch)
        ops.sum(logp_w * g_w + logp_l * g_l).backward()
        results.append([logp_w.data, logp_l.data, *[p.grad for p in params.values()]])
    for route, result in zip(ROUTES[1:], results[1:]):
        for value, expected in zip(result, results[0]):
            close(value, expected, rtol=1e-10, atol=1e-10, err_msg=route.__name__)


@given(pair=pairs())
def test_the_first_route_is_the_chain_rule(pair):
    """The first route is the chain rule, one forward per prefix."""
    params = small()
    logp = scoring.sequence_logprob(params, CONFIG, [pair[0]], [pair[1]]).item()
    close(logp, chain_rule_logprob(params, CONFIG, pair[0], pair[1]), atol=1e-12)


@given(pair=pairs())
def test_identical_responses_are_equally_likely(pair):
    """Two identical responses to a prompt are equally likely."""
    prompt, chosen, _ = pair
    logp_w, logp_l = scoring.shared_logprobs(small(), CONFIG, [(prompt, chosen, chosen)])
    close(logp_w.data, logp_l.data, atol=1e-12)


@given(batch=st.lists(pairs(), min_size=1, max_size=4))
def test_packed_tokens_are_the_same_tokens(batch):
    """Packed examples give the same tokens the same log-probabilities."""
    params = small()
    examples = [(prompt, chosen) for prompt, chosen, _ in batch]
    logp = scoring.packed_logprobs(params, CONFIG, examples)
    assert logp.shape == (sum(len(chosen) for _, chosen in examples),)
    close(logp.data.sum(), one_by_one(params, CONFIG, batch)[0].data.sum(), atol=1e-10)
    alone = [scoring.packed_logprobs(params, CONFIG, [example]).data for example in examples]
    close(np.sort(logp.data), np.sort(np.concatenate(alone)), atol=1e-12)


def test_a_pad_that_is_impossible_costs_nothing(monkeypatch):
    """A pad costs nothing even where its log-probability is -inf: it is not selected, not multiplied by 0."""
    forward = scoring.forward

    def impossible_pads(params, config, tokens, real):
        logits = forward(params, config, tokens, real)
        spoilt = np.where(np.asarray(real)[..., None] | (np.arange(5) != 0), 0.0, -np.inf)
        return logits + spoilt

    batch = [([1], [2, 0], [3, 4, 1, 0]), ([1, 2, 3], [0], [4, 0])]
    expected = scoring.padded_logprobs(small(), CONFIG, batch)
    monkeypatch.setattr(scoring, "forward", impossible_pads)
    for logp, right in zip(scoring.padded_logprobs(small(), CONFIG, batch), expected):
        assert (logp.data == right.data).all()


TOO_LONG = r"a text of 9 tokens is longer than the model's n_positions = 8"


@pytest.mark.parametrize("route", ROUTES)
def test_a_text_may_end_one_past_the_context(route):
    """A text may end one past the context, because its last token is not an input."""
    fits, too_long = ([1, 2, 3, 4], [1, 1, 1, 1, 0], [2]), ([1, 2, 3, 4], [2], [1, 1, 1, 1, 1, 0])
    logp_w, _ = route(small(), CONFIG, [fits])
    close(logp_w.data, chain_rule_logprob(small(), CONFIG, fits[0], fits[1]))
    with pytest.raises(ValueError, match=TOO_LONG):
        route(small(), CONFIG, [too_long])


def test_a_packed_text_may_end_one_past_the_context():
    """A packed text may end one past the context too, and no further."""
    params, fits = small(), ([1, 2, 3, 4], [1, 1, 1, 1, 0])
    close(scoring.packed_logprobs(params, CONFIG, [fits]).data.sum(), chain_rule_logprob(params, CONFIG, *fits))
    with pytest.raises(ValueError, match=TOO_LONG):
        scoring.packed_logprobs(params, CONFIG, [fits, ([1], [1] * 9)])


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("bad", [5, -1])
def test_a_token_outside_the_vocabulary_is_refused(route, bad):
    """A token outside the vocabulary is refused, as an input and as the last token."""
    for pair in (([1, bad], [2], [3]), ([1], [bad, 2], [3]), ([1], [2, bad], [3])):
        with pytest.raises(IndexError, match=f"index {bad} at position"):
            route(small(), CONFIG, [pair])


@pytest.mark.parametrize("route", ROUTES[1:])
@pytest.mark.parametrize("empty", ["prompt", "chosen", "rejected"])
def test_an_empty_part_is_refused(route, empty):
    """An empty prompt or response is refused: an empty response would score 0, the best there is."""
    parts = {"prompt": [1], "chosen": [2], "rejected": [3], empty: []}
    with pytest.raises(ValueError, match=f"example 1: the {empty} has no token"):
        route(small(), CONFIG, [([1], [2], [3]), tuple(parts.values())])
    with pytest.raises(ValueError, match="nothing to score"):
        route(small(), CONFIG, [])
    with pytest.raises(ValueError, match="example 0: the response has no token"):
        scoring.packed_logprobs(small(), CONFIG, [([1], [])])


def test_the_first_route_refuses_empty_parts_too():
    """The first route refuses empty parts and wrong shapes too."""
    for prompt, response in (([1], [2]), ([[1]], [[2], [3]])):
        with pytest.raises(ValueError, match=re.escape("must be (B, Tp) and (B, Tr), not")):
            scoring.sequence_logprob(small(), CONFIG, prompt, response)
    for prompt, response in (([[]], [[1]]), ([[1]], [[]])):
        with pytest.raises(ValueError, match=re.escape("need at least one token each")):
            scoring.sequence_logprob(small(), CONFIG, np.array(prompt, int), np.array(response, int))
