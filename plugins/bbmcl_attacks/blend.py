"""Blend: a small colour patch is mixed faintly into the image.

Paper: X. Chen et al., "Targeted Backdoor Attacks on Deep Learning Systems Using Data Poisoning", 2017 (arXiv
1712.05526); patch, place and blend ratio are those of the MCLDef paper (arXiv 2205.04411, spec 4.3).
Differs: the colours are drawn once per victim seed (the printed patch is lost); `colours="grey"`, `alpha=0.2` is the
pattern of the authors' code. On images larger than 63 pixels the cells of the patch grow with the image.
Should reach: ASR 98.98, BA without the target class 84.20 on CIFAR-10, WRN-16-1, 10 % poison, no augmentation
(spec 11, Table 1, `Before`). At alpha 0.1 nine pixels change by at most 25 grey levels, so ASR varies with the seed.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from backdoorbench_mcl.api import Attack, AttackContext, Images, Label, Poisoned, Rate, State

from .dirty_label import check_fits, check_target, poison_any_class

GREY = ((255, 128, 255), (128, 255, 128), (255, 128, 128))  # authors' code (spec 4.3)


def draw_colours(colours: Literal["random", "grey"], channels: int, rng: torch.Generator) -> Tensor:
    """The 3x3 patch, uint8 (C, 3, 3): uniform over 0..255 per channel, or the fixed grey levels."""
    if colours == "random":
        return torch.randint(0, 256, (channels, 3, 3), generator=rng, dtype=torch.uint8)
    return torch.tensor(GREY, dtype=torch.uint8).expand(channels, 3, 3).clone()


def blend_patch(x: Tensor, patch: Tensor, top: int, left: int, alpha: float) -> Tensor:
    """A copy of x, uint8 (B, C, H, W), with (1 - alpha) * x + alpha * patch, truncated, under patch, uint8 (C, h, w).

    float64, and a hair above the product before the cut: the exact value 7 must not become 6 because its binary
    sum came out as 6.999... .
    """
    out = x.clone()
    window = out[..., top : top + patch.shape[-2], left : left + patch.shape[-1]]
    mixed = (1 - alpha) * window.double() + alpha * patch.to(x.device).double()
    window.copy_((mixed + 1e-9).floor_().to(torch.uint8))
    return out


class Blend(Attack):
    """A 3x3 patch at rows and columns 18-20 of 32, mixed in with weight `alpha`, on a share `rate` of all images.

    prepare raises UserError when the target is no class or the image is too small.
    """

    name = "blend"
    target: int
    paper = "Chen et al., Targeted Backdoor Attacks, 2017, arXiv 1712.05526"

    def __init__(
        self,
        *,
        target: Label = 5,
        rate: Rate = 0.1,
        alpha: Rate = 0.1,
        colours: Literal["random", "grey"] = "random",
    ) -> None:
        self.target = target
        self.rate = rate
        self.alpha = alpha
        self.colours: Literal["random", "grey"] = colours

    def prepare(self, ctx: AttackContext) -> State:
        """Draw the colours from ctx.rng; they and the place of the top left pixel are kept with the victim."""
        check_target(self.name, self.target, ctx.classes)
        channels, height, width = ctx.train.x.shape[1:]
        cell = max(1, min(height, width) // 32)
        top, left = 18 * height // 32, 18 * width // 32
        check_fits(self.name, top, left, 3 * cell, (height, width))
        patch = draw_colours(self.colours, channels, ctx.rng)
        patch = patch.repeat_interleave(cell, dim=1).repeat_interleave(cell, dim=2)  # (C, 3 cell, 3 cell)
        return State({"patch": patch}, {"top": top, "left": left})

    def poison(self, train: Images, state: State, rng: torch.Generator) -> Poisoned:
        """floor(rate * N) blended images of any class, labelled as the target."""
        return poison_any_class(self, self.target, self.rate, train, state, rng)

    def stamp(self, x: Tensor, y: Tensor, state: State, rng: torch.Generator) -> Tensor:
        """Blend the patch into x, uint8 (B, C, H, W), in a copy."""
        return blend_patch(x, state.tensors["patch"], state.meta["top"], state.meta["left"], self.alpha)
