"""log pi(y|x), the log-probability of a response to a prompt, by three routes that must agree.

1. `sequence_logprob`, the definition: concatenate, forward, slice, log_softmax, gather, sum.
2. `padded_logprobs`: all texts of a batch of pairs, padded to one length.
3. `shared_logprobs`: each pair's prompt is computed once for both responses (on a GPU, twice).

`packed_logprobs` gives the single tokens that the first route sums. A response that was not cut ends in end-of-text,
which is scored like any token. The last token is never an input, so a text may end one past `n_positions`.
"""

import operator
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby, repeat
from typing import Any, NamedTuple

from . import ops
from .backend import Array, array_module, asarray, index_array, on_host
from .model import Block, Config, Params, Rows, check_length, forward, row_logits
from .tensor import Tensor
from .tokenizer import END_OF_TEXT

Example = tuple[Sequence[int], Sequence[int]]  # ids of prompt and response
Pair = tuple[Sequence[int], Sequence[int], Sequence[int]]  # ids of prompt x, chosen y_w, rejected y_l
Pick = tuple[int, int, int]  # the row that predicts a token, the token, the number of its response


class Batch(NamedTuple):
    """Pairs for one step, and their log-probabilities under the reference if these are known already.

    Votes [7, 3] count as seven such pairs and three whose responses are exchanged: in the loss, in the likelihood of
    the chosen responses, and in every metric.
    """

    pairs: Sequence[Pair]
    ref_logp_w: Array = None  # (B,)
    ref_logp_l: Array = None
    votes: Array = None  # (B, 2), for chosen and for rejected; None if each pair is one label


def sequence_logprob(params: Params, config: Config, prompt: Any, response: Any) -> Tensor:
    """log pi(y|x) = sum_t log pi(y_t | x, y_1 ... y_(t-1)), in nats.  (B, Tp), (B, Tr) integers -> (B,)

    Raises ValueError if prompts or responses are empty, or a text is too long for the model.
    """
    prompt, response = asarray(prompt), asarray(response)
    if not prompt.ndim == response.ndim == 2 or len(prompt) != len(response):
        raise ValueError(f"prompt and response must be (B, Tp) and (B, Tr), not {prompt.shape} and {response.shape}")
    Tp, Tr = prompt.shape[1], response.shape[1]
    if not (Tp and Tr):
        raise ValueError(f"prompt and response need at least one token each, not {Tp} and {Tr}")
    tokens = array_module(prompt).concatenate([prompt, response], axis=1)  # (B, Tp + Tr)
    logits = forward(params, config, tokens[:, :-1])  # (B, Tp + Tr - 1) -> (B, Tp + Tr - 1, V)
    logp = ops.log_softmax(logits[:, Tp - 1 :])  # the row of token t predicts token t + 1: (B, Tr, V)
    return ops.sum(ops.gather(logp, response), axis=-1)  # (B, Tr, V) -> (B, Tr) -> (B,)


def padded_logprobs(params: Params, config: Config, pairs: Sequence[Pair], left: bool = False) -> tuple[Tensor, Tensor]:
    """log pi(y_w|x) and log pi(y_l|x) of each pair, from one forward of a padded batch.  -> (B,), (B,)

    The batch, (2B, T), holds the chosen texts, then the rejected ones, padded on the right or the `left`. Predictions
    at pads are not selected, so they contribute nothing even where they are -inf.
    """
    texts = [(x, y) for x, y, _ in checked(pairs)] + [(x, y) for x, _, y in pairs]
    T = max(len(x) + len(y) - 1 for x, y in texts)
    tokens, real = [], []
    picks: list[Pick] = []
    for b, (x, y) in enumerate(texts):
        inputs, pads = [*x, *y][:-1], T - len(x) - len(y) + 1
        before, after = (pads, 0) if left else (0, pads)
        tokens.append([END_OF_TEXT] * before + inputs + [END_OF_TEXT] * after)
        real.append([False] * before + [True] * len(inputs) + [False] * after)
        first = b * T + before + len(x) - 1  # the row that predicts y_1
        picks += zip(range(first, first + len(y)), y, repeat(b))
    logits = forward(params, config, tokens, real)  # (2B, T) -> (2B, T, V)
    logp = token_logprobs(ops.reshape(logits, (len(texts) * T, config.vocab_size)), picks)
    return response_sums(logp, picks, len(pairs))


