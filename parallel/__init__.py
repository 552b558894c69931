"""Weights and gradients that are divided among ranks."""
