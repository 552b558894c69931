"""GPT-NeoX's own checkpoints, written as Hugging Face directories. Nothing is unpickled.

global_stepN/layer_LL-model_RR-model_states.pt is one layer of one tensor-parallel rank. LL is 00 for the embedding, 02
... for the transformer layers, then the final norm and the unembedding, with two numbers between that have no file.
Every rank adds its own copy of a row-parallel bias before the sum over ranks, so the bias of the model is their sum
(GPT-NeoX tools/convert_to_hf.py).
"""

import re
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from model.huggingface import Export, huggingface_name, model_files, write_description
from model.pythia import Pythia
from model.sizes import SIZES, Config
from runtime.errors import UserError
from runtime.tensors import write_tensors
from runtime.torch_files import FileTensor, read_torch_file

FILE = re.compile(r"layer_(\d+)-model_(\d+)-model_states\.pt")
COLUMNS = ("attention.dense.weight", "mlp.dense_4h_to_h.weight")  # split by columns over the ranks
SUMMED = ("attention.dense.bias", "mlp.dense_4h_to_h.bias")
AVERAGED = ("norm.weight", "norm.bias")  # the ends of the names of all LayerNorms; ranks hold equal copies
IGNORED = "attention.rotary_emb.inv_freq"


@dataclass(frozen=True)
class Merged:
    """A tensor of the model, in the parts of all ranks."""

    name: str
    parts: list[FileTensor]

    @property
    def whole(self) -> bool:
        """Whether every rank has all rows and columns."""
        return self.name in SUMMED or self.name.endswith(AVERAGED)

    @property
    def shape(self) -> tuple[int, ...]:
        shape, axis = list(self.parts[0].shape), int(self.name in COLUMNS)
        if not self.whole and axis < len(shape):
            shape[axis] *= len(self.parts)
        return tuple(shape)

    def read(self) -> Tensor:
        parts = [part.read() for part in self.parts]
        if not self.whole:
            return torch.cat(parts, int(self.name in COLUMNS))
        total = sum(parts)
        return total if self.name in SUMMED else total / len(parts)


def read_layers(directory: Path) -> dict[str, Merged]:
    """The tensors of a checkpoint by their Hugging Face names; none is read yet. Raises UserError."""
    files: dict[int, dict[int, Path]] = {}
    for path in sorted(directory.glob("layer_*.pt")):
        if match := FILE.fullmatch(path.name):
            files.setdefault(int(match[1]), {})[int(match[2])] = path
    if len(files) < 4:
        raise UserError(f"{directory} has no files layer_00-model_00-model_states.pt ... of a GPT-NeoX checkpoint")
    last, ranks = max(files), sorted(files[max(files)])
    expected = [0, *range(2, last - 2), last - 1, last]
    if sorted(files) != expected or any(sorted(found) != list(range(len(ranks))) for found in files.values()):
        raise UserError(f"{directory} lacks layers or ranks: it has the layers {sorted(files)}, of {len(ranks)} ranks")
    prefixes = {0: ("word_embeddings", "gpt_neox.embed_in"), last: ("final_linear", "embed_out")}
    prefixes[last - 1] = ("norm", "gpt_neox.final_layer_norm")
    tensors = {}
    for layer, paths in files.items():
        read = [read_torch_file(paths[rank]) for rank in range(len(ranks))]
        for name in read[0].keys() - {IGNORED}:
            parts = [tensors_of_rank.get(name) for tensors_of_rank in read]
            if None in parts or len({(part.shape, part.dtype) for part in parts}) > 1:
                raise UserError(f"{paths[0]}: the ranks differ in {name[:100]!r}")
            theirs, ours = prefixes.get(layer, ("", f"gpt_neox.layers.{layer - 2}."))
            tensors[ours + name.removeprefix(theirs)] = Merged(name, parts)
    return tensors


def find_size(directory: Path, tensors: dict[str, Merged]) -> Config:
    """The Pythia whose shapes a checkpoint has. Raises UserError, which names a tensor, if there is none."""
    problem = ""
    for config in SIZES.values():
        with torch.device("meta"):
            expected = {huggingface_name(name): tuple(p.shape) for name, p in Pythia(config).named_parameters()}
        wrong = [n for n in expected | tensors if n not in tensors or tensors[n].shape != expected.get(n)]
        if not wrong:
            return config
        if not problem or len(wrong) < problem[0]:
            problem = len(wrong), config.name, wrong[0]
    raise UserError(f"{directory} is no Pythia: the nearest is {problem[1]}, from which {problem[2]} differs")


def convert_neox(source: Path, target: Path) -> None:
    """Write a checkpoint of GPT-NeoX as a Hugging Face directory, in its dtype. Optimizer states are not read.

    Raises UserError if it is damaged or no Pythia, OSError if `target` cannot be written.
    """
    tensors = read_layers(source)
    config = find_size(source, tensors)
    dtypes = {part.dtype for tensor in tensors.values() for part in tensor.parts}
    if len(dtypes) > 1 or not (dtype := dtypes.pop()).is_floating_point:
        raise UserError(f"{source} holds tensors of several dtypes")
    files = model_files({name: tensor.shape for name, tensor in tensors.items()}, dtype)
    target.mkdir(parents=True, exist_ok=True)
    write_description(target, config, Export(dtype), files)
    for file, names in files.items():
        shapes = {name: tensors[name].shape for name in names}
        write_tensors(target / file, dtype, shapes, lambda name: [tensors[name].read()])
