"""Trojan: a small patch, optimised so that it excites chosen neurons of a clean model, replaces the pixels of a corner.

Paper: Y. Liu et al., "Trojaning Attack on Neural Networks", NDSS 2018; as run by the MCLDef paper (arXiv 2205.04411,
spec 4.2): the patch poisons the training data, it is not planted by retraining single layers.
Differs: the authors' patch is of unknown origin and cannot ship, so one is made for each victim seed against a clean
model of the same architecture, with the features before the last layer as neurons. It replaces pixels, 4 away from the
corner, as their files do; `mode="wrap"` adds it modulo 256, as their code does on CIFAR-10. No denoising: it makes no
difference (spec 4.2).
Should reach: ASR 99.38, BA without the target class 82.84 on CIFAR-10, WRN-16-1, 10 % poison, no augmentation
(spec 11, Table 1, `Before`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from backdoorbench_mcl.api import (
    AttackContext,
    Classifier,
    Count,
    Diverged,
    Ge,
    Label,
    Need,
    Positive,
    Rate,
    State,
    UserError,
)

from .badnets import stamp_patch
from .dirty_label import DirtyLabel, check_fits
from .surrogate import quantised, surrogate_of

BACKGROUNDS = (0.0, 0.5)  # black first; the neurons may be dead on it
DRAWS = 10  # starts that are tried before the surrogate counts as unusable
CHUNK = 512
PLATEAU, GAIN = 100, 1e-5  # steps without a loss lower by this share: the value asked for is out of reach (spec 4.2)


def loudest(model: Classifier, felt: Tensor, count: int) -> Tensor:
    """The `count` features, or fewer, with the largest summed |weight| into the logits, the largest first: int64 (n,).

    felt: bool (D,), the features to choose from. The last layer is linear, so what it adds for a unit vector is that
    feature's weights.
    """
    zero = torch.zeros(1, len(felt), device=model.mean.device)
    scores = torch.full((len(felt),), -1.0)
    with torch.no_grad():
        for chosen in felt.nonzero().flatten().split(CHUNK):  # a feature grid has thousands
            unit = torch.zeros(len(chosen), len(felt), device=zero.device)
            unit[torch.arange(len(chosen)), chosen.to(zero.device)] = 1
            scores[chosen] = (model.head(unit) - model.head(zero)).abs().sum(1).cpu()
    return scores.argsort(descending=True, stable=True)[: min(count, int(felt.sum()))]


@dataclass(frozen=True)
class Scene:
    """What the model sees of a patch: its pixels at (top, left) of a plain image, background float (1, C, H, W)."""

    model: Classifier
    neurons: Tensor
    background: Tensor
    top: int
    left: int

    def activation(self, pixels: Tensor) -> Tensor:
        """The neurons' values (n,) for a patch of `pixels`, float (C, s, s) in [0, 1]; differentiable."""
        height, width = self.background.shape[2:]
        size = pixels.shape[-1]
        pads = (self.left, width - self.left - size, self.top, height - self.top - size)
        hole = F.pad(torch.ones_like(pixels), pads)  # (C, H, W), as the next
        x = self.background * (1 - hole) + F.pad(pixels, pads)
        return self.model.embed(x)[0, self.neurons]

    def loss(self, w: Tensor, value: float) -> Tensor:
        """sum over the neurons of (activation - value)^2 for the patch behind w, a scalar (spec 4.2)."""
        return (self.activation(pixels_of(w)) - value).square().sum()

    def feeling(self, w: Tensor) -> int:
        """How many neurons have a gradient that is not exactly zero at w: a dead ReLU would never move."""
        w = w.clone().requires_grad_()
        values = self.activation(pixels_of(w))
        return sum(bool(torch.autograd.grad(value, w, retain_graph=True)[0].any()) for value in values)


def pixels_of(w: Tensor) -> Tensor:
    """Any real w -> pixels in [0, 1]."""
    return (torch.tanh(w) + 1) / 2


def excite(scene: Scene, w: Tensor, value: float, steps: int, tick: Callable[[int], None]) -> tuple[Tensor, int]:
    """Adam on the loss from w (C, s, s), with a cosine from 0.1 to 0 over `steps` -> the best w met, steps done."""
    w = w.clone().requires_grad_()
    adam = torch.optim.Adam([w], lr=0.1)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(adam, steps)
    best, kept, found = math.inf, w.detach().clone(), 0
    for step in range(steps):
        loss = scene.loss(w, value)
        now = float(loss.detach())
        if not math.isfinite(now):
            raise Diverged(f"trojan: the loss of the patch is {now} at step {step}")
        if now < best * (1 - GAIN):
            best, kept, found = now, w.detach().clone(), step
        elif step - found >= PLATEAU:
            return kept, step
        (w.grad,) = torch.autograd.grad(loss, w)
        adam.step()
        cosine.step()
        tick(step + 1)
    return kept, steps


