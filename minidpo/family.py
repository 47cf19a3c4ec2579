"""The other preference losses, each beside its gradient in closed form: one loss, one silhouette.

Letters as in losses.py, and of a pair: h_w = logp_w - ref_logp_w and h_l, its log-ratios; r_w = beta h_w and r_l, its
rewards; z = r_w - r_l; |y_w| and |y_l|, the lengths of its responses in tokens. v(x) = sigma(x) sigma(-x) is the slope
of sigma, s the slope of the loss in x. Each loss of a pair asks by name for what it needs; `pair_loss` and
`gradient_of` make of it a function of the log-probabilities (two without a reference), averaged over the batch. So a
formula that says dL/dz, dL/dr_w or dL/dh_w is that of a batch of one pair.

`LOSSES` holds them under TRL's names where TRL has them. A loss is stationary where its gradient vanishes, and cannot
go below its infimum. A docstring that says neither means: stationary nowhere, infimum 0 (for log-probabilities of at
most 0). At a kink a loss has no derivative; there `hinge` and `dpop` take the flatter side's slope.
"""

import functools
import inspect
import math
from typing import Any, NamedTuple

from . import ops
from .backend import Array, array_module, asarray
from .losses import PreferenceLoss, checked, gradient_of, plain, sigma
from .tensor import Tensor

FOUR = ("logp_w", "logp_l", "ref_logp_w", "ref_logp_l")


def pair_loss(pair: Any, couples_pairs: bool = False) -> Any:
    """Make a loss of log-probabilities, (B,), from the loss of a pair, whose parameters say what it needs of the pair.

    The loss takes logp_w, logp_l, the reference's two unless `pair` does without, constants of each pair, (B,), beta
    unless `pair` does without, and options. It returns a `PreferenceLoss` with the rewards that `pair` returns after
    its loss, or else r_w and r_l; without a reference h_w is logp_w, and without beta r_w is h_w.
    """
    own = inspect.signature(pair).parameters
    scored = bool(own.keys() & {"z", "r_w"})
    names = FOUR[: 4 if scored or own.keys() & {"h_w", "ref_logp_w"} else 2]
    rest = [p for name, p in own.items() if name not in (*FOUR, "h_w", "h_l", "r_w", "r_l", "z", "beta")]
    constants, options = ([p for p in rest if (p.default is p.empty) is required] for required in (True, False))
    plainly = functools.partial(inspect.Parameter, kind=inspect.Parameter.POSITIONAL_OR_KEYWORD)
    beta = [own.get("beta", plainly("beta", default=0.1))] if scored or "beta" in own else []
    signature = inspect.Signature([*map(plainly, names), *constants, *beta, *options])

    def prepared(arguments: Any, keywords: Any, convert: Any) -> dict[str, Any]:
        """Everything about the pairs by its name."""
        bound = signature.bind(*arguments, **keywords)
        bound.apply_defaults()
        x = bound.arguments | {name: convert(bound.arguments[name]) for name in names}
        x["beta"] = checked(x.get("beta", 1.0), *[x[name] for name in names])
        x |= {p.name: constant(p.name, x[p.name], x["logp_w"]) for p in constants}
        x |= {p.name: option(p.name, x[p.name]) for p in options}
        x["h_w"], x["h_l"] = (x[y] - x[f"ref_{y}"] if f"ref_{y}" in x else x[y] for y in ("logp_w", "logp_l"))
        return x | {"r_w": x["beta"] * x["h_w"], "r_l": x["beta"] * x["h_l"], "z": x["beta"] * (x["h_w"] - x["h_l"])}

    @functools.wraps(pair)
    def loss(*arguments: Any, **keywords: Any) -> PreferenceLoss:
        x = prepared(arguments, keywords, lambda logp: logp if isinstance(logp, Tensor) else Tensor(logp))
        found = pair(**{name: x[name] for name in own})
        value, r_w, r_l = found if isinstance(found, tuple) else (found, x["r_w"], x["r_l"])
        return PreferenceLoss(ops.mean(value), r_w, r_l, x["h_w"] - x["h_l"])

    def chain(slopes: Any) -> Any:
        """From the derivatives of a pair, in z or in the two that it names, to the gradient of the batch."""

        @functools.wraps(slopes)
        def gradient(*arguments: Any, **keywords: Any) -> tuple[Array, ...]:
            x = prepared(arguments, keywords, lambda logp: asarray(*plain(logp)))
            found = slopes(**{name: x[name] for name in own})
            factor = (x["beta"] if scored else 1.0) / max(x["logp_w"].size, 1)  # of the rewards, and of the mean
            both = found if isinstance(found, tuple) else (found, -found)
            zero = array_module(*both).zeros_like(x["logp_w"])  # a derivative may be one number for all pairs
            return tuple([(factor * slope + zero).astype(zero.dtype) for slope in both])

        gradient.__dict__["__signature__"] = signature
        return gradient

    loss.__dict__.update(__signature__=signature, chain=chain, couples_pairs=couples_pairs)
    return loss


