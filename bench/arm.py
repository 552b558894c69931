"""One arm of bench.step: a process that trains one network, and the handle by which bench.step controls it.

An arm is tripod or a peer (hf, litgpt, liger, plain), eager or compiled (hf+compile). It reads one command a line from
stdin, and it writes one JSON object a line to stdout.
"""

import json
import math
import os
import resource
import select
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from argparse import Namespace
from collections.abc import Callable, Iterable
from dataclasses import replace
from importlib import import_module
from itertools import cycle
from pathlib import Path

import torch
from torch import Tensor
from torch.autograd import DeviceType
from torch.autograd.profiler_util import FunctionEvent

from bench.kernels.measure import reason
from bench.peers import PACKAGES, build_peer
from bench.timing import ForeignCPU, repeat_while_disturbed, synchronize
from model import SIZES, Config, Pythia
from model.pythia import init_std
from model.sizes import VOCAB_USED
from parallel.gradients import Gradients
from parallel.recompute import set_recompute
from runtime.host import reuse_freed_memory, supports_bf16_matmul
from runtime.ranks import Dist
from step import Step, make_optimizer

ROOT = Path(__file__).parents[1]
SEED = 1234
LR = 1e-3
WARM_UP = 3  # steps: the first compiles, and the second may record a CUDA graph
BATCHES = 8  # different batches, used in turn
SHORTEST = 0.5  # approximate seconds of one measurement: /proc/stat counts CPU time in ticks of 10 ms
ATTEMPTS = 5  # of a disturbed measurement

# By default glibc returns the logits to the system after every step, and the next step page-faults them again.
TUNED = {"MALLOC_MMAP_THRESHOLD_": "4294967295", "MALLOC_TRIM_THRESHOLD_": "17179869184"}

# CUDA calls of the host that launch kernels (prefixes), and that wait for the device. torch also waits after a copy
# whose result it needs.
LAUNCHES = ("cudaLaunchKernel", "cudaLaunchCooperativeKernel", "cuLaunchKernel", "cudaGraphLaunch")
SYNCS = {"cudaDeviceSynchronize", "cudaStreamSynchronize", "cudaEventSynchronize", "cudaMemcpy"}


# ---- the process of an arm


def config_of(s: Namespace) -> Config:
    return replace(SIZES[s.size], seq_len=s.seq_len)


def dtype_of(s: Namespace, name: str) -> torch.dtype:
    """The dtype of the matmuls of tripod or of a peer."""
    bf16 = s.precision == "bf16" or (s.precision == "own" and name == "tripod" and supports_bf16_matmul())
    return torch.bfloat16 if bf16 else torch.float32


def build(s: Namespace, device: torch.device) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """Returns the step of the arm s.arm: tokens [micro_steps, batch, seq_len + 1] -> loss in nats, grad_norm before
    clipping.

    The step does not wait for the device; reading loss or norm does. A peer gets a copy of Tripod's weights.
    """
    name, compiled = s.arm.removesuffix("+compile"), s.arm.endswith("+compile")
    bf16 = dtype_of(s, name) == torch.bfloat16
    ours = random_model(config_of(s), device)
    if name == "tripod":
        ours.compute_dtype = torch.bfloat16 if bf16 else torch.float32
        set_recompute(ours, s.recompute)
        if compiled:
            for block in ours.blocks:
                block.compile()
        dist = Dist(device=device)
        ours_step = Step(ours, Gradients(ours, dist, "none"), make_optimizer(ours, LR), dist)

        def step(tokens: Tensor) -> tuple[Tensor, Tensor]:
            ours_step.forward_backward(tokens)
            return ours_step.update(LR).unbind()

        return step

    network, loss_of = build_peer(name, ours)
    optimizer, parameters = make_optimizer(network, LR), list(network.parameters())
    network = torch.compile(network) if compiled else network

    def step(tokens: Tensor) -> tuple[Tensor, Tensor]:
        total = torch.zeros((), device=device)
        for micro_batch in tokens:
            with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                loss = loss_of(network, micro_batch[:, :-1], micro_batch[:, 1:]) / len(tokens)
            loss.backward()
            total += loss.detach()
        norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return total, norm

    return step


