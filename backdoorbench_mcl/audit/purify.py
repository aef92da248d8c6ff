"""`purify`: a repair of a handed model, judged on images that neither it nor the search saw. Free of torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .. import artefacts, evaluate, params
from ..errors import UserError
from ..registry import Registry, Wanted
from .chain import Chain, Say
from .handed import Handed
from .scan import kind_of
from .stages import ORACLES, Stages

LEAST = 5  # held-out images of a class that tell whether it is still known
Labels = Mapping[str, NDArray[np.int64]]  # of the job `compare`
Compare = Callable[[Path | None, Mapping[int, Path], bool], tuple[Labels, Mapping[str, NDArray[Any]]]]


@dataclass(frozen=True)
class ClassAccuracy:
    """Of the held-out images of one class. before, after: % that the model, and the repaired one, get right."""

    label: int
    images: int
    before: float
    after: float


@dataclass(frozen=True)
class Judgement:
    """A repaired model beside the one that it was made of, on `images` held-out ones; None where that is unknown.

    agreement: % of them that both call the same; ba_before, ba_after: % right; classes: the same by class.
    success_before, success_after: % of the images that a model does not call the target anyway, which the trigger that
    was found sends to it; floor_after: % of images of other classes that the repaired model calls the target without a
    trigger; gone: classes that the model knew and the repaired one hardly says: how a repair forgets a trigger cheaply
    (without labels, classes are what the model calls the images). score: how much of the trigger's success is gone,
    less what clean accuracy was lost (0-100; 50: nothing changed), by which repairs are ranked.
    """

    images: int
    agreement: float | None = None
    ba_before: float | None = None
    ba_after: float | None = None
    classes: tuple[ClassAccuracy, ...] = ()
    success_before: float | None = None
    success_after: float | None = None
    floor_after: float | None = None
    gone: tuple[int, ...] = ()

    @property
    def score(self) -> float | None:
        before = 100.0 if self.ba_before is None else self.ba_before
        after = self.agreement if self.ba_after is None else self.ba_after
        return evaluate.der(self.success_before, self.success_after, before, after)


@dataclass(frozen=True)
class Repair:
    """One attempt. folder: the artefact with the repaired weights, None where it failed for `reason`; rebuild: how the
    network is built again where weights do not tell, {} elsewhere; features: of both models, for pictures.
    """

    defense: str
    target: int | None
    folder: Path | None
    judgement: Judgement
    seconds: float
    uses_labels: bool
    reason: str = ""
    rebuild: Mapping[str, Any] = field(default_factory=dict)
    features: Mapping[str, NDArray[Any]] = field(default_factory=dict, repr=False)

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready, without pictures and places."""
        return {
            "defense": self.defense, "target": self.target, "seconds": self.seconds, "uses_labels": self.uses_labels,
            "reason": self.reason, "score": self.judgement.score, **asdict(self.judgement),
        }  # fmt: skip


def suited(registry: Registry, defense: str, kind: str | None, overrides: Sequence[str] = ()) -> str:
    """`defense` with the inverter that searches for triggers of `kind`, where it takes one and nobody chose another."""
    chosen = params.selection(defense)
    name = chosen.name.rpartition("/")[2]
    if kind is None or "inverter" in {**params.overrides(list(overrides)).get(name, {}), **chosen.params}:
        return chosen.label
    described = registry.describe([Wanted("defense", chosen)])[0]
    wanted = kind_of(kind).full
    if described.params.get("inverter") in (None, wanted):
        return chosen.label
    return f"{chosen.label[:-1]},inverter={wanted})" if chosen.params else f"{chosen.name}(inverter={wanted})"


def usable(registry: Registry, labelled: bool) -> list[str]:
    """Names of the defenses that `--all` tries: told no secret, and in no need of labels that there are none of."""
    offers = registry.plugins.of("defense")
    shared = Counter(offer.entry.name for offer in offers)
    out = []
    for offer in offers:
        if set(offer.entry.may_know) & ORACLES:
            continue
        described = registry.describe([Wanted("defense", params.selection(offer.full_name), lenient=True)])[0]
        if not described.problem and (labelled or not described.uses_labels):
            out.append(offer.entry.name if shared[offer.entry.name] == 1 else offer.full_name)
    return out


