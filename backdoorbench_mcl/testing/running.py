"""Runs a method on the toys once, as a job would, and hands back what it made."""

from __future__ import annotations

import copy
import json
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load, save
from torch import Tensor

from .. import api, job
from ..describe import jsonable
from ..errors import BbmclError
from . import datasets, toys
from .core import CheckFailed, Subject, as_api, label_of, require, seeded, state_of


class Planted(NamedTuple):
    """What an attack did. poisoned: None where it trained the model, which is then in `model`."""

    attack: api.Attack
    state: api.State
    poisoned: api.Poisoned | None
    model: api.Classifier | None


def plant(subject: Subject, *, train: api.Images | None = None, seed: int = 0, global_seed: int | None = 0) -> Planted:
    """Prepare and poison, or prepare and train."""
    attack: api.Attack = subject.make()
    train = toys.make_images() if train is None else train
    with seeded(global_seed), tempfile.TemporaryDirectory(prefix="bbmcl-check-") as folder:
        needs = toys.stand_ins(attack.needs())
        recipe = api.Recipe(steps=150, batch=40, lr=0.05, augment="none")
        own: dict[str, Any] = {"train": train, "needs": needs, "workdir": Path(folder), "recipe": recipe}
        state = attack.prepare(toys.context(api.AttackContext, seed=seed, **own))
        as_api(state, api.State, f"{label_of(subject)}: prepare()")
        if attack.controls == "training":
            model = toys.fresh().train()
            state = attack.train(model, state, toys.context(api.AttackContext, seed=seed + 1, **own))
            as_api(state, api.State, f"{label_of(subject)}: train()")
            return Planted(attack, state, None, model.eval())
        poisoned = attack.poison(train, state, torch.Generator().manual_seed(seed + 1))
        as_api(poisoned, api.Poisoned, f"{label_of(subject)}: poison()")
        return Planted(attack, state, poisoned, None)


def laid_over(train: api.Images, poisoned: api.Poisoned) -> api.Images:
    """The training set as the victim sees it."""
    x, y = train.x.clone(), train.y.clone()
    x[poisoned.index], y[poisoned.index] = poisoned.x, poisoned.y
    return api.Images(x, y)


def stamp(
    planted: Planted, x: Tensor, y: Tensor, state: api.State | None = None, global_seed: int | None = 0
) -> Tensor:
    """Test images with the trigger."""
    rng = torch.Generator().manual_seed(2)
    with seeded(global_seed):
        return planted.attack.stamp(x, y, planted.attack.lasting(planted.state) if state is None else state, rng)


def stored(state: api.State, who: str) -> api.State:
    """The state as it comes back from a file. Raises CheckFailed where a file cannot hold it."""
    try:
        tensors = load(save({name: tensor.contiguous() for name, tensor in state.tensors.items()}))
        return api.State(tensors, json.loads(json.dumps(dict(state.meta), allow_nan=False)))
    except (TypeError, ValueError, AttributeError) as error:
        raise CheckFailed(f"{who}: cannot be stored ({error}); give tensors, and JSON values in meta") from error


def repair(
    subject: Subject, *, model: api.Classifier | None = None, clean: int = toys.CLEAN, seed: int = 0,
    global_seed: int | None = 0, snapshot: toys.MemorySnapshot | None = None,
) -> api.Classifier:  # fmt: skip
    """What a defense makes of `model`, by default of the victim: built again from its weights, as rows rest on that."""
    defense: api.Defense = subject.make()
    who = label_of(subject)
    given = toys.victim() if model is None else model
    expected = {name: (tensor.shape, tensor.dtype) for name, tensor in given.state_dict().items()}
    with seeded(global_seed), tempfile.TemporaryDirectory(prefix="bbmcl-check-") as folder:
        ctx = toys.context(
            api.DefenseContext, seed=seed, workdir=Path(folder), clean=toys.clean_images(clean, defense.uses_labels),
            needs=toys.stand_ins(defense.needs()), granted=toys.granted(defense.knows, defense.name), fresh=toys.fresh,
            snapshot=toys.MemorySnapshot() if snapshot is None else snapshot,
        )  # fmt: skip
        made = defense.defend(given, ctx)
    repaired = made.model if isinstance(made, api.Repaired) else made
    as_api(repaired, api.Classifier, f"{who}: defend()")
    weights = state_of(repaired)
    rebuilt = toys.fresh()
    if isinstance(made, api.Repaired):
        try:
            rebuilt = job.rebuilt(rebuilt, made.rebuild, jsonable(dict(made.params))).eval()
        except BbmclError as error:
            raise CheckFailed(f"{who}: {error}") from error
    else:
        found = {name: (tensor.shape, tensor.dtype) for name, tensor in weights.items()}
        changed = sorted(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name))
        require(
            not changed,
            f"{who}: defend() changed {', '.join(changed[:3])} of the state dict, expected the victim's names, shapes "
            "and types; return Repaired(model, rebuild, params) for another architecture",
        )
    for name, tensor in weights.items():
        finite = not tensor.is_floating_point() or bool(tensor.isfinite().all())
        require(finite, f"{who}: {name} of the repaired model is not finite; raise api.Diverged where training does")
    try:
        rebuilt.load_state_dict(weights)
    except RuntimeError as error:
        raise CheckFailed(f"{who}: the rebuilt network does not take the weights: {error}") from error
    x = toys.make_images(40, 2).x.float() / 255
    with torch.no_grad():
        same = torch.allclose(repaired.eval()(x), rebuilt(x), rtol=1e-3, atol=1e-3)
    require(
        same,
        f"{who}: the model computes more than the network with its weights (a hook, another normalisation); only "
        "weights are kept, so put the repair into them or return Repaired(model, rebuild, params)",
    )
    return rebuilt


