"""Train a Pythia from nothing: settings -> data -> model -> loop.

    torchrun train.py --size 14m --demo                 two minutes on a laptop, real text, real checkpoints
    torchrun train.py --size 1.4b --data PREFIX         the published run: 143,000 steps of 1024 rows of 2048 tokens
    torchrun --nproc-per-node 8 train.py ...            the same run on eight GPUs

The step t of a run trains on batch(t), rows [1024 t, 1024 (t + 1)) of the shuffled order: a run is a function of
(size, data, seed), and resuming is starting at t. Checkpoint stepN has made N steps; the record of step t in
metrics.jsonl is the loss of stepT's weights on batch(t), the batch that `python data.py view --step t` shows.
"""

import json
import math
import os
import platform
import sys
import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import numpy as np
import torch

import data
from checkpoints import manifest, resume
from checkpoints.save import Saver
from corpus.loader import Loader, digest
from kernels import backend
from model import SIZES, Config, Pythia
from model.huggingface import read_config, read_weights
from model.sizes import is_published_step
from parallel.fsdp import RECOMPUTE, SHARD, init_weights, local, local_rows, set_recompute, shard_weights
from parallel.gradients import Gradients
from plan.memory import Job, choose_shard
from plan.report import parse_machine, report
from plan.time import peak_flops
from runtime.errors import Parser, UserError, run_command
from runtime.host import StopSignal, reuse_freed_memory, supports_bf16_matmul
from runtime.metrics import LOGGERS, Metrics, profiler
from runtime.ranks import Dist, end_dist, init_dist
from runtime.run_directory import lock
from runtime.watchdog import Watchdog
from step import LossScaler, Step, learning_rate, make_optimizer

# Settings


def setting(default, help: str, fixed: bool = True, **argument):
    """A field that is also a flag. One that is not fixed may differ when a run is resumed: at most rounding changes."""
    return field(default=default, metadata={"help": help, "fixed": fixed, "argument": argument})


@dataclass
class Settings:
    """Every setting of a run: the command line and run.json are this class."""

    size: str = setting("", "which Pythia", choices=list(SIZES), required=True)
    data: str = setting(
        "demo", "PREFIX of a Megatron .bin/.idx, a directory of pre-shuffled rows, or `demo` (default)", fixed=False
    )
    out: str = setting("", "run directory (default: runs/pythia-SIZE)", fixed=False)
    demo: bool = setting(False, "a run of some two minutes on a laptop: demo data, few steps, small batch", fixed=False)
    plan: bool = setting(False, "print parameters, FLOPs, memory and days expected, then exit", fixed=False)
    plan_for: str = setting("", "the machine of the plan, such as 16xA100-40GB (default: 8xH100)", fixed=False)
    seed: int = setting(1234, "of the initial weights and of the data order")
    init_from: str = setting("", "start from the weights of this Hugging Face directory instead of random ones")
    steps: int = setting(143_000, "optimizer steps; the learning-rate schedule spans them")
    stop_at: int = setting(0, "pause, with a checkpoint, when this many steps are made", fixed=False)
    batch_size: int = setting(1024, "rows of one optimizer step")
    micro_batch: int = setting(0, "rows of one forward and backward pass of a rank (default: at most 8)", fixed=False)
    seq_len: int = setting(2048, "tokens of a row")
    lr: float = setting(0.0, "peak learning rate (default: the one that the size was trained with)")
    schedule: str = setting(
        "published", "cosine of GPT-NeoX v1.0 (published) or of the textbooks (cosine)", choices=["published", "cosine"]
    )
    precision: str = setting(
        "",
        "of products and activations (default: bf16 on a GPU or a CPU made for it, else fp32)",
        choices=["bf16", "fp16", "fp32"],
    )
    shard: str = setting(
        "auto",
        "what ranks divide: all (full), all within a node (hybrid), gradients and moments (grad), nothing (none)",
        False,
        choices=SHARD,
    )
    bitwise: bool = setting(False, "the same bits on 1, 2, 4, 8 ... ranks, for more traffic between them")
    recompute: str = setting(
        "none", "activations to compute again in the backward pass, to save memory", fixed=False, choices=RECOMPUTE
    )
    compile: bool = setting(False, "torch.compile every block")
    kernels: str = setting(
        "auto",
        "of the hot paths: triton, torch (their definitions), auto: triton on a GPU",
        False,
        choices=backend.KERNELS,
    )
    gelu: str = setting("tanh", "in training: tanh as published, or none for the exact erf", choices=["tanh", "none"])
    export_gelu: str = setting(
        "published",
        "in config.json of the checkpoints: the published erf form, or the one in training (trained)",
        choices=["published", "trained"],
    )
    keep_state: int = setting(2, "how many of the newest checkpoints can be resumed from", fixed=False)
    timeout: float = setting(
        1800.0, "seconds without progress until a rank that hangs is named and the run ends (default: 1800)", False
    )
    profile: int = setting(0, "write a torch trace of this many steps, of every rank, to RUN/profile", False)
    log: str = setting("", "also log to tensorboard, wandb, or both (tensorboard,wandb)", fixed=False)


