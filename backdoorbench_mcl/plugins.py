"""Find plugins through the entry-point group `bbmcl`; blame and contain the ones that break the contract.

Entry modules are imported in a child (`listing`), and what they offer is kept in the cache: a plugin that hangs,
exits, crashes or prints does so elsewhere, and a second call imports none. Whatever goes wrong becomes one attributed
`Problem`, that plugin (or that entry) is skipped, and all others go on. Free of torch.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import Distribution, EntryPoint, distributions
from pathlib import Path
from types import FrameType
from typing import Any, Literal, get_args

from . import __version__, caches, children
from .errors import PluginError
from .hooks import NAMESPACE, Entry
from .listing import COLLECTING, DIST, OBSERVER

Kind = Literal["attack", "model", "inverter", "defense", "dataset"]
HOOKS: Mapping[str, Kind] = dict(zip(COLLECTING, get_args(Kind), strict=True))  # both in one order
SLOW = 2.0  # seconds: what importing torch takes, which an entry module must not
PATIENCE = 10.0  # seconds for one entry point: five times SLOW, for a cold disk or a busy machine
_CONTRACTS = ("hooks.py", "hookspecs.py", "listing.py")


@dataclass(frozen=True)
class Plugin:
    """One entry point and the distribution that it came from. file: of its module; skip: what BBMCL_DISABLE takes."""

    name: str
    dist: str
    version: str
    module: str
    file: str = ""
    skip: str = ""

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
    """What is wrong with a plugin (or, as a notice, odd about it), in one line, and how to go on without it."""

    plugin: Plugin
    message: str

    def __str__(self) -> str:
        of = f"plugin {self.plugin.id} ({self.plugin.dist} {self.plugin.version}, {self.plugin.file})"
        return f"{of}: {self.message}; skip it with BBMCL_DISABLE={self.plugin.skip or self.plugin.name}"


@dataclass
class Plugins:
    """All usable methods, the problems met on the way, notices of what disables nothing, and who observes cells."""

    offers: list[Offer] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    notices: list[Problem] = field(default_factory=list)
    observing: list[tuple[Plugin, EntryPoint]] = field(default_factory=list)

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
                found.setdefault((_name(dist), point.name), (dist, point))
    return [found[key] for key in sorted(found)]


def _name(dist: Distribution) -> str:
    return str(dist.metadata["Name"])


def _request(dist: Distribution, point: EntryPoint) -> dict[str, Any]:
    """What the child is asked; together with the files behind it all that its answer depends on."""
    required = [line for line in dist.requires or () if re.match(r"backdoorbench[-_.]+mcl(?![\w.-])", line, re.I)]
    about = {"dist": [_name(dist), dist.version], "point": point.name, "value": point.value}
    return {**about, "requires": required, "installed": __version__}


def _module(value: str) -> str:
    """The module of an entry point's value, which need not be well-formed."""
    return re.split(r"[\s:\[]", value, maxsplit=1)[0]


def _replies(requests: Sequence[Mapping[str, Any]], cache: Path) -> list[children.Reply]:
    """A listing for each request. Only what is in order is kept: a fault may lie in what was not hashed."""
    files = [cache / f"{caches.key([r, caches.code(_module(r['value']), _CONTRACTS)])}.json" for r in requests]
    kept = [caches.read(file) for file in files]
    missing = [i for i, reply in enumerate(kept) if reply is None]
    if missing:
        fresh = children.ask("backdoorbench_mcl.listing", [requests[i] for i in missing], PATIENCE)
        for i, reply in zip(missing, fresh, strict=True):
            kept[i] = reply
            if "ok" in reply and not reply["ok"]["problems"]:
                caches.write(files[i], reply)
    return [reply or {} for reply in kept]


def _collect(found: Plugins, plugin: Plugin, entries: Sequence[Mapping[str, Any]]) -> None:
    for fields in entries:
        kind = HOOKS[fields["hook"]]
        given = {name: value for name, value in fields.items() if name != "hook"}
        offer = Offer(kind, Entry(**{**given, "may_know": tuple(given["may_know"])}), plugin)
        if any(o.kind == kind and o.full_name == offer.full_name for o in found.offers):
            found.problems.append(Problem(plugin, f"{fields['hook']} offers {kind} {offer.entry.name!r} a second time"))
        else:
            found.offers.append(offer)


