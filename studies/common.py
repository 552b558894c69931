"""What all studies share: the checkpoints of a run, one after the other in one model, and the tables that are left.

    study = Study("memorization", args, settings, dist)
    for run in study.runs:
        study.measure(run, items, compute, batch)    # compute(step, model, some of the items) -> more columns of these
    summary = study.finish(summarize)                # summarize(run, step, columns) -> a line of summary.csv

A study leaves in --out:

    items.parquet    one line for every item and checkpoint
    summary.csv      one line for every checkpoint
    parts/           the same items, one file for every checkpoint: what is there is not measured again, unless the
                     weights, the items or the settings have changed (the .json beside it has their hash, and its own)
    manifest.json    the command, versions, and sha256 of the weights, of the order of the data, and of the tables

Under torchrun the ranks share the items. Batch i goes to rank i % world_size, so that the tables do not depend on the
number of ranks: they are the same bytes for the same number of threads a rank (OMP_NUM_THREADS).
"""

import argparse
import csv
import hashlib
import json
import platform
import shlex
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor
from tqdm import tqdm

import data
from checkpoints.manifest import choose_steps, read_checkpoint
from corpus.order import Order
from model import Config, Pythia
from model.huggingface import read_config, read_weights
from runtime.errors import Parser, UserError, printable
from runtime.files import READ_ERRORS, atomic_write, read_small, reason
from runtime.manifests import checksums, saved_steps
from runtime.ranks import Dist, end_dist, init_dist
from runtime.run_directory import one_line_errors

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}
Columns = dict[str, np.ndarray]  # values [items] by the name of their column


def study_parser(name: str, description: str) -> Parser:
    """The flags that all studies have."""
    parser = Parser(f"python -m studies.{name}", description=description)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a run, or a directory of published stepN")
    parser.add_argument("--steps", default="all", help="all, final, or a list like 0,512,1000:143000:10000")
    parser.add_argument("--out", type=Path, metavar="DIR", help=f"default: RUN.studies/{name}, of the first RUN")
    parser.add_argument("--data", help="where the data of the runs is now (default: where run.json says)")
    parser.add_argument("--device", help="default: a GPU if there is one, else cpu")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32", help="of weights and arithmetic (default: fp32)")
    parser.add_argument("--every", type=int, default=1, metavar="N", help="only every Nth item (default: 1)")
    parser.add_argument("--limit", type=int, metavar="N", help="at most N items")
    parser.add_argument("--seed", type=int, default=0, help="of all that is drawn at random (default: 0)")
    return parser


@contextmanager
def all_ranks() -> Iterator[Dist]:
    """The ranks of torchrun, or this process alone. An error that all of them raise is printed once."""
    dist, together = init_dist(), False
    try:
        yield dist
        together = True
    except UserError as error:
        if dist.claim_error_report(str(error)):
            raise
        raise SystemExit(1) from None
    finally:
        end_dist(dist, together)


@dataclass(frozen=True)
class Run:
    """A run, or a directory of published checkpoints, and the steps of it that a study looks at."""

    path: Path
    steps: list[int]
    data_at: str | None = None  # where the data is, if not where run.json says

    @property
    def name(self) -> str:
        return self.path.resolve().name

    @cached_property
    def asked(self) -> argparse.Namespace:
        """The settings that decide which rows a step has: those of run.json, or the published ones and --data."""
        run = str(self.path) if (self.path / "run.json").exists() else None
        if not run and not self.data_at:
            raise UserError(f"{self.path} has no run.json: give its data as --data")
        given = dict.fromkeys(data.DEFAULTS) | {"data": self.data_at, "edits": None}
        asked = argparse.Namespace(**given, run=run, demo=False)
        data.take_settings(asked)
        return asked

    @cached_property
    def rows(self) -> data.Rows:
        """The rows as the run served them, with its edits. Raises UserError if the data is that of another run."""
        rows = data.open_asked(self.asked)
        data.add_edits(self.asked, rows)
        return rows

    def origins(self, numbers: np.ndarray) -> Columns:
        """The document of the first token of rows, and which copy of this document in the order it is (epoch, from 0).
        Both are -1 for pre-shuffled rows, which do not say where they come from."""
        if not isinstance(self.rows, Order):
            return {name: np.full(len(numbers), -1, np.int32) for name in ("document", "epoch")}
        order = self.rows
        places = order.sample_idx[order.shuffle_idx[numbers], 0].astype(np.int64)
        documents = order.doc_idx[places]
        epochs = (order.inverse.places(documents) < places[:, None]).sum(1)
        return {"document": documents.astype(np.int32), "epoch": epochs.astype(np.int32)}

    def weights_sha256(self, step: int) -> str:
        """A hash of the checksums of all files of a checkpoint but those of state/, which training drops some day."""
        files = read_checkpoint(self.path / f"step{step}")["files"]
        kept = {name: entry for name, entry in files.items() if not name.startswith("state/")}
        return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()


