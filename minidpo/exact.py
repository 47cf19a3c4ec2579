"""What can be known exactly about a small world, by enumerating every response.

A response is complete when it ends in end-of-text or has reached the length cap; its other tokens range over
every id except end-of-text.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

from . import ops
from .backend import array_module
from .model import Config, Params, forward
from .tokenizer import END_OF_TEXT

Score = Callable[[Sequence[int]], float]  # log pi(y|x) of a response to some prompt


def complete_responses(vocab_size: int, cap: int, most: int = 100_000) -> list[list[int]]:
    """Every complete response of at most `cap` tokens, shortest first.

    There are n^0 + ... + n^(cap-1) that end in end-of-text and n^cap that are cut, n = vocab_size - 1.

    Raises
    ------
    ValueError
        If there are none, or more than `most`, with their number.
    """
    if vocab_size < 2 or cap < 1:
        raise ValueError(f"a vocabulary of {vocab_size} and a cap of {cap} leave nothing to enumerate")
    n = vocab_size - 1
    count = sum(n**length for length in range(cap + 1))
    if count > most:
        raise ValueError(f"{count} responses are too many to enumerate, {most} at the most: fewer characters or tokens")
    characters = [i for i in range(vocab_size) if i != END_OF_TEXT]
    ended = [[*y, END_OF_TEXT] for length in range(cap) for y in itertools.product(characters, repeat=length)]
    return ended + [list(y) for y in itertools.product(characters, repeat=cap)]


def total_probability(score: Score, vocab_size: int, cap: int) -> float:
    """The normalisation oracle: the sum of exp(score) over all complete responses, 1 for a distribution.

    It is blind to whatever is another distribution; for that see `chain_rule_logprob`.
    """
    return math.fsum(math.exp(score(y)) for y in complete_responses(vocab_size, cap))


def chain_rule_logprob(params: Params, config: Config, prompt: Sequence[int], response: Sequence[int]) -> float:
    """log pi(y|x) as a sum over prefixes: sum_t log_softmax(forward(x, y_1 ... y_(t-1)))[y_t], in nats.

    One forward per prefix, of which the last row is read: no shift, no slice, no mask.
    """
    total = 0.0
    for t, token in enumerate(response):
        prefix: Any = array_module().asarray([[*prompt, *response[:t]]])
        last = forward(params, config, prefix).data[0, -1]  # (1, Tp + t, V) -> (V,)
        total += ops.log_softmax(last).data[token].item()
    return total
