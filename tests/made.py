"""Made-up rows for tests of reports."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

from backdoorbench_mcl import reproduce, runner
from backdoorbench_mcl.evaluate import der
from backdoorbench_mcl.report.html import Part, page
from backdoorbench_mcl.report.sheets import Sheet
from backdoorbench_mcl.request import Options
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


@contextmanager
def computed(by_target: Mapping[str, Sequence[Row]], stored: Sequence[Row] = ()) -> Iterator[None]:
    """As if runs, one after the other, gave these rows; stored: further rows of the runs folder."""
    order = iter(by_target.values())
    known = [*stored, *(row for rows in by_target.values() for row in rows)]
    with (
        mock.patch.object(runner, "run_matrix", side_effect=order),
        mock.patch.object(runner, "stored_rows", lambda runs, keep=lambda row: True: list(filter(keep, known))),
        mock.patch.dict(os.environ, COLUMNS="100"),
    ):
        yield


PAPER: dict[str, Any] = {
    "params": {"train": {"augment": "none"}, "defend": {"augment": "crop+flip"}}, "preset": "paper", "budget": "full",
}  # fmt: skip


def row(attack: str, defense: str, asr: float, ba: float, victim: int = 0, **more: Any) -> Row:
    """A row that follows the printed protocol."""
    return make(attack, defense, asr, ba, victim=victim, **{**PAPER, **more})


def spread(
    attack: str, defense: str, asr: float, ba: float, *, n: int = 5, wide: float = 0.3, **more: Any
) -> list[Row]:
    """n victims around two values; victims differ by the same amount in every defense, repairs by less."""
    out = []
    for v in range(n):
        jitter = wide * (0.1 * math.sin(7 * v + len(defense)) + math.cos(v))
        out.append(row(attack, defense, max(0.0, asr + jitter), ba + jitter, v, **more))
    return out


def reproduced(
    runs: Path, by_target: Mapping[str, Sequence[Row]], fmt: Any = "table", stored: Sequence[Row] = ()
) -> list[reproduce.Reproduced]:
    """Targets on rows that were not computed: `reproduced(tmp_path, {"table1": rows, "fig4": others})`."""
    options = Options("", "", "cifar10", "", budget="full", precision="fp32")
    with computed(by_target, stored):
        return list(reproduce.reproduce(",".join(by_target), options, runner.Settings(runs), fmt))


def page_of(rows: Sequence[Row], below: Sequence[Sheet] = (), **how: Any) -> str:
    """The HTML page of rows without parts. how: of `report.html.page`."""
    return page([Part("", rows, below)], **how)
