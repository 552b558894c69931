"""Train a Pythia from nothing: set-up, and the loop. The flags are in settings.py.

Step t trains on batch(t): rows [1024 t, 1024 (t + 1)) of the shuffled order. So a run is a function of (size, data,
seed, edits), and resuming means starting at t. Checkpoint stepN has made N steps. Record t of metrics.jsonl has the
loss of checkpoint stepT on batch(t), and `python data.py view --step t` shows that batch.
"""

import math
import os
import signal
import sys
import time

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports, which take seconds, prints no traceback

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch

import data
from checkpoints.branch import Parent, read_parent
from checkpoints.manifest import clean_up, steps_with_state
from checkpoints.resume import latest_valid_step, recover_record, restore
from checkpoints.save import Saver
from corpus.edits import Edits
from corpus.loader import Batch, Loader, verify_in_background
from corpus.order import digest, row_digests
from corpus.probes import ProbeLog, Probes, refuse_other_probes, share_probes
from model import SIZES, Config, Pythia
from model.huggingface import Export, read_config, read_weights
from model.sizes import is_published_step
from parallel.fsdp import init_weights, local, local_rows, nudge_weights, shard_weights
from parallel.gradients import Gradients
from parallel.recompute import set_recompute
from plan.memory import choose_shard
from plan.time import decide, known_gpu, peak_flops
from runtime.errors import UserError, run_command
from runtime.host import StopSignal, host_facts, reuse_freed_memory
from runtime.metrics import Metrics, OldRecords, read_records
from runtime.ranks import Dist, end_dist, init_dist, lost_contact
from runtime.row_loss import RowLosses, check_row_losses
from runtime.run_directory import (
    DAMAGE,
    check_same_run,
    lock,
    read_run,
    record_start,
    recorded_settings,
    recover_run_file,
    refuse_other_directory,
)
from runtime.timing import profiler
from runtime.watchdog import Watchdog
from settings import DTYPES, FIXED, RECORDED, Settings, extra_steps, make_job, parse, plan_text, precision_text
from step import LossScaler, Step, learning_rate, make_optimizer

LONG_STEP = 5.0  # seconds; a longer step shows its progress, and Ctrl-C drops it
EXIT_RETRY = 75  # EX_TEMPFAIL of BSD's sysexits.h: "temporary failure, try again"

# ---- the run ---------------------------------------------------------------------------------------------------------


def train(s: Settings) -> None:
    """Train on this rank. Raises UserError, or SystemExit if the exit status is not 0."""
    dist, finished = init_dist(s.bitwise), False
    try:
        with ExitStack() as stack:
            status = run(fit_gpus(s, dist), dist, stack)
        finished = True
    except Exception as error:
        if not (message := one_line(error)):
            raise
        if not dist.claim_error_report(message):
            raise SystemExit(1) from None
        raise UserError(message) from None
    finally:
        end_dist(dist, together=finished)
    if status:
        raise SystemExit(status)


def one_line(error: Exception) -> str:
    """What to tell the user about an error of a disk or of another rank, or "" for a fault of the program."""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, OSError) and not isinstance(error, BrokenPipeError):  # run_command knows what to do about that
        return f"{error.filename or 'a file'}: {error.strerror or error}; the same command resumes"
    if reason := lost_contact(error):  # during set-up; later the watchdog finds out which rank it is
        return f"lost contact with another rank ({reason}); the same command resumes"
    return ""


