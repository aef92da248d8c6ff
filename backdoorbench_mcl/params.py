"""From text to constructor parameters: selections, values, `--set` lines. Free of torch.

Grammar of a selection (design 3.2): comma-separated `family[-int...][:argument][(param=value, ...)]`, split on
commas outside parentheses, brackets and quotes: `wrn-16-1`, `parquet:PATH`, `mcldef(temperature=0.1)`.
"""

from __future__ import annotations

import ast
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from .errors import UserError

_WORDS: Mapping[str, Any] = {"true": True, "false": False, "none": None, "null": None}
_NAME = re.compile(
    r"(?P<full>(?:[A-Za-z0-9_.\-]+/)?[a-z][a-z0-9]*(?:[-+.][a-z][a-z0-9]*)*\+?)(?P<suffix>(?:-\d+)*(?::.*)?)", re.S
)
MOST = 1000  # values of a sweep: each is a column, or a table
_OPEN = {"(": ")", "[": "]", "{": "}"}


@dataclass(frozen=True)
class Selection:
    """label: what was typed; name: `name` or `dist/name`; suffix: `-16-1` or `:PATH` of a family, or ""."""

    label: str
    name: str
    suffix: str = ""
    params: Mapping[str, Any] = field(default_factory=dict)


def split(text: str, *, quotes: bool = False) -> list[str]:
    """Parts of `text` between top-level commas, stripped. Raises UserError for unbalanced brackets or quotes.

    quotes: whether a quote counts outside brackets too; in a list of selections it is a character of a path.
    """
    parts: list[str] = []
    stack: list[str] = []
    start, quote, escaped = 0, "", False
    for position, char in enumerate(text):
        if quote:
            quote = "" if char == quote and not escaped else quote
            escaped = char == "\\" and not escaped
        elif char in "'\"" and (stack or quotes):
            quote = char
        elif char in _OPEN:
            stack.append(_OPEN[char])
        elif stack and char == stack[-1]:
            stack.pop()
        elif char in ")]}":
            raise UserError(f"{text!r}: {char!r} at position {position + 1} closes nothing")
        elif char == "," and not stack:
            parts.append(text[start:position].strip())
            start = position + 1
    if stack or quote:
        raise UserError(f"{text!r}: a closing {quote or stack[-1]!r} is missing")
    return [*parts, text[start:].strip()]


def value(text: str) -> Any:
    """A number, true/false, none, a quoted string, a list, tuple or dict of such; anything else is the string itself,
    as is what JSON and so a key cannot hold: sets, bytes, infinities.
    """
    text = text.strip()
    if text.lower() in _WORDS:
        return _WORDS[text.lower()]
    try:
        found = ast.literal_eval(text)
        return found if plain(found) else text
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        return text


def plain(found: Any) -> bool:
    """Whether a value can stand in a key, that is in JSON, and be printed again."""
    if isinstance(found, list | tuple):
        return all(map(plain, found))
    if isinstance(found, dict):
        return all(isinstance(name, str) for name in found) and all(map(plain, found.values()))
    if isinstance(found, int):
        return found.bit_length() <= 1024  # Python refuses to print numbers of thousands of digits
    return found is None or isinstance(found, str) or (isinstance(found, float) and math.isfinite(found))


def typed(given: Any) -> str:
    """What to type for a value: the inverse of `value`. Strings that read as themselves go without quotes.

    Example: `typed("mesa")` is `mesa`, `typed("0.1")` is `'0.1'`, `typed((1, 2))` is `(1, 2)`.
    """
    if not isinstance(given, str) or not given or value(given) != given:
        return repr(given)
    try:
        return given if split(given, quotes=True) == [given] else repr(given)
    except UserError:
        return repr(given)


def assignments(text: str) -> dict[str, Any]:
    """`"a=1, b=x"` -> `{"a": 1, "b": "x"}`; raises UserError for anything that is no assignment, or a name twice."""
    out: dict[str, Any] = {}
    for part in split(text, quotes=True):
        name, equals, given = part.partition("=")
        name = name.strip()
        if not equals or not name.isidentifier():
            raise UserError(f"{part!r}: expected parameter=value, as in 'temperature=0.1'")
        if name in out:
            raise UserError(f"parameter {name!r} is given twice in {text!r}")
        out[name] = value(given)
    return out


def selection(text: str) -> Selection:
    """One selection. Raises UserError for text outside the grammar."""
    label = text.strip()
    body, params = label, {}
    opened = _last_group(label) if label.endswith(")") else None
    if opened is not None:
        body, inner = label[:opened], label[opened + 1 : -1]
        params = assignments(inner) if inner.strip() else {}
    match = _NAME.fullmatch(body)
    if not match:
        raise UserError(f"{label!r} is no method name; expected name, family-1-2, family:argument or name(param=value)")
    return Selection(label, match["full"], match["suffix"], params)


