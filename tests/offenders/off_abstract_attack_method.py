"""Leaves out what makes an attack."""

from __future__ import annotations

from backdoorbench_mcl.api import Attack


class Offender(Attack):
    name = "abstract"
