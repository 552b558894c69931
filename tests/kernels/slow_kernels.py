"""Kernels with correct results and bad machine code. tests/kernels/cubins.py must find what is bad."""

from kernels.backend import tl, triton
from tests.kernels.shipped import Shipped


@triton.jit
def _hold_a_row(x, out, N: tl.constexpr):
    """512 values of each thread must wait for the sum of all, but there are 255 registers."""
    columns = tl.arange(0, N)
    row = tl.load(x + columns)
    tl.store(out + columns, row / tl.sum(row))


@triton.jit
def _multiply_in_float32(a, b, out, N: tl.constexpr):
    """Exact float32 matmuls cannot use the tensor cores."""
    tile = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    product = tl.dot(tl.load(a + tile), tl.load(b + tile), input_precision="ieee")
    tl.store(out + tile, product)


@triton.jit
def _wrong(x, out):
    tl.store(out, tl.load(x) + tl.zeros([2, 3, 5], tl.float32))


def shipped(arch: int) -> list[Shipped]:
    x, out = {"x": "*fp32", "out": "*fp32"}, {"a": "*fp32", "b": "*fp32", "out": "*fp32"}
    return [
        Shipped("spills", _hold_a_row, x, {"N": 65_536}, num_warps=4, num_stages=1),
        Shipped("avoids the tensor cores", _multiply_in_float32, out, {"N": 32}, 4, 1, products=True),
        Shipped("does not compile", _wrong, x, {}, num_warps=4, num_stages=1),
    ]
