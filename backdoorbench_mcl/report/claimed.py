"""Tables of claims: the verdicts, and behind each of them its differences."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from statistics import fmean

from .. import params
from ..rows import Row
from .claims import CIFAR, OURS, TEXTS, Board, Finding, board_of, fitting, judge
from .contrasts import NAMES, TIED, Outcome
from .grid import Cell, tied
from .inference import p_text
from .notes import NONE, asr_marks
from .paper import nested, per_victim, untestable
from .sheets import Sheet
from .statistics import MIN_VICTIMS, Correlation, holm, rank_correlation


def sheets(stored: Sequence[Row], own: Sequence[Row], only: Sequence[str] = ()) -> list[Sheet]:
    """The claims, or those named in `only`, and a folded table for each whose differences have an interval; of the
    others they stand in a line. own: the rows of a run (not empty), stored: of its folder.
    """
    one = own[0]
    rows, name = fitting(stored, own), params.of_label(one.dataset).name
    judged = judge(rows, name)
    found = [finding for finding in judged if not only or finding.claim in only]
    body = tuple((f.claim, TEXTS[f.claim], f.verdict) for f in found)
    below = [line for f in found if f.verdict != "not run" for line in (f"{f.claim}: {f.evidence}.", _line(f)) if line]
    title = f"Claims: {one.dataset}, preset {one.preset}, budget {one.budget}, {one.precision}"
    verdicts = Sheet(title, ("", "claim", "verdict"), body, 3, tuple(below))
    quality = any(f.claim == "C4" and f.verdict != "not run" for f in found)
    tables = [_table(f) for f in found if _testable(f)]
    return [verdicts, *tables, *([_inverters(board_of(rows, name))] if quality else [])]


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
    below = [f"Means over victims, in points or the percent that a line names, with 95 % t interval; {told}"]
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


# ---------------------------------------------------------------- C4: how good the inverters were


def _inverters(board: Board) -> Sheet:
    """Success and mask of each inverter that mcldef was run with, and what its repair came to."""
    labels = tuple(dict.fromkeys(row.defense for row in board.rows if _alone(row.defense)))
    cells = {attack: {label: cell for label in labels if (cell := board.get(attack, label)).ok} for attack in CIFAR}
    body = [
        (attack, label, str(len(per_victim(cell.ok, "ba_nt"))), *_quality(cell))
        for attack, by in cells.items() for label, cell in by.items()
    ]  # fmt: skip
    head = ("attack", "inverter", "n", "success", "mask L1", "ASR", "BA nt")
    told = "n: victims. success: % of the clean images that the inverted trigger sends to the target."
    ranked = _ranked({attack: list(by.values()) for attack, by in cells.items() if len(by) > 1})
    return Sheet("C4, inverters: how good they were, and the repair", head, tuple(body), 2, (told, *ranked))


def _alone(defense: str) -> bool:
    """Whether it is mcldef as it is, but for its inverter."""
    chosen = params.of_label(defense)
    return chosen.name == OURS and set(chosen.params) <= {"inverter"}


def _quality(cell: Cell) -> tuple[str, ...]:
    means = [cell.mean(name) for name in ("inverter_success", "inverter_l1", "asr", "ba_nt")]
    success, mask, asr, ba = (NONE if mean is None else f"{mean:.2f}" for mean in means)
    return success, mask, asr + asr_marks(cell), ba


def _ranked(cells: Mapping[str, Sequence[Cell]]) -> list[str]:
    """Whether a higher success goes with a lower ASR and a higher BA, on each attack; corrected over all of them."""
    victims = [{row.victim_seed for row in cell.ok} for by in cells.values() for cell in by]
    if not victims:
        return ["No rank correlation: one inverter on each attack."]
    if max(map(len, victims)) < MIN_VICTIMS:
        return [f"No rank correlation: fewer than {MIN_VICTIMS} victims."]
    places = [(attack, by, name) for attack, by in cells.items() for name in ("asr", "ba_nt")]
    whys = [untestable(*by) or (TIED if name == "asr" and _any_tied(by) else "") for _, by, name in places]
    found = [None if why else _correlated(by, name) for (_, by, name), why in zip(places, whys, strict=True)]
    corrected = holm([None if one is None else one.p for one in found])
    told: dict[str, list[str]] = {}
    for (attack, _, name), why, one, p in zip(places, whys, found, corrected, strict=True):
        test = "cannot fire" if p is None else f"p {p_text(p)}"
        number = why or ("does not vary" if one is None else f"{one.rho:+.2f} ({test})")
        told.setdefault(attack, []).append(f"{NAMES[name]} {number}")
    lines = "; ".join(f"{attack}: {', '.join(numbers)}" for attack, numbers in told.items())
    rare = "cannot fire: of so few inverters on so few victims no order is rare enough to be significant."
    return [
        *([rare] if "cannot fire" in lines else []),
        f"Rank correlation with success, within victims, p by permutation with Holm's correction: {lines}.",
    ]


def _any_tied(cells: Sequence[Cell]) -> bool:
    return any(tied(*pair) for pair in itertools.combinations(cells, 2))


def _correlated(cells: Sequence[Cell], name: str) -> Correlation | None:
    by: dict[int, list[tuple[float, float]]] = {}
    for cell in cells:
        success, values = nested(cell.ok, "inverter_success"), nested(cell.ok, name)
        for victim in success.keys() & values.keys():
            by.setdefault(victim, []).append((fmean(success[victim]), fmean(values[victim])))
    return rank_correlation([by[victim] for victim in sorted(by)])


__all__ = ["sheets"]
