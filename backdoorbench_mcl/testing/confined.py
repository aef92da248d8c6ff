"""The check that runs a method as a matrix does: a job in a child process that can open nothing but its own files."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from .. import api, artefacts, confine, datacache
from ..engines.local import Finished, Local
from ..engines.single import ended
from . import toys
from .core import CheckFailed, Skipped, Subject, check, label_of, state_of

_HERE = "backdoorbench_mcl.testing.toys"
JOBS = {"attack": "train", "inverter": "invert", "defense": "defend"}
NEXT = {"attack": "trial", "defense": "predict"}  # the job that works with what the first one left
SECONDS = 120.0


@check("attack", "inverter", "defense")
def check_runs_confined(subject: Subject) -> None:
    """As jobs of a matrix, in child processes that can open nothing but their own files, it ends well.

    An attack makes a victim and the triggered test set; a defense repairs, and its result predicts.
    """
    ended = run(subject)
    if ended.state == "n/a":
        raise Skipped(f"not applicable to the toys ({ended.reason})")
    if ended.state != "ok":
        raise CheckFailed(f"{label_of(subject)}: as a job it ended {ended.state}: {ended.reason}")
    if strays := ended.result.get("strays"):
        raise CheckFailed(f"{label_of(subject)}: opened {strays[0]}, which was not granted; read from ctx alone")


def run(subject: Subject, seconds: float = SECONDS) -> Finished:
    """The jobs of an attack, or of an inverter or defense that faces the toy victim, in children: how the last ended.

    The second job is left out where the first did not end well.
    """
    with tempfile.TemporaryDirectory(prefix="bbmcl-check-") as scratch, Local(1, seconds) as engine:
        first = Path(scratch, "job")
        (first / "in").mkdir(parents=True)
        _fill(subject, first)
        began = ended(engine, first)
        if subject.kind not in NEXT or began.state != "ok" or began.result.get("strays"):
            return began
        second = Path(scratch, "next")
        (second / "in").mkdir(parents=True)
        _follow(subject, first, second)
        return ended(engine, second)


def _fill(subject: Subject, folder: Path) -> None:
    """What the driver writes for a job (see grant.py), from the toys."""
    method = subject.make()
    recipe = api.Recipe(steps=30, batch=32, lr=0.01, augment="none")
    spec: dict[str, Any] = {
        "job": JOBS[subject.kind], "device": "cpu", "precision": "fp32",
        "threads": torch.get_num_threads(), "isolation": "landlock" if confine.abi_version() else "process",
        "snapshot_every": 2.0, "snapshot": str(folder / "snapshots"), "readable": [],
        "seeds": {"init": 1, "order": 2, "invert": 3, "stamp": 4, "trigger": 5, "poison": 6},
        "data": {
            "classes": toys.CLASSES, "shape": list(toys.SHAPE), "mean": toys.MEAN, "std": toys.STD, "flip_ok": True,
        },
        "model": _spec("model", f"{_HERE}:ToyNet", {}),
        "recipe": _spec("recipe", "backdoorbench_mcl.api:Recipe", recipe.params),
        subject.kind: {**_spec(subject.kind, subject.target, subject.params), "suffix": subject.suffix},
        "grants": {}, "needs": {}, "labels": [toys.TARGET], "detected": False,
    }  # fmt: skip
    for name, need in method.needs().items():
        spec["needs"][name] = _need(need, folder / "in" / f"need-{name}.safetensors")
    if subject.kind == "attack":
        info = datacache.prepare(toys.ToyData(), None, folder.parent / "cache", "toy")
        spec["data"], spec["readable"] = info.as_dict(), [str(info.folder)]
    else:
        _repair(method, folder / "in", spec)
    (folder / "spec.json").write_text(json.dumps(spec))


def _follow(subject: Subject, first: Path, second: Path) -> None:
    """The job that works with what `first` left."""
    spec = json.loads((first / "spec.json").read_text())
    spec |= {"job": NEXT[subject.kind], "snapshot": str(second / "snapshots")}
    meta = artefacts.read_meta(first / "out")
    if subject.kind == "attack":
        shutil.copyfile(first / "out" / "attack.safetensors", second / "in" / "attack.safetensors")
        spec["attack_meta"] = meta["attack"]
    else:
        shutil.copyfile(first / "out" / "weights.safetensors", second / "in" / "weights.safetensors")
        np.save(second / "in" / "x.npy", toys.clean_images().x.numpy())
        if "rebuild" in meta:
            spec["rebuild"] = {"weights": meta["rebuild"]}
    (second / "spec.json").write_text(json.dumps(spec))


def _repair(method: Any, into: Path, spec: dict[str, Any]) -> None:
    """What a job that faces a victim finds, and what it is granted."""
    clean = toys.clean_images(labels=isinstance(method, api.Defense) and bool(method.uses_labels))
    save_file(state_of(toys.victim()), into / "weights.safetensors")
    save_file({"x": clean.x, "y": clean.y}, into / "clean.safetensors")
    if "location" in method.knows:
        spec["grants"]["location"] = list(toys.PATCH)
    if isinstance(method, api.Defense) and "target" in method.knows:
        spec["grants"]["target"] = toys.TARGET
    if "suspect" in method.knows:
        seen = toys.suspect_images()
        save_file({"x": seen.x, "y": seen.y}, into / "suspect.safetensors")
        spec["grants"]["suspect"] = "suspect.safetensors"
    if "trigger" in method.knows:
        save_file({}, into / "attack.safetensors")
        spec["attack"] = _spec("attack", f"{_HERE}:ToyAttack", {})
        spec["attack_meta"] = {}


def _spec(kind: str, target: str, params: Mapping[str, Any]) -> dict[str, Any]:
    return {"kind": kind, "target": target, "suffix": "", "params": dict(params), "name": target}


def _need(need: api.Need, file: Path) -> dict[str, Any]:
    if need.kind == "verdict":
        found = toys.verdict()
        return {"kind": "verdict", "verdict": {"flagged": found.flagged, "index": found.index, "norms": found.norms}}
    if need.kind in ("result", "model"):
        save_file(state_of(toys.victim() if need.kind == "result" else toys.clean_model()), file)
        return {"kind": need.kind}
    start = f"{toys.TARGET}/" if need.verdict else ""
    save_file({start + name: tensor.contiguous() for name, tensor in toys.true_trigger().tensors().items()}, file)
    where = f"{api.MaskPattern.__module__}:MaskPattern"
    return {
        "kind": "trigger", "class": where, "labels": [toys.TARGET], "modules": [where],
        "detected": need.verdict is not None,
    }  # fmt: skip


__all__ = ["check_runs_confined", "run"]
