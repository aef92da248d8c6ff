"""Ratios of one run against those of another: what got slower beside its own control. Free of torch and pytest.

Seconds are not compared, for the cores may have been busy with something else; a ratio to a control that ran in turn
with it holds. A file is JSON: `{"format": 2, "machine": {...}, "ratios": {task: [one for each round]}}`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

FORMAT = 2
TOLERANCE = 0.15  # of the old ratio
MACHINE = ("machine class", "processor", "device", "precision", "threads", "cell", "matrix steps")


class Unlike(Exception):
    """Two files that cannot be compared; the message is one line."""


def save(path: Path, machine: Mapping[str, Any], ratios: Mapping[str, Sequence[float]]) -> None:
    """Write a baseline."""
    content = {"format": FORMAT, "machine": dict(machine), "ratios": {task: list(r) for task, r in ratios.items() if r}}
    path.write_text(json.dumps(content, indent=1, sort_keys=True) + "\n")


def load(path: Path) -> tuple[dict[str, Any], dict[str, list[float]]]:
    """The machine and the ratios of a baseline. Raises Unlike for a file that is none."""
    try:
        content = json.loads(path.read_text())
        if content["format"] != FORMAT:
            raise Unlike(f"{path}: format {content['format']}, expected {FORMAT}; save the baseline again")
        ratios = {str(task): [float(value) for value in values] for task, values in content["ratios"].items()}
        if not all(values and min(values) > 0 for values in ratios.values()):
            raise Unlike(f"{path}: a task without ratios, or one that is not above 0; save the baseline again")
        return dict(content["machine"]), ratios
    except OSError as error:
        raise Unlike(f"{path}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise Unlike(f"{path} is no baseline of this suite ({type(error).__name__}: {error})") from error


def require_alike(old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
    """Raises Unlike where machines, precisions, threads or sizes of what is run differ, naming the first difference."""
    for name in MACHINE:
        if old.get(name) != new.get(name):
            raise Unlike(f"not compared: {name} was {old.get(name)!r} and is {new.get(name)!r}")


def regressed(old: Sequence[float], new: Sequence[float], tolerance: float = TOLERANCE) -> bool:
    """Whether ratios (harness to control, higher is better) fell: the median by more than `tolerance` of the old one,
    and below every round of the old run but its worst, which may have been disturbed (of one or two: below all).
    """
    now = median(new)
    return now < (1 - tolerance) * median(old) and now < sorted(old)[min(1, (len(old) - 1) // 2)]


def compare(
    old: Mapping[str, list[float]], new: Mapping[str, list[float]], tolerance: float = TOLERANCE
) -> list[tuple[str, bool]]:
    """A line for each task of either run, and whether it regressed. A task that is gone was not run: no regression."""
    out = []
    for task in sorted({*old, *new}):
        if task not in new:
            out.append((f"{task}: not run", False))
        elif task not in old:
            out.append((f"{task}: {median(new[task]):.2f}, not in the baseline", False))
        else:
            bad = regressed(old[task], new[task], tolerance)
            change = 100 * (median(new[task]) / median(old[task]) - 1)
            spread = f"{min(old[task]):.2f}-{max(old[task]):.2f}"
            line = f"{task}: {median(old[task]):.2f} ({spread}) -> {median(new[task]):.2f}, {change:+.0f} %"
            out.append((line + (": REGRESSED" if bad else ""), bad))
    return out