# ---- measured from the reference: functions of z, of the two rewards, of the log-ratios -------------------


@pair_loss
def hinge_loss(z):
    """Sequence likelihood calibration: a margin of 1/beta is enough.

        L = mean(max(0, 1 - z))

    Stationary: z > 1; kink: z = 1.
    Source: Zhao et al. 2023 (arXiv 2305.10425), with the reference of Liu et al. 2023 (arXiv 2309.06657).
    """
    return ops.maximum(0.0, 1 - z)


@gradient_of(hinge_loss)
def hinge_gradient(z):
    """dL/dz = -[z < 1]"""
    return -1.0 * (z < 1)


@pair_loss
def robust_loss(z, label_smoothing=0.1):
    """DPO whose mean over labels flipped with probability e = label_smoothing is the loss on the true labels.

        L = -mean((1 - e) log sigma(z) - e log sigma(-z)) / (1 - 2e)

    Infimum: none, since it falls for ever as z grows, unless e = 0.
    Source: Chowdhury et al. 2024 (arXiv 2403.00409).
    """
    e = label_smoothing
    return (e * log_sigma(-z) - (1 - e) * log_sigma(z)) / (1 - 2 * e)


@gradient_of(robust_loss)
def robust_gradient(z, label_smoothing=0.1):
    """dL/dz = -((1 - e) sigma(-z) + e sigma(z)) / (1 - 2e)"""
    # d log sigma(z)/dz = sigma(-z), d log sigma(-z)/dz = -sigma(z): the flipped label's slope is subtracted
    e = label_smoothing
    return -((1 - e) * sigma(-z) + e * sigma(z)) / (1 - 2 * e)


@pair_loss
def exo_pair_loss(z, label_smoothing=1e-3):
    """Efficient exact optimisation: KL from the policy's preference to the smoothed label, e = label_smoothing.

        L = mean(sigma(z) log(sigma(z)/(1 - e)) + sigma(-z) log(sigma(-z)/e))

    Stationary: z = log((1 - e)/e), and its slope vanishes far out on both sides.
    Source: Ji et al. 2024 (arXiv 2402.00856), equation 16.
    """
    e = option("label_smoothing", label_smoothing, positive=True)
    return sigma(z) * (log_sigma(z) - math.log(1 - e)) + sigma(-z) * (log_sigma(-z) - math.log(e))


@gradient_of(exo_pair_loss)
def exo_pair_gradient(z, label_smoothing=1e-3):
    """dL/dz = v(z) (z - log((1 - e)/e))"""
    # with p = sigma(z): dL/dp = log(p/(1 - e)) - log((1 - p)/e) = z - log((1 - e)/e), and dp/dz = v(z)
    e = option("label_smoothing", label_smoothing, positive=True)
    return v(z) * (z - math.log((1 - e) / e))


@pair_loss
def discopop_loss(z, tau=0.05):
    """A loss found by a language model: logistic where z is below 0, exponential above, mixed in between.

        L = mean(-(1 - m) log sigma(z) + m exp(-z)),   m = sigma(z/tau)

    Stationary: at the default tau z = -0.119, a minimum, and z = 0.072, a maximum.
    Source: Lu et al. 2024 (arXiv 2406.08414), equation 5.
    """
    tau = option("tau", tau, positive=True)
    return exp(log_sigma(z / tau) - z) - sigma(-z / tau) * log_sigma(z)  # m exp(-z) as one exp cannot overflow


@gradient_of(discopop_loss)
def discopop_gradient(z, tau=0.05):
    """dL/dz = -(1 - m) sigma(-z) - m exp(-z) + m (1 - m) (log sigma(z) + exp(-z)) / tau"""
    # dm/dz = m (1 - m)/tau, and each factor beside it has its own slope; m exp(-z) is exp(log m - z)
    tau = option("tau", tau, positive=True)
    blend, rest = exp(log_sigma(z / tau) - z), sigma(-z / tau)
    return blend * (rest / tau - 1) + rest * (sigma(z / tau) * log_sigma(z) / tau - sigma(-z))


@pair_loss
def odpo_loss(z, offset):
    """DPO with an offset: how much more the chosen reward should be, (B,), a number for each pair.

        L = -mean(log sigma(z - offset))

    Source: Amini et al. 2024 (arXiv 2402.10571).
    """
    return -log_sigma(z - offset)


