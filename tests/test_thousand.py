"""A store of 1,000 cells with ties, failures, one seed and missing values, reported in every format."""

from __future__ import annotations

import csv
import io
import json
import re
import time
from collections import Counter
from dataclasses import replace
from html import unescape
from pathlib import Path
from typing import Any

import pytest
from conftest import Bbmcl
from made import make

from backdoorbench_mcl.errors import UserError
from backdoorbench_mcl.rows import Row
from backdoorbench_mcl.store import Store

pytestmark = pytest.mark.slow  # smaller stores and rows without a store go the same ways
ATTACKS, DEFENSES = 25, 40
HOSTILE = "<b>&$\\\x1b[31m|"


def cell(attack: int, defense: int) -> Row:
    """Of each attack the defenses 0 and 1 are at the floor and tie, 2 is next; in BA 5 and 6 tie, 7 is next; 8 has
    erased the target class, 9 and 11 lack values; of the others some have failed.
    """
    a, d = f"attack{attack:02}", f"defense{defense:02}"
    asr = {0: 1.0, 1: 1.5, 2: 1.8, 8: 0.0}.get(defense, 5.0 + defense)
    ba = {5: 82.0, 6: 82.0, 7: 81.5}.get(defense, 70.0 + attack / 10)
    more: dict[str, Any] = {2: {"ftr": 0.5}, 8: {"tca": 0.1, "ftr": 0.0}}.get(defense, {})
    if defense in (9, 11):
        unknown: dict[str, Any] = dict.fromkeys(("asr", "ftr", "der") if defense == 9 else ("ba", "tca", "ba_nt"))
        return replace(make(a, d, asr, ba), **unknown)
    if defense > 12 and (attack + defense) % 17 == 0:
        return make(a, d, state="failed", reason=HOSTILE * 20)
    return make(a, d, asr, ba, **more)


def rows() -> list[Row]:
    return [
        row for attack in range(ATTACKS)
        for row in (make(f"attack{attack:02}", "before", 99.0, 83.0), *(cell(attack, d) for d in range(DEFENSES)))
    ]  # fmt: skip


FAILED = sum(row.state == "failed" for row in rows())


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the store, which takes no NaN: what is unknown is missing."""
    folder = tmp_path_factory.mktemp("thousand") / "runs"
    store = Store(folder)
    with pytest.raises(UserError, match="not finite"):
        store.put_row(replace(cell(3, 11), ba=float("nan")))
    with store.ledger.transaction() as change:  # at once: a thousand transactions are a thousand waits for the disk
        for row in rows():
            change.change("row", row.key, row.state, json.dumps(row.as_dict(), allow_nan=False), time.time())
    store.close()
    return folder


def told(bbmcl: Bbmcl, runs: Path, *arguments: str) -> str:
    done = bbmcl("report", "--runs", str(runs), *arguments)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def test_records(bbmcl: Bbmcl, runs: Path) -> None:
    found = json.loads(told(bbmcl, runs, "--format", "json"))
    lines = list(csv.DictReader(io.StringIO(told(bbmcl, runs, "--format", "csv"))))
    assert len(found) == len(lines) == ATTACKS * (DEFENSES + 1)
    assert Counter(row["state"] for row in found) == {"ok": len(found) - FAILED, "failed": FAILED}
    assert sum(row["asr_at_floor"] is True for row in found) == 3 * ATTACKS  # and those without the class
    assert sum(row["target_class_erased"] is True for row in found) == ATTACKS
    for row, line in zip(found, lines, strict=True):
        assert (row["attack"], row["defense"]) == (line["attack"], line["defense"])
        assert line["ba"] == ("" if row["ba"] is None else str(row["ba"]))
    missing = [row["defense"] for row in found if row["state"] == "ok" and None in (row["asr"], row["ba"])]
    assert missing == ["defense09", "defense11"] * ATTACKS


GRID = [
    ("defense00", "ASR", "1.00≈", "best"), ("defense01", "ASR", "1.50≈", "best"),
    ("defense02", "ASR", "1.80", "second"), ("defense05", "BA", "82.00", "best"),
    ("defense06", "BA", "82.00", "best"), ("defense07", "BA", "81.50", "second"),
]  # fmt: skip


def test_markdown(bbmcl: Bbmcl, runs: Path) -> None:
    text = told(bbmcl, runs, "--format", "markdown", "--statistics")
    head, *lines = (line.strip("|").split("|") for line in text.splitlines() if re.match(r"\| attack(\d\d)? ", line))
    names = [name.strip() for name in head]
    grid = [dict(zip(names, map(str.strip, line), strict=True)) for line in lines if len(line) == len(names)]
    assert len(grid) == ATTACKS
    for attack, line in enumerate(grid):
        marked = [(*name.split(), re.sub(r"[*]|</?u>", "", text), "best" if "**" in text else "second")
                  for name, text in line.items() if "**" in text or "<u>" in text]  # fmt: skip
        assert marked == GRID
        assert line["defense08 ASR"] == "0.00×"
        assert (line["defense09 ASR"], line["defense11 BA"]) == ("–", "–")
        failed = [name for name, text in line.items() if text == "failed"]
        assert failed == [f"defense{d:02} ASR" for d in range(13, DEFENSES) if (attack + d) % 17 == 0]
    assert "One victim: nothing can be said of the methods." in text
    assert "\x1b" not in text
    assert f"and {FAILED - 8} more" in text


def test_latex(bbmcl: Bbmcl, runs: Path) -> None:
    text = told(bbmcl, runs, "--format", "latex", "--statistics")
    assert (text.count(r"\textbf{"), text.count(r"\underline{")) == (4 * ATTACKS, 2 * ATTACKS)
    assert text.count(r"\textbf{82.00}") == 2 * ATTACKS
    assert text.count(r"\multicolumn{2}{c}{failed}") == FAILED
    assert all(text.count(rf"\{end}{{tabular}}") == text.count(rf"\{end}{{table}}") for end in ("begin", "end"))
    assert "\x1b" not in text and r"\textless{}b\textgreater{}" in text


def test_table(bbmcl: Bbmcl, runs: Path) -> None:
    text = told(bbmcl, runs, "--statistics")
    assert text.count("1.00*≈") == text.count("1.50*≈") == text.count("1.80+") == text.count("81.50+") == ATTACKS
    assert text.count("82.00*") == 2 * ATTACKS
    assert len(re.findall(r"\bfailed\b(?!:)", text)) == FAILED
    assert "One victim: nothing can be said of the methods." in text
    assert "nan" not in text.lower() and "\x1b" not in text


def test_page(bbmcl: Bbmcl, runs: Path, tmp_path: Path) -> None:
    told(bbmcl, runs, "--format", "html", "--out", str(tmp_path / "page.html"))
    text = (tmp_path / "page.html").read_text()
    assert len(text.encode()) < 5_000_000
    marked = re.findall(r'class="heat (best|second)"[^>]*><button[^>]*>([^<]*)<', text)
    assert Counter(marked) == Counter(ATTACKS * [(rank, value) for _, _, value, rank in GRID])
    assert len(re.findall(r"<button[^>]*data-cell[^>]*>failed<", text)) == FAILED
    data = json.loads(unescape(text.partition('id="data">')[2].partition("</script>")[0]))
    assert len(data["runs"]) == ATTACKS * (DEFENSES + 1)
    assert "cells are too many to be drawn" in text
    assert "One victim: nothing can be said of the methods." in text
    assert "<b>" not in text
