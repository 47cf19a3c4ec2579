"""The DPO loss and its relatives: routes to their gradients, and the facts that are widely got wrong."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from minidpo import Tensor, family, gradcheck, losses, ops

close = np.testing.assert_allclose
four_logps = st.integers(1, 4).flatmap(lambda B: st.tuples(*[hnp.arrays(float, B, elements=st.floats(-50, 0))] * 4))
betas = st.floats(0.01, 5)
smoothings = st.floats(0, 0.5)


@given(logps=four_logps, beta=betas, e=smoothings)
def test_loss_is_the_paper_s(logps, beta, e):
    """`dpo_loss` is equation 7, here one pair at a time in plain Python, with the rewards of section 4."""
    total = 0.0
    for w, l, ref_w, ref_l in zip(*logps):
        z = beta * ((w - ref_w) - (l - ref_l))
        p = 1 / (1 + math.exp(-z)) if z >= 0 else math.exp(z) / (1 + math.exp(z))
        q = 1 / (1 + math.exp(z)) if z <= 0 else math.exp(-z) / (1 + math.exp(-z))
        total -= (1 - e) * math.log(p) + e * math.log(q)
    out = losses.dpo_loss(*logps, beta=beta, label_smoothing=e)
    close(out.loss.item(), total / len(logps[0]), rtol=1e-12, atol=1e-14)
    close(out.reward_w.data - out.reward_l.data, beta * out.margin.data, atol=1e-12)
    close(out.reward_w.data, beta * (logps[0] - logps[2]))


@given(logps=four_logps, beta=betas)
def test_ipo_is_the_paper_s(logps, beta):
    """`ipo_loss` is equation 17, here one pair at a time in plain Python, with the finite target 1/(2 tau)."""
    w, l, ref_w, ref_l = logps
    squares = [((a - c) - (b - d) - 1 / (2 * beta)) ** 2 for a, b, c, d in zip(w, l, ref_w, ref_l)]
    out = losses.ipo_loss(*logps, beta=beta)
    close(out.loss.item(), sum(squares) / len(squares), rtol=1e-9, atol=1e-12)
    close(out.reward_w.data, beta * (w - ref_w))
    close(out.reward_l.data, beta * (l - ref_l))
    close(out.margin.data, (w - ref_w) - (l - ref_l))


@given(logps=four_logps, beta=betas, e=smoothings)
def test_reference_free_is_dpo_with_a_uniform_reference(logps, beta, e):
    """`reference_free_loss` is `dpo_loss` with the same reference log-probability for both responses."""
    w, l, constant, _ = logps
    free, uniform = losses.reference_free_loss(w, l, beta, e), losses.dpo_loss(w, l, constant, constant, beta, e)
    close(free.loss.item(), uniform.loss.item(), rtol=1e-9, atol=1e-12)
    close(free.margin.data, uniform.margin.data, atol=1e-12)
    close(free.reward_w.data, beta * w)
    close(free.reward_l.data, beta * l)


def routes(kind, ref_w, ref_l, beta, e):
    """A loss and its closed-form gradient, as functions of the policy's two log-probabilities."""
    return {
        "dpo": (
            lambda w, l: losses.dpo_loss(w, l, ref_w, ref_l, beta, e),
            lambda w, l: losses.dpo_gradient(w, l, ref_w, ref_l, beta, e),
        ),
        "ipo": (
            lambda w, l: losses.ipo_loss(w, l, ref_w, ref_l, beta),
            lambda w, l: losses.ipo_gradient(w, l, ref_w, ref_l, beta),
        ),
        "reference-free": (
            lambda w, l: losses.reference_free_loss(w, l, beta, e),
            lambda w, l: losses.reference_free_gradient(w, l, beta, e),
        ),
    }[kind]


KINDS = ["dpo", "ipo", "reference-free"]


