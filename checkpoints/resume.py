"""Resuming: every rank reads its rows of weights and moments from the parts. The number of ranks may change."""

import json
import math
import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from checkpoints.manifest import COUNTERS, read_checkpoint, steps_with_state, verify_checkpoint
from model import Pythia
from parallel.fsdp import local, local_rows
from runtime.errors import UserError, printable
from runtime.files import READ_ERRORS, read_small, reason
from runtime.manifests import MAX_JSON_BYTES, saved_steps
from runtime.ranks import Dist
from runtime.tensors import CHUNK_BYTES, read_header, read_pieces

MOMENTS = ("exp_avg", "exp_avg_sq")  # torch's names of Adam's first and second moment


@dataclass(frozen=True)
class StoredRows:
    """Rows first .. last - 1 of a float32 tensor [rows, ..] of the given shape, at byte `offset` of a part."""

    path: Path
    first: int
    last: int
    offset: int
    shape: tuple[int, ...]


def state_shapes(parameters: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """The shape of every weight and moment, by its name in the parts: "weight/embed", "exp_avg/embed", .."""
    return {f"{kind}/{name}": tuple(p.shape) for kind in ("weight", *MOMENTS) for name, p in parameters.items()}


def find_rows(parts: list[Path], shapes: dict[str, tuple[int, ...]]) -> dict[str, list[StoredRows]]:
    """Where the parts hold the rows of every tensor, in ascending order.

    Raises UserError, naming file and tensor, unless the parts hold every row of every tensor once, and nothing else.
    """
    found: dict[str, list[StoredRows]] = {key: [] for key in shapes}
    for path in parts:
        try:
            header, entries, metadata = read_header(path)
            for key, entry in entries.items():
                if key not in shapes:
                    raise UserError(f"{path}: {key[:100]!r} does not belong to this model")
                rows = re.fullmatch(r"(\d{1,18}):(\d{1,18}) of (\d{1,18})", metadata[key], re.ASCII)
                first, last, total = map(int, rows.groups()) if rows else (0, 0, 0)
                shape = [last - first, *shapes[key][1:]]
                if last <= first or total != shapes[key][0] or (entry["dtype"], entry["shape"]) != ("F32", shape):
                    raise UserError(f"{path}: {key} does not belong to this model, where it is {list(shapes[key])}")
                found[key].append(StoredRows(path, first, last, len(header) + entry["data_offsets"][0], shapes[key]))
        except READ_ERRORS as error:
            raise UserError(f"{path} is damaged: {reason(error)}") from None
    for key, stored in found.items():
        stored.sort(key=lambda s: s.first)
        end = 0
        for s in stored:
            if s.first != end:
                raise UserError(f"{s.path}: {key} begins with row {s.first}, not with row {end}")
            end = s.last
        if end != shapes[key][0]:
            raise UserError(f"{parts[0].parent if parts else 'state'} lacks {key}, rows {end} to {shapes[key][0] - 1}")
    return found


def read_rows(stored: list[StoredRows], wanted: slice) -> Iterator[tuple[int, Tensor]]:
    """The wanted rows in pieces of CHUNK_BYTES: the number of the first row and the values, float32 [rows, ..]."""
    for s in stored:
        first, last, row_bytes = max(s.first, wanted.start), min(s.last, wanted.stop), 4 * math.prod(s.shape[1:])
        offset, piece = s.offset + row_bytes * (first - s.first), max(CHUNK_BYTES // row_bytes, 1) * row_bytes
        for data in read_pieces(s.path, offset, row_bytes * max(last - first, 0), piece):
            values = data.view(torch.float32).view(-1, *s.shape[1:])
            yield first, values
            first += len(values)


# Resuming


def latest_valid_step(run: Path, dist: Dist) -> int | None:
    """The newest step whose checkpoint passes verification, or None if the run has no checkpoint with state.

    Prints each skipped checkpoint. Raises UserError if none is valid. All ranks must call this: they share the work
    and get the same answer. The main rank lists the steps, because on a network file system others may see older ones.
    """
    steps = dist.run_on_main(partial(steps_with_state, run))
    steps = json.loads(dist.all_gather_str(json.dumps(steps))[0])
    skipped = []
    for step in reversed(steps):
        if not (errors := verify_checkpoint(run / f"step{step}", dist)):
            for error in skipped:
                dist.print(printable(f"{error}: going back to step {step}"))
            return step
        skipped.append(errors[0])
    if skipped:
        raise UserError(
            f"{skipped[0]}, and {run} has no older valid checkpoint: put back a good copy, or choose another --out"
        )
    return None


def recover_record(run: Path) -> dict | None:
    """What the newest valid manifest says about the run: its settings and data. None if no manifest says it."""
    for step in reversed(saved_steps(run)):
        with suppress(UserError):
            if isinstance(record := read_checkpoint(run / f"step{step}").get("run"), dict):
                return record
    return None


def restore(
    directory: Path,
    model: Pythia,
    optimizer: torch.optim.Optimizer,
    dist: Dist = Dist(),  # noqa: B008 (immutable)
    verified: bool = False,
) -> dict:
    """Load this rank's rows of weights and moments into model and optimizer. Returns the counters.

    Verifies the checkpoint first; verified=True says that latest_valid_step did. Raises UserError, before anything
    changes, if a file is missing or damaged or belongs to another model. All ranks must call this.
    """
    if not verified and (errors := verify_checkpoint(directory, dist)):
        raise UserError(f"{errors[0]}: cannot resume from it; remove {directory} to resume from an older checkpoint")
    files = read_checkpoint(directory)["files"]
    parts = [directory / name for name in files if name.startswith("state/") and name.endswith(".safetensors")]
    if not parts or COUNTERS not in files:
        missing = COUNTERS if parts else "state"
        raise UserError(f"{directory} lacks {missing}: a run cannot resume from it, but its model can be used")
    counters = _read_counters(directory / COUNTERS)
    parameters = dict(model.named_parameters())
    stored = find_rows(parts, state_shapes(parameters))

    adam_step = float(counters.pop("adam_step"))
    optimizer.state.clear()
    with torch.no_grad():
        for name, p in parameters.items():
            targets = {"weight": p}
            if adam_step:
                moments = {moment: torch.empty_like(p) for moment in MOMENTS}
                optimizer.state[p].update(step=torch.tensor(adam_step, device=p.device), **moments)
                targets |= moments
            rows = local_rows(p)
            for kind, target in targets.items():
                _fill(local(target), stored[f"{kind}/{name}"], rows)
    return counters


def _fill(target: Tensor, stored: list[StoredRows], rows: slice) -> None:
    try:
        for first, values in read_rows(stored, rows):
            target[first - rows.start :][: len(values)].copy_(values)
    except (OSError, ValueError) as error:  # it was verified a moment ago
        raise UserError(f"{stored[0].path.parent.parent} cannot be read any more: {reason(error)}") from None


def _read_counters(path: Path) -> dict:
    try:
        counters = json.loads(read_small(path, MAX_JSON_BYTES))
        adam_step = counters["adam_step"]
        if type(adam_step) is not int or not 0 <= adam_step <= 2**24:  # larger integers are not exact in float32
            raise ValueError(f"adam_step is {str(adam_step)[:100]!r}")
    except READ_ERRORS as error:
        raise UserError(f"{path} is damaged: {reason(error)}") from None
    return counters
