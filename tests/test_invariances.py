"""What must not change the loss does not, and what looks alike does: both directions, on many models."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from minidpo import losses, training
from minidpo.run import reference
from minidpo.theory import invariances


@given(seed=st.integers(0, 2**32 - 1))
def test_each_holds_and_its_likeness_breaks(seed):
    """Otherwise an equality that DPO is explained with is false, or is true of everything."""
    rows = invariances.measured(seed)
    assert [row.name for row in rows] == [
        "the prompt is scored too",
        "the shared prefix is not scored",
        "a constant is added to a pair's log-probs",
        "pads: id, side and amount",
        "the batch is put in another order",
        "the batch is split, two pairs and one",
        "responses are scored by another route",
        "the reference is not scored again",
        "chosen and rejected are swapped",
    ]
    for row in rows:
        assert row.held < 1e-11 < 1e-4 < row.broke, row


def test_the_pairs_show_what_they_are_for():
    """Otherwise an invariance holds because there is nothing that it could break on."""
    for x, w, l in invariances.PAIRS:
        assert len(x) > 1 and w[0] == l[0] and w != l and len(w) != len(l)
    assert len(invariances.PAIRS) == 3


def test_a_broken_loss_does_not_hold(monkeypatch):
    """Otherwise the table is the same whatever the code does."""
    right = losses.dpo_loss
    monkeypatch.setattr(losses, "dpo_loss", lambda logp_w, *rest: right(2 * logp_w, *rest))
    held = [row.held for row in invariances.measured(0)]
    assert min(*held[:3], held[8]) > 1e-3 and max(held[3:8]) < 1e-11


def captured(monkeypatch, holder, name):
    """The calls of a function, which goes on as it was: arguments and keywords of each."""
    calls, right = [], getattr(holder, name)
    monkeypatch.setattr(holder, name, lambda *args, **options: calls.append((args, options)) or right(*args, **options))
    return calls


def test_the_rows_do_what_their_names_say(monkeypatch):
    """Otherwise "pads: id, side and amount" compares one way with itself, and "another order" is the same."""
    world = invariances.random_world(0)
    forwards = captured(monkeypatch, invariances, "forward")
    invariances.padding(world)
    ways = set()
    for (_, _, (tokens,), real), _ in forwards:
        row = real[0] if real else [True] * len(tokens)
        pads = [token for token, known in zip(tokens, row, strict=True) if not known]
        ways.add((pads[0], not row[0], len(pads)) if pads else real is None)
    assert ways == {True, False, *[(pad, left, n) for pad in (0, 3) for left in (False, True) for n in (1, 5)]}
    steps = captured(monkeypatch, training, "dpo_training_step")
    invariances.micro_batches(world)
    assert [options["micro_batch_size"] for _, options in steps] == [None, 1, 2]
    padded = captured(monkeypatch, invariances, "padded_logprobs")
    invariances.routes(world)
    assert len(padded) == 2  # policy and reference
    scored = captured(monkeypatch, invariances, "shared_logprobs")
    invariances.order(world)
    orders = [args[2] for args, _ in scored]
    assert invariances.PAIRS[::-1] in orders and invariances.PAIRS in orders
    (mixed,) = [pairs for pairs in orders[::2] if pairs not in (invariances.PAIRS, invariances.PAIRS[::-1])]
    assert all(w == right[1] and l != right[2] for (_, w, l), right in zip(mixed, invariances.PAIRS, strict=True))
    assert sorted(l for *_, l in mixed) == sorted(l for *_, l in invariances.PAIRS)


def test_the_reference_is_scored_once(monkeypatch):
    """Otherwise "from a file" is another way of computing it again."""
    calls = []
    right = training.reference_logprobs
    for module in (training, reference):
        monkeypatch.setattr(module, "reference_logprobs", lambda *args: calls.append(args) or right(*args))
    invariances.cached_reference(invariances.random_world(0))
    assert len(calls) == 3  # the reference itself, once into the file, and the policy in its place


def test_the_table_has_both_sizes():
    """Otherwise it says that something breaks and not how much."""
    rows = invariances.measured(0)
    lines = invariances.as_text(rows).splitlines()
    assert len(lines) == len(rows) + 1
    for row, line in zip(rows, lines[1:], strict=True):
        assert (
            row.holds in line and row.breaks in line and f"{row.held:.1e}" in line and line.endswith(f"{row.broke:.1e}")
        )


def test_a_change_is_relative_to_the_largest_number():
    """Otherwise a small gradient's rounding looks like a break."""
    assert invariances.change(np.array([1.0, 4.5]), np.array([1.0, -5.0])) == 1.9
