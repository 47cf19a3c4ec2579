"""The pages do what they show: every command, figure and count on them is held true."""

import contextlib
import inspect
import io
import itertools
import json
import operator
import re
import shlex
import statistics
from pathlib import Path

import pytest
from hypothesis import settings

import minidpo
from benchmarks import __main__ as measured
from benchmarks import demo as desk_runs
from benchmarks import family as eight
from benchmarks import gpu, mutants, sampling, speed, story
from benchmarks import ppo as beside
from benchmarks.workload import SIZES as SIZES_OF_SPEED
from minidpo import Tensor, cli, explain, losses
from minidpo.cli import desk, parser, train
from minidpo.run import report
from minidpo.theory import assumptions, equalities, frontier
from test_demo import SIZES

ROOT = Path(__file__).parents[1]
SOURCE = Path(minidpo.__file__).parent
README, HOUSE = (ROOT / "README.md").read_text(), (SOURCE / "README.md").read_text()
BENCHMARKS, COURSE = (ROOT / "benchmarks" / "README.md").read_text(), (ROOT / "tutorials" / "README.md").read_text()
WAYS = (ROOT / "tutorials" / "WAYS.md").read_text()
PAGES = {"README.md": README, "minidpo": HOUSE, "benchmarks": BENCHMARKS, "tutorials": COURSE, "ways": WAYS}
RESULTS = ROOT / "benchmarks" / "results"
RUNS = json.loads((RESULTS / "demo.json").read_text())


def test_the_front_door_is_short():
    """A newcomer reads the README in a quarter of an hour."""
    assert len(README.split()) <= 1700


def test_the_demo_takes_one_time():
    """README, the benchmarks and the command say the same duration."""
    pages = README, BENCHMARKS, cli.demo.__doc__
    assert [re.findall(r"takes\s+about (\d+) CPU seconds", page)[:1] for page in pages] == [["240"]] * 3


EXAMPLES = [
    (page, *example)
    for page in ("README.md", "minidpo")
    for example in re.findall(r"```python\n(.*?)```\n+```\n(.*?)```", PAGES[page], re.DOTALL)
]


@pytest.mark.parametrize(
    ("page", "code", "output"), EXAMPLES, ids=[f"{page}{i}" for i, (page, *_) in enumerate(EXAMPLES)]
)
def test_each_example_prints_what_is_below_it(page, code, output):
    """Numbers beside code are its output."""
    if "import torch" in code:
        pytest.importorskip("torch")
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(code, page, "exec"), {})
    assert printed.getvalue() == output


def test_every_block_of_python_is_an_example():
    """No code stands on these pages without its output."""
    assert [page for page, *_ in EXAMPLES] == ["README.md"] * 2 + ["minidpo"] * 2
    assert all(PAGES[page].count("```python") == 2 for page in ("README.md", "minidpo"))


def test_the_three_columns_are_equal():
    """Autograd, closed form and finite difference agree to the last printed digit."""
    rows = re.findall(r"^dL/d\w+ +(.*)$", README, re.MULTILINE)
    assert len(rows) == 2
    for row in rows:
        assert len(set(row.split())) == 1 and len(row.split()) == 3


def test_the_figure_is_the_graph_of_equation_7():
    """The Mermaid figure is what `explain.graph` makes of the pair below it."""
    names = ("logp_w", "logp_l", "ref_logp_w", "ref_logp_l")
    logps = [Tensor(logp, requires_grad=True) for logp in (-10.0, -15.0, -12.0, -14.0)]
    graph = explain.graph(losses.dpo_loss(*logps, beta=0.1).loss, dict(zip(names, logps)))
    assert f"```mermaid\n{graph.mermaid()}```" in README


def test_line_counts_are_true():
    """The evening is as long as promised, and every file is on the house's list."""
    spine = re.findall(r"^\| \d \| \[`(\w+\.py)`\]\(minidpo/(\w+\.py)\) \| (\d+) \|", README, re.MULTILINE)
    assert len(spine) == 8
    rows = re.findall(r"\[`(\w+\.py)`\]\(([\w/]+\.py)\) \| (\d+) \|", HOUSE)
    for name, link, lines in [*spine, *rows]:
        assert name == Path(link).name and int(lines) == len((SOURCE / link).read_text().splitlines()), link
    listed = {link for _, link, _ in rows}
    assert listed == {str(path.relative_to(SOURCE)) for path in SOURCE.rglob("*.py") if not path.name.startswith("__")}
    sizes = {name: str(len((SOURCE / f"{name}.py").read_text().splitlines())) for name in ("tensor", "ops")}
    assert f"The engine is {sizes['tensor']} lines, the derivatives {sizes['ops']}" in " ".join(README.split())


