"""What may be concluded from a block: spread per cell, paired differences with Holm's correction, McNemar on one pair.

Victims are the unit (spec 12.2). On ASR nothing is tested against a cell that has more of it and is at its floor, cells
with failed runs, a deleted target class or code of their own on nothing; below five victims there is no test but the
differences themselves.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..rows import Row
from . import notes, statistics
from .grid import Block, Cell, Column, Line, tied
from .paper import nested
from .sheets import Sheet
from .statistics import Difference

METRICS = (("asr", "ASR"), ("ftr", "FTR"), ("ba", "BA"), ("ba_nt", "BA nt"), ("tca", "TCA"))
TESTED = (("asr", "ASR"), ("ba", "BA"))
PREFERRED = "mcldef"  # the defense that others are compared with, where nobody names one
FLAGGED = f"{notes.FLAGGED} flagged"
TIED = f"{notes.FLOOR} tied"
GUEST = "own code"
Predictions = Callable[[Row], "Judged | None"]


class Judged(NamedTuple):
    """Per test image, of one row: whether its clean version was classified right, and whether its trigger fired.

    Both bool; right: (N,), fired: (M,) over the images that the attack counts.
    """

    right: NDArray[np.bool_]
    fired: NDArray[np.bool_]


def sheets(blocks: Sequence[Block], against: str | None = None, predictions: Predictions | None = None) -> list[Sheet]:
    """Spread and tests of every block. against: the label of the defense to compare with; predictions: what a row's
    model said, None where that is not stored.
    """
    out = []
    for block in blocks:
        if any(len(cell.ok) > 1 for _, _, cell in block.finished):
            out.append(_spread(block))
        reference = _reference(block, against)
        if reference is not None:
            out.append(_tests(block, reference, predictions))
    return out


def _reference(block: Block, against: str | None) -> Column | None:
    defended = [column for column in block.columns if not column.before]
    if len(defended) < 2:
        return None
    named = [column for column in defended if column.label == (against or PREFERRED)]
    return named[0] if named else defended[0]


# ---------------------------------------------------------------- spread


def _spread(block: Block) -> Sheet:
    """A line per cell: number of victims and runs, and for each metric mean, sd, range, interval."""
    body = []
    for line, column, cell in block.finished:
        asr, *others = (_summary(statistics.summary(nested(cell.ok, name))) for name, _ in METRICS)
        numbers = (asr + notes.asr_marks(cell), *others)
        n = f"{_victims(cell)} x {_draws(cell)}" + (f" ({cell.tag})" if cell.tag else "")
        body.append((notes.attack(line), notes.heading(column), n, *numbers))
    cells = [cell for _, _, cell in block.finished]
    victims = {_victims(cell) for cell in cells}
    below = []
    if min(victims) < statistics.MIN_VICTIMS:
        below.append(f"No interval: {statistics.MIN_VICTIMS} victims are needed for one, this table has "
                     f"{min(victims)}; the victims' means stand in parentheses instead.")  # fmt: skip
    if max(victims) >= statistics.MIN_VICTIMS:
        below.append("Then min to max of the victims' means and, in brackets, the 95 % bootstrap interval of the mean, "
                     "victims first and then the draws on each.")  # fmt: skip
    if any(cell.floor for cell in cells):
        below.append(f"{notes.FLOOR} ASR not above FTR, the floor of ASR.")
    if any(cell.erased for cell in cells):
        below.append(f"{notes.ERASED} target class erased.")
    return Sheet(
        f"Spread: {block.title}", ("attack", "defense", "n", *(title for _, title in METRICS)), tuple(body), 2,
        ("n: victims x defense seeds. mean ± sd over victims (over draws where there is one victim).", *below),
    )  # fmt: skip


def _victims(cell: Cell) -> int:
    return len({row.victim_seed for row in cell.ok})


def _draws(cell: Cell) -> str:
    counts = sorted({len([r for r in cell.ok if r.victim_seed == v]) for v in {row.victim_seed for row in cell.ok}})
    return str(counts[0]) if len(counts) == 1 else f"{counts[0]}-{counts[-1]}"


def _summary(found: statistics.Summary | None) -> str:
    if found is None:
        return notes.NONE
    text = f"{found.mean:.2f}" + (f"±{found.sd:.2f}" if found.sd is not None else "")
    if found.interval is not None:
        low, high = found.interval
        return f"{text} {min(found.means):.2f} to {max(found.means):.2f} [{low:.2f}, {high:.2f}]"
    return text + (f" ({', '.join(f'{mean:.2f}' for mean in found.means)})" if found.victims > 1 else "")


# ---------------------------------------------------------------- tests


class _Pair(NamedTuple):
    line: Line
    column: Column
    first: Cell
    second: Cell

    def obstacle(self, name: str) -> str:
        """What stands in place of a test of a metric where the two may not be compared, else ""."""
        cells = (self.first, self.second)
        if any(cell.erased for cell in cells):
            return notes.ERASED
        if self.line.flagged:
            return FLAGGED
        if any(cell.guest for cell in cells):
            return GUEST
        short = [cell for cell in cells if cell.incomparable]
        if short:
            return f"{len(short[0].ok)}/{len(short[0].runs) - short[0].held_back}"
        return TIED if name == "asr" and tied(self.first, self.second) else ""


def _tests(block: Block, reference: Column, predictions: Predictions | None) -> Sheet:
    """Differences reference - other in every attack and metric, corrected over attacks x rivals of a metric."""
    place = block.columns.index(reference)
    pairs = [
        _Pair(line, column, first, cell)
        for line in block.lines
        if (first := line.cells[place]) is not None and first.ok
        for cell, column in zip(line.cells, block.columns, strict=True)
        if cell is not None and cell.ok and not column.before and column is not reference
    ]
    title = f"{notes.heading(reference)} less each other defense: {block.title}"
    found = {name: _family(pairs, name) for name, _ in TESTED}
    if pairs and predictions is not None and max(_victims(pair.first) for pair in pairs) == 1:
        return _single_pairs(pairs, title, predictions)
    body = [
        (notes.attack(pair.line), notes.heading(pair.column), *(
            text for name, _ in TESTED for text in _difference(found[name][i], pair, name)))
        for i, pair in enumerate(pairs)
    ]  # fmt: skip
    head = ("attack", "other", *(part for _, m in TESTED for part in (f"{m} diff.", "95 % interval", "p (Holm)", "dz")))
    below = [
        "Differences in points, paired by victim and defense seed; Holm's correction over attacks x defenses of a "
        "metric; dz: mean / sd of the differences."
    ]
    every = [d for family in found.values() for d in family if d is not None]
    below += [f"No test: {why}." for why in sorted({d.why for d in every if d.why})]
    if any(1 < d.victims < statistics.MIN_VICTIMS for d in every):
        below.append("In parentheses: the difference on each victim.")
    below += _untested(pairs)
    return Sheet(title, head if body else (), tuple(body), 2, tuple(below) if body else ("Nothing to compare.",))


def _family(pairs: Sequence[_Pair], name: str) -> list[Difference | None]:
    found = [_paired(pair, name) for pair in pairs]
    corrected = statistics.holm([None if d is None else d.p for d in found])
    return [None if d is None else replace(d, p_holm=p) for d, p in zip(found, corrected, strict=True)]


def _paired(pair: _Pair, name: str) -> Difference | None:
    """None where the two may not be compared, or have no victim in common."""
    if pair.obstacle(name):
        return None
    return statistics.paired(*shared(name, pair.first.ok, pair.second.ok))


def _untested(pairs: Sequence[_Pair]) -> list[str]:
    """What the marks of pairs without a test mean."""
    obstacles = {pair.obstacle(name) for pair in pairs for name, _ in TESTED}
    held_back = any(cell.held_back for pair in pairs for cell in (pair.first, pair.second))
    told = (
        (notes.ERASED, f"{notes.ERASED} target class erased: not tested."),
        (FLAGGED, f"{FLAGGED}: the ASR of a victim is not high enough (gate), nothing on the line is tested."),
        (GUEST, f"{GUEST}: custom inference by code of its own, which runs where the test images are: not tested."),
        (TIED, f"{TIED}: the one with more ASR is at its floor, FTR, with no backdoor left to be beaten on."),
    )
    out = [text for mark, text in told if mark in obstacles]
    if any("/" in obstacle for obstacle in obstacles):
        out.append("k/n: runs that finished; what failed is missing for a reason, so the rest is not tested.")
    return out + (["Victims that the gate held back are left out."] if held_back else [])


def shared(name: str, *cells: Sequence[Row]) -> list[dict[int, list[float]]]:
    """A field of each cell by victim, of those (victim, defense seed) that all have finished with a finite value."""
    by = [{(row.victim_seed, row.defense_seed): getattr(row, name) for row in rows if row.state == "ok"}
          for rows in cells]  # fmt: skip
    out: list[dict[int, list[float]]] = [{} for _ in cells]
    for key in by[0]:
        values = [found.get(key) for found in by]
        known = [float(value) for value in values if value is not None and math.isfinite(value)]
        if len(known) == len(by):
            for one, value in zip(out, known, strict=True):
                one.setdefault(key[0], []).append(value)
    return out


def _difference(found: Difference | None, pair: _Pair, name: str) -> tuple[str, str, str, str]:
    if found is None:
        return pair.obstacle(name) or notes.NONE, "", "", ""
    mean = f"{found.mean:+.2f}"
    if found.p is None or found.interval is None or found.dz is None:
        each = f"({', '.join(f'{value:+.2f}' for value in found.values)})" if found.victims > 1 else ""
        return mean, each, "", ""
    interval = f"{found.interval[0]:+.2f} to {found.interval[1]:+.2f}"
    return mean, interval, p_text(found.p_holm), f"{found.dz:+.2f}"


def p_text(value: float | None) -> str:
    """A p value as printed, "" for none. Example: `<0.001`"""
    return "" if value is None else "<0.001" if value < 0.001 else f"{value:.3f}"


# ---------------------------------------------------------------- one victim: these two models only


def _single_pairs(pairs: Sequence[_Pair], title: str, predictions: Predictions) -> Sheet:
    """McNemar on stored predictions, of the smallest seeds that two cells share."""
    body, missing = [], 0
    for pair in pairs:
        names = (notes.attack(pair.line), notes.heading(pair.column))
        if pair.obstacle("ba"):
            body.append((*names, pair.obstacle("ba"), *[""] * 5))
            continue
        judged = _judged(pair, predictions)
        if judged is None:
            missing += 1
            continue
        numbers: list[str] = [pair.obstacle("asr"), "", ""] if pair.obstacle("asr") else []
        fired, right = ((judged[0].fired, judged[1].fired), (judged[0].right, judged[1].right))
        for a, b in (right,) if numbers else (fired, right):
            only = int((a & ~b).sum()), int((~a & b).sum())
            p = statistics.mcnemar(*only)
            numbers += [f"{100 * (only[0] - only[1]) / len(a):+.2f}", f"{only[0]}:{only[1]}",
                        "cannot fire" if p is None else p_text(p)] if len(a) else [notes.NONE, "", ""]  # fmt: skip
        body.append((*names, *numbers))
    head = ("attack", "other", "ASR diff.", "only one", "McNemar p", "BA diff.", "only one", "McNemar p")
    below = [
        "One victim: nothing can be said of the methods. These pairs of models only, of the first seeds: test images "
        "that just one of the two gets (the reference : the other), exact McNemar, not corrected.",
    ]
    if any("cannot fire" in row for row in body):
        below.append("cannot fire: fewer than 6 images tell the two apart, so no p could be below 0.05.")
    below += _untested(pairs)
    if missing:
        below.append(f"{missing} pair{'s' * (missing > 1)} without stored predictions left out.")
    return Sheet(title, head if body else (), tuple(body), 2, tuple(below))


def _judged(pair: _Pair, predictions: Predictions) -> tuple[Judged, Judged] | None:
    by = [{(row.victim_seed, row.defense_seed): row for row in cell.ok} for cell in (pair.first, pair.second)]
    both: list[Any] = sorted(set(by[0]) & set(by[1]))
    if not both:
        return None
    first, second = (predictions(rows[both[0]]) for rows in by)
    return None if first is None or second is None else (first, second)


__all__ = ["METRICS", "PREFERRED", "Judged", "Predictions", "shared", "sheets"]
