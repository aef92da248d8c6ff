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


@pytest.mark.parametrize(
    "text",
    ["{1, 2}", "b'x'", "...", "1j", "{[]: 1}", "{1: 2}", "1e999", "[1e999]", "0x" + "f" * 5000, "-" * 5000 + "1"],
)
def test_what_a_key_cannot_hold_is_text(text: str) -> None:
    """Sets, bytes and infinities ended in a traceback when the key was made of them."""
    assert params.value(text) == text


@pytest.mark.parametrize("value", ["(", ")", "a)", 'it\'s "quoted"', "\\", "\\'\"", "(')'", ["a(b", "'"]])
def test_brackets_and_quotes_in_a_quoted_value_close_nothing(value: Any) -> None:
    assert params.selection(f"x(p={params.typed(value)}, q=1)").params == {"p": value, "q": 1}


def test_absurd_numbers_of_selections_and_values_take_no_time() -> None:
    """Both were compared each with each: 30,000 names, which a command line can hold, took minutes."""
    assert len(params.selections(",".join(f"m{i}" for i in range(30_000)))) == 30_000
    with pytest.raises(UserError, match="30,000 values were given, expected at most 1,000"):
        params.sweep("ft.lr=" + ",".join(map(str, range(30_000))))
