"""The jobs that look at a model that somebody handed over: what its file holds, and how its pixels are normalised.

The file is a stranger's. It is read in the child, by `checkpoints`, and what leaves are the weights of a network that
this installation built: its names, shapes and types, all numbers finite.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from . import api, checkpoints, kit
from .architectures import LOOKED_AT, SIZES
from .errors import UserError
from .functions import OtherWidth
from .job import Job, weights_of
from .plainfiles import PlainFile
from .text import one_line

LIBRARIES = ("torchvision", "timm")  # whose networks are made for 224 pixels
CHANNELS = (3, 1)
MOST_CLASSES = 100_000  # ImageNet-21k has 21,843
MOST_TOLD = 50  # names of what was left out

Shapes = Mapping[str, tuple[int, ...]]
Build = Callable[[int, int, int], api.Classifier]  # classes, channels, size


def open_(job: Job) -> None:
    """Read the file of a model. out: weights, as the network has them; meta: "classes"; "sizes" of images (square)
    that its shapes fit, the preferred one first; "channels"; "layout", "inside", "left_out" of the file; "tensors",
    "parameters", how many; "sha256" of the file.

    The spec has "file", "entry", "classes" and "size", the last three None where they are to be found. Raises UserError
    for whatever is no such model.
    """
    file = Path(job.spec["file"])
    found = checkpoints.read(file, entry=job.spec["entry"])
    job.tick(1, 3, 0)
    try:
        model, classes, channels, sizes = _fitting(job, found.tensors)
    except UserError as error:
        raise UserError(f"{file}: {error}") from error
    job.tick(2, 3, 0)
    weights = weights_of(model)
    bad = [name for name, tensor in weights.items() if tensor.is_floating_point() and not bool(tensor.isfinite().all())]
    if bad:
        others = f" and {len(bad) - 3} more" if len(bad) > 3 else ""
        raise UserError(
            f"{file}: has NaN or infinities in {', '.join(bad[:3])}{others}, so that it predicts nothing; expected "
            "weights of a training that did not diverge"
        )
    job.save("weights", weights)
    left_out = [one_line(name, 80) for name in found.left_out[:MOST_TOLD]]
    more = [f"and {len(found.left_out) - MOST_TOLD} more"] if len(found.left_out) > MOST_TOLD else []
    job.save_meta({
        "classes": classes, "sizes": sizes, "channels": channels, "layout": found.layout,
        "inside": one_line(found.inside, 200), "left_out": [*left_out, *more], "tensors": len(weights),
        "parameters": sum(parameter.numel() for parameter in model.parameters()), "sha256": _sha256(file),
    })  # fmt: skip
    job.tick(3, 3, 0)


def _sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with PlainFile(file) as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _fitting(job: Job, tensors: Mapping[str, Tensor]) -> tuple[api.Classifier, int, int, list[int]]:
    """The network with the weights in it, its classes, its channels and the sizes that fit.

    Raises UserError: that of the network where it can be built for no size, else one that says key by key what does not
    fit the network for three channels and the preferred size.
    """
    family = cast(api.Model, job.method("model"))
    library = job.spec["model"]["name"].rpartition("/")[2] in LIBRARIES
    preferred = (SIZES[-1], *SIZES[:-1]) if library else SIZES
    sizes = preferred if job.spec["size"] is None else (job.spec["size"],)

    def build(classes: int, channels: int, size: int) -> api.Classifier:
        torch.manual_seed(job.spec["seeds"]["init"])
        return family.build(classes, (channels, size, size))

    nearest: api.Classifier | None = None
    problems: list[UserError] = []
    for channels in CHANNELS:
        fitting: list[int] = []
        model: api.Classifier | None = None
        try:
            classes = _classes(functools.partial(_shapes, build, channels), sizes, tensors, job.spec["classes"])
        except _NotBuilt as error:
            problems.append(error)
            continue
        for size in sizes:
            try:
                built = build(classes, channels, size)
            except UserError as error:
                problems.append(error)
                continue
            if not checkpoints.mismatches(built.state_dict(), tensors):
                fitting.append(size)
                model = built if model is None else model
            nearest = built if nearest is None else nearest
        if model is not None:
            checkpoints.fit(model, tensors)
            return model, classes, channels, fitting
    if nearest is not None:
        checkpoints.fit(nearest, tensors)
    raise problems[0]


class _NotBuilt(UserError):
    """A network cannot be built for any of the sizes."""


def _shapes(build: Build, channels: int, classes: int, size: int) -> Shapes:
    return {name: tuple(tensor.shape) for name, tensor in build(classes, channels, size).state_dict().items()}


def _classes(
    shapes: Callable[[int, int], Shapes], sizes: Sequence[int], tensors: Mapping[str, Tensor], given: int | None
) -> int:
    """The number of classes: what a network of 2 and one of 3 classes differ in tells where the file has it.

    shapes: those of the network for a number of classes and a size. Raises UserError where the file's tensors disagree,
    or have another number than was given; _NotBuilt where there is no network.
    """
    found = _counted(shapes, sizes, tensors)
    numbers = sorted(set(found.values()))
    if len(numbers) > 1:
        told = ", ".join(f"{name} has {number}" for name, number in list(found.items())[:4])
        raise UserError(f"its tensors disagree on the number of classes: {told}")
    if not numbers:  # another architecture, which is told key by key
        return given or 2
    if not 2 <= numbers[0] <= MOST_CLASSES:
        raise UserError(
            f"its number of classes is {numbers[0]:,}, expected 2 to {MOST_CLASSES:,}, each with a logit of its own"
        )
    if given is not None and given != numbers[0]:
        raise UserError(f"the file has {numbers[0]} classes, --classes {given} was given; leave --classes out")
    return numbers[0]


def _counted(
    shapes: Callable[[int, int], Shapes], sizes: Sequence[int], tensors: Mapping[str, Tensor]
) -> dict[str, int]:
    """Name of a tensor -> the number of classes that its shape tells; or that of a function that takes none."""
    problems: list[UserError] = []
    for size in sizes:
        try:
            two, three = (shapes(classes, size) for classes in (2, 3))
        except OtherWidth as error:
            return {"the network": error.width}
        except UserError as error:
            problems.append(error)
            continue
        found: dict[str, int] = {}
        for name, tensor in tensors.items():
            for less, more, has in zip(two.get(name, ()), three.get(name, ()), tensor.shape, strict=False):
                each = more - less
                if each and tensor.ndim == len(two[name]) and tensor.numel() and (has - less) % each == 0:
                    found[name] = 2 + (has - less) // each
        return found
    raise _NotBuilt(str(problems[0])) from problems[0]


def look(job: Job) -> None:
    """How many labelled clean images a model gets right with each normalisation. meta: "accuracy", in % by the name of
    the candidate; "images", how many were looked at.

    The spec has "candidates", each with "name", "mean" and "std": one number, or one for each channel.
    """
    model, clean = job.victim(), job.clean()
    x, y = clean.x[:LOOKED_AT], clean.y[:LOOKED_AT].cpu()
    candidates = job.spec["candidates"]
    accuracy: dict[str, float] = {}
    for i, one in enumerate(candidates):
        model.set_normalisation(tuple(one["mean"]), tuple(one["std"]))
        accuracy[one["name"]] = 100.0 * float((kit.predict(model, x) == y).double().mean())
        job.tick(i + 1, len(candidates), len(x))
    job.save_meta({"accuracy": accuracy, "images": len(x)})


__all__ = ["look", "open_"]
