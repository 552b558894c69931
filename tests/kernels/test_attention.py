"""The Triton kernels of kernels/attention.py against the reference in float64."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from kernels import (
    attention,
    backend,
    document_bounds,
    linear_rotary_attention,
    rotary_attention,
    rotary_tables,
    rotate,
    tiles,
)
from kernels.tiles import Attention, Tile
from model import SIZES, Pythia
from model.sizes import END_OF_TEXT
from parallel.recompute import set_recompute

HEAD_DIMS = (32, 64, 80, 128, 256)  # of the suite
FLOAT32_BAR = 5e-7  # relative error: a few roundings
HALF_TYPES = [torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)]
pytestmark = pytest.mark.usefixtures("triton_kernels")


@pytest.fixture(params=tiles.ATTENTION)
def arch(request, device, monkeypatch) -> int:
    """The rows of the launch table: all of them in the interpreter, on a GPU its own row."""
    if device.type == "cuda" and tiles.architecture(device) != request.param:
        pytest.skip(f"the launches for compute capability {request.param / 10} are for another GPU")
    monkeypatch.setattr(tiles, "architecture", lambda device: request.param)
    return request.param


def draw(
    seq: int,
    head_dim: int,
    dtype: torch.dtype,
    device: torch.device,
    batch: int = 2,
    heads: int = 2,
    size: float = 1.0,
    rotary_dim: int | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """qkv, cos, sin and the gradient of the output. `size` is the standard deviation of queries and keys."""
    random = torch.Generator().manual_seed(seq + head_dim)
    qkv = torch.randn(batch, seq, heads, 3, head_dim, generator=random)
    qkv[:, :, :, :2] *= size
    d_out = torch.randn(batch, seq, heads, head_dim, generator=random)
    tables = rotary_tables(seq, rotary_dim or head_dim // 4, 10_000.0, torch.float32, device)
    return qkv.to(device, dtype), *tables, d_out.to(device, dtype)


def documents_with_last_tokens_at(*positions: tuple[int, ...], seq: int, device: torch.device) -> Tensor:
    """The bounds of documents in rows of `seq` tokens: for every row the positions at which a document ends."""
    tokens = torch.ones(len(positions), seq, dtype=torch.int64)
    for row, last in zip(tokens, positions):
        row[list(last)] = 0
    return document_bounds(tokens.to(device), 0)


def results(qkv: Tensor, cos: Tensor, sin: Tensor, d_out: Tensor, documents: Tensor | None = None) -> dict[str, Tensor]:
    qkv = qkv.detach().requires_grad_()
    out = rotary_attention(qkv, cos, sin, documents)
    out.backward(d_out)
    return dict(zip(("out", "dq", "dk", "dv"), (out.detach(), *qkv.grad.unbind(3))))


def by_definition(*inputs: Tensor) -> dict[str, Tensor]:
    backend.choose("torch")
    found = results(*inputs)
    backend.choose("triton")
    return found


def errors(found: dict[str, Tensor], *inputs: Tensor, size: float = 0.0) -> dict[str, float]:
    """Relative error, in the norm, to the reference in float64 on the same numbers.

    Large scores choose one key, and leave next to no gradient of queries and keys: then `size`, that of queries and
    keys, says how large the products are of which it is the difference.
    """
    exact = by_definition(*(x.double() if x.is_floating_point() else x for x in inputs))
    norms = {name: x.norm() for name, x in exact.items()}
    norms |= {name: max(norms[name], size * norms["dv"]) for name in ("dq", "dk")}
    return {name: ((found[name] - exact[name]).norm() / norms[name]).item() for name in exact}


def assert_as_good_as_the_definition(*inputs: Tensor, size: float = 1.0) -> None:
    """Scores are about size^2. The exponential magnifies the rounding of large scores, differently in two programs."""
    large = size if size > 1 else 0.0
    ours = errors(results(*inputs), *inputs, size=large)
    theirs = errors(by_definition(*inputs), *inputs, size=large)
    for name in ours:
        bar = max((1.5 if large else 1.1) * theirs[name], FLOAT32_BAR * max(size**2, 1))
        assert ours[name] <= bar, f"{name}: {ours[name]:.2e}, the definition {theirs[name]:.2e}"


def assert_same_bits(found: dict[str, Tensor], again: dict[str, Tensor]) -> None:
    for name in found:
        assert torch.equal(found[name], again[name]), name


@pytest.mark.parametrize("arch", [80, 90], indirect=True)  # 80 loads by pointer, 90 by descriptor
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_float32_is_exact_but_for_rounding(head_dim, arch, device):
    inputs = draw(40, head_dim, torch.float32, device, heads=1)
    for name, error in errors(results(*inputs), *inputs).items():
        assert error < FLOAT32_BAR, f"{name}: {error:.2e}"


@pytest.mark.parametrize("dtype", HALF_TYPES)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_half_precision_is_as_good_as_the_definition(head_dim, dtype, arch, device):
    """With the shipped tiles: a sequence of 150 fills one and overruns the next."""
    assert_as_good_as_the_definition(*draw(150, head_dim, dtype, device, batch=1))


@pytest.mark.parametrize(
    ("seq", "head_dim", "dtype", "bar"),
    [(seq, 32, torch.float32, FLOAT32_BAR) for seq in (2, 15, 16, 17)]
    + [(seq, 80, torch.float16, 1e-3) for seq in (127, 128, 129)],
)
def test_any_length_of_sequence(seq, head_dim, dtype, bar, device):
    """Lengths near the size of a tile: 16 positions in float32, up to 128 in half precision."""
    inputs = draw(seq, head_dim, dtype, device, heads=1)
    for name, error in errors(results(*inputs), *inputs).items():
        assert error < bar, f"{name}: {error:.2e}"


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_a_sequence_of_one(head_dim, device):
    """The only weight is 1, whatever the score: out is v, dv is d_out, and the gradients of query and key are 0."""
    qkv, cos, sin, d_out = draw(1, head_dim, torch.float32, device)
    found = results(qkv, cos, sin, d_out)
    torch.testing.assert_close(found["out"], qkv[:, :, :, 2], rtol=1e-6, atol=0)
    torch.testing.assert_close(found["dv"], d_out, rtol=1e-6, atol=0)
    assert max(found["dq"].abs().max(), found["dk"].abs().max()) < 1e-5


@pytest.mark.parametrize(("head_dim", "rotary_dim"), [(16, 4), (16, 16), (64, 2), (64, 64), (80, 80), (256, 128)])
@pytest.mark.parametrize("arch", [80, 90], indirect=True)
def test_other_shapes_of_head(head_dim, rotary_dim, arch, device):
    inputs = draw(20, head_dim, torch.float32, device, rotary_dim=rotary_dim, batch=1)
    for name, error in errors(results(*inputs), *inputs).items():
        assert error < FLOAT32_BAR, f"{name}: {error:.2e}"


@pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning")  # in the interpreter, from masked weights
@pytest.mark.parametrize("dtype", [torch.float32, *HALF_TYPES])
def test_large_scores(dtype, device):
    """Scores of 10^4: the softmax is 1 for one key and 0 for the others, nearly everywhere."""
    assert_as_good_as_the_definition(*draw(70, 64, dtype, device, size=100.0), size=100.0)


@pytest.mark.parametrize("dtype", [torch.float32, *HALF_TYPES])
def test_all_equal(dtype, device):
    """If all keys and values are equal, the output is that value and the gradient of queries is 0."""
    qkv, cos, sin, d_out = draw(70, 64, dtype, device, batch=1)
    qkv[:, :, :, :2] = 0
    qkv[:, :, :, 2] = 1.5
    found = results(qkv, cos, sin, d_out)
    assert (found["out"] - 1.5).abs().max() <= (1e-6 if dtype == torch.float32 else 0)
    assert not found["dq"].any()
    exact = by_definition(*(x.double() for x in (qkv, cos, sin, d_out)))
    torch.testing.assert_close(found["dv"].double(), exact["dv"], rtol=1e-2, atol=1e-2)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy warns about values that are not finite
def test_one_sequence_does_not_touch_another(arch, device):
    """Tiles overrun the end of a sequence. NaNs that lie there must not change the result."""
    qkv, cos, sin, d_out = draw(40, 80, torch.float16, device, batch=3, heads=1)
    whole = results(qkv, cos, sin, d_out)
    qkv[1], d_out[1] = torch.nan, torch.inf
    for name, broken in results(qkv, cos, sin, d_out).items():
        assert not broken[1].isfinite().any(), name
        assert torch.equal(broken[0], whole[name][0]), name
        assert torch.equal(broken[2], whole[name][2]), name


@pytest.mark.parametrize(("head_dim", "rotary_dim"), [(32, 8), (80, 20), (64, 2), (16, 16)])
def test_rotation_in_place(head_dim, rotary_dim, device):
    """The rotation is that of the reference, values stay, and the opposite angles restore queries and keys."""
    qkv, cos, sin, _ = draw(300, head_dim, torch.float32, device, rotary_dim=rotary_dim)
    rotated = qkv.clone()
    attention.rotate_in_place(rotated, cos, sin)
    expected = rotate(qkv[:, :, :, :2].permute(3, 0, 2, 1, 4), cos, sin).permute(1, 3, 2, 0, 4)
    torch.testing.assert_close(rotated[:, :, :, :2], expected, rtol=1e-6, atol=1e-6)
    assert torch.equal(rotated[..., rotary_dim:], qkv[..., rotary_dim:])
    assert torch.equal(rotated[:, :, :, 2], qkv[:, :, :, 2])
    attention.rotate_in_place(rotated, cos, sin, direction=-1.0)
    torch.testing.assert_close(rotated, qkv, rtol=1e-6, atol=1e-6)


def test_causal(device):
    """The bits of the output at a position do not depend on later positions."""
    qkv, cos, sin, _ = draw(50, 64, torch.float32, device)
    before = rotary_attention(qkv, cos, sin)
    qkv[:, 30:] += 1
    after = rotary_attention(qkv, cos, sin)
    assert torch.equal(before[:, :30], after[:, :30])
    assert not torch.equal(before[:, 30], after[:, 30])


@pytest.mark.parametrize("head_dim", [80, 256])
def test_the_same_bits_every_time(head_dim, device):
    inputs = draw(40, head_dim, torch.float16, device, batch=1)
    kept = [x.clone() for x in inputs]
    assert_same_bits(results(*inputs), results(*inputs))
    assert all(map(torch.equal, inputs, kept)), "an input was written to"


# Documents that end nowhere; at the borders of tiles, with one of one token; somewhere, and with the row.
ENDS = (), (15, 31, 32), (0, 5, 40, 53)


@pytest.mark.parametrize(
    ("head_dim", "arch"), [(32, 80), (64, 90), (80, 80), (80, 90), (128, 80), (256, 90)], indirect=["arch"]
)
def test_documents_in_float32(head_dim, arch, device):
    inputs = draw(54, head_dim, torch.float32, device, batch=3, heads=1)
    documents = documents_with_last_tokens_at(*ENDS, seq=54, device=device)
    found = results(*inputs, documents)
    for name, error in errors(found, *inputs, documents).items():
        assert error < 2 * FLOAT32_BAR, f"{name}: {error:.2e}"
    whole = by_definition(*inputs)
    for name, x in found.items():
        torch.testing.assert_close(x[0], whole[name][0], rtol=1e-5, atol=1e-5)  # no end: as without documents
        assert (x[1:] - whole[name][1:]).norm() > 0.1 * x[1:].norm(), name


@pytest.mark.parametrize("dtype", HALF_TYPES)
@pytest.mark.parametrize("head_dim", [80, 256])
def test_documents_in_half_precision(head_dim, dtype, device):
    """With the shipped tiles, of up to 128 positions."""
    documents = documents_with_last_tokens_at((127, 128, 200), seq=270, device=device)
    assert_as_good_as_the_definition(*draw(270, head_dim, dtype, device, batch=1, heads=1), documents)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy warns about values that are not finite
@pytest.mark.parametrize("head_dim", [80, 256])
def test_tiles_of_other_documents_are_not_read(head_dim, device):
    """0 times NaN is NaN. So a tile with NaNs would change the result, even of those who do not see its keys."""
    qkv, cos, sin, d_out = draw(64, head_dim, torch.float32, device, batch=1, heads=1)
    documents = documents_with_last_tokens_at((15, 47), seq=64, device=device)
    whole = results(qkv, cos, sin, d_out, documents)
    for other in (slice(16), slice(48, 64)):
        qkv[:, other], d_out[:, other] = torch.nan, torch.inf
    for name, broken in results(qkv, cos, sin, d_out, documents).items():
        assert not broken[:, [0, 15, 48, 63]].isfinite().any(), name
        assert torch.equal(broken[:, 16:48], whole[name][:, 16:48]), name


def test_the_bits_of_a_document_do_not_depend_on_others(device):
    """Also where they share a tile."""
    qkv, cos, sin, d_out = draw(64, 32, torch.float32, device)
    documents = documents_with_last_tokens_at((9, 39), (22, 39), seq=64, device=device)
    before = results(qkv, cos, sin, d_out, documents)
    for other in (slice(10), slice(40, 64)):
        qkv[0, other] += 1
        d_out[0, other] += 1
    after = results(qkv, cos, sin, d_out, documents)
    for name, x in after.items():
        assert torch.equal(x[0, 10:40], before[name][0, 10:40]), name
        assert not torch.equal(x[0, 40:], before[name][0, 40:]), name


def test_gradients_of_any_layout_and_tensors_at_any_address(device):
    inputs = qkv, cos, sin, d_out = draw(40, 32, torch.float16, device)
    expected = results(*inputs)
    assert_same_bits(expected, results(qkv, cos, sin, d_out.transpose(1, 2).contiguous().transpose(1, 2)))
    moved = torch.cat([qkv.new_zeros(1), qkv.flatten()])[1:].view(qkv.shape)
    assert moved.data_ptr() % 16  # TMA cannot read this address
    assert_same_bits(expected, results(moved, cos, sin, d_out))
    assert_same_bits(expected, results(qkv.transpose(0, 1).contiguous().transpose(0, 1), cos, sin, d_out))
    ones = torch.ones_like(d_out)
    assert_same_bits(results(qkv, cos, sin, ones), results(qkv, cos, sin, ones[:1, :1, :1, :1].expand_as(ones)))


def test_opcheck(device):
    qkv, cos, sin, d_out = draw(17, 80, torch.float32, device, batch=1, heads=2)
    documents = documents_with_last_tokens_at((5, 9), seq=17, device=device)
    inputs = qkv.requires_grad_(), cos, sin, documents
    torch.library.opcheck(torch.ops.tripod.rotated_attention.default, inputs)
    output = torch.ops.tripod.rotated_attention(qkv, cos, sin, documents)
    assert [x.requires_grad for x in output] == [True, False, False]  # out, rotated qkv, lse
    backward = torch.ops.tripod.rotated_attention_backward.default
    torch.library.opcheck(backward, (cos, sin, documents, *(x.detach() for x in output), d_out))


def test_compiled_whole(device):
    inputs = draw(20, 32, torch.float32, device)

    @partial(torch.compile, fullgraph=True)
    def step(qkv, cos, sin):
        return rotary_attention(qkv * 1, cos, sin) * 1

    qkv = inputs[0].clone().requires_grad_()
    out = step(qkv, *inputs[1:3])
    out.backward(inputs[3])
    assert_same_bits(results(*inputs), dict(zip(("out", "dq", "dk", "dv"), (out.detach(), *qkv.grad.unbind(3)))))


def test_selective_checkpointing_need_not_run_it_again(device, monkeypatch):
    inputs = draw(20, 32, torch.float32, device)
    expected = results(*inputs)
    rotations = []
    in_place = attention.rotate_in_place
    monkeypatch.setattr(attention, "rotate_in_place", lambda *a, **k: rotations.append(a) or in_place(*a, **k))

    def policy(context, op, *args, **kwargs):
        kept = op == torch.ops.tripod.rotated_attention.default
        return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE

    qkv = inputs[0].clone().requires_grad_()
    contexts = partial(create_selective_checkpoint_contexts, policy)
    out = checkpoint(lambda x: rotary_attention(x * 1, *inputs[1:3]), qkv, use_reentrant=False, context_fn=contexts)
    out.backward(inputs[3])
    assert len(rotations) == 2  # one in forward, one in backward
    assert_same_bits(expected, dict(zip(("out", "dq", "dk", "dv"), (out.detach(), *qkv.grad.unbind(3)))))


# ---- with the projection


def draw_projection(
    seq: int, head_dim: int, dtype: torch.dtype, device: torch.device, weight_dtype: torch.dtype | None = None
) -> dict[str, Tensor]:
    """x [2, seq, 24], weight and bias of a projection to two heads, cos, sin, d_out [2, seq, 2, head_dim]."""
    _, cos, sin, d_out = draw(seq, head_dim, dtype, device)
    random = torch.Generator().manual_seed(seq)
    x, weight = (torch.randn(shape, generator=random) for shape in ((2, seq, 24), (6 * head_dim, 24)))
    bias = torch.randn(6 * head_dim, generator=random)
    weight, bias = ((0.2 * parameter).to(device, weight_dtype or dtype) for parameter in (weight, bias))
    return {"x": x.to(device, dtype), "weight": weight, "bias": bias, "cos": cos, "sin": sin, "d_out": d_out}


def projected(x: Tensor, weight: Tensor, bias: Tensor, cos: Tensor, sin: Tensor, d_out: Tensor) -> dict[str, Tensor]:
    leaves = [leaf.detach().requires_grad_() for leaf in (x, weight, bias)]
    out = linear_rotary_attention(*leaves, cos, sin, heads=2)
    return dict(zip(("out", "dx", "dw", "db"), (out.detach(), *torch.autograd.grad(out, leaves, d_out))))


def two_ops(x: Tensor, weight: Tensor, bias: Tensor, cos: Tensor, sin: Tensor, d_out: Tensor) -> dict[str, Tensor]:
    """The same by torch: matmul, then the reference of attention."""
    leaves = [leaf.detach().requires_grad_() for leaf in (x, weight, bias)]
    qkv = torch.nn.functional.linear(leaves[0], leaves[1].to(x.dtype), leaves[2].to(x.dtype)).unflatten(-1, (2, 3, -1))
    out = attention.rotary_attention_reference(qkv, cos, sin)
    return dict(zip(("out", "dx", "dw", "db"), (out.detach(), *torch.autograd.grad(out, leaves, d_out))))


@pytest.mark.parametrize("float32_weights", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, *HALF_TYPES])
@pytest.mark.parametrize("head_dim", [32, 80, 256])
def test_with_the_projection_is_as_good_as_two_ops(head_dim, dtype, float32_weights, device):
    inputs = draw_projection(40, head_dim, dtype, device, torch.float32 if float32_weights else dtype)
    rounded = inputs | {name: inputs[name].to(dtype) for name in ("weight", "bias")}
    exact = two_ops(**{name: x.double() for name, x in rounded.items()})
    ours, theirs = projected(**inputs), two_ops(**inputs)
    for name, truth in exact.items():
        error, bar = ((found[name] - truth).norm() / truth.norm() for found in (ours, theirs))
        assert error <= max(1.1 * bar, 2 * FLOAT32_BAR), f"{name}: {error:.2e}, two ops {bar:.2e}"
        assert ours[name].dtype == theirs[name].dtype


def test_with_the_projection_nobody_sees_the_rotation(device):
    """The same bits every time, also of a second backward pass; inputs and the incoming gradient are not written to."""
    inputs = draw_projection(20, 32, torch.float16, device)
    kept = {name: x.clone() for name, x in inputs.items()}
    expected = projected(**inputs)
    assert_same_bits(expected, projected(**inputs))
    leaves = [inputs[name].requires_grad_() for name in ("x", "weight", "bias")]
    out = linear_rotary_attention(*leaves, inputs["cos"], inputs["sin"], heads=2)
    for _ in range(2):
        gradients = torch.autograd.grad(out, leaves, inputs["d_out"], retain_graph=True)
        assert_same_bits(expected, dict(zip(("out", "dx", "dw", "db"), (out.detach(), *gradients))))
    assert all(torch.equal(inputs[name], kept[name]) for name in kept)


def test_with_the_projection_opcheck_and_compile(device):
    inputs = draw_projection(17, 32, torch.float32, device)
    expected = projected(**inputs)
    d_out = inputs.pop("d_out")
    leaves = [inputs[name].requires_grad_() for name in ("x", "weight", "bias")]
    op = torch.ops.tripod.linear_rotary_attention
    torch.library.opcheck(op.default, (*inputs.values(), 2))
    output = [x.detach() for x in op(*inputs.values(), 2)]
    backward = torch.ops.tripod.linear_rotary_attention_backward.default
    tensors = inputs["x"].detach(), inputs["weight"].detach(), inputs["cos"], inputs["sin"], None, *output, d_out
    torch.library.opcheck(backward, tensors)
    compiled = torch.compile(linear_rotary_attention, fullgraph=True, backend="aot_eager")
    out = compiled(*inputs.values(), 2)
    gradients = torch.autograd.grad(out, leaves, d_out)
    assert_same_bits(expected, dict(zip(("out", "dx", "dw", "db"), (out.detach(), *gradients))))


@pytest.mark.parametrize("recompute", ["cheap", "full"])
def test_a_model_rotates_in_place_and_recomputes_with_the_same_bits(recompute, device, monkeypatch):
    """--recompute cheap keeps the rotated projection: no matmul and no rotation runs again."""
    model = Pythia(replace(SIZES["14m"], layers=2, hidden=32, heads=2, vocab=64, seq_len=16)).to(device)
    tokens = torch.randint(64, (2, 17), generator=torch.Generator().manual_seed(0)).to(device)
    model.document_mask, tokens[:, 5] = recompute == "full", END_OF_TEXT
    directions = []
    in_place = attention.rotate_in_place

    def counted(qkv: Tensor, cos: Tensor, sin: Tensor, direction: float = 1.0) -> None:
        directions.append(direction)
        in_place(qkv, cos, sin, direction)

    monkeypatch.setattr(attention, "rotate_in_place", counted)

    def loss() -> Tensor:
        return model(tokens[:, :-1], tokens[:, 1:])

    def gradients() -> tuple[Tensor, ...]:
        directions.clear()
        return torch.autograd.grad(loss(), list(model.parameters()))

    expected = gradients()
    assert directions == [1.0, 1.0, -1.0, -1.0]
    backend.choose("torch")
    for ours, theirs in zip(expected, torch.autograd.grad(loss(), list(model.parameters()))):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
    backend.choose("triton")
    set_recompute(model, recompute)
    assert all(map(torch.equal, gradients(), expected))
    assert directions == ([1.0, 1.0, -1.0, -1.0] if recompute == "cheap" else [1.0, 1.0, 1.0, -1.0, 1.0, -1.0])


def test_refuses_what_the_kernels_cannot_do():
    qkv, cos, sin, _ = draw(4, 32, torch.float32, torch.device("cpu"))
    with pytest.raises(ValueError, match=r"support head_dim 16, 32, 64, 80, 128, 256, not 48"):
        rotary_attention(qkv.new_zeros(1, 4, 2, 3, 48), cos, sin)
    with pytest.raises(ValueError, match=r"rotary_dim <= 32, not \[4, 17\] and \[4, 17\]"):
        rotary_attention(qkv, cos.new_zeros(4, 17), sin.new_zeros(4, 17))
    with pytest.raises(ValueError, match=r"must not be empty: .* and \[4, 0\]"):
        rotary_attention(qkv, cos[:, :0], sin[:, :0])
    with pytest.raises(ValueError, match=r"must not be empty: \[0, 4, 2, 3, 32\]"):
        rotary_attention(qkv[:0], cos, sin)
    with pytest.raises(ValueError, match=r"cos must be contiguous float32, not torch.float64"):
        rotary_attention(qkv, cos.double(), sin)
    with pytest.raises(ValueError, match=r"sin must be contiguous float32, .* strides \[1, 4\]"):
        rotary_attention(qkv, cos, sin.T.contiguous().T)
    with pytest.raises(ValueError, match="on one device"):
        rotary_attention(qkv, cos.to("meta"), sin)
    for documents in (torch.zeros(2, 1, 5, dtype=torch.int32), torch.zeros(2, 1, 4), cos):
        with pytest.raises(ValueError, match=r"documents must be contiguous int32 \[2, 1, 4\] on cpu"):
            rotary_attention(qkv[:1], cos, sin, documents)
    with pytest.raises(ValueError, match="interpreter cannot multiply bfloat16"):
        rotary_attention(qkv.bfloat16(), cos, sin)
    projection = qkv.new_zeros(192, 8), qkv.new_zeros(192)
    with pytest.raises(ValueError, match=r"\[batch, seq, heads, 3, head_dim\], not \[4, 2, 3, 32\]"):
        linear_rotary_attention(qkv.new_zeros(4, 8), *projection, cos, sin, heads=2)
    with pytest.raises(ValueError, match="with seq = 5"):
        linear_rotary_attention(qkv.new_zeros(1, 5, 8), *projection, cos, sin, heads=2)


def test_the_table_of_launches_fits_the_kernels():
    """A diagonal block must be a whole number of steps, and tensor cores need steps of at least 16."""

    def whole(owned: int, step: int) -> bool:
        return owned % step == 0 and step >= 16

    for launches in (tiles.FLOAT32, *(entry for row in tiles.ATTENTION.values() for entry in row.values())):
        assert all(whole(tile.block_q, tile.block_k) for tile in (launches.forward, launches.dq))
        assert all(whole(tile.block_k, tile.block_q) for tile in (launches.dk, launches.dv or launches.dk))
    for row in tiles.ATTENTION.values():
        assert row.keys() == attention.CHUNKS.keys()


def test_shapes_of_tiles_do_not_matter(monkeypatch, device):
    """Tiles of other shapes, and one or two kernels for dk and dv, give the same numbers up to rounding."""
    inputs = draw(70, 32, torch.float32, device, batch=1, heads=1)
    wide, high = Tile(16, 64, 4, 1), Tile(64, 16, 4, 1)
    for launches in (Attention(high, high, wide), Attention(high, high, wide, Tile(32, 32, 4, 1))):
        monkeypatch.setattr(tiles, "FLOAT32", launches)
        for name, error in errors(results(*inputs), *inputs).items():
            assert error < FLOAT32_BAR, f"{name}: {error:.2e}"


@pytest.mark.gpu
@pytest.mark.parametrize("size", [0.1, 1.0, 10.0, 100.0])
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_at_length(head_dim, dtype, size, device):
    for seq in (2048, 1999):
        assert_as_good_as_the_definition(*draw(seq, head_dim, dtype, device, size=size), size=size)


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_the_same_bits_a_hundred_times(head_dim, device):
    inputs = draw(1024, head_dim, torch.bfloat16, device, batch=4, heads=16)
    expected = results(*inputs)
    for _ in range(100):
        assert_same_bits(expected, results(*inputs))


@pytest.mark.large
@pytest.mark.gpu
def test_more_than_2_to_the_31_numbers(device):
    """The last sequence of a large batch has the same bits as alone."""
    seq, heads, head_dim = 2048, 8, 64
    batch = 2**31 // (seq * heads * head_dim) + 2  # the output, the smallest tensor, exceeds 2^31 elements
    cos, sin = rotary_tables(seq, 16, 10_000.0, torch.float32, device)
    qkv = torch.randn(batch, seq, heads, 3, head_dim, dtype=torch.bfloat16, device=device)
    d_out = torch.randn(batch, seq, heads, head_dim, dtype=torch.bfloat16, device=device)
    alone = results(qkv[-1:].clone(), cos, sin, d_out[-1:].clone())
    assert_same_bits(alone, {name: x[-1:] for name, x in results(qkv, cos, sin, d_out).items()})
