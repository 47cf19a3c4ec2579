"""Which library an array belongs to, what is checked on the host, and what is said where no GPU is."""

import builtins
import sys
import types

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minidpo import backend


def test_the_array_decides(cupy):
    """Otherwise an array meets functions of another library than its own."""
    on_device = cupy.asarray(np.ones(2))
    assert backend.array_module(np.ones(2)) is np and backend.array_module(np.float32(1)) is np
    assert backend.array_module(2.0) is np and backend.array_module() is np and backend.array_module([1]) is np
    assert backend.array_module(on_device) is cupy and backend.array_module(2.0, on_device) is cupy
    assert backend.on_host(np.ones(2)) and not backend.on_host(on_device)


def test_importing_minidpo_does_not_import_cupy():
    """Otherwise a laptop without a GPU pays for one at every start."""
    assert "minidpo" in sys.modules and "cupy" not in sys.modules


@given(values=st.lists(st.integers(-2, 6), max_size=5), size=st.integers(0, 5))
def test_indices_are_checked_on_the_host(values, size):
    """Otherwise a token id outside the vocabulary picks some other token's row."""
    index = np.array(values, dtype=int)
    bad = [i for i, v in enumerate(values) if v < 0 or v >= size]
    if not bad:
        assert (backend.index_array(index, size, np) == index).all()
        return
    with pytest.raises(IndexError) as caught:
        backend.index_array(index, size, np)
    assert str(caught.value) == f"index {values[bad[0]]} at position ({bad[0]},) is outside 0 <= index < {size}"


def test_checked_indices_are_uploaded_and_then_trusted(cupy):
    """Otherwise each step would read its tokens back from the device."""
    uploaded = backend.index_array([0, 2], 3, cupy)
    assert isinstance(uploaded, cupy.ndarray)
    assert backend.index_array(uploaded, 1, cupy) is uploaded
    with pytest.raises(IndexError, match="index 3 at"):
        backend.index_array([0, 3], 3, cupy)


@pytest.mark.parametrize("index", [[0.0], np.array([True]), [0, 1.5]])
def test_an_index_is_an_integer(index):
    """Otherwise a mask passes for token ids."""
    with pytest.raises(TypeError, match="must be an integer, not"):
        backend.index_array(index, 3, np)


def test_cpu_is_numpy():
    """Otherwise the default would need a choice."""
    assert backend.device_module("cpu") is np


def test_an_unknown_device_is_refused():
    """Otherwise a typing error would run on the CPU, slowly and in silence."""
    with pytest.raises(ValueError, match='must be "cpu" or "cuda", not \'gpu\''):
        backend.device_module("gpu")


def test_cuda_is_cupy(cupy):
    """Otherwise a GPU that is there would not be used."""
    assert backend.device_module("cuda") is cupy


def test_missing_cupy_is_said(monkeypatch):
    """Otherwise an ImportError leaves the reader to guess which of CuPy's wheels to install."""
    real = builtins.__import__

    def without_cupy(name, *args, **kwargs):
        if name == "cupy":
            raise ModuleNotFoundError("No module named 'cupy'")
        return real(name, *args, **kwargs)

    monkeypatch.delitem(sys.modules, "cupy", raising=False)
    monkeypatch.setattr(backend.importlib, "import_module", without_cupy)
    with pytest.raises(backend.DeviceError, match=r'needs CuPy.*"minidpo\[cuda13\]".*"minidpo\[cuda12\]"') as caught:
        backend.device_module("cuda")
    assert str(caught.value).count(". ") == 0  # one sentence


@pytest.mark.parametrize("found", ["cudaErrorInsufficientDriver", "cudaErrorNoDevice", 0])
def test_missing_driver_or_device_is_said(monkeypatch, cupy, found):
    """Otherwise CuPy, which imports without a driver, fails at the first array, deep in some op."""

    def count():
        if found:
            raise cupy.cuda.runtime.CUDARuntimeError(found)
        return 0

    runtime = types.SimpleNamespace(getDeviceCount=count, CUDARuntimeError=cupy.cuda.runtime.CUDARuntimeError)
    monkeypatch.setattr(cupy, "cuda", types.SimpleNamespace(runtime=runtime))
    sentence = {
        "cudaErrorInsufficientDriver": "it reaches no driver.*cudaErrorInsufficientDriver",
        "cudaErrorNoDevice": "there is no GPU",
        0: "there is no GPU",
    }[found]
    with pytest.raises(backend.DeviceError, match=f'CuPy double is installed but {sentence}.*device "cpu"'):
        backend.device_module("cuda")
