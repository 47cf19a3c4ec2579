"""The README does what it shows: otherwise a reader's first contact is with something false."""

import contextlib
import io
import itertools
import json
import math
import re
import shlex
import statistics
from pathlib import Path

from hypothesis import settings

import minidpo
from benchmarks import speed
from benchmarks.workload import SIZES as SIZES_OF_SPEED
from minidpo.cli import desk, main
from minidpo.theory import assumptions, equalities, frontier
from test_demo import SIZES

README = (Path(__file__).parents[1] / "README.md").read_text()
SOURCE = Path(minidpo.__file__).parent


def test_each_example_prints_what_stands_below_it():
    """Otherwise the numbers on the first screen are decoration."""
    examples = re.findall(r"```python\n(.*?)```\n+```\n(.*?)```", README, re.DOTALL)
    assert len(examples) == README.count("```python") == 3
    for code, output in examples:
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(code, "README.md", "exec"), {})
        assert printed.getvalue() == output


def test_the_three_columns_are_equal():
    """Otherwise the first thing that the project shows is a disagreement."""
    for row in re.findall(r"^dL/d\w+ +(.*)$", README, re.MULTILINE):
        assert len(set(row.split())) == 1 and len(row.split()) == 3


def test_line_counts_are_true():
    """Otherwise the evening is longer than promised."""
    rows = re.findall(r"\[`minidpo/([\w/]+\.py)`\]\(minidpo/([\w/]+\.py)\) \| (\d+) \|", README)
    for name, link, lines in rows:
        assert name == link and int(lines) == len((SOURCE / name).read_text().splitlines()), name
    listed = {name for name, _, _ in rows}
    assert listed == {str(path.relative_to(SOURCE)) for path in SOURCE.rglob("*.py") if not path.name.startswith("__")}


def test_the_commands_exist(tmp_path, monkeypatch):
    """Otherwise the first command that a newcomer types fails. (The others are run as they stand by CI.)"""
    commands = [shlex.split(line) for line in re.findall(r"^(?:python -m )?minidpo (.*)", README, re.MULTILINE)]
    assert len(commands) == 17
    (tmp_path / "names.txt").write_text("emma\nmia\nava\n")
    rows = [{"prompt": f"my order is late.{i}\n", "chosen": f"sorry{i}", "rejected": f"no{i}"} for i in range(6)]
    for name in ("pairs.jsonl", "more.jsonl"):
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(desk, "FULL", SIZES)
    monkeypatch.setattr(equalities, "EQUALITIES", equalities.EQUALITIES[:3])
    monkeypatch.setattr(assumptions, "what_breaks_it", lambda world, seed: [])
    steps = ["--steps", "1"]
    shorter = {"check": ["--cases", "1"], "pretrain": steps, "sft": steps, "dpo": steps, "judge": ["--replies", "5"]}
    shorter["frontier"] = ["--worlds", "1"]
    for arguments in commands:
        with contextlib.redirect_stdout(io.StringIO()):
            assert main([*arguments, *shorter.get(arguments[0], [])]) == 0, arguments


def test_the_figures_of_the_demo_are_those_that_its_benchmark_wrote():
    """Otherwise the table on the front door is of another day. What the models say is that of the first seed."""
    runs = json.loads((Path(__file__).parents[1] / "benchmarks" / "results" / "demo.json").read_text())
    assert [run["seed"] for run in runs] == [0, 1, 2]
    for line in runs[0]["dialogue"]:
        assert f"\n{line}\n" in README
    names = {"true reward": "reward", "well formed": "well_formed", "on topic": "on_topic", "KL to SFT, nats": "kl"}
    names |= {name: name.replace(" ", "_") for name in ("polite", "wrongly declined", "wrongly answered")}
    shown = re.findall(r"^\| ([\w ,]+) \| (.*? ± .*) \|$", README, re.MULTILINE)
    assert [name for name, _ in shown] and {name for name, _ in shown} == set(names)
    for name, cells in shown:
        columns = [[run["models"][i][names[name]] for run in runs] for i in range(3)]
        columns.append([run["collapse"][names[name]] for run in runs])
        for cell, values in zip(cells.split(" | "), columns, strict=True):
            mean, spread = (float(number) for number in cell.split(" ± "))
            assert abs(mean - statistics.fmean(values)) < 0.00501 and abs(spread - statistics.stdev(values)) < 0.00501
    accuracies = {
        stage: statistics.fmean(run["measured"][stage]["eval_rewards/accuracies"] for run in runs)
        for stage in ("collapse", "dpo")
    }
    prose = " ".join(README.split())
    assert f"ranks {accuracies['collapse']:.2f} of the held-out pairs as labelled" in prose
    assert f"DPO model's {accuracies['dpo']:.2f}" in prose
    seconds = [run["seconds"] for run in runs]
    assert f"The demo took {min(seconds):.0f} to {max(seconds):.0f} seconds" in prose


