"""`shapes`: the embedded default data set. A toy: procedural, 10 classes, 3x32x32, 5,000 train and 1,000 test images.

One filled shape per image on a textured background, at a random place, size, angle and colour, over clutter and
under noise. Clutter falls on the bottom-right corner and on the centre region in a fixed share of the images, so
that a pixel patch there is nothing new. Measured properties: docs/shapes.md.

Every pixel is a function of integers: raw 64-bit words of PCG64, whose stream NumPy guarantees for good (the
methods of `Generator` it does not), and int32/int64 sums, products, shifts and floor divisions. No float takes
part, so that the bytes agree on every machine and NumPy version. `generate` touches no global state.
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

SEED = 20220506
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
    held = np.zeros(u.shape, dtype=np.int64)
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
    return _sides(u, v, _TRI, 540) == 3


def _cross(u: Int, v: Int) -> Bool:
    return (np.minimum(abs(u), abs(v)) < 290) & (np.maximum(abs(u), abs(v)) < 960)


def _pentagon(u: Int, v: Int) -> Bool:
    return _sides(u, v, _PENTA, 760) == 5


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
    return inside.sum(axis=(2, 4), dtype=np.int64)


# ---------------------------------------------------------------- what surrounds them


def _background(words: _Words, base: Int, n: int) -> Int:
    """Base colour (n, 3) plus smooth blotches and soft stripes: (n, 3, 32, 32), unclipped."""
    knots = words.between(-BLOTCH, BLOTCH, n, 3, 5, 5)
    at = np.arange(SIZE)
    cell, part = at // 8, at % 8
    rows = knots[:, :, cell] * (8 - part)[:, None] + knots[:, :, cell + 1] * part[:, None]
    blotch = (rows[..., cell] * (8 - part) + rows[..., cell + 1] * part) // 64  # bilinear
    slope = words.between(-4, 4, n, 2)
    period = words.between(24, 48, n)[:, None, None]
    phase = words.below(64, n)[:, None, None]
    wave = (at[:, None] * slope[:, 0, None, None] + at * slope[:, 1, None, None] + phase) % period
    stripe = 4 * np.minimum(wave, period - wave) - period  # triangular, -period .. period
    tint = words.between(-STRIPE, STRIPE, n, 3)[:, :, None, None]
    return base[:, :, None, None] + blotch + stripe[:, None] * tint // 48


def _speck(words: _Words, image: Int, top: Int, left: Int, shown: Bool, reach: int) -> None:
    """Paint a random bit mask in two random colours, at a random opacity, over (n,) 3x3 squares of `image`."""
    n = len(image)
    kind = words.below(4, n, 1, 1, 1)
    colours = words.between(128 - reach, 127 + reach, n, 3, 2)
    colours = np.where(kind == 0, 255 * (colours > 127), colours)[:, :, :, None] if False else colours
    bits = words.below(4, n, 3, 3)  # 0, 1: a colour; 2, 3: what is below
    ink = np.where(bits[:, None] == 0, colours[:, :, 0, None, None], colours[:, :, 1, None, None])
    opacity = words.between(2, 8, n)[:, None, None, None]
    rows, cols = top[:, None] + np.arange(3), left[:, None] + np.arange(3)
    where = (np.arange(n)[:, None, None, None], np.arange(3)[None, :, None, None],
             rows[:, None, :, None], cols[:, None, None, :])
    below = image[where]
    paint = (bits[:, None] < 2) & shown[:, None, None, None]
    image[where] = np.where(paint, below + (ink - below) * opacity // 8, below)
BASE, BLOTCH, STRIPE, SPECKS, SHARE, LOW, SPAN = 24, 16, 8, 4, 4, 30, 30
CHROMA = 0
REACH = 40
BLUR = 1


def _paint(label: int, words: _Words, n: int) -> npt.NDArray[np.uint8]:
    base = words.between(128 - BASE, 127 + BASE, n, 3)
    image = _background(words, base, n)
    cover = _cover(label, words, n)[:, None]  # (n, 1, 32, 32)
    fill = base + (2 * words.below(2, n, 3) - 1) * words.between(LOW, LOW + SPAN, n, 3)
    shade = words.between(-BLOTCH // 2, BLOTCH // 2, n, 3, 2)
    at = np.arange(SIZE) - 16
    ink = fill[:, :, None, None] + (at[:, None] * shade[:, :, 0, None, None] + at * shade[:, :, 1, None, None]) // 16
    strength = words.between(5, 8, n)[:, None, None, None]
    image = image + (ink - image) * cover * strength // 32
    for _ in range(SPECKS):
        _speck(words, image, words.below(30, n), words.below(30, n), words.below(2, n) == 0, REACH)
    for spot in (CORNER, CENTRE):
        spread = words.between(-1, 0 if spot is CORNER else 1, n, 2) + spot.start
        _speck(words, image, spread[:, 0], spread[:, 1], words.below(SHARE, n) == 0, 128 if spot is CORNER else REACH)
    for _ in range(BLUR):
        for axis in (2, 3):
            pad = np.pad(image, [(0, 0), (0, 0)] + [(1, 1) if a == axis else (0, 0) for a in (2, 3)], mode="edge")
            lo, hi = [slice(None)] * 4, [slice(None)] * 4
            lo[axis], hi[axis] = slice(0, SIZE), slice(2, SIZE + 2)
            image = (pad[tuple(lo)] + 2 * image + pad[tuple(hi)] + 2) // 4
    image += words.between(-NOISE, NOISE, n, 3 if CHROMA == 0 else 1, SIZE, SIZE) + words.between(-CHROMA, CHROMA, n, 3, SIZE, SIZE)
    return np.clip(image, 0, 255).astype(np.uint8)


def generate(split: Split) -> tuple[npt.NDArray[np.uint8], Int]:
    """Images uint8 (N, 3, 32, 32) and labels int64 (N,), classes in turn: 0, 1, .., 9, 0, .."""
    total = COUNTS[split]
    each = total // len(CLASSES)
    x = np.empty((total, 3, SIZE, SIZE), dtype=np.uint8)
    for label in range(len(CLASSES)):
        x[label :: len(CLASSES)] = _paint(label, _Words(SEED, list(COUNTS).index(split), label), each)
    return x, np.arange(total, dtype=np.int64) % len(CLASSES)
