"""No policy lies above the frontier, and every point is the end of its method."""

import json

import numpy as np
import pytest

from minidpo import cli, exact, plots
from minidpo.theory import equalities, frontier
from minidpo.theory.frontier import Point

pytestmark = pytest.mark.slow

close = np.testing.assert_allclose


def make(seed):
    return equalities.small_world(seed, characters=2, cap=3)


@pytest.fixture(scope="module")
def points():
    return list(frontier.run([0, 1], make))


def test_nothing_lies_above_the_frontier(points):
    """None of the forty-nine runs of a world has more reward than the frontier at its KL."""
    assert len(points) == 2 * 49 and min(point.shortfall for point in points) > -1e-9
    assert all(np.isfinite([point.kl, point.reward]).all() and point.kl >= -1e-12 for point in points)


def test_exact_methods_reach_the_frontier(points):
    """DPO with exact preferences and the exact policy gradient reach it; methods that learn from samples do not."""
    for point in points:
        if point.kind in ("DPO, exact preferences", "policy gradient, true reward"):
            assert abs(point.shortfall) < 1e-6, point
    kinds = "DPO, 2,000 pairs, 300 steps", "policy gradient, reward from 2,000 pairs"
    for kind in (*kinds, "policy gradient, sampled, 1,000 steps"):
        assert max(point.shortfall for point in points if point.kind == kind) > 1e-3


def test_relatives_end_at_their_own_optima(points):
    """IPO, smoothed labels and other divergences end below the frontier; IPO and smoothed labels nearer the reference.

    Under the Jensen-Shannon divergence, which never exceeds log 2, the policy goes further than under the KL.
    """
    kls = {(point.kind, point.strength, point.seed): point.kl for point in points}
    relatives = [kind for kind in dict.fromkeys(point.kind for point in points) if kind[:3] in ("IPO", "cDP")]
    relatives += [f"DPO under {name}, exact preferences" for name in ("forward KL", "Jensen-Shannon")]
    assert len(relatives) == 4
    for kind in relatives:
        assert max(point.shortfall for point in points if point.kind == kind) > 1e-3
        for beta in frontier.BETAS:
            for seed in (0, 1):
                farther = kls[kind, beta, seed] > kls["DPO, exact preferences", beta, seed]
                assert farther == ("Shannon" in kind) or "forward" in kind


def test_most_reward_is_that_of_the_best_policy():
    """No random policy of the same KL has more reward; pi* has exactly that, and so has the reference at KL 0."""
    world = make(3)
    reference = (np.exp(world.ref_logp) * world.reward).sum(axis=-1).mean()
    close(frontier.most_reward(world, 0.0), reference, rtol=0, atol=1e-15)
    for logp in equalities.random_policies(world, 0):
        kl, reward = frontier.kl_and_reward(world, logp)
        assert frontier.most_reward(world, kl) >= reward - 1e-9
    kl, reward = frontier.kl_and_reward(world, exact.optimum(world.ref_logp, world.reward, 0.3)[0])
    close(frontier.most_reward(world, kl), reward, atol=1e-12)


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_the_frontier_is_exact_at_both_ends(scale):
    """Near KL 0 and near the largest KL of any pi* it is pi*'s reward; beyond, that of the best responses, ties too."""
    world = make(3)
    reward = world.reward * scale
    reward[:, 1] = reward.max(axis=-1)  # two best responses, and a third that is next to as good
    reward[:, 2] = reward.max(axis=-1) - 1e-6 * scale
    world = world._replace(reward=reward)
    for beta in (1e-7, 1e-6, 1e-4, 1e-2, 1, 1e2, 1e4, 1e6):
        kl, expected = frontier.kl_and_reward(world, exact.optimum(world.ref_logp, reward, beta * scale)[0])
        close(frontier.most_reward(world, kl) / scale, expected / scale, rtol=0, atol=1e-9)
    best = reward == reward.max(axis=-1, keepdims=True)
    top = -np.log((np.exp(world.ref_logp) * best).sum(axis=-1)).mean()
    for kl in (top + 1e-9, top + 1, 1e6):
        close(frontier.most_reward(world, kl), reward.max(axis=-1).mean(), rtol=1e-15)
    assert frontier.most_reward(world, top - 1e-3) < reward.max(axis=-1).mean()
    assert frontier.most_reward(world, -1e-12) == frontier.kl_and_reward(world, world.ref_logp)[1]


