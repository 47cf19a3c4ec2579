"""Every loss of `LOSSES`: four routes to its gradient, and what its docstring says of it.

Inputs are drawn by name from each signature, so a new loss is tested from the moment it is registered.
"""

import inspect
import itertools
import math
import re

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from minidpo import Tensor, family, gradcheck
from minidpo.losses import LOSSES
from minidpo.verify.cases import POLICY, RandomDraw, loss_arguments

close = np.testing.assert_allclose
every_loss = pytest.mark.parametrize("name", list(LOSSES))
PAIRS = [name for name in LOSSES if "logp_w" in inspect.signature(LOSSES[name]).parameters]
every_pair_loss = pytest.mark.parametrize("name", PAIRS)


def kinks(name, x):
    """The numbers that are 0 where a loss has no derivative."""
    if name == "hinge":
        return 1 - x["beta"] * margin(x)
    if name == "dpop":
        return x["logp_w"] - x["ref_logp_w"]
    if name == "aot":
        return np.diff(np.sort(x["logp_w"] - x["logp_l"]))
    if name == "aot_unpaired":
        return np.concatenate([np.diff(np.sort(x[f"logp_{y}"] - x[f"ref_logp_{y}"])) for y in "wl"])
    return np.ones(1)


def margin(x):
    return (x["logp_w"] - x["ref_logp_w"]) - (x["logp_l"] - x["ref_logp_l"])


