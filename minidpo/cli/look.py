"""The commands that look into a model: its scores and samples, one pair, and what a loss does not see."""

import functools
import math
import re
import sys
from collections.abc import Callable, Iterable
from dataclasses import asdict
from json import dumps
from pathlib import Path
from typing import Annotated, Any

from .. import losses, optim, training
from ..audit.provenance import Link
from ..data import preferences
from ..data.preferences import PAIRS, Encoded
from ..explain import displacement as first_order
from ..explain import double, four_ways, page, pair, tables
from ..explain import graph as graph_of
from ..generation import generate
from ..run.checkpoint import Checkpoint, CheckpointError
from ..run.files import read_text, write_whole
from ..run.folder import folder_with, run_description
from ..run.tasks import counted, printed, tell
from ..scoring import Pair, shared_logprobs
from ..streams import stream
from ..theory import no_never_yes
from ..tokenizer import END_OF_TEXT, TURN, Tokenizer, printable
from . import options as o
from .options import Default, announce
from .parser import command
from .train import load, load_ids, same_vocabulary

BETA = 0.1  # where neither an option nor a run gives one
RATE = 1e-6
AT_ONCE = 32  # texts that are sampled together
PLAIN = {"loss": "dpo", "nll-weight": "0.0", "label-smoothing": "0.0", "loss-options": ""}  # the DPO loss alone
NLL_WEIGHTS = (0.0, 0.02, 0.05, 0.1, 0.5)

OwnReference = Annotated[o.Reference | None, Default("that of the dpo run, or the policy itself")]
OwnBeta = Annotated[o.Beta | None, Default(f"that of the dpo run, or {BETA:g}")]


def scored_rows(
    checkpoint: Path, reference: Path | None, data: Path, truncation: str, strict: bool, device: str = "cpu",
    ids: bool = False, repeats: str = "",
) -> tuple[Checkpoint, Checkpoint, Encoded, int]:  # fmt: skip
    """Policy, reference, the rows of a file that both can score, and how many rows were set aside."""
    read = load_ids if ids else load
    policy: Checkpoint = read(checkpoint, device=device)
    ref: Checkpoint = read(reference, device=device) if reference else policy
    same_vocabulary(checkpoint, policy, reference or checkpoint, ref, ids)
    n_positions = min(policy.config.n_positions, ref.config.n_positions)
    if ids and truncation != "none":
        raise ValueError("--ids takes rows as they are, so it has no --truncation")
    if ids:
        rows = preferences.usable_ids(data, policy.config.vocab_size, n_positions, strict)
    else:
        rows = preferences.usable_rows(data, PAIRS, policy.tokenizer, n_positions, truncation, strict, repeats)
    for fault in rows.faults[:20]:
        print(f"{data}, line {fault.line}: set aside, {fault.reason}", file=sys.stderr)
    more = [f"{data}: {len(rows.faults) - 20} more rows are set aside"] * (len(rows.faults) > 20)
    print("".join(f"{remark}\n" for remark in more + rows.remarks), end="", file=sys.stderr)
    return policy, ref, rows.ids, len(rows.faults)


@command("look")
def score(
    *, checkpoint: o.Checkpoint, data: o.Pairs,
    reference: Annotated[o.Reference | None, Default("no reference, no rewards")] = None, beta: OwnBeta = None,
    strict: o.Strict = False, truncation: o.Truncation = "none", device: o.Device = "cpu", ids: o.Ids = False,
) -> list[dict[str, Any]]:  # fmt: skip
    """Print the log-probabilities of each pair.

    Print one JSON object per line, one for each pair of a file: its line number, log pi of both responses and, with
    --reference, the same under the reference, the implicit rewards and the DPO loss. With --ids any GPT-2 of Hugging
    Face's can be scored, whatever its tokenizer: nothing is added to the ids.
    """
    if reference:
        reference, beta = given_or_of_run(checkpoint, reference, beta)
    policy, ref, rows, _ = scored_rows(checkpoint, reference, data, truncation, strict, device, ids)
    pairs: list[Any] = rows.ids
    table = []
    for row, each in zip(rows.rows, pairs):
        logp_w, logp_l = training.reference_logprobs(policy.params, policy.config, [each])
        scores: dict[str, Any] = {"line": row.line, "truncated": row.line in rows.truncated}
        scores |= {"logps/chosen": logp_w.item(), "logps/rejected": logp_l.item()}
        if reference and beta:
            ref_logp_w, ref_logp_l = training.reference_logprobs(ref.params, ref.config, [each])
            out = losses.dpo_loss(logp_w, logp_l, ref_logp_w, ref_logp_l, beta)
            scores |= {"ref_logps/chosen": ref_logp_w.item(), "ref_logps/rejected": ref_logp_l.item()}
            scores |= {"rewards/chosen": out.reward_w.item(), "rewards/rejected": out.reward_l.item()}
            scores |= {"loss": out.loss.item()}
        if not all(map(math.isfinite, scores.values())):
            raise FloatingPointError(f"{data}, line {row.line}: a score is not finite")
        print(dumps(scores), flush=True)
        table.append(scores)
    return table


