"""One whole training step of Tripod beside what a user would pick: tokens/s, MFU, peak memory, launches, host syncs.

    python -m bench.step --size 160m --against hf,litgpt,liger,plain

A step is forward, backward, clipping of the global norm at 1, fused AdamW and zero_grad, on random tokens, the same for
all, that lie on the device. Ours is the step of train.py. Every arm (tripod, hf, hf+compile, ...) is a process of its
own, since peak memory and the allocator belong to a process. On a CPU all are started and warmed up; then each round
lets them measure one after the other, in random order, while the others wait blocked on a pipe. So all see the same
machine, and what disturbs one for a while disturbs all. On a GPU, whose memory one arm may fill, they take turns whole.
"""

import json
import math
import os
import random
import resource
import select
import shlex
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from argparse import SUPPRESS, BooleanOptionalAction, Namespace
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import replace
from datetime import UTC, datetime
from importlib import import_module
from itertools import cycle
from pathlib import Path
from statistics import median

import torch
from torch import Tensor
from torch.autograd import DeviceType
from torch.autograd.profiler_util import FunctionEvent
from tqdm import tqdm

from bench.ceilings import FOREIGN, ForeignCPU, flush_of, machine, product_ceiling, synchronize
from bench.kernel_measure import reason
from bench.peers import PACKAGES, build_peer, obstacle
from bench.report import step_table
from model import SIZES, Config, Pythia
from model.pythia import init_std
from model.sizes import VOCAB_USED
from parallel.fsdp import RECOMPUTE, set_recompute
from parallel.gradients import Gradients
from plan.time import peak_flops
from runtime.errors import Parser, UserError, run_command
from runtime.host import reuse_freed_memory, supports_bf16_matmul
from runtime.ranks import Dist
from step import Step, make_optimizer

SEED = 1234
LR = 1e-3
WARM_UP = 3  # steps: the first compiles, and the second may record a CUDA graph
BATCHES = 8  # different ones, that take turns
SHORTEST = 0.5  # seconds of one measurement, about: the kernel counts foreign CPU time in ticks of 10 ms
ATTEMPTS = 5  # of a measurement
ROOT = Path(__file__).parents[1]

# glibc's defaults return the logits to the system after every step and fault their pages in anew in the next.
TUNED = {"MALLOC_MMAP_THRESHOLD_": "4294967295", "MALLOC_TRIM_THRESHOLD_": "17179869184"}

# By how much first losses (in nats) and first gradient norms (relatively) of one network may differ.
AGREEMENT = {"fp32": (1e-4, 1e-3), "bf16": (5e-2, 5e-2), "own": (5e-2, 5e-2)}

# What the host calls to queue kernels, and to wait: torch also does that after a copy that it has to wait for.
LAUNCHES = ("cudaLaunchKernel", "cudaLaunchCooperativeKernel", "cuLaunchKernel", "cudaGraphLaunch")  # with any ending
SYNCS = {"cudaDeviceSynchronize", "cudaStreamSynchronize", "cudaEventSynchronize", "cudaMemcpy"}


