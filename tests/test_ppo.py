"""PPO: each formula against another route, and the whole against the optimum that it should reach."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from drawing import seeds
from minidpo import Tensor, gradcheck, losses, model, ops, optim
from minidpo.model import Config
from minidpo.scoring import sequence_logprob
from minidpo.theory import equalities, exact, ppo
from models import CONFIG, small

close = np.testing.assert_allclose
END = CONFIG.eos_token_id


def random_texts(rng, count=6):
    """Prompts of one or two tokens with responses of one to four, in any order."""
    length = lambda low, high: rng.integers(low, high, endpoint=True)  # noqa: E731
    return [
        (rng.integers(1, 5, length(1, 2)).tolist(), rng.integers(1, 5, length(1, 4)).tolist()) for _ in range(count)
    ]


def looked_at(policy, critic, reference, examples, reward):
    """The rollout of texts that are given, not sampled."""
    examples = sorted(examples, key=lambda example: sum(map(len, example)))
    logp, value = ppo.policy_and_values(policy, critic, CONFIG, examples)
    ref_logp, _ = ppo.policy_and_values(reference, critic, CONFIG, examples)
    text = np.repeat(np.arange(len(examples)), [len(y) for _, y in examples])
    last = np.append(text[1:] != text[:-1], True)
    return ppo.Rollout(examples, reward, logp.data, ref_logp.data, value.data, text, last)


def gradients(loss, params):
    """The gradient of a loss in each parameter."""
    for p in params.values():
        p.grad = None
    loss.backward()
    return {name: 0 * p.data if p.grad is None else p.grad for name, p in params.items()}


# ---- the reward model -------------------------------------------------------------------------------------


@given(seeds)
def test_the_reward_loss_is_dpo_at_beta_1_without_a_reference(seed):
    """Bradley-Terry of rewards is the DPO loss with r for log pi and 0 for the reference; so is its gradient."""
    reward_w, reward_l = np.random.default_rng(seed).normal(0, 3, (2, 4))
    four = reward_w, reward_l, np.zeros(4), np.zeros(4)
    close(ppo.reward_loss(reward_w, reward_l).item(), losses.dpo_loss(*four, beta=1.0).loss.item(), rtol=1e-14)
    close(ppo.reward_gradient(reward_w, reward_l), losses.dpo_gradient(*four, beta=1.0), rtol=1e-13)


@given(seeds)
def test_the_reward_gradient_is_that_of_the_loss(seed):
    """The closed form, a sweep, finite differences and the complex step agree."""
    rng = np.random.default_rng(seed)
    rewards = rng.normal(0, 3, (2, 4))

    def as_op(reward_w, reward_l):
        return ppo.reward_loss(reward_w, reward_l).data, lambda g: tuple(g * x for x in ppo.reward_gradient(*rewards))

    for method in ("central", "complex"):
        gradcheck.check_vjp(as_op, *rewards, rng=rng, method=method)
    leaves = [Tensor(x, requires_grad=True) for x in rewards]
    ppo.reward_loss(*leaves).backward()
    close([leaf.grad for leaf in leaves], ppo.reward_gradient(*rewards), rtol=1e-13)


@given(seeds)
def test_a_reward_is_read_after_the_whole_text(seed):
    """The reward of each text, in the caller's order, is the head on what a plain forward has after its last token."""
    rng, params = np.random.default_rng(seed), ppo.with_head(small(seed % 7))
    params[ppo.HEAD].data = rng.normal(size=(CONFIG.n_embd, 1))
    examples = random_texts(rng)
    rewards = ppo.text_rewards(params, CONFIG, examples).data
    for (x, y), reward in zip(examples, rewards):
        states = model.row_states(params, CONFIG, model.batch_rows([[*x, *y]], CONFIG)).data  # (T, C)
        close(reward, (states[-1] @ params[ppo.HEAD].data).item(), rtol=1e-10)


