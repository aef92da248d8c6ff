"""The loop: stages in, rows out; one failure never stops it (design 5). Free of torch.

Every stage is claimed, filled, run in a child and committed in one transaction; every cell whose stages exist is
scored at once. Whatever dies, including this process, costs the stages that were running and nothing else.
"""

from __future__ import annotations

import dataclasses
import shutil
import time
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from . import artefacts, evaluate, plugins, provenance, remarks
from .artefacts import Damaged, require_plain
from .engines.base import Engine, Finished, Isolation, Progress
from .errors import BbmclError, NotApplicable, PluginError, UserError
from .grant import Grants, poisoned
from .plan import Cell, Node, Plan
from .plugins import Plugin
from .progress import Progress as Display
from .rows import FINAL_STATES, Row
from .standing import Failure, Standing
from .store import Claim, Stage, Store
from .workdir import WorkFolder

WEAK = "weak attack"
READ_OF: Mapping[str, tuple[str, ...]] = {"trial": ("location",), "invert": ("labels", "modules", "detected")}
_LOOSENESS: tuple[Isolation, ...] = ("landlock", "process", "inline")  # a row names the loosest of its methods
TYPED = (  # what may differ at equal keys
    "dataset", "model", "attack", "defense", "inverter", "preset", "budget", "overrides",
)  # fmt: skip
POLL = 1.0  # seconds between two looks at what other drivers have stored
Observer = Callable[[Row], object]


@dataclasses.dataclass
class _Job:
    node: Node
    claim: Claim
    started: float
    inputs: Mapping[str, str]  # role -> name of the artefact that it was given


