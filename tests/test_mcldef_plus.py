"""MCLDef+: stage 3 by hand, what it starts from and what must not move, its share of the steps, its part in a plan."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import small
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import Bench, Memory, Tiny, generator, images, same, state
from tiny import one_thread as one_thread
from torch import Tensor

import bbmcl_defenses.mcldef_plus as module
from backdoorbench_mcl import kit, params, runner
from backdoorbench_mcl.api import Batch, Classifier, DefenseContext, Images, MaskPattern, Recipe, Trigger
from backdoorbench_mcl.runner import Settings
from bbmcl_defenses.mcldef import MCLDef, anchor_loss
from bbmcl_defenses.mcldef_plus import MCLDefPlus, quoted
from bbmcl_models.wrn import WRN

RECIPE = Recipe(epochs=2, lr=0.05, batch=8, augment="none")
QUICK: dict[str, Any] = {"lr": 0.05, "epochs": 2}  # at the default 0.001 little moves in two passes


def patch(value: float = 1.0, size: int = 8) -> MaskPattern:
    mask = torch.zeros(size, size)
    mask[-3:, -3:] = 0.7
    return MaskPattern(mask, torch.full((3, size, size), value))


def purified(trigger: Trigger | None = None) -> Tiny:
    """What mcldef makes of Tiny()."""
    ctx = Bench().defense(images(), patch() if trigger is None else trigger, target=1)
    model = MCLDef().defend(Tiny(), ctx)
    assert isinstance(model, Tiny)
    return model


def context(
    start: Classifier | None = None,
    *,
    trigger: Trigger | None = None,
    found: Mapping[int, Trigger] | None = None,
    clean: Images | None = None,
    bench: Bench | None = None,
) -> DefenseContext:
    """found: what a detector flagged; without, `trigger` is that of the granted label."""
    bench = Bench(recipe=RECIPE) if bench is None else bench
    granted: dict[str, Any] = {"target": 1} if found is None else {}
    ctx = bench.defense(images() if clean is None else clean, None, **granted)
    told = (patch() if trigger is None else trigger) if found is None else dict(found)
    return dataclasses.replace(ctx, needs={"trigger": told, "purified": purified() if start is None else start})


def captured(
    monkeypatch: pytest.MonkeyPatch, defense: MCLDefPlus, victim: Classifier, ctx: DefenseContext
) -> Callable[[Batch], Tensor]:
    """The loss that `defense` hands to the training loop, which is not run. The purified model is in train mode."""
    caught: list[Callable[[Batch], Tensor]] = []
    monkeypatch.setattr(module, "fit", lambda model, images, ctx, loss, recipe: caught.append(loss))
    defense.defend(victim, ctx).train()
    return caught[0]


def batch(count: int = 8) -> Batch:
    return next(images().batches(count))


def cos(a: Tensor, b: Tensor) -> float:
    p, q = a.tolist(), b.tolist()
    dot = sum(u * v for u, v in zip(p, q, strict=True))
    return float(dot / math.sqrt(sum(u**2 for u in p)) / math.sqrt(sum(v**2 for v in q)))


# ---------------------------------------------------------------- the loss


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 6), st.integers(2, 9), st.integers(0, 10**6))
def test_pull_against_loops(count: int, width: int, seed: int) -> None:
    z, z_pos = (torch.randn(count, width, generator=generator(seed + k)) for k in (0, 1))
    expected = sum(1 - cos(a, b) for a, b in zip(z, z_pos, strict=True)) / count
    assert float(anchor_loss(z, z_pos)) == pytest.approx(expected, abs=1e-5)
    assert float(anchor_loss(3 * z_pos, z_pos)) == pytest.approx(0, abs=1e-6)
    assert float(anchor_loss(-z_pos, z_pos)) == pytest.approx(2, abs=1e-6)


def test_the_pull_has_the_gradient_of_minus_the_cosine() -> None:
    z, z_pos = (torch.randn(3, 5, generator=generator(k), dtype=torch.float64) for k in (0, 1))
    z.requires_grad_()
    assert torch.autograd.gradcheck(lambda v: anchor_loss(v, z_pos), (z,))
    dots = (z * z_pos).sum(1) / z.norm(dim=1) / z_pos.norm(dim=1)
    expected = torch.autograd.grad(-dots.mean(), z)[0]
    assert torch.allclose(torch.autograd.grad(anchor_loss(z, z_pos), z)[0], expected, atol=1e-12)


def test_a_step_from_the_definitions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triggered features come from the purified model in train mode, clean ones from the victim in eval mode."""
    victim, start = Tiny(), purified()
    loss = captured(monkeypatch, MCLDefPlus(), victim, context(start))
    one, twin, stamped = batch(), copy.deepcopy(start), patch().apply(batch().x)
    z, z_pos = twin.embed(stamped), Tiny().embed(one.x)
    expected = sum(1 - cos(a, b) for a, b in zip(z, z_pos, strict=True)) / 8
    assert expected > 0.005
    assert loss(one).item() == pytest.approx(expected, rel=1e-3)
    assert torch.equal(start.bn.running_mean, twin.bn.running_mean)  # type: ignore[arg-type]  # triggered images alone


