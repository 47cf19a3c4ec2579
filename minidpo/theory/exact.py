"""Exact sums over every response of a small world: J, pi*, Z, KL, Bradley-Terry, the normalisation oracle.

A response is complete when it ends in end-of-text or has reached the length cap. Its other tokens range over every
id except end-of-text.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from .. import ops
from ..backend import Array, array_module, index_array
from ..model import Config, Params, Rows, check_length, forward, row_logits
from ..scoring import Layout, checked
from ..tensor import Tensor
from ..tokenizer import END_OF_TEXT

Score = Callable[[Sequence[int]], float]  # log pi(y|x) of a response to some prompt


def complete_responses(vocab_size: int, cap: int, most: int = 100_000) -> list[list[int]]:
    """Every complete response of at most `cap` tokens, shortest first.

    With n = vocab_size - 1, n^0 + ... + n^(cap-1) of them end in end-of-text and n^cap are cut. Raises ValueError if
    there are more than `most`.
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

    It cannot tell one distribution from another; `chain_rule_logprob` can.
    """
    return math.fsum(math.exp(score(y)) for y in complete_responses(vocab_size, cap))


def chain_rule_logprob(params: Params, config: Config, prompt: Sequence[int], response: Sequence[int]) -> float:
    """log pi(y|x) as a sum over prefixes: sum_t log_softmax(forward(x, y_1 ... y_(t-1)))[y_t], in nats.

    One forward per prefix, and only its last row is read: no shift, no slice, no mask.
    """
    total = 0.0
    for t, token in enumerate(response):
        prefix: Any = array_module().asarray([[*prompt, *response[:t]]])
        last = forward(params, config, prefix).data[0, -1]  # (1, Tp + t, V) -> (V,)
        total += ops.log_softmax(last).data[token].item()
    return total


class Tree(NamedTuple):
    """Every response to every prompt, laid out once by `prefix_tree`, for models that are scored again and again."""

    rows: Rows
    masks: list[Array]  # of each block, (S, S): 0 where the key's prefix begins the query's, else -inf
    picks: Array  # (3, K), as `scoring.Pick`
    shape: tuple[int, int]  # prompts, responses

    def logprobs(self, params: Params, config: Config) -> Tensor:
        """log pi(y|x) of every response to every prompt, in nats, from one forward.  -> (P, N)"""
        xp, (row, token, response) = array_module(params["wte.weight"].data), self.picks
        blocks = tuple((*block, xp.asarray(mask)) for block, mask in zip(self.rows.blocks, self.masks))
        logits = row_logits(params, config, self.rows, lambda i, qkv: ops.block_attention(qkv, blocks))  # (M, V)
        logp = ops.log_softmax(logits)[row, token]  # (M, V) -> (K,)
        logp = ops.segment_sum(logp, response, math.prod(self.shape))  # (K,) -> (P N,)
        return ops.reshape(logp, self.shape)  # (P N,) -> (P, N)


def prefix_mask(prefixes: Sequence[tuple[int, ...]]) -> Array:
    """Which rows of prefixes see each other, (S, S): 0 where the key's begins the query's, else -inf."""
    mask = array_module().full((len(prefixes), len(prefixes)), -math.inf, dtype="float32")
    place = {prefix: i for i, prefix in enumerate(prefixes)}
    for prefix, query in place.items():
        if query:
            mask[:, query] = mask[:, place[prefix[:-1]]]  # it sees what the text before its last token sees, and itself
        mask[query, query] = 0
    return mask


def prefix_tree(
    config: Config, prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]], run: int = 128
) -> Tree:
    """Lay out texts so that each prefix of them is one row, which sees the rows of its own prefixes.

    Sorted prefixes are cut into runs of `run`, so that masks stay small; a run repeats what its first one continues.
    """
    checked([(x, y) for x in prompts for y in responses])
    check_length(max(map(len, prompts)) + max(map(len, responses)) - 1, config)
    layout, masks = Layout(), list[Array]()
    heads = sorted({tuple(y[:t]) for y in responses for t in range(len(y))})  # a head comes before what continues it
    for b, x in enumerate(prompts):
        row = dict[tuple[int, ...], int]()
        for start in range(0, len(heads), run):
            texts = [(*x, *head) for head in heads[start : start + run]]
            prefixes = [texts[0][:t] for t in range(1, len(texts[0]))] + texts
            rows = slice(len(layout.tokens), len(layout.tokens) + len(prefixes))
            layout.tokens += [prefix[-1] for prefix in prefixes]
            layout.positions += [len(prefix) - 1 for prefix in prefixes]
            layout.add_block(rows, rows)
            masks.append(prefix_mask(prefixes))
            row |= dict(zip(prefixes, range(rows.start, rows.stop)))
        for i, y in enumerate(responses):
            layout.picks += [(row[*x, *y[:t]], token, b * len(responses) + i) for t, token in enumerate(y)]
    numbered, picks = layout.rows(config)
    index_array([token for _, token, _ in picks], config.vocab_size, array_module())  # -1 would be another token
    return Tree(numbered, masks, array_module().array(picks).T, (len(prompts), len(responses)))


def exact_logprobs(
    params: Params, config: Config, prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]]
) -> Tensor:
    """log pi(y|x) of every response to every prompt, in nats, from one forward.  -> (P, N)"""
    return prefix_tree(config, prompts, responses).logprobs(params, config)


def kl(logp: Array, logq: Array) -> Array:
    """KL(p || q) = sum_y p(y) (log p(y) - log q(y)), in nats.  (..., N) -> (...)"""
    xp = array_module(logp, logq)
    p = xp.exp(logp)
    return (p * (xp.where(p > 0, logp, 0) - xp.where(p > 0, logq, 0))).sum(axis=-1)


def total_variation(logp: Array, logq: Array) -> Array:
    """TV(p, q) = (1/2) sum_y |p(y) - q(y)|.  (..., N) -> (...)"""
    xp = array_module(logp, logq)
    return 0.5 * abs(xp.exp(logp) - xp.exp(logq)).sum(axis=-1)


def objective(logp: Array, ref_logp: Array, reward: Array, beta: float) -> Array:
    """The objective of RLHF: J(pi) = E_pi[r] - beta KL(pi || pi_ref).  (..., N) -> (...)

    Source: Rafailov et al. 2023 (arXiv 2305.18290), equation 3.
    """
    return (array_module(logp).exp(logp) * reward).sum(axis=-1) - beta * kl(logp, ref_logp)


def optimum(ref_logp: Array, reward: Array, beta: float) -> tuple[Array, Array]:
    """log pi* and log Z of the policy that maximises `objective`.  (..., N) -> (..., N), (...)

        pi*(y|x) = pi_ref(y|x) exp(r(x, y)/beta)/Z(x),   Z(x) = sum_y pi_ref(y|x) exp(r(x, y)/beta)

    Source: Rafailov et al. 2023 (arXiv 2305.18290), equation 4 and appendix A.1.
    """
    tilted = ref_logp + reward / beta
    return ops.log_softmax.raw(tilted)[0], ops.logsumexp.raw(tilted)[0]


def implicit_reward(logp: Array, ref_logp: Array, beta: float) -> Array:
    """The reward for which a policy is optimal, up to beta log Z(x): beta log(pi/pi_ref).  (..., N) -> (..., N)

    Source: Rafailov et al. 2023 (arXiv 2305.18290), equation 5.
    """
    return beta * (logp - ref_logp)


def preference_probabilities(reward: Array) -> Array:
    """Bradley-Terry: P(i preferred to j) = sigma(r_i - r_j).  (..., N) -> (..., N, N)"""
    xp, difference = array_module(reward), reward[..., :, None] - reward[..., None, :]
    decay = xp.exp(-abs(difference))  # sigma(z) is 1/(1 + e^-z) or e^z/(1 + e^z): neither overflows where it is used
    return xp.where(difference > 0, 1, decay) / (1 + decay)


def plackett_luce(reward: Array, ranking: Sequence[int]) -> float:
    """Log-probability of a ranking, best first: sum_k (r_(k) - log sum_(m >= k) exp r_(m)), in nats.

    For two responses this is Bradley-Terry.

    Source: Rafailov et al. 2023 (arXiv 2305.18290), appendix A.3.
    """
    ordered = reward[list(ranking)]
    return sum((ordered[k] - ops.logsumexp.raw(ordered[k:])[0]).item() for k in range(len(ranking)))


def reachable(wins: Array) -> Array:
    """Which responses lead to which along "was preferred to", themselves among them.  (N, N) of weights -> (N, N)"""
    xp = array_module(wins)
    reach = (wins > 0) | xp.eye(len(wins), dtype=bool)
    for _ in range(len(wins).bit_length()):  # paths of 1, 2, 4, ... steps
        reach = (reach.astype("float64") @ reach.astype("float64")) > 0
    return reach


def has_maximum(wins: Array) -> bool:
    """Whether some finite rewards make the comparisons most likely.  (N, N) of weights -> bool

    wins[i, j] is how often i was preferred to j. A maximum exists if and only if every path along "was preferred to"
    has a way back (Ford 1957, for each part of the comparisons). It is unique up to a constant in each part.
    """
    reach = reachable(wins)
    return bool((reach == reach.T).all())


def fitted_rewards(wins: Array, tolerance: float = 1e-13, most_steps: int = 100) -> tuple[Array, int]:
    """Rewards that make the comparisons most likely, and the number of Newton steps.  (N, N) -> (N,)

        L(r) = -sum_ij wins_ij log sigma(r_i - r_j)/sum wins
        dL/dr_i = -sum_j (wins_ij sigma(r_j - r_i) - wins_ji sigma(r_i - r_j))/sum wins

    Their mean is 0 in each part of the responses that comparisons link. Raises ValueError if there is no maximum (see
    `has_maximum`), or a response was never compared.
    """
    xp, N = array_module(wins), len(wins)
    if not ((wins + wins.T).sum(axis=0) > 0).all():
        raise ValueError("a response was never compared: leave it out")
    if not has_maximum(wins):
        raise ValueError(
            "no finite rewards make the comparisons most likely: some responses cannot be reached from others along "
            "'was preferred to', and the likelihood grows for ever as their rewards move apart"
        )
    part = reachable(wins)  # with a maximum: whether two responses are in one part
    weights = wins / wins.sum()
    reward = xp.zeros(N)

    def loss(r: Array) -> float:
        return -(weights * ops.logsigmoid.raw(r[:, None] - r[None, :])[0]).sum().item()

    for step in range(most_steps):
        p = preference_probabilities(reward)
        gradient = -(weights * p.T - weights.T * p).sum(axis=1)
        if abs(gradient).max() < tolerance * weights.max():
            return reward, step
        curvature = (weights + weights.T) * p * p.T
        means = part * curvature.sum() / N**2  # without it, a constant for a part would cost nothing
        hessian = xp.diag(curvature.sum(axis=1)) - curvature + means
        move = -xp.linalg.solve(hessian, gradient)
        size = 1.0
        while loss(reward + size * move) > loss(reward) + 1e-15 and size > 1e-6:
            size /= 2
        reward = reward + size * move  # of mean 0 in each part, as the gradient is
    return reward, most_steps
