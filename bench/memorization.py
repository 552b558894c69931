"""Rows per second of studies.memorization, beside generation by transformers, uncached as published and cached.

python -m bench.memorization --size 70m
"""

import tempfile
import time
from collections.abc import Callable
from functools import partial
from statistics import median

import numpy as np
import torch
from torch import Tensor

from model import SIZES, Pythia
from model.huggingface import save
from runtime.errors import Parser, run_command
from studies.memorization import measure_rows

K = L = 32


def generated(model, tokens: Tensor, use_cache: bool) -> np.ndarray:
    """The flags [batch] by greedy generation, in the published setting: <|endoftext|> is suppressed."""
    options = {"max_length": K + L, "min_length": K + L, "do_sample": False, "use_cache": use_cache}
    prompts = tokens[:, :K]
    written = model.generate(prompts, attention_mask=torch.ones_like(prompts), pad_token_id=0, **options)
    return (written[:, K:] == tokens[:, K:]).all(1).cpu().numpy()


def seconds(work: Callable[[], object], device: torch.device) -> float:
    """On a CPU the processor time of this process, because other processes may be busy."""
    clock = time.perf_counter if device.type == "cuda" else time.process_time
    begun = clock()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return clock() - begun


@torch.inference_mode()
def main() -> None:
    import transformers

    parser = Parser(prog="bench.memorization", description=__doc__.split("\n\n")[0])
    parser.add_argument("--size", choices=list(SIZES), default="70m", help="(default: 70m)")
    parser.add_argument("--batch", type=int, default=64, metavar="N", help="rows at a time (default: 64)")
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="measurements of every arm (default: 3)")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    ours = Pythia(SIZES[args.size]).requires_grad_(False)
    with tempfile.TemporaryDirectory() as folder:
        save(ours, folder, torch.float32, "gelu_pytorch_tanh")
        theirs = transformers.GPTNeoXForCausalLM.from_pretrained(folder, dtype=torch.float32).to(device)
    ours.to(device)
    draw = torch.Generator().manual_seed(0)
    tokens = torch.randint(1, SIZES[args.size].vocab, (args.batch, K + L), generator=draw).to(device)
    arms = {
        "studies.memorization": lambda: measure_rows(ours, tokens, K, banned=0)["memorized"],
        "transformers, cached": partial(generated, theirs, tokens, True),
        "transformers, uncached": partial(generated, theirs, tokens, False),
    }
    times: dict[str, list[float]] = {name: [] for name in arms}
    for turn in range(args.rounds + 1):  # the first warms up
        for name, work in arms.items():
            if turn or name != "transformers, uncached":  # which needs no warm-up: it takes as long as all the rest
                times[name].append(seconds(work, device))
    best = median(times["studies.memorization"][1:])
    print(f"{args.size}, {args.batch} rows at a time, {device.type}, torch {torch.__version__}")
    for name, found in times.items():
        middle = median(found[-args.rounds :])
        print(f"{name:<24}{args.batch / middle:10.1f} rows/s   {middle / best:6.1f} x the time of ours")


if __name__ == "__main__":
    run_command(main)