@gradient_of(odpo_loss)
def odpo_gradient(z, offset):
    """dL/dz = -sigma(offset - z)"""
    return -sigma(offset - z)


@pair_loss
def r_dpo_loss(z, length_w, length_l, alpha=0.05):
    """DPO with a price of alpha per token: a longer chosen response needs less margin, as its length counts against it.

        L = -mean(log sigma(z + alpha (|y_w| - |y_l|)))

    The optimum of E[r] - alpha |y| - beta KL has r = beta log(pi/pi_ref) + alpha |y| + constant, hence the plus.
    Source: Park et al. 2024 (arXiv 2403.19159).
    """
    return -log_sigma(z + alpha * (length_w - length_l))


@gradient_of(r_dpo_loss)
def r_dpo_gradient(z, length_w, length_l, alpha=0.05):
    """dL/dz = -sigma(-z - alpha (|y_w| - |y_l|))"""
    return -sigma(-z - alpha * (length_w - length_l))


@pair_loss
def nca_pair_loss(r_w, r_l):
    """Noise contrastive alignment: both rewards are pulled down, the chosen one up as well.

        L = -mean(log sigma(r_w) + (1/2) log sigma(-r_w) + (1/2) log sigma(-r_l))

    Stationary: r_w = log 2, r_l -> -inf; infimum: log(27/4)/2.
    Source: Chen et al. 2024 (arXiv 2402.05369), for two responses.
    """
    return -log_sigma(r_w) - 0.5 * log_sigma(-r_w) - 0.5 * log_sigma(-r_l)


@gradient_of(nca_pair_loss)
def nca_pair_gradient(r_w, r_l):
    """dL/dr_w = sigma(r_w)/2 - sigma(-r_w), dL/dr_l = sigma(r_l)/2"""
    return 0.5 * sigma(r_w) - sigma(-r_w), 0.5 * sigma(r_l)


@pair_loss
def bco_pair_loss(r_w, r_l, delta=0.0):
    """Binary classifier optimisation: is this response a chosen one? `delta` is held fixed, as in `bco_loss`.

        L = -mean(log sigma(r_w - delta) + log sigma(delta - r_l))

    Source: Jung et al. 2024 (arXiv 2404.04656), on pairs; TRL's has delta = 0.
    """
    return -log_sigma(r_w - delta) - log_sigma(delta - r_l)


@gradient_of(bco_pair_loss)
def bco_pair_gradient(r_w, r_l, delta=0.0):
    """dL/dr_w = -sigma(delta - r_w), dL/dr_l = sigma(r_l - delta)"""
    return -sigma(delta - r_w), sigma(r_l - delta)


@pair_loss
def apo_zero_loss(r_w, r_l):
    """Anchored preference optimisation, zero: chosen up and rejected down, each against the reference alone.

        L = mean(-sigma(r_w) + sigma(r_l))

    Stationary: nowhere, but slopes vanish far out, even where it is wrong; infimum: -1.
    Source: D'Oosterlinck et al. 2024 (arXiv 2408.06266), equation 7; TRL adds 1.
    """
    return sigma(r_l) - sigma(r_w)


@gradient_of(apo_zero_loss)
def apo_zero_gradient(r_w, r_l):
    """dL/dr_w = -v(r_w), dL/dr_l = v(r_l)"""
    return -v(r_w), v(r_l)


@pair_loss
def apo_down_loss(r_w, r_l):
    """Anchored preference optimisation, down: both down, the rejected one further.

        L = mean(sigma(r_w) - sigma(r_w - r_l))

    Stationary: nowhere, but its slopes vanish far out; infimum: -1.
    Source: D'Oosterlinck et al. 2024 (arXiv 2408.06266), equation 8; TRL adds 1.
    """
    return sigma(r_w) - sigma(r_w - r_l)


@gradient_of(apo_down_loss)
def apo_down_gradient(r_w, r_l):
    """dL/dr_w = v(r_w) - v(r_w - r_l), dL/dr_l = v(r_w - r_l)"""
    return v(r_w) - v(r_w - r_l), v(r_w - r_l)


@pair_loss
def sppo_hard_loss(h_w, h_l, beta=0.1):
    """Self-play preference optimisation with hard labels: each log-ratio has its own target.

        L = mean((h_w - 1/(2 beta))^2 + (h_l + 1/(2 beta))^2)

    Stationary: h_w = 1/(2 beta), h_l = -1/(2 beta).
    Source: Wu et al. 2024 (arXiv 2405.00675), equation 4.7 with P = 1 and 0; beta is 1/eta.
    """
    return (h_w - 1 / (2 * beta)) ** 2 + (h_l + 1 / (2 * beta)) ** 2


