"""Pictures of stored attacks: a sheet per data set, attack and victim, as PNG and as SVG. `sheets` is the one door.

Rows are test images, the same for all attacks on a data set; columns are the clean image, the triggered one, the
difference, and for each inverter that a stored defense used the image with the trigger that it found. Nothing is
computed again: triggered images and triggers are read from the store. Free of torch.
"""

from __future__ import annotations

import base64
import functools
import html
import io
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from safetensors import safe_open
from safetensors.numpy import load_file

from .. import artefacts, datacache
from ..errors import UserError
from ..rows import Row
from ..store import Stage, Store
from ..text import one_line
from . import files

Pixels = NDArray[np.uint8]  # (C, H, W) from a data set, (H, W, 3) in a panel
GAIN = 4  # of the difference, as in the paper's figures
PANEL = 96  # pixels: smaller images are enlarged towards it by whole factors
GAP, LINE, SIZE = 10, 15, 12  # between panels, from line to line, of the letters
GREY = 128
INK, FAINT, PAPER = "#202020", "#606060", "#ffffff"

# ---------------------------------------------------------------- pure functions on pixels


def choose(y: NDArray[np.int64], classes: int, count: int) -> list[int]:
    """`count` positions in a test set (all, if it has no more), their classes spread evenly; the same every time.

    Of each class the first in storage order, then the second. Example: 10 classes, 4 images: classes 0, 3, 6, 9.
    """
    count = min(count, len(y))
    if count <= classes:
        wanted = [round(i * (classes - 1) / max(1, count - 1)) for i in range(count)]
    else:
        wanted = [i % classes for i in range(count)]
    chosen: list[int] = []
    for label in wanted:
        chosen += [i for i in np.flatnonzero(y == label).tolist() if i not in chosen][:1]
    others = (i for i in range(len(y)) if i not in chosen)  # where a class has too few test images
    return chosen + [next(others) for _ in range(count - len(chosen))]


def difference(clean: Pixels, triggered: Pixels) -> Pixels:
    """GAIN * (triggered - clean) around mid-grey, so that darker and lighter can be told apart; cut to 0..255."""
    moved = GREY + GAIN * (triggered.astype(np.int64) - clean.astype(np.int64))
    return moved.clip(0, 255).astype(np.uint8)


def to_pixels(values: NDArray[np.floating[Any]]) -> Pixels:
    """Numbers in [0, 1] -> uint8, by rounding."""
    rounded: Pixels = np.rint(255 * values.clip(0, 1)).astype(np.uint8)
    return rounded


def picture(image: Pixels) -> Image.Image:
    """(C, H, W) uint8 -> a picture of the same size. Raises UserError where C is neither 1 nor 3."""
    if image.shape[0] not in (1, 3):
        raise UserError(f"an image of {image.shape[0]} channels cannot be shown, expected 1 or 3")
    colours = np.repeat(image, 3, 0) if image.shape[0] == 1 else image
    return Image.fromarray(np.ascontiguousarray(colours.transpose(1, 2, 0)))


def panel(image: Pixels) -> Image.Image:
    """The picture enlarged by a whole factor without smoothing: pixels stay pixels."""
    height, width = _enlarged(image)
    return picture(image).resize((width, height), Image.Resampling.NEAREST)


def _enlarged(image: Pixels) -> tuple[int, int]:
    """Height and width of the panel of (C, H, W)."""
    factor = max(1, round(PANEL / max(image.shape[1:])))
    return factor * image.shape[1], factor * image.shape[2]


@dataclass(frozen=True)
class Found:
    """A trigger that an inverter found, as a picture can show it. kind "blend": (1 - mask) * x + mask * pattern;
    "add": x + pattern; None: neither, so that there is no picture. title: the inverter; notes: how good it is.
    """

    title: str
    notes: tuple[str, ...]
    kind: str | None
    mask: NDArray[np.floating[Any]] = field(default_factory=lambda: np.ones((1, 1)))
    pattern: NDArray[np.floating[Any]] = field(default_factory=lambda: np.zeros((1, 1, 1)))

    def apply(self, image: Pixels) -> Pixels:
        """(C, H, W) uint8 -> the same with the trigger."""
        x = image / 255
        return to_pixels(x + self.pattern if self.kind == "add" else (1 - self.mask) * x + self.mask * self.pattern)

    def alone(self) -> Pixels:
        """The trigger on its own: mask * pattern on black, or the added pattern around mid-grey."""
        if self.kind == "add":
            return to_pixels(GREY / 255 + GAIN * self.pattern)
        return to_pixels(self.mask * self.pattern)


