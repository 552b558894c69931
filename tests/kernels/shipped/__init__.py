"""Every Triton kernel as it is launched for the ten sizes, to be compiled without a GPU and inspected."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Shipped:
    """One specialisation of a kernel. `signature` has the type of every argument that is not constant, by name:
    "*bf16", "i32", "fp32", "tensordesc<bf16[128, 64]>"; `constants` the value of every tl.constexpr."""

    name: str  # unique: "attention forward, head_dim 64"
    kernel: Any  # the function decorated with triton.jit
    signature: dict[str, str]
    constants: dict[str, Any]
    num_warps: int
    num_stages: int
    max_registers: int | None = None  # of a thread, if the launch limits them
    products: bool = False  # whether it has matmuls, and so must use the tensor cores
