"""The jobs that run in children: surrogate, train, trial, verdict, invert, defend, retune, predict, embed, data.

A job is a folder: `spec.json` and `in/` before, `out/` and `result.json` after. It reads nothing else, but for the
prepared data set that surrogate, train and trial are pointed to, and is pure: equal folders give equal `out/`.
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
from torch import Tensor
from torch.nn import functional as F

from . import api, datacache, globalstate, kit
from .confine import confine, interpreter_paths, watch
from .errors import BbmclError, Diverged, NotApplicable, PluginError
from .inversions import invert, verdict
from .job import Job, Tick, attack_state, require_finite, weights_of
from .probes import embed, retune

_CHUNK = 33 << 20  # bytes of images worked on at once: above 32 MB glibc always gives freed memory back

# ---------------------------------------------------------------- victims


PGD_EPS, PGD_STEP, PGD_STEPS = 8 / 255, 2 / 255, 10  # spec 4.4
PGD_IMAGES = 500  # test images: two standard errors are 4.5 points


def surrogate(job: Job) -> None:
    """A clean model for an attacker. out: weights; meta: test accuracy, under PGD-10 too if trained against it."""
    recipe = cast(api.Recipe, job.method("recipe"))
    model = job.classifier()
    rng = job.rng("order")
    context = api.Context(**job.context(rng, recipe))
    radius, step = recipe.pgd_eps / 255, recipe.pgd_step / 255

    def loss(batch: api.Batch) -> Tensor:
        x = batch.x
        if radius:
            model.eval()  # the search must not move the statistics of batch norm
            x = kit.pgd(model, x, batch.y, eps=radius, step=step, steps=recipe.pgd_steps, rng=rng)
            model.train()
        return F.cross_entropy(model(x), batch.y)

    model.train()
    kit.fit(model, api.Images(*job.split("train")).to(job.device), context, loss)
    weights = weights_of(model)
    require_finite(weights)
    job.save("weights", weights)
    x, y = (part[:PGD_IMAGES] for part in job.split("test"))  # the cache's order is that of pixel hashes: random
    meta = {"accuracy": 100 * float((kit.predict(model, x) == y).float().mean()), "images": len(x), "pgd": None}
    if radius:
        right = 0
        for batch in api.Images(x, y).to(job.device).batches(128):
            moved = kit.pgd(model.eval(), batch.x, batch.y, eps=PGD_EPS, step=PGD_STEP, steps=PGD_STEPS, rng=rng)
            right += int((model(moved).argmax(1) == batch.y).sum())
        meta["pgd"] = 100 * right / len(x)
    job.save_meta(meta)


def train(job: Job) -> None:
    """A victim: prepare the attack, poison, fit. out: weights, attack (its state and the poison indices)."""
    attack = cast(api.Attack, job.method("attack"))
    recipe = cast(api.Recipe, job.method("recipe"))
    model = job.classifier()
    x, y = job.split("train")
    clean = api.Images(x, y)
    own = job.context(job.rng("trigger"), recipe, "prepare")
    state = attack.prepare(api.AttackContext(**own, train=clean, needs=job.needs()))
    poisoned = attack.poison(clean, state, job.rng("poison"))
    _check_overlay(attack, poisoned, clean, model)
    images = _poisoned(clean, poisoned, job.device)
    model.train()
    kit.fit(
        model,
        images,
        api.Context(**job.context(job.rng("order"), recipe)),
        lambda batch: F.cross_entropy(model(batch.x), batch.y),
    )
    weights = weights_of(model)
    require_finite(weights)
    job.save("weights", weights)
    lasting = attack.lasting(state)
    job.save("attack", {"poison_index": poisoned.index, **{f"state.{k}": v for k, v in lasting.tensors.items()}})
    job.save_meta({"attack": dict(lasting.meta), "poisoned": len(poisoned.index), "train": len(images)})


class _Overlaid(api.Images):
    """Images over which others are laid as batches and subsets are taken; `x` itself stays what it was.

    Written to, the pages of a map of the data set would become memory of this process.
    """

    def __init__(self, x: Tensor, y: Tensor, index: Tensor, over: Tensor) -> None:
        super().__init__(x, y)
        self._over = over
        self._place = torch.full((len(x),), -1)  # of each image among those laid over
        self._place[index] = torch.arange(len(index))

    def to(self, device: torch.device | str) -> api.Images:
        """The images as they are seen, in memory."""
        return api.Images(*self.take(torch.arange(len(self)))).to(device)

    def take(self, index: Tensor) -> tuple[Tensor, Tensor]:
        x, y = super().take(index)
        place = self._place[index]
        laid = place >= 0
        x[laid] = self._over[place[laid]]
        return x, y


def _poisoned(clean: api.Images, poisoned: api.Poisoned, device: torch.device) -> api.Images:
    """The training images as the victim sees them, on `device`."""
    y = clean.y.clone()
    y[poisoned.index] = poisoned.y
    if device.type == "cpu":
        return _Overlaid(clean.x, y, poisoned.index, poisoned.x)
    x = clean.x.to(device)
    x[poisoned.index.to(device)] = poisoned.x.to(device)
    return api.Images(x, y.to(device))


def _check_overlay(attack: api.Attack, poisoned: api.Poisoned, clean: api.Images, model: api.Classifier) -> None:
    index, x, y = poisoned
    count = len(index)
    fits = x.dtype == torch.uint8 and x.shape == (count, *clean.x.shape[1:]) and y.shape == (count,)
    if not fits or index.dtype != torch.int64 or y.dtype != torch.int64 or len(index.unique()) != count:
        raise PluginError(
            f"{attack.name}: poison() must return distinct int64 indices, uint8 images and int64 labels for them"
        )
    if count and not (int(index.min()) >= 0 and int(index.max()) < len(clean)):
        raise PluginError(f"{attack.name}: poison() returned indices outside the {len(clean)} training images")


def trial(job: Job) -> None:
    """The triggered test set. out: x uint8 (N, C, H, W), goal int64 (N,), counted bool as uint8 (N,)."""
    attack = cast(api.Attack, job.method("attack"))
    x, y = job.split("test")
    state = attack_state(job)
    stamped = _stamped(job, attack, x, y, state)
    goal, counted = attack.goal(y, state)
    if goal.shape != y.shape or counted.shape != y.shape or counted.dtype != torch.bool:
        raise PluginError(
            f"{attack.name}: goal() returned {tuple(goal.shape)} and {counted.dtype} {tuple(counted.shape)}, "
            f"expected a label and a bool for each of {len(y)} images"
        )
    if bool(((goal < 0) | (goal >= job.spec["data"]["classes"])).any()):
        raise PluginError(f"{attack.name}: goal() returned labels outside 0..{job.spec['data']['classes'] - 1}")
    if bool((counted & (goal == y)).any()):
        raise PluginError(f"{attack.name}: goal() counts images whose goal is their own label")
    job.save("trial", {"x": stamped, "goal": goal.to(torch.int64), "counted": counted.to(torch.uint8)})
    job.save_meta({"counted": int(counted.sum()), "location": _location(x, stamped)})


def _stamped(job: Job, attack: api.Attack, x: Tensor, y: Tensor, state: api.State) -> Tensor:
    """x with the trigger, in a file of the job: test images may be more than memory holds."""
    rng, size = job.rng("stamp"), _rows(x)
    path = job.folder / "work" / "stamped"
    path.parent.mkdir(exist_ok=True)
    with path.open("wb") as file:
        for part, labels in zip(x.split(size), y.split(size), strict=True):
            out = attack.stamp(part.clone(), labels.clone(), state, rng)
            if out.dtype != torch.uint8 or out.shape != part.shape:
                raise PluginError(
                    f"{attack.name}: stamp() returned {out.dtype} {tuple(out.shape)}, "
                    f"expected uint8 {tuple(part.shape)}"
                )
            file.write(out.cpu().contiguous().numpy().data)
            del out  # or it would still be there beside the next
    return torch.from_numpy(np.memmap(path, np.uint8, "c", shape=tuple(x.shape)))


def _rows(x: Tensor) -> int:
    """Images that are worked on at once; a whole test set of small ones."""
    return max(1, _CHUNK // x[:1].numel())


def _location(x: Tensor, stamped: Tensor) -> api.Location | None:
    """The box that the trigger replaces, None where it is no patch: what it shows depends on the image beneath."""
    size = _rows(x)
    changed = torch.zeros(x.shape[2:], dtype=torch.bool)
    for before, after in zip(x.split(size), stamped.split(size), strict=True):
        changed |= (after != before).any(1).any(0)  # (H, W)
    if not bool(changed.any()):
        return None
    rows, columns = changed.any(1).nonzero(), changed.any(0).nonzero()
    top, left = int(rows.min()), int(columns.min())
    box = api.Location(top, left, int(rows.max()) - top + 1, int(columns.max()) - left + 1)
    patch = stamped[:, :, top : top + box.height, left : left + box.width]
    return box if all(bool((part == patch[:1]).all()) for part in patch.split(size)) else None


# ---------------------------------------------------------------- defenses


def defend(job: Job) -> None:
    """A repaired model. out: weights, with the victim's keys and shapes."""
    defense = cast(api.Defense, job.method("defense"))
    recipe = cast(api.Recipe, job.method("recipe"))
    victim = job.victim()
    expected = {name: (tensor.shape, tensor.dtype) for name, tensor in victim.state_dict().items()}
    context = api.DefenseContext(
        **job.context(job.rng("order"), recipe),
        clean=job.clean(),
        needs=job.needs(),
        granted=api.Granted(defense.name, job.spec["grants"]),
    )
    repaired = defense.defend(victim, context)
    if not isinstance(repaired, api.Classifier):
        raise PluginError(f"{defense.name}: defend() returned {type(repaired).__name__}, expected a Classifier")
    weights = weights_of(repaired)
    if {name: (tensor.shape, tensor.dtype) for name, tensor in weights.items()} != expected:
        raise PluginError(
            f"{defense.name}: defend() changed the architecture; it must return the victim's keys, shapes and types"
        )
    require_finite(weights)
    job.save("weights", weights)
    _check_forward(job, defense, repaired, context.clean)
    job.save_meta({"clean": len(context.clean)})


