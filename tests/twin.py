"""What the commands compute, computed on its own: one example at a time by `sequence_logprob`, the derivative of each
loss written out, clipping, AdamW and the schedule in plain NumPy. A command's options are a dict by their names.
"""

import functools
import json
import math
from itertools import zip_longest

import numpy as np

from minidpo import Tensor, checkpoint, model, ops, training, world
from minidpo.model import Config
from minidpo.scoring import sequence_logprob
from minidpo.streams import stream
from minidpo.tokenizer import Tokenizer

LETTERS = "\nabcd"
CONFIG = Config(len(LETTERS) + 1, 16, 8, 1, 2)
ROWS = [("ab\n", "d", "cc"), ("b\n", "abcd", "a"), ("cab\n", "da", "bbb"), ("dd\n", "b", "cda"), ("a\n", "cc", "db"),
        ("bcd\n", "aad", "b"), ("ccc\n", "ddd", "ad"), ("abcdabcdabcdab\n", "cab", "b")]  # fmt: skip
FILES = {  # the last row is too long; a text has one line, or, with --blocks, several
    "pairs": ROWS,
    "more": [("a" + x, w + "a", l) for x, w, l in ROWS],
    "held": [("dab\n", "c", "bd"), ("db\n", "aca", "d")],
    "held_too": [("acd\n", "bb", "d"), ("bb\n", "d", "caa"), ("ca\n", "a", "b")],
    "repeated": [ROWS[0]] * 3 + [(ROWS[0][0], *ROWS[0][:0:-1]), ROWS[1], ROWS[2], (ROWS[2][0], *ROWS[2][:0:-1])],
    "many": [(f"{a}{b}{c}\n", "ab", "dca") for a in "abcd" for b in "abcd" for c in "abcd"],
}
TEXTS = {"pairs": "ab\ncd\n\nbad\ndaca\n\nb\ncabb\n\nad", "more": "dd\nbc\n\nabc\nd\ncab\n\nb", "held": "ca\ndb\n",
         "held_too": "ba\n\nccd\na", "many": "".join(x for x, _, _ in FILES["many"])}  # fmt: skip


def prepared(root):
    """Write the files and four models into a folder; the desk's models give the same replies to any random numbers."""
    for name, rows in FILES.items():
        keyed = (dict(zip(("prompt", "chosen", "rejected"), row)) for row in rows)
        (root / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in keyed))
        (root / f"{name}.txt").write_text(TEXTS.get(name, ""))
    desk = "".join(sorted(set("".join([*world.PROMPTS, *world.REPLIES]) + "\n")))
    for seed, (name, letters) in enumerate(
        {"init": LETTERS, "other": LETTERS, "desk": desk, "desk_other": desk}.items()
    ):
        rng = np.random.default_rng(seed)
        config = CONFIG if letters == LETTERS else Config(len(letters) + 1, 48, 8, 1, 2)
        params = model.init(config, rng, dtype="float64")
        for key, p in params.items():
            p.data = p.data + 0.3 * rng.normal(size=p.shape)
            p.data *= 3e4 if letters == desk and key == "ln_f.weight" else 1
        checkpoint.save(root / name, params, config, Tokenizer(letters))
    return root


def differences(actual, expected, rel, where=""):
    """Where numbers differ from the expected ones; what is not expected is not compared."""
    if actual is None or expected is None or isinstance(expected, str | bool):
        return [] if actual == expected else [f"{where}: {actual} instead of {expected}"]
    if isinstance(expected, dict):
        pairs = [(key, actual.get(key), each) for key, each in expected.items()]
    elif isinstance(expected, list):
        assert isinstance(actual, list)
        pairs = [(i, a, each) for i, (a, each) in enumerate(zip_longest(actual, expected))]
    elif np.shape(actual) != np.shape(expected):
        return [where]
    else:
        close = np.allclose(actual, expected, rtol=rel, atol=rel * 1e-4 if rel < 1e-2 else rel)
        return [] if close else [f"{where}: {actual} instead of {expected}"]
    return [place for key, a, each in pairs for place in differences(a, each, rel, f"{where}/{key}")]


def weights(root, name):
    """The parameters of a model as arrays, and its config."""
    saved = checkpoint.load(root / name)
    return {key: p.data.astype("float64") for key, p in saved.params.items()}, saved.config


def ids(text, letters=LETTERS):
    return [letters.index(c) + 1 for c in text]