@pytest.mark.slow
def test_the_commands_exist(tmp_path, monkeypatch):
    """Every command on a page runs, shortened where it is long. (CI runs those of "Run it" as they are.)"""
    lines = [line for page in PAGES.values() for line in page.splitlines() if line.startswith("minidpo ")]
    commands = list(dict.fromkeys(tuple(shlex.split(line)[1:]) for line in lines))
    assert {name for name, *_ in commands} >= {"demo", "check", "explain", "sft", "dpo", "evaluate", "sample", "judge"}
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(desk, "FULL", SIZES)
    monkeypatch.setattr(equalities, "EQUALITIES", equalities.EQUALITIES[:3])
    monkeypatch.setattr(assumptions, "cases", lambda world, seed: [])
    steps = ["--steps", "1"]
    shorter = {"check": ["--cases", "1"], "sft": steps, "dpo": steps, "judge": ["--replies", "5"]}
    for command in commands:
        with contextlib.redirect_stdout(io.StringIO()):
            assert cli.main([*command, *shorter.get(command[0], [])]) == 0, command


def test_what_a_page_names_exists():
    """Links lead somewhere; commands in prose are commands."""
    folders = {name: ROOT / name for name in ("benchmarks", "tutorials")}
    folders |= {"README.md": ROOT, "minidpo": SOURCE, "ways": ROOT / "tutorials"}
    for page, text in PAGES.items():
        for target in re.findall(r"\]\(([\w./-]+)(?:#[\w-]*)?\)", text) + re.findall(r'(?:src|srcset)="([^"]+)"', text):
            inside, from_root = folders[page] / target, target.removeprefix("../")
            installed = SOURCE / from_root.removeprefix("minidpo/") if from_root.startswith("minidpo/") else inside
            beside = ROOT / from_root  # a page of the package names a file of the repository
            assert inside.exists() or installed.exists() or beside.exists(), f"{page}: {target}"
        for name in re.findall(r"[`\"]minidpo (\w+)", text):
            assert name in parser.COMMANDS, f"{page}: {name}"
        for name in re.findall(r"tests/(\w+\.py)", text):
            assert (ROOT / "tests" / name).exists(), name


def test_durations_are_cpu_seconds():
    """A page or a help says how long something takes in CPU seconds, which others' work on the machine leaves alone."""
    helps = [parser.parser(name).format_help() for name in parser.COMMANDS]
    texts = [" ".join(text.split()) for text in (*PAGES.values(), *helps)]
    number = r"(?:\d|\b(?:about an?|two|three|five|seven|ten|few|several|half a))"
    times = [each for text in texts for each in re.findall(rf"{number} ((?:CPU )?(?:second|minute|hour)s?)\b", text)]
    assert len(times) >= 4 and set(times) == {"CPU seconds"}
    assert "CPU seconds there are of an AMD EPYC" in parser.overview().format_help()


def test_pictures_are_small():
    """A page loads on a phone."""
    for picture in [*RESULTS.glob("*.png"), *(ROOT / "tutorials" / "pictures").glob("*.png")]:
        assert picture.stat().st_size < 150_000, picture


def mean(values):
    """The mean over the seeds, as prose gives it."""
    return f"{statistics.fmean(values):z.2f}"


def test_the_figures_of_the_demo_are_those_that_its_benchmark_wrote():
    """Tables, dialogue and failures are of the committed runs; the replies are those of the first seed."""
    assert [run["seed"] for run in RUNS] == [0, 1, 2]
    blocks = README.split("```")
    block = next(part for part in blocks if "(ordinary)\n" in part).strip("\n").splitlines()
    assert len(block) == 16 and set(block) <= set(RUNS[0]["dialogue"])
    block = next(part for part in blocks if "the worst 5\n" in part).strip("\n").splitlines()
    faults = RUNS[0]["failures"]
    assert block == faults[faults.index("the worst 5") :][:11]
    for table in (desk_runs.as_table, desk_runs.as_templates, desk_runs.as_best_of, desk_runs.as_edits):
        assert table(RUNS) in BENCHMARKS, table.__name__
    section = " ".join(BENCHMARKS[BENCHMARKS.index("## The demo") : BENCHMARKS.index("## The default")].split())
    (seconds,) = re.findall(r"It takes (about \d+ CPU seconds)", inspect.getdoc(cli.demo))
    assert f"The demo takes {seconds} (`minidpo --help` names the processor)" in section


