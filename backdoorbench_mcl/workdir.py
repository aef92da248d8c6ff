"""The temporary folder of a run: locked while its driver lives, so that a later run can clear what a killed one left.

Job folders hold clean images and weights; after a SIGKILL nobody else would ever remove them.
"""

from __future__ import annotations

import fcntl
import shutil
import tempfile
from pathlib import Path

PREFIX = "bbmcl-run-"
_LOCK = "lock"


class WorkFolder:
    """A new folder in the temporary directory; `close` removes it. Making one removes those of dead drivers."""

    def __init__(self) -> None:
        sweep(Path(tempfile.gettempdir()))
        self.path = Path(tempfile.mkdtemp(prefix=PREFIX))
        self._lock = (self.path / _LOCK).open("wb")
        fcntl.flock(self._lock, fcntl.LOCK_EX)

    def close(self) -> None:
        """Remove the folder with all that is in it."""
        shutil.rmtree(self.path, ignore_errors=True)
        self._lock.close()


def sweep(folder: Path) -> None:
    """Remove the work folders below `folder` whose lock nobody holds any more; other users' are left alone."""
    for old in folder.glob(f"{PREFIX}*"):
        try:
            with (old / _LOCK).open("r+b") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(old, ignore_errors=True)
        except OSError:  # held by a living driver, being made right now, or not ours
            continue


__all__ = ["PREFIX", "WorkFolder", "sweep"]
