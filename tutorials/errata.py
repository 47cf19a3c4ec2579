# %% [markdown]
# # Twenty-nine things that people say about DPO, and what a computation says
#
# Each item is a function. It returns the claim in our words, the numbers that come with the claim, the numbers
# computed here and now, and the reason why they differ. Change an input, and the numbers follow. Only E27 and E29 look
# theirs up: `python -m benchmarks.story` and `python -m benchmarks.ppo` measured them, on models that take an hour.
# Most items are common claims. E4 to E7, E20 and E21 check the arithmetic of one worked example.
#
# Letters: w is the chosen response and l the rejected one. The margin is (logp_w - ref_logp_w) - (logp_l - ref_logp_l),
# z = beta * margin, and the loss is -log sigma(z). The gap of one model is its logp_w - logp_l, so the margin is the
# gap of the policy less that of the reference.

# %%
import itertools
import json
import math
import statistics
import textwrap
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from minidpo import Config, Tensor, exact, losses, model, ops, optim, scoring, training, world
from minidpo.data.preferences import collate
from minidpo.theory import mutants, no_never_yes


class Erratum(NamedTuple):
    id: str
    claim: str
    given: dict[str, float]  # name -> number, as the claim has it; empty if the claim has no number
    computed: dict[str, float]  # name -> number, from the code in this file
    why: str


# %% [markdown]
# ## What several items share
#
# A transformer whose random parameters are large enough that no effect drowns in rounding, and one pair of ids. Id 0
# is end-of-text. The two responses start with the same token and differ in length.

# %%
BETA = 0.1
CONFIG = Config(vocab_size=5, n_positions=10, n_embd=8, n_layer=1, n_head=2)
PROMPT, CHOSEN, REJECTED = [1, 2, 3], [2, 4, 0], [2, 1, 3, 4, 0]


def tiny_model(seed):
    rng = np.random.default_rng(seed)
    params = model.init(CONFIG, rng, dtype="float64")
    for parameter in params.values():
        parameter.data = parameter.data + 0.5 * rng.normal(size=parameter.shape)
    return params


def sequence_logp(params, response, prompt=PROMPT):
    return scoring.sequence_logprob(params, CONFIG, [prompt], [response])  # (1,)


def flat_gradient(loss, params):
    """The gradient with respect to all parameters, as one vector."""
    for parameter in params.values():
        parameter.grad = None
    loss.backward()
    return np.concatenate([parameter.grad.reshape(-1) for parameter in params.values()])


def sigma(z):
    return 1 / (1 + math.exp(-z))


def root(f, low, high):
    """The place between low and high where f changes its sign, by bisection."""
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if (f(middle) > 0) == (f(low) > 0) else (low, middle)
    return low


def cosine(a, b):
    return float(a @ b / math.sqrt((a @ a) * (b @ b)))


# %% [markdown]
# ## E1 to E5


# %%
def e1():
    # Gradient flow on logp_w and logp_l: each moves at speed beta sigma(-z), so the margin grows at 2 beta sigma(-z).
    # For z = beta * margin: dz/dt = 2 beta^2/(1 + e^z), so (1 + e^z) dz = 2 beta^2 dt, and z + e^z = 1 + 2 beta^2 t.
    def margin(beta, t):
        return root(lambda z: z + math.exp(z) - 1 - 2 * beta**2 * t, 0.0, math.log(2 + 2 * beta**2 * t)) / beta

    computed = {}
    for beta in (0.01, 0.1, 0.5):
        reward, ref_logp = np.array([1.7, 0.0]), np.log([0.3, 0.7])
        log_ratio = exact.optimum(ref_logp, reward, beta)[0] - ref_logp
        computed[f"margin at the optimum, beta {beta}"] = float(log_ratio[0] - log_ratio[1])
    for t in (10, 100, 1000, 10000):
        computed |= {f"margin at t = {t}, beta {beta}": margin(beta, t) for beta in (0.01, 0.1, 0.5)}
    computed["beta 0.5 and 0.1 cross at t"] = root(lambda t: margin(0.5, t) - margin(0.1, t), 1, 1000)
    computed["beta 0.1 and 0.01 cross at t"] = root(lambda t: margin(0.1, t) - margin(0.01, t), 100, 1e5)
    return Erratum(
        "E1",
        "A beta of 0.5 is aggressive, 0.1 conservative, and 0.01 barely changes the model.",
        {},
        computed,
        "At the optimum the margin is (difference of rewards)/beta, here 1.7/beta, so the smallest beta ends farthest "
        "from the reference. Early in gradient descent the order is reversed, because the margin starts to grow at "
        "speed beta, so the curves cross (here: certain labels, gradient flow on the two log-probs). AdamW divides "
        "each gradient by its own size, and there is no such order at first (`python -m benchmarks.story`).",
    )


