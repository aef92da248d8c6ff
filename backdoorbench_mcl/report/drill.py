"""What is behind each run of an HTML report, as JSON: pictures, curves, confusion, parameters, provenance, failure log.

Everything a stage may have written is checked here, since a method may have written it. What runs share (words,
parameters, provenance, pictures, curves, logs) is held once, and everything has a budget of bytes, so that a thousand
cells fit into a page, however many runs they have and whatever these recorded. What did not fit is said.
"""

from __future__ import annotations

import base64
import io
import itertools
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from ..errors import UserError
from ..evaluate import marks
from ..rows import Row
from ..store import Store
from ..text import one_line
from . import gallery, statistics
from .evidence import Evidence
from .records import embedded, finite

ROOM = 4_000_000  # bytes of everything here, by default
RUNS = 0.6  # of the room: what each run has in words and numbers, where there is a store for more
REFERENCES = 120  # bytes by which a run names its pictures, curves, table and log
SHARES = {"pictures": 0.4, "curves": 0.36, "confusion": 0.14, "logs": 0.1}  # of what the runs leave
SIDE = 96  # pixels: larger pictures are shrunk to it
SOUGHT = 2  # test images of two classes: at least one of them is not the target and counts
Draw = Callable[[Row], list[tuple[str, "gallery.Pixels"]]]
MAX_LOG, MAX_CLASSES = 4000, 100
POINTS = (200, 100, 50, 25, 12)  # of a curve: the most for which all curves fit
KINDS = (  # stages whose curves are shown, in this order
    ("model", "Training of the victim"), ("verdict", "Detection"), ("invert", "Inversion"), ("defend", "Repair"),
)  # fmt: skip
Curve = tuple[str, list[tuple[float, float]]]  # title, (step, value)
METRICS = (
    ("ASR", "asr"), ("FTR, the floor of ASR", "ftr"), ("BA", "ba"), ("BA without the target class", "ba_nt"),
    ("TCA", "tca"), ("RA", "ra"),
)  # fmt: skip


class Shelf:
    """Values of a page, each held once by its key, as long as there is room. room: bytes of JSON."""

    def __init__(self, room: float) -> None:
        self.room = room
        self.values: list[Any] = []
        self.left_out = 0
        self._places: dict[str, int | None] = {}

    def put(self, key: str, value: Any) -> int | None:
        """The place of a value, None where it does not fit."""
        if key not in self._places:
            size = len(embedded(value)) + 1
            fits = size <= self.room
            self._places[key] = len(self.values) if fits else None
            if fits:
                self.room -= size
                self.values.append(value)
            else:
                self.left_out += 1
        return self._places[key]


