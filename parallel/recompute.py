"""Recompute: a block keeps fewer activations and computes the others again in its backward pass, with the same bits."""

from collections.abc import Callable
from functools import partial

import torch
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from model import Pythia

RECOMPUTE = ("none", "cheap", "full")

_aten = torch.ops.aten
EXPENSIVE = {
    _aten.mm.default,
    _aten.addmm.default,
    torch.ops.tripod.linear.default,
    torch.ops.tripod.short_attention.default,
    torch.ops.tripod.linear_rotary_attention.default,
    _aten._scaled_dot_product_flash_attention.default,
    _aten._scaled_dot_product_efficient_attention.default,
    _aten._scaled_dot_product_cudnn_attention.default,
    _aten._scaled_dot_product_flash_attention_for_cpu.default,
}


def set_recompute(model: Pythia, recompute: str) -> None:
    """Choose what every block keeps for its backward pass.

    none     all activations
    cheap    the results of matmuls and attention; norms, GELU and additions are computed again
    full     only the input of the block
    """
    context = {"context_fn": partial(create_selective_checkpoint_contexts, _policy)} if recompute == "cheap" else {}
    for block in model.blocks:
        vars(block).pop("forward", None)  # set by an earlier call
        if recompute != "none":
            block.forward = _recomputing(block.forward, context)


def _policy(context, op, *args, **kwargs) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if op in EXPENSIVE else CheckpointPolicy.PREFER_RECOMPUTE


def _recomputing(forward: Callable, context: dict) -> Callable:
    def run(*args):  # torch.compile compiles this function, but not torch's own
        return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **context)

    return run
