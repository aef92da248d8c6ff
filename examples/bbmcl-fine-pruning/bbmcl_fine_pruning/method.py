"""fine-pruning: cut the channels of the last convolution that clean images leave dormant, then fine-tune.

Paper: K. Liu, B. Dolan-Gavitt, S. Garg, "Fine-Pruning: Defending Against Backdooring Attacks on Deep Neural Networks",
RAID 2018 (arXiv 1805.12185). A backdoor lives in neurons that clean images do not use: they are cut in increasing
order of their mean activation on clean images, until accuracy on clean images has dropped too far; fine-tuning then
moves the neurons that both use.
Differs: the activation is the positive part of the convolution's own output, which is the paper's wherever a ReLU
follows directly, and not where batch norm or a shortcut comes between. The images that choose the channels also serve
for fine-tuning, as no others are granted. The cut that goes beyond `max_drop` is taken back. 4 points is the drop
that we take from the paper, `ratio` is our own guard against cutting everything where accuracy never drops.
Should reach: less ASR than `ft` on `badnets` at equal BA, to a few points; no number of the paper has this setting.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from backdoorbench_mcl.api import (
    Classifier,
    Count,
    Defense,
    DefenseContext,
    Images,
    Interval,
    NotApplicable,
    Rate,
    Repaired,
    UserError,
)
from backdoorbench_mcl.kit import fit, frozen, masked, predict


def last_convolution(model: nn.Module) -> str:
    """The name of the Conv2d that was defined last. Raises NotApplicable where there is none."""
    names: list[str] = [name for name, module in model.named_modules() if isinstance(module, nn.Conv2d)]
    if not names:
        raise NotApplicable("fine-pruning: the network has no convolution; name a module with channels in `layer`")
    return names[-1]


def mean_activation(model: Classifier, layer: str, x: Tensor) -> Tensor:
    """Mean over images and places of the positive part of what `layer` puts out, in eval mode: float64 (C,) on the CPU.

    x: uint8 (N, C, H, W). Raises UserError where there is no such module, or where its output has no channels.
    """
    watched = frozen(model)  # a copy, which takes the hook with it
    modules = dict(watched.named_modules())
    if layer not in modules:
        raise UserError(f"fine-pruning: no module {layer!r}; the network has {', '.join(n for n in modules if n)}")
    sums: list[Tensor] = []

    def look(module: nn.Module, inputs: object, out: object) -> None:
        if not isinstance(out, Tensor) or out.ndim != 4:
            raise UserError(
                f"fine-pruning: {layer!r} does not put out maps (B, C, H, W); name a convolution in `layer`"
            )
        sums.append(out.double().clamp_min(0).mean((2, 3)).sum(0).cpu())  # (C,)

    modules[layer].register_forward_hook(look)
    predict(watched, x)
    return torch.stack(sums).sum(0) / len(x)


def accuracy(model: Classifier, images: Images) -> float:
    """Share of the images that the model recognises, in %."""
    return 100 * float((predict(model, images.x) == images.y.cpu()).double().mean())


def prune(order: Sequence[int], judge: Callable[[list[int]], float], max_drop: float, ratio: float, step: int) -> int:
    """How many channels of `order` to cut, `step` at a time: the most before `judge(channels)`, the accuracy in % with
    these channels cut, falls more than `max_drop` points below that of none. At most the share `ratio`, rounded down,
    and never all of them, after which every image would look the same.
    """
    most = min(int(ratio * len(order)), len(order) - 1)
    before, kept = judge([]), 0
    while kept < most:
        tried = min(kept + step, most)
        if judge(list(order[:tried])) < before - max_drop:
            break
        kept = tried
    return kept


class FinePruning(Defense):
    """max_drop: points of accuracy on the clean images that cutting may cost. ratio: the largest share of the channels
    that is cut. step: channels cut between two looks at the accuracy; each look takes a pass over the clean images.
    layer: the module whose output channels are cut, as `layer4.1.conv2`; by default the last convolution.
    """

    name = "fine-pruning"
    paper = "Liu et al., Fine-Pruning, RAID 2018, arXiv 1805.12185"

    def __init__(
        self,
        *,
        max_drop: Annotated[float, Interval(ge=0, le=100)] = 4.0,
        ratio: Rate = 0.95,
        step: Count = 1,
        layer: str | None = None,
    ) -> None:
        self.max_drop = max_drop
        self.ratio = ratio
        self.step = step
        self.layer = layer

    def defend(self, model: Classifier, ctx: DefenseContext) -> Repaired:
        """Cut, then train by ctx.recipe with the cut in place; the masks are part of what is returned."""
        layer = last_convolution(model) if self.layer is None else self.layer
        activation = mean_activation(model, layer, ctx.clean.x)
        order = activation.argsort(stable=True).tolist()

        def judge(channels: list[int]) -> float:
            return accuracy(masked(frozen(model), {layer: channels}), ctx.clean)

        cut = prune(order, judge, self.max_drop, self.ratio, self.step)
        ctx.log(f"cut {cut} of {len(order)} channels of {layer}")
        masks = {layer: sorted(order[:cut])}
        masked(model, masks).train()
        fit(model, ctx.clean, ctx, lambda batch: cross_entropy(model(batch.x), batch.y))
        return Repaired(model.eval(), "backdoorbench_mcl.kit:masked", {"masks": masks})
