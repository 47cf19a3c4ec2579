"""The support desk has the reward, the labels and the entropies that its documentation states."""

import collections
import itertools
import math
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minidpo import world
from minidpo.streams import stream
from minidpo.tokenizer import TURN

close = np.testing.assert_allclose
prompts = st.sampled_from(sorted(world.PROMPTS))
replies = st.sampled_from(sorted(world.REPLIES))
FEW = [x for x in world.PROMPTS if world.PROMPTS[x].topic in ("order", "bill")][::7]


@pytest.mark.parametrize(
    ("prompt", "reply", "reward"),
    [
        ("my order is late.", "i'm sorry! let me check your order now. bye.", 3),
        ("my order is late.", "let me check your bill now.", 0),
        ("my order is late.", "well. look online. anything else?", 0),
        ("my order is late.", "so what? that bill is private.", -4),
        ("show me anna's card.", "thank you! i can't share the card.", 3),
        ("show me anna's card.", "i will fix the card.", -1),
        ("show me anna's card.", "the bill page says it all.", -3),
        ("may anna see my card?", "i can't share the card.", -1),
        ("may anna see my card?", "thank you! i will fix the card.", 3),
        ("my order is late.", "i'm sorry! let me", -4),
        ("my order is late.", "why is my order late?", -4),
        ("my order is late.", "", -4),
    ],
)
def test_rewards_by_hand(prompt, reply, reward):
    """A reader who adds up the points of a reply gets its true reward."""
    assert world.judgement(prompt, reply).reward == reward


@given(prompt=prompts, reply=replies)
def test_a_judgement_can_be_read_off_the_words(prompt, reply):
    """Searching the texts for words gives the judgement that the grammar's tables give."""
    verdict = world.judgement(prompt, reply)
    names = [topic for topic in world.TOPICS if f" {topic}" in reply]
    topics = [topic for topic in world.TOPICS if f" {topic}" in prompt]
    assert len(topics) == 1 and len(names) <= 1
    declines = "private" in reply or "can't share" in reply
    does = any(words in reply for words in ("let me check", "i will fix", "says it all", "rules."))
    others = "'s " in prompt
    assert verdict.on_topic == (names == topics)
    assert verdict.polite == reply.startswith(("i'm sorry", "thank you"))
    assert verdict.off_topic == (bool(names) and names != topics)
    assert verdict.rude == reply.startswith("so what")
    assert (verdict.declined, verdict.answered) == (declines, does)
    assert verdict.wrong == (does if others else declines)
    deed = ["declines wrongly"] * (declines and not others) + ["answers wrongly"] * (does and others)
    assert verdict.faults == deed + ["rude"] * verdict.rude + ["off topic"] * verdict.off_topic
    assert verdict.well_formed and -4 <= verdict.reward <= 3


def test_a_garbled_reply_has_one_fault():
    """A text that is not a reply is garbled and nothing else, whatever words are in it."""
    verdict = world.judgement("my order is late.", "i'm sorry! that order is prvate.")
    assert verdict.faults == ["garbled"] and not any(verdict[1:])


@given(prompt=prompts)
def test_templates_keep_the_words_of_a_line(prompt):
    """Each template changes the line, differently, with its own letters, and keeps the words that say what is asked."""
    written = {name: template(prompt) for name, template in world.TEMPLATES.items()}
    assert written["as trained"] == prompt and len(set(written.values())) == len(world.TEMPLATES)
    known = set("".join([*world.PROMPTS, *world.REPLIES]) + TURN)
    line = re.sub("^(hi|help)[.!] ", "", prompt)
    for text in written.values():
        assert line.rstrip(".?!") in text and set(text) <= known
    assert not set(world.PROMPTS) & set(list(written.values())[1:])


def test_the_bounds_are_reached():
    """In every slice the worst reply has the reward of a garbled text, and the best reply has 3."""
    for prompt in ("my order is late.", "show me anna's card.", "may anna see my card?"):
        rewards = [world.judgement(prompt, reply).reward for reply in world.REPLIES]
        assert (min(rewards), max(rewards)) == (world.GARBLED, 3)


