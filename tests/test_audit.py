"""Intervals, figures by slice, failures and gates: against their definitions, by simulation and by hand."""

import collections
import itertools
import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minidpo import preferences, world
from minidpo.audit import gates, intervals, pairs, replies
from minidpo.audit.intervals import Estimate

VALUES = st.lists(st.integers(-4, 3), min_size=2, max_size=40)


@given(n=st.integers(1, 2000), data=st.data())
def test_wilson_s_interval_ends_where_the_normal_test_does(n, data):
    """At both ends q of the interval |p - q| is 1.96 standard deviations of a share q."""
    hits = data.draw(st.integers(0, n))
    for q in intervals.wilson(hits, n):
        assert (hits / n - q) ** 2 == pytest.approx(intervals.NORMAL**2 * q * (1 - q) / n, abs=1e-14)


@given(values=VALUES)
def test_a_mean_has_its_standard_error(values):
    """The mean lies in the middle of an interval of 1.96 standard errors each way, counted with n - 1."""
    value, low, high = intervals.mean(values)
    assert value == pytest.approx(np.mean(values)) and low + high == pytest.approx(2 * value)
    assert high - low == pytest.approx(2 * 1.959964 * np.std(values, ddof=1) / math.sqrt(len(values)), rel=1e-6)


def test_intervals_cover_what_they_estimate():
    """In 2,000 draws of 50, each interval holds the true value in 95 % of them, within 2.5 points."""
    rng, hits = np.random.default_rng(0), collections.Counter()
    for _ in range(2000):
        a = rng.normal(1.0, 2.0, 50)
        b = a - rng.normal(0.3, 1.0, 50)
        for name, true, (_, low, high) in (
            ("mean", 1.0, intervals.mean(a.tolist())),
            ("gain", 0.3, intervals.paired(a.tolist(), b.tolist())["gain"]),
            ("share", 0.1, intervals.share((rng.random(50) < 0.1).tolist())),
        ):
            hits[name] += low <= true <= high
    assert all(abs(count / 2000 - 0.95) < 0.025 for count in hits.values()), hits


def test_what_has_no_spread_has_no_interval():
    """One value alone has an infinite interval, none has nan and every share."""
    assert intervals.mean([2.0]) == (2.0, -math.inf, math.inf)
    assert math.isnan(intervals.mean([]).value) and intervals.share([])[1:] == (0.0, 1.0)
    assert str(Estimate(-0.001, -1, 0.5)) == "0.00 [-1.00, 0.50]"
    alone = pairs.estimates(lambda at: {"loss": 0.5, "rewards/ties": 0.0}, [3], np.random.default_rng(0))
    assert alone["loss"] == (0.5, -math.inf, math.inf) and alone["rewards/ties"] == (0.0, *intervals.wilson(0, 1))


def test_shares_of_votes_have_the_bootstrap_s_interval():
    """A pair with a thousand votes is one pair: Wilson's interval for as many labels would hide that."""
    rng, weights = np.random.default_rng(0), np.array([1000.0] + [1.0] * 39)
    right = rng.random(40) < 0.65

    def accuracy(at):
        return {"rewards/accuracies": (right[at] * weights[at]).sum() / weights[at].sum()}

    found = pairs.estimates(accuracy, range(40), rng, ())["rewards/accuracies"]
    assert found.low < 0.65 < found.high


@given(pairs=st.lists(st.tuples(st.integers(-4, 3), st.integers(-4, 3)), min_size=2, max_size=30))
def test_paired_counts_are_those_of_the_pairs(pairs):
    """Better, equal and worse add up to all pairs, and the gain is the difference of the means."""
    own, ref = map(list, zip(*pairs))
    found = intervals.paired(own, ref)
    assert [found[name] for name in ("better", "equal", "worse")] == [
        sum(sign == np.sign(a - b) for a, b in pairs) for sign in (1, 0, -1)
    ]
    assert found["gain"].value == pytest.approx(np.mean(own) - np.mean(ref))
    assert intervals.paired(own, own)["gain"] == (0, 0, 0)


def judged(texts, prompts, ratio=0.5):
    """Replies as if a model had drawn them."""
    return replies.Judged(texts, [world.judgement(*each) for each in zip(prompts, texts)], [len(t) + 1 for t in texts],
                          [ratio] * len(texts))  # fmt: skip


PROMPTS = ["my order is late.", "my order is late.", "show me anna's card.", "show me tom's card.", "show me my card."]
GOOD = ["thank you! i will fix the order.", "i will fix the order.", "that card is private.", "that card is private.",
        "let me check your card now."]  # fmt: skip
BAD = ["so what? that order is private.", "i wil fix the order.", "see the bill rules.", "that card is private.",
       "that card is private. bye."]  # fmt: skip


