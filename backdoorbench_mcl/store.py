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
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from .artefacts import Artefacts, Damaged
from .errors import UserError
from .rows import Row

SCHEMA_VERSION = 1
_TABLES = """
CREATE TABLE IF NOT EXISTS stage (key TEXT PRIMARY KEY, kind TEXT NOT NULL, spec TEXT NOT NULL,
    artefact TEXT NOT NULL, numerics TEXT NOT NULL, cost TEXT NOT NULL, created REAL NOT NULL);
CREATE TABLE IF NOT EXISTS attempt (key TEXT NOT NULL, n INTEGER NOT NULL, state TEXT NOT NULL, reason TEXT NOT NULL,
    log TEXT NOT NULL, created REAL NOT NULL, PRIMARY KEY (key, n));
CREATE TABLE IF NOT EXISTS row (key TEXT PRIMARY KEY, state TEXT NOT NULL, data TEXT NOT NULL, created REAL NOT NULL);
"""


@dataclass(frozen=True)
class Stage:
    """A finished stage. spec: what its key is the hash of; artefact: the name of what it made."""

    key: str
    kind: str
    spec: Mapping[str, Any]
    artefact: str
    numerics: Mapping[str, Any] = field(default_factory=dict)  # device, precision, threads, isolation, versions
    cost: Mapping[str, Any] = field(default_factory=dict)  # seconds, peak_mb


class Claim:
    """The right to compute one stage, held until `release` or the death of the process."""

    def __init__(self, handle: IO[bytes], path: Path) -> None:
        self._handle = handle
        self._path = path

    def release(self) -> None:
        self._path.unlink(missing_ok=True)  # while locked, so that nobody can lock the old file and believe in it
        self._handle.close()