@torch.no_grad()
def random_model(config: Config, device: torch.device) -> Pythia:
    """A Pythia with initial weights of the published distribution. They are the same in every arm.

    The device draws the weights, because a CPU would take minutes for a large model.
    """
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
    """The commands of an arm: warm_up, measure and count. Each returns a JSON object."""

    def __init__(self, s: Namespace, device: torch.device):
        self.device, self.step = device, build(s, device)
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()  # do not count Tripod's weights, which a peer has copied
        generator, shape = torch.Generator().manual_seed(SEED), (s.micro_steps, s.batch, s.seq_len + 1)
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
        """Time about SHORTEST seconds of steps together. The host waits for the device only after the last step."""
        steps = math.ceil(SHORTEST / self.step_seconds)
        watch, before = ForeignCPU(), resource.getrusage(resource.RUSAGE_SELF)
        synchronize(self.device)
        began = time.perf_counter()
        for _ in range(steps):
            self.step(next(self.batches))
        synchronize(self.device)
        seconds, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_SELF)
        faults = after.ru_minflt + after.ru_majflt - before.ru_minflt - before.ru_majflt
        foreign = watch.fraction() if self.device.type == "cpu" else None  # does not slow a GPU
        self.step_seconds = seconds / steps
        return {"steps": steps, "seconds": seconds, "page_faults": faults, "foreign_cpu": foreign}

    def count(self) -> dict:
        """Count the CUDA calls of one more step. The profiler slows this step, so it is not one of those measured."""
        activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
        synchronize(self.device)
        with torch.profiler.profile(activities=activities) as profile:
            with torch.profiler.record_function("step"):
                self.step(next(self.batches))
        return {"calls": count_calls(profile.events())}

    def peak_bytes(self) -> int:
        """Peak memory of this process in bytes: allocated on a GPU, or resident on a CPU."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated()
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def count_calls(events: Iterable[FunctionEvent]) -> dict[str, int] | None:
    """Count kernel launches and host syncs within the profiled step.

    Returns None if there is no launch. Every step has launches, so the profiler then had no access to CUDA calls.
    """
    events = list(events)
    step = next(e.time_range for e in events if e.name == "step" and e.device_type == DeviceType.CPU)
    names = [event.name for event in events if step.start <= event.time_range.start < step.end]
    launches = sum(name.startswith(LAUNCHES) for name in names)
    return {"launches": launches, "syncs": sum(name in SYNCS for name in names)} if launches else None


def serve(s: Namespace) -> None:
    """Read the name of a Runner method from each line of stdin; write its result to stdout as a line of JSON."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries print to stdout: keep their output apart from the answers

    def answer(content: dict) -> None:
        print(json.dumps(content), file=answers, flush=True)

    if s.arm.startswith("tripod"):
        reuse_freed_memory()
    else:
        import_module(PACKAGES[s.arm.removesuffix("+compile")])
    answer({"ready": True})  # the slow imports are done, and no device memory is taken yet
    runner = None
    try:
        for command in sys.stdin:
            runner = runner or Runner(s, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
            content = getattr(runner, command.strip())()
            answer(content | {"peak_bytes": runner.peak_bytes()})
    except Exception as failure:
        traceback.print_exc()
        answer({"failed": reason(failure)})


# ---- the handle of that process


class ArmFailed(Exception):
    """An arm cannot be measured. The message says why, in one line."""


class Arm:
    """Starts the process of an arm and sends it commands. The results are added to `record`. `with` ends the process.

    Its methods raise ArmFailed if the arm fails, or if it does not answer before `deadline` (in time.monotonic()).
    """

    def __init__(self, name: str, record: dict, arguments: list[str], allocator: str, deadline: float):
        self.record, self.deadline = record, deadline
        self.errors = tempfile.TemporaryFile()  # noqa: SIM115 (end closes it)
        self.cache = tempfile.TemporaryDirectory()  # empty, because a newcomer has not compiled anything yet
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
            self.process.communicate(timeout=patience)  # closes stdin, and then an arm ends
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
            raise ArmFailed("killed, probably for lack of memory: try --alone or a smaller --batch")
        self.errors.seek(0)
        sys.stderr.write(self.errors.read().decode(errors="replace"))
        raise ArmFailed(answer["failed"])

    def ask(self, command: str) -> dict:
        try:
            self.process.stdin.write(command + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass  # the process has ended: answer() finds out why
        answer = self.answer()
        self.record["peak_bytes"] = max(self.record.get("peak_bytes", 0), answer.pop("peak_bytes"))
        return answer

    def warm_up(self) -> None:
        self.record.update(self.ask("warm_up"))

    def measure(self, turn: int) -> None:
        """Add the measurements of a turn: one, or several if other processes disturb it and there is no deadline."""
        attempts = ATTEMPTS if self.deadline == math.inf else 1
        measurements = repeat_while_disturbed(lambda: {"turn": turn} | self.ask("measure"), attempts, pause=1)
        self.record["measurements"] += measurements

    def count(self) -> None:
        self.record.update(self.ask("count"))
