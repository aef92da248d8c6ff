"""The database of a runs folder, and the journal from which it can be made again. Free of torch.

Every change is one checksummed line in `store.journal`, on the disk before the transaction that makes it in
`store.sqlite` ends. So either file is enough: a database that is torn, zeroed or gone is made again from the journal
when it is next opened, a journal that is short or torn is written again from the database (ADR 0021).
"""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import json
import os
import sqlite3
import time
import uuid
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, NoReturn

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
CREATE TABLE IF NOT EXISTS journal (bytes INTEGER NOT NULL, generation TEXT NOT NULL);
"""
_CHANGES: Mapping[str, str] = {  # every way in which a store changes; replayed in order they give the same tables
    "stage": "INSERT OR IGNORE INTO stage VALUES (?, ?, ?, ?, ?, ?, ?)",
    "forget": "DELETE FROM stage WHERE key = ?",
    "generation": "SELECT ?",  # the first line of a journal: which one it is
    "attempt": "INSERT OR IGNORE INTO attempt VALUES (?, ?, ?, ?, ?, ?)",
    "row": "INSERT INTO row VALUES (?, ?, ?, ?) ON CONFLICT (key) DO UPDATE SET state = excluded.state, "
    "data = excluded.data, created = excluded.created WHERE row.state != 'ok' OR excluded.state = 'ok'",
}
_JSON: Mapping[str, tuple[int, ...]] = {  # kind of change -> which of its values are JSON
    "stage": (3, 5, 6), "row": (3,), "attempt": (), "forget": (), "generation": (),
}  # fmt: skip
_ALL: Mapping[str, str] = {  # kind of change -> what is stored of it
    "stage": "SELECT * FROM stage ORDER BY rowid", "attempt": "SELECT * FROM attempt ORDER BY rowid",
    "row": "SELECT * FROM row ORDER BY rowid",
}  # fmt: skip
_RECORDS = frozenset(_ALL)  # tables of what a user would miss
_UNSOUND: Mapping[str, str] = {  # zeros in the middle of a text leave the structure whole, which is all SQLite checks
    "SELECT 1 FROM stage WHERE ": "NOT (json_valid(spec) AND json_valid(numerics) AND json_valid(cost)) OR "
    "instr(key, char(0)) OR length(artefact) != 64 OR kind = '' OR instr(kind, char(0))",
    "SELECT 1 FROM row WHERE ": "NOT json_valid(data) OR instr(key, char(0)) OR instr(state, char(0))",
    "SELECT 1 FROM attempt WHERE ": "instr(key, char(0)) OR instr(state, char(0))",
}


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
        plain = [_plain(value) for value in values]
        self._db.execute(_CHANGES[kind], plain)
        self.changes.append([kind, *plain])


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
            self._share(self._lock)
        self._db = self._open()

    def _share(self, lock: IO[bytes]) -> None:
        """Hold the lock beside others. Raises UserError where somebody keeps it for himself."""
        until = time.monotonic() + PATIENCE
        while True:
            try:
                return fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError as error:
                if time.monotonic() > until:
                    raise UserError(self.unusable(sqlite3.OperationalError("locked"))) from error
                time.sleep(0.05)

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
            self._share(self._lock)  # a try that fails may cost the shared lock
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
                _catch_up(self._db, self.folder / JOURNAL)
                transaction = Transaction(self._db)
                yield transaction
                self._journal(transaction.changes)
            except BaseException:
                _roll_back(self._db)
                raise
            self._db.execute("COMMIT")
        except (*_FAULTS, OSError) as error:
            _roll_back(self._db)
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
            _note(self._db, self.folder / JOURNAL)
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
        _note(self._db, file)

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
                remedy = "name another one with --runs" if self.writable else "bbmcl report repairs what it may write"
                raise UserError(
                    f"the runs folder {self.folder} cannot be used: its database is damaged ({torn}) and "
                    f"{'it has no journal' if self.writable else 'it is opened for reading'}; {remedy}"
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
            if any(db.execute(query + condition).fetchone() for query, condition in _UNSOUND.items()):
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
            noted = _noted(db)[0]
            _catch_up(db, journal)
            if _size(journal) < noted or noted == 0 or _torn_lines(journal):
                _rewrite(journal, db)
                _note(db, journal)
            db.execute("COMMIT")
        except BaseException:
            _roll_back(db)
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
        for query, condition in _UNSOUND.items():  # what no honest version has written
            unreadable += db.execute(query.replace("SELECT 1", "DELETE", 1) + condition).rowcount
        _note(db, journal)
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
        self._share(self._lock)
        try:
            return self._checked(_connect(file, True))
        except _Torn as torn:
            raise UserError(
                f"the runs folder {self.folder} cannot be used: its database cannot be made again from its journal "
                f"({torn}); name another one with --runs"
            ) from torn

    def _set_aside(self, file: Path) -> str:
        """Rename a damaged database; what SQLite left beside it must not be applied to another one."""
        for beside in ("-journal", "-wal", "-shm"):
            file.with_name(file.name + beside).unlink(missing_ok=True)
        if not file.exists():
            return ""
        names = (f"{DATABASE}.damaged-{number}" for number in itertools.count(1))
        return file.rename(next(path for name in names if not (path := file.with_name(name)).exists())).name


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


def _noted(db: sqlite3.Connection) -> tuple[int, str]:
    """How long the journal was after the last transaction, and which one it was; (0, "") if there never was one."""
    found = db.execute("SELECT bytes, generation FROM journal").fetchone()
    return (0, "") if found is None else (int(found[0]), str(found[1]))


def _note(db: sqlite3.Connection, journal: Path) -> None:
    db.execute("DELETE FROM journal")
    db.execute("INSERT INTO journal VALUES (?, ?)", (_size(journal), _generation(journal)))


def _catch_up(db: sqlite3.Connection, journal: Path) -> None:
    """Take in what the journal has and the database has not: its process died between the two, or the database is an
    older copy that somebody put back; if the journal was written anew since, it is read from its beginning.
    """
    noted, generation = _noted(db)
    same = _generation(journal) == generation
    if _size(journal) > noted or not same:
        _replay(db, _changes(journal, noted if same else 0)[0])
        _note(db, journal)


def _roll_back(db: sqlite3.Connection) -> None:
    if db.in_transaction:  # a full disk has done it already
        db.execute("ROLLBACK")


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
    fits = len(change) == 1 + _CHANGES[change[0]].count("?") and all(map(_storable, change[1:]))
    return (
        [change[0], *map(_plain, change[1:])] if fits and all(_is_json(change[i]) for i in _JSON[change[0]]) else None
    )


def _is_json(text: Any) -> bool:
    """Whether SQLite would call it so: NaN and infinities are none."""
    try:
        json.loads(text, parse_constant=_refuse)
    except (ValueError, TypeError, RecursionError):
        return False
    return True


def _refuse(constant: str) -> NoReturn:
    raise ValueError(constant)


def _storable(value: Any) -> bool:
    return isinstance(value, (str, float)) or (isinstance(value, int) and -(2**63) <= value < 2**63)


def _plain(value: Any) -> Any:
    """Text that can be written: half of a surrogate pair, as in a file name that is no UTF-8, becomes "?"."""
    return value.encode("utf-8", "replace").decode() if isinstance(value, str) else value


def _text(line: bytes) -> bytes | None:
    """What a line says, None for one that is torn."""
    checksum, _, text = line.rstrip(b"\n").partition(b" ")
    return text if checksum == b"%08x" % zlib.crc32(text) else None


def _generation(file: Path) -> str:
    """Which journal it is, "" where that cannot be read."""
    if not file.exists():
        return ""
    with file.open("rb") as found:
        first = _change(found.readline())
    return str(first[1]) if first is not None and first[0] == "generation" else ""


def _torn_lines(file: Path) -> bool:
    with file.open("rb") as found:
        return any(_text(line) is None for line in found)


def _rewrite(file: Path, db: sqlite3.Connection) -> None:
    """A journal of what a database holds."""
    fresh = file.with_name(f"{file.name}.new")
    with fresh.open("wb") as out:
        out.write(_line(["generation", uuid.uuid4().hex]))
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