def run(s: Settings, dist: Dist, stack: ExitStack) -> int:
    """Train, from the newest checkpoint if there is one. Returns the exit status; `stack` closes what the run opens."""
    run_dir, rows, probes = Path(s.out), open_rows(s, dist), open_probes(s, dist)
    fingerprint, check_lock = claim_run_directory(run_dir, s, rows, probes, dist, stack)
    checkpoint, start, parent = starting_point(s, run_dir, fingerprint, dist)
    stop = s.stop_at or s.steps
    if start >= stop:
        announce_end(s, run_dir, start, dist)
        return 0
    read, read_weights = partial(read_batch, s, rows, dist), partial(loss_weights, s, rows, dist)
    old = check_old_records(s, run_dir, start, parent, probes, read, dist)  # before anything is written

    trainer, updates, scaler = build(s, rows, dist, checkpoint, branches=parent is not None)
    record = announce_start(s, run_dir, fingerprint, parent, probes, check_lock, start, stop, dist)
    stop_signal, watchdog = StopSignal(), stack.enter_context(Watchdog(dist, s.timeout))
    log = StepLog(s, rows.edits, probes, old, start, trainer, stack)
    saver = open_saver(s, rows, trainer, watchdog, record, [lambda step: check_lock(), log.check], stack)

    def save(step: int) -> None:
        watchdog.heartbeat(step, "saving")
        saver.save(step, {"updates": updates, "scaler": scaler and vars(scaler)})

    if checkpoint is None or parent:
        save(start)
    loader, extra = stack.enter_context(Loader(read, start, stop, dist.device, read_weights)), extra_steps(s)
    made = saved = start  # finished steps, and how many of them the newest checkpoint has
    for step in range(start, stop):
        # ---- one training step ---------------------------------------------------------------
        watchdog.heartbeat(step, "reading rows")
        began = time.perf_counter()
        batch = loader.next()  # tokens [micro_steps, micro_batch, seq_len + 1]
        data_seconds = time.perf_counter() - began
        watchdog.heartbeat(step, "forward and backward")
        log.probes.measure(step)
        loss_scale = scaler.scale if scaler else 1.0
        between = inside_long_step(step, stop_signal, watchdog, log) if log.steps_are_long else None
        if not trainer.forward_backward(batch.tokens, loss_scale, between, batch.weights):
            break  # told to stop inside a long step, which is dropped
        watchdog.heartbeat(step, "exchanging gradients, updating weights")
        lr = learning_rate(updates, s.steps, s.lr, s.schedule)
        saver.wait_for_snapshot()  # weights must not change while they are copied
        loss, grad_norm = trainer.update(lr).tolist()  # the only host sync of the step
        updates += not overflowed(s, step, loss, grad_norm, scaler, saver)
        made = step + 1

        # ---- everything below is logging and saving -------------------------------------------
        seconds = time.perf_counter() - began
        own = stop_signal.requested, saver.failure is not None, data_seconds
        stopping, save_failed = log.record(step, batch, own, seconds, loss_scale, loss=loss, lr=lr, grad_norm=grad_norm)
        if save_failed:
            saver.finish()  # raises the error
        if is_published_step(made, stop) or made in extra:
            save(saved := made)
        if stopping:
            break
    if saved < made:  # told to stop between two checkpoints
        save(made)
    saver.finish()
    announce_end(s, run_dir, made, dist)
    return exit_status(made < stop and not stop_signal.requested)


# ---- set-up, in the order of run() -----------------------------------------------------------------------------------


def fit_gpus(s: Settings, dist: Dist) -> Settings:
    """On GPUs: decide --shard, --recompute and --micro-batch where the settings leave them open, as --plan suggests.

    All ranks take the decision of the main rank, for the smallest GPU of all. A run keeps the micro-batch that run.json
    has, even on other GPUs: see plan.time.decide. Raises UserError if it does not fit.
    """
    if dist.device.type == "cpu":
        return s
    gpu, gpu_memory = smallest_gpu(dist)
    job = make_job(s, dist.world_size, dist.local_world_size)

    def choose() -> str:
        recorded = recorded_settings(Path(s.out)).get("micro_batch")
        recorded = recorded if isinstance(recorded, int) and recorded > 0 else 0
        if s.bitwise and recorded and not s.micro_batch:
            data.row_numbers(0, s.batch_size, recorded, 0, dist.world_size)  # raises if it does not divide
        divides = s.batch_size % (dist.world_size * max(recorded, 1)) == 0
        chosen, note = decide(job, recorded if divides else 0, gpu, gpu_memory)
        if note or chosen.flags != job.flags:
            dist.print(f"warning: {note}" if note else f"this run takes {chosen.flags}")
        return f"{chosen.shard} {chosen.recompute} {chosen.micro_batch}"

    shard, recompute, micro_batch = dist.all_gather_str(dist.run_on_main(choose) or "")[0].split()
    return replace(s, shard=shard, recompute=recompute, micro_batch=int(micro_batch))


