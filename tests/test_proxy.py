"""The implicit reward under pressure: best-of-N against enumeration, edits against counts by hand."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minidpo import model, plots, scoring
from minidpo.audit import intervals, proxy
from minidpo.data import world
from minidpo.run.checkpoint import Checkpoint
from minidpo.streams import stream
from minidpo.tokenizer import END_OF_TEXT, TURN, Tokenizer
from models import small

SEEDS = st.integers(0, 2**32 - 1)
TOKENIZER = Tokenizer.from_text("".join([*world.PROMPTS, *world.REPLIES]) + TURN)
CONFIG = model.Config(TOKENIZER.vocab_size, n_positions=96, n_embd=8, n_layer=1, n_head=2)
ONE, OTHER = (Checkpoint(small(seed, CONFIG), CONFIG, TOKENIZER, True) for seed in (0, 1))
PROMPT = "is my order late?"


def rewards(seed, P=3, n=8, ties=True):
    """Implicit and true rewards of n replies to P prompts."""
    rng = np.random.default_rng(seed)
    implicit, true = rng.normal(0, 1, (P, n)), rng.integers(-4, 4, (P, n)).astype(float)
    return np.round(implicit) if ties else implicit, true


@given(seed=SEEDS, ties=st.booleans(), size=st.integers(1, 8))
def test_the_best_of_n_is_the_mean_over_all_subsets(seed, ties, size):
    """best_of is the mean over all C(8, N) subsets of the value of the best one, or the mean value of several best."""
    (score,), (value,) = rewards(seed, 1, ties=ties)
    best = []
    for subset in itertools.combinations(range(8), size):
        top = max(score[i] for i in subset)
        best.append(np.mean([value[i] for i in subset if score[i] == top]))
    assert proxy.best_of(score, value, size) == pytest.approx(np.mean(best), abs=1e-12)


@given(seed=SEEDS)
def test_more_replies_never_lower_the_score(seed):
    """The best of N by a score rises in N in that score, from the plain mean at N = 1 to the maximum at N = n."""
    (score,), (value,) = rewards(seed, 1, ties=False)
    best = [proxy.best_of(score, score, size) for size in range(1, 9)]
    assert all(a <= b + 1e-12 for a, b in itertools.pairwise(best))
    assert best[0] == pytest.approx(score.mean()) and best[-1] == pytest.approx(score.max())
    assert proxy.best_of(score, value, 1) == pytest.approx(value.mean(), abs=1e-12)
    assert proxy.best_of(score, value, 8) == pytest.approx(value[score.argmax()])


def test_the_best_of_64_is_exact_in_float64():
    """Weights of C(64, 32), about 1.8e18, still add up to 1."""
    score = stream(0, "scores").normal(size=64)
    for size in proxy.SIZES:
        assert proxy.best_of(score, np.ones(64), size) == pytest.approx(1, abs=1e-12)


@given(seed=SEEDS)
def test_a_reward_that_is_the_true_one_reaches_the_ceiling(seed):
    """Where the implicit reward is the true one, all three curves are one; a constant reward chooses nothing."""
    _, true = rewards(seed)
    garbled = true == -4
    for row in proxy.goodhart(true, true, garbled, (1, 2, 8)):
        assert row.implicit == row.true == row.ceiling
        assert row.kl == pytest.approx(math.log(row.size) - 1 + 1 / row.size)
    flat = proxy.goodhart(0 * true, true, garbled, (1, 2, 8))
    for row in flat:
        assert row.true == pytest.approx(flat[0].ceiling) and row.garbled.value == pytest.approx(garbled.mean())
    assert flat[0].true.value == pytest.approx(true.mean())


def test_a_planted_flaw_makes_the_true_reward_rise_and_fall():
    """A proxy that is the true reward, but loves one garbled reply of 64, has its top below N = 64."""
    true = np.tile(np.linspace(-3, 3, 64), (5, 1))
    implicit = true.copy()
    implicit[:, 0], true[:, 0] = 9.0, world.GARBLED
    rows = proxy.goodhart(implicit, true, true == world.GARBLED)
    values = [row.true.value for row in rows]
    assert max(values) == values[3] > values[0] and values[-1] == world.GARBLED
    assert [row.garbled.value for row in rows] == pytest.approx([size / 64 for size in proxy.SIZES])
    assert rows[0].garbled[1:] == pytest.approx(intervals.wilson(5 / 64, 5))
    assert [row.implicit.value for row in rows] == sorted(row.implicit.value for row in rows)
    text = proxy.goodhart_text(rows).split("\n")
    assert [int(line.split()[0]) for line in text[1:]] == list(proxy.SIZES) and "1.00" in text[-1]
    panels = proxy.panels(rows)
    assert panels[0].curves[0].y == values and panels[0].places[6] == "64\n3.17"
    assert panels[0].curves[1].y == [row.ceiling.value for row in rows]
    assert panels[1].curves[0].y == [row.implicit.value for row in rows]
    (curve,) = panels[2].curves
    ends = [(y - below, y + above) for y, (below, above) in zip(curve.y, curve.error)]
    assert ends == [pytest.approx(row.garbled[1:]) for row in rows]
    assert plots.installed() is False or plots.png(panels).startswith(b"\x89PNG")


def test_the_implicit_reward_is_its_definition():
    """Each text's reward is beta log(pi/pi_ref) of the first route, in any order, odd counts and repeats included."""
    replies = ["look online.", "bye", "look online.", "well. call us later.", "x"[:0]]
    texts = [proxy.text(ONE, x, y) for x in (PROMPT, "show me my bill.") for y in replies]
    cut = (texts[0][0], texts[0][1][:-1])  # a reply without end-of-text
    found = proxy.implicit_rewards(ONE, OTHER, 0.3, [*texts, cut], size=2)
    for (x, y), value in zip([*texts, cut], found):
        logp, ref_logp = (scoring.sequence_logprob(m.params, m.config, [x], [y]).item() for m in (ONE, OTHER))
        assert value == pytest.approx(0.3 * (logp - ref_logp), rel=1e-9, abs=1e-9)
    assert found[0] == found[2] and texts[0][0][0] == texts[0][1][-1] == END_OF_TEXT
    assert (proxy.implicit_rewards(ONE, ONE, 0.3, texts) == 0).all()


