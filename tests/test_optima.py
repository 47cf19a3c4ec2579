"""The optima of DPO's relatives, each by enumeration."""

import numpy as np
import pytest

from minidpo.losses import LOSSES
from minidpo.theory import equalities, exact, optima

close = np.testing.assert_allclose


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("part", optima.OPTIMA, ids=lambda part: part.__name__)
def test_every_claim_holds(part, seed):
    """IPO, robust and smoothed DPO, and DPO under other divergences end where their theory says."""
    claims = list(part(equalities.small_world(seed), seed))
    assert claims and all(claim.holds for claim in claims), claims


def test_the_slope_is_that_of_the_mean_loss():
    """`slope` is the largest derivative of the mean loss over all pairs, here by a difference of losses."""
    world = equalities.small_world(0, characters=2, cap=2, prompts=1)
    p = exact.preference_probabilities(world.reward)
    logp = next(equalities.random_policies(world, 3))
    pairs = [(i, j) for i in range(logp.shape[1]) for j in range(logp.shape[1]) if i != j]

    def mean_loss(k, step):
        moved = logp[0].copy()
        moved[k] += step
        four = lambda i, j: (moved[i], moved[j], world.ref_logp[0, i], world.ref_logp[0, j])  # noqa: E731
        return sum(p[0, i, j] * LOSSES["ipo"](*four(i, j), optima.BETA).loss.item() for i, j in pairs) / len(pairs)

    slopes = [(mean_loss(k, 1e-6) - mean_loss(k, -1e-6)) / 2e-6 for k in range(logp.shape[1])]
    close(optima.slope(world, "ipo", logp, p), max(map(abs, slopes)), rtol=1e-6)


@pytest.mark.parametrize("beta", [0.2, 0.5, 5.0])
@pytest.mark.parametrize("text", optima.DIVERGENCES)
def test_the_optimum_under_a_divergence_has_the_most(text, beta):
    """It is a policy, and has more E[r] - beta D than pi*, than the reference and than policies near it."""
    world = equalities.small_world(1, characters=2, cap=3)
    best, f = optima.optimum_under(world, text, beta), optima.DIVERGENCES[text][3]
    close(np.exp(best).sum(axis=-1), 1, atol=1e-7)

    def objective(logp):
        ref = np.exp(world.ref_logp)
        return (np.exp(logp) * world.reward - beta * ref * f(np.maximum(np.exp(logp) / ref, 1e-300))).sum(axis=-1)

    rng = np.random.default_rng(0)
    near = [best + 0.05 * rng.normal(size=best.shape) for _ in range(20)]
    others = [exact.optimum(world.ref_logp, world.reward, beta)[0], world.ref_logp]
    others += [logp - np.logaddexp.reduce(logp, axis=-1, keepdims=True) for logp in near]
    assert all((objective(best) > objective(logp) - 1e-7).all() for logp in others)
    assert all((objective(best) > objective(logp) + 1e-6).all() for logp in others[:2])


@pytest.mark.parametrize("text", optima.DIVERGENCES)
def test_scores_are_derivatives_of_the_divergence(text):
    """log u = inverse(f'(u)), with f' by a difference of f; f' stays below its bound."""
    _, _, inverse, f, most = optima.DIVERGENCES[text]
    u = np.array([0.1, 0.7, 1.0, 2.5, 9.0])
    slope = (f(u + 1e-6) - f(u - 1e-6)) / 2e-6
    close(inverse(slope), np.log(u), atol=1e-4)
    assert (slope < most).all()
