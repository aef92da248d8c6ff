"""`bbmcl store du` and `gc`: what is counted, what goes, what must stay."""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path

import pytest
import small
from conftest import Bbmcl, Reference

from backdoorbench_mcl import housekeeping, runner
from backdoorbench_mcl.errors import UserError
from backdoorbench_mcl.runner import Settings
from backdoorbench_mcl.store import Store


@pytest.fixture
def copied(reference: Reference, tmp_path: Path) -> Path:
    return Path(shutil.copytree(reference.runs, tmp_path / "runs"))


def age(path: Path, days: float) -> None:
    """As if nothing below `path` had been written for so long."""
    then = time.time() - days * 86400
    for each in (path, *path.rglob("*")):
        os.utime(each, (then, then))


def age_records(store: Store, days: float) -> None:
    store.ledger._db.execute("UPDATE stage SET created = created - ?", (days * 86400,))


def clutter(runs: Path) -> dict[str, Path]:
    """What piles up in a runs folder."""
    store = Store(runs)
    found = {
        "unused": store.artefacts.root / "ff" / ("f" * 64), "half": store.artefacts.root / "tmp-1234",
        "finished": store.snapshots(store.stages()[0].key), "paused": store.snapshots("e" * 64),
        "damaged": runs / "store.sqlite.damaged-1", "page": runs / "report.html",
    }  # fmt: skip
    store.close()
    for name, path in found.items():
        if name in ("damaged", "page"):
            path.write_bytes(b"x" * 1000)
        else:
            path.mkdir(parents=True)
            (path / "weights.safetensors").write_bytes(b"x" * 1000)
            (path / "meta.json").write_text("{}")
    return found


def test_every_byte_is_counted_once(copied: Path) -> None:
    clutter(copied)
    store = Store(copied)
    items = housekeeping.survey(store)
    files = [path for path in copied.rglob("*") if path.is_file() and path.parent.name != "locks"]
    assert sum(item.size for item in items) == sum(path.stat().st_size for path in files)
    assert len({item.path for item in items}) == len(items)
    kinds = {item.what for item in items}
    assert {"train", "trial", "invert", "defend", "predict", "snapshots", "database and journal"} <= kinds


def test_what_no_row_needs_goes_and_nothing_else(copied: Path, reference: Reference) -> None:
    found = clutter(copied)
    age(found["unused"], 8)
    store = Store(copied)
    gone = housekeeping.reclaim(store)
    assert {item.path for item in gone} == {found[name] for name in ("unused", "half", "finished", "damaged")}
    assert not any(item.path.exists() for item in gone)
    assert found["paused"].exists()  # somebody may go on from it
    assert found["page"].exists()
    assert small.essence(store.rows()) == small.essence(reference.rows)
    assert {stage.key: stage.artefact for stage in store.stages()} == reference.artefacts
    for stage in store.stages():
        store.open(stage)
    age(found["paused"], 8)
    assert [item.path for item in housekeeping.reclaim(store)] == [found["paused"]]
    assert housekeeping.reclaim(store) == []


def test_stages_of_an_interrupted_run_are_kept_for_days(copied: Path, reference: Reference) -> None:
    """A victim without a row: the run that made it has not got to the end of any of its cells."""
    store = Store(copied)
    size = (copied / "store.journal").stat().st_size
    for row in store.rows():
        if row.attack == "blend":
            store.ledger._db.execute("DELETE FROM row WHERE key = ?", (row.key,))
    assert housekeeping.reclaim(store) == []
    age(copied / "artefacts", 6)
    assert housekeeping.reclaim(store) == []
    age(copied / "artefacts", 8)
    assert housekeeping.reclaim(store) == []  # files may be older than what was made with them: records decide
    age_records(store, 8)
    paused = store.snapshots("e" * 64)
    paused.mkdir()
    assert housekeeping.reclaim(store) == []  # a job that was killed goes on, from whatever it rests on
    paused.rmdir()
    gone = housekeeping.reclaim(store)
    assert {item.what for item in gone} == {"train", "trial", "invert", "defend", "predict"}
    assert {item.why for item in gone} == {"no row needs it"}
    left = {stage.key for stage in store.stages()}
    needed = {key for row in store.rows() for key in row.stages.values()}
    assert needed <= left < set(reference.artefacts)
    for stage in store.stages():
        store.open(stage)
    store.close()
    assert (copied / "store.journal").stat().st_size < size
    (copied / "store.sqlite").unlink()  # and the journal agrees
    store = Store(copied, lambda line: None)
    assert {stage.key for stage in store.stages()} == left


def test_what_has_gone_is_computed_again_when_it_is_asked_for(
    copied: Path, reference: Reference, toy_env: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    small.install_toy(monkeypatch, toy_env["BBMCL_CACHE"])
    store = Store(copied)
    store.ledger._db.execute("DELETE FROM row")
    age(copied / "artefacts", 8)
    age_records(store, 8)
    housekeeping.reclaim(store)
    assert store.stages() == []
    store.close()
    rows = runner.run_matrix(small.options(), Settings(runs=copied, workers=2, threads=1), live=False)
    assert small.essence(rows) == small.essence(reference.rows)


def test_nothing_goes_while_another_driver_works(copied: Path) -> None:
    clutter(copied)
    other, store = Store(copied), Store(copied)
    with pytest.raises(UserError, match="is in use by another bbmcl"):
        housekeeping.reclaim(store)
    assert (copied / "store.sqlite.damaged-1").exists()
    other.close()
    assert housekeeping.reclaim(store)


def test_a_link_is_not_followed(copied: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    (elsewhere / ("f" * 64)).mkdir(parents=True)
    (elsewhere / ("f" * 64) / "precious").write_text("x")
    (copied / "artefacts" / "ff").symlink_to(elsewhere)
    (copied / "artefacts" / "tmp-link").symlink_to(elsewhere)
    (copied / "snapshots" / ("e" * 64)).symlink_to(elsewhere)
    (copied / "snapshots" / ("d" * 64)).symlink_to(tmp_path / "nowhere")
    age(elsewhere, 100)
    housekeeping.reclaim(Store(copied), days=0)
    assert (elsewhere / ("f" * 64) / "precious").read_text() == "x"


def test_as_commands(copied: Path, bbmcl: Bbmcl) -> None:
    clutter(copied)
    shown = bbmcl("store", "du", "--runs", str(copied))
    assert shown.returncode == 0, shown.stderr
    assert "snapshots" in shown.stdout
    assert "can go: its stage is finished" in shown.stdout
    assert shown.stdout.splitlines()[-1].endswith("bbmcl store gc frees 3.0 kB")
    would = bbmcl("store", "gc", "--runs", str(copied), "--dry-run")
    assert "store.sqlite.damaged-1  1.0 kB  (damaged databases: it was made again" in would.stdout
    assert would.stdout.splitlines()[-1].startswith("would free ")
    assert (copied / "store.sqlite.damaged-1").exists()
    done = bbmcl("store", "gc", "--runs", str(copied))
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].startswith("freed ")
    assert not (copied / "store.sqlite.damaged-1").exists()
    missing = bbmcl("store", "du", "--runs", "nowhere")
    assert missing.returncode == 2
    assert missing.stderr.startswith("bbmcl: no results in nowhere")


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (2_500_000, "2.5 MB"), (999_500, "1.0 MB"), (3e13, "30.0 TB")],
)
def test_sizes_for_people(size: float, text: str) -> None:
    assert housekeeping.human(size) == text
