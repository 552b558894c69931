"""README.md and docs/: every path that they name exists, and every flag is one of the command it is given to."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from bench import picture
from studies.suite import read_suite

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
COMMAND = re.compile(r"(?:-m )?\b((?:bench|studies)\.\w+|\w+\.py)((?: edit)?(?: [a-z]+(?:-[a-z]+)*\b(?!/))?)(.*)")


def paths(page: Path) -> set[str]:
    """Targets of relative links, files and folders in backquotes, and those that begin a line of an indented block."""
    text = page.read_text()
    links = {target for target in re.findall(r"\]\(([^)#]+)[^)]*\)", text) if "://" not in target}
    named = re.findall(r"`([\w/.-]+(?:\.py|\.sh|\.md|/))`", text) + re.findall(r"^ {4}([\w/]+(?:\.py|/)) ", text, re.M)
    of_a_run = {"state/", "stepN/"}
    return {str((page.parent / link).resolve()) for link in links} | {str(ROOT / name) for name in {*named} - of_a_run}


def commands(page: Path) -> set[tuple[str, str, str]]:
    """(script or module, its subcommand or "", flag) of every command on a page."""
    text = page.read_text().replace("\\\n", " ")
    lines = re.findall(r"^ {4}.*$", text, re.M) + re.findall(r"`([^`\n]+)`", text)
    found = [match.groups() for line in lines for match in COMMAND.finditer(line.split("  #")[0])]
    return {(name, sub.strip(), flag) for name, sub, rest in found for flag in re.findall(r"--[a-z][a-z-]+", rest)}


HELP = """
import contextlib, io, json, runpy, sys

texts = []
for name, sub in json.loads(sys.argv[1]):
    sys.argv = list(filter(None, [name, *sub.split(), "--help"]))
    with contextlib.redirect_stdout(io.StringIO()) as printed, contextlib.suppress(SystemExit):
        (runpy.run_path if name.endswith(".py") else runpy.run_module)(name, run_name="__main__")
    texts.append(printed.getvalue())
print(json.dumps(texts))
"""


@pytest.fixture(scope="module")
def help_of() -> dict[tuple[str, str], str]:
    """What `--help` prints, by (script or module, its subcommand). One process asks all: imports take seconds."""
    names = [("train.py", ""), ("data.py", "prepare"), ("data.py", "find"), ("torch.distributed.run", "")]
    names = sorted({*names, *((name, sub) for page in PAGES for name, sub, _ in commands(page))})
    ask = [sys.executable, "-c", HELP, json.dumps(names)]
    run = subprocess.run(ask, cwd=ROOT, capture_output=True, text=True, timeout=120, check=True)
    texts = dict(zip(names, json.loads(run.stdout), strict=True))
    assert [name for name, text in texts.items() if not text.startswith("usage: ")] == []
    return texts


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_paths_exist(page):
    assert [path for path in sorted(paths(page)) if not Path(path).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_flags_exist(page, help_of):
    unknown = [c for c in sorted(commands(page)) if not re.search(rf"{c[2]}(?![\w-])", help_of[c[:2]])]
    assert unknown == []


@pytest.mark.parametrize("file", sorted((ROOT / "examples").glob("*.toml")), ids=lambda file: file.name)
def test_flags_of_examples_exist(file, help_of):
    for job in read_suite(file):
        name, sub, rest = COMMAND.search(shlex.join(job.command)).groups()
        for flag in re.findall(r" (--[a-z][a-z-]+)", rest):
            assert re.search(rf"{flag}(?![\w-])", help_of[name, sub.strip()]), (job.name, flag)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_flags_without_a_command_exist(page, help_of):
    """`--bitwise` alone, as a sentence names it: a flag of train.py, data.py, torchrun or a study."""
    asked = ("train.py", ""), ("data.py", "prepare"), ("data.py", "find"), ("torch.distributed.run", "")
    asked += tuple(name for name in help_of if name[0].startswith("studies."))
    known = "".join(help_of[name] for name in asked)
    known = known.replace("_", "-")
    flags = re.findall(r"`(--[a-z-]+)", page.read_text())
    assert [flag for flag in flags if not re.search(rf"{flag}(?![\w-])", known)] == []


def test_the_readme_names_commands():
    """The patterns above find what they are meant to check."""
    found = commands(ROOT / "README.md")
    assert {("train.py", "", "--demo"), ("data.py", "view", "--row"), ("bench.picture", "", "--out")} <= found
    assert {str(ROOT / name) for name in ("docs/demo.png", "docs/exact.md", "kernels")} <= {
        path.rstrip("/") for path in paths(ROOT / "README.md")
    }


def test_the_picture_is_drawn(run, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(picture, "COLUMNS", 4)
    picture.draw(run("--steps", "2"), [0, 1, 2], "ab", tmp_path / "run.png")
    assert (tmp_path / "run.png").stat().st_size > 10_000
