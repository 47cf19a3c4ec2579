"""The commands that look into a model: one pair, many pairs, and what a loss does not see."""

import argparse
import functools
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from . import checkpoint, displacement, explain, invariances, losses, optim, page, preferences
from .loop import described
from .preferences import Row
from .recipes import load, same_vocabulary, scored_rows
from .scoring import shared_logprobs
from .tokenizer import TURN, Tokenizer

BETA = 0.2  # where neither an option nor a run gives one
NLL_WEIGHTS = (0.0, 0.02, 0.05, 0.1, 0.5)


def settle(options: argparse.Namespace) -> None:
    """Fill in --reference and --beta: those of the run, if the checkpoint is a run of `dpo`, else itself and 0.2."""
    run: dict[str, str] = {}
    if (options.checkpoint / "run.json").exists():
        command, *given = described(options.checkpoint)["arguments"]
        run = dict(option.removeprefix("--").partition("=")[::2] for option in given) if command == "dpo" else {}
    options.reference = options.reference or Path(run.get("reference", run.get("init", options.checkpoint)))
    options.beta = options.beta or float(run.get("beta", BETA))


def pair_of_ids(options: argparse.Namespace, tokenizer: Tokenizer, n_positions: int) -> Any:
    """The ids of --prompt, --chosen and --rejected."""
    prompt = options.prompt + (TURN if options.newline else "")
    responses = ("chosen", "rejected")
    rows = [Row(i, prompt, (getattr(options, name),), "") for i, name in enumerate(responses)]
    encoded = preferences.encode(rows, tokenizer, n_positions)
    for fault in encoded.faults:
        raise ValueError(f"the prompt with the {responses[fault.line]} response: {fault.reason}")
    (x, w), (_, l) = encoded.ids
    return x, w, l


def explain_pair(options: argparse.Namespace) -> int:
    """Show every gradient of one pair."""
    settle(options)
    loaded, reference = load(options.checkpoint), load(options.reference)
    same_vocabulary(options.checkpoint, loaded, options.reference, reference)
    policy, config, tokenizer = loaded.params, loaded.config, loaded.tokenizer
    if options.graph and options.graph.suffix not in (".dot", ".mmd"):
        raise ValueError(f"{options.graph}: a graph is written as .dot (Graphviz) or .mmd (Mermaid)")
    x, w, l = pair_of_ids(options, tokenizer, min(config.n_positions, reference.config.n_positions))
    view = explain.pair(policy, reference.params, config, x, w, l, options.beta, tokenizer, reference.config)
    ways = explain.four_ways(policy, config, view)
    optimizers = (optim.SGD, functools.partial(optim.AdamW, weight_decay=0.0))
    plain, adam = (
        displacement.step(policy, config, view, options.learning_rate, optimizer) for optimizer in optimizers
    )
    if options.json:
        told = {"reference": str(options.reference), **view.as_dict(), "four_ways": [way._asdict() for way in ways]}
        print(json.dumps({**told, "step": asdict(plain), "step_adamw": asdict(adam)}, allow_nan=False))
    else:
        itself = ", the policy itself" if options.reference == options.checkpoint else ""
        print(f"reference {options.reference}{itself}; beta {options.beta:g}\n")
        print("\n\n".join([page.aligned(view), page.tokens_as_text(view), page.summary(view)]))
        print(f"\nThe gradient, four ways\n{page.ways_as_text(ways)}")
        print(f"\nWhat a step will do\n{page.step_as_text(plain, adam)}")
    if options.html:
        checkpoint.write_whole(options.html, page.page(view).encode())
    if options.graph:
        params = explain.double(policy)
        logp_w, logp_l = shared_logprobs(params, config, [view.ids])
        graph = explain.graph(
            losses.dpo_loss(logp_w, logp_l, [view.ref_logp_w], [view.ref_logp_l], options.beta).loss, params
        )
        text = graph.dot() if options.graph.suffix == ".dot" else graph.mermaid()
        checkpoint.write_whole(options.graph, text.encode())
    return 0


def displaced(options: argparse.Namespace) -> int:
    """Show how preferring a response can make it less likely: on three words, or counted over a file of pairs."""
    if options.data is None or options.checkpoint is None:
        if options.data or options.checkpoint:
            raise ValueError("--checkpoint and --data belong together; without both, three words are shown")
        print(displacement.words_as_text([displacement.three_words(weight) for weight in NLL_WEIGHTS]))
        return 0
    settle(options)
    policy, reference, rows, _ = scored_rows(options)
    pairs: list[Any] = rows.ids
    steps = displacement.meter(
        policy.params, reference.params, policy.config, pairs, options.beta, options.learning_rate, reference.config
    )
    print(f"reference {options.reference}; beta {options.beta:g}\n{displacement.meter_as_text(steps)}")
    return 0


def unmoved(options: argparse.Namespace) -> int:
    """Print what leaves the loss and its gradient alone, and what does not."""
    print(invariances.as_text(invariances.measured(options.seed)))
    return 0