def test_a_reward_model_learns_the_order_of_its_pairs():
    """From a head of zeros, whose loss is log 2, to rewards that rank every pair as labelled."""
    params, optimizer_rate = ppo.with_head(small()), 3e-2
    optimizer = optim.AdamW(params, optimizer_rate)
    pairs = [([1], [2, 3, END], [3, 2, END]), ([1], [2, 2, END], [3, 3, END]), ([2], [4, END], [3, END])]
    large = {name: Tensor(100 * p.data, requires_grad=True) for name, p in params.items()}
    large[ppo.HEAD].data = large[ppo.HEAD].data + 100
    before = {name: p.data.copy() for name, p in large.items()}
    ppo.reward_training_step(large, CONFIG, optim.SGD(large, 1.0), pairs)
    close(math.sqrt(sum(((p.data - before[name]) ** 2).sum() for name, p in large.items())), 1.0)  # the norm is clipped
    first = ppo.reward_training_step(params, CONFIG, optimizer, pairs)
    close(first["loss"], math.log(2), rtol=1e-12)
    for _ in range(60):
        last = ppo.reward_training_step(params, CONFIG, optimizer, pairs)
    assert last["accuracy"] == 1 and last["loss"] < 0.1
    w, l = (ppo.text_rewards(params, CONFIG, [(pair[0], pair[side]) for pair in pairs]).data for side in (1, 2))
    assert (w > l).all()


# ---- samples and their advantages -------------------------------------------------------------------------


def test_states_of_a_text_are_those_before_each_token():
    """A token's log-probability and value are those of the state in which it is drawn, with either kind of critic."""
    rng, policy = np.random.default_rng(0), small(1)
    own = ppo.with_head(small(2))
    for critic in (own, ppo.head(policy)):
        critic[ppo.HEAD].data = rng.normal(size=(CONFIG.n_embd, 1))
        examples = sorted(random_texts(rng), key=lambda example: sum(map(len, example)))
        logp, value = ppo.policy_and_values(policy, critic, CONFIG, examples)
        trunk, place = (own if critic is own else policy), 0
        for x, y in examples:
            for t in range(len(y)):
                state = model.batch_rows([[*x, *y[:t]]], CONFIG)
                close(value.data[place], (model.row_states(trunk, CONFIG, state).data[-1] @ critic[ppo.HEAD].data)[0])
                close(logp.data[place], exact.chain_rule_logprob(policy, CONFIG, [*x, *y[:t]], [y[t]]))
                place += 1
        assert place == len(logp.data)


def test_a_rollout_holds_what_the_four_models_say_of_it():
    """Its texts are sampled, shortest first; the reference's scores are the reference's, the rewards the reward's."""
    policy, reference, critic = small(0), model.frozen(small(1)), ppo.with_head(small(2))
    rng = np.random.default_rng(0)
    prompts = [[1, 2], [3], [4]] * 5
    seen = ppo.rollout(policy, critic, reference, lambda es: np.array([len(y) for _, y in es]), CONFIG, prompts, rng, 3)
    lengths = [len(x) + len(y) for x, y in seen.examples]
    assert lengths == sorted(lengths) and sorted(x for x, _ in seen.examples) == sorted(prompts)
    assert len(set(map(str, seen.examples))) > 3 and all(len(y) <= 3 for _, y in seen.examples)
    for number, (x, y) in enumerate(seen.examples):
        own = seen.text == number
        close(seen.logp[own].sum(), sequence_logprob(policy, CONFIG, [x], [y]).item())
        close(seen.ref_logp[own].sum(), sequence_logprob(reference, CONFIG, [x], [y]).item())
        assert seen.reward[number] == len(y) == own.sum() and seen.last[own].tolist() == [False] * (len(y) - 1) + [True]


@given(seeds, st.sampled_from([0.0, 0.3, 2.0]))
def test_token_rewards_of_a_text_sum_to_its_share_of_the_objective(seed, beta):
    """Their sum is r(x, y) - beta log(pi(y|x)/pi_ref(y|x)): the KL is that of the policy's own samples."""
    rng, models = np.random.default_rng(seed), [small(0), small(1)]
    examples = random_texts(rng)
    seen = looked_at(models[0], ppo.head(models[0]), models[1], examples, rng.normal(size=len(examples)))
    rewards = ppo.token_rewards(seen, beta)
    for number, (x, y) in enumerate(seen.examples):
        ratio = np.subtract(*[sequence_logprob(params, CONFIG, [x], [y]).item() for params in models])
        close(rewards[seen.text == number].sum(), seen.reward[number] - beta * ratio, atol=1e-10)


