"""Eleven wrong ways to score a response, and how two oracles find them.

Each mutant is `scoring.sequence_logprob` for one prompt and response, with one mistake. The scores of seven are not a
distribution over responses, and the normalisation oracle finds them. Those of the other four are a wrong distribution:
they sum to 1, and only the chain rule, one forward per prefix, finds them.
"""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

from .. import ops
from ..model import Config, Params, batch_rows, row_logits
from ..scoring import sequence_logprob
from ..tokenizer import END_OF_TEXT
from .exact import chain_rule_logprob, complete_responses, total_probability

Ids = Sequence[int]


def token_logps(
    params: Params, config: Config, x: Ids, y: Ids, shift: int = 1, temperature: float = 1.0, start: int = 0
) -> list[float]:
    """log pi of each response token, read `shift` rows before it; positions count from `start`."""
    rows = batch_rows([[*x, *y]], config)
    logits = row_logits(params, config, rows._replace(positions=rows.positions + start)).data  # (Tp + Tr, V)
    logp = ops.log_softmax(logits / temperature).data
    return [logp[len(x) + t - shift, token].item() for t, token in enumerate(y)]


def correct(params: Params, config: Config, x: Ids, y: Ids) -> float:
    return sequence_logprob(params, config, [list(x)], [list(y)]).item()


def no_shift(params: Params, config: Config, x: Ids, y: Ids) -> float:
    return sum(token_logps(params, config, x, y, shift=0))


def first_token_masked(params: Params, config: Config, x: Ids, y: Ids) -> float:
    return sum(token_logps(params, config, x, y)[1:])


def end_of_text_masked(params: Params, config: Config, x: Ids, y: Ids) -> float:
    return sum(logp for logp, token in zip(token_logps(params, config, x, y), y) if token != END_OF_TEXT)


def pads_scored(params: Params, config: Config, x: Ids, y: Ids) -> float:
    return correct(params, config, x, [*y, END_OF_TEXT])  # one pad, which has the id of end-of-text


def wrong_slice_end(params: Params, config: Config, x: Ids, y: Ids) -> float:
    return sum(token_logps(params, config, x, y)[:-1])


def last_prompt_token_scored(params: Params, config: Config, x: Ids, y: Ids) -> float:
    return correct(params, config, x[:-1], [x[-1], *y])


def mean_for_sum(params: Params, config: Config, x: Ids, y: Ids) -> float:
    return correct(params, config, x, y) / len(y)


def shift_by_two(params: Params, config: Config, x: Ids, y: Ids) -> float:
    return sum(token_logps(params, config, x, y, shift=2))


def dropped_prompt_token(params: Params, config: Config, x: Ids, y: Ids) -> float:
    return correct(params, config, x[1:], y)


def wrong_temperature(params: Params, config: Config, x: Ids, y: Ids) -> float:
    return sum(token_logps(params, config, x, y, temperature=2.0))


def wrong_positions(params: Params, config: Config, x: Ids, y: Ids) -> float:
    return sum(token_logps(params, config, x, y, start=1))


Mutant = Callable[[Params, Config, Ids, Ids], float]
NOT_A_DISTRIBUTION: list[Mutant] = [
    no_shift,
    first_token_masked,
    end_of_text_masked,
    pads_scored,
    wrong_slice_end,
    last_prompt_token_scored,
    mean_for_sum,
]
WRONG_DISTRIBUTION: list[Mutant] = [shift_by_two, dropped_prompt_token, wrong_temperature, wrong_positions]


class Verdict(NamedTuple):
    """The verdict of both oracles on one way to score."""

    name: str
    total_probability: float  # 1 for a distribution
    chain_rule_gap: float  # the largest |score - chain rule| of a response, in nats; 0 for the correct score


def verdicts(params: Params, config: Config, prompt: Ids, cap: int) -> list[Verdict]:
    """The verdict on the correct score and on every mutant, for one prompt of at least two tokens."""
    truth = {
        tuple(y): chain_rule_logprob(params, config, prompt, y) for y in complete_responses(config.vocab_size, cap)
    }
    table = []
    for mutant in [correct, *NOT_A_DISTRIBUTION, *WRONG_DISTRIBUTION]:
        score = functools.partial(mutant, params, config, prompt)
        total = total_probability(score, config.vocab_size, cap)
        table.append(Verdict(mutant.__name__, total, max(abs(score(y) - logp) for y, logp in truth.items())))
    return table


def as_text(table: list[Verdict]) -> str:
    """A table of the verdicts, one per line."""
    lines = [f"{'way to score':<26}{'sum of exp(score)':>18}{'off by (nats)':>16}"]
    for verdict in table:
        lines.append(f"{verdict.name:<26}{verdict.total_probability:>18.10f}{verdict.chain_rule_gap:>16.2e}")
    return "\n".join(lines)
