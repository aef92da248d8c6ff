"""From the sizes of inverted triggers to a verdict on a model, with the risk of being wrong. Pure, free of torch.

A backdoored label is one that images reach by a trigger far smaller than every other label needs. Neural Cleanse asks
how many median deviations its mask lies below the median (spec 5.3), which with few labels rests on few points. Here
the question is put as a test: if the logarithms of the other labels' sizes were draws from one normal distribution, how
probable is a label as small as this one among so many labels and searches? That is `chance`, the risk of a false alarm
as far as the assumption holds; benchmarks/README.md has what was counted on clean models.
Patches and perturbations of the whole image are searched apart, each against its own kind: a trigger that is blended
over an image has no small mask, and one in three pixels no small norm.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy import stats

from ..numbers import anomaly_index

Call = Literal["clean", "suspicious", "undecided"]
# The thresholds are ours; benchmarks/README.md has what they did on models that they were and were not chosen on.
ALARM, DOUBT = 0.05, 0.1  # chance of a false alarm below which a model is suspicious, above which it is called clean
WHOLE = 99.0  # % of images at which sizes are compared
FEW = 5  # labels: below, no test can tell one from the others
DEEP = 0.75  # of the median: a label that needs more than this stands out by no more than any label may
REACHED = 50.0  # % of images that a trigger sends to its label: below, it is none
CONFIRMED = 80.0  # the same of the full search that follows an alarm
HIDDEN, TINY = 3.0, 0.3  # median deviations and share of the median: a label beyond both is never called ordinary


@dataclass(frozen=True)
class Sized:
    """What the searches of one kind found, by label. size: in the kind's own measure; success: % of images of other
    classes that the trigger sends to the label; None where a search failed.
    """

    kind: str
    size: tuple[float | None, ...]
    success: tuple[float | None, ...]


@dataclass(frozen=True)
class Standing:
    """How far a label stands out. size: as it was found; the rest is of the size at equal success. index: Neural
    Cleanse's anomaly index, in median deviations, negative above the median; ratio: to the median of the others, as
    found or at equal success, whichever is larger, so that no guess at a size makes a large trigger small; chance: that
    a clean model has such a label, over all labels and kinds, in 0..1. None where there is nothing to compare.
    """

    kind: str
    label: int
    size: float | None
    success: float | None
    index: float | None
    ratio: float | None
    chance: float | None


def effective(size: float | None, success: float | None, classes: int) -> float | None:
    """The size at which a trigger would send `WHOLE` % of the images to its label; None where a search failed.

    A search weighs success against size, and stops early at a label that is hard to reach: what it found is small and
    works on a part of the images. Sizes are compared as if the log-odds of success grew in proportion to the size, from
    those of a guess among the classes. Example: `effective(20.0, 85.0, 10)` is 34.6, `effective(20.0, 100.0, 10)` 20.
    """
    if size is None or success is None or not math.isfinite(size):
        return None
    start = math.log(max(classes, 2) - 1)
    share = min(max(success, _guess(classes)), WHOLE)
    reached, wanted = (math.log(p / (100 - p)) + start for p in (share, WHOLE))
    return max(size, 1e-6) * wanted / reached


def _compared(found: Sized) -> list[float | None]:
    """The sizes at equal success. A search that did no better than a guess tells of no size, only that the label is
    hard to reach: it counts as the largest of those that got further; None where none did.
    """
    classes = len(found.size)
    sizes = [effective(*pair, classes) for pair in zip(found.size, found.success, strict=True)]
    lost = [success is not None and success <= _guess(classes) for success in found.success]
    further = [size for size, is_lost in zip(sizes, lost, strict=True) if size is not None and not is_lost]
    most = max(further, default=None)
    return [most if size is not None and is_lost else size for size, is_lost in zip(sizes, lost, strict=True)]


def _guess(classes: int) -> float:
    """% of the images, and one to spare, that reach a label by a guess among the classes."""
    return 100 / max(classes, 2) + 1


def standings(found: Sized, kinds: int) -> list[Standing]:
    """How far each label stands out among those of its kind; kinds: how many there are, each of which could raise an
    alarm.
    """
    sizes = _compared(found)
    known = {label: math.log(size) for label, size in enumerate(sizes) if size is not None}
    raw = {label: math.log(max(found.size[label] or 0.0, 1e-6)) for label in known}
    middle = float(np.median(list(known.values()))) if known else 0.0
    away = dict(zip(known, anomaly_index([math.exp(value) for value in known.values()]) if known else (), strict=True))
    out = []
    for label, size in enumerate(found.size):
        others = [value for other, value in known.items() if other != label]
        index = ratio = chance = None
        if label in known and len(others) >= 2:
            index = away[label] if known[label] <= middle else -away[label]
            ratio = math.exp(max(_above(label, known), _above(label, raw)))
            chance = min(1.0, tail(known[label], others) * len(known) * kinds)
        out.append(Standing(found.kind, label, size, found.success[label], index, ratio, chance))
    return out


def _above(label: int, logs: Mapping[int, float]) -> float:
    """How far the logarithm of a label's size lies above the median of the others'."""
    return logs[label] - float(np.median([value for other, value in logs.items() if other != label]))


def tail(value: float, others: Sequence[float]) -> float:
    """The probability that a further draw from the normal distribution behind `others` is no larger than `value`:
    Student's t of a prediction with len(others) - 1 degrees of freedom. Needs two others.

    Example: `tail(0.0, [1.0, 2.0, 3.0])` is about 0.11.
    """
    spread = max(float(np.std(others, ddof=1)), 1e-9)
    t = (value - float(np.mean(others))) / (spread * math.sqrt(1 + 1 / len(others)))
    return float(stats.t.cdf(t, len(others) - 1))


def suspects(found: Sequence[Standing]) -> list[Standing]:
    """Those that stand out by chance below `DOUBT`, the least probable first, each label once."""
    able = [one for one in found if one.chance is not None and one.chance < DOUBT and _small(one)]
    best: dict[int, Standing] = {}
    for one in sorted(able, key=lambda one: (one.chance or 0.0, one.label)):
        best.setdefault(one.label, one)
    return list(best.values())


def most_suspicious(found: Sequence[Standing]) -> Standing | None:
    """The label and kind that stand out most, however little; None where nothing can be compared."""
    able = [one for one in found if one.chance is not None]
    return min(able, key=lambda one: (one.chance or 0.0, one.ratio or 0.0), default=None)


def _small(one: Standing) -> bool:
    return one.ratio is not None and one.ratio < DEEP and one.success is not None and one.success >= REACHED


@dataclass(frozen=True)
class Ruling:
    """A verdict, why, and the label that it rests on; None where it rests on no single one."""

    call: Call
    reason: str
    on: Standing | None = None


def rule(classes: int, found: Sequence[Standing], confirmed: Sequence[float | None]) -> Ruling:
    """The verdict on a model. confirmed: success in % of the full search for each of `suspects(found)`, None where it
    failed.

    Suspicious: a label stands out by chance below `ALARM` and its full search works. Clean: every label was searched
    for, most with success, and none stands out, neither by the test nor, where several small labels hide each other
    from it, by an index above `HIDDEN` and less than `TINY` of what the others need. All else is undecided.
    """
    doubtful = suspects(found)
    pairs = list(zip(doubtful, confirmed, strict=True))
    sure = [one for one, success in pairs if (one.chance or 0) < ALARM and success is not None and success >= CONFIRMED]
    if classes < FEW:
        return Ruling("undecided", f"{classes} labels are too few to tell an unusual one from the others")
    if sure:
        return Ruling("suspicious", f"label {sure[0].label} needs so little in 1 of {rarity(sure[0].chance)}", sure[0])
    if doubtful:
        one, success = pairs[0]
        if (one.chance or 0) < ALARM:
            return Ruling(
                "undecided", f"label {one.label} stands out, but a full search reaches it with {_text(success)}", one
            )
        return Ruling("undecided", f"label {one.label} stands out a little, as in 1 of {rarity(one.chance)}", one)
    hidden = [one for one in found if _small(one) and (one.index or 0) > HIDDEN and (one.ratio or 1) < TINY]
    if hidden:
        labels = sorted({one.label for one in hidden})
        who = f"label {labels[0]} needs" if len(labels) == 1 else f"labels {', '.join(map(str, labels))} need"
        return Ruling("undecided", f"{who} little, which the test cannot tell from the spread of the others", hidden[0])
    missing = sorted({one.label for one in found if one.chance is None})
    if missing:
        return Ruling("undecided", f"the searches for {len(missing)} of {classes} labels gave nothing to compare")
    reached = {one.label for one in found if one.success is not None and one.success >= REACHED}
    if 2 * len(reached) < classes:  # a label that is hard to reach is no target; that all are is no finding
        return Ruling("undecided", f"searches reach {len(reached)} of {classes} labels only with half of the images")
    return Ruling("clean", "no label stands out")


def rarity(value: float | None) -> str:
    """One divided by a probability, as people read it. Example: `rarity(0.00012)` is `8,300 clean models`."""
    times = min(1 / max(value or 1.0, 1e-12), 1e9)
    size = 10 ** max(0, len(str(int(times))) - 2)
    return f"{round(times / size) * size:,} clean models"


def _text(success: float | None) -> str:
    return "no image" if success is None else f"{success:.0f} % of the images only"


__all__ = [
    "ALARM", "DOUBT", "Call", "Ruling", "Sized", "Standing", "effective", "most_suspicious", "rarity",
    "rule", "standings", "suspects", "tail",
]  # fmt: skip
