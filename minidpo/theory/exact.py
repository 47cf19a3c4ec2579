"""Exact sums over every response of a small world: J, pi*, Z, KL, Bradley-Terry, the normalisation oracle.

A response is complete when it ends in end-of-text or has reached the length cap. Its other tokens range over every
id except end-of-text.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

from .. import ops
from ..backend import Array, array_module
from ..model import Config, Params, forward
from ..scoring import Pick, checked, token_logprobs
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


def exact_logprobs(
    params: Params, config: Config, prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]]
) -> Tensor:
    """log pi(y|x) of every response to every prompt, in nats, from one forward.  -> (P, N)

    Responses that begin alike share rows: each prompt is followed once by every prefix that no other one continues.
    """
    checked([(x, y) for x in prompts for y in responses])
    heads = sorted({tuple(y[:-1]) for y in responses})  # a prefix comes just before what continues it
    longest = [p for p, q in zip(heads, [*heads[1:], None]) if q is None or q[: len(p)] != p]
    home = {p[:t]: (n, t) for n, p in enumerate(longest) for t in range(len(p) + 1)}
    T = max(map(len, prompts)) + max(map(len, longest))
    texts = [[*x, *p] for x in prompts for p in longest]
    tokens = [text + [END_OF_TEXT] * (T - len(text)) for text in texts]  # nothing attends to the pads
    logits = forward(params, config, tokens)  # (P M, T) -> (P M, T, V)
    picks: list[Pick] = []
    for b, x in enumerate(prompts):
        for i, y in enumerate(responses):
            for t, token in enumerate(y):
                n, place = home[tuple(y[:t])]
                row = (b * len(longest) + n) * T + len(x) - 1 + place
                picks.append((row, token, b * len(responses) + i))
    logp = token_logprobs(ops.reshape(logits, (len(texts) * T, config.vocab_size)), picks)  # (P M T, V) -> (K,)
    logp = ops.segment_sum(logp, [number for _, _, number in picks], len(prompts) * len(responses))  # (K,) -> (P N,)
    return ops.reshape(logp, (len(prompts), len(responses)))  # (P N,) -> (P, N)


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
    difference = reward[..., :, None] - reward[..., None, :]
    return array_module(reward).exp(ops.logsigmoid.raw(difference)[0])


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
