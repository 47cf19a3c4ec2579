"""Random arguments for every op and every loss: shapes, broadcasting, axes of size 1 and 0, options.

`python -m minidpo check` draws them with a NumPy generator, the tests with hypothesis. A new op needs an entry here
and a law in tests/test_laws.py.
"""

import inspect
from collections.abc import Callable
from typing import Any, Protocol

import numpy

from ..gradcheck import GradientError
from ..tensor import Tensor

Shape = tuple[int, ...]
Case = tuple[tuple[Any, ...], dict[str, Any]]  # positional arguments, options


class Draw(Protocol):
    """Makes random choices."""

    def integer(self, low: int, high: int) -> int:
        """An integer, low <= n <= high."""

    def array(self, shape: Shape) -> numpy.ndarray:
        """Numbers between -3 and 3, in float64."""


class RandomDraw:
    """Makes its choices with a NumPy generator."""

    def __init__(self, rng: numpy.random.Generator):
        self.rng = rng

    def integer(self, low: int, high: int) -> int:
        return int(self.rng.integers(low, high, endpoint=True))

    def array(self, shape: Shape) -> numpy.ndarray:
        return self.rng.uniform(-3, 3, shape)


def size(draw: Draw) -> int:
    return draw.integer(0, 3) or draw.integer(0, 3)  # rarely 0: an empty array checks little


def shape(draw: Draw) -> Shape:
    return tuple(size(draw) for _ in range(draw.integer(0, 3)))


def indices(draw: Draw, size: int, shape: Shape) -> numpy.ndarray:
    values = [draw.integer(0, size - 1) for _ in range(int(numpy.prod(shape)))]
    return numpy.array(values, dtype=int).reshape(shape)


def away_from_zero(x: numpy.ndarray) -> numpy.ndarray:
    return numpy.where(x < 0, x - 0.5, x + 0.5)


def positive(x: numpy.ndarray) -> numpy.ndarray:
    return numpy.where(x < 0, 0.5 - x, 0.5 + x)


def broadcastable(draw: Draw, whole: Shape) -> Shape:
    """A shape that broadcasts with `whole`: some axes have size 1, some in front are left out."""
    part = tuple(1 if draw.integer(0, 3) == 0 else n for n in whole)
    return part[draw.integer(0, len(part)) :]


def pair(draw: Draw) -> Case:
    whole = shape(draw)
    x, y = (draw.array(broadcastable(draw, whole)) for _ in range(2))
    return ((x, 2.5), (2.5, y), (x, y), (x, y), (x, y))[draw.integer(0, 4)], {}


def quotient(draw: Draw) -> Case:
    (x, y), options = pair(draw)
    return (x, away_from_zero(y) if isinstance(y, numpy.ndarray) else y), options


def entries(draw: Draw) -> Case:
    return (draw.array(shape(draw)),), {}


def positive_entries(draw: Draw) -> Case:
    return (positive(draw.array(shape(draw))),), {}


def two_entries(draw: Draw) -> Case:
    (x, y), options = pair(draw)  # equal entries have no derivative
    return (x, numpy.where(abs(x - y) < 0.1, y + 0.5, y) if isinstance(y, numpy.ndarray) else 4.0), options


def negative_entries(draw: Draw) -> Case:
    x = draw.array(shape(draw))
    return (numpy.where(x < 0, x - 0.5, -0.5 - x),), {}


def power(draw: Draw) -> Case:
    exponent = (0, 1, 2, 3, -1, -2.0, 0.5, -1.5, 2.5)[draw.integer(0, 8)]
    domain = away_from_zero if exponent == int(exponent) else positive
    return (domain(draw.array(shape(draw))), exponent), {}


def reduction(draw: Draw) -> Case:
    ndim = draw.integer(0, 3)
    reduced = [axis for axis in range(ndim) if draw.integer(0, 1)]
    sizes = tuple(draw.integer(1, 3) if axis in reduced else size(draw) for axis in range(ndim))
    signed = [axis - ndim * draw.integer(0, 1) for axis in reduced]
    axis = None if len(reduced) == ndim else signed[0] if len(signed) == 1 else tuple(signed)
    return (draw.array(sizes),), {"axis": axis, "keepdims": bool(draw.integer(0, 1))}