def smallest_gpu(dist: Dist) -> tuple[str, float]:
    """The key of plan.time.GPUS for the GPU of this rank, and the bytes of memory of the smallest GPU of all ranks."""
    device = torch.cuda.get_device_properties(dist.device)
    gpu, memory = known_gpu(device.name, device.total_memory)
    return gpu, -dist.all_reduce_max(torch.tensor(-memory, dtype=torch.float64)).item()


def open_rows(s: Settings, dist: Dist) -> data.Rows:
    """The rows of the run in their order. Raises UserError if they do not suffice."""
    needed, samples = s.steps * s.batch_size, data.requested_samples(s.steps, s.batch_size)
    open_here = partial(data.open_rows, s.data, samples, s.seq_len, s.seed, s.edits, s.batch_size)
    rows = dist.run_on_main(open_here)  # builds the cache of the order, once for all ranks
    rows = rows if dist.is_main else open_here()
    if rows.edits and rows.edits.count:
        rows.take(rows.edits.ends)  # raises now, and not in weeks, if the edits are for other data
    if needed > len(rows):
        raise UserError(f"--steps {s.steps} needs {needed} rows, {s.data} has {len(rows)}: lower --steps")
    return rows


def open_probes(s: Settings, dist: Dist) -> Probes:
    """The texts of --probes, on all ranks. Raises UserError if they are not texts for the model."""
    if not s.probes:
        return Probes()
    limits = s.seq_len + 1, SIZES[s.size].vocab
    return share_probes(Path(s.probes), s.probe_every, data.find_tokenizer(s.data), *limits, dist)


def claim_run_directory(
    run_dir: Path, s: Settings, rows: data.Rows, probes: Probes, dist: Dist, stack: ExitStack
) -> tuple[dict, Callable[[], None]]:
    """Lock the run directory and remove what a killed save left there. Returns the fingerprint of the data, and a
    function that raises UserError if the directory is no longer the locked one.

    Raises UserError if the directory holds something else: another run, the same run on other data, or no run.
    """
    fingerprint = data.fingerprint(rows)
    fixed = FIXED | ({"micro_batch"} if s.bitwise else set())

    def differences(stored: dict) -> list[str]:
        return data.fingerprint_differences(stored, fingerprint) + data.edits_difference(stored, fingerprint)

    def claim() -> Callable[[], None]:
        refuse_other_directory(run_dir, recover_record)
        check_lock = stack.enter_context(lock(run_dir))
        recover_run_file(run_dir, recover_record)
        settings = {name: value for name, value in asdict(s).items() if name in fixed}
        check_same_run(run_dir, settings, differences)
        refuse_other_probes(run_dir, probes)
        clean_up(run_dir)
        return check_lock

    return fingerprint, dist.run_on_main(claim) or (lambda: None)


def starting_point(s: Settings, run_dir: Path, fingerprint: dict, dist: Dist) -> tuple[Path | None, int, Parent | None]:
    """The checkpoint to start from (None: initial weights), its step, and the parent if a branch starts.

    Raises UserError if the parent has other data, or settings that a branch cannot change.
    """
    saved = latest_valid_step(run_dir, dist)
    if saved is not None or not s.branch:
        return (None, 0, None) if saved is None else (run_dir / f"step{saved}", saved, None)
    parent = read_parent(Path(s.branch))
    changed = parent.differences(asdict(s))
    if s.precision == "fp16" != parent.settings.get("precision"):
        raise UserError(f"--precision fp16 needs a loss scale, which {parent.directory} lacks: leave it out")
    try:
        other_data = data.fingerprint_differences(parent.data, fingerprint)
        changed += data.edits_difference(parent.data, fingerprint)
    except DAMAGE as error:
        raise UserError(f"--branch {s.branch}: its manifest is damaged ({error!r})") from None
    if other_data:
        raise UserError(f"--data {s.data} is not the data of {s.branch}: {', '.join(other_data)}")
    dist.print(f"a branch of {s.branch}" + (f" with other settings: {', '.join(changed)}" if changed else ""))
    return parent.directory, parent.step, parent


