"""Every attack against every defense on `shapes`, as a user types it: minutes, so only where BBMCL_WHOLE is set.

`tox -e whole` runs it and prints the grid and how long it took, cold.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from backdoorbench_mcl import report
from backdoorbench_mcl.rows import Row

ATTACKS = {"badnets", "blend", "trojan", "cl", "sig"}
DEFENSES = {"ft", "nad", "ibau", "nc", "mcldef", "mcldef+"}
ORACLE = "mcldef(inverter=true)"

pytestmark = [
    pytest.mark.skipif("BBMCL_WHOLE" not in os.environ, reason="takes minutes; run it with: tox -e whole"),
    pytest.mark.timeout(3 * 3600),
]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("whole") / "runs"


def matrix(runs: Path, defenses: str) -> list[Row]:
    """The rows of a matrix of all attacks, by the command; its progress goes to this process's standard error."""
    command = [sys.executable, "-m", "backdoorbench_mcl.cli", "matrix", "--attacks", "all", "--defenses", defenses]
    started = time.monotonic()
    env = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    done = subprocess.run(
        [*command, "--runs", str(runs), "--format", "json"], env=env, stdout=subprocess.PIPE, text=True, check=False
    )
    assert done.returncode == 0
    rows = [Row.from_dict(item) for item in json.loads(done.stdout)]
    print(report.render(rows, "table"))
    print(f"--defenses {defenses}: {(time.monotonic() - started) / 60:.1f} minutes")
    return rows


@pytest.mark.parametrize("defenses", ["all", f"all,{ORACLE}", "mcldef,nad"])
def test_every_cell_is_filled(runs: Path, defenses: str) -> None:
    rows = matrix(runs, defenses)
    wanted = {"all": DEFENSES, f"all,{ORACLE}": DEFENSES | {ORACLE}, "mcldef,nad": {"mcldef", "nad"}}[defenses]
    assert Counter((row.attack, row.defense) for row in rows) == Counter(
        (attack, defense) for attack in ATTACKS for defense in wanted | {"before"}
    )
    for row in rows:
        if row.defense == "before":
            assert row.state == "ok"
        elif row.gate == "weak":  # named, and no defense is run on it
            assert (row.state, row.reason) == ("n/a", "weak attack")
        else:
            assert row.state == "ok", (row.attack, row.defense, row.reason)
            assert row.asr is not None
        told = {"before": (), "ft": (), "nad": (), "ibau": (), ORACLE: ("target", "trigger")}
        assert row.knows == told.get(row.defense, ("target",))
    assert {row.attack for row in rows if row.gate == "weak"} <= {"cl"}  # docs/shapes.md: 94.6, and 90 is the gate
