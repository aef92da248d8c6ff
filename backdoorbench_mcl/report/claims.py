"""The paper's claims C1-C9 (spec 11.2) and one of ours, C10, each with a test fixed beforehand.

A claim is a set of paired differences, signed so that positive means "as claimed" and corrected together by Holm:
reproduced where all are significantly positive, not reproduced where one is significantly negative, else inconclusive.
A cell of which a run is missing, whose attack is flagged or which deleted the target class proves nothing, nor does
less ASR than a cell at its floor has. Fewer than five victims, another budget than `full` or a departure from the
protocol give no verdict at all; the numbers are shown all the same.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Literal

from .. import params
from ..rows import Row
from . import paper, statistics
from .contrasts import NAMES, TIED, Contrast, Outcome, by_victim, less, more, tested
from .grid import Cell, cell_of, excluding, tied
from .inference import shared

Verdict = Literal["reproduced", "not reproduced", "inconclusive", "no verdict", "not run"]
POISONED_LABEL = ("badnets", "trojan", "blend")
CIFAR = (*POISONED_LABEL, "cl", "sig")
RIVALS = ("ft", "nad", "ibau", "nc")
OURS = "mcldef"
CONTROL = "mcldef+(stage=contrast)"
ORDER = (OURS, f"{OURS}(inverter=mesa)", f"{OURS}(inverter=true)")  # of inverters, by their quality (C4)
PATCHED = ("badnets", "trojan", "cl")
HALVED = 0.5  # what "cuts ASR much" means in C7: to less than half of its value before

TEXTS: Mapping[str, str] = {
    "C1": "MCLDef has the lowest ASR on all five CIFAR-10 attacks",
    "C2": "MCLDef has the best BA on CIFAR-10, but for SIG",
    "C3": "GTSRB, ImageNet: best BA, ASR among the best two",
    "C4": "the better the inverter, the better the repair: NC < MESA < true trigger",
    "C5": "FT and NAD need augmentation, MCLDef does not",
    "C6": "victims trained with augmentation: MCLDef best on poisoned labels, behind FT, NAD, I-BAU on SIG",
    "C7": "with 1 % clean data only NC and MCLDef cut ASR to less than half, at a cost in BA",
    "C8": "at 20 % MCLDef's BA falls, FT, NAD and NC pass the undefended BA, MCLDef+ repairs it",
    "C9": "a smaller temperature lowers ASR and BA",
    "C10": "repair spares the target class: TCA within 2 points (a claim of this project, not of the paper)",
}


@dataclass(frozen=True)
class Finding:
    """evidence: what the verdict rests on, or what is missing; outcomes: every difference."""

    claim: str
    verdict: Verdict
    evidence: str
    outcomes: tuple[Outcome, ...] = ()


class Board:
    """Rows of one data set on the paper's network, by what they are of; `used`: what a claim looked at."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self.rows = [row for row in rows if row.toy or row.model == _network(row)]
        self.used: list[Row] = []

    def look(self, wanted: Callable[[Row], bool]) -> list[Row]:
        """The rows that fit, noted as used."""
        found = [row for row in self.rows if wanted(row)]
        self.used += found
        return found

    def get(
        self, attack: str, defense: str, *, rate: float = paper.CLEAN_RATE, train: bool | None = False,
        defend: bool = True,
    ) -> Cell:  # fmt: skip
        """One cell. train, defend: whether victim and repair are augmented, train None for any."""
        return cell_of(self.look(
            lambda row: row.attack == attack and row.defense == defense and row.clean_rate == rate
            and train in (None, _augmented(row, "train", train)) and defend == _augmented(row, "defend", defend)
        ))  # fmt: skip


def _network(row: Row) -> str | None:
    return paper.MODELS.get(params.of_label(row.dataset).name)


def _augmented(row: Row, recipe: str, unknown: bool | None) -> bool | None:
    found = row.params.get(recipe, {}).get("augment")
    return unknown if found is None else bool(found != "none")


def fitting(rows: Sequence[Row], own: Sequence[Row]) -> list[Row]:
    """Those of `rows` that follow the protocol of a run, whose rows are `own`: a claim may rest on several targets.

    The same data set (or another one as published), preset, budget, precision and clean set, and no `--set` line that
    the run did not have. What the run has itself comes from it alone.
    """
    protocol = _protocol(own[0])
    lines = {line for row in own for line in _unpinned(row)}
    labels = {params.of_label(row.dataset).name: row.dataset for row in own}
    mine = {_place(row) for row in own}

    def fits(row: Row) -> bool:
        name = params.of_label(row.dataset).name
        same = _protocol(row) == protocol and row.dataset == labels.get(name, name)
        return same and (not row.toy or row.model == own[0].model) and lines >= set(_unpinned(row))

    return [*own, *(row for row in rows if _place(row) not in mine and fits(row))]


