"""The loop: it learns, it repeats, and it measures on what it never saw."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minidpo import gradcheck, model, optim, training
from minidpo.exact import chain_rule_logprob
from minidpo.model import Config
from minidpo.tokenizer import Tokenizer
from models import CONFIG, pairs, small

close = np.testing.assert_allclose


@given(batch=st.lists(pairs(), min_size=1, max_size=4))
def test_nll_is_the_mean_over_response_tokens(batch):
    """Otherwise "nats a token" is a number of another kind, and no comparison with an n-gram holds."""
    params, examples = small(), [(prompt, chosen) for prompt, chosen, _ in batch]
    total = -math.fsum(chain_rule_logprob(params, CONFIG, prompt, response) for prompt, response in examples)
    tokens = sum(len(response) for _, response in examples)
    close(training.nll(params, CONFIG, examples).item(), total / tokens, rtol=1e-12)
    close(training.held_out_nll(params, CONFIG, examples, batch_size=2), total / tokens, rtol=1e-12)


def test_the_gradient_of_nll():
    """Otherwise the packed layout gives a right loss and a wrong direction."""
    examples = [([0], [1, 2, 0]), ([0, 3], [4, 0]), ([0], [2, 2, 0]), ([0], [0])]
    for method, bound in (("central", 1e-8), ("complex", 1e-13)):
        error = gradcheck.check_gradient(
            lambda params: training.nll(params, CONFIG, examples), small(), np.random.default_rng(0), 5, method
        )
        assert error < bound


def test_a_line_begins_and_ends_with_end_of_text():
    """Otherwise the model never learns to begin, or to stop."""
    assert training.line_examples(["ab", ""], Tokenizer("ab")) == [([0], [1, 2, 0]), ([0], [0])]


several_lines = st.lists(st.sampled_from("abcdefgh"), min_size=2).filter(lambda lines: len(set(lines)) > 1)


@given(lines=several_lines, share=st.floats(0, 1), seed=st.integers(0, 9))
def test_what_is_held_out_is_never_trained_on(lines, share, seed):
    """Otherwise a line that stands there twice is learnt by heart and then asked for."""
    train, held_out = training.split(lines, share, np.random.default_rng(seed))
    assert not set(train) & set(held_out) and set(train) | set(held_out) == set(lines)
    assert len(held_out) == len(set(held_out)) and abs(len(held_out) - share * len(set(lines))) <= 1
    assert train and held_out
    assert train == [line for line in lines if line in set(train)]


def test_one_line_cannot_be_split():
    """Otherwise the held-out loss is that of nothing."""
    with pytest.raises(ValueError, match="two different lines"):
        training.split(["a", "a"], 0.5, np.random.default_rng(0))


def toy(seed=0, steps=60, learning_rate=1e-2):
    tokenizer = Tokenizer("ab")
    config = Config(tokenizer.vocab_size, 8, 8, 1, 2)
    params = model.init(config, np.random.default_rng(seed))
    examples = training.line_examples(["ab", "abab", "ababab"], tokenizer)
    seen = []
    final = training.pretrain(
        params, config, examples, examples, np.random.default_rng(seed), steps, 8, learning_rate,
        warmup_steps=5, evaluate_every=20, report=seen.append,
    )  # fmt: skip
    return params, seen, final


def test_it_learns_to_the_entropy_of_its_data():
    """Three lines, a third each: log 3 nats a line, 5 tokens a line on average. Otherwise the loop does not train."""
    _, seen, final = toy(steps=300)
    assert [metrics["step"] for metrics in seen[:3]] == [0, 20, 40] and seen[-1]["step"] == 300
    assert seen[0]["eval_loss"] == pytest.approx(math.log(3), abs=0.1)
    assert math.log(3) / 5 - 1e-6 < final < math.log(3) / 5 + 0.02
    assert final == seen[-1]["eval_loss"]


def test_the_same_seed_gives_the_same_bytes():
    """Otherwise nothing that is reported can be repeated."""
    first, second, third = toy(3)[0], toy(3)[0], toy(4)[0]
    assert all(first[name].data.tobytes() == second[name].data.tobytes() for name in first)
    assert any(first[name].data.tobytes() != third[name].data.tobytes() for name in first)


def test_measuring_changes_nothing():
    """Otherwise how often one looks decides what is learnt."""
    tokenizer = Tokenizer("ab")
    config = Config(3, 8, 8, 1, 2)
    examples = training.line_examples(["ab", "abab"], tokenizer)
    trained = []
    for every in (1, 1000):
        params = model.init(config, np.random.default_rng(0))
        training.pretrain(params, config, examples, examples, np.random.default_rng(0), 5, 4, evaluate_every=every)
        trained.append(params)
    assert all((trained[0][name].data == trained[1][name].data).all() for name in trained[0])


def test_the_loop_is_its_parts():
    """AdamW, the schedule, clipping, fresh gradients: otherwise one of them is named and not done."""
    params, others = small(), small()
    examples = [([0], [1, 2, 0]), ([0, 3], [4, 0]), ([0], [2, 2, 0]), ([0], [0])]
    training.pretrain(params, CONFIG, examples, examples, np.random.default_rng(5), 4, 2, 0.01, 2, max_norm=0.1)
    optimizer = optim.AdamW(others, 0.0, betas=(0.9, 0.99), weight_decay=0.01)
    rng = np.random.default_rng(5)
    for rate in (0.005, 0.01, 0.01, 0.005):
        loss = training.nll(others, CONFIG, [examples[i] for i in rng.integers(0, 4, 2)])
        for p in others.values():
            p.grad = None
        loss.backward()
        assert optim.clip_global_norm(others, 0.1) > 0.1
        optimizer.learning_rate = rate
        optimizer.step()
    for name in params:
        close(params[name].data, others[name].data, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("wrong", [{"steps": -1}, {"evaluate_every": 0}, {"learning_rate": -1.0}, {"examples": []}])
def test_wrong_arguments_are_refused(wrong):
    """Otherwise a negative rate trains uphill, and is saved."""
    examples = [([0], [1, 0])]
    arguments = {"examples": examples, "held_out": examples, "rng": np.random.default_rng(0), "steps": 1, **wrong}
    with pytest.raises(ValueError, match="nothing to do with"):
        training.pretrain(small(), CONFIG, **arguments)


def test_a_run_that_breaks_names_its_step():
    """Otherwise nan weights are saved, and sampled from."""
    examples = [([0], [1, 2, 0])]
    with np.errstate(all="ignore"), pytest.raises((FloatingPointError, ValueError), match=r"at step \d+|finite"):
        training.pretrain(small(), CONFIG, examples, examples, np.random.default_rng(0), 3, 2, 1e300, 0)


def test_a_loss_that_is_not_finite_stops_the_run():
    """Otherwise the run goes on to the end, and saves nan."""
    tokenizer = Tokenizer("ab")
    config = Config(3, 8, 8, 1, 2)
    params = model.init(config, np.random.default_rng(0))
    params["wte.weight"].data = params["wte.weight"].data * np.float32(np.nan)
    examples = training.line_examples(["ab"], tokenizer)
    with pytest.raises(FloatingPointError, match="held-out loss is nan at step 0"):
        training.pretrain(params, config, examples, examples, np.random.default_rng(0), 5)
