"""The whole training step of Tripod beside its peers: tokens/s, MFU, peak memory, kernel launches, host syncs.

    python -m bench.step --size 160m --against hf,litgpt,liger,plain

A step is forward and backward of every micro-batch, clipping of the global norm at 1, fused AdamW and zero_grad. All
arms (tripod, hf, hf+compile, ...) train on the same random tokens, which are already on the device. Tripod's step is
the step of train.py. Every arm is a process of its own (bench/arm.py), because a process has one allocator and one peak
memory.

On a CPU all arms are started and warmed up. Then in each round the arms measure one after the other, in random order,
while the others wait on a pipe. So a slow phase of the machine slows all arms. On a GPU one arm may fill the memory, so
each arm starts, measures and ends before the next one starts.
"""

import json
import math
import random
import shlex
import sys
import time
from argparse import SUPPRESS, BooleanOptionalAction, Namespace
from collections.abc import Callable
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path
from statistics import median

import torch
from tqdm import tqdm

from bench.arm import Arm, ArmFailed, config_of, dtype_of, serve
from bench.ceilings import machine, matmul_ceiling
from bench.peers import PACKAGES, obstacle
from bench.report import shape_of, step_table
from bench.timing import disturbed, flush_of
from model import SUITE
from parallel.recompute import RECOMPUTE
from plan.time import peak_flops
from runtime.errors import Parser, UserError, run_command
from runtime.files import atomic_write

# How far the first loss (in nats) and the first gradient norm (relative) of an arm may differ from Tripod's.
AGREEMENT = {"fp32": (1e-4, 1e-3), "bf16": (5e-2, 5e-2), "own": (5e-2, 5e-2)}