class Store:
    """The runs folder. Raises UserError where it cannot be created, written or understood."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.artefacts = Artefacts(folder / "artefacts")
        try:
            for sub in ("artefacts", "snapshots", "locks"):
                (folder / sub).mkdir(parents=True, exist_ok=True)
            self._db = sqlite3.connect(folder / "store.sqlite", timeout=120, isolation_level=None)
            self._db.execute("PRAGMA synchronous = FULL")
            version = self._db.execute("PRAGMA user_version").fetchone()[0]
            if version > SCHEMA_VERSION:
                raise UserError(
                    f"the runs folder {folder} was written by a newer bbmcl (schema {version}, this one knows "
                    f"{SCHEMA_VERSION}); upgrade with pip, or name another folder with --runs"
                )
            if version < SCHEMA_VERSION:
                self._db.executescript(_TABLES)
                self._db.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
            self.artefacts.sweep()
        except (OSError, sqlite3.Error) as error:
            raise UserError(
                f"the runs folder {folder} cannot be used: {_cause(error)}; name another one with --runs"
            ) from error

    def close(self) -> None:
        """Close the database; further calls fail."""
        self._db.close()

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        try:
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield self._db
            except BaseException:
                self._db.execute("ROLLBACK")
                raise
            self._db.execute("COMMIT")
        except sqlite3.Error as error:
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")
            raise UserError(self._unwritable(error)) from error

    def _unwritable(self, error: Exception) -> str:
        return (
            f"the runs folder {self.folder} cannot be written: {_cause(error)}; make room or name another folder "
            "with --runs; what was finished is safe, the same command goes on from there"
        )

    # ------------------------------------------------------------ stages

    def stage(self, key: str) -> Stage | None:
        """The finished stage, or None. Its artefact is checked when it is opened."""
        found = self._db.execute(
            "SELECT key, kind, spec, artefact, numerics, cost FROM stage WHERE key = ?", (key,)
        ).fetchone()
        if found is None:
            return None
        key, kind, spec, artefact, numerics, cost = found
        return Stage(key, kind, json.loads(spec), artefact, json.loads(numerics), json.loads(cost))

    def changes(self) -> int:
        """A number that changes when another driver has written."""
        return int(self._db.execute("PRAGMA data_version").fetchone()[0])

    def stages(self) -> list[Stage]:
        """Every finished stage, oldest first."""
        keys = [key for (key,) in self._db.execute("SELECT key FROM stage ORDER BY created, key")]
        return [stage for stage in map(self.stage, keys) if stage is not None]

    def open(self, stage: Stage) -> Path:
        """The verified artefact of a stage. One that is damaged is forgotten, so that it is computed again: Damaged."""
        try:
            return self.artefacts.open(stage.artefact)
        except Damaged:
            with self._transaction() as db:
                db.execute("DELETE FROM stage WHERE artefact = ?", (stage.artefact,))
            self.artefacts.drop(stage.artefact)
            raise

    def forget(self, key: str) -> None:
        """Drop the record of a stage and of all that was made from it, so that they are computed again.

        Artefacts stay: another stage may have the same.
        """
        with self._transaction() as db:
            doomed = [key]
            while doomed:
                found = db.execute("SELECT artefact FROM stage WHERE key = ?", (doomed[0],)).fetchone()
                db.execute("DELETE FROM stage WHERE key = ?", (doomed.pop(0),))
                if found is not None:  # `numerics` names the artefacts of a stage's inputs
                    users = db.execute("SELECT key FROM stage WHERE numerics LIKE ?", (f'%"{found[0]}"%',))
                    doomed += [user for (user,) in users]

    def commit(self, stage: Stage, source: Path) -> Stage:
        """Store a finished stage with the files of `source` as its artefact; the first of two drivers wins.

        `stage.artefact` is filled in here. Returns what is stored.

        Raises UserError when the folder cannot be written, with nothing of the stage left visible.
        """
        try:
            artefact = self.artefacts.add(source)
        except OSError as error:
            raise UserError(self._unwritable(error)) from error
        with self._transaction() as db:
            db.execute(
                "INSERT OR IGNORE INTO stage VALUES (?, ?, ?, ?, ?, ?, ?)",
                (stage.key, stage.kind, json.dumps(stage.spec, sort_keys=True), artefact,
                 json.dumps(stage.numerics), json.dumps(stage.cost), time.time()),
            )  # fmt: skip
        shutil.rmtree(self.snapshots(stage.key), ignore_errors=True)
        stored = self.stage(stage.key)
        assert stored is not None
        return stored

    def snapshots(self, key: str) -> Path:
        """The folder of a stage's epoch snapshots; it need not exist."""
        return self.folder / "snapshots" / key

    def claim(self, key: str) -> Claim | None:
        """The lock of a stage, or None while another driver holds it."""
        path = self.folder / "locks" / key
        try:
            while True:
                handle = path.open("wb")
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
            raise UserError(self._unwritable(error)) from error

    # ------------------------------------------------------------ attempts and rows

    def attempt(self, key: str, state: str, reason: str, log: str) -> None:
        """Record how one try at a stage or a cell ended."""
        with self._transaction() as db:
            db.execute(
                "INSERT INTO attempt SELECT ?, COALESCE(MAX(n), 0) + 1, ?, ?, ?, ? FROM attempt WHERE key = ?",
                (key, state, reason, log, time.time(), key),
            )

    def last_attempt(self, key: str) -> tuple[str, str, str] | None:
        """(state, reason, log) of the newest try at a stage, or None."""
        found = self._db.execute(
            "SELECT state, reason, log FROM attempt WHERE key = ? ORDER BY n DESC LIMIT 1", (key,)
        ).fetchone()
        return None if found is None else (found[0], found[1], found[2])

    def put_row(self, row: Row) -> None:
        """Store the row of a cell, in place of an earlier one of the same key; what is measured outlives a failure."""
        with self._transaction() as db:
            db.execute(
                "INSERT INTO row VALUES (?, ?, ?, ?) ON CONFLICT (key) DO UPDATE SET state = excluded.state, "
                "data = excluded.data, created = excluded.created WHERE row.state != 'ok' OR excluded.state = 'ok'",
                (row.key, row.state, json.dumps(row.as_dict()), time.time()),
            )

    def row(self, key: str) -> Row | None:
        """The row of a cell, or None."""
        found = self._db.execute("SELECT data FROM row WHERE key = ?", (key,)).fetchone()
        return None if found is None else Row.from_dict(json.loads(found[0]))

    def rows(self) -> list[Row]:
        """Every row, oldest first."""
        found = self._db.execute("SELECT data FROM row ORDER BY created, key")
        return [Row.from_dict(json.loads(data)) for (data,) in found]


def _cause(error: Exception) -> str:
    return error.strerror if isinstance(error, OSError) and error.strerror else str(error)


__all__ = ["Claim", "Stage", "Store"]
