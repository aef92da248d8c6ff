"""Prints and ends the program when a cell is finished."""

from __future__ import annotations

import sys

from backdoorbench_mcl.hooks import hookimpl


@hookimpl
def bbmcl_cell_finished(row: object) -> None:
    print("noise in an observer")
    sys.exit(0)
