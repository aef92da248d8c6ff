"""SIG: golden waves, pixels by hand, which images are poisoned and which labels they keep."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import Bench, generator, images
from torch import Tensor

from backdoorbench_mcl.api import Attack, Images, State, UserError
from bbmcl_attacks.clean_label import clean_label_count
from bbmcl_attacks.sig import Sig, mix_mask, rounded, sinusoid, wrapped_mask


def prepared(attack: Attack, train: Images, classes: int = 10) -> State:
    return attack.prepare(Bench(classes=classes).attack(train))


def flat(value: int, size: int = 32) -> Images:
    return Images(torch.full((2, 3, size, size), value, dtype=torch.uint8), torch.full((2,), 5))


def stamped(attack: Attack, train: Images) -> Tensor:
    return attack.stamp(train.x, train.y, prepared(attack, train), generator(0))


def one_row(out: Tensor) -> list[int]:
    """The first row, after a look whether all rows, channels and images are equal."""
    assert out.dtype == torch.uint8
    assert bool((out == out[:1, :1, :1]).all())
    row: list[int] = out[0, 0, 0].tolist()
    return row


def test_golden_sinusoid() -> None:
    found = sinusoid(32, 20.0, 6.0)[:9].tolist()
    assert found == pytest.approx([0, 18.478, 14.142, -7.654, -20, -7.654, 14.142, 18.478, 0], abs=5e-4)


def test_golden_wrapped_mask() -> None:
    mask = wrapped_mask(32, 20.0).tolist()
    assert mask[:12] == [0, 14, 19, 13, 255, 241, 237, 244, 2, 15, 19, 11]
    assert mask == [math.trunc(20 * math.sin(0.8 * j)) % 256 for j in range(32)]


def test_clean_pixels_by_hand() -> None:
    middle = one_row(stamped(Sig(), flat(100)))
    assert middle[:8] == [100, 118, 114, 92, 80, 92, 114, 118]
    assert middle[8:16] == [100, 82, 86, 108, 120, 108, 86, 82]
    assert middle[16:] == middle[:16]
    assert one_row(stamped(Sig(), flat(10)))[:8] == [10, 28, 24, 2, 0, 2, 24, 28]
    assert one_row(stamped(Sig(), flat(250)))[8:16] == [250, 232, 236, 255, 255, 255, 236, 232]


def test_wrapped_pixels_by_hand() -> None:
    # 0.8 * 100 + 0.2 * (0, 14, 19, 13, 255, 241, 237, 244) = 80, 82.8, 83.8, 82.6, 131, 128.2, 127.4, 128.8
    assert one_row(stamped(Sig(form="wrapped"), flat(100)))[:8] == [80, 82, 83, 82, 131, 128, 127, 128]
    assert one_row(stamped(Sig(form="wrapped"), flat(255)))[:5] == [204, 206, 207, 206, 255]


def test_both_forms_keep_their_cycles_on_other_widths() -> None:
    for attack in (Sig(delta=100), Sig(form="wrapped", delta=100)):
        small, large = (one_row(stamped(attack, flat(128, size))) for size in (32, 128))
        assert large[::4] == small
    assert one_row(stamped(Sig(frequency=2.0), flat(100, 16)))[:8] == [100, 114, 120, 114, 100, 86, 80, 86]


def test_all_pixel_values_are_mixed_without_rounding_errors() -> None:
    x = torch.arange(256).to(torch.uint8).view(1, 1, 256, 1).expand(1, 1, 256, 256)
    mask = torch.arange(256, dtype=torch.int16)
    assert torch.equal(mix_mask(x, mask).long()[0, 0], (8 * torch.arange(256)[:, None] + 2 * torch.arange(256)) // 10)


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 255), st.floats(-255, 255))
def test_rounding_the_wave_rounds_the_sum(pixel: int, v: float) -> None:
    whole = pixel + int(rounded(torch.tensor([v], dtype=torch.float64)))
    assert abs(whole - (pixel + v)) <= 0.5 + 2e-9


def test_halves_go_upwards_although_the_sine_is_inexact() -> None:
    wave = 5 * torch.sin(torch.tensor([math.pi / 6, -math.pi / 6], dtype=torch.float64))
    assert float(wave[0]) < 2.5  # 2.4999999999999996
    assert rounded(wave).tolist() == [3, -2]


@pytest.mark.parametrize(("total", "per_class", "expected"), [(50000, 5000, (4000, 4000)), (26640, 1260, (2131, 1260))])
def test_counts_of_the_paper_and_the_cap(total: int, per_class: int, expected: tuple[int, int]) -> None:
    y = torch.ones(total, dtype=torch.int64)
    y[:per_class] = 5
    train = Images(torch.zeros((1, 1, 1, 1), dtype=torch.uint8).expand(total, 1, 1, 1), y)
    assert clean_label_count(0.08, train, 5) == expected
    state = prepared(Sig(), train)
    assert (state.meta["wanted"], state.meta["poisoned"]) == expected
    poison = Sig().poison(train, state, generator(0))
    assert len(poison.index.unique()) == len(poison.index) == expected[1]
    assert set(train.y[poison.index].tolist()) == {5}


def test_poison_is_the_stamped_target_class_with_its_labels() -> None:
    train = images(100, size=32, classes=4)
    attack = Sig(rate=0.1, target=2)
    state = prepared(attack, train, classes=4)
    poison = attack.poison(train, state, generator(3))
    assert len(poison.index) == 10
    assert poison.y.tolist() == [2] * 10
    assert torch.equal(train.y[poison.index], poison.y)
    assert torch.equal(poison.x, attack.stamp(train.x[poison.index], poison.y, state, generator(9)))
    again, other = (attack.poison(train, state, generator(seed)) for seed in (3, 4))
    assert torch.equal(poison.index, again.index)
    assert torch.equal(poison.x, again.x)
    assert not torch.equal(poison.index, other.index)
    goal = attack.goal(torch.tensor([1, 2]), state)
    assert goal.y.tolist() == [2, 2]
    assert goal.counted.tolist() == [True, False]


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"form": "wrapped", "frequency": 3.0}, "leave one of them out"),
        ({"delta": 0.0}, "delta"),
        ({"frequency": 0.0}, "frequency"),
    ],
)
def test_values_without_a_meaning_are_refused(given: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        Sig(**given)


def test_targets_without_images_are_refused() -> None:
    with pytest.raises(UserError, match="target=4 is not a class"):
        prepared(Sig(target=4), images(classes=4), classes=4)
    with pytest.raises(UserError, match="no training image has the target label 4"):
        prepared(Sig(target=4), images(classes=4), classes=5)
    assert prepared(Sig(target=4, rate=0.0), images(classes=4), classes=5).meta["poisoned"] == 0