def test_the_control_spends_its_steps_on_the_loss_of_stage_2(monkeypatch: pytest.MonkeyPatch) -> None:
    victim, start = Tiny(), purified()
    loss = captured(monkeypatch, MCLDefPlus(stage="contrast", temperature=0.3), victim, context(start))
    one, twin, stamped = batch(), copy.deepcopy(start), patch().apply(batch().x)
    z, z_pos, z_neg = twin.embed(stamped), Tiny().embed(one.x), Tiny().embed(stamped)
    expected = 0.0
    for i in range(8):
        expected += math.log1p(math.exp((cos(z[i], z_neg[i]) - cos(z[i], z_pos[i])) / 0.3)) / 8
    assert loss(one).item() == pytest.approx(expected, rel=1e-4)


def test_a_zero_trigger_gives_the_control_ln_2_and_no_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    zero = MaskPattern(torch.zeros(8, 8), torch.ones(3, 8, 8))
    start = purified(zero)
    loss = captured(monkeypatch, MCLDefPlus(stage="contrast"), Tiny(), context(start, trigger=zero))
    value = loss(batch())
    assert value.item() == pytest.approx(math.log(2), abs=1e-6)
    torch.autograd.backward(value)
    gradients = [p.grad for p in start.parameters() if p.grad is not None]
    assert len(gradients) == 3
    assert max(float(gradient.abs().max()) for gradient in gradients) < 1e-6


# ---------------------------------------------------------------- what must not move


@pytest.mark.parametrize("stage", ["pull", "contrast"])
def test_it_goes_on_from_the_purified_weights_and_leaves_victim_and_head(stage: Any) -> None:
    victim, start = Tiny(), purified()
    before = state(start)
    after = MCLDefPlus(stage=stage, **QUICK).defend(victim, context(start))
    assert after is start
    assert not after.training
    assert all(parameter.requires_grad for parameter in after.parameters())
    moved = {name for name, value in state(after).items() if not torch.equal(value, before[name])}
    assert moved == {name for name in before if not name.startswith("fc")}
    assert all(torch.equal(value, state(Tiny())[name]) for name, value in before.items() if name.startswith("fc"))
    assert same(state(victim), state(Tiny()))  # batch norm's statistics included
    fresh = MCLDefPlus(stage=stage, **QUICK).defend(Tiny(), context(Tiny()))
    assert not same(state(fresh), state(after))  # where it starts from matters


def test_the_frozen_victim_is_the_original_one_and_never_moves(monkeypatch: pytest.MonkeyPatch) -> None:
    victims: list[Classifier] = []
    real = kit.frozen

    def watched(model: Classifier) -> Classifier:
        victims.append(real(model))
        return victims[-1]

    monkeypatch.setattr(module, "frozen", watched)
    MCLDefPlus(**QUICK).defend(Tiny(), context())
    assert [same(state(victim), state(Tiny())) for victim in victims] == [True]
    assert not victims[0].training
    assert all(p.grad is None and not p.requires_grad for p in victims[0].parameters())


def test_head_of_a_wide_residual_network_is_bit_identical() -> None:
    torch.manual_seed(0)
    start = WRN(depth=10, widen=1).build(4, (3, 8, 8)).eval()
    before = state(start)
    bench = Bench(recipe=Recipe(steps=2, batch=8, augment="none"))
    after = state(MCLDefPlus(steps=2).defend(copy.deepcopy(start), context(start, bench=bench)))
    assert {name for name in before if torch.equal(before[name], after[name])} == {"fc.weight", "fc.bias"}


