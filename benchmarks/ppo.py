"""PPO beside DPO on the desk: true reward and KL against steps, texts and CPU seconds; four models' memory and two's.

    python -m benchmarks.ppo

starts from the demo's SFT model of each seed. PPO samples 64 texts a step and takes four steps on them; its reward is
the true one, or a reward model's that was trained on the pairs of DPO. DPO reads 32 pairs a step, also 64 texts. All
are judged on test prompts, which chose nothing. It prints a table and writes benchmarks/results/ppo.json. After an
interruption, run it again with the same folder and it continues with the runs that are missing.
"""

import itertools
import json
import time
import tracemalloc
from collections import defaultdict
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from benchmarks.defaults import arguments, one_seed
from benchmarks.family import interval
from minidpo import Tensor, checkpoint, exact, model, optim, training, world
from minidpo.audit import replies
from minidpo.cli import desk
from minidpo.data.preferences import collate
from minidpo.run import safetensors
from minidpo.run.checkpoint import Checkpoint
from minidpo.run.files import write_whole
from minidpo.run.folder import RESULT
from minidpo.run.tasks import results
from minidpo.streams import stream
from minidpo.theory import ppo
from minidpo.tokenizer import END_OF_TEXT, TURN
from minidpo.training import batch_indices

RESULTS = Path(__file__).parent / "results" / "ppo.json"
REWARD = "reward.safetensors"
TEXTS = 64  # a step: sampled by PPO, two for each pair of DPO


class Run(NamedTuple):
    """How one policy is trained."""

    reward: str  # "true" or "learned"; "pairs" for DPO
    beta: float
    critic: str = ""  # "own trunk" or "head"
    nll_weight: float = 0.0


RUNS = {
    "PPO, true reward": Run("true", 0.2, "own trunk"),
    "PPO, learned reward": Run("learned", 0.2, "own trunk"),
    "PPO, learned reward, critic a head": Run("learned", 0.2, "head"),
    "PPO, learned reward, beta 0.02": Run("learned", 0.02, "own trunk"),
    "DPO": Run("pairs", 0.2),
    "DPO and 2 NLL": Run("pairs", 0.2, nll_weight=2.0),
}


class Sizes(NamedTuple):
    """How long everything is trained, and how often it is judged."""

    steps: int = 120
    every: int = 12
    prompts: int = 200
    reward_steps: int = 375  # of the reward model, on 32 pairs each: twice through them
    rate: float = 2e-4  # of PPO
    dpo_rate: float = 3e-4  # the demo's


SIZES = Sizes()
ROLES = ("policy", "critic", "reward model", "reference")


def rates(steps, peak):
    """A cosine schedule after ten steps of warm-up."""
    return [optim.warmup_cosine(step, steps, peak, 10) for step in range(steps)]