def check_old_records(
    s: Settings,
    run_dir: Path,
    start: int,
    parent: Parent | None,
    probes: Probes,
    read: Callable[[int], np.ndarray],
    dist: Dist,
) -> OldRecords | None:
    """The old records of metrics.jsonl, on the main rank. Their hashes show whether the data is still that of the run.

    Raises UserError if records or row losses are missing or damaged, if the batch of the last step or of the next one
    is not the one that the run had before, or if the next batch has a token outside the vocabulary. Nothing is written.
    """

    def read_old() -> OldRecords:
        stored = read_run(run_dir) if start and not parent else {"starts": []}
        first = parent.step if parent else stored.get("parent", {}).get("step", 0)
        starts = [entry["step"] for entry in stored["starts"]]
        old = read_records(run_dir / "metrics.jsonl", start, starts, first)
        notes = [check_row_losses(run_dir / "row_loss.bin", start, s.batch_size, old.losses, first)]
        if probes.texts:
            measured = old.probe_losses, first, probes.every, "probes"
            notes.append(check_row_losses(run_dir / "probe_loss.bin", start, probes.tokens, *measured))
        for note in filter(None, notes):
            dist.print(note)
        return old

    old = dist.run_on_main(read_old)
    for step in range(max(start - 1, 0), start + 1):
        digests = dist.all_gather(torch.from_numpy(row_digests(read(step))))
        dist.run_on_main(lambda: old.check_batch(step, digest(digests.transpose(0, 1).numpy())))  # noqa: B023
    if old and old.note:
        dist.print(old.note)
    return old


def read_batch(s: Settings, rows: data.Rows, dist: Dist, step: int) -> np.ndarray:
    """This rank's rows of a step: [micro_steps, micro_batch, seq_len + 1]."""
    batch = data.batch(rows, step, s.batch_size, s.micro_batch, dist.rank, dist.world_size)
    data.check_vocab(batch, SIZES[s.size].vocab, step, dist.rank, dist.world_size)
    return batch


def loss_weights(s: Settings, rows: data.Rows, dist: Dist, step: int) -> np.ndarray | None:
    """The weights of the losses of read_batch: float32 [micro_steps, micro_batch, seq_len], or None if all are 1."""
    return data.weights(rows, step, s.batch_size, s.micro_batch, dist.rank, dist.world_size)


def build(
    s: Settings, rows: data.Rows, dist: Dist, checkpoint: Path | None, branches: bool
) -> tuple[Step, int, LossScaler | None]:
    """The training step, the number of successful updates and the loss scaler, as the checkpoint has them."""
    model, gradients = initial_model(s, dist, restored=checkpoint is not None)
    set_recompute(model, s.recompute)
    if s.compile:
        for block in model.blocks:
            block.compile()
    optimizer = make_optimizer(model, s.lr)
    updates, scaler = 0, LossScaler() if s.precision == "fp16" else None
    if checkpoint:
        counters = restore(checkpoint, model, optimizer, dist, verified=not branches)
        updates = take_counters(counters, scaler, checkpoint)
    if s.nudge and branches:
        nudge_weights(model, s.nudge, s.seed)
    can_have_weights = bool(rows.edits and rows.edits.has_weights)
    return Step(model, gradients, optimizer, dist, can_have_weights), updates, scaler


def take_counters(counters: dict, scaler: LossScaler | None, checkpoint: Path) -> int:
    """The number of successful updates. The scaler gets its state. Raises UserError if the counters are others."""
    updates, stored = counters.get("updates"), counters.get("scaler")
    valid = type(updates) is int and 0 <= updates <= 2**24
    if valid and scaler:
        types = {name: type(value) for name, value in vars(scaler).items()}
        valid = isinstance(stored, dict) and {name: type(value) for name, value in stored.items()} == types
        valid = (
            valid and all(0 <= value < 2**64 for value in stored.values()) and stored["scale"] * stored["window"] >= 1
        )
        vars(scaler).update(stored if valid else {})
    if not valid:
        raise UserError(f"{checkpoint} does not hold the counters of such a run: remove it to resume from an older one")
    return updates


