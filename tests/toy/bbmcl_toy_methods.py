"""The classes of the toy plugin; imported in children only."""

from __future__ import annotations

import gc
import hashlib
import json
import os
import signal
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from backdoorbench_mcl import kit
from backdoorbench_mcl.api import (
    Attack,
    AttackContext,
    Batch,
    Classifier,
    Count,
    Dataset,
    Defense,
    DefenseContext,
    Images,
    Inverter,
    InverterContext,
    Knowledge,
    MaskPattern,
    Model,
    Need,
    Repaired,
    Selector,
    Source,
    State,
    Trigger,
    Verdict,
)


class Tiny(Dataset):
    """Four noisy colours; the corner and the centre are as noisy as the rest."""

    name = "tiny"
    classes = 4
    shape = (3, 8, 8)
    mean = (0.5, 0.5, 0.5)
    std = (0.25, 0.25, 0.25)
    toy = True
    budget = "quick"

    def __init__(self, *, train: Count = 320, test: Count = 100) -> None:
        self.sizes = {"train": train, "test": test}

    def find(self, root: Path | None) -> Source:
        return Source((), "procedural")

    def load(self, split: Literal["train", "test"], root: Path | None) -> Images:
        rng = torch.Generator().manual_seed(1 if split == "train" else 2)
        count = self.sizes[split]
        y = torch.arange(count) % self.classes
        colours = torch.tensor([[200, 90, 90], [90, 200, 90], [90, 90, 200], [180, 180, 60]])
        noise = torch.randint(-80, 81, (count, *self.shape), generator=rng)
        return Images((colours[y][:, :, None, None] + noise).clamp(0, 255).to(torch.uint8), y)


class _Net(Classifier):
    def __init__(self, classes: int, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, 16, 3, padding=1)
        self.bn = nn.BatchNorm2d(16)
        self.conv2 = nn.Conv2d(16, 16, 3, padding=1)
        self.fc = nn.Linear(16, classes)

    def features(self, x: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        maps = self.conv2(torch.relu(self.bn(self.conv(x)))).relu()
        return maps.amax((2, 3)), (maps,)

    def head(self, z: Tensor) -> Tensor:
        return torch.as_tensor(self.fc(z))


class TinyNet(Model):
    name = "tiny-net"

    def build(self, classes: int, shape: tuple[int, int, int]) -> Classifier:
        return _Net(classes, shape[0])


class Same(Defense):
    """Uses nothing and does nothing."""

    name = "same"

    @property
    def uses_labels(self) -> bool:
        return False

    def defend(self, model: Classifier, ctx: DefenseContext) -> Classifier:
        assert bool((ctx.clean.y == -1).all())
        return model


class Oracle(Inverter):
    """The box it is told of, in one grey, or the attacker's own trigger; as a detector it flags what it is told to."""

    name = "oracle"

    def __init__(
        self, *, know: Literal["target", "location", "trigger"] = "target", flags: tuple[int, ...] = ()
    ) -> None:
        self.know: Literal["target", "location", "trigger"] = know
        self.flags = flags

    @property
    def knows(self) -> frozenset[Knowledge]:
        return frozenset({"target", self.know})

    def invert(self, model: Classifier, target: int, ctx: InverterContext) -> Trigger:
        assert bool((ctx.clean.y == -1).all())
        if self.know == "trigger":
            found: Trigger = ctx.granted.trigger
            return found
        mask = torch.zeros(ctx.clean.x.shape[2:])
        if self.know == "location":
            top, left, height, width = ctx.granted.location
            mask[top : top + height, left : left + width] = 1
        return MaskPattern(mask, torch.full(ctx.clean.x.shape[1:], target / 10))

    def detect(self, model: Classifier, ctx: InverterContext) -> Verdict:
        return Verdict(self.flags, (0.5,) * ctx.classes, (1.0,) * ctx.classes)


class Needy(Defense):
    """Returns the victim if what it needs is what it expects: otherwise its cell fails."""

    name = "needy"

    def __init__(
        self, *, kind: Literal["trigger", "detect", "verdict", "result", "itself"] = "trigger",
        inverter: Selector = "oracle", detector: Selector = "oracle",
    ) -> None:  # fmt: skip
        self.kind = kind
        self.inverter = inverter
        self.detector = detector

    @property
    def knows(self) -> frozenset[Knowledge]:
        return frozenset({"target"} if self.kind == "trigger" else ())

    def needs(self) -> Mapping[str, Need]:
        return {
            "it": {
                "trigger": Need("trigger", self.inverter),
                "detect": Need("trigger", self.inverter, verdict=self.detector),
                "verdict": Need("verdict", self.detector),
                "result": Need("result", "ft(steps=3)"),
                "itself": Need("result", "needy(kind=itself)"),
            }[self.kind]
        }

    def defend(self, model: Classifier, ctx: DefenseContext) -> Classifier:
        it, x = ctx.needs["it"], ctx.clean.x[:8].float() / 255
        if self.kind == "trigger":
            assert isinstance(it, Trigger)
            changed = (it.apply(x) != x).any(0).any(0).nonzero()
            print("changed", changed.min(0).values.tolist(), changed.max(0).values.tolist())
        elif self.kind == "detect":
            assert all(abs(float(trigger.pattern.mean()) - label / 10) < 1e-6 for label, trigger in it.items())
            print("labels", list(it))
        elif self.kind == "verdict":
            assert isinstance(it, Verdict)
        else:
            with torch.no_grad():
                assert not torch.equal(it(x), model(x))
            assert isinstance(it, Classifier)
            return it
        return model


class Takeover(Attack):
    """A white square in the corner, in every second image of every batch; the attacker trains."""

    name = "takeover"
    controls = "training"
    target = 1

    def train(self, model: Classifier, state: State, ctx: AttackContext) -> State:
        ones = torch.ones(())

        def loss(batch: Batch) -> Tensor:
            x, y = batch.x.clone(), batch.y.clone()
            x[::2, :, :3, :3] = ones
            y[::2] = self.target
            return F.cross_entropy(model(x), y)

        kit.fit(model, ctx.train, ctx, loss)
        return State({"value": torch.tensor([255], dtype=torch.uint8)})

    def stamp(self, x: Tensor, y: Tensor, state: State, rng: torch.Generator) -> Tensor:
        out = x.clone()
        out[:, :, :3, :3] = state.tensors["value"]
        return out


class Masker(Defense):
    """Cuts channels of the last convolution. how: what it returns beside that."""

    name = "masker"

    def __init__(self, *, how: Literal["right", "hidden", "unknown", "other", "reading"] = "right") -> None:
        self.how = how

    def defend(self, model: Classifier, ctx: DefenseContext) -> Classifier | Repaired:
        masks = {"conv2": list(range(0, 16, 2))}
        cut = kit.masked(model, masks)
        if self.how == "hidden":
            return cut
        own = {"unknown": "nowhere:nothing", "reading": "bbmcl_toy_methods:opened"}
        rebuild = own.get(self.how, "backdoorbench_mcl.kit:masked")
        return Repaired(cut, rebuild, {"masks": {} if self.how == "other" else masks})


def opened(model: Classifier, masks: Mapping[str, list[int]]) -> Classifier:
    """A `rebuild` that looks around."""
    Path("/etc/hostname").read_bytes()
    return kit.masked(model, masks)


class Wary(Defense):
    """Prints what the suspect training set shows to somebody who knows the trigger of badnets(target=1,rate=0.2)."""

    name = "wary"

    @property
    def knows(self) -> frozenset[Knowledge]:
        return frozenset({"suspect"})

    def defend(self, model: Classifier, ctx: DefenseContext) -> Classifier:
        suspect = ctx.granted.suspect
        before = torch.get_rng_state()
        one, two = ctx.fresh(), ctx.fresh()
        assert torch.equal(before, torch.get_rng_state())
        assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), two.state_dict().values(), strict=True))
        assert not torch.equal(next(one.parameters()), next(model.parameters()))
        corner = suspect.x[:, :, -3:, -3:].flatten(1)
        extreme = ((corner == 0) | (corner == 255)).all(1)
        print(json.dumps({
            "images": len(suspect), "triggered": int(extreme.sum()), "labels": suspect.y[extreme].unique().tolist(),
            "sorted": [hash_of(x) for x in suspect.x] == sorted(hash_of(x) for x in suspect.x),
        }))  # fmt: skip
        return model


