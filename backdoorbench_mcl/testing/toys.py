"""The world in which methods are checked: four noisy colours of 3x32x32, a network that learns them in a second, a
victim with a planted patch, contexts without a harness. Everything is a function of its seeds.
"""

from __future__ import annotations

import copy
import functools
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import api, kit
from .core import seeded

CLASSES, SHAPE, TARGET = 4, (3, 32, 32), 1
TRAIN, TEST, CLEAN = 400, 200, 80
MEAN, STD = (0.45, 0.45, 0.4), (0.25, 0.25, 0.25)
PATCH = api.Location(29, 29, 3, 3)
_COLOURS = ((150, 100, 100), (100, 150, 100), (100, 100, 150), (140, 140, 90))
_SPREAD, _NOISE = 25, 40  # half-widths, of the colour of an image and of its pixels: so that one in eight is unsure
C = TypeVar("C", bound=api.Context)
M = TypeVar("M", bound=api.Classifier)


def make_images(count: int = TRAIN, seed: int = 1) -> api.Images:
    """`count` images, uint8 (count, 3, 32, 32), with labels 0..3 that go round."""
    rng = torch.Generator().manual_seed(seed)
    y = torch.arange(count) % CLASSES
    colour = torch.tensor(_COLOURS)[y][:, :, None, None]
    colour = colour + torch.randint(-_SPREAD, _SPREAD + 1, (count, SHAPE[0], 1, 1), generator=rng)
    noise = torch.randint(-_NOISE, _NOISE + 1, (count, *SHAPE), generator=rng)
    return api.Images((colour + noise).clamp(0, 255).to(torch.uint8), y)


class ToyData(api.Dataset):
    """The same images as a data set, for jobs that read one."""

    name = "toy-data"
    classes = CLASSES
    shape = SHAPE
    mean = MEAN
    std = STD
    toy = True
    budget = "quick"

    def find(self, root: Path | None) -> api.Source:
        return api.Source((), "procedural")

    def load(self, split: Literal["train", "test"], root: Path | None) -> api.Images:
        return make_images(TRAIN, 1) if split == "train" else make_images(TEST, 2)


