"""Which stages of a plan exist, which cannot, and why: what the loop and the rows go by. Free of torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from . import artefacts
from .artefacts import Damaged
from .plan import Node, Plan
from .progress import Progress as Display
from .store import Stage, Store


@dataclasses.dataclass(frozen=True)
class Failure:
    """Why a stage does not exist. state: "failed", "killed", "timeout", "diverged" or "n/a"; key: the stage, if one;
    blame: whose it is.
    """

    state: str
    reason: str
    key: str = ""
    blame: str = ""


def packages(node: Node) -> set[str]:
    """Distributions whose methods a stage runs."""
    return {method.full_name.rpartition("/")[0] for method in node.methods.values()} - {""}


def finished(
    node: Node, common: Mapping[str, Any], device: str, inputs: Mapping[str, str], result: Mapping[str, Any],
    made: Mapping[str, Any], wall: float,
) -> Stage:  # fmt: skip
    """The record of a stage that a job has computed. common: settings of every job; inputs: role -> name of the
    artefact that it was given; result: of the job; made: "machine", "versions" and "origin" of where it ran; wall:
    seconds with the start of its process and the hand-over of files. What an attempt that was stopped had done of it
    counts as well.
    """
    numerics = {
        "device": device,
        "precision": common["precision"],
        "threads": common["threads"],
        "isolation": result.get("isolation", common["isolation"]),
        "strays": result.get("strays", []),
        "changed": result.get("changed", []),
        "curves": result.get("curves", {}),
        **made,
        "inputs": dict(inputs),
    }
    cost = {name: float(result[name]) for name in ("seconds", "peak_mb", "peak_gpu_mb") if name in result}
    earlier = float(result.get("earlier", 0.0))
    cost |= {"seconds": cost.get("seconds", wall) + earlier, "wall": wall + earlier}
    return Stage(node.key, node.kind, node.spec, "", numerics, cost)


class Standing:
    """The stages of a plan as a store has them now."""

    def __init__(self, plan: Plan, store: Store, display: Display) -> None:
        self.plan = plan
        self.store = store
        self.display = display
        self.stages: dict[str, Stage] = {}
        self.absent: set[str] = set()  # not stored when it was last looked for
        self.failures: dict[str, Failure] = {}
        self.changed: set[str] = set()  # stages that came, went or failed since somebody looked

    def _stage(self, key: str) -> Stage | None:
        """The stage if it exists: what another driver has stored meanwhile counts.

        One that was made from other artefacts than those stored now (imported, or its victim was computed again on
        another machine) is forgotten: no row may compare a repair with a victim that it did not repair.
        """
        if key not in self.stages and key not in self.absent:
            found = self.store.stage(key)
            if found is not None and not self._fits(found):
                self.display.note(f"{self.plan.nodes[key].title}: made from other inputs, computed again")
                self.store.forget(key)
            if found is not None and self.plan.nodes[key].inputs:
                found = self.store.stage(key)  # it went too if what it was made from has just been forgotten
            if found is None:
                self.absent.add(key)
                return None
            self.stages[key] = found
        return self.stages.get(key)

    def _fits(self, stage: Stage) -> bool:
        made_from: Mapping[str, str] = stage.numerics.get("inputs", {})
        for role, key in self.plan.nodes[stage.key].inputs.items():
            source = self._stage(key)
            if source is not None and made_from.get(role, source.artefact) != source.artefact:
                return False
        return True

    def _open(self, key: str) -> Path:
        stage = self._stage(key)
        if stage is None:
            raise Damaged(f"stage {key[:12]} is gone")
        try:
            return self.store.open(stage)
        except Damaged:
            for other in [k for k, s in self.stages.items() if s.artefact == stage.artefact]:
                del self.stages[other]
                self.changed.add(other)
            raise

    def _cause(self, key: str) -> Failure | None:
        """The failure that keeps a stage from existing, however far up; None while there is hope."""
        if key in self.failures:
            return self.failures[key]
        for role, needed in self.plan.nodes[key].inputs.items():
            cause = self._cause(needed)
            if cause is not None:
                node = self.plan.nodes[needed]
                direct = role in ("weights", "trial") or cause is not self.failures.get(needed)
                return cause if direct else dataclasses.replace(cause, reason=f"{node.title}: {cause.reason}")
        return None

    def _meta(self, key: str) -> dict[str, Any]:
        """What a stage says of itself, {} where it is damaged: a row is worth more than the remark."""
        try:
            return artefacts.read_meta(self._open(key))
        except Damaged as damage:
            self.display.note(f"a stored result is damaged, what it says of itself is left out ({damage})")
            return {}


__all__ = ["Failure", "Standing"]
