"""The jobs that run in children: train, trial, invert, defend, predict, data (design 3.5).

A job is a folder: `spec.json` and `in/` before, `out/` and `result.json` after. It reads nothing else, but for the
prepared data set that train and trial are pointed to, and is pure: equal folders give equal `out/`.
"""

from __future__ import annotations

import errno
import importlib
import json
import os
import random
import resource
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

from . import api, datacache, kit
from .confine import confine, interpreter_paths, watch
from .describe import construct
from .errors import BbmclError, Diverged, PluginError
from .snapshots import FolderSnapshot

Tick = Callable[[int, int, int], None]


@dataclass(frozen=True)
class Job:
    """The running job: its folder, its spec, and how it tells the driver of its progress."""

    folder: Path
    spec: Mapping[str, Any]
    tick: Tick

    @property
    def device(self) -> torch.device:
        return torch.device(self.spec["device"])

    def rng(self, role: str) -> torch.Generator:
        """A CPU generator with the seed that the driver derived for `role`."""
        return torch.Generator().manual_seed(self.spec["seeds"][role])

    def method(self, name: str) -> Any:
        """The method that the spec describes under `name`."""
        spec = self.spec[name]
        return construct(spec["target"], spec["kind"], spec["suffix"], spec["params"])

    def classifier(self) -> api.Classifier:
        """A fresh network of the spec's model, on the device, in eval mode."""
        data = self.spec["data"]
        torch.manual_seed(self.spec["seeds"]["init"])  # the model draws its weights from the global generator
        model = cast(api.Model, self.method("model")).build(data["classes"], tuple(data["shape"]))
        model.set_normalisation(tuple(data["mean"]), tuple(data["std"]))
        model.precision = self.spec["precision"]
        return model.to(self.device).to(memory_format=torch.channels_last).eval()

    def victim(self) -> api.Classifier:
        """The network with the weights of `in/weights.safetensors`."""
        model = self.classifier()
        model.load_state_dict(load_file(self.folder / "in" / "weights.safetensors"))
        return model

    def context(self, rng: torch.Generator, recipe: api.Recipe) -> dict[str, Any]:
        """The fields that every context shares."""
        data = self.spec["data"]
        work = self.folder / "work"
        work.mkdir(exist_ok=True)
        return {
            "rng": rng,
            "device": self.device,
            "workdir": work,
            "classes": data["classes"],
            "log": lambda line: print(line, flush=True),
            "tick": self.tick,
            "snapshot": FolderSnapshot(Path(self.spec["snapshot"]), self.spec["snapshot_every"]),
            "recipe": recipe,
            "augment": kit.augmentation(recipe.augment, data["flip_ok"]),
        }

    def split(self, split: str) -> tuple[Tensor, Tensor]:
        """Images and labels of the prepared data set: copy-on-write maps, so that changes stay in this process."""
        info = datacache.DataInfo.from_dict(self.spec["data"])
        x, y = datacache.open_split(info, cast(Any, split), mode="c")
        return torch.from_numpy(x), torch.from_numpy(np.array(y))

    def clean(self) -> api.Images:
        """The clean images that were granted."""
        found = load_file(self.folder / "in" / "clean.safetensors")
        return api.Images(found["x"], found["y"]).to(self.device)

    def save(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Write `out/<name>.safetensors`."""
        plain = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
        save_file(plain, self.folder / "out" / f"{name}.safetensors")

    def save_meta(self, meta: Mapping[str, Any]) -> None:
        """Write `out/meta.json`."""
        (self.folder / "out" / "meta.json").write_text(json.dumps(meta, sort_keys=True, allow_nan=False))


def _weights(model: api.Classifier) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}


def _require_finite(weights: Mapping[str, Tensor]) -> None:
    for name, tensor in weights.items():
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise Diverged(f"weights are not finite: {name}")


# ---------------------------------------------------------------- victims


def train(job: Job) -> None:
    """A victim: prepare the attack, poison, fit. out: weights, attack (its state and the poison indices)."""
    attack = cast(api.Attack, job.method("attack"))
    recipe = cast(api.Recipe, job.method("recipe"))
    model = job.classifier()
    x, y = job.split("train")
    clean = api.Images(x, y)
    state = attack.prepare(api.AttackContext(**job.context(job.rng("trigger"), recipe), train=clean))
    poisoned = attack.poison(clean, state, job.rng("poison"))
    _check_overlay(attack, poisoned, clean, model)
    x[poisoned.index] = poisoned.x
    y[poisoned.index] = poisoned.y
    images = api.Images(x, y).to(job.device)
    model.train()
    kit.fit(
        model,
        images,
        api.Context(**job.context(job.rng("order"), recipe)),
        lambda batch: F.cross_entropy(model(batch.x), batch.y),
    )
    weights = _weights(model)
    _require_finite(weights)
    job.save("weights", weights)
    job.save("attack", {"poison_index": poisoned.index, **{f"state.{k}": v for k, v in state.tensors.items()}})
    job.save_meta({"attack": dict(state.meta), "poisoned": len(poisoned.index), "train": len(images)})


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


def _attack_state(job: Job) -> api.State:
    tensors = load_file(job.folder / "in" / "attack.safetensors")
    prefix = "state."
    state = {name[len(prefix) :]: tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    return api.State(state, job.spec["attack_meta"])


def trial(job: Job) -> None:
    """The triggered test set. out: x uint8 (N, C, H, W), goal int64 (N,), counted bool as uint8 (N,)."""
    attack = cast(api.Attack, job.method("attack"))
    x, y = job.split("test")
    stamped = attack.stamp(x.clone(), y.clone(), _attack_state(job), job.rng("stamp"))
    if stamped.dtype != torch.uint8 or stamped.shape != x.shape:
        raise PluginError(
            f"{attack.name}: stamp() returned {stamped.dtype} {tuple(stamped.shape)}, expected uint8 {tuple(x.shape)}"
        )
    goal, counted = attack.goal(y)
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
    job.save_meta({"counted": int(counted.sum())})


# ---------------------------------------------------------------- defenses


def invert(job: Job) -> None:
    """An inverted trigger. out: trigger; meta: its class and how good it is, measured here and not by the method.

    success is the share of clean images, not already called the target by the victim, that the trigger sends to it:
    labels are not granted to an inversion, so the victim's own prediction stands in for them.
    """
    inverter = cast(api.Inverter, job.method("inverter"))
    # of the common recipe only the augmentation is in an inversion's key, so no more of it is handed over
    recipe = api.Recipe(augment=cast(api.Recipe, job.method("recipe")).augment)
    victim, clean, target = job.victim(), job.clean(), int(job.spec["grants"]["target"])
    context = api.InverterContext(**job.context(job.rng("invert"), recipe), clean=clean)
    trigger = inverter.invert(kit.frozen(victim), target, context)
    if not isinstance(trigger, api.Trigger):
        raise PluginError(f"{inverter.name}: invert() returned {type(trigger).__name__}, expected a Trigger")
    tensors = trigger.tensors()
    _require_finite(tensors)
    rng = job.rng("stamp")
    hit, other, changed = 0, 0, 0.0
    with torch.no_grad():
        for batch in clean.batches(256):
            away = victim(batch.x).argmax(1) != target
            stamped = trigger.apply(batch.x, rng).clamp(0, 1)
            hit += int(((victim(stamped).argmax(1) == target) & away).sum())
            other += int(away.sum())
            changed += float(((stamped - batch.x).abs().amax(1) > 1 / 255).float().sum())
    mask = tensors.get("mask")
    job.save("trigger", tensors)
    job.save_meta(
        {
            "class": f"{type(trigger).__module__}:{type(trigger).__qualname__}",
            "success": 100 * hit / other if other else None,
            "success_k": hit,
            "success_n": other,
            "l1": None if mask is None else float(mask.abs().sum()),
            "pixels_changed": changed / len(clean),
        }
    )


def _needs(job: Job) -> dict[str, api.Trigger]:
    out = {}
    for name, meta in job.spec["needs"].items():
        module, _, cls = meta["class"].partition(":")
        trigger_class = getattr(importlib.import_module(module), cls)
        if not issubclass(trigger_class, api.Trigger):
            raise PluginError(f"stored trigger class {meta['class']} is no Trigger")
        tensors = load_file(job.folder / "in" / f"need-{name}.safetensors")
        out[name] = trigger_class.from_tensors({key: tensor.to(job.device) for key, tensor in tensors.items()})
    return out


def defend(job: Job) -> None:
    """A repaired model. out: weights, with the victim's keys and shapes."""
    defense = cast(api.Defense, job.method("defense"))
    recipe = cast(api.Recipe, job.method("recipe"))
    victim = job.victim()
    expected = {name: (tensor.shape, tensor.dtype) for name, tensor in victim.state_dict().items()}
    context = api.DefenseContext(
        **job.context(job.rng("order"), recipe),
        clean=job.clean(),
        needs=_needs(job),
        granted=api.Granted(defense.name, job.spec["grants"]),
    )
    repaired = defense.defend(victim, context)
    if not isinstance(repaired, api.Classifier):
        raise PluginError(f"{defense.name}: defend() returned {type(repaired).__name__}, expected a Classifier")
    weights = _weights(repaired)
    if {name: (tensor.shape, tensor.dtype) for name, tensor in weights.items()} != expected:
        raise PluginError(
            f"{defense.name}: defend() changed the architecture; it must return the victim's keys, shapes and types"
        )
    _require_finite(weights)
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
    x = torch.from_numpy(np.load(job.folder / "in" / "x.npy"))
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
    "train": train,
    "trial": trial,
    "invert": invert,
    "defend": defend,
    "predict": predict,
    "data": data,
}


