"""Speed of a DPO step on a GPU, beside PyTorch on the same GPU; both compute in float32, without TF32.

    python -m benchmarks.gpu

prints tables and writes benchmarks/results/gpu.json. It needs CuPy, and PyTorch with CUDA.
"""

import argparse
import json
import os
import sys

from benchmarks import speed
from benchmarks.__main__ import RESULTS, table
from benchmarks.workload import SIZES, Size
from minidpo.backend import DeviceError, device_module
from minidpo.run import files

GPU_SIZES = {**SIZES, "GPT-2 small": Size(50257, 768, 12, 12, 1024, 4)}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--sizes", nargs="+", choices=GPU_SIZES, default=["tiny", "medium", "GPT-2 small"], help="of the model"
    )
    parser.add_argument("--rounds", type=int, default=15, help="turns of each contender (default: 15)")
    parser.add_argument("--seed", type=int, default=0, help="random seed of weights and pairs (default: 0)")
    options = parser.parse_args()
    try:
        cupy = device_module("cuda")
    except DeviceError as error:
        sys.exit(f"nothing to measure: {error}")
    os.environ["CUPY_TF32"] = "0"  # PyTorch's default is off as well
    name = cupy.cuda.runtime.getDeviceProperties(0)["name"].decode()
    figures = {"device": name, "cupy": cupy.__version__, "environment": speed.environment(), "seed": options.seed}
    figures |= {"rounds": options.rounds, "step": {}}
    for size in options.sizes:
        print(f"\nstep on {name}, {size}: {GPU_SIZES[size]}", flush=True)
        results, missing = speed.measure(GPU_SIZES[size], options.seed, options.rounds, suite="gpu")
        figures["step"][size] = results
        print(*[f"  not measured: {line}" for line in missing], table(results, "PyTorch eager, padded"), sep="\n")
    files.write_whole(RESULTS / "gpu.json", (json.dumps(figures, indent=1) + "\n").encode())
    print(f"written to {RESULTS / 'gpu.json'}")


if __name__ == "__main__":
    main()
