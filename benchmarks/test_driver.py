"""What the driver itself takes: planning, running cells without compute (`echo.py`), running a finished matrix again.

The toy plugin of the tests is used: planning does not ask what a network computes. `--bench-plan`, `--bench-cells`.
"""

from __future__ import annotations

import io
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import small
from echo import Echo
from figures import Book, Setting

from backdoorbench_mcl import plan, request
from backdoorbench_mcl.grant import Grants
from backdoorbench_mcl.matrix import Matrix
from backdoorbench_mcl.progress import Progress
from backdoorbench_mcl.store import Store

ATTACKS, DEFENSES, DEFENSE_SEEDS = "badnets,blend", "ft,mcldef", 5
PER_SEED = 2 * 2 * DEFENSE_SEEDS


def timed(body: Callable[[], Any]) -> tuple[float, Any]:
    started = time.perf_counter()
    found = body()
    return time.perf_counter() - started, found


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[int], request.Request]:
    """A request for a number of cells, in twenties."""
    small.install_toy(monkeypatch, str(tmp_path / "cache"))

    def ask(cells: int) -> request.Request:
        seeds = f"0-{max(0, -(-cells // PER_SEED) - 1)}"
        return small.resolve(small.options(ATTACKS, DEFENSES, seeds=seeds, defense_seeds=f"0-{DEFENSE_SEEDS - 1}"))

    return ask


def test_planning(book: Book, setting: Setting, asked: Callable[[int], request.Request]) -> None:
    wanted = asked(setting.sizes.plan)
    for _ in range(3):
        seconds, made = timed(lambda: plan.build(wanted))
        cells = len(made.cells)
        note = f"{cells} cells in {seconds:.2f} s" + ("" if cells >= 10_000 else ", scaled up")
        book.add("plan 10,000", seconds * 10_000 / cells, note, "s")
    assert cells >= setting.sizes.plan


def run(wanted: request.Request, runs: Path, kept: Path) -> list[Any]:
    kept.mkdir()
    graph = plan.build(wanted)
    store = Store(runs)
    grants = Grants(wanted.data, store, device="cpu", precision="fp32", threads=1, isolation="process")
    with Progress(len(graph.cells), io.StringIO(), False) as display, Echo(2, kept) as engine:
        rows = Matrix(graph, store, grants, engine, display).run()
    store.close()
    return rows


def test_cells_without_compute(
    book: Book, setting: Setting, asked: Callable[[int], request.Request], tmp_path: Path
) -> None:
    wanted, runs = asked(setting.sizes.cells), tmp_path / "runs"
    few = asked(1)
    warm, first = timed(lambda: run(few, tmp_path / "few", tmp_path / "kept-few"))  # every sort of job once
    seconds, rows = timed(lambda: run(wanted, runs, tmp_path / "kept"))
    assert {row.state for row in rows} == {"ok"}
    more = len(rows) - len(first)
    own = max(0.0, seconds - warm) / more if more else seconds / len(rows)
    book.add("overhead", own, f"{len(rows)} cells in {seconds:.1f} s, of which {warm:.1f} s for each job once", "s")
    for number in range(3):
        again, same = timed(lambda number=number: run(wanted, runs, tmp_path / f"kept-{number}"))  # type: ignore[misc]
        assert len(same) == len(rows)
        note = f"{len(rows)} cells in {again:.2f} s" + ("" if len(rows) >= 1000 else ", scaled up")
        book.add("rerun 1,000", again * 1000 / len(rows), note, "s")
