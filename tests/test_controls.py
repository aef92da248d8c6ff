"""true, random and zero: the ends of the scale on which an inversion is judged."""

from __future__ import annotations

import math

import pytest
import torch
from tiny import Bench, Tiny, generator, images
from tiny import one_thread as one_thread

from backdoorbench_mcl.api import AccessDenied, Granted, InverterContext, MaskPattern, Need, NotApplicable, Trigger
from backdoorbench_mcl.kit import frozen
from bbmcl_defenses.mcldef import contrastive_loss
from bbmcl_inverters.controls import RandomInverter, TrueInverter, Unchanged, ZeroInverter
from bbmcl_inverters.leaves import Additive


def context(like: Trigger | None = None, seed: int = 1, **granted: object) -> InverterContext:
    bench = Bench(seed=seed)
    bench.settings["needs"] = {} if like is None else {"like": like}
    bench.settings["granted"] = Granted("test", granted)
    return bench.inverter(images())


def fitted() -> MaskPattern:
    rng = generator(0)
    mask = torch.where(torch.rand(8, 8, generator=rng) < 0.2, torch.rand(8, 8, generator=rng), 0.0)
    return MaskPattern(mask, torch.rand(3, 8, 8, generator=rng))


def test_true_gives_the_attackers_trigger_and_says_what_it_knows() -> None:
    trigger, inverter = fitted(), TrueInverter()
    assert inverter.knows == {"target", "trigger"}
    assert inverter.invert(Tiny(), 1, context(trigger=trigger)) is trigger
    with pytest.raises(AccessDenied, match="trigger"):
        inverter.invert(Tiny(), 1, context())


def test_random_has_the_values_of_its_model_at_other_places() -> None:
    like, inverter = fitted(), RandomInverter(like="nc-box(lr=0.5)")
    assert inverter.needs() == {"like": Need("trigger", "nc-box(lr=0.5)")}
    assert inverter.knows == {"target"}
    found = inverter.invert(Tiny(), 1, context(like))
    assert torch.equal(found.mask.flatten().sort().values, like.mask.flatten().sort().values)
    assert math.fsum(found.mask.flatten().tolist()) == math.fsum(like.mask.flatten().tolist())
    assert not torch.equal(found.mask, like.mask)
    assert not torch.allclose(found.pattern, like.pattern, atol=0.1)
    assert 0 <= float(found.pattern.min()) <= float(found.pattern.max()) <= 1
    again, other = (inverter.invert(Tiny(), 1, context(like, seed)) for seed in (1, 2))
    assert torch.equal(again.mask, found.mask)
    assert torch.equal(again.pattern, found.pattern)
    assert not torch.equal(other.mask, found.mask)


def test_random_places_are_uniform() -> None:
    """One pixel of 64: in 640 draws each place is expected ten times, with a deviation of 3.1."""
    mask = torch.zeros(8, 8)
    mask[0, 0] = 1
    shared = context(MaskPattern(mask, torch.zeros(3, 8, 8)))
    hits = sum(RandomInverter().invert(Tiny(), 1, shared).mask for _ in range(640))
    assert isinstance(hits, torch.Tensor)
    assert float(hits.min()) > 0
    assert float(hits.max()) < 26
    assert float(((hits - 10) ** 2 / 10).sum()) < 63 + 5 * math.sqrt(2 * 63)


def test_random_without_a_mask_to_imitate_is_not_applicable() -> None:
    with pytest.raises(NotApplicable, match=r"random: the trigger of uap has no mask"):
        RandomInverter(like="uap").invert(Tiny(), 1, context(Additive(torch.zeros(3, 8, 8))))


def test_zero_changes_nothing_and_survives_storage() -> None:
    trigger = ZeroInverter().invert(Tiny(), 1, context())
    x = torch.rand(4, 3, 8, 8, generator=generator(1))
    before = x.clone()
    stamped = Unchanged.from_tensors(trigger.tensors()).apply(x)
    assert torch.equal(stamped, x)
    stamped.zero_()
    assert torch.equal(x, before)


def test_with_zero_mcldef_has_loss_ln_2_and_no_gradient() -> None:
    """Closed form of spec 8.5: positive and negative are the same features, so the cosines cancel."""
    victim, model = frozen(Tiny()), Tiny()
    with torch.no_grad():
        model.conv.weight.add_(0.1 * torch.randn(model.conv.weight.shape, generator=generator(3)))
    x = images().x.float() / 255
    clean, stamped = victim.embed(x), victim.embed(Unchanged().apply(x))
    loss = contrastive_loss(model.train().embed(Unchanged().apply(x)), clean, stamped, 0.5)
    assert float(loss.detach()) == pytest.approx(math.log(2), abs=1e-6)
    gradients = torch.autograd.grad(loss, [model.conv.weight, model.bn.weight, model.bn.bias])
    assert max(float(gradient.abs().max()) for gradient in gradients) < 1e-6
    moved = victim.embed(fitted().apply(x))  # the same with a trigger that is one
    loss = contrastive_loss(model.embed(fitted().apply(x)), clean, moved, 0.5)
    gradients = torch.autograd.grad(loss, [model.conv.weight])
    assert float(gradients[0].abs().max()) > 1e-5
