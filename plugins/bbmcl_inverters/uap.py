"""uap: one perturbation that is added to every image, small in L2 and without a mask.

A mask with a small L1 cannot stand for a trigger that covers the whole image; a perturbation with a small L2 can.

Paper: S.-M. Moosavi-Dezfooli et al., "Universal adversarial perturbations", CVPR 2017, for the idea. Source: spec 6.5
(ours, measured for the SIG attack).
Differs: in everything but the idea: a target label, Adam and a penalty instead of a bound. Printed
nowhere and chosen here: the start at 0 and the batch of 64, nc-box's.
Should reach, on a SIG victim, CIFAR-10, WRN-16-1, 5 % clean images: L2 norm 2.69, success 98.4 % (spec 6.5, n = 1).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from backdoorbench_mcl.api import Classifier, Count, Inverter, InverterContext, NonNegative, Positive

from .leaves import Additive, Leaves, one_pass, ready


def objective(model: Classifier, x: Tensor, delta: Tensor, target: int, weight: float) -> tuple[Tensor, Tensor]:
    """mean CE(h(clamp(x + d, 0, 1)), t) + weight * sum d^2, and the share of the batch that lands on t.

    x (B, C, H, W) in [0, 1], delta (C, H, W) -> two scalars; the first has a gradient.
    """
    logits = model(Additive(delta).apply(x))  # (B, K) float32
    goal = torch.full((len(x),), target, device=x.device)
    hits = (logits.detach().argmax(1) == target).float().mean()
    return F.cross_entropy(logits, goal) + weight * delta.square().sum(), hits


class UAP(Inverter):
    """Fit a perturbation (C, H, W) that sends clean images to the target.

    weight: of the squared L2 norm. steps: where given, the number of optimiser steps in place of `epochs`.
    """

    name = "uap"
    paper = "after Moosavi-Dezfooli et al., Universal adversarial perturbations, CVPR 2017"

    def __init__(
        self,
        *,
        lr: Positive = 0.01,
        weight: NonNegative = 0.02,
        epochs: Count = 40,
        steps: Count | None = None,
        batch: Count = 64,
    ) -> None:
        self.lr = lr
        self.weight = weight
        self.epochs = epochs
        self.steps = steps
        self.batch = batch

    def invert(self, model: Classifier, target: int, ctx: InverterContext) -> Additive:
        """Optimise over augmented batches and return the last perturbation.

        Raises Diverged when the loss is no longer finite, UserError when there are no clean images.
        """
        shape = ready(self.name, model, ctx.clean)
        leaves = Leaves({"delta": torch.zeros(shape, device=ctx.device)}, self.lr)
        descent = leaves.steps(lambda x: objective(model, x, leaves["delta"], target, self.weight), model, ctx)
        total = self.steps if self.steps is not None else self.epochs * -(-len(ctx.clean) // self.batch)
        step = 0
        saved = ctx.snapshot.load()
        if saved is not None:
            leaves.unpack(saved[0])
            ctx.rng.set_state(saved[0]["rng"].cpu())
            step = int(saved[1]["step"])
        while step < total:
            step, (loss, success) = one_pass(
                self.name, leaves, ctx.clean, ctx, descent, batch=self.batch, step=step, total=total
            )
            norm = float(leaves["delta"].detach().norm())
            ctx.log(f"step {step} of {total}: loss {loss:.4f}, L2 {norm:.2f}, success {100 * success:.1f} %")
            ctx.snapshot.save({**leaves.pack(), "rng": ctx.rng.get_state()}, {"step": step})
        return Additive(leaves["delta"].detach().clamp(-1, 1))  # beyond 1 nothing changes: the image is clamped
