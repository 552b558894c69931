"""Read and write Hugging Face directories of GPT-NeoX: config.json and safetensors, as transformers opens them."""

import hashlib
import json
import math
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path

import torch
from torch import Tensor

from model.pythia import Pythia
from model.sizes import SIZES, Config
from runtime.errors import UserError
from runtime.files import READ_ERRORS, naming, read_small, reason
from runtime.manifests import listed, listed_files, read_listed
from runtime.tensors import DTYPES, read_header, read_pieces, write_tensors

_LAYER = "gpt_neox.layers.{}."
_NAMES = {
    "embed": "gpt_neox.embed_in.weight",
    "unembed": "embed_out.weight",
    "final_norm": "gpt_neox.final_layer_norm",
    "norm1": _LAYER + "input_layernorm",
    "norm2": _LAYER + "post_attention_layernorm",
    "qkv": _LAYER + "attention.query_key_value",
    "attn_out": _LAYER + "attention.dense",
    "mlp_in": _LAYER + "mlp.dense_h_to_4h",
    "mlp_out": _LAYER + "mlp.dense_4h_to_h",
}
# Old files also hold the causal mask, its fill value and the rotary frequencies.
BUFFERS = re.compile(r"gpt_neox\.layers\.\d+\.attention\.(bias|masked_bias|rotary_emb\.inv_freq)")
_GELU = {"gelu": "none", "gelu_new": "tanh", "gelu_fast": "tanh", "gelu_pytorch_tanh": "tanh"}

_DTYPES = {name: dtype for dtype, name in DTYPES.items()}
SHARD_BYTES = 5_000_000_000  # limit of one safetensors file, the default of transformers 4


@dataclass(frozen=True)
class Export:
    """How a model is written as a Hugging Face directory.

    hidden_act is "gelu" as in the published files or "gelu_pytorch_tanh" as trained: it tells the reader what to
    compute and changes no weight. tokenizer is the tokenizer.json to copy.
    """

    dtype: torch.dtype
    hidden_act: str = "gelu"
    tokenizer: Path | None = None


def huggingface_name(name: str) -> str:
    """The Hugging Face name of a parameter: "gpt_neox.layers.3.mlp.dense_h_to_4h.bias" for "blocks.3.mlp_in.bias"."""
    if match := re.fullmatch(r"blocks\.(\d+)\.(\w+)\.(\w+)", name):
        layer, module, kind = match.groups()
        return f"{_NAMES[module].format(layer)}.{kind}"
    module, _, kind = name.partition(".")
    return _NAMES[module] + (f".{kind}" if kind else "")


def published_config(config: Config, dtype: torch.dtype, hidden_act: str) -> dict:
    """The content of config.json. Rotary and dtype keys are there twice: as transformers 4 and 5 spell them."""
    return {
        "architectures": ["GPTNeoXForCausalLM"],
        "model_type": "gpt_neox",
        "bos_token_id": 0,
        "eos_token_id": 0,
        "hidden_act": hidden_act,
        "hidden_size": config.hidden,
        "initializer_range": 0.02,
        "intermediate_size": config.ffn,
        "layer_norm_eps": config.eps,
        "max_position_embeddings": config.seq_len,
        "num_attention_heads": config.heads,
        "num_hidden_layers": config.layers,
        "rotary_emb_base": config.rotary_base,
        "rotary_pct": config.rotary_fraction,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": config.rotary_base,
            "partial_rotary_factor": config.rotary_fraction,
        },
        "tie_word_embeddings": False,
        "dtype": str(dtype).removeprefix("torch."),
        "torch_dtype": str(dtype).removeprefix("torch."),
        "use_cache": True,
        "use_parallel_residual": config.parallel,
        "vocab_size": config.vocab,
    }


