"""The DPO loss and its relatives, each beside its gradient in closed form.

Letters as in Rafailov et al. 2023 (arXiv 2305.18290): in each pair w is the chosen response ("winner") and l the
rejected one; logp = log pi(y|x) under the policy, ref_logp under the reference, summed over tokens, in nats.

A loss of your own takes the four log-probabilities and beta, and `length_w` and `length_l` if it wants them:

    @family.pair_loss
    def squared_hinge(z):
        return ops.maximum(0.0, 1 - z) ** 2

    cli.dpo(data="pairs.jsonl", init="sft", out="run", loss=squared_hinge)
"""

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from . import ops
from .backend import Array, array_module, asarray, to_host
from .tensor import Tensor

LOSSES: dict[str, Any] = {}  # every loss by name, each with its gradient in closed form as `.gradient`


def gradient_of(loss: Any) -> Callable[[Any], Any]:
    """Register a loss in `LOSSES` together with its gradient, written for a pair if the loss was (family.py)."""

    def register(gradient: Any) -> Any:
        loss.gradient = gradient = getattr(loss, "chain", lambda gradient: gradient)(gradient)
        LOSSES[loss.__name__.removesuffix("_loss")] = loss
        return gradient

    return register


class PreferenceLoss(NamedTuple):
    """What a preference loss returns."""

    loss: Tensor  # (): the mean over the pairs, weighted if they have weights
    reward_w: Tensor  # (B,): the implicit reward of this loss, most often beta (logp_w - ref_logp_w)
    reward_l: Tensor  # (B,)
    margin: Tensor  # (B,): (logp_w - ref_logp_w) - (logp_l - ref_logp_l), before beta


def dpo_loss(
    logp_w: Any, logp_l: Any, ref_logp_w: Any, ref_logp_l: Any,
    beta: float = 0.1, label_smoothing: float = 0.0, probability: Any = None, weight: Any = None,
) -> PreferenceLoss:  # fmt: skip
    """Direct preference optimisation.

        L = -mean(log sigma(beta * margin)),   margin = (logp_w - ref_logp_w) - (logp_l - ref_logp_l)

    Log-probabilities are Tensors or arrays, (B,), or numbers. If labels are uncertain, `probability`, (B,), says how
    likely each is correct; `label_smoothing` sets all to 1 - label_smoothing. `weight`, (B,), says how often each pair
    counts. With p = probability, n = weight and z = beta * margin,

        L = -sum_i n_i [p_i log sigma(z_i) + (1 - p_i) log sigma(-z_i)] / sum_i n_i

    Stationary: with p at z = log(p/(1 - p)), else nowhere; infimum: 0, with p its entropy.
    Source: Rafailov et al. 2023 (arXiv 2305.18290), equation 7; for p, Mitchell 2023, "A note on DPO with noisy
    preferences".
    """
    beta = checked(beta, logp_w, logp_l, ref_logp_w, ref_logp_l)
    ratio_w = ops.sub(logp_w, ref_logp_w)
    ratio_l = ops.sub(logp_l, ref_logp_l)
    margin = ratio_w - ratio_l
    if label_smoothing == 0 and probability is None and weight is None:
        loss = -ops.mean(ops.logsigmoid(beta * margin))  # Eq. 7
    else:
        loss = _weighted_mean(beta * margin, *_label_weights(margin.data, label_smoothing, probability, weight))
    return PreferenceLoss(loss, beta * ratio_w, beta * ratio_l, margin)


@gradient_of(dpo_loss)
def dpo_gradient(
    logp_w: Any, logp_l: Any, ref_logp_w: Any, ref_logp_l: Any,
    beta: float = 0.1, label_smoothing: float = 0.0, probability: Any = None, weight: Any = None,
) -> tuple[Array, Array]:  # fmt: skip
    """dL/dlogp_w and dL/dlogp_l of `dpo_loss`, in closed form: arrays in, arrays out.

        dL/dlogp_w = -(beta/B) sigma(-z),   dL/dlogp_l = -dL/dlogp_w,   z = beta * margin

    With probabilities p and weights n, dL/dlogp_w = -(beta n / sum n) (p sigma(-z) - (1 - p) sigma(z)).
    Source: Rafailov et al. 2023 (arXiv 2305.18290), section 4, "What does the DPO update do?".
    """
    # d log sigma(z)/dz = sigma(-z), d log sigma(-z)/dz = -sigma(z); dz/dlogp_w = beta, dz/dlogp_l = -beta
    beta = checked(beta, *plain(logp_w, logp_l, ref_logp_w, ref_logp_l))
    z = beta * ((logp_w - ref_logp_w) - (logp_l - ref_logp_l))
    correct, flipped, total = _label_weights(z, label_smoothing, probability, weight)
    gradient = -(beta / total) * (correct * sigma(-z) - flipped * sigma(z))
    return gradient, -gradient


