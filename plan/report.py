"""The plan of a run as text: the model, its memory, the command that suits a machine, and the days of every size."""

import math
import os
import re
from dataclasses import replace
from itertools import product
from typing import NamedTuple

from model import SIZES
from plan import memory
from plan.memory import GPUS_PER_NODE, RECOMPUTED_ACTIVATIONS, Job, choose_shard, total_memory
from plan.time import GPUS, fastest, known_rates, step_seconds
from runtime.errors import UserError


class Machine(NamedTuple):
    gpu: str  # a key of GPUS
    world_size: int
    local_world_size: int

    def __str__(self) -> str:
        return f"{self.world_size}x{self.gpu}"


def parse_machine(text: str, batch: int) -> Machine:
    """The machine of a text such as 16xA100-40GB. Default: H100s, as many as torchrun started ranks, or else 8.

    Raises UserError when the GPU is unknown, when nodes are not full, or when the rows of a batch do not divide.
    """
    if text:
        match = re.fullmatch(r"([1-9][0-9]{0,4})x(.+)", text)
        if not match or match[2] not in GPUS:
            raise UserError(f"--plan-for {text}: it takes a number and one of {', '.join(GPUS)}, such as 16xA100-40GB")
        machine = Machine(match[2], int(match[1]), min(int(match[1]), GPUS_PER_NODE))
    else:
        world_size = int(os.environ.get("WORLD_SIZE", math.gcd(8, batch)))
        machine = Machine("H100", world_size, int(os.environ.get("LOCAL_WORLD_SIZE", min(world_size, GPUS_PER_NODE))))
    if machine.world_size % machine.local_world_size:
        raise UserError(f"--plan-for {text}: more than {GPUS_PER_NODE} GPUs must be whole nodes of {GPUS_PER_NODE}")
    if batch % machine.world_size:
        raise UserError(f"--plan-for {machine}: --batch-size {batch} does not divide among {machine.world_size} ranks")
    return machine