def _protocol(row: Row) -> tuple[object, ...]:
    return row.preset, row.budget, row.precision, excluding(row)


def _place(row: Row) -> tuple[object, ...]:
    """Which run of which cell a row is, whatever its protocol."""
    augmented = _augmented(row, "train", None), _augmented(row, "defend", None)
    return (row.dataset, row.model, row.attack, row.defense, row.clean_rate, *augmented, row.victim_seed,
            row.defense_seed)  # fmt: skip


def _table(row: Row) -> int:
    """The printed table whose recipes a row has."""
    return 5 if _augmented(row, "train", False) else 1 if _augmented(row, "defend", True) else 4


def _unpinned(row: Row) -> list[str]:
    return paper.unpinned(row, _table(row))


def judge(rows: Sequence[Row], dataset: str = "cifar10") -> list[Finding]:
    """A finding for each claim; rows: of one protocol (see `fitting`), of any data sets and targets.

    dataset: the bare name of the one that was run; claims of another are answered "not run".
    Example: `judge(fitting(stored_rows(runs), rows))`
    """
    by_name: dict[str, list[Row]] = {}
    for row in rows:
        by_name.setdefault(params.of_label(row.dataset).name, []).append(row)
    return [_finding(claim, by_name, dataset) for claim in TEXTS]


def board_of(rows: Sequence[Row], dataset: str) -> Board:
    """What claims about CIFAR-10 look at; a toy stands in for it: its findings are shown without a verdict."""
    named = [row for row in rows if params.of_label(row.dataset).name == dataset]
    return Board([row for row in named if row.toy or dataset == "cifar10"])


def _finding(claim: str, by_name: Mapping[str, Sequence[Row]], dataset: str) -> Finding:
    if claim == "C3":
        contrasts, rows = [], []
        for name in ("gtsrb", "imagenet20"):
            board = Board(by_name.get(name, ()))
            contrasts += _c3(board, name)
            rows += board.used
        return _verdict(claim, contrasts, rows, 6 * (len(RIVALS) + 1))
    board = board_of(by_name.get(dataset, ()), dataset)
    contrasts, expected = _CLAIMS[claim](board)
    return _verdict(claim, contrasts, board.used, expected)


def _verdict(claim: str, contrasts: Sequence[Contrast], rows: Sequence[Row], expected: int) -> Finding:
    if not contrasts:
        return Finding(claim, "not run", "nothing that this claim needs is stored")
    found = tested(contrasts)
    evidence = _evidence(found)
    missing = expected - len(contrasts)
    if missing > 0:
        evidence = f"{missing} of {expected} comparisons have not been run; {evidence}"
    reason = _no_verdict(rows, found)
    if reason:
        return Finding(claim, "no verdict", f"{reason}; {evidence}", found)
    if any(outcome.refuted for outcome in found):
        return Finding(claim, "not reproduced", evidence, found)
    if missing <= 0 and all(outcome.holds for outcome in found):
        return Finding(claim, "reproduced", evidence, found)
    return Finding(claim, "inconclusive", evidence, found)


def _evidence(found: Sequence[Outcome]) -> str:
    """How many differences are as claimed, and those that are not."""
    good = [one for one in found if one.claimed]
    others = [one.text for one in found if one not in good]
    text = f"{len(good)} of {len(found)} as claimed"
    if any(one.p is not None for one in found):
        text += f", {sum(one.holds for one in good)} of them significantly"
    return text + (f"; not: {'; '.join(_gathered(others))}" if others else "")


def _gathered(texts: Sequence[str]) -> list[str]:
    """What is said of several comparisons of one attack, once. Example: `sig, 4 comparisons: target class erased`"""
    same: dict[tuple[str, str], list[str]] = {}
    for text in texts:
        label, _, told = text.partition(": ")
        same.setdefault((label.partition(",")[0], told), []).append(text)
    return [
        found[0] if len(found) == 1 else f"{attack}, {len(found)} comparisons: {told}"
        for (attack, told), found in same.items()
    ]


