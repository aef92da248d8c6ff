"""Blend: a faint colour patch, or on large images a whole picture, is mixed into the image.

Paper: X. Chen et al., "Targeted Backdoor Attacks on Deep Learning Systems Using Data Poisoning", 2017 (arXiv
1712.05526); patch, place and blend ratio are those of the MCLDef paper (arXiv 2205.04411, spec 4.3).
Differs: the colours are drawn once per victim seed (the printed patch is lost); `colours="grey"`, `alpha=0.2` is the
pattern of the authors' code. From 64 pixels up a generated picture, always the same, stands in for the authors'
cartoon, mixed in by them with 0.2; `pattern` says otherwise. The picture is made at the size of the images.
Should reach: ASR 98.98, BA without the target class 84.20 on CIFAR-10, WRN-16-1, 10 % poison, no augmentation
(spec 11, Table 1, `Before`). At alpha 0.1 nine pixels change by at most 25 grey levels, so ASR varies with the seed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from backdoorbench_mcl.api import AttackContext, Label, Rate, State

from .dirty_label import CHUNK, DirtyLabel, check_fits

Float = npt.NDArray[np.float64]

LARGE = 64  # pixels from which "auto" mixes in the picture
PICTURE_SEED = 20220506  # spec 4.3
GREY = ((255, 128, 255), (128, 255, 128), (255, 128, 128))  # authors' code (spec 4.3)


def draw_colours(colours: Literal["random", "grey"], channels: int, rng: torch.Generator) -> Tensor:
    """The 3x3 patch, uint8 (C, 3, 3): uniform over 0..255 per channel, or the fixed grey levels."""
    if colours == "random":
        return torch.randint(0, 256, (channels, 3, 3), generator=rng, dtype=torch.uint8)
    return torch.tensor(GREY, dtype=torch.uint8).expand(channels, 3, 3).clone()


class _Words:
    """Numbers from the raw 64-bit words of PCG64, whose stream NumPy guarantees (that of Generator it does not)."""

    def __init__(self, seed: int) -> None:
        self._bits = np.random.PCG64(seed)

    def uniform(self, low: float, high: float, *shape: int) -> Float:
        """Uniform in [low, high), float64 of `shape`."""
        words = np.asarray(self._bits.random_raw(int(np.prod(shape))), dtype=np.uint64) >> np.uint64(11)
        return (low + (high - low) * words.astype(np.float64) / 2.0**53).reshape(shape)

    def below(self, bound: int, *shape: int) -> Float:
        """Whole numbers in [0, bound) of `shape`."""
        return np.floor(self.uniform(0, bound, *shape))


def picture(channels: int, height: int, width: int) -> Tensor:
    """The generated picture, uint8 (C, H, W): eight waves for each channel, then ten filled discs.

    Waves run 0 to 6 cycles along each axis, the sum is stretched to 0..255; the radius of a disc is 4 to 12 % of the
    width. All draws come from one fixed seed: the picture is the trigger, for every victim. Source: spec 4.3.
    """
    words = _Words(PICTURE_SEED)
    cycles = np.zeros((8, 2))
    for wave in range(8):
        while not cycles[wave].any():
            cycles[wave] = words.below(7, 2)
    amplitude, phase = words.uniform(0.3, 1, 8, channels), words.uniform(0, 2 * np.pi, 8, channels)
    u, v = np.arange(width) / width, np.arange(height)[:, None] / height
    out = np.zeros((channels, height, width))
    for (fx, fy), scale, shift in zip(cycles, amplitude, phase, strict=True):
        turn = 2 * np.pi * (fx * u + fy * v)  # (H, W)
        out += scale[:, None, None] * np.cos(turn + shift[:, None, None])
    low, high = out.min((1, 2), keepdims=True), out.max((1, 2), keepdims=True)
    out = 255 * (out - low) / (high - low)
    for _ in range(10):
        row, column = words.uniform(0, 1, 2) * (height, width)
        radius = words.uniform(0.04 * width, 0.12 * width, 1)
        inside = (np.arange(height)[:, None] - row) ** 2 + (np.arange(width) - column) ** 2 <= radius**2
        out[:, inside] = words.below(256, channels, 1)
    # a hair above: the cosines of two machines may differ in their last bit
    return torch.from_numpy(np.floor(out + 1e-9).astype(np.uint8))


def blend_patch(x: Tensor, patch: Tensor, top: int, left: int, alpha: float) -> Tensor:
    """A copy of x, uint8 (B, C, H, W), with (1 - alpha) * x + alpha * patch, truncated, under patch, uint8 (C, h, w).

    float64, and a hair above the product before the cut: the exact value 7 must not become 6 because its binary
    sum came out as 6.999... .
    """
    out = x.clone()
    paint = alpha * patch.to(x.device).double()
    window = out[..., top : top + patch.shape[-2], left : left + patch.shape[-1]]
    for part in window.split(CHUNK):  # eight bytes a value: a whole test set of large images would be gigabytes
        part.copy_(((1 - alpha) * part.double() + paint + 1e-9).floor_())
    return out


class Blend(DirtyLabel):
    """A 3x3 patch at rows and columns 18-20 of 32, mixed in with weight `alpha`, on a share `rate` of all images.

    pattern: "full" mixes in a generated picture of the images' size, "patch" the patch, whose cells grow with the
    image; "auto" is the picture where no side is below 64 pixels, else the patch. colours: of the patch.
    targets="all": all-to-all, each label y becomes (y + 1) mod K; `target` plays no part then.
    prepare raises UserError when the target is no class or the image is too small.
    """

    name = "blend"
    paper = "Chen et al., Targeted Backdoor Attacks, 2017, arXiv 1712.05526"
    added: ClassVar[Mapping[str, Any]] = {"pattern": "auto", "targets": "one"}

    def __init__(
        self,
        *,
        target: Label = 5,
        rate: Rate = 0.1,
        alpha: Rate = 0.1,
        colours: Literal["random", "grey"] = "random",
        pattern: Literal["auto", "patch", "full"] = "auto",
        targets: Literal["one", "all"] = "one",
    ) -> None:
        self.target = target if targets == "one" else None
        self.rate = rate
        self.alpha = alpha
        self.colours: Literal["random", "grey"] = colours
        self.pattern = pattern

    def prepare(self, ctx: AttackContext) -> State:
        """The picture, or the patch in colours from ctx.rng, and the place of its top left pixel."""
        goals = self.goals(ctx.classes)
        channels, height, width = ctx.train.x.shape[1:]
        if self.pattern == "full" or (self.pattern == "auto" and min(height, width) >= LARGE):
            return State({"patch": picture(channels, height, width)}, {"top": 0, "left": 0, **goals})
        cell = max(1, min(height, width) // 32)
        top, left = 18 * height // 32, 18 * width // 32
        check_fits(self.name, top, left, 3 * cell, (height, width))
        patch = draw_colours(self.colours, channels, ctx.rng)
        patch = patch.repeat_interleave(cell, dim=1).repeat_interleave(cell, dim=2)  # (C, 3 cell, 3 cell)
        return State({"patch": patch}, {"top": top, "left": left, **goals})

    def stamp(self, x: Tensor, y: Tensor, state: State, rng: torch.Generator) -> Tensor:
        """Blend the patch into x, uint8 (B, C, H, W), in a copy."""
        return blend_patch(x, state.tensors["patch"], state.meta["top"], state.meta["left"], self.alpha)
