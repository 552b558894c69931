"""Text -> tokens, compared with the tokenizer applied to each whole document; bad input; the demo corpus."""

import gzip
import io
import json
import os
import re
import signal
import struct
import subprocess
import sys
import sysconfig
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from megatron import REPO, assert_refused, run_data, write_data
from test_tokenizer import ODD
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from tqdm import tqdm

import data
from corpus import documents, prepare
from corpus.indexed import IndexedTokens
from corpus.tokenizer import PLACES, byte_tokenizer, cut_pattern
from runtime.errors import UserError
from runtime.run_directory import lock

zstandard = pytest.importorskip("zstandard", reason="packed input needs zstandard")


def random_text(rng, length):
    alphabet = [
        *"ab.!'  \n\n\t12é文。、",
        "か\u3099",
        "e\u0301",
        "\u0301",
        "日",
        "\u00a0",
        "\x1c",
        "😀",
        "'ll",
        "      ",
        "\r\n",
        "<|endoftext|>",
    ]
    return "".join(alphabet[i] for i in rng.integers(0, len(alphabet), length))


def documents_of(prefix):
    """Read the documents of a data set by the description of the format. Returns lists of tokens, and the dtype."""
    raw = Path(f"{prefix}.idx").read_bytes()
    magic, version, code, n, m = struct.unpack_from("<9sQBQQ", raw)
    assert (magic, version, m, len(raw)) == (b"MMIDIDX\0\0", 1, n + 1, 34 + 12 * n + 8 * m)
    dtype = {8: "<u2", 4: "<i4"}[code]
    sizes = np.frombuffer(raw, "<i4", n, 34)
    pointers = np.frombuffer(raw, "<i8", n, 34 + 4 * n)
    assert np.frombuffer(raw, "<i8", m, 34 + 12 * n).tolist() == list(range(n + 1))
    tokens = np.fromfile(f"{prefix}.bin", dtype)
    width = np.dtype(dtype).itemsize
    assert pointers.tolist() == [int(sum(sizes[:i].tolist())) * width for i in range(n)]
    assert len(tokens) == sizes.sum()
    return [tokens[p // width : p // width + size].tolist() for p, size in zip(pointers, sizes)], dtype


def write_inputs(directory, texts):
    """Write the documents as one .jsonl, as .jsonl.zst and .ndjson.gz with two frames, and as one text file each."""
    lines = [json.dumps({"id": 1, "text": text}, ensure_ascii=i % 2 == 0) + "\n" for i, text in enumerate(texts)]
    (directory / "all.jsonl").write_bytes("".join(lines).encode())
    raw = "".join(lines).encode()
    frames = [zstandard.ZstdCompressor().compress(part) for part in (raw[: len(raw) // 3], raw[len(raw) // 3 :])]
    (directory / "all.jsonl.zst").write_bytes(b"".join(frames))
    members = [gzip.compress(part) for part in (raw[: len(raw) // 3], raw[len(raw) // 3 :])]
    (directory / "all.ndjson.gz").write_bytes(b"".join(members))
    files = []
    for i, text in enumerate(texts):
        files.append(directory / f"{i:04d}.txt")
        files[-1].write_bytes(text.encode())
    return {"jsonl": [directory / "all.jsonl"], "zst": [directory / "all.jsonl.zst"], "txt": files} | {
        "gz": [directory / "all.ndjson.gz"]
    }


def small_pieces(monkeypatch, chunk, group):
    monkeypatch.setattr(documents, "CHUNK", chunk)
    monkeypatch.setattr(documents, "PACKED_CHUNK", chunk)
    monkeypatch.setattr(documents, "GROUP", group)
    monkeypatch.setattr(documents, "PIECE", 0)
    monkeypatch.setattr(prepare, "INDEX_BLOCK", 3)


@pytest.fixture(scope="module")
def merging_tokenizer(tmp_path_factory):
    """A byte-level BPE with merges learned from the odd texts, and added tokens for runs of spaces, like Pythia's."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer, tokenizer.decoder = normalizers.NFC(), decoders.ByteLevel()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    rng = np.random.default_rng(0)
    texts = ODD + [random_text(rng, 400) for _ in range(20)]
    special = ["<|endoftext|>", "<|padding|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=700, special_tokens=special, initial_alphabet=alphabet, show_progress=False, min_frequency=2
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_tokens([AddedToken(" " * n, normalized=True) for n in range(24, 1, -1)])
    assert tokenizer.get_vocab_size() > 400
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    tokenizer.save(str(path))
    return path


# --- The tokenizer --------------------------------------------------------------------------------------------------


def test_pythia_tokenizer(tmp_path, monkeypatch):
    """Against 20B_tokenizer.json of EleutherAI/pythia (too large for this repository): the ids of the byte tokenizer
    are its ids, and documents that are cut into small pieces have its tokens."""
    found = [REPO / "20B_tokenizer.json", *REPO.parent.glob("*/data/20B_tokenizer.json")]
    path = next((path for path in found if path.exists()), None)
    if not path:
        pytest.skip("no 20B_tokenizer.json here")
    pythia, ours = Tokenizer.from_file(str(path)), byte_tokenizer()
    for id in range(245):
        assert pythia.id_to_token(id) == ours.id_to_token(id)

    small_pieces(monkeypatch, 16, 100)
    rng = np.random.default_rng(9)
    texts = [
        *ODD,
        *(random_text(rng, 500) for _ in range(20)),
        Path(prepare.__file__).read_text(),
        Path(__file__).read_text(),
    ]
    prepare.prepare(write_inputs(tmp_path, texts)["jsonl"], tmp_path / "out", path)
    assert documents_of(tmp_path / "out") == ([[*pythia.encode(text).ids, 0] for text in texts], "<u2")


# --- Cutting --------------------------------------------------------------------------------------------------------


def test_where_pieces_are_cut():
    def cut(*chunks):
        return list(documents.pieces(Path("a.txt"), chunks, re.compile(f".*(?:{'|'.join(PLACES)})", re.DOTALL)))

    assert cut("one two", " three") == [("one", False), (" two three", True)]
    assert cut("a\nb", "c d", "e") == [("a", False), ("\nbc", False), (" de", True)]
    assert cut("ab", "cd") == [("abcd", True)]
    assert cut("a  \n ", "b") == [("a", False), ("  \n b", True)]
    assert cut("a\x1c b", "c") == [("a\x1c bc", True)]  # U+001C is white space in Python, but not in the tokenizer
    assert cut("one two") == [("one two", True)]
    assert cut() == cut("") == cut("", "") == []
    assert cut("ab12", "c") == [("ab", False), ("12c", True)]
    assert cut("12ab", "c") == [("12", False), ("abc", True)]
    assert cut("文章。", "c") == [("文章", False), ("。c", True)]
    assert cut("ab,cd", "!。") == [("ab,cd!。", True)]
    assert list(documents.pieces(Path("a.txt"), ("one two", " three"), None)) == [("one two three", True)]


@pytest.mark.parametrize("source", ["jsonl", "zst", "gz", "txt"])
@pytest.mark.parametrize("chunk", [1, 2, 7, 64, 1 << 17])
def test_tokens_are_those_of_whole_documents(tmp_path, monkeypatch, merging_tokenizer, source, chunk):
    rng = np.random.default_rng(chunk)
    texts = [*ODD, "", *(random_text(rng, int(rng.integers(1, 400))) for _ in range(25)), ""]
    if source == "txt":  # a text file with NUL bytes is refused
        texts = [text.replace("\0", "") for text in texts]
    inputs = write_inputs(tmp_path, texts)[source]
    for tokenizer, path in ((byte_tokenizer(), None), (Tokenizer.from_file(str(merging_tokenizer)), merging_tokenizer)):
        small_pieces(monkeypatch, chunk, group=int(rng.integers(1, 300)))
        out = tmp_path / ("bytes" if path is None else "merges")
        result = prepare.prepare(inputs, out, path)
        found, dtype = documents_of(out)
        assert found == [[*tokenizer.encode(text).ids, 0] for text in texts if text]
        assert dtype == "<u2"
        assert (result.documents, result.tokens) == (len(found), sum(map(len, found)))
        assert Tokenizer.from_file(f"{out}.tokenizer.json").to_str() == tokenizer.to_str()


def test_documents_are_cut_in_that_test(monkeypatch, merging_tokenizer):
    """The test above has many pieces, and cuts at other places change the tokens."""
    small_pieces(monkeypatch, 7, 100)
    text = ODD[0] * 20
    tokenizer = Tokenizer.from_file(str(merging_tokenizer))
    cut = cut_pattern(tokenizer)
    cut = list(documents.pieces(Path("a"), (text[i : i + 7] for i in range(0, len(text), 7)), cut))
    assert len(cut) > 40
    assert "".join(piece for piece, _ in cut) == text
    elsewhere = [tokenizer.encode(text[i : i + 7]).ids for i in range(0, len(text), 7)]
    assert [id for ids in elsewhere for id in ids] != tokenizer.encode(text).ids


def spec(merging_tokenizer, **changes):
    return json.loads(merging_tokenizer.read_text()) | changes


def test_other_tokenizers_get_whole_documents(tmp_path, monkeypatch, merging_tokenizer):
    """A document is not cut if a cut can change its tokens. Padding, truncation and <bos> of the file are ignored."""
    bos = {"type": "TemplateProcessing", "pair": [{"Sequence": {"id": "B", "type_id": 0}}]}
    bos["single"] = [{"SpecialToken": {"id": "<|padding|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    bos["special_tokens"] = {"<|padding|>": {"id": "<|padding|>", "ids": [1], "tokens": ["<|padding|>"]}}
    padding = {"strategy": {"Fixed": 64}, "direction": "Right", "pad_to_multiple_of": None}
    padding |= {"pad_id": 1, "pad_type_id": 0, "pad_token": "<|padding|>"}
    truncation = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    prefix_space = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
    llama = {"type": "Sequence", "pretokenizers": [
        {"type": "Split", "pattern": {"Regex": r"[^\s]+\n*|\s+"}, "behavior": "Isolated", "invert": False},
        {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
    ]}  # fmt: skip
    greedy = [*spec(merging_tokenizer)["added_tokens"]]
    greedy.append(greedy[-1] | {"id": 5000, "content": "two\n three", "normalized": False})
    lstrip = [*spec(merging_tokenizer)["added_tokens"]]
    lstrip.append(lstrip[-1] | {"id": 5000, "content": "<m>", "lstrip": True})
    texts = ["one two\n three <m> four\nfive.\n\n<m>six! " * 9, " a\nb"]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    small_pieces(monkeypatch, 5, 20)
    for number, (changes, cuttable) in enumerate([
        ({"padding": padding, "truncation": truncation, "post_processor": bos}, True),
        ({"pre_tokenizer": prefix_space}, False),
        ({"pre_tokenizer": llama}, False),
        ({"pre_tokenizer": None}, False),
        ({"normalizer": {"type": "Strip", "strip_left": True, "strip_right": True}}, False),
        ({"added_tokens": greedy}, True),  # at other places
        ({"added_tokens": lstrip}, False),
    ]):  # fmt: skip
        path = tmp_path / f"{number}.json"
        path.write_text(json.dumps(spec(merging_tokenizer, **changes)))
        tokenizer = Tokenizer.from_file(str(path))
        assert (cut_pattern(tokenizer) is not None) == cuttable
        prepare.prepare([tmp_path / "in.jsonl"], tmp_path / f"{number}", path)
        tokenizer.no_padding()
        tokenizer.no_truncation()
        expected = [[*tokenizer.encode(text, add_special_tokens=False).ids, 0] for text in texts]
        assert documents_of(tmp_path / f"{number}")[0] == expected
        assert (tmp_path / f"{number}.tokenizer.json").read_bytes() == path.read_bytes()


def test_large_vocabularies_take_four_bytes(tmp_path):
    (tmp_path / "in.txt").write_text("word")
    for size, dtype in ((65499, "<u2"), (65500, "<i4")):
        tokenizer = byte_tokenizer()
        tokenizer.add_tokens([f"<{i}>" for i in range(size - 246)] + ["word"])
        tokenizer.save(str(tmp_path / "wide.json"))
        prepare.prepare([tmp_path / "in.txt"], tmp_path / f"{size}", tmp_path / "wide.json")
        assert documents_of(tmp_path / f"{size}") == ([[size - 1, 0]], dtype)


def test_memory_does_not_grow_with_the_input(tmp_path):
    """Peak memory in MB for inputs of 0.5 and 2 MB in small groups. (2 MB of encodings take 250 MB.)"""
    code = "import resource, sys; from corpus import documents, prepare; documents.GROUP = 1 << 18;"
    code += "prepare.prepare(sys.argv[1:2], sys.argv[2]);"
    code += "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)"
    line, peaks = "All work and no play makes Jack a dull boy.\n", {}
    for name, content in (
        ("words.txt", line),
        ("words.jsonl", json.dumps({"text": line}) + "\n"),
        ("letters.jsonl", json.dumps({"text": "a"}) + "\n"),
        ("long.txt", "x" * 100),
    ):
        for megabytes in (0.5, 2):
            source = tmp_path / f"{megabytes}{name}"
            source.write_text(content * int(megabytes * 1_000_000 / len(content)))
            run = [sys.executable, "-c", code, str(source), str(tmp_path / f"{megabytes}{name}.out")]
            peaks[megabytes] = int(subprocess.run(run, cwd=REPO, capture_output=True, check=True).stdout)
        assert peaks[2] < peaks[0.5] + 70, name


def test_one_long_line_takes_three_times_its_size(tmp_path):
    """Peak memory in MB: the line, its text, and the JSON between them."""
    code = "import resource, sys, numpy, tokenizers; from corpus import documents, prepare;"
    code += "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024; before = peak();"
    code += "part = documents.Part(prepare.Path(sys.argv[1])); bar = documents.tqdm(disable=True);"
    code += "[len(chunk) for text, _ in documents.documents(0, part, bar, documents.Lines()) for chunk in text];"
    code += "print(peak() - before)"
    (tmp_path / "in.jsonl").write_text(json.dumps({"text": "Some words. " * 4_000_000}))
    run = [sys.executable, "-c", code, str(tmp_path / "in.jsonl")]
    assert int(subprocess.run(run, cwd=REPO, capture_output=True, check=True).stdout) < 3 * 48


@pytest.mark.parametrize("name", ["in.jsonl", "in.jsonl.gz"])
def test_lines_that_are_too_long(tmp_path, monkeypatch, name):
    monkeypatch.setattr(documents, "LONGEST_LINE", 30)
    good, long = b'{"text": "abcdefghijklmnopqr"}', b'{"text": "abcdefghijklmnopqrs"}'
    raw = b"\n".join([good, long, long[:-1] + b"x" * 200_000 + b"}", good])
    (tmp_path / name).write_bytes(gzip.compress(raw) if name.endswith("gz") else raw)
    with pytest.raises(UserError, match=f"{name}: line 2 has more than 30 bytes; .*--skip-bad"):
        prepare.prepare([tmp_path / name], tmp_path / "out")
    prepare.prepare([tmp_path / name], tmp_path / "out", skip_bad=True)
    assert [len(document) for document in documents_of(tmp_path / "out")[0]] == [19, 19]


def test_text_that_cannot_be_cut(tmp_path, monkeypatch, merging_tokenizer):
    small_pieces(monkeypatch, 16, 100)
    monkeypatch.setattr(documents, "LONGEST_PIECE", 64)
    (tmp_path / "in.txt").write_text("x" * 1000)
    assert prepare.prepare([tmp_path / "in.txt"], tmp_path / "bytes").tokens == 1001
    with pytest.raises(UserError, match=r"in.txt: a document has more than 64 characters without a place"):
        prepare.prepare([tmp_path / "in.txt"], tmp_path / "out", merging_tokenizer)
    (tmp_path / "in.txt").write_text("x" * 30 + "1" * 30 + "文" * 30 + "。" * 30 + " x")
    prepare.prepare([tmp_path / "in.txt"], tmp_path / "out", merging_tokenizer)


# --- Commands and bad input -----------------------------------------------------------------------------------------


def test_prepare_info_view(tmp_path):
    (tmp_path / "a.txt").write_text("The first document.\n" * 20)
    (tmp_path / "b.jsonl").write_text(json.dumps({"text": "Zweites Dokument – mit Umlaut: ü. " * 20}) + "\n\n")
    line = ("prepare", "--input", "a.txt", "b.jsonl", "--out", "mine", "--workers", "1")
    run = run_data(tmp_path, *line)
    assert run.returncode == 0, run.stderr
    assert "2 documents" in run.stdout
    assert sorted(path.name for path in tmp_path.glob("*mine*")) == ["mine.bin", "mine.idx", "mine.tokenizer.json"]
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    again = run_data(tmp_path, *line)
    assert (again.returncode, again.stderr.count("\n")) == (1, 1)
    assert "exists" in again.stderr
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
    run = run_data(
        tmp_path, "view", "--data", "mine", "--seq-len", "32", "--batch-size", "4", "--steps", "2", "--step", "1"
    )
    assert run.returncode == 0, run.stderr
    assert "first document.\n" in run.stdout
    assert "mit Umlaut: ü" in run.stdout


def test_end_of_text_in_a_text(tmp_path):
    """It becomes id 0, as in GPT-NeoX: the same tokens as two documents, but one document."""
    (tmp_path / "in.jsonl").write_text(json.dumps({"text": "one<|endoftext|>two"}) + "\n")
    prepare.prepare([tmp_path / "in.jsonl"], tmp_path / "out")
    one, two = (byte_tokenizer().encode(text).ids for text in ("one", "two"))
    assert documents_of(tmp_path / "out")[0] == [[*one, 0, *two, 0]]


def line_file(number, line):
    return b'{"text": "good"}\n' * (number - 1) + line + b'\n{"text": "good"}\n'


GOOD = b'{"text": "good"}\n' * 5000
PACKED = zstandard.ZstdCompressor().compress(GOOD + os.urandom(200_000).hex().encode())
BAD_INPUT = {  # name of the file: (its bytes, what the message says)
    "no_json.jsonl": (line_file(3, b"{text"), "no_json.jsonl: line 3"),
    "no_text.jsonl": (line_file(1, b'{"body": "x"}'), "no_text.jsonl: line 1"),
    "no_string.jsonl": (line_file(2, b'{"text": 5}'), "no_string.jsonl: line 2"),
    "null.jsonl": (line_file(2, b'{"text": null}'), "null.jsonl: line 2"),
    "list.jsonl": (line_file(2, b'["text"]'), "list.jsonl: line 2"),
    "deep.jsonl": (line_file(2, b"[" * 100_000), "deep.jsonl: line 2"),
    "surrogate.jsonl": (line_file(4, b'{"text": "\\ud800"}'), "surrogate.jsonl: line 4"),
    "latin.jsonl": (line_file(4, '{"text": "ü"}'.encode("latin-1")), "latin.jsonl: line 4"),
    "late.jsonl.zst": (zstandard.ZstdCompressor().compress(GOOD + b"{"), "late.jsonl.zst: line 5001"),
    "no_zst.jsonl.zst": (GOOD, "no_zst.jsonl.zst: damaged near byte"),
    "short.jsonl.zst": (PACKED[: len(PACKED) // 2], "short.jsonl.zst: "),
    "barely.jsonl.zst": (zstandard.ZstdCompressor().compress(GOOD)[:-1], "barely.jsonl.zst: truncated"),
    "latin.txt": (b"0123456789" + "ü".encode("latin-1") + b"x", "latin.txt: byte 10 is not UTF-8"),
    "middle.txt": (("日" * 100_000).encode() + b"\xff" + b"x" * 100, "middle.txt: byte 300000 is not UTF-8"),
    "torn.txt": (b"abc" + "日".encode()[:2], "torn.txt: byte 3 is not UTF-8"),
    "surrogate.txt": (b"ab\xed\xa0\x80", "surrogate.txt: byte 2 is not UTF-8"),
    "no_gz.jsonl.gz": (GOOD, "no_gz.jsonl.gz: damaged near byte"),
    "short.jsonl.gz": (gzip.compress(GOOD)[:-9], "short.jsonl.gz: truncated"),
    "flipped.txt.gz": (gzip.compress(GOOD)[:-8] + bytes(8), "flipped.txt.gz: damaged near byte"),
    "tail.txt.gz": (gzip.compress(GOOD) + b"tail", "tail.txt.gz: damaged near byte"),
    "wide.txt": ("some text".encode("utf-16"), "wide.txt: has NUL bytes"),
    "nul": (b"abc\0", "nul: has NUL bytes"),
    "a.json": (b'{"text": "good"}', "a.json: .json files are not read; convert it to .jsonl"),
    "a.JSON": (b'{"text": "good"}', "a.JSON: .json files are not read"),
    "a.csv.gz": (gzip.compress(b"a,b\n"), "a.csv.gz: .csv files are not read"),
    "a.tar.zst": (PACKED, "a.tar.zst: .tar files are not read"),
    "a.parquet": (b"PAR1", "a.parquet: .parquet files are not read"),
    "a.gz": (gzip.compress(b"a"), "a.gz: the name does not say what is in it; rename it to .jsonl.gz or .txt.gz"),
    "empty.txt": (b"", "empty.txt: no text"),
    "empty.jsonl": (b'{"text": ""}\n', "empty.jsonl: no text"),
    "empty.jsonl.zst": (b"", "empty.jsonl.zst: no text"),
    "empty.jsonl.gz": (b"", "empty.jsonl.gz: no text"),
}


@pytest.mark.parametrize("name", BAD_INPUT)
def test_bad_input(tmp_path, name):
    raw, message = BAD_INPUT[name]
    (tmp_path / name).write_bytes(raw)
    with pytest.raises(UserError) as error:
        prepare.prepare([tmp_path / name], tmp_path / "out")
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == [name]


BOM = b"\xef\xbb\xbf"
PLAIN = {  # name of the file: its bytes; each has the document "one"
    "a.txt": b"one",
    "mark.txt": BOM + b"one",
    "a.md": b"one",
    "no_ending": b"one",
    "a.TXT.GZ": gzip.compress(b"one"),
    "a.txt.zst": zstandard.ZstdCompressor().compress(BOM + b"one"),
    "a.txt.gz": gzip.compress(b"on") + gzip.compress(b"") + gzip.compress(b"e"),
    "a.JSONL": b'{"text": "one"}',
    "mark.jsonl": BOM + b'{"text": "one"}\n',
    "mark.jsonl.gz": gzip.compress(BOM + b'{"text": "one"}\n'),
    "a.ndjson": b'{"text": "one"}\n',
    "a.Ndjson.Zst": zstandard.ZstdCompressor().compress(b'{"text": "one"}\n'),
}


@pytest.mark.parametrize("chunk", [1, 4, 1 << 17])
def test_formats(tmp_path, monkeypatch, chunk):
    small_pieces(monkeypatch, chunk, 10)
    for name, raw in PLAIN.items():
        (tmp_path / name).write_bytes(raw)
    prepare.prepare([tmp_path / name for name in PLAIN], tmp_path / "out")
    assert documents_of(tmp_path / "out")[0] == [[*byte_tokenizer().encode("one").ids, 0]] * len(PLAIN)


def test_only_the_mark_at_the_beginning_is_removed(tmp_path):
    (tmp_path / "in.txt").write_bytes(BOM + BOM + b"a" + BOM)
    prepare.prepare([tmp_path / "in.txt"], tmp_path / "out")
    assert documents_of(tmp_path / "out")[0] == [[*byte_tokenizer().encode("\ufeffa\ufeff").ids, 0]]


def test_long_lines_in_many_blocks(tmp_path):
    text = os.urandom(500_000).hex()
    (tmp_path / "in.jsonl.gz").write_bytes(gzip.compress(json.dumps({"text": text}).encode()))
    prepare.prepare([tmp_path / "in.jsonl.gz"], tmp_path / "out")
    assert documents_of(tmp_path / "out")[0] == [[*byte_tokenizer().encode(text).ids, 0]]


def test_skip_bad_and_text_key(tmp_path):
    lines = [b'{"body": "one"}', b"{", b"", b'{"text": "x"}', b'{"body": "two"}', b'{"body": 3}']
    (tmp_path / "in.jsonl").write_bytes(b"\n".join(lines))
    line = ("prepare", "--input", "in.jsonl", "--out", "out")
    assert_refused(run_data(tmp_path, *line, "--text-key", "body"), 'in.jsonl: line 2 is not {"body": "..."}')
    run = run_data(tmp_path, *line, "--text-key", "body", "--skip-bad")
    assert (run.returncode, run.stderr.count("\n")) == (0, 1)
    assert "left out 3 bad lines; in.jsonl: line 2 is not" in run.stderr
    assert documents_of(tmp_path / "out")[0] == [[*byte_tokenizer().encode(t).ids, 0] for t in ("one", "two")]
    run = run_data(tmp_path, "prepare", "--input", "in.jsonl", "--out", "none", "--text-key", "z", "--skip-bad")
    assert_refused(run, "in.jsonl: no text in there (5 bad lines; in.jsonl: line 1 is not")
    assert not list(tmp_path.glob("*none*"))


def test_stdin(tmp_path):
    (tmp_path / "a.txt").write_text("file")
    line = [sys.executable, REPO / "data.py", "prepare", "--input", "a.txt", "-", "--out", "out"]
    raw = b'{"text": "one"}\n{"text": "two"}'
    subprocess.run(line, cwd=tmp_path, input=raw, check=True, timeout=60)
    assert documents_of(tmp_path / "out")[0] == [[*byte_tokenizer().encode(t).ids, 0] for t in ("file", "one", "two")]
    closed = ["sh", "-c", 'exec "$@" <&-', "sh", *line[:-1], "closed"]
    run = subprocess.run(closed, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert_refused(run, "-: stdin is closed")


def test_unusable_paths_leave_nothing(tmp_path, monkeypatch):
    """Root ignores permissions, so two errors are raised by a replaced call."""
    monkeypatch.chdir(tmp_path)
    Path("in.txt").write_text("words")
    Path("bad.txt").write_bytes(b"\xff")
    Path("dangling.idx").symlink_to("elsewhere")
    for source, out, message in (
        ("in.txt", "in.txt/out", "in.txt is not a directory"),
        ("in.txt", "in.txt/a/out", "in.txt/a: Not a directory; nothing was written"),
        ("in.txt", "a/" + "x" * 245, "File name too long; nothing was written"),
        ("in.txt", "a/" + "x" * 300 + "/out", "File name too long; nothing was written"),
        (
            "in.txt",
            "/proc/out",
            "/proc/out.preparing cannot be written (No such file or directory): choose another --out",
        ),
        ("in.txt", "dangling", "dangling.idx exists"),
        ("bad.txt", "a/b/out", "bad.txt: byte 0"),
        ("in.txt/x", "out", "in.txt/x: no such file"),
        ("x" * 300, "out", "File name too long"),
    ):
        with pytest.raises(UserError) as error:
            prepare.prepare([source], out)
        assert message in str(error.value)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["bad.txt", "dangling.idx", "in.txt"]

    def refuse(number):
        def stat(path, **_):
            raise OSError(number, os.strerror(number), str(path))

        return stat

    for name, number, message in (
        ("stat", 13, "in.txt: Permission denied"),
        ("mkdir", 30, "a: Read-only file system; nothing was written"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(Path, name, refuse(number))
            with pytest.raises(UserError, match=message):
                prepare.prepare(["in.txt"], "a/out")
        assert sorted(path.name for path in tmp_path.iterdir()) == ["bad.txt", "dangling.idx", "in.txt"]


def test_input_that_fails_is_named(tmp_path, monkeypatch):
    """/proc/self/mem cannot be read at its beginning: an error of read, which names no file."""
    monkeypatch.chdir(tmp_path)
    Path("in.txt").symlink_to("/proc/self/mem")
    with pytest.raises(UserError, match=r"^in.txt: Input/output error; nothing was written"):
        prepare.prepare(["in.txt"], "out")
    assert [path.name for path in tmp_path.iterdir()] == ["in.txt"]


def test_tokenizer_that_fails_to_encode(tmp_path):
    tokenizer = Tokenizer(models.WordLevel({"<|endoftext|>": 0}, unk_token="<unk>"))
    tokenizer.save(str(tmp_path / "words.json"))
    (tmp_path / "in.txt").write_text("words")
    line = ("prepare", "--input", "in.txt", "--out", "out", "--tokenizer", "words.json")
    assert_refused(run_data(tmp_path, *line), "words.json: not a tokenizer.json that works")
    assert not list(tmp_path.glob("*out*"))


def test_names_are_printed_without_escapes(tmp_path):
    (tmp_path / "a\x1b.jsonl").write_text('{"text": "one"}\n{')
    run = run_data(tmp_path, "prepare", "--input", "a\x1b.jsonl", "--out", "b\x1b", "--skip-bad")
    assert run.returncode == 0
    assert "a\\x1b.jsonl: line 2" in run.stderr
    assert "b\\x1b: 1 documents" in run.stdout
    assert "\x1b" not in run.stdout + run.stderr


def test_bytes_across_chunks(tmp_path, monkeypatch):
    """The error names the right byte, wherever a chunk ends."""
    text = "é日😀" * 5
    for bad in range(len(text)):
        raw = text[:bad].encode() + b"\xff" + text[bad:].encode()
        (tmp_path / "in.txt").write_bytes(raw)
        for chunk in (1, 2, 3, 5):
            monkeypatch.setattr(documents, "CHUNK", chunk)
            with pytest.raises(UserError, match=f"byte {len(text[:bad].encode())} is not UTF-8"):
                prepare.prepare([tmp_path / "in.txt"], tmp_path / "out")


def test_prepare_refuses_in_one_line(tmp_path):
    (tmp_path / "good.txt").write_text("good")
    (tmp_path / "bad.txt").write_bytes(b"\xff")
    (tmp_path / "taken.tokenizer.json").write_text("mine")
    (tmp_path / "broken.json").write_text('{"version": "1.0"')
    (tmp_path / "other.json").write_text('{"hello": "world"}')
    (tmp_path / "directory").mkdir()
    tokenizer = Tokenizer(models.BPE(vocab={"a": 0}, merges=[]))
    tokenizer.save(str(tmp_path / "a.json"))
    before = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    for arguments, message in (
        (("good.txt", "absent.txt", "--out", "out"), "absent.txt: no such file"),
        (("good.txt", "directory", "--out", "out"), "directory is a directory"),
        (("good.txt", "bad.txt", "--out", "out"), "bad.txt: byte 0"),
        (("good.txt", "--out", "taken"), "taken.tokenizer.json exists"),
        (("good.txt", "--out", "directory/"), "give a prefix in it"),
        (("good.txt", "--out", "out", "--workers", "0"), "--workers 0"),
        (("good.txt", "--out", "out", "--tokenizer", "absent.json"), "absent.json: not a readable tokenizer"),
        (("good.txt", "--out", "out", "--tokenizer", "broken.json"), "broken.json: not a tokenizer.json that works"),
        (("good.txt", "--out", "out", "--tokenizer", "other.json"), "other.json: not a tokenizer.json that works"),
        (("good.txt", "--out", "out", "--tokenizer", "bad.txt"), "bad.txt: not a tokenizer.json that works"),
        (("good.txt", "--out", "out", "--tokenizer", "a.json"), "a.json: id 0 is 'a'"),
    ):
        assert_refused(run_data(tmp_path, "prepare", "--input", *arguments), message)
        assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == before


def test_full_disk_leaves_nothing(tmp_path):
    """A limit on the size of files fails in the same place as a full disk."""
    (tmp_path / "in.txt").write_text("words " * 50_000)
    code = "import resource, signal, sys, data; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
    code += "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000)); data.run_command(data.main)"
    line = [sys.executable, "-c", code, "prepare", "--input", str(tmp_path / "in.txt"), "--out", str(tmp_path / "out")]
    run = subprocess.run(line, cwd=REPO, capture_output=True, text=True, timeout=60)
    assert (run.returncode, run.stderr.count("\n")) == (1, 1), run.stderr
    assert "File too large; nothing was written" in run.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["in.txt"]


def test_index_that_cannot_be_flushed_leaves_nothing(tmp_path, monkeypatch):
    """The index is renamed last, so its errors must come before the first file is renamed."""
    (tmp_path / "in.txt").write_text("words")

    def full(descriptor, fsync=os.fsync):
        if ".preparing/out.idx" in str(Path(f"/proc/self/fd/{descriptor}").readlink()):
            raise OSError(28, "No space left on device")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="No space left on device; nothing was written"):
        prepare.prepare([tmp_path / "in.txt"], tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["in.txt"]


def test_only_zst_files_need_zstandard(tmp_path):
    (tmp_path / "in.jsonl").write_text('{"text": "good"}\n')
    (tmp_path / "in.jsonl.zst").write_bytes(PACKED)
    code = "import sys; sys.modules['zstandard'] = None; import data; data.run_command(data.main)"

    def run(name):
        command = [
            sys.executable,
            "-c",
            code,
            "prepare",
            "--out",
            str(tmp_path / "out"),
            "--input",
            str(tmp_path / name),
        ]
        return subprocess.run(command, cwd=REPO, capture_output=True, text=True, timeout=60)

    assert_refused(run("in.jsonl.zst"), "in.jsonl.zst: reading .zst needs the package zstandard")
    assert not list(tmp_path.glob("*out*"))
    assert "1 documents, 5 tokens" in run("in.jsonl").stdout


def stop(process, number):
    """Send a signal, and send it again as a user would: CPython sees one that arrives just before a read waits for the
    pipe only after that read. Returns what the process printed."""
    for _ in range(3):
        process.send_signal(number)
        with suppress(subprocess.TimeoutExpired):
            return process.communicate(timeout=30)
    pytest.fail("the process does not end")


@pytest.mark.parametrize(("source", "number"), [("pipe", signal.SIGINT), ("-", signal.SIGINT), ("-", signal.SIGTERM)])
def test_interrupt_leaves_nothing(tmp_path, source, number):
    """Ctrl-C or SIGTERM while `prepare` waits for more input from a pipe."""
    os.mkfifo(tmp_path / "pipe")
    line = [sys.executable, REPO / "data.py", "prepare", "--input", "pipe", "--out", "out"]
    if source == "-":
        line = ["sh", "-c", 'exec "$@" < pipe', "sh", *line[:-3], "-", *line[-2:]]
    run = subprocess.Popen(line, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    with open(tmp_path / "pipe", "wb") as pipe:  # returns when prepare has opened its end, in the middle of its work
        while not (tmp_path / "out.preparing/out.idx").exists():  # stdin is open before Python starts
            assert run.poll() is None
            time.sleep(0.05)
        pipe.write(b'{"text": "some')
        pipe.flush()
        assert stop(run, number) == ("", "")
    assert run.returncode == 128 + number
    assert [path.name for path in tmp_path.iterdir()] == ["pipe"]


# --- Shards ---------------------------------------------------------------------------------------------------------


def mixed_inputs(directory, count=60):
    """All kinds of inputs, with bad lines and characters of many bytes. Returns their paths."""
    rng = np.random.default_rng(1)
    lines = [json.dumps({"text": random_text(rng, int(n))}, ensure_ascii=False) for n in rng.integers(0, 60, count)]
    lines[3:3] = ["{bad", "", "日本語"]
    raw = "\n".join(lines).encode()
    files = {"a.jsonl": raw, "b.txt": "日本語 text".encode() * 20, "c.jsonl.gz": gzip.compress(raw), "none.jsonl": b""}
    files |= {"d.ndjson": raw[: len(raw) // 3] + b"\n\n", "e.jsonl.zst": zstandard.ZstdCompressor().compress(raw)}
    for name, content in files.items():
        (directory / name).write_bytes(content)
    return [directory / name for name in files]


def output(prefix):
    return [Path(f"{prefix}{ending}").read_bytes() for ending in prepare.ENDINGS]


@pytest.mark.parametrize("count", [1, 2, 5, 16])
def test_shards_merge_to_the_bytes_of_one_machine(tmp_path, capsys, count):
    inputs = mixed_inputs(tmp_path)
    prepare.prepare(inputs, tmp_path / "whole", skip_bad=True)
    (note,) = capsys.readouterr().err.splitlines()
    prefixes = [tmp_path / f"{k}" for k in range(count)]
    shards = [prepare.prepare(inputs, out, skip_bad=True, share=(k, count)) for k, out in enumerate(prefixes)]
    prepare.merge(prefixes, tmp_path / "merged")
    assert output(tmp_path / "merged") == output(tmp_path / "whole")
    assert count < 5 or sum(shard.documents > 0 for shard in shards) > 3
    left_out = [int(line.split()[2]) for line in capsys.readouterr().err.splitlines()]
    assert sum(left_out) == int(note.split()[2])


def test_cuts_are_at_lines(tmp_path):
    """Every number of shards: their parts of a file are neighbours, and each begins with a line."""
    raw = 'é日😀\n\n{"a": 1}\r\nlong line 日本語\n'.encode() * 3
    (tmp_path / "a.jsonl").write_bytes(raw)
    (tmp_path / "b.jsonl").write_bytes(raw + b"end")
    for count in (1, 2, 3, 7, len(raw), 2 * len(raw) + 3, 2 * len(raw) + 50):
        shards = [documents.parts_of([tmp_path / "a.jsonl", tmp_path / "b.jsonl"], (k, count)) for k in range(count)]
        for name, content in (("a.jsonl", raw), ("b.jsonl", raw + b"end")):
            parts = [part for parts in shards for part in parts if part.path.name == name]
            begins = [part.start for part in parts]
            assert begins[0] == 0
            assert all(content[begin - 1 : begin] == b"\n" for begin in begins[1:])
            if count > 1:
                assert [part.stop for part in parts] == [*begins[1:], len(content)]
            assert all(len(parts) < 3 for parts in shards)


def test_shards_on_the_command_line(tmp_path):
    (tmp_path / "in.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n{"text": "three"}\n{"text": ')
    line = ("prepare", "--input", "in.jsonl", "--skip-bad", "--out")
    assert "2 documents" in run_data(tmp_path, *line, "m0", "--shard", "0/2").stdout
    assert "1 documents" in run_data(tmp_path, *line, "m1", "--shard", "1/2").stdout
    assert "3 documents" in run_data(tmp_path, "merge", "--input", "m0", "m1", "--out", "m").stdout
    for source, message in ((tmp_path / "in.jsonl", "in.jsonl: the line at byte 50 is not"), ("-", "needs files")):
        with pytest.raises(UserError, match=message):
            prepare.prepare([source], tmp_path / "x", share=(1, 2))


def test_what_does_not_merge(tmp_path, merging_tokenizer):
    (tmp_path / "in.txt").write_text("words")
    prepare.prepare([tmp_path / "in.txt"], tmp_path / "a")
    prepare.prepare([tmp_path / "in.txt"], tmp_path / "b", merging_tokenizer)
    write_data(tmp_path / "c", [[1, 2], [3]])
    write_data(tmp_path / "d", [[1, 2], [3]], marks=[0, 2])
    (tmp_path / "d.tokenizer.json").write_bytes((tmp_path / "a.tokenizer.json").read_bytes())
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    for inputs, out, message in (
        ("ab", "out", "a were made with different tokenizers"),
        ("ac", "out", "c.tokenizer.json: cannot be read"),
        ("ad", "out", "d.idx: its documents have several sequences"),
        ("ax", "out", "x.idx: No such file"),
        ("aa", "a", "a.tokenizer.json exists"),
        ("aa", "out/", "give a prefix in it"),
    ):
        with pytest.raises(UserError, match=re.escape(message)):
            prepare.merge([tmp_path / name for name in inputs], f"{tmp_path}/{out}")
        assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


# --- Resuming -------------------------------------------------------------------------------------------------------

KILLED = """
import os, random, signal, sys
from corpus import documents, prepare
from runtime.errors import UserError

documents.CHUNK = documents.PACKED_CHUNK = 64
documents.GROUP, prepare.SAVE_SECONDS = 400, -1
share, workers, out, *inputs = sys.argv[1:]

def killing(call, left=[0]):
    def wrapped(*args, **options):
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return call(*args, **options)
    return wrapped

for number in range(1000):
    if (child := os.fork()) == 0:  # nothing was encoded here, so there are no threads
        killing.__defaults__[0][0] = random.Random(number).randint(1, 50)
        os.fsync, os.rename, os.unlink, os.rmdir = map(killing, (os.fsync, os.rename, os.unlink, os.rmdir))
        try:
            prepare.prepare(inputs, out, None, int(workers), skip_bad=True, share=tuple(map(int, share.split("/"))))
        except UserError as error:  # it was killed while it removed the work directory of the complete data set
            os._exit(0 if ".tokenizer.json exists" in str(error) else 1)
        os._exit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if status != -signal.SIGKILL:
        print(number)
        sys.exit(status)
"""


@pytest.mark.parametrize(("share", "workers"), [("0/1", "1"), ("1/3", "3")])
def test_killed_again_and_again(tmp_path, share, workers):
    """kill -9 at any flush, rename or removal: the result has the bytes of an undisturbed run, and nothing stays."""
    inputs = mixed_inputs(tmp_path)
    part = tuple(map(int, share.split("/")))
    whole = prepare.prepare(inputs, tmp_path / "whole", skip_bad=True, share=part)
    command = [sys.executable, "-c", KILLED, share, workers, tmp_path / "out", *inputs]
    run = subprocess.run(command, cwd=REPO, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    assert int(run.stdout) > 2
    done = [int(n) for n in re.findall(r"going on after (\d+) documents", run.stderr)]
    assert done == sorted(done)
    assert sum(0 < n < whole.documents for n in done) > 1
    assert output(tmp_path / "out") == output(tmp_path / "whole")
    assert sorted(path.name for path in tmp_path.glob("out*")) == ["out.bin", "out.idx", "out.tokenizer.json"]
    assert not list(tmp_path.glob(".*"))


@pytest.fixture
def stopped(tmp_path, monkeypatch, capsys):
    """`prepare` that stopped at a bad line, the third of in.jsonl, with two documents recorded in out.preparing."""
    monkeypatch.setattr(prepare, "SAVE_SECONDS", -1)
    monkeypatch.setattr(documents, "GROUP", 1)
    (tmp_path / "in.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n{bad\n{"text": "three"}\n')
    with pytest.raises(UserError, match="line 3"):
        prepare.prepare([tmp_path / "in.jsonl"], tmp_path / "out")
    return tmp_path / "out.preparing"


def test_a_stopped_run_goes_on(tmp_path, stopped, capsys):
    note = f"note: {stopped} keeps what is done; the same command goes on from there\n"
    assert capsys.readouterr().err == note
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl", "out.preparing"]
    with lock(stopped), pytest.raises(UserError, match=r"out.preparing is in use by process"):
        prepare.prepare([tmp_path / "in.jsonl"], tmp_path / "out")
    with pytest.raises(UserError, match="the line at byte 32 is not"):
        prepare.prepare([tmp_path / "in.jsonl"], tmp_path / "out")
    assert capsys.readouterr().err == f"{stopped}: going on after 2 documents\n{note}"
    prepare.prepare([tmp_path / "in.jsonl"], tmp_path / "out", skip_bad=True)
    prepare.prepare([tmp_path / "in.jsonl"], tmp_path / "whole", skip_bad=True)
    assert "left out 1 bad lines" in capsys.readouterr().err
    assert output(tmp_path / "out") == output(tmp_path / "whole")
    assert not stopped.exists()


def test_the_bar_knows_what_is_left(tmp_path, stopped, monkeypatch):
    bars = []

    class Bar(tqdm):
        def __init__(self, **options):
            bars.append(self)
            super().__init__(**options | {"disable": False, "file": io.StringIO()})

    monkeypatch.setattr(documents, "tqdm", Bar)
    size = (tmp_path / "in.jsonl").stat().st_size
    prepare.prepare([tmp_path / "in.jsonl"], tmp_path / "out", skip_bad=True)
    prepare.prepare([tmp_path / "in.jsonl"], tmp_path / "second", skip_bad=True, share=(1, 2))
    assert [(bar.initial, bar.total) for bar in bars] == [(32, size), (0, size - 32)]
    assert bars[0].n == size


def test_another_command_does_not_go_on(tmp_path, stopped, merging_tokenizer, capsys):
    capsys.readouterr()
    before = {path: path.read_bytes() for path in stopped.iterdir()}
    source = tmp_path / "in.jsonl"
    for options, name in (
        ({"tokenizer": merging_tokenizer}, "--tokenizer"),
        ({"text_key": "body"}, "--text-key"),
        ({"share": (0, 2)}, "--shard"),
        ({"inputs": [source, source]}, "--input"),
    ):
        with pytest.raises(UserError, match=f"out.preparing keeps .*{name} differ.* or delete that directory"):
            prepare.prepare(**{"inputs": [source], "out": tmp_path / "out"} | options)
    os.utime(source, (1, 1))
    with pytest.raises(UserError, match="--input differ, or the files have changed"):
        prepare.prepare([source], tmp_path / "out")
    assert {path: path.read_bytes() for path in stopped.iterdir()} == before
    assert capsys.readouterr().err == ""


def test_damaged_progress_is_refused(tmp_path, stopped):
    record, tokens = stopped / "progress.json", stopped / "out.bin"
    good = record.read_bytes()
    for bad in (b"", b"[", b"[]", b"{}", good[:-9], good.replace(b'"bin_bytes": ', b'"bin_bytes": -'), b"9" * 10_000,
                good.replace(b'"end": [', b'"end": [1, '), good.replace(b'"documents": 2', b'"documents": "2"'),
                good.replace(b'"shard"', b'"part"'), good.replace(b"complete", b"more")):  # fmt: skip
        record.write_bytes(bad)
        with pytest.raises(UserError, match=r"progress.json is damaged .* delete .*out.preparing to start"):
            prepare.prepare([tmp_path / "in.jsonl"], tmp_path / "out", skip_bad=True)
        assert record.read_bytes() == bad
    record.write_bytes(good)
    tokens.write_bytes(tokens.read_bytes()[:4])
    with pytest.raises(UserError, match="the files beside it are shorter"):
        prepare.prepare([tmp_path / "in.jsonl"], tmp_path / "out", skip_bad=True)


def test_leftovers_without_progress_are_cleaned(tmp_path):
    (tmp_path / "in.txt").write_text("words")
    (tmp_path / "out.preparing").mkdir()
    for name in ("out.bin", "out.idx", "out.tokenizer.json", ".progress.json.0123.tmp", "notes of a user"):
        (tmp_path / "out.preparing" / name).write_text("left by a killed process" * 9)
    prepare.prepare([tmp_path / "in.txt"], tmp_path / "out")
    assert documents_of(tmp_path / "out")[0] == [[*byte_tokenizer().encode("words").ids, 0]]
    assert [path.name for path in (tmp_path / "out.preparing").iterdir()] == ["notes of a user"]


# --- The demo corpus ------------------------------------------------------------------------------------------------


def test_demo(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    rows = data.open_rows("demo", samples=1)
    notice = capsys.readouterr().err
    assert notice.startswith("building runs/demo: ")
    assert sorted(path.suffix for path in Path("runs").glob("demo.*") if path.is_file()) == [".bin", ".idx", ".json"]
    assert 5_000_000 < rows.data.tokens < 10_000_000
    assert data.find_tokenizer("demo") == Path("runs/demo.tokenizer.json")
    assert data.fingerprint(rows)["bin_sha256"]

    # The first and the last document are complete files of the library.
    tokenizer, library = byte_tokenizer(), Path(sysconfig.get_paths()["stdlib"])
    sources = {path.read_bytes() for path in library.rglob("*.py")}
    for document in (0, rows.data.documents - 1):
        ids = rows.data.read(rows.data.start(document), int(np.asarray(rows.data.sizes)[document]))
        assert ids[-1] == 0
        assert tokenizer.decode(ids[:-1].tolist(), skip_special_tokens=False).encode() in sources

    written = Path("runs/demo.bin").stat().st_mtime_ns
    assert prepare.demo() == Path("runs/demo")
    assert Path("runs/demo.bin").stat().st_mtime_ns == written
    assert capsys.readouterr().err == ""
    assert IndexedTokens("runs/demo").tokens == rows.data.tokens

    demo = data.open_rows("demo", data.requested_samples(60, 16), seq_len=256)  # the rows of `train.py --demo`
    seen = run_data(tmp_path, "view", "--demo", "--step", "7", "--row", "3")
    assert seen.stdout.startswith("--- step 7, row 3 of 16 (row 115 of the order)")
    assert byte_tokenizer().decode(demo[115].tolist(), skip_special_tokens=False) in seen.stdout


def test_the_directory_of_the_output_is_created(tmp_path):
    (tmp_path / "in.txt").write_text("words")
    assert prepare.prepare([tmp_path / "in.txt"], tmp_path / "a/b/out").documents == 1
