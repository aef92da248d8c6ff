"""What attacks share that work on a clean model: the model itself, and the way back from its pixels."""

from __future__ import annotations

import torch
from torch import Tensor

from backdoorbench_mcl.api import AttackContext, Classifier, UserError
from backdoorbench_mcl.kit import frozen


def surrogate_of(name: str, ctx: AttackContext) -> Classifier:
    """An own copy, on ctx.device, in eval mode and frozen, of the model that the attack needs as "surrogate".

    Raises UserError when it was not handed one.
    """
    found = ctx.needs.get("surrogate")
    if not isinstance(found, Classifier):
        raise UserError(
            f"{name}: needs a clean model as its surrogate and was given {type(found).__name__}; "
            f"run it through the harness, which trains one, or fill in ctx.needs['surrogate']"
        )
    return frozen(found).to(ctx.device)


def quantised(pixels: Tensor) -> Tensor:
    """Pixels in [0, 1] -> the nearest uint8."""
    return (pixels * 255).round().clamp(0, 255).to(torch.uint8)


__all__ = ["quantised", "surrogate_of"]