def e2():
    log_gain = {"Paris": 0.811, "the": 0.0105}  # rises in log-prob, from the claim, which multiplies them by beta 0.1
    places = {"Paris": 10, "the": 50_000}

    def reward_gain(word, ref):
        def reward(logp):
            if ref is None:
                return losses.reference_free_loss(logp, -9.0, BETA).reward_w.item()
            return losses.dpo_loss(logp, -9.0, ref, -9.0, BETA).reward_w.item()

        return reward(-1.0 + log_gain[word]) - reward(-1.0)

    policy = tiny_model(0)
    gradients, weights = [], []
    for ref_w, ref_l in ((-5.0, -5.0), (-40.0, -9.0)):
        logp_w, logp_l = sequence_logp(policy, CHOSEN), sequence_logp(policy, REJECTED)
        out = losses.dpo_loss(logp_w, logp_l, np.array([ref_w]), np.array([ref_l]), BETA)
        gradients.append(flat_gradient(out.loss, policy))
        weights.append(sigma(-BETA * out.margin.item()))
    scales = [float(np.linalg.norm(gradient)) / weight for gradient, weight in zip(gradients, weights)]
    # log-probs of three tokens: filler that both responses share, a token of w alone, a token of l alone
    tokens = Tensor(np.array([-0.1, -1.0, -2.0]), requires_grad=True)
    losses.dpo_loss(tokens[0] + tokens[1], tokens[0] + tokens[2], -1.3, -1.9, BETA).loss.backward()
    return Erratum(
        "E2",
        'The reference removes the incentive to polish common words: with it "Paris" gains 77 times more than "the".',
        {'reward gain of "Paris"': 0.0811, 'of "the"': 0.00105, "ratio": 77},
        {
            "ratio with a reference": reward_gain("Paris", -1.0) / reward_gain("the", -1.0),
            "ratio without": reward_gain("Paris", None) / reward_gain("the", None),
            'gain of "the" in 50000 places': places["the"] * reward_gain("the", -1.0),
            'gain of "Paris" in 10 places': places["Paris"] * reward_gain("Paris", -1.0),
            "cosine of a pair's gradients under two references": cosine(*gradients),
            "ratio of their lengths over ratio of the weights sigma(-z)": scales[0] / scales[1],
            "dL/dlogp of a filler token that both responses share": float(tokens.grad[0]),
        },
        "The ratio is the same with and without a reference. The reference's log-probs are constants: they set the "
        "weight sigma(-z) of a pair's gradient, never its direction. Filler that both responses share cancels within "
        'the pair. And summed over a text, 50000 places against 10, "the" gains more.',
    )


def e3():
    logp_w, logp_l = -0.735, -0.21
    leaf = Tensor(logp_w, requires_grad=True)
    out = losses.reference_free_loss(leaf, logp_l, beta=1.0)
    out.loss.backward()
    return Erratum(
        "E3",
        "With the raw log-prob as reward, a model learns that shorter is better, and learns to write filler.",
        {"logp of the long chosen response": logp_w, "of the short rejected one": logp_l},
        {
            "margin": out.margin.item(),
            "loss": out.loss.item(),
            "dL/dlogp_w": float(leaf.grad),
            "dL/dlogp_w at margin 0": float(losses.reference_free_gradient(0.0, 0.0, beta=1.0)[0]),
        },
        "The loss works on labelled pairs: the long winner is pushed up, and harder than at margin 0. The weights of "
        "pairs are wrong, but no direction is reversed. And an offline loss never scores the model's own samples.",
    )


def e4():
    given = [0.045, 0.819, 0.061, 0.049]
    p = ops.softmax(np.array([0.1, 3.0, 0.5, 0.2])).data
    names = [f"p{i}" for i in range(4)]
    return Erratum(
        "E4",
        "The softmax of the logits 0.1, 3, 0.5, 0.2 is the row given here.",
        dict(zip(names, given)),
        {**dict(zip(names, map(float, p))), "sum": float(p.sum()), "sum of the given row": sum(given)},
        "A softmax sums to 1. The given row does not, and one line of code finds that.",
    )


def e5():
    first = ops.log_softmax(np.array([3.0, 0.5, 0.2])).data
    second = ops.log_softmax(np.array([0.1, 4.0, 1.0])).data
    names = [f"row {row}, token {token}" for row in (1, 2) for token in (0, 1, 2)]
    return Erratum(
        "E5",
        "The log-probs of the logits 3, 0.5, 0.2 and 0.1, 4, 1, and of token 0 followed by token 1, are these.",
        {**dict(zip(names, (-0.23, -2.73, -3.03, -4.08, -0.18, -3.18))), "total": -0.41},
        {**dict(zip(names, map(float, [*first, *second]))), "total": float(first[0] + second[1])},
        "log_softmax subtracts the log of the sum of exponentials from every logit. In the given rows about 0.1 too "
        "much was subtracted, so the total looks twice as large as it is.",
    )


# %% [markdown]
# ## E6 to E10


# %%
def e6():
    return Erratum(
        "E6",
        "The logistic function is 0.845 at 1.7 and 0.155 at -1.7.",
        {"sigma(1.7)": 0.845, "sigma(-1.7)": 0.155},
        {f"sigma({z})": math.exp(ops.logsigmoid(z).item()) for z in (1.7, -1.7)},
        "The value is 0.8455..., which rounds up to 0.846. Its complement, 0.1544..., rounds down to 0.154.",
    )


