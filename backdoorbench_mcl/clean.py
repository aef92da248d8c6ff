"""The clean images that somebody has: what `--clean` names, and whose labels they carry. Free of torch.

DATA is a folder of images, a Parquet file or a folder of them, read by the job `pool` in a process of its own; or the
name of a data set with the share of its training split to draw, as in `cifar10@0.05`, drawn as a matrix draws it.
"""

from __future__ import annotations

import difflib
import json
import math
import os
import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file

from . import artefacts, cells, datacache
from .engines.base import Isolation
from .errors import UserError
from .params import Selection, selection
from .plainfiles import read_plain
from .registry import Described, Registry, Wanted
from .text import one_line

DEFAULT_RATE = 0.05
EXPECTED = "a folder of images, a .parquet file, or the name of a data set and a rate, as in cifar10@0.05"
_MAX_NAMES = 16 << 20  # bytes of a file of class names
_SHOWN = 5  # names in a message


@dataclass(frozen=True)
class Source:
    """What DATA names. path: what the job `pool` reads, None where the data set is drawn from; rate: the share to draw,
    None where all is read; label: as it was typed.
    """

    label: str
    selection: Selection
    path: Path | None = None
    rate: float | None = None


@dataclass(frozen=True)
class Clean:
    """Clean images. x: uint8 (N, C, H, W); y: int64 (N,), all -1 without labels; names: of the classes by label, None
    where labels are mere numbers; note: "lossless", "JPEG", ...; native: (height, width) before any resizing, None
    where they differed; hash: SHA-256 (hex) over pixels and labels, whatever their order.
    """

    x: NDArray[np.uint8]
    y: NDArray[np.int64]
    names: tuple[str, ...] | None
    note: str
    native: tuple[int, int] | None
    hash: str

    @property
    def labelled(self) -> bool:
        return bool(self.y[0] >= 0)


# ---------------------------------------------------------------- what DATA names


def parse(text: str, root: Path | None = None) -> Source:
    """DATA as typed: PATH, NAME or NAME@RATE, where NAME may have parameters, or be a family with its own PATH.

    root: the data root, below which a family's PATH is looked for first. Raises UserError for what is none of these.
    Examples: `photos/`, `held-out.parquet`, `folder:photos(size=64)`, `cifar10`, `shapes(train=500)@0.1`.
    """
    text = text.strip()
    if os.path.lexists(text) or os.path.lexists(os.path.expanduser(text)):
        path = Path(text).expanduser().absolute()
        family = _family(text, path)
        return Source(text, Selection(text, family, f":{path}"), path)
    family, _, given = text.partition(":")
    if given and family and "(" not in family and (inside := _found(given, root)) is not None:
        return Source(text, Selection(text, family, f":{inside}"), inside)  # such a path may hold @ and parentheses
    body, rate = _rated(text)
    try:
        chosen = selection(body)
    except UserError as error:
        shown = one_line(text, 200)
        raise UserError(f"{shown!r}: no such file or folder, and no name of a data set; expected {EXPECTED}") from error
    if rate is None and chosen.suffix.startswith(":"):
        path = _located(chosen.suffix[1:], text, root)
        return Source(text, Selection(text, chosen.name, f":{path}", chosen.params), path)
    return Source(text, chosen, None, DEFAULT_RATE if rate is None else rate)


def _family(text: str, path: Path) -> str:
    """Which family reads a path. Raises UserError where none does."""
    if path.is_dir():
        try:
            names = [name for name in os.listdir(path) if not name.startswith(".")]
        except OSError as error:
            raise UserError(f"{text}: cannot be read: {error.strerror or error}") from error
        return "parquet" if any(name.lower().endswith(".parquet") for name in names) else "folder"
    if not path.is_file():
        raise UserError(f"{text}: is neither a folder nor an ordinary file; expected {EXPECTED}")
    if path.suffix.lower() != ".parquet":
        raise UserError(f"{text}: is a file, but not .parquet; expected {EXPECTED}")
    return "parquet"


def _rated(text: str) -> tuple[str, float | None]:
    """`NAME@RATE` -> NAME, RATE; a path may hold an @ of its own."""
    body, at, tail = text.rpartition("@")
    if not at or text.endswith(")"):
        return text, None
    try:
        rate = float(tail)
    except ValueError:
        if ":" in body or "/" in tail:
            return text, None
        rate = float("nan")
    if not 0 < rate <= 1:
        raise UserError(f"{one_line(text, 200)}: a rate of {tail!r}; expected a number above 0, at most 1, as in @0.05")
    return body, rate