class _Net(api.Classifier):
    """Two convolutions with batch norm, the largest value of each map, a linear layer: 3,000 parameters."""

    def __init__(self, classes: int, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, 16, 3, stride=2, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.conv2 = nn.Conv2d(16, 16, 3, stride=2, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(16)
        self.fc = nn.Linear(16, classes)

    def features(self, x: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        one = torch.relu(self.bn1(self.conv1(x)))
        two = torch.relu(self.bn2(self.conv2(one)))
        return two.amax((2, 3)), (one, two)

    def head(self, z: Tensor) -> Tensor:
        out: Tensor = self.fc(z)
        return out


class ToyNet(api.Model):
    """The network of the checks."""

    name = "toy-net"

    def build(self, classes: int, shape: tuple[int, int, int]) -> api.Classifier:
        return _Net(classes, shape[0])


def fresh(seed: int = 0) -> api.Classifier:
    """An untrained toy network in eval mode."""
    with seeded(seed):
        model = ToyNet().build(CLASSES, SHAPE)
    model.set_normalisation(MEAN, STD)
    return model.eval()


class MemorySnapshot:
    """Keeps the last save as bytes and text, as a file would; after `die_at` saves it raises `Killed` once."""

    def __init__(self, die_at: int | None = None) -> None:
        self.saves = 0
        self.die_at = die_at
        self._kept: tuple[bytes, dict[str, Any]] | None = None

    def load(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """What was saved last, or None."""
        if self._kept is None:
            return None
        return safetensors.torch.load(self._kept[0]), copy.deepcopy(self._kept[1])

    def save(self, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
        """Replace what was saved."""
        plain = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
        self._kept = safetensors.torch.save(plain), copy.deepcopy(dict(meta))
        self.saves += 1
        if self.saves == self.die_at:
            raise Killed


class Killed(BaseException):
    """Stands for the death of the process right after a snapshot; no method may catch it."""


def context(kind: type[C], *, seed: int = 0, recipe: api.Recipe | None = None, **fields: Any) -> C:
    """A context of `kind`, with what `fields` gives: as the harness hands it out, but for the progress."""
    recipe = api.Recipe(steps=30, batch=32, lr=0.01, augment="none") if recipe is None else recipe
    base: dict[str, Any] = {
        "rng": torch.Generator().manual_seed(seed), "device": torch.device("cpu"), "classes": CLASSES,
        "log": _silent, "tick": _unmoved, "snapshot": MemorySnapshot(), "recipe": recipe,
        "augment": kit.augmentation(recipe.augment, True), **fields,
    }  # fmt: skip
    if "workdir" not in base:
        base["workdir"] = Path(tempfile.gettempdir())
    return kind(**base)


def _silent(line: str) -> None:
    """Nobody reads the log of a check."""


def _unmoved(done: int, total: int, images: int) -> None:
    """Nobody watches the progress of a check."""


def learn(model: M, images: api.Images, steps: int = 150, seed: int = 0) -> M:
    """Train `model` on `images` and return it in eval mode."""
    recipe = api.Recipe(steps=steps, batch=40, lr=0.05, augment="none")
    with seeded(seed):
        model.train()
        ctx = context(api.Context, seed=seed, recipe=recipe)
        kit.fit(model, images, ctx, lambda batch: F.cross_entropy(model(batch.x), batch.y))
    return model.eval()


def stamped(x: Tensor) -> Tensor:
    """The planted trigger on uint8 images (N, 3, 32, 32): a checkerboard of 3x3 pixels in the bottom-right corner."""
    out = x.clone()
    board = torch.tensor([[255, 0, 255], [0, 255, 0], [255, 0, 255]], dtype=torch.uint8)
    out[:, :, PATCH.top :, PATCH.left :] = board
    return out


class ToyAttack(api.Attack):
    """The planted trigger as an attack."""

    name = "toy-attack"
    target = TARGET

    def poison(self, train: api.Images, state: api.State, rng: torch.Generator) -> api.Poisoned:
        index = torch.arange(0, len(train), 5)  # neighbours have all the labels
        return api.Poisoned(index, stamped(train.x[index]), torch.full_like(index, TARGET))

    def stamp(self, x: Tensor, y: Tensor, state: api.State, rng: torch.Generator) -> Tensor:
        return stamped(x)


def suspect_images() -> api.Images:
    """The training set as the victim saw it."""
    images = make_images()
    index, x, y = ToyAttack().poison(images, api.State(), torch.Generator())
    images.x[index], images.y[index] = x, y
    return images


def true_trigger() -> api.MaskPattern:
    """The planted trigger as mask and pattern."""
    mask = torch.zeros(SHAPE[1:])
    mask[PATCH.top :, PATCH.left :] = 1
    return api.MaskPattern(mask, stamped(torch.zeros(1, *SHAPE, dtype=torch.uint8))[0] / 255)


@functools.cache
def _trained(poisoned: bool) -> api.Classifier:
    return learn(fresh(), suspect_images() if poisoned else make_images())


def victim() -> api.Classifier:
    """A toy network with the planted backdoor, the caller's own."""
    return copy.deepcopy(_trained(True))


def clean_model() -> api.Classifier:
    """A toy network without a backdoor, the caller's own."""
    return copy.deepcopy(_trained(False))


def accuracy(model: api.Classifier, images: api.Images) -> float:
    """In %."""
    return 100 * float((kit.predict(model, images.x) == images.y).float().mean())


def clean_images(count: int = CLEAN, labels: bool = True) -> api.Images:
    """What a defense is handed: the first `count` images of a set of their own, their labels -1 unless granted."""
    images = make_images(max(count, CLASSES), 3)
    x, y = images.x[:count], images.y[:count]
    return api.Images(x, y if labels else torch.full_like(y, -1))


def stand_ins(needs: Mapping[str, api.Need]) -> dict[str, Any]:
    """What the harness would have built for `needs`, made from the planted trigger: true, and at once."""
    made: Mapping[str, Callable[[api.Need], Any]] = {
        "trigger": lambda need: {TARGET: true_trigger()} if need.verdict else true_trigger(),
        "verdict": lambda need: verdict(),
        "result": lambda need: victim(),
        "model": lambda need: kit.frozen(clean_model()),
    }
    return {name: made[need.kind](need) for name, need in needs.items()}


def verdict() -> api.Verdict:
    """The planted label flagged."""
    index = tuple(4.0 if label == TARGET else 0.5 for label in range(CLASSES))
    return api.Verdict((TARGET,), index, tuple(9.0 if label == TARGET else 60.0 for label in range(CLASSES)))


def granted(knows: frozenset[str], method: str) -> api.Granted:
    """What was declared in `knows`; all else raises AccessDenied."""
    values: dict[str, Callable[[], Any]] = {
        "target": lambda: TARGET, "location": lambda: PATCH, "suspect": suspect_images,
        "trigger": lambda: api.TrueTrigger(f"{__name__}:ToyAttack", {}, {}, {}),
    }  # fmt: skip
    return api.Granted(method, {name: make() for name, make in values.items() if name in knows})


__all__ = [
    "CLASSES", "CLEAN", "MEAN", "PATCH", "SHAPE", "STD", "TARGET", "TEST", "TRAIN", "Killed", "MemorySnapshot",
    "ToyAttack", "ToyData", "ToyNet", "accuracy", "clean_images", "clean_model", "context", "fresh", "granted", "learn",
    "make_images", "stamped", "stand_ins", "suspect_images", "true_trigger", "verdict", "victim",
]  # fmt: skip