@gradient_of(sppo_hard_loss)
def sppo_hard_gradient(h_w, h_l, beta=0.1):
    """dL/dh_w = 2 (h_w - 1/(2 beta)), dL/dh_l = 2 (h_l + 1/(2 beta))"""
    return 2 * (h_w - 1 / (2 * beta)), 2 * (h_l + 1 / (2 * beta))


@pair_loss
def dpop_loss(h_w, h_l, beta=0.1, penalty=50.0):
    """DPO-positive: the margin counts less if the chosen response has become less likely.

        L = -mean(log sigma(x)),   x = beta (h_w - h_l - penalty max(0, -h_w))

    Kink: h_w = 0.
    Source: Pal et al. 2024 (arXiv 2402.13228); penalty is lambda.
    """
    return -log_sigma(beta * (h_w - h_l - penalty * ops.maximum(0.0, -h_w)))


@gradient_of(dpop_loss)
def dpop_gradient(h_w, h_l, beta=0.1, penalty=50.0):
    """dL/dh_w = s (1 + penalty [h_w < 0]), dL/dh_l = -s, s = -beta sigma(-x)"""
    s = -beta * sigma(-beta * (h_w - h_l + penalty * (h_w < 0) * h_w))
    return s * (1 + penalty * (h_w < 0)), -s


@pair_loss
def alpha_divergence_loss(h_w, h_l, beta=0.1, alpha=0.5):
    """DPO under an alpha-divergence: forward KL at alpha = 1, and in the limit alpha = 0 reverse KL, which is DPO.

        L = -mean(log sigma(x)),   x = beta (f'(e^h_w) - f'(e^h_l)),   f'(u) = (1 - u^-alpha)/alpha

    Where -x is too large for a float, the loss is inf.
    Source: Wang et al. 2023 (arXiv 2309.16240); TRL's f_alpha_divergence_coef is 1 - alpha.
    """
    x = score_gap(h_w, h_l, beta, alpha)
    return -log_sigma(x), *(beta * (1 - exp(-alpha * h)) / alpha for h in (h_w, h_l))


@gradient_of(alpha_divergence_loss)
def alpha_divergence_gradient(h_w, h_l, beta=0.1, alpha=0.5):
    """dL/dh_w = s e^(-alpha h_w), dL/dh_l = -s e^(-alpha h_l), s = -beta sigma(-x)"""
    # d f'(e^h)/dh = e^(-alpha h), which may overflow where its product with s does not: one exp for both
    log_s = math.log(beta) + log_sigma(-score_gap(h_w, h_l, beta, alpha))
    return -exp(log_s - alpha * h_w), exp(log_s - alpha * h_l)


@pair_loss
def js_divergence_loss(h_w, h_l, beta=0.1):
    """DPO under a Jensen-Shannon constraint: however likely a response becomes, its score stays below log 2.

        L = -mean(log sigma(x)),   x = beta (f'(e^h_w) - f'(e^h_l)),   f'(u) = log(2u/(1 + u))

    Source: Wang et al. 2023 (arXiv 2309.16240).
    """
    r_w, r_l = (beta * (math.log(2) + log_sigma(h)) for h in (h_w, h_l))
    return -log_sigma(r_w - r_l), r_w, r_l


@gradient_of(js_divergence_loss)
def js_divergence_gradient(h_w, h_l, beta=0.1):
    """dL/dh_w = s sigma(-h_w), dL/dh_l = -s sigma(-h_l), s = -beta sigma(-x)"""
    # d f'(e^h)/dh = sigma(-h)
    s = -beta * sigma(-beta * (log_sigma(h_w) - log_sigma(h_l)))
    return s * sigma(-h_w), -s * sigma(-h_l)


@pair_loss
def sigmoid_norm_loss(h_w, h_l, length_w, length_l, beta=0.1):
    """DPO of means over tokens, "length-normalised".

        L = -mean(log sigma(x)),   x = beta (h_w/|y_w| - h_l/|y_l|)

    Source: Lambert et al. 2024 (arXiv 2411.15124).
    """
    r_w, r_l = beta * h_w / length_w, beta * h_l / length_l
    return -log_sigma(r_w - r_l), r_w, r_l


@gradient_of(sigmoid_norm_loss)
def sigmoid_norm_gradient(h_w, h_l, length_w, length_l, beta=0.1):
    """dL/dh_w = s/|y_w|, dL/dh_l = -s/|y_l|, s = -beta sigma(-x)"""
    s = -beta * sigma(-beta * (h_w / length_w - h_l / length_l))
    return s / length_w, -s / length_l


