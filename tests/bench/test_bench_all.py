"""bench.all runs every piece once, also after a failure of another; the tables of bench.report are up to date."""

import json
import math
import subprocess
import sys
import time

import pytest
import torch

from bench import warm
from bench.all import Piece, code_digest, count_tests, parse, pieces, run_all, summary
from bench.peers import PACKAGES
from bench.report import BEGIN, END, RESULTS, ROOT, TABLES, readme_table, replace_table, results, step_table
from runtime.errors import UserError

ORIGIN = {"code": "abc", "machine": {"gpu": "GPU"}}


def piece(name: str, script: str, seconds: float = 60) -> Piece:
    return Piece(name, seconds, (sys.executable, "-c", script, "{json}"))


@pytest.fixture
def good(tmp_path):
    """A piece that succeeds, and that appends an x to a file on every run."""
    script = f"import sys; open(sys.argv[1], 'w').write('[]'); open({str(tmp_path / 'runs')!r}, 'a').write('x')"
    return piece("good", script)


def test_a_result_is_reused_while_intact_and_of_the_same_code(good, tmp_path):
    def run(origin=ORIGIN, again=frozenset()) -> tuple[str, int]:
        state = run_all([good], tmp_path, origin, again)["good"]["state"]
        return state, len((tmp_path / "runs").read_text())

    assert run() == ("done", 1)
    assert run() == ("reused", 1)
    assert run(again={"good"}) == ("done", 2)
    assert run(origin=ORIGIN | {"code": "edited"}) == ("done", 3)
    assert run() == ("done", 4)  # the result is from other code
    (tmp_path / "good.json").write_text("[")
    assert run() == ("done", 5)  # damaged
    (tmp_path / "good.json").unlink()
    assert run() == ("done", 6)
    assert run() == ("reused", 6)


def test_after_a_failure_the_other_pieces_run(good, tmp_path):
    todo = [
        piece("broken", "print('a'); raise SystemExit('out of luck')"),
        Piece("elsewhere", 0, obstacle="needs a GPU"),
        piece("silent", "print('what I do', end='\\r'); print('nothing')"),
        good,
    ]
    (tmp_path / "broken.json").write_text("of an earlier run")
    records = run_all(todo, tmp_path, ORIGIN, set())
    assert [record["state"] for record in records.values()] == ["failed", "skipped", "failed", "done"]
    assert records["broken"]["why"] == "exit status 1: out of luck"
    assert records["silent"]["why"] == "wrote no silent.json: nothing"
    assert not (tmp_path / "broken.json").exists()
    lines = summary(records)
    assert lines[0].split() == ["piece", "state", "seconds"]
    assert lines[2].split() == ["elsewhere", "skipped", "needs", "a", "GPU"]
    assert run_all(todo, tmp_path, ORIGIN, set())["broken"]["state"] == "failed"  # a failed piece runs again


def test_a_piece_and_its_processes_are_killed_at_the_time_limit(tmp_path):
    child = f"import time; time.sleep(2); open({str(tmp_path / 'alive')!r}, 'w')"
    script = f"import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', {child!r}]); time.sleep(60)"
    records = run_all([piece("endless", script, seconds=0.4)], tmp_path, ORIGIN, set())
    assert records["endless"]["why"].startswith("took longer than 1.2 seconds")
    time.sleep(2.5)
    assert not (tmp_path / "alive").exists()


def test_a_damaged_all_json_is_reported(tmp_path):
    (tmp_path / "all.json").write_text("{")
    with pytest.raises(UserError, match=r"all\.json is damaged"):
        run_all([], tmp_path, ORIGIN, set())


