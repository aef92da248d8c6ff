"""The classes of the plugin; imported in children only."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from backdoorbench_mcl.api import Attack, Classifier, Goal, Images, Model, Poisoned, State
from backdoorbench_mcl.kit import choose


class _Stem(Classifier):
    def __init__(self, classes: int, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, 8, 1)
        self.bn = nn.BatchNorm2d(8)
        self.fc = nn.Linear(8, classes)

    def features(self, x: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        maps = torch.relu(self.bn(self.conv(F.avg_pool2d(x, 32))))
        return maps.mean((2, 3)), (maps,)

    def head(self, z: Tensor) -> Tensor:
        return torch.as_tensor(self.fc(z))


class Stem(Model):
    name = "stem"

    def build(self, classes: int, shape: tuple[int, int, int]) -> Classifier:
        return _Stem(classes, shape[0])


class Ghost(Attack):
    """A white corner on a tenth of the images. None counts, so that no ASR can be too weak for a defense to be run."""

    name = "ghost"
    target = 1

    def poison(self, train: Images, state: State, rng: torch.Generator) -> Poisoned:
        index = choose(len(train), len(train) // 10, rng)
        x = train.x[index]
        x[..., -3:, -3:] = 255
        return Poisoned(index, x, torch.full_like(index, self.target))

    def stamp(self, x: Tensor, y: Tensor, state: State, rng: torch.Generator) -> Tensor:
        out = x.clone()
        out[..., -3:, -3:] = 255
        return out

    def goal(self, y: Tensor, state: State) -> Goal:
        return Goal(torch.full_like(y, self.target), torch.zeros_like(y, dtype=torch.bool))
