"""The header and the table of `pytest bench`, and what it adds to --benchmark-json.

This file is not in bench/kernels, because pytest calls the header hook only in conftest files that it loads at start.
"""

from importlib.metadata import PackageNotFoundError, version

import pytest

from bench.ceilings import machine
from bench.kernels.peers import setting
from bench.kernels.report import table

CASES = pytest.StashKey[list[dict]]()


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    config.stash[CASES] = []
    config.option.benchmark_quiet = True  # our table replaces that of pytest-benchmark


@pytest.fixture
def report(request):
    """A function that adds a case, measured or missing, to the table."""
    return request.config.stash[CASES].append


def pytest_report_header() -> str:
    here = setting()
    host = machine(here.device)
    tokens = {f"{here.batch} x {config.seq_len}" for config in here.sizes.values()} if here.sizes else {"8 x 2048"}
    line = f"kernels on {host['gpu'] or host['cpu']}: {' '.join(tokens)} tokens, {here.dtype}"
    return f"{line}; {here.note}" if here.note else line


def pytest_benchmark_update_machine_info(machine_info: dict) -> None:
    machine_info["tripod"] = machine(setting().device)
    for package in ("triton", "flash-attn"):
        try:
            machine_info["tripod"]["versions"][package] = version(package)
        except PackageNotFoundError:
            machine_info["tripod"]["versions"][package] = None


def pytest_benchmark_update_json(config: pytest.Config, output_json: dict) -> None:
    output_json["missing"] = [case for case in config.stash[CASES] if "missing" in case]


def pytest_terminal_summary(terminalreporter, config: pytest.Config) -> None:
    if cases := config.stash[CASES]:
        terminalreporter.section("kernels")
        terminalreporter.write_line(table(cases))
