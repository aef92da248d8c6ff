"""nc: unlearn an inverted trigger by fine-tuning on clean images of which some carry it, labels left correct.

Paper: B. Wang et al., "Neural Cleanse: Identifying and Mitigating Backdoor Attacks in Neural Networks", IEEE S&P 2019,
as the baseline of the MCLDef paper (arXiv 2205.04411). Source: spec 5.3, 5.4, 12.4.
Differs: Neural Cleanse fine-tunes for one epoch on 10 % of the training data; the MCLDef paper gives it the clean
images and the 20 epochs that every defense gets, and the trigger of its own first stage (`nc-box`; `inverter=nc-full`
is the original search). The stamped images are drawn anew for every batch; others fix them once. Of several flagged
labels each batch gets one at random, not one after the other.
Should reach: ASR 3.58, BA without the target class 81.37 on CIFAR-10, BadNets, WRN-16-1, 5 % clean images (spec 11,
Table 2).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from backdoorbench_mcl.api import (
    Batch,
    Classifier,
    Count,
    Defense,
    DefenseContext,
    Knowledge,
    Need,
    Positive,
    Rate,
    Selector,
)
from backdoorbench_mcl.kit import choose, fit

from .stamps import Stamp, Target, knowledge, need, pick, stamps
from .training import Meter, adapt


def stamp_some(x: Tensor, share: float, among: Sequence[Stamp], rng: torch.Generator) -> Tensor:
    """x (B, C, H, W) in [0, 1] -> a copy with one of the triggers on round(share * B) items, all drawn from `rng`.

    Where that is no item, nothing is drawn: share 0 is plain fine-tuning to the last bit. 0.2 of 64 are 13.
    """
    count = round(share * len(x))
    if count == 0:
        return x
    trigger = pick(among, rng).trigger
    chosen = choose(len(x), count, rng).to(x.device)
    out = x.clone()
    out[chosen] = trigger.apply(x[chosen], rng)
    return out


class NC(Defense):
    """Cross-entropy with the true labels, train mode, all layers; a `share` of each batch carries the trigger.

    target: "given" repairs against the attacker's label; "detect" against all labels that `detector` flags,
    and leaves a model that it calls clean as it is.
    lr, epochs, steps: None takes the common recipe's.
    """

    name = "nc"
    paper = "Wang et al., Neural Cleanse, IEEE S&P 2019"

    def __init__(
        self,
        *,
        inverter: Selector = "nc-box",
        target: Target = "given",
        detector: Selector = "nc-full",
        share: Rate = 0.2,
        nesterov: bool = False,
        lr: Positive | None = None,
        epochs: Count | None = None,
        steps: Count | None = None,
    ) -> None:
        self.inverter = inverter
        self.target: Target = target
        self.detector = detector
        self.share = share
        self.nesterov = nesterov
        self.lr = lr
        self.epochs = epochs
        self.steps = steps

    @property
    def knows(self) -> frozenset[Knowledge]:
        """The target label, unless a detector has to find it."""
        return knowledge(self.target)

    def needs(self) -> Mapping[str, Need]:
        """The inverted trigger or triggers."""
        return {"trigger": need(self.target, self.inverter, self.detector)}

    def defend(self, model: Classifier, ctx: DefenseContext) -> Classifier:
        """Train the victim in place and return it."""
        among = stamps(self.target, ctx)
        if not among:
            return model.eval()
        meter = Meter(ctx.log, len(ctx.clean))

        def loss(batch: Batch) -> Tensor:
            logits = model(stamp_some(batch.x, self.share, among, ctx.rng))  # (B, K) float32
            value = F.cross_entropy(logits, batch.y)
            meter.add(len(batch.x), loss=value, accuracy=(logits.detach().argmax(1) == batch.y).float().mean())
            return value

        recipe = adapt(ctx.recipe, nesterov=self.nesterov, lr=self.lr, epochs=self.epochs, steps=self.steps)
        model.train()
        fit(model, ctx.clean, ctx, loss, recipe=recipe)
        return model.eval()
