"""A derivative against two that are independent of it: central differences and the complex step.

For a function f with Jacobian J, a random direction u and a random cotangent g, a correct `vjp` satisfies

    <g, J u> = <vjp(g), u>,   J u ~ (f(x + h u) - f(x - h u)) / 2h      central difference, h = 1e-6
                              J u = Im f(x + sqrt(-1) h u) / h           complex step, h = 1e-20

where <a, b> = sum_i a_i b_i, and u_i is a normal number times max(1, |x_i|), so that rounding does not swallow the
step of a large entry. (If f bends within 1e-6 |x_i|, as sin does at 1e6, only the complex step can check it.) The
complex step has no subtraction, so nothing cancels: it is exact to rounding where f is analytic.
Both trust the forward; whether that is correct is for a law to say (tests/test_laws.py).
Cotangents are never all ones: the gradient of the sum of a softmax is 0, so a `vjp` of zeros would pass.
Source: Squire and Trapp 1998 for the complex step.
"""

import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy

from .backend import Array, array_module, asarray
from .tensor import Tensor

STEP = {"central": 1e-6, "complex": 1e-20}
TOLERANCE = {"central": 1e-6, "complex": 1e-12}


class GradientError(AssertionError):
    """A derivative and its check disagree; the message names the op, the entry and both numbers."""


def _validate(method: str, directions: int) -> None:
    if method not in STEP:
        raise ValueError(f'method must be "central" or "complex", not {method!r}')
    if directions < 1:
        raise ValueError(f"directions must be at least 1, not {directions}")


def _derivative(f: Callable[..., Array], xs: list[Any], us: list[Any], method: str) -> Array:
    """J u: how f(*xs) changes along us, where None keeps an argument; 0 where f is not finite."""
    h = STEP[method]

    def moved(step: complex) -> Array:
        return f(*[x if u is None else x + step * u for x, u in zip(xs, us)])

    y = f(*xs)
    xp = array_module(y)
    finite = xp.isfinite(y)
    if method == "complex":
        return xp.where(finite, xp.imag(moved(1j * h)) / h, 0)
    return (xp.where(finite, moved(h), 0) - xp.where(finite, moved(-h), 0)) / (2 * h)


def _difference(g: Array, ju: Array, gxs: list[Array], us: list[Array]) -> float:
    """|<g, Ju> - <vjp(g), u>| / (1 + sum |g Ju| + sum |vjp(g) u|)

    The sums keep a correct `vjp` from failing where large terms cancel, the 1 where all are tiny: a gradient smaller
    than the tolerance is not checked.
    """
    forward = g * ju
    reverse = [gx * u for gx, u in zip(gxs, us)]
    size = 1 + abs(forward).sum().item() + sum(abs(term).sum().item() for term in reverse)
    return abs(forward.sum().item() - sum(term.sum().item() for term in reverse)) / size


def check_vjp(
    raw_op: Callable[..., Any],
    *arrays: Any,
    rng: numpy.random.Generator,
    method: str = "central",
    directions: int = 3,
    **options: Any,
) -> float:
    """Check one `vjp` along random directions, in float64; return the largest error.

        |<g, Ju> - <vjp(g), u>| / (1 + sum |g Ju| + sum |vjp(g) u|) <= 1e-6 central, 1e-12 complex

    `raw_op(*arrays, **options)` returns `(y, vjp)`; an op of `OPS` will do too. Floating-point arrays are varied, other
    arguments are not. Use small arrays: in a sum over a million entries a single wrong one drowns.
    The complex step needs an analytic forward: no abs, and comparisons of real parts only.

    Raises GradientError, naming the op, the worst entry and both values there, if an error is too large; if the `vjp`
    fails, does not return exactly one gradient of the argument's shape and dtype per varied argument,
    or writes into g or an argument; or if the forward is nan or +inf.
    """
    _validate(method, directions)
    if any(isinstance(x, Tensor) for x in arrays):
        raise TypeError("check_vjp varies plain arrays: pass the .data of a Tensor")
    raw = getattr(raw_op, "raw", raw_op)
    name = getattr(raw, "__name__", repr(raw))
    xs = [asarray(x) if hasattr(x, "dtype") else x for x in arrays]
    xs = [x.astype("float64") if _varied(x) else x for x in xs]
    before = [array_module(x).array(x) if _varied(x) else x for x in xs]
    returned = raw(*xs, **options)
    if not (isinstance(returned, tuple) and len(returned) == 2 and callable(returned[1])):
        raise TypeError(f"{name} returns {type(returned).__name__}, not its value and its vjp: return y, vjp")
    y, vjp = returned
    xp = array_module(y)
    finite = xp.isfinite(y)
    if not (finite | (y == -math.inf)).all().item() or (y.size and not finite.any().item()):
        raise GradientError(f"{name}: the forward is nan, +inf, or -inf everywhere: nothing can be checked there")

    def f(*xs: Any) -> Array:
        return raw(*xs, **options)[0]

    def gradients(g: Array) -> list[Array]:
        g_before = xp.array(g)
        try:
            gxs = vjp(g)
        except Exception as error:
            raise GradientError(f"{name}: vjp raised {type(error).__name__}: {error}") from error
        if not isinstance(gxs, tuple):
            raise GradientError(f"{name}: vjp returns {type(gxs).__name__}, not a tuple of gradients: return (gx,)")
        if (g != g_before).any().item():
            raise GradientError(f"{name}: vjp writes into g, which other nodes share")
        for i, (x, old) in enumerate(zip(xs, before)):
            if _varied(x) and (x != old).any().item():
                raise GradientError(f"{name}: argument {i} was written into")
        for i, (x, gx) in enumerate(itertools.zip_longest(xs, gxs)):
            if _varied(x) != (gx is not None):
                kind = x.dtype if hasattr(x, "dtype") else type(x).__name__
                fault = "no gradient for" if _varied(x) else "a gradient, not None, for"
                raise GradientError(f"{name}: vjp returns {fault} argument {i} ({kind})")
            if gx is not None and (gx.shape, gx.dtype) != (x.shape, x.dtype):
                raise GradientError(
                    f"{name}: the gradient of argument {i} is {gx.dtype} {gx.shape}, the argument {x.dtype} {x.shape}"
                )
        return list(gxs)

    errors = []
    for _ in range(directions):
        g = xp.where(finite, xp.asarray(rng.normal(size=y.shape)), 0)
        us = [_direction(x, rng) if _varied(x) else None for x in xs]
        gxs = gradients(g)
        varied = [i for i, u in enumerate(us) if u is not None]
        error = _difference(g, _derivative(f, xs, us, method), [gxs[i] for i in varied], [us[i] for i in varied])
        if not error <= TOLERANCE[method]:
            raise GradientError(f"{name}: {_worst_entry(f, xs, gxs, g, method)} (error {error:.1e} along a direction)")
        errors.append(error)
    return max(errors)