def test_what_is_said_of_the_collapse_is_measured():
    """Its range, its replies and its accuracy are those of the three runs."""
    front, section = (" ".join(text.split()) for text in (README, BENCHMARKS))
    rewards = [[model["all"]["reward"][0] for model in run["models"].values()] for run in RUNS]
    columns = list(zip(*rewards))
    assert f"anywhere from {min(columns[3]):.2f} to {max(columns[3]):.2f} in these three" in front
    spreads = [statistics.stdev(column) for column in columns]
    assert max(spreads) == spreads[3]  # "How far differs most between seeds"
    garbled = [run["models"]["DPO, collapsed"]["all"]["garbled"][0] for run in RUNS]
    assert statistics.fmean(garbled) > 0.5  # "on average more than half of its replies"
    found = {stage: [run["measured"][stage] for run in RUNS] for stage in ("dpo", "collapse")}
    ranks = {k: [x["rewards/accuracies"] + x["rewards/ties"] / 2 for x in each] for k, each in found.items()}
    shares = [re.findall(r"(?:true reward ranks|can expect is) (.....)", run["facts"][2]) for run in RUNS]
    true, most = (mean(map(float, column)) for column in zip(*shares, strict=True))
    assert (
        f"ranks {mean(ranks['collapse'])} of the test pairs as labelled, the DPO model's {mean(ranks['dpo'])}"
        in section
    )
    assert f"the true reward {true}, ties counted as one half" in section
    assert f"no ranking can expect more than {most}" in section
    for run in RUNS:  # the accuracy rises after the first evaluation, too, and the true reward ends below SFT's
        first, second, *_, last = run["collapse"]
        assert last["eval_rewards/accuracies"] > second["eval_rewards/accuracies"] + 0.05
        assert last["eval_judge/reward"] < first["eval_judge/reward"] - 1


def test_what_is_said_of_templates_calibration_and_pressure_is_measured():
    """DPO loses without the final stop, is under-confident, and its best of 64 gain little over its best of 32."""
    section, front = " ".join(BENCHMARKS.split()), " ".join(README.split())
    without = [run["templates"]["without its stop"]["gain"] for run in RUNS]
    assert all(gain < 0 for gain, _, _ in without)  # in every seed
    closing = [run["templates"]["another closing"]["gain"][0] for run in RUNS]
    assert max(closing) < 0.05 and statistics.fmean(closing) < 0  # "keeps nothing", as audit's page says of both
    lost = mean([-gain for gain, _, _ in without])
    assert f"DPO is {lost} below SFT" in front and f"by {lost} in the mean" in section
    found = [run["measured"]["dpo"]["calibration"] for run in RUNS]
    assert f"a temperature of {mean([x['temperature'] for x in found])}" in section
    assert f"its slope in the true reward gap is {mean([x['truth']['gap_slope'] for x in found])}" in section
    assert all(each["slope"] - 3 * each["slope_error"] > 1 for each in found)  # under-confident, in every seed
    best = {row["size"]: [run["best_of"][i]["true"][0] for run in RUNS] for i, row in enumerate(RUNS[0]["best_of"])}
    assert f"{mean(best[32])} at N = 32 and {mean(best[64])} at 64" in section
    edits = {
        kind: [sum(run["edits"][kind][name] for run in RUNS) for name in ("n", "both")] for kind in RUNS[0]["edits"]
    }
    inside = [edits[kind] for kind in edits if kind.startswith("another")]
    n, both = (sum(column) for column in zip(*inside))
    assert f"{both} of {n:,} edits within the grammar" in section
    n, both = (sum(column) for column in zip(*(edits[kind] for kind in edits if kind.startswith("a letter"))))
    assert f"{both / n:.0%} of the misspellings" in section
    n, both = edits["a second closer"]
    assert f"{both / n:.0%} of the repeated closers" in section


