"""The DPO loss and its gradient in closed form.

Letters as in Rafailov et al. 2023 (arXiv 2305.18290): of each pair, w is the chosen response ("winner")
and l the rejected one; logp = log pi(y|x) under the policy, ref_logp under the reference.
"""

import math
from typing import Any, NamedTuple

from . import ops
from .backend import Array, array_module
from .tensor import Tensor


class PreferenceLoss(NamedTuple):
    """What a preference loss returns."""

    loss: Tensor  # (): mean over the pairs, in nats
    reward_w: Tensor  # (B,): beta (logp_w - ref_logp_w), the implicit reward
    reward_l: Tensor  # (B,)
    margin: Tensor  # (B,): (logp_w - ref_logp_w) - (logp_l - ref_logp_l), before beta


def _checked(beta: float, label_smoothing: float, *logps: Any) -> tuple[float, float]:
    """Refuse what would broadcast or divide into a wrong number without a word; beta and e as Python numbers."""
    shapes = [getattr(logp, "shape", ()) for logp in logps]
    if len(set(shapes)) != 1:
        raise ValueError(f"the four log-probabilities must have one shape, not {', '.join(map(str, shapes))}")
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
    z = beta * margin
    per_pair = -ops.logsigmoid(z)
    if label_smoothing:  # where it is 0, so is its term, though log sigma(-z) may be -inf
        per_pair = (1 - label_smoothing) * per_pair - label_smoothing * ops.logsigmoid(-z)
    return PreferenceLoss(ops.mean(per_pair), beta * ratio_w, beta * ratio_l, margin)


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
    # dL/dz = -((1 - e) sigma(-z) - e sigma(z))/B = -(sigma(-z) - e)/B, since sigma(z) + sigma(-z) = 1
    # dz/dlogp_w = beta, dz/dlogp_l = -beta
    beta, label_smoothing = _checked(beta, label_smoothing, logp_w, logp_l, ref_logp_w, ref_logp_l)
    if any(isinstance(logp, Tensor) for logp in (logp_w, logp_l, ref_logp_w, ref_logp_l)):
        raise TypeError("dpo_gradient takes plain arrays: pass the .data of a Tensor")
    xp = array_module(logp_w, logp_l, ref_logp_w, ref_logp_l)
    z = beta * ((logp_w - ref_logp_w) - (logp_l - ref_logp_l))
    weight = xp.exp(ops.logsigmoid.raw(-z)[0])
    gradient = -(beta / getattr(z, "size", 1)) * (weight - label_smoothing)
    return gradient, -gradient
