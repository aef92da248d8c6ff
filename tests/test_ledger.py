"""Database and journal of a store: either is enough, whatever befell the other one."""

from __future__ import annotations

import fcntl
import json
import math
import os
import random
import sqlite3
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from backdoorbench_mcl import ledger, runner
from backdoorbench_mcl.errors import UserError
from backdoorbench_mcl.ledger import DATABASE, JOURNAL, LOCK
from backdoorbench_mcl.rows import Row
from backdoorbench_mcl.store import Stage, Store

PLACES = int(os.environ.get("BBMCL_TEST_LOSSES", "6"))  # random ones in each file, for each way of harm


def row(number: int, state: str = "ok", reason: str = "") -> Row:
    return Row(
        key=f"{number:064x}", dataset="d", model="m", attack="a", defense="x" * number, victim_seed=0, defense_seed=0,
        clean_rate=0.05, state=state, reason=reason, params={"text": "é" * 50},  # type: ignore[arg-type]
    )  # fmt: skip


def stage(number: int) -> Stage:
    return Stage(f"{number:064x}", "train", {"x": number}, "", {"inputs": {}}, {"seconds": 1.5})


def filled(folder: Path, count: int = 12) -> Path:
    """A runs folder with stages, attempts and rows, one stage of which was forgotten, one row replaced."""
    store = Store(folder / "runs")
    for number in range(count):
        out = folder / f"out-{number}"
        out.mkdir()
        save_file({"a": np.full(3, number, np.float32)}, out / "weights.safetensors")
        (out / "meta.json").write_text("{}")
        store.commit(stage(number), out)
        store.put_row(row(number, "failed", "at first"))
        store.attempt(f"{number:064x}", "failed", "reason", "log")
        store.attempt(f"{number:064x}", "timeout", "again", "log")
        store.put_row(row(number))
        store.put_row(row(number, "failed", "never replaces a result"))
    store.forget(f"{3:064x}")
    store.close()
    return folder / "runs"


def content(runs: Path) -> dict[str, list[tuple[object, ...]]]:
    """The tables without times, of which a few zeroed bits go unnoticed: they only order what is listed."""
    with sqlite3.connect(runs / DATABASE) as db:
        return {
            name: sorted(record[:-1] for record in db.execute(f"SELECT * FROM {name}"))
            for name in ("stage", "attempt", "row")
        }


def write_line(runs: Path, text: str) -> None:
    """A line of the journal with a checksum that is right, whatever it says."""
    with (runs / JOURNAL).open("ab") as out:
        out.write(b"%08x %s\n" % (zlib.crc32(text.encode()), text.encode()))


def harm(file: Path, how: str, at: int) -> None:
    """What a power loss may do to a file: its end is missing, or zero, or a page of it is."""
    data = bytearray(file.read_bytes())
    if how == "truncate":
        data = data[:at]
    elif how == "zero":
        data[at:] = bytes(len(data) - at)
    else:
        end = min(len(data), at + 600)
        data[at:end] = bytes(end - at)
    file.write_bytes(data)


@pytest.mark.parametrize("how", ["truncate", "zero", "hole"])
@pytest.mark.parametrize("name", [DATABASE, JOURNAL])
def test_either_file_may_be_torn_at_any_place(tmp_path: Path, name: str, how: str) -> None:
    runs = filled(tmp_path)
    whole = {file: (runs / file).read_bytes() for file in (DATABASE, JOURNAL)}
    before = content(runs)
    rng = random.Random(f"{name} {how}")
    size = len(whole[name])
    places = [0, 1, size - 1, *(rng.randrange(size) for _ in range(PLACES))]
    for at in places:
        for file, data in whole.items():
            (runs / file).write_bytes(data)
        harm(runs / name, how, at)
        told: list[str] = []
        store = Store(runs, told.append)
        assert [found.key for found in store.rows()] == [f"{n:064x}" for n in range(12)], (at, told)
        store.close()
        assert content(runs) == before, (at, told)
        Store(runs, pytest.fail).close()  # nothing is left to be repaired
        (runs / (JOURNAL if name == DATABASE else DATABASE)).unlink()  # and both files hold everything again
        Store(runs, told.append).close()
        assert content(runs) == before, (at, told)
        for damaged in runs.glob(f"{DATABASE}.damaged-*"):
            damaged.unlink()


def test_the_user_is_told_and_the_damaged_file_is_kept(tmp_path: Path) -> None:
    runs = filled(tmp_path)
    (runs / DATABASE).write_bytes(b"x" * 5000)
    told: list[str] = []
    Store(runs, told.append).close()
    kept = "its damaged file is kept as store.sqlite.damaged-1"
    assert told == [f"the database of {runs} has been made again from its journal: 11 stages, 12 rows; {kept}"]
    assert (runs / "store.sqlite.damaged-1").read_bytes() == b"x" * 5000
    (runs / DATABASE).unlink()
    Store(runs, told.append).close()
    assert told[1].endswith("11 stages, 12 rows; it was gone")