def parse(arguments: list[str]) -> Namespace:
    """The settings of a command line, with the defaults of this machine. Raises UserError on one that can not work."""
    gpu = torch.cuda.is_available()
    parser = Parser(prog="bench.step", description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("--size", choices=list(SIZES), default="160m" if gpu else "14m", help="which Pythia (160m; on a CPU 14m)")
    add("--against", default=",".join(PACKAGES), metavar="NAMES", help=f"of {', '.join(PACKAGES)} (all)")
    add("--batch", type=int, default=8 if gpu else 4, metavar="N", help="rows of a step (8; on a CPU 4)")
    add("--seq-len", type=int, default=2048 if gpu else 512, metavar="N", help="tokens of a row (2048; on a CPU 512)")
    precision = "bf16" if gpu else "fp32"
    add(
        "--precision",
        choices=list(AGREEMENT),
        default=precision,
        help="bf16: autocast for the peers; own: what each takes unasked, Tripod that of train.py --demo, the peers "
        "float32 (bf16; on a CPU fp32)",
    )
    add("--recompute", choices=RECOMPUTE, default="none", help="of Tripod alone, as in train.py")
    add("--rounds", type=int, default=5, metavar="N", help="measurements of every arm (5)")
    add("--seconds", type=float, metavar="N", help="end by then: fewer rounds, and arms that come late are left out")
    add(
        "--allocator",
        choices=["tuned", "default", "both"],
        default="tuned",
        help="tuned: glibc keeps freed memory in every arm (this is the default); default: each as a newcomer would "
        "run it, with nothing compiled before",
    )
    add("--no-compile", action="store_true", help="leave out the arms under torch.compile")
    add(
        "--alone",
        action=BooleanOptionalAction,
        default=gpu,
        help="one arm in memory at a time, in two passes of opposite order (with --seconds, in one): for shapes that "
        "do not fit together (so on a GPU)",
    )
    add("--json", type=Path, metavar="FILE", help="write every raw number there")
    add("--arm", help=SUPPRESS)  # this process is that arm, started by the one that the user started
    s = parser.parse_args(arguments)
    # `compile` is the plain network, which like every peer runs eager and compiled
    s.against = list(dict.fromkeys("plain" if name == "compile" else name for name in s.against.split(",")))
    if unknown := set(s.against) - set(PACKAGES):
        raise UserError(f"--against knows {', '.join(PACKAGES)}, not {', '.join(sorted(unknown))}")
    for name in ("batch", "seq_len", "rounds", "seconds"):
        if getattr(s, name) is not None and not getattr(s, name) > 0:
            raise UserError(f"--{name.replace('_', '-')} must be positive, not {getattr(s, name)}")
    if s.json and not s.json.parent.is_dir():
        raise UserError(f"--json {s.json}: there is no directory {s.json.parent}")
    return s


def shape(s: Namespace) -> Config:
    return replace(SIZES[s.size], seq_len=s.seq_len)


def dtype_of(s: Namespace, name: str) -> torch.dtype:
    """Of the products of tripod or of a peer."""
    bf16 = s.precision == "bf16" or (s.precision == "own" and name == "tripod" and supports_bf16_matmul())
    return torch.bfloat16 if bf16 else torch.float32


# One arm: a process that trains when told to


def build(s: Namespace, device: torch.device) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """The step of the arm s.arm: tokens [batch, seq_len + 1] -> loss in nats, gradient norm before clipping.

    It does not wait for the device: who reads loss or norm does. The weights of a peer are copied from ours.
    """
    name, compiled = s.arm.removesuffix("+compile"), s.arm.endswith("+compile")
    bf16 = dtype_of(s, name) == torch.bfloat16
    ours = random_model(shape(s), device)
    if name == "tripod":
        ours.compute_dtype = torch.bfloat16 if bf16 else torch.float32
        set_recompute(ours, s.recompute)
        if compiled:
            for block in ours.blocks:
                block.compile()
        ranks = Dist(device=device)
        ours_step = Step(ours, Gradients(ours, ranks, "none"), make_optimizer(ours, LR), ranks)

        def step(tokens: Tensor) -> tuple[Tensor, Tensor]:
            ours_step.forward_backward(tokens[None])
            return ours_step.update(LR).unbind()

        return step

    network, loss_of = build_peer(name, ours)
    optimizer, parameters = make_optimizer(network, LR), list(network.parameters())
    network = torch.compile(network) if compiled else network

    def step(tokens: Tensor) -> tuple[Tensor, Tensor]:
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            loss = loss_of(network, tokens[:, :-1], tokens[:, 1:])
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach(), norm

    return step


@torch.no_grad()
def random_model(config: Config, device: torch.device) -> Pythia:
    """A Pythia with weights of the published distribution, drawn by the device: the same in every arm."""
    with torch.device("meta"):
        model = Pythia(config)
    model.to_empty(device=device)
    generator = torch.Generator(device).manual_seed(SEED)
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            parameter.normal_(std=init_std(config, name), generator=generator)
        else:
            parameter.fill_("norm" in name and name.endswith("weight"))
    return model


class Runner:
    """What an arm answers to."""

    def __init__(self, s: Namespace, device: torch.device):
        self.device, self.step = device, build(s, device)
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()  # our weights, of which a peer has a copy, are gone
        generator, shape = torch.Generator().manual_seed(SEED), (s.batch, s.seq_len + 1)
        batches = [torch.randint(VOCAB_USED, shape, generator=generator).to(device) for _ in range(BATCHES)]
        self.batches = cycle(batches)

    def warm_up(self) -> dict:
        steps = [self.timed_step() for _ in range(WARM_UP)]
        self.step_seconds = steps[-1]["seconds"]
        return {"warm_up": steps, "threads": torch.get_num_threads()}

    def timed_step(self) -> dict:
        began = time.perf_counter()
        loss, norm = (value.item() for value in self.step(next(self.batches)))
        synchronize(self.device)
        return {"seconds": time.perf_counter() - began, "loss": loss, "gradient_norm": norm}

    def measure(self) -> dict:
        """Steps that take about SHORTEST seconds, timed together; the host waits for the device at the end only."""
        steps = math.ceil(SHORTEST / self.step_seconds)
        watch, before = ForeignCPU(), resource.getrusage(resource.RUSAGE_SELF)
        synchronize(self.device)
        began = time.perf_counter()
        for _ in range(steps):
            self.step(next(self.batches))
        synchronize(self.device)
        seconds, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_SELF)
        faults = after.ru_minflt + after.ru_majflt - before.ru_minflt - before.ru_majflt
        foreign = watch.share() if self.device.type == "cpu" else None  # a GPU does not feel it
        self.step_seconds = seconds / steps
        return {"steps": steps, "seconds": seconds, "page_faults": faults, "foreign_cpu": foreign}

    def count(self) -> dict:
        """What one more step has the host call. Counting takes time, so it is none that was measured."""
        activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
        synchronize(self.device)
        with torch.profiler.profile(activities=activities) as profile:
            with torch.profiler.record_function("step"):
                self.step(next(self.batches))
        return {"calls": count_calls(profile.events())}

    def peak_bytes(self) -> int:
        """The most memory that this process has held: of the device on CUDA, else resident."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated()
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def count_calls(events: Iterable[FunctionEvent]) -> dict[str, int] | None:
    """Kernel launches and host syncs of the step that the events of a profiler tell of; None where the profiler has no
    access to the calls of CUDA, as a step without a launch can not be."""
    events = list(events)
    step = next(e.time_range for e in events if e.name == "step" and e.device_type == DeviceType.CPU)
    names = [event.name for event in events if step.start <= event.time_range.start < step.end]
    launches = sum(name.startswith(LAUNCHES) for name in names)
    return {"launches": launches, "syncs": sum(name in SYNCS for name in names)} if launches else None


def serve(s: Namespace) -> None:
    """Answer every line on stdin, a method of Runner, with what it returns, as a line of JSON on stdout."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print must not mix with the answers

    def answer(facts: dict) -> None:
        print(json.dumps(facts), file=answers, flush=True)

    if s.arm.startswith("tripod"):
        reuse_freed_memory()
    else:
        import_module(PACKAGES[s.arm.removesuffix("+compile")])
    answer({"ready": True})  # what takes long to import is there, and no memory of the device is taken
    runner = None
    try:
        for command in sys.stdin:
            runner = runner or Runner(s, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
            facts = getattr(runner, command.strip())()
            answer(facts | {"peak_bytes": runner.peak_bytes()})
    except Exception as failure:
        traceback.print_exc()
        answer({"failed": reason(failure)})


# The driver: starts the arms and gives each its turn


class ArmFailed(Exception):
    """An arm can not be measured; the message says why, in one line."""


class Arm:
    """A process that trains when told to; `with` ends it. What it answers is added to `record`.

    Its methods raise ArmFailed when it fails, or when it has not answered at `deadline` (of time.monotonic()).
    """

    def __init__(self, name: str, record: dict, arguments: list[str], allocator: str, deadline: float):
        self.record, self.deadline = record, deadline
        self.errors = tempfile.TemporaryFile()  # noqa: SIM115 (end closes it)
        self.cache = tempfile.TemporaryDirectory()  # a newcomer has compiled nothing yet
        settings = {"default": {"TORCHINDUCTOR_CACHE_DIR": self.cache.name}, "tuned": TUNED}
        environment = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "bench.step", *arguments, "--arm", name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            text=True,
            cwd=ROOT,
            env=environment | settings[allocator],
        )

    def __enter__(self) -> "Arm":
        return self

    def __exit__(self, *_) -> None:
        self.end()

    def end(self) -> None:
        if self.errors.closed:
            return
        patience = min(10, max(0, self.deadline - time.monotonic()))
        try:
            self.process.communicate(timeout=patience)  # an arm ends when stdin does
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.communicate()
        self.errors.close()
        self.cache.cleanup()

    def answer(self) -> dict:
        left = None if self.deadline == math.inf else max(0, self.deadline - time.monotonic())
        if not select.select([self.process.stdout], [], [], left)[0]:
            raise ArmFailed("the time was over")
        line = self.process.stdout.readline()
        answer = json.loads(line) if line else {"failed": f"exit status {self.process.wait()}"}
        if "failed" not in answer:
            return answer
        if "out of memory" in answer["failed"] or "can't allocate memory" in answer["failed"]:
            raise ArmFailed("out of memory")
        if self.process.poll() == -signal.SIGKILL:
            raise ArmFailed("killed, it seems for lack of memory: try --alone or a smaller --batch")
        self.errors.seek(0)
        sys.stderr.write(self.errors.read().decode(errors="replace"))
        raise ArmFailed(answer["failed"])

    def ask(self, command: str) -> dict:
        try:
            self.process.stdin.write(command + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass  # it has ended: the missing answer tells why
        answer = self.answer()
        self.record["peak_bytes"] = max(self.record.get("peak_bytes", 0), answer.pop("peak_bytes"))
        return answer

    def warm_up(self) -> None:
        self.record.update(self.ask("warm_up"))

    def measure(self, turn: int) -> None:
        """Have it measure, again while other processes disturb it; the least disturbed attempt is kept."""
        attempts = []
        for attempt in range(ATTEMPTS if self.deadline == math.inf else 1):
            time.sleep(attempt)  # what disturbs may pass
            attempts.append({"turn": turn, "kept": False} | self.ask("measure"))
            if not disturbed(attempts[-1]):
                break
        min(attempts, key=lambda attempt: attempt["foreign_cpu"] or 0.0)["kept"] = True
        self.record["measurements"] += attempts

    def count(self) -> None:
        self.record.update(self.ask("count"))


def disturbed(measurement: dict) -> bool:
    return (measurement["foreign_cpu"] or 0.0) > FOREIGN


class Comparison:
    """All arms under one allocator setting: `records` has of each warm_up, measurements, peak_bytes and calls, or
    `missing`, the reason. An arm that fails is left out, and never loses what the others have measured."""

    def __init__(self, s: Namespace, arguments: list[str], allocator: str, deadline: float, save: Callable[[], None]):
        self.s, self.command, self.deadline, self.save = s, (arguments, allocator), deadline, save
        self.allocator = allocator
        suffixes = ("",) if s.no_compile else ("", "+compile")
        self.records = {name + suffix: {"measurements": []} for name in ("tripod", *s.against) for suffix in suffixes}

    def run(self) -> None:
        # What compiles takes longest: where the time is limited it comes last.
        order = sorted(self.records, key=lambda name: name.endswith("+compile"))
        if not self.s.alone:
            return self.run_together(order)
        self.run_alone(order, 0, "arms")
        if not self.s.seconds:
            self.run_alone(order[::-1], self.s.rounds, "again, in opposite order")

    def run_together(self, order: list[str]) -> None:
        with ExitStack() as stack:
            arms = self.start(order, stack)
            for name in tqdm(order, desc=f"warming up ({self.allocator} allocator)"):
                self.attempt(name, arms, self.warm_up)
            for turn in tqdm(range(self.s.rounds), desc="rounds"):
                names = list(arms)
                random.Random(turn).shuffle(names)
                for name in names:
                    if turn == 0 or time.monotonic() < self.deadline:
                        self.attempt(name, arms, lambda name, arm: arm.measure(turn))  # noqa: B023 (called at once)
            self.count(arms, list(arms))

    def run_alone(self, order: list[str], first_turn: int, title: str) -> None:
        order = [name for name in order if not {"missing", "stopped"} & self.records[name].keys()]
        with ExitStack() as stack:
            arms = self.start(order, stack)
            for i, name in enumerate(tqdm(order, desc=f"{title} ({self.allocator} allocator)")):
                now = time.monotonic()
                share = now + (self.deadline - now) / (len(order) - i)  # of the time that is left
                self.attempt(name, arms, self.warm_up)
                for turn in range(first_turn, first_turn + self.s.rounds):
                    if turn == first_turn or time.monotonic() < share:
                        self.attempt(name, arms, lambda name, arm: arm.measure(turn))  # noqa: B023
                if first_turn == 0:
                    self.count(arms, [name])
                if name in arms:
                    arms[name].end()

    def start(self, names: list[str], stack: ExitStack) -> dict[str, Arm]:
        """The arms that can run, each with everything imported, which takes them longer one after the other."""
        arms = {}
        for name in names:
            network = name.removesuffix("+compile")
            if found := network != "tripod" and obstacle(network):
                self.records[name] = {"missing": found}
            else:
                arms[name] = stack.enter_context(Arm(name, self.records[name], *self.command, self.deadline))
        for name in list(arms):
            self.attempt(name, arms, lambda name, arm: arm.answer())
        return arms

    def attempt(self, name: str, arms: dict[str, Arm], work: Callable[[str, Arm], object]) -> None:
        """Do something with an arm that has not failed. If it fails now, it is out."""
        if name not in arms:
            return
        try:
            work(name, arms[name])
        except ArmFailed as failure:
            arms.pop(name).end()
            if self.records[name]["measurements"]:
                self.records[name]["stopped"] = str(failure)
            else:
                self.records[name] = {"missing": str(failure)}
        self.save()

    def warm_up(self, name: str, arm: Arm) -> None:
        arm.warm_up()
        first = next(record["warm_up"][0] for record in self.records.values() if "warm_up" in record)
        check_equal(self.s.precision, name, arm.record["warm_up"][0], first)

    def count(self, arms: dict[str, Arm], names: list[str]) -> None:
        if torch.cuda.is_available():  # nothing is launched on a CPU
            for name in names:
                self.attempt(name, arms, lambda name, arm: arm.count())


def check_equal(precision: str, name: str, theirs: dict, ours: dict) -> None:
    """Raise ArmFailed unless the first step of an arm had the loss and the gradient norm of ours."""
    nats, relative = AGREEMENT[precision]
    same_loss = abs(theirs["loss"] - ours["loss"]) <= nats
    same_norm = abs(theirs["gradient_norm"] / ours["gradient_norm"] - 1) <= relative
    if not (same_loss and same_norm):
        values = [f"loss {step['loss']:.5f}, gradient norm {step['gradient_norm']:.5f}" for step in (theirs, ours)]
        raise ArmFailed(f"{name} is another network: its first step has {values[0]}; tripod's has {values[1]}")


def summarize(s: Namespace, record: dict) -> dict[str, float]:
    """tokens/s over the kept measurements (their median, least and most), seconds and page faults of a step; on two
    passes also by how much the second was faster than the first."""
    kept = [m for m in record["measurements"] if m["kept"]]

    def rate(measurements: list[dict]) -> float:
        return s.batch * s.seq_len / median(m["seconds"] / m["steps"] for m in measurements)

    passes = [[m for m in kept if (m["turn"] >= s.rounds) == second] for second in (False, True)]
    drift = {"second_pass_over_first": rate(passes[1]) / rate(passes[0]) - 1} if all(passes) else {}
    return {
        "tokens_per_s": rate(kept),
        "tokens_per_s_min": min(rate([m]) for m in kept),
        "tokens_per_s_max": max(rate([m]) for m in kept),
        "seconds_per_step": s.batch * s.seq_len / rate(kept),
        "first_step_seconds": record["warm_up"][0]["seconds"],
        "page_faults_per_step": median(m["page_faults"] / m["steps"] for m in kept),
        "measurements": len(record["measurements"]),
        "disturbed": sum(map(disturbed, record["measurements"])),
        "disturbed_kept": sum(map(disturbed, kept)),
        **drift,
    }


def main() -> None:
    s = parse(sys.argv[1:])
    if s.arm:
        return serve(s)
    deadline = time.monotonic() + s.seconds if s.seconds else math.inf
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    facts, config = machine(device), shape(s)
    dtype = dtype_of(s, "tripod")
    report = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join(["python", "-m", "bench.step", *sys.argv[1:]]),
        "settings": {name: value for name, value in vars(s).items() if name not in ("arm", "json")},
        "machine": facts,
        "gemm_flops_per_s": product_ceiling(dtype, device, flush_of(device)),
        "peak_flops_per_s": peak_flops(device) if dtype == torch.bfloat16 else None,
        "flops_per_token": config.flops_per_token(),
        "flops_per_token_causal": config.flops_per_token(causal=True),
        "runs": {},
    }
    if device.type == "cuda":
        torch.cuda.empty_cache()  # the arms need all of it

    def save() -> None:
        if s.json:
            partial = s.json.with_name(f".{s.json.name}.tmp")
            partial.write_text(json.dumps(report, indent=1) + "\n")
            partial.replace(s.json)

    versions = ", ".join(f"{package} {found or 'not installed'}" for package, found in facts["versions"].items())
    print(f"{facts['gpu'] or facts['cpu']}, {facts['cores']} cores; {versions}; {report['date']}")
    peak = report["peak_flops_per_s"]
    print(
        f"Pythia {s.size}, {s.batch} x {s.seq_len} tokens a step, {s.precision}; large product "
        f"{report['gemm_flops_per_s'] / 1e9:,.0f} GFLOP/s" + (f", datasheet peak {peak / 1e9:,.0f}" if peak else "")
    )
    for allocator in ("default", "tuned") if s.allocator == "both" else (s.allocator,):
        comparison = Comparison(s, sys.argv[1:], allocator, deadline, save)
        report["runs"][allocator] = comparison.records
        comparison.run()
        for record in comparison.records.values():
            if "missing" not in record:
                record["summary"] = summarize(s, record)
        save()
        print(f"\n{allocator} allocator" if device.type == "cpu" else "")
        print(step_table(report, allocator), flush=True)
        if missing := comparison.records["tripod"].get("missing"):
            raise UserError(f"tripod failed: {missing}")


if __name__ == "__main__":
    run_command(main)
