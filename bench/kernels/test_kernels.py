"""Time, bandwidth or FLOP/s, and memory of every kernel and its peers.

    pytest bench --benchmark-only --benchmark-json bench/results/kernels-GPU.json

On a CUDA device the shapes are those of training: bfloat16 and 8 x 2048 tokens. On a CPU they are small, and the header
says so. peers.py has the arms, measure.py checks them, report.py has the table at the end and the goals in it. An arm
is timed only if its outputs and gradients agree with Tripod's. An arm that cannot run on this machine is reported with
the reason.
"""

import pytest
import torch
from torch import Tensor

from bench.ceilings import copy_bandwidth, machine, matmul_ceiling
from bench.kernels.measure import (
    AGREEMENT,
    check_agreement,
    differentiable,
    incoming_gradients,
    outputs_of,
    peak_memory,
    reason,
    with_gradients,
)
from bench.kernels.peers import OPS, setting
from bench.kernels.report import metrics
from bench.timing import clock, flush_of

SETTING = setting()
DEVICE = machine(SETTING.device)["gpu"] or machine(SETTING.device)["cpu"]
ROUNDS = 50 if SETTING.device.type == "cuda" else 10
WARM_UP = 5  # rounds

CASES = [
    pytest.param(name, passes, size, arm, id=f"{name}-{passes}-{size}-{arm}")
    for name, op in OPS.items()
    for size in SETTING.configs(op)
    for passes in op.passes
    for arm in op.arms
]


@pytest.fixture(scope="session")
def flush():
    return flush_of(SETTING.device)


@pytest.fixture(scope="session")
def ceilings(flush) -> dict[str, float]:
    """The fastest copy (bytes/s, read and written) and the fastest matmul (FLOP/s) of this device."""
    return {
        "bytes_per_s": copy_bandwidth(SETTING.device, flush),
        "flops_per_s": matmul_ceiling(SETTING.dtype, SETTING.device, flush),
    }


@pytest.fixture
def reset_deterministic():
    """One arm turns on deterministic algorithms for the whole process: turn them off again."""
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = True


@pytest.mark.benchmark(timer=clock(SETTING.device), disable_gc=True)
@pytest.mark.parametrize(("name", "passes", "size", "arm"), CASES)
def test_kernel(benchmark, report, reset_deterministic, flush, ceilings, name, passes, size, arm):
    op, config = OPS[name], SETTING.configs(OPS[name])[size]
    case = {"op": name, "passes": passes, "size": size, "arm": arm}
    torch.manual_seed(0)
    inputs = op.inputs(config, SETTING.batch, torch.empty(0, dtype=SETTING.dtype, device=SETTING.device))
    outputs = outputs_of(*op.arms["tripod"](*inputs))
    d_outputs = incoming_gradients(outputs)
    ours = with_gradients(outputs, inputs, d_outputs)
    try:
        function, arguments = op.arms[arm](*inputs)
        theirs = with_gradients(outputs_of(function, arguments), inputs, d_outputs)
    except Exception as failure:
        if arm == "tripod":
            raise
        report(case | {"missing": reason(failure)})
        pytest.skip(f"{arm}: {reason(failure)}")
    check_agreement(theirs, ours, AGREEMENT[SETTING.dtype])
    del outputs, ours, theirs  # free their memory
    # New leaves: the backward pass ends at the arguments and does not include what the arm did in advance.
    arguments = tuple(a.detach().requires_grad_(a.requires_grad) for a in arguments)

    def forward() -> tuple[Tensor, ...]:
        return outputs_of(function, arguments)

    def backward(*outputs: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(outputs, differentiable(arguments), d_outputs)

    def setup() -> tuple[tuple[Tensor, ...], dict]:
        outputs = forward() if passes == "backward" else ()
        flush()
        return outputs, {}

    timed = {"forward": forward, "backward": backward, "both": lambda: backward(*forward())}[passes]
    peak_bytes = peak_memory(lambda: timed(*setup()[0]), SETTING.device)
    benchmark.group = f"{name} {passes} {size}"
    benchmark.pedantic(timed, setup=setup, rounds=ROUNDS, warmup_rounds=WARM_UP)

    floor = op.floor(config, SETTING.batch, passes, SETTING.dtype.itemsize)
    case |= metrics(benchmark.stats.stats.median, floor, ceilings, peak_bytes)
    case |= {"shape": [list(tensor.shape) for tensor in inputs], "dtype": str(SETTING.dtype), "device": DEVICE}
    benchmark.extra_info.update(case)
    report(case)
