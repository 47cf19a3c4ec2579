"""Every claim of the theory holds, and fails if the theory is changed."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from minidpo import cli, exact, gradcheck, losses, plots
from minidpo.tensor import Tensor
from minidpo.theory import assumptions, dynamics, equalities, optima
from models import CONFIG, small

pytestmark = pytest.mark.slow

close = np.testing.assert_allclose
rewards = hnp.arrays(float, 5, elements=st.floats(-3, 3))
logits = hnp.arrays(float, 5, elements=st.floats(-6, 6))
betas = st.floats(0.05, 5)


def normalised(x):
    return x - np.logaddexp.reduce(x)


@pytest.fixture(scope="module")
def world():
    return equalities.small_world(0, characters=2, cap=3)


@pytest.mark.parametrize("prompts", [[[0, 1], [0, 2]], [[0, 1, 1], [2]]])
def test_exact_logprobs_are_those_of_the_chain_rule(prompts):
    """One forward for all responses agrees with the chain rule, for prompts of one length or of several."""
    params = small()
    responses = exact.complete_responses(4, 3)
    logp = exact.exact_logprobs(params, CONFIG, prompts, responses)
    assert logp.shape == (2, len(responses))
    for x, row in zip(prompts, logp.data):
        close(row, [exact.chain_rule_logprob(params, CONFIG, x, y) for y in responses], rtol=1e-10)
    short = exact.exact_logprobs(params, CONFIG, prompts, [[2], [0]])  # responses of one token
    close(short.data[0], [exact.chain_rule_logprob(params, CONFIG, prompts[0], y) for y in ([2], [0])], rtol=1e-10)
    some = [[1, 0], [0], [1, 2, 3], [1, 2, 3], [3, 0]]
    close(
        exact.exact_logprobs(params, CONFIG, prompts, some).data[1],
        [exact.chain_rule_logprob(params, CONFIG, prompts[1], y) for y in some],
    )
    rng = np.random.default_rng(0)
    weights = rng.normal(size=logp.shape)

    def weighted(p):
        return equalities.ops.sum(weights * exact.exact_logprobs(p, CONFIG, prompts, responses))

    assert gradcheck.check_gradient(weighted, params, rng, 3, "complex") < 1e-12


@given(p=logits, q=logits, reward=rewards, beta=betas)
def test_definitions(p, q, reward, beta):
    """KL, TV, J, pi* and Z are their definitions, written out in plain Python."""
    p, q = normalised(p), normalised(q)
    kl = sum(math.exp(a) * (a - b) for a, b in zip(p, q))
    close(exact.kl(p, q), kl, atol=1e-12)
    close(exact.total_variation(p, q), sum(abs(math.exp(a) - math.exp(b)) for a, b in zip(p, q)) / 2, atol=1e-14)
    value = sum(math.exp(a) * r for a, r in zip(p, reward)) - beta * kl
    close(exact.objective(p, q, reward, beta), value, atol=1e-9)
    z = sum(math.exp(b + r / beta) for b, r in zip(q, reward)) if max(abs(reward)) / beta < 500 else None
    star, log_z = exact.optimum(q, reward, beta)
    if z:
        close(log_z, math.log(z), rtol=1e-9, atol=1e-9)
        close(np.exp(star), [math.exp(b + r / beta) / z for b, r in zip(q, reward)], atol=1e-12)
    close(exact.implicit_reward(star, q, beta), reward - beta * log_z, rtol=1e-9, atol=1e-9)
    assert value <= exact.objective(star, q, reward, beta) + 1e-9
    assert exact.kl(np.array([0.0, -np.inf]), np.log([0.5, 0.5])) == pytest.approx(math.log(2))


@given(reward=rewards)
def test_bradley_terry_and_plackett_luce(reward):
    """Bradley-Terry odds are exp of the reward difference; Plackett-Luce probabilities of rankings sum to 1."""
    p = exact.preference_probabilities(reward)
    close(p / p.T, np.exp(reward[:, None] - reward[None, :]))
    total = sum(math.exp(exact.plackett_luce(reward[:4], order)) for order in itertools.permutations(range(4)))
    close(total, 1)
    close(math.exp(exact.plackett_luce(reward, [3, 1])), p[3, 1])


@given(reward=rewards, shift=st.floats(-5, 5))
def test_lemma_1(reward, shift):
    """r(x, y) and r(x, y) + f(x) give the same preferences over pairs and over rankings; other changes do not."""
    close(exact.preference_probabilities(reward + shift), exact.preference_probabilities(reward), atol=1e-12)
    order = np.argsort(reward)
    close(exact.plackett_luce(reward + shift, order), exact.plackett_luce(reward, order), atol=1e-9)
    other = reward + shift * np.arange(5)  # not a shift by one number per prompt
    if abs(shift) > 0.1:
        assert abs(exact.preference_probabilities(other) - exact.preference_probabilities(reward)).max() > 1e-4


@given(reward=rewards, ref=logits, shift=st.floats(-5, 5), beta=st.floats(0.1, 5))
def test_lemma_2(reward, ref, shift, beta):
    """r(x, y) and r(x, y) + f(x) have the same optimal policy."""
    ref = normalised(ref)
    close(exact.optimum(ref, reward + shift, beta)[0], exact.optimum(ref, reward, beta)[0], atol=1e-9)


@given(reward=rewards, ref=logits, logp=logits, beta=st.floats(0.1, 5))
def test_theorem_1(reward, ref, logp, beta):
    """Each class has exactly one reward of the form beta log(pi/pi_ref), and each policy is the optimum of its own."""
    ref, logp = normalised(ref), normalised(logp)
    star, _ = exact.optimum(ref, reward, beta)
    representative = exact.implicit_reward(star, ref, beta)
    difference = reward - representative
    close(difference, np.full(5, difference.mean()), atol=1e-8)  # it is in the class of r
    close(exact.optimum(ref, representative, beta)[1], 0, atol=1e-9)  # and its Z is 1
    close(exact.optimum(ref, exact.implicit_reward(logp, ref, beta), beta)[0], logp, atol=1e-9)


@given(wins=hnp.arrays(np.int64, (4, 4), elements=st.sampled_from([0, 0, 1, 2])))
def test_fords_condition(wins):
    """A maximum exists exactly if no direction raises no loser above its winner and sets some winner strictly above."""
    np.fill_diagonal(wins, 0)
    directions = np.array(list(itertools.product(range(4), repeat=4)))  # an order of four responses needs four levels
    gaps = (directions[:, :, None] - directions[:, None, :])[:, wins > 0]  # of winner over loser, (256, comparisons)
    separated = ((gaps >= 0).all(axis=1) & (gaps > 0).any(axis=1)).any()
    assert exact.has_maximum(wins) == (not separated)
    if not separated and (wins + wins.T).any(axis=0).all():
        fitted, _ = exact.fitted_rewards(wins.astype(float))
        p = exact.preference_probabilities(fitted)
        close(
            ((wins + wins.T) * p).sum(axis=1), wins.sum(axis=1), atol=1e-6
        )  # every response wins as often as expected
        close(exact.reachable(wins) @ fitted, np.zeros(4), atol=1e-9)
    else:
        with pytest.raises(ValueError, match=r"never compared|no finite rewards"):
            exact.fitted_rewards(wins.astype(float))


def test_parts_that_nothing_links_have_a_maximum_of_their_own():
    """Each part is fitted as if it were alone, and a constant for one of them changes no comparison's probability."""
    wins = np.zeros((4, 4))
    wins[[0, 1, 2, 3], [1, 0, 3, 2]] = 1, 3, 2, 1
    assert exact.has_maximum(wins)
    fitted, _ = exact.fitted_rewards(wins)
    for part in ([0, 1], [2, 3]):
        close(fitted[part], exact.fitted_rewards(wins[np.ix_(part, part)])[0], atol=1e-12)
    close(fitted, np.log([1 / 3, 3, 2, 1 / 2]) / 2, atol=1e-12)
    logp = np.log([[0.4, 0.3, 0.2, 0.1]])
    minimisers = [normalised(logp[0] + fitted + shift * np.array([0, 0, 1, 1]))[None] for shift in (0, 1, -30)]
    losses_there = [equalities.pair_loss(Tensor(policy), logp, wins[None], 1.0).item() for policy in minimisers]
    close(losses_there, losses_there[0], rtol=1e-14)
    close([exact.total_variation(minimisers[0], other)[0] > 0.1 for other in minimisers], [False, True, True])
    wins[0, 2] = 1  # a link that leads one way: no way back
    assert not exact.has_maximum(wins)