def _namesakes(found: Plugins) -> Iterator[Problem]:
    """A notice for every offer whose name another package has too; the shipped ones are nobody's namesakes."""
    for offer in found.offers:
        others = [
            o.full_name for o in found.offers
            if (o.kind, o.entry.name) == (offer.kind, offer.entry.name) and o.plugin.dist != offer.plugin.dist
        ]  # fmt: skip
        if others and offer.plugin.dist != DIST:
            message = f"{offer.kind} {offer.entry.name!r} is the name of another package's too"
            yield Problem(offer.plugin, f"{message}; write {' or '.join([offer.full_name, *others])}")


def load(
    environ: Mapping[str, str] = os.environ, source: Iterable[Distribution] | None = None, cache: Path | None = None
) -> Plugins:
    """Load every plugin of this installation.

    `BBMCL_PLUGINS=a,b` loads just those entry points, `BBMCL_DISABLE=a` skips some (each by its name or as
    `dist/name`), `BBMCL_STRICT=1` raises PluginError at the first problem. `source` replaces the installed
    distributions, for tests; cache: where listings are kept, by default the user's cache folder.
    """
    points = _entry_points(distributions() if source is None else source)
    names = Counter(point.name for _, point in points)
    wanted, disabled = environ.get("BBMCL_PLUGINS"), environ.get("BBMCL_DISABLE", "")
    chosen = [(d, p) for d, p in points if _selected(p.name, _name(d), wanted, disabled)]
    folder = (caches.cache_folder() if cache is None else cache) / "listings"
    found = Plugins()
    for (dist, point), reply in zip(chosen, _replies([_request(*one) for one in chosen], folder), strict=True):
        told = reply.get("ok", {})
        name = _name(dist)
        file = str(caches.source(_module(point.value)) or dist.locate_file(""))
        skip = point.name if names[point.name] == 1 else f"{name}/{point.name}"
        plugin = Plugin(point.name, name, dist.version, point.value, file, skip)
        if not told:
            found.problems.append(Problem(plugin, f"cannot import {point.value!r}: {reply.get('fate', 'no answer')}"))
            continue
        found.problems += [Problem(plugin, line) for line in told["problems"]]
        _collect(found, plugin, told["entries"])
        if told["observes"]:
            found.observing.append((plugin, point))
        if told["printed"]:
            found.notices.append(Problem(plugin, f"prints while it is listed ({told['printed']!r})"))
        found.notices += [Problem(plugin, f"uses what is going to go: {line}") for line in told["deprecated"]]
        if told["seconds"] > SLOW:
            line = f"took {told['seconds']:.1f} s to list, expected at most {SLOW:g} s: import torch where it is used"
            found.notices.append(Problem(plugin, line))
    found.notices += _namesakes(found)
    if found.problems and environ.get("BBMCL_STRICT") == "1":
        raise PluginError(str(found.problems[0]))
    return found


# ---------------------------------------------------------------- observers


class _TooLong(BaseException):
    """Raised in an observer that has used up its time; none that `except Exception` would swallow."""


@contextlib.contextmanager
def guest(seconds: float = PATIENCE) -> Iterator[None]:
    """A plugin's code runs in this process: what it prints goes to standard error, and it ends in time.

    Raises PluginError for a SystemExit, and for what takes longer than `seconds` (in the main thread, where alone
    Python can be interrupted); other exceptions are let through.
    """

    def ring(signum: int, frame: FrameType | None) -> None:
        raise _TooLong

    timed = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGALRM, ring) if timed else None
    left = signal.setitimer(signal.ITIMER_REAL, seconds) if timed else (0.0, 0.0)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    except SystemExit as error:
        raise PluginError(f"called sys.exit({error.code!r})") from error
    except _TooLong:
        raise PluginError(f"did not return within {seconds:g} s") from None
    finally:
        if timed:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)
            signal.setitimer(signal.ITIMER_REAL, *left)  # of whoever uses the timer around this


def observers(found: Plugins) -> list[tuple[Plugin, Callable[..., object]]]:
    """The observers of finished cells, imported into this process; one that cannot be adds to the problems."""
    out: list[tuple[Plugin, Callable[..., object]]] = []
    for plugin, point in found.observing:
        try:
            with guest():
                out.append((plugin, getattr(point.load(), OBSERVER)))
        except Exception as error:  # it could be imported by the child, but here it may still raise anything
            found.problems.append(Problem(plugin, f"cannot import {point.value!r}: {type(error).__name__}: {error}"))
    return out


__all__ = ["DIST", "HOOKS", "Kind", "Offer", "Plugin", "Plugins", "Problem", "guest", "load", "observers"]