def test_count_tests(tmp_path):
    (tmp_path / "test_some.py").write_text(
        "import pytest\n"
        "def test_good(): pass\n"
        "def test_bad(): assert False\n"
        "def test_skipped(): pytest.skip()\n"
        "@pytest.fixture\n"
        "def broken(): raise ValueError\n"
        "def test_error(broken): pass\n"
    )
    command = [sys.executable, "-m", "pytest", "-q", "--rootdir", str(tmp_path), "--junitxml", str(tmp_path / "a.xml")]
    subprocess.run([*command, str(tmp_path)], cwd=tmp_path, capture_output=True, timeout=60)
    found = count_tests(tmp_path / "a.xml")
    assert (found["passed"], found["skipped"]) == (1, 1)
    assert found["failed"] == ["test_some::test_bad", "test_some::test_error"]


def test_no_piece_begins_that_would_end_too_late(good, tmp_path):
    late = good._replace(name="late", seconds=1000)
    records = run_all([good, late, good._replace(name="small")], tmp_path, ORIGIN, set(), within=100)
    assert [record["state"] for record in records.values()] == ["done", "skipped", "done"]
    assert "no time was left" in records["late"]["why"]
    assert run_all([good, late], tmp_path, ORIGIN, set())["late"]["state"] == "done"


def test_pieces_by_gpu_memory():
    h100 = {piece.name: piece for piece in pieces(85e9)}
    assert sum(piece.seconds for piece in h100.values()) <= 8 * 60
    assert "by the plan" in h100["step-6.9b"].obstacle
    assert list(h100)[:5] == ["correctness", "correctness-large", "warm", "step-160m", "step-1.4b"]
    assert all(piece.command for name, piece in h100.items() if name != "step-6.9b")
    value = {
        name: {flag: piece.command[i + 1] for i, flag in enumerate(piece.command[:-1]) if flag.startswith("--")}
        for name, piece in h100.items()
    }
    assert (value["step-160m"]["--batch"], value["step-160m"]["--micro-steps"]) == ("8", "1")
    assert value["step-160m-accumulating"]["--micro-steps"] == "128"
    h200 = {piece.name: piece for piece in pieces(150e9)}
    assert not h200["step-6.9b"].obstacle
    assert [piece.name for piece in pieces(None)] == list(h200) == list(h100)  # the same, rehearsed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "one,three"], "know one, two, not three"),
        (["--patience", "0"], "--patience must be positive, not 0"),
        (["--within", "-1"], "--within must be positive, not -1"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(UserError, match=message):
        parse(arguments, ["one", "two"])


def test_code_digest_covers_every_package(tmp_path, monkeypatch):
    monkeypatch.setattr("bench.all.ROOT", tmp_path)
    digests = set()
    for name in ("train.py", "runtime/__init__.py", "bench/__init__.py", "bench/kernels/peers.py", "tests/bench/a.py"):
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(name)
        digests.add(code_digest())
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "other.py").write_text("not code of Tripod")
    digests.add(code_digest())
    assert len(digests) == 5


@pytest.mark.slow
def test_command(tmp_path):
    command = [sys.executable, "-m", "bench.all", "--out", str(tmp_path), "--only", "correctness-large,step-14m"]
    for state in ("done", "reused"):
        run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900)
        assert run.returncode == 0, run.stdout + run.stderr
        assert [line.split()[1] for line in run.stdout.splitlines()[1:3]] == [state, state]
    assert json.loads((tmp_path / "step-14m.json").read_text())["runs"]["tuned"]["tripod"]["summary"]


# ---- bench.warm


def test_warm(monkeypatch):
    assert warm.small_step("14m", torch.device("cpu")) == pytest.approx(math.log(50_304), abs=1.5)  # 16 random tokens
    monkeypatch.setattr(sys, "argv", ["warm", "--size", "13m"])
    with pytest.raises(UserError, match="--size knows 14m"):
        warm.main()


# ---- bench.report


