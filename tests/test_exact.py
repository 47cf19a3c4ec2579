"""Enumeration, and the two oracles that find a wrong score."""

import math

import numpy as np
import pytest

from minidpo import exact, scoring
from minidpo.model import Config
from minidpo.theory import mutants
from models import small

WORLDS = [(2, 1, [1]), (2, 4, [1, 1]), (3, 3, [2, 1]), (4, 3, [2, 1, 3]), (5, 2, [0, 4, 4, 1])]
worlds = pytest.mark.parametrize(("vocab_size", "cap", "prompt"), WORLDS)


def model(vocab_size, cap, prompt):
    config = Config(vocab_size, len(prompt) + cap + 2, 8, 2, 2)
    return small(1, config), config


@worlds
def test_complete_responses(vocab_size, cap, prompt):
    """Every complete response is listed once, shortest first."""
    responses = [tuple(y) for y in exact.complete_responses(vocab_size, cap)]
    n = vocab_size - 1
    assert len(set(responses)) == len(responses) == sum(n**k for k in range(cap + 1))
    assert [len(y) for y in responses] == sorted(len(y) for y in responses)
    for y in responses:
        assert 0 not in y[:-1] and (y[-1] == 0 or len(y) == cap) and 1 <= len(y) <= cap


def test_a_world_that_is_too_large_is_refused():
    """An empty world, or one of more responses than `most`, raises an error that gives the number."""
    for vocab_size, cap in ((1, 2), (3, 0)):
        with pytest.raises(ValueError, match="nothing to enumerate"):
            exact.complete_responses(vocab_size, cap)
    with pytest.raises(ValueError, match="101010101 responses are too many to enumerate, 100000 at the most"):
        exact.complete_responses(101, 4)
    assert len(exact.complete_responses(11, 3, most=1111)) == 1111
    with pytest.raises(ValueError, match="1111 responses are too many to enumerate, 1000 at the most"):
        exact.complete_responses(11, 3, most=1000)


def test_preference_probabilities_keep_their_tails():
    """sigma(z) is exact where it is small, and 0 or 1 where e^z would overflow."""
    p = exact.preference_probabilities(np.array([0.0, 40.0, 1000.0]))
    expected = [[0.5, 1 / (1 + math.exp(40)), 0.0], [1 / (1 + math.exp(-40)), 0.5, 0.0], [1.0, 1.0, 0.5]]
    np.testing.assert_allclose(p, expected, rtol=1e-15)


@worlds
def test_probabilities_sum_to_one(vocab_size, cap, prompt):
    """Probabilities of all responses sum to 1 on all three routes: the normalisation oracle."""
    params, config = model(vocab_size, cap, prompt)

    def first(y):
        return scoring.sequence_logprob(params, config, [prompt], [y]).item()

    def padded(y):
        return scoring.padded_logprobs(params, config, [(prompt, y, [1] * cap)], left=True)[0].item()

    def shared(y):
        return scoring.shared_logprobs(params, config, [(prompt, [0], y)])[1].item()

    for score in (first, padded, shared):
        assert abs(exact.total_probability(score, vocab_size, cap) - 1) < 1e-10


@worlds
def test_the_chain_rule_is_a_distribution(vocab_size, cap, prompt):
    """The reference for the other scores sums to 1 itself."""
    params, config = model(vocab_size, cap, prompt)
    total = exact.total_probability(lambda y: exact.chain_rule_logprob(params, config, prompt, y), vocab_size, cap)
    assert abs(total - 1) < 1e-10


@pytest.mark.parametrize("run", [1, 2, 5, 128])
def test_each_prefix_of_the_texts_is_one_row(run):
    """A tree in runs of any length gives what the chain rule does; in one run it has a row for each prefix."""
    params, config = model(4, 3, [2, 1, 3])
    prompts, responses = [[2, 1, 3], [2], [2, 1, 3]], [*exact.complete_responses(4, 2), [1, 2, 3], [1, 2, 0], [1, 2, 3]]
    tree = exact.prefix_tree(config, prompts, responses, run)
    expected = [[exact.chain_rule_logprob(params, config, x, y) for y in responses] for x in prompts]
    np.testing.assert_allclose(tree.logprobs(params, config).data, expected, rtol=1e-12)
    texts = [{(*x, *y)[:t] for y in responses for t in range(1, len(x) + len(y))} for x in prompts]
    assert (len(tree.rows.tokens) == sum(map(len, texts))) == (run >= 5)  # the responses have five


@pytest.mark.parametrize("response", [[1, 4], [1, -1], [4, 1], [-1, 1]])
def test_a_token_outside_the_vocabulary_is_refused(response):
    """A token that the model does not have raises IndexError, also the last, which is scored but never read."""
    params, config = model(4, 3, [2, 1, 3])
    with pytest.raises(IndexError, match="is outside 0 <= index < 4"):
        exact.exact_logprobs(params, config, [[2, 1]], [[1], response])
    with pytest.raises(ValueError, match="of 9 tokens is longer than the model's n_positions = 8"):
        exact.exact_logprobs(params, config, [[2, 1], [1]], [[1], [1] * 8])


@pytest.mark.parametrize(("vocab_size", "cap", "prompt"), [(3, 3, [2, 1]), (4, 3, [2, 1, 3]), (5, 2, [1, 4, 4, 1])])
def test_an_oracle_finds_every_mutant(vocab_size, cap, prompt):
    """Seven mutants do not sum to 1, four do; the chain rule finds all eleven and passes the correct score."""
    params, config = model(vocab_size, cap, prompt)
    table = {verdict.name: verdict for verdict in mutants.verdicts(params, config, prompt, cap)}
    assert len(table) == 12
    correct = table.pop("correct")
    assert abs(correct.total_probability - 1) < 1e-10 and correct.chain_rule_gap < 1e-10
    for mutant in mutants.NOT_A_DISTRIBUTION:
        verdict = table.pop(mutant.__name__)
        assert abs(verdict.total_probability - 1) > 1e-3 and verdict.chain_rule_gap > 1e-3, verdict
    for mutant in mutants.WRONG_DISTRIBUTION:
        verdict = table.pop(mutant.__name__)
        assert abs(verdict.total_probability - 1) < 1e-10 and verdict.chain_rule_gap > 1e-3, verdict
    assert not table


def test_some_sums_are_known():
    """Without its first factor a distribution sums to the number of first tokens; with one more, to that factor."""
    params, config = model(4, 3, [2, 1, 3])
    table = {verdict.name: verdict for verdict in mutants.verdicts(params, config, [2, 1, 3], 3)}
    assert table["first_token_masked"].total_probability == pytest.approx(4)
    scored = math.exp(scoring.sequence_logprob(params, config, [[2, 1]], [[3]]).item())
    assert table["last_prompt_token_scored"].total_probability == pytest.approx(scored)


def test_the_table_shows_both_oracles():
    """A line of the table has a name and the numbers of both oracles."""
    params, config = model(3, 2, [2, 1])
    lines = mutants.as_text(mutants.verdicts(params, config, [2, 1], 2)).splitlines()
    assert len(lines) == 13 and lines[1].split() == ["correct", "1.0000000000", lines[1].split()[2]]
    assert np.isfinite([float(cell) for line in lines[1:] for cell in line.split()[1:]]).all()