# ---------------------------------------------------------------- running one


def _settle(job: Job) -> tuple[str, list[str]]:
    """Seeds, threads, determinism and confinement of this process.

    Returns the isolation that was reached, and for "process" the list, growing from now on, of files that Python
    code opens although they were not granted: what cannot be prevented at least marks the row.
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
    plugins = sorted({part["target"].partition(":")[0] for part in methods})
    read = [*interpreter_paths(plugins), *(Path(path) for path in spec["readable"])]
    snapshot = Path(spec["snapshot"])
    snapshot.mkdir(parents=True, exist_ok=True)
    write = [job.folder, snapshot]
    if spec["isolation"] == "landlock" and confine(read, write) == "landlock":
        return "landlock", []
    return "process", watch([*read, *write])


def _reason(error: BaseException) -> tuple[str, str]:
    """(state, one line) for whatever ended a job."""
    if isinstance(error, Diverged):
        return "diverged", str(error)
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
    try:
        (folder / "out").mkdir(exist_ok=True)
        result["isolation"], strays = _settle(job)
        settled()
        BODIES[spec["job"]](job)
    except (Exception, SystemExit) as error:  # a method may raise anything; its cell fails, nothing else does
        traceback.print_exc()
        result["state"], result["reason"] = _reason(error)
    result["seconds"] = time.perf_counter() - started
    result["peak_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    if job.device.type == "cuda" and torch.cuda.is_initialized():
        result["peak_gpu_mb"] = torch.cuda.max_memory_allocated() / 2**20
    result["strays"] = strays[:20]
    scratch = folder / "result.json.part"
    scratch.write_text(json.dumps(result))
    os.replace(scratch, folder / "result.json")


__all__ = ["BODIES", "Job", "run"]
