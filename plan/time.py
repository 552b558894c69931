"""How long a step takes on so many GPUs: a model of its time, by which plan.py puts settings in order.

It starts from rates (FLOP/s, bytes/s): measured ones where `python -m bench.roofline` has left some for the GPU, else
its data sheet times what such GPUs are assumed to reach. A step takes, in seconds,

    step     = compute + exposed

    compute  = micro_steps (layers (forward + backward) + loss) + passes over weights, gradients and Adam's moments
    forward  = 2 tokens weights / product  +  2 tokens seq_len hidden / attention  +  bytes / copy     of a layer
    backward = twice the first, five halves of the second, other bytes, and what is recomputed

`exposed` is the communication that no compute hides. While a layer computes, FSDP2 fetches the weights of the next and
adds up the gradients of the one before. With g and r, the seconds to gather and to reduce a layer, and G and R of the
embedding and unembedding,

    forward pass  = G + g + (layers - 1) max(0, g - forward)             if weights must be fetched
    backward pass = g + (layers - 1) max(0, g + r - backward) + r + R    g if they are fetched again, r and R if
                                                                         gradients travel after this micro-step

where what comes first and what goes last wait for nothing to hide behind, nor does the optimizer hide anything. Who
fetches and sends what, and when, is told in parallel.py. Collectives of n ranks are rings, as NCCL makes them,

    gather, reduce-scatter  = (n - 1) / n bytes / slowest link  +  one hop for each of the n - 1 that follow
    all-reduce              = 2 (n - 1) / n bytes / slowest link  +  hops up and down a tree of nodes, chains in each

that pass every byte into and out of each node once; rings that run side by side share a node's network.

Forward and backward take at least as long as the host needs to queue them. Left out: that train.py makes a CUDA graph
of a small model on one GPU, which spares that; reading data, saving, ranks that wait for a slow one, and what
communication takes from compute but for its reads and writes of memory.
"""

import json
import math
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from kernels.cross_entropy import TRITON_CHUNK
from model import Config
from runtime.errors import UserError

RESULTS = Path(__file__).parent / "bench" / "results"


# Rates


class GPU(NamedTuple):
    """What the maker's data sheets say, and below `reach` what is assumed."""

    flops: float  # dense FLOP/s in bf16
    flops_fp32: float
    memory: float  # bytes, as sold
    copy: float  # bytes/s of its memory
    link: float  # bytes/s to, and as many from, GPUs of the node
    network: float  # bytes/s into, and out of, a node
    reach: float  # assumed: share of `flops` in large products; power or the library is the limit


# Networks are not a GPU's own: 8 adapters of 400 Gb/s in a DGX H100 and 8 of 200 in a DGX A100, 4 of 100 in Amazon's
# nodes of A100-40GB, and one of 200 where GPUs sit on PCIe 4.
GPUS = {
    "H200": GPU(989e12, 67e12, 141e9, 4.8e12, 450e9, 400e9, 0.68),
    "H100": GPU(989e12, 67e12, 80e9, 3.35e12, 450e9, 400e9, 0.68),
    "A100-80GB": GPU(312e12, 19.5e12, 80e9, 2.04e12, 300e9, 200e9, 0.85),
    "A100-40GB": GPU(312e12, 19.5e12, 40e9, 1.555e12, 300e9, 50e9, 0.85),
    "L40S": GPU(362e12, 91.6e12, 48e9, 864e9, 32e9, 25e9, 0.68),
    "4090": GPU(165e12, 82.6e12, 24e9, 1008e9, 32e9, 25e9, 0.85),
    "3090": GPU(71e12, 35.6e12, 24e9, 936e9, 32e9, 25e9, 0.85),
}
NODE = 8  # GPUs of a node of a machine that is only planned

# Assumed of all GPUs
ATTENTION_REACH = 0.5  # of the rate of products, when only causal attention is credited
COPY_REACH = 0.85  # of the data sheet
LINK_REACH = 0.8  # links and network: what NCCL gets of them
QUEUE = 0.2e-3  # seconds of the host to queue a layer's forward pass, by Python and FSDP2; a backward pass takes two
LINK_HOP, NETWORK_HOP = 3.4e-6, 14e-6  # seconds; those that NCCL itself assumes when it chooses an algorithm


class Rates(NamedTuple):
    product: float  # FLOP/s, over all products of a step
    attention: float  # FLOP/s, forward and backward, when only causal attention is credited
    copy: float  # bytes/s, read or written
    link: float  # bytes/s, each way
    network: float  # bytes/s of a node, each way


