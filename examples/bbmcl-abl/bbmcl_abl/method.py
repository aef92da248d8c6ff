"""abl: train a network anew on the suspect training set, isolate what it learns too easily, and unlearn that.

Paper: Y. Li, X. Lyu, N. Koren, L. Lyu, B. Li, X. Ma, "Anti-Backdoor Learning: Training Clean Models on Poisoned Data",
NeurIPS 2021 (arXiv 2110.11571). Three phases:

isolate   Local gradient ascent, sign(l - gamma) l, holds the loss l of ordinary images near gamma. Poisoned images are
          learnt faster and sink below. The share of the lowest loss is isolated.
rest      Ordinary training on all other images.
unlearn   Gradient ascent on the isolated images takes back what they taught.

The paper's text has gamma = 0.5, 1 % isolated, 100 epochs with the turn after 20, learning rate 0.1, and after the turn
one loss, E_rest[l] - E_isolated[l]. The authors' released code (as of 2021) differs: 10 epochs to isolate, by default
with flooding in place of local ascent; 60 on the rest, a tenth of the learning rate from the 40th on; ascent on the
isolated images alone at a learning rate of 0.0005, `unlearning_epochs` 5, of which the first only tests: 4 passes.
Here: local ascent and 20 epochs, as in the text; the rest and the unlearning as in the released code, the ascent being
a few passes over the isolated images and not one step for each batch of the rest, which wrecks the network.
Differs: the network is a fresh one of the victim's architecture; the victim that the harness hands over and the clean
images are not used. By default the sign is that of the batch's mean loss, as in the released code; `sign=image` reads
the formula image by image, which isolates worse the longer it goes on, as it holds poisoned images at gamma as well.
Batch, momentum and weight decay are the recipe's, without the released code's Nesterov step. Augmented is the training
on the rest alone, by the recipe, without the released code's cut-out. Ascent climbs slowly where the isolated images'
loss is next to nothing, and then ever faster; where it wrecks the network the repair ends as diverged.
Budget: isolate and rest take `times` times as many epochs or steps as ctx.recipe says: with its 20 epochs 20 and 60;
budget `mid` leaves repairs as they are, and `quick`, which counts steps, takes 4 x 200.
Should reach: the authors' README reports ASR 3.04 and BA 86.11 for BadNets on CIFAR-10 with WRN-16-1; not run here.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Annotated, Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from backdoorbench_mcl.api import (
    Batch,
    Classifier,
    Defense,
    DefenseContext,
    Diverged,
    Images,
    Interval,
    Knowledge,
    NonNegative,
    Positive,
    Rate,
    Recipe,
    UserError,
)
from backdoorbench_mcl.kit import at_once, fit, share

LEAST = 2  # isolated images: batch norm cannot train on one
WRECKED = 10.0  # times the loss of guessing, log K: the mean loss of the rest after which nothing is left to measure


def local_ascent(losses: Tensor, gamma: float, sign: Literal["batch", "image"] = "batch") -> Tensor:
    """sign(l - gamma) l of the mean of a batch's losses, (B,), or the mean of that of each: descends above gamma,
    ascends below it. A scalar.
    """
    level = losses.mean() if sign == "batch" else losses
    return ((level.detach() - gamma).sign() * level).mean()


def losses_of(model: Classifier, images: Images) -> Tensor:
    """Cross-entropy of every image as it is, in eval mode, which the model is left in: float32 (N,) on the CPU."""
    model.eval()
    with torch.no_grad():
        parts = [
            cross_entropy(model(batch.x), batch.y, reduction="none").cpu()
            for batch in images.batches(at_once(images.x))
        ]
    return torch.cat(parts)


def isolated_count(rate: float, total: int) -> int:
    """How many of `total` images are isolated."""
    return max(LEAST, share(rate, total))


def lowest(losses: Tensor, count: int) -> Tensor:
    """Which of the losses (N,) are the `count` lowest, the earlier of equal ones: bool (N,)."""
    chosen = torch.zeros(len(losses), dtype=torch.bool)
    chosen[losses.argsort(stable=True)[:count]] = True
    return chosen


def lengths(times: float, usual: int, turn: float) -> tuple[int, int]:
    """Steps to isolate, at least one, and steps on the rest: together `times` the usual number, rounded."""
    total = max(1, round(times * usual))
    first = max(1, round(turn * total))
    return first, total - first


class ABL(Defense):
    """gamma: where local ascent holds the loss. sign: that of a batch's mean loss, or each image's own.

    isolation: share of the suspect images that is isolated and unlearned. times: length of isolation and ordinary
    training together, in units of ctx.recipe. turn: share of it before the isolation. lr: of both; the last third of
    the ordinary training has a tenth. unlearn, unlearn_lr: passes of ascent over the isolated images, 0 for none, and
    their learning rate.
    """

    name = "abl"
    version = 2
    paper = "Li et al., Anti-Backdoor Learning, NeurIPS 2021, arXiv 2110.11571"

    def __init__(
        self,
        *,
        gamma: NonNegative = 0.5,
        sign: Literal["batch", "image"] = "batch",
        isolation: Annotated[float, Interval(gt=0, lt=1)] = 0.01,
        turn: Rate = 0.25,
        times: Positive = 4.0,
        lr: Positive = 0.1,
        unlearn: Annotated[int, Interval(ge=0, le=100)] = 4,
        unlearn_lr: Positive = 0.0005,
    ) -> None:
        self.gamma = gamma
        self.sign: Literal["batch", "image"] = sign
        self.isolation = isolation
        self.turn = turn
        self.times = times
        self.lr = lr
        self.unlearn = unlearn
        self.unlearn_lr = unlearn_lr

    @property
    def knows(self) -> frozenset[Knowledge]:
        return frozenset({"suspect"})

    @property
    def uses_labels(self) -> bool:
        """Of the clean images nothing is used at all."""
        return False

    def defend(self, model: Classifier, ctx: DefenseContext) -> Classifier:
        """Train a fresh network by local ascent, then without what it isolates, then unlearn that."""
        suspect: Images = ctx.granted.suspect.to(ctx.device)
        if len(suspect) <= LEAST:
            raise UserError(f"abl: {len(suspect)} suspect images were given, expected {LEAST + 1} or more")
        count = isolated_count(self.isolation, len(suspect))
        first, middle = lengths(self.times, ctx.recipe.total(len(suspect)), self.turn)
        ascent = self._recipe(ctx, epochs=max(1, self.unlearn), steps=None, lr=self.unlearn_lr)
        last = ascent.total(count) if self.unlearn else 0
        course = _Course(ctx.fresh(), ctx, first + middle + last)

        to_isolate = self._recipe(ctx, steps=first, lr=self.lr)
        course.train("isolate", suspect, to_isolate, lambda losses: local_ascent(losses, self.gamma, self.sign))
        chosen = lowest(losses_of(course.net, suspect), count)
        isolated, rest = suspect.subset(chosen), suspect.subset(~chosen)
        del suspect
        ctx.log(f"isolated {len(isolated)} of {len(chosen)} images, labels {isolated.y.unique().tolist()}")
        if middle:
            ordinary = self._recipe(ctx, steps=middle, lr=self.lr, milestones=(2 / 3,))
            course.train("rest", rest, ordinary, torch.mean, augmented=True)
        if last:
            course.train("unlearn", isolated, ascent, lambda losses: -losses.mean())
            require_whole(float(losses_of(course.net, rest).mean()), ctx.classes, last)
        return course.net.eval()

    def _recipe(self, ctx: DefenseContext, **own: Any) -> Recipe:
        return Recipe(**{**ctx.recipe.params, "milestones": (), "gamma": 0.1, **own})


def require_whole(loss: float, classes: int, steps: int) -> None:
    """Raises Diverged where the mean loss of the rest says that the ascent has wrecked the network."""
    bound = WRECKED * math.log(classes)
    if not loss <= bound:
        raise Diverged(
            f"abl: after {steps} steps of ascent the mean loss of the other images is {loss:.3g}, expected at most "
            f"{bound:.3g}; lower abl.unlearn or abl.unlearn_lr"
        )


class _Course:
    """The phases of the training of `net`, whose progress counts as one of `total` steps."""

    def __init__(self, net: Classifier, ctx: DefenseContext, total: int) -> None:
        self.net = net
        self.ctx = ctx
        self.total = total
        self.begun = 0

    def train(
        self, name: str, images: Images, recipe: Recipe, reduce: Callable[[Tensor], Tensor], augmented: bool = False
    ) -> None:
        """One phase. reduce: what it minimises, of the losses (B,) of a batch."""
        before = self.begun
        self.begun += recipe.total(len(images))

        def tick(done: int, _: int, seen: int) -> None:
            self.ctx.tick(before + done, self.total, seen)

        def loss(batch: Batch) -> Tensor:
            return reduce(cross_entropy(self.net(batch.x), batch.y, reduction="none"))

        augment = self.ctx.augment if augmented else None
        part = dataclasses.replace(self.ctx, tick=tick, augment=augment)
        fit(self.net.train(), images, part, loss, recipe=recipe, name=name)
