"""What `scan` and `purify` print: lines and tables for a terminal. Free of torch."""

from __future__ import annotations

from collections.abc import Sequence

from tabulate import tabulate

from ..progress import duration
from ..text import one_line
from .handed import Handed
from .purify import Judgement, Repair
from .scan import KINDS, Found, Scan, kind_of
from .verdict import Standing

NONE = "-"
RANKING = ["defense", "score", "right, %", "trigger works, %", "labels", "time", ""]


def number(value: float | None, digits: int = 1, unit: str = "") -> str:
    """Example: `number(97.31, 1, " %")` is `97.3 %`, `number(None)` is `-`."""
    return NONE if value is None else f"{value:.{digits}f}{unit}"


def label_rows(found: Scan, handed: Handed) -> list[list[str]]:
    """A row per label: its name, then size, success and anomaly index for each kind of trigger, then the mark of what
    stands out.
    """
    by_place = {(one.kind, one.label): one for one in found.labels}
    rows = []
    for label in range(handed.classes):
        row = [one_line(handed.name(label), 24)]
        for kind in KINDS:
            one: Standing | None = by_place.get((kind.name, label))
            row += [NONE] * 3 if one is None else [
                number(one.size, 1 if kind.name == "patch" else 2), number(one.success, 0), number(one.index, 1),
            ]  # fmt: skip
        rows.append([*row, "<--" if label == found.target else ""])
    return rows


def label_head() -> list[str]:
    """Headings of `label_rows`."""
    columns = [f"{kind.name}: {part}" for kind in KINDS for part in (kind.measure.split()[0], "%", "index")]
    return ["label", *columns, ""]


def trigger_line(one: Found, handed: Handed, held: float | None = None) -> str:
    """Example: `label 5: a patch, L1 of the mask 7.1, sends 99.8 % of the images there (97.0 % of those held out)`"""
    kind = kind_of(one.kind)
    article = "an additive trigger" if one.mask is None else "a patch"
    also = "" if held is None else f" ({held:.1f} % of those held out)"
    where = one_line(handed.name(one.label), 40)
    sent = f"sends {number(one.success)} % of the images there{also}"
    return f"label {where}: {article}, {kind.measure} {one.size:.2f}, {sent}"


def scan_lines(found: Scan, handed: Handed, held: Sequence[float | None] = ()) -> list[str]:
    """A scan as it is printed. held: success on held-out images of each of `found.full`."""
    table = tabulate(
        label_rows(found, handed), label_head(), tablefmt="simple", colalign=("left", *["right"] * 6, "left"),
        disable_numparse=True,
    )  # fmt: skip
    after = [*held, *[None] * len(found.full)]
    lines = [*table.splitlines(), ""]
    lines += [f"full search, {trigger_line(one, handed, after[i])}" for i, one in enumerate(found.full)]
    lines += [f"note: {one_line(line)}" for line in found.notes]
    target = "" if found.target is None else f", label {one_line(handed.name(found.target), 40)}"
    spent = f"{found.images} images, {duration(found.seconds)} of computing"
    return [*lines, f"verdict: {found.call}{target}: {found.reason} ({spent})"]


def judgement_rows(one: Judgement, handed: Handed, target: int | None) -> list[list[str]]:
    """What changed: a row per measure, before and after."""
    rows = []
    if one.ba_before is not None:
        rows.append(["clean images called right, %", number(one.ba_before), number(one.ba_after)])
    if one.agreement is not None:
        rows.append(["called as by the original, %", "100.0", number(one.agreement)])
    if one.success_before is not None and target is not None:
        where = one_line(handed.name(target), 30)
        rows.append([f"sent to {where} by the trigger found, %", number(one.success_before), number(one.success_after)])
        rows.append([f"others called {where} without it, %", "", number(one.floor_after)])
    rows += [
        [f"  class {one_line(handed.name(each.label), 30)} ({each.images} images), %", number(each.before),
         number(each.after)] for each in one.classes
    ]  # fmt: skip
    return rows


def repair_lines(one: Repair, handed: Handed) -> list[str]:
    """A repair as it is printed."""
    if one.folder is None:
        return [f"{one.defense}: failed: {one_line(one.reason, 300)}"]
    told = one.judgement
    if not told.images:
        return [f"{one.defense}: repaired in {duration(one.seconds)}; nothing was held out, so nothing was measured"]
    head = [f"{told.images} held-out images", "before", "after"]
    table = tabulate(judgement_rows(told, handed, one.target), head, tablefmt="simple", disable_numparse=True,
                     colalign=("left", "right", "right"))  # fmt: skip
    lines = [f"{one.defense}, {duration(one.seconds)}", *table.splitlines()]
    if told.gone:
        names = ", ".join(handed.name(label) for label in told.gone)
        lines.append(f"warning: hardly said any more: {names}: a trigger may be gone because its label is")
    return lines


def ranking_rows(repairs: Sequence[Repair]) -> list[list[str]]:
    """Several repairs, the best first."""
    rows = []
    for one in repairs:
        told = one.judgement
        right = told.ba_after if told.ba_after is not None else told.agreement
        why = one_line(one.reason, 60) if one.folder is None else "a class is gone" if told.gone else ""
        rows.append([one_line(one.defense, 60), number(told.score), number(right), number(told.success_after),
                     "yes" if one.uses_labels else "no", duration(one.seconds), why])  # fmt: skip
    return rows


def ranking_lines(repairs: Sequence[Repair]) -> list[str]:
    """The same as text."""
    return tabulate(ranking_rows(repairs), RANKING, tablefmt="simple", disable_numparse=True,
                    colalign=("left", "right", "right", "right", "left", "right", "left")).splitlines()  # fmt: skip


__all__ = [
    "RANKING", "judgement_rows", "label_head", "label_rows", "number", "ranking_lines", "ranking_rows",
    "repair_lines", "scan_lines", "trigger_line",
]  # fmt: skip