def assumed(config: Config, precision: str, gpu: str = "H100", copy: float | None = None) -> Rates:
    """Rates by the data sheet, and the bandwidth of copies if it is known better.

    A product takes its FLOPs at the rate of a large one, and besides as long as it takes to read and write its
    activations: [tokens, in] and [tokens, out], forward and for both gradients. So narrow models are slower.
    """
    sheet, width = GPUS[gpu], _width(precision)
    copy = copy or COPY_REACH * sheet.copy
    large = sheet.reach * (sheet.flops_fp32 if precision == "fp32" else sheet.flops)
    flops = 6 * (config.non_embedding_parameters + config.vocab * config.hidden)  # of a token
    columns = config.layers * (8 * config.hidden + 2 * config.ffn) + config.hidden + config.vocab
    product = flops / (flops / large + 3 * columns * width / copy)
    return Rates(product, ATTENTION_REACH * large, copy, LINK_REACH * sheet.link, LINK_REACH * sheet.network)


def known_rates(config: Config, precision: str, gpu: str) -> tuple[Rates, dict[str, str]]:
    """Measured rates of a GPU and a model, or else assumed ones; and from which file each measured one is, by name.

    Raises UserError on a damaged file.
    """
    content, file = newest_roofline(gpu, RESULTS)
    measured = {"copy": content.get("copy_bytes_per_s")}
    if (content.get("precision", "bf16") == "fp32") == (precision == "fp32"):
        measured["product"] = content.get("product_flops_per_s", {}).get(config.name)
        measured["attention"] = content.get("attention_flops_per_s", {}).get(config.name)
    measured = {name: rate for name, rate in measured.items() if rate}
    rates = assumed(config, precision, gpu, measured.get("copy"))._replace(**measured)
    return rates, dict.fromkeys(measured, file)


@lru_cache
def newest_roofline(gpu: str, folder: Path) -> tuple[dict, str]:
    """What bench.roofline measured last on such a GPU, and the name of the file; nothing if there is none.

    The last is that of the latest "date", since a checkout of git keeps no times of files. Raises UserError on a
    damaged file.
    """
    found = []
    for file in sorted(folder.rglob("roofline*.json")):
        content = _read_roofline(file)
        name = content.get("gpu", "")
        if all(part in name for part in gpu.split("-")):  # NVIDIA A100-SXM4-40GB is an A100-40GB
            found.append((content.get("date", ""), str(file.relative_to(folder)), content))
    _, name, content = max(found, default=("", "", {}), key=lambda entry: entry[:2])
    return content, name


def _read_roofline(file: Path) -> dict:
    """A result of bench.roofline without what is null. Raises UserError when it can not be one."""

    def rate(x) -> bool:
        return isinstance(x, int | float) and 0 < x < math.inf

    def rates_of_sizes(x) -> bool:
        return isinstance(x, dict) and all(map(rate, x.values()))

    forms = {
        "gpu": lambda x: isinstance(x, str),
        "date": lambda x: isinstance(x, str),
        "precision": lambda x: isinstance(x, str),
        "copy_bytes_per_s": rate,
        "product_flops_per_s": rates_of_sizes,
        "attention_flops_per_s": rates_of_sizes,
    }
    wrong = "it is no object"
    try:
        content = json.loads(file.read_text())
        if isinstance(content, dict):
            content = {key: value for key, value in content.items() if value is not None}
            wrong = next(
                (f"{key} is {content[key]!r}" for key in forms if key in content and not forms[key](content[key])), ""
            )
    except (OSError, ValueError) as error:
        wrong = str(error)
    if wrong:
        raise UserError(f"{file} is damaged ({wrong}): remove it, or measure again with python -m bench.roofline")
    return content


# Communication


class Group(NamedTuple):
    """Dist that exchange something."""

    ranks: int
    nodes: int  # over which they are spread
    beside: int  # such groups of the same nodes, which exchange theirs at the same time


def parts_of(shard: str, world: int, node: int) -> int:
    """Among how many ranks weights, gradients and moments are divided."""
    return {"none": 1, "hybrid": min(node, world)}.get(shard, world)