def fit_trigger(
    subject: Subject, *, model: api.Classifier | None = None, clean: int = toys.CLEAN, seed: int = 0,
    global_seed: int | None = 0, snapshot: toys.MemorySnapshot | None = None,
) -> api.Trigger:  # fmt: skip
    """What an inverter finds in `model`, by default in the victim, for the planted label."""
    inverter: api.Inverter = subject.make()
    with seeded(global_seed), tempfile.TemporaryDirectory(prefix="bbmcl-check-") as folder:
        ctx = _inversion(inverter, Path(folder), clean, seed, snapshot)
        given = copy.deepcopy(toys.victim() if model is None else model).eval().requires_grad_(False)
        found = inverter.invert(given, toys.TARGET, ctx)
    as_api(found, api.Trigger, f"{label_of(subject)}: invert()")
    return found


def judge(subject: Subject, seed: int = 0, global_seed: int | None = 0) -> api.Verdict:
    """What a detector says of the victim."""
    inverter: api.Inverter = subject.make()
    with seeded(global_seed), tempfile.TemporaryDirectory(prefix="bbmcl-check-") as folder:
        found = inverter.detect(toys.victim(), _inversion(inverter, Path(folder), toys.CLEAN, seed, None))
    as_api(found, api.Verdict, f"{label_of(subject)}: detect()")
    return found


def _inversion(
    inverter: api.Inverter, folder: Path, clean: int, seed: int, snapshot: toys.MemorySnapshot | None
) -> api.InverterContext:
    return toys.context(
        api.InverterContext, seed=seed, workdir=folder, recipe=api.Recipe(augment="none"),
        clean=toys.clean_images(clean, labels=False), needs=toys.stand_ins(inverter.needs()),
        granted=toys.granted(inverter.knows, inverter.name),
        snapshot=toys.MemorySnapshot() if snapshot is None else snapshot,
    )  # fmt: skip


def outcome(subject: Subject, seed: int = 0, global_seed: int | None = 0) -> dict[str, Tensor]:
    """All that a method makes on the toys, as tensors by name: what has to be the same when it is run again."""
    if subject.kind == "attack":
        planted = plant(subject, seed=seed, global_seed=global_seed)
        test = toys.make_images(20, 2)
        out = {f"state {name}": tensor for name, tensor in planted.state.tensors.items()}
        out["stamped images"] = stamp(planted, test.x, test.y, global_seed=global_seed)
        if planted.poisoned is not None:
            out.update(zip(("poison indices", "poisoned images", "poisoned labels"), planted.poisoned, strict=True))
        if planted.model is not None:
            out.update(state_of(planted.model))
        return out
    if subject.kind == "defense":
        return state_of(repair(subject, seed=seed, global_seed=global_seed))
    if subject.kind == "inverter":
        return fit_trigger(subject, seed=seed, global_seed=global_seed).tensors()
    if subject.kind == "model":
        with seeded(global_seed):
            return state_of(subject.make().build(toys.CLASSES, toys.SHAPE))
    images = [datasets.load(subject, "train")[1], datasets.load(subject, "test")[1]]
    names = ("train images", "test images", "train labels", "test labels")
    return dict(zip(names, [part.x for part in images] + [part.y for part in images], strict=True))


__all__ = ["Planted", "fit_trigger", "judge", "laid_over", "outcome", "plant", "repair", "stamp", "stored"]
