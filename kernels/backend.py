"""Which of its two forms an op runs: the Triton kernels, or the definition in plain torch."""

import os
from functools import cache
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

    auto      Triton on a GPU of compute capability 8, 9 or 10, and on a CPU under TRITON_INTERPRET=1; else torch
    triton    the same, but where there is no such device, refuse
    torch     the definitions, everywhere
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


def triton_runs(x: Tensor) -> bool:
    """Whether ops on x run their Triton kernels. Those know 16 and 32-bit floats; float64 is for the definitions."""
    if _chosen == "torch" or x.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return False
    return _has_triton_gpu(x.device) if x.is_cuda else INTERPRETED and x.device.type == "cpu"


@cache
def _has_triton_gpu(device: torch.device | None = None) -> bool:
    """Whether the device, or the current one, is of a generation that attention has a launch table for."""
    if not hasattr(triton, "compile") or not torch.cuda.is_available():
        return False
    return torch.cuda.get_device_capability(device)[0] in (8, 9, 10)
