"""Where the pinned matrix of `tox -e regress` is computed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from backdoorbench_mcl.errors import UserError

RUNS = "BBMCL_REGRESS_RUNS"


def fresh(environment: Mapping[str, str], default: Path) -> Path:
    """The runs folder of a pinned matrix: what `RUNS` names, else `default`; never one that holds anything.

    A stored stage is not computed again, so that with stored ones a comparison says nothing. Raises UserError.
    """
    runs = Path(environment.get(RUNS) or default)
    if runs.is_file() or (runs.is_dir() and any(runs.iterdir())):
        raise UserError(f"{RUNS}={runs}: expected an empty or absent folder, for what is stored would not be computed")
    return runs
