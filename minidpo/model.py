"""The character transformer: GPT-2's shape, as functions over a dict of parameters.

Letters: B batch rows, T time, N rows of tokens (B T of them, or fewer where nothing is padded), M wanted ones of
these, V vocabulary, C channels (n_embd), H heads, D = C/H, i the number of a layer. Names and shapes are GPT-2's
own, so that a checkpoint of ours is a GPT-2 checkpoint:

    wte.weight                (V, C)            a token's embedding; its transpose is the output head
    wpe.weight                (n_positions, C)  a place's embedding
    h.i.ln_1.weight, .bias    (C,)              layer norm before attention
    h.i.attn.c_attn.weight    (C, 3C)           queries, keys and values of all heads
    h.i.attn.c_attn.bias      (3C,)
    h.i.attn.c_proj.weight    (C, C)            heads back to channels
    h.i.attn.c_proj.bias      (C,)
    h.i.ln_2.weight, .bias    (C,)              layer norm before the MLP
    h.i.mlp.c_fc.weight       (C, 4C)           channels to hidden units
    h.i.mlp.c_fc.bias         (4C,)
    h.i.mlp.c_proj.weight     (4C, C)           hidden units back to channels
    h.i.mlp.c_proj.bias       (C,)
    ln_f.weight, .bias        (C,)              the last layer norm
"""

import math
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from . import ops
from .backend import Array, array_module, asarray, device_module, index_array
from .tensor import Tensor

Params = dict[str, Tensor]
Block = tuple[slice, slice, int]  # rows of queries, rows of keys, number of texts in them


@dataclass(frozen=True)
class Config:
    """The sizes of a model, under Hugging Face's names.

    Raises
    ------
    ValueError
        If a size is not a positive integer, or n_embd is not a multiple of n_head.
    """

    vocab_size: int
    n_positions: int
    n_embd: int
    n_layer: int
    n_head: int

    def __post_init__(self) -> None:
        for name, size in vars(self).items():
            if type(size) is not int or size < 1:
                raise ValueError(f"{name} must be a positive integer, not {size!r}")
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd = {self.n_embd} must be a multiple of n_head = {self.n_head}")


class Rows(NamedTuple):
    """Tokens of one or more texts as rows of one array, and which of them see each other.

    Linear layers, norms and GELU treat each row by itself; only attention reads `blocks`. Rows in no block,
    such as pads, see nothing and are seen by nothing.
    """

    tokens: Array  # (N,)
    places: Array  # (N,): where in its text each token stands, from 0
    blocks: list[Block]


def parameter_shapes(config: Config) -> dict[str, tuple[int, ...]]:
    """Name and shape of every parameter, as in the table above."""
    C = config.n_embd
    layer = {
        "ln_1.weight": (C,),
        "ln_1.bias": (C,),
        "attn.c_attn.weight": (C, 3 * C),
        "attn.c_attn.bias": (3 * C,),
        "attn.c_proj.weight": (C, C),
        "attn.c_proj.bias": (C,),
        "ln_2.weight": (C,),
        "ln_2.bias": (C,),
        "mlp.c_fc.weight": (C, 4 * C),
        "mlp.c_fc.bias": (4 * C,),
        "mlp.c_proj.weight": (4 * C, C),
        "mlp.c_proj.bias": (C,),
    }
    return {
        "wte.weight": (config.vocab_size, C),
        "wpe.weight": (config.n_positions, C),
        **{f"h.{i}.{name}": shape for i in range(config.n_layer) for name, shape in layer.items()},
        "ln_f.weight": (C,),
        "ln_f.bias": (C,),
    }


def init(config: Config, rng: Any, dtype: str = "float32") -> Params:
    """Fresh parameters: GPT-2's normal(0, 0.02), and 0.02/sqrt(2 n_layer) where a layer adds to the residual.

    Norms start as the identity, biases at 0. `rng` is a NumPy generator. (Radford et al. 2019, section 2.3.)
    """
    xp, params = array_module(), {}
    for name, shape in parameter_shapes(config).items():
        if name.endswith("bias"):
            value = xp.zeros(shape)
        elif ".ln_" in name or name.startswith("ln_"):
            value = xp.ones(shape)
        else:
            std = 0.02 / (2 * config.n_layer) ** 0.5 if name.endswith("c_proj.weight") else 0.02
            value = rng.normal(0, std, shape)
        params[name] = Tensor(value.astype(dtype), requires_grad=True)
    return params


def frozen(params: Params) -> Params:
    """A copy that no optimizer moves and through which no graph is built: the reference model."""
    return {name: Tensor(p.data.copy()) for name, p in params.items()}


def placed(params: Params, device: str) -> Params:
    """The same parameters as arrays of a device, "cpu" or "cuda"; what is there already is not copied.

    Raises
    ------
    DeviceError
        If the device cannot be used.
    """
    xp = device_module(device)
    return {name: Tensor(xp.asarray(p.data), p.requires_grad) for name, p in params.items()}


def check_length(length: int, config: Config) -> None:
    """Refuse a text that has more tokens than there are places.

    Raises
    ------
    ValueError
        If so, with both numbers.
    """
    if length > config.n_positions:
        raise ValueError(f"a text of {length} tokens is longer than the model's n_positions = {config.n_positions}")