@command("look")
def sample(
    *, checkpoint: o.Checkpoints, prompt: o.Prompt = "", prompt_file: o.PromptFile = None, escapes: o.Escapes = False,
    prompts: o.Prompts = None, newline: o.Newline = False,
    samples: Annotated[o.Samples | None, Default("5, or 1 for each prompt of a file or of several models")] = None,
    seed: o.Seed = 0, max_new_tokens: o.MaxNewTokens = None, temperature: o.Temperature = 1.0, top_k: o.TopK = None,
    top_p: o.TopP = None, device: o.Device = "cpu",
) -> list[str] | list[dict[str, str]]:  # fmt: skip
    """Sample texts from a model, or the answers of several side by side.

    Print texts that the model continues from the prompt, one per line; with --newline, its responses alone. The first
    text is the same whatever the number of texts. With --prompts, or several checkpoints, print each different prompt
    once, and below it each model's response; all models get the same random numbers, one stream per prompt and sample.
    """
    models = {folder: load(folder, device=device) for folder in checkpoint}
    if prompts is not None and (prompt or prompt_file or escapes):
        raise ValueError("--prompts takes the prompts from its file, in place of --prompt, --prompt-file and --escapes")
    if prompts is None:
        places = {prompt_text(prompt, prompt_file, escapes): "the prompt"}
    else:
        places = {x: f"{prompts}, line {line}" for x, line in different_prompts(prompts).items()}
    alone = prompts is None and len(models) == 1
    ids: dict[Path, list[list[int]]] = {}
    for folder, (_, config, tokenizer, _) in models.items():
        if replaced := tokenizer.replaced(places):
            print(f"{'the prompt' if alone else folder}: {replaced}", file=sys.stderr)
        of = "" if alone else f", to {folder}"
        ids[folder] = [[END_OF_TEXT, *encoded(tokenizer, ended(x) if newline else x, f"{place}{of}")]
                       for x, place in places.items()]  # fmt: skip
        for x, place in zip(ids[folder], places.values()):
            if not alone and len(x) > config.n_positions:
                raise ValueError(f"{place}{of}: {len(x)} tokens, but the model's n_positions = {config.n_positions}")
    each, rows, texts = samples or (5 if alone else 1), list(places), list[Any]()
    names = labels_of(models)
    starts = range(0, len(rows) * each, AT_ONCE)
    for start in starts if alone else counted(starts, "answers: batches"):
        batch = [divmod(row, each) for row in range(start, min(start + AT_ONCE, len(rows) * each))]
        answers = []
        for folder, (params, config, tokenizer, _) in models.items():
            rngs = [stream(seed, "samples", *([] if alone else [rows[x]]), i) for x, i in batch]
            most, beginnings = max_new_tokens or config.n_positions, [ids[folder][x] for x, _ in batch]
            generation = generate(params, config, beginnings, rngs, most, temperature, top_k, top_p)
            answers.append([tokenizer.decode(response) for response in generation.responses])
        if alone:
            new = [("" if newline else rows[0]) + answer for answer in answers[0]]
            print("\n".join(map(printable, new)), flush=True)
            texts += new
            continue
        tell("")  # on a terminal the line of progress gives way
        for (x, i), *replies in zip(batch, *answers):
            print(*([printable(rows[x])] if i == 0 else []), sep="\n", end="\n" * (i == 0))
            for name, reply in zip(names, replies):
                print(f"  {name:<{max(map(len, names))}}  {printable(reply)}", flush=True)
                texts.append({"prompt": rows[x], "model": name, "response": reply})
        printed()
    return texts


def labels_of(folders: Iterable[Path]) -> list[str]:
    """The names of different folders; the whole path of one whose name another has too, as a/model and b/model."""
    names = {folder: folder.resolve().name for folder in folders}
    every = list(names.values())
    return [printable(name if every.count(name) == 1 else str(folder)) for folder, name in names.items()]


def ended(prompt: str) -> str:
    """A prompt that ends in a newline: its own, or one more."""
    return prompt.removesuffix(TURN) + TURN


