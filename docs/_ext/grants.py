"""Who may see what, from the one file that grants it: the table in the docstring of `grant`, as Markdown."""

from __future__ import annotations

from sphinx.application import Sphinx

from backdoorbench_mcl import grant

PAGE, PLACE = "threat-model", "<!-- grants -->"  # which page, and where in it


def table(text: str) -> str:
    """The lines of a text that are a table; one whose first cell is empty continues the one above."""
    rows: list[list[str]] = []
    for line in text.splitlines():
        if not line.startswith("|"):
            continue
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if cells[0]:
            rows.append(cells)
        else:
            rows[-1] = [" ".join(pair).strip() for pair in zip(rows[-1], cells, strict=True)]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def fill(app: Sphinx, page: str, source: list[str]) -> None:
    """Put the table into its page."""
    if page == PAGE:
        source[0] = source[0].replace(PLACE, table(grant.__doc__ or ""))


def setup(app: Sphinx) -> dict[str, bool]:
    """What Sphinx calls."""
    app.connect("source-read", fill)
    return {"parallel_read_safe": True}