@pytest.mark.parametrize("kind", KINDS)
@given(logps=four_logps, beta=betas, e=smoothings, seed=st.integers(0, 99))
def test_gradient_four_ways(kind, logps, beta, e, seed):
    """Autograd, closed form, central difference and complex step agree."""
    w, l, ref_w, ref_l = logps
    loss, gradient = routes(kind, ref_w, ref_l, beta, e)
    leaves = {"w": Tensor(w, requires_grad=True), "l": Tensor(l, requires_grad=True)}
    loss(leaves["w"], leaves["l"]).loss.backward()
    closed_w, closed_l = gradient(w, l)
    close(leaves["w"].grad, closed_w, rtol=1e-12, atol=1e-15)
    close(leaves["l"].grad, closed_l, rtol=1e-12, atol=1e-15)
    rng = np.random.default_rng(seed)
    for method, bound in (("central", 1e-6), ("complex", 1e-12)):
        error = gradcheck.check_gradient(
            lambda params: loss(params["w"], params["l"]).loss, leaves, rng, 5, method=method
        )
        assert error < bound


@pytest.mark.parametrize("kind", KINDS)
@given(same=hnp.arrays(float, (2, 3), elements=st.floats(-50, 0)), beta=betas, e=smoothings)
def test_identical_responses_have_no_gradient(kind, same, beta, e):
    """A pair whose two responses are the same text has no gradient: up and down cancel."""
    logp, ref = same
    loss, _ = routes(kind, ref, ref, beta, e)
    leaf = Tensor(logp, requires_grad=True)
    loss(leaf, leaf).loss.backward()
    assert (leaf.grad == 0).all()


@given(logps=four_logps, beta=betas, shift=st.floats(-9, 9))
def test_ipo_sees_only_the_gap_between_references(logps, beta, shift):
    """A constant on both reference log-probabilities does not change IPO, so Z(x) does not matter to it."""
    w, l, ref_w, ref_l = logps
    shifted = losses.ipo_loss(w, l, ref_w + shift, ref_l + shift, beta).loss.item()
    close(shifted, losses.ipo_loss(*logps, beta).loss.item(), rtol=1e-6, atol=1e-9)


def test_ipo_at_the_reference():
    """At the reference IPO's loss is 1/(4 beta^2) and its gradient -+1/(beta B), not DPO's log 2 and -+beta/(2B)."""
    four = [np.array([-3.0, -4.0]), np.array([-5.0, -1.0])] * 2
    close(losses.ipo_loss(*four, beta=0.5).loss.item(), 1.0)
    close(losses.ipo_gradient(*four, beta=0.5)[0], [-1.0, -1.0])


def test_worked_example():
    """-10, -15 against -12, -14 at beta 0.1: rewards .2 and -.1, loss .5544, gradients -+.04256."""
    out = losses.dpo_loss(-10.0, -15.0, -12.0, -14.0, beta=0.1)
    close([out.reward_w.item(), out.reward_l.item(), out.margin.item()], [0.2, -0.1, 3.0])
    assert f"{out.loss.item():.4f}" == "0.5544"
    assert [f"{g:.5f}" for g in losses.dpo_gradient(-10.0, -15.0, -12.0, -14.0, beta=0.1)] == ["-0.04256", "0.04256"]
    assert losses.dpo_loss(-10.0, -15.0, -12.0, -14.0).loss.item() == out.loss.item()  # beta is 0.1 by default
    assert losses.dpo_gradient(-10.0, -15.0, -12.0, -14.0)[1] == losses.dpo_gradient(-10.0, -15.0, -12.0, -14.0, 0.1)[1]


@given(B=st.integers(1, 4), beta=betas, e=smoothings)
def test_at_the_reference(B, beta, e):
    """At the reference the loss is log 2 and the gradient -+(1 - 2e) beta/(2B), which is not zero."""
    logps = np.linspace(-9, -1, 2 * B)
    w, l = logps[:B], logps[B:]
    close(losses.dpo_loss(w, l, w, l, beta, e).loss.item(), math.log(2))
    gradient_w, gradient_l = losses.dpo_gradient(w, l, w, l, beta, e)
    close(gradient_w, np.full(B, -(1 - 2 * e) * beta / (2 * B)), atol=1e-15)
    close(gradient_l, -gradient_w)


