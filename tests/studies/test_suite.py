"""Suites: the commands, their order, what is wrong in a file, and a small one from beginning to end."""

import shlex
import subprocess
from pathlib import Path

import pytest

from runtime.errors import UserError
from studies.suite import main, read_suite, slurm_script

ROOT = Path(__file__).parents[2]
SMALL = """
out = "{out}"

[[study]]
name = "trace"
runs = ["base"]

[[run]]
name = "branch"
branch = "base/step2"
edits = "planted"

[[edit]]
name = "planted"
make = "plant"
run = "base"
flags = {{ plants = "{plants}", from-step = 2 }}

[[run]]
name = "base"
flags = {{ size = "nano", data = "{data}", steps = 4, batch-size = 4, seq-len = 32, precision = "fp32" }}
"""


@pytest.fixture
def small(corpus, tmp_path) -> Path:
    (tmp_path / "plants.jsonl").write_text('{"text": "abc", "times": 3}\n')
    file = tmp_path / "small.toml"
    file.write_text(SMALL.format(out=tmp_path / "out", plants=tmp_path / "plants.jsonl", data=corpus))
    return file


@pytest.mark.slow
def test_a_suite_from_beginning_to_end(small, tmp_path, monkeypatch, capfd):
    """What is needed comes first, wherever the file has it. The second time nothing is made again."""
    monkeypatch.chdir(ROOT)
    main([str(small)])
    out = tmp_path / "out"
    assert (out / "branch/step4/manifest.json").exists()
    assert (out / "studies/trace/summary.csv").exists()
    files = {path: path.stat().st_mtime_ns for path in out.rglob("step*/*")} | {
        path: path.stat().st_mtime_ns for path in out.glob("*.parquet")
    }
    capfd.readouterr()
    main([str(small)])
    assert all(path.stat().st_mtime_ns == time for path, time in files.items())
    capfd.readouterr()
    main([str(small), "--plan"])
    states = [line.split("  ")[0] for line in capfd.readouterr().out.splitlines()]
    assert sorted(states) == ["at step 4", "at step 4", "done", "done"]
    main([str(small), "--slurm"])
    assert capfd.readouterr().out.count("sbatch") == 4


def test_each_combination_is_a_run(tmp_path):
    (tmp_path / "a.toml").write_text(
        'train = "torchrun --nproc-per-node 8"\n'
        '[[run]]\nname = "p-{size}-{seed}"\nflags = { compile = true }\n'
        'each = { size = ["14m", "70m"], seed = [1, 2] }\n'
        '[[study]]\nname = "trace"\nruns = ["p-14m-*"]\nflags = { steps = "final", limit = false }\n'
    )
    *runs, study = read_suite(tmp_path / "a.toml")
    assert [job.name for job in runs] == ["run p-14m-1", "run p-14m-2", "run p-70m-1", "run p-70m-2"]
    expected = "torchrun --nproc-per-node 8 train.py --size 70m --seed 1 --compile --out runs/a/p-70m-1"
    assert shlex.join(runs[2].command) == expected
    expected = "python -m studies.trace runs/a/p-14m-1 runs/a/p-14m-2 --steps final --out runs/a/studies/trace"
    assert shlex.join(study.command) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x = [", "cannot be read"),
        ("x = 1", r"x: the file has out, train, run, edit and study"),
        ("[run]\nname = 1", r"\[\[run\]\] 1: name is not known, or of another type"),
        ("run = 5", "run must be tables"),
        ('[[run]]\nname = "a"\nflag = {}', "flag is not known"),
        ('[[run]]\nname = "a-{b}"', "braces can have nothing"),
        ('[[run]]\nname = "a"\n[[run]]\nname = "a"', "two of the name run a"),
        ('[[run]]\nname = "a"\nbranch = "b/step1"', "run a needs run b, which is not in the file"),
        ('[[run]]\nname = "a"\nbranch = "a/step1"', "each needs the next: run a, run a"),
        ('[[study]]\nname = "trace"\nruns = ["a*"]', r"\[\[study\]\] trace: no run is named a\*"),
        ('[[edit]]\nname = "e"\nmake = "plant"', "are needed"),
    ],
)
def test_what_is_wrong_in_a_file(text, message, tmp_path):
    (tmp_path / "a.toml").write_text(text)
    with pytest.raises(UserError, match=message):
        read_suite(tmp_path / "a.toml")


def test_a_command_that_fails_ends_the_suite(small, monkeypatch):
    monkeypatch.setattr(subprocess, "call", lambda command: 3)
    with pytest.raises(UserError, match=r"run base failed \(3\); the same command goes on from there"):
        main([str(small)])


def test_jobs_wait_for_what_they_need(small, tmp_path):
    """The script runs with an sbatch that prints what it got."""
    (tmp_path / "sbatch").write_text('#!/bin/sh\necho "$@" >> "$LOG"; echo $(wc -l < "$LOG")\n')
    (tmp_path / "sbatch").chmod(0o755)
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "LOG": str(tmp_path / "log")}
    script = slurm_script(read_suite(small))
    subprocess.run(["sh", "-c", script, "sh", "--gpus=8"], env=environment, check=True)
    lines = (tmp_path / "log").read_text().splitlines()
    assert len(lines) == 4
    assert "--job-name=run base --gpus=8 --wrap=python train.py" in lines[0]
    branch = next(line for line in lines if "--job-name=run branch" in line)
    edit = 1 + next(i for i, line in enumerate(lines) if "--job-name=edit planted" in line)
    assert f"--dependency=afterok:{edit}:1" in branch
