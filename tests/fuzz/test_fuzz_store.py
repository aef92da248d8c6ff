"""Whatever an archive, a runs folder or a job's folder holds, it is taken as what it should be or refused."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import sqlite3
import tarfile
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from hostile import bounded, contained, fuzzed, listing, mutated, nasty_json, nasty_text  # noqa: F401 (bounded: a fixture)
from hypothesis import given
from hypothesis import strategies as st
from made import make
from safetensors.numpy import save, save_file

from backdoorbench_mcl import archive, artefacts
from backdoorbench_mcl.artefacts import Damaged
from backdoorbench_mcl.engines.local import STATES, Local, sound
from backdoorbench_mcl.rows import Row
from backdoorbench_mcl.snapshots import FolderSnapshot
from backdoorbench_mcl.store import Stage, Store

KEY = "ab" * 32


@pytest.fixture(scope="module")
def archived(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A sound archive of one stage and one row."""
    top = tmp_path_factory.mktemp("archived")
    (top / "out").mkdir()
    save_file({"a": np.arange(3)}, top / "out" / "weights.safetensors")
    (top / "out" / "meta.json").write_text("{}")
    store = Store(top / "runs")
    store.commit(Stage(KEY, "train", {"x": 1}, ""), top / "out")
    store.put_row(make("badnets", "ft"))
    archive.export(store, top / "all.tar")
    return (top / "all.tar").read_bytes()


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with something that nobody may touch."""
    top = tmp_path_factory.mktemp("store")
    (top / "outside").mkdir()
    (top / "outside" / "precious").write_text("precious")
    return top


def _load(place: Path, content: bytes) -> None:
    """What was refused must have changed nothing, and nothing may be written beside the runs folder."""
    (place / "x.tar").write_bytes(content)
    shutil.rmtree(place / "runs", ignore_errors=True)
    store = Store(place / "runs")
    before, beside = listing(place / "runs" / "artefacts"), listing(place / "outside")
    with contained():
        try:
            archive.load(store, place / "x.tar")
        except Exception:
            assert listing(place / "runs" / "artefacts") == before
            assert not store.stages()
            assert not store.rows()
            raise
        for stage in store.stages():
            store.open(stage)
        store.rows()
    store.close()
    assert listing(place / "outside") == beside
    assert sorted(path.name for path in place.iterdir()) == ["outside", "runs", "x.tar"]


@fuzzed(0.5)
@given(data=st.data())
def test_any_damaged_archive_is_imported_or_refused(place: Path, archived: bytes, data: st.DataObject) -> None:
    _load(place, data.draw(mutated([archived])))


KINDS = (tarfile.REGTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE,
         tarfile.GNUTYPE_SPARSE, tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME, b"?")  # fmt: skip


@st.composite
def members(draw: st.DrawFn) -> tuple[tarfile.TarInfo, bytes]:
    artefact = f"artefacts/{'0' * 64}/"
    name = draw(st.one_of(
        st.sampled_from([archive.INDEX, artefact + "meta.json", artefact + "a.safetensors", "../outside/precious",
                         "/etc/x", artefact + "../x"]), nasty_text()
    ))  # fmt: skip
    info = tarfile.TarInfo(name.encode("utf-8", "replace").decode())
    info.type = draw(st.sampled_from(KINDS))
    info.linkname = draw(st.sampled_from(["", "/etc/passwd", "../../outside/precious", archive.INDEX]))
    content = draw(st.one_of(st.binary(max_size=99), nasty_json().map(lambda value: json.dumps(value).encode())))
    info.size = draw(st.sampled_from([len(content), 0, 1 << 40, 512]))
    sparse = {"GNU.sparse.size": str(1 << 40), "GNU.sparse.map": "0,1"}
    more: list[dict[str, str]] = [{}, {"size": "1"}, sparse, {"path": "../outside/x"}, {"hdrcharset": "BINARY"}]
    info.pax_headers = draw(st.sampled_from(more))
    return info, content


@fuzzed(0.5)
@given(st.lists(members(), max_size=4), st.sampled_from([tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT]))
def test_any_members_are_imported_or_refused(
    place: Path, found: list[tuple[tarfile.TarInfo, bytes]], kind: Literal[0, 1, 2]
) -> None:
    buffer = io.BytesIO()
    for info, content in found:
        try:
            buffer.write(info.tobuf(kind))
        except (ValueError, UnicodeError):  # more than the format can say
            return
        buffer.write(content + bytes(-len(content) % 512))
    _load(place, buffer.getvalue() + bytes(1024))


def odd_rows() -> st.SearchStrategy[dict[str, Any]]:
    """Rows with a few fields of another kind, and such that are none."""
    names = st.sampled_from([field.name for field in fields(Row)])
    good = make("badnets", "ft").as_dict()
    return st.dictionaries(names, nasty_json(), max_size=3).map(lambda odd: {**good, **odd})


@fuzzed(0.5)
@given(st.one_of(odd_rows(), nasty_json()), st.one_of(st.just({}), nasty_json()))
def test_any_index_is_imported_or_refused(place: Path, row: Any, stage: Any) -> None:
    index = {"format": 1, "rows": [row], "stages": [stage] if stage else []}
    content = json.dumps(index).encode()
    info = tarfile.TarInfo(archive.INDEX)
    info.size = len(content)
    _load(place, info.tobuf() + content + bytes(-len(content) % 512) + bytes(1024))


@fuzzed()
@given(st.one_of(odd_rows(), nasty_json()))
def test_any_json_is_a_row_or_none(data: Any) -> None:
    try:
        row = Row.from_dict(data)
    except ValueError:
        return
    text = json.dumps(row.as_dict())
    assert json.dumps(Row.from_dict(json.loads(text)).as_dict()) == text


@fuzzed(0.5)
@given(st.one_of(st.text(max_size=30), nasty_json().map(json.dumps)), st.sampled_from(["row", "stage"]))
def test_any_text_in_the_database_is_read_or_refused(place: Path, text: str, table: str) -> None:
    shutil.rmtree(place / "runs", ignore_errors=True)
    store = Store(place / "runs")
    store.put_row(make("badnets", "ft"))
    with sqlite3.connect(place / "runs" / "store.sqlite") as db:
        raw = text.encode("utf-8", "surrogatepass")
        db.execute("UPDATE row SET data = CAST(? AS TEXT)", (raw,))
        db.execute(
            "INSERT INTO stage VALUES (?, CAST(? AS TEXT), CAST(? AS TEXT), 'a', '{}', '{}', 0)", (KEY, raw, raw)
        )
    with contained():
        store.rows() if table == "row" else store.stages()
    store.close()


@fuzzed(0.25)
@given(data=st.data())
def test_any_database_is_read_or_refused(place: Path, data: st.DataObject) -> None:
    shutil.rmtree(place / "runs", ignore_errors=True)
    store = Store(place / "runs")
    store.put_row(make("badnets", "ft"))
    store.close()
    file = place / "runs" / "store.sqlite"
    file.write_bytes(data.draw(mutated([file.read_bytes()])))
    with contained():
        damaged = Store(place / "runs")
        damaged.rows()
        damaged.stages()
        damaged.close()


# ---------------------------------------------------------------- what jobs leave


RESULT: dict[str, Any] = {
    "state": "ok", "reason": "", "isolation": "landlock", "seconds": 1.5, "peak_mb": 300.0, "strays": [],
    "changed": ["x"],
    "curves": {"loss": [[1, 0.5], [2, 0.25]]},
}  # fmt: skip


@fuzzed()
@given(st.one_of(
    nasty_json(),
    st.dictionaries(st.sampled_from([*RESULT]), nasty_json(), max_size=3).map(lambda odd: {**RESULT, **odd})
))  # fmt: skip
def test_any_result_is_one_or_a_death(place: Path, result: Any) -> None:
    (place / "outside" / "result.json").write_text(json.dumps(result))
    try:
        ended = Local(1)._conclude(place / "outside", 0, None)
    finally:
        (place / "outside" / "result.json").unlink()
    assert ended.state in (*STATES, "killed")
    if ended.state != "killed":
        assert all(float(ended.result.get(name, 0)) >= 0 for name in ("seconds", "peak_mb"))
        named = dict.fromkeys([*ended.result.get("strays", []), *ended.result.get("changed", [])])
        assert all(isinstance(name, str) for name in named)
        sound(ended.result)


@fuzzed()
@given(st.one_of(mutated([json.dumps(RESULT).encode()]), st.binary(max_size=40)))
def test_any_bytes_of_a_result_are_one_or_a_death(place: Path, content: bytes) -> None:
    (place / "outside" / "result.json").write_bytes(content)
    (place / "outside" / "log.txt").write_bytes(content)
    try:
        assert Local(1)._conclude(place / "outside", -40, None).state in (*STATES, "killed")
    finally:
        (place / "outside" / "result.json").unlink()
        (place / "outside" / "log.txt").unlink()


TENSORS = [
    save({"a": np.arange(3), "b": np.ones((2, 2), np.float32)}),
    save({}),
    save({"x": np.zeros(0)}, {"meta": "{}"}),
]


@fuzzed()
@given(
    mutated(TENSORS), st.one_of(mutated([b'{"n": 1, "m": [2]}']), nasty_json().map(lambda v: json.dumps(v).encode()))
)
def test_any_artefact_has_a_name_or_is_damaged(place: Path, content: bytes, meta: bytes) -> None:
    folder = place / "artefact"
    folder.mkdir(exist_ok=True)
    (folder / "a.safetensors").write_bytes(content)
    (folder / "meta.json").write_bytes(meta)
    with contained(), contextlib.suppress(Damaged):
        assert len(artefacts.identify(folder)) == 64
    shutil.rmtree(folder)


@fuzzed()
@given(
    st.one_of(mutated(TENSORS), nasty_json().map(lambda value: save({"a": np.ones(1)}, {"meta": json.dumps(value)})))
)
def test_any_snapshot_is_taken_or_none(place: Path, content: bytes) -> None:
    folder = place / "snapshot"
    folder.mkdir(exist_ok=True)
    (folder / "snapshot.safetensors").write_bytes(content)
    with contained():
        found = FolderSnapshot(folder).load()
        assert found is None or isinstance(found[1], dict)
    shutil.rmtree(folder)
