"""Files of the repository as pages of the site, and links that hold in the repository turned into links of the site."""

from __future__ import annotations

import re
from pathlib import Path

from sphinx.application import Sphinx

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
PAGES = {  # page -> the file that it shows, above what the page's own source has
    "adr/index": DOCS / "adr" / "README.md",
    "benchmarks": ROOT / "benchmarks" / "README.md",
    "changelog": ROOT / "CHANGELOG.md",
    "contributing": ROOT / "CONTRIBUTING.md",
}
_LINK = re.compile(r"\[([^\]]+)\]\((?![a-z]+:|#)([^)#\s]+)\)")


def relinked(text: str, home: Path) -> str:
    """Links of a file in the folder `home`, for the site: to a page, or mere words where the site lacks the target."""

    def link(found: re.Match[str]) -> str:
        target = (home / found[2]).resolve()
        if not target.exists():  # no link at all but code that looks like one
            return found[0]
        for page, file in PAGES.items():
            if target == file:
                return f"[{found[1]}](/{page}.md)"
        if target.is_relative_to(DOCS):
            return f"[{found[1]}](/{target.relative_to(DOCS)})"
        return found[1]

    return _LINK.sub(link, text)


def fill(app: Sphinx, page: str, source: list[str]) -> None:
    """Give a page the text of its file, and every page links that lead somewhere."""
    own = relinked(source[0], (DOCS / page).parent)
    file = PAGES.get(page)
    source[0] = own if file is None else f"{relinked(file.read_text(encoding='utf-8'), file.parent)}\n{own}"


def setup(app: Sphinx) -> dict[str, bool]:
    """What Sphinx calls."""
    app.connect("source-read", fill)
    return {"parallel_read_safe": True}
