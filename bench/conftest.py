"""What `pytest bench` prints around the measurements, and adds to --benchmark-json."""

from importlib.metadata import PackageNotFoundError, version

import pytest

from bench.ceilings import machine
from bench.kernel_peers import setting
from bench.kernel_report import table

CASES = pytest.StashKey[list[dict]]()


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    config.stash[CASES] = []
    config.option.benchmark_quiet = True  # the table here says more than that of pytest-benchmark


@pytest.fixture
def report(request):
    """A function that puts a case, measured or missing, into the table."""
    return request.config.stash[CASES].append


def pytest_report_header() -> str:
    here = setting()
    facts = machine(here.device)
    tokens = {f"{here.batch} x {config.seq_len}" for config in here.sizes.values()} if here.sizes else {"8 x 2048"}
    line = f"kernels on {facts['gpu'] or facts['cpu']}: {' '.join(tokens)} tokens, {here.dtype}"
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
