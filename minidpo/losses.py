"""The DPO loss and its kin, each beside its gradient in closed form.

Letters as in Rafailov et al. 2023 (arXiv 2305.18290): of each pair, w is the chosen response ("winner")
and l the rejected one; logp = log pi(y|x) under the policy, ref_logp under the reference.
"""

import math
from typing import Any, NamedTuple

from . import ops
from .backend import Array, array_module, asarray
from .tensor import Tensor


class PreferenceLoss(NamedTuple):
    """What a preference loss returns."""

    loss: Tensor  # (): mean over the pairs, in nats
    reward_w: Tensor  # (B,): beta (logp_w - ref_logp_w), the implicit reward
    reward_l: Tensor  # (B,)
    margin: Tensor  # (B,): (logp_w - ref_logp_w) - (logp_l - ref_logp_l), before beta


def _checked(beta: float, label_smoothing: float, *logps: Any) -> tuple[float, float]:
    """Refuse what would broadcast or divide into a wrong number without a word; beta and e as Python numbers."""
    shapes = [logp.shape if hasattr(logp, "shape") else asarray(logp).shape for logp in logps]
    if len(set(shapes)) != 1:
        raise ValueError(f"the {len(logps)} log-probabilities must have one shape, not {', '.join(map(str, shapes))}")
    if len(shapes[0]) > 1:
        raise ValueError(
            f"one log-probability per response is wanted, (B,), not {shapes[0]}: sum over the tokens first"
        )
    if shapes[0] == (0,):
        raise ValueError("there is no pair")
    if not 0 < beta < math.inf:
        raise ValueError(f"beta must be positive and finite, not {beta}")
    if not 0 <= label_smoothing <= 0.5:
        raise ValueError(f"label_smoothing is a probability of at most 0.5, not {label_smoothing}")
    return float(beta), float(label_smoothing)


def _logistic(z: Tensor, e: float) -> Tensor:
    """-mean[(1 - e) log sigma(z) + e log sigma(-z)]."""
    per_pair = -ops.logsigmoid(z)
    if e:  # where it is 0, so is its term, though log sigma(-z) may be -inf
        per_pair = (1 - e) * per_pair - e * ops.logsigmoid(-z)
    return ops.mean(per_pair)


def _logistic_gradient(z: Array, e: float) -> Array:
    """Its derivative in z."""
    # dL/dz = -((1 - e) sigma(-z) - e sigma(z))/B = -(sigma(-z) - e)/B, since sigma(z) + sigma(-z) = 1
    weight = array_module(z).exp(ops.logsigmoid.raw(-z)[0])
    return -(weight - e) / getattr(z, "size", 1)


def _plain(*logps: Any) -> None:
    """Refuse Tensors where no graph is built."""
    if any(isinstance(logp, Tensor) for logp in logps):
        raise TypeError("a gradient in closed form takes plain arrays: pass the .data of a Tensor")


def dpo_loss(
    logp_w: Any, logp_l: Any, ref_logp_w: Any, ref_logp_l: Any, beta: float = 0.1, label_smoothing: float = 0.0
) -> PreferenceLoss:
    """Direct preference optimisation.

        L = -mean[(1 - e) log sigma(z) + e log sigma(-z)],   z = beta * margin

    Parameters
    ----------
    logp_w, logp_l, ref_logp_w, ref_logp_l : Tensor or array (B,), or number
        Log-probabilities of whole responses, in nats: sums over tokens.
    beta : float
        Reward per nat of log-ratio.
    label_smoothing : float
        e, the probability that a label is flipped (conservative DPO).

    Returns
    -------
    PreferenceLoss
        Its `loss` is what `backward` starts from.

    Raises
    ------
    ValueError
        If the shapes differ or are not (B,), beta is not positive and finite, or e lies outside [0, 1/2].

    References
    ----------
    Rafailov et al. 2023 (arXiv 2305.18290), equation 7; for e, Mitchell 2023, "A note on DPO with noisy
    preferences".
    """
    beta, label_smoothing = _checked(beta, label_smoothing, logp_w, logp_l, ref_logp_w, ref_logp_l)
    ratio_w = ops.sub(logp_w, ref_logp_w)
    ratio_l = ops.sub(logp_l, ref_logp_l)
    margin = ratio_w - ratio_l
    return PreferenceLoss(_logistic(beta * margin, label_smoothing), beta * ratio_w, beta * ratio_l, margin)


