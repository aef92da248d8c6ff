"""Rows -> tables. `render` is the one door; the command prints what it returns. Free of torch and pandas."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from ..errors import UserError
from ..rows import Row
from .records import as_csv, as_json

Format = Literal["table", "markdown", "latex", "csv", "json"]
FORMATS: tuple[Format, ...] = ("table", "markdown", "latex", "csv", "json")


def render(
    rows: Sequence[Row], fmt: Format, *, color: bool = False, width: int | None = None, detail: bool = True
) -> str:
    """Rows as text without a final newline.

    fmt: `table` for terminals (`color`: bold and underlined by ANSI codes; `width` in columns, default the
    terminal's), `markdown`, `latex` (booktabs): grids with attacks down and defenses across, one per data set, model,
    clean rate, preset, budget and precision. `csv`, `json`: every field of every row, in the order given. detail: add
    the table with FTR, BA without the target class, TCA, RA and DER to a grid.
    Raises UserError for an unknown format, and where one label stands for two things in one grid.

    Example: `print(render(rows, "table", color=sys.stdout.isatty()))`
    """
    if fmt == "json":
        return as_json(rows)
    if fmt == "csv":
        return as_csv(rows)
    if fmt not in FORMATS:
        raise UserError(f"format {fmt!r}: expected one of {', '.join(FORMATS)}")
    from . import formats, grid  # these need numpy, `terminal` needs rich

    blocks = grid.build(rows)
    if not blocks:
        return "no results yet"
    if fmt == "markdown":
        return formats.as_markdown(blocks, detail)
    if fmt == "latex":
        return formats.as_latex(blocks, detail)
    from .terminal import as_table

    return as_table(blocks, detail, color, width)


__all__ = ["FORMATS", "Format", "render"]
