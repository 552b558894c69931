"""One whole training step of Tripod beside what a user would pick: tokens/s, peak memory, page faults.

    python -m bench.step --size 14m --against hf,litgpt,plain

A step is forward, backward, clipping of the global norm at 1, fused AdamW and zero_grad, on random tokens, the same for
all. Every arm (tripod, hf, hf+compile, ...) is a process of its own, since peak memory and the allocator belong to a
process. All are started and warmed up; then each round lets them measure one after the other, in random order, while
the others wait blocked on a pipe. So all see the same machine, and what disturbs one for a while disturbs all.
"""

import json
import math
import os
import platform
import random
import re
import resource
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from argparse import SUPPRESS, Namespace
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median

import torch
from torch import Tensor
from tqdm import tqdm

import plan
from bench.peers import PACKAGES, build_peer, installed
from errors import Parser, UserError, run_command
from model import SIZES, Config, Pythia
from model.sizes import VOCAB_USED
from parallel import Gradients, Ranks
from step import Step, make_optimizer
from train import reuse_freed_memory

SEED = 1234
WARM_UP = 2  # steps, of which the first compiles
SHORTEST = 0.5  # seconds of one measurement, at least: the kernel counts foreign CPU time in ticks of 10 ms
FOREIGN = 0.06  # share of all CPU time that other processes may take in a measurement before it is made again
ATTEMPTS = 5  # of a measurement

# glibc's defaults return the logits to the system after every step and fault their pages in anew in the next.
TUNED = {"MALLOC_MMAP_THRESHOLD_": "4294967295", "MALLOC_TRIM_THRESHOLD_": "17179869184"}

# By how much first losses (in nats) and first gradient norms (relatively) of one network may differ.
AGREEMENT = {"fp32": (1e-4, 1e-3), "bf16": (5e-2, 5e-2)}


