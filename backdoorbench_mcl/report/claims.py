"""The paper's claims C1-C9 (spec 11.2) and one of ours, C10, each with a test fixed beforehand.

A claim is a set of paired differences, signed so that positive means "as claimed" and corrected together by Holm:
reproduced where all are significantly positive, not reproduced where one is significantly negative, else inconclusive.
Fewer than five victims, another budget than `full` or a departure from the protocol give no verdict at all; the
numbers are shown all the same.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Literal

from .. import params
from ..evaluate import floor_raised, target_class_erased, tied_at_floor
from ..rows import Row
from . import paper, statistics
from .inference import p_text, shared
from .sheets import Sheet
from .statistics import Difference

Verdict = Literal["reproduced", "not reproduced", "inconclusive", "no verdict", "not run"]
POISONED_LABEL = ("badnets", "trojan", "blend")
CIFAR = (*POISONED_LABEL, "cl", "sig")
RIVALS = ("ft", "nad", "ibau", "nc")
OURS = "mcldef"
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
    """evidence: what the verdict rests on, or what is missing; details: every difference, positive as claimed."""

    claim: str
    verdict: Verdict
    evidence: str
    details: tuple[str, ...] = ()


@dataclass(frozen=True)
class Contrast:
    """One difference that a claim is made of. values: one a victim, positive as claimed; None where `why` says so."""

    name: str
    values: tuple[float, ...] | None
    why: str = ""


class Board:
    """Finished rows of one data set on the paper's network, by what they are of; `used`: what a claim looked at."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self.rows = [row for row in rows if row.state == "ok" and (row.toy or row.model == _network(row))]
        self.used: list[Row] = []

    def look(self, wanted: Callable[[Row], bool]) -> list[Row]:
        """The rows that fit, noted as used."""
        found = [row for row in self.rows if wanted(row)]
        self.used += found
        return found

    def get(
        self, attack: str, defense: str, *, rate: float = paper.CLEAN_RATE, train: bool | None = False,
        defend: bool = True,
    ) -> list[Row]:  # fmt: skip
        """The runs of one cell. train, defend: whether victim and repair are augmented, train None for any."""
        return self.look(
            lambda row: row.attack == attack and row.defense == defense and row.clean_rate == rate
            and train in (None, _augmented(row, "train", train)) and defend == _augmented(row, "defend", defend)
        )  # fmt: skip


def _network(row: Row) -> str | None:
    return paper.MODELS.get(params.selection(row.dataset).name)


def _augmented(row: Row, recipe: str, unknown: bool | None) -> bool | None:
    found = row.params.get(recipe, {}).get("augment")
    return unknown if found is None else bool(found != "none")


def judge(rows: Sequence[Row]) -> list[Finding]:
    """A finding for each claim; rows: of any data sets and targets.

    Rows of several presets, budgets or precisions give no verdict: they are no sample of one protocol.
    Example: `judge(stored_rows(runs, lambda row: row.preset == "paper"))`
    """
    by_name: dict[str, list[Row]] = {}
    for row in rows:
        by_name.setdefault(params.selection(row.dataset).name, []).append(row)
    return [_finding(claim, by_name) for claim in TEXTS]


def _finding(claim: str, by_name: Mapping[str, Sequence[Row]]) -> Finding:
    if claim == "C3":
        contrasts, rows = [], []
        for name in ("gtsrb", "imagenet20"):
            board = Board(by_name.get(name, ()))
            contrasts += _c3(board, name)
            rows += board.used
        return _verdict(claim, contrasts, rows, 6 * (len(RIVALS) + 1))
    # the toy stands in for CIFAR-10 where nothing else was run: its findings are shown without a verdict
    rows = list(by_name.get("cifar10") or [row for some in by_name.values() for row in some if row.toy])
    board = Board(rows)
    contrasts, expected = _CLAIMS[claim](board)
    return _verdict(claim, contrasts, board.used, expected)


