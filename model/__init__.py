"""Pythia: the sizes, the network, and its Hugging Face form (model.huggingface)."""

from model.pythia import KVCache, Pythia
from model.sizes import SIZES, Config

__all__ = ["SIZES", "Config", "KVCache", "Pythia"]
