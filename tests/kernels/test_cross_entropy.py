"""The cross-entropy kernel against float64, and the op as torch sees it.

hidden = identity makes the columns of weight the rows of logits, exactly: that is how logits are chosen below, and how
their gradient is read off, as that of weight.
"""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import kernels.backend
from kernels import cross_entropy, linear_cross_entropy
from tests.kernels.shipped.cross_entropy import shipped

gpu = pytest.mark.gpu
pytestmark = pytest.mark.usefixtures("triton_kernels")


@pytest.fixture
def small_chunks(monkeypatch):
    """Chunks of five tokens: twelve tokens are two chunks and a part."""
    monkeypatch.setattr(cross_entropy, "triton_chunk", lambda hidden: 5)
    monkeypatch.setattr(cross_entropy, "CHUNK", 5)  # matmuls of other shapes would round differently


def draw(tokens, vocab, width, dtype, device="cpu", weight_dtype=None, scale=1.0):
    """hidden [tokens, width], weight [vocab, width] and targets [tokens]; logits have a deviation of about `scale`."""
    torch.manual_seed(vocab + tokens)
    hidden = torch.randn(tokens, width, device=device).to(dtype).requires_grad_()
    weight = (torch.randn(vocab, width, device=device) * scale / width**0.5).to(weight_dtype or dtype).requires_grad_()
    return hidden, weight, torch.randint(0, vocab, (tokens,), device=device)


def from_logits(logits):
    """(hidden, weight) whose matmul gives these logits."""
    hidden = torch.eye(len(logits), dtype=logits.dtype, device=logits.device).requires_grad_()
    return hidden, logits.T.contiguous().requires_grad_()


def loss_and_gradients(hidden, weight, targets, reduction="mean", upstream=None):
    loss = linear_cross_entropy(hidden, weight, targets, reduction)
    if upstream is None:
        upstream = torch.ones_like(loss)
    return (loss.detach(), *torch.autograd.grad(loss, (hidden, weight), upstream))


def run_kernel(logits, targets, d_losses=None, with_gradient=True):
    """(losses, gradient of their sum) by the kernel alone, on a copy of the logits."""
    d_logits, losses = logits.clone(), torch.empty(len(logits), dtype=torch.float32, device=logits.device)
    cross_entropy.cross_entropy_in_place(d_logits, targets, losses, d_losses, with_gradient)
    return losses, d_logits


def exactly(hidden, weight, targets, reduction="mean", upstream=None):
    """The same in float64, with all logits at once. The weight is cast to the dtype of hidden first."""
    weight = weight.to(hidden.dtype)
    hidden, weight = (x.detach().double().requires_grad_() for x in (hidden, weight))
    loss = F.cross_entropy(hidden @ weight.T, targets, reduction=reduction)
    upstream = torch.ones_like(loss) if upstream is None else upstream.double()
    return (loss.detach(), *torch.autograd.grad(loss, (hidden, weight), upstream))


def errors(ours, exact):
    """Relative errors, in the Euclidean norm, of (loss, d_hidden, d_weight)."""
    return [((a - b).norm() / b.norm()).item() for a, b in zip(ours, exact)]


def assert_as_good_as_the_definition(case, reduction="mean", upstream=None, floor=1e-6):
    """Errors are at most 1.1 times those of the reference in the same dtype, or `floor`."""
    exact = exactly(*case, reduction, upstream)
    ours = errors(loss_and_gradients(*case, reduction, upstream), exact)
    kernels.backend.choose("torch")
    theirs = errors(loss_and_gradients(*case, reduction, upstream), exact)
    kernels.backend.choose("triton")
    for name, mine, definition in zip(("loss", "d_hidden", "d_weight"), ours, theirs):
        assert mine <= max(1.1 * definition, floor), f"{name}: error {mine:.2e}, of the definition {definition:.2e}"


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize(("tokens", "vocab"), [(1, 2), (5, 97), (12, 4096), (10, 8193)])
def test_is_cross_entropy_in_float32(tokens, vocab, reduction, device, small_chunks):
    case = draw(tokens, vocab, 24, torch.float32, device)
    upstream = torch.randn(tokens, device=device) if reduction == "none" else torch.tensor(0.7, device=device)
    ours, exact = (f(*case, reduction, upstream) for f in (loss_and_gradients, exactly))
    assert [x.dtype for x in ours] == [torch.float32] * 3
    assert max(errors(ours, exact)) < 1e-6


