"""`scan`: a quick search for each label, a full one for what stands out, a verdict. Free of torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file

from .. import artefacts
from ..errors import UserError
from . import verdict
from .chain import Chain, Outcome, Say
from .handed import Handed
from .stages import Stages
from .verdict import Call, Standing


@dataclass(frozen=True)
class Kind:
    """A kind of trigger that is searched for. full: the inverter; lr, steps, batch: of its quick search; measure: of
    its triggers' size.
    """

    name: str
    full: str
    lr: float
    steps: int
    batch: int
    measure: str

    @property
    def coarse(self) -> str:
        """The inverter of the quick search, whatever the budget: with half of the steps masks have not shrunk yet, and
        a backdoored label hides among the others (benchmarks/README.md).
        """
        return f"{self.full}(lr={self.lr},steps={self.steps},batch={self.batch})"


KINDS = (
    Kind("patch", "nc-box", 0.05, 120, 32, "L1 of the mask"),
    Kind("additive", "uap", 0.02, 80, 32, "L2 of the perturbation"),
)


def inverters() -> list[str]:
    """Everything that a scan searches with."""
    return [text for kind in KINDS for text in (kind.coarse, kind.full)]


@dataclass(frozen=True)
class Found:
    """A trigger. kind: of `KINDS`; size in its measure; success in % of the images of other classes (by the model's own
    word) that it sends to `label`; mask float (H, W), None for an additive one; pattern float (C, H, W).
    """

    kind: str
    label: int
    size: float
    success: float | None
    pattern: NDArray[np.float32] = field(repr=False)
    mask: NDArray[np.float32] | None = field(default=None, repr=False)

    def apply(self, x: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Images uint8 (..., C, H, W) with the trigger, rounded."""
        pixels = x / 255.0
        with_it = pixels + self.pattern if self.mask is None else (1 - self.mask) * pixels + self.mask * self.pattern
        rounded: NDArray[np.uint8] = np.rint(255 * with_it.clip(0, 1)).astype(np.uint8)
        return rounded


@dataclass(frozen=True)
class Scan:
    """What a scan says of a model. call: "clean", "suspicious" or "undecided", for `reason`; target, kind: of the
    trigger that it rests on, None where it rests on none; chance: that a clean model has such a label, 0..1.

    labels: how each label stands, by kind of trigger; triggers: of the quick searches; full: of the full searches, that
    of the target first. notes: what the verdict rests on; seconds: that the searches computed, whenever that was.
    """

    call: Call
    reason: str
    target: int | None
    kind: str | None
    chance: float | None
    labels: tuple[Standing, ...]
    triggers: tuple[Found, ...] = field(repr=False)
    full: tuple[Found, ...]
    notes: tuple[str, ...]
    images: int
    seconds: float
    names: tuple[str, ...] | None = None

    def as_dict(self) -> dict[str, Any]:
        """Everything but the pictures, JSON-ready."""
        plain = {
            name: getattr(self, name) for name in ("call", "reason", "target", "kind", "chance", "images", "seconds")
        }
        full = [{name: getattr(one, name) for name in ("kind", "label", "size", "success")} for one in self.full]
        return {
            **plain, "notes": list(self.notes), "full": full,
            "names": None if self.names is None else list(self.names), "labels": [asdict(one) for one in self.labels],
        }  # fmt: skip


