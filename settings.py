"""Train a Pythia: every flag of train.py, what it means, and which values cannot work.

python train.py --size 14m --demo                   two minutes on a laptop: real text, real checkpoints
python train.py --size 1.4b --data PREFIX           the published run: 143,000 steps of 1024 rows of 2048 tokens
torchrun --master-addr 127.0.0.1 --master-port 29400 --nproc-per-node 8 train.py ...    the same on eight GPUs
"""

import math
import os
import shlex
from argparse import BooleanOptionalAction, RawDescriptionHelpFormatter
from dataclasses import dataclass, field, fields, replace

import torch

import data
from checkpoints.branch import inherited_settings
from data import DEFAULTS
from kernels import backend
from model import SIZES, SUITE
from model.sizes import parse_steps
from parallel.fsdp import SHARD
from parallel.recompute import RECOMPUTE
from plan.memory import Job
from plan.report import details, parse_machine, summary
from runtime.errors import Parser, UserError
from runtime.host import supports_bf16_matmul
from runtime.metrics import LOGGERS, import_logger
from runtime.run_directory import flag

DEMO = {**data.DEMO, "lr": 3e-3}  # sixty steps are too few for the published rate
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def size_name(text: str) -> str:
    """The key of SIZES that a text such as 14M, pythia-14m or EleutherAI/pythia-14m names."""
    return text.lower().removeprefix("eleutherai/").removeprefix("pythia-")


def setting(default, help: str, fixed: bool = True, **options):
    """A field that is also a flag. fixed=False: the value may change on resume; it affects rounding at most."""
    return field(default=default, metadata={"help": help, "fixed": fixed, "options": options})


@dataclass
class Settings:
    """Every setting of a run. The command line and run.json are made from this class."""

    size: str = setting(
        "",
        "which Pythia; nano is a small one for tests and examples",
        choices=list(SIZES),
        type=size_name,
        required=True,
    )
    data: str = setting("", "PREFIX of a .bin/.idx, directory of pre-shuffled rows, or `demo`", False)
    out: str = setting("", "run directory (default: runs/pythia-SIZE)", False)
    demo: bool = setting(False, "a run of about two minutes on a laptop: demo data, few steps, small batch", False)
    plan: bool = setting(False, "print the command that suits a machine, its memory and its days, then exit", False)
    plan_for: str = setting("", "with --plan: the machine, for example 16xA100-40GB (default: 8xH100)", False)
    verbose: bool = setting(False, "with --plan: also memory by setting, FLOPs, and the days of all sizes", False)
    seed: int = setting(DEFAULTS["seed"], "seed of the initial weights and of the data order")
    edits: str = setting(
        "", "edits of tokens and loss weights, a parquet file of `data.py edit`", False, metavar="FILE"
    )
    init_from: str = setting("", "start from the weights of this Hugging Face directory instead of random weights")
    branch: str = setting(
        "", "start from weights, moments and counters of this checkpoint, RUN/stepN, with its settings; needs --out"
    )
    nudge: int = setting(0, "with --branch: move N weights by one rounding step, to see what chance makes of it")
    steps: int = setting(DEFAULTS["steps"], "optimizer steps; the learning-rate schedule spans them")
    stop_at: int = setting(0, "pause after this many steps and save a checkpoint", False)
    batch_size: int = setting(DEFAULTS["batch_size"], "rows of one optimizer step, over all ranks")
    micro_batch: int = setting(
        0,
        "rows of one forward and backward pass on one rank (default: on GPUs what --plan says, else at most 8)",
        False,
    )
    seq_len: int = setting(DEFAULTS["seq_len"], "tokens of a row")
    lr: float = setting(None, "peak learning rate (default: the published rate of the size)")
    schedule: str = setting(
        "published", "cosine: of GPT-NeoX v1.0, or of the textbook", choices=["published", "cosine"]
    )
    precision: str = setting(
        "",
        "dtype of matmuls (default: as published on GPUs; on CPUs fp32, or bf16 for --demo if the CPU has it)",
        choices=list(DTYPES),
    )
    shard: str = setting(
        "auto", "what ranks divide: all, all within a node, gradients and moments, or nothing", False, choices=SHARD
    )
    bitwise: bool = setting(False, "the same bits on 1, 2, 4, 8 ... ranks; costs more traffic between ranks")
    recompute: str = setting(
        "auto", "activations to recompute in backward, to save memory", False, choices=("auto", *RECOMPUTE)
    )
    compile: bool = setting(False, "torch.compile every block")
    kernels: str = setting("auto", "hot paths: Triton, torch, auto (Triton on GPUs)", False, choices=backend.KERNELS)
    gelu: str = setting("tanh", "GELU of training: tanh as published, or none: exact erf", choices=["tanh", "none"])
    document_mask: bool = setting(
        False,
        "attention does not cross the ends of documents (token 0); Pythia's does",
        action=BooleanOptionalAction,  # a branch may leave out what its parent had
    )
    probes: str = setting(
        "", "record the loss of these texts before each update, in RUN/probe_loss.bin", False, metavar="FILE.jsonl"
    )
    probe_every: int = setting(1, "with --probes: only before every Nth step", False)
    keep_state: int = setting(2, "how many of the newest checkpoints keep the state that resuming needs", False)
    save_every: int = setting(0, "also save every Nth step, beside the published ones", False)
    save_steps: str = setting(
        "", "also save these steps: 10,1000:5000:500 is 10, 1000, 1500 ... 5000", False, metavar="LIST"
    )
    timeout: float = setting(1800.0, "seconds without progress until a hanging rank is named and the run ends", False)
    profile: int = setting(
        0, "write a torch trace of N steps, after the first two, of every rank to RUN/profile", False
    )
    log: str = setting("", "also log to tensorboard, wandb, or both (tensorboard,wandb)", False)