@pytest.mark.parametrize("weighed", [False, True])
@pytest.mark.parametrize("vocab", [50_304, 50_432, 50_688])
def test_the_vocabularies_of_pythia_in_float32(vocab, weighed, device):
    """The kernel alone, because the matmuls around it round more than it does."""
    torch.manual_seed(vocab)
    logits, targets = torch.randn(3, vocab, device=device) * 3, torch.tensor([0, 17, vocab - 1], device=device)
    d_losses = torch.randn(3, device=device) if weighed else None
    z = logits.double().requires_grad_()
    exact = F.cross_entropy(z, targets, reduction="none")
    (d_exact,) = torch.autograd.grad(exact, z, torch.ones_like(exact) if d_losses is None else d_losses.double())
    losses, d_logits = run_kernel(logits, targets, d_losses)
    torch.testing.assert_close(losses.double(), exact, rtol=2e-7, atol=0)
    assert errors([d_logits], [d_exact])[0] < 1e-7
    torch.testing.assert_close(d_logits.double(), d_exact, rtol=2e-6, atol=1e-15)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("weight_dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("vocab", [1000, 8200])
def test_float16_is_as_good_as_the_definition(vocab, weight_dtype, reduction, device, small_chunks):
    case = draw(24, vocab, 64, torch.float16, device, weight_dtype, scale=2.0)
    upstream = torch.rand(24, device=device) if reduction == "none" else torch.tensor(3.0, device=device)
    assert_as_good_as_the_definition(case, reduction, upstream)
    loss, d_hidden, d_weight = loss_and_gradients(*case, reduction, upstream)
    assert (loss.dtype, d_hidden.dtype, d_weight.dtype) == (torch.float32, torch.float16, weight_dtype)


def test_float64_runs_the_definition(device):
    case = draw(3, 17, 4, torch.float64, device)
    for ours, exact in zip(loss_and_gradients(*case), exactly(*case)):
        torch.testing.assert_close(ours, exact, rtol=1e-12, atol=1e-14)


def adversarial_logits(vocab):
    """Rows of logits that break careless kernels, with the token to predict."""
    ramp = torch.linspace(-1, 1, vocab, dtype=torch.float64)
    spike = torch.zeros(vocab, dtype=torch.float64)
    spike[vocab // 2] = 60_000
    rows = {
        "rising: every lane's maximum grows each time": (ramp * 1000, 0),
        "falling": (-ramp * 1000, vocab - 1),
        "all equal and large": (torch.full_like(ramp, 30_000), 1),
        "all equal and very negative": (torch.full_like(ramp, -60_000), vocab - 1),
        "one token certain, and right": (spike, vocab // 2),
        "one token certain, and wrong": (spike, vocab // 2 + 1),
        "one token impossible": (torch.where(ramp == -1, -torch.inf, ramp), 5),
        "tiny differences": (ramp * 1e-3, 7),
    }
    return torch.stack([row for row, _ in rows.values()]), torch.tensor([target for _, target in rows.values()])


@pytest.mark.parametrize("vocab", [50, 9001])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=gpu)])
def test_adversarial_logits(dtype, vocab, device):
    logits, targets = (x.to(device) for x in adversarial_logits(vocab))
    logits = logits.to(dtype)
    z = logits.double().requires_grad_()  # exact, from the values that the dtype can hold
    exact = F.cross_entropy(z, targets, reduction="none")
    (d_exact,) = torch.autograd.grad(exact.sum(), z)
    # Without matmuls, where 0 x infinity = NaN: the kernel alone.
    losses, d_logits = run_kernel(logits, targets)
    torch.testing.assert_close(losses.double(), exact, rtol=1e-6, atol=2e-6)
    unit = torch.finfo(dtype).eps / 2
    torch.testing.assert_close(d_logits.double(), d_exact, rtol=4 * max(unit, 2e-6), atol=1e-7)


def test_without_gradient_the_logits_stay(device):
    logits, targets = torch.randn(3, 500, device=device), torch.tensor([0, 7, 499], device=device)
    losses, after = run_kernel(logits, targets, with_gradient=False)
    torch.testing.assert_close(losses, F.cross_entropy(logits, targets, reduction="none"))
    assert torch.equal(after, logits)


def test_a_target_outside_the_vocabulary_gives_nan(device):
    """The kernel cannot raise an error, so the loss must be NaN and not look like a loss."""
    hidden, weight = from_logits(torch.randn(4, 33, device=device))
    losses = linear_cross_entropy(hidden, weight, torch.tensor([0, 33, -1, 32], device=device), "none")
    assert losses.isnan().tolist() == [False, True, True, False]


def test_nan_logits_give_nan(device):
    logits = torch.randn(2, 9000, device=device)
    logits[1, 8999] = torch.nan
    losses, d_logits = run_kernel(logits, torch.tensor([1, 1], device=device))
    assert losses.isnan().tolist() == [False, True]
    assert d_logits.isnan().all(dim=1).tolist() == [False, True]


def test_small_gradients_survive_float16(device):
    """1 / tokens times the probability of a rare token is too small for float16: the loss scale must be applied before
    rounding."""
    tokens, vocab = 16, 20_000
    hidden = torch.ones(tokens, 8, device=device, dtype=torch.float16).requires_grad_()
    weight = torch.zeros(vocab, 8, device=device, requires_grad=True)  # all probabilities are 5e-5
    targets = torch.zeros(tokens, dtype=torch.long, device=device)
    (linear_cross_entropy(hidden, weight, targets) * 2.0**-8).backward()
    torch.testing.assert_close(weight.grad[7], torch.full_like(weight.grad[7], 2.0**-8 / vocab), rtol=2e-2, atol=0)


@pytest.mark.parametrize("weight_dtype", [torch.float16, torch.float32])
def test_the_weight_gradient_is_summed_in_float32(weight_dtype, device, monkeypatch):
    """Chunks of one token that add 4096, 1, 1 and 1: 4096 in float16, 4099 in float32, rounded to 4100 at the end."""
    monkeypatch.setattr(cross_entropy, "triton_chunk", lambda hidden: 1)
    hidden = torch.ones(4, 16, device=device, dtype=torch.float16)
    weight = torch.zeros(2, 16, device=device, dtype=weight_dtype)
    weight[0] = 30.0  # the first token is certain, the second is right
    weight.requires_grad_()
    losses = linear_cross_entropy(hidden, weight, torch.ones(4, dtype=torch.long, device=device), "none")
    (gradient,) = torch.autograd.grad(losses, weight, torch.tensor([4096.0, 1, 1, 1], device=device))
    expected = torch.tensor([4099.0, -4099.0], device=device).to(weight_dtype)
    assert torch.equal(gradient, expected[:, None].expand(2, 16))


def test_any_strides(device, small_chunks):
    hidden, weight, targets = draw(12, 97, 24, torch.float32, device)
    expected = exactly(hidden, weight, targets, "none")
    strided = [x.detach().T.contiguous().T.requires_grad_() for x in (hidden, weight)]
    targets = torch.stack([targets, targets], dim=1)[:, 0]  # stride 2
    losses = linear_cross_entropy(*strided, targets, "none")
    gradients = torch.autograd.grad(losses.sum(), strided)  # the gradient of sum is one number, expanded with stride 0
    assert max(errors((losses.detach(), *gradients), expected)) < 1e-6
    upstream = torch.rand(12, 3, device=device)[:, 1]  # stride 3
    ours, exact = (f(*strided, targets, "none", upstream) for f in (loss_and_gradients, exactly))
    assert max(errors(ours, exact)) < 1e-6


class Count(TorchDispatchMode):
    """Counts the calls of every operator of torch."""

    def __init__(self):
        super().__init__()
        self.calls = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.calls[function.overloadpacket.__name__] = self.calls.get(function.overloadpacket.__name__, 0) + 1
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("reduction", "gradient", "products"), [("mean", False, 3), ("none", True, 3), ("mean", True, 9)]
)
def test_products_and_host_syncs(reduction, gradient, products, device, small_chunks):
    """Three chunks: one matmul for the logits of each, and two more only if gradients are computed. No operator makes
    the host wait for the device."""
    hidden, weight, targets = draw(12, 97, 24, torch.float32, device)
    with torch.set_grad_enabled(gradient), Count() as count:
        loss = cross_entropy.linear_cross_entropy_by_kernel(
            hidden.detach(), weight.detach(), targets, reduction == "mean" and gradient
        )
        del loss
    assert count.calls.get("mm", 0) + count.calls.get("addmm", 0) == products
    assert not {"_local_scalar_dense", "nonzero", "index", "is_nonzero"} & set(count.calls)