@given(seeds, st.floats(0, 1), st.floats(0, 1))
def test_advantages_are_a_weighted_mean_of_looking_ahead(seed, gamma, lam):
    """A_t is the mean over n, weighted by (1 - lam) lam^(n-1), of what n tokens and V after them were worth."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 6, 3)
    reward, value = rng.normal(size=(2, lengths.sum()))
    last = np.zeros(lengths.sum(), dtype=bool)
    last[np.cumsum(lengths) - 1] = True
    advantage, start = ppo.advantages(reward, value, last, gamma, lam), 0
    for T in lengths:
        r, V = reward[start : start + T], [*value[start : start + T], 0.0]
        for t in range(T):
            looks = [sum(gamma**k * r[t + k] for k in range(n)) + gamma**n * V[t + n] for n in range(1, T - t + 1)]
            weights = [(1 - lam) * lam ** (n - 1) for n in range(1, T - t)] + [lam ** (T - t - 1)]  # all longer looks
            close(advantage[start + t], np.dot(weights, looks) - V[t], atol=1e-12)
        start += T


# ---- the clipped step -------------------------------------------------------------------------------------


def surrogate_case(seed, kink=1e-3):
    """Log-probabilities before and after, and advantages, no ratio near a kink."""
    rng = np.random.default_rng(seed)
    old, advantage = rng.normal(-2, 1, 8), rng.normal(0, 2, 8)
    ratio = rng.choice([0.3, 0.75, 0.95, 1.0, 1.1, 1.3, 3.0], 8) * rng.uniform(1 - kink, 1 + kink, 8)
    return old + np.log(ratio), old, advantage


@given(seeds)
def test_the_surrogate_gradient_is_that_of_the_loss(seed):
    """Where no ratio is at a kink, the closed form, a sweep, finite differences and the complex step agree."""
    logp, old, advantage = surrogate_case(seed)
    rest = old, advantage, 0.2, 3

    def as_op(logp):
        return ppo.surrogate_loss(logp, *rest).data, lambda g: (g * ppo.surrogate_gradient(logp, *rest),)

    for method in ("central", "complex"):
        gradcheck.check_vjp(as_op, logp, rng=np.random.default_rng(seed), method=method)
    leaf = Tensor(logp, requires_grad=True)
    ppo.surrogate_loss(leaf, *rest).backward()
    close(leaf.grad, ppo.surrogate_gradient(logp, *rest), rtol=1e-12)


@given(seeds)
def test_the_surrogate_is_the_smaller_of_two(seed):
    """It is the mean over texts of min(rho A, clip(rho) A), by NumPy's own minimum and clip."""
    logp, old, advantage = surrogate_case(seed)
    rho = np.exp(logp - old)
    smaller = np.minimum(rho * advantage, np.clip(rho, 0.8, 1.2) * advantage)
    close(ppo.surrogate_loss(logp, old, advantage, 0.2, 5).item(), -smaller.sum() / 5, rtol=1e-12)


@pytest.mark.parametrize(
    ("ratio", "advantage", "moves"),
    [(1.3, 1, False), (1.3, -1, True), (0.7, 1, True), (0.7, -1, False), (1.1, 1, True), (0.9, -1, True)],
)
def test_only_what_was_already_gained_stops_the_gradient(ratio, advantage, moves):
    """A token that moved too far in its direction gets no gradient; one that moved the wrong way still does."""
    one = np.ones(1)
    gradient = ppo.surrogate_gradient(np.log(ratio * one), 0 * one, advantage * one, 0.2, 1)
    close(gradient, [-ratio * advantage if moves else 0.0])


def test_the_first_gradient_is_the_policy_gradient_of_a_table():
    """With gamma = lam = 1, the same samples and baseline, it is `equalities.sampled_gradients` to rounding."""
    world = equalities.small_world(0, cap=1, prompts=1)  # responses of one token: a table of logits is the policy
    logp, beta, count = next(equalities.random_policies(world, 5)), 0.5, 300
    expected = equalities.sampled_gradients(world, logp, beta, np.random.default_rng(3), count).mean(axis=0)
    p = np.exp(logp[0])
    drawn = np.random.default_rng(3).choice(len(p), size=count, p=p / p.sum())
    baseline = (p * (world.reward[0] - beta * (logp - world.ref_logp)[0])).sum()
    examples, ones = [([0], world.responses[i]) for i in drawn], np.ones(count, dtype=bool)
    seen = ppo.Rollout(
        examples, world.reward[0, drawn], logp[0, drawn], world.ref_logp[0, drawn], baseline * ones, drawn, ones
    )
    advantage = ppo.advantages(ppo.token_rewards(seen, beta), seen.value, seen.last, 1.0, 1.0)
    slopes = ppo.surrogate_gradient(seen.logp, seen.logp, advantage, 0.2, count)
    close(-(slopes[:, None] * (np.eye(len(p))[drawn] - p)).sum(axis=0), expected, atol=1e-14)


