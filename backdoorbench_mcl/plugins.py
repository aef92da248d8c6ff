"""Find plugins through the entry-point group `bbmcl`; blame and contain the ones that break the contract.

pluggy's own loader trusts too much: one ImportError ends the host, a misspelt hook registers silently, one
raising hook ends the collection, and of two packages with one entry-point name the second is dropped. So each
entry point is loaded here on its own; whatever goes wrong becomes one attributed `Problem`, that plugin (or
that entry) is skipped, and all others go on. Free of torch.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import Distribution, EntryPoint, distributions
from types import ModuleType
from typing import Any, Literal

import pluggy

from . import hookspecs
from .errors import PluginError
from .hooks import NAMESPACE, Entry

Kind = Literal["attack", "model", "inverter", "defense", "dataset"]
HOOKS: Mapping[str, Kind] = {
    "bbmcl_attacks": "attack",
    "bbmcl_models": "model",
    "bbmcl_inverters": "inverter",
    "bbmcl_defenses": "defense",
    "bbmcl_datasets": "dataset",
}
OBSERVER = "bbmcl_cell_finished"


@dataclass(frozen=True)
class Plugin:
    """One loaded entry point and the distribution that it came from."""

    name: str
    dist: str
    version: str
    module: str

    @property
    def id(self) -> str:
        return f"{self.dist}/{self.name}"


@dataclass(frozen=True)
class Offer:
    """One method of one plugin."""

    kind: Kind
    entry: Entry
    plugin: Plugin

    @property
    def full_name(self) -> str:
        """`dist/name`, unique in an installation."""
        return f"{self.plugin.dist}/{self.entry.name}"


@dataclass(frozen=True)
class Problem:
    """What is wrong with a plugin, in one line, and how to go on without it."""

    plugin: str
    message: str

    def __str__(self) -> str:
        return f"plugin {self.plugin}: {self.message}; skip it with BBMCL_DISABLE={self.plugin.split('/')[-1]}"


@dataclass
class Plugins:
    """All usable methods, the problems met on the way, and the observers of finished cells."""

    offers: list[Offer] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    observers: list[tuple[str, Callable[..., object]]] = field(default_factory=list)

    def of(self, kind: Kind) -> list[Offer]:
        """The offers of one kind, by name."""
        return sorted((o for o in self.offers if o.kind == kind), key=lambda o: (o.entry.name, o.plugin.dist))


def _selected(name: str, dist: str, wanted: str | None, disabled: str) -> bool:
    ids = {name, f"{dist}/{name}"}
    if ids & {part.strip() for part in disabled.split(",")}:
        return False
    return wanted is None or bool(ids & {part.strip() for part in wanted.split(",")})


def _entry_points(source: Iterable[Distribution]) -> list[tuple[Distribution, EntryPoint]]:
    found: dict[tuple[str, str], tuple[Distribution, EntryPoint]] = {}
    for dist in source:
        for point in dist.entry_points:
            if point.group == NAMESPACE:  # the first on sys.path wins, as for imports
                found.setdefault((dist.metadata["Name"], point.name), (dist, point))
    return [found[key] for key in sorted(found)]


def _brief(error: BaseException) -> str:
    text = str(error).splitlines()
    return f"{type(error).__name__}: {text[0]}" if text else type(error).__name__


class _Loader:
    def __init__(self) -> None:
        self.result = Plugins()
        self.manager = pluggy.PluginManager(NAMESPACE)
        self.manager.add_hookspecs(hookspecs)
        self.known = [*HOOKS, OBSERVER]

    def blame(self, plugin: str, message: str) -> None:
        self.result.problems.append(Problem(plugin, message))

    def load(self, dist: Distribution, point: EntryPoint) -> None:
        plugin = Plugin(point.name, dist.metadata["Name"], dist.version, point.value)
        try:
            module = point.load()
        except (Exception, SystemExit) as error:  # a plugin may raise anything on import
            self.blame(plugin.id, f"cannot import {point.value!r}: {_brief(error)}")
            return
        misspelt = False
        for hook in sorted(self._marked(module)):
            if hook not in self.known:
                close = difflib.get_close_matches(hook, self.known, 1)
                hint = f", did you mean {close[0]!r}?" if close else f"; the hooks are {', '.join(self.known)}"
                self.blame(plugin.id, f"unknown hook {hook!r}{hint}")
                misspelt = True
        if misspelt:
            return
        try:
            self.manager.register(module, name=plugin.id)
        except (pluggy.PluginValidationError, ValueError) as error:
            self.blame(plugin.id, _brief(error))
            return
        for hook, kind in HOOKS.items():
            for implementation in getattr(self.manager.hook, hook).get_hookimpls():
                if implementation.plugin_name == plugin.id:
                    self.collect(plugin, hook, kind, implementation)
        for implementation in getattr(self.manager.hook, OBSERVER).get_hookimpls():
            if implementation.plugin_name == plugin.id:
                self.result.observers.append((plugin.id, implementation.function))

    @staticmethod
    def _marked(module: ModuleType) -> set[str]:
        return {name for name in dir(module) if getattr(getattr(module, name, None), f"{NAMESPACE}_impl", None)}

    def collect(self, plugin: Plugin, hook: str, kind: Kind, implementation: pluggy.HookImpl) -> None:
        if implementation.wrapper or implementation.hookwrapper:
            self.blame(plugin.id, f"{hook} is a hook wrapper; a collecting hook returns its own entries")
            return
        try:
            entries: Any = implementation.function()
        except (Exception, SystemExit) as error:
            self.blame(plugin.id, f"{hook} raised {_brief(error)}")
            return
        if not isinstance(entries, Sequence) or not all(isinstance(entry, Entry) for entry in entries):
            self.blame(plugin.id, f"{hook} returned {type(entries).__name__}, expected a list of Entry")
            return
        for entry in entries:
            if any(o.kind == kind and o.full_name == f"{plugin.dist}/{entry.name}" for o in self.result.offers):
                self.blame(plugin.id, f"{hook} offers {kind} {entry.name!r} a second time")
            else:
                self.result.offers.append(Offer(kind, entry, plugin))


def load(environ: Mapping[str, str] = os.environ, source: Iterable[Distribution] | None = None) -> Plugins:
    """Load every plugin of this installation.

    `BBMCL_PLUGINS=a,b` loads just those entry points, `BBMCL_DISABLE=a` skips some (each by its name or as
    `dist/name`), `BBMCL_STRICT=1` raises PluginError at the first problem. `source` replaces the installed
    distributions, for tests.
    """
    loader = _Loader()
    for dist, point in _entry_points(distributions() if source is None else source):
        name = dist.metadata["Name"]
        if _selected(point.name, name, environ.get("BBMCL_PLUGINS"), environ.get("BBMCL_DISABLE", "")):
            loader.load(dist, point)
    if loader.result.problems and environ.get("BBMCL_STRICT") == "1":
        raise PluginError(str(loader.result.problems[0]))
    return loader.result


__all__ = ["HOOKS", "Kind", "Offer", "Plugin", "Plugins", "Problem", "load"]
