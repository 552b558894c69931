"""What a run will cost, and the setting that suits a machine, from the table of sizes alone: nothing is allocated.

Memory is counted tensor by tensor: the formulas give what was found alive in the steps of a model, on 1 to 16 ranks
(tests/test_plan.py). Times are estimates by the model of scaling.py, good for putting settings in order.
"""

import math
import os
import re
from itertools import product
from typing import NamedTuple

import torch

from kernels.cross_entropy import TRITON_CHUNK
from model import SIZES, Config
from plan import time as scaling
from plan.time import GPU, GPUS, NODE, PYTHIA, PYTHIA_BATCH, PYTHIA_STEPS, Rates, StepTime, parts_of
from runtime.errors import UserError

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
    parts, ranks, several = parts_of(shard, world, node), world > 1, micro_steps > 1
    own = 4 * config.parameters / parts  # bytes of float32 weights, or gradients, of a rank
    kept = KEPT[recompute] * unit

    keeps = shard in ("none", "grad")  # the weights of all layers, once they are here
    if ranks:
        cast = width * (config.parameters if keeps else root + 2 * block)  # this layer and the next; FSDP always copies
    else:
        cast = 0 if width == 4 else width * block * config.layers
    activations = config.layers * kept
    earlier = 0  # gradients that are there when a backward pass starts
    if several:
        earlier = own if ranks and not whole_gradients else 4 * config.parameters

    # In the loss: forward a chunk of logits, what the last layer hands on and its norm, the gradients of unembedding
    # and input, and FSDP's buffer of the last layer; backward these gradients, and both once more, scaled.
    chunk = min(tokens, TRITON_CHUNK) * config.vocab * width
    loss = max(chunk + 6 * table + 5 * unit + width * block * (ranks and keeps), 8 * table + 3 * unit)

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
    stay = not ranks or (keeps and several and not whole_gradients)  # until the next micro-step
    moments = (  # gradients, weights cast, activations, work space
        (earlier, cast, activations, loss),
        (earlier, cast, activations, layer),
        (almost_all, cast if stay else min(cast, width * (root + block)), kept, layer),
        (own, cast * stay, 0, end),
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


# Settings, in the order of their times

MICRO_BATCHES = (1, 2, 4, 8, 16, 32)


class Setting(NamedTuple):
    shard: str
    recompute: str
    micro_batch: int
    whole_gradients: bool
    bytes: float  # that a rank needs
    time: StepTime  # of a step

    @property
    def flags(self) -> str:
        return f"--shard {self.shard} --recompute {self.recompute} --micro-batch {self.micro_batch}"


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
    rates: Rates | None = None,
) -> list[Setting]:
    """The settings that so many ranks can choose from, the fastest first. Micro-batches must divide a rank's rows.

    shards: if none are given, those that differ: a process alone shards nothing, and nodes take several to be hybrid.
    rates: of the GPU; by default those of an H100's data sheet. Other GPUs put settings in nearly the same order.
    """
    if not shards:
        shards = ("none",) if world == 1 else tuple(s for s in SHARDS if s != "hybrid" or world > node)
    rates = rates or scaling.assumed(config, precision)
    found = []
    for shard, recompute, micro_batch in product(shards, recomputes, micro_batches):
        micro_steps, rest = divmod(batch, world * micro_batch)
        if rest:
            continue
        for whole in (True, False) if shard != "none" and micro_steps > 1 else (True,):
            args = micro_batch, seq_len, precision, recompute, shard, world, node, micro_steps, whole
            size, time = sum(memory(config, *args).values()), scaling.step_time(config, rates, *args)
            found.append(Setting(shard, recompute, micro_batch, whole, size, time))
    return sorted(found, key=lambda setting: setting.time.total)


