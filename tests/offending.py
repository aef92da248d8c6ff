"""Methods that break one sentence of the contract each, for test_checks.py."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor, nn

from backdoorbench_mcl import api, kit
from backdoorbench_mcl.templates import attack, dataset, inverter, model
from backdoorbench_mcl.testing import toys


class Attack(attack.MyMethod):
    name = "offender"

    def __init__(self, *, rate: api.Rate = 0.2) -> None:
        super().__init__(rate=rate)


class Defense(api.Defense):
    """Does nothing."""

    name = "offender"

    def defend(self, model: api.Classifier, ctx: api.DefenseContext) -> Any:
        return model


class Inverter(inverter.MyMethod):
    name = "offender"

    def __init__(self) -> None:
        super().__init__(steps=150)


# ---------------------------------------------------------------- of every kind


class Untyped(Defense):
    def __init__(self, *, lr=0.1) -> None:  # type: ignore[no-untyped-def]  # the offence
        self.lr = lr


class Lax(Defense):
    def __init__(self, *, lr: api.Positive = -0.1) -> None:
        self.lr = lr


class Demanding(Defense):
    def __init__(self, *, lr: float) -> None:
        self.lr = lr


class Alphabet(Defense):
    """Its parameter becomes another one when it is constructed again."""

    def __init__(self, *, layers: tuple[str, ...] = ("a", "b")) -> None:
        self.layers = layers

    @property
    def params(self) -> dict[str, Any]:
        return {"layers": tuple(reversed(self.layers))}


class Growing(Defense):
    """Its `added` names what the constructor does not have."""

    added: ClassVar[dict[str, Any]] = {"momentum": 0.9}


Cardless = type("Cardless", (Defense,), {"__module__": "cardless"})


class Moody(Defense):
    """Goes on where the last call ended."""

    calls: ClassVar[list[int]] = []

    def defend(self, model: api.Classifier, ctx: api.DefenseContext) -> Any:
        self.calls.append(0)
        with torch.no_grad():
            next(model.parameters()).add_(0.001 * len(self.calls))
        return model


class Seeder(Defense):
    def defend(self, model: api.Classifier, ctx: api.DefenseContext) -> Any:
        torch.manual_seed(0)
        np.random.seed(0)
        return model


class Settler(Defense):
    def defend(self, model: api.Classifier, ctx: api.DefenseContext) -> Any:
        os.environ["OFFENDED"] = str(len(os.environ))
        torch.set_num_threads(torch.get_num_threads() + 1)
        return model


# ---------------------------------------------------------------- attacks


class Inplace(Attack):
    def stamp(self, x: Tensor, y: Tensor, state: api.State, rng: torch.Generator) -> Tensor:
        x[:, :, 0, 0] = 255
        return x


class Floats(Attack):
    def poison(self, train: api.Images, state: api.State, rng: torch.Generator) -> api.Poisoned:
        return api.Poisoned(torch.tensor([0]), train.x[:1], torch.tensor([1]))

    def stamp(self, x: Tensor, y: Tensor, state: api.State, rng: torch.Generator) -> Tensor:
        return x / 255


class Invisible(Attack):
    def stamp(self, x: Tensor, y: Tensor, state: api.State, rng: torch.Generator) -> Tensor:
        return x.clone()


class Greedy(Attack):
    def poison(self, train: api.Images, state: api.State, rng: torch.Generator) -> api.Poisoned:
        index = torch.arange(int(2 * self.rate * len(train)))
        return api.Poisoned(index, train.x[index], torch.ones_like(index))


class Twice(Attack):
    def poison(self, train: api.Images, state: api.State, rng: torch.Generator) -> api.Poisoned:
        return api.Poisoned(torch.tensor([3, 3]), train.x[[3, 3]], torch.tensor([1, 1]))


class Scribbler(Attack):
    def poison(self, train: api.Images, state: api.State, rng: torch.Generator) -> api.Poisoned:
        train.y[:] = 1
        return api.Poisoned(torch.tensor([3]), train.x[[3]], torch.tensor([1]))


class Boastful(Attack):
    def goal(self, y: Tensor, state: api.State) -> api.Goal:
        return api.Goal(torch.ones_like(y), torch.ones_like(y, dtype=torch.bool))


class Remembering(Attack):
    """Keeps in the object what belongs into the state."""

    grey_now = 0

    def prepare(self, ctx: api.AttackContext) -> api.State:
        self.grey_now = 255
        return api.State()

    def stamp(self, x: Tensor, y: Tensor, state: api.State, rng: torch.Generator) -> Tensor:
        out = x.clone()
        out[:, :, :3, :3] = self.grey_now
        return out


class Unstorable(Attack):
    def prepare(self, ctx: api.AttackContext) -> api.State:
        return api.State({}, {"rng": ctx.rng})


class Mismatched(Attack):
    """Trains one trigger and stamps another."""

    def poison(self, train: api.Images, state: api.State, rng: torch.Generator) -> api.Poisoned:
        index = kit.choose(len(train), 80, rng)
        x = train.x[index].clone()
        x[:, :, -3:, -3:] = 0
        return api.Poisoned(index, x, torch.ones_like(index))


# ---------------------------------------------------------------- inverters and defenses


class Peeking(Defense):
    def defend(self, model: api.Classifier, ctx: api.DefenseContext) -> Any:
        return model if ctx.granted.target == 1 else None


class Needing(Defense):
    def defend(self, model: api.Classifier, ctx: api.DefenseContext) -> Any:
        return ctx.needs["trigger"] and model


class Clairvoyant(Defense):
    @property
    def knows(self) -> frozenset[Any]:
        return frozenset({"trigger"})


class Crowd(Defense):
    def defend(self, model: api.Classifier, ctx: api.DefenseContext) -> Any:
        if len(ctx.clean) < 2:
            raise IndexError("list index out of range")
        return model


class Forgetful(Defense):
    """Saves where it is, not what its generator had drawn."""

    def defend(self, model: api.Classifier, ctx: api.DefenseContext) -> Any:
        found = ctx.snapshot.load()
        step, noise = (0, torch.zeros(())) if found is None else (found[1]["step"], found[0]["noise"])
        while step < 4:
            step, noise = step + 1, noise + torch.rand((), generator=ctx.rng)
            ctx.snapshot.save({"noise": noise}, {"step": step})
        with torch.no_grad():
            next(model.parameters()).add_(0.001 * noise)
        return model


class Immortal(Defense):
    def defend(self, model: api.Classifier, ctx: api.DefenseContext) -> Any:
        try:
            ctx.snapshot.save({"a": torch.zeros(1)}, {})
        except BaseException:
            return model
        return model


class Dirty(api.MaskPattern):
    def apply(self, x: Tensor, rng: torch.Generator | None = None) -> Tensor:
        x[:, :, 0, 0] = 1
        return x


class Half(api.MaskPattern):
    """Loses its pattern on the way through a file."""

    def tensors(self) -> dict[str, Tensor]:
        return {"mask": self.mask, "pattern": torch.zeros_like(self.pattern)}


class Returning(Inverter):
    kind: ClassVar[Any] = None

    def invert(self, model: api.Classifier, target: int, ctx: api.InverterContext) -> Any:
        true = toys.true_trigger()
        return self.kind(true.mask, true.pattern)


class DirtyInverter(Returning):
    kind = Dirty


class HalfInverter(Returning):
    kind = Half


class PairInverter(Returning):
    kind = staticmethod(lambda mask, pattern: (mask, pattern))


class Blind(Inverter):
    def invert(self, model: api.Classifier, target: int, ctx: api.InverterContext) -> Any:
        return api.MaskPattern(torch.zeros(32, 32), torch.zeros(3, 32, 32))


class Partial(Inverter):
    def detect(self, model: api.Classifier, ctx: api.InverterContext) -> api.Verdict:
        return api.Verdict((1,), (0.5, 3.0), (60.0, 9.0))


class Nothing(Defense):
    def defend(self, model: api.Classifier, ctx: api.DefenseContext) -> Any:
        return None


class Wide(Defense):
    def defend(self, model: api.Classifier, ctx: api.DefenseContext) -> Any:
        model.fc = nn.Linear(16, 7)
        return model


class Infinite(Defense):
    def defend(self, model: api.Classifier, ctx: api.DefenseContext) -> Any:
        with torch.no_grad():
            next(model.parameters()).fill_(float("inf"))
        return model


class Hooked(Defense):
    def defend(self, model: api.Classifier, ctx: api.DefenseContext) -> Any:
        return kit.masked(model, {"conv2": [0, 1]})


class Unbuilt(Defense):
    def defend(self, model: api.Classifier, ctx: api.DefenseContext) -> Any:
        return api.Repaired(model, "nowhere:nothing", {})


class Ruinous(Defense):
    def defend(self, model: api.Classifier, ctx: api.DefenseContext) -> Any:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()
        return model


# ---------------------------------------------------------------- networks and data sets


class Network(model.Network):
    def __init__(self) -> None:
        super().__init__(toys.CLASSES, 3, 8)


def networks(**changes: Callable[..., Any]) -> type[api.Model]:
    """A model whose network has some methods replaced."""
    cls = type("Changed", (Network,), dict(changes))
    return type("Offender", (api.Model,), {
        "name": "offender", "build": lambda self, classes, shape: cls(), "__module__": __name__,
    })  # fmt: skip


def flat(self: Any, x: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    z, maps = Network.features(self, x)
    return z, tuple(part.flatten(1) for part in maps)


def stubborn(self: Any, x: Tensor) -> Tensor:
    return x


def together(self: Any, x: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    z, maps = Network.features(self, x)
    return z - z.mean(0), maps


def half(self: Any, z: Tensor) -> Tensor:
    return Network.head(self, z.detach())


def drawn(self: Any) -> None:
    Network.__init__(self)
    self.scale = torch.rand(1)


def scaled(self: Any, z: Tensor) -> Tensor:
    return self.scale * Network.head(self, z)  # type: ignore[no-any-return]


class Stripes(dataset.MyMethod):
    def __init__(self) -> None:
        super().__init__(train=40, test=40)


class Overfull(Stripes):
    def load(self, split: Literal["train", "test"], root: Path | None) -> api.Images:
        images = super().load(split, root)
        return api.Images(images.x, images.y + 1)


class Grey(Stripes):
    mean = (128.0, 128.0, 128.0)


class Same(Stripes):
    def load(self, split: Literal["train", "test"], root: Path | None) -> api.Images:
        return super().load("train", root)


class Covered(Attack):
    """Stamps as many images again whose labels it keeps, so that the trigger alone does not suffice."""

    def poison(self, train: api.Images, state: api.State, rng: torch.Generator) -> api.Poisoned:
        index = kit.choose(len(train), 160, rng)
        x, y = train.take(index)
        y[torch.randperm(160, generator=rng)[:80]] = 1
        return api.Poisoned(index, self.stamp(x, y, state, rng), y)