def recorded_settings(directory: Path) -> dict:
    """The settings of the training, which a checkpoint of ours records; {} for a published one."""
    return (read_checkpoint(directory).get("run") or {}).get("settings", {})


def trained_config(directory: Path) -> Config:
    """The shape of the model of a checkpoint. A checkpoint of ours gets the GELU of its training, which its config.json
    may not have; a published one keeps that of its config.json."""
    config = read_config(directory)
    gelu = recorded_settings(directory).get("gelu")
    return replace(config, gelu=gelu) if gelu in ("tanh", "none") else config


def stream(run: Path, steps: list[int], device: torch.device, dtype: torch.dtype) -> Iterator[tuple[int, Pythia]]:
    """Yield (step, model) for each step. It is one model, which gets the weights of the next step in place.

    A thread reads and verifies the next checkpoint while the caller works with this one. Raises UserError if one is
    missing or damaged, or if it has another shape.
    """
    if not steps:
        return
    config = trained_config(run / f"step{steps[0]}")
    with torch.device("meta"):
        model = Pythia(config)
    model.to(dtype).to_empty(device=device).requires_grad_(False)
    model.document_mask = bool(recorded_settings(run / f"step{steps[0]}").get("document_mask"))

    def read(step: int) -> dict[str, Tensor]:
        directory = run / f"step{step}"
        if replace(trained_config(directory), name=config.name) != config:  # outside the suite the name is stepN
            raise UserError(f"{directory} is another model than {run}/step{steps[0]}: its config.json differs")
        return dict(read_weights(directory, model))

    with ThreadPoolExecutor(1, "checkpoints") as thread:
        coming = thread.submit(read, steps[0])
        for step, following in zip(steps, [*steps[1:], None]):
            weights = coming.result()
            if following is not None:
                coming = thread.submit(read, following)
            for name, parameter in model.named_parameters():
                parameter.copy_(weights.pop(name))
            yield step, model


