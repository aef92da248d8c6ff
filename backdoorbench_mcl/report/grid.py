"""Rows -> blocks of attacks x defenses, ranked and marked; the formats only print what is decided here.

Ranking is per attack and leaves out whatever cannot be compared: the undefended victim, flagged attacks, cells in
which a run failed, cells that deleted the target class. Cells whose ASR is not above FTR are all best (spec 12.2),
unless the repair itself raised FTR: then its ASR is ranked like any other. The rule, for ranks, front, tests and
claims, is `beats`.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean, stdev
from typing import Any, Literal, TypeVar

from ..errors import UserError
from ..evaluate import floor_raised, target_class_erased, tied_at_floor
from ..rows import Row
from ..text import one_line

BEFORE = "before"  # the label of rows of undefended victims
STATES = ("failed", "killed", "timeout", "diverged", "n/a")
Rank = Literal["", "best", "second"]
T = TypeVar("T")
K = TypeVar("K", bound=Hashable)


@dataclass(frozen=True)
class Stat:
    """Mean over victims of the mean over defense seeds; sd over victims, over defense seeds if there is one victim."""

    mean: float
    sd: float | None

    def text(self, plus_minus: str = "±") -> str:
        """Two decimals. Example: `1.60±0.21`"""
        return f"{self.mean:.2f}" + (f"{plus_minus}{self.sd:.2f}" if self.sd is not None else "")


@dataclass(frozen=True)
class Cell:
    """One attack x defense: the statistics of its finished runs (`ok`) out of all its runs (`runs`)."""

    runs: tuple[Row, ...]
    asr: Stat | None = None
    ba: Stat | None = None
    floor: bool = False  # ASR not above FTR, pooled, and FTR about the victim's
    erased: bool = False  # at least one run deleted the target class
    asr_rank: Rank = ""
    ba_rank: Rank = ""
    tag: str = ""  # "2/3" where runs failed, "n=5" where a cell has another number of runs than its neighbours
    undefined: str = "n/a"  # what stands where the method has no meaning for the attack

    @property
    def ok(self) -> tuple[Row, ...]:
        """The finished runs."""
        return tuple(row for row in self.runs if row.state == "ok")

    @property
    def failure(self) -> str:
        """What stands in the cell if no run finished, else ""."""
        if self.ok:
            return ""
        if all(row.state == "n/a" and row.gate == "weak" for row in self.runs):
            return "n/a (weak attack)"
        present = {row.state for row in self.runs}
        return self.undefined if present == {"n/a"} else "/".join(state for state in STATES if state in present)

    @property
    def held_back(self) -> int:
        """Runs that the gate kept from being made: they are missing in all columns alike."""
        return sum(row.state == "n/a" and row.gate == "weak" for row in self.runs)

    @property
    def guest(self) -> bool:
        """Whether a method's own code built a model where it was judged, beside the test images, and could look."""
        return any(row.rebuild and not row.rebuild.startswith("backdoorbench_mcl.") for row in self.ok)

    @property
    def incomparable(self) -> str:
        """Why the cell may not be compared with its neighbours, "" if it may.

        Runs that the gate held back do not count against a cell.
        """
        if self.erased:
            return "target class erased"
        if self.guest:
            return "custom inference by code of its own"
        planned = len(self.runs) - self.held_back
        return "" if self.ok and len(self.ok) == planned else f"{len(self.ok)} of {planned} runs finished"

    def mean(self, name: str) -> float | None:
        """Mean of any numeric field of the finished runs, None where no run has it."""
        stat = _stat(self.ok, name)
        return None if stat is None else stat.mean


@dataclass(frozen=True)
class Line:
    """One attack. flagged: a victim behind it does not pass the gate, nothing on this line is ranked."""

    label: str
    flagged: bool
    cells: tuple[Cell | None, ...]  # one per column, None = not run


@dataclass(frozen=True)
class Column:
    """One defense, or the undefended victim; knows: what it was told beyond its clean images."""

    label: str
    knows: tuple[str, ...] = ()
    before: bool = False


@dataclass(frozen=True)
class Block:
    """One table: everything in it shares data set, model, clean rate, preset, budget and precision."""

    dataset: str
    model: str
    clean_rate: float | None
    preset: str
    budget: str
    precision: str
    toy: bool
    columns: tuple[Column, ...]
    lines: tuple[Line, ...]
    recipe: tuple[str, ...] = ()  # in what its recipes differ from those of other blocks of the same protocol

    @property
    def title(self) -> str:
        """Example: `cifar10, wrn-16-1, clean rate 5 %, preset paper, budget mid, bf16`"""
        rate = "" if self.clean_rate is None else f"clean rate {100 * self.clean_rate:g} %"
        parts = (
            self.dataset, self.model, rate, f"preset {self.preset}", f"budget {self.budget}", self.precision,
            *self.recipe,
        )  # fmt: skip
        return ", ".join(part for part in parts if part)

    @property
    def finished(self) -> list[tuple[Line, Column, Cell]]:
        """The cells of which a run has finished, with where they stand."""
        return [
            (line, column, cell)
            for line in self.lines
            for cell, column in zip(line.cells, self.columns, strict=True)
            if cell is not None and cell.ok
        ]

    @property
    def rows(self) -> list[Row]:
        """Every run in the block."""
        return [row for line in self.lines for cell in line.cells if cell for row in cell.runs]


