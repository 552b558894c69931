"""Plans: memory against what steps really take, on a CPU and by the tensors of a GPU's ops; settings and machines."""

import json
import os
import shlex
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise, product
from pathlib import Path

import pytest
import torch

import plan
import train
from errors import UserError
from model import SIZES

ROOT = Path(__file__).parents[1]

# Memory, measured: a step by train.py's parts, in processes of their own. Resident memory says it all, when the C
# library returns what is freed at once. On a GPU torch counts.

STEPS = """
import gc, json, sys
from dataclasses import replace
import torch
from model import SIZES, Pythia
from parallel import Gradients, end_ranks, set_recompute, shard_weights, start_ranks
from step import make_optimizer

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
    optimizer, gradients = make_optimizer(model, 1e-3), Gradients(model, ranks, shard, whole_gradients)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.02)
        p.grad = torch.zeros_like(p)
    optimizer.step()  # so that there are moments
    optimizer.zero_grad()
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    else:
        open("/proc/self/clear_refs", "w").write("5")
    tokens = torch.randint(config.vocab, (micro_batch, seq_len + 1), device=ranks.device)
    for i in range(micro_steps):
        last = i + 1 == micro_steps
        gradients.travel(last)
        model(tokens[:, :-1], tokens[:, 1:]).backward()
        gradients.add(last)
    gradients.squared_norm()
    optimizer.step()
    return (torch.cuda.max_memory_allocated() if cuda else status("VmHWM")) - before

ranks = start_ranks()
shape, cases = map(json.loads, sys.argv[1:])
config = replace(SIZES["14m"], **shape)
for case in cases:
    peak_of_a_step(replace(config, layers=1, hidden=64, vocab=128), 1, *case[1:])  # what libraries keep for good
    peak = peak_of_a_step(config, *case)
    if ranks.first:
        print(json.dumps(peak), flush=True)
end_ranks(ranks, together=True)
"""

# micro-batch, tokens of a row, precision, recompute, shard, micro-steps, whole gradients. More than 512 tokens in
# float32, since attention of shorter rows keeps its probabilities, on CPUs only.
ONE = [
    (2, 512, "bf16", "none", "none", 2, True),
    (1, 576, "fp32", "cheap", "none", 1, True),
]
TWO = [
    (2, 512, "bf16", "none", "full", 2, True),
    (1, 512, "bf16", "cheap", "none", 1, True),
    (1, 512, "bf16", "none", "full", 2, False),
    (1, 576, "fp32", "full", "grad", 2, True),
]
EVERY = [
    (micro_batch, 512 if precision == "bf16" else 576, precision, recompute, shard, 2, True)
    for micro_batch, precision in product((1, 4), ("bf16", "fp32"))
    for recompute, shard in product(plan.KEPT, ("none", "grad", "full"))
]


