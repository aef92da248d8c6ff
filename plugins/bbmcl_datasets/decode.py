"""Encoded images -> uint8 arrays, with the source (lossless or JPEG) on record: spec 2.1 measures 7.6-9 points of BA
between a model trained on lossless CIFAR-10 and the same images after JPEG, so a table must say which it saw.
"""

from __future__ import annotations

import io
import os
import tempfile
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from backdoorbench_mcl.api import MixedSizes, UserError

FORMATS = ("PNG", "JPEG", "PPM", "BMP")  # a short list: every further decoder is attack surface
TEST_NAMES = ("test", "val", "validation")  # of a split, the first that is there
SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".ppm", ".pgm", ".bmp"})
MAX_PIXELS = 64_000_000  # decompression-bomb guard, below the size at which PIL itself only warns
MAX_BYTES = 256 << 20  # of an encoded image: MAX_PIXELS take 192 MB where nothing is compressed
MAX_CLASSES = 1 << 16  # predictions are stored as 16 bits
LARGE = 4_000_000  # pixels: of images above, one is decoded at a time, at up to 11 bytes a pixel
_CHUNK = 256  # images in flight: keeps the hand-over to threads cheap for small images
_CHUNK_BYTES = 16 << 20  # decoded bytes in flight: bounds memory for large images

Shaping = Callable[[Image.Image], Image.Image]
Pixels = npt.NDArray[np.uint8]


def note(heads: Iterable[bytes]) -> str:
    """First bytes of every image -> "lossless", "JPEG" or "mixed (... lossless, ... JPEG)"."""
    kinds = Counter("JPEG" if head.startswith(b"\xff\xd8\xff") else "lossless" for head in heads)
    if len(kinds) == 1:
        return next(iter(kinds))
    return f"mixed ({kinds['lossless']} lossless, {kinds['JPEG']} JPEG)"


# ---------------------------------------------------------------- shaping


def whole(size: int) -> Shaping:
    """The whole image resized to size x size: PIL bilinear, aspect not kept (spec 2.2, 2.3)."""
    if size * size > MAX_PIXELS:
        raise UserError(f"size={size} was given, expected at most {int(MAX_PIXELS**0.5)}")
    return lambda image: image.resize((size, size), Image.Resampling.BILINEAR)


def whole_if(size: int | None) -> Shaping | None:
    """`whole(size)`, or nothing where no size is asked for."""
    return None if size is None else whole(size)


