"""Names to methods: look up, describe in a child, cache. Free of torch.

A description (resolved parameters, version, declarations) is cached under the hash of everything that it can
depend on: the request, the files of the plugin's top-level package, the distribution's version and the contracts.
"""

from __future__ import annotations

import difflib
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from . import caches, cells, children
from .caches import cache_folder
from .errors import PluginError, UserError
from .params import Selection, selection
from .plugins import DIST, Kind, Offer, Plugin, Plugins, Problem

RECIPE = "backdoorbench_mcl.api:Recipe"
PROVIDERS: Mapping[str, str] = {"trigger": "inverter", "verdict": "inverter", "result": "defense", "model": "recipe"}
_CONTRACTS = (  # files that a description can depend on
    "api.py", "images.py", "method.py", "triggers.py", "describe.py", "kit.py",
)  # fmt: skip


@dataclass(frozen=True)
class Wanted:
    """A method to describe: what was selected and every parameter set for it (presets, `--set`, typed).

    lenient: nobody named it, so what is wrong with it comes back in `Described.problem` instead of as an error.
    """

    kind: Kind | Literal["recipe"]
    selection: Selection
    params: Mapping[str, Any] = field(default_factory=dict)
    lenient: bool = False


@dataclass(frozen=True)
class Described:
    """One configured method. identity: what enters keys; needs: name -> {"kind", "method", "verdict"}; knows: what it
    is told itself; told: that, and what reaches it through the stages that it needs; problem: why its cells fail
    before they are begun; plugin: None for a recipe.
    """

    kind: str
    label: str
    full_name: str
    target: str
    suffix: str
    params: Mapping[str, Any]
    version: int
    repr: str
    identity: Mapping[str, Any]
    knows: tuple[str, ...] = ()
    uses_labels: bool | None = None
    told: tuple[str, ...] = ()
    detects: bool = False
    needs: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    attack_target: int | None = None
    attack_control: Mapping[str, Any] = field(default_factory=dict)  # {"set", "params"} of its ablation
    attack_controls: str = "data"
    budget: str = "full"
    toy: bool = False
    plugin: Plugin | None = None
    problem: str = ""

    @property
    def blame(self) -> str:
        """Whose failure a cell is, without a path of this machine: package, version, file, and how to go on without it.

        Example: `bbmcl-mydef 1.0, bbmcl_mydef/method.py; skip it with BBMCL_DISABLE=mydef`
        """
        if self.plugin is None:
            return ""
        module = self.target.partition(":")[0]
        source = caches.source(module)
        suffix = "/__init__.py" if source is not None and source.name == "__init__.py" else ".py"
        way = "leave it out" if self.plugin.dist == DIST else f"skip it with BBMCL_DISABLE={self.plugin.skip}"
        return f"{self.plugin.dist} {self.plugin.version}, {module.replace('.', '/')}{suffix}; {way}"

    def broken(self, problem: str) -> Described:
        """The same method as one whose cells fail with this line; it needs and is told nothing."""
        identity = {"name": self.full_name, "problem": problem}
        return replace(self, identity=identity, problem=problem, needs={}, knows=(), told=())

    @property
    def spec(self) -> dict[str, Any]:
        """What a job needs to construct the object again."""
        return {
            "kind": self.kind,
            "target": self.target,
            "suffix": "",
            "params": dict(self.params),
            "name": self.full_name,
        }