def check_measured(world: int, shape: dict, cases: list, folder: Path, environment: dict) -> None:
    (folder / "steps.py").write_text(STEPS)
    line = [Path(sys.executable).with_name("torchrun"), "--standalone", "--nproc-per-node", world]
    line += [folder / "steps.py", json.dumps(shape), json.dumps(cases)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    done = subprocess.run(list(map(str, line)), capture_output=True, text=True, timeout=900, env=environment)
    assert done.returncode == 0, done.stderr
    config, wrong = replace(SIZES["14m"], **shape), []
    for case, peak in zip(cases, map(int, done.stdout.split()), strict=True):
        *common, micro_steps, whole = case
        planned = sum(plan.memory(config, *common, world, world, micro_steps, whole).values())
        if not 0.9 <= planned / peak <= 1.15:
            wrong.append(f"{case}: {planned / 1e6:.1f} MB planned, {peak / 1e6:.1f} measured")
    assert not wrong, "\n".join(wrong)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(
    ("world", "cases"),
    [(1, ONE), pytest.param(2, TWO, marks=pytest.mark.slow), pytest.param(2, EVERY, marks=pytest.mark.slow)],
    ids=["1", "2", "every"],
)
def test_memory_is_what_a_cpu_takes(world, cases, tmp_path):
    # Few words, since the definition of the loss takes another chunk of logits than the kernels.
    shape = {"layers": 4, "hidden": 512, "heads": 8, "vocab": 1024}
    environment = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "MALLOC_ARENA_MAX": "1"}
    environment |= {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    check_measured(world, shape, cases, tmp_path, environment)


@pytest.mark.gpu
def test_memory_is_what_a_gpu_takes(tmp_path):
    cases = [
        (micro_batch, 2048, "bf16", recompute, "none", micro_steps, True)
        for micro_batch, recompute, micro_steps in product((1, 8), plan.KEPT, (1, 2))
    ]
    check_measured(1, {"layers": 12, "hidden": 768, "heads": 12}, cases, tmp_path, {})


# Memory, counted: every tensor that is alive in steps of a rank among many, by the ops that run on a GPU. Tensors are
# fake and so is the network: they have sizes only. What an op takes inside is not seen, but the loss is told apart.

COUNT = """
import json, sys, warnings, weakref
from dataclasses import replace
import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
import parallel
from kernels import backend
from kernels.cross_entropy import TRITON_CHUNK
from model import SIZES, Pythia

warnings.simplefilter("ignore")
backend.INTERPRETED = True  # the ops of a GPU, which fake tensors never run
real_mesh = parallel.init_device_mesh

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
        if op.namespace == "prim":  # asks for a device, and makes nothing
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

def peak_of_a_step(config, micro_batch, recompute, shard, micro_steps, whole_gradients):
    table = config.vocab * config.hidden
    chunk = 2 * min(micro_batch * 2048, TRITON_CHUNK) * config.vocab
    alive = Alive(chunk + (2 * table if world == 1 else 4 * table))  # weights cast, or gradients before they are
    with FakeTensorMode(allow_non_fake_inputs=True):
        Pythia.init_weights = lambda *_: None
        model = Pythia(config)
        model.compute_dtype = torch.float16  # as wide as bfloat16, which the interpreter refuses
        ranks = parallel.Ranks(0, world, torch.device("cpu"), node=8)
        parallel.shard_weights(model, shard, ranks, torch.float16)
        parallel.set_recompute(model, recompute)
        gradients = parallel.Gradients(model, ranks, shard, whole_gradients)
        tokens = torch.zeros(micro_batch, 2049, dtype=torch.long)
        with alive:
            moments = [torch.zeros_like(parallel.local(p)) for p in model.parameters() for _ in range(2)]
            for i in range(micro_steps):
                last = i + 1 == micro_steps
                gradients.travel(last)
                model(tokens[:, :-1], tokens[:, 1:]).backward()
                gradients.add(last)
        return alive.peak

world, cases = map(json.loads, sys.argv[1:])
parallel.init_device_mesh = init_device_mesh
parallel.Ranks.gather = lambda ranks, x: Nodes([8, 8])
if world > 1:
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world)
for size, layers, *case in cases:
    print(peak_of_a_step(replace(SIZES[size], layers=layers), *case), flush=True)
"""

# size, layers, micro-batch, recompute, shard, micro-steps, whole gradients
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
    ],
}
EVERY_COUNTED = [
    ("2.8b", 4, micro_batch, recompute, shard, *micro_steps)
    for micro_batch, recompute, shard in product((1, 8), plan.KEPT, plan.SHARDS)
    for micro_steps in ((1, True), (2, shard == "none"))
]


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
    for (size, layers, micro_batch, recompute, shard, *rest), peak in zip(cases, map(int, done.stdout.split())):
        config = replace(SIZES[size], layers=layers)
        planned = sum(plan.memory(config, micro_batch, 2048, "bf16", recompute, shard, world, 8, *rest).values())
        if not 0.98 <= planned / peak <= 1.13:
            wrong.append(f"{size, micro_batch, recompute, shard, *rest}: {planned / peak:.3f} of {peak / 1e9:.2f} GB")
    assert not wrong, "\n".join(wrong)


def test_who_holds_what():
    config = SIZES["12b"]
    for shard, parts in (("none", 1), ("hybrid", 8), ("grad", 16), ("full", 16)):
        held = plan.memory(config, 1, 2048, "bf16", "none", shard, world=16, node=8)
        assert held["weights (fp32)"] == 4 * config.parameters / parts
        assert held["Adam moments (fp32)"] == 8 * config.parameters / parts
    assert plan.snapshot_memory(config, 16) == 12 * config.parameters / 16


# Settings


def cost(size: str, world: int, shard: str, recompute: str, micro_batch: int = 4, whole: bool = True) -> float:
    setting = plan.Setting(shard, recompute, micro_batch, whole, 0)
    return plan.step_cost(SIZES[size], setting, 1024, 2048, "bf16", world, min(world, 8))


def test_recompute_costs_a_forward_pass():
    weights = SIZES["1.4b"].layers * 12 * 2048**2  # of the layers' products: 2 FLOPs each and token
    forward = 1024 * 2048 * (2 * weights + 24 * 4 * 2048 * 2048)  # and scores and values of attention
    assert cost("1.4b", 1, "none", "full") - cost("1.4b", 1, "none", "none") == pytest.approx(forward, rel=1e-3)
    assert cost("1.4b", 1, "none", "none") < cost("1.4b", 1, "none", "cheap") < cost("1.4b", 1, "none", "full")


def test_traffic_has_a_price():
    on_a_node = [cost("1.4b", 8, shard, "none") for shard in ("grad", "none", "full")]
    assert on_a_node == sorted(on_a_node)
    assert cost("12b", 32, "hybrid", "none") < cost("12b", 32, "full", "none")  # within a node links are fast
    for shard in ("grad", "full"):
        assert cost("12b", 8, shard, "none") < cost("12b", 8, shard, "none", whole=False)
        assert cost("12b", 8, shard, "none", micro_batch=8) < cost("12b", 8, shard, "none", micro_batch=4)


