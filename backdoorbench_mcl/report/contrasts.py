"""What a claim is made of: paired differences, positive as claimed, and what came of them when tested together."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import fmean

from ..rows import Row
from . import paper, statistics
from .grid import Cell, tied
from .inference import p_text, shared
from .statistics import Difference

TIED = "tied at the floor"  # the one with more ASR has no backdoor left to be beaten on
NAMES = {"ba": "BA", "ba_nt": "BA nt", "asr": "ASR"}


@dataclass(frozen=True)
class Contrast:
    """One difference that a claim is made of. values: one a victim, positive as claimed; None where `why` says so.

    margin: where the claim is that something stays within it on either side; values then are the changes themselves.
    """

    name: str
    values: tuple[float, ...] | None
    why: str = ""
    margin: float | None = None

    @property
    def signed(self) -> tuple[float, ...] | None:
        """The values; of a margin, what is left of it on the nearer side."""
        if self.values is None or self.margin is None:
            return self.values
        nearer = -1 if fmean(self.values) < 0 else 1
        return tuple(self.margin - nearer * change for change in self.values)


@dataclass(frozen=True)
class Outcome:
    """What a contrast came to. p: of the test that it holds; refuted: whether it is significantly the other way."""

    contrast: Contrast
    found: Difference | None = None
    p: float | None = None
    refuted: bool = False

    @property
    def claimed(self) -> bool:
        """Whether it is as claimed, significantly or not."""
        return self.found is not None and self.found.mean > 0

    @property
    def holds(self) -> bool:
        """Whether it is significantly as claimed."""
        return self.claimed and self.p is not None and self.p < statistics.LEVEL

    @property
    def shown(self) -> Difference | None:
        """The values with their interval: of a margin, the changes, not what they leave of it."""
        return None if self.contrast.values is None else statistics.of_differences(self.contrast.values)

    @property
    def victims(self) -> str:
        """On how many victims it is as claimed, "" for a single one. Example: `4 of 5`"""
        values, margin = self.contrast.values or (), self.contrast.margin
        good = sum(value > 0 if margin is None else abs(value) < margin for value in values)
        return f"{good} of {len(values)}" if len(values) > 1 else ""

    @property
    def number(self) -> str:
        """The mean and what there is to judge it by. Examples: `+3.05 (p 0.012)`, `+3.05 (on 2 of 3)`, `+3.05`"""
        if self.contrast.values is None:
            return ""
        p = p_text(self.p)
        beside = f" (p {p})" if p else f" (on {self.victims})" if self.victims else ""
        return f"{fmean(self.contrast.values):+.2f}{beside}"

    @property
    def text(self) -> str:
        """The difference and its p, or why there is none."""
        return f"{self.contrast.name}: {self.number or self.contrast.why}"


def tested(contrasts: Sequence[Contrast]) -> tuple[Outcome, ...]:
    """Each contrast tested; two-sided p values are corrected over the claim. That something stays within a margin is
    tested by TOST, not corrected: a claim holds only if all of its contrasts do.
    """
    differences = [None if c.signed is None else statistics.of_differences(c.signed) for c in contrasts]
    corrected = statistics.holm([None if d is None else d.p for d in differences])
    out = []
    for contrast, found, p in zip(contrasts, differences, corrected, strict=True):
        refuted = found is not None and found.mean < 0 and p is not None and p < statistics.LEVEL
        if contrast.margin is not None and contrast.values is not None:
            p = statistics.equivalent(contrast.values, contrast.margin)
        out.append(Outcome(contrast, found, p, refuted))
    return tuple(out)


# ---------------------------------------------------------------- from cells


def less(first: Cell, second: Cell, name: str, label: str) -> list[Contrast]:
    """first has less of a field than second, paired by victim; nothing where one has not been run."""
    if not first.runs or not second.runs:
        return []
    a, b = shared(name, first.ok, second.ok)
    why = paper.untestable(first, second) or ("" if a else f"no seed with a value of {NAMES[name]} in both")
    if not why and name == "asr" and tied(first, second):
        why = TIED
    return [Contrast(label, None if why else tuple(fmean(b[v]) - fmean(a[v]) for v in a), why)]


def more(first: Cell, second: Cell, name: str, label: str) -> list[Contrast]:
    """first has more of a field than second; otherwise as `less`."""
    return less(second, first, name, label)


def by_victim(
    cell: Cell, label: str, value: Callable[[Row], float | None], margin: float | None = None, erased: bool = False
) -> list[Contrast]:
    """A value of each run, averaged per victim. erased: whether a run that deleted the target class counts."""
    if not cell.runs:
        return []
    why = paper.untestable(replace(cell, erased=cell.erased and not erased))
    groups: dict[int, list[float]] = {}
    for row in cell.ok:
        found = value(row)
        if found is not None and math.isfinite(found):
            groups.setdefault(row.victim_seed, []).append(found)
    if not why and sum(map(len, groups.values())) < len(cell.ok):
        why = "values are missing"
    return [Contrast(label, None if why else tuple(fmean(group) for group in groups.values()), why, margin)]


__all__ = ["NAMES", "TIED", "Contrast", "Outcome", "by_victim", "less", "more", "tested"]
