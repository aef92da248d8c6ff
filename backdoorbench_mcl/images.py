"""Labelled images and how a training goes over them: uint8 at rest, float32 in [0, 1] in a batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

Augment = Callable[[Tensor, torch.Generator], Tensor]


class Batch(NamedTuple):
    """x: float32 (B, C, H, W) in [0, 1] on the device; y: int64 (B,) on the device; index: int64 (B,) on the CPU."""

    x: Tensor
    y: Tensor
    index: Tensor  # type: ignore[assignment]  # the field's term; tuple.index is of no use here


def joins(images: int, size: int) -> bool:
    """Whether batches of `size` leave a single image over, and others before it."""
    return images > size > 1 and images % size == 1


class Images:
    """Labelled images. x: uint8 (N, C, H, W); y: int64 (N,), all -1 where labels were not granted.

    Raises ValueError when shapes or dtypes differ. Example: `Images(x, y).batches(64, rng, augment)`.
    """

    def __init__(self, x: Tensor, y: Tensor) -> None:
        if x.dtype != torch.uint8 or x.ndim != 4:
            raise ValueError(f"images: expected uint8 (N, C, H, W), got {x.dtype} {tuple(x.shape)}")
        if y.dtype != torch.int64 or y.shape != x.shape[:1]:
            raise ValueError(f"labels: expected int64 ({len(x)},), got {y.dtype} {tuple(y.shape)}")
        self.x = x
        self.y = y

    def __len__(self) -> int:
        return len(self.x)

    def take(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Copies of the images at `index` (int64 or bool) and of their labels, in that order."""
        there = index.to(self.x.device)
        return self.x[there], self.y[there.to(self.y.device)]

    def subset(self, index: Tensor) -> Images:
        """The images at `index` (int64 or bool), in that order."""
        return Images(*self.take(index))

    def to(self, device: torch.device | str) -> Images:
        """The same images on `device`."""
        return Images(self.x.to(device), self.y.to(device))

    def batches(
        self, size: int, rng: torch.Generator | None = None, augment: Augment | None = None, *, lone: bool = True
    ) -> Iterator[Batch]:
        """One pass in batches of `size`, the last one shorter: in random order with `rng`, else in storage order.

        `augment(x_u8, rng) -> x_u8` sees uint8 batches and needs `rng`. An epoch is an index permutation; the
        images stay where they are. lone=False: a last batch of a single image joins the one before it.
        """
        if augment is not None and rng is None:
            raise ValueError("augmentation needs rng")
        order = torch.arange(len(self)) if rng is None else torch.randperm(len(self), generator=rng)
        parts = list(order.split(size))
        if not lone and joins(len(self), size):
            parts[-2:] = [torch.cat(parts[-2:])]
        for index in parts:
            x, y = self.take(index)  # (B, C, H, W) uint8, (B,)
            if augment is not None and rng is not None:
                x = augment(x, rng)
            yield Batch(x.float().div_(255.0), y, index)


__all__ = ["Augment", "Batch", "Images", "joins"]
