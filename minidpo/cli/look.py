"""The commands that look into a model: one pair, many pairs, and what a loss does not see."""

import argparse
import functools
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .. import explain, losses, optim
from ..data import preferences
from ..data.preferences import Row
from ..explain import displacement, page, tables
from ..run.checkpoint import CheckpointError
from ..run.files import write_whole
from ..run.folder import described
from ..scoring import shared_logprobs
from ..theory import invariances
from ..tokenizer import TURN, Tokenizer
from .train import load, same_vocabulary, scored_rows

BETA = 0.2  # where neither an option nor a run gives one
RATE = 1e-6
PLAIN = {"loss": "dpo", "nll-weight": "0.0", "label-smoothing": "0.0"}  # what `dpo` minimises at least
NLL_WEIGHTS = (0.0, 0.02, 0.05, 0.1, 0.5)


def settle(options: argparse.Namespace) -> None:
    """Fill in --reference and --beta: those of the run of `dpo` that made the checkpoint, else itself and 0.2.

    What else that run minimised is in `note`.
    """
    run: dict[str, str] = {}
    folders = (options.checkpoint, options.checkpoint.parent)  # RUN/model stands in its run
    folder = next((folder for folder in folders if (folder / "run.json").exists()), None)
    if folder:
        command, *given = described(folder)["arguments"]
        run = dict(option.removeprefix("--").partition("=")[::2] for option in given) if command == "dpo" else {}
    trained = run.get("reference", run.get("init"))
    if trained and not options.reference and not Path(trained).exists():
        raise ValueError(f"{trained}: was the reference of this run and is not there: give --reference")
    options.reference = options.reference or Path(trained or options.checkpoint)
    try:
        options.beta = options.beta or float(run.get("beta", BETA))
    except ValueError as error:
        raise CheckpointError(f"{options.checkpoint}: its run.json has no number for --beta ({error})") from error
    more = [f"--{name} {run[name]}" for name, plain in PLAIN.items() if run.get(name, plain) != plain]
    options.note = f"the run was made with {' '.join(more)}; this is about the DPO loss alone" if more else ""


def checked_outputs(*paths: Path | None) -> None:
    """Refuse a file that cannot be written before anything is computed."""
    given = [path for path in paths if path is not None]
    for path in given:
        if not path.absolute().parent.is_dir() or (path.exists() and not path.is_file()) or path.is_symlink():
            raise ValueError(f"{path}: is no file that can be written: its folder must exist, and it be a plain file")
    if len({path.absolute() for path in given}) < len(given):
        raise ValueError(f"{given[0]}: two outputs cannot be one file")


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
    checked_outputs(options.html, options.graph)
    if options.graph and not options.graph.name.endswith((".dot", ".mmd")):
        raise ValueError(f"{options.graph}: a graph is written as .dot (Graphviz) or .mmd (Mermaid)")
    settle(options)
    loaded, reference = load(options.checkpoint), load(options.reference)
    same_vocabulary(options.checkpoint, loaded, options.reference, reference)
    policy, config, tokenizer = loaded.params, loaded.config, loaded.tokenizer
    x, w, l = pair_of_ids(options, tokenizer, min(config.n_positions, reference.config.n_positions))
    view = explain.pair(policy, reference.params, config, x, w, l, options.beta, tokenizer, reference.config)
    ways = explain.four_ways(policy, config, view)
    optimizers = (optim.SGD, functools.partial(optim.AdamW, weight_decay=0.0))
    plain, adam = (
        displacement.step(policy, config, view, options.learning_rate or RATE, optimizer) for optimizer in optimizers
    )
    if options.json:
        told = {
            "reference": str(options.reference),
            "note": options.note,
            **view.as_dict(),
            "four_ways": [way._asdict() for way in ways],
        }
        print(json.dumps({**told, "step": asdict(plain), "step_adamw": asdict(adam)}, allow_nan=False))
    else:
        itself = ", the policy itself" if options.reference == options.checkpoint else ""
        print(f"reference {options.reference}{itself}; beta {options.beta:g}\n{options.note}\n".rstrip() + "\n")
        print("\n\n".join([tables.aligned(view), tables.tokens_as_text(view), tables.summary(view)]))
        print(f"\nThe gradient, four ways\n{tables.ways_as_text(ways)}")
        print(f"\nWhat a step will do\n{tables.step_as_text(plain, adam)}")
    if options.html:
        write_whole(options.html, page.page(view).encode())
    if options.graph:
        params = explain.double(policy)
        logp_w, logp_l = shared_logprobs(params, config, [view.ids])
        graph = explain.graph(
            losses.dpo_loss(logp_w, logp_l, [view.ref_logp_w], [view.ref_logp_l], options.beta).loss, params
        )
        text = graph.dot() if options.graph.name.endswith(".dot") else graph.mermaid()
        write_whole(options.graph, text.encode())
    return 0


def displaced(options: argparse.Namespace) -> int:
    """Show how preferring a response can make it less likely: on three words, or counted over a file of pairs."""
    if options.data is None or options.checkpoint is None:
        given = ("data", "checkpoint", "reference", "beta", "learning_rate")
        if any(getattr(options, name) is not None for name in given):
            raise ValueError("--checkpoint and --data belong together, and the other options to both")
        print(displacement.words_as_text([displacement.three_words(weight) for weight in NLL_WEIGHTS]))
        return 0
    settle(options)
    policy, reference, rows, _ = scored_rows(options)
    pairs: list[Any] = rows.ids
    steps = displacement.meter(
        policy.params,
        reference.params,
        policy.config,
        pairs,
        options.beta,
        options.learning_rate or RATE,
        reference.config,
    )
    print(f"reference {options.reference}; beta {options.beta:g}\n{options.note}".rstrip())
    print(displacement.meter_as_text(steps))
    return 0


def unmoved(options: argparse.Namespace) -> int:
    """Print what leaves the loss and its gradient alone, and what does not."""
    print(invariances.as_text(invariances.table(options.seed)))
    return 0
