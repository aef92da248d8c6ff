"""MCLDef: the loss by hand and by finite differences, what must not move, and what each knob changes."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import Bench, Memory, Tiny, generator, images, same, state
from tiny import one_thread as one_thread
from torch import Tensor

import bbmcl_defenses.mcldef as module
from backdoorbench_mcl import kit
from backdoorbench_mcl.api import Batch, Classifier, DefenseContext, Images, MaskPattern, Recipe, UserError
from bbmcl_defenses.mcldef import MCLDef, anchor_loss, contrastive_loss, head_parameters, refresh_batchnorm
from bbmcl_models.wrn import WRN

Loss = Callable[[Batch], Tensor]


def patch(size: int = 8) -> MaskPattern:
    mask = torch.zeros(size, size)
    mask[-3:, -3:] = 0.7
    return MaskPattern(mask, torch.rand(3, size, size, generator=generator(5)))


def repaired(defense: MCLDef, clean: Images | None = None, **bench: Any) -> dict[str, Tensor]:
    made = Bench(**bench).defense(images() if clean is None else clean, patch(), target=1)
    return state(defense.defend(Tiny(), made))


def detected(
    found: Mapping[int, MaskPattern], bench: Bench | None = None, clean: Images | None = None
) -> DefenseContext:
    """A context without a granted target: reading it would raise."""
    ctx = (bench or Bench()).defense(images() if clean is None else clean)
    return dataclasses.replace(ctx, needs={"trigger": dict(found)})


def captured(
    monkeypatch: pytest.MonkeyPatch,
    defense: MCLDef,
    model: Classifier,
    trigger: MaskPattern | None = None,
    ctx: DefenseContext | None = None,
) -> tuple[Loss, Images]:
    """The loss and the images that `defense` hands to the training loop, which is not run. Sets train mode."""
    caught: list[tuple[Loss, Images]] = []
    monkeypatch.setattr(module, "fit", lambda model, images, ctx, loss, recipe: caught.append((loss, images)))
    given = Bench().defense(images(), patch() if trigger is None else trigger, target=1)
    defense.defend(model, given if ctx is None else ctx)
    model.train()
    return caught[0]


def batch(count: int = 8) -> Batch:
    return next(images().batches(count))


def cos(a: Tensor, b: Tensor) -> float:
    p, q = a.tolist(), b.tolist()
    dot = sum(u * v for u, v in zip(p, q, strict=True))
    return float(dot / math.sqrt(sum(u**2 for u in p)) / math.sqrt(sum(v**2 for v in q)))


# ---------------------------------------------------------------- the loss


@pytest.mark.parametrize(
    ("z_pos", "z_neg", "value"),
    [((1.0, 0.0), (1.0, 0.0), 0.693147), ((1.0, 0.0), (0.0, 1.0), 0.126928), ((0.0, 1.0), (1.0, 0.0), 2.126928)],
)
def test_golden_values(z_pos: tuple[float, ...], z_neg: tuple[float, ...], value: float) -> None:
    z = torch.tensor([[3.0, 0.0]])
    loss = contrastive_loss(z, torch.tensor([z_pos]), torch.tensor([z_neg]), 0.5)
    assert float(loss) == pytest.approx(value, abs=1e-6)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 6), st.integers(2, 9), st.floats(0.05, 5), st.integers(0, 10**6))
def test_loss_against_loops(count: int, width: int, temperature: float, seed: int) -> None:
    rng = generator(seed)
    z, z_pos, z_neg = (torch.randn(count, width, generator=rng) for _ in range(3))
    total, pulled = 0.0, 0.0
    for i in range(count):
        up, down = math.exp(cos(z[i], z_pos[i]) / temperature), math.exp(cos(z[i], z_neg[i]) / temperature)
        total += -math.log(up / (up + down))
        pulled += 1 - cos(z[i], z_pos[i]) if i % 2 else -math.log(up / (up + down))
    assert float(contrastive_loss(z, z_pos, z_neg, temperature)) == pytest.approx(total / count, rel=1e-4, abs=1e-5)
    odd = torch.arange(count) % 2 == 1
    loss = contrastive_loss(z, z_pos, z_neg, temperature, odd)
    assert float(loss) == pytest.approx(pulled / count, rel=1e-4, abs=1e-5)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.floats(0.01, 100))
def test_loss_of_rectified_features_is_bounded_and_ignores_length(seed: int, factor: float) -> None:
    rng = generator(seed)
    z, z_pos, z_neg = (torch.rand(4, 8, generator=rng) + 1e-3 for _ in range(3))
    loss = float(contrastive_loss(z, z_pos, z_neg, 0.5))
    assert 0.1269 <= loss <= 2.1270
    assert float(contrastive_loss(factor * z, z_pos, z_neg, 0.5)) == pytest.approx(loss, rel=1e-4)


@pytest.mark.parametrize("mark", [None, torch.tensor([True, False, True])])
def test_loss_gradient_against_finite_differences(mark: Tensor | None) -> None:
    rng = generator(0)
    z, z_pos, z_neg = (torch.randn(3, 5, generator=rng, dtype=torch.float64) for _ in range(3))
    z.requires_grad_()
    assert torch.autograd.gradcheck(lambda v: contrastive_loss(v, z_pos, z_neg, 0.5, mark), (z,))
    assert torch.autograd.gradcheck(lambda v: anchor_loss(v, z_pos), (z,))


def test_the_bare_pull_has_the_slope_of_the_full_term_at_the_start() -> None:
    """Seen from the positive alone, where both cosines are equal and tau is 0.5."""
    z, z_neg = torch.tensor([[2.0, 1.0]]), torch.tensor([[1.0, 2.0]])
    gradients: list[Tensor] = []
    for mark in (None, torch.tensor([True])):
        z_pos = z_neg.clone().requires_grad_()
        gradients += torch.autograd.grad(contrastive_loss(z, z_pos, z_neg, 0.5, mark), z_pos)
    assert float(gradients[0].norm()) > 0.1
    assert torch.allclose(gradients[0], gradients[1])


def test_steps_of_the_paper(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the defense computes at a batch, from the definitions: one batch, four embeddings."""
    model = Tiny()
    loss, _ = captured(monkeypatch, MCLDef(temperature=0.3), model)
    one, victim, twin = batch(), Tiny(), copy.deepcopy(model)
    stamped = patch().apply(one.x)
    z, z_pos, z_neg = twin.embed(stamped), victim.embed(one.x), victim.embed(stamped)
    expected = 0.0
    for i in range(8):
        expected += math.log1p(math.exp((cos(z[i], z_neg[i]) - cos(z[i], z_pos[i])) / 0.3)) / 8
    assert loss(one).item() == pytest.approx(expected, rel=1e-4)


