"""A preferred response can become less likely: predicted, measured, and proved for three words."""

import functools

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

import models
from drawing import fifth
from minidpo import Tensor, explain, model, optim, scoring
from minidpo.explain import displacement
from minidpo.model import Config
from minidpo.theory import no_never_yes
from minidpo.theory.no_never_yes import VECTORS, three_words
from models import CONFIG, small

pytestmark = pytest.mark.slow

close = np.testing.assert_allclose
seeds = st.integers(0, 20)


def view_of(ids, seed=0):
    return explain.pair(small(seed), small(seed + 1), CONFIG, *ids, 0.3)


@fifth
@given(ids=models.pairs(), seed=seeds)
def test_kernels_are_inner_products_of_gradients(ids, seed):
    """K_ab is the derivative of log pi(a) along the gradient of log pi(b), here by central differences."""
    kernel = displacement.step(small(seed), CONFIG, view_of(ids, seed))
    x, w, l = ids

    def along(a, b, h=1e-6):
        params = small(seed)
        scoring.sequence_logprob(params, CONFIG, [x], [b]).backward()
        ends = []
        for step in (h, -h):
            moved = {name: Tensor(p.data + step * p.grad) for name, p in params.items()}
            ends.append(scoring.sequence_logprob(moved, CONFIG, [x], [a]).item())
        return (ends[0] - ends[1]) / (2 * h)

    scale = max(kernel.K_ww, kernel.K_ll)
    close([kernel.K_ww, kernel.K_ll, kernel.K_wl], [along(w, w), along(l, l), along(w, l)], atol=1e-4 * scale)
    assert kernel.K_wl**2 <= kernel.K_ww * kernel.K_ll * (1 + 1e-12)


@fifth
@given(seed=st.integers(0, 50))
def test_the_prediction_is_first_order(seed):
    """The relative error of the prediction falls in proportion to the rate."""
    ids = ([0, 1, 2], [1, 2, 3, 0], [1, 4, 0])
    view = view_of(ids, seed)
    for name in ("chosen", "rejected"):
        errors, rounding = [], []
        for rate in (1e-4, 1e-5, 1e-6):
            change = getattr(displacement.step(small(seed), CONFIG, view, rate), name)
            assume(abs(change.predicted) > 1e-3 * rate)
            errors.append(change.measured / change.predicted - 1)
            rounding.append(1e-13 / abs(change.predicted))
            close(change.own + change.cross, change.predicted, rtol=1e-12)
        assert abs(errors[0]) < 0.1
        for larger, smaller, noise in zip(errors, errors[1:], rounding[1:], strict=False):
            assert abs(larger - 10 * smaller) < 0.1 * abs(larger) + 10 * noise, errors


def test_own_pushes_have_their_signs_and_adamw_breaks_the_prediction():
    """The own push raises the chosen and lowers the rejected response; AdamW does not follow the prediction."""
    policy, ids = small(3), ([0, 1, 2], [1, 2, 3, 0], [1, 4, 0])
    view = view_of(ids, 3)
    before = {name: p.data.copy() for name, p in policy.items()}
    plain = displacement.step(policy, CONFIG, view, 1e-6)
    assert plain.chosen.own > 0 > plain.rejected.own
    assert plain.chosen.cross == -plain.rejected.cross == pytest.approx(-1e-6 * 0.3 * view.weight * plain.K_wl)
    assert all((policy[name].data == before[name]).all() and policy[name].grad is None for name in policy)
    adamw = functools.partial(optim.AdamW, weight_decay=0.0)
    ratios = [
        step.chosen.measured / step.chosen.predicted
        for step in (displacement.step(policy, CONFIG, view, rate, adamw) for rate in (1e-6, 1e-8))
    ]
    assert all(abs(ratio - 1) > 0.5 for ratio in ratios)
    close(ratios[0], ratios[1], rtol=1e-2)  # a first step of AdamW is linear in its rate too, along another direction


def test_the_sign_of_the_prediction_is_that_of_the_step():
    """The predicted sign is the measured one in at least 99 of 100 random pairs; both signs occur."""
    rng = np.random.default_rng(0)
    steps = []
    for seed in range(20):
        pairs = [tuple(rng.integers(0, 5, rng.integers(1, 4)).tolist() for _ in range(3)) for _ in range(15)]
        steps += displacement.meter(small(seed), small(seed + 1), CONFIG, [ids for ids in pairs if ids[1] != ids[2]])
    falls = [step.chosen.predicted < 0 for step in steps]
    agree = [step.chosen.measured < 0 for step in steps] == np.array(falls)
    assert len(steps) > 250 and agree.mean() >= 0.99
    assert 5 < sum(falls) < len(falls) - 5
    assert falls == [step.K_wl > step.K_ww for step in steps]