@pytest.mark.parametrize(
    ("page", "sentence", "verdicts"),
    [
        ("README.md", "With a likelihood term replies stay well formed even at beta 0.1",
         {"an NLL term prevents collapse": "yes"}),
        ("README.md", "without one the reference does not prevent the collapse",
         {"the reference prevents collapse": "no"}),
        ("tutorials/11_beta.py", "grow equally fast at first, whatever beta, and a larger beta still ends closer",
         {"a larger beta is faster in the first steps, as under SGD": "no", "a larger beta ends closer to SFT": "yes"}),
        ("tutorials/06_naive_reward.py", "replies do not become shorter, and they fall apart with a reference, too",
         {"without a reference replies become shorter": "no", "the reference prevents collapse": "no"}),
    ],
)  # fmt: skip
def test_what_other_pages_say_of_the_story_has_its_verdict(page, sentence, verdicts):
    """A sentence elsewhere that rests on the story is there, and the story's verdict is the one that it needs."""
    text = " ".join((ROOT / page).read_text().replace("\n#", "\n").split())
    assert sentence in text
    results = json.loads((RESULTS / "story.json").read_text())
    found = {claim.sentence: claim.verdict for claim in story.claims(results)}
    assert {name: found[name] for name in verdicts} == verdicts


def test_what_is_said_of_ppo_is_measured():
    """Its tables are those of the JSON, and so are the figures in the sentences beside them."""
    document = json.loads((RESULTS / "ppo.json").read_text())
    section = BENCHMARKS.partition("## PPO beside DPO")[2].partition("\n## ")[0]
    for table in (beside.as_table(document), beside.as_memory(document)):
        assert f"\n\n{table}\n\n" in section
    text = " ".join(section.split())

    def at(name, column, place=-1):
        return [run["rows"][place][column] for run in document["runs"] if run["name"] == name]

    fmean = statistics.fmean
    true, learned, dpo, nll = "PPO, true reward", "PPO, learned reward", "DPO", "DPO and 2 NLL"
    small, head = f"{learned}, beta 0.02", f"{learned}, critic a head"
    models = [[model[name] for model in document["reward models"]] for name in document["reward models"][0]]
    accuracy, most, correlation = map(fmean, models)
    seconds = {name: fmean(at(name, "seconds")) / document["sizes"]["steps"] for name in (learned, head, dpo)}
    spread = {name: statistics.stdev(at(name, "reward")) for name in (true, learned, small, dpo, nll)}
    sft, each = fmean(at(dpo, "reward", 0)), at(dpo, "reward")

    def less(first, second):
        return eight.interval([a - b for a, b in zip(at(first, "reward"), at(second, "reward"))], 2)

    assert all(a < b for a, b in zip(at(learned, "reward"), at(nll, "reward")))
    best = beside.optima(0, [0.2])[0]
    parts = [value for name, value in document["memory"].items() if name != "parameters"]
    sums = [sum(sum(kinds.values()) for kinds in part["held"].values()) for part in parts]
    peaks = [max(part["peak"].values()) for part in parts]
    shares = [peak / held for peak, held in zip(peaks, sums)]
    for sentence in (
        f"PPO ends at {fmean(at(true, 'reward')):.2f}, with the learned one at {fmean(at(learned, 'reward')):.2f}.",
        f"ranks {accuracy:.2f} of the test pairs as labelled (the true reward {most:.2f}), and its correlation with "
        f"the true reward is {correlation:.2f}",
        f"takes {seconds[learned]:.1f} CPU seconds with its own critic and a learned reward, {seconds[head]:.1f} with "
        f"a critic head and {seconds[dpo]:.1f} in DPO: for as many texts PPO takes "
        f"{seconds[learned] / seconds[dpo]:.0f} times as long",
        f"below DPO with the NLL term ({fmean(at(nll, 'reward')):.2f}). DPO alone ends at {fmean(each):.2f} in the "
        f"mean, at {min(each):.2f} in one seed and {max(each):.2f} in another: its spread is the largest",
        f"is {spread[learned]:.2f} with the learned reward and {spread[true]:.2f} with the true one, {spread[dpo]:.2f} "
        f"for DPO alone and {spread[nll]:.2f} with the NLL term. At beta 0.02 PPO's is {spread[small]:.2f}.",
        f"PPO with the learned reward less DPO alone is {less(learned, dpo)}",
        f"PPO gains {less(true, nll)} more than DPO with the NLL term",
        f"in the mean ({fmean(at(true, 'kl')):.2f}) for less reward, with the learned reward less KL "
        f"({fmean(at(learned, 'kl')):.2f}) for still less",
        f"rises from {fmean(at(small, 'learned', 0)):.2f} to {fmean(at(small, 'learned')):.2f}, more than at 0.2 "
        f"({fmean(at(learned, 'learned')):.2f}), while the true one ends at {fmean(at(small, 'reward')):.2f}",
        f"KL is {fmean(at(small, 'kl')):.2f} nats there",
        f"over SFT's {sft:.2f}",
        f"Training alone takes about {sum(r['rows'][-1]['seconds'] for r in document['runs']):,.0f}"[:-2] + "00 CPU",
        f"a true reward of {best['reward']:.2f} at a KL of {best['kl']:.2f}",
        f"A model here has {document['memory']['parameters']:,} parameters",
        "holds twice what DPO holds, as [tutorial 14](../tutorials/14_memory_and_speed.py) computes",
        f"With a critic head it is {sums[1] / sums[2]:.1f} times",
        f"are {min(shares):.0f} to {max(shares):.0f} times what the models hold",
        f"are {peaks[0] / peaks[2]:.1f} times DPO's",
    ):
        assert sentence in text, sentence
    assert (
        round(sums[0] / sums[2], 2) == 2 and fmean(at(head, "reward")) - sft < (fmean(at(learned, "reward")) - sft) / 2
    )
    below = [own < start for own, start in zip(at(small, "reward"), at(small, "reward", 0))]
    assert below.count(True) == 1 and fmean(at(true, "kl")) > best["kl"]
    assert spread[dpo] == max(statistics.stdev(at(name, "reward")) for name in beside.RUNS)


