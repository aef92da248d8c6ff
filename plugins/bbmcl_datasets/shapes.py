"""`shapes`: the embedded default data set. A toy: procedural, 10 classes, 3x32x32, 5,000 train and 1,000 test images.

One filled shape per image on a textured background, at a random place, size, angle and colour, over clutter and
under noise. Clutter falls on the bottom-right corner and on the centre region in a fixed share of the images, so
that a pixel patch there is nothing new. Measured properties: docs/shapes.md.

Every pixel is a function of integers: raw 64-bit words of PCG64, whose stream NumPy guarantees for good (the
methods of `Generator` it does not), and int32/int64 sums, products, shifts and floor divisions. No float takes
part, so that the bytes agree on every machine and NumPy version. `generate` touches no global state.

Paper: none, it is ours. Differs: nothing to differ from.
Should reach: the two SHA-256 of docs/shapes.md; a clean WRN-16-1 of 800 steps BA 94.9 (n = 1), a linear probe at most
12.7.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
import numpy.typing as npt
import torch

from backdoorbench_mcl.api import Dataset, Images, Source

Int = npt.NDArray[np.int64]
Bool = npt.NDArray[np.bool_]
Split = Literal["train", "test"]

SEED = 20220506  # drawn once, never tuned
SIZE = 32
COUNTS: dict[Split, int] = {"train": 5000, "test": 1000}
CLASSES = ("disc", "ring", "square", "triangle", "cross", "pentagon", "star", "crescent", "bow tie", "frame")
NOISE = 8  # half-width of the uniform noise, in grey levels: -8 .. 8 on every pixel and channel
CORNER = slice(29, 32)  # rows and columns of a 3x3 patch in the bottom-right corner (spec 4.1)
CENTRE = slice(18, 21)  # rows and columns of a 3x3 patch in the centre (spec 4.3)
UNIT = 1024  # one radius of a shape, in fixed point


class _Words:
    """Integers from a PCG64 stream by multiply-shift of the upper 32 bits of each word."""

    def __init__(self, *entropy: int) -> None:
        self._bits = np.random.PCG64(list(entropy))

    def below(self, bound: int, *shape: int) -> Int:
        """Integers in [0, bound) of `shape`."""
        count = int(np.prod(shape))
        words = np.asarray(self._bits.random_raw(count), dtype=np.uint64) >> np.uint64(32)
        return ((words * np.uint64(bound)) >> np.uint64(32)).astype(np.int64).reshape(shape)

    def between(self, low: int, high: int, *shape: int) -> Int:
        """Integers in [low, high] of `shape`."""
        return low + self.below(high - low + 1, *shape)


# ---------------------------------------------------------------- shapes: inside tests in units of UNIT


def _sides(u: Int, v: Int, normals: tuple[tuple[int, int], ...], reach: int) -> Int:
    """How many of the half-planes n.p < reach hold; normals are in units of UNIT."""
    held: Int = np.zeros(u.shape, dtype=np.int64)
    for a, b in normals:
        held += (a * u + b * v) < reach * UNIT
    return held


_TRI = ((0, -1024), (887, 512), (-887, 512))  # 1024 * (cos, sin) of -90, 30, 150 degrees
_PENTA = ((1024, 0), (316, 974), (-828, 602), (-828, -602), (316, -974))  # of 0, 72, 144, 216, 288 degrees


def _disc(u: Int, v: Int) -> Bool:
    return u * u + v * v < 820**2


def _ring(u: Int, v: Int) -> Bool:
    r2 = u * u + v * v
    return (r2 < 920**2) & (r2 > 480**2)


def _square(u: Int, v: Int) -> Bool:
    return np.maximum(abs(u), abs(v)) < 730


def _triangle(u: Int, v: Int) -> Bool:
    inside: Bool = _sides(u, v, _TRI, 540) == 3
    return inside


def _cross(u: Int, v: Int) -> Bool:
    return (np.minimum(abs(u), abs(v)) < 290) & (np.maximum(abs(u), abs(v)) < 960)


def _pentagon(u: Int, v: Int) -> Bool:
    inside: Bool = _sides(u, v, _PENTA, 760) == 5
    return inside


def _star(u: Int, v: Int) -> Bool:
    return _sides(u, v, _PENTA, 410) >= 4  # a pentagram lies outside at most one side of its inner pentagon


def _crescent(u: Int, v: Int) -> Bool:
    return (u * u + v * v < 950**2) & ((u - 500) ** 2 + v * v > 700**2)


def _bow_tie(u: Int, v: Int) -> Bool:
    return (abs(v) < abs(u) + 100) & (abs(u) < 800)


def _frame(u: Int, v: Int) -> Bool:
    edge = np.maximum(abs(u), abs(v))
    return (edge < 830) & (edge > 430)


_INSIDE: tuple[Callable[[Int, Int], Bool], ...] = (
    _disc, _ring, _square, _triangle, _cross, _pentagon, _star, _crescent, _bow_tie, _frame,
)  # fmt: skip


def _cover(label: int, words: _Words, n: int) -> Int:
    """How much of each pixel the shape covers, 0 .. 4 quarters: (n, 32, 32)."""
    radius = words.between(28, 46, n)[:, None, None]  # quarter pixels, as are all lengths here
    place = words.between(44, 84, n, 2)
    k = words.below(64, n)
    flips = words.below(8, n)
    # rational points of the circle, (64^2 - k^2, 2 * 64 * k) / (64^2 + k^2), cover 0 .. 90 degrees without a cosine
    c, s = 4096 * (4096 - k * k) // (4096 + k * k), 4096 * 128 * k // (4096 + k * k)
    c, s = np.where(flips & 1, s, c), np.where(flips & 1, c, s)
    c, s = np.where(flips & 2, -c, c)[:, None, None], np.where(flips & 4, -s, s)[:, None, None]
    at = np.arange(1, 4 * SIZE, 2)  # two samples a pixel along each axis
    dy = at[None, :, None] - place[:, 0, None, None]
    dx = at[None, None, :] - place[:, 1, None, None]
    u = (dx * c + dy * s) // (4 * radius)
    v = (dy * c - dx * s) // (4 * radius)
    inside = _INSIDE[label](u, v).reshape(n, SIZE, 2, SIZE, 2)
    quarters: Int = inside.sum(axis=(2, 4), dtype=np.int64)
    return quarters


# ---------------------------------------------------------------- what surrounds them


def _scene(words: _Words, base: Int, n: int) -> Int:
    """Base colours (n, 3) plus smooth blotches and soft stripes: (n, 3, 32, 32), not clipped."""
    knots = words.between(-16, 16, n, 3, 5, 5)
    at = np.arange(SIZE)
    cell, part = at // 8, at % 8
    rows = knots[:, :, cell] * (8 - part)[:, None] + knots[:, :, cell + 1] * part[:, None]  # (n, 3, 32, 5)
    blotch = (rows[..., cell] * (8 - part) + rows[..., cell + 1] * part) // 64  # bilinear
    slope = words.between(-4, 4, n, 2)[:, :, None, None]
    period = words.between(24, 48, n)[:, None, None]
    phase = words.below(64, n)[:, None, None]
    wave = (at[:, None] * slope[:, 0] + at * slope[:, 1] + phase) % period  # (n, 32, 32)
    stripe = (4 * np.minimum(wave, period - wave) - period)[:, None]  # a triangular wave, -period .. period
    tint = words.between(-8, 8, n, 3)[:, :, None, None]
    scene: Int = base[:, :, None, None] + blotch + stripe * tint // 48
    return scene


def _lay(words: _Words, image: Int, base: Int, cover: Int) -> Int:
    """The shape in a colour 40 to 80 levels from the base on each channel, with a gradient, not quite opaque."""
    n = len(image)
    fill = base + (2 * words.below(2, n, 3) - 1) * words.between(40, 80, n, 3)
    slope = words.between(-8, 8, n, 3, 2)[..., None, None]
    at = np.arange(SIZE) - SIZE // 2
    ink = fill[:, :, None, None] + (at[:, None] * slope[:, :, 0] + at * slope[:, :, 1]) // 16
    opacity = words.between(5, 8, n)[:, None, None, None]  # eighths; cover counts quarters
    laid: Int = image + (ink - image) * cover[:, None] * opacity // 32
    return laid


def _speck(words: _Words, image: Int, top: Int, left: Int, one_in: int) -> None:
    """One in `one_in` images gets a random bit mask in two colours on the 3x3 square at (top, left), in place.

    A third of the specks have only 0 and 255 in their colours, as patch triggers do.
    """
    n = len(image)
    shown = words.below(one_in, n) == 0
    colours = words.below(256, n, 3, 2)
    colours = np.where((words.below(3, n) == 0)[:, None, None], 255 * (colours // 128), colours)
    bits = words.below(4, n, 3, 3)  # 0, 1: a colour; 2, 3: left open
    ink = np.where(bits[:, None] == 0, colours[:, :, 0, None, None], colours[:, :, 1, None, None])
    opacity = words.between(2, 8, n)[:, None, None, None]  # eighths
    rows, cols = top[:, None] + np.arange(3), left[:, None] + np.arange(3)
    which, channel = np.arange(n)[:, None, None, None], np.arange(3)[:, None, None]
    where = (which, channel, rows[:, None, :, None], cols[:, None, None, :])
    below = image[where]  # (n, 3, 3, 3)
    painted = (bits < 2) & shown[:, None, None]
    image[where] = np.where(painted[:, None], below + (ink - below) * opacity // 8, below)


def _paint(label: int, words: _Words, n: int) -> npt.NDArray[np.uint8]:
    """`n` images of one class: uint8 (n, 3, 32, 32)."""
    base = words.between(104, 151, n, 3)
    image = _lay(words, _scene(words, base, n), base, _cover(label, words, n))
    for _ in range(4):
        _speck(words, image, words.below(SIZE - 2, n), words.below(SIZE - 2, n), 2)
    for start, room in ((CORNER.start, 0), (CENTRE.start, 1)):
        _speck(words, image, words.between(start - 1, start + room, n), words.between(start - 1, start + room, n), 4)
    image += words.between(-NOISE, NOISE, n, 3, SIZE, SIZE)
    return image.clip(0, 255).astype(np.uint8)


def generate(split: Split) -> tuple[npt.NDArray[np.uint8], Int]:
    """Images uint8 (N, 3, 32, 32) and labels int64 (N,), the classes in turn: 0, 1, .., 9, 0, .."""
    total = COUNTS[split]
    x = np.empty((total, 3, SIZE, SIZE), dtype=np.uint8)
    for label in range(len(CLASSES)):
        words = _Words(SEED, 0 if split == "train" else 1, label)
        x[label :: len(CLASSES)] = _paint(label, words, total // len(CLASSES))
    return x, np.arange(total, dtype=np.int64) % len(CLASSES)


class Shapes(Dataset):
    """The toy on which the first command runs: 5,000 train and 1,000 test images in ten balanced classes.

    Every class is closed under mirroring, so `flip_ok`. mean, std: per channel over all training pixels, in [0, 1].
    Source: none; made for this toolkit (issue A), so that it can ship without a licence or a download.
    """

    name = "shapes"
    toy: ClassVar[bool] = True
    budget: ClassVar[Literal["full", "mid", "quick"]] = "quick"
    classes = len(CLASSES)
    shape = (3, SIZE, SIZE)
    mean = (0.4959, 0.4965, 0.4957)
    std = (0.1003, 0.1011, 0.1012)
    flip_ok = True

    def find(self, root: Path | None) -> Source:
        """No files: the generator is the source."""
        return Source((), "procedural")

    def load(self, split: Split, root: Path | None) -> Images:
        """All images of `split`, uint8 (N, 3, 32, 32), and labels; the same bytes on every machine."""
        x, y = generate(split)
        return Images(torch.from_numpy(x), torch.from_numpy(y))


__all__ = ["CENTRE", "CLASSES", "CORNER", "NOISE", "Shapes", "generate"]