EXIT_RETRY = 75  # exit status: "temporary failure, try again" (EX_TEMPFAIL of BSD's sysexits.h)
DEMO = {**data.DEMO, "lr": 3e-3}  # sixty steps are too few for the published rate


def parse(arguments: list[str]) -> Settings:
    """The settings of a command line, every default resolved. Raises UserError on one that can not work."""
    parser = Parser(prog="train.py", description=__doc__.split("\n\n")[0], epilog="The same line again resumes a run.")
    for f in fields(Settings):
        options = {"help": f.metadata["help"], "default": f.default, **f.metadata["argument"]}
        options |= {"action": "store_true"} if f.type is bool else {"type": f.type}
        if f.type is not bool and "choices" not in options:
            options["metavar"] = {int: "N", float: "X", str: "NAME"}[f.type]
        parser.add_argument("--" + f.name.replace("_", "-"), **options)
    if "--demo" in arguments:
        parser.set_defaults(**DEMO)
    s = Settings(**vars(parser.parse_args(arguments)))

    s.out = s.out or f"runs/pythia-{s.size}"
    s.lr = s.lr or SIZES[s.size].lr
    bf16 = s.plan or torch.cuda.is_available() or (s.demo and supports_bf16_matmul())
    s.precision = s.precision or ("bf16" if bf16 else "fp32")
    world = int(os.environ.get("WORLD_SIZE", 1))
    share = s.batch_size // (8 if s.bitwise else world)  # bitwise: micro-batches are the same whatever the ranks
    s.micro_batch = s.micro_batch or math.gcd(8, max(share, 1))
    for name in ("steps", "batch_size", "micro_batch", "seq_len", "keep_state", "lr", "timeout"):
        if not getattr(s, name) > 0:
            raise UserError(f"--{name.replace('_', '-')} must be positive, not {getattr(s, name)}")
    if s.profile < 0:
        raise UserError(f"--profile {s.profile} is no number of steps")
    if s.bitwise and s.shard in ("none", "hybrid"):
        raise UserError(f"--bitwise divides weights among all ranks: use --shard auto, grad or full, not {s.shard}")
    if not 0 <= s.stop_at <= s.steps:
        raise UserError(f"--stop-at {s.stop_at} lies outside the {s.steps} steps of the run")
    if unknown := set(filter(None, s.log.split(","))) - set(LOGGERS):
        raise UserError(f"--log knows {' and '.join(LOGGERS)}, not {', '.join(sorted(unknown))}")
    data.row_numbers(0, s.batch_size, s.micro_batch, 0, world)  # refuses a batch that does not divide
    try:
        backend.choose("auto" if s.plan else s.kernels)  # a plan may be for another machine than this one
    except ValueError as error:
        raise UserError(f"--kernels {s.kernels}: {error}") from None
    return s


# The run


def train(s: Settings) -> None:
    ranks, finished = init_dist(s.bitwise), False
    try:
        with ExitStack() as resources:
            status = run_steps(s, ranks, resources)
        finished = True
    except UserError as error:
        if not ranks.claim_error_report(str(error)):
            raise SystemExit(1) from None
        raise
    finally:
        end_dist(ranks, together=finished)
    if status:
        raise SystemExit(status)