def test_the_first_step_of_a_transformer_is_the_policy_gradient():
    """The step itself, with gamma = lam = 1 and a baseline b of whole texts, climbs mean((A - b) log pi)."""
    policy, reference, rng, beta = small(0), model.frozen(small(1)), np.random.default_rng(0), 0.3
    examples = random_texts(rng)
    seen = looked_at(policy, ppo.head(policy), reference, examples, rng.normal(size=len(examples)))
    rewards, b = ppo.token_rewards(seen, beta), 0.7
    whole = np.bincount(seen.text, rewards)  # A(y) = r - beta log(pi/pi_ref)
    before = np.concatenate(
        [np.cumsum(rewards[seen.text == i]) - rewards[seen.text == i] for i in range(len(examples))]
    )
    logp = ops.concatenate(*[sequence_logprob(policy, CONFIG, [x], [y]) for x, y in seen.examples])
    expected = gradients(-ops.mean((whole - b) * logp), policy)
    start = {name: p.data.copy() for name, p in policy.items()}
    critic = ppo.head(policy)
    optimizer = optim.SGD(ppo.trainable(policy, critic), 1.0)
    once = ppo.Settings(beta, 1.0, 1.0, epochs=1, value_weight=0.0, max_norm=math.inf)
    ppo.ppo_training_step(policy, critic, CONFIG, optimizer, seen._replace(value=b - before), once)
    for name, p in policy.items():
        close(start[name] - p.data, expected[name], atol=1e-10)


@pytest.mark.parametrize("scale", [0.0, 3.0])
def test_whatever_the_critic_says_the_expected_gradient_is_that_of_the_objective(scale):
    """With gamma = lam = 1, the mean over all responses is dJ/dtheta of RLHF, exactly, with any values of states."""
    policy, reference, beta, x = small(0), model.frozen(small(1)), 0.4, [1, 2]
    critic = ppo.head(policy)
    critic[ppo.HEAD].data = scale * np.random.default_rng(0).normal(size=(CONFIG.n_embd, 1))
    responses = exact.complete_responses(CONFIG.vocab_size, 2)
    reward = np.random.default_rng(1).normal(size=len(responses))
    seen = looked_at(policy, critic, reference, [(x, y) for y in responses], reward)
    advantage = ppo.advantages(ppo.token_rewards(seen, beta), seen.value, seen.last, 1.0, 1.0)
    logp, _ = ppo.policy_and_values(policy, critic, CONFIG, seen.examples)
    p = np.exp(np.bincount(seen.text, seen.logp))[seen.text]  # of each token's text
    found = gradients(ppo.surrogate_loss(logp, seen.logp, p * advantage, 0.2, 1), policy)
    logps = exact.exact_logprobs(policy, CONFIG, [x], [y for _, y in seen.examples])  # (1, N)
    ref_logps = exact.exact_logprobs(reference, CONFIG, [x], [y for _, y in seen.examples]).data
    J = ops.sum(ops.exp(logps) * (seen.reward - beta * (logps - ref_logps)))
    for name, expected in gradients(-J, policy).items():
        close(found[name], expected, atol=1e-10)


def test_only_a_critic_on_the_policys_trunk_moves_the_policy():
    """Without advantages the policy stays where it is beside a critic with its own trunk, and moves beside a head."""
    moved = {}
    for kind in ("own", "head"):
        policy, reference = small(0), model.frozen(small(0))
        critic = ppo.with_head(small(2)) if kind == "own" else ppo.head(policy)
        critic[ppo.HEAD].data = np.ones((CONFIG.n_embd, 1))
        seen = looked_at(policy, critic, reference, random_texts(np.random.default_rng(0)), np.zeros(6))
        optimizer = optim.SGD(ppo.trainable(policy, critic), 0.1)
        still = {name: p.data.copy() for name, p in policy.items()}
        head, errors = critic[ppo.HEAD].data.copy(), []
        for _ in range(3):  # advantages of 0, targets of 0: only the critic has something to learn
            nothing = seen._replace(value=0 * seen.value)
            errors.append(ppo.ppo_training_step(policy, critic, CONFIG, optimizer, nothing)["loss/value"])
        assert (critic[ppo.HEAD].data != head).any() and errors == sorted(errors, reverse=True)
        moved[kind] = max(abs(p.data - still[name]).max() for name, p in policy.items())
    assert moved["own"] == 0 < moved["head"]


