"""NC: which items are stamped, its loss by hand, and what it shares with mcldef: one trigger or those of a verdict."""

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

import bbmcl_defenses.nc as module
from backdoorbench_mcl.api import Batch, DefenseContext, Images, MaskPattern, Recipe
from bbmcl_defenses.ft import FT
from bbmcl_defenses.nc import NC, stamp_some
from bbmcl_defenses.stamps import Stamp, knowledge, need, pick, suspect


def patch(value: float = 1.0, size: int = 8) -> MaskPattern:
    mask = torch.zeros(size, size)
    mask[:2, :3] = 1.0
    return MaskPattern(mask, torch.full((3, size, size), value))


def detected(
    found: Mapping[int, MaskPattern], bench: Bench | None = None, clean: Images | None = None
) -> DefenseContext:
    """A context without a granted target: reading it would raise."""
    ctx = (bench or Bench()).defense(images() if clean is None else clean)
    return dataclasses.replace(ctx, needs={"trigger": dict(found)})


def repaired(defense: NC, **settings: Any) -> dict[str, Tensor]:
    return state(defense.defend(Tiny(), Bench(**settings).defense(images(), patch(), target=1)))


# ---------------------------------------------------------------- stamping


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 70), st.floats(0, 1), st.integers(0, 10**6))
def test_exactly_the_rounded_share_is_stamped(size: int, share: float, seed: int) -> None:
    x = torch.rand(size, 3, 8, 8, generator=generator(seed)) * 0.9
    before = x.clone()
    out = stamp_some(x, share, [Stamp(1, patch())], generator(seed))
    changed = (out != before).flatten(1).any(1)
    assert int(changed.sum()) == round(share * size)
    assert torch.equal(out[changed], patch().apply(before[changed]))
    assert torch.equal(x, before)


@pytest.mark.parametrize(("size", "count"), [(64, 13), (4, 1), (2, 0), (5, 1), (10, 2)])
def test_a_fifth_of_a_batch(size: int, count: int) -> None:
    x = torch.zeros(size, 3, 8, 8)
    assert int(stamp_some(x, 0.2, [Stamp(1, patch())], generator(0)).flatten(1).any(1).sum()) == count


def test_the_choice_is_fresh_uniform_and_follows_the_generator() -> None:
    x, rng, counts = torch.zeros(10, 3, 8, 8), generator(0), torch.zeros(10)
    for _ in range(400):
        counts += stamp_some(x, 0.3, [Stamp(1, patch())], rng).flatten(1).any(1)
    assert int(counts.sum()) == 1200
    assert counts.min() > 80  # of 120 +- 9
    assert counts.max() < 160
    again = [stamp_some(x, 0.3, [Stamp(1, patch())], generator(7)) for _ in range(2)]
    assert torch.equal(*again)


def test_no_draw_where_nothing_is_stamped() -> None:
    rng = generator(3)
    both = [Stamp(1, patch()), Stamp(2, patch(0.5))]
    stamp_some(torch.zeros(8, 3, 8, 8), 0.0, both, rng)
    assert torch.equal(rng.get_state(), generator(3).get_state())


# ---------------------------------------------------------------- several labels


def test_of_one_label_nothing_is_drawn_and_several_get_equal_turns() -> None:
    rng = generator(0)
    one, other = Stamp(2, patch()), Stamp(0, patch(0.5))
    assert pick([one], rng) is one
    assert torch.equal(rng.get_state(), generator(0).get_state())
    turns = [pick([one, other], rng).label for _ in range(400)]
    assert 160 < turns.count(2) < 240
    assert turns != [2, 0] * 200


def test_suspects_are_all_labels_that_a_trigger_leads_to() -> None:
    y = torch.tensor([0, 1, 2, 3, 2, -1])
    assert suspect([Stamp(2, patch())], y).tolist() == [False, False, True, False, True, False]
    assert suspect([Stamp(2, patch()), Stamp(0, patch())], y).tolist() == [True, False, True, False, True, False]


def test_knowledge_and_needs() -> None:
    assert NC().knows == knowledge("given") == {"target"}
    assert NC(target="detect").knows == knowledge("detect") == frozenset()
    given, detect = NC().needs()["trigger"], NC(target="detect", detector="nc-full(lr=1)").needs()["trigger"]
    assert (given.kind, given.method, given.verdict) == ("trigger", "nc-box", None)
    assert (detect.kind, detect.method, detect.verdict) == ("trigger", "nc-box", "nc-full(lr=1)")
    assert need("given", "true", "nc-full").method == "true"
    assert NC(inverter=True).needs()["trigger"].method == "true"  # type: ignore[arg-type]  # as `inverter=true` arrives
    assert NC().uses_labels


# ---------------------------------------------------------------- the defense


def captured(
    monkeypatch: pytest.MonkeyPatch, defense: NC, model: Tiny, ctx: DefenseContext
) -> Callable[[Batch], Tensor]:
    caught: list[Callable[[Batch], Tensor]] = []
    monkeypatch.setattr(module, "fit", lambda model, images, ctx, loss, recipe: caught.append(loss))
    defense.defend(model, ctx)
    model.train()
    return caught[0]


