"""A 2x2 matrix on the toy plugin that takes seconds: as options, as a plan, as a command line."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from backdoorbench_mcl import plan, request, runner
from backdoorbench_mcl.registry import cache_folder
from backdoorbench_mcl.request import Options
from backdoorbench_mcl.rows import Row

TOY = Path(__file__).parent / "toy"
SETTINGS = {
    "badnets": ("target=1", "rate=0.2"), "blend": ("target=1", "rate=0.2", "alpha=0.9"),
    "mcldef": ("inverter=nc-box(steps=20)",),
}  # fmt: skip


def overrides(attacks: str, defenses: str) -> tuple[str, ...]:
    """`--set` lines for what is selected."""
    named = [f"{name}.{line}" for name, lines in SETTINGS.items() for line in lines if name in attacks + "," + defenses]
    return (*named, "train.steps=200", "defend.steps=20")


def command(attacks: str = "badnets,blend", defenses: str = "ft,mcldef") -> tuple[str, ...]:
    """The matrix as arguments of `bbmcl`."""
    sets = [part for line in overrides(attacks, defenses) for part in ("--set", line)]
    base = ["matrix", "--dataset", "tiny", "--model", "tiny-net", "--clean-rate", "0.2"]
    return (*base, "--attacks", attacks, "--defenses", defenses, *sets)


VARYING = {"seconds", "seconds_shared", "peak_mb"}  # what two runs of the same cell may differ in


def options(attacks: str = "badnets,blend", defenses: str = "ft,mcldef", **changes: Any) -> Options:
    """The same matrix as options."""
    base: dict[str, Any] = {"dataset": "tiny", "model": "tiny-net", "clean_rate": 0.2}
    return Options(attacks, defenses, **{**base, "overrides": overrides(attacks, defenses), **changes})


def install_toy(monkeypatch: pytest.MonkeyPatch, cache: str) -> None:
    """Make the toy plugin visible to this process and to its children."""
    monkeypatch.syspath_prepend(str(TOY))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(TOY), *filter(None, [os.environ.get("PYTHONPATH")])]))
    monkeypatch.setenv("BBMCL_CACHE", cache)


def resolve(asked: Options) -> request.Request:
    """`asked`, resolved by this process."""
    known = runner.registry()
    return request.resolve(asked, known, runner.prepare_data(known, cache_folder()))


def build(asked: Options) -> plan.Plan:
    """The plan of `asked`."""
    return plan.build(resolve(asked))


def essence(rows: list[Row]) -> list[dict[str, Any]]:
    """Rows without what may differ between two runs, by key."""
    found = [{k: v for k, v in row.as_dict().items() if k not in VARYING} for row in rows]
    return sorted(found, key=lambda row: str(row["key"]))