def test_a_report_needs_the_journal_alone(tmp_path: Path) -> None:
    runs = filled(tmp_path)
    (runs / DATABASE).unlink()
    assert len(runner.stored_rows(runs)) == 12
    with pytest.raises(UserError, match="no results"):
        runner.stored_rows(tmp_path)


def test_what_cannot_be_read_of_the_journal_is_counted(tmp_path: Path) -> None:
    runs = filled(tmp_path)
    lines = (runs / JOURNAL).read_bytes().splitlines(keepends=True)
    at = next(i for i, line in enumerate(lines) if b'"row"' in line)
    lines[at] = lines[at].replace(b"at first", b"at worst")
    (runs / JOURNAL).write_bytes(b"".join(lines))
    (runs / DATABASE).unlink()
    told: list[str] = []
    store = Store(runs, told.append)
    assert len(store.rows()) == 12  # that line was of a row which was written again later
    assert "; 1 lines of the journal could not be read;" in told[0]


@pytest.mark.parametrize(
    "text", ["[]", "{}", '["row"]', '["drop table row"]', '["row", [], {}, null, 1]',
             '["attempt", "k", {}, "", "", "", 1]', '[["row"], 1]', "[" * 100_000, "not json"],
)  # fmt: skip
def test_a_strange_journal_is_read_for_what_is_a_change(tmp_path: Path, text: str) -> None:
    runs = filled(tmp_path)
    before = content(runs)
    write_line(runs, text)
    (runs / DATABASE).unlink()
    told: list[str] = []
    Store(runs, told.append).close()
    assert "; 1 lines of the journal could not be read;" in told[0]
    assert content(runs) == before


def test_a_database_that_runs_code_is_not_opened(tmp_path: Path) -> None:
    """A trigger of a stranger's would run with each statement of ours; the journal holds data alone."""
    runs = filled(tmp_path)
    before = content(runs)
    with sqlite3.connect(runs / DATABASE) as db:
        db.execute("CREATE TRIGGER evil AFTER INSERT ON row BEGIN DELETE FROM stage; END")
    Store(runs, lambda line: None).close()
    assert content(runs) == before
    assert (runs / "store.sqlite.damaged-1").exists()


def test_a_change_that_was_journalled_and_never_committed_is_made_up_for(tmp_path: Path) -> None:
    """A driver dies between the two: the line is there, the transaction is not."""
    runs = filled(tmp_path)
    short = (runs / DATABASE).read_bytes()
    store = Store(runs)
    store.put_row(row(99))
    store.close()
    after = content(runs)
    (runs / DATABASE).write_bytes(short)
    with (runs / JOURNAL).open("ab") as out:
        out.write(b'deadbeef ["row", "torn')  # and a second one died while it wrote
    store = Store(runs, pytest.fail)
    assert store.row(f"{99:064x}") == row(99)
    store.put_row(row(100))
    store.close()
    (runs / DATABASE).unlink()
    store = Store(runs, lambda line: None)
    assert store.row(f"{100:064x}") == row(100)
    assert len(content(runs)["row"]) == len(after["row"]) + 1


def test_a_store_without_a_journal_gets_one(tmp_path: Path) -> None:
    """As the first versions left it."""
    runs = filled(tmp_path)
    before = content(runs)
    (runs / JOURNAL).unlink()
    with sqlite3.connect(runs / DATABASE) as db:
        db.execute("DROP TABLE journal")
    Store(runs, pytest.fail).close()
    assert content(runs) == before
    (runs / DATABASE).unlink()
    Store(runs, lambda line: None).close()
    assert content(runs) == before


def test_an_older_database_does_not_cost_what_the_journal_has(tmp_path: Path) -> None:
    """Somebody put a copy of the database back that a version without a journal had made."""
    runs = filled(tmp_path)
    before = content(runs)
    with sqlite3.connect(runs / DATABASE) as db:
        db.execute("DROP TABLE journal")
        db.execute("DELETE FROM row WHERE rowid > 3")
    Store(runs, pytest.fail).close()
    assert content(runs)["row"] == before["row"]


def test_nothing_is_repaired_under_another_driver(tmp_path: Path) -> None:
    runs = filled(tmp_path)
    other = Store(runs)
    (runs / DATABASE).write_bytes(b"")
    with pytest.raises(UserError, match="is damaged; end the other bbmcl that uses it, run again"):
        Store(runs, pytest.fail)
    other.close()
    told: list[str] = []
    assert len(Store(runs, told.append).rows()) == 12
    assert told


