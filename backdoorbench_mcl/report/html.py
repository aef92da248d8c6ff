"""One self-contained page: grids as heat maps, what is behind each cell, plots, statistics, the paper's numbers.

It loads nothing, works from the file system, and runs no script but its own (a content security policy names its hash).
Every text from a plugin or a file name is escaped by the template, or set as text by the script.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..rows import Row
from ..store import Store
from ..text import one_line
from . import grid, inference, notes, paper
from .drill import Drill
from .evidence import Evidence
from .grid import Block, Cell, Rank, Stat
from .plots import Plots
from .records import embedded
from .sheets import Sheet

if TYPE_CHECKING:
    from jinja2 import Template
    from markupsafe import Markup

TITLE = "bbmcl report"
SIZE = 4_800_000  # bytes of a page
CELL_BYTES = 1_700  # about what a cell takes in grids and sheets
LEAST = 1_000_000  # bytes of plots and of what is behind the cells, however many cells there are
PLOTS = 0.25  # of what the cells leave: plots
_NUMBER = re.compile(r"\s*[<>≤≥]?\s*([-+\N{MINUS SIGN}]?\d+(?:\.\d+)?(?:e[-+]?\d{1,2})?)")
_LOW, _HIGH = (222, 235, 247), (253, 174, 107)  # light blue to orange: told apart by everybody


@dataclass(frozen=True)
class Part:
    """What has grids, ranks and tests of its own on a page. title: its heading, "" where it is the whole page; below:
    tables after its own; features: whether the stored features of its models are drawn.
    """

    title: str
    rows: Sequence[Row]
    below: Sequence[Sheet] = ()
    features: bool = True


def page(parts: Sequence[Part], *, store: Store | None = None, cache_folder: Path | None = None, title: str = TITLE,
         against: str | None = None, printed_names: bool = False) -> str:  # fmt: skip
    """Parts as one HTML page, each for itself; only what is behind a run is held once for all.

    store: the runs folder behind them, for pictures, curves, logs and predictions; cache_folder: where prepared data
    sets lie, for test images; against: the defense that tests compare with; printed_names: tables have the paper's
    names of attacks and defenses, and its slash. Raises UserError where one label stands for two things.
    """
    blocks = [grid.build(part.rows) for part in parts]
    cells = sum(cell is not None for found in blocks for block in found for line in block.lines for cell in line.cells)
    drill, plots = Drill(store, cache_folder), Plots(PLOTS * max(LEAST, SIZE - CELL_BYTES * cells))
    evidence = None if store is None else Evidence(store)
    against = paper.DEFENSES.get(against or inference.PREFERRED, against) if printed_names else against

    def shown(part: Part, stored: Sequence[Block]) -> dict[str, Any]:
        named = [paper.restyle(block) for block in stored] if printed_names else stored
        grids = [_grid(*pair, drill, plots, evidence if part.features else None)
                 for pair in zip(named, stored, strict=True)]  # fmt: skip
        predictions = None if evidence is None else evidence.predictions
        sheets = [*inference.sheets(named, against, predictions), *part.below]
        return {"title": one_line(part.title), "grids": grids, "sweeps": plots.of_sweeps(stored), "sheets": sheets,
                "left_out": plots.left_out()}  # fmt: skip

    body = _template("page.body.html").render(parts=[shown(*pair) for pair in zip(parts, blocks, strict=True)])
    data, lines = drill.data(max(LEAST, SIZE - len(body.encode())))
    script = _asset("page.js")
    return _template("page.html").render(
        title=one_line(title), banner=notes.banner(block for found in blocks for block in found), body=_safe(body),
        css=_safe(_asset("page.css")), script=_safe(script), script_hash=_policy_hash(script),
        data=_safe(embedded(data)), left_out=lines,
    )  # fmt: skip


def _policy_hash(script: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}"


@cache
def _asset(name: str) -> str:
    return resources.files(__package__).joinpath(name).read_text()


@cache
def _template(name: str) -> Template:
    from jinja2 import Environment, StrictUndefined

    found = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    found.filters["number"] = _sortable
    found.filters["order"] = _columns
    return found.from_string(_asset(name))


def _safe(text: str) -> Markup:
    """Text of this package, or made by it, that goes into the page as it is."""
    from markupsafe import Markup

    return Markup(text)  # noqa: S704 (never text of others)


def _sortable(text: str) -> str:
    """The number at the start of a cell, "" for none. Example: `_sortable("+1.20 to +3.40")` is "1.2"."""
    found = _NUMBER.match(text)
    return str(float(found[1].replace("\N{MINUS SIGN}", "-"))) if found else ""


def _columns(sheet: Sheet) -> list[list[str | None]]:
    """For each cell of a sheet what it is sorted by: a number, "" for none, None for its text.

    Text is the order of the left columns, and of any that holds no number at all, such as verdicts.
    """
    numbers = [[_sortable(text) for text in row] for row in sheet.body]
    by_number = [i >= sheet.left and any(column) for i, column in enumerate(zip(*numbers, strict=True))]
    return [[value if by_number[i] else None for i, value in enumerate(row)] for row in numbers]


# ---------------------------------------------------------------- a grid


def _grid(block: Block, as_stored: Block, drill: Drill, plots: Plots, evidence: Evidence | None) -> dict[str, Any]:
    return {
        "title": block.title, "columns": [notes.heading(column) for column in block.columns],
        "lines": [{"label": notes.attack(line), "cells": _cells(line.cells, drill)} for line in block.lines],
        "legend": notes.legend(block, "Bold: best, underlined: second best"), "failures": notes.failures(block),
        "details_head": [*notes.details_head(block), "MB"], "details": _details(block),
        "details_legend": notes.details_legend(block) + " MB: peak memory of a job.",
        "plots": plots.of_block(as_stored, evidence), "left_out": plots.left_out(),
    }  # fmt: skip


def _details(block: Block) -> list[list[str]]:
    cells = [cell for line in block.lines for cell in line.cells if cell and cell.ok]
    memory = [cell.mean("peak_mb") for cell in cells]
    return [[*row, notes.NONE if mb is None else f"{mb:.0f}"]
            for row, mb in zip(notes.details(block), memory, strict=True)]  # fmt: skip


def _cells(cells: Sequence[Cell | None], drill: Drill) -> list[dict[str, Any] | None]:
    """Heat is relative within a line for BA, absolute for ASR."""
    ba = [cell.ba.mean for cell in cells if cell and cell.ba]
    low, high = (min(ba), max(ba)) if ba else (0.0, 0.0)
    return [None if cell is None else _cell(cell, drill, min(low, high - 5), high) for cell in cells]


def _cell(cell: Cell, drill: Drill, low: float, high: float) -> dict[str, Any]:
    number = drill.cell(cell.runs)
    if cell.failure:
        return {"failure": " ".join(filter(None, (cell.failure, cell.tag))), "number": number}
    tag = f" ({cell.tag})" if cell.tag else ""
    good = None if cell.erased else cell.asr  # an ASR that is low because the class is gone is not good
    return {
        "failure": "", "number": number, "asr": _stat(cell.asr) + notes.asr_marks(cell), "ba": _stat(cell.ba) + tag,
        "asr_value": "" if cell.asr is None else cell.asr.mean, "ba_value": "" if cell.ba is None else cell.ba.mean,
        "asr_rank": _rank(cell.asr_rank, good), "ba_rank": _rank(cell.ba_rank, cell.ba),
        "asr_colour": _colour(good, 0, 100), "ba_colour": _colour(cell.ba, high, low),
    }  # fmt: skip


def _stat(stat: Stat | None) -> str:
    return notes.NONE if stat is None else stat.text()


def _rank(rank: Rank, stat: Stat | None) -> str:
    return f"{rank} none" if stat is None else rank


def _colour(stat: Stat | None, good: float, bad: float) -> str:
    if stat is None:
        return "none"
    share = min(1.0, max(0.0, (stat.mean - good) / (bad - good))) if bad != good else 0.0
    red, green, blue = (round(a + share * (b - a)) for a, b in zip(_LOW, _HIGH, strict=True))
    return f"rgb({red},{green},{blue})"


__all__ = ["TITLE", "Part", "page"]
