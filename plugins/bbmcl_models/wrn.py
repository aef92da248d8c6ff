"""Wide residual networks, for images of 32x32 and larger.

Paper: S. Zagoruyko, N. Komodakis, "Wide Residual Networks", BMVC 2016.
Differs: no dropout; the pooling is global at any size, not a fixed 8x8.
Should reach: BA 82.4 as a BadNets victim on CIFAR-10, WRN-16-1, 50 epochs without augmentation (the authors', spec
1.2).
Architecture and initialisation: spec 3.1. State-dict names are
those of the widely used WideResNet-pytorch code (`conv1`, `block1.layer.0.bn1`, ..., `bn1`, `fc`), so that public
checkpoints load. wrn-16-1 for 3x32x32 and 10 classes: 175,066 parameters in 43 tensors (82 with the batch-norm
buffers of the state dict), 26.66 M multiply-adds an image.
"""

from __future__ import annotations

import math
import re
from typing import Any

import torch
from torch import Tensor, nn

from backdoorbench_mcl.api import Classifier, Count, Model, UserError


def _conv(channels: int, out: int, size: int, stride: int) -> nn.Conv2d:
    conv = nn.Conv2d(channels, out, size, stride=stride, padding=size // 2, bias=False)
    nn.init.normal_(conv.weight, 0.0, math.sqrt(2.0 / (size * size * out)))
    return conv


class Block(nn.Module):
    """Pre-activation block, (B, channels, H, W) -> (B, out, H/stride, W/stride).

    With equal channels the shortcut is the raw input, else a 1x1 convolution of the activated input.
    """

    def __init__(self, channels: int, out: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv1 = _conv(channels, out, 3, stride)
        self.bn2 = nn.BatchNorm2d(out)
        self.conv2 = _conv(out, out, 3, 1)
        self.convShortcut = None if channels == out else _conv(channels, out, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        active = torch.relu(self.bn1(x))
        residual: Tensor = self.conv2(torch.relu(self.bn2(self.conv1(active))))
        return residual + (x if self.convShortcut is None else self.convShortcut(active))


class Group(nn.Module):
    """`blocks` blocks at one resolution; the first one changes the channels and applies the stride."""

    def __init__(self, blocks: int, channels: int, out: int, stride: int) -> None:
        super().__init__()
        first = Block(channels, out, stride)
        self.layer = nn.Sequential(first, *(Block(out, out, 1) for _ in range(blocks - 1)))

    def forward(self, x: Tensor) -> Tensor:
        maps: Tensor = self.layer(x)
        return maps


class WideResNet(Classifier):
    """Pixels (B, C, H, W) in [0, 1] -> logits (B, classes); embedding (B, 64 * widen), all entries >= 0.

    The stages are the raw outputs of the three groups, before the head's batch norm (spec 3.1).
    """

    def __init__(self, depth: int, widen: int, classes: int, channels: int) -> None:
        super().__init__()
        blocks = (depth - 4) // 6
        widths = [16 * widen, 32 * widen, 64 * widen]
        self.conv1 = _conv(channels, 16, 3, 1)
        self.block1 = Group(blocks, 16, widths[0], 1)
        self.block2 = Group(blocks, widths[0], widths[1], 2)
        self.block3 = Group(blocks, widths[1], widths[2], 2)
        self.bn1 = nn.BatchNorm2d(widths[2])
        self.fc = nn.Linear(widths[2], classes)
        nn.init.zeros_(self.fc.bias)

    def features(self, x: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        one = self.block1(self.conv1(x))  # (B, 16k, H, W)
        two = self.block2(one)  # (B, 32k, H/2, W/2)
        three = self.block3(two)  # (B, 64k, H/4, W/4)
        # a mean and not adaptive_avg_pool2d, whose CUDA backward is not deterministic
        return torch.relu(self.bn1(three)).mean((2, 3)), (one, two, three)

    def head(self, z: Tensor) -> Tensor:
        logits: Tensor = self.fc(z)
        return logits


class WRN(Model):
    """The family `wrn-DEPTH-WIDEN`: (depth - 4) / 6 blocks in each of three groups of 16, 32, 64 times widen channels.

    Raises UserError for a depth that does not fit. Example: `WRN(depth=16, widen=1).build(10, (3, 32, 32))`.
    """

    name = "wrn"
    paper = "Zagoruyko and Komodakis, Wide Residual Networks, BMVC 2016"

    def __init__(self, *, depth: Count = 16, widen: Count = 1) -> None:
        if depth < 10 or (depth - 4) % 6 != 0:
            below = max(10, depth - (depth - 4) % 6)
            raise UserError(
                f"wrn: depth={depth} was given, expected 6n+4 with n >= 1 (10, 16, 22, 28, ...); "
                f"the nearest are {below} and {below + 6}"
            )
        self.depth = depth
        self.widen = widen

    @classmethod
    def parse(cls, text: str) -> dict[str, Any]:
        """`"-16-1"` -> `{"depth": 16, "widen": 1}`. Raises UserError for any other form."""
        found = re.fullmatch(r"-(\d+)-(\d+)", text)
        if found is None:
            raise UserError(f"model {cls.name + text!r}: expected wrn-DEPTH-WIDEN with two numbers, as in wrn-16-1")
        return {"depth": int(found[1]), "widen": int(found[2])}

    def build(self, classes: int, shape: tuple[int, int, int]) -> WideResNet:
        return WideResNet(self.depth, self.widen, classes, shape[0])
