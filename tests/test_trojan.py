"""Trojan: which neurons, what the optimisation does, the pixels of both modes."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from tiny import Bench, Tiny, generator, images, one_thread
from torch import Tensor

from backdoorbench_mcl.api import AttackContext, Classifier, Diverged, Images, Need, State, UserError
from bbmcl_attacks.trojan import Scene, Trojan, excite, loudest, pixels_of

__all__ = ["one_thread"]

QUICK: dict[str, Any] = {"steps": 40, "target": 2}


def context(surrogate: object = None, seed: int = 1, size: int = 32) -> AttackContext:
    ctx = Bench(seed=seed).attack(images(40, size=size))
    return dataclasses.replace(ctx, needs={"surrogate": Tiny(seed=3) if surrogate is None else surrogate})


def fixed(patch: Tensor, **meta: int) -> State:
    return State({"patch": patch}, {"top": 25, "left": 25, **meta})


class Deaf(Tiny):
    """Neurons that fire above a mean brightness of `threshold`: with 0.4 on mid-grey alone, with 9 never."""

    def __init__(self, threshold: float) -> None:
        super().__init__()
        self.threshold = threshold

    def features(self, x: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        level = (x * self.std + self.mean).mean((2, 3))  # (B, 3), pixels again
        return torch.relu(level.repeat(1, 2) - self.threshold), ()


def test_neurons_are_those_of_a_literal_loop() -> None:
    model = Tiny(classes=7, seed=5)
    sums = []
    for j in range(6):
        sums.append(sum(abs(model.fc.weight[k, j].item()) for k in range(7)))
    ranked = sorted(range(6), key=lambda j: -sums[j])
    for count in (1, 2, 6):
        assert loudest(model, torch.ones(6, dtype=torch.bool), count).tolist() == ranked[:count]
    felt = torch.tensor([True, False, True, False, False, True])
    assert loudest(model, felt, 6).tolist() == [j for j in ranked if felt[j]]


def test_the_model_sees_the_patch_on_the_background() -> None:
    pixels = torch.rand((3, 3, 3), generator=generator(0))
    model = Tiny()
    scene = Scene(model, torch.tensor([4, 1]), torch.full((1, 3, 32, 32), 0.5), 25, 20)
    x = torch.full((1, 3, 32, 32), 0.5)
    x[0, :, 25:28, 20:23] = pixels
    feature = model.embed(x)[0]
    found = scene.activation(pixels)
    assert torch.allclose(found, torch.stack([feature[4], feature[1]]), atol=1e-6)
    w = torch.randn((3, 3, 3), generator=generator(1))
    expected = sum((a - 7.0) ** 2 for a in scene.activation((torch.tanh(w) + 1) / 2).tolist())
    assert scene.loss(w, 7.0).item() == pytest.approx(expected, rel=1e-5)


def test_the_patch_raises_its_neurons() -> None:
    state = Trojan(**QUICK).prepare(context())
    patch = state.tensors["patch"]
    assert (patch.dtype, tuple(patch.shape)) == (torch.uint8, (3, 3, 3))
    assert (state.meta["top"], state.meta["left"]) == (25, 25)
    assert state.meta["neurons"] == loudest(Tiny(seed=3), torch.ones(6, dtype=torch.bool), 2).tolist()
    x = torch.zeros((1, 3, 32, 32))
    x[..., 25:28, 25:28] = patch.float() / 255
    after = Tiny(seed=3).embed(x)[0, state.meta["neurons"]]
    assert after.tolist() == pytest.approx(state.meta["after"], rel=1e-4)
    assert sum(state.meta["after"]) > sum(state.meta["before"]) + 1e-3
    random = (torch.rand((200, 3, 3, 3), generator=generator(0)) * 255).round() / 255
    crowd = torch.zeros((200, 3, 32, 32))
    crowd[..., 25:28, 25:28] = random
    loss = (Tiny(seed=3).embed(crowd)[:, state.meta["neurons"]] - 100).square().sum(1)
    assert (after - 100).square().sum().item() < loss.min().item()  # better than 200 random patches


def test_the_patch_comes_from_the_generator_alone() -> None:
    made = (Trojan(steps=2, target=2).prepare(context(seed=seed)).tensors["patch"] for seed in (1, 1, 2))
    first, again, other = made
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_a_first_step_is_one_step_of_adam() -> None:
    scene = Scene(Tiny(), torch.tensor([0]), torch.zeros((1, 3, 32, 32)), 25, 25)
    w = torch.zeros((3, 3, 3))
    ticks: list[int] = []
    kept, steps = excite(scene, w, 100.0, 2, ticks.append)
    assert (steps, ticks) == (2, [1, 2])
    probe = w.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(scene.loss(probe, 100.0), probe)
    # Adam's first step is lr * sign of the gradient; the loss after the second is never looked at
    assert torch.allclose(kept, -0.1 * gradient.sign() * (gradient != 0), atol=1e-3)
    assert scene.loss(kept, 100.0).item() < scene.loss(w, 100.0).item()


def test_a_plateau_ends_the_search() -> None:
    scene = Scene(Deaf(-1.0), torch.tensor([0]), torch.zeros((1, 3, 8, 8)), 0, 0)
    kept, steps = excite(scene, torch.full((3, 8, 8), 30.0), 100.0, 1000, lambda done: None)
    assert steps == 100  # tanh(30) is 1: nothing can get brighter
    assert torch.equal(kept, torch.full((3, 8, 8), 30.0))


def test_dead_neurons_are_woken_on_grey_or_reported() -> None:
    ctx = context(Deaf(0.4))
    state = Trojan(**QUICK).prepare(ctx)
    assert sum(state.meta["after"]) > sum(state.meta["before"]) > 0
    rng = generator(1)
    _, second = (torch.randn((3, 3, 3), generator=rng) for _ in range(2))
    x = torch.full((1, 3, 32, 32), 0.5)
    x[0, :, 25:28, 25:28] = pixels_of(second)
    assert Deaf(0.4).embed(x)[0, state.meta["neurons"]].tolist() == pytest.approx(state.meta["before"], rel=1e-4)
    with pytest.raises(UserError, match="no neuron of the surrogate feels a patch at row 25, column 25 in 10 tries"):
        Trojan(**QUICK).prepare(context(Deaf(9.0)))


class OneDeaf(Tiny):
    """Feature 0, the loudest, needs mid-grey; feature 1 hears any brightness."""

    def features(self, x: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        level = (x * self.std + self.mean).mean((2, 3))[:, :1]  # (B, 1)
        return torch.cat([torch.relu(level - 0.4), torch.relu(level), 0 * level.expand(-1, 4)], 1), ()

    def head(self, z: Tensor) -> Tensor:
        return z[:, :4] * torch.tensor([9.0, 5.0, 1.0, 1.0])


class Grid(Tiny):
    """Features that know places: the mean of each of 8x8 tiles, all with the same weight."""

    def features(self, x: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        level = (x * self.std + self.mean).mean(1, keepdim=True)
        return torch.nn.functional.avg_pool2d(level, 4).flatten(1), ()

    def head(self, z: Tensor) -> Tensor:
        return z.sum(1, keepdim=True).expand(-1, 4)


def test_neurons_out_of_the_patchs_reach_are_not_chosen() -> None:
    state = Trojan(**QUICK).prepare(context(Grid()))
    assert state.meta["neurons"] == [6 * 8 + 6]  # the tile of rows and columns 24-27; the patch is at 25-27


def test_a_start_that_all_neurons_feel_is_preferred() -> None:
    state = Trojan(**QUICK).prepare(context(OneDeaf()))
    assert state.meta["neurons"] == [0, 1]
    assert min(state.meta["before"]) > 0  # on black the first would be 0
    many = Trojan(n_neuron=4, **QUICK).prepare(context(OneDeaf()))  # two of them can never feel anything
    assert min(many.meta["before"][:2]) > 0


def test_a_broken_surrogate_diverges() -> None:
    model = Tiny()
    with torch.no_grad():
        model.conv.weight.fill_(float("nan"))
    with pytest.raises(Diverged, match="the loss of the patch is nan"):
        Trojan(**QUICK).prepare(context(model))


def test_the_surrogate_is_declared_needed_and_left_alone() -> None:
    assert Trojan().needs() == {"surrogate": Need("model", "natural")}
    with pytest.raises(UserError, match="needs a clean model as its surrogate and was given NoneType"):
        Trojan().prepare(Bench(classes=10).attack(images(40, size=32)))
    model: Classifier = Tiny(seed=3)
    model.precision = "bf16"
    before = [p.clone() for p in model.parameters()]
    Trojan(**QUICK).prepare(context(model))
    assert model.precision == "bf16"
    assert all(torch.equal(a, b) and b.requires_grad for a, b in zip(before, model.parameters(), strict=True))


def test_replaced_pixels_by_hand() -> None:
    patch = torch.arange(27, dtype=torch.uint8).view(3, 3, 3)
    x = torch.full((2, 3, 32, 32), 250, dtype=torch.uint8)
    out = Trojan().stamp(x, torch.zeros(2), fixed(patch), generator(0))
    assert out[1, 0, 25].tolist() == [250] * 25 + [0, 1, 2] + [250] * 4
    assert out[0, 2, 27].tolist() == [250] * 25 + [24, 25, 26] + [250] * 4
    assert int((out != 250).sum()) == 2 * 27
    assert bool((x == 250).all())


def test_wrapped_pixels_by_hand() -> None:
    patch = torch.tensor([0, 5, 6, 100, 250, 1, 2, 3, 4], dtype=torch.uint8).view(1, 3, 3).expand(3, 3, 3)
    x = torch.full((2, 3, 32, 32), 250, dtype=torch.uint8)
    out = Trojan(mode="wrap").stamp(x, torch.zeros(2), fixed(patch), generator(0))
    assert out.dtype == torch.uint8
    for image in out:
        for channel in image:
            assert channel[25:28, 25:28].tolist() == [[250, 255, 0], [94, 244, 251], [252, 253, 254]]
            assert int((channel != 250).sum()) == 8
    assert bool((x == 250).all())


def test_place_and_size_on_large_images() -> None:
    state = Trojan(size=32, margin=12, steps=1, target=0).prepare(context(size=224))
    assert state.tensors["patch"].shape == (3, 32, 32)
    assert (state.meta["top"], state.meta["left"]) == (180, 180)
    with pytest.raises(UserError, match="9x9 trigger at row -5"):
        Trojan(size=9, target=0).prepare(context(size=8))


def test_poison_takes_any_class() -> None:
    train = Images(images(100, size=32).x, torch.arange(100) % 4)
    attack = Trojan(rate=0.29, **QUICK)
    state = attack.prepare(context())
    poison = attack.poison(train, state, generator(0))
    assert len(poison.index.unique()) == 29
    assert poison.y.tolist() == [2] * 29
    assert set(train.y[poison.index].tolist()) == {0, 1, 2, 3}
    assert bool((poison.x[..., 25:28, 25:28] == state.tensors["patch"]).all())
