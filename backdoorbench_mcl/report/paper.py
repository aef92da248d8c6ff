"""Our rows beside the numbers that the paper printed (spec 11, 12.2): which cell is which, and what may be said of it.

The printed BA leaves out the target class, so it is compared with our BA_nt. Only what follows the printed protocol is
compared at all, and only five victims or more at budget `full` allow a word about agreement.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from importlib import resources
from statistics import fmean
from typing import Literal

from .. import params
from ..presets.suite import pinned
from ..rows import Row
from . import statistics
from .grid import BEFORE, Block, Cell, cell_of, excluding
from .notes import ERASED, FLOOR, NONE, asr_marks
from .sheets import Sheet
from .statistics import Prediction

DATASETS = {"cifar10": "Cifar-10", "gtsrb": "GTSRB", "imagenet20": "ImageNet"}
MODELS = {"cifar10": "wrn-16-1", "gtsrb": "wrn-16-1", "imagenet20": "resnet18"}
IMAGES = {"cifar10": 9000, "gtsrb": 11969, "imagenet20": 950}  # test images outside the target class (spec 12.1)
ATTACKS = {"badnets": "BadNets", "trojan": "Trojan", "blend": "Blend", "cl": "CL", "sig": "Sig"}
DEFENSES = {
    BEFORE: "Before", "ft": "FT", "nad": "NAD", "ibau": "I-BAU", "nc": "NC", "mcldef": "MCLDef", "mcldef+": "MCLDef+",
    "mcldef+(stage=contrast)": "MCLDef+ (control)", "mcldef(inverter=mesa)": "MESA",
    "mcldef(inverter=true)": "MCLDef(True)",
}  # fmt: skip
CLEAN_RATE = 0.05
TABLES = (1, 2, 4, 5)  # those that print ASR and BA
Verdict = Literal["", "consistent", "differs", "too wide to say"]

_ODDITIES = {
    1: ("As printed, ImageNet / Trojan underlines NC 1.26 as second best although NAD has 1.05.",
        "As printed, MCLDef on Sig has BA 73.81 here and 73.74 in Table 2, at the same ASR."),
    2: ("As printed, MCLDef on Sig has BA 73.74 here and 73.81 in Table 1, at the same ASR.",),
    4: ("As printed, Sig underlines FT's BA 80.09 as second best although I-BAU has 81.27.",
        "The text says that MCLDef has the best BA in three of five attacks; the table shows four."),
}  # fmt: skip
_MARKS = {FLOOR: f"{FLOOR} ASR not above FTR, its floor.", ERASED: f"{ERASED} target class erased."}


@dataclass(frozen=True)
class Printed:
    """One printed cell; None where the paper has a slash."""

    table: int
    dataset: str
    attack: str
    defense: str
    asr: float | None
    ba: float | None


@dataclass(frozen=True)
class Comparison:
    """Our runs of one printed cell. asr, ba_nt: a mean per victim; the words are "" where nothing may be said; marks:
    as in the grids (target class erased, ASR at its floor); predicted: of ASR and BA nt, None where too few victims or
    not all of the runs allow an interval.
    """

    printed: Printed
    dataset: str
    asr: tuple[float, ...]
    ba_nt: tuple[float, ...]
    asr_word: Verdict
    ba_word: Verdict
    why: str  # why there is no word
    marks: str = ""
    predicted: tuple[Prediction | None, Prediction | None] = (None, None)
    ftr: tuple[float, ...] = ()  # as asr: its floor


@cache
def printed() -> tuple[Printed, ...]:
    """Every cell of Tables 1, 2, 4 and 5, in the order of print."""
    text = resources.files(__package__).joinpath("paper_tables.csv").read_text()

    def number(value: str) -> float | None:
        return None if value == "/" else float(value)

    return tuple(
        Printed(int(cell["table"]), cell["dataset"], cell["attack"], cell["defense"], number(cell["asr"]),
                number(cell["ba"]))
        for cell in csv.DictReader(text.splitlines())
    )  # fmt: skip


@cache
def oddities(table: int) -> tuple[str, ...]:
    """What is odd about a printed table, or what the text makes of it (spec 11.1). The values are kept as they are."""
    return (*_ODDITIES.get(table, ()), *(_text_on_table_1() if table == 1 else ()))


def _text_on_table_1() -> tuple[str, ...]:
    cells: dict[tuple[str, str], dict[str, Printed]] = {}
    for cell in printed():
        if cell.table == 1:
            cells.setdefault((cell.dataset, cell.attack), {})[cell.defense] = cell

    def ours(line: tuple[str, str], name: str) -> tuple[float, float]:
        """MCLDef's number and that of its best rival."""
        rivals = [getattr(c, name) for label, c in cells[line].items() if label not in ("Before", "MCLDef")]
        return getattr(cells[line]["MCLDef"], name), (min if name == "asr" else max)(rivals)

    def less(line: tuple[str, str], unit: str = "") -> str:
        own, rival = ours(line, "asr")
        return f"{line[1]} {100 * (rival - own) / rival:.1f} % ({rival - own:.2f}{unit})"

    by_dataset: dict[str, list[tuple[str, str]]] = {}
    for line in cells:
        by_dataset.setdefault(line[0], []).append(line)
    first, *others = by_dataset["Cifar-10"]
    blend = ("GTSRB", "Blend")
    own, rival = ours(blend, "ba")
    drops = {line: (by["Before"].ba or 0) - (by["MCLDef"].ba or 0) for line, by in cells.items()}
    lost = ", ".join(
        f"{', '.join(f'{drops[line]:.2f}' for line in lines)} ({name})" for name, lines in by_dataset.items()
    )
    counts = ", ".join(f"{len(lines)} on {name}" for name, lines in by_dataset.items())
    return (
        f"Reductions of ASR in the text are relative to the best rival, not points: {less(first, ' points')}, "
        f"{', '.join(map(less, others))}, on GTSRB {less(blend)}; so is the gain of BA there, "
        f"{100 * (own - rival) / rival:.1f} % ({own - rival:.2f}).",
        f"The text has MCLDef lose mostly below 2 % of BA: so it does in {sum(d < 2 for d in drops.values())} of "
        f"{len(drops)} lines, by {lost} points.",
        f"The text counts four attacks in one place and five in others: here are {counts}.",
    )


