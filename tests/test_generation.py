"""Sampling has the logits of a full forward, draws from the correct distribution and stops where it should."""

import math
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minidpo import generation, model, scoring
from minidpo.generation import Cache, draw, generate
from minidpo.tokenizer import END_OF_TEXT
from models import CONFIG, ids, small

close = np.testing.assert_allclose
prompts = st.lists(ids(1, 5), min_size=1, max_size=3)


@given(prompts=st.lists(ids(1, 5), min_size=1, max_size=4), new=ids(3, 3), data=st.data())
def test_the_cache_gives_the_logits_of_a_full_forward(prompts, new, data):
    """The cache gives the logits of a full forward, for prompts of any lengths, also after some texts have left."""
    params = small()
    cache, texts = Cache(params, CONFIG, prompts, max(map(len, prompts)) + 3), [list(x) for x in prompts]
    logits = cache.read()
    for token in new:
        for text, row in zip(texts, logits, strict=True):
            close(row, model.forward(params, CONFIG, [text]).data[0, -1], rtol=1e-10, atol=1e-10)
        left = data.draw(st.lists(st.sampled_from(range(len(texts))), min_size=1, unique=True).map(sorted))
        rows = cache.keep(left)
        assert sorted(rows) == left
        texts = [[*texts[row], (token + row) % CONFIG.vocab_size] for row in rows]
        logits = cache.extend(np.array([text[-1] for text in texts]))


def forwards(monkeypatch):
    """A list that receives the shape of the new tokens of every forward."""
    shapes, forward = [], Cache.forward

    def counting(self, tokens, *others):
        shapes.append(tokens.shape)
        return forward(self, tokens, *others)

    monkeypatch.setattr(Cache, "forward", counting)
    return shapes


