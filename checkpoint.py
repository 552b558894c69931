"""The checkpoints of a run.

python checkpoint.py verify RUN        recompute every checksum of every checkpoint, name each bad file
"""

from pathlib import Path

from tqdm import tqdm

from checkpoints.manifest import verify_checkpoint
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
        errors = verify_checkpoint(directory)
        valid += not errors
        tqdm.write(printable("\n".join(f"BAD  {error}" for error in errors) or f"ok   {directory}"))
    print(f"{valid} of {len(candidates)} checkpoints are whole")
    return valid == len(candidates)


def main() -> None:
    parser = Parser(description="Check the checkpoints of a run against their manifests.")
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser(
        "verify", help="recompute every checksum, name each bad file; exit status 1 if any file is bad"
    )
    command.add_argument("run", type=Path, help="a run directory like runs/pythia-14m, or one of its stepN")
    if not verify(parser.parse_args().run):
        raise SystemExit(1)


if __name__ == "__main__":
    run_command(main)