def centre(size: int) -> Shaping:
    """The shorter side resized to size * 256/224 (PIL bilinear), then the middle size x size (spec 2.4, test).

    Rounds as torchvision's Resize and CenterCrop do, so that 224 gives exactly Resize(256) and CenterCrop(224).
    """
    short = round(size * 256 / 224)

    def shape(image: Image.Image) -> Image.Image:
        width, height = image.size
        least = min(width, height)
        if short * short * max(width, height) // least > MAX_PIXELS:
            raise ValueError(f"{width}x{height} pixels, too elongated to cut out its middle")
        image = image.resize((short * width // least, short * height // least), Image.Resampling.BILINEAR)
        left, top = round((image.width - size) / 2), round((image.height - size) / 2)
        return image.crop((left, top, left + size, top + size))

    return shape


# ---------------------------------------------------------------- decoding


def decode(data: bytes, where: str, shaping: Shaping | None, turn: AbstractContextManager[Any] | None = None) -> Pixels:
    """One encoded image -> uint8 (3, H, W); grey becomes RGB, alpha is dropped. shaping: applied to the RGB image;
    turn: held while a large image is decoded.

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
            with turn if turn is not None and width * height > LARGE else nullcontext():
                rgb = image.convert("RGB")
                if shaping is not None:
                    rgb = shaping(rgb)
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
    return np.ascontiguousarray(np.asarray(rgb).transpose(2, 0, 1))


def stack(
    blobs: Iterable[tuple[str, bytes]], shaping: Shaping | None, keep: Callable[[Pixels], bool] | None = None
) -> tuple[Pixels, npt.NDArray[np.bool_]]:
    """Encoded images, each with where it came from -> those that are kept, and which they are.

    Returns uint8 (M, 3, H, W) and bool (N,), M of its N values true. keep(image) decides; by default all are kept.
    The images are decoded by a few threads and go straight to a nameless temporary file, of which the result is a
    private map: a split need not fit into memory. Plain writes: a full disk is an error here, not a SIGBUS.
    Raises UserError naming the image that is corrupt, MixedSizes naming one that differs in size from the first.
    """
    shape: tuple[int, ...] | None = None
    kept: list[bool] = []
    with tempfile.TemporaryFile() as file, ThreadPoolExecutor(max_workers=4) as pool:
        remaining = iter(blobs)
        count = 4  # until the first image has told how large they are
        turn = threading.Lock()
        while chunk := _gathered(remaining, count):
            quarters = [chunk[i::4] for i in range(4)]
            decoded = list(
                pool.map(lambda part: [decode(data, where, shaping, turn) for where, data in part], quarters)
            )
            for i, (where, _) in enumerate(chunk):
                image = decoded[i % 4][i // 4]
                shape = image.shape if shape is None else shape
                if image.shape != shape:
                    raise MixedSizes(
                        f"{where}: {image.shape[2]}x{image.shape[1]} pixels, but the first image has "
                        f"{shape[2]}x{shape[1]}; give size=N to resize all images to NxN"
                    )
                kept.append(keep is None or keep(image))
                if kept[-1]:
                    _write(file, image)
                count = max(4, min(_CHUNK, _CHUNK_BYTES // image.nbytes))
        if not any(kept):
            return np.empty((0, *(shape or (3, 0, 0))), np.uint8), np.array(kept, np.bool_)
        _write(file, None)
        assert shape is not None
        return np.memmap(file, np.uint8, "c", shape=(sum(kept), *shape)), np.array(kept, np.bool_)


def _gathered(remaining: Iterator[tuple[str, bytes]], count: int) -> list[tuple[str, bytes]]:
    """The next `count` encoded images, fewer where they are large: a small picture may come with much beside it."""
    out: list[tuple[str, bytes]] = []
    held = 0
    while len(out) < count and held < _CHUNK_BYTES and (blob := next(remaining, None)) is not None:
        out.append(blob)
        held += len(blob[1])
    return out


def _write(file: IO[bytes], image: Pixels | None) -> None:
    """Append an image, or have all of them in the file."""
    try:
        if image is None:
            file.flush()
        else:
            file.write(image.data)
    except OSError as error:
        raise UserError(
            f"cannot keep decoded images in {tempfile.gettempdir()}: {error.strerror or error}; make room there"
        ) from error


def pooled(blobs: Iterable[tuple[str, bytes]], size: int | None) -> tuple[Pixels, str, tuple[int, int] | None]:
    """Encoded images without a split -> uint8 (N, 3, H, W), the note, and the (height, width) that all had before they
    were resized to size x size, None where they differed. Raises as `stack`.
    """
    heads: list[bytes] = []
    sizes: set[tuple[int, int]] = set()
    resize = whole_if(size)

    def noted() -> Iterator[tuple[str, bytes]]:
        for where, data in blobs:
            heads.append(data[:3])
            yield where, data

    def shape(image: Image.Image) -> Image.Image:
        sizes.add((image.height, image.width))
        return image if resize is None else resize(image)

    x, _ = stack(noted(), shape)
    about = note(heads) if size is None else f"{note(heads)}, resized to {size}x{size}"
    return x, about, next(iter(sizes)) if len(sizes) == 1 else None


def locate(name: str, path: str, root: Path | None, *, file: bool = False) -> Path:
    """A PATH argument -> an absolute folder: below the data root if it exists there, else from the working directory.

    file: a file will do as well. Raises UserError that says where it was looked for.
    """
    given = Path(path).expanduser()
    tried = (
        [Path.cwd() / given] if root is None or given.is_absolute() else [root.absolute() / given, Path.cwd() / given]
    )
    for folder in tried:
        if folder.is_dir() or (file and folder.is_file()):
            return folder
    kind = "file or folder" if file else "folder"
    raise UserError(
        f"{name}:{path}: no such {kind}; looked for {' and '.join(str(folder) for folder in tried)}; "
        f"give an existing {kind}, absolute or relative to --data-root (BBMCL_DATA) or the working directory"
    )


def stay_inside(folder: Path, paths: Iterable[Path]) -> None:
    """Raise UserError where one of `paths` is a link that leads out of `folder`, which alone the user has named: a
    confined process cannot follow it, and any other should not.
    """
    home = os.path.realpath(folder)
    for path in paths:
        if path.is_symlink() and not Path(os.path.realpath(path)).is_relative_to(home):
            raise UserError(
                f"{path}: is a link that leads out of {folder}, which is not followed; put the file itself there, or "
                "name what the link leads to"
            )


def argument(name: str, text: str) -> dict[str, str]:
    """`":PATH"` -> `{"path": "PATH"}`; UserError for anything else."""
    if not text.startswith(":") or not text[1:]:
        raise UserError(f"{name!r} takes a path, but {name + text!r} was given; write {name}:PATH")
    return {"path": text[1:]}
