"""The byte tokenizer, and the places where text can be cut."""

import re

from tokenizers import normalizers, pre_tokenizers

from corpus.tokenizer import BYTE_PLACE, PLACES, byte_tokenizer

# Scripts with and without spaces, combining marks that NFC composes (e + U+0301, Hangul jamo), runs of spaces (added
# tokens in Pythia's tokenizer), all kinds of white space, emoji with joiners, NUL, and a literal <|endoftext|>.
ODD = [
    "plain words, don't they'll  two   three     spaces\n\n\ttabs \t mixed \n end",
    "cafe\u0301 nai\u0308ve A\u030a\u0301 \u1112\u1161\u11ab \u212b \u0344\n\u0301starts a line\n \u0301 x",
    "日本語の文章。改行\nする。\n\n한국어 문장\nрусский текст עברית ไทย\u200bไม่มี",
    "a\u00a0b\u2003c\u2028d\u3000e\x85f\x0bg\x0ch\x1ci\x1dj\r\nk\rl\u180em\u200bn\ufeffo",
    "😀👩\u200d👩\u200d👧 \U0001f3f3\ufe0f\u200d\U0001f308\n\x00NUL\x00\n<|endoftext|> and <|padding|>\n<|endoftext|>",
    "    def f(x):\n        return x  # comment\n\n\n" * 3 + "no newline at the end",
    " ",
    "\n",
    "\n\n leading",
    "x" * 300,
    "\U0010ffff\ue000\ufffd ~\x7f",
]


def bytes_to_unicode():
    """GPT-2's table, byte -> character: printable bytes map to themselves, the others to U+0100 and following."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}


def test_ids_of_bytes():
    """The bytes that UTF-8 uses, sorted by the character that GPT-2 writes for each."""
    used = set()
    for code in [*range(0xD800), *range(0xE000, 0x110000, 64), 0x10FFFF]:
        used |= set(chr(code).encode())
    used |= set(range(0x80, 0xC0))
    assert len(used) == 243
    expected = {character: byte for byte, character in bytes_to_unicode().items() if byte in used}
    tokenizer = byte_tokenizer()
    assert tokenizer.get_vocab_size() == 245
    assert [tokenizer.id_to_token(i) for i in range(245)] == ["<|endoftext|>", "<|padding|>", *sorted(expected)]
    assert byte_tokenizer().encode("!\n é").ids == [
        2,
        2 + sorted(expected).index("Ċ"),
        *[2 + sorted(expected).index(bytes_to_unicode()[byte]) for byte in " é".encode()],
    ]


def test_text_survives():
    tokenizer = byte_tokenizer()
    for text in ODD:
        ids = tokenizer.encode(text).ids
        assert tokenizer.decode(ids, skip_special_tokens=False) == tokenizer.normalizer.normalize_str(text)
        if "<|" not in text:
            assert len(ids) == len(tokenizer.normalizer.normalize_str(text).encode())


def test_no_token_crosses_a_cut():
    """What cut_pattern relies on, for nearly all characters: white space after another character starts a pre-token,
    and NFC does not change it."""
    codes = [*range(0xD800), *range(0xE000, 0x10000), *range(0x10000, 0x110000, 31)]
    characters = [chr(code) for code in codes if not chr(code).isspace()]
    text = "".join(f"{c}\n{c} {c}" for c in characters)
    splitter, nfc = pre_tokenizers.ByteLevel(add_prefix_space=False), normalizers.NFC()
    normal = nfc.normalize_str(text)
    for _, (start, end) in splitter.pre_tokenize_str(normal):
        assert not re.search(r"\S[ \n]", normal[start:end])
    for start in range(0, len(characters), 97):
        c, d = characters[start], characters[start - 1]
        for space in (" ", "\n"):
            assert nfc.normalize_str(c + space + d) == nfc.normalize_str(c) + nfc.normalize_str(space + d)


def test_nothing_composes_across_a_cut():
    """NFC never composes a character with one that the patterns of cuts have behind the cut, whatever it is."""
    nfc = normalizers.NFC()
    behind = []
    for place in (BYTE_PLACE, *PLACES):
        allowed = re.compile(place[place.index("(?=") + 3 : -1])
        behind += [chr(code) for code in range(0xD800) if allowed.fullmatch(chr(code))]
    assert len(behind) > 30_000
    before = ["a", "e\u0301", "か", "가", "\u1100", "\u1161", "\u09c7", "\U00011099", "\u0301"]
    for c in before:
        text = "".join(c + d + "\n" for d in behind)
        assert nfc.normalize_str(text) == "".join(nfc.normalize_str(c) + d + "\n" for d in behind)


def test_letters_digits_and_punctuation_are_apart():
    """The pre-tokenizer of GPT-2 splits at all PLACES."""
    splitter = pre_tokenizers.ByteLevel(add_prefix_space=False)
    for left, right in (("aZ", "09"), ("09", "aZ"), ("文ぁゖァヺ一鿿", "、。，")):
        for a in left:
            for b in right:
                for text in (f"{a}{a}{b}{b}", f" {a}{b}", f"'{a}{b}", f"'s{a}{b}", f"!{a}{b}'s"):
                    starts = [start for _, (start, _) in splitter.pre_tokenize_str(text)]
                    assert text.index(b) in starts or "'s" in text, text
