"""Weights in torch files (pytorch_model.bin or its shards), written again as safetensors. Nothing is unpickled."""

from pathlib import Path

import torch

from model.huggingface import (
    BUFFERS,
    huggingface_name,
    index_text,
    model_files,
    read_config,
    take_parameter,
    weight_files,
)
from model.pythia import Pythia
from runtime.errors import UserError
from runtime.tensors import DTYPES, write_tensors
from runtime.torch_files import FileTensor, read_torch_file

TORCH_WEIGHTS = "pytorch_model.bin"


def convert_torch_files(directory: Path) -> None:
    """Write safetensors of the same values and dtype beside the torch files of a Hugging Face directory.

    Names, shapes and dtypes are compared with config.json before any value is read. Raises UserError if something does
    not fit, OSError if the disk fails.
    """
    with torch.device("meta"):
        model = Pythia(read_config(directory))
    ours = {huggingface_name(name): (name, p.shape) for name, p in model.named_parameters()}
    names = {our_name: name for name, (our_name, _) in ours.items()}
    found: dict[str, FileTensor] = {}
    for file in weight_files(directory, TORCH_WEIGHTS):
        for name, tensor in read_torch_file(file).items():
            if not BUFFERS.fullmatch(name):
                entry = {"dtype": DTYPES.get(tensor.dtype, str(tensor.dtype)), "shape": list(tensor.shape)}
                found[names[take_parameter(file, name, entry, ours)[0]]] = tensor
    if ours:
        raise UserError(f"{directory / TORCH_WEIGHTS} lacks {next(iter(ours))}, one of {len(ours)} missing tensors")
    if len(dtypes := {tensor.dtype for tensor in found.values()}) > 1:
        raise UserError(f"{directory / TORCH_WEIGHTS} holds tensors of several dtypes")
    (dtype,) = dtypes
    files = model_files({name: tensor.shape for name, tensor in found.items()}, dtype)
    for file, inside in files.items():
        shapes = {name: found[name].shape for name in inside}
        write_tensors(directory / file, dtype, shapes, lambda name: [found[name].read()])
    if len(files) > 1:
        total = model.config.parameters * dtype.itemsize
        (directory / "model.safetensors.index.json").write_text(index_text(files, total))
