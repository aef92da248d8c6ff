"""CL: label-consistent poison. Images of the target class are made hard to know, then carry a patch.

Paper: A. Turner, D. Tsipras, A. Madry, "Label-Consistent Backdoor Attacks", 2019 (arXiv 1912.02771); bound, steps, rate
and patch are those of the MCLDef paper's setting as restored in spec 4.4 and 4.6 (arXiv 2205.04411).
Differs: 16/255 in L-infinity is deduced, both symbols being lost in print. The patch is the 3x3 grid of BadNets at full
strength in one corner; `corners="four"` mirrors it into the others, so that a flipped image carries the same four
(our choice of orientation). `place="centre"` is the turned grid of the runs with augmentation (spec 4.7).
`surrogate="natural"` is the cheap variant and usually the weaker one; `eps=0` is the control without perturbation.
Should reach: ASR 95.47, BA without the target class 86.44 on CIFAR-10, WRN-16-1, 8 % poison, no augmentation (spec 11,
Table 1, `Before`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Literal

import torch
from torch import Tensor

from backdoorbench_mcl.api import (
    Attack,
    AttackContext,
    Classifier,
    Count,
    Images,
    Label,
    Need,
    NonNegative,
    Poisoned,
    Positive,
    Rate,
    State,
    UserError,
)
from backdoorbench_mcl.kit import at_once, pgd

from .badnets import corner_patch, stamp_patch
from .clean_label import choose_of_class, clean_label_count
from .dirty_label import check_fits, check_target, stamp_chosen
from .surrogate import quantised, surrogate_of

BATCH, LEAST = 128, 16  # images perturbed at once: of 32x32, and of large ones
WEAK = 8  # grey levels: above this bound the images must have moved by more, on average; who did not is counted


def spots(
    shape: tuple[int, int], place: Literal["corner", "centre"], corners: Literal["one", "four"]
) -> list[tuple[Tensor, int, int]]:
    """Patch, uint8 (3, 3), top and left for each copy of the trigger on images of `shape` (H, W)."""
    height, width = shape
    grid = corner_patch(3)
    if place == "centre":
        return [(grid.rot90(2), 18 * height // 32, 18 * width // 32)]
    bottom, right = height - 3, width - 3
    if corners == "one":
        return [(grid, bottom, right)]
    mirrored = [(grid.flip(1), bottom, 0), (grid.flip(0), 0, right), (grid.flip(0, 1), 0, 0)]
    return [(grid, bottom, right), *mirrored]


def perturb(model: Classifier, x: Tensor, label: int, eps: float, step: float, steps: int) -> Tensor:
    """x, uint8 (B, C, H, W), of class `label` -> uint8 images within eps that the model no longer calls so.

    eps and step in grey levels. After rounding no pixel is further away than the whole levels of eps.
    """
    y = torch.full((len(x),), label, device=x.device)
    moved = quantised(pgd(model, x.float() / 255, y, eps=eps / 255, step=step / 255, steps=steps)).to(torch.int16)
    origin, levels = x.to(torch.int16), int(eps)
    return moved.clamp(origin - levels, origin + levels).to(torch.uint8)


def distances(x: Tensor, moved: Tensor) -> Tensor:
    """The largest difference of each pair of images, uint8 (B, C, H, W): int16 (B,), in grey levels."""
    return (moved.to(torch.int16) - x.to(torch.int16)).abs().amax((1, 2, 3))


class CL(Attack):
    """PGD-perturbed images of the target class with a patch and their own label; at test time the patch alone.

    rate: share of the whole training set; where the class has fewer images, all of it is taken (`wanted` and `poisoned`
    are kept with the victim, as are the least, mean and largest L-infinity distance, in grey levels, and the share of
    images that moved by no more than 8, which tables tell above 1 %). eps, step: in units of 1/255.
    surrogate: the clean model whose gradients are used, trained against PGD or not.
    prepare raises UserError when the target is no class or has no images, the patch does not fit, the surrogate is
    missing, or the images hardly moved on average although eps allowed it.
    """

    name = "cl"
    paper = "Turner et al., Label-Consistent Backdoor Attacks, 2019, arXiv 1912.02771"
    ablation = MappingProxyType({"eps": 0.0})
    target: int

    def __init__(
        self,
        *,
        target: Label = 5,
        rate: Rate = 0.08,
        eps: NonNegative = 16.0,
        step: Positive = 1.5,
        steps: Count = 100,
        surrogate: Literal["robust", "natural"] = "robust",
        corners: Literal["one", "four"] = "one",
        place: Literal["corner", "centre"] = "corner",
    ) -> None:
        if corners == "four" and place == "centre":
            raise UserError("cl: corners='four' was given with place='centre'; leave one of them out")
        self.target = target
        self.rate = rate
        self.eps = eps
        self.step = step
        self.steps = steps
        self.surrogate = surrogate
        self.corners: Literal["one", "four"] = corners
        self.place: Literal["corner", "centre"] = place

    def needs(self) -> Mapping[str, Need]:
        """The model to fool; none where nothing is perturbed."""
        return {} if self.eps == 0 else {"surrogate": Need("model", self.surrogate)}

    def prepare(self, ctx: AttackContext) -> State:
        """Choose the images and perturb them here, where the surrogate is; poison() only puts the patch on them."""
        check_target(self.name, self.target, ctx.classes)
        shape = (int(ctx.train.x.shape[-2]), int(ctx.train.x.shape[-1]))
        for _, top, left in spots(shape, self.place, self.corners):
            check_fits(self.name, top, left, 3, shape)
        wanted, poisoned = clean_label_count(self.rate, ctx.train, self.target)
        index = choose_of_class(self.rate, ctx.train, self.target, ctx.rng)  # (P,) int64, sorted
        meta: dict[str, Any] = {"wanted": wanted, "poisoned": poisoned}
        if self.corners == "one":
            meta["top"], meta["left"] = top, left
        if self.eps == 0:
            return State({"index": index}, meta)
        moved = self._perturbed(ctx.train.subset(index).x.cpu(), ctx)  # (P, C, H, W)
        return State({"index": index, "x": moved}, {**meta, **self._moved(ctx.train, index, moved)})

    def _perturbed(self, out: Tensor, ctx: AttackContext) -> Tensor:
        """perturb() in batches, uint8 (P, C, H, W) on the CPU, in place; goes on where a killed run stopped."""
        model = surrogate_of(self.name, ctx)
        start, size = fingerprint(repr(self), out, model), at_once(out, BATCH, LEAST)
        found = ctx.snapshot.load()
        done = 0
        mine = found is not None and found[1].get("cl") == start
        if found is not None and mine:
            done = int(found[1]["done"])
            out[:done] = found[0]["x"]
        while done < len(out):
            batch = out[done : done + size]
            moved = perturb(model, batch.to(ctx.device), self.target, self.eps, self.step, self.steps)
            out[done : done + len(batch)] = moved.cpu()
            done += len(batch)
            ctx.tick(done, len(out), len(batch) * self.steps)
            if found is None or mine:  # a training that came further has left its own
                ctx.snapshot.save({"x": out[:done]}, {"cl": start, "done": done})
        return out

    def _moved(self, train: Images, index: Tensor, moved: Tensor) -> dict[str, float]:
        """L-infinity distances in grey levels of the images at `index`, for State.meta; UserError where too small."""
        if len(moved) == 0:
            return {}
        parts = zip(index.split(BATCH), moved.split(BATCH), strict=True)
        far = torch.cat([distances(train.take(chosen)[0].cpu(), after) for chosen, after in parts])
        mean, weak = float(far.float().mean()), float((far <= WEAK).float().mean())
        if self.eps > WEAK and mean <= WEAK:
            raise UserError(
                f"{self.name}: the perturbed images differ by {mean:.1f} grey levels on average (L-infinity), expected "
                f"more than {WEAK} with eps={self.eps}; raise steps={self.steps} or step={self.step}, or lower eps"
            )
        return {"linf_min": int(far.min()), "linf_mean": mean, "linf_max": int(far.max()), "linf_weak_share": weak}

    def poison(self, train: Images, state: State, rng: torch.Generator) -> Poisoned:
        """The images that prepare chose, perturbed and stamped, with the labels they had; `rng` is not used."""
        index = state.tensors["index"]
        y = train.y[index.to(train.y.device)]
        if "x" not in state.tensors:
            return Poisoned(index, stamp_chosen(self, train, index, state, rng), y)
        hard = Images(state.tensors["x"], y.cpu())
        return Poisoned(index, stamp_chosen(self, hard, torch.arange(len(index)), state, rng), y)

    def lasting(self, state: State) -> State:
        """The numbers alone: the images and their indices are for `poison`, the patch needs neither."""
        return State(meta=state.meta)

    def stamp(self, x: Tensor, y: Tensor, state: State, rng: torch.Generator) -> Tensor:
        """The patch over x, uint8 (B, C, H, W), in a copy: no perturbation at test time."""
        for patch, top, left in spots((x.shape[-2], x.shape[-1]), self.place, self.corners):
            x = stamp_patch(x, patch, top, left)
        return x


def fingerprint(method: str, x: Tensor, model: Classifier) -> str:
    """What a perturbation starts from: a snapshot is resumed only by the run that wrote it."""
    digest = hashlib.sha256(method.encode())
    for tensor in (x, *(value for _, value in sorted(model.state_dict().items()))):
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
