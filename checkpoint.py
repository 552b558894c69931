"""The checkpoints of a run.

python checkpoint.py verify RUN        re-hash every checkpoint, name each bad file
"""

from pathlib import Path

from tqdm import tqdm

from checkpoints.manifest import verify_checkpoint
from runtime.errors import Parser, UserError, run_command


def verify(run: Path) -> bool:
    """Print the state of every checkpoint of a run; True when all are whole."""
    if not run.is_dir():
        raise UserError(f"{run} is not a directory")
    candidates = [run]
    if not (run / "manifest.json").exists():
        candidates = sorted(run.glob("step*"), key=lambda path: (len(path.name), path.name))
    if not candidates:
        raise UserError(f"{run} holds no checkpoints")
    bad = 0
    for directory in tqdm(candidates, unit="checkpoint", disable=None):
        found = verify_checkpoint(directory)
        bad += bool(found)
        tqdm.write("\n".join(f"BAD  {line}" for line in found) or f"ok   {directory}")
    print(f"{len(candidates) - bad} of {len(candidates)} checkpoints are whole")
    return not bad


def main() -> None:
    parser = Parser(description="Check the checkpoints of a run against their manifests.")
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("verify", help="re-hash every checkpoint, name each bad file; status 1 if any is bad")
    command.add_argument("run", type=Path, help="a run directory, such as runs/pythia-14m, or one stepN in it")
    if not verify(parser.parse_args().run):
        raise SystemExit(1)


if __name__ == "__main__":
    run_command(main)
