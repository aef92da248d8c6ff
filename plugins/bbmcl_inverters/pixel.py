"""pixel: what is added to and what is taken from every pixel are searched for apart, both in as few pixels as possible.

Paper: G. Tao et al., "Better Trigger Inversion Optimization in Backdoor Scanning" (Pixel), CVPR 2022. Source: spec 8.4;
it is the inverter of a later version of MCLDef's code (spec 6.3).
Differs: nothing that is printed. Our reading of "keep the best and restart from it": a pass that reaches `success` is
better than the best one if its regulariser is smaller and it changes no more pixels; whenever the cost falls, after
`patience` passes below `success`, the search goes back to the best, with fresh moments. Chosen here: the batch of 64,
nc-box's.
Should reach: no printed number; MCLDef's later code, which uses it, reports ASR 1.92 and BA 82.29 on the authors'
BadNets victim, CIFAR-10, WRN-16-1 (spec 6.3).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from backdoorbench_mcl.api import (
    Classifier,
    Count,
    Gt,
    Inverter,
    InverterContext,
    NonNegative,
    Positive,
    Rate,
)
from backdoorbench_mcl.kit import Repeated

from .leaves import Additive, Dial, Leaves, half_tanh, one_pass, put, ready, under

SMALLEST = 1 / 255  # one grey level
MOMENTS = (0.5, 0.9)


def two_sided(plus: Tensor, minus: Tensor) -> Tensor:
    """clamp(a, 0, 1) - clamp(b, 0, 1): (C, H, W) each -> a pattern (C, H, W) in [-1, 1]."""
    return plus.clamp(0, 1) - minus.clamp(0, 1)


def regulariser(plus: Tensor, minus: Tensor) -> Tensor:
    """sum over pixels of max_c s(a) + max_c s(b), s(v) = tanh(v / 10) / (2 - 1e-7) + 0.5: (C, H, W) each -> a scalar.

    Only the largest channel of a pixel counts: the other two are free once a pixel is used. A value below 0, where
    nothing is left to add, is pushed on: no success brings it back, hence the few pixels.
    """
    return half_tanh(plus / 10).amax(0).sum() + half_tanh(minus / 10).amax(0).sum()


def cleaned(pattern: Tensor) -> tuple[Tensor, int]:
    """The pattern (C, H, W) with entries below one grey level set to 0, and the number of pixels that it changes."""
    kept = torch.where(pattern.abs() < SMALLEST, 0.0, pattern)
    return kept, int((kept != 0).any(0).sum())


def objective(
    model: Classifier, x: Tensor, plus: Tensor, minus: Tensor, target: int, cost: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """mean CE(h(clamp(x + pattern, 0, 1)), t) + cost * regulariser, the share of the batch that lands on t, and the
    regulariser. x (B, C, H, W) in [0, 1], plus and minus (C, H, W).
    """
    logits = model(Additive(two_sided(plus, minus)).apply(x))  # (B, K) float32
    goal = torch.full((len(x),), target, device=x.device)
    hits = (logits.detach().argmax(1) == target).float().mean()
    size = regulariser(plus, minus)
    return F.cross_entropy(logits, goal) + cost * size, hits, size.detach()


@dataclass
class Search:
    """Where the search stands. best, pixels: regulariser and size of the best pass; `kept`: its leaves, if any."""

    leaves: Leaves
    dial: Dial
    step: int = 0
    best: float = math.inf
    pixels: int = 0
    kept: dict[str, Tensor] = field(default_factory=dict)

    def judge(self, success: bool, size: float) -> bool:
        """Keep the leaves of a pass that succeeded with this regulariser if no pass before was as good."""
        _, pixels = cleaned(two_sided(self.leaves["plus"].detach(), self.leaves["minus"].detach()))
        better = success and size < self.best and (not self.kept or pixels <= self.pixels)
        if better:
            self.best, self.pixels, self.kept = size, pixels, self.leaves.now()
        return better

    def pattern(self) -> Tensor:
        """The best pattern (C, H, W), cleaned; the last one where no pass succeeded."""
        leaves = self.kept or self.leaves.now()
        return cleaned(two_sided(leaves["plus"], leaves["minus"]))[0]

    def tensors(self, rng: torch.Generator) -> dict[str, Tensor]:
        """Everything but the counters."""
        kept = {f"kept.{name}": value.cpu() for name, value in self.kept.items()}
        return {**self.leaves.pack(), **kept, "rng": rng.get_state()}

    def meta(self) -> dict[str, Any]:
        """The counters, JSON-ready."""
        return {"step": self.step, "best": self.best, "pixels": self.pixels, "dial": asdict(self.dial)}

    def restore(self, tensors: Mapping[str, Tensor], meta: Mapping[str, Any], rng: torch.Generator) -> None:
        """Continue from what `tensors` and `meta` gave."""
        self.leaves.unpack(tensors)
        self.kept = {name: value.to(self.leaves["plus"].device) for name, value in under("kept.", tensors).items()}
        self.dial = Dial(**meta["dial"])
        self.step, self.best, self.pixels = int(meta["step"]), float(meta["best"]), int(meta["pixels"])
        rng.set_state(tensors["rng"].cpu())


class Pixel(Inverter):
    """Fit a two-sided pattern (C, H, W) that sends clean images to the target and changes few pixels.

    success: the mean success over a pass that counts as one. patience, multiplier: after so many passes in a row that
    reach it the cost is multiplied, after as many that do not it is divided by multiplier^1.5. steps: where given, the
    number of optimiser steps in place of `epochs`.
    """

    name = "pixel"
    paper = "Tao et al., Better Trigger Inversion Optimization in Backdoor Scanning, CVPR 2022"

    def __init__(
        self,
        *,
        lr: Positive = 0.1,
        cost: NonNegative = 1e-3,
        success: Rate = 0.9,
        patience: Count = 10,
        multiplier: Annotated[float, Gt(1)] = 1.5,
        epochs: Count = 100,
        steps: Count | None = None,
        batch: Count = 64,
    ) -> None:
        self.lr = lr
        self.cost = cost
        self.success = success
        self.patience = patience
        self.multiplier = multiplier
        self.epochs = epochs
        self.steps = steps
        self.batch = batch

    def invert(self, model: Classifier, target: int, ctx: InverterContext) -> Additive:
        """Optimise over augmented batches and return the best pattern, the last one where no pass succeeded.

        Raises Diverged when loss or pattern are no longer finite, UserError when there are no clean images.
        """
        shape = ready(self.name, model, ctx.clean)
        start = {name: torch.rand(shape, generator=ctx.rng).to(ctx.device) for name in ("plus", "minus")}
        leaves = Leaves(start, self.lr, MOMENTS)
        search = Search(leaves, Dial(self.cost))
        saved = ctx.snapshot.load()
        if saved is not None:
            search.restore(*saved, ctx.rng)
        total = self.steps if self.steps is not None else self.epochs * -(-len(ctx.clean) // self.batch)
        cost = torch.zeros((), device=ctx.device)  # a tensor: recorded steps read it anew
        descent = leaves.steps(lambda x: objective(model, x, leaves["plus"], leaves["minus"], target, cost), model, ctx)
        while search.step < total:
            put(cost, search.dial.cost)
            self._one_pass(descent, ctx, search, total)
            ctx.snapshot.save(search.tensors(ctx.rng), search.meta())
        return Additive(search.pattern())

    def _one_pass(self, descent: Repeated, ctx: InverterContext, search: Search, total: int) -> None:
        leaves, cost = search.leaves, search.dial.cost
        search.step, (loss, success, size) = one_pass(
            self.name, leaves, ctx.clean, ctx, descent, batch=self.batch, step=search.step, total=total
        )
        search.judge(success >= self.success, size)
        if search.dial.turn(success >= self.success, self.patience, self.multiplier) < 0 and search.kept:
            leaves.restart(search.kept)
        ctx.log(
            f"step {search.step} of {total}: loss {loss:.4f}, cost {cost:.2g}, success {100 * success:.1f} %, "
            f"best of {search.pixels} pixels"
        )
