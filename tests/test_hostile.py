"""Files, folders and rows that others made to do harm: each test is a way that once led to a traceback, a hang, memory
without end or a write elsewhere. What has no name yet is looked for in tests/fuzz.
"""

from __future__ import annotations

import dataclasses
import io
import json
import os
import signal
import sqlite3
import struct
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Bbmcl
from made import make, page_of
from safetensors.numpy import save_file

from backdoorbench_mcl import archive, artefacts, children, presets, report
from backdoorbench_mcl.artefacts import Damaged
from backdoorbench_mcl.engines.local import Local
from backdoorbench_mcl.errors import UserError
from backdoorbench_mcl.snapshots import FolderSnapshot
from backdoorbench_mcl.store import Stage, Store

KEY = "ab" * 32
DEEP = "[" * 100_000


def result(folder: Path, value: float = 1.0) -> Path:
    """What a job leaves in its folder."""
    folder.mkdir(parents=True)
    save_file({"a": np.full((2, 3), value, np.float32)}, folder / "weights.safetensors")
    (folder / "meta.json").write_text("{}")
    return folder


def stage(key: str = KEY) -> Stage:
    return Stage(key, "train", {"x": 1}, "")


# ---------------------------------------------------------------- what is typed, and options from a file


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("set = 1", "expected lines"),
        ("[set]\nmcldef = 1", "or tables"),
        ("set.ft.lr = 1979-05-27", "a date"),
        ("set.ft.lr = inf", "an infinity"),
        ("set = [1]", "a list of other things"),
        ("seeds = {a = 1}", "is a table"),
        ("seeds = [[1]]", "a list of other things"),
        ("seeds = 1979-05-27", "is a date"),
        ("seeds = " + "9" * 5000, "is no TOML"),
        ("seeds = " + DEEP, "is no TOML"),
        ("#" * (2 << 20), "more than the"),
    ],
    ids=lambda text: text[:12],
)
def test_options_of_no_use_are_one_line(tmp_path: Path, content: str, said: str) -> None:
    (tmp_path / "options.toml").write_text(content)
    with pytest.raises(UserError, match=said) as caught:
        presets.read_config(tmp_path / "options.toml", ("set", "seeds", "sweep"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("place", ["pipe", "device"])
def test_options_are_not_read_from_what_never_ends(tmp_path: Path, place: str) -> None:
    if place == "pipe":
        os.mkfifo(tmp_path / place)
    else:
        (tmp_path / place).symlink_to("/dev/zero")
    with pytest.raises(UserError, match="no ordinary file"):
        presets.read_config(tmp_path / place, ())


def test_escapes_in_a_name_do_not_reach_the_terminal(process: Bbmcl) -> None:
    done = process("data", "check", "folder:\x1b]0;owned\x07\x1b[31mred")
    assert done.returncode == 2
    assert "no such folder" in done.stderr
    assert "\x1b" not in done.stderr
    assert "\x07" not in done.stderr


# ---------------------------------------------------------------- runs folders


@pytest.mark.parametrize("name", ["artefacts", "snapshots", "locks", "store.sqlite"])
def test_a_link_inside_a_runs_folder_is_refused_and_not_followed(tmp_path: Path, name: str) -> None:
    elsewhere, runs = tmp_path / "elsewhere", tmp_path / "runs"
    elsewhere.mkdir()
    runs.mkdir()
    (runs / name).symlink_to(elsewhere / "x.sqlite" if name == "store.sqlite" else elsewhere)
    with pytest.raises(UserError, match=f"{name} in it is a link"):
        Store(runs)
    assert not list(elsewhere.iterdir())


def test_a_runs_folder_may_be_a_link_itself(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "runs").symlink_to(tmp_path / "disk")
    store = Store(tmp_path / "runs")
    assert store.open(store.commit(stage(), result(tmp_path / "out"))).exists()


def test_artefacts_are_neither_written_nor_removed_beyond_a_link(tmp_path: Path) -> None:
    store = Store(tmp_path / "runs")
    name = artefacts.identify(result(tmp_path / "out"))
    elsewhere = tmp_path / "elsewhere"
    result(elsewhere / name, 2.0)  # what a damaged artefact of that name would look like
    (tmp_path / "runs" / "artefacts" / name[:2]).symlink_to(elsewhere)
    with pytest.raises(UserError, match="is a link"):
        store.commit(stage(), tmp_path / "out")
    with pytest.raises(UserError, match="is a link"):
        store.artefacts.drop(name)
    assert sorted(p.name for p in (elsewhere / name).iterdir()) == ["meta.json", "weights.safetensors"]


def test_a_lock_and_snapshots_are_not_written_beyond_a_link(tmp_path: Path) -> None:
    store = Store(tmp_path / "runs")
    precious = tmp_path / "precious"
    precious.write_text("precious")
    (tmp_path / "runs" / "locks" / KEY).symlink_to(precious)
    with pytest.raises(UserError, match="cannot be written"):
        store.claim(KEY)
    assert precious.read_text() == "precious"  # it was emptied
    folder = tmp_path / "folder"
    folder.mkdir()
    (tmp_path / "runs" / "snapshots" / KEY).symlink_to(folder)
    FolderSnapshot(store.snapshots(KEY)).save({}, {})
    inside = store.snapshots(KEY) / "part"
    inside.symlink_to(folder)
    FolderSnapshot(inside).save({}, {})
    assert not list(folder.iterdir())
    store.commit(stage(), result(tmp_path / "out"))  # which removes the snapshots
    assert folder.exists()


def test_a_snapshot_of_something_else_is_none(tmp_path: Path) -> None:
    from safetensors.numpy import save_file as save

    for meta in ("[]", DEEP, "{"):
        save({}, tmp_path / "snapshot.safetensors", {"meta": meta})
        assert FolderSnapshot(tmp_path).load() is None
    (tmp_path / "snapshot.safetensors").unlink()
    os.mkfifo(tmp_path / "snapshot.safetensors")
    assert FolderSnapshot(tmp_path).load() is None


@pytest.mark.parametrize(
    "row",
    [
        "[]", "{", DEEP, "null", '{"key": 1}', '{"key": "k"}',
        json.dumps({**make("a", "ft").as_dict(), "asr": "x"}), json.dumps({**make("a", "ft").as_dict(), "knows": [1]}),
        json.dumps({**make("a", "ft").as_dict(), "asr": 10**400}),
        json.dumps({**make("a", "ft").as_dict(), "ba": 1e20}),
        json.dumps({**make("a", "ft").as_dict(), "asr": -1}),
        json.dumps({**make("a", "ft").as_dict(), "params": []}),
        json.dumps({**make("a", "ft").as_dict(), "state": "\x1b[31m"}),
        json.dumps({**make("a", "ft").as_dict(), "params": {"train": 1}}),
        json.dumps({**make("a", "ft").as_dict(), "params": {"control": {"attack": {}}}}),
        json.dumps({**make("a", "ft").as_dict(), "params": {"needs x": {"y": 1}}}),
        json.dumps({**make("a", "ft").as_dict(), "stages": {"model": "\ud800"}}),
    ],
    ids=lambda text: text[:10],
)  # fmt: skip
def test_a_stored_row_that_is_none_is_one_line(tmp_path: Path, row: str) -> None:
    store = Store(tmp_path)
    store.put_row(make("badnets", "ft"))
    with sqlite3.connect(tmp_path / "store.sqlite") as db:
        db.execute("UPDATE row SET data = ?", (row,))
    with pytest.raises(UserError, match="cannot be read") as caught:
        store.rows()
    assert "\n" not in str(caught.value)
    assert "\x1b" not in str(caught.value)


def test_a_database_that_brings_code_or_lacks_tables_is_refused(tmp_path: Path) -> None:
    store = Store(tmp_path)
    with sqlite3.connect(tmp_path / "store.sqlite") as db:
        db.execute("DROP TABLE row")
    with pytest.raises(UserError, match="no such table"):
        store.rows()
    with sqlite3.connect(tmp_path / "store.sqlite") as db:
        endless = (
            "WITH RECURSIVE n(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM n) SELECT x AS data, x AS created FROM n"
        )
        db.execute(f"CREATE VIEW row AS {endless}")
    store.close()
    told: list[str] = []
    assert Store(tmp_path, told.append).rows() == []  # of a database that the journal gave
    assert "has been made again from its journal" in told[0]
    (tmp_path / "store.journal").unlink()
    with sqlite3.connect(tmp_path / "store.sqlite") as db:
        db.execute("CREATE VIEW evil AS SELECT 1")
    with pytest.raises(UserError, match="holds the view or trigger 'evil'"):
        Store(tmp_path)


def test_a_damaged_database_whose_error_is_no_text_is_one_line(tmp_path: Path) -> None:
    """SQLite quotes the damaged name in its error, and Python cannot decode that."""
    Store(tmp_path).close()
    (tmp_path / "store.journal").unlink()
    file = tmp_path / "store.sqlite"
    file.write_bytes(
        file.read_bytes()
        .replace(b"tableattempt", b"table\xffttempt")
        .replace(b"CREATE TABLE attempt", b"CREATE TABLO attempt")
    )
    with pytest.raises(UserError, match="cannot be used"):
        Store(tmp_path)


# ---------------------------------------------------------------- what jobs leave


@pytest.mark.parametrize(
    "left",
    [
        {"seconds": "1"}, {"seconds": float("nan")}, {"seconds": -1}, {"strays": [[1]]}, {"strays": "abc"},
        {"changed": {"a": 1}}, {"isolation": "none"}, {"isolation": ["landlock"]}, {"curves": [1]},
        {"curves": {"loss": [[1]]}}, {"curves": {"loss": [[1, "x"]]}}, {"reason": 1},
    ],
    ids=str,
)  # fmt: skip
def test_what_a_job_says_of_itself_is_what_a_job_can_say(tmp_path: Path, left: dict[str, Any]) -> None:
    """A list among the strays of a job stopped the driver, which uses them as keys."""
    (tmp_path / "result.json").write_text(json.dumps({"state": "ok", "reason": "", **left}))
    assert Local(1)._conclude(tmp_path, 0, None).state == "killed"


def test_a_result_that_never_ends_is_none(tmp_path: Path) -> None:
    for make_it in (
        lambda file: os.mkfifo(file), lambda file: file.symlink_to("/dev/zero"), lambda file: file.write_text(DEEP),
        lambda file: file.mkdir(),
    ):  # fmt: skip
        make_it(tmp_path / "result.json")
        assert "without a result" in Local(1)._conclude(tmp_path, 0, None).reason
        (tmp_path / "result.json").rename(tmp_path / f"old-{len(list(tmp_path.iterdir()))}")


def test_of_an_endless_log_the_end_is_read(tmp_path: Path) -> None:
    with (tmp_path / "log.txt").open("wb") as log:
        log.seek(50 << 30)  # sparse: it takes no room on the disk
        log.write(b"the end")
    assert Local(1)._conclude(tmp_path, 1, None).log.endswith("the end")
    (tmp_path / "log.txt").unlink()
    os.mkfifo(tmp_path / "log.txt")
    assert Local(1)._conclude(tmp_path, 1, None).log == ""


def test_a_signal_without_a_name_is_told_by_its_number(tmp_path: Path) -> None:
    assert "signal 40" in Local(1)._conclude(tmp_path, -40, None).reason
    assert children.signal_name(signal.SIGSEGV) == "SIGSEGV"


@pytest.mark.parametrize("name", ["weights.safetensors", "predictions.safetensors", "meta.json"])
def test_a_job_cannot_hand_in_a_link(tmp_path: Path, name: str) -> None:
    """It could not open what lies behind it, but the driver did: it stored the content as the job's own, and wrote
    predictions through a link to wherever it led."""
    out = result(tmp_path / "out")
    precious = result(tmp_path / "precious", 3.0)
    (out / name).unlink(missing_ok=True)
    (out / name).symlink_to(precious / name)
    with pytest.raises(Damaged, match=f"{name} is no ordinary file"):
        Store(tmp_path / "runs").commit(stage(), out)
    (tmp_path / "link").symlink_to(precious)
    with pytest.raises(Damaged, match="is no folder"):
        artefacts.require_plain(tmp_path / "link")


@pytest.mark.parametrize(
    "header",
    [
        {"a": {"dtype": "F32", "shape": [float("inf")], "data_offsets": [0, 8]}},
        {"a": {"dtype": "F32", "shape": [10**12], "data_offsets": [0, 8]}},
        {"a": {"dtype": "F32", "shape": [-1, -2], "data_offsets": [0, 8]}},
        {name: {"dtype": "F32", "shape": [n], "data_offsets": [8 - 4 * n, 8]} for name, n in (("a", 2), ("b", 1))},
        {"a": {"dtype": ["F32"], "shape": [2], "data_offsets": [0, 8]}},
        {"a": {"dtype": "F32", "shape": [2], "data_offsets": [8, 16]}},
        [], DEEP, '{"a": 1, "a": 1}',
    ],
    ids=lambda header: str(header)[:30],
)  # fmt: skip
def test_a_header_that_does_not_fit_its_file_is_damage(tmp_path: Path, header: Any) -> None:
    text = (header if isinstance(header, str) else json.dumps(header)).encode()
    (tmp_path / "x.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + bytes(8))
    with pytest.raises(Damaged):
        list(artefacts.tensors(tmp_path / "x.safetensors"))


# ---------------------------------------------------------------- archives


def tarred(file: Path, fill: Callable[[tarfile.TarFile], None]) -> Path:
    with tarfile.open(file, "w") as tar:
        fill(tar)
    return file


def member(tar: tarfile.TarFile, name: str, content: bytes, **more: Any) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    for attribute, value in more.items():
        setattr(info, attribute, value)
    tar.addfile(info, io.BytesIO(content))


INDEX = json.dumps({"format": 1, "stages": [], "rows": []}).encode()
OF = f"artefacts/{'0' * 64}/meta.json"


def _sparse(tar: tarfile.TarFile) -> None:
    member(tar, "bbmcl-archive.json", INDEX)
    size = str(10 << 30)
    member(tar, OF, b"", pax_headers={"GNU.sparse.major": "0", "GNU.sparse.minor": "1", "GNU.sparse.size": size,
                                      "GNU.sparse.map": "0,0"})  # fmt: skip


def _index(index: Any) -> Callable[[tarfile.TarFile], None]:
    text = index if isinstance(index, str) else json.dumps({"format": 1, "stages": [], "rows": [], **index})
    return lambda tar: member(tar, "bbmcl-archive.json", text.encode())


def _twice(tar: tarfile.TarFile) -> None:
    member(tar, "bbmcl-archive.json", INDEX)
    member(tar, OF, b"{}")
    member(tar, OF, b"[]")


def _deep_meta(tar: tarfile.TarFile) -> None:
    member(tar, OF, DEEP.encode())
    _index({"stages": [{"key": KEY, "kind": "train", "spec": {}, "artefact": "0" * 64}]})(tar)


HOSTILE: dict[str, Callable[[tarfile.TarFile], None]] = {
    "sparse": _sparse,
    "twice": _twice,
    "deep": _index(DEEP),
    "no lists": _index({"rows": {}}),
    "row of nothing": _index({"rows": [1]}),
    "row with a surrogate": _index({"rows": [{**make("a", "ft").as_dict(), "key": "\ud800"}]}),
    "stage of lists": _index({"stages": [{"key": KEY, "kind": [], "spec": {}, "artefact": KEY}]}),
    "device": lambda tar: member(tar, OF, b"", type=tarfile.CHRTYPE, devmajor=1, devminor=5),
    "pipe": lambda tar: member(tar, OF, b"", type=tarfile.FIFOTYPE),
    "hard link": lambda tar: member(tar, OF, b"", type=tarfile.LNKTYPE, linkname="bbmcl-archive.json"),
    "deep meta": _deep_meta,
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_archive_is_one_line_and_changes_nothing(tmp_path: Path, case: str) -> None:
    store = Store(tmp_path / "runs")
    file = tarred(tmp_path / "bad.tar", HOSTILE[case])
    before = sorted(map(str, tmp_path.rglob("*")))
    with pytest.raises(UserError, match="nothing was imported") as caught:
        archive.load(store, file)
    assert "\n" not in str(caught.value)
    assert sorted(map(str, tmp_path.rglob("*"))) == before
    assert not store.rows()
    assert not store.stages()


def test_a_header_that_claims_terabytes_reserves_none(tmp_path: Path) -> None:
    """The extended header of a member is read whole, into a buffer of the size that it claims."""
    info = tarfile.TarInfo("x")
    info.type, info.size = tarfile.XHDTYPE, 1 << 40
    (tmp_path / "bad.tar").write_bytes(info.tobuf(tarfile.GNU_FORMAT) + bytes(1024))
    with pytest.raises(UserError, match=r"bytes at once|nothing was imported"):
        archive.load(Store(tmp_path / "runs"), tmp_path / "bad.tar")


# ---------------------------------------------------------------- reports


def test_a_report_of_odd_rows_is_written_all_the_same() -> None:
    """A re-tuned row without its number of images, and a title that cannot be encoded, ended in a traceback."""
    row = make("badnets", "ft", 5.0, 80.0, retuned_asr=99.0)
    assert "after 10 steps on 0 triggered images" in report.render([row], "table", width=200)
    assert page_of([row], title="a\ud800b").encode()
    assert page_of([dataclasses.replace(row, ba=1e20)])  # of which five points less are as much
    victim = dataclasses.replace(make("badnets", "before", 99.0, 83.0), clean_rate=0.01)  # belongs to no repair
    assert "99.00" in report.render([victim, make("badnets", "ft", 5.0, 80.0)], "table", width=200)


def test_blame_and_state_cannot_reach_the_terminal() -> None:
    """The line below a table that says whose package failed was printed as the package wrote it."""
    blame = "\x1b[31mred\u202e\nplugin"
    row = dataclasses.replace(make("badnets", "ft", state="failed", reason="x"), blame=blame)
    text = report.render([row], "table", width=200)
    assert "\x1b" not in text
    assert "\u202e" not in text