def fastest(
    config: Config,
    gpu_memory: float,
    world: int,
    batch: int,
    seq_len: int,
    precision: str,
    node: int = NODE,
    rates: Rates | None = None,
) -> Setting | None:
    """The fastest setting that fits a GPU of so many bytes, or None. Of those within 2% of it, which an estimate does
    not tell apart, the one that recomputes least and then needs least memory."""
    found = settings(config, world, batch, seq_len, precision, node, rates=rates)
    fit = [setting for setting in found if setting.bytes <= USABLE * gpu_memory]
    near = [setting for setting in fit if setting.time.total <= 1.02 * fit[0].time.total]
    return min(near, key=lambda setting: (list(KEPT).index(setting.recompute), setting.bytes), default=None)


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
    rates: Rates | None = None,
) -> Setting:
    """The fastest way to divide weights that fits, when the rest is settled; if none fits, that of least memory.

    shards: to choose from, if not all. Batch must be a multiple of world * micro_batch. Dist that choose for
    themselves must give the same rates to choose alike; the default asks neither GPU nor disk.
    """
    found = settings(config, world, batch, seq_len, precision, node, shards, (recompute,), (micro_batch,), rates)
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
    ]
    job = batch, seq_len, precision
    lines += ["", *_memory_of_flags(config, machine, *job, micro_batch, recompute, shard)]
    lines += ["", *_memory_table(config, machine, *job), "", *_suggestion(config, machine, *job)]
    lines += ["", *_rates(config, machine, precision), "", *_scaling(config, machine, steps, *job)]
    return "\n".join([*lines, "", *_sizes(machine, steps, *job)])


def _best(config: Config, machine: Machine, batch: int, seq_len: int, precision: str) -> Setting | None:
    """The fastest setting that fits a machine, by what is known of its GPU."""
    rates, _ = scaling.known_rates(config, precision, machine.name)
    job = machine.world, batch, seq_len, precision, machine.node
    return fastest(config, machine.gpu.memory, *job, rates)


def _of(world: int, machine: Machine) -> Machine:
    """A machine of so many of the same GPUs."""
    return Machine(machine.name, world, min(world, NODE))


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
    shards = () if shard == "auto" else (shard,)  # auto: as train.py chooses, which does not ask for rates
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
    rates, _ = scaling.known_rates(config, precision, machine.name)
    found = settings(config, machine.world, batch, seq_len, precision, machine.node, rates=rates)
    needs: dict[tuple, float] = {}  # by what the user chooses
    for setting in found:  # gradients whole or in parts: the fastest that fits, or else that of least memory
        if (known := needs.get(setting[:3], math.inf)) > machine.usable:
            needs[setting[:3]] = min(known, setting.bytes)
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
    if best := _best(config, machine, batch, seq_len, precision):
        return [
            f"The fastest that fits, by estimate: {best.bytes / 1e9:.1f} GB a rank. Add your other flags.",
            f"  {machine.launcher} train.py --size {config.name} {best.flags}",
        ]
    for larger in (_of(2**i, machine) for i in range(11)):
        if batch % larger.world == 0 and _best(config, larger, batch, seq_len, precision):
            return [f"Nothing fits {machine}. The smallest that does is {larger}"]
    return [f"Nothing fits {machine}, nor any larger machine of these GPUs"]


def _rates(config: Config, machine: Machine, precision: str) -> list[str]:
    """What the times below rest on."""
    rates, files = scaling.known_rates(config, precision, machine.name)
    sheet, reach = machine.gpu, scaling.LINK_REACH
    peak = sheet.flops_fp32 if precision == "fp32" else sheet.flops
    rows = {
        "product": (
            f"products {rates.product / 1e12:.0f} TFLOP/s",
            f"{sheet.reach:.0%} of {peak / 1e12:g}, less for narrow ones",
        ),
        "attention": (
            f"attention {rates.attention / 1e12:.0f} TFLOP/s",
            f"{scaling.ATTENTION_REACH:.0%} of large products",
        ),
        "copy": (f"memory {rates.copy / 1e12:.2f} TB/s", f"{scaling.COPY_REACH:.0%} of {sheet.copy / 1e12:.3g}"),
        "link": (
            f"within a node {rates.link / 1e9:.0f} GB/s",
            f"{reach:.0%} of {sheet.link / 1e9:.0f} of a GPU, each way",
        ),
        "network": (
            f"between nodes {rates.network / 1e9:.0f} GB/s",
            f"{reach:.0%} of {sheet.network / 1e9:.0f} of a node, each way",
        ),
        "host": (f"a layer queued in {1e3 * scaling.QUEUE:g} ms", "by the host; twice that backward"),
    }
    lines = [f"Times are estimated by scaling.py from these rates of {config.name} on {machine.name}, {precision}"]
    for name, (rate, share) in rows.items():
        source = f"measured (bench/results/{files[name]})" if name in files else f"assumed: {share}"
        lines.append(f"  {rate:<32}{source}")
    return lines