class Study:
    """A study of one or more runs, on all ranks. Raises UserError if the flags do not fit the runs."""

    def __init__(self, name: str, args: argparse.Namespace, settings: dict, dist: Dist):
        self.name, self.dist = name, dist
        self.out: Path = args.out or args.runs[0].with_name(f"{args.runs[0].resolve().name}.studies") / name
        self.device, self.dtype = usable_device(args.device or dist.device), DTYPES[args.dtype]
        self.settings = {"dtype": args.dtype, "device": self.device.type, **settings}
        self.runs = [find_run(path, args.steps, args.data) for path in args.runs]
        if len({run.name for run in self.runs}) < len(self.runs):
            raise UserError("two runs have the same name: their tables would mix")
        if args.every < 1 or (args.limit is not None and args.limit < 1):
            raise UserError("--every and --limit must be positive")
        self.every, self.limit = args.every, args.limit

    def sample(self, count: int) -> np.ndarray:
        """The numbers, below `count`, of the items that --every and --limit leave: int64."""
        return np.arange(0, count, self.every)[: self.limit]

    def measure(
        self,
        run: Run,
        items: Columns,
        compute: Callable[[int, Pythia, Columns], Columns],
        batch: int,
        inputs: Columns | None = None,
    ) -> None:
        """Measure the items, columns of equal length, under every checkpoint.

        compute(step, model, columns) gets `batch` items at a time, with their inputs: arrays [items, ..], for example
        of tokens, which the tables do not keep. The result may depend on nothing else but the settings. Every part has
        the columns run, step, those of the items and those of compute, one line an item.
        """
        given, count = items | (inputs or {}), len(next(iter(items.values())))
        if not count:
            raise UserError(f"{run.path}: there is nothing to measure")
        keys = self._keys(run, given)
        missing = [step for step in run.steps if not is_finished(self.part(run, step), keys[step])]
        missing = json.loads(self.dist.all_gather_str(json.dumps(missing))[0])  # a network file system may be late
        shares = range(self.dist.rank, -(-count // batch), self.dist.world_size)
        bar = tqdm(total=len(missing) * len(shares), unit="batch", disable=None if self.dist.is_main else True)
        with bar, torch.inference_mode():
            for step, model in stream(run.path, missing, self.device, self.dtype):
                bar.set_description(f"{run.name}, step {step}")
                results = []
                for i in shares:
                    results.append(compute(step, model, {k: v[i * batch : (i + 1) * batch] for k, v in given.items()}))
                    bar.update()
                columns = self._gather(results, count, batch)
                self.dist.run_on_main(lambda: self._write_part(run, step, keys[step], items | columns))  # noqa: B023

    def finish(self, summarize: Callable[[Run, int, Columns], dict]) -> list[dict] | None:
        """Write items.parquet, summary.csv and manifest.json. Returns the lines of the summary on the main rank."""
        return self.dist.run_on_main(lambda: self._finish(summarize))

    def part(self, run: Run, step: int) -> Path:
        return self.out / "parts" / f"{run.name}-step{step}.parquet"

    def columns(self, run: Run, step: int) -> Columns:
        """The items, and what was measured under a checkpoint: arrays [items, ..]."""
        table, found = pq.read_table(self.part(run, step)), {}
        for name in table.column_names[2:]:  # without run and step
            array = table[name].combine_chunks()
            is_list = pa.types.is_fixed_size_list(array.type)
            found[name] = (array.flatten() if is_list else array).to_numpy(zero_copy_only=False)
            found[name] = found[name].reshape(len(table), -1) if is_list else found[name]
        return found

    def base_columns(self, run: Run, step: int) -> Columns | None:
        """The columns of the first run at the step of another one; None where there is nothing to compare."""
        base = self.runs[0]
        return self.columns(base, step) if run is not base and step in base.steps else None

    def _keys(self, run: Run, given: Columns) -> dict[int, str]:
        """For each step a hash of what its part depends on."""
        common = hashlib.sha256(json.dumps([self.name, self.settings]).encode())
        for name, values in given.items():
            common.update(f"{name} {values.dtype}".encode() + np.ascontiguousarray(values).tobytes())
        keys = {step: common.copy() for step in run.steps}
        for step, digest in keys.items():
            digest.update(run.weights_sha256(step).encode())
        return {step: digest.hexdigest() for step, digest in keys.items()}

    def _gather(self, results: list[Columns], count: int, batch: int) -> Columns:
        """The columns of all ranks, in the order of the items. Every rank gives those of its batches."""
        types = {name: (values.dtype.str, values.shape[1:]) for name, values in results[0].items()} if results else {}
        types = json.loads(self.dist.all_gather_str(json.dumps(types))[0])  # a rank may have no batch
        rounds, columns = -(-count // (batch * self.dist.world_size)), {}
        for name, (dtype, shape) in types.items():
            own = np.zeros((rounds * batch, *shape), dtype)
            for i, result in enumerate(results):
                own[i * batch :][: len(result[name])] = result[name]
            parts = self.dist.all_gather(torch.from_numpy(own.view(np.uint8))).numpy().view(dtype)
            columns[name] = parts.reshape(-1, rounds, batch, *shape).swapaxes(0, 1).reshape(-1, *shape)[:count]
        return columns

    def _write_part(self, run: Run, step: int, key: str, columns: Columns) -> None:
        count = len(next(iter(columns.values())))
        names = pa.DictionaryArray.from_arrays(np.zeros(count, np.int32), [run.name])
        for name, values in columns.items():
            if values.ndim == 2:  # a list for every item
                columns[name] = pa.FixedSizeListArray.from_arrays(values.ravel(), values.shape[1])
        table = pa.table({"run": names, "step": np.full(count, step, np.int32), **columns})
        path = self.part(run, step)
        with one_line_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_write(path) as file:
                pq.write_table(table, file)
            with atomic_write(path.with_suffix(".json"), "w") as file:
                file.write(json.dumps({"key": key, **checksums(path)}) + "\n")

    def _finish(self, summarize: Callable[[Run, int, Columns], dict]) -> list[dict]:
        summary, weights = [], {}
        path = self.out / "items.parquet"
        with one_line_errors(path), atomic_write(path) as file:
            writer = None
            for run in self.runs:
                for step in run.steps:
                    table = pq.read_table(self.part(run, step))
                    writer = writer or pq.ParquetWriter(file, table.schema)
                    writer.write_table(table)
                    summary.append({"run": run.name, "step": step, **summarize(run, step, self.columns(run, step))})
                    weights[f"{run.name}/step{step}"] = run.weights_sha256(step)
            writer.close()
        write_csv(self.out / "summary.csv", summary)
        self.write_manifest(weights)
        return summary

    def write_manifest(self, weights: dict[str, str]) -> None:
        """Write manifest.json, when all tables are there. weights: the hash of every checkpoint. Raises UserError."""
        record = {
            "study": self.name,
            "command": shlex.join(["python", "-m", f"studies.{self.name}", *sys.argv[1:]]),
            "settings": self.settings,
            "versions": {"python": platform.python_version()} | {n: version(n) for n in ("torch", "numpy", "pyarrow")},
            "ranks": self.dist.world_size,
            "threads": torch.get_num_threads(),
            "weights_sha256": weights,
            "order_sha256": {run.name: run.rows.sha256 for run in self.runs if "rows" in vars(run)},
            "files": {name: checksums(self.out / name) for name in ("items.parquet", "summary.csv")},
        }
        with one_line_errors(self.out), atomic_write(self.out / "manifest.json", "w") as file:
            file.write(json.dumps(record, indent=1) + "\n")
        print(printable(f"{self.out}: tables and figures"))


def find_run(path: Path, steps: str, data: str | None) -> Run:
    """The run at a path. Raises UserError if it has no checkpoints, or not those of --steps."""
    if not (present := saved_steps(path)):
        raise UserError(f"{path} has no checkpoints stepN: give a run, or what `checkpoint.py fetch` has downloaded")
    return Run(path, choose_steps(steps, present, f"{path} has no"), data)


def usable_device(device: str | torch.device) -> torch.device:
    """The device of --device. Raises UserError if torch cannot use it here."""
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {device}: {str(error).splitlines()[0]}") from None


def is_finished(path: Path, key: str) -> bool:
    """Whether the part at a path is whole and was made from what the key stands for."""
    try:
        return json.loads(read_small(path.with_suffix(".json"), 10_000)) == {"key": key, **checksums(path)}
    except READ_ERRORS:
        return False


def write_csv(path: Path, lines: list[dict]) -> None:
    """Write lines of equal keys as a CSV file. Numbers have all their digits. Raises UserError."""
    with one_line_errors(path), atomic_write(path, "w") as file:
        writer = csv.DictWriter(file, list(lines[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(lines)


def by_task(items: Columns) -> dict[tuple[str, int], Columns]:
    """The items of every task and number of shots, in the order in which the items have them."""
    names = dict.fromkeys(zip(items["task"].tolist(), items["shots"].tolist()))
    chosen = {name: (items["task"] == name[0]) & (items["shots"] == name[1]) for name in names}
    return {name: {key: values[chosen[name]] for key, values in items.items()} for name in names}


def read_lines(file: Path) -> list[str]:
    """The lines of a user's text file that are not empty. Raises UserError."""
    try:
        return [line.strip() for line in file.read_text("utf-8-sig").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file} cannot be read: {reason(error)}") from None