def test_a_zero_trigger_gives_ln_2_and_no_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Tiny()
    loss, _ = captured(monkeypatch, MCLDef(), model, MaskPattern(torch.zeros(8, 8), torch.ones(3, 8, 8)))
    value = loss(batch())
    assert value.item() == pytest.approx(math.log(2), abs=1e-6)
    torch.autograd.backward(value)
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert len(gradients) == 3
    assert max(float(gradient.abs().max()) for gradient in gradients) < 1e-6


def test_only_triggered_images_pass_and_they_differ_only_under_the_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    model, seen = Tiny(), list[Tensor]()
    loss, _ = captured(monkeypatch, MCLDef(), model)
    monkeypatch.setattr(model, "head", lambda z: pytest.fail("the head is not needed"))

    def normalise(x: Tensor) -> Tensor:
        seen.append(x)
        return Tiny.normalise(model, x)

    monkeypatch.setattr(model, "normalise", normalise)
    one = batch()
    loss(one)
    assert [len(x) for x in seen] == [8]
    changed = seen[0] != one.x
    assert changed.any()
    assert not changed[..., patch().mask == 0].any()


# ---------------------------------------------------------------- what must not move


@pytest.mark.parametrize("knobs", [{}, {"clean_anchor": 1.0}, {"ce": 0.5, "bn_refresh": True}])
def test_head_is_bit_identical_and_the_rest_moves(knobs: dict[str, Any]) -> None:
    before, after = state(Tiny()), repaired(MCLDef(**knobs))
    for name, value in before.items():
        if name.startswith("fc"):
            assert torch.equal(value, after[name])
        else:
            assert not torch.equal(value, after[name]), name


