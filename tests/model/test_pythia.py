"""The network against transformers: stored float64 arrays, and live on the shapes of all ten sizes."""

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from torch.utils._python_dispatch import TorchDispatchMode

from model import SIZES, KVCache, Pythia
from model.huggingface import huggingface_name, load, published_config
from model.pythia import INIT_BLOCK, init_std, initial_rows
from parallel.recompute import RECOMPUTE, set_recompute

GOLDEN = Path(__file__).parents[1] / "golden" / "hf"
PINNED = (-0.00681692, 0.05345108, -0.03836452)
TINY = replace(SIZES["14m"], vocab=384, layers=2)


def same(ours, golden, tolerance):
    assert (ours.detach() - torch.from_numpy(golden)).abs().max() < tolerance


@pytest.mark.parametrize("name", ["neox_h64", "neox_micro"])  # parallel residual as in Pythia, and sequential
def test_golden_float64(name):
    golden = np.load(GOLDEN / name / "golden.npz", allow_pickle=False)
    model = load(GOLDEN / name, torch.float64)
    ids = torch.from_numpy(golden["input_ids"])
    same(model(ids), golden["logits_f64"], 1e-10)
    same(model(ids[:, :-1], ids[:, 1:], reduction="none"), golden["nll_f64"], 1e-10)
    loss = model(ids[:, :-1], ids[:, 1:])
    assert abs(loss.item() - golden["loss_f64"]) < 1e-10
    loss.backward()
    for parameter_name, parameter in model.named_parameters():
        same(parameter.grad, golden["grad/" + huggingface_name(parameter_name)], 1e-10)


@pytest.mark.parametrize("name", ["neox_h64", "neox_micro"])
def test_golden_other_activation_and_precision(name):
    golden = np.load(GOLDEN / name / "golden.npz", allow_pickle=False)
    ids = torch.from_numpy(golden["input_ids"])
    stored = load(GOLDEN / name, torch.float64)
    model = Pythia(replace(stored.config, gelu="tanh")).double()
    model.load_state_dict(stored.state_dict())
    same(model(ids), golden["logits_tanh_f64"], 1e-10)
    same(load(GOLDEN / name)(ids), golden["logits_f32"], 2e-5)


# 6.9b and 12b have the same kinds of shapes
@pytest.mark.parametrize("size", [pytest.param(s, marks=pytest.mark.slow) if s == "6.9b" else s for s in SIZES])
def test_transformers_agrees_on_every_shape(size):
    """Logits and all gradients in float32, random weights, at a depth and vocabulary that fit a laptop."""
    config = replace(SIZES[size], layers=1 if SIZES[size].hidden > 2000 else 2, vocab=512, gelu="none")
    model = Pythia(config, seed=7)
    theirs = transformers.GPTNeoXForCausalLM._from_config(
        transformers.GPTNeoXConfig(**published_config(config, torch.float32, "gelu")), attn_implementation="eager"
    )
    names = {huggingface_name(name): p.detach() for name, p in model.named_parameters()}
    head = "lm_head.weight" if hasattr(theirs, "lm_head") else "embed_out.weight"  # transformers 5, 4
    names[head] = names.pop("embed_out.weight")
    theirs.load_state_dict(names)
    tokens = torch.randint(0, 512, (2, 24), generator=torch.Generator().manual_seed(0))
    expected = theirs(tokens, labels=tokens)
    assert (model(tokens) - expected.logits).abs().max() < 2e-5
    loss = model(tokens[:, :-1], tokens[:, 1:])
    assert abs(loss.item() - expected.loss.item()) < 1e-5
    loss.backward()
    expected.loss.backward()
    gradients = dict(theirs.named_parameters())
    for name, parameter in model.named_parameters():
        name = huggingface_name(name).replace("embed_out.weight", head)
        reference = gradients[name].grad
        assert (parameter.grad - reference).norm() <= 1e-4 * reference.norm() + 1e-7, name


def test_half_precision_stays_near_float32():
    model = Pythia(TINY)
    tokens = torch.randint(0, 384, (2, 65))
    exact = model(tokens[:, :-1], tokens[:, 1:])
    for dtype, tolerance in ((torch.bfloat16, 2e-2), (torch.float16, 2e-3)):
        model.compute_dtype = dtype
        loss = model(tokens[:, :-1], tokens[:, 1:])
        assert loss.dtype == torch.float32
        assert abs(loss.item() - exact.item()) < tolerance
        loss.backward()
        assert all(p.grad.dtype == torch.float32 for p in model.parameters())


