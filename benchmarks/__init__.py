"""Benchmarks: `python -m benchmarks` measures speed and memory, `python benchmarks/demo.py` measures the demo."""