def test_the_figures_of_speed_are_those_that_the_benchmark_wrote():
    """Otherwise the table of speed is of another day, or of other contenders."""
    told = json.loads((Path(__file__).parents[1] / "benchmarks" / "results" / "speed.json").read_text())
    rows = {name: cells.split(" | ") for name, cells in re.findall(r"^\| ([^|]+) \| (\d.*) \|$", README, re.MULTILINE)}
    eager, recipe = "PyTorch eager, padded", "PyTorch eager, our recipe"
    expected = {
        "time, the same algorithm": ("step", "minidpo, padded", eager, "seconds"),
        "time, our recipe": ("step", "minidpo", eager, "seconds"),
        "time, our recipe, of PyTorch's with our recipe": ("step", "minidpo", recipe, "seconds"),
        "time, PyTorch that keeps memory as we do": ("step", f"{eager}, memory kept", eager, "seconds"),
        "time, our recipe, of its matrix products alone": ("step", "minidpo", "minidpo, products alone", "seconds"),
        "peak memory, our recipe": ("step", "minidpo", eager, "peak_mib"),
        "time a token, sampling one text with a cache": ("sampling", "minidpo", "PyTorch eager", "seconds"),
    }
    for name, (suite, ours, theirs, key) in expected.items():
        ratios = [speed.ratio(told[suite][size], ours, theirs, key) for size in SIZES_OF_SPEED]
        assert rows[name] == [f"{ratio:.2f}" for ratio in ratios], name
    assert rows["a step of our recipe, ms"] == [
        f"{1e3 * told['step'][size]['minidpo']['median']:.0f}" for size in SIZES_OF_SPEED
    ]
    measured = [result for suite in ("step", "sampling") for size in SIZES_OF_SPEED for name, result
                in told[suite][size].items() if name.startswith(("minidpo", "PyTorch"))]  # fmt: skip
    assert all(len(result["seconds"]) == 15 for result in measured)
    grown = [result for points in told["growth"].values() for point in points for result in point["results"].values()]
    assert all(all(result["quiet"]) for result in measured + grown)
    assert told["rounds"] == 15 and all(
        result["error"] < speed.TOLERANCE
        for size in SIZES_OF_SPEED
        for name, result in told["step"][size].items()
        if name != "minidpo, products alone"
    )


def test_each_stage_is_better_than_the_one_before_in_every_seed():
    """By more than twice the standard error: otherwise "watch it become a preferred one" shows noise."""
    for run in json.loads((Path(__file__).parents[1] / "benchmarks" / "results" / "demo.json").read_text()):
        for before, after in itertools.pairwise(run["models"]):
            gained = after["reward"] - before["reward"]
            assert gained > 2 * math.hypot(before["reward_error"], after["reward_error"])


def test_the_number_of_runs_is_true():
    """Otherwise the reading list promises another picture, or the theory is executed on another world."""
    world = equalities.small_world(0)
    assert f"all {len(world.responses)} responses of a small world to three prompts" in README
    assert len(world.prompts) == 3
    assert f"{len(list(frontier.policies(equalities.small_world(0, 2, 2), 0)))} runs a world" in README.replace(
        "thirty-five", "35"
    )


def test_thorough_draws_a_hundred_times_as_many():
    """Otherwise `thorough` is another name for the same."""
    assert "a hundred\ntimes as many" in README
    thorough, dev = settings.get_profile("thorough"), settings.get_profile("dev")
    assert thorough.max_examples == 100 * dev.max_examples and dev.derandomize and not thorough.derandomize


def test_the_files_it_names_exist():
    """Otherwise a link leads nowhere."""
    here = Path(__file__).parent
    for name in re.findall(r"tests/(\w+\.py)", README):
        assert (here / name).exists(), name
