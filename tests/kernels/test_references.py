"""The torch references against formulas written out in float64."""

import math
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F

from kernels import (
    add_dual_layer_norm,
    add_layer_norm,
    bias_gelu,
    document_bounds,
    linear_cross_entropy,
    rotary_attention,
)
from kernels.cpu_attention import SHORT_SEQ
from kernels.cross_entropy import CHUNK
from kernels.rotary import rotary_tables, rotate


def brute_force_attention(qkv, base, rotary_dim):
    """Attention by loops over batch, head and position, from the formulas at the top of kernels/attention.py."""
    batch, seq, heads, _, head_dim = qkv.shape
    half = rotary_dim // 2
    out = torch.zeros(batch, seq, heads, head_dim, dtype=qkv.dtype)

    def rotated(x, position):
        x = x.clone()
        for i in range(half):
            angle = position * base ** (-i / half)
            a, b = x[i].clone(), x[i + half].clone()
            x[i] = a * math.cos(angle) - b * math.sin(angle)
            x[i + half] = b * math.cos(angle) + a * math.sin(angle)
        return x

    for b in range(batch):
        for h in range(heads):
            for p in range(seq):
                q = rotated(qkv[b, p, h, 0], p)
                scores = [q @ rotated(qkv[b, s, h, 1], s) / math.sqrt(head_dim) for s in range(p + 1)]
                weights = torch.softmax(torch.stack(scores), 0)
                out[b, p, h] = sum(w * qkv[b, s, h, 2] for s, w in enumerate(weights))
    return out


@pytest.mark.parametrize(("head_dim", "rotary_dim"), [(32, 8), (80, 20), (8, 8)])
def test_rotary_attention_is_the_formula(head_dim, rotary_dim):
    torch.manual_seed(0)
    qkv = torch.randn(2, 7, 3, 3, head_dim, dtype=torch.float64)
    cos, sin = rotary_tables(7, rotary_dim, 10_000.0, torch.float64, "cpu")
    torch.testing.assert_close(
        rotary_attention(qkv, cos, sin), brute_force_attention(qkv, 10_000.0, rotary_dim), rtol=0, atol=1e-13
    )


def test_document_bounds():
    tokens = torch.randint(4, (5, 30), generator=torch.Generator().manual_seed(0))
    tokens[0], tokens[1] = 1, 0
    starts, ends = document_bounds(tokens, 0).tolist()
    for row, (start, end) in zip(tokens.tolist(), zip(starts, ends)):
        for position in range(30):
            assert start[position] == max([p + 1 for p in range(position) if row[p] == 0], default=0)
            assert end[position] == min([p + 1 for p in range(position, 30) if row[p] == 0], default=30)
    assert document_bounds(tokens[:, :1], 0).tolist() == [[[0]] * 5, [[1]] * 5]


@pytest.mark.parametrize("seq", [12, SHORT_SEQ + 1])
def test_attention_of_documents_is_that_of_each_document_alone(seq):
    """Alone, its positions start at 0: only the distance of two positions matters."""
    torch.manual_seed(0)
    qkv, d_out = torch.randn(2, seq, 3, 3, 8, dtype=torch.float64), torch.randn(2, seq, 3, 8, dtype=torch.float64)
    tokens = torch.ones(2, seq)
    tokens[0, [0, 4, 5]] = tokens[1, [8, seq - 1]] = 0
    cos, sin = rotary_tables(seq, 4, 1e4, torch.float64, "cpu")

    def results(qkv, d_out, documents=None):
        qkv = qkv.detach().requires_grad_()
        out = rotary_attention(qkv, cos[: qkv.shape[1]], sin[: qkv.shape[1]], documents)
        return out, *torch.autograd.grad(out, qkv, d_out)

    found = results(qkv, d_out, document_bounds(tokens, 0))
    for row, borders in enumerate(((0, 1, 5, 6, seq), (0, 9, seq))):
        for start, end in pairwise(borders):
            alone = results(qkv[row : row + 1, start:end], d_out[row : row + 1, start:end])
            for ours, expected in zip(found, alone):
                torch.testing.assert_close(ours[row, start:end], expected[0], rtol=0, atol=1e-12)