def of_label(label: str) -> Selection:
    """What a stored row is called. One that somebody else wrote may be no selection: then it is a name alone."""
    try:
        return selection(label)
    except UserError:
        return Selection(label, label)


def _last_group(label: str) -> int | None:
    """Where the parenthesis opens that the last character of `label` closes; what stands in quotes closes nothing."""
    opened: list[int] = []
    quote, escaped = "", False
    for position, char in enumerate(label[:-1]):
        if quote:
            quote = "" if char == quote and not escaped else quote
            escaped = char == "\\" and not escaped
        elif char in "'\"" and opened:
            quote = char
        elif char == "(":
            opened.append(position)
        elif char == ")" and opened:
            opened.pop()
    return opened[-1] if opened and not quote else None


def selections(text: str) -> list[Selection]:
    """A comma-separated list of selections; raises UserError for an empty one or one given twice."""
    out = [selection(part) for part in split(text) if part]
    if not out:
        raise UserError(f"{text!r}: expected at least one name; see: bbmcl plugins")
    seen: set[str] = set()
    for one in out:
        if one.label in seen:
            raise UserError(f"{one.label!r} is selected twice in {text!r}; leave one out")
        seen.add(one.label)
    return out


@dataclass(frozen=True)
class Sweep:
    """One parameter and the values that it takes, as typed and as read; name is None for the clean rate."""

    name: str | None
    parameter: str
    values: Sequence[tuple[str, Any]]


CLEAN_RATE = "clean_rate"  # what may be swept besides parameters of methods


def sweep(line: str) -> Sweep:
    """`"mcldef.temperature=0.1,0.5"` or `"clean-rate=0.01,0.05"`. Raises UserError for anything else.

    Example: `sweep("ft.lr=0.1,0.01").values` is `[("0.1", 0.1), ("0.01", 0.01)]`.
    """
    target, equals, given = line.partition("=")
    name, dot, parameter = target.strip().rpartition(".")
    parameter = parameter.replace("-", "_") if not dot else parameter
    if not equals or not parameter.isidentifier() or bool(dot) != bool(name) or (not dot and parameter != CLEAN_RATE):
        raise UserError(
            f"--sweep {line!r}: expected name.param=v1,v2,... of an attack or a defense, as in "
            "'mcldef.temperature=0.1,0.5,1', or clean-rate=v1,v2,..."
        )
    texts = [text for text in split(given, quotes=True) if text]
    values = [(text, value(text)) for text in texts]
    if not values:
        raise UserError(f"--sweep {line!r}: expected at least one value behind the equals sign")
    if len(values) > MOST:
        raise UserError(f"--sweep {target.strip()}: {len(values):,} values were given, expected at most {MOST:,}")
    for i, (text, read) in enumerate(values):
        if any(read == other and type(read) is type(other) for _, other in values[:i]):
            raise UserError(f"--sweep {line!r}: the value {text} is given twice")
    return Sweep(name or None, parameter, values)


def swept(selection: Selection, sweeps: Sequence[Sweep]) -> list[Selection]:
    """`selection` once for every combination of values of the sweeps that mean it; the label names them.

    Raises UserError where the selection sets a swept parameter itself.
    Example: `[s.label for s in swept(selection("ft"), [sweep("ft.lr=0.1,0.01")])]` is `["ft(lr=0.1)", "ft(lr=0.01)"]`.
    """
    out = [selection]
    for one in sweeps:
        if one.name not in (selection.name, selection.name.rpartition("/")[2]):
            continue
        if one.parameter in selection.params:
            raise UserError(f"--sweep {one.name}.{one.parameter}: {selection.label} sets it already; leave one out")
        out = [_with(each, one.parameter, text, read) for each in out for text, read in one.values]
    return out


def _with(selection: Selection, parameter: str, text: str, read: Any) -> Selection:
    given = f"{parameter}={text}"
    label = f"{selection.label[:-1]}, {given})" if selection.params else f"{selection.label}({given})"
    return Selection(label, selection.name, selection.suffix, {**selection.params, parameter: read})


def overrides(lines: list[str]) -> dict[str, dict[str, Any]]:
    """`["ft.lr=0.01", "train.epochs=15"]` -> `{"ft": {"lr": 0.01}, "train": {"epochs": 15}}`."""
    out: dict[str, dict[str, Any]] = {}
    for line in lines:
        name, equals, given = line.partition("=")
        method, dot, parameter = name.strip().rpartition(".")
        if not equals or not dot or not method or not parameter.isidentifier():
            raise UserError(f"--set {line!r}: expected name.param=value, as in 'mcldef.temperature=0.1'")
        out.setdefault(method, {})[parameter] = value(given)
    return out


__all__ = [
    "CLEAN_RATE", "MOST", "Selection", "Sweep", "assignments", "of_label", "overrides", "plain", "selection",
    "selections", "split", "sweep", "swept", "typed", "value",
]  # fmt: skip