@st.composite
def arguments(draw, name, low=-20.0):
    """Arguments for a loss by their names; log-probabilities lie between `low` and -0.01."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))  # no two entries are equal
    return loss_arguments(RandomDraw(rng), LOSSES[name], low)


def of_policy(x):
    return {each: x[each] for each in POLICY if each in x}


def loss_at(name, x, **changes):
    return float(LOSSES[name](**{**x, **changes}).loss.data)


def swept(name, x):
    """The gradients by the sweep, by name."""
    leaves = {each: Tensor(logp, requires_grad=True) for each, logp in of_policy(x).items()}
    LOSSES[name](**{**x, **leaves}).loss.backward()
    return [0 * leaf.data if leaf.grad is None else leaf.grad for leaf in leaves.values()]


@every_loss
@given(data=st.data(), seed=st.integers(0, 99))
def test_gradient_four_ways(name, data, seed):
    """Autograd, closed form, central difference and complex step agree, but at a kink."""
    x = data.draw(arguments(name))
    assume((abs(kinks(name, x)) > 1e-3).all())
    closed = LOSSES[name].gradient(**x)
    scale = 1 + max(abs(gradient).max() for gradient in closed)
    for mine, gradient in zip(swept(name, x), closed, strict=True):
        close(mine, gradient, rtol=1e-11, atol=1e-14 * scale)
    leaves = {each: Tensor(logp, requires_grad=True) for each, logp in of_policy(x).items()}
    f = lambda params: LOSSES[name](**{**x, **params}).loss  # noqa: E731
    for method, bound in (("central", 1e-6), ("complex", 1e-11)):
        assert gradcheck.check_gradient(f, leaves, np.random.default_rng(seed), 5, method=method) < bound


# ---- the formulas once more, as their papers have them, in 80-bit floats ------------------------------------

WIDE = np.finfo(np.longdouble).maxexp > 10_000  # e^10000 is a number
softplus = lambda x: np.logaddexp(np.longdouble(0), x)  # noqa: E731  # -log sigma(-x)
sig = lambda x: np.exp(-softplus(-x))  # noqa: E731
entropy_free = lambda p, q: np.where(p == 0, 0, p * (np.log(np.where(p == 0, 1, p)) - math.log(q)))  # noqa: E731


def odds(p):
    return p - np.log(-np.expm1(p))


def ranking(r):
    return sum(np.log(np.exp(r[:, k:] - r[:, k : k + 1]).sum(axis=1)) for k in range(r.shape[1] - 1))


def logistic(x, e=0.0):
    return (1 - e) * softplus(-x) + e * softplus(x)


def mixture(z, tau):
    m = sig(z / tau)
    return (1 - m) * softplus(-z) + np.exp(-softplus(-z / tau) - z)  # m itself is 0 in 80 bits far out


def power(u, a):
    return (1 - u**-a) / a


PAPER = {  # the pairs' own losses
    "dpo": lambda x: logistic(x.z, x.label_smoothing),
    "ipo": lambda x: (x.h_w - x.h_l - 1 / (2 * x.beta)) ** 2,
    "reference_free": lambda x: logistic(x.beta * (x.logp_w - x.logp_l), x.label_smoothing),
    "hinge": lambda x: np.maximum(0, 1 - x.z),
    "robust": lambda x: (logistic(x.z) * (1 - x.e) - x.e * logistic(-x.z)) / (1 - 2 * x.e),
    "exo_pair": lambda x: entropy_free(sig(x.z), 1 - x.e) + entropy_free(sig(-x.z), x.e),
    "discopop": lambda x: mixture(x.z, x.tau),
    "odpo": lambda x: logistic(x.z - x.offset),
    "r_dpo": lambda x: logistic(x.z + x.alpha * x.length_w - x.alpha * x.length_l),
    "nca_pair": lambda x: logistic(x.r_w) + (logistic(-x.r_w) + logistic(-x.r_l)) / 2,
    "bco_pair": lambda x: logistic(x.r_w - x.delta) + logistic(-(x.r_l - x.delta)),
    "apo_zero": lambda x: -sig(x.r_w) + sig(x.r_l),
    "apo_down": lambda x: sig(x.r_w) - sig(x.r_w - x.r_l),
    "sppo_hard": lambda x: (x.h_w - 0.5 / x.beta) ** 2 + (x.h_l + 0.5 / x.beta) ** 2,
    "dpop": lambda x: logistic(x.beta * (x.h_w - x.h_l - x.penalty * np.maximum(0, x.ref_logp_w - x.logp_w))),
    "alpha_divergence": lambda x: logistic(x.beta * (power(np.exp(x.h_w), x.alpha) - power(np.exp(x.h_l), x.alpha))),
    "js_divergence": lambda x: logistic(x.beta * (-softplus(-x.h_w) + softplus(-x.h_l))),
    "sigmoid_norm": lambda x: logistic(x.beta * (x.h_w / x.length_w - x.h_l / x.length_l)),
    "dpo_nll": lambda x: logistic(x.z) - x.nll_weight * x.logp_w / x.length_w,
    "simpo": lambda x: logistic(x.beta / x.length_w * x.logp_w - x.beta / x.length_l * x.logp_l - x.gamma),
    "alphapo": lambda x: logistic(
        x.beta * power(np.exp(x.logp_w / x.length_w), x.alpha)
        - x.beta * power(np.exp(x.logp_l / x.length_l), x.alpha)
        - x.gamma
    ),
    "cpo": lambda x: logistic(x.beta * x.logp_w - x.beta * x.logp_l) - x.nll_weight * x.logp_w,
    "orpo": lambda x: (
        -x.logp_w / x.length_w + x.beta * logistic(odds(x.logp_w / x.length_w) - odds(x.logp_l / x.length_l))
    ),
    "unlikelihood": lambda x: -x.logp_w + x.alpha * x.logp_l,
    "sft": lambda x: -x.logp_w,
    "aot": lambda x: logistic(
        x.beta * (np.sort(x.logp_w - x.logp_l) - np.sort(x.ref_logp_w - x.ref_logp_l)), x.label_smoothing
    ),
    "aot_unpaired": lambda x: logistic(x.beta * (np.sort(x.h_w) - np.sort(x.h_l)), x.label_smoothing),
    "kto": lambda x: (
        np.where(x.desirable, x.weight_desirable, x.weight_undesirable)
        * (1 - sig(x.beta * np.where(x.desirable, 1, -1) * (x.logp - x.ref_logp - x.reference_point)))
    ),
    "bco": lambda x: (
        logistic(np.where(x.desirable, 1, -1) * (x.beta * (x.logp - x.ref_logp) - x.delta))
        / np.where(x.desirable, np.mean(x.desirable), np.mean(~x.desirable))
    ),
    "plackett_luce": lambda x: ranking(x.beta * (x.logp - x.ref_logp)),
}


def paper(name, arguments):
    """A loss of PAPER, a mean over the batch."""
    x = type("Pairs", (), {"label_smoothing": 0.0, "e": arguments.get("label_smoothing", 0.0)})()
    for each, value in arguments.items():
        setattr(x, each, value.astype(np.longdouble) if "logp" in each else value)
    for y in "wl":
        if f"ref_logp_{y}" in arguments:
            setattr(x, f"h_{y}", getattr(x, f"logp_{y}") - getattr(x, f"ref_logp_{y}"))
            setattr(x, f"r_{y}", arguments.get("beta", 0.1) * getattr(x, f"h_{y}"))
    if hasattr(x, "r_w"):
        x.z = x.r_w - x.r_l
    with np.errstate(all="ignore"):
        return np.mean(PAPER[name](x))


@every_loss
@given(data=st.data())
def test_every_loss_is_the_paper_s(name, data):
    """A loss is its paper's formula, written once more without the care that a float needs."""
    x = data.draw(arguments(name))
    close(loss_at(name, x), float(paper(name, x)), rtol=1e-10, atol=1e-12)


