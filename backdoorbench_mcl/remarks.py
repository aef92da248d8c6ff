"""What a row says beyond its score, as pure functions of what its stages left. Free of torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import evaluate
from .registry import DIST
from .rows import Row

QUALITY = ("success", "l1", "pixels_changed", "steps", "stopped_early")  # of an inversion; old ones lack the last two
MARKS = ("strays", "changed")  # fields of a row that say what a method did beside its work
NEAR = 1.0  # %: where more of an attack's images moved by no more than 8 levels, a row says so (`Attack.prepare`)
_RETUNED = ("images", "asr", "ftr", "ba")
EXTRAS: Mapping[str, tuple[str, ...]] = {  # stages beside the score, and the fields of a row that come from them
    **{name: tuple(f"{name}_{field}" for field in _RETUNED) for name in ("retuned", "retuned_clean")}, "embed": (),
}  # fmt: skip


def inversion(meta: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of a row from what an inversion says of itself."""
    return {f"inverter_{name}": meta.get(name) for name in QUALITY}


def verdict(meta: Mapping[str, Any]) -> str:
    """What a detector said. Example: `flagged 5, 2`"""
    named = ", ".join(map(str, meta["flagged"]))
    return f"flagged {named}" if named else "clean"


def surrogates(metas: Sequence[Mapping[str, Any]], attack: object) -> str:
    """The clean models of an attack, {} for one that is gone or damaged, whose pupils may still be there.

    A robust one that does not hold under PGD-10 is called natural (spec 4.4). attack: the meta of its state, as a job
    of its plugin left it; where `linf_weak_share` is above 1 %, these images moved too little to be hard.
    """
    told = []
    for meta in metas:
        pgd = meta.get("pgd")
        if not meta:
            told.append("unknown")
        elif pgd is None:
            told.append("natural")
        elif pgd >= evaluate.ROBUST:
            told.append(f"robust: {pgd:.1f} % under PGD-10")
        else:
            told.append(f"natural: {pgd:.1f} % under PGD-10, {evaluate.ROBUST:g} would be robust")
    share = attack.get("linf_weak_share") if isinstance(attack, Mapping) else None
    if told and isinstance(share, float | int) and NEAR < 100 * share <= 100:
        told[-1] += f", {100 * share:.1f} % of the images moved by at most 8 levels"
    return "; ".join(told)


def marks(numerics: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The fields `MARKS` of a row from those of its stages, each thing once."""
    return {name: tuple(dict.fromkeys(item for one in numerics for item in one.get(name, ()))) for name in MARKS}


def retuned(name: str, predictions: Mapping[str, NDArray[Any]], used: Sequence[int]) -> dict[str, Any]:
    """Fields of a row from the stored predictions (N,) of a re-tuned model, on the test images that its few steps did
    not see. name: of the stage in `EXTRAS`; used: the positions of the images that the steps saw.
    """
    left = {name: np.delete(values, used) for name, values in predictions.items()}
    measured = evaluate.predicted(left)
    return dict(zip(EXTRAS[name], (len(used), *(measured[field] for field in _RETUNED[1:])), strict=True))


def origins(row: Row) -> dict[str, str]:
    """The methods of other packages that a row rests on: label -> distribution. Example: `{"abl": "bbmcl-abl"}`

    Rows know where a method came from by its full name in their parameters; made-up ones need not.
    """
    labels = {"attack": row.attack, "model": row.model, "dataset": row.dataset, "defense": row.defense,
              "inverter": row.inverter or ""}  # fmt: skip
    named = [(label, row.params[role]) for role, label in labels.items() if label and role in row.params]
    named += [pair for role, found in row.params.items() if role.startswith("needs ") for pair in found.items()]
    parted = [(label, str(identity.get("name", "")).rpartition("/")[0]) for label, identity in named]
    return {label: package for label, package in parted if package not in ("", DIST)}


def versions(
    nearest: Mapping[str, str], others: Sequence[Mapping[str, str]], packages: Collection[str]
) -> dict[str, str]:
    """What made a row: `nearest`, the versions of its own stage, and those of `packages` in every stage that it rests
    on. One whose stages were made by several versions has them all. Example: `{"bbmcl-abl": "0.1.0, 0.2.0"}`
    """
    out = dict(nearest)
    for package in sorted(set(packages)):
        found = dict.fromkeys(made[package] for made in (nearest, *others) if package in made)
        if found:
            out[package] = ", ".join(sorted(found))
    return out


def lacking(stored: Row, asked: Mapping[str, str]) -> bool:
    """Whether a stored row was scored without one of the stages beside the score that are asked for (name -> key)."""
    return stored.state == "ok" and any(stored.stages.get(name) != key for name, key in asked.items())


def kept(row: Row, earlier: Row | None, asked: Mapping[str, str]) -> Row:
    """A row scored again, with what an earlier run had beside the score and this one did not ask for."""
    if earlier is None or row.state != "ok":
        return row
    names = [name for name in EXTRAS if name in earlier.stages and name not in asked]
    fields: dict[str, Any] = {field: getattr(earlier, field) for name in names for field in EXTRAS[name]}
    return dataclasses.replace(row, **fields, stages={**row.stages, **{name: earlier.stages[name] for name in names}})


__all__ = [
    "EXTRAS", "MARKS", "QUALITY", "inversion", "kept", "lacking", "marks", "origins", "retuned", "surrogates",
    "verdict", "versions",
]  # fmt: skip
