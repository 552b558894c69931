"""GPT-NeoX's own checkpoints: tensor-parallel ranks become the model that they computed."""

import shutil
from collections import OrderedDict
from dataclasses import replace

import pytest
import torch
import transformers

from checkpoints.manifest import verify_checkpoint
from checkpoints.published import convert
from model import SIZES
from model.huggingface import load
from model.neox import find_size, read_layers
from runtime.errors import UserError

TINY = replace(SIZES["14m"], vocab=96, layers=3, hidden=32)


@pytest.fixture(autouse=True)
def _tiny(monkeypatch):
    monkeypatch.setitem(SIZES, "14m", TINY)


def write_ranks(model, directory, ranks):
    """A model of transformers as GPT-NeoX saves it. The pieces are cut by heads and neurons, from the definition of
    tensor parallelism; each rank's row-parallel bias is its share of the sum."""
    directory.mkdir(parents=True)
    neox, generator, last = model.gpt_neox, torch.Generator().manual_seed(5), TINY.layers + 4

    def save(layer, rank, tensors):
        states = OrderedDict((name, tensor.detach().clone()) for name, tensor in tensors.items())
        torch.save(states, directory / f"layer_{layer:02}-model_{rank:02}-model_states.pt")

    def shares(bias):
        """Float16 summands whose sum, in the order of the ranks, is exactly the bias, which this sets."""
        parts = [torch.randn(bias.shape, generator=generator).half() * 0.1 for _ in range(ranks)]
        with torch.no_grad():
            bias.copy_(sum(parts))
        return parts

    def rows(tensor, rank):
        return tensor.chunk(ranks, 0)[rank]

    for rank in range(ranks):
        save(0, rank, {"word_embeddings.weight": rows(neox.embed_in.weight, rank)})
        norm = neox.final_layer_norm
        save(last - 1, rank, {"norm.weight": norm.weight, "norm.bias": norm.bias})
        save(last, rank, {"final_linear.weight": rows(model.get_output_embeddings().weight, rank)})
    for number, layer in enumerate(neox.layers):
        attention, mlp = layer.attention, layer.mlp
        dense, out = shares(attention.dense.bias), shares(mlp.dense_4h_to_h.bias)
        for rank in range(ranks):
            tensors = {
                "attention.query_key_value.weight": rows(attention.query_key_value.weight, rank),  # whole heads
                "attention.query_key_value.bias": rows(attention.query_key_value.bias, rank),
                "attention.dense.weight": attention.dense.weight.chunk(ranks, 1)[rank],
                "attention.dense.bias": dense[rank],
                "attention.rotary_emb.inv_freq": torch.ones(4).half(),
                "mlp.dense_h_to_4h.weight": rows(mlp.dense_h_to_4h.weight, rank),
                "mlp.dense_h_to_4h.bias": rows(mlp.dense_h_to_4h.bias, rank),
                "mlp.dense_4h_to_h.weight": mlp.dense_4h_to_h.weight.chunk(ranks, 1)[rank],
                "mlp.dense_4h_to_h.bias": out[rank],
            }
            for name in ("input_layernorm", "post_attention_layernorm"):
                module = getattr(layer, name)
                tensors |= {f"{name}.weight": module.weight, f"{name}.bias": module.bias}
            save(number + 2, rank, tensors)
    return model


@pytest.fixture(scope="module")
def models():
    torch.manual_seed(0)
    config = transformers.GPTNeoXConfig(
        vocab_size=96, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=128
    )
    model = transformers.GPTNeoXForCausalLM(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=0.1)
    return model.half()


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_ranks_become_the_model(models, tmp_path, ranks):
    model = write_ranks(models, tmp_path / "global_step7", ranks)
    convert(tmp_path / "global_step7", tmp_path / "out")
    assert verify_checkpoint(tmp_path / "out/step7") == []
    tokens = torch.arange(60)[None]
    with torch.no_grad():
        difference = load(tmp_path / "out/step7")(tokens) - model.float()(tokens).logits
    model.half()
    assert difference.abs().max() < 1e-5
    theirs = transformers.GPTNeoXForCausalLM.from_pretrained(tmp_path / "out/step7", dtype=torch.float16)
    for (name, ours), (_, expected) in zip(theirs.named_parameters(), model.named_parameters(), strict=True):
        assert torch.equal(ours, expected), name


def refused(directory, words):
    with pytest.raises(UserError) as caught:
        convert(directory, directory.parent / "out")
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not list((directory.parent / "out").glob("*"))


def test_refusals(models, tmp_path):
    source = tmp_path / "global_step7"
    write_ranks(models, source, 2)
    refused(tmp_path / "elsewhere", "global_stepN")
    (tmp_path / "global_step9").mkdir()
    refused(tmp_path / "global_step9", "has no files layer_00")
    for lost in ("layer_03-model_00-model_states.pt", "layer_07-model_01-model_states.pt"):
        copy = shutil.copytree(source, tmp_path / "lost" / "global_step7", dirs_exist_ok=True)
        (copy / lost).unlink()
        refused(copy, "lacks layers or ranks")
    file = source / "layer_02-model_01-model_states.pt"
    tensors = torch.load(file, weights_only=True)
    torch.save({**tensors, "mlp.dense_h_to_4h.bias": torch.zeros(5).half()}, file)
    refused(source, "the ranks differ in 'mlp.dense_h_to_4h.bias'")
    torch.save(dict(list(tensors.items())[1:]), file)
    refused(source, "the ranks differ in")
    file.write_bytes(b"\x80\x02}.")
    refused(source, "not a zip file")


def test_no_pythia(models, tmp_path, monkeypatch):
    write_ranks(models, tmp_path / "global_step7", 2)
    monkeypatch.setitem(SIZES, "14m", replace(TINY, layers=4))
    refused(tmp_path / "global_step7", "is no Pythia: the nearest is 14m")
    monkeypatch.setitem(SIZES, "14m", TINY)
    assert find_size(tmp_path, read_layers(tmp_path / "global_step7")) == TINY
