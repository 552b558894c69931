"""Train a Pythia from nothing: settings, set-up, and the loop.

    torchrun train.py --size 14m --demo                 two minutes on a laptop: real text, real checkpoints
    torchrun train.py --size 1.4b --data PREFIX         the published run: 143,000 steps of 1024 rows of 2048 tokens
    torchrun --nproc-per-node 8 train.py ...            the same run on eight GPUs

Step t trains on batch(t): rows [1024 t, 1024 (t + 1)) of the shuffled order. So a run is a function of (size, data,
seed), and resuming means starting at t. Checkpoint stepN has made N steps. Record t of metrics.jsonl has the loss of
checkpoint stepT on batch(t), and `python data.py view --step t` shows that batch.
"""

import math
import os
import sys
import time
from argparse import RawDescriptionHelpFormatter
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch

import data
from checkpoints.manifest import clean_up, steps_with_state
from checkpoints.resume import latest_valid_step, restore
from checkpoints.save import Saver
from corpus.loader import Batch, Loader, digest
from data import DEFAULTS
from kernels import backend
from model import SIZES, Config, Pythia
from model.huggingface import Export, read_config, read_weights
from model.sizes import is_published_step
from parallel.fsdp import SHARD, init_weights, local, local_rows, shard_weights
from parallel.gradients import Gradients
from parallel.recompute import RECOMPUTE, set_recompute
from plan.memory import Job, choose_shard
from plan.report import parse_machine, report
from plan.time import peak_flops
from runtime.errors import Parser, UserError, run_command
from runtime.host import StopSignal, reuse_freed_memory, supports_bf16_matmul
from runtime.metrics import LOGGERS, Metrics, profiler
from runtime.ranks import Dist, end_dist, init_dist
from runtime.run_directory import check_same_run, flag, lock, record_start, refuse_other_directory
from runtime.watchdog import Watchdog
from step import LossScaler, Step, learning_rate, make_optimizer

EXIT_RETRY = 75  # EX_TEMPFAIL of BSD's sysexits.h: "temporary failure, try again"
DEMO = {**data.DEMO, "lr": 3e-3}  # sixty steps are too few for the published rate
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}

# ---- settings --------------------------------------------------------------------------------------------------------


def setting(default, help: str, fixed: bool = True, **options):
    """A field that is also a flag. fixed=False: the value may change on resume; it affects rounding at most."""
    return field(default=default, metadata={"help": help, "fixed": fixed, "options": options})


@dataclass
class Settings:
    """Every setting of a run. The command line and run.json are made from this class."""

    size: str = setting("", "which Pythia", choices=list(SIZES), required=True)
    data: str = setting(DEFAULTS["data"], "PREFIX of a .bin/.idx, directory of pre-shuffled rows, or `demo`", False)
    out: str = setting("", "run directory (default: runs/pythia-SIZE)", False)
    demo: bool = setting(False, "a run of about two minutes on a laptop: demo data, few steps, small batch", False)
    plan: bool = setting(False, "print parameters, FLOPs, memory and expected days, then exit", False)
    plan_for: str = setting("", "with --plan: the machine, for example 16xA100-40GB (default: 8xH100)", False)
    seed: int = setting(DEFAULTS["seed"], "seed of the initial weights and of the data order")
    init_from: str = setting("", "start from the weights of this Hugging Face directory instead of random weights")
    steps: int = setting(DEFAULTS["steps"], "optimizer steps; the learning-rate schedule spans them")
    stop_at: int = setting(0, "pause after this many steps and save a checkpoint", False)
    batch_size: int = setting(DEFAULTS["batch_size"], "rows of one optimizer step, over all ranks")
    micro_batch: int = setting(0, "rows of one forward and backward pass on one rank (default: at most 8)", False)
    seq_len: int = setting(DEFAULTS["seq_len"], "tokens of a row")
    lr: float = setting(0.0, "peak learning rate (default: the published rate of the size)")
    schedule: str = setting(
        "published", "cosine: of GPT-NeoX v1.0, or of the textbook", choices=["published", "cosine"]
    )
    precision: str = setting(
        "",
        "dtype of matmuls (default: bf16 on GPUs, and for --demo on CPUs that have it, else fp32)",
        choices=list(DTYPES),
    )
    shard: str = setting(
        "auto", "what ranks divide: all, all within a node, gradients and moments, or nothing", False, choices=SHARD
    )
    bitwise: bool = setting(False, "the same bits on 1, 2, 4, 8 ... ranks; costs more traffic between ranks")
    recompute: str = setting("none", "activations to recompute in backward, to save memory", False, choices=RECOMPUTE)
    compile: bool = setting(False, "torch.compile every block")
    kernels: str = setting("auto", "hot paths: Triton, torch, auto (Triton on GPUs)", False, choices=backend.KERNELS)
    gelu: str = setting("tanh", "GELU of training: tanh as published, or none: exact erf", choices=["tanh", "none"])
    keep_state: int = setting(2, "how many of the newest checkpoints keep the state that resuming needs", False)
    timeout: float = setting(1800.0, "seconds without progress until a hanging rank is named and the run ends", False)
    profile: int = setting(0, "write a torch trace of this many steps, of every rank, to RUN/profile", False)
    log: str = setting("", "also log to tensorboard, wandb, or both (tensorboard,wandb)", False)