@given(reward=rewards)
def test_rewards_come_back_from_probabilities(reward):
    """Fitting exact preference probabilities gives the rewards back, up to a constant."""
    wins = exact.preference_probabilities(reward) * (1 - np.eye(5))
    fitted, steps = exact.fitted_rewards(wins)
    close(fitted, reward - reward.mean(), atol=1e-9)
    assert steps < 30


def test_a_world_that_is_too_large_is_refused():
    """A world of too many responses raises an error before it fills the memory."""
    with pytest.raises(ValueError, match="responses are too many to enumerate"):
        equalities.small_world(0, characters=30, cap=5)


@pytest.mark.parametrize(
    "claims",
    [
        equalities.bradley_terry, equalities.constrained_objective, equalities.reparametrisation, equalities.rlhf,
        equalities.sampling_noise, equalities.mean_log_ratio, assumptions.finite_margins, dynamics.beta_early_and_late,
    ],
    ids=lambda claims: claims.__name__,
)  # fmt: skip
def test_claims_hold(claims, world):
    """Every claim holds in a smaller world and at another seed than those of the command."""
    results = list(claims(world, 1))
    assert results and not [claim for claim in results if claim.holds is False]
    assert all(math.isfinite(claim.number) for claim in results)


@pytest.mark.parametrize("seed", range(4))
def test_separate_parts_hold_in_other_worlds(seed):
    """The claims about parts that no comparison links hold in the worlds of the command, whatever the seed."""
    claims = {claim.text: claim for claim in equalities.bradley_terry(equalities.small_world(seed), seed)}
    assert len(claims) == 9 and all(claim.holds for claim in claims.values()), claims


