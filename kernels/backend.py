"""Which of its two forms an op runs: the Triton kernels, or the definition in plain torch."""

import os
from types import SimpleNamespace

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError:  # there are wheels for Linux only: elsewhere the kernels can be read, and the definitions run
    triton, tl = SimpleNamespace(jit=lambda kernel: kernel), SimpleNamespace(constexpr=lambda value: value)
    TensorDescriptor = None

KERNELS = ("auto", "triton", "torch")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # Triton reads it when a kernel is defined, so here as well

_chosen = "auto"


def choose(kernels: str) -> None:
    """Choose for all ops of this process. Raises ValueError when Triton is asked for and can not run here.

    auto      Triton on a CUDA device from compute capability 8.0 on, and on a CPU under TRITON_INTERPRET=1; else torch
    triton    the same, but where there is no such device, refuse
    torch     the definitions, everywhere
    """
    if kernels not in KERNELS:
        raise ValueError(f"kernels must be one of {', '.join(KERNELS)}, not {kernels!r}")
    if kernels == "triton" and not INTERPRETED and not _has_triton_gpu():
        raise ValueError(
            "the Triton kernels need the triton package and a CUDA device of compute capability 8.0 or more "
            "(or TRITON_INTERPRET=1, to run them slowly on a CPU)"
        )
    global _chosen
    _chosen = kernels


def triton_runs(x: Tensor) -> bool:
    """Whether ops on x run their Triton kernels. Those know 16 and 32-bit floats; float64 is for the definitions."""
    if _chosen == "torch" or x.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return False
    return _has_triton_gpu() if x.is_cuda else INTERPRETED and x.device.type == "cpu"


def _has_triton_gpu() -> bool:
    return hasattr(triton, "compile") and torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0)
