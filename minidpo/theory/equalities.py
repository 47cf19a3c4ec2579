"""The theory of DPO as equalities on a small world: each claim is a few lines, a number and a verdict.

The world has three prompts and every complete response of at most four tokens over three characters, 121 of them. Each
response to each prompt has a random reward, and the reference is a small transformer. A policy is a table, one logit
for each response, or another transformer. Arrays are (P, N): prompts, responses.
"""

import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy

from .. import model, ops, optim
from ..backend import Array, array_module
from ..model import Config, Params
from ..streams import stream
from ..tensor import Tensor
from . import exact, ppo

BETAS = (0.05, 0.1, 0.5, 1.0, 5.0)
RUNS = (  # of transformers: beta, width, layers, steps, largest distance to pi*
    *((0.5, 16, 1, 1500, 0.1), (0.5, 24, 2, 1500, 1e-2), (0.5, 32, 2, 1500, 1e-5)),
    *((beta, 32, 2, 1000, math.inf) for beta in BETAS if beta != 0.5),
)
Policy = tuple[Params, Callable[[], Tensor]]  # parameters, and log pi as a function of them, (P, N)
Loss = Callable[[Tensor], Tensor]  # of log pi
ADAM = functools.partial(optim.AdamW, weight_decay=0.0)


class World(NamedTuple):
    """Prompts, all their responses, the true rewards, and the reference."""

    prompts: list[list[int]]
    responses: list[list[int]]
    reward: Array  # (P, N)
    ref_logp: Array  # (P, N)


class Claim(NamedTuple):
    """A claim, the number that tests it, and whether the claim holds; None if the number is not judged."""

    text: str
    number: float
    holds: bool | None


def at_most(text: str, number: Any, bound: float) -> Claim:
    """A claim that a number, usually an error, is at most `bound`; an infinite bound does not judge it."""
    number = number.item() if hasattr(number, "item") else number
    if bound == math.inf:
        return Claim(text, number, None)
    return Claim(f"{text} (at most {bound:g})", number, number <= bound)