def _places(given: str, root: Path | None) -> list[Path]:
    """Where `family:PATH` may lie: below the data root, then in the working directory."""
    path = Path(given).expanduser()
    return list(dict.fromkeys(base.absolute() / path for base in (root, Path()) if base is not None))


def _found(given: str, root: Path | None) -> Path | None:
    """The absolute path behind `family:PATH`, None where there is nothing."""
    return next((place for place in _places(given, root) if given and os.path.exists(place)), None)


def _located(given: str, text: str, root: Path | None) -> Path:
    """The same; raises UserError that says where it was looked for."""
    path = _found(given, root)
    if path is None:
        where = " and ".join(map(str, _places(given, root)))
        raise UserError(f"{text}: no such file or folder; looked for {where}; expected {EXPECTED}")
    return path


def described(source: Source, registry: Registry) -> Described:
    """The data set of a source. Raises UserError for a name that nothing has, with the nearest, or a bad parameter."""
    try:
        registry.find("dataset", source.selection.name)
    except UserError as error:
        raise UserError(f"{source.label}: no such file or folder; {error}") from error
    return registry.describe([Wanted("dataset", source.selection)])[0]


# ---------------------------------------------------------------- getting them


def drawn(source: Source, info: datacache.DataInfo, seed: int = 0) -> Clean:
    """The share of a training split that a matrix gives its defenses with --defense-seeds `seed` at the first victim
    seed, with labels. info: the data set, prepared. Raises UserError where that is no image.
    """
    rate = DEFAULT_RATE if source.rate is None else source.rate
    if rate * info.n_train + 1e-9 < 1:  # as `cells.clean_count`, which knows another option
        least = math.ceil(1e6 / info.n_train) / 1e6
        raise UserError(f"{source.label}: {rate:g} of {info.n_train} images is none; give a rate of at least {least:g}")
    index = cells.clean_index(info.n_train, rate, cells.seed("split", info.hash, 0, seed))
    found_x, found_y = datacache.open_split(info, "train")
    x, y = np.ascontiguousarray(found_x[index]), np.array(found_y[index])
    content, _ = datacache.content(x, y)
    return Clean(x, y, None, info.note, (info.shape[1], info.shape[2]), content)


def spec(
    source: Source, dataset: Described, *, size: int | None = None, fallback: int | None = None,
    most: int | None = None, seed: int = 0, isolation: Isolation = "process",
) -> dict[str, Any]:  # fmt: skip
    """Of the job `pool` that reads the path of a source. size, fallback, most: see `pooling.pool`."""
    return {
        "job": "pool", "isolation": isolation, "readable": [str(source.path)], "root": None,
        "seeds": {"init": cells.seed("split", "pool", 0, seed)}, "dataset": dataset.spec,
        "size": size, "fallback": fallback, "most": most,
    }  # fmt: skip


def collected(folder: Path) -> Clean:
    """What the job `pool` left in its folder of results. Raises UserError where that is not what it writes."""
    try:
        artefacts.require_plain(folder)
        found, meta = load_file(folder / "pool.safetensors"), artefacts.read_meta(folder)
        x, y, names, native = found["x"], found["y"], meta["names"], meta["native"]
        if x.dtype != np.uint8 or x.ndim != 4 or y.dtype != np.int64 or y.shape != x.shape[:1] or not len(x):
            raise ValueError(f"images are {x.dtype} {x.shape}, labels {y.dtype} {y.shape}")
        return Clean(
            x, y, None if names is None else tuple(map(str, names)), str(meta["note"]),
            None if native is None else (int(native[0]), int(native[1])), str(meta["hash"]),
        )  # fmt: skip
    except Exception as error:  # whatever a hostile image made that process write
        raise UserError(f"the clean images were not read as they should: {one_line(str(error), 200)}") from error


# ---------------------------------------------------------------- whose labels


