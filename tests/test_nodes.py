"""Many nodes, simulated on one machine: nodes join and leave a run, a network is cut, SLURM runs slurm.sh."""

import base64
import json
import os
import pickle
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import timedelta
from pathlib import Path

import pytest
from conftest import records
from small_runs import ROOT, assert_same_bits, assert_same_training
from torch.distributed import TCPStore

TORCHRUN = Path(sys.executable).with_name("torchrun")
FLAGS = ["--batch-size", 16, "--micro-batch", 2, "--lr", 1e-2]
BITWISE = [*FLAGS, "--bitwise"]

# train.py with the model of conftest.py, a pause of $PAUSE seconds before every step and of $MICRO_PAUSE seconds in
# every micro-step. A step of more than $LONG_STEP seconds is long.
SCRIPT = f"""
import faulthandler, os, sys, time
faulthandler.dump_traceback_later(300, exit=True)
sys.path.insert(0, {str(ROOT)!r})
from dataclasses import replace
import data, train
from runtime.errors import run_command
from model import SIZES
SIZES["14m"] = replace(SIZES["14m"], layers=2, hidden=32, vocab=384)
def batch(*args, read=data.batch):
    time.sleep(float(os.environ.get("PAUSE", 0)))
    return read(*args)
data.batch = batch
def forward(*args, real=train.Pythia.forward):
    time.sleep(float(os.environ.get("MICRO_PAUSE", 0)))
    return real(*args)
train.Pythia.forward = forward
train.LONG_STEP = float(os.environ.get("LONG_STEP", train.LONG_STEP))
run_command(train.main)
"""


class Node:
    """A torchrun and its ranks."""

    def __init__(self, command: list, log: Path, **environment: str):
        self.log = log
        environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
        with log.open("w") as file:
            self.torchrun = subprocess.Popen(
                [*map(str, command)], stdout=file, stderr=subprocess.STDOUT, env=environment
            )

    def ranks(self) -> list[int]:
        """The process ids of the ranks."""
        stats = [(int(p.parent.name), p.read_text()) for p in Path("/proc").glob("[0-9]*/stat")]
        return [pid for pid, stat in stats if int(stat.rpartition(")")[2].split()[1]) == self.torchrun.pid]

    def kill(self) -> None:
        """Kill all processes, as when the machine fails."""
        for pid in (self.torchrun.pid, *self.ranks()):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def end(self) -> tuple[int, str]:
        """Wait for the end. Returns the exit status and the output."""
        status = self.torchrun.wait(120)
        return status, self.log.read_text()

    def errors(self) -> list[str]:
        """The error lines of the ranks, tracebacks included; not those of torchrun's own report."""
        return [line for line in self.log.read_text().splitlines() if re.match(r"error: |\[rank\d+\]", line)]


@pytest.fixture
def start(corpus, tmp_path) -> Iterator[Callable]:
    """start(*torchrun flags, flags=, prefix=, torchrun=, **environment) -> Node: a run in tmp_path/nodes.

    prefix is a command; torchrun is a script that takes its place.
    """
    (tmp_path / "small.py").write_text(SCRIPT)
    nodes = []

    def start(*torchrun_flags, flags=(), prefix=(), torchrun=TORCHRUN, **environment: str) -> Node:
        command = [
            *prefix,
            *([torchrun] if torchrun == TORCHRUN else [sys.executable, torchrun]),
            *torchrun_flags,
            tmp_path / "small.py",
            "--size",
            "14m",
            "--data",
            corpus,
        ]
        command += ["--out", tmp_path / "nodes", "--seq-len", 32, "--precision", "fp32", *flags]
        nodes.append(Node(command, tmp_path / f"node{len(nodes)}.log", **environment))
        return nodes[-1]

    yield start
    for node in nodes:
        if node.torchrun.poll() is None:
            node.kill()
            node.torchrun.wait()


def made(run: Path) -> int:
    """How many steps are in metrics.jsonl."""
    return len((run / "metrics.jsonl").read_text().splitlines()) if (run / "metrics.jsonl").exists() else 0


