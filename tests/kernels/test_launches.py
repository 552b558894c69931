"""What a training step of every size launches: on a driver that does nothing (tests/kernels/launches.py).

A GPU refuses a launch, or a descriptor, that breaks a rule of CUDA. And what is launched must be what test_cubins.py
compiles and inspects: an argument of another type, or one that is no multiple of 16, is another kernel.
"""

from dataclasses import asdict, replace

import pytest

from kernels.cross_entropy import triton_chunk
from model import SUITE
from tests.kernels import cubins
from tests.kernels.cubins import ARCHES
from tests.kernels.launches import Case, Launch, record

pytest.importorskip("triton", reason="the kernels are launched by triton, which has wheels for Linux only")

INT32 = 2**31 - 1
LARGEST = 1024  # rows of a micro-batch: the batch of Pythia on one GPU, far more than any holds

# Constants that only scale offsets: the cubin tests compile one value for all sizes.
ONLY_OFFSETS = {"HEADS", "FFN"}
# Arguments whose alignment changes no load and no store: one number is read from the pointer, or it bounds a loop.
ANY_ALIGNMENT = {"targets_ptr", "rows_per_program"}

TRAINING = [Case(size, arch, cast=cast) for size in SUITE for arch in ARCHES for cast in (False, True)]
SHAPES = [  # every size: rows of other lengths, one row, unaligned tensors, the largest micro-batch, and float32
    Case(size, 90, batch, seq, dtype, misaligned=misaligned)
    for size in SUITE
    for batch, seq, dtype, misaligned in (
        (1, 2048, "float16", False),
        (2, 1999, "float16", True),
        (1, 1, "float16", True),
        (2, 1999, "float32", True),
        (LARGEST, 2048, "float16", False),
        (LARGEST, 2048, "float32", False),
    )
]
# Every head_dim of the suite.
DOCUMENTS = [Case(size, arch, documents=True) for size in ("14m", "160m", "1b", "1.4b", "2.8b") for arch in ARCHES]
DEPTHS = [Case("160m", layers=layers) for layers in (2, 3)]
CASES = TRAINING + SHAPES + DOCUMENTS + DEPTHS


@pytest.fixture(scope="module")
def launched() -> dict[Case, list[Launch]]:
    return dict(zip(CASES, record(CASES)))


def faults(launch: Launch) -> list[str]:
    """Rules of CUDA that a launch breaks."""
    (x, y, z), threads = launch.grid, 32 * launch.num_warps
    found = []
    if not (0 < x <= INT32 and 0 < y <= 65_535 and 0 < z <= 65_535):
        found.append(f"grid {launch.grid}")
    if threads > 1024:
        found.append(f"{threads} threads")
    # Triton passes a larger integer as int64: another kernel. Kernels compute with int32 up to the next block of rows.
    found += [f"{name} = {value}" for name, value in launch.scalars.items() if not 0 <= value < INT32 - 1024]
    for name, descriptor in launch.descriptors.items():
        found += [f"{name}: {fault}" for fault in tma_faults(**descriptor)]
    return found


def tma_faults(base: int, itemsize: int, shape: list[int], strides: list[int], block: list[int]) -> list[str]:
    """Rules of cuTensorMapEncodeTiled (CUDA driver API) that a descriptor breaks."""
    rules = {
        "the address must be a multiple of 16": base % 16 == 0,
        "1 to 5 dimensions": 1 <= len(shape) <= 5 and len(shape) == len(strides) == len(block),
        "1 to 2^32 elements in every dimension": all(1 <= n <= 2**32 for n in shape),
        "strides must be multiples of 16 bytes": all(stride * itemsize % 16 == 0 for stride in strides[:-1]),
        "strides must be less than 2^40 bytes": all(0 < stride * itemsize < 2**40 for stride in strides[:-1]),
        "the last dimension must be contiguous": strides[-1] == 1,
        "1 to 256 elements of a tile in every dimension": all(1 <= n <= 256 for n in block),
        "a row of a tile must be a multiple of 16 bytes": block[-1] * itemsize % 16 == 0,
        # not a rule: what lies outside is read as zeros, so a tile that is wider than the tensor would hide a mistake
        "a tile must not be wider than the tensor": block[-1] <= shape[-1],
    }
    return [rule for rule, kept in rules.items() if not kept]