def parse(arguments: list[str]) -> Namespace:
    """Parse the command line, with defaults for this machine. Raises UserError if a setting cannot work."""
    gpu = torch.cuda.is_available()
    parser = Parser(prog="bench.step", description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("--size", choices=list(SUITE), default="160m" if gpu else "14m", help="(default: 160m; on a CPU 14m)")
    add("--against", default=",".join(PACKAGES), metavar="NAMES", help=f"peers: {', '.join(PACKAGES)} (default: all)")
    add("--batch", type=int, default=8 if gpu else 4, metavar="N", help="rows of a micro-step (default: 8; on a CPU 4)")
    add("--micro-steps", type=int, default=1, metavar="N", help="of a step; train.py has 128 on one GPU (default: 1)")
    seq_len = 2048 if gpu else 512
    add("--seq-len", type=int, default=seq_len, metavar="N", help="tokens of a row (default: 2048; on a CPU 512)")
    precision = "bf16" if gpu else "fp32"
    add(
        "--precision",
        choices=list(AGREEMENT),
        default=precision,
        help="bf16: the peers run under autocast; own: the default of each, that of train.py --demo for Tripod and "
        "float32 for the peers (default: bf16; on a CPU fp32)",
    )
    add("--recompute", choices=RECOMPUTE, default="none", help="for Tripod only, as in train.py")
    add("--rounds", type=int, default=5, metavar="N", help="measurements of every arm (default: 5)")
    add("--seconds", type=float, metavar="N", help="time limit: fewer rounds, and no late arms")
    add(
        "--allocator",
        choices=["tuned", "default", "both"],
        default="tuned",
        help="tuned (if not given): glibc keeps freed memory in every arm; default: glibc's defaults and an empty "
        "compile cache, as on a first run",
    )
    add("--no-compile", action="store_true", help="skip the arms under torch.compile")
    add(
        "--alone",
        action=BooleanOptionalAction,
        default=gpu,
        help="one arm in memory at a time, in two passes of opposite order (one pass with --seconds): for shapes "
        "that do not fit together (default: on a GPU yes, on a CPU no)",
    )
    add("--json", type=Path, metavar="FILE", help="write every measurement to this file")
    add("--arm", help=SUPPRESS)  # this process is that arm; bench/arm.py starts it
    s = parser.parse_args(arguments)
    # `compile` means the plain network, which runs eager and compiled, as every peer does
    s.against = list(dict.fromkeys("plain" if name == "compile" else name for name in s.against.split(",")))
    if unknown := set(s.against) - set(PACKAGES):
        raise UserError(f"--against knows {', '.join(PACKAGES)}, not {', '.join(sorted(unknown))}")
    for name in ("batch", "micro_steps", "seq_len", "rounds", "seconds"):
        if getattr(s, name) is not None and not getattr(s, name) > 0:
            raise UserError(f"--{name.replace('_', '-')} must be positive, not {getattr(s, name)}")
    if s.json and not s.json.parent.is_dir():
        raise UserError(f"--json {s.json}: there is no directory {s.json.parent}")
    return s


class Comparison:
    """Measures all arms under one allocator setting.

    records[name] has warm_up, measurements, peak_bytes, threads and (on a GPU) calls. If an arm failed early, it has
    only `missing`, the reason. If it failed after a measurement, `stopped` is the reason. A failure of one arm does not
    affect the others.
    """

    def __init__(self, s: Namespace, arguments: list[str], allocator: str, deadline: float, save: Callable[[], None]):
        self.s, self.command, self.deadline, self.save = s, (arguments, allocator), deadline, save
        self.allocator = allocator
        suffixes = ("",) if s.no_compile else ("", "+compile")
        self.records = {name + suffix: {"measurements": []} for name in ("tripod", *s.against) for suffix in suffixes}

    def run(self) -> None:
        # Compiled arms come last, because compiling takes longest and the time may be limited.
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
                turn_end = now + (self.deadline - now) / (len(order) - i)  # the arms left get equal time
                self.attempt(name, arms, self.warm_up)
                for turn in range(first_turn, first_turn + self.s.rounds):
                    if turn == first_turn or time.monotonic() < turn_end:
                        self.attempt(name, arms, lambda name, arm: arm.measure(turn))  # noqa: B023
                if first_turn == 0:
                    self.count(arms, [name])
                if name in arms:
                    arms[name].end()

    def start(self, names: list[str], stack: ExitStack) -> dict[str, Arm]:
        """Start the arms that can run, all at once, and wait until each has imported its packages."""
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
        """Call work(name, arm) unless the arm has failed already. If it fails now, remove it from `arms`."""
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
        if torch.cuda.is_available():  # a CPU has no launches
            for name in names:
                self.attempt(name, arms, lambda name, arm: arm.count())


def check_equal(precision: str, name: str, theirs: dict, ours: dict) -> None:
    """Raise ArmFailed unless the first step of an arm has the loss and the gradient norm of the first arm, tripod."""
    nats, relative = AGREEMENT[precision]
    same_loss = abs(theirs["loss"] - ours["loss"]) <= nats
    same_norm = abs(theirs["gradient_norm"] / ours["gradient_norm"] - 1) <= relative
    if not (same_loss and same_norm):
        values = [f"loss {step['loss']:.5f}, gradient norm {step['gradient_norm']:.5f}" for step in (theirs, ours)]
        raise ArmFailed(f"{name} is another network: its first step has {values[0]}; tripod's has {values[1]}")


def summarize(s: Namespace, record: dict) -> dict[str, float]:
    """Statistics of the kept measurements of an arm.

    They are tokens/s (median, min and max), seconds and page faults of a step and, after two passes, by how much the
    second pass was faster than the first (0.01 means 1%).
    """
    kept = [m for m in record["measurements"] if m["kept"]]
    tokens = s.micro_steps * s.batch * s.seq_len  # of a step

    def rate(measurements: list[dict]) -> float:
        return tokens / median(m["seconds"] / m["steps"] for m in measurements)

    passes = [[m for m in kept if (m["turn"] >= s.rounds) == second] for second in (False, True)]
    drift = {"second_pass_over_first": rate(passes[1]) / rate(passes[0]) - 1} if all(passes) else {}
    return {
        "tokens_per_s": rate(kept),
        "tokens_per_s_min": min(rate([m]) for m in kept),
        "tokens_per_s_max": max(rate([m]) for m in kept),
        "seconds_per_step": tokens / rate(kept),
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
    host, config = machine(device), config_of(s)
    dtype = dtype_of(s, "tripod")
    report = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join(["python", "-m", "bench.step", *sys.argv[1:]]),
        "settings": {name: value for name, value in vars(s).items() if name not in ("arm", "json")},
        "machine": host,
        "gemm_flops_per_s": matmul_ceiling(dtype, device, flush_of(device)),
        "peak_flops_per_s": peak_flops(device) if dtype == torch.bfloat16 else None,
        "flops_per_token": config.flops_per_token(),
        "flops_per_token_causal": config.flops_per_token(causal=True),
        "runs": {},
    }
    if device.type == "cuda":
        torch.cuda.empty_cache()  # leave all memory to the arms

    def save() -> None:
        if s.json:
            with atomic_write(s.json, "w") as file:
                file.write(json.dumps(report, indent=1) + "\n")

    versions = ", ".join(f"{package} {found or 'not installed'}" for package, found in host["versions"].items())
    print(f"{host['gpu'] or host['cpu']}, {host['cores']} cores; {versions}; {report['date']}")
    peak = report["peak_flops_per_s"]
    print(
        f"Pythia {s.size}, {shape_of(vars(s))} tokens a step, {s.precision}; large matmul "
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