def test_the_optimum_of_dpo_is_pi_star(world):
    """The paper's central claim, for a table exactly and for a transformer that is large enough."""
    claims = list(equalities.optimum_of_dpo(world, 0))
    assert len(claims) == 3 and all(claim.holds for claim in claims), claims
    runs = [(0.5, 4, 1, 400, 1.0), (0.5, 16, 2, 400, 1e-2), (5.0, 16, 2, 266, math.inf)]
    claims = list(equalities.optimum_of_transformers(world, 0, runs))
    assert [claim.holds for claim in claims] == [True, True, None], claims
    assert claims[0].number > 10 * claims[1].number


def test_a_claim_can_fail():
    """A number above its bound, or nan, fails; without a bound there is no verdict."""
    assert equalities.at_most("x", 2.0, 1.0).holds is False and equalities.at_most("x", 1.0, 1.0).holds is True
    assert equalities.at_most("x", np.nan, 1.0).holds is False and equalities.at_most("x", 9.0, math.inf).holds is None


@pytest.mark.parametrize("broken", [False, True])
def test_the_command_prints_claim_number_and_verdict(broken, capsys, monkeypatch, world):
    """Each claim is a line; one that fails makes the exit status 1."""

    def part(world, seed):
        """A law."""
        yield equalities.at_most("two is less than three", 4.0 if broken else 2.0, 3.0)
        yield equalities.Claim("by the way", 7.0, None)

    monkeypatch.setattr(equalities, "EQUALITIES", [part])
    monkeypatch.setattr(optima, "OPTIMA", [])
    monkeypatch.setattr(equalities, "small_world", lambda seed: world)
    monkeypatch.setattr(
        assumptions, "cases", lambda world, seed: [lambda: assumptions.Outcome("name", 0.1, -0.0, -1e-9)]
    )
    assert cli.main(["exact"]) == int(broken)
    printed = capsys.readouterr().out
    assert f"  {'FAILS' if broken else 'holds'}" in printed and "  shown   7.00e+00  by the way" in printed
    assert "A law." in printed and "0.1000   0.000    0.000  name" in printed
    assert f"{8 if broken else 9} of 9 claims hold" in printed


def test_the_effect_of_beta_is_a_picture():
    """The gaps over time are a PNG."""
    pytest.importorskip("matplotlib")
    assert plots.png(dynamics.gap_panels()).startswith(b"\x89PNG")


def test_a_wrong_optimum_is_not_reached(world):
    """The minimiser is far from pi* of another beta or another reward."""
    wins = exact.preference_probabilities(world.reward) * (1 - np.eye(world.reward.shape[-1]))
    logp, _ = equalities.newton(world, wins, 0.5)
    for beta, reward in ((0.4, world.reward), (0.5, world.reward[::-1]), (0.5, -world.reward)):
        star, _ = exact.optimum(world.ref_logp, reward, beta)
        assert exact.total_variation(logp, star).max() > 1e-2


