"""The store and its artefacts: content addressing, damage, locks, archives."""

from __future__ import annotations

import io
import json
import os
import shutil
import sqlite3
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from backdoorbench_mcl import archive, artefacts
from backdoorbench_mcl.artefacts import Damaged
from backdoorbench_mcl.errors import UserError
from backdoorbench_mcl.rows import Row
from backdoorbench_mcl.store import Stage, Store

KEY = "ab" * 32


def make(folder: Path, value: float = 1.0, order: tuple[str, ...] = ("a", "b")) -> Path:
    folder.mkdir(parents=True)
    tensors: dict[str, Any] = {"a": np.full((2, 3), value, np.float32), "b": np.arange(4)}
    save_file({name: tensors[name] for name in order}, folder / "weights.safetensors")
    (folder / "meta.json").write_text(json.dumps({"n": 1, "m": [2]}))
    return folder


def stage(key: str = KEY) -> Stage:
    return Stage(key, "train", {"x": 1}, "", {"device": "cpu"}, {"seconds": 1.5})


def row(key: str = "r" * 64, state: str = "ok") -> Row:
    return Row(
        key=key, dataset="d", model="m", attack="a", defense="x", victim_seed=0, defense_seed=0, clean_rate=0.05,
        state=state, asr=1.5, knows=("target",), params={"attack": {"rate": 0.1}},  # type: ignore[arg-type]
    )  # fmt: skip


def test_identity_is_that_of_the_content(tmp_path: Path) -> None:
    one = artefacts.identify(make(tmp_path / "one"))
    assert one == artefacts.identify(make(tmp_path / "two", order=("b", "a")))
    assert one != artefacts.identify(make(tmp_path / "three", value=1.0000001))
    (tmp_path / "two" / "meta.json").write_text(json.dumps({"m": [2], "n": 1}, indent=3))
    assert one == artefacts.identify(tmp_path / "two")


def test_a_stage_comes_back_as_it_went_in(tmp_path: Path) -> None:
    store = Store(tmp_path / "runs")
    assert store.stage(KEY) is None
    stored = store.commit(stage(), make(tmp_path / "out"))
    assert stored.artefact == artefacts.identify(tmp_path / "out")
    again = Store(tmp_path / "runs").stage(KEY)
    assert again == stored
    assert artefacts.read_meta(store.open(stored)) == {"n": 1, "m": [2]}


def test_of_two_drivers_the_first_wins(tmp_path: Path) -> None:
    one, two = Store(tmp_path / "runs"), Store(tmp_path / "runs")
    first = one.commit(stage(), make(tmp_path / "out1"))
    assert two.commit(stage(), make(tmp_path / "out2", value=2.0)) == first


@pytest.mark.parametrize("harm", ["flip", "truncate", "empty", "remove", "meta", "header"])
def test_damage_is_found_and_forgotten(tmp_path: Path, harm: str) -> None:
    stored = Store(tmp_path / "runs").commit(stage(), make(tmp_path / "out"))
    store = Store(tmp_path / "runs")  # a new process: nothing is verified yet
    file = store.artefacts.path(stored.artefact) / ("meta.json" if harm == "meta" else "weights.safetensors")
    content = bytearray(file.read_bytes())
    if harm == "flip":
        content[-1] ^= 1
    elif harm == "header":
        content[0] ^= 255
    elif harm == "meta":
        content = bytearray(b'{"n": 2, "m": [2]}')
    file.write_bytes(content[:20] if harm == "truncate" else b"" if harm == "empty" else content)
    if harm == "remove":
        file.unlink()
    with pytest.raises(Damaged):
        store.open(stored)
    assert store.stage(KEY) is None  # so that it is computed again
    assert store.commit(stage(), make(tmp_path / "fresh")).artefact == stored.artefact
    assert store.open(stored).exists()


def test_rows_keep_every_field(tmp_path: Path) -> None:
    store = Store(tmp_path / "runs")
    store.put_row(row(state="failed"))
    store.put_row(row())
    assert store.rows() == [row()]
    assert store.row("r" * 64) == row()
    assert store.row("s" * 64) is None


def test_attempts_count_up(tmp_path: Path) -> None:
    store = Store(tmp_path / "runs")
    assert store.last_attempt(KEY) is None
    store.attempt(KEY, "failed", "first", "log")
    store.attempt(KEY, "timeout", "second", "log 2")
    assert store.last_attempt(KEY) == ("timeout", "second", "log 2")


def test_a_claim_is_exclusive_and_ends_with_its_holder(tmp_path: Path) -> None:
    store = Store(tmp_path / "runs")
    code = (
        "import sys, time; from pathlib import Path; from backdoorbench_mcl.store import Store\n"
        f"c = Store(Path({str(tmp_path / 'runs')!r})).claim({KEY!r}); print(c is not None, flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline().strip() == "True"
        assert store.claim(KEY) is None
        other.kill()  # SIGKILL: it has no chance to clean up
        other.wait()
    claim = store.claim(KEY)
    assert claim is not None
    assert store.claim(KEY) is None
    claim.release()
    second = store.claim(KEY)
    assert second is not None
    second.release()


def test_a_newer_store_is_refused(tmp_path: Path) -> None:
    Store(tmp_path / "runs").close()
    db = sqlite3.connect(tmp_path / "runs" / "store.sqlite")
    db.execute("PRAGMA user_version = 99")
    db.close()
    with pytest.raises(UserError, match="written by a newer bbmcl"):
        Store(tmp_path / "runs")


def test_a_folder_that_cannot_be_used_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"the runs folder .* cannot be used: Not a directory"):
        Store(tmp_path / "file")
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "store.sqlite").write_bytes(b"not a database, but long enough to look at" * 10)
    with pytest.raises(UserError, match="not a database"):
        Store(tmp_path / "bad")


