"""uap and the additive trigger, against a literal re-computation, a planted direction and a resume."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from tiny import Bench, Memory, Tiny, generator, images
from tiny import one_thread as one_thread
from torch import Tensor

from backdoorbench_mcl.api import Classifier, Diverged, Images, Recipe, UserError
from bbmcl_inverters.leaves import Additive
from bbmcl_inverters.uap import UAP, objective


class Stripes(Classifier):
    """Class 1 where the columns alternate strongly: a planted global trigger, without weights."""

    def features(self, x: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        signs = torch.tensor([1.0, -1.0]).repeat(x.shape[3] // 2)
        return (x * signs).mean((1, 2, 3)).unsqueeze(1), ()

    def head(self, z: Tensor) -> Tensor:
        return torch.cat([torch.zeros_like(z), 100 * (z - 0.05)], 1)


def grey(count: int = 32) -> Images:
    x = torch.randint(60, 190, (count, 3, 8, 8), generator=generator(0), dtype=torch.uint8)
    return Images(x, torch.full((count,), -1))


def test_additive_trigger_stays_in_range_leaves_its_input_and_is_differentiable() -> None:
    rng = generator(0)
    pattern = (2 * torch.rand(3, 8, 8, generator=rng) - 1).requires_grad_()
    x = torch.rand(5, 3, 8, 8, generator=rng)
    before = x.clone()
    stamped = Additive(pattern).apply(x)
    literal = [min(1.0, max(0.0, a + b)) for a, b in zip(x[2].flatten().tolist(), pattern.flatten().tolist())]  # noqa: B905
    assert stamped[2].flatten().tolist() == pytest.approx(literal, abs=1e-6)
    assert float(stamped.detach().min()) == 0
    assert float(stamped.detach().max()) == 1
    assert torch.equal(x, before)
    (gradient,) = torch.autograd.grad(stamped.sum(), pattern)
    free = ((x + pattern > 0) & (x + pattern < 1)).float().sum(0)  # images in which the sum is not clamped
    assert torch.equal(gradient, free)


def test_additive_trigger_round_trips() -> None:
    trigger = Additive(torch.rand(3, 8, 8, generator=generator(0)) - 0.5)
    again = Additive.from_tensors(trigger.tensors())
    x = torch.rand(2, 3, 8, 8, generator=generator(1))
    assert torch.equal(again.apply(x), trigger.apply(x))
    with pytest.raises(ValueError, match="expected a pattern"):
        Additive(torch.zeros(8, 8))


def test_the_whole_search_against_a_literal_one() -> None:
    model, clean, rng = Tiny(), images(20), generator(7)
    delta, first, second, step = torch.zeros(3, 8, 8), torch.zeros(3, 8, 8), torch.zeros(3, 8, 8), 0
    for _ in range(3):
        for index in torch.split(torch.randperm(20, generator=rng), 8):
            step += 1
            delta.requires_grad_()
            x = clean.x[index].float() / 255
            logits = model((x + delta).clamp(0, 1))
            loss = -logits.log_softmax(1)[:, 1].mean() + 0.02 * (delta * delta).sum()
            (gradient,) = torch.autograd.grad(loss, delta)
            first, second = 0.9 * first + 0.1 * gradient, 0.999 * second + 0.001 * gradient**2
            move = (first / (1 - 0.9**step)) / ((second / (1 - 0.999**step)).sqrt() + 1e-8)
            delta = (delta.detach() - 0.01 * move).detach()
    trigger = UAP(epochs=3, batch=8).invert(Tiny(), 1, Bench(seed=7).inverter(clean))
    assert torch.allclose(trigger.pattern, delta, atol=2e-5)


def test_objective_counts_hits_and_weighs_the_square() -> None:
    model, x = Stripes(), grey(6).x.float() / 255
    delta = torch.zeros(3, 8, 8)
    plain, hits = objective(model, x, delta, 1, 3.0)
    assert float(hits) == 0
    delta[0, 0, 0] = 0.5
    weighed = objective(model, x, delta, 1, 3.0)[0] - objective(model, x, delta, 1, 0.0)[0]
    assert float(weighed) == pytest.approx(0.75)
    assert float(plain) == pytest.approx(float(objective(model, x, 0 * delta, 1, 0.0)[0]))


def test_finds_a_planted_global_trigger_with_a_small_norm() -> None:
    model, clean = Stripes(), grey()
    trigger = UAP(epochs=60, batch=32).invert(model, 1, Bench(classes=2).inverter(clean))
    x = clean.x.float() / 255
    assert not model(x).argmax(1).any()
    assert float(model(trigger.apply(x)).argmax(1).float().mean()) >= 0.9
    signs = torch.tensor([1.0, -1.0]).repeat(4).expand(3, 8, 8)
    assert bool((trigger.pattern * signs > 0).all())
    assert float(trigger.pattern.abs().max()) < 0.25


@pytest.mark.parametrize("limits", [{"epochs": 4}, {"steps": 10}])
def test_a_resumed_search_ends_in_the_same_bits(limits: dict[str, Any]) -> None:
    def run(snapshot: Memory, seed: int) -> tuple[Tensor, Bench]:
        bench = Bench(seed=seed, recipe=Recipe(augment="crop+flip"), snapshot=snapshot)
        return UAP(batch=8, **limits).invert(Tiny(), 2, bench.inverter(images())).pattern, bench

    whole, bench = run(Memory(), 1)
    total = limits.get("steps", 12)
    assert [done for done, _, _ in bench.ticks] == list(range(1, total + 1))
    assert len(bench.snapshot.saved) == 4
    for save in bench.snapshot.saved:
        resumed, again = run(Memory(save), 99)
        assert torch.equal(resumed, whole)
        assert len(again.ticks) == total - save[1]["step"]


def test_the_model_is_left_alone_and_nonsense_is_refused() -> None:
    class Broken(Stripes):
        def head(self, z: Tensor) -> Tensor:
            return super().head(z) * math.nan

    model = Tiny()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    UAP(steps=3, batch=8).invert(model.train(), 0, Bench().inverter(images()))
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    with pytest.raises(Diverged, match="uap: loss nan"):
        UAP().invert(Broken(), 1, Bench().inverter(grey()))
    with pytest.raises(UserError, match="uap: no clean images"):
        UAP().invert(Stripes(), 1, Bench().inverter(grey(0)))