def run_steps(s: Settings, ranks: Dist, resources: ExitStack) -> int:
    """Train. What must be closed at the end, also after an error, goes into `resources`. Returns an exit status."""
    config, device = replace(SIZES[s.size], gelu=s.gelu), ranks.device
    open_rows = partial(data.open_rows, s.data, data.requested_samples(s.steps, s.batch_size), s.seq_len, s.seed)
    rows = ranks.run_on_main(open_rows) or open_rows()  # the first leaves the order of the data for all
    if s.steps * s.batch_size > len(rows):
        raise UserError(
            f"--steps {s.steps} needs {s.steps * s.batch_size} rows, {s.data} has {len(rows)}: lower --steps"
        )
    run, facts = Path(s.out), data.fingerprint(rows)
    ranks.run_on_main(partial(enter_run, run, s, facts, resources))
    resumed = resume.latest_valid_step(run, ranks)
    start, last = resumed or 0, s.stop_at or s.steps
    if start >= last:
        made = f"is finished: it has made all {s.steps} steps" if start == s.steps else f"is at step {start}"
        ranks.print(f"{run} {made}")
        return 0
    share = s.batch_size, s.micro_batch, ranks.rank, ranks.world_size
    data.check_vocab(data.batch(rows, start, *share), config.vocab, start, ranks.rank, ranks.world_size)

    model, gradients = initial_model(s, config, ranks)
    set_recompute(model, s.recompute)
    if s.compile:
        for block in model.blocks:
            block.compile()
    optimizer = make_optimizer(model, s.lr)
    scaler = LossScaler() if s.precision == "fp16" else None
    updates = 0  # successful ones: what the learning rate depends on
    if resumed is not None:
        counters = resume.restore(run / f"step{start}", model, optimizer, ranks, verified=True)
        updates = counters["updates"]
        if scaler:
            vars(scaler).update(counters["scaler"])

    ranks.run_on_main(partial(record_start, run, s, facts, start, ranks))
    ranks.print(
        f"{run}: {config.parameters:,} parameters on {ranks.world_size} x {device.type}, {s.precision}; "
        f"step {start} to {last} of {s.steps}, each {s.batch_size} rows of {s.seq_len} tokens"
    )
    stop = StopSignal()
    tokens_per_step, peak = s.batch_size * s.seq_len, peak_flops(device)
    hidden_act = "gelu_pytorch_tanh" if (s.export_gelu, s.gelu) == ("trained", "tanh") else "gelu"
    loggers = list(filter(None, s.log.split(",")))
    metrics = ranks.run_on_main(lambda: resources.enter_context(Metrics(run, start, s.steps, loggers, asdict(s))))
    profiled = resources.enter_context(profiler(run, start, s.profile, ranks.rank))
    watchdog = resources.enter_context(Watchdog(ranks, s.timeout))
    # On a CPU others compute in float32, and get the weights in it: rounded ones would have other logits.
    dtype = torch.float32 if (device.type, s.precision) == ("cpu", "bf16") else model.compute_dtype
    form = dtype, hidden_act, data.find_tokenizer(s.data)  # of the checkpoints
    saver = Saver(run, model, optimizer, ranks, *form, s.keep_state, heartbeat=watchdog.heartbeat)
    resources.callback(saver.wait)
    if resumed is None:
        saver.save(0, {"updates": 0, "scaler": scaler and vars(scaler)})

    def read(step: int) -> np.ndarray:
        batch = data.batch(rows, step, *share)  # [micro_steps, micro_batch, seq_len + 1]: this rank's rows
        data.check_vocab(batch, config.vocab, step, ranks.rank, ranks.world_size)
        return batch

    loader = resources.enter_context(Loader(read, start, last, device))
    one_step = Step(model, gradients, optimizer, ranks)
    for step in range(start, last):
        watchdog.heartbeat(step, "reading rows")
        began = time.perf_counter()
        batch = loader.next()
        waited = time.perf_counter() - began

        watchdog.heartbeat(step, "forward and backward")
        scale = scaler.scale if scaler else 1.0
        one_step.forward_backward(batch.tokens, scale)
        watchdog.heartbeat(step, "exchanging gradients, updating weights")
        lr = learning_rate(updates, s.steps, s.lr, s.schedule)
        saver.wait_for_snapshot()
        loss, norm = one_step.update(lr).tolist()  # the one host sync of the step

        overflow = scaler is not None and not math.isfinite(norm)
        if not overflow and not math.isfinite(loss + norm):
            saver.finish()
            first, good = step * s.batch_size, manifest.steps_with_state(run)[-1]
            raise UserError(
                f"step {step}, rows {first} to {first + s.batch_size - 1}: loss {loss}, gradient norm {norm}; "
                f"stopped before the update, the last good checkpoint is {run}/step{good}"
            )
        updates += not overflow
        if scaler:
            scaler.update(overflow)
            if scaler.overflows == 50:  # as DeepSpeed
                raise UserError(f"50 steps in a row overflowed float16, up to step {step}: try --precision bf16")

        seconds = time.perf_counter() - began
        mine = [stop.requested, saver.failure is not None, waited, one_step.compute_seconds()]
        stopping, failed, data_seconds, compute_seconds = ranks.all_gather(torch.tensor(mine)).T  # [ranks] each
        digests = ranks.all_gather(batch.digests)  # [ranks, micro_steps, micro_batch, 32]
        if metrics:
            metrics.record(
                step=step,
                loss=loss,
                lr=lr,
                grad_norm=norm,
                tokens=(step + 1) * tokens_per_step,
                tokens_per_s=tokens_per_step / seconds,
                mfu=peak and tokens_per_step / seconds * config.flops_per_token(s.seq_len) / (peak * ranks.world_size),
                seconds=seconds,
                data_seconds=[round(t, 6) for t in data_seconds.tolist()],
                compute_seconds=[round(t, 6) for t in compute_seconds.tolist()],
                loss_scale=scale,
                batch_sha256=digest(digests.transpose(0, 1).numpy()),
            )
        profiled()
        if failed.any():
            saver.finish()  # raises what went wrong
        if is_published_step(step + 1, last) or stopping.any():
            watchdog.heartbeat(step, "saving")
            saver.save(step + 1, {"updates": updates, "scaler": scaler and vars(scaler)})
        if stopping.any():
            break
    saver.finish()
    if step + 1 == s.steps:
        ranks.print(f"finished. Try: python generate.py --checkpoint {run}/step{step + 1} --prompt 'def '")
    else:
        goes_on = f"the same line{' without --stop-at' * bool(s.stop_at)} goes on"
        ranks.print(f"paused at step {step + 1} of {s.steps}; {goes_on}")
    # Where only another node was told to stop, torchrun is to start again without it, as it does after a failure.
    restarts = int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0))
    return EXIT_RETRY if stopping.any() and not stop.requested and restarts else 0


