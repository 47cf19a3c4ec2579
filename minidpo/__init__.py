"""minidpo: preference optimisation from scratch, every derivative in plain sight."""

from . import checkpoint, exact, generation, gradcheck, losses, model, ops, optim, scoring, training
from .model import Config
from .tensor import Tensor

__all__ = [
    "Config",
    "Tensor",
    "checkpoint",
    "exact",
    "generation",
    "gradcheck",
    "losses",
    "model",
    "ops",
    "optim",
    "scoring",
    "training",
]
__version__ = "0.1.0"
