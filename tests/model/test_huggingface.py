"""Hugging Face directories: transformers 4 and 5 open ours, we open theirs and older ones, and any other directory is
refused with one line."""

import json
import os
import pickle
import random
import shutil
import signal
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from corpus.tokenizer import byte_tokenizer
from model import SIZES, SUITE, Pythia, huggingface
from model.huggingface import huggingface_name, load, read_config, save
from runtime.errors import UserError

TINY = replace(SIZES["14m"], vocab=384, layers=2)
MICRO = replace(SIZES["14m"], vocab=24, layers=1, hidden=16, heads=2, seq_len=32)
TOKENS = torch.randint(0, 384, (2, 40), generator=torch.Generator().manual_seed(0))
DTYPES = [torch.float16, torch.bfloat16, torch.float32]
MAJOR = int(transformers.__version__.split(".")[0])


@pytest.fixture(autouse=True)
def _one_thread():
    """Small models are faster with one thread, above all on a busy machine."""
    torch.set_num_threads(1)


def trained_like(config, seed=3):
    """A model whose biases and norms differ from their initial zeros and ones."""
    model = Pythia(config, seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=generator), alpha=0.02 if p.dim() > 1 else 0.2)
    return model


@pytest.fixture(scope="module")
def tiny():
    return trained_like(TINY)


@pytest.fixture(scope="module")
def micro_saved(tmp_path_factory):
    directory = tmp_path_factory.mktemp("micro")
    save(trained_like(MICRO), directory, torch.float32)
    return directory


@pytest.fixture
def micro(micro_saved, tmp_path):
    """A float32 directory of a micro model, which a test may damage."""
    return shutil.copytree(micro_saved, tmp_path / "micro")


def theirs(directory, **options):
    return transformers.GPTNeoXForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager", **options
    ).eval()


@torch.no_grad()
def distance(a, b):
    """The largest difference between the logits of two models, ours or from transformers."""
    logits = [out if isinstance(out, torch.Tensor) else out.logits for out in (a(TOKENS), b(TOKENS))]
    assert logits[0].std() > 0.1  # the logits are not trivial
    assert logits[0].shape == logits[1].shape == (*TOKENS.shape, TINY.vocab)
    return (logits[0] - logits[1]).abs().max().item()


def same_weights(model, expected, dtype=torch.float32):
    assert model.state_dict().keys() == expected.state_dict().keys()
    for name, p in expected.state_dict().items():
        assert torch.equal(model.state_dict()[name], p.to(dtype).float()), name


def edit_config(directory, remove=(), **changes):
    path = directory / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in config.items() if key not in remove}))


def edit_tensors(directory, change, name="model.safetensors"):
    tensors = load_file(directory / name)
    change(tensors)
    save_file(tensors, directory / name, metadata={"format": "pt"})


@contextmanager
def at_most(seconds):
    """Raise TimeoutError in the block after some seconds."""

    def late(*_):
        raise TimeoutError(f"still running after {seconds} seconds")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def refused(directory, *words):
    """load raises one line that contains all words. Returns the line."""
    with at_most(3), pytest.raises(UserError) as caught:
        load(directory)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert str(word) in message
    return message


# Ours in transformers


def test_names_are_those_of_transformers(tiny):
    model = transformers.GPTNeoXForCausalLM(
        transformers.GPTNeoXConfig(**huggingface.published_config(TINY, torch.float32, "gelu"))
    )
    names = {name.replace("lm_head", "embed_out"): p.shape for name, p in model.named_parameters()}
    assert {huggingface_name(name): p.shape for name, p in tiny.named_parameters()} == names


