"""nc-box against a literal re-computation, finite differences, a planted patch, resume and early stopping."""

from __future__ import annotations

import math
from typing import Any, Literal

import pytest
import torch
from tiny import Bench, Memory, Tiny, generator, images
from tiny import one_thread as one_thread
from torch import Tensor, nn

from backdoorbench_mcl.api import Classifier, Diverged, Images, MaskPattern, Recipe, UserError
from bbmcl_inverters.nc_box import NCBox, Search, objective, pattern_box


class Corner(Classifier):
    """Class 1 where the bottom right 2x2 pixels are white, class 0 elsewhere: a planted backdoor, without weights."""

    def features(self, x: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        return x[:, :, -2:, -2:].mean((1, 2, 3)).unsqueeze(1), ()

    def head(self, z: Tensor) -> Tensor:
        return torch.cat([torch.zeros_like(z), 20 * (z - 0.8)], 1)


class Constant(Classifier):
    """The same logits for every image."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(2))

    def features(self, x: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        return 0 * x.mean((1, 2, 3)).unsqueeze(1), ()

    def head(self, z: Tensor) -> Tensor:
        return z + self.bias


def dark(count: int = 32) -> Images:
    x = torch.randint(0, 120, (count, 3, 8, 8), generator=generator(0), dtype=torch.uint8)
    return Images(x, torch.full((count,), -1))


def test_reachable_pixels_of_both_boxes() -> None:
    model = Tiny()  # has the CIFAR-10 constants
    zeros, ones = torch.zeros(3, 1, 1), torch.ones(3, 1, 1)
    pixel = pattern_box(model, "pixel")
    assert torch.equal(pixel.pixels(pixel.low), zeros)
    assert torch.equal(pixel.pixels(pixel.high), ones)
    box = pattern_box(model, "normalized")
    assert box.pixels(box.low).flatten().tolist() == pytest.approx([0.4914, 0.4822, 0.4465], abs=1e-6)
    assert box.pixels(box.high).flatten().tolist() == pytest.approx([0.6937, 0.6816, 0.6475], abs=1e-6)


def test_normalised_box_is_cut_to_what_a_pixel_can_show() -> None:
    model = Tiny()
    model.set_normalisation((0.9, 0.5, 0.0), (0.4, 0.5, 1.0))
    box = pattern_box(model, "normalized")
    assert box.pixels(box.high).flatten().tolist() == pytest.approx([1.0, 1.0, 1.0])
    assert box.high.flatten().tolist() == pytest.approx([0.25, 1.0, 1.0])


def test_objective_against_loops() -> None:
    model, x = Tiny(), images(5).x.float() / 255
    rng = generator(2)
    mask, pattern = torch.rand(8, 8, generator=rng), torch.rand(3, 8, 8, generator=rng)
    stamped = x.clone()
    for b in range(5):
        for c in range(3):
            for i in range(8):
                for j in range(8):
                    m = float(mask[i, j])
                    stamped[b, c, i, j] = (1 - m) * float(x[b, c, i, j]) + m * float(pattern[c, i, j])
    total, hits = 0.0, 0
    for row in model(stamped).tolist():
        total += math.log(sum(math.exp(v) for v in row)) - row[2]
        hits += max(range(4), key=row.__getitem__) == 2
    expected = total / 5 + 0.03 * sum(float(v) for v in mask.flatten())
    loss, share = objective(model, x, mask, pattern, 2, 0.03)
    assert float(loss.detach()) == pytest.approx(expected, rel=1e-5)
    assert float(share) == pytest.approx(hits / 5)


def test_objective_gradient_against_finite_differences() -> None:
    class Double(Tiny):
        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.features(self.normalise(x))[0])

    model = Double().double().requires_grad_(False)
    x = images(2, size=3).x.double() / 255
    rng = generator(3)
    mask = (torch.rand(3, 3, generator=rng, dtype=torch.float64) * 0.8 + 0.1).requires_grad_()
    pattern = torch.rand(3, 3, 3, generator=rng, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda m, p: objective(model, x, m, p, 1, 0.01)[0], (mask, pattern))


@pytest.mark.parametrize("box", ["pixel", "normalized"])
def test_the_whole_search_against_a_literal_one(box: Literal["pixel", "normalized"]) -> None:
    """Adam by its formula, the pattern kept and blended in the space of its box as spec 5.1 writes it."""
    model, clean = Tiny(), images(20)
    mean, std = (model.mean, model.std) if box == "normalized" else (torch.zeros(1), torch.ones(1))
    rng = generator(7)
    m, p = torch.rand(8, 8, generator=rng), torch.rand(3, 8, 8, generator=rng)
    moments = [[torch.zeros_like(v), torch.zeros_like(v)] for v in (m, p)]
    step = 0
    for _ in range(3):
        for index in torch.split(torch.randperm(20, generator=rng), 8):
            step += 1
            m.requires_grad_()
            p.requires_grad_()
            x = (clean.x[index].float() / 255 - mean) / std
            blended = ((1 - m) * x + m * p) * std + mean
            logits = model(blended)
            loss = -logits.log_softmax(1)[:, 1].mean() + 0.01 * m.abs().sum()
            gradients = torch.autograd.grad(loss, (m, p))
            values = []
            for value, gradient, moment in zip((m, p), gradients, moments, strict=True):
                moment[0] = 0.9 * moment[0] + 0.1 * gradient
                moment[1] = 0.999 * moment[1] + 0.001 * gradient**2
                first, second = moment[0] / (1 - 0.9**step), moment[1] / (1 - 0.999**step)
                values.append((value.detach() - 0.05 * first / (second.sqrt() + 1e-8)).clamp(0, 1))
            m, p = values
    trigger = NCBox(lr=0.05, epochs=3, batch=8, box=box).invert(Tiny(), 1, Bench(seed=7).inverter(clean))
    assert torch.allclose(trigger.mask, m, atol=2e-5)
    assert torch.allclose(trigger.pattern, (p * std + mean).view(3, 8, 8), atol=2e-5)


def test_finds_a_planted_patch() -> None:
    model, clean = Corner(), dark()
    inverter = NCBox(lr=0.02, epochs=120, batch=32)
    trigger = inverter.invert(model, 1, Bench(classes=2).inverter(clean))
    x = clean.x.float() / 255
    assert not model(x).argmax(1).any()
    assert model(trigger.apply(x)).argmax(1).all()
    outside = torch.ones(8, 8, dtype=torch.bool)
    outside[-2:, -2:] = False
    assert float(trigger.mask[outside].max()) == 0.0
    assert float(trigger.mask[~outside].min()) > 0.5
    assert float(trigger.pattern[:, -2:, -2:].min()) > 0.9


def test_starts_in_the_box_and_stays_there() -> None:
    for box, low, high in (("pixel", 0.0, 1.0), ("normalized", 0.4464, 0.6938)):
        inverter = NCBox(lr=0.5, steps=6, batch=8, box="pixel" if box == "pixel" else "normalized")
        trigger = inverter.invert(Tiny(), 0, Bench().inverter(images()))
        assert 0 <= float(trigger.mask.min()) <= float(trigger.mask.max()) <= 1
        assert low <= float(trigger.pattern.min()) <= float(trigger.pattern.max()) <= high


def test_threshold_makes_the_mask_binary() -> None:
    soft = NCBox(steps=3, batch=8).invert(Tiny(), 0, Bench().inverter(images()))
    hard = NCBox(steps=3, batch=8, binarize="threshold").invert(Tiny(), 0, Bench().inverter(images()))
    assert torch.equal(hard.mask, (soft.mask > 0.5).float())
    assert torch.equal(hard.pattern, soft.pattern)


def test_the_model_is_left_alone() -> None:
    model = Tiny()
    model.train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    NCBox(steps=4, batch=8).invert(model, 0, Bench().inverter(images()))
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def run(inverter: NCBox, snapshot: Memory, seed: int) -> tuple[MaskPattern, Bench]:
    bench = Bench(seed=seed, recipe=Recipe(augment="crop+flip"), snapshot=snapshot)
    return inverter.invert(Tiny(), 2, bench.inverter(images())), bench


@pytest.mark.parametrize("limits", [{"epochs": 5}, {"steps": 13}])
def test_a_resumed_search_ends_in_the_same_bits(limits: dict[str, Any]) -> None:
    inverter = NCBox(lr=0.05, batch=8, **limits)
    whole, bench = run(inverter, Memory(), 1)
    saves = bench.snapshot.saved
    assert len(saves) == 5
    for save in saves:
        resumed, again = run(inverter, Memory(save), 99)
        assert torch.equal(resumed.mask, whole.mask)
        assert torch.equal(resumed.pattern, whole.pattern)
        assert len(again.ticks) == len(bench.ticks) - save[1]["step"]
        assert again.curve == bench.curve


def test_each_pass_is_a_point_of_two_curves() -> None:
    found, bench = run(NCBox(lr=0.05, batch=8, steps=7), Memory(), 1)  # 24 images: 3 steps a pass
    assert [(name, step) for name, step, _ in bench.curve] == [
        (name, step) for step in (3, 6, 7) for name in ("mask L1", "success in %")
    ]
    assert bench.curve[-2][2] == pytest.approx(float(found.mask.sum()))
    assert all(0 <= value <= 100 for name, _, value in bench.curve if name == "success in %")


def test_the_mask_is_fitted_to_augmented_images() -> None:
    """Spec 2.4: the inversion sees the repair's augmentation, and shifts alone make another mask."""
    found = []
    for augment in ("none", "none", "crop+flip"):
        bench = Bench(recipe=Recipe(augment=augment))
        found.append(NCBox(lr=0.05, steps=3, batch=24).invert(Tiny(), 2, bench.inverter(images())).mask)
    assert torch.equal(found[0], found[1])
    assert not torch.allclose(found[0], found[2], atol=1e-4)


def test_steps_count_steps_and_passes_stay_passes() -> None:
    _, bench = run(NCBox(steps=7, batch=8), Memory(), 1)  # 24 images: 3 steps a pass
    assert [done for done, _, _ in bench.ticks] == [1, 2, 3, 4, 5, 6, 7]
    assert {total for _, total, _ in bench.ticks} == {7}
    assert len(bench.lines) == 3
    _, bench = run(NCBox(epochs=2, batch=16), Memory(), 1)
    assert bench.ticks == [(1, 4, 16), (2, 4, 8), (3, 4, 16), (4, 4, 8)]


@pytest.mark.parametrize("patience", [1, 4])
def test_early_stop_tolerates_patience_passes(patience: int) -> None:
    """The mask never moves: the first pass sets the best, the next `patience` are borne, one more ends it."""
    bench = Bench(classes=2)
    NCBox(lam=0.0, epochs=50, patience=patience, batch=16).invert(Constant(), 1, bench.inverter(dark()))
    assert len(bench.ticks) == 2 * (1 + patience + 1)


def test_early_stop_watches_for_a_strictly_smaller_norm() -> None:
    box = pattern_box(Tiny(), "pixel")
    search = Search.start((3, 8, 8), box, 0.01, generator(0))
    seen = []
    for norm in (5.0, 4.0, 4.0, 6.0, 3.0):
        search.watch(norm)
        seen.append((search.best, search.stale))
    assert seen == [(5.0, 0), (4.0, 0), (4.0, 1), (4.0, 2), (3.0, 0)]


def test_the_last_mask_is_returned_not_the_smallest() -> None:
    bench = Bench(classes=2)
    trigger = NCBox(lr=0.02, lam=0.0, epochs=10, batch=16).invert(Corner(), 1, bench.inverter(dark()))
    norms = [float(tensors["mask"].sum()) for tensors, _ in bench.snapshot.saved]
    assert float(trigger.mask.sum()) == norms[-1]
    assert norms[-1] > min(norms)  # without lam the mask grows


def test_a_broken_model_diverges_and_no_images_are_refused() -> None:
    class Broken(Constant):
        def head(self, z: Tensor) -> Tensor:
            return super().head(z) * math.nan

    with pytest.raises(Diverged, match="nc-box: loss nan"):
        NCBox().invert(Broken(), 1, Bench().inverter(dark()))
    with pytest.raises(UserError, match="no clean images"):
        NCBox().invert(Constant(), 1, Bench().inverter(dark(0)))
