"""nad: fine-tune a copy of the victim into a teacher, then fine-tune the victim towards the teacher's attention.

Paper: Y. Li et al., "Neural Attention Distillation: Erasing Backdoor Triggers from Deep Neural Networks" (NAD), ICLR
2021 (arXiv 2101.05930). Source: spec 9.2, 12.6.
Differs: the teacher is fine-tuned on the same clean images (NAD's published teacher saw the whole training set, spec
9.2); augmentation and normalisation are the common ones, without NAD's cut-out. Ours: the teacher follows the student's
schedule from its first epoch on, by the same epochs, because the sources give it no schedule of its own.
Should reach: what the rows NAD of spec 11, Table 1, print; its repair hangs on the augmentation (CIFAR-10, Trojan: ASR
5.14 with, 91.08 without, spec 12.6).
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from backdoorbench_mcl.api import (
    Batch,
    Classifier,
    Context,
    Count,
    Defense,
    DefenseContext,
    Ge,
    NonNegative,
    NotApplicable,
    Positive,
    Recipe,
    Snapshot,
)
from backdoorbench_mcl.kit import fit, frozen

from .training import Meter, adapt

DROPS = ((2, 0.1), (20, 0.01))  # NAD's own schedule: 0.1 for epochs 0-1, 0.01 for 2-19, then 0.0001

# ---------------------------------------------------------------- pure functions


def attention_map(stage: Tensor, power: float = 2.0) -> Tensor:
    """sum_c |F|^p, divided by its L2 norm over H and W plus 1e-6: (B, C, H, W) -> (B, H, W)."""
    maps = stage.abs().pow(power).sum(1)  # (B, H, W)
    normed: Tensor = maps / (torch.linalg.vector_norm(maps, dim=(1, 2), keepdim=True) + 1e-6)
    return normed


def attention_loss(student: Tensor, teacher: Tensor, power: float = 2.0) -> Tensor:
    """Mean over all B*H*W elements of the squared difference of two stages' maps, each (B, C, H, W); a scalar.

    The mean runs over pixels too, so a weight of 500 on 32x32 maps is 0.488 on 2 - 2 cos of the maps (spec 9.2).
    """
    return F.mse_loss(attention_map(student, power), attention_map(teacher, power))


def distillation(
    student: Sequence[Tensor], teacher: Sequence[Tensor], betas: Sequence[float], power: float = 2.0
) -> Tensor:
    """sum_l beta_l * AT_l over the last stages, aligned at the end: of four stages the first goes without.

    With fewer stages than betas, the first betas have nothing to weigh. Returns a scalar.
    """
    pairs = list(zip(reversed(student), reversed(teacher), reversed(betas), strict=False))
    return torch.stack([beta * attention_loss(s, t, power) for s, t, beta in pairs]).sum()


def nad_schedule(recipe: Recipe, epochs: int) -> Recipe:
    """`recipe` with NAD's learning rates, 0.1, 0.01 and 0.0001 where recipe.lr is 0.1, else as many times as much.

    epochs: how many the training stands for, whether `recipe` counts epochs or steps; drops that it does not live to
    see are left out. Example: 20 epochs -> milestones (0.1,), gamma (0.1,).
    """
    drops = [(after / epochs, gamma) for after, gamma in DROPS if after < epochs]
    milestones, gammas = tuple(at for at, _ in drops), tuple(gamma for _, gamma in drops)
    return Recipe(**{**recipe.params, "milestones": milestones, "gamma": gammas})


# ---------------------------------------------------------------- crash safety


class Carrying:
    """The snapshot of a second training: each save carries `tensors`, what the first one made, so that a restarted job
    has both at hand and need not train the first again.
    """

    PREFIX = "carried."

    def __init__(self, inner: Snapshot, tensors: Mapping[str, Tensor]) -> None:
        self.inner = inner
        self.tensors = {self.PREFIX + name: tensor.detach().cpu() for name, tensor in tensors.items()}

    @classmethod
    def find(cls, inner: Snapshot) -> dict[str, Tensor] | None:
        """What the first training made, where the second has saved already, else None."""
        tensors = (inner.load() or ({}, {}))[0]
        start = len(cls.PREFIX)
        return {name[start:]: tensor for name, tensor in tensors.items() if name.startswith(cls.PREFIX)} or None

    def load(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """The second training's own part of the newest snapshot."""
        found = self.inner.load()
        if found is None:
            return None
        return {name: tensor for name, tensor in found[0].items() if not name.startswith(self.PREFIX)}, found[1]

    def save(self, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
        """Both parts."""
        self.inner.save({**tensors, **self.tensors}, meta)


def _generators(ctx: Context) -> dict[str, Tensor]:
    # kit.fit knows its own snapshot by these two among others, so the student must start from the same ones again
    return {"rng.method": ctx.rng.get_state(), "rng.global": torch.get_rng_state()}


def _set_generators(ctx: Context, states: Mapping[str, Tensor]) -> None:
    ctx.rng.set_state(states["rng.method"].cpu())
    torch.set_rng_state(states["rng.global"].cpu())


# ---------------------------------------------------------------- the defense


class NAD(Defense):
    """Cross-entropy plus sum_l beta_l * AT_l against the teacher, train mode, all layers.

    power: p of the attention maps.  betas: weights of the last three stages, in order.
    teacher_epochs: length of the teacher's training; where the recipe counts steps, it takes the same share of them as
    teacher_epochs has of the student's epochs.  teacher_steps: a number of steps in its place.
    schedule: "nad" takes NAD's own drops (spec 9.2) from the recipe's first learning rate and ignores its milestones;
    "shared" takes the recipe's, the teacher's compressed to its length (the paper's choice for ImageNet).
    lr, epochs, steps: None takes the common recipe's.
    """

    name = "nad"
    paper = "Li et al., Neural Attention Distillation, ICLR 2021, arXiv 2101.05930"

    def __init__(
        self,
        *,
        power: Annotated[float, Ge(1)] = 2.0,
        betas: tuple[NonNegative, NonNegative, NonNegative] = (500.0, 1000.0, 1000.0),
        teacher_epochs: Count = 10,
        teacher_steps: Count | None = None,
        schedule: Literal["nad", "shared"] = "nad",
        nesterov: bool = True,
        lr: Positive | None = None,
        epochs: Count | None = None,
        steps: Count | None = None,
    ) -> None:
        self.power = power
        self.betas = betas
        self.teacher_epochs = teacher_epochs
        self.teacher_steps = teacher_steps
        self.schedule: Literal["nad", "shared"] = schedule
        self.nesterov = nesterov
        self.lr = lr
        self.epochs = epochs
        self.steps = steps

    def recipes(self, common: Recipe) -> tuple[Recipe, Recipe]:
        """The teacher's recipe and the student's, on top of the common one."""
        student = adapt(common, nesterov=self.nesterov, lr=self.lr, epochs=self.epochs, steps=self.steps)
        steps = self.teacher_steps
        if steps is None and student.steps is not None:
            steps = max(1, round(student.steps * self.teacher_epochs / student.epochs))
        teacher = adapt(student, nesterov=self.nesterov, epochs=self.teacher_epochs, steps=steps)
        if self.schedule == "nad":
            return nad_schedule(teacher, teacher.epochs), nad_schedule(student, student.epochs)
        return teacher, student

    def defend(self, model: Classifier, ctx: DefenseContext) -> Classifier:
        """Train the teacher on a copy, then the victim in place, and return it.

        Raises NotApplicable for a network without stages.
        """
        with torch.no_grad():
            stages = model.eval().forward_all(ctx.clean.x[:1].float().div_(255.0)).stages
        if not stages:
            raise NotApplicable(f"{self.name}: the network has no stages, whose attention it could distil")
        for_teacher, for_student = self.recipes(ctx.recipe)
        lengths = [recipe.total(len(ctx.clean)) for recipe in (for_teacher, for_student)]

        carried = Carrying.find(ctx.snapshot)
        if carried is None:
            learner = copy.deepcopy(model)
            self._teach(learner, self._part(ctx, 0, sum(lengths)), for_teacher)
            carried = {**learner.state_dict(), **_generators(ctx)}
            teacher = frozen(learner)
        else:
            ctx.log("the teacher is taken from the snapshot")
            _set_generators(ctx, carried)
            teacher = frozen(model)
            teacher.load_state_dict({name: carried[name] for name in model.state_dict()})

        part = self._part(ctx, lengths[0], sum(lengths), Carrying(ctx.snapshot, carried))
        self._distil(model, teacher, part, for_student)
        return model.eval()

    @staticmethod
    def _part(ctx: DefenseContext, before: int, total: int, snapshot: Snapshot | None = None) -> DefenseContext:
        """`ctx` for one of the two trainings, so that the progress of both counts as one."""

        def tick(step: int, _: int, images: int) -> None:
            ctx.tick(before + step, total, images)

        return dataclasses.replace(ctx, tick=tick, snapshot=snapshot or ctx.snapshot)

    def _teach(self, model: Classifier, ctx: DefenseContext, recipe: Recipe) -> None:
        meter = Meter(ctx.log, len(ctx.clean))

        def loss(batch: Batch) -> Tensor:
            value = F.cross_entropy(model(batch.x), batch.y)
            meter.add(len(batch.x), teacher_loss=value)
            return value

        model.train()
        fit(model, ctx.clean, ctx, loss, recipe=recipe)

    def _distil(self, model: Classifier, teacher: Classifier, ctx: DefenseContext, recipe: Recipe) -> None:
        meter = Meter(ctx.log, len(ctx.clean))

        def loss(batch: Batch) -> Tensor:
            out = model.forward_all(batch.x)
            with torch.no_grad():
                guide = teacher.forward_all(batch.x).stages
            ce = F.cross_entropy(out.logits, batch.y)
            pull = distillation(out.stages, guide, self.betas, self.power)
            hits = (out.logits.detach().argmax(1) == batch.y).float().mean()
            meter.add(len(batch.x), loss=ce + pull, ce=ce, attention=pull, accuracy=hits)
            return ce + pull

        model.train()
        fit(model, ctx.clean, ctx, loss, recipe=recipe)
