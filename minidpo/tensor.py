"""Reverse-mode automatic differentiation in one file.

An op is a function of arrays that returns its value and its vector-Jacobian product:

    def exp(x):
        y = e^x
        def vjp(g): return (g * y,)        # g = dL/dy in, a tuple out: dL/dx for each argument
        return y, vjp

L is the final number, usually a loss. g, the cotangent of y, has the shape of y; a `vjp` must not write
into it, because other nodes may hold the same array.

`@op` lifts such a function to Tensors. A Tensor made by an op remembers its parents and the `vjp`; any other,
a parameter for example, is a leaf. `backward` sweeps from L down to the leaves, newest first, and hands each
node's gradient to its `vjp`. Only leaves keep their gradients, in `grad`.
"""

import functools
import itertools
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NoReturn, Protocol, cast

from .backend import Array, array_module, asarray, on_host

Vjp = Callable[[Array], tuple[Any, ...]]  # one array or None per operand
Operator = Callable[..., "Tensor"]


class Op(Protocol):
    """A function of Tensors or arrays that returns a Tensor; `raw` is the array function underneath."""

    raw: Callable[..., tuple[Array, Vjp]]
    __name__: str

    def __call__(self, *operands: Any, **options: Any) -> "Tensor": ...


OPS: dict[str, Op] = {}
_creation = itertools.count()


def refusal(advice: str) -> Callable[..., NoReturn]:
    """A method that raises TypeError with this advice."""

    def refuse(*operands: Any) -> NoReturn:
        raise TypeError(advice)

    return refuse


