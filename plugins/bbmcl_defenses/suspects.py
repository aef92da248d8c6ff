"""What nc, mcldef and mcldef+ repair against: the granted target label with its trigger, or all that a detector flagged.

Source: spec 5.3, 5.4 (several flagged labels: the triggers in turn).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from backdoorbench_mcl.api import DefenseContext, Knowledge, Need, Trigger

Target = Literal["given", "detect"]


def trigger_need(inverter: str, target: Target, detector: str) -> Need:
    """The inverted trigger of the granted label, or one for each label that `detector` flags."""
    return Need("trigger", inverter, verdict=detector if target == "detect" else None)


def knowledge(target: Target) -> frozenset[Knowledge]:
    """The target label, unless a detector has to find it."""
    return frozenset() if target == "detect" else frozenset({"target"})


@dataclass(frozen=True)
class Suspects:
    """Labels, the most suspicious first, and the trigger of each; both empty where the model was called clean."""

    labels: tuple[int, ...]
    triggers: tuple[Trigger, ...]

    @classmethod
    def of(cls, ctx: DefenseContext, target: Target) -> Suspects:
        """What the need called `trigger` brought; logged where a detector chose it."""
        found = ctx.needs["trigger"]
        if target == "given":
            return cls((int(ctx.granted.target),), (found,))
        ctx.log(f"flagged: {', '.join(map(str, found))}" if found else "called clean: the victim is left as it is")
        return cls(tuple(found), tuple(found.values()))

    def stamp(self, x: Tensor, rng: torch.Generator) -> Tensor:
        """x (B, C, H, W) in [0, 1] -> a copy in which item i carries the trigger of suspect i mod len(labels).

        Turns go by item: each step meets every trigger, and a resumed run has no turn to remember. Batches are
        shuffled, so that over the passes every image meets every trigger.
        """
        if len(self.triggers) == 1:
            return self.triggers[0].apply(x, rng)
        out, turns = x.clone(), len(self.triggers)
        for turn, trigger in enumerate(self.triggers[: len(x)]):
            out[turn::turns] = trigger.apply(x[turn::turns], rng)
        return out

    def among(self, y: Tensor) -> Tensor:
        """Which labels y (N,) are suspect: bool (N,)."""
        return torch.stack([y == label for label in self.labels]).any(0)


__all__ = ["Suspects", "Target", "knowledge", "trigger_need"]