FAR = st.sampled_from([-1e4, -700.0, -90.0, -30.0, -1.0, -1e-3])


@pytest.mark.skipif(not WIDE, reason="long double is no wider than double here")
@every_loss
@given(data=st.data(), far=st.tuples(*[FAR] * 4))
def test_far_out_every_loss_is_finite_and_exact(name, data, far):
    """Loss and gradient are exact wherever their true value is a float, at log-ratios up to 1e4."""
    x = data.draw(arguments(name))
    columns = [each for each in x if "logp" in each]
    for each, value in zip(columns, far):
        x[each] = np.full_like(x[each], value) if name != "plackett_luce" else x[each] * abs(value) / 20
    assume(name not in ("hinge", "dpop") or (abs(kinks(name, x)) > 1e-3).all())
    true = float(paper(name, x))
    with np.errstate(over="ignore"):
        assume(abs(true) < 1e300)
        close(loss_at(name, x), true, rtol=1e-9, atol=1e-12)
        closed = LOSSES[name].gradient(**x)
        for mine, gradient in zip(swept(name, x), closed, strict=True):
            close(mine, gradient, rtol=1e-9, atol=1e-14)
    for each, gradient in zip(of_policy(x), closed):
        if name.startswith("aot") or name == "orpo":
            continue  # equal entries are a kink; near P = 1 the curvature is that of a pole
        step = np.longdouble(2.0**-12)
        up, down = (float(paper(name, {**x, each: x[each].astype(np.longdouble) + s * step})) for s in (1, -1))
        slope = (up - down) / float(2 * step)
        bend = abs(up - 2 * true + down) / max(abs(up - down), 1e-300)
        if not np.isfinite(gradient).all():
            assert gradient.sum() == slope  # a true slope that no float holds
        elif math.isfinite(slope) and not (name in ("alphapo", "alpha_divergence") and bend > 1e-2):
            # where two large powers cancel, the loss bends too much within the step
            close(gradient.sum(), slope, rtol=1e-3, atol=1e-6 * (1 + abs(true)))


@pytest.mark.parametrize(
    ("h_w", "h_l", "loss", "slope"),  # at beta 0.1 and alpha 1, as natural logarithms: loss, and -dL/dh_w = dL/dh_l
    [
        (-1e4, -1e4, math.log(math.log(2)), 1e4 + math.log(0.1 / 2)),
        (-5e3, -1e4, -math.inf, -math.inf),
        (-711.0, -700.0, 711 + math.log(0.1) + math.log1p(-math.exp(-11)), None),
        (-715.0, -700.0, 715 + math.log(0.1), None),
    ],
)
def test_alpha_divergence_is_infinite_only_where_its_value_is(h_w, h_l, loss, slope):
    """Powers too large for a float cancel, or leave a loss of 0; only a loss or a slope above 1.8e308 is infinite."""
    with np.errstate(over="ignore"):
        x = dict(zip(("logp_w", "logp_l", "ref_logp_w", "ref_logp_l"), np.array([[h_w], [h_l], [0.0], [0.0]])))
        x |= {"beta": 0.1, "alpha": 1.0}
        close(loss_at("alpha_divergence", x), np.exp(loss), rtol=1e-9)
        closed = LOSSES["alpha_divergence"].gradient(**x)
        close(np.ravel(swept("alpha_divergence", x)), np.ravel(closed), rtol=1e-9)
        if slope is not None:
            close(np.ravel(closed), [-np.exp(slope), np.exp(slope)])


