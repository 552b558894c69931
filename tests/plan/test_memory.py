"""Memory against what steps really take, on a CPU and by the tensors of a GPU's ops; and the choice of --shard."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest

from model import SIZES
from parallel.fsdp import SHARD
from parallel.recompute import RECOMPUTE
from plan.memory import (
    RECOMPUTED_ACTIVATIONS,
    SAVED_ACTIVATIONS,
    SHARDINGS,
    Job,
    choose_shard,
    memory,
    shardings,
    snapshot_memory,
    total_memory,
    variants,
)

ROOT = Path(__file__).parents[2]

# Memory, measured: a step of the trainer's parts, in processes of their own. On a CPU it is the resident memory, if the
# C library returns freed memory at once. On a GPU torch counts.

STEPS = """
import gc, json, sys
from dataclasses import replace
import torch
from model import SIZES, Pythia
from parallel.gradients import Gradients
from runtime.ranks import end_dist, init_dist
from parallel.fsdp import shard_weights
from parallel.recompute import set_recompute
from step import Step, make_optimizer

def status(name):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(name))

def peak_of_a_step(config, micro_batch, seq_len, precision, recompute, shard, micro_steps, whole_gradients):
    gc.collect()
    cuda = ranks.device.type == "cuda"
    before = torch.cuda.memory_allocated() if cuda else status("VmRSS")
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[precision]
    with torch.device("meta"):
        model = Pythia(config)
    model.compute_dtype = dtype
    shard_weights(model, shard, ranks, dtype)
    model.to_empty(device=ranks.device)
    set_recompute(model, recompute)
    optimizer = make_optimizer(model, 1e-3)
    step = Step(model, Gradients(model, ranks, shard, whole_gradients), optimizer, ranks)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.02)
        p.grad = torch.zeros_like(p)
    optimizer.step()  # so that there are moments
    optimizer.zero_grad()
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    else:
        open("/proc/self/clear_refs", "w").write("5")
    step.forward_backward(torch.randint(config.vocab, (micro_steps, micro_batch, seq_len + 1), device=ranks.device))
    step.update(1e-3)
    return (torch.cuda.max_memory_allocated() if cuda else status("VmHWM")) - before

ranks = init_dist()
shape, cases = map(json.loads, sys.argv[1:])
config = replace(SIZES["14m"], **shape)
for case in cases:
    small = replace(config, layers=1, hidden=16 * config.heads, vocab=128)
    peak_of_a_step(small, 1, *case[1:])  # what libraries allocate once
    peak = peak_of_a_step(config, *case)
    if ranks.is_main:
        print(json.dumps(peak), flush=True)
