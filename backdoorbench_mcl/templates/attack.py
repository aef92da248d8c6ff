"""mymethod: a square of one grey in the top-left corner, with the label of the target class.

Paper: none yet; say here where the attack comes from, what differs, and which ASR it should reach on what.
"""

from __future__ import annotations

from typing import Annotated

import torch
from torch import Tensor

from backdoorbench_mcl.api import Attack, Count, Images, Interval, Label, Poisoned, Rate, State
from backdoorbench_mcl.kit import choose, share


class MyMethod(Attack):
    """target: the label wanted; rate: poisoned share of the training set; size: of the square; grey: its value."""

    name = "mymethod"

    def __init__(
        self,
        *,
        target: Label = 1,
        rate: Rate = 0.08,
        size: Count = 3,
        grey: Annotated[int, Interval(ge=0, le=255)] = 255,
    ) -> None:
        self.target = target
        self.rate = rate
        self.size = size
        self.grey = grey

    def poison(self, train: Images, state: State, rng: torch.Generator) -> Poisoned:
        index = choose(len(train), share(self.rate, len(train)), rng)  # (P,) int64
        x, y = train.take(index)
        return Poisoned(index, self.stamp(x, y, state, rng), torch.full_like(y, self.target or 0))

    def stamp(self, x: Tensor, y: Tensor, state: State, rng: torch.Generator) -> Tensor:
        out = x.clone()  # (B, C, H, W) uint8
        out[:, :, : self.size, : self.size] = self.grey
        return out
