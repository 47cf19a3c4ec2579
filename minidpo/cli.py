"""The command line: `python -m minidpo COMMAND`."""

import argparse
import sys
from collections.abc import Callable

import numpy

from .cases import CASES, RandomDraw
from .gradcheck import TOLERANCE, GradientError, check_vjp
from .ops import OPS


def check(cases: int, seed: int) -> int:
    """Print one row per op with its worst error by each method; return how many ops failed."""
    print(f"{'op':<18}{'central':>10}{'complex':>10}{'cases':>8}", flush=True)
    failures = []
    for name in OPS:
        row = ""
        for method in TOLERANCE:
            rng = numpy.random.default_rng(seed)
            draw = RandomDraw(rng)
            try:
                worst = 0.0
                for _ in range(cases):
                    arguments, options = CASES[name](draw)
                    worst = max(worst, check_vjp(OPS[name], *arguments, rng=rng, method=method, **options))
                row += f"{worst:>10.1e}"
            except GradientError as error:
                failures.append(str(error))
                row += f"{'FAILED':>10}"
        print(f"{name:<18}{row}{cases:>8}", flush=True)
    bounds = ", ".join(f"{method} {bound:.0e}" for method, bound in TOLERANCE.items())
    print(f"\n{len(OPS)} ops, all within: {bounds}" if not failures else "")
    for failure in failures:
        print(failure, file=sys.stderr)
    return len(failures)


def main(argv: list[str] | None = None) -> int:
    """Run one command and return its exit status."""
    parser = argparse.ArgumentParser(prog="minidpo", description="Preference optimisation from scratch.")
    commands = parser.add_subparsers(dest="command", required=True)
    checking = commands.add_parser(
        "check",
        help="compare every derivative with finite differences and the complex step",
        description="Check the vector-Jacobian product of every op on random arguments, against central "
        "differences and the complex step. Prints the worst relative error; exits with 1 if any is too large.",
    )
    checking.add_argument("--cases", type=at_least(1), default=100, help="random cases per op (default %(default)s)")
    checking.add_argument("--seed", type=at_least(0), default=0, help="of the random cases (default %(default)s)")
    options = parser.parse_args(argv)
    return 1 if check(options.cases, options.seed) else 0


def at_least(low: int) -> Callable[[str], int]:
    """An argument's type: an integer that is not below `low`."""

    def integer(text: str) -> int:
        if not text.isdecimal() or int(text) < low:
            raise argparse.ArgumentTypeError(f"{text!r} is not an integer of at least {low}")
        return int(text)

    return integer