def _no_verdict(rows: Sequence[Row], found: Sequence[Outcome]) -> str:
    if any(row.toy for row in rows):
        return "toy data set"
    if len({_protocol(row) for row in rows}) > 1:
        return "rows of several protocols"
    budgets = sorted({row.budget for row in rows} - {"full"})
    if budgets:
        return f"scaled protocol (budget {', '.join(budgets)})"
    departures = sorted({why for row in rows if (why := paper.departure(row, _table(row), any_rate=True))})
    if departures:
        return f"departs from the protocol: {'; '.join(departures)}"
    victims = [one.found.victims for one in found if one.found is not None]
    if not victims:
        return "nothing could be compared"
    if min(victims) < statistics.MIN_VICTIMS:
        return f"n = {min(victims)}: fewer than {statistics.MIN_VICTIMS} victims"
    return ""


# ---------------------------------------------------------------- contrasts


def _c1(board: Board) -> tuple[list[Contrast], int]:
    contrasts = [
        contrast for attack in CIFAR for rival in RIVALS
        for contrast in less(board.get(attack, OURS), board.get(attack, rival), "asr", f"{attack}, ASR below {rival}")
    ]  # fmt: skip
    return contrasts, len(CIFAR) * len(RIVALS)


def _c2(board: Board) -> tuple[list[Contrast], int]:
    attacks = (*POISONED_LABEL, "cl")
    contrasts = [
        contrast for attack in attacks for rival in RIVALS for name in ("ba_nt", "ba")
        for contrast in more(
            board.get(attack, OURS), board.get(attack, rival), name, f"{attack}, {NAMES[name]} above {rival}"
        )
    ]  # fmt: skip
    return contrasts, 2 * len(attacks) * len(RIVALS)


def _c3(board: Board, dataset: str) -> list[Contrast]:
    """Best BA: above every rival. ASR among the best two: above the second best of the rivals in no test."""
    train = None if dataset == "imagenet20" else False
    out = []
    for attack in POISONED_LABEL:
        ours = board.get(attack, OURS, train=train)
        rivals = {rival: board.get(attack, rival, train=train) for rival in RIVALS}
        for rival, cell in rivals.items():
            out += more(ours, cell, "ba_nt", f"{dataset} {attack}, BA nt above {rival}")
        means = {rival: mean for rival, cell in rivals.items() if (mean := cell.mean("asr")) is not None}
        ranked = sorted(means, key=lambda rival: means[rival])
        if len(ranked) > 1:
            out += less(ours, rivals[ranked[1]], "asr", f"{dataset} {attack}, ASR below the second rival, {ranked[1]}")
    return out


def _c4(board: Board) -> tuple[list[Contrast], int]:
    """Step by step from NC's inversion to the true trigger; over MESA where that, told the patch, has a meaning."""
    contrasts, expected = [], 0
    for attack in CIFAR:
        steps = list(itertools.pairwise(ORDER if attack in PATCHED else (ORDER[0], ORDER[-1])))
        expected += 2 * len(steps)
        for worse, better in steps:
            first, second = board.get(attack, better), board.get(attack, worse)
            contrasts += less(first, second, "asr", f"{attack}, ASR of {better} below {worse}")
            contrasts += more(first, second, "ba_nt", f"{attack}, BA nt of {better} above {worse}")
    return contrasts, expected


def _c5(board: Board) -> tuple[list[Contrast], int]:
    """A difference in differences: what the lack of augmentation adds to ASR, less what it adds to MCLDef's."""
    contrasts = []
    for attack in CIFAR:
        for rival in ("ft", "nad"):
            four = [board.get(attack, d, defend=a) for d in (rival, OURS) for a in (False, True)]
            if not all(cell.runs for cell in four):
                continue
            label = f"{attack}, ASR of {rival} rises without augmentation, by more"
            a, b, c, d = shared("asr", *(cell.ok for cell in four))
            why = paper.untestable(*four) or ("" if a else "no seed in all four") or (TIED if tied(*four[:2]) else "")
            values = tuple((fmean(a[v]) - fmean(b[v])) - (fmean(c[v]) - fmean(d[v])) for v in a)
            contrasts.append(Contrast(label, None if why else values, why))
    return contrasts, 2 * len(CIFAR)


def _c6(board: Board) -> tuple[list[Contrast], int]:
    def get(attack: str, defense: str) -> Cell:
        return board.get(attack, defense, train=True)

    contrasts = []
    for attack in POISONED_LABEL:
        for rival in RIVALS:
            ours, other = get(attack, OURS), get(attack, rival)
            contrasts += less(ours, other, "asr", f"{attack}, ASR below {rival}")
            contrasts += more(ours, other, "ba_nt", f"{attack}, BA nt above {rival}")
    for rival in ("ft", "nad", "ibau"):
        ours, other = get("sig", OURS), get("sig", rival)
        contrasts += more(ours, other, "asr", f"sig, ASR above {rival}")
        contrasts += less(ours, other, "ba_nt", f"sig, BA nt below {rival}")
    return contrasts, 2 * (len(POISONED_LABEL) * len(RIVALS) + 3)