def test_the_table_of_eight_losses_is_that_of_its_json():
    """Eight losses, three declared settings each, three seeds, and the default budget of `minidpo dpo`."""
    results = json.loads((RESULTS / "family.json").read_text())
    table = eight.as_table(results["runs"])
    assert table in BENCHMARKS
    rows = [line.strip("| ").split(" | ") for line in table.splitlines()[2:]]
    gains = {(row[0], row[1]): [float(x) for x in row[-1].split(" ± ")] for row in rows}
    assert {name for (name, _), (gain, half) in gains.items() if abs(gain) > half > 0} == {"orpo"}
    nats = [float(row[3].split(" ± ")[0]) for row in rows]
    assert rows[nats.index(min(nats))][:2] == ["orpo", "0.1, default"]
    others = [x for x, row in zip(nats, rows) if row[0] != "orpo"]
    assert (min(others), max(others)) == (0.26, 0.62) and "by 0.26 to 0.62 nats" in BENCHMARKS
    sft = statistics.fmean(each["reward"] for each in results["sft"].values())
    assert f"the SFT models' true reward is {sft:.2f};" in " ".join(BENCHMARKS.split())
    runs = {(run["seed"], run["loss"], run["beta"]) for run in results["runs"]}
    assert runs == {(seed, name, beta) for seed in range(3) for name, betas in eight.BETAS.items() for beta in betas}
    assert len(runs) == len(results["runs"]) == 72 and results["budget"] == eight.BUDGET
    default = {name: p.default for name, p in inspect.signature(cli.dpo).parameters.items()}
    assert all(default[name] == value for name, value in eight.BUDGET.items())