def test_newton_ends_where_the_gradient_of_the_dpo_loss_is_0(world):
    """The gradient of `pair_loss` by autograd is 0 at the policy that Newton finds."""
    wins = exact.preference_probabilities(world.reward) * (1 - np.eye(world.reward.shape[-1]))
    logp, _ = equalities.newton(world, wins, 0.3)
    leaf = Tensor(logp, requires_grad=True)
    equalities.pair_loss(equalities.ops.log_softmax(leaf), world.ref_logp, wins, 0.3).backward()
    assert abs(leaf.grad).max() < 1e-12


@pytest.mark.parametrize("beta", [0.1, 1.0, 30.0])
def test_pair_slope_has_the_gradient_of_pair_loss(beta, world):
    """A sweep from `pair_slope` gives what one from `pair_loss` does, near the reference and far away."""
    wins = np.random.default_rng(0).random((3, 15, 15))
    for logp in equalities.random_policies(world, 1, count=5):
        leaves = [Tensor(logp, requires_grad=True) for _ in range(2)]
        for number, leaf in zip((equalities.pair_loss, equalities.pair_slope), leaves):
            number(leaf, world.ref_logp, wins, beta).backward()
        close(leaves[1].grad, leaves[0].grad, rtol=1e-12, atol=1e-16 * beta)


def test_pair_loss_is_the_mean_of_dpo_loss(world):
    """`pair_loss` and `square_loss` are weighted means of `losses.dpo_loss` and `ipo_loss`, pair by pair."""
    wins = exact.preference_probabilities(world.reward) * (1 - np.eye(world.reward.shape[-1]))
    logp = next(equalities.random_policies(world, 0))
    for mine, theirs in ((equalities.pair_loss, losses.dpo_loss), (equalities.square_loss, losses.ipo_loss)):
        total = 0.0
        for x in range(len(wins)):
            for i, j in itertools.permutations(range(wins.shape[-1]), 2):
                each = theirs(logp[x, i], logp[x, j], world.ref_logp[x, i], world.ref_logp[x, j], 0.7).loss.item()
                total += wins[x, i, j] / wins[x].sum() * each / len(wins)
        close(mine(Tensor(logp), world.ref_logp, wins, 0.7).item(), total, rtol=1e-10)


def test_the_policy_gradient_is_that_of_the_objective(world):
    """The policy gradient is that of J by central differences; Fisher's F times the natural one is the plain one."""
    rng = np.random.default_rng(0)
    theta = rng.normal(size=5)
    reward, ref = rng.normal(size=5), normalised(rng.normal(size=5))
    gradient = equalities.policy_gradient(normalised(theta), ref, reward, 0.7)
    for i in range(5):
        up, down = (
            exact.objective(normalised(theta + sign * 1e-6 * np.eye(5)[i]), ref, reward, 0.7) for sign in (1, -1)
        )
        close(gradient[i], (up - down) / 2e-6, atol=1e-8)
    p = np.exp(normalised(theta))
    natural = equalities.natural_gradient(normalised(theta), gradient)
    close((np.diag(p) - np.outer(p, p)) @ natural, gradient, atol=1e-14)
    close((p * natural).sum(), 0, atol=1e-14)


def test_sampled_gradients_are_unbiased(world):
    """The mean of sampled gradients over all responses, by enumeration, is the exact gradient."""
    p = np.exp(world.ref_logp[0])

    class Each:
        def choice(self, n, size, p):
            return np.arange(n)

    one_of_each = equalities.sampled_gradients(world, world.ref_logp, 0.5, Each(), len(p))
    close(
        (p[:, None] * one_of_each).sum(axis=0),
        equalities.policy_gradient(world.ref_logp, world.ref_logp, world.reward, 0.5)[0],
        atol=1e-14,
    )


