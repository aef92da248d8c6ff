"""The grammar of selections, values and `--set`."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from backdoorbench_mcl import params
from backdoorbench_mcl.errors import UserError


@pytest.mark.parametrize(
    ("text", "name", "suffix", "expected"),
    [
        ("ft", "ft", "", {}),
        ("wrn-16-1", "wrn", "-16-1", {}),
        ("nc-box", "nc-box", "", {}),
        ("mcldef+", "mcldef+", "", {}),
        ("torchvision:resnet50", "torchvision", ":resnet50", {}),
        ("parquet:/data/a, b/c", "parquet", ":/data/a, b/c", {}),
        ("other-dist/mcldef", "other-dist/mcldef", "", {}),
        ("mcldef(temperature=0.1, ce=1)", "mcldef", "", {"temperature": 0.1, "ce": 1}),
        ("mcldef(inverter=nc-box(lr=0.1, lam=1e-3))", "mcldef", "", {"inverter": "nc-box(lr=0.1, lam=1e-3)"}),
        ("ft()", "ft", "", {}),
        ("x(a=true, b=None, c='q,r', d=[1, 2])", "x", "", {"a": True, "b": None, "c": "q,r", "d": [1, 2]}),
    ],
)
def test_one_selection(text: str, name: str, suffix: str, expected: dict[str, Any]) -> None:
    found = params.selection(text)
    assert (found.name, found.suffix, dict(found.params), found.label) == (name, suffix, expected, text)


def test_lists_split_on_top_level_commas_only() -> None:
    found = params.selections("ft, mcldef(a=1,b=(2,3)) ,wrn-16-1")
    assert [s.label for s in found] == ["ft", "mcldef(a=1,b=(2,3))", "wrn-16-1"]


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("mcldef(temperature=0.1", "missing"),
        ("mcldef)", "closes nothing"),
        ("mcldef(temperature)", "parameter=value"),
        ("mcldef(a=1, a=2)", "twice"),
        ("FT", "no method name"),
        ("", "at least one"),
        ("ft,ft", "selected twice"),
        ("../../etc/passwd", "no method name"),
    ],
)
def test_what_is_outside_the_grammar_is_named(text: str, part: str) -> None:
    with pytest.raises(UserError, match=part):
        params.selections(text)


def test_overrides() -> None:
    assert params.overrides(["ft.lr=0.01", "train.epochs=15", "ft.steps=none"]) == {
        "ft": {"lr": 0.01, "steps": None},
        "train": {"epochs": 15},
    }
    for bad in ("ft=1", "ft.lr", ".lr=1", "ft.=1"):
        with pytest.raises(UserError, match=r"expected name\.param=value"):
            params.overrides([bad])


@given(st.text(max_size=60))
def test_any_text_parses_or_is_refused(text: str) -> None:
    with contextlib.suppress(UserError):
        assert all(selection.name for selection in params.selections(text))


@given(
    st.recursive(st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False), st.lists)
)
def test_values_survive_their_own_text(value: Any) -> None:
    assert params.value(repr(value)) == value
