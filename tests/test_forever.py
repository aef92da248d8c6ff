"""What others rely on stays: the names and signatures of the plugin API, and stores that earlier versions wrote.

`python tests/test_forever.py` writes tests/golden/api.txt anew. A line that is gone from it, or changed, breaks plugins
that exist: it needs a line in the changelog, and a deprecation first where that is possible.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import json
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import small
from conftest import Bbmcl

from backdoorbench_mcl.rows import SCHEMA, Row

GOLDEN = Path(__file__).parent / "golden"
API = GOLDEN / "api.txt"
MODULES = ("hooks", "hookspecs", "api", "kit", "testing")
OLD = {  # what the version of 2026-11-23 printed for its toy matrix: ASR, BA of badnets and blend
    ("badnets", "before"): (100.0, 100.0), ("badnets", "ft"): (65.33, 100.0), ("badnets", "mcldef"): (66.67, 93.0),
    ("blend", "before"): (100.0, 100.0), ("blend", "ft"): (0.0, 100.0), ("blend", "mcldef"): (66.67, 76.0),
}  # fmt: skip


def public(module: Any) -> Iterator[str]:
    """A line for every public name, and for every public member of a class that this package defines."""
    names = getattr(module, "__all__", None) or [n for n, v in vars(module).items() if hasattr(v, "bbmcl_spec")]
    for name in sorted(names):
        value = getattr(module, name)
        yield f"{module.__name__}.{name}{_shape(value)}"
        if inspect.isclass(value) and value.__module__.startswith("backdoorbench_mcl"):
            for member in sorted(vars(value)):
                if not member.startswith("_"):
                    yield f"{module.__name__}.{name}.{member}{_shape(inspect.getattr_static(value, member))}"


def _shape(value: Any) -> str:
    """What a caller has to know: the signature of a function, fields and bases of a class, else the kind of thing."""
    if isinstance(value, (staticmethod, classmethod)):
        value = value.__func__
    if isinstance(value, property):
        return f" (property) -> {inspect.signature(value.fget).return_annotation}"  # type: ignore[arg-type]
    if inspect.isfunction(value):
        return str(inspect.signature(inspect.unwrap(value)))
    if not inspect.isclass(value):
        return f" ({type(value).__name__})"
    bases = ", ".join(base.__name__ for base in value.__bases__ if base is not object)
    fields = [field.name for field in dataclasses.fields(value)] if dataclasses.is_dataclass(value) else []
    told = inspect.isfunction(value.__init__) and not issubclass(value, Exception)
    made = str(inspect.signature(value)) if told or issubclass(value, tuple) else ""
    return f"{made} (class of {bases or 'object'}){' fields ' + ', '.join(fields) if fields else ''}"


def current() -> str:
    lines = [line for name in MODULES for line in public(importlib.import_module(f"backdoorbench_mcl.{name}"))]
    return re.sub(r" at 0x[0-9a-f]+", "", "\n".join(lines)) + "\n"


def test_the_plugin_api_is_what_it_was() -> None:
    before, now = API.read_text().splitlines(), current().splitlines()
    gone = [line for line in before if line not in now]
    added = [line for line in now if line not in before]
    assert not gone, f"no longer there, or changed: {gone}"
    assert not added, f"new, so far unrecorded (run this file to record it): {added}"


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """The store that the first complete version wrote (schema 1), from its own run on the toy data."""
    with tarfile.open(GOLDEN / "store-schema-1.tar.gz") as archive:
        archive.extractall(tmp_path, filter="data")
    return tmp_path / "old"


def test_rows_of_the_first_version_load(old: Path, bbmcl: Bbmcl) -> None:
    done = bbmcl("report", "--runs", str(old), "--format", "json")
    assert (done.returncode, done.stderr) == (0, "")
    rows = [Row.from_dict(item) for item in json.loads(done.stdout)]
    found = {(row.attack, row.defense): (round(row.asr or 0, 2), round(row.ba or 0, 2)) for row in rows}
    assert found == OLD
    assert {row.schema for row in rows} == {1}
    assert {row.versions["backdoorbench-mcl"] for row in rows} == {"0.1.0"}
    for fmt in ("table", "markdown", "latex", "csv", "html"):
        assert bbmcl("report", "--runs", str(old), "--format", fmt).returncode == 0


def test_the_same_line_finds_what_the_first_version_stored(old: Path, bbmcl: Bbmcl) -> None:
    """Keys have not moved: nothing is computed, rows are at most scored again from their predictions."""
    line = small.command("badnets,blend", "ft,mcldef")
    again = bbmcl(*line, "--precision", "bf16", "--runs", str(old), "--format", "json")
    assert again.returncode == 0, again.stderr
    assert not [told for told in again.stderr.splitlines() if " on badnets" in told or "victim" in told]
    rows = [Row.from_dict(item) for item in json.loads(again.stdout)]
    found = {(row.attack, row.defense): (round(row.asr or 0, 2), round(row.ba or 0, 2)) for row in rows}
    assert found == OLD


def test_a_row_of_a_later_schema_is_read_for_what_is_known() -> None:
    later = {**Row("k", "tiny", "tiny-net", "badnets", "ft", 0, 0, 0.2, "ok").as_dict(), "schema": 99, "karma": 7}
    assert Row.from_dict(later).defense == "ft"
    assert SCHEMA == 1  # with schema 2 comes a golden store of its own beside that of schema 1


if __name__ == "__main__":
    API.write_text(current())
