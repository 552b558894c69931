"""Downloads from a hub on 127.0.0.1: verified, resumed, and refused with one line."""

import errno
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
from mock_hub import Hub, use

from runtime import hub
from runtime.errors import UserError

ROOT = Path(__file__).parents[2]
BIG = os.urandom(3_000_000)


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A hub with the repository lab/model: branches main and step1."""
    for branch, big in (("main", BIG), ("step1", BIG[::-1])):
        directory = tmp_path / "hub" / "models" / "lab" / "model" / branch
        directory.mkdir(parents=True)
        (directory / "config.json").write_text('{"a": 1}')
        (directory / "empty.txt").write_text("")
        (directory / "big.bin").write_bytes(big)
    with Hub(tmp_path / "hub") as server:
        use(monkeypatch, server.url)
        yield server


def refused(*words, repo="lab/model", revision="step1", names=("big.bin",), directory=Path("unused")):
    with pytest.raises(UserError) as caught:
        hub.download(hub.resolve(repo, revision), list(names), directory)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message


NAMES = ["config.json", "empty.txt", "big.bin"]


def test_files_of_a_revision(server, tmp_path):
    revision = hub.resolve("lab/model", "step1")
    assert sorted(hub.branches("lab/model")) == ["main", "step1"]
    assert revision.files["big.bin"].bytes == len(BIG)
    hub.download(revision, NAMES, tmp_path / "out")
    assert (tmp_path / "out/big.bin").read_bytes() == BIG[::-1]
    assert (tmp_path / "out/config.json").read_text() == '{"a": 1}'
    assert {path.name for path in (tmp_path / "out").iterdir()} == {*NAMES}
    before = len(server.log)
    hub.download(revision, NAMES, tmp_path / "out")
    assert len(server.log) == before  # nothing is asked for again


def test_a_damaged_local_file_is_downloaded_again(server, tmp_path):
    revision = hub.resolve("lab/model", "main")
    hub.download(revision, NAMES, tmp_path)
    for name, damaged in (("big.bin", BIG[:-1] + bytes([BIG[-1] ^ 1])), ("config.json", b'{"a": 2}')):
        (tmp_path / name).write_bytes(damaged)
    hub.download(revision, NAMES, tmp_path)
    assert (tmp_path / "big.bin").read_bytes() == BIG
    assert (tmp_path / "config.json").read_text() == '{"a": 1}'


def test_a_connection_that_breaks_goes_on(server, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "DOWNLOAD_CHUNK_SIZE", 100_000)  # it writes whole chunks only
    server.cut = 1_000_000
    hub.download(hub.resolve("lab/model", "main"), NAMES, tmp_path)
    assert (tmp_path / "big.bin").read_bytes() == BIG
    assert f"bytes=1000000-{len(BIG) - 1}" in {entry["range"] for entry in server.log}


SLOW = """
import sys, time
from pathlib import Path
from runtime import hub
from huggingface_hub import constants
constants.DOWNLOAD_CHUNK_SIZE = 100_000

class Slow:
    def __init__(self, file): self.file = file
    def __getattr__(self, name): return getattr(self.file, name)
    def write(self, data):
        self.file.write(data); self.file.flush(); print("wrote", flush=True); time.sleep(0.2)

request = hub.request
hub.request = lambda revision, name, file, *rest: request(revision, name, Slow(file), *rest)
hub.download(hub.resolve("lab/model", "main"), ["big.bin"], Path(sys.argv[1]))
"""


def test_resume_after_a_kill(server, tmp_path):
    environment = {**os.environ, "HF_ENDPOINT": server.url, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    child = subprocess.Popen([sys.executable, "-c", SLOW, tmp_path / "out"], stdout=subprocess.PIPE, env=environment)
    for _ in range(3):
        assert child.stdout.readline() == b"wrote\n"
    child.send_signal(signal.SIGKILL)
    child.wait()
    (part,) = (tmp_path / "out").iterdir()
    had = part.stat().st_size
    assert 0 < had < len(BIG)
    assert part.read_bytes() == BIG[:had]
    server.log.clear()
    hub.download(hub.resolve("lab/model", "main"), ["big.bin"], tmp_path / "out")
    assert (tmp_path / "out/big.bin").read_bytes() == BIG
    assert {entry["range"] for entry in server.log if "cdn" in entry["path"]} == {f"bytes={had}-{len(BIG) - 1}"}


@pytest.mark.parametrize("name", ["big.bin", "config.json"])
def test_a_flipped_bit_is_refused(server, tmp_path, name):
    server.flip = {name}
    refused(str(tmp_path / name), "damaged", names=[name], directory=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["hub"]
    server.flip = set()
    hub.download(hub.resolve("lab/model", "step1"), [name], tmp_path)


def test_one_line_errors(server, tmp_path, monkeypatch):
    refused("no repository", "lab/other", repo="lab/other")
    refused("no revision step7", revision="step7")
    refused("no file other.bin", names=["other.bin"], directory=tmp_path)
    refused("a b", repo="lab/a b/c")
    server.gated = {"models/lab/model"}
    refused("gated", "HF_TOKEN")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1, 1, 0))
    server.gated = set()
    refused("no room", "0.00 GB to download", directory=tmp_path)


def test_a_token_opens_a_gated_repository(server, tmp_path, monkeypatch):
    server.gated = {"models/lab/model"}
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    hub.download(hub.resolve("lab/model", "main"), NAMES, tmp_path)
    assert (tmp_path / "big.bin").read_bytes() == BIG


def test_a_disk_that_is_full(server, tmp_path, monkeypatch):
    class Full:
        def __init__(self, file):
            self.file = file

        def __getattr__(self, name):
            return getattr(self.file, name)

        def write(self, data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    request = hub.request
    monkeypatch.setattr(hub, "request", lambda revision, name, file, *rest: request(revision, name, Full(file), *rest))
    refused("No space left on device", "big.bin", directory=tmp_path)


def test_no_network(tmp_path, monkeypatch):
    use(monkeypatch, "http://127.0.0.1:9")
    refused("lab/model", "http://127.0.0.1:9 cannot be reached")


def test_an_answer_that_is_no_hubs(server, tmp_path, monkeypatch):
    """A proxy's page instead of JSON."""

    def page(handler, *_):
        if handler.begin(200, 6, Content_Type="text/html"):
            handler.wfile.write(b"<html>")

    monkeypatch.setattr("mock_hub.Handler.info", page)
    refused(f"lab/model on {server.url} answers with what is not a hub's answer")


def test_offline(server, tmp_path):
    environment = {
        **os.environ,
        "HF_ENDPOINT": server.url,
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    code = 'from runtime import hub, errors; errors.run_command(lambda: hub.resolve("lab/model", "main"))'
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.returncode == 1
    assert done.stderr == f"error: lab/model on {server.url} cannot be asked: HF_HUB_OFFLINE is set\n"


def test_a_name_outside_of_the_directory(server, monkeypatch):
    Sibling = type("Sibling", (), {"rfilename": "../evil.bin", "size": 1, "blob_id": "0", "lfs": None})
    info = type("Info", (), {"siblings": [Sibling], "sha": "0"})
    monkeypatch.setattr(huggingface_hub.HfApi, "repo_info", lambda *args, **options: info)
    with pytest.raises(UserError, match="outside of its directory"):
        hub.resolve("lab/model", "main")
