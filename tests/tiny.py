"""What the tests of attacks, inverters and defenses add to `helpers`: a classifier without randomness, contexts that
record, a snapshot that keeps every save."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import make_context
from torch import Tensor, nn

from backdoorbench_mcl.api import (
    AttackContext,
    Classifier,
    DefenseContext,
    Granted,
    Images,
    InverterContext,
    Recipe,
    Trigger,
)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """For modules that import it: on images this small a second thread only waits (60 s became 5 s)."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def generator(seed: int) -> torch.Generator:
    """A CPU generator of its own."""
    return torch.Generator().manual_seed(seed)


def images(count: int = 24, size: int = 8, classes: int = 4, seed: int = 0) -> Images:
    """Noise, uint8 (count, 3, size, size), with labels that go round."""
    x = torch.randint(0, 256, (count, 3, size, size), generator=generator(seed), dtype=torch.uint8)
    return Images(x, torch.arange(count) % classes)


class Tiny(Classifier):
    """Convolution, batch norm, ReLU, global mean, linear: everything that a loss may touch, in 200 parameters."""

    def __init__(self, classes: int = 4, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):  # so that the next one starts from the same global state
            self.conv = nn.Conv2d(3, 6, 3, padding=1, bias=False)
            self.bn = nn.BatchNorm2d(6)
            self.fc = nn.Linear(6, classes)
        rng = generator(seed)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=rng) * 0.5)
            self.bn.running_mean = torch.randn(6, generator=rng) * 0.1
        self.set_normalisation((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010))
        self.eval()

    def features(self, x: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        out: Tensor = torch.relu(self.bn(self.conv(x)))
        return out.mean((2, 3)), (out,)

    def head(self, z: Tensor) -> Tensor:
        out: Tensor = self.fc(z)
        return out


class Memory:
    """A snapshot that keeps every save, copied and through JSON as a file would, and begins with `start`."""

    def __init__(self, start: tuple[dict[str, Tensor], dict[str, Any]] | None = None) -> None:
        self.start = start
        self.saved: list[tuple[dict[str, Tensor], dict[str, Any]]] = []

    def load(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        return self.saved[-1] if self.saved else self.start

    def save(self, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
        self.saved.append(({k: v.clone() for k, v in tensors.items()}, json.loads(json.dumps(dict(meta)))))


class Bench:
    """Contexts that record what a method logs, ticks and saves."""

    def __init__(
        self, *, classes: int = 4, recipe: Recipe | None = None, seed: int = 1, snapshot: Memory | None = None
    ) -> None:
        self.lines: list[str] = []
        self.ticks: list[tuple[int, int, int]] = []
        self.curve: list[tuple[str, int, float]] = []
        self.snapshot = Memory() if snapshot is None else snapshot
        self.settings: dict[str, Any] = {
            "tmp_path": Path("unused"),
            "seed": seed,
            "recipe": Recipe(epochs=2, lr=0.05, batch=8, augment="none") if recipe is None else recipe,
            "classes": classes,
            "snapshot": self.snapshot,
            "tick": lambda done, total, count: self.ticks.append((done, total, count)),
            "record": lambda name, step, value: self.curve.append((name, step, value)),
            "lines": self.lines,
        }

    def attack(self, train: Images) -> AttackContext:
        return make_context(**self.settings, kind=AttackContext, train=train)

    def inverter(self, clean: Images) -> InverterContext:
        return make_context(**self.settings, kind=InverterContext, clean=clean)

    def defense(self, clean: Images, trigger: Trigger | None = None, **granted: Any) -> DefenseContext:
        extra: dict[str, Any] = {
            "needs": {} if trigger is None else {"trigger": trigger},
            "granted": Granted("test", granted),
        }
        return make_context(**self.settings, kind=DefenseContext, clean=clean, **extra)


def state(model: Classifier) -> dict[str, Tensor]:
    """A copy of the state dict."""
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    """Equal names and, to the last bit, equal tensors."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
