"""Run everything that one file asks for: runs, edits of their data, branches, studies. Again: only what is missing.

    python -m studies.suite examples/laptop.toml             in order, one after the other
    python -m studies.suite examples/laptop.toml --plan      print the commands and what of them is done
    python -m studies.suite examples/pythia.toml --slurm     print a script that submits them as jobs

The file is TOML. Flags are those of the commands, without their dashes:

    out = "runs/laptop"                                # default: runs/NAME-OF-THE-FILE
    train = "torchrun --standalone --nproc-per-node 8" # what starts train.py; default: python

    [[run]]
    name = "base-{size}-{seed}"                        # braces: one run for each combination of `each`
    each = { size = ["14m", "70m"], seed = [1234, 1] }
    flags = { demo = true, keep-state = 99 }

    [[edit]]
    name = "planted"
    make = "plant"                                     # data.py edit plant
    run = "base-14m-1234"
    flags = { plants = "facts.jsonl" }

    [[run]]
    name = "with-facts"
    branch = "base-14m-1234/step32"
    edits = "planted"

    [[study]]
    name = "effect"                                    # python -m studies.effect
    runs = ["base-14m-1234", "with-facts"]             # also patterns, as "base-*"
    flags = { probe = "probes.jsonl" }

A run and a study that are done end at once, because train.py and the studies continue what is there.
"""

import shlex
import subprocess
import sys
import tomllib
from dataclasses import dataclass
from fnmatch import fnmatchcase
from graphlib import CycleError, TopologicalSorter
from itertools import product
from pathlib import Path

from runtime.errors import Parser, UserError, printable, run_command
from runtime.files import reason
from runtime.manifests import saved_steps

KEYS = {
    "run": {"name": str, "each": dict, "branch": str, "edits": str, "flags": dict},
    "edit": {"name": str, "make": str, "run": str, "flags": dict},
    "study": {"name": str, "out": str, "runs": list, "flags": dict},
}
NEEDED = {"run": {"name"}, "edit": {"name", "make", "run"}, "study": {"name", "runs"}}


@dataclass
class Job:
    """A command, the path that it makes, and the names of the jobs that must come before."""

    name: str
    command: list[str]
    path: Path
    after: set[str]

    def state(self) -> str:
        if self.path.suffix == ".parquet":
            return "done" if self.path.exists() else "missing"
        if (self.path / "manifest.json").exists():
            return "done"
        return f"at step {max(steps)}" if (steps := saved_steps(self.path)) else "missing"


# ---- the file --------------------------------------------------------------------------------------------------------


