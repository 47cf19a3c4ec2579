"""Arrays and derivatives of the subject's own framework: NumPy, PyTorch or JAX."""

import contextlib
import importlib
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy

from ..backend import Array

Call = Callable[..., Any]
STEP = 1e-5  # of central differences, where there is no autograd


class Framework:
    """NumPy; the others override what differs."""

    name = "numpy"
    xp: Any = numpy  # the module of its array functions

    def array(self, x: Any, dtype: str | None = None) -> Any:
        """A new array of the framework."""
        return numpy.array(x, dtype=dtype)

    def host(self, x: Any) -> Array:
        """Its values, in NumPy. Raises TypeError for another framework's, whose own derivatives are exact."""
        if type(x).__module__.partition(".")[0] in ("jax", "jaxlib", "torch"):
            raise TypeError(f"given NumPy arrays it returns a {type(x).__module__}.{type(x).__name__}")
        return numpy.asarray(x)

    def session(self) -> contextlib.AbstractContextManager[Any]:
        """Within it, float64 is float64, and arithmetic does not warn."""
        return numpy.errstate(all="ignore")

    def in_graph(self, x: Any) -> bool | None:
        """Whether a value has a derivative; None where that cannot be told."""
        return None

    def jacobian(self, f: Call, arrays: Sequence[Array]) -> list[list[Array | None]]:
        """d f(arrays)_k / d arrays_i as [k][i]; None where the framework knows of no dependence.  f(...) is (K,)"""
        return differences(lambda *xs: self.host(f(*map(self.array, xs))), arrays)


class Torch(Framework):
    name = "torch"

    def __init__(self) -> None:
        self.xp = importlib.import_module("torch")

    def array(self, x: Any, dtype: str | None = None) -> Any:
        made = self.xp.tensor(numpy.ascontiguousarray(x))
        return made.to(getattr(self.xp, dtype)) if dtype else made

    def host(self, x: Any) -> Array:
        x = self.xp.as_tensor(x).detach().cpu()
        return (x.double() if x.is_floating_point() else x).numpy()

    def in_graph(self, x: Any) -> bool | None:
        return bool(getattr(x, "requires_grad", False))

    def jacobian(self, f: Call, arrays: Sequence[Array]) -> list[list[Array | None]]:
        leaves = [self.array(x).requires_grad_() for x in arrays]
        y = self.xp.as_tensor(f(*leaves))
        rows: list[list[Array | None]] = []
        for k in range(y.numel()):
            grads: Sequence[Any] = [None] * len(leaves)
            if y.requires_grad:
                grads = self.xp.autograd.grad(y.reshape(-1)[k], leaves, retain_graph=True, allow_unused=True)
            rows.append([None if g is None else self.host(g) for g in grads])
        return rows


class Jax(Framework):
    name = "jax"

    def __init__(self) -> None:
        self.jax = importlib.import_module("jax")
        self.xp = self.jax.numpy

    def array(self, x: Any, dtype: str | None = None) -> Any:
        return self.xp.asarray(x, dtype=dtype)

    def host(self, x: Any) -> Array:
        x = self.xp.asarray(x)
        return numpy.asarray(x.astype("float64") if self.xp.issubdtype(x.dtype, self.xp.floating) else x)

    @contextlib.contextmanager
    def session(self) -> Any:
        with numpy.errstate(all="ignore"), self.jax.enable_x64(True):
            yield

    def jacobian(self, f: Call, arrays: Sequence[Array]) -> list[list[Array | None]]:
        y, pull = self.jax.vjp(lambda *xs: self.xp.asarray(f(*xs)), *map(self.array, arrays))
        unit = self.array(numpy.eye(y.size).reshape(y.size, *y.shape), y.dtype)
        rows = [self.host(each) for each in self.jax.vmap(pull)(unit)]
        return [[each[k] for each in rows] for k in range(y.size)]


FRAMEWORKS: dict[str, Callable[[], Framework]] = {"numpy": Framework, "torch": Torch, "jax": Jax}


def candidates(name: str | None) -> Iterator[Framework]:
    """The framework of a name; without one, NumPy, then those that have been imported, also by the subject."""
    if name is not None:
        if name not in FRAMEWORKS:
            raise ValueError(f"framework must be one of {', '.join(FRAMEWORKS)}, not {name!r}")
        try:
            yield FRAMEWORKS[name]()
        except ImportError as error:
            raise ValueError(f"{name} is not installed") from error
        return
    for known, make in FRAMEWORKS.items():
        if known == "numpy" or known in sys.modules:
            yield make()


def differences(f: Call, arrays: Sequence[Array]) -> list[list[Array | None]]:
    """The derivatives of f by central differences: [k][i] for output k and array i.

    Each row (the last axis) is first moved in a random direction. Rows that move different outputs are then taken
    apart at the same time, and rows that move none not at all.
    """
    rng, moved = numpy.random.default_rng(0), [numpy.array(x, dtype="float64", order="C") for x in arrays]
    rows = [row for x in moved for row in x.reshape(-1, x.shape[-1])]

    def slope(which: Sequence[int], direction: Array) -> Array:
        starts, ends = [rows[i].copy() for i in which], []
        for h in (STEP, -STEP, 0.0):
            for i, start in zip(which, starts):
                rows[i][:] = start + h * direction
            if h:
                ends.append(numpy.asarray(f(*moved), dtype="float64").reshape(-1))
        return (ends[0] - ends[1]) / (2 * STEP)  # (K,)

    reach = [slope([i], rng.normal(size=len(row))) != 0 for i, row in enumerate(rows)]
    slopes = [numpy.zeros((len(row), len(k))) for row, k in zip(rows, reach)]
    groups: list[list[int]] = []
    for i, k in enumerate(reach):
        if k.any():
            fits = (g for g in groups if len(rows[g[0]]) == len(rows[i]) and not any((reach[j] & k).any() for j in g))
            group = next(fits, None)
            if group is None:
                groups.append(group := [])
            group.append(i)
    for group in groups:
        for v, unit in enumerate(numpy.eye(len(rows[group[0]]))):
            y = slope(group, unit)
            for i in group:
                slopes[i][v] = numpy.where(reach[i], y, 0.0)
    columns, first = [], 0
    for x in moved:
        count = x.size // x.shape[-1]
        columns.append(numpy.concatenate(slopes[first : first + count]))  # (size, K)
        first += count
    return [[column[:, k].reshape(x.shape) for column, x in zip(columns, moved)] for k in range(len(reach[0]))]


def leading(result: Any) -> Any:
    """The loss or score in what a subject returns: its first entry, or the one with that name."""
    if hasattr(result, "shape"):
        return result
    for name in ("loss", "losses", "logps", "logprobs"):
        if isinstance(result, dict) and name in result:
            return result[name]
        if not isinstance(result, dict) and hasattr(result, name):
            return getattr(result, name)
    if isinstance(result, dict):
        losses = [value for key, value in result.items() if "loss" in str(key)]
        return losses[0] if len(losses) == 1 else next(iter(result.values()))
    if isinstance(result, tuple) or (isinstance(result, list) and result and hasattr(result[0], "shape")):
        return result[0]
    return result