def _scaling(config: Config, machine: Machine, steps: int, batch: int, seq_len: int, precision: str) -> list[str]:
    """The fastest setting on ever more of the same GPUs."""
    lines = [
        f"Scaling of {config.name} on nodes of {NODE} {machine.name}: the fastest that fits (estimated); exposed: "
        "communication that nothing hides",
        f"  {'GPUs':>4}  {'--shard':<9}{'--recompute':<13}{'--micro-batch':<15}{'compute ms':>10}{'exposed ms':>12}"
        f"{'tokens/s':>13}{'MFU':>6}{'efficiency':>12}{'days':>9}{'GPU-hours':>12}",
    ]
    fewest = None  # tokens/s of a GPU where there are fewest
    for more in (_of(NODE * 2**i, machine) for i in range(7)):
        if batch % more.world:
            continue
        best = _best(config, more, batch, seq_len, precision)
        if not best:
            lines.append(f"  {more.world:>4}  nothing fits")
            continue
        rate = batch * seq_len / best.time.total
        fewest = fewest or rate / more.world
        mfu = rate / more.world * config.flops_per_token(seq_len) / machine.gpu.flops
        days = steps * best.time.total / 86400
        lines.append(
            f"  {more.world:>4}  {best.shard:<9}{best.recompute:<13}{best.micro_batch:<15}"
            f"{1e3 * best.time.compute:>10,.1f}{1e3 * best.time.exposed:>12,.1f}{rate:>13,.0f}{mfu:>6.0%}"
            f"{rate / more.world / fewest:>12.0%}{days:>9,.2f}{24 * days * more.world:>12,.0f}"
        )
    return lines if len(lines) > 2 else [lines[0], f"  the {batch} rows of a batch do not divide among nodes of {NODE}"]


def _sizes(machine: Machine, steps: int, batch: int, seq_len: int, precision: str) -> list[str]:
    """All sizes on the machine, and the hours of Pythia's own runs beside what the model of scaling.py says of them."""
    lines = [
        f"All sizes on {machine}: the fastest that fits (estimated); and Pythia's own runs, in A100-40GB hours",
        f"  {'--size':<8}{'--shard':<9}{'--recompute':<13}{'--micro-batch':<15}{'GB a rank':>9}{'days':>9}"
        f"{'GPU-hours':>12}{'Pythia: GPUs':>16}{'published':>11}{'estimated':>11}",
    ]
    for name, config in SIZES.items():
        line = f"  {name:<8}nothing fits"
        if best := _best(config, machine, batch, seq_len, precision):
            days = steps * best.time.total / 86400
            line = f"  {name:<8}{best.shard:<9}{best.recompute:<13}{best.micro_batch:<15}{best.bytes / 1e9:>9.1f}"
            line += f"{days:>9,.2f}{24 * days * machine.world:>12,.0f}"
        if name in PYTHIA:
            gpus, hours = PYTHIA[name]
            line = f"{line:<75}{gpus:>16}{hours:>11,}{_pythia_hours(config):>11,.0f}"
        lines.append(line)
    shares = sorted(PYTHIA_STEPS * _ideal_seconds(SIZES[name]) / 3600 / hours for name, (_, hours) in PYTHIA.items())
    lines.append(
        f"  Published: arXiv:2304.01373; {shares[0]:.0%} to {shares[-1]:.0%} of the peak, with all layers recomputed: "
        "the estimates should be lower."
    )
    if measured := [n for n in SIZES if "product" in scaling.known_rates(SIZES[n], precision, machine.name)[1]]:
        lines.append(f"  On {machine}, products were measured for {', '.join(measured)}, and assumed for the others")
    return lines


def _ideal_seconds(config: Config) -> float:
    """Of a step of Pythia's on one A100 that did nothing but its FLOPs, at the peak."""
    return PYTHIA_BATCH * config.seq_len * config.flops_per_token() / GPUS["A100-40GB"].flops


def _pythia_hours(config: Config) -> float:
    """A100-40GB hours that a size would take on as many of them as Pythia had, by data sheet, at its fastest."""
    gpus, _ = PYTHIA[config.name]
    rates, job = scaling.assumed(config, "bf16", "A100-40GB"), (PYTHIA_BATCH, config.seq_len, "bf16")
    best = fastest(config, GPUS["A100-40GB"].memory, gpus, *job, rates=rates)
    return PYTHIA_STEPS * best.time.total * gpus / 3600