def test_a_point_above_the_frontier_is_negative(monkeypatch):
    """A score that leaves out a tenth of the probability lies above the curve: its shortfall has a minus sign."""
    world = make(0)
    star = exact.optimum(world.ref_logp, world.reward, 0.5)[0]
    planted = [("above", 0.5, star + np.log(0.9)), ("on", 0.5, star)]
    planted.append(("below", 0.5, exact.optimum(world.ref_logp, -world.reward, 0.5)[0]))
    monkeypatch.setattr(frontier, "policies", lambda world, seed: planted)
    above, on, below = frontier.run([0], make)
    assert above.shortfall < -0.01 and abs(on.shortfall) < 1e-9 and below.shortfall > 0.01
    on = on._replace(shortfall=-1e-12)  # rounding is not above
    rows = [row.split() for row in frontier.as_text([above, on, below]).splitlines()[1:]]
    assert [row[-3] for row in rows] == [f"{point.shortfall:z.3f}" for point in (above, on, below)]
    assert rows[0][-3].startswith("-") and rows[1][-3] == "0.000"


@pytest.mark.parametrize("count", [1, 2, 5])
def test_best_of_n_is_its_distribution(count):
    """Best of N agrees with an enumeration of all draws, and for N = 5 with samples."""
    world = make(0)
    p = np.exp(world.ref_logp[0])
    best = np.zeros(len(p))
    if count == 5:  # by sampling
        rng = np.random.default_rng(0)
        samples = rng.choice(len(p), size=(200_000, 5), p=p / p.sum())
        winners = np.take_along_axis(samples, world.reward[0][samples].argmax(axis=1)[:, None], axis=1)[:, 0]
        best = np.bincount(winners, minlength=len(p)) / len(winners)
        close(np.exp(frontier.best_of(world, 5)[0]), best, atol=5e-3)
        return
    if count == 1:
        best = p
    else:
        for i in range(len(p)):
            for j in range(len(p)):
                best[i if world.reward[0][i] > world.reward[0][j] else j] += p[i] * p[j]
    close(np.exp(frontier.best_of(world, count)[0]), best, atol=1e-12)


def test_sampled_pairs_follow_bradley_terry():
    """Sampled labels follow sigma of the reward difference within five standard errors; no response meets itself."""
    world = make(0)
    wins = equalities.sampled_wins(world, np.random.default_rng(0), 50_000)
    assert wins.sum(axis=(1, 2)).tolist() == [50_000] * len(wins)
    assert (np.einsum("xii->xi", wins) == 0).all()
    compared = wins + wins.transpose(0, 2, 1)
    p = exact.preference_probabilities(world.reward)
    noise = np.sqrt(np.maximum(compared * p * (1 - p), 1e-9))
    assert (abs(wins - compared * p) / noise)[compared > 50].max() < 5


def test_a_learned_reward_is_close_to_the_true_one():
    """Rewards fitted to many pairs are the true ones, up to a constant and within 0.3."""
    world = make(0)
    learned = frontier.learned_reward(equalities.sampled_wins(world, np.random.default_rng(0), 50_000), prior=0.0)
    difference = learned - world.reward
    assert abs(difference - difference.mean(axis=-1, keepdims=True)).max() < 0.3


def test_preferred_fine_tuning_ends_at_the_winners():
    """Preferred fine-tuning ends at the distribution of winners; unlikelihood moves further for as long as it runs."""
    world = make(0)
    p = np.exp(world.ref_logp)
    wins = p[:, :, None] * p[:, None, :] * exact.preference_probabilities(world.reward)
    close(np.exp(frontier.unlikelihood(world, 0.0, 1000)), 2 * wins.sum(axis=2), atol=1e-3)
    distances = [exact.kl(frontier.unlikelihood(world, 1.0, steps), world.ref_logp).mean() for steps in (50, 150, 450)]
    assert distances[0] < distances[1] < distances[2]


def test_the_command_writes_table_points_and_picture(tmp_path, capsys, monkeypatch):
    """The command prints means and spreads over the worlds, and writes every point as JSON."""
    points = [Point("a kind", 0.1, seed, 1.0 + seed, 2.0, 0.5) for seed in range(2)]
    monkeypatch.setattr(frontier, "run", lambda seeds: [points[seed] for seed in seeds])
    assert cli.main(["frontier", f"--out={tmp_path / 'f'}", "--worlds=2"]) == 0
    printed = capsys.readouterr().out
    row = next(line for line in printed.splitlines() if line.startswith("a kind"))
    assert row.split()[2:] == ["0.1", "1.500", "±", "0.707", "2.000", "±", "0.000", "0.500", "±", "0.000"]
    written = json.loads((tmp_path / "f" / "frontier.json").read_text())
    assert written == [point._asdict() for point in points]


def test_the_picture_is_drawn(points):
    """The picture of the frontier is a PNG."""
    pytest.importorskip("matplotlib")
    assert plots.png(frontier.panels(points, make)).startswith(b"\x89PNG")
