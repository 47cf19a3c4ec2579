"""log pi(y|x), the log-probability of a response to a prompt, by three routes that must agree.

The first is the seed of everything: concatenate, forward, slice, log_softmax, gather, sum. The second puts
pairs into one padded batch. The third computes each pair's prompt once, though two responses follow it. (For single
responses, `packed_logprobs` gives token by token what the first adds up.)
A response that was not cut ends in end-of-text, which is scored like any token. The last token is never an
input, so a text may end one past `n_positions`.
"""

import itertools
import operator
from collections.abc import Sequence
from typing import Any, NamedTuple

from . import ops
from .backend import Array, array_module, asarray, index_array
from .model import Block, Config, Params, Rows, check_length, forward, row_logits
from .tensor import Tensor
from .tokenizer import END_OF_TEXT

Pair = tuple[Sequence[int], Sequence[int], Sequence[int]]  # ids of prompt x, chosen y_w, rejected y_l
Pick = tuple[int, int, int]  # the row that predicts a token, the token, and the response that it belongs to


class Batch(NamedTuple):
    """Pairs for one step, and what the reference says of them if that is known already."""

    pairs: Sequence[Pair]
    ref_logp_w: Array = None  # (B,)
    ref_logp_l: Array = None


def sequence_logprob(params: Params, config: Config, prompt: Any, response: Any) -> Tensor:
    """Log-probability of each response, in nats: log pi(y|x) = sum_t log pi(y_t | x, y_1 ... y_(t-1)).

    Parameters
    ----------
    params : dict of str to Tensor
    config : Config
    prompt, response : integers, (B, Tp) and (B, Tr)

    Returns
    -------
    Tensor, (B,)

    Raises
    ------
    ValueError
        If prompts or responses are empty, or a text is too long for the model.
    """
    prompt, response = asarray(prompt), asarray(response)
    if not prompt.ndim == response.ndim == 2 or len(prompt) != len(response):
        raise ValueError(f"prompt and response must be (B, Tp) and (B, Tr), not {prompt.shape} and {response.shape}")
    Tp, Tr = prompt.shape[1], response.shape[1]
    if not (Tp and Tr):
        raise ValueError(f"prompt and response need a token each, not {Tp} and {Tr}")
    tokens = array_module(prompt).concatenate([prompt, response], axis=1)  # (B, Tp + Tr)
    logits = forward(params, config, tokens[:, :-1])  # (B, Tp + Tr - 1) -> (B, Tp + Tr - 1, V)
    logp = ops.log_softmax(logits[:, Tp - 1 :])  # the row of token t predicts token t + 1: (B, Tr, V)
    return ops.sum(ops.gather(logp, response), axis=-1)  # (B, Tr, V) -> (B, Tr) -> (B,)


def padded_logprobs(params: Params, config: Config, pairs: Sequence[Pair], left: bool = False) -> tuple[Tensor, Tensor]:
    """log pi(y_w|x) and log pi(y_l|x) of each pair, from one forward of a padded batch.  -> (B,), (B,)

    Chosen and rejected texts stand below each other, (2B, T), padded on the right or the `left`. What a pad
    predicts is not selected, so that it contributes nothing even where it is -inf.

    Raises
    ------
    ValueError
        If a prompt or a response is empty, or a text is too long for the model.
    """
    texts = [(x, y) for x, y, _ in checked(pairs)] + [(x, y) for x, _, y in pairs]
    T = max(len(x) + len(y) - 1 for x, y in texts)
    tokens, real = [], []
    picks: list[Pick] = []
    for b, (x, y) in enumerate(texts):
        inputs = [*x, *y][:-1]
        pads = T - len(inputs)
        tokens.append([END_OF_TEXT] * pads + inputs if left else inputs + [END_OF_TEXT] * pads)
        real.append([False] * pads + [True] * len(inputs) if left else [True] * len(inputs) + [False] * pads)
        first = b * T + (pads if left else 0) + len(x) - 1  # the row that predicts y_1
        picks += [(first + t, token, b) for t, token in enumerate(y)]
    logits = forward(params, config, tokens, real)  # (2B, T) -> (2B, T, V)
    return picked_sums(ops.reshape(logits, (len(texts) * T, config.vocab_size)), picks, len(pairs))


def shared_logprobs(params: Params, config: Config, pairs: Sequence[Pair]) -> tuple[Tensor, Tensor]:
    """log pi(y_w|x) and log pi(y_l|x) of each pair, from one forward without pads.  -> (B,), (B,)

    A pair's rows are chosen | prompt | rejected: each response and the prompt are then one slice of keys.
    The prompt sees itself, either response itself and the prompt, and the last prompt row predicts both first
    tokens: it stands with the rejected ones, so that the prompt's block has no row that is wanted.

    Raises
    ------
    ValueError
        If a prompt or a response is empty, or a text is too long for the model.
    """
    tokens: list[int] = []
    places: list[int] = []
    blocks: list[Block] = []
    picks: list[Pick] = []
    for b, (x, w, l) in enumerate(checked(pairs)):
        check_length(len(x) + max(len(w), len(l)) - 1, config)
        chosen, prompt = len(tokens), len(tokens) + len(w) - 1  # the first row of each part
        rejected, end = prompt + len(x), prompt + len(x) + len(l) - 1
        last = rejected - 1  # of the prompt's rows
        tokens += [*w[:-1], *x, *l[:-1]]
        places += [*range(len(x), len(x) + len(w) - 1), *range(len(x) + len(l) - 1)]  # by these a token is later
        blocks.append((slice(last, end), slice(prompt, end), 1))  # the last prompt row and rejected: prompt, rejected
        if chosen < prompt:
            blocks.append((slice(chosen, prompt), slice(chosen, rejected), 1))  # chosen: chosen, prompt
        if prompt < last:
            blocks.append((slice(prompt, last), slice(prompt, last), 1))  # prompt: prompt
        picks += [(row, token, b) for row, token in zip([last, *range(chosen, prompt)], w)]
        picks += [(row, token, len(pairs) + b) for row, token in zip([last, *range(rejected, end)], l)]
    laid_out = Rows(index_array(tokens, config.vocab_size, array_module()), asarray(places), blocks)
    return picked_sums(*wanted_logits(params, config, laid_out, picks), len(pairs))


