"""The plan of a run as text: the command that suits a machine and its days; the details are for --verbose."""

import math
import os
import re
from dataclasses import replace
from itertools import product
from typing import NamedTuple

from model import SUITE
from plan import memory
from plan.memory import GPUS_PER_NODE, RECOMPUTED_ACTIVATIONS, Job, choose_shard, total_memory, variants
from plan.time import GPUS, fastest, known_rates, step_seconds
from runtime.errors import UserError

HINT = "Add your other flags. Without --shard, --recompute and --micro-batch, a run takes what suits its GPUs."


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


def summary(job: Job, machine: Machine, steps: int, lr: float, data: str) -> str:
    """The command that suits a job on the ranks of a machine, and what it takes. `data` are the flags of the data.

    What the job does not leave open stays. If that does not fit, the text says so and leaves it open.
    """
    gpu, (rates, files) = GPUS[machine.gpu], known_rates(job.config, job.precision, machine.gpu)
    usable, lines = memory.USABLE * gpu.memory / 1e9, []
    best = fastest(job, gpu.memory, rates)
    if not best and job != opened(job):
        least = min(variants(job), key=total_memory)
        lines.append(
            f"{least.flags} does not fit {machine}: {total_memory(least) / 1e9:.1f} GB a rank, {usable:.1f} fit."
        )
        job = opened(job)
        best = fastest(job, gpu.memory, rates)
    if best:
        days = steps * step_seconds(best, rates) / 86400
        time = f"{days:,.2f} days" if days >= 0.1 else f"{24 * 60 * days:,.1f} minutes"
        lines += [
            f"The fastest that fits {machine}, by estimate:",
            f"  {command(best, machine, data)}",
            f"  time           {time}, {24 * days * machine.world_size:,.0f} GPU-hours; communication is not included, "
            f"rates are {'measured' if 'matmul' in files else 'assumed'}",
            f"  memory         {total_memory(best) / 1e9:.1f} GB a rank, {usable:.1f} fit",
        ]
    else:
        lines.append(_smallest_machine(job, machine))
    tokens = steps * job.batch * job.seq_len
    return "\n".join(
        [
            *lines,
            f"  model          Pythia {job.config.name}, {job.config.parameters:,} parameters, {job.precision}",
            f"  training       {steps:,} steps of {job.batch:,} rows of {job.seq_len:,} tokens: {tokens:,} tokens",
            f"  learning rate  {lr:g} at its peak",
            *([HINT] if best else []),
            "--verbose prints memory by setting, FLOPs, and the days of all sizes.",
        ]
    )


def details(job: Job, machine: Machine, steps: int, lr: float) -> str:
    """The model, its FLOPs, its memory by what it holds and by setting, and the days of every size."""
    config, gpu_memory, tokens = job.config, GPUS[machine.gpu].memory, steps * job.batch * job.seq_len
    flops, causal = (config.flops_per_token(job.seq_len, causal) for causal in (False, True))
    rates, _ = known_rates(config, job.precision, machine.gpu)
    job = fastest(job, gpu_memory, rates) or min(variants(job), key=total_memory)
    lines = [
        f"Pythia {config.name}: {config.layers} layers, hidden {config.hidden}, {config.heads} heads of "
        f"{config.head_dim} ({config.rotary_dim} rotary), vocabulary {config.vocab:,}",
        f"  parameters      {config.parameters:>18,}   ({config.non_embedding_parameters:,} without embeddings)",
        f"  learning rate   {lr:>18g}   (floor {lr / 10:g}; published {config.lr:g}), initialisation {config.init}",
        f"  published in    {config.precision:>18}",
        *([f"  the paper says  {config.paper}"] if config.paper else []),
        f"  FLOPs per token {flops / 1e9:>17.3f}G   ({causal / 1e9:.3f}G when only causal attention is credited)",
        f"  FLOPs           {flops * tokens:>18.3g}",
        "",
        f"GB of a rank on {machine}, {job.precision}, {job.flags} (estimated)",
        *(f"  {name:<32}{size / 1e9:>8.2f}" for name, size in memory.memory(job).items()),
        f"  {'together':<32}{total_memory(job) / 1e9:>8.2f}",
        f"  {'in host memory, during a save':<32}{memory.snapshot_memory(job) / 1e9:>8.2f}",
        "",
        *_memory_table(job, gpu_memory),
        "",
        *_days(job, steps, machine),
    ]
    return "\n".join(lines)


def opened(job: Job) -> Job:
    """The job with shard, recompute and micro-batch left open."""
    return replace(job, shard="auto", recompute="auto", micro_batch=0)


def command(job: Job, machine: Machine, data: str) -> str:
    """The command line that runs a job on a machine."""
    launcher, nodes = "python", machine.world_size // machine.local_world_size
    if machine.world_size > 1:  # with an address, torchrun unpickles nothing: see docs/faults.md
        where = f"--nnodes {nodes} --node-rank N --master-addr HOST0" if nodes > 1 else "--master-addr 127.0.0.1"
        launcher = f"torchrun {where} --master-port 29400 --nproc-per-node {machine.local_world_size} \\\n   "
    return f"{launcher} train.py --size {job.config.name} {data} {job.flags}"


def _smallest_machine(job: Job, machine: Machine) -> str:
    gpu_memory, (rates, _) = GPUS[machine.gpu].memory, known_rates(job.config, job.precision, machine.gpu)
    for n in (2**i for i in range(11)):
        larger = replace(opened(job), world_size=n, local_world_size=min(n, GPUS_PER_NODE))
        if job.batch % n == 0 and fastest(larger, gpu_memory, rates):
            return f"Nothing fits {machine}. The smallest that does is {n}x{machine.gpu}"
    return f"Nothing fits {machine}, nor any larger machine of these GPUs"


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
    for shard in dict.fromkeys(variant.shard for variant in variants(replace(job, shard="auto"))):
        sizes = [total_memory(choose_shard(column, gpu_memory, (shard,))) for column in columns]
        lines.append(f"  {shard:<8}" + "".join(f"{f'{size / 1e9:.1f}' + '*' * (size > usable):>9}" for size in sizes))
    return lines


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
    for name, config in SUITE.items():
        rates, files = known_rates(config, job.precision, machine.gpu)
        if not (best := fastest(opened(replace(job, config=config)), GPUS[machine.gpu].memory, rates)):
            lines.append(f"  {name:<8}nothing fits")
            continue
        days = steps * step_seconds(best, rates) / 86400
        lines.append(
            f"  {name:<8}{best.shard:<9}{best.recompute:<13}{best.micro_batch:<15}{total_memory(best) / 1e9:>9.1f}"
            f"{days:>9,.2f}{24 * days * machine.world_size:>12,.0f}   {'measured' if 'matmul' in files else 'assumed'}"
        )
    return lines