@pytest.mark.parametrize("parallel", [True, False])
def test_logits_in_transformers(tmp_path, parallel):
    """transformers computes erf or tanh GELU as config.json says; load does the same; training uses tanh."""
    training = trained_like(replace(TINY, parallel=parallel))
    assert training.config.gelu == "tanh"
    save(training, tmp_path / "erf", torch.float32)
    save(training, tmp_path / "tanh", torch.float32, hidden_act="gelu_pytorch_tanh")
    erf, tanh = theirs(tmp_path / "erf"), theirs(tmp_path / "tanh")
    loaded = load(tmp_path / "erf")
    assert loaded.config.gelu == "none"
    assert loaded.config.parallel == parallel
    assert distance(loaded, erf) < 1e-4
    assert 1e-5 < distance(training, erf) < 1e-3  # the two activations do differ
    assert distance(training, tanh) < 1e-4
    assert distance(load(tmp_path / "tanh"), training) == 0


@pytest.mark.parametrize("dtype", DTYPES)
def test_storage(tmp_path, tiny, dtype):
    save(tiny, tmp_path, dtype)
    stored = load_file(tmp_path / "model.safetensors")
    assert {t.dtype for t in stored.values()} == {dtype}
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["dtype"] == config["torch_dtype"] == str(dtype).removeprefix("torch.")
    model = load(tmp_path)
    same_weights(model, tiny, dtype)
    assert all(p.requires_grad and p.dtype == torch.float32 for p in model.parameters())
    assert distance(model, theirs(tmp_path)) < 1e-4
    assert {p.dtype for p in load(tmp_path, dtype).parameters()} == {dtype}
    automatic = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto")
    assert automatic.dtype == dtype
    same_weights(load(tmp_path, torch.float64).float(), tiny, dtype)


def test_loaded_weights_are_independent_of_the_file(tmp_path, tiny):
    save(tiny, tmp_path, torch.float32)
    model = load(tmp_path)
    size = (tmp_path / "model.safetensors").stat().st_size
    with (tmp_path / "model.safetensors").open("r+b") as file:
        file.write(bytes(size))
    same_weights(model, tiny)


