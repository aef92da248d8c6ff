"""Figures for people to look at: sweep curves, ASR against BA, cost against quality, t-SNE panels. matplotlib, no GUI.

Every figure is written as PNG and as SVG. Text of others is drawn as it is, never as mathematics.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from .. import params
from ..errors import UserError
from ..rows import Row
from ..text import one_line
from . import files, statistics
from .grid import BEFORE
from .paper import nested

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c564b", "#7f7f7f", "#bcbd22", "#1b9e77")
SHAPES = "osD^vPXp*h"
GREY = "#777777"
Kind = Literal["png", "svg"]


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


def svg(made: Figure) -> str:
    """The figure as an SVG element, to be put into a page."""
    found = render(made, "svg", letters="none").decode()
    return found[found.index("<svg") :]


# ---------------------------------------------------------------- curves


@dataclass(frozen=True)
class Point:
    """One value on a curve: means over victims."""

    x: float
    asr: statistics.Summary | None
    ba: statistics.Summary | None
    ftr: float | None


def swept(rows: Sequence[Row]) -> tuple[str, dict[str, dict[str, list[Point]]]] | None:
    """What varies among rows, and by attack and curve its points; None where nothing does.

    The clean rate if there are several, else the one numeric parameter in which the labels of a defense differ.
    """
    done = [row for row in rows if row.state == "ok" and row.defense != BEFORE]
    if len({row.clean_rate for row in done}) > 1:
        return "clean rate in %", _points(done, lambda r: (r.defense, 100 * float(r.clean_rate or 0)))
    labels = {row.defense: _selection(row.defense) for row in done}
    values: dict[tuple[str, str], set[float]] = {}
    for selection in labels.values():
        for name, value in selection.params.items():
            if isinstance(value, int | float) and not isinstance(value, bool):
                values.setdefault((selection.name, name), set()).add(float(value))
    several = [key for key, found in values.items() if len(found) > 1]
    if len(several) != 1:
        return None
    method, name = several[0]
    own = [row for row in done if labels[row.defense].name == method and name in labels[row.defense].params]
    return name, _points(own, lambda r: (method, float(labels[r.defense].params[name])))


def _selection(label: str) -> params.Selection:
    """A label of a plugin's rows may be no selection at all: then it has no parameters."""
    try:
        return params.selection(label)
    except UserError:
        return params.Selection(label, label)


def _points(rows: Sequence[Row], by: Any) -> dict[str, dict[str, list[Point]]]:
    groups: dict[tuple[str, str, float], list[Row]] = {}
    for row in rows:
        curve, x = by(row)
        groups.setdefault((row.attack, curve, x), []).append(row)
    out: dict[str, dict[str, list[Point]]] = {}
    for (attack, curve, x), group in groups.items():
        ftr = [row.ftr for row in group if row.ftr is not None]
        point = Point(
            x, statistics.summary(nested(group, "asr")), statistics.summary(nested(group, "ba")),
            float(np.mean(ftr)) if ftr else None,
        )  # fmt: skip
        out.setdefault(attack, {}).setdefault(curve, []).append(point)
    return {a: {c: sorted(ps, key=lambda p: p.x) for c, ps in curves.items()} for a, curves in out.items()}


def curves(rows: Sequence[Row], title: str) -> Figure | None:
    """ASR above, BA below, a column an attack, a line a defense; dotted: FTR, the floor. None where nothing varies."""
    found = swept(rows)
    if found is None or not found[1]:
        return None
    name, attacks = found
    made, axes = figure(len(attacks), 2)
    lines: list[str] = list(dict.fromkeys(curve for by in attacks.values() for curve in by))
    for column, (attack, by) in enumerate(attacks.items()):
        for row, metric in enumerate(("asr", "ba")):
            axis = axes[row * len(attacks) + column]
            for curve, points in by.items():
                _curve(axis, points, metric, lines.index(curve), text(curve))
            axis.set_xlabel(text(name))
            axis.set_ylabel(f"{metric.upper()} in %")
            axis.set_title(text(attack) if row == 0 else "")
            before = [r for r in rows if r.attack == attack and r.defense == BEFORE]
            level = [value for r in before if (value := getattr(r, metric)) is not None]
            if level:
                axis.axhline(float(np.mean(level)), color="black", linewidth=0.8, linestyle="--", label="undefended")
    axes[0].legend(fontsize=7, frameon=False)
    made.suptitle(text(title, 120))
    return made


