"""minidpo: preference optimisation from scratch, every derivative in plain sight."""

from . import explain, family, generation, gradcheck, losses, model, ops, optim, scoring, training
from .data import preferences, world
from .model import Config
from .run import checkpoint
from .tensor import Tensor
from .theory import exact

__all__ = [
    "Config",
    "Tensor",
    "checkpoint",
    "exact",
    "explain",
    "family",
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
__version__ = "0.2.0"
