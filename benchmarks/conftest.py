"""Options of the throughput suite, and the table that it prints when all is measured."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from figures import WANTED, Figures, Setting
from tabulate import tabulate

from backdoorbench_mcl.provenance import collect, supports_bf16

HEAD = ["task", "batch", "harness", "plain", "bare", "/ plain", "/ bare", "range", "n", ""]
MEASURED = pytest.StashKey[list[Figures]]()
SETTING = pytest.StashKey[Setting]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("throughput")
    group.addoption("--bench-device", default="cpu", help="cpu, cuda, cuda:1 ...")
    group.addoption(
        "--bench-precision", default="auto", choices=["auto", "fp32", "bf16"], help="of harness and bare loop"
    )
    group.addoption("--bench-threads", type=int, default=None, help="threads of torch (default: its own choice)")
    group.addoption("--bench-rounds", type=int, default=5, help="alternating runs of each contender")
    group.addoption("--bench-seconds", type=float, default=1.5, help="shortest duration of one run")


def pytest_configure(config: pytest.Config) -> None:
    given = config.option
    if given.bench_threads is not None:
        torch.set_num_threads(given.bench_threads)
    device = torch.device(given.bench_device)
    fast = device.type == "cuda" or supports_bf16()
    half = given.bench_precision == "bf16" or (given.bench_precision == "auto" and fast)
    config.stash[SETTING] = Setting(device, "bf16" if half else "fp32", given.bench_rounds, given.bench_seconds)
    config.stash[MEASURED] = []


@pytest.fixture
def setting(pytestconfig: pytest.Config) -> Setting:
    return pytestconfig.stash[SETTING]


@pytest.fixture
def record(pytestconfig: pytest.Config) -> Callable[[Figures], None]:
    return pytestconfig.stash[MEASURED].append


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    measured = config.stash[MEASURED]
    if not measured:
        return
    setting = config.stash[SETTING]
    cuda = setting.device.type == "cuda"
    name = torch.cuda.get_device_name(setting.device) if cuda else collect()["processor"]
    terminalreporter.section("throughput in images a second, median of n alternating runs")
    terminalreporter.write_line(
        f"{setting.device} ({name}), {torch.get_num_threads()} threads, torch {torch.__version__}; "
        f"harness and bare loop in {setting.precision}, plain loop in fp32"
    )
    terminalreporter.write_line(tabulate([figures.row() for figures in measured], HEAD, tablefmt="github"))
    for figures in measured:
        if figures.ratio(figures.bare) < WANTED:
            terminalreporter.write_line(
                f"{figures.task}: {figures.ratio(figures.bare):.2f}, below {WANTED} of bare loop", red=True, bold=True
            )
