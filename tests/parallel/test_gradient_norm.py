"""The gradient norm: exact, and in --bitwise runs independent of the order of rows."""

import math

import numpy as np
import pytest
import torch

from parallel.gradients import squared_norm, squared_norm_in_any_order
from runtime.ranks import Dist


@pytest.mark.parametrize("shape", [(50_304, 128), (1200, 5120), (20_480,)])
def test_gradient_norm_is_exact_for_millions_of_elements(shape):
    p = torch.nn.Parameter(torch.empty(shape))
    p.grad = torch.rand(shape, generator=torch.Generator().manual_seed(0)) * 1e-3
    exact = math.sqrt(np.square(p.grad.numpy().astype(np.float64)).sum())
    assert squared_norm([p]).sqrt().item() == pytest.approx(exact, rel=1e-6)
    assert squared_norm([p, p]).sqrt().item() == pytest.approx(math.sqrt(2) * exact, rel=1e-6)
    in_any_order = squared_norm_in_any_order([p], Dist()).sqrt().item()
    assert in_any_order == pytest.approx(exact, rel=1e-9)


def test_gradient_norm_in_any_order_of_rows():
    """The bits do not depend on the order. A gradient that is not finite makes the norm NaN."""
    generator = torch.Generator().manual_seed(0)
    parameters = [torch.nn.Parameter(torch.empty(shape)) for shape in ((333, 77), (1001,), (5, 1), (0, 3))]
    for p in parameters:
        p.grad = torch.randn(p.shape, generator=generator) * 10 ** torch.randn(p.shape, generator=generator)
    norm = squared_norm_in_any_order(parameters, Dist())
    exact = sum(math.fsum(p.grad.double().square().flatten().tolist()) for p in parameters)
    assert norm.item() == pytest.approx(exact, rel=1e-9)
    for p in parameters:
        p.grad = p.grad[torch.randperm(len(p), generator=generator)]
    assert torch.equal(norm, squared_norm_in_any_order(parameters[::-1], Dist()))
    for bad in (torch.nan, torch.inf):
        parameters[1].grad[7] = bad
        assert squared_norm_in_any_order(parameters, Dist()).isnan()