# ---- what the docstrings say --------------------------------------------------------------------------------

THREE = {"length_w": np.array([3, 5, 9]), "length_l": np.array([4, 2, 6]), "offset": np.array([0.5, -0.2, 1.0])}


def three_pairs(name, h_w=0.0, h_l=0.0, **changes):
    """Three pairs with these log-ratios, or log-probabilities where there is no reference."""
    taken = inspect.signature(LOSSES[name]).parameters
    x = {"ref_logp_w": np.full(3, -9.0), "ref_logp_l": np.full(3, -7.0)} if "ref_logp_w" in taken else {}
    for y, h in (("w", h_w), ("l", h_l)):
        x[f"logp_{y}"] = np.asarray(h, dtype=float) * np.ones(3) + x.get(f"ref_logp_{y}", 0.0)
    return {**x, **{each: value for each, value in {**THREE, **changes}.items() if each in taken}}


INFIMUM = {"apo_zero": -1.0, "apo_down": -1.0, "nca_pair": math.log(27 / 4) / 2}
UNBOUNDED = {"robust", "unlikelihood"}


@every_loss
@given(data=st.data())
def test_no_loss_is_below_its_infimum(name, data):
    """Log-probabilities of at most 0 leave every loss at or above its infimum, except two that have none."""
    x = data.draw(arguments(name, low=-400.0))
    assert name in UNBOUNDED or loss_at(name, x) >= INFIMUM.get(name, 0.0) - 1e-12


STATIONARY = {
    "ipo": {"h_w": 2.0, "h_l": -3.0, "beta": 0.1},
    "hinge": {"h_w": 20.0, "h_l": -3.0, "beta": 0.1},
    "exo_pair": {"h_w": math.log(9), "h_l": 0.0, "beta": 1.0, "label_smoothing": 0.1},
    "sppo_hard": {"h_w": 5.0, "h_l": -5.0, "beta": 0.1},
    "nca_pair": {"h_w": math.log(2), "h_l": -1e4, "beta": 1.0},
    "aot": {"h_w": math.log(9) + THREE["offset"], "h_l": THREE["offset"], "beta": 1.0, "label_smoothing": 0.1},
    "aot_unpaired": {"h_w": math.log(9) + THREE["offset"], "h_l": THREE["offset"], "beta": 1.0, "label_smoothing": 0.1},
}


@every_pair_loss
def test_stationary_points_are_those_of_the_docstring(name):
    """A docstring names a stationary point if and only if there is one, and the gradient vanishes there."""
    point = re.search(r"Stationary: (?!nowhere)(.*?)[.;]", LOSSES[name].__doc__)
    assert (point is not None) == (name in STATIONARY or name in ("dpo", "discopop"))
    if name in STATIONARY:
        close(LOSSES[name].gradient(**three_pairs(name, **STATIONARY[name])), 0, atol=1e-14)


def test_discopop_has_a_minimum_and_a_maximum():
    """At its default tau the slope of discopop changes sign at z = -0.119 and 0.072, and nowhere else."""
    z = np.linspace(-30, 30, 600_001)
    zero = np.zeros_like(z)
    sign = np.sign(LOSSES["discopop"].gradient(z, zero, zero, zero, beta=1.0)[0])
    changes = np.flatnonzero(np.diff(sign))
    close(z[changes], [-0.119, 0.072], atol=5e-4)
    assert [sign[i] for i in changes] == [-1, 1]  # falls to the minimum, rises to the maximum


NEAR = {"nca_pair": STATIONARY["nca_pair"], "apo_down": {"h_w": -5e3, "h_l": -1e4, "beta": 1.0}}
NEAR |= {name: STATIONARY[name] for name in ("ipo", "exo_pair", "sppo_hard")}


