"""The commands that put the mathematics to the test: every derivative, the scores, the theory, the frontier."""

import argparse
import json
import sys

import numpy

from .. import model, plots
from ..gradcheck import TOLERANCE, GradientError, check_vjp
from ..model import Config
from ..ops import OPS
from ..run import report
from ..run.files import write_whole
from ..theory import assumptions, dynamics, equalities, frontier, mutants
from .cases import CASES, RandomDraw

VERDICTS = {True: "holds", False: "FAILS", None: "shown"}


def check(options: argparse.Namespace) -> int:
    """Print one row per op with its worst error by each method; return 1 if an op failed."""
    print(f"{'op':<18}{'central':>10}{'complex':>10}{'cases':>8}", flush=True)
    failures = []
    for name in OPS:
        row = ""
        for method in TOLERANCE:
            rng = numpy.random.default_rng(options.seed)
            draw = RandomDraw(rng)
            try:
                worst = 0.0
                for _ in range(options.cases):
                    arguments, keywords = CASES[name](draw)
                    worst = max(worst, check_vjp(OPS[name], *arguments, rng=rng, method=method, **keywords))
                row += f"{worst:>10.1e}"
            except GradientError as error:
                failures.append(str(error))
                row += f"{'FAILED':>10}"
        print(f"{name:<18}{row}{options.cases:>8}", flush=True)
    bounds = ", ".join(f"{method} {bound:.0e}" for method, bound in TOLERANCE.items())
    print(f"\n{len(OPS)} ops, all within: {bounds}" if not failures else "")
    for failure in failures:
        print(failure, file=sys.stderr)
    return 1 if failures else 0


def oracles(options: argparse.Namespace) -> int:
    """Print what the normalisation oracle and the chain rule say of the right score and of eleven wrong ones."""
    rng = numpy.random.default_rng(options.seed)
    config = Config(vocab_size=4, n_positions=8, n_embd=8, n_layer=2, n_head=2)
    params = model.init(config, rng, dtype="float64")
    for p in params.values():
        p.data = p.data + 0.5 * rng.normal(size=p.shape)  # far from uniform, so that every mistake shows
    print(mutants.as_text(mutants.verdicts(params, config, [2, 1, 3], cap=3)))
    return 0


def exactly(options: argparse.Namespace) -> int:
    """Run every equality; return 1 if a claim does not hold."""
    world = equalities.small_world(options.seed)
    print(f"{len(world.prompts)} prompts, {len(world.responses)} responses to each", flush=True)
    claims = []
    for part in (*equalities.EQUALITIES, assumptions.finite_margins, dynamics.beta_early_and_late):
        print(f"\n{(part.__doc__ or '').splitlines()[0]}", flush=True)
        for claim in part(world, options.seed):
            claims.append(claim)
            print(f"  {VERDICTS[claim.holds]} {claim.number:>10.2e}  {claim.text}", flush=True)
    print("\nWhat breaks it, at beta 0.5: total variation to pi*, true reward, KL to the reference in nats")
    for row in assumptions.what_breaks_it(world, options.seed):
        print(f"  {row.tv:7.4f} {row.reward:7.3f} {row.kl:8.3f}  {row.name}", flush=True)
    judged = [claim.holds for claim in claims if claim.holds is not None]
    failed = judged.count(False)
    print(f"\n{len(judged) - failed} of {len(judged)} claims hold")
    if options.plot:
        drawn = plots.picture(options.plot, dynamics.gap_panels())
        print(f"the gaps over time are in {options.plot}" if drawn else report.NO_CURVES)
    return 1 if failed else 0


def frontier_runs(options: argparse.Namespace) -> int:
    """Run every method in several worlds, print the table, write points and picture."""
    options.out.mkdir(parents=True, exist_ok=True)
    points: list[frontier.Point] = []
    for seed in range(options.seed, options.seed + options.worlds):
        points += frontier.run([seed])
        print(f"world {seed}: {len(points)} runs so far", flush=True)
    print(frontier.as_text(points))
    content = json.dumps([point._asdict() for point in points], indent=1) + "\n"
    write_whole(options.out / "frontier.json", content.encode())
    drawn = plots.picture(options.out / "frontier.png", frontier.panels(points))
    print(
        f"{options.out / 'frontier.json'}" + (f", {options.out / 'frontier.png'}" if drawn else f"; {report.NO_CURVES}")
    )
    return 0
