"""Ask a child process about plugins, so that one that crashes, hangs or spoils its process harms no other.

`ask` has a process call the `answer` of a module for each request: it forks once per distribution, watches what it
forked, and tells of each request either the answer or how its process ended. Free of torch.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from . import forks, memory

Reply = dict[str, Any]  # {"ok": ...}, {"error": line} of the answer, or {"fate": how its process ended}
REQUESTS, OUTPUT = "requests.json", "output.txt"
GREED = 2  # a plugin that is read may hold one part in so many of the machine's memory


def ask(module: str, requests: Sequence[Mapping[str, Any]], seconds: float, warm: bool = False) -> list[Reply]:
    """Replies to `requests`, in order. Each names its distribution under "dist"; seconds: what one may take.

    module: has `answer(request) -> Reply`. warm: it needs torch, so that a child of the fork server answers sooner
    than a new interpreter.
    """
    with tempfile.TemporaryDirectory(prefix="bbmcl-ask-") as name:
        folder = Path(name)
        (folder / REQUESTS).write_text(json.dumps({"seconds": seconds, "requests": list(requests)}))
        path = os.pathsep.join(part or os.getcwd() for part in sys.path)  # the child finds what this process would
        status = (_warm if warm and forks.ours() else _cold)(module, folder, path)
        replies = [_read(folder, i) for i in range(len(requests))]
        last = (folder / OUTPUT).read_text(errors="replace").strip().splitlines()[-1:]
        fate = f"was not read: {' '.join([module, 'ended with status', str(status), *last])}"
        return [{"fate": fate} if reply is None else reply for reply in replies]


def _cold(module: str, folder: Path, path: str) -> int | None:
    """Answer in a new interpreter; its exit status."""
    with (folder / OUTPUT).open("w+b") as output:  # to be read as well, by who asks what was printed
        server = subprocess.Popen(
            [sys.executable, "-u", "-m", __name__, module, str(folder)], stdin=subprocess.DEVNULL, stdout=output,
            stderr=output, env={**os.environ, "PYTHONPATH": path, "PYTHONSAFEPATH": "1"}, start_new_session=True,
        )  # fmt: skip
        try:
            server.wait()
        finally:
            _end(server.pid)
            server.wait()
    return server.returncode


def _warm(module: str, folder: Path, path: str) -> int | None:
    """Answer in a child of the fork server; its exit status."""
    (folder / OUTPUT).touch()
    process = None
    try:
        with forks.starting() as context:
            process = context.Process(target=_settle, args=(module, str(folder), {**os.environ, "PYTHONPATH": path}))
            process.start()
        process.join()
    finally:
        if process is not None and process.pid is not None:
            process.kill()  # stopped before it had a group of its own
            _end(process.pid)
            process.join()
    return process.exitcode


def _end(leader: int) -> None:
    """Whatever a plugin has started ends with the one that read it."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(leader, signal.SIGKILL)


def _settle(module: str, folder: str, environment: Mapping[str, str]) -> None:
    """What a new interpreter would have: a session, streams and an environment of its own."""
    os.setsid()
    output, nothing = os.open(os.path.join(folder, OUTPUT), os.O_WRONLY | os.O_APPEND), os.open(os.devnull, os.O_RDONLY)
    for stream, place in ((nothing, 0), (output, 1), (output, 2)):
        os.dup2(stream, place)
    sys.stdin = os.fdopen(0, closefd=False)
    sys.stdout, sys.stderr = (
        io.TextIOWrapper(os.fdopen(place, "wb", 0, closefd=False), write_through=True) for place in (1, 2)
    )
    del sys.argv[1:]  # the driver's
    os.environ.clear()
    os.environ.update(environment)
    serve(module, Path(folder))


def serve(module: str, folder: Path) -> None:
    """The main of a child: answer what `ask` wrote down."""
    answer: Callable[[Mapping[str, Any]], Reply] = importlib.import_module(module).answer
    asked = json.loads((folder / REQUESTS).read_text())
    requests: list[Mapping[str, Any]] = asked["requests"]
    groups: dict[str, list[int]] = {}
    for i, request in enumerate(requests):
        groups.setdefault(str(request["dist"]), []).append(i)
    for waiting in groups.values():
        while waiting:
            fate = _forked(folder, requests, waiting, answer, asked["seconds"])
            waiting = [i for i in waiting if _read(folder, i) is None]
            if waiting:  # its process ended while the first of them was read
                _write(folder, waiting.pop(0), {"fate": fate})


def _forked(
    folder: Path, requests: Sequence[Mapping[str, Any]], group: Sequence[int],
    answer: Callable[[Mapping[str, Any]], Reply], seconds: float,
) -> str:  # fmt: skip
    """Answer a group in a process of its own; how that ended."""
    pid = os.fork()
    if pid == 0:
        try:
            for i in group:
                _write(folder, i, answer(requests[i]))
        finally:  # not by way of the cleaning up that a plugin may have registered
            os._exit(0)
    most = memory.total() // GREED
    done, until, pause = 0, time.monotonic() + seconds, 0.001
    while True:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            code = os.waitstatus_to_exitcode(status)
            return f"ended its process with {signal_name(-code) if code < 0 else f'status {code}'}"
        answered = sum((folder / f"{i}.json").exists() for i in group)
        if answered > done:
            done, until = answered, time.monotonic() + seconds
        greedy = 0 < most < memory.held(pid)
        if greedy or time.monotonic() > until:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            return f"took more than {most / 1e9:.1f} GB of memory" if greedy else f"did not answer in {seconds:g} s"
        time.sleep(pause)
        pause = min(2 * pause, 0.05)


def signal_name(number: int) -> str:
    """Example: `signal_name(9)` is `SIGKILL`; real-time signals have numbers only."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _write(folder: Path, index: int, reply: Reply) -> None:
    scratch = folder / f"{index}.part"
    scratch.write_text(json.dumps(reply))
    scratch.replace(folder / f"{index}.json")


def _read(folder: Path, index: int) -> Reply | None:
    file = folder / f"{index}.json"
    if not file.exists():
        return None
    found: Reply = json.loads(file.read_text())
    return found


__all__ = ["Reply", "ask", "signal_name"]

if __name__ == "__main__":
    serve(sys.argv[1], Path(sys.argv[2]))
