"""The loop: stages in, rows out; one failure never stops it (design 5). Free of torch.

Every stage is claimed, filled, run in a child and committed in one transaction; every cell whose stages exist is
scored at once. Whatever dies, including this process, costs the stages that were running and nothing else.
"""

from __future__ import annotations

import dataclasses
import shutil
import time
import uuid
from collections.abc import Callable, Container, Mapping, Sequence
from pathlib import Path

from . import agenda, costs, devices, plugins, provenance, remarks, standing
from .artefacts import Damaged, require_plain
from .engines.base import Engine, Finished, Progress
from .errors import BbmclError, NotApplicable, PluginError
from .grant import Grants
from .plan import Cell, Node, Plan
from .plugins import Plugin
from .progress import Progress as Display
from .rows import FINAL_STATES, Row
from .scoring import Scoring, line_of
from .standing import Failure
from .store import Claim, Stage, Store
from .workdir import WorkFolder

READ_OF: Mapping[str, tuple[str, ...]] = {"trial": ("location",), "invert": ("labels", "modules", "detected")}
TYPED = (  # what may differ at equal keys
    "dataset", "model", "attack", "defense", "inverter", "preset", "budget", "overrides",
)  # fmt: skip
LEISURE = 50  # times as long as a forecast or an order took, before the next one is made
POLL = 1.0  # seconds between two looks at what other drivers have stored
Observer = Callable[[Row], object]


@dataclasses.dataclass
class _Job:
    node: Node
    claim: Claim
    started: float
    inputs: Mapping[str, str]  # role -> name of the artefact that it was given
    place: tuple[str, float | None]  # its device, and what it was expected to take of that