@every_pair_loss
def test_the_infimum_is_the_greatest_lower_bound(name):
    """Every loss comes as near to its infimum as a float can; the two without one fall below -100."""
    free = "ref_logp_w" not in inspect.signature(LOSSES[name]).parameters
    best = NEAR.get(name, {"h_w": -1e-8 if free else 8.99 if name == "dpo_nll" else 1e4})  # logp_w is at most 0
    x = three_pairs(name, **{"h_l": -1e4, **best})
    words = re.search(r"[Ii]nfimum: (\S+?)[,.;]? ", LOSSES[name].__doc__.replace("\n", " "))
    if name in UNBOUNDED:
        assert loss_at(name, x) < -100 and words.group(1) == "none"
    else:
        with np.errstate(over="ignore"):  # of rewards: an alpha-divergence has no lowest one
            close(loss_at(name, x), INFIMUM.get(name, 0.0), atol=1e-2)
        assert words is None or eval(words.group(1), {"log": math.log}) == INFIMUM.get(name, 0.0)


AT_REFERENCE = {  # at policy = reference, beta = 0.5: the loss, and beta times these are dL/dh_w and dL/dh_l of a pair
    "dpo": (math.log(2), -0.5, 0.5), "ipo": (1.0, -4.0, 4.0), "hinge": (1.0, -1.0, 1.0),
    "robust": (math.log(2), -0.625, 0.625),
    "discopop": ((math.log(2) + 1) / 2, 4.25 - 5 * math.log(2), 5 * math.log(2) - 4.25),
    "nca_pair": (2 * math.log(2), -0.25, 0.25), "bco_pair": (2 * math.log(2), -0.5, 0.5),
    "apo_zero": (0.0, -0.25, 0.25), "apo_down": (0.0, 0.0, 0.25), "sppo_hard": (2.0, -4.0, 4.0),
    "dpop": (math.log(2), -0.5, 0.5), "alpha_divergence": (math.log(2), -0.5, 0.5),
    "js_divergence": (math.log(2), -0.25, 0.25), "aot": (math.log(2), -0.5, 0.5),
    "aot_unpaired": (math.log(2), -0.5, 0.5),
    "exo_pair": (math.log(0.5) - math.log(0.001 * 0.999) / 2, -math.log(999) / 4, math.log(999) / 4),
}  # fmt: skip


@pytest.mark.parametrize("name", list(AT_REFERENCE))
def test_at_the_reference(name):
    """Where the policy is the reference, every loss has the value and the slopes worked out by hand."""
    loss, slope_w, slope_l = AT_REFERENCE[name]
    x = three_pairs(name, beta=0.5)
    assert loss_at(name, x) == pytest.approx(loss, abs=1e-12)
    for gradient, slope in zip(LOSSES[name].gradient(**x), (slope_w, slope_l)):
        close(gradient, 0.5 * slope / 3, rtol=1e-6, atol=1e-15)


@every_pair_loss
def test_correct_labels_cost_less_than_swapped_ones(name):
    """Where the chosen response is likelier and the rejected one less likely, swapped labels cost more."""
    x = three_pairs(name, -1.0, -7.0, beta=0.5, length_l=THREE["length_w"], offset=np.zeros(3))
    swap = {each: f"{each[:-1]}{'wl'[each.endswith('w')]}" for each in x if each[-2:] in ("_w", "_l")}
    swapped = {**x, **{each: x.get(other, x[each]) for each, other in swap.items()}}
    assert loss_at(name, swapped) > loss_at(name, x) + 0.1


REWARDS = {  # implicit rewards that are not beta h, of log-ratios or log-probabilities h and lengths n
    "sigmoid_norm": lambda h, n: 0.5 * h / n,
    "simpo": lambda h, n: 0.5 * h / n,
    "orpo": lambda h, n: 0.5 * h / n,
    "alphapo": lambda h, n: 0.5 * (1 - np.exp(h / n) ** -0.25) / 0.25,
    "alpha_divergence": lambda h, n: 0.5 * (1 - np.exp(h) ** -0.5) / 0.5,
    "js_divergence": lambda h, n: 0.5 * np.log(2 * np.exp(h) / (1 + np.exp(h))),
    "unlikelihood": lambda h, n: h,  # these two have no beta
    "sft": lambda h, n: h,
}


