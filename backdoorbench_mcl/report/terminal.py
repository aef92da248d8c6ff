"""The grid for terminals: two number columns under each defense, wrapped into several blocks where it is too wide."""

from __future__ import annotations

import io
import re
import shutil
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

from rich.cells import cell_len
from rich.console import Console
from rich.text import Text

from . import notes
from .grid import Block, Cell, Column, Rank, Stat

GAP = "  "
LABEL = 18  # a heading longer than this is broken at its parentheses and commas
_STYLES: dict[Rank, str] = {"best": "bold", "second": "underline", "": ""}
_SIGNS: dict[Rank, str] = {"best": "*", "second": "+", "": ""}


def as_table(blocks: Sequence[Block], detail: bool, color: bool, width: int | None) -> str:
    """Text of at most `width` columns (default: the terminal's, 80 when piped), unless one group alone is wider.

    color: bold and underlined by ANSI codes; without it the ranks are shown by `*` and `+`.
    """
    width = width or shutil.get_terminal_size((80, 24)).columns
    out: list[Text] = []
    banner = notes.banner(blocks)
    if banner:
        out += [*_wrapped(banner, width, "bold yellow"), Text()]
    for block in blocks:
        out += [*_wrapped(block.title, width, "bold"), Text()]
        out += _grid(block, color, width)
        ranking = "Bold: best, underlined: second best" if color else "* best, + second best"
        for line in notes.legend(block, ranking):
            out += _wrapped(line, width, "dim")
        for line in notes.failures(block):
            out += _wrapped(line, width, "red")
        out.append(Text())
        rows = notes.details(block) if detail else []
        if rows:
            out += _details(rows, notes.details_head(block), notes.details_legend(block), width)
    return _printed(out, color)


def _printed(lines: Sequence[Text], color: bool) -> str:
    console = Console(
        file=io.StringIO(), force_terminal=color, color_system="standard" if color else None, no_color=False,
        legacy_windows=False, width=10_000,
    )  # fmt: skip
    with console.capture() as capture:
        for line in lines:
            console.print(line, soft_wrap=True)
    return "\n".join(line.rstrip() for line in capture.get().splitlines()).rstrip("\n")


def _wrapped(text: str, width: int, style: str) -> list[Text]:
    return [Text(line, style) for line in textwrap.wrap(text, width, subsequent_indent="  ")]


# ---------------------------------------------------------------- grid


@dataclass(frozen=True)
class _Value:
    """A number, right-aligned, and its marks, left-aligned behind it."""

    number: str
    marks: str = ""
    style: str = ""

    def write(self, line: Text, number: int, marks: int) -> None:
        line.append(" " * (number - len(self.number)))
        line.append(self.number, self.style)
        line.append(self.marks.ljust(marks))


@dataclass(frozen=True)
class _Group:
    """One defense laid out: heading lines, per attack (ASR, BA, tag) or a text across, and the widths of the parts."""

    heading: list[str]
    values: list[tuple[_Value, _Value, str] | str]
    parts: tuple[int, int, int, int, int]  # ASR number, its marks, BA number, its marks, tag
    width: int

    def write(self, line: Text, index: int) -> None:
        value = self.values[index]
        if isinstance(value, str):
            line.append(value.center(self.width))
            return
        a, am, b, bm, tag = self.parts
        before = len(line)
        value[0].write(line, a, am)
        line.append(" ")
        value[1].write(line, b, bm)
        if tag:
            line.append(" " + value[2].ljust(tag))
        line.append(" " * (before + self.width - len(line)))