# ---------------------------------------------------------------- the sheet


@dataclass(frozen=True)
class Column:
    """A title and one entry per row: a picture and lines below it, or nothing."""

    title: str
    entries: Sequence[tuple[Pixels, Sequence[str]] | None]


@functools.cache
def _font() -> Any:
    return ImageFont.load_default(SIZE)


def wrap(text: str, width: float) -> list[str]:
    """Lines no wider than `width` pixels in the sheet's font, broken at spaces, after commas, or where they must."""
    lines = [""]
    for part in re.findall(r"[^\s,]*,|[^\s,]+|\s+", one_line(text)):
        if lines[-1] and _font().getlength((lines[-1] + part).rstrip()) > width:
            lines.append("")
        for letter in part if lines[-1] else part.lstrip():
            if lines[-1] and _font().getlength(lines[-1] + letter) > width:
                lines.append("")
            lines[-1] += letter
    return [line.rstrip() for line in lines]


@dataclass(frozen=True)
class Sheet:
    """Where everything lies, in pixels from the upper left corner.

    panels: (left, top, (C, H, W) image), shown as `panel` enlarges it; lines: (left, top, text, colour).
    """

    width: int
    height: int
    panels: Sequence[tuple[int, int, Pixels]]
    lines: Sequence[tuple[int, int, str, str]]


def arrange(heading: Sequence[str], columns: Sequence[Column], footing: Sequence[str] = ()) -> Sheet:
    """Heading, titles, the grid of panels with their lines, footing."""
    shown = [entry[0] for column in columns for entry in column.entries if entry]
    height, width = (max(_enlarged(image)[side] for image in shown) for side in (0, 1))
    width = max(width, PANEL)
    titles = [wrap(column.title, width) for column in columns]
    said = [[[] if e is None else [w for t in e[1] for w in wrap(t, width)] for e in c.entries] for c in columns]
    total = GAP + len(columns) * (width + GAP)
    above = [line for text in heading for line in wrap(text, total - 2 * GAP)]
    below = [line for text in footing for line in wrap(text, total - 2 * GAP)]
    deep = [max(len(of_column[row]) for of_column in said) for row in range(len(said[0]))]
    tops = [GAP + LINE * len(above) + GAP + LINE * max(map(len, titles)) + 4]
    for count in deep:
        tops.append(tops[-1] + height + LINE * count + GAP)
    panels: list[tuple[int, int, Pixels]] = []
    lines: list[tuple[int, int, str, str]] = []

    def write(texts: Sequence[str], left: int, top: int, ink: str) -> None:
        lines.extend((left, top + LINE * i, text, ink) for i, text in enumerate(texts))

    write(above, GAP, GAP, INK)
    for i, column in enumerate(columns):
        left = GAP + i * (width + GAP)
        write(titles[i], left, tops[0] - 4 - LINE * len(titles[i]), INK)
        for row, entry in enumerate(column.entries):
            if entry is not None:
                panels.append((left, tops[row], entry[0]))
                write(said[i][row], left, tops[row] + height + 1, FAINT)
    write(below, GAP, tops[-1], FAINT)
    return Sheet(total, tops[-1] + LINE * len(below) + (GAP if below else 0), panels, lines)


def draw(sheet: Sheet) -> bytes:
    """The sheet as a PNG file."""
    drawn = Image.new("RGB", (sheet.width, sheet.height), PAPER)
    pen = ImageDraw.Draw(drawn)
    for left, top, image in sheet.panels:
        drawn.paste(panel(image), (left, top))
    for left, top, text, ink in sheet.lines:
        pen.text((left, top), text, ink, _font())
    return _png(drawn)


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def vector(sheet: Sheet) -> bytes:
    """The sheet as an SVG file: letters that can be searched and enlarged, and images in their own size, which the
    viewer enlarges without smoothing. Lines are as long as on the PNG, whatever font the viewer has.
    """
    size = f'width="{sheet.width}" height="{sheet.height}"'
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} viewBox="0 0 {sheet.width} {sheet.height}" '
        f'font-family="sans-serif" font-size="{SIZE}">',
        f'<rect {size} fill="{PAPER}"/>',
    ]
    for left, top, image in sheet.panels:
        height, width = _enlarged(image)
        data = base64.b64encode(_png(picture(image))).decode()
        out.append(
            f'<image x="{left}" y="{top}" width="{width}" height="{height}" style="image-rendering: pixelated" '
            f'href="data:image/png;base64,{data}"/>'
        )
    for left, top, text, ink in sheet.lines:
        if text:
            out.append(
                f'<text x="{left}" y="{top + SIZE}" fill="{ink}" textLength="{_font().getlength(text):.1f}" '
                f'lengthAdjust="spacingAndGlyphs">{html.escape(text)}</text>'
            )
    return "\n".join([*out, "</svg>\n"]).encode()


