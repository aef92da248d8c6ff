"""What stands around a grid: marks, banner, legend, failures and the table of details. Plain text, no markup."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from .. import remarks
from ..evaluate import FTR_MARGIN, GATE_OK
from ..rows import Row
from ..text import one_line
from .grid import Block, Cell, Column, Line

FLOOR, ERASED, FLAGGED = "≈", "×", "°"
KNOWS = {
    "target": ("†", "was told the target label"),
    "location": ("‡", "was told the place and size of the trigger"),
    "trigger": ("§", "was given the true trigger"),
    "suspect": ("¶", "was given the suspect training set"),
}
NONE = "–"
MAX_FAILURES = 8
_UNUSUAL = ("JPEG", "reconstructed", " of ")  # in `Row.data`: copies, splits and parts that move the numbers (spec 2)
DETAILS = ("ASR", "FTR", "BA nt", "TCA", "RA", "DER", "s", "s+")
_FIELDS = ("asr", "ftr", "ba_nt", "tca", "ra", "der", "seconds", "seconds_shared")
RETUNED = ("ASR re", "FTR re")  # after a few steps on triggered images, where somebody asked for that
_RETUNED_FIELDS = ("retuned_asr", "retuned_ftr")
_RETUNED_CLEAN_FIELDS = ("retuned_clean_asr", "retuned_clean_ftr")  # of the control: a clean model, taught the same


def heading(column: Column) -> str:
    """Column heading: the label and a mark for each thing that the defense was told. Example: `mcldef†`"""
    return column.label + "".join(KNOWS.get(item, ("¤", ""))[0] for item in column.knows)


def attack(line: Line) -> str:
    """Row heading: the label, marked if the attack was flagged by the gate."""
    return line.label + (FLAGGED if line.flagged else "")


def asr_marks(cell: Cell) -> str:
    """The mark behind an ASR: target class erased (which explains any floor), else at the floor, else ""."""
    return ERASED if cell.erased else FLOOR if cell.floor else ""


def banner(blocks: Iterable[Block]) -> str:
    """The line above toy tables, "" where no block is a toy."""
    toys = ", ".join(dict.fromkeys(block.dataset for block in blocks if block.toy))
    return f"TOY DATA SET ({toys}): made up, small and easy. No claim may rest on these numbers." if toys else ""


def legend(block: Block, ranking: str) -> list[str]:
    """Lines below a grid; `ranking` says how this format shows best and second best."""
    cells = [cell for line in block.lines for cell in line.cells if cell]
    defended = [cell for cell in _defended(block) if cell.ok]
    out = []
    if any(cell.asr_rank or cell.ba_rank for cell in cells):
        out.append(f"{ranking} per attack, among the ranked cells. ASR: lower is better; BA (all classes): higher.")
    if any(asr_marks(cell) == FLOOR for cell in cells):
        means = "no backdoor left, so no ASR beats it"
        out.append(f"{FLOOR} ASR not above FTR, its floor (not raised by over {FTR_MARGIN:g} point): {means}.")
    floors = [value for cell in defended if (value := cell.mean("ftr")) is not None]
    if floors:
        out.append(f"FTR, the floor of ASR, after defense: {_range(floors, 2)} %.")
    if any(cell.erased for cell in cells):
        out.append(f"{ERASED} target class erased (TCA below a tenth of its value before): not ranked.")
    if any(line.flagged for line in block.lines):
        out.append(f"{FLAGGED} ASR below {GATE_OK:g} % before defense: weak attack, not ranked.")
    told = dict.fromkeys(item for column in block.columns for item in column.knows)
    for item in told:
        mark, meaning = KNOWS.get(item, ("¤", f"was told: {item}"))
        out.append(f"{mark} {meaning}.")
    images = sorted({row.data for row in block.rows if any(word in row.data for word in _UNUSUAL)})
    out += [f"Images: {one_line(text, 200)}." for text in images]
    out += _attackers(block) + _surrogates(block) + _controls(block) + _verdicts(block) + _rebuilt(block)
    out += _origins(block)
    out.append(_runs(block))
    if any("/" in cell.tag for cell in cells):
        out.append("k/n: k of n runs finished, the numbers are theirs; not ranked where the defense itself failed.")
    if block.budget != "full":
        out.append(f"Scaled protocol (budget {block.budget}): not comparable with printed numbers.")
    out.append(_machine(block))
    return out


def _attackers(block: Block) -> list[str]:
    """Who controls more than the data, which the attackers of the paper do not."""
    named = [line.label for line in block.lines if any(row.controls == "training" for row in _rows(line))]
    return [f"The attacker trained the model, not only its data: {', '.join(named)}."] if named else []


def _rebuilt(block: Block) -> list[str]:
    """Columns whose models are more than the victim's network with other weights."""
    cells = [(column.label, line.cells[i]) for i, column in enumerate(block.columns) for line in block.lines]
    found = {(label, row.rebuild) for label, cell in cells if cell for row in cell.runs if row.rebuild}
    told = ", ".join(f"{label} ({one_line(function)})" for label, function in sorted(found))
    out = [f"Custom inference, more than other weights: {told}."] if told else []
    if any(cell.guest for _, cell in cells if cell):
        out.append("Not ranked where that is the method's own code: it runs where the test images are.")
    return out