def report(size: str, gpu: str | None, **arms) -> dict:
    """A report of bench.step. Each arm is (tokens/s, peak GB), or the reason why it is missing."""

    def record(arm: tuple | str) -> dict:
        if isinstance(arm, str):
            return {"missing": arm}
        rate, peak = arm
        keys = "tokens_per_s tokens_per_s_min tokens_per_s_max seconds_per_step first_step_seconds page_faults_per_step"
        summary = dict.fromkeys(keys.split(), float(rate)) | {"measurements": 3, "disturbed": 0, "disturbed_kept": 0}
        calls = {"launches": 1234, "syncs": 1} if gpu else None
        return {"summary": summary, "peak_bytes": peak * 1e9, "threads": 2, "calls": calls}

    peers = [name for name in arms if name in PACKAGES]
    return {
        "settings": {"size": size, "against": peers, "batch": 8, "seq_len": 2048, "precision": "bf16"},
        "machine": {"gpu": gpu, "cpu": "A CPU", "cores": 2},
        "gemm_flops_per_s": 800.0,
        "peak_flops_per_s": 1000.0 if gpu else None,
        "flops_per_token": 4.0,
        "flops_per_token_causal": 3.0,
        "runs": {"tuned": {name.replace("_", "+"): record(arm) for name, arm in arms.items()}},
    }


GPU = report(
    "160m", "H100", tripod=(100, 5), hf=(40, 10), hf_compile=(80, 4), litgpt="out of memory", plain="not installed"
)


def test_table_of_a_step_on_a_gpu():
    lines = [" ".join(line.split()) for line in step_table(GPU, "tuned").splitlines()]
    assert lines[0].endswith("tripod/arm peak MB tripod's launches syncs MFU causal MFU of GEMM causal")
    assert lines[1].endswith("1.000 5,000 100% 1,234 1 40.0% 30.0% 50.0% 37.5%")
    assert "2.500 10,000 50%" in lines[2]
    assert lines[-2:] == ["litgpt out of memory", "plain not installed"]


def test_table_of_a_step_without_tripod():
    text = step_table(report("14m", None, tripod="out of memory", hf=(40, 10)), "tuned")
    assert "tripod          out of memory" in text
    assert "40..40" in text
    assert "faults/step" in text


def test_readme_table(tmp_path):
    (tmp_path / "h100").mkdir()
    files = {
        "cpu.json": report("70m", None, tripod=(2000, 1), hf=(1000, 3)),
        "h100/big.json": report("1.4b", "H100", tripod=(10, 5)),
        "h100/small.json": GPU,
        "roofline.json": {"rows": []},
        "failed.json": report("14m", None, tripod="out of memory", hf=(40, 10)),
    }
    for name, content in files.items():
        (tmp_path / name).write_text(json.dumps(content))
    lines = readme_table(results(tmp_path), tmp_path).splitlines()
    assert lines[0] == "| machine | Pythia | tokens a step | tokens/s | hf | litgpt | plain | MFU | memory | file |"
    assert lines[2:] == [
        "| H100 | 160m | 8 x 2048, bf16 | 100 | 2.50 / 1.25 | no memory / – | – | 40% (30%) "
        "| 5.0 GB, theirs 0.8 to 2.0 times | [small.json](h100/small.json) |",
        "| H100 | 1.4b | 8 x 2048, bf16 | 10 | – | – | – | 4% (3%) | 5.0 GB | [big.json](h100/big.json) |",
        "| A CPU, 2 cores, glibc tuned | 70m | 8 x 2048, bf16 | 2,000 | 2.00 / – | – | – | 1000% (750%) of GEMM "
        "| 1.0 GB, theirs 3.0 to 3.0 times | [cpu.json](cpu.json) |",
    ]
    (tmp_path / "cpu.json").write_text("{")
    with pytest.raises(UserError, match=r"cpu\.json is damaged"):
        results(tmp_path)


def test_only_text_between_the_marks_is_replaced():
    assert replace_table(f"a\n{BEGIN}\nold\n{END}\nb", r"new \1") == f"a\n{BEGIN}\n\nnew \\1\n\n{END}\nb"
    with pytest.raises(UserError, match="the file needs one"):
        replace_table("no marks", "new")


@pytest.mark.parametrize(("file", "make"), TABLES.items())
def test_tables_are_up_to_date(file, make):
    text = (ROOT / file).read_text()
    table = make(results(RESULTS), (ROOT / file).parent)
    assert replace_table(text, table) == text, "run python -m bench.report"
