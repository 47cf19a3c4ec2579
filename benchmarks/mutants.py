"""How many small faults would the tests notice?

python -m benchmarks.mutants [--sample N] [--seed S]

Draws N mutants at random from all that one change in one place of `FILES` can make, runs the quick tests against each
(the file's own first, up to the first failure), and adds the faults of `PLANTED`, in the wiring between a setting and
the number that it should change. Writes benchmarks/results/mutants.json; run again with the same seed, it continues. A
judgement that was written beside a survivor in that file is kept.
"""

import argparse
import ast
import collections
import concurrent.futures
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import minidpo
from benchmarks.speed import processor
from minidpo.audit.intervals import wilson
from minidpo.run.files import write_whole

ROOT = Path(__file__).parents[1]
PACKAGE = Path(minidpo.__file__).parent
RESULTS = ROOT / "benchmarks" / "results" / "mutants.json"
FILES = ("ops", "tensor", "scoring", "losses", "training", "optim")
PAGES = ("test_house", "test_readme", "test_tutorials", "test_benchmarks")  # of texts: they notice any other line
WIRING = [f"tests/test_{name}.py" for name in ("wiring", "options", "demo", "train", "workers", "loop")]
PLANTED = {  # faults in the wiring: what is wrong, the file, and what stands there instead of what
    "beta does not reach the step of dpo": ("cli/train", "settings = strength,", "settings = 0.1,"),
    "beta does not reach the evaluation": ("cli/train", "config, batch, strength,", "config, batch, 0.1,"),
    "the reference's columns are exchanged in the step": (
        "cli/train", "indices], ref_logp_w[indices], ref_logp_l[indices]",
        "indices], ref_logp_l[indices], ref_logp_w[indices]",
    ),
    "the reference's columns are exchanged in the evaluation": (
        "cli/train", "ref_logp_w[count:], ref_logp_l[count:]", "ref_logp_l[count:], ref_logp_w[count:]",
    ),
    "the reference is the policy of now": (
        "cli/train", "ref_logp_w[indices], ref_logp_l[indices], votes",
        "*training.reference_logprobs(policy, config, [pairs[i] for i in indices]), votes",
    ),
    "--reference is not used": ("cli/train", "if reference:\n        ref_params", "if None:\n        ref_params"),
    "the cached scores are in another order": ("run/reference", "counted(pairs, ", "counted(pairs[::-1], "),
    "votes do not reach the step": ("cli/train", "ref_logp_l[indices], votes[indices]", "ref_logp_l[indices]"),
    "nll_weight does not reach the step": ("cli/train", "objective, nll_weight, MAX_NORM", "objective, 0.0, MAX_NORM"),
    "nothing is clipped in dpo": ("cli/train", "nll_weight, MAX_NORM", 'nll_weight, float("inf")'),
    "nothing is clipped in sft": ("cli/train", "optimizer, batch, MAX_NORM", 'optimizer, batch, float("inf")'),
    "dpo clips after its step": (
        "training", "    grad_norm = optim.clip_global_norm(policy, max_norm)\n    optimizer.step()\n",
        "    optimizer.step()\n    grad_norm = optim.clip_global_norm(policy, max_norm)\n",
    ),
    "sft clips after its step": (
        "training", "    grad_norm = optim.clip_global_norm(params, max_norm)\n    optimizer.step()\n",
        "    optimizer.step()\n    grad_norm = optim.clip_global_norm(params, max_norm)\n",
    ),
    "dpo's gradients add up over the steps": (
        "training", "reference, config, policy)\n    optimizer.zero_grad()\n", "reference, config, policy)\n",
    ),
    "dpo has weight decay": ("cli/train", "(policy, run, weight_decay=0.0)", "(policy, run, weight_decay=0.01)"),
    "sft has no weight decay": (
        "cli/train", "weight_decay=0.01)\n    begin(out, words, run, optimizer, {**hashes",
        "weight_decay=0.0)\n    begin(out, words, run, optimizer, {**hashes",
    ),
    "pretrain has no weight decay": (
        "cli/train", "weight_decay=0.01)\n    hashes |=", "weight_decay=0.0)\n    hashes |=",
    ),
    "AdamW has the usual betas": ("cli/train", "betas=(0.9, 0.99)", "betas=(0.9, 0.999)"),
    "the seed does not reach the batches": ("run/loop", "state.step, settings.seed)", "state.step, 0)"),
    "there is no warm-up": ("run/loop", "settings.learning_rate, settings.warmup_steps", "settings.learning_rate, 0"),
    "the learning rate is that of the next step": (
        "run/loop", "state.step, settings.steps, settings.learning_rate",
        "state.step + 1, settings.steps, settings.learning_rate",
    ),
    "patience waits once too often": ("run/loop", "worse >= settings.patience", "worse > settings.patience"),
    "sft always learns both responses": ("cli/train", 'count = 1 if responses == "chosen" else 2', "count = 2"),
    "a run is judged against itself": ("cli/train", "Checkpoint(ref_params, ref_config", "Checkpoint(params, config"),
    "the test rows are scored by the policy": (
        "cli/train", "logprobs(ref_params, ref_config, counted(test", "logprobs(params, config, counted(test",
    ),
    "the best model is the last": ("run/loop", "step_name(state.best_step)", "step_name(state.step)"),
    "workers forget nll_weight": ("run/workers", '"nll_weight": float(nll_weight)', '"nll_weight": 0.0'),
    "workers forget beta": ("run/workers", '"beta": float(beta)', '"beta": 0.1'),
    "the demo's reference is the base model": (
        "cli/desk", "{folder / 'sft'}\"", "{folder / 'sft'}\", f\"--reference={folder / 'pretrain'}\"",
    ),
    "the demo's SFT does not begin from the base model": (
        "cli/desk", "[f\"--init={folder / 'pretrain'}\", ", "[*sizes.model, ",
    ),
    "the demo's DPO begins from the base model": (
        "cli/desk", "\"dpo\": [f\"--init={folder / 'sft'}\"", "\"dpo\": [f\"--init={folder / 'pretrain'}\"",
    ),
    "the demo's DPO has no likelihood term": ("cli/desk", '"--nll-weight=2", ', ""),
    "the demo's DPO has another beta": ("cli/desk", '"--beta=0.2", ', ""),
    "the judge compares with base": ("cli/desk", 'models["sft"], prompts', 'models["pretrain"], prompts'),
}  # fmt: skip
LONGEST = 900  # processor seconds of a run of the tests; a mutant that takes longer is noticed, too
SWAPS = {
    ast.Add: "-", ast.Sub: "+", ast.Mult: "/", ast.Div: "*", ast.Pow: "*", ast.FloorDiv: "/", ast.Mod: "*",
    ast.BitAnd: "|", ast.BitOr: "&",
    ast.Lt: "<=", ast.LtE: "<", ast.Gt: ">=", ast.GtE: ">", ast.Eq: "!=", ast.NotEq: "==", ast.Is: "is not",
    ast.IsNot: "is", ast.In: "not in", ast.NotIn: "in", ast.And: "or", ast.Or: "and",
}  # fmt: skip
NAMES = {"max": "min", "min": "max", "sum": "mean", "mean": "sum", "ones_like": "zeros_like", "zeros_like": "ones_like"}
NAMES |= {"exp": "expm1", "log": "log1p", "expm1": "exp", "log1p": "log", "any": "all", "all": "any"}