end_dist(ranks, together=True)
"""

# micro-batch, tokens of a row, precision, recompute, shard, micro-steps, whole gradients. Rows have more than 512
# tokens: on CPUs, attention of shorter rows saves its probabilities.
ONE = [
    (1, 576, "fp32", "cheap", "none", 1, True),
    (2, 576, "bf16", "none", "none", 2, True),  # CPUs without bfloat16 products take minutes
]
TWO = [
    (2, 576, "bf16", "none", "full", 2, True),
    (1, 576, "bf16", "cheap", "none", 1, True),
    (1, 576, "bf16", "none", "full", 2, False),
    (1, 576, "fp32", "full", "grad", 2, True),
]
EVERY = [
    (micro_batch, 576, precision, recompute, shard, 2, True)
    for micro_batch, precision in product((1, 4), ("bf16", "fp32"))
    for recompute, shard in product(SAVED_ACTIVATIONS, ("none", "grad", "full"))
]


def check_measured(world: int, shape: dict, cases: list, folder: Path, environment: dict) -> None:
    (folder / "steps.py").write_text(STEPS)
    line = [Path(sys.executable).with_name("torchrun"), "--standalone", "--nproc-per-node", world]
    line += [folder / "steps.py", json.dumps(shape), json.dumps(cases)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    done = subprocess.run(list(map(str, line)), capture_output=True, text=True, timeout=7200, env=environment)
    assert done.returncode == 0, done.stderr
    config, wrong = replace(SIZES["14m"], **shape), []
    for case, peak in zip(cases, map(int, done.stdout.split()), strict=True):
        micro_batch, *common, micro_steps, whole = case
        batch = micro_steps * world * micro_batch
        planned = total_memory(Job(config, batch, micro_batch, *common, world, world, whole))
        if not 0.9 <= planned / peak <= 1.15:
            wrong.append(f"{case}: {planned / 1e6:.1f} MB planned, {peak / 1e6:.1f} measured")
    assert not wrong, "\n".join(wrong)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(
    ("world", "cases"),
    [(1, ONE[:1]), *(pytest.param(*case, marks=pytest.mark.slow) for case in ((1, ONE[1:]), (2, TWO), (2, EVERY)))],
    ids=["1", "bf16", "2", "every"],
)
def test_memory_is_what_a_cpu_takes(world, cases, tmp_path):
    # A small vocab: the reference of the loss takes another chunk of logits than the kernels.
    shape = {"layers": 4, "hidden": 512, "heads": 8, "vocab": 1024}
    environment = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "MALLOC_ARENA_MAX": "1"}
    environment |= {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    check_measured(world, shape, cases, tmp_path, environment)


@pytest.mark.large
@pytest.mark.gpu
def test_memory_is_what_a_gpu_takes(tmp_path):
    cases = [
        (micro_batch, 2048, "bf16", recompute, "none", micro_steps, True)
        for micro_batch, recompute, micro_steps in product((1, 8), SAVED_ACTIVATIONS, (1, 2))
    ]
    check_measured(1, {"layers": 12, "hidden": 768, "heads": 12}, cases, tmp_path, {})


# Memory, counted: every tensor that is alive in the steps of one rank of many, by the ops that run on a GPU. Tensors
# and process group are fake. What an op allocates inside is not seen; the test adds what the loss allocates.

COUNT = """
import json, sys, warnings, weakref
from dataclasses import replace
import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from parallel import fsdp, gradients
from parallel.recompute import set_recompute
from runtime.ranks import Dist
from kernels import backend
from kernels.cross_entropy import triton_chunk
from model import SIZES, Pythia
from step import Step

warnings.simplefilter("ignore")
backend.INTERPRETED = True  # the ops of a GPU, which fake tensors never run
real_mesh = fsdp.init_device_mesh

def init_device_mesh(*args, **options):
    with unset_fake_temporarily():
        mesh = real_mesh(*args, **options)
        for name in mesh.mesh_dim_names:
            mesh.get_local_rank(name)
        return mesh

class Nodes(list):
    tolist = list.copy

class Alive(TorchDispatchMode):
    def __init__(self, inside):
        super().__init__()
        self.storages, self.peak, self.inside = {}, 0, inside

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        out = op(*args, **(kwargs or {}))
        if op.namespace == "prim":  # asks for a device, and creates no tensor
            return out
        for tensor in tree_leaves((args, kwargs, out)):
            if isinstance(tensor, torch.Tensor):
                storage = getattr(tensor, "_local_tensor", tensor).untyped_storage()
                if storage._cdata not in self.storages:
                    self.storages[storage._cdata] = weakref.ref(storage)
                    weakref.finalize(storage, self.storages.pop, storage._cdata, None)
        alive = sum(storage.nbytes() for ref in list(self.storages.values()) if (storage := ref()) is not None)
        self.peak = max(self.peak, alive + self.inside * (op is torch.ops.tripod.linear_cross_entropy.default))
        return out

