"""No attack: the victim is a clean model, so that a defense can be charged for what it breaks.

Paper: none. Differs: nothing to differ from. A defense still needs a label to defend, hence `target`.
Should reach: ASR undefined, FTR 1-5 %, the accuracy of ordinary training (spec 1.3 and design 3.4).
"""

from __future__ import annotations

import torch
from torch import Tensor

from backdoorbench_mcl.api import Attack, AttackContext, Goal, Images, Label, Poisoned, State

from .dirty_label import check_target


class NoAttack(Attack):
    """Poisons nothing and stamps nothing; no image counts for ASR. `target` is the label that defenses are told.

    prepare raises UserError when the target is no class.
    """

    name = "none"
    target: int

    def __init__(self, *, target: Label = 5) -> None:
        self.target = target

    def prepare(self, ctx: AttackContext) -> State:
        """Only checks the target."""
        check_target(self.name, self.target, ctx.classes)
        return State()

    def poison(self, train: Images, state: State, rng: torch.Generator) -> Poisoned:
        """An overlay of no images."""
        index = torch.empty(0, dtype=torch.int64)
        nothing = train.subset(index)
        return Poisoned(index, nothing.x, nothing.y)

    def stamp(self, x: Tensor, y: Tensor, state: State, rng: torch.Generator) -> Tensor:
        """A copy of x, uint8 (B, C, H, W)."""
        return x.clone()

    def goal(self, y: Tensor, state: State) -> Goal:
        """The target for every label in y (N,), and no image that counts."""
        return Goal(torch.full_like(y, self.target), torch.zeros_like(y, dtype=torch.bool))