@pytest.mark.parametrize("size", ["160m", "2.8b", "12b"])
def test_fastest(size):
    config, costs = SIZES[size], []
    for gigabytes in (10_000, 141, 80, 40, 24, 8):
        best = plan.fastest(config, gigabytes * 1e9, 8, 1024, 2048, "bf16")
        if best is None:
            costs.append(float("inf"))
            continue
        assert best.bytes <= 0.92 * gigabytes * 1e9
        args = best.micro_batch, 2048, "bf16", best.recompute, best.shard, 8, 8, 1024 // (8 * best.micro_batch)
        assert sum(plan.memory(config, *args, best.whole_gradients).values()) == best.bytes
        costs.append(cost(size, 8, best.shard, best.recompute, best.micro_batch, best.whole_gradients))
        if gigabytes == 10_000:
            assert (best.shard, best.recompute, best.whole_gradients) == ("grad", "none", True)
    for more, less in pairwise(costs):
        assert more <= 1.02 * less  # less memory is never better


def test_micro_batches_divide_the_rows_of_a_rank():
    found = plan.settings(SIZES["14m"], 4, 24, 2048, "bf16")
    assert {setting.micro_batch for setting in found} == {1, 2}
    assert {setting.shard for setting in found} == {"none", "grad", "full"}
    assert {setting.shard for setting in plan.settings(SIZES["14m"], 1, 24, 2048, "bf16")} == {"none"}
    assert "hybrid" in {setting.shard for setting in plan.settings(SIZES["14m"], 16, 64, 2048, "bf16")}


def test_choose_shard():
    def choose(size: str, gigabytes: float, **restricted) -> plan.Setting:
        args = 8, 8, 2, 2048, "bf16", "cheap", 1024
        return plan.choose_shard(SIZES[size], gigabytes * 1e9, *args, **restricted)

    assert choose("1.4b", 80)[:4] == ("grad", "cheap", 2, True)
    assert choose("1.4b", 80, shards=("full",)).shard == "full"
    assert choose("12b", 40)[:4] == ("full", "cheap", 2, False)  # whole gradients alone are 47 GB
    assert choose("12b", 24)[:4] == ("full", "cheap", 2, False)  # fits not, but needs least
    assert plan.choose_shard(SIZES["14m"], 24e9, 1, 1, 2, 2048, "bf16", "none", 16, ("full",)).shard == "full"


# Machines, and the text


def test_machines(monkeypatch):
    assert plan.parse_machine("16xA100-40GB", 1024) == ("A100-40GB", 16, 8)
    assert plan.parse_machine("4x3090", 1024) == ("3090", 4, 4)
    assert str(plan.parse_machine("", 1024)) == "8xH100"
    assert str(plan.parse_machine("", 12)) == "4xH100"
    monkeypatch.setenv("WORLD_SIZE", "12")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "6")
    assert plan.parse_machine("", 1020) == ("H100", 12, 6)
    assert plan.parse_machine("2xL40S", 1020).world == 2
    for text, message in (
        ("8xB52", "one of H200, H100, A100-80GB, A100-40GB, L40S, 4090, 3090, such as"),
        ("H100", "a number and one of"),
        ("0xH100", "a number and one of"),
        ("12xH100", "whole nodes of 8"),
        ("8xH100", "--batch-size 1020 does not divide among 8 ranks"),
    ):
        with pytest.raises(UserError, match=f"--plan-for {text}: .*{message}"):
            plan.parse_machine(text, 1020)


def test_peak_of_devices(monkeypatch):
    for name, flops in (("NVIDIA A100-SXM4-40GB", 312e12), ("NVIDIA H200", 989e12), ("Tesla T4", None)):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda _, name=name: name)
        assert plan.peak_flops(torch.device("cuda")) == flops
    assert plan.peak_flops(torch.device("cpu")) is None


@pytest.mark.parametrize(
    ("size", "machine"), [("12b", "16xA100-40GB"), ("14m", "1x3090"), ("6.9b", "1x4090"), ("1b", "")]
)
def test_text(size, machine, monkeypatch):
    lines = plan.plan(SIZES[size], 143_000, 1024, 8, 2048, "bf16", "none", plan_for=machine).split("\n")
    assert len(lines) <= 60
    assert max(map(len, lines)) <= 110
    assert sum(line.split()[0] in SIZES for line in lines[-10:]) == 10
    if size == "6.9b":
        assert "Nothing fits 1x4090. The smallest that does is 8x4090" in lines
        return
    launcher, flags = "\n".join(lines).replace("\\\n", "").split("train.py ")
    ranks = launcher.split("torchrun ")[1].split()
    world = int(ranks[ranks.index("--nproc-per-node") + 1]) * (2 if "--nnodes 2" in launcher else 1)
    assert world == int((machine or "8xH100").split("x")[0])
    monkeypatch.setenv("WORLD_SIZE", str(world))
    s = train.parse(shlex.split(flags.split("\n")[0]))  # the line works
    best = plan.fastest(SIZES[size], plan.parse_machine(machine, 1024).gpu.memory, world, 1024, 2048, "bf16")
    assert (s.size, s.shard, s.recompute, s.micro_batch) == (size, *best[:3])