@pair_loss
def dpo_nll_loss(h_w, h_l, logp_w, length_w, beta=0.1, nll_weight=1.0):
    """DPO, and the likelihood of the chosen response per token.

        L = mean(-log sigma(z) - nll_weight logp_w/|y_w|)

    Source: Pang et al. 2024 (arXiv 2404.19733), where nll_weight is alpha.
    """
    return -log_sigma(beta * (h_w - h_l)) - nll_weight * logp_w / length_w


@gradient_of(dpo_nll_loss)
def dpo_nll_gradient(h_w, h_l, logp_w, length_w, beta=0.1, nll_weight=1.0):
    """dL/dlogp_w = s - nll_weight/|y_w|, dL/dlogp_l = -s, s = -beta sigma(-z)"""
    s = -beta * sigma(-beta * (h_w - h_l))
    return s - nll_weight / length_w, -s


# ---- losses without a reference ---------------------------------------------------------------------------


@pair_loss
def simpo_loss(logp_w, logp_l, length_w, length_l, beta=2.0, gamma=1.0):
    """Simple preference optimisation: the reward is the mean over tokens that generation maximises.

        L = -mean(log sigma(x)),   x = beta (logp_w/|y_w| - logp_l/|y_l|) - gamma

    Source: Meng et al. 2024 (arXiv 2405.14734).
    """
    r_w, r_l = beta * logp_w / length_w, beta * logp_l / length_l
    return -log_sigma(r_w - r_l - gamma), r_w, r_l


@gradient_of(simpo_loss)
def simpo_gradient(logp_w, logp_l, length_w, length_l, beta=2.0, gamma=1.0):
    """dL/dlogp_w = s/|y_w|, dL/dlogp_l = -s/|y_l|, s = -beta sigma(-x)"""
    s = -beta * sigma(gamma - beta * (logp_w / length_w - logp_l / length_l))
    return s / length_w, -s / length_l


@pair_loss
def alphapo_loss(logp_w, logp_l, length_w, length_l, beta=2.0, gamma=1.0, alpha=0.25):
    """SimPO with a reward of another shape, (1 - P^-alpha)/alpha; SimPO itself in the limit alpha = 0.

        L = -mean(log sigma(x)),   x = (beta/alpha) (P_l^-alpha - P_w^-alpha) - gamma,   P = exp(logp/|y|)

    Source: Gupta et al. 2025 (arXiv 2501.03884).
    """
    p_w, p_l = logp_w / length_w, logp_l / length_l
    x = score_gap(p_w, p_l, beta, alpha) - gamma
    return -log_sigma(x), *(beta * (1 - exp(-alpha * p)) / alpha for p in (p_w, p_l))


@gradient_of(alphapo_loss)
def alphapo_gradient(logp_w, logp_l, length_w, length_l, beta=2.0, gamma=1.0, alpha=0.25):
    """dL/dlogp_w = s P_w^-alpha/|y_w|, dL/dlogp_l = -s P_l^-alpha/|y_l|, s = -beta sigma(-x)"""
    p_w, p_l = logp_w / length_w, logp_l / length_l
    log_s = math.log(beta) + log_sigma(gamma - score_gap(p_w, p_l, beta, alpha))
    return -exp(log_s - alpha * p_w) / length_w, exp(log_s - alpha * p_l) / length_l


@pair_loss
def cpo_loss(logp_w, logp_l, beta=0.1, nll_weight=1.0):
    """Contrastive preference optimisation: DPO with a uniform reference, and the likelihood of the chosen response.

        L = mean(-log sigma(beta (logp_w - logp_l)) - nll_weight logp_w)

    Source: Xu et al. 2024 (arXiv 2401.08417); TRL takes the second term as a mean over the batch's tokens.
    """
    return -log_sigma(beta * (logp_w - logp_l)) - nll_weight * logp_w


@gradient_of(cpo_loss)
def cpo_gradient(logp_w, logp_l, beta=0.1, nll_weight=1.0):
    """dL/dlogp_w = s - nll_weight, dL/dlogp_l = -s, s = -beta sigma(-beta (logp_w - logp_l))"""
    s = -beta * sigma(-beta * (logp_w - logp_l))
    return s - nll_weight, -s


@pair_loss
def orpo_loss(logp_w, logp_l, length_w, length_l, beta=0.1):
    """Odds ratio preference optimisation: fine-tuning, and a term in the odds P/(1 - P) of a mean token.

        L = mean(-log P_w - beta log sigma(x)),   x = log(P_w/(1 - P_w)) - log(P_l/(1 - P_l)),   P = exp(logp/|y|)

    Log-probabilities must be below 0.
    Source: Hong et al. 2024 (arXiv 2403.07691), where beta is lambda; TRL takes log P_w over the batch's tokens.
    """
    p_w, p_l = logp_w / length_w, logp_l / length_l
    return -p_w - beta * log_sigma((p_w - log1mexp(p_w)) - (p_l - log1mexp(p_l))), beta * p_w, beta * p_l