def shard(sizes: dict[str, int], limit: int = SHARD_BYTES) -> list[list[str]]:
    """Group tensor names, in order, into shards of at most `limit` bytes; a larger tensor gets its own shard."""
    shards: list[list[str]] = [[]]
    used = 0
    for name, size in sizes.items():
        if shards[-1] and used + size > limit:
            shards.append([])
            used = 0
        shards[-1].append(name)
        used += size
    return shards


def model_files(shapes: dict[str, tuple[int, ...]], dtype: torch.dtype) -> dict[str, list[str]]:
    """The safetensors files of a model and the tensor names in each: one file, or shards of SHARD_BYTES."""
    shards = shard({name: math.prod(shape) * dtype.itemsize for name, shape in shapes.items()})
    if len(shards) == 1:
        return {"model.safetensors": shards[0]}
    return {f"model-{i + 1:05}-of-{len(shards):05}.safetensors": names for i, names in enumerate(shards)}


def write_description(directory: Path, config: Config, export: Export, files: dict[str, list[str]]) -> None:
    """Write config.json, the tokenizer if given, and the index of several files. `files` comes from model_files.

    Raises OSError.
    """
    texts = {"config.json": json.dumps(published_config(config, export.dtype, export.hidden_act), indent=2) + "\n"}
    if export.tokenizer is not None:
        try:
            texts["tokenizer.json"] = read_small(export.tokenizer, 2**27)
        except ValueError as error:
            raise OSError(f"{export.tokenizer}: {error}") from None
        special = "<|endoftext|>"
        names = {"bos_token": special, "eos_token": special, "unk_token": special}
        settings = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": config.seq_len, **names}
        # transformers 4 would also make token_type_ids, which generate() refuses
        settings["model_input_names"] = ["input_ids", "attention_mask"]
        texts["tokenizer_config.json"] = json.dumps(settings, indent=2) + "\n"
    if len(files) > 1:
        texts["model.safetensors.index.json"] = index_text(files, config.parameters * export.dtype.itemsize)
    for name, text in texts.items():
        with naming(directory / name):
            (directory / name).write_bytes(text if isinstance(text, bytes) else text.encode())


def index_text(files: dict[str, list[str]], total_bytes: int) -> str:
    """The content of model.safetensors.index.json: which of several files holds which tensor."""
    weight_map = {name: file for file, names in files.items() for name in names}
    return json.dumps({"metadata": {"total_size": total_bytes}, "weight_map": weight_map}, indent=2) + "\n"


