"""Seconds of a step, estimated from the rates of a GPU. Communication, kernel launches, reading and saving take more.
With --document-mask attention takes less: how much depends on the lengths of the documents.

step     = micro_steps (layers (forward + backward) + loss) + passes over weights, gradients and moments
forward  = 2 tokens weights / matmul  +  2 tokens seq_len hidden / attention  +  bytes / copy     of a layer
backward = twice the first, five halves of the second, other bytes, and what is recomputed
"""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch

from kernels.cross_entropy import triton_chunk
from model import Config
from plan.memory import RECOMPUTED_ACTIVATIONS, SHARDINGS, USABLE, Job, fits, total_memory, variants
from runtime.errors import UserError

RESULTS = Path(__file__).parents[1] / "bench" / "results"
ATTENTION_REACH = 0.5  # assumed share of the rate of large matmuls, if only causal attention is credited
COPY_REACH = 0.85  # assumed share of the data sheet's bandwidth


class GPU(NamedTuple):
    flops: float  # dense FLOP/s in bf16 or fp16 (with float32 sums), by the data sheet
    flops_fp32: float
    memory: float  # bytes
    copy: float  # bytes/s of its memory
    reach: float  # assumed share of `flops` that large matmuls reach


GPUS = {
    "H200": GPU(989e12, 67e12, 141e9, 4.8e12, 0.68),
    "H100": GPU(989e12, 67e12, 80e9, 3.35e12, 0.68),
    "A100-80GB": GPU(312e12, 19.5e12, 80e9, 2.04e12, 0.85),
    "A100-40GB": GPU(312e12, 19.5e12, 40e9, 1.555e12, 0.85),
    "L40S": GPU(362e12, 91.6e12, 48e9, 864e9, 0.68),
    "4090": GPU(165e12, 82.6e12, 24e9, 1008e9, 0.85),
    "3090": GPU(71e12, 35.6e12, 24e9, 936e9, 0.85),
}


