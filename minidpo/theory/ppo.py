"""PPO, the long way to the optimum that DPO reaches from pairs: a reward model, samples, a critic, a clipped step.

Four models: the policy, its frozen reference, a reward model and a critic. A reward model is a transformer with a head
of one column, `head.weight` (C, 1). So is a critic with a trunk of its own; one without is a head on the policy's.

Letters: s_t = (x, y_1 ... y_(t-1)) is the state in which token y_t is drawn, B the texts of a batch, M the tokens of
their responses, text after text. The last token of a text has nothing behind it.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy

from .. import losses, ops, optim
from ..backend import Array
from ..generation import generate
from ..model import Config, Params, row_states
from ..scoring import packed, packed_logprobs, text_length, token_logprobs
from ..tensor import Tensor
from ..tokenizer import END_OF_TEXT
from ..training import Example, Metrics, finite

HEAD = "head.weight"
Reward = Callable[[Sequence[Example]], Array]  # r(x, y) of each text, (B,)


class Settings(NamedTuple):
    """The constants of PPO; `max_norm` clips the gradient of policy and critic together."""

    beta: float = 0.1  # of the KL to the reference
    gamma: float = 1.0  # what a reward is worth one token earlier
    lam: float = 0.95  # 1: advantages without bias, 0: with the least noise
    epsilon: float = 0.2
    epochs: int = 4  # steps on the same texts
    value_weight: float = 0.1
    max_norm: float = 1.0


SETTINGS = Settings()


# ---- the reward model -------------------------------------------------------------------------------------


def with_head(params: Params) -> Params:
    """A trainable copy of a transformer with a head of zeros, so that it begins with r = 0."""
    copy = {name: Tensor(p.data.copy(), requires_grad=True) for name, p in params.items()}
    return {**copy, **head(params)}


def head(params: Params) -> Params:
    """A head of zeros alone, for the states of a transformer.  (C, 1)"""
    wte = params["wte.weight"].data
    return {HEAD: Tensor(wte[:1].T * 0, requires_grad=True)}


def text_rewards(params: Params, config: Config, examples: Sequence[Example]) -> Tensor:
    """r(x, y) of each text, read off the state after its last token.  -> (B,)"""
    rows, picks = packed(config, [([*x, *y], [END_OF_TEXT]) for x, y in examples]).rows(config)
    r = ops.reshape(row_states(params, config, rows) @ params[HEAD], (len(examples),))  # (B, C) -> (B, 1) -> (B,)
    return r[numpy.argsort([b for _, _, b in picks])]  # shortest text first -> the caller's order


def reward_loss(reward_w: Any, reward_l: Any) -> Tensor:
    """The Bradley-Terry loss of a reward model: the likelihood of the labels.

        L = -mean(log sigma(r_w - r_l))

    It is `dpo_loss` at beta 1 with r for log pi and 0 for the reference. (B,), (B,) -> ()
    Source: Ouyang et al. 2022 (arXiv 2203.02155), equation 1, for pairs.
    """
    return -ops.mean(ops.logsigmoid(ops.sub(reward_w, reward_l)))


def reward_gradient(reward_w: Array, reward_l: Array) -> tuple[Array, Array]:
    """dL/dr_w and dL/dr_l of `reward_loss`, in closed form."""
    # d(-log sigma(u))/du = -sigma(-u), u = r_w - r_l; du/dr_w = 1, du/dr_l = -1; the mean gives 1/B
    g = -losses.sigma(reward_l - reward_w) / len(reward_w)
    return g, -g


def reward_training_step(params: Params, config: Config, optimizer: optim.Optimizer, pairs: Sequence[Any]) -> Metrics:
    """One step of a reward model on pairs. Raises FloatingPointError if the loss is not finite, before it moves."""
    r = text_rewards(params, config, [(x, w) for x, w, _ in pairs] + [(x, l) for x, _, l in pairs])  # (2B,)
    reward_w, reward_l = r[: len(pairs)], r[len(pairs) :]
    loss = reward_loss(reward_w, reward_l)
    value = finite(loss)
    optimizer.zero_grad()
    loss.backward()
    optim.clip_global_norm(params, SETTINGS.max_norm)
    optimizer.step()
    return {"loss": value, "accuracy": float((reward_w.data > reward_l.data).mean())}


# ---- samples and their advantages -------------------------------------------------------------------------


class Rollout(NamedTuple):
    """Texts that the policy wrote, shortest first, and what was then known of each token of the responses, (M,)."""

    examples: list[Example]
    reward: Array  # (B,), of the texts
    logp: Array  # log pi(y_t|s_t)
    ref_logp: Array
    value: Array  # V(s_t)
    text: Array  # the number of the token's text
    last: Array  # whether the token ends it


def rollout(
    policy: Params, critic: Params, reference: Params, reward: Reward, config: Config,
    prompts: Sequence[Sequence[int]], rng: Any, max_new_tokens: int,
) -> Rollout:  # fmt: skip
    """Let the policy answer the prompts, and let the three other models look at its answers."""
    drawn = generate(policy, config, prompts, rng, max_new_tokens).responses
    examples: list[Example] = sorted(zip(map(list, prompts), drawn), key=text_length)
    policy, critic = ({name: p.detach() for name, p in params.items()} for params in (policy, critic))  # no graph
    logp, value = policy_and_values(policy, critic, config, examples)
    ref_logp = packed_logprobs(reference, config, examples).data
    text = numpy.repeat(numpy.arange(len(examples)), [len(y) for _, y in examples])
    last = numpy.append(text[1:] != text[:-1], True)
    return Rollout(examples, reward(examples), logp.data, ref_logp, value.data, text, last)


def policy_and_values(
    policy: Params, critic: Params, config: Config, examples: Sequence[Example]
) -> tuple[Tensor, Tensor]:
    """log pi(y_t|s_t) and V(s_t) of every token of the responses, texts shortest first.  -> (M,), (M,)"""
    rows, picks = packed(config, examples).rows(config)
    states = row_states(policy, config, rows)  # (M, C)
    logp = token_logprobs(states @ ops.transpose(policy["wte.weight"]), picks)  # (M, C) -> (M, V) -> (M,)
    if len(critic) > 1:  # it has a trunk
        states = row_states(critic, config, rows)
    return logp, ops.reshape(states @ critic[HEAD], logp.shape)  # (M, C) -> (M, 1) -> (M,)


def token_rewards(seen: Rollout, beta: float) -> Array:
    """The reward of each token: its share of the KL, and that of the text with the last one.  -> (M,)

        r_t = -beta log(pi(y_t|s_t)/pi_ref(y_t|s_t)) + [t = T] r(x, y)

    A text's sum to r(x, y) - beta log(pi(y|x)/pi_ref(y|x)), whose mean over the policy's own texts is J of RLHF.
    Source: Ouyang et al. 2022 (arXiv 2203.02155), equation 2 without its pre-training term; per token in their text.
    """
    reward = -beta * (seen.logp - seen.ref_logp)
    reward[seen.last] += seen.reward
    return reward


def advantages(reward: Array, value: Array, last: Array, gamma: float, lam: float) -> Array:
    """How much better each token was than expected: generalised advantage estimation.  (M,), (M,), (M,) -> (M,)

        A_t = sum_k (gamma lam)^k delta_(t+k),   delta_t = r_t + gamma V(s_(t+1)) - V(s_t)

    Source: Schulman et al. 2016 (arXiv 1506.02438), equation 16.
    """
    # looking n tokens ahead: A_t^(n) = r_t + gamma r_(t+1) + ... + gamma^n V(s_(t+n)) - V(s_t)
    # in deltas, V cancels in between: A_t^(n) = delta_t + gamma delta_(t+1) + ... + gamma^(n-1) delta_(t+n-1)
    # their mean with weights (1 - lam) lam^(n-1): delta_(t+k) is in all n > k, whose weights add up to lam^k
    # hence A_t = delta_t + gamma lam A_(t+1), and behind the last token V and A are 0
    out, next_value, next_advantage = numpy.empty_like(reward), 0.0, 0.0
    for t in reversed(range(len(reward))):
        if last[t]:
            next_value = next_advantage = 0.0
        delta = reward[t] + gamma * next_value - value[t]
        out[t] = next_advantage = delta + gamma * lam * next_advantage
        next_value = value[t]
    return out


# ---- the clipped step -------------------------------------------------------------------------------------


def surrogate_loss(logp: Any, old_logp: Array, advantage: Array, epsilon: float, texts: int) -> Tensor:
    """The clipped surrogate: a token gains by its advantage only until its ratio has changed by epsilon.

        L = -sum_t min(rho_t A_t, clip(rho_t, 1 - epsilon, 1 + epsilon) A_t)/B,   rho_t = pi(y_t|s_t)/pi_old(y_t|s_t)

    A sum over tokens and a mean over texts, as the policy gradient of J. (M,), (M,), (M,) -> ()
    Source: Schulman et al. 2017 (arXiv 1707.06347), equation 7.
    """
    ratio = ops.exp(ops.sub(logp, old_logp))
    clipped = -ops.maximum(-ops.maximum(ratio, 1 - epsilon), -(1 + epsilon))
    return ops.sum(ops.maximum(-ratio * advantage, -clipped * advantage)) * (1 / texts)


def surrogate_gradient(logp: Array, old_logp: Array, advantage: Array, epsilon: float, texts: int) -> Array:
    """dL/dlogp of `surrogate_loss`, in closed form; at rho = 1 it is -A_t/B, the policy gradient's.  -> (M,)"""
    # drho/dlogp = rho; the clipped term is the smaller one, and constant, where A > 0 and rho > 1 + epsilon, or
    # A < 0 and rho < 1 - epsilon: what was already gained
    ratio = numpy.exp(logp - old_logp)
    gained = numpy.where(advantage > 0, ratio > 1 + epsilon, ratio < 1 - epsilon)
    return numpy.where(gained, 0, -ratio * advantage) / texts


