"""What an engine is: it runs job folders and tells how they fare (design 3.5). Free of torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

Isolation = Literal["landlock", "process", "inline"]
LOG = "log.txt"
RESULT = "result.json"
FUNCTION = "backdoorbench_mcl.functions:Function"  # the model that a function of the user's builds


@dataclass(frozen=True)
class Progress:
    """A running job moved on: `done` of `total` steps, `rate` images per second since it began to report."""

    folder: Path
    done: int
    total: int
    rate: float


@dataclass(frozen=True)
class Finished:
    """A job ended. state: "ok", "failed", "diverged", "n/a", "killed", "timeout"; result: what the job wrote, or {};
    made: "machine", "versions" and "origin" of the machine that ran it, {} where that is the driver's.
    """

    folder: Path
    state: str
    reason: str
    log: str
    result: Mapping[str, Any] = field(default_factory=dict)
    made: Mapping[str, Any] = field(default_factory=dict)


class Engine(Protocol):
    """Runs jobs somewhere.

    Example: `if engine.free > 0: engine.start(folder)`, then `for event in engine.events(): ...` until it is
    `Finished`; `engine.close()` in any case.
    """

    spreads: bool  # whether it finds the device of each job by itself

    @property
    def free(self) -> int:
        """Jobs that may be started now."""

    def start(self, folder: Path) -> None:
        """Run the job in `folder`; `events` will tell of it."""

    def events(self, patience: float = 0.1) -> Sequence[Progress | Finished]:
        """What happened since the last call; waits up to `patience` seconds for something to happen."""

    def close(self) -> None:
        """End what still runs and wait for it."""


def named(spec: Mapping[str, Any]) -> list[str]:
    """The classes and functions, as "module:name", that a job's spec has its process import.

    Example: `named({"model": {"kind": "model", "target": "m:Net"}, "threads": 1})` is `["m:Net"]`
    """
    found = [str(part["target"]) for part in spec.values() if isinstance(part, dict) and "kind" in part]
    for need in spec.get("needs", {}).values():
        found += need.get("modules", [])
    return [*found, *functions(spec), *(how["function"] for how in spec.get("rebuild", {}).values())]


def functions(spec: Mapping[str, Any]) -> list[str]:
    """The functions of the user's, as "module:name", that build networks of a job; they may lie in the working
    directory.
    """
    parts = [part for part in spec.values() if isinstance(part, dict) and part.get("target") == FUNCTION]
    return [str(part["params"]["function"]) for part in parts]


__all__ = ["FUNCTION", "LOG", "RESULT", "Engine", "Finished", "Isolation", "Progress", "functions", "named"]
