"""Attacks: the stamped pixels by hand, the poison, the refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import Bench, generator, images
from torch import Tensor

from backdoorbench_mcl.api import Attack, Images, State, UserError
from bbmcl_attacks.badnets import BadNets, corner_patch
from bbmcl_attacks.blend import Blend, blend_patch, draw_colours
from bbmcl_attacks.dirty_label import poison_count
from bbmcl_attacks.none import NoAttack


def prepared(attack: Attack, train: Images, classes: int = 10, seed: int = 1) -> State:
    return attack.prepare(Bench(classes=classes, seed=seed).attack(train))


def stamped(attack: Attack, train: Images) -> Tensor:
    return attack.stamp(train.x, train.y, prepared(attack, train), generator(0))


def flat(value: int, size: int = 32, count: int = 2) -> Images:
    return Images(torch.full((count, 3, size, size), value, dtype=torch.uint8), torch.zeros(count, dtype=torch.int64))


def test_badnets_pixels_by_hand() -> None:
    out = stamped(BadNets(), flat(77))
    assert out.dtype == torch.uint8
    for image in out:
        for channel in image:
            assert channel[29].tolist() == [77] * 29 + [0, 0, 255]
            assert channel[30].tolist() == [77] * 29 + [0, 255, 0]
            assert channel[31].tolist() == [77] * 29 + [255, 0, 255]
            assert (channel[:29] == 77).all()


def test_badnets_golden_sum_and_checkerboard() -> None:
    assert int(corner_patch(3).sum()) == 1020
    board = corner_patch(32)
    assert board[:2, :4].tolist() == [[255, 0, 255, 0], [0, 255, 0, 255]]
    assert int(board.long().sum()) == 512 * 255
    out = stamped(BadNets(size=32, margin=11), flat(9, size=224, count=1))
    assert torch.equal(out[0, 1, 181:213, 181:213], board)  # the rows and columns of the authors' code
    assert int((out != 9).sum()) == 3 * 32 * 32


def test_badnets_margin_moves_the_patch() -> None:
    out = stamped(BadNets(margin=4), flat(9, count=1))
    assert out[0, 0, 25:28, 25:28].tolist() == [[0, 0, 255], [0, 255, 0], [255, 0, 255]]
    assert (out[0, 0, 28:] == 9).all()


def test_blend_grey_pixels_by_hand() -> None:
    out = stamped(Blend(colours="grey", alpha=0.2), flat(100))
    bright, dark = 131, 105  # 0.8*100 + 0.2*255 = 131; 0.8*100 + 0.2*128 = 105.6, truncated
    expected = [[bright, dark, bright], [dark, bright, dark], [bright, dark, dark]]
    for image in out:
        for channel in image:
            assert channel[18:21, 18:21].tolist() == expected
            assert int((channel != 100).sum()) == 9


def test_blend_draws_its_colours_once_from_the_generator() -> None:
    train = flat(0)
    first, again, other = (prepared(Blend(), train, seed=seed).tensors["patch"] for seed in (1, 1, 2))
    assert first.shape == (3, 3, 3)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert not torch.equal(first[0], first[1])  # colour, not grey
    assert len(set(draw_colours("random", 3, generator(5)).flatten().tolist())) > 15


def test_blend_grows_with_the_image_and_stays_inside() -> None:
    state = prepared(Blend(), flat(0, size=224))
    assert state.tensors["patch"].shape == (3, 21, 21)
    assert (state.meta["top"], state.meta["left"]) == (126, 126)
    assert len(set(state.tensors["patch"][0, :7, :7].flatten().tolist())) == 1
    assert prepared(Blend(), flat(0, size=28)).meta["top"] == 15
    with pytest.raises(UserError, match="lies outside images of 4x4"):
        prepared(Blend(), flat(0, size=4))


@pytest.mark.parametrize("percent", [0, 1, 10, 20, 55, 99, 100])
def test_blend_truncates_the_exact_value_of_every_pair(percent: int) -> None:
    x = torch.arange(256).view(1, 1, 256, 1).expand(1, 1, 256, 256)
    colour = torch.arange(256).view(1, 1, 256).expand(1, 256, 256)
    out = blend_patch(x.to(torch.uint8), colour.to(torch.uint8), 0, 0, percent / 100)
    assert torch.equal(out.long(), ((100 - percent) * x + percent * colour) // 100)


@pytest.mark.parametrize("attack", [BadNets(), Blend(), NoAttack()], ids=["badnets", "blend", "none"])
def test_stamping_leaves_the_input_alone_and_repeats(attack: Attack) -> None:
    train = images(6, size=32)
    before = train.x.clone()
    state = prepared(attack, train)
    first = attack.stamp(train.x, train.y, state, generator(0))
    second = attack.stamp(train.x, train.y, state, generator(9))
    assert torch.equal(train.x, before)
    assert first.data_ptr() != train.x.data_ptr()
    assert torch.equal(first, second)
    assert torch.equal(first, train.x) == (attack.name == "none")


@pytest.mark.parametrize("attack", [BadNets(rate=0.29, target=2), Blend(rate=0.29, target=2)], ids=["badnets", "blend"])
def test_poison_count_indices_labels_pixels(attack: Attack) -> None:
    train = images(100, size=32, classes=4)
    state = prepared(attack, train, classes=4)
    poison = attack.poison(train, state, generator(3))
    assert len(poison.index) == 29  # not 28, which 0.29 * 100 gives in binary
    assert len(set(poison.index.tolist())) == 29
    assert set(train.y[poison.index].tolist()) == {0, 1, 2, 3}  # the target's own class too
    assert poison.y.tolist() == [2] * 29
    assert torch.equal(poison.x, attack.stamp(train.x[poison.index], train.y[poison.index], state, generator(0)))
    again = attack.poison(train, state, generator(3))
    assert torch.equal(poison.index, again.index)
    assert torch.equal(poison.x, again.x)
    assert not torch.equal(poison.index, attack.poison(train, state, generator(4)).index)


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 1000), st.integers(0, 60000))
def test_poison_count_is_the_floor_of_the_typed_decimal(permille: int, total: int) -> None:
    assert poison_count(permille / 1000, total) == permille * total // 1000


@pytest.mark.parametrize(("total", "count"), [(50000, 5000), (26640, 2664), (26000, 2600)])
def test_poison_counts_of_the_paper(total: int, count: int) -> None:
    assert poison_count(0.1, total) == count


def test_goal_counts_all_but_the_target() -> None:
    goal = BadNets(target=1).goal(torch.tensor([0, 1, 2]))
    assert goal.y.tolist() == [1, 1, 1]
    assert goal.counted.tolist() == [True, False, True]


def test_none_poisons_nothing_and_counts_nothing() -> None:
    train = images(10)
    attack = NoAttack(target=3)
    poison = attack.poison(train, prepared(attack, train), generator(0))
    assert (tuple(poison.index.shape), tuple(poison.x.shape), tuple(poison.y.shape)) == ((0,), (0, 3, 8, 8), (0,))
    assert (poison.index.dtype, poison.x.dtype, poison.y.dtype) == (torch.int64, torch.uint8, torch.int64)
    goal = attack.goal(train.y)
    assert set(goal.y.tolist()) == {3}
    assert goal.counted.dtype == torch.bool
    assert not goal.counted.any()


@pytest.mark.parametrize("cls", [BadNets, Blend, NoAttack])
def test_a_target_outside_the_classes_is_refused(cls: type[Attack]) -> None:
    made: dict[str, Any] = {"target": 4}
    prepared(cls(**made), images(size=32), classes=5)
    with pytest.raises(UserError, match=r"target=4 is not a class of this data set; expected 0\.\.3"):
        prepared(cls(**made), images(size=32), classes=4)


def test_a_patch_that_does_not_fit_is_refused() -> None:
    with pytest.raises(UserError, match="9x9 trigger at row -1"):
        prepared(BadNets(size=9), images(size=8))
    prepared(BadNets(size=8), images(size=8))


@pytest.mark.parametrize(
    ("cls", "given"),
    [(BadNets, {"rate": 1.5}), (BadNets, {"margin": -1}), (BadNets, {"size": 0}), (Blend, {"colours": "blue"})],
)
def test_values_outside_the_bounds_are_refused(cls: type[Attack], given: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=next(iter(given))):
        cls(**given)