class Matrix(Standing):
    """One run of a plan on a store. retry: try stages again that failed in an earlier run."""

    def __init__(
        self, plan: Plan, store: Store, grants: Grants, engine: Engine, display: Display, *, retry: bool = True,
        observers: Sequence[tuple[Plugin, Observer]] = (),
    ) -> None:  # fmt: skip
        super().__init__(plan, store, display)
        self.grants = grants
        self.engine = engine
        self.retry = retry
        self.observers = list(observers)
        self.blamed: set[Plugin] = set()  # observers whose failure was told
        self.seen = -1  # `Store.changes` at that time
        self.failures = {  # to begin with, stages whose method is no good
            node.key: Failure("failed", node.actor.problem, node.key, node.actor.blame)
            for node in plan.nodes.values() if node.actor.problem
        }  # fmt: skip
        self.never = frozenset(self.failures)
        self.running: dict[Path, _Job] = {}
        self.rows: dict[int, Row] = {}
        self.earlier: dict[int, Row] = {}  # rows that are scored again, for a stage beside the score
        self.scores: dict[str, dict[str, Any]] = {}
        self.work = WorkFolder()
        self.data = {str(cell.row.params["dataset"]["name"]).rpartition("/")[0] for cell in plan.cells}
        self.origin = provenance.collect()

    # ------------------------------------------------------------ the loop

    def run(self) -> list[Row]:
        """Compute what is missing; returns one row per cell, in the order of the table.

        Raises UserError when the store can no longer be written; what was finished by then is stored.
        """
        try:
            self._load_finished()
            while len(self.rows) < len(self.plan.cells):
                moved = self._settle_cells()
                if len(self.rows) == len(self.plan.cells):
                    break
                moved |= self._start_jobs()
                if self.running:
                    self._wait()
                elif not moved:
                    time.sleep(POLL)  # all that is left is being computed by another driver
        finally:
            self.engine.close()
            for job in self.running.values():
                job.claim.release()
            self.work.close()
        return [self.rows[i] for i in range(len(self.plan.cells))]

    def _wait(self) -> None:
        """Until a job has ended, or it is time to look for what other drivers have stored: a look costs every cell."""
        until = time.monotonic() + POLL
        ended = False
        while not ended and (self.engine.free <= 0 or time.monotonic() < until):
            for event in self.engine.events():
                self._handle(event)
                ended |= isinstance(event, Finished)

    def _load_finished(self) -> None:
        for i, cell in enumerate(self.plan.cells):
            stored = self.store.row(cell.key)
            if stored is None or stored.state not in FINAL_STATES:
                continue
            if remarks.lacking(stored, cell.extras):
                self.earlier[i] = stored
            else:
                self.rows[i] = dataclasses.replace(stored, **{name: getattr(cell.row, name) for name in TYPED})
                self.display.cell(self.rows[i])

    def _wanted(self) -> list[Node]:
        """Stages that an unfinished cell lacks, all of whose inputs exist, best first."""
        ready: dict[str, Node] = {}

        def visit(key: str) -> None:
            if key in ready or self._stage(key) is not None or key in self.failures:
                return
            node = self.plan.nodes[key]
            if node.gated_by is not None and self._stage(node.gated_by) is None:
                return visit(node.gated_by)
            missing = [k for k in node.inputs.values() if self._stage(k) is None]
            for k in missing:
                visit(k)
            if not missing:
                ready[key] = node

        for i, cell in enumerate(self.plan.cells):
            if i not in self.rows:
                visit(cell.before)
                for key in (cell.after, *cell.extras.values()):
                    if key is not None:
                        visit(key)
        busy = {job.node.key for job in self.running.values()}
        return sorted((node for key, node in ready.items() if key not in busy), key=lambda node: node.rank)

    # ------------------------------------------------------------ jobs

    def _start_jobs(self) -> bool:
        """Start what can be started; True if anything changed."""
        moved = False
        for node in self._wanted():
            if self.engine.free <= 0:
                break
            last = self.store.last_attempt(node.key)
            if last is not None and (last[0] in ("diverged", "n/a") or not self.retry):  # a result, not a fault
                self.failures[node.key] = Failure(last[0], last[1], node.key)
                moved = True
                continue
            claim = self.store.claim(node.key)
            if claim is None:  # another driver is at it
                continue
            self.absent.discard(node.key)
            if self._stage(node.key) is not None:  # and has just finished
                claim.release()
                moved = True
                continue
            moved |= self._start(node, claim)
        return moved

    def _start(self, node: Node, claim: Claim) -> bool:
        folder = self.work.path / f"{node.kind}-{uuid.uuid4().hex}"
        if self._forget_outdated(node):
            claim.release()
            return True
        try:
            inputs = {role: self._open(key) for role, key in node.inputs.items()}
            folder.mkdir()
            self.grants.fill(node, inputs, folder)
        except (Damaged, BbmclError, OSError) as error:
            if isinstance(error, Damaged):  # forgotten by the store: it is computed again
                self.display.note(f"a stored result is damaged and is computed again ({error})")
            else:
                state = "n/a" if isinstance(error, NotApplicable) else "failed"
                self._fail(node, Failure(state, _line(error)), "", 0.0)
            shutil.rmtree(folder, ignore_errors=True)  # on a full disk its files are what others lack
            claim.release()
            return True
        given = {role: path.name for role, path in inputs.items()}
        self.running[folder] = _Job(node, claim, time.monotonic(), given)
        self.display.started(node.key, node.title)
        self.engine.start(folder)
        return True

    def _forget_outdated(self, node: Node) -> bool:
        """Forget inputs that an earlier version made without what a job now reads of them; True if there were any."""
        found = False
        for key in node.inputs.values():
            wanted = READ_OF.get(self.plan.nodes[key].kind, ())
            if wanted and (meta := self._meta(key)) and not all(field in meta for field in wanted):
                self.display.note(f"{self.plan.nodes[key].title}: made by an earlier version, computed again")
                self.store.forget(key)
                self.stages.pop(key, None)
                found = True
        return found

    def _handle(self, event: Progress | Finished) -> None:
        job = self.running.get(event.folder)
        if job is None:
            return
        if isinstance(event, Progress):
            self.display.tick(job.node.key, event.done, event.total, event.rate)
            return
        seconds = time.monotonic() - job.started
        try:
            if event.state == "ok":
                self._commit(job, event, seconds)
            else:
                self._fail(job.node, Failure(event.state, event.reason), event.log, seconds)
        finally:
            del self.running[event.folder]
            job.claim.release()
            shutil.rmtree(event.folder, ignore_errors=True)

    def _commit(self, job: _Job, event: Finished, seconds: float) -> None:
        node, out = job.node, event.folder / "out"
        try:
            trial = self._open(node.inputs["trial"]) if node.kind == "predict" else None
        except Damaged as damage:
            self.display.note(f"a stored result is damaged and is computed again ({damage})")
            self.display.finished(node.key, node.title, "ok", seconds)
            return
        try:
            require_plain(out)  # before anything is read from it or written to it
            if trial is not None:
                self.grants.judge(node, trial, out)
            stage = self._finished(job, event)
            self.stages[node.key] = self.store.commit(stage, out)
        except (Damaged, OSError, ValueError, TypeError, LookupError) as error:  # a child wrote what it should not
            self._fail(node, Failure("failed", f"left a result of no use: {_line(error)}"), event.log, seconds)
            return
        self.display.finished(node.key, node.title, "ok", seconds)

    def _finished(self, job: _Job, event: Finished) -> Stage:
        node, common, result, made = job.node, self.grants.common, event.result, event.made
        packages = {method.full_name.rpartition("/")[0] for method in node.methods.values()}
        numerics = {
            "device": common["device"],
            "precision": common["precision"],
            "threads": common["threads"],
            "isolation": result.get("isolation", common["isolation"]),
            "strays": result.get("strays", []),
            "changed": result.get("changed", []),
            "curves": result.get("curves", {}),
            "machine": made.get("machine") or provenance.machine_class(str(common["device"])),
            "versions": {**provenance.versions(self.data | packages), **made.get("versions", {})},
            "origin": {**self.origin, **made.get("origin", {})},
            "inputs": dict(job.inputs),
        }
        cost = {name: float(result[name]) for name in ("seconds", "peak_mb", "peak_gpu_mb") if name in result}
        return Stage(node.key, node.kind, node.spec, "", numerics, cost)

    def _fail(self, node: Node, failure: Failure, log: str, seconds: float) -> None:
        blame = "" if failure.state == "n/a" else node.actor.blame
        self.failures[node.key] = dataclasses.replace(failure, key=node.key, blame=blame)
        self.store.attempt(node.key, failure.state, failure.reason, log)
        self.display.finished(node.key, node.title, failure.state, seconds, failure.reason)

    # ------------------------------------------------------------ cells

    def _settle_cells(self) -> bool:
        """Score or give up every cell that can be; True if there was one."""
        moved = False
        if self.seen != (changes := self.store.changes()):
            self.seen = changes
            self.absent.clear()
        for i, cell in enumerate(self.plan.cells):
            if i in self.rows:
                continue
            row = self._score(cell)
            if row is not None:
                moved = True
                row = remarks.kept(row, self.earlier.get(i), cell.extras)
                self.rows[i] = row
                if row.stages.get("failed") not in self.never:  # of no use later: its key is that of the fault
                    self.store.put_row(row)
                self.display.cell(row)
                self._tell(row)
                self._let_go(cell)
        return moved

    def _let_go(self, cell: Cell) -> None:
        """Forget what a finished cell alone was scored from: who else needs it finds it in the store."""
        for key in {*cell.own, *filter(None, [cell.after])} - {cell.before}:
            self.scores.pop(key, None)
            self.stages.pop(key, None)

    def _tell(self, row: Row) -> None:
        for plugin, observer in self.observers[:]:
            told = ""
            try:
                with plugins.guest():
                    observer(row=row)  # type: ignore[call-arg]
            except PluginError as error:  # it hung or wanted to end the run, which a second time would cost as much
                self.observers.remove((plugin, observer))
                told = str(error)
            except Exception as error:  # an observer is a guest: it cannot end the run
                told = f"raised {type(error).__name__}: {error}"
            if told and plugin not in self.blamed:
                self.display.note(str(plugins.Problem(plugin, f"bbmcl_cell_finished {told}")))
                self.blamed.add(plugin)

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
        row = dataclasses.replace(
            cell.row, gate=gate, asr_before=before["asr"], ba_before=before["ba"], tca_before=before["tca"],
            ftr_before=before["ftr"], surrogate=remarks.surrogates(metas),
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
                self.failures[key] = Failure("failed", f"its predictions cannot be scored: {_line(error)}")
                return None
        return self.scores[key]

    def _failed(self, cell: Cell, cause: Failure) -> Row:
        common = self.grants.common
        return dataclasses.replace(
            cell.row, state=cause.state, reason=cause.reason, blame=cause.blame,  # type: ignore[arg-type]
            stages={"failed": cause.key} if cause.key else {},
            versions=provenance.versions(remarks.origins(cell.row).values()), threads=common["threads"],
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


def _line(error: Exception) -> str:
    if isinstance(error, UserError) or not isinstance(error, OSError):
        return str(error)
    return f"{error.strerror or error}: {error.filename or 'work folder'}"


__all__ = ["WEAK", "Failure", "Matrix"]
