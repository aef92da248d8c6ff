"""A defense that searches everything within its reach for bytes that it should not have, and tells where it found them.

It is given the bytes with every bit of 0xAA flipped, and flips what it reads instead: else it would find its own list.
"""

from __future__ import annotations

import json
import os
import re
import stat
import sys
from collections.abc import Iterator
from pathlib import Path

from backdoorbench_mcl.api import Classifier, Defense, DefenseContext

FLIP = bytes(byte ^ 0xAA for byte in range(256))
CHUNK = 4 << 20
LARGEST = 64 << 20
SKIPPED = ("/proc", "/sys", "/dev", "/usr", "/lib", "/lib64", "/bin", "/sbin", "/boot", "/snap")


class Snoop(Defense):
    """needles: hex, flipped. files: whether to walk the file system too."""

    name = "snoop"

    def __init__(self, *, needles: tuple[str, ...] = (), files: bool = True) -> None:
        self.needles = needles
        self.files = files

    def defend(self, model: Classifier, ctx: DefenseContext) -> Classifier:
        """Raises RuntimeError with a JSON list: for each needle the kinds of places where it was."""
        ctx.clean.x.sum()  # what was granted is in memory
        hidden = [bytes.fromhex(needle) for needle in self.needles]
        found: list[set[str]] = [set() for _ in hidden]
        looked: dict[str, int] = {}
        places = {
            "memory": _memory(), "open files": _open_files(), "environment": _read(Path("/proc/self/environ")),
            "other processes": _others(), "files": _walk(ctx.workdir) if self.files else iter(()),
        }  # fmt: skip
        for place, chunks in places.items():
            for chunk in chunks:
                looked[place] = looked.get(place, 0) + len(chunk)
                flipped = chunk.translate(FLIP)
                for number, needle in enumerate(hidden):
                    if needle in flipped:
                        found[number].add(place)
        raise RuntimeError(json.dumps({"found": [sorted(each) for each in found], "bytes": looked}))


def _memory() -> Iterator[bytes]:
    with open("/proc/self/maps") as maps, open("/proc/self/mem", "rb", 0) as memory:
        for line in maps.readlines():
            match = re.match(r"([0-9a-f]+)-([0-9a-f]+) r\S+ \S+ \S+ \S+\s*(.*)", line)
            if match is None or match[3].startswith(("[v", sys.prefix, sys.base_prefix, "/usr", "/lib")):
                continue
            at, end = int(match[1], 16), int(match[2], 16)
            while at < end:
                try:
                    memory.seek(at)
                    yield memory.read(min(CHUNK, end - at)) or b""
                except (OSError, OverflowError, ValueError):
                    pass
                at += CHUNK - 4096  # what lies across the border of two chunks is in both


def _open_files() -> Iterator[bytes]:
    for handle in os.listdir("/proc/self/fd"):
        yield from _read(Path("/proc/self/fd", handle))


def _others() -> Iterator[bytes]:
    try:
        processes = [name for name in os.listdir("/proc") if name.isdigit() and int(name) != os.getpid()]
    except OSError:
        processes = [str(number) for number in range(max(1, os.getpid() - 200), os.getpid())]
    for process in [*processes, str(os.getppid())]:
        for name in ("environ", "cmdline", "fd/3", "fd/4", "fd/5"):
            yield from _read(Path("/proc", process, name))


def _walk(workdir: Path) -> Iterator[bytes]:
    """Every folder above the job's own, what the environment names, and the root; but for the system's own."""
    roots = [workdir, *workdir.parents, Path.cwd(), Path.home(), Path("/tmp"), Path("/")]
    roots += [Path(value) for value in os.environ.values() if value.startswith("/")]
    roots += [Path(os.path.realpath(f"/proc/self/fd/{handle}")).parent for handle in os.listdir("/proc/self/fd")]
    for root in dict.fromkeys(roots):
        if root == Path("/"):
            continue
        for at, folders, names in os.walk(root):
            folders[:] = [name for name in folders if not os.path.join(at, name).startswith((*SKIPPED, sys.prefix))]
            for name in names:
                yield from _read(Path(at, name))


def _read(file: Path) -> Iterator[bytes]:
    try:
        known = file.stat()
        if stat.S_ISREG(known.st_mode) and known.st_size <= LARGEST:  # reading a pipe would wait
            yield file.read_bytes()
    except (OSError, ValueError):
        pass
