"""`bbmcl show NAME`: the card of a method as text. Free of torch."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

from ..errors import UserError
from ..params import selection
from ..plugins import HOOKS
from ..registry import Registry
from ..text import one_line

_BOUNDS = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}


def _type(field: Mapping[str, Any]) -> str:
    """A parameter's type and bounds: `number > 0`, `"pixel" or "normalized"`, `integer >= 1 or none`."""
    if "anyOf" in field:
        return " or ".join(_type(part) for part in field["anyOf"])
    if "enum" in field or "const" in field:
        return " or ".join(repr(value) for value in field.get("enum", [field.get("const")]))
    kind = {"null": "none"}.get(str(field.get("type", "any")), str(field.get("type", "any")))
    bounds = "".join(f" {sign} {field[name]}" for name, sign in _BOUNDS.items() if name in field)
    if kind == "array":
        fixed = field.get("prefixItems")  # one entry for each place of a tuple of fixed length
        return f"{len(fixed)} x {_type(fixed[0])}" if fixed else f"list of {_type(field.get('items', {}))}"
    return kind + bounds


def render(registry: Registry, name: str) -> str:
    """The card of every method called `name` (two kinds may share one). Raises UserError for an unknown name."""
    wanted = selection(name).name
    offers = [o for kind in HOOKS.values() for o in registry.plugins.of(kind) if wanted in (o.entry.name, o.full_name)]
    if not offers:
        names = sorted({o.entry.name for o in registry.plugins.offers})
        close = difflib.get_close_matches(wanted, names, 1)
        hint = f"did you mean {close[0]!r}?" if close else f"there are: {', '.join(names)}."
        raise UserError(f"unknown method {wanted!r}; {hint} See: bbmcl plugins")
    blocks = []
    for offer in offers:
        card = registry.card(offer)
        lines = [
            f"{offer.kind} {one_line(offer.entry.name)} - {one_line(offer.entry.summary)}",
            f"from {one_line(offer.plugin.dist)} {one_line(offer.plugin.version)}, class {card['class']}, "
            f"version {card['version']}",
        ]
        if card["paper"] or offer.entry.paper:
            lines.append(f"paper: {one_line(card['paper'] or offer.entry.paper)}")
        if offer.entry.may_know:
            lines.append(f"may be told: {', '.join(offer.entry.may_know)}")
        lines += ["", *(one_line(line) if line.strip() else "" for line in str(card["card"]).splitlines()), ""]
        fields = card["schema"].get("properties", {})
        required = set(card["schema"].get("required", ()))
        lines.append("parameters" if fields else "no parameters")
        width = max(map(len, fields), default=0)
        for field, about in fields.items():
            default = "required" if field in required else f"default {about.get('default')!r}"
            lines.append(f"  {field:{width}}  {one_line(_type(about))}, {default}")
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks)


__all__ = ["render"]
