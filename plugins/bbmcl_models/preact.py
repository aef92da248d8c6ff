"""preactresnet18: residual blocks whose batch norm and ReLU come before each convolution, for images of 32x32 and up.

Paper: K. He et al., "Identity Mappings in Deep Residual Networks", ECCV 2016; 2-2-2-2 blocks, widths 64-128-256-512.
The usual victim of BackdoorBench. The stem is a 3x3 convolution of stride 1 at any image size, so that 224x224 costs as
much as resnet18's `cifar` stem does there. Where a block changes the shape, the shortcut is a 1x1 convolution of the
activated input. A last batch norm and ReLU stand before the pooling, as in the paper; some public versions have none.
Differs: initialisation is resnet18's.
Should reach: 11,172,170 parameters (K = 10). The MCLDef paper does not use it, so no printed number is claimed.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from backdoorbench_mcl.api import Classifier, Model

from .resnet import WIDTHS, conv3x3, initialise


class PreActBlock(nn.Module):
    """conv2(relu(bn2(conv1(a)))) + shortcut with a = relu(bn1(x)), (B, channels, H, W) -> (B, out, H/s, W/s)."""

    def __init__(self, channels: int, out: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv1 = conv3x3(channels, out, stride)
        self.bn2 = nn.BatchNorm2d(out)
        self.conv2 = conv3x3(out, out, 1)
        changes = stride != 1 or channels != out
        self.shortcut = nn.Conv2d(channels, out, 1, stride, bias=False) if changes else None

    def forward(self, x: Tensor) -> Tensor:
        active = torch.relu(self.bn1(x))
        residual: Tensor = self.conv2(torch.relu(self.bn2(self.conv1(active))))
        return residual + (x if self.shortcut is None else self.shortcut(active))


def _group(channels: int, out: int, stride: int) -> nn.Sequential:
    return nn.Sequential(PreActBlock(channels, out, stride), PreActBlock(out, out, 1))


class PreActResNet(Classifier):
    """Pixels (B, C, H, W) in [0, 1] -> logits (B, classes); embedding (B, 512), all entries >= 0.

    The stages are the raw outputs of the four groups, before the last batch norm.
    """

    def __init__(self, classes: int, channels: int) -> None:
        super().__init__()
        self.conv1 = conv3x3(channels, 64, 1)
        self.layer1 = _group(64, WIDTHS[0], 1)
        self.layer2 = _group(WIDTHS[0], WIDTHS[1], 2)
        self.layer3 = _group(WIDTHS[1], WIDTHS[2], 2)
        self.layer4 = _group(WIDTHS[2], WIDTHS[3], 2)
        self.bn = nn.BatchNorm2d(WIDTHS[3])
        self.fc = nn.Linear(WIDTHS[3], classes)
        initialise(self)

    def features(self, x: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        one = self.layer1(self.conv1(x))  # (B, 64, H, W)
        two = self.layer2(one)  # (B, 128, H/2, W/2)
        three = self.layer3(two)  # (B, 256, H/4, W/4)
        four = self.layer4(three)  # (B, 512, H/8, W/8)
        # a mean and not adaptive_avg_pool2d, whose CUDA backward is not deterministic
        return torch.relu(self.bn(four)).mean((2, 3)), (one, two, three, four)

    def head(self, z: Tensor) -> Tensor:
        logits: Tensor = self.fc(z)
        return logits


class PreActResNet18(Model):
    """Pre-activation ResNet-18. Example: `PreActResNet18().build(10, (3, 32, 32))`."""

    name = "preactresnet18"
    paper = "He et al., Identity Mappings in Deep Residual Networks, ECCV 2016"

    def build(self, classes: int, shape: tuple[int, int, int]) -> PreActResNet:
        return PreActResNet(classes, shape[0])
