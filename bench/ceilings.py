"""The machine, and its ceilings: the bandwidth of a large copy and the FLOP/s of a large matmul."""

import os
import platform
import re
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from bench.peers import PACKAGES
from bench.timing import measure
from kernels.linear import matmul


def machine(device: torch.device) -> dict:
    """CPU, GPU, operating system and package versions, for a report."""
    cpu = platform.processor()
    if (cpuinfo := Path("/proc/cpuinfo")).exists():
        found = re.search(r"^model name\s*: (.*)$", cpuinfo.read_text(), re.MULTILINE)
        cpu = found[1] if found else cpu
    versions: dict[str, str | None] = {"python": platform.python_version()}
    for package in dict.fromkeys(("torch", *PACKAGES.values())):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = None
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    return {"cpu": cpu, "cores": os.cpu_count(), "gpu": gpu, "system": platform.platform(), "versions": versions}


def copy_bandwidth(device: torch.device, flush: Callable) -> float:
    """Bytes/s, read and written, of a copy far larger than the caches, in its fastest round."""
    source = torch.zeros(2**30 if device.type == "cuda" else 2**28, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.numel() / min(measure(lambda: target.copy_(source), device, flush))


def matmul_ceiling(dtype: torch.dtype, device: torch.device, flush: Callable) -> float:
    """FLOP/s of a large square matmul in its fastest round: no matmul of a step is expected to be faster.

    It uses the library that the model uses (kernels/linear.py).
    """
    n = 8192 if device.type == "cuda" else 2048
    x, weight = torch.randn(n, n, device=device).to(dtype), torch.randn(n, n, device=device).to(dtype)
    return 2 * n**3 / min(measure(lambda: matmul(x, weight), device, flush))
