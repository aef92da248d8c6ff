"""Ends the program in a hook."""

from __future__ import annotations

import sys

from backdoorbench_mcl.hooks import Entry, hookimpl


@hookimpl
def bbmcl_defenses() -> list[Entry]:
    sys.exit(0)
