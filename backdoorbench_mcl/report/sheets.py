"""Tables of text below a grid (statistics, comparisons, claims), and how each format prints them."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

from rich.cells import cell_len

from .formats import as_pipes, md, tabular, tex, tex_float


@dataclass(frozen=True)
class Sheet:
    """A title, a table whose first `left` columns are text and whose others are numbers, and lines below it.

    folded: whether a page shows the title alone until somebody opens it.
    """

    title: str
    head: tuple[str, ...] = ()
    body: tuple[tuple[str, ...], ...] = ()
    left: int = 2
    below: tuple[str, ...] = ()
    folded: bool = False


def as_text(sheets: Sequence[Sheet], width: int) -> str:
    """For terminals: columns padded, a repeated first cell left out, lines below wrapped to `width`."""
    return "\n\n".join(_text(sheet, width) for sheet in sheets)


def _text(sheet: Sheet, width: int) -> str:
    lines = [*textwrap.wrap(sheet.title, width, subsequent_indent="  "), ""]
    if sheet.body:
        table = [sheet.head, *sheet.body]
        sizes = [max(cell_len(row[i]) for row in table) for i in range(len(sheet.head))]
        before = ""
        for row in table:
            first = "" if row[0] == before else row[0]
            before = row[0]
            cells = [_padded(text, size, i < sheet.left) for i, (text, size) in
                     enumerate(zip((first, *row[1:]), sizes, strict=True))]  # fmt: skip
            lines.append("  ".join(cells).rstrip())
        lines.append("")
    for text in sheet.below:
        lines += textwrap.wrap(text, width, subsequent_indent="  ")
    return "\n".join(lines).rstrip()


def _padded(text: str, size: int, left: bool) -> str:
    space = " " * (size - cell_len(text))
    return text + space if left else space + text


def as_markdown(sheets: Sequence[Sheet]) -> str:
    """Pipe tables below bold titles; everything is escaped."""
    parts = []
    for sheet in sheets:
        parts.append(f"**{md(sheet.title)}**")
        if sheet.body:
            body = [[md(text) for text in row] for row in sheet.body]
            parts.append(as_pipes([md(text) for text in sheet.head], body, left=sheet.left))
        if sheet.below:
            parts.append("\n".join(f"- {md(text)}" for text in sheet.below))
    return "\n\n".join(parts)


def as_latex(sheets: Sequence[Sheet]) -> str:
    """`table` environments for booktabs, the lines below as a footnote."""
    parts = []
    for sheet in sheets:
        columns = "l" * sheet.left + "r" * (len(sheet.head) - sheet.left)
        rows = [" & ".join(map(tex, row)) for row in sheet.body]
        table = tabular(columns, [" & ".join(map(tex, sheet.head))], rows) if rows else ""
        parts.append(tex_float(sheet.title, table, [tex(text) for text in sheet.below]))
    return "\n\n".join(parts)


__all__ = ["Sheet", "as_latex", "as_markdown", "as_text"]
