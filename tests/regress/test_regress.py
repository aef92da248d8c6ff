"""Every shipped attack and defense against a recorded run: minutes, so only where BBMCL_REGRESS is set.

`tox -e regress` compares, `BBMCL_REGRESS=record tox -e regress` writes `baseline.json` anew; see `recording.drift` for
what may differ where. The kernels are pinned, so that processors of one maker compute the same bits. Everything is
computed anew, in a temporary folder or in `BBMCL_REGRESS_RUNS`, which must be empty or absent; `BBMCL_RUNS` is ignored.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pinned
import pytest

from backdoorbench_mcl import presets, recording
from backdoorbench_mcl.errors import UserError
from backdoorbench_mcl.request import Options

HERE = Path(__file__).resolve().parent
PINNED, BASELINE = HERE / "pinned.toml", HERE / "baseline.json"
AVX2 = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_CBWR": "AVX2"}

pytestmark = [
    pytest.mark.skipif("BBMCL_REGRESS" not in os.environ, reason="takes minutes; run it with: tox -e regress"),
    pytest.mark.timeout(3 * 3600),
]


def options() -> Options:
    names = {"attacks", "defenses", "dataset", "model", "seeds", "defense-seeds", "preset", "budget", "set", "device",
             "precision", "threads-per-job"}  # fmt: skip
    given = presets.read_config(PINNED, names)
    del given["threads_per_job"]
    return Options(overrides=given.pop("set_"), **given)


def test_nothing_has_drifted(tmp_path: Path) -> None:
    try:
        runs = pinned.fresh(os.environ, tmp_path / "runs")
    except UserError as error:
        raise pytest.fail.Exception(str(error), pytrace=False) from None
    command = [sys.executable, "-m", "backdoorbench_mcl.cli", "matrix", "--config", str(PINNED), "--runs", str(runs)]
    env = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"} | AVX2
    done = subprocess.run(command, env=env, check=False)
    assert done.returncode in (0, 1)  # a cell that failed is told below, with what it was
    now = recording.record(options(), runs, env)
    if os.environ["BBMCL_REGRESS"] == "record":
        BASELINE.write_text(json.dumps(now, indent=1) + "\n")
        return
    baseline = json.loads(BASELINE.read_text())
    allowed = ", ".join(f"{points:g} points of {name.upper()}" for name, points in recording.POINTS.items())
    how = "bit for bit" if recording.exact(baseline, now) else f"within {allowed}"
    lines = recording.drift(baseline, now, recording.POINTS)
    print(f"compared {how} with a run on {baseline['made']['processor']}, {baseline['made']['machine_class']}")
    assert not lines, "\n" + "\n".join(lines)