def test_initialisation():
    model = Pythia(TINY, seed=5)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            assert (parameter == (1.0 if "norm" in name and name.endswith("weight") else 0.0)).all(), name
        else:
            std, n = init_std(TINY, name), parameter.numel()
            assert abs(parameter.std() / std - 1) < 5 / (2 * n) ** 0.5, name
            assert abs(parameter.mean()) < 5 * std / n**0.5, name
    again, other = Pythia(TINY, seed=5), Pythia(TINY, seed=6)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters()))
    assert not torch.equal(model.embed, other.embed)
    assert not torch.equal(model.embed, model.unembed)


def test_initial_rows_do_not_depend_on_the_shard():
    shape = (3 * INIT_BLOCK + 17, 6)
    whole = initial_rows(TINY, "embed", shape, 1234)
    for cuts in ([0, 1, 2, 200, shape[0]], [0, INIT_BLOCK, 2 * INIT_BLOCK + 1, shape[0]]):
        shards = [initial_rows(TINY, "embed", shape, 1234, slice(a, b)) for a, b in pairwise(cuts)]
        assert np.array_equal(np.concatenate(shards), whole)
    assert len(np.unique(whole)) > 0.99 * whole.size  # blocks do not repeat
    assert initial_rows(TINY, "embed", shape, 1234, slice(4, 4)).shape == (0, 6)


def test_initial_numbers_are_pinned():
    """If these numbers change, every run changes."""
    rows = initial_rows(TINY, "blocks.0.qkv.weight", (384, 128), 1234, slice(0, 1))
    np.testing.assert_allclose(rows[0, :3], PINNED, rtol=1e-6)


class CountProducts(TorchDispatchMode):
    """Counts matmuls and attention. torch's FLOP counter does not know our ops."""

    products = 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        self.products += any(name in op.name() for name in ("mm", "linear", "attention"))
        return op(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_recompute_changes_no_bit(dtype):
    tokens = torch.randint(0, 384, (2, 65), generator=torch.Generator().manual_seed(1))
    tokens[:, [7, 30]] = 0
    gradients, products = {}, {}
    for recompute in RECOMPUTE:
        model = Pythia(TINY)
        model.compute_dtype, model.document_mask = dtype, dtype is None
        set_recompute(model, recompute)
        with CountProducts() as counter:
            model(tokens[:, :-1], tokens[:, 1:]).backward()
        gradients[recompute], products[recompute] = [p.grad for p in model.parameters()], counter.products
    for recompute in RECOMPUTE[1:]:
        assert all(torch.equal(a, b) for a, b in zip(gradients["none"], gradients[recompute]))
    assert products["cheap"] == products["none"]  # no matmul runs twice
    assert products["full"] > products["none"]


@pytest.mark.parametrize("parallel", [True, False])
def test_cache_changes_nothing(parallel):
    model = Pythia(replace(TINY, parallel=parallel)).double()
    tokens = torch.randint(0, 384, (2, 20))
    expected = model(tokens)
    caches = [KVCache(model.config, 2, 20, torch.float64, "cpu") for _ in model.blocks]
    parts = [model(part, caches=caches) for part in tokens.split((7, 1, 1, 11), dim=1)]
    torch.testing.assert_close(torch.cat(parts, 1), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("parallel", [True, False])
def test_with_the_document_mask_a_document_has_the_losses_that_it_has_alone(parallel):
    """The first token of the next document stays the target of an end of text."""
    model = Pythia(replace(TINY, parallel=parallel)).double()
    tokens = torch.randint(1, 384, (2, 21), generator=torch.Generator().manual_seed(2))
    tokens[0, [4, 11, 12]] = tokens[1, 19] = 0
    model.document_mask = True
    losses = model(tokens[:, :-1], tokens[:, 1:], "none")
    model.document_mask = False
    for row, borders in enumerate(((0, 5, 12, 13, 20), (0, 20))):
        for start, end in pairwise(borders):
            alone = model(tokens[row : row + 1, start:end], tokens[row : row + 1, start + 1 : end + 1], "none")
            torch.testing.assert_close(losses[row, start:end], alone[0], rtol=0, atol=1e-12)


def test_memory_of_the_loss_is_a_chunk_not_all_logits():
    config = replace(TINY, vocab=50_304, layers=1)
    model, tokens = Pythia(config), torch.randint(0, 384, (1, 4 * 1024 + 1))
    with torch.profiler.profile(profile_memory=True) as profile:
        model(tokens[:, :-1], tokens[:, 1:]).backward()
    largest = max(event.cpu_memory_usage for event in profile.events() if event.name == "aten::mm")
    assert largest <= 1024 * 50_304 * 4


def test_training_after_inference():
    """Rotary tables that were computed in inference mode are cached and must work in a later backward pass."""
    model = Pythia(replace(TINY, seq_len=77))
    tokens = torch.zeros(1, 5, dtype=torch.long)
    with torch.inference_mode():
        model(tokens)
    model(tokens, tokens).backward()
    assert model.embed.grad is not None
