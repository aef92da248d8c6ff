"""What every attack that relabels its poison shares: how many images, which ones, and a target that exists."""

from __future__ import annotations

import torch
from torch import Tensor

from backdoorbench_mcl.api import Attack, Goal, Images, Poisoned, State, UserError
from backdoorbench_mcl.kit import choose, share

CHUNK = 64  # images stamped at a time: 10 MB at 224x224


def check_target(name: str, target: int, classes: int) -> None:
    """Raise UserError when `target` is not one of the labels 0 .. classes-1."""
    if not 0 <= target < classes:
        raise UserError(
            f"{name}: target={target} is not a class of this data set; "
            f"expected 0..{classes - 1}, e.g. '{name}(target={classes - 1})'"
        )


def check_fits(name: str, top: int, left: int, size: int, shape: tuple[int, int]) -> None:
    """Raise UserError when a square of `size` pixels at (top, left) does not lie inside an image of `shape` (H, W)."""
    if min(top, left) < 0 or top + size > shape[0] or left + size > shape[1]:
        raise UserError(
            f"{name}: a {size}x{size} trigger at row {top}, column {left} lies outside images of "
            f"{shape[0]}x{shape[1]} pixels; choose a smaller trigger or larger images"
        )


def stamp_chosen(attack: Attack, train: Images, index: Tensor, state: State, rng: torch.Generator) -> Tensor:
    """The images at `index`, int64 (P,), stamped: uint8 (P, C, H, W).

    The only copy of them all; a tenth of a large data set is most of a gigabyte, so that the rest is done in chunks.
    """
    where = index.to(train.x.device)
    out = torch.empty((len(index), *train.x.shape[1:]), dtype=torch.uint8, device=train.x.device)
    for into, chunk in zip(out.split(CHUNK), where.split(CHUNK), strict=True):
        into.copy_(attack.stamp(train.x[chunk], train.y[chunk.to(train.y.device)], state, rng))
    return out


class DirtyLabel(Attack):
    """An attack that relabels what it stamps: as one target, or, all-to-all, each label y as (y + 1) mod K.

    A subclass sets `rate` and, for all-to-all, a `target` of None; its prepare keeps `goals` in the state's meta.
    """

    rate: float

    def goals(self, classes: int) -> dict[str, int]:
        """What goal() will need, for State.meta: the number of classes, where they are all targets.

        Raises UserError when the one target is no class, or when all-to-all has nowhere to go.
        """
        if self.target is not None:
            check_target(self.name, self.target, classes)
            return {}
        if classes < 2:
            raise UserError(f"{self.name}: targets='all' needs two classes or more, the data set has {classes}")
        return {"classes": classes}

    def goal(self, y: Tensor, state: State) -> Goal:
        """Labels (N,) -> the target on all others; all-to-all: the next label, on every image (spec 1.1)."""
        if self.target is not None:
            return super().goal(y, state)
        return Goal((y + 1) % state.meta["classes"], torch.ones_like(y, dtype=torch.bool))

    def poison(self, train: Images, state: State, rng: torch.Generator) -> Poisoned:
        """floor(rate * N) stamped images drawn from all classes, the target's own included, with the attacker's labels.

        Source: spec 4, common settings of the poisoned-label attacks.
        """
        index = choose(len(train), share(self.rate, len(train)), rng)  # (P,) int64, sorted
        y = self.goal(train.y[index.to(train.y.device)], state).y
        return Poisoned(index, stamp_chosen(self, train, index, state, rng), y)
