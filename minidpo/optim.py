"""Optimizers, gradient clipping and a learning-rate schedule.

An optimizer never writes into an array: it gives each parameter a new one. Whoever else holds the old
array, a frozen reference say, keeps it as it was.
"""

import math
from abc import ABC, abstractmethod
from typing import Any

from .backend import Array, array_module, to_host
from .tensor import Tensor


class Optimizer(ABC):
    """What all optimizers share; a subclass says how one parameter moves.

    Parameters
    ----------
    params : dict of str to Tensor
        Constants (`requires_grad=False`) never move, nor does a parameter whose `grad` is None.
    learning_rate : float
        May be set between steps; a schedule does.

    Raises
    ------
    ValueError
        If one tensor stands under two names: it would be moved twice.
    """

    def __init__(self, params: dict[str, Tensor], learning_rate: float):
        if len(set(params.values())) < len(params):
            raise ValueError("one tensor stands under two names in params, and would be moved twice: list it once")
        self.params = params
        self.learning_rate = learning_rate
        self.steps = 0  # taken so far
        self.state: dict[str, dict[str, Any]] = {}  # by parameter, then by the names in `update`

    def step(self) -> None:
        """Move every parameter once, by its `grad`."""
        self.steps += 1
        for name, p in self.params.items():
            if p.requires_grad and p.grad is not None:
                xp = array_module(p.data)
                state = self.state.setdefault(name, {})
                p.data = xp.asarray(self.update(p.data, p.grad, state), dtype=p.dtype)

    def zero_grad(self) -> None:
        """Forget every gradient; the next `backward` starts a new sum."""
        for p in self.params.values():
            p.grad = None

    @abstractmethod
    def update(self, p: Array, g: Array, state: dict[str, Any]) -> Array:
        """The parameter after this step, from its value and gradient; `state` is the parameter's own."""


class SGD(Optimizer):
    """Gradient descent with momentum.

        u <- momentum u + g,   p <- p - learning_rate u

    References
    ----------
    Polyak 1964; in this form, with the learning rate outside u, PyTorch's `torch.optim.SGD`.
    """

    def __init__(self, params: dict[str, Tensor], learning_rate: float, momentum: float = 0.0):
        super().__init__(params, learning_rate)
        self.momentum = float(momentum)

    def update(self, p: Array, g: Array, state: dict[str, Any]) -> Array:
        if self.momentum:
            g = state["u"] = self.momentum * state.get("u", 0.0) + g
        return p - self.learning_rate * g


class RMSprop(Optimizer):
    """Gradient descent in units of the gradient's recent size; the optimizer of the DPO paper.

        v <- alpha v + (1 - alpha) g^2,   p <- p - learning_rate g / (sqrt(v) + eps)

    References
    ----------
    Tieleman and Hinton 2012, lecture 6.5; eps outside the root as in `torch.optim.RMSprop`.
    """

    def __init__(self, params: dict[str, Tensor], learning_rate: float, alpha: float = 0.99, eps: float = 1e-8):
        super().__init__(params, learning_rate)
        self.alpha, self.eps = float(alpha), float(eps)

    def update(self, p: Array, g: Array, state: dict[str, Any]) -> Array:
        v = state["v"] = self.alpha * state.get("v", 0.0) + (1 - self.alpha) * (g * g)
        return p - self.learning_rate * g / (v**0.5 + self.eps)


class AdamW(Optimizer):
    """Adam with decoupled weight decay, t counting the parameter's own steps.

        m <- beta1 m + (1 - beta1) g,   v <- beta2 v + (1 - beta2) g^2
        p <- p - learning_rate (m/(1 - beta1^t) / (sqrt(v/(1 - beta2^t)) + eps) + weight_decay p)

    References
    ----------
    Kingma and Ba 2015, algorithm 1; Loshchilov and Hutter 2019, algorithm 2, with their schedule
    multiplier inside `learning_rate`, as in `torch.optim.AdamW`.
    """

    def __init__(
        self,
        params: dict[str, Tensor],
        learning_rate: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
    ):
        super().__init__(params, learning_rate)
        self.betas, self.eps, self.weight_decay = (float(betas[0]), float(betas[1])), float(eps), float(weight_decay)

    def update(self, p: Array, g: Array, state: dict[str, Any]) -> Array:
        beta1, beta2 = self.betas
        t = state["t"] = state.get("t", 0) + 1
        m = state["m"] = beta1 * state.get("m", 0.0) + (1 - beta1) * g
        v = state["v"] = beta2 * state.get("v", 0.0) + (1 - beta2) * (g * g)
        m_hat = m / (1 - beta1**t)
        v_hat = v / (1 - beta2**t)
        return p - self.learning_rate * (m_hat / (v_hat**0.5 + self.eps) + self.weight_decay * p)


def clip_global_norm(params: dict[str, Tensor], max_norm: float) -> float:
    """Scale all gradients by one factor so that their norm, taken together, is at most `max_norm`.

        g <- g min(1, max_norm/|g|),   |g|^2 = the sum over all parameters and entries

    Returns
    -------
    float
        The norm before clipping.

    Raises
    ------
    FloatingPointError
        If a gradient is not finite; the message names the parameters at fault.
    ValueError
        If `max_norm` is negative or nan.

    References
    ----------
    Pascanu et al. 2013 (arXiv 1211.5063), algorithm 1.
    """
    if not max_norm >= 0:
        raise ValueError(f"max_norm must be at least 0, not {max_norm}")
    graded = {p: name for name, p in params.items() if p.grad is not None}  # a tensor with two names counts once
    if not graded:
        return 0.0
    squares = [(p.grad.astype("float64") ** 2).sum() for p in graded]
    squares = to_host(array_module(*squares).stack(squares)).tolist()  # a device stops once, not for each
    culprits = [name for name, square in zip(graded.values(), squares) if not math.isfinite(square)]
    if culprits:
        raise FloatingPointError(f"the gradient is not finite in {', '.join(culprits)}")
    norm = math.sqrt(math.fsum(squares))
    if norm > max_norm:
        for p in graded:
            p.grad = p.grad * float(max_norm / norm)
    return norm


def warmup_cosine(step: int, total_steps: int, peak: float, warmup_steps: int = 0, final: float = 0.0) -> float:
    """Learning rate of one step: a line up to `peak`, then half a cosine down towards `final`.

        step < warmup_steps:  peak (step + 1)/warmup_steps
        after:                final + (peak - final) (1 + cos(pi s))/2,
                              s = (step - warmup_steps)/(total_steps - warmup_steps), at most 1

    Parameters
    ----------
    step : int
        Counted from 0, so that no step is taken at rate 0.
    total_steps, warmup_steps : int
        Length of the whole run and of the line up.
    peak, final : float
        Learning rates at the end of the line and at the end of the run.

    References
    ----------
    Loshchilov and Hutter 2017 (arXiv 1608.03983), equation 5, without restarts.
    """
    if step < warmup_steps:
        return float(peak * (step + 1) / warmup_steps)
    s = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
    return float(final + (peak - final) * 0.5 * (1 + math.cos(math.pi * s)))
