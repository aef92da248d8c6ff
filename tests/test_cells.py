"""Keys, seeds and the clean split: golden values, because stored results hang on them."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from backdoorbench_mcl import cells
from backdoorbench_mcl.errors import UserError


def test_golden_key() -> None:
    spec = {"stage": "train", "recipe": {"lr": 0.1, "milestones": [0.4, 0.6], "steps": None}, "victim_seed": 0}
    assert cells.canonical(spec) == (
        '{"recipe":{"lr":0.1,"milestones":[0.4,0.6],"steps":null},"stage":"train","victim_seed":0}'
    )
    assert cells.key(spec) == "26a8d48ecbe846bd6142dd5180fa3f0e2cd7c11b3acca0f5ee227b26be4598c8"
    assert cells.key(dict(reversed(list(spec.items())))) == cells.key(spec)


def test_golden_seeds() -> None:
    assert cells.seed("order", "ab" * 32, 0) == 7920066757403212942
    assert cells.seed("order", "ab" * 32, 0, 0) == 3330168044737209898
    assert len({cells.seed(r, "h", v, d) for r in ("poison", "init") for v in range(3) for d in (None, 0, 1)}) == 18


def test_key_refuses_nan() -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        cells.key({"lr": math.nan})


@pytest.mark.parametrize(
    ("rate", "count"), [(0.01, 500), (0.05, 2500), (0.1, 5000), (0.15, 7500), (0.2, 10000), (1.0, 50000)]
)
def test_clean_set_sizes_of_cifar(rate: float, count: int) -> None:
    assert len(cells.clean_index(50000, rate, 1)) == count


def test_clean_sets_of_the_paper() -> None:
    assert [len(cells.clean_index(n, 0.05, 1)) for n in (26640, 26000)] == [1332, 1300]


@given(st.integers(20, 500), st.floats(0.05, 1), st.floats(0.05, 1), st.integers(0, 2**62))
def test_clean_sets_are_nested_and_distinct(total: int, a: float, b: float, seed: int) -> None:
    small, large = sorted((a, b))
    inner, outer = cells.clean_index(total, small, seed), cells.clean_index(total, large, seed)
    assert np.array_equal(inner, outer[: len(inner)])
    assert len(np.unique(outer)) == len(outer)
    assert outer.min() >= 0
    assert outer.max() < total


def test_a_rate_that_leaves_nothing_is_refused() -> None:
    with pytest.raises(UserError, match="leaves no image of 100"):
        cells.clean_index(100, 0.001, 0)


def test_excluded_images_are_passed_over_in_the_same_order() -> None:
    everything = cells.clean_index(40, 1.0, 3)
    exclude = np.array([everything[0], everything[2]])
    assert np.array_equal(cells.clean_index(40, 0.1, 3, exclude), everything[[1, 3, 4, 5]])
    with pytest.raises(UserError, match="asks for 40 images, but only 38 of 40 were not poisoned"):
        cells.clean_index(40, 1.0, 3, exclude)


def test_seed_ranges() -> None:
    assert cells.seeds("0-2,7") == [0, 1, 2, 7]
    assert cells.seeds("3") == [3]
    for bad in ("", "a", "1-", "2-1", "1,1", "0-99999", "-1", "0.5"):
        with pytest.raises(UserError):
            cells.seeds(bad)


def test_absurd_numbers_of_seeds_are_refused() -> None:
    """Each range was bounded, not their sum: a few kB of text stood for 10^7 seeds."""
    with pytest.raises(UserError, match="more than 10,000 seeds"):
        cells.seeds(",".join(f"{i}0000-{i}9999" for i in range(1, 1000)))