def test_two_runs_give_the_same_bits(device, small_chunks):
    case = draw(12, 8200, 32, torch.float16, device)
    for one, other in zip(loss_and_gradients(*case), loss_and_gradients(*case)):
        assert torch.equal(one, other)


def test_loss_weights_in_float32(device, small_chunks):
    hidden, weight, targets = draw(12, 97, 24, torch.float32, device)
    weights = torch.tensor([0, 1, 2.5] * 4, device=device)
    mean, losses = linear_cross_entropy(hidden, weight, targets, "both", weights)
    ours = mean.detach(), *torch.autograd.grad(mean, (hidden, weight), torch.tensor(0.7, device=device))
    exact, *gradients = exactly(hidden, weight, targets, "none", 0.7 * weights / 12)
    assert max(errors(ours, ((exact * weights).mean(), *gradients))) < 1e-6
    torch.testing.assert_close(losses.double(), exact, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_opcheck(dtype, device, small_chunks):
    hidden, weight, targets = draw(7, 40, 8, dtype, device, weight_dtype=torch.float32)
    weights = torch.rand(7, device=device)
    for options in ((True, True, None), (True, True, weights), (False, False, None)):
        torch.library.opcheck(cross_entropy._linear_cross_entropy, (hidden, weight, targets, *options))
    frozen = (hidden.detach(), weight.detach(), targets)
    torch.library.opcheck(cross_entropy._linear_cross_entropy, (*frozen, True, False, weights))
    torch.library.opcheck(cross_entropy._linear_cross_entropy_backward, (*frozen, torch.rand(7, device=device)))


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compiled(reduction, device, small_chunks):
    hidden, weight, targets = draw(7, 40, 8, torch.float32, device)
    eager = loss_and_gradients(hidden, weight, targets, reduction)
    backend = "inductor" if device.type == "cuda" else "aot_eager"  # on a CPU inductor would start a C++ compiler
    loss = torch.compile(linear_cross_entropy, fullgraph=True, backend=backend)(hidden, weight, targets, reduction)
    gradients = torch.autograd.grad(loss.sum(), (hidden, weight))
    torch.testing.assert_close((loss.detach(), *gradients), eager, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_selective_activation_checkpointing(reduction, device, small_chunks):
    """The loss is computed once if saved and twice if recomputed; the gradients are the same."""
    hidden, weight, targets = draw(7, 40, 8, torch.float32, device)
    expected = loss_and_gradients(hidden, weight, targets, reduction)

    def policy(kept, ctx, op, *args, **kwargs):
        ours = op == torch.ops.tripod.linear_cross_entropy.default
        return CheckpointPolicy.MUST_SAVE if ours and kept else CheckpointPolicy.PREFER_RECOMPUTE

    for kept, runs in ((True, 1), (False, 2)):
        contexts = partial(create_selective_checkpoint_contexts, partial(policy, kept))
        with Count() as count:
            loss = checkpoint(
                lambda h, w: linear_cross_entropy(h * 1.0, w, targets, reduction),
                hidden, weight, use_reentrant=False, context_fn=contexts,
            )  # fmt: skip
            gradients = torch.autograd.grad(loss.sum(), (hidden, weight))
        for ours, theirs in zip((loss.detach(), *gradients), expected):
            assert torch.equal(ours, theirs)
        assert count.calls["linear_cross_entropy"] == runs


def test_no_second_derivative(device):
    hidden, weight, targets = draw(4, 20, 8, torch.float32, device)
    loss = linear_cross_entropy(hidden, weight, targets)
    (gradient,) = torch.autograd.grad(loss, hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="does not require grad"):
        gradient.sum().backward()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda h, w, t: (h, w, t.int()), "int64"),
        (lambda h, w, t: (h.long(), w, t), "floating point"),
        (lambda h, w, t: (h, w.long(), t), "floating point"),
        (lambda h, w, t: (h, w.to("meta"), t), "one device"),
        (lambda h, w, t: (h, w, t.to("meta")), "one device"),
        (lambda h, w, t: (h[0], w, t), r"\[tokens, hidden\]"),
        (lambda h, w, t: (h, w[:, 1:], t), r"\[tokens, hidden\]"),
        (lambda h, w, t: (h[:0], w, t[:0]), r"\[tokens, hidden\]"),
        (lambda h, w, t: (h, w, t[1:]), "targets must be"),
        (lambda h, w, t: (h, w, t[:, None]), "targets must be"),
        (lambda h, w, t: (h, w, t, "sum"), "reduction"),
        (lambda h, w, t: (h, w, t, "none", h[:, 0]), "loss_weights"),
        (lambda h, w, t: (h, w, t, "mean", h[:1, 0]), "loss_weights"),
        (lambda h, w, t: (h, w, t, "mean", h[:, 0].half()), "loss_weights"),
    ],
)
def test_refuses_what_does_not_fit(change, message, device):
    case = (
        torch.zeros(2, 3, device=device),
        torch.zeros(5, 3, device=device),
        torch.zeros(2, dtype=torch.long, device=device),
    )
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy(*change(*case))


