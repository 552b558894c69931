"""The published models: their names on the hub, one stepN for each revision, and what is known to be wrong with them.

A fetched stepN has a manifest like our own checkpoints, so that everything which takes those takes it too.
"""

import difflib
import json
import re
import shutil
import tempfile
from pathlib import Path

import torch
from tqdm import tqdm

from checkpoints.manifest import choose_steps
from model import SUITE, Pythia
from model.huggingface import read_config, read_weights, weight_files
from model.neox import convert_neox
from model.sizes import is_published_step
from model.torch_weights import TORCH_WEIGHTS, convert_torch_files
from runtime.errors import UserError, printable
from runtime.files import READ_ERRORS, reason
from runtime.hub import Revision, branches, download, resolve
from runtime.manifests import FORMAT, MANIFEST, checksums, read_manifest, write_manifest

OWNER, LAST = "EleutherAI", 143_000
SMALL = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
WHOLE = ("model.safetensors", TORCH_WEIGHTS)
WEIGHTS = re.compile(r"(model|pytorch_model)(-\d{5}-of-\d{5})?\.(safetensors|bin)")

SEEDED = ("14m", "31m", "70m", "160m", "410m")  # PolyPythias
NAMES = (
    [f"pythia-{size}" for size in SUITE]
    + [f"pythia-{size}-deduped" for size in SUITE if size != "31m"]
    + [f"pythia-{size}-seed{seed}" for size in SEEDED for seed in range(1, 10)]
    + [f"pythia-160m-{kind}-seed{seed}" for kind in ("data", "weight") for seed in (1, 2, 3)]
)

# What users of the published files have reported: repository, which steps, what is wrong.
ERRATA = (
    ("pythia-2.8b", lambda step: step < LAST, "86 of its 154 branches are reported to hold the weights of the last step"
     " (github.com/EleutherAI/pythia/issues/205), among them all up to step 53000: fetch --audit shows which"),
    ("pythia-12b", lambda step: step in (50_000, 58_000), "its first shard is reported to be that of the last step"
     " (github.com/EleutherAI/pythia/issues/206)"),
    ("pythia-160m-weight-seed", lambda step: step == 0, "it is reported not to belong to the later steps"
     " (github.com/EleutherAI/pythia/issues/198)"),
    ("pythia-410m-seed3", lambda step: True, "this run diverged (PolyPythias, arXiv:2503.09543)"),
    ("pythia-410m-seed4", lambda step: True, "this run diverged (PolyPythias, arXiv:2503.09543)"),
)  # fmt: skip


def repository(name: str, seed: int | None = None) -> str:
    """The repository of "70m-deduped", "pythia-160m-data-seed2" or "owner/name". Raises UserError."""
    if "/" in name:
        if seed is not None:
            raise UserError("--seed is for Pythia's sizes; a repository is given by its whole name")
        return name
    name = f"pythia-{name.removeprefix('pythia-')}" + (f"-seed{seed}" if seed not in (None, 1234) else "")
    if name not in NAMES:
        near = difflib.get_close_matches(name, NAMES, 3)
        hint = f"did you mean {' or '.join(near)}?" if near else f"the sizes are {', '.join(SUITE)}"
        raise UserError(f"there is no {name}; {hint} Another repository is given as OWNER/NAME")
    return f"{OWNER}/{name}"


def warnings(repo: str, steps: list[int]) -> list[str]:
    """What is known to be wrong with some of these revisions of a repository, one line for each fault."""
    found = []
    for name, concerns, text in ERRATA:
        same = repo.startswith(f"{OWNER}/{name}") if name.endswith("seed") else repo == f"{OWNER}/{name}"
        if same and (wrong := [f"step{step}" for step in steps if concerns(step)]):
            more = f" and {len(wrong) - 3} more" if wrong[3:] else ""
            found.append(f"warning: {repo}, {', '.join(wrong[:3])}{more}: {text}")
    return found


