"""The gradients of a step: summed over micro-steps and ranks, in a fixed order with --bitwise."""

import torch
import torch.distributed as torch_dist
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from model import Pythia
from parallel.fsdp import copies, local, sharded_modules
from runtime.ranks import Dist


class Gradients:
    """Sums the gradients of a step over its micro-steps and over ranks.

    Call `set_sync` before the backward pass of every micro-step and `accumulate` after it. In the end .grad of every
    parameter is the sum for the rows that this rank holds. whole: a rank adds up gradients of all weights, 4 bytes a
    parameter, and FSDP2 reduces them after the last micro-step. Otherwise FSDP2 reduces them after every micro-step,
    and a rank keeps only its part of the sum.

    bitwise: the sum has the same bits on every number of ranks that is a power of two. The gradients of all
    micro-batches are added along one binary tree: neighbours, then neighbouring pairs, and so on. In micro-step i the
    ranks compute micro-batches world_size * i, world_size * i + 1, ... TreeReduceScatter adds these: the lower levels.
    `accumulate` adds the upper levels, as a binary counter carries: at most log2(micro_steps) + 1 sums are alive.
    """

    def __init__(self, model: Pythia, dist: Dist, shard: str, whole: bool = True, bitwise: bool = False):
        self.model, self.dist, self.whole, self.bitwise = model, dist, whole, bitwise
        self.keep_weights = shard in ("grad", "none")
        self.parameters = list(model.parameters())
        self.sums: list[tuple[int, list[Tensor]]] = []  # (level in the tree, gradients), levels descending
        if bitwise:
            for module in sharded_modules(model):
                module.set_custom_reduce_scatter(TreeReduceScatter())

    def set_sync(self, last: bool) -> None:
        """Before a backward pass: choose whether it reduces gradients over ranks. last: it is the last of the step."""
        if isinstance(self.model, FSDPModule):
            self.model.set_requires_gradient_sync(last or self.bitwise or not self.whole)
            self.model.set_reshard_after_backward(last or not self.keep_weights)

    def accumulate(self, last: bool) -> None:
        """After a backward pass: with bitwise, add its gradients to the sums. (Otherwise autograd adds to .grad.)"""
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
        """This rank's summand of the squared L2 norm of all gradients, a float64 scalar: all_reduce completes it."""
        if self.bitwise:
            return squared_norm_in_any_order(self.parameters, self.dist) * self.dist.is_main
        return squared_norm(self.parameters) / copies(self.parameters[0])


class TreeReduceScatter:
    """A reduce-scatter for FSDP2 that adds the tensors of the ranks along a binary tree. The order of summation of the
    library's own depends on the number of ranks."""

    def allocate(self, size, *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(self, output_tensor: Tensor, input_tensor: Tensor, group, op, async_op: bool = False) -> None:
        parts = torch.empty_like(input_tensor)
        torch_dist.all_to_all_single(parts, input_tensor, group=group)
        parts = parts.view(group.size(), -1)  # [ranks, elements of this rank's part]
        while len(parts) > 1:
            parts = parts[0::2] + parts[1::2]
        output_tensor.copy_(parts.view_as(output_tensor))


def squared_norm(parameters: list[Tensor]) -> Tensor:
    """The squared L2 norm of the gradients that this rank holds, a float64 scalar.

    On a CPU torch adds millions of squares one by one and is off by 2e-4. So the norm of each row is computed first,
    which is exact to the last digits of float32. A GPU adds in a tree, and computes the norms of many tensors at once.
    """
    gradients = [local(p.grad) for p in parameters]
    if gradients[0].is_cuda:
        return torch.nn.utils.get_total_norm(gradients).double().square()
    rows = [torch.linalg.vector_norm(gradient, dim=-1).flatten() for gradient in gradients]
    return torch.cat(rows).double().square().sum()


def squared_norm_in_any_order(parameters: list[Tensor], dist: Dist) -> Tensor:
    """The squared L2 norm of all gradients, a float64 scalar: the same bits however ranks divide the rows.

    The squares of a row are added in pairs, so no sum depends on the number of rows of a rank. The sums of the rows are
    rounded to multiples of 2^-40 of the largest: the sum of these integers does not depend on the order. The rounding
    changes the norm by less than 1e-9. A gradient that is not finite makes the norm NaN.
    """
    rows = torch.cat([_sum_in_pairs(local(p.grad)) for p in parameters])  # [rows of all parameters]
    rows = rows.where(rows.isfinite(), torch.inf)  # the maximum over ranks may ignore NaN, but not infinity
    largest = dist.all_reduce_max(rows.amax())
    unit = largest.where(largest.isfinite(), torch.nan) / 2.0**40
    counts = (rows / unit).round().where(rows > 0, 0).long().sum()
    return dist.all_reduce(counts) * unit


def _sum_in_pairs(x: Tensor) -> Tensor:
    """Sum of squares of each row of x [rows, columns], or square of each element of x [rows]: float64 [rows]."""
    x = x.double().square().view(len(x), -1 if len(x) else 1)
    while (columns := x.shape[1]) > 1:
        pairs = x[:, 0 : columns - 1 : 2] + x[:, 1:columns:2]
        x = torch.cat((pairs, x[:, -1:]), dim=1) if columns % 2 else pairs
    return x[:, 0]