class Matrix(Scoring):
    """One run of a plan on a store. retry: try stages again that failed in an earlier run."""

    def __init__(
        self, plan: Plan, store: Store, grants: Grants, engine: Engine, display: Display, *, retry: bool = True,
        observers: Sequence[tuple[Plugin, Observer]] = (),
    ) -> None:  # fmt: skip
        super().__init__(plan, store, display, grants)
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
        self.work = WorkFolder()
        self.missing = set(plan.nodes) - store.keys()
        names = str(grants.common["device"]).split(",")
        memory = {} if engine.spreads else devices.measure(names)
        self.devices = devices.Devices(names, memory, engine.spreads)
        if names[0].startswith("cuda") and not engine.spreads and not memory and engine.free > len(names):
            display.note("nvidia-smi does not tell how large the GPUs are: each runs one job at a time")
        self.machine = provenance.machine_class(str(grants.common["device"]))
        self.costs = costs.of(plan, store, grants.common["device"], grants.common["threads"])
        self.agenda = agenda.Agenda(plan, costs.ahead(plan, self.missing, self.costs))
        self.data = {str(cell.row.params["dataset"]["name"]).rpartition("/")[0] for cell in plan.cells}
        self.origin = provenance.collect()
        self.next_forecast = 0.0
        self.next_order = 0.0
        self.news = False  # a sort of stages was measured for the first time, and the order does not know yet

    # ------------------------------------------------------------ the loop

    def run(self) -> list[Row]:
        """Compute what is missing; returns one row per cell, in the order of the table.

        Raises UserError when the store can no longer be written; what was finished by then is stored.
        """
        try:
            self._load_finished()
            self._tell_time()
            while self.agenda.open:
                moved = self._look()
                if not self.agenda.open:
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
                self.agenda.close(i)
                self.display.cell(self.rows[i])

    def _want(self, cell: Cell, busy: Container[str]) -> None:
        """Put on the agenda what an unfinished cell lacks and can be computed now. busy: what is being computed."""

        def visit(key: str) -> None:
            if self._stage(key) is not None or key in self.failures:
                return
            node = self.plan.nodes[key]
            if node.gated_by is not None and self._stage(node.gated_by) is None:
                return visit(node.gated_by)
            missing = [k for k in node.inputs.values() if self._stage(k) is None]
            for k in missing:
                visit(k)
            if not missing and key not in busy:
                self.agenda.add(node)

        for key in agenda.stages_of(cell):
            visit(key)

    # ------------------------------------------------------------ jobs

    def _start_jobs(self) -> bool:
        """Start what can be started; True if anything changed."""
        moved = False
        elsewhere: list[Node] = []  # what another driver is at
        while self.engine.free > 0 and (node := self.agenda.pop()) is not None:
            if any(self._stage(key) is None for key in node.inputs.values()):  # it went meanwhile
                self.changed.add(node.key)
                moved = True
                continue
            last = self.store.last_attempt(node.key)
            if last is not None and (last[0] in ("diverged", "n/a") or not self.retry):  # a result, not a fault
                self.failures[node.key] = Failure(last[0], last[1], node.key)
                self.changed.add(node.key)
                moved = True
                continue
            claim = self.store.claim(node.key)
            if claim is None:
                elsewhere.append(node)
                continue
            self.absent.discard(node.key)
            if self._stage(node.key) is not None:  # another one has just finished it
                claim.release()
                self.missing.discard(node.key)
                self.changed.add(node.key)
                moved = True
                continue
            need = self.costs.gpu_mb(node.key)
            device = self.devices.place(need)
            if device is None:  # what is next in turn waits for room, and nothing smaller overtakes it
                claim.release()
                self.agenda.add(node)
                break
            moved |= self._start(node, claim, (device, need))
        for node in elsewhere:
            self.agenda.add(node)
        return moved

    def _start(self, node: Node, claim: Claim, place: tuple[str, float | None]) -> bool:
        folder = self.work.path / f"{node.kind}-{uuid.uuid4().hex}"
        if self._forget_outdated(node):
            claim.release()
            self.devices.release(*place)
            self.changed.add(node.key)
            return True
        try:
            inputs = {role: self._open(key) for role, key in node.inputs.items()}
            folder.mkdir()
            self.grants.fill(node, inputs, folder, place[0])
        except (Damaged, BbmclError, OSError) as error:
            if isinstance(error, Damaged):  # forgotten by the store: it is computed again
                self.display.note(f"a stored result is damaged and is computed again ({error})")
            else:
                state = "n/a" if isinstance(error, NotApplicable) else "failed"
                self._fail(node, Failure(state, line_of(error)), "", 0.0)
            shutil.rmtree(folder, ignore_errors=True)  # on a full disk its files are what others lack
            claim.release()
            self.devices.release(*place)
            self.changed.add(node.key)
            return True
        given = {role: path.name for role, path in inputs.items()}
        self.running[folder] = _Job(node, claim, time.monotonic(), given, place)
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
                self.changed.add(key)
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
            self.devices.release(*job.place)
            self.changed.add(job.node.key)
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
            stage = self._finished(job, event, seconds)
            self.stages[node.key] = self.store.commit(stage, out)
            self.absent.discard(node.key)
        except (Damaged, OSError, ValueError, TypeError, LookupError) as error:  # a child wrote what it should not
            self._fail(node, Failure("failed", f"left a result of no use: {line_of(error)}"), event.log, seconds)
            return
        new = self.costs.seconds(node.key) is None
        self.costs.add(node.key, stage.cost["wall"], stage.cost.get("peak_gpu_mb"))
        self.missing.discard(node.key)
        self.news |= new
        if self.news and time.monotonic() >= self.next_order:
            self._order()
        self.display.finished(node.key, node.title, "ok", seconds)
        if time.monotonic() >= self.next_forecast:
            self._tell_time()

    def _order(self) -> None:
        """Put what waits in order anew: stages of a sort have been measured for the first time."""
        started = time.monotonic()
        self.agenda.reckon(costs.ahead(self.plan, self.missing, self.costs))
        self.news = False
        self.next_order = time.monotonic() + LEISURE * (time.monotonic() - started)

    def _tell_time(self) -> None:
        """How long the stages take that some cell still waits for."""
        started = time.monotonic()
        left = [key for key in self.missing if self.agenda.waiting[key] and key not in self.failures]
        workers = max(1, self.engine.free + len(self.running))
        spent = {job.node.key: started - job.started for job in self.running.values()}
        found = costs.forecast(
            self.plan, left, self.costs, workers, lambda key: self.agenda.rank(self.plan.nodes[key]), spent,
            self.devices.empty(),
        )  # fmt: skip
        self.display.ahead(None if found.unknown else found.seconds, str(found))
        self.next_forecast = time.monotonic() + LEISURE * (time.monotonic() - started)

    def _finished(self, job: _Job, event: Finished, wall: float) -> Stage:
        node, common = job.node, self.grants.common
        packages = self.data | standing.packages(node)
        made = {
            "machine": event.made.get("machine") or self.machine,
            "versions": {**self.versions(frozenset(packages)), **event.made.get("versions", {})},
            "origin": {**self.origin, **event.made.get("origin", {})},
        }
        if self.engine.spreads:  # the clock here has run since the job was handed in, and it may have queued
            wall = float(event.result.get("seconds", wall))
        return standing.finished(node, common, job.place[0], job.inputs, event.result, made, wall)

    def _fail(self, node: Node, failure: Failure, log: str, seconds: float) -> None:
        blame = "" if failure.state == "n/a" else node.actor.blame
        self.failures[node.key] = dataclasses.replace(failure, key=node.key, blame=blame)
        self.store.attempt(node.key, failure.state, failure.reason, log)
        self.display.finished(node.key, node.title, failure.state, seconds, failure.reason)

    # ------------------------------------------------------------ cells

    def _look(self) -> bool:
        """Score or give up every cell that can be, see what the others lack; True if one was settled."""
        moved = False
        if self.seen != (changes := self.store.changes()):
            self.seen = changes
            self.absent.clear()
            self.agenda.touch_all()
        while True:
            self.agenda.touch(self.changed)
            self.missing |= self.changed - self.stages.keys()
            self.changed.clear()
            due = self.agenda.due()
            if not due:
                return moved
            busy = {job.node.key for job in self.running.values()}
            for i in due:
                row = self._score(self.plan.cells[i])
                if row is None:
                    self._want(self.plan.cells[i], busy)
                else:
                    self._settle(i, row)
                    moved = True

    def _settle(self, i: int, row: Row) -> None:
        cell = self.plan.cells[i]
        row = remarks.kept(row, self.earlier.get(i), cell.extras)
        self.rows[i] = row
        self.agenda.close(i)
        if row.stages.get("failed") not in self.never:  # of no use later: its key is that of the fault
            self.store.put_row(row)
        self.display.cell(row)
        self._tell(row)
        self._let_go(cell)

    def _let_go(self, cell: Cell) -> None:
        """Forget what a finished cell alone was scored from: who else needs it finds it in the store."""
        for key in {*cell.own, *filter(None, [cell.after])} - {cell.before}:
            self.scores.pop(key, None)
            self.stages.pop(key, None)
            self.absent.discard(key)

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


__all__ = ["Matrix"]