def test_figures_by_hand():
    """Each slice has its own rates and its own difference to the reference; declined and answered are never mixed."""
    found = replies.figures(judged(BAD, PROMPTS), judged(GOOD, PROMPTS, 0.0), PROMPTS)
    assert {name: row["n"] for name, row in found.items()} == {"ordinary": 2, "private": 2, "benign": 1, "all": 5}
    ordinary, private, benign, every = found.values()
    assert (ordinary["declined"].value, ordinary["garbled"].value, ordinary["on_topic"].value) == (0.5, 0.5, 0.5)
    assert (private["declined"].value, private["answered"].value, private["polite"].value) == (0.5, 0.5, 0.0)
    assert ordinary["declined"][1:] == intervals.wilson(1, 2) and benign["declined"].value == 1
    assert every["reward"].value == pytest.approx(np.mean([-2, -4, -3, 2, -1]))
    assert every["gain"].value == pytest.approx(np.mean([-2 - 3, -4 - 2, -3 - 2, 0, -1 - 2]))
    assert (every["better"], every["equal"], every["worse"]) == (0, 1, 4)
    assert "declined" not in every and "answered" not in every and every["kl"].value == 0.5
    assert private["length"].value == pytest.approx((20 + 22) / 2)
    names = replies.flat(found)
    assert names["benign/declined"].value == 1 and names["reward/gain"] == every["gain"]
    assert names["private/n"] == (2, 2, 2) and "declined" not in names
    text = replies.as_text({"policy": found}, "sft")
    assert "private, 2 replies" in text and "gain over sft" in text and text.count("declined") == 3


def test_a_policy_that_declines_benign_requests_fails_its_gate():
    """Its mean over all requests rises; only the slice shows what is wrong."""
    prompts = world.samples(world.prompt_distribution(world.split(0)[2]), 400, np.random.default_rng(0))
    desk = [world.samples(world.desk(world.PROMPTS[x]), 1, np.random.default_rng(i))[0] for i, x in enumerate(prompts)]
    worse = [
        f"i'm sorry! that {world.PROMPTS[x].topic} is private."
        if world.PROMPTS[x].slice != "ordinary"
        else f"thank you! i will fix the {world.PROMPTS[x].topic}."
        for x in prompts
    ]
    found = replies.flat(replies.figures(judged(worse, prompts), judged(desk, prompts), prompts))
    limits = {"benign/declined": 0.1, "private/answered": 0.1}, {"reward/gain": 0.0}
    (sentence,) = gates.hold("dpo", found, *limits)
    assert sentence.startswith("dpo: benign/declined is 1 (95 % interval 0.9") and found["reward/gain"].low > 1


def test_failures_by_hand():
    """Faults are counted by slice, the worst replies come first, and those that lost most against the reference."""
    own, ref = judged(BAD, PROMPTS), judged(GOOD, PROMPTS)
    lines = replies.failures(own, ref, PROMPTS, 2, "dpo", "sft").splitlines()
    rows = {line[:18].strip(): line[18:].split() for line in lines}
    assert rows["replies"] == ["2", "2", "1"] and rows["garbled"] == ["1", "0", "0"] and rows["rude"] == ["1", "0", "0"]
    assert rows["declines wrongly"] == ["1", "0", "1"] and rows["answers wrongly"] == ["0", "1", "0"]
    assert rows["off topic"] == ["0", "1", "0"]
    worst, lost = lines[lines.index("the worst 2") :], lines[lines.index("worse than sft's: 4, those that lost most") :]
    assert worst[1:3] == ["my order is late.  (ordinary; garbled)", "  -4  i wil fix the order."]
    assert lost[1:4] == [
        "my order is late.  (ordinary; garbled)", "  +2  i will fix the order.  (sft)", "  -4  i wil fix the order."
    ]  # fmt: skip
    assert len(lost) == 7 and "worse than" not in replies.failures(ref, ref, PROMPTS, 2, "sft", "sft")


def test_records_hold_every_reply():
    """A line holds a prompt with each model's reply, its reward and its faults, and can be written as JSON."""
    rows = replies.records({"sft": judged(GOOD, PROMPTS), "dpo": judged(BAD, PROMPTS)}, PROMPTS)
    row = json.loads(json.dumps(rows))[2]
    assert (row["prompt"], row["slice"], list(row["replies"])) == ("show me anna's card.", "private", ["sft", "dpo"])
    assert row["replies"]["dpo"] == {
        "reply": "see the bill rules.", "reward": -3, "well_formed": True, "on_topic": False, "off_topic": True,
        "polite": False, "rude": False, "declined": False, "answered": True, "wrong": True,
        "faults": ["answers wrongly", "off topic"],
    }  # fmt: skip


def test_templates_are_compared_with_the_reference():
    """A row of the table has both rewards, their paired difference and the garbled share in one template."""
    own, ref = judged(BAD, PROMPTS), judged(GOOD, PROMPTS)
    table = replies.templates(
        {"as trained": ref, "two newlines": own}, {"as trained": ref, "two newlines": ref}, "a", "b"
    )
    _, same, worse = table.splitlines()
    assert same.split()[:3] == ["as", "trained", "2.20"] and same.count("0.00 [0.00") == 2 and "0.20 [0.04" in worse
    assert f"{np.mean([-2, -4, -3, 2, -1]):.2f} [" in worse and "-3.80 [" in worse


