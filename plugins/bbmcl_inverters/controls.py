"""true, random, zero: what a repair gains from the attacker's own trigger, from a wrong one, and from none.

Paper: Z. Yue et al., MCLDef, ACM MM 2023 (arXiv 2205.04411), for `true`: its MCLDef(True), an upper bound for every
inverter (spec 8.2). `random` and `zero` are ours (spec 8.5). A repair that does as well with `random` as with the
inverter that it imitates gains nothing from the inversion. With `zero` both cosines of MCLDef are equal: its loss is
ln 2 and its gradient 0, so that only weight decay and batch norm move the model.
Differs: `random` puts the pixels of the fitted mask at random places, so that not only its L1 but every value of it is
the same; its pattern is uniform noise.
Should reach: mcldef(inverter=true) ASR 0.66, BA without the target class 83.24 on CIFAR-10, BadNets, WRN-16-1, 5 %
clean images (spec 11, Table 2); `random` and `zero` must do worse than the inverter that they stand beside.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from backdoorbench_mcl.api import (
    Classifier,
    Inverter,
    InverterContext,
    Knowledge,
    MaskPattern,
    Need,
    NotApplicable,
    Selector,
    Trigger,
)


class Unchanged(Trigger):
    """No trigger at all."""

    def apply(self, x: Tensor, rng: torch.Generator | None = None) -> Tensor:
        return x.clone()  # callers may write to what they get

    def tensors(self) -> dict[str, Tensor]:
        return {}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> Unchanged:
        return cls()


class TrueInverter(Inverter):
    """The attacker's own stamp, for MCLDef(True); nothing is fitted."""

    name = "true"
    paper = "Yue et al., MCLDef, ACM MM 2023, arXiv 2205.04411, section 4.4"

    @property
    def knows(self) -> frozenset[Knowledge]:
        """Everything about the trigger."""
        return frozenset({"target", "trigger"})

    def invert(self, model: Classifier, target: int, ctx: InverterContext) -> Trigger:
        trigger: Trigger = ctx.granted.trigger
        return trigger


class RandomInverter(Inverter):
    """The mask that `like` fits, its pixels at random places, with a pattern of noise."""

    name = "random"

    def __init__(self, *, like: Selector = "nc-box") -> None:
        self.like = like

    def needs(self) -> Mapping[str, Need]:
        """The trigger whose size is imitated."""
        return {"like": Need("trigger", self.like)}

    def invert(self, model: Classifier, target: int, ctx: InverterContext) -> MaskPattern:
        """Raises NotApplicable where `like` gives a trigger without a mask."""
        like = ctx.needs["like"]
        if not isinstance(like, MaskPattern):
            raise NotApplicable(f"{self.name}: the trigger of {self.like} has no mask whose size could be imitated")
        order = torch.randperm(like.mask.numel(), generator=ctx.rng).to(like.mask.device)
        noise = torch.rand(like.pattern.shape, generator=ctx.rng).to(like.pattern.device)
        return MaskPattern(like.mask.detach().flatten()[order].view_as(like.mask), noise)


class ZeroInverter(Inverter):
    """The image as it is."""

    name = "zero"

    def invert(self, model: Classifier, target: int, ctx: InverterContext) -> Unchanged:
        return Unchanged()
