"""The local engine: every job in a fresh child of a fork server that has preloaded torch and holds no data.

Starting a child costs about 0.1 s instead of the 2-5 s of a new interpreter. A child that outlives its driver
ends itself. `inline` runs the job in this process instead, for debuggers. Free of torch (but for inline).
"""

from __future__ import annotations

import contextlib
import importlib
import json
import math
import multiprocessing
import os
import signal
import struct
import sys
import threading
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, get_args

from .. import forks, plainfiles
from .. import memory as machine
from ..children import signal_name
from .base import LOG, RESULT, Finished, Isolation, Progress

ROOM = 0.9  # of the machine's memory, for all jobs together: beyond that the kernel kills whom it likes
MOST_RESULT, MOST_REASON = 16 << 20, 4000  # bytes of a result, characters of its reason
STATES = ("ok", "failed", "diverged", "n/a")  # that a job's own result may have
# Done, total, images a second. Numbers only: a pickle from a plugin's process would run in this one, unconfined.
_PROGRESS = struct.Struct("<qqd")


@dataclass
class _Running:
    folder: Path
    process: BaseProcess
    messages: Connection
    deadline: float | None
    ended: tuple[str, str] | None = None  # (state, reason) once this engine has killed it


def _progress(folder: Path, message: bytes) -> Progress | None:
    """What a job tells of itself, None for anything else that its process may have sent."""
    try:
        done, total, rate = _PROGRESS.unpack(message)
    except struct.error:
        return None
    return Progress(folder, done, total, rate) if math.isfinite(rate) else None


def sound(result: Any) -> dict[str, Any]:
    """What a job left, if `jobs.run` could have written it: its process may have written something else.

    Raises ValueError. Example: `sound({"state": "ok", "reason": ""})`
    """
    if not isinstance(result, dict) or result.get("state") not in STATES or not isinstance(result.get("reason"), str):
        raise ValueError("no state, or no reason")
    for name in ("seconds", "earlier", "peak_mb", "peak_gpu_mb"):
        if not _is_number(result.get(name, 0)) or result.get(name, 0) < 0:
            raise ValueError(f"{name} is no number")
    for name in ("strays", "changed"):
        if not isinstance(result.get(name, []), list) or not all(
            isinstance(item, str) for item in result.get(name, [])
        ):
            raise ValueError(f"{name} is no list of names")
    if result.get("isolation", "process") not in get_args(Isolation):
        raise ValueError("an isolation that does not exist")
    curves = result.get("curves", {})
    if not isinstance(curves, dict) or not all(map(_is_curve, curves.values())):
        raise ValueError("curves without points")
    return {**result, "reason": result["reason"][:MOST_REASON]}


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and abs(value) < 1e300  # neither infinite nor NaN


def _is_curve(points: Any) -> bool:
    return isinstance(points, list) and all(
        isinstance(point, list) and len(point) == 2 and all(map(_is_number, point)) for point in points
    )


class _Reporter:
    """`tick` of a job: at most four messages a second."""

    def __init__(self, messages: Connection) -> None:
        self.messages = messages
        self.images = 0
        self.start: float | None = None
        self.last = 0.0

    def __call__(self, done: int, total: int, images: int) -> None:
        now = time.monotonic()
        if self.start is None:  # the first step pays for warm-up
            self.start = now
            return
        self.images += images
        if now - self.last >= 0.25 or done == total:
            self.last = now
            self.messages.send_bytes(_PROGRESS.pack(int(done), int(total), self.images / max(now - self.start, 1e-9)))


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)


