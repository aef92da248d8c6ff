"""Computes the stages of a handed model: what the runs folder holds is taken from there, all else runs in jobs.

As in a matrix a stage is claimed, filled, run in a child and committed; but there are no cells, and whoever asks for a
stage is told why it failed. Free of torch.
"""

from __future__ import annotations

import shutil
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from .. import provenance, standing
from ..artefacts import Damaged, require_plain
from ..engines.base import Engine, Finished, Progress
from ..errors import BbmclError, UserError
from ..grant import Grants
from ..plan import Node
from ..progress import duration
from ..scoring import line_of
from ..store import Claim, Stage, Store
from ..workdir import WorkFolder

Say = Callable[[str], None]
HEARTBEAT = 15.0  # seconds between two lines about what is being computed


@dataclass(frozen=True)
class Outcome:
    """What became of a stage. folder: its artefact, None where it failed for `reason`; seconds: that it took."""

    folder: Path | None
    reason: str = ""
    seconds: float = 0.0


@dataclass
class _Job:
    node: Node
    claim: Claim
    inputs: Mapping[str, str]  # role -> name of the artefact that it was given
    started: float


class Chain:
    """Stages on one handed model. victim: the folder that stands for the stage called `victim_key`; say: told in lines
    how it goes. Example: `Chain(...).compute(plan.nodes, [key])[key].folder`
    """

    def __init__(
        self, victim_key: str, victim: Path, store: Store, grants: Grants, engine: Engine, say: Say = lambda line: None
    ) -> None:
        self.store = store
        self.grants = grants
        self.engine = engine
        self.say = say
        self.done: dict[str, Outcome] = {victim_key: Outcome(victim)}
        self.machine = provenance.machine_class(str(grants.common["device"]))
        self.origin = provenance.collect()

    def compute(self, nodes: Mapping[str, Node], wanted: Sequence[str], what: str = "") -> dict[str, Outcome]:
        """The outcome of every stage in `wanted`, after all that it needs. what: named in lines while it takes time.

        Raises UserError where the store cannot be written, or another process computes the same.
        """
        waiting = self._missing(nodes, wanted)
        running: dict[Path, _Job] = {}
        started, told, whole = time.monotonic(), time.monotonic(), len(waiting)
        work = WorkFolder()
        try:
            while waiting or running:
                waiting = [key for key in waiting if not self._start(nodes[key], running, work.path)]
                if not running:
                    continue
                for event in self.engine.events():
                    if isinstance(event, Finished) and event.folder in running:
                        self._end(running.pop(event.folder), event)
                    elif isinstance(event, Progress) and whole == 1 and time.monotonic() - told > HEARTBEAT:
                        told = time.monotonic()
                        self.say(f"  {what}: {100 * event.done // max(1, event.total)} %")
                ended = whole - len(waiting) - len(running)
                if whole > 1 and time.monotonic() - told > HEARTBEAT and ended:
                    told = time.monotonic()
                    left = (told - started) / ended * (whole - ended)
                    self.say(f"  {what}: {ended} of {whole}, {duration(left)} left")
        finally:
            if running:  # an error, or Ctrl-C: no job may outlive its claim
                self.engine.close()
            for job in running.values():
                job.claim.release()
            work.close()
        return {key: self.done[key] for key in wanted}

    def _missing(self, nodes: Mapping[str, Node], wanted: Sequence[str]) -> list[str]:
        """Keys of the stages to compute, inputs first; what is stored is noted as done."""
        out: list[str] = []

        def visit(key: str) -> None:
            if key in self.done or key in out:
                return
            stage = self.store.stage(key)
            if stage is not None:
                try:
                    self.done[key] = Outcome(self.store.open(stage), seconds=float(stage.cost.get("seconds", 0)))
                    return
                except Damaged as damage:
                    self.say(f"a stored result is damaged and is computed again ({damage})")
            for other in nodes[key].inputs.values():
                visit(other)
            out.append(key)

        for key in wanted:
            visit(key)
        return out

    def _start(self, node: Node, running: dict[Path, _Job], work: Path) -> bool:
        """Start a stage, or give it up; False where it has to wait."""
        inputs = {role: self.done.get(key) for role, key in node.inputs.items()}
        lost = next((made for made in inputs.values() if made is not None and made.folder is None), None)
        if lost is not None:
            self.done[node.key] = lost
            return True
        if self.engine.free <= 0 or any(made is None for made in inputs.values()):
            return False
        claim = self.store.claim(node.key)
        if claim is None:
            raise UserError(
                f"another bbmcl is computing the same in {self.store.folder}; wait for it, or use another --runs"
            )
        folder = work / f"{node.kind}-{uuid.uuid4().hex}"
        folder.mkdir()
        paths = {role: made.folder for role, made in inputs.items() if made is not None and made.folder is not None}
        try:
            self.grants.fill(node, paths, folder)
        except (BbmclError, OSError) as error:
            claim.release()
            self.done[node.key] = Outcome(None, line_of(error))
            return True
        running[folder] = _Job(node, claim, {role: path.name for role, path in paths.items()}, time.monotonic())
        self.engine.start(folder)
        return True

    def _end(self, job: _Job, event: Finished) -> None:
        node, out = job.node, event.folder / "out"
        try:
            if event.state != "ok":
                self.store.attempt(node.key, event.state, event.reason, event.log)
                self.done[node.key] = Outcome(None, event.reason)
                return
            require_plain(out)
            stage = self.store.commit(self._stage(job, event), out)
            self.done[node.key] = Outcome(self.store.open(stage), seconds=float(event.result.get("seconds", 0)))
        except (Damaged, OSError, ValueError, TypeError, LookupError) as error:  # a child wrote what it should not
            self.done[node.key] = Outcome(None, f"left a result of no use: {line_of(error)}")
        finally:
            job.claim.release()
            shutil.rmtree(event.folder, ignore_errors=True)

    def _stage(self, job: _Job, event: Finished) -> Stage:
        common, node = self.grants.common, job.node
        made = {
            "machine": self.machine, "versions": provenance.versions(standing.packages(node)), "origin": self.origin,
        }  # fmt: skip
        wall = time.monotonic() - job.started
        return standing.finished(node, common, common["device"], job.inputs, event.result, made, wall)


__all__ = ["Chain", "Outcome", "Say"]