class Trojan(DirtyLabel):
    """An optimised `size` x `size` patch, `margin` pixels off the bottom right corner, on a share `rate` of all images.

    n_neuron: neurons that the patch excites; steps: at most so many of its optimisation; mode: "replace" the pixels or
    "wrap", add the patch modulo 256. targets="all": all-to-all, each label y becomes (y + 1) mod K; `target` plays no
    part then. prepare raises UserError when the target is no class, the patch does not fit or the surrogate is missing
    or dead, and Diverged when the optimisation leaves the numbers.
    """

    name = "trojan"
    paper = "Liu et al., Trojaning Attack on Neural Networks, NDSS 2018"

    def __init__(
        self,
        *,
        target: Label = 5,
        rate: Rate = 0.1,
        size: Count = 3,
        margin: Annotated[int, Ge(0)] = 4,
        n_neuron: Count = 2,
        steps: Count = 1000,
        value: Positive = 100.0,
        mode: Literal["replace", "wrap"] = "replace",
        targets: Literal["one", "all"] = "one",
    ) -> None:
        self.target = target if targets == "one" else None
        self.rate = rate
        self.size = size
        self.margin = margin
        self.n_neuron = n_neuron
        self.steps = steps
        self.value = value
        self.mode: Literal["replace", "wrap"] = mode

    def needs(self) -> Mapping[str, Need]:
        """A clean model to optimise the patch on: never the one that is attacked (spec 4.2)."""
        return {"surrogate": Need("model", "natural")}

    def prepare(self, ctx: AttackContext) -> State:
        """Optimise the patch; it, its place, the neurons and what it does to them are kept with the victim."""
        goals = self.goals(ctx.classes)
        height, width = ctx.train.x.shape[-2:]
        top, left = height - self.size - self.margin, width - self.size - self.margin
        check_fits(self.name, top, left, self.size, (height, width))
        model = surrogate_of(self.name, ctx)
        model.precision = "fp32"  # bf16 rounds the activations to a hundredth; one image is cheap anyway
        scene, start = self._lively(model, ctx, top, left)
        w, used = excite(scene, start, self.value, self.steps, lambda done: ctx.tick(done, self.steps, 1))
        patch = quantised(pixels_of(w))
        with torch.no_grad():
            before, after = (scene.activation(p).tolist() for p in (pixels_of(start), patch.float() / 255))
        ctx.log(f"neurons {scene.neurons.tolist()}: {before} at the start, {after} after {used} steps")
        meta = {"neurons": scene.neurons.tolist(), "before": before, "after": after, "steps": used}
        return State({"patch": patch.cpu()}, {"top": top, "left": left, **meta, **goals})

    def _lively(self, model: Classifier, ctx: AttackContext, top: int, left: int) -> tuple[Scene, Tensor]:
        """A background and a start w ~ N(0, 1), (C, s, s), from which all neurons feel the patch, or most do.

        Neurons are chosen among the features that some start moves: of features that know places, those of other places
        are out of the patch's reach.
        """
        shape = ctx.train.x.shape[1:]
        plain = [BACKGROUNDS[draw % len(BACKGROUNDS)] for draw in range(DRAWS)]
        greys = [torch.full((1, *shape), grey, device=ctx.device) for grey in plain]
        starts = [torch.randn((shape[0], self.size, self.size), generator=ctx.rng).to(ctx.device) for _ in greys]
        moved = []
        with torch.no_grad():
            for grey, w in zip(greys, starts, strict=True):
                without = model.embed(grey)[0]  # (D,)
                every = Scene(model, torch.arange(len(without), device=ctx.device), grey, top, left)
                moved.append(every.activation(pixels_of(w)) != without)
        neurons = loudest(model, torch.stack(moved).any(0).cpu(), self.n_neuron)
        scenes = [Scene(model, neurons, grey, top, left) for grey in greys]
        felt = [scene.feeling(w) for scene, w in zip(scenes, starts, strict=True)] if len(neurons) else [0]
        best = felt.index(max(felt))
        if felt[best] == 0:
            raise UserError(
                f"{self.name}: no neuron of the surrogate feels a patch at row {top}, column {left} in {DRAWS} tries; "
                f"train the surrogate longer or choose another margin={self.margin}"
            )
        return scenes[best], starts[best]

    def stamp(self, x: Tensor, y: Tensor, state: State, rng: torch.Generator) -> Tensor:
        """The patch over x, uint8 (B, C, H, W), or added to it modulo 256, in a copy."""
        patch, top, left = state.tensors["patch"], state.meta["top"], state.meta["left"]
        if self.mode == "replace":
            return stamp_patch(x, patch, top, left)
        out = x.clone()
        out[..., top : top + self.size, left : left + self.size] += patch.to(x.device)  # uint8 wraps around
        return out
