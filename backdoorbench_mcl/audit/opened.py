"""From what the user typed to a model that can be looked at: file, architecture, images, normalisation. Free of torch.

The file and the images are strangers'; each is read by a job of its own, in a child that can open nothing else.
"""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

from .. import architectures, artefacts, cells, clean, datacache
from ..clean import Clean
from ..engines import single
from ..engines.base import Isolation
from ..errors import UserError
from ..numbers import statistics
from ..registry import Described, Registry
from ..request import Precision
from ..runner import prepare_data
from ..text import one_line
from .chain import Say
from .handed import Handed

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
NONE = "none"
SMALL = 32  # pixels: a network that takes no such images was made for large ones
Run = Callable[..., AbstractContextManager[Path]]  # `single.run_one` with limits
MOST_HELD = 0.9  # of the images


@dataclass(frozen=True)
class Asked:
    """What was typed. model: a file of weights; arch, clean: as of `--arch` and `--clean`; entry: of the file, where it
    holds several models; classes, size, mean, std, names: None where they are to be found; norm: the name of
    constants in place of mean and std; hold_out: share of the images that only the judgement sees; flip: whether a
    mirrored image keeps its label.
    """

    model: Path
    arch: str
    clean: str
    entry: str | None = None
    classes: int | None = None
    size: int | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    norm: str | None = None
    names: str | None = None
    hold_out: float = 0.2
    most: int | None = None
    flip: bool = True
    seed: int = 0
    data_root: Path | None = None


@dataclass(frozen=True)
class Opened:
    """handed: the model; about: how it and the images were found, JSON-ready, for cards; lines: the same in words."""

    handed: Handed
    about: Mapping[str, Any]
    lines: tuple[str, ...]


def check(asked: Asked) -> None:
    """Raises UserError for what can be told without opening anything."""
    if not asked.model.exists():
        raise UserError(f"{asked.model}: there is no such file; expected a file of weights")
    _require_share(asked.hold_out)
    if (asked.mean is None) != (asked.std is None):
        raise UserError("--mean and --std belong together: give both, or none")
    if asked.norm is not None and asked.mean is not None:
        raise UserError(f"--norm {asked.norm} and --mean: give one of them")
    if asked.std is not None and not all(value > 0 for value in asked.std):
        raise UserError(f"--std {','.join(map(str, asked.std))}: expected numbers above 0")
    if asked.classes is not None and not 2 <= asked.classes <= datacache.MAX_CLASSES:
        raise UserError(f"--classes {asked.classes}: expected a number from 2 to {datacache.MAX_CLASSES}")
    if asked.size is not None and not 8 <= asked.size <= 1024:
        raise UserError(f"--size {asked.size}: expected a number of pixels from 8 to 1024")
    if asked.most is not None and asked.most < 2:
        raise UserError(f"--most {asked.most}: expected a number of images from 2 on")


def opened(
    asked: Asked, registry: Registry, cache: Path, work: Path, precision: Precision, device: str, isolation: Isolation,
    say: Say = lambda line: None, timeout: float | None = None, memory: float | None = None,
) -> Opened:  # fmt: skip
    """Read everything. work: a folder that outlives what is returned; timeout, memory: of each job. Raises
    UserError, one line, for what is no model, no image, or does not fit.
    """
    check(asked)
    model = architectures.described(registry, asked.arch)
    common = {"device": device, "precision": precision, "isolation": isolation}
    run = functools.partial(single.run_one, timeout=timeout, memory=memory)
    folder = work / "handed"
    read = _read_model(asked, model, common, folder, run)
    images, source = _read_images(asked, registry, cache, read, isolation, say, run)
    if images.x.shape[1] != read["channels"]:
        raise UserError(
            f"the network takes images of {read['channels']} channels, the clean images have {images.x.shape[1]}"
        )
    wanted = None if asked.names is None else clean.read_names(asked.names)
    y = clean.match(images.names, images.y, wanted, read["classes"])
    names = wanted if wanted is not None else images.names
    repair, held = split(len(y), asked.hold_out, asked.seed)
    if "mean" not in source:
        mean, std = statistics(images.x[repair])  # of the images that searches get
        source = {**source, "mean": mean, "std": std}
    given: Mapping[str, Any] = {"name": "given", "mean": asked.mean, "std": asked.std}
    how, accuracy = given, dict[str, float]()
    if asked.mean is None:
        candidates = known_constants(source, read["channels"])
        if asked.norm is not None:
            how = _named(asked.norm, candidates)
        else:
            granted = replace(images, x=images.x[repair], y=y[repair])
            how, accuracy = _tried(model, read, granted, candidates, common, folder, run)
    channels = read["channels"]
    handed = Handed(
        folder, model, read["weights"], read["classes"], tuple(images.x.shape[1:]), _each(how["mean"], channels),
        _each(how["std"], channels), asked.flip, images.x, y, repair, held, images.hash, names,
    )  # fmt: skip
    return Opened(
        handed, _about(asked, read, images, how, accuracy), tuple(_lines(asked, read, handed, images, how, accuracy))
    )