def _verdict(claim: str, contrasts: Sequence[Contrast], rows: Sequence[Row], expected: int) -> Finding:
    if not contrasts:
        return Finding(claim, "not run", "nothing that this claim needs is stored")
    tested = [None if c.values is None else statistics.of_differences(c.values) for c in contrasts]
    corrected = statistics.holm([None if d is None else d.p for d in tested])
    found = [None if d is None else replace(d, p_holm=p) for d, p in zip(tested, corrected, strict=True)]
    details = tuple(_told(c, d) for c, d in zip(contrasts, found, strict=True))
    evidence = _evidence(found, details)
    missing = expected - len(contrasts)
    if missing > 0:
        evidence = f"{missing} of {expected} comparisons have not been run; {evidence}"
    reason = _no_verdict(rows, found)
    if reason:
        return Finding(claim, "no verdict", f"{reason}; {evidence}", details)
    if any(d is not None and d.significant and d.mean < 0 for d in found):
        return Finding(claim, "not reproduced", evidence, details)
    if missing <= 0 and all(d is not None and d.significant for d in found):
        return Finding(claim, "reproduced", evidence, details)
    return Finding(claim, "inconclusive", evidence, details)


def _evidence(found: Sequence[Difference | None], details: Sequence[str]) -> str:
    """How many differences are as claimed, and those that are not."""
    good = [d for d in found if d is not None and d.mean > 0]
    significant = sum(d.significant for d in good)
    others = [text for d, text in zip(found, details, strict=True) if d is None or d.mean <= 0]
    text = f"{len(good)} of {len(found)} as claimed"
    if any(d is not None and d.p is not None for d in found):
        text += f", {significant} of them significantly"
    return text + (f"; not: {'; '.join(others)}" if others else "")


def _no_verdict(rows: Sequence[Row], found: Sequence[Difference | None]) -> str:
    if any(row.toy for row in rows):
        return "toy data set"
    if len({(row.preset, row.budget, row.precision) for row in rows}) > 1:
        return "rows of several protocols"
    budgets = sorted({row.budget for row in rows} - {"full"})
    if budgets:
        return f"scaled protocol (budget {', '.join(budgets)})"
    if any(row.preset == "clean" for row in rows):
        return "preset clean is not the paper's protocol"
    overridden = sorted({line for row in rows for line in paper.unpinned(row, *paper.TABLES)})
    if overridden:
        return f"departs from the protocol: --set {' '.join(overridden)}"
    least = min((d.victims for d in found if d is not None), default=0)
    if least < statistics.MIN_VICTIMS:
        return f"n = {least}: fewer than {statistics.MIN_VICTIMS} victims"
    return ""


def _told(contrast: Contrast, found: Difference | None) -> str:
    if found is None:
        return f"{contrast.name}: {contrast.why}"
    p = p_text(found.p_holm)
    return f"{contrast.name}: {found.mean:+.2f}" + (f" (p {p})" if p else "")


# ---------------------------------------------------------------- contrasts


def _less(first: Sequence[Row], second: Sequence[Row], name: str, label: str) -> list[Contrast]:
    """first has less of a field than second, paired by victim; nothing where no victim is shared."""
    a, b = shared(first, second, name)
    if not a:
        return []
    if any(target_class_erased(row.tca, row.tca_before) for row in (*first, *second)):
        return [Contrast(label, None, "target class erased")]
    if name == "asr" and _at_floor(first) and _at_floor(second):
        return [Contrast(label, None, "tied at the floor")]
    return [Contrast(label, tuple(fmean(b[victim]) - fmean(a[victim]) for victim in a))]


def _at_floor(rows: Sequence[Row]) -> bool:
    return tied_at_floor(*rows) and not any(floor_raised(row.ftr, row.ftr_before) for row in rows)


def _more(first: Sequence[Row], second: Sequence[Row], name: str, label: str) -> list[Contrast]:
    return _less(second, first, name, label)


def _by_victim(rows: Sequence[Row], label: str, value: Callable[[Row], float | None]) -> list[Contrast]:
    """A value of each row, averaged per victim."""
    groups: dict[int, list[float]] = {}
    for row in rows:
        found = value(row)
        if found is not None:
            groups.setdefault(row.victim_seed, []).append(found)
    return [Contrast(label, tuple(fmean(group) for group in groups.values()))] if groups else []


