"""Pythia: the table of sizes, the network, and its Hugging Face format (model.huggingface)."""

from importlib.util import find_spec
from pathlib import Path

_root = Path(__file__).resolve().parents[1]
if Path(find_spec("kernels").origin).resolve().parents[1] != _root:
    # Hugging Face has a package `kernels` too, and Python finds it first unless the checkout is first on the path.
    raise ImportError(f"`import kernels` finds {find_spec('kernels').origin}, not ours: run from {_root}")

from model.pythia import KVCache, Pythia  # noqa: E402
from model.sizes import SIZES, SUITE, Config  # noqa: E402
