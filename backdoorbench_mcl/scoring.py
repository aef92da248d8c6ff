"""What a cell's row says, once its stages exist: the judgement, and everything that is told beside it. Free of torch.

Nothing is computed here but metrics of stored predictions (design 6): a row can be made again from a store.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from . import artefacts, evaluate, provenance, remarks
from .artefacts import Damaged
from .engines.base import Isolation
from .errors import BbmclError, UserError
from .grant import Grants, poisoned
from .plan import Cell, Plan
from .progress import Progress as Display
from .rows import Row
from .standing import Failure, Standing
from .store import Stage, Store

WEAK = "weak attack"
_LOOSENESS: tuple[Isolation, ...] = ("landlock", "process", "inline")  # a row names the loosest of its methods


class Scoring(Standing):
    """The rows of a plan, as far as a store holds what they are made from."""

    def __init__(self, plan: Plan, store: Store, display: Display, grants: Grants) -> None:
        super().__init__(plan, store, display)
        self.grants = grants
        self.scores: dict[str, dict[str, Any]] = {}
        self.versions = functools.cache(provenance.versions)  # of the same packages many times

    def _score(self, cell: Cell) -> Row | None:
        """The finished row, or None while something is still to be computed."""
        before = self._score_stage(cell.before)
        if before is None:
            cause = self._cause(cell.before)
            return None if cause is None else self._failed(cell, cause)
        if cell.after is None and not cell.undefined:
            return None if self._waits(cell) else self._with_stages(self._undefended(cell, before), before)
        if self._gate(cell, before) == "weak":
            return self._failed(self._undefended(cell, before), Failure("n/a", WEAK))
        if cell.after is None:
            return self._failed(self._undefended(cell, before), Failure("n/a", cell.undefined))
        after = self._score_stage(cell.after)
        if after is None:
            cause = self._cause(cell.after)
            return None if cause is None else self._failed(self._undefended(cell, before), cause)
        if self._waits(cell):
            return None
        der = evaluate.der(before["asr"], after["asr"], before["ba"], after["ba"])
        return self._with_stages(self._undefended(cell, before), {**after, "der": der})

    def _waits(self, cell: Cell) -> bool:
        """Whether a stage beside the score is still to come; one that failed costs its field, not the row."""
        return any(self._stage(key) is None and self._cause(key) is None for key in cell.extras.values())

    def _gate(self, cell: Cell, before: Mapping[str, Any]) -> evaluate.Gate:
        """Whether the attack was planted. All-to-all can only reach the goal of an image that the victim would know."""
        return evaluate.gate(before["asr"], before["ba"] if cell.row.target is None else None, before["ftr"])

    def _undefended(self, cell: Cell, before: Mapping[str, Any]) -> Cell:
        """The cell with what is known of its victim."""
        gate = self._gate(cell, before)
        metas = [{} if self._stage(key) is None else self._meta(key) for key in cell.surrogates]
        attack = self._meta(cell.victim).get("attack") if metas and self._stage(cell.victim) is not None else None
        row = dataclasses.replace(
            cell.row, gate=gate, asr_before=before["asr"], ba_before=before["ba"], tca_before=before["tca"],
            ftr_before=before["ftr"], surrogate=remarks.surrogates(metas, attack),
        )  # fmt: skip
        return dataclasses.replace(cell, row=row)

    def _score_stage(self, key: str) -> dict[str, Any] | None:
        if key not in self.scores:
            if self._stage(key) is None:
                return None
            try:
                found = load_file(self._open(key) / "predictions.safetensors")
            except Damaged as damage:
                self.display.note(f"stored predictions are damaged and are computed again ({damage})")
                return None
            try:
                self.scores[key] = evaluate.predicted(found)
            except (BbmclError, ValueError, KeyError) as error:
                self.failures[key] = Failure("failed", f"its predictions cannot be scored: {line_of(error)}")
                return None
        return self.scores[key]

    def _failed(self, cell: Cell, cause: Failure) -> Row:
        common = self.grants.common
        return dataclasses.replace(
            cell.row, state=cause.state, reason=cause.reason, blame=cause.blame,  # type: ignore[arg-type]
            stages={"failed": cause.key} if cause.key else {},
            versions=self.versions(frozenset(remarks.origins(cell.row).values())), threads=common["threads"],
            isolation=common["isolation"],
        )  # fmt: skip

    def _with_stages(self, cell: Cell, measured: Mapping[str, Any]) -> Row:
        # predictions may outlive what they were made from: a damaged stage is forgotten, and not needed for a row
        own = [stage for key in cell.own if (stage := self._stage(key)) is not None]
        shared = [stage for key in cell.shared if (stage := self._stage(key)) is not None]
        judged = self.stages[cell.after or cell.before]
        seconds = _seconds(own) if len(own) == len(cell.own) else None
        beside = _seconds(shared) if len(shared) == len(cell.shared) else None
        extra: dict[str, Any] = {}
        for stage in reversed(shared):  # the nearest verdict has the last word
            wanted = stage.kind == "verdict" or stage.key == cell.trigger
            meta = self._meta(stage.key) if wanted else {}
            if meta and stage.kind == "invert":
                extra.update(remarks.inversion(meta))
            elif meta:
                extra["verdict"] = remarks.verdict(meta)
        extras = {name: key for name, key in cell.extras.items() if self._stage(key) is not None}
        for name in {"retuned", "retuned_clean"} & set(extras):
            extra.update(self._retuned(name, extras[name]))
        worker = own[0] if own else judged
        if worker.kind == "defend":
            extra["rebuild"] = self._meta(worker.key).get("rebuild", {}).get("function", "")
        made = [stage.numerics["versions"] for stage in [*own, *shared, *self._roots(cell)]]
        guests = [worker, *(stage for stage in shared if stage.kind != "train")]  # whose methods a defense relies on
        if extra.get("rebuild"):  # its code ran there, too
            guests += [judged, *self._built_again(extras.values())]
        marked = [stage for stage in guests if any(stage.numerics.get(name) for name in remarks.MARKS)]
        return dataclasses.replace(
            cell.row, **measured, **extra, state="ok", reason="", clean_poisoned=self._overlap(cell), seconds=seconds,
            seconds_shared=None if seconds is None or beside is None else seconds + beside,
            peak_mb=max(float(stage.cost.get("peak_mb", 0)) for stage in [judged, *own, *shared]),
            isolation=max((str(stage.numerics["isolation"]) for stage in guests), key=_LOOSENESS.index),
            **remarks.marks([stage.numerics for stage in marked]),
            blame=self.plan.nodes[marked[0].key].actor.blame if marked else "",
            device=worker.numerics["device"], threads=worker.numerics["threads"],
            versions=remarks.versions(worker.numerics["versions"], made, remarks.origins(cell.row).values()),
            stages={**{s.kind: s.key for s in reversed(own + shared) if s.kind not in ("train", "invert")},
                    **({} if cell.trigger is None else {"invert": cell.trigger}), "model": cell.victim,
                    "before": cell.before, "predict": judged.key, **extras},
        )  # fmt: skip

    def _built_again(self, keys: Iterable[str]) -> list[Stage]:
        """Stages beside the score, and what they were made from, in which a repair was built again."""
        found = [self._stage(key) for key in keys]
        inputs = [self.plan.nodes[stage.key].inputs.get("weights") for stage in found if stage is not None]
        found += [self._stage(key) for key in inputs if key is not None and self.plan.nodes[key].kind == "retune"]
        return [stage for stage in found if stage is not None]

    def _roots(self, cell: Cell) -> list[Stage]:
        """The victim of a cell and the surrogates behind it, as far as they are still there."""
        return [stage for key in (cell.victim, *cell.surrogates) if (stage := self._stage(key)) is not None]

    def _retuned(self, name: str, key: str) -> dict[str, Any]:
        try:
            found = load_file(self._open(key) / "predictions.safetensors")
            used = artefacts.read_meta(self._open(self.plan.nodes[key].inputs["weights"]))["used"]
        except Damaged as damage:
            self.display.note(f"what is stored of a re-tuned model is damaged and left out ({damage})")
            return {}
        return remarks.retuned(name, found, used)

    def _overlap(self, cell: Cell) -> int | None:
        """How many clean images are copies of poisoned ones (spec 2.5), None for the undefended victim."""
        if cell.after is None or cell.row.controls == "training" or self._stage(cell.victim) is None:
            return None
        try:
            victim = self._open(cell.victim)
        except Damaged:  # it is computed again when something needs it
            return None
        index = self.grants.clean_index(self.plan.nodes[cell.own[0]], victim)
        return int(np.isin(index, poisoned(victim)).sum())


def _seconds(stages: Sequence[Stage]) -> float:
    return sum(float(stage.cost.get("seconds", 0)) for stage in stages)


def line_of(error: Exception) -> str:
    """An error in one line, without a path where the system has a word for it."""
    if isinstance(error, UserError) or not isinstance(error, OSError):
        return str(error)
    return f"{error.strerror or error}: {error.filename or 'work folder'}"


__all__ = ["WEAK", "Scoring", "line_of"]
