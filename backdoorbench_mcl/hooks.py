"""The door: what the entry module of a plugin imports. Free of torch, so that listing plugins is instant.

Example (the entry module of a plugin, entry point `mydef = bbmcl_mydef` in the group `bbmcl`)::

    from backdoorbench_mcl.hooks import Entry, hookimpl

    @hookimpl
    def bbmcl_defenses() -> list[Entry]:
        return [Entry("mydef", "bbmcl_mydef.method:MyDefense", "fine-tune the head only")]
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import pluggy

NAMESPACE = "bbmcl"
KNOWLEDGE = frozenset({"target", "location", "trigger", "suspect"})

hookspec = pluggy.HookspecMarker(NAMESPACE)
hookimpl = pluggy.HookimplMarker(NAMESPACE)

_NAME = re.compile(r"[a-z][a-z0-9]*(?:[-+.][a-z][a-z0-9]*)*\+?")
_TARGET = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")


@dataclass(frozen=True)
class Entry:
    """One method that a plugin offers; the class behind it is imported only when it is used.

    Args:
        name: lower-case, starts with a letter, words joined by `-`; no word starts with a digit, because
            `name-16-1` denotes a member of the family `name`.
        target: `"package.module:Class"`.
        summary: one line for `bbmcl plugins`.
        paper: where the method comes from.
        may_know: everything that any configuration of the method may be told beyond its clean images, a
            subset of `KNOWLEDGE`; `--defenses all` leaves out methods that may know the trigger or its location.

    Raises:
        ValueError: a field does not fit.

    Example: `Entry("ft", "bbmcl_defenses.ft:FT", "fine-tune")`.
    """

    name: str
    target: str
    summary: str = ""
    paper: str = ""
    may_know: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):
            raise ValueError(f"method name {self.name!r}: expected lower-case words joined by '-', as in 'nc-box'")
        if not _TARGET.fullmatch(self.target):
            raise ValueError(f"target {self.target!r} of {self.name!r}: expected 'package.module:Class'")
        unknown = set(self.may_know) - KNOWLEDGE
        if unknown:
            raise ValueError(f"may_know of {self.name!r} has {sorted(unknown)}; expected some of {sorted(KNOWLEDGE)}")


__all__ = ["KNOWLEDGE", "NAMESPACE", "Entry", "hookimpl", "hookspec"]