def save(
    model: Pythia,
    directory: Path | str,
    dtype: torch.dtype = torch.float16,
    hidden_act: str = "gelu",
    tokenizer: Path | None = None,
) -> None:
    """Write a model as a Hugging Face directory; the options are those of Export. Raises OSError."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    parameters = {huggingface_name(name): p.detach() for name, p in model.named_parameters()}
    shapes = {name: tuple(p.shape) for name, p in parameters.items()}
    files = model_files(shapes, dtype)
    write_description(directory, model.config, Export(dtype, hidden_act, tokenizer), files)
    for file, names in files.items():
        file_shapes = {name: shapes[name] for name in names}
        write_tensors(directory / file, dtype, file_shapes, lambda name: [parameters[name].to("cpu", dtype)])


def read_config(directory: Path | str) -> Config:
    """The Config of a Hugging Face directory. Raises UserError unless it holds a GPT-NeoX that Pythia can compute."""
    path = Path(directory) / "config.json"
    stored = _read_supported(path)

    def number(key: str, kind: type = int, default: float | None = None, most: float = 2**24) -> float:
        value = stored.get(key, default)
        valid = isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= most
        if not valid or value != kind(value):
            raise UserError(f"{path}: {key} must be a positive {kind.__name__}, at most {most:g}, not {value!r:.100}")
        return kind(value)

    config = Config(
        name=Path(directory).resolve().name,
        layers=number("num_hidden_layers", most=1000),
        hidden=number("hidden_size"),
        heads=number("num_attention_heads"),
        vocab=number("vocab_size"),
        seq_len=number("max_position_embeddings", default=2048),
        ffn_ratio=number("intermediate_size") // number("hidden_size"),
        rotary_fraction=number("rotary_pct", float, most=1),
        rotary_base=number("rotary_emb_base", float, most=1e12),
        eps=number("layer_norm_eps", float, 1e-5, most=1),
        gelu=_GELU[stored.get("hidden_act", "gelu")],
        parallel=bool(stored.get("use_parallel_residual", True)),
    )
    if config.hidden % config.heads or config.ffn != stored["intermediate_size"] or config.rotary_dim % 2:
        raise UserError(f"{path}: hidden_size, num_attention_heads, intermediate_size and rotary_pct do not fit")
    recipe = ("name", "lr", "init", "precision", "paper", "gelu")  # config.json does not say how a model is trained
    shape = [f.name for f in fields(Config) if f.name not in (*recipe, "seq_len")]
    for size in SIZES.values():
        if all(getattr(size, name) == getattr(config, name) for name in shape):
            return replace(size, gelu=config.gelu, seq_len=config.seq_len)
    return config


def _read_supported(path: Path) -> dict:
    """The content of config.json, its rotary keys in the spelling of transformers 4. Raises UserError."""
    try:
        stored = json.loads(read_listed(path))
    except FileNotFoundError:
        raise UserError(f"{path.parent} has no config.json: it is not a model directory") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read: {reason(error)}") from None
    if not isinstance(stored, dict) or stored.get("model_type") != "gpt_neox":
        raise UserError(f"{path} does not describe a gpt_neox model")
    rope = stored.get("rope_parameters") or stored.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise UserError(f"{path}: rope_parameters must be an object, not {rope!r:.100}")
    if (rope_type := rope.get("rope_type", rope.get("type", "default"))) != "default":
        raise UserError(f"{path}: rotary embedding of type {rope_type!r:.100} is not supported")
    if stored.get("tie_word_embeddings") or stored.get("attention_bias") is False:
        raise UserError(f"{path}: tied embeddings and attention without bias are not supported")
    if stored.get("hidden_act", "gelu") not in list(_GELU):  # `in dict` would need a hash, which a list lacks
        raise UserError(f"{path}: hidden_act must be one of {', '.join(_GELU)}, not {stored['hidden_act']!r:.100}")
    stored.setdefault("rotary_emb_base", rope.get("rope_theta", 10_000))
    stored.setdefault("rotary_pct", rope.get("partial_rotary_factor", 0.25))
    return stored


def load(directory: Path | str, dtype: torch.dtype = torch.float32) -> Pythia:
    """Load a Pythia on the CPU from a Hugging Face directory, cast to dtype. config.json selects its GELU.

    If the directory has a manifest.json, all that is read is compared with its checksums. Without one (a published
    model) names, shapes and dtypes are checked. All weights must be finite.

    Raises UserError if a file is missing or damaged, or if tensors do not match config.json. Never unpickles.
    """
    with torch.device("meta"):
        model = Pythia(read_config(directory))
    weights = {name: tensor.to(dtype) for name, tensor in read_weights(directory, model)}
    model.load_state_dict(weights, assign=True)
    return model.requires_grad_(True)


def read_weights(directory: Path | str, model: Pythia) -> Iterator[tuple[str, Tensor]]:
    """Yield the name and stored value of every parameter of a model from a Hugging Face directory.

    Only one tensor is in memory at a time. Raises UserError like load; missing parameters are reported after the last
    one.
    """
    directory = Path(directory)
    ours = {huggingface_name(name): (name, p.shape) for name, p in model.named_parameters()}
    manifest = listed_files(directory)
    for file in weight_files(directory):
        try:
            checksums = listed(file, manifest)
            header, entries, _ = read_header(file)
            if checksums and hashlib.sha256(header).hexdigest() != checksums.get("header_sha256"):
                raise ValueError("its header does not match its checksum")
            for name, entry in entries.items():
                if BUFFERS.fullmatch(name):
                    continue
                our_name, shape = take_parameter(file, name, entry, ours)
                expected = checksums["tensors"].get(name, "") if checksums else None
                yield our_name, _read_tensor(file, name, entry, len(header), expected).view(shape)
        except READ_ERRORS as error:
            raise UserError(f"{file} is damaged: {reason(error)}") from None
    if missing := list(ours):
        raise UserError(f"{directory} lacks {missing[0]}" + (f" and {len(missing) - 1} more" if missing[1:] else ""))


def take_parameter(
    file: Path, name: str, entry: dict, ours: dict[str, tuple[str, torch.Size]]
) -> tuple[str, torch.Size]:
    """Take a stored tensor's own name and shape from `ours`. Raises UserError if it does not fit."""
    text = repr(name[:100])  # a file can hold any name
    # transformers 5 calls the unembedding lm_head in memory, and other programs may write that name to files
    name = "embed_out.weight" if name == "lm_head.weight" else name
    if name not in ours:
        raise UserError(f"{file} holds {text}, which is unknown to a GPT-NeoX of this config.json or stored twice")
    our_name, shape = ours.pop(name)
    if entry["dtype"] not in _DTYPES:
        raise UserError(f"{file}: {text} has dtype {entry['dtype']}, not one of {', '.join(_DTYPES)}")
    if entry["shape"] != list(shape):
        raise UserError(f"{file}: {text} has shape {entry['shape']}, not {list(shape)} as in config.json")
    return our_name, shape


