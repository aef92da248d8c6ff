"""One job from a driver that waits for it. Free of torch (but for inline)."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from .. import artefacts
from ..errors import UserError
from ..workdir import WorkFolder
from .base import Engine, Finished
from .local import Local

DEFAULTS: Mapping[str, Any] = {
    "device": "cpu", "precision": "fp32", "threads": 1, "isolation": "landlock", "snapshot_every": 2.0, "readable": [],
    "seeds": {"init": 0},
}  # fmt: skip


def _nothing(into: Path) -> None:
    """For a job without inputs."""


@contextlib.contextmanager
def run_one(
    spec: Mapping[str, Any], fill: Callable[[Path], object] = _nothing, *, timeout: float | None = None,
    memory: float | None = None, about: str = "", engine: Engine | None = None,
) -> Iterator[Path]:  # fmt: skip
    """Run one job in a child; a block with its `out`, which holds ordinary files only and is gone at the end.

    engine: one that has nothing else to do, None for one of its own with these limits (timeout: seconds, memory: GB).
    spec: of the job, at least "job"; what else every job has is that of `DEFAULTS`. fill: writes its inputs into the
    folder that it gets. isolation "landlock" is what the kernel can of it; beside `out` lies `result.json`, which tells
    what was reached. Raises UserError with the job's line, behind `about`, for one that failed, and for a file in
    "readable" that is not there. Example: `with run_one({"job": "open", ...}) as out: meta = read_meta(out)`
    """
    full = {**DEFAULTS, **spec}
    for path in full["readable"]:
        if not Path(path).exists():
            raise UserError(f"{about}{path}: there is no such file")
    work = WorkFolder()
    try:
        folder = work.path / str(full["job"])
        (folder / "in").mkdir(parents=True)
        fill(folder / "in")
        (folder / "spec.json").write_text(json.dumps({"snapshot": str(folder / "snapshots"), **full}))
        if engine is not None:
            event = ended(engine, folder)
        else:
            with Local(1, timeout, full["isolation"] == "inline", memory) as own:
                event = ended(own, folder)
        if event.state != "ok":
            raise UserError(f"{about}{event.reason}")
        try:
            artefacts.require_plain(folder / "out")
        except artefacts.Damaged as error:
            raise UserError(f"{about}left a result of no use: {error}") from error
        yield folder / "out"
    finally:
        work.close()


def ended(engine: Engine, folder: Path) -> Finished:
    """Run the job in `folder` on an engine that has nothing else to do: how it ended."""
    engine.start(folder)
    while True:
        for event in engine.events():
            if isinstance(event, Finished):
                return event


__all__ = ["DEFAULTS", "ended", "run_one"]
