"""The process that talks to Ray for a driver: `python -m backdoorbench_mcl.engines.broker`, started by `engines.ray`.

Ray's client writes to standard output, replaces signal handlers, and ends its process when the head node is gone; none
of that may happen to a driver. Lines of JSON come in on standard input (settings, then folders of jobs) and go out on
standard output; the end of the input ends all jobs. What nodes send is checked here. Free of torch.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import re
import shutil
import socket
import sys
import threading
import time
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

import ray

from .. import datacache, provenance
from ..text import one_line
from . import node
from .base import LOG
from .local import MOST_REASON, MOST_RESULT, STATES, sound

ATTEMPTS = 3  # of a job whose node or Ray worker was lost
PATIENCE = 5.0  # seconds: for a port to answer, for jobs to end by themselves
LOOK = 2.0  # seconds between two looks at the nodes
KEPT = 1 << 30  # bytes of inputs that stay in the object store for later jobs
MOST_FILES, MOST_BYTES, MOST_MADE = 16, 64 << 30, 64 << 10
MOST_LOG = 8000  # characters
_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.-]{0,99}\.safetensors|meta\.json")


class _Useless(ValueError):
    """A node sent what `node.run` does not send."""


class Intake:
    """Takes what a node sends of one job and writes its files, complete or not at all, into the job's folder.

    Example: `intake = Intake(folder)`, `intake.take(message)` for each; then `intake.ended` is the last of them.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.out = folder / "out.part"
        shutil.rmtree(self.out, ignore_errors=True)  # of an attempt before this one
        self.out.mkdir()
        self.node: dict[str, str] = {}
        self.made: dict[str, Any] = {}
        self.ended: dict[str, Any] = {}
        self.size = 0
        self.files: set[str] = set()

    def take(self, message: Any) -> None:
        """Believe nothing: raises ValueError for a message that is none."""
        if not isinstance(message, dict):
            raise _Useless("no message")
        if "file" in message:
            self._write(message["file"], message.get("part"))
        elif "node" in message:
            self.node = {name: _text(message.get(name), 200) for name in ("node", "address", "host", "pid")}
        elif "made" in message:
            self.made = _made(message["made"])
        elif "ended" in message:
            self._end(message["ended"])

    def _write(self, name: Any, part: Any) -> None:
        if not isinstance(name, str) or not _NAME.fullmatch(name) or not isinstance(part, bytes):
            raise _Useless("a file that no job leaves")
        self.files.add(name)
        self.size += len(part)
        if len(self.files) > MOST_FILES or self.size > MOST_BYTES:
            raise _Useless("more files, or larger ones, than a job leaves")
        with (self.out / name).open("ab") as file:
            file.write(part)

    def _end(self, told: Any) -> None:
        if not isinstance(told, dict) or told.get("state") not in (*STATES, "killed", "timeout"):
            raise _Useless("no state")
        text = _text(told.get("result"), MOST_RESULT)
        result = json.loads(text) if text != "{}" else {}
        if result or told["state"] == "ok":
            result = sound(result)
            if result["state"] != told["state"]:
                raise _Useless("two states")
        log = _text(told.get("log"), 1 << 20)[-MOST_LOG:]
        self.ended = {"state": told["state"], "reason": _text(told.get("reason"), MOST_REASON), "log": log,
                      "result": result}  # fmt: skip
        (self.folder / LOG).write_text(log)
        if told["state"] == "ok":
            self.out.rename(self.folder / "out")


def _text(value: Any, most: int) -> str:
    if not isinstance(value, str) or len(value) > most:
        raise _Useless("no text, or too much of it")
    return value


def _made(value: Any) -> dict[str, Any]:
    """Where a job ran, as `node` tells it."""
    told = json.loads(_text(value, MOST_MADE))
    if not isinstance(told, dict) or not isinstance(told.get("versions"), dict):
        raise _Useless("no versions")
    if not all(isinstance(text, str) for text in told["versions"].values()) or not isinstance(told.get("origin"), dict):
        raise _Useless("no versions, or no origin")
    json.dumps(told, allow_nan=False)  # a store takes no other numbers
    return {"machine": _text(told.get("machine"), 200), "versions": told["versions"], "origin": told["origin"]}