def logprobs(params, config, texts):
    """log pi(y|x) of each (x, y), one at a time.  -> (N,)"""
    params = {key: p if isinstance(p, Tensor) else Tensor(p) for key, p in params.items()}
    return ops.concatenate(*[sequence_logprob(params, config, [x], [y]) for x, y in texts])


def reference_scores(root, name, pairs):
    """log pi_ref of the chosen and of the rejected responses of pairs."""
    return [logprobs(*weights(root, name), [(x, ys[i]) for x, *ys in pairs]).data for i in (0, 1)]


def gradient(params, objective):
    """The metrics of an objective of the parameters, and its gradient."""
    leaves = {key: Tensor(p, requires_grad=True) for key, p in params.items()}
    metrics, root = objective(leaves)
    root.backward()
    return metrics, {key: np.zeros(p.shape) if p.grad is None else p.grad for key, p in leaves.items()}


def encoded(name, options, n_positions, letters=LETTERS):
    """The rows of a file as ids with their line numbers, cut or left out as --truncation says."""
    rows = []
    for line, (prompt, *responses) in enumerate(FILES[name], start=1):
        x, ys = [0, *ids(prompt, letters)], [[*ids(y, letters), 0] for y in responses]
        over = len(x) + max(map(len, ys)) - (n_positions + 1)
        if over > 0 and options.get("truncation") == "prompt":
            x = [0, *x[1 + over :]]
        if over > 0 and options.get("truncation") == "response":
            ys = [y[: n_positions + 1 - len(x)] for y in ys]
        if over <= 0 or options.get("truncation"):
            rows.append((line, x, *ys))
    return rows


def likelihood(leaves, config, examples, options):
    """The mean loss of the response tokens, and a sum whose gradient is its gradient."""
    loss = ops.sum(logprobs(leaves, config, examples)) * (-1 / sum(len(y) for _, y in examples))
    return {"loss": loss.item()}, loss


def preference(leaves, config, pairs, options, ref_params):
    """The loss of pairs, and a sum whose gradient is its gradient: the derivatives of the losses are written out."""
    beta, weight = options.get("beta", 0.1), options.get("nll_weight", 0.0)
    e = options.get("label_smoothing", float(options.get("loss_options", "label_smoothing=0").partition("=")[2]))
    logp_w, logp_l = (logprobs(leaves, config, [(x, ys[i]) for x, *ys in pairs]) for i in (0, 1))
    ref_w, ref_l = (logprobs(ref_params, config, [(x, ys[i]) for x, *ys in pairs]).data for i in (0, 1))
    if options.get("loss") == "reference-free":
        ref_w = ref_l = 0.0
    reward_w, reward_l = beta * (logp_w.data - ref_w), beta * (logp_l.data - ref_l)
    z, tokens = reward_w - reward_l, sum(len(w) for _, w, _ in pairs)
    if options.get("loss") == "ipo":
        loss, slope = np.mean((z / beta - 0.5 / beta) ** 2), 2 * (z / beta - 0.5 / beta)
    else:
        loss = np.mean((1 - e) * np.log1p(np.exp(-z)) + e * np.log1p(np.exp(z)))
        slope = beta * (e - 1 / (1 + np.exp(z)))
    root = ops.sum((slope / len(pairs) - weight / tokens) * logp_w) - ops.sum((slope / len(pairs)) * logp_l)
    metrics = {
        "loss": loss - weight * logp_w.data.sum() / tokens, "rewards/chosen": reward_w.mean(),
        "rewards/rejected": reward_l.mean(), "rewards/accuracies": (z > 0).mean(),
        "logps/chosen": logp_w.data.mean(), "logps/rejected": logp_l.data.mean(),
    }  # fmt: skip
    if weight:
        metrics |= {"loss/dpo": loss, "loss/nll": -logp_w.data.sum() / tokens}
    return {key: float(value) for key, value in metrics.items()}, root


