"""What a run will cost, computed from the table of sizes alone: nothing is allocated."""

import torch

from kernels.cross_entropy import CHUNK, TRITON_CHUNK
from model import Config

# Dense bf16 FLOP/s by the makers' datasheets, by a part of the name that CUDA reports.
PEAK_FLOPS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "4090": 165e12, "3090": 71e12}

# Tensors [tokens, hidden] that a layer keeps for its backward pass, by --recompute (measured: 17.3-19.6, 11.2, 2.9).
ACTIVATION_UNITS = {"none": 20, "cheap": 12, "full": 3}

ASSUMED_MFU = 0.4


def peak_flops(device: torch.device) -> float | None:
    """Datasheet bf16 FLOP/s of a device, or None when it is not in the table."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return next((flops for known, flops in PEAK_FLOPS.items() if known in name), None)


def memory(config: Config, micro_batch: int, seq_len: int, precision: str, recompute: str) -> dict[str, float]:
    """Bytes that one process needs, by what they hold."""
    width = 4 if precision == "fp32" else 2
    tokens = micro_batch * seq_len
    largest = max(config.layer_parameters, config.vocab * config.hidden)
    layer = tokens * config.hidden * width
    chunk = min(tokens, CHUNK if precision == "fp32" else TRITON_CHUNK)  # float32 is for CPUs
    return {
        "weights (fp32)": 4 * config.parameters,
        "gradients (fp32)": 4 * config.parameters,
        "Adam moments (fp32)": 8 * config.parameters,
        "activations": (config.layers * ACTIVATION_UNITS[recompute] + ACTIVATION_UNITS["none"]) * layer,
        "loss, one chunk": chunk * config.vocab * width + 4 * config.vocab * config.hidden,
        "half-precision copies": 0 if width == 4 else 2 * largest,
    }


def plan(config: Config, steps: int, batch: int, micro_batch: int, seq_len: int, precision: str, recompute: str) -> str:
    """The plan of a run as a text for people: parameters, FLOPs, memory, and days on some GPUs."""
    tokens = steps * batch * seq_len
    flops, causal = config.flops_per_token(seq_len), config.flops_per_token(seq_len, causal=True)
    lines = [
        f"Pythia {config.name}: {config.layers} layers, hidden {config.hidden}, {config.heads} heads of "
        f"{config.head_dim} ({config.rotary_dim} rotary), vocabulary {config.vocab:,}",
        f"  parameters      {config.parameters:>18,}   ({config.non_embedding_parameters:,} without embeddings)",
        f"  learning rate   {config.lr:>18g}   (floor {config.lr / 10:g}), initialisation {config.init}",
        f"  published in    {config.precision:>18}   " + (f"the paper says: {config.paper}" if config.paper else ""),
        f"  tokens          {tokens:>18,}   {steps:,} steps of {batch:,} rows of {seq_len:,}",
        f"  FLOPs per token {flops / 1e9:>17.3f}G   ({causal / 1e9:.3f}G when only causal attention is credited)",
        f"  FLOPs           {flops * tokens:>18.3g}",
        "",
        f"Memory of one process, micro-batch {micro_batch} x {seq_len}, {precision}, recompute {recompute} (estimated)",
    ]
    parts = memory(config, micro_batch, seq_len, precision, recompute)
    lines += [f"  {name:<24}{size / 1e9:>10.2f} GB" for name, size in parts.items()]
    lines += [f"  {'together':<24}{sum(parts.values()) / 1e9:>10.2f} GB", ""]
    lines += [f"Time at {ASSUMED_MFU:.0%} of the datasheet's bf16 peak (an assumption, not a measurement)"]
    lines += [f"  {'':<12}{'tokens/s on one':>18}{'days on one':>14}{'days on 8':>12}"]
    for name, peak in PEAK_FLOPS.items():
        rate = ASSUMED_MFU * peak / flops
        days = tokens / rate / 86400
        lines.append(f"  {name:<12}{rate:>18,.0f}{days:>14,.1f}{days / 8:>12,.1f}")
    return "\n".join(lines)