def e7():
    out = losses.dpo_loss(-10.0, -15.0, -12.0, -14.0, beta=0.1)
    return Erratum(
        "E7",
        "Log-probs of -10 and -15 under the policy and -12 and -14 under the reference give this loss at beta 0.1.",
        {"loss": 0.555},
        {"z": 0.1 * out.margin.item(), "loss": out.loss.item()},
        "The loss is log(1 + e^-0.3), which rounds to 0.554.",
    )


def e8():
    def slope(f, z):
        z = Tensor(z, requires_grad=True)
        f(z).backward()
        return abs(float(z.grad))

    def cross_entropy(z):
        return -ops.logsigmoid(z)

    def miss(z):
        return 1 - ops.exp(ops.logsigmoid(z))

    z = root(lambda z: sigma(z) - 0.01, -10.0, 0.0)
    dpo_slope = abs(float(losses.dpo_gradient(-1000.0, 0.0, 0.0, 0.0, BETA)[0]))
    return Erratum(
        "E8",
        "-log P works as a loss because it explodes as P goes to 0.",
        {},
        {
            "slope of -log P with respect to z, P = 0.01": slope(cross_entropy, z),
            "slope of 1 - P with respect to z, P = 0.01": slope(miss, z),
            "slope of -log P with respect to z, z = -100": slope(cross_entropy, -100.0),
            "slope of the DPO loss with respect to the margin, margin = -1000, beta 0.1": dpo_slope,
        },
        "P = sigma(z). The size of the slope of -log P never exceeds 1 with respect to z, or beta with respect to the "
        "margin. What matters is the comparison: the slope of 1 - P vanishes where the model is confidently wrong.",
    )


def e9():
    def reward(length, rise=0.02):
        token_logps, ref_token_logps = np.full(length, -1.0 + rise), np.full(length, -1.0)
        return losses.dpo_loss(token_logps.sum(), -5.0, ref_token_logps.sum(), -5.0, BETA).reward_w.item()

    return Erratum(
        "E9",
        "DPO solves length bias.",
        {},
        {f"reward of {n} tokens, each 0.02 nats likelier than under the reference": reward(n) for n in (10, 100)},
        "A sum of log-ratios grows with length: a rise on every token is worth a reward of beta * rise * |y|. In "
        "practice replies do grow longer under DPO (Park et al., arXiv 2403.19159).",
    )


def e10():
    def reference_free(logp_w, logp_l, _ref_logp_w, _ref_logp_l, beta):
        return losses.reference_free_loss(logp_w, logp_l, beta)

    policy = tiny_model(0)
    responses = exact.complete_responses(CONFIG.vocab_size, 3)
    before = exact.exact_logprobs(policy, CONFIG, [PROMPT], responses).data[0]
    batch, optimizer = collate([(PROMPT, CHOSEN, REJECTED)]), optim.SGD(policy, 0.5)
    for _ in range(20):
        training.dpo_training_step(policy, model.frozen(policy), CONFIG, optimizer, batch, BETA, reference_free)
    after = exact.exact_logprobs(policy, CONFIG, [PROMPT], responses).data[0]
    both = [(-10.0, -15.0), (-15.0, -20.0)]  # logp_w, logp_l, before and after both fall by 5
    with_reference = [losses.dpo_loss(*pair, -12.0, -14.0, BETA).loss.item() for pair in both]
    without = [losses.reference_free_loss(*pair, BETA).loss.item() for pair in both]
    return Erratum(
        "E10",
        "Without a reference all probabilities rise until they are uniform, or all fall into silence.",
        {},
        {
            "responses in all": len(responses),
            "sum of all probabilities after 20 steps without a reference": float(np.exp(after).sum()),
            "responses that became likelier": float((after > before).sum()),
            "responses that became less likely": float((after < before).sum()),
            "change of the loss if both log-probs fall by 5, without a reference": without[1] - without[0],
            "the same with a reference": with_reference[1] - with_reference[0],
        },
        "Probabilities sum to 1, so they cannot all rise or all fall. With or without a reference, the policy enters "
        "the loss only through its gap. So a reference does not stop both responses of a pair from falling.",
    )


# %% [markdown]
# ## E11 to E15


# %%
def e11():
    policy_gap, reference_gap = 1.7, 0.3

    def loss(beta):
        return losses.dpo_loss(policy_gap, 0.0, reference_gap, 0.0, beta).loss.item()

    return Erratum(
        "E11",
        "If the policy's gap is 1.7 and the reference's 0.3, the loss is low.",
        {"policy gap": policy_gap, "reference gap": reference_gap},
        {
            "loss, beta 0.1": loss(0.1),
            "P, beta 0.1": math.exp(-loss(0.1)),
            "loss at the start": losses.dpo_loss(reference_gap, 0.0, reference_gap, 0.0, 0.1).loss.item(),
            "loss, beta 0.5": loss(0.5),
        },
        "beta multiplies the difference of the gaps, 1.4. At beta 0.1 the loss has come less than a tenth of the way "
        "from log 2, where training starts, to 0. Whether a loss is low depends on beta.",
    )