def starts(run: Path) -> list[tuple[int, int]]:
    """(step, number of ranks) of every start."""
    return [(s["step"], s["ranks"]) for s in json.loads((run / "run.json").read_text())["starts"]]


def wait(condition: Callable[[], bool], node: Node) -> None:
    for _ in range(1800):
        if condition():
            return
        assert node.torchrun.poll() is None, node.log.read_text()
        time.sleep(0.1)
    raise AssertionError(f"nothing happens: {node.log.read_text()}")


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


# One node


def documented() -> list[str]:
    """The options of torchrun that docs/faults.md gives for one node, with a free port."""
    command = re.search(r"^ {4}torchrun (.*) train\.py", (ROOT / "docs/faults.md").read_text(), re.M)[1]
    assert "--master-port 29400 --nproc-per-node 8" in command
    return command.replace("29400", str(free_port())).replace("--nproc-per-node 8", "--nproc-per-node 2").split()


@pytest.mark.parametrize(
    "flags",
    [BITWISE, *(pytest.param([*FLAGS, "--shard", shard], marks=pytest.mark.slow) for shard in ("grad", "full"))],
)
def test_told_to_stop_inside_a_long_step(flags, start, run, tmp_path):
    """One of two ranks gets the signal. Both drop the step; the same command continues with the same bits."""
    flags, nodes = [*flags, "--steps", 6], tmp_path / "nodes"
    node = start(*documented(), flags=flags, MICRO_PAUSE="0.7", LONG_STEP="0")  # a step has four micro-steps
    wait(lambda: nodes.exists() and made(nodes) == 3, node)
    time.sleep(0.3)
    os.kill(node.ranks()[-1], signal.SIGINT)
    status, output = node.end()
    assert status == 0, output
    assert "paused at step 3 of 6; the same command continues the run" in output
    assert made(nodes) == 3
    assert (nodes / "step3" / "manifest.json").exists()
    status, output = start(*documented(), flags=flags).end()
    assert status == 0, output
    if "--bitwise" in flags:  # one rank has the same bits
        whole = run(*flags)
    else:
        whole = tmp_path / "whole"
        assert start(*documented(), flags=[*flags, "--out", whole]).end()[0] == 0
    assert starts(nodes) == [(0, 2), (3, 2)]
    assert records(nodes) == records(whole)
    assert_same_bits(nodes / "step6", whole / "step6")


# torchrun in a Python that prints whatever is unpickled.
WATCHED = """
import os, sys
def print_unpickled(event, args):
    if event == "pickle.find_class":
        os.write(1, f"unpickled {args}\\n".encode())
sys.addaudithook(print_unpickled)
from torch.distributed.run import main
main()
"""


class Attack:
    """A pickle that creates a file when it is read."""

    def __init__(self, file: Path):
        self.file = file

    def __reduce__(self):
        return os.mkdir, (str(self.file),)


@pytest.mark.parametrize("options", ["documented", pytest.param("standalone", marks=pytest.mark.slow)])
def test_keys_of_the_store_are_not_unpickled(options, start, tmp_path):
    """Another process writes a pickle into the store of torchrun. With --standalone, torchrun reads it and runs its
    code; with the options of docs/faults.md it has no such key, and only one port."""
    torchrun_flags = documented() if options == "documented" else ["--standalone", "--nproc-per-node", 2]
    (tmp_path / "torchrun.py").write_text(WATCHED)
    node = start(*torchrun_flags, flags=[*FLAGS, "--steps", 20], PAUSE="0.3", torchrun=tmp_path / "torchrun.py")
    wait(lambda: made(tmp_path / "nodes") > 2, node)
    ports = listening(node.torchrun.pid)
    payload = pickle.dumps(Attack(tmp_path / "attacked"))
    attacked = []
    for port in ports:
        store = TCPStore("127.0.0.1", port, is_master=False, timeout=timedelta(seconds=20))
        for key in [*store.list_keys(), "torch.rendezvous.none"]:
            if key.startswith(("torch.rendezvous.", "none/torchelastic/")):
                attacked.append(key)
                store.set(key, base64.b64encode(payload) if key.startswith("torch.rendezvous.") else payload)
    status, output = node.end()
    if options == "documented":
        assert len(ports) == 1
        assert sorted(attacked)[-1] == "torch.rendezvous.none"  # we have made it
        assert status == 0, output
        assert "unpickled" not in output
        assert not (tmp_path / "attacked").exists()
    else:  # the attack works
        assert "unpickled ('posix', 'mkdir')" in output
        assert (tmp_path / "attacked").exists()


