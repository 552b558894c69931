"""How an arm of peers.py is checked against Tripod's kernel, and what is measured of it besides time."""

import gc
from collections.abc import Callable

import torch
from torch import Tensor

# Largest relative error, in the Frobenius norm, of an output or gradient of an arm against Tripod's. Two correct ones
# in bfloat16 differ by up to 1%, because peers cast q, k and sums in between; a wrong one differs by about 100%.
AGREEMENT = {torch.bfloat16: 3e-2, torch.float32: 1e-4}


def differentiable(tensors: tuple[Tensor, ...]) -> list[Tensor]:
    return [tensor for tensor in tensors if tensor.requires_grad]


def outputs_of(function: Callable, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    outputs = function(*arguments)
    return outputs if isinstance(outputs, tuple) else (outputs,)


def incoming_gradients(outputs: tuple[Tensor, ...]) -> list[Tensor]:
    """A random gradient for every output, or 1 for a loss."""
    draws = (torch.randn if output.dim() else torch.ones for output in outputs)
    return [draw(output.shape, device=output.device).to(output.dtype) for draw, output in zip(draws, outputs)]


def with_gradients(
    outputs: tuple[Tensor, ...], inputs: tuple[Tensor, ...], d_outputs: list[Tensor]
) -> tuple[Tensor, ...]:
    """The outputs, followed by the gradients of the inputs."""
    gradients = torch.autograd.grad(outputs, differentiable(inputs), d_outputs)
    return *(output.detach() for output in outputs), *gradients


def check_agreement(theirs: tuple[Tensor, ...], ours: tuple[Tensor, ...], tolerance: float) -> None:
    """Raise AssertionError unless the outputs and gradients of an arm agree with Tripod's."""
    assert len(theirs) == len(ours), f"{len(theirs)} outputs and gradients, not {len(ours)}"
    for i, (actual, expected) in enumerate(zip(theirs, ours)):
        assert actual.shape == expected.shape, f"output or gradient {i} is {actual.shape}, not {expected.shape}"
        actual, expected = actual.float(), expected.float()
        error = ((actual - expected).norm() / expected.norm()).item()
        assert error <= tolerance, f"output or gradient {i} differs from ours by {error:.2g}, more than {tolerance}"


def reason(failure: BaseException) -> str:
    """The innermost cause of an exception, in one line: torch.compile wraps the real exception in its own."""
    while failure.__cause__:
        failure = failure.__cause__
    return f"{type(failure).__name__}: {(str(failure).splitlines() or [''])[0]}"


def peak_memory(step: Callable, device: torch.device) -> int | None:
    """Peak bytes that step() allocates on a GPU, above what was allocated before. None on a CPU."""
    if device.type != "cuda":
        return None
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before
