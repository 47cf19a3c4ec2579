"""Speed of a DPO step on a GPU, beside PyTorch on the same GPU; both compute in float32, without TF32.

    python -m benchmarks.gpu

prints tables and writes benchmarks/results/gpu.json, which keeps the sizes measured before in the same environment. It
needs CuPy, and PyTorch with CUDA.
"""

import argparse
import json
import sys

from benchmarks import speed
from benchmarks.__main__ import BASELINE, LEAN, RESULTS, table
from benchmarks.workload import SIZES, Size
from minidpo.backend import DeviceError, device_module
from minidpo.run import files

OUT = RESULTS / "gpu.json"
GPU_SIZES = {**SIZES, "GPT-2 small": Size(50257, 768, 12, 12, 512, 4)}
ROWS = {  # of the page's table: a share of whose time, or a contender's own figure
    "a step, ms": lambda results: f"{1e3 * results['minidpo']['median']:.0f}",
    "PyTorch modules, ms": lambda results: f"{1e3 * results[BASELINE]['median']:.0f}",
    "share of PyTorch modules' time": lambda results: f"{speed.ratio(results, 'minidpo', BASELINE):.2f}",
    "share of the lean PyTorch's time": lambda results: f"{speed.ratio(results, 'minidpo', LEAN):.2f}",
    "kernels that a step starts": lambda results: f"{results['minidpo']['kernels']:,}",
    "PyTorch modules' kernels": lambda results: f"{results[BASELINE]['kernels']:,}",
    "share of PyTorch modules' GPU memory": lambda results: (
        f"{speed.ratio(results, 'minidpo', BASELINE, 'peak_mib'):.2f}"
    ),
}


def as_table(figures):
    """The page's table in Markdown, a column for each size."""
    sizes = [size for size in GPU_SIZES if size in figures["step"]]
    lines = [f"| | {' | '.join(sizes)} |", "|---|" + "---:|" * len(sizes)]
    for title, of in ROWS.items():
        lines.append(f"| {title} | {' | '.join(of(figures['step'][size]) for size in sizes)} |")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=GPU_SIZES, default=list(GPU_SIZES), help="of the model")
    parser.add_argument("--rounds", type=int, default=15, help="turns of each contender (default: 15)")
    parser.add_argument("--names", nargs="+", help="names of contenders (default: all)")
    parser.add_argument("--seed", type=int, default=0, help="random seed of weights and pairs (default: 0)")
    options = parser.parse_args()
    try:
        cupy = device_module("cuda")
    except DeviceError as error:
        sys.exit(f"nothing to measure: {error}")
    name = cupy.cuda.runtime.getDeviceProperties(0)["name"].decode()
    figures = {"device": name, "cupy": cupy.__version__, "environment": speed.environment(), "seed": options.seed}
    previous = json.loads(OUT.read_text()) if OUT.exists() else {}
    figures["step"] = previous.pop("step", {}) if figures == {k: previous.get(k) for k in figures} else {}
    for size in options.sizes:
        print(f"\nstep on {name}, {size}: {GPU_SIZES[size]}", flush=True)
        results, missing = speed.measure(
            GPU_SIZES[size], options.seed, options.rounds, names=options.names, suite="gpu"
        )
        figures["step"][size] = figures["step"].get(size, {}) | results
        files.write_whole(OUT, (json.dumps(figures, indent=1) + "\n").encode())
        print(*[f"  not measured: {line}" for line in missing], table(results, BASELINE), sep="\n")
        for contender, result in results.items():
            print(f"  {contender}: {result['kernels']} kernels, {result['copies']} copies a step", flush=True)
    if all({"minidpo", BASELINE, LEAN} <= results.keys() for results in figures["step"].values()):
        print(f"\n{as_table(figures)}\n")
    print(f"written to {OUT}")


if __name__ == "__main__":
    main()
