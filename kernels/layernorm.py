"""Residual addition and the LayerNorms that read its result.

A Pythia layer is parallel: attention and MLP read two LayerNorms of the *same* input, and both outputs are added to it,

    x' = x + (attn + mlp + branch_bias)
    n  = (x' - mean) / sqrt(variance + eps)
    u  = n * weight1 + bias1       for the attention of the next layer
    v  = n * weight2 + bias2       for the MLP of the next layer

with mean and (biased) variance over the hidden dimension. The addition of one layer and the LayerNorms of the next are
one op because they read the same numbers. The order of the sum is that of GPT-NeoX. branch_bias is the sum of the
biases of the two output projections; adding it here costs no memory traffic.

Backward, with dn = du * weight1 + dv * weight2 and dx' the gradient that reaches x' from the next addition,

    dx = d_attn = d_mlp = dx' + (dn - mean(dn) - n * mean(dn * n)) / sqrt(variance + eps)

    d_weight1 = sum of du * n,   d_bias1 = sum of du,   likewise 2 with dv,   d_branch_bias = sum of dx

with means over the hidden dimension, as above, and sums over all rows.
"""

from functools import reduce

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.backend import tl, triton, triton_runs

# ---- reference -------------------------------------------------------------------------------------------------------


def add_layer_norms_reference(
    x: Tensor, attn: Tensor | None, mlp: Tensor | None, branch_bias: Tensor | None, eps: float, *norms: Tensor
) -> tuple[Tensor, ...]:
    """(x', u) for norms = weight1, bias1, or (x', u, v) for two such pairs. A summand that is None adds nothing."""
    summands = [summand.to(x.dtype) for summand in (attn, mlp, branch_bias) if summand is not None]
    x = x + reduce(torch.add, summands) if summands else x
    weights, biases = ([parameter.to(x.dtype) for parameter in norms[i::2]] for i in range(2))
    return x, *(F.layer_norm(x, x.shape[-1:], weight, bias, eps) for weight, bias in zip(weights, biases))


# ---- kernels ---------------------------------------------------------------------------------------------------------
# The registers of one program hold a row. COLUMNS is HIDDEN rounded up to a power of two, as Triton requires, and the
# columns past HIDDEN are masked. All arithmetic is float32. Code for arguments that are None is compiled away.


