"""Training on one loop: examples in, a model that finds them likely out.

An example is a (prompt, response) pair of ids, and its loss the response's negative log-likelihood: a text by
itself is a response to end-of-text, which is how a model learns to begin.
"""

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy

from . import ops, optim
from .model import Config, Params
from .scoring import packed_logprobs
from .tensor import Tensor
from .tokenizer import END_OF_TEXT, Tokenizer

Example = tuple[list[int], list[int]]  # ids of prompt and response
Report = Callable[[dict[str, Any]], None]


def line_examples(lines: Sequence[str], tokenizer: Tokenizer) -> list[Example]:
    """Each line as a text by itself: end-of-text, then its characters and end-of-text."""
    return [([END_OF_TEXT], [*tokenizer.encode(line), END_OF_TEXT]) for line in lines]


def split(lines: Sequence[str], share: float, rng: numpy.random.Generator) -> tuple[list[str], list[str]]:
    """Lines to train on and lines held out: a `share` of the distinct lines, none of which is trained on.

    At least one line is held out, and one is not.

    Raises
    ------
    ValueError
        If there are not two different lines.
    """
    distinct = sorted(set(lines))
    if len(distinct) < 2:
        raise ValueError("at least two different lines are needed, one to train on and one to hold out")
    count = min(max(1, round(share * len(distinct))), len(distinct) - 1)
    chosen = rng.permutation(len(distinct))[:count]
    held_out = {distinct[i] for i in chosen}
    return [line for line in lines if line not in held_out], sorted(held_out)


def nll(params: Params, config: Config, examples: Sequence[Example]) -> Tensor:
    """Mean negative log-likelihood of the response tokens, in nats: -mean_t log pi(y_t | x, y_1 ... y_(t-1))."""
    return -ops.mean(packed_logprobs(params, config, examples))


def held_out_nll(params: Params, config: Config, examples: Sequence[Example], batch_size: int = 256) -> float:
    """`nll` of many examples, batch by batch, every token counted once."""
    constants = {name: p.detach() for name, p in params.items()}
    total, tokens = 0.0, 0
    for start in range(0, len(examples), batch_size):
        logp = packed_logprobs(constants, config, examples[start : start + batch_size])
        total, tokens = total - float(logp.data.sum().item()), tokens + logp.shape[0]
    return total / tokens


def pretrain(
    params: Params,
    config: Config,
    examples: Sequence[Example],
    held_out: Sequence[Example],
    rng: numpy.random.Generator,
    steps: int,
    batch_size: int = 64,
    learning_rate: float = 3e-3,
    warmup_steps: int = 50,
    max_norm: float = 1.0,
    evaluate_every: int = 250,
    report: Report = lambda metrics: None,
) -> float:
    """Maximise the likelihood of the examples with AdamW; each tensor of `params` ends with another array.

    Parameters
    ----------
    params, config
        The model.
    examples, held_out : lists of (prompt, response) ids
        What to learn from, and what to measure on.
    rng : numpy.random.Generator
        Draws the batches.
    steps, batch_size, learning_rate, warmup_steps, max_norm
        Length, examples a step, peak of the schedule `optim.warmup_cosine`, its warm-up, clipping.
    evaluate_every : int
        Steps between measurements.
    report : callable
        Gets a dict of metrics at step 0, at every measurement and at the end.

    Returns
    -------
    float
        The held-out loss at the end, in nats a token.

    Raises
    ------
    FloatingPointError
        If a loss or a gradient is not finite, with the step.
    ValueError
        If there are no examples, or a number is out of its range.
    """
    if not (examples and held_out and steps >= 0 and evaluate_every >= 1 and learning_rate > 0):
        raise ValueError(
            f"nothing to do with {len(examples)} examples, {len(held_out)} held out, {steps} steps, evaluation every "
            f"{evaluate_every} and learning rate {learning_rate}"
        )
    optimizer = optim.AdamW(params, learning_rate=learning_rate, betas=(0.9, 0.99), weight_decay=0.01)
    started, tokens = time.monotonic(), 0

    def measured(step: int) -> float:
        seconds = time.monotonic() - started
        loss = held_out_nll(params, config, held_out)
        if not numpy.isfinite(loss):
            raise FloatingPointError(f"the held-out loss is {loss} at step {step}: lower the learning rate")
        report({"step": step, "eval_loss": loss, "tokens_per_second": tokens / max(seconds, 1e-9)})
        return loss

    for step in range(steps):
        if step % evaluate_every == 0:
            measured(step)
        optimizer.learning_rate = optim.warmup_cosine(step, steps, learning_rate, warmup_steps)
        batch = [examples[i] for i in rng.integers(0, len(examples), batch_size)]
        loss = nll(params, config, batch)
        if not numpy.isfinite(loss.item()):
            raise FloatingPointError(f"the loss is {loss.item()} at step {step}: lower the learning rate")
        optimizer.zero_grad()
        loss.backward()
        try:
            optim.clip_global_norm(params, max_norm)
        except FloatingPointError as error:
            raise FloatingPointError(f"{error} at step {step}: lower the learning rate") from error
        optimizer.step()
        tokens += sum(len(response) for _, response in batch)
    return measured(steps)