def _read_tensor(file: Path, name: str, entry: dict, header_bytes: int, sha256: str | None) -> Tensor:
    """The values of a stored tensor, one-dimensional. Raises UserError if they do not have this sha256, or if one of
    them is not finite."""
    (begin, end), dtype = entry["data_offsets"], _DTYPES[entry["dtype"]]
    try:
        tensor = torch.empty(end - begin, dtype=torch.uint8)
    except RuntimeError:
        raise UserError(f"{file}: there is no memory for {name}, {(end - begin) / 1e9:.1f} GB") from None
    digest, finite, done = hashlib.sha256(), True, 0
    for piece in read_pieces(file, header_bytes + begin, end - begin):
        if sha256 is not None:
            digest.update(piece.numpy())
        least, most = torch.aminmax(piece.view(dtype))  # NaN if one value is NaN; many times as fast as isfinite
        finite = finite and math.isfinite(least) and math.isfinite(most)
        tensor[done : done + len(piece)] = piece
        done += len(piece)
    if sha256 is not None and sha256 != digest.hexdigest():
        raise UserError(f"{file} is damaged in tensor {name}")
    if not finite:
        raise UserError(f"{file}: {name} holds NaN or infinity; take another checkpoint")
    return tensor.view(dtype)


def weight_files(directory: Path, whole: str = "model.safetensors") -> list[Path]:
    """The files with the weights of a model: `whole`, or the shards that its index names.

    Raises UserError if one is missing or lies outside of the directory.
    """
    index = directory / f"{whole}.index.json"
    files = [directory / whole]
    if os.path.lexists(index):
        try:
            names = sorted(set(json.loads(read_listed(index))["weight_map"].values()))
            outside = any(Path(name).name != name for name in names)
        except READ_ERRORS as error:
            raise UserError(f"{index} cannot be read: {error!r:.200}") from None
        if outside:
            raise UserError(f"{index} names a file outside its directory")
        files = [directory / name for name in names]
    for file in files:
        if not os.path.exists(file):  # noqa: PTH110 (Path.exists raises on a name that is too long)
            hint = ""
            for pickled in ("pytorch_model.bin", "pytorch_model.bin.index.json"):
                if (directory / pickled).exists():
                    hint = f"; {pickled} is there, but a pickle is never read: convert it to safetensors"
            raise UserError(f"{file} does not exist{hint}")
    return files
