"""Helpers for authors of methods: augmentation, the SGD loop, predictions, frozen copies, networks of others.

Plugins import `hooks`, `api` and `kit` only. Everything here works on the device of the images it is given, draws
from the generator it is handed and keeps pixels in [0, 1].

Example (a whole fine-tuning defense)::

    model.train()
    kit.fit(model, ctx.clean, ctx, lambda batch: F.cross_entropy(model(batch.x), batch.y))
"""

from __future__ import annotations

import copy
import functools
import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from io import BytesIO
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from . import pickles
from .api import Augment, Augmentation, Batch, Classifier, Context, Images, Recipe, Snapshot
from .errors import Diverged, UserError
from .numbers import anomaly_index, statistics
from .plainfiles import read_plain
from .replay import Repeated
from .traced import Traced

_MODEL = "model."
_MOMENTUM = "momentum."
_RNG = "rng.method"
_RNG_GLOBAL = "rng.global"
_RNG_CUDA = "rng.cuda"


# ---------------------------------------------------------------- augmentation


def _crop(x: Tensor, rng: torch.Generator, pad: int) -> Tensor:
    size = (x.shape[2], x.shape[3])
    corner = torch.randint(0, 2 * pad + 1, (2, len(x)), generator=rng).to(x.device)
    windows = F.pad(x, (pad, pad, pad, pad)).unfold(2, size[0], 1).unfold(3, size[1], 1)  # (B, C, 2p+1, 2p+1, H, W)
    return windows[torch.arange(len(x), device=x.device), :, corner[0], corner[1]]  # (B, C, H, W)


def _flip(x: Tensor, rng: torch.Generator) -> Tensor:
    mirrored = (torch.rand(len(x), generator=rng) < 0.5).to(x.device)
    return torch.where(mirrored[:, None, None, None], x.flip(3), x)


def _resized_crop(x: Tensor, rng: torch.Generator) -> Tensor:
    """A window of 8-100 % of the area and an aspect of 3/4 to 4/3, scaled back to the whole: RandomResizedCrop's draws.

    Windows are clamped to the image instead of drawn again, and pixels are interpolated bilinearly without smoothing.
    """
    height, width = x.shape[2:]
    area, aspect, top, left = torch.rand(4, len(x), generator=rng)
    area = (0.08 + 0.92 * area) * height * width
    aspect = torch.exp(math.log(3 / 4) + math.log(16 / 9) * aspect)
    h, w = (area / aspect).sqrt().clamp(1, height), (area * aspect).sqrt().clamp(1, width)
    top, left = top * (height - h), left * (width - w)
    scale = torch.stack([w / width, h / height], 1)  # (B, 2), in units of the image
    shift = torch.stack([(2 * left + w) / width - 1, (2 * top + h) / height - 1], 1)  # centre of the window in [-1, 1]
    theta = torch.cat([torch.diag_embed(scale), shift[:, :, None]], 2).to(x.device)  # (B, 2, 3)
    grid = F.affine_grid(theta, list(x.shape), align_corners=False)
    warped = F.grid_sample(x.float(), grid, mode="bilinear", padding_mode="border", align_corners=False)
    return warped.round_().clamp_(0, 255).to(torch.uint8)


def augmentation(name: Augmentation, flip_ok: bool, pad: int = 4) -> Augment | None:
    """The augmentation `name` as a function `(x_u8 (B, C, H, W), rng) -> x_u8` of the same shape, or None for none.

    "crop": each image is padded with `pad` zeros on every side and cut back to its size at a place of its own, as
    PIL's RandomCrop does (zero is black: the padding happens before normalisation). "flip": each image is mirrored
    left-right with probability 1/2, unless `flip_ok` is False (a mirrored traffic sign may be another sign).
    "resized-crop": a window of random size, aspect and place is scaled back to the image's size (spec 2.4, ImageNet).
    Draws come from `rng`, a CPU generator, so that they agree on every device. Source: spec 2.2, 2.4.

    Raises UserError for an unknown name or a negative pad. Example: `augmentation("crop+flip", flip_ok=True)`.
    """
    if name not in get_args(Augmentation):
        raise UserError(f"unknown augmentation {name!r}; expected one of {', '.join(get_args(Augmentation))}")
    if pad < 0:
        raise UserError(f"augmentation {name!r}: pad={pad} was given, expected 0 or more pixels")
    parts = name.split("+")
    flip = "flip" in parts and flip_ok
    if parts == ["none"] or (parts == ["flip"] and not flip):
        return None

    def augment(x: Tensor, rng: torch.Generator) -> Tensor:
        if "crop" in parts:
            x = _crop(x, rng, pad)
        elif "resized-crop" in parts:
            x = _resized_crop(x, rng)
        return _flip(x, rng) if flip else x

    return augment