def parse(arguments: list[str]) -> Namespace:
    """The settings of a command line. Raises UserError on one that can not work."""
    parser = Parser(prog="bench.step", description=__doc__.split("\n\n")[0])
    parser.add_argument("--size", choices=list(SIZES), default="14m", help="which Pythia (default: 14m)")
    parser.add_argument("--against", default=",".join(PACKAGES), metavar="NAMES", help=f"of {', '.join(PACKAGES)}")
    parser.add_argument("--batch", type=int, default=4, metavar="N", help="rows of a step (default: 4)")
    parser.add_argument("--seq-len", type=int, default=512, metavar="N", help="tokens of a row (default: 512)")
    parser.add_argument("--precision", choices=list(AGREEMENT), default="fp32", help="bf16: autocast for the peers")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="measurements of every arm (default: 5)")
    parser.add_argument(
        "--allocator",
        choices=["tuned", "default", "both"],
        default="tuned",
        help="tuned: glibc keeps freed memory in every arm (default); default: each as a newcomer would run it, "
        "with nothing compiled before",
    )
    parser.add_argument("--no-compile", action="store_true", help="leave out the arms under torch.compile")
    parser.add_argument(
        "--alone",
        action="store_true",
        help="one arm in memory at a time, in two passes of opposite order: for shapes that do not fit together",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every raw number there")
    parser.add_argument("--arm", help=SUPPRESS)  # this process is that arm, started by the one that the user started
    s = parser.parse_args(arguments)
    # `compile` is the plain network, which like every peer runs eager and compiled
    s.against = list(dict.fromkeys("plain" if name == "compile" else name for name in s.against.split(",")))
    if unknown := set(s.against) - set(PACKAGES):
        raise UserError(f"--against knows {', '.join(PACKAGES)}, not {', '.join(sorted(unknown))}")
    for name in ("batch", "seq_len", "rounds"):
        if getattr(s, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} must be positive, not {getattr(s, name)}")
    if s.json and not s.json.parent.is_dir():
        raise UserError(f"--json {s.json}: there is no directory {s.json.parent}")
    return s


def shape(s: Namespace) -> Config:
    return replace(SIZES[s.size], seq_len=s.seq_len)


# One arm: a process that trains when told to


def training_step(s: Namespace, device: torch.device) -> Callable[[Tensor], tuple[float, float]]:
    """The step of the arm s.arm: tokens [batch, seq_len + 1] -> loss in nats, gradient norm before clipping.

    The weights of a peer are copied from ours, which are freed before the first step: they do not count in the peak.
    """
    name, compiled, bf16 = s.arm.removesuffix("+compile"), s.arm.endswith("+compile"), s.precision == "bf16"
    ours = Pythia(shape(s), SEED)
    if name != "tripod":
        network, loss_of = build_peer(name, ours)
        del ours
        network = network.to(device)
        optimizer, parameters = make_optimizer(network, 1e-3), list(network.parameters())
        network = torch.compile(network) if compiled else network

        def step(tokens: Tensor) -> tuple[float, float]:
            with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                loss = loss_of(network, tokens[:, :-1], tokens[:, 1:])
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            return loss.item(), norm.item()

        return step

    ours = ours.to(device)
    ours.compute_dtype = torch.bfloat16 if bf16 else torch.float32
    if compiled:
        for block in ours.blocks:
            block.compile()
    ranks = Ranks(device=device)
    one_step = Step(ours, Gradients(ours, ranks, "none"), make_optimizer(ours, 1e-3), ranks)

    def step(tokens: Tensor) -> tuple[float, float]:
        one_step.backward(tokens[None])
        loss, norm = one_step.update(1e-3).tolist()
        return loss, norm

    return step


def serve(s: Namespace) -> None:
    """Warm up, then answer every line on stdin with a measurement, some steps, as a line of JSON on stdout."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print must not mix with the answers
    if s.arm.startswith("tripod"):
        reuse_freed_memory()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    step, generator = training_step(s, device), torch.Generator().manual_seed(SEED)

    def timed_step() -> dict:
        tokens = torch.randint(VOCAB_USED, (s.batch, s.seq_len + 1), generator=generator).to(device)
        synchronize(device)
        before, began = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
        loss, norm = step(tokens)
        synchronize(device)
        seconds, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_SELF)
        faults = after.ru_minflt + after.ru_majflt - before.ru_minflt - before.ru_majflt
        return {"seconds": seconds, "page_faults": faults, "loss": loss, "gradient_norm": norm}

    def answer(**facts) -> None:
        print(json.dumps(facts | {"peak_bytes": peak_bytes(device)}), file=answers, flush=True)

    answer(warm_up=[timed_step() for _ in range(WARM_UP)], threads=torch.get_num_threads())
    for _ in sys.stdin:
        watch, steps = ForeignCPU(), [timed_step()]
        while sum(step["seconds"] for step in steps) < SHORTEST:
            steps.append(timed_step())
        answer(steps=steps, foreign_cpu=watch.share())


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def peak_bytes(device: torch.device) -> int:
    """The most memory that this process has held: of the device on CUDA, else resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


class ForeignCPU:
    """What share of the machine's CPU time other processes take from now on; None where there is no /proc."""

    def __init__(self):
        self.began, self.before = time.perf_counter(), self.foreign_seconds()

    def share(self) -> float | None:
        if self.before is None:
            return None
        seconds = time.perf_counter() - self.began
        return max(0.0, self.foreign_seconds() - self.before) / (seconds * os.cpu_count())

    @staticmethod
    def foreign_seconds() -> float | None:
        if not Path("/proc/stat").exists():
            return None
        own = resource.getrusage(resource.RUSAGE_SELF)
        with open("/proc/stat") as file:  # cpu user nice system idle iowait irq softirq steal ..., in ticks
            user, nice, system, _, _, irq, softirq, steal = map(int, file.readline().split()[1:9])
        busy = (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
        return busy - own.ru_utime - own.ru_stime


# The driver: starts the arms and gives each its turn


class ArmFailed(Exception):
    """An arm can not be measured; the message says why, in one line."""


class Arm:
    """A process that trains when told to; `with` ends it. What it answers is added to `record`."""

    def __init__(self, name: str, record: dict, arguments: list[str], allocator: str):
        self.record = record
        self.errors = tempfile.TemporaryFile()  # noqa: SIM115 (__exit__ closes it)
        self.cache = tempfile.TemporaryDirectory()  # a newcomer has compiled nothing yet
        settings = {"default": {"TORCHINDUCTOR_CACHE_DIR": self.cache.name}, "tuned": TUNED}
        environment = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "bench.step", *arguments, "--arm", name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            text=True,
            cwd=Path(__file__).parents[1],
            env=environment | settings[allocator],
        )

    def __enter__(self) -> "Arm":
        return self

    def __exit__(self, *_) -> None:
        try:
            self.process.communicate(timeout=10)  # an arm ends when stdin does
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.communicate()
        self.errors.close()
        self.cache.cleanup()

    def answer(self) -> dict:
        if line := self.process.stdout.readline():
            return json.loads(line)
        status = self.process.wait()
        if status == -signal.SIGKILL:
            raise ArmFailed("killed, it seems for lack of memory: try --alone or a smaller --batch")
        self.errors.seek(0)
        lines = self.errors.read().decode(errors="replace").strip().splitlines()
        raise ArmFailed(lines[-1] if lines else f"exit status {status}")

    def warm_up(self) -> None:
        before = self.record.get("peak_bytes", 0)  # of the first pass of --alone
        self.record.update(self.answer())
        self.record["peak_bytes"] = max(before, self.record["peak_bytes"])

    def measure(self, turn: int) -> None:
        """Have it measure, again while other processes disturb it; the least disturbed attempt is kept."""
        attempts = []
        while not attempts or (len(attempts) < ATTEMPTS and disturbed(attempts[-1])):
            time.sleep(len(attempts))  # what disturbs may pass
            try:
                self.process.stdin.write("measure\n")
                self.process.stdin.flush()
            except BrokenPipeError:
                pass  # it has ended: the missing answer tells why
            attempts.append({"turn": turn, "kept": False} | self.answer())
        min(attempts, key=lambda attempt: attempt["foreign_cpu"] or 0.0)["kept"] = True
        self.record["measurements"] += attempts
        self.record["peak_bytes"] = max(self.record["peak_bytes"], attempts[-1]["peak_bytes"])


def disturbed(measurement: dict) -> bool:
    return (measurement["foreign_cpu"] or 0.0) > FOREIGN


def compare(s: Namespace, arguments: list[str], allocator: str) -> dict[str, dict]:
    """A record of every arm under one allocator setting: warm_up, measurements, peak_bytes, or missing, the reason.

    Raises UserError when Tripod itself fails, an arm fails late, or one turns out to be another network.
    """
    suffixes = ("",) if s.no_compile else ("", "+compile")
    records = {name + suffix: {"measurements": []} for name in ("tripod", *s.against) for suffix in suffixes}

    def start(name: str, stack: ExitStack) -> Arm | None:
        network = name.removesuffix("+compile")
        try:
            if network != "tripod" and not installed(network):
                raise ArmFailed("not installed")
            arm = stack.enter_context(Arm(name, records[name], arguments, allocator))
            arm.warm_up()
        except ArmFailed as failure:
            if name == "tripod":
                raise UserError(f"tripod failed: {failure}") from None
            records[name] = {"missing": str(failure)}
            return None
        check_equal(s.precision, name, records[name]["warm_up"][0], records["tripod"]["warm_up"][0])
        return arm

    def measure(name: str, arm: Arm, turn: int) -> None:
        try:
            arm.measure(turn)
        except ArmFailed as failure:
            raise UserError(f"{name} failed while it was measured: {failure}") from None

    if s.alone:
        for first_turn, order in ((0, list(records)), (s.rounds, list(records)[::-1])):
            for name in tqdm(order, desc=f"arms ({allocator} allocator)"):
                with ExitStack() as stack:
                    if arm := "missing" not in records[name] and start(name, stack):
                        for turn in range(s.rounds):
                            measure(name, arm, first_turn + turn)
        return records
    with ExitStack() as stack:
        started = {name: start(name, stack) for name in tqdm(records, desc=f"warming up ({allocator} allocator)")}
        arms = [(name, arm) for name, arm in started.items() if arm]
        for turn in tqdm(range(s.rounds), desc="rounds"):
            random.Random(turn).shuffle(arms)
            for name, arm in arms:
                measure(name, arm, turn)
    return records


def check_equal(precision: str, name: str, theirs: dict, ours: dict) -> None:
    """Raise UserError unless the first step of an arm had the loss and the gradient norm of ours."""
    nats, relative = AGREEMENT[precision]
    same_loss = abs(theirs["loss"] - ours["loss"]) <= nats
    same_norm = abs(theirs["gradient_norm"] / ours["gradient_norm"] - 1) <= relative
    if not (same_loss and same_norm):
        values = [f"loss {step['loss']:.5f}, gradient norm {step['gradient_norm']:.5f}" for step in (theirs, ours)]
        raise UserError(f"{name} is another network: its first step has {values[0]}; tripod's has {values[1]}")


# The report


def gemm_rate(precision: str, device: torch.device) -> float:
    """FLOP/s of one product of two 2048 x 2048 matrices, the best of ten; of more when other processes disturb."""
    a, b = torch.randn(2, 2048, 2048, dtype=torch.bfloat16 if precision == "bf16" else torch.float32, device=device)
    best = math.inf
    for attempt in range(ATTEMPTS):
        time.sleep(attempt)
        watch = ForeignCPU()
        for _ in range(10):
            synchronize(device)
            began = time.perf_counter()
            a @ b
            synchronize(device)
            best = min(best, time.perf_counter() - began)
        if not disturbed({"foreign_cpu": watch.share()}):
            break
    return 2 * 2048**3 / best


def machine(device: torch.device) -> dict:
    """What was measured on."""
    cpu = platform.processor()
    if (cpuinfo := Path("/proc/cpuinfo")).exists():
        found = re.search(r"^model name\s*: (.*)$", cpuinfo.read_text(), re.MULTILINE)
        cpu = found[1] if found else cpu
    versions: dict[str, str | None] = {"python": platform.python_version()}
    for package in dict.fromkeys(("torch", *PACKAGES.values())):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = None
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    return {"cpu": cpu, "cores": os.cpu_count(), "gpu": gpu, "system": platform.platform(), "versions": versions}


def summarize(s: Namespace, record: dict) -> dict[str, float]:
    """tokens/s over the kept measurements (their median, least and most), seconds and page faults of a step."""
    kept = [measurement["steps"] for measurement in record["measurements"] if measurement["kept"]]
    seconds = [sum(step["seconds"] for step in steps) / len(steps) for steps in kept]
    tokens = s.batch * s.seq_len
    return {
        "tokens_per_s": tokens / median(seconds),
        "tokens_per_s_min": tokens / max(seconds),
        "tokens_per_s_max": tokens / min(seconds),
        "seconds_per_step": median(seconds),
        "first_step_seconds": record["warm_up"][0]["seconds"],
        "page_faults_per_step": median(step["page_faults"] for steps in kept for step in steps),
    }


def table(s: Namespace, records: dict[str, dict], gemm: float, peak: float | None) -> str:
    """One line an arm, then what disturbed the measurements. FLOPs as in Config.flops_per_token."""
    config = shape(s)
    flops, causal = config.flops_per_token(), config.flops_per_token(causal=True)
    fractions = {"MFU": flops / peak, "causal": causal / peak} if peak else {"of GEMM": flops / gemm}
    header = ("arm", "tokens/s", "min..max", "ms/step", "first s", "peak MB", "faults/step", "tripod/arm", *fractions)
    columns = "{:<16}{:>10}{:>16}{:>10}{:>9}{:>9}{:>13}{:>12}" + "{:>9}" * len(fractions)
    lines = [columns.format(*header)]
    for name, record in records.items():
        if "missing" in record:
            lines.append(f"{name:<16}{record['missing']}")
            continue
        m, late = record["summary"], any(m["kept"] and disturbed(m) for m in record["measurements"])
        rate = m["tokens_per_s"]
        lines.append(
            columns.format(
                name + "*" * late,
                f"{rate:,.0f}",
                f"{m['tokens_per_s_min']:,.0f}..{m['tokens_per_s_max']:,.0f}",
                f"{1e3 * m['seconds_per_step']:,.1f}",
                f"{m['first_step_seconds']:.1f}",
                f"{record['peak_bytes'] / 1e6:,.0f}",
                f"{m['page_faults_per_step']:,.0f}",
                f"{records['tripod']['summary']['tokens_per_s'] / rate:.3f}",
                *(f"{rate * fraction:.1%}" for fraction in fractions.values()),
            )
        )
    measurements = [m for record in records.values() for m in record.get("measurements", [])]
    bad = [m for m in measurements if disturbed(m)]
    lines.append(
        f"of {len(measurements)} measurements {len(bad)} were disturbed: other processes took more than {FOREIGN:.0%} "
        f"of the CPU; {sum(m['kept'] for m in bad)} of these had to be kept (*)"
    )
    if s.alone:
        drifts = [drift(s, name, record) for name, record in records.items() if "missing" not in record]
        lines.append("second pass over first: " + ", ".join(drifts))
    return "\n".join(lines)


def drift(s: Namespace, name: str, record: dict) -> str:
    """How much faster an arm was in the second pass of --alone than in the first."""
    halves = ([m for m in record["measurements"] if (m["turn"] >= s.rounds) == late] for late in (False, True))
    first, second = (summarize(s, record | {"measurements": half})["tokens_per_s"] for half in halves)
    return f"{name} {second / first - 1:+.1%}"


def main() -> None:
    s = parse(sys.argv[1:])
    if s.arm:
        return serve(s)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    facts, config = machine(device), shape(s)
    gemm, peak = gemm_rate(s.precision, device), plan.peak_flops(device)
    report = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join(["python", "-m", "bench.step", *sys.argv[1:]]),
        "settings": {name: value for name, value in vars(s).items() if name not in ("arm", "json")},
        "machine": facts,
        "gemm_flops_per_s": gemm,
        "peak_flops_per_s": peak,
        "flops_per_token": config.flops_per_token(),
        "flops_per_token_causal": config.flops_per_token(causal=True),
        "runs": {},
    }
    versions = ", ".join(f"{package} {found or 'not installed'}" for package, found in facts["versions"].items())
    print(f"{facts['gpu'] or facts['cpu']}, {facts['cores']} cores; {versions}; {report['date']}")
    print(
        f"Pythia {s.size}, {s.batch} x {s.seq_len} tokens a step, {s.precision}; product of 2048 x 2048 matrices "
        f"{gemm / 1e9:,.0f} GFLOP/s" + (f", datasheet peak in bf16 {peak / 1e9:,.0f}" if peak else "")
    )
    for allocator in ("default", "tuned") if s.allocator == "both" else (s.allocator,):
        records = compare(s, sys.argv[1:], allocator)
        for record in records.values():
            if "missing" not in record:
                record["summary"] = summarize(s, record)
        report["runs"][allocator] = records
        print(f"\n{allocator} allocator, {records['tripod']['threads']} threads")
        print(table(s, records, gemm, peak), flush=True)
        if s.json:
            s.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    run_command(main)
