"""The cases of the wiring: for each option of each command what to try, and what a command line gives."""

import numpy as np

from minidpo import checkpoint
from minidpo.cli import parser
from minidpo.run.folder import json_lines
from twin import LETTERS

# For each option of a command the values to try, or the name of a test in test_options.py.
# A dict before the values is set for the case and for what it is compared with.

NEW = {"init": None, "n_embd": 8, "n_layer": 1, "n_head": 2, "n_positions": 20}  # a new model, not that of --init
RISING = {"learning_rate": 0.5, "steps": 5}  # the held-out loss rises, so that patience ends
TRAINING = {
    "seed": [NEW, 3], "held_out_data": ["held_too"], "steps": [3], "batch_size": [3],
    "learning_rate": [0.02], "warmup_steps": [{"steps": 3}, 2], "evaluate_every": [2], "patience": [RISING, 1],
    "data": ["more"], "out": "names_the_folder", "held_out_share": "holds_out_a_share",
    "micro_batch_size": "leaves_the_gradient", "device": "moves_the_arrays",
}  # fmt: skip
BEGINNING = {
    "init": ["other"], "n_embd": [NEW, 12], "n_layer": [NEW, 2], "n_head": [NEW, 4], "n_positions": [NEW, 24],
    "replacement": [NEW, True],
}  # fmt: skip
ROW_OPTIONS = {"strict": [True], "truncation": ["prompt", "response"]}
TESTED = {**TRAINING, **ROW_OPTIONS, "test_share": "tests_on_a_share"}
SCORING = {"checkpoint": ["other"], "data": ["more"], "reference": ["init"], "beta": [1.5], **ROW_OPTIONS}
CASES = {
    "pretrain": {**TRAINING, **BEGINNING, "blocks": [True]},
    "sft": {**TESTED, **BEGINNING, "responses": ["chosen"]},
    "dpo": {
        **TESTED, "seed": [3], "init": ["other"], "reference": [None], "beta": [1.5],
        "loss": ["ipo", "reference-free"], "label_smoothing": [0.2], "nll_weight": [2.0],
        "loss_options": ["label_smoothing=0.2"], "judge_every": "judges_a_run", "repeats": "counts_labels",
    },
    "evaluate": {
        **SCORING, "device": "moves_the_arrays", "json": "prints_the_result", "calibration": "is_measured",
        "seen": "lets_seen_prompts_in", "repeats": "counts_labels", "slices": "groups_the_pairs",
        "plot": "draws_diagrams",
        "at_most": "is_a_gate", "at_least": "is_a_gate",
    },
    "score": {**SCORING, "device": "moves_the_arrays", "ids": "reads_ids"},
    "sample": {
        "checkpoint": ["other"], "prompt": ["bad"], "newline": [True], "samples": [200],
        "temperature": [0.3], "top_k": [2], "top_p": [0.5], "seed": "draws_other_texts",
        "max_new_tokens": "bounds_the_texts", "device": "moves_the_arrays", "prompt_file": "reads_a_file",
        "escapes": "reads_escapes", "prompts": "compares_answers",
    },
    "judge": {
        "checkpoint": [["desk_other"]], "reference": ["desk"], "replies": [3], "seed": [1], "at_most": "is_a_gate",
        "at_least": "is_a_gate", "failures": "shows_failures", "templates": "asks_otherwise",
        "seen": "lets_seen_prompts_in", "out": "keeps_the_replies", "proxy": "is_under_pressure",
    },
    "explain": {
        "checkpoint": ["other"], "prompt": ["dd"], "chosen": ["bca"], "rejected": ["aa"],
        "newline": [True], "reference": [None], "beta": [1.5], "learning_rate": [1e-5],
        "json": "prints_the_result", "html": "writes_a_file", "graph": "writes_a_file", "prompt_file": "reads_a_file",
        "escapes": "reads_escapes",
    },
    "displacement": {**SCORING, "learning_rate": [1e-4]},
    "card": {"run": "names_a_run", "verify": "verifies", "against": "compares"},
}  # fmt: skip
SHORT = {"data": "pairs", "held_out_data": "held", "init": "init", "out": "run", "steps": 2, "batch_size": 4, "seed": 0,
         "evaluate_every": 1, "warmup_steps": 0, "learning_rate": 0.05}  # fmt: skip
MANY = {"data": "many", "held_out_data": None, "steps": 1, "batch_size": 150}  # one step on all that is not held out
BOTH = {"checkpoint": "init", "reference": "other", "data": "pairs"}
BASE = {
    "pretrain": SHORT, "sft": SHORT, "dpo": {**SHORT, "reference": "other", "beta": 0.5}, "evaluate": BOTH,
    "score": BOTH, "displacement": BOTH, "sample": {"checkpoint": "init", "prompt": "ab", "samples": 400,
    "max_new_tokens": 1}, "judge": {"checkpoint": ["desk"], "reference": "desk_other", "replies": 6},
    "explain": {"checkpoint": "init", "reference": "other", "prompt": "ab", "chosen": "dc", "rejected": "bba"},
}  # fmt: skip


def result_of(root, out, name, values):
    """What a command line returns, or "refused" for a row that cannot be used."""
    words = [name]
    for option, value in values.items():
        if option in ("data", "held_out_data") and value:
            value = root / f"{value}.{'txt' if name == 'pretrain' else 'jsonl'}"
        elif option in ("init", "reference", "checkpoint") and value:
            value = [root / each for each in value] if isinstance(value, list) else root / value
        elif option in ("out", "html", "graph"):
            value = out / value
        flag = parser.flagged(option)
        if isinstance(value, list):
            words += [flag, *map(str, value)]
        elif value is not None:
            words += [flag if value is True else f"{flag}={value}"]
    _, arguments = parser.parse(words)
    try:
        return parser.COMMANDS[name].function(**arguments)
    except ValueError as error:
        if "without --strict" not in str(error):
            raise
        return "refused"


def outcome(root, out, name, values):
    """The numbers that a command line gives; those of a training run are in its folder."""
    result = result_of(root, out, name, values)
    if result == "refused":
        return {"refused": True}
    if name == "sample":
        begin, texts = "" if values.get("newline") else values["prompt"], result
        assert all(text.startswith(begin) for text in texts)
        firsts = [text.removeprefix(begin)[:1] for text in texts]
        return {"count": len(texts), "frequencies": np.array([firsts.count(c) / len(texts) for c in ["", *LETTERS]])}
    if "out" not in values:
        return {"numbers": result}
    run = out / values["out"]
    lines = json_lines(run / "metrics.jsonl")
    saved = checkpoint.load(run / f"step-{lines[-1]['step']:06d}")
    params = {key: p.data for key, p in saved.params.items()} if values.get("init") else {}
    return {"vocabulary": saved.tokenizer.characters, "config": vars(saved.config), "lines": lines, "params": params}


def recorded(monkeypatch, module, name, record):
    """Let a function record its arguments."""
    function = getattr(module, name)
    monkeypatch.setattr(module, name, lambda *args, **words: record(*args) or function(*args, **words))
