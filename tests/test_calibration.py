"""Calibration: each figure against its definition, and a planted fault recovered."""

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minidpo import cli
from minidpo.audit import calibration as c

SEEDS = st.integers(0, 2**32 - 1)


def sigma(z):
    return np.exp(-np.logaddexp(0, -z))


def sample(seed, n, slope=1.0, spread=2.0):
    """z and labels that are right as often as sigma(slope z) says."""
    rng = np.random.default_rng(seed)
    z = rng.normal(0, spread, n)
    return z, (rng.random(n) < sigma(slope * z)).astype(float)


@given(seed=SEEDS, n=st.integers(2, 60), ties=st.booleans())
def test_auc_is_the_mann_whitney_statistic(seed, n, ties):
    """AUC is the mean over all couples of [z_1 > z_0] + [z_1 = z_0]/2, and 1/2 of a constant."""
    z, y = sample(seed, n)
    z = np.round(z) if ties else z
    y[0], y[1] = 0.0, 1.0
    couples = [float(a > b) + float(a == b) / 2 for a in z[y == 1] for b in z[y == 0]]
    assert c.auc(z, y) == pytest.approx(np.mean(couples), abs=1e-12)
    assert c.auc(-z, y) == pytest.approx(1 - c.auc(z, y), abs=1e-12)
    assert c.auc(0 * z, y) == 0.5 and math.isnan(c.auc(z, 0 * y))


@given(seed=SEEDS, n=st.integers(2, 60), ties=st.booleans())
def test_the_area_under_the_rates_is_the_auc(seed, n, ties):
    """1 - FNR over FPR, at every threshold and joined by straight lines, encloses AUC; ties make slanted steps."""
    z, y = sample(seed, n)
    p = sigma(np.round(z) if ties else z)
    y[0], y[1] = 0.0, 1.0
    fpr, fnr = np.transpose([c.rates(p, y, t) for t in [math.inf, *sorted(set(p), reverse=True)]])
    assert fpr[0] == 0 and fnr[0] == 1 and fpr[-1] == 1 and fnr[-1] == 0
    assert np.trapezoid(1 - fnr, fpr) == pytest.approx(c.auc(p, y), abs=1e-12)


@given(seed=SEEDS, n=st.integers(3, 60), kinds=st.integers(1, 4))
def test_the_auc_is_a_mean_over_kinds_of_negatives(seed, n, kinds):
    """Against negatives of several kinds AUC is the mean over the kinds, weighted by their numbers."""
    z, y = sample(seed, n)
    y[0], y[1] = 0.0, 1.0
    kind = np.random.default_rng(seed).integers(0, kinds, n)
    parts = [(y == 1) | (kind == k) for k in set(kind[y == 0])]
    weights = [(y[part] == 0).sum() / (y == 0).sum() for part in parts]
    assert c.auc(z, y) == pytest.approx(sum(w * c.auc(z[p], y[p]) for w, p in zip(weights, parts)), abs=1e-12)


@given(seed=SEEDS, n=st.integers(3, 300))
def test_the_slope_is_the_likeliest(seed, n):
    """At the slope the likelihood has its top: steps of a tenth of an error to either side lose."""
    z, y = sample(seed, n)
    s, error = c.slope(z, y)
    if not math.isfinite(s):
        signed = z * (2 * y - 1)
        assert (signed * math.copysign(1, s) >= 0).all()
        return

    def likelihood(s):
        return -np.logaddexp(0, -s * z * (2 * y - 1)).sum()

    assert likelihood(s) >= max(likelihood(s + error / 10), likelihood(s - error / 10))
    h = error / 100
    second = (likelihood(s + h) - 2 * likelihood(s) + likelihood(s - h)) / h**2
    assert error == pytest.approx(1 / math.sqrt(-second), rel=1e-2)


@pytest.mark.parametrize("slope", [0.3, 1.0, 2.5])
def test_a_planted_fault_is_recovered(slope):
    """Of labels that follow sigma(slope z) the slope comes back, and its temperature repairs the model."""
    z, y = sample(3, 20_000, slope)
    found, error = c.slope(z, y)
    assert abs(found - slope) < 4 * error and error < 0.1
    as_is, repaired = (c.expected_error(sigma(z * factor), y) for factor in (1.0, found))
    assert repaired < 0.02 and (slope == 1.0 or as_is > 3 * repaired)
    assert c.brier(sigma(found * z), y) <= c.brier(sigma(z), y) + 1e-9


