"""Calibration: each figure against its definition, and a planted fault recovered."""

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minidpo import cli, plots
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
def test_the_area_below_the_roc_curve_is_the_auc(seed, n, ties):
    """By the trapezoidal rule, which gives ties one half. The curve goes from (0, 0) to (1, 1) and holds every rate."""
    z, y = sample(seed, n)
    z = np.round(z) if ties else z
    y[0], y[1] = 0.0, 1.0
    fpr, found = map(np.array, c.roc(z, y))
    assert (fpr[0], found[0], fpr[-1], found[-1]) == (0, 0, 1, 1)
    area = ((fpr[1:] - fpr[:-1]) * (found[1:] + found[:-1]) / 2).sum()
    assert area == pytest.approx(c.auc(z, y), abs=1e-12)
    for threshold in z:
        i = np.unique(z)[::-1].tolist().index(threshold) + 1
        assert (fpr[i], 1 - found[i]) == pytest.approx(c.rates(z, y, threshold), abs=1e-12)


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


@pytest.mark.parametrize("slope", [0.3, 1.0, 1 / 0.55, 2.5])
def test_a_planted_fault_is_recovered(slope):
    """Of labels that follow sigma(slope z) the slope comes back, and its temperature repairs the model."""
    z, y = sample(3, 20_000, slope)
    found, error = c.slope(z, y)
    assert abs(found - slope) < 4 * error and error < 0.1
    assert c.calibration(z, y)["temperature"] == 1 / found
    as_is, repaired = (c.calibration(z * factor, y)["ece"] for factor in (1.0, found))
    assert repaired < 0.02 and (slope == 1.0 or as_is > 3 * repaired)
    assert c.brier(sigma(found * z), y) <= c.brier(sigma(z), y) + 1e-9


def test_the_errors_of_a_few_pairs_are_by_hand():
    """ECE, Brier score, FPR and FNR of five pairs, counted by hand."""
    p, y = np.array([0.12, 0.18, 0.62, 0.67, 0.95]), np.array([0.0, 1.0, 1.0, 0.0, 1.0])
    assert c.expected_error(c.bins(p, y)) == pytest.approx((2 * 0.35 + 2 * 0.145 + 1 * 0.05) / 5)
    assert c.brier(p, y) == pytest.approx((0.12**2 + 0.82**2 + 0.38**2 + 0.67**2 + 0.05**2) / 5)
    assert c.rates(p, y) == (0.5, pytest.approx(1 / 3))
    assert [(round(each.low, 1), each.n) for each in c.bins(p, y)] == [(0.1, 2), (0.6, 2), (0.9, 1)]
    z = np.log(p / (1 - p))
    figures = c.calibration(z, y)
    assert (figures["pairs"], figures["fpr"], figures["fnr"]) == (5, 0.5, pytest.approx(1 / 3))
    assert figures["brier"] == pytest.approx(c.brier(p, y)) and figures["ece"] == pytest.approx(1.04 / 5)
    assert c.bins(np.array([1.0, 0.0]), np.array([1.0, 0.0]))[-1].n == 1  # 1 lies in the last bin


@given(seed=SEEDS, n=st.integers(2, 40))
def test_a_probability_counts_as_that_many_labels(seed, n):
    """The slope of probabilities p is that of a pair with label 1 repeated p times and one with label 0 1 - p times."""
    rng = np.random.default_rng(seed)
    z, tenths = rng.normal(0, 2, n), rng.integers(1, 10, n)
    labels = np.concatenate([[1.0] * k + [0.0] * (10 - k) for k in tenths])
    assert c.slope(z, tenths / 10)[0] == pytest.approx(c.slope(np.repeat(z, 10), labels)[0], rel=1e-9, abs=1e-12)


def test_without_a_label_against_z_there_is_no_slope():
    """The slope is infinite if all labels agree with z, minus infinite if all disagree; z = 0 says nothing."""
    z, y = np.array([2.0, -1.0, 0.0]), np.array([1.0, 0.0, 1.0])
    assert c.slope(z, y)[0] == math.inf and c.slope(-z, y)[0] == -math.inf and math.isnan(c.slope(0 * z, y)[0])
    assert c.calibration(z, y)["temperature"] == 0 and math.isnan(c.calibration(0 * z, y)["temperature"])


