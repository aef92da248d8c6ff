"""abl: train a network anew on the suspect training set, isolating what it learns too easily and unlearning that.

Paper: Y. Li, X. Lyu, N. Koren, L. Lyu, B. Li, X. Ma, "Anti-Backdoor Learning: Training Clean Models on Poisoned Data",
NeurIPS 2021 (arXiv 2110.11571). Local gradient ascent, E[sign(l - gamma) l], holds the loss l of ordinary images
near gamma, below which poisoned ones sink at once; the share of lowest loss is isolated. Global gradient ascent,
E_rest[l] - E_isolated[l], then takes back what those taught. Of the paper are gamma = 0.5, 1 % isolated, 100 epochs
with the turn after 20, learning rate 0.1.
Differs: between the two there are 60 epochs on the rest alone, as in the authors' experiments; their learning rate and
that of the ascent (0.0005) follow the same source, as we know it. With turn + unlearn = 1 there are none, as in the
formula. The ascent has no bound: too many of its steps, or too large ones, wreck the network. The network is a fresh
one of the victim's architecture: the victim that the harness hands over, and the clean images, are not used. The sign
is that of each image's own loss, as in the formula, not of the batch's mean.
Budget: the whole takes `times` times as many epochs or steps as ctx.recipe says. With its 20 epochs that makes the
paper's 100, epochs being passes over the suspect set; budget `mid` leaves repairs as they are, hence 100 as well, and
`quick`, which counts steps, takes 5 x 200. Batch, momentum, weight decay and augmentation are the recipe's.
Should reach: on CIFAR-10, BadNets with 10 % poison, ASR of a few per cent at some points less BA than the victim.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from fractions import Fraction
from typing import Annotated

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from backdoorbench_mcl.api import (
    Batch,
    Classifier,
    Defense,
    DefenseContext,
    Images,
    Interval,
    Knowledge,
    NonNegative,
    Positive,
    Rate,
    Recipe,
    UserError,
)
from backdoorbench_mcl.kit import at_once, fit


def local_ascent(losses: Tensor, gamma: float) -> Tensor:
    """E[sign(l - gamma) l] over the losses of a batch, (B,): descends above gamma, ascends below it. A scalar."""
    return ((losses.detach() - gamma).sign() * losses).mean()


def global_ascent(rest: Tensor, isolated: Tensor) -> Tensor:
    """E_rest[l] - E_isolated[l] of two batches of losses, (B,) and (A,): a scalar."""
    return rest.mean() - isolated.mean()


def losses_of(model: Classifier, images: Images) -> Tensor:
    """Cross-entropy of every image as it is, in eval mode, which the model is left in: float32 (N,) on the CPU."""
    model.eval()
    with torch.no_grad():
        parts = [
            cross_entropy(model(batch.x), batch.y, reduction="none").cpu()
            for batch in images.batches(at_once(images.x))
        ]
    return torch.cat(parts)


def lowest(losses: Tensor, share: float) -> Tensor:
    """Which of the losses (N,) are isolated, the floor(share * N) lowest but at least one, the earlier of equal ones:
    bool (N,). share is read as the decimal that was typed.
    """
    count = max(1, int(Fraction(str(share)) * len(losses)))
    chosen = torch.zeros(len(losses), dtype=torch.bool)
    chosen[losses.argsort(stable=True)[:count]] = True
    return chosen


def phases(total: int, turn: float, unlearn: float) -> tuple[int, int, int]:
    """`total` steps in three: to isolate, at least one; on the rest; to unlearn. Shares are rounded."""
    first = max(1, round(turn * total))
    last = min(round(unlearn * total), total - first)
    return first, total - first - last, last


class ABL(Defense):
    """gamma: where local ascent holds the loss. isolation: share of the suspect images that is isolated and unlearned.

    turn, unlearn: shares of the training before the isolation and for the global ascent, the rest being ordinary
    training between the two. times: length of the whole in units of ctx.recipe. lr: until two thirds of the ordinary
    training are done, a tenth from then on. unlearn_lr: of the global ascent.
    """

    name = "abl"
    paper = "Li et al., Anti-Backdoor Learning, NeurIPS 2021, arXiv 2110.11571"

    def __init__(
        self,
        *,
        gamma: NonNegative = 0.5,
        isolation: Annotated[float, Interval(gt=0, lt=1)] = 0.01,
        turn: Rate = 0.2,
        unlearn: Rate = 0.2,
        times: Positive = 5.0,
        lr: Positive = 0.1,
        unlearn_lr: Positive = 0.0005,
    ) -> None:
        if turn + unlearn > 1:
            raise UserError(f"abl: turn={turn:g} and unlearn={unlearn:g} were given, expected shares of 1 together")
        self.gamma = gamma
        self.isolation = isolation
        self.turn = turn
        self.unlearn = unlearn
        self.times = times
        self.lr = lr
        self.unlearn_lr = unlearn_lr

    @property
    def knows(self) -> frozenset[Knowledge]:
        return frozenset({"suspect"})

    @property
    def uses_labels(self) -> bool:
        """Of the clean images nothing is used at all."""
        return False

    def defend(self, model: Classifier, ctx: DefenseContext) -> Classifier:
        """Train a fresh network by local ascent, without what it isolates, and by global ascent."""
        suspect: Images = ctx.granted.suspect.to(ctx.device)
        if len(suspect) < 2:
            raise UserError(f"abl: {len(suspect)} suspect images were given, expected 2 or more: one is isolated")
        first, middle, last = phases(round(self.times * ctx.recipe.total(len(suspect))), self.turn, self.unlearn)
        net = ctx.fresh()

        def each(batch: Batch) -> Tensor:
            return cross_entropy(net(batch.x), batch.y, reduction="none")  # (B,)

        _train(net, suspect, ctx, "isolate", lambda batch: local_ascent(each(batch), self.gamma), first, self.lr)
        chosen = lowest(losses_of(net, suspect), self.isolation)
        isolated, rest = suspect.subset(chosen), suspect.subset(~chosen)
        ctx.log(f"isolated {len(isolated)} of {len(suspect)} images, labels {isolated.y.unique().tolist()}")
        _train(net, rest, ctx, "rest", lambda batch: each(batch).mean(), middle, self.lr, (2 / 3,))

        def unlearning(batch: Batch) -> Tensor:
            drawn = torch.randperm(len(isolated), generator=ctx.rng)[: ctx.recipe.batch]
            x, y = isolated.take(drawn)
            x = x if ctx.augment is None else ctx.augment(x, ctx.rng)
            # one pass for both, as batch norm would tell batches of isolated images from others
            logits = net(torch.cat([batch.x, x.float() / 255]))  # (B + A, K)
            losses = cross_entropy(logits, torch.cat([batch.y, y]), reduction="none")
            return global_ascent(losses[: len(batch.x)], losses[len(batch.x) :])

        _train(net, rest, ctx, "unlearn", unlearning, last, self.unlearn_lr)
        return net.eval()


def _train(
    net: Classifier, images: Images, ctx: DefenseContext, phase: str, loss: Callable[[Batch], Tensor], steps: int,
    lr: float, milestones: tuple[float, ...] = (),
) -> None:  # fmt: skip
    """One phase of `steps` steps, none at 0; its curve is recorded under its name."""
    if steps == 0:
        return
    own = {"epochs": 1, "steps": steps, "lr": lr, "milestones": milestones, "gamma": 0.1}
    named = dataclasses.replace(ctx, record=lambda name, step, value: ctx.record(f"{name}, {phase}", step, value))
    fit(net.train(), images, named, loss, recipe=Recipe(**{**ctx.recipe.params, **own}))
