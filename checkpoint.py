"""The checkpoints of a run, and those that others published.

python checkpoint.py verify RUN             recompute every checksum of every checkpoint, name each bad file
python checkpoint.py fetch 70m-deduped      published checkpoints from the Hugging Face hub, verified
python checkpoint.py publish RUN OWNER/NAME every stepN as a branch of a repository on the hub, with a model card
python checkpoint.py convert global_step143000 --out DIR      a checkpoint in GPT-NeoX's own format
"""

import argparse
import os
from pathlib import Path

from tqdm import tqdm

from checkpoints.manifest import verify_checkpoint
from checkpoints.publish import publish
from checkpoints.published import audit, convert, fetch, repository
from runtime.errors import Parser, UserError, printable, run_command


def verify(run: Path) -> bool:
    """Print whether each checkpoint of a run (or the one at this path) is valid. Returns True if all are."""
    if not run.is_dir():
        raise UserError(f"{run} is not a directory")
    candidates = [run]
    if not (run / "manifest.json").exists():
        candidates = sorted(run.glob("step*"), key=lambda path: (len(path.name), path.name))
    if not candidates:
        raise UserError(f"{run} has no checkpoints")
    valid = 0
    for directory in tqdm(candidates, unit="checkpoint", disable=None):
        has_state = os.path.lexists(directory / "state")  # a copy of the model has none
        errors = verify_checkpoint(directory, state=has_state)
        valid += not errors
        tqdm.write(printable("\n".join(f"BAD  {error}" for error in errors) or f"ok   {directory}"))
    print(f"{valid} of {len(candidates)} checkpoints are whole")
    return valid == len(candidates)


def run_verify(args: argparse.Namespace) -> None:
    """Recompute every checksum, name each bad file; the exit status is 1 if any file is bad."""
    if not verify(args.run):
        raise SystemExit(1)


def run_fetch(args: argparse.Namespace) -> None:
    """Download published checkpoints as DIR/stepN and verify them. The same command again resumes."""
    repo = repository(args.name, args.seed)
    if not args.audit:
        fetch(repo, args.steps, args.out or Path("published") / repo.split("/")[1])
    elif problems := audit(repo):
        print(printable("\n".join(problems)))
        raise SystemExit(1)
    else:
        print(printable(f"{repo}: the records of all its branches are consistent"))


def run_publish(args: argparse.Namespace) -> None:
    """Upload checkpoints of a run: each as branch stepN, the last one also as main. The same command again resumes."""
    publish(args.run, args.repo, args.steps, args.private, args.dry_run)


def run_convert(args: argparse.Namespace) -> None:
    """Write GPT-NeoX's own checkpoint, its files layer_*-model_*-model_states.pt, as OUT/stepN. Nothing is unpickled;
    optimizer states are not read."""
    convert(args.source, args.out)


def main() -> None:
    parser = Parser(description="Check, fetch, publish and convert checkpoints.")
    commands = parser.add_subparsers(required=True, metavar="verify | fetch | publish | convert")

    def add(name: str, run) -> Parser:
        command = commands.add_parser(name, help=run.__doc__, description=run.__doc__)
        command.set_defaults(command=run)
        return command

    command = add("verify", run_verify)
    command.add_argument("run", type=Path, help="a run directory like runs/pythia-14m, or one of its stepN")

    command = add("fetch", run_fetch)
    command.add_argument("name", help="70m, 70m-deduped, 160m-data-seed1 ..., or OWNER/NAME of any repository")
    command.add_argument(
        "--steps", default="final", help="all, or a list like 0,512,1000:143000:10000 (default: final)"
    )
    command.add_argument("--seed", type=int, help="1 to 9: the PolyPythias of 14m to 410m")
    command.add_argument("--out", type=Path, metavar="DIR", help="default: published/NAME")
    command.add_argument("--audit", action="store_true", help="only compare the hub's records of all revisions")

    command = add("publish", run_publish)
    command.add_argument("run", type=Path, help="a run directory like runs/pythia-14m")
    command.add_argument("repo", help="OWNER/NAME on the hub; it is created if it is missing")
    command.add_argument("--steps", default="all", help="all, or a list like 0,512,1000:143000:10000 (default: all)")
    command.add_argument("--private", action="store_true", help="create a private repository")
    command.add_argument("--dry-run", action="store_true", help="only write what would be uploaded, to RUN.publish/")

    command = add("convert", run_convert)
    command.add_argument("source", type=Path, help="a directory global_stepN")
    command.add_argument("--out", type=Path, required=True, metavar="OUT", help="where stepN is written")

    args = parser.parse_args()
    args.command(args)


if __name__ == "__main__":
    run_command(main)