def progress(message: Mapping[str, Any]) -> list[Any] | None:
    """Done, total, images a second; None where a node sent something else."""
    told = message.get("progress")
    if not isinstance(told, list) or len(told) != 3:
        return None
    done, total, rate = told
    if not all(isinstance(n, int) and abs(n) < 1 << 62 for n in (done, total)):
        return None
    return [done, total, float(rate)] if isinstance(rate, int | float) and math.isfinite(rate) else None


class Shelf:
    """Files in Ray's object store: each content once, the latest of them kept for later jobs."""

    def __init__(self, kept: int = KEPT) -> None:
        self.kept = kept
        self._found: OrderedDict[str, tuple[int, list[Any]]] = OrderedDict()
        self._lock = threading.Lock()

    def refs(self, path: Path) -> list[Any]:
        """References to the pieces of a file. What drops out of the store stays while a job refers to it."""
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest() if sys.version_info >= (3, 11) else _digest(file)
        with self._lock:  # two jobs that start at once share a victim
            if digest not in self._found:
                with path.open("rb") as file:
                    pieces = [ray.put(piece) for piece in iter(lambda: file.read(node.PIECE), b"")]
                self._found[digest] = path.stat().st_size, pieces
            self._found.move_to_end(digest)
            pieces = self._found[digest][1]
            while sum(size for size, _ in self._found.values()) > self.kept and len(self._found) > 1:
                self._found.popitem(last=False)
            return pieces


def _digest(file: Any) -> str:
    digest = hashlib.sha256()
    while block := file.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()


@dataclass
class _Job:
    folder: Path
    lost: int = 0
    refused: dict[str, str] = field(default_factory=dict)  # node -> why
    sends_data: bool = False
    begun: bool = False  # on a node
    running: Any = None  # what Ray calls its messages by