@gradient_of(orpo_loss)
def orpo_gradient(logp_w, logp_l, length_w, length_l, beta=0.1):
    """dL/dlogp_w = (s/(1 - P_w) - 1)/|y_w|, dL/dlogp_l = -s/(1 - P_l)/|y_l|, s = -beta sigma(-x)"""
    # with p = log P: d(p - log(1 - e^p))/dp = 1 + e^p/(1 - e^p) = 1/(1 - P)
    p_w, p_l = logp_w / length_w, logp_l / length_l
    s = -beta * sigma((p_l - log1mexp(p_l)) - (p_w - log1mexp(p_w)))
    return (s * exp(-log1mexp(p_w)) - 1) / length_w, -s * exp(-log1mexp(p_l)) / length_l


@pair_loss
def unlikelihood_loss(logp_w, logp_l, alpha=1.0):
    """The chosen response up, the rejected one down, and nothing that says when it is enough.

        L = mean(-logp_w + alpha logp_l)

    Infimum: none, since nothing keeps logp_l up.
    Source: Rafailov et al. 2023 (arXiv 2305.18290), section 6, after Welleck et al. 2019 (arXiv 1908.04319).
    """
    return -logp_w + alpha * logp_l


@gradient_of(unlikelihood_loss)
def unlikelihood_gradient(logp_w, logp_l, alpha=1.0):
    """dL/dlogp_w = -1, dL/dlogp_l = alpha"""
    return -1.0, alpha


@pair_loss
def sft_loss(logp_w, logp_l):
    """Preferred fine-tuning: the likelihood of the chosen response; the rejected one is in the metrics alone.

        L = -mean(logp_w)

    Source: Rafailov et al. 2023 (arXiv 2305.18290), section 6; TRL takes a mean over the batch's tokens.
    """
    return -logp_w


@gradient_of(sft_loss)
def sft_gradient(logp_w, logp_l):
    """dL/dlogp_w = -1, dL/dlogp_l = 0"""
    return -1.0, 0.0


@functools.partial(pair_loss, couples_pairs=True)
def aot_loss(logp_w, logp_l, ref_logp_w, ref_logp_l, beta=0.1, label_smoothing=0.0):
    """Optimal transport: the k-th smallest gap of the policy against the k-th smallest gap of the reference.

        L = -mean((1 - e) log sigma(x) + e log sigma(-x)),   x = beta (sort(logp_w - logp_l) - sort(same of ref))

    Stationary: with e > 0 at x = log((1 - e)/e) throughout, else nowhere; kink: two gaps of the policy are equal.
    Source: Melnyk et al. 2024 (arXiv 2406.05882), paired.
    """
    x = beta * (ascending(logp_w - logp_l) - ascending(ref_logp_w - ref_logp_l))
    return (label_smoothing - 1) * log_sigma(x) - label_smoothing * log_sigma(-x)


@gradient_of(aot_loss)
def aot_gradient(logp_w, logp_l, ref_logp_w, ref_logp_l, beta=0.1, label_smoothing=0.0):
    """dL/dlogp_w = -dL/dlogp_l = -beta ((1 - e) sigma(-x) - e sigma(x)), at the place that x came from"""
    gap = logp_w - logp_l
    x = beta * (ascending(gap) - ascending(ref_logp_w - ref_logp_l))
    return put_back(-beta * ((1 - label_smoothing) * sigma(-x) - label_smoothing * sigma(x)), gap)


@functools.partial(pair_loss, couples_pairs=True)
def aot_unpaired_loss(h_w, h_l, beta=0.1, label_smoothing=0.0):
    """Optimal transport, unpaired: the k-th smallest chosen log-ratio against the k-th smallest rejected one.

        L = -mean((1 - e) log sigma(x) + e log sigma(-x)),   x = beta (sort(h_w) - sort(h_l))

    Stationary: with e > 0 at x = log((1 - e)/e) throughout, else nowhere; kink: two of h_w or two of h_l are equal.
    Source: Melnyk et al. 2024 (arXiv 2406.05882), unpaired.
    """
    x = beta * (ascending(h_w) - ascending(h_l))
    return (label_smoothing - 1) * log_sigma(x) - label_smoothing * log_sigma(-x)


