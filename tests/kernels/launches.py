"""What Tripod launches on a GPU: a training step on a CUDA driver that does nothing, at the real widths of every size.

    python -m tests.kernels.launches < CASES.json         cases and results are JSON, see `Case` and `Launch`

The model, its autograd, the custom ops and Triton's dispatch are the real ones. Triton's compiler and driver are not
called, and torch's own arithmetic is skipped: every tensor is memory that nobody reads or writes. So a step of 12b
takes a second and no memory. float16 stands for bfloat16, which the attention op refuses without a GPU.

Tests set TRITON_INTERPRET=1, and then a kernel has no dispatch: this file runs as a process of its own (`record`).
"""

import json
import mmap
import os
import subprocess
import sys
from dataclasses import asdict, dataclass, replace
from functools import cache
from types import SimpleNamespace
from typing import Any

import torch
from torch._library.custom_ops import OPDEFS
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only


@dataclass(frozen=True)
class Case:
    """A forward and a backward pass of one micro-batch of a size, with this number of layers."""

    size: str
    arch: int = 90
    batch: int = 8
    seq: int = 2048
    dtype: str = "float16"
    layers: int = 2
    cast: bool = False  # parameters have this dtype, as FSDP casts them; else float32
    documents: bool = False  # --document-mask
    misaligned: bool = False  # tensors that torch makes do not begin at a multiple of 16 bytes


@dataclass(frozen=True)
class Launch:
    """One launch of a kernel: its specialisation, its grid and what its scalar and descriptor arguments are."""

    kernel: str
    signature: dict[str, str]  # as Shipped.signature
    constants: dict[str, Any]  # as Shipped.constants; with None arguments, and integers that are 1
    num_warps: int
    num_stages: int
    unaligned: list[str]  # pointers that are no multiple of 16 bytes, integers that are no multiple of 16
    grid: list[int]
    scalars: dict[str, int]
    descriptors: dict[str, dict]  # base (address), itemsize, shape, strides (elements), block (of a tile)


NO_RESERVE = 0x4000  # Linux's MAP_NORESERVE, which Python 3.11 and 3.12 do not name
ADDRESSES = 2**38  # bytes of addresses without memory: every tensor begins at the first, because nobody reads or writes


class Skip(TorchDispatchMode):
    """Skips the arithmetic of torch. Results have the right shape and dtype, and uninitialised memory."""

    def __init__(self, misaligned: bool):
        super().__init__()
        self.misaligned = misaligned

    @staticmethod
    @cache
    def addresses() -> mmap.mmap:
        return mmap.mmap(-1, ADDRESSES, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NO_RESERVE)

    @staticmethod
    def meta(x: torch.Tensor) -> torch.Tensor:
        return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")  # x.to("meta") would read x

    def empty(self, meta: torch.Tensor) -> torch.Tensor:
        if meta.numel() == 0:
            return torch.empty_strided(meta.shape, meta.stride(), dtype=meta.dtype)
        offset = meta.itemsize if self.misaligned else 0
        memory = torch.frombuffer(self.addresses(), dtype=meta.dtype, count=meta.numel(), offset=offset)
        return memory.as_strided(meta.shape, meta.stride())

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func.namespace == "tripod":  # tensors that our ops make for themselves are aligned, as on a GPU
            implementation = OPDEFS[func._schema.name]._init_fn
            with Skip(misaligned=False):
                return implementation(*args, **kwargs)
        if func.namespace == "prim" or (func.is_view and func is not torch.ops.aten.to.dtype):  # which may also copy
            return func(*args, **kwargs)
        if func._schema.is_mutable:
            return kwargs["out"] if "out" in kwargs else args[0]
        args, kwargs = tree_map_only(torch.Tensor, self.meta, (args, kwargs))
        if "device" in kwargs:
            kwargs["device"] = "meta"
        return tree_map_only(torch.Tensor, self.empty, func(*args, **kwargs))


def no_driver(arch: int) -> SimpleNamespace:
    from triton.backends.compiler import GPUTarget

    return SimpleNamespace(
        get_current_device=lambda: 0,
        get_current_stream=lambda device: 0,
        get_current_target=lambda: GPUTarget("cuda", arch, 32),
    )


def record_launches(found: list[Launch]) -> None:
    """From now on a launch is added to `found` instead of being compiled and sent to a GPU."""
    from triton.runtime.jit import JITFunction
    from triton.tools.tensor_descriptor import TensorDescriptor

    def describe(x: TensorDescriptor) -> dict:
        facts = {"base": x.base.data_ptr(), "itemsize": x.base.itemsize}
        return facts | {"shape": list(x.shape), "strides": list(x.strides), "block": list(x.block_shape)}

    def do_compile(kernel, key, signature, device, constants, options, attributes, warmup):
        names = kernel.arg_names
        typed = {name: type for name, type in signature.items() if type != "constexpr"}
        aligned = {names[path[0]] for path, found in attributes.items() if ["tt.divisibility", 16] in found}

        def run(x, y, z, stream, function, metadata, launch_metadata, enter, leave, *arguments):
            values = {name: value for name, value in zip(names, arguments) if name in typed}
            found.append(
                Launch(
                    kernel=kernel.__name__,
                    signature=typed,
                    constants={names[path[0]]: value for path, value in constants.items()},
                    num_warps=options.num_warps,
                    num_stages=options.num_stages,
                    unaligned=[n for n, t in typed.items() if t[0] in "*i" and n not in aligned],
                    grid=[x, y, z],
                    scalars={n: value for n, value in values.items() if isinstance(value, int)},
                    descriptors={n: describe(x) for n, x in values.items() if isinstance(x, TensorDescriptor)},
                )
            )

        return SimpleNamespace(run=run, launch_metadata=lambda *_: None, function=0, packed_metadata=())

    JITFunction._do_compile = do_compile


def launches(case: Case) -> list[Launch]:
    import triton

    from kernels import backend, tiles
    from model import SIZES, Pythia

    triton.runtime.driver.set_active(no_driver(case.arch))
    tiles.architecture = lambda device: case.arch
    backend.INTERPRETED = True  # the kernels run on CPU tensors
    found: list[Launch] = []
    record_launches(found)
    with torch.device("meta"):
        model = Pythia(replace(SIZES[case.size], layers=case.layers, seq_len=case.seq))
    model.compute_dtype, model.document_mask = getattr(torch, case.dtype), case.documents
    with Skip(case.misaligned):
        model.to_empty(device="cpu")
        if case.cast:
            model.to(model.compute_dtype)
        tokens = torch.empty(case.batch, case.seq + 1, dtype=torch.int64)
        model(tokens[:, :-1], tokens[:, 1:]).backward()
    return found


def record(cases: list[Case]) -> list[list[Launch]]:
    """The launches of every case, from a process in which kernels are not interpreted."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"OMP_NUM_THREADS": "1"}
    command, text = [sys.executable, "-m", "tests.kernels.launches"], json.dumps([asdict(case) for case in cases])
    output = subprocess.run(command, input=text, env=environment, stdout=subprocess.PIPE, text=True, check=True).stdout
    return [[Launch(**launch) for launch in found] for found in json.loads(output)]


if __name__ == "__main__":
    print(json.dumps([[asdict(launch) for launch in launches(Case(**case))] for case in json.load(sys.stdin)]))