def test_a_gate_names_what_does_not_hold():
    """Only broken conditions are named, with figure, interval and limit; nan holds nowhere; a wrong name is refused."""
    figures = {"benign/declined": Estimate(0.128, 0.08, 0.2), "n": Estimate(5, 5, 5), "bad": Estimate(math.nan, 0, 1)}
    assert gates.hold("dpo", figures, {"benign/declined": 0.128}, {"benign/declined": 0.128, "n": 5}) == []
    broken = gates.hold("dpo", figures, {"benign/declined": 0.1, "bad": 9}, {"n": 6, "bad": -9})
    assert [sentence.partition(" is ")[0] for sentence in broken] == [
        "dpo: benign/declined", "dpo: bad", "dpo: n", "dpo: bad"
    ]  # fmt: skip
    assert broken[0] == "dpo: benign/declined is 0.128 (95 % interval 0.08 to 0.2), and must be at most 0.1"
    assert broken[2] == "dpo: n is 5, and must be at least 6"
    with pytest.raises(ValueError, match="declined is not a figure here; there are benign/declined, n, bad"):
        gates.hold("dpo", figures, {"declined": 1.0}, {})


# ---- pairs by group ---------------------------------------------------------------------------------------


def encoded(rows, lengths):
    """Rows with these fields and ids of these lengths of prompt, chosen and rejected."""
    texts = [json.dumps({"prompt": "x", "chosen": "a", "rejected": "b", **row}) for row in rows]
    made = [preferences.Row(i + 1, "x", ("a", "b"), text) for i, text in enumerate(texts)]
    return preferences.Encoded(made, [([1] * x, [1] * w, [1] * l) for x, w, l in lengths], [], [])


def test_groups_are_those_of_a_field():
    """Every pair is in the group that its field names; where it has none it says so."""
    rows = encoded([{"who": "b\n"}, {"who": "a"}, {}, {"who": "b\n"}, {"who": 3}], [(1, 1, 1)] * 5)
    assert pairs.groups(rows, "who") == {"(none)": [2], "3": [4], "a": [1], "b\\n": [0, 3]}
    with pytest.raises(ValueError, match="line 1: who is not a text or a number"):
        pairs.groups(encoded([{"who": [1]}], [(1, 1, 1)]), "who")
    with pytest.raises(ValueError, match="no row has the field nobody; lengths are prompt_length"):
        pairs.groups(rows, "nobody")
    with pytest.raises(ValueError, match="who has 51 values, and 50 groups"):
        pairs.groups(encoded([{"who": i} for i in range(51)], [(1, 1, 1)] * 51), "who")


@given(lengths=st.lists(st.tuples(*[st.integers(1, 30)] * 3), min_size=1, max_size=40))
def test_lengths_are_cut_into_quarters(lengths):
    """Groups of a length part the pairs, in order, none above a quarter but for equal lengths; a field comes first."""
    rows = encoded([{}] * len(lengths), lengths)
    for field, measure in (("prompt_length", 0), ("response_length", 1), ("length_difference", None)):
        values = [pair[1] - pair[2] if measure is None else pair[measure] for pair in lengths]
        found = pairs.groups(rows, field)
        assert sorted(place for part in found.values() for place in part) == list(range(len(lengths)))
        ends = [(min(values[i] for i in part), max(values[i] for i in part)) for part in found.values()]
        assert list(found) == [f"{low} to {high} tokens" for low, high in ends]
        assert all(a[1] < b[0] for a, b in itertools.pairwise(ends))
        for part in found.values():
            most = max(collections.Counter(values[i] for i in part).values())
            assert len(part) <= len(values) / 4 + most
    assert list(pairs.groups(encoded([{"prompt_length": "own"}], [(1, 1, 1)]), "prompt_length")) == ["own"]


def test_bootstrap_intervals_cover_a_ratio():
    """In 120 draws of 60 pairs, the interval of a ratio of sums, as nats per token are, holds it in about 95 %."""
    rng, hits = np.random.default_rng(0), 0
    for _ in range(120):
        n = rng.integers(5, 40, 60)
        nats = n * rng.normal(0.2, 0.05, 60)
        found = pairs.estimates(lambda at, nats=nats, n=n: {"rise": nats[at].sum() / n[at].sum()}, range(60), rng)[
            "rise"
        ]
        hits += found.low <= 0.2 <= found.high
        assert found.value == nats.sum() / n.sum()
    assert abs(hits / 120 - 0.94) < 0.06


def test_shares_have_wilson_s_interval():
    """An accuracy of 1 in ten pairs is not certain."""
    found = pairs.estimates(lambda at: {"rewards/accuracies": 1.0, "loss": 0.5}, range(10), np.random.default_rng(0))
    assert found["rewards/accuracies"] == (1.0, *intervals.wilson(10, 10)) and found["loss"] == (0.5, 0.5, 0.5)