def purify(
    stages: Stages, chain: Chain, defense: str, target: int | None, trigger: Path | None, compare: Compare,
    say: Say = lambda line: None,
) -> Repair:  # fmt: skip
    """Repair by `defense`, told `target`, and judge. trigger: the artefact of the search whose trigger is tried on the
    result, None where there is none.

    Raises UserError where the defense needs a target or labels that there are none of.
    """
    handed, described = stages.handed, stages.defenses[defense]
    labels = stages.uses_labels(defense)
    if labels and not handed.labelled:
        raise UserError(f"{defense} learns from labels, and the clean images have none; give labelled ones, or mcldef")
    if target is None and "target" in described.told:
        raise UserError(f"{defense} repairs against a target label, and none was found; name one with --target")
    key = stages.defend(defense, target)
    say(f"repairing with {defense}" + ("" if target is None else f" against label {handed.name(target)}"))
    made = chain.compute(stages.nodes, [key], defense)[key]
    if made.folder is None:
        return Repair(defense, target, None, Judgement(0), made.seconds, labels, made.reason)
    triggers = {} if target is None or trigger is None else {target: trigger}
    told, features = compare(made.folder, triggers, True) if len(handed.held) else ({}, {})
    return Repair(
        defense, target, made.folder, judge(handed, told, target), made.seconds, labels,
        rebuild=rebuild_of(made.folder), features=features,
    )  # fmt: skip


def judge(handed: Handed, told: Labels, target: int | None) -> Judgement:
    """Numbers of both models from their predictions on the held-out images. Example: `judge(handed, {}, None).images`
    is 0.
    """
    if not told:
        return Judgement(0)
    before, after, y = told["before"], told.get("after", told["before"]), handed.y[handed.held]
    out: dict[str, Any] = {
        "images": len(before),
        "agreement": _share(before == after),
    }
    known = handed.labelled
    classes = _classes(y if known else before, before, after)
    out["gone"] = tuple(
        one.label for one in classes if one.images >= LEAST and evaluate.target_class_erased(one.after, one.before)
    )
    if known:
        out |= {"ba_before": _share(before == y), "ba_after": _share(after == y), "classes": classes}
    if target is not None and f"before.{target}" in told:
        out["success_before"] = _share(told[f"before.{target}"][before != target] == target)
        out["success_after"] = _share(told.get(f"after.{target}", told[f"before.{target}"])[after != target] == target)
        others = y != target if known else before != target
        out["floor_after"] = _share(after[others] == target)
    return Judgement(**out)


def _classes(y: NDArray[np.int64], before: NDArray[np.int64], after: NDArray[np.int64]) -> tuple[ClassAccuracy, ...]:
    """How often each class of y is said, by both models."""
    return tuple(
        ClassAccuracy(int(label), int((y == label).sum()),
                      *(_share(made[y == label] == label) or 0.0 for made in (before, after)))
        for label in np.unique(y)
    )  # fmt: skip


def ranked(repairs: Sequence[Repair]) -> list[Repair]:
    """The best first: by score, those that gave up a class after all others, those that failed last."""

    def place(one: Repair) -> tuple[bool, bool, float]:
        return (one.folder is None, bool(one.judgement.gone), -(one.judgement.score or 0.0))

    return sorted(repairs, key=place)


def needs_of(folder: Path) -> dict[str, Any]:
    """What a job's spec says, in `needs`, of the trigger in the artefact of a search."""
    meta = artefacts.read_meta(folder)
    return {"kind": "trigger", **{name: meta[name] for name in ("class", "labels", "modules", "detected")}}


def rebuild_of(folder: Path) -> dict[str, Any]:
    """How the network of a repair is built again, {} where its weights tell."""
    return dict(artefacts.read_meta(folder).get("rebuild") or {})


def _share(hits: NDArray[np.bool_]) -> float | None:
    return evaluate.percent(int(hits.sum()), len(hits))


__all__ = [
    "ClassAccuracy", "Compare", "Judgement", "Repair", "judge", "needs_of", "purify", "ranked", "rebuild_of", "suited",
    "usable",
]  # fmt: skip
