"""How a rank leaves the process group."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# A rank of a run on GPUs, of which no other rank is left. As NCCL does, leaving the group waits for them for ever.
RANK = """
import sys, threading
import torch
from runtime import ranks
from runtime.errors import UserError, run_command

ranks.torch_dist.is_initialized = lambda: True
ranks.torch_dist.destroy_process_group = threading.Event().wait
dist = ranks.Dist(0, 2, torch.device("cuda", 0))

def main():
    print("step 7")
    try:
        raise UserError("the disk of this rank is full")
    finally:
        ranks.end_dist(dist, together=False)

run_command(main)
"""


@pytest.mark.parametrize("error", ["UserError", "RuntimeError"])
def test_a_rank_that_fails_on_a_gpu_prints_its_error_and_ends(error):
    script = RANK.replace("raise UserError", f"raise {error}")
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert done.stdout == "step 7\n"
    assert done.stderr.endswith(f"{'error' if error == 'UserError' else error}: the disk of this rank is full\n")
