"""kit: augmentation against a literal re-computation, training that resumes to the last bit, predictions."""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from helpers import MemorySnapshot, TinyNet, make_context, make_images, weight_bytes
from torch import Tensor, nn
from torch.nn import functional as F

from backdoorbench_mcl import kit
from backdoorbench_mcl.api import Augmentation, Batch, Classifier, Diverged, Images, Recipe, UserError
from bbmcl_models.wrn import WRN


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def gray(count: int, shape: tuple[int, int, int], low: int = 1) -> Tensor:
    """Random images without zeros, so that padding can be told from content."""
    return torch.randint(low, 256, (count, *shape), generator=generator(5), dtype=torch.uint8)


# ---------------------------------------------------------------- augmentation


def slow_crop(image: Tensor, top: int, left: int, pad: int) -> Tensor:
    """One image pasted on a black canvas and cut at (top, left), pixel by pixel."""
    _, height, width = image.shape
    out = torch.zeros_like(image)
    for i in range(height):
        for j in range(width):
            row, column = i + top - pad, j + left - pad
            if 0 <= row < height and 0 <= column < width:
                out[:, i, j] = image[:, row, column]
    return out


@pytest.mark.parametrize("shape", [(3, 8, 8), (1, 6, 9)])
def test_crop_equals_a_pixelwise_paste_and_cut(shape: tuple[int, int, int]) -> None:
    x = gray(24, shape)
    crop = kit.augmentation("crop", flip_ok=True, pad=2)
    assert crop is not None
    out = crop(x, generator())
    top, left = torch.randint(0, 5, (2, 24), generator=generator())
    want = torch.stack([slow_crop(x[n], int(top[n]), int(left[n]), 2) for n in range(24)])
    assert out.dtype == torch.uint8
    assert torch.equal(out, want)


def test_crop_places_are_uniform_and_differ_between_images_of_a_batch() -> None:
    x = torch.zeros(9000, 1, 8, 8, dtype=torch.uint8)
    x[:, 0, 4, 4] = 255
    crop = kit.augmentation("crop", flip_ok=True, pad=1)
    assert crop is not None
    counts = crop(x, generator()).bool().sum((0, 1))[3:6, 3:6]
    assert int(counts.sum()) == 9000
    assert counts.min() > 850
    assert counts.max() < 1150


def test_flip_mirrors_about_half_of_the_images_and_nothing_else() -> None:
    x = gray(400, (3, 4, 6))
    flip = kit.augmentation("flip", flip_ok=True)
    assert flip is not None
    out = flip(x, generator())
    mirrored = [torch.equal(out[n], x[n].flip(2)) for n in range(400)]
    same = [torch.equal(out[n], x[n]) for n in range(400)]
    assert all(a != b for a, b in zip(mirrored, same, strict=True))
    assert 160 < sum(mirrored) < 240


def test_no_flip_where_a_mirrored_image_is_another_class() -> None:
    assert kit.augmentation("flip", flip_ok=False) is None
    assert kit.augmentation("none", flip_ok=True) is None
    both, crop = kit.augmentation("crop+flip", flip_ok=False), kit.augmentation("crop", flip_ok=True)
    assert both is not None
    assert crop is not None
    x = gray(32, (3, 8, 8))
    assert torch.equal(both(x, generator()), crop(x, generator()))


def slow_window(image: Tensor, top: float, left: float, height: float, width: float) -> Tensor:
    """The window scaled back to the image's size: each output pixel is the bilinear mean around its centre."""
    channels, rows, columns = image.shape
    out = torch.zeros_like(image)
    for i in range(rows):
        for j in range(columns):
            y = min(max(top + (i + 0.5) * height / rows - 0.5, 0.0), rows - 1.0)
            x = min(max(left + (j + 0.5) * width / columns - 0.5, 0.0), columns - 1.0)
            a, b = int(y), int(x)
            c, d = min(a + 1, rows - 1), min(b + 1, columns - 1)
            u, v = y - a, x - b
            for k in range(channels):
                value = (1 - u) * ((1 - v) * float(image[k, a, b]) + v * float(image[k, a, d]))
                value += u * ((1 - v) * float(image[k, c, b]) + v * float(image[k, c, d]))
                out[k, i, j] = round(value)
    return out