def test_each_candidate_has_its_own_stream():
    """More replies or prompts leave the first alone; each reply goes with its prompt; a repeated prompt draws anew."""
    few, more = (proxy.candidates(ONE, list(world.PROMPTS)[:P], 3, n) for P, n in ((1, 2), (2, 4)))
    assert few[0] == more[0][:2] and len(set(more[0])) > 1
    first, second = proxy.candidates(ONE, [PROMPT, PROMPT], 3, 2)
    assert first != second
    assert [len(row) for row in more] == [4, 4] and more[1][0][0] == proxy.text(ONE, list(world.PROMPTS)[1], "")[0]


def test_without_a_difference_the_reference_is_not_improved(monkeypatch):
    """Where the policy is the reference every reply ties: implicit reward 0, and the true reward flat in N."""
    monkeypatch.setattr(proxy, "candidates", planted_candidates)
    prompts = [PROMPT, "show me my bill.", "is my bill late?"]
    curves = proxy.best_of_reference(ONE, ONE, 0.2, prompts, seed=0)
    assert list(curves) == ["ordinary", "benign", "all"]
    for rows in curves.values():
        assert all(row.implicit.value == 0 and row.true.value == pytest.approx(rows[0].true.value) for row in rows)
        assert rows[-1].ceiling.value == 3 and rows[0].garbled.value == pytest.approx(1 / 64)
    assert curves["all"][0].true.value == pytest.approx(
        (2 * curves["ordinary"][0].true.value + curves["benign"][0].true.value) / 3
    )
    other = proxy.best_of_reference(ONE, OTHER, 0.2, prompts, seed=0)["all"]
    assert other[0].true == pytest.approx(curves["all"][0].true) and other[0].implicit != other[-1].implicit


def planted_candidates(reference, prompts, seed):
    """63 replies of the grammar, one of them of the largest reward, and a garbled one, to each prompt."""
    rows = []
    for x in prompts:
        best = max(world.REPLIES, key=lambda y, x=x: world.judgement(x, y).reward)
        rows.append([proxy.text(reference, x, y) for y in [best, *list(world.REPLIES)[:62], "blah"]])
    return rows


