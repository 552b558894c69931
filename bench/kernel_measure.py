"""How an arm of kernel_peers.py is checked against ours and measured.

A GPU is timed by events that the device itself stamps when it reaches them, so that neither the launch nor the wait is
counted. Before each round a buffer far larger than the L2 cache is written and read: the round finds nothing of its
inputs there and has nothing of others to write back, and while the device is busy with that buffer the host runs ahead
and has launched what follows. A CPU is timed by the clock, with its caches as they are.
"""

import gc
import time
from collections.abc import Callable

import torch
from torch import Tensor

from bench.step import gemm_rate

# By how much, relatively and in the Frobenius norm, an output or a gradient of an arm may differ from ours. Two right
# ones in bfloat16 differ by up to 1%, since peers round q, k and sums in between; a wrong one by about 100%.
AGREEMENT = {torch.bfloat16: 3e-2, torch.float32: 1e-4}


class Moment:
    """A point in the work queued on a CUDA device; the difference of two is in seconds, and waits for both."""

    def __init__(self):
        self.event = torch.cuda.Event(enable_timing=True)
        self.event.record()

    def __sub__(self, earlier: "Moment") -> float:
        self.event.synchronize()
        return earlier.event.elapsed_time(self.event) / 1e3


def clock(device: torch.device) -> Callable:
    """What pytest-benchmark calls before and after a round, to subtract the one from the other."""
    return Moment if device.type == "cuda" else time.perf_counter


def flush_of(device: torch.device) -> Callable[[], object]:
    """A function that empties the L2 cache of a GPU."""
    buffer = torch.empty(2**28 if device.type == "cuda" else 0, device=device)  # 1 GiB
    return lambda: buffer.zero_().sum()


def measure_ceilings(device: torch.device, dtype: torch.dtype, flush: Callable) -> dict[str, float]:
    """What the device reaches at best: bytes/s, read and written, of a copy, and FLOP/s of a product."""
    now = clock(device)

    def shortest(call: Callable) -> float:
        seconds = []
        for _ in range(20):
            flush()
            began = now()
            call()
            seconds.append(now() - began)
        return min(seconds)

    source = torch.empty(2**30 if device.type == "cuda" else 2**26, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy = 2 * source.numel() / shortest(lambda: target.copy_(source))
    if device.type != "cuda":
        return {"bytes_per_s": copy, "flops_per_s": gemm_rate("fp32", device)}
    # gemm_rate goes by the clock of the host, and its matrices are too small for that on a GPU.
    a, b = torch.randn(2, 8192, 8192, dtype=dtype, device=device)
    return {"bytes_per_s": copy, "flops_per_s": 2 * 8192**3 / shortest(lambda: a @ b)}


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
