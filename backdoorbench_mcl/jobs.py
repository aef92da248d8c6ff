"""The jobs that run in children: of `victims`, `inversions`, `probes`, `handed`, `pooling`; defend, predict, data.

A job is a folder: `spec.json` and `in/` before, `out/` and `result.json` after. It reads nothing else, but for the
prepared data set that the attacker's jobs are pointed to and the images of which `pool` makes a copy, and is pure:
equal folders give equal `out/`.
"""

from __future__ import annotations

import errno
import json
import os
import random
import resource
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from safetensors.torch import load_file

from . import api, datacache, globalstate, kit, memory, nearby
from .comparing import compare
from .confine import confine, interpreter_paths, watch
from .describe import jsonable
from .engines.base import functions, named
from .errors import BbmclError, Diverged, NotApplicable, PluginError
from .handed import look, open_
from .inversions import invert, verdict
from .job import Job, Tick, require_finite, weights_of
from .pooling import pool
from .probes import embed, retune
from .text import one_line, raised_at
from .victims import surrogate, suspect, train, trial


def defend(job: Job) -> None:
    """A repaired model. out: weights, with the victim's keys and shapes or with a way to build the network again."""
    defense = cast(api.Defense, job.method("defense"))
    recipe = cast(api.Recipe, job.method("recipe"))
    victim = job.victim()
    expected = {name: (tensor.shape, tensor.dtype) for name, tensor in victim.state_dict().items()}
    grants = dict(job.spec["grants"])
    if "suspect" in grants:
        found = load_file(job.folder / "in" / "suspect.safetensors")
        grants["suspect"] = api.Images(found["x"], found["y"])
    context = api.DefenseContext(
        **job.context(job.rng("order"), recipe),
        clean=job.clean(),
        needs=job.needs(),
        granted=api.Granted(defense.name, grants),
        fresh=job.fresh,
    )
    made = defense.defend(victim, context)
    repaired = made.model if isinstance(made, api.Repaired) else made
    if not isinstance(repaired, api.Classifier):
        raise PluginError(f"{defense.name}: defend() returned {type(repaired).__name__}, expected a Classifier")
    weights = weights_of(repaired)
    how: dict[str, Any] = {}
    if isinstance(made, api.Repaired):
        how = {"rebuild": {"function": made.rebuild, "params": jsonable(dict(made.params))}}
    elif {name: (tensor.shape, tensor.dtype) for name, tensor in weights.items()} != expected:
        raise PluginError(
            f"{defense.name}: defend() changed the architecture; return the victim's keys, shapes and types, or "
            "Repaired(model, rebuild, params)"
        )
    require_finite(weights)
    job.save("weights", weights)
    _check_forward(job, defense, repaired, context.clean, how.get("rebuild"))
    job.save_meta({"clean": len(context.clean), **how})


def _check_forward(
    job: Job, defense: api.Defense, repaired: api.Classifier, clean: api.Images, how: Mapping[str, Any] | None
) -> None:
    """Only weights are kept, so what a defense returns must compute what the network computes with its weights."""
    rebuilt = job.classifier()
    if how is not None:
        rebuilt = job.rebuilt(rebuilt, how["function"], how["params"])
    try:
        rebuilt.load_state_dict(repaired.state_dict())
    except RuntimeError as error:
        where = "its rebuild" if how else "the network"
        raise PluginError(f"{defense.name}: {where} does not take the weights: {one_line(str(error), 200)}") from error
    x = next(clean.batches(64)).x
    with torch.no_grad():
        same = torch.allclose(repaired.eval()(x), rebuilt(x), rtol=0.05, atol=0.05)  # bf16 may differ by layout
    if not same:
        raise PluginError(
            f"{defense.name}: defend() returned a model that does more than the network with its weights (a hook, "
            "another normalisation, another class); put the repair into the weights, or return "
            "Repaired(model, rebuild, params)"
        )


def predict(job: Job) -> None:
    """Predicted labels of `in/x.npy`, whatever it holds. out: labels int64 (N,)."""
    x = torch.from_numpy(np.load(job.folder / "in" / "x.npy", mmap_mode="c"))
    labels = kit.predict(job.victim(), x)
    classes = job.spec["data"]["classes"]
    if labels.shape != (len(x),) or bool((labels >= classes).any()):
        raise PluginError(
            f"{job.spec['model']['name']}: the network gave {tuple(labels.shape)} labels up to {int(labels.max())} for "
            f"{len(x)} images of {classes} classes; expected logits of shape (N, {classes})"
        )
    job.tick(len(x), len(x), len(x))
    job.save("labels", {"labels": labels.to(torch.int64)})
    job.save_meta({"images": len(x)})


def data(job: Job) -> None:
    """Prepare a data set in the cache. meta: its DataInfo."""
    dataset = cast(api.Dataset, job.method("dataset"))
    root = None if job.spec["root"] is None else Path(job.spec["root"])
    info = datacache.prepare(dataset, root, Path(job.spec["cache"]), job.spec["key"])
    job.save_meta(info.as_dict())