def listening(pid: int) -> list[int]:
    """The ports on which a process listens for IPv4 or IPv6 connections."""
    sockets = {str(fd.readlink()) for fd in Path(f"/proc/{pid}/fd").iterdir() if fd.is_symlink()}
    found = []
    for table in ("tcp", "tcp6"):
        for row in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = row.split()
            if fields[3] == "0A" and f"socket:[{fields[9]}]" in sockets:  # 0A: LISTEN
                found.append(int(fields[1].rpartition(":")[2], 16))
    return found


# Restarts


def test_a_killed_rank_is_replaced(start, run, tmp_path):
    """torchrun starts all ranks again. They resume, and end with the bits of an undisturbed run."""
    flags = [*BITWISE, "--steps", 20]
    node = start("--standalone", "--nproc-per-node", 2, "--max-restarts", 1, flags=flags, PAUSE="0.05")
    wait(lambda: (tmp_path / "nodes").exists() and made(tmp_path / "nodes") > 10, node)
    os.kill(node.ranks()[-1], signal.SIGKILL)
    status, output = node.end()
    assert status == 0, output
    assert starts(tmp_path / "nodes") == [(0, 2), (8, 2)]
    whole = run(*flags)
    assert records(tmp_path / "nodes") == records(whole)
    assert_same_bits(tmp_path / "nodes" / "step20", whole / "step20")


