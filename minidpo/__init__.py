"""minidpo: preference optimisation from scratch, every derivative in plain sight."""

from . import (
    checkpoint,
    exact,
    explain,
    generation,
    gradcheck,
    losses,
    model,
    ops,
    optim,
    preferences,
    scoring,
    training,
    world,
)
from .model import Config
from .tensor import Tensor

__all__ = [
    "Config",
    "Tensor",
    "checkpoint",
    "exact",
    "explain",
    "generation",
    "gradcheck",
    "losses",
    "model",
    "ops",
    "optim",
    "preferences",
    "scoring",
    "training",
    "world",
]
__version__ = "0.1.0"