@triton.jit
def _load(ptr, mask):
    return tl.load(ptr, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def layer_norm_forward_kernel(
    x_ptr, attn_ptr, mlp_ptr, branch_bias_ptr, weight1_ptr, bias1_ptr, weight2_ptr, bias2_ptr,
    residual_ptr, u_ptr, v_ptr, mean_ptr, rstd_ptr, eps, HIDDEN: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """x', u and v of one row a program.

    x_ptr                   [rows, HIDDEN]
    attn_ptr, mlp_ptr       [rows, HIDDEN] or None
    branch_bias_ptr         [HIDDEN] or None
    weight1_ptr, bias1_ptr  [HIDDEN]
    weight2_ptr, bias2_ptr  [HIDDEN], or None without a second norm
    residual_ptr            [rows, HIDDEN], output x', or None if nothing is added to x
    u_ptr, v_ptr            [rows, HIDDEN], outputs; v_ptr is None without a second norm
    mean_ptr, rstd_ptr      [rows] float32, outputs: mean and 1 / sqrt(variance + eps)
    """
    row = tl.program_id(0)
    start = row.to(tl.int64) * HIDDEN  # int64: activations often exceed 2^31 elements
    columns = tl.arange(0, COLUMNS)
    mask = columns < HIDDEN

    x = _load(x_ptr + start + columns, mask)
    if residual_ptr is not None:
        branches = tl.zeros([COLUMNS], tl.float32)
        if attn_ptr is not None:
            branches += _load(attn_ptr + start + columns, mask)
        if mlp_ptr is not None:
            branches += _load(mlp_ptr + start + columns, mask)
        if branch_bias_ptr is not None:
            branches += _load(branch_bias_ptr + columns, mask)
        residual = (x + branches).to(residual_ptr.dtype.element_ty)
        tl.store(residual_ptr + start + columns, residual, mask=mask)
        x = residual.to(tl.float32)  # the norms are of the cast x', which the next layer and backward read

    # Two passes over the registers, because mean(x^2) - mean(x)^2 cancels. div_rn, because `/` is approximate on GPUs:
    # in a constant row x - mean must be exactly 0, or rstd = 1 / sqrt(eps) amplifies the error.
    mean = tl.div_rn(tl.sum(x, 0), HIDDEN)
    centred = tl.where(mask, x - mean, 0.0)
    rstd = tl.rsqrt(tl.sum(centred * centred, 0) / HIDDEN + eps)
    tl.store(mean_ptr + row, mean)
    tl.store(rstd_ptr + row, rstd)

    n = centred * rstd
    u = n * _load(weight1_ptr + columns, mask) + _load(bias1_ptr + columns, mask)
    tl.store(u_ptr + start + columns, u.to(u_ptr.dtype.element_ty), mask=mask)
    if weight2_ptr is not None:
        v = n * _load(weight2_ptr + columns, mask) + _load(bias2_ptr + columns, mask)
        tl.store(v_ptr + start + columns, v.to(v_ptr.dtype.element_ty), mask=mask)


@triton.jit
def layer_norm_backward_kernel(
    residual_ptr, d_residual_ptr, du_ptr, dv_ptr, weight1_ptr, weight2_ptr, mean_ptr, rstd_ptr, dx_ptr, sums_ptr,
    rows, rows_per_program, HIDDEN: tl.constexpr, COLUMNS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """dx of some consecutive rows a program, in order, and the sums over these rows, to which no other program adds.

    residual_ptr        [rows, HIDDEN], x'
    d_residual_ptr      [rows, HIDDEN], the gradient dx', or None if nothing but the norms used x'
    du_ptr, dv_ptr      [rows, HIDDEN]; dv_ptr is None without a second norm
    weight1_ptr         [HIDDEN]; likewise weight2_ptr, which is None without a second norm
    mean_ptr, rstd_ptr  [rows] float32, from forward
    dx_ptr              [rows, HIDDEN], output
    sums_ptr            [programs, 5, HIDDEN] float32, output: partial sums of the gradients of branch_bias, weight1,
                        bias1, weight2, bias2; without a second norm [programs, 3, HIDDEN]
    """
    program = tl.program_id(0).to(tl.int64)  # int64, and so are the rows
    columns = tl.arange(0, COLUMNS)
    mask = columns < HIDDEN

    d_branch_bias = tl.zeros([COLUMNS], tl.float32)
    d_weight1 = tl.zeros([COLUMNS], tl.float32)
    d_bias1 = tl.zeros([COLUMNS], tl.float32)
    d_weight2 = tl.zeros([COLUMNS], tl.float32)
    d_bias2 = tl.zeros([COLUMNS], tl.float32)
    weight1 = _load(weight1_ptr + columns, mask)
    if weight2_ptr is not None:
        weight2 = _load(weight2_ptr + columns, mask)

    first = program * rows_per_program
    last = tl.minimum(first + rows_per_program, rows)
    for row in tl.range(first, last, num_stages=STAGES):  # the next rows are loaded during the arithmetic of this one
        offsets = row * HIDDEN + columns
        rstd = tl.load(rstd_ptr + row)
        # n is not zero in masked columns. But du and dv are zero there, so masked columns add nothing to any sum.
        n = (_load(residual_ptr + offsets, mask) - tl.load(mean_ptr + row)) * rstd
        du = _load(du_ptr + offsets, mask)
        d_weight1 += du * n
        d_bias1 += du
        if STAGES == 1:  # the widest rows leave no registers for the weights: load them again, from the L1 cache
            weight1 = _load(weight1_ptr + columns, mask)
        dn = du * weight1
        if weight2_ptr is not None:
            dv = _load(dv_ptr + offsets, mask)
            d_weight2 += dv * n
            d_bias2 += dv
            if STAGES == 1:
                weight2 = _load(weight2_ptr + columns, mask)
            dn += dv * weight2
        dx = tl.zeros([COLUMNS], tl.float32) if d_residual_ptr is None else _load(d_residual_ptr + offsets, mask)
        dx += (dn - tl.sum(dn, 0) / HIDDEN - n * (tl.sum(dn * n, 0) / HIDDEN)) * rstd
        d_branch_bias += dx
        tl.store(dx_ptr + offsets, dx.to(dx_ptr.dtype.element_ty), mask=mask)

    sums_ptr = sums_ptr + program * (3 if weight2_ptr is None else 5) * HIDDEN + columns
    tl.store(sums_ptr, d_branch_bias, mask=mask)
    tl.store(sums_ptr + HIDDEN, d_weight1, mask=mask)
    tl.store(sums_ptr + 2 * HIDDEN, d_bias1, mask=mask)
    if weight2_ptr is not None:
        tl.store(sums_ptr + 3 * HIDDEN, d_weight2, mask=mask)
        tl.store(sums_ptr + 4 * HIDDEN, d_bias2, mask=mask)


# ---- op --------------------------------------------------------------------------------------------------------------

MAX_HIDDEN = 8192  # the widest row that fits into the registers of a program
WARPS = 132 * 16  # of backward: 16 on each multiprocessor of an H100, but the same on every GPU, for the same sums


def _launch(hidden: int) -> dict[str, int]:
    """Constants of forward. A thread takes eight columns, 16 bytes of bfloat16; a program has at most eight warps."""
    columns = triton.next_power_of_2(hidden)
    return {"HIDDEN": hidden, "COLUMNS": columns, "num_warps": min(max(columns // 256, 1), 8)}


def _launch_backward(hidden: int) -> dict[str, int]:
    """Constants of backward, which also holds five sums. The widest rows leave no registers for rows loaded early."""
    launch = _launch(hidden)
    if launch["COLUMNS"] == 4096:
        launch["num_warps"] = 16
    return {**launch, "STAGES": 3 if launch["COLUMNS"] <= 4096 else 1}


def _outputs(
    x: Tensor, attn: Tensor | None, mlp: Tensor | None, branch_bias: Tensor | None,
    weight1: Tensor, bias1: Tensor, weight2: Tensor | None, *_,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Uninitialised x', u, v [.., hidden] and mean, rstd [rows]. An x' or v that is not computed has no elements."""
    adds = attn is not None or mlp is not None or branch_bias is not None
    residual = torch.empty_like(x) if adds else x.new_empty(0)
    v = x.new_empty(0) if weight2 is None else torch.empty_like(x)
    mean = x.new_empty(x.numel() // x.shape[-1], dtype=torch.float32)
    return residual, torch.empty_like(x), v, mean, torch.empty_like(mean)


@torch.library.custom_op("tripod::add_layer_norms", mutates_args=())
def _add_layer_norms(
    x: Tensor, attn: Tensor | None, mlp: Tensor | None, branch_bias: Tensor | None,
    weight1: Tensor, bias1: Tensor, weight2: Tensor | None, bias2: Tensor | None, eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    outputs = residual, u, v, mean, rstd = _outputs(x, attn, mlp, branch_bias, weight1, bias1, weight2)
    residual, v = residual if residual.numel() else None, v if v.numel() else None
    with torch.cuda.device_of(x):  # Triton launches on the current device
        layer_norm_forward_kernel[(len(mean),)](
            x, attn, mlp, branch_bias, weight1, bias1, weight2, bias2, residual, u, v, mean, rstd, eps,
            **_launch(x.shape[-1])
        )  # fmt: skip
    return outputs


@torch.library.custom_op("tripod::add_layer_norms_backward", mutates_args=())
def _add_layer_norms_backward(
    residual: Tensor, d_residual: Tensor | None, du: Tensor, dv: Tensor | None,
    weight1: Tensor, weight2: Tensor | None, mean: Tensor, rstd: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Gradient of x, attn and mlp, and those of branch_bias, weight1, bias1, weight2, bias2 as rows of a matrix."""
    rows, hidden = len(mean), residual.shape[-1]
    launch = _launch_backward(hidden)
    rows_per_program = max(triton.cdiv(rows, WARPS // launch["num_warps"]), 1)
    programs = triton.cdiv(rows, rows_per_program)
    dx = torch.empty_like(residual)
    sums = mean.new_empty(programs, 3 if weight2 is None else 5, hidden)
    # autograd may pass an expanded gradient, with strides of 0
    d_residual, du, dv = (None if d is None else d.contiguous() for d in (d_residual, du, dv))
    with torch.cuda.device_of(residual):
        layer_norm_backward_kernel[(programs,)](
            residual, d_residual, du, dv, weight1, weight2, mean, rstd, dx, sums, rows, rows_per_program, **launch
        )  # fmt: skip
    return dx, sums.sum(0).to(weight1.dtype)


def _add_layer_norms_setup_context(ctx, inputs: tuple, output: tuple) -> None:
    x, attn, mlp, branch_bias, weight1, _, weight2, _, _ = inputs
    residual, _, _, mean, rstd = output
    ctx.branches = attn is not None, mlp is not None, branch_bias is not None
    ctx.save_for_backward(residual if any(ctx.branches) else x, weight1, weight2, mean, rstd)
    ctx.mark_non_differentiable(mean, rstd)
    ctx.set_materialize_grads(False)  # nothing reads x' after the last norm: do not allocate and read zeros for it


def _add_layer_norms_gradients(
    ctx, d_residual: Tensor | None, du: Tensor | None, dv: Tensor | None, *_
) -> tuple[Tensor | None, ...]:
    residual, weight1, weight2, mean, rstd = ctx.saved_tensors
    d_residual = d_residual if any(ctx.branches) else None  # torch.compile may pass one for the x' without elements
    du = torch.zeros_like(residual) if du is None else du
    dv = None if weight2 is None else torch.zeros_like(residual) if dv is None else dv
    dx, sums = _add_layer_norms_backward(residual, d_residual, du, dv, weight1, weight2, mean, rstd)
    d_branch_bias, *d_norms = sums.unbind()
    d_branches = (d if given else None for d, given in zip((dx, dx, d_branch_bias), ctx.branches))
    return dx, *d_branches, *d_norms, *(() if weight2 is not None else (None, None)), None


_add_layer_norms.register_fake(_outputs)
_add_layer_norms_backward.register_fake(
    lambda x, dx, du, dv, w1, w2, *_: (torch.empty_like(x), w1.new_empty(3 if w2 is None else 5, len(w1)))
)
_add_layer_norms.register_autograd(_add_layer_norms_gradients, setup_context=_add_layer_norms_setup_context)


def _check(x: Tensor, branches: dict[str, Tensor | None], vectors: dict[str, Tensor | None]) -> None:
    branches, vectors = ({n: x for n, x in given.items() if x is not None} for given in (branches, vectors))
    for name, branch in branches.items():
        if branch.shape != x.shape or branch.dtype != x.dtype:
            ours, theirs = f"{list(branch.shape)} and {branch.dtype}", f"{list(x.shape)} and its dtype {x.dtype}"
            raise ValueError(f"{name} must have the shape of x {theirs}, not {ours}")
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
            raise ValueError(f"{name} must be contiguous, but its strides are {tensor.stride()}")
    if triton_runs(x) and x.shape[-1] > MAX_HIDDEN:
        raise ValueError(f"the kernels hold a row in registers: hidden can be at most {MAX_HIDDEN}, not {x.shape[-1]}")


def add_layer_norm(
    x: Tensor, attn: Tensor | None, mlp: Tensor | None,
    weight: Tensor, bias: Tensor, eps: float = 1e-5, branch_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(x' = x + (attn + mlp + branch_bias), LayerNorm(x')), both [.., hidden]; weight, bias, branch_bias are [hidden].

    attn, mlp, branch_bias may be None. Parameters may have another dtype than x. Raises ValueError if one does not fit.
    """
    _check(x, {"attn": attn, "mlp": mlp}, {"weight": weight, "bias": bias, "branch_bias": branch_bias})
    if not triton_runs(x):
        return add_layer_norms_reference(x, attn, mlp, branch_bias, eps, weight, bias)
    residual, u, _, _, _ = _add_layer_norms(x, attn, mlp, branch_bias, weight, bias, None, None, eps)
    return (residual if residual.numel() else x), u


def add_dual_layer_norm(
    x: Tensor, attn: Tensor | None, mlp: Tensor | None,
    weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor,
    eps: float = 1e-5, branch_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(x' = x + (attn + mlp + branch_bias), LayerNorm1(x'), LayerNorm2(x')), all [.., hidden]; see add_layer_norm."""
    vectors = {"weight1": weight1, "bias1": bias1, "weight2": weight2, "bias2": bias2, "branch_bias": branch_bias}
    _check(x, {"attn": attn, "mlp": mlp}, vectors)
    if not triton_runs(x):
        return add_layer_norms_reference(x, attn, mlp, branch_bias, eps, weight1, bias1, weight2, bias2)
    residual, u, v, _, _ = _add_layer_norms(x, attn, mlp, branch_bias, weight1, bias1, weight2, bias2, eps)
    return (residual if residual.numel() else x), u, v
