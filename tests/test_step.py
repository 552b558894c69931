"""step.py computes the same numbers as ordinary loops, and never waits for the device."""

import random
from dataclasses import replace

import numpy as np
import pytest
import torch

from kernels import backend
from model import SIZES, Pythia
from parallel.gradients import Gradients
from parallel.recompute import set_recompute
from runtime.ranks import Dist
from step import LossScaler, Step, learning_rate, make_optimizer

TINY = replace(SIZES["14m"], layers=2, hidden=64, vocab=384, seq_len=32)  # the kernels support this head_dim


# ---- the rules of an update


@pytest.mark.parametrize(
    ("updates", "rate"),
    [
        (0, 0.0),
        (1, 6.993e-7),
        (715, 5e-4),
        (1430, 1e-3),
        (10_000, 9.91164e-4),
        (36_000, 8.62599e-4),
        (71_500, 5.15705e-4),
        (100_000, 2.19868e-4),
        (115_138, 1.000060e-4),
        (115_139, 1e-4),
        (142_999, 1e-4),
    ],
)
def test_published_learning_rate(updates, rate):
    assert learning_rate(updates, 143_000, 1e-3, "published") == pytest.approx(rate, rel=1e-5)


@pytest.mark.parametrize(
    ("updates", "rate"),
    [(0, 0.0), (1430, 1e-3), (10_000, 9.91887e-4), (36_000, 8.73953e-4), (71_500, 5.57140e-4), (100_000, 2.89788e-4)],
)
def test_textbook_learning_rate(updates, rate):
    assert learning_rate(updates, 143_000, 1e-3, "cosine") == pytest.approx(rate, rel=1e-5)
    assert learning_rate(143_000, 143_000, 1e-3, "cosine") == pytest.approx(1e-4)


def test_loss_scaler_equals_deepspeed():
    """The state machine written from DeepSpeed's description: a step counter and the step of the last overflow."""
    draw = random.Random(3)
    for window in (3, 10, 1000):
        ours = LossScaler(window=window)
        scale, hysteresis, last_overflow = 4096.0, 2, -1
        for step in range(5000):
            overflow = draw.random() < draw.choice((0.0, 0.02, 0.5))
            ours.update(overflow)
            if overflow:
                if hysteresis == 1:
                    scale = max(scale / 2, 1.0)
                else:
                    hysteresis -= 1
                last_overflow = step
            elif (step - last_overflow) % window == 0:
                hysteresis, scale = 2, scale * 2
            assert (ours.scale, ours.hysteresis) == (scale, hysteresis)


def test_loss_scaler_by_hand():
    scaler = LossScaler()
    scales = []
    for overflow in [True, True, True] + [False] * 1000 + [True, True]:
        scaler.update(overflow)
        scales.append(scaler.scale)
    assert scales[:3] == [4096, 2048, 1024]
    assert scales[1001:] == [
        1024,
        2048,
        2048,
        1024,
    ]  # doubled after 1000, hysteresis restored
    for _ in range(30):
        scaler.update(True)
    assert scaler.scale == 1.0
    assert scaler.overflows == 32


def test_optimizer_decays_matrices_only(tiny):
    model = Pythia(tiny)
    optimizer = make_optimizer(model, 1e-3)
    names = {id(p): name for name, p in model.named_parameters()}
    decayed, others = ({names[id(p)] for p in group["params"]} for group in optimizer.param_groups)
    assert decayed == {
        n for n in names.values() if n in ("embed", "unembed") or (n.endswith("weight") and "norm" not in n)
    }
    assert others == set(names.values()) - decayed
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]

    weight = model.blocks[0].qkv.weight
    before, g = weight.detach().double().clone(), torch.randn_like(weight)
    m = v = torch.zeros_like(before)
    expected = before
    for t in (1, 2, 3):
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        weight.grad = g.clone()
        optimizer.step()
        m, v = 0.9 * m + 0.1 * g.double(), 0.95 * v + 0.05 * g.double() ** 2
        step = (m / (1 - 0.9**t)) / ((v / (1 - 0.95**t)).sqrt() + 1e-8)
        expected = expected - 1e-3 * (step + 0.1 * expected)
    torch.testing.assert_close(weight.detach().double(), expected, rtol=1e-6, atol=1e-8)


def model_and_step(dtype: torch.dtype, device: torch.device, lr: float = 1e-2) -> tuple[Pythia, Step]:
    model = Pythia(TINY, seed=5).to(device)
    model.compute_dtype = dtype
    dist = Dist(device=device)
    return model, Step(model, Gradients(model, dist, "none"), make_optimizer(model, lr), dist)


def tokens(steps: int, device: torch.device) -> torch.Tensor:
    """[steps, 3 micro-steps, 2 rows, 33]"""
    return torch.randint(384, (steps, 3, 2, 33), generator=torch.Generator().manual_seed(0)).to(device)


