"""Speed and memory of a DPO step and of sampling, beside other libraries.

    python -m benchmarks

prints tables and writes benchmarks/results/speed.json and speed.png. What is not installed is named and skipped; the
`bench` extra installs it.
"""

import argparse
import json
import pathlib
import statistics

from benchmarks import speed
from benchmarks.workload import SIZES, draw
from minidpo import plots
from minidpo.run import files, report

RESULTS = pathlib.Path(__file__).parent / "results"
BASELINES = {"step": "PyTorch eager, padded", "sampling": "PyTorch eager"}
SUITES = (*BASELINES, "growth")
GROWTH = {"T": (32, 64, 128, 256), "n_embd": (64, 128, 256), "pairs": (4, 8, 16, 32)}


def table(results, baseline):
    """One contender a line: time, spread, ratio of times and of memory to the baseline."""
    lines = [f"{'':<28}{'ms':>10}{'spread':>8}{'ratio':>8}{'MiB':>8}{'ratio':>7}{'error':>10}"]
    for name, result in results.items():
        seconds = result["seconds"]
        spread = (statistics.quantiles(seconds, n=4)[2] - statistics.quantiles(seconds, n=4)[0]) / result["median"]
        row = f"{name:<28}{1e3 * result['median']:>10.2f}{spread:>8.2f}"
        times, memory = "", ""
        if baseline in results:
            times = f"{speed.ratio(results, name, baseline):.2f}"
            memory = f"{speed.ratio(results, name, baseline, 'peak_mib'):.2f}"
        error = "" if result["error"] is None else f"{result['error']:.0e}"
        lines.append(f"{row}{times:>8}{result['peak_mib']:>8.0f}{memory:>7}{error:>10}")
    return "\n".join(lines)


def silent(*text, **options):
    """Say nothing."""


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suites", nargs="+", choices=SUITES, default=list(SUITES), help="the others stay as they are")
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--seed", type=int, default=0, help="of weights and pairs")
    parser.add_argument("--names", nargs="+", help="contenders; all if not given")
    parser.add_argument("--out", type=pathlib.Path, default=RESULTS)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    told = {"environment": speed.environment(), "seed": options.seed, "rounds": options.rounds}
    path = options.out / "speed.json"
    before = json.loads(path.read_text()) if path.exists() else {}
    kept = [suite for suite in SUITES if suite not in options.suites]
    if kept and {key: before.get(key) for key in told} != told:
        parser.error(f"{path} is of another machine, seed or number of rounds: measure all suites")
    told |= {suite: before[suite] if suite in kept else {} for suite in SUITES}
    for suite, baseline in BASELINES.items():
        for size in options.sizes if suite in options.suites else ():
            print(f"\n{suite}, {size}: {SIZES[size]}", flush=True)
            results, missing = speed.measure(
                SIZES[size], options.seed, options.rounds, names=options.names, suite=suite
            )
            told[suite][size] = results
            print(*[f"  not measured: {line}" for line in missing], table(results, baseline), sep="\n", flush=True)
    if "growth" in options.suites:
        told["growth"] = growth(options.seed)
    files.write_whole(path, (json.dumps(told, indent=1) + "\n").encode())
    drawn = plots.picture(options.out / "speed.png", panels(told["growth"]))
    print(f"written to {options.out}" + ("" if drawn else f"; {report.NO_CURVES}"))


def growth(seed):
    """A few rounds for each length, width and number of pairs, the rest as in "small"."""
    found = {}
    for axis, values in GROWTH.items():
        points = []
        for value in values:
            size = SIZES["small"]._replace(**{axis: value})
            work = draw(size, seed)
            results, _ = speed.measure(size, seed, 5, names=["minidpo", BASELINES["step"]], say=silent)
            points.append({"value": value, "flops": speed.flops(work.config, work.pairs), "results": results})
            took = [f"{name} {1e3 * r['median']:.1f} ms {r['peak_mib']:.0f} MiB" for name, r in results.items()]
            print(f"{axis} = {value}: {points[-1]['flops'] / 1e9:.2f} GFLOP, {', '.join(took)}", flush=True)
        found[axis] = points
    return found


def panels(measured):
    """Time and memory over each axis, the count of operations beside the time."""
    drawn = []
    for axis, points in measured.items():
        values = [point["value"] for point in points]
        for title, of in (("ms a step", lambda r: 1e3 * r["median"]), ("peak MiB", lambda r: r["peak_mib"])):
            lines = [
                plots.Curve(name, values, [of(point["results"][name]) for point in points], "o")
                for name in points[0]["results"]
            ]
            if title == "ms a step":
                first = points[-1]["results"]["minidpo"]["median"] / points[-1]["flops"]
                curve = [1e3 * first * point["flops"] for point in points]
                lines.append(plots.Curve("operations in closed form", values, curve, faint=True))
            drawn.append(plots.Panel(f"{title} over {axis}", axis, title, lines))
    return drawn


if __name__ == "__main__":
    main()