class Tensor:
    """An array that remembers how it was made.

    `data` is the array itself, not a copy: do not write into it between an op and `backward`, whose derivatives would
    be of the new values. (What an op returns is read-only; indices and keys are copied.) With `requires_grad`,
    `backward` leaves the derivative in `grad`; only real floating-point numbers can have one (else TypeError).
    Arithmetic and indexing build a graph; everything else is in `ops`: write `ops.sum(x)`, not `x.sum()` or
    `np.sum(x)`. Tensors compare by identity.
    """

    __slots__ = ("__weakref__", "creation", "data", "grad", "op", "parents", "requires_grad", "vjp")
    __add__: Operator  # the operators are attached in ops.py
    __radd__: Operator
    __sub__: Operator
    __rsub__: Operator
    __mul__: Operator
    __rmul__: Operator
    __truediv__: Operator
    __rtruediv__: Operator
    __matmul__: Operator
    __rmatmul__: Operator
    __neg__: Operator
    __pow__: Operator
    __getitem__: Operator

    def __init__(
        self,
        data: Any,
        requires_grad: bool = False,
        parents: tuple["Tensor | None", ...] = (),
        vjp: Vjp | None = None,
        op: str = "leaf",
    ):
        self.data = asarray(data)
        if requires_grad and self.data.dtype.kind != "f":
            raise TypeError(f"only floating-point tensors can require a gradient, not {self.data.dtype}: use floats")
        self.grad: Array = None  # in a leaf: the sum over the sweeps so far
        self.requires_grad = requires_grad
        self.parents = parents  # one per operand; None for a constant
        self.vjp = vjp  # None in a leaf
        self.op = op  # the name of the op
        self.creation = next(_creation)  # higher than that of every parent

    @property
    def shape(self) -> tuple[int, ...]:
        return self.data.shape

    @property
    def dtype(self) -> Any:
        return self.data.dtype

    def item(self) -> float:
        """The single entry, as a Python number."""
        return self.data.item()

    def detach(self) -> "Tensor":
        """The same array as a constant."""
        return Tensor(self.data)

    def __float__(self) -> float:
        return float(self.item())

    def __int__(self) -> int:
        return int(self.item())

    def __len__(self) -> int:
        return len(self.data)

    def __bool__(self) -> NoReturn:
        raise TypeError("a Tensor is neither true nor false: compare x.item(), or write `x is not None`")

    def __array__(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refuse to become an array: NumPy would drop the graph without a word."""
        raise TypeError("NumPy functions do not work on a Tensor: use those of minidpo.ops, or its .data")

    def __array_ufunc__(self, ufunc: Any, method: str, *operands: Any, **options: Any) -> "Tensor":
        """Let np.exp(x), array + x and the like be ours; refuse those that have no op."""
        name = {"subtract": "sub", "multiply": "mul", "divide": "div", "negative": "neg"}.get(
            ufunc.__name__, ufunc.__name__
        )
        if method != "__call__" or options or name not in OPS:
            self.__array__()
        return OPS[name](*operands)

    if not TYPE_CHECKING:  # so that mypy still reports what does not exist
        __lt__ = __le__ = __gt__ = __ge__ = refusal("a comparison has no derivative: compare x.data")
        __setitem__ = __delitem__ = refusal("a Tensor never changes: change the array before you make a Tensor of it")
        __rpow__ = refusal("a ** x is not an op of minidpo: write ops.exp(x * math.log(a))")
        __abs__ = __round__ = __mod__ = __rmod__ = __floordiv__ = __rfloordiv__ = refusal(
            "minidpo.ops has no such function: x.data is the tensor's array"
        )

        def __getattr__(self, name: str) -> NoReturn:
            """Answer NumPy's and PyTorch's attributes with the name of ours."""
            op = {"T": "transpose"}.get(name, name)
            ours = f"use ops.{op}(x)" if op in OPS else "x.data is its array, and minidpo.ops has its functions"
            raise AttributeError(f"a Tensor has no .{name}: {ours}")

    def backward(self, cotangent: Any = None) -> None:
        """Add dL/dleaf to the `grad` of every leaf that this tensor depends on.

        `cotangent` is dL/dself, in the shape of this tensor; a tensor with one entry may omit it, which means 1. Sweeps
        add up, in place: set `grad` to None (`Optimizer.zero_grad`) to start a new sum. If a `vjp` fails, `grad`
        is None in all of these leaves. RuntimeError, before anything has changed, if an earlier sweep freed the graph.
        """
        xp = array_module(self.data)
        if not self.requires_grad:
            raise ValueError(
                "nothing that this tensor depends on requires a gradient: see Tensor(x, requires_grad=True)"
            )
        if cotangent is None:
            if self.data.size != 1:
                raise ValueError(
                    f"backward() from shape {self.shape} needs a cotangent of that shape (or ops.mean first)"
                )
            cotangent = xp.ones(self.shape, dtype=self.dtype)
        cotangent = asarray(cotangent)
        if cotangent.dtype.kind == "c":
            raise ValueError("the cotangent must be real")
        cotangent = xp.asarray(cotangent, dtype=self.dtype)
        if cotangent.shape != self.shape:
            raise ValueError(f"the cotangent has shape {cotangent.shape}, the tensor {self.shape}; they must be equal")
        nodes = tape(self)
        sums = {node: node.grad for node in nodes if node.vjp is None and node.grad is not None}
        for leaf in sums:
            leaf.grad = None  # until the sweep is over, so that a failing one leaves no partial sum
        for leaf, g in [(node, g) for node, g in sweep(nodes, cotangent, sums) if node.vjp is None]:
            leaf.grad = xp.asarray(g, dtype=leaf.dtype)

    def __iter__(self) -> Iterator["Tensor"]:
        return (self[i] for i in range(len(self.data)))

    def __reduce__(self) -> tuple[Any, ...]:
        """Copy or pickle a leaf as a new leaf; a graph is never copied."""
        if self.vjp is not None:
            raise TypeError("a tensor made by an op cannot be copied, because of its graph: copy x.detach()")
        return Tensor, (self.data, self.requires_grad)

    def __repr__(self) -> str:
        return f"Tensor({self.data!r}{', requires_grad=True' if self.requires_grad else ''})"


def _freed(g: Array) -> NoReturn:
    """Stand in for the `vjp` of a node that a sweep has passed."""
    raise RuntimeError(
        "this graph was freed by an earlier backward(): run the forward again, or sweep once from a sum of the outputs"
    )


def tape(output: Tensor) -> list[Tensor]:
    """List `output` and everything that it depends on and that requires a gradient, oldest first.

    Raises RuntimeError if an earlier sweep freed part of it.
    """
    nodes, frontier = {output}, [output]
    while frontier:
        node = frontier.pop()
        if node.vjp is _freed:
            _freed(node.data)
        for parent in node.parents:
            if parent is not None and parent not in nodes:
                nodes.add(parent)
                frontier.append(parent)
    return sorted(nodes, key=lambda node: node.creation)


def sweep(
    nodes: list[Tensor], cotangent: Array, sums: dict[Tensor, Array] | None = None
) -> Iterator[tuple[Tensor, Array]]:
    """Yield (node, dL/dnode) from the last of a tape, the output, down to the leaves, newest first.

    A result has a higher creation number than its operands. When a node's turn comes, all its consumers have had
    theirs, so its gradient is complete. Each node is freed and leaves `nodes` as it is passed.

    A `vjp` may return the same array twice, or g itself. So the first gradient of a node is borrowed, the second
    makes a sum that we own, and later ones are added into that. A leaf keeps its gradient and therefore owns its sum
    from the first one on; `sums` holds the sums that leaves start from.
    """
    gradients, owners = dict(sums or {}), set(sums or {})

    def receive(node: Tensor, gradient: Array) -> None:
        if node in owners:
            gradients[node] += gradient
        elif node in gradients or node.vjp is None:
            gradients[node] = gradients.get(node, 0) + gradient
            owners.add(node)
        else:
            gradients[node] = gradient

    receive(nodes[-1], cotangent)
    while nodes:
        node = nodes.pop()
        if node in gradients:  # otherwise no consumer had a derivative in it
            g = gradients.pop(node)
            yield node, g
            for parent, gradient in parents_gradients(node, g):
                receive(parent, gradient)
        if node.vjp:
            node.parents, node.vjp = (), _freed


def parents_gradients(node: Tensor, g: Array) -> Iterator[tuple[Tensor, Array]]:
    """Yield (parent, dL/dparent), in the parent's dtype, from the node's `vjp` and g = dL/dnode.

    Raises TypeError if the `vjp` does not return a tuple, ValueError if gradients are missing or have the wrong shape.
    """
    gradients = node.vjp(g) if node.vjp else ()
    if not isinstance(gradients, tuple):
        raise TypeError(f"{node.op}: a vjp returns a tuple, one gradient per argument: (gx,), not gx")
    if any(parent is not None for parent in node.parents[len(gradients) :]):
        raise ValueError(f"{node.op}: {len(gradients)} gradients for {len(node.parents)} arguments")
    for parent, gradient in zip(node.parents, gradients):
        if parent is None or gradient is None:
            continue
        if gradient.shape != parent.shape:
            raise ValueError(f"{node.op}: a gradient of shape {gradient.shape} for {parent.shape}")
        yield parent, gradient.astype(parent.dtype, copy=False)


def unwrapped(operand: Any) -> Any:
    """Return what an array function takes: a Tensor's array, a list or another library's as an array, else itself."""
    if isinstance(operand, Tensor):
        return operand.data
    return asarray(operand) if isinstance(operand, list) or hasattr(operand, "dtype") else operand


def op(function: Callable[..., tuple[Array, Vjp]]) -> Op:
    """Lift `function(*arrays, **options) -> (y, vjp)` to Tensors and register it in `OPS` under its name.

    Raises ValueError if another module has registered an op of that name.
    """
    name = function.__name__
    if name in OPS and OPS[name].raw.__module__ != function.__module__:
        raise ValueError(f"{OPS[name].raw.__module__} already has an op named {name}: choose another name")

    @functools.wraps(function)
    def lifted(*operands: Any, **options: Any) -> Tensor:
        for option, value in options.items():
            if isinstance(value, Tensor):
                raise TypeError(f"{name}: pass the tensor {option} by position; a keyword gets no gradient")
        y, vjp = function(*map(unwrapped, operands), **options)
        parents = tuple([x if isinstance(x, Tensor) and x.requires_grad else None for x in operands])
        if all(parent is None for parent in parents):
            return Tensor(y)  # a constant: without a graph, the vjp and the arrays that it keeps are dropped
        result = Tensor(y, requires_grad=True, parents=parents, vjp=vjp, op=name)
        if on_host(result.data):
            result.data = result.data.view()  # y may be an operand
            result.data.flags.writeable = False
        return result

    registered = cast(Op, lifted)
    registered.raw = function
    OPS[name] = registered
    return registered
