"""Hypothesis profiles, and a stand-in for CuPy.

`pytest --hypothesis-profile=thorough` draws new inputs each time. The other profiles repeat theirs, so only a change
of the code changes the outcome.
"""

import os
import sys

import pytest
from hypothesis import settings

from device_double import cupy as double

settings.register_profile("dev", max_examples=20, derandomize=True, deadline=None)
settings.register_profile("ci", max_examples=100, derandomize=True, deadline=None)
settings.register_profile("thorough", max_examples=2000, derandomize=False, deadline=None, print_blob=True)
settings.load_profile("ci" if os.environ.get("CI") else "dev")


@pytest.fixture
def cupy(monkeypatch):
    """The device double, imported as `cupy`."""
    monkeypatch.setitem(sys.modules, "cupy", double)
    return double
