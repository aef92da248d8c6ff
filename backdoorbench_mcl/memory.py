"""How much memory a process holds, and how much there is. Free of torch."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

CGROUP = Path("/sys/fs/cgroup/memory.max")
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of glibc's mallopt
_KEPT = 33 << 20  # bytes of what is kept once freed: 512 maps of 16x32x32 in float32, with what surrounds them
_AT_ONCE = 256 << 20  # bytes of freed memory from which on some is given back after all


def held(pid: int) -> int:
    """Bytes that the process keeps from others: anonymous and shared memory, not the pages of mapped files.

    0 where there is no such process, or no /proc.
    """
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    fields = dict(line.split(":", 1) for line in lines if ":" in line)
    return sum(int(fields.get(name, "0").split()[0]) for name in ("RssAnon", "RssShmem")) * 1024


def total() -> int:
    """Bytes of this machine, or of the container that it pretends to be; 0 where the system does not say."""
    try:
        physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return 0
    try:
        return min(physical, int(CGROUP.read_text()))
    except (OSError, ValueError):  # no container, or one without a limit: "max"
        return physical


def keep() -> bool:
    """From now on this process keeps what it frees, up to 256 MB in pieces below 33 MB, and uses it again; whether its
    C library (glibc) can do that.

    By itself it asks the kernel for every piece of 32 MB or more anew, and gives smaller ones back when many are freed
    at once; the kernel then fills page by page with zeros: half of the time of an evaluation in batches of 512.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # another C library
        return False
    mapped = any(mallopt(_M_MMAP_THRESHOLD, size) == 1 for size in (_KEPT, 32 << 20))  # an older one takes no more
    return bool(mallopt(_M_TRIM_THRESHOLD, _AT_ONCE) == 1 and mapped)


__all__ = ["held", "keep", "total"]
