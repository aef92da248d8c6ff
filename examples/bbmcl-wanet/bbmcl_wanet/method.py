"""wanet: the whole image is warped a little, always in the same way; the attacker trains the network.

Paper: A. Nguyen, A. Tran, "WaNet - Imperceptible Warping-based Backdoor Attack", ICLR 2021 (arXiv 2102.10369). A k x k
grid of random offsets, divided by their mean size and multiplied by s, is interpolated to the size of the image: that
is how far each pixel looks aside. In each batch a share is warped and relabelled; twice as many images, in noise mode,
are warped with a random offset more at each pixel and keep their label, so that no other warp will do. k = 4, s = 0.5,
a share of 0.1 and the ratio of 2 are the paper's.
The authors' code settles what the paper leaves open, and is followed: the mean size is that of the 2 x k x k offsets
before s and interpolation; offsets are divided by the height of the image where coordinates run from -1 to 1, so that
one of 1 is (H - 1) / 2H pixels, just under half; the warped coordinates are clamped to the image, and those of the
noise mode once more after their noise; both counts of a batch are rounded down, the second from the first.
Differs: images are rounded to 256 levels after each warp, in training as in `stamp`, so that the trigger can be
realised. Where an image is no square, offsets along x are divided by its width. One target only, 5 by default (the
authors' is 0; they also attack all to all). The authors augment after the warp, by random crops, turns of up to 10
degrees and, on CIFAR-10, mirroring; here the recipe of the victims says what is done, before the warp.
Should reach: ASR 99.55 and BA 94.15 on CIFAR-10 in the paper, with PreAct-ResNet18 and far longer training; not run
here.
"""

from __future__ import annotations

from typing import Annotated

import torch
from torch import Tensor
from torch.nn import functional as F

from backdoorbench_mcl.api import (
    Attack,
    AttackContext,
    Batch,
    Classifier,
    Ge,
    Label,
    NonNegative,
    Positive,
    Rate,
    State,
    UserError,
)
from backdoorbench_mcl.kit import fit, share


def control_offsets(k: int, rng: torch.Generator) -> Tensor:
    """Offsets along x and y at k x k points, uniform in [-1, 1], then divided by their mean size: float32 (2, k, k)."""
    drawn = 2 * torch.rand(2, k, k, generator=rng) - 1
    return drawn / drawn.abs().mean()


def offsets(control: Tensor, strength: float, height: int, width: int) -> Tensor:
    """The control offsets, (2, k, k), times strength, bicubic at every pixel: float32 (H, W, 2), x first.

    The corners of the control grid are the corners of the image.
    """
    wide = F.interpolate(strength * control[None], size=(height, width), mode="bicubic", align_corners=True)
    return wide[0].permute(1, 2, 0)


def moved(grid: Tensor, offset: Tensor) -> Tensor:
    """The coordinates grid, (..., H, W, 2), from -1 to 1, moved by an offset of the same shape and clamped again."""
    height, width = grid.shape[-3:-1]
    return (grid + offset / torch.tensor([width, height], device=grid.device)).clamp(-1, 1)


def sampling_grid(offset: Tensor) -> Tensor:
    """Where each pixel looks, float32 (H, W, 2) for offsets of that shape: x and y from -1 to 1 between the centres of
    the outermost pixels, beyond which nobody looks.
    """
    height, width = offset.shape[:2]
    y, x = torch.meshgrid(torch.linspace(-1, 1, height), torch.linspace(-1, 1, width), indexing="ij")
    return moved(torch.stack([x, y], -1).to(offset.device), offset)


def warp(x: Tensor, grid: Tensor) -> Tensor:
    """Pixels x, float32 (B, C, H, W) in [0, 1], as seen through grid, (H, W, 2) or (B, H, W, 2): bilinear, then rounded
    to multiples of 1/255.
    """
    seen = F.grid_sample(x, grid.expand(len(x), -1, -1, -1), mode="bilinear", padding_mode="border", align_corners=True)
    return (seen * 255).round().clamp(0, 255) / 255


