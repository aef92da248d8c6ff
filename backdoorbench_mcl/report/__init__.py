"""Rows -> tables. `render` is the one door; the command prints what it returns. Free of torch and pandas."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Literal

from ..errors import UserError
from ..rows import Row

if TYPE_CHECKING:
    from .grid import Block
    from .sheets import Sheet

Format = Literal["table", "markdown", "latex", "csv", "json"]
FORMATS: tuple[Format, ...] = ("table", "markdown", "latex", "csv", "json")


def render(
    rows: Sequence[Row], fmt: Format, *, color: bool = False, width: int | None = None, detail: bool = True,
    restyle: Callable[[Block], Block] | None = None, below: Sequence[Sheet] = (),
) -> str:  # fmt: skip
    """Rows as text without a final newline.

    fmt: `table` for terminals (`color`: bold and underlined by ANSI codes; `width` in columns, default the
    terminal's), `markdown`, `latex` (booktabs): grids with attacks down and defenses across, one per data set, model,
    clean rate, preset, budget and precision. `csv`, `json`: every field of every row, in the order given. detail: add
    the table with FTR, BA without the target class, TCA, RA and DER to a grid. restyle: changes each block before it is
    printed; below: tables after the grids.
    Raises UserError for an unknown format, and where one label stands for two things in one grid.

    Example: `print(render(rows, "table", color=sys.stdout.isatty()))`
    """
    if fmt not in FORMATS:
        raise UserError(f"format {fmt!r}: expected one of {', '.join(FORMATS)}")
    from . import formats, grid, records, sheets  # these need numpy, `terminal` needs rich

    if fmt == "json":
        return records.as_json(rows)
    if fmt == "csv":
        return records.as_csv(rows)
    blocks = grid.build(rows) if restyle is None else [restyle(block) for block in grid.build(rows)]
    if not blocks:
        return "no results yet"
    if fmt == "markdown":
        grids, others = formats.as_markdown(blocks, detail), sheets.as_markdown(below)
    elif fmt == "latex":
        grids, others = formats.as_latex(blocks, detail), sheets.as_latex(below)
    else:
        from .terminal import as_table

        columns = width or shutil.get_terminal_size((80, 24)).columns
        grids, others = as_table(blocks, detail, color, columns), sheets.as_text(below, columns)
    return "\n\n".join(filter(None, (grids, others)))


__all__ = ["FORMATS", "Format", "render"]
