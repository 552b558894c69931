"""The table of sizes against the published numbers."""

import pytest
import torch

from checkpoints.published import repository
from corpus.tokenizer import byte_tokenizer
from kernels.attention import CHUNKS
from model import SIZES, SUITE, Pythia
from model.pythia import init_std
from model.sizes import parse_steps
from runtime.errors import UserError

PUBLISHED = {  # all parameters and those without embeddings, from the model cards; tensors of a Hugging Face file
    "14m": (14_067_712, 1_189_888, 76),
    "31m": (30_494_720, 4_739_072, 76),
    "70m": (70_426_624, 18_915_328, 76),
    "160m": (162_322_944, 85_056_000, 148),
    "410m": (405_334_016, 302_311_424, 292),
    "1b": (1_011_781_632, 805_736_448, 196),
    "1.4b": (1_414_647_808, 1_208_602_624, 292),
    "2.8b": (2_775_208_960, 2_517_652_480, 388),
    "6.9b": (6_857_302_016, 6_444_163_072, 388),
    "12b": (11_846_072_320, 11_327_027_200, 436),
}
STD = {  # small_init and wang_init to six digits; GPT-NeoX defaults for the last two
    "14m": (0.055902, 0.029463),
    "31m": (0.039528, 0.020833),
    "70m": (0.027951, 0.014731),
    "160m": (0.022822, 0.006014),
    "410m": (0.019764, 0.002604),
    "1b": (0.013975, 0.002762),
    "1.4b": (0.013975, 0.001841),
    "2.8b": (0.012500, 0.001235),
    "6.9b": (0.02, 0.0025),
    "12b": (0.02, 0.002357),
}
ROTARY = {
    "14m": 8,
    "31m": 8,
    "70m": 16,
    "160m": 16,
    "410m": 16,
    "1b": 64,
    "1.4b": 32,
    "2.8b": 20,
    "6.9b": 32,
    "12b": 32,
}
PEAK_LR = dict(zip(SUITE, (1e-3, 1e-3, 1e-3, 6e-4, 3e-4, 2.5e-4, 2e-4, 1.6e-4, 1.2e-4, 1.2e-4)))


def test_the_suite_is_complete():
    assert list(SUITE) == list(PUBLISHED)
    assert [SIZES[name].vocab for name in ("2.8b", "6.9b", "12b")] == [50_304, 50_432, 50_688]
    assert [name for name, config in SUITE.items() if config.precision == "bf16"] == ["1b"]


@pytest.mark.parametrize("name", SUITE)
def test_published_numbers(name):
    config = SIZES[name]
    with torch.device("meta"):  # nothing is allocated
        model = Pythia(config)
    counts = sum(p.numel() for p in model.parameters())
    assert (counts, config.non_embedding_parameters, len(list(model.parameters()))) == PUBLISHED[name]
    assert config.parameters == counts
    assert config.rotary_dim == ROTARY[name]
    assert config.lr == PEAK_LR[name]
    assert round(init_std(config, "blocks.0.qkv.weight"), 6) == STD[name][0]
    assert round(init_std(config, "blocks.0.mlp_out.weight"), 6) == STD[name][1]


def test_nano_is_none_of_the_suite():
    assert list(SIZES) == [*SUITE, "nano"]
    nano = SIZES["nano"]
    assert sum(p.numel() for p in Pythia(nano).parameters()) == nano.parameters < 1_000_000
    assert nano.vocab >= byte_tokenizer().get_vocab_size()
    assert nano.head_dim in CHUNKS
    with pytest.raises(UserError, match="there is no pythia-nano"):
        repository("nano")


def test_flops_of_an_a100_run():
    """Pythia 1b: 4,830 A100-hours for 299.9e9 tokens are 35% of 312 TFLOP/s in this convention."""
    rate = 299_892_736_000 / (4830 * 3600)
    assert abs(rate * SIZES["1b"].flops_per_token() / 312e12 - 0.345) < 0.005
    config = SIZES["160m"]
    half = config.flops_per_token() - config.flops_per_token(causal=True)
    assert half == 6 * config.layers * config.hidden * config.seq_len


@pytest.mark.parametrize(
    ("text", "steps"),
    [
        ("0", {0}),
        ("0,512,1000:143000:10000", {0, 512, *range(1000, 143_000, 10_000)}),
        ("1000:5000:500", {1000, 1500, 2000, 2500, 3000, 3500, 4000, 4500, 5000}),
        ("3:3:7, 3", {3}),
        ("0:143000:1", set(range(143_001))),
    ],
)
def test_lists_of_steps(text, steps):
    assert parse_steps(text, 143_000) == steps


@pytest.mark.parametrize("part", ["", "x", "-1", "1:5", "1:5:0", "5:1:1", "1:2:3:4", "1.5", "١", "1:5:-1", "9" * 13])
def test_lists_that_are_not_steps(part):
    for text in (part, f"1,{part}"):
        with pytest.raises(ValueError, match=f"'{part}' is neither a step nor FIRST:LAST:EVERY"):
            parse_steps(text, 143_000)


@pytest.mark.parametrize("part", ["61", "0:61:5", "0:999999999999:1"])
def test_lists_of_steps_past_the_end(part):
    with pytest.raises(ValueError, match=f"'{part}' lies past step 60"):
        parse_steps(f"1,{part}", 60)
