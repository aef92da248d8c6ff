"""Figures for people to look at: sweep curves, ASR against BA, cost against quality, t-SNE panels. matplotlib, no GUI.

Every figure is written as PNG and as SVG. Text of others is drawn as it is, never as mathematics.
"""

from __future__ import annotations

import html
import io
import re
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from .. import params
from ..rows import Row
from ..text import one_line
from . import files, grid
from .grid import Block, Cell, Column, Line

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c564b", "#7f7f7f", "#bcbd22", "#1b9e77")
SHAPES = "osD^vPXp*h"
GREY = "#777777"
RING = 170  # area of the mark of a cell at its floor, in square points: larger than the dot of any such cell
METRICS = ("asr", "ba")
Kind = Literal["png", "svg"]
_TAG = re.compile(r"<[^>]*>")  # matplotlib escapes > in values and in texts
_ID = re.compile(r'(\sid="|\bxlink:href="#|\burl\(#)')


def figure(columns: int, rows: int, width: float = 4.0, height: float = 3.2) -> tuple[Figure, list[Axes]]:
    """An empty figure and its panels, row by row."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        made = Figure(figsize=(width * columns, height * rows), layout="constrained")
        axes = made.subplots(rows, columns, squeeze=False)
    return made, [axis for row in axes for axis in row]


def text(given: str, limit: int = 60) -> str:
    """Labels of others: one line, no mathematics."""
    return one_line(given, limit).replace("$", r"\$")


def render(made: Figure, kind: Kind, *, dpi: int = 150, letters: Literal["path", "none"] = "path") -> bytes:
    """The figure as a file; equal figures give equal bytes. letters: SVG text as outlines, or as (escaped) text."""
    from matplotlib import rc_context

    buffer = io.BytesIO()
    with rc_context({"svg.hashsalt": "bbmcl", "svg.fonttype": letters}):
        made.savefig(buffer, format=kind, dpi=dpi, metadata={"Software": None} if kind == "png" else {"Date": None})
    return buffer.getvalue()


def save(made: Figure, stem: Path) -> list[Path]:
    """Write `stem`.png and `stem`.svg."""
    return [files.write(stem.with_name(f"{stem.name}.{kind}"), render(made, kind)) for kind in get_args(Kind)]


def svg(made: Figure, name: str, says: str) -> str:
    """The figure as an SVG element, to be put into a page. name: starts its ids, of its own among the page's figures;
    says: what it shows, for those who do not see it.
    """
    found = render(made, "svg", letters="none").decode()
    renamed = _TAG.sub(lambda tag: _ID.sub(rf"\g<1>{name}-", tag[0]), found[found.index("<svg") :])
    return renamed.replace("<svg", f'<svg role="img" aria-label="{html.escape(says)}"', 1)


def finish(made: Figure, title: str, entries: Mapping[str, Artist]) -> None:
    """The title above, in as many lines as it needs, and an entry for each label right of the panels, for which the
    figure is widened. Labels are cut as late as here: two that begin alike are two entries.
    """
    labels = [text(label, 40) for label in entries]
    columns = -(-len(labels) // max(1, int(6 * made.get_figheight()) - 2))  # six lines an inch
    made.set_figwidth(made.get_figwidth() + columns * (0.6 + 0.055 * max(map(len, labels), default=0)))
    made.legend(
        list(entries.values()), labels, fontsize=7, frameon=False, loc="outside right center", ncols=max(1, columns)
    )
    lines = textwrap.wrap(title, int(12 * made.get_figwidth()))  # letters an inch
    made.suptitle("\n".join(lines), fontsize=10, x=0.01, horizontalalignment="left")


def _look(i: int) -> tuple[str, str]:
    """Colour and shape of the i-th defense; a hundred pairs before one comes again."""
    return COLOURS[i % len(COLOURS)], SHAPES[(i + i // len(COLOURS)) % len(SHAPES)]


# ---------------------------------------------------------------- curves


@dataclass(frozen=True)
class Point:
    """A cell on a curve. x: the value that varies."""

    x: float
    cell: Cell


@dataclass(frozen=True)
class Sweep:
    """What varies within a protocol. curves: by attack and defense the points by value; before: by attack the
    undefended victims.
    """

    protocol: str
    name: str
    curves: Mapping[str, Mapping[str, Sequence[Point]]]
    before: Mapping[str, Cell]

    @property
    def cells(self) -> int:
        """How many points there are."""
        return sum(len(points) for by in self.curves.values() for points in by.values())


def sweeps(blocks: Sequence[Block]) -> list[Sweep]:
    """One for each thing that takes several values within a protocol: the clean rate, which tells blocks apart, and
    each numeric parameter in which the labels of a defense differ.

    A curve holds what varies in nothing else: its name tells the other parameters and, if there are several, the rate.
    """
    protocols: dict[str, list[Block]] = {}
    for block in blocks:
        protocols.setdefault(replace(block, clean_rate=None).title, []).append(block)
    return [sweep for title, group in protocols.items() for sweep in _varied(title, group)]


def _varied(protocol: str, blocks: Sequence[Block]) -> list[Sweep]:
    placed: dict[str, list[tuple[str, str, Point]]] = {}  # what varies -> attack, curve, point
    before: dict[str, Cell] = {}
    rates = len({block.clean_rate for block in blocks} - {None}) > 1
    for block in blocks:
        rate = f"clean rate {100 * (block.clean_rate or 0):g} %"
        for line, column, cell in block.finished:
            if column.before:
                before.setdefault(line.label, cell)
                continue
            if block.clean_rate is not None:
                point = Point(100 * block.clean_rate, cell)
                placed.setdefault("clean rate in %", []).append((line.label, column.label, point))
            chosen = params.of_label(column.label)
            for name, value in chosen.params.items():
                if isinstance(value, int | float) and not isinstance(value, bool):
                    curve = ", ".join((_without(chosen, name), *([rate] if rates else [])))
                    where = f"{name} of {chosen.name}{chosen.suffix}"
                    placed.setdefault(where, []).append((line.label, curve, Point(float(value), cell)))
    found = [Sweep(protocol, name, _curves(points), before) for name, points in placed.items()]
    return [sweep for sweep in found if sweep.curves]


def _curves(placed: Sequence[tuple[str, str, Point]]) -> dict[str, dict[str, list[Point]]]:
    """By attack and curve; nothing where no curve has two values."""
    out: dict[str, dict[str, list[Point]]] = {}
    for attack, curve, point in sorted(placed, key=lambda item: item[2].x):  # stable: attacks keep their order
        out.setdefault(attack, {}).setdefault(curve, []).append(point)
    varies = any(len({p.x for p in points}) > 1 for by in out.values() for points in by.values())
    order = dict.fromkeys((attack, curve) for attack, curve, _ in placed)
    return {a: {c: out[a][c] for b, c in order if b == a} for a, _ in order} if varies else {}


def _without(chosen: params.Selection, name: str) -> str:
    """The label less one parameter. Example: `mcldef(temperature=0.1, layers=3)` is `mcldef(layers=3)`."""
    others = ", ".join(f"{other}={params.typed(value)}" for other, value in chosen.params.items() if other != name)
    return f"{chosen.name}{chosen.suffix}" + (f"({others})" if others else "")


def curves(rows: Sequence[Row], title: str) -> Figure | None:
    """The first thing that varies among rows, drawn; None where nothing does. Raises UserError as `grid.build` does."""
    found = sweeps(grid.build(rows))
    return drawn(found[0], title) if found else None


def drawn(sweep: Sweep, title: str) -> Figure:
    """ASR above, BA below, a column an attack, a line a defense; dotted: FTR, the floor; x: target class erased."""
    from matplotlib.lines import Line2D

    made, axes = figure(len(sweep.curves), 2)
    lines = list(dict.fromkeys(curve for by in sweep.curves.values() for curve in by))
    entries: dict[str, Artist] = {}
    for column, (attack, by) in enumerate(sweep.curves.items()):
        for row, metric in enumerate(METRICS):
            axis = axes[row * len(sweep.curves) + column]
            for curve, points in by.items():
                _curve(axis, points, metric, lines.index(curve))
            axis.set_xlabel(text(sweep.name))
            axis.set_ylabel(f"{metric.upper()} in %")
            axis.set_title(text(attack) if row == 0 else "")
            level = getattr(sweep.before.get(attack), metric, None)
            if level is not None:
                axis.axhline(level.mean, color="black", linewidth=0.8, linestyle="--")
                entries["undefended"] = Line2D([], [], color="black", linewidth=0.8, linestyle="--")
            if not axis.has_data():  # a clean model has no ASR
                axis.set_axis_off()
                axis.text(0.5, 0.5, f"no {metric.upper()}", color=GREY, ha="center", transform=axis.transAxes)
    cells = [point.cell for by in sweep.curves.values() for points in by.values() for point in points]
    named: dict[str, Artist] = {}
    for i, curve in enumerate(lines):
        named[curve] = Line2D([], [], color=_look(i)[0], marker=_look(i)[1], markersize=4, linewidth=1.2)
    if any(cell.mean("ftr") is not None for cell in cells):
        entries["FTR, the floor of ASR"] = Line2D([], [], color=GREY, linewidth=0.8, linestyle=":")
    if any(cell.erased for cell in cells):
        entries["target class erased"] = Line2D([], [], color="black", marker="x", markersize=8, linestyle="")
    finish(made, text(title, 120), {**named, **entries})
    return made


def _curve(axis: Axes, points: Sequence[Point], metric: str, i: int) -> None:
    """metric: a field of a cell, "asr" or "ba"."""
    kept = [(p.x, stat, p.cell) for p in points if (stat := getattr(p.cell, metric)) is not None]
    if not kept:
        return
    x, y = [p[0] for p in kept], [p[1].mean for p in kept]
    (colour, shape), spread = _look(i), [p[1].sd or 0.0 for p in kept]
    axis.errorbar(x, y, yerr=spread if any(spread) else None, color=colour, marker=shape, markersize=4, linewidth=1.2,
                  capsize=2)  # fmt: skip
    for at, stat, cell in kept:
        if cell.erased:
            axis.plot([at], [stat.mean], color="black", marker="x", markersize=8, linestyle="")
    floor = [value for p in kept if (value := p[2].mean("ftr")) is not None]
    if metric == "asr" and len(floor) == len(kept):
        axis.plot(x, floor, color=colour, linewidth=0.8, linestyle=":")


# ---------------------------------------------------------------- scatters


def front(points: Sequence[tuple[float, float, bool]]) -> list[int]:
    """Indices of points (ASR, BA, whether ASR is at its floor) that none on the front beats in both, by ASR.

    With a floor, to beat is not transitive: what only points off the front beat stays on it.
    Example: `front([(1, 8, False), (2, 7, False)])` is [0].
    """

    def beaten(i: int, others: Iterable[int]) -> bool:
        asr, ba, floor = points[i]
        return any(
            b >= ba and not grid.beats(asr, a, low) and (b > ba or grid.beats(a, asr, floor))
            for a, b, low in (points[other] for other in others)
        )

    every = range(len(points))
    kept = [i for i in every if not beaten(i, every)]
    for i in sorted(every, key=lambda i: (-points[i][1], points[i][0])):
        if i not in kept and not beaten(i, kept):
            kept.append(i)
    return sorted(kept, key=lambda i: points[i])


@dataclass(frozen=True)
class Dot:
    """A cell on a scatter. x: its ASR, or its seconds; hollow: why it may not be compared with others, "" if it may."""

    label: str
    x: float
    asr: float
    ba: float
    floor: bool
    hollow: str


def dots(line: Line, columns: Sequence[Column], cost: bool = False) -> list[Dot]:
    """The cells of an attack that have ASR and BA and, with `cost`, seconds."""
    out = []
    for cell, column in zip(line.cells, columns, strict=True):
        if cell is None or column.before or cell.asr is None or cell.ba is None:
            continue
        x = cell.mean("seconds_shared") if cost else cell.asr.mean
        if x is not None:
            short = cell.incomparable if cell.guest else "runs missing" if cell.incomparable else ""
            why = "weak attack" if line.flagged else short
            why = "target class erased" if cell.erased else why
            floor = cell.floor and not cell.erased  # which explains any floor
            out.append(Dot(column.label, x, cell.asr.mean, cell.ba.mean, floor, why))
    return out


def best(given: Sequence[Dot]) -> list[Dot]:
    """The Pareto front of what may be compared, by ASR. As in the grid, no ASR beats one at its floor: of cells that
    tie so the one with the best BA is left.
    """
    fit = [dot for dot in given if not dot.hollow]
    return [fit[i] for i in front([(dot.asr, dot.ba, dot.floor) for dot in fit])]


def scatter(rows: Sequence[Row], title: str, cost: bool = False) -> Figure | None:
    """`trade_off` of rows. Raises UserError as `grid.build` does."""
    return trade_off(grid.build(rows), title, cost)


def trade_off(blocks: Sequence[Block], title: str, cost: bool = False) -> Figure | None:
    """A panel an attack: ASR against BA with the Pareto front, or, with `cost`, seconds against BA (size: ASR).

    Cells that are not ranked are hollow and off the front, those at the floor of their ASR have a ring. None where no
    cell has what is to be drawn.
    """
    from matplotlib.lines import Line2D

    panels = [(block, line, found) for block in blocks for line in block.lines
              if (found := dots(line, block.columns, cost))]  # fmt: skip
    if not panels:
        return None
    labels = list(dict.fromkeys(column.label for block in blocks for column in block.columns if not column.before))
    across = min(3, len(panels))
    made, axes = figure(across, -(-len(panels) // across))
    for axis in axes[len(panels) :]:
        axis.set_axis_off()
    for axis, (block, line, found) in zip(axes, panels, strict=False):
        for dot in found:
            colour, shape = _look(labels.index(dot.label))
            axis.scatter([dot.x], [dot.ba], s=18 + 1.2 * dot.asr if cost else 30, edgecolors=colour, marker=shape,
                         facecolors="none" if dot.hollow else colour, zorder=3)  # fmt: skip
            if dot.floor:
                axis.scatter([dot.x], [dot.ba], s=RING, edgecolors="black", facecolors="none", linewidths=0.8,
                             label="floor", zorder=4)  # fmt: skip
        ends = best(found)
        if not cost and len(ends) > 1:
            axis.plot([d.x for d in ends], [d.ba for d in ends], color=GREY, linewidth=0.8, linestyle="--", zorder=1)
        axis.set_xlabel("seconds a cell, with shared stages" if cost else "ASR in %")
        axis.set_ylabel("BA in %")
        axis.set_title(text(line.label) + (f"\n{text(block.title, 120)}" if len(blocks) > 1 else ""))
    every = [dot for _, _, found in panels for dot in found]
    present = {dot.label for dot in every}
    entries: dict[str, Artist] = {
        label: Line2D([], [], color=_look(i)[0], marker=_look(i)[1], markersize=5, linestyle="")
        for i, label in enumerate(labels)
        if label in present
    }
    for why in dict.fromkeys(dot.hollow for dot in every if dot.hollow):
        entries[f"hollow: {why}"] = Line2D([], [], color=GREY, marker="o", markerfacecolor="none", linestyle="")
    if any(dot.floor for dot in every):
        entries["ring: ASR at its floor"] = Line2D(
            [], [], color="black", marker="o", markersize=9, markeredgewidth=0.8, markerfacecolor="none", linestyle=""
        )
    tie = ", no ASR beats one at its floor" if any(dot.floor and not dot.hollow for dot in every) else ""
    below = "; size: ASR" if cost else f"; dashed: Pareto front{tie}"
    finish(made, text(title, 120) + below, entries)
    return made


# ---------------------------------------------------------------- t-SNE


@dataclass(frozen=True)
class Embedding:
    """A model's features in the plane. xy: (N, 2); y: (N,) labels, -1 for triggered images; measures as stored;
    seeds: those of victim and defense, in words; mark: what the model must not be looked at without, "" for nothing.
    """

    title: str
    seeds: str
    xy: NDArray[np.float32]
    y: NDArray[np.int64]
    measures: Mapping[str, Any]
    mark: str = ""


def tsne(panels: Sequence[Embedding], title: str) -> Figure:
    """A panel a model: clean images in the colours of their classes, triggered ones black, the measures below."""
    across = min(4, len(panels))
    made, axes = figure(across, -(-len(panels) // across), 3.2, 3.4)
    for axis in axes:
        axis.set_axis_off()
    for axis, panel in zip(axes, panels, strict=False):
        clean = panel.y >= 0
        x, y = panel.xy[:, 0], panel.xy[:, 1]
        colours = [COLOURS[int(label) % len(COLOURS)] for label in panel.y[clean]]
        axis.scatter(x[clean], y[clean], s=2, c=colours, linewidths=0)
        axis.scatter(x[~clean], y[~clean], s=2, c="black", linewidths=0)
        told = [
            f"{name} {value:.2f}" if name != "probe" else f"probe {value:.0f} %"
            for name in ("cosine", "silhouette", "probe")
            if (value := panel.measures.get(name)) is not None
        ]
        lines = [text(panel.title), text(panel.seeds), *filter(None, [panel.mark]), ", ".join(told)]
        axis.set_title("\n".join(lines), fontsize=8)
    made.suptitle(text(title, 120) + " (black: triggered)", fontsize=10)
    return made


__all__ = [
    "COLOURS", "Dot", "Embedding", "Point", "Sweep", "best", "curves", "dots", "drawn", "figure", "front", "render",
    "save", "scatter", "svg", "sweeps", "text", "trade_off", "tsne",
]  # fmt: skip