@every_pair_loss
def test_rewards_are_those_of_the_paper(name):
    """The rewards are what the loss compares: per token where it takes means, f' of an f-divergence, else beta h."""
    h_w, h_l = np.array([-0.3, -0.9, -0.5]), np.array([-1.2, -0.7, -1.9])
    out = LOSSES[name](**three_pairs(name, h_w, h_l, beta=0.5))
    reward = REWARDS.get(name, lambda h, n: 0.5 * h)
    r_w, r_l = reward(h_w, THREE["length_w"]), reward(h_l, THREE["length_l"])
    close(out.reward_w.data, r_w)
    close(out.reward_l.data, r_l)
    if name in ("dpo", "sigmoid_norm", "simpo", "alphapo", "alpha_divergence", "js_divergence"):
        gamma = 1.0 if name in ("simpo", "alphapo") else 0.0
        close(out.loss.item(), np.log1p(np.exp(gamma - (r_w - r_l))).mean())


@pytest.mark.parametrize(("name", "h_w", "slope"), [("hinge", 2.0, 0.0), ("dpop", 0.0, -0.25 / 3)])
def test_at_a_kink_the_flatter_side_counts(name, h_w, slope):
    """At its kink a loss has the slope of the flatter side, by the sweep and in closed form."""
    x = three_pairs(name, h_w, 0.0, beta=0.5)
    close(swept(name, x)[0], slope, atol=1e-15)
    close(LOSSES[name].gradient(**x)[0], slope, atol=1e-15)


@given(data=st.data())
def test_robust_is_unbiased(data):
    """The mean of the robust loss over labels that are flipped with probability e is the loss on the true labels."""
    x = data.draw(arguments("robust"))
    e, w, l = x["label_smoothing"], *[[x[f"{ref}logp_{y}"] for ref in ("", "ref_")] for y in "wl"]
    straight, flipped = (
        LOSSES["robust"](a[0], b[0], a[1], b[1], x["beta"], e).loss.item() for a, b in ((w, l), (l, w))
    )
    true = LOSSES["dpo"](w[0], l[0], w[1], l[1], x["beta"]).loss.item()
    close((1 - e) * straight + e * flipped, true, rtol=1e-9, atol=1e-9)


SHIFT_INVARIANT = {"dpo", "ipo", "reference_free", "hinge", "robust", "exo_pair", "discopop", "odpo", "r_dpo"}
SHIFT_INVARIANT |= {"aot", "aot_unpaired", "unlikelihood"}  # the last at alpha = 1


@every_pair_loss
def test_what_sees_only_the_gap(name):
    """A constant on both log-probabilities of the policy leaves alone the functions of the margin, and only these."""
    x = three_pairs(name, np.array([-0.3, -0.9, -0.5]), np.array([-1.2, -0.7, -1.9]), beta=0.5)
    shifted = {**x, **{each: x[each] - 0.2 for each in ("logp_w", "logp_l")}}
    assert (abs(loss_at(name, shifted) - loss_at(name, x)) < 1e-12) == (name in SHIFT_INVARIANT)


@every_loss
@given(data=st.data())
def test_float32_in_float32_out(name, data):
    """In float32 loss and gradients are float32, and those of float64 up to rounding."""
    x = data.draw(arguments(name))
    assume((abs(kinks(name, x)) > 1e-3).all())
    narrow = {each: value.astype("float32") if "logp" in each else value for each, value in x.items()}
    x |= {each: narrow[each].astype(float) for each in x if "logp" in each}
    loss = LOSSES[name](**narrow).loss
    assert loss.dtype == "float32"
    close(loss.data, loss_at(name, x), rtol=1e-3, atol=1e-3)
    for each, mine, gradient in zip(swept(name, narrow), LOSSES[name].gradient(**narrow), LOSSES[name].gradient(**x)):
        assert each.dtype == mine.dtype == "float32"
        close(each, gradient, rtol=2e-2, atol=1e-3)
        close(mine, gradient, rtol=2e-2, atol=1e-3)


