"""The smallest and the largest width of the MLP, between which nothing new happens, in both forms; with a bias as FSDP
casts it (bfloat16) and as a single GPU keeps it (float32)."""

import torch

from kernels import gelu
from model import SIZES
from tests.kernels.shipped import Shipped


def shipped(arch: int) -> list[Shipped]:
    kernels = []
    for ffn in (SIZES[size].ffn for size in ("14m", "12b")):
        for approximate in ("tanh", "none"):
            _, launch = gelu._launch(torch.empty(1, ffn, device="meta"), approximate)
            warps = launch.pop("num_warps")
            for direction, kernel in (("forward", gelu._forward), ("backward", gelu._backward)):
                for bias in ("bf16", "fp32"):
                    types = {"h": "*bf16", "out": "*bf16", "da": "*bf16", "dh": "*bf16", "bias": f"*{bias}"}
                    types |= {"d_bias": "*fp32", "rows": "i32", "rows_per_program": "i32"}
                    kernels.append(
                        Shipped(
                            name=f"gelu {direction}, ffn {ffn}, {approximate}, {bias} bias",
                            kernel=kernel,
                            signature={name: types[name] for name in kernel.arg_names if name in types},
                            constants=launch,
                            num_warps=warps,
                            num_stages=3,  # of loops that do not say
                        )
                    )
    return kernels