def test_loss_weights_change_gradients_and_no_loss():
    """The gradient is that of sum(weights * losses) / targets, from float64 losses; the losses have no weights."""
    batch, device = tokens(1, torch.device("cpu"))[0], torch.device("cpu")
    model, step = model_and_step(torch.float64, device)
    model.double()
    weights = torch.rand(3, 2, 32, generator=torch.Generator().manual_seed(1)) * 3
    weights[0, 1], weights[2, 0, :20] = 0, 0
    step.forward_backward(batch, 3.0, weights=weights)  # 3 / micro-steps is exact in float32
    flat = batch.flatten(0, 1)  # [rows, 33]
    losses = model(flat[:, :-1], flat[:, 1:], "none")  # [rows, 32]
    expected = torch.autograd.grad((losses * weights.flatten(0, 1)).sum() / losses.numel(), list(model.parameters()))
    for p, gradient in zip(model.parameters(), expected):
        torch.testing.assert_close(p.grad, 3 * gradient, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(step.row_losses.flatten().double(), losses.mean(1).detach(), rtol=1e-6, atol=0)
    assert step.update(0.0)[0].item() == pytest.approx(losses.mean().item(), rel=1e-12)


@pytest.mark.parametrize("bitwise", [False, True])
@pytest.mark.parametrize("stop_after", [1, 2])
def test_a_step_that_is_dropped(stop_after, bitwise):
    """No micro-step follows, no gradient is left, and weights and moments do not change."""
    model, step = model_and_step(torch.float32, torch.device("cpu"))
    step.gradients.bitwise = bitwise
    batches, asked = tokens(2, torch.device("cpu")), []
    assert step.forward_backward(batches[0], go_on=lambda done, micro_steps: True)
    step.update(1e-2)
    before = [p.detach().clone() for p in model.parameters()]
    moments = [{k: v.clone() for k, v in step.optimizer.state[p].items()} for p in model.parameters()]

    def go_on(done: int, micro_steps: int) -> bool:
        asked.append((done, micro_steps))
        return done < stop_after

    assert not step.forward_backward(batches[1], go_on=go_on)
    assert asked == [(done, 3) for done in range(1, stop_after + 1)]
    assert all(p.grad is None for p in model.parameters())
    assert step.gradients.sums == []
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before))
    for p, then in zip(model.parameters(), moments):
        assert all(torch.equal(then[k], v) for k, v in step.optimizer.state[p].items())


def test_the_host_is_at_most_two_micro_steps_ahead_in_a_long_step(monkeypatch):
    """Otherwise a GPU would have all micro-steps in its queue when the signal comes. With events that only count."""
    recorded, waited = [], []

    class Event:
        def record(self) -> None:
            recorded.append(self)

        def synchronize(self) -> None:
            waited.append(self)

    _, step = model_and_step(torch.float32, torch.device("cpu"))
    step.dist = Dist(device=torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "Event", Event)
    ahead, batch = [], tokens(1, torch.device("cpu"))[0].repeat(3, 1, 1)  # nine micro-steps
    assert step.forward_backward(batch, go_on=lambda *_: ahead.append(len(recorded) - len(waited)) or True)
    assert ahead == [1, *[2] * 7]
    assert waited == recorded[:6]
    recorded.clear()
    assert step.forward_backward(batch)  # a short step does not ask, and so never waits
    assert recorded == []


def state(model: Pythia, optimizer: torch.optim.AdamW) -> list[torch.Tensor]:
    return [x.clone() for p in model.parameters() for x in (p.detach(), *optimizer.state[p].values())]


# ---- the step