def initial_model(s: Settings, dist: Dist, restored: bool) -> tuple[Pythia, Gradients]:
    """The sharded model before its first step: with random weights as published, or with those of --init-from.

    restored: a checkpoint replaces all weights afterwards, so none are drawn, and --init-from is not read.
    It is built on the meta device, so that no rank ever holds more than its shard.
    """
    config = replace(SIZES[s.size], gelu=s.gelu, seq_len=s.seq_len)
    if s.init_from and not restored:
        stored = read_config(s.init_from)
        for name in ("layers", "hidden", "heads", "vocab", "ffn", "rotary_dim", "parallel"):
            if getattr(stored, name) != getattr(config, name):
                raise UserError(f"--init-from {s.init_from} is not a {config.name}: {name} is {getattr(stored, name)}")
    with torch.device("meta"):
        model = Pythia(config)
    model.compute_dtype, model.document_mask = DTYPES[s.precision], s.document_mask
    shard, whole_gradients = choose_sharding(s, config, dist)
    shard_weights(model, shard, dist, model.compute_dtype)
    model.to_empty(device=dist.device)
    if s.init_from and not restored:
        parameters = dict(model.named_parameters())
        with torch.no_grad():
            for name, weight in read_weights(s.init_from, model):
                local(parameters[name]).copy_(weight[local_rows(parameters[name])])
    elif not restored:
        init_weights(model, s.seed)
    return model, Gradients(model, dist, shard, whole_gradients, s.bitwise)


def choose_sharding(s: Settings, config: Config, dist: Dist) -> tuple[str, bool]:
    """What --shard means here, and whether a rank has the memory to accumulate the gradients of all weights.

    On CPUs, which are for trying things out, --shard auto is as little sharding as possible. On GPUs see fit_gpus.
    """
    if dist.device.type == "cpu":
        return s.shard if s.shard != "auto" else "grad" if s.bitwise else "none", True
    _, gpu_memory = smallest_gpu(dist)
    chosen = choose_shard(make_job(s, dist.world_size, dist.local_world_size), gpu_memory, (s.shard,))
    return chosen.shard, chosen.whole_gradients


def open_saver(
    s: Settings, rows: data.Rows, trainer: Step, watchdog: Watchdog, record: dict | None, checks: list, stack: ExitStack
) -> Saver:
    """The writer of checkpoints. Weights are saved in the dtype of the training, but in float32 if that is bf16 on a
    CPU: there others compute in float32, and bf16 weights would change their logits.

    record: the content of run.json, on the main rank. Manifests get what decides the weights and nothing else, so that
    equal runs in two directories have equal files. checks: called there with the step before it gets its name.
    """
    model, dist = trainer.model, trainer.dist
    dtype = torch.float32 if (dist.device.type, s.precision) == ("cpu", "bf16") else model.compute_dtype
    export = Export(dtype, tokenizer=data.find_tokenizer(s.data))
    options = {"keep_state": s.keep_state, "heartbeat": watchdog.heartbeat}
    if record:
        kept = {name: value for name, value in record["settings"].items() if name in RECORDED}
        data_without_times = {name: value for name, value in record["data"].items() if name != "modified_ns"}
        origin = {"parent": record["parent"]} if "parent" in record else {}
        options["record"] = {"settings": kept, "data": data_without_times, **origin}
        checks = [*checks, verify_in_background(rows)]
    options["check"] = lambda step: [check(step) for check in checks]
    saver = Saver(Path(s.out), model, trainer.optimizer, dist, export, **options)
    stack.callback(saver.wait)
    return saver


# ---- in the loop -----------------------------------------------------------------------------------------------------