def peak_flops(device: torch.device) -> float | None:
    """FLOP/s of a device in bf16 or fp16 by its data sheet, or None if it is not in GPUS."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return next((gpu.flops for known, gpu in GPUS.items() if known.split("-")[0] in name), None)


def known_gpu(name: str, memory: float) -> tuple[str, float]:
    """The key of GPUS that a device takes its rates from, and its bytes of memory as plans count them.

    A GPU of 80 GB reports 85e9 bytes. Runs and plans count 80e9, so that a run takes the setting that --plan suggests.
    A device that is not in GPUS counts what it reports, and has the rates of an H100: the choice needs only ratios.
    """
    for key, gpu in GPUS.items():
        if all(part in name for part in key.split("-")) and 0.9 < memory / gpu.memory < 1.1:
            return key, min(memory, gpu.memory)
    return "H100", memory


class Rates(NamedTuple):
    matmul: float  # FLOP/s, over all matmuls of a step
    attention: float  # FLOP/s, forward and backward, if only causal attention is credited
    copy: float  # bytes/s, read or written


def assumed_rates(config: Config, precision: str, gpu: str = "H100", copy: float | None = None) -> Rates:
    """Rates by the data sheet. `copy`: measured bytes/s, instead of the data sheet's.

    Matmuls take their FLOPs at the rate of a large one, and the time to read and write their activations, [tokens, in]
    and [tokens, out], forward and for both gradients. So narrow models are slower.
    """
    sheet, width = GPUS[gpu], 4 if precision == "fp32" else 2
    copy = copy or COPY_REACH * sheet.copy
    large = sheet.reach * (sheet.flops_fp32 if precision == "fp32" else sheet.flops)
    flops = 6 * (config.non_embedding_parameters + config.vocab * config.hidden)  # of a token
    columns = config.layers * (8 * config.hidden + 2 * config.ffn) + config.hidden + config.vocab
    return Rates(flops / (flops / large + 3 * columns * width / copy), ATTENTION_REACH * large, copy)


def known_rates(config: Config, precision: str, gpu: str) -> tuple[Rates, dict[str, str]]:
    """Rates that bench.roofline measured last on a GPU, else assumed ones; and the file of each measured rate."""
    found = []
    for file in RESULTS.rglob("roofline*.json"):
        result = _read_roofline(file)
        if all(part in result.get("gpu", "") for part in gpu.split("-")):  # NVIDIA A100-SXM4-40GB is an A100-40GB
            found.append((result.get("date", ""), str(file.relative_to(RESULTS)), result))
    _, name, result = max(found, default=("", "", {}))
    measured = {"copy": result.get("copy_bytes_per_s")}
    if (result.get("precision", "bf16") == "fp32") == (precision == "fp32"):
        measured["matmul"] = result.get("product_flops_per_s", {}).get(config.name)
        measured["attention"] = result.get("attention_flops_per_s", {}).get(config.name)
    measured = {rate: value for rate, value in measured.items() if value}
    rates = assumed_rates(config, precision, gpu, measured.get("copy"))._replace(**measured)
    return rates, dict.fromkeys(measured, name)


def _read_roofline(file: Path) -> dict:
    """A result of bench.roofline without its null values. Raises UserError if it is damaged."""

    def is_rate(x) -> bool:
        return isinstance(x, int | float) and 0 < x < math.inf

    def is_valid(name: str, x) -> bool:
        if name in ("product_flops_per_s", "attention_flops_per_s"):  # by size
            return isinstance(x, dict) and all(map(is_rate, x.values()))
        if name in ("gpu", "date", "precision"):
            return isinstance(x, str)
        return name != "copy_bytes_per_s" or is_rate(x)

    try:
        content = json.loads(file.read_text())
        if not isinstance(content, dict):
            raise ValueError("it is not a JSON object")
        for name, x in content.items():
            if x is not None and not is_valid(name, x):
                raise ValueError(f"{name} is {x!r}")
    except (OSError, ValueError) as error:
        raise UserError(f"{file} is damaged ({error}): remove it, or run python -m bench.roofline again") from None
    return {name: x for name, x in content.items() if x is not None}


def step_seconds(job: Job, rates: Rates) -> float:
    """Seconds of compute of one step, by the formulas at the top of this file."""
    config, width, micro_steps = job.config, job.width, job.micro_steps
    tokens, table = job.micro_batch * job.seq_len, config.vocab * config.hidden
    layers, layer, hidden, ffn = config.layers, config.layer_parameters, config.hidden, config.ffn

    # A layer. `column`: seconds to read or write one number of every token. Reads and writes, forward and backward:
    # LayerNorms 6 and 5, GELU 2 and 3, rotary embedding 1 and 1, bias of q, k, v 3, row sums of attention 2.
    column = tokens * width / rates.copy
    matmul = 2 * tokens * layer / rates.matmul
    attention = 2 * tokens * job.seq_len * hidden / rates.attention
    forward = matmul + attention + (7 * hidden + 2 * ffn) * column
    recomputed = {"none": 0, "cheap": (6 * hidden + 2 * ffn) * column, "full": forward}[job.recompute]
    backward = 2 * matmul + 2.5 * attention + (11 * hidden + 3 * ffn) * column + recomputed
    # Logits are read and overwritten; the gradient of the unembedding is read and written once per chunk.
    loss = 6 * tokens * table / rates.matmul + 2 * config.vocab * column
    loss += 8 * table * math.ceil(tokens / triton_chunk(hidden)) / rates.copy

    # Bytes of passes over weights. They are cast: read and written; all_gather writes them and reads them to send, and
    # FSDP2 copies them. The norm reads gradients; AdamW reads and writes gradients, weights and two moments.
    gathered = micro_steps * (job.root + 2 * layers * layer) if job.gathers_again else config.parameters
    passes = gathered * ((4 + width) / job.parts + (4 * width if job.world_size > 1 else 0))
    passes += (4 + 4 * 8) * config.parameters / job.parts
    if micro_steps > 1:  # gradients are added to float32 sums
        passes += micro_steps * config.parameters * (8 + width if job.whole_gradients else 12 / job.parts)
    if job.world_size > 1:  # gradients are packed, received in float32, and read to send
        packed = 8 if job.whole_gradients and micro_steps > 1 else 4 + width
        passes += (packed + 8) * config.parameters * (1 if job.whole_gradients else micro_steps)
    return micro_steps * (layers * (forward + backward) + loss) + passes / rates.copy


def fastest(job: Job, gpu_memory: float, rates: Rates) -> Job | None:
    """The variant of a job that fits a GPU of so many bytes with least compute, or None.

    Estimates cannot distinguish 2%. Among those variants it is the one with the least traffic, then the least
    recomputation, then 8 rows or more in a micro-batch, then the least memory: the estimate does not count that the
    host, which queues the kernels, is slower than the GPU when a kernel has little to do.
    """
    seconds = {variant: step_seconds(variant, rates) for variant in variants(job) if fits(variant, gpu_memory)}
    recomputes = list(RECOMPUTED_ACTIVATIONS)

    def preference(job: Job) -> tuple:
        traffic = SHARDINGS.index((job.shard, job.whole_gradients)), job.micro_steps if job.gathers_again else 1
        return *traffic, recomputes.index(job.recompute), -min(job.micro_batch, 8), total_memory(job)

    near = [variant for variant in seconds if seconds[variant] <= 1.02 * min(seconds.values())]
    return min(near, key=preference, default=None)


def decide(job: Job, recorded: int, gpu: str, gpu_memory: float) -> tuple[Job, str]:
    """The variant of a job that a run takes on GPUs of so many bytes: the fastest that fits. And a note if none fits.

    recorded: the micro-batch of the run so far, or 0. The run keeps it as long as it fits, because another one changes
    the last bits. With --bitwise the run keeps it in any case.

    Raises UserError if something is left open and even the variant of the least memory exceeds that of the GPU. A job
    that leaves nothing open is never refused: the estimate may be wrong.
    """
    rates, _ = known_rates(job.config, job.precision, gpu)
    kept = replace(job, micro_batch=job.micro_batch or recorded)
    if best := fastest(kept, gpu_memory, rates) or (not job.bitwise and fastest(job, gpu_memory, rates)):
        return best, ""
    least = min(variants(kept if job.bitwise else job), key=total_memory)
    needs = f"{least.flags} needs {total_memory(least) / 1e9:.1f} GB a rank by estimate"
    is_open = not job.micro_batch or "auto" in (job.recompute, job.shard)
    if is_open and total_memory(least) > gpu_memory:
        raise UserError(
            f"{job.config.name} does not fit: {needs}, a GPU has {gpu_memory / 1e9:.1f}; use more GPUs (--plan says how"
            " many), or give these three flags to try it"
        )
    return least, f"{needs}, more than the {USABLE * gpu_memory / 1e9:.1f} GB that fit: the run may end without memory"
