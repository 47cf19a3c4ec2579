"""minidpo: preference optimisation from scratch, every derivative in plain sight."""

import sys

try:
    from . import audit, explain, family, generation, gradcheck, losses, model, ops, optim, scoring, training, verify
    from .data import preferences, world
    from .model import Config
    from .run import checkpoint
    from .tensor import Tensor
    from .theory import exact
except KeyboardInterrupt:
    if sys.argv[0] == "-m" or sys.argv[0].endswith("minidpo"):  # Ctrl-C, and the command line is about to start
        raise SystemExit(130) from None
    raise

__all__ = [
    "Config",
    "Tensor",
    "audit",
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
    "verify",
    "world",
]
__version__ = "0.2.0"