def dpo_gradient(
    logp_w: Array, logp_l: Array, ref_logp_w: Array, ref_logp_l: Array, beta: float = 0.1, label_smoothing: float = 0.0
) -> tuple[Array, Array]:
    """dL/dlogp_w and dL/dlogp_l of `dpo_loss`, in closed form.

        dL/dlogp_w = -(beta/B) (sigma(-z) - e),   dL/dlogp_l = -dL/dlogp_w,   z = beta * margin

    Parameters and errors as in `dpo_loss`, but arrays and no Tensors in, arrays of the same shape out.

    References
    ----------
    Rafailov et al. 2023 (arXiv 2305.18290), section 4, "What does the DPO update do?".
    """
    # dz/dlogp_w = beta, dz/dlogp_l = -beta
    beta, label_smoothing = _checked(beta, label_smoothing, logp_w, logp_l, ref_logp_w, ref_logp_l)
    _plain(logp_w, logp_l, ref_logp_w, ref_logp_l)
    z = beta * ((logp_w - ref_logp_w) - (logp_l - ref_logp_l))
    gradient = beta * _logistic_gradient(z, label_smoothing)
    return gradient, -gradient


def ipo_loss(logp_w: Any, logp_l: Any, ref_logp_w: Any, ref_logp_l: Any, beta: float = 0.1) -> PreferenceLoss:
    """Identity preference optimisation: the margin is drawn to a finite value, however sure the labels are.

        L = mean[(margin - 1/(2 beta))^2]

    Parameters and errors as in `dpo_loss`; `beta` is the paper's tau.

    References
    ----------
    Azar et al. 2023 (arXiv 2310.12036), equation 17.
    """
    beta, _ = _checked(beta, 0.0, logp_w, logp_l, ref_logp_w, ref_logp_l)
    ratio_w = ops.sub(logp_w, ref_logp_w)
    ratio_l = ops.sub(logp_l, ref_logp_l)
    margin = ratio_w - ratio_l
    return PreferenceLoss(ops.mean((margin - 1 / (2 * beta)) ** 2), beta * ratio_w, beta * ratio_l, margin)


def ipo_gradient(
    logp_w: Array, logp_l: Array, ref_logp_w: Array, ref_logp_l: Array, beta: float = 0.1
) -> tuple[Array, Array]:
    """dL/dlogp_w and dL/dlogp_l of `ipo_loss`, in closed form.

        dL/dlogp_w = (2/B) (margin - 1/(2 beta)),   dL/dlogp_l = -dL/dlogp_w

    Parameters and errors as in `dpo_gradient`.
    """
    # dL/dmargin = 2 (margin - 1/(2 beta))/B; dmargin/dlogp_w = 1, dmargin/dlogp_l = -1
    beta, _ = _checked(beta, 0.0, logp_w, logp_l, ref_logp_w, ref_logp_l)
    _plain(logp_w, logp_l, ref_logp_w, ref_logp_l)
    margin = (logp_w - ref_logp_w) - (logp_l - ref_logp_l)
    gradient = (2 / getattr(margin, "size", 1)) * (margin - 1 / (2 * beta))
    return gradient, -gradient


def reference_free_loss(logp_w: Any, logp_l: Any, beta: float = 0.1, label_smoothing: float = 0.0) -> PreferenceLoss:
    """`dpo_loss` with a reference that finds all responses equally likely: z = beta (logp_w - logp_l).

    What is lost with the reference is the anchor, and the link to the KL-constrained objective.
    Parameters and errors as in `dpo_loss`.
    """
    beta, label_smoothing = _checked(beta, label_smoothing, logp_w, logp_l)
    margin = ops.sub(logp_w, logp_l)
    return PreferenceLoss(
        _logistic(beta * margin, label_smoothing), ops.mul(beta, logp_w), ops.mul(beta, logp_l), margin
    )


def reference_free_gradient(
    logp_w: Array, logp_l: Array, beta: float = 0.1, label_smoothing: float = 0.0
) -> tuple[Array, Array]:
    """dL/dlogp_w and dL/dlogp_l of `reference_free_loss`, in closed form.

        dL/dlogp_w = -(beta/B) (sigma(-z) - e),   dL/dlogp_l = -dL/dlogp_w,   z = beta (logp_w - logp_l)

    Parameters and errors as in `dpo_gradient`.
    """
    beta, label_smoothing = _checked(beta, label_smoothing, logp_w, logp_l)
    _plain(logp_w, logp_l)
    gradient = beta * _logistic_gradient(beta * (logp_w - logp_l), label_smoothing)
    return gradient, -gradient
