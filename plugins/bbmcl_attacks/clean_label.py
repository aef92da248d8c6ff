"""What attacks share that keep the labels: how many images of the target class, and which ones."""

from __future__ import annotations

from fractions import Fraction

import torch
from torch import Tensor

from backdoorbench_mcl.api import Attack, Images, Poisoned, State, UserError
from backdoorbench_mcl.kit import choose

from .dirty_label import stamp_chosen


def clean_label_count(rate: float, train: Images, target: int) -> tuple[int, int]:
    """How many images were asked for, round(rate * N) of the whole set, and how many of them the class has.

    `rate` is read as the decimal that was typed. Source: spec 4.6.
    Raises UserError when images are asked for and the class has none.
    """
    wanted = round(Fraction(str(rate)) * len(train))
    held = int((train.y == target).sum())
    if wanted and not held:
        raise UserError(f"no training image has the target label {target}; choose a label that the data set has")
    return wanted, min(wanted, held)


def choose_of_class(rate: float, train: Images, target: int, rng: torch.Generator) -> Tensor:
    """Indices of round(rate * N) images of the target class, or of all it has: int64 (P,), sorted, on the CPU."""
    pool = (train.y == target).nonzero().flatten().cpu()
    return pool[choose(len(pool), clean_label_count(rate, train, target)[1], rng)]


def poison_target_class(
    attack: Attack, target: int, rate: float, train: Images, state: State, rng: torch.Generator
) -> Poisoned:
    """Stamp round(rate * N) images drawn from the target class alone; their labels stay."""
    index = choose_of_class(rate, train, target, rng)  # (P,) int64, sorted
    return Poisoned(index, stamp_chosen(attack, train, index, state, rng), train.y[index.to(train.y.device)])