def parse(arguments: list[str]) -> Settings:
    """The settings of a command line with every default resolved. Raises UserError for settings that cannot work."""
    description = "\n\n".join(__doc__.split("\n\n")[:2])
    parser = Parser("train.py", description=description, formatter_class=RawDescriptionHelpFormatter)
    parser.epilog = "The same command again resumes a run."
    for f in fields(Settings):
        options = {"help": f.metadata["help"], "default": f.default, **f.metadata["options"]}
        options |= {"action": "store_true"} if f.type is bool else {"type": f.type}
        if f.default and "default" not in options["help"]:
            options["help"] += " (default: %(default)s)"
        if f.type is not bool and "choices" not in options:
            options["metavar"] = {int: "N", float: "X", str: "NAME"}[f.type]
        parser.add_argument(flag(f.name), **options)
    if "--demo" in arguments:
        parser.set_defaults(**DEMO)
    s = Settings(**vars(parser.parse_args(arguments)))

    world_size = int(os.environ.get("WORLD_SIZE", 1))
    s.out = s.out or f"runs/pythia-{s.size}"
    s.lr = s.lr or SIZES[s.size].lr
    bf16 = s.plan or torch.cuda.is_available() or (s.demo and supports_bf16_matmul())
    s.precision = s.precision or ("bf16" if bf16 else "fp32")
    rank_rows = s.batch_size // (8 if s.bitwise else world_size)  # bitwise: the same micro-batches on 1 to 8 ranks
    s.micro_batch = s.micro_batch or math.gcd(8, max(rank_rows, 1))
    check(s, world_size)
    return s


def check(s: Settings, world_size: int) -> None:
    """Raise UserError for settings that cannot work, and choose the kernels."""
    for name in ("steps", "batch_size", "micro_batch", "seq_len", "keep_state", "lr", "timeout"):
        if not getattr(s, name) > 0:
            raise UserError(f"{flag(name)} must be positive, not {getattr(s, name)}")
    if s.profile < 0:
        raise UserError(f"--profile must be a number of steps, not {s.profile}")
    if s.bitwise and s.shard in ("none", "hybrid"):
        raise UserError(f"--bitwise divides weights among all ranks: use --shard auto, grad or full, not {s.shard}")
    if not 0 <= s.stop_at <= s.steps:
        raise UserError(f"--stop-at {s.stop_at} lies outside the {s.steps} steps of the run")
    if unknown := set(filter(None, s.log.split(","))) - set(LOGGERS):
        raise UserError(f"--log knows {' and '.join(LOGGERS)}, not {', '.join(sorted(unknown))}")
    data.row_numbers(0, s.batch_size, s.micro_batch, 0, world_size)  # raises if the batch does not divide
    try:
        backend.choose("auto" if s.plan else s.kernels)  # a plan may be for another machine
    except ValueError as error:
        raise UserError(f"--kernels {s.kernels}: {error}") from None


# ---- the run ---------------------------------------------------------------------------------------------------------


def train(s: Settings) -> None:
    """Train on this rank. Raises UserError, or SystemExit if the exit status is not 0."""
    dist, finished = init_dist(s.bitwise), False
    try:
        with ExitStack() as stack:
            status = run(s, dist, stack)
        finished = True
    except UserError as error:
        if not dist.claim_error_report(str(error)):
            raise SystemExit(1) from None
        raise
    finally:
        end_dist(dist, together=finished)
    if status:
        raise SystemExit(status)


