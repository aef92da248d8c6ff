"""Fine-tuning: its loss and its step against a literal one, and what the defenses share."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from tiny import Bench, Memory, Tiny, images, same, state
from tiny import one_thread as one_thread

from backdoorbench_mcl.api import Recipe
from bbmcl_defenses.ft import FT
from bbmcl_defenses.training import Meter, adapt


def step_by_hand(model: Tiny, bench_seed: int, nesterov: bool, steps: int) -> None:
    """SGD with momentum 0.9 and weight decay 1e-4 on a literal cross-entropy, in place."""
    clean, rng = images(), torch.Generator().manual_seed(bench_seed)
    model.train()
    names = dict(model.named_parameters())
    buffers: dict[str, torch.Tensor] = {}
    for index in torch.split(torch.randperm(len(clean), generator=rng), 8)[:steps]:
        logits = model(clean.x[index].float() / 255)
        total = torch.zeros(())
        for row, label in zip(logits, clean.y[index].tolist(), strict=True):
            total = total + torch.log(sum((value.exp() for value in row), torch.zeros(()))) - row[label]
        gradients = torch.autograd.grad(total / len(index), list(names.values()))
        with torch.no_grad():
            for (name, weight), gradient in zip(names.items(), gradients, strict=True):
                pull = gradient + 1e-4 * weight
                buffers[name] = 0.9 * buffers[name] + pull if name in buffers else pull.clone()
                weight.sub_(0.05 * (pull + 0.9 * buffers[name] if nesterov else buffers[name]))


@pytest.mark.parametrize("nesterov", [True, False])
def test_three_steps_against_a_literal_loop(nesterov: bool) -> None:
    recipe = Recipe(steps=3, lr=0.05, milestones=(), batch=8, augment="none")
    bench = Bench(recipe=recipe, seed=4)
    repaired = FT(nesterov=nesterov).defend(Tiny(), bench.defense(images()))
    expected = Tiny()
    step_by_hand(expected, 4, nesterov, 3)
    for name, value in expected.state_dict().items():
        assert torch.allclose(repaired.state_dict()[name].double(), value.double(), atol=1e-6), name
    assert not repaired.training


def test_every_layer_moves_and_the_loss_is_logged() -> None:
    bench = Bench()
    repaired = FT().defend(Tiny(), bench.defense(images()))
    before = state(Tiny())
    assert all(not torch.equal(before[name], value) for name, value in repaired.state_dict().items())
    assert [line.split()[0] for line in bench.lines if line.startswith("loss")] == ["loss", "loss"]
    assert FT().uses_labels
    assert FT().knows == frozenset()


def test_a_resumed_repair_ends_in_the_same_bits() -> None:
    first = Bench()
    whole = state(FT().defend(Tiny(), first.defense(images())))
    snapshot = Memory(first.snapshot.saved[0])
    again = Bench(snapshot=snapshot)
    assert same(state(FT().defend(Tiny(), again.defense(images()))), whole)
    assert len(again.ticks) == 3  # one of two passes


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, {"lr": 0.1, "epochs": 20, "steps": 9}),
        ({"lr": 0.3}, {"lr": 0.3, "epochs": 20, "steps": 9}),
        ({"epochs": 3}, {"lr": 0.1, "epochs": 3, "steps": None}),
        ({"steps": 4}, {"lr": 0.1, "epochs": 20, "steps": 4}),
        ({"epochs": 3, "steps": 4}, {"lr": 0.1, "epochs": 3, "steps": 4}),
    ],
)
def test_a_defense_brings_its_own_settings(given: dict[str, Any], expected: dict[str, Any]) -> None:
    recipe = Recipe(steps=9, batch=32, weight_decay=0.5, milestones=(0.3,))
    adapted = adapt(recipe, nesterov=True, **given)
    assert adapted.params == {**recipe.params, "nesterov": True, **expected}


def test_ft_uses_its_settings() -> None:
    bench = Bench()
    FT(steps=5).defend(Tiny(), bench.defense(images()))
    assert bench.ticks[-1][:2] == (5, 5)


def test_meter_weighs_by_count_and_starts_afresh() -> None:
    lines: list[str] = []
    meter = Meter(lines.append, 10)
    meter.add(8, loss=torch.tensor(1.0))
    assert lines == []
    meter.add(2, loss=torch.tensor(6.0))
    meter.add(10, loss=torch.tensor(math.pi))
    assert lines == ["loss 2.0000", "loss 3.1416"]
