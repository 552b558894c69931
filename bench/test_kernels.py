"""The kernels beside what a user would run instead: time, bandwidth or FLOP/s, memory.

    pytest bench --benchmark-only --benchmark-json bench/results/kernels-GPU.json

On a CUDA device this takes the shapes of training, bfloat16 and 8 x 2048 tokens; on a CPU small ones, and says so. The
peers are in kernel_peers.py, the table at the end and the bars in it in kernel_report.py. Every arm must first agree
with ours; one that can not be had on this machine is reported with the reason.

How a GPU is timed: by events that the device itself stamps when it reaches them, so that neither the launch nor the wait
is counted. Before each round a buffer is written and read that is far larger than the L2 cache: the round finds nothing
of its inputs there and has nothing of others to write back, and while the device is busy with it the host runs ahead and
has launched what follows.
"""

import gc
import time

import pytest
import torch
from torch import Tensor

from bench.kernel_peers import OPS, setting
from bench.kernel_report import entry
from bench.step import gemm_rate

HERE = setting()
CUDA = HERE.device.type == "cuda"
ROUNDS, WARM_UP = (50, 5) if CUDA else (5, 1)

# By how much, relatively and in the Frobenius norm, an output or a gradient of an arm may differ from ours. Two right
# ones in bfloat16 differ by up to 1%, since peers round q, k and sums in between; a wrong one by about 100%.
AGREEMENT = 3e-2 if HERE.dtype == torch.bfloat16 else 1e-4

CASES = [
    pytest.param(op, passes, size, arm, id=f"{op}-{passes}-{size}-{arm}")
    for op, facts in OPS.items()
    for size in HERE.configs(facts)
    for passes in facts.passes
    for arm in facts.arms
]


class Moment:
    """A point in the work queued on the device; the difference of two is in seconds, and waits for both."""

    def __init__(self):
        self.event = torch.cuda.Event(enable_timing=True)
        self.event.record()

    def __sub__(self, earlier: "Moment") -> float:
        self.event.synchronize()
        return earlier.event.elapsed_time(self.event) / 1e3


clock = Moment if CUDA else time.perf_counter


@pytest.fixture(scope="session")
def flush():
    """A function that empties the L2 cache; there is none on a CPU, whose caches keep what the shapes here need."""
    buffer = torch.empty(2**28 if CUDA else 0, device=HERE.device)  # 1 GiB
    return lambda: buffer.zero_().sum()


@pytest.fixture(scope="session")
def ceilings(flush) -> dict[str, float]:
    """What this device reaches at best: bytes/s read and written by a copy, and FLOP/s of a product."""
    source = torch.empty(2**30 if CUDA else 2**26, dtype=torch.uint8, device=HERE.device)
    target = torch.empty_like(source)
    copy = 2 * source.numel() / _shortest(lambda: target.copy_(source), flush)
    if not CUDA:
        return {"bytes_per_s": copy, "flops_per_s": gemm_rate("fp32", HERE.device)}
    # gemm_rate, which goes by the clock of the host, takes too small matrices for a GPU.
    a, b = torch.randn(2, 8192, 8192, dtype=HERE.dtype, device=HERE.device)
    return {"bytes_per_s": copy, "flops_per_s": 2 * 8192**3 / _shortest(lambda: a @ b, flush)}


def _shortest(call, flush) -> float:
    def seconds() -> float:
        flush()
        began = clock()
        call()
        return clock() - began

    return min(seconds() for _ in range(20))


@pytest.fixture
def switches():
    """An arm may turn on deterministic algorithms for the whole process."""
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = True


def differentiable(tensors: tuple[Tensor, ...]) -> list[Tensor]:
    return [tensor for tensor in tensors if tensor.requires_grad]


def outputs_of(function, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
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


def check_agreement(found: tuple[Tensor, ...], ours: tuple[Tensor, ...]) -> None:
    """Raise AssertionError unless an arm has computed what we have."""
    assert len(found) == len(ours), f"{len(found)} outputs and gradients, not {len(ours)}"
    for i, (theirs, expected) in enumerate(zip(found, ours)):
        assert theirs.shape == expected.shape, f"output or gradient {i} is {theirs.shape}, not {expected.shape}"
        theirs, expected = theirs.float(), expected.float()
        error = ((theirs - expected).norm() / expected.norm()).item()
        assert error <= AGREEMENT, f"output or gradient {i} differs from ours by {error:.2g} (of {AGREEMENT})"


def reason(failure: BaseException) -> str:
    """Why an arm can not be had, in one line: torch.compile puts an exception of its own around the real one."""
    while failure.__cause__:
        failure = failure.__cause__
    return f"{type(failure).__name__}: {(str(failure).splitlines() or [''])[0]}"


def peak_memory(step) -> int | None:
    """Bytes that the device holds at most during the step, above what it held before; None on a CPU."""
    if not CUDA:
        return None
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


@pytest.mark.benchmark(timer=clock, disable_gc=True)
@pytest.mark.parametrize(("op", "passes", "size", "arm"), CASES)
def test_kernel(benchmark, report, switches, flush, ceilings, op, passes, size, arm):
    facts, config = OPS[op], HERE.configs(OPS[op])[size]
    case = {"op": op, "passes": passes, "size": size, "arm": arm}
    torch.manual_seed(0)
    inputs = facts.inputs(config, HERE.batch, torch.empty(0, dtype=HERE.dtype, device=HERE.device))
    outputs = outputs_of(*facts.arms["tripod"](*inputs))
    d_outputs = incoming_gradients(outputs)
    ours = values(outputs, inputs, d_outputs)
    try:
        function, arguments = facts.arms[arm](*inputs)
        found = values(outputs_of(function, arguments), inputs, d_outputs)
    except Exception as failure:
        if arm == "tripod":
            raise
        report(case | {"missing": reason(failure)})
        pytest.skip(f"{arm}: {reason(failure)}")
    check_agreement(found, ours)
    del outputs, ours, found  # which hold memory
    arguments = tuple(a.detach().requires_grad_(a.requires_grad) for a in arguments)  # what was done ahead ends here

    def forward() -> tuple[Tensor, ...]:
        return outputs_of(function, arguments)

    def backward(*outputs: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(outputs, differentiable(arguments), d_outputs)

    def setup() -> tuple[tuple[Tensor, ...], dict]:
        outputs = forward() if passes == "backward" else ()
        flush()
        return outputs, {}

    timed = {"forward": forward, "backward": backward, "both": lambda: backward(*forward())}[passes]
    peak = peak_memory(lambda: timed(*setup()[0]))
    benchmark.group = f"{op} {passes} {size}"
    benchmark.pedantic(timed, setup=setup, rounds=ROUNDS, warmup_rounds=WARM_UP)
    floor = facts.floor(config, HERE.batch, passes, HERE.dtype.itemsize)
    case |= entry(benchmark.stats.stats.median, floor, ceilings, peak) | {"ceilings": ceilings}
    case |= {"shape": [list(tensor.shape) for tensor in inputs], "dtype": str(HERE.dtype), "device": str(HERE.device)}
    benchmark.extra_info.update(case)
    report(case)