def _curve(axis: Axes, points: Sequence[Point], metric: str, i: int, label: str) -> None:
    kept = [(p.x, summary, p.ftr) for p in points if (summary := getattr(p, metric)) is not None]
    if not kept:
        return
    x, y = [p[0] for p in kept], [p[1].mean for p in kept]
    colour = COLOURS[i % len(COLOURS)]
    spread = [p[1].sd or 0.0 for p in kept]
    axis.errorbar(x, y, yerr=spread if any(spread) else None, color=colour, marker=SHAPES[i % len(SHAPES)],
                  markersize=4, linewidth=1.2, capsize=2, label=label)  # fmt: skip
    floor = [p[2] for p in kept]
    if metric == "asr" and None not in floor:
        axis.plot(x, [float(value or 0) for value in floor], color=colour, linewidth=0.8, linestyle=":")


# ---------------------------------------------------------------- scatters


def front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Indices of points (ASR, BA) that no other beats in both, by ASR. Example: `front([(1, 8), (2, 7)])` is [0]."""
    out = []
    for i, (asr, ba) in enumerate(points):
        beaten = any((a <= asr and b >= ba and (a, b) != (asr, ba)) for a, b in points)
        if not beaten:
            out.append(i)
    return sorted(out, key=lambda i: points[i])


def scatter(rows: Sequence[Row], title: str, cost: bool = False) -> Figure | None:
    """A panel an attack: ASR against BA with the Pareto front, or, with `cost`, seconds against BA (size: ASR)."""
    done = [r for r in rows if r.state == "ok" and r.defense != BEFORE and r.ba is not None and r.asr is not None]
    attacks = list(dict.fromkeys(row.attack for row in done))
    if not attacks:
        return None
    defenses = list(dict.fromkeys(row.defense for row in done))
    across = min(3, len(attacks))
    made, axes = figure(across, -(-len(attacks) // across))
    for axis in axes[len(attacks) :]:
        axis.set_axis_off()
    for axis, attack in zip(axes, attacks, strict=False):
        points = []
        for defense in defenses:
            group = [row for row in done if (row.attack, row.defense) == (attack, defense)]
            asr, ba = (statistics.summary(nested(group, name)) for name in ("asr", "ba"))
            seconds = statistics.summary(nested(group, "seconds_shared")) if cost else None
            if asr is None or ba is None or (cost and seconds is None):
                continue
            points.append((asr.mean, ba.mean))
            i = defenses.index(defense)
            size = 18 + 1.2 * asr.mean if cost else 30
            axis.scatter([seconds.mean if seconds else asr.mean], [ba.mean], s=size, color=COLOURS[i % len(COLOURS)],
                         marker=SHAPES[i % len(SHAPES)], label=text(defense, 30), zorder=3)  # fmt: skip
        best = [points[i] for i in front(points)]
        if not cost and len(best) > 1:
            axis.plot([p[0] for p in best], [p[1] for p in best], color=GREY, linewidth=0.8, linestyle="--", zorder=1)
        axis.set_xlabel("seconds a cell, with shared stages" if cost else "ASR in %")
        axis.set_ylabel("BA in %")
        axis.set_title(text(attack))
    axes[0].legend(fontsize=7, frameon=False)
    made.suptitle(text(title, 120) + ("; size: ASR" if cost else "; dashed: Pareto front"), fontsize=10)
    return made


# ---------------------------------------------------------------- t-SNE


@dataclass(frozen=True)
class Embedding:
    """A model's features in the plane. xy: (N, 2); y: (N,) labels, -1 for triggered images; measures as stored."""

    title: str
    xy: NDArray[np.float32]
    y: NDArray[np.int64]
    measures: Mapping[str, Any]


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
        axis.set_title(f"{text(panel.title)}\n{', '.join(told)}", fontsize=8)
    made.suptitle(text(title, 120) + " (black: triggered)", fontsize=10)
    return made


__all__ = [
    "COLOURS", "Embedding", "Point", "curves", "figure", "front", "render", "save", "scatter", "svg", "swept",
    "text", "tsne",
]  # fmt: skip
