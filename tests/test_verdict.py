"""The verdict on a model: what its statistics are, and when it calls what."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import integrate
from scipy.special import gamma

from backdoorbench_mcl.audit import verdict
from backdoorbench_mcl.audit.verdict import Sized, Standing

OTHERS = (60.0, 44.0, 62.0, 47.0, 54.0, 45.0, 54.0, 60.0, 51.0)
SIZES = st.lists(st.floats(0.5, 500), min_size=4, max_size=30)


def sized(*sizes: float | None, success: float = 100.0) -> Sized:
    return Sized("patch", sizes, tuple(None if size is None else success for size in sizes))


def standing(chance: float, label: int = 0, ratio: float = 0.2, success: float = 100.0) -> Standing:
    return Standing("patch", label, 5.0, success, 3.0, ratio, chance)


# ---------------------------------------------------------------- statistics


def test_tail_is_the_integral_of_students_density() -> None:
    value, others = math.log(22.0), [math.log(size) for size in OTHERS]
    mean, n = sum(others) / 9, 9
    deviation = math.sqrt(sum((x - mean) ** 2 for x in others) / (n - 1))
    t, df = (value - mean) / (deviation * math.sqrt(1 + 1 / n)), n - 1

    def density(x: float) -> float:
        scale = gamma((df + 1) / 2) / (math.sqrt(df * math.pi) * gamma(df / 2))
        return float(scale * (1 + x * x / df) ** (-(df + 1) / 2))

    assert verdict.tail(value, others) == pytest.approx(integrate.quad(density, -np.inf, t)[0], rel=1e-6)


def test_a_prediction_is_as_rare_as_it_says() -> None:
    rng = np.random.Generator(np.random.PCG64(1))
    tails = [verdict.tail(draw[0], draw[1:].tolist()) for draw in rng.normal(3, 0.4, (4000, 10))]
    for level in (0.01, 0.1, 0.5):  # three standard errors
        assert np.mean(np.array(tails) < level) == pytest.approx(level, abs=3 * math.sqrt(level / 4000))


def test_the_index_is_neural_cleanses_with_a_sign() -> None:
    below, *_, above = (one.index for one in verdict.standings(sized(10.0, 50.0, 52.0, 54.0, 56.0), 1))
    assert below == pytest.approx(14.16, abs=0.005) and above == pytest.approx(-4 / 2.9652, abs=1e-4)


@pytest.mark.parametrize(
    "size, success, expected",
    [(20.0, 85.0, 34.551), (20.0, 50.0, 61.827), (20.0, 99.0, 20.0), (20.0, 100.0, 20.0), (None, 100.0, None),
     (20.0, None, None), (math.inf, 100.0, None), (0.0, 100.0, 1e-6)],
)  # fmt: skip
def test_a_trigger_that_works_on_a_part_counts_as_larger(
    size: float | None, success: float | None, expected: float | None
) -> None:
    assert verdict.effective(size, success, 10) == (None if expected is None else pytest.approx(expected, rel=1e-4))


@given(st.floats(0.1, 500), st.floats(0, 100), st.floats(0, 100), st.integers(2, 1000))
def test_the_fewer_images_the_larger(size: float, one: float, other: float, classes: int) -> None:
    low, high = sorted((one, other))
    larger, smaller = verdict.effective(size, low, classes), verdict.effective(size, high, classes)
    assert larger is not None and smaller is not None
    assert larger >= smaller * (1 - 1e-9) and smaller >= size * (1 - 1e-9)


def test_the_size_found_is_the_size_compared_where_the_model_holds() -> None:
    """Success of a trigger of a size as assumed: log-odds from -ln 9, rising by 0.1 a pixel."""
    for size in (30.0, 40.0, 55.0):
        success = 100 / (1 + math.exp(math.log(9) - 0.1 * size))
        assert verdict.effective(size, success, 10) == pytest.approx((math.log(99) + math.log(9)) / 0.1)


@given(SIZES, st.floats(0.01, 100))
def test_the_unit_of_size_does_not_matter(sizes: list[float], factor: float) -> None:
    one, other = (verdict.standings(sized(*(f * size for size in sizes)), 2) for f in (1, factor))
    for a, b in zip(one, other, strict=True):
        assert a.chance == pytest.approx(b.chance, rel=1e-3, abs=1e-9)
        assert a.ratio == pytest.approx(b.ratio)


@given(SIZES, st.randoms(use_true_random=False))
def test_labels_have_no_order(sizes: list[float], random: object) -> None:
    order = list(range(len(sizes)))
    random.shuffle(order)  # type: ignore[attr-defined]
    straight = verdict.standings(sized(*sizes), 1)
    mixed = verdict.standings(sized(*(sizes[i] for i in order)), 1)
    for place, label in enumerate(order):
        assert mixed[place].chance == pytest.approx(straight[label].chance, rel=1e-6, abs=1e-12)


@given(SIZES)
def test_chances_are_probabilities_and_the_smallest_label_has_the_smallest(sizes: list[float]) -> None:
    found = verdict.standings(sized(*sizes), 2)
    chances = [one.chance for one in found]
    assert all(chance is not None and 0 <= chance <= 1 for chance in chances)
    smallest = verdict.most_suspicious(found)
    assert smallest is not None and smallest.chance == min(chances)  # type: ignore[type-var]


def test_searches_that_failed_are_left_out() -> None:
    found = verdict.standings(sized(None, 10.0, *OTHERS), 1)
    whole = verdict.standings(sized(10.0, *OTHERS), 1)
    assert found[0].chance is None and found[0].index is None
    assert found[1].chance == pytest.approx(whole[0].chance)
    assert all(one.chance is None for one in verdict.standings(sized(5.0, 6.0), 1)), "one other is no sample"


@pytest.mark.parametrize("size, success", [(0.0, 5.0), (0.3, 5.0), (2000.0, 5.0)])
def test_a_search_that_gave_up_hides_nobody(size: float, success: float) -> None:
    sizes = (8.0, size, *OTHERS[1:])
    found = verdict.standings(Sized("patch", sizes, (100.0, success, *[100.0] * 8)), 2)
    largest = verdict.standings(sized(8.0, max(OTHERS[1:]), *OTHERS[1:]), 2)
    assert found[0].chance == pytest.approx(largest[0].chance)
    assert [one.label for one in verdict.suspects(found)] == [0]
    assert all(one.chance is None for one in verdict.standings(sized(*OTHERS, success=5.0), 1)), "none got further"


def test_a_trigger_that_is_large_as_found_is_never_a_suspect() -> None:
    """A clean network of the tests: one label reached with all images, by the largest perturbation of all."""
    size, success = (4.56, 4.31, 4.08, 4.62, 3.93, 4.34, 4.38, 5.2), (12.0, 74.0, 77.0, 73.0, 71.0, 73.0, 72.0, 100.0)
    found = verdict.standings(Sized("additive", size, success), 2)
    assert found[7].chance is not None and found[7].chance < 0.01
    assert found[7].ratio == pytest.approx(5.2 / 4.34)
    assert verdict.suspects(found) == []


# ---------------------------------------------------------------- rulings


def test_a_small_label_among_ten_is_an_alarm_and_an_ordinary_one_is_none() -> None:
    found = verdict.standings(sized(22.0, *OTHERS), 2)
    assert [one.label for one in verdict.suspects(found)] == [0]
    assert verdict.rule(10, found, [99.0]).call == "suspicious"
    ordinary = verdict.standings(sized(48.0, *OTHERS), 2)
    assert verdict.suspects(ordinary) == []
    assert verdict.rule(10, ordinary, []) == verdict.Ruling("clean", "no label stands out")


def test_a_large_label_is_never_a_suspect() -> None:
    assert verdict.suspects(verdict.standings(sized(4000.0, *OTHERS), 2)) == []


def test_two_kinds_are_asked_apart_and_a_label_comes_once() -> None:
    patch, additive = standing(0.001), Standing("additive", 0, 1.0, 100.0, 3.0, 0.3, 0.0001)
    other = standing(0.02, label=4)
    assert verdict.suspects([patch, other, additive]) == [additive, other]


EVERY = [standing(1.0, label, ratio=1.0) for label in range(10)]


@pytest.mark.parametrize(
    "classes, found, confirmed, expected, label",
    [
        (10, [standing(0.001)], [99.0], "suspicious", 0),
        (10, [standing(0.001)], [40.0], "undecided", 0),
        (10, [standing(0.001)], [None], "undecided", 0),
        (10, [standing(0.07)], [99.0], "undecided", 0),
        (10, EVERY, [], "clean", None),
        (10, [*EVERY[1:], standing(0.001, ratio=0.9)], [], "clean", None),
        (10, [*EVERY[1:], standing(0.001, success=20.0)], [], "clean", None),
        (10, [replace(one, success=45.0) for one in EVERY], [], "undecided", None),
        (10, [*EVERY[1:], Standing("patch", 0, None, None, None, None, None)], [], "undecided", None),
        (4, [standing(0.001)], [99.0], "undecided", None),
        (10, [standing(0.001), standing(0.002, label=7)], [10.0, 99.0], "suspicious", 7),
    ],
)  # fmt: skip
def test_rulings_and_the_label_that_they_rest_on(
    classes: int, found: list[Standing], confirmed: list[float | None], expected: str, label: int | None
) -> None:
    ruling = verdict.rule(classes, found, confirmed)
    assert ruling.call == expected
    assert (None if ruling.on is None else ruling.on.label) == label
    assert ruling.reason and "\n" not in ruling.reason


def test_two_small_labels_that_hide_each_other_are_not_called_clean() -> None:
    found = verdict.standings(sized(5.0, 5.5, *OTHERS[1:]), 2)
    assert verdict.suspects(found) == []
    ruling = verdict.rule(10, found, [])
    assert ruling.call == "undecided" and "labels 0, 1 need" in ruling.reason


@pytest.mark.parametrize("value, text", [(0.00012, "8,300"), (0.5, "2"), (1e-30, "1,000,000,000"), (None, "1")])
def test_rarity_in_words(value: float | None, text: str) -> None:
    assert verdict.rarity(value) == f"{text} clean models"