@gradient_of(aot_unpaired_loss)
def aot_unpaired_gradient(h_w, h_l, beta=0.1, label_smoothing=0.0):
    """dL/dh_w = s, dL/dh_l = -s, each at its place, s = -beta ((1 - e) sigma(-x) - e sigma(x))"""
    x = beta * (ascending(h_w) - ascending(h_l))
    s = -beta * ((1 - label_smoothing) * sigma(-x) - label_smoothing * sigma(x))
    return put_back(s, h_w), put_back(-s, h_l)


# ---- single responses, and lists --------------------------------------------------------------------------


class ResponseLoss(NamedTuple):
    """What a loss of single responses, or of lists, returns."""

    loss: Tensor  # ()
    reward: Tensor  # beta (logp - ref_logp), in the shape of logp


def kto_loss(logp, ref_logp, desirable, reference_point, beta=0.1, weight_desirable=1.0, weight_undesirable=1.0):
    """Kahneman-Tversky optimisation: each response, desirable or not, against a reference point, the batch's KL.

        L = mean(weight sigma(-x)),   x = +-beta (logp - ref_logp - reference_point),   + for desirable responses

    `desirable`, (B,), is true or false; `reference_point`, a number held fixed, is that of `kto_reference_point`.
    Stationary: nowhere, but the slope vanishes far out, even where it is wrong.
    Source: Ethayarajh et al. 2024 (arXiv 2402.01306), equation 7; at 0, TRL's apo_zero_unpaired.
    """
    beta, sign, _ = _labels(logp, ref_logp, desirable, beta)
    weight, ratio = (weight_desirable * (1 + sign) + weight_undesirable * (1 - sign)) / 2, ops.sub(logp, ref_logp)
    return ResponseLoss(ops.mean(weight * sigma(-beta * sign * (ratio - float(reference_point)))), beta * ratio)


@gradient_of(kto_loss)
def kto_gradient(logp, ref_logp, desirable, reference_point, beta=0.1, weight_desirable=1.0, weight_undesirable=1.0):
    """dL/dlogp = -+beta weight v(x)"""
    logp, ref_logp = map(asarray, plain(logp, ref_logp))
    beta, sign, _ = _labels(logp, ref_logp, desirable, beta)
    weight = (weight_desirable * (1 + sign) + weight_undesirable * (1 - sign)) / 2
    return (-beta / max(logp.size, 1) * sign * weight * v(beta * sign * (logp - ref_logp - reference_point)),)


def kto_reference_point(logp: Any, ref_logp: Any) -> float:
    """KTO's estimate of KL(pi || pi_ref): max(0, mean(logp - ref_logp)) of responses to other prompts than theirs.

    If these responses are samples of the reference, the mean estimates -KL(pi_ref || pi), which is at most 0, so the
    estimate is 0 up to sampling noise.
    """
    return max(0.0, float((asarray(logp) - asarray(ref_logp)).mean()))


def bco_loss(logp, ref_logp, desirable, delta, beta=0.1):
    """Binary classifier optimisation: is this a desirable response? `delta`, held fixed, is a mean of rewards.

        L = -mean over desirable(log sigma(x)) - mean over others(log sigma(-x)),   x = beta (logp - ref_logp) - delta

    Source: Jung et al. 2024 (arXiv 2404.04656).
    """
    beta, sign, share = _labels(logp, ref_logp, desirable, beta)
    reward = beta * ops.sub(logp, ref_logp)
    return ResponseLoss(-ops.sum(log_sigma(sign * (reward - float(delta))) * share), reward)


@gradient_of(bco_loss)
def bco_gradient(logp, ref_logp, desirable, delta, beta=0.1):
    """dL/dlogp = -beta sigma(-x) if desirable, beta sigma(x) if not"""
    logp, ref_logp = map(asarray, plain(logp, ref_logp))
    beta, sign, share = _labels(logp, ref_logp, desirable, beta)
    return (-beta * sign * share * sigma(-sign * (beta * (logp - ref_logp) - delta)),)


def plackett_luce_loss(logp, ref_logp, beta=0.1):
    """DPO of rankings: the best first, (B, K); the first is chosen among all, the second among the rest, and so on.

        L = -mean(sum_k log(e^r_k / sum_(j >= k) e^r_j)),   r = beta (logp - ref_logp)

    With two responses it is DPO.
    Source: Rafailov et al. 2023 (arXiv 2305.18290), appendix A.3.
    """
    beta, K = _ranked(logp, ref_logp, beta)
    reward = beta * ops.sub(logp, ref_logp)
    terms = [ops.mean(ops.logsumexp(reward[:, k:]) - reward[:, k]) for k in range(K - 1)]
    return ResponseLoss(functools.reduce(ops.add, terms), reward)