def _child(folder: str, messages: Connection) -> None:
    """The first function of a child: its output goes to the job's log, its life hangs on its parent's."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the driver decides
    log = os.open(os.path.join(folder, LOG), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as score:
        score.write("500")  # where the memory runs out at once, the kernel ends this process and not the driver
    os.environ["TMPDIR"] = folder
    del sys.argv[1:]  # a copy of the driver's: attacks and their parameters are not for every job to know
    for name in [name for name in os.environ if name.startswith("BBMCL_")]:  # nor where results and data lie
        del os.environ[name]
    jobs = importlib.import_module("backdoorbench_mcl.jobs")
    jobs.run(Path(folder), _Reporter(messages), threading.Thread(target=_end_with_parent, daemon=True).start)


class Local:
    """Runs up to `workers` jobs at once. timeout: seconds that a job may take, None for any. memory: GB (1e9 bytes)
    that a job may hold; in any case the largest is ended before all jobs together hold more than the machine has.

    Example: `with Local(workers=2) as engine: engine.start(folder); events = engine.events()`.
    """

    spreads = False

    def __init__(
        self, workers: int, timeout: float | None = None, inline: bool = False, memory: float | None = None
    ) -> None:
        self.workers = 1 if inline else workers
        self.timeout = timeout
        self.inline = inline
        self.memory = memory
        self.room = ROOM * machine.total()
        self._running: dict[Path, _Running] = {}
        self._done: list[Finished] = []

    def __enter__(self) -> Local:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def free(self) -> int:
        """Jobs that may be started now."""
        return self.workers - len(self._running) - len(self._done)

    def start(self, folder: Path) -> None:
        """Run the job in `folder`; `events` will tell of it."""
        if self.inline:
            jobs = importlib.import_module("backdoorbench_mcl.jobs")
            with (folder / LOG).open("w") as log, contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
                jobs.run(folder, lambda done, total, images: None, lambda: None)
            self._done.append(self._conclude(folder, 0, None))
            return
        with forks.starting() as context:
            receive, send = context.Pipe(duplex=False)
            process = context.Process(target=_child, args=(str(folder), send), daemon=True)
            process.start()
            send.close()
            deadline = None if self.timeout is None else time.monotonic() + self.timeout
            self._running[folder] = _Running(folder, process, receive, deadline)

    def events(self, patience: float = 0.1) -> list[Progress | Finished]:
        """What happened since the last call; waits up to `patience` seconds for something to happen."""
        if self._done:
            done, self._done = self._done, []
            return list(done)
        handles: list[Any] = []
        for run in self._running.values():
            handles += [run.messages, run.process.sentinel]
        wait(handles, patience)
        out: list[Progress | Finished] = []
        for run in list(self._running.values()):
            newest = self._drain(run)
            if run.process.exitcode is not None or not run.process.is_alive():
                run.process.join()
                del self._running[run.folder]
                run.messages.close()
                out.append(self._conclude(run.folder, run.process.exitcode or 0, run.ended))
                run.process.close()
            elif newest is not None:
                out.append(newest)
        self._limit()
        return out

    def _limit(self) -> None:
        """Kill what takes too long or too much."""
        running = [run for run in self._running.values() if run.ended is None]
        held = {run.folder: machine.held(run.process.pid or 0) for run in running}
        together = sum(held.values())
        for run in sorted(running, key=lambda run: -held[run.folder]):
            size = f"held {held[run.folder] / 1e9:.1f} GB of memory"
            if run.deadline is not None and time.monotonic() > run.deadline:
                run.ended = "timeout", f"took longer than --timeout {self.timeout:g} s"
            elif self.memory is not None and held[run.folder] > 1e9 * self.memory:
                run.ended = "killed", f"{size}, more than --memory {self.memory:g}"
            elif 0 < self.room < together:
                together -= held[run.folder]
                run.ended = "killed", f"{size}, the most when this machine's ran out; try fewer --workers"
            if run.ended is not None:
                run.process.kill()

    def _drain(self, run: _Running) -> Progress | None:
        newest = None
        try:
            while run.messages.poll():
                newest = _progress(run.folder, run.messages.recv_bytes())
        except (EOFError, OSError):  # the child is gone: its sentinel tells the rest
            return newest
        return newest

    def _conclude(self, folder: Path, exitcode: int, ended: tuple[str, str] | None) -> Finished:
        log = plainfiles.tail(folder / LOG, 8000).decode(errors="replace")
        if ended is not None:
            return Finished(folder, *ended, log)
        try:
            result = sound(json.loads(plainfiles.read_plain(folder / RESULT, MOST_RESULT, follow=False)))
            return Finished(folder, result["state"], result["reason"], log, result)
        except (OSError, ValueError, RecursionError):  # none, or one that `jobs.run` did not write
            if exitcode == -signal.SIGKILL:
                return Finished(folder, "killed", "was killed (SIGKILL), perhaps for memory; try fewer --workers", log)
            how = signal_name(-exitcode) if exitcode < 0 else f"exit status {exitcode}"
            return Finished(folder, "killed", f"its process ended without a result ({how})", log)

    def close(self) -> None:
        """Kill what still runs and wait for it."""
        for run in self._running.values():
            run.process.kill()
        for run in self._running.values():
            run.process.join()
            run.messages.close()
        self._running.clear()


__all__ = ["Finished", "Isolation", "Local", "Progress", "sound"]
