"""Sampling from the model, with a cache of keys and values."""

import operator
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy

from . import ops
from .backend import Array, array_module, index_array, to_host
from .model import Config, Params, Rows, check_length, row_logits
from .tensor import Tensor
from .tokenizer import END_OF_TEXT


class Generation(NamedTuple):
    """What `generate` returns, one entry per prompt."""

    responses: list[list[int]]  # ids, end-of-text included unless the response was cut
    logprobs: list[list[float]]  # the model's own log pi(y_t | ...), before temperature and truncation, in nats


class Cache:
    """The keys and values of every layer for B texts of equal length, so that a step computes one token each."""

    def __init__(self, params: Params, config: Config, B: int, length: int):
        check_length(length, config)
        self.params = {name: p.detach() for name, p in params.items()}  # no graph
        self.config = config
        self.length = 0  # tokens so far
        wte = params["wte.weight"].data
        shape = (config.n_layer, 2, B, config.n_head, length, config.n_embd // config.n_head)
        self.keys_values = array_module(wte).zeros(shape, dtype=wte.dtype)

    def extend(self, tokens: Array) -> Array:
        """Take in the next T tokens of every text; the logits after the last of them.  (B, T) -> (B, V)"""
        xp, (B, T) = array_module(self.keys_values), tokens.shape
        start, end, H = self.length, self.length + T, self.config.n_head
        later = xp.arange(end) > xp.arange(start, end)[:, None]  # (T, S), once for all layers

        def attend(i: int, qkv: Tensor) -> Tensor:
            heads = qkv.data.reshape(B, T, 3, H, -1).transpose(2, 0, 3, 1, 4)  # (B T, 3, H, D) -> (3, B, H, T, D)
            self.keys_values[i, :, :, :, start:end] = heads[1:]
            keys, values = (self.keys_values[i, j, :, :, :end] for j in range(2))
            y = ops.causal_attention(heads[0], keys, values, later).data
            return Tensor(y.swapaxes(1, 2).reshape(B * T, H, -1))  # (B, H, T, D) -> (B T, H, D)

        rows = Rows(
            index_array(tokens, self.config.vocab_size, xp).reshape(B * T), xp.tile(xp.arange(start, end), B), []
        )
        logits = row_logits(self.params, self.config, rows, attend).data
        self.length = end
        return logits.reshape(B, T, -1)[:, -1]  # (B T, V) -> (B, V)


def draw(
    logp: numpy.ndarray, uniform: numpy.ndarray, temperature: float, top_k: int | None, top_p: float | None
) -> numpy.ndarray:
    """One token per row from log-probabilities, by inverting the distribution function at `uniform`.

    (B, V), (B,) -> (B,)
    """
    if numpy.isnan(logp).any():
        raise FloatingPointError("the model's log-probabilities are nan: there is nothing to draw from")
    if temperature == 0:
        return logp.argmax(axis=-1)
    order = numpy.argsort(-logp, axis=-1, kind="stable")  # likeliest first
    rows = numpy.arange(len(logp))
    ordered = logp[rows[:, None], order].astype("float64")
    below = numpy.maximum(ordered - ordered[:, :1], -1e3 * temperature)  # e^-1000 is 0 already
    p = numpy.exp(below / temperature)
    if top_k is not None:
        p[:, top_k:] = 0
    p /= p.sum(axis=-1, keepdims=True)
    if top_p is not None:
        p[numpy.cumsum(p, axis=-1) - p >= top_p] = 0  # what the likelier ones have together is enough
    reached = numpy.cumsum(p, axis=-1)
    choice = (reached <= uniform[:, None] * reached[:, -1:]).sum(axis=-1)  # uniform < 1: never past the last kept
    return order[rows, choice]


def generate(
    params: Params,
    config: Config,
    prompt: Sequence[Any],
    rng: numpy.random.Generator,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
) -> Generation:
    """Draw one response to each prompt, token by token, until end-of-text or the length cap.

    Parameters
    ----------
    params : dict of str to Tensor
    config : Config
    prompt : integers, (B, Tp), or B lists of any lengths, or a single one
    rng : numpy.random.Generator
        Gives one uniform number per prompt and step, also to those that are done or whose prompt still
        goes on: for prompts of one length, what is drawn for one does not depend on when another ends.
    max_new_tokens : int
        Length cap of a response; the context is another: a text may end one past `n_positions`.
    temperature : float
        Divides the logits; at 0 the likeliest token is taken.
    top_k : int, optional
        Keep the k likeliest tokens.
    top_p : float, optional
        Keep the fewest likeliest tokens that have this much probability together.

    Returns
    -------
    Generation

    Raises
    ------
    ValueError
        If there is no prompt, one is empty or longer than the context, or a number is out of its range.
    FloatingPointError
        If the model gives nan.

    References
    ----------
    Fan et al. 2018 (arXiv 1805.04833) for top-k, Holtzman et al. 2020 (arXiv 1904.09751) for top-p.
    """
    if len(prompt) and numpy.ndim(prompt[0]) == 0:
        prompt = [prompt]
    texts = [[operator.index(token) for token in ids] for ids in prompt]
    lengths = [len(text) for text in texts]
    if not texts or not all(lengths):
        raise ValueError("generation needs at least one prompt, and each prompt at least one token")
    for name, number, fine in (
        ("max_new_tokens", max_new_tokens, max_new_tokens >= 1),
        ("temperature", temperature, temperature >= 0),
        ("top_k", top_k, top_k is None or top_k >= 1),
        ("top_p", top_p, top_p is None or 0 < top_p <= 1),
    ):
        if not fine:
            raise ValueError(f"{name} = {number} is out of range")
    for length in lengths:
        check_length(length, config)
    done = [False] * len(texts)
    logprobs: list[list[float]] = [[] for _ in texts]
    longest = min(max(lengths) + max_new_tokens, config.n_positions + 1)
    cache = Cache(params, config, len(texts), longest - 1)
    tokens = numpy.array([text[: min(lengths)] for text in texts])
    while not all(done):
        logits = cache.extend(tokens)
        logp = to_host(ops.log_softmax(logits).data)  # (B, V)
        chosen = draw(logp, rng.random(len(texts)), temperature, top_k, top_p)
        t = cache.length
        for b, text in enumerate(texts):
            if t >= lengths[b] and not done[b]:
                text.append(int(chosen[b]))
                logprobs[b].append(float(logp[b, chosen[b]]))
                done[b] = text[-1] == END_OF_TEXT or len(text) == min(lengths[b] + max_new_tokens, longest)
        # a prompt that is longer goes on as it is written; a text that is done goes on, unheard, with end-of-text
        tokens = numpy.array([[text[t] if t < len(text) else END_OF_TEXT] for text in texts])
    return Generation([text[n:] for text, n in zip(texts, lengths)], logprobs)