def report(job: Job, steps: int, machine: Machine) -> str:
    """The plan of a job on a machine, which decides the number of ranks. The job's shard may be `auto`."""
    config, gpu_memory, tokens = job.config, GPUS[machine.gpu].memory, steps * job.batch * job.seq_len
    flops, causal = (config.flops_per_token(job.seq_len, causal) for causal in (False, True))
    job = replace(job, world_size=machine.world_size, local_world_size=machine.local_world_size)
    job = replace(job, micro_batch=math.gcd(job.micro_batch, job.batch // job.world_size))
    job = choose_shard(job, gpu_memory, () if job.shard == "auto" else (job.shard,))
    lines = [
        f"Pythia {config.name}: {config.layers} layers, hidden {config.hidden}, {config.heads} heads of "
        f"{config.head_dim} ({config.rotary_dim} rotary), vocabulary {config.vocab:,}",
        f"  parameters      {config.parameters:>18,}   ({config.non_embedding_parameters:,} without embeddings)",
        f"  learning rate   {config.lr:>18g}   (floor {config.lr / 10:g}), initialisation {config.init}",
        f"  published in    {config.precision:>18}",
        *([f"  the paper says  {config.paper}"] if config.paper else []),
        f"  tokens          {tokens:>18,}   {steps:,} steps of {job.batch:,} rows of {job.seq_len:,}",
        f"  FLOPs per token {flops / 1e9:>17.3f}G   ({causal / 1e9:.3f}G when only causal attention is credited)",
        f"  FLOPs           {flops * tokens:>18.3g}",
        "",
        f"GB of a rank on {machine}, {job.precision}, {flags(job)} (estimated)",
        *(f"  {name:<32}{size / 1e9:>8.2f}" for name, size in memory.memory(job).items()),
        f"  {'together':<32}{total_memory(job) / 1e9:>8.2f}",
        f"  {'in host memory, during a save':<32}{memory.snapshot_memory(job) / 1e9:>8.2f}",
        "",
        *_memory_table(job, gpu_memory),
        "",
        *_suggestion(job, machine),
        "",
        *_days(job, steps, machine),
    ]
    return "\n".join(lines)


def flags(job: Job) -> str:
    return f"--shard {job.shard} --recompute {job.recompute} --micro-batch {job.micro_batch}"


def _memory_table(job: Job, gpu_memory: float) -> list[str]:
    """GB by --shard (rows), and by --recompute and --micro-batch (columns)."""
    usable = memory.USABLE * gpu_memory
    columns = [
        replace(job, recompute=recompute, micro_batch=micro_batch)
        for recompute, micro_batch in product(RECOMPUTED_ACTIVATIONS, (1, 2, 4, 8))
        if job.batch % (job.world_size * micro_batch) == 0
    ]
    lines = [
        f"GB by --shard, and --recompute with --micro-batch; up to {usable / 1e9:.1f} fit, * is more (estimated)",
        " " * 10 + "".join(f"{f'{column.recompute} {column.micro_batch}':>9}" for column in columns),
    ]
    for shard in dict.fromkeys(variant.shard for variant in memory.shardings(job)):
        sizes = [total_memory(choose_shard(column, gpu_memory, (shard,))) for column in columns]
        lines.append(f"  {shard:<8}" + "".join(f"{f'{size / 1e9:.1f}' + '*' * (size > usable):>9}" for size in sizes))
    return lines


def _suggestion(job: Job, machine: Machine) -> list[str]:
    gpu_memory, (rates, _) = GPUS[machine.gpu].memory, known_rates(job.config, job.precision, machine.gpu)
    world_size, local_world_size = job.world_size, job.local_world_size
    if best := fastest(job, gpu_memory, rates):
        nodes = f" --nnodes {world_size // local_world_size} --rdzv-backend c10d --rdzv-endpoint FIRST_NODE \\\n   "
        launcher = f"torchrun --nproc-per-node {local_world_size}" + nodes * (world_size > local_world_size)
        return [
            f"The fastest that fits, by estimate: {total_memory(best) / 1e9:.1f} GB a rank. Add your other flags.",
            f"  {launcher} train.py --size {job.config.name} {flags(best)}",
        ]
    for n in (2**i for i in range(11)):
        larger = replace(job, world_size=n, local_world_size=min(n, GPUS_PER_NODE))
        if job.batch % n == 0 and fastest(larger, gpu_memory, rates):
            return [f"Nothing fits {machine}. The smallest that does is {n}x{machine.gpu}"]
    return [f"Nothing fits {machine}, nor any larger machine of these GPUs"]


def _days(job: Job, steps: int, machine: Machine) -> list[str]:
    """The rates of the job, and the days of every size at its own rates."""
    rates, files = known_rates(job.config, job.precision, machine.gpu)
    lines = [f"Rates of {job.config.name} on {machine.gpu}, {job.precision}"]
    for name, rate in rates._asdict().items():
        source = f"measured (bench/results/{files[name]})" if name in files else "assumed from the data sheet"
        lines.append(f"  {name:<10}{rate / 1e12:>8.4g} {'TB/s' if name == 'copy' else 'TFLOP/s':<12}{source}")
    lines += [
        f"All sizes on {machine}: the fastest that fits (estimated). Communication between ranks is not included.",
        f"  {'--size':<8}{'--shard':<9}{'--recompute':<13}{'--micro-batch':<15}{'GB a rank':>9}{'days':>9}"
        f"{'GPU-hours':>12}   matmul rate",
    ]
    for name, config in SIZES.items():
        rates, files = known_rates(config, job.precision, machine.gpu)
        if not (best := fastest(replace(job, config=config), GPUS[machine.gpu].memory, rates)):
            lines.append(f"  {name:<8}nothing fits")
            continue
        days = steps * step_seconds(best, rates) / 86400
        lines.append(
            f"  {name:<8}{best.shard:<9}{best.recompute:<13}{best.micro_batch:<15}{total_memory(best) / 1e9:>9.1f}"
            f"{days:>9,.2f}{24 * days * machine.world_size:>12,.0f}   {'measured' if 'matmul' in files else 'assumed'}"
        )
    return lines