def different_prompts(path: Path) -> dict[str, int]:
    """The different prompts of JSON Lines of prompts, pairs or completions, with the line each is first on."""
    found: dict[str, int] = {}
    for each in preferences.read_objects(path):
        x = each.document.get("prompt") if isinstance(each, preferences.Line) else None
        if not isinstance(x, str):
            reason = "has no text as its prompt" if isinstance(each, preferences.Line) else each.reason
            raise ValueError(f"{path}, line {each.line}: {reason}")
        found.setdefault(x, each.line)
    if not found:
        raise ValueError(f'{path}: has no prompt; each line is a JSON object with one, as {{"prompt": "..."}}')
    return found


def prompt_text(prompt: str, prompt_file: Path | None, escapes: bool) -> str:
    """The prompt, from the command line, a file or the standard input."""
    if prompt_file is None:
        return unescaped(prompt) if escapes else prompt
    if prompt or escapes:
        raise ValueError("--prompt-file is read as it is, in place of --prompt and --escapes")
    most = preferences.MAX_LINE_BYTES
    return sys.stdin.read(most) if str(prompt_file) == "-" else read_text(prompt_file, most)


def unescaped(text: str) -> str:
    r"""The text with \n as a newline, \t as a tab and \\ as a backslash."""
    return re.sub(r"\\([nt\\])", lambda match: {"n": "\n", "t": "\t"}.get(match[1], match[1]), text)


def encoded(tokenizer: Tokenizer, text: str, name: str) -> list[int]:
    """The ids of a text from the command line."""
    if "\\" in text and "\\" not in tokenizer.characters and not tokenizer.replacement:
        raise ValueError(
            f"{name} has a backslash, which the model does not know: --escapes reads \\n as a newline, --prompt-file "
            "takes the prompt from a file"
        )
    return tokenizer.encode(text, name)


def dpo_settings(checkpoint: Path) -> dict[str, str]:
    """The options of the run of `dpo` that a checkpoint is from; empty if there is no such run."""
    folder = folder_with("run.json", checkpoint)
    link = Link(folder, run_description(folder)) if folder else None
    return link.settings if link and link.description["arguments"][0] == "dpo" else {}


def given_or_of_run(checkpoint: Path, reference: Path | None, beta: float | None) -> tuple[Path, float]:
    """Reference and beta, from the checkpoint's run of `dpo` where they are not given; stderr says which were."""
    if reference and beta:
        return reference, beta
    settings = dpo_settings(checkpoint)
    if not (reference or settings):
        raise ValueError(f"{checkpoint}: is not from a run of dpo, which would name a reference; give --reference")
    chosen, strength, _ = run_settings(checkpoint, reference, beta)
    words = [f"--reference {chosen}"] * (not reference) + [f"--beta {strength:g}"] * (not beta)
    print(f"{checkpoint}: its run had {' '.join(words)}\n" * bool(settings), end="", file=sys.stderr)
    return chosen, strength


def run_settings(checkpoint: Path, reference: Path | None, beta: float | None) -> tuple[Path, float, str]:
    """Reference and beta of a checkpoint, from its run of `dpo` where none are given, and what else the run minimised.

    Without such a run they are the policy itself and `BETA`.
    """
    settings = dpo_settings(checkpoint)
    trained = settings.get("reference", settings.get("init"))
    if trained and not reference and not Path(trained).exists():
        raise ValueError(f"{trained}: the reference of this run is not there; give --reference")
    try:
        beta = beta or float(settings.get("beta", BETA))
    except ValueError as error:
        raise CheckpointError(f"{checkpoint}: its run.json has no number for --beta ({error})") from error
    terms = [f"--{name} {settings[name]}" for name, plain in PLAIN.items() if settings.get(name, plain) != plain]
    note = f"the run was made with {' '.join(terms)}; this shows the DPO loss alone" if terms else ""
    return reference or Path(trained or checkpoint), beta, note


def pair_of_ids(prompt: str, chosen: str, rejected: str, tokenizer: Tokenizer, n_positions: int) -> Pair:
    """The ids of a prompt and its two responses."""
    if replaced := tokenizer.replaced([prompt, chosen, rejected]):
        print(f"the pair: {replaced}", file=sys.stderr)
    x = [END_OF_TEXT, *encoded(tokenizer, prompt, "the prompt")]
    w = [*encoded(tokenizer, chosen, "the chosen response"), END_OF_TEXT]
    l = [*encoded(tokenizer, rejected, "the rejected response"), END_OF_TEXT]
    name, y = ("chosen", w) if len(w) >= len(l) else ("rejected", l)
    if len(x) + len(y) > n_positions + 1:
        raise ValueError(
            f"the prompt with the {name} response has {len(x) + len(y)} tokens, but only {n_positions + 1} fit the "
            "context: shorten one of them"
        )
    return x, w, l