def ppo_training_step(
    policy: Params, critic: Params, config: Config, optimizer: optim.Optimizer, seen: Rollout,
    settings: Settings = SETTINGS,
) -> Metrics:  # fmt: skip
    """Several steps on the same texts: the surrogate, and the critic's squared error to A + V.

        L = surrogate + value_weight sum_t (V(s_t) - V_old(s_t) - A_t)^2/(2B)

    The optimizer holds `trainable(policy, critic)`. `reward` and `kl` are those of the samples, the other metrics those
    of the last pass, before its update. Raises FloatingPointError if the gradient is not finite.
    """
    s, B = settings, len(seen.examples)
    advantage = advantages(token_rewards(seen, s.beta), seen.value, seen.last, s.gamma, s.lam)
    target = advantage + seen.value
    for _ in range(s.epochs):
        logp, value = policy_and_values(policy, critic, config, seen.examples)
        surrogate = surrogate_loss(logp, seen.logp, advantage, s.epsilon, B)
        value_loss = ops.sum((value - target) ** 2) * (1 / (2 * B))
        optimizer.zero_grad()
        (surrogate + s.value_weight * value_loss).backward()
        grad_norm = optim.clip_global_norm(trainable(policy, critic), s.max_norm)
        optimizer.step()
    log_ratio = seen.logp - seen.ref_logp
    outside = abs(numpy.exp(logp.data - seen.logp) - 1) > s.epsilon  # of 1 - epsilon to 1 + epsilon
    return {
        "reward": float(seen.reward.mean()),
        "kl": float(log_ratio.sum() / B),
        "loss/policy": surrogate.item(),
        "loss/value": value_loss.item(),
        "outside": float(outside.mean()),
        "grad_norm": grad_norm,
    }


def trainable(policy: Params, critic: Params) -> Params:
    """The parameters of both, for one optimizer."""
    return {**policy, **{f"critic.{name}": p for name, p in critic.items()}}


def ppo(
    policy: Params, critic: Params, reference: Params, reward: Reward, config: Config,
    asked: Iterator[Sequence[Sequence[int]]], rng: Any, max_new_tokens: int, rates: Sequence[float],
    settings: Settings = SETTINGS,
) -> Iterator[Metrics]:  # fmt: skip
    """Train policy and critic, a batch of prompts and a learning rate a step; yields the metrics of each step."""
    optimizer = optim.AdamW(trainable(policy, critic), 0.0, betas=(0.9, 0.99), weight_decay=0.0)
    for optimizer.learning_rate in rates:
        seen = rollout(policy, critic, reference, reward, config, next(asked), rng, max_new_tokens)
        yield ppo_training_step(policy, critic, config, optimizer, seen, settings)