@gradient_of(plackett_luce_loss)
def plackett_luce_gradient(logp, ref_logp, beta=0.1):
    """dL/dlogp_j = beta (sum_(k <= j) softmax(r_k, ..., r_K)_j - [j < K]), k from 1 to K - 1"""
    # d logsumexp(r_k, ..., r_K)/dr_j = softmax(r_k, ..., r_K)_j for j >= k, and d r_k/dr_j = [k = j]
    logp, ref_logp = map(asarray, plain(logp, ref_logp))
    beta, K = _ranked(logp, ref_logp, beta)
    reward = beta * (logp - ref_logp)
    gradient = 0 * reward
    for k in range(K - 1):
        gradient[:, k:] += ops.softmax.raw(reward[:, k:])[0]
        gradient[:, k] -= 1
    return (beta / len(reward) * gradient,)


# ---- functions and arguments ------------------------------------------------------------------------------


def of_either(op: Any) -> Any:
    """An op that answers a Tensor with a Tensor and, for the closed forms, an array with an array."""
    return lambda x: op(x) if isinstance(x, Tensor) else op.raw(x)[0]


exp, log_sigma, log1mexp = map(of_either, (ops.exp, ops.logsigmoid, ops.log1mexp))


def v(x: Array) -> Array:
    return exp(log_sigma(x) + log_sigma(-x))


def score_gap(h_w: Any, h_l: Any, beta: float, alpha: float) -> Any:
    """(beta/alpha) (e^(-alpha h_l) - e^(-alpha h_w)), where one of the powers may be too large for a float."""
    low_w, low_l = (-option("alpha", alpha, positive=True) * h for h in (h_w, h_l))
    w, l = (x.data if isinstance(x, Tensor) else x for x in (low_w, low_l))
    xp = array_module(w)
    excess = xp.maximum(xp.maximum(w.real, l.real) - (80.0 if w.dtype.char in "fF" else 700.0), 0.0)
    # a positive gap may stay near e^700, where its loss is 0; e^60 times a negative one is infinite
    scale = beta / alpha * xp.exp(xp.where(w.real >= l.real, xp.minimum(excess, 60.0), 0.0))
    return scale * (exp(low_l - excess) - exp(low_w - excess))


def ascending(x: Any) -> Any:
    """The entries in ascending order; a single pair, (), is in order."""
    order = (x.data if isinstance(x, Tensor) else x).reshape(-1).argsort()
    return x[order] if len(x.shape) else x


def put_back(slope: Array, x: Array) -> Array:
    """Each entry of `slope` at the place from which `ascending` took its entry of x."""
    return slope[x.argsort().argsort()] if x.ndim else slope


def option(name: str, x: Any, positive: bool = False) -> float:
    low, high = (0, 0.5) if name == "label_smoothing" else (-math.inf, math.inf)
    if not (low <= x < high and math.isfinite(x)):
        raise ValueError(f"{name} must lie in [{low}, {high}), not {x}")
    if positive and not x > 0:
        raise ValueError(f"{name} must be positive, not {x}")
    return float(x)


def constant(name: str, x: Any, logp: Any) -> Array:
    """A constant of each pair in the dtype of the log-probabilities; a length must be positive."""
    data = logp.data if isinstance(logp, Tensor) else logp
    x = array_module(data).asarray(asarray(x), dtype=data.real.dtype)
    if x.shape != data.shape:
        raise ValueError(f"{name} needs one number for each pair, {data.shape}, not {x.shape}")
    if name.startswith("length") and not (x > 0).all():
        raise ValueError(f"{name} must be positive: a response has at least one token")
    return x


def _labels(logp: Any, ref_logp: Any, desirable: Any, beta: float) -> tuple[float, Array, Array]:
    """beta; +1 for each desirable response and -1 for each other one; and 1/n for each of the n of its kind."""
    beta, data = checked(beta, logp, ref_logp), logp.data if isinstance(logp, Tensor) else asarray(logp)
    desirable = constant("desirable", desirable, data)
    n = desirable.sum()
    return beta, 2 * desirable - 1, (desirable / max(n, 1) + (1 - desirable) / max(desirable.size - n, 1))


def _ranked(logp: Any, ref_logp: Any, beta: float) -> tuple[float, int]:
    """beta, and the number of responses in each list."""
    if len(logp.shape) != 2 or logp.shape != ref_logp.shape or logp.shape[1] < 2:
        raise ValueError(f"lists need one shape, (B, K) with K of at least 2, not {logp.shape} and {ref_logp.shape}")
    return checked(beta, logp[:, 0], ref_logp[:, 0]), logp.shape[1]
