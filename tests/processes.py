"""The process table, and waiting for it to change."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Process:
    """A living process, as in /proc/PID/stat and /proc/PID/cmdline."""

    pid: int
    parent: int
    session: int
    command: str = ""


def processes() -> list[Process]:
    """All that live; a zombie is dead."""
    found = []
    for file in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = file.read_text().rpartition(")")[2].split()  # what follows the name, which may hold anything
            command = (file.parent / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if fields[0] not in "ZX":
            found.append(Process(int(file.parent.name), int(fields[1]), int(fields[3]), command))
    return found


def members(session: int) -> list[Process]:
    """The living processes of a session."""
    return [process for process in processes() if process.session == session]


def below(pid: int, every: list[Process] | None = None) -> list[Process]:
    """Descendants of a process, among `every` if that was asked for before."""
    every = processes() if every is None else every
    found: list[Process] = []
    parents = {pid}
    while parents:
        children = [process for process in every if process.parent in parents]
        found += children
        parents = {process.pid for process in children}
    return found


def wait_until(condition: Callable[[], bool], seconds: float) -> bool:
    """Whether `condition` came true within `seconds`."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True
