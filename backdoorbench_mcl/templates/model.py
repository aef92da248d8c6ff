"""mymethod: three convolutions with batch norm, global average pooling, a linear layer.

Paper: none yet; say here where the network comes from, what differs, and which accuracy it should reach on what.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn

from backdoorbench_mcl.api import Classifier, Count, Model


def _stage(before: int, after: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(before, after, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(after), nn.ReLU())


class Network(Classifier):
    """The normalisation is the base class's; here are the features, stage by stage, and the last linear layer."""

    def __init__(self, classes: int, channels: int, width: int) -> None:
        super().__init__()
        widths = [channels, width, 2 * width, 4 * width]
        self.stages = nn.ModuleList(_stage(before, after) for before, after in pairwise(widths))
        self.fc = nn.Linear(widths[-1], classes)

    def features(self, x: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        maps = []
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        return x.mean((2, 3)), tuple(maps)  # (B, D), three maps (B, C, H, W)

    def head(self, z: Tensor) -> Tensor:
        return torch.as_tensor(self.fc(z))


class MyMethod(Model):
    """width: channels of the first stage; they double from stage to stage."""

    name = "mymethod"

    def __init__(self, *, width: Count = 16) -> None:
        self.width = width

    def build(self, classes: int, shape: tuple[int, int, int]) -> Classifier:
        return Network(classes, shape[0], self.width)