def build(rows: Sequence[Row]) -> list[Block]:
    """Blocks in the order first seen; attacks down, `Before` and then the defenses across, in the order first seen.

    A row given twice counts once. Raises UserError where one label stands for two things in one block.
    """
    rows = [_printable(row) for row in {row.key: row for row in rows}.values()]
    blocks = _grouped(rows, lambda r: (r.dataset, r.model, r.preset, r.budget, r.precision))
    out = []
    for protocol in blocks.values():
        # An undefended victim has neither clean rate nor recipe of a repair: it belongs to the blocks of all of them.
        victims = [row for row in protocol if row.defense == BEFORE]
        repaired = [row for row in protocol if row.defense != BEFORE]
        groups = _grouped(repaired, lambda r: (r.clean_rate, _recipe(r, "train"), _recipe(r, "defend"), excluding(r)))
        for rate, train in _grouped(victims, lambda r: (r.clean_rate, _recipe(r, "train"))):
            if not any(recipe in ("", train) and rate in (None, other) for other, recipe, _, _ in groups):
                groups[rate, train, "", False] = []
        several = _recipes(protocol)
        for (rate, train, _, excluded), group in groups.items():
            fitting = [r for r in victims if r.clean_rate in (None, rate) and _recipe(r, "train") in ("", train)]
            ids = {id(row) for row in (*fitting, *group)}
            block = _block([row for row in protocol if id(row) in ids])  # in the order given
            told = ("without clean copies of poisoned images",) if excluded else ()
            out.append(replace(block, recipe=_told(block.rows, several) + told))
    return out


def excluding(row: Row) -> bool:
    """Whether clean copies of poisoned images were kept out of the clean set (`--exclude-poisoned`)."""
    return bool(row.params.get("exclude_poisoned"))


def _recipe(row: Row, name: str) -> str:
    return _canonical(row.params[name]) if name in row.params else ""


def _recipes(rows: Sequence[Row]) -> list[tuple[str, str]]:
    """Parameters of recipes that are not the same in all rows that have them."""
    out = []
    for section in ("train", "defend"):
        found = [row.params[section] for row in rows if section in row.params]
        names = sorted({name for params in found for name in params})
        out += [(section, n) for n in names if len({_canonical(params.get(n)) for params in found}) > 1]
    return out


def _told(rows: Sequence[Row], names: Sequence[tuple[str, str]]) -> tuple[str, ...]:
    """The values of parameters in a block, which all of its rows share."""
    found = {(s, n): row.params[s].get(n) for row in rows for s, n in names if s in row.params}
    return tuple(one_line(f"{section}.{name}={value}", 60) for (section, name), value in found.items())


def _printable(row: Row) -> Row:
    names = (
        "dataset", "model", "attack", "defense", "preset", "budget", "precision", "isolation", "device", "verdict",
        "surrogate", "controls", "rebuild", "blame",
    )  # fmt: skip
    safe: dict[str, Any] = {name: one_line(getattr(row, name), 200) for name in names}
    return replace(row, reason=one_line(row.reason, 300), **safe)


def _grouped(items: Iterable[T], by: Callable[[T], K]) -> dict[K, list[T]]:
    out: dict[K, list[T]] = {}
    for item in items:
        out.setdefault(by(item), []).append(item)
    return out


def _block(rows: list[Row]) -> Block:
    _refuse_ambiguous(rows)
    attacks = _grouped(rows, lambda r: r.attack)
    defenses = _grouped((row for row in rows if row.defense != BEFORE), lambda r: r.defense)
    columns = [Column(label, _knows(group)) for label, group in defenses.items()]
    befores = {attack: _before(group) for attack, group in attacks.items()}
    if any(befores.values()):
        columns.insert(0, Column("Before", before=True))
    lines = []
    for attack, group in attacks.items():
        cells = []
        for column in columns:
            runs = befores[attack] if column.before else [row for row in group if row.defense == column.label]
            cells.append(cell_of(runs, befores[attack]) if runs else None)
        flagged = any(
            row.gate == "flagged" or (row.gate == "weak" and row.state == "ok" and row.defense != BEFORE)
            for row in group
        )
        lines.append(Line(attack, flagged, _rank(cells, columns, flagged)))
    rates = [row.clean_rate for row in rows if row.defense != BEFORE] or [None]
    one = rows[0]
    block = Block(
        one.dataset, one.model, rates[0], one.preset, one.budget, one.precision,
        any(row.toy for row in rows), tuple(columns), tuple(lines),
    )  # fmt: skip
    return _tagged(block)