def small_world(seed: int, characters: int = 3, cap: int = 4, prompts: int = 3) -> World:
    """A world whose reference is a random transformer and whose rewards are normal(0, 1)."""
    responses = exact.complete_responses(characters + 1, cap)
    prompt_ids = [[0, 1 + i % characters, 1 + i // characters] for i in range(prompts)]
    config = Config(characters + 1, 3 + cap, 8, 1, 2)
    params = model.init(config, stream(seed, "reference"), dtype="float64")
    for name, p in params.items():
        p.data = p.data + 0.5 * stream(seed, "reference", name).normal(size=p.shape)
    ref_logp = exact.exact_logprobs(model.frozen(params), config, prompt_ids, responses).data
    return World(prompt_ids, responses, stream(seed, "reward").normal(size=ref_logp.shape), ref_logp)


def random_policies(world: World, seed: int, count: int = 20) -> Iterator[Array]:
    """Policies of all kinds: log-softmax of normal logits, from nearly uniform to nearly certain."""
    xp = array_module(world.reward)
    for i in range(count):
        logits = stream(seed, "policies", i).normal(size=world.reward.shape) * 10 ** (-2 + 4 * i / count)
        yield ops.log_softmax.raw(xp.asarray(logits))[0]


def sampled_wins(world: World, rng: numpy.random.Generator, count: int) -> Array:
    """How often i was preferred to j in `count` pairs per prompt, drawn evenly and labelled by chance.  -> (P, N, N)"""
    P, N = world.reward.shape
    wins = numpy.zeros((P, N, N))
    for x in range(P):
        first = rng.integers(0, N, count)
        second = (first + rng.integers(1, N, count)) % N
        gap = world.reward[x, first] - world.reward[x, second]
        preferred = rng.random(count) < 1 / (1 + numpy.exp(-gap))
        numpy.add.at(wins[x], (numpy.where(preferred, first, second), numpy.where(preferred, second, first)), 1)
    return wins


def all_pairs(world: World) -> Array:
    """Every ordered pair of responses, weighted by the exact probability of its label.  -> (P, N, N)"""
    return exact.preference_probabilities(world.reward) * (1 - numpy.eye(world.reward.shape[-1]))


def bradley_terry(world: World, seed: int) -> Iterator[Claim]:
    """Preferences fix the rewards up to a constant in each part of the responses that they link, if at all."""
    probabilities = exact.preference_probabilities(world.reward)
    fitted = numpy.stack([exact.fitted_rewards(p)[0] for p in probabilities])
    centred = world.reward - world.reward.mean(axis=-1, keepdims=True)
    error = abs(fitted - centred).max()
    yield at_most("rewards fitted to exact probabilities are the true ones, up to a constant", error, 1e-12)
    rng, wins = stream(seed, "labels"), numpy.zeros((5, 5))
    while not ((wins + wins.T).sum(axis=0).all() and exact.has_maximum(wins)):
        i, j = rng.choice(5, 2, replace=False)
        wins[(i, j) if rng.random() < probabilities[0, i, j] else (j, i)] += 1
    reward = exact.fitted_rewards(wins)[0]
    error = abs(((wins + wins.T) * exact.preference_probabilities(reward) - wins).sum(axis=1)).max()
    text = f"{wins.sum():.0f} sampled labels on 5 responses: each response wins as often as the fit expects"
    yield at_most(text, error, 1e-9)
    chain = numpy.diag([1.0, 1.0], k=1)  # 0 preferred to 1, 1 to 2
    rewards = numpy.array([80.0, 40.0, 0.0])
    loss = -(chain * ops.logsigmoid.raw(numpy.subtract.outer(rewards, rewards))[0]).sum()
    text = "a chain of labels has no best rewards: its loss falls to 0 as they move apart"
    yield Claim(text, float(loss), not exact.has_maximum(chain) and loss < 1e-15)
    cycle = exact.fitted_rewards(numpy.roll(numpy.eye(3), 1, axis=1))[0]
    yield at_most("a cycle of three labels is fitted best by equal rewards", abs(cycle).max(), 1e-12)
    part = numpy.array([0, 0, 0, 1, 1])  # no label links 0, 1 and 2 with 3 and 4
    same = part[:, None] == part
    mean, wins = same / same.sum(axis=1), probabilities[:, :5, :5] * same  # (5, 5), (P, 5, 5)
    fit = numpy.stack([exact.fitted_rewards(w)[0] for w in wins])
    error = abs(fit - (world.reward[:, :5] @ (numpy.eye(5) - mean))).max()
    yield at_most("two parts that no label links have a finite fit, true up to a constant for each", error, 1e-9)
    loss = functools.partial(pair_loss, ref_logp=numpy.zeros_like(fit), wins=wins, beta=1.0)
    change = max(abs(loss(Tensor(fit + c * part)).item() - loss(Tensor(fit)).item()) for c in (-10, 1, 100))
    yield at_most("raise one part by -10, 1 or 100: the loss changes by", change, 1e-14)
    table = {"reward": Tensor(stream(seed, "start").normal(size=fit.shape), requires_grad=True)}
    path = descent((table, lambda: table["reward"]), loss, optim.SGD, [25.0] * 1000)
    error = abs(path[-1] @ (numpy.eye(5) - mean) - fit).max()
    yield at_most("1000 steps of gradient descent from elsewhere end at the same rewards within each part", error, 1e-9)
    change = abs((path[-1] - path[0]) @ mean).max()
    yield at_most("and leave the mean of each part where it was: no label says how far they are apart", change, 1e-12)
    error = max(
        abs(math.exp(exact.plackett_luce(world.reward[0], [i, j])) - probabilities[0, i, j])
        for i, j in ((0, 1), (5, 3), (len(world.responses) - 1, 2))
    )
    yield at_most("Plackett-Luce for two responses is Bradley-Terry", error, 1e-12)


def constrained_objective(world: World, seed: int) -> Iterator[Claim]:
    """J(pi) = E[r] - beta KL(pi || pi_ref) is largest at pi* = pi_ref exp(r/beta)/Z, and the gap is known exactly."""
    at_optimum = gap = 0.0
    for beta in BETAS:
        star, log_z = exact.optimum(world.ref_logp, world.reward, beta)
        best = exact.objective(star, world.ref_logp, world.reward, beta)
        at_optimum = max(at_optimum, abs(best - beta * log_z).max().item())
        for logp in random_policies(world, seed):
            loss = best - exact.objective(logp, world.ref_logp, world.reward, beta)
            gap = max(gap, (abs(loss - beta * exact.kl(logp, star)) / (1 + abs(loss))).max().item())
    yield at_most("J(pi*) = beta log Z", at_optimum, 1e-12)
    yield at_most("J(pi*) - J(pi) = beta KL(pi || pi*), for any pi", gap, 1e-12)
    star, _ = exact.optimum(world.ref_logp, world.reward, 1e7)
    yield at_most("as beta grows, pi* becomes the reference", exact.total_variation(star, world.ref_logp).max(), 1e-6)
    star, _ = exact.optimum(world.ref_logp, world.reward, 1e-7)
    best_logp = ops.gather.raw(star, world.reward.argmax(axis=-1))[0]
    missing = 1 - array_module(star).exp(best_logp).min()
    yield at_most("as beta falls to 0, pi* becomes certain of the best response", missing, 1e-6)


def reparametrisation(world: World, seed: int) -> Iterator[Claim]:
    """The implicit reward, and what the paper proves about it."""
    beta = 0.5
    star, log_z = exact.optimum(world.ref_logp, world.reward, beta)
    implicit = exact.implicit_reward(star, world.ref_logp, beta)
    error = abs(implicit - (world.reward - beta * log_z[:, None])).max()
    yield at_most("beta log(pi*/pi_ref) = r - beta log Z(x)", error, 1e-12)
    spread = (log_z.max() - log_z.min()).item()
    yield Claim("log Z(x) differs between prompts (by more than 0.01)", spread, spread > 0.01)
    differences = [r[:, :, None] - r[:, None, :] for r in (implicit, world.reward)]
    yield at_most("but cancels in every pair", abs(differences[0] - differences[1]).max(), 1e-12)
    shift = stream(seed, "shift").normal(size=(len(world.prompts), 1))
    shifted = world.reward + array_module(world.reward).asarray(shift)
    error = abs(exact.preference_probabilities(shifted) - exact.preference_probabilities(world.reward)).max()
    yield at_most("Lemma 1: r(x, y) and r(x, y) + f(x) give the same preferences", error, 1e-12)
    same, _ = exact.optimum(world.ref_logp, shifted, beta)
    yield at_most("Lemma 2: they have the same optimal policy", exact.total_variation(same, star).max(), 1e-12)
    error = abs(exact.implicit_reward(same, world.ref_logp, beta) - implicit).max()
    yield at_most("Theorem 1: they share one reward of the form beta log(pi/pi_ref)", error, 1e-12)


def margins(logp: Tensor, ref_logp: Array) -> Tensor:
    """h_i - h_j for every ordered pair, h = log pi - log pi_ref.  (P, N), (P, N) -> (P, N, N)"""
    P, N = logp.shape
    h = logp - ref_logp
    return ops.reshape(h, (P, N, 1)) - ops.reshape(h, (P, 1, N))


def pair_weights(wins: Array) -> Array:
    """Each ordered pair's weight in the mean over prompts of the mean over their pairs.  (P, N, N) -> (P, N, N)"""
    return wins / (len(wins) * wins.sum(axis=(1, 2), keepdims=True))


def pair_loss(logp: Tensor, ref_logp: Array, wins: Array, beta: float) -> Tensor:
    """DPO on all ordered pairs, weighted by `wins`: -mean_x sum_ij wins_ij log sigma(beta (h_i - h_j))/sum wins.

    h = log pi - log pi_ref. (P, N), (P, N), (P, N, N) -> ()
    """
    return -ops.sum(pair_weights(wins) * ops.logsigmoid(beta * margins(logp, ref_logp)))


def pair_slope(logp: Tensor, ref_logp: Array, wins: Array, beta: float) -> Tensor:
    """<dL/dlog pi, log pi>, L = `pair_loss`: a number with the same gradient, for a descent, which reads no loss.

    dL/dlog pi_i = -beta sum_j (v_ij sigma(-u_ij) - v_ji sigma(-u_ji)),   u_ij = beta (h_i - h_j), v = `pair_weights`
    """
    push = pair_weights(wins) * exact.preference_probabilities(-beta * (logp.data - ref_logp))  # i up and j down
    return ops.sum(-beta * (push.sum(axis=2) - push.sum(axis=1)) * logp)


def square_loss(logp: Tensor, ref_logp: Array, wins: Array, beta: float) -> Tensor:
    """IPO on all ordered pairs: mean_x sum_ij wins_ij (h_i - h_j - 1/(2 beta))^2/sum wins, h = log pi - log pi_ref."""
    return ops.sum(pair_weights(wins) * (margins(logp, ref_logp) - 1 / (2 * beta)) ** 2)


def newton(world: World, wins: Array, beta: float) -> tuple[Array, int]:
    """log pi of the table that minimises `pair_loss`, and the number of Newton steps.  -> (P, N)

    In u = beta (theta - log pi_ref) the loss is Bradley-Terry's: convex, and the same for u and u + c.
    """
    fits = [exact.fitted_rewards(w) for w in wins]
    logits = world.ref_logp + numpy.stack([u for u, _ in fits]) / beta
    return ops.log_softmax.raw(logits)[0], max(steps for _, steps in fits)


def descent(policy: Policy, loss: Loss, optimizer: Callable[..., optim.Optimizer], rates: Sequence[float]) -> Array:
    """log pi before each step down a loss of log pi, and after the last.  -> (steps + 1, P, N)"""
    params, log_policy = policy
    mover, path = optimizer(params, 0.0), []
    for rate in rates:
        logp = log_policy()
        path.append(logp.data)
        mover.zero_grad()
        loss(logp).backward()
        mover.learning_rate = rate
        mover.step()
    return numpy.stack([*path, log_policy().data])


def cosine(steps: int, peak: float, warmup: int = 0) -> list[float]:
    """Learning rates of a cosine schedule."""
    return [optim.warmup_cosine(step, steps, peak, warmup) for step in range(steps)]


def table_policy(world: World) -> Policy:
    """A table of one logit for each response, which starts at the reference."""
    params = {"logits": Tensor(world.ref_logp.copy(), requires_grad=True)}
    return params, lambda: ops.log_softmax(params["logits"])


def fitted_table(world: World, loss: Loss, steps: int, peak: float) -> Array:
    """log pi of a table after Adam has minimised a loss of log pi.  -> (P, N)"""
    return descent(table_policy(world), loss, ADAM, cosine(steps, peak))[-1]


def transformer_config(world: World, n_embd: int, n_layer: int) -> Config:
    """The sizes of a transformer with four heads that reads every text of a world."""
    longest = max(map(len, world.prompts)) + max(map(len, world.responses))
    return Config(1 + max(max(y) for y in world.responses), longest, n_embd, n_layer, 4)


def transformer_policy(world: World, seed: int, n_embd: int, n_layer: int) -> Policy:
    """A new transformer in float64. It is narrow, so its matrices are normal(0, 0.1)."""
    config = transformer_config(world, n_embd, n_layer)
    params = model.init(config, stream(seed, "policy", n_embd, n_layer), dtype="float64")
    for p in params.values():
        p.data = p.data * 5 if p.data.ndim == 2 else p.data
    tree = exact.prefix_tree(config, world.prompts, world.responses)
    return params, lambda: tree.logprobs(params, config)


def optimum_of_dpo(world: World, seed: int) -> Iterator[Claim]:
    """DPO over all pairs with exact label probabilities has its minimum at pi*, for a table of logits."""
    wins = all_pairs(world)
    worst, steps = 0.0, 0
    for beta in BETAS:
        star, _ = exact.optimum(world.ref_logp, world.reward, beta)
        logp, count = newton(world, wins, beta)
        worst, steps = max(worst, exact.total_variation(logp, star).max()), max(steps, count)
    yield at_most(f"DPO on a table, at most {steps} Newton steps, five betas: TV to pi*", worst, 1e-12)
    beta = 0.5
    star, _ = exact.optimum(world.ref_logp, world.reward, beta)
    loss = functools.partial(pair_slope, ref_logp=world.ref_logp, wins=wins, beta=beta)
    curvature = beta**2 / (2 * world.reward.size)  # roughly the largest of the loss
    for name, logp in (
        ("gradient descent", descent(table_policy(world), loss, optim.SGD, [1 / curvature] * 500)[-1]),
        ("Adam", fitted_table(world, loss, 500, 0.3)),
    ):
        text = f"DPO on a table, 500 steps of {name}, beta 0.5: TV to pi*"
        yield at_most(text, exact.total_variation(logp, star).max(), 1e-2)


def optimum_of_transformers(
    world: World, seed: int, runs: Sequence[tuple[float, int, int, int, float]] = RUNS
) -> Iterator[Claim]:
    """The same holds for transformers, as closely as their size allows."""
    wins = all_pairs(world)
    for beta, n_embd, n_layer, steps, bound in runs:
        star, _ = exact.optimum(world.ref_logp, world.reward, beta)
        logp = fitted_transformer(world, wins, beta, seed, n_embd, n_layer, steps)
        text = f"DPO on a transformer of width {n_embd}, {n_layer} layer(s), {steps} steps of Adam, beta {beta:g}"
        yield at_most(f"{text}: TV to pi*", exact.total_variation(logp, star).max(), bound)


def fitted_transformer(
    world: World, wins: Array, beta: float, seed: int, n_embd: int, n_layer: int, steps: int
) -> Array:
    """log pi of a transformer after Adam with a cosine schedule has minimised `pair_loss`.  -> (P, N)"""
    loss = functools.partial(pair_slope, ref_logp=world.ref_logp, wins=wins, beta=beta)
    optimizer = functools.partial(ADAM, betas=(0.9, 0.99))
    return descent(transformer_policy(world, seed, n_embd, n_layer), loss, optimizer, cosine(steps, 5e-3, 50))[-1]


def policy_gradient(logp: Array, ref_logp: Array, reward: Array, beta: float) -> Array:
    """dJ/dtheta for a table of logits: pi (A - E[A]), A = r - beta log(pi/pi_ref).  (..., N) -> (..., N)"""
    # dJ/dpi_j = r_j - beta (log(pi_j/ref_j) + 1); dpi_j/dtheta_i = pi_j ([i = j] - pi_i); sum_j: pi_i (A_i - E[A])
    p = numpy.exp(logp)
    advantage = reward - beta * (logp - ref_logp)
    return p * (advantage - (p * advantage).sum(axis=-1, keepdims=True))


def natural_gradient(logp: Array, gradient: Array) -> Array:
    """F^+ g with Fisher's F = diag(pi) - pi pi^T: the v of mean 0 under pi with F v = g.  (..., N) -> (..., N)"""
    # F v = pi (v - E[v]) = g where v = g/pi, since E[g/pi] = sum g = 0
    return gradient / numpy.exp(logp)


def natural_policy(world: World, reward: Array, beta: float, steps: int) -> Array:
    """log pi after `steps` exact natural gradient steps of 1/(2 beta) up J, from the reference.  -> (P, N)"""
    logp = world.ref_logp
    for _ in range(steps):
        move = natural_gradient(logp, policy_gradient(logp, world.ref_logp, reward, beta))
        logp = ops.log_softmax.raw(logp + 0.5 / beta * move)[0]
    return logp


def rlhf(world: World, seed: int) -> Iterator[Claim]:
    """RLHF reaches the same pi* the long way: fit rewards to the same pairs, then follow the policy gradient of J."""
    wins = all_pairs(world)
    learned = numpy.stack([exact.fitted_rewards(w)[0] for w in wins])
    worst = 0.0
    for beta in BETAS:
        star, _ = exact.optimum(world.ref_logp, world.reward, beta)
        logp = natural_policy(world, learned, beta, 60)
        worst = max(worst, exact.total_variation(logp, star).max())
    yield at_most("natural policy gradient on learned rewards, 60 steps of 1/(2 beta): TV to pi*", worst, 1e-12)
    for beta in (5.0, 0.5, 0.05):
        star, _ = exact.optimum(world.ref_logp, world.reward, beta)
        logits = logp = world.ref_logp
        for _ in range(2000):
            logits = logits + policy_gradient(logp, world.ref_logp, learned, beta) / max(beta, 0.1)
            logp = ops.log_softmax.raw(logits)[0]
        tv = exact.total_variation(logp, star).max()
        # a response of probability p moves at a rate proportional to p, so an unlikely one rises late
        rise = (star - world.ref_logp).max()
        text = (
            f"plain policy gradient, 2000 steps, beta {beta:g}, where pi* is up to {rise:.0f} nats above the reference"
        )
        yield Claim(f"{text}: TV to pi*", float(tv), None)


def sampled_gradients(world: World, logp: Array, beta: float, rng: numpy.random.Generator, count: int) -> Array:
    """REINFORCE estimates of `policy_gradient` for the first prompt, one response each.  -> (count, N)

    (A(y) - b) (onehot(y) - pi) with y ~ pi and b = E[A]: the mean is exact, a single one is mostly noise.
    """
    p = numpy.exp(logp[0])
    advantage = world.reward[0] - beta * (logp[0] - world.ref_logp[0])
    samples = rng.choice(len(p), size=count, p=p / p.sum())
    weights = (advantage[samples] - (p * advantage).sum())[:, None]
    return weights * (numpy.eye(len(p))[samples] - p)


def sampling_noise(world: World, seed: int) -> Iterator[Claim]:
    """A policy gradient from samples is exact on average, and a single sample is mostly noise."""
    beta, count = 0.5, 200_000
    exact_gradient = policy_gradient(world.ref_logp, world.ref_logp, world.reward, beta)[0]
    estimates = sampled_gradients(world, world.ref_logp, beta, stream(seed, "reinforce"), count)
    noise = math.sqrt(estimates.var(axis=0).sum())
    error = numpy.linalg.norm(estimates.mean(axis=0) - exact_gradient) / (noise / math.sqrt(count))
    yield at_most(f"the mean of {count} REINFORCE samples: standard errors to the exact gradient", error, 3)
    ratio = float(noise / numpy.linalg.norm(exact_gradient))
    yield Claim("the noise of one sample, in lengths of the gradient (more than 1)", ratio, ratio > 1)


def ppo_from_samples(world: World, seed: int) -> Iterator[Claim]:
    """PPO (ppo.py) approaches pi* from its own samples and their true rewards, the nearer the more of them."""
    world, beta, steps, near = small_world(seed, cap=2), 0.5, 100, []  # 13 responses, for a small transformer
    config = transformer_config(world, 16, 1)

    def reward(examples: Sequence[Any]) -> Array:
        return numpy.array([world.reward[world.prompts.index(x), world.responses.index(y)] for x, y in examples])

    for count in (4, 16, 64):  # samples of a prompt in each step
        policy, log_policy = transformer_policy(world, seed, 16, 1)
        star, _ = exact.optimum(log_policy().data, world.reward, beta)
        asked, settings = itertools.repeat(world.prompts * count), ppo.Settings(beta=beta)
        models = policy, ppo.head(policy), model.frozen(policy)
        list(ppo.ppo(*models, reward, config, asked, stream(seed, "ppo", count), 2, cosine(steps, 1e-2), settings))
        near.append(exact.total_variation(log_policy().data, star).mean().item())
        text = f"{len(world.prompts) * count * steps:,} samples, four steps on each: TV to pi*"
        yield Claim(text, near[-1], None)
    ratio = near[-1] / near[0]
    yield Claim("with sixteen times the samples TV is a fraction of it (less than a half)", ratio, ratio < 0.5)


def mean_log_ratio(world: World, seed: int) -> Iterator[Claim]:
    """E_ref[log(pi/pi_ref)] = -KL(pi_ref || pi): the mean implicit reward sinks as soon as the policy moves."""
    loss = functools.partial(pair_loss, ref_logp=world.ref_logp, wins=all_pairs(world), beta=0.5)
    path = descent(table_policy(world), loss, ADAM, [0.1] * 100)
    for step in (0, 1, 10, 100):
        mean = (numpy.exp(world.ref_logp) * (path[step] - world.ref_logp)).sum(axis=-1)
        text = f"after {step} steps of DPO, E_ref[log(pi/pi_ref)] = {mean.mean():z.4f} is -KL(pi_ref || pi): error"
        yield at_most(text, abs(mean + exact.kl(world.ref_logp, path[step])).max(), 1e-10)


EQUALITIES: list[Callable[[World, int], Iterator[Claim]]] = [
    bradley_terry,
    constrained_objective,
    reparametrisation,
    optimum_of_dpo,
    rlhf,
    sampling_noise,
    ppo_from_samples,
    mean_log_ratio,
    *(functools.partial(optimum_of_transformers, runs=[run]) for run in RUNS),  # they take long, so each is its own
]