def groups(shard: str, world: int, node: int) -> tuple[Group, Group]:
    """The ranks among which weights are divided, and those that hold the same part of them."""
    parts, node = parts_of(shard, world, node), min(node, world)
    together = min(parts, node)  # ranks of a node that hold different parts
    copies = world // parts
    return (
        Group(parts, -(-parts // node), node // together),
        Group(copies, -(-copies * together // node), together),
    )


def ring(size: float, group: Group, rates: Rates) -> float:
    """Seconds until all have gathered `size` bytes, of which each had its part; or have added up and divided them."""
    if group.ranks == 1:
        return 0.0
    hops = (group.ranks - group.nodes) * LINK_HOP + (group.nodes - 1) * NETWORK_HOP
    return _traffic(size, group, rates) + hops


def all_reduce(size: float, group: Group, rates: Rates) -> float:
    """Seconds until all have the sum of their `size` bytes."""
    if group.ranks == 1:
        return 0.0
    chain = group.ranks / group.nodes - 1
    hops = chain * LINK_HOP + math.ceil(math.log2(group.nodes)) * NETWORK_HOP
    return 2 * (_traffic(size, group, rates) + hops)


def _traffic(size: float, group: Group, rates: Rates) -> float:
    slowest = rates.link if group.nodes == 1 else min(rates.link, rates.network / group.beside)
    return (group.ranks - 1) / group.ranks * size / slowest


# The step


class StepTime(NamedTuple):
    """Seconds of a step."""

    compute: float
    exposed: float  # communication that no compute hides

    @property
    def total(self) -> float:
        return self.compute + self.exposed


def step_time(
    config: Config,
    rates: Rates,
    micro_batch: int,
    seq_len: int,
    precision: str,
    recompute: str,
    shard: str = "none",
    world: int = 1,
    node: int = NODE,
    micro_steps: int = 1,
    whole_gradients: bool = True,
) -> StepTime:
    """The seconds of a step of `world` ranks, nodes of `node`, each with `micro_steps` micro-batches.

    whole_gradients: those of all weights are added up on every rank and travel after the last micro-step, not after
    each. The formulas stand at the top of this file.
    """
    width, tokens = _width(precision), micro_batch * seq_len
    layers, hidden, ffn, table = config.layers, config.hidden, config.ffn, config.vocab * config.hidden
    block = config.layer_parameters
    root = config.parameters - layers * block  # embedding, unembedding, final norm: FSDP's last group
    ranks, parts = world > 1, parts_of(shard, world, node)

    # A layer. `column`: to read or write one number of every token. Reads and writes are, forward and backward, 6 and 5
    # of LayerNorms, 2 and 3 of GELU, 1 of rotary embedding, 3 of the bias of q, k, v, 2 of attention's row sums.
    product = 2 * tokens * block / rates.product
    attention = 2 * tokens * seq_len * hidden / rates.attention
    column = tokens * width / rates.copy
    forward = product + attention + (7 * hidden + 2 * ffn) * column
    again = {"none": 0.0, "cheap": (6 * hidden + 2 * ffn) * column, "full": forward}[recompute]
    backward = 2 * product + 2.5 * attention + (10 * hidden + 3 * ffn) * column + again
    forward, backward = max(forward, QUEUE), max(backward, (2 if recompute == "none" else 3) * QUEUE)
    # Logits are read and overwritten; the gradient of the unembedding is read and written once a chunk.
    loss = 6 * tokens * table / rates.product + 2 * config.vocab * column
    loss += 8 * table * math.ceil(tokens / TRITON_CHUNK) / rates.copy

    # Passes over weights, in bytes. A process alone rounds them once a step. If fetched, they are rounded, come in, are
    # sent on, and are unpacked. Gradients are added up in float32; to travel they are packed, come in, and are sent on.
    fetched_anew = shard in ("full", "hybrid")
    gathers = micro_steps if fetched_anew else 1  # and those of layers once more, in the backward pass
    reductions = 1 if whole_gradients else micro_steps
    fetched = gathers * (root + (1 + fetched_anew) * layers * block)
    passes = fetched * ((4 + width) / parts + 4 * width * ranks)
    if micro_steps > 1:
        passes += micro_steps * config.parameters * (8 + width if whole_gradients else 12 / parts)
    packing = 8 if whole_gradients and micro_steps > 1 else 4 + width
    passes += (packing + 8) * config.parameters * reductions * ranks
    passes += 36 * config.parameters / parts  # the norm reads gradients; AdamW reads and writes these, weights, moments
    compute = micro_steps * (layers * (forward + backward) + loss) + passes / rates.copy

    divided, same = groups(shard, world, node)

    def reduce(parameters: int) -> float:
        return ring(4 * parameters, divided, rates) + all_reduce(4 * parameters / parts, same, rates)

    gather_root, gather = (ring(width * parameters, divided, rates) for parameters in (root, block))
    reduce_root, reduce_layer = reduce(root), reduce(block)
    exposed = gathers * (gather_root + gather + (layers - 1) * max(0, gather - forward))
    gather *= fetched_anew
    exposed += reductions * (
        gather + (layers - 1) * max(0, gather + reduce_layer - backward) + reduce_layer + reduce_root
    )
    exposed += (micro_steps - reductions) * (gather + (layers - 1) * max(0, gather - backward))
    return StepTime(compute, exposed)


def _width(precision: str) -> int:
    """Bytes of an activation."""
    return 4 if precision == "fp32" else 2


# What there is to compare with: Pythia's own runs. GPUs, all A100-40GB, by the published configurations, and the hours
# of all together by the paper (Biderman et al. 2023, arXiv:2304.01373, appendix), which has none for 14m and 31m.
PYTHIA = {
    "70m": (32, 510),
    "160m": (32, 1_030),
    "410m": (32, 2_540),
    "1b": (64, 4_830),
    "1.4b": (64, 7_120),
    "2.8b": (64, 14_240),
    "6.9b": (128, 33_500),
    "12b": (256, 72_300),
}
PYTHIA_STEPS, PYTHIA_BATCH = 143_000, 1024
