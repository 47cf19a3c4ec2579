"""Which array library an array belongs to, what is accepted as an array, and fast sums.

The array decides: every formula is written against `xp = array_module(x)`, so the same line runs on the host and on a
GPU. No other file knows that CuPy exists, and it is imported only when a device is asked for.
"""

import functools
import importlib
import numbers
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any, NoReturn

import numpy

Array = Any  # a numpy.ndarray or a cupy.ndarray


class DeviceError(RuntimeError):
    """The requested device cannot be used; the message says what is missing and what to install."""


def array_module(*operands: Any) -> Any:
    """`cupy` if one of the operands is CuPy's, else `numpy`."""
    cupy = sys.modules.get("cupy")
    return cupy if cupy and any(isinstance(x, cupy.ndarray) for x in operands) else numpy


def device_fault(error: BaseException) -> bool:
    """Whether an error came from the device or its driver, not from our code."""
    return isinstance(error, DeviceError) or type(error).__module__.partition(".")[0] in ("cupy", "cupy_backends")


def on_host(x: Any) -> bool:
    """Whether the values of `x` can be read at no cost: reading them from a device makes it stop first."""
    return array_module(x) is numpy


def to_host(x: Any) -> numpy.ndarray:
    """The array in NumPy, copied from the device if it is on one."""
    return x if on_host(x) else x.get()


# ---- what is accepted as an array --------------------------------------------------------------------------

NUMBERS = "?bhilqBHILQfdgFDG"  # NumPy's letters for booleans, integers, and floats and complex numbers from 32 bits


def refuse_dtype(x: Any) -> NoReturn:
    """Say why an array whose type is not in `NUMBERS` is refused: a mean of 40,000 twos is inf in float16."""
    if "float" in str(x.dtype):  # float16, bfloat16, float8
        raise TypeError(f'{x.dtype} is too narrow for sums and squares: convert the array with .astype("float32")')
    raise TypeError(f"expected an array of numbers, got {type(x).__name__} of {x.dtype}")


def asarray(x: Any) -> Array:
    """An array as it is; anything else (a number, a list, another library's array on the host) as a NumPy array.

    Raises TypeError if `x` does not consist of numbers, is narrower than float32, or is on a device or in a graph of
    another library.
    """
    try:
        array = x if type(x) is numpy.ndarray else array_module(x).asarray(x)
    except Exception as error:
        if hasattr(x, "dtype") and type(x).__module__.partition(".")[0] not in ("numpy", "cupy", "minidpo"):
            raise TypeError(
                f"NumPy cannot read this {type(x).__module__}.{type(x).__name__} of {x.dtype}: convert it first, as "
                "with .detach().float().cpu().numpy() in PyTorch; inside a traced function (jax.grad) there are no "
                "numbers to read"
            ) from error
        raise
    if array.dtype.char not in NUMBERS:
        refuse_dtype(x if hasattr(x, "dtype") else array)
    return array


def index_array(index: Any, size: int, xp: Any) -> Array:
    """A copy of the indices in `xp`, after a check that each is an integer and 0 <= index < size.

    The check is needed because a negative index wraps around in NumPy, and every index does in CuPy. Indices that
    are on a device already are not checked: reading them would make the device wait. The copy is needed because the
    caller may refill an array before the backward pass.
    """
    if not on_host(index):
        return index.copy()
    index = asarray(index)
    if index.size == 0:
        index = index.astype(int)  # an empty list has no type of its own
    if index.dtype.kind not in "iu":
        raise TypeError(f"an index must be an integer, not {index.dtype}")
    outside = (index < 0) | (index >= size)
    if outside.any():
        where = tuple(int(i) for i in numpy.argwhere(outside)[0])
        raise IndexError(f"index {index[where]} at position {where} is outside 0 <= index < {size}")
    return xp.array(index)


def own_key(key: Any, xp: Any) -> Any:
    """A key for indexing that the caller cannot change any more: lists and arrays in it are copied, to `xp`.

    An empty list counts as integers, as in NumPy.
    """
    if isinstance(key, tuple):
        return tuple(own_key(part, xp) for part in key)
    if isinstance(key, numbers.Number) or not (isinstance(key, list) or hasattr(key, "dtype")):
        return key  # an integer, a slice, None, ...: nothing to change
    key = xp.array(key)
    return key.astype(int) if key.size == 0 and key.dtype.kind == "f" else key


# ---- pieces, fast sums ------------------------------------------------------------------------------------

PIECE = 2**15  # entries; the arrays between two lines of a formula then stay in the processor's cache


def in_pieces(function: Callable[[Array], tuple[Array, Array]], x: Array) -> tuple[Array, Array]:
    """`function(x)` for a function of single entries that returns two arrays, computed `PIECE` entries at a time."""
    if x.size <= PIECE or not on_host(x):
        return function(x)
    flat, (y, z) = x.reshape(-1), (numpy.empty(x.size, dtype=x.dtype) for _ in range(2))
    for start in range(0, x.size, PIECE):
        piece = slice(start, start + PIECE)
        y[piece], z[piece] = function(flat[piece])
    return y.reshape(x.shape), z.reshape(x.shape)


@functools.cache
def ones(xp: Any, n: int, dtype: Any) -> Array:
    """A column of n ones, made once."""
    return xp.ones((n, 1), dtype=dtype)


def row_sum(x: Array) -> Array:
    """The sum of each row, as a product with ones: faster for rows as short as a model's.  (..., C) -> (..., 1)"""
    return x @ ones(array_module(x), x.shape[-1], x.dtype)


def row_mean(x: Array) -> Array:
    """The mean of each row.  (..., C) -> (..., 1)"""
    return row_sum(x) / x.shape[-1]


def column_sum(x: Array) -> Array:
    """The sum of all rows, as a product with ones: faster for many short rows.  (N, C) -> (C,)"""
    return array_module(x).ones(x.shape[0], dtype=x.dtype) @ x


# ---- devices ----------------------------------------------------------------------------------------------


def device_module(device: str) -> ModuleType:
    """The array library of a device by name: `numpy` for "cpu", `cupy` for "cuda".

    Raises DeviceError if CuPy is missing or finds no device (`import cupy` succeeds without a driver).
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
        missing = "there is no GPU" if "NoDevice" in fault else "it finds no driver: install NVIDIA's"
        raise DeviceError(
            f"CuPy {cupy.__version__} is installed but {missing} ({fault}); see what `nvidia-smi` lists, "
            'or use device "cpu"'
        )
    return cupy
