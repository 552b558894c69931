"""Which ops run their kernels on a GPU. The GPU is fake."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from kernels import backend


@pytest.mark.parametrize(
    ("chosen", "dtype", "runs", "dots_run"),
    [
        ("auto", torch.bfloat16, True, True),
        ("auto", torch.float32, True, False),  # its tiles of 16 x 16 would be slower than the reference
        ("triton", torch.float32, True, True),
        ("auto", torch.float64, False, False),
        ("torch", torch.bfloat16, False, False),
    ],
)
def test_float32_dots_on_a_gpu_run_only_if_they_are_asked_for(chosen, dtype, runs, dots_run, monkeypatch):
    monkeypatch.setattr(backend, "_has_triton_gpu", lambda device=None: True)
    monkeypatch.setattr(backend, "_chosen", chosen)
    with FakeTensorMode():
        x = torch.empty(2, dtype=dtype, device="cuda")
    assert backend.triton_runs(x) == runs
    assert backend.triton_runs(x, dots=True) == dots_run
