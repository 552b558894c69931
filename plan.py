"""What a run will cost, and the setting that suits a machine, from the table of sizes alone: nothing is allocated.

Memory is counted tensor by tensor: the formulas give what was found alive in the steps of a model, on 1 to 16 ranks
(tests/test_plan.py). Times are estimates from data sheets, good for putting settings in order.
"""

import math
import os
import re
from itertools import product
from typing import NamedTuple

import torch

from errors import UserError
from kernels.cross_entropy import TRITON_CHUNK
from model import SIZES, Config


class GPU(NamedTuple):
    flops: float  # dense bf16 FLOP/s by the maker's data sheet
    memory: float  # bytes, as sold


GPUS = {
    "H200": GPU(989e12, 141e9),
    "H100": GPU(989e12, 80e9),
    "A100-80GB": GPU(312e12, 80e9),
    "A100-40GB": GPU(312e12, 40e9),
    "L40S": GPU(362e12, 48e9),
    "4090": GPU(165e12, 24e9),
    "3090": GPU(71e12, 24e9),
}
NODE = 8  # GPUs of a node of a machine that is only planned
USABLE = 0.92  # of a GPU's memory: the rest is for CUDA, the network's buffers, and gaps between tensors


def peak_flops(device: torch.device) -> float | None:
    """Datasheet bf16 FLOP/s of a device, or None when it is not in the table."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return next((gpu.flops for known, gpu in GPUS.items() if known.split("-")[0] in name), None)


class Machine(NamedTuple):
    name: str  # of the GPU
    world: int  # GPUs, and so ranks
    node: int  # GPUs of a node

    def __str__(self) -> str:
        return f"{self.world}x{self.name}"

    @property
    def gpu(self) -> GPU:
        return GPUS[self.name]

    @property
    def usable(self) -> float:
        """Bytes of a GPU that a plan may fill."""
        return USABLE * self.gpu.memory

    @property
    def launcher(self) -> str:
        """The command that starts a program on all its GPUs."""
        nodes = f" --nnodes {self.world // self.node} --rdzv-backend c10d --rdzv-endpoint FIRST_NODE \\\n   "
        return f"torchrun --nproc-per-node {self.node}" + nodes * (self.world > self.node)


def parse_machine(text: str, batch: int) -> Machine:
    """The machine that is named, such as 16xA100-40GB. Unnamed, H100s: as many as torchrun started ranks, or else 8.

    Raises UserError when the GPU is unknown, when the number neither fits on a node of 8 nor fills several, or when the
    rows of a batch do not divide among them.
    """
    if text:
        match = re.fullmatch(r"([1-9][0-9]{0,4})x(.+)", text)
        if not match or match[2] not in GPUS:
            raise UserError(f"--plan-for {text}: it takes a number and one of {', '.join(GPUS)}, such as 16xA100-40GB")
        machine = Machine(match[2], int(match[1]), min(int(match[1]), NODE))
    else:
        world = int(os.environ.get("WORLD_SIZE", math.gcd(8, batch)))
        machine = Machine("H100", world, int(os.environ.get("LOCAL_WORLD_SIZE", min(world, NODE))))
    if machine.world % machine.node:
        raise UserError(f"--plan-for {text}: more than {NODE} GPUs are whole nodes of {NODE}")
    if batch % machine.world:
        raise UserError(f"--plan-for {machine}: --batch-size {batch} does not divide among {machine.world} ranks")
    return machine


# Memory

# Tensors [tokens, hidden] that a layer keeps for its backward pass, by --recompute, and that it then forms again.
#   none: the sum that is normalised, its two norms, q, k and v, attention, and 4 + 4 before and after GELU
#   cheap: the sum, and the results of products and attention;    full: the summands that come in
KEPT = {"none": 15, "cheap": 11, "full": 3}
FORMED_AGAIN = {"none": 0, "cheap": 7, "full": 12}

# Who divides what: parallel.py. In the order of the least traffic.
SHARDS = ("grad", "none", "hybrid", "full")


def _parts(shard: str, world: int, node: int) -> int:
    """Among how many ranks weights, gradients and moments are divided."""
    return {"none": 1, "hybrid": min(node, world)}.get(shard, world)


def memory(
    config: Config,
    micro_batch: int,
    seq_len: int,
    precision: str,
    recompute: str,
    shard: str = "none",
    world: int = 1,
    node: int = NODE,
    micro_steps: int = 1,
    whole_gradients: bool = True,
) -> dict[str, float]:
    """Bytes that a rank needs at the worst moment of a step, by what they hold.

    whole_gradients: gradients of all weights are added up on every rank and travel after the last micro-step, not after
    each. As tensors are counted, not pages or an allocator's blocks, a process needs some percent more.
    """
    width = 4 if precision == "fp32" else 2  # bytes of an activation
    tokens = micro_batch * seq_len
    unit = tokens * config.hidden * width  # a tensor [tokens, hidden]
    block, table = config.layer_parameters, config.vocab * config.hidden
    root = config.parameters - config.layers * block  # embedding, unembedding, final norm: FSDP's last group
    parts, ranks, several = _parts(shard, world, node), world > 1, micro_steps > 1
    own = 4 * config.parameters / parts  # bytes of float32 weights, or gradients, of a rank
    kept = KEPT[recompute] * unit

    if ranks:
        resident = config.parameters if shard in ("none", "grad") else root + 2 * block  # full: this layer and the next
        cast = width * resident  # also in float32: FSDP copies
    else:
        cast = 0 if width == 4 else width * block * (config.layers if recompute == "none" else 1)  # backward reads them
    activations = config.layers * kept
    earlier = 0  # gradients that are there when a backward pass starts
    if several:
        earlier = own if ranks and not whole_gradients else 4 * config.parameters

    # In the loss: forward a chunk of logits, what the last layer hands on and its norm, and the gradients of
    # unembedding and input; backward these gradients, autograd's zeros for both, and both once more, scaled.
    chunk = min(tokens, TRITON_CHUNK) * config.vocab * width
    loss = max(chunk + 6 * table + 5 * unit, 12 * table + 4 * unit)

    # In the backward pass of a layer, the last or the first: around GELU 5 units more than are kept, and gradients.
    # FSDP holds those of a layer in half precision until it has float32 ones to send, and what comes back; copies are
    # averaged in a third.
    formed = (5 + FORMED_AGAIN[recompute]) * unit
    if ranks:
        sent = (4 + 4 / parts + 4 * (parts == 1)) * block
        layer = max(formed + width * block / 3 + max(0, 4 * block - kept), width * block + sent + 2 * unit - kept)
        layer += width * table
    else:
        layer = formed + (width if width == 4 else width + 4) * block / 3 + 4 * table * (not several)

    # At the end, of the embedding: a gradient of its own before it is added, or FSDP's three or two forms of it.
    if ranks:
        end = 8 * root if parts == 1 else (4 + (4 if several and whole_gradients else width)) * root
    else:
        end = 4 * table * several + 2 * unit

    almost_all = own - 4 * (block + root) / parts  # gradients in the backward pass of the first layer
    if ranks and several and whole_gradients:
        almost_all += 4 * (block + root)
    moments = (  # gradients, weights cast, activations, work space
        (earlier, cast, activations, loss),
        (earlier, cast, activations, layer),
        (almost_all, min(cast, width * (root * ranks + block)), kept, layer),
        (own, width * root * ranks, 0, end),
    )
    gradients, cast, activations, work = max(moments, key=sum)
    return {
        "weights (fp32)": own,
        "Adam moments (fp32)": 2 * own,
        "gradients": gradients,
        "weights as products see them": cast,
        "activations": activations,
        "work space of the worst moment": work,
    }


def snapshot_memory(config: Config, world: int) -> float:
    """Bytes of host memory that a rank holds while a checkpoint is written: its share of weights and moments."""
    return 12 * config.parameters / world


# Time

ASSUMED_MFU = 0.4  # of the peak, while products run
# What takes as long as one byte, in FLOPs: those of an H100 at that rate. Other GPUs have such ratios within a factor
# of three.
FLOPS_PER_BYTE = 150  # of the GPU's memory, at 2.7 TB/s
FLOPS_PER_LINK_BYTE = 1_300  # between GPUs of a node, at 300 GB/s
FLOPS_PER_NETWORK_BYTE = 16_000  # into or out of a node, at 25 GB/s: one adapter of 200 Gb/s
FORWARD_AGAIN = {"none": 0, "cheap": 0.1, "full": 1}  # of the layers' forward pass; cheap: what is not a product

MICRO_BATCHES = (1, 2, 4, 8, 16, 32)


class Setting(NamedTuple):
    shard: str
    recompute: str
    micro_batch: int
    whole_gradients: bool
    bytes: float  # that a rank needs

    @property
    def flags(self) -> str:
        return f"--shard {self.shard} --recompute {self.recompute} --micro-batch {self.micro_batch}"


def step_cost(
    config: Config, setting: Setting, batch: int, seq_len: int, precision: str, world: int, node: int = NODE
) -> float:
    """What a step of a rank takes, in FLOPs: those of the model, and those lost to recompute, memory and network.

    Nothing is taken to overlap. A collective among n ranks is a ring, that moves (n - 1) / n of the whole past each;
    over several nodes every one of these bytes enters and leaves each node once.
    """
    flops = config.flops_per_token(seq_len)
    layers_forward = (flops - 6 * config.vocab * config.hidden) / 3
    products = batch * seq_len / world * (flops + FORWARD_AGAIN[setting.recompute] * layers_forward)
    micro_steps = batch // (world * setting.micro_batch)
    width = 4 if precision == "fp32" else 2
    # A micro-step reads the weights and writes them cast, writes gradients, reads them, and reads and writes their sum.
    passes = micro_steps * (12 + 3 * width) * config.parameters
    parts = _parts(setting.shard, world, node)
    sums = 1 if setting.whole_gradients else micro_steps
    gathers = {"none": 0, "grad": 1}.get(setting.shard, 2 * micro_steps)
    ring = (parts - 1) / parts * (gathers * width + 4 * sums) * config.parameters
    copies = world // parts
    average = 2 * (copies - 1) / copies * 4 * sums * config.parameters / parts
    nodes = world > node
    network = FLOPS_PER_NETWORK_BYTE if nodes else FLOPS_PER_LINK_BYTE
    ring *= FLOPS_PER_LINK_BYTE if parts <= node else network
    average *= network * (parts if nodes else 1)  # all ranks of a node share its adapter
    return products + passes * FLOPS_PER_BYTE + ring + average


def settings(
    config: Config,
    world: int,
    batch: int,
    seq_len: int,
    precision: str,
    node: int = NODE,
    shards: tuple[str, ...] = (),
    recomputes: tuple[str, ...] = tuple(KEPT),
    micro_batches: tuple[int, ...] = MICRO_BATCHES,
) -> list[Setting]:
    """The settings that so many ranks can choose from, the fastest first. Micro-batches must divide a rank's rows.

    shards: if none are given, those that differ: a process alone shards nothing, and nodes take several to be hybrid.
    """
    if not shards:
        shards = ("none",) if world == 1 else tuple(s for s in SHARDS if s != "hybrid" or world > node)
    found = []
    for shard, recompute, micro_batch in product(shards, recomputes, micro_batches):
        micro_steps, rest = divmod(batch, world * micro_batch)
        if rest:
            continue
        for whole in (True, False) if shard != "none" and micro_steps > 1 else (True,):
            args = micro_batch, seq_len, precision, recompute, shard, world, node, micro_steps, whole
            found.append(Setting(shard, recompute, micro_batch, whole, sum(memory(config, *args).values())))
    return sorted(found, key=lambda setting: step_cost(config, setting, batch, seq_len, precision, world, node))


def fastest(
    config: Config, gpu_memory: float, world: int, batch: int, seq_len: int, precision: str, node: int = NODE
) -> Setting | None:
    """The fastest setting that fits a GPU of so many bytes, or None. Of those within 2% of it, which an estimate does
    not tell apart, the one that recomputes least and then needs least memory."""
    job = batch, seq_len, precision, world, node
    fit = [s for s in settings(config, world, batch, seq_len, precision, node) if s.bytes <= USABLE * gpu_memory]
    costs = [step_cost(config, setting, *job) for setting in fit]
    near = [setting for setting, cost in zip(fit, costs) if cost <= 1.02 * costs[0]]
    return min(near, key=lambda setting: (FORWARD_AGAIN[setting.recompute], setting.bytes), default=None)


def choose_shard(
    config: Config,
    gpu_memory: float,
    world: int,
    node: int,
    micro_batch: int,
    seq_len: int,
    precision: str,
    recompute: str,
    batch: int,
    shards: tuple[str, ...] = (),
) -> Setting:
    """The fastest way to divide weights that fits, when the rest is settled; if none fits, that of least memory.

    shards: to choose from, if not all. Batch must be a multiple of world * micro_batch.
    """
    found = settings(config, world, batch, seq_len, precision, node, shards, (recompute,), (micro_batch,))
    fit = (setting for setting in found if setting.bytes <= USABLE * gpu_memory)
    return next(fit, min(found, key=lambda setting: setting.bytes))


# The text


def plan(
    config: Config,
    steps: int,
    batch: int,
    micro_batch: int,
    seq_len: int,
    precision: str,
    recompute: str,
    shard: str = "auto",
    plan_for: str = "",
) -> str:
    """The plan of a run as a text for people: parameters, FLOPs, memory, days, and what to run on which machine.

    Raises UserError when the machine that `plan_for` names can not be, or can not divide the batch.
    """
    machine = parse_machine(plan_for, batch)
    tokens = steps * batch * seq_len
    flops, causal = config.flops_per_token(seq_len), config.flops_per_token(seq_len, causal=True)
    lines = [
        f"Pythia {config.name}: {config.layers} layers, hidden {config.hidden}, {config.heads} heads of "
        f"{config.head_dim} ({config.rotary_dim} rotary), vocabulary {config.vocab:,}",
        f"  parameters      {config.parameters:>18,}   ({config.non_embedding_parameters:,} without embeddings)",
        f"  learning rate   {config.lr:>18g}   (floor {config.lr / 10:g}), initialisation {config.init}",
        f"  published in    {config.precision:>18}",
        *([f"  the paper says  {config.paper}"] if config.paper else []),
        f"  tokens          {tokens:>18,}   {steps:,} steps of {batch:,} rows of {seq_len:,}",
        f"  FLOPs per token {flops / 1e9:>17.3f}G   ({causal / 1e9:.3f}G when only causal attention is credited)",
        f"  FLOPs           {flops * tokens:>18.3g}",
        "",
        f"Time at {ASSUMED_MFU:.0%} of the datasheet's bf16 peak (an assumption, not a measurement)",
        f"  {'':<12}{'tokens/s on one':>18}{'days on one':>14}{'days on 8':>12}",
    ]
    for name, gpu in GPUS.items():
        rate = ASSUMED_MFU * gpu.flops / flops
        days = tokens / rate / 86400
        lines.append(f"  {name:<12}{rate:>18,.0f}{days:>14,.1f}{days / 8:>12,.1f}")
    job = batch, seq_len, precision
    lines += ["", *_memory_of_flags(config, machine, *job, micro_batch, recompute, shard)]
    lines += ["", *_memory_table(config, machine, *job), "", *_suggestion(config, machine, *job)]
    return "\n".join([*lines, "", *_sizes(machine, steps, *job)])


def _memory_of_flags(
    config: Config,
    machine: Machine,
    batch: int,
    seq_len: int,
    precision: str,
    micro_batch: int,
    recompute: str,
    shard: str,
) -> list[str]:
    _, world, node = machine
    micro_batch = math.gcd(micro_batch, batch // world)
    shards = () if shard == "auto" else (shard,)
    chosen = choose_shard(
        config, machine.gpu.memory, world, node, micro_batch, seq_len, precision, recompute, batch, shards
    )
    micro_steps = batch // (world * micro_batch)
    args = micro_batch, seq_len, precision, recompute, chosen.shard, world, node, micro_steps, chosen.whole_gradients
    return [
        f"GB of a rank on {machine}, {precision}, {chosen.flags} (estimated)",
        *(f"  {name:<32}{size / 1e9:>8.2f}" for name, size in memory(config, *args).items()),
        f"  {'together':<32}{chosen.bytes / 1e9:>8.2f}",
        f"  {'in host memory, during a save':<32}{snapshot_memory(config, world) / 1e9:>8.2f}",
    ]


def _memory_table(config: Config, machine: Machine, batch: int, seq_len: int, precision: str) -> list[str]:
    """GB by sharding and recompute (rows), and micro-batch (columns)."""
    found = settings(config, machine.world, batch, seq_len, precision, machine.node)
    needs: dict[tuple, float] = {}  # by what the user chooses
    for shard, recompute, micro_batch, _, size in found:  # those that add up gradients in parts come later
        if needs.get((shard, recompute, micro_batch), math.inf) > machine.usable:
            needs[shard, recompute, micro_batch] = size
    lines = [
        f"GB of a rank on {machine}, {precision}; up to {machine.usable / 1e9:.1f} fit, * is more (estimated)",
        f"  {'--shard':<9}{'--recompute':<13}--micro-batch"
        + "".join(f"{n:>{4 if n == 1 else 9}}" for n in MICRO_BATCHES),
    ]
    for shard, recompute in product(SHARDS, KEPT):
        sizes = [needs.get((shard, recompute, n)) for n in MICRO_BATCHES]
        if any(sizes):
            texts = (f"{size / 1e9:.1f}{' *'[size > machine.usable]}" if size else "" for size in sizes)
            lines.append(f"  {shard:<9}{recompute:<13}{'':<8}" + "".join(f"{text:>9}" for text in texts).rstrip())
    return lines


def _suggestion(config: Config, machine: Machine, batch: int, seq_len: int, precision: str) -> list[str]:
    best = fastest(config, machine.gpu.memory, machine.world, batch, seq_len, precision, machine.node)
    if best:
        return [
            f"The fastest that fits, by estimate: {best.bytes / 1e9:.1f} GB a rank. Add your other flags.",
            f"  {machine.launcher} train.py --size {config.name} {best.flags}",
        ]
    for world in (2**i for i in range(11)):
        node = min(world, NODE)
        if batch % world == 0 and fastest(config, machine.gpu.memory, world, batch, seq_len, precision, node):
            return [f"Nothing fits {machine}. The smallest that does is {world}x{machine.name}"]
    return [f"Nothing fits {machine}, nor any larger machine of these GPUs"]


def _sizes(machine: Machine, steps: int, batch: int, seq_len: int, precision: str) -> list[str]:
    lines = [
        f"The fastest that fits {machine} (assumed: {ASSUMED_MFU:.0%} of the peak in products, 25 GB/s between nodes)",
        f"  {'--size':<8}{'--shard':<9}{'--recompute':<13}{'--micro-batch':<15}{'GB a rank':>9}{'days':>10}",
    ]
    job, ranks = (batch, seq_len, precision), (machine.world, machine.node)
    for name, config in SIZES.items():
        best = fastest(config, machine.gpu.memory, machine.world, *job, machine.node)
        if not best:
            lines.append(f"  {name:<8}nothing fits")
            continue
        days = steps * step_cost(config, best, *job, *ranks) / (ASSUMED_MFU * machine.gpu.flops) / 86400
        chosen = f"  {name:<8}{best.shard:<9}{best.recompute:<13}{best.micro_batch:<15}"
        lines.append(f"{chosen}{best.bytes / 1e9:>9.1f}{days:>10,.1f}")
    return lines
