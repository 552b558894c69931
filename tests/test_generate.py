"""Generation: greedy tokens against transformers, samples against the softmax, the command with good and bad input."""

import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from tokenizers import Tokenizer

import generate
from corpus.tokenizer import byte_tokenizer, tokenizer_errors
from model import SIZES, Pythia
from model.huggingface import load, save
from runtime.errors import run_command

ROOT = Path(__file__).parents[1]
GOLDEN = ROOT / "tests" / "golden" / "hf"
TINY = replace(SIZES["14m"], vocab=384, layers=2)


@pytest.fixture(autouse=True)
def _one_thread():
    """Small models are faster with one thread, above all on a busy machine."""
    torch.set_num_threads(1)


def random_model(config, seed=0):
    """A random model with logits so far apart that rounding does not decide the argmax, which varies with the input."""
    model = Pythia(config, seed)
    with torch.no_grad():
        for p in (model.embed, model.unembed):
            p.mul_(8)
    return model


@pytest.fixture(scope="module")
def tiny():
    return random_model(TINY)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """A saved model with the vocabulary of the byte tokenizer, and the tokenizer."""
    folder = tmp_path_factory.mktemp("generate")
    byte_tokenizer().save(str(folder / "tokenizer.json"))
    vocab = byte_tokenizer().get_vocab_size()
    save(random_model(replace(TINY, vocab=vocab, seq_len=64)), folder / "model", tokenizer=folder / "tokenizer.json")
    return folder / "model"


def greedy(model, prompt, tokens):
    return list(generate.generate(model, prompt, tokens, temperature=0))


def draw(logits, temperature, top_k, times):
    generator = torch.Generator().manual_seed(7)
    draws = torch.stack([generate.sample(logits, temperature, top_k, generator) for _ in range(times)])
    return torch.bincount(draws, minlength=len(logits)).double()


def deviations(counts, probabilities):
    """Standard deviations between the chi-square statistic of the counts and its mean under these probabilities."""
    expected = probabilities * counts.sum()
    assert (counts[expected == 0] == 0).all()
    counts, expected = counts[expected > 0], expected[expected > 0]
    statistic, freedom = ((counts - expected) ** 2 / expected).sum().item(), len(counts) - 1
    return abs(statistic - freedom) / math.sqrt(2 * freedom)


# Greedy