class Drill:
    """Collects what a page holds of the runs of its cells. store: None where rows come without a runs folder; cache:
    where prepared data sets lie.
    """

    def __init__(self, store: Store | None, cache: Path | None) -> None:
        self.store, self.cache = store, cache
        self._cells: list[Sequence[Row]] = []
        self._rows: list[Row] = []
        self._runs: list[dict[str, Any]] = []
        self._known: dict[str, dict[str, int]] = {"words": {}, "params": {}, "provenance": {}}
        self._places: dict[str, int] = {}
        self._size = 0  # bytes of all that

    def cell(self, runs: Sequence[Row]) -> int:
        """The number of a cell in the page's data."""
        self._cells.append(runs)
        self._size += len("[[],0],")
        return len(self._cells) - 1

    def data(self, room: float = ROOM) -> tuple[dict[str, Any], list[str]]:
        """The page's data in about `room` bytes, free of what JSON does not have, and lines on what was left out of it.

        A cell is the numbers of its runs, and how many more it has.
        """
        cells = self._chosen(room if self.store is None else RUNS * room)
        behind = Behind(self.store, self.cache, max(0.0, room - self._size))
        for run, row in zip(self._runs, self._rows, strict=True):
            run |= behind.of(row)
        shelves, left_out, lines = behind.data()
        missing = {_name(row) for runs in self._cells for row in runs} - self._places.keys()
        counts = [f"{count} {name}" for name, count in {"runs": len(missing), **left_out}.items() if count]
        if counts:
            told = f"To keep the page small, these were left out of its cells: {', '.join(counts)}."
            lines = [f"{told} --format json has all runs." if missing else told, *lines]
        tables = {name: [json.loads(text) for text in known] for name, known in self._known.items()}
        return finite({"cells": cells, "runs": self._runs, **shelves, **tables}), lines

    def _chosen(self, room: float) -> list[tuple[list[int], int]]:
        """The first run of every cell, then the second of each, and so on as long as there is room."""
        shown: list[list[int]] = [[] for _ in self._cells]
        for turn in range(max(map(len, self._cells), default=0)):
            for numbers, runs in zip(shown, self._cells, strict=True):
                if turn < len(runs) and self._size <= room:
                    numbers.append(self._place(runs[turn]))
        return [(numbers, len(runs) - len(numbers)) for numbers, runs in zip(shown, self._cells, strict=True)]

    def _place(self, row: Row) -> int:
        """The number of a run; one that stands in several tables is held once."""
        name = _name(row)
        if name not in self._places:
            self._places[name] = len(self._runs)
            self._rows.append(row)
            self._runs.append(self._run(row))
            self._size += len(embedded(self._runs[-1])) + REFERENCES
        self._size += len(str(self._places[name])) + 1
        return self._places[name]

    def _run(self, row: Row) -> dict[str, Any]:
        shown = ("attack", "defense", "victim_seed", "defense_seed", "state", "target")
        params = {**row.params, **({"--set": row.overrides} if row.overrides else {})}
        return {
            "row": {**{name: getattr(row, name) for name in shown}, "reason": one_line(row.reason, 500)},
            "told": [self._once("words", word) for line in _told(row) for word in line],
            "params": {name: self._once("params", value) for name, value in params.items()},
            "provenance": self._once("provenance", self._provenance(row)),
        }  # fmt: skip

    def _once(self, table: str, value: Any) -> int:
        text = json.dumps(finite(value), sort_keys=True, default=str)
        if text not in self._known[table]:
            self._known[table][text] = len(self._known[table])
            self._size += len(embedded(json.loads(text))) + 1
        return self._known[table][text]

    def _provenance(self, row: Row) -> dict[str, Any]:
        found: dict[str, Any] = {
            "versions": dict(row.versions), "device": row.device, "precision": row.precision, "threads": row.threads,
            "isolation": row.isolation,
        }  # fmt: skip
        judged, victim, repair = (self._made(row, kind) for kind in ("predict", "model", "defend"))
        others = {name: made for name, made in (("victim", victim), ("repair", repair)) if made and made != judged}
        return {**found, **judged, **others}  # what another run made, perhaps elsewhere, is told apart

    def _made(self, row: Row, kind: str) -> dict[str, Any]:
        """Where, by what command and from which commit a stage of a row was made; {} where that is not known."""
        stage = self.store.stage(row.stages[kind]) if self.store and kind in row.stages else None
        told = {} if stage is None else stage.numerics
        return {name: told[name] for name in ("machine", "origin") if name in told}


