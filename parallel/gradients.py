"""The gradients of a step: added up over micro-steps and ranks, and the sums of --bitwise."""

import torch
import torch.distributed as torch_dist
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from model import Pythia
from parallel.fsdp import copies, local, sharded_modules
from runtime.ranks import Dist


class Gradients:
    """Adds up the gradients of a step over its micro-steps and over ranks.

    Call `set_sync` before, and `accumulate` after, the backward pass of every micro-step; then .grad of every parameter
    is the sum for the rows of weights that this rank holds.

    Usually every rank adds up its own, which takes 4 bytes a parameter on each, and they travel after the last
    micro-step. With whole=False they travel after every micro-step, and a rank holds its part of the sum only.

    With bitwise=True the sum is the same to the last bit on any number of ranks that is a power of two. Its summands
    are the gradients of micro-batches 0, 1, 2 .. of the step, of which micro-step i has world * i and the world - 1
    that follow. They are added up along a binary tree: neighbours first, then neighbouring pairs, and so on. The lower
    levels lie within a micro-step, among ranks (TreeReduceScatter); the upper ones join micro-steps as a binary counter
    carries, so that at most log2(micro-steps) + 1 sums are alive, each of the rows that a rank holds.
    """

    def __init__(self, model: Pythia, ranks: Dist, shard: str, whole: bool = True, bitwise: bool = False):
        self.model, self.ranks, self.whole, self.bitwise = model, ranks, whole, bitwise
        self.keep_weights = shard in ("grad", "none")
        self.parameters = list(model.parameters())
        self.sums: list[tuple[int, list[Tensor]]] = []  # (level in the tree, gradients), levels descending
        if bitwise:
            for module in sharded_modules(model):
                module.set_custom_reduce_scatter(TreeReduceScatter())

    def set_sync(self, last: bool) -> None:
        """Before a backward pass: whether it is the step's last."""
        if isinstance(self.model, FSDPModule):
            self.model.set_requires_gradient_sync(last or self.bitwise or not self.whole)
            self.model.set_reshard_after_backward(last or not self.keep_weights)

    def accumulate(self, last: bool) -> None:
        """After a backward pass."""
        if not self.bitwise:
            return
        level, total = 0, [local(p.grad) for p in self.parameters]
        while self.sums and (last or self.sums[-1][0] == level):
            left = self.sums.pop()[1]
            torch._foreach_add_(left, total)
            level, total = level + 1, left
        if last:
            for p, gradient in zip(self.parameters, total):
                local(p.grad).copy_(gradient)
        else:
            self.sums.append((level, total))
            for p in self.parameters:
                p.grad = None

    def squared_norm(self) -> Tensor:
        """This rank's share, float64, of the squared L2 norm of all gradients: shares of all ranks add up to it."""
        if self.bitwise:
            return squared_norm_in_any_order(self.parameters, self.ranks) * self.ranks.is_main
        return squared_norm(self.parameters) / copies(self.parameters[0])


class TreeReduceScatter:
    """Adds up tensors of ranks along a binary tree: a communication of FSDP2's, instead of the library's, whose order
    of summation depends on the number of ranks."""

    def allocate(self, size, *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(self, output_tensor: Tensor, input_tensor: Tensor, group, op, async_op: bool = False) -> None:
        parts = torch.empty_like(input_tensor)
        torch_dist.all_to_all_single(parts, input_tensor, group=group)
        parts = parts.view(group.size(), -1)  # [ranks, elements of a part]
        while len(parts) > 1:
            parts = parts[0::2] + parts[1::2]
        output_tensor.copy_(parts.view_as(output_tensor))


def squared_norm(parameters: list[Tensor]) -> Tensor:
    """The squared L2 norm, float64, of what this rank holds of all gradients.

    On a CPU of the norms of rows, which are exact to float32's last digits: torch adds up millions of squares one by
    one there, and is off by 2e-4. A GPU adds them up in a tree, and those of many tensors at once.
    """
    gradients = [local(p.grad) for p in parameters]
    if gradients[0].is_cuda:
        return torch.nn.utils.get_total_norm(gradients).double().square()
    rows = [torch.linalg.vector_norm(gradient, dim=-1).flatten() for gradient in gradients]
    return torch.cat(rows).double().square().sum()


def squared_norm_in_any_order(parameters: list[Tensor], ranks: Dist) -> Tensor:
    """The squared L2 norm of all gradients, float64, the same to the last bit however rows are divided among ranks.

    The squares of a row are added up in pairs, so that no sum depends on how many rows are here. Those of rows are
    rounded to multiples of 2^-40 of the largest: integers, whose sum does not depend on the order. The rounding changes
    the norm by less than 1e-9; a gradient that is not finite makes it NaN.
    """
    rows = torch.cat([_sum_in_pairs(local(p.grad)) for p in parameters])
    rows = rows.where(rows.isfinite(), torch.inf)  # a maximum may pass over NaN
    largest = ranks.all_reduce_max(rows.amax())
    unit = largest.where(largest.isfinite(), torch.nan) / 2.0**40
    counts = (rows / unit).round().where(rows > 0, 0).long().sum()
    return ranks.all_reduce(counts) * unit


def _sum_in_pairs(x: Tensor) -> Tensor:
    """The sum of squares of every row of x [rows, columns], or of every element of x [rows]: float64 [rows]."""
    x = x.double().square().view(len(x), -1 if len(x) else 1)
    while (columns := x.shape[1]) > 1:
        pairs = x[:, 0 : columns - 1 : 2] + x[:, 1:columns:2]
        x = torch.cat((pairs, x[:, -1:]), dim=1) if columns % 2 else pairs
    return x[:, 0]