def ipo_loss(logp_w: Any, logp_l: Any, ref_logp_w: Any, ref_logp_l: Any, beta: float = 0.1) -> PreferenceLoss:
    """Identity preference optimisation: the margin is pulled towards a finite value, however certain the labels are.

        L = mean((margin - 1/(2 beta))^2)

    `beta` is the paper's tau. Stationary: margin = 1/(2 beta).
    Source: Azar et al. 2023 (arXiv 2310.12036), equation 17.
    """
    beta = checked(beta, logp_w, logp_l, ref_logp_w, ref_logp_l)
    ratio_w = ops.sub(logp_w, ref_logp_w)
    ratio_l = ops.sub(logp_l, ref_logp_l)
    margin = ratio_w - ratio_l
    return PreferenceLoss(ops.mean((margin - 1 / (2 * beta)) ** 2), beta * ratio_w, beta * ratio_l, margin)


@gradient_of(ipo_loss)
def ipo_gradient(logp_w: Any, logp_l: Any, ref_logp_w: Any, ref_logp_l: Any, beta: float = 0.1) -> tuple[Array, Array]:
    """dL/dlogp_w and dL/dlogp_l of `ipo_loss`, in closed form: arrays in, arrays out.

    dL/dlogp_w = (2/B) (margin - 1/(2 beta)),   dL/dlogp_l = -dL/dlogp_w
    """
    # dL/dmargin = (2/B) (margin - 1/(2 beta)); dmargin/dlogp_w = 1, dmargin/dlogp_l = -1
    beta = checked(beta, *plain(logp_w, logp_l, ref_logp_w, ref_logp_l))
    margin = (logp_w - ref_logp_w) - (logp_l - ref_logp_l)
    gradient = (2 / getattr(margin, "size", 1)) * (margin - 1 / (2 * beta))
    return gradient, -gradient


def reference_free_loss(logp_w: Any, logp_l: Any, beta: float = 0.1, label_smoothing: float = 0.0) -> PreferenceLoss:
    """`dpo_loss` with a reference under which all responses are equally likely.

        L = -mean(log sigma(beta * margin)),   margin = logp_w - logp_l

    Nothing ties the policy to a trained model: the implicit KL penalty is towards the uniform distribution.
    Source: Rafailov et al. 2023 (arXiv 2305.18290), equation 7 with pi_ref constant.
    """
    uniform = _zeros_like(logp_w), _zeros_like(logp_l)  # a constant cancels in the margin
    return dpo_loss(logp_w, logp_l, *uniform, beta, label_smoothing)


@gradient_of(reference_free_loss)
def reference_free_gradient(
    logp_w: Any, logp_l: Any, beta: float = 0.1, label_smoothing: float = 0.0
) -> tuple[Array, Array]:
    """dL/dlogp_w and dL/dlogp_l of `reference_free_loss`, in closed form: arrays in, arrays out.

    dL/dlogp_w = -(beta/B) sigma(-z),   dL/dlogp_l = -dL/dlogp_w,   z = beta (logp_w - logp_l)
    """
    uniform = _zeros_like(logp_w), _zeros_like(logp_l)
    return dpo_gradient(logp_w, logp_l, *uniform, beta, label_smoothing)


@dataclass(frozen=True)
class Choice:
    """A loss of `LOSSES` by its name, with options: a function of the four log-probabilities and beta.

    It passes on those of these arguments, and of the responses' lengths, that the loss takes. Arguments with one entry
    per pair (`probability`, `weight`) are `labels`, passed on as they are, and cannot be options. Raises ValueError if
    there is no such loss or option, or if the loss needs more than a pair.
    """

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.name not in LOSSES:
            raise ValueError(f"there is no loss {self.name!r}: choose from {', '.join(LOSSES)}")
        taken = inspect.signature(LOSSES[self.name]).parameters
        if "logp_w" not in taken:
            raise ValueError(f"the loss {self.name} is not one of pairs: it takes {', '.join(list(taken)[:3])}")
        if getattr(LOSSES[self.name], "couples_pairs", False):
            raise ValueError(f"the loss {self.name} couples the pairs of a batch, which micro-batches and workers part")
        given = {"logp_w", "logp_l", "ref_logp_w", "ref_logp_l", "length_w", "length_l", "beta"}
        needed = [name for name, p in taken.items() if p.default is p.empty and name not in given]
        if needed:
            raise ValueError(f"the loss {self.name} needs the {needed[0]} of each pair, which the data does not have")
        known = [name for name in taken if name not in given | {"probability", "weight"}]
        for unknown in self.options.keys() - set(known):
            raise ValueError(f"the loss {self.name} has no option {unknown}: it has {', '.join(known) or 'none'}")

    def __call__(
        self, logp_w: Any, logp_l: Any, ref_logp_w: Any, ref_logp_l: Any, beta: float,
        length_w: Any = None, length_l: Any = None, **labels: Any,
    ) -> PreferenceLoss:  # fmt: skip
        given = {"logp_w": logp_w, "logp_l": logp_l, "ref_logp_w": ref_logp_w, "ref_logp_l": ref_logp_l, "beta": beta}
        given |= {"length_w": length_w, "length_l": length_l}
        loss = LOSSES[self.name]
        taken = inspect.signature(loss).parameters
        return loss(**{name: x for name, x in given.items() if name in taken}, **labels, **self.options)