def _varied(x: Any) -> bool:
    """Whether x is a floating-point array, and so has a derivative."""
    return hasattr(x, "dtype") and x.dtype.kind == "f"


def _direction(x: Array, rng: numpy.random.Generator) -> Array:
    """Random numbers in the shape and size of x; 0 where x is infinite."""
    return array_module(x).asarray(rng.normal(size=x.shape)) * _scale(x)


def _scale(x: Array) -> Array:
    """max(1, |x|), entry by entry; 0 where x is infinite, since such an entry cannot move."""
    xp = array_module(x)
    return xp.where(xp.isfinite(x), xp.maximum(1, abs(x)), 0)


def _worst_entry(f: Callable[..., Array], xs: list[Any], gxs: list[Array], g: Array, method: str) -> str:
    """A sentence about the entry x_j where vjp(g)_j and <g, df/dx_j> differ most."""
    worst = (-1.0, "")
    for i, x in enumerate(xs):
        if not _varied(x):
            continue
        scale = _scale(x)
        for j in numpy.ndindex(x.shape):
            step = scale[j].item() or 1.0
            unit = numpy.zeros(x.shape)
            unit[j] = step
            us = [array_module(x).asarray(unit) if k == i else None for k in range(len(xs))]
            numerical, analytic = (g * _derivative(f, xs, us, method)).sum().item() / step, gxs[i][j].item()
            error = abs(analytic - numerical) / (1 + abs(analytic) + abs(numerical))
            if not error <= worst[0]:  # also where one of them is nan
                check = {"central": "central difference", "complex": "complex step"}[method]
                worst = (error, f"argument {i} at index {j}: vjp gives {analytic:.6g}, the {check} {numerical:.6g}")
    return worst[1]


def check_gradient(
    f: Callable[[dict[str, Tensor]], Tensor],
    params: dict[str, Tensor],
    rng: numpy.random.Generator,
    directions: int = 20,
    method: str = "central",
) -> float:
    """Check a whole function of named parameters along random directions, in float64; return the largest error.

        |df/du - <grad f, u>| / (1 + |df/du| + sum |grad f u|),   u random in all parameters at once

    `f` takes a dict like `params`, which is copied and not changed, and returns a Tensor with a single number.
    Parameters with `requires_grad=False` stay constants. The caller decides which error is too large.
    """
    _validate(method, directions)
    varied = {name: p.data.astype("float64") for name, p in params.items() if p.requires_grad}
    if not varied:
        raise ValueError("no parameter requires a gradient, so there is nothing to check: see model.init")
    constants = {name: p for name, p in params.items() if not p.requires_grad}
    leaves = {name: Tensor(x, requires_grad=True) for name, x in varied.items()}
    y = f({**constants, **leaves})
    if not isinstance(y, Tensor) or y.data.size != 1:
        returned = f"a Tensor of shape {y.shape}" if isinstance(y, Tensor) else type(y).__name__
        raise ValueError(f"f must return a Tensor that holds one number, not {returned}")
    if not math.isfinite(y.item()):
        raise GradientError(f"f is {y.item()}: nothing can be checked there")
    if not y.requires_grad:
        raise GradientError("f builds no graph from the parameters: it uses none of them, or only their .data")
    y.backward()
    gradients = [p.grad if p.grad is not None else 0 * p.data for p in leaves.values()]

    def value(*xs: Array) -> Array:
        return f({**constants, **{name: Tensor(x) for name, x in zip(varied, xs)}}).data

    xs, errors = list(varied.values()), []
    for _ in range(directions):
        us = [_direction(x, rng) for x in xs]
        ju = _derivative(value, xs, us, method)
        errors.append(_difference(array_module(ju).ones(ju.shape), ju, gradients, us))
    return float(numpy.max(errors))  # nan if one of them is
