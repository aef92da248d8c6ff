"""What an attack prepares and what an inversion gives: states, triggers (always in pixels), verdicts.

Part of the contracts: plugins import all of it from `api`.
"""

from __future__ import annotations

import importlib
import json
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Location(NamedTuple):
    """The box of pixels that a patch trigger replaces: its top left pixel, its height and width."""

    top: int
    left: int
    height: int
    width: int


@dataclass(frozen=True)
class Verdict:
    """What a detector says of a model. flagged: labels that look like backdoor targets, the most suspicious first,
    empty where the model is called clean. index: the anomaly index of every label. norms: L1 of its inverted mask.

    Raises ValueError when a flagged label has no index. Example: `Verdict((5,), index=(0.3, ...), norms=(52.0, ...))`.
    """

    flagged: tuple[int, ...]
    index: tuple[float, ...]
    norms: tuple[float, ...]

    def __post_init__(self) -> None:
        # numpy's and torch's numbers are welcome
        for name, kind in (("flagged", int), ("index", float), ("norms", float)):
            object.__setattr__(self, name, tuple(kind(value) for value in getattr(self, name)))
        known = all(0 <= label < len(self.index) for label in self.flagged)
        if len(self.index) != len(self.norms) or not known or len(set(self.flagged)) != len(self.flagged):
            raise ValueError(
                f"verdict: {len(self.index)} indices and {len(self.norms)} norms for the flagged labels {self.flagged}"
            )


@dataclass(frozen=True)
class State:
    """What an attack prepared once per victim: tensors and JSON, saved with the victim, handed to poison and stamp."""

    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    meta: Mapping[str, Any] = field(default_factory=dict)


class Trigger(ABC):
    """An inverted (or true) trigger, always in pixels: x float (B, C, H, W) in [0, 1] -> the same with the trigger."""

    @abstractmethod
    def apply(self, x: Tensor, rng: torch.Generator | None = None) -> Tensor:
        """Put the trigger on every image; differentiable, the input is left alone."""

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """Everything that `from_tensors` needs, by name."""

    @classmethod
    @abstractmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> Trigger:
        """The trigger behind `tensors`, on their device."""


class MaskPattern(Trigger):
    """(1 - mask) * x + mask * pattern. mask: float (H, W) in [0, 1]; pattern: float (C, H, W) in [0, 1] (spec 5)."""

    def __init__(self, mask: Tensor, pattern: Tensor) -> None:
        if mask.ndim != 2 or pattern.ndim != 3 or pattern.shape[1:] != mask.shape:
            raise ValueError(f"trigger: mask {tuple(mask.shape)} and pattern {tuple(pattern.shape)} do not fit")
        self.mask = mask
        self.pattern = pattern

    def apply(self, x: Tensor, rng: torch.Generator | None = None) -> Tensor:
        return (1 - self.mask) * x + self.mask * self.pattern

    def tensors(self) -> dict[str, Tensor]:
        return {"mask": self.mask, "pattern": self.pattern}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> MaskPattern:
        return cls(tensors["mask"], tensors["pattern"])


class TrueTrigger(Trigger):
    """The attacker's own stamp, as an oracle (spec 8.2): pixels are rounded to uint8, stamped and put back.

    target: `"module:Class"` of the attack; params: its constructor's; tensors and meta: what it prepared for this
    victim. Not differentiable. An attack is asked to stamp images whose labels are -1: no label is granted here.
    """

    def __init__(
        self, target: str, params: Mapping[str, Any], tensors: Mapping[str, Tensor], meta: Mapping[str, Any]
    ) -> None:
        module, _, name = target.partition(":")
        self.spec = {"target": target, "params": dict(params), "meta": dict(meta)}
        self.attack = getattr(importlib.import_module(module), name)(**params)
        self.state = State({key: tensor.cpu() for key, tensor in tensors.items()}, dict(meta))

    def apply(self, x: Tensor, rng: torch.Generator | None = None) -> Tensor:
        pixels = (x.detach() * 255.0).round_().clamp_(0, 255).to(torch.uint8)
        unknown = torch.full((len(x),), -1, dtype=torch.int64, device=x.device)
        stamped: Tensor = self.attack.stamp(pixels, unknown, self.state, torch.Generator() if rng is None else rng)
        return stamped.to(x.device, x.dtype) / 255.0

    def tensors(self) -> dict[str, Tensor]:
        text = json.dumps(self.spec, sort_keys=True).encode()
        spec = torch.frombuffer(bytearray(text), dtype=torch.uint8)
        return {"spec": spec, **{f"state.{name}": tensor for name, tensor in self.state.tensors.items()}}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> TrueTrigger:
        spec = json.loads(bytes(tensors["spec"].cpu().tolist()))
        state = {name[len("state.") :]: tensor for name, tensor in tensors.items() if name.startswith("state.")}
        return cls(spec["target"], spec["params"], state, spec["meta"])


__all__ = ["Location", "MaskPattern", "State", "Trigger", "TrueTrigger", "Verdict"]