# ---- how they are related -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options", "other"),
    [
        ("robust", {"label_smoothing": 0.0}, "dpo"),
        ("odpo", {"offset": np.zeros(3)}, "dpo"),
        ("r_dpo", {"alpha": 0.0}, "dpo"),
        ("dpo_nll", {"nll_weight": 0.0}, "dpo"),
        ("dpop", {"penalty": 0.0}, "dpo"),
        ("alpha_divergence", {"alpha": 1e-9}, "dpo"),
        ("sigmoid_norm", {"length_w": np.ones(3), "length_l": np.ones(3)}, "dpo"),
        ("cpo", {"nll_weight": 0.0}, "reference_free"),
        ("unlikelihood", {"alpha": 0.0}, "sft"),
        ("alphapo", {"alpha": 1e-9}, "simpo"),
    ],
)
def test_a_member_that_becomes_another(name, options, other):
    """With one option at its end, a loss is a simpler one."""
    h_w, h_l = np.array([-0.3, -0.9, -0.5]), np.array([-1.2, -0.7, -1.9])
    beta = {"beta": 0.5}
    close(
        loss_at(name, three_pairs(name, h_w, h_l, **beta, **options)),
        loss_at(other, three_pairs(other, h_w, h_l, **beta)),
    )


def test_alpha_1_is_the_forward_kl():
    """At alpha = 1 the score is f'(u) + 1 with f'(u) = -1/u, that of KL(pi_ref || pi)."""
    x = three_pairs("alpha_divergence", [-0.3, 0.9, 0.5], [1.2, -0.7, 1.9], alpha=1.0)
    z = 0.1 * (-np.exp([0.3, -0.9, -0.5]) + np.exp([-1.2, 0.7, -1.9]))
    close(loss_at("alpha_divergence", x), np.log1p(np.exp(-z)).mean())


def test_a_price_per_token_is_added_to_the_margin():
    """The optimum of E[r] - alpha |y| - beta KL has r_w - r_l = z + alpha (|y_w| - |y_l|), hence the plus."""
    rng = np.random.default_rng(0)
    ref, r, length, alpha, beta = rng.normal(size=5), rng.normal(size=5), np.arange(1, 6), 0.3, 0.5
    ref -= np.log(np.exp(ref).sum())
    best = ref + (r - alpha * length) / beta
    best -= np.log(np.exp(best).sum())
    w, l = np.array([0, 3, 1]), np.array([4, 2, 3])
    x = dict(length_w=length[w], length_l=length[l], beta=beta, alpha=alpha)
    loss = LOSSES["r_dpo"](best[w], best[l], ref[w], ref[l], **x).loss.item()
    close(loss, np.log1p(np.exp(-(r[w] - r[l]))).mean())


def test_a_ranking_of_two_is_dpo():
    """Plackett-Luce at two is DPO, in value and gradient, and over all orders its probabilities sum to 1."""
    x = three_pairs("dpo", [-0.3, 0.9, 0.5], [1.2, -0.7, 1.9])
    logp, ref = (np.stack([x[f"{ref}logp_w"], x[f"{ref}logp_l"]], axis=1) for ref in ("", "ref_"))
    close(loss_at("plackett_luce", {"logp": logp, "ref_logp": ref}), loss_at("dpo", x))
    close(LOSSES["plackett_luce"].gradient(logp, ref)[0].T, LOSSES["dpo"].gradient(**x))
    four = np.random.default_rng(0).normal(size=4)
    orders = np.array(list(itertools.permutations(four)))
    losses_of_orders = [loss_at("plackett_luce", {"logp": row[None], "ref_logp": 0 * row[None]}) for row in orders]
    close(np.exp(-np.array(losses_of_orders)).sum(), 1)


def test_bco_of_pairs_is_bco_pair():
    """With one desirable and one other response per pair, `bco` is `bco_pair`."""
    x = three_pairs("bco_pair", [-0.3, 0.9, 0.5], [1.2, -0.7, 1.9], delta=0.3)
    logp, ref = (np.concatenate([x[f"{ref}logp_w"], x[f"{ref}logp_l"]]) for ref in ("", "ref_"))
    labels = np.arange(6) < 3
    close(LOSSES["bco"](logp, ref, labels, 0.3).loss.item(), loss_at("bco_pair", x))