def peak_of_a_step(config, micro_batch, recompute, shard, micro_steps, whole_gradients, bitwise=False):
    table = config.vocab * config.hidden
    chunk = 2 * min(micro_batch * 2048, triton_chunk(config.hidden)) * config.vocab
    alive = Alive(chunk + (2 * table if world == 1 else 4 * table))  # weights cast, or gradients that are cast later
    with FakeTensorMode(allow_non_fake_inputs=True):
        Pythia.init_weights = lambda *_: None
        model = Pythia(config)
        model.compute_dtype = torch.float16  # as wide as bfloat16, which the interpreter refuses
        ranks = Dist(0, world, torch.device("cpu"), local_world_size=8)
        fsdp.shard_weights(model, shard, ranks, torch.float16)
        set_recompute(model, recompute)
        step = Step(model, gradients.Gradients(model, ranks, shard, whole_gradients, bitwise), None, ranks)
        tokens = torch.zeros(micro_steps, micro_batch, 2049, dtype=torch.long)
        with alive:
            moments = [torch.zeros_like(fsdp.local(p)) for p in model.parameters() for _ in range(2)]
            step.forward_backward(tokens)
        return alive.peak

world, cases = map(json.loads, sys.argv[1:])
fsdp.init_device_mesh = init_device_mesh
Dist.all_gather = lambda ranks, x: Nodes([8, 8])
if world > 1:
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world)
for size, layers, *case in cases:
    print(peak_of_a_step(replace(SIZES[size], layers=layers), *case), flush=True)