def batch_rows(tokens: Any, config: Config, real: Any = None) -> Rows:
    """The rows of a batch, (B, T) -> N = B T; where `real`, (B, T), is false stands a pad, which is in no block."""
    tokens = asarray(tokens)
    if tokens.ndim != 2 or (real is not None and asarray(real).shape != tokens.shape):
        masks = "" if real is None else f", and `real` the same, not {asarray(real).shape}"
        raise ValueError(f"tokens must be (B, T), not {tokens.shape}{masks}")
    xp, (B, T) = array_module(tokens), tokens.shape
    tokens = index_array(tokens, config.vocab_size, xp).reshape(B * T)
    if real is None:
        check_length(T, config)
        return Rows(tokens, xp.tile(xp.arange(T), B), [(slice(0, B * T), slice(0, B * T), B)] if B * T else [])
    places: list[int] = []
    blocks: list[Block] = []
    for b, row in enumerate(asarray(real).tolist()):
        length, first = row.count(True), row.index(True) if True in row else 0
        check_length(length, config)
        if not all(row[first : first + length]):
            raise ValueError(f"row {b} has a pad between two real tokens: pads stand before or after a text")
        places += [*[0] * first, *range(length), *[0] * (T - first - length)]
        rows = slice(b * T + first, b * T + first + length)
        blocks += [(rows, rows, 1)] if length else []
    return Rows(tokens, xp.asarray(places), blocks)


def forward(params: Params, config: Config, tokens: Any, real: Any = None) -> Tensor:
    """Logits for the token after each token.

    Parameters
    ----------
    params : dict of str to Tensor
    config : Config
    tokens : integers, (B, T)
    real : booleans, (B, T), optional
        False at pads, before or after a text; places count from the first real token.

    Returns
    -------
    Tensor, (B, T, V)
        What stands at a pad means nothing.

    Raises
    ------
    ValueError
        If a text has more than `n_positions` tokens.
    IndexError
        If a token is outside the vocabulary.
    """
    tokens = asarray(tokens)
    logits = row_logits(params, config, batch_rows(tokens, config, real))  # (B T, V)
    return ops.reshape(logits, (*tokens.shape, config.vocab_size))  # (B T, V) -> (B, T, V)


def row_logits(
    params: Params,
    config: Config,
    rows: Rows,
    attend: Callable[[int, Tensor], Tensor] | None = None,
    wanted: Sequence[int] | None = None,
) -> Tensor:
    """Logits of all rows, (N, V), or of those that are `wanted`, M numbers from 0 on: (M, V).

    Past the last attention no row needs another, so the last layer leaves out blocks without a wanted query, and goes
    on with the wanted rows. `attend(i, qkv)`, (N, 3, H, D) -> (N, H, D), takes the place of attention in layer i.
    """
    xp = array_module(params["wte.weight"].data)
    tokens, places = xp.asarray(rows.tokens), xp.asarray(rows.places)
    blocks, last = masked(rows.blocks, places), config.n_layer - 1
    asked, remaining = blocks, None
    if wanted is not None:  # a slice holds one of them if more stand before its stop than before its start
        ascending = sorted(wanted)
        asked = tuple(b for b in blocks if bisect_left(ascending, b[0].start) < bisect_left(ascending, b[0].stop))
        remaining = xp.asarray(wanted)

    def within_blocks(i: int, qkv: Tensor) -> Tensor:
        return ops.block_attention(qkv, asked if i == last else blocks)

    x = ops.embedding(params["wte.weight"], tokens) + ops.embedding(params["wpe.weight"], places)  # (N,) -> (N, C)
    for i in range(config.n_layer):
        x = layer(params, config, i, x, attend or within_blocks, remaining if i == last else None)
    x = ops.layer_norm(x, params["ln_f.weight"], params["ln_f.bias"])
    return x @ ops.transpose(params["wte.weight"])  # (M, C) -> (M, V)


def masked(blocks: Sequence[Block], places: Array) -> tuple[tuple[slice, slice, int, Array], ...]:
    """The blocks, and with each -inf where a key stands later in its text than a query, else 0.  (S, T)"""
    found = []
    for queries, keys, count in blocks:
        q, k = places[queries], places[keys]
        q, k = q[: q.shape[0] // count], k[: k.shape[0] // count]  # the texts of a block are alike
        hidden = array_module(places).where(k[:, None] > q, -math.inf, 0.0).astype("float32")
        found.append((queries, keys, count, hidden))
    return tuple(found)


def layer(
    params: Params,
    config: Config,
    i: int,
    x: Tensor,
    attend: Callable[[int, Tensor], Tensor],
    wanted: Array | None = None,
) -> Tensor:
    """Layer i: attention, then the MLP, each of the normed rows and added to them.  (N, C) -> (N, C) or (M, C)"""
    N, C, H = *x.shape, config.n_head

    def affine(name: str, x: Tensor) -> Tensor:
        return ops.linear(x, params[f"h.{i}.{name}.weight"], params[f"h.{i}.{name}.bias"])

    def norm(name: str, x: Tensor) -> Tensor:
        return ops.layer_norm(x, params[f"h.{i}.{name}.weight"], params[f"h.{i}.{name}.bias"])

    qkv = affine("attn.c_attn", norm("ln_1", x))  # (N, C) -> (N, 3C)
    y = attend(i, ops.reshape(qkv, (N, 3, H, C // H)))  # (N, 3, H, D) -> (N, H, D)
    y = ops.reshape(y, (N, C))  # (N, H, D) -> (N, C)
    if wanted is not None:
        x, y = x[wanted], y[wanted]  # (N, C) -> (M, C)
    x = x + affine("attn.c_proj", y)  # (M, C), where all rows are wanted M = N
    y = ops.gelu(affine("mlp.c_fc", norm("ln_2", x)))  # (M, C) -> (M, 4C)
    return x + affine("mlp.c_proj", y)  # (M, 4C) -> (M, C)