def test_the_errors_of_a_few_pairs_are_by_hand():
    """ECE, Brier score, FPR and FNR of five pairs, counted by hand."""
    p, y = np.array([0.12, 0.18, 0.62, 0.67, 0.95]), np.array([0.0, 1.0, 1.0, 0.0, 1.0])
    assert c.expected_error(p, y) == pytest.approx((2 * 0.35 + 2 * 0.145 + 1 * 0.05) / 5)
    assert c.brier(p, y) == pytest.approx((0.12**2 + 0.82**2 + 0.38**2 + 0.67**2 + 0.05**2) / 5)
    assert c.rates(p, y) == (0.5, pytest.approx(1 / 3))
    assert [(round(each.low, 1), each.n) for each in c.bins(p, y)] == [(0.1, 2), (0.6, 2), (0.9, 1)]
    assert c.bins(np.array([1.0, 0.0]), np.array([1.0, 0.0]))[-1].n == 1  # 1 lies in the last bin


@given(seed=SEEDS, thresholds=st.tuples(st.floats(0, 1), st.floats(0, 1)))
def test_a_higher_threshold_lowers_fpr_and_raises_fnr(seed, thresholds):
    """FPR falls and FNR rises with the threshold."""
    z, y = sample(seed, 100)
    y[:2] = 0.0, 1.0
    (low_fpr, low_fnr), (high_fpr, high_fnr) = (c.rates(sigma(z), y, t) for t in sorted(thresholds))
    assert low_fpr >= high_fpr and low_fnr <= high_fnr


def test_the_order_of_a_pair_s_sides_knows_nothing_of_its_label():
    """Swapping chosen and rejected swaps y; over many pairs y is 1 about half the time."""
    rng = np.random.default_rng(0)
    pairs = [([1, 2], rng.integers(0, 9, 4).tolist(), rng.integers(9, 18, 4).tolist()) for _ in range(2000)]
    y = c.chosen_first(pairs)
    np.testing.assert_array_equal(c.chosen_first([(x, l, w) for x, w, l in pairs]), 1 - y)
    assert abs(y.mean() - 0.5) < 0.05


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    """Two untrained models and a few pairs."""
    folder = tmp_path_factory.mktemp("calibration")
    rows = [{"prompt": f"{a}?", "chosen": a + b, "rejected": b + a} for a in "abcdef" for b in "ghij"]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "texts.txt").write_text("\n\n".join("abcdefghij?"[i:] for i in range(8)) + "\n")
    for seed in (0, 1):
        cli.pretrain(
            data=folder / "texts.txt", out=folder / f"model{seed}", steps=2, seed=seed, n_embd=8, n_layer=1, n_head=2,
            n_positions=16, batch_size=4, held_out_share=0.2,
        )  # fmt: skip
    return {"checkpoint": folder / "model1", "reference": folder / "model0", "data": folder / "pairs.jsonl"}


def test_evaluate_prints_the_calibration(evaluated, capsys):
    """The command's figures are those of z = beta margin of each pair, in the order of the hash."""
    scores = cli.score(**evaluated, beta=0.7)
    capsys.readouterr()
    found = cli.evaluate(**evaluated, beta=0.7, calibration=True)["calibration"]
    text = capsys.readouterr().out
    margin = np.array([row["rewards/chosen"] - row["rewards/rejected"] for row in scores])
    rows = [json.loads(line) for line in evaluated["data"].read_text().splitlines()]
    assert len(margin) == len(rows) == sum(each["n"] for each in found["bins"])
    for name in ("brier", "slope", "auc"):
        assert f"{name:<20} {found[name]:>12.4f}" in text
    chosen_right = np.mean(sigma(-margin) ** 2)  # the Brier score does not know which side is first
    assert found["brier"] == pytest.approx(chosen_right, rel=1e-5)
    assert cli.evaluate(**evaluated, beta=0.7).keys() == found_without(evaluated)


def found_without(evaluated):
    return cli.evaluate(**evaluated, beta=0.7, calibration=True).keys() - {"calibration"}


def test_what_cannot_be_said_is_null_in_json(evaluated, capsys):
    """Where policy and reference are one, every z is 0: no slope, and JSON has null for it."""
    same = {**evaluated, "reference": evaluated["checkpoint"]}
    cli.evaluate(**same, beta=0.7, calibration=True, json=True)
    found = json.loads(capsys.readouterr().out)["calibration"]
    assert found["slope"] is None and found["auc"] == 0.5 and found["brier"] == 0.25
