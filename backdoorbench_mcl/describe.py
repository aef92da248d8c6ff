"""What a child says of classes (see `children`).

Importing a plugin's class may cost seconds (torch), print, hang, exit or crash. It happens here, so that the
driver answers at once, and learns of every class only what this process wrote down.
"""

from __future__ import annotations

import importlib
import json
import sys
import typing
from collections.abc import Mapping
from typing import Any

from . import api, caches
from .errors import BbmclError, PluginError
from .method import Method, schema

BASES: Mapping[str, type[Method]] = {
    "attack": api.Attack,
    "model": api.Model,
    "inverter": api.Inverter,
    "defense": api.Defense,
    "dataset": api.Dataset,
    "recipe": api.Recipe,
}

NEEDS: Mapping[str, tuple[str, ...]] = {
    "attack": ("model",), "inverter": ("trigger",), "defense": ("trigger", "verdict", "result"),
}  # fmt: skip
CONTROLS = typing.get_args(typing.get_type_hints(api.Attack)["controls"].__args__[0])
SURROGATES = ("natural", "robust")  # recipes of clean models that an attack may need


def load_class(target: str, kind: str) -> type[Method]:
    """The class behind `"module:Class"`; raises PluginError where it is missing, of another kind or abstract."""
    module, _, name = target.partition(":")
    try:
        found = getattr(importlib.import_module(module), name)
    except (Exception, SystemExit) as error:
        raise PluginError(f"cannot import {target}: {type(error).__name__}: {error}") from error
    base = BASES[kind]
    if not (isinstance(found, type) and issubclass(found, base)):
        raise PluginError(
            f"{target} is no {base.__name__}; derive the class from backdoorbench_mcl.api.{base.__name__}"
        )
    missing = sorted(getattr(found, "__abstractmethods__", ()))
    if issubclass(found, api.Attack):
        if found.controls not in CONTROLS:
            raise PluginError(f"{target}: controls is {found.controls!r}, expected one of {', '.join(CONTROLS)}")
        own = "train" if found.controls == "training" else "poison"
        missing = sorted([*missing, own]) if getattr(found, own) is getattr(api.Attack, own) else missing
    if missing:
        raise PluginError(f"{target} lacks {'(), '.join(missing)}()")
    return found


def construct(target: str, kind: str, suffix: str, params: Mapping[str, Any]) -> Method:
    """An instance of the class with a family's suffix and parameters; what is typed outright beats the suffix."""
    cls = load_class(target, kind)
    return cls(**{**(cls.parse(suffix) if suffix else {}), **params})


def jsonable(value: Any) -> Any:
    """Tuples as lists, all else as JSON has it; raises PluginError for a parameter that JSON cannot hold."""
    try:
        return json.loads(json.dumps(value, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise PluginError(f"parameter value {value!r} has no JSON form; use numbers, text, booleans, lists") from error


def describe(request: Mapping[str, Any]) -> dict[str, Any]:
    """What the driver must know of one configured object: parameters, identity, declarations."""
    method = construct(request["target"], request["kind"], request["suffix"], request["params"])
    out: dict[str, Any] = {
        "params": jsonable(method.params),
        "identity": _identity(method),
        "version": method.version,
        "repr": repr(method),
    }
    if isinstance(method, api.Attack):
        out["attack"] = {
            "target": method.target, "control": _control(method, request), "controls": method.controls,
        }  # fmt: skip
    elif isinstance(method, api.Dataset):
        out["dataset"] = {"budget": method.budget, "toy": method.toy}
    if isinstance(method, (api.Attack, api.Inverter, api.Defense)):
        out["needs"] = {name: _need(method, name, need) for name, need in method.needs().items()}
    if isinstance(method, (api.Inverter, api.Defense)):
        out["knows"] = sorted(method.knows)
    if isinstance(method, api.Inverter):
        out["detects"] = type(method).detect is not api.Inverter.detect
    if isinstance(method, api.Defense):
        out["uses_labels"] = bool(method.uses_labels)
    return out


def _identity(method: Method) -> dict[str, Any]:
    """The parameters that enter keys: all but those added later, at the value that stands for what was before."""
    params: dict[str, Any] = jsonable(method.params)
    return {k: v for k, v in params.items() if not (k in method.added and jsonable(method.added[k]) == v)}


def _control(attack: api.Attack, request: Mapping[str, Any]) -> dict[str, Any]:
    """What `attack.ablation` changes, and the identity of the attack with it; {} for what is its own control already.

    Raises PluginError where it names no parameter.
    """
    unknown = sorted(set(attack.ablation) - set(attack.params))
    if unknown:
        raise PluginError(f"{attack.name}: ablation names {', '.join(unknown)}, no parameter of its constructor")
    changed = {name: value for name, value in attack.ablation.items() if attack.params[name] != value}
    if not changed:
        return {}
    other = construct(request["target"], request["kind"], request["suffix"], {**request["params"], **changed})
    return {"set": jsonable(changed), "params": _identity(other)}


def _need(method: Method, name: str, need: api.Need) -> dict[str, Any]:
    """A declared need as JSON; raises PluginError where methods of that kind cannot have it, or its name is no name."""
    kind = next(kind for kind, base in BASES.items() if isinstance(method, base))
    if need.kind not in NEEDS[kind]:
        raise PluginError(f"{method.name}: need {name!r} is a {need.kind}; {kind}s may need {', '.join(NEEDS[kind])}")
    if not name.isidentifier():
        raise PluginError(f"{method.name}: need {name!r}: expected a Python name, as in 'trigger'")
    if need.verdict is not None and (need.kind != "trigger" or kind != "defense"):
        raise PluginError(f"{method.name}: need {name!r}: only a trigger that a defense needs can rest on a verdict")
    if need.kind == "model" and need.method not in SURROGATES:
        raise PluginError(f"{method.name}: need {name!r} is a model {need.method!r}; there are {', '.join(SURROGATES)}")
    return {"kind": need.kind, "method": need.method, "verdict": need.verdict}


def card(request: Mapping[str, Any]) -> dict[str, Any]:
    """For `bbmcl show`: the module's card, the class's docstring, parameters with bounds and defaults."""
    cls = load_class(request["target"], request["kind"])
    module = sys.modules[cls.__module__]
    return {
        "class": f"{cls.__module__}:{cls.__qualname__}",
        "version": cls.version,
        "paper": cls.paper,
        "card": (module.__doc__ or "").strip(),
        "doc": (cls.__doc__ or "").strip(),
        "schema": schema(cls).model_json_schema(),
    }


def answer(request: Mapping[str, Any]) -> dict[str, Any]:
    """One reply: `{"ok": ...}`, or `{"error": line}`, with `"broken"` where nothing that was typed is to blame."""
    try:
        told = card(request) if request["ask"] == "card" else describe(request)
        return {"ok": told, "beside": caches.beside(request["target"].partition(":")[0], OURS)}
    except PluginError as error:
        return {"error": str(error), "broken": True}
    except BbmclError as error:
        return {"error": str(error)}
    except (Exception, SystemExit) as error:  # whatever a plugin's constructor raises is the plugin's
        return {"error": f"{request['target']}: {type(error).__name__}: {error}"}


OURS = frozenset(sys.modules)  # what is imported before any plugin