@pytest.mark.parametrize("seq", [1, 63, 64, 133, SHORT_SEQ, SHORT_SEQ + 1])
@pytest.mark.parametrize("with_documents", [False, True])
def test_short_rows_and_long_ones_have_the_same_attention(seq, with_documents):
    """Up to SHORT_SEQ positions CPUs have an implementation of their own, except for float64."""
    torch.manual_seed(0)
    qkv = torch.randn(2, seq, 3, 3, 16, dtype=torch.float64)
    qkv[0] *= 30  # probabilities of 0 and 1
    cos, sin = rotary_tables(seq, 8, 1e4, torch.float64, "cpu")
    d_out = torch.randn(2, seq, 3, 16, dtype=torch.float64)
    documents = document_bounds(torch.randint(40, (2, seq)), 0) if with_documents else None
    results = []
    for dtype in (torch.float64, torch.float32):
        narrow = qkv.to(dtype).requires_grad_()
        out = rotary_attention(narrow, cos.to(dtype), sin.to(dtype), documents)
        (d_qkv,) = torch.autograd.grad(out, narrow, d_out.to(dtype))
        results.append((out.double(), d_qkv.double()))
    for truth, ours in zip(*results):
        for row in range(2):
            torch.testing.assert_close(ours[row], truth[row], rtol=0, atol=5e-4 * truth[row].abs().max().item())
        torch.testing.assert_close(ours[1], truth[1], rtol=0, atol=5e-6 * truth[1].abs().max().item())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_short_rows_in_half_precision_are_as_exact_as_torch(dtype):
    """Scores of up to 40: half precision would round them by up to 0.1."""
    torch.manual_seed(0)
    qkv = 2.5 * torch.randn(2, 150, 3, 3, 16, dtype=torch.float64)
    d_out = torch.randn(2, 150, 3, 16, dtype=torch.float64)
    cos, sin = rotary_tables(150, 8, 1e4, torch.float64, "cpu")

    def results(attention, dtype, tables):
        narrow = qkv.to(dtype).requires_grad_()
        out = attention(narrow, *(table.to(tables) for table in (cos, sin)))
        return out.double(), torch.autograd.grad(out, narrow, d_out.to(dtype))[0].double()

    def by_torch(qkv, cos, sin):
        q, k, v = qkv.permute(3, 0, 2, 1, 4)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)

    truth = results(rotary_attention, torch.float64, torch.float64)
    for exact, ours, theirs in zip(truth, *(results(f, dtype, torch.float32) for f in (rotary_attention, by_torch))):
        assert (ours - exact).norm() <= 1.1 * (theirs - exact).norm()


def test_rotary_tables_keep_far_positions_apart():
    """GPT-NeoX v1.0 computed the angles in half precision, so that positions near 2048 coincide."""
    cos, sin = rotary_tables(2048, 32, 10_000.0, torch.float32, "cpu")
    exact = torch.tensor(2047.0, dtype=torch.float64)
    assert abs(cos[2047, 0].item() - exact.cos().item()) < 1e-7
    assert abs(sin[2047, 0].item() - exact.sin().item()) < 1e-7
    assert len(torch.unique(cos[:, -1])) > 2000


def test_half_precision_is_rotated_in_float32():
    torch.manual_seed(0)
    qkv = torch.randn(1, 64, 2, 3, 32, dtype=torch.bfloat16)
    cos, sin = rotary_tables(64, 8, 10_000.0, torch.float32, "cpu")
    out = rotary_attention(qkv, cos, sin)
    assert out.dtype == torch.bfloat16
    exact = rotary_attention(qkv.double(), cos.double(), sin.double())
    assert (out - exact).abs().max() < 2e-2


def test_attention_refuses_shapes_that_do_not_fit():
    cos, sin = rotary_tables(4, 8, 10_000.0, torch.float32, "cpu")
    with pytest.raises(ValueError, match=r"\[batch, seq, heads, 3, head_dim\]"):
        rotary_attention(torch.zeros(1, 4, 2, 32), cos, sin)
    with pytest.raises(ValueError, match="seq = 5"):
        rotary_attention(torch.zeros(1, 5, 2, 3, 32), cos, sin)


def layer_norm(x, weight, bias, eps):
    mean = x.mean(-1, keepdim=True)
    variance = ((x - mean) ** 2).mean(-1, keepdim=True)
    return (x - mean) / (variance + eps).sqrt() * weight + bias


def test_add_dual_layer_norm_is_the_formula():
    torch.manual_seed(0)
    x, attn, mlp = torch.randn(3, 2, 5, 16, dtype=torch.float64) * 3
    w1, b1, w2, b2 = torch.randn(4, 16, dtype=torch.float64)
    total, u, v = add_dual_layer_norm(x, attn, mlp, w1, b1, w2, b2, 1e-5)
    torch.testing.assert_close(total, x + attn + mlp, rtol=0, atol=1e-14)
    torch.testing.assert_close(u, layer_norm(x + attn + mlp, w1, b1, 1e-5), rtol=0, atol=1e-13)
    torch.testing.assert_close(v, layer_norm(x + attn + mlp, w2, b2, 1e-5), rtol=0, atol=1e-13)
    total, u = add_layer_norm(x, None, None, w1, b1, 1e-5)
    torch.testing.assert_close(total, x, rtol=0, atol=0)
    torch.testing.assert_close(u, layer_norm(x, w1, b1, 1e-5), rtol=0, atol=1e-13)
    torch.testing.assert_close(add_layer_norm(x, attn, None, w1, b1)[0], x + attn, rtol=0, atol=0)


