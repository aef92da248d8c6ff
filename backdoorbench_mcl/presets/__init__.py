"""Presets say what is done, budgets how much (design 3.7): one TOML file each, only what differs. Free of torch."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Collection, Mapping
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from ..errors import UserError
from ..params import typed

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PresetName = Literal["paper", "authors", "clean"]
BudgetName = Literal["full", "mid", "quick"]
PRESETS: tuple[PresetName, ...] = ("paper", "authors", "clean")
BUDGETS: tuple[BudgetName, ...] = ("full", "mid", "quick")
Settings = dict[str, dict[str, Any]]
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
        found = tomllib.loads(file.read_text())
    except OSError as error:
        raise UserError(f"--config {file}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"--config {file} is no TOML: {error}") from error
    out: dict[str, Any] = {}
    for key, value in found.items():
        name = key.replace("_", "-")
        if name not in known:
            close = difflib.get_close_matches(name, known, 1)
            hint = f"did you mean {close[0]!r}?" if close else "see: bbmcl matrix --help"
            raise UserError(f"--config {file}: unknown option {key!r}; {hint}")
        if name == "set" and isinstance(value, Mapping):
            value = [f"{method}.{p}={typed(v)}" for method, table in value.items() for p, v in dict(table).items()]
        elif name == "sweep" and isinstance(value, Mapping):
            value = [f"{method}.{p}={','.join(map(typed, v if isinstance(v, list) else [v]))}"
                     for method, table in value.items() for p, v in dict(table).items()]  # fmt: skip
        elif isinstance(value, list) and name not in ("set", "sweep"):
            value = ",".join(map(str, value))
        out[_PARAMETER.get(name, name.replace("-", "_"))] = value
    return out


__all__ = ["BUDGETS", "PRESETS", "BudgetName", "PresetName", "Settings", "read", "read_config", "settings"]
