"""The commands, as functions: `minidpo dpo --beta 0.2` on the command line is `cli.dpo(beta=0.2)` in Python."""

from .card import card
from .desk import data, demo
from .look import displacement, explain, sample, score
from .measure import evaluate, judge
from .parser import main
from .prove import check, exact, frontier, invariances, oracles
from .table_of_losses import losses
from .train import dpo, import_, pretrain, resume, sft
from .verifying import doctor, verify

__all__ = ["card", "check", "data", "demo", "displacement", "doctor", "dpo", "evaluate", "exact", "explain", "frontier"]
__all__ += [
    "import_",
    "invariances",
    "judge",
    "losses",
    "main",
    "oracles",
    "pretrain",
    "resume",
    "sample",
    "score",
    "sft",
    "verify",
]
