"""Recompute: torch.compile compiles it, and a later choice replaces an earlier one. Numbers: test_pythia.py."""

from dataclasses import replace

import pytest
import torch

from model import SIZES, Pythia
from parallel.recompute import RECOMPUTE, set_recompute


@pytest.mark.parametrize("recompute", RECOMPUTE)
def test_recompute_compiles(recompute):
    """torch.compile compiles the block as one graph, with our ops in it."""
    graphs = []

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    model = Pythia(replace(SIZES["14m"], layers=1, hidden=32, vocab=64, seq_len=16))
    tokens = torch.randint(64, (2, 17), generator=torch.Generator().manual_seed(0))
    expected = torch.autograd.grad(model(tokens[:, :-1], tokens[:, 1:]), list(model.parameters()))
    set_recompute(model, recompute)
    for block in model.blocks:
        block.compile(fullgraph=True, backend=backend)
    gradients = torch.autograd.grad(model(tokens[:, :-1], tokens[:, 1:]), list(model.parameters()))
    assert "tripod" in "".join(graph.print_readable(print_output=False) for graph in graphs)
    for ours, theirs in zip(gradients, expected):
        torch.testing.assert_close(ours, theirs)


def test_a_later_choice_replaces_an_earlier_one():
    model = Pythia(replace(SIZES["14m"], layers=1, hidden=32, vocab=64, seq_len=16))
    plain = model.blocks[0].forward
    for recompute in ("cheap", "full", "none"):
        set_recompute(model, recompute)
    assert model.blocks[0].forward == plain
