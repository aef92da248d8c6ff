"""CL: where the patch goes, what the perturbation does and how far, which images are taken, resuming."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny import Bench, Memory, Tiny, generator, images, one_thread
from torch import Tensor

from backdoorbench_mcl.api import Attack, AttackContext, Classifier, Images, Need, PluginError, State, UserError
from backdoorbench_mcl.describe import describe
from bbmcl_attacks import cl
from bbmcl_attacks.cl import CL, distances, perturb, spots

__all__ = ["one_thread"]

QUICK: dict[str, Any] = {"target": 2, "rate": 0.1, "steps": 15}


def context(
    train: Images, surrogate: Classifier | None = None, seed: int = 1, snapshot: Memory | None = None
) -> AttackContext:
    ctx = Bench(seed=seed, snapshot=snapshot).attack(train)
    return dataclasses.replace(ctx, needs={"surrogate": Tiny() if surrogate is None else surrogate})


def stamped(attack: Attack, value: int = 77) -> Tensor:
    x = torch.full((2, 3, 32, 32), value, dtype=torch.uint8)
    out = attack.stamp(x, torch.zeros(2), State(), generator(0))
    assert out.dtype == torch.uint8
    assert bool((x == value).all())
    assert bool((out == out[:1, :1]).all())
    return out[0, 0]


def loss(model: Classifier, x: Tensor, label: int) -> Tensor:
    return F.cross_entropy(model(x.float() / 255), torch.full((len(x),), label), reduction="none").detach()


def test_one_corner_by_hand() -> None:
    out = stamped(CL())
    assert out[29].tolist() == [77] * 29 + [0, 0, 255]
    assert out[30].tolist() == [77] * 29 + [0, 255, 0]
    assert out[31].tolist() == [77] * 29 + [255, 0, 255]
    assert bool((out[:29] == 77).all())


def test_four_corners_by_hand() -> None:
    out = stamped(CL(corners="four"))
    assert out[29].tolist() == [255, 0, 0] + [77] * 26 + [0, 0, 255]
    assert out[30].tolist() == [0, 255, 0] + [77] * 26 + [0, 255, 0]
    assert out[31].tolist() == [255, 0, 255] + [77] * 26 + [255, 0, 255]
    assert torch.equal(out, out.flip(0))
    assert torch.equal(out, out.flip(1))
    assert int((out != 77).sum()) == 36


def test_the_centre_by_hand() -> None:
    out = stamped(CL(place="centre"))
    assert out[18:21, 18:21].tolist() == [[255, 0, 255], [0, 255, 0], [255, 0, 0]]
    assert int((out != 77).sum()) == 9
    assert [spot[1:] for spot in spots((64, 64), "centre", "one")] == [(36, 36)]


def test_perturbation_is_projected_gradient_ascent() -> None:
    """A literal re-computation with the formula of the source, step by step."""
    x = images(4, size=8).x
    model = Tiny()
    origin = x.float() / 255
    moved = origin.clone()
    for _ in range(5):
        moved.requires_grad_(True)
        value = F.cross_entropy(model(moved), torch.full((4,), 3))
        (gradient,) = torch.autograd.grad(value, moved)
        inside = (moved.detach() + 1.5 / 255 * gradient.sign() - origin).clamp(-6 / 255, 6 / 255)
        moved = (origin + inside).clamp(0, 1)
    expected = (moved * 255).round().to(torch.int16)
    found = perturb(model, x, 3, 6.0, 1.5, 5)
    assert found.dtype == torch.uint8
    assert float((found.to(torch.int16) == expected).float().mean()) > 0.999  # a half may round either way


@pytest.mark.parametrize("eps", [0.7, 4.0, 15.6, 16.0])
def test_perturbation_stays_within_eps_and_raises_the_loss(eps: float) -> None:
    x = images(12, size=16).x
    moved = perturb(Tiny(), x, 1, eps, 1.5, 20)
    assert int(distances(x, moved).max()) == int(eps)
    grown = loss(Tiny(), moved, 1) - loss(Tiny(), x, 1)
    assert bool((grown > 0).all()) == (eps >= 1)
    if eps == 16.0:
        assert float(distances(x, moved).float().mean()) > 8
        noise = 32 * torch.randint(0, 2, x.shape, generator=generator(0)) - 16
        shaken = (x + noise).clamp(0, 255).to(torch.uint8)
        assert float(grown.min()) > 3 * float((loss(Tiny(), shaken, 1) - loss(Tiny(), x, 1)).abs().max())


def test_distances_by_hand() -> None:
    a = torch.zeros((2, 3, 2, 2), dtype=torch.uint8)
    b = a.clone()
    b[0, 1, 1, 0] = 200
    a[1, 2, 0, 1] = 255
    assert distances(a, b).tolist() == [200, 255]


def test_poison_is_hard_images_of_the_class_with_the_patch_and_their_labels() -> None:
    train = images(100, size=32)
    attack = CL(**QUICK)
    state = attack.prepare(context(train))
    assert (state.meta["wanted"], state.meta["poisoned"]) == (10, 10)
    assert (state.meta["top"], state.meta["left"]) == (29, 29)
    before = train.x.clone()
    index, x, y = attack.poison(train, state, generator(0))
    assert torch.equal(train.x, before)
    assert len(index.unique()) == 10
    assert train.y[index].tolist() == y.tolist() == [2] * 10
    assert torch.equal(x[..., 29:, 29:], spots((32, 32), "corner", "one")[0][0].expand(10, 3, 3, 3))
    hole = torch.ones((32, 32), dtype=torch.uint8)
    hole[29:, 29:] = 0
    far = distances(train.x[index] * hole, x * hole)
    assert int(far.max()) <= 16
    assert float(far.float().mean()) > 8
    moved = distances(train.x[index], state.tensors["x"]).float()
    assert state.meta["linf_mean"] == pytest.approx(float(moved.mean()))
    assert (state.meta["linf_min"], state.meta["linf_max"]) == (moved.min(), 16)
    assert state.meta["linf_weak_share"] == float((moved <= 8).float().mean()) == 0.0
    assert bool((loss(Tiny(), state.tensors["x"], 2) > loss(Tiny(), train.x[index], 2)).all())


def test_choice_comes_from_the_seed_alone() -> None:
    train = images(100, size=8)
    first, again, other = (CL(**QUICK).prepare(context(train, seed=seed)) for seed in (1, 1, 2))
    assert torch.equal(first.tensors["index"], again.tensors["index"])
    assert torch.equal(first.tensors["x"], again.tensors["x"])
    assert not torch.equal(first.tensors["index"], other.tensors["index"])
    control = CL(**{**QUICK, "eps": 0.0}).prepare(context(train))
    assert torch.equal(first.tensors["index"], control.tensors["index"])  # paired with its control


def test_without_perturbation_there_is_no_surrogate() -> None:
    train = images(100, size=8)
    attack = CL(eps=0.0, target=2, rate=0.1)
    assert attack.needs() == {}
    state = attack.prepare(Bench().attack(train))
    poison = attack.poison(train, state, generator(0))
    assert set(state.tensors) == {"index"}
    assert torch.equal(poison.x, attack.stamp(train.x[poison.index], poison.y, state, generator(0)))


def test_the_class_is_the_cap() -> None:
    train = images(100, size=8)
    state = CL(target=2, rate=0.9, steps=12).prepare(context(train))
    assert (state.meta["wanted"], state.meta["poisoned"]) == (90, 25)
    assert len(state.tensors["index"]) == len(state.tensors["x"]) == 25
    nothing = CL(target=2, rate=0.0).prepare(context(train))
    assert len(CL(target=2, rate=0.0).poison(train, nothing, generator(0)).index) == 0


def test_the_surrogate_is_declared_and_needed() -> None:
    assert CL().needs() == {"surrogate": Need("model", "robust")}
    assert CL(surrogate="natural").needs() == {"surrogate": Need("model", "natural")}
    with pytest.raises(UserError, match="cl: needs a clean model as its surrogate"):
        CL(**QUICK).prepare(Bench().attack(images(100)))


def test_its_control_is_the_same_attack_without_perturbation() -> None:
    asked = {"target": "bbmcl_attacks.cl:CL", "kind": "attack", "suffix": ""}
    told = [describe({**asked, "params": params})["attack"] for params in ({}, {"eps": 0.0})]
    control = {**CL().params, "eps": 0.0}
    assert told == [
        {"target": 5, "control": {"set": {"eps": 0.0}, "params": control}, "controls": "data"},
        {"target": 5, "control": {}, "controls": "data"},
    ]  # fmt: skip


def test_an_ablation_of_no_parameter_is_the_plugin_s_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CL, "ablation", {"epps": 0.0})
    with pytest.raises(PluginError, match="cl: ablation names epps, no parameter of its constructor"):
        describe({"target": "bbmcl_attacks.cl:CL", "kind": "attack", "suffix": "", "params": {}})


def test_a_control_is_identified_as_it_would_be_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """A parameter added later at its old value enters no key, so it may not enter the control's either."""
    monkeypatch.setattr(CL, "added", {"eps": 0.0})
    asked = {"target": "bbmcl_attacks.cl:CL", "kind": "attack", "suffix": ""}
    control, itself = (describe({**asked, "params": params}) for params in ({}, {"eps": 0.0}))
    assert control["attack"]["control"]["params"] == itself["identity"]
    assert "eps" not in itself["identity"]


