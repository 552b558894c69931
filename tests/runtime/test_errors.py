"""What a command prints: one line for a mistake of the user, and no control characters of somebody else."""

import subprocess
import sys

from megatron import REPO

from runtime.errors import UserError, printable


def test_control_characters_are_escaped():
    assert printable("\x1b[2J\x1b]0;title\x07 a\rb \x9b31m \x7f\0") == (
        r"\x1b[2J\x1b]0;title\x07 a\rb \x9b31m \x7f\x00"
    )
    assert printable("user\u202egpj.exe \udcff") == r"user\u202egpj.exe \udcff"


def test_ordinary_text_is_unchanged():
    text = "".join(map(chr, range(0xA0, 0x2000))) + "a\tb\nc 日本語 \U0001f469\u200d\U0001f680 e\u0301"
    assert printable(text) == text


def test_a_long_error_keeps_its_beginning_and_its_end():
    text = str(UserError("config.json: heads is " + "x" * 100_000 + ": fetch it again"))
    assert len(text) < 1500
    assert text.startswith("config.json: heads is xxx")
    assert text.endswith("xxx: fetch it again")


def test_an_error_is_one_line_without_escapes():
    code = "from runtime.errors import *\ndef main(): raise UserError('a\\x1b[2J\\nb \\udcff.bin')\nrun_command(main)"
    run = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True, timeout=60)
    assert (run.returncode, run.stdout) == (1, "")
    assert run.stderr == "error: a\\x1b[2J\\nb \\udcff.bin\n"