def find(row: Row, table: int) -> Printed | None:
    """The cell of `table` that a row stands for by its labels, whatever its protocol; None where there is none."""
    dataset = DATASETS.get(params.of_label(row.dataset).name)
    wanted = (table, dataset, ATTACKS.get(row.attack), DEFENSES.get(row.defense))
    found = [c for c in printed() if (c.table, c.dataset, c.attack, c.defense) == wanted]
    return found[0] if found else None


def departure(row: Row, table: int, *, any_rate: bool = False) -> str:
    """In what a row differs from the printed protocol, "" if in nothing that is known. any_rate: whatever its share of
    clean data is.
    """
    name = params.of_label(row.dataset).name
    if row.toy or name not in DATASETS:
        return f"{name} is no data set of the paper"
    if row.model != MODELS[name]:
        return f"{row.model} instead of {MODELS[name]}"
    if row.preset == "clean":
        return "preset clean is not the paper's protocol"
    if row.dataset != name:
        return f"{row.dataset} instead of {name}"
    if name != "imagenet20" and "JPEG" in row.data:
        return "JPEG copies of lossless images"
    if "reconstructed" in row.data:
        return "a reconstructed split"
    if excluding(row):
        return "--exclude-poisoned"
    if not any_rate and row.clean_rate is not None and row.clean_rate != CLEAN_RATE:
        return f"clean rate {100 * row.clean_rate:g} % instead of 5 %"
    for section, expected in _augmentation(table, name).items():
        found = row.params.get(section, {}).get("augment", expected)  # an undefended row has no recipe of a repair
        if found != expected:
            return f"{section}.augment={found} instead of {expected}"
    others = unpinned(row, table)
    return f"--set {' '.join(others)}" if others else ""


def unpinned(row: Row, *tables: int) -> list[str]:
    """The `--set` lines of a row that belong to none of these printed tables."""
    belong = {line for table in tables for line in pinned(table)}
    return [line for line in row.overrides if line.replace(" ", "") not in belong]


