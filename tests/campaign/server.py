"""A fork server: imports torch and the trainer once, then runs scripts in forked processes. An import takes seconds.

It reads one JSON object a line. {"script", "argv", "log", "environment"} starts a process that runs the text of a
script, and answers with its id; {"wait": id} answers with its exit status. harness.py has the other end.
"""

import atexit
import gc
import json
import os
import sys
import threading
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
import numpy.random  # noqa: F401 (imported here, so that no forked process has to)
import torch
import torch.distributed.distributed_c10d

import generate  # noqa: F401
import train  # noqa: F401
from model import SIZES, Pythia
from step import make_optimizer


def import_what_a_step_imports() -> None:
    model = Pythia(replace(SIZES["14m"], layers=1, hidden=16, heads=2, vocab=40), seed=0)
    optimizer = make_optimizer(model, 1e-3)
    model(torch.zeros(1, 4, dtype=torch.long)).sum().backward()
    optimizer.step()


def serve() -> dict:
    """Answer requests. Returns a request, in the process that is to carry it out."""
    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            answer = os.waitstatus_to_exitcode(os.waitpid(request["wait"], 0)[1])
        elif not (answer := os.fork()):
            return request
        print(answer, flush=True)
    raise SystemExit(0)


def run(request: dict) -> int:
    """Run a script in this process. Returns the exit status that Python would give it."""
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.environ.update(request["environment"])
    sys.argv = request["argv"]
    try:
        exec(compile(request["script"], sys.argv[0], "exec"), {"__name__": "__main__"})
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        sys.excepthook(*sys.exc_info())
        return 1
    return 0


if __name__ == "__main__":
    torch.set_num_threads(1)
    import_what_a_step_imports()
    assert len([*Path("/proc/self/task").iterdir()]) == 1, "only a process with one thread can be forked"
    gc.collect()
    gc.freeze()  # the collector of a child would touch, and so copy, all memory of this process
    print("ready", flush=True)
    status = run(serve())
    # As Python ends a process, but without taking apart what it imported: that takes a second.
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    os._exit(status)