def test_the_metrics_are_those_of_the_samples():
    """Reward and KL are means over texts. Before a move no ratio is outside; the critic errs by the advantage."""
    policy, reference = small(0), model.frozen(small(1))
    critic, reward = ppo.with_head(policy), np.arange(6.0)
    critic[ppo.HEAD].data = np.ones((CONFIG.n_embd, 1))
    seen = looked_at(policy, critic, reference, random_texts(np.random.default_rng(0)), reward)
    optimizer = optim.SGD(ppo.trainable(policy, critic), 0.0)
    metrics = ppo.ppo_training_step(policy, critic, CONFIG, optimizer, seen)
    ratios = [
        np.subtract(*[sequence_logprob(params, CONFIG, [x], [y]).item() for params in (policy, reference)])
        for x, y in seen.examples
    ]
    close([metrics["reward"], metrics["kl"], metrics["outside"]], [2.5, np.mean(ratios), 0], atol=1e-10)
    own = ppo.SETTINGS
    advantage = ppo.advantages(ppo.token_rewards(seen, own.beta), seen.value, seen.last, own.gamma, own.lam)
    close([metrics["loss/value"], metrics["loss/policy"]], [(advantage**2).sum() / 12, -advantage.sum() / 6], rtol=1e-9)
    optimizer = optim.SGD(ppo.trainable(policy, critic), 1.0)
    old = seen.logp + np.where(seen.last, np.log(1.24), 0)  # 1/1.24 is within 0.2 of 1, 1.24 is not
    for logp, share in ((2 * seen.logp - old, 6 / len(old)), (old, 0)):
        still = optim.SGD(ppo.trainable(policy, critic), 0.0)
        close(ppo.ppo_training_step(policy, critic, CONFIG, still, seen._replace(logp=logp))["outside"], share)
    before = {name: p.data.copy() for name, p in policy.items()}
    short = ppo.Settings(epochs=1, max_norm=1e-3)
    norm = ppo.ppo_training_step(policy, critic, CONFIG, optimizer, seen, short)["grad_norm"]
    moved = math.sqrt(sum(((p.data - before[name]) ** 2).sum() for name, p in policy.items()))
    assert norm > 0.1 and 1e-4 < moved <= 1e-3 * (1 + 1e-9)  # the critic has the rest


def test_a_loss_that_is_not_finite_moves_nothing():
    """A step on an infinite reward is refused, and every parameter is what it was."""
    policy, reference = small(0), model.frozen(small(1))
    critic = ppo.with_head(policy)
    seen = looked_at(policy, critic, reference, random_texts(np.random.default_rng(0)), np.full(6, np.inf))
    before = {name: p.data.copy() for name, p in policy.items()}
    with pytest.raises(FloatingPointError), np.errstate(invalid="ignore"):
        ppo.ppo_training_step(policy, critic, CONFIG, optim.SGD(ppo.trainable(policy, critic), 0.1), seen)
    assert all((p.data == before[name]).all() for name, p in policy.items())


@settings(max_examples=5)
@given(seeds)
def test_steps_raise_a_reward_that_is_easy(seed):
    """Of a reward for the token 3, a few steps give more."""
    policy = small(seed % 5, config := Config(5, 8, 8, 1, 2))
    asked, rng = itertools.repeat([[1], [2]] * 16), np.random.default_rng(seed)
    steps = ppo.ppo(
        policy, ppo.head(policy), model.frozen(policy), lambda es: np.array([float(y[0] == 3) for _, y in es]),
        config, asked, rng, 2, [3e-2] * 25, ppo.Settings(beta=0.01),
    )  # fmt: skip
    rewards = [metrics["reward"] for metrics in steps]
    assert np.mean(rewards[-5:]) > min(0.9, np.mean(rewards[:2]) + 0.1)