def steps_and_branches(repo: str) -> dict[int, str]:
    """The branch of every step of a repository, ascending. A published Pythia without step143000 has it as main."""
    names = branches(repo)
    steps = {int(name[4:]): name for name in names if re.fullmatch("step(0|[1-9][0-9]*)", name)}
    if repo.removeprefix(f"{OWNER}/") in NAMES and "main" in names:
        steps.setdefault(LAST, "main")
    if not steps:
        raise UserError(f"{repo} has no branches named stepN, only {', '.join(names)[:200] or 'none at all'}")
    return dict(sorted(steps.items()))


def fetch(repo: str, steps: str, out: Path) -> None:
    """Download revisions of a repository as out/stepN, each verified and with a manifest. Raises UserError.

    A stepN that is there already is not downloaded again; an interrupted one goes on where it was.
    """
    if (out / "run.json").exists():
        raise UserError(f"{out} is a run that was trained here: choose another --out")
    known = steps_and_branches(repo)
    chosen = choose_steps(steps, known, f"{repo} has no branch")
    for line in warnings(repo, chosen):
        tqdm.write(line)
    revisions = {step: resolve(repo, known[step]) for step in tqdm(chosen, desc="asking", unit="step", disable=None)}
    try:
        missing = [step for step in chosen if not _is_there(out / f"step{step}", revisions[step])]
        _check_space([revisions[step] for step in missing], out)
        for step in tqdm(missing, unit="checkpoint", disable=None):
            if known[step] == "main":
                tqdm.write(f"note: {repo} has no branch step{step}: main is taken for it")
            _fetch(revisions[step], step, out / f"step{step}")
            tqdm.write(printable(f"{out / f'step{step}'}: {repo} at {revisions[step].commit[:12]}, verified"))
    except OSError as error:
        raise UserError(f"{out} cannot be written: {reason(error)}") from None
    if there := len(chosen) - len(missing):
        print(f"{there} of {len(chosen)} checkpoints were there already")


def _check_space(revisions: list[Revision], out: Path) -> None:
    """Raise UserError if there is no room for all revisions. One that is converted needs its room twice for a time."""
    needed, twice = 0, 0
    for revision in revisions:
        sizes = dict.fromkeys((".safetensors", ".bin"), 0)
        for name, remote in revision.files.items():
            if WEIGHTS.fullmatch(name):
                sizes[Path(name).suffix] += remote.bytes
        needed += sizes[".safetensors"] or sizes[".bin"]
        twice = max(twice, 0 if sizes[".safetensors"] else sizes[".bin"])
    out.mkdir(parents=True, exist_ok=True)
    if (free := shutil.disk_usage(out).free) < needed + twice:
        size = f"{len(revisions)} checkpoints need {(needed + twice) / 1e9:.2f} GB, {free / 1e9:.2f} GB are free"
        raise UserError(f"no room in {out}: {size}; nothing was downloaded")


def _is_there(final: Path, revision: Revision) -> bool:
    if not (final / MANIFEST).exists():
        if final.exists():
            raise UserError(f"{final} exists and has no manifest.json: remove it, or choose another --out")
        return False
    source = read_manifest(final).get("source")
    if source != _source(revision):
        raise UserError(f"{final} is not {revision.repo} at {revision.commit[:12]}: remove it, or choose another --out")
    return True


def _source(revision: Revision) -> dict:
    return {"repo": revision.repo, "revision": revision.name, "commit": revision.commit}


def _fetch(revision: Revision, step: int, final: Path) -> None:
    temporary = final.with_name(f".{final.name}.fetch")
    temporary.mkdir(parents=True, exist_ok=True)
    if (temporary / MANIFEST).exists() and read_manifest(temporary).get("source") != _source(revision):
        (temporary / MANIFEST).unlink()  # the branch has moved since
    if not (temporary / MANIFEST).exists():
        files = _download_model(revision, temporary)
        content = {path.name: checksums(path) for path in files}
        write_manifest(temporary, {"format": FORMAT, "step": step, "source": _source(revision), "files": content})
    for path in (*temporary.glob("pytorch_model*"), *temporary.glob(".*.part")):
        path.unlink()
    temporary.rename(final)


