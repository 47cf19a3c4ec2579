"""Hypothesis profiles, a stand-in for CuPy, what commands are tried on, and no lines or pictures of how far a run is.

`pytest --hypothesis-profile=thorough` draws new inputs each time. The other profiles repeat theirs, so only a change
of the code changes the outcome.
"""

import math
import os
import sys

import pytest
from hypothesis import settings

from device_double import cupy as double
from minidpo.audit import replies
from minidpo.cli import train
from minidpo.run import report, tasks
from twin import prepared

settings.register_profile("dev", max_examples=20, derandomize=True, deadline=None)
settings.register_profile("ci", max_examples=30, derandomize=True, deadline=None)
settings.register_profile("thorough", max_examples=2000, derandomize=False, deadline=None, print_blob=True)
settings.load_profile("ci" if os.environ.get("CI") else "dev")


@pytest.fixture(autouse=True)
def no_progress(monkeypatch):
    """Without lines that only a slow machine prints, so that tests can say what is on stderr."""
    monkeypatch.setattr(tasks, "SILENCE", math.inf)


@pytest.fixture(scope="session", autouse=True)
def no_curves():
    """Runs without their picture, which takes longer than most of them; a test of it gives `installed` back."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "installed", lambda: False)
        yield


@pytest.fixture
def cupy(monkeypatch):
    """The device double, imported as `cupy`."""
    monkeypatch.setitem(sys.modules, "cupy", double)
    return double


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A folder of small models and data, made once for the tests of a file."""
    return prepared(tmp_path_factory.mktemp("root"))


@pytest.fixture
def one_process(monkeypatch):
    """Training without workers, which would cost a short run most of its time."""
    for module in (train, replies):
        monkeypatch.setattr(module, "worker_count", lambda params: 1)
