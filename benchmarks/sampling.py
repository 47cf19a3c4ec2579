"""Sampling one text and 32 texts beside PyTorch's ways: a lean loop with a cache, and transformers' `generate`.

    python -m benchmarks.sampling

prints a table and writes benchmarks/results/sampling.json: milliseconds a token of every text, medians of interleaved
rounds, each contender in its own process with two threads and the machine's own kernels. Needs torch and transformers,
the extra `peers`.
"""

import argparse
import json
import pathlib

from benchmarks import speed
from benchmarks.workload import SIZES
from minidpo.run import files

PATH = pathlib.Path(__file__).parent / "results" / "sampling.json"
SUITES = {"one text": "sampling", "32 texts": "sampling 32"}
OTHERS = {"the lean loop": "PyTorch eager", "`model.generate`": "transformers"}


def as_table(figures):
    """Our time a token, and its share of each other contender's, a column for each size."""
    lines = ["| | " + " | ".join(SIZES) + " |", "|---|" + "---:|" * len(SIZES)]
    for title, suite in SUITES.items():
        results = [figures[suite][size] for size in SIZES]
        cells = [f"{1e3 * each['minidpo']['median']:.2f}" for each in results]
        lines.append(f"| {title}: ms a token | {' | '.join(cells)} |")
        for words, other in OTHERS.items():
            cells = [f"{speed.ratio(each, 'minidpo', other):.2f}" for each in results]
            lines.append(f"| {title}: share of {words} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9, help="turns of each contender (default: 9)")
    parser.add_argument("--out", type=pathlib.Path, default=PATH, help="JSON file for the figures")
    chosen = parser.parse_args()
    figures = {"environment": speed.environment(), "rounds": chosen.rounds}
    for title, suite in SUITES.items():
        figures[suite] = {}
        for size in SIZES:
            print(f"{title}, {size}", flush=True)
            figures[suite][size], missing = speed.measure(SIZES[size], 0, chosen.rounds, suite=suite)
            absent = {"minidpo", *OTHERS.values()} - set(figures[suite][size])
            if absent:
                parser.error(f"{', '.join(sorted(absent))} cannot be measured: {'; '.join(missing)}")
    files.write_whole(chosen.out, (json.dumps(figures, indent=1) + "\n").encode())
    print(as_table(figures))


if __name__ == "__main__":
    main()
