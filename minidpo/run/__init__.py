"""A training run on disk: files, checkpoints, the loop, workers and the report."""