def test_a_full_disk_leaves_nothing_of_the_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(tmp_path / "runs")
    kept = store.commit(stage("cd" * 32), make(tmp_path / "kept", value=5.0))

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=r"No space left on device; make room .* what was finished is safe"):
        store.commit(stage(), make(tmp_path / "out"))
    monkeypatch.undo()
    assert store.stage(KEY) is None
    assert sorted(p.name for p in store.artefacts.root.iterdir()) == [kept.artefact[:2]]
    assert store.open(kept).exists()


# ---------------------------------------------------------------- archives


def test_export_and_import_carry_everything(tmp_path: Path) -> None:
    one, two = Store(tmp_path / "one"), Store(tmp_path / "two")
    stored = one.commit(stage(), make(tmp_path / "out"))
    one.put_row(row())
    assert archive.export(one, tmp_path / "all.tar") == (1, 1)
    assert archive.load(two, tmp_path / "all.tar") == (1, 1)
    assert two.stage(KEY) == stored
    assert two.rows() == [row()]
    assert artefacts.identify(two.open(stored)) == stored.artefact
    assert archive.load(two, tmp_path / "all.tar") == (0, 0)


def _tar(file: Path, members: dict[str, bytes], link: str = "") -> Path:
    with tarfile.open(file, "w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
        if link:
            info = tarfile.TarInfo(f"artefacts/{'0' * 64}/meta.json")
            info.type, info.linkname = tarfile.SYMTYPE, link
            tar.addfile(info)
    return file


@pytest.mark.parametrize(
    ("members", "link"),
    [
        ({"../outside": b"x"}, ""),
        ({"/etc/outside": b"x"}, ""),
        ({f"artefacts/{'0' * 64}/../../x": b"x"}, ""),
        ({f"artefacts/{'0' * 64}/code.py": b"x"}, ""),
        ({}, "/etc/passwd"),
        ({}, ""),
        ({"bbmcl-archive.json": b"{}"}, ""),
        ({"bbmcl-archive.json": b'{"format": 1, "stages": [{"key": "../x"}], "rows": []}'}, ""),
        ({"bbmcl-archive.json": b'{"format": 99, "stages": [], "rows": []}'}, ""),
        ({"bbmcl-archive.json": b"\xff\xfe"}, ""),
    ],
)
def test_a_hostile_archive_changes_nothing(tmp_path: Path, members: dict[str, bytes], link: str) -> None:
    store = Store(tmp_path / "runs")
    before = sorted(map(str, tmp_path.rglob("*")))
    file = _tar(tmp_path / "bad.tar", members, link)
    with pytest.raises(UserError, match="nothing was imported") as caught:
        archive.load(store, file)
    assert "\n" not in str(caught.value)
    file.unlink()
    assert sorted(map(str, tmp_path.rglob("*"))) == before


def test_an_archive_whose_content_was_changed_is_refused(tmp_path: Path) -> None:
    one = Store(tmp_path / "one")
    one.commit(stage(), make(tmp_path / "out"))
    archive.export(one, tmp_path / "all.tar")
    content = bytearray((tmp_path / "all.tar").read_bytes())
    at = content.find(np.full((2, 3), 1.0, np.float32).tobytes())
    content[at] ^= 1
    (tmp_path / "all.tar").write_bytes(content)
    with pytest.raises(UserError, match="not what its name says"):
        archive.load(Store(tmp_path / "two"), tmp_path / "all.tar")


def test_no_archive_at_all(tmp_path: Path) -> None:
    (tmp_path / "x.tar").write_text("hello")
    with pytest.raises(UserError, match="no bbmcl archive"):
        archive.load(Store(tmp_path / "runs"), tmp_path / "x.tar")


def test_a_store_opened_for_reading_stays_as_it_is(tmp_path: Path) -> None:
    store = Store(tmp_path / "runs")
    store.attempt("key", "failed", "a reason", "a log")
    store.close()
    for folder in ("artefacts", "snapshots", "locks"):
        shutil.rmtree(tmp_path / "runs" / folder)
    before = (tmp_path / "runs" / "store.sqlite").read_bytes()
    store = Store(tmp_path / "runs", readonly=True)
    assert store.last_attempt("key") == ("failed", "a reason", "a log")
    with pytest.raises(UserError, match="readonly"):
        store.attempt("key", "failed", "another", "")
    store.close()
    assert {path.name for path in (tmp_path / "runs").iterdir()} == {"store.sqlite", "store.journal"}
    assert (tmp_path / "runs" / "store.sqlite").read_bytes() == before
    with pytest.raises(UserError, match="cannot be used"):
        Store(tmp_path / "absent", readonly=True)
    assert not (tmp_path / "absent").exists()


def test_what_a_killed_driver_left_half_written_is_put_right_by_who_may_write(tmp_path: Path) -> None:
    Store(tmp_path / "runs").close()
    db = sqlite3.connect(tmp_path / "runs" / "store.sqlite", isolation_level=None)
    db.execute("PRAGMA cache_size = 1")  # pages reach the file before the transaction ends
    db.execute("BEGIN IMMEDIATE")
    for i in range(300):
        db.execute("INSERT INTO attempt VALUES (?, 1, 'failed', ?, '', 0)", (str(i), "x" * 500))
    shutil.copytree(tmp_path / "runs", tmp_path / "killed")
    db.close()
    with pytest.raises(UserError, match="if a run was killed there, bbmcl report puts it right"):
        Store(tmp_path / "killed", readonly=True)
    Store(tmp_path / "killed").close()
    assert Store(tmp_path / "killed", readonly=True).last_attempt("0") is None
