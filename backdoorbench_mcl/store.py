"""What was computed: stages, attempts and rows in SQLite, artefacts beside it (design 3.6). Free of torch.

Only drivers write; several may share one store. A stage or a row is one transaction; `claim` is a lock per
stage that the kernel releases when its holder dies, however it dies.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import sqlite3
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import IO, Any

from .artefacts import Artefacts, Damaged
from .errors import UserError
from .ledger import DATABASE, JOURNAL, Ledger, cause
from .rows import Row
from .text import one_line

_FOLDERS = ("artefacts", "snapshots", "locks")
_STAGES = "SELECT key, kind, spec, artefact, numerics, cost FROM stage"
_MEASURED = (
    "SELECT spec, COALESCE(json_extract(cost, '$.wall'), json_extract(cost, '$.seconds')), "
    "json_extract(cost, '$.peak_gpu_mb') FROM stage WHERE json_extract(numerics, '$.machine') = ? "
    "AND json_extract(numerics, '$.threads') = ? ORDER BY created DESC, key LIMIT ?"
)


@dataclass(frozen=True)
class Stage:
    """A finished stage. spec: what its key is the hash of; artefact: the name of what it made."""

    key: str
    kind: str
    spec: Mapping[str, Any]
    artefact: str
    numerics: Mapping[str, Any] = field(default_factory=dict)  # device, precision, threads, isolation, versions
    cost: Mapping[str, Any] = field(default_factory=dict)  # seconds, peak_mb

    @classmethod
    def from_dict(cls, item: Any) -> Stage:
        """The stage behind `asdict`. Raises ValueError for anything else."""
        names = {f.name for f in fields(cls)}
        if (
            not isinstance(item, Mapping)
            or not set(item) <= names
            or not {"key", "kind", "spec", "artefact"} <= set(item)
        ):
            raise ValueError("no stage")
        for name, value in item.items():
            wanted: Any = str if name in ("key", "kind", "artefact") else Mapping
            plain = wanted is not str or (isinstance(value, str) and value != "" and value.isascii())
            if not isinstance(value, wanted) or not plain or (wanted is str and not value.isprintable()):
                raise ValueError(f"{name} of a stage is {str(value)[:80]!r}")
        return cls(**item)


@dataclass(frozen=True)
class Measured:
    """What a stage took. seconds: from the start of its job to its result; gpu_mb: at its peak, None without a GPU."""

    spec: Mapping[str, Any]
    seconds: float
    gpu_mb: float | None = None


class Claim:
    """The right to compute one stage, held until `release` or the death of the process."""

    def __init__(self, handle: IO[bytes], path: Path) -> None:
        self._handle = handle
        self._path = path

    def release(self) -> None:
        self._path.unlink(missing_ok=True)  # while locked, so that nobody can lock the old file and believe in it
        self._handle.close()


class Store:
    """The runs folder. say: told in one line of what had to be repaired; by default a line on standard error.
    readonly: for one that must stay as it is, to the last byte; it must exist, and damage is told but not cleared.

    Raises UserError where it cannot be created, written or understood.
    """

    def __init__(self, folder: Path, say: Callable[[str], None] | None = None, *, readonly: bool = False) -> None:
        self.folder = folder
        self.readonly = readonly
        self.artefacts = Artefacts(folder / "artefacts")
        for sub in (*_FOLDERS, DATABASE, JOURNAL):
            if (folder / sub).is_symlink():
                raise UserError(
                    f"the runs folder {folder} cannot be used: {sub} in it is a link, and what lies elsewhere is not "
                    "written; put its content in its place (the whole runs folder may be a link)"
                )
        try:
            for sub in () if readonly else _FOLDERS:
                (folder / sub).mkdir(parents=True, exist_ok=True)
            self.ledger = Ledger(folder, say or (lambda line: print(f"bbmcl: {line}", file=sys.stderr)), readonly)
            if not readonly:
                self.artefacts.sweep()
        except (OSError, sqlite3.Error) as error:
            # what a killed driver left half written is put back by whoever may write
            remedy = "if a run was killed there, bbmcl report puts it right; or " if readonly else ""
            raise UserError(
                f"the runs folder {folder} cannot be used: {cause(error)}; {remedy}name another one with --runs"
            ) from error

    @staticmethod
    def exists(folder: Path) -> bool:
        """Whether `folder` holds results: a journal is enough, the database is made again from it."""
        return any((folder / name).exists() for name in (DATABASE, JOURNAL))

    def close(self) -> None:
        """Close the database; further calls fail."""
        self.ledger.close()

    # ------------------------------------------------------------ stages

    def stage(self, key: str) -> Stage | None:
        """The finished stage, or None. Its artefact is checked when it is opened."""
        with self._reading():
            found = self.ledger.read(_STAGES + " WHERE key = ?", key)
            return _stage(found[0]) if found else None

    @contextmanager
    def _reading(self) -> Iterator[None]:
        """What does not come out of the database as it went in is one line."""
        try:
            yield
        except (ValueError, TypeError, RecursionError) as error:
            raise UserError(
                f"the runs folder {self.folder} cannot be read: {one_line(str(error), 300)}; take {DATABASE} from a "
                "copy, or name another folder with --runs"
            ) from error

    def changes(self) -> int:
        """A number that changes when another driver has written."""
        return int(self.ledger.read("PRAGMA data_version")[0][0])

    def stages(self) -> list[Stage]:
        """Every finished stage, oldest first."""
        with self._reading():
            found = self.ledger.read(_STAGES + " ORDER BY created, key")
            return [_stage(record) for record in found]

    def keys(self) -> set[str]:
        """Keys of all finished stages."""
        return {str(key) for (key,) in self.ledger.read("SELECT key FROM stage")}

    def measured(self, machine: str, threads: int, most: int) -> list[Measured]:
        """What stages took on this class of machine with so many threads; the newest `most`, oldest first."""
        with self._reading():
            found = self.ledger.read(_MEASURED, machine, threads, most)
            told = [(json.loads(spec), seconds, gpu) for spec, seconds, gpu in found if _positive(seconds)]
            kept = [(spec, seconds, gpu if gpu == 0 or _positive(gpu) else None) for spec, seconds, gpu in told]
            return [Measured(*stage) for stage in reversed(kept)]

    def open(self, stage: Stage) -> Path:
        """The verified artefact of a stage. One that is damaged is forgotten, so that it is computed again: Damaged."""
        try:
            return self.artefacts.open(stage.artefact)
        except Damaged:
            if self.readonly:
                raise
            with self.ledger.transaction() as change:
                for (key,) in change.read("SELECT key FROM stage WHERE artefact = ?", stage.artefact):
                    change.change("forget", key)
            self.artefacts.drop(stage.artefact)
            raise

    def forget(self, key: str) -> None:
        """Drop the record of a stage and of all that was made from it, so that they are computed again.

        Artefacts stay: another stage may have the same.
        """
        with self.ledger.transaction() as change:
            doomed = [key]
            while doomed:
                found = change.read("SELECT artefact FROM stage WHERE key = ?", doomed[0])
                change.change("forget", doomed.pop(0))
                for (artefact,) in found:  # `numerics` names the artefacts of a stage's inputs
                    users = change.read("SELECT key FROM stage WHERE numerics LIKE ?", f'%"{artefact}"%')
                    doomed += [user for (user,) in users]

    def commit(self, stage: Stage, source: Path) -> Stage:
        """Store a finished stage with the files of `source` as its artefact; the first of two drivers wins.

        `stage.artefact` is filled in here. Returns what is stored.

        Raises UserError when the folder cannot be written, with nothing of the stage left visible.
        """
        try:
            artefact = self.artefacts.add(source)
        except OSError as error:
            raise UserError(self.ledger.unusable(error)) from error
        with self.ledger.transaction() as change:
            change.change(
                "stage", stage.key, stage.kind, _text(stage.spec, ordered=True), artefact, _text(stage.numerics),
                _text(stage.cost), time.time(),
            )  # fmt: skip
        shutil.rmtree(self.snapshots(stage.key), ignore_errors=True)
        stored = self.stage(stage.key)
        assert stored is not None
        return stored

    def snapshots(self, key: str) -> Path:
        """The folder of a stage's epoch snapshots; it need not exist. A link in its place is removed, not followed."""
        folder = self.folder / "snapshots" / key
        if folder.is_symlink():
            folder.unlink()
        return folder

    def claim(self, key: str) -> Claim | None:
        """The lock of a stage, or None while another driver holds it."""
        path = self.folder / "locks" / key
        try:
            while True:
                handle = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666), "r+b")
                try:
                    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except OSError as error:
                    handle.close()
                    if error.errno in (errno.EAGAIN, errno.EACCES):
                        return None
                    raise
                try:
                    if os.stat(path).st_ino == os.fstat(handle.fileno()).st_ino:
                        return Claim(handle, path)
                except FileNotFoundError:
                    pass
                handle.close()  # the holder before us removed this file: lock its successor
        except OSError as error:
            raise UserError(self.ledger.unusable(error)) from error

    # ------------------------------------------------------------ attempts and rows

    def attempt(self, key: str, state: str, reason: str, log: str) -> None:
        """Record how one try at a stage or a cell ended."""
        with self.ledger.transaction() as change:
            ((last,),) = change.read("SELECT COALESCE(MAX(n), 0) FROM attempt WHERE key = ?", key)
            change.change("attempt", key, last + 1, state, reason, log, time.time())

    def last_attempt(self, key: str) -> tuple[str, str, str] | None:
        """(state, reason, log) of the newest try at a stage, or None."""
        found = self.ledger.read("SELECT state, reason, log FROM attempt WHERE key = ? ORDER BY n DESC LIMIT 1", key)
        return (str(found[0][0]), str(found[0][1]), str(found[0][2])) if found else None

    def put_row(self, row: Row) -> None:
        """Store the row of a cell, in place of an earlier one of the same key; what is measured outlives a failure."""
        with self.ledger.transaction() as change:
            change.change("row", row.key, row.state, _text(row.as_dict()), time.time())

    def row(self, key: str) -> Row | None:
        """The row of a cell, or None."""
        with self._reading():
            found = self.ledger.read("SELECT data FROM row WHERE key = ?", key)
            return Row.from_dict(json.loads(found[0][0])) if found else None

    def rows(self) -> list[Row]:
        """Every row, oldest first."""
        with self._reading():
            found = self.ledger.read("SELECT data FROM row ORDER BY created, key")
            return [Row.from_dict(json.loads(data)) for (data,) in found]


def _text(value: Any, ordered: bool = False) -> str:
    """JSON. Raises UserError for a number that is not finite, which JSON has no word for."""
    try:
        return json.dumps(value, sort_keys=ordered, allow_nan=False)
    except ValueError as error:
        raise UserError(f"a result with a number that is not finite cannot be stored: {error}") from error


def _positive(value: Any) -> bool:
    """Whether a number of a database that may come from elsewhere is one."""
    return isinstance(value, int | float) and 0 < value < 1e9


def _stage(record: tuple[Any, ...]) -> Stage:
    key, kind, spec, artefact, numerics, cost = record
    parts = {"spec": json.loads(spec), "numerics": json.loads(numerics), "cost": json.loads(cost)}
    return Stage.from_dict({"key": key, "kind": kind, "artefact": artefact, **parts})


__all__ = ["Claim", "Measured", "Stage", "Store"]
