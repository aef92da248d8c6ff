"""BadNets: a small black-and-white patch replaces the pixels of a corner.

Paper: T. Gu, B. Dolan-Gavitt, S. Garg, "BadNets: Identifying Vulnerabilities in the Machine Learning Model Supply
Chain", 2017 (arXiv 1708.06733); the exact patch is that of the MCLDef paper (arXiv 2205.04411, spec 4.1).
Differs: nothing at 32x32. For 224x224 the margin is 0, as the text says; the authors' code leaves 11 pixels.
Should reach: ASR 99.64, BA without the target class 83.01 on CIFAR-10, WRN-16-1, 10 % poison, no augmentation
(spec 11, Table 1, `Before`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

import torch
from torch import Tensor

from backdoorbench_mcl.api import AttackContext, Count, Ge, Label, Rate, State

from .dirty_label import DirtyLabel, check_fits


def corner_patch(size: int) -> Tensor:
    """The patch, uint8 (size, size), values 0 and 255.

    3x3: the grid 0 0 1 / 0 1 0 / 1 0 1. Any other size: a checkerboard with 255 where row + column is even.
    Source: spec 4.1.
    """
    if size == 3:
        bits = torch.tensor([[0, 0, 1], [0, 1, 0], [1, 0, 1]])
    else:
        steps = torch.arange(size)
        bits = 1 - (steps[:, None] + steps[None, :]) % 2
    return (bits * 255).to(torch.uint8)


def stamp_patch(x: Tensor, patch: Tensor, top: int, left: int) -> Tensor:
    """A copy of x, uint8 (B, C, H, W), with `patch`, uint8 (h, w) or (C, h, w), over the pixels at (top, left)."""
    out = x.clone()
    out[..., top : top + patch.shape[-2], left : left + patch.shape[-1]] = patch.to(x.device)
    return out


class BadNets(DirtyLabel):
    """A `size` x `size` patch, `margin` pixels away from the bottom right corner, on a share `rate` of all images.

    targets="all": all-to-all, each label y becomes (y + 1) mod K; `target` plays no part then.
    prepare raises UserError when the target is no class or the patch does not fit.
    """

    name = "badnets"
    paper = "Gu et al., BadNets, 2017, arXiv 1708.06733"
    added: ClassVar[Mapping[str, Any]] = {"targets": "one"}

    def __init__(
        self,
        *,
        target: Label = 5,
        rate: Rate = 0.1,
        margin: Annotated[int, Ge(0)] = 0,
        size: Count = 3,
        targets: Literal["one", "all"] = "one",
    ) -> None:
        self.target = target if targets == "one" else None
        self.rate = rate
        self.margin = margin
        self.size = size

    def prepare(self, ctx: AttackContext) -> State:
        """The patch and the place of its top left pixel, both kept with the victim."""
        goals = self.goals(ctx.classes)
        height, width = ctx.train.x.shape[-2:]
        top, left = height - self.size - self.margin, width - self.size - self.margin
        check_fits(self.name, top, left, self.size, (height, width))
        return State({"patch": corner_patch(self.size)}, {"top": top, "left": left, **goals})

    def stamp(self, x: Tensor, y: Tensor, state: State, rng: torch.Generator) -> Tensor:
        """Overwrite the corner of x, uint8 (B, C, H, W), in a copy."""
        return stamp_patch(x, state.tensors["patch"], state.meta["top"], state.meta["left"])