def _augmentation(table: int, dataset: str) -> dict[str, str]:
    """Augmentation of victims and of repairs: what tells the tables apart (spec 2.4, 4.7)."""
    if dataset == "imagenet20":
        return {"train": "resized-crop+flip", "defend": "resized-crop+flip"}
    return {"train": "crop+flip" if table == 5 else "none", "defend": "none" if table == 4 else "crop+flip"}


def compare(rows: Sequence[Row], table: int) -> list[Comparison]:
    """Every cell of `table` for which there is a finished run, in the order of print. rows: of one protocol.

    Runs that depart from the printed protocol are left out; where all of a cell do, it is listed with the reason and
    without numbers. There is no word on a cell of which a run failed, or which deleted the target class.
    """
    groups: dict[tuple[Printed, str], list[Row]] = {}
    for row in rows:
        cell = find(row, table)
        if cell is not None:
            groups.setdefault((cell, row.dataset), []).append(row)
    order = {cell: i for i, cell in enumerate(printed())}
    return [_compared(cell, dataset, group) for (cell, dataset), group in
            sorted(groups.items(), key=lambda item: (order[item[0][0]], item[0][1]))
            if any(row.state == "ok" for row in group)]  # fmt: skip


def _compared(cell: Printed, dataset: str, rows: Sequence[Row]) -> Comparison:
    departures = [departure(row, cell.table) for row in rows]
    fitting = [row for row, why in zip(rows, departures, strict=True) if not why]
    asr, ba, ftr = (tuple(per_victim(fitting, name)) for name in ("asr", "ba_nt", "ftr"))
    if not asr and not ba:
        return Comparison(cell, dataset, asr, ba, "", "", next(filter(None, departures), "no run has finished"))
    runs = cell_of(fitting)
    marks = asr_marks(runs)
    scaled = sorted({row.budget for row in fitting} - {"full"})
    missing = untestable(runs)
    images = IMAGES[params.of_label(dataset).name]
    found = (
        (None, None) if missing else (_predicted(asr, cell.asr, images, True), _predicted(ba, cell.ba, images, False))
    )
    if scaled or missing:
        why = f"scaled protocol (budget {', '.join(scaled)})" if scaled else missing
        return Comparison(cell, dataset, asr, ba, "", "", why, marks, found, ftr)
    words = (
        _word(cell.asr if asr else None, found[0], statistics.ASR_WIDTH),
        _word(cell.ba if ba else None, found[1], statistics.BA_WIDTH),
    )
    why = f"n = {len(ba)}: fewer than {statistics.MIN_VICTIMS} victims" if len(ba) < statistics.MIN_VICTIMS else ""
    return Comparison(cell, dataset, asr, ba, *words, why, marks, found, ftr)


def untestable(*cells: Cell) -> str:
    """Why nothing may be concluded from some cells, "" if something may: a class deleted, code of a method beside the
    test images, runs missing for any reason, an attack that is flagged, or two results of one seed.
    """
    for cell in cells:
        if cell.erased or cell.guest:
            return cell.incomparable
        if len(cell.ok) < len(cell.runs):
            held_back = f", {cell.held_back} held back by the gate" if cell.held_back else ""
            return f"{len(cell.ok)} of {len(cell.runs)} runs finished{held_back}"
        if any(row.gate == "flagged" for row in cell.ok):
            return "the attack is flagged"
        if len({(row.victim_seed, row.defense_seed) for row in cell.ok}) < len(cell.ok):
            return "two results for one seed"
    return ""


def _predicted(values: Sequence[float], value: float | None, images: int, logit: bool) -> Prediction | None:
    """Spec 12.2: a prediction interval, because the printed number is one draw and not a mean."""
    if value is None or len(values) < statistics.MIN_VICTIMS:
        return None
    return statistics.predicted(values, value, images, logit=logit)


def _word(value: float | None, found: Prediction | None, width: float) -> Verdict:
    if value is None:
        return ""
    if found is None:
        return "too wide to say"
    if not found.inside:
        return "differs"
    return "consistent" if found.half <= width else "too wide to say"