def e12():
    parameters = 7  # thousand million, so bytes per parameter become GB (10^9 bytes)
    trained, frozen = 16, 2  # mixed-precision Adam: weight and gradient 2 + 2, master weight and moments 4 + 4 + 4
    return Erratum(
        "E12",
        "For 7B parameters PPO takes 56 GB and DPO takes 28, half as much.",
        {"PPO, GB": 56, "DPO, GB": 28},
        {
            "weights alone, four models": parameters * 2 * 4,
            "weights alone, two models": parameters * 2 * 2,
            "PPO, a critic of its own": parameters * (2 * trained + 2 * frozen),
            "PPO, critic head": parameters * (trained + 2 * frozen),
            "DPO": parameters * (trained + frozen),
            "DPO, cached reference": parameters * trained,
        },
        "The usual figures count weights, 2 bytes each, and nothing else. Under mixed-precision Adam a trained "
        "parameter takes 16 bytes and a frozen one 2. Activations come on top.",
    )


def e13():
    rng = np.random.default_rng(0)
    reward, ref_logp = rng.uniform(-3, 3, 6), ops.log_softmax(rng.normal(size=6)).data
    wins = exact.preference_probabilities(reward) * (1 - np.eye(6))  # any scalar reward labels pairs
    fitted, _ = exact.fitted_rewards(wins)
    dpo_policy = ops.log_softmax(ref_logp + fitted).data  # at beta 1
    star, _ = exact.optimum(ref_logp, reward, 1.0)
    # a label that says "w with probability 0.7" is label_smoothing 0.3
    z = root(lambda z: float(losses.dpo_gradient(z / BETA, 0.0, 0.0, 0.0, BETA, label_smoothing=0.3)[0]), -5.0, 5.0)
    rankings = itertools.permutations(range(3))
    log_ratio = Tensor(0.0, requires_grad=True)  # of a single response, marked as good
    (-ops.logsigmoid(BETA * log_ratio)).backward()
    return Erratum(
        "E13",
        "DPO learns only from pairs, so arbitrary rewards need PPO.",
        {},
        {
            "distance (TV) of the DPO fit on pairs labelled by an arbitrary reward from the RLHF optimum": float(
                exact.total_variation(dpo_policy, star)
            ),
            "z that a soft label of 0.7 asks for": z,
            "sum of the probabilities of all rankings of three (Plackett-Luce)": sum(
                math.exp(exact.plackett_luce(reward[:3], ranking)) for ranking in rankings
            ),
            "slope of -log sigma(beta log_ratio) for a single response marked good, log_ratio 0": float(log_ratio.grad),
        },
        "Any scalar reward can label pairs. Soft labels take probabilities, and Plackett-Luce takes whole rankings. "
        "KTO and BCO, relatives of DPO, take single responses marked good or bad.",
    )


def e14():
    rng = np.random.default_rng(0)
    reward, ref_logp = rng.normal(size=6), ops.log_softmax(2 * rng.normal(size=6)).data
    anchored, _ = exact.optimum(ref_logp, reward, 1.0)
    free, _ = exact.optimum(np.full(6, -math.log(6)), reward, 1.0)
    return Erratum(
        "E14",
        "Without the reference the loss is undefined.",
        {},
        {
            "loss without a reference, log-probs -10 and -15, beta 0.1": losses.reference_free_loss(
                -10.0, -15.0, BETA
            ).loss.item(),
            "DPO loss, reference -20 and -20": losses.dpo_loss(-10.0, -15.0, -20.0, -20.0, BETA).loss.item(),
            "distance (TV) of the two optima on six responses, beta 1": float(exact.total_variation(anchored, free)),
        },
        "It is defined: it is DPO with a reference that finds both responses equally likely. SimPO, ORPO and CPO have "
        "no reference either. What is lost is the link to the KL-constrained objective. Whether the reference anchors "
        "anything before the optimum is another question: E27.",
    )


