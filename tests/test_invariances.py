"""What must not change the loss does not change it, and a similar change does: both directions, on many models."""

import numpy as np
import pytest
from hypothesis import given

from drawing import fifth, seeds
from minidpo import losses, training
from minidpo.theory import invariances

pytestmark = pytest.mark.slow


@fifth
@given(seed=seeds)
def test_each_holds_and_its_neighbour_breaks(seed):
    """Nine equalities hold to rounding on every model; a similar change is at least ten million times larger."""
    rows = invariances.table(seed)
    assert [row.name for row in rows] == [
        "the prompt is scored too",
        "the shared prefix is not scored",
        "a constant is added to log-probs",
        "pads are added: id, side, amount",
        "the batch is reordered",
        "the batch is split, two pairs and one",
        "the layout of a pair",
        "the reference is scored once",
        "chosen and rejected are swapped",
    ]
    for row in rows:
        assert row.held < 1e-11 < 1e-4 < row.broke, row


def test_the_pairs_give_each_invariance_something_to_break_on():
    """Every pair shares a prefix, branches before either response ends, and has two lengths."""
    for x, w, l in invariances.PAIRS:
        assert len(x) > 1 and w[0] == l[0] and len(w) != len(l)
        assert any(a != b for a, b in zip(w, l))
    assert len(invariances.PAIRS) == 3


def test_a_broken_loss_breaks_the_table(monkeypatch):
    """A loss that doubles the chosen log-probability breaks the four rows that rest on its difference, and no other."""
    correct = losses.dpo_loss
    monkeypatch.setattr(losses, "dpo_loss", lambda logp_w, *rest: correct(2 * logp_w, *rest))
    changes = [row.held for row in invariances.table(0)]
    assert min(*changes[:3], changes[8]) > 1e-3 and max(changes[3:8]) < 1e-11


def calls_of(monkeypatch, module, name):
    """A list that fills with the arguments and keywords of a function's calls; the function still does its work."""
    calls, function = [], getattr(module, name)
    monkeypatch.setattr(
        module, name, lambda *args, **options: calls.append((args, options)) or function(*args, **options)
    )
    return calls


def outcomes(monkeypatch):
    """The keywords of every call of `outcome`, and the array that it returned."""
    records, function = [], invariances.outcome

    def recorded(models, score=invariances.shared_logprobs, **options):
        array = function(models, score, **options)
        records.append((score, options, array))
        return array

    monkeypatch.setattr(invariances, "outcome", recorded)
    return records


def test_the_rows_do_what_their_names_say(monkeypatch):
    """Pads come in eight kinds, the batch in two other orders and three sizes, a pair in three layouts."""
    forwards = calls_of(monkeypatch, invariances, "forward")
    steps = calls_of(monkeypatch, training, "dpo_training_step")
    records = outcomes(monkeypatch)
    rows = {name: (held, broken) for name, _, held, _, broken in invariances.comparisons(invariances.random_models(0))}
    kinds = set()
    for (_, _, (tokens,), real), _ in forwards:
        pads = [token for token, known in zip(tokens, real[0], strict=True) if not known] if real else []
        kinds.add((pads[0], not real[0][0], len(pads)) if pads else "no pads" if real else "not masked")
    assert kinds == {
        "no pads",
        "not masked",
        *[(pad, left, n) for pad in (0, 3) for left in (False, True) for n in (1, 5)],
    }
    assert len(rows["pads are added: id, side, amount"][0]) == 8
    sizes = [options["micro_batch_size"] for _, options in steps]
    assert sizes == [None, None, 1, 1, 2, 2, None, None, None, None]
    (backwards, _), (mixed, _) = rows["the batch is reordered"][0][0], rows["the batch is reordered"][1]
    orders = {id(array): options["pairs"] for _, options, array in records if "pairs" in options}
    assert orders[id(backwards)] == invariances.PAIRS[::-1]
    for (x, w, l), pair in zip(orders[id(mixed)], invariances.PAIRS, strict=True):
        assert (x, w) == pair[:2] and l != pair[2]
    assert sorted(l for *_, l in orders[id(mixed)]) == sorted(l for *_, l in invariances.PAIRS)
    scores = {id(array): score for score, _, array in records}
    layouts = {scores[id(array)] for pair in rows["the layout of a pair"][0] for array in pair}
    routes = {invariances.shared_logprobs, invariances.padded_logprobs, invariances.by_sequence}
    assert layouts == {*routes, invariances.one_by_one}


def test_the_reference_is_scored_once(monkeypatch):
    """Two steps with a collated reference do not score it; without one, each step does, and moves what it follows."""
    models = invariances.random_models(0)
    batch = invariances.collate(
        invariances.PAIRS, *training.reference_logprobs(models.reference, invariances.CONFIG, invariances.PAIRS)
    )
    calls = calls_of(monkeypatch, training, "reference_logprobs")
    invariances.stepped(models, batch)
    assert calls == []
    invariances.stepped(models, invariances.collate(invariances.PAIRS))
    assert [args[0] is models.reference for args, _ in calls] == [True, True]
    following = invariances.stepped(models, invariances.collate(invariances.PAIRS), follow=True)
    assert np.isclose(following[0], np.log(2)) and len(calls) == 4


def test_a_second_step_is_taken_from_another_policy():
    """The log-probabilities of the first step serve a policy that has moved."""
    models = invariances.random_models(0)
    after = invariances.stepped(models, invariances.collate(invariances.PAIRS))
    assert invariances.change(after, invariances.outcome(models)) > 1e-2


def test_the_table_has_both_sizes():
    """A line says what holds and what breaks, each with its size."""
    rows = invariances.table(0)
    lines = invariances.as_text(rows).splitlines()
    assert len(lines) == len(rows) + 1
    for row, line in zip(rows, lines[1:], strict=True):
        assert (
            row.holds in line and row.breaks in line and f"{row.held:.1e}" in line and line.endswith(f"{row.broke:.1e}")
        )


def test_a_change_is_relative_to_the_largest_number():
    """The rounding of a small gradient does not look like a break."""
    assert invariances.change(np.array([1.0, 4.5]), np.array([1.0, -5.0])) == 1.9
