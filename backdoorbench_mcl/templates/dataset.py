"""mymethod: stripes at four angles, under noise, 3x32x32. Procedural: there are no files to find.

Paper: none yet; say here where the images come from and under which licence, and what differs.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Literal

import torch

from backdoorbench_mcl.api import Count, Dataset, Images, Source


class MyMethod(Dataset):
    """train, test: how many images each split has."""

    name = "mymethod"
    classes = 4
    shape = (3, 32, 32)
    mean = (0.5, 0.5, 0.5)
    std = (0.25, 0.25, 0.25)
    flip_ok = False  # a mirrored stripe is of another class
    toy = True  # made up: no claim may rest on it
    budget = "quick"

    def __init__(self, *, train: Count = 2000, test: Count = 400) -> None:
        self.sizes = {"train": train, "test": test}

    def find(self, root: Path | None) -> Source:
        return Source((), "procedural")

    def load(self, split: Literal["train", "test"], root: Path | None) -> Images:
        rng = torch.Generator().manual_seed({"train": 1, "test": 2}[split])
        count = self.sizes[split]
        y = torch.arange(count) % self.classes
        angle = (y * math.pi / self.classes)[:, None, None]
        down, across = torch.meshgrid(torch.arange(32.0), torch.arange(32.0), indexing="ij")
        phase = 2 * math.pi * torch.rand(count, 1, 1, generator=rng)
        wave = torch.sin(0.8 * (angle.cos() * across + angle.sin() * down) + phase)  # (N, H, W)
        noise = 30 * torch.randn(count, *self.shape, generator=rng)
        return Images((128 + 60 * wave[:, None] + noise).clamp(0, 255).to(torch.uint8), y)