@pytest.mark.slow
def test_nodes_join_and_leave(start, run, tmp_path):
    """A second node joins, fails, joins again, and is told to stop. The run continues by itself each time, and repeats
    steps only after the failure."""
    nodes, port = tmp_path / "nodes", free_port()
    flags = [*BITWISE, "--steps", 3000]  # more than the test makes
    elastic = ["--nnodes", "1:2", "--nproc-per-node", 1, "--max-restarts", 9, "--rdzv-backend", "c10d", "--rdzv-id", 1]
    elastic += ["--rdzv-endpoint", f"127.0.0.1:{port}", "--local-addr", "127.0.0.1"]
    elastic += ["--rdzv-conf", "last_call_timeout=1,keep_alive_interval=1"]

    def join() -> Node:
        return start(*elastic, flags=flags, PAUSE="0.05", TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1")

    def goes_on(ranks: list[int]) -> None:
        """Wait until the last of these starts has made ten steps. `ranks`: the number of ranks of every start."""
        wait(lambda: (nodes / "run.json").exists() and len(starts(nodes)) >= len(ranks), first)
        assert [world for _, world in starts(nodes)] == ranks
        last = starts(nodes)[-1][0]
        wait(lambda: last + 10 < made(nodes), first)

    first = join()
    goes_on([1])
    second = join()
    goes_on([1, 2])
    second.kill()
    goes_on([1, 2, 1])
    second = join()
    goes_on([1, 2, 1, 2])
    second.torchrun.terminate()
    goes_on([1, 2, 1, 2, 1])
    first.torchrun.terminate()
    _, output = first.end()

    paused = [int(step) for step in re.findall(r"paused at step (\d+)", output)]
    resumed = [step for step, _ in starts(nodes)]
    assert [resumed[1], resumed[3], resumed[4]] == paused[:3]
    assert paused[3] == made(nodes)
    whole = run(*flags, "--stop-at", paused[3])
    assert records(nodes) == records(whole)
    assert_same_bits(nodes / f"step{paused[3]}", whole / f"step{paused[3]}")


# A network

NAMESPACES = [f"tripod-{os.getpid()}-{i}" for i in (0, 1)]


def ip(*words: str) -> str:
    return subprocess.run(["ip", *words], capture_output=True, text=True, check=True, timeout=30).stdout


@pytest.fixture
def network() -> Iterator[Callable[[str], None]]:
    """Two network namespaces, 10.77.0.1 and 10.77.0.2, and a virtual cable between them.

    network("down") cuts the cable: the second node's end is down, the first's has no carrier. network("up") repairs it.
    """
    if not shutil.which("ip"):
        pytest.skip("needs the command ip of iproute2")
    try:
        ip("netns", "add", NAMESPACES[0])
    except subprocess.CalledProcessError as error:
        pytest.skip(f"needs the right to make network namespaces: {error.stderr.strip()}")
    try:
        ip("netns", "add", NAMESPACES[1])
        ip("-n", NAMESPACES[0], "link", "add", "cable", "type", "veth", "peer", "name", "cable", "netns", NAMESPACES[1])
        for i, name in enumerate(NAMESPACES, start=1):
            ip("-n", name, "address", "add", f"10.77.0.{i}/24", "dev", "cable")
            ip("-n", name, "link", "set", "lo", "up")
            ip("-n", name, "link", "set", "cable", "up")
        yield lambda state: ip("-n", NAMESPACES[1], "link", "set", "cable", state)
    finally:
        for name in set(ip("netns", "list").split()) & set(NAMESPACES):
            for pid in ip("netns", "pids", name).split():
                os.kill(int(pid), signal.SIGKILL)
            ip("netns", "delete", name)


@pytest.fixture
def two_nodes(start, network) -> Callable[..., list[Node]]:
    """two_nodes(ranks per node, flags, **environment) -> both nodes, each in its namespace."""

    def two_nodes(ranks: int, flags: list, **environment: str) -> list[Node]:
        torchrun_flags = [
            "--nnodes",
            2,
            "--nproc-per-node",
            ranks,
            "--master-addr",
            "10.77.0.1",
            "--master-port",
            29400,
        ]
        environment["GLOO_SOCKET_IFNAME"] = "cable"
        prefixes = [["ip", "netns", "exec", name] for name in NAMESPACES]
        return [
            start(*torchrun_flags, "--node-rank", i, flags=flags, prefix=prefixes[i], **environment) for i in (0, 1)
        ]

    return two_nodes


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_two_nodes_train_as_one(ranks, two_nodes, run, tmp_path):
    for node in two_nodes(ranks, [*BITWISE, "--steps", 20]):
        status, output = node.end()
        assert status == 0, output
    assert starts(tmp_path / "nodes") == [(0, 2 * ranks)]
    whole = run(*BITWISE, "--steps", 20)
    assert records(tmp_path / "nodes") == records(whole)
    assert_same_bits(tmp_path / "nodes" / "step20", whole / "step20")


@pytest.mark.slow
def test_two_nodes_hold_a_copy_each(two_nodes, run, tmp_path):
    for node in two_nodes(2, [*FLAGS, "--steps", 20, "--shard", "hybrid"]):
        status, output = node.end()
        assert status == 0, output
    assert starts(tmp_path / "nodes") == [(0, 4)]
    assert_same_training(tmp_path / "nodes", run(*BITWISE, "--steps", 20))


@pytest.mark.slow
def test_a_cut_cable(two_nodes, network, run, tmp_path):
    """Both nodes report it and end. After the repair the same commands continue the run."""
    flags = [*BITWISE, "--steps", 60, "--timeout", 6]
    first, second = two_nodes(1, flags, PAUSE="0.1")
    wait(lambda: (tmp_path / "nodes").exists() and made(tmp_path / "nodes") > 20, first)
    network("down")
    for node in (first, second):
        status, output = node.end()
        assert status == 1
        assert len(node.errors()) == 1, output
    assert re.match(r"error: rank 1 \(\S+:\d+\) hangs: no sign of life since step \d+", first.errors()[0])
    assert re.match(r"error: rank 1 \(\S+:\d+\) has waited for .+ does not answer", second.errors()[0])
    network("up")
    for node in two_nodes(1, flags):
        status, output = node.end()
        assert status == 0, output
    assert starts(tmp_path / "nodes") == [(0, 2), (16, 2)]
    whole = run(*flags)
    assert records(tmp_path / "nodes") == records(whole)
    assert_same_bits(tmp_path / "nodes" / "step60", whole / "step60")


# SLURM

# Replacements of the commands that slurm.sh calls, for two nodes on this machine. `tasks` lists their process ids.
SRUN = """#!/usr/bin/env bash
[ "$1" = --kill-on-bad-exit=1 ] && shift || exit 99
for node in 0 1; do
    SLURM_NODEID=$node "$@" &
    echo $! >> tasks
done
status=0
for task in $(jobs -p); do wait "$task" || status=$?; done
exit $status
"""
SCONTROL = """#!/usr/bin/env bash
[ "$*" = "show hostnames node[1-2]" ] && printf 'localhost\\nnode2\\n' || echo "$*" >> requests
"""


@pytest.fixture
def sbatch(corpus, tmp_path) -> Callable[..., subprocess.Popen]:
    """sbatch(*flags, **commands) -> slurm.sh running in tmp_path, with scripts in place of SLURM's commands."""
    (tmp_path / "small.py").write_text(SCRIPT)
    torchrun = f'#!/usr/bin/env bash\nexec {TORCHRUN} "${{@/#train.py/small.py}}"\n'
    job = {"JOB_ID": "7", "JOB_NODELIST": "node[1-2]", "NNODES": "2", "GPUS_ON_NODE": "1", "CPUS_PER_TASK": "1"}
    environment = {"OMP_NUM_THREADS": "1", "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "PAUSE": "0.05"}
    environment |= {f"SLURM_{name}": value for name, value in job.items()}

    def sbatch(*flags, **commands: str) -> subprocess.Popen:
        (tmp_path / "bin").mkdir(exist_ok=True)
        for name, script in ({"torchrun": torchrun, "srun": SRUN, "scontrol": SCONTROL} | commands).items():
            (tmp_path / "bin" / name).write_text(script)
            (tmp_path / "bin" / name).chmod(0o755)
        command = ["bash", ROOT / "slurm.sh", "nodes", "--size", "14m", "--data", corpus, "--seq-len", 32, *flags]
        with (tmp_path / "log").open("a") as log:
            command = [*map(str, command)]
            return subprocess.Popen(command, cwd=tmp_path, env=os.environ | environment, stdout=log, stderr=log)

    return sbatch


@pytest.mark.slow
def test_slurm(sbatch, run, tmp_path):
    """A job that SLURM tells to stop saves and is queued again. The next job finishes the run."""
    flags, nodes = [*BITWISE, "--precision", "fp32", "--steps", 25], tmp_path / "nodes"
    job = sbatch(*flags)
    while made(nodes) < 10 and job.poll() is None:
        time.sleep(0.05)
    for task in (tmp_path / "tasks").read_text().split():
        os.kill(int(task), signal.SIGTERM)
    assert job.wait(60) == 0, (tmp_path / "log").read_text()
    assert (tmp_path / "requests").read_text() == "requeue 7\n"
    paused = made(nodes)
    assert 10 <= paused < 25
    assert sbatch(*flags).wait(60) == 0, (tmp_path / "log").read_text()
    assert (tmp_path / "requests").read_text() == "requeue 7\n"
    assert starts(nodes) == [(0, 2), (paused, 2)]
    assert_same_bits(nodes / "step25", run(*flags) / "step25")


def test_slurm_gives_up(sbatch, tmp_path):
    """A job that fails is queued again only if it has saved a checkpoint."""
    fails = "#!/usr/bin/env bash\nmkdir -p nodes/step8\nexit 1\n"
    assert sbatch(srun=fails).wait() == 0
    assert (tmp_path / "requests").read_text() == "requeue 7\n"
    assert sbatch(srun=fails).wait() == 1
    assert (tmp_path / "requests").read_text() == "requeue 7\n"
    assert (tmp_path / "log").read_text().endswith("not queued again\n")