@pytest.mark.parametrize("recompute", ["none", "cheap", "full"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_gradients_equal_those_of_autograd(dtype, recompute, device):
    """Casting weights once a step instead of at every use changes no bit."""
    batch = tokens(1, device)[0]
    model, step = model_and_step(dtype, device)
    set_recompute(model, recompute)
    step.forward_backward(batch, loss_scale=4.0)
    plain, _ = model_and_step(dtype, device)
    set_recompute(plain, recompute)
    losses = [plain(rows[:, :-1], rows[:, 1:]) for rows in batch]
    for loss in losses:
        (loss * (4.0 / 3)).backward()
    assert step.loss_sum.item() == pytest.approx(sum(loss.item() for loss in losses), rel=1e-12)
    for (name, ours), theirs in zip(model.named_parameters(), plain.parameters()):
        assert ours.dtype == ours.grad.dtype == torch.float32
        assert torch.equal(ours.grad, theirs.grad), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_losses_of_rows(dtype, device):
    """The mean loss of every row before the update, as a forward pass with the same weights computes it."""
    model, step = model_and_step(dtype, device)
    for batch in tokens(4, device):
        with torch.no_grad(), step.cast_weights:
            expected = [model(rows[:, :-1], rows[:, 1:], "none").mean(dim=1) for rows in batch]
        step.forward_backward(batch)
        loss, _ = step.update(1e-2).tolist()
        assert torch.equal(step.row_losses, torch.stack(expected).cpu())
        assert step.row_losses.dtype == torch.float32
        assert step.row_losses.double().mean().item() == pytest.approx(loss, rel=1e-6)
    before = step.row_losses
    step.forward_backward(batch)
    assert step.row_losses is before  # allocated once


def test_half_precision_copies_are_used_only_within_a_step(device, monkeypatch):
    model, step = model_and_step(torch.bfloat16, device)
    before, seen = dict(model.named_parameters()), []

    def forward(*_):
        seen.extend(p.dtype for p in model.parameters())
        raise RuntimeError("in the middle of a step")

    monkeypatch.setattr(model, "forward", forward)
    with pytest.raises(RuntimeError, match="in the middle"):
        step.forward_backward(tokens(1, device)[0])
    assert seen.count(torch.bfloat16) == 4 * TINY.layers  # qkv, attn_out, mlp_in, mlp_out
    after = dict(model.named_parameters())
    assert list(after) == list(before)
    assert all(after[name] is before[name] for name in before)


@pytest.mark.parametrize("scale", [1.0, 1024.0])
def test_updates_equal_those_of_torch(scale, device):
    """Compared with gradients that torch unscales and clips, and AdamW in float64, over a few steps."""
    model, step = model_and_step(torch.float32, device)
    exact = Pythia(TINY, seed=5).to(device)
    optimizer, norms = make_optimizer(exact.double(), 1.0), []
    for i, batch in enumerate(tokens(9, device)):
        step.forward_backward(batch, scale)
        for ours, theirs in zip(model.parameters(), exact.parameters()):
            theirs.grad = ours.grad.double() / scale
        norm = torch.nn.utils.clip_grad_norm_(exact.parameters(), 1.0)
        facts = step.update(lr := 1e-2 / (i + 1))
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        norms.append(norm.item())
        assert facts[1].item() == pytest.approx(norms[-1], rel=1e-6)
    assert min(norms) < 1 < max(norms), norms  # the first steps clip, the last do not
    for ours, theirs in zip(model.parameters(), exact.parameters()):
        torch.testing.assert_close(ours.double(), theirs, rtol=0, atol=1e-6)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_no_update_if_a_gradient_is_not_finite(value, device):
    model, step = model_and_step(torch.float32, device)
    first, second, third = tokens(3, device)
    step.forward_backward(first)
    step.update(1e-2)
    before = state(model, step.optimizer)
    step.forward_backward(second)
    model.blocks[1].mlp_out.bias.grad[3] = value
    loss, norm = step.update(1e-2).tolist()
    assert np.isfinite(loss)
    assert not np.isfinite(norm)
    assert all(torch.equal(a, b) for a, b in zip(state(model, step.optimizer), before))
    step.forward_backward(third)
    assert np.isfinite(step.update(1e-2).tolist()).all()
    assert not any(torch.equal(a, b) for a, b in zip(state(model, step.optimizer), before))


@pytest.fixture
def chosen_kernels():
    """The kernels that train.py would choose."""
    backend.choose("auto")
    yield
    backend.choose("torch")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_graph_changes_no_bit(dtype, device, chosen_kernels):
    results = []
    for graph in (True, False):
        model, step = model_and_step(dtype, device)
        assert step.graph is not None
        if not graph:
            step.graph = None
        facts = []
        for batch in tokens(6, device):
            step.forward_backward(batch, loss_scale=8.0)
            facts.append(torch.cat((step.update(1e-2).cpu(), step.row_losses.double().flatten())))
        results.append([torch.stack(facts), *state(model, step.optimizer)])
        if graph:
            assert step.graph.tokens is not None
    assert all(torch.equal(a, b) for a, b in zip(*results))


@pytest.mark.gpu
@pytest.mark.parametrize("size", ["14m", "410m"])
def test_a_step_does_not_wait_for_the_device(size, device, monkeypatch, chosen_kernels):
    """torch itself detects a host sync. 14m runs as a graph, 410m does not, and with loss weights."""
    monkeypatch.setitem(SIZES, size, replace(SIZES[size], layers=2))
    model = Pythia(SIZES[size]).to(device)
    model.compute_dtype = torch.bfloat16
    dist = Dist(device=device)
    weights = torch.rand(2, 8, 512, device=device) if size == "410m" else None
    step = Step(model, Gradients(model, dist, "none"), make_optimizer(model, 1e-3), dist, weights is not None)
    assert (step.graph is None) == (size == "410m")
    batch = torch.randint(50_000, (2, 8, 513), device=device)  # enough tokens that the embedding gradient sorts them
    for i in range(3):
        torch.cuda.set_sync_debug_mode("error" if i == 2 else "default")
        try:
            step.forward_backward(batch, weights=weights)
            facts = step.update(1e-3)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert facts.isfinite().all()


@pytest.mark.gpu
def test_the_reference_gets_no_graph(device):
    assert model_and_step(torch.bfloat16, device)[1].graph is None
