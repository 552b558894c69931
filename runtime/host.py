"""What a run needs from its machine and its operating system: bf16 matmul, signals, memory."""

import ctypes
import os
import platform
import signal
import sys
import time

import torch
from tqdm import tqdm


def supports_bf16_matmul() -> bool:
    """Whether this machine has instructions for bf16 matmul. They take half the time of float32, or less."""
    avx512, amx = (getattr(torch.cpu, f"_is_{name}_supported", bool) for name in ("avx512_bf16", "amx_tile"))
    return torch.cuda.is_available() or avx512() or amx()


def host_facts(device: torch.device, ranks: int) -> dict:
    """What run.json records about the machine of a start."""
    return {
        "host": platform.node(),
        "ranks": ranks,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else platform.processor() or "cpu",
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


class StopSignal:
    """Ctrl-C or SIGTERM sets `requested`. A second signal, a second or more later, ends the process at once.

    Under torchrun one Ctrl-C arrives twice: from the terminal, and a moment later from torchrun.
    """

    def __init__(self):
        self.requested, self.first = False, 0.0  # first: when the first signal came, in seconds
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.handle)

    def handle(self, number: int, frame) -> None:
        if not self.requested:
            self.requested, self.first = True, time.monotonic()
            name = signal.Signals(number).name
            tqdm.write(
                f"{name}: finishing the step, or dropping it if it is long; then saving; a second one stops at once"
            )
        elif time.monotonic() - self.first > 1:
            os._exit(128 + number)


def reuse_freed_memory() -> None:
    """Make glibc keep the memory that a step frees, for the next step. Other C libraries have no such call.

    By default glibc returns large tensors to the system, and every step page-faults its buffers again: about
    half the step time of a small model on a CPU.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt:
        m_trim_threshold, m_mmap_threshold, largest = -1, -3, 2**31 - 1
        mallopt(m_mmap_threshold, largest)
        mallopt(m_trim_threshold, largest)
