"""The jobs that look for a trigger: a verdict names suspicious labels, an inversion fits triggers to labels."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor

from . import api, kit
from .errors import Diverged, PluginError
from .job import Job, Tick, attack_state, label_key, require_finite

_TICK = "harness.tick"  # in the meta of an inverter's snapshot


@dataclass
class _Search:
    """Passes ticks and snapshots on and keeps the last tick, which tells how far a search went. A snapshot keeps it
    too, so that a search that had ended when it was killed says the same again.
    """

    forward: Tick
    snapshot: api.Snapshot
    done: int | None = None
    total: int | None = None

    def tick(self, done: int, total: int, images: int) -> None:
        self.done, self.total = done, total
        self.forward(done, total, images)

    def load(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        found = self.snapshot.load()
        if found is None:
            return None
        tensors, meta = found
        self.done, self.total = meta.pop(_TICK, (None, None))
        return tensors, meta

    def save(self, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
        self.snapshot.save(tensors, {**meta, _TICK: [self.done, self.total]})

    def meta(self) -> dict[str, Any]:
        """steps: of its optimiser; stopped_early: it had more left. Both None where there was no search."""
        early = None if self.done is None or self.total is None else self.done < self.total
        return {"steps": self.done, "stopped_early": early}


def _context(job: Job, name: str, label: int | None = None) -> api.InverterContext:
    """What an inverter is handed; label: the one at hand of those that a verdict flagged, with snapshots of its own."""
    # of the common recipe only the augmentation is in an inversion's key, so no more of it is handed over
    recipe = api.Recipe(augment=cast(api.Recipe, job.method("recipe")).augment)
    grants = job.spec.get("grants", {})
    granted: dict[str, Any] = {"location": api.Location(*grants["location"])} if "location" in grants else {}
    if "attack" in job.spec:
        state, attack = attack_state(job), job.spec["attack"]
        granted["trigger"] = api.TrueTrigger(attack["target"], attack["params"], state.tensors, state.meta)
    own = job.context(job.rng("invert"), recipe, "" if label is None else f"label-{label}")
    if label is not None:  # or the curves of two searches would be one
        own["record"] = lambda curve, step, value: job.record(f"{curve}, label {label}", step, value)
    return api.InverterContext(
        **own,
        clean=job.clean(),
        needs={name: found if label is None else found[label] for name, found in job.needs().items()},
        granted=api.Granted(name, granted),
    )


def verdict(job: Job) -> None:
    """What a detector says of the victim. meta: flagged labels, anomaly index and norm of every label."""
    inverter = cast(api.Inverter, job.method("inverter"))
    found = inverter.detect(job.victim(), _context(job, inverter.name))
    if not isinstance(found, api.Verdict) or len(found.index) != job.spec["data"]["classes"]:
        raise PluginError(f"{inverter.name}: detect() must return a Verdict with an index for each label")
    if not all(math.isfinite(value) for value in (*found.index, *found.norms)):
        raise Diverged(f"{inverter.name}: an anomaly index or a norm is not finite")
    job.save_meta({"flagged": list(found.flagged), "index": list(found.index), "norms": list(found.norms)})


def invert(job: Job) -> None:
    """An inverted trigger, or one for each label that a verdict flagged. out: trigger, its tensors' names under the
    label in the second case; meta: its class, how good it is and how long its search was, measured here.
    """
    inverter, victim = cast(api.Inverter, job.method("inverter")), job.victim()
    tensors: dict[str, Tensor] = {}
    quality: list[dict[str, Any]] = []
    where = "backdoorbench_mcl.api:Trigger"  # of no label at all
    for label in job.spec["labels"]:
        context = _context(job, inverter.name, int(label) if job.spec["detected"] else None)
        search = _Search(context.tick, context.snapshot)
        watched = replace(context, tick=search.tick, snapshot=search)
        trigger = inverter.invert(kit.frozen(victim), int(label), watched)
        if not isinstance(trigger, api.Trigger):
            raise PluginError(f"{inverter.name}: invert() returned {type(trigger).__name__}, expected a Trigger")
        own = trigger.tensors()
        require_finite(own)
        judged = _quality(victim, trigger, int(label), context.clean, job.rng("stamp"), own.get("mask"))
        quality.append({**judged, **search.meta()})
        tensors.update({label_key(label, name) if job.spec["detected"] else name: own[name] for name in own})
        found = f"{type(trigger).__module__}:{type(trigger).__qualname__}"
        if quality[1:] and found != where:
            raise PluginError(f"{inverter.name}: invert() returned triggers of two classes, {where} and {found}")
        where = found
    job.save("trigger", tensors)
    unknown = dict.fromkeys(("success", "l1", "pixels_changed", "steps", "stopped_early"))
    first = quality[0] if quality else {**unknown, "success_k": 0, "success_n": 0}
    modules = [where, *([job.spec["attack"]["target"]] if "attack" in job.spec else [])]
    modules += [module for need in job.spec.get("needs", {}).values() for module in need["modules"]]
    about = {field: job.spec[field] for field in ("labels", "detected")}
    job.save_meta({**first, **about, "class": where, "modules": modules, "each": quality})


def _quality(
    victim: api.Classifier, trigger: api.Trigger, target: int, clean: api.Images, rng: torch.Generator,
    mask: Tensor | None,
) -> dict[str, Any]:  # fmt: skip
    """success: the share of clean images, not already called the target by the victim, that the trigger sends to it.

    Labels are not granted to an inversion, so the victim's own prediction stands in for them.
    """
    hit, other, changed = 0, 0, 0.0
    with torch.no_grad():
        for batch in clean.batches(min(256, kit.at_once(clean.x))):
            away = victim(batch.x).argmax(1) != target
            stamped = trigger.apply(batch.x, rng).clamp(0, 1)
            hit += int(((victim(stamped).argmax(1) == target) & away).sum())
            other += int(away.sum())
            changed += float(((stamped - batch.x).abs().amax(1) > 1 / 255).float().sum())
    return {
        "success": 100 * hit / other if other else None,
        "success_k": hit,
        "success_n": other,
        "l1": None if mask is None else float(mask.abs().sum()),
        "pixels_changed": changed / len(clean),
    }


__all__ = ["invert", "verdict"]