class Behind:
    """What the stages of runs left: pictures, curves, predicted classes, the log of a failure. room: bytes of it."""

    def __init__(self, store: Store | None, cache: Path | None, room: float) -> None:
        self.store = store
        self.evidence = None if store is None else Evidence(store)
        self.cache = cache
        self.images, self.confusions, self.logs = (Shelf(SHARES[n] * room) for n in ("pictures", "confusion", "logs"))
        self._curve_room = SHARES["curves"] * room
        self._curves: list[Curve] = []
        self._recorded: dict[str, list[int]] = {}  # by stage key: places of curves
        self._drawn: dict[str, list[int]] = {}  # by stage key: the pictures of a victim or an inversion
        self._runs: list[dict[str, Any]] = []

    def of(self, row: Row) -> dict[str, Any]:
        """The places of what is behind a run."""
        curves = [place for kind, title in KINDS for place in self._recordings(row, kind, title)]
        found = {"pictures": self._pictures(row), "curves": curves, "confusion": self._confusion(row),
                 "log": self._log(row)}  # fmt: skip
        self._runs.append(found)
        return found

    def data(self) -> tuple[dict[str, Any], dict[str, int], list[str]]:
        """What the places stand for, how much was left out by its name, and a line if curves are thinned.

        Curves, which can be thinned, take what all others leave.
        """
        spare = sum(shelf.room for shelf in (self.images, self.confusions, self.logs))
        curves, points = _fitting(self._curves, self._curve_room + spare)
        for run in self._runs:
            run["curves"][:] = [place for place in run["curves"] if place < len(curves)]
        left_out = {"pictures": self.images.left_out, "curves": len(self._curves) - len(curves),
                    "tables of predicted classes": self.confusions.left_out, "logs": self.logs.left_out}  # fmt: skip
        thinned = f"To keep the page small, curves are thinned to at most {points} points each."
        return ({"images": self.images.values, "curves": curves, "confusions": self.confusions.values,
                 "logs": self.logs.values}, left_out, [thinned] if points < POINTS[0] else [])  # fmt: skip

    # ------------------------------------------------------------ curves, confusion, log

    def _recordings(self, row: Row, kind: str, title: str) -> list[int]:
        """Places of the curves that a stage of a row recorded."""
        if self.store is None or kind not in row.stages:
            return []
        key = row.stages[kind]
        if key not in self._recorded:
            stage = self.store.stage(key)
            found = stage.numerics.get("curves") if stage is not None else None
            self._recorded[key] = []
            for name, points in found.items() if isinstance(found, Mapping) else ():
                kept = [(float(p[0]), float(p[1])) for p in points if _is_point(p)] if isinstance(points, list) else []
                if len(kept) > 1:
                    self._recorded[key].append(len(self._curves))
                    self._curves.append((f"{title}: {one_line(str(name), 40)}", _thinned(kept, POINTS[0])))
        return self._recorded[key]

    def _confusion(self, row: Row) -> int | None:
        """Counts of predicted labels: of clean images of the target class, of triggered images that count."""
        folder = self.evidence.folder(row, "predict") if self.evidence else None
        if folder is None or row.target is None:
            return None
        found = load_file(folder / "predictions.safetensors")
        own, counted = found["y"] == row.target, found["counted"].astype(bool)
        counts = {"target": _counts(found["clean"][own]), "fired": _counts(found["triggered"][counted])}
        return self.confusions.put(f"{row.stages['predict']} {row.target}", counts)

    def _log(self, row: Row) -> int | None:
        if self.store is None or "failed" not in row.stages:
            return None
        last = self.store.last_attempt(row.stages["failed"])
        lines = [] if last is None else last[2][-MAX_LOG:].splitlines()
        text = "\n".join(one_line(line, 400) for line in lines)
        return self.logs.put(row.stages["failed"], text) if text else None

    # ------------------------------------------------------------ pictures

    def _pictures(self, row: Row) -> list[int]:
        """Places of titled images: of the victim's trigger, and of the one that was inverted."""
        out: list[int] = []
        for kind, draw in (("model", self._triggered), ("invert", self._inverted)):
            if self.store is not None and kind in row.stages:
                key = row.stages[kind]
                if key not in self._drawn:
                    self._drawn[key] = self._placed(draw, row, key)
                out += self._drawn[key]
        return out

    def _placed(self, draw: Draw, row: Row, key: str) -> list[int]:
        try:
            drawn = [self.images.put(f"{key} {title}", (title, uri(image))) for title, image in draw(row)]
        except UserError:  # gone or damaged: the page is worth more than a picture
            return []
        return [place for place in drawn if place is not None]

    def _triggered(self, row: Row) -> list[tuple[str, gallery.Pixels]]:
        """A clean test image, the same with the true trigger, their difference."""
        if self.store is None or self.cache is None:
            return []
        shown = gallery.examples(self.store, self.cache, row, SOUGHT)
        counted = [i for i, place in enumerate(shown.index) if shown.says["counted"][place]]
        if not counted:
            return []
        clean, triggered = shown.clean[counted[0]], shown.triggered[counted[0]]
        difference = gallery.difference(clean, triggered)
        return [("clean", clean), ("true trigger", triggered), (f"difference x{gallery.GAIN}", difference)]

    def _inverted(self, row: Row) -> list[tuple[str, gallery.Pixels]]:
        folder = self.evidence.folder(row, "invert") if self.evidence else None
        found = None if folder is None else gallery.read_trigger(folder, str(row.inverter))
        if found is None or found.kind is None:
            return []
        return [(f"inverted by {found.title}: {', '.join(found.notes)}", found.alone())]


def _name(row: Row) -> str:
    """What tells a run from others; an undefended victim that was read off a defended row has no key."""
    return row.key or f"{row.dataset} {row.attack} {row.victim_seed} {id(row)}"


