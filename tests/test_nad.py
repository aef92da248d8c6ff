"""Attention distillation: maps and schedule against golden values and a literal loop, two trainings in one job."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from tiny import Bench, Memory, Tiny, generator, images, same, state
from tiny import one_thread as one_thread
from torch import Tensor, nn

from backdoorbench_mcl.api import NotApplicable, Recipe, UserError
from bbmcl_defenses.ft import FT
from bbmcl_defenses.nad import NAD, attention_loss, attention_map, distillation, nad_schedule

COMMON = Recipe(epochs=3, lr=0.05, batch=8, augment="none")  # 9 steps on 24 images


class Staged(Tiny):
    """Tiny with a second convolution and a strided third, hence with three stages."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__(seed=seed)
        rng = generator(seed + 100)
        with torch.random.fork_rng(devices=[]):
            self.more = nn.Conv2d(6, 6, 3, padding=1, bias=False)
            self.last = nn.Conv2d(6, 6, 3, stride=2, padding=1, bias=False)
        with torch.no_grad():
            for layer in (self.more, self.last):
                layer.weight.copy_(torch.randn(layer.weight.shape, generator=rng) * 0.2)

    def features(self, x: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        one = torch.relu(self.bn(self.conv(x)))
        two = self.more(one)
        three = self.last(torch.relu(two))
        return torch.relu(three).mean((2, 3)), (one, two, three)


class Noisy(Staged):
    """Draws from the global generator while it trains, as dropout does."""

    def head(self, z: Tensor) -> Tensor:
        out: Tensor = self.fc(nn.functional.dropout(z, 0.2, self.training))
        return out


# ---------------------------------------------------------------- the loss


def map_by_hand(stage: Tensor, power: float) -> list[list[list[float]]]:
    found = []
    for image in stage.tolist():
        height, width = len(image[0]), len(image[0][0])
        total = [
            [sum(abs(channel[row][column]) ** power for channel in image) for column in range(width)]
            for row in range(height)
        ]
        norm = math.sqrt(sum(value**2 for line in total for value in line)) + 1e-6
        found.append([[value / norm for value in line] for line in total])
    return found


@pytest.mark.parametrize("power", [1.0, 2.0, 4.0])
def test_attention_against_a_literal_loop(power: float) -> None:
    student = torch.randn(2, 3, 4, 5, generator=generator(1), dtype=torch.float64)
    teacher = torch.randn(2, 3, 4, 5, generator=generator(2), dtype=torch.float64)
    ours, theirs = map_by_hand(student, power), map_by_hand(teacher, power)
    assert torch.allclose(attention_map(student, power), torch.tensor(ours, dtype=torch.float64), atol=1e-12)
    squares = [
        (ours[b][row][column] - theirs[b][row][column]) ** 2
        for b in range(2)
        for row in range(4)
        for column in range(5)
    ]
    assert float(attention_loss(student, teacher, power)) == pytest.approx(sum(squares) / 40, rel=1e-12)


@pytest.mark.parametrize(("size", "beta", "expected"), [(32, 500, 0.488), (16, 1000, 3.906), (8, 1000, 15.625)])
def test_the_effective_weight_of_a_map(size: int, beta: float, expected: float) -> None:
    """Spec 13: beta * AT is beta / (H*W) times the mean of 2 - 2 cos of the maps."""
    student = torch.randn(3, 4, size, size, generator=generator(3), dtype=torch.float64)
    teacher = torch.randn(3, 4, size, size, generator=generator(4), dtype=torch.float64)
    ours, theirs = (stage.square().sum(1).flatten(1) for stage in (student, teacher))
    angle = (2 - 2 * nn.functional.cosine_similarity(ours, theirs)).mean()
    weight = float(beta * attention_loss(student, teacher) / angle)
    assert weight == pytest.approx(expected, abs=5e-4)


def test_a_dead_map_is_zero_and_has_a_finite_gradient() -> None:
    stage = torch.zeros(1, 2, 3, 3, requires_grad=True)
    loss = attention_loss(stage, torch.ones(1, 2, 3, 3))
    loss.backward()
    assert float(loss.detach()) == pytest.approx(1 / 9, rel=1e-4)
    assert stage.grad is not None
    assert bool(stage.grad.isfinite().all())


def test_distillation_counts_stages_from_the_end() -> None:
    student = [torch.rand(2, 3, 4, 4, generator=generator(seed)) for seed in range(4)]
    teacher = [torch.rand(2, 3, 4, 4, generator=generator(seed)) for seed in range(10, 14)]
    parts = [float(attention_loss(s, t)) for s, t in zip(student, teacher, strict=True)]
    betas = (1.0, 20.0, 300.0)
    expected = 1.0 * parts[1] + 20.0 * parts[2] + 300.0 * parts[3]
    assert float(distillation(student, teacher, betas)) == pytest.approx(expected, rel=1e-5)
    two = 20.0 * parts[2] + 300.0 * parts[3]
    assert float(distillation(student[2:], teacher[2:], betas)) == pytest.approx(two, rel=1e-5)


# ---------------------------------------------------------------- schedules


def rates(recipe: Recipe, total: int) -> list[float]:
    return [recipe.lr_at(step, total) for step in range(total)]


@pytest.mark.parametrize(("lr", "factor"), [(0.1, 1.0), (0.01, 0.1)])  # CIFAR-10, GTSRB
def test_the_schedule_of_nad(lr: float, factor: float) -> None:
    common = Recipe(lr=lr, milestones=(0.05, 0.5), gamma=0.1)
    teacher, student = NAD().recipes(common)
    assert rates(student, 20) == pytest.approx([0.1 * factor] * 2 + [0.01 * factor] * 18)
    assert (teacher.epochs, teacher.steps) == (10, None)
    assert rates(teacher, 10) == pytest.approx([0.1 * factor] * 2 + [0.01 * factor] * 8)
    assert student.nesterov
    assert teacher.nesterov
    long = nad_schedule(Recipe(lr=lr), 30)
    assert rates(long, 30) == pytest.approx([0.1 * factor] * 2 + [0.01 * factor] * 18 + [1e-4 * factor] * 10)


def test_the_shared_schedule_is_the_common_table() -> None:
    common = Recipe(milestones=(0.1, 0.5), gamma=(0.1, 0.2))
    teacher, student = NAD(schedule="shared").recipes(common)
    assert student.params == {**common.params, "nesterov": True}
    assert teacher.params == {**common.params, "nesterov": True, "epochs": 10}


@pytest.mark.parametrize(
    ("given", "recipe", "expected"),
    [
        ({}, {"steps": 200}, (100, 200)),
        ({"teacher_epochs": 5}, {"steps": 200}, (50, 200)),
        ({"teacher_steps": 7}, {"steps": 200}, (7, 200)),
        ({"steps": 40}, {"steps": 200}, (20, 40)),
        ({"epochs": 3}, {"steps": 200}, (30, 9)),  # 3 batches an epoch
        ({}, {}, (30, 60)),
        ({"teacher_epochs": 1}, {"steps": 1}, (1, 1)),
    ],
)
def test_lengths_of_both_trainings(given: dict[str, Any], recipe: dict[str, Any], expected: tuple[int, int]) -> None:
    teacher, student = NAD(**given).recipes(Recipe(batch=8, **recipe))
    assert (teacher.total(24), student.total(24)) == expected


def test_a_budget_of_steps_keeps_the_shape_of_the_schedule() -> None:
    teacher, student = NAD().recipes(Recipe(steps=200))
    assert rates(student, 200) == pytest.approx([0.1] * 20 + [0.01] * 180)
    assert rates(teacher, 100) == pytest.approx([0.1] * 20 + [0.01] * 80)


# ---------------------------------------------------------------- the defense


def test_without_betas_the_student_is_fine_tuned() -> None:
    """Bit by bit: the teacher moves nothing but the generator."""
    method = NAD(betas=(0.0, 0.0, 0.0), teacher_epochs=1, schedule="shared")
    repaired = state(method.defend(Staged(), Bench(recipe=COMMON).defense(images())))
    ctx = Bench(recipe=COMMON).defense(images())
    FT(epochs=1).defend(Staged(), ctx)
    assert same(state(FT().defend(Staged(), ctx)), repaired)


@pytest.mark.parametrize("power", [2.0, 3.0])
def test_one_step_of_the_student_against_a_literal_one(power: float) -> None:
    """The teacher is in eval mode and fixed, the student in train mode; both see the same batch."""
    recipe = Recipe(steps=1, lr=0.05, milestones=(), batch=8, augment="none")
    betas = (5.0, 10.0, 20.0)
    method = NAD(power=power, betas=betas, teacher_steps=1, schedule="shared")
    repaired = method.defend(Staged(), Bench(recipe=recipe, seed=4).defense(images()))

    ctx = Bench(recipe=recipe, seed=4).defense(images())
    teacher = FT().defend(Staged(), ctx)
    student = Staged().train()
    chosen = torch.randperm(24, generator=ctx.rng)[:8]
    x, y = images().x[chosen].float() / 255, images().y[chosen]
    out = student.forward_all(x)
    total = -out.logits.log_softmax(1)[torch.arange(8), y].mean()
    for beta, ours, theirs in zip(betas, out.stages, teacher.forward_all(x).stages, strict=True):
        found = ours.abs().pow(power).sum(1)
        found = found / (found.square().sum((1, 2), keepdim=True).sqrt() + 1e-6)
        total = total + beta * (found - torch.tensor(map_by_hand(theirs, power))).square().mean()
    names = dict(student.named_parameters())
    gradients = torch.autograd.grad(total, list(names.values()))
    for (name, weight), gradient in zip(names.items(), gradients, strict=True):
        expected = weight - 0.05 * 1.9 * (gradient + 1e-4 * weight)  # Nesterov's first step
        assert torch.allclose(repaired.state_dict()[name], expected, atol=1e-5), name


def test_the_pull_brings_the_students_maps_to_the_teachers() -> None:
    def distance(betas: tuple[float, float, float]) -> float:
        method = NAD(betas=betas, teacher_epochs=1, lr=0.01)
        student = method.defend(Staged(), Bench(recipe=COMMON).defense(images()))
        tutor = FT(epochs=1, lr=0.01).defend(Staged(), Bench(recipe=COMMON).defense(images()))
        with torch.no_grad():
            x = images().x.float() / 255
            return float(distillation(student.forward_all(x).stages, tutor.forward_all(x).stages, (1.0, 1.0, 1.0)))

    assert distance((50.0, 100.0, 100.0)) < 0.9 * distance((0.0, 0.0, 0.0))


def test_progress_counts_both_trainings_and_both_are_logged() -> None:
    bench = Bench(recipe=COMMON)
    repaired = NAD(teacher_epochs=1).defend(Staged(), bench.defense(images()))
    assert [tick[:2] for tick in bench.ticks] == [(step, 12) for step in range(1, 13)]
    assert [line.split()[0] for line in bench.lines] == ["teacher_loss", "loss", "loss", "loss"]
    assert not repaired.training
    assert NAD().knows == frozenset()
    assert NAD().uses_labels


@pytest.mark.parametrize("kind", [Staged, Noisy])
def test_a_kill_at_any_snapshot_ends_in_the_same_bits(kind: type[Staged]) -> None:
    """Five snapshots, two by the teacher and three by the student; each is where a restarted job begins."""

    def run(start: tuple[dict[str, Tensor], Mapping[str, Any]] | None, seed: int) -> tuple[dict[str, Tensor], Bench]:
        torch.manual_seed(seed)
        bench = Bench(recipe=COMMON, snapshot=Memory(start))  # type: ignore[arg-type]
        return state(NAD(teacher_epochs=2).defend(kind(), bench.defense(images()))), bench

    whole, first = run(None, seed=5)
    assert len(first.snapshot.saved) == 5
    for done, start in enumerate(first.snapshot.saved, start=1):
        again, bench = run(start, seed=5)
        assert same(again, whole), f"killed after snapshot {done}"
        assert len(bench.ticks) == 15 - 3 * done, "nothing is done twice"
        assert [line for line in bench.lines if "teacher is taken" in line] == (
            ["the teacher is taken from the snapshot"] if done > 2 else []
        )


def test_a_network_without_stages_is_refused() -> None:
    class Flat(Tiny):
        def features(self, x: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
            return super().features(x)[0], ()

    bench = Bench()
    with pytest.raises(NotApplicable, match="has no stages"):
        NAD().defend(Flat(), bench.defense(images()))
    assert bench.ticks == []


def test_no_clean_images() -> None:
    with pytest.raises(UserError, match="no images"):
        NAD().defend(Staged(), Bench().defense(images(0)))


@pytest.mark.parametrize(
    "given",
    [
        {"power": 0.5},
        {"betas": (1.0, 2.0)},
        {"betas": (1.0, 2.0, -3.0)},
        {"teacher_epochs": 0},
        {"teacher_steps": 0},
        {"schedule": "own"},
    ],
)
def test_bounds(given: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=next(iter(given))):
        NAD(**given)