@pytest.mark.parametrize("name", ["neox_h64", "neox_micro"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_golden_greedy(name, dtype):
    golden = np.load(GOLDEN / name / "golden.npz", allow_pickle=False)
    model = load(GOLDEN / name, dtype)
    assert golden["prompt"].shape == (2, 8)
    assert golden["greedy"].shape == (2, 16)
    assert not (golden["greedy"] == generate.END_OF_TEXT).any()
    for prompt, expected in zip(golden["prompt"].tolist(), golden["greedy"].tolist()):
        assert greedy(model, prompt, 16) == expected


def test_greedy_as_transformers(tmp_path, tiny):
    save(tiny, tmp_path, torch.float32, hidden_act="gelu_pytorch_tanh")
    theirs = transformers.GPTNeoXForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    found = []
    for prompt in ([1], [5, 383, 17], list(range(1, 60))):
        out = theirs.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
            do_sample=False,
            max_new_tokens=40,
            pad_token_id=0,
        )[0, len(prompt) :].tolist()
        found += ours if (ours := greedy(tiny, prompt, 40)) else []
        assert ours == [token for token in out if token != 0]  # transformers includes a final id 0
    assert len(set(found)) > 20  # more than one repeated token


@pytest.mark.parametrize("parallel", [True, False])
def test_cached_generation_is_the_argmax_of_full_passes(parallel):
    model = random_model(replace(TINY, parallel=parallel), seed=2).double()
    ids = prompt = [9, 8, 7]
    for _ in range(25):
        with torch.no_grad():
            ids = [*ids, model(torch.tensor([ids]))[0, -1].argmax().item()]
    assert len(set(ids)) > 8
    assert 0 not in ids
    assert greedy(model, prompt, 25) == ids[3:]


def test_top_k_of_one_is_greedy(tiny):
    assert list(generate.generate(tiny, [3, 4], 30, temperature=5.0, top_k=1)) == greedy(tiny, [3, 4], 30)


def test_generation_in_half_precision(tiny):
    """A model in training computes in bfloat16 with float32 weights; a stored one may be float16 throughout."""
    model = Pythia(TINY)
    model.load_state_dict(tiny.state_dict())
    model.compute_dtype = torch.bfloat16
    assert len(greedy(model, [1, 2], 5)) == 5
    assert len(greedy(model.half(), [1, 2], 5)) == 5


def test_a_model_can_be_trained_after_it_has_generated():
    """Autograd must not meet tensors that inference mode cached. No other test uses this shape."""
    model = Pythia(replace(TINY, seq_len=77, rotary_base=777.0))
    tokens = torch.randint(1, 384, (2, 20), generator=torch.Generator().manual_seed(0))
    greedy(model, [1, 2, 3], 4)
    model(tokens[:, :-1], tokens[:, 1:]).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


# Sampling


def test_seeds(tiny):
    def text(seed, **options):
        return list(generate.generate(tiny, [1, 2, 3], 30, seed=seed, **options))

    assert text(1) == text(1)
    assert text(1) != text(2)
    assert text(1, top_k=5) == text(1, top_k=5)
    assert len({tuple(text(seed)) for seed in range(5)}) == 5


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("top_k", [0, 3, 12, 100])
def test_samples_follow_the_softmax(temperature, top_k):
    logits = torch.linspace(2, -2, 12)[torch.randperm(12, generator=torch.Generator().manual_seed(1))]
    exact = (logits.double() / temperature).exp()
    if 0 < top_k < 12:
        exact[logits.argsort(descending=True)[top_k:]] = 0
    exact /= exact.sum()
    counts = draw(logits, temperature, top_k, 4000)
    assert deviations(counts, exact) < 4
    assert deviations(counts, exact**2 / (exact**2).sum()) > 20  # half the temperature would be rejected


def test_generated_tokens_follow_the_model(tiny):
    """The first token for many seeds, sampled among the eight most likely ids."""
    with torch.no_grad():
        logits = tiny(torch.tensor([[5, 6, 7]]))[0, -1].double()
    exact = torch.zeros_like(logits)
    likeliest = logits.topk(8).indices
    assert 0 not in likeliest
    exact[likeliest] = (logits[likeliest] / 3).softmax(0)
    tokens = [next(generate.generate(tiny, [5, 6, 7], 1, temperature=3, top_k=8, seed=seed)) for seed in range(500)]
    counts = torch.bincount(torch.tensor(tokens), minlength=384).double()
    assert deviations(counts, exact) < 4
    assert deviations(counts, (exact > 0) / 8) > 10


def test_generation_ends_at_the_end_of_text(tiny, monkeypatch):
    planned = iter([7, 8, 0, 9])
    monkeypatch.setattr(generate, "sample", lambda *_: torch.tensor(next(planned)))
    assert list(generate.generate(tiny, [1], 10)) == [7, 8]
    assert next(planned) == 9
    monkeypatch.undo()
    certain = Pythia(TINY)
    with torch.no_grad():
        certain.final_norm.weight.zero_()
        certain.final_norm.bias.fill_(1)
        certain.unembed.zero_()
        certain.unembed[0] = 1
    assert greedy(certain, [1, 2], 10) == []
    assert len(greedy(tiny, [1], 10)) == 10


def test_an_end_of_text_in_the_prompt_does_not_end_generation(tiny):
    assert len(greedy(tiny, [0], 5)) == 5


def test_beyond_the_trained_length():
    """Positions continue: the text is that of a model with the same weights and a larger seq_len."""
    short, long = random_model(replace(TINY, seq_len=16), seed=3), random_model(replace(TINY, seq_len=128), seed=3)
    prompt = [i % 300 + 1 for i in range(40)]
    assert greedy(short, prompt, 30) == greedy(long, prompt, 30)
    assert len(set(greedy(short, prompt, 30))) > 5


# The command


def command(*arguments, **options):
    line = [sys.executable, ROOT / "generate.py", *arguments]
    return subprocess.run(line, capture_output=True, cwd=ROOT, check=False, **options)


@pytest.fixture
def in_process(monkeypatch, capfd):
    """in_process(*arguments) -> (status, out, err) of the command, in this process, which is faster than a new one."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["generate.py", *map(str, arguments)])
        status = 0
        try:
            run_command(generate.main)
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else 1
            if isinstance(end.code, str):
                print(end.code, file=sys.stderr)
        out, err = capfd.readouterr()
        return status, out, err

    return run


def refused(result, *words):
    status, out, err = result
    assert status == 1
    assert out == ""
    assert err.startswith("error: ")
    assert len(err.splitlines()) == 1
    for word in words:
        assert str(word) in err


PROMPT = "def é 日本 😀:\n"


def test_command(directory, in_process):
    """A separate process prints the prompt and then the text of the generated ids, byte for byte."""
    arguments = ["--checkpoint", str(directory), "--prompt", PROMPT, "--tokens", "20", "--seed", "5"]
    done = command(*arguments, env={**os.environ, "PYTHONIOENCODING": "utf-8"})
    assert done.returncode == 0, done.stderr
    assert done.stderr == b""
    tokenizer = byte_tokenizer()
    ids = list(generate.generate(load(directory), tokenizer.encode(PROMPT).ids, 20, temperature=0.8, seed=5))
    assert len(ids) > 5
    text = done.stdout.decode()
    assert text.startswith(PROMPT)
    assert text.endswith("\n")
    continuation, whole = text[len(PROMPT) : -1], tokenizer.decode(ids)
    assert whole.startswith(continuation)
    assert len(whole) - len(continuation) <= 3  # an unfinished character is not printed
    assert in_process(*arguments) == (0, text, "")


def test_command_that_fails(tmp_path):
    done = command("--checkpoint", tmp_path, "--prompt", "x", text=True)
    refused((done.returncode, done.stdout, done.stderr), tmp_path, "config.json")


def test_greedy_command(directory, in_process):
    arguments = ("--checkpoint", directory, "--prompt", "abc", "--temperature", 0, "--tokens", 9)
    status, out, err = in_process(*arguments)
    assert (status, err) == (0, "")
    whole = byte_tokenizer().decode(greedy(load(directory), byte_tokenizer().encode("abc").ids, 9))
    assert ("abc" + whole).startswith(out[:-1])
    assert in_process(*arguments, "--seed", 9) == (status, out, err)
    assert in_process(*arguments[:-4], "--temperature", 9, "--top-k", 1, "--tokens", 9) == (status, out, err)


def test_any_bytes_can_be_printed(directory, in_process):
    """An untrained model generates bytes that are not UTF-8; the command prints text nevertheless."""
    for seed in range(12):
        status, out, err = in_process("--checkpoint", directory, "--prompt", "é", "--temperature", 3, "--seed", seed)
        assert status == 0
        assert out.startswith("é")
        assert out.endswith("\n")
        assert err == ("" if seed is None else err)
        assert "Traceback" not in err


def test_ids_unknown_to_the_tokenizer(directory, tmp_path, in_process):
    """Pythia's vocabulary is padded: the model may generate an id that has no text."""
    padded = random_model(replace(TINY, vocab=1000))
    save(padded, tmp_path / "padded", tokenizer=directory / "tokenizer.json")
    status, out, err = in_process("--checkpoint", tmp_path / "padded", "--prompt", "a b", "--tokens", 60)
    assert (status, err) == (0, "")
    assert out.startswith("a b")
    assert max(generate.generate(padded, byte_tokenizer().encode("a b").ids, 60, 0.8)) > 300


def test_long_prompt_comes_with_a_note(directory, in_process):
    prompt = "x" * 100  # trained on 64 tokens
    status, out, err = in_process("--checkpoint", directory, "--prompt", prompt, "--tokens", 5)
    assert status == 0
    assert out.startswith(prompt)
    assert err.startswith("note: ")
    assert "64 tokens" in err
    assert len(err.splitlines()) == 1
    assert in_process("--checkpoint", directory, "--prompt", "x" * 59, "--tokens", 5)[2] == ""


def test_empty_prompt_starts_a_document(directory, in_process):
    status, out, err = in_process("--checkpoint", directory, "--prompt", "", "--tokens", 12, "--temperature", 0)
    assert (status, err) == (0, "")
    whole = byte_tokenizer().decode(greedy(load(directory), [0], 12))
    assert whole.startswith(out[:-1])
    assert len(out) > 1


def test_other_tokenizer(directory, tmp_path, in_process):
    byte_tokenizer().save(str(tmp_path / "mine.json"))
    alone = tmp_path / "alone"
    save(load(directory), alone)
    refused(in_process("--checkpoint", alone, "--prompt", "x"), alone / "tokenizer.json", "--tokenizer")
    given = ("--prompt", "x", "--tokens", 9, "--tokenizer", tmp_path / "mine.json")
    assert in_process("--checkpoint", alone, *given)[:2] == in_process("--checkpoint", directory, *given)[:2]
    refused(in_process("--checkpoint", alone, "--prompt", "x", "--tokenizer", tmp_path / "no.json"), "no.json")
    save(random_model(replace(TINY, vocab=50)), tmp_path / "small", tokenizer=tmp_path / "mine.json")
    refused(in_process("--checkpoint", tmp_path / "small", "--prompt", "z"), "tokenizer.json", "50")


@pytest.mark.parametrize(
    "data", [b"", b"{}", b"[]", b"nonsense", b"\xff\xfe", b'{"model": {"type": "BPE"}}', b"\0" * 50]
)
def test_unreadable_tokenizer(directory, tmp_path, in_process, data):
    path = tmp_path / "tokenizer.json"
    path.write_bytes(data)
    refused(in_process("--checkpoint", directory, "--prompt", "x", "--tokenizer", path), path)


def _change(**changes):
    return lambda spec: spec | changes


def _processor(**special_tokens):
    sequence = [{"SpecialToken": {"id": "[X]", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    return {"type": "TemplateProcessing", "single": sequence, "pair": [], "special_tokens": special_tokens}


# Where they fail: P stands for a panic of the Rust code, which is no Exception in Python.
BROKEN_TOKENIZERS = {
    "load": _change(pre_tokenizer={"type": "Metaspace", "replacement": "", "prepend_scheme": "always", "split": True}),
    "load P": _change(normalizer={"type": "Precompiled", "precompiled_charsmap": "AAAA"}),
    "load P, merges": _change(
        model={"type": "BPE", "vocab": {"a": 0, "b": 1}, "merges": ["a b"], "continuing_subword_prefix": "####"}
    ),
    "encode": _change(model={"type": "WordLevel", "vocab": {"a": 1}, "unk_token": "[UNK]"}),
    "encode P": _change(normalizer={"type": "Replace", "pattern": {"Regex": ""}, "content": "zz"}),
    "encode P, length": _change(pre_tokenizer={"type": "FixedLength", "length": 0}),
    "encode P, template": _change(post_processor=_processor()),
    "decode P": _change(decoder={"type": "Strip", "content": "h", "start": 1000, "stop": 1000}),
}


@pytest.mark.parametrize("name", BROKEN_TOKENIZERS)
def test_broken_tokenizer(directory, tmp_path, in_process, monkeypatch, name):
    """One line, and no report of Rust. (If it fails while it decodes, the prompt has been printed.)"""
    monkeypatch.setattr(generate, "generate", lambda *_: iter(byte_tokenizer().encode("h").ids))
    spec = BROKEN_TOKENIZERS[name](json.loads(byte_tokenizer().to_str()))
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(spec))
    given = ("--prompt", "hello world", "--tokens", 9, "--tokenizer", path)
    status, out, err = in_process("--checkpoint", directory, *given)
    assert out == ("hello world" if "decode" in name else "")
    refused((status, "", err), path, "not a tokenizer.json that works")


def test_a_panic_is_no_exception():
    """Otherwise `except Exception` would do."""
    with pytest.raises(BaseException) as caught:
        Tokenizer.from_str(json.dumps(BROKEN_TOKENIZERS["load P"](json.loads(byte_tokenizer().to_str()))))
    assert not isinstance(caught.value, Exception)
    assert type(caught.value).__name__ == "PanicException"


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, GeneratorExit])
def test_an_interrupt_is_not_an_error_of_the_tokenizer(error, capfd):
    with pytest.raises(error), tokenizer_errors("x"):
        raise error
    os.write(2, b"stderr is back")
    assert capfd.readouterr().err == "stderr is back"


def test_a_tokenizer_that_would_cut_or_pad(directory, tmp_path, in_process):
    """Its settings for batches of training do not change the prompt."""
    spec = json.loads(byte_tokenizer().to_str())
    spec["truncation"] = {"direction": "Right", "max_length": 1, "strategy": "LongestFirst", "stride": 5}
    spec["padding"] = {"strategy": {"Fixed": 500}, "direction": "Right", "pad_to_multiple_of": None}
    spec["padding"] |= {"pad_id": 0, "pad_type_id": 0, "pad_token": "<|endoftext|>"}
    (tmp_path / "cuts.json").write_text(json.dumps(spec))
    given = ("--checkpoint", directory, "--prompt", "hello world", "--tokens", 9)
    expected = in_process(*given)
    assert expected[0] == 0
    assert in_process(*given, "--tokenizer", tmp_path / "cuts.json") == expected


@pytest.mark.parametrize("kind", ["fifo", "/dev/zero", "sparse", "loop"])
def test_tokenizer_that_is_no_plain_file(directory, tmp_path, in_process, kind):
    path = tmp_path / "tokenizer.json"
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "sparse":
        with path.open("wb") as file:
            file.truncate(2**42)
    else:
        path.symlink_to(path if kind == "loop" else kind)
    refused(in_process("--checkpoint", directory, "--prompt", "x", "--tokenizer", path), path)


def test_weights_that_give_no_numbers(directory, tmp_path, in_process):
    """Every weight is finite, the logits are not."""
    model = load(directory)
    with torch.no_grad():
        model.unembed.fill_(3e38)
    save(model, tmp_path / "bad", torch.float32, tokenizer=directory / "tokenizer.json")
    status, out, err = in_process("--checkpoint", tmp_path / "bad", "--prompt", "x", "--tokens", 9)
    assert out == "x"
    refused((status, "", err), tmp_path / "bad", "not finite")


def test_a_terminal_gets_no_control_characters(directory, monkeypatch, in_process):
    """A model can generate any byte. A pipe gets the text as it is."""
    planned = byte_tokenizer().encode("\x1b[2Jé\n\t.").ids
    monkeypatch.setattr(generate, "generate", lambda *_: iter(planned))
    given = ("--checkpoint", directory, "--prompt", "a\x07", "--tokens", 9)
    assert in_process(*given) == (0, "a\x07\x1b[2Jé\n\t.\n", "")
    monkeypatch.setattr(type(sys.stdout), "isatty", lambda _: True)
    assert in_process(*given) == (0, "a\\x07\\x1b[2Jé\n\t.\n", "")


def test_tokenizer_that_is_a_directory(directory, tmp_path, in_process):
    refused(in_process("--checkpoint", directory, "--prompt", "x", "--tokenizer", tmp_path), tmp_path)


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("--tokens", "-1"),
        ("--tokens", "0"),
        ("--tokens", "x"),
        ("--tokens", "1.5"),
        ("--top-k", "-1"),
        ("--top-k", "2.5"),
        ("--temperature", "-0.5"),
        ("--temperature", "hot"),
        ("--temperature", "nan"),
        ("--temperature", "-inf"),
        ("--seed", "x"),
        ("--seed", str(2**70)),
        ("--seed", str(-(2**70))),
        ("--unknown", "1"),
        ("--checkpoint", ""),
    ],
)
def test_bad_argument(directory, in_process, flag, value):
    refused(in_process("--checkpoint", directory, "--prompt", "x", flag, value))


