"""Reverse-mode automatic differentiation, whole.

An op is a function of arrays that returns its value and its vector-Jacobian product:

    def exp(x):
        y = e^x
        def vjp(g): return (g * y,)        # g = dL/dy in, a tuple out: dL/dx for each argument
        return y, vjp

L is the final number, mostly a loss. g, the cotangent of y, has the shape of y; a `vjp` must not write
into it, because other nodes may hold the same array.

`@op` lifts a function to Tensors. A Tensor made by an op remembers its parents and that `vjp`; one that no
op made, a parameter say, is a leaf. `backward` sweeps from L down to the leaves, newest first, handing each
node's gradient to its `vjp`, and only leaves keep theirs, in `grad`.
"""

import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any, NoReturn, Protocol, cast

from .backend import Array, array_module, asarray

Vjp = Callable[[Array], tuple[Any, ...]]  # one array or None per operand
Operator = Callable[..., "Tensor"]


class Op(Protocol):
    """What `@op` makes: called on Tensors or arrays it returns a Tensor; `raw` is the array function."""

    raw: Callable[..., tuple[Array, Vjp]]
    __name__: str

    def __call__(self, *operands: Any, **options: Any) -> "Tensor": ...


OPS: dict[str, Op] = {}
_creation = itertools.count()


class Tensor:
    """An array, and how it was made.

    Parameters
    ----------
    data : array, number or list
        Kept, not copied.
    requires_grad : bool
        Whether `backward` shall leave the derivative with respect to this tensor in `grad`.

    Raises
    ------
    TypeError
        If a gradient is required of anything but real floating-point numbers.

    Notes
    -----
    Arithmetic and indexing build a graph, all else is in `ops`: `ops.sum(x)`, not `x.sum()` or `np.sum(x)`.
    Comparison is by identity. `data` is the plain array.
    """

    __slots__ = ("__weakref__", "creation", "data", "grad", "op", "parents", "requires_grad", "vjp")
    __array_ufunc__ = None  # array + tensor is left to Tensor.__radd__
    __add__: Operator  # these are attached where the ops are
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
        self.grad: Array = None  # a leaf's; the sweeps so far, summed
        self.requires_grad = requires_grad
        self.parents = parents  # one per operand; None for a constant
        self.vjp = vjp  # None in a leaf
        self.op = op  # the name of the op that made it
        self.creation = next(_creation)  # an op's result is younger than its parents

    @property
    def shape(self) -> tuple[int, ...]:
        return self.data.shape

    @property
    def dtype(self) -> Any:
        return self.data.dtype

    def item(self) -> float:
        """The only entry, as a Python number."""
        return self.data.item()

    def detach(self) -> "Tensor":
        """The same array as a constant."""
        return Tensor(self.data)

    def __array__(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refuse to become an array unasked: the graph would be lost in silence."""
        raise TypeError("NumPy functions do not work on a Tensor: use those of minidpo.ops, or its .data")

    def backward(self, cotangent: Any = None) -> None:
        """Add dL/dleaf to the `grad` of every leaf that this tensor depends on.

        Sweeps add up, in place; set `grad` to None (`Optimizer.zero_grad`) to start anew. If a `vjp` fails, `grad`
        is None in all of them.

        Parameters
        ----------
        cotangent : array, optional
            dL/dself, in the shape of this tensor; 1 if omitted, which only a single number may do.

        Raises
        ------
        ValueError
            If the cotangent is missing, complex or of another shape, or if nothing requires a gradient.
        RuntimeError
            If an earlier sweep has freed part of the graph. No `grad` has changed then.
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
            leaf.grad = None  # until the sweep is over: one that fails leaves no half of a sum
        for leaf, g in [(node, g) for node, g in sweep(nodes, cotangent, sums) if node.vjp is None]:
            leaf.grad = xp.asarray(g, dtype=leaf.dtype)

    def __iter__(self) -> Iterator["Tensor"]:
        return (self[i] for i in range(len(self.data)))

    def __reduce__(self) -> tuple[Any, ...]:
        """Copying and pickling make a new leaf, younger than all before it; a graph is never copied."""
        if self.vjp is not None:
            raise TypeError("a tensor that an op made cannot be copied, its graph belongs to it: copy its detach()")
        return Tensor, (self.data, self.requires_grad)

    def __repr__(self) -> str:
        return f"Tensor({self.data!r}{', requires_grad=True' if self.requires_grad else ''})"


def _freed(g: Array) -> NoReturn:
    """The `vjp` of a node that a sweep has passed."""
    raise RuntimeError(
        "this graph was freed by an earlier backward(): run the forward again, or add what shares it and sweep once"
    )


def tape(output: Tensor) -> list[Tensor]:
    """All that `output` depends on and that requires a gradient, oldest first.

    Raises
    ------
    RuntimeError
        If an earlier sweep has freed part of it.
    """
    seen, frontier = {output}, [output]
    while frontier:
        node = frontier.pop()
        if node.vjp is _freed:
            _freed(node.data)
        for parent in node.parents:
            if parent is not None and parent not in seen:
                seen.add(parent)
                frontier.append(parent)
    return sorted(seen, key=lambda node: node.creation)


def sweep(
    nodes: list[Tensor], cotangent: Array, sums: dict[Tensor, Array] | None = None
) -> Iterator[tuple[Tensor, Array]]:
    """Yield (node, dL/dnode) from the last of a tape, the output, down to the leaves, newest first.

    Each node is freed and leaves `nodes` when it is passed.

    Descending creation number is a reverse topological order, so a node's turn comes when all that it
    contributed to have had theirs, and its gradient is complete.

    A `vjp` may return one array twice, or its own g: the first gradient of a node is borrowed, the second
    makes a sum of our own, and only into that are later ones added. A leaf, which keeps its gradient, has a
    sum from the first on, or the one in `sums` if it has one there.
    """
    gradients, ours = dict(sums or {}), set(sums or {})

    def receive(node: Tensor, gradient: Array) -> None:
        if node in ours:
            gradients[node] += gradient
        elif node in gradients or node.vjp is None:
            gradients[node] = gradients.get(node, 0) + gradient
            ours.add(node)
        else:
            gradients[node] = gradient

    receive(nodes[-1], cotangent)
    while nodes:
        node = nodes.pop()
        if node in gradients:  # else no consumer had a derivative to give
            g = gradients.pop(node)
            yield node, g
            for parent, gradient in parents_gradients(node, g):
                receive(parent, gradient)
        if node.vjp:
            node.parents, node.vjp = (), _freed


def parents_gradients(node: Tensor, g: Array) -> Iterator[tuple[Tensor, Array]]:
    """What the `vjp` of a node makes of g: (parent, dL/dparent), in the parent's dtype.

    Raises
    ------
    TypeError, ValueError
        If the `vjp` returns anything but a tuple, too few gradients, or one in another shape than its parent's.
    """
    returned = node.vjp(g) if node.vjp else ()
    if not isinstance(returned, tuple):
        raise TypeError(f"{node.op}: a vjp returns a tuple, one gradient per argument: (gx,), not gx")
    if any(parent is not None for parent in node.parents[len(returned) :]):
        raise ValueError(f"{node.op}: {len(returned)} gradients for {len(node.parents)} arguments")
    for parent, gradient in zip(node.parents, returned):
        if parent is None or gradient is None:
            continue
        if gradient.shape != parent.shape:
            raise ValueError(f"{node.op}: a gradient of shape {gradient.shape} for {parent.shape}")
        yield parent, gradient.astype(parent.dtype, copy=False)


def unwrapped(operand: Any) -> Any:
    """What the array function gets: a Tensor's array, a list as an array, all else as it is."""
    return operand.data if isinstance(operand, Tensor) else asarray(operand) if isinstance(operand, list) else operand


def op(function: Callable[..., tuple[Array, Vjp]]) -> Op:
    """Lift `function(*arrays, **options) -> (y, vjp)` to Tensors and register it in `OPS` by its name.

    Raises
    ------
    ValueError
        If another module has registered an op of that name.
    """
    name = function.__name__
    if name in OPS and OPS[name].raw.__module__ != function.__module__:
        raise ValueError(f"there is an op named {name} already, in {OPS[name].raw.__module__}: choose another name")

    @functools.wraps(function)
    def lifted(*operands: Any, **options: Any) -> Tensor:
        for option, value in options.items():
            if isinstance(value, Tensor):
                raise TypeError(f"{name}: pass the tensor {option} by position; a keyword gets no gradient")
        y, vjp = function(*map(unwrapped, operands), **options)
        parents = tuple([x if isinstance(x, Tensor) and x.requires_grad else None for x in operands])
        if not any(parents):
            return Tensor(y)  # a constant: no graph, and vjp with all that it keeps is dropped
        return Tensor(y, requires_grad=True, parents=parents, vjp=vjp, op=name)

    registered = cast(Op, lifted)
    registered.raw = function
    OPS[name] = registered
    return registered