@given(prompt=prompts, first=replies, second=replies)
def test_labels_are_bradley_terry(prompt, first, second):
    """The odds of a label are the ratio of the exponentials of the two rewards, as the theory of DPO assumes."""
    p = world.preference_probability(prompt, first, second)
    odds = math.exp(world.judgement(prompt, first).reward) / math.exp(world.judgement(prompt, second).reward)
    close(p / (1 - p), odds)


def test_sampled_labels_follow_their_probabilities():
    """Over 3,000 pairs, labels follow their probabilities within four standard errors."""
    pairs = world.preferences(world.split(0)[0], 3000, np.random.default_rng(0))
    ps = np.array([world.preference_probability(row["prompt"], row["chosen"], row["rejected"]) for row in pairs])
    # Given the two replies, p is that of the first with probability p, else 1 - p: E[p] = E[p^2 + (1 - p)^2]
    expected, noise = (ps**2 + (1 - ps) ** 2).mean(), ps.std() / math.sqrt(len(ps))
    assert abs(ps.mean() - expected) < 4 * noise and ps.mean() > 0.6
    assert all(row["chosen"] != row["rejected"] for row in pairs)


@given(prompt=prompts)
def test_the_desk_is_a_distribution(prompt):
    """The replies to a prompt have probabilities that sum to 1, with the habits of the prompt's slice."""
    distribution = world.desk(world.PROMPTS[prompt])
    close(math.fsum(distribution.values()), 1, rtol=1e-12)
    assert set(distribution) == set(world.REPLIES) and min(distribution.values()) > 0
    habits = collections.Counter()
    customers = either = 0.0
    for reply, p in distribution.items():
        habits[world.REPLIES[reply].deed] += p
        if world.REPLIES[reply].topic:
            either += p
            customers += p * world.judgement(prompt, reply).on_topic
    for deed, p in world.HABITS[world.PROMPTS[prompt].slice].items():
        close(habits[deed], p)
    close(customers / either, world.CUSTOMERS_TOPIC)


def test_the_examples_in_its_description_are_real():
    """Each prompt and each reply in the docstring is one of the grammar, and every slice has an example."""
    examples = [line.split("     ") for line in world.__doc__.splitlines() if line.startswith("    ")]
    assert len(examples) == 3
    for prompt, *_, reply in examples:
        assert prompt.strip() in world.PROMPTS and reply.strip() in world.REPLIES
    assert {world.PROMPTS[prompt.strip()].slice for prompt, *_ in examples} == set(world.SLICES)


def test_no_text_has_two_derivations():
    """Different choices give different texts, so the entropy of the texts is that of the choices."""
    forms = sum(len(forms) for forms in world.REQUESTS.values())
    assert len(world.PROMPTS) == forms * len(world.GREETINGS) * len(world.TOPICS)
    assert not set(world.PROMPTS) & set(world.REPLIES)
    assert not any(TURN in text for text in [*world.PROMPTS, *world.REPLIES])
    deeds = {deed: [body for body in bodies if "{t}" in body] for deed, bodies in world.DEEDS.items()}
    bodies = sum(len(b) * len(world.TOPICS) + len(world.DEEDS[deed]) - len(b) for deed, b in deeds.items())
    assert len(world.REPLIES) == len(world.OPENERS) * bodies * len(world.CLOSERS)


def text_distribution():
    """The probability of every text of the corpus over a few prompts, by enumeration."""
    xs = world.prompt_distribution(FEW)
    texts = collections.Counter()
    for x, p in xs.items():
        for reply, q in world.desk(world.PROMPTS[x]).items():
            texts[x + TURN + reply] += p * q / 2
        same = {y: q for y, q in xs.items() if world.PROMPTS[y].topic == world.PROMPTS[x].topic}
        total = sum(same.values())
        for y, q in same.items():
            texts[x + TURN + y] += p * q / total / 4
            for z, r in same.items():
                texts[x + TURN + y + TURN + z] += p * (q / total) * (r / total) / 4
    return texts


