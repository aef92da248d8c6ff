"""Files that others made, opened as files: no pipe that waits for ever, no device without end. Free of torch."""

from __future__ import annotations

import errno
import io
import os
import stat
from pathlib import Path

_KINDS = (
    (stat.S_ISDIR, "a folder"), (stat.S_ISFIFO, "a pipe"), (stat.S_ISCHR, "a device"), (stat.S_ISBLK, "a device"),
    (stat.S_ISSOCK, "a socket"),
)  # fmt: skip


class PlainFile(io.FileIO):
    """An ordinary file opened for reading. most: bytes that one `read` may ask for; `readinto` takes any number.

    Libraries that parse a file ask for as much as its header says, and get a buffer of that size before the file turns
    out to be shorter. follow: whether a link may lead to the file.
    Raises OSError, whose `strerror` says what is there instead, for a folder, a pipe, a device, a link.
    """

    def __init__(self, path: Path, *, most: int = 64 << 20, follow: bool = True) -> None:
        self.most = most
        flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | (0 if follow else os.O_NOFOLLOW)
        try:
            handle = os.open(path, flags)
        except ValueError as error:  # a null byte
            raise OSError(errno.EINVAL, str(error), str(path)) from error
        except OSError as error:
            if error.errno == errno.ENXIO:  # a socket cannot be opened at all
                raise OSError(errno.EINVAL, "is a socket, no ordinary file", str(path)) from error
            if error.errno == errno.ELOOP and not follow:
                raise OSError(errno.EINVAL, "is a link, no ordinary file", str(path)) from error
            raise
        mode = os.fstat(handle).st_mode
        if not stat.S_ISREG(mode):
            os.close(handle)
            kind = next((name for matches, name in _KINDS if matches(mode)), "something else")
            raise OSError(errno.EINVAL, f"is {kind}, no ordinary file", str(path))
        super().__init__(handle, "rb")

    @property
    def size(self) -> int:
        """Bytes of the file."""
        return os.fstat(self.fileno()).st_size

    def read(self, size: int | None = -1, /) -> bytes:
        """At most `size` bytes. Raises ValueError where that is more than `most`."""
        wanted = self.size if size is None or size < 0 else size
        if wanted > self.most:
            raise ValueError(f"{wanted:,} bytes at once, more than the {self.most:,} that are accepted")
        return super().read(wanted) or b""


def read_plain(path: Path, most: int, *, follow: bool = True) -> bytes:
    """The content of an ordinary file of at most `most` bytes. Raises OSError, as `PlainFile`, and for a larger one.

    Example: `read_plain(Path("options.toml"), 1 << 20)`
    """
    with PlainFile(path, most=most + 1, follow=follow) as file:
        if file.size > most:
            raise OSError(errno.EFBIG, f"has {file.size:,} bytes, more than the {most:,} that are accepted", str(path))
        return file.read(min(most, max(file.size, 1 << 16)))  # a buffer of `most` would be made before any byte is read


def tail(path: Path, count: int) -> bytes:
    """The last `count` bytes of an ordinary file, no link; none where it cannot be read."""
    try:
        with PlainFile(path, follow=False) as file:
            file.seek(max(0, file.size - count))
            return file.read(count)
    except OSError:
        return b""


__all__ = ["PlainFile", "read_plain", "tail"]