FIXED = {f.name for f in fields(Settings) if f.metadata["fixed"]}
RECORDED = FIXED | {"data", "edits", "micro_batch"}  # in the manifest of every checkpoint; a branch inherits them


def parse(arguments: list[str]) -> Settings:
    """The settings of a command line with every default resolved. Raises UserError for settings that cannot work."""
    parser = Parser("train.py", description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.epilog = "The same command again resumes a run."
    inherited = inherit(arguments)
    for f in fields(Settings):
        kind = {"action": "store_true"} if f.type is bool else {"type": f.type}
        options = {"help": f.metadata["help"], "default": f.default, **kind, **f.metadata["options"]}
        if f.default and "default" not in options["help"]:
            options["help"] += " (default: %(default)s)"
        if f.type is not bool and "choices" not in options:
            options.setdefault("metavar", {int: "N", float: "X", str: "NAME"}[f.type])
        if f.name in inherited:
            options["required"] = False
        parser.add_argument(flag(f.name), **options)
    if "--demo" in arguments:
        parser.set_defaults(**DEMO)
    parser.set_defaults(**inherited)
    s = Settings(**vars(parser.parse_args(arguments)))

    world_size = int(os.environ.get("WORLD_SIZE", 1))
    s.out = s.out or f"runs/pythia-{s.size}"
    s.lr = SIZES[s.size].lr if s.lr is None else s.lr
    on_gpus = s.plan or torch.cuda.is_available()
    s.precision = s.precision or default_precision(s, on_gpus)
    if not on_gpus:  # on GPUs, fit_gpus decides
        rank_rows = s.batch_size // (8 if s.bitwise else world_size)  # bitwise: the same micro-batches on 1 to 8 ranks
        s.micro_batch = s.micro_batch or math.gcd(8, max(rank_rows, 1))
        s.recompute = "none" if s.recompute == "auto" else s.recompute
    check(s, world_size)
    return s


def inherit(arguments: list[str]) -> dict:
    """The defaults that --branch takes from the parent; {} without --branch. Raises UserError."""
    parser = Parser("train.py", add_help=False)
    parser.add_argument("--branch", default="")
    parser.add_argument("--out", default="")
    given, _ = parser.parse_known_args(arguments)
    if not given.branch:
        return {}
    if not given.out:
        raise UserError("--branch needs --out: the new run has a directory of its own")
    recorded, taken = inherited_settings(given.branch, given.out), {}
    for f in fields(Settings):
        if f.name not in RECORDED or f.name not in recorded:
            continue
        value, choices = recorded[f.name], f.metadata["options"].get("choices")
        if type(value) is not f.type or (choices and value not in choices):
            raise UserError(f"--branch {given.branch}: its manifest has {f.name} {str(value)[:100]!r}")
        taken[f.name] = value
    return taken | {"init_from": ""}


def default_precision(s: Settings, on_gpus: bool) -> str:
    """On GPUs what Pythia was trained in: float16 and bfloat16 take the same time. On CPUs float16 is slow."""
    if on_gpus:
        return SIZES[s.size].precision
    return "bf16" if s.demo and supports_bf16_matmul() else "fp32"


def precision_text(s: Settings) -> str:
    """The precision of a run for its first line, which says so if Pythia was trained in another one."""
    published = SIZES[s.size].precision if s.size in SUITE else s.precision
    return s.precision if s.precision == published else f"{s.precision} (published: {published})"


def extra_steps(s: Settings) -> set[int]:
    """The checkpoints that --save-every and --save-steps add to the published ones. Raises UserError."""
    try:
        listed = parse_steps(s.save_steps, s.steps) if s.save_steps else set()
    except ValueError as error:
        raise UserError(f"--save-steps: {error}") from None
    return listed.union(range(0, s.steps + 1, s.save_every) if s.save_every else ())


def check(s: Settings, world_size: int) -> None:
    """Raise UserError for settings that cannot work, and choose the kernels."""
    for name in ("steps", "batch_size", "seq_len", "keep_state", "lr", "timeout", "probe_every"):
        if not 0 < getattr(s, name) < math.inf:
            raise UserError(f"{flag(name)} must be positive, not {getattr(s, name)}")
    for name in ("profile", "save_every"):
        if getattr(s, name) < 0:
            raise UserError(f"{flag(name)} must be a number of steps, not {getattr(s, name)}")
    extra_steps(s)
    if s.branch and s.init_from:
        raise UserError("--branch and --init-from both say where the weights come from: leave one out")
    if s.nudge < 0 or (s.nudge and not s.branch):
        raise UserError(f"--nudge {s.nudge} must be a number of weights of the parent: it needs --branch")
    if s.bitwise and s.shard in ("none", "hybrid"):
        raise UserError(f"--bitwise divides weights among all ranks: use --shard auto, grad or full, not {s.shard}")
    if not 0 <= s.stop_at <= s.steps:
        raise UserError(f"--stop-at {s.stop_at} lies outside the {s.steps} steps of the run")
    if unknown := set(filter(None, s.log.split(","))) - set(LOGGERS):
        raise UserError(f"--log knows {' and '.join(LOGGERS)}, not {', '.join(sorted(unknown))}")
    data.row_numbers(0, s.batch_size, s.micro_batch or 1, 0, world_size)  # raises if the batch does not divide
    try:
        backend.choose("auto" if s.plan else s.kernels)  # a plan may be for another machine
    except ValueError as error:
        raise UserError(f"--kernels {s.kernels}: {error}") from None
    if s.plan:
        return
    if not s.data:
        raise UserError(
            f"--data is missing: `python train.py --size {s.size} --demo` is a run of about two minutes, "
            f"`python train.py --size {s.size} --data PREFIX` one on your data"
        )
    for name in filter(None, s.log.split(",")):
        import_logger(name)  # before anything is written


def make_job(s: Settings, world_size: int, local_world_size: int) -> Job:
    """The numbers that decide memory and time. The job leaves open what the settings leave open."""
    job = Job(SIZES[s.size], s.batch_size, s.micro_batch, s.seq_len, s.precision, s.recompute, s.shard)
    return replace(job, world_size=world_size, local_world_size=local_world_size, bitwise=s.bitwise)


def plan_text(s: Settings) -> str:
    """What --plan prints."""
    machine = parse_machine(s.plan_for, s.batch_size)
    data.row_numbers(0, s.batch_size, s.micro_batch or 1, 0, machine.world_size)  # raises if the batch does not divide
    job = make_job(s, machine.world_size, machine.local_world_size)
    source = ["--demo"] * s.demo + [f"--data {shlex.quote(s.data or 'PREFIX')}"] * (not s.demo or s.data != "demo")
    text = summary(job, machine, s.steps, s.lr, " ".join(source))
    return f"{text}\n\n{details(job, machine, s.steps, s.lr)}" if s.verbose else text