class Broker:
    """One connection to Ray. asked: the first line of the driver."""

    def __init__(self, asked: Mapping[str, Any], tell: TextIO) -> None:
        self.asked = asked
        self.closing = False
        self.shelf = Shelf()
        self.data: dict[str, dict[str, list[Any]]] = {}
        self.jobs: dict[Path, tuple[_Job, threading.Thread]] = {}
        self.task = ray.remote(node.run)
        self.told: set[str] = set()  # why nodes refused
        self._tell, self._lock, self._filling = tell, threading.Lock(), threading.Lock()

    def say(self, **message: Any) -> None:
        """A line for the driver."""
        with self._lock, contextlib.suppress(BrokenPipeError, ValueError):  # it is gone: the end of the input tells
            self._tell.write(json.dumps(message) + "\n")
            self._tell.flush()

    def nodes(self) -> dict[str, int]:
        """Living nodes -> jobs that each has room for."""
        cpus, gpus = self.asked["threads"], self.asked["gpus"]
        found = {}
        for one in ray.nodes():
            has = one["Resources"]
            slots = int(has.get("CPU", 0) // cpus)
            if gpus:
                slots = min(slots, int(has.get("GPU", 0) / gpus + 1e-9))
            if one["Alive"] and slots:
                found[str(one["NodeID"])] = slots
        return found

    def watch(self, slots: int) -> None:
        """Tell of nodes that come and go. Ends this process when that of the driver's own machine, or the head, is
        gone: Ray would wait for it.
        """
        own = ray.get_runtime_context().get_node_id()
        while not self.closing:
            time.sleep(LOOK)
            try:
                if not any(one["Alive"] and one["NodeID"] == own for one in ray.nodes()):
                    raise RuntimeError("the Ray node of this machine has ended")
                living = self.nodes()
                for job, _ in list(self.jobs.values()):
                    if not job.begun and job.running is not None and self._refused_by(job, living):
                        ray.cancel(job.running)  # it would wait for a node that is gone: `_once` finds it refused
                if (now := sum(living.values())) != slots:
                    slots = now
                    self.say(slots=now)
            except Exception as error:
                if not self.closing:
                    print(one_line(str(error), 300), file=sys.stderr, flush=True)
                    os._exit(1)

    def start(self, folder: Path) -> None:
        """Follow a job in a thread of its own: its messages come when they come."""
        job = _Job(folder)
        thread = threading.Thread(target=self._follow, args=(job,), daemon=True)
        self.jobs[folder] = job, thread
        thread.start()

    def close(self) -> None:
        """End every job; those that do not end by themselves, with the process that runs them."""
        self.closing = True
        for force in (False, True):
            until = time.monotonic() + PATIENCE
            for job, thread in list(self.jobs.values()):
                if thread.is_alive() and job.running is not None:
                    with contextlib.suppress(Exception):  # it has just ended
                        ray.cancel(job.running, force=force)
            for _, thread in list(self.jobs.values()):
                thread.join(max(0.0, until - time.monotonic()))
        ray.shutdown()

    # ------------------------------------------------------------ one job

    def _follow(self, job: _Job) -> None:
        try:
            self._until_done(job)
        except Exception as error:  # whatever went wrong is the end of this job, told in a line, and of no other
            why = f"{error.strerror}: {error.filename}" if isinstance(error, OSError) and error.strerror else str(error)
            self._finish(job, "failed", f"{type(error).__name__}: {one_line(why, 300)}")
        self.jobs.pop(job.folder, None)

    def _until_done(self, job: _Job) -> None:
        while not self.closing:
            intake = Intake(job.folder)
            try:
                done = self._once(job, intake)
            except (_Useless, ValueError, RecursionError) as error:
                return self._finish(job, "failed", f"left a result of no use: {one_line(str(error), 300)}", intake)
            except ray.exceptions.RayTaskError as error:
                return None if self.closing else self._finish(job, "failed", _task_error(error), intake)
            except ray.exceptions.RayError as error:
                if self.closing or not self._again(job, intake, error):
                    return None
                continue
            if done:
                return None

    def _again(self, job: _Job, intake: Intake, error: Exception) -> bool:
        """Whether a job whose node was lost is to be tried once more."""
        job.lost += 1
        kind = job.folder.name.partition("-")[0]
        how = type(error).__name__
        if job.lost >= ATTEMPTS:
            self._finish(job, "killed", f"its node or Ray worker was lost {ATTEMPTS} times ({how})", intake)
            return False
        where = intake.node.get("address", "that had not begun")
        self.say(note=f"node {where} lost a job ({kind}, {how}); it is run again, attempt {job.lost + 1} of {ATTEMPTS}")
        return True

    def _once(self, job: _Job, intake: Intake) -> bool:
        """Run a job on some node; False if it has to be asked of another one, or with the data set."""
        if self._refused_by(job, self.nodes()):  # those that had not are gone
            self._finish(job, "failed", list(job.refused.values())[-1], intake)
            return True
        job.begun = False
        options: dict[str, Any] = {"num_cpus": self.asked["threads"], "max_retries": 0, "num_returns": "streaming"}
        if self.asked["gpus"]:
            options["num_gpus"] = self.asked["gpus"]
        if job.refused:
            options["label_selector"] = {"ray.io/node-id": f"!in({','.join(job.refused)})"}
        job.running = self.task.options(**options).remote(self._request(job))
        if self.closing:  # it was not there yet to be cancelled
            ray.cancel(job.running)
        for ref in job.running:
            message = ray.get(ref)
            if isinstance(message, dict) and "refused" in message:
                return self._refused(job, intake, _text(message["refused"], MOST_REASON))
            if isinstance(message, dict) and "lacks" in message:
                if job.sends_data:
                    raise _Useless("asked for the data set twice")
                job.sends_data = True
                return False
            if isinstance(message, dict) and "progress" in message:
                if (steps := progress(message)) is not None:
                    self.say(progress=[str(job.folder), *steps])
                continue
            intake.take(message)
            job.begun = job.begun or bool(intake.node)
            if intake.node and "node" in message:
                self.say(at=[str(job.folder), intake.node])
            if intake.ended:
                self._finish(job, intake=intake, **intake.ended)
                return True
        raise _Useless("its node told of no end")

    def _refused(self, job: _Job, intake: Intake, why: str) -> bool:
        if not intake.node.get("node", "").isalnum():
            raise _Useless("refused by nobody")
        job.refused[intake.node["node"]] = why
        if why not in self.told:
            self.told.add(why)
            self.say(note=why)
        return False

    def _refused_by(self, job: _Job, living: Mapping[str, int]) -> bool:
        """Whether all nodes that there are have refused a job."""
        return bool(job.refused) and bool(living) and set(living) <= set(job.refused)

    def _request(self, job: _Job) -> dict[str, Any]:
        text = (job.folder / "spec.json").read_text()
        spec = json.loads(text)
        files = {path.name: self.shelf.refs(path) for path in sorted((job.folder / "in").iterdir())}
        data = self._data(Path(spec["data"]["folder"]), spec["data"]["hash"]) if job.sends_data else {}
        return {"spec": text, "files": files, "data": data, "wanted": node.wanted(spec),
                **{name: self.asked[name] for name in ("runs", "token", "timeout", "memory")}}  # fmt: skip

    def _data(self, folder: Path, name: str) -> dict[str, list[Any]]:
        """The prepared data set in the object store, where it stays: every node asks for it once."""
        with self._filling:  # at the start of a run all jobs ask at once
            if name not in self.data:
                keep = Shelf(MOST_BYTES)
                self.data[name] = {file: keep.refs(folder / file) for file in datacache.FILES}
            return self.data[name]

    def _finish(self, job: _Job, state: str, reason: str, intake: Intake | None = None, log: str = "",
                result: Mapping[str, Any] | None = None) -> None:  # fmt: skip
        if not self.closing:
            made = {} if intake is None else intake.made
            self.say(finished=[str(job.folder), state, reason, log, dict(result or {}), made])


def _task_error(error: Exception) -> str:
    """What went wrong on a node outside of the job, in a line."""
    last = next((line for line in reversed(str(error).splitlines()) if line.strip()), "")
    if f"No module named '{node.CORE}" in str(error):
        return f"a node has no {node.CORE} of this version ({last.strip()}); install it there and run again"
    return f"its node could not run it: {one_line(last, 300)}"


# ---------------------------------------------------------------- the connection


def _connect(asked: Mapping[str, Any]) -> str:
    """Connect, or start Ray here; what is wrong, in a line, or ""."""
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "CRITICAL"}
    address = asked["address"]
    if address is None:
        cpus = max(provenance.cores(), asked["threads"] * (asked["workers"] or 1))
        ray.init(address="local", num_cpus=cpus, include_dashboard=False, **quiet)
        return ""
    address = os.environ.get("RAY_ADDRESS", address) if address == "auto" else address
    if address != "auto":
        host, _, port = address.rpartition(":")
        try:
            socket.create_connection((host.strip("[]"), int(port)), PATIENCE).close()
        except (OSError, ValueError) as error:
            why = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
            return f"no Ray cluster at {address}: {why}; start one with ray start --head, or leave --address out"
    try:
        ray.init(address=address, **quiet)
    except ConnectionError:
        return (
            f"no Ray cluster answers at {address} from this machine; join it with ray start --address=HEAD:6379, start "
            "one with ray start --head, or leave --address out"
        )
    except (RuntimeError, ValueError) as error:  # another version of Ray or Python among them
        return f"Ray refuses {address}: {one_line(str(error), 400)}"
    return ""


def main() -> None:
    """Serve one driver until its input ends."""
    tell = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever Ray prints goes to the file for errors
    asked = json.loads(sys.stdin.readline())
    problem = _connect(asked)
    if problem:
        print(json.dumps({"problem": problem}), file=tell, flush=True)
        os._exit(2)
    broker = Broker(asked, tell)
    slots = sum(broker.nodes().values())
    broker.say(ready=slots)
    threading.Thread(target=broker.watch, args=(slots,), daemon=True).start()
    for line in sys.stdin:
        broker.start(Path(json.loads(line)))
    timer = threading.Timer(4 * PATIENCE, os._exit, (1,))  # whatever hangs: the driver has gone
    timer.daemon = True
    timer.start()
    broker.close()
    os._exit(0)


if __name__ == "__main__":
    main()

__all__ = ["ATTEMPTS", "Broker", "Intake", "Shelf", "main", "progress"]
