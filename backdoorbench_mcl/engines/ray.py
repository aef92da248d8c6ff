"""The engine `ray`: the same children as those of the local engine, on the nodes of a Ray cluster.

The driver alone writes the store; a process of its own, the broker, speaks with Ray (`broker` says why). A node is
handed spec and inputs and hands back outputs (`node`). Needs the extra `ray`; this module imports nothing of it.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import select
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..text import one_line
from .base import Finished, Progress

TOKEN = "cluster.token"  # noqa: S105 (a file in the runs folder, by which a node knows that it sees that folder)
CONNECT, BEGIN = 20.0, 60.0  # seconds for a cluster to answer, for Ray to be started here
END = 30.0  # seconds for all jobs to end


def check(address: str | None) -> None:
    """Raises UserError where Ray is not installed, or `address` cannot be one."""
    if importlib.util.find_spec("ray") is None:
        raise UserError("--engine ray: Ray is not installed here; pip install 'backdoorbench-mcl[ray]'")
    port = (address or "").rpartition(":")[2]
    if address is not None and address != "auto" and ("://" in address or not port.isdigit()):
        raise UserError(
            f"--address {address!r}: expected auto or HOST:PORT of the head node (this machine joins the cluster by "
            "ray start --address=HOST:PORT)"
        )


class Ray:
    """Runs jobs on a Ray cluster, as many at once as it has room for.

    address: "auto", HOST:PORT of the head node, None to start Ray on this machine. workers: the most jobs at once, None
    for no bound. threads, gpus: cores and GPUs of a job, the latter 0 on CPUs. timeout, memory: as of `Local`. say: is
    told of nodes that were lost or that refuse. Raises UserError where there is no such cluster.

    Example: `with Ray(Path("bbmcl-runs"), "auto") as engine: engine.start(folder); events = engine.events()`.
    """

    spreads = True

    def __init__(
        self, runs: Path, address: str | None = None, *, workers: int | None = None, threads: int = 1, gpus: float = 0,
        timeout: float | None = None, memory: float | None = None, say: Callable[[str], None] = lambda line: None,
    ) -> None:  # fmt: skip
        check(address)
        self.address = address
        self.workers = workers
        self.say = say
        self.slots = 0
        self.where: dict[Path, dict[str, str]] = {}  # running jobs -> the node of each, once it has begun
        self._folder = tempfile.TemporaryDirectory(prefix="bbmcl-ray-")
        self._running: set[Path] = set()
        self._rest = b""
        self._answered = False
        self._broker = self._start_broker()
        try:
            self._send({
                "address": address, "workers": workers, "threads": threads, "gpus": gpus, "timeout": timeout,
                "memory": memory, "runs": str(runs.absolute()), "token": [TOKEN, token(runs)],
            })  # fmt: skip
            self._await_answer(threads, gpus)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Ray:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def free(self) -> int:
        """Jobs that may be started now: while no node has room, one waits for the first that has."""
        most = max(1, self.slots)
        return (most if self.workers is None else min(most, self.workers)) - len(self._running)

    def start(self, folder: Path) -> None:
        """Run the job in `folder` on some node; `events` will tell of it."""
        self._running.add(folder)
        self._send(str(folder))

    def events(self, patience: float = 0.1) -> list[Progress | Finished]:
        """What happened since the last call; waits up to `patience` seconds for something to happen."""
        found = [self._event(*message) for line in self._lines(patience) for message in json.loads(line).items()]
        return [event for event in found if event is not None]

    def close(self) -> None:
        """End what still runs on any node, and wait for it."""
        with contextlib.suppress(OSError):
            os.close(self._input)
        try:
            if not self._answered:  # nor does it listen, and no job of it runs
                self._broker.kill()
            self._broker.wait(END)
        except subprocess.TimeoutExpired:  # Ray ends the jobs of a driver that has gone
            self._broker.kill()
            self._broker.wait()
        finally:
            with contextlib.suppress(OSError):
                os.close(self._output)
            self._running.clear()
            self._folder.cleanup()

    # ------------------------------------------------------------ the broker

    def _start_broker(self) -> subprocess.Popen[bytes]:
        """In an empty folder, which Ray puts first on the path of its workers: they shall find their own packages."""
        path = os.pathsep.join(os.path.abspath(part) for part in sys.path)  # it finds what this process would
        own = {"PYTHONPATH": path, "PYTHONSAFEPATH": "1", "RAY_USAGE_STATS_ENABLED": "0", "RAY_DEDUP_LOGS": "0"}
        theirs, self._input = os.pipe()
        self._output, ours = os.pipe()
        try:
            with Path(self._folder.name, "errors").open("wb") as errors:
                return subprocess.Popen(
                    [sys.executable, "-m", "backdoorbench_mcl.engines.broker"], stdin=theirs, stdout=ours,
                    stderr=errors, cwd=self._folder.name, env={**os.environ, **own}, start_new_session=True,
                )  # fmt: skip
        finally:
            os.close(theirs)
            os.close(ours)

    def _await_answer(self, threads: int, gpus: float) -> None:
        patience = BEGIN if self.address is None else CONNECT
        until = time.monotonic() + patience
        while time.monotonic() < until:
            for line in self._lines(0.5):
                told = json.loads(line)
                if "problem" in told:
                    raise UserError(told["problem"])
                self.slots, self._answered = int(told["ready"]), True
                if not self.slots:
                    wants = f"{threads} CPUs" + (f" and {gpus:g} GPU" if gpus else "")
                    raise UserError(f"no node of the Ray cluster has {wants}; try fewer --threads-per-job")
                return
        where = "Ray could not be started here" if self.address is None else f"no Ray cluster answers at {self.address}"
        raise UserError(f"{where} within {patience:g} s; see: ray status")

    def _send(self, what: Any) -> None:
        try:
            os.write(self._input, json.dumps(what).encode() + b"\n")
        except BrokenPipeError:
            self._lost()

    def _lines(self, patience: float) -> list[bytes]:
        """Whole lines of the broker. Raises UserError once it has ended, by which Ray answers the loss of its head."""
        if not select.select([self._output], [], [], patience)[0]:
            return []
        got = os.read(self._output, 1 << 20)
        if not got:
            self._lost()
        *lines, self._rest = (self._rest + got).split(b"\n")
        return lines

    def _lost(self) -> None:
        errors = Path(self._folder.name, "errors").read_text(errors="replace").strip().splitlines()[-1:]
        last = f" ({one_line(errors[0], 300)})" if errors else ""
        raise UserError(
            f"the connection to Ray was lost{last}; what was finished is stored, the same command goes on from there"
        )

    def _event(self, name: str, told: Any) -> Progress | Finished | None:
        if name == "slots":
            self.slots = int(told)
            if not self.slots:
                self.say("no node of the Ray cluster has room for a job any more; waiting for one")
        elif name == "note":
            self.say(one_line(told))
        elif name == "at":
            self.where[Path(told[0])] = told[1]
        elif name == "progress":
            return Progress(Path(told[0]), *told[1:])
        elif name == "finished":
            folder = Path(told[0])
            self._running.discard(folder)
            self.where.pop(folder, None)
            return Finished(folder, *told[1:])
        return None


def token(runs: Path) -> str:
    """What stands in the token of a runs folder, made when it is first asked for."""
    file = runs / TOKEN
    if not file.exists():
        with contextlib.suppress(FileExistsError), file.open("x") as own:  # another driver was first
            own.write(uuid.uuid4().hex)
    return file.read_text()


__all__ = ["Ray", "check", "token"]