def test_loss_against_loops(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cross-entropy with the labels as they are, on a batch of which the drawn fifth carries the trigger."""
    model = Tiny()
    ctx = Bench().defense(images(), patch(), target=1)
    loss = captured(monkeypatch, NC(share=0.4), model, ctx)
    twin, batch = copy.deepcopy(model), next(images().batches(8))
    x, y = batch.x.clone(), batch.y.clone()
    drawn = torch.Generator()
    drawn.set_state(ctx.rng.get_state())
    for item in torch.randperm(8, generator=drawn)[:3].tolist():
        x[item, :, :2, :3] = 1.0
    expected = 0.0
    for row, label in zip(twin(x).tolist(), y.tolist(), strict=True):
        expected += (math.log(sum(math.exp(value) for value in row)) - row[label]) / 8
    assert loss(batch).item() == pytest.approx(expected, rel=1e-5)
    assert torch.equal(batch.y, y)
    assert torch.equal(batch.x, next(images().batches(8)).x)


def test_share_0_is_plain_fine_tuning_to_the_last_bit() -> None:
    plain = state(FT(nesterov=False).defend(Tiny(), Bench().defense(images())))
    assert same(repaired(NC(share=0.0)), plain)
    both = detected({1: patch(), 2: patch(0.5)})
    assert same(state(NC(share=0.0, target="detect").defend(Tiny(), both)), plain)
    assert not same(repaired(NC()), plain)


def test_every_knob_changes_the_result_and_all_layers_move() -> None:
    plain, before = repaired(NC()), state(Tiny())
    assert all(not torch.equal(before[name], value) for name, value in plain.items())
    for knob in ({"share": 0.5}, {"nesterov": True}, {"lr": 0.01}, {"epochs": 1}, {"steps": 4}):
        assert not same(repaired(NC(**knob)), plain), knob


def test_a_clean_verdict_leaves_the_victim_as_it_is() -> None:
    bench, model = Bench(), Tiny()
    assert NC(target="detect").defend(model, detected({}, bench)) is model
    assert same(state(model), state(Tiny()))
    assert bench.ticks == []
    assert "no label" in bench.lines[0]


def test_one_flagged_label_is_as_good_as_a_given_one() -> None:
    found = state(NC(target="detect").defend(Tiny(), detected({1: patch()})))
    assert same(found, repaired(NC()))


def test_of_two_flagged_labels_both_triggers_are_unlearnt(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Tiny()
    ctx = detected({3: patch(), 0: patch(0.5)})
    loss = captured(monkeypatch, NC(target="detect"), model, ctx)
    seen: list[set[float]] = []

    def normalise(x: Tensor) -> Tensor:
        stamped = [item for item in x if (item[:, :2, :3] == item[0, 0, 0]).all()]
        seen.append({float(item[0, 0, 0]) for item in stamped})
        return Tiny.normalise(model, x)

    monkeypatch.setattr(model, "normalise", normalise)
    for batch in [*images().batches(8)] * 6:
        loss(batch)
    assert all(len(kinds) == 1 for kinds in seen)  # one of them in each batch
    assert {kind for kinds in seen for kind in kinds} == {0.5, 1.0}


@pytest.mark.parametrize("several", [False, True])
def test_a_resumed_repair_ends_in_the_same_bits(several: bool) -> None:
    found = {1: patch(), 2: patch(0.5)} if several else {1: patch()}
    defense, recipe = NC(target="detect"), Recipe(epochs=4, lr=0.05, batch=8, augment="none")
    first = Bench(recipe=recipe)
    whole = state(defense.defend(Tiny(), detected(found, first)))
    again = Bench(recipe=recipe, snapshot=Memory(first.snapshot.saved[1]))
    assert same(state(defense.defend(Tiny(), detected(found, again))), whole)
    assert len(again.ticks) == 6  # two of four passes


def test_a_trigger_is_unlearnt_and_clean_images_stay_right() -> None:
    """A colour decides the class; a victim that fell for the patch no longer does."""
    y = torch.arange(48) % 2
    x = torch.randint(0, 40, (48, 3, 8, 8), generator=generator(0), dtype=torch.uint8)
    x[y == 0, 0] += 150
    x[y == 1, 2] += 150
    clean, recipe = Images(x, y), Recipe(epochs=40, lr=0.05, milestones=(), batch=16, augment="none")
    mask = torch.zeros(8, 8)
    mask[:3, :3] = 1.0
    trigger = MaskPattern(mask, torch.ones(3, 8, 8))
    poison = trigger.apply(x.float() / 255).mul(255).round().to(torch.uint8)
    dirty = Images(torch.cat([x, poison]), torch.cat([y, torch.ones_like(y)]))
    victim = FT().defend(Tiny(classes=2), Bench(classes=2, recipe=recipe).defense(dirty))

    def rates(model: Any) -> tuple[float, float]:
        with torch.no_grad():
            hit = model(trigger.apply(x[y == 0].float() / 255)).argmax(1) == 1
            right = model(x.float() / 255).argmax(1) == y
        return float(hit.float().mean()), float(right.float().mean())

    assert min(rates(victim)) > 0.9
    fixed = NC().defend(victim, Bench(classes=2, recipe=recipe).defense(clean, trigger, target=1))
    asr, accuracy = rates(fixed)
    assert asr < 0.1
    assert accuracy > 0.9
