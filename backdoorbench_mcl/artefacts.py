"""Content-addressed artefacts: a folder of safetensors files and one `meta.json`, named by what it holds.

The name is a SHA-256 over canonical tensors (names, types, shapes, bytes in sorted order) and the canonical
JSON, so equal results have equal names whatever wrote them. A folder is written under a temporary name, synced
and renamed: a half-written artefact is never seen under its final name. Free of torch.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import mmap
import os
import shutil
import stat
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from . import cells, tensorfiles
from .errors import UserError
from .plainfiles import PlainFile, read_plain

META = "meta.json"
_MAX_META = 256 << 20  # bytes


class Damaged(Exception):
    """An artefact is missing, unreadable or not what its name says."""


def tensors(file: Path) -> Iterator[tuple[str, str, list[int], bytes]]:
    """(name, dtype, shape, SHA-256 of the bytes) of every tensor of a safetensors file, sorted by name.

    Raises Damaged for anything that is no well-formed safetensors file.
    """
    try:
        with PlainFile(file) as handle, mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ) as data:
            start = 8 + tensorfiles.header_length(data[:8], len(data))
            found = tensorfiles.entries(data[8:start], len(data) - start)
            with memoryview(data)[start:] as body:
                for one in found:
                    yield one.name, one.dtype, list(one.shape), hashlib.sha256(body[one.start : one.end]).digest()
    except (OSError, ValueError) as error:
        raise Damaged(f"{file.name}: {_cause(error)}") from error


def _cause(error: Exception) -> str:
    return error.strerror if isinstance(error, OSError) and error.strerror else str(error)


def require_plain(folder: Path) -> None:
    """Raise Damaged where a folder that a job filled is a link, or holds anything but ordinary files: a link leads to
    what the job could not read, and what is written to its place is written there.
    """
    try:
        if not stat.S_ISDIR(folder.lstat().st_mode):
            raise Damaged(f"{folder.name} is no folder")
        for file in folder.iterdir():
            if not stat.S_ISREG(file.lstat().st_mode):
                raise Damaged(f"{file.name} is no ordinary file")
    except OSError as error:
        raise Damaged(f"{folder.name}: {_cause(error)}") from error


def identify(folder: Path) -> str:
    """The name (hex) that the content of `folder` has. Raises Damaged for unreadable content."""
    digest = hashlib.sha256()
    try:
        meta = json.loads(read_plain(folder / META, _MAX_META))
        digest.update(cells.canonical(meta).encode())
        for file in sorted(folder.glob("*.safetensors")):
            digest.update(file.name.encode())
            for name, dtype, shape, content in tensors(file):
                digest.update(cells.canonical([name, dtype, shape]).encode() + content)
    except RecursionError as error:
        raise Damaged(f"{folder.name}: {META} has lists within lists") from error
    except (OSError, ValueError) as error:
        raise Damaged(f"{folder.name}: {error}") from error
    return digest.hexdigest()


def read_meta(folder: Path) -> dict[str, Any]:
    """The JSON of an artefact."""
    meta: dict[str, Any] = json.loads((folder / META).read_text())
    return meta


class Artefacts:
    """All artefacts of a store, under `root`."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._verified: set[str] = set()

    def path(self, name: str) -> Path:
        """Where the artefact `name` lies or would lie."""
        return self.root / name[:2] / name

    def open(self, name: str) -> Path:
        """The folder of an artefact, verified against its name once per process; raises Damaged."""
        folder = self.path(name)
        if name not in self._verified:
            found = identify(folder)
            if found != name:
                raise Damaged(f"artefact {name[:12]} holds the content of {found[:12]}")
            self._verified.add(name)
        return folder

    def add(self, source: Path) -> str:
        """Copy the safetensors files and `meta.json` of `source` in; returns the name. An OSError leaves no trace.

        Raises Damaged where one of them is a link, which could lead to what its author was not granted.
        """
        require_plain(source)
        name = identify(source)
        final = self.path(name)
        self._stay_inside(name)
        if final.exists():
            try:
                self.open(name)
                return name
            except Damaged:
                self.drop(name)
        scratch = self.root / f"tmp-{uuid.uuid4().hex}"
        try:
            scratch.mkdir(parents=True)
            for file in sorted([*source.glob("*.safetensors"), source / META]):
                shutil.copyfile(file, scratch / file.name)
                sync(scratch / file.name)
            sync(scratch)
            final.parent.mkdir(exist_ok=True)
            try:
                scratch.rename(final)
            except OSError:
                if not final.exists():  # otherwise another driver was first with the same content
                    raise
            sync(final.parent)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
        self._verified.add(name)
        return name

    def drop(self, name: str) -> None:
        """Remove an artefact that turned out damaged."""
        self._verified.discard(name)
        self._stay_inside(name)
        grave = self.root / f"tmp-{uuid.uuid4().hex}"
        with contextlib.suppress(FileNotFoundError):  # another driver was first
            self.path(name).rename(grave)
        shutil.rmtree(grave, ignore_errors=True)

    def _stay_inside(self, name: str) -> None:
        """Raise UserError where a link stands for the folder in which an artefact is written or removed."""
        folder = self.path(name).parent
        if folder.is_symlink():
            raise UserError(
                f"{folder} is a link; what lies elsewhere is neither written nor removed: put its content in its place"
            )

    def sweep(self) -> None:
        """Remove what killed processes left under temporary names more than an hour ago."""
        for scratch in self.root.glob("tmp-*"):
            try:
                age = os.path.getmtime(self.root) - os.path.getmtime(scratch)
            except FileNotFoundError:
                continue
            if age > 3600:
                shutil.rmtree(scratch, ignore_errors=True)


def sync(path: Path) -> None:
    """Have a file's content, or a folder's entries, on the disk before going on."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


__all__ = ["META", "Artefacts", "Damaged", "identify", "read_meta", "require_plain", "sync", "tensors"]
