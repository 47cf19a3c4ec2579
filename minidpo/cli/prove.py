"""The commands that check the mathematics: every derivative, the scores, the theory, the frontier, the invariances."""

import functools
import json
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy

from .. import model, plots
from ..gradcheck import TOLERANCE, GradientError, check_vjp
from ..losses import LOSSES
from ..model import Config
from ..ops import OPS
from ..run.files import write_whole
from ..run.tasks import counted, results
from ..theory import assumptions, dynamics, equalities, mutants, optima
from ..theory import frontier as methods
from ..theory import invariances as changes
from ..verify.cases import CASES, RandomDraw, loss_arguments, loss_as_op
from . import options as o
from .options import NO_MATPLOTLIB, announce
from .parser import command

VERDICTS = {True: "holds", False: "FAILS", None: "shown"}


@command("prove")
def check(*, cases: o.Cases = 100, seed: o.Seed = 0) -> int:
    """Check every derivative against finite differences and the complex step.

    Check the vector-Jacobian product of every op and the gradient in closed form of every loss on random arguments,
    against central differences and the complex step, and that of a loss also against a sweep. Print the worst error of
    each. The exit status is 1 if one is too large.
    """
    failures: list[str] = []

    def table(kind: str, checked: Iterable[str], case: Callable[[str, RandomDraw], Any]) -> None:
        """Print a row for each name; a case is a function, its arguments and its options."""
        print(f"{kind:<18}{'central':>10}{'complex':>10}{'cases':>8}", flush=True)
        for name in checked:
            row = ""
            for method in TOLERANCE:
                rng = numpy.random.default_rng(seed)
                draw = RandomDraw(rng)
                try:
                    worst = 0.0
                    for _ in counted(range(cases), f"{name}, {method}: cases"):
                        function, arguments, keywords = case(name, draw)
                        worst = max(worst, check_vjp(function, *arguments, rng=rng, method=method, **keywords))
                    row += f"{worst:>10.1e}"
                except GradientError as error:
                    failures.append(str(error))
                    row += f"{'FAILED':>10}"
            print(f"{name:<18}{row}{cases:>8}", flush=True)
        print()

    table("op", OPS, lambda name, draw: (OPS[name], *CASES[name](draw)))
    table("loss", LOSSES, lambda name, draw: (*loss_as_op(LOSSES[name], loss_arguments(draw, LOSSES[name])), {}))
    bounds = ", ".join(f"{method} {bound:.0e}" for method, bound in TOLERANCE.items())
    print(f"{len(OPS)} ops and {len(LOSSES)} losses, all within: {bounds}" if not failures else "")
    for failure in failures:
        print(failure, file=sys.stderr)
    return 1 if failures else 0


@command("prove")
def oracles(*, seed: o.Seed = 0) -> str:
    """Show how two oracles find eleven wrong ways to score a response.

    Score every response of a small world, correctly and in eleven wrong ways. One oracle checks that the probabilities
    sum to 1. The other recomputes each score by the chain rule, one forward pass per prefix, and finds the rest.
    """
    rng = numpy.random.default_rng(seed)
    config = Config(vocab_size=4, n_positions=8, n_embd=8, n_layer=2, n_head=2)
    params = model.init(config, rng, dtype="float64")
    for p in params.values():
        p.data = p.data + 0.5 * rng.normal(size=p.shape)  # far from uniform, so that every mistake shows
    table = mutants.as_text(mutants.verdicts(params, config, [2, 1, 3], cap=3))
    print(table)
    return table


@command("prove")
def exact(*, plot: o.Plot = None, seed: o.Seed = 0) -> int:
    """Show the theory of DPO as equalities on a small world.

    Enumerate all responses of a small world and print, for each claim of the theory, the number that bears it out:
    Bradley-Terry, the KL-constrained objective, its optimum, the implicit reward, the optimum of DPO and of its
    relatives, RLHF, what beta does, and which assumptions matter. It takes about 120 CPU seconds. The exit status is
    1 if a claim fails.
    """
    if plot and not plots.installed():
        raise ValueError(f"--plot: {NO_MATPLOTLIB}")
    announce(plot)
    world = equalities.small_world(seed)
    print(f"{len(world.prompts)} prompts, {len(world.responses)} responses to each", flush=True)
    parts = [*equalities.EQUALITIES, *optima.OPTIMA, assumptions.finite_margins, dynamics.beta_early_and_late]
    tasks = [functools.partial(lambda part: list(part(world, seed)), part) for part in parts]
    computed = results([*tasks, *assumptions.cases(world, seed)], "exact")
    claims, last = [], ""
    for part in parts:
        heading = (getattr(part, "func", part).__doc__ or "").splitlines()[0]  # that of a partial is its function's
        print(f"\n{heading}\n" * (heading != last), end="", flush=True)
        last = heading
        for claim in next(computed):
            claims.append(claim)
            print(f"  {VERDICTS[claim.holds]} {claim.number:>10.2e}  {claim.text}", flush=True)
    print("\nWhat breaks it, at beta 0.5: total variation to pi*, true reward, KL to the reference in nats")
    print("A row that names its steps is a snapshot: further training would move it.")
    for row in computed:
        print(f"  {row.tv:7.4f} {row.reward:z7.3f} {row.kl:z8.3f}  {row.name}", flush=True)
    verdicts = [claim.holds for claim in claims if claim.holds is not None]
    failures = verdicts.count(False)
    print(f"\n{len(verdicts) - failures} of {len(verdicts)} claims hold")
    if plot:
        write_whole(plot, plots.png(dynamics.gap_panels()))
        print(f"the gaps over time are in {plot}")
    return 1 if failures else 0


@command("prove")
def frontier(*, out: o.Folder = Path("frontier"), worlds: o.Worlds = 5, seed: o.Seed = 0) -> list[methods.Point]:
    """Measure true reward against KL for each method.

    Run DPO and relatives, policy gradients, preferred fine-tuning, unlikelihood and best-of-N in small worlds, with
    exact true reward and exact KL to the reference, and print how far each ends below the best that its KL could buy.
    It takes about 6 CPU seconds per world.
    """
    table, picture = out / "frontier.json", out / "frontier.png"
    out.mkdir(parents=True, exist_ok=True)
    announce(table, picture if plots.installed() else None)
    if not plots.installed():
        print(f"{picture} will not be written: {NO_MATPLOTLIB}", file=sys.stderr, flush=True)
    points: list[methods.Point] = []
    tasks = [functools.partial(lambda world: list(methods.run([world])), seed + i) for i in range(worlds)]
    for world, more in enumerate(results(tasks, "frontier"), start=seed):
        points += more
        print(f"world {world}: {len(points)} runs so far", flush=True)
    print(methods.as_text(points))
    write_whole(table, (json.dumps([point._asdict() for point in points], indent=1) + "\n").encode())
    if plots.installed():
        write_whole(picture, plots.png(methods.panels(points)))
    print(f"{table}, {picture}" if plots.installed() else table)
    return points


@command("prove")
def invariances(*, seed: o.Seed = 0) -> str:
    """Show what leaves the DPO loss alone, and what looks alike and does not.

    Measure on a random model how much the loss and its gradient change where they must not, and where they must.
    """
    table = changes.as_text(changes.table(seed))
    print(table)
    return table
