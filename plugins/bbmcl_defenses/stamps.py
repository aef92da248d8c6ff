"""What the defenses that work with inverted triggers share: whose label a trigger belongs to, and which one is next."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from backdoorbench_mcl.api import DefenseContext, Knowledge, Need, Trigger

Target = Literal["given", "detect"]


class Stamp(NamedTuple):
    """A label and the trigger that leads to it."""

    label: int
    trigger: Trigger


def knowledge(target: Target) -> frozenset[Knowledge]:
    """What a defense must be told: the target label, unless a detector names it."""
    return frozenset({"target"}) if target == "given" else frozenset()


def need(target: Target, inverter: str, detector: str) -> Need:
    """One trigger for the label that was given, or one for each label that the detector flags."""
    return Need("trigger", inverter, verdict=None if target == "given" else detector)


def stamps(target: Target, ctx: DefenseContext) -> list[Stamp]:
    """The triggers to work with, of the most suspicious label first; empty where a detector called the model clean."""
    found = ctx.needs["trigger"]
    if target == "given":
        return [Stamp(int(ctx.granted.target), found)]
    flagged: Mapping[int, Trigger] = found
    if not flagged:
        ctx.log("the detector flagged no label: the model is returned as it is")
    return [Stamp(label, trigger) for label, trigger in flagged.items()]


def pick(among: Sequence[Stamp], rng: torch.Generator) -> Stamp:
    """One of them at random, for the next batch; of a single one no number is drawn.

    A draw and no counter, because a resumed training finds `rng` where it was but no counter of ours.
    """
    return among[0] if len(among) == 1 else among[int(torch.randint(len(among), (1,), generator=rng))]


def suspect(among: Sequence[Stamp], y: Tensor) -> Tensor:
    """Which of the labels y (N,) a trigger leads to: bool (N,)."""
    return torch.stack([y == stamp.label for stamp in among]).any(0)


__all__ = ["Stamp", "Target", "knowledge", "need", "pick", "stamps", "suspect"]
