"""Attacks: the stamped pixels by hand, the poison, the refusals."""

from __future__ import annotations

import dataclasses
import hashlib
import math
from typing import Any

import numpy as np
import pytest
import torch
from tiny import Bench, Tiny, generator, images
from torch import Tensor

from backdoorbench_mcl.api import Attack, Images, State, UserError
from bbmcl_attacks.badnets import BadNets, corner_patch
from bbmcl_attacks.blend import Blend, blend_patch, draw_colours, picture
from bbmcl_attacks.dirty_label import CHUNK
from bbmcl_attacks.none import NoAttack
from bbmcl_attacks.trojan import Trojan

TOP = {"top": 0, "left": 0}


def prepared(attack: Attack, train: Images, classes: int = 10, seed: int = 1) -> State:
    ctx = Bench(classes=classes, seed=seed).attack(train)
    return attack.prepare(dataclasses.replace(ctx, needs={name: Tiny(seed=3) for name in attack.needs()}))


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
    state = prepared(Blend(pattern="patch"), flat(0, size=224))
    assert state.tensors["patch"].shape == (3, 21, 21)
    assert (state.meta["top"], state.meta["left"]) == (126, 126)
    assert len(set(state.tensors["patch"][0, :7, :7].flatten().tolist())) == 1
    assert prepared(Blend(), flat(0, size=28)).meta["top"] == 15
    with pytest.raises(UserError, match="lies outside images of 4x4"):
        prepared(Blend(), flat(0, size=4))


def test_large_images_get_the_picture_and_small_ones_the_patch() -> None:
    for size, pattern, expected in ((63, "auto", 3), (64, "auto", 64), (32, "full", 32), (64, "patch", 6)):
        made: dict[str, Any] = {"pattern": pattern}
        patch = prepared(Blend(**made), flat(0, size=size)).tensors["patch"]
        assert (patch.dtype, tuple(patch.shape)) == (torch.uint8, (3, expected, expected))
    oblong = Images(torch.zeros((1, 3, 64, 80), dtype=torch.uint8), torch.zeros(1, dtype=torch.int64))
    assert prepared(Blend(), oblong).tensors["patch"].shape == (3, 64, 80)
    first, other = (prepared(Blend(), flat(0, size=64), seed=seed).tensors["patch"] for seed in (1, 2))
    assert torch.equal(first, other)  # one picture for all victims


def test_picture_is_the_one_of_the_first_release() -> None:
    found = picture(3, 224, 224)
    corners = [[[114, 104, 58], [76, 73, 52], [113, 2, 63]], [[233, 128, 177], [202, 157, 173], [87, 153, 93]]]
    assert found[:2, ::75, ::75].tolist() == corners
    digest = hashlib.sha256(found.numpy().tobytes()).hexdigest()
    assert digest == "6d0a760d5846616eacc19d2da7b3184236b84f6d49747b187195a24078f11500"


def test_picture_is_waves_under_ten_discs() -> None:
    """Recomputed one value at a time from the same words of the generator."""
    bits = np.random.PCG64(20220506)

    def unit() -> float:
        return (int(bits.random_raw()) >> 11) / 2.0**53

    cycles: list[tuple[int, int]] = []
    while len(cycles) < 8:
        pair = (int(7 * unit()), int(7 * unit()))
        if pair != (0, 0):
            cycles.append(pair)
    amplitude = [[0.3 + 0.7 * unit() for _ in range(2)] for _ in range(8)]
    phase = [[2 * math.pi * unit() for _ in range(2)] for _ in range(8)]
    height, width = 12, 20
    sums = [
        [
            [
                sum(
                    amplitude[k][c] * math.cos(2 * math.pi * (fx * j / width + fy * i / height) + phase[k][c])
                    for k, (fx, fy) in enumerate(cycles)
                )
                for j in range(width)
            ]
            for i in range(height)
        ]
        for c in range(2)
    ]
    rows = torch.tensor(sums, dtype=torch.float64)
    low, high = rows.amin((1, 2), keepdim=True), rows.amax((1, 2), keepdim=True)
    expected = 255 * (rows - low) / (high - low)
    for _ in range(10):
        row, column, radius = height * unit(), width * unit(), width * (0.04 + 0.08 * unit())
        colour = [int(256 * unit()) for _ in range(2)]
        for i in range(height):
            for j in range(width):
                if math.hypot(i - row, j - column) <= radius:
                    expected[:, i, j] = torch.tensor(colour, dtype=torch.float64)
    assert torch.equal(picture(2, height, width), (expected + 1e-9).floor().to(torch.uint8))