def test_the_usual_story_is_that_of_its_json():
    """Tables, verdicts and prose are of 42 runs of one budget; what is said of every seed is true of every seed."""
    results = json.loads((RESULTS / "story.json").read_text())
    for table in (story.verdicts(results), *story.tables(results)):
        assert table in BENCHMARKS
    assert (
        results["budget"] == story.BUDGET
        and results["prompts"] == story.PROMPTS
        and list(results["sft"]) == ["0", "1", "2"]
    )
    assert [(row["seed"], row["run"]) for row in results["runs"]] == list(itertools.product(range(3), story.RUNS))
    section = " ".join(BENCHMARKS[BENCHMARKS.index("## The usual story") : BENCHMARKS.index("## Speed")].split())
    seconds = sum(each["cpu_seconds"] for each in (*results["runs"], *results["sft"].values()))
    assert f"It takes about {round(seconds, -3):,.0f} CPU seconds" in section

    def of(name, column):
        return story.values(results, name, "last", column)

    def means(column, names, digits=2):
        figures = [f"{statistics.fmean(of(name, column)):z.{digits}f}" for name in names]
        return figures[0] if len(figures) == 1 else f"{', '.join(figures[:-1])} and {figures[-1]}"

    dpo, nll, free = "beta 0.1", "beta 0.1 nll", "no reference"
    betas = [f"beta {beta:g}" for beta in story.BETAS]
    true = mean(story.values(results, "SFT", "", "length_true"))
    for sentence in (
        f"with length is {means('length_logp', ['SFT'])}, the true reward's is {true}.",
        f"replies grow from {means('length', ['SFT'], 1)} tokens to {means('length', [free], 1)},",
        f"the correlation of log pi turns to {means('length_logp', [free])}.",
        f"With SFT as the reference they grow too, to {means('length', [dpo], 1)}.",
        f"log pi has {means('length_logp', [nll])} and the implicit reward {means('length_reward', [nll])}: "
        f"about a third of the distance to the true reward's {true}.",
        f"nothing left to cancel, since log pi has {means('length_logp', [dpo])}.",
        f"At the end {means('well_formed', [dpo])} of the replies are well formed with it and "
        f"{means('well_formed', [free])} without it, of SFT's {means('well_formed', ['SFT'])},",
        f"{means('accuracy', [dpo, free])} of the test pairs are ranked as labelled, "
        f"{means('accuracy', ['sft chosen'])} by SFT on the chosen responses at a KL of {means('kl', ['sft chosen'])}.",
        "a true reward of {:.2f}, {:.2f} and {:.2f}.".format(*of("beta 0.2", "reward")),
        f"KL to SFT is {means('kl', betas)} from beta 0.05 to 1.",
        f"With the NLL term it is {means('kl', [f'{name} nll' for name in betas])}, largest in the middle",
        f"{means('well_formed', [nll])} well formed, and a true reward of {means('reward', [nll])}.",
        f"SFT on the chosen responses gets {means('reward', ['sft chosen'])}, in the mean more than DPO alone",
        f"At beta 0.5 and 1 DPO alone gets {means('reward', betas[3:])}.",
    ):
        assert sentence in section, sentence
    chosen = statistics.fmean(of("sft chosen", "reward"))
    assert [statistics.fmean(of(name, "reward")) < chosen for name in betas] == [True] * 3 + [False] * 2
    below = [sum(map(operator.lt, of(name, "reward"), of("SFT", "reward"))) for name in (free, *betas)]
    assert below == [3, 3, 3, 1, 0, 0]  # "both end below SFT's in every seed", "in one at 0.2"
    assert {row["best"]["step"] for row in results["runs"] if row["run"] in (dpo, free)} == {results["budget"]["steps"]}
    for seed in range(3):  # "at step 20 it is the larger, the smaller beta is"
        runs = {row["run"]: row["curve"][1] for row in results["runs"] if row["seed"] == seed and "curve" in row}
        assert runs[dpo]["step"] == 20
        assert all(runs[a]["margin"] > runs[b]["margin"] for a, b in itertools.pairwise(betas))


def test_the_figures_beside_trl_are_those_of_their_json():
    """Times and ratios are the medians of the turns in trl.json, all of which reached the same loss."""
    results = json.loads((RESULTS / "trl.json").read_text())
    ours, theirs = (results["turns"][name] for name in ("minidpo", "TRL"))
    assert len(ours) == len(theirs) == results["rounds"] == 3
    assert max(abs(a["loss"] - b["loss"]) for a in ours for b in theirs) < 1e-4
    for words, name, factor, digits in (
        ("100 steps, s", "stage", 1, 0), ("the same with imports, s", "stage with imports", 1, 0),
        ("a token of one text, ms", "token, B = 1", 1000, 2),
        ("a token of each of 32 texts, ms", "token, B = 32", 1000, 2),
    ):  # fmt: skip
        a, b = (statistics.median(turn[name] * factor for turn in turns) for turns in (ours, theirs))
        ratio = statistics.median(x[name] / y[name] for x, y in zip(ours, theirs, strict=True))
        assert f"| {words} | {a:.{digits}f} | {b:.{digits}f} | {ratio:.2f} |" in BENCHMARKS, words


