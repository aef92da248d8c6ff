"""Whatever is typed, or written into a file of options, is understood or refused in one line."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from hostile import NASTY, bounded, contained, fuzzed, mutated, nasty_text  # noqa: F401 (bounded: a fixture)
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from backdoorbench_mcl import cells, params, presets
from backdoorbench_mcl.cli import app
from backdoorbench_mcl.errors import BbmclError
from backdoorbench_mcl.text import one_line

LINES = (
    "wrn-16-1", "mcldef(temperature=0.1)", "parquet:PATH", "dist/name(a=[1, 2], b='x')", "ft.lr=0.01",
    "clean-rate=0.1,0.2",
    "mcldef.temperature=0.1,0.5,1", "badnets,blend(alpha=0.2),none", "0-2,7", "a=1, b=(2, 3), c={'d': None}",
)  # fmt: skip
CONFIG = b"""
attacks = "badnets,blend"
defenses = ["ft", "mcldef"]
seeds = "0-2"
clean-rate = 0.05
[set.mcldef]
temperature = 0.1
[sweep]
ft.lr = [0.1, 0.01]
"""
OPTIONS = (
    "attacks",
    "defenses",
    "seeds",
    "clean-rate",
    "set",
    "sweep",
    "dataset",
    "runs",
    "timeout",
    "dry-run",
    "format",
)


def typed_text() -> st.SearchStrategy[str]:
    """Lines as somebody types them, with something nasty in between."""
    return st.lists(
        st.one_of(st.sampled_from(LINES), nasty_text(), st.sampled_from("(),='\"[]{}.:-/ ")), min_size=1, max_size=5
    ).map("".join)


def plain() -> st.SearchStrategy[Any]:
    """Values that a parameter may have."""
    leaf = st.one_of(
        st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False, allow_infinity=False), nasty_text()
    )
    return st.recursive(leaf, lambda inner: st.lists(inner, max_size=3), max_leaves=5)


@fuzzed()
@given(typed_text())
def test_any_selection_is_understood_or_refused(text: str) -> None:
    for parse in (params.selection, params.selections, params.split, params.assignments, params.sweep, params.typed):
        with contained():
            parse(text)
    with contained():
        assert json.dumps(params.value(text), allow_nan=False)  # a parameter goes into a key
    with contained():
        cells.seeds(text)
    with contained():
        params.overrides([text])


@fuzzed()
@given(st.text(alphabet="0123456789-, ", max_size=60))
def test_seeds_are_numbers_and_not_too_many(text: str) -> None:
    with contained():
        assert len(cells.seeds(text)) <= 10_000


@fuzzed()
@given(plain())
def test_what_is_typed_for_a_value_is_read_as_that_value(value: Any) -> None:
    text = params.typed(value)
    assert params.value(text) == value
    assert params.selection(f"x(p={text}, q=1)").params == {"p": value, "q": 1}
    assert params.overrides([f"x.p={text}"]) == {"x": {"p": value}}


@fuzzed()
@given(nasty_text())
def test_a_line_for_the_terminal_has_no_control_character(text: str) -> None:
    line = one_line(text)
    assert line.isprintable()
    assert "\n" not in line
    line.encode()  # no lone surrogates
    assert len(one_line(text, 20)) <= 20


def tables() -> st.SearchStrategy[str]:
    """TOML with the names of options and values of all kinds."""
    value = st.recursive(
        st.one_of(st.integers().map(str), st.sampled_from(["1979-05-27", "inf", "true", "0.1"]),
                  st.text(max_size=8).map(json.dumps),
                  st.sampled_from(["9" * 5000, "0x" + "f" * 5000, "[" * 2000, "{a=" * 2000])),
        lambda inner: st.lists(inner, max_size=3).map(lambda parts: f"[{', '.join(parts)}]")
        | inner.map(lambda part: f"{{a = {part}}}"), max_leaves=4,
    )  # fmt: skip
    line = st.tuples(st.sampled_from([*OPTIONS, "set.mcldef", "sweep.ft.lr", "atacks", "[set]", "[[set]]"]), value).map(
        lambda pair: pair[0] if pair[0].startswith("[") else f"{pair[0]} = {pair[1]}"
    )
    return st.lists(line, max_size=5).map("\n".join)


@fuzzed()
@given(st.one_of(mutated([CONFIG]), tables().map(lambda text: text.encode("utf-8", "replace")), st.binary(max_size=50)))
def test_any_file_of_options_is_read_or_refused(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    file = tmp_path_factory.getbasetemp() / "options.toml"
    file.write_bytes(content)
    with contained():
        for name, value in presets.read_config(file, OPTIONS).items():
            assert name.isidentifier()
            assert isinstance(value, str | int | float | bool | list), value
            assert not isinstance(value, list) or all(isinstance(item, str) for item in value)


@fuzzed(0.25)
@given(st.one_of(mutated([CONFIG]), tables().map(lambda text: text.encode("utf-8", "replace"))))
def test_the_command_takes_any_file_of_options(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    """Up to the point at which something would be computed: an unknown preset is looked at first."""
    file = tmp_path_factory.getbasetemp() / "command.toml"
    file.write_bytes(content)
    arguments = ["matrix", "--config", str(file), "--preset", "none", "--attacks", "badnets", "--defenses", "ft"]
    done = CliRunner().invoke(app, [*arguments, "--runs", str(file.parent / "no-runs")])
    assert done.exit_code != 0
    assert done.exception is None or isinstance(done.exception, SystemExit | BbmclError), done.exception


@pytest.mark.parametrize("text", NASTY)
def test_nasty_text_is_contained_everywhere(text: str) -> None:
    for parse in (params.selection, params.selections, params.value, params.sweep, cells.seeds):
        with contained():
            parse(text)
    assert math.isfinite(len(one_line(text)))