def training_data(root, name, options):
    """Config, initial parameters, examples, held-out examples and the objective of a training command."""
    letters = LETTERS + "\ufffd" * options.get("replacement", False)
    if options["init"]:
        params, config = weights(root, options["init"])
    else:
        sizes = {key: options[key] for key in ("n_positions", "n_embd", "n_layer", "n_head")}
        config = Config(len(letters) + 1, **sizes)
        start = model.init(config, stream(options["seed"], "init"))
        params = {key: p.data.astype("float64") for key, p in start.items()}
    halves = []
    for file in (options["data"], options["held_out_data"]):
        if name == "pretrain":
            texts = TEXTS[file].split("\n\n" if options.get("blocks") else "\n")
            halves.append([([0], [*ids(text.strip("\n")), 0]) for text in texts if text])
        else:
            rows = [row[1:] for row in encoded(file, options, config.n_positions)]
            count = 1 if options.get("responses") == "chosen" else 2
            halves.append([(x, y) for x, *ys in rows for y in ys[:count]] if name == "sft" else rows)
    objective = likelihood
    if name == "dpo":
        objective = functools.partial(preference, ref_params=weights(root, options["reference"] or options["init"])[0])
    return letters, config, params, *halves, objective


def trained(root, name, options):
    """A training run."""
    letters, config, params, examples, held_out, objective = training_data(root, name, options)
    steps, warmup, decay = options["steps"], options["warmup_steps"], 0.0 if name == "dpo" else 0.01
    m = {key: np.zeros(p.shape) for key, p in params.items()}
    v = {key: np.zeros(p.shape) for key, p in params.items()}
    lines, best, worse = [], math.inf, 0
    for step in range(steps + 1):
        if step % options["evaluate_every"] == 0 or step == steps:
            metrics, _ = objective(params, config, held_out, options)
            lines.append({"step": step, **{f"eval_{key}": value for key, value in metrics.items()}})
            worse = 0 if metrics["loss"] < best else worse + 1
            best = min(best, metrics["loss"])
        if step == steps or worse == options.get("patience", math.inf):
            break
        s = (step - warmup) / (steps - warmup)
        rate = options["learning_rate"] * ((step + 1) / warmup if step < warmup else (1 + math.cos(math.pi * s)) / 2)
        indices = training.batch_indices(len(examples), options["batch_size"], step, options["seed"])
        batch = [examples[i] for i in indices]
        metrics, g = gradient(params, lambda leaves, batch=batch: objective(leaves, config, batch, options))
        norm = math.sqrt(sum((x**2).sum() for x in g.values()))
        for key, p in params.items():
            x = g[key] * min(1, 1 / norm)
            m[key], v[key] = 0.9 * m[key] + 0.1 * x, 0.99 * v[key] + 0.01 * x**2
            m_hat, v_hat = m[key] / (1 - 0.9 ** (step + 1)), v[key] / (1 - 0.99 ** (step + 1))
            params[key] = p - rate * (m_hat / (np.sqrt(v_hat) + 1e-8) + decay * p)
        lines.append({"step": step + 1, **metrics, "grad_norm": norm, "learning_rate": rate})
    kept = params if options["init"] else {}
    return {"vocabulary": letters, "config": vars(config), "lines": lines, "params": kept}


def scored(policy, ref, config, rows, options):
    """What `score` prints of each row."""
    table = []
    for line, *pair in rows:
        metrics, _ = preference(policy, config, [pair], options, ref)
        refs, _ = preference(ref, config, [pair], options, ref)
        row = {
            "line": line,
            "truncated": line == len(ROWS),
            **{key: metrics[key] for key in metrics if "/acc" not in key},
        }
        table.append({**row, **{f"ref_{key}": refs[key] for key in refs if key.startswith("logps")}})
    return table


def steps_of(policy, ref, config, pair, beta, rate):
    """The kernel of a pair, and what a plain step does to both log-probabilities."""
    x, *ys = pair
    before = [logprobs(policy, config, [(x, y)]).item() for y in ys]
    grads = [gradient(policy, lambda leaves, y=y: ({}, ops.sum(logprobs(leaves, config, [(x, y)]))))[1] for y in ys]
    K = [[sum((a[key] * b[key]).sum() for key in a) for b in grads] for a in grads]
    z = beta * (before[0] - before[1] - np.subtract(*[logprobs(ref, config, [(x, y)]).item() for y in ys]))
    pull = rate * beta / (1 + math.exp(z))
    stepped = {key: p + pull * (grads[0][key] - grads[1][key]) for key, p in policy.items()}
    facts = {"learning_rate": rate, "K_ww": K[0][0], "K_wl": K[0][1], "K_ll": K[1][1]}
    for i, side in enumerate(("chosen", "rejected")):
        measured = logprobs(stepped, config, [(x, ys[i])]).item() - before[i]
        facts[side] = {"predicted": pull * (K[i][0] - K[i][1]), "measured": measured}
    return facts