def test_the_table_of_sampling_is_that_of_its_json():
    """Sizes, turns, threads and kernels are those of the run, each quiet; with few rows the lean loop is quicker."""
    results = json.loads((RESULTS / "sampling.json").read_text())
    assert sampling.as_table(results) in BENCHMARKS
    environment = results["environment"]
    assert results["rounds"] == 5 and environment["threads"] == environment["cores"] == 2
    assert "AMD EPYC" in environment["cpu"] and "Haswell" in environment["blas"]
    suites = [[results[suite][size] for size in sampling.SIZES] for suite in sampling.SUITES.values()]
    assert all(all(result["quiet"]) for suite in suites for each in suite for result in each.values())
    one, many = ([speed.ratio(each, "minidpo", "PyTorch eager") for each in suite] for suite in suites)
    assert min(*one, many[0]) > 1 > max(many[1:])


def test_the_table_of_a_gpu_is_that_of_its_json():
    """Device, versions and kernels are those of the run; every turn was quiet, and each step correct."""
    figures = json.loads((RESULTS / "gpu.json").read_text())
    section = " ".join(BENCHMARKS[BENCHMARKS.index("## On a GPU") :].split())
    assert gpu.as_table(figures) in BENCHMARKS and list(figures["step"]) == ["tiny", "small", "medium"]
    device, torch = figures["device"], figures["environment"]["torch"]
    assert device == "NVIDIA H100 80GB HBM3"
    assert f"an NVIDIA H100 with CuPy {figures['cupy']} and PyTorch {torch}." in section
    results = [result for each in figures["step"].values() for result in each.values()]
    assert all(all(result["quiet"]) and result["error"] < speed.TOLERANCE for result in results)
    turns = {size: {len(result["seconds"]) for result in each.values()} for size, each in figures["step"].items()}
    assert turns == {"tiny": {5}, "small": {7}, "medium": {5}}
    times = [each["minidpo"]["kernels"] / each[measured.BASELINE]["kernels"] for each in figures["step"].values()]
    assert 6 < min(times) and max(times) < 7 and "six to seven times as many" in section
    best = figures["step"]["small"]["PyTorch eager, our recipe"]
    lean = figures["step"]["small"][measured.LEAN]
    assert (
        f"block by block, starts {best['kernels']:,} kernels at small and takes {1e3 * best['median']:.0f} ms; "
        f"padded it starts {lean['kernels']} and takes {1e3 * lean['median']:.0f} ms."
    ) in section


def test_the_default_of_dpo_is_the_best_setting_that_is_always_healthy():
    """No default falls below SFT: rate and steps are chosen on the desk, by rule, over three seeds."""
    results = json.loads((RESULTS / "defaults.json").read_text())
    settings = {}
    for run in results["runs"]:
        settings.setdefault((run["learning_rate"], run["steps"]), []).append(run)
    assert len(settings) == 10 and all(len(runs) == 3 for runs in settings.values())

    def healthy(run):
        models = (run["best"], run["last"])
        sft = results["sft"][str(run["seed"])]["reward"]
        return all(model["well_formed"] >= 0.9 and model["reward"] >= sft for model in models)

    def mean(runs, model, name):
        return statistics.fmean(run[model][name] for run in runs)

    always = [key for key, runs in settings.items() if all(map(healthy, runs))]
    best = max(always, key=lambda key: mean(settings[key], "best", "reward"))
    default = {name: p.default for name, p in inspect.signature(cli.dpo).parameters.items()}
    assert (default["learning_rate"], default["steps"]) == best
    assert (default["loss"], default["nll_weight"]) == ("dpo", 0.0)
    assert train.preference_loss("dpo", default["label_smoothing"], default["beta"]) == (losses.Choice("dpo"), 0.1)
    rises = {
        good: [run["last"]["chosen_rise"] for run in results["runs"] if healthy(run) is good] for good in (False, True)
    }
    assert max(rises[True]) < 0.0095 and sum(rise <= report.CHOSEN_LOSS_WARNING for rise in rises[False]) == 1
    rows = re.findall(
        r"^\| (\S+) \| (\d+) \| (.*?) \| (.*?) \| (.*?) \| (.*?) \| (\d) of 3 \|$", BENCHMARKS, re.MULTILINE
    )
    assert len(rows) == len(settings)
    for rate, steps, *cells, count in rows:
        runs = settings[float(rate), int(steps)]
        columns = [("best", "reward"), ("last", "reward"), ("last", "well_formed"), ("last", "chosen_rise")]
        for cell, (model, name) in zip(cells, columns, strict=True):
            number, spread = map(float, cell.split(" ± "))
            assert number == pytest.approx(mean(runs, model, name), abs=0.0051)
            assert spread == pytest.approx(statistics.stdev(run[model][name] for run in runs), abs=0.0051)
        assert int(count) == sum(map(healthy, runs))
    assert all(0.63 < run["last"]["accuracy"] < 0.73 for run in results["runs"])  # "about 0.68 in all of them"