def test_head_of_a_wide_residual_network_is_bit_identical() -> None:
    torch.manual_seed(0)
    model = WRN(depth=10, widen=1).build(4, (3, 8, 8))
    before = state(model.eval())
    ctx = Bench(recipe=Recipe(steps=2, batch=8, augment="none")).defense(images(), patch(), target=1)
    after = state(MCLDef(ce=0.5).defend(model, ctx))
    moved = {name for name, value in before.items() if not torch.equal(value, after[name])}
    assert set(before) - moved == {"fc.weight", "fc.bias"}
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_the_frozen_victim_is_a_copy_that_never_moves(monkeypatch: pytest.MonkeyPatch) -> None:
    victims: list[Classifier] = []
    real = kit.frozen

    def watched(model: Classifier) -> Classifier:
        victims.append(real(model))
        return victims[-1]

    monkeypatch.setattr(module, "frozen", watched)
    model = Tiny()
    ctx = Bench().defense(images(), patch(), target=1)
    assert MCLDef(clean_anchor=1.0, bn_refresh=True).defend(model, ctx) is model
    assert not model.training
    assert same(state(victims[0]), state(Tiny()))
    assert not same(state(model), state(Tiny()))
    assert not victims[0].training
    assert all(p.grad is None and not p.requires_grad for p in victims[0].parameters())


def test_head_parameters_are_found_and_finding_them_changes_nothing() -> None:
    model = Tiny()
    before = state(model)
    found = head_parameters(model, batch().x)
    assert [id(p) for p in found] == [id(model.fc.weight), id(model.fc.bias)]
    assert same(state(model), before)
    assert all(p.grad is None for p in model.parameters())
    assert head_parameters(model.requires_grad_(False), batch().x) == []


# ---------------------------------------------------------------- knobs


def test_knowledge_labels_and_needs() -> None:
    plain = MCLDef()
    assert plain.knows == {"target"}
    assert plain.needs()["trigger"].method == "nc-box"
    assert MCLDef(inverter="nc-box(lr=0.01)").needs()["trigger"].method == "nc-box(lr=0.01)"
    assert not plain.uses_labels
    assert not MCLDef(clean_anchor=1.0, bn_refresh=True).uses_labels
    knobs: list[dict[str, Any]] = [{"exclude_target_class": True}, {"exclude_negative_on_target": True}, {"ce": 0.1}]
    for knob in knobs:
        assert MCLDef(**knob).uses_labels


def test_labels_do_not_matter_unless_a_knob_says_so() -> None:
    blind = Images(images().x, torch.full((24,), -1))
    for knobs in ({}, {"clean_anchor": 1.0, "bn_refresh": True}):
        defense = MCLDef(**knobs)  # type: ignore[arg-type]
        assert same(repaired(defense, blind), repaired(defense))


def test_every_knob_changes_the_result_and_its_off_value_does_not() -> None:
    plain = repaired(MCLDef())
    off: dict[str, Any] = {
        "clean_anchor": 0.0,
        "exclude_target_class": False,
        "exclude_negative_on_target": False,
        "ce": 0.0,
        "bn_refresh": False,
    }
    assert same(repaired(MCLDef(**off)), plain)
    on: dict[str, Any] = {
        **dict.fromkeys(off, True),
        "clean_anchor": 1.0,
        "ce": 0.5,
        "temperature": 0.1,
        "nesterov": True,
    }
    for name, value in on.items():
        assert not same(repaired(MCLDef(**{name: value})), plain), name