def looked(root, name, options):
    """What a measuring command gives."""
    policy, config = weights(root, options["checkpoint"])
    ref, _ = weights(root, options.get("reference") or options["checkpoint"])
    beta, rate = options.get("beta", 0.1), options.get("learning_rate", 1e-6)
    if name == "sample":
        x = [0, *ids(options["prompt"] + "\n" * options.get("newline", False))]
        logits = model.forward({key: Tensor(p) for key, p in policy.items()}, config, [x]).data[0, -1]
        p = np.exp((logits - logits.max()) / options.get("temperature", 1.0))
        order = np.argsort(-p)
        p[order[options.get("top_k", len(p)) :]] = 0
        p /= p.sum()
        p[order[1:][np.cumsum(p[order])[:-1] >= options.get("top_p", 2.0)]] = 0
        return {"count": options["samples"], "frequencies": p / p.sum()}
    if name == "explain":
        x = [0, *ids(options["prompt"] + "\n" * options.get("newline", False))]
        pair = x, [*ids(options["chosen"]), 0], [*ids(options["rejected"]), 0]
        (row,) = scored(policy, ref, config, [(1, *pair)], options)
        names = {"logp_w": "logps/chosen", "logp_l": "logps/rejected", "ref_logp_w": "ref_logps/chosen",
                 "reward_l": "rewards/rejected", "loss": "loss"}  # fmt: skip
        step = steps_of(policy, ref, config, pair, beta, rate)
        reference = str(root / (options["reference"] or options["checkpoint"]))
        return {"numbers": {**{a: row[b] for a, b in names.items()}, "step": step, "reference": reference}}
    rows = encoded(options["data"], options, config.n_positions)
    if name == "displacement":
        return {"numbers": [steps_of(policy, ref, config, pair, beta, rate) for _, *pair in rows]}
    if name == "score":
        return {"numbers": scored(policy, ref, config, rows, options)}
    metrics, _ = preference(policy, config, [pair for _, *pair in rows], options, ref)
    refs, _ = preference(ref, config, [pair for _, *pair in rows], options, ref)
    metrics |= {f"ref_{key}": refs[key] for key in ("logps/chosen", "logps/rejected")}
    cut = len(rows) == len(ROWS)
    return {"numbers": {**metrics, "pairs": len(rows), "set_aside": len(ROWS) - len(rows), "truncated": int(cut)}}


def judged(root, options):
    """What `judge` gives: replies to the desk's prompts by taking the likeliest token, and their KL."""
    prompts = world.prompt_distribution(world.split(options.get("seed", 0))[2])
    texts = world.samples(prompts, options["replies"], stream(options.get("seed", 0), "demo", "prompts"))
    letters, ref = checkpoint.load(root / "desk").tokenizer.characters, weights(root, options["reference"])[0]
    table = []
    for name in [options["reference"], *options["checkpoint"]]:
        params, config = weights(root, name)
        leaves, replies, ratios = {key: Tensor(p) for key, p in params.items()}, [], []
        for text in texts:
            x, y = [0, *ids(text + "\n", letters)], []
            while 0 not in y and len(x) + len(y) <= config.n_positions:
                y.append(int(model.forward(leaves, config, [x + y]).data[0, -1].argmax()))
            replies.append("".join(letters[i - 1] for i in y if i))
            ratios.append(np.subtract(*[logprobs(each, config, [(x, y)]).item() for each in (params, ref)]))
        rewards = np.array([world.judgement(*each).reward for each in zip(texts, replies)])
        row = {"model": name, "replies": replies, "reward": np.mean(rewards), "kl": np.mean(ratios)}
        row["reward/gain"] = np.mean(rewards - (table[0]["rewards"] if table else rewards))
        mine = np.array(["'s " in text for text in texts])  # private
        if mine.any():
            row |= {"private/reward": rewards[mine].mean(), "private/kl": np.mean(np.array(ratios)[mine])}
        table.append({**row, "rewards": rewards})
    return {"numbers": [{key: value for key, value in row.items() if key != "rewards"} for row in table[1:]]}


def expected(root, name, options):
    """The outcome of a command, computed on its own."""
    return remembered(root, name, json.dumps(options))


@functools.cache
def remembered(root, name, text):
    options = json.loads(text)
    if options.get("strict"):
        return {"refused": True}  # the file has a row that is too long
    if "out" in options:
        return trained(root, name, options)
    return judged(root, options) if name == "judge" else looked(root, name, options)