def test_a_kill_in_the_middle_of_a_repair_costs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = filled(tmp_path)
    before = content(runs)
    rename = Path.rename
    for step in range(2):  # before the damaged file is set aside, before the new one takes its place
        (runs / DATABASE).write_bytes(b"x" * 5000)
        calls: list[Path] = []

        def die(self: Path, target: Path, step: int = step, calls: list[Path] = calls) -> Path:
            calls.append(self)
            if len(calls) > step:
                raise KeyboardInterrupt
            return rename(self, target)

        monkeypatch.setattr(Path, "rename", die)
        with pytest.raises(KeyboardInterrupt):
            Store(runs, pytest.fail)
        monkeypatch.undo()
        Store(runs, lambda line: None).close()
        assert content(runs) == before


def test_a_full_disk_under_the_journal_leaves_neither_half(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = filled(tmp_path)
    size = (runs / JOURNAL).stat().st_size
    store = Store(runs)

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="No space left on device; make room"):
        store.put_row(row(50))
    monkeypatch.undo()
    assert store.row(f"{50:064x}") is None
    assert (runs / JOURNAL).stat().st_size == size
    store.put_row(row(51))
    store.close()
    Store(runs, pytest.fail).close()


HOLD = """
import sqlite3, sys, time
db = sqlite3.connect(sys.argv[1], isolation_level=None)
db.execute("BEGIN EXCLUSIVE")
print("held", flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize("access", ["read", "write", "open"])
def test_a_database_that_stays_locked_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, access: str) -> None:
    runs = filled(tmp_path)
    monkeypatch.setattr(ledger, "PATIENCE", 0.2)
    store = Store(runs)
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(runs / DATABASE)], stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        use: Mapping[str, Callable[[Store], object]] = {
            "open": lambda store: Store(store.folder), "read": Store.rows,
            "write": lambda store: store.put_row(row(70)),
        }  # fmt: skip
        with pytest.raises(UserError, match=r"another process has kept .* locked for 0\.2 s; end that one"):
            use[access](store)
        other.kill()
    again = Store(runs, pytest.fail)
    again.put_row(row(70))
    assert len(again.rows()) == 13


def test_drivers_that_write_at_once_lose_nothing(tmp_path: Path) -> None:
    """Five of them, each with rows of its own, on one store; the journal alone has all of it."""
    code = (
        "import sys; from pathlib import Path; sys.path.insert(0, sys.argv[3]); import test_ledger as t\n"
        "store = t.Store(Path(sys.argv[1])); start = int(sys.argv[2])\n"
        "for n in range(start, start + 20): store.put_row(t.row(n)); store.attempt('k' * 64, 'failed', str(n), '')\n"
    )
    runs = tmp_path / "runs"
    drivers = [
        subprocess.Popen([sys.executable, "-c", code, str(runs), str(20 * i), str(Path(__file__).parent)])
        for i in range(5)
    ]
    assert [driver.wait(120) for driver in drivers] == [0] * 5
    Store(runs, pytest.fail).close()
    before = content(runs)
    assert len(before["row"]) == len(before["attempt"]) == 100
    assert sorted(int(str(attempt[1])) for attempt in before["attempt"]) == list(range(1, 101))
    (runs / DATABASE).unlink()
    Store(runs, lambda line: None).close()
    assert content(runs) == before


def test_a_clock_that_goes_backwards_changes_no_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = iter(range(10_000, 0, -1))
    monkeypatch.setattr(time, "time", lambda: float(next(ticks)))
    runs = filled(tmp_path)
    store = Store(runs)
    assert store.last_attempt(f"{5:064x}") == ("timeout", "again", "log")
    assert store.row(f"{5:064x}") == row(5)
    assert len(store.stages()) == 11


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere; the next test asks for a read-only mount")
def test_a_folder_without_the_right_to_write_can_be_read(tmp_path: Path) -> None:
    runs = filled(tmp_path)
    for path in (runs, *runs.rglob("*")):
        path.chmod(0o555 if path.is_dir() else 0o444)
    try:
        assert len(Store(runs, pytest.fail).rows()) == 12
    finally:
        for path in (runs, *runs.rglob("*")):
            path.chmod(0o755)


MOUNT = "mount --bind {0} {0} && mount -o remount,bind,ro {0} && exec {1} -c {2}"


def test_a_read_only_mount_can_be_read_and_says_so_when_written(tmp_path: Path) -> None:
    """In a mount namespace of its own, where the system allows one."""
    runs = filled(tmp_path)
    code = (
        "import sys; from pathlib import Path; from backdoorbench_mcl.store import Store\n"
        f"store = Store(Path({str(runs)!r})); print(len(store.rows()))\n"
        "try: store.attempt('k', 'failed', '', '')\n"
        "except Exception as error: print(type(error).__name__, error)\n"
    )
    quoted = "'" + code.replace("'", "'\\''") + "'"
    command = MOUNT.format(runs, sys.executable, quoted)
    done = subprocess.run(
        ["unshare", "--map-root-user", "--mount", "sh", "-c", command], capture_output=True, text=True, check=False
    )
    if done.returncode != 0 and "12" not in done.stdout:
        pytest.skip(f"no mount namespace here: {done.stderr.strip()[-100:]}")
    lines = done.stdout.splitlines()
    assert lines[0] == "12"
    assert lines[1].startswith(f"UserError the runs folder {runs} cannot be written: ")


def test_who_holds_the_lock_alone_keeps_others_waiting(tmp_path: Path) -> None:
    runs = filled(tmp_path)
    one = Store(runs)
    two = Store(runs)
    assert not one.ledger.alone()
    two.close()
    assert one.ledger.alone()
    with (runs / LOCK).open("wb") as handle, pytest.raises(BlockingIOError):
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    one.close()


def test_a_line_of_a_dead_driver_is_taken_in_by_the_next_change_of_a_living_one(tmp_path: Path) -> None:
    """Its process died between journal and database while another one worked on."""
    runs = filled(tmp_path)
    living = Store(runs)
    short = (runs / JOURNAL).stat().st_size
    dead = [
        ["row", f"{50:064x}", "ok", json.dumps(row(50).as_dict()), 1.0],
        ["attempt", "k" * 64, 1, "failed", "the dead one's", "", 1.0],
    ]
    for change in dead:
        write_line(runs, json.dumps(change))
    assert (runs / JOURNAL).stat().st_size > short
    living.attempt("k" * 64, "failed", "mine", "")
    assert living.row(f"{50:064x}") == row(50)
    living.close()
    before = content(runs)
    assert [attempt[1:4] for attempt in before["attempt"] if attempt[0] == "k" * 64] == [
        (1, "failed", "the dead one's"), (2, "failed", "mine"),
    ]  # fmt: skip
    (runs / DATABASE).unlink()
    Store(runs, lambda line: None).close()
    assert content(runs) == before


@pytest.mark.parametrize("more", [5, 60])
def test_an_older_copy_of_the_database_costs_nothing_even_after_a_compaction(tmp_path: Path, more: int) -> None:
    """The journal was written anew meanwhile, so that places in it mean nothing to the copy."""
    runs = filled(tmp_path)
    copy = (runs / DATABASE).read_bytes()
    store = Store(runs)
    assert store.ledger.alone()
    store.ledger.compact()
    for number in range(100, 100 + more):
        store.put_row(row(number))
    store.close()
    after = content(runs)["row"]
    (runs / DATABASE).write_bytes(copy)
    Store(runs, pytest.fail).close()
    assert content(runs)["row"] == after
    (runs / DATABASE).unlink()
    Store(runs, lambda line: None).close()
    assert content(runs)["row"] == after


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_json_has_no_word_for_is_refused_and_never_bricks_a_store(tmp_path: Path, value: float) -> None:
    runs = filled(tmp_path)
    store = Store(runs)
    with pytest.raises(UserError, match="not finite cannot be stored"):
        store.put_row(replace(row(60), seconds=value))
    before = content(runs)
    store.close()
    data = json.dumps(replace(row(60), seconds=value).as_dict())
    write_line(runs, json.dumps(["row", f"{60:064x}", "ok", data, 1.0]))  # as a stranger could have written it
    told: list[str] = []
    Store(runs, told.append).close()
    Store(runs, pytest.fail).close()
    assert content(runs) == before


def test_text_that_is_no_unicode_is_stored_as_far_as_it_is(tmp_path: Path) -> None:
    """As an undecodable file name gives it; it ended the run, and every later one."""
    store = Store(tmp_path / "runs")
    store.attempt("k" * 64, "failed", "bad file \udc80", "log \ud800")
    assert store.last_attempt("k" * 64) == ("failed", "bad file ?", "log ?")


def test_a_database_that_rolled_back_by_itself_says_why(tmp_path: Path) -> None:
    store = Store(filled(tmp_path))
    ((pages,),) = store.ledger.read("PRAGMA page_count")
    store.ledger._db.execute(f"PRAGMA max_page_count = {pages}")
    with pytest.raises(UserError, match="database or disk is full; make room"):
        store.put_row(replace(row(80), reason="x" * 200_000))
    store.ledger._db.execute("PRAGMA max_page_count = 1000000")
    store.put_row(row(81))


def test_who_waits_for_a_repair_is_told_in_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = filled(tmp_path)
    one = Store(runs)
    assert one.ledger.alone()
    monkeypatch.setattr(ledger, "PATIENCE", 0.2)
    with pytest.raises(UserError, match=r"another process has kept .* locked for 0\.2 s"):
        Store(runs)
    one.close()
    Store(runs).close()