# ---- arguments, checked and prepared ----------------------------------------------------------------------


def checked(beta: float, *logps: Any) -> float:
    """Refuse shapes that would broadcast, and a beta that is not positive; return beta as a float."""
    shapes = [logp.shape if hasattr(logp, "shape") else asarray(logp).shape for logp in logps]
    if len(set(shapes)) != 1:
        raise ValueError(f"the {len(logps)} log-probabilities must have one shape, not {', '.join(map(str, shapes))}")
    if len(shapes[0]) > 1:
        raise ValueError(
            f"a loss takes one log-probability per response, (B,), not {shapes[0]}: sum over the tokens first"
        )
    if shapes[0] == (0,):
        raise ValueError("there is no pair in the batch")
    if not 0 < beta < math.inf:
        raise ValueError(f"beta must be positive and finite, not {beta}")
    return float(beta)


def plain(*logps: Any) -> tuple[Any, ...]:
    """Return the arrays; a Tensor is refused, since no graph is built."""
    if any(isinstance(logp, Tensor) for logp in logps):
        raise TypeError("a gradient in closed form takes plain arrays: pass the .data of a Tensor")
    return logps


def _zeros_like(logp: Any) -> Any:
    data = logp.data if isinstance(logp, Tensor) else logp
    return array_module(data).zeros_like(data) if hasattr(data, "shape") else asarray(data) * 0.0


def sigma(z: Any) -> Any:
    """sigma(z) of a Tensor or, in a closed form, of an array."""
    y = ops.exp(ops.logsigmoid(z))
    return y if isinstance(z, Tensor) else y.data


def _label_weights(z: Any, label_smoothing: float, probability: Any, weight: Any) -> tuple[Array, Array, float]:
    """How much each label counts as correct, n p, and as flipped, n (1 - p), in the shape of z; and the sum of n."""
    xp, shape = array_module(z), getattr(z, "shape", ())
    if not 0 <= label_smoothing <= 0.5:
        raise ValueError(f"label_smoothing is a probability of at most 0.5, not {label_smoothing}")
    if label_smoothing and probability is not None:
        raise ValueError("label_smoothing and probability say the same thing: give only one")
    ones = array_module().ones(shape)
    p = (1 - label_smoothing) * ones if probability is None else to_host(asarray(probability))
    n = ones if weight is None else to_host(asarray(weight))
    for name, x in (("probability", p), ("weight", n)):
        if x.shape != shape:
            raise ValueError(f"{name} needs one number for each pair, {shape}, not {x.shape}")
    if not ((p >= 0) & (p <= 1)).all():
        raise ValueError("each probability must lie between 0 and 1")
    total = float(n.sum())
    if not ((n >= 0).all() and 0 < total < math.inf):
        raise ValueError("weights must be finite and at least 0, and at least one positive")
    dtype = getattr(z, "dtype", "float64")
    return xp.asarray(n * p, dtype=dtype), xp.asarray(n * (1 - p), dtype=dtype), total


def _weighted_mean(z: Tensor, correct: Array, flipped: Array, total: float) -> Tensor:
    """-sum_i [correct_i log sigma(z_i) + flipped_i log sigma(-z_i)] / total.

    A term of weight 0 is left out, not multiplied by 0: its log may be -inf.
    """
    xp, terms = array_module(correct), []
    for sign, weights in ((1.0, correct.reshape(-1)), (-1.0, flipped.reshape(-1))):
        counted = xp.flatnonzero(weights)
        if counted.size:
            z_counted = ops.reshape(z, weights.shape)[counted]
            terms.append(ops.sum(ops.logsigmoid(sign * z_counted) * weights[counted] / total))
    return -(terms[0] + terms[1] if len(terms) == 2 else terms[0])
