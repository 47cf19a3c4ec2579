"""The character transformer: GPT-2's shape, as functions over a dict of parameters.

Letters: B batch rows, T time, N rows of tokens (B T of them, or fewer without pads), M the rows whose logits are
wanted, V vocabulary, C channels (n_embd), H heads, D = C/H, i the number of a layer. Names and shapes are GPT-2's,
so that a checkpoint of ours is a GPT-2 checkpoint:

    wte.weight                (V, C)            a token's embedding; its transpose is the output head
    wpe.weight                (n_positions, C)  a position's embedding
    h.i.ln_1.weight, .bias    (C,)              layer norm before attention
    h.i.attn.c_attn.weight    (C, 3C)           channels to queries, keys and values
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
import operator
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from . import ops
from .backend import Array, array_module, asarray, device_module, index_array
from .tensor import Tensor
from .tokenizer import END_OF_TEXT

Params = dict[str, Tensor]
Block = tuple[slice, slice, int]  # rows of queries, rows of keys, the number of texts in each
Attention = Callable[[int, Tensor], Tensor]  # of layer i: (N, 3, H, D) -> (N, H, D)


@dataclass(frozen=True)
class Config:
    """The sizes of a model, under Hugging Face's names; n_embd must be a multiple of n_head.

    The id that ends a text is 0 in every model made here; one that came from elsewhere may have another.
    """

    vocab_size: int
    n_positions: int
    n_embd: int
    n_layer: int
    n_head: int
    eos_token_id: int = field(default=END_OF_TEXT, repr=False)

    def __post_init__(self) -> None:
        for name, size in list(vars(self).items()):
            least, kind = (0, "an id") if name == "eos_token_id" else (1, "a positive integer")
            if isinstance(size, bool) or not hasattr(size, "__index__") or size < least:
                raise ValueError(f"{name} must be {kind}, not {size!r}")
            object.__setattr__(self, name, operator.index(size))  # NumPy's integers become Python's
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd = {self.n_embd} must be a multiple of n_head = {self.n_head}")
        if self.eos_token_id >= self.vocab_size:
            raise ValueError(f"eos_token_id = {self.eos_token_id} is outside the vocabulary of {self.vocab_size} ids")


class Rows(NamedTuple):
    """Tokens of one or more texts as rows of one array, and which rows see each other.

    Linear layers, norms and GELU treat each row alone; only attention reads `blocks`. A row in no block, such as a pad,
    sees nothing and is not seen.
    """

    tokens: Array  # (N,)
    positions: Array  # (N,), each token's position in its text, from 0
    blocks: Sequence[Block]
    wanted: Sequence[int] | None = None  # (M,), the rows whose logits are wanted; None for all

    def on(self, xp: Any) -> "Rows":
        """The same rows as arrays of the library `xp`."""
        return self._replace(tokens=xp.asarray(self.tokens), positions=xp.asarray(self.positions))

    def masked_blocks(self) -> tuple[tuple[slice, slice, int, Array], ...]:
        """Each block with its mask, (S, T): -inf where the key comes later in the text than the query, else 0."""
        xp, blocks = array_module(self.positions), []
        for queries, keys, count in self.blocks:
            q, k = self.positions[queries], self.positions[keys]
            q, k = q[: q.shape[0] // count], k[: k.shape[0] // count]  # the texts of a block are alike
            mask = xp.where(k[:, None] > q, -math.inf, 0.0).astype("float32")
            blocks.append((queries, keys, count, mask))
        return tuple(blocks)

    def attention(self, last: int) -> Attention:
        """Attention within the blocks; layer `last` leaves out the blocks that hold no wanted query."""
        blocks = self.masked_blocks()
        wanted = range(self.tokens.shape[0]) if self.wanted is None else sorted(self.wanted)
        wanted_blocks = tuple(b for b in blocks if bisect_left(wanted, b[0].start) < bisect_left(wanted, b[0].stop))

        def attend(i: int, qkv: Tensor) -> Tensor:
            return ops.block_attention(qkv, wanted_blocks if i == last else blocks)

        return attend


def parameter_shapes(config: Config) -> dict[str, tuple[int, ...]]:
    """The name and shape of every parameter, as in the table above."""
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
    """New parameters: GPT-2's normal(0, 0.02), and 0.02/sqrt(2 n_layer) where a layer adds to the residual.

    Norms start as the identity, biases at 0. Source: Radford et al. 2019, section 2.3.
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
    """A constant copy, the reference model: it builds no graph, and no optimizer moves it."""
    return {name: Tensor(p.data.copy()) for name, p in params.items()}


def placed(params: Params, device: str) -> Params:
    """The same parameters on a device, "cpu" or "cuda"; arrays that are there already are not copied."""
    xp = device_module(device)
    return {name: Tensor(xp.asarray(p.data), p.requires_grad) for name, p in params.items()}


def check_length(length: int, config: Config, name: str = "a text") -> None:
    """Raise ValueError if a text of this name has more tokens than the model has positions."""
    if length > config.n_positions:
        raise ValueError(f"{name} of {length} tokens is longer than the model's n_positions = {config.n_positions}")