def _origins(block: Block) -> list[str]:
    """Methods that other packages brought, and the versions that made the rows: they may be gone by now."""
    found: dict[tuple[str, str], set[str]] = {}
    for row in block.rows:
        for origin in remarks.origins(row).items():
            found.setdefault(origin, set()).update(row.versions.get(origin[1], "").split(", "))
    told = []
    for (label, package), made in found.items():
        named = " ".join(filter(None, [package, ", ".join(sorted(made - {""}))]))
        told.append(one_line(f"{label} ({named})"))
    return [f"Methods of other packages: {'; '.join(told)}."] if told else []


def _surrogates(block: Block) -> list[str]:
    """What the attacks' own models were, as the harness measured them."""
    told = [
        f"{line.label} {surrogate}"
        for line in block.lines
        for surrogate in dict.fromkeys(row.surrogate for cell in line.cells if cell for row in cell.runs)
        if surrogate
    ]
    return [f"Surrogates of the attacks: {'; '.join(told)}."] if told else []


def _controls(block: Block) -> list[str]:
    """What is left of an attack without what is special about it, as far as its control's victims are in the block."""
    out = []
    for line in block.lines:
        mine = [row for row in _rows(line) if "control" in row.params]
        if not mine:
            continue
        wanted, train = mine[0].params["control"], mine[0].params.get("train")
        seeds = {row.victim_seed for row in mine}
        found = [
            row for other in block.lines for row in _rows(other)
            if row.params.get("attack") == wanted["attack"] and row.params.get("train") == train
            and row.victim_seed in seeds
        ]  # fmt: skip
        asr = [row.asr_before for row in found if row.asr_before is not None]
        ftr = [row.ftr_before for row in found if row.ftr_before is not None]
        floor = _range(ftr, 2) if ftr else NONE
        missing = "failed" if found else "not in this table"
        told = f"ASR {_range(asr, 2)} (FTR {floor}) before defense" if asr else missing
        changed = ", ".join(f"{name}={value}" for name, value in wanted["set"].items())
        out.append(f"Control of {line.label} ({one_line(changed, 100)}): {told}.")
    return out


def _rows(line: Line) -> list[Row]:
    return [row for cell in line.cells if cell for row in cell.runs]


def _verdicts(block: Block) -> list[str]:
    """What detectors said, per column that went by one; a model called clean is returned as it is."""
    out = []
    for position, column in enumerate(block.columns):
        told = []
        for line in block.lines:
            cell = line.cells[position]
            said = Counter(row.verdict for row in cell.runs if row.verdict) if cell else Counter()
            told += [f"{line.label} {verdict}{f' ({n} runs)' if n > 1 else ''}" for verdict, n in said.items()]
        if told:
            returned = " Clean: returned as it is." if any("clean" in text.split() for text in told) else ""
            out.append(f"Verdicts behind {column.label}: {'; '.join(told)}.{returned}")
    return out


def _defended(block: Block) -> list[Cell]:
    return [
        cell
        for line in block.lines
        for cell, column in zip(line.cells, block.columns, strict=True)
        if cell and not column.before
    ]


def _runs(block: Block) -> str:
    cells = _defended(block) or [cell for line in block.lines for cell in line.cells if cell]
    victims = {len({row.victim_seed for row in cell.runs}) for cell in cells}
    repeats = {len({row.defense_seed for row in cell.runs}) for cell in cells}
    spread = any(stat and stat.sd is not None for cell in cells for stat in (cell.asr, cell.ba))
    if max(victims) == 1 and max(repeats) == 1:
        return "n = 1: one victim and one defense seed; the spread between seeds is unknown."
    text = f"n = {_range(victims)} victim{'s' * (max(victims) > 1)} x {_range(repeats)} defense seed"
    text += "s" * (max(repeats) > 1)
    if spread:
        text += ": mean ± sd over " + ("victims" if max(victims) > 1 else "defense seeds")
    return text + "."


