"""Which GPU a job gets. Free of torch.

A GPU without a job takes any; one that has jobs takes another only where memory that was measured says that all fit.
A job that was measured to take nothing of a GPU has room on any, and takes none from others.
"""

from __future__ import annotations

import subprocess
from collections.abc import Mapping, Sequence

CONTEXT = 600.0  # MiB that a process takes of a GPU beside what it reserves: its context and libraries
ROOM = 0.9  # of a GPU's memory: another run of the same job may reserve a little more


class Devices:
    """The devices of a run. names: as a job knows them, "cpu" or "cuda:N"; memory: MiB that were free, of those known;
    shared: somebody else sees to it that jobs fit.
    """

    def __init__(self, names: Sequence[str], memory: Mapping[str, float], shared: bool = False) -> None:
        self.shared = shared
        self.names = list(names)
        self.memory = dict(memory)
        self.held: dict[str, list[float | None]] = {name: [] for name in names}

    def place(self, need: float | None) -> str | None:
        """The device for a job that reserves `need` MiB, None where that was not measured; None where none has room.

        It is the one with the fewest jobs that can take it. Example: `Devices(["cuda:0"], {}).place(None)`
        """
        able = [name for name in self.names if self._takes(name, need)]
        if not able:
            return None
        best = min(able, key=lambda name: len(self.held[name]))
        self.held[best].append(need)
        return best

    def _takes(self, name: str, need: float | None) -> bool:
        held = [size for size in self.held[name] if size != 0]
        if self.shared or need == 0 or not held or not name.startswith("cuda"):
            return True
        together = [*held, need]
        known = [size for size in together if size is not None]
        room = ROOM * self.memory.get(name, 0.0)
        return len(known) == len(together) and sum(known) + CONTEXT * len(known) <= room

    def empty(self) -> Devices:
        """The same devices without any job."""
        return Devices(self.names, self.memory, self.shared)

    def release(self, name: str, need: float | None) -> None:
        """A job that was placed has ended."""
        self.held[name].remove(need)


def measure(names: Sequence[str]) -> dict[str, float]:
    """MiB that are free on each GPU, those of the fullest that the driver's own tool tells of, since it may number them
    otherwise. What others take is gone; that others may take more later cannot be known.

    {} without GPUs, and where the tool is missing.
    """
    wanted = [name for name in names if name.startswith("cuda")]
    if not wanted:
        return {}
    command = ["nvidia-smi", "--query-gpu=memory.free", "--format=csv,noheader,nounits"]
    try:
        told = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
        smallest = min(float(line) for line in told.split())
    except (OSError, ValueError, subprocess.SubprocessError):
        return {}
    return dict.fromkeys(wanted, smallest)


__all__ = ["CONTEXT", "ROOM", "Devices", "measure"]