def run(s: Settings, dist: Dist, stack: ExitStack) -> int:
    """Train, from the newest checkpoint if there is one. Returns the exit status; `stack` closes what the run opens."""
    run_dir, rows = Path(s.out), open_rows(s, dist)
    fingerprint = claim_run_directory(run_dir, s, rows, dist, stack)
    saved = latest_valid_step(run_dir, dist)  # None: no checkpoint yet
    start, stop = saved or 0, s.stop_at or s.steps
    if start >= stop:
        done = f"is finished: it has made all {s.steps} steps" if start == s.steps else f"is at step {start}"
        dist.print(f"{run_dir} {done}")
        return 0
    read = partial(read_batch, s, rows, dist)
    read(start)  # reports a token outside the vocabulary before anything is written

    trainer, updates, scaler = build(s, dist, run_dir, saved)
    dist.run_on_main(partial(record_start, run_dir, asdict(s), fingerprint, start, dist))
    dist.print(
        f"{run_dir}: {SIZES[s.size].parameters:,} parameters on {dist.world_size} x {dist.device.type}, {s.precision}; "
        f"step {start} to {stop} of {s.steps}, each {s.batch_size} rows of {s.seq_len} tokens"
    )
    stop_signal, watchdog = StopSignal(), stack.enter_context(Watchdog(dist, s.timeout))
    log = StepLog(s, run_dir, start, dist, stack)
    saver = open_saver(s, run_dir, trainer, watchdog, stack)
    if saved is None:
        saver.save(0, {"updates": 0, "scaler": scaler and vars(scaler)})
    loader = stack.enter_context(Loader(read, start, stop, dist.device))

    for step in range(start, stop):
        # ---- one training step ---------------------------------------------------------------
        watchdog.heartbeat(step, "reading rows")
        began = time.perf_counter()
        batch = loader.next()  # tokens [micro_steps, micro_batch, seq_len + 1]
        data_seconds = time.perf_counter() - began
        watchdog.heartbeat(step, "forward and backward")
        loss_scale = scaler.scale if scaler else 1.0
        trainer.forward_backward(batch.tokens, loss_scale)
        watchdog.heartbeat(step, "exchanging gradients, updating weights")
        lr = learning_rate(updates, s.steps, s.lr, s.schedule)
        saver.wait_for_snapshot()  # weights must not change while they are copied
        loss, grad_norm = trainer.update(lr).tolist()  # the only host sync of the step
        updates += not overflowed(s, step, loss, grad_norm, scaler, saver)

        # ---- everything below is logging and saving -------------------------------------------
        seconds = time.perf_counter() - began
        own = stop_signal.requested, saver.failure is not None, data_seconds, trainer.compute_seconds()
        stopping, save_failed = log.record(step, batch, own, seconds, loss_scale, loss=loss, lr=lr, grad_norm=grad_norm)
        if save_failed:
            saver.finish()  # raises the error
        if is_published_step(step + 1, stop) or stopping:
            watchdog.heartbeat(step, "saving")
            saver.save(step + 1, {"updates": updates, "scaler": scaler and vars(scaler)})
        if stopping:
            break
    saver.finish()
    announce_end(s, run_dir, step + 1, dist)
    # If only another node was told to stop, torchrun restarts without that node, as after a failure.
    restarts = int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0))
    return EXIT_RETRY if stopping and not stop_signal.requested and restarts else 0


# ---- set-up, in the order of run() -----------------------------------------------------------------------------------


def open_rows(s: Settings, dist: Dist) -> data.Rows:
    """The rows of the run in their order. Raises UserError if they do not suffice."""
    needed, samples = s.steps * s.batch_size, data.requested_samples(s.steps, s.batch_size)
    open_here = partial(data.open_rows, s.data, samples, s.seq_len, s.seed)
    rows = dist.run_on_main(open_here)  # builds the cache of the order, once for all ranks
    rows = rows if dist.is_main else open_here()
    if needed > len(rows):
        raise UserError(f"--steps {s.steps} needs {needed} rows, {s.data} has {len(rows)}: lower --steps")
    return rows