def _download_model(revision: Revision, directory: Path) -> list[Path]:
    """Download a model and compare it with its config.json. Returns its files. Raises UserError or OSError."""
    small = [name for name in SMALL if name in revision.files]
    download(revision, small, directory)
    names = weight_names(revision, directory)
    download(revision, names, directory)
    if names[0].startswith(TORCH_WEIGHTS):
        convert_torch_files(directory)
    with torch.device("meta"):
        model = Pythia(read_config(directory))
    for _ in read_weights(directory, model):  # names, shapes, dtypes, finite values
        pass
    index = directory / f"{WHOLE[0]}.index.json"
    return sorted([*(directory / name for name in small), *weight_files(directory), *[index] * index.exists()])


def convert(source: Path, out: Path) -> None:
    """Write GPT-NeoX's own checkpoint source = .../global_stepN as out/stepN, with a manifest. Raises UserError."""
    match = re.fullmatch(r"global_step(\d{1,9})", source.absolute().name)
    if not match:
        raise UserError(f"{source} is not named global_stepN, as GPT-NeoX names its checkpoints")
    step = int(match[1])
    final, temporary = out / f"step{step}", out / f".step{step}.convert"
    if final.exists():
        raise UserError(f"{final} exists: remove it, or choose another --out")
    try:
        convert_neox(source, temporary)
        with torch.device("meta"):
            model = Pythia(read_config(temporary))
        for _ in read_weights(temporary, model):  # finite values
            pass
        content = {path.name: checksums(path) for path in sorted(temporary.iterdir())}
        write_manifest(temporary, {"format": FORMAT, "step": step, "files": content})
        temporary.rename(final)
    except OSError as error:
        raise UserError(f"{final} cannot be written: {reason(error)}") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def weight_names(revision: Revision, directory: Path) -> list[str]:
    """The files of a revision that hold its weights, an index first; the index is downloaded. Raises UserError."""
    for whole in WHOLE:
        if whole in revision.files:
            return [whole]
        if (index := f"{whole}.index.json") in revision.files:
            download(revision, [index], directory)
            try:
                content = json.loads((directory / index).read_bytes())
                shards, total = sorted({*content["weight_map"].values()}), content["metadata"]["total_size"]
                stored = sum(revision.files[shard].bytes for shard in shards)
                if not total <= stored <= 1.01 * total + 2**20:
                    raise ValueError(f"its shards have {stored} bytes for {total} bytes of tensors")
            except READ_ERRORS as error:
                problem = f"{index} does not fit the shards: {error!r:.200}"
                raise UserError(f"{revision.repo}, {revision.name}: {problem}") from None
            return [index, *shards]
    raise UserError(f"{revision.repo}, {revision.name}: the revision has no weights")


def audit(repo: str) -> list[str]:
    """What the hub's own records show about the revisions of a repository, one line each; [] if they are all right.

    Only records and index files travel, no weights. Raises UserError.
    """
    names = branches(repo)
    steps = {int(name[4:]) for name in names if re.fullmatch("step[0-9]+", name)}
    problems, holders = [], {}
    if repo.removeprefix(f"{OWNER}/") in NAMES:
        expected = {step for step in range(LAST + 1) if is_published_step(step, LAST)}
        problems += [f"step{step}: the branch is missing" for step in sorted(expected - steps)]
    last = f"step{max(steps, default=LAST)}"
    with tempfile.TemporaryDirectory() as folder:
        for name in tqdm(["main", *(f"step{step}" for step in sorted(steps))], unit="revision", disable=None):
            if name not in names:
                problems.append(f"{name}: the branch is missing")
                continue
            revision = resolve(repo, name)
            for file, remote in revision.files.items():
                if WEIGHTS.fullmatch(file):
                    holders.setdefault(remote.digest, {})[name] = file
            try:
                weight_names(revision, Path(folder) / name)
            except UserError as error:
                problems.append(str(error).removeprefix(f"{repo}, "))
    groups: dict[tuple, list[str]] = {}
    for places in holders.values():
        if len(places) > 1 and places.keys() not in ({"step0", "step1"}, {"main", last}):  # they should be equal
            groups.setdefault(tuple(places), []).append(next(iter(places.values())))
    for places, files in groups.items():
        problems.append(f"{', '.join(places)}: {len(places)} branches have the same {', '.join(sorted(files))}")
    return problems
