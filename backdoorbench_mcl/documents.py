"""Reports that need the runs folder beside the rows: statistics on stored predictions, printed numbers, HTML pages."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from .errors import UserError
from .registry import cache_folder
from .rows import Row
from .store import Store

if TYPE_CHECKING:
    from .report.html import Part
    from .report.sheets import Sheet


def below(
    runs: Path, rows: Sequence[Row], fmt: str, statistics: bool, against: str | None, printed: int | None
) -> list[Sheet]:
    """The tables below the grids of `bbmcl report`. Raises UserError for a defense or a table that there is not."""
    if fmt in ("json", "csv") or not rows:
        return []
    out = []
    if statistics:
        from .report import grid, inference
        from .report.evidence import Evidence

        _check(rows, against)
        store = Store(runs)
        try:
            out += inference.sheets(grid.build(rows), against, Evidence(store).predictions)
        finally:
            store.close()
    return [*out, *_printed(rows, printed)]


def _check(rows: Sequence[Row], against: str | None) -> None:
    labels = sorted({row.defense for row in rows})
    if against is not None and against not in labels:
        raise UserError(f"--against {against!r}: no stored row has that defense; there are {', '.join(labels)}")


def _printed(rows: Sequence[Row], table: int | None) -> list[Sheet]:
    if table is None:
        return []
    from .report import paper

    if table not in paper.TABLES:
        known = ", ".join(map(str, paper.TABLES))
        raise UserError(f"--paper {table}: expected one of {known}, the tables that print ASR and BA")
    return paper.sheets(rows, table)


def write_page(
    runs: Path, rows: Sequence[Row], file: Path, printed: int | None = None, against: str | None = None
) -> Path:
    """Write the HTML page of rows of a runs folder, whole or not at all; returns where.

    Raises UserError as `below` does, and where one label stands for two things.
    """
    from .report.html import TITLE, Part

    _check(rows, against)
    return write_parts(runs, [Part("", rows, _printed(rows, printed))], file, TITLE, against)


def write_parts(
    runs: Path, parts: Sequence[Part], file: Path, title: str, against: str | None = None, printed_names: bool = False
) -> Path:
    """Write the HTML page of several parts, each with grids and tests of its own. printed_names: the paper's names."""
    from .report import files
    from .report.html import page

    store = Store(runs)
    try:
        text = page(parts, store=store, cache_folder=cache_folder(), title=title, against=against,
                    printed_names=printed_names)  # fmt: skip
    finally:
        store.close()
    return files.write(file, text.encode())


__all__ = ["below", "write_page", "write_parts"]
