"""The database of a runs folder, and the journal from which it can be made again. Free of torch.

Every change is one checksummed line in `store.journal`, on the disk before the transaction that makes it in
`store.sqlite` ends. So either file is enough: a database that is torn, zeroed or gone is made again from the journal
when it is next opened, a journal that is short or torn is written again from the database (ADR 0021).
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import sqlite3
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from .artefacts import sync
from .errors import UserError

SCHEMA_VERSION = 1
DATABASE, JOURNAL, LOCK = "store.sqlite", "store.journal", "locks/store"
PATIENCE = 120.0  # seconds to wait for another process that writes
_TABLES = """
CREATE TABLE IF NOT EXISTS stage (key TEXT PRIMARY KEY, kind TEXT NOT NULL, spec TEXT NOT NULL,
    artefact TEXT NOT NULL, numerics TEXT NOT NULL, cost TEXT NOT NULL, created REAL NOT NULL);
CREATE TABLE IF NOT EXISTS attempt (key TEXT NOT NULL, n INTEGER NOT NULL, state TEXT NOT NULL, reason TEXT NOT NULL,
    log TEXT NOT NULL, created REAL NOT NULL, PRIMARY KEY (key, n));
CREATE TABLE IF NOT EXISTS row (key TEXT PRIMARY KEY, state TEXT NOT NULL, data TEXT NOT NULL, created REAL NOT NULL);
CREATE TABLE IF NOT EXISTS journal (bytes INTEGER NOT NULL);
"""
_RECORDS = frozenset({"stage", "attempt", "row"})
_CHANGES: Mapping[str, str] = {  # every way in which a store changes; replayed in order they give the same tables
    "stage": "INSERT OR IGNORE INTO stage VALUES (?, ?, ?, ?, ?, ?, ?)",
    "forget": "DELETE FROM stage WHERE key = ?",
    "attempt": "INSERT OR IGNORE INTO attempt VALUES (?, ?, ?, ?, ?, ?)",
    "row": "INSERT INTO row VALUES (?, ?, ?, ?) ON CONFLICT (key) DO UPDATE SET state = excluded.state, "
    "data = excluded.data, created = excluded.created WHERE row.state != 'ok' OR excluded.state = 'ok'",
}
_ALL: Mapping[str, str] = {  # kind of change -> what is stored of it
    "stage": "SELECT * FROM stage ORDER BY rowid", "attempt": "SELECT * FROM attempt ORDER BY rowid",
    "row": "SELECT * FROM row ORDER BY rowid",
}  # fmt: skip
_UNSOUND = (  # zeros in the middle of a text leave the structure whole, which is all that SQLite checks itself
    "SELECT 1 FROM stage WHERE NOT (json_valid(spec) AND json_valid(numerics) AND json_valid(cost)) OR "
    "instr(key, char(0)) OR length(artefact) != 64 OR kind = '' OR instr(kind, char(0))",
    "SELECT 1 FROM row WHERE NOT json_valid(data) OR instr(key, char(0)) OR instr(state, char(0))",
    "SELECT 1 FROM attempt WHERE instr(key, char(0)) OR instr(state, char(0))",
)


_FAULTS = (sqlite3.Error, UnicodeDecodeError)  # the second where SQLite quotes what is damaged


class _Torn(Exception):
    """The database is not what was written."""


class Transaction:
    """Reads and changes that happen together or not at all."""

    def __init__(self, db: sqlite3.Connection) -> None:
        self._db = db
        self.changes: list[list[Any]] = []

    def read(self, sql: str, *values: Any) -> list[tuple[Any, ...]]:
        """The rows of a query."""
        return self._db.execute(sql, values).fetchall()

    def change(self, kind: str, *values: Any) -> None:
        """One of `_CHANGES`."""
        self._db.execute(_CHANGES[kind], values)
        self.changes.append([kind, *values])


class Ledger:
    """Database and journal in `folder`, which exists. say: told in one line of what had to be repaired; readonly:
    nothing is repaired.

    Raises UserError where they cannot be used.
    """

    def __init__(self, folder: Path, say: Callable[[str], None], readonly: bool = False) -> None:
        self.folder = folder
        self.say = say
        self.writable = not readonly and os.access(folder, os.W_OK)
        self._lock: IO[bytes] | None = None
        if self.writable:
            self._lock = (folder / LOCK).open("ab")  # which leaves the file as it is, its time included
            fcntl.flock(self._lock, fcntl.LOCK_SH)
        self._db = self._open()

    def close(self) -> None:
        """Close the database and let others repair or tidy it; further calls fail."""
        self._db.close()
        if self._lock is not None:
            self._lock.close()

    def alone(self) -> bool:
        """Whether no other process uses this folder; from then on until `close` none can."""
        if self._lock is None:
            return False
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            fcntl.flock(self._lock, fcntl.LOCK_SH)  # a try that fails may cost the shared lock
            return False
        return True

    # ------------------------------------------------------------ reading and writing

    def read(self, sql: str, *values: Any) -> list[tuple[Any, ...]]:
        """The rows of a query. Raises UserError."""
        try:
            return self._db.execute(sql, values).fetchall()
        except _FAULTS as error:
            raise UserError(self.unusable(error)) from error

    @contextmanager
    def transaction(self) -> Iterator[Transaction]:
        """Changes that are all stored at the end of the block, or none of them. Raises UserError."""
        try:
            self._db.execute("BEGIN IMMEDIATE")
            try:
                transaction = Transaction(self._db)
                yield transaction
                self._journal(transaction.changes)
            except BaseException:
                self._db.execute("ROLLBACK")
                raise
            self._db.execute("COMMIT")
        except (*_FAULTS, OSError) as error:
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")
            raise UserError(self.unusable(error)) from error

    def unusable(self, error: Exception) -> str:
        """What to tell the user of a failed read or write."""
        told = cause(error)
        safe = "what was finished is safe, the same command goes on from there"
        if "locked" in told:
            return f"another process has kept {self.folder} locked for {PATIENCE:g} s; end that one; {safe}"
        if "malformed" in told or "not a database" in told:
            return f"the database of {self.folder} is damaged; run the same command again, it repairs that"
        return (
            f"the runs folder {self.folder} cannot be written: {told}; make room or name another folder with --runs; "
            f"{safe}"
        )

    def compact(self) -> None:
        """Free what forgotten records took. Only for who is `alone`. Raises UserError."""
        try:
            _rewrite(self.folder / JOURNAL, self._db)
            _note(self._db, _size(self.folder / JOURNAL))
            self._db.execute("VACUUM")
        except (sqlite3.Error, OSError) as error:
            raise UserError(self.unusable(error)) from error

    def _journal(self, changes: Sequence[Sequence[Any]]) -> None:
        """Write changes behind the others; within a transaction, which keeps others away."""
        if not changes:
            return
        file = self.folder / JOURNAL
        with file.open("ab") as out:
            before = out.tell()
            try:
                out.write(_separated(file, before) + b"".join(map(_line, changes)))
                out.flush()
                os.fsync(out.fileno())
            except OSError:
                with contextlib.suppress(OSError):
                    os.ftruncate(out.fileno(), before)
                raise
            _note(self._db, out.tell())

    # ------------------------------------------------------------ opening and repairing

    def _open(self) -> sqlite3.Connection:
        file, journal = self.folder / DATABASE, self.folder / JOURNAL
        lost = not file.exists() or file.stat().st_size == 0
        if self.writable and lost and _size(journal) > 0:
            return self._made_again()
        try:
            return self._checked(_connect(file, self.writable))
        except _Torn as torn:
            if not self.writable or _size(journal) == 0:
                lacking = "has no journal" if self.writable else "may not be written"
                raise UserError(
                    f"the runs folder {self.folder} cannot be used: its database is damaged ({torn}) and it {lacking}; "
                    "name another one with --runs"
                ) from torn
            return self._made_again()

    def _checked(self, db: sqlite3.Connection) -> sqlite3.Connection:
        try:
            version = db.execute("PRAGMA user_version").fetchone()[0]
            if version > SCHEMA_VERSION:
                raise UserError(
                    f"the runs folder {self.folder} was written by a newer bbmcl (schema {version}, this one knows "
                    f"{SCHEMA_VERSION}); upgrade with pip, or name another folder with --runs"
                )
            if self.writable:
                _prepare(db)
            elif _RECORDS - _tables(db):
                raise UserError(f"the runs folder {self.folder} holds no results: its {DATABASE} has no tables")
            strange = db.execute("SELECT name FROM sqlite_master WHERE type IN ('view', 'trigger')").fetchone()
            if strange is not None:  # code of others, which would run with each statement
                raise sqlite3.DatabaseError(f"{DATABASE} holds the view or trigger {str(strange[0])[:80]!r}")
            found = db.execute("PRAGMA integrity_check(1)").fetchone()[0]
            if found != "ok":
                raise _Torn(str(found))
            if any(db.execute(query).fetchone() for query in _UNSOUND):
                raise _Torn("a record is unreadable")
            if self.writable:
                self._match(db)
        except (sqlite3.DatabaseError, UnicodeDecodeError) as error:
            db.close()
            if "locked" in str(error):
                raise UserError(self.unusable(error)) from error
            if isinstance(error, sqlite3.OperationalError) and "malformed" not in str(error):
                raise
            raise _Torn(str(error)) from error
        except BaseException:
            db.close()
            raise
        return db

    def _match(self, db: sqlite3.Connection) -> None:
        """Have the journal hold what the database holds, and the other way round."""
        journal = self.folder / JOURNAL
        db.execute("BEGIN IMMEDIATE")
        try:
            noted, size = _noted(db), _size(journal)
            if size > noted:  # its last lines were written, and then their process died
                _replay(db, _changes(journal, noted)[0])
            if size < noted or noted == 0 or _torn_lines(journal):
                _rewrite(journal, db)
            if _size(journal) != noted:
                _note(db, _size(journal))
            db.execute("COMMIT")
        except BaseException:
            db.execute("ROLLBACK")
            raise

    def _made_again(self) -> sqlite3.Connection:
        """A database from the journal, in place of one that is damaged or gone."""
        if not self.alone():
            raise UserError(f"the database of {self.folder} is damaged; end the other bbmcl that uses it, run again")
        file, journal, fresh = self.folder / DATABASE, self.folder / JOURNAL, self.folder / f"{DATABASE}.new"
        fresh.unlink(missing_ok=True)
        changes, unreadable = _changes(journal)
        db = _connect(fresh, True)
        _prepare(db)
        db.execute("BEGIN")
        _replay(db, changes)
        _note(db, _size(journal))
        db.execute("COMMIT")
        counted = "SELECT (SELECT COUNT(*) FROM stage), (SELECT COUNT(*) FROM row)"
        stages, rows = db.execute(counted).fetchone()
        db.close()
        sync(fresh)
        kept = self._set_aside(file)
        fresh.rename(file)
        sync(self.folder)
        told = f"its damaged file is kept as {kept}" if kept else "it was gone"
        torn = f"; {unreadable} lines of the journal could not be read" if unreadable else ""
        self.say(
            f"the database of {self.folder} has been made again from its journal: {stages} stages, {rows} rows{torn}; "
            f"{told}"
        )
        assert self._lock is not None
        fcntl.flock(self._lock, fcntl.LOCK_SH)
        return self._checked(_connect(file, True))

    def _set_aside(self, file: Path) -> str:
        """Rename a damaged database; what SQLite left beside it must not be applied to another one."""
        for beside in ("-journal", "-wal", "-shm"):
            file.with_name(file.name + beside).unlink(missing_ok=True)
        if not file.exists():
            return ""
        number = 1 + sum(1 for _ in self.folder.glob(f"{DATABASE}.damaged-*"))
        return file.rename(file.with_name(f"{DATABASE}.damaged-{number}")).name


# ---------------------------------------------------------------- database


def _connect(file: Path, writable: bool) -> sqlite3.Connection:
    mode = "rwc" if writable else "ro"
    db = sqlite3.connect(f"{file.absolute().as_uri()}?mode={mode}", uri=True, timeout=PATIENCE, isolation_level=None)
    db.execute("PRAGMA trusted_schema = OFF")
    return db


def _prepare(db: sqlite3.Connection) -> None:
    db.execute("PRAGMA synchronous = FULL")
    if not {*_RECORDS, "journal"} <= _tables(db):
        db.executescript(f"BEGIN IMMEDIATE; {_TABLES} PRAGMA user_version = {SCHEMA_VERSION}; COMMIT")


def _tables(db: sqlite3.Connection) -> set[str]:
    return {name for (name,) in db.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}


def _noted(db: sqlite3.Connection) -> int:
    """How long the journal was after the last transaction; 0 for a store that never had one."""
    found = db.execute("SELECT bytes FROM journal").fetchone()
    return 0 if found is None else int(found[0])


def _note(db: sqlite3.Connection, size: int) -> None:
    db.execute("DELETE FROM journal")
    db.execute("INSERT INTO journal VALUES (?)", (size,))


def _replay(db: sqlite3.Connection, changes: Iterable[Sequence[Any]]) -> None:
    for kind, *values in changes:
        db.execute(_CHANGES[kind], values)


# ---------------------------------------------------------------- journal


def _line(change: Sequence[Any]) -> bytes:
    text = json.dumps(change, separators=(",", ":")).encode()
    return b"%08x %s\n" % (zlib.crc32(text), text)


def _separated(file: Path, size: int) -> bytes:
    """What must stand before a new line: an end for one that was never finished."""
    if size == 0:
        return b""
    with file.open("rb") as found:
        found.seek(size - 1)
        return b"" if found.read(1) == b"\n" else b"\n"


def _changes(file: Path, start: int = 0) -> tuple[list[list[Any]], int]:
    """The changes of a journal from byte `start` on, and how many of its lines are unreadable."""
    changes: list[list[Any]] = []
    unreadable = 0
    if not file.exists():
        return changes, unreadable
    with file.open("rb") as found:
        found.seek(start)
        for line in found:
            change = _change(line)
            if change is None:
                unreadable += 1
            else:
                changes.append(change)
    return changes, unreadable


def _change(line: bytes) -> list[Any] | None:
    """The change that a line tells, None for anything else: the journal may be a stranger's."""
    text = _text(line)
    try:
        change = None if text is None else json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(change, list) or not change or not isinstance(change[0], str) or change[0] not in _CHANGES:
        return None
    fits = len(change) == 1 + _CHANGES[change[0]].count("?")
    return change if fits and all(isinstance(value, (str, int, float)) for value in change[1:]) else None


def _text(line: bytes) -> bytes | None:
    """What a line says, None for one that is torn."""
    checksum, _, text = line.rstrip(b"\n").partition(b" ")
    return text if checksum == b"%08x" % zlib.crc32(text) else None


def _torn_lines(file: Path) -> bool:
    with file.open("rb") as found:
        return any(_text(line) is None for line in found)


def _rewrite(file: Path, db: sqlite3.Connection) -> None:
    """A journal of what a database holds."""
    fresh = file.with_name(f"{file.name}.new")
    with fresh.open("wb") as out:
        for kind, query in _ALL.items():
            for values in db.execute(query):
                out.write(_line([kind, *values]))
        out.flush()
        os.fsync(out.fileno())
    fresh.rename(file)
    sync(file.parent)


def _size(file: Path) -> int:
    return file.stat().st_size if file.exists() else 0


def cause(error: Exception) -> str:
    """The system's words for an error."""
    return error.strerror if isinstance(error, OSError) and error.strerror else str(error)


__all__ = ["DATABASE", "JOURNAL", "LOCK", "SCHEMA_VERSION", "Ledger", "Transaction", "cause"]
