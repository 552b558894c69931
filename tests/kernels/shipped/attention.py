"""Rotary attention, forward and backward, for every head_dim of the suite."""

from typing import Any

import torch

from kernels import tiles
from kernels.attention import CHUNKS, ROTATE_BLOCK, _dkv_kernel, _dq_kernel, _forward_kernel, _rotate_kernel
from model import SIZES
from tests.kernels.shipped import Shipped

HEADS = {config.head_dim: config.heads for config in SIZES.values()}


def _shipped(
    what: str, kernel: Any, arch: int, head_dim: int, tile: tiles.Tile, tensors: dict[str, int], **constants: bool
) -> Shipped:
    """`tensors` has the rows of a tile of each. They come as descriptors, before Hopper as pointers, chunk by chunk."""
    signature = {"lse": "*fp32", "delta": "*fp32", "cos": "*fp32", "sin": "*fp32", "seq": "i32"}
    constants |= {"HEADS": HEADS[head_dim], "HEAD_DIM": head_dim, "HALF": head_dim // 8}
    constants |= {"BLOCK_Q": tile.block_q, "BLOCK_K": tile.block_k}
    for tensor, rows in tensors.items():
        constants[f"{tensor}_tail"] = None  # unless there is a second chunk
        for argument, columns in zip((tensor, f"{tensor}_tail"), CHUNKS[head_dim]):
            signature[argument] = f"tensordesc<bf16[1, {rows}, {columns}]>" if arch >= 90 else "*bf16"
    return Shipped(
        name=f"attention {what}, head_dim {head_dim}",
        kernel=kernel,
        signature={name: type for name, type in signature.items() if name in kernel.arg_names},
        constants={n: v for n, v in constants.items() if n in kernel.arg_names and n not in signature},
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        products=True,
    )


def shipped(arch: int) -> list[Shipped]:
    kernels = []
    for head_dim in sorted(HEADS):
        forward, dq, dk, dv = tiles.attention(arch, head_dim, torch.bfloat16)
        q, k = forward.block_q, forward.block_k
        tensors = {"q": q, "k": k, "v": k, "out": q}
        kernels.append(_shipped("forward", _forward_kernel, arch, head_dim, forward, tensors))
        q, k = dq.block_q, dq.block_k
        tensors = {"q": q, "k": k, "v": k, "out": q, "d_out": q, "d_qkv": q}
        kernels.append(_shipped("dq", _dq_kernel, arch, head_dim, dq, tensors))
        for what, tile in ({"dk and dv": dk} if dv is None else {"dk": dk, "dv": dv}).items():
            q, k = tile.block_q, tile.block_k
            tensors = {"q": q, "k": k, "v": k, "d_out": q, "d_qkv": k}
            wanted = {"DK": "dk" in what, "DV": "dv" in what}
            kernels.append(_shipped(what, _dkv_kernel, arch, head_dim, tile, tensors, **wanted))
        kernels.append(
            Shipped(
                name=f"attention rotation, head_dim {head_dim}",
                kernel=_rotate_kernel,
                signature={
                    "qkv": "*bf16",
                    "cos": "*fp32",
                    "sin": "*fp32",
                    "rotated": "*bf16",
                    "rows": "i32",
                    "seq": "i32",
                },
                constants={
                    "HEADS": HEADS[head_dim],
                    "HEAD_DIM": head_dim,
                    "HALF": head_dim // 8,
                    "BLOCK": ROTATE_BLOCK,
                },
                num_warps=4,
                num_stages=3,
            )
        )
    return kernels
