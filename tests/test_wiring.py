"""The wiring between each option and the number that it should change: a command against its twin.

Every case runs a command of two steps, and twin.py computes the same numbers on its own. An option without a case
fails by its name. Then the chain of the demo, and what is cached.
"""

import json
import math
from dataclasses import asdict

import pytest

from minidpo import checkpoint, cli, training
from minidpo.cli import parser
from minidpo.explain import displacement
from minidpo.run import safetensors
from minidpo.run.folder import json_lines
from minidpo.run.reference import cached_reference_logprobs
from test_demo import SIZES
from twin import CONFIG, differences, encoded, expected, ids, logprobs, reference_scores, weights
from wiring import BASE, CASES, outcome, recorded, result_of

TINY = {"texts": 20, "completions": 20, "pairs": 12, "held_out": 6, "steps": {"pretrain": 4, "sft": 12, "dpo": 2}}


def test_every_option_has_a_case():
    """A new option of a training or measuring command needs a case here."""
    assert {name for name, known in parser.COMMANDS.items() if known.group in ("train", "look")} <= {
        *CASES,
        "resume",
        "import",
    }
    for name, cases in CASES.items():
        assert set(cases) == set(parser.COMMANDS[name].options), name


@pytest.fixture(autouse=True)
def plain(one_process, monkeypatch):
    """One process; `displacement` returns its numbers."""
    monkeypatch.setattr(displacement, "meter_as_text", lambda steps: [asdict(step) for step in steps])


TRIED = [
    pytest.param(name, option, value, case[0] if isinstance(case[0], dict) else {}, id=f"{name} {option}={value}")
    for name, cases in CASES.items()
    for option, case in cases.items()
    for value in (case if isinstance(case, list) else [])
    if not isinstance(value, dict)
]


@pytest.mark.parametrize(("name", "option", "value", "before"), TRIED)
def test_an_option_changes_what_its_help_says(name, option, value, before, root, tmp_path):
    """A command gives its twin's numbers, and the option changes them."""
    base = {**BASE[name], **before}
    options = {**base, option: value}
    rel = 0.08 if name == "sample" else 1e-6 if options.get("init", True) else 2e-3  # a new model has float32
    right = expected(root, name, options)
    assert differences(outcome(root, tmp_path, name, options), right, rel) == []
    assert differences(expected(root, name, base), right, rel) != []


def test_a_step_is_clipped_in_every_base_case(root):
    """Clipping scales the two gradients of a base case by different factors, so it shows even under AdamW."""
    for name in ("pretrain", "sft", "dpo"):
        lines = expected(root, name, BASE[name])["lines"]
        factors = [min(1, 1 / line["grad_norm"]) for line in lines if "grad_norm" in line]
        assert min(factors) < 0.9 * max(factors), name


# ---- the chain of the demo, and what is cached ----------------------------------------------------------------------


def test_each_stage_of_the_demo_begins_from_the_weights_that_it_names(tmp_path):
    """Base, SFT, DPO: a stage begins from the model before it, and the reference of DPO and of the KL is SFT."""
    desk = cli.demo(out=tmp_path / "desk", sizes=SIZES._replace(**TINY))
    base, sft, dpo = (weights(desk, stage) for stage in ("pretrain", "sft", "dpo"))
    letters = checkpoint.load(desk / "sft").tokenizer.characters

    def held_out(kind, *fields):
        rows = map(json.loads, (desk / "data" / f"{kind}_held_out.jsonl").read_text().splitlines())
        return [([0, *ids(row["prompt"], letters)], [*ids(row[name], letters), 0]) for row in rows for name in fields]

    examples = held_out("completions", "completion")
    nats = -logprobs(*base, examples).data.sum() / sum(len(y) for _, y in examples)
    first, *_ = json_lines(desk / "sft" / "metrics.jsonl")
    assert first["eval_loss"] == pytest.approx(nats, rel=1e-5)
    chosen, rejected = held_out("pairs", "chosen"), held_out("pairs", "rejected")
    first, *_ = json_lines(desk / "dpo" / "metrics.jsonl")
    assert first["eval_logps/chosen"] == pytest.approx(logprobs(*sft, chosen).data.mean(), rel=1e-5)
    assert first["eval_rewards/ties"] == 1 and first["eval_rewards/chosen"] == first["eval_rewards/rejected"] == 0
    nats = -logprobs(*sft, chosen).data.sum() / sum(len(y) for _, y in chosen)
    assert first["eval_loss"] == pytest.approx(math.log(2) + 2 * nats, rel=1e-5)  # --nll-weight 2
    scores, _, _ = safetensors.read(desk / "dpo" / "reference.safetensors")
    for side, texts in (("w", chosen), ("l", rejected)):  # the held-out pairs come last
        right = logprobs(*sft, texts).data
        assert scores[f"ref_logp_{side}"][-len(texts) :] == pytest.approx(right, rel=1e-5)
        assert logprobs(*base, texts).data != pytest.approx(right, rel=1e-4)
    best = min(
        (line for line in json_lines(desk / "dpo" / "metrics.jsonl") if "eval_loss" in line),
        key=lambda line: line["eval_loss"],
    )
    ratio = (logprobs(*dpo, chosen).data - logprobs(*sft, chosen).data).mean()
    assert best["eval_rewards/chosen"] == pytest.approx(0.2 * ratio, rel=1e-3, abs=1e-5)
    kls = [row["all"]["kl"][0] for row in json.loads((desk / "results.json").read_text())["models"].values()]
    assert kls[1] == pytest.approx(0, abs=1e-4) and abs(kls[0]) > 1e-3


def test_reference_scores_are_cached_in_the_order_of_the_pairs(root, tmp_path):
    """Computed, written and read back, each score belongs to its pair and its side."""
    pairs = [tuple(pair) for _, *pair in encoded("pairs", {}, CONFIG.n_positions)]
    saved, path = checkpoint.load(root / "other"), tmp_path / "scores.safetensors"
    for _ in range(2):
        scores = cached_reference_logprobs(path, saved.params, CONFIG, saved.tokenizer, pairs)
        for actual, right in zip(scores, reference_scores(root, "other", pairs)):
            assert actual == pytest.approx(right, rel=1e-9)


def test_a_step_gets_the_reference_scores_of_its_pairs(root, tmp_path, monkeypatch):
    """In the dpo command too, after a step and after a resume: the reference is not the policy of now."""
    batches = []

    def record(*args):
        batches.append(args[4])
        if len(batches) == 3:
            raise KeyboardInterrupt

    recorded(monkeypatch, training, "dpo_training_step", record)
    with pytest.raises(KeyboardInterrupt):
        result_of(root, tmp_path, "dpo", {**BASE["dpo"], "steps": 4})
    cli.resume(tmp_path / "run")
    assert len(batches) == 5 and batches[2].pairs == batches[3].pairs
    for pairs, *scores, votes in batches:
        assert votes is None
        for actual, right in zip(scores, reference_scores(root, "other", pairs), strict=True):
            assert actual == pytest.approx(right, rel=1e-9)