def initial_model(s: Settings, config: Config, ranks: Dist) -> tuple[Pythia, Gradients]:
    """The model before its first step, sharded: random as published, or from --init-from.

    It is built without memory, so that no rank ever holds more than its part of the random weights.
    """
    if s.init_from:
        stored = read_config(s.init_from)
        for name in ("layers", "hidden", "heads", "vocab", "ffn", "rotary_dim", "parallel"):
            if getattr(stored, name) != getattr(config, name):
                raise UserError(f"--init-from {s.init_from} is no {config.name}: {name} is {getattr(stored, name)}")
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[s.precision]
    with torch.device("meta"):
        model = Pythia(config)
    model.compute_dtype = dtype
    shard, whole_gradients = choose_sharding(s, config, ranks)
    shard_weights(model, shard, ranks, dtype)
    model.to_empty(device=ranks.device)
    if s.init_from:
        parameters = dict(model.named_parameters())
        with torch.no_grad():
            for name, weight in read_weights(s.init_from, model):
                local(parameters[name]).copy_(weight[local_rows(parameters[name])])
    else:
        init_weights(model, s.seed)
    return model, Gradients(model, ranks, shard, whole_gradients, s.bitwise)


def choose_sharding(s: Settings, config: Config, ranks: Dist) -> tuple[str, bool]:
    """What --shard auto means here, and whether a rank has the memory to add up gradients of all weights.

    On GPUs, what fits with the least traffic between ranks; on CPUs, which are for trying things out, as little as can
    be.
    """
    choice = ("grad", "full") if s.bitwise else ()
    choice = choice if s.shard == "auto" else (s.shard,)
    if ranks.device.type == "cpu":
        return (*choice, "none")[0], True
    memory = torch.tensor(-torch.cuda.get_device_properties(ranks.device).total_memory, device=ranks.device)
    smallest = -ranks.all_reduce_max(memory).item()  # all ranks must choose alike
    job = Job(config, s.batch_size, s.micro_batch, s.seq_len, s.precision, s.recompute)
    job = replace(job, world_size=ranks.world_size, local_world_size=ranks.local_world_size)
    chosen = choose_shard(job, smallest, choice)
    return chosen.shard, chosen.whole_gradients