def test_resized_crop_equals_a_pixelwise_interpolation_of_its_window() -> None:
    x = gray(12, (3, 9, 7))
    augment = kit.augmentation("resized-crop", flip_ok=True)
    assert augment is not None
    out = augment(x, generator(4))
    area, aspect, top, left = torch.rand(4, 12, generator=generator(4))
    for i in range(12):
        size = (0.08 + 0.92 * float(area[i])) * 63
        ratio = (3 / 4) * (16 / 9) ** float(aspect[i])  # width : height, evenly on a logarithmic scale
        height, width = (min(max(math.sqrt(part), 1), most) for part, most in ((size / ratio, 9), (size * ratio, 7)))
        expected = slow_window(x[i], float(top[i]) * (9 - height), float(left[i]) * (7 - width), height, width)
        assert (out[i].int() - expected.int()).abs().max() <= 1  # float32 against float64


@pytest.mark.parametrize("name", ["crop", "flip", "crop+flip", "resized-crop", "resized-crop+flip"])
def test_augmentation_follows_rng_alone_and_leaves_its_input(name: Augmentation) -> None:
    augment = kit.augmentation(name, flip_ok=True)
    assert augment is not None
    x = gray(32, (3, 8, 8))
    before = x.clone()
    world = torch.get_rng_state()
    first, again, other = augment(x, generator(1)), augment(x, generator(1)), augment(x, generator(2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(x, before)
    assert torch.equal(torch.get_rng_state(), world)


def test_augmentation_names_what_it_expects() -> None:
    with pytest.raises(UserError, match="'rotate'; expected one of none, crop, flip"):
        kit.augmentation("rotate", flip_ok=True)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="pad=-1"):
        kit.augmentation("crop", flip_ok=True, pad=-1)


# ---------------------------------------------------------------- training


def network(seed: int = 0) -> TinyNet:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return TinyNet().to(memory_format=torch.channels_last).train()


def cross_entropy(model: TinyNet) -> Callable[[Batch], Tensor]:
    return lambda batch: F.cross_entropy(model(batch.x), batch.y)


def test_fit_equals_a_loop_written_out(tmp_path: Path) -> None:
    """Momentum, weight decay, Nesterov and the schedule by their formulas, on every parameter of its own."""
    images = make_images(50)
    recipe = Recipe(epochs=3, batch=16, lr=0.05, milestones=(0.5,), weight_decay=1e-3, nesterov=True, augment="flip")
    model = network()
    model.drop.p = 0.0
    slow = copy.deepcopy(model)
    ctx = make_context(tmp_path, 3, recipe)
    kit.fit(model, images, ctx, cross_entropy(model))

    rng, flip = generator(3), kit.augmentation("flip", flip_ok=True)
    assert flip is not None
    velocity = [torch.zeros_like(p) for p in slow.parameters()]
    step = 0
    for _ in range(3):
        order = torch.randperm(50, generator=rng)
        for start in range(0, 50, 16):
            index = order[start : start + 16]
            x = flip(images.x[index], rng).float() / 255
            slow.zero_grad()
            torch.autograd.backward(F.cross_entropy(slow(x), images.y[index]))
            rate = 0.05 if step < 6 else 0.005
            with torch.no_grad():
                for p, v in zip(slow.parameters(), velocity, strict=True):
                    assert p.grad is not None
                    gradient = p.grad + 1e-3 * p
                    v.mul_(0.9).add_(gradient)
                    p.sub_(rate * (gradient + 0.9 * v))
            step += 1
    assert step == 12
    for (name, got), want in zip(model.state_dict().items(), slow.state_dict().values(), strict=True):
        assert torch.allclose(got, want, atol=1e-6), name


def test_fit_learns_and_reports_each_step(tmp_path: Path) -> None:
    images = make_images(300, classes=3)
    model = network()
    calls: list[tuple[int, int, int]] = []
    ctx = make_context(tmp_path, 0, Recipe(epochs=8, batch=32, augment="none"), tick=lambda *call: calls.append(call))
    kit.fit(model, images, ctx, cross_entropy(model))
    right = (kit.predict(model, images.x) == images.y).float().mean()
    assert right > 0.9
    assert [call[:2] for call in calls] == [(step, 80) for step in range(1, 81)]
    assert sum(call[2] for call in calls) == 8 * 300  # the last, shorter batch is trained on


def test_steps_bound_the_training_whatever_the_number_of_images(tmp_path: Path) -> None:
    done: list[int] = []
    for count in (40, 1000):
        done.clear()
        model = network()
        ctx = make_context(tmp_path, 0, Recipe(epochs=99, steps=7, batch=16), tick=lambda a, b, c: done.append(a))
        kit.fit(model, make_images(count), ctx, cross_entropy(model))
        assert done == [1, 2, 3, 4, 5, 6, 7]


def test_a_recipe_given_replaces_that_of_the_context(tmp_path: Path) -> None:
    done: list[int] = []
    model = network()
    ctx = make_context(tmp_path, 0, Recipe(epochs=5), tick=lambda a, b, c: done.append(b))
    kit.fit(model, make_images(20), ctx, cross_entropy(model), recipe=Recipe(steps=2))
    assert done == [2, 2]


def test_parameters_without_a_gradient_are_untouched(tmp_path: Path) -> None:
    """A frozen head, and a layer that the loss does not reach: no weight decay, no momentum, no gradient."""
    model = network()
    model.fc.requires_grad_(False)
    model.conv2.weight.grad = torch.ones_like(model.conv2.weight)  # stale, from before
    head = weight_bytes(model.fc)
    unreached = model.conv2.weight.detach().clone()
    kept = model.conv1.weight.detach().clone()
    recipe = Recipe(steps=5, weight_decay=0.1, augment="none")
    ctx = make_context(tmp_path, 0, recipe)
    kit.fit(model, make_images(64), ctx, lambda batch: model.forward_all(batch.x).stages[0].square().mean())
    assert weight_bytes(model.fc) == head
    assert torch.equal(model.conv2.weight, unreached)
    assert model.conv2.weight.grad is None
    assert not torch.equal(model.conv1.weight, kept)


class Killed(Exception):
    """Stands for the death of the process."""


class Life(NamedTuple):
    """What one process leaves behind."""

    state: bytes  # weights, batch-norm statistics, both generators
    steps: list[int]
    curve: list[tuple[str, int, float]]


def live(
    tmp_path: Path,
    build: Callable[[], Classifier],
    images: Images,
    recipe: Recipe,
    snapshot: MemorySnapshot,
    die_at: int | None,
) -> Life:
    """A fresh process: model, generators and context as the harness makes them, killed at step `die_at`."""
    steps: list[int] = []
    curve: list[tuple[str, int, float]] = []

    def tick(done: int, total: int, count: int) -> None:
        steps.append(done)
        if done == die_at:
            raise Killed

    with torch.random.fork_rng():
        torch.manual_seed(11)
        model = build()
        ctx = make_context(tmp_path, 7, recipe, snapshot=snapshot, tick=tick, record=lambda *point: curve.append(point))
        with contextlib.suppress(Killed):
            kit.fit(model, images, ctx, lambda batch: F.cross_entropy(model(batch.x), batch.y))
        generators = torch.cat([torch.get_rng_state(), ctx.rng.get_state()])
    return Life(weight_bytes(model) + generators.numpy().tobytes(), steps, curve)


def wide_resnet() -> Classifier:
    """The network and the number format of real victims."""
    model = WRN(depth=10).build(10, (3, 16, 16)).to(memory_format=torch.channels_last).train()
    model.precision = "bf16"
    return model


@pytest.mark.parametrize(
    ("build", "recipe", "kills"),
    [
        (network, Recipe(epochs=6, batch=16, augment="crop+flip"), [3]),
        (network, Recipe(epochs=6, batch=16, augment="crop+flip"), [5]),
        (network, Recipe(epochs=6, batch=16, augment="crop+flip", nesterov=True), [13, 18]),
        (network, Recipe(steps=23, batch=16, augment="flip"), [9]),
        (network, Recipe(steps=23, batch=16, augment="flip"), [6, 22]),
        (network, Recipe(epochs=6, batch=16, momentum=0.0, augment="none"), [24]),
        (wide_resnet, Recipe(epochs=3, batch=16, augment="crop+flip"), [6, 11]),
    ],
    ids=["first-epoch", "second-epoch", "twice", "steps", "steps-twice", "last-step", "wrn-bf16"],
)
def test_a_killed_training_resumes_to_the_last_bit(
    tmp_path: Path, build: Callable[[], Classifier], recipe: Recipe, kills: list[int]
) -> None:
    """Four steps an epoch. The tiny network's dropout draws from the global generator, which resumes too."""
    images = make_images(64, shape=(3, 16, 16))
    whole = live(tmp_path, build, images, recipe, MemorySnapshot(), None)
    snapshot = MemorySnapshot()
    for kill in kills:
        dead = live(tmp_path, build, images, recipe, snapshot, kill)
        assert dead.steps[-1] == kill
    resumed = live(tmp_path, build, images, recipe, snapshot, None)
    assert (resumed.state, resumed.curve) == (whole.state, whole.curve)
    assert [step for _, step, _ in whole.curve] == sorted({*range(4, len(whole.steps), 4), len(whole.steps)})
    first = (kills[-1] - 1) // 4 * 4 + 1  # the epoch in which it died is repeated, none before
    assert resumed.steps == list(range(first, len(whole.steps) + 1))


def test_a_finished_training_is_not_repeated(tmp_path: Path) -> None:
    snapshot = MemorySnapshot()
    done: list[int] = []
    outcomes = []
    for _ in range(2):
        lines: list[str] = []
        done.clear()
        ctx = make_context(
            tmp_path, 0, Recipe(epochs=2), snapshot=snapshot, lines=lines, tick=lambda a, b, c: done.append(a)
        )
        with torch.random.fork_rng():
            torch.manual_seed(3)
            model = network()
            kit.fit(model, make_images(64), ctx, cross_entropy(model))
        outcomes.append((weight_bytes(model), len(done), lines))
    assert outcomes[0][0] == outcomes[1][0]
    assert (outcomes[0][1], outcomes[1][1]) == (2, 0)
    assert outcomes[1][2] == ["resumed at step 2 of 2"]


def test_a_second_training_of_one_job_does_not_take_up_the_first(tmp_path: Path) -> None:
    """A method may fit twice with one context: the second start differs, so the first snapshot is not its own."""
    snapshot = MemorySnapshot()
    done: list[int] = []
    model = network()
    ctx = make_context(tmp_path, 0, Recipe(epochs=2), snapshot=snapshot, tick=lambda a, b, c: done.append(a))
    kit.fit(model, make_images(64), ctx, cross_entropy(model))
    kit.fit(model, make_images(64), ctx, cross_entropy(model))
    assert done == [1, 2, 1, 2]
    assert snapshot.saves == 4


@pytest.mark.parametrize("change", ["weights", "order", "global", "recipe", "images"])
def test_a_snapshot_of_another_start_is_left_alone(tmp_path: Path, change: str) -> None:
    snapshot = MemorySnapshot()
    done: list[int] = []
    for trial in range(2):
        other = change if trial else ""
        done.clear()
        with torch.random.fork_rng():
            torch.manual_seed(4 if other == "global" else 3)
            model = network(1 if other == "weights" else 0)
            recipe = Recipe(epochs=2, lr=0.05 if other == "recipe" else 0.1)
            seed = 1 if other == "order" else 0
            ctx = make_context(tmp_path, seed, recipe, snapshot=snapshot, tick=lambda a, b, c: done.append(a))
            kit.fit(model, make_images(60 if other == "images" else 64), ctx, cross_entropy(model))
        assert done == [1, 2]


@pytest.mark.parametrize("fault", ["loss", "statistics"])
def test_divergence_is_found_within_its_epoch(tmp_path: Path, fault: str) -> None:
    model = network()
    snapshot = MemorySnapshot()
    done: list[int] = []

    def loss(batch: Batch) -> Tensor:
        value = F.cross_entropy(model(batch.x), batch.y)
        return value + float("inf") if fault == "loss" and len(done) == 5 else value

    def tick(step: int, total: int, count: int) -> None:
        done.append(step)
        if fault == "statistics" and step == 5:
            model.get_buffer("bn1.running_var").fill_(float("nan"))  # not read in train mode: the losses stay finite

    ctx = make_context(tmp_path, 0, Recipe(epochs=5, batch=16), snapshot=snapshot, tick=tick)
    with pytest.raises(Diverged, match=r"by step 8 of 20.*not finite \(lr 0\.1\)"):
        kit.fit(model, make_images(64), ctx, loss)
    assert snapshot.saves == 1  # what has diverged is not kept


def test_fit_needs_images(tmp_path: Path) -> None:
    model = network()
    nothing = Images(torch.empty(0, 3, 32, 32, dtype=torch.uint8), torch.empty(0, dtype=torch.int64))
    with pytest.raises(UserError, match="no images were given"):
        kit.fit(model, nothing, make_context(tmp_path), cross_entropy(model))


# ---------------------------------------------------------------- small things


def test_choose_is_sorted_unique_and_nested() -> None:
    small, large = kit.choose(1000, 50, generator(2)), kit.choose(1000, 200, generator(2))
    assert small.dtype == torch.int64
    assert len(set(small.tolist())) == 50
    assert torch.equal(small, small.sort().values)
    assert set(small.tolist()) < set(large.tolist()) < set(range(1000))
    assert torch.equal(kit.choose(5, 5, generator()), torch.arange(5))
    assert kit.choose(5, 0, generator()).shape == (0,)
    with pytest.raises(UserError, match="6 of 5 images"):
        kit.choose(5, 6, generator())


def test_choose_is_uniform() -> None:
    rng = generator()
    counts = torch.zeros(10)
    for _ in range(3000):
        counts[kit.choose(10, 3, rng)] += 1
    assert counts.min() > 800
    assert counts.max() < 1000


def test_predict_is_the_argmax_in_eval_mode_and_gives_the_modes_back() -> None:
    model = network()
    model.bn1.eval()
    with torch.no_grad():
        model.fc.weight.mul_(50)  # so that the labels differ
    x = make_images(23).x
    got = kit.predict(model, x, batch=5)
    assert model.training
    assert model.drop.training
    assert not model.bn1.training
    assert got.dtype == torch.int64
    assert got.shape == (23,)
    assert not got.is_inference()
    assert len(set(got.tolist())) > 1
    want = torch.stack([model.eval()(x[n : n + 1].float() / 255)[0].argmax() for n in range(23)])
    assert torch.equal(got, want)
    assert kit.predict(model, x[:0]).shape == (0,)


def test_predict_gives_the_modes_back_after_a_failure() -> None:
    model = network()
    with pytest.raises(RuntimeError):
        kit.predict(model, gray(4, (5, 32, 32)))
    assert model.training


def test_frozen_is_a_copy_that_cannot_be_trained() -> None:
    model = network()
    copied = kit.frozen(model)
    assert not any(module.training for module in copied.modules())
    assert not any(p.requires_grad for p in copied.parameters())
    assert model.training
    assert all(p.requires_grad for p in model.parameters())
    before = weight_bytes(copied)
    with torch.no_grad():
        nn.init.zeros_(model.fc.weight)
        model.get_buffer("bn1.running_mean").fill_(9.0)
    assert weight_bytes(copied) == before


# ---------------------------------------------------------------- adversarial examples


def slow_pgd(model: Classifier, x: Tensor, y: Tensor, eps: float, step: float, steps: int) -> Tensor:
    """One image at a time, each pixel moved and cut by hand."""
    out = []
    for image, label in zip(x, y, strict=True):
        moved = image.clone()
        for _ in range(steps):
            leaf = moved.clone().requires_grad_()
            torch.autograd.backward(F.cross_entropy(model(leaf[None]), label[None]))
            assert leaf.grad is not None
            for place in range(moved.numel()):
                value = float(moved.view(-1)[place]) + step * float(leaf.grad.view(-1)[place].sign())
                origin = float(image.view(-1)[place])
                moved.view(-1)[place] = min(max(value, origin - eps, 0.0), origin + eps, 1.0)
        out.append(moved)
    return torch.stack(out)


def test_pgd_equals_a_pixelwise_ascent_and_costs_the_model_its_labels() -> None:
    torch.manual_seed(3)
    model = TinyNet().eval()
    images = make_images(3, shape=(3, 8, 8))
    x, y = images.x.float() / 255, images.y
    found = kit.pgd(model, x, y, eps=0.1, step=0.04, steps=4)
    assert not found.requires_grad
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.allclose(found, slow_pgd(model, x, y, 0.1, 0.04, 4), atol=1e-6)
    assert float((found - x).abs().max()) <= 0.1 + 1e-6
    with torch.no_grad():
        assert F.cross_entropy(model(found), y) > F.cross_entropy(model(x), y)


def test_pgd_starts_at_random_only_where_it_is_given_a_generator() -> None:
    model = TinyNet().eval()
    images = make_images(4, shape=(3, 8, 8))
    x = images.x.float() / 255
    assert torch.equal(kit.pgd(model, x, images.y, eps=0.1, step=0.1, steps=0), x)
    first, again = (kit.pgd(model, x, images.y, eps=0.1, step=0.1, steps=0, rng=generator(1)) for _ in range(2))
    assert torch.equal(first, again)
    assert 0.05 < float((first - x).abs().max()) <= 0.1 + 1e-6
    assert 0 <= float(first.min()) <= float(first.max()) <= 1
