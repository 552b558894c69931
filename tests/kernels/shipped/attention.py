"""Rotary attention, forward and backward, for every head_dim of the suite."""

from dataclasses import replace
from typing import Any

import torch

from kernels import tiles
from kernels.attention import CHUNKS, attention_dkv_kernel, attention_dq_kernel, attention_forward_kernel
from kernels.rotary import rotate_block, rotate_kernel
from model import SUITE
from tests.kernels.shipped import Shipped

HEADS = {config.head_dim: config.heads for config in SUITE.values()}


def _shipped(
    what: str, kernel: Any, arch: int, head_dim: int, tile: tiles.Tile, tensors: dict[str, int], **constants: bool
) -> list[Shipped]:
    """One attention kernel, without and with documents. `tensors` maps the name of a tensor to the rows of its tiles.
    Such a tensor is passed as descriptors from Hopper on, and as pointers before, one for every column chunk."""
    signature = {"lse_ptr": "*fp32", "delta_ptr": "*fp32", "seq": "i32"}
    constants |= {"starts_ptr": None, "ends_ptr": None}
    constants |= {"HEADS": HEADS[head_dim], "HEAD_DIM": head_dim}
    constants |= {"BLOCK_Q": tile.block_q, "BLOCK_K": tile.block_k}
    for tensor, rows in tensors.items():
        constants[f"{tensor}_tail_ptr"] = None  # unless there is a second chunk
        for argument, columns in zip((f"{tensor}_ptr", f"{tensor}_tail_ptr"), CHUNKS[head_dim]):
            signature[argument] = f"tensordesc<bf16[1, {rows}, {columns}]>" if arch >= 90 else "*bf16"
    alone = Shipped(
        name=f"attention {what}, head_dim {head_dim}",
        kernel=kernel,
        signature={name: type for name, type in signature.items() if name in kernel.arg_names},
        constants={n: v for n, v in constants.items() if n in kernel.arg_names and n not in signature},
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        products=True,
    )
    (bounds,) = alone.constants.keys() & {"starts_ptr", "ends_ptr"}
    return [
        alone,
        replace(
            alone,
            name=f"{alone.name}, documents",
            signature=alone.signature | {bounds: "*i32"},
            constants={name: value for name, value in alone.constants.items() if name != bounds},
        ),
    ]


def shipped(arch: int) -> list[Shipped]:
    kernels = []
    for head_dim in sorted(HEADS):
        forward, dq, dk, dv = tiles.attention(arch, head_dim, torch.bfloat16)
        q, k = forward.block_q, forward.block_k
        tensors = {"q": q, "kv": k, "out": q}
        kernels.extend(_shipped("forward", attention_forward_kernel, arch, head_dim, forward, tensors))
        q, k = dq.block_q, dq.block_k
        tensors = {"q": q, "kv": k, "out": q, "d_out": q, "d_qkv": q}
        kernels.extend(_shipped("dq", attention_dq_kernel, arch, head_dim, dq, tensors))
        for what, tile in ({"dk and dv": dk} if dv is None else {"dk": dk, "dv": dv}).items():
            q, k = tile.block_q, tile.block_k
            tensors = {"q": q, "kv": k, "d_out": q, "d_qkv": k}
            wanted = {"DK": "dk" in what, "DV": "dv" in what}
            kernels.extend(_shipped(what, attention_dkv_kernel, arch, head_dim, tile, tensors, **wanted))
        shape = {"HEADS": HEADS[head_dim], "HEAD_DIM": head_dim, "HALF": head_dim // 8}
        kernels.append(
            Shipped(
                name=f"attention rotation, head_dim {head_dim}",
                kernel=rotate_kernel,
                signature=dict.fromkeys(("cos_ptr", "sin_ptr"), "*fp32")
                | {"qkv_ptr": "*bf16", "direction": "fp32", "rows": "i32", "seq": "i32"},
                constants=shape | {"BLOCK": rotate_block(head_dim // 8)},
                num_warps=4,
                num_stages=3,
            )
        )
    return kernels
