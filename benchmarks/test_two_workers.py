"""Independent jobs through the real engine: two workers of one thread against one worker that has both cores.

Four victims of WRN-16-1 on `shapes`, `--bench-matrix-steps` each, stored in a folder of their own; each matrix begins
with an engine that has started already. The images judged are the whole test set, clean and triggered, after each.
"""

from __future__ import annotations

import io
import time
from pathlib import Path

import pytest
from figures import Book, Setting

from backdoorbench_mcl import plan, request, runner
from backdoorbench_mcl.engines.local import Local
from backdoorbench_mcl.grant import Grants
from backdoorbench_mcl.matrix import Matrix
from backdoorbench_mcl.progress import Progress
from backdoorbench_mcl.provenance import cores
from backdoorbench_mcl.registry import cache_folder
from backdoorbench_mcl.request import Options
from backdoorbench_mcl.store import Store


def seconds(wanted: request.Request, runs: Path, workers: int, threads: int) -> tuple[float, float]:
    """What a matrix took, and what a cell of it cost beyond the clocks of its jobs: processes, files, their reading."""
    graph, store = plan.build(wanted), Store(runs)
    grants = Grants(wanted.data, store, device="cpu", precision=wanted.precision, threads=threads, isolation="process")
    with Progress(len(graph.cells), io.StringIO(), False) as display, Local(workers) as engine:
        started = time.perf_counter()
        rows = Matrix(graph, store, grants, engine, display).run()
        taken = time.perf_counter() - started
    beyond = sum(stage.cost["wall"] - stage.cost["seconds"] for stage in store.stages())
    store.close()
    assert {row.state for row in rows} <= {"ok", "n/a"}
    return taken, beyond / len(rows)


def test_matrix(book: Book, setting: Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if cores() < 2 or setting.device.type != "cpu":
        pytest.skip("needs two cores, and no GPU that both jobs would share")
    monkeypatch.setenv("BBMCL_CACHE", str(tmp_path / "cache"))
    sets = (f"train.steps={setting.sizes.matrix_steps}",)
    options = Options("badnets", "none", "shapes", seeds="0-3", precision=setting.precision, overrides=sets)
    known = runner.registry()
    wanted = request.resolve(options, known, runner.prepare_data(known, cache_folder()))
    for number in range(setting.sizes.matrix_rounds):
        alone, beyond = seconds(wanted, tmp_path / f"alone-{number}", 1, 2)
        paired, _ = seconds(wanted, tmp_path / f"paired-{number}", 2, 1)
        book.add("hand-over", beyond, "train, trial and predict of an undefended victim of shapes", "s")
        book.add("matrix", alone / paired, f"4 victims: {alone:.1f} s one after the other, {paired:.1f} s two at once")