def packed_logprobs(params: Params, config: Config, examples: Sequence[tuple[Sequence[int], Sequence[int]]]) -> Tensor:
    """Log-probability of every response token of (prompt, response) examples, from one forward without pads.

    Texts of one length stand together and are one block; the tokens come in that order, not the caller's: take sums
    or means of them, or score one example at a time.  -> (M,)

    Raises
    ------
    ValueError
        If a prompt or a response is empty, or a text is too long for the model.
    """
    tokens: list[int] = []
    places: list[int] = []
    blocks: list[Block] = []
    picks: list[Pick] = []
    by_length = sorted(checked(examples), key=lambda example: len(example[0]) + len(example[1]))
    for length, group in itertools.groupby(by_length, key=lambda example: len(example[0]) + len(example[1])):
        check_length(length - 1, config)
        start = len(tokens)
        for x, y in group:
            picks += [(len(tokens) + len(x) - 1 + t, token, 0) for t, token in enumerate(y)]
            tokens += [*x, *y][:-1]
            places += range(length - 1)
        rows = slice(start, len(tokens))
        blocks.append((rows, rows, (len(tokens) - start) // (length - 1)))
    laid_out = Rows(index_array(tokens, config.vocab_size, array_module()), asarray(places), blocks)
    return picked(*wanted_logits(params, config, laid_out, picks))


def checked(examples: Sequence[Any]) -> Sequence[Any]:
    """The examples, tuples of lists of ids, if there are any and none has an empty part."""
    if not len(examples):
        raise ValueError("there is nothing to score")
    for b, parts in enumerate(examples):
        for name, ids in zip(("prompt", "chosen" if len(parts) > 2 else "response", "rejected"), parts):
            if not len(ids):
                raise ValueError(f"example {b}: the {name} has no token")
    return examples


def collate(pairs: Sequence[Any], ref_logp_w: Array | None = None, ref_logp_l: Array | None = None) -> Batch:
    """Pairs of ids as a batch, each a (prompt, chosen, rejected); lengths may differ.

    Parameters
    ----------
    pairs : sequence of (prompt, chosen, rejected) ids
    ref_logp_w, ref_logp_l : (B,), optional
        What `training.reference_logprobs` said of these pairs.

    Raises
    ------
    ValueError
        If there is no pair, a part is empty, or the reference's log-probabilities are not one per pair.
    """
    for logp in (ref_logp_w, ref_logp_l):
        if (logp is None) != (ref_logp_w is None) or (logp is not None and logp.shape != (len(pairs),)):
            raise ValueError(
                f"{len(pairs)} pairs need as many log-probabilities under the reference, twice or not at all"
            )
    lists = [tuple([operator.index(token) for token in ids] for ids in pair) for pair in pairs]
    if any(len(pair) != 3 for pair in lists):
        raise ValueError("a pair is (prompt, chosen, rejected)")
    return Batch(checked(lists), ref_logp_w, ref_logp_l)


def wanted_logits(params: Params, config: Config, rows: Rows, picks: list[Pick]) -> tuple[Tensor, list[Pick]]:
    """The logits of those rows alone that predict a token, and the picks with the numbers that these rows then have."""
    wanted = sorted({row for row, _, _ in picks})
    number = {row: i for i, row in enumerate(wanted)}
    logits = row_logits(params, config, rows, wanted=wanted)
    return logits, [(number[row], token, response) for row, token, response in picks]


def picked(logits: Tensor, picks: list[Pick]) -> Tensor:
    """Log-probability of each picked token.  (N, V) -> (M,)"""
    N, V = logits.shape
    index_array([token for _, token, _ in picks], V, array_module())  # refuses what would be another row's in `flat`
    flat = array_module(logits.data).asarray([row * V + token for row, token, _ in picks])
    return ops.reshape(ops.log_softmax(logits), (N * V,))[flat]  # (N, V) -> (N V,) -> (M,)


def picked_sums(logits: Tensor, picks: list[Pick], B: int) -> tuple[Tensor, Tensor]:
    """Log-probabilities of the picks, summed by response; B to 2B - 1 are the rejected.  (N, V) -> (B,), (B,)"""
    sums = ops.segment_sum(picked(logits, picks), [response for _, _, response in picks], 2 * B)  # (M,) -> (2B,)
    return sums[:B], sums[B:]
