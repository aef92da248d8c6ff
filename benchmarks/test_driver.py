"""What the driver itself takes: planning, running cells without compute (`echo.py`), running a finished matrix again.

The toy plugin of the tests is used: planning does not ask what a network computes. `--bench-plan`, `--bench-cells`.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import small
from common import timed
from echo import asked, drive
from figures import Book, Setting

from backdoorbench_mcl import plan


@pytest.fixture(autouse=True)
def toy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    small.install_toy(monkeypatch, str(tmp_path / "cache"))


def test_planning(book: Book, setting: Setting) -> None:
    wanted = asked(setting.sizes.plan)
    for _ in range(3):
        seconds, made = timed(lambda: plan.build(wanted))
        cells = len(made.cells)
        note = f"{cells} cells in {seconds:.2f} s" + ("" if cells >= 10_000 else ", scaled up")
        book.add("plan 10,000", seconds * 10_000 / cells, note, "s")
    assert cells >= setting.sizes.plan


def test_cells_without_compute(book: Book, setting: Setting, tmp_path: Path) -> None:
    wanted, few = asked(setting.sizes.cells), asked(1)
    graph = plan.build(wanted)
    warm, first = timed(lambda: drive(few, plan.build(few), tmp_path / "few", tmp_path / "kept-few"))  # every sort once
    seconds, rows = timed(lambda: drive(wanted, graph, tmp_path / "runs", tmp_path / "kept"))
    more = len(rows) - len(first)
    own = max(0.0, seconds - warm) / more if more else seconds / len(rows)
    book.add("driver", own, f"{len(rows)} cells in {seconds:.1f} s, of which {warm:.1f} s for each job once", "s")
    for _ in range(3):
        again, same = timed(lambda: drive(wanted, plan.build(wanted), tmp_path / "runs", tmp_path / "none"))
        assert len(same) == len(rows)
        note = f"{len(rows)} cells in {again:.2f} s" + ("" if len(rows) >= 1000 else ", scaled up")
        book.add("rerun 1,000", again * 1000 / len(rows), note, "s")
