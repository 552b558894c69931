"""The loss over the three padded vocabularies of the suite, with its gradient (training) and without (evaluation)."""

from kernels.cross_entropy import LANES, REGISTERS, cross_entropy_kernel
from tests.kernels.shipped import Shipped


def shipped(arch: int) -> list[Shipped]:
    return [
        Shipped(
            name=f"cross-entropy, {'mean' if gradient else 'loss only'}, vocab {vocab}",
            kernel=cross_entropy_kernel,
            signature={"logits_ptr": "*bf16", "targets_ptr": "*i64", "losses_ptr": "*fp32"},
            constants={"d_losses_ptr": None, "VOCAB": vocab, "WITH_GRADIENT": gradient, "LANES": LANES, "VECTOR": 8},
            num_warps=LANES // 32,
            num_stages=3,
            max_registers=REGISTERS,
        )
        for vocab in (50_304, 50_432, 50_688)
        for gradient in (True, False)
    ] + [
        Shipped(
            name="cross-entropy, weighed gradient, vocab 50304",
            kernel=cross_entropy_kernel,
            signature={"logits_ptr": "*bf16", "targets_ptr": "*i64", "losses_ptr": "*fp32", "d_losses_ptr": "*fp32"},
            constants={"VOCAB": 50_304, "WITH_GRADIENT": True, "LANES": LANES, "VECTOR": 8},
            num_warps=LANES // 32,
            num_stages=3,
            max_registers=REGISTERS,
        )
    ]