def _grid(block: Block, color: bool, width: int) -> list[Text]:
    longest = max(cell_len(notes.attack(line)) for line in block.lines)
    side = max(len("attack"), min(longest, max(LABEL, width // 4)))
    labels = [_broken(notes.attack(line), side) for line in block.lines]
    side = max(len("attack"), *(cell_len(part) for label in labels for part in label))
    groups = [_group(column, [line.cells[i] for line in block.lines], color) for i, column in enumerate(block.columns)]
    out = []
    for part in _pages(groups, width - side):
        out += [*_page(part, labels, side), Text()]
    return out


def _pages(groups: Sequence[_Group], width: int) -> list[list[_Group]]:
    pages: list[list[_Group]] = []
    left = 0
    for group in groups:
        needed = group.width + len(GAP)
        if not pages or needed > left:
            pages.append([])
            left = width
        pages[-1].append(group)
        left -= needed
    return pages


def _page(groups: Sequence[_Group], labels: Sequence[Sequence[str]], side: int) -> list[Text]:
    height = max(len(group.heading) for group in groups)
    head = []
    for i in range(height):
        line = Text(" " * side)
        for group in groups:
            j = i - (height - len(group.heading))
            line.append(GAP)
            line.append(_centered(group.heading[j] if j >= 0 else "", group.width), "bold")
        head.append(line)
    rule, names = Text(" " * side), Text("attack".ljust(side))
    for group in groups:
        a, am, b, _, _ = group.parts
        rule.append(GAP + "─" * group.width)
        names.append(GAP + f"{'ASR':>{a}}{'':{am}} {'BA':>{b}}".ljust(group.width))
    out = [*head, rule, names]
    for i, label in enumerate(labels):
        line = Text(_left(label[0], side))
        for group in groups:
            line.append(GAP)
            group.write(line, i)
        out += [line, *(Text(rest) for rest in label[1:])]
    return out


def _group(column: Column, cells: Sequence[Cell | None], color: bool) -> _Group:
    values = [_cell(cell, color) for cell in cells]
    triples = [value for value in values if not isinstance(value, str)]
    asr, ba, tags = ([value[0] for value in triples], [value[1] for value in triples], [value[2] for value in triples])
    a, b = (max([3, *(len(value.number) for value in metric)]) for metric in (asr, ba))
    am, bm = (max([0, *(len(value.marks) for value in metric)]) for metric in (asr, ba))
    tag = max([0, *map(len, tags)])
    texts = [len(value) for value in values if isinstance(value, str)]
    width = max([a + am + 1 + b + bm + (tag + 1 if tag else 0), *texts])
    label = notes.heading(column)
    width = max(width, min(LABEL, max(cell_len(part) for part in _tokens(label))))
    heading = _broken(label, width)
    return _Group(heading, values, (a, am, b, bm, tag), width)


def _cell(cell: Cell | None, color: bool) -> tuple[_Value, _Value, str] | str:
    if cell is None:
        return ""
    if cell.failure:
        return " ".join(filter(None, (cell.failure, cell.tag)))
    asr = _value(cell.asr, cell.asr_rank, notes.asr_marks(cell), color)
    return asr, _value(cell.ba, cell.ba_rank, "", color), cell.tag


def _value(stat: Stat | None, rank: Rank, marks: str, color: bool) -> _Value:
    if stat is None:
        return _Value(notes.NONE)
    return _Value(stat.text(), marks if color else _SIGNS[rank] + marks, _STYLES[rank])


# ---------------------------------------------------------------- details and labels


def _details(rows: Sequence[Sequence[str]], titles: Sequence[str], legend: str, width: int) -> list[Text]:
    marks = (notes.FLOOR, notes.ERASED)
    if any(row[2].endswith(marks) for row in rows):  # keep the decimals of ASR in line
        rows = [[*row[:2], row[2] if row[2].endswith(marks) else row[2] + " ", *row[3:]] for row in rows]
    table = [titles, *rows]
    names, numbers = (
        [max(cell_len(row[i]) for row in table) for i in part] for part in ((0, 1), range(2, len(table[0])))
    )
    room = width - sum(numbers) - len(numbers) - len(GAP)
    first = min(names[0], max(8, room - min(names[1], LABEL)))
    second = min(names[1], max(8, room - first))
    out = [Text(notes.DETAILS_TITLE, "bold")]
    head = Text(_left("attack", first) + GAP + _left("defense", second))
    for name, size in zip(titles[2:], numbers, strict=True):
        head.append(" " + name.rjust(size))
    out.append(head)
    shown = ""
    for row in rows:
        attack = [""] if row[0] == shown else _broken(row[0], first)
        shown = row[0]
        defense = _broken(row[1], second)
        for i in range(max(len(attack), len(defense))):
            left, right = (part[i] if i < len(part) else "" for part in (attack, defense))
            line = Text(_left(left, first) + GAP + _left(right, second))
            if i == 0:
                for number, size in zip(row[2:], numbers, strict=True):
                    line.append(" " + number.rjust(size))
            out.append(line)
    return [*out, *_wrapped(legend, width, "dim"), Text()]


def _tokens(label: str) -> list[str]:
    return re.findall(r"[^(,:/]+[(,:/]*|[(,:/]+", label) or [""]


def _broken(label: str, width: int) -> list[str]:
    """`label` in lines of at most `width` columns, broken behind `(`, `,`, `:` or `/` where that is possible."""
    lines = [""]
    for token in _tokens(label):
        if cell_len(lines[-1] + token) <= width:
            lines[-1] += token
            continue
        lines.append("")
        for character in token:
            if cell_len(lines[-1] + character) > width:
                lines.append("")
            lines[-1] += character
    return [line for line in lines if line] or [""]


def _left(text: str, width: int) -> str:
    return text + " " * max(0, width - cell_len(text))


def _centered(text: str, width: int) -> str:
    space = max(0, width - cell_len(text))
    return " " * (space // 2) + text + " " * (space - space // 2)
