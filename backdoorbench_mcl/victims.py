"""The jobs in which an attacker acts: clean surrogates, victims, their poisoned images, the triggered test set."""

from __future__ import annotations

import hashlib
from typing import cast

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from . import api, kit
from .errors import PluginError
from .job import Job, attack_state, poison_index, require_finite, weights_of

_CHUNK = 33 << 20  # bytes of images worked on at once: above 32 MB glibc always gives freed memory back


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
    kit.fit(model, api.Images(*job.split("train")).to(job.device), context, loss, steady=not radius)
    weights = weights_of(model)
    require_finite(weights)
    job.save("weights", weights)
    x, y = (part[:PGD_IMAGES] for part in job.split("test"))  # the cache's order is that of pixel hashes: random
    meta = {"accuracy": 100 * float((kit.predict(model, x) == y).float().mean()), "images": len(x), "pgd": None}
    if radius:
        meta["pgd"] = _under_pgd(model.eval(), api.Images(x, y).to(job.device), rng)
    job.save_meta(meta)


def _under_pgd(model: api.Classifier, images: api.Images, rng: torch.Generator) -> float:
    """Accuracy in % under PGD-10 (spec 4.4) from random starts, which are the same whatever the batches."""
    right = 0
    for batch in images.batches(kit.at_once(images.x, 128, 16)):
        moved = kit.pgd(model, batch.x, batch.y, eps=PGD_EPS, step=PGD_STEP, steps=PGD_STEPS, rng=rng)
        right += int((model(moved).argmax(1) == batch.y).sum())
    return 100 * right / len(images)


def train(job: Job) -> None:
    """A victim: prepare the attack, poison, fit. out: weights, attack (its state and the poison indices)."""
    model = job.classifier()
    attack, clean, state = _prepared(job)
    recipe = cast(api.Recipe, job.method("recipe"))
    own = job.context(job.rng("order"), recipe)
    model.train()
    if attack.controls == "training":
        state = _trained(attack, model, state, api.AttackContext(**own, train=clean, needs=job.needs()))
        index, count, content = torch.empty(0, dtype=torch.int64), None, None
    else:
        poisoned = attack.poison(clean, state, job.rng("poison"))
        _check_overlay(attack, poisoned, clean)
        images = _poisoned(clean, poisoned, job.device)
        kit.fit(model, images, api.Context(**own), lambda batch: F.cross_entropy(model(batch.x), batch.y), steady=True)
        index, count, content = poisoned.index, len(poisoned.index), _content(poisoned)
    weights = weights_of(model)
    require_finite(weights)
    job.save("weights", weights)
    lasting = attack.lasting(state)
    job.save("attack", {"poison_index": index, **{f"state.{k}": v for k, v in lasting.tensors.items()}})
    meta = {"attack": dict(lasting.meta), "poisoned": count, "train": len(clean)}
    job.save_meta(meta if content is None else {**meta, "content": content})


def _prepared(job: Job) -> tuple[api.Attack, api.Images, api.State]:
    """The attack, the clean training images, and what the attack prepares for this victim."""
    attack = cast(api.Attack, job.method("attack"))
    clean = api.Images(*job.split("train"))
    own = job.context(job.rng("trigger"), cast(api.Recipe, job.method("recipe")), "prepare")
    return attack, clean, attack.prepare(api.AttackContext(**own, train=clean, needs=job.needs()))


def _trained(attack: api.Attack, model: api.Classifier, state: api.State, ctx: api.AttackContext) -> api.State:
    expected = {name: (tensor.shape, tensor.dtype) for name, tensor in model.state_dict().items()}
    lasting = attack.train(model, state, ctx)
    if not isinstance(lasting, api.State):
        raise PluginError(f"{attack.name}: train() returned {type(lasting).__name__}, expected a State")
    if {name: (tensor.shape, tensor.dtype) for name, tensor in model.state_dict().items()} != expected:
        raise PluginError(f"{attack.name}: train() changed the architecture of the victim")
    return lasting


def suspect(job: Job) -> None:
    """The training set as the victim saw it, for defenses that are granted it. out: x uint8 (N, C, H, W), y int64 (N,).

    The attack prepares and poisons once more, from the draws of the victim's own training; if anything comes out
    otherwise than it is stored with the victim, as it may on another machine, this ends with a PluginError. Images are
    in random order: in a data set that is sorted by its pixels, a changed one would stand out.
    """
    job.classifier()  # training drew its weights first, and `prepare` may go on from there
    attack, clean, state = _prepared(job)
    poisoned = attack.poison(clean, state, job.rng("poison"))
    _check_overlay(attack, poisoned, clean)
    _check_same(attack, poisoned, attack.lasting(state), job)
    seen = _poisoned(clean, poisoned, torch.device("cpu"))
    order = torch.randperm(len(seen), generator=job.rng("suspect"))
    path, size = job.folder / "work" / "suspect", _rows(clean.x)
    with path.open("wb") as file:
        for part in order.split(size):
            file.write(seen.take(part)[0].numpy().data)
    x = torch.from_numpy(np.memmap(path, np.uint8, "c", shape=tuple(clean.x.shape)))
    job.save("suspect", {"x": x, "y": seen.y[order]})
    job.save_meta({"images": len(seen)})


def _content(poisoned: api.Poisoned) -> str:
    """SHA-256 (hex) of the poisoned images and their labels."""
    digest = hashlib.sha256(poisoned.y.cpu().contiguous().numpy().data)
    for part in poisoned.x.split(_rows(poisoned.x)) if len(poisoned.x) else ():
        digest.update(part.cpu().contiguous().numpy().data)
    return digest.hexdigest()


def _check_same(attack: api.Attack, poisoned: api.Poisoned, state: api.State, job: Job) -> None:
    stored = attack_state(job)
    same = torch.equal(poisoned.index, poison_index(job)) and state.tensors.keys() == stored.tensors.keys()
    same = same and job.spec["content"] in (None, _content(poisoned))  # None: a victim of an earlier version
    if not (same and all(torch.equal(tensor.cpu(), stored.tensors[name]) for name, tensor in state.tensors.items())):
        raise PluginError(
            f"{attack.name}: the poisoned training set cannot be made again as this victim saw it (it was trained on "
            "another machine, device or number of threads, or the attack is not deterministic); train the victim here, "
            "in a runs folder of its own"
        )


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


def _check_overlay(attack: api.Attack, poisoned: api.Poisoned, clean: api.Images) -> None:
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


__all__ = ["surrogate", "suspect", "train", "trial"]