"""

# size, layers, micro-batch, recompute, shard, micro-steps, whole gradients, bitwise
COUNTED = {
    1: [
        ("160m", 6, 32, "none", "none", 2, True),
        ("1.4b", 6, 32, "cheap", "none", 1, True),
        ("12b", 4, 8, "full", "none", 1, True),
        ("12b", 4, 1, "none", "none", 2, True),
    ],
    16: [
        ("1.4b", 3, 8, "none", "grad", 2, True),
        ("12b", 3, 2, "cheap", "full", 2, False),
        ("12b", 3, 32, "full", "hybrid", 2, True),
        ("160m", 4, 1, "none", "none", 1, True),
        ("1.4b", 3, 2, "none", "grad", 8, False, True),
    ],
}
EVERY_COUNTED = [
    ("2.8b", 4, micro_batch, recompute, shard, *micro_steps)
    for micro_batch, recompute, shard in product((1, 8), SAVED_ACTIVATIONS, ("grad", "none", "hybrid", "full"))
    for micro_steps in ((1, True), (2, shard == "none"))
] + [("12b", 3, 1, "full", "full", 6, False, True), ("12b", 3, 8, "cheap", "grad", 1, True, True)]


@pytest.mark.parametrize(
    ("world", "cases"),
    [*COUNTED.items(), pytest.param(16, EVERY_COUNTED, marks=pytest.mark.slow)],
    ids=["1", "16", "every"],
)
def test_memory_is_that_of_all_tensors(world, cases, tmp_path):
    line = [sys.executable, "-c", COUNT, json.dumps(world), json.dumps(cases)]
    done = subprocess.run(line, capture_output=True, text=True, timeout=1800, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    wrong = []
    for case, peak in zip(cases, map(int, done.stdout.split())):
        size, layers, micro_batch, recompute, shard, micro_steps, whole, *bitwise = case
        config, batch = replace(SIZES[size], layers=layers), micro_steps * world * micro_batch
        job = Job(config, batch, micro_batch, 2048, "bf16", recompute, shard, world, 8, whole, *bitwise)
        planned = total_memory(job)
        if not 0.98 <= planned / peak <= 1.13:
            wrong.append(f"{case}: {planned / peak:.3f} of {peak / 1e9:.2f} GB")
    assert not wrong, "\n".join(wrong)


def test_parts_of_weights_and_moments():
    config = SIZES["12b"]
    for shard, parts in (("none", 1), ("hybrid", 8), ("grad", 16), ("full", 16)):
        job = Job(config, 16, 1, 2048, "bf16", "none", shard, world_size=16, local_world_size=8)
        held = memory(job)
        assert held["weights (fp32)"] == 4 * config.parameters / parts
        assert held["Adam moments (fp32)"] == 8 * config.parameters / parts
        assert snapshot_memory(job) == 12 * config.parameters / 16


# The choice of --shard


def test_names_are_those_of_parallel():
    assert {shard for shard, _ in SHARDINGS} | {"auto"} == set(SHARD)
    assert tuple(SAVED_ACTIVATIONS) == tuple(RECOMPUTED_ACTIVATIONS) == RECOMPUTE


def test_shardings():
    def ways(**job) -> list[tuple[str, bool]]:
        return [(x.shard, x.whole_gradients) for x in shardings(Job(SIZES["14m"], 64, 2, 2048, "bf16", **job))]

    whole = [("grad", True), ("none", True), ("full", True)]
    assert ways() == [("none", True)]
    assert ways(world_size=8) == [*whole[:2], ("grad", False), *whole[2:], ("full", False)]
    assert ways(world_size=8, local_world_size=8, shard="full") == ways(world_size=8)
    assert ways(world_size=16) == list(SHARDINGS)
    assert ways(world_size=32, local_world_size=32) == whole  # one micro-step: its gradients are whole


def test_variants():
    """What a job leaves open, and only that, takes every value that its rows and ranks allow."""

    def values(**job) -> tuple[set, set, set]:
        found = variants(
            Job(SIZES["14m"], **{"batch": 48, "micro_batch": 0, "recompute": "auto", "shard": "auto"} | job)
        )
        assert len(found) == len(set(found))
        return {x.shard for x in found}, {x.recompute for x in found}, {x.micro_batch for x in found}

    base = {"seq_len": 2048, "precision": "fp16"}
    assert values(**base) == ({"none"}, set(RECOMPUTE), {1, 2, 4, 8, 16})
    assert values(**base, world_size=4) == ({"grad", "none", "full"}, set(RECOMPUTE), {1, 2, 4})
    assert values(**base, world_size=16) == ({"grad", "none", "hybrid", "full"}, set(RECOMPUTE), {1})
    assert values(**base, micro_batch=3, recompute="cheap") == ({"none"}, {"cheap"}, {3})
    assert values(**base, world_size=4, shard="full") == ({"full"}, set(RECOMPUTE), {1, 2, 4})
    # --bitwise: the same micro-batches on 1 to 8 ranks, and no rank holds all weights
    for world_size in (1, 2, 4, 8):
        assert values(**base, world_size=world_size, bitwise=True)[::2] == ({"grad", "full"}, {1, 2})
    assert values(**base, batch=4, bitwise=True)[2] == {1}
    wholes = {x.whole_gradients for x in variants(Job(SIZES["14m"], 48, 2, shard="auto", **base, bitwise=True))}
    assert wholes == {False}  # every micro-step reduces


def test_choose_shard():
    def choose(size: str, gigabytes: float, shards: tuple[str, ...] = ()) -> tuple[str, bool]:
        job = Job(SIZES[size], 1024, 2, 2048, "bf16", "cheap", world_size=8)
        chosen = choose_shard(job, gigabytes * 1e9, shards)
        assert chosen == replace(job, shard=chosen.shard, whole_gradients=chosen.whole_gradients)
        return chosen.shard, chosen.whole_gradients

    assert choose("1.4b", 80) == ("grad", True)
    assert choose("1.4b", 80, shards=("full",)) == ("full", True)
    assert choose("12b", 40) == ("full", False)  # whole gradients alone are 47 GB
    assert choose("12b", 24) == ("full", False)  # does not fit, but needs least
    one = Job(SIZES["14m"], 16, 2, 2048, "bf16")
    assert choose_shard(one, 24e9, ("full",)).shard == "full"
    assert choose_shard(one, 24e9).shard == "none"


@pytest.mark.parametrize("world_size", [8, 16])
@pytest.mark.parametrize("size", ["160m", "2.8b", "12b"])
def test_least_traffic_that_fits_is_chosen(size, world_size):
    job, order = Job(SIZES[size], 1024, 2, 2048, "bf16", world_size=world_size), []
    for gigabytes in (10_000, 141, 80, 40, 24, 8):
        chosen, ways = choose_shard(job, gigabytes * 1e9), shardings(job)
        fit = [way for way in ways if total_memory(way) <= 0.92 * gigabytes * 1e9]
        assert chosen == (fit[0] if fit else min(ways, key=total_memory))
        order.append(ways.index(chosen))
    assert order[0] == 0
    assert order == sorted(order)  # less memory never means less traffic
