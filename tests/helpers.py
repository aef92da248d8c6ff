"""What tests of methods share: a context without a harness, a snapshot in memory, a network that trains at once.

make_context(tmp_path, seed=0, recipe=None, *, kind=Context, classes=10, device="cpu", flip_ok=True,
             snapshot=None, tick=None, lines=None, **extra) -> kind
    kind: Context, AttackContext, InverterContext or DefenseContext; `extra` gives the fields it adds, as in
    make_context(tmp_path, 1, Recipe(epochs=2), kind=InverterContext, clean=images); a DefenseContext has no
    needs and no grants unless given. ctx.augment is that of the recipe; lines collects what is logged.
MemorySnapshot()    load() and save(tensors, meta) as a process that dies would see them; .saves counts
TinyNet(classes=10, channels=3)    5,000-multiply Classifier with batch norm, dropout (while training), two stages
make_images(count, classes=10, shape=(3, 32, 32), seed=0) -> Images    labels can be learnt from the colour
weight_bytes(model) -> bytes    the state dict, for comparisons to the last bit
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn
from typing_extensions import TypeVar

from backdoorbench_mcl import kit
from backdoorbench_mcl.api import Classifier, Context, DefenseContext, Granted, Images, Recipe, Snapshot

C = TypeVar("C", bound=Context, default=Context)


class MemorySnapshot:
    """Keeps bytes and text: nothing that lives on in the training loop reaches a resumed one."""

    def __init__(self) -> None:
        self.saves = 0
        self._kept: tuple[bytes, str] | None = None

    def load(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        if self._kept is None:
            return None
        tensors, meta = self._kept
        return safetensors.torch.load(tensors), json.loads(meta)

    def save(self, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
        self.saves += 1
        self._kept = (safetensors.torch.save(dict(tensors)), json.dumps(meta))


def make_context(
    tmp_path: Path,
    seed: int = 0,
    recipe: Recipe | None = None,
    *,
    kind: type[C] = Context,  # type: ignore[assignment]
    classes: int = 10,
    device: str = "cpu",
    flip_ok: bool = True,
    snapshot: Snapshot | None = None,
    tick: Callable[[int, int, int], None] | None = None,
    lines: list[str] | None = None,
    **extra: Any,
) -> C:
    recipe = Recipe(epochs=1, augment="none") if recipe is None else recipe
    if issubclass(kind, DefenseContext):
        extra = {"needs": {}, "granted": Granted("test", {}), **extra}
    return kind(
        rng=torch.Generator().manual_seed(seed),
        device=torch.device(device),
        workdir=tmp_path,
        classes=classes,
        log=(lambda line: None) if lines is None else lines.append,
        tick=(lambda done, total, images: None) if tick is None else tick,
        snapshot=MemorySnapshot() if snapshot is None else snapshot,
        recipe=recipe,
        augment=kit.augmentation(recipe.augment, flip_ok),
        **extra,
    )


class TinyNet(Classifier):
    def __init__(self, classes: int = 10, channels: int = 3) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, 4, 3, stride=4, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(4)
        self.conv2 = nn.Conv2d(4, 8, 3, stride=2, padding=1, bias=False)
        self.drop = nn.Dropout(0.1)
        self.fc = nn.Linear(8, classes)

    def features(self, x: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        one = self.conv1(x)
        two = self.conv2(torch.relu(self.bn1(one)))
        return self.drop(torch.relu(two).mean((2, 3))), (one, two)

    def head(self, z: Tensor) -> Tensor:
        logits: Tensor = self.fc(z)
        return logits


def make_images(count: int, classes: int = 10, shape: tuple[int, int, int] = (3, 32, 32), seed: int = 0) -> Images:
    rng = torch.Generator().manual_seed(seed)
    y = torch.randint(0, classes, (count,), generator=rng)
    noise = torch.randint(0, 64, (count, *shape), generator=rng)
    colour = torch.randint(0, 192, (classes, shape[0], 1, 1), generator=torch.Generator().manual_seed(1))
    return Images((colour[y] + noise).to(torch.uint8), y)


def weight_bytes(model: nn.Module) -> bytes:
    return b"".join(
        name.encode() + tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        for name, tensor in model.state_dict().items()
    )
