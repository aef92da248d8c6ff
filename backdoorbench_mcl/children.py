"""Ask a child process about plugins, so that one that crashes, hangs or spoils its process harms no other.

`ask` starts `python -m MODULE FOLDER`, whose main calls `serve`: it forks once per distribution, watches what it
forked, and tells of each request either the answer or how its process ended. Free of torch.
"""

from __future__ import annotations

import contextlib
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

from . import memory

Reply = dict[str, Any]  # {"ok": ...}, {"error": line} of the answer, or {"fate": how its process ended}
REQUESTS, OUTPUT = "requests.json", "output.txt"
GREED = 2  # a plugin that is read may hold one part in so many of the machine's memory


def ask(module: str, requests: Sequence[Mapping[str, Any]], seconds: float) -> list[Reply]:
    """Replies to `requests`, in order. Each names its distribution under "dist"; seconds: what one may take."""
    with tempfile.TemporaryDirectory(prefix="bbmcl-ask-") as name:
        folder = Path(name)
        (folder / REQUESTS).write_text(json.dumps({"seconds": seconds, "requests": list(requests)}))
        path = os.pathsep.join(part or os.getcwd() for part in sys.path)  # the child finds what this process would
        with (folder / OUTPUT).open("w+b") as output:
            server = subprocess.Popen(
                [sys.executable, "-u", "-m", module, name], stdin=subprocess.DEVNULL, stdout=output, stderr=output,
                env={**os.environ, "PYTHONPATH": path, "PYTHONSAFEPATH": "1"}, start_new_session=True,
            )  # fmt: skip
            try:
                server.wait()
            finally:  # whatever a plugin has started ends with it
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(server.pid, signal.SIGKILL)
                server.wait()
        replies = [_read(folder, i) for i in range(len(requests))]
        last = (folder / OUTPUT).read_text(errors="replace").strip().splitlines()[-1:]
        fate = f"was not read: {' '.join(['python -m', module, 'ended with status', str(server.returncode), *last])}"
        return [{"fate": fate} if reply is None else reply for reply in replies]


def serve(answer: Callable[[Mapping[str, Any]], Reply]) -> None:
    """The main of a child: answer what `ask` wrote down."""
    folder = Path(sys.argv[1])
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


__all__ = ["Reply", "ask", "serve", "signal_name"]
