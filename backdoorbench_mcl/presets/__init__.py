"""Presets say what is done, budgets how much (design 3.7): one TOML file each, only what differs. Free of torch."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Collection, Mapping
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from ..errors import UserError
from ..params import plain, typed
from ..plainfiles import read_plain
from ..text import one_line

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PresetName = Literal["paper", "authors", "clean"]
BudgetName = Literal["full", "mid", "quick"]
PRESETS: tuple[PresetName, ...] = ("paper", "authors", "clean")
BUDGETS: tuple[BudgetName, ...] = ("full", "mid", "quick")
Settings = dict[str, dict[str, Any]]
MOST_CONFIG = 1 << 20  # bytes of a file of options
_PARAMETER = {"set": "set_", "format": "fmt"}  # options whose names Python keeps for itself


def read(name: str) -> dict[str, Any]:
    """A TOML file of this package, without its ending."""
    return tomllib.loads(resources.files(__package__).joinpath(f"{name}.toml").read_text())


def _merge(into: Settings, tables: Mapping[str, Any]) -> None:
    for method, params in tables.items():
        if isinstance(params, Mapping) and method != "data":
            into.setdefault(method, {}).update(params)


def settings(preset: PresetName, budget: BudgetName, dataset: str) -> Settings:
    """Parameters by method name (`train`, `defend`: the recipes) from base, preset, their tables for the data set (what
    holds for the data set beats what a preset says of all), budget.

    Example: `settings("paper", "mid", "cifar10")["train"]["epochs"]` is 15.
    """
    out: Settings = {}
    own = read(preset)
    parts = ([read(own["base"])] if "base" in own else []) + [own]
    for part in parts:
        _merge(out, part)
    for part in parts:
        _merge(out, part.get("data", {}).get(dataset, {}))
    _merge(out, read("budgets")[budget])
    return out


def read_config(file: Path, known: Collection[str]) -> dict[str, Any]:
    """Options of `--config FILE.toml` by parameter name: `attacks = "badnets"`, `seeds = "0-2"`, and for `--set` either
    a list or tables, `[set.mcldef]` with `temperature = 0.1`; for `--sweep` likewise, with lists of values. known: the
    options' names, with hyphens.

    Raises UserError for a file that cannot be read, a key that is no option, or a value of no use.
    """
    try:
        found = tomllib.loads(read_plain(file, MOST_CONFIG).decode())
    except OSError as error:
        raise UserError(f"--config {file}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:  # of TOML, of UTF-8, or a number of thousands of digits
        raise UserError(one_line(f"--config {file} is no TOML: {error}", 400)) from error
    out: dict[str, Any] = {}
    for key, value in found.items():
        name = key.replace("_", "-")
        if name not in known:
            close = difflib.get_close_matches(name, known, 1)
            hint = f"did you mean {close[0]!r}?" if close else "see: bbmcl matrix --help"
            raise UserError(f"--config {file}: unknown option {key[:80]!r}; {hint}")
        if name in ("set", "sweep"):
            out[_PARAMETER.get(name, name)] = _lines(file, name, value)
        elif isinstance(value, list) and all(map(_scalar, value)):
            out[_PARAMETER.get(name, name.replace("-", "_"))] = ",".join(map(str, value))
        elif _scalar(value):
            out[_PARAMETER.get(name, name.replace("-", "_"))] = value
        else:
            raise UserError(
                f"--config {file}: {key} is {_kind(value)}, expected text, a number, true or false, or a list"
            )
    return out


def _lines(file: Path, name: str, value: Any) -> list[str]:
    """What `--set` or `--sweep` would be given: lines as they are, or made of tables."""
    if isinstance(value, str):
        value = [value]
    if isinstance(value, list) and all(isinstance(line, str) for line in value):
        return value
    tables = value.items() if isinstance(value, Mapping) else ()
    out = []
    for method, table in tables:
        for parameter, given in table.items() if isinstance(table, Mapping) else ():
            values = given if name == "sweep" and isinstance(given, list) else [given]
            if not all(map(plain, values)):
                raise UserError(
                    f"--config {file}: {name}.{method}.{parameter} holds a date, an infinity or an endless number; "
                    "expected text, numbers, true, false, or lists of such"
                )
            out.append(f"{method}.{parameter}={','.join(map(typed, values))}")
    if not isinstance(value, Mapping) or not all(isinstance(table, Mapping) for table in value.values()):
        raise UserError(
            f"--config {file}: {name} is {_kind(value)}, expected lines, as in {name} = ['mcldef.temperature=0.1'], or "
            f"tables, as in [{name}.mcldef]"
        )
    return out


def _scalar(value: Any) -> bool:
    return plain(value) and not isinstance(value, list | Mapping)


def _kind(value: Any) -> str:
    if isinstance(value, Mapping):
        return "a table"
    return "a list of other things than text and numbers" if isinstance(value, list) else f"a {type(value).__name__}"


__all__ = ["BUDGETS", "PRESETS", "BudgetName", "PresetName", "Settings", "read", "read_config", "settings"]