def test_residual_sum_has_the_order_of_gpt_neox():
    """x + (attn + mlp): in float16 another order of the sum gives another number."""
    x, attn, mlp = (torch.tensor([v], dtype=torch.float16) for v in (2048.0, 1.0, 1.0))
    one = torch.ones(1, dtype=torch.float16)
    assert add_layer_norm(x, attn, mlp, one, one)[0].item() == 2050.0  # (2048 + 1) + 1 rounds to 2048


def test_layer_norm_refuses_unequal_shapes():
    with pytest.raises(ValueError, match="mlp must have the shape of x"):
        add_layer_norm(torch.zeros(2, 4), torch.zeros(2, 4), torch.zeros(4), torch.ones(4), torch.zeros(4))


def test_bias_gelu_is_the_formula():
    h, bias = torch.linspace(-6, 6, 101, dtype=torch.float64), torch.full((101,), 0.25, dtype=torch.float64)
    x = h + bias
    exact = x * 0.5 * (1 + torch.special.erf(x / math.sqrt(2)))
    tanh = x * 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    torch.testing.assert_close(bias_gelu(h, bias, "none"), exact, rtol=0, atol=1e-14)
    torch.testing.assert_close(bias_gelu(h, bias), tanh, rtol=0, atol=1e-14)
    assert 4e-4 < (exact - tanh).abs().max() < 4.8e-4
    with pytest.raises(ValueError, match="bias must be"):
        bias_gelu(h, bias[:3])


@pytest.mark.parametrize("tokens", [1, 5, CHUNK - 1, CHUNK, 2 * CHUNK + 3])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_linear_cross_entropy_is_cross_entropy(tokens, reduction):
    torch.manual_seed(tokens)
    hidden = torch.randn(tokens, 24, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(301, 24, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(0, 301, (tokens,))
    upstream = torch.randn(tokens, dtype=torch.float64) if reduction == "none" else torch.tensor(0.7).double()
    loss = linear_cross_entropy(hidden, weight, targets, reduction)
    gradients = torch.autograd.grad(loss, (hidden, weight), upstream)
    expected = F.cross_entropy(hidden @ weight.T, targets, reduction=reduction)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
    for ours, theirs in zip(gradients, torch.autograd.grad(expected, (hidden, weight), upstream)):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 2e-2), (torch.float16, 3e-3)])
def test_linear_cross_entropy_in_narrow_types(dtype, tolerance):
    """The gradient equals that of float64 on the rounded inputs, up to the rounding of the dtype. The gradient of a
    float32 weight is accumulated in float32."""
    torch.manual_seed(0)
    hidden = torch.randn(2 * CHUNK, 64).to(dtype).requires_grad_()
    weight = (torch.randn(997, 64) * 0.2).to(dtype).float().requires_grad_()
    targets = torch.randint(0, 997, (2 * CHUNK,))
    loss = linear_cross_entropy(hidden, weight, targets)
    loss.backward()
    h64, w64 = hidden.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    exact = F.cross_entropy(h64 @ w64.T, targets)
    exact.backward()
    assert loss.dtype == torch.float32
    assert abs(loss.item() - exact.item()) < tolerance
    assert weight.grad.dtype == torch.float32
    assert hidden.grad.dtype == dtype
    for ours, theirs in ((hidden.grad, h64.grad), (weight.grad, w64.grad)):
        assert (ours - theirs).norm() / theirs.norm() < tolerance


@pytest.mark.gpu  # on a CPU torch multiplies by a scalar in float32 anyway
@pytest.mark.parametrize("tokens", [600, 700])
def test_the_mean_of_bfloat16_is_not_biased(tokens, device):
    """1 / tokens in bfloat16 is off by up to 2e-3, an error that all gradients would share."""
    torch.manual_seed(0)
    hidden, weight = (torch.randn(n, 32, device=device, dtype=torch.bfloat16) for n in (tokens, 50))
    targets = torch.randint(50, (tokens,), device=device)
    narrow, wide = (h.requires_grad_() for h in (hidden.clone(), hidden.double()))
    (ours,) = torch.autograd.grad(linear_cross_entropy(narrow, weight, targets), narrow)
    (truth,) = torch.autograd.grad(F.cross_entropy(wide @ weight.double().T, targets), wide)
    ratio = (ours.double() * truth).sum() / truth.square().sum()
    assert ratio == pytest.approx(1, abs=2e-4)


