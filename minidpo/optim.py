"""Optimizers, gradient clipping and a learning-rate schedule.

An optimizer never writes into an array: it gives each parameter a new one. Anyone else who holds the old array,
a frozen reference for example, keeps its values.
"""

import math
from abc import ABC, abstractmethod
from typing import Any

from .backend import Array, array_module, to_host
from .tensor import Tensor


def number(name: str, value: float, below: float = math.inf) -> float:
    """A hyperparameter as a Python number; raises ValueError unless 0 <= value < below."""
    if not 0 <= value < below:
        raise ValueError(
            f"{name} must be at least 0 and {f'below {below}' if below < math.inf else 'finite'}, not {value}"
        )
    return float(value)


class Optimizer(ABC):
    """What the optimizers share; a subclass says how one parameter moves.

    Constants (`requires_grad=False`) and parameters whose `grad` is None stay where they are. A schedule may set
    `learning_rate` between steps.
    """

    def __init__(self, params: dict[str, Tensor], learning_rate: float):
        if len(set(params.values())) < len(params):
            raise ValueError("params has one tensor under two names, which would be moved twice: list it once")
        self.params = params
        self.learning_rate = learning_rate
        self.steps = 0  # so far
        self.state: dict[str, dict[str, Any]] = {}  # by parameter, then by the names in `update`

    @property
    def learning_rate(self) -> float:
        return self._learning_rate

    @learning_rate.setter
    def learning_rate(self, rate: float) -> None:
        self._learning_rate = number("learning_rate", rate)

    def step(self) -> None:
        """Move each parameter once, by its `grad`."""
        self.steps += 1
        for name, p in self.params.items():
            if p.requires_grad and p.grad is not None:
                xp = array_module(p.data)
                state = self.state.setdefault(name, {})
                p.data = xp.asarray(self.update(p.data, p.grad, state), dtype=p.dtype)

    def zero_grad(self) -> None:
        """Set every gradient to None; the next `backward` starts a new sum."""
        for p in self.params.values():
            p.grad = None

    @abstractmethod
    def update(self, p: Array, g: Array, state: dict[str, Any]) -> Array:
        """The new value of a parameter, from its value, gradient and own `state`."""


class SGD(Optimizer):
    """Gradient descent with momentum.

        u <- momentum u + g,   p <- p - learning_rate u

    Source: Polyak 1964; with the learning rate outside u, as in `torch.optim.SGD`.
    """

    def __init__(self, params: dict[str, Tensor], learning_rate: float, momentum: float = 0.0):
        super().__init__(params, learning_rate)
        self.momentum = number("momentum", momentum, below=1)

    def update(self, p: Array, g: Array, state: dict[str, Any]) -> Array:
        if self.momentum:
            g = state["u"] = self.momentum * state.get("u", 0.0) + g
        return p - self.learning_rate * g


class RMSprop(Optimizer):
    """Gradient descent in units of the gradient's recent size; the DPO paper's optimizer.

        v <- alpha v + (1 - alpha) g^2,   p <- p - learning_rate g / (sqrt(v) + eps)

    Source: Tieleman and Hinton 2012, lecture 6.5; eps outside the root, as in `torch.optim.RMSprop`.
    """

    def __init__(self, params: dict[str, Tensor], learning_rate: float, alpha: float = 0.99, eps: float = 1e-8):
        super().__init__(params, learning_rate)
        self.alpha, self.eps = number("alpha", alpha, below=1), number("eps", eps)

    def update(self, p: Array, g: Array, state: dict[str, Any]) -> Array:
        v = state["v"] = self.alpha * state.get("v", 0.0) + (1 - self.alpha) * (g * g)
        return p - self.learning_rate * g / (v**0.5 + self.eps)


class AdamW(Optimizer):
    """Adam with decoupled weight decay; t counts the parameter's own steps.

        m <- beta1 m + (1 - beta1) g,   v <- beta2 v + (1 - beta2) g^2
        p <- p - learning_rate (m/(1 - beta1^t) / (sqrt(v/(1 - beta2^t)) + eps) + weight_decay p)

    Source: Kingma and Ba 2015, algorithm 1; Loshchilov and Hutter 2019, algorithm 2, with their schedule multiplier
    inside `learning_rate`, as in `torch.optim.AdamW`.
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
        self.betas = number("beta1", betas[0], below=1), number("beta2", betas[1], below=1)
        self.eps, self.weight_decay = number("eps", eps), number("weight_decay", weight_decay)

    def update(self, p: Array, g: Array, state: dict[str, Any]) -> Array:
        beta1, beta2 = self.betas
        t = state["t"] = state.get("t", 0) + 1
        m = state["m"] = beta1 * state.get("m", 0.0) + (1 - beta1) * g
        v = state["v"] = beta2 * state.get("v", 0.0) + (1 - beta2) * (g * g)
        m_hat = m / (1 - beta1**t)
        v_hat = v / (1 - beta2**t)
        return p - self.learning_rate * (m_hat / (v_hat**0.5 + self.eps) + self.weight_decay * p)


def clip_global_norm(params: dict[str, Tensor], max_norm: float) -> float:
    """Scale all gradients by one factor so that their joint norm is at most `max_norm`; return the norm before.

        g <- g min(1, max_norm/|g|),   |g|^2 = the sum over all parameters and entries

    Raises FloatingPointError, with the parameters' names, if a gradient is not finite.
    Source: Pascanu et al. 2013 (arXiv 1211.5063), algorithm 1.
    """
    if not max_norm >= 0:
        raise ValueError(f"max_norm must be at least 0, not {max_norm}")
    graded = {p: name for name, p in params.items() if p.grad is not None}  # a tensor with two names counts once
    if not graded:
        return 0.0
    squares = [(p.grad.astype("float64") ** 2).sum() for p in graded]
    squares = to_host(array_module(*squares).stack(squares)).tolist()  # a device waits once, not once each
    culprits = [name for name, square in zip(graded.values(), squares) if not math.isfinite(square)]
    if culprits:
        finite = all(array_module(p.grad).isfinite(p.grad).all() for p in graded)
        more = f" and {len(culprits) - 3} more" if len(culprits) > 3 else ""
        fault = "has a norm beyond the largest float64" if finite else "is not finite"
        raise FloatingPointError(f"the gradient {fault} in {', '.join(culprits[:3])}{more}")
    norm = math.sqrt(math.fsum(squares))
    if norm > max_norm:
        for p in graded:
            p.grad = p.grad * float(max_norm / norm)
    return norm


def warmup_cosine(step: int, total_steps: int, peak: float, warmup_steps: int = 0, final: float = 0.0) -> float:
    """Learning rate of one step, counted from 0: a line up to `peak`, then half a cosine down towards `final`.

        step < warmup_steps:  peak (step + 1)/warmup_steps, so that no step has rate 0
        after:                final + (peak - final) (1 + cos(pi s))/2,
                              s = (step - warmup_steps)/(total_steps - warmup_steps), at most 1

    Source: Loshchilov and Hutter 2017 (arXiv 1608.03983), equation 5, without restarts.
    """
    if step < warmup_steps:
        return float(peak * (step + 1) / warmup_steps)
    s = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
    return float(final + (peak - final) * 0.5 * (1 + math.cos(math.pi * s)))
