"""What the fuzz tests share: how many examples, bytes and text that went wrong, and what a parser may do with them.

A parser may read what it is given or refuse it by an error of this project. It may raise nothing else, take no longer
than `SECONDS` (or what its test says), no more memory than `ROOM`, and write nowhere but where it was told to. A few
examples run with every test run, always the same ones; BBMCL_FUZZ=10000 (`tox -e fuzz`) draws as many anew for each
target.
"""

from __future__ import annotations

import os
import resource
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from backdoorbench_mcl.errors import BbmclError

SHORT = "BBMCL_FUZZ" not in os.environ  # the few examples of a test run
EXAMPLES = int(os.environ.get("BBMCL_FUZZ", "20"))
SECONDS = 10  # a parser that needs more for a few kB hangs
ROOM = 3 << 30  # bytes of address space on top of what the interpreter, torch and pyarrow have reserved

# How others make trouble in a name or a line of text: escapes, bidi, markup, formulas, paths, surrogates, length.
NASTY = (
    "\x1b[31mred\x1b[0m", "\x1b]0;title\x07", "\x9b2J", "\u202eevil\u2066", "<script>alert(1)</script>",
    "\"'><img src=x>", "${jndi:x}", "=cmd|'/c calc'!A0", "../../etc/passwd", "/etc/passwd", "a\x00b", "a\nb\r\nc",
    "\ud800", "a\u2028b", "|`*_~[x](y)", "\\end{document}\\input{x}", "%s%n{0}{x.__class__}", "é" * 300, "x" * 20_000,
    "", " ", "\t", "-", "--help", "9" * 5000, "0x" + "f" * 5000, "1e999", "nan", "(" * 300, "[" * 300, "{" * 300, "'",
    '"', "\\", ",", "=", ".", "٣",
)  # fmt: skip


def fuzzed(share: float = 1.0, each: int = 1) -> settings:
    """The settings of a target. share: of the few examples, for one whose examples take long; of many it has all.
    each: how many inputs an example holds.
    """
    return settings(
        max_examples=max(5, int(EXAMPLES * share)) if SHORT else -(-EXAMPLES // each), deadline=None, database=None,
        derandomize=SHORT, suppress_health_check=list(HealthCheck),
    )  # fmt: skip


class Hang(BaseException):
    """Not an Exception, which a parser might take for its own."""


def _ring(signum: int, frame: FrameType | None) -> NoReturn:
    raise Hang("took too long")


@contextmanager
def contained(seconds: int = SECONDS) -> Iterator[None]:
    """Around a parser: an error of this project is an answer; anything else fails the test."""
    before = signal.signal(signal.SIGALRM, _ring)
    signal.alarm(seconds)
    try:
        yield
    except BbmclError as error:
        if not str(error):  # that it is one line is the error's own doing
            raise AssertionError("expected an error that says something") from error
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@pytest.fixture(autouse=True, scope="module")
def bounded() -> Iterator[None]:
    """For modules that import it: what takes too much memory is a MemoryError, not a machine that stands still."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    status = Path("/proc/self/statm")
    if status.exists():
        held = int(status.read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
        resource.setrlimit(resource.RLIMIT_AS, (held + ROOM, hard))
    yield
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def listing(folder: Path) -> dict[str, tuple[int, int]]:
    """Everything below a folder with size and time of its last change: to be compared."""
    found = {str(path.relative_to(folder)): path.lstat() for path in folder.rglob("*")}
    return {name: (stat.st_size, stat.st_mtime_ns) for name, stat in found.items()}


# ---------------------------------------------------------------- strategies


def nasty() -> st.SearchStrategy[str]:
    """One of `NASTY`, which a message about a failure would otherwise print whole."""
    return st.integers(0, len(NASTY) - 1).map(NASTY.__getitem__)


def nasty_text() -> st.SearchStrategy[str]:
    """Any text, a nasty one, or several of both in a row."""
    part = st.one_of(st.text(max_size=20), nasty(), st.characters(categories=["Cc", "Cf", "Cs", "Zl"]))
    return st.lists(part, min_size=1, max_size=3).map("".join)


def nasty_json() -> st.SearchStrategy[Any]:
    """What JSON may hold where something else is expected."""
    leaf = st.one_of(
        st.none(),
        st.booleans(),
        st.integers(),
        st.floats(),
        nasty_text(),
        st.sampled_from([10**12, 10**400, -1, 2**63]),
    )
    return st.recursive(
        leaf, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(nasty_text(), inner, max_size=3), max_leaves=8
    )


_NUMBERS = (0, 1, 0x7F, 0x80, 0xFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF, 2**63 - 1, 2**64 - 1, 10**12)


@st.composite
def mutated(draw: st.DrawFn, valid: Sequence[bytes]) -> bytes:
    """One of `valid` with a few bytes changed, put in, left out, repeated or cut; sometimes no trace of it is left."""
    data = bytearray(valid[draw(st.integers(0, len(valid) - 1))])
    for _ in range(draw(st.integers(1, 5))):
        at = draw(st.integers(0, len(data)))
        kind = draw(st.sampled_from(("flip", "number", "insert", "remove", "repeat", "cut", "text")))
        if kind == "flip" and at < len(data):
            data[at] ^= draw(st.integers(1, 255))
        elif kind == "number":
            width = draw(st.sampled_from((1, 2, 4, 8)))
            value = draw(st.sampled_from(_NUMBERS)) % 256**width
            data[at : at + width] = value.to_bytes(width, draw(st.sampled_from(("little", "big"))))
        elif kind == "insert":
            data[at:at] = draw(st.binary(max_size=16))
        elif kind == "remove":
            del data[at : at + draw(st.integers(1, 64))]
        elif kind == "repeat":
            part = data[at : at + draw(st.integers(1, 64))]
            data[at:at] = part * draw(st.integers(1, 3))
        elif kind == "cut":
            del data[at:]
        else:
            data[at:at] = draw(nasty()).encode("utf-8", "surrogatepass")[:200]
    return bytes(data)
