"""Every hidden size, with parameters as FSDP casts them (bfloat16) and as a single GPU keeps them (float32)."""

from kernels import layernorm
from model import SIZES
from tests.kernels.shipped import Shipped

ACTIVATIONS = ("x", "attn", "mlp", "residual", "u", "v", "d_residual", "du", "dv", "dx")
PARAMETERS = ("branch_bias", "weight1", "bias1", "weight2", "bias2")
FLOAT32 = ("mean", "rstd", "sums")
SCALARS = {"eps": "fp32", "rows": "i32", "rows_per_program": "i32"}

FIRST = ("attn", "mlp", "branch_bias", "residual")  # None before the first layer
FINAL = ("weight2", "bias2", "v", "dv", "d_residual")  # None after the last layer


def specialisation(direction: str, hidden: int, parameters: str, place: str, absent: tuple[str, ...]) -> Shipped:
    kernel, launch = {
        "forward": (layernorm.layer_norm_forward_kernel, layernorm._launch(hidden)),
        "backward": (layernorm.layer_norm_backward_kernel, layernorm._launch_backward(hidden)),
    }[direction]
    pointers = dict.fromkeys(ACTIVATIONS, "*bf16") | dict.fromkeys(PARAMETERS, f"*{parameters}")
    pointers |= dict.fromkeys(FLOAT32, "*fp32")
    types = {f"{name}_ptr": type for name, type in pointers.items()} | SCALARS
    absent = [f"{name}_ptr" for name in absent]
    present = [name for name in kernel.arg_names if name in types and name not in absent]
    return Shipped(
        name=f"layernorm {direction}, hidden {hidden}, {parameters} parameters, {place}",
        kernel=kernel,
        signature={name: types[name] for name in present},
        constants={name: value for name, value in launch.items() if name != "num_warps"}
        | {name: None for name in absent if name in kernel.arg_names},
        num_warps=launch["num_warps"],
        num_stages=3,  # of loops without their own num_stages; there are none here
    )


def shipped(arch: int) -> list[Shipped]:
    hiddens = sorted({config.hidden for config in SIZES.values()})
    return [
        specialisation(direction, hidden, parameters, place, absent)
        for direction in ("forward", "backward")
        for hidden in hiddens
        for parameters, place, absent in (
            ("bf16", "between layers", ()),
            ("fp32", "between layers", ()),
            ("bf16", "final norm", FINAL),
            ("bf16", "first layer", FIRST),
        )
        if direction == "forward" or place != "first layer"  # in backward it lacks only d_residual
    ]
