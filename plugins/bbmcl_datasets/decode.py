"""Encoded images -> uint8 arrays, with the source (lossless or JPEG) on record: spec 2.1 measures 7.6-9 points of BA
between a model trained on lossless CIFAR-10 and the same images after JPEG, so a table must say which it saw.
"""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from backdoorbench_mcl.api import UserError

FORMATS = ("PNG", "JPEG", "PPM", "BMP")  # a short list: every further decoder is attack surface
SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".ppm", ".pgm", ".bmp"})
MAX_PIXELS = 64_000_000  # decompression-bomb guard, below the size at which PIL itself only warns
_CHUNK = 256  # images in flight: bounds memory, and keeps the hand-over to threads cheap for small images


def note(heads: Iterable[bytes]) -> str:
    """First bytes of every image -> "lossless", "JPEG" or "mixed (... lossless, ... JPEG)"."""
    kinds = Counter("JPEG" if head.startswith(b"\xff\xd8\xff") else "lossless" for head in heads)
    if len(kinds) == 1:
        return next(iter(kinds))
    return f"mixed ({kinds['lossless']} lossless, {kinds['JPEG']} JPEG)"


def decode(data: bytes, where: str, size: int | None) -> npt.NDArray[np.uint8]:
    """One encoded image -> uint8 (3, H, W); grey becomes RGB, alpha is dropped.

    size: if given, the whole image is resized to size x size (PIL bilinear, aspect not kept: spec 2.2, 2.3).
    Raises UserError that names `where` for anything that is not a readable 8-bit image.
    """
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            width, height = image.size
            if width * height > MAX_PIXELS:
                raise UserError(f"{where}: {width}x{height} pixels, more than the {MAX_PIXELS:,} that are accepted")
            if image.mode in ("I", "F") or image.mode.startswith("I;"):
                raise UserError(
                    f"{where}: pixels of mode {image.mode}, expected 8 bits a channel; convert the image first"
                )
            rgb = image.convert("RGB")
    except (
        OSError,
        ValueError,
        SyntaxError,
        EOFError,
        Image.DecompressionBombError,
        Image.DecompressionBombWarning,
    ) as error:
        raise UserError(
            f"{where}: not a readable {', '.join(FORMATS[:-1])} or {FORMATS[-1]} image ({error})"
        ) from error
    if size is not None:
        rgb = rgb.resize((size, size), Image.Resampling.BILINEAR)
    return np.ascontiguousarray(np.asarray(rgb).transpose(2, 0, 1))


def stack(blobs: Iterable[tuple[str, bytes]], total: int, size: int | None) -> npt.NDArray[np.uint8]:
    """`total` encoded images, each with where it came from -> uint8 (total, 3, H, W), decoded by a few threads.

    Raises UserError naming the image that is corrupt or differs in size from the first.
    """
    out: npt.NDArray[np.uint8] = np.empty((0, 0, 0, 0), np.uint8)
    row = 0
    with ThreadPoolExecutor(max_workers=4) as pool:
        for chunk in _chunks(blobs):
            quarters = [chunk[i::4] for i in range(4)]
            decoded = list(pool.map(lambda part: [decode(data, where, size) for where, data in part], quarters))
            for i, (where, _) in enumerate(chunk):
                image = decoded[i % 4][i // 4]
                if row == 0:
                    out = np.empty((total, *image.shape), np.uint8)
                if image.shape != out.shape[1:]:
                    raise UserError(
                        f"{where}: {image.shape[2]}x{image.shape[1]} pixels, but the first image has "
                        f"{out.shape[3]}x{out.shape[2]}; give size=N to resize all images to NxN"
                    )
                out[row] = image
                row += 1
    return out


def _chunks(blobs: Iterable[tuple[str, bytes]]) -> Iterator[list[tuple[str, bytes]]]:
    remaining = iter(blobs)
    while chunk := list(islice(remaining, _CHUNK)):
        yield chunk


def statistics(x: npt.NDArray[np.uint8]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """uint8 (N, C, H, W) -> mean and standard deviation per channel over all pixels in [0, 1], to 4 decimals.

    Sums of integers, so the result does not depend on the order of the images. A constant channel gets 1/255, the
    smallest step a pixel can make, so that dividing by it stays possible.
    """
    counts = np.zeros((x.shape[1], 256), np.int64)
    for start in range(0, len(x), _CHUNK):
        for channel in range(x.shape[1]):
            counts[channel] += np.bincount(x[start : start + _CHUNK, channel].ravel(), minlength=256)
    values = np.arange(256) / 255.0
    share = counts / counts.sum(axis=1, keepdims=True)
    mean = share @ values
    std = np.sqrt(((values[None] - mean[:, None]) ** 2 * share).sum(axis=1))
    return tuple(round(float(m), 4) for m in mean), tuple(round(max(float(s), 1 / 255), 4) for s in std)


def locate(name: str, path: str, root: Path | None) -> Path:
    """A PATH argument -> an absolute folder: below the data root if it exists there, else from the working directory.

    Raises UserError that says where it was looked for.
    """
    given = Path(path).expanduser()
    tried = (
        [Path.cwd() / given] if root is None or given.is_absolute() else [root.absolute() / given, Path.cwd() / given]
    )
    for folder in tried:
        if folder.is_dir():
            return folder
    raise UserError(
        f"{name}:{path}: no such folder; looked for {' and '.join(str(folder) for folder in tried)}; "
        f"give an existing folder, absolute or relative to --data-root (BBMCL_DATA) or the working directory"
    )


def argument(name: str, text: str) -> dict[str, str]:
    """`":PATH"` -> `{"path": "PATH"}`; UserError for anything else."""
    if not text.startswith(":") or not text[1:]:
        raise UserError(f"{name!r} takes a path, but {name + text!r} was given; write {name}:PATH")
    return {"path": text[1:]}
