"""Pythia: the sizes, the network, and its Hugging Face form (model.huggingface)."""

from importlib.util import find_spec
from pathlib import Path

_root = Path(__file__).resolve().parents[1]
if Path(find_spec("kernels").origin).resolve().parents[1] != _root:
    # `kernels` is also a package of Hugging Face, which wins wherever the checkout is not first on the path.
    raise ImportError(f"`import kernels` finds {find_spec('kernels').origin}, not ours: run from {_root}")

from model.pythia import KVCache, Pythia  # noqa: E402
from model.sizes import SIZES, Config  # noqa: E402

__all__ = ["SIZES", "Config", "KVCache", "Pythia"]
