"""A pair with votes [7, 3] is seven such rows and three the other way round: read, counted, trained on and measured."""

import json
import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minidpo import Tensor, checkpoint, cli, losses, model, optim, preferences, training
from minidpo.data.preferences import COMPLETIONS, PAIRS, Row, collate
from minidpo.model import Config
from minidpo.run.folder import json_lines
from minidpo.run.workers import Workers
from minidpo.tokenizer import Tokenizer
from models import CONFIG, small
from test_loop import forks
from test_training import Still

close = np.testing.assert_allclose
TOKENIZER = Tokenizer("\nabcd")
IDS = [([0, 1], [2, 3, 0], [2, 0]), ([0], [1, 0], [3, 3, 3, 0]), ([0, 4, 4], [1, 0], [0])]
counts = st.tuples(st.integers(0, 5), st.integers(0, 5)).filter(any)
amounts = st.one_of(st.just(0.0), st.floats(1e-3, 1e3))
real_votes = st.lists(st.tuples(amounts, amounts).filter(any), min_size=1, max_size=4)


def repeated(pairs, votes):
    """Each pair as often as chosen was preferred, and the other way round as often as rejected was."""
    return [row for (x, w, l), (a, b) in zip(pairs, votes, strict=True) for row in [(x, w, l)] * a + [(x, l, w)] * b]


def log_odds(votes):
    """The z at which the expected loss of each pair is lowest."""
    return np.array([math.log(a / b) for a, b in votes])


def loss_at(z, votes):
    """The DPO loss of pairs with these z, and its gradient in z."""
    leaf = Tensor(np.array(z, dtype=float), requires_grad=True)
    zero = np.zeros(len(z))
    pairs = [([0], [0], [0])] * len(z)
    out = losses.dpo_loss(leaf, zero, zero, zero, 1.0, **training.by_name(losses.dpo_loss, pairs, np.array(votes)))
    out.loss.backward()
    return out.loss.item(), leaf.grad


# ---- read -----------------------------------------------------------------------------------------------------------


def read(tmp_path, *documents, fields=PAIRS):
    path = tmp_path / "votes.jsonl"
    row = {"prompt": "a", "chosen": "b", "rejected": "c", "completion": "d"}
    path.write_text("".join(json.dumps({**row, **each}) + "\n" for each in documents))
    return preferences.read(path, fields)


def test_votes_and_probabilities_are_read(tmp_path):
    """Votes are kept as written, p is p and 1 - p of a vote, and a pair without either has one vote for chosen."""
    documents = {"votes": [7, 3]}, {"votes": [0, 0.5]}, {"p": 0.7}, {"p": 1}, {}, {"votes": None, "p": None}
    rows, faults = read(tmp_path, *documents)
    assert not faults and [row.votes for row in rows] == [(7, 3), (0, 0.5), (0.7, 1 - 0.7), (1, 0), (1, 0), (1, 0)]


@pytest.mark.parametrize(
    ("document", "reason"),
    [
        *[
            ({"votes": votes}, "votes are two numbers")
            for votes in (7, "7:3", [7], [7, 3, 1], [-1, 3], [0, 0], [True, 1], ["7", "3"], [math.nan, 1], {"a": 1})
        ],
        *[({"votes": votes}, "votes are two numbers") for votes in ([math.inf, 1], [1e10, 1], [1e-9, 0], [10**400, 1])],
        *[({"p": p}, "p is the probability") for p in (1.1, -0.1, "0.7", True, math.nan, [0.7])],
        ({"votes": [7, 3], "p": 0.7}, "has both votes and p"),
    ],
)
def test_other_votes_are_a_fault(document, reason, tmp_path):
    """Votes of another shape are a fault with its line, and say what to do."""
    rows, (fault,) = read(tmp_path, {}, document, {})
    assert [row.line for row in rows] == [1, 3] and fault.line == 2
    assert fault.reason.startswith(reason) and "remove" in fault.reason


def test_only_pairs_have_votes(tmp_path):
    """The votes of a completion are a column like any other."""
    (row,), faults = read(tmp_path, {"votes": "many", "p": 7}, fields=COMPLETIONS)
    assert row.votes == (1, 0) and not faults


# ---- counted --------------------------------------------------------------------------------------------------------


def rows_of(pairs, votes=None):
    return [
        Row(line, x, (w, l), "", each)
        for line, ((x, w, l), each) in enumerate(zip(pairs, votes or [(1, 0)] * len(pairs)), 1)
    ]


