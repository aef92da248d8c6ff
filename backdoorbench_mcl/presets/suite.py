"""The paper's tables and figures as pinned runs: one TOML file each in `suites/`. Free of torch."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

from ..errors import UserError
from . import read

Kind = Literal["table", "curves", "tsne", "gallery"]
NAMES = ("table1", "table2", "table4", "table5", "fig1", "fig3", "fig4", "fig5", "fig9", "fig10")
PAPER = ("cifar10", "gtsrb", "imagenet20")  # the data sets of the paper
_LISTS = ("set", "sweep", "claims")


@dataclass(frozen=True)
class Suite:
    """One target of `bbmcl reproduce`. set, sweep: as the options of `matrix`; table: which printed numbers it has."""

    name: str
    title: str
    kind: Kind
    attacks: str
    defenses: str
    model: str = "wrn-16-1"
    set: tuple[str, ...] = ()
    sweep: tuple[str, ...] = ()
    claims: tuple[str, ...] = ()
    table: int | None = None


@cache
def _file(name: str) -> Mapping[str, Any]:
    if name not in NAMES:
        close = difflib.get_close_matches(name, (*NAMES, "all"), 1)
        hint = f"did you mean {close[0]!r}?" if close else f"expected all or some of {', '.join(NAMES)}"
        raise UserError(f"reproduce {name!r}: {hint}")
    return read(f"suites/{name}")


def suite(name: str, dataset: str, budget: str) -> Suite:
    """The target `name` on a data set (its bare name). What it says of the data set replaces, a budget adds.

    Raises UserError for an unknown target. Example: `suite("table1", "gtsrb", "full").attacks`.
    """
    found = _file(name)
    own = {**found, **found.get("data", {}).get(dataset, {})}
    own["set"] = [*own.get("set", []), *found.get("budget", {}).get(budget, {}).get("set", [])]
    fields: dict[str, Any] = {
        key: tuple(value) if key in _LISTS else value for key, value in own.items() if key not in ("data", "budget")
    }
    return Suite(name, **fields)


def datasets(name: str) -> tuple[str, ...]:
    """The data sets on which the paper has a target: the first of them, and those that its file has a table for."""
    return (PAPER[0], *(dataset for dataset in PAPER[1:] if dataset in _file(name).get("data", {})))


def on(name: str, dataset: str) -> bool:
    """Whether a target is to be had on a data set (its bare name): one of the paper's must be among `datasets`.

    A toy or a data set that is not the paper's stands in for cifar10. Example: `on("table2", "gtsrb")` is False.
    """
    return dataset not in PAPER or dataset in datasets(name)


@cache
def pinned(table: int) -> frozenset[str]:
    """Every `--set` line that belongs to the printed table of that number, on any data set and budget."""
    lines: set[str] = set()
    for found in map(_file, NAMES):
        if found.get("table") == table:
            parts = [found, *found.get("data", {}).values(), *found.get("budget", {}).values()]
            lines |= {line for part in parts for line in part.get("set", [])}
    return frozenset(lines)


__all__ = ["NAMES", "PAPER", "Kind", "Suite", "datasets", "on", "pinned", "suite"]