def read_pairs(path, tokenizer):
    """The pairs of a file, as ids."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    ids = ([tokenizer.encode(row[name]) for name in ("prompt", "chosen", "rejected")] for row in rows)
    return [([END_OF_TEXT, *x], [*w, END_OF_TEXT], [*l, END_OF_TEXT]) for x, w, l in ids]


def true_rewards(tokenizer, examples):
    """The true reward of each text."""
    texts = ((tokenizer.decode(x[1:]).removesuffix(TURN), tokenizer.decode(y)) for x, y in examples)
    return np.array([world.judgement(x, y).reward for x, y in texts], dtype="float32")


def learned_rewards(params, config, examples):
    """The rewards that a reward model gives texts."""
    return ppo.text_rewards(params, config, examples).data


def reward_model(folder, seed, sizes):
    """Train a reward model from SFT on the pairs, and keep it in a file; how well it ranks the test pairs."""
    sft = checkpoint.load(folder / "sft")
    pairs, test = (read_pairs(folder / "data" / name, sft.tokenizer) for name in ("pairs.jsonl", "pairs_test.jsonl"))
    params = ppo.with_head(sft.params)
    optimizer = optim.AdamW(params, 0.0, betas=(0.9, 0.99), weight_decay=0.0)
    for step, optimizer.learning_rate in enumerate(rates(sizes.reward_steps, 5e-4)):
        batch = [pairs[i] for i in batch_indices(len(pairs), TEXTS // 2, step, seed)]
        ppo.reward_training_step(params, sft.config, optimizer, batch)
    params = model.frozen(params)
    chosen, rejected = ([(pair[0], pair[side]) for pair in test] for side in (1, 2))
    w, l = (learned_rewards(params, sft.config, examples) for examples in (chosen, rejected))
    true_w, true_l = (true_rewards(sft.tokenizer, examples) for examples in (chosen, rejected))
    facts = {
        "accuracy": float((w > l).mean()),
        "accuracy of the true reward": float(((true_w > true_l) + (true_w == true_l) / 2).mean()),
        "correlation with the true reward": float(np.corrcoef([*w, *l], [*true_w, *true_l])[0, 1]),
    }
    arrays = {name: p.data for name, p in params.items()}
    write_whole(folder / REWARD, safetensors.to_bytes(arrays, {"facts": json.dumps(facts)}))


def read_reward_model(folder):
    """The parameters of the reward model, and how well it ranks the test pairs."""
    arrays, metadata, _ = safetensors.read(folder / REWARD)
    return {name: Tensor(x) for name, x in arrays.items()}, json.loads(metadata["facts"])


def trained(folder, seed, run, sizes):
    """Train one policy; a row each time that it is judged."""
    sft = checkpoint.load(folder / "sft")
    config, tokenizer = sft.config, sft.tokenizer
    reward_params, _ = read_reward_model(folder)
    pairs = read_pairs(folder / "data" / "pairs.jsonl", tokenizer)
    policy = checkpoint.load(folder / "sft", requires_grad=True).params
    prompts = desk.test_prompts(seed, sizes.prompts)
    rows, spent = [], 0.0

    def judge(step):
        own = replies.judged(Checkpoint(policy, config, tokenizer, True), sft, prompts, seed)
        ids = ([END_OF_TEXT, *tokenizer.encode(x + TURN)] for x in prompts)
        texts = zip(ids, own.replies, own.lengths)
        examples = [
            (x, [*tokenizer.encode(y), END_OF_TEXT][: min(n, config.n_positions - len(x))]) for x, y, n in texts
        ]
        learned = learned_rewards(reward_params, config, examples)
        figures = replies.figures(own, own, prompts)["all"]
        means = {name: figures[name].value for name in ("reward", "kl", "garbled", "length")}
        rows.append({"step": step, "texts": TEXTS * step, "seconds": spent, **means, "learned": float(learned.mean())})

    judge(0)
    steps = dpo_steps(policy, sft, pairs, seed, run, sizes) if run.reward == "pairs" else ppo_steps(
        policy, sft, [x for x, _, _ in pairs], reward_params, seed, run, sizes
    )  # fmt: skip
    started = time.process_time()
    for step, _ in enumerate(steps, start=1):
        if step % sizes.every == 0 or step == sizes.steps:
            spent += time.process_time() - started
            judge(step)
            started = time.process_time()
    return rows


def ppo_steps(policy, sft, prompts, reward_params, seed, run, sizes):
    """PPO, step by step, on the prompts of the pairs."""
    if run.reward == "true":
        reward = partial(true_rewards, sft.tokenizer)
    else:
        reward = partial(learned_rewards, reward_params, sft.config)
    critic = ppo.head(policy) if run.critic == "head" else ppo.with_head(policy)
    batches = (batch_indices(len(prompts), TEXTS, step, seed) for step in itertools.count())
    asked = ([prompts[i] for i in batch] for batch in batches)
    most = sft.config.n_positions - max(map(len, prompts))  # so that the reward model can read the whole text
    settings = ppo.Settings(beta=run.beta)
    rng, schedule = stream(seed, "ppo"), rates(sizes.steps, sizes.rate)
    return ppo.ppo(policy, critic, model.frozen(sft.params), reward, sft.config, asked, rng, most, schedule, settings)


def dpo_steps(policy, sft, pairs, seed, run, sizes):
    """DPO, step by step; the reference scores each batch as it comes."""
    optimizer = optim.AdamW(policy, 0.0, betas=(0.9, 0.99), weight_decay=0.0)
    for step, optimizer.learning_rate in enumerate(rates(sizes.steps, sizes.dpo_rate)):
        batch = collate([pairs[i] for i in batch_indices(len(pairs), TEXTS // 2, step, seed)])
        settings = {"beta": run.beta, "nll_weight": run.nll_weight, "max_norm": 1.0}
        yield training.dpo_training_step(policy, sft.params, sft.config, optimizer, batch, **settings)


# ---- memory -----------------------------------------------------------------------------------------------


def held(params, optimizer=None, prefix=""):
    """Bytes that are kept for a model between two steps: of weights, gradients and the optimizer's moments."""
    moments = [optimizer.state.get(prefix + name, {}) for name in params] if optimizer else []
    return {
        "weights": sum(p.data.nbytes for p in params.values()),
        "gradients": sum(p.grad.nbytes for p in params.values() if p.grad is not None),
        "moments": sum(x.nbytes for state in moments for x in state.values() if isinstance(x, np.ndarray)),
    }


