"""Which array library an array belongs to. No other file knows that CuPy exists.

The array decides: every formula is written against `xp = array_module(x)`, so the same line
runs on the host and on a GPU. CuPy is imported when a device is asked for, not before.
"""

import importlib
import sys
from types import ModuleType
from typing import Any

import numpy

Array = Any  # a numpy.ndarray or a cupy.ndarray


class DeviceError(RuntimeError):
    """The requested device cannot be used; the message says what is missing and what to install."""


def array_module(*operands: Any) -> Any:
    """`cupy` if one of the operands is CuPy's, else `numpy`."""
    cupy = sys.modules.get("cupy")
    return cupy if cupy and any(isinstance(x, cupy.ndarray) for x in operands) else numpy


def device_fault(error: BaseException) -> bool:
    """Whether an error came from a device or the way to it, and not from what was asked of it."""
    return isinstance(error, DeviceError) or type(error).__module__.partition(".")[0] in ("cupy", "cupy_backends")


def on_host(x: Any) -> bool:
    """Whether looking at the values of `x` is free: not on a device, which would have to stop first."""
    return array_module(x) is numpy


def asarray(x: Any) -> Array:
    """An array as it is; anything else (a number, a list) as a NumPy array of numbers.

    Raises
    ------
    TypeError
        If `x` is not made of numbers.
    """
    array = x if type(x) is numpy.ndarray else array_module(x).asarray(x)
    if array.dtype.kind not in "biufc":
        raise TypeError(f"expected an array of numbers, got {type(x).__name__}")
    return array


def to_host(x: Any) -> numpy.ndarray:
    """The array in NumPy, copied from the device if it is on one."""
    return x if on_host(x) else x.get()


def index_array(index: Any, size: int, xp: Any) -> Array:
    """Indices checked on the host, 0 <= index < size, and then uploaded to `xp`.

    What is on a device already is trusted: reading it back would stop the device. The check is needed
    because a negative index wraps around in NumPy, and every index does in CuPy.

    Parameters
    ----------
    index : array or list of integers
    size : int
        Number of things there are to choose from.
    xp : module
        Array library that the indices are going to meet.

    Raises
    ------
    TypeError
        If the indices are not integers.
    IndexError
        If one of them lies outside; the message names the first, where it stands, and the range.
    """
    if not on_host(index):
        return index
    index = asarray(index)
    if index.size == 0:
        index = index.astype(int)  # an empty list says nothing of its kind
    if index.dtype.kind not in "iu":
        raise TypeError(f"an index must be an integer, not {index.dtype}")
    outside = (index < 0) | (index >= size)
    if outside.any():
        where = tuple(int(i) for i in numpy.argwhere(outside)[0])
        raise IndexError(f"index {index[where]} at position {where} is outside 0 <= index < {size}")
    return xp.asarray(index)


def device_module(device: str) -> ModuleType:
    """The array library of a device by name: `numpy` for "cpu", `cupy` for "cuda".

    Raises
    ------
    DeviceError
        If CuPy is not installed, or sees no device (`import cupy` succeeds without a driver).
    ValueError
        If the device is neither.
    """
    if device == "cpu":
        return numpy
    if device != "cuda":
        raise ValueError(f'device must be "cpu" or "cuda", not {device!r}')
    try:
        cupy = importlib.import_module("cupy")
    except ImportError as error:
        raise DeviceError(
            f'device "cuda" needs CuPy, which cannot be imported ({error}): install '
            '"minidpo[cuda13]", or "minidpo[cuda12]" for an older driver'
        ) from error
    try:
        count, fault = cupy.cuda.runtime.getDeviceCount(), "cudaErrorNoDevice"
    except cupy.cuda.runtime.CUDARuntimeError as error:
        count, fault = 0, str(error)
    if count == 0:
        missing = "there is no GPU" if "NoDevice" in fault else "it reaches no driver: install NVIDIA's"
        raise DeviceError(
            f"CuPy {cupy.__version__} is installed but {missing} ({fault}); see what nvidia-smi lists, "
            'or use device "cpu"'
        )
    return cupy