def sheets(rows: Sequence[Row], table: int) -> list[Sheet]:
    """Ours beside the printed numbers of a table: a sheet per protocol, for what two protocols gave is no sample."""
    protocols: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        protocol = (row.dataset, row.model, f"preset {row.preset}", f"budget {row.budget}", row.precision)
        protocols.setdefault(protocol, []).append(row)
    return [_sheet(group, table, ", ".join(protocol)) for protocol, group in protocols.items()]


def _sheet(rows: Sequence[Row], table: int, protocol: str) -> Sheet:
    body, notes_ = [], []
    found = compare(rows, table)
    predicted = ["95 % prediction"] if any(one for c in found for one in c.predicted) else []
    for c in found:
        ours = [fmean(values) if values else None for values in (c.asr, c.ba_nt)]
        asr, ba = (_beside(own, value) for own, value in zip(ours, (c.printed.asr, c.printed.ba), strict=True))
        asr = (asr[0] + c.marks, *asr[1:])
        ftr = f"{fmean(c.ftr):.2f}" if c.ftr else NONE
        n = str(len(c.ba_nt)) if c.ba_nt else NONE
        inside = [() if not predicted else (_interval(one),) for one in c.predicted]
        body.append(
            (c.printed.attack, c.printed.defense, n, ftr, *asr, *inside[0], c.asr_word, *ba, *inside[1], c.ba_word)
        )
        if c.why:
            notes_.append(c.why)
    head = ("attack", "defense", "n", "FTR", "ASR", "printed", "diff.", *predicted, "", "BA nt", "printed", "diff.",
            *predicted, "")  # fmt: skip
    below = [
        "The printed BA leaves out the target class, so it stands beside our BA nt; n: victims. A word is given for a "
        "prediction interval around at least 5 victims at budget full (spec 12.2), at most 2 points of BA and 3 of ASR "
        "to either side.",
        *("95 % prediction: where one more victim would lie; in, out: the printed number." for _ in predicted),
        *(text for mark, text in _MARKS.items() if any(mark == c.marks for c in found)),
        *(f"No word: {why}." for why in dict.fromkeys(notes_)), *oddities(table),
    ]  # fmt: skip
    if not body:
        why = next((why for row in rows if (why := departure(row, table))), "")
        below = ["No finished run stands for a printed cell" + (f": {why}." if why else ".")]
    return Sheet(f"Beside the printed Table {table}: {protocol}", head if body else (), tuple(body), 2, tuple(below))


def _interval(found: Prediction | None) -> str:
    return "" if found is None else f"{found.low:.2f} to {found.high:.2f}, {'in' if found.inside else 'out'}"


def _beside(own: float | None, value: float | None) -> tuple[str, str, str]:
    told = [NONE if x is None else f"{x:.2f}" for x in (own, value)]
    return told[0], told[1], "" if own is None or value is None else f"{own - value:+.2f}"


def per_victim(rows: Sequence[Row], name: str) -> list[float]:
    """Means of a field over the draws on each victim, in the order of victims."""
    values = nested(rows, name)
    return [fmean(values[victim]) for victim in sorted(values)]


def nested(rows: Sequence[Row], name: str) -> Mapping[int, list[float]]:
    """A field of finished rows by victim seed, finite values only."""
    out: dict[int, list[float]] = {}
    for row in sorted(rows, key=lambda row: (row.victim_seed, row.defense_seed or 0)):
        value = getattr(row, name)
        if row.state == "ok" and value is not None:
            out.setdefault(row.victim_seed, []).append(float(value))
    return statistics.finite(out)


def restyle(block: Block) -> Block:
    """A block with the paper's names, and a slash where a method has no meaning for an attack."""
    lines = []
    for line in block.lines:
        cells = tuple(None if cell is None else replace(cell, undefined="/") for cell in line.cells)
        lines.append(replace(line, label=ATTACKS.get(line.label, line.label), cells=cells))
    columns = tuple(replace(c, label=DEFENSES.get(c.label, c.label)) for c in block.columns)
    return replace(block, columns=columns, lines=tuple(lines))


__all__ = [
    "ATTACKS", "CLEAN_RATE", "DATASETS", "DEFENSES", "IMAGES", "MODELS", "TABLES", "Comparison", "Printed",
    "compare", "departure", "find", "nested", "oddities", "per_victim", "printed", "restyle",
    "sheets", "unpinned", "untestable",
]  # fmt: skip