@given(logps=four_logps, shift=st.floats(-9, 9))
def test_a_constant_on_both_references_cancels(logps, shift):
    """A constant on both reference log-probabilities does not change DPO: Z(x), which nobody can compute, cancels."""
    w, l, ref_w, ref_l = logps
    close(losses.dpo_loss(w, l, ref_w + shift, ref_l + shift).loss.item(), losses.dpo_loss(*logps).loss.item())


@given(logps=four_logps, beta=betas, e=smoothings)
def test_swapped_labels(logps, beta, e):
    """Swapped labels give L(-z) - L(z) = (1 - 2e) z: label smoothing is the expected loss under flips."""
    w, l, ref_w, ref_l = logps
    straight = losses.dpo_loss(w, l, ref_w, ref_l, beta, e)
    swapped = losses.dpo_loss(l, w, ref_l, ref_w, beta, e)
    z = beta * straight.margin.data
    close(swapped.loss.item() - straight.loss.item(), (1 - 2 * e) * z.mean(), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("ratio", [1e4, -1e4])
def test_far_log_ratios_are_finite_and_exact(ratio, dtype):
    """Loss and gradient are exact at log-ratios of 1e4; otherwise one hopeless pair would make a batch's loss inf."""
    w, zero = np.array([ratio], dtype=dtype), np.zeros(1, dtype=dtype)
    leaf = Tensor(w, requires_grad=True)
    out = losses.dpo_loss(leaf, zero, zero, zero, beta=1.0)
    out.loss.backward()
    assert out.loss.dtype == dtype and leaf.grad.dtype == dtype
    assert (out.loss.item(), leaf.grad[0]) == ((0, 0) if ratio > 0 else (1e4, -1))
    closed = losses.dpo_gradient(w, zero, zero, zero, beta=1.0)[0]
    assert closed.dtype == dtype and closed[0] == leaf.grad[0]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ratio", [1e4, -1e4])
def test_every_loss_is_exact_far_out(kind, ratio):
    """At log-ratios of 1e4 a softplus is 0 or linear, a square is a square, and every loss has its limit's value."""
    w, zero, e = np.array([ratio]), np.zeros(1), 0.25
    loss, gradient = routes(kind, zero, zero, 0.5, e)
    z = ratio / 2
    logistic = ((1 - e) * max(0, -z) + e * max(0, z), -0.5 * ((ratio < 0) - e))
    expected = {"ipo": ((ratio - 1) ** 2, 2 * (ratio - 1))}.get(kind, logistic)
    leaf = Tensor(w, requires_grad=True)
    out = loss(leaf, zero)
    out.loss.backward()
    close([out.loss.item(), leaf.grad[0], gradient(w, zero)[0][0]], [expected[0], expected[1], expected[1]], rtol=1e-12)


soft = st.integers(1, 4).flatmap(
    lambda B: st.tuples(
        *[hnp.arrays(float, B, elements=st.floats(-50, 0))] * 4,
        hnp.arrays(float, B, elements=st.floats(0, 1)),
        hnp.arrays(float, B, elements=st.floats(0.1, 9)),
    )
)


@given(data=soft, beta=betas)
def test_soft_labels_are_the_expected_loss(data, beta):
    """-sum n [p log sigma(z) + (1 - p) log sigma(-z)]/sum n, one pair at a time in plain Python."""
    *logps, p, n = data
    z = [beta * ((w - a) - (l - b)) for w, l, a, b in zip(*logps)]
    log_sigma = [lambda x: -math.log1p(math.exp(-x)) if x > 0 else x - math.log1p(math.exp(x))][0]
    total = -sum(n * (p * log_sigma(z) + (1 - p) * log_sigma(-z)) for n, p, z in zip(n, p, z)) / n.sum()
    close(losses.dpo_loss(*logps, beta, probability=p, weight=n).loss.item(), total, rtol=1e-12, atol=1e-14)


@given(data=soft, beta=betas, seed=st.integers(0, 99))
def test_gradient_of_soft_labels_four_ways(data, beta, seed):
    """Autograd, closed form, central difference and complex step agree on soft labels and counts."""
    w, l, ref_w, ref_l, p, n = data

    def loss(params):
        return losses.dpo_loss(params["w"], params["l"], ref_w, ref_l, beta, probability=p, weight=n).loss

    leaves = {"w": Tensor(w, requires_grad=True), "l": Tensor(l, requires_grad=True)}
    loss(leaves).backward()
    closed = losses.dpo_gradient(w, l, ref_w, ref_l, beta, probability=p, weight=n)
    for leaf, gradient in zip(leaves.values(), closed):
        close(leaf.grad, gradient, rtol=1e-12, atol=1e-15)
    for method, bound in (("central", 1e-6), ("complex", 1e-12)):
        assert gradcheck.check_gradient(loss, leaves, np.random.default_rng(seed), 5, method=method) < bound


@given(logps=four_logps, beta=betas)
def test_certain_labels_are_the_plain_loss_bit_for_bit(logps, beta):
    """p = 1 and a count of 1 change neither the loss nor its gradient in any bit."""
    ones, results = np.ones(len(logps[0])), []
    for options in ({}, {"probability": ones}, {"weight": ones}, {"probability": ones, "weight": ones}):
        leaves = [Tensor(x, requires_grad=True) for x in logps]
        out = losses.dpo_loss(*leaves, beta, **options)
        out.loss.backward()
        closed = losses.dpo_gradient(*logps, beta, **options)
        results.append([out.loss.item(), *[leaf.grad.tolist() for leaf in leaves], *[g.tolist() for g in closed]])
    assert all(result == results[0] for result in results)


@given(logps=four_logps, beta=betas, e=smoothings)
def test_label_smoothing_is_a_soft_label(logps, beta, e):
    """label_smoothing e is probability 1 - e for every pair."""
    p = np.full(len(logps[0]), 1 - e)
    smoothed = losses.dpo_loss(*logps, beta, label_smoothing=e).loss.item()
    close(smoothed, losses.dpo_loss(*logps, beta, probability=p).loss.item(), rtol=1e-14)
    close(losses.dpo_gradient(*logps, beta, e), losses.dpo_gradient(*logps, beta, probability=p), rtol=1e-14)


@given(logps=four_logps, beta=betas, wins=st.integers(0, 9), defeats=st.integers(1, 9))
def test_a_count_is_that_many_rows(logps, beta, wins, defeats):
    """Seven rows and three flipped ones are one row with p = 0.7 and a weight of ten."""
    w, l, ref_w, ref_l = (x[:1] for x in logps)
    rows = [(w, l, ref_w, ref_l)] * wins + [(l, w, ref_l, ref_w)] * defeats
    repeated = losses.dpo_loss(*map(np.concatenate, zip(*rows)), beta).loss.item()
    count = wins + defeats
    soft = losses.dpo_loss(w, l, ref_w, ref_l, beta, probability=[wins / count], weight=[count]).loss.item()
    close(soft, repeated, rtol=1e-12)


@pytest.mark.parametrize("z", [40.0, -40.0, 700.0])
@pytest.mark.parametrize("p", [0.0, 0.3, 1.0])
def test_soft_labels_lose_nothing_far_out(z, p):
    """At z = 40 a certain label leaves a loss and a gradient of 4e-18, not 0; at 700, of 1e-304."""
    leaf = Tensor(np.array([z]), requires_grad=True)
    out = losses.dpo_loss(leaf, np.zeros(1), np.zeros(1), np.zeros(1), beta=1.0, probability=[p])
    out.loss.backward()
    small, large = math.exp(-abs(z)), abs(z)  # -log sigma(|z|) and -log sigma(-|z|), to 1e-17
    certain, wrong = (p, 1 - p) if z > 0 else (1 - p, p)
    close(out.loss.item(), certain * small + wrong * (large + small), rtol=1e-12)
    gradient = -(p * (small if z > 0 else 1) - (1 - p) * (1 if z > 0 else small))
    close([leaf.grad[0], losses.dpo_gradient(z, 0.0, 0.0, 0.0, 1.0, probability=p)[0]], gradient, rtol=1e-12)


@given(p=st.floats(0.01, 0.99), beta=betas)
def test_the_gradient_vanishes_at_the_log_odds(p, beta):
    """A soft label asks for z = logit p and no more."""
    z = math.log(p / (1 - p))
    close(losses.dpo_gradient(z / beta, 0.0, 0.0, 0.0, beta, probability=p), 0, atol=1e-14)


def test_a_certain_label_is_finite_beside_an_impossible_response():
    """A term of weight 0 is left out, even where its log is -inf."""
    four = (np.array([-1.0, -2.0]), np.array([-math.inf, -2.0]), np.full(2, -1.0), np.full(2, -1.0))
    loss = losses.dpo_loss(*four, probability=[1.0, 0.5], weight=[2.0, 1.0]).loss.item()
    close(loss, math.log(2) / 3)
    assert np.isfinite(losses.dpo_gradient(*four, probability=[1.0, 0.5])).all()


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"probability": [0.5, 1.1]}, "between 0 and 1"),
        ({"probability": [0.5]}, r"probability needs one number for each pair, \(2,\), not \(1,\)"),
        ({"probability": [0.5, math.nan]}, "between 0 and 1"),
        ({"weight": [1.0, -1.0]}, "finite and at least 0"),
        ({"weight": [0.0, 0.0]}, "at least one positive"),
        ({"weight": 2.0}, r"weight needs one number for each pair, \(2,\), not \(\)"),
        ({"label_smoothing": 0.1, "probability": [0.5, 0.5]}, "give only one"),
    ],
)
@pytest.mark.parametrize("function", [losses.dpo_loss, losses.dpo_gradient])
def test_wrong_labels_are_refused(function, options, sentence):
    """A probability outside [0, 1], a negative count or another shape is an error with a sentence."""
    with pytest.raises(ValueError, match=sentence):
        function(*[np.ones(2)] * 4, **options)