def reshape(draw: Draw) -> Case:
    x = draw.array(shape(draw))
    return (x, (x.shape[::-1], (x.size,), (1, *x.shape))[draw.integer(0, 2)]), {}


def transpose(draw: Draw) -> Case:
    x = draw.array(shape(draw))
    order: list[int] = []
    for axis in range(x.ndim):
        order.insert(draw.integer(0, axis), axis - x.ndim * draw.integer(0, 1))
    return (x,), {"axes": None if draw.integer(0, 3) == 0 else tuple(order)}


def getitem(draw: Draw) -> Case:
    n, m = draw.integer(1, 3), draw.integer(0, 3)
    repeated = indices(draw, n, (draw.integer(0, 4),))
    keys = (-1, slice(None, None, 2), (..., slice(1, None)), (None, 0), repeated, (repeated, slice(0, 2)))
    return (draw.array((n, m)), keys[draw.integer(0, 5)]), {}


def concatenate(draw: Draw) -> Case:
    sizes = (*shape(draw), 1)
    axis = draw.integer(-len(sizes), len(sizes) - 1)
    before, after = sizes[: axis % len(sizes)], sizes[axis % len(sizes) + 1 :]
    parts = tuple(draw.array((*before, draw.integer(0, 3), *after)) for _ in range(draw.integer(1, 3)))
    return parts, {"axis": axis}


def gather(draw: Draw) -> Case:
    rows, V = shape(draw), draw.integer(1, 4)
    return (draw.array((*rows, V)), indices(draw, V, rows)), {}


def embedding(draw: Draw) -> Case:
    V, C = draw.integer(1, 4), size(draw)
    return (draw.array((V, C)), indices(draw, V, shape(draw))), {}


def matmul(draw: Draw) -> Case:
    n, k, m, batch = size(draw), size(draw), size(draw), shape(draw)
    x = (k,) if draw.integer(0, 3) == 0 else (*broadcastable(draw, batch), n, k)
    y = (k,) if draw.integer(0, 3) == 0 else (*broadcastable(draw, batch), k, m)
    return (draw.array(x), draw.array(y)), {}


def linear(draw: Draw) -> Case:
    n, m = size(draw), size(draw)
    return (draw.array((*shape(draw), n)), draw.array((n, m)), draw.array((m,))), {}


def rows(draw: Draw) -> Case:
    return (draw.array((*shape(draw), draw.integer(1, 4))),), {}


def layer_norm(draw: Draw) -> Case:
    (x,), options = rows(draw)
    return (x, draw.array(x.shape[-1:]), draw.array(x.shape[-1:])), options


def causal_attention(draw: Draw) -> Case:
    batch, S, D = shape(draw), draw.integer(1, 4), draw.integer(1, 3)
    sizes = ((draw.integer(1, S), D), (S, D), (S, draw.integer(1, 3)))
    return tuple(draw.array((*broadcastable(draw, batch), *size)) for size in sizes), {}