def _told(row: Row) -> list[tuple[str, str]]:
    """The table of a run: metrics with counts and Wilson intervals, what it was told, cost."""
    out = []
    for title, name in METRICS:
        value, k, n = (getattr(row, f"{name}{end}") for end in ("", "_k", "_n"))
        if value is None:
            continue
        text = f"{value:.2f} %"
        if k is not None and n and 0 <= k <= n:
            low, high = statistics.wilson(k, n)
            text += f" ({k} of {n}; {low:.2f} to {high:.2f} by the draw of test images alone)"
        out.append((title, text))
    what = marks(row)
    facts = (
        ("ASR at its floor", "not above FTR: no ASR beats it" if what["asr_at_floor"] else ""),
        ("target class erased", "TCA below a tenth of its value before" if what["target_class_erased"] else ""),
        ("before defense", _before(row)), ("DER", _number(row.der)), ("gate", row.gate),
        ("told", ", ".join(row.knows)), ("verdict", row.verdict), ("surrogates", row.surrogate),
        ("attacker controls", "" if row.controls == "data" else row.controls), ("custom inference", row.rebuild),
        ("inverter", row.inverter or ""), ("success of the inverted trigger", _number(row.inverter_success, " %")),
        ("L1 of the mask", _number(row.inverter_l1)), ("clean images", str(row.clean_n or "")),
        ("re-tuned", _retuned(row)), ("seconds, alone", _number(row.seconds)),
        ("seconds, with shared stages", _number(row.seconds_shared)), ("peak memory", _number(row.peak_mb, " MB")),
    )  # fmt: skip
    return out + [(name, one_line(text, 300)) for name, text in facts if text]


def _before(row: Row) -> str:
    found = [(title, getattr(row, f"{name}_before")) for title, name in METRICS if hasattr(row, f"{name}_before")]
    return ", ".join(f"{title.partition(',')[0]} {value:.2f} %" for title, value in found if value is not None)


def _retuned(row: Row) -> str:
    if row.retuned_asr is None:
        return ""
    return f"ASR {row.retuned_asr:.2f} %, FTR {_number(row.retuned_ftr)} after {row.retuned_images} triggered images"


def _number(value: float | None, unit: str = "") -> str:
    return "" if value is None or not math.isfinite(value) else f"{value:.2f}{unit}"


def _is_point(point: Any) -> bool:
    return isinstance(point, list | tuple) and len(point) == 2 and all(
        isinstance(v, int | float) and abs(v) < 1e300 for v in point
    )  # fmt: skip


def _thinned(points: Sequence[tuple[float, float]], most: int) -> list[tuple[float, float]]:
    """`most` of them or fewer, evenly, the first and the last one included."""
    if len(points) <= most:
        return list(points)
    return [points[round(i * (len(points) - 1) / (most - 1))] for i in range(most)]


def _fitting(curves: Sequence[Curve], room: float) -> tuple[list[tuple[str, list[float]]], int]:
    """Curves as (title, [step, value, step, value, ...]) with four significant digits, in `room` bytes of JSON, and how
    many points each may have. Where even the fewest points do not fit, only the first curves are kept.
    """
    made: list[tuple[str, list[float]]] = []
    if not curves:
        return made, POINTS[0]
    for most in POINTS:
        made = [(title, [_short(v) for point in _thinned(points, most) for v in point]) for title, points in curves]
        if len(embedded(made)) <= room:
            return made, most
    sizes = itertools.accumulate(len(embedded(curve)) + 1 for curve in made)
    return made[: sum(size <= room for size in sizes)], POINTS[-1]


def _short(value: float) -> float:
    """Four significant digits, a whole number as it is."""
    return int(value) if abs(value) < 1e9 and value == int(value) else float(f"{value:.4g}")


def _counts(labels: Any) -> list[tuple[int, int]]:
    """(label, count), most frequent first."""
    values, counts = np.unique(labels, return_counts=True)
    order = np.argsort(-counts, kind="stable")[:MAX_CLASSES]
    return [(int(values[i]), int(counts[i])) for i in order]


def uri(image: gallery.Pixels) -> str:
    """A PNG data address of (C, H, W) uint8, at most `SIDE` pixels to a side."""
    shown = gallery.picture(image)
    shown.thumbnail((SIDE, SIDE))
    buffer = io.BytesIO()
    shown.save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


__all__ = ["ROOM", "Drill", "uri"]
