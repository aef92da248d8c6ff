"""The job that reads the clean images somebody has: a folder or Parquet file of strangers' images, in its own process.

The order of what it leaves depends on the pixels, the labels and the seed, never on names of files: the same images
give the same array, and the same hash, from any source.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from . import api, datacache
from .describe import construct
from .errors import MixedSizes, PluginError, UserError
from .job import Job

LARGE = 96  # pixels on a side: beyond, images are photographs still to be resized, not the input of a small network
MOST_NAME = 1000  # characters of a class name


def pool(job: Job) -> None:
    """Clean images without a split. out: x uint8 (N, C, H, W), y int64 (N,), all -1 without labels, in random order.

    spec: "size", a side to resize all images to; "fallback", the side where none is given and sizes differ, or all are
    of one size above LARGE; "most", the number of images to draw. Each may be None. meta: see `clean.Clean`.
    """
    with datacache.scratch(job.folder):
        found = _read(job)
    _check(job.spec["dataset"]["name"], found)
    x, y = np.asarray(found.images.x), np.asarray(found.images.y)
    content, order = datacache.content(x, y)
    shuffled = order[torch.randperm(len(y), generator=job.rng("init")).numpy()]
    job.save("pool", {"x": torch.from_numpy(x[shuffled]), "y": torch.from_numpy(y[shuffled])})
    job.tick(len(y), len(y), len(y))
    job.save_meta(
        {
            "names": None if found.names is None else list(found.names),
            "labelled": bool(y[0] >= 0),
            "images": len(y),
            "shape": list(x.shape[1:]),
            "native": None if found.native is None else list(found.native),
            "note": found.note,
            "hash": content,
        }
    )


def _read(job: Job) -> api.Pool:
    """The images in the size that is asked for, or that their own sizes call for."""
    root = None if job.spec["root"] is None else Path(job.spec["root"])
    most = job.spec["most"]
    method: dict[str, Any] = job.spec["dataset"]
    resizable = "size" in method["params"]
    forced = job.spec["size"] or method["params"].get("size")
    fallback = job.spec["fallback"] if resizable else None
    if forced is not None and not resizable:
        raise UserError(f"{method['name']}: has no parameter 'size', so its images cannot be made {forced}x{forced}")

    def draw(count: int) -> Tensor:
        return torch.randperm(count, generator=job.rng("init"))[:most]

    def read(size: int | None, draw: Callable[[int], Tensor] = draw) -> api.Pool:
        params = {**method["params"], "size": size} if resizable else method["params"]
        dataset = construct(method["target"], method["kind"], method["suffix"], params)
        return cast(api.Dataset, dataset).pool(root, draw)

    if forced is not None or fallback is None:
        return read(forced)
    one = read(None, lambda count: draw(count)[:1])  # hundreds of photographs, at full size, would fill the disk
    height, width = one.images.x.shape[2:]
    if max(height, width) <= LARGE or height == width == fallback:
        try:
            return read(None)
        except MixedSizes as error:
            print(f"resized to {fallback}x{fallback}: {error}", flush=True)
    return read(fallback)


def _check(name: str, found: Any) -> None:
    """Raise PluginError for what no `Dataset.pool` may return, UserError for names that are too long to print."""
    if not isinstance(found, api.Pool) or not isinstance(found.images, api.Images) or len(found.images) == 0:
        raise PluginError(f"{name}: pool() returned {type(found).__name__}, expected a Pool with at least one image")
    y = found.images.y
    if (y.min() < 0 and bool((y != -1).any())) or y.max() >= datacache.MAX_CLASSES:
        raise PluginError(
            f"{name}: pool() has labels {int(y.min())} to {int(y.max())}, expected all -1, or all from 0 to "
            f"{datacache.MAX_CLASSES - 1}"
        )
    if found.names is None:
        return
    if y.max() >= len(found.names):
        raise PluginError(f"{name}: pool() names {len(found.names)} classes, but has a label {int(y.max())}")
    longest = max(map(len, found.names))
    if longest > MOST_NAME:
        raise UserError(f"{name}: a class has a name of {longest:,} characters, expected at most {MOST_NAME:,}")


__all__ = ["LARGE", "pool"]
