"""What the throughput suite measures, and how a line of its table is made. Free of pytest."""

from __future__ import annotations

from dataclasses import dataclass, field
from statistics import median
from typing import Literal

import torch
from targets import Measured

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
class Sizes:
    """How much the suites of whole cells and matrices do."""

    cell: Literal["short", "quick", "printed"]
    cell_rounds: int
    matrix_steps: int
    matrix_rounds: int
    plan: int
    cells: int


@dataclass(frozen=True)
class Setting:
    """Where and how the suite measures."""

    device: torch.device
    precision: Literal["fp32", "bf16"]
    rounds: int
    seconds: float
    sizes: Sizes


@dataclass
class Task(Measured):
    """unit "x": values are ratios to a control, one for each round; "s": seconds, which are never compared."""

    unit: Literal["x", "s"] = "x"

    def line(self) -> str:
        """Example: `nad: 1.32x (1.28-1.40, n = 5)`."""
        spread = f"{min(self.values):.2f}-{max(self.values):.2f}, n = {len(self.values)}"
        fault = f", does not count: {self.fault}" if self.fault else ""
        return f"{self.task}: {self.middle:.2f}{self.unit} ({spread}){fault}{f' {self.note}' if self.note else ''}"


@dataclass
class Book:
    """Everything that was measured in this run."""

    throughput: list[Figures] = field(default_factory=list)
    tasks: dict[str, Task] = field(default_factory=dict)

    def add(
        self, task: str, value: float, note: str = "", unit: Literal["x", "s"] = "x", fault: str = ""
    ) -> None:  # fmt: skip
        """One more round of a task; the last note stays, and so does a fault."""
        found = self.tasks.setdefault(task, Task(task, unit=unit))
        found.values.append(value)
        found.note = note or found.note
        found.fault = fault or found.fault

    def measured(self) -> dict[str, Measured]:
        """Tasks by name, those of the throughput suite as ratios to the plain loop within a round."""
        loops = {
            figures.task: Measured(
                figures.task, [mine / plain for mine, plain in zip(figures.harness, figures.plain, strict=True)]
            )
            for figures in self.throughput
        }
        return {**loops, **self._overhead(), **self.tasks}

    def _overhead(self) -> dict[str, Measured]:
        """Of a cell, in seconds: the driver without compute, and the hand-over of jobs."""
        driver, jobs = self.tasks.get("driver"), self.tasks.get("hand-over")
        if driver is None or jobs is None:
            return {}
        note = f"driver {driver.middle:.2f} s, {driver.note}; jobs {jobs.middle:.2f} s, {jobs.note}"
        return {"overhead": Measured("overhead", [driver.middle + value for value in jobs.values], note)}

    def ratios(self) -> dict[str, list[float]]:
        """What two runs are compared by."""
        seconds = {"overhead", *(name for name, task in self.tasks.items() if task.unit == "s")}
        return {name: found.values for name, found in self.measured().items() if name not in seconds}
