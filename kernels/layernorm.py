"""Residual addition and the LayerNorms that read its result.

A Pythia layer is parallel: attention and MLP read two LayerNorms of the *same* input, and both outputs are added to it,

    x' = x + (attn + mlp + branch_bias)
    n  = (x' - mean) / sqrt(variance + eps)
    u  = n * weight1 + bias1       for the attention of the next layer
    v  = n * weight2 + bias2       for the MLP of the next layer

with mean and (biased) variance over the hidden dimension. The addition of one layer is joined with the LayerNorms of
the next because they touch the same numbers. The order of the sum is that of GPT-NeoX; branch_bias is the sum of the
biases of the two output projections, left to this addition because it comes at no cost here.

Backward, with dn = du * weight1 + dv * weight2 and dx' the gradient that reaches x' from the next addition,

    dx = d_attn = d_mlp = dx' + (dn - mean(dn) - n * mean(dn * n)) / sqrt(variance + eps)

    d_weight1 = sum of du * n,   d_bias1 = sum of du,   likewise 2 with dv,   d_branch_bias = sum of dx

with means over the hidden dimension, as before, and sums over all rows.
"""

from functools import reduce

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.backend import tl, triton, triton_runs

# ---------------------------------------------------------------------------------------------- the definition


def add_residuals(x: Tensor, attn: Tensor | None, mlp: Tensor | None, branch_bias: Tensor | None = None) -> Tensor:
    """x + (attn + mlp + branch_bias), all [.., hidden] but branch_bias [hidden]; what is None adds nothing."""
    summands = [summand.to(x.dtype) for summand in (attn, mlp, branch_bias) if summand is not None]
    return x + reduce(torch.add, summands) if summands else x


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], weight.to(x.dtype), bias.to(x.dtype), eps)


# ---------------------------------------------------------------------------------------------- the kernels
# A row lies in the registers of one program: COLUMNS is HIDDEN rounded up to a power of two, as Triton wants it, and
# what is outside is masked. All arithmetic is in float32, and arguments that are None are compiled away.


