"""One look at one handed model: its stages, what computes them, and the comparison of models. Free of torch."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from .. import cells
from ..engines import single
from ..engines.base import Engine
from ..registry import Registry
from ..runner import Resources
from ..store import Store
from . import purify as repairing
from . import scan as scanning
from .chain import Chain, Say
from .handed import Handed, HandedGrants
from .purify import Labels, Repair
from .scan import Scan, kind_of
from .stages import How, Stages


@dataclass(frozen=True)
class Machine:
    """What computes. quick, thorough: an engine with a core a job, and one whose single job has all of them; in_turn,
    at_once: their resources.
    """

    quick: Engine
    thorough: Engine
    at_once: Resources
    in_turn: Resources

    def close(self) -> None:
        """End both engines."""
        self.quick.close()
        self.thorough.close()


class Session:
    """Scans and repairs of one model. defenses: selections that `purify` may be asked for."""

    def __init__(
        self, handed: Handed, registry: Registry, how: How, machine: Machine, store: Store,
        defenses: Sequence[str] = (), say: Say = lambda line: None,
    ) -> None:  # fmt: skip
        self.handed = handed
        self.how = how
        self.machine = machine
        self.store = store
        self.say = say
        self.stages = Stages(registry, handed, how, scanning.inverters(), defenses)
        self.quick = self._chain(machine.quick, machine.at_once)
        self.thorough = self._chain(machine.thorough, machine.in_turn)

    def _chain(self, engine: Engine, using: Resources) -> Chain:
        grants = HandedGrants(
            self.handed, self.store, device=self.how.device, precision=self.how.precision, threads=using.threads,
            isolation=using.isolation,
        )  # fmt: skip
        return Chain(self.handed.key, self.handed.folder, self.store, grants, engine, self.say)

    def scan(self) -> Scan:
        """See `scan.scan`."""
        return scanning.scan(self.stages, self.quick, self.thorough, self.say)

    def held(self, found: Scan) -> list[float | None]:
        """Success in %, on the held-out images, of each of `found.full`; [] where nothing is held out."""
        if not len(self.handed.held):
            return []
        out = []
        for one in found.full:
            key = self.stages.invert(kind_of(one.kind).full, one.label)
            folder = self.thorough.compute(self.stages.nodes, [key])[key].folder
            told, _ = self.compare(None, {} if folder is None else {one.label: folder}, False)
            out.append(repairing.judge(self.handed, told, one.label).success_before)
        return out

    def trigger(self, target: int, kind: str | None) -> Path | None:
        """The artefact of a full search for `target`, by which all repairs are judged: None where it failed."""
        key = self.stages.invert(kind_of(kind or scanning.KINDS[0].name).full, target)
        return self.thorough.compute(self.stages.nodes, [key], "full search")[key].folder

    def purify(self, defense: str, target: int | None, trigger: Path | None) -> Repair:
        """See `purify.purify`."""
        return repairing.purify(self.stages, self.thorough, defense, target, trigger, self.compare, self.say)

    def compare(
        self, repaired: Path | None, triggers: Mapping[int, Path], features: bool
    ) -> tuple[Labels, Mapping[str, NDArray[Any]]]:
        """Predictions of model and repaired model on the held-out images, and their features. triggers: artefacts of
        inversions by the label that they lead to.
        """
        handed, using = self.handed, self.machine.in_turn
        told = {f"trigger{label}": repairing.needs_of(folder) for label, folder in triggers.items()}
        data = handed.data.as_dict()
        spec: dict[str, Any] = {
            "job": "compare", "device": self.how.device, "precision": self.how.precision, "threads": using.threads,
            "isolation": using.isolation, "readable": [],
            "seeds": {role: cells.seed(role, handed.images, 0) for role in ("init", "stamp")},
            "data": {name: data[name] for name in ("classes", "shape", "mean", "std", "flip_ok")},
            "model": handed.model.spec, "needs": told, "features": features,
        }  # fmt: skip

        def fill(into: Path) -> None:
            shutil.copyfile(handed.folder / "weights.safetensors", into / "weights.safetensors")
            if repaired is not None:
                shutil.copyfile(repaired / "weights.safetensors", into / "repaired.safetensors")
            for label, folder in triggers.items():
                shutil.copyfile(folder / "trigger.safetensors", into / f"need-trigger{label}.safetensors")
            x = np.ascontiguousarray(handed.x[handed.held])
            save_file({"x": x}, into / "held.safetensors")

        if repaired is not None and (how := repairing.rebuild_of(repaired)):
            spec["rebuild"] = {"repaired": how}
        with single.run_one(spec, fill, engine=self.machine.thorough) as out:
            labels = load_file(out / "labels.safetensors")
            file = out / "features.safetensors"
            return labels, load_file(file) if file.exists() else {}


__all__ = ["Machine", "Session"]
