"""Measurements beside peers: the training step (bench.step) and the kernels (pytest bench --benchmark-only)."""