def test_kto_s_reference_point_is_not_the_kl():
    """By enumeration: over the reference's responses the mean is -KL(pi_ref || pi), so the point is 0; the KL is not.

    Over the policy's own responses the mean would be KL(pi || pi_ref). A batch of two, cut off at 0, is above its mean.
    """
    rng = np.random.default_rng(0)
    ref, logp = (x - np.log(np.exp(x).sum()) for x in rng.normal(size=(2, 5)))
    ratio, p_ref, p = logp - ref, np.exp(ref), np.exp(logp)
    kl, reverse = p @ ratio, -p_ref @ ratio
    assert kl > 0.1 and reverse > 0.1
    everything = np.repeat(np.arange(5), np.rint(1e6 * p_ref).astype(int))  # as often as the reference says it
    assert family.kto_reference_point(logp[everything], ref[everything]) == 0.0
    close(ratio[everything].mean(), -reverse, rtol=1e-3)
    of_two = sum(
        p_ref[a] * p_ref[b] * family.kto_reference_point(logp[[a, b]], ref[[a, b]]) for a in range(5) for b in range(5)
    )
    assert 0 < of_two < kl


def test_kto_holds_its_reference_point_fixed():
    """The reference point is a number, so no gradient flows through it."""
    logp, ref = np.array([-1.0, -3.0]), np.array([-2.0, -2.0])
    leaf = Tensor(logp, requires_grad=True)
    family.kto_loss(leaf, ref, [True, False], family.kto_reference_point(logp, ref)).loss.backward()
    close(leaf.grad, family.kto_gradient(logp, ref, [True, False], 0.0)[0])


# ---- what is refused ----------------------------------------------------------------------------------------

ONE = (-1.0, -2.0, -1.5, -1.5)


@pytest.mark.parametrize(
    ("name", "given_", "sentence"),
    [
        (
            "simpo",
            {"length_w": [1.0, 2.0], "length_l": 3.0},
            r"length_w needs one number for each pair, \(\), not \(2,\)",
        ),
        ("simpo", {"length_w": 0, "length_l": 3.0}, "length_w must be positive"),
        ("robust", {"label_smoothing": 0.5}, r"label_smoothing must lie in \[0, 0.5\), not 0.5"),
        ("exo_pair", {"label_smoothing": 0.0}, "label_smoothing must be positive"),
        ("discopop", {"tau": 0.0}, "tau must be positive"),
        ("alpha_divergence", {"alpha": 0.0}, "alpha must be positive"),
        ("dpop", {"penalty": math.inf}, r"penalty must lie in \[-inf, inf\), not inf"),
        ("hinge", {"beta": 0.0}, "beta must be positive and finite"),
    ],
)
def test_wrong_arguments_are_refused(name, given_, sentence):
    """A constant of another shape, a length of 0 or an option out of its range is an error with a sentence."""
    logps = {
        each: x
        for each, x in zip(("logp_w", "logp_l", "ref_logp_w", "ref_logp_l"), ONE)
        if each in inspect.signature(LOSSES[name]).parameters
    }
    for function in (LOSSES[name], LOSSES[name].gradient):
        with pytest.raises(ValueError, match=sentence):
            function(**logps, **given_)


def test_lists_need_two_responses():
    """A list of one response, or one shape for the policy and another for the reference, is refused."""
    with pytest.raises(ValueError, match=r"\(B, K\) with K of at least 2, not \(3, 1\)"):
        LOSSES["plackett_luce"](np.ones((3, 1)), np.ones((3, 1)))


@every_loss
def test_the_closed_form_takes_no_tensor(name):
    """A closed-form gradient refuses Tensors, since it builds no graph."""
    taken = inspect.signature(LOSSES[name]).parameters
    x = {
        each: np.ones((1, 2)) if name == "plackett_luce" else np.ones(1)
        for each, p in taken.items()
        if p.default is p.empty
    }
    x |= {each: Tensor(x[each]) for each in ("logp", "logp_w") if each in x}
    with pytest.raises(TypeError, match=r"pass the \.data"):
        LOSSES[name].gradient(**x)


@every_loss
def test_every_loss_has_one_silhouette(name):
    """A sentence, the formula, the source; then the gradient, which says its own formula: one like the other."""
    loss, gradient = LOSSES[name], LOSSES[name].gradient
    sentence, formula = inspect.getdoc(loss).split("\n\n")[:2]
    assert sentence.endswith((".", "?")) or "\n" in sentence
    assert "\n    L = " in "\n" + formula and re.search(r"Source: .*\d{4} \(arXiv \d{4}\.\d{5}\)", loss.__doc__)
    assert "dL/d" in gradient.__doc__
    start = {f: inspect.getsourcelines(f)[1] for f in (loss, gradient)}
    assert start[loss] < start[gradient] < start[loss] + 60