def _knows(rows: Iterable[Row]) -> tuple[str, ...]:
    return tuple(sorted({one_line(item) for row in rows for item in row.knows}))


def _before(rows: Sequence[Row]) -> list[Row]:
    """Runs of the undefended victims of one attack; what no row `before` tells is read off the defended rows."""
    found = {row.victim_seed: row for row in rows if row.defense == BEFORE}
    for row in rows:
        if row.victim_seed not in found and (row.ba_before is not None or row.asr_before is not None):
            found[row.victim_seed] = Row(
                key="", dataset=row.dataset, model=row.model, attack=row.attack, defense=BEFORE,
                victim_seed=row.victim_seed, defense_seed=None, clean_rate=None, state="ok", asr=row.asr_before,
                ba=row.ba_before, tca=row.tca_before, ftr=row.ftr_before, gate=row.gate, isolation="",
                device=row.device,
            )  # fmt: skip
    return list(found.values())


def cell_of(runs: Sequence[Row], before: Sequence[Row] = ()) -> Cell:
    """The cell of some runs, without ranks; before: undefended victims, for runs that do not tell of theirs."""
    cell = Cell(tuple(runs))
    known = {row.victim_seed: row.tca for row in before}
    return replace(
        cell,
        asr=_stat(cell.ok, "asr"),
        ba=_stat(cell.ok, "ba"),
        floor=tied_at_floor(*cell.ok) and not floor_raised(cell.mean("ftr"), _before_of(cell.ok, before)),
        erased=any(
            target_class_erased(row.tca, known.get(row.victim_seed) if row.tca_before is None else row.tca_before)
            for row in cell.ok
        ),
    )


def _before_of(runs: Sequence[Row], before: Sequence[Row]) -> float | None:
    """Mean FTR of the undefended victims that `runs` repaired, None unless all of them have it."""
    known = {row.victim_seed: row.ftr for row in before}
    known |= {row.victim_seed: row.ftr_before for row in runs if row.ftr_before is not None}
    values = [known.get(victim) for victim in {row.victim_seed for row in runs}]
    told = [value for value in values if value is not None]
    return fmean(told) if told and len(told) == len(values) else None


def _stat(rows: Iterable[Row], name: str) -> Stat | None:
    by_victim: dict[int, list[float]] = {}
    for row in rows:
        value = getattr(row, name)
        if value is not None and math.isfinite(value):
            by_victim.setdefault(row.victim_seed, []).append(float(value))
    if not by_victim:
        return None
    means = [fmean(values) for values in by_victim.values()]
    spread = means if len(means) > 1 else next(iter(by_victim.values()))
    return Stat(fmean(means), stdev(spread) if len(spread) > 1 else None)


def beats(asr: float, other: float, other_at_floor: bool) -> bool:
    """Whether a cell's ASR is better than another's. None is better than one at its floor, however small: no backdoor
    is left there to be beaten on (spec 1.3). Example: `beats(1.13, 3.4, True)` is False.
    """
    return asr < other and not other_at_floor


def tied(first: Cell, second: Cell) -> bool:
    """Whether the floor forbids to tell two cells apart by ASR: one is at it, and neither beats the other."""
    if first.asr is None or second.asr is None or not (first.floor or second.floor):
        return False
    a, b = first.asr.mean, second.asr.mean
    return not (beats(a, b, second.floor) or beats(b, a, first.floor))


def _rank(cells: Sequence[Cell | None], columns: Sequence[Column], flagged: bool) -> tuple[Cell | None, ...]:
    open_to = [
        cell is not None and not cell.incomparable and not column.before and not flagged
        for cell, column in zip(cells, columns, strict=True)
    ]
    asr = [cell.asr.mean if cell and cell.asr and fit else None for cell, fit in zip(cells, open_to, strict=True)]
    ba = [-cell.ba.mean if cell and cell.ba and fit else None for cell, fit in zip(cells, open_to, strict=True)]
    asr_ranks = ranks(asr, [cell is not None and cell.floor for cell in cells])
    ba_ranks = ranks(ba, [False] * len(cells))
    return tuple(
        None if cell is None else replace(cell, asr_rank=a, ba_rank=b)
        for cell, a, b in zip(cells, asr_ranks, ba_ranks, strict=True)
    )