def _c7(board: Board) -> tuple[list[Contrast], int]:
    def cut(row: Row) -> float | None:
        if row.asr is None or not row.asr_before:
            return None
        return 100 * ((row.asr_before - row.asr) / row.asr_before - HALVED)

    def missed(row: Row) -> float | None:
        value = cut(row)
        return None if value is None else -value

    def cost(row: Row) -> float | None:
        return None if row.ba is None or row.ba_before is None else row.ba_before - row.ba

    contrasts = []
    for attack in CIFAR:
        for defense in ("nc", OURS):
            rows = board.get(attack, defense, rate=0.01)
            contrasts += by_victim(rows, f"{attack}, {defense} cuts ASR by more than half, % over", cut)
            contrasts += by_victim(rows, f"{attack}, {defense} costs BA", cost)
        for defense in ("ft", "nad", "ibau"):
            rows = board.get(attack, defense, rate=0.01)
            contrasts += by_victim(rows, f"{attack}, {defense} cuts ASR by less than half, % under", missed)
    return contrasts, 7 * len(CIFAR)


def _c8(board: Board) -> tuple[list[Contrast], int]:
    def gain(row: Row) -> float | None:
        return None if row.ba is None or row.ba_before is None else row.ba - row.ba_before

    contrasts = []
    for attack in CIFAR:
        much = board.get(attack, OURS, rate=0.2)
        contrasts += less(much, board.get(attack, OURS), "ba", f"{attack}, BA of mcldef at 20 % below 5 %")
        third = board.get(attack, "mcldef+", rate=0.2)
        contrasts += more(third, much, "ba", f"{attack}, BA of mcldef+ above mcldef")
        # the same steps on the loss of mcldef: what the third stage's loss adds, not its length (spec 7)
        contrasts += more(third, board.get(attack, CONTROL, rate=0.2), "ba", f"{attack}, BA of mcldef+ above {CONTROL}")
        for defense in ("ft", "nad", "nc"):
            rows = board.get(attack, defense, rate=0.2)
            contrasts += by_victim(rows, f"{attack}, BA of {defense} above the undefended", gain)
    return contrasts, 6 * len(CIFAR)


def _temperature(row: Row) -> float | None:
    """Of `mcldef(temperature=...)` and nothing else, None for what is no temperature."""
    chosen = params.of_label(row.defense)
    found = chosen.params.get("temperature")
    if chosen.name != OURS or len(chosen.params) != 1 or isinstance(found, bool):
        return None
    return found if isinstance(found, int | float) and found > 0 else None


def _c9(board: Board) -> tuple[list[Contrast], int]:
    """Between the ends of the swept range."""
    found: dict[tuple[str, float], list[Row]] = {}
    for row in board.look(lambda row: row.clean_rate == paper.CLEAN_RATE and _temperature(row) is not None):
        found.setdefault((row.attack, _temperature(row) or 0), []).append(row)
    contrasts = []
    for attack in CIFAR:
        taus = sorted(tau for a, tau in found if a == attack)
        if len(taus) > 1:
            low, high = cell_of(found[attack, taus[0]]), cell_of(found[attack, taus[-1]])
            for name in ("asr", "ba"):
                label = f"{attack}, {NAMES[name]} at {taus[0]:g} below {taus[-1]:g}"
                contrasts += less(low, high, name, label)
    return contrasts, 2 * len(CIFAR)


def _c10(board: Board) -> tuple[list[Contrast], int]:
    """The change of TCA stays within the margin on both sides; a class that is gone has left it."""

    def change(row: Row) -> float | None:
        return None if row.tca is None or row.tca_before is None else row.tca - row.tca_before

    contrasts = [
        contrast for attack in CIFAR
        for contrast in by_victim(
            board.get(attack, OURS), f"{attack}, change of TCA", change, statistics.BA_MARGIN, erased=True)
    ]  # fmt: skip
    return contrasts, len(CIFAR)


_CLAIMS: Mapping[str, Callable[[Board], tuple[list[Contrast], int]]] = {
    "C1": _c1, "C2": _c2, "C4": _c4, "C5": _c5, "C6": _c6, "C7": _c7, "C8": _c8, "C9": _c9, "C10": _c10,
}  # fmt: skip


__all__ = ["CIFAR", "OURS", "TEXTS", "Board", "Finding", "board_of", "fitting", "judge"]
