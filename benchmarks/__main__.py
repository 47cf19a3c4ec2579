"""Speed and memory of a DPO step, beside other libraries.

    python -m benchmarks

prints tables and writes benchmarks/results/speed.json, speed_time.png and speed_memory.png. Libraries that are not
installed are named and skipped; the `bench` extra installs them.
"""

import argparse
import json
import os
import pathlib
import statistics

from benchmarks import speed
from benchmarks.workload import SIZES, draw
from minidpo import plots
from minidpo.run import files, report

RESULTS = pathlib.Path(__file__).parent / "results"
BASELINE, LEAN = "PyTorch modules, padded", "PyTorch eager, padded"
STEPS = ("step", "step" + speed.AVX2)
SUITES = (*STEPS, "growth")
WITH_AVX2 = ("minidpo, padded", "minidpo", "minidpo, products alone", BASELINE, LEAN)
GROWTH = {"T": (32, 64, 128, 256), "n_embd": (64, 128, 256), "pairs": (4, 8, 16, 32)}
GROWTH["cores"] = tuple(count for count in (1, 2, 4, 8) if count <= (os.cpu_count() or 1))
SHARES = {  # a row of the page's table: whose share of whose time or memory
    "time, the same algorithm": ("minidpo, padded", BASELINE, "seconds"),
    "time, our recipe": ("minidpo", BASELINE, "seconds"),
    "time, the lean PyTorch": (LEAN, BASELINE, "seconds"),
    "time, the lean PyTorch that keeps memory as we do": (f"{LEAN}, memory kept", BASELINE, "seconds"),
    "time, the lean PyTorch with our recipe": ("PyTorch eager, our recipe", BASELINE, "seconds"),
    "time, our recipe, of its matrix products alone": ("minidpo", "minidpo, products alone", "seconds"),
    "peak memory, the same algorithm": ("minidpo, padded", BASELINE, "peak_mib"),
    "peak memory, our recipe": ("minidpo", BASELINE, "peak_mib"),
}


def table(results, baseline):
    """A line for each contender: time and its spread, memory, the ratios of both to the baseline, and the error."""
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


def as_table(figures):
    """The page's table in Markdown: shares, a column for each size, with the machine's kernels and with AVX2's."""
    columns = [(suite, size) for suite in STEPS for size in SIZES]
    lines = ["| | " + " | ".join(size + suite.removeprefix("step") for suite, size in columns) + " |"]
    lines.append("|---|" + "---:|" * len(columns))
    for title, (ours, theirs, key) in SHARES.items():
        cells = ((figures[suite][size], ours, theirs, key) for suite, size in columns)
        shares = [f"{speed.ratio(*cell):.2f}" if {ours, theirs} <= set(cell[0]) else "" for cell in cells]
        lines.append(f"| {title} | {' | '.join(shares)} |")
    steps = [f"{1e3 * figures[suite][size]['minidpo']['median']:.0f}" for suite, size in columns]
    return "\n".join([*lines, f"| a step of our recipe, ms | {' | '.join(steps)} |"])


def silent(*text, **options):
    """Print nothing."""


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--suites",
        nargs="+",
        choices=SUITES,
        default=list(SUITES),
        help="what to measure; the file keeps its figures of the others (default: everything)",
    )
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES), help="of the model (default: all)")
    parser.add_argument("--rounds", type=int, default=15, help="turns of each contender (default: 15)")
    parser.add_argument("--seed", type=int, default=0, help="random seed of weights and pairs (default: 0)")
    parser.add_argument("--names", nargs="+", help="names of contenders (default: all)")
    parser.add_argument("--out", type=pathlib.Path, default=RESULTS, help="folder of the results")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    figures = {"environment": speed.environment(), "seed": options.seed, "rounds": options.rounds}
    path = options.out / "speed.json"
    previous = json.loads(path.read_text()) if path.exists() else {}
    unchanged = [suite for suite in SUITES if suite not in options.suites]
    if unchanged and {key: previous.get(key) for key in figures} != figures:
        parser.error(f"{path} comes from another machine, seed or number of rounds: measure all suites")
    figures |= {suite: previous[suite] if suite in unchanged else {} for suite in SUITES}

    def save():
        files.write_whole(path, (json.dumps(figures, indent=1) + "\n").encode())

    for suite in STEPS:
        for size in options.sizes if suite in options.suites else ():
            print(f"\n{suite}, {size}: {SIZES[size]}", flush=True)
            names = options.names or (WITH_AVX2 if suite.endswith(speed.AVX2) else None)
            results, missing = speed.measure(SIZES[size], options.seed, options.rounds, names=names, suite=suite)
            figures[suite][size] = results
            save()
            print(*[f"  not measured: {line}" for line in missing], table(results, BASELINE), sep="\n", flush=True)
    if "growth" in options.suites:
        figures["growth"] = growth(options.seed)
        save()
    if set(options.sizes) == set(SIZES):
        print(f"\n{as_table(figures)}\n")
    drawn = panels(figures["growth"])  # time and memory in turn
    for name, part in (("time", drawn[::2]), ("memory", drawn[1::2])):
        has_picture = plots.picture(options.out / f"speed_{name}.png", part)
    print(f"written to {options.out}" + ("" if has_picture else f"; {report.NO_CURVES}"))


def growth(seed):
    """Five rounds for each length, width, number of pairs and of cores, with everything else as in "small"."""
    points_of = {}
    for axis, values in GROWTH.items():
        points = []
        for value in values:
            size = SIZES["small"] if axis == "cores" else SIZES["small"]._replace(**{axis: value})
            work, cores = draw(size, seed), value if axis == "cores" else speed.THREADS
            results, _ = speed.measure(size, seed, 5, names=["minidpo", BASELINE], cores=cores, say=silent)
            points.append({"value": value, "flops": speed.flops(work.config, work.pairs), "results": results})
            texts = [f"{name} {1e3 * r['median']:.1f} ms {r['peak_mib']:.0f} MiB" for name, r in results.items()]
            print(f"{axis} = {value}: {points[-1]['flops'] / 1e9:.2f} GFLOP, {', '.join(texts)}", flush=True)
        points_of[axis] = points
    return points_of


def panels(points_of):
    """Panels of time and memory over each axis; the time has the count of operations beside it."""
    panels = []
    for axis, points in points_of.items():
        values = [point["value"] for point in points]
        for title, value_of in (("ms a step", lambda r: 1e3 * r["median"]), ("peak MiB", lambda r: r["peak_mib"])):
            curves = [
                plots.Curve(name, values, [value_of(point["results"][name]) for point in points], "o")
                for name in points[0]["results"]
            ]
            if title == "ms a step":
                seconds_each = points[-1]["results"]["minidpo"]["median"] / points[-1]["flops"]
                scaled = [1e3 * seconds_each * point["flops"] for point in points]
                curves.append(plots.Curve("operations in closed form", values, scaled, faint=True))
            panels.append(plots.Panel(f"{title} over {axis}", axis, title, curves))
    return panels


if __name__ == "__main__":
    main()