def test_labels_do_not_matter() -> None:
    blind = Images(images().x, torch.full((24,), -1))
    mixed = Images(images().x, images().y.flip(0))
    plain = state(MCLDefPlus(**QUICK).defend(Tiny(), context()))
    for clean in (blind, mixed):
        assert same(state(MCLDefPlus(**QUICK).defend(Tiny(), context(clean=clean))), plain)
    assert not MCLDefPlus().uses_labels


# ---------------------------------------------------------------- length and settings


def test_the_recipe_of_stage_3() -> None:
    common = Recipe(epochs=20, lr=0.1, milestones=(0.05, 0.5), augment="none")
    own = MCLDefPlus().recipe(common)
    assert (own.total(2500), own.momentum, own.weight_decay, own.batch) == (400, 0.9, 1e-4, 64)
    assert not own.nesterov
    assert {own.lr_at(step, 400) for step in (0, 20, 200, 399)} == {0.001}
    quick = Recipe(epochs=20, steps=200, lr=0.1, milestones=(0.05, 0.5))
    assert MCLDefPlus().recipe(quick).total(2500) == 100  # half of the epochs, half of the steps
    assert MCLDefPlus(epochs=5).recipe(quick).total(2500) == 50
    assert MCLDefPlus(steps=7).recipe(quick).total(2500) == 7
    assert MCLDefPlus(epochs=1).recipe(Recipe(steps=3)).total(2500) == 1


def test_every_knob_changes_the_result() -> None:
    plain = state(MCLDefPlus(**QUICK).defend(Tiny(), context()))
    for knob in ({"nesterov": True}, {"lr": 0.01}, {"epochs": 1}, {"steps": 5}, {"stage": "contrast"}):
        assert not same(state(MCLDefPlus(**{**QUICK, **knob}).defend(Tiny(), context())), plain), knob


def test_the_pull_takes_triggered_features_to_their_clean_ones() -> None:
    x, victim, start = images().x.float() / 255, Tiny(), purified()

    def distance(model: Classifier) -> float:
        with torch.no_grad():
            return float(anchor_loss(model.embed(patch().apply(x)), victim.embed(x)))

    before = distance(start)
    bench = Bench(recipe=Recipe(epochs=20, batch=8, augment="none"))
    after = distance(MCLDefPlus(epochs=20, lr=0.02).defend(Tiny(), context(start, bench=bench)))
    assert after < 0.7 * before


@pytest.mark.parametrize("several", [False, True])
def test_a_resumed_repair_ends_in_the_same_bits(several: bool) -> None:
    found = {1: patch(), 2: patch(0.0)} if several else {1: patch()}
    defense = MCLDefPlus(target="detect", epochs=4, lr=0.05)
    first = Bench(recipe=RECIPE)
    whole = state(defense.defend(Tiny(), context(found=found, bench=first)))
    again = Bench(recipe=RECIPE, snapshot=Memory(first.snapshot.saved[1]))
    assert same(state(defense.defend(Tiny(), context(found=found, bench=again))), whole)
    assert len(again.ticks) == 6  # two of four passes


# ---------------------------------------------------------------- the label from a detector


def test_a_clean_verdict_leaves_the_victim_as_it_is() -> None:
    victim, bench = Tiny(), Bench(recipe=RECIPE)
    assert MCLDefPlus(target="detect").defend(victim, context(Tiny(), found={}, bench=bench)) is victim
    assert same(state(victim), state(Tiny()))
    assert bench.ticks == []


def test_one_flagged_label_is_as_good_as_a_given_one() -> None:
    found = MCLDefPlus(target="detect", **QUICK).defend(Tiny(), context(found={1: patch()}))
    assert same(state(found), state(MCLDefPlus(**QUICK).defend(Tiny(), context())))


def test_each_batch_gets_one_of_two_flagged_triggers(monkeypatch: pytest.MonkeyPatch) -> None:
    start, found = purified(), {3: patch(), 0: patch(0.0)}
    loss = captured(monkeypatch, MCLDefPlus(target="detect"), Tiny(), context(start, found=found))
    one, victim = batch(), Tiny()
    values = []
    for trigger in found.values():
        twin = copy.deepcopy(start)
        values.append(anchor_loss(twin.embed(trigger.apply(one.x)), victim.embed(one.x)).item())
    assert abs(values[0] - values[1]) > 1e-4
    seen = [loss(one).item() for _ in range(12)]
    turns = [min((0, 1), key=lambda i: abs(values[i] - value)) for value in seen]
    assert set(turns) == {0, 1}
    assert all(value == pytest.approx(values[i], rel=1e-4) for value, i in zip(seen, turns, strict=True))


