"""abl: fine-tuning on the clean images with smoothed labels.

Paper: none yet; say here where the method comes from, what differs, and which number it should reach on what.
"""

from __future__ import annotations

from torch.nn.functional import cross_entropy

from backdoorbench_mcl.api import Classifier, Defense, DefenseContext, Rate
from backdoorbench_mcl.kit import fit


class Abl(Defense):
    """smoothing: share of the label that is spread over all classes."""

    name = "abl"

    def __init__(self, *, smoothing: Rate = 0.1) -> None:
        self.smoothing = smoothing

    def defend(self, model: Classifier, ctx: DefenseContext) -> Classifier:
        model.train()
        fit(
            model,
            ctx.clean,
            ctx,
            lambda batch: cross_entropy(model(batch.x), batch.y, label_smoothing=self.smoothing),
        )
        return model.eval()