texts = st.tuples(st.sampled_from("ab"), *[st.sampled_from("abc")] * 2).filter(lambda pair: pair[1] != pair[2])
ballots = st.lists(st.tuples(texts, counts), min_size=1, max_size=12)


@given(rows=ballots, random=st.randoms(use_true_random=False))
def test_repeats_and_contradictions_are_counted(rows, random):
    """Each pair gets the sum of its votes, whichever side is chosen and in whichever order its rows come."""
    by_hand = Counter()
    for (x, w, l), (a, b) in rows:
        by_hand[x, w, l] += a
        by_hand[x, l, w] += b
    for order in (rows, random.sample(rows, len(rows))):
        encoded = preferences.encode(rows_of(*zip(*order)), TOKENIZER, 8, repeats="count")
        votes = {(row.prompt, *row.responses): row.votes for row in encoded.rows}
        votes |= {(x, l, w): (b, a) for (x, w, l), (a, b) in votes.items()}
        assert votes == {(x, w, l): (by_hand[x, w, l], by_hand[x, l, w]) for x, w, l in votes}
        assert len(votes) == 2 * len(encoded.rows) == 2 * len({(x, *sorted(ys)) for (x, *ys), _ in rows})
        assert preferences.label_count(encoded.rows) == sum(map(sum, (each for _, each in rows)))
        firsts = {(x, *sorted(ys)): line for line, ((x, *ys), _) in reversed(list(enumerate(order, 1)))}
        assert [row.line for row in encoded.rows] == sorted(firsts.values()) and not encoded.faults and not encoded.lost
        assert [ids[1] for ids in encoded.ids] == [[*TOKENIZER.encode(row.responses[0]), 0] for row in encoded.rows]


@given(rows=ballots)
def test_labels_that_are_set_aside_are_lost(rows):
    """By default the votes of rows that repeat or contradict are lost; kept and lost ones together are all."""
    encoded = preferences.encode(rows_of(*zip(*rows)), TOKENIZER, 8)
    assert encoded.lost == sum(sum(rows[fault.line - 1][1]) for fault in encoded.faults)
    assert encoded.lost + preferences.label_count(encoded.rows) == sum(sum(each) for _, each in rows)


def test_rows_that_were_cut_are_counted_too():
    """Pairs that are equal once they are cut are one, and the line of a later one is not said to be truncated."""
    rows = rows_of([("aaa", "b", "c"), ("baa", "c", "b"), ("caa", "d", "b")])
    encoded = preferences.encode(rows, TOKENIZER, 4, "prompt", "count")
    assert [(row.line, row.votes) for row in encoded.rows] == [(1, (1, 1)), (3, (1, 0))] and encoded.truncated == [1, 3]


def test_fifteen_rows_of_two_pairs(tmp_path):
    """Seven rows against three and five equal ones: one row is kept and 14 labels are lost, or all 15 are counted."""
    path = tmp_path / "pairs.jsonl"
    texts = [("a\n", "b", "c")] * 7 + [("a\n", "c", "b")] * 3 + [("d\n", "b", "c")] * 5
    path.write_text("".join(json.dumps(dict(zip(PAIRS, text))) + "\n" for text in texts))
    kept, every, silent = (
        preferences.usable_rows(path, PAIRS, TOKENIZER, 8, "none", False, repeats)
        for repeats in ("set-aside", "count", "")
    )
    assert [row.votes for row in kept.ids.rows] == [(1, 0)] and [row.votes for row in every.ids.rows] == [
        (7, 3),
        (5, 0),
    ]
    assert kept.summary == "pairs.jsonl: 1 rows, 14 set aside" and "14 of 15 labels are lost" in kept.remarks[0]
    assert "--repeats count keeps them" in kept.remarks[0] and not every.remarks and not silent.remarks
    least = 10 / 15 * -(0.7 * math.log(0.7) + 0.3 * math.log(0.3))
    assert every.summary == (
        "pairs.jsonl: 2 rows, 0 set aside, 15 labels; 50.0% of the pairs are split, so that no DPO loss on them is "
        f"below {least:.4f}"
    )


# ---- the loss -------------------------------------------------------------------------------------------------------