def shares(size: int, rate: float, cross: float) -> tuple[int, int]:
    """Of a batch of `size` images: how many are relabelled, and how many, `cross` for each of those, in noise mode."""
    poisoned = share(rate, size)
    return poisoned, min(share(cross, poisoned), size - poisoned)


class WaNet(Attack):
    """target: the label wanted. rate: share of each batch that is warped and relabelled. cross: images in noise mode
    for each of those, 0 for none. grid: control points along each side, k in the paper. strength: mean offset at them
    along each axis, in units of just under half a pixel, s in the paper.
    """

    name = "wanet"
    version = 2
    paper = "Nguyen and Tran, WaNet, ICLR 2021, arXiv 2102.10369"
    controls = "training"

    def __init__(
        self,
        *,
        target: Label = 5,
        rate: Rate = 0.1,
        cross: NonNegative = 2.0,
        grid: Annotated[int, Ge(2)] = 4,
        strength: Positive = 0.5,
    ) -> None:
        if rate * (1 + cross) > 1:
            raise UserError(
                f"wanet: rate={rate:g} and cross={cross:g} ask for {rate * (1 + cross):g} of each batch, expected at "
                "most 1; lower one of them"
            )
        self.target: int = target
        self.rate = rate
        self.cross = cross
        self.grid = grid
        self.strength = strength

    def prepare(self, ctx: AttackContext) -> State:
        """The offsets of this victim, from ctx.rng. Raises UserError where the target is no class."""
        if self.target >= ctx.classes:
            raise UserError(
                f"wanet: target={self.target} is not a class of this data set; expected 0..{ctx.classes - 1}"
            )
        height, width = ctx.train.x.shape[2:]
        return State({"offset": offsets(control_offsets(self.grid, ctx.rng), self.strength, height, width)})

    def train(self, model: Classifier, state: State, ctx: AttackContext) -> State:
        """Fit `model` to batches of relabelled, noisy and clean images, by ctx.recipe."""
        if shares(min(ctx.recipe.batch, len(ctx.train)), self.rate, self.cross)[0] == 0:
            raise UserError(
                f"wanet: rate={self.rate:g} of a batch of {ctx.recipe.batch} images is not one image; raise wanet.rate "
                "or train.batch"
            )
        grid = sampling_grid(state.tensors["offset"].to(ctx.device))

        def loss(batch: Batch) -> Tensor:
            return F.cross_entropy(model(self._seen(batch, grid, ctx.rng)), self._told(batch))

        fit(model, ctx.train.to(ctx.device), ctx, loss)
        return state

    def _seen(self, batch: Batch, grid: Tensor, rng: torch.Generator) -> Tensor:
        """The images of a batch as the network is shown them. Batches come in random order: the first will do."""
        poisoned, noisy = shares(len(batch.x), self.rate, self.cross)
        first, second, rest = batch.x.split([poisoned, noisy, len(batch.x) - poisoned - noisy])
        if noisy:
            noise = 2 * torch.rand(noisy, *grid.shape, generator=rng) - 1  # (B', H, W, 2)
            second = warp(second, moved(grid.expand_as(noise), noise.to(grid.device)))
        return torch.cat([warp(first, grid), second, rest])

    def _told(self, batch: Batch) -> Tensor:
        """The labels that go with `_seen`."""
        y = batch.y.clone()
        y[: shares(len(y), self.rate, self.cross)[0]] = self.target
        return y

    def stamp(self, x: Tensor, y: Tensor, state: State, rng: torch.Generator) -> Tensor:
        """x, uint8 (B, C, H, W), warped, in a copy."""
        grid = sampling_grid(state.tensors["offset"].to(x.device))
        return (warp(x.float() / 255, grid) * 255).round().to(torch.uint8)
