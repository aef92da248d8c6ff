"""mymethod: mask and pattern by Adam through a sigmoid, with a penalty on the size of the mask.

Paper: none yet; say here where the method comes from, what differs, and which success it should reach on what.
"""

from __future__ import annotations

import torch
from torch.nn.functional import cross_entropy

from backdoorbench_mcl.api import (
    Classifier,
    Count,
    Inverter,
    InverterContext,
    MaskPattern,
    NonNegative,
    Positive,
    Trigger,
)


class MyMethod(Inverter):
    """steps: of Adam; lr: its learning rate; lam: weight of the L1 norm of the mask."""

    name = "mymethod"

    def __init__(self, *, steps: Count = 300, lr: Positive = 0.1, lam: NonNegative = 0.001) -> None:
        self.steps = steps
        self.lr = lr
        self.lam = lam

    def invert(self, model: Classifier, target: int, ctx: InverterContext) -> Trigger:
        channels, height, width = ctx.clean.x.shape[1:]
        mask = torch.zeros(height, width, device=ctx.device, requires_grad=True)
        pattern = torch.zeros(channels, height, width, device=ctx.device, requires_grad=True)
        optimiser = torch.optim.Adam([mask, pattern], lr=self.lr)
        step = 0
        while step < self.steps:
            for batch in ctx.clean.batches(64, ctx.rng, ctx.augment):
                trigger = MaskPattern(mask.sigmoid(), pattern.sigmoid())
                goal = torch.full((len(batch.x),), target, device=ctx.device)
                loss = cross_entropy(model(trigger.apply(batch.x)), goal) + self.lam * trigger.mask.sum()
                mask.grad, pattern.grad = torch.autograd.grad(loss, [mask, pattern])
                optimiser.step()
                step += 1
                ctx.tick(step, self.steps, len(batch.x))
                if step == self.steps:
                    break
        return MaskPattern(mask.detach().sigmoid(), pattern.detach().sigmoid())