def claim_run_directory(run_dir: Path, s: Settings, rows: data.Rows, dist: Dist, stack: ExitStack) -> dict:
    """Lock the run directory and remove what a killed save left there. Returns the fingerprint of the data.

    Raises UserError if the directory holds something else: another run, the same run on other data, or no run.
    """
    fingerprint = data.fingerprint(rows)
    fixed = {f.name for f in fields(Settings) if f.metadata["fixed"] or (s.bitwise and f.name == "micro_batch")}

    def claim() -> None:
        refuse_other_directory(run_dir)
        stack.enter_context(lock(run_dir))
        check_same_run(run_dir, {name: value for name, value in asdict(s).items() if name in fixed}, fingerprint)
        clean_up(run_dir)

    dist.run_on_main(claim)
    return fingerprint


def read_batch(s: Settings, rows: data.Rows, dist: Dist, step: int) -> np.ndarray:
    """This rank's rows of a step: [micro_steps, micro_batch, seq_len + 1]."""
    batch = data.batch(rows, step, s.batch_size, s.micro_batch, dist.rank, dist.world_size)
    data.check_vocab(batch, SIZES[s.size].vocab, step, dist.rank, dist.world_size)
    return batch


def build(s: Settings, dist: Dist, run_dir: Path, saved: int | None) -> tuple[Step, int, LossScaler | None]:
    """The training step, the number of successful updates and the loss scaler, as checkpoint `saved` has them."""
    model, gradients = initial_model(s, dist)
    set_recompute(model, s.recompute)
    if s.compile:
        for block in model.blocks:
            block.compile()
    optimizer = make_optimizer(model, s.lr)
    updates, scaler = 0, LossScaler() if s.precision == "fp16" else None
    if saved is not None:
        counters = restore(run_dir / f"step{saved}", model, optimizer, dist, verified=True)
        updates = counters["updates"]
        if scaler:
            vars(scaler).update(counters["scaler"])
    return Step(model, gradients, optimizer, dist), updates, scaler


def initial_model(s: Settings, dist: Dist) -> tuple[Pythia, Gradients]:
    """The sharded model before its first step: with random weights as published, or with those of --init-from.

    It is built on the meta device, so that no rank ever holds more than its shard.
    """
    config = replace(SIZES[s.size], gelu=s.gelu)
    if s.init_from:
        stored = read_config(s.init_from)
        for name in ("layers", "hidden", "heads", "vocab", "ffn", "rotary_dim", "parallel"):
            if getattr(stored, name) != getattr(config, name):
                raise UserError(f"--init-from {s.init_from} is not a {config.name}: {name} is {getattr(stored, name)}")
    with torch.device("meta"):
        model = Pythia(config)
    model.compute_dtype = DTYPES[s.precision]
    shard, whole_gradients = choose_sharding(s, config, dist)
    shard_weights(model, shard, dist, model.compute_dtype)
    model.to_empty(device=dist.device)
    if s.init_from:
        parameters = dict(model.named_parameters())
        with torch.no_grad():
            for name, weight in read_weights(s.init_from, model):
                local(parameters[name]).copy_(weight[local_rows(parameters[name])])
    else:
        init_weights(model, s.seed)
    return model, Gradients(model, dist, shard, whole_gradients, s.bitwise)


def choose_sharding(s: Settings, config: Config, dist: Dist) -> tuple[str, bool]:
    """What --shard auto means here, and whether a rank has the memory to accumulate the gradients of all weights.

    On GPUs: the least traffic that fits. On CPUs, which are for trying things out: as little sharding as possible.
    """
    choices = ("grad", "full") if s.bitwise else ()
    choices = choices if s.shard == "auto" else (s.shard,)
    if dist.device.type == "cpu":
        return (*choices, "none")[0], True
    memory = torch.tensor(-torch.cuda.get_device_properties(dist.device).total_memory, device=dist.device)
    smallest = -dist.all_reduce_max(memory).item()  # all ranks must choose alike
    job = Job(config, s.batch_size, s.micro_batch, s.seq_len, s.precision, s.recompute)
    job = replace(job, world_size=dist.world_size, local_world_size=dist.local_world_size)
    chosen = choose_shard(job, smallest, choices)
    return chosen.shard, chosen.whole_gradients


def open_saver(s: Settings, run_dir: Path, trainer: Step, watchdog: Watchdog, stack: ExitStack) -> Saver:
    """The writer of checkpoints. Weights are saved in the dtype of the training, but in float32 if that is bf16 on a
    CPU: there others compute in float32, and bf16 weights would change their logits."""
    model, dist = trainer.model, trainer.dist
    dtype = torch.float32 if (dist.device.type, s.precision) == ("cpu", "bf16") else model.compute_dtype
    export = Export(dtype, tokenizer=data.find_tokenizer(s.data))
    saver = Saver(run_dir, model, trainer.optimizer, dist, export, s.keep_state, watchdog.heartbeat)
    stack.callback(saver.wait)
    return saver


