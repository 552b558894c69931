"""The layout: imports go down the floors and never in a circle, and functions fit one screen."""

import ast
import os
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# A file may import from its own floor and from the floors below. `tests` and `bench` may import everything.
FLOORS = [
    {"kernels", "runtime"},
    {"model", "corpus"},
    {"data", "generate", "parallel", "plan"},
    {"step", "checkpoints"},
    {"train", "settings", "checkpoint", "studies", "bench"},
]
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
NOBODY_IMPORTS = {"train", "checkpoint", "generate", "studies"}  # commands; only bench/ imports bench
TOO_LONG: set[str] = set()  # functions that may exceed 60 lines: none

FILES = sorted(p for p in ROOT.rglob("*.py") if p.relative_to(ROOT).parts[0].removesuffix(".py") in FLOOR)


def module(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module(path) for path in FILES}


def imports(path: Path) -> set[str]:
    """The modules of this project that a file imports, also inside of functions."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            submodules = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= submodules & MODULES or {node.module}
    return {name for name in found if name in MODULES}


def room(name: str) -> str:
    return name.partition(".")[0]


def test_every_file_of_the_root_and_every_folder_is_on_a_floor():
    names = {p.stem for p in ROOT.glob("*.py")} | {p.parent.name for p in ROOT.glob("*/*.py")}
    assert names - FLOOR.keys() - {"tests", "docs"} == set()


@pytest.mark.parametrize("path", FILES, ids=module)
def test_imports_go_down(path):
    here = module(path)
    for name in imports(path):
        assert FLOOR[room(name)] <= FLOOR[room(here)], f"{here} imports {name} of a higher floor"
        assert room(name) not in NOBODY_IMPORTS or room(here) in ("studies", "bench"), f"{here} imports {name}"
        assert room(name) != "bench" or room(here) == "bench", f"{here} imports {name}"


def test_no_circle():
    tuple(TopologicalSorter({module(path): imports(path) - {module(path)} for path in FILES}).static_order())


def test_no_circle_of_rooms():
    graph: dict[str, set[str]] = {}
    for path in FILES:
        here = room(module(path))
        graph.setdefault(here, set()).update(room(name) for name in imports(path) if room(name) != here)
    tuple(TopologicalSorter(graph).static_order())


def test_no_function_over_60_lines():
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and room(module(path)) != "bench":
                lines = node.end_lineno - node.lineno + 1
                assert lines <= 60 or node.name in TOO_LONG, f"{path}:{node.lineno} {node.name} has {lines} lines"


OPTIONAL = (
    "zstandard",
    "matplotlib",
    "litgpt",
    "liger_kernel",
    "flash_attn",
    "pytest_benchmark",
    "wandb",
    "tensorboard",
    "pyarrow",
    "scipy",
)


def test_tests_and_benchmarks_import_without_optional_packages():
    """A machine with a GPU may lack them, and one failed import would stop all tests there."""
    block = f"import sys; sys.modules.update(dict.fromkeys({OPTIONAL})); import pytest, bench.all, bench.roofline; "
    collect = block + "sys.exit(pytest.main(['--collect-only', '-qq', '-m', 'gpu', 'tests']))"
    environment = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    done = subprocess.run([sys.executable, "-c", collect], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
