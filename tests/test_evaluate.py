"""Metrics against literal loops, golden values of the specification and properties that must always hold."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from backdoorbench_mcl.errors import PluginError
from backdoorbench_mcl.evaluate import der, gate, measure, percent, target_class_erased, tied_at_floor
from backdoorbench_mcl.rows import Row

NAMES = ("ba", "ba_nt", "tca", "asr", "ra", "ftr")


def literal(clean: Any, triggered: Any, y: Any, goal: Any, counted: Any) -> dict[str, tuple[int, int]]:
    """Spec 1.1, image by image."""
    out = {name: [0, 0] for name in NAMES}

    def seen(name: str, hit: bool) -> None:
        out[name][0] += hit
        out[name][1] += 1

    for i in range(len(y)):
        seen("ba", clean[i] == y[i])
        if y[i] == goal[i]:
            seen("tca", clean[i] == y[i])
        else:
            seen("ba_nt", clean[i] == y[i])
            seen("ftr", clean[i] == goal[i])
        if counted[i]:
            seen("asr", triggered[i] == goal[i])
            seen("ra", triggered[i] == y[i])
    return {name: (k, n) for name, (k, n) in out.items()}


@st.composite
def predictions(draw: st.DrawFn) -> dict[str, np.ndarray]:
    """A victim of one target, of all targets or of none, seen through predictions as they are stored."""
    n, classes = draw(st.integers(0, 40)), draw(st.integers(2, 5))
    labels = st.lists(st.integers(0, classes - 1), min_size=n, max_size=n)
    stored = draw(st.sampled_from([np.uint8, np.uint16, np.int64]))
    y = np.array(draw(labels), dtype=np.int64)
    kind = draw(st.sampled_from(["target", "all-to-all", "none"]))
    goal = (y + 1) % classes if kind == "all-to-all" else np.full_like(y, draw(st.integers(0, classes - 1)))
    counted = np.zeros(n, dtype=bool) if kind == "none" else y != goal
    guesses = {name: np.array(draw(labels), dtype=stored) for name in ("clean", "triggered")}
    return {**guesses, "y": y, "goal": goal, "counted": counted}


@settings(deadline=None, max_examples=200)
@given(predictions())
def test_every_metric_equals_the_literal_loop(arrays: dict[str, np.ndarray]) -> None:
    found = measure(**arrays)
    for name, (k, n) in literal(**arrays).items():
        assert (found[f"{name}_k"], found[f"{name}_n"]) == (k, n)
        assert type(found[f"{name}_k"]) is int
        assert found[name] == (100 * k / n if n else None)
    assert set(found) == {f"{name}{end}" for name in NAMES for end in ("", "_k", "_n")} <= set(Row.__annotations__)


@settings(deadline=None, max_examples=200)
@given(predictions())
def test_robust_accuracy_and_asr_share_a_hundred_percent(arrays: dict[str, np.ndarray]) -> None:
    found = {name: value or 0 for name, value in measure(**arrays).items()}
    assert found["ra_k"] + found["asr_k"] <= found["asr_n"]
    assert found["ftr_k"] + found["ba_nt_k"] <= found["ba_nt_n"]
    assert found["ba_k"] == found["ba_nt_k"] + found["tca_k"]
    assert found["ba_n"] == found["ba_nt_n"] + found["tca_n"]


def test_checkpoint_of_the_paper() -> None:
    """Spec 1.2: 7471 of 9000 is the stored best_clean_acc, 8968 of 9000 the stored best_bad_acc."""
    y = np.repeat(np.arange(10), 1000)
    goal = np.full_like(y, 5)
    others = np.flatnonzero(y != 5)
    clean, triggered = y.copy(), goal.copy()
    clean[others[7471:]] = (y[others[7471:]] + 1) % 10
    triggered[others[8968:]] = y[others[8968:]]
    found = measure(clean.astype(np.uint8), triggered.astype(np.uint8), y, goal, y != goal)
    assert found["ba_nt"] == pytest.approx(83.0111111, abs=5e-8)
    assert found["asr"] == pytest.approx(99.6444444, abs=5e-8)
    assert (found["ba_n"], found["asr_n"], found["tca"]) == (10000, 9000, 100.0)


def test_an_attack_may_not_count_images_that_already_show_its_goal() -> None:
    y = np.array([0, 1])
    with pytest.raises(PluginError, match="1 test images whose goal is their own label"):
        measure(y, y, y, np.array([1, 1]), np.array([True, True]))


@pytest.mark.parametrize(
    ("name", "bad"),
    [("clean", np.zeros(3)), ("triggered", np.zeros(2, dtype=int)), ("goal", np.zeros((3, 1), dtype=int))],
)
def test_misfits_are_refused(name: str, bad: np.ndarray) -> None:
    y = np.zeros(3, dtype=np.int64)
    arrays = {"clean": y, "triggered": y, "y": y, "goal": y + 1, "counted": y == 0, name: bad}
    with pytest.raises(ValueError, match=f"{name}: expected integer labels"):
        measure(**arrays)
    with pytest.raises(ValueError, match="counted: expected bool"):
        measure(y, y, y, y + 1, y)


def test_stored_bytes_do_not_wrap() -> None:
    """uint8 predictions against int64 labels beyond 255 are different classes, not equal modulo 256."""
    y = np.array([256, 257])
    assert measure(np.array([0, 1], dtype=np.uint8), np.array([0, 1], dtype=np.uint8), y, y * 0, y > 0)["ba_k"] == 0


def test_der_of_the_specification() -> None:
    assert der(99.64, 2.22, 83.01, 82.19) == pytest.approx(98.30)
    assert der(50.0, 50.0, 80.0, 80.0) == 50.0
    assert der(50.0, 60.0, 80.0, 90.0) == 50.0  # neither a higher ASR nor a gain in BA counts
    assert der(None, 2.0, 80.0, 80.0) is None
    assert der(99.0, 2.0, 80.0, None) is None


@given(*[st.floats(0, 100)] * 4)
def test_der_stays_between_0_and_100(a: float, b: float, c: float, d: float) -> None:
    value = der(a, b, c, d)
    assert value is not None
    assert 0 <= value <= 100


@pytest.mark.parametrize(
    ("asr", "expected"),
    [(100.0, "ok"), (95.0, "ok"), (94.99, "flagged"), (90.0, "flagged"), (89.99, "weak"), (0.0, "weak"), (None, "")],
)
def test_gate(asr: float | None, expected: str) -> None:
    assert gate(asr) == expected


@pytest.mark.parametrize(
    ("asr", "ba", "expected"),
    [(82.0, 83.0, "ok"), (76.0, 83.0, "flagged"), (70.0, 83.0, "weak"), (90.0, 80.0, "ok"), (5.0, 0.0, "weak")],
)
def test_all_to_all_is_gated_by_what_the_victim_can_reach(asr: float, ba: float, expected: str) -> None:
    assert gate(asr, ba) == expected


@pytest.mark.parametrize(
    ("asr", "ftr", "expected"), [(92.9, 92.9, "weak"), (100.0, 51.0, "weak"), (100.0, 50.0, "ok"), (99.0, 3.0, "ok")]
)
def test_a_victim_that_says_the_target_anyway_has_no_backdoor(asr: float, ftr: float, expected: str) -> None:
    """Seen on 160 steps of a ResNet-18: ASR 92.89, FTR 92.89, BA 14, and the gate let it pass."""
    assert gate(asr, ftr=ftr) == expected


def row(asr: tuple[int, int] | None, ftr: tuple[int, int] | None) -> Row:
    (a, an), (f, fn) = asr or (0, 0), ftr or (0, 0)
    return Row(
        key="k", dataset="d", model="m", attack="a", defense="x", victim_seed=0, defense_seed=0, clean_rate=0.05,
        state="ok", asr=percent(a, an), asr_k=a, asr_n=an, ftr=percent(f, fn), ftr_k=f, ftr_n=fn,
    )  # fmt: skip


def test_floor_is_pooled_over_runs_and_exact() -> None:
    assert tied_at_floor(row((20, 900), (20, 900)))
    assert not tied_at_floor(row((21, 900), (20, 900)))
    assert tied_at_floor(row((1, 3), (2, 6)))  # the same share, other counts
    assert tied_at_floor(row((30, 900), (20, 900)), row((10, 900), (20, 900)))
    assert not tied_at_floor(row(None, (20, 900)))
    assert not tied_at_floor()
    assert tied_at_floor(replace(row((2, 900), (20, 900)), asr_k=None))  # percentages serve where counts are missing
    assert not tied_at_floor(replace(row((30, 900), (20, 900)), asr_k=None))


def test_target_class_erased_below_a_tenth() -> None:
    assert target_class_erased(4.4, 44.5)
    assert not target_class_erased(4.5, 44.5)
    assert not target_class_erased(0.0, 0.0)
    assert not target_class_erased(None, 44.5)
    assert not target_class_erased(0.0, None)