def shared_logprobs(params: Params, config: Config, pairs: Sequence[Pair]) -> tuple[Tensor, Tensor]:
    """log pi(y_w|x) and log pi(y_l|x) of each pair, from one forward.  -> (B,), (B,)

    The rows of a pair are chosen | prompt | rejected, so that each response's keys are one slice. The prompt sees
    itself; either response sees itself and the prompt. The prompt's last row predicts both first tokens. It belongs to
    the block of the rejected rows, so that the prompt's own block has no wanted row. A GPU is quicker with few large
    operations than with few rows: there each text has its own prompt, and pads, and all texts form one block.
    """
    for b, (x, w, l) in enumerate(checked(pairs)):
        check_length(len(x) + max(len(w), len(l)) - 1, config, f"pair {b}: a text")
    if not on_host(params["wte.weight"].data):
        layout = packed(config, [(x, w) for x, w, _ in pairs] + [(x, l) for x, _, l in pairs], one_block=True)
        return response_sums(layout.logprobs(params, config), layout.picks, len(pairs))
    layout = Layout()
    for b, (x, w, l) in enumerate(pairs):
        chosen = len(layout.tokens)  # the first row of each part
        prompt = chosen + len(w) - 1
        rejected = prompt + len(x)
        last, end = rejected - 1, rejected + len(l) - 1  # the prompt's last row, and the first of the next pair
        layout.tokens += [*w[:-1], *x, *l[:-1]]
        layout.positions += [*range(len(x), len(x) + len(w) - 1), *range(len(x) + len(l) - 1)]
        layout.add_block(slice(last, end), slice(prompt, end))  # the prompt's last row and rejected: prompt, rejected
        layout.add_block(slice(chosen, prompt), slice(chosen, rejected))  # chosen: chosen, prompt
        layout.add_block(slice(prompt, last), slice(prompt, last))  # prompt: prompt
        layout.picks += zip([last, *range(chosen, prompt)], w, repeat(b))
        layout.picks += zip([last, *range(rejected, end)], l, repeat(len(pairs) + b))
    return response_sums(layout.logprobs(params, config), layout.picks, len(pairs))


def packed_logprobs(params: Params, config: Config, examples: Sequence[Example]) -> Tensor:
    """Log-probability of each response token of (prompt, response) examples, from one forward.  -> (M,)

    The tokens come in the order of `packed`, not the caller's: take sums or means, or score one example at a time.
    """
    return packed(config, examples, one_block=not on_host(params["wte.weight"].data)).logprobs(params, config)


