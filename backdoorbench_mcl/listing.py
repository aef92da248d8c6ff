"""What a child says of entry modules (see `children`).

pluggy's own loader trusts too much: one ImportError ends the host, a misspelt hook registers silently, one
raising hook ends the collection. So each entry point is loaded here on its own, and whatever goes wrong becomes one
line. Free of torch.
"""

from __future__ import annotations

import contextlib
import difflib
import os
import re
import sys
import time
import warnings
from collections.abc import Mapping, Sequence
from importlib.metadata import EntryPoint
from typing import Any

import pluggy

from . import __version__, hookspecs
from .children import Reply
from .hooks import NAMESPACE, Entry

COLLECTING = ("bbmcl_attacks", "bbmcl_models", "bbmcl_inverters", "bbmcl_defenses", "bbmcl_datasets")
OBSERVER = "bbmcl_cell_finished"
KNOWN = [*COLLECTING, OBSERVER]
DIST = "backdoorbench-mcl"


def brief(error: BaseException) -> str:
    """An exception in one line."""
    text = str(error).splitlines()
    return f"{type(error).__name__}: {text[0]}" if text else type(error).__name__


def answer(request: Mapping[str, Any]) -> Reply:
    """What one entry point offers: {"ok": {"entries", "observes", "seconds", "printed", "deprecated", "problems"}}.

    request: "dist" [name, version], "point", "value" as in entry_points.txt, "requires": what its metadata demand.
    """
    entries: list[dict[str, Any]] = []
    problems: list[str] = []
    out: dict[str, Any] = {"entries": entries, "observes": False, "problems": problems, "deprecated": []}
    before, started = _written(), time.monotonic()
    try:
        _require(request["requires"])
        module = _load(request)
        manager, out["deprecated"] = _registered(module)
        for hook in COLLECTING:
            for implementation in getattr(manager.hook, hook).get_hookimpls():
                try:
                    entries += [{"hook": hook, **fields} for fields in _collected(hook, implementation)]
                except _Broken as error:
                    problems.append(str(error))
        out["observes"] = bool(getattr(manager.hook, OBSERVER).get_hookimpls())
    except _Broken as error:
        problems += str(error).splitlines()
    out["seconds"] = time.monotonic() - started
    out["printed"] = _printed(before)
    return {"ok": out}


class _Broken(Exception):
    """What is wrong with a plugin; a line for each thing."""


def _require(lines: Sequence[str]) -> None:
    """Raises _Broken where a distribution demands another version of this one."""
    if not lines:
        return
    from packaging.requirements import InvalidRequirement, Requirement  # 20 ms that a shipped plugin does not need

    for line in lines:
        try:
            wanted = Requirement(line)
        except InvalidRequirement:
            raise _Broken(f"its metadata require {line!r}, which is no requirement") from None
        applies = wanted.marker is None or wanted.marker.evaluate({"extra": ""})
        if applies and not wanted.specifier.contains(__version__, prereleases=True):
            raise _Broken(f"requires {line}, but {DIST} {__version__} is installed; install a version that fits")


def _load(request: Mapping[str, Any]) -> Any:
    value = request["value"]
    try:
        return EntryPoint(request["point"], value, NAMESPACE).load()
    except BaseException as error:  # a plugin may raise anything, also what ends a process
        raise _Broken(f"cannot import {value!r}: {brief(error)}") from error


def _registered(module: Any) -> tuple[pluggy.PluginManager, list[str]]:
    """A manager that holds the module alone, after a look at its hooks; what it takes of a hook that is going to go.

    An argument goes like this: for a release its hook's specification says `warn_on_impl_args={"old":
    DeprecationWarning("...")}`, and pluggy warns of every implementation that asks for it.
    """
    marked = {name for name in dir(module) if getattr(getattr(module, name, None), f"{NAMESPACE}_impl", None)}
    lines = []
    for hook in sorted(marked - set(KNOWN)):
        close = difflib.get_close_matches(hook, KNOWN, 1)
        hint = f", did you mean {close[0]!r}?" if close else f"; the hooks are {', '.join(KNOWN)}"
        lines.append(f"unknown hook {hook!r}{hint}")
    if lines:
        raise _Broken("\n".join(lines))
    manager = pluggy.PluginManager(NAMESPACE)
    manager.add_hookspecs(hookspecs)
    try:
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            manager.register(module)
    except (pluggy.PluginValidationError, ValueError) as error:
        raise _Broken(brief(error)) from error
    return manager, [str(warning.message) for warning in told]


def _collected(hook: str, implementation: pluggy.HookImpl) -> list[dict[str, Any]]:
    if implementation.wrapper or implementation.hookwrapper:
        raise _Broken(f"{hook} is a hook wrapper; a collecting hook returns its own entries")
    try:
        entries: Any = implementation.function()
    except BaseException as error:  # as on import
        raise _Broken(f"{hook} raised {brief(error)}") from error
    if not isinstance(entries, Sequence) or not all(isinstance(entry, Entry) for entry in entries):
        raise _Broken(f"{hook} returned {type(entries).__name__}, expected a list of Entry")
    return [
        {
            "name": str(entry.name), "target": str(entry.target), "summary": str(entry.summary),
            "paper": str(entry.paper), "may_know": [str(item) for item in entry.may_know],
        }
        for entry in entries
    ]  # fmt: skip


# ---------------------------------------------------------------- what a plugin prints


def _written() -> int:
    """How much this process has written so far; its two streams go to one file."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError, OSError, ValueError):  # a plugin may have closed or replaced it
            stream.flush()
    with contextlib.suppress(OSError):
        return os.fstat(1).st_size
    return 0


def _printed(before: int) -> str:
    """The first line that was written since `before`, cut; "" where there is none."""
    size = _written() - before
    if size <= 0:
        return ""
    with contextlib.suppress(OSError):
        lines = os.pread(1, min(size, 2000), before).decode(errors="replace").split("\n")
        return re.sub(r"\s+", " ", next((line for line in lines if line.strip()), "")).strip()[:80] or "blank lines"
    return "something"
