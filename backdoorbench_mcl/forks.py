"""The fork server: a process that has imported torch and holds no data, from which a child takes 10 ms to start.

One per process that asks for it, and it ends with that process. Jobs run in its children, and classes of plugins are
read in them: importing torch costs 2-3 s, which a command pays once. Free of torch itself.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import signal
import sys
import tempfile
import types
from collections.abc import Iterator
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext

from .errors import UserError

_PRELOADED = "backdoorbench_mcl.engines.warm"
_SERVER = getattr(forkserver, "_forkserver", None)


@contextlib.contextmanager
def starting() -> Iterator[ForkServerContext]:
    """A block in which children are started: `with starting() as context: context.Process(...).start()`.

    The first starts the server, which holds the streams of this process until it has imported torch: a command that
    may end at once in an error has none. Children hear neither of signals that reach this process in the block nor of
    its main module. Raises UserError where the temporary folder's path is too long for the server's socket.
    """
    context = multiprocessing.get_context("forkserver")
    if _pid() is None:
        context.set_forkserver_preload([_PRELOADED])
    try:
        with _no_main():
            forkserver.ensure_running()
    except OSError as error:
        if "AF_UNIX" not in str(error):
            raise
        raise UserError(
            f"the temporary folder {tempfile.gettempdir()} has too long a path for a socket (107 bytes with its "
            "name); set TMPDIR to a shorter one, as in TMPDIR=/tmp"
        ) from error
    with _undisturbed(), _no_main():
        yield context


def ours() -> bool:
    """Whether the server, if there is one, was started here. Python has one for each process, and a script that has
    started its own before may have it hold modules of plugins as they were then.
    """
    return _pid() is None or _PRELOADED in getattr(_SERVER, "_preload_modules", ())


def _pid() -> int | None:
    """The server's process, None while it is not running."""
    found: int | None = getattr(_SERVER, "_forkserver_pid", None)
    return found


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """Ctrl-C and SIGTERM wait until the end of the block: a child that is half started would be nobody's to end.

    The fork server must be running, or it and its children would inherit that they wait.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextlib.contextmanager
def _no_main() -> Iterator[None]:
    """Children do not import the main module, as those of multiprocessing do: they need nothing of it, importing a
    command line takes time, and a script that calls `run` without `if __name__ == "__main__"` would run in each again.
    """
    main = sys.modules["__main__"]
    sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


__all__ = ["ours", "starting"]