def _c1(board: Board) -> tuple[list[Contrast], int]:
    contrasts = [
        contrast for attack in CIFAR for rival in RIVALS
        for contrast in _less(board.get(attack, OURS), board.get(attack, rival), "asr", f"{attack}, ASR below {rival}")
    ]  # fmt: skip
    return contrasts, len(CIFAR) * len(RIVALS)


def _c2(board: Board) -> tuple[list[Contrast], int]:
    attacks = (*POISONED_LABEL, "cl")
    contrasts = [
        contrast for attack in attacks for rival in RIVALS for name in ("ba_nt", "ba")
        for contrast in _more(
            board.get(attack, OURS), board.get(attack, rival), name, f"{attack}, {_NAMES[name]} above {rival}"
        )
    ]  # fmt: skip
    return contrasts, 2 * len(attacks) * len(RIVALS)


_NAMES = {"ba": "BA", "ba_nt": "BA nt", "asr": "ASR"}


def _c3(board: Board, dataset: str) -> list[Contrast]:
    """Best BA: above every rival. ASR among the best two: above the second best of the rivals in no test."""
    train = None if dataset == "imagenet20" else False
    out = []
    for attack in POISONED_LABEL:
        ours = board.get(attack, OURS, train=train)
        rivals = {rival: board.get(attack, rival, train=train) for rival in RIVALS}
        for rival, rows in rivals.items():
            out += _more(ours, rows, "ba_nt", f"{dataset} {attack}, BA nt above {rival}")
        means = {r: fmean(paper.per_victim(rows, "asr")) for r, rows in rivals.items() if paper.per_victim(rows, "asr")}
        ranked = sorted(means, key=lambda rival: means[rival])
        if len(ranked) > 1:
            out += _less(ours, rivals[ranked[1]], "asr", f"{dataset} {attack}, ASR below the second rival, {ranked[1]}")
    return out


def _c4(board: Board) -> tuple[list[Contrast], int]:
    order = (OURS, "mcldef(inverter=mesa)", "mcldef(inverter=true)")
    attacks = ("badnets", "trojan", "cl")  # where MESA, which is told the patch, has a meaning
    contrasts = []
    for attack in attacks:
        for worse, better in itertools.pairwise(order):
            first, second = board.get(attack, better), board.get(attack, worse)
            contrasts += _less(first, second, "asr", f"{attack}, ASR of {better} below {worse}")
            contrasts += _more(first, second, "ba_nt", f"{attack}, BA nt of {better} above {worse}")
    return contrasts, 4 * len(attacks)


def _c5(board: Board) -> tuple[list[Contrast], int]:
    """A difference in differences: what the lack of augmentation adds to ASR, less what it adds to MCLDef's."""
    contrasts = []
    for attack in CIFAR:
        for rival in ("ft", "nad"):
            four = [paper.nested(board.get(attack, d, defend=a), "asr") for d in (rival, OURS)
                    for a in (False, True)]  # fmt: skip
            victims = [v for v in four[0] if all(v in cell for cell in four)]
            if victims:
                a, b, c, d = ([fmean(cell[v]) for v in victims] for cell in four)
                values = tuple((w - x) - (y - z) for w, x, y, z in zip(a, b, c, d, strict=True))
                contrasts.append(Contrast(f"{attack}, ASR of {rival} rises without augmentation, by more", values))
    return contrasts, 2 * len(CIFAR)


def _c6(board: Board) -> tuple[list[Contrast], int]:
    def get(attack: str, defense: str) -> list[Row]:
        return board.get(attack, defense, train=True)

    contrasts = []
    for attack in POISONED_LABEL:
        for rival in RIVALS:
            ours, other = get(attack, OURS), get(attack, rival)
            contrasts += _less(ours, other, "asr", f"{attack}, ASR below {rival}")
            contrasts += _more(ours, other, "ba_nt", f"{attack}, BA nt above {rival}")
    for rival in ("ft", "nad", "ibau"):
        ours, other = get("sig", OURS), get("sig", rival)
        contrasts += _more(ours, other, "asr", f"sig, ASR above {rival}")
        contrasts += _less(ours, other, "ba_nt", f"sig, BA nt below {rival}")
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
            contrasts += _by_victim(rows, f"{attack}, {defense} cuts ASR by more than half, % over", cut)
            contrasts += _by_victim(rows, f"{attack}, {defense} costs BA", cost)
        for defense in ("ft", "nad", "ibau"):
            rows = board.get(attack, defense, rate=0.01)
            contrasts += _by_victim(rows, f"{attack}, {defense} cuts ASR by less than half, % under", missed)
    return contrasts, 7 * len(CIFAR)


