"""Measurements: `python -m benchmarks` for speed and memory, `python benchmarks/demo.py` for the demo."""