# ---------------------------------------------------------------- what the store knows


def _stage(store: Store, key: str | None, what: str) -> tuple[Stage, Path]:
    """A stage and the folder of its verified artefact. Raises UserError where either is gone or damaged."""
    stage = None if key is None else store.stage(key)
    if stage is None:
        raise UserError(f"{what} are no longer stored; the bbmcl matrix that made them makes them again")
    try:
        return stage, store.open(stage)
    except artefacts.Damaged as damage:
        raise UserError(f"{what} are damaged ({damage}); the bbmcl matrix that made them makes them again") from damage


def _data(cache: Path, content: str, dataset: str) -> datacache.DataInfo:
    for info in datacache.entries(cache):
        if info.hash == content:
            return info
    raise UserError(
        f"the images of {dataset} (hash {content[:12]}) are not in the data cache {cache}; prepare them with: "
        f"bbmcl data check {dataset}"
    )


def read_trigger(folder: Path, title: str) -> Found:
    """What the artefact of an inversion holds; of several labels that of the first, the most suspicious one.

    Told by the names of its tensors: `mask` (H, W) and `pattern` (C, H, W) are blended, a `delta` or `pattern` alone
    is added; whatever else there is cannot be shown without the class that made it.
    """
    meta = artefacts.read_meta(folder)
    tensors = load_file(folder / "trigger.safetensors")
    labels = meta.get("labels", [])
    if any(name.startswith(f"{label}/") for label in labels for name in tensors):
        title = f"{title}, label {labels[0]}"
        tensors = {k.partition("/")[2]: v for k, v in tensors.items() if k.startswith(f"{labels[0]}/")}
    notes = [] if meta["l1"] is None else [f"mask L1 {meta['l1']:.2f}"]
    if meta["success"] is not None:
        notes.append(f"success {meta['success']:.1f} %")
    shapes = {name: value.ndim for name, value in tensors.items()}
    if not labels:
        return Found(title, ("called clean, no trigger",), None)
    if shapes == {"mask": 2, "pattern": 3}:
        return Found(title, tuple(notes), "blend", tensors["mask"], tensors["pattern"])
    if shapes in ({"delta": 3}, {"pattern": 3}):
        return Found(title, tuple(notes), "add", pattern=next(iter(tensors.values())))
    name = str(meta["class"]).rpartition(":")[2]
    return Found(title, (f"no picture ({name})", *notes), None)


def _inversions(store: Store, rows: Sequence[Row]) -> list[Found]:
    """One trigger per inverter that a stored defense of this victim used: of its smallest defense seed."""
    keys: dict[str, str] = {}
    for row in sorted(rows, key=lambda row: row.defense_seed or 0):
        if row.stages.get("invert") not in (None, *keys.values()):
            keys.setdefault(str(row.inverter), row.stages["invert"])
    found = []
    for name, key in keys.items():
        try:
            found.append(read_trigger(_stage(store, key, "inverted triggers")[1], name))
        except UserError as error:  # the rest of the sheet is worth having
            found.append(Found(name, (str(error),), None))
    return found


@dataclass(frozen=True)
class Examples:
    """Test images of one victim. index: their places in the test set; y, clean, triggered: label and pixels of each;
    says: the victim's stored predictions, of the whole test set.
    """

    index: Sequence[int]
    y: Sequence[int]
    clean: Sequence[Pixels]
    triggered: Sequence[Pixels]
    says: Mapping[str, NDArray[Any]]


