"""Checkpoints: written in the background while training goes on, verified before they are loaded."""