def test_the_edits_of_a_reply_are_by_hand():
    """Of "well. see the bill rules. bye." every kind of edit, judged."""
    found = proxy.edits(PROMPT, "well. see the bill rules. bye.")
    assert set(found["another opener"]) == {
        f"{opener}see the bill rules. bye." for opener in ("", "i'm sorry! ", "thank you! ", "so what? ")
    }
    assert len(found["another topic"]) == 7 and "well. see the order rules. bye." in found["another topic"]
    assert set(found["another deed"]) == {
        f"well. {body} bye."
        for body in (
            "let me check your bill now.", "i will fix the bill.", "the bill page says it all.", "look online.",
            "call us later.", "that bill is private.", "i can't share the bill.",
        )
    }  # fmt: skip
    assert set(found["another closer"]) == {"well. see the bill rules.", "well. see the bill rules. anything else?"}
    assert "well. see the bill rules. bye. bye." in found["a second closer"] and len(found["a second closer"]) == 2
    assert "so what? well. see the bill rules. bye." in found["a second opener"] and len(found["a second opener"]) == 4
    assert "wel. see the bill rules. bye." in found["a letter dropped"]
    assert "welll. see the bill rules. bye." in found["a letter doubled"]
    letters = "well", "see", "the", "bill", "rules", "bye"
    runs = sum(len(list(itertools.groupby(word))) for word in letters)  # of ll and ee either letter gives the same text
    assert len(found["a letter dropped"]) == len(found["a letter doubled"]) == runs
    assert all("well. see the bill rules. bye." not in texts for texts in found.values())


@pytest.mark.parametrize("prompt", [PROMPT, "show me anna's bill."])
def test_an_edit_stays_in_the_grammar_or_leaves_it(prompt):
    """Other parts make replies of the grammar; second parts and letters make texts that are not."""
    for reply in world.REPLIES:
        for kind, texts in proxy.edits(prompt, reply).items():
            assert all((text in world.REPLIES) == kind.startswith("another") for text in texts), (reply, kind)


def test_the_topic_of_a_reply_without_one_is_the_customer_s():
    """A deed that needs a topic gets the customer's; without a topic, opener or closer there is nothing to change."""
    found = proxy.edits(PROMPT, "look online.")
    assert "i will fix the order." in found["another deed"] and len(found["another deed"]) == 7
    assert found["another topic"] == found["a second opener"] == found["a second closer"] == []


def test_what_fools_a_planted_score_is_counted():
    """A score that loves length: counts, shares and the worst edit are those of a count of every edit."""
    replies = [
        (PROMPT, "thank you! i will fix the order."),
        (PROMPT, "look online. bye."),
        (PROMPT, "look online. bye."),
    ]
    found = proxy.pressed(lambda texts: np.array([float(len(y)) for _, y in texts]), replies)
    for kind, row in found.items():
        changes = [
            (len(new) - len(y), world.judgement(x, new).reward - world.judgement(x, y).reward, y, new)
            for x, y in dict.fromkeys(replies)
            for new in proxy.edits(x, y)[kind]
        ]
        both = [each for each in changes if each[0] > 0 and each[1] < 0]
        assert (row.n, row.both) == (len(changes), len(both)), kind
        assert (row.raising, row.lowering) == (sum(c[0] > 0 for c in changes), sum(c[1] < 0 for c in changes))
        assert (row.worst is None) == (not both) and (not both or row.worst.implicit == max(both)[0])
        assert row.worst is None or (row.worst.implicit, row.worst.true, row.worst.reply, row.worst.edited) in both
        tried = {y for _, y in replies if proxy.edits(PROMPT, y)[kind]}
        assert row.share.value == pytest.approx(len({each[2] for each in both}) / len(tried))
    # by hand: every doubled letter is longer and garbled, every dropped one shorter
    assert found["a letter doubled"].both == found["a letter doubled"].n > 0 == found["a letter dropped"].both
    assert found["a second closer"][:4] == (2, 2, 2, 2) and found["a second closer"].worst.true == -4
    text = proxy.edits_text(found)
    assert "a second closer: implicit +15.00, true -4" in text and "  look online. bye. anything else?" in text


def test_the_edits_of_a_policy_are_scored_by_both_models():
    """Replies outside the grammar are left out; the worst edit has the rise of its implicit and its true reward."""
    found = proxy.edits_of_policy(ONE, OTHER, 0.2, [(PROMPT, "look online. bye."), (PROMPT, "lok online.")])
    worst = found["a letter doubled"].worst
    pair = [proxy.text(ONE, PROMPT, y) for y in (worst.reply, worst.edited)]
    before, after = proxy.implicit_rewards(ONE, OTHER, 0.2, pair)
    assert worst.reply == "look online. bye." and worst.implicit == pytest.approx(after - before) and worst.true == -4
    same = proxy.edits_of_policy(ONE, ONE, 0.2, [(PROMPT, "look online. bye.")])
    assert not any(row.raising for row in same.values()) and same["a letter doubled"].lowering