def read_suite(file: Path) -> list[Job]:
    """The jobs of a file, each behind those that it needs. Raises UserError that names what is wrong."""
    try:
        suite = tomllib.loads(file.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read: {reason(error)}") from None
    out, train = Path(suite.pop("out", f"runs/{file.stem}")), shlex.split(suite.pop("train", "python"))
    if unknown := suite.keys() - KEYS.keys():
        raise UserError(f"{file}: {', '.join(sorted(unknown))}: the file has out, train, run, edit and study")
    for kind, entries in suite.items():
        for entry in entries if isinstance(entries, list) else [entries]:
            check_entry(file, kind, entry)
    runs = [one for entry in suite.get("run", []) for one in expand(file, entry)]
    jobs = [run_job(entry, out, train) for entry in runs]
    jobs += [edit_job(entry, out) for entry in suite.get("edit", [])]
    jobs += [study_job(file, entry, out, [run["name"] for run in runs]) for entry in suite.get("study", [])]
    return in_order(file, jobs)


def check_entry(file: Path, kind: str, entry: dict) -> None:
    """Raise UserError unless an entry has the keys of its kind."""
    if not isinstance(entry, dict):
        raise UserError(f"{file}: {kind} must be tables: [[{kind}]]")
    wrong = [key for key, value in entry.items() if not isinstance(value, KEYS[kind].get(key, ()))]
    if wrong or not entry.keys() >= NEEDED[kind]:
        name = entry.get("name", "without a name")
        what = f"{wrong[0]} is not known, or of another type" if wrong else f"{NEEDED[kind]} are needed"
        raise UserError(f"{file}: [[{kind}]] {name}: {what}; it has {', '.join(KEYS[kind])}")


def expand(file: Path, entry: dict) -> list[dict]:
    """An entry for each combination of `each`, whose values are flags too."""
    each, found = entry.get("each", {}), []
    for values in product(*each.values()):
        one = dict(zip(each, values))
        try:
            name = entry["name"].format(**one)
        except (LookupError, ValueError):
            raise UserError(
                f"{file}: [[run]] {entry['name']}: braces can have {', '.join(each) or 'nothing'}"
            ) from None
        found.append({**entry, "name": name, "flags": one | entry.get("flags", {})})
    return found


def as_arguments(flags: dict) -> list[str]:
    """{"size": "14m", "demo": true} -> ["--size", "14m", "--demo"]."""
    arguments = []
    for name, value in flags.items():
        if value is not False:
            arguments += [f"--{name}"] if value is True else [f"--{name}", str(value)]
    return arguments


def run_job(entry: dict, out: Path, train: list[str]) -> Job:
    path, flags, after = out / entry["name"], dict(entry.get("flags", {})), set()
    if branch := entry.get("branch"):
        flags["branch"] = str(out / branch)
        after.add(f"run {branch.split('/')[0]}")
    if edits := entry.get("edits"):
        flags["edits"] = str(out / f"{edits}.parquet")
        after.add(f"edit {edits}")
    return Job(f"run {entry['name']}", [*train, "train.py", *as_arguments(flags), "--out", str(path)], path, after)


def edit_job(entry: dict, out: Path) -> Job:
    path = out / f"{entry['name']}.parquet"
    command = ["python", "data.py", "edit", entry["make"], "--run", str(out / entry["run"])]
    command += [*as_arguments(entry.get("flags", {})), "--out", str(path)]
    return Job(f"edit {entry['name']}", command, path, {f"run {entry['run']}"})


def study_job(file: Path, entry: dict, out: Path, runs: list[str]) -> Job:
    name = entry.get("out", entry["name"])
    chosen = [run for pattern in entry["runs"] for run in runs if fnmatchcase(run, pattern)]
    if not chosen:
        raise UserError(f"{file}: [[study]] {name}: no run is named {' or '.join(entry['runs'])}")
    path = out / "studies" / name
    command = ["python", "-m", f"studies.{entry['name']}", *(str(out / run) for run in dict.fromkeys(chosen))]
    command += [*as_arguments(entry.get("flags", {})), "--out", str(path)]
    return Job(f"study {name}", command, path, {f"run {run}" for run in chosen})


def in_order(file: Path, jobs: list[Job]) -> list[Job]:
    """The jobs, each behind those that it needs. Raises UserError if two have one name, or one is missing."""
    by_name = {job.name: job for job in jobs}
    if len(by_name) < len(jobs):
        twice = next(job.name for job in jobs if by_name[job.name] is not job)
        raise UserError(f"{file}: two of the name {twice}; a second study of one kind needs its own `out`")
    for job in jobs:
        if missing := job.after - by_name.keys():
            raise UserError(f"{file}: {job.name} needs {min(missing)}, which is not in the file")
    try:
        return [by_name[name] for name in TopologicalSorter({job.name: job.after for job in jobs}).static_order()]
    except CycleError as error:
        raise UserError(f"{file}: each needs the next: {', '.join(error.args[1])}") from None


# ---- the command -----------------------------------------------------------------------------------------------------


def slurm_script(jobs: list[Job]) -> str:
    """A shell script that submits every job behind those that it needs."""
    ids, lines = {job.name: f"job{i}" for i, job in enumerate(jobs)}, ["set -eu"]
    for job in jobs:
        after = "".join(f":${ids[name]}" for name in sorted(job.after))
        options = f"--parsable --job-name={shlex.quote(job.name)}" + f" --dependency=afterok{after}" * bool(after)
        lines.append(f'{ids[job.name]}=$(sbatch {options} "$@" --wrap={shlex.quote(shlex.join(job.command))})')
    return "\n".join(lines)


def run_jobs(jobs: list[Job]) -> None:
    """Run the commands. Raises UserError at the first that fails."""
    for i, job in enumerate(jobs, 1):
        if job.path.suffix == ".parquet" and job.path.exists():
            continue
        print(printable(f"{i}/{len(jobs)} {job.name}: {shlex.join(job.command)}"), flush=True)
        job.path.parent.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, *job.command[1:]] if job.command[0] == "python" else job.command
        if status := subprocess.call(command):
            raise UserError(f"{job.name} failed ({status}); the same command goes on from there")


def main(arguments: list[str] | None = None) -> None:
    parser = Parser("python -m studies.suite", description=__doc__.split("\n\n")[0])
    parser.add_argument("file", type=Path, metavar="FILE.toml", help="see the beginning of studies/suite.py")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--plan", action="store_true", help="print the commands and what of them is done")
    what.add_argument("--slurm", action="store_true", help="print a script; its arguments go to sbatch: --gpus=8 ..")
    args = parser.parse_args(arguments)
    jobs = read_suite(args.file)
    if args.slurm:
        print(slurm_script(jobs))
    elif args.plan:
        for job in jobs:
            print(printable(f"{job.state():<12} {shlex.join(job.command)}"))
    else:
        run_jobs(jobs)


if __name__ == "__main__":
    run_command(main)