@given(votes=real_votes, seed=st.integers(0, 99))
def test_no_loss_is_below_the_bound(votes, seed):
    """The bound is the loss at z = logit p, at infinity where nobody disagrees; no other z has a lower loss."""
    rows = rows_of([("a", "b", "c")] * len(votes), votes)
    facts = preferences.label_metrics(rows)
    if set(votes) == {(1, 0)}:
        assert facts == {}
        return
    best = np.array([math.log(a / b) if a and b else (80.0 if a else -80.0) for a, b in votes])
    close(loss_at(best, votes)[0], facts["loss/infimum"], rtol=1e-12, atol=1e-15)
    rng = np.random.default_rng(seed)
    for scale in (1e-2, 1, 10):
        assert loss_at(best + scale * rng.normal(size=len(votes)), votes)[0] >= facts["loss/infimum"] - 1e-12
    assert facts["labels"] == pytest.approx(sum(map(sum, votes)), rel=1e-12)
    assert facts["pairs/split"] == sum(a > 0 and b > 0 for a, b in votes) / len(votes)


@given(votes=st.lists(st.tuples(st.floats(0.01, 100), st.floats(0.01, 100)), min_size=1, max_size=4))
def test_the_gradient_vanishes_at_the_log_odds_of_the_votes(votes):
    """Votes ask for z = logit p and no more, on either side of it the gradient leads there."""
    close(loss_at(log_odds(votes), votes)[1], 0, atol=1e-14)
    assert (loss_at(log_odds(votes) + 0.1, votes)[1] > 0).all() and (loss_at(log_odds(votes) - 0.1, votes)[1] < 0).all()


def test_a_response_without_a_vote_is_left_out():
    """Its log-probability may be -inf: 0 times -inf is not in a sum."""
    w, l, votes = np.array([-1.0, -np.inf]), np.array([-np.inf, -2.0]), np.array([[3.0, 0.0], [0.0, 2.0]])
    assert training.over_labels(np.sum, w, l, votes) == -7
    assert training.over_labels(np.sum, w, l, None) == -np.inf


# ---- a step ---------------------------------------------------------------------------------------------------------


def step(pairs, votes=None, nll_weight=0.0, micro_batch_size=None, sweep=training.dpo_sweep, loss=losses.dpo_loss):
    """The metrics of a step and of an evaluation, and every gradient."""
    params, reference = small(1), model.frozen(small(2))
    batch = collate(pairs, *training.reference_logprobs(reference, CONFIG, pairs), votes)
    settings = 0.3, loss, nll_weight
    evaluation = training.preference_evaluation(params, CONFIG, batch, *settings)
    metrics = training.dpo_training_step(
        params, reference, CONFIG, Still(params), batch, *settings, math.inf, micro_batch_size, sweep
    )
    del metrics["tokens"]  # how many were computed
    return [metrics, evaluation, {name: p.grad for name, p in params.items()}]


def assert_equal(result, expected, rtol):
    for each, right in zip(result, expected, strict=True):
        assert each.keys() == right.keys()
        for name in right:
            close(each[name], right[name], rtol=rtol, atol=rtol / 10, err_msg=name)


@given(
    votes=st.tuples(counts, counts, counts),
    nll_weight=st.sampled_from([0.0, 0.7]),
    size=st.sampled_from([None, 1, 2]),
    scale=st.sampled_from([1.0, 0.01]),
)
def test_votes_are_that_many_rows(votes, nll_weight, size, scale):
    """Seven and three rows are one row with votes [7, 3], in every metric and gradient; so are hundredths of them."""
    expected = step(repeated(IDS, votes), None, nll_weight)
    assert_equal(step(IDS, np.multiply(votes, scale), nll_weight, size), expected, 1e-9)


@forks
@pytest.mark.parametrize("loss", [losses.dpo_loss, losses.Choice("dpo")])
def test_votes_go_to_the_workers(loss):
    """Several processes share out the votes with the pairs, and a share counts by its votes."""
    votes = [(7, 3), (1, 0), (0, 2)]
    expected = step(repeated(IDS, votes), None, 0.7)
    for count in (2, 3):
        with Workers(count) as workers:
            result = step(IDS, votes, 0.7, 1, workers.dpo_sweep, loss)
            assert len(workers.others) == count - 1
        assert_equal(result, expected, 1e-9)


def test_one_vote_is_the_plain_loss_bit_for_bit():
    """Votes (1, 0), and p = 1, change no bit of a step, whether or not another pair of the data has more."""
    plain = step(IDS, None, 0.7, 2)
    ones = np.tile([1.0, 0.0], (3, 1))
    assert collate(IDS, votes=ones).votes is None
    kept = lambda *given: training.dpo_sweep(*given[:2], given[2]._replace(votes=ones), *given[3:])  # noqa: E731
    for result in (step(IDS, ones, 0.7, 2), step(IDS, None, 0.7, 2, kept)):
        for each, right in zip(result, plain, strict=True):
            assert all(np.array_equal(each[name], right[name]) for name in right)


