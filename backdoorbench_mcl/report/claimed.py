"""Tables of claims: the verdicts, and behind each of them its differences."""

from __future__ import annotations

from collections.abc import Sequence

from .. import params
from ..rows import Row
from .claims import TEXTS, Finding, fitting, judge
from .contrasts import Outcome
from .inference import p_text
from .sheets import Sheet


def sheets(stored: Sequence[Row], own: Sequence[Row], only: Sequence[str] = ()) -> list[Sheet]:
    """The claims, or those named in `only`, and a folded table for each whose differences have an interval; of the
    others they stand in a line. own: the rows of a run (not empty), stored: of its folder.
    """
    one = own[0]
    judged = judge(fitting(stored, own), params.of_label(one.dataset).name)
    found = [finding for finding in judged if not only or finding.claim in only]
    body = tuple((f.claim, TEXTS[f.claim], f.verdict) for f in found)
    below = [line for f in found if f.verdict != "not run" for line in (f"{f.claim}: {f.evidence}.", _line(f)) if line]
    title = f"Claims: {one.dataset}, preset {one.preset}, budget {one.budget}, {one.precision}"
    verdicts = Sheet(title, ("", "claim", "verdict"), body, 3, tuple(below))
    return [verdicts, *(_table(f) for f in found if _testable(f))]


def _testable(finding: Finding) -> bool:
    return any(one.shown is not None and one.shown.interval is not None for one in finding.outcomes)


def _line(finding: Finding) -> str:
    """The differences that are as claimed, by attack, where no table has them; the others stand in the evidence."""
    by: dict[str, list[str]] = {}
    for one in finding.outcomes if not _testable(finding) else ():
        if one.claimed:
            attack, _, what = one.contrast.name.partition(", ")
            by.setdefault(attack, []).append(f"{what} {one.number}")
    told = "; ".join(f"{attack}: {', '.join(numbers)}" for attack, numbers in by.items())
    return f"{finding.claim}, as claimed: {told}." if told else ""


def _table(finding: Finding) -> Sheet:
    margin = next((one.contrast.margin for one in finding.outcomes if one.contrast.margin is not None), None)
    told = "positive as claimed; Holm's correction over the lines; on how many victims it is so."
    if margin is not None:
        told = f"p of two one-sided tests that they lie within {margin:g} points; on how many victims they do."
    below = [f"Means over victims, in points, with 95 % t interval; {told}"]
    whys = dict.fromkeys(one.shown.why for one in finding.outcomes if one.shown is not None and one.shown.why)
    below += [f"No test: {why}." for why in whys]
    head = ("", "difference", "95 % interval", "p (Holm)" if margin is None else "p (TOST)", "victims")
    body = tuple(_difference(one) for one in finding.outcomes)
    return Sheet(f"{finding.claim}: {TEXTS[finding.claim]}", head, body, 1, tuple(below), folded=True)


def _difference(one: Outcome) -> tuple[str, ...]:
    found = one.shown
    if found is None:
        return one.contrast.name, one.contrast.why, "", "", ""
    interval = "" if found.interval is None else f"{found.interval[0]:+.2f} to {found.interval[1]:+.2f}"
    return one.contrast.name, f"{found.mean:+.2f}", interval, p_text(one.p), one.victims


__all__ = ["sheets"]