def specialisation(kernel: str, signature: dict, constants: dict, num_warps: int, num_stages: int) -> tuple:
    """What decides the machine code, with one name for both 16-bit types: what must be equal, and the arguments."""
    types = {name: type.replace("bf16", "fp16") for name, type in signature.items()}
    values = {name: value for name, value in constants.items() if name not in ONLY_OFFSETS and value is not None}
    return (kernel, tuple(sorted(values.items())), num_warps, num_stages), set(types.items())


@pytest.mark.parametrize("size", SUITE)
def test_no_launch_breaks_a_rule_of_cuda(size, launched):
    for case in (case for case in CASES if case.size == size):
        found = launched[case]
        assert [(case, launch.kernel, fault) for launch in found for fault in faults(launch)] == []
        assert any(launch.descriptors for launch in found) == (case.arch >= 90)


@pytest.mark.parametrize("arch", ARCHES)
def test_every_launch_is_of_a_kernel_that_the_cubin_tests_compile(arch, launched):
    shipped = [
        specialisation(k.kernel.__name__, k.signature, k.constants, k.num_warps, k.num_stages)
        for module in cubins.modules()
        for k in cubins.kernels(module, arch).values()
    ]
    for case in TRAINING + DOCUMENTS:
        for launch in launched[case] if case.arch == arch else ():
            facts = launch.kernel, launch.signature, launch.constants, launch.num_warps, launch.num_stages
            fixed, arguments = specialisation(*facts)
            # Without an optional argument a kernel has less to do: the one with all arguments is the harder case.
            assert any(fixed == other and arguments <= more for other, more in shipped), (case, launch)
            assert set(launch.unaligned) <= ANY_ALIGNMENT, (case, launch)


def test_without_documents_the_kernels_know_nothing_of_them(launched):
    """A pointer that is None is not an argument of the compiled kernel. With documents it is the only difference."""
    for case in DOCUMENTS:
        with_them, without = launched[case], launched[replace(case, documents=False)]
        bounds = [x.signature.keys() & {"starts_ptr", "ends_ptr"} for x in with_them]
        assert [len(names) for names in bounds] == ["attention" in x.kernel for x in with_them]
        for ours, theirs, names in zip(with_them, without, bounds, strict=True):
            assert all(theirs.constants[name] is None for name in names)
            constants = {name: value for name, value in theirs.constants.items() if name not in names}
            assert ours == replace(
                theirs, signature=theirs.signature | dict.fromkeys(names, "*i32"), constants=constants
            )


def test_launches_of_a_layer(launched):
    """A launch costs the host 5 to 10 microseconds, a descriptor about one: small sizes wait for the host."""
    two, three = (launched[case] for case in DEPTHS)
    assert len(three) - len(two) == 9
    assert sum(len(x.descriptors) for x in three) - sum(len(x.descriptors) for x in two) == 12
    losses = [launch for launch in two if "cross_entropy" in launch.kernel]
    assert len(losses) == 8 * 2048 // triton_chunk(SUITE["160m"].hidden)


GOOD = {"base": 4096, "itemsize": 2, "shape": [8, 2048, 2304], "strides": [2048 * 2304, 2304, 1], "block": [1, 128, 64]}


def test_every_fault_is_found():
    launch = Launch("kernel", {}, {}, 8, 2, [], [1, 1, 1], {"seq": 2048}, {"x_ptr": GOOD})
    assert faults(launch) == []
    for name, value in {
        "base": 4104,
        "shape": [8, 0, 2304],
        "strides": [2048 * 2304, 2305, 1],
        "block": [1, 512, 64],
    }.items():
        assert len(faults(Launch(**asdict(launch) | {"descriptors": {"x_ptr": GOOD | {name: value}}}))) == 1, name
    for change in ({"grid": [2**31, 1, 1]}, {"grid": [1, 65_536, 1]}, {"num_warps": 64}, {"scalars": {"rows": 2**31}}):
        assert len(faults(Launch(**asdict(launch) | change))) == 1, change