def _c8(board: Board) -> tuple[list[Contrast], int]:
    def gain(row: Row) -> float | None:
        return None if row.ba is None or row.ba_before is None else row.ba - row.ba_before

    contrasts = []
    for attack in CIFAR:
        much = board.get(attack, OURS, rate=0.2)
        contrasts += _less(much, board.get(attack, OURS), "ba", f"{attack}, BA of mcldef at 20 % below 5 %")
        contrasts += _more(board.get(attack, "mcldef+", rate=0.2), much, "ba", f"{attack}, BA of mcldef+ above mcldef")
        for defense in ("ft", "nad", "nc"):
            rows = board.get(attack, defense, rate=0.2)
            contrasts += _by_victim(rows, f"{attack}, BA of {defense} above the undefended", gain)
    return contrasts, 5 * len(CIFAR)


def _temperature(row: Row) -> float | None:
    """Of `mcldef(temperature=...)` and nothing else."""
    if not row.defense.startswith(f"{OURS}(temperature="):
        return None
    selected = params.selection(row.defense)
    return float(selected.params["temperature"]) if set(selected.params) == {"temperature"} else None


def _c9(board: Board) -> tuple[list[Contrast], int]:
    """Between the ends of the swept range."""
    found: dict[tuple[str, float], list[Row]] = {}
    for row in board.look(lambda row: row.clean_rate == paper.CLEAN_RATE and _temperature(row) is not None):
        found.setdefault((row.attack, float(_temperature(row) or 0)), []).append(row)
    contrasts = []
    for attack in CIFAR:
        taus = sorted(tau for a, tau in found if a == attack)
        if len(taus) > 1:
            low, high = found[attack, taus[0]], found[attack, taus[-1]]
            for name in ("asr", "ba"):
                label = f"{attack}, {_NAMES[name]} at {taus[0]:g} below {taus[-1]:g}"
                contrasts += _less(low, high, name, label)
    return contrasts, 2 * len(CIFAR)


def _c10(board: Board) -> tuple[list[Contrast], int]:
    """How far TCA stays inside the margin, on the side where it is nearer to leaving it."""
    contrasts = []
    for attack in CIFAR:
        values = _by_victim(
            board.get(attack, OURS), "",
            lambda row: None if row.tca is None or row.tca_before is None else row.tca - row.tca_before,
        )  # fmt: skip
        for found in values:
            changes = found.values or ()
            nearer = -1 if fmean(changes) < 0 else 1
            inside = tuple(statistics.BA_MARGIN - nearer * change for change in changes)
            contrasts.append(Contrast(f"{attack}, TCA {fmean(changes):+.2f}, left of the margin", inside))
    return contrasts, len(CIFAR)


_CLAIMS: Mapping[str, Callable[[Board], tuple[list[Contrast], int]]] = {
    "C1": _c1, "C2": _c2, "C4": _c4, "C5": _c5, "C6": _c6, "C7": _c7, "C8": _c8, "C9": _c9, "C10": _c10,
}  # fmt: skip


def sheet(rows: Sequence[Row], only: Sequence[str] = ()) -> Sheet:
    """The claims, or those named in `only`, as a table."""
    found = [finding for finding in judge(rows) if not only or finding.claim in only]
    body = tuple((f.claim, TEXTS[f.claim], f.verdict) for f in found)
    below = tuple(f"{f.claim}: {f.evidence}." for f in found if f.verdict != "not run")
    return Sheet("Claims", ("", "claim", "verdict"), body, 3, below)


__all__ = ["TEXTS", "Board", "Finding", "judge", "sheet"]
