"""Checkpoints: written while training goes on, verified before they are trusted."""