def test_clean_anchor_is_one_batch_and_adds_its_term(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Tiny()
    loss, _ = captured(monkeypatch, MCLDef(clean_anchor=2.0), model)
    one, victim, twin = batch(), Tiny(), copy.deepcopy(model)
    stamped = patch().apply(one.x)
    z, z_clean = twin.embed(torch.cat([stamped, one.x])).chunk(2)
    z_pos, z_neg = victim.embed(one.x), victim.embed(stamped)
    drift = sum(1 - cos(a, b) for a, b in zip(z_clean, z_pos, strict=True)) / 8
    expected = contrastive_loss(z, z_pos, z_neg, 0.5).item() + 2.0 * drift
    assert loss(one).item() == pytest.approx(expected, rel=1e-5)
    assert torch.equal(model.bn.running_mean, twin.bn.running_mean)  # type: ignore[arg-type]


def test_ce_adds_both_cross_entropies(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Tiny()
    loss, _ = captured(monkeypatch, MCLDef(ce=0.5), model)
    one, victim, twin = batch(), Tiny(), copy.deepcopy(model)
    stamped = patch().apply(one.x)
    out = twin.forward_all(torch.cat([stamped, one.x]))
    clean_and_triggered = 0.0
    for row, label in zip(out.logits.tolist(), one.y.tolist() * 2, strict=True):
        clean_and_triggered += (math.log(sum(math.exp(v) for v in row)) - row[label]) / 8
    expected = (contrastive_loss(out.embed[:8], victim.embed(one.x), victim.embed(stamped), 0.5)).item()
    assert loss(one).item() == pytest.approx(expected + 0.5 * clean_and_triggered, rel=1e-5)


def test_exclude_target_class_drops_its_images(monkeypatch: pytest.MonkeyPatch) -> None:
    _, everything = captured(monkeypatch, MCLDef(), Tiny())
    _, kept = captured(monkeypatch, MCLDef(exclude_target_class=True), Tiny())
    assert len(everything) == 24
    assert (len(kept), set(kept.y.tolist())) == (18, {0, 2, 3})
    lonely = images().subset(images().y == 1)
    with pytest.raises(UserError, match="all clean images are of class 1"):
        repaired(MCLDef(exclude_target_class=True), lonely)


def test_exclude_negative_on_target_pulls_only(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Tiny()
    loss, kept = captured(monkeypatch, MCLDef(exclude_negative_on_target=True), model)
    one, victim, twin = batch(), Tiny(), copy.deepcopy(model)
    stamped = patch().apply(one.x)
    z, z_pos, z_neg = twin.embed(stamped), victim.embed(one.x), victim.embed(stamped)
    expected = 0.0
    for i, label in enumerate(one.y.tolist()):
        s_pos, s_neg = cos(z[i], z_pos[i]), cos(z[i], z_neg[i])
        expected += (1 - s_pos if label == 1 else math.log1p(math.exp((s_neg - s_pos) / 0.5))) / 8
    assert len(kept) == 24
    assert loss(one).item() == pytest.approx(expected, rel=1e-4)


def test_bn_refresh_changes_the_running_statistics_alone() -> None:
    plain, fresh = repaired(MCLDef()), repaired(MCLDef(bn_refresh=True))
    changed = {name for name in plain if not torch.equal(plain[name], fresh[name])}
    assert changed == {"bn.running_mean", "bn.running_var", "bn.num_batches_tracked"}


def test_bn_refresh_sees_the_target_class_even_where_the_training_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    monkeypatch.setattr(module, "refresh_batchnorm", lambda model, images: seen.append(len(images)))
    repaired(MCLDef(exclude_target_class=True, bn_refresh=True))
    assert seen == [24]


def test_refresh_is_the_average_over_equal_parts() -> None:
    model, clean = Tiny(), images(22)
    model.bn.num_batches_tracked.fill_(1000)  # type: ignore[union-attr]  # a long training must not weigh on the average
    refresh_batchnorm(model, clean, size=8)
    means, variances = [], []
    for part in (clean.x[:8], clean.x[8:15], clean.x[15:]):
        maps = model.conv(model.normalise(part.float() / 255))
        means.append(maps.mean((0, 2, 3)))
        variances.append(maps.var((0, 2, 3)))
    assert torch.allclose(model.bn.running_mean, sum(means) / 3, atol=1e-5)  # type: ignore[arg-type]
    assert torch.allclose(model.bn.running_var, sum(variances) / 3, rtol=1e-4)  # type: ignore[arg-type]
    assert model.bn.momentum == 0.1
    assert not model.training


def test_refresh_takes_fewer_large_images_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    model = Tiny()
    monkeypatch.setattr(model, "embed", lambda x: sizes.append(len(x)))
    refresh_batchnorm(model, images(130, size=96))
    assert sizes == [44, 43, 43]


def test_settings_reach_the_training_and_the_log_has_diagnostics() -> None:
    bench = Bench()
    MCLDef(steps=6, lr=0.01).defend(Tiny(), bench.defense(images(), patch(), target=1))
    assert bench.ticks[-1][:2] == (6, 6)
    told = [line for line in bench.lines if line.startswith("loss")]
    assert len(told) == 2  # two passes of three steps
    assert all(word in told[0] for word in ("loss", "s_pos", "s_neg", "norm_ratio"))


def test_a_resumed_repair_ends_in_the_same_bits() -> None:
    defense, first = MCLDef(clean_anchor=1.0, bn_refresh=True), Bench()
    whole = state(defense.defend(Tiny(), first.defense(images(), patch(), target=1)))
    again = Bench(snapshot=Memory(first.snapshot.saved[0]))
    assert same(state(defense.defend(Tiny(), again.defense(images(), patch(), target=1))), whole)
    assert len(again.ticks) == 3  # one of two passes


# ---------------------------------------------------------------- the label from a detector


def corner(value: float = 1.0, size: int = 8) -> MaskPattern:
    """Another trigger: the pixels of the first corner in one grey."""
    mask = torch.zeros(size, size)
    mask[:2, :2] = 1.0
    return MaskPattern(mask, torch.full((3, size, size), value))


def test_a_detector_takes_the_place_of_the_grant_and_the_old_identity_stays() -> None:
    given, detect = MCLDef(), MCLDef(target="detect", detector="nc-full(lr=0.05)", inverter="uap")
    assert given.needs()["trigger"].verdict is None
    need = detect.needs()["trigger"]
    assert (need.kind, need.method, need.verdict) == ("trigger", "uap", "nc-full(lr=0.05)")
    assert detect.knows == frozenset()
    assert {name: given.params[name] for name in MCLDef.added} == MCLDef.added


@pytest.mark.parametrize("knobs", [{}, {"bn_refresh": True}, {"exclude_target_class": True, "ce": 0.5}])
def test_a_clean_verdict_leaves_the_victim_as_it_is(knobs: dict[str, Any]) -> None:
    bench, model = Bench(), Tiny()
    assert MCLDef(target="detect", **knobs).defend(model, detected({}, bench)) is model
    assert same(state(model), state(Tiny()))
    assert not model.training
    assert bench.ticks == []
    assert "no label" in bench.lines[0]


@pytest.mark.parametrize("knobs", [{}, {"exclude_negative_on_target": True}, {"exclude_target_class": True, "ce": 0.5}])
def test_one_flagged_label_is_as_good_as_a_given_one(knobs: dict[str, Any]) -> None:
    found = state(MCLDef(target="detect", **knobs).defend(Tiny(), detected({1: patch()})))
    assert same(found, repaired(MCLDef(**knobs)))


def test_each_batch_gets_one_of_two_flagged_triggers_and_both_models_the_same_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, found = Tiny(), {3: patch(), 0: corner()}
    loss, _ = captured(monkeypatch, MCLDef(target="detect"), model, ctx=detected(found))
    one, victim = batch(), Tiny()
    values: dict[int, float] = {}
    for label, trigger in found.items():
        twin, stamped = copy.deepcopy(model), trigger.apply(one.x)
        value = contrastive_loss(twin.embed(stamped), victim.embed(one.x), victim.embed(stamped), 0.5)
        values[label] = value.item()
    seen = [loss(one).item() for _ in range(12)]
    turns = [min(values, key=lambda label: abs(values[label] - value)) for value in seen]
    assert set(turns) == {0, 3}
    assert all(value == pytest.approx(values[label], rel=1e-5) for value, label in zip(seen, turns, strict=True))


def test_all_flagged_labels_are_target_classes_to_the_knobs(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {3: patch(), 0: patch()}
    drop = MCLDef(target="detect", exclude_target_class=True)
    _, kept = captured(monkeypatch, drop, Tiny(), ctx=detected(found))
    assert (len(kept), set(kept.y.tolist())) == (12, {1, 2})
    lonely = images().subset(images().y % 3 == 0)
    with pytest.raises(UserError, match="all clean images are of class 3, 0"):
        drop.defend(Tiny(), detected(found, clean=lonely))

    model = Tiny()
    pull = MCLDef(target="detect", exclude_negative_on_target=True)
    loss, kept = captured(monkeypatch, pull, model, ctx=detected(found))
    one, victim, twin = batch(), Tiny(), copy.deepcopy(model)
    stamped = patch().apply(one.x)
    marked = torch.tensor([label in found for label in one.y.tolist()])
    expected = contrastive_loss(twin.embed(stamped), victim.embed(one.x), victim.embed(stamped), 0.5, marked)
    assert int(marked.sum()) == 4
    assert len(kept) == 24
    assert loss(one).item() == pytest.approx(expected.item(), rel=1e-5)


def test_a_resumed_repair_takes_the_same_turns() -> None:
    defense, found = MCLDef(target="detect"), {3: patch(), 0: corner(), 1: corner(0.0)}
    recipe = Recipe(epochs=4, lr=0.05, batch=8, augment="none")
    first = Bench(recipe=recipe)
    whole = state(defense.defend(Tiny(), detected(found, first)))
    again = Bench(recipe=recipe, snapshot=Memory(first.snapshot.saved[1]))
    assert same(state(defense.defend(Tiny(), detected(found, again))), whole)
    assert len(again.ticks) == 6  # two of four passes


# ---------------------------------------------------------------- what comes of it


def test_a_repair_pulls_triggered_features_back_and_the_anchor_holds_clean_ones() -> None:
    clean, mask, red = images(32), torch.zeros(8, 8), torch.zeros(3, 8, 8)
    mask[-4:], red[0] = 1.0, 1.0
    trigger, x, victim = MaskPattern(mask, red), clean.x.float() / 255, Tiny(seed=2)
    drift = []
    for weight in (0.0, 1.0):
        ctx = Bench(recipe=Recipe(epochs=40, lr=0.05, batch=16, augment="none")).defense(clean, trigger, target=1)
        model = MCLDef(clean_anchor=weight).defend(Tiny(seed=2), ctx)
        with torch.no_grad():
            z_pos, z_neg = victim.embed(x), victim.embed(trigger.apply(x))
            before = contrastive_loss(z_neg, z_pos, z_neg, 0.5)
            after = contrastive_loss(model.embed(trigger.apply(x)), z_pos, z_neg, 0.5)
            drift.append(float(anchor_loss(model.embed(x), z_pos)))
        assert float(after) < float(before) / 2  # 0.26 and 0.30 of 1.06 were measured
    assert drift[1] < 0.75 * drift[0]  # 0.084 of 0.158 was measured