def test_small_gradients_survive_float16():
    """1 / tokens times the probability of a rare token is too small for float16: the loss scale must be applied before
    rounding."""
    hidden = torch.randn(CHUNK, 8).half().requires_grad_()
    weight = torch.zeros(50_000, 8, requires_grad=True)  # all probabilities are 2e-5, and 2e-8 after the mean
    (linear_cross_entropy(hidden, weight, torch.zeros(CHUNK, dtype=torch.long)) * 4096).backward()
    expected = 4096 / CHUNK / 50_000 * hidden.detach().float().sum(0)
    torch.testing.assert_close(weight.grad[7], expected, rtol=2e-2, atol=1e-6)


def test_extreme_logits_give_finite_losses():
    """The probability of the target is below the smallest float32; the loss is still the distance of the logits."""
    weight = torch.tensor([[300.0], [0.0], [-300.0]], requires_grad=True)
    losses = linear_cross_entropy(torch.ones(3, 1), weight, torch.tensor([0, 1, 2]), "none")
    assert losses.tolist() == [0.0, 300.0, 600.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_mean_and_the_losses_of_all_tokens_at_once(dtype):
    """The same bits as each alone. Only the mean has a gradient, that of "mean"."""
    torch.manual_seed(0)
    hidden = torch.randn(CHUNK + 5, 24).to(dtype).requires_grad_()
    weight, targets = torch.randn(301, 24, requires_grad=True), torch.randint(0, 301, (CHUNK + 5,))
    mean, losses = linear_cross_entropy(hidden, weight, targets, "both")
    alone = linear_cross_entropy(hidden, weight, targets)
    assert torch.equal(mean, alone)
    assert torch.equal(losses, linear_cross_entropy(hidden, weight, targets, "none"))
    assert losses.dtype == torch.float32
    assert not losses.requires_grad
    for ours, theirs in zip(*(torch.autograd.grad(loss, (hidden, weight)) for loss in (mean, alone))):
        assert torch.equal(ours, theirs)


def test_weighted_losses_have_the_gradient_by_hand():
    """dl/dz = w (softmax(z) - onehot(t)) / tokens; the divisor is the number of tokens, whatever the weights are."""
    torch.manual_seed(0)
    hidden = torch.randn(CHUNK + 3, 24, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(301, 24, dtype=torch.float64, requires_grad=True)
    targets, weights = torch.randint(0, 301, (CHUNK + 3,)), torch.rand(CHUNK + 3).double()
    weights[::3], weights[1] = 0, 4
    loss, losses = linear_cross_entropy(hidden, weight, targets, "both", weights)
    gradients = torch.autograd.grad(loss, (hidden, weight), torch.tensor(0.7, dtype=torch.float64))

    y, w = hidden.detach(), weight.detach()
    p = torch.exp(y @ w.T)
    p /= p.sum(dim=1, keepdim=True)
    by_hand = -p[range(len(y)), targets].log()
    p[range(len(y)), targets] -= 1
    d_logits = 0.7 * weights[:, None] * p / len(y)
    for ours, truth in zip(
        (loss, losses, *gradients), ((weights * by_hand).sum() / len(y), by_hand, d_logits @ w, d_logits.T @ y)
    ):
        torch.testing.assert_close(ours.detach(), truth, rtol=1e-12, atol=1e-12)
    assert (gradients[0][::3] == 0).all()


def test_weights_of_one_change_no_bit():
    hidden, weight = torch.randn(CHUNK + 3, 24, requires_grad=True), torch.randn(301, 24, requires_grad=True)
    targets = torch.randint(0, 301, (CHUNK + 3,))
    plain, ones = (linear_cross_entropy(hidden, weight, targets, "mean", w) for w in (None, torch.ones(CHUNK + 3)))
    assert torch.equal(plain, ones)
    for a, b in zip(*(torch.autograd.grad(loss, (hidden, weight)) for loss in (plain, ones))):
        assert torch.equal(a, b)


def test_loss_without_gradient_and_a_second_backward():
    hidden, weight = torch.randn(4, 8, requires_grad=True), torch.randn(16, 8)
    targets = torch.tensor([1, 2, 3, 4])
    with torch.no_grad():
        assert not linear_cross_entropy(hidden, weight, targets).requires_grad
    loss = linear_cross_entropy(hidden, weight, targets)
    first, second = (torch.autograd.grad(loss, hidden, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)


def test_cross_entropy_refuses_shapes_that_do_not_fit():
    with pytest.raises(ValueError, match=r"\[tokens, hidden\]"):
        linear_cross_entropy(torch.zeros(2, 3), torch.zeros(5, 4), torch.zeros(2, dtype=torch.long))
    with pytest.raises(ValueError, match="targets must be"):
        linear_cross_entropy(torch.zeros(2, 3), torch.zeros(5, 3), torch.zeros(3, dtype=torch.long))
    with pytest.raises(ValueError, match="reduction"):
        linear_cross_entropy(torch.zeros(2, 3), torch.zeros(5, 3), torch.zeros(2, dtype=torch.long), "sum")