def batch_rows(tokens: Any, config: Config, real: Any = None) -> Rows:
    """The rows of a batch, (B, T) -> N = B T. Where `real`, (B, T), is false the row is a pad and in no block."""
    tokens = asarray(tokens)
    if tokens.ndim != 2 or (real is not None and asarray(real).shape != tokens.shape):
        masks = "" if real is None else f", and `real` the same, not {asarray(real).shape}"
        raise ValueError(f"tokens must be (B, T), not {tokens.shape}{masks}")
    xp, (B, T) = array_module(tokens), tokens.shape
    tokens = index_array(tokens, config.vocab_size, xp).reshape(B * T)
    if real is None:
        check_length(T, config)
        return Rows(tokens, xp.tile(xp.arange(T), B), [(slice(0, B * T), slice(0, B * T), B)] if B * T else [])
    real = asarray(real)
    if real.dtype.kind not in "biu" or not ((real == 0) | (real == 1)).all():
        raise ValueError("`real` is true or 1 at tokens, false or 0 at pads: not an additive mask, not other numbers")
    positions: list[int] = []
    blocks: list[Block] = []
    for b, row in enumerate((real == 1).tolist()):
        length, first = row.count(True), row.index(True) if True in row else 0
        check_length(length, config, f"row {b}: a text")
        if not all(row[first : first + length]):
            raise ValueError(f"row {b} has a pad between two real tokens: pads belong before or after a text")
        positions += [*[0] * first, *range(length), *[0] * (T - first - length)]
        rows = slice(b * T + first, b * T + first + length)
        blocks += [(rows, rows, 1)] if length else []
    return Rows(tokens, xp.asarray(positions), blocks)


def forward(params: Params, config: Config, tokens: Any, real: Any = None) -> Tensor:
    """Logits for the token after each token.  (B, T) integers -> (B, T, V)

    `real`, (B, T), is false at pads, which may come before or after a text; positions count from the first real token.
    The logits at a pad mean nothing. Raises ValueError if a text has more than `n_positions` tokens,
    IndexError if a token is outside the vocabulary.
    """
    tokens = asarray(tokens)
    logits = row_logits(params, config, batch_rows(tokens, config, real))  # (B T, V)
    return ops.reshape(logits, (*tokens.shape, config.vocab_size))  # (B T, V) -> (B, T, V)


def row_logits(params: Params, config: Config, rows: Rows, attention: Attention | None = None) -> Tensor:
    """Logits of the wanted rows, (M, V): the states, times the embeddings of all tokens."""
    return row_states(params, config, rows, attention) @ ops.transpose(params["wte.weight"])  # (M, C) -> (M, V)


def row_states(params: Params, config: Config, rows: Rows, attention: Attention | None = None) -> Tensor:
    """The wanted rows after the last norm, (M, C); `attention(i, qkv)`, if given, replaces the attention of layer i."""
    xp, last = array_module(params["wte.weight"].data), config.n_layer - 1
    rows = rows.on(xp)
    attention = attention or rows.attention(last)
    wanted = None if rows.wanted is None else xp.asarray(rows.wanted)
    x = ops.embedding(params["wte.weight"], rows.tokens) + ops.embedding(params["wpe.weight"], rows.positions)
    for i in range(config.n_layer):  # after the last attention no row needs another: (N, C) -> (M, C)
        x = layer(params, config, i, x, attention, wanted if i == last else None)
    return ops.layer_norm(x, params["ln_f.weight"], params["ln_f.bias"])


def layer(
    params: Params, config: Config, i: int, x: Tensor, attention: Attention, wanted: Array | None = None
) -> Tensor:
    """Layer i: attention, then the MLP; each reads normed rows and adds to the residual.  (N, C) -> (N, C) or (M, C)"""
    N, C, H = *x.shape, config.n_head

    def affine(name: str, x: Tensor) -> Tensor:
        return ops.linear(x, params[f"h.{i}.{name}.weight"], params[f"h.{i}.{name}.bias"])

    def norm(name: str, x: Tensor) -> Tensor:
        return ops.layer_norm(x, params[f"h.{i}.{name}.weight"], params[f"h.{i}.{name}.bias"])

    qkv = affine("attn.c_attn", norm("ln_1", x))  # (N, C) -> (N, 3C)
    y = attention(i, ops.reshape(qkv, (N, 3, H, C // H)))  # (N, 3, H, D) -> (N, H, D)
    y = ops.reshape(y, (N, C))  # (N, H, D) -> (N, C)
    if wanted is not None:
        x, y = x[wanted], y[wanted]  # (N, C) -> (M, C)
    x = x + affine("attn.c_proj", y)  # (M, C); M = N if all rows are wanted
    y = ops.gelu(affine("mlp.c_fc", norm("ln_2", x)))  # (M, C) -> (M, 4C)
    return x + affine("mlp.c_proj", y)  # (M, 4C) -> (M, C)
