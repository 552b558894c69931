"""Checkpoints are written while training goes on, by all ranks side by side; any of it may fail or be killed.

    save(step)        notes what there is to save, and returns
    a thread          copies this rank's rows to host memory; wait_for_snapshot() lets no update begin until then
                      writes them as this rank's part
                      writes this rank's share of the Hugging Face files, from everybody's parts
                      the first rank: small files, manifest, the name stepN, "saved"; then old state is dropped

After each of these stages the ranks tell each other how it went, so that they go on, or give up, together. What a
checkpoint looks like on disk is told in checkpoint.py.
"""

import hashlib
import json
import math
import shutil
import weakref
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from threading import Event, Thread

import torch
from torch import Tensor

from checkpoints.manifest import CHUNK_BYTES, COUNTERS, FORMAT, checksums, drop_old_state, write_manifest
from checkpoints.resume import MOMENTS, find_rows, read_rows, state_shapes
from model import Pythia
from model.huggingface import huggingface_name, model_files, write_description, write_tensors
from parallel.fsdp import local, local_rows, saved_rows
from runtime.errors import UserError
from runtime.files import flush
from runtime.ranks import Dist


class Saver:
    """Writes the checkpoints of a run, one at a time, behind its back. All ranks make one and call it alike.

    dtype and hidden_act are those of the Hugging Face files. Of the resumable states the `keep_state` newest are kept.
    heartbeat(step, doing) is told, from the thread, whenever a stage begins: the same on all ranks.
    """

    def __init__(
        self,
        run: Path,
        model: Pythia,
        optimizer: torch.optim.Optimizer,
        ranks: Dist,
        dtype: torch.dtype,
        hidden_act: str = "gelu",
        tokenizer: Path | None = None,
        keep_state: int = 2,
        heartbeat: Callable[[int, str], None] = lambda step, doing: None,
    ):
        run.mkdir(parents=True, exist_ok=True)
        self.run, self.config, self.optimizer = run, model.config, optimizer
        self.dtype, self.hidden_act, self.tokenizer, self.keep_state = dtype, hidden_act, tokenizer, keep_state
        self.ranks, self.heartbeat = ranks.with_own_group(), heartbeat
        self.parameters = dict(model.named_parameters())
        self.rows = {name: saved_rows(p) for name, p in self.parameters.items()}
        self.snapshot: dict[str, Tensor] = {}  # host memory for what this rank writes
        self.stream = torch.cuda.Stream() if ranks.device.type == "cuda" else None
        self.copied = Event()
        self.copied.set()
        self.thread: Thread | None = None
        self.error: BaseException | None = None

    def save(self, step: int, counters: dict) -> None:
        """Begin to write RUN/stepN. counters (JSON) are handed back by restore.

        Waits for the checkpoint before, and raises its UserError when it failed.
        """
        self.finish()
        tensors, counters = self._tensors(), json.loads(json.dumps(counters))
        if self.stream:
            self.stream.wait_stream(torch.cuda.current_stream())
        self.copied.clear()
        self.thread = Thread(target=self._save, args=(step, tensors, counters), daemon=True)
        self.thread.start()

    def wait_for_snapshot(self) -> None:
        """Return when weights and moments may change again. On a GPU it is the next kernel that waits, not the host."""
        self.copied.wait()
        if self.stream:
            torch.cuda.current_stream().wait_stream(self.stream)

    @property
    def failure(self) -> str | None:
        """Why an earlier checkpoint could not be saved, in one line. Never waits."""
        return None if self.error is None else str(self.error).partition("\n")[0]

    def wait(self) -> None:
        """Wait for what is being written."""
        if self.thread:
            self.thread.join()

    def finish(self) -> None:
        """Wait for what is being written. Raises UserError when it, or an earlier one, could not be saved."""
        self.wait()
        if self.error:
            raise self.error

    # The snapshot

    def _tensors(self) -> dict[str, Tensor | None]:
        """What this rank writes, by its name in the part, and Adam's steps. None is zero: before the first update."""
        states = [self.optimizer.state.get(p, {}) for p in self.parameters.values()]
        steps = [state["step"] for state in states if state]
        tensors = {"steps": torch.stack(steps) if steps else None}
        for (name, p), state in zip(self.parameters.items(), states):
            rows, offset = self.rows[name], local_rows(p).start
            for kind, value in (("weight", p), *((moment, state.get(moment)) for moment in MOMENTS)):
                here = None if value is None else local(value.detach())[rows.start - offset : rows.stop - offset]
                tensors[f"{kind}/{name}"] = here
        return tensors

    def _copy(self, tensors: dict[str, Tensor | None]) -> None:
        """Fill the snapshot. Its memory is taken once, and on a GPU pinned, so that copying goes on beside kernels."""
        if not self.snapshot:
            shapes = {"steps": (len(self.parameters),)}
            for key, shape in state_shapes(self.parameters).items():
                rows = self.rows[key.partition("/")[2]]
                shapes[key] = (rows.stop - rows.start, *shape[1:])
            sizes = [math.prod(shape) for shape in shapes.values()]
            memory = torch.empty(sum(sizes))
            if self.stream:
                self._pin(memory)
            self.snapshot = {key: piece.view(shapes[key]) for key, piece in zip(shapes, memory.split(sizes))}
        with torch.cuda.stream(self.stream):
            for key, tensor in tensors.items():
                if tensor is None:
                    self.snapshot[key].zero_()
                else:
                    self.snapshot[key].copy_(tensor, non_blocking=True)

    def _pin(self, memory: Tensor) -> None:
        """Keep memory where it is, for copies from a GPU. (torch's own pinned memory comes in powers of two.)"""
        cuda, address = torch.cuda.cudart(), memory.data_ptr()
        torch.cuda.check_error(int(cuda.cudaHostRegister(address, memory.nbytes, 0)))
        weakref.finalize(self, cuda.cudaHostUnregister, address)

    # The thread

    def _save(self, step: int, tensors: dict[str, Tensor | None], counters: dict) -> None:
        try:
            if self.stream:
                torch.cuda.set_device(self.ranks.device)  # a thread begins with the first
            self._write(step, tensors, counters)
        except BaseException as error:  # raised by finish
            self.error = error
        finally:
            self.copied.set()

    def _write(self, step: int, tensors: dict[str, Tensor | None], counters: dict) -> None:
        final, temporary = self.run / f"step{step}", self.run / f".step{step}.tmp"
        failed = f"{final} could not be saved, earlier checkpoints are whole"
        try:
            self.heartbeat(step, "copying weights and moments")
            self._together(failed, lambda: self._begin(final, temporary, tensors))
            self.heartbeat(step, "writing weights and moments")
            files = self._together(failed, lambda: self._write_part(temporary))
            self.heartbeat(step, "writing the model")
            files |= self._together(failed, lambda: self._write_model(temporary, files))
            self.heartbeat(step, "completing the checkpoint")
            self._together(failed, lambda: self._publish(final, temporary, step, counters, files))
        except UserError:
            if self.ranks.is_main:
                _give_up(final, temporary)
            raise
        self.ranks.print(f"saved {final}")
        self.heartbeat(step, "dropping older state")
        self._together(f"{final} is saved, but older state can not be removed", lambda: self._drop_old_state(step))

    def _together(self, complaint: str, do: Callable[[], dict | None]) -> dict:
        """Do this rank's share and wait for the others'. Returns what all returned; UserError on all if any failed."""
        mine = {"done": {}, "failed": None}
        try:
            mine["done"] = do() or {}
        except UserError as error:
            mine["failed"] = str(error)
        except Exception as error:
            reason = repr(error)
            if isinstance(error, OSError):
                reason = f"{error.strerror or error}" + f" ({error.filename})" * bool(error.filename)
            where = f"rank {self.ranks.rank}: " if self.ranks.world_size > 1 else ""
            mine["failed"] = f"{complaint}: {where}{reason}"
        all_ranks = [json.loads(text) for text in self.ranks.all_gather_str(json.dumps(mine))]
        for other in all_ranks:
            if other["failed"]:
                raise UserError(other["failed"])
        return {key: value for other in all_ranks for key, value in other["done"].items()}

    def _begin(self, final: Path, temporary: Path, tensors: dict[str, Tensor | None]) -> None:
        self._copy(tensors)
        self.copied.set()
        if not self.ranks.is_main:
            return
        needed = self.config.parameters * (self.dtype.itemsize + 3 * 4) + 2**24  # weights twice, moments, small files
        if (free := shutil.disk_usage(self.run).free) < needed:
            raise UserError(
                f"no room for {final}: it needs {needed / 1e9:.2f} GB and {free / 1e9:.2f} GB are free; "
                f"nothing was written, make room and run the same line again"
            )
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()  # in a run that is still there: a file system that is gone must not be made anew elsewhere
        (temporary / "state").mkdir()

    def _write_part(self, temporary: Path) -> dict:
        """Write this rank's part. Returns its entry in the manifest."""
        if self.stream:
            self.stream.synchronize()
        file = f"state/part-{self.ranks.rank + 1:05}-of-{self.ranks.world_size:05}.safetensors"
        shapes, notes = {}, {}
        for key, shape in state_shapes(self.parameters).items():
            rows = self.rows[key.partition("/")[2]]
            if rows.start < rows.stop:
                shapes[key] = tuple(self.snapshot[key].shape)
                notes[key] = f"{rows.start}:{rows.stop} of {shape[0]}"

        def pieces(key: str) -> Iterator[Tensor]:
            rows = self.snapshot[key]
            yield from rows.split(max(CHUNK_BYTES // rows[0].nbytes, 1))

        return {file: write_tensors(temporary / file, torch.float32, shapes, pieces, notes)}

    def _write_model(self, temporary: Path, parts: dict) -> dict:
        """Write this rank's share of the Hugging Face files: what the parts hold. Returns their manifest entries."""
        files = self._model_files()
        mine = list(files)[self.ranks.rank :: self.ranks.world_size]
        if not mine:
            return {}
        stored = find_rows([temporary / file for file in parts], state_shapes(self.parameters))
        keys = {huggingface_name(name): f"weight/{name}" for name in self.parameters}

        def pieces(name: str) -> Iterator[Tensor]:
            for s in stored[keys[name]]:
                digest = hashlib.sha256()
                for _, values in read_rows([s], slice(s.first, s.last)):
                    digest.update(values.view(torch.uint8).numpy())
                    yield values.to(self.dtype)
                if digest.hexdigest() != parts[f"state/{s.path.name}"]["tensors"][keys[name]]:
                    raise OSError(f"{s.path} was read back otherwise than it was written")

        entries = {}
        for file in mine:
            shapes = {name: stored[keys[name]][0].shape for name in files[file]}
            entries[file] = write_tensors(temporary / file, self.dtype, shapes, pieces)
        return entries

    def _model_files(self) -> dict[str, list[str]]:
        shapes = {huggingface_name(name): tuple(p.shape) for name, p in self.parameters.items()}
        return model_files(shapes, self.dtype)

    def _publish(self, final: Path, temporary: Path, step: int, counters: dict, files: dict) -> None:
        """Add the small files and the manifest, and give the checkpoint its name."""
        adam_steps = set(self.snapshot["steps"].tolist())
        if len(adam_steps) > 1:
            raise RuntimeError(f"parameters disagree on Adam's step: {adam_steps}")
        if not self.ranks.is_main:
            return
        write_description(temporary, self.config, self.dtype, self.hidden_act, self.tokenizer, self._model_files())
        counters = {**counters, "adam_step": int(adam_steps.pop())}
        (temporary / COUNTERS).write_text(json.dumps(counters) + "\n")
        for path in sorted(p for p in temporary.rglob("*") if p.is_file()):
            if (name := path.relative_to(temporary).as_posix()) not in files:
                flush(path)
                files[name] = checksums(path)
        flush(temporary / "state")
        write_manifest(temporary, {"format": FORMAT, "step": step, "files": dict(sorted(files.items()))})
        if final.exists():  # the same step saved again
            final.rename(_aside(final))
        temporary.rename(final)
        flush(self.run)
        shutil.rmtree(_aside(final), ignore_errors=True)

    def _drop_old_state(self, step: int) -> None:
        if self.ranks.is_main:
            drop_old_state(self.run, step, self.keep_state)


def _aside(final: Path) -> Path:
    return final.with_name(f".{final.name}.old.tmp")


def _give_up(final: Path, temporary: Path) -> None:
    """Leave the run as it was before a checkpoint that could not be saved."""
    shutil.rmtree(temporary, ignore_errors=True)
    with suppress(OSError):  # of a disk that fails; clean_up tries again at the next start
        if (aside := _aside(final)).exists() and not final.exists():
            aside.rename(final)
        shutil.rmtree(aside, ignore_errors=True)