def scan(stages: Stages, quick: Chain, thorough: Chain, say: Say = lambda line: None) -> Scan:
    """Search, judge. quick: runs several jobs at once, a core each; thorough: one job on all cores.

    Raises UserError where no search at all succeeds.
    """
    handed = stages.handed
    if handed.classes < 2:
        raise UserError(f"the model has {handed.classes} class; expected at least 2")
    labels = range(handed.classes)
    keys = {(kind, label): stages.invert(kind.coarse, label) for kind in KINDS for label in labels}
    say(f"searching for triggers of {len(KINDS)} kinds for each of {handed.classes} labels")
    made = quick.compute(stages.nodes, list(keys.values()), "searches")
    triggers = {place: trigger_of(place[0].name, place[1], made[key]) for place, key in keys.items()}
    failures = [made[key].reason for key in keys.values() if made[key].folder is None]
    if len(failures) == len(keys):
        raise UserError(f"no search for a trigger succeeded: {failures[0]}")
    standings = [one for kind in KINDS for one in verdict.standings(_sized(kind, handed, triggers), len(KINDS))]
    full, took = _full(stages, thorough, standings, say)
    doubtful = verdict.suspects(standings)
    ruling = verdict.rule(handed.classes, standings, [_success(one) for one in full[: len(doubtful)]])
    on = ruling.on
    best = [one for one in full if one is not None]
    if on is not None:  # the trigger that the verdict rests on comes first
        best.sort(key=lambda one: (one.label, one.kind) != (on.label, on.kind))
    searched = [*made.values(), *took]
    return Scan(
        ruling.call, ruling.reason, None if on is None else on.label, None if on is None else on.kind,
        None if on is None else on.chance, tuple(standings), tuple(one for one in triggers.values() if one is not None),
        tuple(best), tuple(_notes(handed, failures, len(keys))), len(handed.repair),
        sum(one.seconds for one in searched), handed.names,
    )  # fmt: skip


def _sized(kind: Kind, handed: Handed, triggers: dict[tuple[Kind, int], Found | None]) -> verdict.Sized:
    found = [triggers[kind, label] for label in range(handed.classes)]
    sizes = tuple(None if one is None else one.size for one in found)
    return verdict.Sized(kind.name, sizes, tuple(None if one is None else one.success for one in found))


def _full(
    stages: Stages, thorough: Chain, standings: Sequence[Standing], say: Say
) -> tuple[list[Found | None], list[Outcome]]:
    """Full searches for all that stands out; for what stands out most where nothing does."""
    chosen = verdict.suspects(standings) or list(filter(None, [verdict.most_suspicious(standings)]))
    keys = {one: stages.invert(kind_of(one.kind).full, one.label) for one in chosen}
    for one in chosen:
        say(f"a full search for label {stages.handed.name(one.label)} ({one.kind})")
    made = thorough.compute(stages.nodes, list(keys.values()), "full search")
    return [trigger_of(one.kind, one.label, made[keys[one]]) for one in chosen], list(made.values())


def kind_of(name: str) -> Kind:
    """The kind of that name."""
    return next(kind for kind in KINDS if kind.name == name)


def trigger_of(kind: str, label: int, made: Outcome) -> Found | None:
    """The trigger of an inversion, None where that failed."""
    if made.folder is None:
        return None
    tensors = load_file(made.folder / "trigger.safetensors")
    meta = artefacts.read_meta(made.folder)
    pattern, mask = tensors["pattern"].astype(np.float32), tensors.get("mask")
    size = float(np.sqrt((pattern**2).sum())) if mask is None else float(np.abs(mask).sum())
    return Found(kind, label, size, meta["success"], pattern, None if mask is None else mask.astype(np.float32))


def _success(found: Found | None) -> float | None:
    return None if found is None else found.success


def _notes(handed: Handed, failures: Sequence[str], searches: int) -> list[str]:
    out = []
    if failures:
        out.append(f"{len(failures)} of {searches} searches failed: {failures[0]}")
    if handed.classes < 2 * verdict.FEW:
        out.append(f"with {handed.classes} labels the test rests on {handed.classes - 1} others: shallow differences "
                   "are not seen")  # fmt: skip
    if len(handed.repair) < 100:
        out.append(f"{len(handed.repair)} images are few: a trigger may fit them and no others; 500 are better")
    return out


__all__ = ["KINDS", "Found", "Kind", "Scan", "inverters", "kind_of", "scan", "trigger_of"]