def enter_run(run: Path, s: Settings, facts: dict, resources: ExitStack) -> None:
    """Lock the run directory, refuse one that holds something else, and remove what a killed save has left."""
    check_directory(run)
    resources.enter_context(lock(run))
    check_run(run, s, facts)
    manifest.clean_up(run)


def check_directory(run: Path) -> None:
    """Refuse a directory that is no run: nothing is written into it."""
    lonely = {"run.json", ".run.json.tmp", ".lock"}  # of a start that was killed
    if (
        run.exists()
        and not (run / "run.json").exists()
        and (not run.is_dir() or {p.name for p in run.iterdir()} - lonely)
    ):
        raise UserError(f"{run} exists and is no run directory: choose another --out")


def check_run(run: Path, s: Settings, facts: dict) -> None:
    """Refuse a run directory that holds another run, or one on other data."""
    path = run / "run.json"
    if not path.exists():
        return
    try:
        stored = json.loads(path.read_text())
        settings, order = stored["settings"], stored["data"]["order_sha256"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged ({error!r}): choose another --out") from None
    differing = [
        f"--{f.name.replace('_', '-')} ({settings.get(f.name)} there, {getattr(s, f.name)} here)"
        for f in fields(Settings)
        if (f.metadata["fixed"] or (s.bitwise and f.name == "micro_batch"))
        and settings.get(f.name) != getattr(s, f.name)
    ]
    if order != facts["order_sha256"]:
        differing.append(f"the order of the data (sha256 {order[:12]}… there, {facts['order_sha256'][:12]}… here)")
    if differing:
        raise UserError(f"{run} is a run with other settings: {', '.join(differing)}; choose another --out")


def record_start(run: Path, s: Settings, facts: dict, step: int, ranks: Dist) -> None:
    """Note in run.json that the run starts, or goes on, at this step: settings and data, then a line a start."""
    run.mkdir(parents=True, exist_ok=True)
    path, temporary = run / "run.json", run / ".run.json.tmp"
    stored = json.loads(path.read_text()) if path.exists() else {"settings": asdict(s), "data": facts, "starts": []}
    stored["starts"].append(
        {
            "step": step,
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
            "command": " ".join(sys.argv),
            "host": platform.node(),
            "ranks": ranks.world_size,
            "device": torch.cuda.get_device_name() if ranks.device.type == "cuda" else platform.processor() or "cpu",
            "threads": torch.get_num_threads(),
            "python": platform.python_version(),
            "torch": torch.__version__,
        }
    )
    temporary.write_text(json.dumps(stored, indent=1) + "\n")
    temporary.rename(path)


def main() -> None:
    first = os.environ.get("RANK", "0") == "0"  # all ranks read the same line: one answers
    try:
        s = parse(sys.argv[1:])
        if s.plan:
            job = Job(SIZES[s.size], s.batch_size, s.micro_batch, s.seq_len, s.precision, s.recompute, s.shard)
            text = report(job, s.steps, parse_machine(s.plan_for, s.batch_size))
    except UserError:
        if not first:
            raise SystemExit(1) from None
        raise
    if s.plan:
        if first:
            print(text)
        return
    reuse_freed_memory()
    train(s)


if __name__ == "__main__":
    run_command(main)
