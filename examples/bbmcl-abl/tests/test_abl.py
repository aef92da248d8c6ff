"""The contract of backdoorbench_mcl, one test per sentence; below it the losses, the isolation and the three phases."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import log_softmax

from backdoorbench_mcl.api import Classifier, DefenseContext, Recipe, UserError
from backdoorbench_mcl.kit import predict
from backdoorbench_mcl.testing import parametrize_with_checks, toys
from bbmcl_abl import method
from bbmcl_abl.method import ABL, global_ascent, local_ascent, losses_of, lowest, phases


@parametrize_with_checks([ABL(lr=0.05)])  # 150 steps in all: the toys learn nothing from 0.1
def test_conformance(check: Callable[[], None]) -> None:
    check()


def test_local_ascent_by_hand() -> None:
    losses = torch.tensor([0.25, 0.5, 1.5, 3.0], requires_grad=True)
    value = local_ascent(losses, 0.5)
    assert value.item() == (-0.25 + 0 + 1.5 + 3.0) / 4  # at gamma itself nothing is asked
    value.backward()
    assert losses.grad is not None and losses.grad.tolist() == [-0.25, 0.0, 0.25, 0.25]


def test_local_ascent_holds_a_loss_at_gamma() -> None:
    for start in (0.01, 4.0):
        loss = torch.tensor([start], requires_grad=True)
        for _ in range(500):
            (gradient,) = torch.autograd.grad(local_ascent(loss, 0.5), loss)
            loss = (loss - 0.01 * gradient).detach().requires_grad_()
        assert loss.item() == pytest.approx(0.5, abs=0.02)


def test_global_ascent_by_hand() -> None:
    rest, isolated = torch.tensor([1.0, 3.0], requires_grad=True), torch.tensor([0.1, 0.2, 0.6], requires_grad=True)
    value = global_ascent(rest, isolated)
    assert value.item() == pytest.approx(2.0 - 0.3)
    value.backward()
    assert rest.grad is not None and rest.grad.tolist() == [0.5, 0.5]
    assert isolated.grad is not None and isolated.grad.tolist() == pytest.approx([-1 / 3] * 3)


@pytest.mark.parametrize(
    ("losses", "share", "expected"),
    [
        ([3.0, 1.0, 2.0, 0.0], 0.5, [1, 3]),
        ([3.0, 1.0, 2.0, 0.0], 0.01, [3]),  # at least one
        ([1.0, 1.0, 1.0, 1.0], 0.5, [0, 1]),
        ([0.0] * 100, 0.29, list(range(29))),  # in binary 0.29 * 100 is 28.999...
    ],
)
def test_the_lowest_losses_are_isolated(losses: list[float], share: float, expected: list[int]) -> None:
    assert lowest(torch.tensor(losses), share).nonzero().flatten().tolist() == expected


def test_losses_are_those_of_a_literal_loop() -> None:
    model, images = toys.victim().train(), toys.make_images(70, 5)
    found = losses_of(model, images)
    assert not model.training
    for i in range(0, 70, 9):
        with torch.no_grad():
            scores = log_softmax(model(images.x[i : i + 1].float() / 255)[0], 0)
        assert found[i].item() == pytest.approx(-scores[images.y[i]].item(), abs=1e-5)


@pytest.mark.parametrize(
    ("total", "turn", "unlearn", "expected"),
    [(100, 0.2, 0.2, (20, 60, 20)), (10, 0.0, 0.0, (1, 9, 0)), (3, 0.5, 0.5, (2, 0, 1)), (1, 0.2, 0.8, (1, 0, 0))],
)
def test_phases(total: int, turn: float, unlearn: float, expected: tuple[int, int, int]) -> None:
    assert phases(total, turn, unlearn) == expected


def run(defense: ABL, recipe: Recipe) -> tuple[Classifier, list[tuple[int, int]], list[str], set[str]]:
    """The network, what was ticked, what was logged, names of the curves."""
    ticks: list[tuple[int, int]] = []
    lines: list[str] = []
    curves: set[str] = set()
    fields: dict[str, Any] = {
        "tick": lambda done, total, images: ticks.append((done, total)), "log": lines.append,
        "record": lambda name, step, value: curves.add(name),
    }  # fmt: skip
    ctx = toys.context(
        DefenseContext, clean=toys.clean_images(labels=False), needs={}, fresh=toys.fresh, recipe=recipe,
        granted=toys.granted(defense.knows, "abl"), **fields,
    )  # fmt: skip
    return defense.defend(toys.victim(), ctx), ticks, lines, curves


@pytest.mark.parametrize(
    ("recipe", "totals"),
    [
        ({"steps": 10}, [10, 30, 10]),
        ({"epochs": 2, "batch": 40}, [20, 60, 20]),  # 5 x 2 epochs of 400 images
    ],
)
def test_the_recipe_says_how_long(recipe: dict[str, Any], totals: list[int]) -> None:
    _, ticks, lines, curves = run(ABL(), Recipe(**{"augment": "none", **recipe}))
    assert [total for done, total in ticks if done == total] == totals
    assert curves == {"loss, isolate", "loss, rest", "loss, unlearn"}
    assert lines[0].startswith("isolated 4 of 400 images")


def fired(net: Classifier) -> float:
    """ASR on the toys, in %."""
    test = toys.make_images(toys.TEST, 2)
    stamped = toys.stamped(test.x[test.y != toys.TARGET])
    return 100 * float((predict(net, stamped) == toys.TARGET).float().mean())


def test_what_is_learnt_first_is_poison_and_can_be_unlearned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stated beforehand: nine of ten isolated images carry the patch, as one in five does by chance, and the ascent
    takes the backdoor away, which is there without it. There is no training in between: it would drive the loss of the
    toys' poison, half of which stays in the rest, to where no gradient is left.
    """
    chosen: list[Tensor] = []

    def spy(losses: Tensor, share: float) -> Tensor:
        chosen.append(lowest(losses, share))
        return chosen[-1]

    monkeypatch.setattr(method, "lowest", spy)
    settings = {"lr": 0.05, "isolation": 0.1, "unlearn_lr": 0.002}
    before, *_ = run(ABL(turn=1.0, unlearn=0.0, times=3.75, **settings), Recipe(steps=16, batch=40, augment="none"))
    after, *_ = run(ABL(turn=0.75, unlearn=0.25, **settings), Recipe(steps=16, batch=40, augment="none"))
    assert torch.equal(chosen[0], chosen[1])
    suspect = toys.suspect_images()
    carrying = (suspect.x == toys.stamped(suspect.x)).flatten(1).all(1)
    assert (int(chosen[0].sum()), int(carrying.sum())) == (40, 80)
    assert int((chosen[0] & carrying).sum()) >= 36
    assert fired(before) > 90
    assert fired(after) < 20
    assert toys.accuracy(after, toys.make_images(toys.TEST, 2)) > 60


def test_shares_that_do_not_fit() -> None:
    with pytest.raises(UserError, match=r"turn=0.7 and unlearn=0.5 were given"):
        ABL(turn=0.7, unlearn=0.5)
