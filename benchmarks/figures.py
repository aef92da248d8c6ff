"""What the throughput suite measures, and how a line of its table is made. Free of pytest."""

from __future__ import annotations

from dataclasses import dataclass, field
from statistics import median
from typing import Literal

import torch

WANTED = 0.9  # of the bare loop


@dataclass
class Figures:
    """Images a second of the three contenders in one task, a value for each of the alternating runs."""

    task: str
    batch: int
    harness: list[float] = field(default_factory=list)
    plain: list[float] = field(default_factory=list)
    bare: list[float] = field(default_factory=list)

    def ratio(self, rival: list[float]) -> float:
        """Median throughput of the harness over that of `rival`."""
        return median(self.harness) / median(rival)

    def row(self) -> list[str]:
        """One line of the table; the range is that of the ratios within a round, where load disturbs both alike."""
        rounds = [mine / bare for mine, bare in zip(self.harness, self.bare, strict=True)]
        remark = "" if self.ratio(self.bare) >= WANTED else f"BELOW {WANTED} OF BARE LOOP"
        rates = [f"{median(values):.0f}" for values in (self.harness, self.plain, self.bare)]
        ratios = [f"{self.ratio(self.plain):.2f}", f"{self.ratio(self.bare):.2f}"]
        spread = f"{min(rounds):.2f}-{max(rounds):.2f}"
        return [self.task, str(self.batch), *rates, *ratios, spread, str(len(rounds)), remark]


@dataclass(frozen=True)
class Setting:
    """Where and how the suite measures."""

    device: torch.device
    precision: Literal["fp32", "bf16"]
    rounds: int
    seconds: float
