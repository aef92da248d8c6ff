"""The conformance suite as a table: every check, the kinds of methods that it concerns, its sentence."""

from __future__ import annotations

from sphinx.application import Sphinx

from backdoorbench_mcl.testing import CHECKS

PAGE, PLACE = "api", "<!-- checks -->"  # which page, and where in it


def table() -> str:
    """Markdown."""
    rows = [("check", "of", "sentence"), ("---", "---", "---")]
    for check in CHECKS:
        kinds = "every method" if len(check.kinds) == 5 else ", ".join(check.kinds)
        rows.append((f"`{check.name}`", kinds, check.sentence))
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def fill(app: Sphinx, page: str, source: list[str]) -> None:
    """Put the table into its page."""
    if page == PAGE:
        source[0] = source[0].replace(PLACE, table())


def setup(app: Sphinx) -> dict[str, bool]:
    """What Sphinx calls."""
    app.connect("source-read", fill)
    return {"parallel_read_safe": True}