@command("look")
def explain(
    *, checkpoint: o.Checkpoint, prompt: o.Prompt = "", prompt_file: o.PromptFile = None, chosen: o.Chosen,
    rejected: o.Rejected, escapes: o.Escapes = False, newline: o.Newline = False, reference: OwnReference = None,
    beta: OwnBeta = None, learning_rate: o.StepRate = RATE, json: o.Json = False, html: o.Html = None,
    graph: o.Graph = None,
) -> dict[str, Any]:  # fmt: skip
    """Show every gradient of one preference pair.

    Show the DPO loss of one pair: each token's log-probability, the implicit reward up to it, the coefficient and the
    logits that are pushed; the gradient by formula, per logit, by autograd and by finite difference; and what a step
    will do to both log-probabilities, beside what it does.
    """
    if graph and not graph.name.endswith((".dot", ".mmd")):
        raise ValueError(f"{graph}: a graph is written as .dot (Graphviz) or .mmd (Mermaid)")
    announce(html, graph)
    reference, beta, note = run_settings(checkpoint, reference, beta)
    loaded, ref = load(checkpoint), load(reference)
    same_vocabulary(checkpoint, loaded, reference, ref)
    policy, config, tokenizer = loaded.params, loaded.config, loaded.tokenizer
    n_positions = min(config.n_positions, ref.config.n_positions)
    prompt = prompt_text(prompt, prompt_file, escapes and not prompt_file) + (TURN if newline else "")
    if escapes:
        chosen, rejected = unescaped(chosen), unescaped(rejected)
    ids = pair_of_ids(prompt, chosen, rejected, tokenizer, n_positions)
    view = pair(policy, ref.params, config, *ids, beta, tokenizer, ref.config)
    ways = four_ways(policy, config, view)
    optimizers: list[Callable[..., optim.Optimizer]] = [optim.SGD, functools.partial(optim.AdamW, weight_decay=0.0)]
    plain, adam = (first_order.step(policy, config, view, learning_rate, each) for each in optimizers)
    facts = {"reference": str(reference), "note": note, **view.as_dict()}
    facts |= {"four_ways": [way._asdict() for way in ways], "step": asdict(plain), "step_adamw": asdict(adam)}
    if json:
        print(dumps(facts, allow_nan=False))
    else:
        itself = ", the policy itself" if reference == checkpoint else ""
        print(f"reference {reference}{itself}; beta {beta:g}\n{note}\n".rstrip() + "\n")
        print("\n\n".join([tables.aligned(view), tables.tokens_as_text(view), tables.summary(view)]))
        print(f"\nThe gradient, four ways\n{tables.ways_as_text(ways)}")
        print(f"\nWhat a step will do\n{tables.step_as_text(plain, adam)}")
    if html:
        write_whole(html, page.page(view).encode())
    if graph:
        params = double(policy)
        logp_w, logp_l = shared_logprobs(params, config, [view.ids])
        picture = graph_of(losses.dpo_loss(logp_w, logp_l, [view.ref_logp_w], [view.ref_logp_l], beta).loss, params)
        write_whole(graph, (picture.dot() if graph.name.endswith(".dot") else picture.mermaid()).encode())
    return facts


@command("look")
def displacement(
    *, checkpoint: Annotated[o.Checkpoint | None, Default("a model of three words")] = None,
    data: Annotated[o.Pairs | None, Default("one pair of words")] = None, reference: OwnReference = None,
    beta: OwnBeta = None, learning_rate: Annotated[o.StepRate | None, Default(f"{RATE:g}")] = None,
    strict: o.Strict = False, truncation: o.Truncation = "none",
) -> str:  # fmt: skip
    """Show how being preferred can make a response less likely.

    Train a model of three words on one pair, with and without a likelihood term. With --checkpoint and --data: take a
    small step on each pair alone, and count the pairs that lower their own chosen log-probability, as predicted to
    first order and as measured.
    """
    if data is None or checkpoint is None:
        others = (data, checkpoint, reference, beta, learning_rate, strict or None)
        if any(value is not None for value in others) or truncation != "none":
            raise ValueError("--checkpoint and --data belong together, and the other options need both")
        table = no_never_yes.as_text([no_never_yes.three_words(weight) for weight in NLL_WEIGHTS])
    else:
        reference, beta, note = run_settings(checkpoint, reference, beta)
        policy, ref, rows, _ = scored_rows(checkpoint, reference, data, truncation, strict)
        pairs: list[Any] = rows.ids
        models, rate = (policy.params, ref.params, policy.config), learning_rate or RATE
        steps = first_order.meter(*models, counted(pairs, "pairs"), beta, rate, ref.config)
        print(f"reference {reference}; beta {beta:g}\n{note}".rstrip())
        table = first_order.meter_as_text(steps)
    print(table)
    return table