class Registry:
    """The methods of an installation.

    cache: folder of descriptions; timeout: seconds that a child may take; say: told of what takes seconds; warm: the
    fork server is needed in any case, so that its children read classes.
    """

    def __init__(
        self, plugins: Plugins, cache: Path, timeout: float = 120.0, say: Callable[[str], None] = lambda line: None,
        warm: bool = False,
    ) -> None:  # fmt: skip
        self.warm = warm
        self.say = say
        self.said = False
        self.plugins = plugins
        self.cache = cache / "descriptions"
        self.timeout = timeout

    def find(self, kind: Kind, name: str) -> Offer:
        """The offer called `name` or `dist/name`. Raises UserError with the nearest name, or with both of two."""
        offers = self.plugins.of(kind)
        hits = [o for o in offers if name in (o.entry.name, o.full_name)]
        if len(hits) == 1:
            return hits[0]
        if hits:
            both = " and ".join(o.full_name for o in hits)
            raise UserError(f"{kind} {name!r} is offered by two packages; write {both.replace(' and ', ' or ')}")
        names = [o.entry.name for o in offers]
        close = difflib.get_close_matches(name, names, 1, 0.5)
        hint = f"did you mean {close[0]!r}?" if close else f"there are: {', '.join(names) or 'none'}."
        raise UserError(f"unknown {kind} {name!r}; {hint} See: bbmcl plugins")

    def describe(self, wanted: Sequence[Wanted]) -> list[Described]:
        """Configured objects for `wanted`, in order; one child answers whatever the cache does not hold.

        Raises UserError for a bad parameter and, with the plugin's name, for a class that cannot be used.
        """
        requests = [self._request(want) for want in wanted]
        replies = self._ask([request for request, _ in requests])
        out = []
        for want, (request, offer), reply in zip(wanted, requests, replies, strict=True):
            if "error" in reply:
                line = str(reply["error"])
                if want.kind == "recipe" and line.startswith("recipe:"):  # as the user knows it: train or defend
                    line = want.selection.name + line[len("recipe") :]
                if not want.lenient:
                    raise UserError(str(Problem(offer.plugin, line)) if offer and "broken" in reply else line)
                nothing = {"params": {}, "version": 0, "repr": want.selection.label, "identity": {}}
                out.append(_described(want, request, offer, nothing).broken(line))
                continue
            described = _described(want, request, offer, reply["ok"])
            out.append(described if offer is None else replace(described, needs=self._own(described.needs, offer)))
        return out

    def card(self, offer: Offer) -> dict[str, Any]:
        """The card of a method, for `bbmcl show`. Raises PluginError for a broken plugin."""
        request = {"ask": "card", "kind": offer.kind, "target": offer.entry.target, "dist": _dist(offer)}
        reply = self._ask([request])[0]
        if "error" in reply:
            raise PluginError(str(Problem(offer.plugin, reply["error"])))
        ok: dict[str, Any] = reply["ok"]
        return ok

    def _own(self, needs: Mapping[str, Mapping[str, Any]], offer: Offer) -> dict[str, Mapping[str, Any]]:
        """`needs`, their names those of the same package where it and another one offer them: whoever else brings a
        method of that name does not change what this one rests on.
        """
        out: dict[str, Mapping[str, Any]] = {}
        for name, need in needs.items():
            fields = {"method": PROVIDERS[need["kind"]], "verdict": "inverter"}
            texts = {part: self._full(kind, need[part], offer.plugin.dist) for part, kind in fields.items()}
            out[name] = {**need, **texts}
        return out

    def _full(self, kind: str, text: str | None, dist: str) -> str | None:
        if text is None or kind == "recipe":
            return text
        try:
            name = selection(text).name
        except UserError:  # said where it is looked up
            return text
        owners = [o.plugin.dist for o in self.plugins.offers if (o.kind, o.entry.name) == (kind, name)]
        return f"{dist}/{text.strip()}" if len(owners) > 1 and dist in owners else text

    def code(self, target: str) -> str:
        """SHA-256 (hex) of the files behind a class: what was derived from it is stale once this changes."""
        return _code(target)

    def _request(self, want: Wanted) -> tuple[dict[str, Any], Offer | None]:
        offer = None if want.kind == "recipe" else self.find(want.kind, want.selection.name)
        target = RECIPE if offer is None else offer.entry.target
        params = {**want.params, **want.selection.params}
        request = {
            "ask": "describe",
            "kind": want.kind,
            "target": target,
            "suffix": want.selection.suffix,
            "params": params,
        }
        return {**request, "dist": _dist(offer)}, offer

    def _ask(self, requests: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        files = [self.cache / f"{cells.key({'request': r, 'code': _code(r['target'])})}.json" for r in requests]
        replies = [caches.read(file) for file in files]
        missing = [i for i, reply in enumerate(replies) if reply is None]
        if missing:
            if not self.said:
                self.say("reading methods (once: what they say is kept)")
                self.said = True
            fresh = self._child([requests[i] for i in missing])
            for i, reply in zip(missing, fresh, strict=True):
                replies[i] = reply
                if "ok" in reply:
                    caches.write(files[i], reply)
        return [reply or {} for reply in replies]

    def _child(self, requests: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        replies = children.ask("backdoorbench_mcl.describe", requests, self.timeout, self.warm)
        return [
            {"error": f"{request['target']} {reply['fate']}", "broken": True} if "fate" in reply else reply
            for request, reply in zip(requests, replies, strict=True)
        ]


def _dist(offer: Offer | None) -> list[str]:
    return [DIST, ""] if offer is None else [offer.plugin.dist, offer.plugin.version]


def _described(want: Wanted, request: Mapping[str, Any], offer: Offer | None, ok: Mapping[str, Any]) -> Described:
    dataset = ok.get("dataset", {})
    return Described(
        kind=want.kind,
        label=want.selection.label,
        full_name=f"{DIST}/recipe" if offer is None else offer.full_name,
        target=request["target"],
        suffix=want.selection.suffix,
        params=ok["params"],
        version=ok["version"],
        repr=ok["repr"],
        identity={
            "name": f"{DIST}/recipe" if offer is None else offer.full_name,
            "version": ok["version"],
            "params": ok["identity"],
        },
        knows=tuple(ok.get("knows", ())),
        told=tuple(ok.get("knows", ())),
        uses_labels=ok.get("uses_labels"),
        needs=ok.get("needs", {}),
        detects=ok.get("detects", False),
        attack_target=ok.get("attack", {}).get("target"),
        attack_control=ok.get("attack", {}).get("control", {}),
        attack_controls=ok.get("attack", {}).get("controls", "data"),
        budget=dataset.get("budget", "full"),
        toy=dataset.get("toy", False),
        plugin=None if offer is None else offer.plugin,
    )


@functools.cache
def _code(target: str) -> str:
    """SHA-256 over the files that a class can depend on: its top-level package and the contracts of this one."""
    return caches.code(target.partition(":")[0], _CONTRACTS)


__all__ = ["DIST", "PROVIDERS", "Described", "Registry", "Wanted", "cache_folder"]
