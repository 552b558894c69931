"""Resuming: weights and moments are read from the parts, on any number of ranks."""

import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from checkpoints.manifest import (
    CHUNK_BYTES,
    COUNTERS,
    READ_ERRORS,
    read_header,
    read_manifest,
    steps_with_state,
    verify_checkpoint,
)
from model import Pythia
from parallel.fsdp import local, local_rows
from runtime.errors import UserError
from runtime.ranks import Dist

MOMENTS = ("exp_avg", "exp_avg_sq")  # torch's names of Adam's first and second moment


@dataclass(frozen=True)
class StoredRows:
    """Rows first .. last - 1 of a tensor of the given shape as they lie in a part, `offset` bytes behind its start."""

    path: Path
    first: int
    last: int
    offset: int
    shape: tuple[int, ...]


def state_shapes(parameters: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """What the parts hold together: the shape of every weight and moment, by the name it has there."""
    return {f"{kind}/{name}": tuple(p.shape) for kind in ("weight", *MOMENTS) for name, p in parameters.items()}


def find_rows(parts: list[Path], shapes: dict[str, tuple[int, ...]]) -> dict[str, list[StoredRows]]:
    """Where the rows of every tensor lie in the parts, ascending.

    Raises UserError, naming file and tensor, unless the parts hold every row of every tensor once, and nothing else.
    """
    found: dict[str, list[StoredRows]] = {key: [] for key in shapes}
    for path in parts:
        try:
            header, entries, metadata = read_header(path)
            for key, entry in entries.items():
                if key not in shapes:
                    raise UserError(f"{path}: {key[:100]!r} does not belong to this model")
                shape, (begin, end) = shapes[key], entry["data_offsets"]
                rows = re.fullmatch(r"(\d{1,18}):(\d{1,18}) of (\d{1,18})", metadata[key], re.ASCII)
                first, last, total = map(int, rows.groups()) if rows else (0, 0, 0)
                here = (last - first, *shape[1:])
                sound = total == shape[0] and entry["dtype"] == "F32" and entry["shape"] == list(here)
                if not sound or last <= first or end - begin != 4 * math.prod(here):
                    raise UserError(f"{path}: {key} does not belong to this model, where it is {list(shape)}")
                found[key].append(StoredRows(path, first, last, len(header) + begin, shape))
        except READ_ERRORS as error:
            raise UserError(f"{path} is damaged: {error}") from None
    for key, stored in found.items():
        stored.sort(key=lambda s: s.first)
        end = 0
        for s in stored:
            if s.first != end:
                raise UserError(f"{s.path}: {key} begins with row {s.first}, where row {end} is due")
            end = s.last
        if end != shapes[key][0]:
            raise UserError(f"{parts[0].parent if parts else 'state'} lacks {key}, rows {end} to {shapes[key][0] - 1}")
    return found


def read_rows(stored: list[StoredRows], wanted: slice) -> Iterator[tuple[int, Tensor]]:
    """The wanted rows, in pieces: the number of the first and their values, float32 [rows, ..] on the CPU. Each piece
    takes the memory of the one before."""
    for s in stored:
        first, last, row_bytes = max(s.first, wanted.start), min(s.last, wanted.stop), 4 * math.prod(s.shape[1:])
        if first >= last:
            continue
        memory = torch.empty(min(max(CHUNK_BYTES // row_bytes, 1), last - first), *s.shape[1:])
        with s.path.open("rb") as file:
            file.seek(s.offset + (first - s.first) * row_bytes)
            while first < last:
                values = memory[: last - first]
                if file.readinto(values.view(torch.uint8).numpy()) < values.nbytes:
                    raise OSError(f"{s.path} is shorter than it was")
                yield first, values
                first += len(values)


# Resuming


def latest_valid_step(run: Path, ranks: Dist) -> int | None:
    """The newest step whose checkpoint is whole, every checksum verified; None when there is none to resume from.

    Says which damaged ones it passes over. Raises UserError when there are only such. All ranks must call this: they
    share the work and get the same answer, for the list of steps is that of the first (network file systems may show
    others an older one).
    """
    steps = json.loads(ranks.all_gather_str(json.dumps(steps_with_state(run) if ranks.is_main else None))[0])
    damaged = []
    for step in reversed(steps):
        if not (found := verify_checkpoint(run / f"step{step}", ranks)):
            for line in damaged:
                ranks.print(f"{line}: going back to step {step}")
            return step
        damaged.append(found[0])
    if damaged:
        raise UserError(
            f"{damaged[0]}, and no older checkpoint of {run} is whole: put back a good copy, or choose another --out"
        )
    return None


def restore(
    directory: Path,
    model: Pythia,
    optimizer: torch.optim.Optimizer,
    ranks: Dist = Dist(),  # noqa: B008 (immutable)
    verified: bool = False,
) -> dict:
    """Load weights and moments, of which every rank takes its rows, into model and optimizer. Returns the counters.

    Every checksum is verified before, unless `verified` says that latest_valid_step has done so. Raises UserError,
    before anything is changed, when a file is missing or damaged or belongs to another model. All ranks must call this.
    """
    if not verified and (found := verify_checkpoint(directory, ranks)):
        raise UserError(
            f"{found[0]}: can not resume from it; remove {directory} to resume from the checkpoint before it"
        )
    files = read_manifest(directory)["files"]
    parts = [directory / name for name in files if name.startswith("state/") and name.endswith(".safetensors")]
    if not parts or COUNTERS not in files:
        raise UserError(f"{directory} lacks {COUNTERS if parts else 'state'}: its model can be used, not resumed from")
    counters = _read_counters(directory / COUNTERS)
    parameters = dict(model.named_parameters())
    stored = find_rows(parts, state_shapes(parameters))

    adam_step = float(counters.pop("adam_step"))
    optimizer.state.clear()
    with torch.no_grad():
        for name, p in parameters.items():
            targets = {"weight": p}
            if adam_step:
                targets |= {moment: torch.empty_like(p) for moment in MOMENTS}
                moments = {moment: targets[moment] for moment in MOMENTS}
                optimizer.state[p].update(step=torch.tensor(adam_step, device=p.device), **moments)
            rows = local_rows(p)
            for kind, target in targets.items():
                for first, values in read_rows(stored[f"{kind}/{name}"], rows):
                    local(target)[first - rows.start :][: len(values)].copy_(values)
    return counters


def _read_counters(path: Path) -> dict:
    try:
        counters = json.loads(path.read_bytes())
        adam_step = counters["adam_step"]
        if type(adam_step) is not int or not 0 <= adam_step <= 2**24:  # a float32 counts no further
            raise ValueError(f"adam_step is {str(adam_step)[:100]!r}")
    except READ_ERRORS as error:
        raise UserError(f"{path} is damaged: {error}") from None
    return counters
