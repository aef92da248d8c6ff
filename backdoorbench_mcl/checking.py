"""`bbmcl check`: every check in a child process, so that a method that hangs or crashes costs that check alone.

Free of torch; the checks themselves are in `testing`, which the child imports.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from .errors import UserError
from .text import one_line

SECONDS = 120.0  # that one check may take
STARTING = 120.0  # that importing torch and the method may take


@dataclass(frozen=True)
class Result:
    """How one check went. seconds: what it took, 0 where nobody can say."""

    check: str
    state: Literal["ok", "failed", "skipped"]
    message: str = ""
    seconds: float = 0.0


def run(spec: Mapping[str, Any], only: Sequence[str] = (), seconds: float = SECONDS) -> Iterator[Result]:
    """Run the checks that concern a method, or those named in `only`, each result as soon as it is there.

    spec: "kind", "target", "params", "label", as `testing.Subject` has them. A child runs one check after the other;
    where it dies or takes too long over one, that one has failed and a new child goes on with the next. Raises
    UserError for a name in `only` that is no check of such a method, for seconds that are no number above 0, and where
    the child cannot even begin.
    """
    if not 0 < seconds < math.inf:
        raise UserError(f"--timeout {seconds:g}: expected a number of seconds above 0")
    left: list[str] | None = None
    while left is None or left:
        with tempfile.TemporaryDirectory(prefix="bbmcl-check-") as folder, _Child(spec, left or only, folder) as child:
            names = child.names()
            left = names if left is None else left
            for name in list(left):
                result = child.result(name, seconds)
                left.remove(name)
                yield result
                if child.gone:
                    break


class _Child:
    """One process that runs checks and writes a line for each."""

    def __init__(self, spec: Mapping[str, Any], names: Sequence[str], folder: str) -> None:
        asked, told, self.log = (Path(folder, name) for name in ("asked.json", "told.jsonl", "log.txt"))
        asked.write_text(json.dumps({"subject": dict(spec), "checks": list(names)}))
        told.touch()
        command = [sys.executable, "-u", "-m", "backdoorbench_mcl.testing.child", str(asked), str(told)]
        # toys are small: a second thread only waits; what a killed child leaves lies in the folder that goes
        env = {"OMP_NUM_THREADS": "1", **os.environ, "TMPDIR": folder}
        self.part = ""
        self.gone = False
        self.lines = told.open()
        with self.log.open("wb") as out:
            self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=out, stderr=out, env=env)

    def __enter__(self) -> _Child:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        self.lines.close()

    def names(self) -> list[str]:
        """The checks that it is going to run. Raises UserError where it does not get that far."""
        told, fate = self._next(STARTING)
        if told is None:
            raise UserError(f"the checks could not begin: {fate}")
        if "error" in told:
            raise UserError(str(told["error"]))
        return [str(name) for name in told["checks"]]

    def result(self, name: str, seconds: float) -> Result:
        """What became of the check `name`, the next in order."""
        told, fate = self._next(seconds)
        if told is not None:
            return Result(**told)
        self.gone = True
        return Result(name, "failed", fate)

    def _next(self, seconds: float) -> tuple[dict[str, Any] | None, str]:
        """The next line, or None and why there is none."""
        until = time.monotonic() + seconds
        while True:
            ended = self.process.poll() is not None
            self.part += self.lines.readline()
            if self.part.endswith("\n"):
                found: dict[str, Any] = json.loads(self.part)
                self.part = ""
                return found, ""
            if ended:
                return None, self._death()
            if time.monotonic() > until:
                return None, f"took longer than {seconds:g} s; see --timeout"
            time.sleep(0.02)

    def _death(self) -> str:
        said = [line for line in self.log.read_text(errors="replace").splitlines() if line.strip()][-1:]
        after = f" after saying {one_line(said[0], 120)!r}" if said else ""
        return f"its process ended with status {self.process.returncode}{after}"


def lines(results: Iterator[Result], say: Callable[[str], None]) -> bool:
    """Tell of each result as it comes; True if none failed."""
    counts = {"ok": 0, "failed": 0, "skipped": 0}
    for result in results:
        counts[result.state] += 1
        about = f": {one_line(result.message, 400)}" if result.message else ""
        say(f"  {result.state.upper() if result.state == 'failed' else result.state:7} {result.check}{about}")
    say(", ".join(f"{count} {state}" for state, count in counts.items() if count))
    return not counts["failed"]


__all__ = ["SECONDS", "Result", "lines", "run"]