class Mutant(NamedTuple):
    """One change: the characters of a file from `start` to `end` are replaced."""

    file: str
    start: int
    end: int
    text: str


def mutants(file, source):
    """All mutants of a file: another operator, number, name or order, an argument or a statement left out."""
    starts = [0]
    for line in source.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    assert source.isascii()  # a column of ast is a number of bytes

    def span(node):
        return starts[node.lineno - 1] + node.col_offset, starts[node.end_lineno - 1] + node.end_col_offset

    def of(node):
        return source[slice(*span(node))]

    def between(left, right, text):  # the operator between two nodes
        start, end = span(left)[1], span(right)[0]
        inside = source[start:end]
        lead = len(inside) - len(inside.lstrip(" )\n"))
        tail = len(inside) - len(inside.rstrip(" (\n"))
        yield start + lead, end - tail, text

    def changes(node):
        match node:
            case ast.BinOp(op=ast.MatMult()):
                yield *span(node), f"({of(node.right)} @ {of(node.left)})"
            case ast.BinOp() if type(node.op) in SWAPS:
                yield from between(node.left, node.right, SWAPS[type(node.op)])
            case ast.Compare(ops=[op]):
                yield from between(node.left, node.comparators[0], SWAPS[type(op)])
            case ast.BoolOp(values=[left, right]):
                yield from between(left, right, SWAPS[type(node.op)])
            case ast.UnaryOp(op=ast.USub() | ast.Not() | ast.Invert()):
                yield *span(node), of(node.operand)
            case ast.Constant(value=bool()):
                yield *span(node), str(not node.value)
            case ast.Constant(value=int()):
                yield *span(node), str(node.value + 1)
            case ast.Constant(value=float()):
                yield *span(node), str(node.value * 1.5 or 1.0)
            case ast.Name(id=name) if name in NAMES:
                yield *span(node), NAMES[name]
            case ast.Attribute(attr=name) if name in NAMES:
                yield span(node)[1] - len(name), span(node)[1], NAMES[name]
            case ast.IfExp():
                yield *span(node), f"({of(node.orelse)} if {of(node.test)} else {of(node.body)})"
            case ast.If() | ast.While():
                yield *span(node.test), f"not ({of(node.test)})"
            case ast.Call() if node.keywords and node.keywords[-1].arg:
                arguments = [*node.args, *(each.value for each in node.keywords)]
                start = span(arguments[-2])[1] if len(arguments) > 1 else span(node.func)[1] + 1
                yield start, span(node.keywords[-1])[1], ""
            case ast.AugAssign() if type(node.op) in SWAPS:
                start, end = span(node.target)[1], span(node.value)[0]
                yield start, end, f" {SWAPS[type(node.op)]}= "
            case ast.Assign(targets=[ast.Attribute() | ast.Subscript()]) | ast.Raise() | ast.Delete():
                yield *span(node), "pass"  # without the name that another assignment gives, a function would crash
            case ast.Expr(value=ast.Call() | ast.Yield() | ast.YieldFrom()):
                yield *span(node), "pass"

    def visit(node):
        yield from changes(node)
        for name, value in ast.iter_fields(node):
            if name in ("annotation", "returns", "decorator_list", "type_params"):
                continue
            for child in value if isinstance(value, list) else [value]:
                if isinstance(child, ast.AST) and not isinstance(child, ast.JoinedStr):
                    yield from visit(child)

    whole = ast.parse(source)
    for start, end, text in dict.fromkeys(visit(whole)):
        mutated = source[:start] + text + source[end:]
        try:
            different = ast.dump(ast.parse(mutated)) != ast.dump(whole)
        except SyntaxError:
            continue
        if different:
            yield Mutant(file, start, end, text)