def test_the_registry_holds_every_loss_with_its_gradient():
    """`LOSSES` has every loss of losses.py and family.py, each with `.gradient`; a choice passes on what it takes."""
    functions = {name: of for of in (family, losses) for name in vars(of) if name.endswith("_loss")}
    assert set(losses.LOSSES) == {name.removesuffix("_loss") for name in functions} - {"pair"}
    for name, loss in losses.LOSSES.items():
        of = functions[f"{name}_loss"]
        assert loss is getattr(of, f"{name}_loss") and loss.gradient is getattr(of, f"{name}_gradient")
    four = (-10.0, -15.0, -12.0, -14.0)
    smoothed = losses.Choice("dpo", {"label_smoothing": 0.2})(*four, 0.3).loss.item()
    assert smoothed == losses.dpo_loss(*four, 0.3, 0.2).loss.item()
    assert (
        losses.Choice("reference_free")(*four, 0.3).loss.item()
        == losses.reference_free_loss(-10.0, -15.0, 0.3).loss.item()
    )
    assert losses.Choice("ipo")(*four, 0.3).loss.item() == losses.ipo_loss(*four, 0.3).loss.item()
    with pytest.raises(ValueError, match="there is no loss 'dppo': choose from dpo, ipo, reference_free, hinge"):
        losses.Choice("dppo")
    for name, option in (("ipo", "label_smoothing"), ("dpo", "weight"), ("dpo", "probability"), ("dpo", "beta")):
        with pytest.raises(ValueError, match=f"the loss {name} has no option {option}"):
            losses.Choice(name, {option: 0.1})


