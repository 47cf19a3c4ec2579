"""Verify anybody's preference optimisation against oracles that are independent of it: see this folder's README.md."""

from .doctor import doctor as doctor
from .logprob_check import labels as labels
from .logprob_check import logprobs as logprobs
from .loss_check import loss as loss
from .report import Finding as Finding
from .report import Report as Report
from .step_check import step as step
