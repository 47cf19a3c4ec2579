"""The library that an array belongs to, checks on the host, fast sums, and messages where there is no GPU."""

import builtins
import sys
import types

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minidpo import backend


def test_the_array_decides(cupy):
    """The library of an array decides which functions it meets."""
    on_device = cupy.asarray(np.ones(2))
    assert backend.array_module(np.ones(2)) is np and backend.array_module(np.float32(1)) is np
    assert backend.array_module(2.0) is np and backend.array_module() is np and backend.array_module([1]) is np
    assert backend.array_module(on_device) is cupy and backend.array_module(2.0, on_device) is cupy
    assert backend.on_host(np.ones(2)) and not backend.on_host(on_device)


def test_importing_minidpo_does_not_import_cupy():
    """Importing minidpo does not import CuPy."""
    assert "minidpo" in sys.modules and "cupy" not in sys.modules


@given(values=st.lists(st.integers(-2, 6), max_size=5), size=st.integers(0, 5))
def test_indices_are_checked_on_the_host(values, size):
    """Indices on the host are checked; the message names the first one outside."""
    index = np.array(values, dtype=int)
    bad = [i for i, v in enumerate(values) if v < 0 or v >= size]
    if not bad:
        assert (backend.index_array(index, size, np) == index).all()
        return
    with pytest.raises(IndexError) as caught:
        backend.index_array(index, size, np)
    assert str(caught.value) == f"index {values[bad[0]]} at position ({bad[0]},) is outside 0 <= index < {size}"


def test_checked_indices_are_uploaded_and_then_trusted(cupy):
    """Indices are checked before they are uploaded, and trusted on the device: reading them back would stop it."""
    uploaded = backend.index_array([0, 2], 3, cupy)
    assert isinstance(uploaded, cupy.ndarray)
    trusted = backend.index_array(uploaded, 1, cupy)
    assert isinstance(trusted, cupy.ndarray) and trusted.get().tolist() == [0, 2]
    with pytest.raises(IndexError, match="index 3 at"):
        backend.index_array([0, 3], 3, cupy)


@pytest.mark.parametrize("index", [[0.0], np.array([True]), [0, 1.5]])
def test_an_index_is_an_integer(index):
    """An index is an integer: a mask is not a list of token ids."""
    with pytest.raises(TypeError, match="must be an integer, not"):
        backend.index_array(index, 3, np)


def test_indices_are_copied(cupy):
    """Indices and keys are copies: the caller may refill an array before the backward pass."""
    host, device = np.array([0, 2]), cupy.asarray(np.array([0, 2]))
    for xp, index in ((np, host), (cupy, device)):
        ours = [backend.index_array(index, 3, xp), backend.own_key(index, xp), backend.own_key((index, None), xp)[0]]
        index[0] = 1
        assert [backend.to_host(x).tolist() for x in ours] == [[0, 2]] * 3
        index[0] = 0
    assert isinstance(backend.own_key(host, cupy), cupy.ndarray)
    key = (1, slice(2), None, ..., np.int64(3))
    assert backend.own_key(key, np) == key


@pytest.mark.parametrize("dtype", ["bfloat16", "float8_e4m3fn", "float16"])
def test_narrow_floats_are_refused(dtype):
    """Types narrower than float32 are refused, also those that NumPy does not know, with the remedy."""

    class Named:
        char = "E"

        def __str__(self):
            return dtype

    with pytest.raises(TypeError, match=rf"{dtype} is too narrow"):
        backend.refuse_dtype(types.SimpleNamespace(dtype=Named()))


@pytest.mark.parametrize("x", [np.array([None]), np.array(["a"]), "a", [None], np.array([1], "M8[s]")])
def test_only_numbers_are_arrays(x):
    """Objects, texts and dates are refused."""
    with pytest.raises(TypeError, match="expected an array of numbers"):
        backend.asarray(x)


@given(seed=st.integers(0, 99), shape=st.tuples(st.integers(0, 3), st.integers(1, 5), st.integers(1, 4)))
def test_fast_sums_are_sums(seed, shape):
    """Sums as products with ones are sums, and a mean is a sum over its number of entries."""
    x = np.random.default_rng(seed).normal(size=shape)
    np.testing.assert_allclose(backend.row_sum(x), x.sum(axis=-1, keepdims=True), atol=1e-14)
    np.testing.assert_allclose(backend.row_mean(x), x.mean(axis=-1, keepdims=True), atol=1e-14)
    np.testing.assert_allclose(backend.column_sum(x[..., 0]), x[..., 0].sum(axis=0), atol=1e-14)


def test_cpu_is_numpy():
    """The device "cpu" is NumPy."""
    assert backend.device_module("cpu") is np


def test_an_unknown_device_is_refused():
    """An unknown device is refused."""
    with pytest.raises(ValueError, match='must be "cpu" or "cuda", not \'gpu\''):
        backend.device_module("gpu")


def test_cuda_is_cupy(cupy):
    """The device "cuda" is CuPy."""
    assert backend.device_module("cuda") is cupy


def test_missing_cupy_is_reported(monkeypatch):
    """If CuPy is missing, the message says which package to install."""
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


@pytest.mark.parametrize("fault", ["cudaErrorInsufficientDriver", "cudaErrorNoDevice", 0])
def test_missing_driver_or_device_is_reported(monkeypatch, cupy, fault):
    """If there is no driver or no device, the message says so before the first array."""

    def count():
        if fault:
            raise cupy.cuda.runtime.CUDARuntimeError(fault)
        return 0

    runtime = types.SimpleNamespace(getDeviceCount=count, CUDARuntimeError=cupy.cuda.runtime.CUDARuntimeError)
    monkeypatch.setattr(cupy, "cuda", types.SimpleNamespace(runtime=runtime))
    sentence = {
        "cudaErrorInsufficientDriver": "it finds no driver.*cudaErrorInsufficientDriver",
        "cudaErrorNoDevice": "there is no GPU",
        0: "there is no GPU",
    }[fault]
    with pytest.raises(backend.DeviceError, match=f'CuPy double is installed but {sentence}.*device "cpu"'):
        backend.device_module("cuda")
