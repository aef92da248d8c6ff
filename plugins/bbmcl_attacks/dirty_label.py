"""What every attack that relabels its poison shares: how many images, which ones, and a target that exists."""

from __future__ import annotations

from fractions import Fraction

import torch

from backdoorbench_mcl.api import Attack, Images, Poisoned, State, UserError
from backdoorbench_mcl.kit import choose


def poison_count(rate: float, total: int) -> int:
    """floor(rate * total), with `rate` read as the decimal that was typed.

    In binary 0.29 * 100 is 28.999..., whose floor would be one image short.
    """
    return int(Fraction(str(rate)) * total)


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


def poison_any_class(
    attack: Attack, target: int, rate: float, train: Images, state: State, rng: torch.Generator
) -> Poisoned:
    """Stamp floor(rate * N) images drawn from all classes, the target's own included, and call them `target`.

    Source: spec 4, common settings of the poisoned-label attacks.
    """
    index = choose(len(train), poison_count(rate, len(train)), rng)  # (P,) int64, sorted
    chosen = train.subset(index)
    return Poisoned(index, attack.stamp(chosen.x, chosen.y, state, rng), torch.full_like(chosen.y, target))
