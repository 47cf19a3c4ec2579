"""Sampling responses from the model, with a cache of keys and values."""

import operator
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy

from . import ops
from .backend import Array, array_module, index_array, to_host
from .model import Config, Params, Rows, check_length, row_logits
from .tensor import Tensor


class Generation(NamedTuple):
    """One response to each prompt."""

    responses: list[list[int]]  # ids; end-of-text is the last one unless the response was cut
    logprobs: list[list[float]]  # log pi(y_t|x, y_1 ... y_(t-1)) in nats, before temperature, top-k and top-p


class Cache:
    """Keys and values of every layer for B texts of equal length, so that a step computes only the new tokens."""

    def __init__(self, params: Params, config: Config, B: int, length: int):
        check_length(length, config)
        self.params = {name: p.detach() for name, p in params.items()}  # no graph
        self.config = config
        self.length = 0  # tokens of each text so far
        wte = params["wte.weight"].data
        shape = (config.n_layer, 2, B, config.n_head, length, config.n_embd // config.n_head)
        self.keys_values = array_module(wte).zeros(shape, dtype=wte.dtype)

    def extend(self, tokens: Array) -> Array:
        """Append T tokens to every text and return the logits after the last one.  (B, T) -> (B, V)"""
        xp, (B, T) = array_module(self.keys_values), tokens.shape
        start, end, H = self.length, self.length + T, self.config.n_head
        later = xp.arange(end) > xp.arange(start, end)[:, None]  # (T, S), the same in all layers

        def attend(i: int, qkv: Tensor) -> Tensor:
            heads = qkv.data.reshape(B, T, 3, H, -1).transpose(2, 0, 3, 1, 4)  # (B T, 3, H, D) -> (3, B, H, T, D)
            self.keys_values[i, :, :, :, start:end] = heads[1:]
            keys, values = (self.keys_values[i, j, :, :, :end] for j in range(2))
            y = ops.causal_attention(heads[0], keys, values, later).data
            return Tensor(y.swapaxes(1, 2).reshape(B * T, H, -1))  # (B, H, T, D) -> (B T, H, D)

        ids = index_array(tokens, self.config.vocab_size, xp).reshape(B * T)
        places = xp.tile(xp.arange(start, end), B)  # where in its text each token is
        logits = row_logits(self.params, self.config, Rows(ids, places, []), attend).data
        self.length = end
        return logits.reshape(B, T, -1)[:, -1]  # (B T, V) -> (B, V)


def draw(
    logp: numpy.ndarray, uniform: numpy.ndarray, temperature: float, top_k: int | None, top_p: float | None
) -> numpy.ndarray:
    """Draw a token per row by inverting the cumulative distribution at `uniform`, in [0, 1).  (B, V), (B,) -> (B,)"""
    nan = numpy.isnan(logp).any(axis=-1)
    if nan.any():
        raise FloatingPointError(
            f"prompt {nan.argmax()}: the model's log-probabilities are nan; look for nan or inf in its parameters"
        )
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


def generate(
    params: Params,
    config: Config,
    prompt: Sequence[Any],
    rng: numpy.random.Generator | Sequence[numpy.random.Generator],
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
    prompts. A common one gives each step a number per prompt, also for a prompt that is still being read or a response
    that has ended; so among prompts of one length, a response does not depend on when the others end.

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
    if len(prompt) and numpy.ndim(prompt[0]) == 0:
        prompt = [prompt]
    texts, end = [[operator.index(token) for token in ids] for ids in prompt], config.eos_token_id
    lengths = [len(text) for text in texts]
    if not texts:
        raise ValueError("there is no prompt: generation needs at least one")
    for b, length in enumerate(lengths):
        if not length:
            raise ValueError(f"prompt {b} has no token: begin each prompt with end-of-text, id {end}")
        if length > config.n_positions:
            raise ValueError(
                f"prompt {b} has {length} tokens, but the model's n_positions = {config.n_positions}: shorten it"
            )
    if not isinstance(rng, numpy.random.Generator) and len(rng) != len(texts):
        raise ValueError(f"there are {len(rng)} random generators for {len(texts)} prompts: give one, or one for each")
    done = [False] * len(texts)
    logprobs: list[list[float]] = [[] for _ in texts]
    limit = min(max(lengths) + max_new_tokens, config.n_positions + 1)  # tokens of a text
    cache = Cache(params, config, len(texts), limit - 1)
    tokens = numpy.array([text[: min(lengths)] for text in texts])
    while not all(done):
        logp = to_host(ops.log_softmax(cache.extend(tokens)).data)  # (B, T) -> (B, V)
        t = cache.length
        drawing = [t >= length and not over for length, over in zip(lengths, done)]
        if isinstance(rng, numpy.random.Generator):
            uniform = rng.random(len(texts))
        else:
            uniform = numpy.array([own.random() if now else 0.0 for own, now in zip(rng, drawing)])
        new = draw(logp, uniform, temperature, top_k, top_p)
        for b, text in enumerate(texts):
            if drawing[b]:
                text.append(int(new[b]))
                logprobs[b].append(float(logp[b, new[b]]))
                done[b] = text[-1] == end or len(text) == min(lengths[b] + max_new_tokens, limit)
        # a longer prompt gives its own next token; finished rows receive end-of-text, and their output is ignored
        tokens = numpy.array([[text[t] if t < len(text) else end] for text in texts])
    return Generation([text[n:] for text, n in zip(texts, lengths)], logprobs)
