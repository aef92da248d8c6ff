"""The plots of an HTML page, as markup. What is too heavy for a page is left out, and a line says so."""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence
from typing import TYPE_CHECKING

from . import figures
from .evidence import Evidence
from .grid import Block

if TYPE_CHECKING:
    from markupsafe import Markup
    from matplotlib.figure import Figure

MAX_CELLS = 400  # of a plot: more cannot be told apart, and take seconds to draw
MAX_MODELS = 12  # of a figure of features


class Plots:
    """Draws a page's plots as long as there is room. room: bytes of markup."""

    def __init__(self, room: float) -> None:
        self.room = room
        self.drawn = 0
        self._left_out: list[str] = []

    def left_out(self) -> list[str]:
        """Lines on what was left out since the last call."""
        found, self._left_out = self._left_out, []
        return found

    def of_block(self, block: Block, evidence: Evidence | None) -> list[Markup]:
        """ASR against BA, cost against BA, and the features of stored embeddings."""
        cells = sum(len(figures.dots(line, block.columns)) for line in block.lines)
        out = []
        for title, cost in ((f"ASR and BA: {block.title}", False), (f"Cost and BA: {block.title}", True)):
            if self._few(title, cells):
                out += self._inline(figures.trade_off([block], title, cost), title)
        return out + ([] if evidence is None else self._features(block, evidence))

    def of_sweeps(self, blocks: Sequence[Block]) -> list[Markup]:
        """Curves over everything that varies within a protocol."""
        out = []
        for sweep in figures.sweeps(blocks):
            title = f"Sweep of {sweep.name}: {sweep.protocol}"
            if self._few(title, sweep.cells):
                out += self._inline(figures.drawn(sweep, title), title)
        return out

    def _features(self, block: Block, evidence: Evidence) -> list[Markup]:
        rows = [row for row in block.rows if "embed" in row.stages]
        found = (panel for row in rows if (panel := evidence.embedding(row)) is not None)
        panels = [panel for _, panel in zip(range(MAX_MODELS), found, strict=False)]
        title = f"Features: {block.title}"
        if len(panels) < len(rows):
            why = f"at most {MAX_MODELS} are" if len(panels) == MAX_MODELS else "the others are no longer stored"
            self._left_out.append(f"{title}: {len(panels)} of {len(rows)} models are drawn; {why}.")
        if not panels:
            return []
        data = base64.b64encode(figures.render(figures.tsne(panels, title), "png", dpi=100)).decode()
        alt = html.escape(f"t-SNE of features. {title}")
        return self._fitting(f'<img alt="{alt}" src="data:image/png;base64,{data}">', title)

    def _few(self, title: str, cells: int) -> bool:
        if cells > MAX_CELLS:
            self._left_out.append(f"{title}: {cells} cells are too many to be drawn, at most {MAX_CELLS} are.")
        return cells <= MAX_CELLS

    def _inline(self, made: Figure | None, title: str) -> list[Markup]:
        if made is None:
            return []
        self.drawn += 1
        return self._fitting(figures.svg(made, f"plot{self.drawn}", title), title)  # texts are escaped by matplotlib

    def _fitting(self, markup: str, title: str) -> list[Markup]:
        from markupsafe import Markup

        size = len(markup.encode())
        if size > self.room:
            self._left_out.append(f"{title}: left out, to keep the page small.")
            return []
        self.room -= size
        return [Markup(markup)]  # noqa: S704 (drawn by matplotlib, which escapes labels)


__all__ = ["MAX_CELLS", "MAX_MODELS", "Plots"]