def test_a_split_pair_counts_for_both_sides():
    """Votes of 7 and 3: an accuracy of 0.7 where the policy agrees with most, 0.3 where not, and ties beside."""
    w, l, votes = np.array([2.0, 1.0, 0.0]), np.array([1.0, 2.0, 0.0]), np.array([[7.0, 3.0]] * 3)
    for i, (accuracy, ties, margin) in enumerate([(0.7, 0, 0.4), (0.3, 0, -0.4), (0, 1, 0)]):
        pair = slice(i, i + 1)
        metrics = training.preference_metrics(0.0, w[pair], l[pair], w[pair], l[pair], votes=votes[pair])
        assert metrics["rewards/accuracies"] == pytest.approx(accuracy) and metrics["rewards/ties"] == ties
        assert metrics["rewards/margins"] == pytest.approx(margin)


def test_votes_stay_on_the_host(cupy):
    """A step with votes on a device has the numbers of the host, in float32 too."""
    results = []
    for device in ("cpu", "cuda"):
        params = model.placed({name: Tensor(p.data.astype("float32"), True) for name, p in small(1).items()}, device)
        reference = model.frozen(model.placed(small(2), device))
        batch = collate(IDS, votes=[(7, 3), (1, 0), (0, 2)])
        metrics = training.dpo_training_step(
            params, reference, CONFIG, optim.SGD(params, 0.0), batch, 0.3, nll_weight=0.7, micro_batch_size=2
        )
        assert {str(p.grad.dtype) for p in params.values()} == {"float32"}
        results.append(metrics)
    assert results[1] == pytest.approx(results[0], rel=1e-5)


@pytest.mark.parametrize(
    "votes", [[(1, 0)], [1, 0, 1], [(1, 0, 0)] * 3, [(0, 0)] * 3, [(-1, 2)] * 3, [(1, math.nan)] * 3]
)
def test_collate_refuses_other_votes(votes):
    """A batch takes two numbers of votes for each pair, and not both 0."""
    with pytest.raises(ValueError, match=r"votes must be \(3, 2\), two numbers of at least 0"):
        collate(IDS, votes=votes)


def plain_loss(logp_w, logp_l, ref_logp_w, ref_logp_l, beta):
    return losses.dpo_loss(logp_w, logp_l, ref_logp_w, ref_logp_l, beta)


@pytest.mark.parametrize("loss", [losses.ipo_loss, losses.Choice("ipo"), losses.Choice("simpo"), plain_loss])
def test_a_loss_without_votes_is_refused(loss):
    """A loss that takes no probability and weight is refused with votes, and used without."""
    name = getattr(loss, "name", getattr(loss, "__name__", ""))
    with pytest.raises(ValueError, match=f"the loss {name} takes no probability and weight: choose dpo"):
        step(IDS, [(7, 3), (1, 0), (1, 0)], loss=loss)
    assert step(IDS, [(1, 0)] * 3, loss=loss)[0]["grad_norm"] > 0
    with pytest.raises(TypeError):
        losses.Choice("ipo")(-1.0, -2.0, -2.0, -1.0, 0.3, probability=0.7, weight=1.0)


# ---- whole runs -----------------------------------------------------------------------------------------------------