def inside_long_step(
    step: int, stop_signal: StopSignal, watchdog: Watchdog, log: "StepLog"
) -> Callable[[int, int], bool]:
    """What to do between the micro-steps of a long step: show progress, and find out whether a rank was told to stop.

    The function returns False on all ranks if so.
    """

    def go_on(done: int, micro_steps: int) -> bool:
        watchdog.heartbeat(step, f"micro-step {done + 1} of {micro_steps}")
        if log.metrics:
            log.metrics.show_progress(step, done, micro_steps)
        return not log.dist.all_reduce_max(torch.tensor(int(stop_signal.requested)))  # on the CPU: no GPU is waited for

    return go_on


def overflowed(s: Settings, step: int, loss: float, grad_norm: float, scaler: LossScaler | None, saver: Saver) -> bool:
    """True if float16 gradients overflowed, so that the update was skipped. The loss scale is adapted.

    Raises UserError if loss or norm is not finite otherwise, or after 50 overflows in a row (as DeepSpeed).
    """
    overflow = scaler is not None and not math.isfinite(grad_norm)
    if not overflow and not math.isfinite(loss + grad_norm):
        saver.finish()
        first = step * s.batch_size
        raise UserError(
            f"step {step}, rows {first} to {first + s.batch_size - 1}: loss {loss}, gradient norm {grad_norm}; "
            f"stopped before the update: {suspects(step, loss, saver.run)}"
        )
    if scaler:
        scaler.update(overflow)
        if scaler.overflows == 50:
            raise UserError(f"50 steps in a row overflowed float16, up to step {step}: try --precision bf16")
    return overflow


def suspects(step: int, loss: float, run_dir: Path) -> str:
    """What is bad if the loss or the gradient of a step is not finite, and which of the newest checkpoints is not."""
    newest = [n for n in steps_with_state(run_dir) if n <= step][:-3:-1]
    checked = [f"{run_dir}/step{n}" for n in newest if n < step or math.isfinite(loss)]
    known = f"; with {' and with '.join(checked)} the loss was finite" if checked else ""
    if math.isfinite(loss):
        return "its gradient is bad, or these rows are" + known
    here = f" (checkpoint {run_dir}/step{step})" if step in newest else ""
    return f"the weights after {step} steps{here} are bad, or these rows are" + known


