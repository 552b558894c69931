"""Measurements: the training step beside its peers (bench.step)."""
