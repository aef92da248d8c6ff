"""ft: fine-tune every layer on the clean images.

Paper: the plain baseline of the MCLDef paper (arXiv 2205.04411), which took it from the code of NAD (Li et al., ICLR
2021) with the distillation weights at 0; hence Nesterov momentum (spec 9.1).
Differs: nothing known.
Should reach: ASR 12.78, BA without the target class 80.64 on CIFAR-10, BadNets, WRN-16-1, 5 % clean images (spec 11,
Table 1).
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from backdoorbench_mcl.api import Batch, Classifier, Count, Defense, DefenseContext, Positive
from backdoorbench_mcl.kit import fit

from .training import Meter, adapt


class FT(Defense):
    """Cross-entropy on the clean images, train mode, all layers. lr, epochs, steps: None takes the common recipe's."""

    name = "ft"
    paper = "baseline; Li et al., NAD, ICLR 2021, with its distillation weights at 0"

    def __init__(
        self,
        *,
        nesterov: bool = True,
        lr: Positive | None = None,
        epochs: Count | None = None,
        steps: Count | None = None,
    ) -> None:
        self.nesterov = nesterov
        self.lr = lr
        self.epochs = epochs
        self.steps = steps

    def defend(self, model: Classifier, ctx: DefenseContext) -> Classifier:
        """Train the victim in place and return it."""
        meter = Meter(ctx.log, len(ctx.clean))

        def loss(batch: Batch) -> Tensor:
            logits = model(batch.x)  # (B, K) float32
            value = F.cross_entropy(logits, batch.y)
            meter.add(len(batch.x), loss=value, accuracy=(logits.detach().argmax(1) == batch.y).float().mean())
            return value

        recipe = adapt(ctx.recipe, nesterov=self.nesterov, lr=self.lr, epochs=self.epochs, steps=self.steps)
        model.train()
        fit(model, ctx.clean, ctx, loss, recipe=recipe)
        return model.eval()