def block_attention(draw: Draw) -> Case:
    """Rows chosen | prompt | rejected, in the layout of scoring.py, or `count` texts of one length."""
    count, chosen, rejected, H, D = (draw.integer(low, 3) for low in (0, 0, 0, 1, 1))
    prompt = draw.integer(1, 3)
    if count:
        places = numpy.tile(numpy.arange(prompt), count)
        blocks = [(slice(0, count * prompt), slice(0, count * prompt), count)]
    else:
        after = numpy.arange(prompt, prompt + 3)
        places = numpy.concatenate([after[:chosen], numpy.arange(prompt), after[:rejected]])
        middle, end = chosen + prompt, chosen + prompt + rejected
        blocks = [(slice(middle - 1, end), slice(chosen, end), 1)]
        blocks += [(slice(0, chosen), slice(0, middle), 1)] if chosen else []
        blocks += [(slice(chosen, middle - 1), slice(chosen, middle - 1), 1)] if prompt > 1 else []
    masked = []
    for queries, keys, texts in blocks:
        q, k = (places[rows][: len(places[rows]) // texts] for rows in (queries, keys))
        masked.append((queries, keys, texts, numpy.where(k[:, None] > q, -numpy.inf, 0.0)))
    return (draw.array((len(places), 3, H, D)), tuple(masked)), {}


def segment_sum(draw: Draw) -> Case:
    count, M = draw.integer(1, 3), draw.integer(0, 4)
    return (draw.array((M,)), indices(draw, count, (M,)), count), {}


CASES: dict[str, Callable[[Draw], Case]] = {
    "add": pair,
    "sub": pair,
    "mul": pair,
    "div": quotient,
    "neg": entries,
    "maximum": two_entries,
    "power": power,
    "exp": entries,
    "log": positive_entries,
    "tanh": entries,
    "logsigmoid": entries,
    "log1mexp": negative_entries,
    "gelu": entries,
    "sum": reduction,
    "mean": reduction,
    "reshape": reshape,
    "transpose": transpose,
    "getitem": getitem,
    "concatenate": concatenate,
    "gather": gather,
    "segment_sum": segment_sum,
    "embedding": embedding,
    "matmul": matmul,
    "linear": linear,
    "logsumexp": rows,
    "softmax": rows,
    "log_softmax": rows,
    "layer_norm": layer_norm,
    "causal_attention": causal_attention,
    "block_attention": block_attention,
}


# ---- losses, by the names of their arguments ----------------------------------------------------------------

OPTIONS = {  # an option lies between these two
    "beta": (0.05, 2.0), "label_smoothing": (0.01, 0.49), "alpha": (0.05, 1.0), "tau": (0.05, 1.0),
    "gamma": (-1.0, 2.0), "delta": (-1.0, 1.0), "penalty": (0.0, 60.0), "nll_weight": (0.0, 2.0),
    "weight_desirable": (0.1, 2.0), "weight_undesirable": (0.1, 2.0), "reference_point": (0.0, 2.0),
}  # fmt: skip
POLICY = ("logp_w", "logp_l", "logp")  # a loss has a gradient in these


def loss_arguments(draw: Draw, loss: Any, low: float = -20.0) -> dict[str, Any]:
    """Arguments of a loss by name, but those that are None by default; log-probabilities from `low` to -0.01."""
    taken = inspect.signature(loss).parameters
    B = draw.integer(1, 4)
    of_logps = (B,) if "logp_w" in taken or "desirable" in taken else (B, draw.integer(2, 4))  # or lists

    def uniform(low: float, high: float, shape: Shape) -> numpy.ndarray:
        return low + (high - low) * (draw.array(shape) + 3) / 6

    x: dict[str, Any] = {}
    for name, p in taken.items():
        if "logp" in name:
            x[name] = uniform(low, -0.01, of_logps)
        elif name.startswith("length"):
            x[name] = numpy.array([draw.integer(1, 30) for _ in range(B)])
        elif name == "desirable":
            x[name] = numpy.array([draw.integer(0, 1) for _ in range(B)], dtype=bool)
        elif name in OPTIONS:
            x[name] = float(uniform(*OPTIONS[name], ()))
        elif p.default is p.empty:
            x[name] = uniform(-2.0, 2.0, (B,))
    return x


def loss_as_op(loss: Any, arguments: dict[str, Any]) -> tuple[Callable[..., Any], list[numpy.ndarray]]:
    """A loss as an array function of the policy's log-probabilities, whose vjp is its gradient in closed form.

    That vjp raises GradientError if a sweep gives another gradient.
    """
    names = [name for name in POLICY if name in arguments]

    def function(*logps: Any) -> tuple[Any, Callable[[Any], Any]]:
        x = {**arguments, **dict(zip(names, logps))}

        def vjp(g: Any) -> tuple[Any, ...]:
            leaves = {name: Tensor(x[name], requires_grad=True) for name in names}
            loss(**{**x, **leaves}).loss.backward()
            closed = loss.gradient(**x)
            for leaf, gradient in zip(leaves.values(), closed):
                swept = 0 * leaf.data if leaf.grad is None else leaf.grad
                if not numpy.allclose(swept, gradient, rtol=1e-11, atol=1e-13):
                    raise GradientError(f"the sweep gives {swept}, the closed form {gradient}")
            return tuple([g * gradient for gradient in closed])

        return loss(**x).loss.data, vjp

    function.__name__ = loss.__name__
    return function, [arguments[name] for name in names]
