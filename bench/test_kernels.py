"""The kernels beside what a user would run instead: time, bandwidth or FLOP/s, memory.

    pytest bench --benchmark-only --benchmark-json bench/results/kernels-GPU.json

On a CUDA device this takes the shapes of training, bfloat16 and 8 x 2048 tokens; on a CPU small ones, and says so. The
peers are in kernel_peers.py, how they are measured in kernel_measure.py, the table at the end and the bars in it in
kernel_report.py. Every arm must first agree with ours; one that can not be had on this machine is reported with the
reason.
"""

import pytest
import torch
from torch import Tensor

from bench.ceilings import clock, flush_of, machine
from bench.kernel_measure import (
    AGREEMENT,
    check_agreement,
    differentiable,
    incoming_gradients,
    measure_ceilings,
    outputs_of,
    peak_memory,
    reason,
    values,
)
from bench.kernel_peers import OPS, setting
from bench.kernel_report import entry

HERE = setting()
DEVICE = machine(HERE.device)["gpu"] or machine(HERE.device)["cpu"]
ROUNDS = 50 if HERE.device.type == "cuda" else 10
WARM_UP = 5  # rounds

CASES = [
    pytest.param(op, passes, size, arm, id=f"{op}-{passes}-{size}-{arm}")
    for op, facts in OPS.items()
    for size in HERE.configs(facts)
    for passes in facts.passes
    for arm in facts.arms
]


@pytest.fixture(scope="session")
def flush():
    return flush_of(HERE.device)


@pytest.fixture(scope="session")
def ceilings(flush) -> dict[str, float]:
    return measure_ceilings(HERE.device, HERE.dtype, flush)


@pytest.fixture
def switches():
    """An arm may turn on deterministic algorithms for the whole process."""
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = True


@pytest.mark.benchmark(timer=clock(HERE.device), disable_gc=True)
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
    check_agreement(found, ours, AGREEMENT[HERE.dtype])
    del outputs, ours, found  # the memory that they hold
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
    peak_bytes = peak_memory(lambda: timed(*setup()[0]), HERE.device)
    benchmark.group = f"{op} {passes} {size}"
    benchmark.pedantic(timed, setup=setup, rounds=ROUNDS, warmup_rounds=WARM_UP)

    floor = facts.floor(config, HERE.batch, passes, HERE.dtype.itemsize)
    case |= entry(benchmark.stats.stats.median, floor, ceilings, peak_bytes)
    case |= {"shape": [list(tensor.shape) for tensor in inputs], "dtype": str(HERE.dtype), "device": DEVICE}
    benchmark.extra_info.update(case)
    report(case)