def test_each_stage_is_better_than_the_one_before_in_every_seed():
    """Base, SFT, DPO: each interval is above the one before, in every slice."""
    for run in RUNS:
        for part in run["models"]["SFT"]:
            ends = [run["models"][name][part]["reward"] for name in ("base", "SFT", "DPO")]
            assert all(before[2] < after[1] for before, after in itertools.pairwise(ends)), part


def test_the_figures_of_speed_are_those_that_the_benchmark_wrote():
    """The table of speed is of the committed run: losses agree, every turn of the step is quiet, kernels are named."""
    results = json.loads((RESULTS / "speed.json").read_text())
    assert measured.as_table(results) in BENCHMARKS
    environment = results["environment"]
    assert environment["threads"] == environment["cores"] == 2 and "AMD EPYC" in environment["cpu"]
    assert "Haswell" in environment["blas"] and "Haswell" in environment["blas (AVX2)"]
    timed = {(suite, size, name): result for suite in measured.STEPS for size in SIZES_OF_SPEED
             for name, result in results[suite][size].items()}  # fmt: skip
    quick = {key: result for key, result in timed.items() if min(result["seconds"]) < speed.SLOW}
    assert results["rounds"] == 9 and all(len(result["seconds"]) == 9 for result in quick.values())
    assert all(all(result["quiet"]) for result in timed.values())
    assert all(
        result["error"] < speed.TOLERANCE for (*_, name), result in timed.items() if name != "minidpo, products alone"
    )
    assert results["growth"].keys() == measured.GROWTH.keys()
    points = [point for points in results["growth"].values() for point in points]
    assert all(all(result["quiet"]) for point in points for result in point["results"].values())
    names = " ".join(f'"{name}"' if " " in name else name for name in results["step"]["tiny"])
    assert f"`python -m benchmarks --rounds 9 --names {names}`" in BENCHMARKS


def test_the_tables_of_mutants_are_those_of_their_json():
    """Planted faults are all noticed, and 97 % of the mutants that can be; each survivor has a judgement."""
    document = json.loads((RESULTS / "mutants.json").read_text())
    assert mutants.as_table(document) in BENCHMARKS
    assert [row["name"] for row in document["planted"]] == list(mutants.PLANTED)
    assert all(row["test"].count("[") == row["test"].count("]") for row in document["mutants"] + document["planted"])
    assert f"plants {len(mutants.PLANTED)} faults by hand" in BENCHMARKS
    assert f"All {len(mutants.PLANTED)} are noticed." in BENCHMARKS
    assert all(row["test"] for row in document["planted"])
    assert mutants.survivors(document) in BENCHMARKS
    left = [row for row in document["mutants"] if not row["test"]]
    missed = [row for row in left if not row["judgement"].startswith("equivalent")]
    total = len(document["mutants"])
    assert len(missed) <= 0.03 * (total - len(left) + len(missed))
    assert f"Of a sample of {total} from {document['of']:,} (seed `{document['seed']}`" in BENCHMARKS and total == 150


@pytest.mark.slow
def test_the_number_of_runs_is_true():
    """The house's page counts responses, prompts and runs as the laboratory does."""
    world = equalities.small_world(0)
    assert f"all {len(world.responses)} responses of a small world to three prompts" in HOUSE
    assert len(world.prompts) == 3
    count = len(list(frontier.policies(equalities.small_world(0, 2, 2), 0)))
    assert f"{count} runs a world" in HOUSE.replace("forty-nine", "49")


def test_thorough_draws_a_hundred_times_as_many():
    """`--hypothesis-profile=thorough` is a hundred times `dev`."""
    thorough, dev = settings.get_profile("thorough"), settings.get_profile("dev")
    assert thorough.max_examples == 100 * dev.max_examples and dev.derandomize and not thorough.derandomize