# ---------------------------------------------------------------- the mcldef behind it

TEXTS = [
    "nc-box",
    "nc-box(lr=0.01, box=normalized)",
    "mesa(betas=(0.5,0.8), location='given')",
    'mesa(betas=[0.5, 0.8], location="given")',
    "two(a='x,y', b=\"(z)\")",
    "true",
]


@pytest.mark.parametrize("inverter", TEXTS)
@pytest.mark.parametrize("target", ["given", "detect"])
def test_mcldef_is_told_the_same_trigger_whatever_its_text(inverter: str, target: Any) -> None:
    detector = "nc-full(lr=0.1, betas=(0.5, 0.9))"
    defense = MCLDefPlus(inverter=inverter, target=target, detector=detector, temperature=0.25)
    trigger, need = defense.needs()["trigger"], defense.needs()["purified"]
    asked = params.selection(need.method)
    inner = MCLDef(**asked.params)
    assert (need.kind, asked.name, asked.suffix) == ("result", "mcldef", "")
    assert inner.needs()["trigger"] == trigger
    assert trigger.method == inverter
    assert trigger.verdict == (detector if target == "detect" else None)
    assert inner.temperature == 0.25
    assert inner.knows == defense.knows


def test_quotes_of_both_kinds_stay_as_typed() -> None:
    assert quoted("nc-box(lr=1)") == "'nc-box(lr=1)'"
    assert quoted(TEXTS[4]) == TEXTS[4]


def test_a_plain_mcldef_is_the_stage_that_it_needs(monkeypatch: pytest.MonkeyPatch, toy_env: dict[str, str]) -> None:
    small.install_toy(monkeypatch, toy_env["BBMCL_CACHE"])
    blind = "mcldef+(target=detect,detector='oracle(flags=(2,))',inverter=oracle)"
    asked = small.options("badnets(target=1)", f"mcldef,mcldef+,mcldef+(stage=contrast),{blind}", overrides=())
    graph = small.build(asked)
    kinds = [node.kind for node in graph.nodes.values()]
    assert {kind: kinds.count(kind) for kind in ("verdict", "invert", "defend")} == {
        "verdict": 1, "invert": 2, "defend": 5,
    }  # fmt: skip
    mcldef, *three = [graph.nodes[cell.own[0]] for cell in graph.cells[1:]]
    plain = [node.inputs["need-purified"] == mcldef.key for node in three]
    same_trigger = [node.inputs["need-trigger"] == mcldef.inputs["need-trigger"] for node in three]
    assert plain == same_trigger == [True, True, False]
    assert [cell.row.knows for cell in graph.cells[1:]] == [("target",)] * 3 + [()]


def test_from_end_to_end(monkeypatch: pytest.MonkeyPatch, toy_env: dict[str, str], tmp_path: Path) -> None:
    small.install_toy(monkeypatch, toy_env["BBMCL_CACHE"])
    true, place = (f"inverter='oracle(know={know})'" for know in ("trigger", "location"))
    chosen = [f"nc({true})"]
    chosen += [f"mcldef+(target=detect,{place},detector={flags})" for flags in ("'oracle(flags=(1,0))'", "oracle")]
    steps = ("train.steps=200", "defend.steps=20")
    asked = small.options("badnets(target=1,rate=0.2)", ",".join(chosen), overrides=steps)
    rows = runner.run_matrix(asked, Settings(runs=tmp_path, workers=1, threads=1), live=False)
    assert [(row.state, row.reason) for row in rows] == [("ok", "")] * 4
    before, nc, flagged, clean = rows
    assert [row.knows for row in rows[1:]] == [("target", "trigger"), ("location",), ("location",)]
    assert [row.uses_labels for row in rows[1:]] == [True, False, False]
    assert (clean.asr, clean.ba) == (before.asr, before.ba)
    assert flagged.ba != before.ba
    assert before.asr is not None
    assert nc.asr is not None
    assert nc.asr < before.asr / 2