def e15():
    def margin_after(steps, beta):  # one pair, label certain, plain gradient descent on the two log-probs
        margin = 0.0
        for _ in range(steps):
            gradient_w, gradient_l = losses.dpo_gradient(margin, 0.0, 0.0, 0.0, beta)
            margin -= gradient_w - gradient_l
        return float(margin)

    chain = np.diag([1.0, 1.0], k=1)  # 0 preferred to 1, 1 to 2
    cycle = np.roll(np.eye(3), 1, axis=1)  # and 2 to 0
    winners, losers = np.array([0, 1, 2]), np.array([1, 2, 0])
    params = {"logits": Tensor(np.array([1.0, 0.0, -2.0]), requires_grad=True)}
    optimizer, uniform = optim.SGD(params, 2.0), np.full(3, -math.log(3))
    for _ in range(200):
        logp = ops.log_softmax(params["logits"])
        out = losses.dpo_loss(logp[winners], logp[losers], uniform[winners], uniform[losers], beta=1.0)
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
    rng = np.random.default_rng(0)
    reward, ref_logp = rng.normal(size=6), ops.log_softmax(rng.normal(size=6)).data
    fitted, _ = exact.fitted_rewards(exact.preference_probabilities(reward) * (1 - np.eye(6)))
    star, _ = exact.optimum(ref_logp, reward, 1.0)
    return Erratum(
        "E15",
        "DPO is equivalent to RLHF and not an approximation.",
        {},
        {
            "distance (TV) of the DPO minimiser from the RLHF optimum, exact Bradley-Terry labels, beta 1": float(
                exact.total_variation(ops.log_softmax(ref_logp + fitted).data, star)
            ),
            **{f"certain label, beta 1: margin after {n} steps": margin_after(n, 1.0) for n in (100, 1000, 10000)},
            **{f"certain label, beta 0.1: margin after {n} steps": margin_after(n, 0.1) for n in (1000, 10000)},
            "a chain of three responses, two labels, has a finite minimiser (1 yes, 0 no)": float(
                exact.has_maximum(chain)
            ),
            "a cycle of three has one": float(exact.has_maximum(cycle)),
            "two such cycles that no label links have one": float(exact.has_maximum(np.kron(np.eye(2), cycle))),
            "cycle: largest margin after 200 steps": float(abs(out.margin.data).max()),
            "cycle: loss there": out.loss.item(),
        },
        "It holds at the population optimum, with Bradley-Terry labels, full support and a free policy class. With "
        "deterministic labels of a reward without ties the margin grows for ever, whatever beta (Azar et al., arXiv "
        "2310.12036). Draw an arrow from each response to those that it was preferred to: a finite minimiser exists "
        "exactly if every arrow has a way back along arrows (Ford 1957). It is unique up to a constant for each part "
        "of the responses that labels link.",
    )


# %% [markdown]
# ## E16 to E20


# %%
def e16():
    rng = np.random.default_rng(0)
    ref_logp, logp = (ops.log_softmax(rng.normal(size=8)).data for _ in range(2))
    mean_ratio = float((np.exp(ref_logp) * (logp - ref_logp)).sum())
    run = no_never_yes.three_words(steps=200)  # a model of two numbers, trained on "no" over "never"
    change = run.path[-1] - run.path[0]
    gradient_w, gradient_l = losses.dpo_gradient(-10.0, -15.0, -12.0, -14.0, BETA)
    return Erratum(
        "E16",
        "Training makes the chosen response likelier and the rejected one less likely.",
        {},
        {
            "dL/dlogp_w": float(gradient_w),
            "dL/dlogp_l": float(gradient_l),
            "three words: change of logp(chosen)": float(change[no_never_yes.CHOSEN]),
            "of logp(rejected)": float(change[no_never_yes.REJECTED]),
            "of the margin": float(change[no_never_yes.CHOSEN] - change[no_never_yes.REJECTED]),
            "mean of log(pi/pi_ref) over pi_ref, a random policy": mean_ratio,
            "the same plus KL(pi_ref || pi)": mean_ratio + float(exact.kl(ref_logp, logp)),
        },
        "The gradient with respect to the two log-probs has those signs. But the two share parameters, so both can "
        "fall while the margin grows, and often do. Over the reference's samples the mean log-ratio is "
        "-KL(pi_ref || pi), which is never above 0.",
    )


def e17():
    rng = np.random.default_rng(0)
    states, to_hidden, to_logits = rng.normal(size=(3, 4)), rng.normal(size=(4, 6)), rng.normal(size=(6, 5))
    response = np.array([2, 4, 0])

    def logp(mask):  # of three tokens, one per row of states; policy and reference have the same weights
        hidden = np.tanh(states @ to_hidden) * mask  # (3, 4) -> (3, 6)
        return ops.gather(ops.log_softmax(hidden @ to_logits), response).data.sum()  # (3, 6) -> (3, 5) -> (3,) -> ()

    def reward(mask):
        return losses.dpo_loss(logp(mask), -5.0, logp(np.ones((3, 6))), -5.0, BETA).reward_w.item()

    keep = 0.9
    rewards = np.array([reward((rng.random((3, 6)) < keep) / keep) for _ in range(500)])
    return Erratum(
        "E17",
        "A frozen copy of the policy is a perfect anchor.",
        {"reward at step 0": 0},
        {
            "reward at step 0, no dropout": reward(np.ones((3, 6))),
            "share of 500 dropout masks (rate 0.1) whose reward is not 0": float((rewards != 0).mean()),
            "mean size of the reward under them": float(abs(rewards).mean()),
        },
        "Equal parameters give equal log-probs only if the function is the same. Dropout makes the policy a different "
        "function at every step, so the rewards are not 0 at step 0.",
    )