def name_of(mutant, source):
    """File, line, column and change, as the table of survivors shows it."""
    line = source.count("\n", 0, mutant.start) + 1
    column = mutant.start - source.rfind("\n", 0, mutant.start)
    before = " ".join(source[mutant.start : mutant.end].split())
    return f"{mutant.file}.py:{line}:{column}: `{before}` becomes `{mutant.text or 'nothing'}`"


class Tree:
    """A copy of the project, in which one fault at a time is planted and the quick tests run."""

    def __init__(self, folder):
        self.root = Path(folder)
        listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout
        for name in listed.decode().split("\0")[:-1]:
            (self.root / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, self.root / name)
        files = sorted(self.root.glob("tests/test_*.py"), key=lambda path: path.stat().st_size)
        self.tests = [f"tests/{path.name}" for path in files if path.stem not in PAGES]  # the quickest first, mostly

    def first_failure(self, mutant, first):
        """The first test that fails if the mutant is planted, or "" if all pass."""
        file, start, end, text = mutant
        path = self.root / "minidpo" / f"{file}.py"
        source = path.read_text()
        path.write_text(source[:start] + text + source[end:])
        try:
            return self.run(*first) or self.run(*self.tests)
        finally:
            path.write_text(source)

    def run(self, *tests):
        command = [sys.executable, "-m", "pytest", "-x", "-q", "--tb=no", "-p", "no:cacheprovider"]
        command += [*tests, "-m", "not slow"]
        environment = {**os.environ, "PYTHONPATH": str(self.root), "PYTHONDONTWRITEBYTECODE": "1"}
        environment |= {"OPENBLAS_NUM_THREADS": "1"}  # as many trees at work as processors
        options = {"cwd": self.root, "env": environment, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        with subprocess.Popen(command, text=True, **options) as process:
            resource.prlimit(process.pid, resource.RLIMIT_CPU, (LONGEST, LONGEST))
            try:
                output, _ = process.communicate(timeout=4 * LONGEST)  # one that waits takes no processor time
            except subprocess.TimeoutExpired:
                process.kill()
        if process.returncode in (-signal.SIGXCPU, -signal.SIGKILL):
            return f"no end after {LONGEST} s"
        if process.returncode == 0:
            return ""
        failed = re.search(r"^(?:FAILED|ERROR) (.+?)(?: - |$)", output, re.MULTILINE)
        return failed[1] if failed else f"pytest ended with {process.returncode}"


def drawn(sample, seed):
    """`sample` mutants of all that there are, at random, by name; and how many there are."""
    sources = {file: (PACKAGE / f"{file}.py").read_text() for file in FILES}
    everything = [mutant for file, source in sources.items() for mutant in mutants(file, source)]
    chosen = random.Random(seed).sample(everything, sample)
    return {name_of(mutant, sources[mutant.file]): mutant for mutant in chosen}, len(everything)


def planted():
    """The faults of `PLANTED` as mutants, by name."""
    faults = {}
    for name, (file, before, after) in PLANTED.items():
        source = (PACKAGE / f"{file}.py").read_text()
        assert source.count(before) == 1, f"{name}: minidpo/{file}.py has it {source.count(before)} times"
        start = source.index(before)
        faults[name] = Mutant(file, start, start + len(before), after)
    return faults


def noticed(folder, faults):
    """Name, first failing test and seconds of each fault, with as many trees at work as there are processors."""
    trees = collections.deque(Tree(Path(folder) / f"tree{i}") for i in range(os.cpu_count() or 1))
    if faults and (failure := trees[0].run(*trees[0].tests)):
        sys.exit(f"{failure} fails without a fault: mend that first")

    def one(item):
        name, mutant = item
        own = [f"tests/test_{mutant.file}.py"] if mutant.file in FILES else WIRING
        tree, start = trees.popleft(), time.perf_counter()
        try:
            test = tree.first_failure(mutant, own)
        finally:
            trees.append(tree)
        return {"name": name, "file": mutant.file, "test": test, "seconds": round(time.perf_counter() - start, 1)}

    with concurrent.futures.ThreadPoolExecutor(len(trees)) as pool:
        yield from pool.map(one, faults.items())


def as_table(document):
    """The table in Markdown: by file, what was noticed, with Wilson's 95 % interval."""
    lines = ["| file | mutants | noticed | equivalent | noticed of the others | 95 % interval |"]
    lines += ["|---|---:|---:|---:|---:|---|"]
    for file in (*FILES, "all"):
        rows = [row for row in document["mutants"] if file in (row["file"], "all")]
        hits = sum(bool(row["test"]) for row in rows)
        equivalent = sum(row.get("judgement", "").startswith("equivalent") for row in rows)
        low, high = wilson(hits, len(rows) - equivalent)
        share = hits / (len(rows) - equivalent) if len(rows) > equivalent else 1.0
        lines.append(f"| {file} | {len(rows)} | {hits} | {equivalent} | {share:.1%} | {low:.1%} to {high:.1%} |")
    return "\n".join(lines)


def survivors(document):
    """What no test noticed, each with the judgement that stands beside it."""
    rows = [row for part in ("mutants", "planted") for row in document[part] if not row["test"]]
    return "\n".join(f"- {row['name']}: {row.get('judgement', 'not judged')}" for row in rows)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    parser.add_argument("--sample", type=int, default=150, help="how many mutants (150)")
    parser.add_argument("--seed", default=commit[:12], help="of the sample (the commit's hash)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="the file of the results")
    options = parser.parse_args()
    sample, total = drawn(options.sample, options.seed)
    document = json.loads(options.out.read_text()) if options.out.exists() else {}
    if (document.get("seed"), document.get("of")) != (options.seed, total):
        document = {"seed": options.seed, "of": total, "cpu": processor(), "mutants": [], "planted": []}
    with tempfile.TemporaryDirectory() as folder:
        for part, faults in (("mutants", sample), ("planted", planted())):
            done = {row["name"] for row in document[part]}
            for row in noticed(folder, {name: each for name, each in faults.items() if name not in done}):
                document[part].append(row)
                write_whole(options.out, (json.dumps(document, indent=1) + "\n").encode())
                print(
                    f"{len(document[part])}, {row['seconds']} s: {row['name']}: {row['test'] or 'NO TEST'}", flush=True
                )
    red = sum(bool(row["test"]) for row in document["planted"])
    print(f"\n{as_table(document)}\n\nplanted: {red} of {len(PLANTED)} noticed\n{survivors(document)}")