def packed(config: Config, examples: Sequence[Example], one_block: bool = False) -> "Layout":
    """(prompt, response) examples, shortest first; those of one length are neighbours and form one block.

    For `one_block` of all texts each gets pads up to the longest; they come after its tokens, which do not see them.
    """
    for b, example in enumerate(checked(examples)):
        check_length(text_length(example) - 1, config, f"example {b}: a text")
    by_length = sorted(enumerate(examples), key=lambda item: text_length(item[1]))
    layout, longest = Layout(), text_length(by_length[-1][1])
    for length, group in groupby(by_length, key=lambda item: longest if one_block else text_length(item[1])):
        start = len(layout.tokens)
        for b, (x, y) in group:
            first = len(layout.tokens) + len(x) - 1  # the row that predicts y_1
            layout.picks += zip(range(first, first + len(y)), y, repeat(b))
            layout.tokens += [*x, *y][:-1] + [END_OF_TEXT] * (length - len(x) - len(y))
            layout.positions += range(length - 1)
        rows = slice(start, len(layout.tokens))
        layout.add_block(rows, rows, (rows.stop - start) // (length - 1))
    return layout


@dataclass
class Layout:
    """Texts laid out as rows, one after another, and the tokens to score."""

    tokens: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    blocks: list[Block] = field(default_factory=list)
    picks: list[Pick] = field(default_factory=list)

    def add_block(self, queries: slice, keys: slice, count: int = 1) -> None:
        """Let rows see rows; without a query there is nothing to add."""
        if queries.start < queries.stop:
            self.blocks.append((queries, keys, count))

    def rows(self, config: Config) -> tuple[Rows, list[Pick]]:
        """The rows, of which those are wanted that predict a picked token, and the picks, numbered among the wanted."""
        wanted = sorted({row for row, _, _ in self.picks})
        number = {row: i for i, row in enumerate(wanted)}
        tokens = index_array(self.tokens, config.vocab_size, array_module())
        picks = [(number[row], token, response) for row, token, response in self.picks]
        return Rows(tokens, asarray(self.positions), self.blocks, wanted), picks

    def logprobs(self, params: Params, config: Config) -> Tensor:
        """Log-probability of each picked token, from the logits of those rows alone that predict one.  -> (M,)"""
        rows, picks = self.rows(config)
        return token_logprobs(row_logits(params, config, rows), picks)


def text_length(example: Sequence[Sequence[int]]) -> int:
    """The number of tokens of an example, prompt and response together."""
    return sum(map(len, example))


def checked(examples: Sequence[Any]) -> Sequence[Any]:
    """The examples, tuples of lists of ids; raises ValueError if there are none or a part is empty."""
    if not len(examples):
        raise ValueError("there is nothing to score")
    for b, parts in enumerate(examples):
        for name, ids in zip(("prompt", "chosen" if len(parts) > 2 else "response", "rejected"), parts):
            if not len(ids):
                raise ValueError(f"example {b}: the {name} has no token")
    return examples


def collate(
    pairs: Sequence[Any], ref_logp_w: Array | None = None, ref_logp_l: Array | None = None, votes: Any = None
) -> Batch:
    """A batch of pairs (prompt, chosen, rejected) of ids, of any lengths.

    `ref_logp_w` and `ref_logp_l`, (B,), are what `training.reference_logprobs` returned for these pairs, if known.
    `votes`, (B, 2), are (1, 0) unless given.
    """
    for logp in (ref_logp_w, ref_logp_l):
        if (logp is None) != (ref_logp_w is None) or (logp is not None and logp.shape != (len(pairs),)):
            raise ValueError(f"ref_logp_w and ref_logp_l must be ({len(pairs)},), one entry per pair, or both None")
    lists = [tuple([operator.index(token) for token in ids] for ids in pair) for pair in pairs]
    if any(len(pair) != 3 for pair in lists):
        raise ValueError("a pair is (prompt, chosen, rejected)")
    batch = Batch(checked(lists), ref_logp_w, ref_logp_l)
    votes = asarray([(1, 0)] * len(pairs) if votes is None else votes)
    if votes.shape != (len(pairs), 2) or not ((votes >= 0).all() and (votes.sum(axis=1) > 0).all()):
        raise ValueError(f"votes must be ({len(pairs)}, 2), two numbers of at least 0 for each pair, and not both 0")
    return batch if (votes == (1, 0)).all() else batch._replace(votes=votes)


def token_logprobs(logits: Tensor, picks: list[Pick]) -> Tensor:
    """Log-probability of each picked token.  (N, V) -> (M,)"""
    N, V = logits.shape
    index_array([token for _, token, _ in picks], V, array_module())  # in `flat`, V would be the next row's 0
    flat = array_module(logits.data).asarray([row * V + token for row, token, _ in picks])
    return ops.reshape(ops.log_softmax(logits), (N * V,))[flat]  # (N, V) -> (N V,) -> (M,)


def response_sums(logp: Tensor, picks: list[Pick], B: int) -> tuple[Tensor, Tensor]:
    """Log-probabilities of the picks, summed per response: B chosen, then B rejected.  (M,) -> (B,), (B,)"""
    sums = ops.segment_sum(logp, [response for _, _, response in picks], 2 * B)  # (M,) -> (2B,)
    return sums[:B], sums[B:]
