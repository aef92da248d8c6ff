"""Options of the suites, what they measured, and the tables, targets and comparison at the end."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import baseline
import pytest
import torch
from common import COUNT
from figures import WANTED, Book, Figures, Setting, Sizes
from tabulate import tabulate
from targets import lines

from backdoorbench_mcl.api import Images
from backdoorbench_mcl.provenance import collect, machine_class, supports_bf16

TESTS = Path(__file__).parents[1] / "tests"  # the toy plugin, and what its tests share
sys.path[:0] = [str(TESTS), str(TESTS / "toy")]

HEAD = ["task", "batch", "harness", "plain", "bare", "/ plain", "/ bare", "range", "n", ""]
BOOK = pytest.StashKey[Book]()
SETTING = pytest.StashKey[Setting]()
OLD = pytest.StashKey[dict[str, list[float]]]()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What is timed takes the time that it takes: the tests' limit of five minutes is none here."""
    for item in items:
        if item.path.parent == Path(__file__).parent:
            item.add_marker(pytest.mark.timeout(0))


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("throughput")
    group.addoption("--bench-device", default="cpu", help="cpu, cuda, cuda:1 ...")
    group.addoption(
        "--bench-precision", default="auto", choices=["auto", "fp32", "bf16"], help="of harness and bare loop"
    )
    group.addoption("--bench-threads", type=int, default=None, help="threads of torch (default: its own choice)")
    group.addoption("--bench-rounds", type=int, default=5, help="alternating runs of each contender")
    group.addoption("--bench-seconds", type=float, default=1.5, help="shortest duration of one run")
    group.addoption("--bench-cell", default="printed", choices=["short", "quick", "printed"], help="length of the cell")
    group.addoption("--bench-cell-rounds", type=int, default=3, help="cells of each contender")
    group.addoption("--bench-matrix-steps", type=int, default=30, help="training steps of each of four jobs")
    group.addoption("--bench-matrix-rounds", type=int, default=3, help="matrices of each kind")
    group.addoption("--bench-plan", type=int, default=10_000, help="cells to plan (the target is for 10000)")
    group.addoption("--bench-cells", type=int, default=1000, help="cells to run without compute (target: 1000)")
    group.addoption("--bench-save", type=Path, metavar="FILE", help="write the ratios to FILE")
    group.addoption("--bench-baseline", type=Path, metavar="FILE", help="fail where a ratio fell below FILE's")
    group.addoption("--bench-tolerance", type=float, default=baseline.TOLERANCE, help="of a ratio, as a share")


def _machine(setting: Setting) -> dict[str, Any]:
    cuda = setting.device.type == "cuda"
    return {
        "machine class": machine_class(str(setting.device)),
        "processor": torch.cuda.get_device_name(setting.device) if cuda else collect()["processor"],
        "device": str(setting.device),
        "precision": setting.precision,
        "threads": torch.get_num_threads(),
        "cell": setting.sizes.cell,
        "matrix steps": setting.sizes.matrix_steps,
        "torch": torch.__version__,
    }


def pytest_configure(config: pytest.Config) -> None:
    given = config.option
    if given.bench_threads is not None:
        torch.set_num_threads(given.bench_threads)
    device = torch.device(given.bench_device)
    fast = device.type == "cuda" or supports_bf16()
    half = given.bench_precision == "bf16" or (given.bench_precision == "auto" and fast)
    sizes = Sizes(
        given.bench_cell, given.bench_cell_rounds, given.bench_matrix_steps, given.bench_matrix_rounds,
        given.bench_plan, given.bench_cells,
    )  # fmt: skip
    setting = Setting(device, "bf16" if half else "fp32", given.bench_rounds, given.bench_seconds, sizes)
    config.stash[SETTING] = setting
    config.stash[BOOK] = Book()
    if given.bench_baseline is not None:  # before minutes are spent on what cannot be compared
        try:
            machine, old = baseline.load(given.bench_baseline)
            config.stash[OLD] = old
            baseline.require_alike(machine, _machine(setting))
        except baseline.Unlike as error:
            raise pytest.UsageError(str(error)) from error


@pytest.fixture(scope="session")
def images() -> Images:
    """Random ones: no step's time depends on their content."""
    rng = torch.Generator().manual_seed(0)
    x = torch.randint(0, 256, (COUNT, 3, 32, 32), generator=rng, dtype=torch.uint8)
    return Images(x, torch.randint(0, 10, (COUNT,), generator=rng))


@pytest.fixture(scope="session")
def setting(pytestconfig: pytest.Config) -> Setting:
    return pytestconfig.stash[SETTING]


@pytest.fixture
def book(pytestconfig: pytest.Config) -> Book:
    return pytestconfig.stash[BOOK]


@pytest.fixture
def record(book: Book) -> Callable[[Figures], None]:
    return book.throughput.append


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    config = session.config
    book = config.stash[BOOK]
    if config.option.bench_save is not None:
        baseline.save(config.option.bench_save, _machine(config.stash[SETTING]), book.ratios())
    if exitstatus == 0 and any(bad for _, bad in _compared(config)):
        session.exitstatus = 1


def _compared(config: pytest.Config) -> list[tuple[str, bool]]:
    if OLD not in config.stash:
        return []
    old = config.stash[OLD]
    return baseline.compare(old, config.stash[BOOK].ratios(), config.option.bench_tolerance)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    book = config.stash[BOOK]
    measured = book.throughput
    if not measured and not book.tasks:
        return
    setting = config.stash[SETTING]
    machine = _machine(setting)
    if measured:
        _throughput(terminalreporter, measured, setting, machine)
    terminalreporter.section("beside a plain control")
    for task in book.tasks.values():
        if task.unit == "x":
            terminalreporter.write_line(task.line())
    terminalreporter.section("targets")
    for line, met in lines(book.measured(), setting.precision, supports_bf16()):
        terminalreporter.write_line(line, green=met is True, red=met is False)
    for line, bad in _compared(config):
        terminalreporter.write_line(f"against {config.option.bench_baseline}: {line}", red=bad)


def _throughput(
    terminalreporter: pytest.TerminalReporter, measured: list[Figures], setting: Setting, machine: dict[str, Any]
) -> None:
    terminalreporter.section("throughput in images a second, median of n alternating runs")
    terminalreporter.write_line(
        f"{setting.device} ({machine['processor']}), {torch.get_num_threads()} threads, torch {torch.__version__}; "
        f"harness and bare loop in {setting.precision}, plain loop in fp32"
    )
    terminalreporter.write_line(tabulate([figures.row() for figures in measured], HEAD, tablefmt="github"))
    for figures in measured:
        if figures.ratio(figures.bare) < WANTED:
            terminalreporter.write_line(
                f"{figures.task}: {figures.ratio(figures.bare):.2f}, below {WANTED} of bare loop", red=True, bold=True
            )