def e18():
    params = tiny_model(0)

    def total(score):
        return exact.total_probability(partial(score, params, CONFIG, PROMPT), CONFIG.vocab_size, 3)

    # one batch of two prompts, 3 and 2 tokens long, padded with id 0 and sliced at the longer prompt, without a mask
    prompts, responses = ([1, 2, 3], [4, 1]), ([2, 4, 0], [3, 2, 0])
    texts = [[*x, *y] + [0] * (3 - len(x)) for x, y in zip(prompts, responses)]
    tokens = np.array(texts)  # (2, 6)
    logp = ops.log_softmax(model.forward(params, CONFIG, tokens[:, :-1])[:, 2:])  # (2, 5, V) -> (2, 3, V)
    naive = ops.sum(ops.gather(logp, tokens[:, 3:]), axis=-1).data  # (2, 3, V) -> (2, 3) -> (2,)
    alone = [sequence_logp(params, y, x).item() for x, y in zip(prompts, responses)]
    with_mask, _ = scoring.padded_logprobs(params, CONFIG, [(x, y, y) for x, y in zip(prompts, responses)])
    return Erratum(
        "E18",
        "Concatenate, slice, gather and sum: that is a robust scorer.",
        {},
        {
            "sum over all responses of exp(score): one text, every token scored": total(mutants.correct),
            "a pad scored": total(mutants.pads_scored),
            "end-of-text not scored": total(mutants.end_of_text_masked),
            "two prompt lengths, sliced at one: row 1 off by (nats)": float(naive[0] - alone[0]),
            "row 2 off by": float(naive[1] - alone[1]),
            "with a mask and the length of each prompt: off by": float(abs(with_mask.data - alone).max()),
        },
        "It is correct for one text, or for texts of the same shape. A batch also needs a mask for the padding and the "
        "prompt length of each row. And the end-of-text token must be scored, or the score is not log pi(y|x).",
    )


def e19():
    policy = tiny_model(0)
    pairs = [(PROMPT, CHOSEN, REJECTED), ([4], [1, 1, 0], [3, 0]), ([2, 2], [0], [4, 0])]
    batch = collate(pairs, *training.reference_logprobs(model.frozen(policy), CONFIG, pairs))
    metrics = training.preference_evaluation(policy, CONFIG, batch, BETA)
    return Erratum(
        "E19",
        "The reward accuracy is 0 at the start, so something is broken.",
        {"accuracy": 0},
        {
            "accuracy": metrics["rewards/accuracies"],
            "share of ties": metrics["rewards/ties"],
            "loss": metrics["loss"],
        },
        "While policy = reference all rewards are 0, so every pair is a tie, and a strict > counts a tie as wrong.",
    )


def e20():
    text = "An algorithm for aligning language models"
    return Erratum(
        "E20",
        f'"{text}" is 7 tokens at log 0.9 = -0.105 each.',
        {"tokens": 7, "sum": -0.735},
        {"words": len(text.split()), "7 log 0.9": 7 * ops.log(0.9).item()},
        "It has six words; how many tokens that is depends on the tokenizer. And log 0.9 was rounded before it was "
        "multiplied by 7, so the rounding error counts seven times.",
    )


# %% [markdown]
# ## E21 to E25


# %%
def e21():
    # these log-ratios give the claim's rewards at beta 0.1
    out = losses.dpo_loss(0.015, -0.010, 0.0, 0.0, BETA)
    start = losses.dpo_loss(-10.0, -15.0, -10.0, -15.0, BETA)
    return Erratum(
        "E21",
        "Rewards of +0.0015 and -0.0010 show that the reference has fixed the problem.",
        {"reward_w": 0.0015, "reward_l": -0.0010},
        {
            "reward_w": out.reward_w.item(),
            "reward_l": out.reward_l.item(),
            "P": math.exp(-out.loss.item()),
            "loss": out.loss.item(),
            "reward_w at the start": start.reward_w.item(),
            "reward_l at the start": start.reward_l.item(),
        },
        "A difference of 0.0025 between the rewards is a preference of 50.06 per cent: next to nothing. And where DPO "
        "starts, at policy = reference, both rewards are exactly 0.",
    )


def e22():
    return Erratum(
        "E22",
        "The loss is high if the policy does not prefer the chosen response more strongly than the reference does.",
        {},
        {
            "loss, policy gap 2, reference gap 2": losses.dpo_loss(-10.0, -12.0, -11.0, -13.0, BETA).loss.item(),
            "loss, policy gap 2, reference gap 42": losses.dpo_loss(-10.0, -12.0, -11.0, -53.0, BETA).loss.item(),
            "loss, policy gap 42, reference gap 2": losses.dpo_loss(-10.0, -52.0, -11.0, -13.0, BETA).loss.item(),
        },
        "Equal gaps give log 2. The loss is above log 2 only if the policy's gap is smaller than the reference's.",
    )


