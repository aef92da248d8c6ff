"""What the suite is measured against, and how measured ratios become lines. Free of torch and pytest."""

from __future__ import annotations

from dataclasses import dataclass, field
from statistics import median
from typing import Literal


@dataclass(frozen=True)
class Target:
    """A wanted value. sense: "least" or "most"; unit: "x" for a ratio to the control of the same run, else "s".

    needs_bf16: it was set for processors with fast bf16 (AVX512-BF16, AMX). otherwise: why it may be missed where that
    does not matter. elsewhere: where it is measured, if not by this suite.
    """

    name: str
    wanted: float
    sense: Literal["least", "most"]
    unit: Literal["x", "s"]
    about: str
    needs_bf16: bool = False
    otherwise: str = "not explained: profile it"
    elsewhere: str = ""

    def met(self, value: float) -> bool:
        return value >= self.wanted if self.sense == "least" else value <= self.wanted


TARGETS = (
    Target("training", 2.2, "least", "x", "images a second, to the plain loop", True),
    Target("inversion", 3.0, "least", "x", "images a second, to the plain loop", True),
    Target("evaluation", 3.8, "least", "x", "images a second, to the plain loop", True),
    Target("mcldef cell", 3.5, "least", "x", "100 + 20 epochs and one judging, to benchmarks/plain.py", True),
    Target(
        "matrix", 1.2, "least", "x", "2 one-thread workers on independent jobs, to one after the other",
        otherwise="two jobs share caches, bandwidth and the boost clock, or the cores were not free",
    ),
    Target(
        "preset clean", 3.0, "least", "x", "its cell with fewer steps of inversion, to the cell with all, as good",
        elsewhere="benchmarks/README.md, Fewer steps of inversion: not to be had, BA falls with every step less",
    ),
    Target(
        "overhead", 0.5, "most", "s", "a cell: the driver's own time, and what its jobs take beyond their own clocks",
        otherwise="the disk's fsync, or busy cores",
    ),
    Target("plan 10,000", 3.0, "most", "s", "planning 10,000 cells", otherwise="busy cores or a slower processor"),
    Target("rerun 1,000", 3.0, "most", "s", "running a finished matrix of 1,000 cells again",
           otherwise="busy cores or a slower processor"),
)  # fmt: skip


@dataclass
class Measured:
    """The values of one task, one for each round: ratios of pairs within a round, so that load meets both alike."""

    task: str
    values: list[float] = field(default_factory=list)
    note: str = ""
    fault: str = ""  # why the values say nothing of the target

    @property
    def middle(self) -> float:
        return median(self.values)


def cause(target: Target, precision: str, fast_bf16: bool) -> str:
    """Why a target was missed, as far as precision and processor tell."""
    if not target.needs_bf16:
        return target.otherwise
    if precision == "bf16":
        slow = "" if fast_bf16 else ", or bf16 that this processor does not have in hardware"
        return f"it was computed in bf16, so: busy cores{slow}, or what bf16 does not speed up (roofline.py)"
    asked = "fp32 was asked for" if fast_bf16 else "no fast bf16 here"
    return (
        f"{asked}: both sides compute in fp32, most of their time in the same convolutions (roofline.py); "
        "what is left to save is loading, memory and, in inversions, the plain loop's weight gradients"
    )


def lines(measured: dict[str, Measured], precision: str, fast_bf16: bool) -> list[tuple[str, bool | None]]:
    """Every target as a line, and whether it is met; None where it was not measured.

    precision: of the harness; fast_bf16: whether the processor has bf16 in hardware.

    Example: `("training: 1.31x (1.25-1.40, n = 5), wanted at least 2.2x: SHORT BY 0.89x; ...", False)`.
    """
    out: list[tuple[str, bool | None]] = []
    for target in TARGETS:
        bound = f"wanted at {target.sense} {target.wanted:g}{target.unit}"
        found = measured.get(target.name)
        if found is None or not found.values:
            where = f"; {target.elsewhere}" if target.elsewhere else ""
            out.append((f"{target.name}: not measured here, {bound} ({target.about}){where}", None))
            continue
        value, met = found.middle, target.met(found.middle)
        spread = f"{min(found.values):.2f}-{max(found.values):.2f}, n = {len(found.values)}"
        line = f"{target.name}: {value:.2f}{target.unit} ({spread}), {bound} ({target.about}): "
        short = abs(value - target.wanted)
        if found.fault:
            met = False
            line += f"DOES NOT COUNT, {found.fault}"
        else:
            line += "pass" if met else f"SHORT BY {short:.2f}{target.unit}; {cause(target, precision, fast_bf16)}"
        out.append((line + (f" [{found.note}]" if found.note else ""), met))
    return out