def test_config_has_both_spellings(tmp_path, tiny):
    odd = Pythia(replace(MICRO, rotary_fraction=0.5, rotary_base=20_000.0, eps=1e-6))
    save(odd, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["rotary_pct"] == config["rope_parameters"]["partial_rotary_factor"] == 0.5
    assert config["rotary_emb_base"] == config["rope_parameters"]["rope_theta"] == 20_000
    assert config["rope_parameters"]["rope_type"] == "default"
    assert config["torch_dtype"] == config["dtype"] == "float16"
    assert config["architectures"] == ["GPTNeoXForCausalLM"]
    assert (config["bos_token_id"], config["eos_token_id"], config["vocab_size"]) == (0, 0, 24)
    opened = transformers.AutoConfig.from_pretrained(tmp_path)
    assert opened.model_type == "gpt_neox"
    assert opened.layer_norm_eps == 1e-6
    assert opened.max_position_embeddings == 32
    if MAJOR >= 5:
        assert opened.rope_parameters["rope_theta"] == 20_000
        assert opened.rope_parameters["partial_rotary_factor"] == 0.5
    else:
        assert (opened.rotary_emb_base, opened.rotary_pct) == (20_000, 0.5)


# Old and foreign files here


def test_transformers_5_spelling(tmp_path, tiny):
    model = trained_like(replace(TINY, rotary_fraction=0.5, rotary_base=500.0, gelu="none"))
    save(model, tmp_path, torch.float32)
    edit_config(tmp_path, remove=("rotary_pct", "rotary_emb_base", "torch_dtype"))
    assert distance(load(tmp_path), model) == 0
    edit_config(tmp_path, remove=("rope_parameters",))  # without these keys, the defaults of GPT-NeoX apply
    config = read_config(tmp_path)
    assert (config.rotary_fraction, config.rotary_base) == (0.25, 10_000)


def test_transformers_4_spelling(tmp_path, tiny):
    model = trained_like(replace(TINY, rotary_fraction=0.5, rotary_base=500.0, gelu="none"))
    save(model, tmp_path, torch.float32)
    edit_config(tmp_path, remove=("rope_parameters", "dtype"))
    assert distance(load(tmp_path), model) == 0
    edit_config(tmp_path, rope_scaling=None, attention_bias=True, hidden_dropout=0.0, transformers_version="4.24.0")
    assert distance(load(tmp_path), model) == 0
    assert distance(load(tmp_path), theirs(tmp_path)) < 1e-4


def test_published_file(tmp_path, tiny):
    """The config.json of pythia-70m on the Hub with another shape, float16 weights, and the old buffers."""
    published = {
        "architectures": ["GPTNeoXForCausalLM"],
        "bos_token_id": 0,
        "eos_token_id": 0,
        "hidden_act": "gelu",
        "hidden_size": 128,
        "initializer_range": 0.02,
        "intermediate_size": 512,
        "layer_norm_eps": 1e-05,
        "max_position_embeddings": 2048,
        "model_type": "gpt_neox",
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
        "rotary_emb_base": 10000,
        "rotary_pct": 0.25,
        "tie_word_embeddings": False,
        "torch_dtype": "float16",
        "transformers_version": "4.24.0",
        "use_cache": True,
        "use_parallel_residual": True,
        "vocab_size": 384,
    }
    save(tiny, tmp_path, torch.float16)

    def add_buffers(tensors):
        for layer in range(2):
            attention = f"gpt_neox.layers.{layer}.attention."
            tensors[attention + "bias"] = torch.ones(1, 1, 2048, 2048, dtype=torch.bool).tril()
            tensors[attention + "masked_bias"] = torch.tensor(-1e4, dtype=torch.float16)
            tensors[attention + "rotary_emb.inv_freq"] = torch.ones(4, dtype=torch.float16)

    edit_tensors(tmp_path, add_buffers)
    (tmp_path / "config.json").write_text(json.dumps(published))
    assert len(load_file(tmp_path / "model.safetensors")) == len(list(tiny.parameters())) + 6
    same_weights(load(tmp_path), tiny, torch.float16)
    assert distance(load(tmp_path), theirs(tmp_path)) < 1e-4


@pytest.mark.parametrize("shard_size", [None, "200KB"])
def test_saved_by_transformers(tmp_path, shard_size):
    torch.manual_seed(0)
    config = transformers.GPTNeoXConfig(
        vocab_size=384, hidden_size=128, num_hidden_layers=2, num_attention_heads=4, intermediate_size=512
    )
    model = transformers.GPTNeoXForCausalLM(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=0.1)
    model.save_pretrained(tmp_path, **({"max_shard_size": shard_size} if shard_size else {}))
    assert len(list(tmp_path.glob("*.safetensors"))) > (3 if shard_size else 0)
    assert (tmp_path / "model.safetensors.index.json").exists() == bool(shard_size)
    ours = load(tmp_path)
    assert ours.config.parallel
    assert distance(ours, model) < 1e-4


def test_the_head_of_transformers_5(micro):
    """transformers 5 calls the unembedding lm_head in memory. A file with this name can be read."""
    before = load(micro)
    edit_tensors(micro, lambda tensors: tensors.update({"lm_head.weight": tensors.pop("embed_out.weight")}))
    same_weights(load(micro), before)


@pytest.mark.parametrize("size", SUITE)
@pytest.mark.parametrize("act", ["gelu", "gelu_pytorch_tanh"])
def test_published_shapes_keep_their_recipe(tmp_path, size, act):
    """The expected values are listed here: layers, hidden, heads, vocab, learning rate, initialization, precision."""
    shapes = {
        "14m": (6, 128, 4, 50_304, 1e-3, "small", "fp16"),
        "31m": (6, 256, 8, 50_304, 1e-3, "small", "fp16"),
        "70m": (6, 512, 8, 50_304, 1e-3, "small", "fp16"),
        "160m": (12, 768, 12, 50_304, 6e-4, "small", "fp16"),
        "410m": (24, 1024, 16, 50_304, 3e-4, "small", "fp16"),
        "1b": (16, 2048, 8, 50_304, 2.5e-4, "small", "bf16"),
        "1.4b": (24, 2048, 16, 50_304, 2e-4, "small", "fp16"),
        "2.8b": (32, 2560, 32, 50_304, 1.6e-4, "small", "fp16"),
        "6.9b": (32, 4096, 32, 50_432, 1.2e-4, "normal", "fp16"),
        "12b": (36, 5120, 40, 50_688, 1.2e-4, "normal", "fp16"),
    }
    layers, hidden, heads, vocab, lr, init, precision = shapes[size]
    config = {
        "model_type": "gpt_neox",
        "hidden_act": act,
        "hidden_size": hidden,
        "intermediate_size": 4 * hidden,
        "layer_norm_eps": 1e-05,
        "max_position_embeddings": 2048,
        "num_attention_heads": heads,
        "num_hidden_layers": layers,
        "rotary_emb_base": 10000,
        "rotary_pct": 0.25,
        "use_parallel_residual": True,
        "vocab_size": vocab,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    found = read_config(tmp_path)
    assert (found.name, found.lr, found.init, found.precision) == (size, lr, init, precision)
    assert found.gelu == ("none" if act == "gelu" else "tanh")
    for change in ({"num_hidden_layers": layers + 1}, {"vocab_size": vocab + 1}, {"use_parallel_residual": False}):
        (tmp_path / "config.json").write_text(json.dumps(config | change))
        assert read_config(tmp_path).name == tmp_path.name


@pytest.mark.parametrize("seq_len", [1, 256, 4096])
def test_a_size_trained_on_other_rows_keeps_its_name(tmp_path, seq_len):
    save(Pythia(replace(SIZES["14m"], seq_len=seq_len)), tmp_path)
    assert read_config(tmp_path) == replace(SIZES["14m"], seq_len=seq_len, gelu="none")


TEXTS = ["def f(x):\n    return x", "naïve café — 日本語 😀", "", " two  spaces\t\r\n", "<|endoftext|>a<|padding|>"]


def test_tokenizer_opens_in_transformers(tmp_path):
    original = byte_tokenizer()
    original.save(str(tmp_path / "tokenizer.json"))
    save(Pythia(TINY), tmp_path / "model", tokenizer=tmp_path / "tokenizer.json")
    assert (tmp_path / "model" / "tokenizer.json").read_bytes() == (tmp_path / "tokenizer.json").read_bytes()
    opened = transformers.AutoTokenizer.from_pretrained(tmp_path / "model")
    for text in TEXTS:
        ids = original.encode(text).ids
        assert opened(text)["input_ids"] == ids
        assert Tokenizer.from_file(str(tmp_path / "model" / "tokenizer.json")).encode(text).ids == ids
        assert opened.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False) == original.decode(ids)
    assert opened.decode(original.encode(TEXTS[1]).ids) == TEXTS[1]
    assert (opened.bos_token_id, opened.eos_token_id, opened.unk_token_id) == (0, 0, 0)
    assert opened.model_max_length == 2048
    assert opened.model_input_names == ["input_ids", "attention_mask"]
    model = transformers.GPTNeoXForCausalLM.from_pretrained(tmp_path / "model")
    inputs = opened(TEXTS[0], return_tensors="pt")  # generate() refuses token_type_ids, which 4.57 would add
    assert model.generate(**inputs, max_new_tokens=2, do_sample=False).shape[0] == 1


def test_saved_files_are_readable_by_others(tmp_path):
    """The umask decides who can read the files."""
    old = os.umask(0o022)
    try:
        save(Pythia(MICRO), tmp_path / "model")
    finally:
        os.umask(old)
    assert {f"{path.stat().st_mode & 0o777:o}" for path in (tmp_path / "model").iterdir()} == {"644"}


# Directories that are not models


def test_missing_files(tmp_path, micro):
    refused(tmp_path / "nowhere", tmp_path / "nowhere", "config.json")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", tmp_path / "empty", "config.json")
    refused(micro / "model.safetensors", micro / "model.safetensors")
    (micro / "model.safetensors").unlink()
    refused(micro, micro / "model.safetensors")
    (micro / "model.safetensors").mkdir()
    refused(micro, micro / "model.safetensors")


class Touch:
    """Unpickling this creates a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_a_pickle_is_never_read(micro, tmp_path):
    touched = tmp_path / "touched"
    (micro / "pytorch_model.bin").write_bytes(pickle.dumps(Touch(touched)))
    load(micro)
    (micro / "model.safetensors").unlink()
    refused(micro, micro / "model.safetensors", "pytorch_model.bin is there", "pickle")
    (micro / "pytorch_model.bin").rename(micro / "pytorch_model.bin.index.json")
    refused(micro, micro / "model.safetensors", "pytorch_model.bin.index.json is there", "pickle")
    (micro / "pytorch_model.bin.index.json").rename(micro / "pytorch_model.bin")
    (micro / "model.safetensors").write_bytes(pickle.dumps(Touch(touched)))
    refused(micro, micro / "model.safetensors")
    assert not touched.exists()
    pickle.loads((micro / "pytorch_model.bin").read_bytes()).close()
    assert touched.exists()  # unpickling does run the code


NO_CONFIGS = ["", "{", "nonsense", "[1]", "7", "null", '"gpt_neox"', "{}", "\xff\xfe", "\0"]
NO_CONFIGS += ['{"model_type": "llama"}', '{"model_type": ["gpt_neox"]}', '{"a": ' + "1" * 5000 + "}"]
NO_CONFIGS += ["[" * 100_000, '{"model_type": ' * 50_000]


@pytest.mark.parametrize("text", NO_CONFIGS, ids=lambda text: repr(text[:30]))
def test_config_that_is_not_a_model(micro, text):
    (micro / "config.json").write_bytes(text.encode("latin-1"))
    refused(micro, micro / "config.json")


def test_config_that_cannot_be_read(micro):
    (micro / "config.json").unlink()
    (micro / "config.json").mkdir()
    refused(micro, micro / "config.json")


NUMBERS = ["hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers", "vocab_size"]
NUMBERS += ["max_position_embeddings", "layer_norm_eps", "rotary_pct", "rotary_emb_base"]
BAD = ["16", "", None, [], [16], {}, True, False, 0, -1, -16, 2**60, 10**30, 1e300]
BAD += [float("inf"), float("-inf"), float("nan")]  # Python's json reads and writes them


ABSURD_AND_HARMLESS = [("rotary_emb_base", 2**60), ("rotary_emb_base", 10**30), ("rotary_emb_base", 1e300)]
ABSURD_AND_HARMLESS += [("layer_norm_eps", 2**60), ("layer_norm_eps", 10**30), ("layer_norm_eps", 1e300)]


@pytest.mark.parametrize(
    ("key", "value"),
    [(key, value) for key in NUMBERS for value in BAD if (key, value) not in ABSURD_AND_HARMLESS],
    ids=repr,
)
def test_bad_config_field(micro, key, value):
    edit_config(micro, **{key: value})
    refused(micro, micro, "config.json")


@pytest.mark.parametrize("key", NUMBERS[:6])
def test_fractional_config_count(micro, key):
    edit_config(micro, **{key: 16.5})
    refused(micro, micro / "config.json", key, "16.5")


@pytest.mark.parametrize("key", NUMBERS[:5])
def test_config_field_missing(micro, key):
    edit_config(micro, remove=(key,))
    refused(micro, micro / "config.json", key)


def test_more_layers_than_a_machine_holds(micro):
    edit_config(micro, num_hidden_layers=3_000_000)
    refused(micro, micro)


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"hidden_act": "relu"}, "relu"),
        ({"hidden_act": None}, "hidden_act"),
        ({"hidden_act": ["gelu"]}, "hidden_act"),
        ({"hidden_act": {}}, "hidden_act"),
        ({"tie_word_embeddings": True}, "tied"),
        ({"attention_bias": False}, "bias"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, "yarn"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000}}, "linear"),
        ({"rope_parameters": {"rope_type": ["default"]}}, "default"),
        ({"rope_parameters": None, "rope_scaling": {"type": "linear", "factor": 2.0}}, "linear"),
        ({"rope_parameters": [1]}, "rope_parameters"),
        ({"rope_parameters": "default"}, "rope_parameters"),
        ({"rope_parameters": 7}, "rope_parameters"),
        ({"rope_parameters": None, "rope_scaling": [1]}, "rope"),
        ({"rotary_pct": 1.5}, "rotary_pct"),
        ({"rotary_pct": 9.25}, "rotary_pct"),
        ({"rotary_pct": 0.4}, "rotary_pct"),  # 3 of 8 columns cannot be paired
        ({"num_attention_heads": 3}, "num_attention_heads"),
        ({"num_attention_heads": 32}, "num_attention_heads"),
        ({"intermediate_size": 65}, "intermediate_size"),
        ({"intermediate_size": 8}, "intermediate_size"),
    ],
    ids=repr,
)
def test_config_not_supported(micro, changes, word):
    edit_config(micro, **changes)
    refused(micro, micro / "config.json", word)


def test_rope_values_must_be_numbers_in_both_spellings(micro):
    edit_config(micro, remove=("rotary_pct", "rotary_emb_base"), rope_parameters={"rope_theta": "10000"})
    refused(micro, micro / "config.json", "rotary_emb_base")
    edit_config(micro, rope_parameters={"partial_rotary_factor": [0.25]})
    refused(micro, micro / "config.json", "rotary_pct")


# Weights that do not fit

QKV = "gpt_neox.layers.0.attention.query_key_value.weight"


@pytest.mark.parametrize("name", [QKV, "embed_out.weight", "gpt_neox.final_layer_norm.bias"])
def test_missing_tensor(micro, name):
    edit_tensors(micro, lambda tensors: tensors.pop(name))
    refused(micro, micro, name)


@pytest.mark.parametrize(
    "name", ["extra", "gpt_neox.layers.1.input_layernorm.bias", "gpt_neox.layers.0.attention.biases", "embed"]
)
def test_extra_tensor(micro, name):
    edit_tensors(micro, lambda tensors: tensors.update({name: torch.zeros(16)}))
    refused(micro, micro / "model.safetensors", name)


@pytest.mark.parametrize("shape", [(16, 48), (48, 17), (768,), (1, 48, 16), ()])
def test_wrong_shape(micro, shape):
    edit_tensors(micro, lambda tensors: tensors.update({QKV: torch.zeros(shape)}))
    refused(micro, micro / "model.safetensors", QKV, list(shape), [48, 16])


@pytest.mark.parametrize("dtype", [torch.int64, torch.int8, torch.bool, torch.uint8, torch.complex64])
def test_tensor_that_is_not_floating(micro, dtype):
    edit_tensors(micro, lambda tensors: tensors.update({QKV: torch.ones(48, 16, dtype=dtype)}))
    refused(micro, micro / "model.safetensors", QKV)


def test_truncated_weights(micro):
    path = micro / "model.safetensors"
    data = path.read_bytes()
    for size in [0, 1, 7, 8, 9, 100, len(data) // 2, len(data) - 1]:
        path.write_bytes(data[:size])
        refused(micro, path)
    path.write_bytes(data + b"x")
    refused(micro, path)
    for length in (0, 1, 2**60, 2**63, 2**64 - 1):
        path.write_bytes(length.to_bytes(8, "little") + data[8:])
        refused(micro, path)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_not_finite(micro, monkeypatch, dtype, value):
    """Anywhere in a tensor, also beside the ends of the pieces that are read at once."""
    monkeypatch.setattr(huggingface, "read_pieces", partial(huggingface.read_pieces, piece=64))
    tensors = {name: tensor.to(dtype) for name, tensor in load_file(micro / "model.safetensors").items()}
    save_file(tensors, micro / "model.safetensors", metadata={"format": "pt"})
    load(micro)
    for place in (0, 5, 31, 32, -1):
        damaged = {name: tensor.clone() for name, tensor in tensors.items()}
        damaged[QKV].view(-1)[place] = value
        save_file(damaged, micro / "model.safetensors", metadata={"format": "pt"})
        refused(micro, micro / "model.safetensors", QKV, "NaN or infinity")


def test_extreme_weights_are_finite(micro):
    edit_tensors(micro, lambda tensors: tensors[QKV].view(-1)[:3].copy_(torch.tensor([3.4e38, -3.4e38, 1e-45])))
    load(micro)


def test_old_buffers_may_hold_anything(micro):
    """They are not read: the fill value of the mask is -inf in some published files."""
    name = "gpt_neox.layers.0.attention.masked_bias"
    edit_tensors(micro, lambda tensors: tensors.update({name: torch.tensor(float("-inf"))}))
    load(micro)


@pytest.mark.parametrize("name", ["\x1b[2J\x1b]0;title\x07", "two\nlines", "x" * 10_000, "\u202egpj"])
def test_a_hostile_name_is_not_printed_raw(micro, name):
    edit_tensors(micro, lambda tensors: tensors.update({name: torch.zeros(1)}))
    message = refused(micro, micro / "model.safetensors")
    assert message.isprintable()
    assert len(message) < 1000


def test_a_manifest_of_another_program(micro):
    """A file manifest.json that is not ours cannot be believed, and is not ignored: ours may be damaged."""
    (micro / "manifest.json").write_text('{"name": "micro"}')
    refused(micro, micro / "manifest.json")


def test_no_memory_for_a_tensor(micro, monkeypatch):
    empty = torch.empty

    def no_memory(*shape, dtype=None):
        if dtype == torch.uint8:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        return empty(*shape, dtype=dtype)

    monkeypatch.setattr(huggingface.torch, "empty", no_memory)
    refused(micro, micro / "model.safetensors", "there is no memory for")


def test_only_one_tensor_is_in_memory(micro):
    """read_weights reads a tensor when it is asked for: a rank that keeps its rows needs room for one tensor more."""
    with torch.device("meta"):
        model = Pythia(read_config(micro))
    weights = huggingface.read_weights(micro, model)
    next(weights)
    (micro / "model.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match="shorter"):
        next(weights)


# Shards


@pytest.fixture
def sharded(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface.shard, "__defaults__", (3000,))
    model = trained_like(MICRO)
    save(model, tmp_path / "sharded", torch.float32)
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 2
    same_weights(load(tmp_path / "sharded"), model)
    return tmp_path / "sharded"


def test_shards_in_order():
    assert huggingface.shard({"a": 5, "b": 5, "c": 1, "d": 100, "e": 1, "f": 9}, 10) == [
        ["a", "b"],
        ["c"],
        ["d"],
        ["e", "f"],
    ]
    assert huggingface.shard({"a": 11}, 10) == [["a"]]
    assert huggingface.SHARD_BYTES == 5_000_000_000


def test_missing_and_damaged_shard(sharded):
    path = sorted(sharded.glob("*.safetensors"))[1]
    data = path.read_bytes()
    path.write_bytes(data[:-1])
    refused(sharded, path)
    path.unlink()
    refused(sharded, path)


NO_INDICES = ["", "{", "[1]", "7", "{}", '{"weight_map": 7}', "[" * 100_000, "\xff"]
NO_MAPS = ["null", "[]", '"model.safetensors"', "{}", '{"a": 1}', '{"a": null}', '{"a": ["b"]}', '{"a": 1, "b": "c"}']
NO_MAPS += [
    '{"a": ""}',
    '{"a": "."}',
    '{"a": ".."}',
    '{"a": "x\\u0000"}',
    '{"a": "\\ud800"}',
    f'{{"a": "{"x" * 5000}"}}',
]


@pytest.mark.parametrize(
    "text", NO_INDICES + [f'{{"weight_map": {text}}}' for text in NO_MAPS], ids=lambda text: repr(text[:40])
)
def test_bad_index(sharded, text):
    (sharded / "model.safetensors.index.json").write_bytes(text.encode("latin-1"))
    refused(sharded, sharded)


@pytest.mark.parametrize("place", ["../outside.safetensors", "{parent}/outside.safetensors", "sub/outside.safetensors"])
def test_index_that_names_a_file_outside(sharded, place):
    """The file exists and fits; it is refused because of its place."""
    tensors = {name: tensor for path in sharded.glob("*.safetensors") for name, tensor in load_file(path).items()}
    (sharded / "sub").mkdir()
    for folder in (sharded.parent, sharded / "sub"):
        save_file(tensors, folder / "outside.safetensors", metadata={"format": "pt"})
    index = {"weight_map": dict.fromkeys(tensors, place.format(parent=sharded.parent))}
    (sharded / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(sharded, sharded / "model.safetensors.index.json", "outside")


# Random damage


def mutated(rng, data, alphabet):
    damaged = bytearray(data)
    for _ in range(rng.randint(1, 3)):
        place = rng.randrange(len(damaged))
        kind = rng.randrange(4)
        if kind == 0:
            damaged[place] = rng.randrange(256)
        elif kind == 1:
            damaged[place] ^= 1 << rng.randrange(8)
        elif kind == 2:
            damaged[place : place + 1] = bytes(rng.choices(alphabet, k=2))
        else:
            del damaged[place : place + rng.randint(1, 4)]
    return bytes(damaged)


def outcome(directory):
    """ "model", "refused", or the text of an unexpected exception."""
    try:
        model = load(directory)
        with torch.no_grad():
            logits = model(torch.zeros(1, 3, dtype=torch.int64))
        return "model" if logits.shape == (1, 3, model.config.vocab) else f"logits {logits.shape}"
    except UserError as error:
        one_line = str(directory) in str(error) and "\n" not in str(error)
        return "refused" if one_line else repr(error)
    except Exception as error:
        return repr(error)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_random_damage(micro, name):
    """After each of a thousand mutations of config or header: a model that runs, or a UserError; nothing else."""
    rng, path = random.Random(11), micro / name
    data = path.read_bytes()
    head = 8 + int.from_bytes(data[:8], "little") if name == "model.safetensors" else len(data)
    outcomes = {}
    with at_most(60):
        for _ in range(1000):
            damaged = mutated(rng, data[:head], b'0129-+.eE"[{}],: \0\xff\ntfn')
            if (
                name == "model.safetensors" and rng.random() < 0.7
            ):  # keep the header length right, so that the JSON is parsed
                damaged = (len(damaged) - 8).to_bytes(8, "little") + damaged[8:]
            path.write_bytes(damaged + data[head:])
            outcomes.setdefault(outcome(micro), []).append(damaged)
    escaped = {key: len(found) for key, found in outcomes.items() if key not in ("model", "refused")}
    assert not escaped
    assert len(outcomes["refused"]) > 200
    assert len(outcomes["model"]) > (20 if name == "config.json" else 0)


def test_golden_directories_load():
    """The fixtures of other tests, which transformers 5 wrote."""
    golden = Path(__file__).parents[1] / "golden" / "hf"
    for name, parallel in (("neox_h64", True), ("neox_micro", False)):
        model, arrays = load(golden / name), np.load(golden / name / "golden.npz", allow_pickle=False)
        assert model.config.parallel == parallel
        with torch.no_grad():
            logits = model(torch.from_numpy(arrays["input_ids"]))
        assert (logits - torch.from_numpy(arrays["logits_f32"])).abs().max() < 1e-4
