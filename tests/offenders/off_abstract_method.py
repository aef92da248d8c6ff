"""Leaves out what makes a defense."""

from __future__ import annotations

from backdoorbench_mcl.api import Defense


class Offender(Defense):
    name = "abstract"
