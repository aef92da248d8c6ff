"""`bbmcl check`: every check in a child process, so that a method that hangs or crashes costs that check alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ..text import one_line

SECONDS = 120.0  # that one check may take


@dataclass(frozen=True)
class Result:
    """How one check went. seconds: 0 where it was not started."""

    check: str
    state: Literal["ok", "failed", "skipped"]
    message: str = ""
    seconds: float = 0.0


def run(spec: Mapping[str, Any], names: Sequence[str], seconds: float = SECONDS) -> Iterator[Result]:
    """Run the checks `names` on the method of `spec`, in order, each result as soon as it is there.

    spec: "kind", "target", "params", "suffix", "label", as `Subject` has them. A child runs one check after the other;
    where it dies or takes too long over one, that one has failed and a new child goes on with the next.
    """
    left = list(names)
    while left:
        for result in _child(spec, left, seconds):
            left.remove(result.check)
            yield result


def _child(spec: Mapping[str, Any], names: list[str], seconds: float) -> Iterator[Result]:
    with tempfile.TemporaryDirectory(prefix="bbmcl-check-") as folder:
        asked, told, log = (Path(folder, name) for name in ("asked.json", "told.jsonl", "log.txt"))
        asked.write_text(json.dumps({"subject": dict(spec), "checks": names}))
        told.touch()
        command = [sys.executable, "-m", "backdoorbench_mcl.testing.child", str(asked), str(told)]
        env = {"OMP_NUM_THREADS": "1", **os.environ}  # toys are small: a second thread only waits
        with log.open("wb") as out, told.open() as lines:
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=out, stderr=out, env=env)
            try:
                done = 0
                started = time.monotonic()
                while done < len(names):
                    ended = process.poll() is not None
                    if line := lines.readline():
                        yield Result(**json.loads(line))
                        done, started = done + 1, time.monotonic()
                    elif ended:
                        yield Result(names[done], "failed", _death(process.returncode, log))
                        return
                    elif time.monotonic() - started > seconds:
                        yield Result(names[done], "failed", f"took longer than {seconds:g} s; see --timeout", seconds)
                        return
                    else:
                        time.sleep(0.02)
            finally:
                process.kill()
                process.wait()


def _death(status: int, log: Path) -> str:
    last = [line for line in log.read_text(errors="replace").splitlines() if line.strip()][-1:]
    said = f" after printing {one_line(last[0], 120)!r}" if last else ""
    return f"its process ended with status {status}{said}"


__all__ = ["Result", "run"]