def split(total: int, hold_out: float, seed: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Positions of the images for searches and repairs, and of those held out. Raises UserError where none is left, or
    the share is none.

    Example: of 2,500 images with hold_out 0.2 there are 2,000 and 500.
    """
    _require_share(hold_out)
    order = np.random.Generator(np.random.PCG64(cells.seed("split", "held out", 0, seed))).permutation(total)
    count = round(total * hold_out)
    if hold_out > 0:
        count = max(1, count)
    if total - count < 2:
        raise UserError(f"{total} clean images, {count} of them held out, leave too few; expected some hundreds")
    return np.sort(order[count:]).astype(np.int64), np.sort(order[:count]).astype(np.int64)


def _require_share(hold_out: float) -> None:
    if not 0 <= hold_out <= MOST_HELD:
        raise UserError(f"--hold-out {hold_out}: expected a share from 0 to {MOST_HELD}, as in 0.2")


def _read_model(asked: Asked, model: Described, common: Mapping[str, Any], folder: Path, run: Run) -> dict[str, Any]:
    """What the job `open` says; the weights go to `folder`."""
    spec = {
        **common, "job": "open", "model": model.spec, "file": str(asked.model.absolute()), "entry": asked.entry,
        "classes": asked.classes, "size": asked.size, "readable": [str(asked.model.absolute())],
        "data": {"mean": [0.0], "std": [1.0]},
    }  # fmt: skip
    with run(spec) as out:
        meta = artefacts.read_meta(out)
        folder.mkdir(parents=True, exist_ok=True)
        for name in ("weights.safetensors", artefacts.META):
            shutil.copyfile(out / name, folder / name)
    return {**meta, "weights": artefacts.identify(folder)}


def _read_images(
    asked: Asked, registry: Registry, cache: Path, read: Mapping[str, Any], isolation: Isolation, say: Say, run: Run
) -> tuple[Clean, dict[str, Any]]:
    """The clean images in a size that the network takes, and the constants of their data set."""
    source = clean.parse(asked.clean, asked.data_root)
    dataset = clean.described(source, registry)
    if source.path is None:
        if asked.size is not None or asked.most is not None:
            raise UserError(
                f"--clean {asked.clean}: a data set has its own size and its rate; leave --size and --most out"
            )
        info = prepare_data(registry, cache)(dataset, asked.data_root, cells.key({"dataset": dataset.identity}))
        images = clean.drawn(source, info, asked.seed)
        _require_taken(images, read["sizes"], f"{asked.clean}, as files in a folder, can be resized")
        return images, {"name": dataset.label, "mean": info.mean, "std": info.std}
    say(f"reading images of {one_line(asked.clean)}")

    def pooled(size: int | None) -> Clean:
        spec = clean.spec(
            source, dataset, size=size, fallback=preferred(read["sizes"]), most=asked.most, seed=asked.seed,
            isolation=isolation,
        )  # fmt: skip
        with run(spec) as out:
            return clean.collected(out)

    images = pooled(asked.size)
    if not taken(images.x.shape[2:], read["sizes"]) and asked.size is None:
        images = pooled(preferred(read["sizes"]))
    _require_taken(images, read["sizes"], "give another --size")
    if read["channels"] == 1 and images.x.shape[1] == 3:
        images = replace(images, x=luminance(images.x))
    return images, {"name": "images"}


def taken(shape: Sequence[int], sizes: Sequence[int]) -> bool:
    """Whether a network, which takes squares of `sizes` of those that were tried, takes images of this (H, W): one that
    takes them all takes any. Example: `taken((48, 32), [32, 64, 96, 224])`
    """
    return len(sizes) == len(architectures.SIZES) or (shape[0] == shape[1] and shape[0] in sizes)


def _require_taken(images: Clean, sizes: Sequence[int], remedy: str) -> None:
    height, width = images.x.shape[2:]
    if not taken((height, width), sizes):
        told = ", ".join(f"{size}x{size}" for size in sizes)
        raise UserError(f"the network takes images of {told}, the clean images have {height}x{width}; {remedy}")


def luminance(x: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """uint8 (N, 3, H, W) -> (N, 1, H, W) by the weights of Rec. 601, rounded."""
    weights = np.array([0.299, 0.587, 0.114])
    grey: NDArray[np.uint8] = np.rint(np.einsum("c,nchw->nhw", weights, x))[:, None].astype(np.uint8)
    return grey


def preferred(sizes: Sequence[int]) -> int:
    """The size for photographs, of those that a network takes, the preferred one first: a network that does not take 32
    pixels was made for large images. Example: `preferred([96, 224])` is 224, `preferred([32, 64, 96, 224])` is 32.
    """
    return max(sizes) if min(sizes) > SMALL else sizes[0]


def known_constants(own: Mapping[str, Any], channels: int) -> list[Mapping[str, Any]]:
    """Normalisations that a network may have been trained with: that of the data set, ImageNet's, and none."""
    return architectures.distinct([
        {key: own[key] if key == "name" else list(own[key]) for key in ("name", "mean", "std")},
        *([{"name": "imagenet", "mean": list(IMAGENET[0]), "std": list(IMAGENET[1])}] if channels == 3 else []),
        {"name": NONE, "mean": [0.0] * channels, "std": [1.0] * channels},
    ])  # fmt: skip


def _named(name: str, candidates: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    found = next((one for one in candidates if one["name"] == name), None)
    if found is None:
        raise UserError(f"--norm {name!r}: expected one of {', '.join(one['name'] for one in candidates)}")
    return found


def _tried(
    model: Described, read: Mapping[str, Any], images: Clean, candidates: Sequence[Mapping[str, Any]],
    common: Mapping[str, Any], folder: Path, run: Run,
) -> tuple[Mapping[str, Any], dict[str, float]]:  # fmt: skip
    """Which constants the network gets most labelled images right with. Raises UserError where that cannot be told."""
    channels = read["channels"]
    if not bool((images.y >= 0).all()):
        names = "|".join(one["name"] for one in candidates)
        raise UserError(
            "the clean images have no labels, so that the network's normalisation cannot be found out; choose with "
            f"--norm {names}, or give its constants with --mean and --std"
        )
    height, width = images.x.shape[2:]
    spec = {
        **common, "job": "look", "model": model.spec, "candidates": candidates,
        "data": {"classes": read["classes"], "shape": [channels, height, width], "mean": [0.0], "std": [1.0]},
    }  # fmt: skip

    def fill(into: Path) -> None:
        shutil.copyfile(folder / "weights.safetensors", into / "weights.safetensors")
        save_file(
            {"x": images.x[: architectures.LOOKED_AT], "y": images.y[: architectures.LOOKED_AT]},
            into / "clean.safetensors",
        )

    with run(spec, fill) as out:
        accuracy: dict[str, float] = artefacts.read_meta(out)["accuracy"]
    return _named(architectures.choose(accuracy), candidates), accuracy


def flags(one: Mapping[str, Any]) -> str:
    """Constants as they are typed. Example: `--mean 0.5 --std 0.25`"""
    return f"--mean {','.join(f'{v:g}' for v in one['mean'])} --std {','.join(f'{v:g}' for v in one['std'])}"


def _each(values: Sequence[float], channels: int) -> tuple[float, ...]:
    """One number for every channel. Raises UserError for another count."""
    if len(values) not in (1, channels):
        raise UserError(f"--mean or --std has {len(values)} numbers, expected 1 or {channels}, one for each channel")
    return tuple(float(v) for v in (list(values) * channels)[:channels])


def _about(
    asked: Asked, read: Mapping[str, Any], images: Clean, how: Mapping[str, Any], accuracy: Mapping[str, float]
) -> dict[str, Any]:
    return {
        "model": {
            "file": asked.model.name, "sha256": read["sha256"], "arch": asked.arch, "classes": read["classes"],
            "parameters": read["parameters"], "layout": read["layout"], "inside": read["inside"],
            "left_out": read["left_out"], "shape": list(images.x.shape[1:]),
        },
        "normalisation": {"name": how["name"], "mean": list(how["mean"]), "std": list(how["std"]),
                          "accuracy": dict(accuracy)},
        "clean": {"data": asked.clean, "note": images.note, "native": images.native, "hold_out": asked.hold_out},
    }  # fmt: skip


def _lines(
    asked: Asked, read: Mapping[str, Any], handed: Handed, images: Clean, how: Mapping[str, Any],
    accuracy: Mapping[str, float],
) -> list[str]:  # fmt: skip
    inside = f", found under {read['inside']!r}" if read["inside"] else ""
    aside = f"; left aside: {', '.join(read['left_out'][:5])}" if read["left_out"] else ""
    size = "x".join(map(str, handed.shape[1:]))
    tried = ", ".join(f"{name} {value:.1f} %" for name, value in sorted(accuracy.items(), key=lambda item: -item[1]))
    said = f" (right on labelled clean images: {tried})" if tried else ""
    native = images.native
    resized = "" if native is not None and tuple(native) == handed.shape[1:] else ", resized"
    kind = "labelled" if handed.labelled else "unlabelled"
    return [
        one_line(f"model {asked.model.name}: {asked.arch}, {read['classes']} classes, "
                 f"{read['parameters']:,} parameters ({read['layout']}{inside}{aside})", 300),
        one_line(f"normalisation {how['name']}: {flags(how)}{said}", 300),
        one_line(f"images {asked.clean}: {len(handed.x):,} {kind}, {size}{resized} ({images.note}); "
                 f"{len(handed.held):,} held out", 300),
    ]  # fmt: skip


__all__ = ["Asked", "Opened", "check", "flags", "luminance", "opened", "preferred", "split", "taken"]