def read_names(given: str) -> tuple[str, ...]:
    """The model's class names, by label: of a file, one a line or a JSON list; or from the text itself, a JSON list or
    separated by commas. Raises UserError for anything else, an empty name, or one given twice.

    Example: `read_names("cat, dog")` is `("cat", "dog")`.
    """
    text, where, lines = given, "--names", False
    if os.path.exists(os.path.expanduser(given)):
        where, lines = f"--names {given}", True
        try:
            text = read_plain(Path(given).expanduser(), _MAX_NAMES).decode("utf-8-sig")
        except OSError as error:
            raise UserError(f"{where}: cannot be read: {error.strerror or error}") from error
        except UnicodeDecodeError as error:
            raise UserError(f"{where}: is no text in UTF-8; expected one class name a line, or a JSON list") from error
    elif "," not in given and not given.lstrip().startswith("["):
        raise UserError(f"--names {one_line(given, 200)}: no such file, and no list; expected a file, or cat,dog,...")
    if text.lstrip().startswith("["):
        try:
            found = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{where}: no readable JSON list ({one_line(str(error), 200)})") from error
        if not all(isinstance(name, str) for name in found):
            raise UserError(f"{where}: a list of other things than strings; expected the names of the classes")
        names = tuple(name.strip() for name in found)
    else:
        names = tuple(name.strip() for name in (text.strip().splitlines() if lines else text.split(",")))
    _require_names(names, where)
    return names


def _require_names(names: Sequence[str], where: str) -> None:
    if not 0 < len(names) <= datacache.MAX_CLASSES:
        raise UserError(f"{where}: {len(names):,} names; expected 1 to {datacache.MAX_CLASSES:,}")
    first: dict[str, int] = {}
    for i, name in enumerate(names):
        if not name:
            raise UserError(f"{where}: name {i} is empty; expected a name for each class, in the order of the labels")
        if (other := first.setdefault(_plain(name), i)) != i:
            raise UserError(
                f"{where}: {_shown([names[other]])} and {_shown([name])}, of labels {other} and {i}, are the same name "
                "but for case, spaces, _ and -"
            )


def _plain(name: str) -> str:
    """A name without case, spaces, underscores, hyphens; a name of nothing else as it is."""
    whole = unicodedata.normalize("NFKC", name).casefold()
    return re.sub(r"[\s_-]+", "", unicodedata.normalize("NFKC", whole)) or whole


def match(
    names: Sequence[str] | None, y: NDArray[np.int64], wanted: Sequence[str] | None, classes: int
) -> NDArray[np.int64]:
    """Labels of clean images -> those of the model, int64 (N,); -1 stays.

    names: what the images' labels mean, None where they are numbers; wanted: the model's class names by label, None
    where they are not known; classes: of the model. Without `wanted`, numbers are labels, and names count in their
    order where there are as many as classes; with it, names and folders that are numbers are looked up.

    Raises UserError naming the classes that the model does not have.
    """
    if wanted is not None and len(wanted) != classes:
        raise UserError(f"--names has {len(wanted)} names, but the model has {classes} classes; expected one for each")
    present = [int(label) for label in np.unique(y) if label >= 0]
    if not present:
        return y
    if names is None and wanted is not None and all(name.isdecimal() for name in wanted):
        return _looked_up({label: str(label) for label in present}, y, {str(int(n)): i for i, n in enumerate(wanted)})
    if names is not None and wanted is not None:
        labels = {_plain(name): label for label, name in enumerate(wanted)}
        return _looked_up({label: names[label] for label in present}, y, labels, wanted)
    if names is not None and len(names) != classes:
        raise UserError(
            f"the clean images are of {len(names)} classes ({_shown(names)}), the model has {classes}: which is which "
            "cannot be told; give the model's class names with --names FILE, in the order of its labels"
        )
    if present[-1] >= classes:
        raise UserError(
            f"the clean images have the label {present[-1]}, but the model has {classes} classes, 0 to {classes - 1}; "
            "number them as the model does, or give its class names with --names FILE"
        )
    return y


def _looked_up(
    found: Mapping[int, str], y: NDArray[np.int64], labels: Mapping[str, int], wanted: Sequence[str] = ()
) -> NDArray[np.int64]:
    """y with the label of each name. wanted: the names as they were given, for messages."""
    missing = [name for name in found.values() if _plain(name) not in labels]
    if missing:
        near = difflib.get_close_matches(_plain(missing[0]), labels, 1, 0.5)
        spelt = _shown([wanted[labels[near[0]]] if wanted else near[0]]) if near else ""
        hint = f" (did you mean {spelt} by {_shown(missing[:1])}?)" if near else ""
        raise UserError(
            f"the clean images are of classes that --names does not have: {_shown(missing)}{hint}; rename them, or "
            "leave them out"
        )
    table = np.full(max(found) + 2, -1, np.int64)  # its last place is that of -1
    for label, name in found.items():
        table[label] = labels[_plain(name)]
    return table[y]


def _shown(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(repr(one_line(name, 80)) for name in names[:_SHOWN]) + more


__all__ = [
    "DEFAULT_RATE", "Clean", "Source", "collected", "described", "drawn", "match", "parse", "read_names", "spec",
]  # fmt: skip