def examples(store: Store, cache: Path, row: Row, images: int) -> Examples:
    """`images` test images of the victim behind a row. Raises UserError where their sources are gone or damaged."""
    what = f"test images of {row.attack}, victim {row.victim_seed}"
    before, predicted = _stage(store, row.stages.get("before"), what)
    _, trial = _stage(store, before.spec["trial"], what)
    victim = store.stage(row.stages["model"])
    if victim is None:
        raise UserError(f"{row.attack}, victim {row.victim_seed} is no longer stored; run its bbmcl matrix again")
    info = _data(cache, victim.spec["data"]["hash"], row.dataset)
    x, y = datacache.open_split(info, "test")
    index = choose(np.asarray(y), info.classes, images)
    with safe_open(trial / "trial.safetensors", framework="numpy") as file:
        stored = file.get_slice("x")  # the whole set may have gigabytes
        triggered = [stored[i : i + 1][0] for i in index]
    says = load_file(predicted / "predictions.safetensors")
    return Examples(index, [int(y[i]) for i in index], [np.asarray(x[i]) for i in index], triggered, says)


def _sheet(store: Store, cache: Path, rows: Sequence[Row], images: int) -> Sheet:
    """rows: all of one victim."""
    row = rows[0]
    shown = examples(store, cache, row, images)
    index, y, clean, says = shown.index, dict(zip(shown.index, shown.y, strict=True)), shown.clean, shown.says
    found = _inversions(store, rows)

    def wanted(i: int) -> str:
        return f"wanted: {says['goal'][i]}" if says["counted"][i] else "not counted"

    pairs = list(zip(index, clean, shown.triggered, strict=True))
    columns = [
        Column("clean", [(c, [f"class {y[i]}", f"victim: {says['clean'][i]}"]) for i, c, _ in pairs]),
        Column("triggered", [(t, [wanted(i), f"victim: {says['triggered'][i]}"]) for i, _, t in pairs]),
        Column(
            f"difference x{GAIN} (grey: none)",
            [(difference(c, t), [f"largest: {int(abs(t.astype(int) - c).max())}"]) for _, c, t in pairs],
        ),
    ]
    for trigger in (trigger for trigger in found if trigger.kind is not None):
        what = f"pattern x{GAIN} (grey: none)" if trigger.kind == "add" else "mask x pattern"
        columns.append(Column(f"trigger found by {trigger.title}", [(trigger.apply(c), []) for c in clean]))
        columns.append(Column(what, [(trigger.alone(), trigger.notes), *[None] * (len(index) - 1)]))
    heading = [
        f"{row.attack} on {row.dataset}, {row.model}, victim seed {row.victim_seed}",
        f"preset {row.preset}, budget {row.budget}; undefended: ASR {_percent(row.asr_before)} "
        f"(FTR {_percent(row.ftr_before)}), BA {_percent(row.ba_before)}",
    ]
    return arrange(heading, columns, [f"{f.title}: {'; '.join(f.notes)}" for f in found if f.kind is None])


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f} %"


def stem(row: Row) -> str:
    """Of its own for every victim, since labels may be equal where settings differ."""
    return files.stem(row.dataset, row.attack, f"seed{row.victim_seed}", row.stages["model"][:8])


def sheets(runs: Path, rows: Sequence[Row], cache: Path, out: Path, images: int = 4) -> Iterator[Path | UserError]:
    """Draw one sheet per victim among `rows` of the folder `runs`; an earlier picture of the same name is replaced.

    cache: where prepared data sets lie. Yields the paths of each sheet, PNG and SVG, or why there is none. Raises
    UserError where the rows name no victim at all.
    Example: `list(sheets(runs, stored_rows(runs), cache_folder(), Path("gallery")))`
    """
    victims: dict[str, list[Row]] = {}
    for row in rows:
        if "model" in row.stages:
            victims.setdefault(row.stages["model"], []).append(row)
    if not victims:
        raise UserError(f"no stored victim fits in {runs}; make one with bbmcl matrix, or see bbmcl report")
    store = Store(runs)
    try:
        out.mkdir(parents=True, exist_ok=True)
        for of_victim in victims.values():
            try:
                sheet = _sheet(store, cache, of_victim, images)
                made = {"png": draw(sheet), "svg": vector(sheet)}
            except UserError as error:
                yield error
                continue
            for kind, content in made.items():
                yield files.write(out / f"{stem(of_victim[0])}.{kind}", content)
    finally:
        store.close()


__all__ = [
    "Column", "Examples", "Found", "Sheet", "arrange", "choose", "difference", "draw", "examples", "panel", "picture",
    "read_trigger", "sheets", "stem", "vector", "wrap",
]  # fmt: skip
