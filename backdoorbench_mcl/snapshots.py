"""Epoch snapshots in a folder: safetensors and JSON in one file, replaced atomically."""

from __future__ import annotations

import errno
import json
import os
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

_FILE = "snapshot.safetensors"
_SPENT = "harness.seconds"  # in the meta: what it took to get there
MOST = 1e9  # seconds: what is more was not written by a snapshot


class Clock:
    """What a job has taken by now. earlier: seconds of the processes before this one, up to the snapshot of theirs."""

    def __init__(self) -> None:
        self.earlier = 0.0
        self._started = time.monotonic()

    def spent(self) -> float:
        """Seconds of the job, with those of the earlier processes."""
        return self.earlier + time.monotonic() - self._started


class FolderSnapshot:
    """`api.Snapshot` in `folder` (made when first needed). Saves closer together than `every` seconds are skipped.

    clock: of the job, of which there may be several snapshots; a snapshot keeps what the job had taken by then.
    """

    def __init__(self, folder: Path, every: float = 2.0, clock: Clock | None = None) -> None:
        self.folder = folder
        self.every = every
        self.clock = clock or Clock()
        self._last: float | None = None

    def load(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """The newest snapshot, or None: there is none, or it cannot be read (then the work starts over)."""
        file = self.folder / _FILE
        if not file.is_file():  # safetensors would wait for a pipe
            return None
        try:
            with safe_open(file, framework="pt") as found:
                meta = json.loads((found.metadata() or {})["meta"])
                if not isinstance(meta, dict):
                    return None
                tensors = {name: found.get_tensor(name) for name in found.keys()}  # noqa: SIM118 (not a dict)
                spent = meta.pop(_SPENT, 0.0)
                if self._last is None and isinstance(spent, int | float) and 0 < spent < MOST:  # else of this process
                    self.clock.earlier = max(self.clock.earlier, spent)
                return tensors, meta
        except (OSError, SafetensorError, KeyError, ValueError, RecursionError):
            return None

    def save(self, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
        """Replace the snapshot; a reader sees the old or the new one, never a part."""
        if self._last is not None and time.monotonic() - self._last < self.every:
            return
        if self.folder.is_symlink():  # nobody here makes one: it leads to what is not ours to write
            self.folder.unlink()
        self.folder.mkdir(parents=True, exist_ok=True)
        scratch = self.folder / f"{_FILE}.{os.getpid()}"
        scratch.unlink(missing_ok=True)  # a link, again
        plain = {name: tensor.contiguous() for name, tensor in tensors.items()}
        try:  # straight from the tensors: `save` makes bytes first, at twice their memory
            save_file(plain, scratch, {"meta": json.dumps({**meta, _SPENT: self.clock.spent()})})
        except SafetensorError as error:  # what the file system said stands in its text alone
            number = re.search(r"os error (\d+)", str(error))
            raise OSError(int(number[1]) if number else errno.EIO, str(error), str(scratch)) from error
        with scratch.open("rb") as handle:
            os.fsync(handle.fileno())
        scratch.replace(self.folder / _FILE)
        self._last = time.monotonic()


__all__ = ["Clock", "FolderSnapshot"]
