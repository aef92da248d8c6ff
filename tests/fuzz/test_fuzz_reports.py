"""Whatever rows say, a report prints it without escapes, markup or a crash."""

from __future__ import annotations

import csv
import io
import json
import re
import unicodedata
from dataclasses import fields, replace
from html.parser import HTMLParser
from typing import Any

from hostile import SECONDS, bounded, contained, fuzzed, nasty_json, nasty_text  # noqa: F401 (bounded: a fixture)
from hypothesis import given
from hypothesis import strategies as st
from made import make, page_of

from backdoorbench_mcl.report import render
from backdoorbench_mcl.report.files import stem
from backdoorbench_mcl.report.formats import md, tex
from backdoorbench_mcl.rows import Row

UNSEEN = {"Cc", "Cf", "Cs", "Co", "Zl", "Zp"}
CSV_FIELD = 1 << 20
TEXTS = [f.name for f in fields(Row) if f.type in ("str", "str | None")]
TUPLES = ("knows", "strays", "changed", "overrides")
NUMBERS = [f.name for f in fields(Row) if str(f.type).startswith(("float", "int"))]


BASES = [
    make("badnets", "before", 99.0, 83.0), make("badnets", "ft", 5.0, 80.0), make("sig", "ft", state="failed"),
    *(make("badnets", name, 5.0, 80.0, victim=seed) for name in ("before", "nad") for seed in (1, 2)),
    *(make("sig", name, state="n/a") for name in ("nc", "mcldef")), make("none", "ft", 0.0, 82.0),
]  # fmt: skip
ROWS = len(BASES)


def numbers(name: str) -> st.SearchStrategy[Any]:
    whole = next(str(f.type) for f in fields(Row) if f.name == name).startswith("int")
    wild = st.integers(-(2**63), 2**63 - 1)
    return wild if whole else st.one_of(st.floats(), wild)


@st.composite
def hostile_rows(draw: st.DrawFn) -> list[Row]:
    """A small grid whose rows say what nobody should print, in any field that `Row.from_dict` lets through."""
    out = []
    odd: dict[str, Any]
    sections = st.sampled_from(["attack", "defense", "train", "model", "control", "needs x", "exclude_poisoned"])
    value = st.one_of(nasty_json(), st.dictionaries(nasty_text(), nasty_json(), max_size=2))
    params = st.dictionaries(st.one_of(sections, nasty_text()), value, max_size=3)
    for base in BASES:
        odd = {name: draw(nasty_text()) for name in draw(st.lists(st.sampled_from(TEXTS), max_size=4, unique=True))}
        for name in draw(st.lists(st.sampled_from(TUPLES), max_size=2, unique=True)):
            odd[name] = tuple(draw(st.lists(nasty_text(), max_size=2)))
        for name in draw(st.lists(st.sampled_from(NUMBERS), max_size=2, unique=True)):
            odd[name] = draw(numbers(name))
        if draw(st.booleans()):
            odd["params"] = draw(params)
        if draw(st.booleans()):
            odd["versions"] = draw(st.dictionaries(nasty_text(), nasty_text(), max_size=2))
        if draw(st.booleans()):
            odd["stages"] = draw(st.dictionaries(st.sampled_from(["model", "failed"]), nasty_text(), max_size=2))
        try:  # what is no row never comes out of a store or an archive
            out.append(Row.from_dict(json.loads(json.dumps(replace(base, **odd).as_dict()))))
        except ValueError:
            out.append(base)
    return out


def hidden(text: str) -> list[str]:
    """Characters that steer a terminal or are not seen, but for line ends."""
    return [c for c in text if c != "\n" and unicodedata.category(c) in UNSEEN]


class Tags(HTMLParser):
    """Tags and names of attributes of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, frozenset[str]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, frozenset(name for name, _ in attrs)))


KNOWN = {tag for tag, _ in Tags(page_of(BASES[:3])).found}


@fuzzed(0.1, ROWS)
@given(hostile_rows())
def test_a_table_for_the_terminal_steers_no_terminal(rows: list[Row]) -> None:
    with contained():
        assert not hidden(render(rows, "table", width=100))
    with contained():
        coloured = render(rows, "table", width=100, color=True)
        assert not hidden(re.sub(r"\x1b\[[0-9;]*m", "", coloured))


@fuzzed(0.1, ROWS)
@given(hostile_rows())
def test_documents_hold_no_markup_of_others(rows: list[Row]) -> None:
    with contained():
        text = render(rows, "markdown")
        assert not hidden(text)
        assert not re.search(r"(?<!\\)<(?!/?u>)", text)
        assert not re.search(r"(?<!\\)\]\(", text)
    with contained():
        text = render(rows, "latex")
        assert not hidden(text)
        assert not re.search(r"\\(input|include|write|def|immediate|openout|catcode)\b", text)
        assert text.count(r"\end{document}") == 0


@fuzzed(0.1, ROWS)
@given(hostile_rows())
def test_records_come_back(rows: list[Row]) -> None:
    with contained():
        text = render(rows, "json")
        assert text.isascii()
        assert len(json.loads(text)) == len(rows)
    with contained():
        text = render(rows, "csv")
        assert not hidden(text)
        csv.field_size_limit(CSV_FIELD)
        found = list(csv.reader(io.StringIO(text)))
        assert {len(record) for record in found} == {len(found[0])}
        assert len(found) == len(rows) + 1
        assert not [cell for record in found for cell in record if cell[:1] in "=@" and cell]


@fuzzed(0.05, ROWS)
@given(hostile_rows(), nasty_text())
def test_a_page_holds_no_markup_of_others(rows: list[Row], title: str) -> None:
    with contained(6 * SECONDS):  # each data set and network has figures of its own: 20 at most, of half a second
        text = page_of(rows, title=title)
        text.encode()  # or it could not be written
        tags = Tags(text)
        assert {tag for tag, _ in tags.found} <= KNOWN
        assert not [names for _, names in tags.found if any(name.startswith("on") for name in names)]
        assert [tag for tag, _ in tags.found].count("script") == 2


@fuzzed()
@given(nasty_text(), nasty_text())
def test_names_of_files_are_safe_and_short(one: str, two: str) -> None:
    name = stem("fig4", one, two)
    assert re.fullmatch(r"[A-Za-z0-9.\-_]+", name)
    assert len(name) < 200
    assert not name.startswith((".", "-"))


@fuzzed()
@given(nasty_text())
def test_markup_is_escaped(text: str) -> None:
    assert not hidden(md(text) + tex(text))
    assert tex(text).isprintable()
    assert not re.search(r"(?<!\\)[<|`\[]", md(text))
