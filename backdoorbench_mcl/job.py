"""A running job: its folder, its spec, what the methods in it are handed, and what it leaves (design 3.5)."""

from __future__ import annotations

import importlib
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from . import api, datacache, kit
from .describe import construct
from .errors import Diverged, PluginError
from .snapshots import Clock, FolderSnapshot

Tick = Callable[[int, int, int], None]
MAX_CURVES, MAX_POINTS = 8, 1000  # of a job: they go into the database and into reports


@dataclass(frozen=True)
class Job:
    """The running job: its folder, its spec, and how it tells the driver of its progress."""

    folder: Path
    spec: Mapping[str, Any]
    tick: Tick
    curves: dict[str, list[tuple[int, float]]] = field(default_factory=dict)  # what methods recorded, by name
    clock: Clock = field(default_factory=Clock)  # that all its snapshots go by

    @property
    def device(self) -> torch.device:
        return torch.device(self.spec["device"])

    def record(self, name: str, step: int, value: float) -> None:
        """A point of a curve; what is not finite, or one too many, is left out."""
        name = str(name)[:40]
        if not math.isfinite(value) or (name not in self.curves and len(self.curves) >= MAX_CURVES):
            return
        points = self.curves.setdefault(name, [])
        if len(points) < MAX_POINTS:
            points.append((int(step), float(value)))

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

    def victim(self, file: str = "weights") -> api.Classifier:
        """The network with the weights of `in/<file>.safetensors`, built again where a repair changed it."""
        model = self.classifier()
        if (how := self.spec.get("rebuild", {}).get(file)) is not None:
            model = self.rebuilt(model, how["function"], how["params"])
        model.load_state_dict(load_file(self.folder / "in" / f"{file}.safetensors"))
        return model

    def rebuilt(self, model: api.Classifier, function: str, params: Mapping[str, Any]) -> api.Classifier:
        """What a repair's `rebuild` makes of an untrained `model`, in eval mode on the device."""
        made = rebuilt(model, function, params)
        made.precision = self.spec["precision"]
        return made.to(self.device).to(memory_format=torch.channels_last).eval()

    def fresh(self) -> api.Classifier:
        """An untrained network of the architecture, without a trace in the global generator."""
        with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
            return self.classifier()

    def needs(self) -> dict[str, Any]:
        """The stages that the method asked for, as the types that `api.Need` names."""
        return {name: self._need(name, told) for name, told in self.spec.get("needs", {}).items()}

    def _need(self, name: str, told: Mapping[str, Any]) -> Any:
        kind = told["kind"]
        if kind == "verdict":
            return api.Verdict(**{field: tuple(values) for field, values in told["verdict"].items()})
        if kind != "trigger":  # a surrogate or what another defense made; the attacker's own may not be moved
            model = self.victim(f"need-{name}")
            return kit.frozen(model) if kind == "model" else model
        found = load_file(self.folder / "in" / f"need-{name}.safetensors")
        tensors = {key: tensor.to(self.device) for key, tensor in found.items()}
        if not told["detected"]:
            return trigger_of(told["class"], tensors)
        return {label: trigger_of(told["class"], of_label(tensors, label)) for label in told["labels"]}

    def context(self, rng: torch.Generator, recipe: api.Recipe, part: str = "") -> dict[str, Any]:
        """The fields that every context shares. part: keeps the snapshots of one part of the job to themselves."""
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
            "record": self.record,
            "snapshot": FolderSnapshot(Path(self.spec["snapshot"]) / part, self.spec["snapshot_every"], self.clock),
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
        plain: dict[str, Tensor] = {}
        for key, tensor in tensors.items():
            value = tensor.detach().cpu().contiguous()
            taken = any(value.data_ptr() == other.data_ptr() for other in plain.values())
            plain[key] = value.clone() if taken else value  # safetensors refuses two names for one memory
        save_file(plain, self.folder / "out" / f"{name}.safetensors")

    def save_meta(self, meta: Mapping[str, Any]) -> None:
        """Write `out/meta.json`."""
        (self.folder / "out" / "meta.json").write_text(json.dumps(meta, sort_keys=True, allow_nan=False))


def rebuilt(model: api.Classifier, function: str, params: Mapping[str, Any]) -> api.Classifier:
    """What the `rebuild` "module:function" of a repair makes of an untrained `model`. Raises PluginError."""
    module, _, name = function.partition(":")
    try:
        build = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise PluginError(
            f"rebuild {function!r} cannot be imported ({error}); expected 'package.module:function'"
        ) from error
    made = build(model, **params)
    if not isinstance(made, api.Classifier):
        raise PluginError(f"rebuild {function} returned {type(made).__name__}, expected a Classifier")
    return made


def weights_of(model: api.Classifier) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}


def require_finite(weights: Mapping[str, Tensor]) -> None:
    for name, tensor in weights.items():
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise Diverged(f"weights are not finite: {name}")


def attack_state(job: Job) -> api.State:
    tensors = load_file(job.folder / "in" / "attack.safetensors")
    prefix = "state."
    state = {name[len(prefix) :]: tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    return api.State(state, job.spec["attack_meta"])


def poison_index(job: Job) -> Tensor:
    """Which training images the victim's attacker changed: int64 (P,)."""
    return load_file(job.folder / "in" / "attack.safetensors")["poison_index"]


def label_key(label: int, name: str) -> str:
    return f"{label}/{name}"


def of_label(tensors: Mapping[str, Tensor], label: int) -> dict[str, Tensor]:
    start = label_key(label, "")
    return {name[len(start) :]: tensor for name, tensor in tensors.items() if name.startswith(start)}


def trigger_of(where: str, tensors: Mapping[str, Tensor]) -> api.Trigger:
    module, _, name = where.partition(":")
    cls = getattr(importlib.import_module(module), name)
    if not issubclass(cls, api.Trigger):
        raise PluginError(f"stored trigger class {where} is no Trigger")
    return cast(api.Trigger, cls.from_tensors(tensors))


__all__ = ["Job", "Tick", "attack_state", "label_key", "poison_index", "rebuilt", "require_finite", "weights_of"]