def e23():
    policy = tiny_model(0)
    ref_logp_w, ref_logp_l = (sequence_logp(model.frozen(policy), y).data for y in (CHOSEN, REJECTED))
    out = losses.dpo_loss(sequence_logp(policy, CHOSEN), sequence_logp(policy, REJECTED), ref_logp_w, ref_logp_l, BETA)
    gradient = flat_gradient(out.loss, policy)
    gradient_w, gradient_l = (flat_gradient(ops.sum(sequence_logp(policy, y)), policy) for y in (CHOSEN, REJECTED))
    predicted = -BETA / 2 * (gradient_w - gradient_l)
    return Erratum(
        "E23",
        "While policy = reference the loss should be 0, and the gradient too.",
        {"loss": 0, "length of the gradient": 0},
        {
            "loss": out.loss.item(),
            "length of the gradient": float(np.linalg.norm(gradient)),
            "off from -(beta/2)(grad logp_w - grad logp_l) by": float(abs(gradient - predicted).max()),
        },
        "The margin is 0, so the loss is -log sigma(0) = log 2, and its slope with respect to the margin is "
        "-beta sigma(0) = -beta/2.",
    )


def loss_and_gradient(parts, mean):
    """DPO's loss and gradient on the pair, as one vector. `parts` splits a text into context and scored rest."""
    policy, reference = tiny_model(0), model.frozen(tiny_model(1))

    def logp(params, response):
        context, rest = parts(PROMPT, response)
        return sequence_logp(params, rest, context) * (1 / len(rest) if mean else 1.0)

    logps = [logp(params, y) for params in (policy, reference) for y in (CHOSEN, REJECTED)]
    loss = losses.dpo_loss(*logps, beta=BETA).loss
    return np.concatenate([[loss.item()], flat_gradient(loss, policy)])


def response_scored(x, y):
    return x, y


def shared_token_not_scored(x, y):  # both responses start with the same token
    return x + y[:1], y[1:]


def prompt_scored(x, y):  # except its first token, which nothing predicts
    return x[:1], x[1:] + y


def change(parts, mean):
    """The largest change in loss or gradient when `parts` replaces scoring the response alone."""
    return float(abs(loss_and_gradient(parts, mean) - loss_and_gradient(response_scored, mean)).max())


def e24():
    sums, means = (loss_and_gradient(response_scored, mean) for mean in (False, True))
    return Erratum(
        "E24",
        "A response's log-prob is the average over its tokens.",
        {},
        {
            "loss with sums": float(sums[0]),
            "loss with means": float(means[0]),
            "cosine of the two gradients": cosine(sums[1:], means[1:]),
            "a shared first token not scored: change of loss and gradient, sums": change(
                shared_token_not_scored, False
            ),
            "the same, means": change(shared_token_not_scored, True),
        },
        "DPO sums, because log pi(y|x) is a sum. Averaging is another objective, and its gradient has another "
        "direction. It also divides what the two responses share by two different lengths, so this no longer cancels.",
    )


def e25():
    return Erratum(
        "E25",
        "The prompt must be masked, or DPO learns the prompt.",
        {},
        {
            "prompt scored too: change of loss and gradient, sums": change(prompt_scored, False),
            "the same, means": change(prompt_scored, True),
        },
        "With sums the prompt's log-prob is in both terms of the margin and cancels exactly, masked or not. With "
        "means it is divided by two different lengths and does not cancel.",
    )


# %% [markdown]
# ## E26 to E29: the usual story, on the support desk, whose true reward is known


# %%
def measured(name):
    """What a benchmark wrote."""
    here = Path(globals().get("__file__", "notebook")).resolve().parent  # a notebook's folder
    path = here.parent / "benchmarks" / "results" / f"{name}.json"
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing: run this script in the repository's folder tutorials")
    return json.loads(path.read_text())


def e26():
    x, beta = "my order is late.", 0.2
    replies = world.desk(world.PROMPTS[x])
    ref_logp, reward = np.log(list(replies.values())), np.array([world.judgement(x, y).reward for y in replies])
    star, _ = exact.optimum(ref_logp, reward.astype(float), beta)
    best = np.flatnonzero(reward == reward.max())
    odds = star[best] - ref_logp[best]
    return Erratum(
        "E26",
        "To each prompt there is one perfect answer, and preferences lead to it.",
        {},
        {
            "replies of the desk to one request": len(replies),
            "replies with the highest reward": len(best),
            "pi* at beta 0.2: probability of these together": float(np.exp(star[best]).sum()),
            "of the likeliest alone": float(np.exp(star.max())),
            "replies that are as many as pi* is spread over, e^entropy": math.exp(world.entropy(np.exp(star))),
            "largest change of the odds between two of the best, pi* against pi_ref, nats": float(np.ptp(odds)),
        },
        "Often many answers are equally good. pi* = pi_ref exp(r/beta)/Z gives them all the same factor, so among them "
        "the reference decides, whatever beta; and a smaller beta only leaves the other replies behind.",
    )