@triton.jit
def _load(pointer, inside):
    return tl.load(pointer, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _forward(
    x, attn, mlp, branch_bias, weight1, bias1, weight2, bias2, total, u, v, means, rstds, eps,
    HIDDEN: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """One row a program.

    total, which is x', is None if nothing is added; weight2, bias2 and v are None if there is no second norm.
    """
    row = tl.program_id(0)
    start = row.to(tl.int64) * HIDDEN  # of the row; more than 2^31 numbers are no rarity
    columns = tl.arange(0, COLUMNS)
    inside = columns < HIDDEN

    row_x = _load(x + start + columns, inside)
    if total is not None:
        branches = tl.zeros([COLUMNS], tl.float32)
        if attn is not None:
            branches += _load(attn + start + columns, inside)
        if mlp is not None:
            branches += _load(mlp + start + columns, inside)
        if branch_bias is not None:
            branches += _load(branch_bias + columns, inside)
        rounded = (row_x + branches).to(total.dtype.element_ty)
        tl.store(total + start + columns, rounded, mask=inside)
        row_x = rounded.to(tl.float32)  # the norms are of what the next layer, and backward, will read

    # Two passes, since mean(x^2) - mean(x)^2 cancels; they cost no traffic. The mean is rounded right, as a quotient by
    # `/` is not on a GPU: in a constant row its error, divided by sqrt(eps), would be n.
    mean = tl.div_rn(tl.sum(row_x, 0), HIDDEN)
    centred = tl.where(inside, row_x - mean, 0.0)
    rstd = tl.rsqrt(tl.sum(centred * centred, 0) / HIDDEN + eps)
    tl.store(means + row, mean)
    tl.store(rstds + row, rstd)

    n = centred * rstd
    row_u = n * _load(weight1 + columns, inside) + _load(bias1 + columns, inside)
    tl.store(u + start + columns, row_u.to(u.dtype.element_ty), mask=inside)
    if weight2 is not None:
        row_v = n * _load(weight2 + columns, inside) + _load(bias2 + columns, inside)
        tl.store(v + start + columns, row_v.to(v.dtype.element_ty), mask=inside)


@triton.jit
def _backward(
    total, d_total, du, dv, weight1, weight2, means, rstds, dx, sums, rows, rows_per_program,
    HIDDEN: tl.constexpr, COLUMNS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Some consecutive rows a program, in order, and the sums over them: sums is [programs, 5, hidden].

    No two programs add to one number, so the result does not depend on which of them is first. d_total is None if only
    the norms were used; without a second norm, dv and weight2 are, and a program has 3 sums.
    """
    program = tl.program_id(0).to(tl.int64)  # and so the rows
    columns = tl.arange(0, COLUMNS)
    inside = columns < HIDDEN

    d_branch_bias = tl.zeros([COLUMNS], tl.float32)
    d_weight1 = tl.zeros([COLUMNS], tl.float32)
    d_bias1 = tl.zeros([COLUMNS], tl.float32)
    d_weight2 = tl.zeros([COLUMNS], tl.float32)
    d_bias2 = tl.zeros([COLUMNS], tl.float32)
    w1 = _load(weight1 + columns, inside)
    if weight2 is not None:
        w2 = _load(weight2 + columns, inside)

    first = program * rows_per_program
    last = tl.minimum(first + rows_per_program, rows)
    for row in tl.range(first, last, num_stages=STAGES):  # the loads of the next rows run ahead of the arithmetic
        at = row * HIDDEN + columns
        rstd = tl.load(rstds + row)
        # Outside, n is not zero; but du and dv are, and with them every sum along the row.
        n = (_load(total + at, inside) - tl.load(means + row)) * rstd
        row_du = _load(du + at, inside)
        d_weight1 += row_du * n
        d_bias1 += row_du
        if STAGES == 1:  # a row so wide that the weights find no registers: they come from the L1 cache again
            w1 = _load(weight1 + columns, inside)
        dn = row_du * w1
        if weight2 is not None:
            row_dv = _load(dv + at, inside)
            d_weight2 += row_dv * n
            d_bias2 += row_dv
            if STAGES == 1:
                w2 = _load(weight2 + columns, inside)
            dn += row_dv * w2
        row_dx = tl.zeros([COLUMNS], tl.float32) if d_total is None else _load(d_total + at, inside)
        row_dx += (dn - tl.sum(dn, 0) / HIDDEN - n * (tl.sum(dn * n, 0) / HIDDEN)) * rstd
        d_branch_bias += row_dx
        tl.store(dx + at, row_dx.to(dx.dtype.element_ty), mask=inside)

    place = sums + program * (3 if weight2 is None else 5) * HIDDEN + columns
    tl.store(place, d_branch_bias, mask=inside)
    tl.store(place + HIDDEN, d_weight1, mask=inside)
    tl.store(place + 2 * HIDDEN, d_bias1, mask=inside)
    if weight2 is not None:
        tl.store(place + 3 * HIDDEN, d_weight2, mask=inside)
        tl.store(place + 4 * HIDDEN, d_bias2, mask=inside)


# ---------------------------------------------------------------------------------------------- the op

MAX_HIDDEN = 8192  # what fits into the registers of a program
WARPS = 132 * 16  # of backward: 16 for each multiprocessor of an H100, but the same, and so the same sums, on any GPU


def _launch(hidden: int) -> dict[str, int]:
    """Eight columns, or 16 bytes of bfloat16, a thread, and at most eight warps."""
    columns = triton.next_power_of_2(hidden)
    return {"HIDDEN": hidden, "COLUMNS": columns, "num_warps": min(max(columns // 256, 1), 8)}


def _launch_backward(hidden: int) -> dict[str, int]:
    """Five sums are held besides the row. The widest rows leave no registers to run ahead with."""
    launch = _launch(hidden)
    if launch["COLUMNS"] == 4096:
        launch["num_warps"] = 16
    return {**launch, "STAGES": 3 if launch["COLUMNS"] <= 4096 else 1}


def _outputs(
    x: Tensor, attn: Tensor | None, mlp: Tensor | None, branch_bias: Tensor | None, weight2: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """x', u, v [.., hidden] and mean, rstd [rows], to be filled. Where there is no x' or v it has no elements."""
    adds = attn is not None or mlp is not None or branch_bias is not None
    total = torch.empty_like(x) if adds else x.new_empty(0)
    v = x.new_empty(0) if weight2 is None else torch.empty_like(x)
    mean = x.new_empty(x.numel() // x.shape[-1], dtype=torch.float32)
    return total, torch.empty_like(x), v, mean, torch.empty_like(mean)


@torch.library.custom_op("tripod::add_layer_norms", mutates_args=())
def _add_layer_norms(
    x: Tensor,
    attn: Tensor | None,
    mlp: Tensor | None,
    branch_bias: Tensor | None,
    weight1: Tensor,
    bias1: Tensor,
    weight2: Tensor | None,
    bias2: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    outputs = total, u, v, mean, rstd = _outputs(x, attn, mlp, branch_bias, weight2)
    total, v = total if total.numel() else None, v if v.numel() else None
    with torch.cuda.device_of(x):  # Triton launches on the current device
        _forward[(len(mean),)](
            x, attn, mlp, branch_bias, weight1, bias1, weight2, bias2, total, u, v, mean, rstd, eps,
            **_launch(x.shape[-1])
        )  # fmt: skip
    return outputs


@_add_layer_norms.register_fake
def _(x, attn, mlp, branch_bias, weight1, bias1, weight2, bias2, eps):
    return _outputs(x, attn, mlp, branch_bias, weight2)


@torch.library.custom_op("tripod::add_layer_norms_backward", mutates_args=())
def _add_layer_norms_backward(
    total: Tensor,
    d_total: Tensor | None,
    du: Tensor,
    dv: Tensor | None,
    weight1: Tensor,
    weight2: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
) -> tuple[Tensor, Tensor]:
    """The gradient of x, attn and mlp, and those of branch_bias, weight1, bias1, weight2, bias2 as rows of a matrix."""
    rows, hidden = len(mean), total.shape[-1]
    launch = _launch_backward(hidden)
    rows_per_program = max(triton.cdiv(rows, WARPS // launch["num_warps"]), 1)
    programs = triton.cdiv(rows, rows_per_program)
    dx = torch.empty_like(total)
    sums = mean.new_empty(programs, 3 if weight2 is None else 5, hidden)
    # A gradient may come expanded, with strides of 0.
    d_total, du, dv = (None if d is None else d.contiguous() for d in (d_total, du, dv))
    with torch.cuda.device_of(total):
        _backward[(programs,)](
            total, d_total, du, dv, weight1, weight2, mean, rstd, dx, sums, rows, rows_per_program, **launch
        )  # fmt: skip
    return dx, sums.sum(0).to(weight1.dtype)


@_add_layer_norms_backward.register_fake
def _(total, d_total, du, dv, weight1, weight2, mean, rstd):
    return torch.empty_like(total), weight1.new_empty(3 if weight2 is None else 5, len(weight1))


def _setup_context(ctx, inputs: tuple, output: tuple) -> None:
    x, attn, mlp, branch_bias, weight1, _, weight2, _, _ = inputs
    total, _, _, mean, rstd = output
    ctx.branches = attn is not None, mlp is not None, branch_bias is not None
    ctx.save_for_backward(total if any(ctx.branches) else x, weight1, weight2, mean, rstd)
    ctx.mark_non_differentiable(mean, rstd)
    ctx.set_materialize_grads(False)  # nobody reads x' behind the last norm: then there are no zeros to be read


def _gradients(ctx, d_total: Tensor | None, du: Tensor | None, dv: Tensor | None, *_) -> tuple[Tensor | None, ...]:
    total, weight1, weight2, mean, rstd = ctx.saved_tensors
    d_total = d_total if any(ctx.branches) else None  # torch.compile may make one for the x' without elements
    du = torch.zeros_like(total) if du is None else du
    dv = None if weight2 is None else torch.zeros_like(total) if dv is None else dv
    dx, sums = _add_layer_norms_backward(total, d_total, du, dv, weight1, weight2, mean, rstd)
    d_branch_bias, *d_norms = sums.unbind()
    d_branches = (d if given else None for d, given in zip((dx, dx, d_branch_bias), ctx.branches))
    return dx, *d_branches, *d_norms, *(() if weight2 is not None else (None, None)), None


_add_layer_norms.register_autograd(_gradients, setup_context=_setup_context)


def _check(x: Tensor, branches: dict[str, Tensor | None], vectors: dict[str, Tensor | None]) -> None:
    branches = {name: branch for name, branch in branches.items() if branch is not None}
    vectors = {name: vector for name, vector in vectors.items() if vector is not None}
    for name, branch in branches.items():
        if branch.shape != x.shape or branch.dtype != x.dtype:
            raise ValueError(
                f"{name} must have the shape of x {list(x.shape)} and its dtype {x.dtype}, "
                f"not {list(branch.shape)} and {branch.dtype}"
            )
    for name, vector in vectors.items():
        if vector.shape != x.shape[-1:]:
            raise ValueError(f"{name} must be [{x.shape[-1]}] like the last dimension of x, not {list(vector.shape)}")
    dtypes = {vector.dtype for vector in vectors.values()}
    if len(dtypes) > 1 or not all(dtype.is_floating_point for dtype in dtypes):
        raise ValueError(f"{', '.join(vectors)} must all be of one floating-point dtype, not of {dtypes}")
    for name, tensor in {"x": x, **branches, **vectors}.items():
        if tensor.device != x.device:
            raise ValueError(f"{name} must be on {x.device} like x, not on {tensor.device}")
        if not tensor.is_contiguous():
            raise ValueError(f"{name} must be contiguous: its strides are {tensor.stride()}")
    if triton_runs(x) and x.shape[-1] > MAX_HIDDEN:
        raise ValueError(f"the kernels hold a row in registers: hidden can be at most {MAX_HIDDEN}, not {x.shape[-1]}")


def add_layer_norm(
    x: Tensor,
    attn: Tensor | None,
    mlp: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float = 1e-5,
    branch_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(x + (attn + mlp + branch_bias), its LayerNorm), both [.., hidden]; weight, bias and branch_bias are [hidden].

    Parameters may be of another dtype than x, attn and mlp. Raises ValueError when something does not fit.
    """
    vectors = {"weight": weight, "bias": bias, "branch_bias": branch_bias}
    _check(x, {"attn": attn, "mlp": mlp}, vectors)
    if not triton_runs(x):
        x = add_residuals(x, attn, mlp, branch_bias)
        return x, layer_norm(x, weight, bias, eps)
    total, u, _, _, _ = _add_layer_norms(x, attn, mlp, branch_bias, weight, bias, None, None, eps)
    return (total if total.numel() else x), u


def add_dual_layer_norm(
    x: Tensor,
    attn: Tensor | None,
    mlp: Tensor | None,
    weight1: Tensor,
    bias1: Tensor,
    weight2: Tensor,
    bias2: Tensor,
    eps: float = 1e-5,
    branch_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(x' = x + (attn + mlp + branch_bias), LayerNorm1(x'), LayerNorm2(x')), all [.., hidden]; the rest is [hidden].

    attn and mlp are None before the first layer, whose input is the embedding alone.
    """
    vectors = {"weight1": weight1, "bias1": bias1, "weight2": weight2, "bias2": bias2, "branch_bias": branch_bias}
    _check(x, {"attn": attn, "mlp": mlp}, vectors)
    if not triton_runs(x):
        x = add_residuals(x, attn, mlp, branch_bias)
        return x, layer_norm(x, weight1, bias1, eps), layer_norm(x, weight2, bias2, eps)
    total, u, v, _, _ = _add_layer_norms(x, attn, mlp, branch_bias, weight1, bias1, weight2, bias2, eps)
    return (total if total.numel() else x), u, v
