"""Saving: a background thread on every rank writes the checkpoint. Any stage can fail, and any process can be killed.

    save(step)     notes the tensors to save and returns; the thread then goes through five stages:
      copy         this rank's rows to host memory; wait_for_snapshot() holds back the next update until it is done
      part         write these rows as this rank's part
      model        write this rank's share of the Hugging Face files, read from the parts of all ranks
      complete     rank 0: small files and manifest; rename the directory to stepN; print "saved"
      old state    rank 0: remove the state of older checkpoints

After each stage the ranks exchange their results: all go on, or all give up. manifest.py describes the files.
"""

import hashlib
import json
import math
import secrets
import shutil
import weakref
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from threading import Event, Thread

import torch
from torch import Tensor

from checkpoints.manifest import COUNTERS, drop_old_state
from checkpoints.resume import find_rows, read_rows, state_shapes
from model import Pythia
from model.huggingface import Export, huggingface_name, model_files, write_description
from parallel.fsdp import local, local_rows, saved_rows
from runtime.errors import UserError
from runtime.files import flush, naming, reason
from runtime.manifests import FORMAT, checksums, write_manifest
from runtime.ranks import Dist
from runtime.tensors import CHUNK_BYTES, write_tensors


class Saver:
    """Saves checkpoints in a background thread, one at a time. Every rank must make the same calls.

    The newest `keep_state` checkpoints keep their state. The thread calls heartbeat(step, doing) at the start of every
    stage, on all ranks. On the main rank it calls check(step) before it creates, renames or removes a directory:
    check raises UserError if `run` is not the directory any more that the run has locked. `record`, which must be JSON,
    is written to every manifest: recover_record reads it if run.json is damaged.
    """

    def __init__(
        self,
        run: Path,
        model: Pythia,
        optimizer: torch.optim.Optimizer,
        dist: Dist,
        export: Export,
        keep_state: int = 2,
        heartbeat: Callable[[int, str], None] = lambda step, doing: None,
        check: Callable[[int], None] = lambda step: None,
        record: dict | None = None,
    ):
        run.mkdir(parents=True, exist_ok=True)
        self.run, self.config, self.optimizer = run, model.config, optimizer
        self.export, self.keep_state, self.heartbeat, self.check = export, keep_state, heartbeat, check
        self.manifest = {} if record is None else {"run": json.loads(json.dumps(record))}  # its constant part
        self.dist = dist.with_own_group()
        self.parameters = dict(model.named_parameters())
        self.shapes = state_shapes(self.parameters)
        self.rows = {key: saved_rows(self.parameters[key.partition("/")[2]]) for key in self.shapes}  # of this rank
        model_shapes = {huggingface_name(name): tuple(p.shape) for name, p in self.parameters.items()}
        self.model_files = model_files(model_shapes, export.dtype)
        self.snapshot: dict[str, Tensor] = {}  # host memory: the rows that this rank writes
        self.stream = torch.cuda.Stream() if dist.device.type == "cuda" else None
        self.copied = Event()
        self.copied.set()
        self.thread: Thread | None = None
        self.error: BaseException | None = None

    def save(self, step: int, counters: dict) -> None:
        """Start to write RUN/stepN; restore returns the counters, which must be JSON.

        Waits for the previous checkpoint, and raises its UserError if it failed.
        """
        self.finish()
        tensors, counters = self._tensors(), json.loads(json.dumps(counters))
        if self.stream:
            self.stream.wait_stream(torch.cuda.current_stream())
        self.copied.clear()
        self.thread = Thread(target=self._save, args=(step, tensors, counters), daemon=True)
        self.thread.start()

    def wait_for_snapshot(self) -> None:
        """Return when weights and moments may change again. On a GPU the next kernel waits, not the host."""
        self.copied.wait()
        if self.stream:
            torch.cuda.current_stream().wait_stream(self.stream)

    @property
    def failure(self) -> str | None:
        """Why an earlier checkpoint could not be saved, in one line. Never waits."""
        return None if self.error is None else str(self.error).partition("\n")[0]

    def wait(self) -> None:
        """Wait for the checkpoint that is being written."""
        if self.thread:
            self.thread.join()

    def finish(self) -> None:
        """Wait for the checkpoint that is being written. Raises UserError if it, or an earlier one, failed."""
        self.wait()
        if self.error:
            raise self.error

    # The snapshot

    def _tensors(self) -> dict[str, Tensor | None]:
        """The tensors that this rank saves, by their names in the part, and Adam's step counts ("steps").

        None stands for zeros: the optimizer has no state before the first update.
        """
        states = {name: self.optimizer.state.get(p, {}) for name, p in self.parameters.items()}
        steps = [state["step"] for state in states.values() if state]
        tensors = {"steps": torch.stack(steps) if steps else None}
        for key, rows in self.rows.items():
            kind, _, name = key.partition("/")
            p = self.parameters[name]
            first = local_rows(p).start
            value = p if kind == "weight" else states[name].get(kind)
            tensors[key] = None if value is None else local(value.detach())[rows.start - first : rows.stop - first]
        return tensors

    def _copy(self, tensors: dict[str, Tensor | None]) -> None:
        """Copy the tensors to the snapshot. Its memory is allocated once; a GPU copies to it beside other kernels."""
        if not self.snapshot:
            shapes = {"steps": (len(self.parameters),)}
            shapes |= {key: (rows.stop - rows.start, *self.shapes[key][1:]) for key, rows in self.rows.items()}
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
        """Page-lock memory for copies from a GPU. (torch's pin_memory rounds up to a power of two.)

        If the system refuses it, as some containers do, copies take longer, and training waits for them.
        """
        cuda, address = torch.cuda.cudart(), memory.data_ptr()
        if int(cuda.cudaHostRegister(address, memory.nbytes, 0)) == 0:
            weakref.finalize(self, cuda.cudaHostUnregister, address)
            return
        print(f"note: rank {self.dist.rank} cannot page-lock {memory.nbytes / 1e9:.2f} GB: its checkpoints take longer")
        with suppress(RuntimeError):  # CUDA reports the refusal once more, at the next kernel
            torch.ones(1, device=self.dist.device)

    # The thread

    def _save(self, step: int, tensors: dict[str, Tensor | None], counters: dict) -> None:
        final, temporary, files = self.run / f"step{step}", self.run / f".step{step}.{secrets.token_hex(8)}.tmp", {}
        stages = {
            "writing weights and moments": lambda: self._write_part(temporary),
            "writing the model": lambda: self._write_model(temporary, files),
            "completing the checkpoint": lambda: self._complete(final, temporary, step, counters, files),
        }
        complaint = f"{final} could not be saved, earlier checkpoints are whole"
        try:
            if self.stream:
                torch.cuda.set_device(self.dist.device)  # a new thread starts with device 0
            self.heartbeat(step, "copying weights and moments")
            begun = self._together(step, lambda: self._begin(final, temporary, step, tensors), complaint)
            temporary = self.run / begun["temporary"]  # of rank 0: nobody can guess its name
            for doing, stage in stages.items():
                self.heartbeat(step, doing)
                files |= self._together(step, stage, complaint)
            self.dist.print(f"saved {final}")
            self.heartbeat(step, "dropping older state")
            self._together(step, lambda: self._drop(step), f"{final} is saved, but older state cannot be removed")
        except BaseException as error:  # finish() raises it
            self.error = error
            if isinstance(error, UserError) and self.dist.is_main:
                _give_up(final, temporary)
        finally:
            self.copied.set()

    def _together(self, step: int, stage: Callable[[], dict | None], complaint: str) -> dict:
        """Run a stage on all ranks. Returns their results, merged; raises UserError on all if one failed."""
        result, failure = None, None
        try:
            try:
                result = stage()
            except OSError:
                if self.dist.is_main:
                    self.check(step)  # raises if the run directory was moved, which explains the error
                raise
        except UserError as error:
            failure = str(error)
        except Exception as error:
            where = f"rank {self.dist.rank}: " if self.dist.world_size > 1 else ""
            failure = f"{complaint}: {where}{reason(error) if isinstance(error, OSError) else repr(error)}"
        outcomes = [json.loads(text) for text in self.dist.all_gather_str(json.dumps([result or {}, failure]))]
        for _, failure in outcomes:
            if failure:
                raise UserError(failure)
        return {file: entry for result, _ in outcomes for file, entry in result.items()}

    def _begin(self, final: Path, temporary: Path, step: int, tensors: dict[str, Tensor | None]) -> dict:
        """Take the snapshot. The main rank checks the free space, creates the temporary directory and returns its
        name."""
        self._copy(tensors)
        self.copied.set()
        if not self.dist.is_main:
            return {}
        self.check(step)
        needed = self.config.parameters * (self.export.dtype.itemsize + 3 * 4)  # bytes: the model; weights and moments
        needed += 2**24  # small files
        if (free := shutil.disk_usage(self.run).free) < needed:
            raise UserError(
                f"no room for {final}: it needs {needed / 1e9:.2f} GB and {free / 1e9:.2f} GB are free; "
                f"nothing was written, make room and run the same command again"
            )
        temporary.mkdir()  # no parents=True: if the file system was unmounted, fail instead of writing elsewhere
        (temporary / "state").mkdir()
        return {"temporary": temporary.name}

    def _write_part(self, temporary: Path) -> dict:
        """Write this rank's part. Returns its entry in the manifest."""
        if self.stream:
            self.stream.synchronize()
        file = f"state/part-{self.dist.rank + 1:05}-of-{self.dist.world_size:05}.safetensors"
        mine = {key: rows for key, rows in self.rows.items() if rows.start < rows.stop}
        shapes = {key: tuple(self.snapshot[key].shape) for key in mine}
        notes = {key: f"{rows.start}:{rows.stop} of {self.shapes[key][0]}" for key, rows in mine.items()}

        def pieces(key: str) -> Iterator[Tensor]:
            rows = self.snapshot[key]
            yield from rows.split(max(CHUNK_BYTES // rows[0].nbytes, 1))

        return {file: write_tensors(temporary / file, torch.float32, shapes, pieces, notes)}

    def _write_model(self, temporary: Path, parts: dict) -> dict:
        """Write this rank's share of the Hugging Face files from the parts. Returns their entries in the manifest."""
        mine = list(self.model_files)[self.dist.rank :: self.dist.world_size]
        if not mine:
            return {}
        stored = find_rows([temporary / file for file in parts], self.shapes)
        keys = {huggingface_name(name): f"weight/{name}" for name in self.parameters}

        def pieces(name: str) -> Iterator[Tensor]:
            for s in stored[keys[name]]:
                digest = hashlib.sha256()
                for _, values in read_rows([s], slice(s.first, s.last)):
                    digest.update(values.view(torch.uint8).numpy())
                    yield values.to(self.export.dtype)
                if digest.hexdigest() != parts[f"state/{s.path.name}"]["tensors"][keys[name]]:
                    raise OSError(f"{s.path} does not contain the bytes that were written: the disk may be failing")

        entries = {}
        for file in mine:
            shapes = {name: stored[keys[name]][0].shape for name in self.model_files[file]}
            entries[file] = write_tensors(temporary / file, self.export.dtype, shapes, pieces)
        return entries

    def _complete(self, final: Path, temporary: Path, step: int, counters: dict, files: dict) -> None:
        """Write the small files and the manifest, and rename the directory."""
        adam_steps = set(self.snapshot["steps"].tolist())
        if len(adam_steps) > 1:
            raise RuntimeError(f"parameters disagree on Adam's step: {adam_steps}")
        if not self.dist.is_main:
            return
        write_description(temporary, self.config, self.export, self.model_files)
        counters = {**counters, "adam_step": int(adam_steps.pop())}
        with naming(temporary / COUNTERS):
            (temporary / COUNTERS).write_text(json.dumps(counters) + "\n")
        for path in sorted(p for p in temporary.rglob("*") if p.is_file()):
            if (name := path.relative_to(temporary).as_posix()) not in files:
                flush(path)
                files[name] = checksums(path)
        flush(temporary / "state")
        files = dict(sorted(files.items()))
        write_manifest(temporary, {"format": FORMAT, "step": step, **self.manifest, "files": files})
        self.check(step)
        if final.exists():  # the same step is saved again
            final.rename(_aside(final))
        temporary.rename(final)
        flush(self.run)
        shutil.rmtree(_aside(final), ignore_errors=True)

    def _drop(self, step: int) -> None:
        """Remove the state of older checkpoints."""
        if self.dist.is_main:
            self.check(step)
            drop_old_state(self.run, step, self.keep_state)


def _aside(final: Path) -> Path:
    """Where the old directory waits while the same step is saved again. A rename writes nothing, so that anybody may
    guess this name; and clean_up must find the step in it."""
    return final.with_name(f".{final.name}.old.tmp")


def _give_up(final: Path, temporary: Path) -> None:
    """Undo an unfinished save; a finished one stays. If the disk fails, clean_up tries again at the next start."""
    shutil.rmtree(temporary, ignore_errors=True)
    with suppress(OSError):
        if (aside := _aside(final)).exists() and not final.exists():
            aside.rename(final)
        shutil.rmtree(aside, ignore_errors=True)
