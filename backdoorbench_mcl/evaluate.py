"""Metrics: pure functions of predicted labels (spec 1, 6.5). numpy only; counts are integers.

Denominators: BA over all test images; BA_nt and FTR over the images whose goal is not their own label; TCA over
the others (the target class); ASR and RA over the images that the attack counts. FTR is the floor of ASR: the
share of clean non-target images that the model calls the target anyway.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from .errors import PluginError
from .rows import Row

EVALUATOR_VERSION = 2
GATE_OK = 95.0  # ASR of the undefended victim, in %: from here on the attack counts as planted
GATE_WEAK = 90.0  # below: defenses are not run; between the two: flagged and not ranked (design 3.7)
GATE_EXCESS = 50.0  # points by which ASR must exceed FTR, or the victim says the target whatever it is shown
FTR_MARGIN = 1.0  # points by which a repair may raise FTR and still call it a floor (spec 12.2: the margin for ASR)
ROBUST = 40.0  # accuracy under PGD-10, in %, from which on a surrogate is called robust (spec 4.4)
ERASED = 0.1  # of the target-class accuracy before: below, a defense has deleted the class (spec 6.5)

MARKS = ("asr_at_floor", "target_class_erased")  # the keys of `marks`
Gate = Literal["ok", "flagged", "weak", ""]
Labels = npt.NDArray[Any]


def measure(
    clean: Labels, triggered: Labels, y: Labels, goal: Labels, counted: Labels
) -> dict[str, float | int | None]:
    """Every metric of one model (spec 1.1), with the integer counts behind it.

    clean, triggered: predicted labels (N,) of the clean test images and of the same images with the trigger.
    y, goal: true labels and the labels that the attacker wants (N,); all integer. counted: bool (N,), the images
    over which ASR and RA are taken (none of them for the attack `none`).

    Returns, for m in ba, ba_nt, tca, asr, ra, ftr: `m` in percent 0-100, unrounded, None where its denominator is 0;
    `m_k` and `m_n`, the counts. RA + ASR <= 100 always.
    Raises ValueError where shapes or dtypes do not fit, PluginError where an attack counts an image whose goal is
    its own label. Example: `measure(p, q, y, np.full_like(y, 5), y != 5)["asr"]`.
    """
    arrays = {"clean": clean, "triggered": triggered, "y": y, "goal": goal}
    for name, array in arrays.items():
        if array.ndim != 1 or array.shape != y.shape or array.dtype.kind not in "iu":
            raise ValueError(f"{name}: expected integer labels ({len(y)},), got {array.dtype} {array.shape}")
    if counted.dtype != np.bool_ or counted.shape != y.shape:
        raise ValueError(f"counted: expected bool ({len(y)},), got {counted.dtype} {counted.shape}")
    # Stored predictions are uint8 or uint16, labels int64: one signed type, so that no comparison wraps.
    clean, triggered, y, goal = (array.astype(np.int64) for array in arrays.values())
    others = y != goal
    if bool((counted & ~others).any()):
        raise PluginError(
            f"the attack counts {int((counted & ~others).sum())} test images whose goal is their own label; "
            "expected `counted` within `y != goal`; see Attack.goal"
        )
    hits = {
        "ba": (clean == y, np.ones_like(others)),
        "ba_nt": (clean == y, others),
        "tca": (clean == y, ~others),
        "asr": (triggered == goal, counted),
        "ra": (triggered == y, counted),
        "ftr": (clean == goal, others),
    }
    out: dict[str, float | int | None] = {}
    for name, (hit, among) in hits.items():
        k, n = int((hit & among).sum()), int(among.sum())
        out[name] = percent(k, n)
        out[f"{name}_k"] = k
        out[f"{name}_n"] = n
    return out


def predicted(stored: Mapping[str, Labels]) -> dict[str, float | int | None]:
    """`measure` of stored predictions: `clean`, `triggered`, `y`, `goal` and, as numbers, `counted`, each (N,).

    Raises as `measure` does, and KeyError where one of them is missing.
    """
    counted = stored["counted"].astype(bool)
    return measure(stored["clean"], stored["triggered"], stored["y"], stored["goal"], counted)


def percent(k: int, n: int) -> float | None:
    """100 k / n, None for n = 0. Example: `percent(7471, 9000)` -> 83.0111..."""
    return 100.0 * k / n if n else None


def der(
    asr_before: float | None, asr_after: float | None, ba_before: float | None, ba_after: float | None
) -> float | None:
    """Defense effectiveness rating (spec 1.1) in 0-100 from percentages over all classes; 50 = nothing changed.

    A gain in BA or a rise of ASR is not counted. None if any value is. Example: DER(99.64, 2.22, 83.01, 82.19) = 98.30.
    """
    if asr_before is None or asr_after is None or ba_before is None or ba_after is None:
        return None
    return (max(0.0, asr_before - asr_after) - max(0.0, ba_before - ba_after) + 100.0) / 2.0


def gate(asr: float | None, ba: float | None = None, ftr: float | None = None) -> Gate:
    """Whether the attack was planted, from the ASR in % of the undefended victim; "" where there is no ASR.

    ba: of an all-to-all attack, the share of images that can reach their goal at all (a victim that does not know an
    image does not know its goal either): ASR counts as a share of it. Example: `gate(82.0, 83.0)` is "ok".
    ftr: of the same victim; one that calls most clean images the target, too, was not taught a trigger.
    """
    if asr is None:
        return ""
    if ftr is not None and asr - ftr < GATE_EXCESS:
        return "weak"
    if ba is not None:
        asr = min(100.0, 100.0 * asr / ba) if ba > 0 else 0.0
    if asr >= GATE_OK:
        return "ok"
    return "flagged" if asr >= GATE_WEAK else "weak"


def tied_at_floor(*runs: Row) -> bool:
    """Whether ASR, pooled over the runs of one cell, is not above FTR: no other cell beats such a one.

    Runs without counts are pooled by their percentages. False where either value is undefined.
    """
    measured = [row for row in runs if row.asr is not None and row.ftr is not None]
    if not measured:
        return False
    counts = [(row.asr_k, row.asr_n, row.ftr_k, row.ftr_n) for row in measured]
    whole = [[c for c in four if c is not None] for four in counts]
    if all(len(four) == 4 for four in whole):  # exact: k/n <= k'/n' in integers
        asr_k, asr_n, ftr_k, ftr_n = (sum(column) for column in zip(*whole, strict=True))
        return bool(asr_k * ftr_n <= ftr_k * asr_n)
    return sum(row.asr or 0.0 for row in measured) <= sum(row.ftr or 0.0 for row in measured)


def floor_raised(ftr: float | None, ftr_before: float | None) -> bool:
    """Whether a repair lifted FTR, the floor of its ASR, by more than `FTR_MARGIN` points; False if a value is unknown.

    A model that calls everything the target has ASR = FTR = 100: such a floor excuses nothing.
    """
    return ftr is not None and ftr_before is not None and ftr > ftr_before + FTR_MARGIN


def marks(row: Row) -> dict[str, bool | None]:
    """What a run's numbers alone must not be read without; None where it cannot be told.

    `asr_at_floor`: ASR not above FTR, which the repair did not raise. `target_class_erased`: see below.
    """
    known = row.asr is not None and row.ftr is not None
    floor = tied_at_floor(row) and not floor_raised(row.ftr, row.ftr_before)
    gone = None if row.tca is None or row.tca_before is None else target_class_erased(row.tca, row.tca_before)
    return {"asr_at_floor": floor if known else None, "target_class_erased": gone}


def target_class_erased(tca: float | None, tca_before: float | None) -> bool:
    """Whether the repaired model hardly says the target class any more: TCA below a tenth of its value before."""
    return tca is not None and tca_before is not None and tca < ERASED * tca_before
