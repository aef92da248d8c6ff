"""Names to methods: look up, describe in a child, cache. Free of torch.

A description (resolved parameters, version, declarations) is cached under the hash of everything that it can
depend on: the request, the files of the plugin's top-level package, the distribution's version and the contracts.
"""

from __future__ import annotations

import difflib
import functools
import hashlib
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import platformdirs

from . import cells
from .errors import PluginError, UserError
from .params import Selection
from .plugins import Kind, Offer, Plugins

DIST = "backdoorbench-mcl"
RECIPE = "backdoorbench_mcl.api:Recipe"


def cache_folder(environ: Mapping[str, str] = os.environ) -> Path:
    """`BBMCL_CACHE`, or the user's cache folder: descriptions and prepared data sets, all of it rebuildable."""
    given = environ.get("BBMCL_CACHE")
    return Path(given) if given else Path(platformdirs.user_cache_dir("bbmcl", appauthor=False))


@dataclass(frozen=True)
class Wanted:
    """A method to describe: what was selected and every parameter set for it (presets, `--set`, typed)."""

    kind: Kind | Literal["recipe"]
    selection: Selection
    params: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Described:
    """One configured method. identity: what enters keys; needs: name -> {"kind", "method", "verdict"}; knows: what it
    is told itself; told: that, and what reaches it through the stages that it needs.
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

    cache: folder of descriptions; timeout: seconds that a child may take; say: told of what takes seconds.
    """

    def __init__(
        self, plugins: Plugins, cache: Path, timeout: float = 120.0, say: Callable[[str], None] = lambda line: None
    ) -> None:
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

        Raises UserError for a bad parameter, PluginError for a broken plugin.
        """
        requests = [self._request(want) for want in wanted]
        replies = self._ask([request for request, _ in requests])
        out = []
        for want, (request, offer), reply in zip(wanted, requests, replies, strict=True):
            if "error" in reply:
                line = str(reply["error"])
                if want.kind == "recipe" and line.startswith("recipe:"):  # as the user knows it: train or defend
                    line = want.selection.name + line[len("recipe") :]
                raise UserError(line)
            out.append(_described(want, request, offer, reply["ok"]))
        return out

    def card(self, offer: Offer) -> dict[str, Any]:
        """The card of a method, for `bbmcl show`. Raises PluginError for a broken plugin."""
        request = {"ask": "card", "kind": offer.kind, "target": offer.entry.target, "dist": _dist(offer)}
        reply = self._ask([request])[0]
        if "error" in reply:
            raise PluginError(f"plugin {offer.plugin.id}: {reply['error']}")
        ok: dict[str, Any] = reply["ok"]
        return ok

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
        replies = [_read(file) for file in files]
        missing = [i for i, reply in enumerate(replies) if reply is None]
        if missing:
            if not self.said:
                self.say("reading methods (once: what they say is kept)")
                self.said = True
            fresh = self._child([requests[i] for i in missing])
            for i, reply in zip(missing, fresh, strict=True):
                replies[i] = reply
                if "ok" in reply:
                    _write(files[i], reply)
        return [reply or {} for reply in replies]

    def _child(self, requests: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        with tempfile.TemporaryDirectory(prefix="bbmcl-describe-") as folder:
            asked, told = Path(folder, "requests.json"), Path(folder, "replies.json")
            asked.write_text(json.dumps(requests))
            command = [sys.executable, "-m", "backdoorbench_mcl.describe", str(asked), str(told)]
            try:
                done = subprocess.run(
                    command, stdin=subprocess.DEVNULL, capture_output=True, timeout=self.timeout, check=False
                )
                fate = f"ended its process with status {done.returncode}"
            except subprocess.TimeoutExpired:
                fate = f"did not answer within {self.timeout:.0f} s"
            if told.exists():
                replies: list[dict[str, Any]] = json.loads(told.read_text())
                return replies
        if len(requests) == 1:
            return [{"error": f"{requests[0]['target']} of {requests[0]['dist'][0]} {fate}"}]
        return [self._child([request])[0] for request in requests]  # one by one: who was it?


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
    )


@functools.cache
def _code(target: str) -> str:
    """SHA-256 over the files that a class can depend on: its top-level package and the contracts of this one."""
    top = target.partition(":")[0].partition(".")[0]
    files = [
        Path(__file__).with_name(name)
        for name in (
            "api.py",
            "images.py",
            "method.py",
            "triggers.py",
            "describe.py",
            "kit.py",
        )
    ]
    spec = importlib.util.find_spec(top)
    if spec is None:
        return "absent"
    if top != __package__:
        for folder in spec.submodule_search_locations or ():
            files.extend(sorted(Path(folder).rglob("*.py")))
        if spec.origin and not spec.submodule_search_locations:
            files.append(Path(spec.origin))
    digest = hashlib.sha256(sys.version.encode())
    for file in files:
        digest.update(file.name.encode() + hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()


def _read(file: Path) -> dict[str, Any] | None:
    try:
        found = json.loads(file.read_text())
    except (OSError, ValueError):  # absent or damaged: ask again
        return None
    return found if isinstance(found, dict) and "ok" in found else None


def _write(file: Path, reply: Mapping[str, Any]) -> None:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        scratch = file.with_name(f"{file.name}.{os.getpid()}")
        scratch.write_text(json.dumps(reply))
        scratch.replace(file)
    except OSError:  # a read-only cache costs two seconds a run, not the run
        return


__all__ = ["DIST", "Described", "Registry", "Wanted", "cache_folder"]