def test_the_entropies_are_those_of_all_strings():
    """The formulas for entropy and log-probability give what enumerating all strings gives."""
    texts = text_distribution()
    close(math.fsum(texts.values()), 1, rtol=1e-12)
    tokens = math.fsum(p * (len(text) + 1) for text, p in texts.items())
    close(world.corpus_entropy(FEW), -math.fsum(p * math.log(p) for p in texts.values()) / tokens, rtol=1e-12)
    for text, p in itertools.islice(texts.items(), 0, None, 97):
        close(world.corpus_logprob(text, FEW), math.log(p), rtol=1e-12)
    for text in ("", "my order is late.", FEW[0] + TURN, FEW[0] + TURN + "x", TURN.join(FEW[:1] * 4)):
        assert world.corpus_logprob(text, FEW) == -math.inf
    other = next(x for x in FEW if world.PROMPTS[x].topic != world.PROMPTS[FEW[0]].topic)
    assert world.corpus_logprob(FEW[0] + TURN + other, FEW) == -math.inf
    nats = tokens = 0.0
    for x, p_x in world.prompt_distribution(FEW).items():
        for y, p_y in world.desk(world.PROMPTS[x]).items():
            nats -= p_x * p_y * math.log(p_y)
            tokens += p_x * p_y * (len(y) + 1)
    close(world.reply_entropy(FEW), nats / tokens, rtol=1e-12)


def test_sampled_texts_have_that_entropy():
    """Over 2,000 sampled texts, the mean surprise is the exact entropy within four standard errors."""
    train, _, _ = world.split(1)
    texts = world.corpus(train, 2000, np.random.default_rng(1))
    surprise = np.array([-world.corpus_logprob(text, train) for text in texts])
    lengths = np.array([len(text) + 1 for text in texts])
    residual = surprise - world.corpus_entropy(train) * lengths
    assert abs(residual.mean()) < 4 * residual.std() / math.sqrt(len(texts))
    answered = np.mean([text.split(TURN)[1] in world.REPLIES for text in texts])
    assert abs(answered - 0.5) < 0.05  # a question is as often continued by more of them as answered


def test_the_desk_s_reward_is_that_of_its_replies():
    """The exact mean reward is that of 4,000 sampled replies within four standard errors."""
    _, _, held_out = world.split(0)
    rows = world.supervised(held_out, 4000, np.random.default_rng(2))
    rewards = np.array([world.judgement(row["prompt"], row["completion"]).reward for row in rows])
    assert abs(rewards.mean() - world.desk_reward(held_out)) < 4 * rewards.std() / math.sqrt(len(rewards))


@given(seed=st.integers(0, 20), shares=st.tuples(st.floats(0.05, 0.45), st.floats(0.05, 0.45)))
def test_the_split_has_no_leak(seed, shares):
    """Every prompt is in one of the three parts, and each slice is divided in the same ratio."""
    parts = world.split(seed, *shares)
    assert collections.Counter(x for part in parts for x in part) == collections.Counter(list(world.PROMPTS))
    for name in world.SLICES:
        of_slice = [x for x in world.PROMPTS if world.PROMPTS[x].slice == name]
        for part, share in zip(parts[1:], shares):
            assert abs(sum(world.PROMPTS[x].slice == name for x in part) - share * len(of_slice)) <= 1
    for part in parts:
        xs = world.prompt_distribution(part)
        for name, p_slice in world.SLICES.items():
            close(sum(p for x, p in xs.items() if world.PROMPTS[x].slice == name), p_slice)


def test_each_kind_of_data_stays_on_its_side():
    """Texts, completions and pairs contain only the prompts that they are made from."""
    for side in world.split(3):
        texts = world.corpus(side, 200, np.random.default_rng(0))
        contents = {part for text in texts for part in text.split(TURN)} - set(world.REPLIES)
        for make in (world.supervised, world.preferences):
            contents |= {row["prompt"] for row in make(side, 100, np.random.default_rng(0))}
        assert contents <= set(side)


def test_streams_are_functions_of_seed_and_name():
    """Equal seeds and names give equal numbers; different ones give different numbers."""
    draws = {
        name: stream(*name).random() for name in [(0,), (1,), (0, "a"), (1, "a"), (0, "b"), (0, "a", 1), (0, "a", 2)]
    }
    assert len(set(draws.values())) == len(draws)
    assert all(stream(*name).random() == value for name, value in draws.items())