BODIES: Mapping[str, Callable[[Job], None]] = {
    "surrogate": surrogate,
    "train": train,
    "suspect": suspect,
    "trial": trial,
    "verdict": verdict,
    "invert": invert,
    "defend": defend,
    "retune": retune,
    "predict": predict,
    "embed": embed,
    "compare": compare,
    "open": open_,
    "look": look,
    "data": data,
    "pool": pool,
}

# Networks ask for the same maps batch after batch. Jobs that go over whole data sets give back what they free.
_LOOPS = {"surrogate", "train", "verdict", "invert", "defend", "retune", "predict", "embed", "compare"}


# ---------------------------------------------------------------- running one


def _settle(job: Job) -> tuple[str, list[str]]:
    """Seeds, threads, determinism and confinement of this process.

    Returns the isolation that was reached, and for "process" the list, growing from now on, of files that Python
    code opens, or changes, although they were not granted: what cannot be prevented at least marks the row.
    """
    spec = job.spec
    random.seed(spec["seeds"]["init"])
    np.random.seed(spec["seeds"]["init"] % 2**32)
    torch.manual_seed(spec["seeds"]["init"])
    torch.set_num_threads(spec["threads"])
    if spec["job"] in _LOOPS:
        # A confident network gives an image that it is sure of a gradient below 1e-38, with which a processor computes
        # ten times as slowly; beside the other images' it is lost in any sum.
        torch.set_flush_denormal(True)
        if spec["isolation"] != "inline":  # inline, this is the caller's process
            memory.keep()
    if job.device.type == "cuda":
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # without it cuBLAS refuses to be deterministic
        torch.backends.cudnn.benchmark = False
        torch.backends.cuda.matmul.allow_tf32 = False
        torch.backends.cudnn.allow_tf32 = False
        torch.use_deterministic_algorithms(True)
    own = [path for where in functions(spec) for path in nearby.reach(where.partition(":")[0], Path.cwd())]
    if spec["isolation"] == "inline" or spec["job"] == "data":
        return str(spec["isolation"]), []
    plugins = sorted({where.partition(":")[0] for where in named(spec)})
    read = [*interpreter_paths(plugins), *own, *(Path(path) for path in spec["readable"])]
    snapshot = Path(spec["snapshot"])
    snapshot.mkdir(parents=True, exist_ok=True)
    write = [job.folder, snapshot]
    if spec["isolation"] == "landlock" and confine(read, write) == "landlock":
        return "landlock", []
    return "process", watch(read, write)


def _reason(error: BaseException) -> tuple[str, str]:
    """(state, one line) for whatever ended a job."""
    if isinstance(error, Diverged):
        return "diverged", str(error)
    if isinstance(error, NotApplicable):
        return "n/a", str(error)
    if isinstance(error, BbmclError):
        return "failed", str(error)
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return (
            "failed",
            f"no space left on the device ({error.filename or 'work folder'}); make room or set TMPDIR, then run again",
        )
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return "failed", "out of memory; use fewer --workers or a smaller batch (--set train.batch=...)"
    first = str(error).strip().splitlines()
    raised = f"{type(error).__name__} at {raised_at(error)}"
    return "failed", f"{raised}: {first[0]}" if first else raised


def run(folder: Path, tick: Tick, settled: Callable[[], None], make: Callable[[Path, Any, Tick], Job] = Job) -> None:
    """Run the job in `folder` in this process, whatever happens leaving `result.json` there.

    `settled` is called once the process is confined, which has to happen before any thread is started. make: the job
    of folder, spec and tick.
    """
    started = time.perf_counter()
    spec = json.loads((folder / "spec.json").read_text())
    job = make(folder, spec, tick)
    result: dict[str, Any] = {"state": "ok", "reason": "", "isolation": spec["isolation"]}
    strays: list[str] = []
    before: dict[str, Any] = {}
    try:
        (folder / "out").mkdir(exist_ok=True)
        result["isolation"], strays = _settle(job)
        settled()
        before = globalstate.taken()
        BODIES[spec["job"]](job)
    except (Exception, SystemExit) as error:  # a method may raise anything; its cell fails, nothing else does
        traceback.print_exc()
        result["state"], result["reason"] = _reason(error)
    if spec["isolation"] == "inline":
        torch.set_flush_denormal(False)
    result["seconds"] = time.perf_counter() - started
    result["peak_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    if job.device.type == "cuda":  # reserved: steps that are recorded keep what they have freed
        used = torch.cuda.is_initialized()
        result["peak_gpu_mb"] = torch.cuda.max_memory_reserved(job.device) / 2**20 if used else 0.0
    result["earlier"] = job.clock.earlier
    result["strays"] = strays[:20]
    result["changed"] = globalstate.changed(before) if before else []
    result["curves"] = job.curves
    scratch = folder / "result.json.part"
    scratch.write_text(json.dumps(result))
    os.replace(scratch, folder / "result.json")


__all__ = ["BODIES", "run"]
