"""Configured methods and everything behind them: presets and `--set` by name, the methods that a method needs, what
reaches it by way of them. Free of torch.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import Any

from . import params, presets
from .errors import PluginError, UserError
from .params import Selection
from .plugins import Offer
from .registry import PROVIDERS, Described, Registry, Wanted

Needed = Mapping[tuple[str, str], Described]  # (kind of method, text) -> the method behind a need


class Table:
    """Presets, budget and `--set` by method name; knows which `--set` was used."""

    def __init__(self, base: presets.Settings, overrides: Mapping[str, dict[str, Any]]) -> None:
        self.base = base
        self.overrides = overrides
        self.seen: set[str] = set()

    def of(self, selection: Selection) -> dict[str, Any]:
        name = selection.name.rpartition("/")[2]
        self.seen |= {name, selection.name}
        own = {**self.overrides.get(name, {}), **(self.overrides.get(selection.name, {}))}
        base = dict(self.base.get(name, {}))
        if "epochs" in {**own, **selection.params} and "steps" not in own:
            base.pop("steps", None)  # epochs asked for outright beat the steps of a budget
        return {**base, **own}

    def check(self) -> None:
        for name in self.overrides:
            if name not in self.seen:
                known = sorted(self.seen)
                close = difflib.get_close_matches(name, known, 1)
                hint = f"did you mean {close[0]!r}?" if close else f"this run has {', '.join(known)}"
                raise UserError(f"--set {name}...: nothing selected is called {name!r}; {hint}")


def wanted_by(method: Described) -> list[tuple[str, str]]:
    """Kind and text of every method that `method` needs, detectors included."""
    out = []
    for need in method.needs.values():
        out.append((PROVIDERS[need["kind"]], need["method"]))
        if need["verdict"] is not None:
            out.append(("inverter", need["verdict"]))
    return out


def describe_needed(registry: Registry, table: Table, methods: Sequence[Described]) -> Needed:
    """Everything that `methods` need, and what that needs in turn."""
    found: dict[tuple[str, str], Described] = {}
    waiting = list(methods)
    while waiting:
        asked = sorted({item for method in waiting for item in wanted_by(method)} - set(found))
        chosen = [params.selection(text) for _, text in asked]
        for (kind, _), selection in zip(asked, chosen, strict=True):
            if kind != "recipe":
                registry.find(kind, selection.name)  # type: ignore[arg-type]
        waiting = registry.describe(
            [Wanted(kind, s, table.of(s)) for (kind, _), s in zip(asked, chosen, strict=True)]  # type: ignore[arg-type]
        )
        found.update(zip(asked, waiting, strict=True))
    return found


def told_by(method: Described, needed: Needed, above: tuple[str, ...] = ()) -> frozenset[str]:
    """What a method gets to know itself and by way of the stages that it needs; raises PluginError where they circle.

    A label that a detector named is no knowledge of the target: it may be wrong.
    """
    me = f"{method.kind} {method.label}"
    if me in above:
        raise PluginError(f"{me} needs itself, by way of {' and '.join(above)}")
    told = set(method.knows)
    for need in method.needs.values():
        source = needed[PROVIDERS[need["kind"]], need["method"]]
        other = told_by(source, needed, (*above, me))
        detector = need["method"] if need["kind"] == "verdict" else need["verdict"]
        if detector is None:
            told |= other
            continue
        _check_detector(needed["inverter", detector])
        if "trigger" in other:
            raise UserError(
                f"{method.label}: {source.label} is told the trigger, and with it the target label, which no detector "
                "has to find then; use target=given, or another inverter"
            )
        told |= other - {"target"}
    return frozenset(told)


def _check_detector(detector: Described) -> None:
    """Raises UserError where a method that should name the target label is no detector, or would have to be told."""
    if not detector.detects:
        raise UserError(f"detector {detector.label!r} names no target label; choose one that does, such as nc-full")
    if detector.needs or set(detector.knows) - {"target"}:
        raise UserError(f"detector {detector.label!r} has needs or must be told more, which no detector is granted")


def labels_used(method: Described, needed: Needed) -> bool:
    """Whether a defense, or one whose result it needs, reads the labels of the clean images."""
    others = [needed["defense", need["method"]] for need in method.needs.values() if need["kind"] == "result"]
    return bool(method.uses_labels) or any(labels_used(other, needed) for other in others)


def check_declarations(defense: Described, offer: Offer) -> None:
    """What a table shows of a method's knowledge must be all of it. Raises PluginError."""
    undeclared = sorted(set(defense.knows) - set(offer.entry.may_know))
    if undeclared:  # `--defenses all` goes by the entry
        raise PluginError(
            f"plugin {offer.plugin.id}: {defense.label} is told {', '.join(undeclared)}, which its Entry does not list "
            f"in may_know={offer.entry.may_know!r}"
        )
    if "target" in set(defense.told) - set(defense.knows):  # a trigger fitted to the target gives it away
        raise PluginError(
            f"plugin {offer.plugin.id}: {defense.label} needs {', '.join(sorted(defense.needs))}, which tells it the "
            "target label; add 'target' to its `knows`"
        )


__all__ = ["Needed", "Table", "check_declarations", "describe_needed", "labels_used", "told_by", "wanted_by"]