def peak(function):
    """The most bytes that a call had allocated at once, beyond what there was before."""
    tracemalloc.start()
    try:
        function()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def memory(folder):
    """Bytes by role after two steps on 64 texts, and the most that the second step had allocated besides."""
    sft = checkpoint.load(folder / "sft")
    config, rng = sft.config, stream(0, "memory")
    pairs = read_pairs(folder / "data" / "pairs.jsonl", sft.tokenizer)[: TEXTS // 2]
    reward_params, _ = read_reward_model(folder)
    document = {"parameters": sum(p.data.size for p in sft.params.values())}
    for critic_kind in ("own trunk", "head"):
        policy = checkpoint.load(folder / "sft", requires_grad=True).params
        critic = ppo.head(policy) if critic_kind == "head" else ppo.with_head(policy)
        optimizer = optim.AdamW(ppo.trainable(policy, critic), 1e-5)
        prompts, most = [x for x, _, _ in pairs] * 2, config.n_positions - max(len(x) for x, _, _ in pairs)
        asked = policy, critic, sft.params, partial(learned_rewards, reward_params, config), config, prompts, rng, most
        seen = ppo.rollout(*asked)
        ppo.ppo_training_step(policy, critic, config, optimizer, seen)
        parts = {
            "sampling and scoring": peak(lambda asked=asked: ppo.rollout(*asked)),
            "update": peak(lambda p=policy, c=critic, o=optimizer, r=seen: ppo.ppo_training_step(p, c, config, o, r)),
        }
        roles = {"policy": held(policy, optimizer), "critic": held(critic, optimizer, "critic.")}
        roles |= {"reward model": held(reward_params), "reference": held(sft.params)}
        document[f"PPO, critic {critic_kind}"] = {"held": roles, "peak": parts}
    policy = checkpoint.load(folder / "sft", requires_grad=True).params
    optimizer, batch = optim.AdamW(policy, 1e-5), collate(pairs)

    def step():
        scored = training.with_reference(batch, sft.params, config, policy)
        whole = {"micro_batch_size": len(pairs)}  # in one piece, as PPO's
        training.dpo_training_step(policy, {}, config, optimizer, scored, **whole)

    step()
    roles = {"policy": held(policy, optimizer), "reference": held(sft.params)}
    document["DPO"] = {"held": roles, "peak": {"scoring and update": peak(step)}}
    scored, whole = training.with_reference(batch, sft.params, config, policy), {"micro_batch_size": len(pairs)}
    alone = peak(lambda: training.dpo_training_step(policy, {}, config, optimizer, scored, **whole))
    document["DPO, reference scored before"] = {"held": {"policy": roles["policy"]}, "peak": {"update": alone}}
    return document


# ---- all of it --------------------------------------------------------------------------------------------


def optima(seed, betas):
    """KL and true reward of pi*(beta) on the test prompts, exact, were the reference the desk itself."""
    asked = defaultdict(float)  # the probability of each request; its replies do not depend on its wording
    for x, p in world.prompt_distribution(world.split(seed)[2]).items():
        asked[world.PROMPTS[x]] += p
    rows = [{"beta": beta, "kl": 0.0, "reward": 0.0} for beta in betas]
    for request, p in asked.items():
        x = next(x for x, each in world.PROMPTS.items() if each == request)
        replies = world.desk(request)
        ref_logp, reward = np.log(list(replies.values())), np.array([world.judgement(x, y).reward for y in replies])
        for row in rows:
            star, _ = exact.optimum(ref_logp, reward, row["beta"])
            row["kl"] += p * float(exact.kl(star, ref_logp))
            row["reward"] += p * float(np.exp(star) @ reward)
    return rows


def one_base(folder, seed, sizes):
    """Make the data, the SFT model and the reward model of a seed, if they are not there."""
    if not (folder / "sft" / RESULT).exists():
        one_seed(folder, seed)
    if not (folder / REWARD).exists():
        reward_model(folder, seed, sizes)
    return read_reward_model(folder)[1]


def run(folder, seeds, sizes=SIZES, names=tuple(RUNS)):
    """All runs that are not in the folder's ppo.json yet; returns all."""
    path, started, own = folder / "ppo.json", time.time(), sizes._asdict()
    document = json.loads(path.read_text()) if path.exists() else {"sizes": own, "runs": []}
    if document["sizes"] != own:
        raise ValueError(f"{path} has runs of the sizes {document['sizes']}, not {own}: choose another folder")
    folders = {seed: folder / f"seed{seed}" for seed in seeds}
    bases = [partial(one_base, folders[seed], seed, sizes) for seed in seeds]
    document["reward models"] = list(results(bases, "SFT and reward models"))
    document["memory"] = memory(folders[seeds[0]])
    document["optima"] = optima(seeds[0], [round(0.02 * 1.25**k, 4) for k in range(30)])
    keys = [{"seed": seed, "name": name} for name, seed in itertools.product(names, seeds)]
    missing = [key for key in keys if not any(key.items() <= row.items() for row in document["runs"])]
    tasks = [partial(trained, folders[key["seed"]], key["seed"], RUNS[key["name"]], sizes) for key in missing]
    for done, (key, rows) in enumerate(zip(missing, results(tasks, "PPO and DPO")), start=1):
        document["runs"].append({**key, **RUNS[key["name"]]._asdict(), "rows": rows})
        write_whole(path, (json.dumps(document, indent=1) + "\n").encode())
        reward, kl, seconds = (rows[-1][column] for column in ("reward", "kl", "seconds"))
        minutes = (time.time() - started) / 60
        print(f"{done} of {len(missing)} after {minutes:.0f} min: {key['name']}, seed {key['seed']}: "
              f"true reward {reward:.2f}, KL {kl:.2f}, {seconds:.0f} CPU s", flush=True)  # fmt: skip
    return document


def as_table(document):
    """The end of each run, means over the seeds and 95 % intervals."""
    lines = ["| | true reward | KL to SFT | garbled | learned reward | most true reward on the way | texts | CPU s |"]
    lines += ["|---|" + "---:|" * 7]
    for name in dict.fromkeys(run["name"] for run in document["runs"]):
        runs = [run["rows"] for run in document["runs"] if run["name"] == name]
        cells = [interval([rows[-1][column] for rows in runs], 2) for column in ("reward", "kl", "garbled", "learned")]
        cells += [interval([max(row["reward"] for row in rows) for rows in runs], 2), f"{runs[0][-1]['texts']:,}"]
        cells += [interval([rows[-1]["seconds"] for rows in runs], 0)]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def as_memory(document):
    """Bytes by role, a parameter of the policy at a time, and the largest allocations of a step in MiB."""
    lines = [
        f"| | {' | '.join(ROLES)} | together | beside them, in a step |",
        "|---|" + "---:|" * 6,
    ]
    N = document["memory"]["parameters"]
    for name, each in document["memory"].items():
        if name != "parameters":
            sizes = {role: sum(kinds.values()) / N for role, kinds in each["held"].items()}
            cells = [f"{sizes[role]:.1f}" if role in sizes else "" for role in ROLES]
            largest = max(each["peak"].values()) / 2**20
            lines.append(f"| {name} | {' | '.join(cells)} | {sum(sizes.values()):.1f} | {largest:.0f} MiB |")
    return "\n".join(lines)


if __name__ == "__main__":
    options = arguments(__doc__, "ppo", RESULTS).parse_args()
    document = run(options.folder, options.seeds)
    write_whole(options.out, (json.dumps(document, indent=1) + "\n").encode())
    print(as_table(document), as_memory(document), sep="\n\n")
