"""How an arm of kernel_peers.py is checked against ours and measured; the clock is that of ceilings.py."""

import gc
from collections.abc import Callable

import torch
from torch import Tensor

from bench.ceilings import copy_bandwidth, product_ceiling

# By how much, relatively and in the Frobenius norm, an output or a gradient of an arm may differ from ours. Two right
# ones in bfloat16 differ by up to 1%, since peers round q, k and sums in between; a wrong one by about 100%.
AGREEMENT = {torch.bfloat16: 3e-2, torch.float32: 1e-4}


def measure_ceilings(device: torch.device, dtype: torch.dtype, flush: Callable) -> dict[str, float]:
    """What the device reaches at best: bytes/s, read and written, of a copy, and FLOP/s of a product."""
    return {
        "bytes_per_s": copy_bandwidth(device, flush),
        "flops_per_s": product_ceiling(dtype, device, flush),
    }


def differentiable(tensors: tuple[Tensor, ...]) -> list[Tensor]:
    return [tensor for tensor in tensors if tensor.requires_grad]


def outputs_of(function: Callable, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    outputs = function(*arguments)
    return outputs if isinstance(outputs, tuple) else (outputs,)


def incoming_gradients(outputs: tuple[Tensor, ...]) -> list[Tensor]:
    """Random ones; 1 for a loss."""
    draws = (torch.randn if output.dim() else torch.ones for output in outputs)
    return [draw(output.shape, device=output.device).to(output.dtype) for draw, output in zip(draws, outputs)]


def values(outputs: tuple[Tensor, ...], inputs: tuple[Tensor, ...], d_outputs: list[Tensor]) -> tuple[Tensor, ...]:
    """The outputs, and the gradients of the inputs of the op."""
    gradients = torch.autograd.grad(outputs, differentiable(inputs), d_outputs)
    return *(output.detach() for output in outputs), *gradients


def check_agreement(found: tuple[Tensor, ...], ours: tuple[Tensor, ...], tolerance: float) -> None:
    """Raise AssertionError unless an arm has computed what we have."""
    assert len(found) == len(ours), f"{len(found)} outputs and gradients, not {len(ours)}"
    for i, (theirs, expected) in enumerate(zip(found, ours)):
        assert theirs.shape == expected.shape, f"output or gradient {i} is {theirs.shape}, not {expected.shape}"
        theirs, expected = theirs.float(), expected.float()
        error = ((theirs - expected).norm() / expected.norm()).item()
        assert error <= tolerance, f"output or gradient {i} differs from ours by {error:.2g}, more than {tolerance}"


def reason(failure: BaseException) -> str:
    """Why an arm can not be had, in one line: torch.compile puts an exception of its own around the real one."""
    while failure.__cause__:
        failure = failure.__cause__
    return f"{type(failure).__name__}: {(str(failure).splitlines() or [''])[0]}"


def peak_memory(step: Callable, device: torch.device) -> int | None:
    """Bytes that a GPU holds at most during the step, above what it held before; None on a CPU."""
    if device.type != "cuda":
        return None
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before