def step_of(K_ww, K_wl, predicted, measured):
    change = displacement.Change(0.0, 0.0, predicted, measured)
    return displacement.Step(1e-6, K_ww, K_wl, 1.0, change, change)


def test_the_meter_counts_what_it_says():
    """The meter counts predicted falls, moves beyond rounding, measured falls and correct signs."""
    steps = [
        step_of(2.0, 1.0, 1e-6, 1e-6),
        step_of(1.0, 2.0, -1e-6, 1e-6),
        step_of(1.0, 2.0, -1e-6, -1e-6),
        step_of(1.0, 2.0, -1e-12, 1e-12),
    ]
    assert displacement.meter_as_text(steps) == (
        "4 pairs: the kernel predicts that 3 lower their own log pi(chosen), because K_wl > K_ww. A step on the pair "
        "alone moves it by more than rounding (1e-11 nats) in 3: it fell in 1, and its sign was the predicted one in 2"
    )


def test_the_meter_takes_its_options():
    """The meter uses the beta, the rate and the reference that it is given."""
    ids = ([0, 1], [2, 3, 0], [2, 0])
    config = Config(CONFIG.vocab_size, 12, 4, 1, 1)
    other = model.init(config, np.random.default_rng(0), dtype="float64")
    (step,) = displacement.meter(small(0), other, CONFIG, [ids], 0.7, 1e-4, config)
    view = explain.pair(small(0), other, CONFIG, *ids, 0.7, reference_config=config)
    assert step == displacement.step(small(0), CONFIG, view, 1e-4) and step.learning_rate == 1e-4


def test_without_likelihood_the_chosen_word_falls_at_every_step():
    """log pi("no") falls at every step, the margin grows at every step, and "yes" ends up with everything."""
    run = three_words()
    no, never, yes = run.path.T
    assert (np.diff(no) < 0).all() and (np.diff(no - never) > 0).all()
    assert no[0] == pytest.approx(-np.log(3)) and no[-1] < -13 and yes[-1] > -1e-5
    assert three_words(steps=200).loss > 5 * run.loss > 5 * three_words(steps=4000).loss


def test_the_reasons_given_are_true():
    """The proof in the docstring: <u, d> is 2, 0, 5 with mean 7/3, and d E[<u, d>]/ds is the variance."""
    d = VECTORS[0] - VECTORS[1]
    along = VECTORS @ d
    assert along.tolist() == [2, 0, 5] and np.isclose(along.mean(), 7 / 3)
    for s in (0.0, 0.5, 2.0):
        p, up, down = (np.exp(t * along) / np.exp(t * along).sum() for t in (s, s + 1e-6, s - 1e-6))
        slope = ((up - down) @ along) / 2e-6
        close(slope, p @ along**2 - (p @ along) ** 2, rtol=1e-6)
        chosen = (np.log(up[0]) - np.log(down[0])) / 2e-6
        close(chosen, along[0] - p @ along, rtol=1e-6)


@pytest.mark.parametrize("weight", [0.0, 0.02, 0.05, 0.1, 0.5])
def test_the_first_slope_is_that_of_the_first_step(weight):
    """The slope in closed form is that of a small step, and changes sign at a weight of 0.75/13."""
    run = three_words(weight, steps=1, learning_rate=1e-6)
    close((run.path[1] - run.path[0])[0] / 1e-6, run.slope, rtol=1e-4)
    assert (run.slope > 0) == (weight > 0.75 / 13)  # (beta/2)(1/3) = 0.25/3 against weight * 13/9


def test_with_likelihood_the_chosen_word_ends_likely():
    """A likelihood term makes the chosen word likely in the end, even if it fell first."""
    for weight in (0.02, 0.1, 0.5):
        run = three_words(weight)
        assert run.path[-1, 0] > -0.1 and run.loss < 0.02
        assert (run.path[:, 0].min() < -1.0987) == (weight == 0.02)  # it fell first
    runs = [three_words(0.0, steps=3), three_words(0.5, steps=3)]
    first, _, *rows = no_never_yes.as_text(runs).splitlines()
    assert first.startswith('One pair, "no" over "never"') and "beta 0.5, 3 steps of rate 0.1" in first
    for row, run in zip(rows, runs, strict=True):
        weight, slope, *logps, loss = map(float, row.split())
        close([weight, slope, loss], [run.nll_weight, run.slope, run.loss], atol=1e-4)
        close(logps, run.path[-1], atol=1e-3)
    z = 0.5 * (runs[0].path[-1][0] - runs[0].path[-1][1])
    close(runs[0].loss, np.log1p(np.exp(-z)))