def test_the_gradient_of_ipo_takes_numbers():
    """One pair may be four numbers."""
    assert losses.ipo_gradient(-10.0, -15.0, -12.0, -14.0, 0.5) == (4.0, -4.0)


def test_an_impossible_rejected_response_costs_nothing():
    """A pair whose rejected response is impossible has loss 0, not nan from 0 * -inf."""
    assert losses.dpo_loss(-1.0, -math.inf, -1.0, -1.0).loss.item() == 0


def test_numpy_scalars_do_not_widen_the_loss():
    """float32 in, float32 out, even if beta is a NumPy scalar, as from np.linspace."""
    four = [np.zeros(2, dtype="float32")] * 4
    assert losses.dpo_loss(*four, beta=np.float64(0.1), label_smoothing=np.float64(0.1)).loss.dtype == "float32"
    assert losses.dpo_gradient(*four, beta=np.float64(0.1))[0].dtype == "float32"
    assert (
        ops.layer_norm(np.ones((1, 2), "float32"), *np.ones((2, 2), "float32"), eps=np.float64(1e-5)).dtype == "float32"
    )


def test_the_closed_form_takes_no_tensor():
    """A closed-form gradient refuses Tensors, since it builds no graph, and says to pass `.data`."""
    for gradient, count in ((losses.dpo_gradient, 4), (losses.ipo_gradient, 4), (losses.reference_free_gradient, 2)):
        with pytest.raises(TypeError, match=r"pass the \.data"):
            gradient(*[1.0] * (count - 1), Tensor(1.0))


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ((np.ones(2), np.ones(2), np.ones(2), np.ones((2, 1))), r"one shape, not \(2,\), \(2,\), \(2,\), \(2, 1\)"),
        ((np.ones((2, 3)),) * 4, r"\(B,\), not \(2, 3\): sum over the tokens first"),
        (([-1.0, -2.0], [-3.0, -4.0], 0.0, 0.0), r"one shape, not \(2,\), \(2,\), \(\), \(\)"),
        ((1.0, 1.0, 1.0, 1.0, 0.0), "beta must be positive and finite, not 0.0"),
        ((1.0, 1.0, 1.0, 1.0, math.nan), "beta must be positive and finite, not nan"),
        ((1.0, 1.0, 1.0, 1.0, math.inf), "beta must be positive and finite, not inf"),
        ((np.ones(0),) * 4, "there is no pair"),
        ((1.0, 1.0, 1.0, 1.0, 0.1, 0.6), "at most 0.5, not 0.6"),
    ],
)
@pytest.mark.parametrize("function", [losses.dpo_loss, losses.dpo_gradient])
def test_wrong_arguments_are_refused(function, arguments, sentence):
    """Wrong shapes, betas and smoothing are refused; (B,) and (B, 1) would compare every pair with every other."""
    with pytest.raises(ValueError, match=sentence):
        function(*arguments)


@pytest.mark.parametrize(
    ("function", "arguments", "sentence"),
    [
        (losses.ipo_loss, (1.0, 1.0, 1.0, 1.0, 0.0), "beta must be positive"),
        (losses.ipo_gradient, (np.ones(2), np.ones(2), np.ones(2), np.ones(1)), "4 log-probabilities"),
        (losses.reference_free_loss, (np.ones(2), np.ones((2, 1))), r"the 4 log-probabilities must have one shape"),
        (losses.reference_free_gradient, (1.0, 1.0, 0.1, 0.7), "at most 0.5"),
    ],
)
def test_the_other_losses_refuse_the_same(function, arguments, sentence):
    """The other losses and their gradients refuse what `dpo_loss` refuses."""
    with pytest.raises(ValueError, match=sentence):
        function(*arguments)
