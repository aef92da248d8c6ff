"""What `--arch` names, and which normalisation a network was trained with. Free of torch."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from . import nearby, params
from .engines.base import FUNCTION
from .errors import UserError
from .registry import Described, Registry, Wanted

_NAME = r"[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*"
_FUNCTION = re.compile(rf"({_NAME}):({_NAME})", re.ASCII)
SIZES = (32, 64, 96, 224)  # of images, that weights are tried with where none is given: the preferred one first
LOOKED_AT = 1000  # images that tell a normalisation
MARGIN = 3.0  # points by which one normalisation has to be better than all others


def described(registry: Registry, text: str, folder: Path | None = None) -> Described:
    """The architecture that was typed: a registered model, `wrn-16-1` or `torchvision:resnet18`, or `module:function`.

    folder: where modules of the user's lie, None for the working directory. Files that a function rests on are part of
    its identity. Raises UserError for an unknown model, and where there is no such module.
    """
    text = text.strip()
    found = _FUNCTION.fullmatch(text)
    families = [name for offer in registry.plugins.of("model") for name in (offer.entry.name, offer.full_name)]
    if found is not None and found[1] not in families:
        return _function(text, found[1], folder or Path.cwd(), families)
    if ".py:" in text:
        raise UserError(f"--arch {text!r}: expected the name of a module, as in mynet:build for mynet.py")
    return registry.describe([Wanted("model", params.selection(text))])[0]


def _function(text: str, module: str, folder: Path, families: Sequence[str]) -> Described:
    source = nearby.digest(module, folder)
    if not source:
        close = difflib.get_close_matches(module, families, 1, 0.7)
        hint = f"; did you mean {close[0]}:{text.partition(':')[2]}?" if close else ""
        raise UserError(
            f"--arch {text}: there is no module {module!r} in the working directory, and none is installed{hint}"
        )
    identity = {"name": text, "version": 1, "params": {"function": text}, "source": source}
    return Described(
        kind="model", label=text, full_name=text, target=FUNCTION, suffix="", params={"function": text}, version=1,
        repr=f"Function(function={text!r})", identity=identity,
    )  # fmt: skip


# ---------------------------------------------------------------- normalisation


def distinct(candidates: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Candidates, each with "name", "mean" and "std", without those whose constants an earlier one has."""
    kept: dict[tuple[Any, ...], Mapping[str, Any]] = {}
    for one in candidates:
        kept.setdefault((tuple(one["mean"]), tuple(one["std"])), one)
    return list(kept.values())


def choose(accuracy: Mapping[str, float], margin: float = MARGIN) -> str:
    """The normalisation with the best accuracy, in %, if it is more than `margin` points ahead of the second.

    accuracy: by name, of candidates with constants of their own (`distinct`), at least one. Raises UserError with all
    of them, and how to name the right one. Example: `choose({"cifar10": 91.2, "imagenet": 84.0})` is `cifar10`
    """
    best, *others = sorted(accuracy, key=lambda name: -accuracy[name])
    if not others or accuracy[best] - accuracy[others[0]] > margin:
        return best
    told = ", ".join(f"{name} {accuracy[name]:.1f} %" for name in [best, *others])
    raise UserError(
        f"which normalisation the network was trained with cannot be told: right on labelled clean images are {told}, "
        f"expected one more than {margin:g} points ahead; choose with --norm {'|'.join(accuracy)}, or give its "
        "constants with --mean and --std"
    )


__all__ = ["LOOKED_AT", "MARGIN", "SIZES", "choose", "described", "distinct"]