# The ten sizes have eight widths and three padded vocabularies.
WIDTHS = [(50_304, width) for width in (128, 256, 512, 768, 1024, 2048, 2560)] + [(50_432, 4096), (50_688, 5120)]


def test_every_vocabulary_is_shipped():
    assert {kernel.constants["VOCAB"] for kernel in shipped(90)} == {vocab for vocab, _ in WIDTHS}


@gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("vocab", "width"), WIDTHS)
@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_every_size_is_as_good_as_the_definition(vocab, width, dtype, scale, device):
    tokens = cross_entropy.triton_chunk(width) + 100
    case = draw(tokens, vocab, width, dtype, device, torch.float32, scale)
    assert_as_good_as_the_definition(case)
    assert_as_good_as_the_definition(case, "none", torch.rand(tokens, device=device))


@gpu
@pytest.mark.parametrize("vocab", [50_304, 50_432, 50_688])
def test_a_hundred_runs_give_the_same_bits(vocab, device):
    case = draw(cross_entropy.triton_chunk(768) + 100, vocab, 768, torch.bfloat16, device)
    first = loss_and_gradients(*case)
    for _ in range(100):
        for one, other in zip(first, loss_and_gradients(*case)):
            assert torch.equal(one, other)


@pytest.mark.large
@gpu
def test_more_logits_than_2_to_the_31(device, monkeypatch):
    """All logits in one chunk, 8.6 GB: the last rows lie past 2^32 bytes and past 2^31 elements."""
    tokens, vocab = 43_000, 50_304
    assert tokens * vocab > 2**31
    monkeypatch.setattr(cross_entropy, "triton_chunk", lambda hidden: tokens)
    hidden, weight, targets = draw(tokens, vocab, 64, torch.bfloat16, device)
    with torch.no_grad():
        losses = linear_cross_entropy(hidden, weight, targets, "none")
    _, d_hidden, _ = loss_and_gradients(hidden, weight, targets)
    last = slice(tokens - 200, tokens)
    exact, d_exact, _ = exactly(hidden[last], weight, targets[last], "none")
    assert errors((losses[last], d_hidden[last] * tokens), (exact, d_exact))[0] < 2e-3
    assert errors((losses[last], d_hidden[last] * tokens), (exact, d_exact))[1] < 2e-2


@pytest.mark.large
@gpu
def test_memory(device):
    """8 rows of 2048 tokens of size 160m: all logits would take 1.65 GB, and each of their float32 copies 3.3 GB. A
    chunk takes 0.82, the float32 gradient of the weight 0.15, and the gradients in bfloat16 0.10."""
    hidden, weight, targets = draw(8 * 2048, 50_304, 768, torch.bfloat16, device)
    linear_cross_entropy(hidden[:64], weight, targets[:64])  # allocates cuBLAS's workspace, which does not count
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    linear_cross_entropy(hidden, weight, targets).backward()
    assert torch.cuda.max_memory_allocated() - before < 1.15e9
