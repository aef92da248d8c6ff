"""What is behind each run of an HTML report, as JSON: pictures, curves, confusion, parameters, provenance, failure log.

Everything a stage may have written is checked here, since a method may have written it. Equal parameters, provenance
and pictures are stored once, so that a thousand cells fit into a page.
"""

from __future__ import annotations

import base64
import io
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from ..errors import UserError
from ..rows import Row
from ..store import Store
from ..text import one_line
from . import gallery, statistics
from .evidence import Evidence
from .records import finite

PICTURE_BYTES = 2_000_000  # of all pictures of a page together, as base64
SIDE = 96  # pixels: larger pictures are shrunk to it
SOUGHT = 2  # test images of two classes: at least one of them is not the target and counts
Draw = Callable[[Row], list[tuple[str, "gallery.Pixels"]]]
MAX_LOG, MAX_POINTS, MAX_CLASSES = 4000, 200, 100
METRICS = (
    ("ASR", "asr"), ("FTR, the floor of ASR", "ftr"), ("BA", "ba"), ("BA without the target class", "ba_nt"),
    ("TCA", "tca"), ("RA", "ra"),
)  # fmt: skip


class Drill:
    """Collects what a page holds of its runs. store: None where rows come without a runs folder."""

    def __init__(self, store: Store | None, cache: Path | None) -> None:
        self.store = store
        self.evidence = None if store is None else Evidence(store)
        self.cache = cache
        self.runs: list[dict[str, Any]] = []
        self.images: list[str] = []
        self.room = PICTURE_BYTES
        self.left_out = 0
        self._known: dict[str, dict[str, int]] = {"params": {}, "provenance": {}}
        self._drawn: dict[str, list[tuple[str, int]]] = {}  # by stage key: the pictures of a victim or an inversion
        self._places: dict[str, int] = {}

    def place(self, row: Row) -> int:
        """The number of a run in the page's data; an undefended victim of several tables is held once."""
        name = row.key or f"{row.dataset} {row.attack} {row.victim_seed} {len(self.runs)}"  # read off a defended row
        if name not in self._places:
            self._places[name] = len(self.runs)
            self.runs.append(self._run(row))
        return self._places[name]

    def data(self) -> dict[str, Any]:
        """The page's data; free of what JSON does not have."""
        tables = {name: [json.loads(text) for text in self._known[name]] for name in ("params", "provenance")}
        found: dict[str, Any] = finite({"runs": self.runs, "images": self.images, **tables})
        return found

    def _run(self, row: Row) -> dict[str, Any]:
        shown = ("attack", "defense", "victim_seed", "defense_seed", "state", "target")
        out: dict[str, Any] = {
            "row": {**{name: getattr(row, name) for name in shown}, "reason": one_line(row.reason, 500)},
            "told": _told(row), "pictures": self._pictures(row), "curves": self._curves(row), "log": self._log(row),
            "params": self._once("params", {**row.params, **({"--set": row.overrides} if row.overrides else {})}),
            "provenance": self._once("provenance", self._provenance(row)), "target": None, "fired": None,
        }  # fmt: skip
        out.update(self._confusion(row))
        return out

    def _once(self, table: str, value: Any) -> int:
        text = json.dumps(finite(value), sort_keys=True, default=str)
        return self._known[table].setdefault(text, len(self._known[table]))

    def _provenance(self, row: Row) -> dict[str, Any]:
        found: dict[str, Any] = {
            "versions": dict(row.versions), "device": row.device, "precision": row.precision, "threads": row.threads,
            "isolation": row.isolation,
        }  # fmt: skip
        stage = self.store.stage(row.stages["predict"]) if self.store and "predict" in row.stages else None
        if stage is not None:
            found.update({name: stage.numerics[name] for name in ("machine", "origin") if name in stage.numerics})
        return found

    # ------------------------------------------------------------ curves, confusion, log

    def _curves(self, row: Row) -> list[tuple[str, list[list[float]]]]:
        out = []
        for kind, title in (("model", "Training of the victim"), ("defend", "Repair")):
            stage = self.store.stage(row.stages[kind]) if self.store and kind in row.stages else None
            curves = stage.numerics.get("curves", {}) if stage is not None else {}
            for name, points in curves.items() if isinstance(curves, Mapping) else ():
                kept = _thinned([p for p in points if _is_point(p)]) if isinstance(points, list) else []
                if len(kept) > 1:
                    out.append((f"{title}: {one_line(str(name), 40)}", kept))
        return out

    def _confusion(self, row: Row) -> dict[str, Any]:
        """Counts of predicted labels: of clean images of the target class, of triggered images that count."""
        folder = self.evidence.folder(row, "predict") if self.evidence else None
        if folder is None or row.target is None:
            return {}
        found = load_file(folder / "predictions.safetensors")
        own, counted = found["y"] == row.target, found["counted"].astype(bool)
        return {"target": _counts(found["clean"][own]), "fired": _counts(found["triggered"][counted])}

    def _log(self, row: Row) -> str:
        last = self.store.last_attempt(row.stages["failed"]) if self.store and "failed" in row.stages else None
        return "" if last is None else "\n".join(one_line(line, 400) for line in last[2][-MAX_LOG:].splitlines())

    # ------------------------------------------------------------ pictures

    def _pictures(self, row: Row) -> list[tuple[str, int]]:
        """Titles and numbers of images: of the victim's trigger, and of the one that was inverted."""
        out = []
        for kind, draw in (("model", self._triggered), ("invert", self._inverted)):
            if self.store is not None and kind in row.stages:
                key = row.stages[kind]
                if key not in self._drawn:
                    self._drawn[key] = self._placed(draw, row)
                out += self._drawn[key]
        return out

    def _placed(self, draw: Draw, row: Row) -> list[tuple[str, int]]:
        try:
            drawn = [(title, _uri(image)) for title, image in draw(row)]
        except UserError:  # gone or damaged: the page is worth more than a picture
            return []
        out = []
        for title, uri in drawn:
            if len(uri) > self.room:
                self.left_out += 1
                continue
            self.room -= len(uri)
            self.images.append(uri)
            out.append((title, len(self.images) - 1))
        return out

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
    facts = (
        ("before defense", _before(row)), ("DER", _number(row.der)), ("gate", row.gate),
        ("told", ", ".join(row.knows)), ("verdict", row.verdict), ("surrogates", row.surrogate),
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
        isinstance(v, int | float) and math.isfinite(v) for v in point
    )  # fmt: skip


def _thinned(points: Sequence[Sequence[float]]) -> list[list[float]]:
    """At most `MAX_POINTS` of them, evenly, the last one included."""
    step = max(1, -(-len(points) // MAX_POINTS))
    kept = [list(p) for p in points[::step]]
    return kept if not points or kept[-1] == list(points[-1]) else [*kept, list(points[-1])]


def _counts(labels: Any) -> list[tuple[int, int]]:
    """(label, count), most frequent first."""
    values, counts = np.unique(labels, return_counts=True)
    order = np.argsort(-counts, kind="stable")[:MAX_CLASSES]
    return [(int(values[i]), int(counts[i])) for i in order]


def _uri(image: gallery.Pixels) -> str:
    """A PNG data address of (C, H, W) uint8, at most `SIDE` pixels to a side."""
    shown = gallery.picture(image)
    shown.thumbnail((SIDE, SIDE))
    buffer = io.BytesIO()
    shown.save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


__all__ = ["PICTURE_BYTES", "Drill"]
