"""A made-up store and rows with stages in it, for tests of what a page shows of a store."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
from made import make
from safetensors.numpy import save_file

from backdoorbench_mcl.rows import Row
from backdoorbench_mcl.store import Stage, Store


class Shelves(Store):
    """A store of made-up stages with `curves` of `points` each by kind; all predictions and all triggers are equal."""

    def __init__(self, folder: Path, curves: dict[str, int], points: int) -> None:
        super().__init__(folder)
        self.points, self.curves, self.log = points, curves, "\n".join(["x" * 300] * 20)
        self.predictions, self.trigger = folder / "predictions", folder / "trigger"
        self.predictions.mkdir()
        self.trigger.mkdir()
        noise = np.random.default_rng(0).random((4, 32, 32), np.float32)
        save_file({"mask": noise[0], "pattern": noise[1:]}, self.trigger / "trigger.safetensors")
        (self.trigger / "meta.json").write_text(json.dumps({"labels": [0], "l1": 4.2, "success": 99.0, "class": "m:T"}))
        y = np.arange(10_000, dtype=np.int64) % 10
        said = {"y": y, "clean": y, "triggered": y, "goal": 0 * y, "counted": (y != 0).astype(np.uint8)}
        save_file(said, self.predictions / "predictions.safetensors")

    def stage(self, key: str) -> Stage | None:
        kind = key.partition(" ")[0]
        rng = random.Random(key)
        names = [f"curve {i}" for i in range(self.curves.get(kind, 0))]
        curves = {name: [[step, rng.random()] for step in range(self.points)] for name in names}
        return Stage(key, kind, {}, "", {"curves": curves})

    def open(self, stage: Stage) -> Path:
        return self.trigger if stage.kind == "invert" else self.predictions

    def last_attempt(self, key: str) -> tuple[str, str, str] | None:
        return "failed", "no memory", f"{self.log}\n{key}"


def shelved(victims: int, defenses: int) -> list[Row]:
    """Rows whose stages `Shelves` makes up: every 17th has failed, no two have the same parameters."""
    rows = []
    for a in range(victims):
        victim = {"model": f"model {a}", "before": f"predict {a}", "predict": f"predict {a}"}
        attack = {"name": f"attack{a}", "params": {f"p{j}": j for j in range(30)}}
        rows.append(make(f"attack{a}", "before", 99.0, 83.0, stages=victim, target=0, params={"attack": attack}))
        for d in range(defenses):
            own = {**victim, "invert": f"invert {a} {d}", "defend": f"defend {a} {d}", "predict": f"predict {a} {d}"}
            params = {"attack": attack, **{name: {"name": f"{name}{i}", "params": {f"p{j}": j for j in range(30)}}
                                           for name, i in (("defense", d), ("train", 0), ("defend", 0))}}  # fmt: skip
            told: dict[str, Any] = {
                "params": params, "target": 0, "inverter": "nc-box", "inverter_success": 99.2, "inverter_l1": 4.25,
                "clean_n": 2500, "peak_mb": 1234.5,
            }  # fmt: skip
            if (a + d) % 17 == 0:
                rows.append(make(f"attack{a}", f"defense{d}", state="failed", reason="x" * 300, **told,
                                 stages={"failed": f"defend {a} {d}"}))  # fmt: skip
            else:
                rows.append(make(f"attack{a}", f"defense{d}", 5.0, 80.0, stages=own, **told))
    return rows