def e27():
    story = measured("story")

    def well_formed(name, which="last"):
        return statistics.fmean(row[which]["well_formed"] for row in story["runs"] if row["run"] == name)

    return Erratum(
        "E27",
        "The reference prevents collapse.",
        {},
        {
            "share of well-formed replies, SFT": statistics.fmean(row["well_formed"] for row in story["sft"].values()),
            "DPO at beta 0.1, after 200 steps": well_formed("beta 0.1"),
            "DPO without a reference": well_formed("no reference"),
            "DPO with the reference, where validation would stop": well_formed("beta 0.1", "best"),
            "DPO with the reference, beta 1": well_formed("beta 1"),
            "DPO with the reference, beta 0.1, and an NLL term": well_formed("beta 0.1 nll"),
        },
        "At beta 0.1 and the demo's learning rate replies fall apart with a reference as they do without one, as far "
        "as three seeds can tell. The reference enters the loss as two numbers for each pair, and nothing holds the "
        "probability of all other texts. Validation does not stop it either: the held-out loss still falls. What helps "
        "is a larger beta, fewer or smaller steps, or a likelihood term.",
    )


def e28():
    ref_logp, reward, beta = np.log([0.5, 0.3, 0.2]), np.array([1.0, 0.0, -2.0]), 0.1

    def loss_and_objective(p):
        logp = np.log(p)
        loss = losses.dpo_loss(logp[0], logp[1], ref_logp[0], ref_logp[1], beta).loss.item()
        return loss, float(exact.kl(logp, ref_logp)), float(exact.objective(logp, ref_logp, reward, beta))

    near, far = loss_and_objective([0.6, 0.2, 0.2]), loss_and_objective([0.006, 0.002, 0.992])
    return Erratum(
        "E28",
        "beta is the weight of a KL penalty in DPO as in PPO.",
        {},
        {
            "DPO loss of a pair, policy .6, .2 and .2 for a third reply": near[0],
            "the same, policy .006, .002 and .992 for the third": far[0],
            "KL to the reference, first policy": near[1],
            "KL to the reference, second policy": far[1],
            "objective of RLHF, E[r] - beta KL, first policy": near[2],
            "objective of RLHF, second policy": far[2],
        },
        "PPO measures the KL on its own samples, so a reply that nobody asked for costs as soon as it becomes likely. "
        "The DPO loss sees the two replies of a pair and nothing else: where the rest of the probability goes costs "
        "nothing. The two betas agree at the optimum, where pairs cover every reply.",
    )


def e29():
    story, ppo = measured("story"), measured("ppo")
    sft = {int(seed): row["reward"] for seed, row in story["sft"].items()}
    runs = [row for row in story["runs"] if row["run"].startswith("beta") and not row["run"].endswith("nll")]

    def below(which):
        return sum(row[which]["reward"] < sft[row["seed"]] for row in runs)

    def spread(name):
        return statistics.stdev(run["rows"][-1]["reward"] for run in ppo["runs"] if run["name"] == name)

    return Erratum(
        "E29",
        "DPO is stable where PPO is not.",
        {},
        {
            "runs of DPO, five betas and three seeds": len(runs),
            "those that end below their SFT model in true reward": below("last"),
            "those that are below it where validation would stop": below("best"),
            "standard deviation of the true reward over seeds, DPO": spread("DPO"),
            "DPO with an NLL term": spread("DPO and 2 NLL"),
            "PPO with a learned reward": spread("PPO, learned reward"),
            "PPO with the true reward": spread("PPO, true reward"),
            "PPO with a learned reward, beta 0.02": spread("PPO, learned reward, beta 0.02"),
        },
        "Not on the desk. At a small beta DPO alone ends below its start, and at beta 0.2 its seeds end farther apart "
        "than PPO's. PPO samples from the policy, so a reply that falls apart is judged. That helps as far as the "
        "reward knows better: at beta 0.02 a learned one does not, and PPO's seeds scatter, too. A larger beta or an "
        "NLL term steadies DPO, and PPO takes longer.",
    )


# %% [markdown]
# ## All of them

# %%
ERRATA: list[Callable[[], Erratum]] = [
    *(e1, e2, e3, e4, e5, e6, e7, e8, e9, e10, e11, e12, e13),
    *(e14, e15, e16, e17, e18, e19, e20, e21, e22, e23, e24, e25, e26, e27, e28, e29),
]


def as_text(erratum: Erratum) -> str:
    def numbers(values: dict[str, float]) -> str:
        # the last bits differ from machine to machine, so a number that is 0 up to rounding is printed as 0
        rounded = {name: value if abs(value) > 1e-12 else 0 for name, value in values.items()}
        return "; ".join(f"{name}: {value:.5g}" for name, value in rounded.items()) or "no number"

    fill = partial(textwrap.fill, width=110, break_on_hyphens=False)
    lines = {"given": numbers(erratum.given), "computed": numbers(erratum.computed), "why": erratum.why}
    return "\n".join(
        [fill(f"{erratum.id:<5}{erratum.claim}", subsequent_indent=" " * 5)]
        + [fill(f"     {name:<10}{line}", subsequent_indent=" " * 15) for name, line in lines.items()]
    )


def main() -> None:
    for erratum in ERRATA:
        print(as_text(erratum()), end="\n\n")


if __name__ == "__main__":
    main()