def _check_forward(job: Job, defense: api.Defense, repaired: api.Classifier, clean: api.Images) -> None:
    """Only weights are kept, so what a defense returns must compute what the network computes with its weights."""
    rebuilt = job.classifier()
    rebuilt.load_state_dict(repaired.state_dict())
    x = next(clean.batches(64)).x
    with torch.no_grad():
        same = torch.allclose(repaired.eval()(x), rebuilt(x), rtol=0.05, atol=0.05)  # bf16 may differ by layout
    if not same:
        raise PluginError(
            f"{defense.name}: defend() returned a model that does more than the network with its weights (a hook, "
            "another normalisation, another class); only weights are kept, so put the repair into them"
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
    "trial": trial,
    "verdict": verdict,
    "invert": invert,
    "defend": defend,
    "retune": retune,
    "predict": predict,
    "embed": embed,
    "data": data,
}


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
    if job.device.type == "cuda":
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # without it cuBLAS refuses to be deterministic
        torch.backends.cudnn.benchmark = False
        torch.backends.cuda.matmul.allow_tf32 = False
        torch.backends.cudnn.allow_tf32 = False
        torch.use_deterministic_algorithms(True)
    if spec["isolation"] == "inline" or spec["job"] == "data":
        return str(spec["isolation"]), []
    methods = [part for part in spec.values() if isinstance(part, dict) and "kind" in part]
    classes = [part["target"] for part in methods]
    for need in spec.get("needs", {}).values():
        classes += need.get("modules", [])
    plugins = sorted({where.partition(":")[0] for where in classes})
    read = [*interpreter_paths(plugins), *(Path(path) for path in spec["readable"])]
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
    return "failed", f"{type(error).__name__}: {first[0]}" if first else type(error).__name__


def run(folder: Path, tick: Tick, settled: Callable[[], None]) -> None:
    """Run the job in `folder` in this process, whatever happens leaving `result.json` there.

    `settled` is called once the process is confined, which has to happen before any thread is started.
    """
    started = time.perf_counter()
    spec = json.loads((folder / "spec.json").read_text())
    job = Job(folder, spec, tick)
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
    result["seconds"] = time.perf_counter() - started
    result["peak_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    if job.device.type == "cuda" and torch.cuda.is_initialized():
        result["peak_gpu_mb"] = torch.cuda.max_memory_allocated() / 2**20
    result["strays"] = strays[:20]
    result["changed"] = globalstate.changed(before) if before else []
    result["curves"] = job.curves
    scratch = folder / "result.json.part"
    scratch.write_text(json.dumps(result))
    os.replace(scratch, folder / "result.json")


__all__ = ["BODIES", "run"]