def hash_of(x: Tensor) -> str:
    return hashlib.sha256(x.numpy().tobytes()).hexdigest()


Offence = Literal[
    "raise", "exit", "hang", "segfault", "kill", "nan", "architecture", "nothing", "grant", "print", "read-trigger",
    "walk-memory", "full-disk", "hook", "normalisation", "tell",
]  # fmt: skip


class Offender(Defense):
    """Misbehaves as told. path: what `read-trigger` tries to read."""

    name = "offender"

    def __init__(self, *, how: Offence = "raise", path: str = "") -> None:
        self.how = how
        self.path = path

    def defend(self, model: Classifier, ctx: DefenseContext) -> Classifier:
        how = self.how
        if how == "raise":
            raise ValueError("first line\nsecond line")
        if how == "exit":
            raise SystemExit(3)
        if how == "hang":
            time.sleep(600)
        if how == "segfault":
            os.kill(os.getpid(), signal.SIGSEGV)
        if how == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if how == "nan":
            with torch.no_grad():
                next(model.parameters()).fill_(float("nan"))
        if how == "architecture":
            return _Net(7, 3)
        if how == "hook":
            model.register_forward_hook(lambda module, inputs, logits: logits.flip(1))
        if how == "normalisation":
            model.set_normalisation((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
        if how == "nothing":
            return None  # type: ignore[return-value]
        if how == "grant":
            print(ctx.granted.trigger)
        if how == "print":
            print("noise on standard output", flush=True)
        if how == "read-trigger":
            Path(self.path).read_bytes()
        if how == "walk-memory":
            found = [t for t in gc.get_objects() if isinstance(t, Tensor) and t.dtype == torch.uint8 and t.ndim == 4]
            if any(len(t) > len(ctx.clean) for t in found):
                raise AssertionError("more images in memory than were granted")
        if how == "tell":
            known = {"argv": sys.argv, "environ": [name for name in os.environ if name.startswith("BBMCL_")]}
            raise RuntimeError(json.dumps(known))
        if how == "full-disk":
            raise OSError(28, "No space left on device", "scratch")
        return model