# ---- in the loop -----------------------------------------------------------------------------------------------------


def overflowed(s: Settings, step: int, loss: float, grad_norm: float, scaler: LossScaler | None, saver: Saver) -> bool:
    """True if float16 gradients overflowed, so that the update was skipped. The loss scale is adapted.

    Raises UserError if loss or norm is not finite otherwise, or after 50 overflows in a row (as DeepSpeed).
    """
    overflow = scaler is not None and not math.isfinite(grad_norm)
    if not overflow and not math.isfinite(loss + grad_norm):
        saver.finish()
        first, last_good = step * s.batch_size, steps_with_state(saver.run)[-1]
        raise UserError(
            f"step {step}, rows {first} to {first + s.batch_size - 1}: loss {loss}, gradient norm {grad_norm}; "
            f"stopped before the update, the last good checkpoint is {saver.run}/step{last_good}"
        )
    if scaler:
        scaler.update(overflow)
        if scaler.overflows == 50:
            raise UserError(f"50 steps in a row overflowed float16, up to step {step}: try --precision bf16")
    return overflow


class StepLog:
    """Gathers what the ranks measured in a step. The main rank writes it to RUN/metrics.jsonl and to the loggers."""

    def __init__(self, s: Settings, run_dir: Path, start: int, dist: Dist, stack: ExitStack):
        self.dist, self.tokens_per_step = dist, s.batch_size * s.seq_len
        self.flops_per_token, self.peak = SIZES[s.size].flops_per_token(s.seq_len), peak_flops(dist.device)
        loggers = list(filter(None, s.log.split(",")))
        metrics = partial(Metrics, run_dir, start, s.steps, loggers, asdict(s))
        self.metrics = dist.run_on_main(lambda: stack.enter_context(metrics()))
        self.profile_step = stack.enter_context(profiler(run_dir, start, s.profile, dist.rank))

    def record(self, step: int, batch: Batch, own: tuple, seconds: float, loss_scale: float, **values: float) -> tuple:
        """Record a step. `own` is this rank's (stop requested, save failed, data seconds, compute seconds).

        Returns (whether any rank was told to stop, whether any rank failed to save).
        """
        stopping, failed, data_seconds, compute_seconds = self.dist.all_gather(torch.tensor(own)).T  # [world_size] each
        digests = self.dist.all_gather(batch.digests)  # [world_size, micro_steps, micro_batch, 32]
        if self.metrics:
            tokens_per_s = self.tokens_per_step / seconds
            self.metrics.record(
                step=step,
                **values,
                tokens=(step + 1) * self.tokens_per_step,
                tokens_per_s=tokens_per_s,
                mfu=self.peak and tokens_per_s * self.flops_per_token / (self.peak * self.dist.world_size),
                seconds=seconds,
                data_seconds=[round(t, 6) for t in data_seconds.tolist()],
                compute_seconds=[round(t, 6) for t in compute_seconds.tolist()],
                loss_scale=loss_scale,
                batch_sha256=digest(digests.transpose(0, 1).numpy()),
            )
        self.profile_step()
        return bool(stopping.any()), bool(failed.any())


def announce_end(s: Settings, run_dir: Path, step: int, dist: Dist) -> None:
    if step == s.steps:
        dist.print(f"finished. Try: python generate.py --checkpoint {run_dir}/step{step} --prompt 'def '")
        return
    command = "the same command without --stop-at" if s.stop_at else "the same command"
    dist.print(f"paused at step {step} of {s.steps}; {command} continues the run")


# ---- the command -----------------------------------------------------------------------------------------------------


def main() -> None:
    is_main = os.environ.get("RANK", "0") == "0"  # all ranks read the same command line: one answers
    try:
        s = parse(sys.argv[1:])
        if s.plan:
            job = Job(SIZES[s.size], s.batch_size, s.micro_batch, s.seq_len, s.precision, s.recompute, s.shard)
            text = report(job, s.steps, parse_machine(s.plan_for, s.batch_size))
            return print(text) if is_main else None
    except UserError:
        if not is_main:
            raise SystemExit(1) from None
        raise
    reuse_freed_memory()
    train(s)


if __name__ == "__main__":
    run_command(main)
