"""minidpo: preference optimisation from scratch, every derivative in plain sight."""

from . import gradcheck, losses, ops, optim
from .tensor import Tensor

__all__ = ["Tensor", "gradcheck", "losses", "ops", "optim"]
__version__ = "0.1.0"