def test_texts_that_have_ended_leave_the_batch(monkeypatch):
    """Every step computes one row for each text that goes on, so in all one row for each token but the last."""
    shapes = forwards(monkeypatch)
    prompts = [[b % 5, b // 5] for b in range(20)]
    out = generate(small(), CONFIG, prompts, np.random.default_rng(0), 9)
    lengths = np.array([len(response) for response in out.responses])
    assert len(set(lengths)) > 3
    assert shapes == [(20, 2)] + [((lengths > t).sum(), 1) for t in range(1, max(lengths))]


def test_each_prompt_is_read_once_beside_those_of_its_length(monkeypatch):
    """Equal prompts are read once and prompts of one length together, none of them token by token."""
    shapes = forwards(monkeypatch)
    prompts = [[1, 2, 3], [4], [1, 2, 3], [3], [4], [4], [2, 2, 2, 2], [1, 2, 4]]
    generate(small(), CONFIG, prompts, np.random.default_rng(0), 1)
    assert shapes == [(2, 1), (2, 3), (1, 4)]


@given(
    prompts=prompts, seed=st.integers(0, 99), cap=st.integers(1, 9), temperature=st.sampled_from([0.0, 0.5, 1.0, 3.0])
)
def test_the_logprobs_of_a_sample_are_those_of_scoring(prompts, seed, cap, temperature):
    """A sample's log-probabilities add up to its score, for complete and for cut responses."""
    params = small()
    out = generate(params, CONFIG, prompts, np.random.default_rng(seed), cap, temperature, top_k=4, top_p=0.95)
    for prompt, response, logprobs in zip(prompts, out.responses, out.logprobs):
        score = scoring.sequence_logprob(params, CONFIG, [prompt], [response]).item()
        close(math.fsum(logprobs), score, rtol=1e-10, atol=1e-10)
        assert len(logprobs) == len(response)


@given(prompts=prompts, seed=st.integers(0, 99), cap=st.integers(1, 9))
def test_a_response_is_complete(prompts, seed, cap):
    """A response ends at its first end-of-text, or without one at the length limit."""
    out = generate(small(), CONFIG, prompts, np.random.default_rng(seed), cap)
    for prompt, response in zip(prompts, out.responses):
        limit = min(cap, CONFIG.n_positions + 1 - len(prompt))
        assert END_OF_TEXT not in response[:-1]
        assert 1 <= len(response) <= limit and (response[-1] == END_OF_TEXT or len(response) == limit)


@given(prompts=prompts, seed=st.integers(0, 99))
def test_a_prompt_s_sample_does_not_depend_on_when_others_end(prompts, seed):
    """Equal random numbers give a prompt the same response alone and among other prompts."""

    class OneNumberPerStep(np.random.Generator):
        def random(self, n):
            return np.full(n, self.numbers.random())

    def sample(prompts):
        rng = OneNumberPerStep(np.random.PCG64())
        rng.numbers = np.random.default_rng(seed)
        return generate(small(), CONFIG, prompts, rng, 9).responses

    assert sample(prompts) == [sample([prompt])[0] for prompt in prompts]


@given(prompts=prompts, seed=st.integers(0, 99), cap=st.integers(1, 9))
def test_a_common_generator_gives_each_step_a_number_per_prompt(prompts, seed, cap):
    """A common generator's numbers are a table of steps by prompts, whatever their lengths and those of responses."""
    numbers = iter(np.random.default_rng(seed).random((9, len(prompts))).T)

    class Column:
        def __init__(self):
            self.numbers = iter(next(numbers))

        def random(self):
            return next(self.numbers)

    common = generate(small(), CONFIG, prompts, np.random.default_rng(seed), cap)
    assert common.responses == generate(small(), CONFIG, prompts, [Column() for _ in prompts], cap).responses


@given(prompts=prompts, seed=st.integers(0, 99))
def test_a_prompt_with_its_own_generator_does_not_depend_on_the_others(prompts, seed):
    """With a generator for each, a prompt has the same response alone and among prompts of any lengths."""

    def rngs():
        return [np.random.default_rng([seed, b]) for b in range(len(prompts))]

    together = generate(small(), CONFIG, prompts, rngs(), 3).responses
    assert together == [generate(small(), CONFIG, [x], [rng], 3).responses[0] for x, rng in zip(prompts, rngs())]


def test_generators_are_one_or_one_for_each_prompt():
    """A number of generators other than one, or one for each prompt, is refused with both numbers."""
    with pytest.raises(ValueError, match="there are 2 random generators for 1 prompts"):
        generate(small(), CONFIG, [[1]], [np.random.default_rng(0)] * 2, 3)


def test_each_prompt_has_its_own_random_numbers():
    """Eight samples of one prompt are mostly different."""
    out = generate(small(), CONFIG, [[1]] * 8, np.random.default_rng(0), 8)
    assert len({tuple(response) for response in out.responses}) > 4


def test_a_single_prompt_is_a_batch_of_one():
    """A list of ids, an array of ids and a batch with one row give the same sample."""
    for prompt in ([1, 2], np.array([1, 2]), [[1, 2]]):
        assert generate(small(), CONFIG, prompt, np.random.default_rng(0), 4) == generate(
            small(), CONFIG, np.array([[1, 2]]), np.random.default_rng(0), 4
        )


def test_nan_is_refused_and_a_tiny_temperature_is_greedy():
    """The message names the prompt whose log-probabilities are nan; a temperature of almost 0 overflows nowhere."""
    logp = np.log([[0.7, 0.2, 0.1]])
    assert draw(logp, np.array([0.999]), 1e-320, None, None).tolist() == [0]
    params = small()
    params["wpe.weight"].data[2:] = np.nan  # so that the prompt with a third token is at fault
    with pytest.raises(FloatingPointError, match=re.escape("nan after the prompt that begins with the ids [1, 2, 3];")):
        generate(params, CONFIG, [[1], [1, 2, 3]], np.random.default_rng(0), 1)


def test_ties_go_to_the_first():
    """Of equally likely tokens the first id comes first, so a seed gives the same sample on every machine."""
    assert draw(np.log(np.full((1, 20), 0.05)), np.array([0.0]), 1.0, 1, None).tolist() == [0]


def test_the_cache_has_the_model_s_dtype():
    """A float32 model samples in float32."""
    params = model.init(CONFIG, np.random.default_rng(0))
    cache = Cache(params, CONFIG, [[1, 2]], 3)
    assert cache.keys_values.dtype == cache.read().dtype == cache.extend(np.array([1])).dtype == "float32"


def test_greedy_takes_the_likeliest():
    """Temperature 0, a tiny temperature and top_k = 1 all take the likeliest token of each step."""
    params, rng = small(), np.random.default_rng(0)
    greedy = generate(params, CONFIG, [[1, 2], [3]], rng, 5, temperature=0)
    cold = generate(params, CONFIG, [[1, 2], [3]], rng, 5, temperature=1e-6)
    assert greedy.responses == cold.responses == generate(params, CONFIG, [[1, 2], [3]], rng, 5, top_k=1).responses
    text = [1, 2]
    for token in greedy.responses[0]:
        assert token == model.forward(params, CONFIG, [text]).data[0, -1].argmax()
        text.append(token)


def distribution(logp, temperature, top_k, top_p):
    """The distribution from its definition, one token at a time."""
    p = np.exp(logp / temperature - np.max(logp / temperature))
    order = sorted(range(len(p)), key=lambda i: -p[i])[:top_k]
    total, nucleus, mass = sum(p[i] for i in order), [], 0.0
    for i in order:
        if top_p is None or mass < top_p:
            nucleus.append(i)
        mass += p[i] / total
    return np.array([p[i] if i in nucleus else 0.0 for i in range(len(p))]) / sum(p[i] for i in nucleus)


@given(
    logits=st.lists(st.floats(-4, 4), min_size=5, max_size=5, unique=True),
    temperature=st.floats(0.3, 3),
    top_k=st.sampled_from([None, 1, 2, 4, 9]),
    top_p=st.sampled_from([None, 0.1, 0.5, 0.9, 1.0]),
)
def test_tokens_are_drawn_from_the_distribution(logits, temperature, top_k, top_p):
    """Over a grid of uniform numbers, each token is drawn as often as its probability says, and none has p = 0."""
    logp = np.array(logits) - np.logaddexp.reduce(logits)
    n = 2000
    uniform = (np.arange(n) + 0.5) / n
    tokens = draw(np.tile(logp, (n, 1)), uniform, temperature, top_k, top_p)
    close(np.bincount(tokens, minlength=5) / n, distribution(logp, temperature, top_k, top_p), atol=1.5 / n)
    edge = np.array([0.0, np.nextafter(1.0, 0.0)])
    assert (
        distribution(logp, temperature, top_k, top_p)[draw(np.tile(logp, (2, 1)), edge, temperature, top_k, top_p)] > 0
    ).all()


def test_the_defaults_leave_the_model_s_distribution_alone():
    """The defaults are temperature 1, no top_k and all of the probability."""

    def sample(**options):
        return generate(small(), CONFIG, [[1, 2], [3]], np.random.default_rng(0), 6, **options)

    assert sample() == sample(temperature=1.0, top_k=None, top_p=1.0) != sample(temperature=2.0)


def test_sampling_builds_no_graph():
    """The cache holds parameters that need no gradient, so a long sample stores no activations."""
    cache = Cache(small(), CONFIG, [[1]], 3)
    assert not any(p.requires_grad for p in cache.params.values())


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens = 0 is out of range: it must be at least 1"),
        ({"temperature": -1.0}, "temperature = -1.0 is out of range: it must be at least 0"),
        ({"temperature": math.nan}, "temperature = nan is out of range"),
        ({"top_k": 0}, "top_k = 0 is out of range: it must be at least 1"),
        ({"top_p": 0.0}, "top_p = 0.0 is out of range"),
        ({"top_p": 1.1}, "top_p = 1.1 is out of range: it must be above 0 and at most 1"),
        ({"prompt": []}, "there is no prompt"),
        ({"prompt": [[1], []]}, "prompt 1 has no token: begin each prompt with end-of-text, id 0"),
        ({"prompt": [[1], [1] * 9]}, "prompt 1 has 9 tokens, but the model's n_positions = 8: shorten it"),
    ],
)
def test_wrong_arguments_are_refused(options, sentence):
    """A number out of its range and an unusable prompt are errors; the message names the range or the prompt."""
    arguments = {"prompt": [[1]], "max_new_tokens": 3, **options}
    with pytest.raises(ValueError, match=sentence):
        generate(small(), CONFIG, rng=np.random.default_rng(0), **arguments)


def test_unknown_ids_are_refused():
    """Ids are integers of the vocabulary."""
    with pytest.raises(TypeError, match="integer"):
        generation.generate(small(), CONFIG, [[1.7]], np.random.default_rng(0), 2)
    with pytest.raises(IndexError, match="index 5"):
        generation.generate(small(), CONFIG, [[5]], np.random.default_rng(0), 2)