def test_what_breaks_it_breaks_it(world):
    """With nothing broken DPO ends at pi*; certain labels overshoot it, flipped labels stay near the reference.

    Robust DPO, which knows how many labels are flipped, ends at pi*. Under other divergences DPO goes further than pi*,
    and IPO stays nearer to the reference.
    """
    rows = {row.name: row for row in assumptions.what_breaks_it(world, 0, steps=300)}
    assert rows["pi*"].tv == 0 and rows["DPO, nothing broken"].tv < 1e-3
    certain = rows["DPO, labels without noise, 300 steps"]
    assert certain.kl > 2 * rows["pi*"].kl and certain.tv > 0.3
    assert rows["IPO, labels without noise"].kl < certain.kl
    flipped = [row for name, row in rows.items() if "flipped" in name]
    (robust,) = [row for row in flipped if "robust" in row.name]
    flipped.remove(robust)
    assert robust.tv < 1e-3
    assert len(flipped) == 3 and all(row.kl < rows["pi*"].kl and row.tv > 0.05 for row in flipped)
    assert rows["IPO, nothing broken"].kl < 0.1 * rows["pi*"].kl
    under = [row for name, row in rows.items() if name.startswith("DPO under")]
    assert len(under) == 3 and all(row.kl > 2 * rows["pi*"].kl for row in under)
    for name in ("DPO, 300 sampled pairs a prompt, 300 steps", "DPO, a reference without support for the ten best"):
        assert rows[name].tv > 0.01
    row = assumptions.outcome("x", world, world.ref_logp, 0.5)
    assert row.kl == 0 and row.reward == pytest.approx(
        (np.exp(world.ref_logp) * world.reward).sum() / len(world.reward)
    )


def test_a_row_names_its_steps_if_more_of_them_would_move_it():
    """With twice the steps a table's row stays where it is, or is another row: its name has the steps."""
    world = equalities.small_world(0, prompts=1)
    once, twice = (assumptions.cases(world, 0, steps)[:-2] for steps in (300, 600))  # without the transformers
    moved = {}
    for case, longer in zip(once, twice):
        row, later = case(), longer()
        assert (row.name == later.name) == ("300 steps" not in row.name)
        moved[row.name] = abs(later.kl - row.kl) > 1e-3
    assert moved == {name: "300 steps" in name for name in moved} and sum(moved.values()) == 2


def test_too_small_and_too_briefly_trained_are_two_rows():
    """Three times the steps bring the large transformer near pi*; twelve times leave the small one far away."""
    world = equalities.small_world(0)
    brief, small = (case() for case in assumptions.cases(world, 0)[-2:])
    assert "width 32, 100 steps: too brief" in brief.name and "width 4, 1200 steps: too small" in small.name
    longer = equalities.fitted_transformer(world, equalities.all_pairs(world), 0.5, 0, 32, 2, 300)
    assert assumptions.outcome("", world, longer, 0.5).tv < 0.02 < 0.1 < brief.tv < small.tv


@given(beta=st.floats(0.02, 2), t=st.floats(0, 1e4))
def test_hard_label_gap_solves_its_equation(beta, t):
    """The closed form satisfies its equation, and its derivative is the gradient flow."""
    h = dynamics.hard_label_gap(beta, t)
    close(beta * h + math.exp(beta * h), 1 + 2 * beta**2 * t, rtol=1e-9)
    later = dynamics.hard_label_gap(beta, t + 1e-4)
    close((later - h) / 1e-4, 2 * beta / (1 + math.exp(beta * h)), rtol=1e-3, atol=1e-6)


def test_steps_on_the_gap_are_steps_of_dpo():
    """The path of gaps is that of plain gradient steps on two log-probabilities under the DPO loss."""
    path = dynamics.gap_path((0.5,), 3, 0.1, 1.0)
    w, l = np.array([-3.0]), np.array([-4.0])
    for h in path[:, 0]:
        close((w + 3.0) - (l + 4.0), h, atol=1e-12)
        gradient_w, gradient_l = losses.dpo_gradient(w, l, np.array([-3.0]), np.array([-4.0]), 0.5)
        w, l = w - 0.1 * gradient_w, l - 0.1 * gradient_l
    mixed = dynamics.gap_path((0.5,), 1, 0.1, 0.8)[1, 0]
    close(mixed, 0.1 * 2 * 0.5 * (0.8 * 0.5 - 0.2 * 0.5))


@pytest.mark.parametrize(
    ("beta", "gaps"), [(0.01, (0.10, 1.0, 9.8, 79)), (0.1, (0.98, 7.9, 29.0, 53)), (0.5, (3.01, 7.7, 12.4, 17))]
)
def test_the_table_of_gaps(beta, gaps):
    """At t = 10, 100, 1,000, 10,000 a larger beta is ahead early and behind late."""
    computed = [dynamics.hard_label_gap(beta, t) for t in (10, 100, 1000, 10_000)]
    for number, gap in zip(computed, gaps):
        assert abs(number - gap) < 0.06 if gap < 50 else abs(number - gap) < 0.6