def test_images_that_hardly_moved_are_refused() -> None:
    train = images(100, size=8)
    with pytest.raises(UserError, match=r"differ by 3\.0 grey levels on average .* more than 8 with eps=16\.0"):
        CL(**{**QUICK, "steps": 2}).prepare(context(train))
    assert CL(**{**QUICK, "steps": 2, "eps": 8.0}).prepare(context(train)).meta["linf_max"] == 3


def test_images_that_hardly_moved_are_counted_where_the_others_hide_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of three images one stays and one moves by 8 levels, which the mean of 13.3 does not tell."""

    def some(model: Classifier, x: Tensor, *rest: Any) -> Tensor:
        by = torch.tensor([0, 8, 32], dtype=torch.int16).repeat(len(x))[: len(x)].view(-1, 1, 1, 1)
        return torch.where(x < 128, x + by, x - by).to(torch.uint8)

    monkeypatch.setattr(cl, "perturb", some)
    meta = CL(**{**QUICK, "rate": 0.12}).prepare(context(images(100, size=8))).meta
    assert meta["poisoned"] == 12
    assert (meta["linf_min"], meta["linf_max"]) == (0, 32)
    assert meta["linf_mean"] == pytest.approx(40 / 3)
    assert meta["linf_weak_share"] == pytest.approx(2 / 3)


def test_a_killed_run_goes_on_and_another_run_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cl, "BATCH", 4)
    train = images(100, size=8)
    whole = Memory()
    ticks: list[tuple[int, int, int]] = []
    ctx = dataclasses.replace(context(train, snapshot=whole), tick=lambda *t: ticks.append(t))
    expected = CL(**QUICK).prepare(ctx).tensors["x"]
    assert [tick[:2] for tick in ticks] == [(4, 10), (8, 10), (10, 10)]

    calls: list[int] = []
    real = perturb

    def counted(model: Classifier, x: Tensor, *rest: Any) -> Tensor:
        calls.append(len(x))
        return real(model, x, *rest)

    monkeypatch.setattr(cl, "perturb", counted)
    resumed = CL(**QUICK).prepare(context(train, snapshot=Memory(whole.saved[0])))
    assert torch.equal(resumed.tensors["x"], expected)
    assert calls == [4, 2]
    calls.clear()
    CL(**QUICK).prepare(context(train, Tiny(seed=9), snapshot=Memory(whole.saved[0])))
    assert calls == [4, 4, 2]


@pytest.mark.parametrize(("size", "calls"), [(32, [25]), (64, [25]), (96, [16, 9]), (224, [16, 9])])
def test_large_images_are_perturbed_a_few_at_a_time(
    size: int, calls: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each image has a search of its own, so that it comes out as it did in a batch of all."""
    found: list[int] = []

    def counted(model: Classifier, x: Tensor, *rest: Any) -> Tensor:
        found.append(len(x))
        return perturb(model, x, *rest)

    train = images(100, size=size)
    monkeypatch.setattr(cl, "perturb", counted)
    state = CL(target=2, rate=0.3, step=16.0, steps=1).prepare(context(train))
    assert found == calls
    whole = perturb(Tiny(), train.x[state.tensors["index"]], 2, 16.0, 16.0, 1)
    assert torch.equal(state.tensors["x"], whole)


def test_the_snapshot_of_the_training_that_follows_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    later = Memory(({"w": torch.zeros(1)}, {"start": "abc", "step": 3}))
    CL(**QUICK).prepare(context(images(100, size=8), snapshot=later))
    assert later.saved == []


def test_contradictions_are_refused() -> None:
    with pytest.raises(UserError, match="leave one of them out"):
        CL(corners="four", place="centre")
    with pytest.raises(UserError, match="3x3 trigger at row -1"):
        CL(**QUICK).prepare(context(images(100, size=2)))
    with pytest.raises(UserError, match="target=4 is not a class"):
        CL(target=4).prepare(context(images(100)))
