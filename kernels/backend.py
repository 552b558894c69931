"""Chooses what an op runs: its Triton kernels, or its reference in plain torch."""

import os
from functools import cache
from types import SimpleNamespace

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError:  # Triton has wheels for Linux only; elsewhere the kernel files import, and the references run
    triton, tl = SimpleNamespace(jit=lambda kernel: kernel), SimpleNamespace(constexpr=lambda value: value)
    TensorDescriptor = None

KERNELS = ("auto", "triton", "torch")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # read at import, because Triton reads it then too

_chosen = "auto"


def choose(kernels: str) -> None:
    """Choose for all ops of this process. Raises ValueError if `triton` is chosen and cannot run here.

    auto      Triton on a GPU of compute capability 8, 9 or 10, and on a CPU under TRITON_INTERPRET=1; else torch
    triton    as auto, but an error if Triton cannot run
    torch     the references, on every device
    """
    if kernels not in KERNELS:
        raise ValueError(f"kernels must be one of {', '.join(KERNELS)}, not {kernels!r}")
    if kernels == "triton" and not INTERPRETED and not _has_triton_gpu():
        raise ValueError(
            "the Triton kernels need the triton package and a CUDA device of compute capability 8, 9 or 10 "
            "(or TRITON_INTERPRET=1, to run them slowly on a CPU)"
        )
    global _chosen
    _chosen = kernels


def triton_runs(x: Tensor, dots: bool = False) -> bool:
    """True if ops on x run their Triton kernels, which support 16 and 32-bit floats; float64 runs the references.

    dots: the kernels multiply tiles. Those of float32 do not run on tensor cores, and keep few numbers in registers, so
    on a GPU the reference runs unless `triton` was chosen.
    """
    if _chosen == "torch" or x.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return False
    if dots and _chosen == "auto" and x.is_cuda and x.dtype == torch.float32:
        return False
    return _has_triton_gpu(x.device) if x.is_cuda else INTERPRETED and x.device.type == "cpu"


@cache
def _has_triton_gpu(device: torch.device | None = None) -> bool:
    """True if attention has a launch table for the generation of `device` (default: the current device)."""
    if not hasattr(triton, "compile") or not torch.cuda.is_available():
        return False
    return torch.cuda.get_device_capability(device)[0] in (8, 9, 10)
