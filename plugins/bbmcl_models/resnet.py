"""resnet18 (basic blocks 2-2-2-2, widths 64-128-256-512) with a choice of stem and of contrastive feature.

Paper: K. He et al., "Deep Residual Learning for Image Recognition", CVPR 2016. Source: spec 3.2.
State-dict names are torchvision's (`conv1`, `bn1`, `layer1.0.conv1`, `layer2.0.downsample.0`, ..., `fc`): public
checkpoints load. Convolutions are bias-free and drawn from N(0, 2 / (k k out)); batch norm starts at 1 and 0, that of
the last layer of a block included.

`stem`: `imagenet` is a 7x7 convolution of stride 2 and a max-pool, `cifar` a 3x3 convolution of stride 1, no pool.
`auto` takes `cifar` up to 64 pixels, where a stride of 32 would leave maps of 2x2 or less, and `imagenet` above: at
224x224 the `cifar` stem, which the authors ran, costs 27.2 G multiply-adds an image and the other 1.8 G.

`feature`: `pool` is the input of the last layer, 512 numbers. `grid` is what the authors' contrastive loss really
compared: averages of tiles of 4x4 of the last map, 512 for each tile; at 32x32 there is one tile and nothing differs.
The tiles must cover the map evenly; then the mean of their averages is the global mean, and `head` takes it before the
last layer. So `grid` computes the same logits from an embedding that also knows places.

Differs: the paper's option B shortcuts (1x1 convolutions) only; the pooling is global at any size.
Should reach: ASR 100, BA without the target class 79.16 as a BadNets victim on ImageNet-20 (spec 11, Table 1,
`Before`).
Parameters: 11,173,962 (K = 10, cifar stem), 11,179,092 (K = 20, cifar), 11,186,772 (K = 20, imagenet).
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from backdoorbench_mcl.api import Classifier, Model, UserError

Stem = Literal["imagenet", "cifar"]

CIFAR_UP_TO = 64  # pixels, for stem=auto
TILE = 4  # of feature=grid (spec 3.2)
WIDTHS = (64, 128, 256, 512)


def conv3x3(channels: int, out: int, stride: int) -> nn.Conv2d:
    """A bias-free 3x3 convolution that keeps the size at stride 1."""
    return nn.Conv2d(channels, out, 3, stride=stride, padding=1, bias=False)


def initialise(net: nn.Module) -> None:
    """He-normal convolutions by fan-out, batch norm 1 and 0 (spec 3.2); the linear layer keeps PyTorch's default."""
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, nn.BatchNorm2d):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)


class BasicBlock(nn.Module):
    """relu(bn2(conv2(relu(bn1(conv1(x))))) + shortcut), (B, channels, H, W) -> (B, out, H/stride, W/stride)."""

    def __init__(self, channels: int, out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = conv3x3(channels, out, stride)
        self.bn1 = nn.BatchNorm2d(out)
        self.conv2 = conv3x3(out, out, 1)
        self.bn2 = nn.BatchNorm2d(out)
        self.downsample: nn.Sequential | None = None
        if stride != 1 or channels != out:
            self.downsample = nn.Sequential(nn.Conv2d(channels, out, 1, stride, bias=False), nn.BatchNorm2d(out))

    def forward(self, x: Tensor) -> Tensor:
        residual = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
        return torch.relu(residual + (x if self.downsample is None else self.downsample(x)))


def _group(channels: int, out: int, stride: int) -> nn.Sequential:
    return nn.Sequential(BasicBlock(channels, out, stride), BasicBlock(out, out, 1))


class ResNet(Classifier):
    """Pixels (B, C, H, W) in [0, 1] -> logits (B, classes); stages: the four groups' outputs, all entries >= 0.

    tile: None for an embedding (B, 512), else the side of the averaged tiles: (B, 512 * tiles).
    """

    def __init__(self, classes: int, channels: int, stem: Stem, tile: int | None) -> None:
        super().__init__()
        self.stem = stem
        self.tile = tile
        large = stem == "imagenet"
        self.conv1 = nn.Conv2d(channels, 64, 7, 2, 3, bias=False) if large else conv3x3(channels, 64, 1)
        self.bn1 = nn.BatchNorm2d(64)
        self.layer1 = _group(64, WIDTHS[0], 1)
        self.layer2 = _group(WIDTHS[0], WIDTHS[1], 2)
        self.layer3 = _group(WIDTHS[1], WIDTHS[2], 2)
        self.layer4 = _group(WIDTHS[2], WIDTHS[3], 2)
        self.fc = nn.Linear(WIDTHS[3], classes)
        initialise(self)

    def features(self, x: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        start = torch.relu(self.bn1(self.conv1(x)))
        if self.stem == "imagenet":
            start = F.max_pool2d(start, 3, 2, 1)
        one = self.layer1(start)  # (B, 64, h, w); h = H, or H/4 behind the imagenet stem
        two = self.layer2(one)  # (B, 128, h/2, w/2)
        three = self.layer3(two)  # (B, 256, h/4, w/4)
        four = self.layer4(three)  # (B, 512, h/8, w/8)
        # means and not adaptive_avg_pool2d, whose CUDA backward is not deterministic
        embed = four.mean((2, 3)) if self.tile is None else F.avg_pool2d(four, self.tile).flatten(1)
        return embed, (one, two, three, four)

    def head(self, z: Tensor) -> Tensor:
        logits: Tensor = self.fc(z if self.tile is None else z.unflatten(1, (WIDTHS[3], -1)).mean(2))
        return logits


class ResNet18(Model):
    """ResNet-18; stem and feature as the module's card tells. Example: `ResNet18().build(10, (3, 32, 32))`.

    Building raises UserError where feature=grid does not fit the image size.
    """

    name = "resnet18"
    paper = "He et al., Deep Residual Learning for Image Recognition, CVPR 2016"

    def __init__(
        self, *, stem: Literal["auto", "imagenet", "cifar"] = "auto", feature: Literal["pool", "grid"] = "pool"
    ) -> None:
        self.stem = stem
        self.feature = feature

    def build(self, classes: int, shape: tuple[int, int, int]) -> ResNet:
        small = max(shape[1:]) <= CIFAR_UP_TO if self.stem == "auto" else self.stem == "cifar"
        stride = 8 if small else 32
        grid = self.feature == "grid"
        if grid and any(-(-size // stride) % TILE for size in shape[1:]):
            stem, side = ("cifar" if small else "imagenet"), stride * TILE
            raise UserError(
                f"resnet18: feature=grid needs a last map that tiles of {TILE}x{TILE} cover evenly; images of "
                f"{shape[1]}x{shape[2]} were given, expected multiples of {side} with the {stem} stem"
            )
        return ResNet(classes, shape[0], "cifar" if small else "imagenet", TILE if grid else None)
