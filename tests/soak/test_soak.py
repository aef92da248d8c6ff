"""Thousands of cells in one driver: its memory, open files and temporary space stay flat. `tox -e soak` runs it.

BBMCL_SOAK: how many cells (2,000 there). Their jobs are as cheap as jobs can be: real children, a real store.
"""

from __future__ import annotations

import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from backdoorbench_mcl.store import Store

CELLS = int(os.environ.get("BBMCL_SOAK", "0"))
MB = 2**20
PER_CELL = 20e3  # bytes of memory that a finished cell may take: its row is kept for the table
QUERIES = {
    "a stage": "SELECT artefact FROM stage WHERE key = ?", "a row": "SELECT data FROM row WHERE key = ?",
    "the last attempt": "SELECT state FROM attempt WHERE key = ? ORDER BY n DESC LIMIT 1",
}  # fmt: skip

pytestmark = [
    pytest.mark.skipif(CELLS == 0, reason="takes half an hour; run it with: tox -e soak"),
    pytest.mark.timeout(4 * 3600),
]


@dataclass(frozen=True)
class Sample:
    """The driver at one moment. memory: resident bytes; handles: open files; entries, space: of its temporary files."""

    done: int
    memory: int
    handles: int
    entries: int
    space: int


def sample(pid: int, done: int, temporary: Path) -> Sample | None:
    """None once the driver has ended."""
    try:
        resident = int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        handles = len(os.listdir(f"/proc/{pid}/fd"))
    except (OSError, IndexError):
        return None
    entries, space = 0, 0
    for at, folders, names in os.walk(temporary):
        entries += len(folders) + len(names)
        for name in names:
            try:
                space += os.lstat(os.path.join(at, name)).st_size
            except FileNotFoundError:  # jobs come and go
                continue
    return Sample(done, resident, handles, entries, space) if resident else None


def quarters(samples: Sequence[Sample]) -> tuple[list[Sample], list[Sample]]:
    """The samples between 10 and 25 % of the cells, when everything is warm, and those beyond 75 %."""
    early = [s for s in samples if 0.10 * CELLS <= s.done < 0.25 * CELLS]
    late = [s for s in samples if s.done >= 0.75 * CELLS]
    assert len(early) > 5
    assert len(late) > 5
    return early, late


def test_a_long_run_stays_flat(toy_env: dict[str, str], tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    command = [
        sys.executable, "-m", "backdoorbench_mcl.cli", "matrix", "--dataset", "tiny", "--model", "tiny-net",
        "--clean-rate", "0.2", "--attacks", "badnets", "--defenses", "same", "--set", "badnets.target=1",
        "--set", "badnets.rate=0.2", "--set", "train.steps=200", "--seeds", "0-1",
        "--defense-seeds", f"0-{CELLS // 2 - 1}", "--runs", str(runs), "--workers", "2", "--threads-per-job", "1",
    ]  # fmt: skip
    samples: list[Sample] = []
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="bs-") as temporary, (tmp_path / "err").open("w+") as err:
        process = subprocess.Popen(
            command, env={**toy_env, "TMPDIR": temporary}, stdout=subprocess.DEVNULL, stderr=err, text=True
        )
        while process.poll() is None:
            time.sleep(1.0)
            told = re.findall(r"^\[(\d+)/", (tmp_path / "err").read_text(), re.MULTILINE)
            done = int(told[-1]) if told else 0  # of fast cells only some have a line
            if (found := sample(process.pid, done, Path(temporary))) is not None:
                samples.append(found)
        assert process.returncode == 0, (tmp_path / "err").read_text()[-2000:]
        left = list(Path(temporary).glob("bbmcl-*"))
    seconds = time.monotonic() - started
    early, late = quarters(samples)
    cells = statistics.median(s.done for s in late) - statistics.median(s.done for s in early)
    growth = statistics.median(s.memory for s in late) - statistics.median(s.memory for s in early)
    handles = [statistics.median(s.handles for s in part) for part in (early, late)]
    store = Store(runs)
    rows, stages = store.rows(), store.stages()
    took = [_seconds(store, row.key) for row in rows[:: max(1, len(rows) // 200)]]
    print(
        f"\n{len(rows)} cells in {seconds:.0f} s; driver {early[0].memory / MB:.0f} -> {late[-1].memory / MB:.0f} MB, "
        f"{growth / cells / 1e3:.1f} kB a cell; open files {handles[0]:g} -> "
        f"{handles[1]:g}; temporary files {max(s.entries for s in early)} -> "
        f"{max(s.entries for s in late)}, {max(s.space for s in early) / MB:.1f} -> "
        f"{max(s.space for s in late) / MB:.1f} MB; {len(stages)} stages, a row found in "
        f"{1e3 * statistics.median(took):.2f} ms (slowest {1e3 * max(took):.2f})"
    )
    assert len(rows) == CELLS + 2  # with the two undefended victims
    assert {row.state for row in rows} == {"ok"}
    assert growth < PER_CELL * cells
    assert handles[1] <= handles[0]  # medians: at the moment at which two jobs start there are a few more
    assert max(s.entries for s in late) <= max(s.entries for s in early) + 20
    assert max(s.space for s in late) <= 2 * max(s.space for s in early)
    assert left == []
    assert not any((runs / "locks").glob("?" * 64))
    assert not any((runs / "snapshots").iterdir())
    for name, query in QUERIES.items():
        ((*_, plan),) = store.ledger.read(f"EXPLAIN QUERY PLAN {query}", rows[0].key)
        assert "USING INDEX" in plan, f"{name} is found by reading the table: {plan}"
    store.close()


def _seconds(store: Store, key: str) -> float:
    started = time.perf_counter()
    assert store.row(key) is not None
    return time.perf_counter() - started