def _machine(block: Block) -> str:
    runs = [row for cell in _defended(block) for row in cell.runs] or block.rows
    isolation = "/".join(sorted({row.isolation for row in runs} - {""}))
    parts = [f"isolation {isolation}"] if isolation else []
    parts.append(f"device {'/'.join(sorted({row.device for row in runs}))}")
    alone = [row.seconds for row in runs if row.state == "ok" and row.seconds is not None]
    if alone:
        parts.append(f"{_range(alone, 1)} s a cell")
    strays = sum(bool(row.strays) for row in runs)
    if strays:
        parts.append(f"{strays} run{'s' * (strays > 1)} opened files that were not granted (strays in --format json)")
    changed = sum(bool(row.changed) for row in runs)
    if changed:
        parts.append(f"{changed} run{'s' * (changed > 1)} changed what a process shares (changed in --format json)")
    text = "; ".join(parts)
    return text[0].upper() + text[1:] + "."


def _range(values: Iterable[float], digits: int = 0) -> str:
    ordered = sorted(values)
    low, high = f"{ordered[0]:.{digits}f}", f"{ordered[-1]:.{digits}f}"
    return low if low == high else f"{low}-{high}"


def failures(block: Block) -> list[str]:
    """One line for each run that did not finish (weak attacks aside), at most `MAX_FAILURES` and a count."""
    lines = []
    for row in block.rows:
        if row.state == "ok" or (row.state == "n/a" and row.gate == "weak"):
            continue
        text = f"{row.state}: {row.attack} / {row.defense}, victim seed {row.victim_seed}"
        if row.defense_seed is not None:
            text += f", defense seed {row.defense_seed}"
        text = f"{text}: {row.reason}" if row.reason else text
        lines.append(f"{text} ({row.blame})" if row.blame else text)
    more = len(lines) - MAX_FAILURES
    return lines if more <= 0 else [*lines[:MAX_FAILURES], f"and {more} more (--format json has all reasons)"]


def retuned(block: Block) -> bool:
    """Whether a repaired model of the block was taught the trigger again."""
    return any(row.retuned_asr is not None for row in block.rows)


def details_head(block: Block) -> list[str]:
    """Headings of `details`."""
    return ["attack", "defense", *DETAILS, *(RETUNED if retuned(block) else ())]


def details_legend(block: Block) -> str:
    """What the headings mean."""
    if not retuned(block):
        return DETAILS_LEGEND
    counts = _range([row.retuned_images for row in block.rows if row.retuned_images is not None] or [0])
    clean = any(row.retuned_clean_images is not None for row in block.rows)
    control = "; in the line Before: of a clean model after the same steps" if clean else ""
    return (
        f"{DETAILS_LEGEND} ASR re, FTR re: after 10 steps on {counts} triggered images and their clean twins{control}."
    )


def details(block: Block) -> list[list[str]]:
    """Attack, defense and the means named in `details_head` for each cell with a finished run; None is a dash.

    s: seconds of the cell alone; s+: with the stages that it shares with others (inversion).
    """
    out = []
    for line, column, cell in block.finished:
        steps = _RETUNED_CLEAN_FIELDS if column.before else _RETUNED_FIELDS
        names = (*_FIELDS, *(steps if retuned(block) else ()))
        numbers = [_number(cell.mean(name), seconds=name.startswith("seconds")) for name in names]
        numbers[0] += asr_marks(cell)
        out.append([attack(line), heading(column), *numbers])
    return out


def _number(value: float | None, seconds: bool) -> str:
    if value is None:
        return NONE
    return f"{value:.2f}" if not seconds else f"{value:.1f}" if value < 100 else f"{value:.0f}"


DETAILS_TITLE = "Details (means)"
DETAILS_LEGEND = (
    "FTR: clean non-target images called the target. BA nt: BA without the target class. TCA: accuracy on the target "
    "class. RA: triggered images classified as what they show. DER: 50 = nothing changed. s: seconds of the cell "
    "alone; s+: with the stages that it shares."
)
