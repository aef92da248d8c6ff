"""What the searches share: tensors under Adam that can be kept and resumed to the same bits, a weight that follows
success, passes over the clean images, triggers that are added to the image.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from backdoorbench_mcl.api import Classifier, Context, Diverged, Images, Trigger, UserError
from backdoorbench_mcl.kit import Repeated

TINY = 1e-7  # Neural Cleanse's: keeps the range of tanh a little open


def half_tanh(v: Tensor) -> Tensor:
    """tanh(v) / (2 - 1e-7) + 0.5: any number -> 0 .. 1, both ends within reach."""
    return v.tanh() / (2 - TINY) + 0.5


def ready(name: str, model: Classifier, images: Images) -> tuple[int, int, int]:
    """Freeze the model in eval mode, so that no weight gradient is computed; (C, H, W) of the images.

    Raises UserError when there are none.
    """
    if len(images) == 0:
        raise UserError(f"{name}: no clean images were given, expected at least one; raise the clean rate")
    model.eval().requires_grad_(False)
    channels, height, width = images.x.shape[1:]
    return channels, height, width


@dataclass
class Dial:
    """The weight of a regulariser: it rises after `patience` successes in a row and falls after as many failures.

    raised, lowered: whether that ever happened.
    """

    cost: float
    up: int = 0
    down: int = 0
    raised: bool = False
    lowered: bool = False

    def turn(self, success: bool, patience: int, multiplier: float) -> int:
        """Count one more round; 1 when the cost was multiplied, -1 when divided by multiplier^1.5, else 0."""
        self.up, self.down = (self.up + 1, 0) if success else (0, self.down + 1)
        if self.up >= patience:
            self.up, self.cost, self.raised = 0, self.cost * multiplier, True
            return 1
        if self.down >= patience:
            self.down, self.cost, self.lowered = 0, self.cost / multiplier**1.5, True
            return -1
        return 0


class Leaves:
    """Named tensors under one Adam. Example: `Leaves({"delta": zeros}, lr=0.01)["delta"]`."""

    def __init__(self, values: Mapping[str, Tensor], lr: float, betas: tuple[float, float] = (0.9, 0.999)) -> None:
        self.settings = (lr, betas)
        self.values = {name: value.detach().clone().requires_grad_() for name, value in values.items()}
        self._fresh()

    def _fresh(self) -> None:
        lr, betas = self.settings
        self.adam = torch.optim.Adam(list(self.values.values()), lr=lr, betas=betas)

    def __getitem__(self, name: str) -> Tensor:
        return self.values[name]

    def steps(self, loss: Callable[..., tuple[Tensor, ...]], model: Classifier, ctx: Context) -> Repeated:
        """`loss`, which asks `model`, as what `descend` takes: see `Repeated`. The model's parameters are frozen."""
        return Repeated(loss, list(self.values.values()), able=model.steady, say=ctx.log)

    def descend(self, step: Repeated, *inputs: Tensor) -> tuple[Tensor, ...]:
        """One step down the first of the scalars of `step`; returns all of them, valid until the next."""
        told = step(*inputs)
        self.adam.step()
        return told

    def now(self) -> dict[str, Tensor]:
        """Copies of the tensors."""
        return {name: value.detach().clone() for name, value in self.values.items()}

    def restart(self, values: Mapping[str, Tensor]) -> None:
        """Go on from `values`, with moments that know nothing of another place."""
        with torch.no_grad():
            for name, value in self.values.items():
                value.copy_(values[name])
        self._fresh()

    def pack(self) -> dict[str, Tensor]:
        """Tensors, Adam's moments and its step counts, on the CPU."""
        out = self.now()
        for number, state in self.adam.state_dict()["state"].items():
            out.update({f"adam.{number}.{key}": value for key, value in state.items()})
        return {name: value.detach().cpu().clone() for name, value in out.items()}

    def unpack(self, packed: Mapping[str, Tensor]) -> None:
        """Continue from what `pack` gave; other names are left alone."""
        self.restart({name: packed[name] for name in self.values})
        state: dict[int, dict[str, Tensor]] = {}
        for name, value in packed.items():
            if name.startswith("adam."):
                _, number, key = name.split(".")
                state.setdefault(int(number), {})[key] = value
        self.adam.load_state_dict({**self.adam.state_dict(), "state": state})


def put(place: Tensor, value: float) -> None:
    """Set a scalar of float32 in place; what is too large for it becomes infinite, as in a product with a number."""
    place.copy_(torch.tensor(value, dtype=torch.float64))


def under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors whose names begin with `prefix`, without it."""
    return {name[len(prefix) :]: value for name, value in tensors.items() if name.startswith(prefix)}


def one_pass(
    name: str, leaves: Leaves, images: Images, ctx: Context, descent: Repeated, *, batch: int, step: int, total: int,
) -> tuple[int, list[float]]:  # fmt: skip
    """Descend once over the augmented images, no further than step `total`.

    descent: float images (B, C, H, W) -> scalars, the first of which is minimised. Returns the steps done and the mean
    of each scalar over the images. Raises Diverged when a mean or a leaf is not finite.
    """
    sums, seen = torch.zeros(()), 0
    for x, _, _ in images.batches(batch, ctx.rng, ctx.augment):
        told = leaves.descend(descent, x)
        sums = sums.to(x.device) + torch.stack(told) * len(x)
        seen += len(x)
        step += 1
        ctx.tick(step, total, len(x))
        if step == total:
            break
    means = (sums / seen).tolist()
    finite = all(math.isfinite(mean) for mean in means)
    if not finite or not all(bool(value.isfinite().all()) for value in leaves.values.values()):
        raise Diverged(f"{name}: loss {means[0]} at step {step}, or what is searched for is not finite; lower lr")
    return step, means


class Additive(Trigger):
    """clamp(x + pattern, 0, 1). pattern: float (C, H, W) in [-1, 1]."""

    def __init__(self, pattern: Tensor) -> None:
        if pattern.ndim != 3:
            raise ValueError(f"trigger: expected a pattern (C, H, W), got {tuple(pattern.shape)}")
        self.pattern = pattern

    def apply(self, x: Tensor, rng: torch.Generator | None = None) -> Tensor:
        return (x + self.pattern).clamp(0, 1)

    def tensors(self) -> dict[str, Tensor]:
        return {"pattern": self.pattern}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> Additive:
        return cls(tensors["pattern"])
