"""`bbmcl new` writes a package with a working method; `bbmcl check` finds what it is to look at. Free of torch."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any, get_args

from . import __version__, plugins
from .errors import UserError
from .hooks import Entry
from .needed import check_declarations
from .params import selection
from .plugins import Kind
from .registry import Registry, Wanted

KINDS: tuple[Kind, ...] = get_args(Kind)
RESERVED = frozenset({"all", "none", "before", "train", "defend", "natural", "robust"})  # selections and recipes
SUMMARIES: Mapping[str, str] = {  # of the templates
    "attack": "a grey square in the corner", "defense": "fine-tune with smoothed labels",
    "inverter": "mask and pattern by Adam", "model": "three convolutions", "dataset": "stripes at four angles",
}  # fmt: skip
TRY: Mapping[str, str] = {
    "attack": "bbmcl matrix --attacks badnets,mymethod --defenses ft",
    "defense": "bbmcl matrix --attacks badnets --defenses mymethod,mcldef",
    "inverter": "bbmcl matrix --attacks badnets --defenses 'mcldef,mcldef(inverter=mymethod)'",
    "model": "bbmcl matrix --model mymethod --attacks badnets --defenses ft",
    "dataset": "bbmcl matrix --dataset mymethod --attacks badnets --defenses ft",
}


def new(kind: str, name: str, into: Path) -> list[Path]:
    """Write a package with a working method of `kind` into the folder `into`/bbmcl-NAME; returns its files.

    Raises UserError for a kind or a name that cannot be, and for a folder that exists.
    """
    if kind not in KINDS:
        raise UserError(f"unknown kind {kind!r}; expected one of {', '.join(KINDS)}")
    try:
        Entry(name, "module:Class")
    except ValueError as error:
        raise UserError(f"{error}; a word starts with a letter") from error
    if not re.fullmatch(r"[a-z][a-z0-9-]*", name):
        raise UserError(f"name {name!r}: for a package expected letters, digits and '-' alone, as in 'fine-pruning'")
    if name in RESERVED:
        raise UserError(f"name {name!r} means something to bbmcl; choose another")
    if any(name == offer.entry.name for offer in plugins.load().of(kind)):
        raise UserError(f"there is a {kind} {name!r} already (bbmcl show {name}); choose another name")
    folder = into / f"bbmcl-{name}"
    if folder.exists():
        raise UserError(f"{folder} exists; choose another name or another folder (--into)")
    module = "bbmcl_" + name.replace("-", "_")
    files = {
        "pyproject.toml": "pyproject.txt", "README.md": "readme.txt", f"{module}/__init__.py": "entry.txt",
        f"{module}/method.py": f"{kind}.py", f"tests/test_{name.replace('-', '_')}.py": "test.txt",
    }  # fmt: skip
    written = []
    for file, template in files.items():
        path = folder / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(_filled(template, kind, name))
        written.append(path)
    return written


def _filled(template: str, kind: str, name: str) -> str:
    text = _template(template)
    marks = {"@TRY@": TRY[kind], "@KIND@": kind, "@SUMMARY@": SUMMARIES[kind], "@VERSION@": __version__}
    for mark, value in marks.items():
        text = text.replace(mark, value)
    cls = "".join(word.capitalize() for word in name.split("-"))
    around = [_template(one) for one in (f"{kind}.py", "entry.txt", "test.txt")]
    if any(re.search(rf"\b{cls}\b", one) for one in around):  # `rate`: `Rate` is imported there
        cls += kind.capitalize()
    text = text.replace("bbmcl_mymethod", "bbmcl_" + name.replace("-", "_"))
    return text.replace("MyMethod", cls).replace("mymethod", name)


def _template(name: str) -> str:
    return (resources.files("backdoorbench_mcl.templates") / name).read_text()


def subjects(registry: Registry, text: str, kind: str | None = None) -> list[dict[str, Any]]:
    """What `checking.run` needs of the methods that the selection `text` names: of one kind, or of every kind that has
    one of that name. Raises UserError where there is none, PluginError for one that a matrix would refuse.
    """
    chosen = selection(text)
    if kind is not None and kind not in KINDS:
        raise UserError(f"unknown kind {kind!r}; expected one of {', '.join(KINDS)}")
    kinds = [one for one in KINDS if kind in (None, one)]
    offered = [k for k in kinds if any(chosen.name in (o.entry.name, o.full_name) for o in registry.plugins.of(k))]
    if not offered:
        names = sorted({offer.entry.name for k in kinds for offer in registry.plugins.of(k)})
        close = difflib.get_close_matches(chosen.name, names, 1)
        hint = f"did you mean {close[0]!r}?" if close else f"there are: {', '.join(names)}."
        raise UserError(f"unknown {kind or 'method'} {chosen.name!r}; {hint} See: bbmcl plugins")
    found = [registry.describe([Wanted(one, chosen)])[0] for one in offered]
    for one in found:
        if one.kind == "defense":
            check_declarations(one, registry.find("defense", one.full_name))
    return [{"kind": d.kind, "target": d.target, "params": dict(d.params), "label": d.label} for d in found]


__all__ = ["KINDS", "new", "subjects"]
