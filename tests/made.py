"""Made-up rows for tests of reports."""

from __future__ import annotations

from typing import Any

from backdoorbench_mcl.evaluate import der
from backdoorbench_mcl.rows import Row, State


def make(
    attack: str,
    defense: str,
    asr: float | None = 0.0,
    ba: float = 80.0,
    *,
    victim: int = 0,
    draw: int = 0,
    ftr: float = 2.0,
    tca: float = 70.0,
    state: State = "ok",
    **more: Any,
) -> Row:
    """A row whose counts belong to 9000 + 1000 test images; `before` for the undefended victim."""
    before = defense == "before"
    numbers: dict[str, Any] = {}
    if state == "ok":
        for name, value, n in (("asr", asr, 9000), ("ba", ba, 10000), ("ftr", ftr, 9000), ("tca", tca, 1000)):
            k = None if value is None else round(value * n / 100)
            numbers |= {name: None if k is None else 100 * k / n, f"{name}_k": k, f"{name}_n": n}
        numbers |= {"ba_nt": ba + 0.6, "ra": 79.0}
        if not before:
            numbers |= {"der": der(99.64, asr, 82.4, ba), "seconds": 12.34, "seconds_shared": 45.6}
    base: dict[str, Any] = {
        "key": f"{attack}|{defense}|{victim}|{draw}|{sorted(more.items())!r}",
        "dataset": "cifar10",
        "model": "wrn-16-1",
        "clean_rate": None if before else 0.05,
        "asr_before": 99.64,
        "ba_before": 82.4,
        "tca_before": 76.9,
        "gate": "" if asr is None else "ok",
        "params": {"attack": {"name": attack}, "defense": {"name": defense}},
    }
    seeds = {"victim_seed": victim, "defense_seed": None if before else draw}
    return Row(attack=attack, defense=defense, state=state, **{**base, **seeds, **numbers, **more})
