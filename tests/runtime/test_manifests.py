"""Small files that a manifest lists, and the steps of a run. Damage of whole checkpoints: tests/checkpoints."""

import hashlib

import pytest

from runtime.errors import UserError
from runtime.manifests import FORMAT, checksums, read_listed, read_manifest, saved_steps, write_manifest


@pytest.fixture
def directory(tmp_path):
    (tmp_path / "config.json").write_text('{"a": 1}')
    files = {"config.json": checksums(tmp_path / "config.json")}
    write_manifest(tmp_path, {"format": FORMAT, "step": 7, "files": files})
    return tmp_path


def test_a_listed_file(directory):
    assert read_listed(directory / "config.json") == b'{"a": 1}'
    entry = read_manifest(directory)["files"]["config.json"]
    assert entry == {"bytes": 8, "sha256": hashlib.sha256(b'{"a": 1}').hexdigest()}
    (directory / "config.json").write_text('{"a": 2}')
    with pytest.raises(UserError, match=f"{directory}/config.json is damaged"):
        read_listed(directory / "config.json")
    (directory / "config.json").write_text("{}")
    with pytest.raises(UserError, match="has 2 bytes, not 8"):
        read_listed(directory / "config.json")
    (directory / "other.json").write_text('{"a": 1}')
    with pytest.raises(UserError, match="the manifest does not list it"):
        read_listed(directory / "other.json")


def test_without_a_manifest(directory):
    (directory / "manifest.json").unlink()
    (directory / "other.json").write_text("{}")
    assert read_listed(directory / "other.json") == b"{}"
    (directory / "manifest.json").symlink_to("nowhere")  # it was there
    with pytest.raises(UserError, match="missing"):
        read_listed(directory / "other.json")


@pytest.mark.parametrize("step", [True, None, "7", 7.0, -1, [7]])
def test_a_step_is_a_number(directory, step):
    manifest = read_manifest(directory)
    write_manifest(directory, manifest | {"step": step})
    with pytest.raises(UserError, match="step"):
        read_manifest(directory)


def test_steps(tmp_path):
    for name in ("step10", "step9", "step0", "step007", "step", "step-1", "step1.5", "step\u0967", "other3"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "manifest.json").touch()
    (tmp_path / "step11").mkdir()
    assert saved_steps(tmp_path) == [0, 9, 10]
