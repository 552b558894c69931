"""A run for the hub: every stepN as a branch, the last one as main, each with a model card and its own manifest."""

import json
import os
import re
import shutil
from contextlib import suppress
from functools import partial
from pathlib import Path

from tqdm import tqdm

from checkpoints.manifest import choose_steps, read_checkpoint, verify_checkpoint
from model.huggingface import read_config
from model.sizes import Config
from runtime.errors import UserError, printable
from runtime.files import open_regular, reason
from runtime.hub import branches, upload
from runtime.manifests import checksums, saved_steps, write_manifest
from runtime.metrics import MAX_LINE
from runtime.run_directory import read_run

CARD = """---
license: apache-2.0
library_name: transformers
pipeline_tag: text-generation
tags:
- gpt_neox
- pythia
---

# {title}

A language model with the architecture of [Pythia](https://arxiv.org/abs/2304.01373) {size}, trained with Tripod.

| | |
|---|---|
| parameters | {parameters:,} ({non_embedding:,} without embeddings) |
| checkpoint | step {step:,} of {steps:,} |
| tokens seen | {tokens:,}: {batch_size:,} rows of {seq_len:,} tokens a step |
| loss | {loss} |
| data | {data} |
| order of the data | sha256 `{order}` (seed {seed}) |
| licence | Apache 2.0 |

{gelu}

Every checkpoint is a branch of this repository, named `stepN`; `main` is the last of them. `manifest.json` has a
checksum of every file and tensor.

## Load it

    # transformers
    model = AutoModelForCausalLM.from_pretrained("{repo}", revision="step{step}")

    # Tripod: every byte is compared with its checksum
    python checkpoint.py fetch {repo} --steps {step}

    # lm-evaluation-harness; its logits_cache scores some tasks wrongly
    lm_eval --model hf --model_args pretrained={repo},revision=step{step},logits_cache=False --tasks lambada_openai

    # huggingface_hub
    hf download {repo} --revision step{step}

    # safetensors
    tensors = safetensors.torch.load_file(hf_hub_download("{repo}", "{weights}", revision="step{step}"))
"""
GELU = {
    "tanh": "It was trained with the tanh form of GELU. Like those of Pythia, its `config.json` says `{act}`{exact}",
    "none": "It was trained with the exact (erf) form of GELU; its `config.json` says `{act}`.",
}
EXACT = (
    ", the exact form: logits differ by about 1e-3 from those of training. For the trained form, set `hidden_act` to "
    "`gelu_pytorch_tanh`."
)


def publish(run: Path, repo: str, steps: str, private: bool, dry_run: bool) -> None:
    """Upload checkpoints of a run, each as branch stepN, the last one also as main; the same call again resumes.

    The layout is made in RUN.publish/BRANCH, with hard links to the weights; dry_run keeps it and uploads nothing.
    Raises UserError.
    """
    if len(repo.split("/")) != 2:
        raise UserError(f"{repo} is not the name of a repository: OWNER/NAME")
    record, present = read_run(run, "publish needs the directory of a run"), saved_steps(run)
    if not present:
        raise UserError(f"{run} has no checkpoints")
    chosen = choose_steps(steps, present, f"{run} has no checkpoint")
    for step in tqdm(chosen, desc="verifying", unit="checkpoint", disable=None):
        if errors := verify_checkpoint(run / f"step{step}"):
            raise UserError(f"{errors[0]}; nothing was uploaded")

    def make(step: int, branch: str) -> None:
        _stage(run, step, layout / branch, _card(run, record, repo, step))
        if not dry_run:
            upload(repo, branch, layout / branch, private)
        tqdm.write(printable(f"{layout / branch}" if dry_run else f"{repo}, branch {branch}: is on the hub"))

    layout = run.absolute().with_name(f"{run.absolute().name}.publish")
    try:
        for step in chosen:
            make(step, f"step{step}")
        if dry_run or step == max(_published_steps(repo)):  # else main is a later one, published before
            make(step, "main")
        if not dry_run:
            shutil.rmtree(layout)
    except OSError as error:
        raise UserError(f"{layout} cannot be written: {reason(error)}") from None


def _published_steps(repo: str) -> list[int]:
    return [int(name[4:]) for name in branches(repo) if re.fullmatch("step[0-9]{1,12}", name)]


def _stage(run: Path, step: int, branch: Path, card: str) -> None:
    """Make one branch in a folder: the files of a checkpoint without its state. Raises OSError."""
    if branch.exists():
        shutil.rmtree(branch)
    branch.mkdir(parents=True)
    source = run / f"step{step}"
    manifest = read_checkpoint(source)
    files = {name: entry for name, entry in manifest["files"].items() if "/" not in name}
    for name in files:
        linked = False
        if name.endswith(".safetensors"):  # not small files, which a user may edit here
            with suppress(OSError):  # of a file system without hard links
                os.link(source / name, branch / name)
                linked = True
        if not linked:
            shutil.copyfile(source / name, branch / name)
    generation = {"_from_model_config": True, "bos_token_id": 0, "eos_token_id": 0}
    texts = {"README.md": card, "generation_config.json": json.dumps(generation, indent=2) + "\n"}
    for name, text in texts.items():
        (branch / name).write_text(text)
        files[name] = checksums(branch / name)
    # without "run": it has paths of the machine that trained
    write_manifest(
        branch, {"format": manifest["format"], "step": manifest["step"], "files": dict(sorted(files.items()))}
    )


def _card(run: Path, record: dict, repo: str, step: int) -> str:
    """The model card of a checkpoint. Raises UserError if run.json lacks what it needs."""
    directory, settings, data = run / f"step{step}", record["settings"], record["data"]
    config: Config = read_config(directory)
    act = json.loads((directory / "config.json").read_bytes())["hidden_act"]
    loss = _loss(run / "metrics.jsonl", step - 1)
    whole = (directory / "model.safetensors").exists()
    try:
        return CARD.format(
            title=repo.split("/")[1],
            repo=repo,
            size=settings["size"],
            parameters=config.parameters,
            non_embedding=config.non_embedding_parameters,
            step=step,
            steps=settings["steps"],
            tokens=step * settings["batch_size"] * settings["seq_len"],
            batch_size=settings["batch_size"],
            seq_len=settings["seq_len"],
            loss="not known" if loss is None else f"{loss:.4f} on the last batch before this checkpoint",
            data=f"{data['tokens']:,} tokens, {data['kind']}",
            order=data["order_sha256"],
            seed=settings["seed"],
            gelu=GELU[settings["gelu"]].format(act=act, exact=EXACT if act == "gelu" else "."),
            weights="model.safetensors" if whole else "model-00001-of-....safetensors",
        )
    except (LookupError, TypeError, ValueError) as error:
        raise UserError(f"{run / 'run.json'} is damaged ({error!r})") from None


def _loss(path: Path, step: int) -> float | None:
    """The loss in the record of a step, if metrics.jsonl has one."""
    try:
        with open_regular(path) as file:
            for line in iter(partial(file.readline, MAX_LINE), b""):
                record = json.loads(line)
                if record["step"] == step:
                    return float(record["loss"])
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        pass
    return None