def ranks(values: Sequence[float | None], floor: Sequence[bool]) -> list[Rank]:
    """Best and second best, smallest first, of the values as printed (two decimals); None takes no part.

    Best is what no other beats, so all that is at its floor. Fewer than two values are not ranked.
    Example: `ranks([3.0, 1.0, 2.0], [False] * 3)` -> `["", "best", "second"]`.
    """
    printed = [None if value is None else round(value, 2) for value in values]
    present = [value for value in printed if value is not None]
    if len(present) < 2:
        return [""] * len(printed)
    least = min(present)
    best = [value is not None and not beats(least, value, low) for value, low in zip(printed, floor, strict=True)]
    rest = [value for value, top in zip(printed, best, strict=True) if value is not None and not top]
    second = min(rest, default=None)
    return [
        "best" if top else "second" if value is not None and value == second else ""
        for value, top in zip(printed, best, strict=True)
    ]


def _tagged(block: Block) -> Block:
    """Mark the cells whose number of runs needs saying: runs failed, or more or fewer than the neighbours have."""
    usual: dict[bool, int] = {}
    for before in (True, False):
        counts = Counter(
            len(cell.runs)
            for line in block.lines
            for cell, column in zip(line.cells, block.columns, strict=True)
            if cell and column.before == before
        )
        usual[before] = max(counts, key=lambda n: (counts[n], n), default=0)

    def tag(cell: Cell | None, column: Column) -> Cell | None:
        if cell is None:
            return None
        done, runs = len(cell.ok), len(cell.runs)
        if done < runs and runs > 1:
            return replace(cell, tag=f"{done}/{runs}")
        return replace(cell, tag=f"n={runs}") if runs != usual[column.before] else cell

    lines = (
        replace(line, cells=tuple(tag(cell, column) for cell, column in zip(line.cells, block.columns, strict=True)))
        for line in block.lines
    )
    return replace(block, lines=tuple(lines))


# ---------------------------------------------------------------- one label, one thing (design 3.2)


def _refuse_ambiguous(rows: Sequence[Row]) -> None:
    """Raise UserError where a label of a block covers two parameter sets, two victims or two results.

    Keys differ by seed, so the parameters are compared: those of the model over the block, of an attack over its
    line, of a defense over its column, all others (recipes) over a cell. The victim's stage key, where the row has
    it, says whether two defenses faced the same victim.
    """
    _same_params(rows, "model", lambda r: ("model", r.model))
    _same_params(rows, "attack", lambda r: ("attack", r.attack))
    _same_params((row for row in rows if row.defense != BEFORE), "defense", lambda r: ("defense", r.defense))
    for section in sorted({name for row in rows for name in row.params} - {"model", "attack", "defense"}):
        _same_params(rows, section, lambda r: (r.attack, r.defense))
    for (attack, seed), group in _grouped(rows, lambda r: (r.attack, r.victim_seed)).items():
        if len({row.stages["model"] for row in group if "model" in row.stages}) > 1:
            raise UserError(
                f"the rows of attack {attack!r}, seed {seed}, come from different victims (recipe, data or a version "
                "differs), so they cannot stand on one line; see the newest with bbmcl report --latest"
            )
    cells = _grouped(rows, lambda r: (r.attack, r.defense, r.victim_seed, r.defense_seed))
    for (attack, defense, victim, draw), group in cells.items():
        if len(group) > 1:
            keys = " and ".join(row.key[:12] for row in group)
            raise UserError(
                f"two results (keys {keys}) for {attack} / {defense}, victim seed {victim}, defense seed {draw}; "
                "one table shows one of them: see the newest with bbmcl report --latest"
            )


def _same_params(rows: Iterable[Row], section: str, by: Callable[[Row], tuple[str, str]]) -> None:
    for (kind, label), group in _grouped((row for row in rows if section in row.params), by).items():
        seen = {_canonical(row.params[section]): row.params[section] for row in group}
        if len(seen) > 1:
            first, second, *_ = seen.values()
            raise UserError(
                f"{kind} {label!r} stands for two settings in one table ({section}: {_difference(first, second)}); "
                "write the parameters into the label, as in mcldef(temperature=0.1), or see the newest with bbmcl "
                "report --latest"
            )


def _canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True, default=str)


def _difference(first: Any, second: Any) -> str:
    if isinstance(first, Mapping) and isinstance(second, Mapping):
        names = sorted(name for name in {*first, *second} if first.get(name) != second.get(name))
        parts = [f"{name}={first.get(name)!r} and {name}={second.get(name)!r}" for name in names[:3]]
        return one_line(", ".join(parts), 200)
    return one_line(f"{first!r} and {second!r}", 200)
