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

import train
from model import SIZES
from plan import report
from plan import time as scaling
from runtime.errors import UserError

ROOT = Path(__file__).parents[1]

# Memory, measured: a step by train.py's parts, in processes of their own. Resident memory says it all, when the C
# library returns what is freed at once. On a GPU torch counts.

STEPS = """
import gc, json, sys
from dataclasses import replace
import torch
from model import SIZES, Pythia
from parallel.gradients import Gradients
from runtime.ranks import end_dist, init_dist
from parallel.fsdp import set_recompute, shard_weights
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
    peak_of_a_step(small, 1, *case[1:])  # what libraries keep for good
    peak = peak_of_a_step(config, *case)
    if ranks.is_main:
        print(json.dumps(peak), flush=True)
end_dist(ranks, together=True)
"""

# micro-batch, tokens of a row, precision, recompute, shard, micro-steps, whole gradients. More than 512 tokens, since
# attention of shorter rows keeps its probabilities, on CPUs only.
ONE = [
    (2, 576, "bf16", "none", "none", 2, True),
    (1, 576, "fp32", "cheap", "none", 1, True),
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
    for recompute, shard in product(report.KEPT, ("none", "grad", "full"))
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
        planned = sum(report.memory(config, *common, world, world, micro_steps, whole).values())
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


@pytest.mark.xdist_group("large")
@pytest.mark.gpu
def test_memory_is_what_a_gpu_takes(tmp_path):
    cases = [
        (micro_batch, 2048, "bf16", recompute, "none", micro_steps, True)
        for micro_batch, recompute, micro_steps in product((1, 8), report.KEPT, (1, 2))
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
from parallel import fsdp, gradients
from runtime.ranks import Dist
from kernels import backend
from kernels.cross_entropy import TRITON_CHUNK
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
        ranks = Dist(0, world, torch.device("cpu"), local_world_size=8)
        fsdp.shard_weights(model, shard, ranks, torch.float16)
        fsdp.set_recompute(model, recompute)
        step = Step(model, gradients.Gradients(model, ranks, shard, whole_gradients), None, ranks)
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
    for micro_batch, recompute, shard in product((1, 8), report.KEPT, report.SHARDS)
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
        planned = sum(report.memory(config, micro_batch, 2048, "bf16", recompute, shard, world, 8, *rest).values())
        if not 0.98 <= planned / peak <= 1.13:
            wrong.append(f"{size, micro_batch, recompute, shard, *rest}: {planned / peak:.3f} of {peak / 1e9:.2f} GB")
    assert not wrong, "\n".join(wrong)


def test_who_holds_what():
    config = SIZES["12b"]
    for shard, parts in (("none", 1), ("hybrid", 8), ("grad", 16), ("full", 16)):
        held = report.memory(config, 1, 2048, "bf16", "none", shard, world=16, node=8)
        assert held["weights (fp32)"] == 4 * config.parameters / parts
        assert held["Adam moments (fp32)"] == 8 * config.parameters / parts
    assert report.snapshot_memory(config, 16) == 12 * config.parameters / 16


# Settings


def seconds(size: str, world: int, shard: str, recompute: str, micro_batch: int = 4, whole: bool = True) -> float:
    micro_steps, node = 1024 // (world * micro_batch), min(world, 8)
    rates = scaling.assumed(SIZES[size], "bf16", "A100-80GB")
    args = micro_batch, 2048, "bf16", recompute, shard, world, node, micro_steps, whole
    return scaling.step_time(SIZES[size], rates, *args).total


def test_traffic_has_a_price():
    on_a_node = [seconds("1.4b", 8, shard, "none") for shard in ("grad", "none", "full")]
    assert on_a_node == sorted(on_a_node)
    for shard in ("grad", "full"):
        assert seconds("12b", 8, shard, "none") < seconds("12b", 8, shard, "none", whole=False)
        assert seconds("12b", 8, shard, "none", micro_batch=8) < seconds("12b", 8, shard, "none", micro_batch=4)


def test_settings_of_12b_on_a_node_of_a100():
    config = SIZES["12b"]
    rates = scaling.assumed(config, "bf16", "A100-80GB")
    found = report.settings(config, 8, 1024, 2048, "bf16", rates=rates)
    assert [s.time.total for s in found] == sorted(s.time.total for s in found)
    at = {setting[:4]: i for i, setting in enumerate(found)}
    assert found[0][:2] == ("grad", "none")
    for micro_batch in report.MICRO_BATCHES:
        order = [at["grad", recompute, micro_batch, True] for recompute in ("none", "cheap", "full")]
        assert order == sorted(order)
        assert at["grad", "cheap", micro_batch, True] < at["full", "cheap", micro_batch, True]
        if micro_batch > 1:  # a second forward pass costs more than weights that are fetched twice
            assert at["full", "none", micro_batch, True] < at["grad", "full", micro_batch, True]
    best = report.fastest(config, 80e9, 8, 1024, 2048, "bf16", rates=rates)
    assert best.recompute != "full"
    assert best.bytes < 0.92 * 80e9


@pytest.mark.parametrize("size", ["160m", "2.8b", "12b"])
def test_fastest(size):
    config, times = SIZES[size], []
    for gigabytes in (10_000, 141, 80, 40, 24, 8):
        best = report.fastest(config, gigabytes * 1e9, 8, 1024, 2048, "bf16")
        if best is None:
            times.append(float("inf"))
            continue
        assert best.bytes <= 0.92 * gigabytes * 1e9
        args = best.micro_batch, 2048, "bf16", best.recompute, best.shard, 8, 8, 1024 // (8 * best.micro_batch)
        assert sum(report.memory(config, *args, best.whole_gradients).values()) == best.bytes
        assert scaling.step_time(config, scaling.assumed(config, "bf16"), *args, best.whole_gradients) == best.time
        times.append(best.time.total)
        if gigabytes == 10_000:
            assert (best.shard, best.recompute, best.whole_gradients) == ("grad", "none", True)
    for more, less in pairwise(times):
        assert more <= 1.02 * less  # less memory is never better


def test_micro_batches_divide_the_rows_of_a_rank():
    found = report.settings(SIZES["14m"], 4, 24, 2048, "bf16")
    assert {setting.micro_batch for setting in found} == {1, 2}
    assert {setting.shard for setting in found} == {"none", "grad", "full"}
    assert {setting.shard for setting in report.settings(SIZES["14m"], 1, 24, 2048, "bf16")} == {"none"}
    assert "hybrid" in {setting.shard for setting in report.settings(SIZES["14m"], 16, 64, 2048, "bf16")}


def test_choose_shard():
    def choose(size: str, gigabytes: float, **restricted) -> report.Setting:
        args = 8, 8, 2, 2048, "bf16", "cheap", 1024
        return report.choose_shard(SIZES[size], gigabytes * 1e9, *args, **restricted)

    assert choose("1.4b", 80)[:4] == ("grad", "cheap", 2, True)
    assert choose("1.4b", 80, shards=("full",)).shard == "full"
    assert choose("12b", 40)[:4] == ("full", "cheap", 2, False)  # whole gradients alone are 47 GB
    assert choose("12b", 24)[:4] == ("full", "cheap", 2, False)  # fits not, but needs least
    assert report.choose_shard(SIZES["14m"], 24e9, 1, 1, 2, 2048, "bf16", "none", 16, ("full",)).shard == "full"


# Machines, and the text


def test_machines(monkeypatch):
    assert report.parse_machine("16xA100-40GB", 1024) == ("A100-40GB", 16, 8)
    assert report.parse_machine("4x3090", 1024) == ("3090", 4, 4)
    assert str(report.parse_machine("", 1024)) == "8xH100"
    assert str(report.parse_machine("", 12)) == "4xH100"
    monkeypatch.setenv("WORLD_SIZE", "12")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "6")
    assert report.parse_machine("", 1020) == ("H100", 12, 6)
    assert report.parse_machine("2xL40S", 1020).world == 2
    for text, message in (
        ("8xB52", "one of H200, H100, A100-80GB, A100-40GB, L40S, 4090, 3090, such as"),
        ("H100", "a number and one of"),
        ("0xH100", "a number and one of"),
        ("12xH100", "whole nodes of 8"),
        ("8xH100", "--batch-size 1020 does not divide among 8 ranks"),
    ):
        with pytest.raises(UserError, match=f"--plan-for {text}: .*{message}"):
            report.parse_machine(text, 1020)


def test_peak_of_devices(monkeypatch):
    for name, flops in (("NVIDIA A100-SXM4-40GB", 312e12), ("NVIDIA H200", 989e12), ("Tesla T4", None)):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda _, name=name: name)
        assert report.peak_flops(torch.device("cuda")) == flops
    assert report.peak_flops(torch.device("cpu")) is None