def test_the_picture_is_mixed_in_everywhere_by_hand() -> None:
    state = State({"patch": torch.tensor([0, 128, 255]).to(torch.uint8).view(3, 1, 1).expand(3, 64, 64)}, TOP)
    x = flat(100, size=64, count=CHUNK + 1)  # more than one chunk
    out = Blend(alpha=0.2).stamp(x.x, x.y, state, generator(0))
    for channel, value in enumerate((80, 105, 131)):  # 80 + 0.2 * 128 = 105.6, truncated
        assert bool((out[:, channel] == value).all())


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


def test_goal_counts_all_but_the_target() -> None:
    goal = BadNets(target=1).goal(torch.tensor([0, 1, 2]), State())
    assert goal.y.tolist() == [1, 1, 1]
    assert goal.counted.tolist() == [True, False, True]


@pytest.mark.parametrize(("cls", "own"), [(BadNets, {}), (Blend, {}), (Trojan, {"steps": 20})])
def test_all_to_all_shifts_every_label_by_one_and_counts_all(cls: type[Attack], own: dict[str, Any]) -> None:
    train = images(100, size=32, classes=4)
    made: dict[str, Any] = {"targets": "all", "rate": 0.4, "target": 9, **own}  # 9 is no class, and plays no part
    attack = cls(**made)
    assert attack.target is None
    state = prepared(attack, train, classes=4)
    assert state.meta["classes"] == 4
    goal = attack.goal(torch.tensor([0, 1, 2, 3]), state)
    assert goal.y.tolist() == [1, 2, 3, 0]
    assert goal.counted.tolist() == [True] * 4
    poison = attack.poison(train, state, generator(0))
    assert poison.y.tolist() == [(y + 1) % 4 for y in train.y[poison.index].tolist()]
    assert set(poison.y.tolist()) == {0, 1, 2, 3}
    assert torch.equal(poison.x, attack.stamp(train.x[poison.index], poison.y, state, generator(0)))
    assert bool((poison.x != train.x[poison.index]).any((1, 2, 3)).all())
    with pytest.raises(UserError, match="needs two classes or more"):
        prepared(attack, train, classes=1)


@pytest.mark.parametrize("attack", [BadNets(), Blend()], ids=["badnets", "blend"])
def test_one_target_keeps_the_state_of_the_first_release(attack: Attack) -> None:
    assert set(prepared(attack, images(4, size=32)).meta) == {"top", "left"}


def test_poison_is_filled_in_chunks_and_not_copied_whole() -> None:
    seen: list[int] = []

    class Counting(BadNets):
        def stamp(self, x: Tensor, y: Tensor, state: State, rng: torch.Generator) -> Tensor:
            seen.append(len(x))
            return super().stamp(x, y, state, rng)

    train = images(3 * CHUNK, size=8)
    attack = Counting(rate=0.5, target=1)
    state = prepared(attack, train)
    poison = attack.poison(train, state, generator(0))
    assert seen == [CHUNK, CHUNK // 2]
    assert torch.equal(poison.x, BadNets().stamp(train.x[poison.index], poison.y, state, generator(0)))
    assert len(Counting(rate=0.0, target=1).poison(train, state, generator(0)).x) == 0


def test_none_poisons_nothing_and_counts_nothing() -> None:
    train = images(10)
    attack = NoAttack(target=3)
    poison = attack.poison(train, prepared(attack, train), generator(0))
    assert (tuple(poison.index.shape), tuple(poison.x.shape), tuple(poison.y.shape)) == ((0,), (0, 3, 8, 8), (0,))
    assert (poison.index.dtype, poison.x.dtype, poison.y.dtype) == (torch.int64, torch.uint8, torch.int64)
    goal = attack.goal(train.y, State())
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
