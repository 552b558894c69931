"""Weights and gradients that are sharded over ranks."""