@pytest.mark.parametrize(
    ("size", "machine"), [("12b", "16xA100-40GB"), ("14m", "1x3090"), ("6.9b", "1x4090"), ("1b", "")]
)
def test_text(size, machine, monkeypatch):
    lines = report.plan(SIZES[size], 143_000, 1024, 8, 2048, "bf16", "none", plan_for=machine).split("\n")
    assert len(lines) <= 70
    assert max(map(len, lines)) <= 120
    if size == "6.9b":
        assert "Nothing fits 1x4090. The smallest that does is 8x4090" in lines
        return
    launcher, flags = "\n".join(lines).replace("\\\n", "").split("train.py ")
    ranks = launcher.split("torchrun ")[1].split()
    world = int(ranks[ranks.index("--nproc-per-node") + 1]) * (2 if "--nnodes 2" in launcher else 1)
    assert world == int((machine or "8xH100").split("x")[0])
    monkeypatch.setenv("WORLD_SIZE", str(world))
    s = train.parse(shlex.split(flags.split("\n")[0]))  # the line works
    m = report.parse_machine(machine, 1024)
    rates, _ = scaling.known_rates(SIZES[size], "bf16", m.name)
    best = report.fastest(SIZES[size], m.gpu.memory, world, 1024, 2048, "bf16", rates=rates)
    assert (s.size, s.shard, s.recompute, s.micro_batch) == (size, *best[:3])