@pytest.mark.parametrize("temperature", ["1e-30", "1e-45", "1e-300", "1e30", "inf"])
@pytest.mark.parametrize("top_k", ["0", "3"])
def test_extreme_temperature(directory, in_process, temperature, top_k):
    """Near zero the command is greedy, at infinity it samples uniformly. Neither ends in a traceback."""
    line = ("--checkpoint", directory, "--prompt", "x", "--tokens", 9, "--top-k", top_k)
    result = in_process(*line, "--temperature", temperature)
    if temperature in ("1e30", "inf") and result[0]:
        return refused(result, "temperature")
    assert result[0] == 0
    if temperature.startswith("1e-"):
        assert result == in_process(*line, "--temperature", 0)


def test_missing_argument(in_process):
    refused(in_process("--prompt", "x"), "--checkpoint")
    refused(in_process("--checkpoint", "x"), "--prompt")


def test_wrong_directory(directory, tmp_path, in_process):
    refused(in_process("--checkpoint", tmp_path / "nowhere", "--prompt", "x"), tmp_path / "nowhere")
    refused(in_process("--checkpoint", directory.parent, "--prompt", "x"), "config.json")
    refused(in_process("--checkpoint", directory / "config.json", "--prompt", "x"), "config.json")


def test_prompt_that_is_not_text(directory, in_process):
    """Command-line bytes that are not UTF-8 reach Python as lone surrogates."""
    refused(in_process("--checkpoint", directory, "--prompt", os.fsdecode(b"caf\xe9")), "prompt")