def test_what_one_kind_of_label_cannot_say_is_nan():
    """A group with labels of one kind has nan where both are needed, in the table too."""
    z, _ = sample(5, 20)
    found = {"benign": c.calibration(z, np.ones(20)), "alone": c.calibration(np.array([1.0]), np.array([0.0]))}
    assert math.isnan(found["benign"]["auc"]) and math.isnan(found["benign"]["fpr"])
    assert found["benign"]["fnr"] == (z < 0).mean() and found["alone"]["slope"] == -math.inf
    lines = c.as_text(found).split("\n")
    assert len(lines) == 5 and lines[2].split()[:2] == ["benign", "20"] and "nan" in lines[2]


def test_the_true_model_has_no_error_and_a_scaled_one_has_its_scale():
    """z = gap is without error; z = 0.3 gap has a slope of 0.3 in the gap, and the temperature 0.3 repairs it."""
    gap = np.random.default_rng(0).integers(-7, 8, 1000).astype(float)
    exact = c.against_truth(gap, gap)
    assert (exact["absolute_error"], exact["kl"], exact["brier_excess"]) == pytest.approx((0, 0, 0), abs=1e-15)
    assert (exact["gap_slope"], exact["true_temperature"]) == pytest.approx((1, 1))
    scaled = c.against_truth(0.3 * gap, gap)
    assert (scaled["gap_slope"], scaled["true_temperature"]) == pytest.approx((0.3, 0.3))


@given(seed=SEEDS, n=st.integers(1, 50))
def test_the_errors_against_the_truth_are_their_definitions(seed, n):
    """The KL and the error are sums over both labels; the Brier score's expectation is floor and excess."""
    rng = np.random.default_rng(seed)
    z, gap = rng.normal(0, 3, n), rng.integers(-7, 8, n).astype(float)
    found, p, q = c.against_truth(z, gap), sigma(gap), sigma(z)
    kl = [a * math.log(a / b) + (1 - a) * math.log((1 - a) / (1 - b)) for a, b in zip(p, q)]
    assert found["kl"] == pytest.approx(np.mean(kl), abs=1e-9)
    assert found["absolute_error"] == pytest.approx(np.mean(np.abs(p - q)))
    assert found["brier_floor"] + found["brier_excess"] == pytest.approx(np.mean(p * (1 - q) ** 2 + (1 - p) * q**2))
    if gap.any():
        residual = z - found["gap_slope"] * gap
        assert residual @ gap == pytest.approx(0, abs=1e-9)  # the normal equation of least squares
    else:
        assert math.isnan(found["gap_slope"])


def test_the_picture_shows_the_bins_before_and_after_and_the_threshold():
    """Points and bars are the bins; its temperature brings a scaled model nearer the diagonal; ROC holds its point."""
    z, y = sample(7, 5000, slope=1 / 0.55)
    honest, roc = c.panels(z, y)
    diagonal, before, after = honest.curves
    rows = c.calibration(z, y)["bins"]
    assert list(before.y) == [row["share"] for row in rows]
    assert [(y - below, y + above) for y, (below, above) in zip(before.y, before.error)] == [
        pytest.approx(row["interval"]) for row in rows
    ]
    distance = [max(abs(x - y) for x, y in zip(curve.x, curve.y)) for curve in (before, after)]
    assert distance[1] < 0.6 * distance[0] and "0.5" in after.label and list(diagonal.x) == list(diagonal.y)
    fpr, fnr = c.rates(sigma(z), y)
    assert (roc.curves[-1].x, roc.curves[-1].y) == ([fpr], [1 - fnr])
    assert len(c.panels(z, 0 * y)) == 1 and len(c.panels(0 * z, y)[0].curves) == 2  # no ROC; no temperature
    assert plots.installed() is False or plots.png(c.panels(z, y)).startswith(b"\x89PNG")


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