# ---------------------------------------------------------------- training


def _fingerprint(model: Classifier, images: Images, ctx: Context, recipe: Recipe) -> str:
    """What a training starts from. A snapshot is resumed only by the training that wrote it: a method may fit twice."""
    digest = hashlib.sha256(f"{recipe!r} {len(images)}".encode())
    tensors = {**model.state_dict(), _RNG: ctx.rng.get_state(), _RNG_GLOBAL: torch.get_rng_state()}
    for name, tensor in sorted(tensors.items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _pack(model: Classifier, optimiser: torch.optim.SGD, ctx: Context) -> dict[str, Tensor]:
    tensors = {_MODEL + name: tensor for name, tensor in model.state_dict().items()}
    for name, parameter in model.named_parameters():
        momentum = optimiser.state[parameter].get("momentum_buffer") if parameter in optimiser.state else None
        if momentum is not None:
            tensors[_MOMENTUM + name] = momentum
    tensors[_RNG] = ctx.rng.get_state()
    tensors[_RNG_GLOBAL] = torch.get_rng_state()
    if ctx.device.type == "cuda":
        tensors[_RNG_CUDA] = torch.cuda.get_rng_state(ctx.device)
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def _unpack(tensors: Mapping[str, Tensor], model: Classifier, optimiser: torch.optim.SGD, ctx: Context) -> None:
    weights = {name[len(_MODEL) :]: tensor for name, tensor in tensors.items() if name.startswith(_MODEL)}
    model.load_state_dict(weights)
    for name, parameter in model.named_parameters():
        if _MOMENTUM + name in tensors:
            # a buffer with the strides of its parameter (channels_last) keeps the optimiser on the same kernels
            buffer = torch.empty_like(parameter, requires_grad=False).copy_(tensors[_MOMENTUM + name])
            optimiser.state[parameter]["momentum_buffer"] = buffer
    ctx.rng.set_state(tensors[_RNG].cpu())
    torch.set_rng_state(tensors[_RNG_GLOBAL].cpu())
    if _RNG_CUDA in tensors and ctx.device.type == "cuda":
        torch.cuda.set_rng_state(tensors[_RNG_CUDA].cpu(), ctx.device)


class _Part:
    """The snapshot of one training of several, in the one file that the method has: tensors `NAME/...`, meta by name.

    What the others have saved is kept with it, so that a restarted method finds each of its trainings where it stood.
    """

    def __init__(self, inner: Snapshot, name: str) -> None:
        if "/" in name:
            raise ValueError(f"fit: the name {name!r} of a training has a slash")
        self.inner = inner
        self.name = name
        tensors, meta = inner.load() or ({}, {})
        parts: Mapping[str, Any] = meta.get("parts", {})
        own = {key: tensor for key, tensor in tensors.items() if key.partition("/")[0] == name}
        self._found = ({key.partition("/")[2]: tensor for key, tensor in own.items()}, parts[name]) if own else None
        others = {other for other in parts if other != name}
        self._tensors = {key: tensor for key, tensor in tensors.items() if key.partition("/")[0] in others}
        self._parts = {other: parts[other] for other in others}

    def load(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """What this training has saved."""
        return self._found

    def save(self, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
        """All parts."""
        own = {f"{self.name}/{key}": tensor for key, tensor in tensors.items()}
        self.inner.save({**self._tensors, **own}, {"parts": {**self._parts, self.name: dict(meta)}})


def _finite(model: Classifier, loss: Tensor) -> bool:
    state = [tensor for tensor in model.state_dict().values() if tensor.is_floating_point()]
    return bool(torch.stack([loss.isfinite().all(), *(tensor.isfinite().all() for tensor in state)]).all())


def fit(
    model: Classifier,
    images: Images,
    ctx: Context,
    loss: Callable[[Batch], Tensor],
    *,
    recipe: Recipe | None = None,
    name: str = "",
    steady: bool = False,
) -> None:
    """Train `model` in place by SGD on `images`, with `recipe` (by default ctx.recipe) and ctx.augment.

    `loss(batch)` returns a scalar; the batch is on the device of `images`, which the caller has moved to ctx.device.
    The caller sets train or eval mode. Parameters that get no gradient (frozen, or unused by the loss) are left
    alone: no momentum, no weight decay. The last, shorter batch of an epoch is used (spec 4.9); a single image left
    over joins the batch before it, because batch norm refuses it where its map is a single pixel.

    At the end of each epoch everything that the next epoch depends on goes to ctx.snapshot; a training that finds
    its own snapshot, started from the same weights, generators, recipe and number of images, continues from it with
    the same result to the last bit. ctx.tick is called after each step, and the mean loss of each epoch is recorded.

    name: a method that trains more than once gives each training one, all different. Then each has a snapshot of its
    own beside the others', so that a restarted method passes through those that were done and goes on with the next;
    what it does in between it does again. The curve is recorded as "loss, NAME". Example: `name="teacher"`.

    steady: `loss` does the same work on each batch of a size, as `Repeated` asks of a body, and does not look at
    `batch.index`. On a GPU such steps are recorded and replayed, unless `model.steady` is False: the same bits in a
    fraction of the time.

    Raises Diverged when, at the end of an epoch, the summed loss or a weight is no longer finite (checked once an
    epoch, because each check makes a GPU wait), and UserError when there are no images.
    """
    if len(images) == 0:
        raise UserError("training: no images were given, expected at least one; raise the clean rate")
    recipe = ctx.recipe if recipe is None else recipe
    total = recipe.total(len(images))
    optimiser = torch.optim.SGD(
        model.parameters(),
        lr=recipe.lr,
        momentum=recipe.momentum,
        weight_decay=recipe.weight_decay,
        nesterov=recipe.nesterov,
    )
    start = _fingerprint(model, images, ctx, recipe)
    step = 0
    curve: list[tuple[int, float]] = []
    drawn = f"loss, {name}" if name else "loss"
    snapshot: Snapshot = _Part(ctx.snapshot, name) if name else ctx.snapshot
    found = snapshot.load()
    if found is not None and found[1].get("start") == start:
        _unpack(found[0], model, optimiser, ctx)
        step = int(found[1]["step"])
        curve = [(int(at), float(mean)) for at, mean in found[1].get("curve", [])]
        for point in curve:
            ctx.record(drawn, *point)
        ctx.log(f"resumed at step {step} of {total}{f' of {name}' if name else ''}")
    none = torch.empty(0, dtype=torch.int64)  # indices, at which a steady loss does not look
    repeated = Repeated(
        lambda x, y: (loss(Batch(x, y, none)),), list(model.parameters()), able=model.steady, say=ctx.log
    )

    def gradients(batch: Batch) -> Tensor:
        if steady:
            return repeated(batch.x, batch.y)[0]
        optimiser.zero_grad(set_to_none=True)
        value = loss(batch)
        torch.autograd.backward(value)
        return value.detach()

    while step < total:
        summed, before = torch.zeros((), device=images.x.device), step
        for batch in images.batches(recipe.batch, ctx.rng, ctx.augment, lone=False):
            for group in optimiser.param_groups:
                group["lr"] = recipe.lr_at(step, total)
            summed += gradients(batch)
            optimiser.step()
            step += 1
            ctx.tick(step, total, len(batch.x))
            if step == total:
                break
        if not _finite(model, summed):
            raise Diverged(f"training by step {step} of {total}: loss or weights are not finite (lr {recipe.lr})")
        curve.append((step, float(summed) / (step - before)))
        ctx.record(drawn, *curve[-1])
        meta: dict[str, Any] = {"start": start, "step": step, "curve": curve}
        snapshot.save(_pack(model, optimiser, ctx), meta)


# ---------------------------------------------------------------- small things


def share(rate: float, total: int) -> int:
    """floor(rate * total), with `rate` read as the decimal that was typed: share(0.29, 100) is 29.

    In binary 0.29 * 100 is 28.999..., whose floor would be one short.
    """
    return int(Fraction(str(rate)) * total)


def choose(total: int, count: int, rng: torch.Generator) -> Tensor:
    """`count` indices of range(total), uniform without replacement, sorted: int64 (count,) on the CPU.

    They are the first `count` of one permutation, so that from equal generators a smaller choice lies in a larger
    one. Raises UserError when count is not in 0 .. total. Example: `choose(len(train), share(rate, len(train)), rng)`.
    """
    if not 0 <= count <= total:
        raise UserError(f"choose: {count} of {total} images were asked for, expected 0 to {total}")
    return torch.randperm(total, generator=rng)[:count].sort().values


def at_once(x: Tensor, most: int = 512, least: int = 64) -> int:
    """How many of the images x (N, C, H, W) to work on in one pass: `most` of 32x32, down to `least` of larger ones.

    The defaults are for predictions. A gradient keeps every map of the network, 30 MB for an image of 224x224 in
    resnet18 and 60 MB in wrn-16-1. Example: `at_once(x, 128, 16)`, for searches such as `pgd`.
    """
    return min(most, max(least, most * 32 * 32 // (x.shape[2] * x.shape[3])))


def predict(model: Classifier, x: Tensor, batch: int | None = None) -> Tensor:
    """uint8 images (N, C, H, W), on any device -> predicted labels, int64 (N,) on the CPU.

    batch: images in one pass; by default 512 of 32x32, fewer of larger ones.
    The model predicts in eval mode on its own device and gets back the mode of each of its modules.
    """
    device = model.mean.device
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.inference_mode():
            labels = [model(part.to(device).float().div_(255.0)).argmax(1) for part in x.split(batch or at_once(x))]
        # joined outside, because an inference tensor would be of no use in the caller's autograd
        return torch.cat(labels).cpu() if labels else torch.empty(0, dtype=torch.int64)
    finally:
        for module, training in modes:
            module.training = training


def pgd(
    model: Classifier, x: Tensor, y: Tensor, *, eps: float, step: float, steps: int, rng: torch.Generator | None = None
) -> Tensor:
    """Adversarial examples by projected gradient ascent on cross-entropy, within L-infinity distance eps of x.

    x: float (B, C, H, W) in [0, 1]; y: int64 (B,), the labels to get away from; eps, step: in the same units, 8/255
    say. With `rng` the search starts at a random place, else at x. The model's mode is the caller's choice; no
    parameter gets a gradient. Returns pixels in [0, 1], detached. Source: spec 4.4; Madry et al., ICLR 2018.
    """
    low, high = (x - eps).clamp_(0, 1), (x + eps).clamp_(0, 1)
    moved = x.detach().clone()
    if rng is not None:
        noise = torch.rand(x.shape, generator=rng).to(x.device)
        moved = torch.minimum(torch.maximum(moved + eps * (2 * noise - 1), low), high)
    for _ in range(steps):
        moved.requires_grad_(True)
        loss = F.cross_entropy(model(moved), y, reduction="sum")
        (gradient,) = torch.autograd.grad(loss, moved)
        with torch.no_grad():
            moved = torch.minimum(torch.maximum(moved + step * gradient.sign(), low), high)
    return moved.detach()


def read_file(path: Path, most: int) -> bytes:
    """The content of a file of at most `most` bytes that others made, for data sets.

    Raises UserError that names a file which is missing or larger, and what is no file: reading a pipe never ends, and a
    link may lead to a device without end. Example: `read_file(path, 1 << 20)`
    """
    try:
        return read_plain(path, most)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from error


def read_pickle(path: Path, most: int) -> Any:
    """What the pickle in a file of at most `most` bytes says, without doing any of it, for data sets: dicts, lists,
    tuples, numbers, text and bytes. Where it would call something stands a record with `function` (as text:
    "module.name"), `args` and the `state` that the object would be given.

    Raises UserError that names a file which is missing or larger, no pickle, or one of more than a million steps.
    Example: `read_pickle(path, 1 << 20)["labels"]`
    """
    content = read_file(path, most)
    try:
        return pickles.read(BytesIO(content))[0]
    except pickles.Malformed as error:
        raise UserError(f"{path}: not a readable pickle ({error}); fetch it again") from error


def frozen(model: Classifier) -> Classifier:
    """A deep copy in eval mode whose parameters take no gradient: a reference that training cannot move."""
    return copy.deepcopy(model).eval().requires_grad_(False)


def masked(model: Classifier, masks: Mapping[str, Sequence[int]]) -> Classifier:
    """Set channels to zero wherever a network is used: `masks` lists them (dimension 1) by the name of the module after
    whose forward they are cut. The state dict stays what it was. Returns the same model.

    A defense returns `Repaired(masked(model, masks), "backdoorbench_mcl.kit:masked", {"masks": masks})`.
    Raises UserError for an unknown module. Example: `masked(model, {"layer4.1.conv2": [0, 7]})`.
    """
    modules = dict(model.named_modules())
    for name, channels in masks.items():
        if name not in modules:
            raise UserError(f"masked: no module {name!r}; the network has {', '.join(n for n in modules if n)}")
        index = torch.tensor(list(channels), dtype=torch.int64)
        modules[name].register_forward_hook(functools.partial(_cut, index))
    return model


def _cut(channels: Tensor, module: torch.nn.Module, inputs: object, out: Tensor) -> Tensor:
    return out.index_fill(1, channels.to(out.device), 0)


__all__ = [
    "Repeated", "Traced", "anomaly_index", "at_once", "augmentation", "choose", "fit", "frozen", "masked", "pgd",
    "predict", "read_file", "read_pickle", "share", "statistics",
]  # fmt: skip
