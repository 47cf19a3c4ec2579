"""A device without a GPU: NumPy behind CuPy's rules, slightly stricter.

As in CuPy, an array is not converted to NumPy implicitly, does no arithmetic with a NumPy array and is not indexed by
one; reductions give 0-d arrays, never scalars. Unlike CuPy, it also refuses `bool`, `int`, `float` and iteration, which
make a device wait for its results. `.item()` and `.get()` are explicit and allowed. Only names that CuPy has exist.
"""

import operator
import types

import numpy as np


def host(x):
    """The NumPy array of an operand; refuses an operand that is not on the device."""
    if isinstance(x, ndarray):
        return x.on_host
    if isinstance(x, np.ndarray | list):
        raise TypeError(f"Unsupported type {type(x)}")
    return tuple(host(part) for part in x) if isinstance(x, tuple) else x


def device(x):
    return ndarray(np.asarray(x))


class ndarray:
    __module__ = "cupy"
    __array_ufunc__ = None

    def __init__(self, on_host):
        self.on_host = on_host

    def _refuse(self, *args, **kwargs):
        raise TypeError("Implicit conversion to a NumPy array is not allowed. Please use `.get()`")

    __array__ = __bool__ = __float__ = __int__ = __index__ = __complex__ = __iter__ = __len__ = _refuse

    shape = property(lambda self: self.on_host.shape)
    dtype = property(lambda self: self.on_host.dtype)
    ndim = property(lambda self: self.on_host.ndim)
    size = property(lambda self: self.on_host.size)
    T = property(lambda self: device(self.on_host.T))
    real = property(lambda self: device(self.on_host.real))

    def get(self):
        return self.on_host

    def item(self):
        return self.on_host.item()

    def __getitem__(self, key):
        return device(self.on_host[host(key)])

    def __setitem__(self, key, value):
        self.on_host[host(key)] = host(value)


def _unary(function):
    return lambda self: device(function(self.on_host))


def _binary(function):
    return lambda self, other: device(function(self.on_host, host(other)))


def _reflected(function):
    return lambda self, other: device(function(host(other), self.on_host))


def _method(name):
    return lambda self, *args, **kwargs: device(getattr(self.on_host, name)(*args, **kwargs))


for name in ("neg", "abs"):
    setattr(ndarray, f"__{name}__", _unary(getattr(operator, name)))
for name in ("lt", "le", "gt", "ge", "eq", "ne", "or_"):
    setattr(ndarray, f"__{name.strip('_')}__", _binary(getattr(operator, name)))
for name in ("add", "sub", "mul", "truediv", "pow", "matmul"):
    setattr(ndarray, f"__{name}__", _binary(getattr(operator, name)))
    setattr(ndarray, f"__r{name}__", _reflected(getattr(operator, name)))


def _in_place(function):
    def operate(self, other):
        self.on_host[...] = function(self.on_host, host(other))
        return self

    return operate


for name in ("add", "sub", "mul", "truediv"):
    setattr(ndarray, f"__i{name}__", _in_place(getattr(operator, name)))
for name in (
    "sum",
    "mean",
    "max",
    "min",
    "argmax",
    "any",
    "all",
    "reshape",
    "transpose",
    "swapaxes",
    "squeeze",
    "astype",
    "copy",
):
    setattr(ndarray, name, _method(name))


class CUDARuntimeError(RuntimeError):
    pass


def _function(name):
    return lambda *args, **kwargs: device(getattr(np, name)(*[host(x) for x in args], **kwargs))


def _upload(x, dtype=None):
    return ndarray(np.array(x.on_host if isinstance(x, ndarray) else x, dtype=dtype))


cupy = types.ModuleType("cupy")
cupy.__version__ = "double"
cupy.ndarray = ndarray
cupy.cuda = types.SimpleNamespace(
    runtime=types.SimpleNamespace(getDeviceCount=lambda: 1, CUDARuntimeError=CUDARuntimeError)
)
cupy.array = _upload
cupy.asarray = lambda x, dtype=None: x if isinstance(x, ndarray) and dtype in (None, x.dtype) else _upload(x, dtype)
cupy.split = lambda x, ends, axis: [device(part) for part in np.split(host(x), ends, axis=axis)]
cupy.stack = lambda arrays, axis=0: device(np.stack([host(x) for x in arrays], axis=axis))
cupy.concatenate = lambda arrays, axis=0: device(np.concatenate([host(x) for x in arrays], axis=axis))
cupy.add = types.SimpleNamespace(at=lambda x, key, y: np.add.at(host(x), host(key), host(y)))
for name in (
    "arange broadcast_to clip exp expm1 flatnonzero imag isfinite isinf log log1p maximum minimum ones reshape "
    "take_along_axis tanh tile where zeros"
).split():
    setattr(cupy, name, _function(name))
