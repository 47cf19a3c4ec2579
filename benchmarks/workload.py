"""The work that every contender does: sizes, and weights and pairs drawn from a seed."""

from typing import NamedTuple

import numpy

from minidpo import model
from minidpo.model import Config

BETA = 0.1
LEARNING_RATE = 1e-4


class Size(NamedTuple):
    """A model and a batch; T is the length of the longest row."""

    vocab: int
    n_embd: int
    n_layer: int
    n_head: int
    T: int
    pairs: int


SIZES = {
    "tiny": Size(64, 64, 2, 4, 64, 16),
    "small": Size(96, 128, 4, 4, 128, 16),
    "medium": Size(96, 256, 6, 8, 256, 8),
}


class Workload(NamedTuple):
    """The weights and pairs of one seed."""

    config: Config
    policy: dict  # of float32 arrays, under GPT-2's names
    reference: dict
    pairs: list


def draw(size, seed):
    """A policy that has moved from its reference, and pairs that fill 80 to 86 percent of their padded batch."""
    rng = numpy.random.default_rng(seed)
    config = Config(size.vocab, size.T, size.n_embd, size.n_layer, size.n_head)
    reference = {name: p.data for name, p in model.init(config, rng).items()}
    policy = {name: (x + 0.02 * rng.normal(size=x.shape)).astype("float32") for name, x in reference.items()}
    while True:
        prompts = rng.integers(int(0.4 * size.T), int(0.6 * size.T) + 1, size.pairs)
        rows = rng.integers(int(0.66 * size.T), size.T + 1, (size.pairs, 2))
        if rows.max() == size.T and 0.14 <= 1 - rows.mean() / size.T <= 0.20:
            break

    def ids(n):
        return rng.integers(1, size.vocab, n).tolist()

    pairs = [(ids(x), [*ids(w - x), 0], [*ids(l - x), 0]) for x, (w, l) in zip(prompts.tolist(), rows.tolist())]
    return Workload(config, policy, reference, pairs)


def endless(policy):
    """Weights under which end-of-text is nearly impossible, so that a text fills its context; two arrays differ."""
    away = 20 / policy["ln_f.bias"].size ** 0.5
    wte = policy["wte.weight"].copy()
    wte[0] = -away
    return {**policy, "wte.weight": wte, "ln_f.bias": policy["ln_f.bias"] + numpy.float32(away)}


def beginnings(work, count):
    """Different prompts to sample after, a quarter of the context each."""
    rng = numpy.random.default_rng(0)
    return rng.integers(1, work.config.vocab_size, (count, work.config.n_positions // 4)).tolist()


def padded(pairs):
    """One padded batch of chosen, then rejected texts: inputs, targets and which targets count.  (2B, T) each."""
    texts = [[*x, *w] for x, w, _ in pairs] + [[*x, *l] for x, _, l in pairs]
    prompts = [len(x) for x, _, _ in pairs] * 2
    T = max(map(len, texts)) - 1
    inputs, targets = (numpy.zeros((len(texts), T), dtype="int64") for _ in range(2))
    counts = numpy.zeros((len(texts), T), dtype="float32")
    for b, (text, prompt) in enumerate(zip(texts, prompts)):
        inputs[b, : len(text) - 1] = text[:-1]
        targets[b, : len(text) - 1] = text[1:]
        counts[b, prompt - 1 : len(text) - 1] = 1
    return inputs, targets, counts
