"""Numbers that core and plugins take in the same way: of pixels, of outliers. Free of torch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

FLOOR = 0.01  # of the median: the smallest deviation that is believed
_COUNTED = 2 << 20  # pixels of a channel counted at once: bincount makes 8 bytes of each


def statistics(x: NDArray[np.uint8]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """uint8 (N, C, H, W) -> mean and standard deviation per channel over all pixels in [0, 1], to 4 decimals.

    Sums of integers, so the result does not depend on the order of the images. A constant channel gets 1/255, the
    smallest step a pixel can make, so that dividing by it stays possible.
    """
    counts = np.zeros((x.shape[1], 256), np.int64)
    rows = max(1, _COUNTED // (x.shape[2] * x.shape[3]))
    for start in range(0, len(x), rows):
        for channel in range(x.shape[1]):
            counts[channel] += np.bincount(x[start : start + rows, channel].ravel(), minlength=256)
    values = np.arange(256) / 255.0
    share = counts / counts.sum(axis=1, keepdims=True)
    mean = share @ values
    std = np.sqrt(((values[None] - mean[:, None]) ** 2 * share).sum(axis=1))
    return tuple(round(float(m), 4) for m in mean), tuple(round(max(float(s), 1 / 255), 4) for s in std)


def anomaly_index(norms: Sequence[float]) -> tuple[float, ...]:
    """`abs(L - median) / (1.4826 median(abs(L - median)))` of every norm L, with numpy's median (spec 5.3).

    Example: `anomaly_index((10, 50, 52, 54, 56))[0]` is 14.16.
    """
    values = np.asarray(norms, dtype=np.float64)
    median = float(np.median(values))
    away = np.abs(values - median)
    spread = max(1.4826 * float(np.median(away)), FLOOR * median)
    return tuple(float(value) / spread if spread else 0.0 for value in away)


__all__ = ["FLOOR", "anomaly_index", "statistics"]
