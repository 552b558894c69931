"""The Triton kernels of kernels/attention.py against the reference in float64."""

from functools import partial

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from kernels import attention, backend, rotary_attention, rotary_tables, tiles
from kernels.tiles import Attention, Tile

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


def results(qkv: Tensor, cos: Tensor, sin: Tensor, d_out: Tensor) -> dict[str, Tensor]:
    qkv = qkv.detach().requires_grad_()
    out = rotary_attention(qkv, cos, sin)
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
    exact = by_definition(*(x.double() for x in inputs))
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


@pytest.mark.parametrize(("head_dim", "rotary_dim"), [(16, 4), (16, 16), (64, 2), (64, 64), (80, 64), (256, 128)])
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


def test_gradients_of_any_layout_and_tensors_at_any_address(device):
    inputs = qkv, cos, sin, d_out = draw(40, 32, torch.float16, device)
    expected = results(*inputs)
    assert_same_bits(expected, results(qkv, cos, sin, d_out.transpose(1, 2).contiguous().transpose(1, 2)))
    moved = torch.cat([qkv.new_zeros(1), qkv.flatten()])[1:].view(qkv.shape)
    assert moved.data_ptr() % 16  # TMA cannot read this address
    assert_same_bits(expected, results(moved, cos, sin, d_out))
    ones = torch.ones_like(d_out)
    assert_same_bits(results(qkv, cos, sin, ones), results(qkv, cos, sin, ones[:1, :1, :1, :1].expand_as(ones)))


def test_opcheck(device):
    qkv, cos, sin, d_out = draw(17, 80, torch.float32, device, batch=1, heads=2)
    torch.library.opcheck(torch.ops.tripod.rotary_attention.default, (qkv.requires_grad_(), cos, sin))
    assert not torch.ops.tripod.rotary_attention(qkv, cos, sin)[1].requires_grad  # lse is not differentiable
    out, lse = torch.ops.tripod.rotary_attention(qkv.detach(), cos, sin)
    backward = torch.ops.tripod.rotary_attention_backward.default
    torch.library.opcheck(backward, (qkv.detach(), cos, sin, out, lse, d_out))


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
    rotate_qk = attention.rotate_qk
    monkeypatch.setattr(attention, "rotate_qk", lambda *inputs: rotations.append(inputs) or rotate_qk(*inputs))

    def policy(context, op, *args, **kwargs):
        kept = op == torch.ops.tripod.rotary_attention.default
        return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE

    qkv = inputs[0].clone().requires_grad_()
    contexts = partial(create_selective_checkpoint_contexts, policy)
    out = checkpoint(lambda x: rotary_attention(x * 1, *inputs[1:3]), qkv, use_reentrant=False, context_fn=contexts)
    out.backward(inputs[3])
    assert len(rotations) == 2  # one in forward, one in backward
    assert_same_bits(expected, dict(zip(("out", "dq", "dk", "dv"), (out.detach(), *qkv.grad.unbind(3)))))


def test_refuses_what_the_kernels_cannot_do():
    qkv, cos, sin, _ = draw(4, 32, torch.float32, torch.device("cpu"))
    with pytest.raises(ValueError, match=r"support head_dim 16, 32, 64, 80, 128, 256, not 48"):
        rotary_attention(qkv.new_zeros(1, 4, 2, 3, 48), cos, sin)
    with pytest.raises(ValueError, match="rotate 2 to 64 of the 80 columns of a head, not 68"):
        rotary_attention(qkv.new_zeros(1, 4, 2, 3, 80), cos.new_zeros(4, 34), sin.new_zeros(4, 34))
    with pytest.raises(ValueError, match="rotate 2 to 32 of the 32 columns of a head, not 0"):
        rotary_attention(qkv, cos[:, :0], sin[:, :0])
    with pytest.raises(ValueError, match="qkv must be contiguous"):
        rotary_attention(qkv.transpose(0, 1).contiguous().transpose(0, 1), cos, sin)
    with pytest.raises(ValueError, match="qkv must be contiguous and not empty"):
        rotary_attention(qkv[:0], cos, sin)
    with pytest.raises(ValueError, match=r"cos must be contiguous float32, not torch.float64"):
        rotary_attention(qkv, cos.double(), sin)
    with pytest.raises(ValueError, match=r"sin must be contiguous float32, .* strides \[1, 4\]"):
        rotary_attention(qkv, cos, sin.T.contiguous().T)
    with pytest.raises(ValueError, match="on one device"):
        rotary_attention(qkv, cos.to("meta"), sin)
    with pytest.raises(ValueError, match="interpreter cannot multiply bfloat16"):
        rotary_attention(qkv.bfloat16(), cos, sin)


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


@pytest.mark.xdist_group("large")
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