def table(lines: list[str], title: str) -> list[list[str]]:
    """The rows below a title and a header."""
    first = next(i for i, line in enumerate(lines) if line.startswith(title)) + 2
    return [line.replace(",", "").split() for line in lines[first : [*lines, ""].index("", first)]]


def test_numbers_of_scaling_belong_together():
    config = SIZES["12b"]
    text = report.plan(config, 143_000, 1024, 8, 2048, "bf16", "none", plan_for="8x4090")
    rows = table(text.split("\n"), "Scaling of 12b on nodes of 8 4090")
    assert [int(row[0]) for row in rows] == [8, 16, 32, 64, 128, 256, 512]
    assert rows[0][1:] == ["nothing", "fits"]
    first = next(row for row in rows if "fits" not in row)
    for world, shard, recompute, micro_batch, *numbers in (row for row in rows if "fits" not in row):
        world = int(world)
        compute, exposed, rate, mfu, efficiency, days, hours = (float(x.rstrip("%")) for x in numbers)
        assert rate == pytest.approx(1024 * 2048 / (1e-3 * (compute + exposed)), rel=1e-3)
        assert mfu == pytest.approx(100 * rate * config.flops_per_token() / (world * 165e12), abs=0.51)
        assert efficiency == pytest.approx(100 * rate / world / (float(first[6]) / int(first[0])), abs=0.51)
        assert days == pytest.approx(299_892_736_000 / rate / 86400, rel=1e-3, abs=0.006)
        assert hours == pytest.approx(24 * days * world, rel=1e-3, abs=24 * 0.006 * world)
        assert shard in report.SHARDS
        assert recompute in report.KEPT
        assert world * int(micro_batch) <= 1024
    assert "do not divide" in report.plan(config, 10, 12, 1, 2048, "bf16", "none")


def test_published_hours_are_above_the_estimates():
    """Pythia's hours as published, and estimates for the same machines: more than ideal, less than theirs."""
    rows = table(report.plan(SIZES["14m"], 10, 64, 8, 512, "bf16", "none").split("\n"), "All sizes on 8xH100")
    assert [row[0] for row in rows[:10]] == list(SIZES)
    published = {row[0]: (int(row[-3]), int(row[-2]), int(row[-1])) for row in rows[2:10]}
    assert [hours for _, hours, _ in published.values()] == [510, 1030, 2540, 4830, 7120, 14240, 33500, 72300]
    assert [gpus for gpus, _, _ in published.values()] == [32, 32, 32, 64, 64, 64, 128, 256]
    for size, (_, hours, estimate) in published.items():
        ideal = 299_892_736_000 * SIZES[size].flops_per_token() / 312e12 / 3600
        assert 1.2 * ideal < estimate < hours


def test_text_tells_what_was_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(scaling, "RESULTS", tmp_path)
    result = {"gpu": "NVIDIA H100 80GB HBM3", "copy_bytes_per_s": 2.9e12, "product_flops_per_s": {"1b": 601e12}}
    (tmp_path / "roofline-h100.json").write_text(json.dumps(result))
    lines = report.plan(SIZES["1b"], 10, 64, 8, 2048, "bf16", "none").split("\n")
    for rate in ("products 601 TFLOP/s", "memory 2.90 TB/s"):
        assert any(rate in line and line.endswith("measured (bench/results/roofline-h100.json)") for line in lines)
    assert sum("assumed: " in line for line in lines) == 4
    assert lines[-1] == "  On 8xH100, products were measured for 1b, and assumed for the others"
