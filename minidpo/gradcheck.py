"""A derivative against two that know nothing of it: central differences and the complex step.

For a function f with Jacobian J, a direction u and a cotangent g, both random, a right `vjp` satisfies

    <g, J u> = <vjp(g), u>,   J u ~ (f(x + h u) - f(x - h u)) / 2h      central difference, h = 1e-6
                              J u = Im f(x + sqrt(-1) h u) / h           complex step, h = 1e-20

where <a, b> = sum_i a_i b_i. The second has no subtraction, so nothing cancels: it is exact to rounding
where f is analytic. Both believe the forward: whether that is right, a law must say (tests/test_laws.py).
Cotangents are never all ones: the gradient of the sum of a softmax is 0, and a `vjp` of zeros would pass.
"""

import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy

from .backend import Array, array_module
from .tensor import Tensor

STEP = {"central": 1e-6, "complex": 1e-20}
TOLERANCE = {"central": 1e-6, "complex": 1e-12}


class GradientError(AssertionError):
    """A derivative and its check disagree; the message names the op, the place and both numbers."""


def _derivative(f: Callable[..., Array], xs: list[Any], us: list[Any], method: str) -> Array:
    """J u: how f(*xs) changes along us (None: not at all), 0 where f is not finite."""
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

    The sums keep a right `vjp` from failing where large terms cancel, the 1 where all are tiny: a gradient
    that is smaller than the tolerance is not checked by it.
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
    """Check one `vjp` along random directions, in float64.

        |<g, Ju> - <vjp(g), u>| / (1 + sum |g Ju| + sum |vjp(g) u|) <= 1e-6 central, 1e-12 complex

    Parameters
    ----------
    raw_op : callable
        `raw_op(*arrays, **options)` returns `(y, vjp)`; an op of `OPS` stands for its `raw`.
    *arrays : array, number or whatever the op takes
        Floating-point arrays are varied, all else is left as it is. The steps suit entries of order 1, and
        small arrays: in sums over a million entries a single wrong one drowns.
    rng : numpy.random.Generator
        Source of directions and cotangents.
    method : {"central", "complex"}
        The complex step needs an analytic forward that accepts complex arrays: no abs, no comparison
        but of real parts.
    directions : int
        How many pairs (g, u) to try.

    Returns
    -------
    float
        The largest of the errors above.

    Raises
    ------
    GradientError
        If an error is too large, or `vjp` returns no tuple, a gradient for what has none, none for what has
        one, one of another shape or dtype, fails, or writes into g or the arguments; or if the forward is
        nan or +inf. The message names the op, the entry that is most wrong, and both values there.
    ValueError
        If there is no such method, or no direction to try.
    TypeError
        If an argument is a Tensor.

    References
    ----------
    Squire and Trapp 1998 for the complex step.
    """
    if method not in STEP:
        raise ValueError(f'method must be "central" or "complex", not {method!r}')
    if directions < 1:
        raise ValueError(f"directions must be at least 1, not {directions}")
    if any(isinstance(x, Tensor) for x in arrays):
        raise TypeError("check_vjp varies plain arrays: pass the .data of a Tensor")
    raw = getattr(raw_op, "raw", raw_op)
    name = getattr(raw, "__name__", repr(raw))
    xs = [x.astype("float64") if _varied(x) else x for x in arrays]
    before = [array_module(x).array(x) if _varied(x) else x for x in xs]
    y, vjp = raw(*xs, **options)
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
                raise GradientError(f"{name}: argument {i} ({kind}) {'has' if _varied(x) else 'can have'} no gradient")
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
    """Whether a derivative with respect to x exists: floating-point arrays only."""
    return hasattr(x, "dtype") and x.dtype.kind == "f"


def _direction(x: Array, rng: numpy.random.Generator) -> Array:
    """A random direction in the shape of x that leaves infinite entries where they are."""
    xp = array_module(x)
    return xp.where(xp.isfinite(x), xp.asarray(rng.normal(size=x.shape)), 0)


def _worst_entry(f: Callable[..., Array], xs: list[Any], gxs: list[Array], g: Array, method: str) -> str:
    """A sentence about the entry x_j where vjp(g)_j and <g, df/dx_j> differ most."""
    worst = (-1.0, "")
    for i, x in enumerate(xs):
        if not _varied(x):
            continue
        for j in numpy.ndindex(x.shape):
            unit = numpy.zeros(x.shape)
            unit[j] = 1.0
            us = [array_module(x).asarray(unit) if k == i else None for k in range(len(xs))]
            numerical, analytic = (g * _derivative(f, xs, us, method)).sum().item(), gxs[i][j].item()
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
    """Directional derivatives of a whole function of named parameters, in float64.

        |df/du - <grad f, u>| / (1 + |df/du| + sum |grad f u|),   u random in all parameters at once

    Parameters
    ----------
    f : callable
        From a dict like `params` to a Tensor that holds a single number.
    params : dict of str to Tensor
        Where to check; copied, not changed. Those with `requires_grad=False` stay constants.
    rng : numpy.random.Generator
        Source of directions.
    directions : int
        How many to try.
    method : {"central", "complex"}
        As in `check_vjp`.

    Returns
    -------
    float
        The largest of the errors above; it is for the caller to say what is too large.
    """
    varied = {name: p.data.astype("float64") for name, p in params.items() if p.requires_grad}
    constants = {name: p for name, p in params.items() if not p.requires_grad}
    leaves = {name: Tensor(x, requires_grad=True) for name, x in varied.items()}
    f({**constants, **leaves}).backward()
    gradients = [p.grad if p.grad is not None else 0 * p.data for p in leaves.values()]

    def value(*xs: Array) -> Array:
        return f({**constants, **{name: Tensor(x) for name, x in zip(varied, xs)}}).data

    xs, errors = list(varied.values()), []
    for _ in range(directions):
        us = [_direction(x, rng) for x in xs]
        ju = _derivative(value, xs, us, method)
        errors.append(_difference(array_module(ju).ones(ju.shape), ju, gradients, us))
    return float(numpy.max(errors))  # nan, if one is
