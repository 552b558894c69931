"""What a step keeps in memory: activation recompute. The model file knows nothing of it."""

from functools import partial

import torch
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from model import Pythia

RECOMPUTE = ("none", "cheap", "full")

_aten = torch.ops.aten
_EXPENSIVE = {
    _aten.mm.default,
    _aten.addmm.default,
    torch.ops.tripod.linear.default,
    torch.ops.tripod.short_attention.default,
    torch.ops.tripod.rotary_attention.default,
    _aten._scaled_dot_product_flash_attention.default,
    _aten._scaled_dot_product_efficient_attention.default,
    _aten._scaled_dot_product_cudnn_attention.default,
    _aten._scaled_dot_product_flash_attention_for_cpu.default,
}


def _keep_expensive(context, op, *args, **kwargs) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if op in _EXPENSIVE else CheckpointPolicy.PREFER_RECOMPUTE


def set_recompute(model: Pythia, recompute: str) -> None:
    """Have every block keep less for its backward pass and compute the rest again. The numbers stay the same.

    none     keep everything
    cheap    keep the results of matrix products and attention; recompute norms, GELU, rotary and additions
    full     keep only the input of the block
    """
    if recompute == "none":
        return
    contexts = {}
    if recompute == "cheap":
        contexts["context_fn"] = partial(create_selective_checkpoint_contexts, _keep_expensive)
    for block in model.blocks:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False, **contexts)
