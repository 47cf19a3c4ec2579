"""Sampling responses from the model, with a cache of keys and values."""

import math
import operator
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy

from . import ops
from .backend import Array, array_module, index_array, to_host
from .model import Config, Params, Rows, row_logits
from .tensor import Tensor


class Generation(NamedTuple):
    """One response to each prompt."""

    responses: list[list[int]]  # ids; end-of-text is the last one unless the response was cut
    logprobs: list[list[float]]  # log pi(y_t|x, y_1 ... y_(t-1)) in nats, before temperature, top-k and top-p


class Cache:
    """Keys and values of every layer for B texts, so that a step computes only the new tokens.

    All texts end in the same column, so a shorter one begins in a later column.
    """

    def __init__(self, params: Params, config: Config, prompts: Sequence[Sequence[int]], columns: int):
        self.params = {name: p.detach() for name, p in params.items()}  # no graph
        self.config, self.prompts, self.end = config, prompts, max(map(len, prompts))
        self.xp = xp = array_module(params["wte.weight"].data)
        self.starts = xp.asarray([self.end - len(x) for x in prompts])  # (B,), the column of each text's first token
        before = xp.arange(columns) < self.starts[:, None]  # (B, S)
        self.hidden = xp.where(before, -math.inf, 0.0).astype("float32")[:, None, :, None]  # (B, S) -> (B, 1, S, 1)
        self.keys_values = self.room(len(prompts), columns)

    def room(self, B: int, S: int) -> Array:
        """Zeros for the keys and values of B texts in S columns.  (n_layer, 2, B, H, S, D)"""
        config, dtype = self.config, self.params["wte.weight"].dtype
        return self.xp.zeros((config.n_layer, 2, B, config.n_head, S, config.n_embd // config.n_head), dtype=dtype)

    def forward(self, tokens: Array, positions: Array, hidden: Array, keys_values: Array) -> Array:
        """Write keys and values of T new tokens into the last T of S columns, and return the logits after the last.

        (B, T), (B, T), (..., S, T), (n_layer, 2, B, H, S, D) -> (B, V); `hidden` is -inf where a token must not see a
        column, else 0.
        """
        (B, T), H, S = tokens.shape, self.config.n_head, keys_values.shape[-2]

        def attend(i: int, qkv: Tensor) -> Tensor:
            heads = qkv.data.reshape(B, T, 3, H, -1).transpose(2, 0, 3, 1, 4)  # (B T, 3, H, D) -> (3, B, H, T, D)
            keys_values[i, :, :, :, S - T :] = heads[1:]
            y, _ = ops.attention(heads[0] * heads.shape[-1] ** -0.5, keys_values[i, 0], keys_values[i, 1], hidden)
            return Tensor(y.swapaxes(1, 2).reshape(B * T, H, -1))  # (B, H, T, D) -> (B T, H, D)

        rows = Rows(tokens.reshape(-1), positions.reshape(-1), [], range(T - 1, B * T, T) if T > 1 else None)
        return row_logits(self.params, self.config, rows, attend).data

    def read(self) -> Array:
        """Read the prompts, those of one length together and equal ones once; return the logits after each.  (B, V)"""
        xp, logits = self.xp, self.xp.zeros((len(self.prompts), self.config.vocab_size), self.keys_values.dtype)
        for T in sorted({len(x) for x in self.prompts}):
            texts = [b for b, x in enumerate(self.prompts) if len(x) == T]
            place = {x: i for i, x in enumerate(dict.fromkeys(tuple(self.prompts[b]) for b in texts))}
            later = xp.arange(T)[:, None] > xp.arange(T)  # (S, T), S = T
            group, hidden = self.room(len(place), T), xp.where(later, -math.inf, 0.0).astype("float32")
            ids = index_array(list(place), self.config.vocab_size, xp)  # (B, T)
            out = self.forward(ids, xp.tile(xp.arange(T), len(place)), hidden, group)
            rows, into = xp.asarray([place[tuple(self.prompts[b])] for b in texts]), xp.asarray(texts)
            self.keys_values[:, :, into, :, self.end - T : self.end], logits[into] = group[:, :, rows], out[rows]
        return logits

    def extend(self, tokens: Array) -> Array:
        """Append a token to every text, and return the logits after it.  (B,) -> (B, V)"""
        self.end += 1
        hidden, used = self.hidden[:, :, : self.end], self.keys_values[..., : self.end, :]
        return self.forward(self.xp.asarray(tokens)[:, None], self.end - 1 - self.starts, hidden, used)

    def keep(self, rows: Sequence[int]) -> list[int]:
        """Drop all texts but these, the last ones taking the rows that become free; return the row each came from."""
        B = len(rows)
        holes, movers = sorted(set(range(B)) - set(rows)), [row for row in rows if row >= B]
        if holes:
            to, of = self.xp.asarray(holes), self.xp.asarray(movers)
            self.keys_values[:, :, to, :, : self.end] = self.keys_values[:, :, of, :, : self.end]
            self.starts[to], self.hidden[to] = self.starts[of], self.hidden[of]
        self.keys_values, self.starts, self.hidden = self.keys_values[:, :, :B], self.starts[:B], self.hidden[:B]
        moved = dict(zip(holes, movers))
        return [moved.get(row, row) for row in range(B)]


def draw(
    logp: numpy.ndarray, uniform: numpy.ndarray, temperature: float, top_k: int | None, top_p: float | None
) -> numpy.ndarray:
    """Draw a token per row by inverting the cumulative distribution at `uniform`, in [0, 1).  (B, V), (B,) -> (B,)"""
    if temperature == 0:
        return logp.argmax(axis=-1)
    order = numpy.argsort(-logp, axis=-1, kind="stable")  # likeliest first, ties by id
    rows = numpy.arange(len(logp))
    sorted_logp = logp[rows[:, None], order].astype("float64")
    difference = numpy.maximum(sorted_logp - sorted_logp[:, :1], -1e3 * temperature)  # e^-1000 is 0 in float64
    p = numpy.exp(difference / temperature)
    if top_k is not None:
        p[:, top_k:] = 0
    p /= p.sum(axis=-1, keepdims=True)
    if top_p is not None:
        p[numpy.cumsum(p, axis=-1) - p >= top_p] = 0  # the likelier tokens add up to top_p without it
    cumulative = numpy.cumsum(p, axis=-1)
    rank = (cumulative <= uniform[:, None] * cumulative[:, -1:]).sum(axis=-1)  # uniform < 1: a token with p > 0
    return order[rows, rank]


Streams = numpy.random.Generator | Sequence[numpy.random.Generator]


def checked_prompts(config: Config, prompt: Sequence[Any], rng: Streams) -> list[list[int]]:
    """The prompts as lists of ids; raises ValueError or IndexError if `generate` cannot continue them."""
    if len(prompt) and numpy.ndim(prompt[0]) == 0:
        prompt = [prompt]
    prompts = [[operator.index(token) for token in ids] for ids in prompt]
    if not prompts:
        raise ValueError("there is no prompt: generation needs at least one")
    for b, ids in enumerate(prompts):
        if not ids:
            raise ValueError(f"prompt {b} has no token: begin each prompt with end-of-text, id {config.eos_token_id}")
        if len(ids) > config.n_positions:
            raise ValueError(
                f"prompt {b} has {len(ids)} tokens, but the model's n_positions = {config.n_positions}: shorten it"
            )
        index_array(ids, config.vocab_size, numpy)
    if not isinstance(rng, numpy.random.Generator) and len(rng) != len(prompts):
        raise ValueError(f"there are {len(rng)} random generators for {len(prompts)} prompts: give one or one each")
    return prompts


def generate(
    params: Params,
    config: Config,
    prompt: Sequence[Any],
    rng: Streams,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
) -> Generation:
    """Draw a response to each prompt, token by token, until end-of-text or a length limit.

    `prompt` holds integers: (B, Tp), B lists of any lengths, or a single prompt. A response has at most
    `max_new_tokens` tokens, a text at most n_positions + 1. `temperature` divides the logits; 0 takes the likeliest
    token. `top_k` keeps the k likeliest tokens. Of these, `top_p` keeps the fewest likeliest that have at least this
    probability together.

    `rng` is one generator for all prompts or one for each. With its own, a response does not depend on the other
    prompts. A common one gives each step a number per prompt, also for a response that has ended; so a response does
    not depend on the other prompts, only on how many there are. Both hold up to rounding: the last bits of a matrix
    product depend on its number of rows, and may in rare cases decide between two tokens.

    Source: Fan et al. 2018 (arXiv 1805.04833) for top-k, Holtzman et al. 2020 (arXiv 1904.09751) for top-p.
    """
    for name, number, allowed, condition in (
        ("max_new_tokens", max_new_tokens, max_new_tokens >= 1, "at least 1"),
        ("temperature", temperature, temperature >= 0, "at least 0"),
        ("top_k", top_k, top_k is None or top_k >= 1, "at least 1"),
        ("top_p", top_p, top_p is None or 0 < top_p <= 1, "above 0 and at most 1"),
    ):
        if not allowed:
            raise ValueError(f"{name} = {number} is out of range: it must be {condition}")
    prompts, end = checked_prompts(config, prompt, rng), config.eos_token_id
    most = [min(max_new_tokens, config.n_positions + 1 - len(x)) for x in prompts]  # tokens of each response
    out = Generation([[] for _ in prompts], [[] for _ in prompts])
    cache = Cache(params, config, prompts, max(map(len, prompts)) + max(most) - 1)
    texts, logits = list(range(len(prompts))), cache.read()  # which text each row of the cache continues
    while True:
        logp = to_host(ops.log_softmax(logits).data)  # (B, V), B texts that have not ended
        nan = numpy.isnan(logp).any(axis=-1)
        if nan.any():
            raise FloatingPointError(
                "the model's log-probabilities are nan after the prompt that begins with the ids "
                f"{prompts[texts[nan.argmax()]][:5]}; look for nan or inf in its parameters"
            )
        if isinstance(rng, numpy.random.Generator):
            uniform = rng.random(len(prompts))[texts]
        else:
            uniform = numpy.array([rng[b].random() for b in texts])
        tokens = draw(logp, uniform, temperature, top_k, top_p)
        for b, token, nats in zip(texts, tokens.tolist(), logp[numpy.arange(len(texts)), tokens].tolist()):
            out.responses[b].append(token)
            out.logprobs[b].append(nats)
        going = [row for row, b in enumerate(texts) if out.responses[b][-1] != end and len(out.responses[b]) < most[b]]
        if not going:
            return out
        rows = cache.keep(going)
        texts, logits = [texts[row] for row in rows], cache.extend(tokens[rows])