class StepLog:
    """Gathers what the ranks measured in a step. The main rank writes it to RUN/metrics.jsonl, RUN/row_loss.bin and the
    loggers."""

    def __init__(
        self,
        s: Settings,
        edits: Edits | None,
        probes: Probes,
        old: OldRecords | None,
        start: int,
        trainer: Step,
        stack: ExitStack,
    ):
        self.trainer, self.dist, self.old, self.tokens_per_step = trainer, trainer.dist, old, s.batch_size * s.seq_len
        self.edits = {"edits_sha256": edits.sha256} if edits else {}
        self.flops_per_token, self.peak = SIZES[s.size].flops_per_token(s.seq_len), peak_flops(self.dist.device)
        loggers = list(filter(None, s.log.split(",")))
        metrics = partial(Metrics, old, start, s.steps, loggers, asdict(s))
        row_losses = partial(RowLosses, Path(s.out) / "row_loss.bin", start, s.batch_size)
        self.metrics = self.dist.run_on_main(lambda: stack.enter_context(metrics()))
        self.row_losses = self.dist.run_on_main(lambda: stack.enter_context(row_losses()))
        # no more tokens at once than a micro-batch has
        probe_log = partial(ProbeLog, probes, trainer.losses, s.micro_batch * s.seq_len, self.dist)
        self.probes = probe_log(Path(s.out) / "probe_loss.bin", start, stack)
        self.profile_step = stack.enter_context(profiler(Path(s.out), start, s.profile, self.dist.rank))
        self.failure: tuple[int, UserError] | None = None  # a step whose record could not be written, and why
        self.steps_are_long = True  # nothing is known of the first step

    def record(self, step: int, batch: Batch, own: tuple, seconds: float, loss_scale: float, **values: float) -> tuple:
        """Record a step. `own` is this rank's (stop requested, save failed, data seconds).

        Returns (whether any rank was told to stop, whether any rank failed to save). If the record of an earlier step
        failed, raises that UserError on all ranks.
        """
        row_losses = self.trainer.row_losses  # [micro_steps, micro_batch]
        own = torch.tensor([*own, self.trainer.compute_seconds(), self.failure is not None], dtype=torch.float64)
        gathered = self.dist.all_gather(torch.cat((own, row_losses.flatten())))  # [world_size, 5 + rows of a rank]
        stopping, save_failed, data_seconds, compute_seconds, log_failed = gathered[:, :5].T
        losses = gathered[:, 5:].unflatten(1, row_losses.shape).transpose(0, 1)  # [micro_steps, ranks, micro_batch]
        digests = self.dist.all_gather(batch.digests)  # [world_size, micro_steps, micro_batch, 32]
        if log_failed.any():
            self.dist.run_on_main(lambda: self.check(step))
        self.steps_are_long = compute_seconds.max().item() > LONG_STEP
        if self.metrics:
            tokens_per_s = self.tokens_per_step / seconds
            self._write(
                losses.flatten().numpy(),
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
                **self.edits,
            )
        self.profile_step()
        return bool(stopping.any()), bool(save_failed.any())

    def _write(self, row_losses: np.ndarray, **values) -> None:
        """Write a record on the main rank. An error reaches all ranks in the next step, or when a step is saved."""
        try:
            self.old.check_batch(values["step"], values["batch_sha256"])
            self.metrics.record(**values, **self.probes.record(values["step"]))
            self.row_losses.record(row_losses)
        except UserError as error:
            self.failure = values["step"], error

    def check(self, step: int) -> None:
        """On the main rank: make the records before `step` durable. Raises UserError if one could not be written."""
        if self.failure and self.failure[0] < step:
            raise self.failure[1]
        self.metrics.sync()
        self.row_losses.sync()
        if self.probes.file:
            self.probes.file.sync()


def exit_status(others_were_told: bool) -> int:
    """If only another node was told to stop, torchrun restarts without that node, as after a failure."""
    restarts = int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0))
    return EXIT_RETRY if others_were_told and restarts else 0


def announce_start(
    s: Settings,
    run_dir: Path,
    fingerprint: dict,
    parent: Parent | None,
    probes: Probes,
    check_lock: Callable[[], None],
    start: int,
    stop: int,
    dist: Dist,
) -> dict | None:
    """Record the start in run.json and print it. Returns the content of run.json on the main rank."""

    def record() -> dict:
        check_lock()
        new = {"settings": asdict(s), "data": fingerprint} | ({"parent": parent.record()} if parent else {})
        new |= {"probes": probes.record()} if probes.texts else {}
        return record_start(run_dir, new, start, host_facts(dist.device, dist.world_size))

    content = dist.run_on_main(record)
    dist.print(
        f"{run_dir}: {SIZES[s.size].parameters:,} parameters on {dist.world_size} x {dist.device.type}, "
        f"{precision_text(s)}; step {start} to {stop} of {s.steps}, each {s.batch_size} rows of {s.seq_len} tokens"
    )
    return content


def announce_end(s: Settings, run_dir: Path, step: int, dist: Dist) -> None:
    if step == s.steps:
        dist.print(f"{run_dir} is finished. Try: python generate.py --checkpoint {run_dir}/step{step} --prompt 'def '")
        return
    command = "the same command without --stop-at" if s.stop_at else "the same command"
    dist.print(f"{run_dir} is paused at step {step} of {s.steps}; {command} continues the run")


# ---- the command -----------------------------------------------------------------------------------------------------


def main() -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # run_command ends without a traceback
    is_main = os.environ.get("RANK", "0") == "0"  # all ranks read the same command line: one answers
    try:
        s = parse(sys.argv[1:])
        if s.plan:
            text = plan_text(s)
            return print(text) if is_main else None
    except UserError:
        if not is_main:
            raise SystemExit(1) from None
        raise
    reuse_freed_memory()
    train(s)


if __name__ == "__main__":
    run_command(main)
