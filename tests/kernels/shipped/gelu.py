"""GELU in both forms, for the smallest and the largest ffn; the sizes between them add no new case. The bias is
bfloat16, as FSDP casts it, or float32, as a single GPU keeps it."""

import torch

from kernels import gelu
from model import SIZES
from tests.kernels.shipped import Shipped


def shipped(arch: int) -> list[Shipped]:
    kernels_by_direction = {"forward": gelu.gelu_forward_kernel, "backward": gelu.gelu_backward_kernel}
    kernels = []
    for ffn in (SIZES[size].ffn for size in ("14m", "12b")):
        for approximate in ("tanh", "none"):
            _, launch = gelu._launch(torch.empty(1, ffn, device="meta"), approximate)
            warps = launch.pop("num_warps")
            for direction, kernel in kernels_by_direction.items():
                for bias in ("bf16", "fp32"):
                    types = dict.fromkeys(("h_ptr", "out_ptr", "da_ptr", "dh_ptr"), "*bf16")
                    types |= {"bias_ptr": f"*{bias}", "d_bias_ptr": "*fp32", "rows": "i32", "rows_per_program": "i32"}
                    kernels.append(
                        Shipped(
                            name=f"gelu {direction}, ffn {ffn}, {approximate}, {bias} bias",
                            kernel=kernel,
                            signature={name: types[name] for name in kernel.arg_names if name in types},
                            constants=launch,
                            num_warps=warps,
                            num_stages=3,  # of loops without their own num_stages
                        )
                    )
    return kernels