TEXTS = [(f"{x}{y}\n", y + "d", "cc") for x in "abcd" for y in "abcd"]
VOTES = [((7, 3), (1, 0), (2, 2), (0, 4))[i % 4] for i in range(len(TEXTS))]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model, and labels written as rows, as votes, and as halves of these votes in two rows."""
    root, rng = tmp_path_factory.mktemp("votes"), np.random.default_rng(0)
    config = Config(TOKENIZER.vocab_size, 16, 8, 1, 2)
    params = model.init(config, rng, dtype="float64")
    for p in params.values():
        p.data = p.data + 0.3 * rng.normal(size=p.shape)
    checkpoint.save(root / "init", params, config, TOKENIZER)
    halves = [((x, l, w), (b / 2, a / 2)) for (x, w, l), (a, b) in zip(TEXTS, VOTES)]
    files = {
        "rows": [(text, {}) for text in repeated(TEXTS, VOTES)],
        "votes": [(text, {"votes": list(votes)}) for text, votes in zip(TEXTS, VOTES)],
        "halves": [(text, {"votes": list(votes)}) for half in halves for text, votes in [half, half]],
    }
    for name, rows in files.items():
        lines = (json.dumps({**dict(zip(PAIRS, text)), **more}) + "\n" for text, more in rows)
        (root / f"{name}.jsonl").write_text("".join(lines))
    return root


SETTINGS = {"steps": 3, "batch_size": 5, "held_out_share": 0.3, "test_share": 0.2, "warmup_steps": 0, "nll_weight": 0.1,
            "learning_rate": 0.01, "evaluate_every": 1}  # fmt: skip


def test_written_votes_and_repeated_rows_are_one_run(folder, tmp_path, capsys):
    """Votes, rows that repeat, and both: the same metrics at every step, on held-out and on test rows."""
    results = []
    for name in ("votes", "rows"):
        run = tmp_path / name
        cli.dpo(data=folder / f"{name}.jsonl", init=folder / "init", out=run, repeats="count", **SETTINGS)
        rows = json.loads((run / "run.json").read_text())["rows"]
        assert ": 16 rows, 0 set aside, 76 labels; 50.0% of the pairs are split, so that no DPO loss" in rows
        assert (
            rows.partition(";")[0] in capsys.readouterr().out
            and "16 rows, 0 set aside, 76 labels" in (run / "report.md").read_text()
        )
        evaluation = cli.evaluate(checkpoint=run, data=folder / f"{name}.jsonl", repeats="count", seen=True)
        assert evaluation["labels"] == 76 and evaluation["pairs/split"] == 0.5 and evaluation["loss/infimum"] > 0.3
        lines = json_lines(run / "metrics.jsonl")
        results.append([*lines, json.loads((run / "test.json").read_text()), evaluation])
        capsys.readouterr()
    for each, right in zip(*results, strict=True):
        for name in right.keys() - {"tokens_per_second"}:
            # the first row of a pair nobody prefers is the other way round
            assert each[name] == pytest.approx(right[name], rel=1e-9, abs=1e-12), name


def test_the_votes_of_test_rows_count(folder, tmp_path):
    """The result on the test rows is that of an evaluation of these rows with their votes."""
    run, path = tmp_path / "run", tmp_path / "test.jsonl"
    cli.dpo(data=folder / "votes.jsonl", init=folder / "init", out=run, **SETTINGS)
    lines = (folder / "votes.jsonl").read_text().splitlines()
    path.write_text("\n".join(line for line in lines if preferences.part(json.loads(line)["prompt"], 0, 0.3, 0.2) == 2))
    result, right = json.loads((run / "test.json").read_text()), cli.evaluate(checkpoint=run, data=path)
    names = result.keys() & right.keys() - {"loss"}
    assert "labels" in right and {name: result[name] for name in names} == pytest.approx({n: right[n] for n in names})


def test_halves_of_votes_add_up(folder):
    """An evaluation on two rows with half of the votes each, the other way round, is that on one row."""
    models = {"checkpoint": folder / "init", "reference": folder / "init"}
    whole = cli.evaluate(data=folder / "votes.jsonl", **models)
    for name in ("halves", "votes"):
        assert cli.evaluate(data=folder / f"{name}.jsonl", repeats="count", **models) == pytest.approx(whole)


@pytest.mark.parametrize("more", [{"loss": "ipo"}, {"label_smoothing": 0.1}, {"loss": plain_loss}])
def test_a_run_that_cannot_use_votes_is_not_begun(folder, tmp_path, more):
    """A loss without probability and weight, or a smoothed one, is refused before anything is written."""
    for name, repeats in (("votes", "set-aside"), ("rows", "count")):
        with pytest.raises(ValueError, match="the votes on its pairs cannot be used: "):
            cli.dpo(
                data=folder / f"{name}.jsonl",
                init=folder / "init",
                out=tmp_path / "run",
                repeats=repeats,
                **more,
                **SETTINGS,
            )
    assert not (tmp_path / "run").exists()


def test_calibration_takes_single_labels(folder):
    """Labels of several votes have no calibration, and the command says so."""
    words = {"checkpoint": folder / "init", "reference": folder / "init", "calibration": True}
    with pytest.raises(ValueError, match="takes single labels"):
        cli.evaluate(data=folder / "votes.jsonl", **words)
