"""The Pile as EleutherAI publishes it, from the Hugging Face hub: whole shards, or the rows of one step.

A whole data set has 600 GB. Shards keep their names, so that --data takes their directory as it is. A step is a range
of bytes: it becomes a data set of its own, DIR/stepT, of 4 MB.
"""

import argparse
import json
import re
from pathlib import Path

import numpy as np

from corpus.indexed import HEADER, MAGIC
from runtime.errors import UserError, printable
from runtime.files import atomic_write, flush, naming, reason
from runtime.hub import Revision, download, hub_errors, request, resolve

# name: repository, and whether it has rows in the order of training. The others have documents, shuffled by seed.
DATA_SETS = {
    "standard": ("EleutherAI/pile-standard-pythia-preshuffled", True),
    "deduped": ("EleutherAI/pile-deduped-pythia-preshuffled", True),
    "standard-documents": ("EleutherAI/pythia_pile_idxmaps", False),
    "deduped-documents": ("EleutherAI/pythia_deduped_pile_idxmaps", False),
}
TOKENIZER = "EleutherAI/pythia-70m"
SHARD = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.bin")
BATCH, ROW = 1024, 2049  # rows of a step, tokens of a row; a token has two bytes
VOCAB = 50_277


def add_fetch_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("name", choices=DATA_SETS, help="which data set; the first two are in the order of training")
    command.add_argument("--shards", metavar="0-3", help="only these shards (default: all)")
    command.add_argument("--step", type=int, metavar="T", help="only the rows of this step; the first step is 0")
    command.add_argument("--out", type=Path, metavar="DIR", help="default: pile/NAME")


def run_fetch(args: argparse.Namespace) -> None:
    """Download the published training data, verified. The same command again resumes. With --step, the rows of one
    step only: 4 MB."""
    out = args.out or Path("pile") / args.name
    repo, shuffled = DATA_SETS[args.name]
    if args.step is not None and (args.shards is not None or not shuffled):
        raise UserError("--step works alone, and with standard and deduped only")
    revision = resolve(repo, "main", "dataset")
    try:
        if args.step is None:
            fetch_shards(revision, args.shards, out)
        else:
            out = fetch_step(revision, args.step, out)
        download(resolve(TOKENIZER, "main"), ["tokenizer.json"], out)
    except OSError as error:
        raise UserError(f"{out} cannot be written: {reason(error)}") from None
    prefixes = [out] if shuffled else [path.with_suffix("") for path in sorted(out.glob("*.idx"))]
    where = "" if args.step is None else " --step 0"
    print(printable(f"python data.py view --data {prefixes[0]}{where or ' --step 1000'} --row 0    shows a row of it"))


def shard_names(revision: Revision) -> list[str]:
    """The token files of a data set, in order. Raises UserError if the hub does not list all of one set."""
    found = sorted(name for name in revision.files if SHARD.fullmatch(name))
    numbers = [int(SHARD.fullmatch(name)[2]) for name in found]
    lasts = {(m[1], int(m[3])) for m in map(SHARD.fullmatch, found)}
    # the number in the name is that of the last shard, or the number of shards
    if (
        len(lasts) != 1
        or numbers != list(range(len(found)))
        or next(iter(lasts))[1] not in (len(found) - 1, len(found))
    ):
        raise UserError(f"{revision.repo} does not have the shards of one data set")
    return found


def fetch_shards(revision: Revision, chosen: str | None, out: Path) -> None:
    """Download the index and shards, all or "0-3" or "2", and record the sizes of all in NAME.shards.json.

    Raises UserError or OSError.
    """
    names = shard_names(revision)
    first, last = 0, len(names) - 1
    if chosen is not None:
        if not (match := re.fullmatch(r"(\d{1,5})(?:-(\d{1,5}))?", chosen)):
            raise UserError(f"--shards {chosen} is not a number or a range like 0-3")
        first, last = int(match[1]), int(match[2] or match[1])
    if not first <= last < len(names):
        raise UserError(f"--shards {chosen}: the data set has the shards 0-{len(names) - 1}")
    stem = SHARD.fullmatch(names[0])[1]
    maps = [name for name in revision.files if re.fullmatch(r".*_(doc|sample|shuffle)_idx\.npy", name)]
    download(revision, [f"{stem}.idx", *maps, *names[first : last + 1]], out)
    record = {
        "repo": revision.repo,
        "commit": revision.commit,
        "shards": {
            name: {"bytes": revision.files[name].bytes, "sha256": revision.files[name].sha256} for name in names
        },
    }
    with atomic_write(out / f"{stem}.shards.json", "w") as file:
        file.write(json.dumps(record, indent=1) + "\n")


def fetch_step(revision: Revision, step: int, out: Path) -> Path:
    """Download the rows of a step by one range of bytes, or two where a shard ends within it. Returns its directory.

    The hub has no checksums of ranges: that the ids are those of Pythia's tokenizer is what can be checked. Raises
    UserError or OSError.
    """
    names, count = shard_names(revision), BATCH * ROW * 2
    begin, total = step * count, sum(revision.files[name].bytes for name in names)
    if not 0 <= begin <= total - count:
        raise UserError(f"--step {step}: the data set has the steps 0 .. {total // count - 1}")
    directory = out / f"step{step}"
    directory.mkdir(parents=True, exist_ok=True)
    target = directory / "document.bin"
    with naming(target), atomic_write(target, "wb") as file, hub_errors(revision.repo, revision.name):
        start = 0  # of a shard in the data set
        for name in names:
            end = start + revision.files[name].bytes
            if start < begin + count and begin < end:
                request(revision, name, file, min(end - begin, count), begin - start)
            start = end
    tokens = np.fromfile(target, "<u2")
    if len(tokens) != BATCH * ROW or tokens.max() >= VOCAB:
        target.unlink()
        raise UserError(
            f"{target}: what {revision.repo} sent are not rows of Pythia's tokens; run the same command again"
        )
    with atomic_write(directory / "document.idx") as file:
        file.write(HEADER.pack(MAGIC, 1, 8, BATCH, 1))
        file.write(np.full(BATCH, ROW, "<i4").tobytes())
        file.write((np.arange(BATCH) * ROW * 2).astype("<i8").tobytes())
        file.write(np.zeros(1, "<i8").tobytes())
    flush(directory)
    return directory
